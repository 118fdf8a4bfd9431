"""GET /openapi.json: this API as OpenAPI 3.1, made from the route table and the wire types on the first request."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Container, Iterable, Mapping, Sequence
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
    MAX_FILTER_VALUES,
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
    Health,
    JsonResponse,
    Operation,
    Service,
    __version__,
)

__all__ = [
    "ANSWERED_TIME",
    "EMPTY_ARRAY",
    "FILTERS_SCHEMA",
    "NOTHING",
    "NULL",
    "OPERATIONS",
    "ORDER_SCHEMA",
    "PARAMETER_SCHEMAS",
    "POSITIVE_SCHEMA",
    "TEXT_SCHEMA",
    "TIME_SCHEMA",
    "any_case",
    "choice",
    "enum_schema",
    "openapi_document",
    "optional",
    "ref",
]

NULL = {"type": "null"}  # the same as an absent field
NOTHING = {"type": ["string", "null"], "maxLength": 0}  # null or ""; FlexPrice refuses "" in some fields
EMPTY_ARRAY = {"type": ["array", "null"], "items": {}, "maxItems": 0}  # generators of clients need `items`


def ref(kind: Any) -> dict[str, Any]:
    """Return the reference to the schema of a wire type, or to the schema with this name."""
    name = kind.__name__ if isinstance(kind, type) else kind if isinstance(kind, str) else ""
    return {"$ref": f"#/components/schemas/{name}"} if name else {"type": "object"}


def optional(schema: Mapping[str, Any], nothing: Mapping[str, Any] = NOTHING) -> dict[str, Any]:
    """Make the schema of a field that may be null, and perhaps empty."""
    return {"anyOf": [schema, nothing]}


def choice(name: str) -> dict[str, Any]:
    """Make the schema of an optional field with the values of a named enumeration."""
    return optional(ref(name))


def enum_schema(values: Iterable[str]) -> dict[str, Any]:
    return {"type": "string", "enum": [*values]}


def any_case(words: Iterable[str]) -> dict[str, Any]:
    """Make a schema for these words in any case; a pattern in JSON Schema cannot ignore case."""
    letters = [
        "".join(f"[{each.upper()}{each.lower()}]" if each.isalpha() else each for each in word) for word in words
    ]
    return {"type": "string", "pattern": f"^({'|'.join(letters)})$"}


_TIME = {"type": "string", "format": "date-time", "pattern": f"^{RFC_3339.pattern}$"}
_CURSOR = {"type": "string", "pattern": r"^-?[0-9]{1,21}::[\s\S]+$"}
_OFFSET = {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET}
TIME_SCHEMA = optional(_TIME, NULL)
ORDER_SCHEMA = optional(ref("Order"), NULL)
ANSWERED_TIME = {"type": "string", "format": "date-time"}
_TIME_FIELDS = {"timestamp", "ingested_at", "created_at", "updated_at"}  # in answers
TEXT_SCHEMA = {"type": "string", "pattern": r"[^\s\x1c-\x1f\x85]"}  # not only white space
POSITIVE_SCHEMA: dict[str, Any] = {
    "anyOf": [
        {"type": "string",
         "pattern": r"^\+?([0-9]*[1-9][0-9]*(\.[0-9]*)?|[0-9]*\.[0-9]*[1-9][0-9]*)([eE][+-]?[0-9]+)?$"},
        {"type": "number", "exclusiveMinimum": 0, "maximum": sys.float_info.max},
    ]}  # fmt: skip
FILTERS_SCHEMA = optional(ref("Filters"), NULL)
_FILTERS = {
    "type": "object", "maxProperties": MAX_FILTER_KEYS, "propertyNames": {"minLength": 1},
    "additionalProperties": {"type": ["array", "null"], "items": {"type": "string"}, "maxItems": MAX_FILTER_VALUES},
    "description": f"Values by property; at most {MAX_FILTER_VALUES} values in all.",
}  # fmt: skip

# Schemas of fields, where the wire types do not imply them, and whole schemas. Operation.schemas adds more.
_FIELD_SCHEMAS: dict[str, dict[str, Any]] = {
    # Names for generated code, in which a name must not start with a digit: MIN_15.
    "WindowSize": enum_schema(WINDOW_SIZES)
    | {"x-enum-varnames": [re.sub(r"(\d+)(\w+)", r"\2_\1", size) for size in WINDOW_SIZES]},
    "Order": enum_schema(ORDERS), "EventSort": enum_schema(SORTS),
    "Filters": _FILTERS,
    "EventIn": {
        "event_name": TEXT_SCHEMA | {"maxLength": MAX_FIELD_CHARS},
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
        "offset": _OFFSET | {"type": ["integer", "null"]},
        "sort": optional(ref("EventSort"), NULL), "order": ORDER_SCHEMA,
        **dict.fromkeys(("iter_first_key", "iter_last_key"), optional(_CURSOR)),
    },
    "EventPage": {"events": {"type": "array", "items": ref("Event")}},
    "EventLookup": {"event": ref("Event"), "events": {"type": "array", "items": ref("Event")},
                    "processed_events": EMPTY_ARRAY},
}  # fmt: skip

# Every parameter but `id` may be empty: see allowEmptyValue below.
PARAMETER_SCHEMAS: dict[str, Any] = {
    **dict.fromkeys(("start_time", "end_time"), _TIME),
    "property_filters": {"type": "string", "pattern": "^[^:;]+:[^;]*(;[^:;]+:[^;]*)*$"},
    "page_size": {"type": "integer"}, "offset": _OFFSET,
    "sort": ref("EventSort"), "order": ref("Order"),
    "window_size": ref("WindowSize"),
    "count_total": any_case(["true", "false", "t", "f", "1", "0"]),
    **dict.fromkeys(("iter_first_key", "iter_last_key"), _CURSOR),
    "id": {"type": "string", "minLength": 1},
}  # fmt: skip

_HEADERS = {
    "X-Request-ID": "The id of the request: the one that was sent, or one that the server made.",
    "X-Ignored": "Names of fields and parameters that the server ignored, separated by commas.",
    "Retry-After": "The number of seconds after which the request may succeed.",
}


def _complete_row(operation: Operation) -> Operation:
    """Return the complete row of an operation of eventstore_extras."""
    if not operation.extra:
        return operation
    extra = importlib.import_module(f"eventstore_extras.{operation.extra}")
    (row,) = (row for row in extra.OPERATIONS if row.path == operation.path)
    return cast(Operation, row)


def _takes_null(schema: dict[str, Any]) -> bool:
    choices = schema.get("anyOf", ())
    return None in schema.get("enum", ()) or "null" in schema.get("type", "") or any(map(_takes_null, choices))


def _schemas(operations: Sequence[Operation]) -> dict[str, Any]:
    bodies = [operation.body for operation in operations if operation.body not in (None, BulkIn)]
    answers = [operation.answer for operation in operations if isinstance(operation.answer, type)]
    types = dict.fromkeys([*bodies, ErrorBody, Event, *answers])
    schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")[1]
    for name, schema in schemas.items():
        schema.pop("additionalProperties", None)  # unknown fields are ignored
        for field in () if name.endswith("In") else _TIME_FIELDS & schema.get("properties", {}).keys():
            schema["properties"][field] = ANSWERED_TIME
    for more in (_FIELD_SCHEMAS, *(operation.schemas for operation in operations)):
        for name in more:
            if isinstance(more[name].get("type"), str):  # a whole schema; in the others, `type` may be a field
                schemas[name] = more[name]
                continue
            schemas[name]["properties"] |= more[name]
            needed = [field for field, schema in more[name].items() if not _takes_null(schema)]
            schemas[name]["required"] = [*dict.fromkeys([*schemas[name].get("required", ()), *needed])]
    # Describe a batch as an array: the type that decodes it is a struct of 1000 fields.
    items = {"type": "array", "minItems": 1, "maxItems": MAX_BATCH, "items": ref(EventIn)}
    schemas["BulkIn"] = {"type": "object", "required": ["events"], "properties": {"events": items}}
    return schemas


def _operation_id(operation: Operation, taken: Container[str]) -> str:
    """Return the handler's name, which generated clients use for their methods; a suffix makes it unique."""
    name = operation.handler.__name__.removesuffix("_by_parameters")
    return name if name not in taken else f"{name}_by_{'id' if '{id' in operation.path else operation.method.lower()}"


def _refusals(operation: Operation) -> list[int]:
    """Return the error statuses of an operation. A rate limit, 429, can be set for any POST."""
    of_all = {404, 405, 408, 414, 431, 500, 503}
    of_keys = set() if operation.is_public else {400, 401, 403}
    of_limits = {429} if operation.method == "POST" and not operation.is_public else set()
    return sorted((of_all | of_keys | of_limits | {*operation.refusals}) - {operation.status})


def _response(description: str, answer: Any, *headers: str) -> dict[str, Any]:
    named = {name: {"$ref": f"#/components/headers/{name}"} for name in ("X-Request-ID", "X-Ignored", *headers)}
    return {"description": description, "content": {"application/json": {"schema": ref(answer)}}, "headers": named}


def _responses(operation: Operation) -> dict[str, Any]:
    responses = {str(operation.status): _response("Done", operation.answer)}
    for status in _refusals(operation):
        codes = ", ".join(code for code, number in STATUS_OF_CODE.items() if number == status)
        retry_after = ["Retry-After"] if status in (429, 503) else []
        responses[str(status)] = _response(codes, ErrorBody, *retry_after)
    if operation.status == 202:
        counts = {f"X-Events-{name}": {"schema": {"type": "integer"}} for name in ("Inserted", "Duplicate")}
        responses["202"]["headers"] |= counts
    if operation.answer is Health:  # a 503 has the same body
        responses["503"] = _response("Events cannot be stored", Health)
    return responses


def _describe_parameters(operation: Operation) -> list[dict[str, Any]]:
    known = operation.parameters if isinstance(operation.parameters, Mapping) else PARAMETER_SCHEMAS
    parameters = [
        {"name": name, "in": "query", "schema": known.get(name, {"type": "string"})}
        | ({"required": True} if name == "id" else {"allowEmptyValue": True})
        for name in operation.parameters
    ]
    if "{id" in operation.path:
        parameters.insert(0, {"name": "id", "in": "path", "required": True, "schema": PARAMETER_SCHEMAS["id"]})
    return parameters


def _describe(operation: Operation, taken: Container[str]) -> dict[str, Any]:
    part = operation.path.removeprefix("/v1").split("/")[1]
    described = {
        "operationId": _operation_id(operation, taken),
        "tags": [part if operation.path.startswith("/v1/") else "server"],
        "summary": (operation.handler.__doc__ or operation.public_path).splitlines()[0],
        "security": [] if operation.is_public else [{"ApiKey": []}],
        "parameters": _describe_parameters(operation),
        "responses": _responses(operation),
    }
    if operation.body:
        body = {"schema": ref(operation.body)} | ({"example": operation.example} if operation.example else {})
        described["requestBody"] = {"required": True, "content": {"application/json": body}}
    return described


def openapi_document(rows: Sequence[Operation]) -> dict[str, Any]:
    """Describe the operations as OpenAPI 3.1."""
    operations = [_complete_row(row) for row in rows]
    paths: dict[str, Any] = {}
    names: set[str] = set()
    for operation in operations:
        described = paths.setdefault(operation.public_path, {})[operation.method.lower()] = _describe(operation, names)
        names.add(described["operationId"])
    about = (
        'FlexPrice\'s Events API on SQLite. "API: Usage" names a section of the documentation: see docs/api.md. '
        "OPTIONS on any path answers a browser's preflight request, without a key."
    )
    key = {"type": "apiKey", "in": "header", "name": "x-api-key", "description": "Bound to one environment."}
    headers = {name: {"description": text, "schema": {"type": "string"}} for name, text in _HEADERS.items()}
    schemas = _schemas(operations)
    return {
        "openapi": "3.1.0",
        "info": {"title": "eventstore", "version": __version__, "description": about},
        "servers": [{"url": "/"}],
        "paths": paths,
        "components": {"schemas": schemas, "headers": headers, "securitySchemes": {"ApiKey": key}},
    }  # fmt: skip


_documents: WeakKeyDictionary[Service, bytes] = WeakKeyDictionary()


async def describe_api(service: Service, request: Request) -> Response:
    """GET /openapi.json: this API as OpenAPI 3.1."""
    if service not in _documents:
        _documents[service] = ENCODER.encode(openapi_document(service.operations))
    return JsonResponse(_documents[service])


OPERATIONS = (Operation("GET", "/openapi.json", describe_api, dict[str, Any]),)
