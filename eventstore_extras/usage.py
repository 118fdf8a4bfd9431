"""POST /v1/events/usage: aggregates events over a range of time, or over each window of it (API: Usage).

From top to bottom: windows in any time zone, the request and the checked query, the SQL of an aggregate, the answer,
the handler. The modules meters and analytics use this one.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import math
import sqlite3
import sys
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator, Sequence
from datetime import UTC, datetime, timedelta, tzinfo
from functools import partial
from typing import Any
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from eventstore import (
    A_SUNDAY,
    DECIMAL,
    ENCODER,
    IN_SPAN,
    MAX_WINDOWS,
    MIN_TIME_US,
    MINUTE_US,
    READER_THREADS,
    TEXT_OF_JSON,
    WINDOW_MINUTES,
    Faults,
    FieldError,
    JsonResponse,
    Operation,
    PropertyFilters,
    Selection,
    Service,
    Span,
    Sql,
    T,
    View,
    check_property_filters,
    check_time,
    check_window_size,
    given_time,
    index_of,
    matching,
    one_of,
    parse_time,
    property_parameters,
    property_sql,
    quoted,
    raise_fault,
    read_fields,
    select_per_span,
    spans_of_windows,
    sql,
    time_range,
    to_datetime,
    to_us,
    utc_windows,
)
from eventstore_extras.openapi import (
    ANSWERED_TIME,
    FILTERS_SCHEMA,
    NULL,
    POSITIVE_SCHEMA,
    TIME_SCHEMA,
    any_case,
    choice,
    enum_schema,
    optional,
    ref,
)

__all__ = [
    "AGGREGATIONS", "AGGREGATION_ENUMS", "AGGREGATION_SCHEMA", "OPERATIONS", "WEIGHT", "Usage", "UsageIn",
    "UsageQuery", "Windows", "add_text_hash", "aggregate", "check_aggregation", "check_positive", "number_sql",
    "read_all", "select_cells", "shares_of", "sum_of", "unique_sql", "usage_answer", "usage_query", "usage_value",
]  # fmt: skip

AGGREGATIONS = ("COUNT", "SUM", "AVG", "MAX", "COUNT_UNIQUE", "LATEST", "SUM_WITH_MULTIPLIER", "WEIGHTED_SUM")

# ---------------------------------------------------------------------------------------------- Windows


class Windows(Struct, frozen=True):
    """Windows of one size in one time zone; `month_day` is the day on which months start (API: Usage).

    A window starts when the zone's clocks show its start time, or skip it. When clocks go back, some times occur twice,
    such as 1:30. Windows of up to an hour then start twice as well; a longer window includes both hours.
    """

    size: str
    zone: tzinfo = UTC
    month_day: int = 1

    def spans(self, start_us: int, end_us: int, field: str = "window_size") -> list[Span]:
        """Return the part of each window in [start, end). Raises ApiError for `field` if there are too many."""
        size = f"names a meter whose bucket_size {self.size}" if field == "meter_id" else self.size
        return spans_of_windows(self.bounds(start_us, end_us), start_us, end_us, size, field)

    def bounds(self, start_us: int, end_us: int) -> Iterator[int]:
        """Yield the start of each window that overlaps [start, end), and the end of the last one.

        Raises OverflowError or ValueError outside the years 1 to 9999.
        """
        minutes = WINDOW_MINUTES.get(self.size, 32 * 1440)  # 32 days after the start of a month is in the next one
        if self.zone is UTC and minutes < 1440:  # 100,000 windows take 3 ms instead of 0.4 s
            yield from utc_windows(self.size, start_us, end_us)
            return
        repeats = minutes <= 60
        wall = self._floor(self._wall(start_us - repeats * 180 * MINUTE_US))  # clocks go back by 3 hours at most
        first, bounds = MIN_TIME_US, set[int]()
        while first < end_us and len(bounds) < MAX_WINDOWS + 360:  # windows before the start do not count
            check_time()
            first, second = (to_us(wall.replace(tzinfo=self.zone, fold=fold)) for fold in (0, 1))
            if first > second:  # the clocks skip this time: find the moment when they do
                first = second = second + bisect_left(range(second, first), wall, key=self._wall)
            bounds |= {first, second if repeats else first}
            wall = self._floor(wall + timedelta(minutes=minutes))
        ordered = sorted(bounds)
        yield from ordered[bisect_right(ordered, start_us) - 1 : bisect_left(ordered, end_us) + 1]

    def _wall(self, time_us: int) -> datetime:
        """Return the local time in the zone, without a zone."""
        return to_datetime(time_us).astimezone(self.zone).replace(tzinfo=None)

    def _floor(self, wall: datetime) -> datetime:
        """Return the local time at which the window with this local time starts."""
        if minutes := WINDOW_MINUTES.get(self.size):
            return wall - min((wall - A_SUNDAY) % timedelta(minutes=minutes), wall - datetime.min)  # not in year 0
        shift = timedelta(days=self.month_day - 1)
        return (wall - shift).replace(day=1, hour=0, minute=0, second=0, microsecond=0) + shift


def _parse_zone(name: str) -> tzinfo:
    """Return an IANA time zone; UTC if the name is unknown, as FlexPrice does (API: Usage)."""
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return UTC


# ---------------------------------------------------------------------------------------------- Query


class UsageIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/events/usage (API: Usage)."""

    event_name: str | None = None
    aggregation_type: str | None = None
    property_name: str | None = None
    external_customer_id: str | None = None
    customer_id: str | None = None
    start_time: str | None = None
    end_time: str | None = None
    window_size: str | None = None
    bucket_size: str | None = None
    filters: PropertyFilters | None = None
    multiplier: str | float | None = None
    billing_anchor: str | None = None
    timezone: str | None = None
    group_by: list[str] | None = None
    group_by_property: str | None = None


class UsageQuery(Selection, frozen=True, kw_only=True):
    """A checked request: the aggregation, its events and its windows (API: Usage). The end is exclusive."""

    aggregation: str = "COUNT"
    property_name: str = ""
    multiplier: float = 1.0
    windows: Windows | None = None
    is_of_meter: bool = False  # the aggregation is a meter's
    bucketed: bool = False  # add up the values of the windows
    group_property: str = ""  # add up the MAX of each group in a window
    lifetime: bool = False  # without windows: include everything before the range


_USAGE = msgspec.json.Decoder(UsageIn)
check_aggregation = one_of(*AGGREGATIONS)


def check_positive(value: str | float) -> float:
    """Convert a number or its text. Raises FieldError if it is not above 0, or too large for a 64-bit float."""
    if not (DECIMAL.fullmatch(str(value)) and 0 < float(value) < math.inf):
        sent = quoted(value) if isinstance(value, str) else f"{value:.15g}"
        raise FieldError("out_of_range", f"must be a decimal number greater than 0, got {sent}")
    return float(value)


def _usage_multiplier(sent: UsageIn, kind: str | None, faults: Faults) -> float:
    """Return the multiplier, 1 by default. Records a fault if another type than SUM_WITH_MULTIPLIER has one."""
    is_given = sent.multiplier not in (None, "")
    if kind != "SUM_WITH_MULTIPLIER" and is_given and kind:
        faults.add("multiplier", "invalid_format", f"goes with SUM_WITH_MULTIPLIER only, not with {kind}")
    return faults.check("multiplier", check_positive, sent.multiplier) or 1.0


def _without_effect(sent: UsageIn) -> Iterator[str]:
    """Yield the fields that are sent but change nothing, because of the value or the absence of another field."""
    kind = (sent.aggregation_type or "").upper() if sent.property_name else "COUNT"
    is_bucketed = bool(sent.bucket_size) and kind in ("MAX", "SUM")
    size = sent.bucket_size if is_bucketed else sent.window_size
    needs = {
        "bucket_size": is_bucketed, "window_size": not is_bucketed, "timezone": bool(size),
        "billing_anchor": size == "MONTH", "group_by": is_bucketed and kind == "MAX",
        "group_by_property": is_bucketed and kind == "MAX" and not sent.group_by,
    }  # fmt: skip
    yield from (name for name, has_effect in needs.items() if getattr(sent, name) and not has_effect)


def usage_query(sent: UsageIn, view: View, faults: Faults) -> UsageQuery:
    """Check a request and fill in its defaults. Raises ApiError with every fault (API: Usage)."""
    if not sent.event_name:
        faults.add("event_name", "required", "is required")
    if not sent.aggregation_type:
        faults.add("aggregation_type", "required", f"is required: one of {', '.join(AGGREGATIONS)}")
    kind = faults.check("aggregation_type", check_aggregation, (sent.aggregation_type or "").upper())
    multiplier = _usage_multiplier(sent, kind, faults)
    start_us, end_us = time_range(sent.start_time, sent.end_time, view.now_us, faults)
    window_size = faults.check("window_size", check_window_size, sent.window_size)
    bucket_size = faults.check("bucket_size", check_window_size, sent.bucket_size)
    anchor = given_time(sent.billing_anchor)
    faults.check("billing_anchor", parse_time, anchor)
    zone = _parse_zone(sent.timezone or "UTC")
    if zone is UTC and sent.timezone not in (None, "", "UTC"):
        faults.ignore(["timezone"], f"must be like Europe/Berlin, got {quoted(sent.timezone or '')}: UTC is used")
    property_filters = check_property_filters("filters", sent.filters, faults)
    faults.raise_any()
    kind = kind if kind and sent.property_name else "COUNT"
    bucketed = bool(bucket_size) and kind in ("MAX", "SUM")
    first_group = (sent.group_by or [f"properties.{sent.group_by_property or ''}"])[0]
    grouped = bucketed and kind == "MAX" and first_group.startswith("properties.")
    size = bucket_size if bucketed else window_size
    month_day = int(anchor[8:10]) if anchor else 1  # the day in the anchor's own zone
    columns = ("event_name", "external_customer_id", "customer_id")
    return UsageQuery(
        view=view, start_us=start_us, end_us=end_us, aggregation=kind, property_name=sent.property_name or "",
        filters={column: value for column in columns if (value := getattr(sent, column))},
        property_filters=property_filters, multiplier=1.0 if kind == "COUNT" else multiplier,
        windows=Windows(size, zone, month_day) if size else None, bucketed=bucketed,
        group_property=first_group.removeprefix("properties.") if grouped else "",
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- SQL

_MIN_REAL, _MAX_REAL = (f"CAST('{sign}1.7976931348623157e308' AS REAL)" for sign in ("-", ""))
# For WEIGHTED_SUM: the fraction of the range that remains after an event.
WEIGHT = "ifnull((:end_us - max(timestamp_us, :start_us)) * 1.0 / (:end_us - :start_us), 1.0)"


def number_sql(name: str, key: str) -> Sql:
    """Build the expression for a property's number; its value is what `property_number` returns.

    It reads the property only once, as v: a sum takes 0.8 to 0.97 times as long. `name` is a unique prefix for the
    parameters' names.
    """
    path = f":{name}_path"
    # When SQLite compares a text with a REAL, it converts the text of a number; any other text is greater than every
    # number. It ignores white space around a number. The range '!' to ':' excludes white space at the start of v; with
    # white space at its end, v || 'e0' is not a number.
    is_number = f"BETWEEN {_MIN_REAL} AND {_MAX_REAL}"
    is_true = f"v = 1 AND properties -> {path} = 'true'"
    return Sql(f"""(SELECT CASE
        WHEN v BETWEEN '!' AND ':' AND (v || 'e0') {is_number} THEN CAST(v AS REAL)
        WHEN v < '' AND v {is_number} THEN CASE WHEN {is_true} THEN 0.0 ELSE CAST(v AS REAL) END
        WHEN v BETWEEN '!' AND ':' OR properties LIKE '%\\%' THEN property_number(properties, :{name}_key)
        ELSE 0.0 END FROM (SELECT properties ->> {path} AS v))""", property_parameters(name, key))  # fmt: skip


_MAX_UNIQUE = 1_000_000  # distinct values in a range without windows: they are held in memory
_MAX_COMPARED_CHARS = 500  # hash values of longer properties, so that a million different ones do not fill the disk
_MAX_TEXT_CHARS = 64  # UUIDs and hexadecimal hashes are shorter; texts that call into Python take 2.6 times as long


def unique_sql(name: str, key: str) -> Sql:
    """Build an expression that differs for two events if the property's texts differ. Long texts are hashed.

    This bounds the memory for each value. The function `text_hash` must exist: see `add_text_hash`.
    """
    text = property_sql("text", name, key)
    return sql(f"(SELECT iif(length(v) > {_MAX_TEXT_CHARS}, text_hash(v), v) FROM (SELECT {text} AS v))", text)


def _unique_texts(key: str, rows: str) -> Sql:
    """Build a SELECT that returns a JSON array with all values of `unique_sql` in these rows, some of them twice.

    It compares the values' JSON and converts only the distinct ones: if values repeat, this takes 0.7 times as long.
    Values in long properties are hashed before that, and marked with a '!', which sorts before all JSON.
    """
    text = unique_sql("property", key)
    json = "NULL" if text.values["property_path"] == "$" else "properties -> :property_path"
    is_short = f"properties NOT LIKE '%\\%' AND length(properties) < {_MAX_COMPARED_CHARS}"
    unmarked = "CAST(substr(CAST(v AS BLOB), 2) AS TEXT)"  # cut bytes, since a text may contain a NUL
    converted = f"""CASE WHEN v < '"' THEN {unmarked}
        WHEN length(v) > {_MAX_TEXT_CHARS} THEN text_hash({TEXT_OF_JSON}) ELSE {TEXT_OF_JSON} END"""
    distinct = f"SELECT DISTINCT iif({is_short}, {json}, '!' || {text}) AS v {rows} LIMIT {_MAX_UNIQUE + 2}"
    return sql(f"SELECT CASE WHEN count(*) > 0 THEN json_group_array({converted}) END FROM ({distinct})", text)


def _text_hash(text: str) -> str:
    """Return "#" and a hash: longer by one character than any text that is not hashed, so never equal to one."""
    return "#" + hashlib.blake2b(text.encode(), digest_size=_MAX_TEXT_CHARS // 2).hexdigest()


def add_text_hash(conn: sqlite3.Connection) -> None:
    conn.create_function("text_hash", 1, _text_hash, deterministic=True)


def sum_of(value: Sql | str, condition: str = "") -> str:
    """Build the sum of a column. SQLite 3.43 to 3.45 returns NULL if a sum overflows, so scale the values by 2**-60."""
    if (3, 43) <= sqlite3.sqlite_version_info < (3, 46):
        return f"(total({value} * {2.0**-60}){condition} * {2.0**60})"
    return f"total({value}){condition}"


def _cell_sql(query: UsageQuery) -> Sql:
    """Build the SELECT that returns one span's aggregate, NULL for a span without events."""
    text = unique_sql("property", query.property_name)
    number = number_sql("number", query.property_name)
    where = matching(query)
    limits = sql("", start_us=query.start_us, end_us=query.end_us)
    rows = f"FROM events {index_of(query.filters)} WHERE {where} AND {IN_SPAN}"
    # Beside max(), SQLite takes the value of a bare column from the row with the maximum.
    exact = "property_number(properties, :number_key)"
    aggregate = {
        "COUNT": "count(*)", "MAX": f"iif(max({number}) IS NULL, NULL, {exact})",
        "AVG": f"printf('%!.17g %d', {sum_of(number)}, count(*))",
        "COUNT_UNIQUE": f"count(DISTINCT {text})",
        "WEIGHTED_SUM": sum_of(f"{number} * {WEIGHT}"),
    }.get(query.aggregation, sum_of(number))  # fmt: skip
    group = property_sql("text", "group", query.group_property)
    if query.group_property:
        aggregate, rows = sum_of("v"), f"FROM (SELECT max({number}) AS v {rows} GROUP BY ifnull({group}, ''))"
    cell = f"SELECT CASE WHEN count(*) > 0 THEN {aggregate} END {rows}"
    if query.aggregation == "LATEST":
        cell = f"SELECT {exact} {rows} ORDER BY timestamp_us DESC, id DESC LIMIT 1"
    if query.aggregation == "COUNT_UNIQUE" and not query.windows:  # spans of one range may share texts
        cell = str(_unique_texts(query.property_name, rows))
    return sql(cell, text, number, where, limits, group)


# ---------------------------------------------------------------------------------------------- Answer

_TEXTS = msgspec.json.Decoder(list[str | None])


class UsageResult(Struct):
    """The value of one window."""

    window_size: datetime  # the window's start
    value: float


class Usage(Struct):
    """An aggregation over a range, or over each window of it (API: Usage)."""

    event_name: str
    type: str
    value: float | None  # null if the request has a window_size
    results: list[UsageResult]


def _count_unique(spans: Iterable[str], field: str) -> int:
    """Count the distinct values in JSON arrays. If there are too many, raises ApiError for `field`."""
    values: set[str | None] = set()
    for span in spans:
        texts = _TEXTS.decode(span)
        values.update(texts)
        if max(len(texts), len(values)) > _MAX_UNIQUE + 1:  # one may be None; `_unique_texts` cuts off the rest
            problem = f"has more than {_MAX_UNIQUE} distinct values in this range: take a shorter one, or a window_size"
            raise_fault(field, "out_of_range", problem)
    return len(values - {None})


def usage_value(query: UsageQuery, cells: Iterable[Any]) -> float:
    """Combine the aggregates of consecutive spans. Return 0 if the value is negative (API: Usage)."""
    found = [cell for cell in cells if cell is not None]
    if query.aggregation == "AVG":
        sums, counts = zip(*(cell.split() for cell in found), strict=True) if found else ("0", "1")
        value = sum(map(float, sums)) / sum(map(int, counts))
    elif query.aggregation == "COUNT_UNIQUE" and not query.windows:
        value = _count_unique(found, "meter_id" if query.is_of_meter else "property_name")
    elif query.aggregation == "LATEST":
        value = found[-1] if found else 0.0
    elif query.aggregation == "MAX" and not query.bucketed:
        value = max(found, default=0.0)
    else:
        value = sum(found) * query.multiplier
    return min(max(0.0, float(value)), sys.float_info.max)  # JSON lacks infinity


def usage_answer(query: UsageQuery, spans: Sequence[Span], cells: Sequence[Any]) -> Usage:
    """Make the answer from the aggregate of each span."""
    found = [(span, cell) for span, cell in zip(spans, cells, strict=True) if query.windows and cell is not None]
    results = [UsageResult(to_datetime(span.window_us), usage_value(query, [cell])) for span, cell in found]
    value = usage_value(query, cells) if query.bucketed or not query.windows else None
    return Usage(query.filters["event_name"], query.aggregation, value, results)


# ---------------------------------------------------------------------------------------------- Computing


def _spans_of_range(start_us: int, end_us: int) -> list[Span]:
    """Split a range into one span for each reader thread."""
    cuts = [start_us + (end_us - start_us) * i // READER_THREADS for i in range(READER_THREADS + 1)]
    return [Span(start, end, start_us) for start, end in itertools.pairwise(cuts)]


def shares_of(items: Sequence[T]) -> list[Sequence[T]]:
    """Split items into runs, at most one for each reader thread."""
    size = max(1, math.ceil(len(items) / READER_THREADS))
    return [items[start : start + size] for start in range(0, len(items), size)]


def _spans(query: UsageQuery) -> list[Span]:
    if query.start_us == query.end_us and not query.lifetime:
        return []
    if query.windows:
        buckets_field = "meter_id" if query.is_of_meter else "bucket_size"
        return query.windows.spans(query.start_us, query.end_us, buckets_field if query.bucketed else "window_size")
    if query.group_property:  # undivided: the maxima of a group in two parts would both be added
        start_us = MIN_TIME_US if query.lifetime else query.start_us
        return [Span(start_us, query.end_us, start_us)]
    earlier = [Span(MIN_TIME_US, query.start_us, MIN_TIME_US)] if query.lifetime else []
    return [*earlier, *_spans_of_range(query.start_us, query.end_us)]


def select_cells(conn: sqlite3.Connection, query: UsageQuery, spans: Sequence[Span]) -> list[Any]:
    """Return the aggregate of each span, None for a span without events."""
    add_text_hash(conn)
    return select_per_span(conn, _cell_sql(query), spans)


async def read_all(
    service: Service, operations: Iterable[Callable[[sqlite3.Connection], T]], at_once: int = READER_THREADS
) -> list[T]:
    """Run reading operations at the same time; together they may take as long as one query. If one fails, end all."""
    turns = asyncio.Semaphore(at_once)

    async def read(operation: Callable[[sqlite3.Connection], T]) -> T:
        async with turns:
            return await service.store.read(operation, quick=False)

    tasks = [asyncio.ensure_future(read(operation)) for operation in operations]
    try:
        async with asyncio.timeout(service.settings.query_timeout_s):
            return await asyncio.gather(*tasks)
    except TimeoutError:
        raise service.store.readers.too_long() from None
    finally:
        for task in tasks:
            task.cancel()


async def aggregate(
    service: Service, query: UsageQuery, answer: Callable[[UsageQuery, Sequence[Span], Sequence[Any]], object]
) -> bytes:
    """Compute an aggregation and encode its answer.

    The reader threads share the spans, because one core takes 1.6 s to read the JSON of a million events. They also
    make the spans and the answer: 100,000 windows would block the event loop.
    """
    read = partial(service.store.read, quick=False)
    spans = await read(lambda _: _spans(query))
    shares = await read_all(service, [partial(select_cells, query=query, spans=part) for part in shares_of(spans)])
    cells = list(itertools.chain.from_iterable(shares))
    return await read(lambda _: ENCODER.encode(answer(query, spans, cells)))


async def compute_usage(service: Service, request: Request) -> Response:
    """POST /v1/events/usage (API: Usage)."""
    faults = service.faults(request)
    sent = await read_fields(service, request, _USAGE, faults)
    faults.ignore(_without_effect(sent))
    return JsonResponse(await aggregate(service, usage_query(sent, service.view(request), faults), usage_answer))


AGGREGATION_ENUMS = {"AggregationType": enum_schema(AGGREGATIONS)}
AGGREGATION_SCHEMA = {"anyOf": [ref("AggregationType"), any_case(AGGREGATIONS)]}
_SCHEMAS: dict[str, Any] = {"UsageIn": {
    "event_name": {"type": "string", "minLength": 1},
    "aggregation_type": AGGREGATION_SCHEMA,
    **dict.fromkeys(("start_time", "end_time", "billing_anchor"), TIME_SCHEMA),
    **{name: choice("WindowSize") for name in ("window_size", "bucket_size")}, "filters": FILTERS_SCHEMA,
    "multiplier": optional(POSITIVE_SCHEMA, NULL),
}, "UsageResult": {"window_size": ANSWERED_TIME}} | AGGREGATION_ENUMS  # fmt: skip
OPERATIONS = (
    Operation("POST", "/v1/events/usage", compute_usage, Usage, UsageIn, role="event_reader", schemas=_SCHEMAS,
              example={"event_name": "api_request", "external_customer_id": "cust_42", "aggregation_type": "SUM",
                       "property_name": "tokens", "window_size": "DAY", "timezone": "America/New_York"}),
)  # fmt: skip
