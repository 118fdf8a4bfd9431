"""What dashboards ask: the usage of one meter, and of all of them by group and window (API: Analytics)."""

from __future__ import annotations

import asyncio
import bisect
import itertools
import re
import sqlite3
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from decimal import ROUND_HALF_UP, Decimal, localcontext
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import asdict, replace
from starlette.requests import Request
from starlette.responses import Response

from eventstore import (
    DAY_US,
    ENCODER,
    FIELD_SCHEMAS,
    IN_ENVIRONMENT,
    MAX_FILTER_VALUES,
    MIN_TIME_US,
    MINUTE_US,
    READER_THREADS,
    WEIGHT,
    WINDOW_MINUTES,
    WINDOW_SIZES,
    Faults,
    FieldError,
    JsonResponse,
    Operation,
    Parameters,
    PropertyFilters,
    Service,
    T,
    Usage,
    UsageIn,
    UsageQuery,
    View,
    Windows,
    aggregate,
    check_property_filters,
    check_window_size,
    choice,
    echo,
    filter_clauses,
    index_of,
    json_texts,
    number_expression,
    parts_of,
    property_expression,
    read_fields,
    refuse,
    sum_of,
    time_range,
    usage_answer,
    usage_cells,
    usage_query,
    usage_value,
)
from eventstore_extras import meters
from eventstore_extras.meters import (
    Aggregation,
    Feature,
    Meter,
    ReportingUnit,
    decimal_text,
    is_in,
    plain_decimal,
    time_text,
)

MAX_ANSWERED = 100_000  # items of an answer, or points
MAX_DIMENSIONS = 50

# ---------------------------------------------------------------------------------------------- wire types


class MeterUsageIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/events/usage/meter (API: Usage of a meter)."""

    meter_id: str | None = None
    external_customer_id: str | None = None
    customer_id: str | None = None
    start_time: str | None = None
    end_time: str | None = None
    window_size: str | None = None
    bucket_size: str | None = None
    filters: PropertyFilters | None = None
    billing_anchor: str | None = None
    timezone: str | None = None


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
    include_children: bool | None = None  # without effect, like the next
    breakdown_bucket: bool | None = None


class AnalyticsPoint(Struct):
    timestamp: str  # the window's start
    usage: str
    event_count: int
    subtotal: str = "0"
    discount: str = "0"
    cost: str = "0"
    computed_commitment_utilized_amount: str = "0"
    computed_overage_amount: str = "0"
    computed_true_up_amount: str = "0"
    buckets: None = None


class ExpandedMeter(Meter, kw_only=True):
    environment_id: str
    created_by: str = ""
    updated_by: str = ""


class ExpandedFeature(Feature, kw_only=True):
    """A feature without its meter, which has a place of its own."""

    meter: Meter | msgspec.UnsetType | None = msgspec.UNSET  # type: ignore[assignment]


class AnalyticsItem(Struct, kw_only=True):
    """The usage of one meter, of all of it or of one group."""

    feature_id: str
    name: str
    meter_id: str
    event_name: str
    aggregation_type: str
    total_usage: str
    total_usage_display: str
    reporting_unit: ReportingUnit | None
    unit: str | None
    unit_plural: str | None
    event_count: int
    external_customer_id: str | None
    source: str | None
    sources: list[str] | None
    properties: dict[str, str] | None
    window_size: str | None
    points: list[AnalyticsPoint]
    subtotal: str = "0"
    total_discount: str = "0"
    total_cost: str = "0"
    currency: None = None
    price_id: None = None
    price: None = None
    sub_line_item_id: None = None
    subscription_id: None = None
    subscription_line_item: None = None
    plan_id: None = None
    plan: None = None
    add_on_id: None = None
    addon: None = None
    commitment_info: None = None
    group: None = None
    bucket_summaries: None = None
    meter: ExpandedMeter | None
    feature: ExpandedFeature | None


class Analytics(Struct):
    """Usage by meter and group (API: Analytics)."""

    subtotal: str
    total_discount: str
    total_cost: str
    currency: str
    custom_analytics: None
    items: list[AnalyticsItem]


METER_USAGE = msgspec.json.Decoder(MeterUsageIn)
ANALYTICS = msgspec.json.Decoder(AnalyticsIn)

# ---------------------------------------------------------------------------------------------- usage of a meter

LIFETIME_WINDOWS = 50_000  # of a MAX meter that never resets, at a time
ANY_METER = Meter(id="", name="", event_name="any", aggregation=Aggregation("COUNT"), filters=[], reset_usage="",
                  created_at="", updated_at="", status="")  # fmt: skip


def meter_query(sent: MeterUsageIn, meter: Meter, view: View, faults: Faults) -> UsageQuery:
    """The usage query of a meter. ApiError with every fault (API: Usage of a meter)."""
    of_meter = meter.aggregation
    faults.check("bucket_size", check_window_size, sent.bucket_size)
    same = {*MeterUsageIn.__struct_fields__} & {*UsageIn.__struct_fields__}
    usage = UsageIn(**{name: getattr(sent, name) for name in same})
    usage.event_name = meter.event_name
    usage.aggregation_type, usage.property_name = of_meter.type, of_meter.field
    usage.multiplier = of_meter.multiplier if of_meter.type == "SUM_WITH_MULTIPLIER" else None
    usage.bucket_size, usage.group_by_property = of_meter.bucket_size, of_meter.group_by
    query = usage_query(usage, view, faults)
    return replace(query, property_filters=both_filters(query.property_filters, meter))


def both_filters(asked: Mapping[str, list[str]], meter: Meter) -> dict[str, list[str]]:
    """The filters of a request and of a meter, all of which must hold: of one key, the values that all have."""
    filters = dict(asked)
    for condition in meter.filters:
        known = filters.get(condition.key, condition.values)
        filters[condition.key] = [value for value in known if value in condition.values]
    return filters


async def compute_meter_usage(service: Service, request: Request) -> Response:
    """POST /v1/events/usage/meter: usage, with the aggregation of a meter (API: Usage of a meter)."""
    faults = Faults()
    sent = await read_fields(service, request, METER_USAGE, faults)
    if not sent.meter_id:
        faults.add("meter_id", "required", "is required")
    view, environment = service.view(request), meters.place_of(service, request).environment
    meter_query(sent, ANY_METER, view, faults)  # what is wrong with the request, before the meter is looked for
    service.warn_of_zone(request, sent.timezone)
    meter = await service.store.read(lambda conn: meters.known_meter(conn, environment, sent.meter_id or "").meter)
    query = meter_query(sent, meter, view, faults)
    never_resets = meter.reset_usage == "NEVER"
    query = replace(query, lifetime=never_resets and query.windows is None)
    value = await lifetime_value(service, query) if never_resets and query.bucketed else None

    def answer(query: UsageQuery, starts: list[int], cells: list[Any]) -> Usage:
        usage = usage_answer(query, starts, cells)
        return usage if value is None else replace(usage, value=value)

    return JsonResponse(await aggregate(service, query, answer))


async def lifetime_value(service: Service, query: UsageQuery) -> float:
    """The sum of all buckets before the end of the range, of which its start cuts none in two."""
    if query.aggregation == "SUM":
        alone = replace(query, windows=None, bucketed=False, lifetime=True)
        return float(await aggregate(service, alone, lambda _, __, cells: usage_value(alone, cells)))
    return await service.store.read(partial(lifetime_of_buckets, query=query), quick=False)


def lifetime_of_buckets(conn: sqlite3.Connection, query: UsageQuery) -> float:
    parameters: Parameters = {"from_us": MIN_TIME_US}
    where = " AND ".join(filter_clauses(query, parameters))
    where += " AND timestamp_us >= :from_us AND timestamp_us < :end_us"
    first = f"SELECT min(timestamp_us) FROM events {index_of(query.filters)} WHERE {where}"
    windows = query.windows or Windows("DAY")
    span_us = (WINDOW_MINUTES.get(windows.size, 0) * MINUTE_US or DAY_US) * LIFETIME_WINDOWS
    value = 0.0
    while (start_us := conn.execute(first, parameters).fetchone()[0]) is not None:
        bounds = windows.bounds(start_us, min(start_us + span_us, query.end_us))
        bounds[-1] = min(bounds[-1], query.end_us)
        cells = usage_cells(conn, query, list(itertools.pairwise(bounds)))
        value += usage_value(query, cells)
        parameters["from_us"] = bounds[-1]
    return value


# ---------------------------------------------------------------------------------------------- analytics: the query

DIMENSIONS = ("source", "external_customer_id")
IMPLIED_DIMENSIONS = ("feature_id", "meter_id")
_PROPERTY_DIMENSION = re.compile(r"properties\.[A-Za-z0-9_.]+")


class AnalyticsQuery(Struct, frozen=True):
    """What to aggregate, by what, and into which windows: checked (API: Analytics)."""

    events: UsageQuery  # which events, of any meter
    feature_ids: frozenset[str]  # empty: all meters
    sources: list[str]
    window_size: str | None
    dimensions: tuple[str, ...]
    expand: frozenset[str]


def check_dimension(name: str) -> str:
    if name not in (*IMPLIED_DIMENSIONS, *DIMENSIONS) and not _PROPERTY_DIMENSION.fullmatch(name):
        known = f"one of {', '.join((*IMPLIED_DIMENSIONS, *DIMENSIONS))}, or properties.NAME"
        raise FieldError("invalid_format", f"must be {known} (letters, digits, _ and .), got {echo(name)}")
    return name


def analytics_query(sent: AnalyticsIn, view: View, faults: Faults) -> AnalyticsQuery:
    """The checked query. ApiError with every fault (API: Analytics)."""
    start_us, end_us = time_range(sent.start_time, sent.end_time, view.now_us, faults)
    window_size = faults.check("window_size", check_window_size, sent.window_size)
    for place, name in enumerate(sent.group_by or []):
        faults.check(f"group_by[{place}]", check_dimension, name or " ")  # an empty one is none either
    dimensions = tuple(dict.fromkeys(name for name in sent.group_by or [] if name not in IMPLIED_DIMENSIONS))
    for field, given, most in ("group_by", dimensions, MAX_DIMENSIONS), ("sources", sent.sources, MAX_FILTER_VALUES):
        if given and len(given) > most:
            faults.add(field, "out_of_range", f"may hold {most} names, got {len(given)}")
    property_filters = check_property_filters("property_filters", sent.property_filters, faults)
    faults.refuse()
    customer = {"external_customer_id": sent.external_customer_id} if sent.external_customer_id else {}
    return AnalyticsQuery(
        UsageQuery(view=view, start_us=start_us, end_us=end_us, filters=customer, property_filters=property_filters),
        frozenset(sent.feature_ids or ()),
        sent.sources or [],
        window_size,
        dimensions,
        frozenset(sent.expand or ()),
    )


class Metered(NamedTuple):
    """A meter of the answer, and the feature that names it."""

    meter: Meter
    archived_at_us: int | None
    feature: Feature | None

    @property
    def name(self) -> str:
        return self.feature.name if self.feature else self.meter.name

    def window_size(self, asked: str | None) -> str | None:
        """How wide its points are: no narrower than its buckets."""
        bucket_size = self.meter.aggregation.bucket_size
        return max((size for size in (asked, bucket_size) if size), key=WINDOW_SIZES.index, default=None)


def find_metered(conn: sqlite3.Connection, query: AnalyticsQuery, environment: int) -> list[Metered]:
    """The meters that are asked for: all, or those of features."""
    parameters: Parameters = {"environment": environment}
    stored = meters.select_meters(conn, "environment = :environment", parameters)
    of_environment = "features.environment = :environment"
    # Several features may have a meter: one that is asked for names it, a published one, or the oldest.
    by_age = f"{of_environment} ORDER BY features.archived_at_us IS NOT NULL, features.created_at_us, features.id"
    names: dict[str, Feature] = {}
    features = meters.select_features(conn, query.events.view.environment, by_age, parameters)
    for feature in sorted(features, key=lambda feature: feature.id not in query.feature_ids):
        names.setdefault(feature.meter_id, feature)
    metered = [Metered(meter, archived_us, names.get(meter.id)) for meter, archived_us in stored]
    if query.feature_ids:
        metered = [one for one in metered if one.feature and one.feature.id in query.feature_ids]
    return metered


# ---------------------------------------------------------------------------------------------- analytics: SQL

# Buckets that days divide into: SQL makes them of the time itself.
BUCKETS_US = {size: minutes * MINUTE_US for size, minutes in WINDOW_MINUTES.items() if minutes <= 24 * 60}
METERS_OF_A_PASS = 50  # SQLite has limits on columns and on the depth of an expression

Cells = tuple[Any, ...]  # of one window and group: see cells_statement
Bound = tuple[int, int, int]  # start, end, and the start of the window that both are in


class Pass(NamedTuple):
    """What one look at the events is to find."""

    metered: Sequence[Metered]
    bounds: list[Bound]
    dimensions: Sequence[str]
    finds_totals: bool = True
    finds_points: bool = False
    finds_sources: bool = False
    is_bucketed: bool = False


def passes(query: AnalyticsQuery, metered: Sequence[Metered]) -> Iterator[Pass]:
    """Looks at the events, as few as will do: those meters go together whose windows are the same."""
    bounds_of(query, query.window_size or "")  # too many windows are too many without a meter, too

    def size_of(one: Metered) -> str:
        return one.window_size(query.window_size) or "" if query.window_size else ""

    for size, same in itertools.groupby(sorted(metered, key=size_of), size_of):
        several = list(same)
        windows = bounds_of(query, size)
        unique = [one for one in several if one.meter.aggregation.type == "COUNT_UNIQUE"]
        bucketed = [one for one in several if one.meter.aggregation.is_bucketed_max]
        others = [one for one in several if one not in unique and one not in bucketed]
        for some in chunks(others):
            yield Pass(some, pieces(windows), query.dimensions, finds_points=bool(size))
        for some in chunks(unique):
            yield Pass(some, bounds_of(query, ""), query.dimensions)
            if size:
                yield Pass(some, windows, query.dimensions, finds_totals=False, finds_points=True)
        for one in bucketed:
            buckets = buckets_of(query, one, size)
            yield Pass([one], buckets, query.dimensions, finds_points=bool(size), is_bucketed=True)
    if "source" in query.expand and "source" not in query.dimensions:
        for some in chunks(metered):
            dimensions = (*query.dimensions, "source")
            yield Pass(some, pieces(bounds_of(query, "")), dimensions, finds_totals=False, finds_sources=True)


def chunks(metered: Sequence[Metered]) -> Iterator[Sequence[Metered]]:
    for at in range(0, len(metered), METERS_OF_A_PASS):
        yield metered[at : at + METERS_OF_A_PASS]


def bounds_of(query: AnalyticsQuery, size: str) -> list[Bound]:
    """The windows of the range, as far as they are in it; without a size, the range."""
    start_us, end_us = query.events.start_us, query.events.end_us
    starts = Windows(size).bounds(start_us, end_us) if size else [start_us, end_us]
    return clipped(query, starts, starts)


def clipped(query: AnalyticsQuery, bounds: Sequence[int], windows: Sequence[int]) -> list[Bound]:
    start_us, end_us = query.events.start_us, query.events.end_us
    pairs = itertools.pairwise(bounds) if start_us < end_us else ()
    return [
        (max(start, start_us), min(end, end_us), windows[bisect.bisect(windows, start) - 1]) for start, end in pairs
    ]


def buckets_of(query: AnalyticsQuery, one: Metered, size: str) -> list[Bound]:
    """The buckets of a meter, each in the window that it begins in; ranges that cut none in two, where SQL makes them
    of the time itself."""
    bucket_size = str(one.meter.aggregation.bucket_size)
    if bucket_size in BUCKETS_US:
        return pieces(bounds_of(query, size), DAY_US)
    buckets = Windows(bucket_size).bounds(query.events.start_us, query.events.end_us)
    windows = Windows(size).bounds(buckets[0], query.events.end_us) if size else buckets[:1]
    return clipped(query, buckets, windows)


def pieces(bounds: list[Bound], step_us: int = 1) -> list[Bound]:
    """Where there are fewer windows than threads, each is cut for all of them, at multiples of a step."""
    if len(bounds) >= READER_THREADS:
        return bounds
    cut = []
    for start, end, window in bounds:
        inner = [start + (end - start) * i // READER_THREADS for i in range(1, READER_THREADS)]
        cuts = [start, *(max(start, at - at % step_us) for at in inner), end]
        cut += [(*pair, window) for pair in itertools.pairwise(cuts)]
    return cut


class Extracted:
    """Properties as columns of the innermost SELECT: each is read once from an event, whoever needs it."""

    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters
        self._columns: dict[tuple[str, str], tuple[str, set[str]]] = {}

    def column(self, function: str, key: str, event_name: str) -> str:
        """The name of the column that holds a property of the events of that name."""
        name, event_names = self._columns.setdefault((function, key), (f"x{len(self._columns)}", set()))
        event_names.add(event_name)
        return name

    def select(self, all_names: set[str]) -> list[str]:
        columns = []
        for (function, key), (name, event_names) in self._columns.items():
            if function == "number":
                value = f"max({number_expression(name, key, self._parameters)}, 0.0)"
            else:
                value = property_expression(function, name, key, self._parameters)
            if event_names != all_names:
                needed = is_in("event_name", event_names, f"{name}_names", self._parameters)
                value = f"iif({needed}, {value}, NULL)"
            columns.append(f"{value} AS {name}")
        return columns


class Conditions:
    """Is an event one of a meter's? Columns m0, m1, ... over the innermost SELECT, one for all meters that ask the
    same: with one for each, 20 meters over a million events take 1.3 times as long."""

    def __init__(self) -> None:
        self._known: dict[tuple[object, ...], str] = {}
        self.select: list[str] = []

    def column(self, one: Metered, extracted: Extracted, parameters: Parameters) -> str:
        key = (one.meter.event_name, one.archived_at_us, ENCODER.encode(one.meter.filters))
        if key not in self._known:
            place = len(self._known)
            self._known[key] = f"m{place}"
            self.select.append(f"{condition(place, one, extracted, parameters)} AS m{place}")
        return self._known[key]

    @property
    def any(self) -> str:
        return " OR ".join(self._known.values())


def condition(place: int, one: Metered, extracted: Extracted, parameters: Parameters) -> str:
    parameters[f"event_name{place}"] = one.meter.event_name
    clauses = [f"event_name = :event_name{place}"]
    if one.archived_at_us is not None:
        parameters[f"archived{place}"] = one.archived_at_us
        clauses.append(f"ingested_at_us < :archived{place}")
    for number, (key, values) in enumerate(both_filters({}, one.meter).items()):
        column = extracted.column("property_json", key, one.meter.event_name)
        clauses.append(is_in(column, json_texts(values), f"values{place}_{number}", parameters))
    return " AND ".join(clauses)


def aggregate_of(one: Metered, extracted: Extracted, when: str) -> str:
    """What a meter wants of its events, in terms of the innermost SELECT (API: Analytics)."""
    kind, field = one.meter.aggregation.type, one.meter.aggregation.field or ""
    if kind == "COUNT":
        return f"count(*){when}"
    if kind == "COUNT_UNIQUE":
        return f"count(DISTINCT {extracted.column('property_text', field, one.meter.event_name)}){when}"
    if kind == "LATEST":
        return f"max(place){when}"
    number = extracted.column("number", field, one.meter.event_name)
    if kind == "MAX":
        return f"max({number}){when}"
    return sum_of(f"({number} * weight)" if kind == "WEIGHTED_SUM" else number, when)


# Fixed digits and the id: the greatest is the newest event's. What it holds is looked up then.
_PLACE = f"printf('%020d', timestamp_us - ({MIN_TIME_US})) || events.id"


EVENT_COLUMNS: dict[Callable[[Metered], bool], str] = {  # what only some meters need of an event
    lambda one: one.archived_at_us is not None: "ingested_at_us",
    lambda one: one.meter.aggregation.type == "LATEST": f"{_PLACE} AS place",
    lambda one: one.meter.aggregation.type == "WEIGHTED_SUM": f"{WEIGHT} AS weight",
}


def dimension_expression(place: int, name: str, parameters: Parameters) -> str:
    if name == "source":
        return "nullif(source, '')"
    key = name.removeprefix("properties.")
    return name if key == name else property_expression("property_text", f"dimension{place}", key, parameters)


def cells_statement(query: AnalyticsQuery, look: Pass, parameters: Parameters) -> str:
    """Of each group and window that has an event of a meter: its window, its dimensions, and for each meter the number
    of its events and their aggregate."""
    extracted = Extracted(parameters)
    groups = [f"d{place}" for place in range(len(look.dimensions))]
    conditions = Conditions()
    flags = [conditions.column(one, extracted, parameters) for one in look.metered]
    filters = ["" if look.is_bucketed else f" FILTER (WHERE {flag})" for flag in flags]
    values = [aggregate_of(one, extracted, when) for one, when in zip(look.metered, filters, strict=True)]
    own_group = [own_group_of(look, extracted)] if look.is_bucketed else []
    names = {one.meter.event_name for one in look.metered}
    columns = extracted.select(names)
    columns += [
        f"{dimension_expression(place, name, parameters)} AS d{place}" for place, name in enumerate(look.dimensions)
    ]
    columns += [column for needs, column in EVENT_COLUMNS.items() if any(map(needs, look.metered))]
    if look.is_bucketed:
        columns.append(f"{bucket_expression(look)} AS bucket")
    within = events_statement(query, names, columns, parameters)
    # LIMIT keeps the planner from merging the SELECTs, and so from reading a property again wherever it is named:
    # 20 meters over a million events take 1.8 times as long then.
    flagged = f"SELECT *, {', '.join(conditions.select)} FROM ({within} LIMIT -1) LIMIT -1"
    by_window = ", ".join([*groups, "window"])
    if look.is_bucketed:
        by_bucket = f"{by_window}, bucket"
        each = f"SELECT {by_bucket}, count(*) AS n, {values[0]} AS v FROM ({flagged}) WHERE m0"
        each = f"{each} GROUP BY {', '.join([by_bucket, *own_group])}"
        buckets = f"SELECT {by_window}, sum(n) AS n, {sum_of('v')} AS v FROM ({each}) GROUP BY {by_bucket}"
        return f"SELECT {by_window}, sum(n), {sum_of('v')}, max(v) FROM ({buckets}) GROUP BY {by_window} LIMIT :most"
    cells = ", ".join(
        f"count(*){when} AS n{place}, {value} AS v{place}"
        for place, (when, value) in enumerate(zip(filters, values, strict=True))
    )
    grouped = f"SELECT {by_window}, {cells} FROM ({flagged}) WHERE {conditions.any} GROUP BY {by_window} LIMIT :most"
    answered = [f"n{place}, {latest_value(place, one, parameters)}" for place, one in enumerate(look.metered)]
    return f"SELECT {', '.join([*groups, 'window', *answered])} FROM ({grouped})"


def bucket_expression(look: Pass) -> str:
    (one,) = look.metered
    bucket_us = BUCKETS_US.get(str(one.meter.aggregation.bucket_size))
    return f"(timestamp_us - ({MIN_TIME_US})) / {bucket_us}" if bucket_us else "bound.key"


def own_group_of(look: Pass, extracted: Extracted) -> str:
    """A MAX meter takes the maximum of each of its groups, unless the request groups events otherwise."""
    (one,) = look.metered
    key = one.meter.aggregation.group_by
    if not key or any(name != "external_customer_id" for name in look.dimensions):
        return "''"
    return f"ifnull({extracted.column('property_text', key, one.meter.event_name)}, '')"


def events_statement(
    query: AnalyticsQuery, event_names: set[str], columns: Sequence[str], parameters: Parameters
) -> str:
    """The events of the range, each with its window, and with what has been extracted from it."""
    clauses = filter_clauses(query.events, parameters)
    clauses.append(is_in("event_name", event_names, "event_names", parameters))
    if query.sources:
        clauses.append(is_in("source", query.sources, "sources", parameters))
    clauses += ["timestamp_us >= bound.value ->> 0", "timestamp_us < bound.value ->> 1"]
    always = ["bound.value ->> 2 AS window", "event_name"]
    return (
        f"SELECT {', '.join([*always, *columns])} FROM json_each(:bounds) AS bound CROSS JOIN events"
        f" {index_of(query.events.filters or ['event_name'])} WHERE {' AND '.join(clauses)}"
    )


def latest_value(place: int, one: Metered, parameters: Parameters) -> str:
    if one.meter.aggregation.type != "LATEST":
        return f"v{place}"
    number = number_expression(f"latest{place}", one.meter.aggregation.field or "", parameters)
    identity = f"CAST(substr(CAST(v{place} AS BLOB), 21) AS TEXT)"  # as bytes: an id may hold a NUL
    return f"(SELECT max({number}, 0.0) FROM events WHERE {IN_ENVIRONMENT} AND id = {identity})"


def cells(conn: sqlite3.Connection, query: AnalyticsQuery, look: Pass, bounds: Sequence[Bound]) -> list[Cells]:
    parameters: Parameters = {"bounds": ENCODER.encode(bounds).decode(), "most": MAX_ANSWERED + 1}
    return conn.execute(cells_statement(query, look, parameters), parameters).fetchall()


# ---------------------------------------------------------------------------------------------- analytics: the answer

Group = tuple[str | None, ...]


class Tally(Struct):
    """What has been found of a meter and a group."""

    count: int = 0
    value: float | None = None
    points: dict[int, tuple[int, float]] = {}  # by the window's start: how many events, their aggregate
    sources: set[str] = set()


def joined(kind: str, earlier: float | None, later: float) -> float:
    """The aggregate of what was found in two parts of a range."""
    if earlier is None or kind == "LATEST":
        return later
    return max(earlier, later) if kind == "MAX" else earlier + later


class Tallies:
    """All that has been found. ApiError if it is more than an answer may hold."""

    def __init__(self, query: AnalyticsQuery) -> None:
        self._query = query
        self.found: dict[tuple[str, Group], Tally] = {}
        self._points = 0

    def add(self, look: Pass, rows: Sequence[Cells]) -> None:
        width = len(look.dimensions)
        for row in rows:
            for place, one in enumerate(look.metered):
                cell = row[width + 1 + 2 * place :][:3]
                if cell[0]:
                    self._add(look, one, row[: width + 1], cell)
            if len(rows) > MAX_ANSWERED or max(len(self.found), self._points) > MAX_ANSWERED:
                self._refuse()

    def _add(self, look: Pass, one: Metered, place: Cells, cell: Cells) -> None:
        *group, window = place
        count, value = cell[:2]
        source = group.pop() if look.finds_sources else None
        tally = self.found.setdefault((one.meter.id, tuple(group)), Tally())
        kind = one.meter.aggregation.type
        if source is not None:
            tally.sources.add(source)
        if look.finds_totals:
            tally.count += count
            tally.value = joined("SUM" if look.is_bucketed else kind, tally.value, value)
        if look.finds_points:
            before, earlier = tally.points.get(window, (0, None))
            self._points += earlier is None
            tally.points[window] = (before + count, joined(kind, earlier, cell[2] if look.is_bucketed else value))

    def _refuse(self) -> None:
        field = "group_by" if self._query.dimensions else "window_size"
        problem = f"makes more than {MAX_ANSWERED} items or points: take less of it, or a shorter range"
        refuse(field, "out_of_range", problem)


def usage_text(one: Metered, count: int, value: float) -> str:
    if one.meter.aggregation.type == "AVG":
        value /= count
    elif one.meter.aggregation.type == "SUM_WITH_MULTIPLIER":
        value *= float(one.meter.aggregation.multiplier or 1)
    return decimal_text(min(float(value), sys.float_info.max))


def display_text(usage: str, unit: ReportingUnit) -> str:
    """The usage in reporting units: two digits, half away from zero."""
    with localcontext(prec=700):  # of the greatest number by the smallest
        shown = Decimal(usage) / Decimal(str(unit.conversion_rate))
        return plain_decimal(shown.quantize(Decimal("0.01"), ROUND_HALF_UP))


def expanded(kind: type[T], struct: Struct | None, **more: object) -> T | None:
    return None if struct is None else kind(**asdict(struct) | more)


def properties_of(group: Mapping[str, str | None]) -> dict[str, str] | None:
    """Of a group those dimensions that are properties, as far as its events have them; None if none was asked for."""
    values = {name.removeprefix("properties."): value for name, value in group.items() if name not in DIMENSIONS}
    return {name: value for name, value in values.items() if value is not None} if values else None


def analytics_item(query: AnalyticsQuery, one: Metered, group: Group, tally: Tally) -> AnalyticsItem:
    meter, feature = one.meter, one.feature
    of_group = dict(zip(query.dimensions, group, strict=True))
    total = usage_text(one, tally.count, tally.value or 0.0)
    unit = feature.reporting_unit if feature else None
    environment = query.events.view.environment
    sources = "source" in query.expand and "source" not in query.dimensions
    return AnalyticsItem(
        feature_id=feature.id if feature else "",
        name=one.name,
        meter_id=meter.id,
        event_name=meter.event_name,
        aggregation_type=meter.aggregation.type,
        total_usage=total,
        total_usage_display=display_text(total, unit) if unit else "",
        reporting_unit=unit,
        unit=feature.unit_singular or None if feature else None,
        unit_plural=feature.unit_plural or None if feature else None,
        event_count=tally.count,
        external_customer_id=of_group.get("external_customer_id"),
        source=of_group.get("source"),
        sources=sorted(tally.sources) if sources else None,
        properties=properties_of(of_group),
        window_size=one.window_size(query.window_size),
        points=[
            AnalyticsPoint(time_text(start_us), usage_text(one, count, value), count)
            for start_us, (count, value) in sorted(tally.points.items())
        ],
        meter=expanded(ExpandedMeter, meter, environment_id=environment) if "meter" in query.expand else None,
        feature=expanded(ExpandedFeature, feature, meter=msgspec.UNSET) if "feature" in query.expand else None,
    )


def analytics_answer(query: AnalyticsQuery, metered: Sequence[Metered], tallies: Tallies) -> bytes:
    known = {one.meter.id: one for one in metered}
    items = [analytics_item(query, known[identity], group, tally) for (identity, group), tally in tallies.found.items()]
    items.sort(key=_item_order)
    return ENCODER.encode(Analytics("0", "0", "0", "", None, items))


def _item_order(item: AnalyticsItem) -> tuple[Any, ...]:
    properties = sorted((item.properties or {}).items())
    return (item.name, item.meter_id, item.source or "", properties, item.external_customer_id or "")


async def compute_analytics(service: Service, request: Request) -> Response:
    """POST /v1/events/analytics: usage by meter, group and window (API: Analytics)."""
    faults = Faults()
    query = analytics_query(await read_fields(service, request, ANALYTICS, faults), service.view(request), faults)
    read = partial(service.store.read, quick=False)
    environment = meters.place_of(service, request).environment
    metered = await read(partial(find_metered, query=query, environment=environment))
    looks = await read(lambda _: list(passes(query, metered)))
    some_readers = asyncio.Semaphore(READER_THREADS - 1)  # one is left for who else asks

    async def part(look: Pass, bounds: list[Bound]) -> list[Cells]:
        async with some_readers:
            return await read(partial(cells, query=query, look=look, bounds=bounds))

    asked = [(look, bounds) for look in looks for bounds in parts_of(look.bounds)]
    found = await asyncio.gather(*(part(*pair) for pair in asked))

    def answer(_: sqlite3.Connection) -> bytes:
        tallies = Tallies(query)
        for (look, _bounds), rows in zip(asked, found, strict=True):
            tallies.add(look, rows)
        return analytics_answer(query, metered, tallies)

    return JsonResponse(await read(answer))


_FILTERS = FIELD_SCHEMAS["EventQueryIn"]["property_filters"]
_TIMES = {name: FIELD_SCHEMAS["EventQueryIn"][name] for name in ("start_time", "end_time")}
USAGE_SCHEMAS = {"MeterUsageIn": _TIMES | {
    "meter_id": {"type": "string", "minLength": 1}, "window_size": choice(*WINDOW_SIZES),
    "bucket_size": choice(*WINDOW_SIZES), "filters": _FILTERS, "billing_anchor": _TIMES["start_time"]}}  # fmt: skip
ANALYTICS_SCHEMAS = {"AnalyticsIn": _TIMES | {
    "window_size": choice(*WINDOW_SIZES), "property_filters": _FILTERS,
    "group_by": {"type": ["array", "null"], "maxItems": MAX_DIMENSIONS,
                 "items": {"anyOf": [{"enum": [*IMPLIED_DIMENSIONS, *DIMENSIONS]},
                                     {"type": "string", "pattern": f"^{_PROPERTY_DIMENSION.pattern}$"}]}},
    "sources": {"type": ["array", "null"], "items": {"type": "string"}, "maxItems": MAX_FILTER_VALUES}}}  # fmt: skip

# Everything that this room and that of meters add to the service: what create_app takes as `operations`.
OPERATIONS = (
    *meters.OPERATIONS,
    Operation("POST", "/v1/events/usage/meter", compute_meter_usage, Usage, MeterUsageIn,
              refusals=[404], schemas=USAGE_SCHEMAS,
              example={"meter_id": "meter_01K7M", "external_customer_id": "cust_42", "window_size": "DAY"}),
    Operation("POST", "/v1/events/analytics", compute_analytics, Analytics, AnalyticsIn, schemas=ANALYTICS_SCHEMAS,
              example={"external_customer_id": "cust_42", "group_by": ["properties.model"], "window_size": "DAY"}),
)  # fmt: skip
