"""Meters and features: saved aggregations, what they are called, and the usage of one (API: Meters, Features)."""

from __future__ import annotations

import math
import re
import sqlite3
from collections.abc import Callable, Iterable
from decimal import Decimal
from functools import partial
from typing import Any, NamedTuple, Protocol

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from eventstore import (
    AGGREGATIONS,
    DECIMAL,
    ENCODER,
    FIELD_SCHEMAS,
    MAX_FILTER_KEYS,
    ORDERS,
    PARAMETER_PARSERS,
    PARAMETER_SCHEMAS,
    WINDOW_SIZES,
    ApiError,
    Faults,
    FieldError,
    JsonResponse,
    Operation,
    Parameters,
    Service,
    T,
    check_filter_limits,
    check_kind,
    check_offset,
    check_order,
    check_positive,
    check_window_size,
    choice,
    echo,
    one_of,
    parse_int,
    parse_parameters,
    parse_time,
    query_of_parameters,
    read_fields,
    ref,
    to_datetime,
    whole_within,
)

MAX_NAME_CHARS = 255  # of a name, an event name or a lookup key
DEFAULT_LIMIT, MAX_LIMIT = 50, 1000

# ---------------------------------------------------------------------------------------------- wire types


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
    """The body of POST /v1/meters, and a feature's inline meter (API: Meters)."""

    name: str | None = None
    event_name: str | None = None
    aggregation: AggregationIn | None = None
    filters: list[MeterFilterIn] | None = None
    reset_usage: str | None = None


class ReportingUnitIn(Struct, forbid_unknown_fields=True):
    unit_singular: str | None = None
    unit_plural: str | None = None
    conversion_rate: str | float | None = None


class FeatureIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/features (API: Features)."""

    name: str | None = None
    type: str | None = None
    lookup_key: str | None = None
    meter_id: str | None = None
    meter: MeterIn | None = None
    description: str | None = None
    unit_singular: str | None = None
    unit_plural: str | None = None
    reporting_unit: ReportingUnitIn | None = None
    metadata: dict[str, str] | None = None
    alert_settings: Any = None  # this and the next two are known, and without effect
    group_id: Any = None
    group: Any = None


class SortIn(Struct, forbid_unknown_fields=True):
    field: str | None = None
    direction: str | None = None


class MeterListIn(Struct, forbid_unknown_fields=True):
    """The parameters of GET /v1/meters (API: Meters)."""

    limit: int | float | None = None
    offset: int | float | None = None
    status: str | None = None
    sort: str | None = None
    order: str | None = None
    start_time: str | None = None
    end_time: str | None = None
    event_name: str | None = None
    meter_ids: list[str] | None = None


class FeatureSearchIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/features/search, and what the parameters of GET /v1/features become (API: Features)."""

    limit: int | float | None = None
    offset: int | float | None = None
    status: str | None = None
    sort: list[SortIn] | None = None
    order: str | None = None
    start_time: str | None = None
    end_time: str | None = None
    feature_ids: list[str] | None = None
    meter_ids: list[str] | None = None
    lookup_key: str | None = None
    lookup_keys: list[str] | None = None
    name_contains: str | None = None
    expand: Any = None  # without effect: the meter is always there
    filters: list[Any] | None = None


class Aggregation(Struct):
    type: str
    field: str | None = None
    expression: None = None
    multiplier: str | None = None  # a decimal, plain digits
    bucket_size: str | None = None
    group_by: str | None = None

    @property
    def is_bucketed_max(self) -> bool:
        return self.type == "MAX" and self.bucket_size is not None


class MeterFilter(Struct):
    key: str
    values: list[str]


class Meter(Struct, kw_only=True):
    """A meter as it is answered (API: Meters)."""

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


class ReportingUnit(Struct):
    unit_singular: str
    unit_plural: str
    conversion_rate: float


class Feature(Struct, kw_only=True):
    """A feature as it is answered (API: Features)."""

    id: str
    name: str
    lookup_key: str
    description: str
    meter_id: str
    metadata: dict[str, str]
    type: str
    unit_singular: str
    unit_plural: str
    reporting_unit: ReportingUnit | None
    alert_settings: None = None
    group_id: None = None
    group: None = None
    environment_id: str
    tenant_id: str = ""
    status: str
    created_at: str
    updated_at: str
    created_by: str = ""
    updated_by: str = ""
    meter: Meter | None


class Pagination(Struct):
    total: int
    limit: int
    offset: int  # where the next page starts


class MeterPage(Struct):
    items: list[Meter]
    pagination: Pagination


class FeaturePage(Struct):
    items: list[Feature]
    pagination: Pagination


class Done(Struct):
    message: str


METER = msgspec.json.Decoder(MeterIn)
FEATURE = msgspec.json.Decoder(FeatureIn)
FEATURE_SEARCH = msgspec.json.Decoder(FeatureSearchIn)
AGGREGATION = msgspec.json.Decoder(Aggregation)
METER_FILTERS = msgspec.json.Decoder(list[MeterFilter])
REPORTING_UNIT = msgspec.json.Decoder(ReportingUnit | None)
METADATA = msgspec.json.Decoder(dict[str, str])

# ---------------------------------------------------------------------------------------------- validation

FEATURE_TYPES = ("metered", "boolean", "static", "config")
RESETS = ("BILLING_PERIOD", "NEVER")
RESET_ALIASES = {"periodic": "BILLING_PERIOD", "cumulative": "NEVER"}  # what the documents' examples send
STATUSES = ("published", "archived", "deleted", "inactive", "active", "draft")  # all but two find nothing
SORT_COLUMNS = {"created_at": "created_at_us", "updated_at": "updated_at_us", "name": "name",
                "event_name": "event_name"}  # fmt: skip

check_sort, check_status = one_of(*SORT_COLUMNS), one_of(*STATUSES)
check_limit = whole_within(0, MAX_LIMIT)

Columns = dict[str, object]  # of a row, by name


def plain_decimal(number: Decimal) -> str:
    """Plain digits: no exponent, no zeros at the end."""
    digits = format(number, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def time_text(time_us: int) -> str:
    """A time as Go writes it: as many digits of a second as there are (API: Times)."""
    seconds, dot, digits = to_datetime(time_us).isoformat().removesuffix("+00:00").partition(".")
    return f"{seconds}{dot}{digits.rstrip('0')}Z"


def decimal_text(value: float) -> str:
    """A whole number below 2^53 in full, any other to 15 significant digits; plain digits (API: Analytics)."""
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return plain_decimal(Decimal(f"{value:.15g}"))


def check_decimal(value: str | float) -> float:
    """A number, or the text of one, that a 64-bit float can hold; of any sign."""
    text = str(value)
    if not DECIMAL.fullmatch(text) or math.isinf(float(text)):
        raise FieldError("invalid_format", f"must be a decimal number, got {echo(text)}")
    return float(text)


def check_factor(value: str | float) -> float:
    check_decimal(value)  # what is no number has another code than what is 0 or less
    return check_positive(value)


def check_name(field: str, value: str | None, faults: Faults) -> str:
    """A text that must be there; up to 255 characters."""
    if not value:
        faults.add(field, "required", "is required")
    return check_length(field, value, faults)


def check_length(field: str, value: str | None, faults: Faults) -> str:
    if value and len(value) > MAX_NAME_CHARS:
        faults.add(field, "out_of_range", f"may have {MAX_NAME_CHARS} characters, got {len(value)}")
    return value or ""


def check_reset(text: str) -> str:
    return one_of(*RESETS)(RESET_ALIASES.get(text.lower(), text))


def meter_columns(sent: MeterIn, faults: Faults) -> Columns:
    """What the caller says of a meter; what is wrong with it goes to `faults` (API: Meters)."""
    name = check_name("name", sent.name, faults)
    event_name = check_name("event_name", (sent.event_name or "").strip(), faults)
    aggregation = Aggregation("COUNT")
    if sent.aggregation is None:
        faults.add("aggregation", "required", 'is required: an object like {"type": "SUM", "field": "tokens"}')
    else:
        with faults.within("aggregation"):
            aggregation = check_aggregation(sent.aggregation, faults)
    if not sent.reset_usage:
        faults.add("reset_usage", "required", f"is required: one of {', '.join(RESETS)}")
    return {
        "name": name,
        "event_name": event_name,
        "aggregation": ENCODER.encode(aggregation).decode(),
        "filters": ENCODER.encode(check_meter_filters(sent.filters or [], faults)).decode(),
        "reset_usage": faults.check("reset_usage", check_reset, sent.reset_usage),
    }


def check_aggregation(sent: AggregationIn, faults: Faults) -> Aggregation:
    if not sent.type:
        faults.add("type", "required", f"is required: one of {', '.join(AGGREGATIONS)}")
    kind = faults.check("type", check_kind, (sent.type or "").upper()) or "COUNT"
    if sent.expression:
        problem = f"must be empty, got {echo(sent.expression)}: this server computes no formulas, name a field instead"
        faults.add("expression", "invalid_format", problem)
    elif kind != "COUNT" and not sent.field:
        faults.add("field", "required", f"is required for {kind}: the property to aggregate")
    has_factor = kind == "SUM_WITH_MULTIPLIER"
    if has_factor and sent.multiplier in (None, ""):
        faults.add("multiplier", "required", f"is required for {kind}: a decimal number greater than 0")
    multiplier = faults.check("multiplier", check_factor if has_factor else check_decimal, sent.multiplier)
    bucket_size = faults.check("bucket_size", check_window_size, sent.bucket_size)
    if bucket_size and kind not in ("MAX", "SUM"):
        faults.add("bucket_size", "invalid_format", f"goes with MAX and SUM only, not with {kind}")
    if sent.group_by and (kind != "MAX" or not sent.bucket_size):
        faults.add("group_by", "invalid_format", "goes with MAX and a bucket_size only")
    if sent.group_by and sent.group_by.startswith("properties."):  # as usage and analytics have it
        problem = f"must be the property alone, without properties. before it, got {echo(sent.group_by)}"
        faults.add("group_by", "invalid_format", problem)
    return Aggregation(
        type=kind,
        field=sent.field or None,
        multiplier=None if multiplier is None else decimal_text(multiplier),
        bucket_size=bucket_size,
        group_by=sent.group_by or None,
    )


def check_meter_filters(sent: list[MeterFilterIn], faults: Faults) -> list[MeterFilter]:
    checked = []
    for place, condition in enumerate(sent):
        with faults.within(f"filters[{place}]"):
            if not condition.key:
                faults.add("key", "required", "is required: the property to look at")
            if not condition.values:
                faults.add("values", "required", "is required: an array of at least one string")
        checked.append(MeterFilter(condition.key or "", condition.values or []))
    check_filter_limits("filters", [condition.values for condition in checked], faults)
    return checked


def feature_columns(sent: FeatureIn, faults: Faults) -> tuple[Columns, Columns | None]:
    """What the caller says of a feature, and of the meter that is made with it, if one is (API: Features)."""
    name = check_name("name", sent.name, faults)
    if not sent.type:
        faults.add("type", "required", f"is required: one of {', '.join(FEATURE_TYPES)}")
    metered = faults.check("type", one_of(*FEATURE_TYPES), sent.type) == "metered"
    meter = None
    if metered and not sent.meter_id:
        if sent.meter is None:
            faults.add("meter", "required", "or meter_id is required for a metered feature")
        else:
            with faults.within("meter"):
                meter = meter_columns(sent.meter, faults)
    if bool(sent.unit_singular) is not bool(sent.unit_plural):
        missing, given = ("unit_plural", "unit_singular") if sent.unit_singular else ("unit_singular", "unit_plural")
        faults.add(missing, "required", f"is required with {given}")
    return {
        "name": name,
        "lookup_key": check_length("lookup_key", sent.lookup_key or made_lookup_key(name), faults),
        "description": sent.description or "",
        "meter_id": sent.meter_id or "" if metered else "",
        "metadata": ENCODER.encode(sent.metadata or {}).decode(),
        "type": sent.type,
        "unit_singular": sent.unit_singular or "",
        "unit_plural": sent.unit_plural or "",
        "reporting_unit": ENCODER.encode(check_reporting_unit(sent.reporting_unit, faults)).decode(),
    }, meter


def made_lookup_key(name: str) -> str:
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def check_reporting_unit(sent: ReportingUnitIn | None, faults: Faults) -> ReportingUnit | None:
    if sent is None:
        return None
    with faults.within("reporting_unit"):
        for field in ReportingUnitIn.__struct_fields__:
            if getattr(sent, field) in (None, ""):
                faults.add(field, "required", "is required in a reporting unit")
        rate = faults.check("conversion_rate", check_factor, sent.conversion_rate) or 1
    return ReportingUnit(sent.unit_singular or "", sent.unit_plural or "", rate)


class Listing(Protocol):
    """What is the same in both lists."""

    limit: int | float | None
    offset: int | float | None
    status: str | None
    order: str | None
    start_time: str | None
    end_time: str | None


class ListQuery(Struct):
    """A checked list: which rows, in which order, from where."""

    clauses: list[str]
    order: list[str]
    limit: int
    offset: int
    parameters: Parameters

    @property
    def where(self) -> str:
        return " AND ".join(self.clauses)


def list_query(table: str, sent: Listing, sorts: list[SortIn], environment: int, faults: Faults) -> ListQuery:
    """The query of a list, without what only one of the tables has. Faults are not refused yet (API: Meters)."""
    start_us = faults.check("start_time", parse_time, sent.start_time)
    end_us = faults.check("end_time", parse_time, sent.end_time)
    if start_us is not None and end_us is not None and end_us < start_us:
        faults.add("end_time", "out_of_range", f"is {echo(sent.end_time or '')}, before {echo(sent.start_time or '')}")
    bounds = {">=": start_us, "<=": end_us}
    clauses = [f"{table}.environment = :environment"]
    clauses += [f"{table}.created_at_us {sign} {limit_us}" for sign, limit_us in bounds.items() if limit_us is not None]
    if status := faults.check("status", check_status, sent.status):
        of_status = {"published": f"{table}.archived_at_us IS NULL", "archived": f"{table}.archived_at_us IS NOT NULL"}
        clauses.append(of_status.get(status, "FALSE"))
    default = faults.check("order", check_order, sent.order) or "desc"
    order = []
    direction = default
    for place, sort in enumerate(sorts or [SortIn("created_at")]):
        with faults.within(f"sort[{place}]"):
            field = faults.check("field", check_sort, sort.field) or "created_at"
            direction = faults.check("direction", check_order, sort.direction) or default
        column = SORT_COLUMNS[field]
        order.append(f"{'meters' if column == 'event_name' else table}.{column} {direction}")
    return ListQuery(
        clauses,
        [*order, f"{table}.id {direction}"],
        faults.check("limit", check_limit, sent.limit) or DEFAULT_LIMIT,
        faults.check("offset", check_offset, sent.offset) or 0,
        {"environment": environment},
    )


def is_in(column: str, values: Iterable[str], name: str, parameters: Parameters) -> str:
    """Does a column have one of the values? They are one parameter, so there may be as many as there are."""
    parameters[name] = ENCODER.encode(list(values)).decode()
    return f"{column} IN (SELECT value FROM json_each(:{name}))"


def add_list_filters(query: ListQuery, *filters: tuple[str, Iterable[str] | None]) -> None:
    """Of each column that is given, only these values; an empty list, like an absent one, is no condition."""
    for place, (column, values) in enumerate(filters):
        if values:
            query.clauses.append(is_in(column, values, f"values{place}", query.parameters))


# ---------------------------------------------------------------------------------------------- the tables

METER_COLUMNS = ("id", "name", "event_name", "aggregation", "filters", "reset_usage", "created_at_us", "updated_at_us",
                 "archived_at_us")  # fmt: skip
FEATURE_COLUMNS = ("id", "name", "lookup_key", "description", "meter_id", "metadata", "type", "unit_singular",
                   "unit_plural", "reporting_unit", "created_at_us", "updated_at_us", "archived_at_us")  # fmt: skip
_METERS = ", ".join(f"meters.{name}" for name in METER_COLUMNS)
_FEATURES = ", ".join(f"features.{name}" for name in FEATURE_COLUMNS)
FEATURES_WITH_METERS = "features LEFT JOIN meters ON (meters.environment, meters.id) = (features.environment, meter_id)"
BY_ID = "environment = :environment AND id = :id"
ARCHIVE = f"""SET archived_at_us = ifnull(archived_at_us, :now), updated_at_us = ifnull(archived_at_us, :now)
    WHERE {BY_ID}"""
ARCHIVE_METER = f"UPDATE meters {ARCHIVE}"
# Unless another feature still needs it.
ARCHIVE_METER_OF = f"""{ARCHIVE_METER} AND NOT EXISTS (SELECT 1 FROM features WHERE environment = :environment
    AND meter_id = :id AND archived_at_us IS NULL)"""


class StoredMeter(NamedTuple):
    meter: Meter
    archived_at_us: int | None


def meter_of(row: tuple[Any, ...]) -> StoredMeter:
    identity, name, event_name, aggregation, filters, reset_usage, created_us, updated_us, archived_us = row
    meter = Meter(
        id=identity,
        name=name,
        event_name=event_name,
        aggregation=AGGREGATION.decode(aggregation),
        filters=METER_FILTERS.decode(filters),
        reset_usage=reset_usage,
        created_at=time_text(created_us),
        updated_at=time_text(updated_us),
        status="published" if archived_us is None else "archived",
    )
    return StoredMeter(meter, archived_us)


def feature_of(row: tuple[Any, ...], environment: str) -> Feature:
    values = dict(zip(FEATURE_COLUMNS, row, strict=False))
    archived_us, meter = values.pop("archived_at_us"), row[len(FEATURE_COLUMNS) :]
    return Feature(
        created_at=time_text(values.pop("created_at_us")),
        updated_at=time_text(values.pop("updated_at_us")),
        metadata=METADATA.decode(values.pop("metadata")),
        reporting_unit=REPORTING_UNIT.decode(values.pop("reporting_unit")),
        status="published" if archived_us is None else "archived",
        environment_id=environment,
        meter=None if meter[0] is None else meter_of(meter).meter,
        **values,
    )


def select_meters(conn: sqlite3.Connection, clauses: str, parameters: Parameters) -> list[StoredMeter]:
    rows = conn.execute(f"SELECT {_METERS} FROM meters WHERE {clauses}", parameters).fetchall()
    return [meter_of(row) for row in rows]


def select_features(conn: sqlite3.Connection, environment: str, clauses: str, parameters: Parameters) -> list[Feature]:
    statement = f"SELECT {_FEATURES}, {_METERS} FROM {FEATURES_WITH_METERS} WHERE {clauses}"
    return [feature_of(row, environment) for row in conn.execute(statement, parameters).fetchall()]


def insert_row(conn: sqlite3.Connection, table: str, columns: Columns) -> None:
    names = ", ".join(columns)
    conn.execute(f"INSERT INTO {table} ({names}) VALUES ({', '.join('?' * len(columns))})", [*columns.values()])


class Place(NamedTuple):
    """Where and when something is made or archived."""

    environment: int
    environment_name: str
    now_us: int

    def row(self, identity: str, columns: Columns) -> Columns:
        times = {"created_at_us": self.now_us, "updated_at_us": self.now_us}
        return {"environment": self.environment, "id": identity} | columns | times


def add_meter(conn: sqlite3.Connection, place: Place, identity: str, columns: Columns) -> Meter:
    insert_row(conn, "meters", place.row(identity, columns))
    return known_meter(conn, place.environment, identity).meter


def known_meter(conn: sqlite3.Connection, environment: int, identity: str) -> StoredMeter:
    """ApiError: not_found."""
    found = select_meters(conn, BY_ID, {"environment": environment, "id": identity})
    if not found:
        raise ApiError("not_found", f"no meter with the id {echo(identity)} in this environment")
    return found[0]


def check_is_published(conn: sqlite3.Connection, environment: int, meter_id: str) -> None:
    """ApiError: not_found, validation_error."""
    if known_meter(conn, environment, meter_id).archived_at_us is not None:
        faults = Faults(index=0)
        problem = f"names a meter that is archived, got {echo(meter_id)}: make a new one"
        faults.add("meter_id", "invalid_format", problem)
        faults.refuse()


def add_feature(
    conn: sqlite3.Connection, place: Place, ids: tuple[str, str], columns: Columns, meter: Columns | None
) -> Feature:
    """Store a feature, and its meter if that is new. ApiError: not_found, validation_error, already_exists."""
    identity, meter_id = ids
    if meter is not None:
        add_meter(conn, place, meter_id, meter)
        columns = columns | {"meter_id": meter_id}
    elif columns["meter_id"]:
        check_is_published(conn, place.environment, str(columns["meter_id"]))
    try:
        insert_row(conn, "features", place.row(identity, columns))
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise
        taken = f"a feature with the lookup_key {echo(str(columns['lookup_key']))} exists"
        message = f"{taken}: choose another lookup_key, or delete that feature; nothing was stored"
        raise ApiError("already_exists", message) from None
    return known_feature(conn, place, identity)


def known_feature(conn: sqlite3.Connection, place: Place, identity: str) -> Feature:
    """ApiError: not_found."""
    parameters: Parameters = {"environment": place.environment, "id": identity}
    clauses = "features.environment = :environment AND features.id = :id"
    found = select_features(conn, place.environment_name, clauses, parameters)
    if not found:
        raise ApiError("not_found", f"no feature with the id {echo(identity)} in this environment")
    return found[0]


def archive_meter(conn: sqlite3.Connection, place: Place, identity: str) -> None:
    """From here on it counts nothing new. ApiError: not_found."""
    known_meter(conn, place.environment, identity)
    conn.execute(ARCHIVE_METER, {"environment": place.environment, "id": identity, "now": place.now_us})


def archive_feature(conn: sqlite3.Connection, place: Place, identity: str) -> None:
    """And its meter, unless another published feature has the same. ApiError: not_found."""
    feature = known_feature(conn, place, identity)
    parameters: Parameters = {"environment": place.environment, "id": identity, "now": place.now_us}
    conn.execute(f"UPDATE features {ARCHIVE}", parameters)
    conn.execute(ARCHIVE_METER_OF, parameters | {"id": feature.meter_id})


def list_meters(conn: sqlite3.Connection, query: ListQuery) -> MeterPage:
    page = paged(query)
    meters = [stored.meter for stored in select_meters(conn, page, query.parameters)]
    return MeterPage(meters, pagination(conn, "meters", query))


def list_features(conn: sqlite3.Connection, environment: str, query: ListQuery) -> FeaturePage:
    conn.create_function("casefold", 1, str.casefold, deterministic=True)  # SQLite's lower() knows ASCII only
    features = select_features(conn, environment, paged(query), query.parameters)
    return FeaturePage(features, pagination(conn, FEATURES_WITH_METERS, query))


def paged(query: ListQuery) -> str:
    return f"{query.where} ORDER BY {', '.join(query.order)} LIMIT {query.limit} OFFSET {query.offset}"


def pagination(conn: sqlite3.Connection, table: str, query: ListQuery) -> Pagination:
    (total,) = conn.execute(f"SELECT count(*) FROM {table} WHERE {query.where}", query.parameters).fetchone()
    return Pagination(total, query.limit, query.offset + query.limit)


# ---------------------------------------------------------------------------------------------- handlers


def place_of(service: Service, request: Request) -> Place:
    name = request["environment"]
    return Place(service.store.environments[name], name, service.settings.clock())


async def create_meter(service: Service, request: Request) -> Response:
    """POST /v1/meters: a saved aggregation over the events of one name (API: Meters)."""
    faults = Faults(index=0)
    columns = meter_columns(await read_fields(service, request, METER, faults), faults)
    faults.refuse()
    place = place_of(service, request)
    identity = service.make_id(place.now_us, "meter_")
    make = partial(add_meter, place=place, identity=identity, columns=columns)
    return JsonResponse(await service.store.write(make), 201)


async def create_feature(service: Service, request: Request) -> Response:
    """POST /v1/features: a name and units for a meter, which may be made with it (API: Features)."""
    faults = Faults(index=0)
    columns, meter = feature_columns(await read_fields(service, request, FEATURE, faults), faults)
    faults.refuse()
    place = place_of(service, request)
    ids = (service.make_id(place.now_us, "feat_"), service.make_id(place.now_us, "meter_"))
    make = partial(add_feature, place=place, ids=ids, columns=columns, meter=meter)
    return JsonResponse(await service.store.write(make), 201)


async def show_meter(service: Service, request: Request) -> Response:
    """GET /v1/meters/{id} (API: Meters)."""
    environment, identity = place_of(service, request).environment, request.path_params["id"]
    return JsonResponse(await service.store.read(lambda conn: known_meter(conn, environment, identity).meter))


async def show_feature(service: Service, request: Request) -> Response:
    """GET /v1/features/{id} (API: Features)."""
    show = partial(known_feature, place=place_of(service, request), identity=request.path_params["id"])
    return JsonResponse(await service.store.read(show))


async def disable_meter(service: Service, request: Request) -> Response:
    """POST /v1/meters/{id}/disable: it counts nothing new (API: Meters)."""
    return await _archive(service, request, archive_meter, "Meter disabled successfully")


async def delete_meter(service: Service, request: Request) -> Response:
    """DELETE /v1/meters/{id}: the same as to disable it (API: Meters)."""
    return await _archive(service, request, archive_meter, "Meter deleted successfully")


async def delete_feature(service: Service, request: Request) -> Response:
    """DELETE /v1/features/{id}: its meter goes with it, unless another feature has it (API: Features)."""
    return await _archive(service, request, archive_feature, "feature deleted successfully")


async def _archive(
    service: Service, request: Request, archive: Callable[[sqlite3.Connection, Place, str], None], message: str
) -> Response:
    place, identity = place_of(service, request), request.path_params["id"]
    await service.store.write(lambda conn: archive(conn, place, identity))
    return JsonResponse(Done(message))


def parameters_of(struct: type[T], request: Request, lists: Iterable[str], faults: Faults) -> T:
    parsers = PARAMETER_PARSERS | {"limit": parse_int} | {name: lambda text: text.split(",") for name in lists}
    parameters = parse_parameters(request["query_string"], faults, lists)
    names = [name for name in struct.__struct_fields__ if name != "filters"]  # type: ignore[attr-defined]
    return query_of_parameters(struct, parameters, names, faults, parsers)


def sorts_of(names: Iterable[Any], faults: Faults) -> list[SortIn]:
    """What a query string sorts by."""
    return [SortIn(faults.check("sort", check_sort, name)) for name in names]


async def find_meters(service: Service, request: Request) -> Response:
    """GET /v1/meters (API: Meters)."""
    faults = Faults()
    sent = parameters_of(MeterListIn, request, ["meter_ids"], faults)
    sorts = sorts_of([sent.sort] if sent.sort else [], faults)
    query = list_query("meters", sent, sorts, place_of(service, request).environment, faults)
    faults.refuse()
    event_name = (sent.event_name or "").strip()
    add_list_filters(query, ("event_name", event_name and [event_name]), ("id", sent.meter_ids))
    return JsonResponse(await service.store.read(partial(list_meters, query=query)))


async def find_features(service: Service, request: Request) -> Response:
    """GET /v1/features (API: Features)."""
    faults = Faults()
    sent = parameters_of(FeatureSearchIn, request, ["feature_ids", "meter_ids", "lookup_keys", "sort"], faults)
    sent.sort = sorts_of(sent.sort or [], faults)
    return await _find_features(service, request, sent, faults)


async def search_features(service: Service, request: Request) -> Response:
    """POST /v1/features/search (API: Features)."""
    faults = Faults()
    return await _find_features(service, request, await read_fields(service, request, FEATURE_SEARCH, faults), faults)


async def _find_features(service: Service, request: Request, sent: FeatureSearchIn, faults: Faults) -> Response:
    place = place_of(service, request)
    query = list_query("features", sent, sent.sort or [], place.environment, faults)
    if sent.filters:
        fields = "lookup_keys, name_contains and the other fields"
        faults.add("filters", "invalid_format", f"must be empty: this server has no conditions; it takes {fields}")
    faults.refuse()
    add_list_filters(
        query,
        ("features.id", sent.feature_ids),
        ("features.meter_id", sent.meter_ids),
        ("lookup_key", sent.lookup_key and [sent.lookup_key]),
        ("lookup_key", sent.lookup_keys),
    )
    if sent.name_contains:
        query.clauses.append("instr(casefold(features.name), :name_contains)")
        query.parameters["name_contains"] = sent.name_contains.casefold()
    list_page = partial(list_features, environment=place.environment_name, query=query)
    return JsonResponse(await service.store.read(list_page))


METER_EXAMPLE = {
    "name": "Tokens",
    "event_name": "llm.call",
    "aggregation": {"type": "SUM", "field": "tokens"},
    "filters": [{"key": "model", "values": ["gpt-4o"]}],
    "reset_usage": "BILLING_PERIOD",
}
_NAME = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
_DECIMAL: dict[str, Any] = FIELD_SCHEMAS["UsageIn"]["multiplier"]
_TIMES = {name: FIELD_SCHEMAS["EventQueryIn"][name] for name in ("start_time", "end_time")}
_LIST: dict[str, Any] = _TIMES | {
    "limit": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_LIMIT},
    "offset": FIELD_SCHEMAS["EventQueryIn"]["offset"],
    "status": choice(*STATUSES),
    "order": choice(*ORDERS),
}
METER_SCHEMAS = {
    "MeterIn": {"name": _NAME, "event_name": FIELD_SCHEMAS["EventIn"]["event_name"] | {"maxLength": MAX_NAME_CHARS},
                "aggregation": ref(AggregationIn),
                "filters": {"type": ["array", "null"], "items": ref(MeterFilterIn), "maxItems": MAX_FILTER_KEYS},
                "reset_usage": {"enum": [*RESETS, "Periodic", "Cumulative"]}},
    "AggregationIn": {"type": FIELD_SCHEMAS["UsageIn"]["aggregation_type"], "expression": {"enum": ["", None]},
                      "multiplier": _DECIMAL, "bucket_size": choice(*WINDOW_SIZES)},
    "MeterFilterIn": {"key": {"type": "string", "minLength": 1},
                      "values": {"type": "array", "items": {"type": "string"}, "minItems": 1, "maxItems": 20}},
}  # fmt: skip
FEATURE_SCHEMAS = METER_SCHEMAS | {
    "FeatureIn": {"name": _NAME, "type": {"enum": FEATURE_TYPES},
                  "lookup_key": {"type": ["string", "null"], "maxLength": MAX_NAME_CHARS}},
    "ReportingUnitIn": {"unit_singular": _NAME, "unit_plural": _NAME,
                        "conversion_rate": {"anyOf": _DECIMAL["anyOf"][:2]}},
}  # fmt: skip
SEARCH_SCHEMAS = {
    "FeatureSearchIn": _LIST | {"filters": {"type": ["array", "null"], "maxItems": 0}},
    "SortIn": {"field": choice(*SORT_COLUMNS), "direction": choice(*ORDERS)},
}
_TEXT = {"type": "string"}
_LIST_PARAMETERS = {name: PARAMETER_SCHEMAS[name] for name in ("start_time", "end_time", "offset")} | {
    "limit": {"type": "integer", "minimum": 0, "maximum": MAX_LIMIT},
    "status": {"enum": [*STATUSES, ""]},
    "sort": {"enum": [*SORT_COLUMNS, ""]},
    "order": PARAMETER_SCHEMAS["order"],
    "meter_ids": _TEXT,
}
_FEATURE_PARAMETERS = dict.fromkeys(("feature_ids", "lookup_key", "lookup_keys", "name_contains", "expand"), _TEXT)

OPERATIONS = (
    Operation("POST", "/v1/meters", create_meter, Meter, MeterIn, status=201, example=METER_EXAMPLE,
              schemas=METER_SCHEMAS),
    Operation("GET", "/v1/meters", find_meters, MeterPage, None, _LIST_PARAMETERS | {"event_name": _TEXT}),
    Operation("GET", "/v1/meters/{id}", show_meter, Meter, refusals=[404]),
    Operation("POST", "/v1/meters/{id}/disable", disable_meter, Done, refusals=[404]),
    Operation("DELETE", "/v1/meters/{id}", delete_meter, Done, refusals=[404]),
    Operation("POST", "/v1/features", create_feature, Feature, FeatureIn, status=201, refusals=[404, 409],
              example={"name": "Tokens", "type": "metered", "meter": METER_EXAMPLE}, schemas=FEATURE_SCHEMAS),
    Operation("GET", "/v1/features", find_features, FeaturePage, None, _LIST_PARAMETERS | _FEATURE_PARAMETERS),
    Operation("POST", "/v1/features/search", search_features, FeaturePage, FeatureSearchIn, schemas=SEARCH_SCHEMAS,
              example={"lookup_keys": ["tokens"]}),
    Operation("GET", "/v1/features/{id}", show_feature, Feature, refusals=[404]),
    Operation("DELETE", "/v1/features/{id}", delete_feature, Done, refusals=[404]),
)  # fmt: skip
