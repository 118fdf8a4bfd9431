"""eventstore: FlexPrice's usage-events API in one Python file on SQLite.

It accepts usage events through FlexPrice's HTTP API, singly or in batches of up to 1000, stores them in one SQLite file
and returns them with filters and cursors. It does not bill: customers, prices, plans and invoices stay with FlexPrice.
It runs as one process on one machine.

    python eventstore.py serve               # http://127.0.0.1:8080/v1
    app = eventstore.create_app(settings)    # the same as an ASGI application

Copied alone with schema.sql and debugger.html, this file serves ingest, queries, lookup, monitoring, health and the
debugger page. It then lacks usage, meters, analytics, the OpenAPI document, rate limits, all other commands, limits on
a connection's sizes and times, API keys with roles, labels or hashes, and upgrades of older files. These are in the
folder eventstore_extras; a module there is imported when a command, a flag or a request needs it.

A map of this file. Each part uses only the parts above it:

    Shared      Settings                  everything that can be configured
                Errors                    ApiError, and Faults, which collects what is wrong with a request
                JSON                      parses a body's bytes into a struct, with a fault for each wrong field
                Time, ids, cursors        parses times and cursors, makes ids
                Events in SQL             Row, Sql, and the filters that queries share
                Store: connections        pragmas, the file's checks, the tables
                Store: inserting          the statements that store events
                Store: threads            Writer, ReaderPool, and Store, which joins them
                HTTP                      Operation, Service, authentication, bodies, parameters, routes, error answers
    Features    Ingest                    POST /v1/events, POST /v1/events/bulk
                Queries                   GET /v1/events, POST /v1/events/query
                Lookup                    GET /v1/events/lookup, GET /v1/events/{id}
                Monitoring                GET /v1/events/monitoring
                Health, page              /health, and the event debugger at /
    Serving     Application               the route table and create_app
                Listening                 the socket, and uvicorn's protocol with this server's limits
                API keys                  from a flag or the environment
                Command line              serve; the other commands are in eventstore_extras

Each feature keeps its wire types, its checks, its SQL and its handler together. To get to know the file, follow one
event from `ingest_event` to `Writer`, then one query from `list_events_by_parameters` to `list_events`. "API: Queries"
in a docstring means the section "Queries" of the documentation, to which docs/api.md links.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import difflib
import errno
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import random
import re
import secrets
import shutil
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import urllib.parse
import weakref
from collections import Counter, defaultdict, deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from contextvars import ContextVar
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from functools import lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args

import msgspec
import uvicorn
from msgspec import UNSET, Raw, Struct, UnsetType
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Match, compile_path
from starlette.types import ASGIApp, Receive, Scope, Send

# The names that other modules may use, by section; all other names begin with an underscore.
__all__ = [  # noqa: RUF022 - in the order of the file
    # General
    "T", "__version__", "log",
    # Settings
    "ROLES", "ApiKey", "Settings", "monotonic_s", "now_us",
    # Errors
    "MAX_ECHO_CHARS", "STATUS_OF_CODE", "ApiError", "ErrorBody", "ErrorDetails", "ErrorMessage", "Fault", "Faults",
    "FieldError", "StartError", "excerpt", "plural", "printable", "quoted", "raise_fault",
    # JSON
    "ENCODER", "MEMBERS", "PropertyFilters", "decode", "decode_fields", "decoder_of",
    # Time, ids, cursors
    "DAY_US", "EARLIEST", "LATEST", "MAX_TIME_US", "MINUTE_US", "MIN_TIME_US", "RFC_3339", "Cursor", "IdMaker",
    "given_time", "parse_cursor", "parse_time", "time_range", "to_datetime", "to_us",
    # Events in SQL
    "DECIMAL", "IN_ENVIRONMENT", "TEXT_OF_JSON", "Row", "Selection", "Sql", "View", "all_of", "filter_options",
    "index_of", "is_in", "matching", "property_number", "property_parameters", "property_sql", "property_text", "sql",
    "value_text",
    # Store
    "CALLER", "INSERT_ROWS", "PRAGMAS", "READER_PRAGMAS", "READER_THREADS", "SELECT_NEW_IDS", "WRITER_PRAGMAS",
    "WRITE_LOCK_TIMEOUT_S", "Caller", "Reader", "ReaderPool", "Shares", "Store", "Turn", "Writer",
    "add_functions", "check_format", "check_path", "check_time", "connect", "connect_reader", "environment_number",
    "execute_writing", "insert_events", "insert_group", "insert_statement", "prepare_file", "real_path",
    "start_errors",
    # HTTP
    "CORS_HEADERS", "EXCEPTION_HANDLERS", "MAX_OFFSET", "PARAMETER_PARSERS", "JsonResponse", "Operation", "Outbox",
    "Retention", "Routes", "Service", "error_response", "one_of", "parse_int", "parse_parameters",
    "parse_property_filters", "query_of_parameters", "read_body", "read_fields", "whole_within",
    # Ingest
    "MAX_BATCH", "MAX_FIELD_CHARS", "MAX_PROPERTY_DEPTH", "BulkAccepted", "BulkIn", "EventAccepted", "EventIn",
    "check_properties", "decode_batch", "event_row", "event_rows", "ingest_event", "ingest_events_bulk",
    # Queries, lookup
    "EVENT_FILTERS", "MAX_FILTER_KEYS", "MAX_FILTER_VALUES", "MAX_PAGE_SIZE", "ORDERS", "SORTS", "Event",
    "EventLookup", "EventPage", "EventQuery", "EventQueryIn", "after_cursor", "check_filter_limits", "check_offset",
    "check_order", "check_property_filters", "event_query", "in_range", "list_events", "list_events_by_parameters",
    "look_up_event", "query_events",
    # Monitoring, health
    "A_SUNDAY", "IN_SPAN", "MAX_WINDOWS", "WINDOW_MINUTES", "WINDOW_SIZES", "Forwarding", "Health", "Monitoring",
    "MonitoringPoint", "Span", "check_window_size", "health", "monitor_events", "select_per_span",
    "spans_of_windows", "utc_windows",
    # Serving
    "OPERATIONS", "AddFlag", "FoundKeys", "add_db_flag", "check_key", "check_name", "create_app", "listen",
    "listen_error", "main", "parse_arguments", "positive", "say", "serve", "uvicorn_server",
]  # fmt: skip

__version__ = "0.2.0"

log = logging.getLogger("eventstore")
T = TypeVar("T")
_Number = TypeVar("_Number", int, float)

# ---------------------------------------------------------------------------------------------- Settings


class ApiKey(Struct, frozen=True):
    """The hash of an API key, and the environment that the key belongs to (API: Common rules)."""

    digest: bytes
    environment: str
    label: str = ""  # name of the key in logs
    role: str = ""  # one of ROLES, or empty for a key that may do everything

    @classmethod
    def hashed(cls, key: str, environment: str = "development", label: str = "", role: str = "") -> ApiKey:
        return cls(hashlib.sha256(key.encode()).digest(), environment, label, role)


ROLES = ("event_ingestor", "event_reader")  # may only send events; may only read


def now_us() -> int:
    """Return the wall clock in microseconds since 1970."""
    return time.time_ns() // 1000


def monotonic_s(clock: Callable[[], float] = time.monotonic) -> float:
    """Return seconds for measuring durations. The default is bound at import, so freezegun cannot replace it."""
    return clock()


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that can be configured, with its default. `api_keys` must hold at least one key."""

    api_keys: tuple[ApiKey, ...] = ()
    db: str = "events.db"  # ":memory:" is a temporary file, removed when the store closes
    max_body_bytes: int = 32 * 1024 * 1024
    query_timeout_s: float = 30.0
    queue_events: int = 100_000  # events that may wait for the writer
    wal_bytes: int = 256 * 1024 * 1024  # force a checkpoint beyond this size, even if requests must wait for it
    warn_free_bytes: int | None = None  # warn below this free space; None: 5 % of the disk, at most 1 GB (API: Health)
    queue_bytes: int = 256 * 1024 * 1024  # bodies and unread answers in memory; a request alone may exceed it
    rate_limits: Mapping[str, int] = {}  # path -> POST requests per minute and key (API: Rate limits)
    visibility_lag_ms: int = 0  # hide events from queries for this long after they were accepted
    strict: bool = False  # refuse requests with unknown fields or parameters, or known ones without effect
    clock: Callable[[], int] = now_us  # microseconds since 1970


# ---------------------------------------------------------------------------------------------- Errors

STATUS_OF_CODE = {
    "validation_error": 400, "unauthorized": 401, "permission_denied": 403, "not_found": 404,
    "method_not_allowed": 405, "request_timeout": 408, "already_exists": 409, "too_many_requests": 429,
    "database_error": 500, "internal_error": 500, "service_unavailable": 503, "uri_too_long": 414,
    "headers_too_large": 431,
    "bad_gateway": 502, "gateway_timeout": 504,  # sent only by the mock, which imitates a proxy
}  # fmt: skip

MAX_ECHO_CHARS = 100  # quote at most this much of a caller's value in a message
_MAX_IGNORED = 20  # ignored names that an answer lists
_MAX_FAULTS = 100  # faults that an answer lists
# Fields in which FlexPrice refuses ""; in all other fields "" means the same as an absent field.
_NEVER_EMPTY = {"timestamp", "start_time", "end_time", "sort", "order", "billing_anchor", "multiplier"}


def printable(text: str) -> str:
    """Return a caller's text for a message or the log; characters that do not print become JSON escapes.

    Otherwise line breaks could forge log lines, and marks of direction or zero-width characters could make a terminal
    show another text.
    """
    if text.isprintable():
        return text
    return "".join(each if each.isprintable() else json.dumps(each)[1:-1] for each in text)


def quoted(value: str) -> str:
    """Return a caller's value for a message: quoted, escaped, and cut to 100 characters."""
    return printable(json.dumps(value[:MAX_ECHO_CHARS], ensure_ascii=False))


def excerpt(raw: bytes) -> str:
    """Return the start of a JSON text for a message."""
    return printable(" ".join(bytes(raw)[:1000].decode(errors="ignore").split())[:MAX_ECHO_CHARS])


def plural(number: int, noun: str) -> str:
    """Return "1 event" or "2,000 events"."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def _similar(name: str, known: Iterable[str]) -> str:
    """Return the known name that resembles this one, such as external_customer_id for externalCustomerId, or ""."""
    snake_case = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|[- ]", "_", name.rpartition(".")[2]).lower()
    return "".join(difflib.get_close_matches(snake_case, known, 1, 0.75))


_Why = Iterable[str] | str  # why a name is ignored: words for the message; for an unknown name, the known names


def _why_ignored(name: str, why: _Why) -> str:
    """Return the words that follow an ignored name in a message, such as "is unknown: did you mean source?"."""
    if isinstance(why, str):
        return why
    similar = _similar(name, why)
    return "is unknown: " + (f"did you mean {similar}?" if similar else f"there are {', '.join(why) or 'none here'}")


class Fault(Struct, frozen=True):
    """One thing that is wrong with a request. `index` and `event_id` name the event that has it (API: Errors)."""

    index: int | None
    event_id: str | None
    field: str
    code: str  # required, invalid_type, invalid_format or out_of_range
    message: str


class ErrorDetails(Struct, frozen=True):
    """The faults of a refused request (API: Errors)."""

    rejected: int | UnsetType = UNSET  # number of events with faults
    truncated: bool | UnsetType = UNSET  # true if there are more faults than `errors` lists
    errors: list[Fault] | UnsetType = UNSET


class ErrorMessage(Struct):
    """The error object that older SDKs parse."""

    message: str
    internal_error: str | None


class ErrorBody(Struct):
    """The body of every error; `success` and `error` are what older SDKs parse (API: Common rules)."""

    code: str
    message: str
    http_status_code: int
    details: ErrorDetails
    success: bool
    error: ErrorMessage


class ApiError(Exception):
    """A refused request; the message tells the client why. `code` is a key of STATUS_OF_CODE (API: Common rules)."""

    def __init__(
        self, code: str, message: str, details: ErrorDetails | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.logged = message  # the log's text; _no_route makes it shorter
        self.details = details or ErrorDetails()
        self.retry_after_s = retry_after_s
        self.headers = {} if retry_after_s is None else {"Retry-After": str(retry_after_s)}

    @property
    def status(self) -> int:
        return STATUS_OF_CODE[self.code]

    @property
    def body(self) -> ErrorBody:
        return ErrorBody(
            self.code, self.message, self.status, self.details, False, ErrorMessage(self.message, internal_error=None)
        )


def _internal_error() -> ApiError:
    return ApiError("internal_error", "an internal error; the server's log has its cause")


class FieldError(ValueError):
    """A field does not accept its value. The message lacks a subject: callers put the field's name before it."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code


class StartError(Exception):
    """A command cannot start; the message says what is wrong and what to do."""


class Faults:
    """Collects the faults of one request, so that one answer lists them all, and the names that are ignored."""

    def __init__(
        self,
        index: int | None = None,
        whole: str = "body",
        ignored: dict[str, _Why] | None = None,
        strict: bool = False,
    ) -> None:
        self.index = index  # position in the batch of the event being checked
        self.whole = whole  # what messages call the object that is being checked: "body", "event", or a path
        self.ignored = {} if ignored is None else ignored
        self._strict = strict  # whether ignored names are faults
        self._path = ""  # prefix of field names: the path of the object that is being checked, and a dot
        self._found: dict[tuple[int | None, str], tuple[str, str]] = {}  # (index, field) -> (code, message)
        self._bad: set[int | None] = set()  # the indexes of all events with faults
        self._truncated = False

    def add(self, field: str, code: str, problem: str) -> None:
        """Record a fault. Skip it if the field or the checked object has one: one cause gives one fault."""
        name = field if field == self.whole else self._path + field
        if (self.index, self.whole) in self._found or (self.index, name) in self._found:
            return
        self._bad.add(self.index)
        if len(self._found) < _MAX_FAULTS:
            self._found[self.index, name] = code, f"{name} {problem}"
        else:
            self._truncated = True

    def ignore(self, names: Iterable[str], why: _Why = "has no effect in this request") -> None:
        """Record names that the request sends without effect. `why` completes the message about them."""
        for name in names:
            if len(self.ignored) > _MAX_IGNORED:
                return
            self.ignored.setdefault(self._path + name[:MAX_ECHO_CHARS], why)

    @contextmanager
    def within(self, field: str) -> Iterator[None]:
        """Prefix the faults recorded inside the block with this field's path: `aggregation.type`."""
        outer = self.whole, self._path
        self.whole, self._path = self._path + field, f"{self._path}{field}."
        try:
            yield
        finally:
            self.whole, self._path = outer

    def check(self, field: str, convert: Callable[[Any], T], value: Any) -> T | None:
        """Return convert(value). Return None if the value is absent or empty, or after recording a FieldError."""
        if value is None or (value == "" and field not in _NEVER_EMPTY):
            return None
        try:
            return convert(value)
        except FieldError as error:
            self.add(field, error.code, str(error))
            return None

    def raise_any(self, events: Sequence[Any] = (), bulk: bool = False) -> None:
        """Raise ApiError with the first 100 faults, if any. `events` and `bulk` describe an ingest request."""
        faults = []
        for (index, field), (code, message) in self._found.items():
            event_id = events[index or 0].event_id if events else None
            faults.append(Fault(index, event_id and event_id[:MAX_ECHO_CHARS], field, code, message))
        ignored = self.ignored.items() if self._strict else ()
        unknown = [Fault(None, None, printable(name), "invalid_format", f"{quoted(name)} {_why_ignored(name, why)}")
                   for name, why in ignored]  # fmt: skip
        if not faults and not unknown:
            return
        messages = [fault.message for fault in faults]
        if bulk and faults:
            are = "is" if len(self._bad) == 1 else "are"
            messages = [f"{len(self._bad)} of {len(events)} events {are} invalid; nothing was stored"]
        messages += [fault.message for fault in unknown] or self._hints(faults)
        rejected = len(self._bad) if events and faults else UNSET
        details = ErrorDetails(rejected, self._truncated, [*faults, *unknown][:_MAX_FAULTS])
        raise ApiError("validation_error", "; ".join(messages), details)

    def _hints(self, faults: Iterable[Fault]) -> list[str]:
        """Return a hint for each unknown name that resembles a missing required field, such as eventName."""
        missing = [fault.field for fault in faults if fault.code == "required"]
        hints = []
        for name, why in self.ignored.items():
            meant = "" if isinstance(why, str) else _similar(name, why)
            if name[: name.rfind(".") + 1] + meant in missing:
                hints.append(f"{quoted(name)} is unknown: did you mean {meant}?")
        if "events" in self.ignored and "event_name" in missing:
            hints.append("a batch of events goes to POST /v1/events/bulk")
        return hints


def raise_fault(field: str, code: str, problem: str) -> NoReturn:
    """Reject the request immediately because of one field."""
    faults = Faults()
    faults.add(field, code, problem)
    faults.raise_any()
    raise AssertionError("unreachable")


def _has_extras() -> bool:
    return importlib.util.find_spec("eventstore_extras") is not None


def _no_extras(purpose: str) -> StartError:
    return StartError(f"{purpose} needs the folder eventstore_extras beside {__file__}")


def _extra(name: str, purpose: str) -> ModuleType:
    """Import a module of eventstore_extras. Raises StartError if that folder is missing."""
    if not _has_extras():
        raise _no_extras(purpose)
    return importlib.import_module(f"eventstore_extras.{name}")


# ---------------------------------------------------------------------------------------------- JSON

ENCODER = msgspec.json.Encoder()
MEMBERS = msgspec.json.Decoder(dict[str, Raw])  # an object's members, each as undecoded JSON
decoder_of = lru_cache(msgspec.json.Decoder)
_fields_of = lru_cache(msgspec.structs.fields)  # 100 us without the cache
PropertyFilters = dict[str, list[str] | None]  # property -> accepted values; an empty list accepts all

_TYPE_NAMES = {
    "str | None": "a string", "bool | None": "true or false", "list[str] | None": "an array of strings",
    "int | None": "an integer", "int | float | None": "an integer", "str | float | None": "a decimal number",
    "PropertyFilters | None": "an object of string arrays", "dict[str, str] | None": "an object of strings",
}  # fmt: skip


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T | None:
    """Decode the body; return None if it does not fit the type. Raises ApiError if it is not JSON (API: JSON)."""
    try:
        if not body.isascii():
            body.decode()  # msgspec does not check the UTF-8 of parts that it skips
        return decoder.decode(body)
    except msgspec.ValidationError:
        return None
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except RecursionError:
        reason = "it is nested too deep"
    except msgspec.DecodeError as error:
        reason = str(error)
        if reason == "Input data was truncated":  # also for half a surrogate pair at a string's end
            half = ", or holds half of a \\u surrogate pair" if b"\\u" in body else ""
            reason = f"it ends too early{half}" if body else "it is empty"
    raise ApiError("validation_error", f"the body is not valid JSON: {reason}")


_MAX_ITEMS = 1000  # limit on the length of an array of objects


def _batch_of(item: Any) -> Any:
    """Make a type for an array of at most 1000 items: a struct with 1000 fields. Decoding fails at item 1001.

    `list[item]` would first build eleven million structs (5 s, 1.2 GB) from 32 MiB of `[{},{},...]`. The struct decodes
    as fast as a list.
    """
    fields = [(f"item_{i}", item, None) for i in range(_MAX_ITEMS)]
    return msgspec.defstruct("Batch", fields, array_like=True, forbid_unknown_fields=True)


def _items_of(batch: Any) -> list[Any]:
    """Return the items of a `_batch_of`; [] if decoding it has failed."""
    return [] if batch is None else [item for item in msgspec.structs.astuple(batch) if item is not None]


_RAW_ITEMS: msgspec.json.Decoder[Any] = msgspec.json.Decoder(_batch_of(Raw))


_MAX_UNKNOWN = 1000  # if an object has more unknown members, recognize fields only by their exact names


class _Name(str):
    """The field that a member's name means, or "". A class, because msgspec calls `dec_hook` only for custom types."""

    __slots__ = ()


@lru_cache
def _exact_decoder(struct: type) -> Any:
    """Make a decoder that reads each field as undecoded JSON and skips any number of other members."""
    fields: tuple[str, ...] = struct.__struct_fields__  # type: ignore[attr-defined]
    return msgspec.json.Decoder(msgspec.defstruct("Members", [(name, Raw, Raw()) for name in fields]))


def _read_members(struct: type, raw: bytes, faults: Faults) -> dict[str, Raw] | None:
    """Return the JSON of each field that the object has; record unknown names. Return None if it is not an object.

    A field's name may be in any case. If a name is repeated, the last one counts, as in Go (API: JSON).
    """
    fields: tuple[str, ...] = struct.__struct_fields__  # type: ignore[attr-defined]
    unknown: list[str] = []

    def field_of(_: type, name: str) -> _Name:
        folded = name.casefold()
        if folded in fields and len(folded) == len(name):  # Go does not fold one letter into two
            return _Name(folded)
        if len(unknown) == _MAX_UNKNOWN:
            raise ValueError
        unknown.append(name[:MAX_ECHO_CHARS])
        return _Name()

    members = decode(msgspec.json.Decoder(dict[_Name, Raw], dec_hook=field_of), bytes(raw))
    faults.ignore(unknown, fields)
    if members is not None:
        return {str(name): value for name, value in members.items() if name}
    found = decode(_exact_decoder(struct), bytes(raw))
    if found is not None:
        return {name: value for name, value in msgspec.structs.asdict(found).items() if value}
    faults.add(faults.whole, "invalid_type", f"must be an object, got {excerpt(raw)}")
    return None


def _decode_member(struct: type, field: msgspec.structs.FieldInfo, raw: bytes, faults: Faults) -> Any:
    """Decode one field. Record its fault, or, if it holds objects, the fault of each wrong field in them."""
    value = decode(decoder_of(field.type), raw)
    if value is not None or raw == b"null":
        return value
    kind = (get_args(field.type) or [field.type])[0]
    if hasattr(kind, "__struct_fields__"):
        with faults.within(field.name):
            return _decode_members(kind, raw, faults)
    item = (get_args(kind) or [object])[0]
    if hasattr(item, "__struct_fields__") and raw[:1] == b"[":
        items = decode(_RAW_ITEMS, raw)
        if items is None:
            faults.add(field.name, "out_of_range", f"may hold {_MAX_ITEMS} objects, got more")
        values = []
        for index, item_raw in enumerate(_items_of(items)):
            with faults.within(f"{field.name}[{index}]"):
                values.append(_decode_members(item, item_raw, faults))
        return values
    expected = _TYPE_NAMES.get(struct.__annotations__[field.name], "an array of objects")
    faults.add(field.name, "invalid_type", f"must be {expected}, got {excerpt(raw)}")
    return None


def _decode_members(struct: type[T], raw: bytes, faults: Faults) -> T:
    """Decode an object field by field. Record and leave out fields of the wrong type; record unknown names."""
    members = _read_members(struct, raw, faults) or {}
    decoder: Any = decoder_of(struct)  # type: ignore[arg-type]
    if decoded := decode(decoder, ENCODER.encode(members)):
        return decoded  # type: ignore[no-any-return]
    fields = [field for field in _fields_of(struct) if field.name in members]  # type: ignore[arg-type]
    return struct(**{field.name: _decode_member(struct, field, bytes(members[field.name]), faults) for field in fields})


def decode_fields(decoder: msgspec.json.Decoder[T], body: bytes, faults: Faults) -> T:
    """Decode a struct and record the fields that have the wrong type. Raises ApiError if the body is not JSON."""
    return decode(decoder, body) or _decode_members(decoder.type, body, faults)


# ---------------------------------------------------------------------------------------------- Time, ids, cursors

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


def to_datetime(time_us: int) -> datetime:
    return _EPOCH + time_us * _MICROSECOND


def to_us(time: datetime) -> int:
    return (time - _EPOCH) // _MICROSECOND


MIN_TIME_US = to_us(datetime.min.replace(tzinfo=UTC))  # Go's zero time; a client that sends it means "no time"
MAX_TIME_US = to_us(datetime.max.replace(tzinfo=UTC))
EARLIEST, LATEST = "0001-01-01T00:00:00.000001Z", "9999-12-31T23:59:59.999999Z"
MINUTE_US = 60 * 1_000_000
DAY_US = 1440 * MINUTE_US
_400_YEARS_US = 146_097 * DAY_US  # the period after which the calendar repeats

# Needed because datetime.fromisoformat also accepts week dates, a bare date, no zone and (Python 3.13) hour 24.
RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt](?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)


def parse_time(text: str) -> int:
    """Parse an RFC 3339 time with a zone into microseconds since 1970; digits beyond microseconds are dropped.

    Raises FieldError if the time has another format or lies outside the years 1 to 9999 (API: Times).
    """
    if not RFC_3339.fullmatch(text):
        hint = "write it like 2026-11-01T00:00:00Z"
        raise FieldError("invalid_format", f"must be RFC 3339 with a zone, got {quoted(text)}; {hint}")
    try:
        if text.startswith("0000"):  # the local time can lie in the year 0, which datetime lacks
            time_us = to_us(datetime.fromisoformat(f"0400{text[4:].upper()}")) - _400_YEARS_US
        else:
            time_us = to_us(datetime.fromisoformat(text.upper()))
    except ValueError:  # day 31 of a short month
        raise FieldError("invalid_format", f"must be RFC 3339 with a zone, got {quoted(text)}: no such day") from None
    if not MIN_TIME_US <= time_us <= MAX_TIME_US:
        raise FieldError("out_of_range", f"must lie in the years 1 to 9999 in UTC, got {quoted(text)}")
    return time_us


def given_time(text: str | None) -> str | None:
    """Return a request's time, but None for Go's zero time in any spelling: it means "no time" (API: Times)."""
    with suppress(FieldError):
        if text and text.startswith("000") and parse_time(text) == MIN_TIME_US:
            return None
    return text


def time_range(start_time: str | None, end_time: str | None, now: int, faults: Faults) -> tuple[int, int]:
    """Return both times in microseconds. By default the end is now, the start 7 days before the end (API: Queries)."""
    start_time, end_time = given_time(start_time), given_time(end_time)
    end_us = faults.check("end_time", parse_time, end_time)
    end_us = now if end_us is None else end_us
    start_us = faults.check("start_time", parse_time, start_time)
    start_us = end_us - 7 * DAY_US if start_us is None else start_us
    if end_us < start_us:
        problem = f"is {quoted(end_time or '')}, before start_time {quoted(start_time or '')}"
        faults.add("end_time", "out_of_range", problem if end_time else "is before start_time")
    return start_us, end_us


class IdMaker:
    """Makes ids from a prefix and a ULID: milliseconds and random bits. Within a millisecond, ids count up by one."""

    _pairs = tuple(map("".join, itertools.product("0123456789ABCDEFGHJKMNPQRSTVWXYZ", repeat=2)))  # Crockford's base 32

    def __init__(self) -> None:
        self._last = self._high = 0
        self._start = ""  # the last id without its last four digits
        self._random = random.Random()  # noqa: S311 - ids need not be secret, and `secrets` costs a system call

    def __call__(self, time_us: int, prefix: str = "event_") -> str:
        if time_us // 1000 > self._last >> 80:
            self._last = (time_us // 1000) << 80 | self._random.getrandbits(79)  # bit 80 stays 0: room to count up
        else:
            self._last += 1
        high, low = self._last >> 20, self._last & 0xFFFFF
        if high != self._high:  # successive ids usually differ only in the last four digits
            self._high = high
            self._start = "".join([self._pairs[high >> shift & 1023] for shift in range(100, -1, -10)])
        return prefix + self._start + self._pairs[low >> 10] + self._pairs[low & 1023]


class Cursor(NamedTuple):
    """The position of an event in the order of pages; its text is `<unix time in ns>::<event id>` (API: Queries)."""

    timestamp_us: int
    id: str

    @property
    def text(self) -> str:
        return f"{self.timestamp_us * 1000}::{self.id}"


def parse_cursor(text: str) -> Cursor:
    """Parse a cursor. Raises FieldError if it is malformed (API: Queries)."""
    time_ns, separator, event_id = text.partition("::")
    if not (separator and event_id and re.fullmatch(r"-?[0-9]{1,21}", time_ns)):
        problem = f'must be a cursor like "1760528327962000000::event_id", got {quoted(text)}'
        raise FieldError("invalid_format", problem)
    timestamp_us = int(time_ns) // 1000
    if not MIN_TIME_US <= timestamp_us <= MAX_TIME_US:
        raise FieldError("out_of_range", f"must hold a time in the years 1 to 9999, got {quoted(text)}")
    return Cursor(timestamp_us, event_id)


# ---------------------------------------------------------------------------------------------- Events in SQL

_SELECT_ENVIRONMENT = "SELECT id FROM environments WHERE name = :environment"
IN_ENVIRONMENT = f"environment = ({_SELECT_ENVIRONMENT})"
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
_ESCAPED_IN_JSON = re.compile(r'["\\\x00-\x1f]')
_STRING = msgspec.json.Decoder(str)
_SORTED = msgspec.json.Encoder(order="sorted")


class Row(NamedTuple):
    """One row of the table `events`, without seq."""

    environment: int  # id of the environment: see environment_number
    id: str
    external_customer_id: str
    customer_id: str
    event_name: str
    source: str
    timestamp_us: int
    ingested_at_us: int
    properties: str


class Sql(NamedTuple):
    """A statement or a part of one, with the values of its named parameters: `conn.execute(*statement)`."""

    text: str
    values: Mapping[str, object]

    def __str__(self) -> str:
        return self.text


def sql(text: str, *parts: Sql, **values: object) -> Sql:
    """Make an Sql from a text that contains the texts of `parts`. It has the values of all parts, and `values`."""
    joined = dict(values)
    for part in parts:
        joined |= part.values
    return Sql(text, joined)


def all_of(clauses: Iterable[Sql]) -> Sql:
    parts = list(clauses)
    return sql(" AND ".join(map(str, parts)), *parts)


def is_in(value: Sql | str, options: Sequence[object] | set[str], name: str) -> Sql:
    """Build `value IN (...)`; the parameters are called name0, name1, ..."""
    values = {f"{name}{i}": option for i, option in enumerate(options)}
    text = f"{value} IN ({', '.join(f':{each}' for each in values)})"
    return sql(text, *([value] if isinstance(value, Sql) else []), **values)


def index_of(columns: Iterable[str]) -> str:
    """Build the INDEXED BY clause for a condition on these columns. Prefer the index that finds the fewest events.

    Without the clause SQLite 3.50 uses events_by_time for every page: one customer's page scans all customers' events.
    """
    indexes = {"id": "id", "external_customer_id": "customer", "event_name": "name"}
    given = {*columns}
    return f"INDEXED BY events_by_{next((index for column, index in indexes.items() if column in given), 'time')}"


def _number_text(json_number: str) -> str:
    """Return the shortest text of a number's 64-bit float, as ClickHouse writes it: 200, 0.1, 1e21, 1e-7."""
    text = repr(float(json_number) or 0.0).removesuffix(".0")  # -0.0 is 0
    digits, _, exponent = text.partition("e")
    if not exponent:
        return text
    power = int(exponent)
    return f"{Decimal(text):f}" if -7 < power < 21 else f"{digits}e{power}"


def _raw_number(json_number: str) -> Raw:
    return Raw(_number_text(json_number).encode())


def value_text(value: str) -> str | None:
    """SQL function: convert a JSON value to the text that filters and groups compare; null becomes NULL.

    An object or array is compact JSON with sorted keys, as Go writes it (API: Property filters).
    """
    if value.startswith('"'):
        return _STRING.decode(value)
    if value.startswith(("{", "[")):
        return _SORTED.encode(json.loads(value, parse_int=_raw_number, parse_float=_raw_number)).decode()
    if value in ("true", "false", "null"):
        return None if value == "null" else value
    return _number_text(value)


def property_text(properties: str, key: str) -> str | None:
    """SQL function: return the `value_text` of a top-level property; NULL if it is missing."""
    return value_text(bytes(MEMBERS.decode(properties).get(key, b"null")).decode())


def property_number(properties: str, key: str) -> float:
    """SQL function: return a property that is a number, or a text with a number in it; otherwise 0 (API: Usage)."""
    text = property_text(properties, key) or ""
    number = float(text) if DECIMAL.fullmatch(text) else 0.0
    return number if math.isfinite(number) else 0.0


_SQL_FUNCTIONS: tuple[tuple[Callable[..., Any], int], ...] = (
    (value_text, 1), (property_text, 2), (property_number, 2),
)  # fmt: skip


def property_parameters(name: str, key: str) -> dict[str, object]:
    """Return the parameters for a key and its path. A path cannot express a key that needs escapes; "$" replaces it."""
    return {f"{name}_key": key, f"{name}_path": "$" if _ESCAPED_IN_JSON.search(key) else f'$."{key}"'}


# The `value_text` of v, which is JSON without backslashes. Only a string, which begins with '"', sorts before '#'.
TEXT_OF_JSON = """CASE WHEN v < '#' THEN trim(v, '"')
    WHEN v IN ('true', 'false') OR (length(v) < 16 AND v NOT GLOB '*[^0-9.]*' AND v NOT GLOB '*.*0'
        AND v NOT GLOB '0.00000*') THEN v
    WHEN v >= '#' THEN value_text(v) END"""


def property_sql(read_as: str, name: str, key: str) -> Sql:
    """Build the expression for a top-level property; `name` is a unique prefix for the parameters' names.

    Read as "text", a property is what `property_text` returns. Read as "value", it is what `->>` returns, in 0.7 times
    the time: numbers stay numbers, true is 1 and false is 0.

    If the properties contain a backslash, which may escape the key, both call property_text: before 3.45 SQLite
    compares the path with the escaped key. Other properties cannot hold a key that needs escapes.
    """
    plain = f"properties ->> :{name}_path"
    if _ESCAPED_IN_JSON.search(key):
        plain = "NULL"
    elif read_as == "text":
        plain = f"(SELECT {TEXT_OF_JSON} FROM (SELECT properties -> :{name}_path AS v))"
    text = f"CASE WHEN properties LIKE '%\\%' THEN property_text(properties, :{name}_key) ELSE {plain} END"
    return Sql(text, property_parameters(name, key))


def filter_options(values: Sequence[str]) -> tuple[list[str], list[str | float]]:
    """Return the readings of a filter's property (see `property_sql`), and the options.

    An event matches if each reading equals an option. If both readings are needed, "value" comes first: it excludes
    most events in less time, and "text" checks the rest.
    """
    numbers = {text: float(text) for text in values if DECIMAL.fullmatch(text) and _number_text(text) == text}
    is_long = any(len(text) > 15 or "e" in text for text in numbers)  # SQLite may misread the last digit
    if is_long or any(text.startswith(("{", "[")) for text in values):
        return ["text"], [*values]
    bits = [float(text == "true") for text in values if text in ("true", "false")]
    exact = ["text"] if bits or {0.0, 1.0} & {*numbers.values()} else []
    return ["value", *exact], [*values, *numbers.values(), *bits]


class View(NamedTuple):
    """The events that a request can see: those of one environment, minus those hidden by a simulated lag."""

    environment: str
    now_us: int
    visible_us: int | None = None  # hide events that were ingested later; None hides nothing


class Selection(Struct, frozen=True, kw_only=True):
    """The events that a request selects, after its checks and with every default filled in."""

    view: View
    start_us: int
    end_us: int  # inclusive for lists, exclusive for aggregations
    filters: dict[str, str] = {}  # column -> value
    property_filters: dict[str, list[str]] = {}


def matching(selection: Selection) -> Sql:
    """Build the condition for a selection's environment and filters; callers add one for its range of time."""
    clauses = [sql(IN_ENVIRONMENT, environment=selection.view.environment)]
    if selection.view.visible_us is not None:
        clauses.append(sql("ingested_at_us <= :visible_us", visible_us=selection.view.visible_us))
    clauses += [sql(f"{column} = :{column}", **{column: value}) for column, value in selection.filters.items()]
    for number, (key, values) in enumerate(selection.property_filters.items()):
        name = f"filter{number}"
        readings, options = filter_options(values)
        clauses += [is_in(property_sql(read_as, name, key), options, f"{name}_") for read_as in readings]
    return all_of(clauses)


# ---------------------------------------------------------------------------------------------- Store: connections

PRAGMAS = (
    "PRAGMA journal_mode = WAL",  # readers and the writer do not block each other
    "PRAGMA synchronous = FULL",  # sync every commit: 202 means that the events are on disk
    "PRAGMA fullfsync = ON",  # macOS: fsync alone leaves the data in the drive's cache
    "PRAGMA wal_autocheckpoint = 16000",  # 64 MB; with random ids 40-70 % faster than the default of 1000 pages
    "PRAGMA journal_size_limit = 67108864",  # shrink a WAL again after a burst
    "PRAGMA busy_timeout = 5000",  # another process, such as an import, may briefly hold a lock
)
WRITER_PRAGMAS = (
    # 32 MB, since random ids touch many index pages. At a million events, 16 MB are 0.92 times as fast, 64 MB 1.05.
    "PRAGMA cache_size = -32768",
    "PRAGMA busy_timeout = 5",  # execute_writing retries; SQLite's own pauses grow to 100 ms
)
READER_PRAGMAS = ("PRAGMA query_only = ON",)
WRITE_LOCK_TIMEOUT_S = 5.0
_APPLICATION_ID = 0x45565354
_SCHEMA_VERSION = 2
_PROBLEMS: dict[int, tuple[str, ...]] = {  # SQLite's error code -> what is wrong, and what to do about it
    sqlite3.SQLITE_FULL: ("the disk is full", "make room on it"),
    sqlite3.SQLITE_IOERR: ("the disk answered with an error", "look at the system's log"),
    sqlite3.SQLITE_BUSY: ("another process has locked the database", "end that process"),
    sqlite3.SQLITE_READONLY: ("the database is read-only", "make it and its folder writable"),
    sqlite3.SQLITE_CANTOPEN: ("the database cannot be opened for writing", "check it and its folder"),
    sqlite3.SQLITE_CORRUPT: ("the database is damaged", "restore it from a copy"),
    sqlite3.SQLITE_NOTADB: ("the file is not a SQLite database",),
}


def connect(path: str, pragmas: Iterable[str] = ()) -> sqlite3.Connection:
    """Open a connection in autocommit mode: transactions begin and end explicitly."""
    conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # close() runs in another thread
    for pragma in (*PRAGMAS, *pragmas):
        conn.execute(pragma)
    return conn


def add_functions(conn: sqlite3.Connection) -> None:
    """Add the SQL functions that queries call."""
    for function, arguments in _SQL_FUNCTIONS:
        conn.create_function(function.__name__, arguments, function, deterministic=True)


def connect_reader(path: str) -> sqlite3.Connection:
    """Open a connection that cannot write, with the SQL functions that queries call."""
    conn = connect(path, READER_PRAGMAS)
    add_functions(conn)
    return conn


def execute_writing(
    conn: sqlite3.Connection, timeout_s: float, statement: str, values: Sequence[object] | Mapping[str, object] = ()
) -> sqlite3.Cursor:
    """Execute a statement that needs the write lock; retry it until the timeout.

    Each try waits for 5 ms (WRITER_PRAGMAS), because other writers release the lock only briefly.
    """
    deadline = monotonic_s() + timeout_s
    while True:
        try:
            return conn.execute(statement, values)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or monotonic_s() > deadline:
                raise


def environment_number(conn: sqlite3.Connection, name: str) -> int:
    """Return the environment's integer id, creating it if it is new."""
    parameters = {"environment": name}
    statement = "INSERT INTO environments (name) VALUES (:environment) ON CONFLICT DO NOTHING"
    execute_writing(conn, WRITE_LOCK_TIMEOUT_S, statement, parameters)
    return int(conn.execute(_SELECT_ENVIRONMENT, parameters).fetchone()[0])


def _data_file(name: str) -> str:
    """Return the text of a file in this file's folder; a wheel installs it there as well."""
    return (Path(__file__).resolve().parent / name).read_text("utf-8")


def real_path(db: str) -> str:
    """Return the absolute path without symbolic links: SQLite keeps the WAL beside the link's target."""
    return os.path.realpath(db)


def _ends_in_half_a_page(path: str) -> bool:
    """Return whether the file was cut off inside a page. SQLite would take the rest of that page for zeros.

    A file with a WAL is not checked: the WAL may hold the page.
    """
    if not os.path.isfile(path) or os.path.exists(f"{path}-wal"):
        return False
    with open(path, "rb") as file, suppress(OSError):
        header = file.read(18)
        page_bytes = int.from_bytes(header[16:], "big")
        return header.startswith(b"SQLite format 3\0") and os.path.getsize(path) % max(page_bytes, 512) > 0
    return False


@contextmanager
def start_errors(path: str) -> Iterator[None]:
    """Turn SQLite's errors into StartError."""
    try:
        yield
    except sqlite3.Error as error:
        reason = ": ".join(_PROBLEMS.get(error.sqlite_errorcode & 0xFF, (str(error),)))
        raise StartError(f"cannot use the database {path}: {reason}; choose another file with --db") from error


def check_format(conn: sqlite3.Connection, path: str) -> int | None:
    """Return the format of the file, or None if it lacks tables. Raises StartError if this server cannot use it."""
    # Count the tables before reading application_id. In the other order, a file that another process creates in between
    # would have tables and the id 0, like another program's.
    tables, is_ours = conn.execute("SELECT count(*), total(name = 'environments') FROM sqlite_schema").fetchone()
    application_id = conn.execute("PRAGMA application_id").fetchone()[0]
    if tables and application_id != _APPLICATION_ID:
        raise StartError(f"{path} is another program's database: choose another file with --db")
    version = int(conn.execute("PRAGMA user_version").fetchone()[0])
    if tables and not (is_ours and 1 <= version <= _SCHEMA_VERSION):
        writer = "a newer" if version > _SCHEMA_VERSION else "another"
        other = f"{path} was written by {writer} eventstore (format {version}, not this one's {_SCHEMA_VERSION})"
        way = "export its events with the eventstore that wrote it and import them with this one"
        raise StartError(f"{other}: {way}, or choose another file with --db")
    return version if tables else None


def _migrate(conn: sqlite3.Connection, path: str) -> None:
    """Check the file, create or upgrade its tables, and write to it as a trial. Raises StartError."""
    version = check_format(conn, path)
    for pragma in PRAGMAS:
        conn.execute(pragma)
    if version is None:  # a process that starts at the same time waits for the lock, then creates nothing
        conn.executescript(f"BEGIN IMMEDIATE;\n{_data_file('schema.sql')}\nCOMMIT;")
    elif version < _SCHEMA_VERSION:
        purpose = f"{path} has format {version}, not this eventstore's {_SCHEMA_VERSION}: upgrading it"
        _extra("upgrades", purpose).upgrade(conn, path, _SCHEMA_VERSION)
    # After a failed sync, a WAL can be readable although it is not on disk. If a client then sends its events again,
    # they count as duplicates, but a power cut would lose them. Copy the WAL into the file, which syncs the file.
    conn.execute("PRAGMA wal_checkpoint")
    conn.execute("BEGIN IMMEDIATE")  # fail now, not at the first event, if the file cannot be written
    conn.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")  # BEGIN alone succeeds if there is a WAL
    conn.execute("ROLLBACK")


def _count_all(conn: sqlite3.Connection) -> int:
    """Count the events. Above 100,000, estimate the number from seq, which is too high if events were deleted."""
    counted = conn.execute("SELECT count(*) FROM (SELECT 1 FROM events LIMIT 100001)").fetchone()[0]
    estimate = "SELECT (SELECT max(seq) FROM events) - (SELECT min(seq) FROM events) + 1"
    return int(counted if counted <= 100_000 else conn.execute(estimate).fetchone()[0])


def check_path(path: str) -> None:
    """Raises StartError if no database can be at this path, if its file was cut off, or if SQLite is too old."""
    if sqlite3.sqlite_version_info < (3, 38):
        raise StartError(f"SQLite is {sqlite3.sqlite_version}, 3.38 or newer is needed: use a newer Python")
    if not path:
        raise StartError('--db is empty: name a file, or ":memory:" for a temporary one')
    if os.path.isdir(path):
        raise StartError(f"{path} is a folder: name a file in it with --db")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise StartError(f"the folder {folder} does not exist: make it, or choose another file with --db")
    if _ends_in_half_a_page(real_path(path)):
        raise StartError(f"{path} was cut off: restore it from a copy, or choose another file with --db")


def prepare_file(path: str) -> int:
    """Create the database, upgrade one of an older format, or check that eventstore wrote it.

    Return its number of events. Raises StartError.
    """
    check_path(path)
    if path != ":memory:":
        # Create the file with access for its owner only; SQLite gives the -wal and -shm the same mode. Ignore an error:
        # either the file exists, or SQLite reports the reason below.
        with suppress(OSError):
            os.close(os.open(real_path(path), os.O_CREAT | os.O_EXCL, 0o600))
    with start_errors(path), closing(sqlite3.connect(path, isolation_level=None)) as conn:
        _migrate(conn, path)
        return _count_all(conn)


# ---------------------------------------------------------------------------------------------- Store: inserting

INSERT_ROWS = 64  # rows per INSERT; more are not faster. One statement is cached per row count


@lru_cache
def insert_statement(rows: int) -> str:
    """Build one INSERT for many rows. executemany would release the GIL, and wait for it again, at every row."""
    columns, row = ", ".join(Row._fields), f"({', '.join('?' * len(Row._fields))})"
    # INSERT OR IGNORE would also skip rows with a NULL or a wrong type; this skips only known ids.
    on_known_id = "ON CONFLICT (environment, id) DO NOTHING"
    return f"INSERT INTO events ({columns}) VALUES {', '.join([row] * rows)} {on_known_id}"


def _insert_chunks(conn: sqlite3.Connection, rows: Sequence[Row], lock_timeout_s: float) -> int:
    inserted = 0
    for start in range(0, len(rows), INSERT_ROWS):
        chunk = rows[start : start + INSERT_ROWS]
        values = list(itertools.chain.from_iterable(chunk))
        inserted += execute_writing(conn, lock_timeout_s, insert_statement(len(chunk)), values).rowcount
    return inserted


def insert_events(conn: sqlite3.Connection, rows: Sequence[Row], lock_timeout_s: float) -> int:
    """Store rows in one transaction; return how many were new. After an error the transaction may still be open.

    Rows that fit into one statement need no BEGIN and COMMIT. Each call of SQLite releases the GIL, then waits for it
    while the event loop is busy. With one call instead of three, 8 clients send 1.4 times as many single events.
    """
    if not rows:
        return 0
    if len(rows) > INSERT_ROWS:
        execute_writing(conn, lock_timeout_s, "BEGIN IMMEDIATE")
    inserted = _insert_chunks(conn, rows, lock_timeout_s)
    if conn.in_transaction:
        conn.execute("COMMIT")
    return inserted


def _try_insert(conn: sqlite3.Connection, rows: Sequence[Row]) -> None:
    """Write rows into the WAL inside a transaction, then undo them. Raises sqlite3.Error if the disk is full.

    A small cache makes SQLite write the pages immediately instead of at the commit.
    """
    (cache_size,) = conn.execute("PRAGMA cache_size").fetchone()
    conn.execute("PRAGMA cache_size = 10")
    try:
        conn.execute("SAVEPOINT trial")
        _insert_chunks(conn, rows, WRITE_LOCK_TIMEOUT_S)
        conn.execute("ROLLBACK TO trial")
        conn.execute("RELEASE trial")
    finally:
        conn.execute(f"PRAGMA cache_size = {cache_size}")


# Selects the rows that were inserted last. Their seq has gaps, because a skipped duplicate also uses up a number.
SELECT_NEW_IDS = """SELECT json_group_array(json_array(environment, id)) FROM
    (SELECT environment, id FROM events WHERE seq <= last_insert_rowid() ORDER BY seq DESC LIMIT :inserted)"""
_NEW_IDS = msgspec.json.Decoder(list[tuple[int, str]])


def insert_group(conn: sqlite3.Connection, group: Sequence[Sequence[Row]]) -> list[int]:
    """Store the rows of several requests in one transaction; return how many of each request were new."""
    rows = list(itertools.chain.from_iterable(group))
    inserted = insert_events(conn, rows, WRITE_LOCK_TIMEOUT_S)
    if inserted in (0, len(rows)):
        return [len(rows) if inserted else 0 for rows in group]
    if len(group) == 1:
        return [inserted]
    try:
        new = set(_NEW_IDS.decode(conn.execute(SELECT_NEW_IDS, {"inserted": inserted}).fetchone()[0]))
    except (sqlite3.Error, msgspec.DecodeError):  # the rows are stored: a wrong count is better than an error
        log.exception("cannot tell which of %d stored events were new", len(rows))
        new = {(row.environment, row.id) for row in rows}
    counts = []
    for request_rows in group:
        found = new.intersection((row.environment, row.id) for row in request_rows)
        new -= found  # in a later request of the group the same id is a duplicate
        counts.append(len(found))
    return counts


# ---------------------------------------------------------------------------------------------- Store: threads


def _shutting_down() -> ApiError:
    return ApiError("service_unavailable", "the server is shutting down; nothing was done", retry_after_s=1)


class Caller:
    """The request that is being served. It is empty for the server's own work, which Shares never refuse."""

    __slots__ = ("headers", "key", "receive", "scope")

    def __init__(self, scope: Mapping[str, Any] | None = None, receive: Receive | None = None) -> None:
        self.scope = scope or {}
        self.receive = receive
        self.headers: dict[bytes, bytes] = dict(self.scope.get("headers", ())[::-1])  # the first header of each name
        self.key = b"anyone" if scope else b""  # whose shares and turns the request uses; a key's digest if it is known

    async def until_gone(self) -> Exception:
        """Wait until the client has gone; return the error that ends its queries. Without a client, never return."""
        if gone := self.scope.get("gone"):  # a future of the connection: see connections.Protocol
            await asyncio.wait([gone])
            error: Exception = gone.result()
            return error
        receive = self.receive or asyncio.get_running_loop().create_future
        while (await receive())["type"] != "http.disconnect":
            pass
        return ClientDisconnect()


CALLER: ContextVar[Caller] = ContextVar("caller", default=Caller())  # noqa: B039 - nothing changes it


class Shares:
    """Divides a limit among API keys: a key may use the limit minus three quarters of what the other keys use.

    This leaves room for a key that comes later. All keys together use at most a third more than the limit. Call it from
    the event loop only.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.total = 0
        self._used: dict[bytes, int] = {}

    def take(self, key: bytes, amount: int, own: int = 0) -> bool:
        """Take an amount and return True, unless it exceeds the key's share. `own` is what the request already holds.

        A request gets any amount if no other request holds one.
        """
        if key and self.total > own and amount > self._left(key):
            return False
        self._add(key, amount)
        return True

    def take_half(self, key: bytes, most: int, own: int) -> int:
        """Take half of what is left of the key's share, up to `most`, and return it; see `take`."""
        amount = max(0, min(most, int((self._left(key) + own) / 2)))
        self._add(key, amount)
        return amount

    def _left(self, key: bytes) -> float:
        used = self._used.get(key, 0)
        return self.limit - 0.75 * (self.total - used) - used

    def _add(self, key: bytes, amount: int) -> None:
        self._used[key] = self._used.get(key, 0) + amount
        self.total += amount

    def give_back(self, key: bytes, amount: int) -> None:
        if amount:
            self.total -= amount
            self._used[key] -= amount
            if not self._used[key]:
                del self._used[key]


_EVENT_BYTES = 1000  # a longer event counts as several, because it takes as much work


class _Task:
    """Work for a thread of the store, and the future of its result."""

    __slots__ = ("answer", "deadline_s", "is_abandoned", "key", "size", "work")

    def __init__(self, work: Any, deadline_s: float = math.inf) -> None:
        self.work = work  # rows to insert, or a function that is called with the connection
        self.answer: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        caller = CALLER.get()
        self.key = caller.key
        self.size = 1 if callable(work) else max(len(work), caller.scope.get("held_bytes", 0) // _EVENT_BYTES)
        self.deadline_s = deadline_s  # interrupt a query at this time of monotonic_s()
        self.is_abandoned = False  # nobody waits for the answer any more

    def settle(self, outcome: object) -> None:
        """Set the task's result or exception. Safe to call from any thread."""
        with suppress(RuntimeError):  # the loop is closed: nobody waits any more
            self.answer.get_loop().call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: object) -> None:
        if self.answer.done():  # cancelled, because the client disconnected
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


class _FairQueue:
    """A queue for each API key; the keys take turns. Not safe for threads."""

    def __init__(self) -> None:
        self._items: dict[bytes, deque[Any]] = {}  # by key; the first has the next turn

    def __len__(self) -> int:
        return sum(map(len, self._items.values()))

    def __bool__(self) -> bool:
        return bool(self._items)

    def add(self, key: bytes, item: object) -> None:
        if key not in self._items:
            self._items[key] = deque()
        self._items[key].append(item)

    def next(self, may_run: Callable[[bytes], bool] | None = None) -> Any:
        """Remove and return the oldest item of the key that has the next turn, or None."""
        for key, items in self._items.items():
            if may_run is None or may_run(key):
                item = items.popleft()
                if not items:
                    del self._items[key]
                elif len(self._items) > 1:
                    self._items[key] = self._items.pop(key)  # its next turn comes last
                return item
        return None

    def remove(self, key: bytes, item: object) -> None:
        """Remove an item if it is still there."""
        items = self._items.get(key, deque())
        with suppress(ValueError):
            items.remove(item)
        if not items:
            self._items.pop(key, None)

    def clear(self) -> list[Any]:
        """Remove and return all items."""
        items, self._items = [*itertools.chain.from_iterable(self._items.values())], {}
        return items


class Turn:
    """A lock for which API keys take turns. Call it from the event loop only."""

    def __init__(self) -> None:
        self._is_taken = False
        self._waiting = _FairQueue()

    async def __aenter__(self) -> None:
        if not self._is_taken:
            self._is_taken = True
            return
        turn = asyncio.get_running_loop().create_future()
        self._waiting.add(CALLER.get().key, turn)
        try:
            await turn
        except asyncio.CancelledError:
            if not turn.cancelled():  # cancelled after it got its turn
                self._pass_on()
            raise

    async def __aexit__(self, *_: object) -> None:
        self._pass_on()

    def _pass_on(self) -> None:
        while turn := self._waiting.next():
            if not turn.done():
                turn.set_result(None)
                return
        self._is_taken = False


_SWITCH_S = 0.0005  # a thread may run Python code for this long while others wait


class _ShortSwitches:
    """Makes threads take turns every 0.5 ms instead of 5 ms while any of them is in a block `with _short_switches`.

    The event loop and the other threads wait for each other at each of their steps. A single event beside 12 clients
    with COUNT_UNIQUE takes 0.6 times as long; beside 60 with full batches, at most 0.4 s instead of 2 s. Short
    single events do not use it: they would cost 1.2 times the CPU.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._blocks = 0
        self._usual_s = 0.0

    def __enter__(self) -> None:
        with self._lock:
            self._blocks += 1
            if self._blocks == 1:
                self._usual_s = sys.getswitchinterval()
                sys.setswitchinterval(min(_SWITCH_S, self._usual_s))

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._blocks -= 1
            if self._blocks == 0:
                sys.setswitchinterval(self._usual_s)


_short_switches = _ShortSwitches()


def _size_of(rows: Iterable[Row]) -> int:
    """Estimate what rows and their index entries add to the file, in bytes."""
    return sum(500 + len(row.properties) for row in rows)


_SPACE_PAUSE_S = 1.0  # between two checks of the free space after commits


class _FreeSpace:
    """Warns when the disk of the database is nearly full (API: Health). Any thread may call it."""

    def __init__(self, path: str, limit_bytes: int | None) -> None:
        self._folder = os.path.dirname(path)
        self._limit_bytes = limit_bytes
        self._next_s = 0.0
        self._is_low = False

    def watch(self) -> None:
        """Check at most once a second, so that the log has the warning even if nobody requests /health."""
        if monotonic_s() >= self._next_s:
            self._next_s = monotonic_s() + _SPACE_PAUSE_S
            self.warning()

    def warning(self) -> str | None:
        """Return a warning if there is little space. Log it once, and log when the disk has room again."""
        try:
            disk = os.statvfs(self._folder)
        except (AttributeError, OSError):  # Windows lacks statvfs
            return None
        limit, free = self._limit_bytes, disk.f_bavail * disk.f_frsize
        if limit is None:
            limit = min(disk.f_blocks * disk.f_frsize // 20, 10**9)
        reason = f"the disk has {free / 1e6:,.1f} MB left, fewer than {limit / 1e6:,.1f}: make room before it is full"
        if free < limit and not self._is_low:
            self._is_low = True
            log.warning("%s", reason)
        elif self._is_low and free >= 1.1 * limit:  # less margin would log again and again
            self._is_low = False
            log.info("the disk has room again: %s MB are left", f"{free / 1e6:,.1f}")
        return reason if free < limit else None


def _files_of(path: str) -> list[os.stat_result]:
    """Return the status of the database file and of its WAL, if they exist."""
    files = []
    for name in (path, f"{path}-wal"):
        with suppress(FileNotFoundError):
            files.append(os.stat(name))
    return files


def _is_database_failure(error: Exception) -> bool:
    """Return True if the database or its disk failed, False if the error is a bug or a refusal."""
    is_wrong_call = isinstance(error, sqlite3.ProgrammingError | sqlite3.InterfaceError)
    return isinstance(error, sqlite3.Error | OSError) and not is_wrong_call


def _rows_of(group: Iterable[_Task]) -> list[Row]:
    return [row for task in group if not callable(task.work) for row in task.work]


# Limits on the events of a group, which is one commit. 32 clients that send batches are 1.4 times as fast with 16,000
# as with 4,000. Small requests go first, and groups are short while any arrive: beside 64 clients that send batches,
# p99 of a single event is 0.15 s; in the order of arrival it would be 1.2 s.
_GROUP_EVENTS, _SHORT_GROUP_EVENTS = 16_000, 2_000
_GROUP_OPERATIONS = 100
_FEW_EVENTS = 10  # a request with at most this many events is small


class Writer:
    """A thread that owns the only writing connection and commits the waiting requests in groups.

    Call `run` from the event loop, and `close` from another thread.
    """

    def __init__(self, path: str, pragmas: Iterable[str], settings: Settings) -> None:
        self._path = path
        self._settings = settings
        self._conn = connect(path, pragmas)
        self._files: list[os.stat_result] = []
        self._wal_limit_bytes = settings.wal_bytes
        self._arrival = threading.Condition()  # guards the attributes down to _events_are_next
        self._operations, self._few, self._many = _FairQueue(), _FairQueue(), _FairQueue()
        self._is_closed = False
        self._short_until_s = 0.0
        self._events_are_next = False  # groups of events and of operations take turns
        self._shares = Shares(settings.queue_events)
        self.failure: str | None = None  # why the last commit failed; None if it succeeded
        self.failed_commits = 0
        # Called in the writer's thread with the number of events and the seconds of each commit.
        self.on_commit: Callable[[int, float], object] = lambda events, seconds: None
        self._failed_rows: list[Row] = []  # the largest commit that failed because of the disk
        self.space = _FreeSpace(path, settings.warn_free_bytes)
        self._thread = threading.Thread(target=self._write_until_closed, name="eventstore-writer", daemon=True)

    def start(self) -> None:
        self._files = _files_of(self._path)
        self._thread.start()

    async def run(self, work: Sequence[Row] | Callable[[sqlite3.Connection], T]) -> Any:
        """Queue rows or an operation, and return its result. Raises ApiError if too much waits (see Shares)."""
        task, weight = _Task(work), 1 if callable(work) else len(work)
        if not self._shares.take(task.key, weight):
            reason = f"{self._shares.total} events wait to be written, the limit is {self._shares.limit}"
            raise ApiError("service_unavailable", f"{reason}; nothing was stored, try again", retry_after_s=1)
        try:
            with self._arrival:
                if self._is_closed:
                    raise _shutting_down()
                queue = self._operations if callable(work) else self._few if weight <= _FEW_EVENTS else self._many
                queue.add(task.key, task)
                self._arrival.notify()
            return await task.answer
        finally:
            self._shares.give_back(task.key, weight)

    @property
    def waiting_events(self) -> int:
        return self._shares.total

    def close(self) -> None:
        """Commit everything that waits, checkpoint, and close the connection."""
        with self._arrival:
            self._is_closed = True
            self._arrival.notify()
        self._thread.join()

    def _write_until_closed(self) -> None:
        while group := self._next_group():
            start_s = monotonic_s()
            outcomes = self._commit(group)
            for task, outcome in zip(group, outcomes, strict=True):
                task.settle(outcome)
            self.on_commit(len(_rows_of(group)), monotonic_s() - start_s)
            self._shorten_wal()
            self.space.watch()
        with suppress(sqlite3.Error):
            self._conn.execute("PRAGMA busy_timeout = 0")  # do not wait for another process: the WAL keeps the events
            self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._conn.close()

    def _next_group(self) -> list[_Task]:
        """Wait for tasks, and return those of the next commit. Return an empty list after `close`."""
        with self._arrival:
            self._arrival.wait_for(lambda: self._few or self._many or self._operations or self._is_closed)
            has_events = bool(self._few or self._many)
            self._events_are_next = has_events and (self._events_are_next or not self._operations)
            if self._events_are_next:
                group = self._next_events()
            else:
                group = [task for _ in range(_GROUP_OPERATIONS) if (task := self._operations.next())]
            self._events_are_next = not self._events_are_next
            return group

    def _next_events(self) -> list[_Task]:
        """Return small requests, then batches: at least one batch, even if small requests never stop arriving."""
        now_s = monotonic_s()
        if self._few:
            self._short_until_s = now_s + 1
        limit = _SHORT_GROUP_EVENTS if now_s < self._short_until_s else _GROUP_EVENTS
        group: list[_Task] = []
        size = 0
        while size < limit and (task := self._few.next()):
            group.append(task)
            size += task.size
        while task := self._many.next():
            group.append(task)
            size += task.size
            if size >= limit:
                break
        return group

    def _commit(self, group: list[_Task]) -> list[object]:
        """Run the tasks in one transaction. Return each task's result or exception; a failed commit stores nothing."""
        try:
            self._check_files()
            if self._conn.in_transaction:  # a rollback failed: COMMIT would store the last group
                self._conn.execute("ROLLBACK")
            if callable(group[0].work):
                execute_writing(self._conn, WRITE_LOCK_TIMEOUT_S, "BEGIN IMMEDIATE")
                outcomes = [self._try_operation(task.work, len(group) == 1) for task in group]
                if self._conn.in_transaction:
                    self._conn.execute("COMMIT")
            else:
                outcomes = list(insert_group(self._conn, [task.work for task in group]))
        except Exception as error:
            with suppress(sqlite3.Error):  # a full disk may make this fail as well; the thread must not end
                if self._conn.in_transaction:
                    self._conn.execute("ROLLBACK")
            return self._outcomes_of_failure(group, error)
        if self._failed_rows and _size_of(_rows_of(group)) >= _size_of(self._failed_rows):
            self._failed_rows = []
        if not self._failed_rows:
            self.failure = None
        return outcomes

    def _try_operation(self, operation: Callable[[sqlite3.Connection], object], is_alone: bool) -> object:
        """Return an operation's result, or its error after undoing it alone. Raises an error of the database.

        An operation that is alone needs no savepoint: SQLite copies each page that is changed after one, and a deletion
        by retention would take 2.5 times the CPU.
        """
        if not is_alone:
            self._conn.execute("SAVEPOINT operation")
        try:
            outcome = operation(self._conn)
        except Exception as error:
            if _is_database_failure(error):
                raise
            self._conn.execute("ROLLBACK" if is_alone else "ROLLBACK TO operation")
            outcome = error
            if not isinstance(error, ApiError):
                log.error("a bug in an operation; nothing of its request was stored", exc_info=error)
                outcome = _internal_error()
        if not is_alone:
            self._conn.execute("RELEASE operation")
        return outcome

    async def try_again(self) -> None:
        """Write the rows of a failed commit again as a trial, and undo them. Raises ApiError if that fails as well."""
        await self.run(self._try_failed_rows)

    def _try_failed_rows(self, conn: sqlite3.Connection) -> None:
        conn.execute(f"PRAGMA user_version = {_SCHEMA_VERSION}")  # writes something even without rows
        if self._failed_rows:
            _try_insert(conn, self._failed_rows)
            self._failed_rows = []

    def _outcomes_of_failure(self, group: list[_Task], error: Exception) -> list[object]:
        """Return the error of each task after a failed commit, and remember the reason."""
        self.failed_commits += 1
        if not _is_database_failure(error):
            log.error("a bug in a commit; nothing of its %d requests was stored", len(group), exc_info=error)
            return [_internal_error() for _ in group]
        # Anyone may read the reason in /health, so it contains no path.
        reason = "the database file was removed or replaced, or its status cannot be read"
        code = getattr(error, "sqlite_errorcode", 0) & 0xFF
        if isinstance(error, sqlite3.Error):
            reason = _PROBLEMS.get(code, ("the database refused a write",))[0]
        known, self.failure = self.failure, reason
        if code in (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR):
            # Keep the largest failed commit: if a smaller one succeeds, the refused events may still not fit.
            self._failed_rows = max(self._failed_rows, _rows_of(group), key=_size_of)
        if code != sqlite3.SQLITE_BUSY:
            if self.failure != known:  # log one traceback for each reason; every refused request is logged anyway
                log.exception("a commit failed; none of its %d requests was stored", len(group))
            message = "the database refused the write; nothing was stored, the server's log says why"
            return [ApiError("database_error", message) for _ in group]
        with self._arrival:  # fail everything queued; otherwise each group would wait out the same timeout
            for queue in (self._operations, self._few, self._many):
                group += queue.clear()
        message = "another process has locked the database; nothing was stored, try again"
        return [ApiError("service_unavailable", message, retry_after_s=1) for _ in group]

    def _check_files(self) -> None:
        """Raises FileNotFoundError if a file was removed or replaced: SQLite would still write to the old one."""
        files = _files_of(self._path)
        if len(files) != len(self._files) or not all(map(os.path.samestat, files, self._files)):
            raise FileNotFoundError(f"{self._path} or its -wal was removed or replaced: put it back, or restart")
        self._files = files

    def _shorten_wal(self) -> None:
        """Checkpoint and truncate a WAL that is larger than the limit.

        SQLite's automatic checkpoint restarts the WAL only at a moment without readers. If reads always overlap, such
        as four clients' sums over 100,000 events, the WAL grows by 40 MB a second. Here the writer waits until the
        running reads end. If that takes longer than a second, the writer tries again when the WAL is twice as large.
        The size is the one that _check_files read before the commit.
        """
        wal_bytes = self._files[-1].st_size
        if wal_bytes <= self._wal_limit_bytes:
            return
        self._wal_limit_bytes = 2 * wal_bytes
        with suppress(sqlite3.Error):
            self._conn.execute("PRAGMA busy_timeout = 1000")  # reads take longer than another process's writes
            try:
                is_busy, _, _ = self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._conn.execute("PRAGMA busy_timeout = 5")
            if is_busy:
                megabytes = wal_bytes >> 20
                log.warning("%s-wal has %d MB: some query keeps it from being shortened", self._path, megabytes)
            else:
                self._wal_limit_bytes = self._settings.wal_bytes


_PROGRESS_STEPS = 10_000  # check the deadline after this many of SQLite's instructions; a page of 50 needs fewer
_LONG_PROPERTIES = 10_000  # check the deadline before a SQL function reads a text with more characters
_this_thread = threading.local()  # .reader is the Reader that runs an operation in this thread


class Reader:
    """A read-only connection that interrupts a query at its deadline, or when nobody waits for it."""

    def __init__(self, path: str) -> None:
        self.conn = connect(path, READER_PRAGMAS)
        self.conn.set_progress_handler(self._is_over, _PROGRESS_STEPS)
        for function, arguments in _SQL_FUNCTIONS:  # SQLite does not call the handler inside them
            checking = self._checking(function)
            self.conn.create_function(function.__name__, arguments, checking, deterministic=True)
        self._deadline_s = 0.0
        self._task: _Task | None = None
        self.is_closing = False  # True interrupts this query and all later ones

    def _is_over(self) -> bool:
        is_abandoned = self._task is not None and self._task.is_abandoned
        return self.is_closing or is_abandoned or monotonic_s() > self._deadline_s

    def _checking(self, function: Callable[..., T]) -> Callable[..., T]:
        def check_and_call(json_text: str, *key: str) -> T:
            if len(json_text) > _LONG_PROPERTIES and self._is_over():
                raise TimeoutError
            return function(json_text, *key)

        return check_and_call

    def run(
        self, operation: Callable[[sqlite3.Connection], T], limit_s: float = math.inf, task: _Task | None = None
    ) -> T:
        """Return the operation's result. Raises TimeoutError after limit_s, and at the task's deadline."""
        self._task = task
        self._deadline_s = min(monotonic_s() + limit_s, task.deadline_s if task else math.inf)
        _this_thread.reader = self
        try:
            return operation(self.conn)
        except sqlite3.OperationalError:
            if self._is_over():
                raise TimeoutError from None
            raise
        finally:
            _this_thread.reader = None


def check_time() -> None:
    """Raises TimeoutError if the running operation is late or nobody waits for it. Call it in long loops."""
    reader: Reader | None = getattr(_this_thread, "reader", None)
    if reader and reader._is_over():
        raise TimeoutError


READER_THREADS = 4  # for each API key
_MAX_READER_THREADS = 16
_MAX_QUERIES = 1000  # limit on queries that run or wait, shared by the keys (see Shares)


def _lower_priority() -> None:
    """Let this thread use only the CPU time that the event loop and the writer leave.

    With the same priority, four long queries on two cores let the event loop run half of the time: beside 60 clients
    that abandon such queries, a single event took 0.8 s, at worst 5 s. Lower priority makes these 0.03 s and 0.4 s.
    """
    if sys.platform == "linux":  # elsewhere nice() applies to the whole process
        os.nice(5)


class ReaderPool:
    """Threads that run reading operations, each with a Reader. Call `run` from the event loop only.

    The keys take turns, and each may use READER_THREADS threads, so that the queries of one key do not wait for those
    of another.
    """

    def __init__(self, path: str, timeout_s: float) -> None:
        self._path = path
        self._timeout_s = timeout_s
        self._shares = Shares(_MAX_QUERIES)
        self._lock = threading.Lock()  # guards the next five attributes
        self._waiting = _FairQueue()
        self._running: Counter[bytes] = Counter()
        self._readers = [Reader(path) for _ in range(READER_THREADS)]
        self._free = list(self._readers)
        self._is_closed = False
        self._threads = ThreadPoolExecutor(_MAX_READER_THREADS, "eventstore-reader", _lower_priority)
        self.timeouts = 0

    async def run(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Return the operation's result. If the client goes away, interrupt the operation (see Caller).

        Raises ApiError if too many queries wait (see Shares).
        """
        task = _Task(operation, monotonic_s() + self._timeout_s)
        with self._counted(task.key):
            with self._lock:
                if self._is_closed:
                    raise _shutting_down()
                if self._may_run(task.key) and self._running.total() < _MAX_READER_THREADS:
                    self._running[task.key] += 1
                    self._threads.submit(self._run_tasks, task)
                else:
                    self._waiting.add(task.key, task)
            try:
                answer: T = await self._until_done(task.answer, self._timeout_s)
                return answer
            finally:
                if not task.answer.done():
                    task.answer.cancel()
                    task.is_abandoned = True  # interrupts the operation if it runs
                    with self._lock:
                        self._waiting.remove(task.key, task)
                elif not task.answer.cancelled():
                    task.answer.exception()  # otherwise asyncio logs an exception that nobody has read

    async def run_in_turn(self, turn: Turn, work: Callable[[], Coroutine[Any, Any, T]], spent_s: float) -> T:
        """Call `work` when its turn comes, with the limits of a query that has already taken spent_s."""

        async def wait_and_work() -> T:
            async with turn:
                return await work()

        with self._counted(CALLER.get().key):
            task = asyncio.create_task(wait_and_work())
            try:
                return await self._until_done(task, self._timeout_s - spent_s)
            finally:
                task.cancel()

    @contextmanager
    def _counted(self, key: bytes) -> Iterator[None]:
        if not self._shares.take(key, 1):
            reason = f"{self._shares.total} queries run or wait, the limit is {self._shares.limit}"
            raise ApiError("service_unavailable", f"{reason}; try again", retry_after_s=1)
        try:
            yield
        finally:
            self._shares.give_back(key, 1)

    async def _until_done(self, answer: asyncio.Future[T], timeout_s: float) -> T:
        """Return the answer. Raises an error if the client goes away or the time is over."""
        gone: asyncio.Future[Any] = asyncio.create_task(CALLER.get().until_gone())
        try:
            await asyncio.wait([answer, gone], timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                raise gone.result() if gone.done() else TimeoutError
            return answer.result()
        except TimeoutError:
            raise self.too_long() from None
        finally:
            gone.cancel()

    def close(self) -> None:
        """End the running queries, refuse the waiting ones, and close the connections."""
        with self._lock:
            self._is_closed = True
            for reader in self._readers:
                reader.is_closing = True
            waiting = self._waiting.clear()
        for task in waiting:
            task.settle(_shutting_down())
        self._threads.shutdown()
        for reader in self._readers:
            reader.conn.close()

    def _may_run(self, key: bytes) -> bool:
        return self._running[key] < READER_THREADS

    def _run_tasks(self, task: _Task | None) -> None:
        """Run the task, then waiting tasks until no key has one that may run."""
        while task:
            outcome = self._outcome(task)
            with self._lock:
                self._running[task.key] -= 1
                following: _Task | None = self._waiting.next(self._may_run)
                if following:
                    self._running[following.key] += 1
            task.settle(outcome)
            task = following

    @contextmanager
    def _reader(self) -> Iterator[Reader]:
        with self._lock:
            if self._is_closed:
                raise _shutting_down()
            if not self._free:
                self._readers.append(Reader(self._path))
                self._free.append(self._readers[-1])
            reader = self._free.pop()
        try:
            yield reader
        finally:
            with self._lock:
                self._free.append(reader)

    @property
    def running(self) -> int:
        return len(self._readers) - len(self._free)

    @property
    def waiting(self) -> int:
        with self._lock:
            return len(self._waiting)

    def too_long(self) -> ApiError:
        """Count a query that took longer than query_timeout_s; return the error for its client."""
        self.timeouts += 1
        reason = f"the query took longer than {self._timeout_s:g} s; narrow its time range or its filters"
        return ApiError("service_unavailable", reason, retry_after_s=1)

    def _outcome(self, task: _Task) -> object:
        try:
            with self._reader() as reader, _short_switches:
                return None if task.is_abandoned else reader.run(task.work, task=task)
        except TimeoutError as error:
            return _shutting_down() if self._is_closed else error
        except sqlite3.Error:
            log.exception("reading failed")
            return ApiError("database_error", "the events could not be read; the server's log says why")
        except Exception as error:
            return error


def _remove_folder(folder: str | None, process: int) -> None:
    """Remove a temporary database, except in a forked child of the process that made it."""
    if folder and os.getpid() == process:
        shutil.rmtree(folder, ignore_errors=True)


_QUICK_S = 0.001  # longest read on the event loop: all other requests wait for it
_QUICK_BYTES = 1_000_000  # longest row and answer of a read on the event loop
_TRIAL_PAUSE_S = 1.0  # between two trial commits after a failed commit


class Store:
    """One SQLite file with its Writer, its ReaderPool, and a quick reader for the event loop. Raises StartError.

    Call `insert`, `write` and `read` from an event loop, and `close` from any thread except the store's own.
    """

    def __init__(self, settings: Settings) -> None:
        folder = tempfile.mkdtemp(prefix="eventstore-") if settings.db == ":memory:" else None
        self.name = os.path.join(folder, "events.db") if folder else settings.db  # shown in messages
        self._process = os.getpid()
        self._remove_folder = weakref.finalize(self, _remove_folder, folder, self._process)  # at exit at the latest
        self.path = real_path(self.name)
        # A temporary file is removed at exit, so its commits need no sync.
        self.writer_pragmas = (*WRITER_PRAGMAS, "PRAGMA synchronous = OFF") if folder else WRITER_PRAGMAS
        self.events_at_start = prepare_file(self.name)
        self.environments: dict[str, int] = {}  # name -> id that rows hold
        self._is_closed = False
        self._trial_s = 0.0  # time of the last trial commit
        with start_errors(self.name):  # open connections here: if a thread failed to, its callers would wait forever
            self.writer = Writer(self.path, self.writer_pragmas, settings)
            self.add_environments(key.environment for key in settings.api_keys)
            self._quick_reader = Reader(self.path)
            self._quick_reader.conn.execute("PRAGMA busy_timeout = 0")  # the event loop must not wait for a lock
            self._quick_reader.conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, _QUICK_BYTES)
            self.readers = ReaderPool(self.path, settings.query_timeout_s)
        self.writer.start()

    def add_environments(self, names: Iterable[str]) -> None:
        """Create the environments that are new, and remember their ids. Raises sqlite3.Error.

        Do not call it from an event loop, because it waits for the write lock.
        """
        with closing(connect(self.path, self.writer_pragmas)) as conn:
            self.environments |= {name: environment_number(conn, name) for name in names}

    async def insert(self, rows: Sequence[Row]) -> int:
        """Store all rows or none. Return how many were new, after they are synced to disk (API: Sending events).

        Raises ApiError: service_unavailable if too many events wait or the store is closing, database_error if the
        commit failed.
        """
        return int(await self.writer.run(rows))

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        """Run an operation in a transaction. Its errors undo it alone. Raises its ApiErrors, and those of `insert`."""
        return self.writer.run(operation)

    async def read(self, operation: Callable[[sqlite3.Connection], T], quick: bool = True) -> T:
        """Run a reading operation. Each of its statements sees its own snapshot, unless it begins a transaction.

        A quick operation runs on the event loop first. If it takes longer than a millisecond, or a row of its answer is
        longer than a megabyte, it stops and runs again in a reader thread. If all pages used a reader thread, clients
        would get 0.8 times as many.

        Raises ApiError: service_unavailable if it takes longer than query_timeout_s, database_error if SQLite fails.
        """
        if quick and not self._is_closed:
            with suppress(TimeoutError, sqlite3.Error):
                return self._quick_reader.run(operation, _QUICK_S)
        return await self.readers.run(operation)

    async def failure(self) -> str | None:
        """Return why events cannot be stored, or None if they can. After a failed commit, make a trial commit first."""
        if self.writer.failure and monotonic_s() > self._trial_s + _TRIAL_PAUSE_S:
            self._trial_s = monotonic_s()
            with suppress(ApiError):
                await self.writer.try_again()
        return self.writer.failure

    def close(self) -> None:
        """End running queries, commit waiting requests, checkpoint and close the file.

        Does nothing in a second call, and in a forked child, which has a copy of this store without its threads.
        """
        if self._is_closed or os.getpid() != self._process:
            return
        self._is_closed = True
        self.readers.close()
        self._quick_reader.conn.close()
        self.writer.close()  # last: the last connection to close removes the WAL
        self._remove_folder()


# ---------------------------------------------------------------------------------------------- HTTP

_PUBLIC_PATHS = {"/", "/health", "/openapi.json"}


_LONG_ANSWER_BYTES = 65_536  # uvicorn's limit: above it, uvicorn waits for the client to read before it sends more
_PIECE_BYTES = 131_072  # of a long answer, sent at a time


class _Parts:
    """The parts of an answer that is JSON already. A long answer is not joined: memory would hold it twice."""

    def __init__(self, *parts: bytes | memoryview) -> None:
        self.parts = parts

    def __len__(self) -> int:
        return sum(map(len, self.parts))

    def pieces(self) -> Iterator[bytes]:
        for part in self.parts:
            for start in range(0, len(part), _PIECE_BYTES):
                yield bytes(memoryview(part)[start : start + _PIECE_BYTES])


class JsonResponse(Response):
    """A JSON answer. Its content is a value to encode, or bytes or _Parts that are JSON already."""

    media_type = "application/json"

    def render(self, content: object) -> Any:
        if isinstance(content, _Parts):
            return content if len(content) >= _LONG_ANSWER_BYTES else b"".join(content.parts)
        return content if isinstance(content, bytes) else ENCODER.encode(content)


def _request_line(scope: Scope) -> str:
    """Return the request's method and path for the log, escaped: some ASGI servers do not percent-encode raw_path."""
    return printable(f"{scope['method']} {scope.get('raw_path', b'').decode('latin-1')}")


CORS_HEADERS = [  # any page may call the API, because requests need a key and the API uses no cookies
    (b"access-control-allow-origin", b"*"), (b"access-control-allow-headers", b"*"),
    (b"access-control-allow-methods", b"GET, POST, PUT, DELETE, OPTIONS"), (b"access-control-max-age", b"86400"),
]  # fmt: skip
_MAX_IGNORED_CHARS = 1000  # longest value of the header X-Ignored


def _ignored_header(names: Iterable[str]) -> bytes:
    """List names for a header, percent-encoded. If some do not fit, the list ends in "..."."""
    encoded = [urllib.parse.quote(name, safe="[]", errors="replace") for name in names]
    sizes = itertools.accumulate(len(each) + 2 for each in encoded)
    fitting = [each for each, size in zip(encoded, sizes, strict=True) if size <= _MAX_IGNORED_CHARS][:_MAX_IGNORED]
    return ", ".join(fitting if len(fitting) == len(encoded) else [*fitting, "..."]).encode()


def _with_headers(scope: Scope, response: Response) -> Response:
    """Add the headers that every answer has (API: Common rules). An answer made by a program's middleware lacks them.

    A wrapper of `send` would also reach those answers, but single events would take 3 % longer.
    """
    scope["status"] = response.status_code  # for the access log, see eventstore_extras/logs.py
    response.raw_headers += CORS_HEADERS
    if "request_id" in scope:
        response.raw_headers.append((b"x-request-id", scope["request_id"].encode()))
    if ignored := scope.get("ignored"):
        response.raw_headers.append((b"x-ignored", _ignored_header(ignored)))
    return response


def error_response(request: Request, error: ApiError) -> Response:
    """Answer with the error body (API: Common rules), and log one line about the refusal."""
    answer = f"{error.status} {error.code}: {error.logged}"
    request.scope["status"] = error.status  # logs.py adds the status to the line
    log.warning("%s: %s", _request_line(request.scope), answer)
    return _with_headers(request.scope, JsonResponse(error.body, error.status, error.headers))


class Operation(NamedTuple):
    """A row of the route table, and what the OpenAPI document says about it."""

    method: str
    path: str
    handler: Callable[[Service, Request], Awaitable[Response]]
    answer: Any
    body: Any = None
    parameters: Iterable[str] = ()  # of the query string; names in openapi.PARAMETER_SCHEMAS, or a mapping to schemas
    example: Any = None  # of the body
    schemas: Mapping[str, Any] = {}  # type's name -> field -> JSON Schema, if the type does not imply it
    status: int = 200
    refusals: Sequence[int] = ()  # error statuses besides those that every operation may have
    role: str = ""  # a key with a role needs this one; for a GET always event_reader
    extra: str = ""  # module of eventstore_extras; its OPERATIONS have the complete row for this path

    @property
    def public_path(self) -> str:
        return self.path.replace(":anything}", "}")

    @property
    def is_public(self) -> bool:
        return self.path in _PUBLIC_PATHS

    @property
    def needed_role(self) -> str:
        return "event_reader" if self.method == "GET" else self.role

    def serves(self, path: str) -> bool:
        return compile_path(self.path)[0].fullmatch(path) is not None


class Outbox(Struct):
    """The target to which an environment's events are forwarded, and counts of these events.

    `behind()` counts in the database. Forwarding keeps the other fields up to date.
    """

    host: str
    behind: Callable[[], Awaitable[int]]  # number of events not yet accepted by the host (API: Monitoring)
    waiting: int = 0  # the same number, counted some seconds ago
    oldest_us: int = 0  # when the first waiting event was stored; 0 if none waits
    sent: int = 0  # events that the host has accepted, also from earlier runs
    put_aside: dict[str, int] = {}  # events that were not delivered, by reason, also in earlier runs
    blocked: str = ""  # why the host refuses all events until somebody corrects the settings; otherwise empty


class Retention(Struct):
    """The work of retention since the server started."""

    deleted: int = 0  # events
    swept_us: int = 0  # when the last finished search for old events began; 0 before the first


_REQUEST_ID = re.compile(rb"[\x20-\x7e]{1,128}")  # a caller's X-Request-ID that the answer and the log use


class Service:
    """The state that handlers share: the settings, the store, and additions of eventstore_extras."""

    def __init__(self, settings: Settings, operations: Sequence[Operation]) -> None:
        self.settings = settings
        self.api_keys = {key.digest: key for key in settings.api_keys}
        self.operations = tuple(operations)
        self.store = Store(settings)
        self.make_id = IdMaker()
        self._make_request_id = IdMaker()
        self.outboxes: dict[str, Outbox] = {}  # by environment
        self.retention: Retention | None = None
        self.tasks: list[Callable[[], Coroutine[Any, Any, None]]] = []  # cancelled when the server stops
        self.notices: list[str] = []  # lines to add to the banner
        self.wrappers: list[Callable[[ASGIApp], ASGIApp]] = []  # `serve` puts them around the application
        self.is_stopping: Callable[[], bool] = lambda: False  # whether the server is shutting down
        self.shares = Shares(settings.queue_bytes)  # of bodies in memory, and of answers that clients have not read
        # A commit answers several clients at once, so their next batches arrive together. This lock lets other requests
        # run between two batches: beside 8 such clients, p99 of a page is 19 ms; without the lock, 31 ms.
        self.batch_turn = Turn()
        self.page_turns: defaultdict[bytes, Turn] = defaultdict(Turn)  # by key, for long pages
        self._logged_minute, self._logged_names = 0, set[str]()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(task()) for task in self.tasks]
        yield
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=3)
        try:
            await asyncio.to_thread(self.store.close)
        except RuntimeError:  # the process is ending: it starts no more threads
            self.store.close()

    def replace_api_keys(self, api_keys: Sequence[ApiKey]) -> None:
        """Accept these keys and no others from now on. Do not call it from an event loop: see `add_environments`."""
        self.store.add_environments(key.environment for key in api_keys)
        self.api_keys = {key.digest: key for key in api_keys}

    def serves_exactly(self, method: str, path: str) -> bool:
        """Return True if a route without parameters has this path; a slash after the path is then dropped.

        For GET and HEAD the route must allow GET: `GET /v1/events/bulk/` looks up the event with the id `bulk/`.
        """
        methods = {operation.method for operation in self.operations if operation.path == path}
        return "GET" in methods if method in ("GET", "HEAD") else bool(methods)

    def request_id(self, sent: bytes | None) -> str:
        """Return the X-Request-ID that was sent, or a new ULID."""
        if sent is not None and _REQUEST_ID.fullmatch(sent):
            return sent.decode()
        return self._make_request_id(now_us(), "")

    def share_is_used(self) -> ApiError:
        reason = f"{self.shares.total} bytes of requests and unread answers are under way"
        reason = f"{reason}, the limit is {self.shares.limit}; read the answers, then try again"
        return ApiError("service_unavailable", reason, retry_after_s=1)

    def view(self, request: Request) -> View:
        now = self.settings.clock()
        lag_us = self.settings.visibility_lag_ms * 1000
        return View(request["environment"], now, now - lag_us if lag_us else None)

    def faults(self, request: Request, index: int | None = None, whole: str = "body") -> Faults:
        """Make the Faults of a request. The answer and the log list the ignored names that are recorded in it."""
        ignored = request.scope.setdefault("ignored", {})
        return Faults(index, whole, ignored, self.settings.strict and "environment" in request.scope)

    def log_ignored(self, scope: Scope) -> None:
        """Log a request's ignored names: each name once a minute per path, and at most twenty lines a minute."""
        minute = self.settings.clock() // MINUTE_US
        if minute != self._logged_minute:
            self._logged_minute, self._logged_names = minute, set()
        for name, why in scope["ignored"].items():
            line = f"{_request_line(scope)}: {quoted(name)}"
            if line not in self._logged_names and len(self._logged_names) < _MAX_IGNORED:
                self._logged_names.add(line)
                log.warning("%s is ignored, it %s", line, _why_ignored(name, why))


def _authenticate(service: Service, scope: Scope, caller: Caller) -> ApiError | None:
    """Find the environment of a request's key, or return a 401 (API: Common rules)."""
    key = caller.headers.get(b"x-api-key")
    # Look up the hash: the time that comparing keys takes would reveal how much of a guess is right.
    found = service.api_keys.get(hashlib.sha256(key or b"").digest())
    if key is not None and found is not None:
        scope["api_key"], scope["environment"] = found, found.environment
        caller.key = found.digest
        return None
    unknown = "holds a key that this server does not know; the server's banner says where its keys came from"
    instead = ", not in Authorization" if b"authorization" in caller.headers else ""
    problem = f"is missing: send your key in it{instead}" if key is None else unknown
    return ApiError("unauthorized", f"the header x-api-key {problem}")


async def read_body(service: Service, request: Request, limit: float = math.inf) -> bytes:
    """Return the body. Raises ApiError as soon as its length, its Content-Length or the key's share exceeds a limit."""
    limit = min(limit, service.settings.max_body_bytes)
    caller = CALLER.get()
    announced = int(caller.headers.get(b"content-length", 0))
    chunks: list[bytes] = []
    size = 0
    while max(size, announced) <= limit:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        if not service.shares.take(caller.key, len(chunks[-1]), own=size - len(chunks[-1])):
            reason = f"{service.shares.total} bytes of requests are under way, the limit is {service.shares.limit}"
            raise ApiError("service_unavailable", f"{reason}; nothing was stored, try again", retry_after_s=1)
        request.scope["held_bytes"] = size  # _Endpoint gives these shares back when the request ends
        if size <= limit and not message.get("more_body"):
            body = b"".join(chunks)
            if (body[:1] != b"{" or body[1:2] == b"\0") and _has_extras():  # UTF-16 begins with "{\0"
                _extra("encodings", "a body").refuse_encoded(request, body)
            return body
    got = max(size, announced)
    raise ApiError("validation_error", f"the body may be {limit} bytes long, got at least {got}; nothing was stored")


_MAX_FIELDS_BYTES = 1024 * 1024  # longest body of a request that sends no events


async def read_fields(service: Service, request: Request, decoder: msgspec.json.Decoder[T], faults: Faults) -> T:
    """Decode a body of at most 1 MiB. Record fields of the wrong type as faults, and unknown fields as ignored."""
    return decode_fields(decoder, await read_body(service, request, _MAX_FIELDS_BYTES), faults)


def parse_parameters(query_string: bytes, faults: Faults, repeatable: Iterable[str] = ()) -> dict[str, str]:
    """Parse a query string; join a repeatable parameter's values with commas. Raises ApiError if it is not UTF-8."""
    try:
        pairs = urllib.parse.parse_qsl(query_string.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        raise_fault("query string", "invalid_format", "must be UTF-8, percent-encoded")
    parameters: dict[str, str] = {}
    for name, value in pairs:
        if name in parameters and name not in repeatable:
            faults.add(printable(name[:MAX_ECHO_CHARS]), "invalid_format", "is given more than once")
        parameters[name] = f"{parameters[name]},{value}" if name in parameters else value
    return parameters


MAX_OFFSET = 2**53  # the largest integer that every JSON reader keeps exact


def parse_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,4000}", text):  # int() would accept "1_0" and " 1 ", and refuse 5,000 digits
        raise FieldError("invalid_type", f"must be an integer, got {quoted(text)}")
    return int(text)


def _parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise FieldError("invalid_type", f"must be true or false, got {quoted(text)}")
    return text.lower() in ("true", "1", "t")


def _time_parameter(text: str) -> str | None:
    """Read 10:00:00 05:30 as 10:00:00+05:30: in a URL an unencoded `+` means a space. Drop Go's zero time."""
    return given_time(re.sub(r" (?=\d\d:\d\d$)", "+", text))


def parse_property_filters(text: str) -> PropertyFilters:
    """Parse `key1:v1,v2;key2:v3`: OR within a key, AND between keys (API: Queries)."""
    filters: PropertyFilters = {}
    for part in text.split(";"):
        key, colon, values = part.partition(":")
        if not colon or not key:
            raise FieldError("invalid_format", f"must look like key1:v1,v2;key2:v3, got {quoted(part)}")
        filters[key] = [*(filters.get(key) or []), *values.split(",")]
    return filters


def one_of(*allowed: str, hint: str = "") -> Callable[[str], str]:
    """Make a case-sensitive check that a text is one of these."""

    def check(text: str) -> str:
        if text not in allowed:
            case = " (case-sensitive)" if text.lower() in map(str.lower, allowed) else ""
            raise FieldError("invalid_format", f"must be one of {', '.join(allowed)}{case}, got {quoted(text)}{hint}")
        return text

    return check


def whole_within(low: float, high: float) -> Callable[[float], int]:
    """Make a check that a number is whole and within these bounds. 50.0 counts as whole."""

    def check(value: float) -> int:
        if isinstance(value, float) and not (value.is_integer() and abs(value) <= MAX_OFFSET):
            raise FieldError("invalid_type", f"must be an integer, got {value}")
        if not low <= value <= high:
            limits = f"at most {high}" if low == -math.inf else f"{low} to {high}"
            raise FieldError("out_of_range", f"must be {limits}, got {str(int(value))[:MAX_ECHO_CHARS]}")
        return int(value)

    return check


_Parsers = dict[str, Callable[[str], Any]]
PARAMETER_PARSERS: _Parsers = {  # convert a parameter's text to the type of the same field in a body
    "start_time": _time_parameter, "end_time": _time_parameter, "property_filters": parse_property_filters,
    "page_size": parse_int, "offset": parse_int, "count_total": _parse_bool,
}  # fmt: skip


def query_of_parameters(
    kind: type[T], sent: Mapping[str, str], names: Iterable[str], faults: Faults, parsers: _Parsers = PARAMETER_PARSERS
) -> T:
    """Make the struct of a POST's body from the named parameters of a GET (API: Queries)."""
    parsed = kind()
    for name in names:
        if sent.get(name):  # in a URL an empty parameter is absent
            setattr(parsed, name, faults.check(name, parsers.get(name, str), sent[name]))
    return parsed


class _Endpoint:
    """ASGI application that answers one operation. Starlette would wrap a function, with 7 % fewer single events."""

    def __init__(self, service: Service, operation: Operation) -> None:
        self._service = service
        self.operation = operation
        self._parameters = tuple(operation.parameters)
        self._role = operation.needed_role
        self.path = operation.public_path  # for metrics.py and logs.py
        self.methods = ("GET", "HEAD") if operation.method == "GET" else (operation.method,)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        service, request = self._service, Request(scope, receive)
        key: ApiKey | None = scope.get("api_key")
        if key and key.role and key.role != self._role:
            needs = f"a key with the role {self._role}, or without a role" if self._role else "a key without a role"
            raise ApiError("permission_denied", f"this key has the role {key.role}; the request needs {needs}")
        if scope["query_string"] and self.path != "/":  # the page's own script reads these parameters
            sent = urllib.parse.parse_qsl(scope["query_string"].decode(errors="replace"), keep_blank_values=True)
            if unknown := [name for name, _ in sent if name not in self._parameters]:
                faults = service.faults(request)
                faults.ignore(unknown, self._parameters)
                faults.raise_any()
        try:
            response = await self.operation.handler(service, request)
        except asyncio.CancelledError:
            if not service.is_stopping():  # cancelled by the caller, such as by asyncio.timeout() in a test
                raise
            # Otherwise uvicorn would answer 500 in plain text.
            raise ApiError("service_unavailable", "the server is shutting down; try again", retry_after_s=1) from None
        finally:  # give back what read_body took
            service.shares.give_back(CALLER.get().key, scope.get("held_bytes", 0))
        await self._send(_with_headers(scope, response), scope, receive, send)

    async def _send(self, response: Response, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the answer. A long answer counts towards the key's share until the client has read most of it."""
        body, service, key = response.body, self._service, CALLER.get().key
        if len(body) < _LONG_ANSWER_BYTES:
            await response(scope, receive, send)
            return
        if not service.shares.take(key, len(body)):
            raise service.share_is_used()
        try:
            await send({"type": "http.response.start", "status": response.status_code, "headers": response.raw_headers})
            for piece in (body if isinstance(body, _Parts) else _Parts(body)).pieces():
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body", "body": b""})  # uvicorn waits here until the client reads
        finally:
            service.shares.give_back(key, len(body))


def _no_route(operations: Sequence[Operation], path: str) -> ApiError:
    """Make the 404 for an unknown path, with a hint at the likely cause and the list of paths."""
    paths = [operation.public_path for operation in operations]
    similar = "".join(difflib.get_close_matches(path[:MAX_ECHO_CHARS].lower(), paths, 1, 0.75))
    hint = ""
    if any(operation.serves(f"/v1{path}") for operation in operations):
        hint = f"the base URL ends in /v1: did you mean {quoted('/v1' + path)}? "
    elif path.startswith("/_mock") and not any(each.startswith("/_mock") for each in paths):
        hint = "this path needs a server that was started with --mock. "
    elif not _has_extras():
        hint = "meters, features and analytics need the folder eventstore_extras beside eventstore.py. "
    elif similar:
        methods = " or ".join(operation.method for operation in operations if operation.public_path == similar)
        hint = f"did you mean {methods} {similar}? "
    problem = f"no route {quoted(path)}: {hint}"
    refusal = ApiError("not_found", f"{problem}this server has {', '.join(dict.fromkeys(paths))}")
    refusal.logged = f"{problem}the answer lists the routes"
    return refusal


# Starlette's `path` convertor stops at a line break; ids may contain one.
register_url_convertor("anything", type("AnythingConvertor", (PathConvertor,), {"regex": "(?s:.*)"})())


class Routes(BaseRoute):
    """The operations of a service. A dictionary holds the paths without parameters.

    Trying the patterns of these paths one after another would take 5 % of the time of a single event.
    """

    def __init__(self, service: Service, operations: Iterable[Operation]) -> None:
        self._service = service
        anything_last = sorted(operations, key=lambda operation: ":anything}" in operation.path)
        self._endpoints = [(compile_path(each.path)[0], _Endpoint(service, each)) for each in anything_last]
        fixed = [endpoint for pattern, endpoint in self._endpoints if not pattern.groups]
        self._fixed = {(method, endpoint.path): endpoint for endpoint in fixed for method in endpoint.methods}

    def matches(self, scope: Scope) -> tuple[Match, Scope]:
        return (Match.FULL if scope["type"] == "http" else Match.NONE), {}

    async def handle(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = scope["path"].removeprefix(scope.get("root_path", ""))  # not empty if a program mounts the application
        scope["path_params"] = {}
        scope["endpoint"] = self._fixed.get((scope["method"], path)) or self._match(scope, path)
        await scope["endpoint"](scope, receive, send)

    def _match(self, scope: Scope, path: str) -> _Endpoint:
        """Return the first endpoint whose pattern and method match. Raises ApiError."""
        method = scope["method"]
        matches = [(endpoint, found) for pattern, endpoint in self._endpoints if (found := pattern.fullmatch(path))]
        for endpoint, found in matches:
            if method in endpoint.methods:
                scope["path_params"] = found.groupdict()
                return endpoint
        scope["endpoint"] = nearest = matches[0][0] if matches else None  # metrics.py and logs.py use its path
        # Answer POST /v1/events/xyz with 404: the path is probably a typo, not an event's id.
        if nearest is None or (method == "POST" and ":anything}" in nearest.operation.path):
            raise _no_route(self._service.operations, path)
        methods = {each for other, _ in matches if other.path == nearest.path for each in other.methods}
        allowed = ", ".join(sorted(methods))
        refusal = ApiError("method_not_allowed", f"{method} is not allowed here; allowed: {allowed}")
        refusal.headers["Allow"] = allowed
        raise refusal


async def _on_exception(request: Request, error: Exception) -> Response:
    # After this answer Starlette raises all exceptions but ApiErrors again, so that uvicorn logs the traceback.
    return error_response(request, error if isinstance(error, ApiError) else _internal_error())


async def _on_disconnect(request: Request, error: Exception) -> None:
    log.warning("%s: the client went away before its request was complete", _request_line(request.scope))


class _App(Starlette):
    """The application. It gives each request an id, and finds the environment of the request's key."""

    def __init__(self, service: Service, **options: Any) -> None:
        super().__init__(exception_handlers=EXCEPTION_HANDLERS, lifespan=service.lifespan, **options)
        self.state.service = self._service = service
        self.router.redirect_slashes = False  # many clients drop a POST's body when they follow a redirect

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await super().__call__(scope, receive, send)
            return
        service, caller = self._service, Caller(scope, receive)
        before = CALLER.set(caller)
        scope["request_id"] = service.request_id(caller.headers.get(b"x-request-id"))
        scope["start_s"] = time.perf_counter()
        path = scope["path"]
        if path[-1:] == "/" and service.serves_exactly(scope["method"], path[:-1]):
            path = scope["path"] = path[:-1]
        try:
            if scope["method"] == "OPTIONS":
                await _with_headers(scope, Response())(scope, receive, send)
            elif path not in _PUBLIC_PATHS and (refusal := _authenticate(service, scope, caller)):
                await error_response(Request(scope), refusal)(scope, receive, send)
            else:
                await super().__call__(scope, receive, send)
                if scope.get("ignored") and not service.settings.strict:  # if strict, the refusal is logged already
                    service.log_ignored(scope)
        finally:
            CALLER.reset(before)  # a program that calls the application directly continues in this context


EXCEPTION_HANDLERS: dict[Any, Any] = {
    ClientDisconnect: _on_disconnect, ApiError: _on_exception, Exception: _on_exception
}  # fmt: skip

# ---------------------------------------------------------------------------------------------- Ingest

MAX_BATCH = 1000
MAX_FIELD_CHARS = 1024  # ids and names are copied into up to two indexes
MAX_PROPERTY_DEPTH = 500  # SQLite's JSON functions fail at 1000: one such event would make every property filter fail
# msgspec holds the GIL for a whole call, which stops the event loop. These limits keep a call below 0.2 s.
_MANY_BYTES = 1_000_000  # _MAX_WEIGHT and _MAX_MARKS apply to longer properties and batches only
_MAX_WEIGHT = 5_000_000  # of an event's properties: the sum of the weights of all marks and names
_WEIGHTS = {b"{": 10, b"[": 10, b",": 2, b"\\": 1}
_NAME_WEIGHT = 20  # msgspec takes 0.4 us for each of a million different names in an object
_QUOTES, _COLONS = {b'"': 1, b'\\"': -1, b'\\\\"': 1}, {b":": 1}  # quotes minus escaped ones
_MAX_MARKS = 8_000_000  # of _MARKS in a batch
_MARKS = {b",": 1, b"{": 1, b"[": 1}
_LARGE_EVENT_BYTES, _LARGE_BATCH_BYTES = 100_000, 1_000_000  # decode longer bodies in a thread
_LARGE_BATCH_COLLECTIONS = 20_000  # decode a batch with more objects and arrays in a thread: 1 MB takes up to 0.5 s
_MAX_DOUBLE_DIGITS = 309  # digits of the largest 64-bit float, 1.8e308
_DIGITS_AS_ZEROS = bytes.maketrans(b"123456789", b"0" * 9)
_MAX_BRACES = 100_000  # in a batch that is decoded into a list without a limit: 150 bytes for each
_MAX_COMMAS = 200_000  # do not count the events of a refused batch that has more: 100 ns for each


# forbid_unknown_fields makes msgspec report unknown fields, so that X-Ignored and the log can list them.
class EventIn(Struct, forbid_unknown_fields=True):
    """One event as a client sends it (API: Sending events). An absent field, null and, for text, "" mean the same."""

    event_name: str | None = None
    external_customer_id: str | None = None
    event_id: str | None = None
    customer_id: str | None = None
    source: str | None = None
    timestamp: str | None = None
    properties: Raw = msgspec.field(default_factory=Raw)  # a JSON Schema cannot contain Raw() as a default


class BulkIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/events/bulk (API: Sending events)."""

    events: _batch_of(EventIn)  # type: ignore[valid-type]


class EventAccepted(Struct):
    """The answer to POST /v1/events."""

    message: str
    event_id: str


class BulkAccepted(Struct):
    """The answer to POST /v1/events/bulk."""

    message: str


_EVENT = msgspec.json.Decoder(EventIn)
_RAWS = msgspec.json.Decoder(list[Raw])  # without the limit of _RAW_ITEMS, to count the events of a refused batch
_BULK = msgspec.json.Decoder(BulkIn)
_TOO_LARGE = "holds a number that no 64-bit float can hold"


def _check_integer(digits: str) -> None:
    """Raises FieldError if the integer is too large for a double; msgspec accepts up to 4,300 digits."""
    if math.isinf(float(digits)):
        raise FieldError("out_of_range", _TOO_LARGE)


def _without_repeated_keys(text: str) -> str:
    """Return the JSON text with only the last member of each name: JSON readers use the last one, SQLite the first.

    Numbers keep their digits; white space and escapes may change. Return the text unchanged if no name is repeated.
    """
    is_repeated = False

    def join(members: list[tuple[str, Any]]) -> dict[str, Any]:
        nonlocal is_repeated
        joined = dict(members)
        is_repeated = is_repeated or len(joined) < len(members)
        return joined

    def keep_digits(number: str) -> Raw:
        return Raw(number.encode())

    value = json.loads(text, object_pairs_hook=join, parse_int=keep_digits, parse_float=keep_digits)
    return ENCODER.encode(value).decode() if is_repeated else text


def _is_deeper_than(value: object, limit: int) -> bool:
    level: list[Any] = [value]
    while level and limit >= 0:
        limit -= 1
        # A generator takes a tenth of the time of a list of views, which the garbage collector would walk repeatedly.
        inside = (each.values() if type(each) is dict else each for each in level if type(each) in (dict, list))
        level = list(itertools.chain.from_iterable(inside))
    return bool(level)


def _totals(raw: bytes, *kinds: Mapping[bytes, int]) -> Iterator[list[int]]:
    """Yield after each megabyte of the text: for each kind, the total weight of its marks so far."""
    totals = [0] * len(kinds)
    for start in range(0, len(raw), _MANY_BYTES):
        for kind, marks in enumerate(kinds):
            totals[kind] += sum(raw.count(mark, start, start + _MANY_BYTES) * marks[mark] for mark in marks)
        yield totals


def _check_number_of_values(raw: bytes) -> None:
    """Raises FieldError if properties hold so many values that decoding them would take too much memory and time."""
    if len(raw) > _MANY_BYTES:
        for weight, quotes, colons in _totals(raw, _WEIGHTS, _QUOTES, _COLONS):
            if weight + _NAME_WEIGHT * min(quotes // 2, colons) > _MAX_WEIGHT:  # an upper bound of the number of names
                limit = f"{_MAX_WEIGHT // 10:,} objects and arrays if longer than {_MANY_BYTES:,} bytes"
                weights = "a name counts as two, five commas or ten backslashes as one"
                raise FieldError("out_of_range", f"may hold {limit}, got more; {weights}")


def _double(number: str) -> float:
    """Parse a number with a fraction or an exponent. msgspec's own parser takes 10 us for 1e300: a second for 1 MB."""
    value = float(number)
    if math.isinf(value):
        raise ValueError("out of range")
    return value


_OBJECT = msgspec.json.Decoder(dict[str, Any], float_hook=_double)


def check_properties(raw: bytes) -> str:
    """Return the JSON text of an event's properties. If a name is repeated, keep its last member only.

    Raises FieldError if the properties are not an object, have more than 500 levels, hold a number that no double can
    hold, or hold too many values.
    """
    text = str(raw, "utf-8")
    if text in ("", "null"):
        return "{}"
    if len(text) > _MANY_BYTES // 4:
        _check_number_of_values(bytes(raw))
    try:
        value = _OBJECT.decode(raw)
    except msgspec.ValidationError as error:
        if "out of range" in str(error):
            raise FieldError("out_of_range", _TOO_LARGE) from None
        raise FieldError("invalid_type", f"must be an object, got {excerpt(raw)}") from None
    except RecursionError:
        raise FieldError("out_of_range", f"is nested deeper than {MAX_PROPERTY_DEPTH} levels") from None
    except msgspec.DecodeError as error:
        reason = "half of a \\u surrogate pair" if "truncated" in str(error) else str(error)
        raise FieldError("invalid_format", f"is not valid JSON: {reason}") from None
    if len(text) > _MAX_DOUBLE_DIGITS:
        if len(text) > 2 * MAX_PROPERTY_DEPTH and _is_deeper_than(value, MAX_PROPERTY_DEPTH):
            raise FieldError("out_of_range", f"is nested deeper than {MAX_PROPERTY_DEPTH} levels")
        if b"0" * _MAX_DOUBLE_DIGITS in bytes(raw).translate(_DIGITS_AS_ZEROS):
            json.loads(ENCODER.encode(value), parse_int=_check_integer)
    # Find repeated names by counting colons: decoding keeps only the last member of a name, so the text has more colons
    # than the value. A colon in a string counts in both, unless the string spells it \u003a.
    colons = text.count(":")
    if colons == len(value) or (ENCODER.encode(value).count(b":") == colons and r"\u003" not in text):
        return text
    return _without_repeated_keys(text)


def event_row(event: EventIn, environment: int, now: int, make_id: IdMaker, faults: Faults) -> Row:
    """Make the row of an event, and record its faults. With a fault the row is not valid."""
    sent_name, customer, event_id = event.event_name or "", event.external_customer_id or "", event.event_id or ""
    customer_id, source = event.customer_id or "", event.source or ""
    if len(sent_name) + len(customer) + len(event_id) + len(customer_id) + len(source) > MAX_FIELD_CHARS:
        for field in ("event_name", "external_customer_id", "event_id", "customer_id", "source"):
            length = len(getattr(event, field) or "")
            if length > MAX_FIELD_CHARS:
                faults.add(field, "out_of_range", f"may have {MAX_FIELD_CHARS:,} characters, got {length:,}")
    event_name = sent_name.strip()
    if not event_name:
        faults.add("event_name", "required", "is required")
    if not customer:
        faults.add("external_customer_id", "required", "is required")
    timestamp_us = faults.check("timestamp", parse_time, event.timestamp)
    timestamp_us = now if timestamp_us is None or timestamp_us == MIN_TIME_US else timestamp_us
    properties = faults.check("properties", check_properties, event.properties) or "{}"
    event_id = event_id or make_id(now)
    return Row(environment, event_id, customer, customer_id, event_name, source, timestamp_us, now, properties)


def event_rows(
    service: Service, events: list[Any], environment: str, faults: Faults, *, bulk: bool, make_id: IdMaker | None = None
) -> list[Row]:
    """Make the rows of events; first decode those that are still Raw. Raises ApiError with the faults of all events."""
    number, now = service.store.environments[environment], service.settings.clock()
    make_id = make_id or service.make_id
    rows = []
    for index, event in enumerate(events):
        faults.index = index
        if isinstance(event, Raw):
            events[index] = _decode_members(EventIn, event, faults)
        rows.append(event_row(events[index], number, now, make_id, faults))
    faults.raise_any(events, bulk)
    return rows


_UNKNOWN_FIELD = re.compile(r"Object contains unknown field `([\w.-]{1,100})` - at `\$\.events\[(\d+)\]`")
_MAX_LEARNED = 64  # names of unknown fields that _decode_with_unknown_fields learns from one batch


@lru_cache(maxsize=4 * _MAX_LEARNED)
def _batch_decoder(unknown: tuple[str, ...]) -> Any:
    """Make a decoder of a batch whose events may have these unknown fields."""
    fields = [(f"unknown_{i}", Raw, msgspec.field(default=Raw(), name=name)) for i, name in enumerate(unknown)]
    event: Any = msgspec.defstruct("Event", fields, bases=(EventIn,), forbid_unknown_fields=True)
    return msgspec.json.Decoder(msgspec.defstruct("Batch", [("events", list[event])], forbid_unknown_fields=True))


def _decode_with_unknown_fields(body: bytes, faults: Faults) -> list[Any]:
    """Decode a batch whose events have unknown fields, and record these. Return [] if anything else is unusual.

    Learn the names one by one from msgspec's errors, and allow them in the next attempt. If each event has the same
    unknown field, the batch costs 1.06 times as much as a plain one; decoding each event alone would cost 4 times.
    """
    unknown: list[str] = []
    decoded = 0  # events that failed attempts have decoded; a limit on them limits the work
    while len(unknown) <= _MAX_LEARNED and decoded <= 2 * MAX_BATCH:
        try:
            events: list[Any] = _batch_decoder(tuple(unknown)).decode(body).events
        except (msgspec.DecodeError, RecursionError) as error:
            found = _UNKNOWN_FIELD.fullmatch(str(error))
            if not found or found[1].casefold() in EventIn.__struct_fields__:
                return []
            unknown.append(found[1])
            decoded += int(found[2])
        else:
            faults.ignore(unknown, EventIn.__struct_fields__)
            return events if len(events) <= MAX_BATCH else []
    return []


def _split_batch(body: bytes, faults: Faults) -> list[Any]:
    """Return the events of a batch as Raws. Raises ApiError unless the batch has 1 to 1000 events."""
    faults.whole = "body"
    if (outer := _read_members(BulkIn, body, faults)) is None:
        raise_fault("body", "invalid_type", f'must be an object like {{"events": [...]}}, got {excerpt(body)}')
    faults.whole = "event"
    events = bytes(outer.get("events", b"null"))
    if raws := _items_of(decode(_RAW_ITEMS, events)):
        return raws
    if events == b"null":
        raise_fault("events", "required", f"is required: an array of 1 to {MAX_BATCH} events")
    if events[:1] != b"[":
        raise_fault("events", "invalid_type", f"must be an array of 1 to {MAX_BATCH} events, got {excerpt(events)}")
    counted = decode(_RAWS, events) if events.count(b",") < _MAX_COMMAS else None
    number = f"more than {MAX_BATCH}" if counted is None else len(counted)
    raise_fault("events", "out_of_range", f"must hold 1 to {MAX_BATCH} events, got {number}")


def decode_batch(body: bytes, faults: Faults) -> list[Any]:
    """Decode a batch into EventIns. An event with an unusual field stays a Raw, which `event_rows` decodes.

    A field is unusual if its type is wrong or its name is in another case. Raises ApiError if the body is not a batch
    (API: A batch).
    """
    batch = decode(_BULK, body)
    events = _items_of(batch and batch.events)
    if not events and body.count(b"{") <= _MAX_BRACES:  # needed because the list is not limited to 1000 structs
        events = _decode_with_unknown_fields(body, faults)
    return events or [decode(_EVENT, bytes(raw)) or raw for raw in _split_batch(body, faults)]


async def _insert(service: Service, rows: list[Row], answer: object) -> Response:
    """Store the rows. Answer with 202, and the numbers of new events and of duplicates in headers."""
    inserted = await service.store.insert(rows)
    response = JsonResponse(answer, 202)
    duplicates = len(rows) - inserted
    response.raw_headers += [(b"x-events-inserted", b"%d" % inserted), (b"x-events-duplicate", b"%d" % duplicates)]
    return response


def _body_rows(
    service: Service, request: Request, body: bytes, bulk: bool, make_id: IdMaker | None = None
) -> list[Row]:
    faults = service.faults(request, whole="event")
    if len(body) > _MANY_BYTES:
        if bulk and any(marks > _MAX_MARKS for (marks,) in _totals(body, _MARKS)):
            limit = f"{_MAX_MARKS:,} commas and opening braces and brackets if longer than {_MANY_BYTES:,} bytes"
            raise_fault("body", "out_of_range", f"may hold {limit}, got more")
        if not bulk and b'"properties"' in body:
            faults.check("properties", _check_number_of_values, body)
            faults.raise_any()
    events: list[Any] = decode_batch(body, faults) if bulk else [decode(_EVENT, body) or Raw(body)]
    request.scope["events"] = len(events)  # for metrics.py
    return event_rows(service, events, request["environment"], faults, bulk=bulk, make_id=make_id)


async def _large_body_rows(service: Service, request: Request, body: bytes, bulk: bool) -> list[Row]:
    """Decode and check in a thread, so that the event loop runs between msgspec's calls."""
    async with service.batch_turn:
        make_id = IdMaker()  # the service's own is not safe for threads
        return await asyncio.to_thread(_body_rows, service, request, body, bulk, make_id)


async def ingest_event(service: Service, request: Request) -> Response:
    """POST /v1/events (API: Sending events)."""
    body = await read_body(service, request)
    if len(body) > _LARGE_EVENT_BYTES:
        with _short_switches:
            rows = await _large_body_rows(service, request, body, bulk=False)
    else:
        rows = _body_rows(service, request, body, bulk=False)
    return await _insert(service, rows, EventAccepted("Event accepted for processing", rows[0].id))


async def ingest_events_bulk(service: Service, request: Request) -> Response:
    """POST /v1/events/bulk (API: Sending events)."""
    body = await read_body(service, request)
    with _short_switches:
        if len(body) > _LARGE_BATCH_BYTES or body.count(b"{") + body.count(b"[") > _LARGE_BATCH_COLLECTIONS:
            rows = await _large_body_rows(service, request, body, bulk=True)
        else:
            async with service.batch_turn:
                await asyncio.sleep(0)  # let other requests run between two batches
                rows = _body_rows(service, request, body, bulk=True)
        return await _insert(service, rows, BulkAccepted("Events accepted for processing"))


# ---------------------------------------------------------------------------------------------- Queries

SORTS = ("timestamp", "event_name")
ORDERS = ("desc", "asc")
MAX_FILTER_VALUES = 1000
MAX_FILTER_KEYS = 50
MAX_PAGE_SIZE = 100_000
_GET_PAGE_SIZE = 50
_QUICK_PAGE_SIZE = 500  # a larger page takes longer than _QUICK_S
_SHORT_PAGE_SIZE, _SHORT_PAGE_BYTES = 10_000, 8_000_000  # a longer page is made when its key has room for it
_MAX_PAGE_BYTES = 128 * 1024 * 1024
_FILTER_COLUMNS = {"external_customer_id": "external_customer_id", "event_name": "event_name", "event_id": "id",
                   "source": "source"}  # fmt: skip
EVENT_FILTERS = (*_FILTER_COLUMNS, "start_time", "end_time", "property_filters")


class EventQueryIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/events/query; GET /v1/events has the same parameters (API: Queries)."""

    external_customer_id: str | None = None
    event_name: str | None = None
    event_id: str | None = None
    source: str | None = None
    start_time: str | None = None
    end_time: str | None = None
    property_filters: PropertyFilters | None = None
    page_size: int | float | None = None
    offset: int | float | None = None
    sort: str | None = None
    order: str | None = None
    count_total: bool | None = None
    iter_first_key: str | None = None
    iter_last_key: str | None = None


class Event(Struct):
    """One stored event in an answer (API: Queries). _EVENT_JSON writes its fields in this order."""

    id: str
    external_customer_id: str
    customer_id: str
    event_name: str
    source: str
    timestamp: datetime
    ingested_at: datetime
    properties: dict[str, Any]
    environment_id: str


class EventPage(Struct, kw_only=True):
    """One page of events, with the cursors of its first and last event (API: Queries)."""

    events: Raw  # a list[Event]
    has_more: bool
    iter_first_key: str | None
    iter_last_key: str | None
    total_count: int | UnsetType | None = UNSET  # absent in the answer to a GET without count_total
    offset: int | None  # of the next page; null for a page by cursor


class EventQuery(Selection, frozen=True, kw_only=True):
    """A checked query with every default filled in, from a GET or a POST (API: Queries)."""

    page_size: int
    offset: int
    by_name: bool
    descending: bool
    after: Cursor | None
    before: Cursor | None
    count: bool | None  # None: leave total_count out of the answer

    @property
    def cursor(self) -> Cursor | None:
        return self.after or self.before

    @property
    def spans_names(self) -> bool:
        """True if sorting by name differs from sorting by time."""
        return self.by_name and "event_name" not in self.filters

    @property
    def reads_back(self) -> bool:
        """True if the page ends before its cursor. An ascending page begins after either cursor, as in FlexPrice."""
        return self.descending and self.before is not None


_EVENT_QUERY = msgspec.json.Decoder(EventQueryIn)
_check_sort = one_of(*SORTS, hint=f"; send the direction in order: {' or '.join(ORDERS)}")
check_order = one_of(*ORDERS)
check_offset, _check_page_size = whole_within(0, MAX_OFFSET), whole_within(-math.inf, MAX_PAGE_SIZE)


def check_filter_limits(field: str, filters: Sequence[Sequence[str]], faults: Faults) -> None:
    """Record a fault if filters have too many keys or values. Each value becomes one SQL parameter."""
    number = sum(map(len, filters))
    if number > MAX_FILTER_VALUES or len(filters) > MAX_FILTER_KEYS:
        limits = f"{MAX_FILTER_KEYS} keys and {MAX_FILTER_VALUES} values"
        faults.add(field, "out_of_range", f"may hold {limits}, got {len(filters)} keys and {number} values")


def check_property_filters(field: str, sent: PropertyFilters | None, faults: Faults) -> dict[str, list[str]]:
    """Return the filters that have values. Ignore a key without values, as FlexPrice does (API: Queries)."""
    filters = {key: values for key, values in (sent or {}).items() if values}
    if sent and "" in sent:
        faults.add(field, "invalid_format", "has an empty key")
    check_filter_limits(field, [values or [] for values in (sent or {}).values()], faults)
    return filters


def event_query(sent: EventQueryIn, view: View, faults: Faults) -> EventQuery:
    """Check a query and fill in its defaults. Raises ApiError with every fault recorded so far (API: Queries)."""
    start_us, end_us = time_range(sent.start_time, sent.end_time, view.now_us, faults)
    after = faults.check("iter_last_key", parse_cursor, sent.iter_last_key)
    before = faults.check("iter_first_key", parse_cursor, sent.iter_first_key)
    if after and before:
        faults.add("iter_first_key", "invalid_format", "and iter_last_key exclude each other: send one of them")
    if (after or before) and sent.offset:
        faults.ignore(["offset"])
    sort = faults.check("sort", _check_sort, sent.sort) or "timestamp"
    order = faults.check("order", check_order, sent.order) or "desc"
    offset = faults.check("offset", check_offset, sent.offset) or 0
    page_size = faults.check("page_size", _check_page_size, sent.page_size) or 0
    property_filters = check_property_filters("property_filters", sent.property_filters, faults)
    faults.raise_any()
    return EventQuery(
        view=view, start_us=start_us, end_us=end_us, property_filters=property_filters,
        filters={column: value for name, column in _FILTER_COLUMNS.items() if (value := getattr(sent, name))},
        page_size=page_size if page_size > 0 else 50, offset=offset,
        by_name=sort == "event_name", descending=order == "desc", after=after, before=before, count=sent.count_total,
    )  # fmt: skip


def _time_sql(column: str) -> str:
    """Build the expression that formats a time as Go does: 2026-01-01T00:00:00.25Z.

    Offset to year 1: integer division truncates toward zero and would round times before 1970 up. Formatting times is
    half the cost of a page, and datetime() with replace() takes half as long as strftime().
    """
    since_year_1 = f"({column} - {MIN_TIME_US})"
    seconds = f"{since_year_1} / 1000000 + {MIN_TIME_US // 1000000}"
    digits = f"substr(1000000 + {since_year_1} % 1000000, 2)"
    return f"replace(rtrim(rtrim(datetime({seconds}, 'unixepoch') || '.' || {digits}, '0'), '.') || 'Z', ' ', 'T')"


# An Event as JSON. If Python encoded a struct for each event, a page would take 1.3 times as long over HTTP. To copy
# the properties unchanged, remove json_object's closing brace, append the properties, and close the object with :end.
_EVENT_JSON = f"""rtrim(json_object('id', id, 'external_customer_id', external_customer_id, 'customer_id', customer_id,
    'event_name', event_name, 'source', source, 'timestamp', {_time_sql("timestamp_us")},
    'ingested_at', {_time_sql("ingested_at_us")}), '}}') || ',"properties":' || properties || :end"""
_SINCE_START, _UNTIL_END = "timestamp_us >= :start_us", "timestamp_us <= :end_us"


def in_range(query: Selection) -> Sql:
    return sql(f"{_SINCE_START} AND {_UNTIL_END}", start_us=query.start_us, end_us=query.end_us)


def after_cursor(query: EventQuery, cursor_name: str, descending: bool) -> Sql:
    """Build the condition for the range of time and the cursor. `descending` is the direction of reading."""
    whole, cursor = in_range(query), query.cursor
    if cursor is None:
        return whole
    comparison = "<" if descending else ">"
    parts = whole, sql("", cursor_us=cursor.timestamp_us, cursor_id=cursor.id, cursor_name=cursor_name)
    if query.by_name and cursor_name != query.filters.get("event_name"):
        keyset = f"(event_name, timestamp_us, id) {comparison} (:cursor_name, :cursor_us, :cursor_id)"
        return sql(f"{whole} AND {keyset}", *parts)
    # Emit only the tighter bound; otherwise SQLite may seek on the looser one and scan everything before a deep page.
    keyset = f"(timestamp_us, id) {comparison} (:cursor_us, :cursor_id)"
    if descending:
        return sql(f"{_SINCE_START} AND {keyset if cursor.timestamp_us <= query.end_us else _UNTIL_END}", *parts)
    return sql(f"{keyset if cursor.timestamp_us >= query.start_us else _SINCE_START} AND {_UNTIL_END}", *parts)


def _count_statement(query: Selection) -> Sql:
    where = all_of([matching(query), in_range(query)])
    return sql(f"SELECT count(*) FROM events {index_of(query.filters)} WHERE {where}", where)


def _page_statement(query: EventQuery, cursor_name: str = "") -> Sql:
    """Build the statement for a page and one more row. If the query reads back, the rows are in reverse order.

    Each row holds an event as JSON and the total count, which is NULL unless the query asks for it.
    """
    descending = query.descending and not query.reads_back
    where = all_of([matching(query), after_cursor(query, cursor_name, descending)])
    direction = "DESC" if descending else "ASC"
    columns = ("event_name", "timestamp_us", "id") if query.spans_names else ("timestamp_us", "id")
    order = ", ".join(f"{column} {direction}" for column in columns)
    # Sort one customer's events by name with the index by customer: the index by name would scan all customers' events.
    index = index_of([*query.filters, *(["event_name"] if query.spans_names else [])])
    total = _count_statement(query) if query.count else Sql("NULL", {})
    page = f"FROM events {index} WHERE {where} ORDER BY {order} LIMIT :limit OFFSET :offset"
    if query.filters or query.spans_names:
        # The index lacks the id, so SQLite sorts the events of one microsecond. Choose the page's rows first: if SQLite
        # made the JSON of 5,000 such events, the page would take 4 times as long. CROSS JOIN keeps the rows in order.
        page = f"FROM (SELECT seq AS page_seq {page}) CROSS JOIN events ON seq = page_seq"
    text = f"SELECT {_EVENT_JSON} AS event, ({total}) AS total {page}"
    end = f',"environment_id":{ENCODER.encode(query.view.environment).decode()}}}'
    return sql(text, where, total, end=end, limit=query.page_size + 1, offset=0 if query.cursor else query.offset)


def _name_at(conn: sqlite3.Connection, query: EventQuery, cursor: Cursor) -> str:
    """With sort=event_name a cursor also needs its event's name; look it up."""
    statement = f"SELECT event_name FROM events WHERE {IN_ENVIRONMENT} AND id = :id"
    row = conn.execute(statement, {"environment": query.view.environment, "id": cursor.id}).fetchone()
    if row is None:
        problem = f"must name a stored event if sort is event_name, got {quoted(cursor.id)}"
        problem += ": if the event was deleted, start again without a cursor"
        raise_fault("iter_first_key" if query.before else "iter_last_key", "invalid_format", problem)
    return str(row[0])


class _Position(Struct):
    """The fields of an event's JSON that its cursor needs."""

    id: str
    timestamp: datetime


_POSITION = msgspec.json.Decoder(_Position)  # made at import: made under freezegun, it would refuse all times
_SEPARATOR = b"\x1e"  # between events; JSON never contains this character unescaped


def _cursor_at(events: bytes, start: int) -> str:
    """Return the text of the cursor of the event that starts there."""
    end = events.index(b',"properties":', start)  # in a text, the quotes would be escaped
    position = _POSITION.decode(events[start:end] + b"}")
    return Cursor(to_us(position.timestamp), position.id).text


class _Page(NamedTuple):
    events: bytes  # as JSON, with a _SEPARATOR between them
    number: int
    has_more: bool
    total: int | None


class _TooLongError(Exception):
    """A page is longer than it may be now."""


def _cut_page(conn: sqlite3.Connection, statement: Sql, page_size: int, limit: int) -> _Page:
    """Return a page that ends before `limit` bytes. It has at least one event, however long."""
    events: list[bytes] = []
    size, total = 0, None
    for event, total in conn.execute(f"SELECT CAST(event AS BLOB), total FROM ({statement})", statement.values):
        size += len(event)
        if events and (len(events) == page_size or size > limit):
            return _Page(_SEPARATOR.join(events), len(events), True, total)
        events.append(event)
    return _Page(_SEPARATOR.join(events), len(events), False, total)


def _fetch_page(conn: sqlite3.Connection, statement: Sql, page_size: int, limit: int, cut: bool) -> _Page:
    """Return the events of _page_statement, fetched as one text. Cut it at `limit` bytes, or raise _TooLongError.

    sqlite3 releases the GIL at every row: fetched row by row, a page of 50 takes the server 1.15 times as long.
    """
    usual_bytes = conn.getlimit(sqlite3.SQLITE_LIMIT_LENGTH)
    conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, min(usual_bytes, limit))
    try:
        joined = f"SELECT CAST(group_concat(event, char(30)) AS BLOB), count(*), max(total) FROM ({statement})"
        events, number, total = conn.execute(joined, statement.values).fetchone()
    except sqlite3.DataError:  # the text is too long
        if usual_bytes < limit:  # the caller repeats the query in a reader thread
            raise
        if not cut:
            raise _TooLongError from None
    else:
        if number > page_size:
            return _Page(events[: events.rindex(_SEPARATOR)], page_size, True, total)
        return _Page(events or b"", number, False, total)
    finally:
        conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, usual_bytes)
    return _cut_page(conn, statement, page_size, limit)


def _select_page(conn: sqlite3.Connection, query: EventQuery, limit: int, cut: bool) -> _Page:
    cursor_name = _name_at(conn, query, query.cursor) if query.cursor and query.by_name else ""
    page = _fetch_page(conn, _page_statement(query, cursor_name), query.page_size, limit, cut)
    if query.reads_back:
        page = page._replace(events=_SEPARATOR.join(page.events.split(_SEPARATOR)[::-1]))
    return page


def list_events(
    conn: sqlite3.Connection, query: EventQuery, limit: int = _MAX_PAGE_BYTES, cut: bool = True
) -> EventPage:
    """Return one page (API: Queries). Raises ApiError if the cursor of sort=event_name names an unknown event.

    Cuts a page that is longer than `limit` bytes, or raises _TooLongError.
    """
    events, number, has_more, total = _select_page(conn, query, limit, cut)
    if query.count and not events:
        total = conn.execute(*_count_statement(query)).fetchone()[0]
    first, last = (_cursor_at(events, 0), _cursor_at(events, events.rfind(_SEPARATOR) + 1)) if events else (None, None)
    events = events.replace(_SEPARATOR, b",")  # these two copies exist one after the other
    events = b"[%b]" % events
    return EventPage(
        events=Raw(events), has_more=has_more, iter_first_key=first, iter_last_key=last,
        total_count=UNSET if query.count is None else total,
        offset=None if query.cursor else query.offset + (number if has_more else query.page_size),
    )  # fmt: skip


def _page_parts(query: EventQuery, conn: sqlite3.Connection, limit: int, cut: bool) -> _Parts:
    page = list_events(conn, query, limit, cut)
    events, page.events = page.events, Raw(b"[]")
    head, tail = ENCODER.encode(page).split(b"[]", 1)
    return _Parts(head, memoryview(events), tail)


async def _events_response(
    service: Service, request: Request, query: EventQuery, make: Callable[[sqlite3.Connection, int, bool], _Parts]
) -> Response:
    """Answer with what `make` returns for a connection, a limit on its bytes, and whether it may end early there.

    A long answer takes up to twice its bytes while it is made. Each key has one of them made at a time, within half of
    what is left of its share. Raises ApiError if that is too little because of its other requests.
    """
    store, shares, start_s = service.store, service.shares, monotonic_s()
    if query.page_size <= _SHORT_PAGE_SIZE:
        with suppress(_TooLongError):  # then make the page again, as a long one
            quick = query.page_size <= _QUICK_PAGE_SIZE
            return JsonResponse(await store.read(lambda conn: make(conn, _SHORT_PAGE_BYTES, False), quick))
    key = CALLER.get().key

    async def make_long() -> _Parts:
        held, most = request.scope.get("held_bytes", 0), min(_MAX_PAGE_BYTES, shares.limit // 2)
        room = shares.take_half(key, most, own=held)
        request.scope["held_bytes"] = held + room  # _Endpoint gives them back, and takes those of the answer
        return await store.read(lambda conn: make(conn, room, room == most), quick=False)

    try:
        turn = service.page_turns[key]
        return JsonResponse(await store.readers.run_in_turn(turn, make_long, monotonic_s() - start_s))
    except _TooLongError:
        raise service.share_is_used() from None


async def _page_response(service: Service, request: Request, sent: EventQueryIn, faults: Faults) -> Response:
    query = event_query(sent, service.view(request), faults)
    return await _events_response(service, request, query, partial(_page_parts, query))


async def list_events_by_parameters(service: Service, request: Request) -> Response:
    """GET /v1/events (API: Queries)."""
    faults = service.faults(request)
    parameters = parse_parameters(request["query_string"], faults)
    sent = query_of_parameters(EventQueryIn, parameters, EventQueryIn.__struct_fields__, faults)
    sent.count_total = sent.count_total or None
    sent.page_size = min(sent.page_size or 0, _GET_PAGE_SIZE)
    return await _page_response(service, request, sent, faults)


async def query_events(service: Service, request: Request) -> Response:
    """POST /v1/events/query (API: Queries)."""
    faults = service.faults(request)
    sent = await read_fields(service, request, _EVENT_QUERY, faults)
    sent.count_total = sent.count_total is not False
    return await _page_response(service, request, sent, faults)


# ---------------------------------------------------------------------------------------------- Lookup

_LOOKUP_FILTERS = ("external_customer_id", "start_time", "end_time")


class EventLookup(Struct):
    """One event (API: Lookup). The other fields are constant: an event that is stored is processed."""

    event: Raw  # an Event
    events: list[Raw]  # newer FlexPrice servers list versions of the event here; this server stores only the first
    status: str = "processed"
    processed_events: list[Any] = []
    debug_tracker: None = None


async def look_up_event(service: Service, request: Request) -> Response:
    """GET /v1/events/lookup?id=ID and GET /v1/events/{ID} (API: Lookup)."""
    faults = service.faults(request)
    sent = parse_parameters(request["query_string"], faults)
    event_id = request.path_params.get("id", sent.get("id"))
    if not event_id:
        faults.add("id", "required", "is required: the event_id to look up")
    wanted = query_of_parameters(EventQueryIn, sent, _LOOKUP_FILTERS, faults)
    wanted.event_id, wanted.page_size = event_id, 1
    wanted.start_time, wanted.end_time = wanted.start_time or EARLIEST, wanted.end_time or LATEST
    query = event_query(wanted, service.view(request), faults)

    def find(conn: sqlite3.Connection, limit: int, cut: bool) -> _Parts:
        event = _select_page(conn, query, limit, cut).events
        if not event:  # GET /v1/events/bulk looks up the event with the id bulk, but its client probably meant POST
            methods = {operation.method for operation in service.operations if operation.path == request["path"]}
            is_post = "POST" in methods and "GET" not in methods
            hint = f"; if you mean {request['path']}, use POST" if is_post else ""
            raise ApiError("not_found", f"no event with the id {quoted(query.filters['id'])} in this environment{hint}")
        head, middle, tail = ENCODER.encode(EventLookup(Raw(b"{}"), [Raw(b"{}")])).split(b"{}")
        return _Parts(head, event, middle, event, tail)

    return await _events_response(service, request, query, find)


# ---------------------------------------------------------------------------------------------- Monitoring

WINDOW_MINUTES = {"MINUTE": 1, "15MIN": 15, "30MIN": 30, "HOUR": 60, "3HOUR": 180, "6HOUR": 360, "12HOUR": 720,
                  "DAY": 1440, "WEEK": 7 * 1440}  # fmt: skip
WINDOW_SIZES = (*WINDOW_MINUTES, "MONTH")
MAX_WINDOWS = 100_000
A_SUNDAY = datetime(1, 1, 7)  # weeks start on Sundays; a week is a multiple of each shorter window
check_window_size = one_of(*WINDOW_SIZES)


class MonitoringPoint(Struct):
    """One window that has events."""

    timestamp: datetime
    event_count: int


class Monitoring(Struct):
    """The number of events in a range (API: Monitoring)."""

    total_count: int
    consumption_lag: int
    post_processing_lag: int
    points: list[MonitoringPoint]


def utc_windows(size: str, start_us: int, end_us: int) -> Iterator[int]:
    """Yield the start of each UTC window that overlaps [start, end), and the end of the last one.

    Raises OverflowError or ValueError outside the years 1 to 9999.
    """
    if size in WINDOW_MINUTES:
        step_us = WINDOW_MINUTES[size] * MINUTE_US
        first_us = start_us - (start_us - to_us(A_SUNDAY.replace(tzinfo=UTC))) % step_us
        bounds = range(first_us, end_us + step_us, step_us)
        if step_us >= DAY_US:
            to_datetime(bounds[-1])  # raises OverflowError, as a month does
        yield from bounds
        return
    month = to_datetime(start_us).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    yield to_us(month)
    while to_us(month) < end_us:
        month = (month + timedelta(days=32)).replace(day=1)
        yield to_us(month)


class Span(NamedTuple):
    """A range of time to aggregate, `[start, end)`, and the start of its window."""

    start_us: int
    end_us: int
    window_us: int


def spans_of_windows(windows: Iterable[int], start_us: int, end_us: int, size: str, field: str) -> list[Span]:
    """Return the part of each window that lies in [start, end). `windows` yields each start, and the end of the last.

    Raises ApiError naming `field` if there are more than 100,000 windows, or some outside the years 1 to 9999.
    """
    try:
        bounds = list(itertools.islice(windows, MAX_WINDOWS + 2))
    except (OverflowError, ValueError):
        raise_fault(field, "out_of_range", "makes a window outside the years 1 to 9999")
    if len(bounds) > MAX_WINDOWS + 1:
        problem = f"{size} makes more than {MAX_WINDOWS} windows: choose larger windows or a shorter range"
        raise_fault(field, "out_of_range", problem)
    bounds[0] = max(bounds[0], MIN_TIME_US)
    return [Span(max(start, start_us), min(end, end_us), start) for start, end in itertools.pairwise(bounds)]


IN_SPAN = "timestamp_us >= span.value ->> 0 AND timestamp_us < span.value ->> 1"


def select_per_span(conn: sqlite3.Connection, aggregate: Sql, spans: Sequence[Span]) -> list[Any]:
    """Evaluate a SELECT for each span. Its condition must contain IN_SPAN."""
    statement = sql(f"SELECT ({aggregate}) FROM json_each(:spans) AS span", aggregate, spans=json.dumps(spans))
    return [row[0] for row in conn.execute(*statement).fetchall()]


def _monitor(conn: sqlite3.Connection, selection: Selection, size: str | None, behind: int) -> bytes:
    view, start_us, end_us = selection.view, selection.start_us, selection.end_us
    spans = [Span(start_us, end_us, start_us)]
    if size and start_us < end_us:
        spans = spans_of_windows(utc_windows(size, start_us, end_us), start_us, end_us, size, "window_size")
    matched = matching(selection)
    index = index_of(selection.filters)
    counted = sql(f"SELECT count(*) FROM events {index} WHERE {matched} AND {IN_SPAN}", matched)
    counts = select_per_span(conn, counted, spans)
    points = [MonitoringPoint(to_datetime(span.window_us), count)
              for span, count in zip(spans, counts, strict=True) if size and count]  # fmt: skip
    hidden = 0
    if view.visible_us is not None:
        statement = f"SELECT count(*) FROM events WHERE {IN_ENVIRONMENT} AND ingested_at_us > :visible_us"
        hidden = conn.execute(statement, {"environment": view.environment, "visible_us": view.visible_us}).fetchone()[0]
    return ENCODER.encode(Monitoring(sum(counts), hidden, behind, points))


async def monitor_events(service: Service, request: Request) -> Response:
    """GET /v1/events/monitoring (API: Monitoring)."""
    faults = service.faults(request)
    parameters = parse_parameters(request["query_string"], faults)
    sent = query_of_parameters(EventQueryIn, parameters, EVENT_FILTERS, faults)
    size = faults.check("window_size", check_window_size, parameters.get("window_size"))
    if bool(sent.start_time) is not bool(sent.end_time):
        missing, given = ("start_time", "end_time") if sent.end_time else ("end_time", "start_time")
        faults.add(missing, "required", f"is required with {given}")
    selection = event_query(sent, service.view(request), faults)
    if not sent.start_time:
        selection = msgspec.structs.replace(selection, start_us=selection.end_us - DAY_US)
    outbox = service.outboxes.get(request["environment"])
    behind = await outbox.behind() if outbox else 0
    body = await service.store.read(partial(_monitor, selection=selection, size=size, behind=behind), quick=False)
    # The debugger shows the name of an environment without events. Encode the name, because headers are Latin-1.
    headers = {"X-Environment-Id": urllib.parse.quote(selection.view.environment, safe="")}
    if outbox:
        headers["X-Forward-To"] = outbox.host
    return JsonResponse(body, headers=headers)


# ---------------------------------------------------------------------------------------------- Health, page


class Forwarding(Struct):
    """An environment whose events are forwarded."""

    environment: str
    to: str  # the target: host and port
    put_aside: dict[str, int] | UnsetType = UNSET  # events that were not delivered, by reason; absent if all were


class Health(Struct):
    """The answer to /health."""

    status: str = "ok"  # or warning, or failing
    version: str = __version__
    reason: str | UnsetType = UNSET  # why the server cannot store events, or soon will not be able to
    forwarding: list[Forwarding] | UnsetType = UNSET  # absent if nothing is forwarded


async def health(service: Service, request: Request) -> Response:
    """GET or POST /health: 200, or 503 with a reason while the server cannot store events (API: Health)."""
    outboxes = service.outboxes.items()
    forwarding = [Forwarding(name, outbox.host, outbox.put_aside or UNSET) for name, outbox in outboxes] or UNSET
    if reason := await service.store.failure():
        return JsonResponse(Health("failing", reason=reason, forwarding=forwarding), 503)
    if warning := service.store.writer.space.warning():
        return JsonResponse(Health("warning", reason=warning, forwarding=forwarding))
    return JsonResponse(Health(forwarding=forwarding))


def _debugger() -> Operation:
    """Make GET /: the event debugger, a page that calls this API as any other client does."""
    page = _data_file("debugger.html")  # _data_file makes each line end \n, as browsers do before they hash
    policy = "default-src 'none'; connect-src 'self'; "  # run only the page's own script: events may contain HTML
    for tag in ("script", "style"):
        text = page.partition(f"<{tag}>")[2].partition(f"</{tag}>")[0]
        policy += f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'; "
    policy += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {
        "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    }  # fmt: skip

    async def show_debugger(service: Service, request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return Operation("GET", "/", show_debugger, None)


# ---------------------------------------------------------------------------------------------- Application

_API_CALL = {"event_name": "api_request", "external_customer_id": "cust_42"}


def _operation_of_extra(method: str, path: str, module: str) -> Operation:
    """Make a row of the route table that calls the handler of the same path in a module of eventstore_extras."""

    async def handle(service: Service, request: Request) -> Response:
        if not _has_extras():
            raise ApiError("not_found", f"{method} {path} needs the folder eventstore_extras beside eventstore.py")
        (row,) = (row for row in _extra(module, path).OPERATIONS if row.path == path)
        response: Response = await row.handler(service, request)
        return response

    return Operation(method, path, handle, None, role="event_reader", extra=module)


OPERATIONS = (
    Operation("POST", "/v1/events", ingest_event, EventAccepted, EventIn, status=202, refusals=[429],
              role="event_ingestor",
              example=_API_CALL | {"event_id": "evt_1", "properties": {"tokens": 1250}}),
    Operation("GET", "/v1/events", list_events_by_parameters, EventPage, None, EventQueryIn.__struct_fields__),
    Operation("POST", "/v1/events/bulk", ingest_events_bulk, BulkAccepted, BulkIn, status=202, refusals=[429],
              role="event_ingestor", example={"events": [_API_CALL]}),
    Operation("POST", "/v1/events/query", query_events, EventPage, EventQueryIn, role="event_reader",
              example={"external_customer_id": "cust_42", "property_filters": {"region": ["eu", "us"]},
                       "page_size": 100}),
    _operation_of_extra("POST", "/v1/events/usage", "usage"),
    Operation("GET", "/v1/events/monitoring", monitor_events, Monitoring, None, (*EVENT_FILTERS, "window_size")),
    Operation("GET", "/v1/events/lookup", look_up_event, EventLookup, None, ("id", *_LOOKUP_FILTERS), refusals=[404]),
    Operation("GET", "/v1/events/{id:anything}", look_up_event, EventLookup, None, _LOOKUP_FILTERS, refusals=[404]),
    Operation("GET", "/health", health, Health),
    Operation("POST", "/health", health, Health),
    _operation_of_extra("GET", "/openapi.json", "openapi"),
)  # fmt: skip


def create_app(
    settings: Settings, *, operations: Sequence[Operation] = (), middleware: Sequence[Middleware] = ()
) -> Starlette:
    """Make the Events API as an ASGI application. Open the database now; the end of the lifespan closes it.

    `operations` are additional routes, which also appear in the OpenAPI document. `middleware` runs after
    authentication and rate limits: a request that needs a key has `scope["environment"]` by then. `app.state.service`
    is the Service. Raises StartError if the database cannot be used, and ValueError if `api_keys` is empty.
    """
    if not settings.api_keys:
        raise ValueError('no API key: Settings(api_keys=(ApiKey.hashed("your key"),))')
    debugger = _debugger()  # fails if the file is missing, so call it before the store starts threads
    layers = [*middleware]
    if settings.rate_limits:
        layers = [Middleware(_extra("rate_limits", "a rate limit").RateLimits, settings=settings), *layers]
    service = Service(settings, [*OPERATIONS, *operations])
    return _App(service, routes=[Routes(service, [*service.operations, debugger])], middleware=layers)


# ---------------------------------------------------------------------------------------------- Listening

_KEEP_ALIVE_S = 75  # longer than a proxy's 60 s: a connection that closes while a proxy uses it causes a 502


def listen_error(error: Exception, where: str, host_flag: str, port_flag: str) -> StartError:
    """Return the error for an address on which the server cannot listen. Its message names the flag to change."""
    reasons = {
        errno.EADDRINUSE: f"it is taken; choose another with {port_flag} (0 takes a free one)",
        errno.EACCES: f"ports below 1024 need more rights; choose another with {port_flag}",
        errno.EADDRNOTAVAIL: f"this machine does not have that address; choose another with {host_flag}",
    }
    reason = reasons.get(getattr(error, "errno", None) or 0, f"{error}; check {host_flag}")
    if isinstance(error, socket.gaierror | UnicodeError):
        takes = f"{host_flag} takes a name or an address of this machine, without a scheme"
        reason = f"the name cannot be resolved; {takes}"
    return StartError(f"cannot listen on {printable(where)}: {reason}")


def _resolve(host: str, port: int) -> tuple[int, Any]:
    """Return the family and the address to listen on. Raises StartError."""
    if not 0 <= port <= 65_535:
        raise StartError(f"--port must be 0 to 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    except (OSError, UnicodeError) as error:
        raise listen_error(error, f"--host {host} --port {port}", "--host", "--port") from error
    return family, address[:2]


def listen(host: str, port: int) -> socket.socket:
    """Open the listening socket. Raises StartError."""
    family, address = _resolve(host, port)
    try:
        return socket.create_server(address, family=family, backlog=2048)
    except OSError as error:
        raise listen_error(error, f"--host {host} --port {port}", "--host", "--port") from error


def uvicorn_server(
    app: ASGIApp | str, shutdown_timeout_s: int, keep_alive_s: int = _KEEP_ALIVE_S, access_log: bool = False
) -> uvicorn.Server:
    config = uvicorn.Config(
        app, http="httptools", ws="none", lifespan="on", log_config=None, access_log=access_log, proxy_headers=False,
        server_header=False, timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=shutdown_timeout_s,
    )  # fmt: skip
    make: Callable[[uvicorn.Config], uvicorn.Server] = uvicorn.Server
    if _has_extras():
        make = _extra("connections", "serve").Server  # limits a connection's sizes and times
    return make(config)


# ---------------------------------------------------------------------------------------------- API keys

_LOOPBACK = ("127.0.0.1", "::1", "localhost")  # addresses that no other machine can reach


def check_key(key: str, where: str = "") -> str:
    """Return the key. Raises StartError if an HTTP header cannot carry it, or if it begins or ends with a quote."""
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        problem = "is empty, or has a space or a character outside ASCII"
        raise StartError(f"{where}an API key {problem}: an HTTP header cannot carry it")
    if key[0] in "\"'`" or key[-1] in "\"'`":
        raise StartError(f"{where}an API key begins or ends with a quote: write it without quotes")
    return key


def check_name(name: str, where: str) -> None:
    """Raises StartError if the name of an environment, or a label, is too long, quoted, or has control characters."""
    if not name.isprintable() or name[:1] in ("'", '"') or name[-1:] in ("'", '"') or len(name) > 255:
        problem = "is longer than 255 characters, in quotes, or has a control character"
        raise StartError(f"{where} {quoted(name)} {problem}")


class FoundKeys(NamedTuple):
    """The API keys of `serve`, and the flag, variable or file that they come from."""

    keys: tuple[ApiKey, ...]
    source: str
    made: str | None = None  # the key in clear text, if it was made for this run


def _plain_keys(flags: argparse.Namespace, environ: Mapping[str, str]) -> FoundKeys | None:
    """Find keys without eventstore_extras: flags in the form KEY or KEY=ENVIRONMENT, or one such key in a variable."""
    given = [("--api-key", flags.api_key)]
    given += [(name, [environ[name]]) for name in ("EVENTSTORE_API_KEYS", "FLEXPRICE_API_KEY") if name in environ]
    for source, texts in given:
        keys = []
        for text in texts:
            if re.search(r"(?s)^=?sha256:|[;,]|=.*=|=\Z", text):
                raise _no_extras(f"{source} with more than KEY or KEY=ENVIRONMENT in it")
            key, _, environment = text.partition("=")
            check_name(environment, f"{source}: the environment")
            keys.append(ApiKey.hashed(check_key(key, f"{source}: "), environment or "development"))
        if keys:
            return FoundKeys(tuple(keys), source)
    return None


def _find_api_keys(flags: argparse.Namespace, environ: Mapping[str, str]) -> FoundKeys:
    """Return the keys of the flags, else of the environment variables, else a new key. Raises StartError."""
    find = _extra("keys", "serve").find_api_keys if _has_extras() else _plain_keys
    found: FoundKeys | None = find(flags, environ)
    if found:
        return found
    if flags.host not in _LOOPBACK:
        problem = f"--host {flags.host} can be reached from other machines, and no API key was given"
        raise StartError(f"{problem}: choose a key with --api-key or FLEXPRICE_API_KEY")
    made = f"evs_{secrets.token_urlsafe(18)}"
    return FoundKeys((ApiKey.hashed(made),), "made for this run", made)


# ---------------------------------------------------------------------------------------------- Command line

_COMMANDS = {  # name -> module of eventstore_extras, and what the command does
    "serve": ("", "serve the API"),
    "import": ("importing", "store the events of a file"),
    "export": ("exporting", "write events to a file"),
    "replay": ("replay", "send events to FlexPrice, or another eventstore"),
    "prune": ("retention", "delete the events stored before a time"),
    "backup": ("backup", "copy the database to one file, and check the copy"),
    "keys": ("keys", "make API keys, or list those of a file"),
}
_SHUTDOWN_TIMEOUT_S = 5  # for running requests. Then the writer and a checkpoint need time; Docker kills after 10 s
_MAX_FLAG = 1_000_000_000_000  # a larger buffer size, or time in microseconds, would overflow
AddFlag = Callable[..., argparse.Action]


def _banner(service: Service, host: str, port: int, found: FoundKeys) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    base_url = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    environments = ", ".join(sorted({key.environment for key in service.settings.api_keys}))
    key = found.made or "$FLEXPRICE_API_KEY"
    hint = "" if found.source == "FLEXPRICE_API_KEY" else " (for the lines below: export FLEXPRICE_API_KEY=...)"
    key_note = f"{found.made} ({found.source})" if found.made else f"from {found.source}{hint}"
    notices = "".join(f"  {notice}\n" for notice in service.notices)
    event = '{"event_name": "api_request", "external_customer_id": "cust_42", "properties": {"tokens": 1250}}'
    fragment = f"#key={found.made}" if found.made else ""  # browsers do not send a fragment to the server
    return f"""eventstore {__version__}: FlexPrice's Events API on SQLite
  database     {service.store.name} ({plural(service.store.events_at_start, "event")})
  base URL     {base_url}
  API key      {key_note}
  environment  {environments}
  debugger     {base_url.removesuffix("v1")}{fragment}
{notices}
Send an event, and read it back:
  curl {base_url}/events -H "x-api-key: {key}" -d '{event}'
  curl {base_url}/events -H "x-api-key: {key}"
"""


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; then finish the running requests, drain the writer and return 0."""
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger().level))
    _resolve(arguments.host, arguments.port)  # report a wrong host before a missing key
    found = _find_api_keys(arguments, os.environ)
    extras = _extra("serving", "serve") if _has_extras() else None
    server = uvicorn_server("", _SHUTDOWN_TIMEOUT_S, arguments.keep_alive_s, arguments.access_log)
    # Set the handlers before the port is open, because a signal may follow at once. Do not remove them when uvicorn has
    # ended: uvicorn raises the signal again, and the default handler would make the exit status -15.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
    inherited: socket.socket | None = extras.prepare(arguments) if extras else None
    with inherited or listen(arguments.host, arguments.port) as listener:
        chosen = {name: value for name, value in vars(arguments).items() if name in Settings.__struct_fields__}
        additions = extras.additions(arguments) if extras else {}
        app: Any = create_app(Settings(api_keys=found.keys, **chosen), **additions)
        service: Service = app.state.service
        with closing(service.store):
            if extras:
                extras.attach(service, arguments, listener.getsockname())
            service.is_stopping = lambda: server.should_exit
            host, port = listener.getsockname()[:2]
            print(_banner(service, host, port, found), flush=True)
            for wrap in service.wrappers:
                app = wrap(app)
            server.config.app = app  # uvicorn reads it in run()
            server.run(sockets=[listener])
    return 0


def positive(kind: Callable[[str], _Number], or_zero: bool = False) -> Callable[[str], _Number]:
    """Make an argparse type for a number greater than 0, or with `or_zero` at least 0."""

    def parse(text: str) -> _Number:
        with suppress(ValueError):
            value = kind(text)
            if 0 < value <= _MAX_FLAG or (or_zero and value == 0):
                return value
        least = "at least 0" if or_zero else "greater than 0"
        raise argparse.ArgumentTypeError(f"must be a number {least} and at most {_MAX_FLAG}, got {text!r}")

    return parse


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, "", [], {}) else action.help


def add_db_flag(add: AddFlag, text: str) -> None:
    add("--db", metavar="PATH", default=Settings().db, help=text)


def _add_serve_flags(add: AddFlag) -> None:
    """Add the flags of `serve`. A flag with the name of a field of Settings sets that field."""
    defaults = Settings()
    add_db_flag(add, 'database file, created if absent; ":memory:" is a temporary one')
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8080, help="port to listen on; 0 takes a free one")
    add("--api-key", metavar="KEY[=ENVIRONMENT]", action="append", default=[], help="API key; may be given several "
        "times; by default EVENTSTORE_API_KEYS, else FLEXPRICE_API_KEY, else a key made for this run")  # fmt: skip
    add("--max-body-bytes", type=positive(int), default=defaults.max_body_bytes, help="longest request body")
    add("--query-timeout-s", type=positive(float), default=defaults.query_timeout_s, help="longest time for one query")
    add("--queue-events", type=positive(int), default=defaults.queue_events, help="events that may wait for the disk")
    add("--queue-bytes", type=positive(int), default=defaults.queue_bytes, help="bodies and unread answers in memory")
    add("--warn-free-bytes", metavar="N", type=positive(int, or_zero=True), default=defaults.warn_free_bytes,
        help="warn in the log and in /health when the disk has fewer bytes left; by default 5%% of the disk, at "
        "most 1 GB; 0 never warns")  # fmt: skip
    add("--visibility-lag-ms", type=positive(int, or_zero=True), default=defaults.visibility_lag_ms,
        help="hide events from queries for this long after they were accepted")  # fmt: skip
    add("--strict", action="store_true", help="refuse requests with unknown fields or parameters, or known ones "
        "without effect; by default the header X-Ignored lists them")  # fmt: skip
    add("--keep-alive-s", type=positive(int), default=_KEEP_ALIVE_S,
        help="close a connection that is idle for this long; keep it above the proxy's own limit")  # fmt: skip
    add("--access-log", action="store_true", help="log every request, not only refused ones")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="least severe level to log")


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """Parse the flags of the named command, and import only that command's module. Raises StartError."""
    parser = argparse.ArgumentParser(
        "eventstore", description="FlexPrice's usage-events API in one file on SQLite", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"eventstore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in _COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=_HelpFormatter,
                                      allow_abbrev=False)  # fmt: skip
        if name in argv[:1] and module:
            extra = _extra(module, name)
            command.set_defaults(run=extra.run)
            extra.add_flags(name, command.add_argument)
        elif name in argv[:1]:
            command.set_defaults(run=serve)
            _add_serve_flags(command.add_argument)
            if _has_extras():
                _extra("serving", "serve").add_flags(command.add_argument)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands.choices[arguments.command]
        similar = difflib.get_close_matches(unknown[0].partition("=")[0], command._option_string_actions, 1)
        if not similar and not _has_extras():
            raise _no_extras(unknown[0].partition("=")[0])  # probably a flag of the extras
        hint = f"; did you mean {similar[0]}?" if similar else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def say(message: str) -> None:
    """Print a command's message to stderr. Do nothing if stderr is closed or full."""
    with suppress(OSError):
        print(f"eventstore: {message}", file=sys.stderr, flush=True)


def _replace_closed_files() -> None:
    """Open /dev/null for each closed standard file. Otherwise a file opened later would receive what is printed."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115 - stays open


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line. Return the exit status: 0, 1 if the command stopped half-way, 2 if it cannot start."""
    _replace_closed_files()
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        return int(arguments.run(arguments))
    except StartError as error:
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.modules["eventstore"] = sys.modules["__main__"]  # otherwise eventstore_extras would import a second copy
    sys.exit(main())
