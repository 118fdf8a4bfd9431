"""GET /openapi.json: this API as OpenAPI 3.1, made from the route table and the wire types on the first request."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, cast
from weakref import WeakKeyDictionary

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from eventstore import (
    ENCODER,
    MAX_BATCH,
    MAX_FIELD_CHARS,
    MAX_FILTER_KEYS,
    MAX_OFFSET,
    MAX_PAGE_SIZE,
    ORDERS,
    RFC_3339,
    SORTS,
    STATUS_OF_CODE,
    WINDOW_SIZES,
    BulkIn,
    ErrorBody,
    Event,
    EventIn,
    JsonResponse,
    Operation,
    Service,
    __version__,
)

__all__ = ["FILTERS_SCHEMA", "OPERATIONS", "PARAMETER_SCHEMAS", "TIME_SCHEMA", "choice", "openapi_document", "ref"]

TIME_SCHEMA: dict[str, Any] = {
    "anyOf": [{"type": "string", "format": "date-time", "pattern": f"^{RFC_3339.pattern}$"}, {"type": "null"}]
}
FILTERS_SCHEMA: dict[str, Any] = {
    "type": ["object", "null"], "maxProperties": MAX_FILTER_KEYS, "propertyNames": {"minLength": 1},
    "additionalProperties": {"type": ["array", "null"], "items": {"type": "string"}, "maxItems": 20},
}  # fmt: skip
_CURSOR: dict[str, Any] = {"anyOf": [{"type": "string", "pattern": "^-?[0-9]{1,19}::.+"}, {"enum": ["", None]}]}


def choice(*values: str) -> dict[str, Any]:
    """Make the schema of an optional field with these values; the empty text is absent as well."""
    return {"enum": [*values, "", None]}


# Schemas of fields, where the wire types do not imply them. Operation.schemas adds more.
_FIELD_SCHEMAS: dict[str, dict[str, Any]] = {
    "EventIn": {
        "event_name": {"type": "string", "pattern": r"[^\s\x1c-\x1f\x85]", "maxLength": MAX_FIELD_CHARS},
        "external_customer_id": {"type": "string", "minLength": 1, "maxLength": MAX_FIELD_CHARS},
        "event_id": {"type": ["string", "null"], "maxLength": MAX_FIELD_CHARS,
                     "description": "The idempotency key; made by the server if absent."},
        **{name: {"type": ["string", "null"], "maxLength": MAX_FIELD_CHARS} for name in ("customer_id", "source")},
        "timestamp": TIME_SCHEMA, "properties": {"type": ["object", "null"]},
    },
    "EventQueryIn": {
        **dict.fromkeys(("start_time", "end_time"), TIME_SCHEMA),
        "property_filters": FILTERS_SCHEMA,
        "page_size": {"type": ["integer", "null"], "maximum": MAX_PAGE_SIZE},
        "offset": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_OFFSET},
        "sort": {"enum": [*SORTS, None]}, "order": {"enum": [*ORDERS, None]},
        **dict.fromkeys(("iter_first_key", "iter_last_key"), _CURSOR),
    },
    "EventPage": {"events": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}}},
    "EventLookup": {"event": {"$ref": "#/components/schemas/Event"},
                    "events": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}}},
}  # fmt: skip

PARAMETER_SCHEMAS: dict[str, Any] = {
    **{name: {"anyOf": [TIME_SCHEMA["anyOf"][0], {"enum": [""]}]} for name in ("start_time", "end_time")},
    "property_filters": {"type": "string", "pattern": "^([^:;]+:[^;]*(;[^:;]+:[^;]*)*)?$", "maxLength": 200},
    "page_size": {"type": "integer"}, "offset": {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET},
    "sort": {"enum": [*SORTS, ""]}, "order": {"enum": [*ORDERS, ""]}, "window_size": {"enum": [*WINDOW_SIZES, ""]},
    "count_total": {"type": "string", "pattern": "^([Tt]([Rr][Uu][Ee])?|[Ff]([Aa][Ll][Ss][Ee])?|[01])?$"},
    **{key: {"type": "string", "pattern": "^(-?[0-9]{1,19}::.+)?$"} for key in ("iter_first_key", "iter_last_key")},
    "id": {"type": "string", "minLength": 1},
}  # fmt: skip


def openapi_document(rows: Sequence[Operation]) -> dict[str, Any]:
    """Describe the operations as OpenAPI 3.1."""
    operations = [_whole(row) for row in rows]
    paths: dict[str, Any] = {}
    for operation in operations:
        paths.setdefault(operation.public_path, {})[operation.method.lower()] = _describe(operation)
    about = '"API: Usage" names the section of that name in the project\'s docs/api.md.'
    key = {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "Bound to one environment."}
    return {
        "openapi": "3.1.0",
        "info": {"title": "eventstore: FlexPrice's Events API on SQLite", "version": __version__, "description": about},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": _schemas(operations), "securitySchemes": {"ApiKey": key}},
    }


def _whole(operation: Operation) -> Operation:
    """Return the complete row of an operation of eventstore_extras."""
    if not operation.extra:
        return operation
    extra = importlib.import_module(f"eventstore_extras.{operation.extra}")
    (row,) = (row for row in extra.OPERATIONS if row.path == operation.path)
    return cast(Operation, row)


def _schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    bodies = [operation.body for operation in operations if operation.body not in (None, BulkIn)]
    answers = [operation.answer for operation in operations if isinstance(operation.answer, type)]
    types = dict.fromkeys([*bodies, ErrorBody, Event, *answers])
    schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")[1]
    for more in (_FIELD_SCHEMAS, *(operation.schemas for operation in operations)):
        for name in more:
            schemas[name]["properties"] |= more[name]
            needed = [field for field, schema in more[name].items() if not _takes_null(schema)]
            schemas[name]["required"] = [*dict.fromkeys([*schemas[name].get("required", ()), *needed])]
    for schema in schemas.values():
        schema.pop("additionalProperties", None)  # unknown fields are ignored
    # Only the decoder sees a batch as a struct of 1000 fields.
    items = {"type": "array", "minItems": 1, "maxItems": MAX_BATCH, "items": ref(EventIn)}
    schemas["BulkIn"] = {"type": "object", "required": ["events"], "properties": {"events": items}}
    return schemas


def _takes_null(schema: dict[str, Any]) -> bool:
    choices = schema.get("anyOf", ())
    return None in schema.get("enum", ()) or "null" in schema.get("type", "") or any(map(_takes_null, choices))


def ref(kind: Any) -> dict[str, Any]:
    """Return the reference to a wire type's schema."""
    return {"$ref": f"#/components/schemas/{kind.__name__}"} if isinstance(kind, type) else {"type": "object"}


def _describe(operation: Operation) -> dict[str, Any]:
    accepted = str(operation.status)
    content = {"application/json": {"schema": ref(operation.answer)}}
    responses: dict[str, Any] = {accepted: {"description": "Done", "content": content}}
    for status in sorted(() if operation.is_public else (400, 401, 500, 503, *operation.refusals)):
        codes = ", ".join(code for code, number in STATUS_OF_CODE.items() if number == status)
        responses[str(status)] = {"description": codes, "content": {"application/json": {"schema": ref(ErrorBody)}}}
    if accepted == "202":
        counts = {f"X-Events-{name}": {"schema": {"type": "integer"}} for name in ("Inserted", "Duplicate")}
        responses[accepted]["headers"] = counts
    described = {
        "operationId": f"{operation.handler.__name__}_{operation.method.lower()}_{len(operation.path)}",
        "summary": (operation.handler.__doc__ or operation.public_path).splitlines()[0],
        "security": [] if operation.is_public else [{"ApiKey": []}],
        "parameters": _describe_parameters(operation),
        "responses": responses,
    }
    if operation.body:
        body = {"schema": ref(operation.body)} | ({"example": operation.example} if operation.example else {})
        described["requestBody"] = {"required": True, "content": {"application/json": body}}
    return described


def _describe_parameters(operation: Operation) -> list[dict[str, Any]]:
    known = operation.parameters if isinstance(operation.parameters, Mapping) else PARAMETER_SCHEMAS
    parameters = [
        {"name": name, "in": "query", "required": name == "id", "schema": known.get(name, {"type": "string"})}
        for name in operation.parameters
    ]
    if "{id" in operation.path:
        parameters.insert(0, {"name": "id", "in": "path", "required": True, "schema": PARAMETER_SCHEMAS["id"]})
    return parameters


_documents: WeakKeyDictionary[Service, bytes] = WeakKeyDictionary()


async def describe_api(service: Service, request: Request) -> Response:
    """GET /openapi.json: this API as OpenAPI 3.1."""
    if service not in _documents:
        _documents[service] = ENCODER.encode(openapi_document(service.operations))
    return JsonResponse(_documents[service])


OPERATIONS = (Operation("GET", "/openapi.json", describe_api, dict[str, Any]),)
