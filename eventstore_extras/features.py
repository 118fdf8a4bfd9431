"""Features: names and units for meters (API: Features).

From top to bottom: a feature and its checks, its rows, the meters that features name, the routes, the schemas for the
OpenAPI document.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Collection, Sequence
from decimal import ROUND_HALF_UP, Decimal, localcontext
from functools import partial
from typing import Any, NamedTuple

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.responses import Response

from eventstore import (
    ENCODER,
    IN_ENVIRONMENT,
    ApiError,
    Faults,
    FieldError,
    JsonResponse,
    Operation,
    Service,
    Sql,
    View,
    check_order,
    one_of,
    quoted,
    read_fields,
    sql,
)
from eventstore_extras.meters import (
    METER_COLUMNS,
    METER_EXAMPLE,
    METER_SCHEMAS,
    Aggregation,
    Meter,
    MeterIn,
    add_meter,
    all_meters,
    meter_columns,
    require_meter,
    stored_meter,
)
from eventstore_extras.openapi import EMPTY_ARRAY, POSITIVE_SCHEMA, enum_schema, optional, ref
from eventstore_extras.resources import (
    LIST_ENUMS,
    LIST_PARAMETERS,
    LIST_SCHEMA,
    MAX_NAME_CHARS,
    NAME_SCHEMA,
    SORTS,
    Columns,
    Done,
    ListQuery,
    Pagination,
    Sort,
    archive_row,
    check_length,
    check_name,
    check_positive_decimal,
    check_sort,
    fetch_page,
    insert_row,
    is_any_of,
    list_query,
    parse_list,
    plain_decimal,
    sorts_by,
    time_text,
    update_row,
)

__all__ = [
    "OPERATIONS", "Feature", "FeatureIn", "FeaturePage", "FeatureSearchIn", "FeatureUpdateIn", "NamedMeter",
    "ReportingUnit", "SortIn", "named_meters", "require_feature",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- A feature


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
    alert_settings: Any = None  # accepted without effect, like the next two
    group_id: Any = None
    group: Any = None


class FeatureUpdateIn(Struct, forbid_unknown_fields=True):
    """The body of PUT /v1/features/{id}: the fields to change (API: Features)."""

    name: str | None = None
    description: str | None = None
    unit_singular: str | None = None
    unit_plural: str | None = None
    reporting_unit: ReportingUnitIn | None = None
    metadata: dict[str, str] | None = None
    filters: list[Any] | None = None
    lookup_key: Any = None  # accepted without effect, like the next four
    type: Any = None
    alert_settings: Any = None
    group_id: Any = None
    group: Any = None


class ReportingUnit(Struct):
    unit_singular: str
    unit_plural: str
    conversion_rate: float

    def converted(self, usage: str) -> str:
        """Convert usage into this unit: two digits, rounded half away from zero (API: Analytics)."""
        with localcontext(prec=700):  # enough for the largest float divided by the smallest
            shown = Decimal(usage) / Decimal(str(self.conversion_rate))
            return plain_decimal(shown.quantize(Decimal("0.01"), ROUND_HALF_UP))


class Feature(Struct, kw_only=True):
    """A feature in an answer (API: Features)."""

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


_FEATURE = msgspec.json.Decoder(FeatureIn)
_FEATURE_UPDATE = msgspec.json.Decoder(FeatureUpdateIn)
_TYPES = ("metered", "boolean", "static", "config")
_UNITS = ("unit_singular", "unit_plural")
_MAX_UNIT_CHARS = 50
_NOTHING_SET = {"description": "", "unit_singular": "", "unit_plural": "", "metadata": "{}", "reporting_unit": "null"}
_check_type = one_of(*_TYPES)


def _new_meter(sent: FeatureIn, is_metered: bool, faults: Faults) -> Columns | None:
    """Check the meter in a feature's body. Return its columns, or None if the feature does not get this meter."""
    is_new = is_metered and not sent.meter_id
    if sent.meter is None:
        if is_new:
            faults.add("meter", "required", "or meter_id is required for a metered feature")
        return None
    with faults.within("meter"):
        columns = meter_columns(sent.meter, faults)
    return columns if is_new else None


def _lookup_key(name: str) -> str:
    """Make the lookup key of a feature that was sent without one."""
    return re.sub("[^a-z0-9]+", "_", name.lower()).strip("_")


def _checked_reporting_unit(sent: ReportingUnitIn, faults: Faults) -> ReportingUnit:
    with faults.within("reporting_unit"):
        for field in ReportingUnitIn.__struct_fields__:
            if getattr(sent, field) in (None, ""):
                faults.add(field, "required", "is required in a reporting unit")
        rate = faults.check("conversion_rate", check_positive_decimal, sent.conversion_rate) or 1
        singular, plural = (check_length(field, getattr(sent, field), faults) for field in _UNITS)
    return ReportingUnit(singular, plural, rate)


def _check_units(columns: Columns, faults: Faults) -> None:
    """Check that a feature has both units or neither."""
    for missing, given in (_UNITS, _UNITS[::-1]):
        if columns[given] and not columns[missing]:
            faults.add(missing, "required", f"is required with {given}")


def _sent_columns(sent: FeatureIn | FeatureUpdateIn, faults: Faults) -> Columns:
    """Check the optional fields of a new or a changed feature; return the columns of those that are set."""
    columns = {
        "description": sent.description,
        **{
            field: getattr(sent, field) and check_length(field, getattr(sent, field), faults, _MAX_UNIT_CHARS)
            for field in _UNITS
        },
        "metadata": None if sent.metadata is None else ENCODER.encode(sent.metadata).decode(),
        "reporting_unit": sent.reporting_unit
        and ENCODER.encode(_checked_reporting_unit(sent.reporting_unit, faults)).decode(),
    }
    return {name: value for name, value in columns.items() if value is not None}


def _feature_columns(sent: FeatureIn, faults: Faults) -> tuple[Columns, Columns | None]:
    """Check a feature; return its columns, and its meter's columns if the meter is new (API: Features)."""
    name = check_name("name", sent.name, faults)
    if not sent.type:
        faults.add("type", "required", f"is required: one of {', '.join(_TYPES)}")
    is_metered = faults.check("type", _check_type, sent.type) == "metered"
    meter = _new_meter(sent, is_metered, faults)
    columns = {
        "name": name,
        "lookup_key": check_length("lookup_key", sent.lookup_key or _lookup_key(name), faults),
        "meter_id": sent.meter_id or "" if is_metered else "",
        "type": sent.type,
        **_NOTHING_SET,
        **_sent_columns(sent, faults),
    }
    _check_units(columns, faults)
    return columns, meter


def _changed_columns(sent: FeatureUpdateIn, faults: Faults) -> Columns:
    """Check the changes of a feature and return their columns (API: Features)."""
    if sent.filters:
        problem = "must be empty: a meter cannot be changed, make a new meter and a feature for it"
        faults.add("filters", "invalid_format", problem)
    name = {} if sent.name is None else {"name": check_name("name", sent.name, faults)}
    return name | _sent_columns(sent, faults)


# ---------------------------------------------------------------------------------------------- Rows

_NAMES = ("id", "name", "lookup_key", "description", "meter_id", "metadata", "type", "unit_singular", "unit_plural",
          "reporting_unit", "created_at_us", "updated_at_us", "archived_at_us")  # fmt: skip
_COLUMNS = ", ".join([*(f"features.{name}" for name in _NAMES), METER_COLUMNS])
_TABLES = """features LEFT JOIN meters
    ON meters.environment = features.environment AND meters.id = features.meter_id"""
_IN_ENVIRONMENT = f"features.{IN_ENVIRONMENT}"
_REPORTING_UNIT = msgspec.json.Decoder(ReportingUnit | None)
_METADATA = msgspec.json.Decoder(dict[str, str])
# A condition on a row of meters: a published feature uses the meter.
_METER_IS_USED = f"""EXISTS (SELECT 1 FROM features WHERE {_IN_ENVIRONMENT} AND features.meter_id = meters.id
    AND features.archived_at_us IS NULL)"""


def _stored_feature(row: Sequence[Any], environment: str) -> Feature:
    """Make a feature from a row of _COLUMNS."""
    values = dict(zip(_NAMES, row, strict=False))
    meter_row = row[len(_NAMES) :]
    return Feature(
        created_at=time_text(values.pop("created_at_us")),
        updated_at=time_text(values.pop("updated_at_us")),
        metadata=_METADATA.decode(values.pop("metadata")),
        reporting_unit=_REPORTING_UNIT.decode(values.pop("reporting_unit")),
        status="published" if values.pop("archived_at_us") is None else "archived",
        environment_id=environment,
        meter=None if meter_row[0] is None else stored_meter(meter_row).meter,
        **values,
    )


def _select_features(conn: sqlite3.Connection, environment: str, where: Sql) -> list[Feature]:
    rows = conn.execute(f"SELECT {_COLUMNS} FROM {_TABLES} WHERE {where}", where.values).fetchall()
    return [_stored_feature(row, environment) for row in rows]


def require_feature(conn: sqlite3.Connection, environment: str, feature_id: str) -> Feature:
    """Return a feature. Raises ApiError not_found if the id is unknown."""
    where = sql(f"{_IN_ENVIRONMENT} AND features.id = :id", environment=environment, id=feature_id)
    found = _select_features(conn, environment, where)
    if not found:
        raise ApiError("not_found", f"no feature with the id {quoted(feature_id)} in this environment")
    return found[0]


def _require_published_meter(conn: sqlite3.Connection, environment: str, meter_id: str) -> None:
    """Raise ApiError not_found if the id is unknown, validation_error if the meter is archived."""
    if require_meter(conn, environment, meter_id).archived_at_us is not None:
        faults = Faults(index=0)
        problem = f"names a meter that is archived, got {quoted(meter_id)}: make a new one"
        faults.add("meter_id", "invalid_format", problem)
        faults.raise_any()


def _add_feature(conn: sqlite3.Connection, view: View, columns: Columns, meter: Columns | None) -> Feature:
    """Store a feature, and its meter if it is new.

    Raises ApiError if the existing meter is unknown or archived, or if another feature has the lookup_key.
    """
    if meter is not None:
        columns = columns | {"meter_id": add_meter(conn, view, meter).id}
    elif columns["meter_id"]:
        _require_published_meter(conn, view.environment, columns["meter_id"])
    try:
        insert_row(conn, "features", view, columns)
    except sqlite3.IntegrityError as error:
        if error.sqlite_errorcode != sqlite3.SQLITE_CONSTRAINT_UNIQUE:
            raise
        taken = f"a feature with the lookup_key {quoted(columns['lookup_key'])} exists"
        message = f"{taken}: choose another lookup_key, or delete that feature; nothing was stored"
        raise ApiError("already_exists", message) from None
    return require_feature(conn, view.environment, columns["id"])


def _change_feature(conn: sqlite3.Connection, view: View, feature_id: str, columns: Columns) -> Feature:
    """Store the changes of a feature. Raises ApiError if the id is unknown, or if only one unit would be set."""
    before = require_feature(conn, view.environment, feature_id)
    faults = Faults(index=0)
    _check_units({name: getattr(before, name) for name in _UNITS} | columns, faults)
    faults.raise_any()
    update_row(conn, "features", view, feature_id, columns)
    return require_feature(conn, view.environment, feature_id)


# ---------------------------------------------------------------------------------------------- Meters by name


class NamedMeter(NamedTuple):
    """A meter and the feature that names it."""

    meter: Meter
    archived_at_us: int | None
    feature: Feature | None

    @property
    def name(self) -> str:
        return self.feature.name if self.feature else self.meter.name

    @property
    def aggregation(self) -> Aggregation:
        return self.meter.aggregation


def named_meters(conn: sqlite3.Connection, environment: str, feature_ids: Collection[str]) -> list[NamedMeter]:
    """Return the meters of these features; without ids, return all meters.

    If several features use a meter, one of `feature_ids` names it, otherwise a published one, otherwise the oldest.
    """
    order = "features.archived_at_us IS NOT NULL, features.created_at_us, features.id"
    features = _select_features(conn, environment, sql(f"{_IN_ENVIRONMENT} ORDER BY {order}", environment=environment))
    feature_of: dict[str, Feature] = {}
    for feature in sorted(features, key=lambda feature: feature.id not in feature_ids):
        feature_of.setdefault(feature.meter_id, feature)
    named = [NamedMeter(*stored, feature_of.get(stored.meter.id)) for stored in all_meters(conn, environment)]
    return [each for each in named if not feature_ids or (each.feature and each.feature.id in feature_ids)]


# ---------------------------------------------------------------------------------------------- Routes


class SortIn(Struct, forbid_unknown_fields=True):
    field: str | None = None
    direction: str | None = None


class FeatureSearchIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/features/search; GET /v1/features has the same parameters (API: Search)."""

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
    expand: str | None = None  # without effect: the answer always has the meter
    filters: list[Any] | None = None


class FeaturePage(Struct):
    """One page of features (API: Search)."""

    items: list[Feature]
    pagination: Pagination


_SEARCH = msgspec.json.Decoder(FeatureSearchIn)


async def create_feature(service: Service, request: Request) -> Response:
    """POST /v1/features: a name and units for a meter, which may be new (API: Features)."""
    faults = service.faults(request, index=0)
    columns, meter = _feature_columns(await read_fields(service, request, _FEATURE, faults), faults)
    faults.raise_any()
    view = service.view(request)
    columns["id"] = service.make_id(view.now_us, "feat_")
    if meter is not None:
        meter["id"] = service.make_id(view.now_us, "meter_")
    add = partial(_add_feature, view=view, columns=columns, meter=meter)
    return JsonResponse(await service.store.write(add), 201)


async def show_feature(service: Service, request: Request) -> Response:
    """GET /v1/features/{id} (API: Features)."""
    require = partial(require_feature, environment=request["environment"], feature_id=request.path_params["id"])
    return JsonResponse(await service.store.read(require))


async def update_feature(service: Service, request: Request) -> Response:
    """PUT /v1/features/{id}: change a feature's name, description, units or metadata (API: Features)."""
    faults = service.faults(request, index=0)
    columns = _changed_columns(await read_fields(service, request, _FEATURE_UPDATE, faults), faults)
    faults.raise_any()
    view = service.view(request)
    change = partial(_change_feature, view=view, feature_id=request.path_params["id"], columns=columns)
    return JsonResponse(await service.store.write(change))


async def delete_feature(service: Service, request: Request) -> Response:
    """DELETE /v1/features/{id}: archive a feature, and its meter unless another feature uses it (API: Features)."""
    view, feature_id = service.view(request), request.path_params["id"]

    def archive(conn: sqlite3.Connection) -> None:
        feature = require_feature(conn, view.environment, feature_id)
        archive_row(conn, "features", view, feature_id)
        archive_row(conn, "meters", view, feature.meter_id, unless=_METER_IS_USED)

    await service.store.write(archive)
    return JsonResponse(Done("feature deleted successfully"))


def _check_expand(text: str) -> str:
    """Check that the text names only `meters`, perhaps several times, as FlexPrice allows."""
    if {name.strip() for name in text.split(",")} != {"meters"}:
        raise FieldError("invalid_format", f"must be meters, got {quoted(text)}")
    return text


def _checked_sorts(sent: Sequence[SortIn], faults: Faults) -> list[Sort]:
    sorts = []
    for number, sort in enumerate(sent):
        with faults.within(f"sort[{number}]"):
            for name in SortIn.__struct_fields__:
                if not getattr(sort, name):
                    faults.add(name, "required", "is required: a sort has a field and a direction")
            field = faults.check("field", check_sort("features"), sort.field)
            sorts.append((field, faults.check("direction", check_order, sort.direction)))
    return sorts


def _search_query(sent: FeatureSearchIn, sorts: Sequence[Sort], environment: str, faults: Faults) -> ListQuery:
    """Check a search. Raises ApiError with every fault (API: Search)."""
    query = list_query("features", sent, sorts, environment, faults)
    faults.check("expand", _check_expand, sent.expand)
    if sent.filters:
        advice = "use lookup_keys, name_contains or another field"
        faults.add("filters", "invalid_format", f"must be empty: conditions are not supported; {advice}")
    faults.raise_any()
    options = {
        "feature_ids": ("features.id", sent.feature_ids),
        "meter_ids": ("features.meter_id", sent.meter_ids),
        "lookup_key": ("lookup_key", [sent.lookup_key] if sent.lookup_key else []),
        "lookup_keys": ("lookup_key", sent.lookup_keys),
    }
    clauses = [is_any_of(column, values, name) for name, (column, values) in options.items() if values]
    if sent.name_contains:
        part = sent.name_contains.casefold()
        clauses.append(sql("instr(casefold(features.name), :name_contains)", name_contains=part))
    return query.narrowed(*clauses)


async def _search(
    service: Service, request: Request, sent: FeatureSearchIn, sorts: Sequence[Sort], faults: Faults
) -> Response:
    environment = request["environment"]
    query = _search_query(sent, sorts, environment, faults)

    def select(conn: sqlite3.Connection) -> FeaturePage:
        conn.create_function("casefold", 1, str.casefold, deterministic=True)  # SQLite's lower() knows only ASCII
        rows, pagination = fetch_page(conn, _COLUMNS, _TABLES, query)
        return FeaturePage([_stored_feature(row, environment) for row in rows], pagination)

    return JsonResponse(await service.store.read(select))


async def find_features(service: Service, request: Request) -> Response:
    """GET /v1/features (API: Search)."""
    faults = service.faults(request)
    sent = parse_list(FeatureSearchIn, request, ["feature_ids", "meter_ids", "lookup_keys", "sort"], faults)
    return await _search(service, request, sent, sorts_by("features", sent.sort or [], faults), faults)


async def search_features(service: Service, request: Request) -> Response:
    """POST /v1/features/search (API: Search)."""
    faults = service.faults(request)
    sent = await read_fields(service, request, _SEARCH, faults)
    return await _search(service, request, sent, _checked_sorts(sent.sort or [], faults), faults)


# ---------------------------------------------------------------------------------------------- OpenAPI

_UNIT_SCHEMAS = {name: {"type": ["string", "null"], "maxLength": _MAX_UNIT_CHARS} for name in _UNITS}
_REPORTING_SCHEMAS = {"ReportingUnitIn": {**dict.fromkeys(_UNITS, NAME_SCHEMA), "conversion_rate": POSITIVE_SCHEMA}}
_FEATURE_SCHEMAS = METER_SCHEMAS | _REPORTING_SCHEMAS | {
    "FeatureType": enum_schema(_TYPES),
    "FeatureIn": {"name": NAME_SCHEMA, "type": ref("FeatureType"), **_UNIT_SCHEMAS,
                  "lookup_key": {"type": ["string", "null"], "maxLength": MAX_NAME_CHARS}},
}  # fmt: skip
_UPDATE_SCHEMAS = _REPORTING_SCHEMAS | {
    "FeatureUpdateIn": {"name": NAME_SCHEMA | {"type": ["string", "null"]}, **_UNIT_SCHEMAS,
                        "filters": EMPTY_ARRAY},
}  # fmt: skip
_EXPAND_SCHEMA = {"type": "string", "pattern": r"^\s*meters\s*(,\s*meters\s*)*$"}
_SEARCH_SCHEMAS = LIST_ENUMS | {
    "FeatureSort": enum_schema(SORTS["features"]),
    "FeatureSearchIn": LIST_SCHEMA | {"filters": EMPTY_ARRAY,
                                      "expand": optional(_EXPAND_SCHEMA)},
    "SortIn": {"field": ref("FeatureSort"), "direction": ref("Order")},
}  # fmt: skip
_TEXT_PARAMETERS = ("feature_ids", "lookup_key", "lookup_keys", "name_contains")
_SORT = f"({'|'.join(SORTS['features'])})"
_SORT_PARAMETER = f"^{_SORT}(,{_SORT})*$"
_SEARCH_PARAMETERS = LIST_PARAMETERS | {
    **{name: {"type": "string"} for name in _TEXT_PARAMETERS},
    "sort": {"type": "string", "pattern": _SORT_PARAMETER}, "expand": _EXPAND_SCHEMA,
}  # fmt: skip

OPERATIONS = (
    Operation("POST", "/v1/features", create_feature, Feature, FeatureIn, status=201, refusals=[404, 409],
              example={"name": "Tokens", "type": "metered", "meter": METER_EXAMPLE}, schemas=_FEATURE_SCHEMAS),
    Operation("GET", "/v1/features", find_features, FeaturePage, None, _SEARCH_PARAMETERS, schemas=LIST_ENUMS),
    Operation("POST", "/v1/features/search", search_features, FeaturePage, FeatureSearchIn, role="event_reader",
              schemas=_SEARCH_SCHEMAS,
              example={"lookup_keys": ["tokens"]}),
    Operation("GET", "/v1/features/{id}", show_feature, Feature, refusals=[404]),
    Operation("PUT", "/v1/features/{id}", update_feature, Feature, FeatureUpdateIn, refusals=[404],
              example={"description": "Tokens of all models"}, schemas=_UPDATE_SCHEMAS),
    Operation("DELETE", "/v1/features/{id}", delete_feature, Done, refusals=[404]),
)  # fmt: skip
