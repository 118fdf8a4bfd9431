"""Meters: saved aggregations over the events of one name, and the usage of one meter (API: Meters, Usage of a meter).

From top to bottom: a meter and its checks, its rows, its routes, the usage of a meter, the schemas for the OpenAPI
document. Features and analytics build on this module.
"""

from __future__ import annotations

import sqlite3
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from starlette.requests import Request
from starlette.responses import Response

from eventstore import (
    DECIMAL,
    ENCODER,
    IN_ENVIRONMENT,
    MAX_FILTER_KEYS,
    MAX_FILTER_VALUES,
    MIN_TIME_US,
    MINUTE_US,
    WINDOW_MINUTES,
    ApiError,
    Faults,
    JsonResponse,
    Operation,
    PropertyFilters,
    Service,
    Span,
    Sql,
    View,
    check_filter_limits,
    check_window_size,
    index_of,
    matching,
    one_of,
    quoted,
    read_fields,
    sql,
)
from eventstore_extras.openapi import (
    FILTERS_SCHEMA,
    NOTHING,
    NULL,
    TEXT_SCHEMA,
    TIME_SCHEMA,
    any_case,
    choice,
    enum_schema,
    ref,
)
from eventstore_extras.resources import (
    LIST_ENUMS,
    LIST_PARAMETERS,
    MAX_NAME_CHARS,
    NAME_SCHEMA,
    SORTS,
    Columns,
    Done,
    Pagination,
    archive_row,
    check_decimal,
    check_name,
    check_positive_decimal,
    decimal_text,
    fetch_page,
    insert_row,
    is_any_of,
    list_query,
    parse_list,
    sorts_by,
    time_text,
)
from eventstore_extras.usage import (
    AGGREGATION_ENUMS,
    AGGREGATION_SCHEMA,
    AGGREGATIONS,
    Usage,
    UsageIn,
    UsageQuery,
    Windows,
    aggregate,
    check_aggregation,
    select_cells,
    usage_answer,
    usage_query,
    usage_value,
)

__all__ = [
    "METER_COLUMNS", "METER_EXAMPLE", "METER_SCHEMAS", "OPERATIONS", "Aggregation", "Meter",
    "MeterIn", "MeterListIn", "MeterPage", "MeterUsageIn", "StoredMeter", "add_meter", "all_meters", "filters_in_both",
    "meter_columns", "require_meter", "stored_meter",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- A meter


class AggregationIn(Struct, forbid_unknown_fields=True):
    type: str | None = None
    field: str | None = None
    expression: str | None = None
    multiplier: str | float | None = None
    bucket_size: str | None = None
    group_by: str | None = None


class MeterFilterIn(Struct, forbid_unknown_fields=True):
    key: str | None = None
    values: list[str] | None = None


class MeterIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/meters, and the meter inside a feature's body (API: Meters)."""

    name: str | None = None
    event_name: str | None = None
    aggregation: AggregationIn | None = None
    filters: list[MeterFilterIn] | None = None
    reset_usage: str | None = None


class Aggregation(Struct):
    type: str
    field: str | None = None
    expression: None = None
    multiplier: str | None = None  # a decimal in plain digits
    bucket_size: str | None = None
    group_by: str | None = None


class MeterFilter(Struct):
    key: str
    values: list[str]


class Meter(Struct, kw_only=True):
    """A meter in an answer (API: Meters)."""

    id: str
    name: str
    tenant_id: str = ""
    event_name: str
    aggregation: Aggregation
    filters: list[MeterFilter]
    reset_usage: str
    created_at: str
    updated_at: str
    status: str


_METER = msgspec.json.Decoder(MeterIn)
_RESETS = ("BILLING_PERIOD", "NEVER")
# The examples in FlexPrice's documents send these.
_RESET_ALIASES = {"periodic": "BILLING_PERIOD", "cumulative": "NEVER"}
_BUCKETED = ("MAX", "SUM")


def _checked_multiplier(sent: AggregationIn, kind: str, faults: Faults) -> float | None:
    """Check the multiplier. It is stored even with a type that does not use it, as FlexPrice does."""
    if kind != "SUM_WITH_MULTIPLIER":
        return faults.check("multiplier", check_decimal, sent.multiplier)
    if sent.multiplier in (None, ""):
        faults.add("multiplier", "required", f"is required for {kind}: a decimal number greater than 0")
    return faults.check("multiplier", check_positive_decimal, sent.multiplier)


def _checked_buckets(sent: AggregationIn, kind: str, faults: Faults) -> str | None:
    """Check bucket_size and group_by together; return the bucket size."""
    bucket_size = faults.check("bucket_size", check_window_size, sent.bucket_size)
    if bucket_size and kind not in _BUCKETED:
        faults.add("bucket_size", "invalid_format", f"goes with {' and '.join(_BUCKETED)} only, not with {kind}")
    if sent.group_by and kind != "MAX":
        faults.add("group_by", "invalid_format", f"goes with MAX only, not with {kind}")
    if sent.group_by and sent.group_by.startswith("properties."):  # usage and analytics require the prefix
        problem = f"must be the property alone, without properties. before it, got {quoted(sent.group_by)}"
        faults.add("group_by", "invalid_format", problem)
    return bucket_size


def _checked_aggregation(sent: AggregationIn, faults: Faults) -> Aggregation:
    if not sent.type:
        faults.add("type", "required", f"is required: one of {', '.join(AGGREGATIONS)}")
    kind = faults.check("type", check_aggregation, (sent.type or "").upper()) or "COUNT"
    if sent.expression:
        reason = "formulas are not supported, name a field instead"
        faults.add("expression", "invalid_format", f"must be empty, got {quoted(sent.expression)}: {reason}")
    elif kind != "COUNT" and not sent.field:
        faults.add("field", "required", f"is required for {kind}: the property to aggregate")
    multiplier = _checked_multiplier(sent, kind, faults)
    bucket_size = _checked_buckets(sent, kind, faults)
    return Aggregation(
        type=kind, field=sent.field or None, multiplier=None if multiplier is None else decimal_text(multiplier),
        bucket_size=bucket_size, group_by=sent.group_by or None,
    )  # fmt: skip


def _checked_filters(sent: list[MeterFilterIn], faults: Faults) -> list[MeterFilter]:
    checked = []
    if len(sent) > MAX_FILTER_KEYS:
        faults.add("filters", "out_of_range", f"may hold {MAX_FILTER_KEYS} filters, got {len(sent)}")
        return []
    for number, condition in enumerate(sent):
        with faults.within(f"filters[{number}]"):
            key, values = (condition.key or "").strip(), [value.strip() for value in condition.values or []]
            if not key:
                faults.add("key", "required", "is required: the property to look at")
            if not values:
                faults.add("values", "required", "is required: an array of at least one string")
        checked.append(MeterFilter(key, values))
    check_filter_limits("filters", [condition.values for condition in checked], faults)
    return checked


def _check_reset(text: str) -> str:
    return one_of(*_RESETS)(_RESET_ALIASES.get(text.lower(), text))


def meter_columns(sent: MeterIn, faults: Faults) -> Columns:
    """Check a meter, record its faults, and return its columns (API: Meters)."""
    name = check_name("name", sent.name, faults)
    event_name = check_name("event_name", (sent.event_name or "").strip(), faults)
    aggregation = Aggregation("COUNT")
    if sent.aggregation is None:
        faults.add("aggregation", "required", 'is required: an object like {"type": "SUM", "field": "tokens"}')
    else:
        with faults.within("aggregation"):
            aggregation = _checked_aggregation(sent.aggregation, faults)
    if not sent.reset_usage:
        faults.add("reset_usage", "required", f"is required: one of {', '.join(_RESETS)}")
    return {
        "name": name,
        "event_name": event_name,
        "aggregation": ENCODER.encode(aggregation).decode(),
        "filters": ENCODER.encode(_checked_filters(sent.filters or [], faults)).decode(),
        "reset_usage": faults.check("reset_usage", _check_reset, sent.reset_usage),
    }


def filters_in_both(asked: Mapping[str, list[str]], meter: Meter) -> dict[str, list[str]]:
    """Combine a request's filters with a meter's. For a key in several filters, keep the values that all have."""
    filters = dict(asked)
    for condition in meter.filters:
        values = filters.get(condition.key, condition.values)
        filters[condition.key] = [value for value in values if value in condition.values]
    return filters


# ---------------------------------------------------------------------------------------------- Rows

METER_COLUMNS = ", ".join(f"meters.{name}" for name in ("id", "name", "event_name", "aggregation", "filters",
    "reset_usage", "created_at_us", "updated_at_us", "archived_at_us"))  # fmt: skip
_AGGREGATION = msgspec.json.Decoder(Aggregation)
_FILTERS = msgspec.json.Decoder(list[MeterFilter])


class StoredMeter(NamedTuple):
    meter: Meter
    archived_at_us: int | None


def stored_meter(row: Sequence[Any]) -> StoredMeter:
    """Make a meter from a row of METER_COLUMNS."""
    meter_id, name, event_name, aggregation, filters, reset_usage, created_us, updated_us, archived_us = row
    meter = Meter(
        id=meter_id, name=name, event_name=event_name, aggregation=_AGGREGATION.decode(aggregation),
        filters=_FILTERS.decode(filters), reset_usage=reset_usage, created_at=time_text(created_us),
        updated_at=time_text(updated_us), status="published" if archived_us is None else "archived",
    )  # fmt: skip
    return StoredMeter(meter, archived_us)


def _select_meters(conn: sqlite3.Connection, where: Sql) -> list[StoredMeter]:
    rows = conn.execute(f"SELECT {METER_COLUMNS} FROM meters WHERE {where}", where.values).fetchall()
    return [stored_meter(row) for row in rows]


def all_meters(conn: sqlite3.Connection, environment: str) -> list[StoredMeter]:
    """Return the meters of an environment, the oldest first."""
    return _select_meters(conn, sql(f"{IN_ENVIRONMENT} ORDER BY created_at_us, id", environment=environment))


def require_meter(conn: sqlite3.Connection, environment: str, meter_id: str) -> StoredMeter:
    """Return a meter. Raises ApiError not_found if the id is unknown."""
    found = _select_meters(conn, sql(f"{IN_ENVIRONMENT} AND id = :id", environment=environment, id=meter_id))
    if not found:
        raise ApiError("not_found", f"no meter with the id {quoted(meter_id)} in this environment")
    return found[0]


def add_meter(conn: sqlite3.Connection, view: View, columns: Columns) -> Meter:
    """Store a meter and return it."""
    insert_row(conn, "meters", view, columns)
    return require_meter(conn, view.environment, columns["id"]).meter


# ---------------------------------------------------------------------------------------------- Routes


class MeterListIn(Struct, forbid_unknown_fields=True):
    """The parameters of GET /v1/meters (API: Lists)."""

    limit: int | float | None = None
    offset: int | float | None = None
    status: str | None = None
    sort: str | None = None
    order: str | None = None
    start_time: str | None = None
    end_time: str | None = None
    event_name: str | None = None
    meter_ids: list[str] | None = None


class MeterPage(Struct):
    """One page of meters (API: Lists)."""

    items: list[Meter]
    pagination: Pagination


async def create_meter(service: Service, request: Request) -> Response:
    """POST /v1/meters: a saved aggregation over the events of one name (API: Meters)."""
    faults = service.faults(request, index=0)
    columns = meter_columns(await read_fields(service, request, _METER, faults), faults)
    faults.raise_any()
    view = service.view(request)
    columns["id"] = service.make_id(view.now_us, "meter_")
    add = partial(add_meter, view=view, columns=columns)
    return JsonResponse(await service.store.write(add), 201)


async def show_meter(service: Service, request: Request) -> Response:
    """GET /v1/meters/{id} (API: Meters)."""
    require = partial(require_meter, environment=request["environment"], meter_id=request.path_params["id"])
    return JsonResponse((await service.store.read(require)).meter)


async def find_meters(service: Service, request: Request) -> Response:
    """GET /v1/meters (API: Lists)."""
    faults = service.faults(request)
    sent = parse_list(MeterListIn, request, ["meter_ids"], faults)
    sorts = sorts_by("meters", [sent.sort] if sent.sort else [], faults)
    query = list_query("meters", sent, sorts, request["environment"], faults)
    faults.raise_any()
    event_name = (sent.event_name or "").strip()
    if event_name:
        query = query.narrowed(sql("event_name = :event_name", event_name=event_name))
    if sent.meter_ids:
        query = query.narrowed(is_any_of("id", sent.meter_ids, "meter_ids"))

    def select(conn: sqlite3.Connection) -> MeterPage:
        rows, pagination = fetch_page(conn, METER_COLUMNS, "meters", query)
        return MeterPage([stored_meter(row).meter for row in rows], pagination)

    return JsonResponse(await service.store.read(select))


async def _archive(service: Service, request: Request, message: str) -> Response:
    view, meter_id = service.view(request), request.path_params["id"]

    def archive(conn: sqlite3.Connection) -> None:
        require_meter(conn, view.environment, meter_id)
        archive_row(conn, "meters", view, meter_id)

    await service.store.write(archive)
    return JsonResponse(Done(message))


async def disable_meter(service: Service, request: Request) -> Response:
    """POST /v1/meters/{id}/disable: archive a meter (API: Archived meters)."""
    return await _archive(service, request, "Meter disabled successfully")


async def delete_meter(service: Service, request: Request) -> Response:
    """DELETE /v1/meters/{id}: archive a meter (API: Archived meters)."""
    return await _archive(service, request, "Meter deleted successfully")


# ---------------------------------------------------------------------------------------------- Usage of a meter


class MeterUsageIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/events/usage/meter (API: Usage of a meter)."""

    meter_id: str | None = None
    external_customer_id: str | None = None
    customer_id: str | None = None
    start_time: str | None = None
    end_time: str | None = None
    window_size: str | None = None
    bucket_size: str | None = None  # without effect: the meter has its own
    filters: PropertyFilters | None = None
    billing_anchor: str | None = None
    timezone: str | None = None


_METER_USAGE = msgspec.json.Decoder(MeterUsageIn)
_SHARED_FIELDS = {*MeterUsageIn.__struct_fields__} & {*UsageIn.__struct_fields__}
_BUCKETS_PER_ROUND = 50_000  # of a lifetime value


def _usage_in(sent: MeterUsageIn, event_name: str, aggregation: Aggregation) -> UsageIn:
    """Make a request for usage from the caller's fields and a meter's aggregation."""
    usage = UsageIn(**{name: getattr(sent, name) for name in _SHARED_FIELDS})
    usage.event_name = event_name
    usage.aggregation_type, usage.property_name = aggregation.type, aggregation.field
    usage.multiplier = aggregation.multiplier if aggregation.type == "SUM_WITH_MULTIPLIER" else None
    usage.bucket_size, usage.group_by_property = aggregation.bucket_size, aggregation.group_by
    return usage


def _check_meter_usage(sent: MeterUsageIn, view: View, faults: Faults) -> None:
    """Check the caller's fields before the meter is looked up. Raises ApiError with every fault."""
    if not sent.meter_id:
        faults.add("meter_id", "required", "is required")
    if sent.bucket_size:
        faults.ignore(["bucket_size"])
    usage_query(_usage_in(sent, "any", Aggregation("COUNT")), view, faults)


def _meter_query(sent: MeterUsageIn, meter: Meter, view: View) -> UsageQuery:
    query = usage_query(_usage_in(sent, meter.event_name, meter.aggregation), view, Faults())
    return replace(
        query, property_filters=filters_in_both(query.property_filters, meter),
        lifetime=meter.reset_usage == "NEVER" and query.windows is None,
        group_property=meter.aggregation.group_by or "",
        is_of_meter=True,
    )  # fmt: skip


def _whole_buckets(query: UsageQuery, start_us: int) -> list[Span]:
    """Return up to 50,000 buckets from this time on; only the end of the range cuts one short."""
    buckets = query.windows or Windows("DAY")
    minutes = WINDOW_MINUTES.get(buckets.size, 1440)
    end_us = min(start_us + _BUCKETS_PER_ROUND * minutes * MINUTE_US, query.end_us)
    spans = buckets.spans(start_us, end_us)
    return spans if end_us == query.end_us else spans[:-1]


def _sum_of_buckets(conn: sqlite3.Connection, query: UsageQuery) -> float:
    """Add up the buckets, 50,000 at a time. Each round starts at the next event, to skip times without events."""
    matched = matching(query)
    first = f"""SELECT min(timestamp_us) FROM events {index_of(query.filters)}
        WHERE {matched} AND timestamp_us >= :from_us AND timestamp_us < :end_us"""
    next_us, value = MIN_TIME_US, 0.0
    while True:
        values = {**matched.values, "from_us": next_us, "end_us": query.end_us}
        first_us = conn.execute(first, values).fetchone()[0]
        if first_us is None:
            return value
        spans = _whole_buckets(query, first_us)
        value += usage_value(query, select_cells(conn, query, spans))
        next_us = spans[-1].end_us


async def _lifetime_value(service: Service, query: UsageQuery) -> float:
    """Add up all buckets before the end of the range, including those before its start."""
    if query.aggregation == "SUM":
        unbucketed = replace(query, windows=None, bucketed=False, lifetime=True)
        return float(await aggregate(service, unbucketed, lambda query, _spans, cells: usage_value(query, cells)))
    return await service.store.read(partial(_sum_of_buckets, query=query), quick=False)


async def compute_meter_usage(service: Service, request: Request) -> Response:
    """POST /v1/events/usage/meter: usage with the aggregation of a meter (API: Usage of a meter)."""
    faults = service.faults(request)
    sent = await read_fields(service, request, _METER_USAGE, faults)
    view = service.view(request)
    _check_meter_usage(sent, view, faults)
    require = partial(require_meter, environment=view.environment, meter_id=sent.meter_id or "")
    meter = (await service.store.read(require)).meter
    query = _meter_query(sent, meter, view)
    counts_lifetime = meter.reset_usage == "NEVER" and query.bucketed
    lifetime_value = await _lifetime_value(service, query) if counts_lifetime else None

    def answer(query: UsageQuery, spans: Sequence[Span], cells: Sequence[Any]) -> Usage:
        usage = usage_answer(query, spans, cells)
        return usage if lifetime_value is None else replace(usage, value=lifetime_value)

    return JsonResponse(await aggregate(service, query, answer))


# ---------------------------------------------------------------------------------------------- OpenAPI

METER_EXAMPLE = {
    "name": "Tokens",
    "event_name": "llm.call",
    "aggregation": {"type": "SUM", "field": "tokens"},
    "filters": [{"key": "model", "values": ["gpt-4o"]}],
    "reset_usage": "BILLING_PERIOD",
}
_TIMES = dict.fromkeys(("start_time", "end_time"), TIME_SCHEMA)
_DECIMAL_SCHEMA = {
    "anyOf": [{"type": "string", "pattern": f"^{DECIMAL.pattern}$"},
              {"type": "number", "minimum": -sys.float_info.max, "maximum": sys.float_info.max}, NULL]}  # fmt: skip
_RESET_SCHEMA = {"anyOf": [ref("ResetUsage"), any_case(_RESET_ALIASES)]}
METER_SCHEMAS: dict[str, Any] = AGGREGATION_ENUMS | {
    "ResetUsage": enum_schema(_RESETS),
    "MeterIn": {"name": NAME_SCHEMA,  # white space around the event name does not count
                "event_name": {"type": "string", "pattern": rf"^\s*\S([\s\S]{{0,{MAX_NAME_CHARS - 2}}}\S)?\s*$"},
                "aggregation": ref(AggregationIn), "reset_usage": _RESET_SCHEMA,
                "filters": {"type": ["array", "null"], "items": ref(MeterFilterIn), "maxItems": MAX_FILTER_KEYS,
                            "description": f"At most {MAX_FILTER_VALUES} values under all keys together."}},
    "AggregationIn": {"type": AGGREGATION_SCHEMA, "expression": NOTHING, "multiplier": _DECIMAL_SCHEMA,
                      "bucket_size": choice("WindowSize"),
                      "field": {"type": ["string", "null"], "description": "Required for all types but COUNT."},
                      "group_by": {"type": ["string", "null"], "pattern": r"^(?!properties\.)"}},
    "MeterFilterIn": {"key": TEXT_SCHEMA, "values": {"type": "array", "items": {"type": "string"}, "minItems": 1,
                                                     "maxItems": MAX_FILTER_VALUES}},
}  # fmt: skip
_LIST_PARAMETERS = LIST_PARAMETERS | {"event_name": {"type": "string"}, "sort": ref("MeterSort")}
_LIST_ENUMS = LIST_ENUMS | {"MeterSort": enum_schema(SORTS["meters"])}
_USAGE_SCHEMAS = {"MeterUsageIn": _TIMES | {
    "meter_id": {"type": "string", "minLength": 1}, "window_size": choice("WindowSize"), "filters": FILTERS_SCHEMA,
    "billing_anchor": TIME_SCHEMA}}  # fmt: skip

OPERATIONS = (
    Operation("POST", "/v1/meters", create_meter, Meter, MeterIn, status=201, example=METER_EXAMPLE,
              schemas=METER_SCHEMAS),
    Operation("GET", "/v1/meters", find_meters, MeterPage, None, _LIST_PARAMETERS, schemas=_LIST_ENUMS),
    Operation("GET", "/v1/meters/{id}", show_meter, Meter, refusals=[404]),
    Operation("POST", "/v1/meters/{id}/disable", disable_meter, Done, refusals=[404]),
    Operation("DELETE", "/v1/meters/{id}", delete_meter, Done, refusals=[404]),
    Operation("POST", "/v1/events/usage/meter", compute_meter_usage, Usage, MeterUsageIn, role="event_reader",
              refusals=[404], schemas=_USAGE_SCHEMAS,
              example={"meter_id": "meter_01K7M", "external_customer_id": "cust_42", "window_size": "DAY"}),
)  # fmt: skip
