"""The scans of analytics: the passes over the events that a request needs, and their SQL (API: Analytics).

From top to bottom: the request and the checked query, the table of aggregations, the scans that a query needs, the SQL
of a scan step by step.
"""

from __future__ import annotations

import itertools
import operator
import re
import sqlite3
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, NoReturn

from msgspec import Struct

from eventstore import (
    DAY_US,
    ENCODER,
    IN_ENVIRONMENT,
    IN_SPAN,
    MAX_FILTER_VALUES,
    MIN_TIME_US,
    MINUTE_US,
    READER_THREADS,
    WINDOW_MINUTES,
    WINDOW_SIZES,
    Faults,
    FieldError,
    PropertyFilters,
    Selection,
    Span,
    Sql,
    View,
    all_of,
    check_property_filters,
    check_time,
    check_window_size,
    filter_options,
    index_of,
    is_in,
    matching,
    property_sql,
    quoted,
    raise_fault,
    sql,
    time_range,
)
from eventstore_extras.features import NamedMeter
from eventstore_extras.meters import Aggregation, filters_in_both
from eventstore_extras.openapi import FILTERS_SCHEMA, TIME_SCHEMA, choice, enum_schema, ref
from eventstore_extras.resources import is_any_of
from eventstore_extras.usage import WEIGHT, Windows, add_text_hash, number_sql, sum_of, unique_sql

__all__ = [
    "AGGREGATES", "ANALYTICS_SCHEMAS", "DIMENSIONS", "ITEMS_LIMIT", "MAX_ITEMS", "AnalyticsIn", "Cell", "Group",
    "Query", "Scan", "checked_query", "checked_scans", "point_size", "refuse_size", "run_scan",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- Query


class AnalyticsIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/events/analytics (API: Analytics)."""

    external_customer_id: str | None = None
    feature_ids: list[str] | None = None
    sources: list[str] | None = None
    property_filters: PropertyFilters | None = None
    start_time: str | None = None
    end_time: str | None = None
    window_size: str | None = None
    group_by: list[str] | None = None
    expand: list[str] | None = None
    include_children: bool | None = None  # without effect, like the next field
    breakdown_bucket: bool | None = None


DIMENSIONS = {"source": "nullif(source, '')", "external_customer_id": "external_customer_id"}  # name -> SQL
_IMPLIED_DIMENSIONS = ("feature_id", "meter_id")
_PROPERTY_DIMENSION = re.compile(r"properties\.[A-Za-z0-9_.]+")
_MAX_DIMENSIONS = 50
MAX_ITEMS = 100_000  # an answer has at most this many items, and at most this many points
ITEMS_LIMIT = f"{MAX_ITEMS} items or points"
_MAX_CELLS = 1_000_000  # results in memory, one for each meter, group, and window or part of the range
_MAX_SPANS = 1_000_000  # windows of all scans together


class Query(Struct, frozen=True):
    """What to aggregate, by which dimensions, and into which windows: checked (API: Analytics)."""

    events: Selection
    feature_ids: frozenset[str]  # empty: all meters
    sources: list[str]  # empty: all events
    window_size: str | None  # None: no points
    dimensions: tuple[str, ...]
    expand: frozenset[str]

    @property
    def lists_sources(self) -> bool:
        return "source" in self.expand and "source" not in self.dimensions


def _check_dimension(name: str) -> str:
    if name not in (*_IMPLIED_DIMENSIONS, *DIMENSIONS) and not _PROPERTY_DIMENSION.fullmatch(name):
        known = f"one of {', '.join((*_IMPLIED_DIMENSIONS, *DIMENSIONS))}, or properties.NAME"
        raise FieldError("invalid_format", f"must be {known} (letters, digits, _ and .), got {quoted(name)}")
    return name


def checked_query(sent: AnalyticsIn, view: View, faults: Faults) -> Query:
    """Check a request. Raises ApiError with every fault (API: Analytics)."""
    start_us, end_us = time_range(sent.start_time, sent.end_time, view.now_us, faults)
    window_size = faults.check("window_size", check_window_size, sent.window_size)
    for number, name in enumerate((sent.group_by or [])[:_MAX_DIMENSIONS]):
        faults.check(f"group_by[{number}]", _check_dimension, name or " ")  # faults.check would accept ""
    faults.ignore(name for name in ("include_children", "breakdown_bucket") if getattr(sent, name))
    dimensions = tuple(dict.fromkeys(name for name in sent.group_by or [] if name not in _IMPLIED_DIMENSIONS))
    for field, limit in (("group_by", _MAX_DIMENSIONS), ("sources", MAX_FILTER_VALUES)):
        if len(names := getattr(sent, field) or []) > limit:
            faults.add(field, "out_of_range", f"may hold {limit} names, got {len(names)}")
    property_filters = check_property_filters("property_filters", sent.property_filters, faults)
    faults.raise_any()
    customer = {"external_customer_id": sent.external_customer_id} if sent.external_customer_id else {}
    events = Selection(view=view, start_us=start_us, end_us=end_us, filters=customer, property_filters=property_filters)
    feature_ids, expand = frozenset(sent.feature_ids or ()), frozenset(sent.expand or ())
    return Query(events, feature_ids, sent.sources or [], window_size, dimensions, expand)


# ---------------------------------------------------------------------------------------------- Aggregations


class _Aggregate(NamedTuple):
    """How analytics computes an aggregation: SQL returns a value for each part of the range, Python merges them."""

    sql: Callable[[str, str], str]  # (column of the property, FILTER clause) -> aggregate
    read_as: str = ""  # as in _Property; empty if no column is needed
    merge: Callable[[float, float], float] | None = operator.add  # (value of earlier part, of later part) -> value
    finish: Callable[[float, int, Aggregation], float] = lambda value, event_count, aggregation: value
    event_columns: Sequence[str] = ()  # other columns in the aggregate: keys of _EVENT_COLUMNS
    is_position: bool = False  # SQL returns an event's position; with_latest replaces it by the value


# To add an aggregation, add a row here, and its type and SQL to usage.py. Set `merge` to None if the values of parts
# cannot be merged: each window is then scanned undivided, and a separate scan finds the total.
AGGREGATES = {
    "COUNT": _Aggregate(lambda _, when: f"count(*){when}"),
    "SUM": _Aggregate(sum_of, "number"),
    "AVG": _Aggregate(sum_of, "number", finish=lambda value, event_count, _: value / event_count),
    "MAX": _Aggregate(lambda number, when: f"max({number}){when}", "number", max),
    "COUNT_UNIQUE": _Aggregate(lambda text, when: f"count(DISTINCT {text}){when}", "unique", None),
    "LATEST": _Aggregate(lambda _, when: f"max(position){when}", "", lambda _, later: later, event_columns=["position"],
                         is_position=True),
    "SUM_WITH_MULTIPLIER": _Aggregate(sum_of, "number", finish=lambda value, _, aggregation:
                                      value * float(aggregation.multiplier or 1)),
    "WEIGHTED_SUM": _Aggregate(lambda number, when: sum_of(f"({number} * weight)", when), "number",
                               event_columns=["weight"]),
}  # fmt: skip
_EVENT_COLUMNS = {
    # Zero-padded time followed by the id, so that max() picks the newest event.
    "position": f"printf('%020d', timestamp_us - ({MIN_TIME_US})) || events.id",
    "weight": WEIGHT,
}

# ---------------------------------------------------------------------------------------------- Scans

_METERS_PER_SCAN = 50  # SQLite limits the columns of a statement and the depth of an expression
# Bucket sizes that divide a day: SQL computes an event's bucket from its time.
_BUCKETS_US = {size: minutes * MINUTE_US for size, minutes in WINDOW_MINUTES.items() if minutes <= 1440}


class Scan(NamedTuple):
    """One pass over the events: for which meters, in which spans, by which dimensions."""

    meters: Sequence[NamedMeter]
    spans: Sequence[Span]
    dimensions: Sequence[str]
    finds_totals: bool = True
    finds_points: bool = False
    finds_sources: bool = False  # the last dimension is the source
    # One MAX meter with buckets or groups: its total is the sum of the buckets, a point is the largest bucket. A bucket
    # is the sum of its groups' maxima; without a bucket_size, the range and each window are one bucket.
    is_bucketed: bool = False

    def aggregate(self, named: NamedMeter) -> _Aggregate:
        return AGGREGATES["COUNT" if self.finds_sources else named.aggregation.type]


def point_size(query: Query, named: NamedMeter) -> str | None:
    """Return the size of the meter's points: the larger of the requested window and the meter's bucket."""
    sizes = [size for size in (query.window_size, named.aggregation.bucket_size) if size]
    return max(sizes, key=WINDOW_SIZES.index, default=None)


def _windows(query: Query, size: str | None) -> list[Span]:
    """Return the windows of the range: only one without a size, an empty list for an empty range."""
    start_us, end_us = query.events.start_us, query.events.end_us
    spans = Windows(size).spans(start_us, end_us) if size else [Span(start_us, end_us, start_us)]
    return spans if start_us < end_us else []


def _divided(windows: list[Span], step_us: int = 1) -> list[Span]:
    """If there are fewer windows than threads, cut each window into a span per thread, at multiples of a step."""
    if len(windows) >= READER_THREADS:
        return windows
    spans = []
    for start_us, end_us, window_us in windows:
        cuts_us = [start_us + (end_us - start_us) * i // READER_THREADS for i in range(1, READER_THREADS)]
        rounded_us = [max(start_us, cut_us - cut_us % step_us) for cut_us in cuts_us]
        spans += [Span(*bounds, window_us) for bounds in itertools.pairwise([start_us, *rounded_us, end_us])]
    return spans


def _bucket_spans(query: Query, bucket_size: str, size: str, windows: list[Span]) -> list[Span]:
    """Return the spans for a meter with buckets.

    If SQL computes the buckets, these are the windows, perhaps divided. Otherwise there is one span for each bucket,
    and its window is the one in which the bucket begins.
    """
    if bucket_size in _BUCKETS_US:
        return _divided(windows, DAY_US)  # at midnight, so that no bucket is cut in two
    buckets = _windows(query, bucket_size)
    if not buckets:
        return []
    windows_us = [buckets[0].window_us]
    if size:
        windows_us = [span.window_us for span in Windows(size).spans(windows_us[0], query.events.end_us)]
    return [bucket._replace(window_us=windows_us[bisect(windows_us, bucket.window_us) - 1]) for bucket in buckets]


def _chunks(meters: Sequence[NamedMeter]) -> Iterator[Sequence[NamedMeter]]:
    for start in range(0, len(meters), _METERS_PER_SCAN):
        yield meters[start : start + _METERS_PER_SCAN]


def _scans_of_size(query: Query, meters: Sequence[NamedMeter], size: str) -> Iterator[Scan]:
    """Yield the scans for meters with points of this size; an empty size means without points."""
    windows = _windows(query, size)
    bucketed = [named for named in meters if named.aggregation.type == "MAX"
                and (named.aggregation.bucket_size or named.aggregation.group_by)]  # fmt: skip
    undivided = [named for named in meters if AGGREGATES[named.aggregation.type].merge is None]
    for some in _chunks([named for named in meters if named not in (*bucketed, *undivided)]):
        yield Scan(some, _divided(windows), query.dimensions, finds_points=bool(size))
    for some in _chunks(undivided):
        yield Scan(some, _windows(query, ""), query.dimensions)
        if size:
            yield Scan(some, windows, query.dimensions, finds_totals=False, finds_points=True)
    for named in bucketed:
        if bucket_size := named.aggregation.bucket_size:
            spans = _bucket_spans(query, bucket_size, size, windows)
            yield Scan([named], spans, query.dimensions, finds_points=bool(size), is_bucketed=True)
            continue
        yield Scan([named], _windows(query, ""), query.dimensions, is_bucketed=True)
        if size:
            yield Scan([named], windows, query.dimensions, finds_totals=False, finds_points=True, is_bucketed=True)


def _scans(query: Query, meters: Sequence[NamedMeter]) -> Iterator[Scan]:
    """Yield as few scans as possible: meters with points of the same size share them."""
    _windows(query, query.window_size)  # raises ApiError for too many windows, even without meters

    def size_of(named: NamedMeter) -> str:
        return point_size(query, named) or "" if query.window_size else ""

    for size, same in itertools.groupby(sorted(meters, key=size_of), size_of):
        yield from _scans_of_size(query, list(same), size)
    if query.lists_sources:
        spans, dimensions = _divided(_windows(query, "")), (*query.dimensions, "source")
        for some in _chunks(meters):
            yield Scan(some, spans, dimensions, finds_totals=False, finds_sources=True)


def checked_scans(query: Query, meters: Sequence[NamedMeter]) -> list[Scan]:
    """Return the scans for a request. Raises ApiError if they have too many windows."""
    scans, spans = list[Scan](), 0
    for scan in _scans(query, meters):
        check_time()
        scans.append(scan)
        spans += len(scan.spans)
        if spans > _MAX_SPANS:
            problem = f"makes more than {_MAX_SPANS} windows in all: take fewer meters, a larger one or a shorter range"
            raise_fault("window_size" if query.window_size else "feature_ids", "out_of_range", problem)
    return scans


# ---------------------------------------------------------------------------------------------- SQL

# The statement of a scan by one dimension, abridged. To see a step's rows, delete the later steps and select from it.
#     WITH in_range AS (SELECT ... AS window, event_name, ... AS d0, ... AS x0 FROM events ... LIMIT -1),
#          flagged AS (SELECT *, event_name = ... AS m0 FROM in_range LIMIT -1),
#          by_window AS (SELECT d0, window, count(*) FILTER (WHERE m0) AS n0, total(x0) FILTER (WHERE m0) AS v0
#                        FROM flagged WHERE m0 GROUP BY d0, window),
#          with_latest AS (SELECT d0, window, n0, v0 FROM by_window)
#     SELECT * FROM with_latest

# Ends a step, so that SQLite does not merge it into the next one. Merged, a property would be read again for each use:
# 20 meters over a million events would take 1.8 times as long.
_SEPARATE = "LIMIT -1"
Group = tuple[str | None, ...]  # the values of the dimensions


class _Property(NamedTuple):
    """A column with the values of a property."""

    read_as: str  # text or value, as in property_sql; number or unique, as in number_sql and unique_sql
    key: str


def _bucket_group(scan: Scan) -> str | None:
    """Return the group_by of a bucketed meter, unless the request groups by source or by a property."""
    is_grouped = any(name != "external_customer_id" for name in scan.dimensions)
    return None if is_grouped else scan.meters[0].aggregation.group_by


def _properties_of(scan: Scan, named: NamedMeter) -> list[_Property]:
    """Return the properties that a meter needs: for its filters, its aggregate and the groups in its buckets."""
    filters = filters_in_both({}, named.meter)
    properties = [_Property(filter_options(values)[0][-1], key) for key, values in filters.items()]
    if read_as := scan.aggregate(named).read_as:
        properties.append(_Property(read_as, named.aggregation.field or ""))
    if scan.is_bucketed and (key := _bucket_group(scan)):
        properties.append(_Property("text", key))
    return properties


class _Columns(NamedTuple):
    """The names of the columns that the steps share.

    Each property is read once from an event, even if several meters need it. Meters with the same condition share a
    flag: with one flag per meter, 20 meters over a million events take 1.3 times as long.
    """

    properties: dict[_Property, str]
    event_names: dict[_Property, set[str]]  # names of the events that need the property; no entry if all do
    flags: list[str]  # for each meter of the scan, the column that is true for the meter's events

    @classmethod
    def of(cls, scan: Scan) -> _Columns:
        names: dict[_Property, set[str]] = {}
        for named in scan.meters:
            for each in _properties_of(scan, named):
                names.setdefault(each, set()).add(named.meter.event_name)
        properties = {each: f"x{number}" for number, each in enumerate(names)}
        all_names = {named.meter.event_name for named in scan.meters}
        conditions = [(meter.event_name, time_us, ENCODER.encode(meter.filters)) for meter, time_us, _ in scan.meters]
        flag_of = {condition: f"m{number}" for number, condition in enumerate(dict.fromkeys(conditions))}
        event_names = {each: some for each, some in names.items() if some != all_names}
        return cls(properties, event_names, [flag_of[condition] for condition in conditions])


def _property_column(each: _Property, columns: _Columns) -> Sql:
    """Build a property's column. It is NULL for events that do not need it.

    Reading it from every event would take 1.3 times as long with 20 event names.
    """
    name = columns.properties[each]
    if each.read_as == "number":
        number = number_sql(name, each.key)
        value = sql(f"max({number}, 0.0)", number)  # negative numbers count as 0
    elif each.read_as == "unique":
        value = unique_sql(name, each.key)
    else:
        value = property_sql(each.read_as, name, each.key)
    if each in columns.event_names:
        is_needed = is_any_of("event_name", columns.event_names[each], f"{name}_event_names")
        value = sql(f"iif({is_needed}, {value}, NULL)", is_needed, value)
    return sql(f"{value} AS {name}", value)


def _dimension(name: str, column: str) -> Sql:
    if name in DIMENSIONS:
        return sql(f"{DIMENSIONS[name]} AS {column}")
    value = property_sql("text", column, name.removeprefix("properties."))
    return sql(f"{value} AS {column}", value)


def _event_columns(scan: Scan) -> list[Sql]:
    """Return the columns that only some scans need."""
    needed = dict.fromkeys(each for named in scan.meters for each in scan.aggregate(named).event_columns)
    columns = [sql(f"{_EVENT_COLUMNS[name]} AS {name}") for name in needed]
    if any(named.archived_at_us is not None for named in scan.meters):
        columns.append(sql("ingested_at_us"))
    if scan.is_bucketed:
        bucket_us = _BUCKETS_US.get(str(scan.meters[0].aggregation.bucket_size))
        bucket = f"(timestamp_us - ({MIN_TIME_US})) / {bucket_us}" if bucket_us else "span.key"
        columns.append(sql(f"{bucket} AS bucket"))
    return columns


def _in_range(query: Query, scan: Scan, columns: _Columns) -> Sql:
    """Build step 1: the events of the range with their window, dimensions and the properties that the meters need."""
    selected = [
        sql("span.value ->> 2 AS window, event_name"),
        *(_dimension(name, f"d{number}") for number, name in enumerate(scan.dimensions)),
        *(_property_column(each, columns) for each in columns.properties),
        *_event_columns(scan),
    ]
    event_names = {named.meter.event_name for named in scan.meters}
    clauses = [matching(query.events), is_in("event_name", event_names, "event_name")]
    clauses += [is_in("source", query.sources, "source")] if query.sources else []
    where = all_of(clauses)
    text = f"""SELECT {", ".join(map(str, selected))}
        FROM json_each(:spans) AS span CROSS JOIN events {index_of(query.events.filters or ["event_name"])}
        WHERE {where} AND {IN_SPAN} {_SEPARATE}"""
    weighted_range = {"start_us": query.events.start_us, "end_us": query.events.end_us}  # parameters of WEIGHT
    return sql(text, *selected, where, spans=ENCODER.encode(scan.spans).decode(), **weighted_range)


def _condition(flag: str, named: NamedMeter, columns: _Columns) -> Sql:
    """Build the condition that is true for a meter's events."""
    clauses = [sql(f"event_name = :{flag}_event_name", **{f"{flag}_event_name": named.meter.event_name})]
    if named.archived_at_us is not None:
        clauses.append(sql(f"ingested_at_us < :{flag}_archived_us", **{f"{flag}_archived_us": named.archived_at_us}))
    for number, (key, values) in enumerate(filters_in_both({}, named.meter).items()):
        readings, options = filter_options(values)
        column = columns.properties[_Property(readings[-1], key)]
        clauses.append(is_any_of(column, options, f"{flag}_values{number}"))
    return all_of(clauses)


def _flagged(scan: Scan, columns: _Columns) -> Sql:
    """Build step 2: the same events, flagged by meter."""
    meter_of = dict(zip(columns.flags, scan.meters, strict=True))
    conditions = {flag: _condition(flag, named, columns) for flag, named in meter_of.items()}
    flags = ", ".join(f"{condition} AS {flag}" for flag, condition in conditions.items())
    return sql(f"SELECT *, {flags} FROM in_range {_SEPARATE}", *conditions.values())


def _value(scan: Scan, named: NamedMeter, columns: _Columns, when: str) -> str:
    """Build the meter's aggregate over flagged events."""
    aggregate = scan.aggregate(named)
    column = columns.properties.get(_Property(aggregate.read_as, named.aggregation.field or ""), "")
    return aggregate.sql(column, when)


def _group_and_window(scan: Scan) -> str:
    return ", ".join([*(f"d{number}" for number in range(len(scan.dimensions))), "window"])


def _by_window(scan: Scan, columns: _Columns) -> Sql:
    """Build step 3: one row for each group and window that has events, with every meter's event count and aggregate."""
    cells = []
    for number, (named, flag) in enumerate(zip(scan.meters, columns.flags, strict=True)):
        when = f" FILTER (WHERE {flag})"
        cells.append(f"count(*){when} AS n{number}, {_value(scan, named, columns, when)} AS v{number}")
    any_flag, keys = " OR ".join(dict.fromkeys(columns.flags)), _group_and_window(scan)
    text = f"SELECT {keys}, {', '.join(cells)} FROM flagged WHERE {any_flag} GROUP BY {keys} LIMIT :row_limit"
    return sql(text, row_limit=MAX_ITEMS + 1)


def _value_at(position: str, name: str, key: str) -> Sql:
    """Build the number that a property has in the event at this position."""
    number = number_sql(name, key)
    event_id = f"CAST(substr(CAST({position} AS BLOB), 21) AS TEXT)"  # cut bytes, since an id may contain a NUL
    return sql(f"(SELECT max({number}, 0.0) FROM events WHERE {IN_ENVIRONMENT} AND id = {event_id})", number)


def _with_latest(scan: Scan) -> Sql:
    """Build step 4: the same rows, in which the newest event's value replaces its position."""
    cells = []
    for number, named in enumerate(scan.meters):
        value = sql(f"v{number}")
        if scan.aggregate(named).is_position:
            value = _value_at(f"v{number}", f"latest{number}", named.aggregation.field or "")
        cells.append(sql(f"n{number}, {value} AS v{number}", value))
    return sql(f"SELECT {_group_and_window(scan)}, {', '.join(map(str, cells))} FROM by_window", *cells)


def _bucket_steps(scan: Scan, columns: _Columns) -> dict[str, Sql]:
    """Build the steps after `flagged` for a MAX meter with buckets.

    by_group has the maximum of each group in a bucket, by_bucket the sum of these, by_window the sum and the maximum of
    the buckets.
    """
    keys, key = _group_and_window(scan), _bucket_group(scan)
    group = f"ifnull({columns.properties[_Property('text', key)]}, '')" if key else "''"
    maximum = _value(scan, scan.meters[0], columns, "")
    return {
        "by_group": sql(f"""SELECT {keys}, bucket, count(*) AS n, {maximum} AS v
            FROM flagged WHERE {columns.flags[0]} GROUP BY {keys}, bucket, {group}"""),
        "by_bucket": sql(f"SELECT {keys}, sum(n) AS n, {sum_of('v')} AS v FROM by_group GROUP BY {keys}, bucket"),
        "by_window": sql(f"""SELECT {keys}, sum(n) AS n0, {sum_of("v")} AS v0, max(v) AS largest_bucket
            FROM by_bucket GROUP BY {keys} LIMIT :row_limit""", row_limit=MAX_ITEMS + 1),
    }  # fmt: skip


def _steps(query: Query, scan: Scan) -> dict[str, Sql]:
    """Build the steps of a scan's statement, by name. Each step reads the one before it.

    The last step returns the dimensions, the window's start, and for each meter its event count and aggregate. For a
    bucketed meter, the aggregate is the sum of the buckets, and the largest bucket follows it.
    """
    columns = _Columns.of(scan)
    steps = {"in_range": _in_range(query, scan, columns), "flagged": _flagged(scan, columns)}
    if scan.is_bucketed:
        return steps | _bucket_steps(scan, columns)
    return steps | {"by_window": _by_window(scan, columns), "with_latest": _with_latest(scan)}


class Cell(NamedTuple):
    """What a scan found for one meter, group and window."""

    number: int  # of the meter in the scan
    group: Group
    window_us: int
    event_count: int
    value: Any
    largest_bucket: Any = None  # only in a bucketed scan


def refuse_size(query: Query, limit: str) -> NoReturn:
    field = "group_by" if query.dimensions else "window_size" if query.window_size else "feature_ids"
    raise_fault(field, "out_of_range", f"makes more than {limit}: take less of it, or a shorter range")


def run_scan(conn: sqlite3.Connection, query: Query, scan: Scan, found: list[list[Cell]]) -> list[Cell]:
    """Run the steps as one statement; return the cells that have events.

    `found` holds the cells of all scans of the request, and other threads add to it at the same time.
    Raises ApiError if all scans together find too many.
    """
    steps = _steps(query, scan)
    ctes = ",\n".join(f"{name} AS ({step})" for name, step in steps.items())
    statement = sql(f"WITH {ctes}\nSELECT * FROM {[*steps][-1]}", *steps.values())
    width, row_count, cells = len(scan.dimensions), 0, list[Cell]()
    found.append(cells)
    add_text_hash(conn)
    cursor = conn.execute(*statement)
    while rows := cursor.fetchmany(256):
        for row in rows:
            for number in range(len(scan.meters)):
                values = row[width + 1 + 2 * number : width + 4 + 2 * number]
                if values[0]:
                    cells.append(Cell(number, row[:width], row[width], *values))
        row_count += len(rows)
        if row_count > MAX_ITEMS:
            refuse_size(query, ITEMS_LIMIT)
        if sum(map(len, found)) > _MAX_CELLS:
            refuse_size(query, f"{_MAX_CELLS} results of a meter, a group and a window")
    return cells


# ---------------------------------------------------------------------------------------------- OpenAPI

ANALYTICS_SCHEMAS: dict[str, Any] = {"Dimension": enum_schema([*_IMPLIED_DIMENSIONS, *DIMENSIONS]), "AnalyticsIn": {
    **dict.fromkeys(("start_time", "end_time"), TIME_SCHEMA),
    "window_size": choice("WindowSize"), "property_filters": FILTERS_SCHEMA,
    "group_by": {"type": ["array", "null"], "maxItems": _MAX_DIMENSIONS,
                 "items": {"anyOf": [ref("Dimension"),
                                     {"type": "string", "pattern": f"^{_PROPERTY_DIMENSION.pattern}$"}]}},
    "sources": {"type": ["array", "null"], "items": {"type": "string"}, "maxItems": MAX_FILTER_VALUES},
}}  # fmt: skip
