"""eventstore: FlexPrice's usage-events API in one Python file on SQLite.

It takes usage events over the same wire as FlexPrice (singly or in batches of up to 1000), keeps them in one
SQLite file and reads them back with filters and cursors. It is not a billing system: no customers, prices,
plans or invoices, and one process on one machine.

    python eventstore.py serve               # http://127.0.0.1:8080/v1
    app = eventstore.create_app(settings)    # the same as an ASGI application

What grew around it is in eventstore_extras: meters and analytics, import, export, replay, and a mock for tests. Nothing
of it is imported before a command or a flag asks for it, and this file works without it.

What is promised to callers stands in docs/api.md: "API: Usage" in a docstring is its section of that name.

The rooms of this module, in order; none knows of those below it, but for HTTP, which puts them together:

    Settings        everything that can be configured
    errors          ApiError, the table of codes, and Faults, which collects what is wrong with a request
    wire types      what comes in and what goes out
    time, ids, cursors, windows
    validation      from bytes and parameters to rows and queries
    SQL             statements and the filter builder
    operations      insert_events, list_events, find_event, usage
    Store           one writer thread with group commit, reader threads
    HTTP            authentication, rate limits, handlers, the debugger's page, the route table, create_app
    OpenAPI         the document, made from the wire types and the route table
    command line    serve, and the door to the commands of eventstore_extras
"""

from __future__ import annotations

import _sqlite3
import argparse
import asyncio
import base64
import ctypes
import difflib
import errno
import gc
import hashlib
import importlib.util
import itertools
import json
import logging
import math
import os
import queue
import random
import re
import secrets
import signal
import socket
import sqlite3
import sys
import tempfile
import threading
import time
import urllib.parse
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta, tzinfo
from functools import cached_property, lru_cache, partial
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, NoReturn, TypeVar, get_args
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import msgspec
import uvicorn
from msgspec import UNSET, Raw, Struct, UnsetType
from starlette.applications import Starlette
from starlette.convertors import PathConvertor, register_url_convertor
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route, compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

__version__ = "0.1.0"

log = logging.getLogger("eventstore")
T = TypeVar("T")
N = TypeVar("N", int, float)

# ---------------------------------------------------------------------------------------------- Settings


class ApiKey(Struct, frozen=True):
    """A key as the server holds it: hashed, and bound to one environment (API: Common rules)."""

    digest: bytes
    environment: str

    @classmethod
    def hashed(cls, key: str, environment: str = "development") -> ApiKey:
        return cls(hashlib.sha256(key.encode()).digest(), environment)


def now_us() -> int:
    """The wall clock in microseconds since 1970."""
    return time.time_ns() // 1000


class Settings(Struct, frozen=True, kw_only=True):
    """Everything that can be configured, with its default. `api_keys` must name at least one key."""

    api_keys: tuple[ApiKey, ...] = ()
    db: str = "events.db"  # ":memory:" is a temporary file, removed when the store closes
    max_body_bytes: int = 32 * 1024 * 1024
    query_timeout_s: float = 30.0
    queue_events: int = 100_000  # what may wait for the writer
    wal_bytes: int = 256 * 1024 * 1024  # a WAL longer than this is written into the file, whoever has to wait
    queue_bytes: int = 256 * 1024 * 1024  # request bodies held at a time, one alone may be longer
    rate_limits: Mapping[str, int] = {}  # path -> POST requests a minute, for each key (API: Rate limits)
    visibility_lag_ms: int = 0  # events are seen by queries so long after they were accepted
    clock: Callable[[], int] = now_us  # microseconds since 1970


DOCUMENTED_RATE_LIMITS = {"/v1/events": 1000, "/v1/events/bulk": 100}

# ---------------------------------------------------------------------------------------------- errors

STATUS_OF_CODE = {
    "validation_error": 400, "unauthorized": 401, "not_found": 404, "method_not_allowed": 405, "already_exists": 409,
    "too_many_requests": 429, "database_error": 500, "internal_error": 500, "service_unavailable": 503,
    "bad_gateway": 502, "gateway_timeout": 504,  # not a server's own: what stands before it answers them
}  # fmt: skip

MAX_ECHO_CHARS = 100
MAX_FAULTS = 100


class Fault(Struct, frozen=True):
    """One thing that is wrong with a request; `index` and `event_id` say in which event (API: Errors)."""

    index: int | None
    event_id: str | None
    field: str
    code: str  # required, invalid_type, invalid_format or out_of_range
    message: str


class ErrorDetails(Struct, frozen=True):
    rejected: int | UnsetType = UNSET  # how many events have faults
    truncated: bool | UnsetType = UNSET  # whether there were more faults than are listed
    errors: list[Fault] | UnsetType = UNSET


class ApiError(Exception):
    """A refusal that the caller can act on. `code` is a key of STATUS_OF_CODE (API: Common rules)."""

    def __init__(
        self, code: str, message: str, details: ErrorDetails | None = None, retry_after_s: int | None = None
    ) -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details or ErrorDetails()
        self.retry_after_s = retry_after_s


class FieldError(ValueError):
    """A value that its field cannot take; its text reads on from the field's name."""

    def __init__(self, code: str, problem: str) -> None:
        super().__init__(problem)
        self.code = code


class Faults:
    """Everything that is wrong with one request, so that one answer names all of it."""

    def __init__(self, index: int | None = None, whole: str = "body") -> None:
        self.index = index  # of the event under check
        self.whole = whole  # whose fields are under check: the body, an event, or an object in it
        self.ignored: set[str] = set()  # fields that nothing has, which is no fault
        self._path = ""  # what goes before the name of a field of an object in the body
        self._found: dict[tuple[int | None, str], tuple[str, str]] = {}

    def add(self, field: str, code: str, problem: str) -> None:
        """Note a fault; the first one of a field, or of the whole, stays: a later one would only follow from it."""
        if (self.index, self.whole) not in self._found:
            name = field if field == self.whole else self._path + field
            self._found.setdefault((self.index, name), (code, f"{name} {problem}"))

    def ignore(self, fields: Iterable[str]) -> None:
        self.ignored |= {self._path + field for field in fields}

    @contextmanager
    def within(self, field: str) -> Iterator[None]:
        """What is noted meanwhile is of an object in this field: `aggregation.type`."""
        outer = self.whole, self._path
        self.whole, self._path = self._path + field, f"{self._path}{field}."
        try:
            yield
        finally:
            self.whole, self._path = outer

    def check(self, field: str, convert: Callable[[Any], T], value: Any) -> T | None:
        """convert(value); None for an absent value, and for a bad one, which is noted."""
        if value is None or value == "":
            return None
        try:
            return convert(value)
        except FieldError as error:
            self.add(field, error.code, str(error))
            return None

    def refuse(self, events: Sequence[Any] = (), bulk: bool = False) -> None:
        """ApiError if there is a fault; it lists the first 100 (API: Errors). `events` are those sent, if any were."""
        if not self._found:
            return
        faults = []
        for (index, field), (code, message) in itertools.islice(self._found.items(), MAX_FAULTS):
            event_id = events[index or 0].event_id if events else None
            faults.append(Fault(index, event_id and event_id[:MAX_ECHO_CHARS], field, code, message))
        rejected = len({index for index, _ in self._found})
        message = "; ".join(fault.message for fault in faults)
        if bulk:
            are = "is" if rejected == 1 else "are"
            message = f"{rejected} of {len(events)} events {are} invalid; nothing was stored"
        truncated = len(self._found) > MAX_FAULTS
        raise ApiError("validation_error", message, ErrorDetails(rejected if events else UNSET, truncated, faults))


def refuse(field: str, code: str, problem: str) -> NoReturn:
    """Refuse a request for one field that makes the rest not worth a look."""
    faults = Faults()
    faults.add(field, code, problem)
    faults.refuse()
    raise AssertionError("unreachable")


def echo(value: str) -> str:
    """A caller's value as an error message shows it: quoted, escaped, and cut to 100 characters."""
    return json.dumps(value[:MAX_ECHO_CHARS], ensure_ascii=False)


def excerpt(raw: bytes) -> str:
    """The start of a JSON text as an error message shows it."""
    return " ".join(bytes(raw)[:1000].decode(errors="ignore").split())[:MAX_ECHO_CHARS]


class StartError(Exception):
    """A command cannot start; the message says what is wrong and what to do."""


# ---------------------------------------------------------------------------------------------- wire types

MAX_BATCH = 1000
PropertyFilters = dict[str, list[str] | None]  # each property equals one of its values; without any, it may be any


# An unknown field is forbidden here and in the next types so that decode_members notes it, and then ignored.
class EventIn(Struct, forbid_unknown_fields=True):
    """One event as a client sends it (API: Sending events). Absent, null and, for strings, "" are the same."""

    event_name: str | None = None
    external_customer_id: str | None = None
    event_id: str | None = None
    customer_id: str | None = None
    source: str | None = None
    timestamp: str | None = None
    properties: Raw = msgspec.field(default_factory=Raw)  # a Raw itself could be no default in a JSON Schema


def _batch_of(item: type) -> Any:
    """An array of at most 1000 items. `list[item]` would build eleven million structs (5 s, 1.2 GB) from 32 MiB of
    `[{},{},...]` before anyone could count them; a struct with 1000 places stops at the 1001st, and is as fast."""
    places = [(f"event_{i}", item, None) for i in range(MAX_BATCH)]
    return msgspec.defstruct("Batch", places, array_like=True, forbid_unknown_fields=True)


class BulkIn(Struct):
    """The body of POST /v1/events/bulk (API: Sending events)."""

    events: _batch_of(EventIn)  # type: ignore[valid-type]


class EventQueryIn(Struct, forbid_unknown_fields=True):
    """The body of POST /v1/events/query, and what the parameters of GET /v1/events become (API: Queries)."""

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


class EventAccepted(Struct):
    message: str
    event_id: str


class BulkAccepted(Struct):
    message: str


class Event(Struct):
    """One stored event as it is answered (API: Queries). EVENT_JSON makes its JSON, in this order."""

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
    """One page of events and the cursors around it (API: Queries)."""

    events: Raw  # a list[Event]
    has_more: bool
    iter_first_key: str | None
    iter_last_key: str | None
    total_count: int | UnsetType | None = UNSET  # absent: GET without count_total
    offset: int | None  # where the next page starts; null in cursor mode


class EventLookup(Struct):
    """One event (API: Lookup). It is processed as soon as it is stored, so the rest never varies."""

    event: Raw  # an Event
    status: str = "processed"
    processed_events: list[Any] = []
    debug_tracker: None = None


class UsageResult(Struct):
    window_size: datetime  # the window's start
    value: float


class Usage(Struct):
    """An aggregation over a range, or over each window of it (API: Usage)."""

    event_name: str
    type: str
    value: float | None  # null if windows were asked for
    results: list[UsageResult]


class MonitoringPoint(Struct):
    timestamp: datetime
    event_count: int


class Monitoring(Struct):
    """How many events a range has (API: Monitoring)."""

    total_count: int
    consumption_lag: int
    post_processing_lag: int
    points: list[MonitoringPoint]


class ErrorMessage(Struct):
    message: str
    internal_error: str | None


class ErrorBody(Struct):
    """Every error has this body; `success` and `error` are what older SDKs parse (API: Common rules)."""

    code: str
    message: str
    http_status_code: int
    details: ErrorDetails
    success: bool
    error: ErrorMessage


class Health(Struct):
    status: str = "ok"  # or failing
    version: str = __version__
    reason: str | UnsetType = UNSET  # why events cannot be stored


ENCODER = msgspec.json.Encoder()
EVENT = msgspec.json.Decoder(EventIn)
BULK = msgspec.json.Decoder(BulkIn)
# A batch in which some event does not fit EventIn, so that each is looked at alone, and a body that is no batch.
RAW_BULK: Any = msgspec.json.Decoder(msgspec.defstruct("RawBulkIn", [("events", _batch_of(Raw))]))
OUTER_BULK: Any = msgspec.json.Decoder(msgspec.defstruct("OuterBulkIn", [("events", Raw, Raw(b"null"))]))
RAWS = msgspec.json.Decoder(list[Raw])
EVENT_QUERY = msgspec.json.Decoder(EventQueryIn)
USAGE = msgspec.json.Decoder(UsageIn)
OBJECT = msgspec.json.Decoder(dict[str, Any])
MEMBERS = msgspec.json.Decoder(dict[str, Raw])
STRING = msgspec.json.Decoder(str)
PLACE: Any = msgspec.json.Decoder(msgspec.defstruct("Place", [("id", str), ("timestamp", datetime)]))
TEXTS = msgspec.json.Decoder(list[str | None])
decoder_of = lru_cache(msgspec.json.Decoder)

# ----------------------------------------------------------------------------------------- time, ids, cursors, windows

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def to_datetime(time_us: int) -> datetime:
    return EPOCH + time_us * MICROSECOND


def to_us(time: datetime) -> int:
    return (time - EPOCH) // MICROSECOND


MIN_TIME_US = to_us(datetime.min.replace(tzinfo=UTC))  # Go's zero time, "no time" on this wire
MAX_TIME_US = to_us(datetime.max.replace(tzinfo=UTC))
A_TIME = "2026-11-01T00:00:00Z"  # for who has to write one
EARLIEST, LATEST = "0001-01-01T00:00:00Z", "9999-12-31T23:59:59.999999Z"
DAY_US = 86_400 * 1_000_000

# datetime.fromisoformat alone would also take week dates, a bare date, no zone and (3.13) an hour of 24.
_RFC_3339 = re.compile(
    r"\d{4}-\d\d-\d\d[Tt](?:[01]\d|2[0-3]):[0-5]\d:[0-5]\d(?:\.\d{1,9})?(?:[Zz]|[+-](?:[01]\d|2[0-3]):[0-5]\d)",
    re.ASCII,
)


def parse_time(text: str) -> int:
    """Microseconds since 1970 of an RFC 3339 time with a zone; finer digits are cut off. FieldError (API: Times)."""
    if not _RFC_3339.fullmatch(text):
        raise FieldError("invalid_format", f"must be RFC 3339 with a zone, got {echo(text)}; write it like {A_TIME}")
    try:
        time_us = to_us(datetime.fromisoformat(text.upper()))
    except ValueError:  # a day that its month does not have, the year 0
        raise FieldError("invalid_format", f"must be RFC 3339 with a zone, got {echo(text)}: no such day") from None
    if not MIN_TIME_US <= time_us <= MAX_TIME_US:
        raise FieldError("out_of_range", f"must lie in the years 1 to 9999 in UTC, got {echo(text)}")
    return time_us


class IdMaker:
    """Makes a prefix + ULID: 48 bits of milliseconds, 80 bits of chance, each greater than the one before."""

    _pairs = tuple(map("".join, itertools.product("0123456789ABCDEFGHJKMNPQRSTVWXYZ", repeat=2)))  # Crockford's

    def __init__(self) -> None:
        self._last = 0
        self._random = random.Random()  # noqa: S311 - need not be secret; secrets asks the kernel each time

    def __call__(self, time_us: int, prefix: str = "event_") -> str:
        fresh = (time_us // 1000) << 80 | self._random.getrandbits(79)  # the 80th bit is room to count up
        self._last = value = fresh if fresh >> 80 > self._last >> 80 else self._last + 1
        return prefix + "".join([self._pairs[value >> shift & 1023] for shift in range(120, -1, -10)])


class Cursor(NamedTuple):
    """A place between two events of a page's order; on the wire `<unix time in ns>::<event id>` (API: Queries)."""

    timestamp_us: int
    id: str

    @property
    def text(self) -> str:
        return f"{self.timestamp_us * 1000}::{self.id}"


def parse_cursor(text: str) -> Cursor:
    time_ns, separator, event_id = text.partition("::")
    if not (separator and event_id and re.fullmatch(r"-?[0-9]{1,21}", time_ns)):
        raise FieldError("invalid_format", f'must be a cursor like "1760528327962000000::event_id", got {echo(text)}')
    timestamp_us = int(time_ns) // 1000
    if not MIN_TIME_US <= timestamp_us <= MAX_TIME_US:
        raise FieldError("out_of_range", f"must hold a time in the years 1 to 9999, got {echo(text)}")
    return Cursor(timestamp_us, event_id)


WINDOW_MINUTES = {"MINUTE": 1, "15MIN": 15, "30MIN": 30, "HOUR": 60, "3HOUR": 180, "6HOUR": 360, "12HOUR": 720,
                  "DAY": 1440, "WEEK": 7 * 1440}  # fmt: skip
WINDOW_SIZES = (*WINDOW_MINUTES, "MONTH")
MAX_WINDOWS = 100_000
MINUTE_US = 60 * 1_000_000
A_SUNDAY = datetime(1, 1, 7)  # as clocks show it: weeks start so, and days, and what divides them


class Windows(Struct, frozen=True):
    """Windows of one size in one time zone; months may start on another day than the first (API: Usage).

    A window starts when the zone's clocks show its time, or jump over it. Up to an hour long, it starts again when they
    show that time again: the second 1:30 of a night on which clocks go back. Three hours hold both.
    """

    size: str
    zone: tzinfo = UTC
    month_day: int = 1

    def bounds(self, start_us: int, end_us: int, field: str = "window_size") -> list[int]:
        """Where each window that touches [start, end) starts, and where the last one ends. ApiError if too many."""
        step_us = WINDOW_MINUTES.get(self.size, 0) * MINUTE_US
        bounds: Sequence[int]
        try:
            if self.zone is UTC and 0 < step_us < DAY_US:  # 100,000 of them take 3 ms, not 0.4 s
                bounds = range(start_us - start_us % step_us, end_us + step_us, step_us)
            else:
                bounds = self._bounds(start_us, end_us)
        except (OverflowError, ValueError):
            refuse(field, "out_of_range", "makes a window outside the years 1 to 9999")
        if len(bounds) > MAX_WINDOWS + 1:
            problem = f"{self.size} makes more than {MAX_WINDOWS} windows: take a larger one or a shorter range"
            refuse(field, "out_of_range", problem)
        return [max(bounds[0], MIN_TIME_US), *bounds[1:]]

    def _bounds(self, start_us: int, end_us: int) -> list[int]:
        minutes = WINDOW_MINUTES.get(self.size, 32 * 1440)  # 32 days after it starts, a month is the next one
        repeats = minutes <= 60  # and clocks go back by three hours at most
        wall = self._floor(self._wall(start_us - repeats * 180 * MINUTE_US))
        first, bounds = MIN_TIME_US, set[int]()
        while first < end_us and len(bounds) < MAX_WINDOWS + 360:  # those before the start do not count
            first, second = (to_us(wall.replace(tzinfo=self.zone, fold=fold)) for fold in (0, 1))
            if first > second:  # clocks jump over it, at this moment
                first = second = second + bisect_left(range(second, first), wall, key=self._wall)
            bounds |= {first, second if repeats else first}
            wall = self._floor(wall + timedelta(minutes=minutes))
        ordered = sorted(bounds)
        return ordered[bisect_right(ordered, start_us) - 1 : bisect_left(ordered, end_us) + 1]

    def _wall(self, time_us: int) -> datetime:
        """What the zone's clocks show."""
        return to_datetime(time_us).astimezone(self.zone).replace(tzinfo=None)

    def _floor(self, wall: datetime) -> datetime:
        """What they show at the start of the window."""
        if minutes := WINDOW_MINUTES.get(self.size):
            return wall - min((wall - A_SUNDAY) % timedelta(minutes=minutes), wall - datetime.min)  # none in year 0
        shift = timedelta(days=self.month_day - 1)
        return (wall - shift).replace(day=1, hour=0, minute=0, second=0, microsecond=0) + shift


def parse_zone(name: str) -> tzinfo:
    """An IANA time zone; UTC if there is none of that name, as on the real server (API: Usage)."""
    try:
        return UTC if name == "UTC" else ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, OSError):
        return UTC


# ---------------------------------------------------------------------------------------------- validation

AGGREGATIONS = ("COUNT", "SUM", "AVG", "MAX", "COUNT_UNIQUE", "LATEST", "SUM_WITH_MULTIPLIER", "WEIGHTED_SUM")
SORTS = ("timestamp", "event_name")
ORDERS = ("desc", "asc")
MAX_PROPERTY_DEPTH = 500  # SQLite's JSON functions refuse 1000, and one such event would fail every filter
MAX_COUNTED = 2_000_000  # commas in a batch that is no batch: to count its events takes 64 bytes for each
MAX_FILTER_VALUES = 1000
MAX_FILTER_KEYS = 50
MAX_OFFSET = 2**53  # what a JSON number carries safely
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*)?|\.[0-9]+)([eE][+-]?[0-9]+)?")
FILTER_COLUMNS = {"external_customer_id": "external_customer_id", "event_name": "event_name", "event_id": "id",
                  "source": "source"}  # fmt: skip
EVENT_FILTERS = (*FILTER_COLUMNS, "start_time", "end_time", "property_filters")
LOOKUP_FILTERS = ("external_customer_id", "start_time", "end_time")

_TYPE_NAMES = {
    "str | None": "a string", "bool | None": "true or false", "list[str] | None": "an array of strings",
    "int | None": "an integer", "int | float | None": "an integer", "str | float | None": "a decimal number",
    "PropertyFilters | None": "an object of string arrays", "dict[str, str] | None": "an object of strings",
}  # fmt: skip


class Row(NamedTuple):
    """One event as the table holds it, column by column."""

    environment: int  # as environment_number has it
    id: str
    external_customer_id: str
    customer_id: str
    event_name: str
    source: str
    timestamp_us: int
    ingested_at_us: int
    properties: str


def decode(decoder: msgspec.json.Decoder[T], body: bytes) -> T | None:
    """The body as the decoder's type; None if it is JSON of another shape; ApiError if it is not JSON (API: JSON)."""
    try:
        if not body.isascii():
            body.decode()  # msgspec skips what it does not decode, bad UTF-8 included
        return decoder.decode(body)
    except msgspec.ValidationError:
        return None
    except UnicodeDecodeError as error:
        reason = f"byte {error.start} is not UTF-8"
    except RecursionError:
        reason = "it is nested too deep"
    except msgspec.DecodeError as error:
        reason = str(error)
        if reason == "Input data was truncated":  # said of a lone surrogate at a string's end, too
            half = ", or holds half of a \\u surrogate pair" if b"\\u" in body else ""
            reason = f"it ends too early{half}" if body else "it is empty"
    raise ApiError("validation_error", f"the body is not valid JSON: {reason}")


def decode_fields(decoder: msgspec.json.Decoder[T], body: bytes, faults: Faults) -> T:
    """The body as the decoder's struct; fields that do not fit it are noted. ApiError if it is not JSON."""
    return decode(decoder, body) or decode_members(decoder.type, body, faults)


def decode_members(struct: type[T], raw: bytes, faults: Faults) -> T:
    """The struct from an object whose fields do not all have its types; a field that has not is noted and absent."""
    members = decode(MEMBERS, bytes(raw))
    if members is None:
        faults.add(faults.whole, "invalid_type", f"must be an object, got {excerpt(raw)}")
        return struct()
    values = {}
    faults.ignore(members.keys() - {*struct.__struct_fields__})  # type: ignore[attr-defined]
    for field in msgspec.structs.fields(struct):  # type: ignore[arg-type]
        if field.name in members:
            values[field.name] = _decode_member(struct, field, bytes(members[field.name]), faults)
    return struct(**values)


def _decode_member(struct: type, field: msgspec.structs.FieldInfo, raw: bytes, faults: Faults) -> Any:
    value = decode(decoder_of(field.type), raw)
    if value is not None or raw == b"null":
        return value
    kind = (get_args(field.type) or [field.type])[0]
    if hasattr(kind, "__struct_fields__"):
        with faults.within(field.name):
            return decode_members(kind, raw, faults)
    item = (get_args(kind) or [object])[0]
    if hasattr(item, "__struct_fields__") and (items := decode(RAWS, raw)) is not None:
        values = []
        for place, item_raw in enumerate(items):
            with faults.within(f"{field.name}[{place}]"):
                values.append(decode_members(item, item_raw, faults))
        return values
    expected = _TYPE_NAMES.get(struct.__annotations__[field.name], "an array of objects")
    faults.add(field.name, "invalid_type", f"must be {expected}, got {excerpt(raw)}")
    return None


def check_properties(raw: bytes) -> str:
    """The JSON text of an event's properties: an object, each number a double can hold, 500 levels at most."""
    text = str(raw, "utf-8")
    if text in ("", "null"):
        return "{}"
    try:
        value = OBJECT.decode(raw)
    except msgspec.ValidationError as error:
        if "out of range" in str(error):
            raise FieldError("out_of_range", "holds a number that no 64-bit float or 4,300 digits can hold") from None
        raise FieldError("invalid_type", f"must be an object, got {excerpt(raw)}") from None
    except RecursionError:
        raise FieldError("out_of_range", f"is nested deeper than {MAX_PROPERTY_DEPTH} levels") from None
    except msgspec.DecodeError as error:
        reason = "half of a \\u surrogate pair" if "truncated" in str(error) else str(error)
        raise FieldError("invalid_format", f"is not valid JSON: {reason}") from None
    if len(text) > 2 * MAX_PROPERTY_DEPTH and _is_deeper_than(value, MAX_PROPERTY_DEPTH):
        raise FieldError("out_of_range", f"is nested deeper than {MAX_PROPERTY_DEPTH} levels")
    return text


def _is_deeper_than(value: object, limit: int) -> bool:
    level = [value]
    for _ in range(limit + 1):
        inside = [each.values() if isinstance(each, dict) else each for each in level if isinstance(each, dict | list)]
        level = list(itertools.chain.from_iterable(inside))
    return bool(level)


def event_row(event: EventIn, environment: int, now: int, make_id: IdMaker, faults: Faults) -> Row:
    """The row of an event; what is wrong with it goes to `faults`, and the row is then not to be used."""
    event_name = (event.event_name or "").strip()
    if not event_name:
        faults.add("event_name", "required", "is required")
    if not event.external_customer_id:
        faults.add("external_customer_id", "required", "is required")
    timestamp_us = faults.check("timestamp", parse_time, event.timestamp)
    timestamp_us = now if timestamp_us is None or timestamp_us == MIN_TIME_US else timestamp_us
    return Row(
        environment, event.event_id or make_id(now), event.external_customer_id or "", event.customer_id or "",
        event_name, event.source or "", timestamp_us, now,
        faults.check("properties", check_properties, event.properties) or "{}",
    )  # fmt: skip


def decode_batch(body: bytes) -> list[Any]:
    """The events of a bulk body, raw where one does not fit EventIn. ApiError if it is no batch (API: A batch)."""
    batch = decode(BULK, body) or decode(RAW_BULK, body)
    events = [] if batch is None else [event for event in msgspec.structs.astuple(batch.events) if event is not None]
    if not events:
        _refuse_batch(body)
    return events


def _refuse_batch(body: bytes) -> NoReturn:
    outer = decode(OUTER_BULK, body)
    if outer is None:
        refuse("body", "invalid_type", f'must be an object like {{"events": [...]}}, got {excerpt(body)}')
    events = bytes(outer.events)
    if events == b"null":
        refuse("events", "required", f"is required: an array of 1 to {MAX_BATCH} events")
    if events[:1] != b"[":
        refuse("events", "invalid_type", f"must be an array of 1 to {MAX_BATCH} events, got {excerpt(events)}")
    counted = decode(RAWS, events) if events.count(b",") < MAX_COUNTED else None
    number = f"more than {MAX_BATCH}" if counted is None else len(counted)
    refuse("events", "out_of_range", f"must hold 1 to {MAX_BATCH} events, got {number}")


def event_rows(
    events: list[Any], bulk: bool, environment: int, now: int, make_id: IdMaker, *, faults: Faults
) -> list[Row]:
    """The rows of a request's events, all of them good; else ApiError with every fault (API: Sending events)."""
    rows = []
    for index, sent in enumerate(events):
        faults.index = index
        events[index] = event = decode_members(EventIn, sent, faults) if isinstance(sent, Raw) else sent
        rows.append(event_row(event, environment, now, make_id, faults))
    faults.refuse(events, bulk)
    return rows


def parse_int(text: str) -> int:
    if not re.fullmatch(r"[+-]?[0-9]{1,4000}", text):  # int() would take "1_0" and " 1 ", and refuse 5,000 digits
        raise FieldError("invalid_type", f"must be an integer, got {echo(text)}")
    return int(text)


def check_positive(value: str | float) -> float:
    """A number, or the text of one, that is greater than 0 and that a 64-bit float can hold."""
    if not (DECIMAL.fullmatch(str(value)) and 0 < float(value) < math.inf):
        sent = echo(value) if isinstance(value, str) else f"{value:.15g}"
        raise FieldError("out_of_range", f"must be a decimal number greater than 0, got {sent}")
    return float(value)


def whole_within(low: float, high: float) -> Callable[[float], int]:
    def check(value: float) -> int:
        if isinstance(value, float) and not (value.is_integer() and abs(value) <= MAX_OFFSET):  # in JSON, 50.0 is one
            raise FieldError("invalid_type", f"must be an integer, got {value}")
        if not low <= value <= high:
            raise FieldError("out_of_range", f"must be {low} to {high}, got {str(int(value))[:MAX_ECHO_CHARS]}")
        return int(value)

    return check


def parse_bool(text: str) -> bool:
    if text.lower() not in ("true", "false", "1", "0", "t", "f"):
        raise FieldError("invalid_type", f"must be true or false, got {echo(text)}")
    return text.lower() in ("true", "1", "t")


def parse_query_time(text: str) -> str:
    """A `+` that nobody escaped arrives as a space: 10:00:00 05:30 is 10:00:00+05:30."""
    return re.sub(r" (?=\d\d:\d\d$)", "+", text)


def parse_property_filters(text: str) -> PropertyFilters:
    """`key1:v1,v2;key2:v3`: OR within a key, AND between keys (API: Queries)."""
    filters: PropertyFilters = {}
    for part in text.split(";"):
        key, colon, values = part.partition(":")
        if not colon or not key:
            raise FieldError("invalid_format", f"must look like key1:v1,v2;key2:v3, got {echo(part)}")
        filters[key] = [*(filters.get(key) or []), *values.split(",")]
    return filters


def one_of(*allowed: str, hint: str = "") -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in allowed:
            case = " (case-sensitive)" if text.lower() in map(str.lower, allowed) else ""
            raise FieldError("invalid_format", f"must be one of {', '.join(allowed)}{case}, got {echo(text)}{hint}")
        return text

    return check


check_sort = one_of(*SORTS, hint=f"; its direction goes in order: {' or '.join(ORDERS)}")
check_order = one_of(*ORDERS)
check_kind = one_of(*AGGREGATIONS)
check_window_size = one_of(*WINDOW_SIZES)
check_offset, check_page_size = whole_within(0, MAX_OFFSET), whole_within(-math.inf, math.inf)
Parsers = dict[str, Callable[[str], Any]]
PARAMETER_PARSERS: Parsers = {
    "start_time": parse_query_time, "end_time": parse_query_time, "property_filters": parse_property_filters,
    "page_size": parse_int, "offset": parse_int, "count_total": parse_bool,
}  # fmt: skip


class View(NamedTuple):
    """What a request can see: one environment at one moment, less what a simulated lag still hides."""

    environment: str
    now_us: int
    visible_us: int | None = None  # what was ingested after it is hidden; None: nothing is


class EventQuery(Struct, frozen=True, kw_only=True):
    """What to list: checked, complete, the same from GET and POST (API: Queries)."""

    view: View
    start_us: int  # inclusive, like the end
    end_us: int
    filters: dict[str, str]  # column -> value
    property_filters: dict[str, list[str]]
    page_size: int
    offset: int
    by_name: bool
    descending: bool
    after: Cursor | None
    before: Cursor | None
    count: bool | None  # None: a GET that did not ask, whose answer leaves total_count out

    @property
    def spans_names(self) -> bool:
        """Whether the order by name is another than that by time: of one name, they are the same."""
        return self.by_name and "event_name" not in self.filters


def parse_parameters(query_string: bytes, faults: Faults, repeatable: Iterable[str] = ()) -> dict[str, str]:
    """The query string as a dict, a repeatable parameter's values joined by commas. ApiError (API: Common rules)."""
    try:
        pairs = urllib.parse.parse_qsl(query_string.decode(), keep_blank_values=True, errors="strict")
    except UnicodeDecodeError:
        refuse("query string", "invalid_format", "must be UTF-8, percent-encoded")
    parameters: dict[str, str] = {}
    for name, value in pairs:
        if name in parameters and name not in repeatable:
            faults.add(name[:MAX_ECHO_CHARS], "invalid_format", "is given more than once")
        parameters[name] = f"{parameters[name]},{value}" if name in parameters else value
    return parameters


def query_of_parameters(
    struct: type[T], sent: Mapping[str, str], names: Iterable[str], faults: Faults, parsers: Parsers = PARAMETER_PARSERS
) -> T:
    """The named parameters of a GET, each as the type it has in a body (API: Queries)."""
    parsed = struct()
    for name in names:
        if name in sent:
            setattr(parsed, name, faults.check(name, parsers.get(name, str), sent[name]))
    return parsed


def event_query(sent: EventQueryIn, view: View, max_page_size: int, faults: Faults) -> EventQuery:
    """The query with its defaults filled in. ApiError with every fault, those already noted too (API: Queries)."""
    start_us, end_us = time_range(sent.start_time, sent.end_time, view.now_us, faults)
    after = faults.check("iter_last_key", parse_cursor, sent.iter_last_key)
    before = faults.check("iter_first_key", parse_cursor, sent.iter_first_key)
    if after and before:
        faults.add("iter_first_key", "invalid_format", "and iter_last_key exclude each other: send one of them")
    sort = faults.check("sort", check_sort, sent.sort) or "timestamp"
    order = faults.check("order", check_order, sent.order) or "desc"
    offset = faults.check("offset", check_offset, sent.offset) or 0
    page_size = faults.check("page_size", check_page_size, sent.page_size) or 0
    property_filters = check_property_filters("property_filters", sent.property_filters, faults)
    faults.refuse()
    return EventQuery(
        view=view, start_us=start_us, end_us=end_us, filters=column_filters(sent), property_filters=property_filters,
        page_size=50 if page_size <= 0 else min(page_size, max_page_size), offset=offset,
        by_name=sort == "event_name", descending=order == "desc", after=after, before=before, count=sent.count_total,
    )  # fmt: skip


def column_filters(sent: EventQueryIn) -> dict[str, str]:
    return {column: value for name, column in FILTER_COLUMNS.items() if (value := getattr(sent, name))}


def time_range(start_time: str | None, end_time: str | None, now: int, faults: Faults) -> tuple[int, int]:
    """start and end in microseconds; the end defaults to now, the start to seven days before the end (API: Queries)."""
    end_us = faults.check("end_time", parse_time, end_time)
    end_us = now if end_us is None else end_us
    start_us = faults.check("start_time", parse_time, start_time)
    start_us = end_us - 7 * DAY_US if start_us is None else start_us
    if end_us < start_us:
        problem = f"is {echo(end_time or '')}, before start_time {echo(start_time or '')}"
        faults.add("end_time", "out_of_range", problem if end_time else "is before start_time")
    return start_us, end_us


def check_property_filters(field: str, sent: PropertyFilters | None, faults: Faults) -> dict[str, list[str]]:
    """The filters that filter something: a key without values does not, as on the real server (API: Queries)."""
    filters = {key: values for key, values in (sent or {}).items() if values}
    if sent and "" in sent:
        faults.add(field, "invalid_format", "has an empty key")
    check_filter_limits(field, [*filters.values()], faults)
    return filters


def check_filter_limits(field: str, filters: Sequence[Sequence[str]], faults: Faults) -> None:
    """Of filters the values of each key: so many a statement may name."""
    number = sum(map(len, filters))
    if number > MAX_FILTER_VALUES or len(filters) > MAX_FILTER_KEYS:
        limits = f"{MAX_FILTER_KEYS} keys and {MAX_FILTER_VALUES} values"
        faults.add(field, "out_of_range", f"may hold {limits}, got {len(filters)} keys and {number} values")


class UsageQuery(Struct, frozen=True, kw_only=True):
    """What to aggregate, and into which windows (API: Usage); also what monitoring counts (API: Monitoring)."""

    view: View
    start_us: int
    end_us: int  # exclusive
    aggregation: str = "COUNT"
    property_name: str = ""
    filters: dict[str, str] = {}
    property_filters: dict[str, list[str]] = {}
    multiplier: float = 1.0
    windows: Windows | None = None
    bucketed: bool = False  # the windows are buckets: their sum is wanted, too
    group_property: str = ""  # MAX per group of a bucket
    lifetime: bool = False  # without windows: what is before the range counts, too


def usage_query(sent: UsageIn, view: View, faults: Faults) -> UsageQuery:
    """The checked query. ApiError with every fault (API: Usage)."""
    if not sent.event_name:
        faults.add("event_name", "required", "is required")
    if not sent.aggregation_type:
        faults.add("aggregation_type", "required", f"is required: one of {', '.join(AGGREGATIONS)}")
    kind = faults.check("aggregation_type", check_kind, (sent.aggregation_type or "").upper())
    multiplier = usage_multiplier(sent, kind, faults)
    start_us, end_us = time_range(sent.start_time, sent.end_time, view.now_us, faults)
    window_size = faults.check("window_size", check_window_size, sent.window_size)
    bucket_size = faults.check("bucket_size", check_window_size, sent.bucket_size)
    faults.check("billing_anchor", parse_time, sent.billing_anchor)
    property_filters = check_property_filters("filters", sent.filters, faults)
    faults.refuse()
    kind = kind if kind and sent.property_name else "COUNT"
    bucketed = bool(bucket_size) and kind in ("MAX", "SUM")
    first_group = (sent.group_by or [f"properties.{sent.group_by_property or ''}"])[0]
    grouped = bucketed and kind == "MAX" and first_group.startswith("properties.")
    size = bucket_size if bucketed else window_size
    month_day = int(sent.billing_anchor[8:10]) if sent.billing_anchor else 1  # the day as the anchor has it written
    columns = ("event_name", "external_customer_id", "customer_id")
    return UsageQuery(
        view=view, start_us=start_us, end_us=end_us, aggregation=kind, property_name=sent.property_name or "",
        filters={column: value for column in columns if (value := getattr(sent, column))},
        property_filters=property_filters, multiplier=1.0 if kind == "COUNT" else multiplier,
        windows=Windows(size, parse_zone(sent.timezone or "UTC"), month_day) if size else None, bucketed=bucketed,
        group_property=first_group.removeprefix("properties.") if grouped else "",
    )  # fmt: skip


def usage_multiplier(sent: UsageIn, kind: str | None, faults: Faults) -> float:
    """What a sum is multiplied by, 1 for all types but the one that needs it."""
    is_given = sent.multiplier not in (None, "")
    if kind == "SUM_WITH_MULTIPLIER" and not is_given:
        faults.add("multiplier", "required", f"is required for {kind}")
    elif kind != "SUM_WITH_MULTIPLIER" and is_given and kind:
        faults.add("multiplier", "invalid_format", f"goes with SUM_WITH_MULTIPLIER only, not with {kind}")
    return faults.check("multiplier", check_positive, sent.multiplier) or 1.0


def monitoring_query(query_string: bytes, view: View) -> UsageQuery:
    """GET /v1/events/monitoring: both ends or neither, by default the last 24 hours (API: Monitoring)."""
    faults = Faults()
    parameters = parse_parameters(query_string, faults)
    sent = query_of_parameters(EventQueryIn, parameters, EVENT_FILTERS, faults)
    if bool(sent.start_time) is not bool(sent.end_time):
        missing, given = ("start_time", "end_time") if sent.end_time else ("end_time", "start_time")
        faults.add(missing, "required", f"is required with {given}")
    start_us, end_us = time_range(sent.start_time, sent.end_time, view.now_us, faults)
    size = faults.check("window_size", check_window_size, parameters.get("window_size"))
    property_filters = check_property_filters("property_filters", sent.property_filters, faults)
    faults.refuse()
    return UsageQuery(
        view=view, start_us=start_us if sent.start_time else end_us - DAY_US, end_us=end_us,
        filters=column_filters(sent), property_filters=property_filters, windows=Windows(size) if size else None,
    )  # fmt: skip


# ---------------------------------------------------------------------------------------------- SQL

SCHEMA_VERSION = 1
APPLICATION_ID = 0x45565354
PRAGMAS = (
    "PRAGMA journal_mode = WAL",  # readers and the writer do not wait for each other
    "PRAGMA synchronous = FULL",  # every commit is synced: what 202 promises (API: Sending events)
    "PRAGMA fullfsync = ON",  # macOS: its fsync alone leaves the data in the drive's cache
    "PRAGMA wal_autocheckpoint = 16000",  # 64 MB; with random ids +40-70 % over the default of 1000 pages
    "PRAGMA journal_size_limit = 67108864",  # a WAL that a burst made large shrinks again
    "PRAGMA busy_timeout = 5000",  # another process (an import) may hold a lock for a moment
)
WRITER_PRAGMAS = (
    # 32 MB, for the index pages that random ids touch: at a million events 16 MB take 0.92 times as many, 64 MB 1.05.
    "PRAGMA cache_size = -32768",
    "PRAGMA busy_timeout = 5",  # execute_writing asks again: SQLite's own pauses grow to 100 ms
)
WRITE_LOCK_TIMEOUT_S = 5.0
READER_PRAGMAS = ("PRAGMA query_only = ON",)
Parameters = dict[str, object]  # of a statement, by name

INSERT = f"INSERT INTO events ({', '.join(Row._fields)}) VALUES "
# Unlike INSERT OR IGNORE this forgives a known id and nothing else: a NULL or a wrong type still fails.
ON_KNOWN_ID = " ON CONFLICT (environment, id) DO NOTHING"
INSERT_ROWS = 64  # of one statement, more gain nothing; each smaller number has one of its own, prepared once
START_CLAUSE = "timestamp_us >= :start_us"
END_CLAUSE = "timestamp_us <= :end_us"
TIME_ORDER = ("timestamp_us", "id")
NAME_ORDER = ("event_name", "timestamp_us", "id")
SEPARATOR = "\x1e"  # which no JSON text can hold
MAX_PAGE_BYTES = 128 * 1024 * 1024  # it is held some five times while it is made; SQLite takes 1 GB
_JSON_SCALAR = re.compile(r"-?(0|[1-9][0-9]*)(\.[0-9]+)?([eE][+-]?[0-9]+)?|true|false")
_MIN_REAL, _MAX_REAL = (f"CAST('{sign}1.7976931348623157e308' AS REAL)" for sign in ("-", ""))
_ESCAPED_IN_JSON = re.compile(r'["\\\x00-\x1f]')

# The newest rows, as many as were inserted: those that a statement passes over use up numbers, too.
SELECT_NEW_IDS = """SELECT json_group_array(json_array(environment, id)) FROM
    (SELECT environment, id FROM events WHERE seq <= last_insert_rowid() ORDER BY seq DESC LIMIT :inserted)"""
NEW_IDS = msgspec.json.Decoder(list[tuple[int, str]])
SELECT_ENVIRONMENT = "SELECT id FROM environments WHERE name = :environment"
ADD_ENVIRONMENT = "INSERT INTO environments (name) VALUES (:environment) ON CONFLICT DO NOTHING"
IN_ENVIRONMENT = f"environment = ({SELECT_ENVIRONMENT})"
SELECT_NAME = f"SELECT event_name FROM events WHERE {IN_ENVIRONMENT} AND id = :id"
# count(*) of a large file reads a whole index: there the numbers tell, too high if events were deleted or sent twice.
COUNT_ALL = """SELECT iif(few <= 100000, few, (SELECT max(seq) FROM events) - (SELECT min(seq) FROM events) + 1)
    FROM (SELECT count(*) AS few FROM (SELECT 1 FROM events LIMIT 100001))"""
COUNT_HIDDEN = f"SELECT count(*) FROM events WHERE {IN_ENVIRONMENT} AND ingested_at_us > :visible_us"


def time_expression(column: str) -> str:
    """A time as Go writes it, counted from the year 1 so that no division is of a negative. datetime() and replace()
    take half as long as strftime(), and the two times of each event are half of what a page takes."""
    since_year_1 = f"({column} - {MIN_TIME_US})"
    seconds = f"{since_year_1} / 1000000 + {MIN_TIME_US // 1000000}"
    digits = f"substr(1000000 + {since_year_1} % 1000000, 2)"
    return f"replace(rtrim(rtrim(datetime({seconds}, 'unixepoch') || '.' || {digits}, '0'), '.') || 'Z', ' ', 'T')"


# An Event but for its environment. A page of 50 takes 120 us so, and 170 as rows of which Python makes structs.
EVENT_JSON = f"""rtrim(json_object('id', id, 'external_customer_id', external_customer_id, 'customer_id', customer_id,
    'event_name', event_name, 'source', source, 'timestamp', {time_expression("timestamp_us")},
    'ingested_at', {time_expression("ingested_at_us")}), '}}') || ',"properties":' || properties"""


@lru_cache
def insert_statement(rows: int) -> str:
    """One statement for many rows: Python's executemany lets go of the GIL at every row, and fights for it."""
    return INSERT + ", ".join([f"({', '.join('?' * len(Row._fields))})"] * rows) + ON_KNOWN_ID


def index_of(columns: Mapping[str, str] | Sequence[str]) -> str:
    """Names the index to use where these are given: that of the fewest events, in the order of a page. Left to itself,
    SQLite 3.50 takes that by time for every page, and looks through all customers' events for those of one."""
    indexes = {"id": "id", "external_customer_id": "customer", "event_name": "name"}
    return f"INDEXED BY events_by_{next((index for name, index in indexes.items() if name in columns), 'time')}"


def filter_clauses(query: EventQuery | UsageQuery, parameters: Parameters) -> list[str]:
    """The WHERE clauses of all but the range and the cursor; every value, the range's too, goes to `parameters`."""
    clauses = [IN_ENVIRONMENT]
    parameters |= {"environment": query.view.environment, "start_us": query.start_us, "end_us": query.end_us}
    if query.view.visible_us is not None:
        clauses.append("ingested_at_us <= :visible_us")
        parameters["visible_us"] = query.view.visible_us
    clauses += [f"{column} = :{column}" for column in query.filters]
    parameters.update(query.filters)
    for number, (key, values) in enumerate(query.property_filters.items()):
        clauses.append(property_clause(number, key, values, parameters))
    return clauses


def keyset_clauses(query: EventQuery, cursor: Cursor | None, descending: bool, parameters: Parameters) -> list[str]:
    """The WHERE clauses of the time range and of the cursor, in the direction in which rows are read."""
    if cursor is None:
        return [START_CLAUSE, END_CLAUSE]
    parameters |= {"cursor_us": cursor.timestamp_us, "cursor_id": cursor.id}
    comparison = "<" if descending else ">"
    if query.by_name and parameters["cursor_name"] != query.filters.get("event_name"):
        keyset = f"(event_name, timestamp_us, id) {comparison} (:cursor_name, :cursor_us, :cursor_id)"
        return [START_CLAUSE, END_CLAUSE, keyset]
    # Only the tighter of two bounds: SQLite would seek by one, perhaps the other, and a deep page read all before it.
    keyset = f"(timestamp_us, id) {comparison} (:cursor_us, :cursor_id)"
    if descending:
        return [START_CLAUSE, keyset if cursor.timestamp_us <= query.end_us else END_CLAUSE]
    return [keyset if cursor.timestamp_us >= query.start_us else START_CLAUSE, END_CLAUSE]


def property_clause(number: int, key: str, values: Sequence[str], parameters: Parameters) -> str:
    """Does a property equal one of the texts, be it a string, a number or a boolean (API: Queries)?"""
    texts = json_texts(values)
    names = [f"filter{number}_{i}" for i in range(len(texts))]
    parameters.update(zip(names, texts, strict=True))
    value = property_expression("property_json", f"filter{number}", key, parameters)
    return f"{value} IN ({', '.join(':' + name for name in names)})"


def json_texts(values: Sequence[str]) -> list[str]:
    """What `property_json` may have of a property that equals one of the values."""
    return [f'"{value}"' for value in values] + [value for value in values if _JSON_SCALAR.fullmatch(value)]


def property_expression(function: str, name: str, key: str, parameters: Parameters) -> str:
    """A top-level property as `property_json` or `property_text` has it: by `->`, whose answer is JSON, or by these if
    there is a backslash: SQLite's paths hold no quote and, before 3.45, compare a key with its escaped form."""
    parameters |= {f"{name}_key": key, f"{name}_path": f'$."{key}"'}
    plain = "NULL" if _ESCAPED_IN_JSON.search(key) else f"properties -> :{name}_path"
    if function == "property_text":
        plain = f"trim(nullif({plain}, 'null'), '\"')"
    return f"CASE WHEN properties LIKE '%\\%' THEN {function}(properties, :{name}_key) ELSE {plain} END"


def number_expression(name: str, key: str, parameters: Parameters) -> str:
    """A property as `property_number` has it. Read once, as v: a sum takes 0.8 to 0.97 times as long."""
    parameters |= {f"{name}_key": key, f"{name}_path": "$" if _ESCAPED_IN_JSON.search(key) else f'$."{key}"'}
    # Compared with a REAL, a text that is a number becomes one; any other is greater than every number. White space
    # around it is forgiven: so it may not begin with any, and no exponent can follow it if it ends in some.
    is_number = f"BETWEEN {_MIN_REAL} AND {_MAX_REAL}"
    is_true = f"v = 1 AND properties -> :{name}_path = 'true'"
    return f"""(SELECT CASE
        WHEN v BETWEEN '!' AND ':' AND (v || 'e0') {is_number} THEN CAST(v AS REAL)
        WHEN v < '' AND v {is_number} THEN CASE WHEN {is_true} THEN 0.0 ELSE CAST(v AS REAL) END
        WHEN v BETWEEN '!' AND ':' OR properties LIKE '%\\%' THEN property_number(properties, :{name}_key)
        ELSE 0.0 END FROM (SELECT properties ->> :{name}_path AS v))"""


def property_json(properties: str, key: str) -> str | None:
    """SQL function: a top-level property's JSON text, a string's without escapes; NULL if there is none."""
    raw = bytes(MEMBERS.decode(properties).get(key, b""))
    if raw[:1] in (b"{", b"["):
        raw = msgspec.json.format(raw, indent=-1)  # without white space, as `->` has it
    return f'"{STRING.decode(raw)}"' if raw[:1] == b'"' else raw.decode() or None


def property_text(properties: str, key: str) -> str | None:
    """SQL function: a string property itself, the JSON text of any other; NULL if it is null or there is none."""
    text = property_json(properties, key)
    return text[1:-1] if text and text[0] == '"' else None if text == "null" else text


def property_number(properties: str, key: str) -> float:
    """SQL function: a property that is a number or the text of one; 0 if it is not (API: Usage)."""
    text = property_text(properties, key) or ""
    number = float(text) if DECIMAL.fullmatch(text) else 0.0
    return number if math.isfinite(number) else 0.0


# Of an event's value in WEIGHTED_SUM: how long it was there, of the range.
WEIGHT = "ifnull((:end_us - max(timestamp_us, :start_us)) * 1.0 / (:end_us - :start_us), 1.0)"


def sum_of(value: str, condition: str = "") -> str:
    """The sum of a column. One that overflows is NULL in SQLite 3.43 to 3.45, that of 2**-60 of each does not."""
    if (3, 43) <= sqlite3.sqlite_version_info < (3, 46):
        return f"(total({value} * {2.0**-60}){condition} * {2.0**60})"
    return f"total({value}){condition}"


def usage_statement(query: UsageQuery, parameters: Parameters) -> str:
    """One value per pair of :bounds, NULL where there are no events."""
    text = property_expression("property_text", "property", query.property_name, parameters)
    number = number_expression("number", query.property_name, parameters)
    where = " AND ".join(filter_clauses(query, parameters))
    within = "timestamp_us >= bound.value ->> 0 AND timestamp_us < bound.value ->> 1"
    rows = f"FROM events {index_of(query.filters)} WHERE {where} AND {within}"
    # Of the newest event, or of the greatest: next to max(), SQLite has the other columns of its row.
    exact = "property_number(properties, :number_key)"
    aggregate = {
        "COUNT": "count(*)", "LATEST": exact, "MAX": f"iif(max({number}) IS NULL, NULL, {exact})",
        "AVG": f"printf('%!.17g %d', {sum_of(number)}, count(*))",
        # A text may be in two pieces of a range, so a piece names its texts; a window counts its own.
        "COUNT_UNIQUE": f"count(DISTINCT {text})" if query.windows else f"json_group_array(DISTINCT {text})",
        "WEIGHTED_SUM": sum_of(f"{number} * {WEIGHT}"),
    }.get(query.aggregation, sum_of(number))  # fmt: skip
    if query.group_property:
        group = property_expression("property_text", "group", query.group_property, parameters)
        aggregate, rows = sum_of("v"), f"FROM (SELECT max({number}) AS v {rows} GROUP BY ifnull({group}, ''))"
    cell = f"SELECT CASE WHEN count(*) > 0 THEN {aggregate} END {rows}"
    if query.aggregation == "LATEST":
        cell = f"SELECT {exact} {rows} ORDER BY timestamp_us DESC, id DESC LIMIT 1"
    return f"SELECT ({cell}) FROM json_each(:bounds) AS bound"


# ---------------------------------------------------------------------------------------------- operations


def execute_writing(
    conn: sqlite3.Connection, timeout_s: float, statement: str, values: Sequence[object] | Parameters = ()
) -> sqlite3.Cursor:
    """Execute a statement that needs the write lock, asked for every 5 ms: a writer elsewhere leaves short gaps."""
    deadline = time.monotonic() + timeout_s
    while True:
        try:
            return conn.execute(statement, values)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise


def environment_number(conn: sqlite3.Connection, name: str) -> int:
    """What events hold in place of their environment's name; a new name gets a number."""
    parameters: Parameters = {"environment": name}
    execute_writing(conn, WRITE_LOCK_TIMEOUT_S, ADD_ENVIRONMENT, parameters)
    return int(conn.execute(SELECT_ENVIRONMENT, parameters).fetchone()[0])


def insert_events(conn: sqlite3.Connection, rows: Sequence[Row], lock_timeout_s: float) -> int:
    """Store rows in one transaction; returns how many were new. After an error it may be open: roll back, or close.

    Whatever fits one statement is a transaction without BEGIN and COMMIT. At every call Python gives the GIL away, and
    waits for it while the event loop is busy: with one call, not three, 8 clients send 1.4 times as many single events.
    """
    if not rows:
        return 0
    if len(rows) > INSERT_ROWS:
        execute_writing(conn, lock_timeout_s, "BEGIN IMMEDIATE")
    inserted = 0
    for at in range(0, len(rows), INSERT_ROWS):
        chunk = rows[at : at + INSERT_ROWS]
        values = list(itertools.chain.from_iterable(chunk))
        inserted += execute_writing(conn, lock_timeout_s, insert_statement(len(chunk)), values).rowcount
    if conn.in_transaction:
        conn.execute("COMMIT")
    return inserted


def insert_group(conn: sqlite3.Connection, group: Sequence[Sequence[Row]]) -> list[int]:
    """Store the rows of several requests in one transaction; returns how many of each were new."""
    rows = list(itertools.chain.from_iterable(group))
    inserted = insert_events(conn, rows, WRITE_LOCK_TIMEOUT_S)
    if inserted in (0, len(rows)):
        return [len(rows) if inserted else 0 for rows in group]
    if len(group) == 1:
        return [inserted]
    try:
        new = set(NEW_IDS.decode(conn.execute(SELECT_NEW_IDS, {"inserted": inserted}).fetchone()[0]))
    except (sqlite3.Error, msgspec.DecodeError):  # stored they are: a count too high is better than to deny it
        log.exception("it could not be counted which of %d events were new", len(rows))
        new = {(row.environment, row.id) for row in rows}
    counts = []
    for request_rows in group:
        found = new.intersection((row.environment, row.id) for row in request_rows)
        new -= found  # if a later request has the id as well, there it was known
        counts.append(len(found))
    return counts


def list_events(conn: sqlite3.Connection, query: EventQuery) -> EventPage:
    """One page (API: Queries). ApiError if a cursor of sort=event_name names an unknown event."""
    parameters: Parameters = {}
    where = " AND ".join(filter_clauses(query, parameters))
    cursor = query.after or query.before
    if cursor and query.by_name:
        parameters["cursor_name"] = name_of_cursor(conn, query.view.environment, cursor, query.before is not None)
    descending = query.descending is (query.before is None)  # iter_first_key reads backwards from its cursor
    bounds = " AND ".join(keyset_clauses(query, cursor, descending, parameters))
    direction = "DESC" if descending else "ASC"
    order = ", ".join(f"{column} {direction}" for column in (NAME_ORDER if query.spans_names else TIME_ORDER))
    parameters |= {"limit": query.page_size + 1, "offset": 0 if cursor else query.offset}
    index = index_of(["event_name"] if query.spans_names and "id" not in query.filters else query.filters)
    clauses = f"{index} WHERE {where} AND {bounds} ORDER BY {order} LIMIT :limit OFFSET :offset"
    counted = f"{index_of(query.filters)} WHERE {where} AND {START_CLAUSE} AND {END_CLAUSE}" if query.count else None
    try:
        events, number, total_count = select_events(conn, query.view.environment, clauses, parameters, counted)
    except sqlite3.DataError:  # longer than a page may be: a shorter one, and the rest on the next
        if query.page_size == 1:
            raise
        return list_events(conn, msgspec.structs.replace(query, page_size=query.page_size // 2))
    has_more = number > query.page_size
    if has_more:
        events = events.rpartition(SEPARATOR)[0]
    if query.before:
        events = SEPARATOR.join(reversed(events.split(SEPARATOR)))
    return EventPage(
        events=Raw(f"[{events.replace(SEPARATOR, ',')}]"), has_more=has_more,
        iter_first_key=key_of(events.partition(SEPARATOR)[0]), iter_last_key=key_of(events.rpartition(SEPARATOR)[2]),
        total_count=UNSET if query.count is None else total_count,
        offset=None if cursor else query.offset + query.page_size,
    )  # fmt: skip


def name_of_cursor(conn: sqlite3.Connection, environment: str, cursor: Cursor, before: bool) -> str:
    """With sort=event_name the place of a cursor is that of its event's name, too."""
    row = conn.execute(SELECT_NAME, {"environment": environment, "id": cursor.id}).fetchone()
    if row is None:
        problem = f"must end in the id of a stored event to sort by event_name, got {echo(cursor.id)}"
        problem += ": if it was deleted since, begin anew without a cursor"
        refuse("iter_first_key" if before else "iter_last_key", "invalid_format", problem)
    return str(row[0])


def key_of(event: str) -> str | None:
    """The cursor that stands at an event; none on an empty page."""
    if not event:
        return None
    place = PLACE.decode(event)
    return Cursor(to_us(place.timestamp), place.id).text


def select_events(
    conn: sqlite3.Connection, environment: str, clauses: str, parameters: Parameters, counted: str | None = None
) -> tuple[str, int, int | None]:
    """The JSON of the events that match `clauses`, their number, and that of the events that match `counted`. They come
    as one text: Python's sqlite3 lets go of the GIL at every row, and a list of texts takes half as long again."""
    parameters["end"] = end = f',"environment_id":{ENCODER.encode(environment).decode()}}}'
    parameters["separator"] = end + SEPARATOR
    counting = f"(SELECT count(*) FROM events {counted})" if counted else "NULL"
    found = f"SELECT {EVENT_JSON} AS event FROM events {clauses}"
    statement = f"SELECT group_concat(event, :separator) || :end, count(*), {counting} FROM ({found})"
    # A page of one, for which two are read, may be as long as SQLite takes: -1 leaves the limit as it is.
    usual_bytes = conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, -1 if parameters["limit"] == 2 else MAX_PAGE_BYTES)
    try:
        events, number, total_count = conn.execute(statement, parameters).fetchone()
    finally:
        conn.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, usual_bytes)
    return events or "", number, total_count


def find_event(conn: sqlite3.Connection, query: EventQuery, hint: str = "") -> EventLookup:
    """The one event that a query with an event_id finds. ApiError: not_found (API: Lookup)."""
    page = list_events(conn, query)
    if page.iter_first_key is None:
        raise ApiError("not_found", f"no event with the id {echo(query.filters['id'])} in this environment{hint}")
    return EventLookup(Raw(bytes(page.events)[1:-1]))  # the only one of the array


def usage_bounds(query: UsageQuery, pieces: int) -> tuple[list[int], list[tuple[int, int]]]:
    """What to aggregate, each alone: the windows' starts and their ranges; without windows, pieces of the range."""
    if query.start_us == query.end_us and not query.lifetime:
        return [], []
    if query.windows:
        starts = query.windows.bounds(query.start_us, query.end_us)
        return starts[:-1], list(itertools.pairwise([query.start_us, *starts[1:-1], query.end_us]))
    starts = [query.start_us + (query.end_us - query.start_us) * i // pieces for i in range(pieces + 1)]
    starts = [MIN_TIME_US, *starts] if query.lifetime else starts
    return starts[:-1], list(itertools.pairwise(starts))


def usage_cells(conn: sqlite3.Connection, query: UsageQuery, bounds: Sequence[tuple[int, int]]) -> list[Any]:
    """An aggregate per range, None where there are no events."""
    parameters: Parameters = {"bounds": json.dumps(bounds)}
    return [row[0] for row in conn.execute(usage_statement(query, parameters), parameters).fetchall()]


def usage_value(query: UsageQuery, cells: Iterable[Any]) -> float:
    """The aggregate of ranges that follow one another; a negative one is answered as 0 (API: Usage)."""
    found = [cell for cell in cells if cell is not None]
    if query.aggregation == "AVG":
        sums, counts = zip(*(cell.split() for cell in found), strict=True) if found else ("0", "1")
        value = sum(map(float, sums)) / sum(map(int, counts))
    elif query.aggregation == "COUNT_UNIQUE" and not query.windows:
        value = len(set().union(*map(TEXTS.decode, found)) - {None})
    elif query.aggregation == "LATEST":
        value = found[-1] if found else 0.0
    elif query.aggregation == "MAX" and not query.bucketed:
        value = max(found, default=0.0)
    else:
        value = sum(found) * query.multiplier
    return min(max(0.0, float(value)), sys.float_info.max)  # JSON has no infinity


def usage_answer(query: UsageQuery, starts: list[int], cells: list[Any]) -> Usage:
    found = [(start, cell) for start, cell in zip(starts, cells, strict=True) if query.windows and cell is not None]
    results = [UsageResult(to_datetime(start), usage_value(query, [cell])) for start, cell in found]
    value = usage_value(query, cells) if query.bucketed or not query.windows else None
    return Usage(query.filters["event_name"], query.aggregation, value, results)


def monitoring_answer(hidden: int, behind: int, query: UsageQuery, starts: list[int], cells: list[Any]) -> Monitoring:
    counted = [(start, cell) for start, cell in zip(starts, cells, strict=True) if cell]
    points = [MonitoringPoint(to_datetime(start), count) for start, count in counted] if query.windows else []
    return Monitoring(sum(count for _, count in counted), hidden, behind, points)


# ---------------------------------------------------------------------------------------------- Store

# A commit takes what waits, up to about so many events: with 32 clients of batches, 16,000 are 1.4 times as fast as
# 4,000. Who sends single events does not wait for all that: they go first, and while they come groups are short. Beside
# 64 clients of batches p99 of a single event is 0.15 s so, 1.2 s in the order of arrival.
GROUP_EVENTS, SHORT_GROUP_EVENTS = 16_000, 2_000
FEW_EVENTS = 10
READER_THREADS = 4
TRIAL_PAUSE_S = 1.0  # between two trials of a commit, after one that failed
QUICK_S = 0.001  # what a read may take on the event loop itself, about as long as it parses a batch
PROGRESS_STEPS = 10_000  # of SQLite's machine between two looks at the clock, more than a page of 50 takes
SQLITE_PROBLEMS: dict[int, tuple[str, ...]] = {  # what is wrong, and what to do about it
    sqlite3.SQLITE_FULL: ("the disk is full", "make room on it"),
    sqlite3.SQLITE_IOERR: ("the disk answered with an error", "look at the system's log"),
    sqlite3.SQLITE_BUSY: ("another process has locked the database", "end that process"),
    sqlite3.SQLITE_READONLY: ("the database is read-only", "make it and its folder writable"),
    sqlite3.SQLITE_CANTOPEN: ("the database cannot be opened for writing", "check it and its folder"),
    sqlite3.SQLITE_CORRUPT: ("the database is damaged", "restore it from a copy"),
    sqlite3.SQLITE_NOTADB: ("the file is not a SQLite database",),
}
_Queue = queue.SimpleQueue["_Task | None"]  # None: close


class _Task(NamedTuple):
    work: Any  # rows, for the writer only, or a function of a connection
    answer: asyncio.Future[Any]

    def settle(self, outcome: object) -> None:
        """Hand the outcome to whoever waits for it. For any thread."""
        with suppress(RuntimeError):  # a loop that is closed has nobody waiting
            self.answer.get_loop().call_soon_threadsafe(self._set, outcome)

    def _set(self, outcome: object) -> None:
        if self.answer.done():  # its client has gone
            return
        if isinstance(outcome, Exception):
            self.answer.set_exception(outcome)
        else:
            self.answer.set_result(outcome)


class Reader:
    """A read-only connection whose queries end when their time is up."""

    def __init__(self, path: str) -> None:
        self.conn = connect_reader(path)
        self.conn.set_progress_handler(lambda: self.closing or time.monotonic() > self.deadline, PROGRESS_STEPS)
        self.deadline = 0.0
        self.closing = False  # a deadline alone would be set anew by the next query

    def run(self, operation: Callable[[sqlite3.Connection], T], limit_s: float) -> T:
        """The operation's result. TimeoutError if it takes longer than limit_s."""
        self.deadline = time.monotonic() + limit_s
        try:
            return operation(self.conn)
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT:
                raise TimeoutError from None
            raise


class Store:
    """One SQLite file: a writer thread that commits whole groups of requests, and reader threads.

    `insert` and `read` are for an event loop, `close` for any thread but the store's own. Raises StartError.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._folder = tempfile.TemporaryDirectory(prefix="eventstore-") if settings.db == ":memory:" else None
        self.path = os.path.join(self._folder.name, "events.db") if self._folder else settings.db
        # What is removed at exit need not be on the disk before the answer.
        self.writer_pragmas = (*WRITER_PRAGMAS, "PRAGMA synchronous = OFF") if self._folder else WRITER_PRAGMAS
        self.events_at_start = prepare_file(self.path)
        self._closing = False
        self._gate = threading.Lock()
        self._pending_events = 0  # touched by the event loop only
        self._writes: _Queue = queue.SimpleQueue()
        self._waiting: list[_Task] = []  # what the writer has taken from there
        self._short_until_s = 0.0
        self._failure: str | None = None  # of the last commit
        self._trial_s = 0.0  # when it was last tried again
        self._reads: _Queue = queue.SimpleQueue()
        self._writer = threading.Thread(target=self._write_until_closed, name="eventstore-writer", daemon=True)
        with _start_errors(self.path):  # here, not in the threads: nobody would answer those who wait for a dead one
            self._conn = connect(self.path, self.writer_pragmas)
            self.environments: dict[str, int] = {}  # name -> what rows hold in its place
            self.add_environments(key.environment for key in settings.api_keys)
            self._quick_reader = Reader(self.path)
            self._quick_reader.conn.execute("PRAGMA busy_timeout = 0")  # the event loop does not wait for a lock
            self._readers = [Reader(self.path) for _ in range(READER_THREADS)]
        self._files = _files_of(self.path)
        self._wal_limit_bytes = settings.wal_bytes
        reading = partial(threading.Thread, target=self._read_until_closed, name="eventstore-reader", daemon=True)
        self._reader_threads = [reading(args=[reader]) for reader in self._readers]
        for thread in (self._writer, *self._reader_threads):
            thread.start()

    def add_environments(self, names: Iterable[str]) -> None:
        """Make them known. For any thread but an event loop's; sqlite3.Error."""
        with closing(connect(self.path, self.writer_pragmas)) as conn:
            self.environments |= {name: environment_number(conn, name) for name in names}

    async def insert(self, rows: Sequence[Row]) -> int:
        """Store all rows or none; returns, once they are synced to disk, how many were new (API: Sending events).

        ApiError: service_unavailable if too much waits or the store is closing, database_error if the commit failed.
        """
        limit = self._settings.queue_events
        if self._pending_events and self._pending_events + len(rows) > limit:
            reason = f"{self._pending_events} events wait to be written, the limit is {limit}"
            raise ApiError("service_unavailable", f"{reason}; nothing was stored, try again", retry_after_s=1)
        self._pending_events += len(rows)
        try:
            return int(await self._ask(self._writes, rows))
        finally:
            self._pending_events -= len(rows)

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]:
        """Run an operation in a transaction of its own, which an ApiError of it undoes. For the rest as `insert`."""
        return self._ask(self._writes, operation)

    async def failure(self) -> str | None:
        """Why events cannot be stored, None if they can: as the last commit went, or since it failed a trial of one."""
        if self._failure and time.monotonic() > self._trial_s + TRIAL_PAUSE_S:
            self._trial_s = time.monotonic()
            with suppress(ApiError):
                await self.write(lambda conn: conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}"))
        return self._failure

    async def read(self, operation: Callable[[sqlite3.Connection], T], quick: bool = True) -> T:
        """Run a reading operation, which is one statement if it needs one snapshot.

        A quick one gets a millisecond on the event loop; if not done it starts over in a reader thread. With a thread
        for every page the hand-over costs a sixth of the server's time, and a client gets 0.85 times as many a second.

        ApiError: service_unavailable if it takes longer than query_timeout_s, database_error if SQLite fails.
        """
        if quick and not self._closing:
            with suppress(TimeoutError, sqlite3.Error):
                return self._quick_reader.run(operation, QUICK_S)
        result: T = await self._ask(self._reads, operation)
        return result

    def close(self) -> None:
        """End what is being read, commit what waits, checkpoint, close the file. A second call does nothing."""
        if self._closing:
            return
        with self._gate:
            self._closing = True
        for reader in self._readers:
            reader.closing = True  # ends what it runs
            self._reads.put(None)
        for thread in self._reader_threads:
            thread.join()
        for reader in (*self._readers, self._quick_reader):
            reader.conn.close()
        self._writes.put(None)
        self._writer.join()  # last: the last connection to close removes the WAL
        if self._folder:
            self._folder.cleanup()

    def _ask(self, tasks: _Queue, work: object) -> asyncio.Future[Any]:
        answer = asyncio.get_running_loop().create_future()
        with self._gate:  # what is put in after the threads' None would never be answered
            if self._closing:
                raise ApiError("service_unavailable", "the server is shutting down; nothing was done", retry_after_s=1)
            tasks.put(_Task(work, answer))
        return answer

    def _read_until_closed(self, reader: Reader) -> None:
        while task := self._reads.get():
            task.settle(self._read(reader, task.work))

    def _read(self, reader: Reader, operation: Callable[[sqlite3.Connection], object]) -> object:
        limit_s = self._settings.query_timeout_s
        try:
            return reader.run(operation, limit_s)
        except TimeoutError:
            limit = f"the query took longer than {limit_s:g} s; narrow its time range or its filters"
            reason = "the server is shutting down" if self._closing else limit
            return ApiError("service_unavailable", reason, retry_after_s=1)
        except sqlite3.Error:
            log.exception("reading failed")
            return ApiError("database_error", "the events could not be read; the server's log says why")
        except Exception as error:
            return error

    def _write_until_closed(self) -> None:
        while group := self._next_group():
            for task, outcome in zip(group, self._commit(group), strict=True):
                task.settle(outcome)
            self._shorten_wal()
        with suppress(sqlite3.Error):
            self._conn.execute("PRAGMA busy_timeout = 0")  # another process may be in the way; the WAL is as safe
            self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        self._conn.close()

    def _check_files(self) -> None:
        """FileNotFoundError if SQLite would write into a file that was removed, and that ends with the process."""
        files = _files_of(self.path)
        if len(files) != len(self._files) or not all(map(os.path.samestat, files, self._files)):
            raise FileNotFoundError(f"{self.path} or its -wal was removed or replaced: put it back, or restart")
        self._files = files

    def _shorten_wal(self) -> None:
        """Write a WAL that has grown too long into the file, and start it over.

        SQLite does so when nobody reads; reads that overlap without end, four clients' sums over 100,000 events, let it
        grow by 40 MB a second. Here the writer waits for those under way, as long as for a lock; if they take longer,
        again when the WAL is twice as long, not all the time. Its length is what the last commit has found."""
        wal_bytes = self._files[-1].st_size
        if wal_bytes <= self._wal_limit_bytes:
            return
        self._wal_limit_bytes = 2 * wal_bytes
        with suppress(sqlite3.Error):
            self._conn.execute("PRAGMA busy_timeout = 5000")  # readers take longer than another writer
            try:
                is_busy, _, _ = self._conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
            finally:
                self._conn.execute("PRAGMA busy_timeout = 5")
            if is_busy:
                megabytes = wal_bytes >> 20
                log.warning("%s-wal has %d MB: some query keeps it from being shortened", self.path, megabytes)
            else:
                self._wal_limit_bytes = self._settings.wal_bytes

    def _next_group(self) -> list[_Task]:
        """The next commit's requests: an operation alone, or all of few events and some others. Empty when closed."""
        self._take_waiting(block=True)
        for place, task in enumerate(self._waiting):
            if callable(task.work):
                return [self._waiting.pop(place)]
        few = [task for task in self._waiting if len(task.work) <= FEW_EVENTS]
        many = [task for task in self._waiting if len(task.work) > FEW_EVENTS]
        now_s = time.monotonic()
        if few:
            self._short_until_s = now_s + 1
        limit = SHORT_GROUP_EVENTS if now_s < self._short_until_s else GROUP_EVENTS
        number = bisect_left(list(itertools.accumulate(len(task.work) for task in many)), limit) + 1
        self._waiting = many[number:]
        return few + many[:number]

    def _take_waiting(self, block: bool = False) -> None:
        """Take what has come; on request, wait for the first."""
        with suppress(queue.Empty):
            while task := self._writes.get(block=block and not self._waiting):
                self._waiting.append(task)
            self._writes.put(None)  # for the next call

    def _commit(self, group: list[_Task]) -> list[object]:
        """What became of each request of the group; a failed commit stores none of them."""
        try:
            self._check_files()
            if self._conn.in_transaction:  # the last group's could not be rolled back: nobody would commit this one
                self._conn.execute("ROLLBACK")
            outcomes = self._write(group)
        except Exception as error:
            with suppress(sqlite3.Error):  # a full disk may refuse it, too; this thread must go on
                if self._conn.in_transaction:
                    self._conn.execute("ROLLBACK")
            if isinstance(error, ApiError):  # an operation's own refusal
                return [error]
            known, self._failure = self._failure, failure_reason(error)
            if getattr(error, "sqlite_errorcode", 0) & 0xFF != sqlite3.SQLITE_BUSY:
                if self._failure != known:  # each refused request has its line; one traceback will do
                    log.exception("a commit failed; none of its %d requests was stored", len(group))
                message = "the database refused the write; nothing was stored, the server's log says why"
                return [ApiError("database_error", message) for _ in group]
            # Whoever waits behind would wait in vain, too, group after group, each as long as this one.
            self._take_waiting()
            group += self._waiting
            self._waiting = []
            message = "another process has locked the database; nothing was stored, try again"
            return [ApiError("service_unavailable", message, retry_after_s=1) for _ in group]
        self._failure = None
        return outcomes

    def _write(self, group: list[_Task]) -> list[object]:
        if not callable(group[0].work):
            return list(insert_group(self._conn, [task.work for task in group]))
        execute_writing(self._conn, WRITE_LOCK_TIMEOUT_S, "BEGIN IMMEDIATE")
        outcome = group[0].work(self._conn)
        self._conn.execute("COMMIT")
        return [outcome]


def failure_reason(error: Exception) -> str:
    """Why a commit failed, in words that may be told to anyone: no path is in them."""
    if isinstance(error, OSError):
        return "the database file was removed or replaced, or cannot be looked at"
    known = SQLITE_PROBLEMS.get(getattr(error, "sqlite_errorcode", 0) & 0xFF)
    return known[0] if known else "the database refused a write"


def connect(path: str, pragmas: Iterable[str] = ()) -> sqlite3.Connection:
    """A connection in autocommit mode: transactions are begun and ended in so many words."""
    conn = sqlite3.connect(path, isolation_level=None, check_same_thread=False)  # close() closes the readers'
    for pragma in (*PRAGMAS, *pragmas):
        conn.execute(pragma)
    return conn


def connect_reader(path: str) -> sqlite3.Connection:
    conn = connect(path, READER_PRAGMAS)
    for function in (property_json, property_text, property_number):
        conn.create_function(function.__name__, 2, function, deterministic=True)
    return conn


def _files_of(path: str) -> list[os.stat_result]:
    """The database and its WAL, those that are there."""
    files = []
    for name in (path, f"{path}-wal"):
        with suppress(FileNotFoundError):
            files.append(os.stat(name))
    return files


def data_file(name: str) -> str:
    """The text of a file that stands beside this one, in a wheel too."""
    return (Path(__file__).resolve().parent / name).read_text("utf-8")


def prepare_file(path: str) -> int:
    """Make the file or check that it is ours; returns its number of events. StartError says what to do if it is not."""
    if sqlite3.sqlite_version_info < (3, 38):
        raise StartError(f"SQLite is {sqlite3.sqlite_version}, 3.38 or newer is needed: use a newer Python")
    if not path:
        raise StartError('--db is empty: name a file, or ":memory:" for a temporary one')
    if os.path.isdir(path):
        raise StartError(f"{path} is a folder: name a file in it with --db")
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise StartError(f"the folder {folder} does not exist: make it, or choose another file with --db")
    if _ends_in_half_a_page(path):
        raise StartError(f"{path} was cut off: restore it from a copy, or choose another file with --db")
    with _start_errors(path), closing(sqlite3.connect(path, isolation_level=None)) as conn:
        return _migrate(conn, path)


def _ends_in_half_a_page(path: str) -> bool:
    """SQLite notices a missing page; half of one it fills with zeros. With a WAL that is right: it has the page."""
    if not os.path.isfile(path) or os.path.exists(f"{path}-wal"):
        return False
    with open(path, "rb") as file, suppress(OSError):
        header = file.read(18)
        page_bytes = int.from_bytes(header[16:], "big")
        return header.startswith(b"SQLite format 3\0") and os.path.getsize(path) % max(page_bytes, 512) > 0
    return False


@contextmanager
def _start_errors(path: str) -> Iterator[None]:
    try:
        yield
    except sqlite3.Error as error:
        reason = ": ".join(SQLITE_PROBLEMS.get(error.sqlite_errorcode & 0xFF, (str(error),)))
        raise StartError(f"cannot use the database {path}: {reason}; --db names another file") from error


def _migrate(conn: sqlite3.Connection, path: str) -> int:
    application_id = conn.execute("PRAGMA application_id").fetchone()[0]
    tables, is_ours = conn.execute("SELECT count(*), total(name = 'environments') FROM sqlite_schema").fetchone()
    if tables and application_id != APPLICATION_ID:
        raise StartError(f"{path} is a database of some other program: choose another file with --db")
    version = conn.execute("PRAGMA user_version").fetchone()[0]
    if tables and not (is_ours and version == SCHEMA_VERSION):
        other = f"{path} was written by another eventstore (format {version}, not this one's {SCHEMA_VERSION})"
        way = "export its events with the eventstore that wrote it, import them with this one"
        raise StartError(f"{other}: {way}; --db names another file")
    for pragma in PRAGMAS:
        conn.execute(pragma)
    if not tables:
        _write_schema(conn)
    # A process that died after a failed sync may have left a WAL that can be read here, though the disk does not have
    # it: an event in it would be known already when it is sent again. In the file it is written anew, and synced.
    conn.execute("PRAGMA wal_checkpoint")
    conn.execute("BEGIN IMMEDIATE")  # a file that cannot be written is found now, not by the first event
    conn.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")  # BEGIN alone goes through if it has a WAL
    conn.execute("ROLLBACK")
    return int(conn.execute(COUNT_ALL).fetchone()[0])


def _write_schema(conn: sqlite3.Connection) -> None:
    """Make the tables. Of several processes the first one does, the others wait for it and make nothing."""
    execute_writing(conn, WRITE_LOCK_TIMEOUT_S, "BEGIN IMMEDIATE")
    statement = ""
    for line in data_file("schema.sql").splitlines(keepends=True):  # not executescript, which commits first
        statement += line
        if sqlite3.complete_statement(statement):
            conn.execute(statement)
            statement = ""
    conn.execute("COMMIT")


# ---------------------------------------------------------------------------------------------- HTTP

PUBLIC_PATHS = {"/", "/health", "/openapi.json"}
MAX_IGNORED = 20  # names a minute in the log: strangers must not fill it
KEEP_ALIVE_S = 75  # longer than proxies keep an idle connection, most 60 s: one closed as they use it is a 502
TASK_TIMEOUT_S = 3  # what a task of the service may still take when the server stops
HEADERS_TIMEOUT_S = 30.0  # from the connection, or a later request's first byte; uvicorn waits for ever
# In Starlette's own `path` an id would end at a line break.
register_url_convertor("anything", type("AnythingConvertor", (PathConvertor,), {"regex": "(?s:.*)"})())
Handler = Callable[["Service", Request], Awaitable[Response]]


class JsonResponse(Response):
    """A JSON answer, of a value or of bytes that are JSON already."""

    media_type = "application/json"

    def render(self, content: object) -> bytes:
        return content if isinstance(content, bytes) else ENCODER.encode(content)


def logged(request: Request) -> str:
    """A request as the log names it. Its path is the one that was sent: percent-encoded, no line breaks are in it."""
    return f"{request.method} {request.scope.get('raw_path', b'').decode('latin-1')}"


def error_response(request: Request, error: ApiError, headers: Mapping[str, str] | None = None) -> Response:
    """The error body of API: Common rules, and the one line that every refused request leaves in the log."""
    status = STATUS_OF_CODE[error.code]
    log.warning("%s: %d %s: %s", logged(request), status, error.code, error.message)
    retry_after = {} if error.retry_after_s is None else {"Retry-After": str(error.retry_after_s)}
    return JsonResponse(error_body(error), status, {**(headers or {}), **retry_after})


def error_body(error: ApiError) -> ErrorBody:
    status = STATUS_OF_CODE[error.code]
    return ErrorBody(error.code, error.message, status, error.details, False, ErrorMessage(error.message, None))


class Authentication(Struct):
    """ASGI middleware: finds the environment of the key in `x-api-key`, or answers 401 (API: Common rules)."""

    app: ASGIApp
    service: Service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http" and scope["path"] not in PUBLIC_PATHS:
            key = next((value for name, value in scope["headers"] if name == b"x-api-key"), None)
            # By its hash: how long the search takes tells nothing about a key.
            found = self.service.api_keys.get(hashlib.sha256(key or b"").digest())
            if key is None or found is None:
                unknown = "holds a key that this server does not know; its banner says where its keys came from"
                problem = "is missing: send your key in it" if key is None else unknown
                response = error_response(Request(scope), ApiError("unauthorized", f"the header x-api-key {problem}"))
                await response(scope, receive, send)
                return
            scope["api_key"], scope["environment"] = found, found.environment
        await self.app(scope, receive, send)


class RateLimits(Struct):
    """ASGI middleware: so many ingest requests a minute for each key, by the clock's minutes (API: Rate limits)."""

    app: ASGIApp
    settings: Settings
    minute: int = 0
    used: Counter[tuple[bytes, str]] = msgspec.field(default_factory=Counter)  # of this minute

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.settings.rate_limits.get(scope.get("path", "")) if scope.get("method") == "POST" else None
        if limit is None:
            await self.app(scope, receive, send)
            return
        now_s = self.settings.clock() // 1_000_000
        if now_s // 60 != self.minute:
            self.minute = now_s // 60
            self.used.clear()
        place = (scope["api_key"].digest, scope["path"])
        self.used[place] += 1
        reset_s = (self.minute + 1) * 60
        numbers = {b"limit": limit, b"remaining": max(limit - self.used[place], 0), b"reset": reset_s}
        headers = [(b"x-ratelimit-" + name, str(number).encode()) for name, number in numbers.items()]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        app = self.app
        if self.used[place] > limit:
            reason = f"this key may send {limit} requests a minute to {scope['path']}; nothing was stored"
            refusal = ApiError("too_many_requests", f"{reason}, try again later", retry_after_s=reset_s - now_s)
            app = error_response(Request(scope), refusal)
        await app(scope, receive, send_with_headers)


class Outbox(NamedTuple):  # what sends an environment's events on
    host: str
    behind: Callable[[], Awaitable[int]]  # how many events the host has not accepted (API: Monitoring)


class Service:  # what the handlers work with
    def __init__(self, settings: Settings, operations: Sequence[Operation]) -> None:
        self.settings = settings
        self.api_keys = {key.digest: key for key in settings.api_keys}
        self.operations = tuple(operations)
        self.store = Store(settings)
        self.make_id = IdMaker()
        # What a room of eventstore_extras adds before the start: environment -> its outbox, what runs as long as the
        # server does and has a moment to end when it is cancelled, and lines of the banner.
        self.outboxes: dict[str, Outbox] = {}
        self.tasks: list[Callable[[], Coroutine[Any, Any, None]]] = []
        self.notices: list[str] = []
        self._ignored_minute, self._ignored = 0, set[str]()
        self.held_bytes = 0  # of all bodies that are being received or worked on: read_body
        # One commit answers several clients, whose next batches come together: checked in a row they hold up whatever
        # comes behind them. Beside 8 such clients p99 of a page is 19 ms with turns, 31 without.
        self.batch_turn = asyncio.Lock()

    @asynccontextmanager
    async def lifespan(self, app: Starlette) -> AsyncIterator[None]:
        tasks = [asyncio.create_task(task()) for task in self.tasks]
        yield
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=TASK_TIMEOUT_S)
        await asyncio.to_thread(self.store.close)

    def replace_api_keys(self, api_keys: Sequence[ApiKey]) -> None:
        """From here on these keys are known, and no others. For any thread but an event loop's."""
        self.store.add_environments(key.environment for key in api_keys)
        self.api_keys = {key.digest: key for key in api_keys}

    @cached_property
    def description(self) -> bytes:
        return ENCODER.encode(openapi_document(self.operations))

    def rows(self, request: Request, events: list[Any], bulk: bool) -> list[Row]:
        environment = self.store.environments[request["environment"]]
        faults = Faults(whole="event")
        rows = event_rows(events, bulk, environment, self.settings.clock(), self.make_id, faults=faults)
        self.warn_of_ignored(request, faults.ignored, "no field has that name", EventIn.__struct_fields__)
        return rows

    def warn_of_ignored(self, request: Request, names: Iterable[str], problem: str, known: Iterable[str]) -> None:
        """Name in the log what nothing has, so that a slip is found: each once a minute, and at most twenty."""
        for name in names:
            minute = self.settings.clock() // MINUTE_US
            if minute != self._ignored_minute:
                self._ignored_minute, self._ignored = minute, set()
            place = f"{logged(request)}: {echo(name)} is ignored, {problem}"
            if place not in self._ignored and len(self._ignored) < MAX_IGNORED:
                self._ignored.add(place)
                log.warning("%s; there are: %s", place, ", ".join(known) or "none here")

    def warn_of_zone(self, request: Request, name: str | None) -> None:
        if name and name != "UTC" and parse_zone(name) is UTC:
            self.warn_of_ignored(request, [name], "no time zone has that name", ["those of IANA, Europe/Berlin"])

    def view(self, request: Request) -> View:
        now = self.settings.clock()
        lag_us = self.settings.visibility_lag_ms * 1000
        return View(request["environment"], now, now - lag_us if lag_us else None)


async def read_body(service: Service, request: Request) -> bytes:
    """The body. ApiError as soon as it is longer than max_body_bytes, announced or not (API: Sending events)."""
    limit, queue_bytes = service.settings.max_body_bytes, service.settings.queue_bytes
    announced = next((int(value) for name, value in request["headers"] if name == b"content-length"), 0)
    chunks: list[bytes] = []
    size = 0
    while max(size, announced) <= limit:
        message = await request.receive()
        if message["type"] == "http.disconnect":
            raise ClientDisconnect
        chunks.append(message.get("body", b""))
        size += len(chunks[-1])
        service.held_bytes += len(chunks[-1])
        request.scope["held_bytes"] = size  # until the answer is made: endpoint
        if service.held_bytes > max(size, queue_bytes):
            reason = f"{service.held_bytes} bytes of requests are under way, the limit is {queue_bytes}"
            raise ApiError("service_unavailable", f"{reason}; nothing was stored, try again", retry_after_s=1)
        if size <= limit and not message.get("more_body"):
            return b"".join(chunks)
    got = max(size, announced)
    raise ApiError("validation_error", f"the body may be {limit} bytes long, got at least {got}; nothing was stored")


async def read_fields(service: Service, request: Request, decoder: msgspec.json.Decoder[T], faults: Faults) -> T:
    sent = decode_fields(decoder, await read_body(service, request), faults)
    known = decoder.type.__struct_fields__  # type: ignore[attr-defined]
    service.warn_of_ignored(request, faults.ignored, "no field has that name", known)
    return sent


async def ingest_event(service: Service, request: Request) -> Response:
    """POST /v1/events (API: Sending events)."""
    body = await read_body(service, request)
    rows = service.rows(request, [decode(EVENT, body) or Raw(body)], bulk=False)
    return await _store(service, rows, EventAccepted("Event accepted for processing", rows[0].id))


async def ingest_events_bulk(service: Service, request: Request) -> Response:
    """POST /v1/events/bulk (API: Sending events)."""
    body = await read_body(service, request)
    async with service.batch_turn:
        await asyncio.sleep(0)  # who else waits has a turn, too
        rows = service.rows(request, decode_batch(body), bulk=True)
    return await _store(service, rows, BulkAccepted("Events accepted for processing"))


async def _store(service: Service, rows: list[Row], answer: object) -> Response:
    inserted = await service.store.insert(rows)
    headers = {"X-Events-Inserted": str(inserted), "X-Events-Duplicate": str(len(rows) - inserted)}
    return JsonResponse(answer, 202, headers)


async def list_events_by_parameters(service: Service, request: Request) -> Response:
    """GET /v1/events (API: Queries)."""
    faults = Faults()
    parameters = parse_parameters(request["query_string"], faults)
    sent = query_of_parameters(EventQueryIn, parameters, EventQueryIn.__struct_fields__, faults)
    sent.count_total = sent.count_total or None
    return await _list(service, request, sent, 50, faults)


async def query_events(service: Service, request: Request) -> Response:
    """POST /v1/events/query (API: Queries)."""
    faults = Faults()
    sent = await read_fields(service, request, EVENT_QUERY, faults)
    sent.count_total = sent.count_total is not False
    return await _list(service, request, sent, 1000, faults)


async def _list(service: Service, request: Request, sent: EventQueryIn, max_page_size: int, faults: Faults) -> Response:
    query = event_query(sent, service.view(request), max_page_size, faults)
    return JsonResponse(await service.store.read(lambda conn: ENCODER.encode(list_events(conn, query))))


async def look_up_event(service: Service, request: Request) -> Response:
    """GET /v1/events/lookup?id=ID and GET /v1/events/{ID} (API: Lookup)."""
    faults = Faults()
    sent = parse_parameters(request["query_string"], faults)
    event_id = request.path_params.get("id", sent.get("id"))
    if not event_id:
        faults.add("id", "required", "is required: the event_id to look up")
    wanted = query_of_parameters(EventQueryIn, sent, LOOKUP_FILTERS, faults)
    wanted.event_id = event_id
    wanted.start_time, wanted.end_time = wanted.start_time or EARLIEST, wanted.end_time or LATEST
    query = event_query(wanted, service.view(request), 1, faults)
    others = [operation.method for operation in service.operations if operation.path == request["path"]]
    hint = f"; if you mean {request['path']}, use POST" if "POST" in others and "GET" not in others else ""
    return JsonResponse(await service.store.read(lambda conn: find_event(conn, query, hint)))


async def compute_usage(service: Service, request: Request) -> Response:
    """POST /v1/events/usage (API: Usage)."""
    faults = Faults()
    sent = await read_fields(service, request, USAGE, faults)
    service.warn_of_zone(request, sent.timezone)
    return JsonResponse(await aggregate(service, usage_query(sent, service.view(request), faults), usage_answer))


async def monitor_events(service: Service, request: Request) -> Response:
    """GET /v1/events/monitoring (API: Monitoring)."""
    query = monitoring_query(request["query_string"], service.view(request))
    hidden = 0
    if query.view.visible_us is not None:
        parameters = query.view._asdict()
        hidden = await service.store.read(lambda conn: conn.execute(COUNT_HIDDEN, parameters).fetchone()[0])
    outbox = service.outboxes.get(request["environment"])
    behind = await outbox.behind() if outbox else 0
    # Without the header the debugger could not name an environment that has no events. It is Latin-1, a name anything.
    headers = {"X-Environment-Id": urllib.parse.quote(query.view.environment, safe="")}
    if outbox:
        headers["X-Forward-To"] = outbox.host
    body = await aggregate(service, query, partial(monitoring_answer, hidden, behind))
    return JsonResponse(body, headers=headers)


async def aggregate(service: Service, query: UsageQuery, answer: Callable[..., object]) -> bytes:
    """An aggregation's answer as JSON. Each reader thread takes a part: a core reads the JSON of a million events in
    1.6 s. The windows and the answer are made in such a thread, too: 100,000 of them would hold up the event loop."""
    read = partial(service.store.read, quick=False)
    starts, bounds = await read(lambda _: usage_bounds(query, READER_THREADS))
    cells = await asyncio.gather(*(read(partial(usage_cells, query=query, bounds=part)) for part in parts_of(bounds)))
    joined = list(itertools.chain.from_iterable(cells))
    return await read(lambda _: ENCODER.encode(answer(query, starts, joined)))


def parts_of(bounds: list[T]) -> list[list[T]]:
    """Neighbours together, a part for each reader thread."""
    size = len(bounds) // READER_THREADS + 1
    return [bounds[at : at + size] for at in range(0, len(bounds), size)]


async def health(service: Service, request: Request) -> Response:
    """GET or POST /health: this process answers; 503 with a reason while it cannot store events."""
    reason = await service.store.failure()
    return JsonResponse(Health()) if reason is None else JsonResponse(Health("failing", reason=reason), 503)


async def describe_api(service: Service, request: Request) -> Response:
    """GET /openapi.json: this API as OpenAPI 3.1."""
    return JsonResponse(service.description)


def debugger_handler() -> Handler:
    """GET /: the event debugger, a page that asks this API like any other client."""
    page = data_file("debugger.html")  # line ends as a browser counts them for the hashes
    policy = "default-src 'none'; connect-src 'self'; "  # strangers' text: load and run what the file holds, no more
    for tag in ("script", "style"):
        (text,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        policy += f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'; "
    policy += "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    headers = {
        "Content-Security-Policy": policy, "X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY",
        "Referrer-Policy": "no-referrer", "Cache-Control": "no-cache",
    }  # fmt: skip

    async def show_debugger(service: Service, request: Request) -> Response:
        return Response(page, headers=headers, media_type="text/html")

    return show_debugger


def endpoint(
    handler: Handler, service: Service, parameters: Iterable[str] | None = None
) -> Callable[[Request], Awaitable[Response]]:
    async def answer(request: Request) -> Response:
        if parameters is not None and request["query_string"]:
            sent = dict(urllib.parse.parse_qsl(request["query_string"].decode(errors="replace")))
            service.warn_of_ignored(request, sent.keys() - {*parameters}, "no parameter has that name", parameters)
        try:
            return await handler(service, request)
        except asyncio.CancelledError:  # uvicorn would answer 500 in plain text, which says that nothing was stored
            raise ApiError("service_unavailable", "the server is shutting down; try again", retry_after_s=1) from None
        finally:
            service.held_bytes -= request.scope.get("held_bytes", 0)

    return answer


class Operation(NamedTuple):
    """A row of the route table: what is served, and what the OpenAPI document says of it."""

    method: str
    path: str
    handler: Handler
    answer: Any
    body: Any = None
    parameters: Iterable[str] = ()  # of the query string; names in PARAMETER_SCHEMAS, or a mapping to schemas
    example: Any = None  # of the body
    schemas: Mapping[str, Any] = {}  # type's name -> field -> what the type does not say of it
    status: int = 200
    refusals: Sequence[int] = ()  # statuses beside those that every operation has

    @property
    def public_path(self) -> str:
        return self.path.replace(":anything}", "}")

    def serves(self, path: str) -> bool:
        return compile_path(self.path)[0].match(path) is not None

    def route(self, service: Service) -> Route:
        return Route(self.path, endpoint(self.handler, service, self.parameters), methods=[self.method])


_API_CALL = {"event_name": "api_request", "external_customer_id": "cust_42"}

OPERATIONS = (
    Operation("POST", "/v1/events", ingest_event, EventAccepted, EventIn, status=202, refusals=[429],
              example=_API_CALL | {"event_id": "evt_1", "properties": {"tokens": 1250}}),
    Operation("GET", "/v1/events", list_events_by_parameters, EventPage, None, EventQueryIn.__struct_fields__),
    Operation("POST", "/v1/events/bulk", ingest_events_bulk, BulkAccepted, BulkIn, status=202, refusals=[429],
              example={"events": [_API_CALL]}),
    Operation("POST", "/v1/events/query", query_events, EventPage, EventQueryIn,
              example={"external_customer_id": "cust_42", "property_filters": {"region": ["eu", "us"]},
                       "page_size": 100}),
    Operation("POST", "/v1/events/usage", compute_usage, Usage, UsageIn,
              example=_API_CALL | {"aggregation_type": "SUM", "property_name": "tokens", "window_size": "DAY",
                                   "timezone": "America/New_York"}),
    Operation("GET", "/v1/events/monitoring", monitor_events, Monitoring, None, (*EVENT_FILTERS, "window_size")),
    Operation("GET", "/v1/events/lookup", look_up_event, EventLookup, None, ("id", *LOOKUP_FILTERS), refusals=[404]),
    Operation("GET", "/v1/events/{id:anything}", look_up_event, EventLookup, None, LOOKUP_FILTERS, refusals=[404]),
    Operation("GET", "/health", health, Health),
    Operation("POST", "/health", health, Health),
    Operation("GET", "/openapi.json", describe_api, dict[str, Any]),
)  # fmt: skip


async def on_http_exception(request: Request, error: HTTPException) -> Response:
    """Starlette's own refusals: no such route, or not with this method."""
    operations: Sequence[Operation] = request.app.state.service.operations
    path = request["path"]
    routes: list[Route] = request.app.routes
    matched = next((route.path for route in routes if route.path_regex.match(path)), "")
    # Whoever posts to /v1/events/xyz does not mean the event with that id.
    if error.status_code == 405 and not (request.method == "POST" and ":anything}" in matched):
        methods = {method for route in routes if route.path == matched for method in route.methods or ()}
        allowed = ", ".join(sorted(methods))
        refusal = ApiError("method_not_allowed", f"{request.method} is not allowed here; allowed: {allowed}")
        return error_response(request, refusal, {"Allow": allowed})
    served = ", ".join(f"{operation.method} {operation.public_path}" for operation in operations)
    hint = ""
    if path.endswith("/") and any(operation.serves(path.rstrip("/")) for operation in operations):
        hint = f"without the slash at its end, {echo(path.rstrip('/'))}? "
    elif any(operation.serves(f"/v1{path}") for operation in operations):
        hint = f"the base URL ends in /v1, so {echo('/v1' + path)}? "
    elif path.startswith("/_mock"):
        hint = "it is there when the server is started with --mock. "
    message = f"no route {echo(path)}: {hint}this server has {served}"
    return error_response(request, ApiError("not_found", message))


async def on_exception(request: Request, error: Exception) -> Response:
    # uvicorn logs the traceback of any but an ApiError: Starlette raises it again after this answer.
    internal = ApiError("internal_error", "an internal error; the server's log has its cause")
    return error_response(request, error if isinstance(error, ApiError) else internal)


async def on_disconnect(request: Request, error: Exception) -> None:
    log.warning("%s: the client went away before its request was complete", logged(request))


EXCEPTION_HANDLERS: dict[Any, Any] = {
    HTTPException: on_http_exception, ClientDisconnect: on_disconnect, ApiError: on_exception, Exception: on_exception,
}  # fmt: skip


def create_app(
    settings: Settings, *, operations: Sequence[Operation] = (), middleware: Sequence[Middleware] = ()
) -> Starlette:
    """The Events API as an ASGI application; it opens the database now and closes it with its lifespan.

    `operations` are served beside its own and stand in its OpenAPI document. `middleware` is run inside its own: what
    needs a key has `scope["environment"]` by then, and is within the rate limits. `app.state.service` is what the
    handlers work with. Raises StartError if the database cannot be used, ValueError without an API key.
    """
    if not settings.api_keys:
        raise ValueError('no API key: Settings(api_keys=(ApiKey.hashed("your key"),))')
    show_debugger = debugger_handler()  # before the store: a file that is missing leaves no thread behind
    service = Service(settings, [*OPERATIONS, *operations])
    limits = [Middleware(RateLimits, settings=settings)] if settings.rate_limits else []
    layers = [Middleware(Authentication, service=service), *limits, *middleware]
    matching_all_last = sorted(service.operations, key=lambda operation: ":anything}" in operation.path)
    routes = [operation.route(service) for operation in matching_all_last]
    routes.append(Route("/", endpoint(show_debugger, service)))
    app = Starlette(routes=routes, middleware=layers, exception_handlers=EXCEPTION_HANDLERS, lifespan=service.lifespan)
    app.router.redirect_slashes = False  # a redirect has no error body, and clients lose a POST's body on it
    app.state.service = service
    return app


class _WholeResponses:
    """A connection to which a response's head and body are written in one system call. With uvicorn's two there are 8 %
    fewer single events a second and 6 % fewer pages."""

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._head and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._head = data
        else:
            self._transport.write(self._head + data)
            self._head = b""

    def flush(self) -> None:
        """A head without a body: the answer to HEAD."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP, with the three things it does differently here."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._responses = _WholeResponses(transport)
        self._headers_timeout = self.loop.call_later(HEADERS_TIMEOUT_S, self.shutdown)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        if self._headers_timeout.cancelled():  # by the headers of the request before
            self._headers_timeout = self.loop.call_later(HEADERS_TIMEOUT_S, self.shutdown)

    def on_headers_complete(self) -> None:
        self._headers_timeout.cancel()
        super().on_headers_complete()
        self.cycle.transport = self._responses  # type: ignore[assignment]

    def on_response_complete(self) -> None:
        self._responses.flush()
        super().on_response_complete()

    def send_400_response(self, msg: str) -> None:
        """What is not HTTP gets the error body, too; uvicorn answers it in plain text."""
        body = ENCODER.encode(error_body(ApiError("validation_error", f"the request is not valid HTTP/1.1: {msg}")))
        head = "HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\nconnection: close\r\n"
        self.transport.write(f"{head}content-length: {len(body)}\r\n\r\n".encode() + body)
        self.transport.close()


def listen(host: str, port: int) -> socket.socket:
    if not 0 <= port <= 65_535:
        raise StartError(f"--port must be 0 to 65535, got {port}")
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        return socket.create_server(address[:2], family=family, backlog=2048)
    except OSError as error:
        reasons = {errno.EADDRINUSE: "it is taken; choose another with --port (0 takes a free one)",
                   errno.EACCES: "ports below 1024 need more rights; choose another with --port"}  # fmt: skip
        reason = reasons.get(error.errno or 0, f"{error.strerror or error}; check --host")
        raise StartError(f"cannot listen on {host} port {port}: {reason}") from error


def uvicorn_server(
    app: ASGIApp | str, shutdown_timeout_s: int, keep_alive_s: int = KEEP_ALIVE_S, access_log: bool = False
) -> uvicorn.Server:
    config = uvicorn.Config(
        app, http=Protocol, ws="none", lifespan="on", log_config=None, access_log=access_log, proxy_headers=False,
        server_header=False, timeout_keep_alive=keep_alive_s, timeout_graceful_shutdown=shutdown_timeout_s,
    )  # fmt: skip
    return uvicorn.Server(config)


# ---------------------------------------------------------------------------------------------- OpenAPI

_TIME: dict[str, Any] = {"anyOf": [{"type": "string", "format": "date-time", "pattern": f"^{_RFC_3339.pattern}$"},
                                   {"enum": ["", None]}]}  # fmt: skip
_TEXT: dict[str, Any] = {"type": "string"}
_FILTERS: dict[str, Any] = {
    "type": ["object", "null"], "maxProperties": MAX_FILTER_KEYS, "propertyNames": {"minLength": 1},
    "additionalProperties": {"type": ["array", "null"], "items": _TEXT, "maxItems": 20},
}  # fmt: skip
_CURSOR: dict[str, Any] = {"anyOf": [{"type": "string", "pattern": "^-?[0-9]{1,18}::.+"}, {"enum": ["", None]}]}


def choice(*values: str) -> dict[str, Any]:
    return {"enum": [*values, "", None]}


# What the wire types do not say of their fields.
FIELD_SCHEMAS: dict[str, dict[str, Any]] = {
    "EventIn": {
        "event_name": {"type": "string", "pattern": r"[^\s\x1c-\x1f\x85]"},
        "external_customer_id": {"type": "string", "minLength": 1},
        "event_id": {"type": ["string", "null"], "description": "The idempotency key; made by the server if absent."},
        "timestamp": _TIME, "properties": {"type": ["object", "null"]},
    },
    "EventQueryIn": {
        **dict.fromkeys(("start_time", "end_time"), _TIME),
        "property_filters": _FILTERS,
        "page_size": {"type": ["integer", "null"]},
        "offset": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_OFFSET},
        "sort": choice(*SORTS), "order": choice(*ORDERS),
        **dict.fromkeys(("iter_first_key", "iter_last_key"), _CURSOR),
    },
    "UsageIn": {
        "event_name": {"type": "string", "minLength": 1},
        "aggregation_type": {"enum": [*AGGREGATIONS, *map(str.lower, AGGREGATIONS)]},
        **dict.fromkeys(("start_time", "end_time", "billing_anchor"), _TIME),
        **{name: choice(*WINDOW_SIZES) for name in ("window_size", "bucket_size")}, "filters": _FILTERS,
        "multiplier": {"anyOf": [{"type": "string", "pattern": r"^[0-9]{0,20}[1-9][0-9]{0,20}(\.[0-9]{0,20})?$"},
                                 {"type": "number", "exclusiveMinimum": 0}, {"enum": ["", None]}]},
    },
    "EventPage": {"events": {"type": "array", "items": {"$ref": "#/components/schemas/Event"}}},
    "EventLookup": {"event": {"$ref": "#/components/schemas/Event"}},
}  # fmt: skip

PARAMETER_SCHEMAS: dict[str, Any] = {
    **{name: {"anyOf": [_TIME["anyOf"][0], {"enum": [""]}]} for name in ("start_time", "end_time")},
    "property_filters": {"type": "string", "pattern": "^([^:;]+:[^;]*(;[^:;]+:[^;]*)*)?$", "maxLength": 200},
    "page_size": {"type": "integer"}, "offset": {"type": "integer", "minimum": 0, "maximum": MAX_OFFSET},
    "sort": {"enum": [*SORTS, ""]}, "order": {"enum": [*ORDERS, ""]}, "window_size": {"enum": [*WINDOW_SIZES, ""]},
    "count_total": {"type": "string", "pattern": "^([Tt]([Rr][Uu][Ee])?|[Ff]([Aa][Ll][Ss][Ee])?|[01])?$"},
    **{key: {"type": "string", "pattern": "^(-?[0-9]{1,18}::.+)?$"} for key in ("iter_first_key", "iter_last_key")},
    "id": {"type": "string", "minLength": 1},
}  # fmt: skip


def openapi_document(operations: Sequence[Operation]) -> dict[str, Any]:
    """The routes as OpenAPI 3.1, made from their table and the wire types."""
    bodies = [operation.body for operation in operations if operation.body not in (None, BulkIn)]
    answers = [operation.answer for operation in operations if isinstance(operation.answer, type)]
    types = dict.fromkeys([*bodies, ErrorBody, Event, *answers])
    schemas = msgspec.json.schema_components(types, ref_template="#/components/schemas/{name}")[1]
    for more in (FIELD_SCHEMAS, *(operation.schemas for operation in operations)):
        for name in more:
            schemas[name]["properties"] |= more[name]
            needed = [field for field, schema in more[name].items() if not _takes_null(schema)]
            schemas[name]["required"] = [*dict.fromkeys([*schemas[name].get("required", ()), *needed])]
    for schema in schemas.values():
        schema.pop("additionalProperties", None)  # they are ignored
    # A batch is an array to everyone but its decoder.
    items = {"type": "array", "minItems": 1, "maxItems": MAX_BATCH, "items": ref(EventIn)}
    schemas["BulkIn"] = {"type": "object", "required": ["events"], "properties": {"events": items}}
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
        "components": {"schemas": schemas, "securitySchemes": {"ApiKey": key}},
    }


def _takes_null(schema: dict[str, Any]) -> bool:
    choices = schema.get("anyOf", ())
    return None in schema.get("enum", ()) or "null" in schema.get("type", "") or any(map(_takes_null, choices))


def ref(kind: Any) -> dict[str, Any]:
    return {"$ref": f"#/components/schemas/{kind.__name__}"} if isinstance(kind, type) else {"type": "object"}


def _describe(operation: Operation) -> dict[str, Any]:
    public = operation.path in PUBLIC_PATHS
    accepted = str(operation.status)
    statuses = () if public else (400, 401, 500, 503, *operation.refusals)
    content = {"application/json": {"schema": ref(operation.answer)}}
    responses: dict[str, Any] = {accepted: {"description": "Done", "content": content}}
    for status in sorted(statuses):
        codes = ", ".join(code for code, number in STATUS_OF_CODE.items() if number == status)
        responses[str(status)] = {"description": codes, "content": {"application/json": {"schema": ref(ErrorBody)}}}
    if accepted == "202":
        counts = {f"X-Events-{name}": {"schema": {"type": "integer"}} for name in ("Inserted", "Duplicate")}
        responses[accepted]["headers"] = counts
    known = operation.parameters if isinstance(operation.parameters, Mapping) else PARAMETER_SCHEMAS
    parameters = [{"name": name, "in": "query", "required": name == "id", "schema": known.get(name, _TEXT)}
                  for name in operation.parameters]  # fmt: skip
    if "{id" in operation.path:
        parameters.insert(0, {"name": "id", "in": "path", "required": True, "schema": PARAMETER_SCHEMAS["id"]})
    described = {
        "operationId": f"{operation.handler.__name__}_{operation.method.lower()}_{len(operation.path)}",
        "summary": (operation.handler.__doc__ or operation.public_path).splitlines()[0],
        "security": [] if public else [{"ApiKey": []}],
        "parameters": parameters,
        "responses": responses,
    }
    if operation.body:
        body = {"schema": ref(operation.body)} | ({"example": operation.example} if operation.example else {})
        described["requestBody"] = {"required": True, "content": {"application/json": body}}
    return described


# ---------------------------------------------------------------------------------------------- command line

COMMANDS = {  # name -> the room of eventstore_extras that has it, and what it does
    "serve": ("", "serve the API"),
    "import": ("transfer", "store the events of a file"),
    "export": ("transfer", "write events to a file"),
    "replay": ("replay", "send events to FlexPrice, or another eventstore"),
    "prune": ("retention", "delete the events stored before a time"),
}
SHUTDOWN_TIMEOUT_S = 5  # for a request after SIGTERM; Docker kills after 10 s, writer and checkpoint come after it
SERVE_ROOMS = {"mock": "mock", "forward_to": "forward", "retain_days": "retention"}  # flag -> the room that does it
MAX_FLAG = 1_000_000_000_000  # more would overflow somewhere: a buffer's size, a time in microseconds
LOOPBACK = ("127.0.0.1", "::1", "localhost")  # addresses that no other machine can reach
AddFlag = Callable[..., argparse.Action]


def say(message: str) -> None:
    print(f"eventstore: {message}", file=sys.stderr, flush=True)


def counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def check_key(key: str, where: str = "") -> str:
    if not re.fullmatch(r"[\x21-\x7e]+", key):
        problem = "is empty, or has a space or a character outside ASCII"
        raise StartError(f"{where}an API key {problem}: an HTTP header cannot carry it")
    return key


def parse_api_keys(texts: Iterable[tuple[str, str]]) -> tuple[ApiKey, ...]:
    """Of places and their `KEY` or `KEY=ENVIRONMENT`. StartError, which names the place and never shows a key."""
    keys: dict[ApiKey, str] = {}
    for source, text in texts:
        key, separator, environment = (part.strip() for part in text.partition("="))
        if separator and not environment:
            raise StartError(f"{source}: an API key ends in '=' with no environment after it: write KEY=ENVIRONMENT")
        if sign := re.search("[=;,]", key + environment):
            several = "EVENTSTORE_API_KEYS has commas between them, a file has each on a line"
            problem = f"an API key or its environment has a {sign[0]!r} in it, which neither may"
            raise StartError(f"{source}: {problem}: are several keys meant? {several}")
        found = ApiKey.hashed(check_key(key, f"{source}: "), environment or "development")
        for known, place in keys.items():
            if known.digest == found.digest:
                again = "twice" if place == source else f"as {place}"
                raise StartError(f"{source} names the same key {again}: a key is bound to one environment")
        keys[found] = source
    return tuple(keys)


def read_api_keys(path: str) -> list[tuple[str, str]]:
    """The place and text of each key: `KEY` or `KEY=ENVIRONMENT` a line, comments behind a #. StartError."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read --api-key-file {path}: {getattr(error, 'strerror', error)}") from error
    texts = [line.partition("#")[0].strip() for line in lines]
    found = [(f"--api-key-file {path}, line {number}", text) for number, text in enumerate(texts, 1) if text]
    if not found:
        raise StartError(f"--api-key-file {path} has no key in it: write KEY=ENVIRONMENT, each on a line")
    return found


def find_api_keys(flags: argparse.Namespace, environ: Mapping[str, str]) -> tuple[tuple[ApiKey, ...], str, str | None]:
    """The keys, where they came from, and the key itself if it had to be made: flags win over the environment."""
    several = [part for part in environ.get("EVENTSTORE_API_KEYS", "").split(",") if part.strip()]
    single = environ.get("FLEXPRICE_API_KEY", "").strip()
    if flags.api_key or flags.api_key_file:
        sources = {"--api-key": flags.api_key, "--api-key-file": flags.api_key_file}
        source = " and ".join(flag for flag, given in sources.items() if given)
        texts = [("--api-key", text) for text in flags.api_key]
        texts += read_api_keys(flags.api_key_file) if flags.api_key_file else []
    elif several:
        source, texts = "EVENTSTORE_API_KEYS", [("EVENTSTORE_API_KEYS", text) for text in several]
    elif single:
        source, texts = "FLEXPRICE_API_KEY", [("FLEXPRICE_API_KEY", single)]
        if "=" in single:
            raise StartError("FLEXPRICE_API_KEY has a '=' in it: a key with its environment is for EVENTSTORE_API_KEYS")
    else:
        if flags.host not in LOOPBACK:
            problem = f"--host {flags.host} can be reached from other machines, and no API key was given"
            raise StartError(f"{problem}: choose one with --api-key or FLEXPRICE_API_KEY")
        made = f"evs_{secrets.token_urlsafe(18)}"
        return (ApiKey.hashed(made),), "made for this run", made
    return parse_api_keys(texts), source, None


def read_api_keys_again(service: Service, arguments: argparse.Namespace) -> None:
    """If the file cannot be used, the keys stay as they were."""
    try:
        keys, source, _ = find_api_keys(arguments, {})
        service.replace_api_keys(keys)
    except (StartError, sqlite3.Error) as error:
        log.error("the API keys stay as they were: %s", error)
    else:
        log.info("%s from %s", counted(len(keys), "API key"), source)
        for name in service.outboxes.keys() - {key.environment for key in keys}:
            log.warning("no API key is for the environment %s any more, whose events are sent on", echo(name))


def read_api_keys_on_sighup(service: Service, arguments: argparse.Namespace) -> None:
    """In a thread: a new environment waits for the write lock, for which no request shall wait."""
    again = partial(read_api_keys_again, service, arguments)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, lambda *_: threading.Thread(target=again, daemon=True).start())


def banner(app: Starlette, base_url: str, key_source: str, made_key: str | None) -> str:
    service: Service = app.state.service
    environments = ", ".join(sorted({key.environment for key in service.settings.api_keys}))
    key = made_key or "$FLEXPRICE_API_KEY"
    hint = "" if key_source == "FLEXPRICE_API_KEY" else " (for the lines below: export FLEXPRICE_API_KEY=...)"
    key_note = f"{made_key} ({key_source})" if made_key else f"from {key_source}{hint}"
    notices = "".join(f"  {notice}\n" for notice in service.notices)
    event = '{"event_name": "api_request", "external_customer_id": "cust_42", "properties": {"tokens": 1250}}'
    debugger = base_url.removesuffix("v1") + (f"#key={made_key}" if made_key else "")  # browsers keep a # to themselves
    return f"""eventstore {__version__}: FlexPrice's Events API on SQLite
  database     {service.store.path} ({counted(service.store.events_at_start, "event")})
  base URL     {base_url}
  API key      {key_note}
  environment  {environments}
  debugger     {debugger}
{notices}
Send an event, and read it back:
  curl {base_url}/events -H "x-api-key: {key}" -d '{event}'
  curl {base_url}/events -H "x-api-key: {key}"
"""


def stop_counting_memory() -> None:
    """Tell SQLite not to keep memory statistics, under one lock for all threads: with it the sum over a million events
    takes four readers on two cores 1.15 to 1.9 times as long. SQLite takes this only before it is initialised, so it is
    shut down first, and left alone if it is in use or its library cannot be reached (Windows)."""
    with suppress(OSError, AttributeError):
        sqlite = ctypes.CDLL(_sqlite3.__file__)
        sqlite.sqlite3_memory_used.restype = ctypes.c_int64
        if sqlite.sqlite3_memory_used() == 0:
            sqlite.sqlite3_shutdown()
            sqlite.sqlite3_config(9, 0)  # SQLITE_CONFIG_MEMSTATUS
            sqlite.sqlite3_initialize()


def raise_file_limit() -> None:
    """Every connection is an open file, and many systems give a process 1024 unless it asks for more."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415 - not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def serve(arguments: argparse.Namespace) -> int:
    """Serve until SIGINT or SIGTERM; then finish what is under way, drain the writer and return 0."""
    logging.basicConfig(level=arguments.log_level.upper(), format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.getLogger().level))
    api_keys, key_source, made_key = find_api_keys(arguments, os.environ)
    stop_counting_memory()
    raise_file_limit()
    server = uvicorn_server("", SHUTDOWN_TIMEOUT_S, arguments.keep_alive_s, arguments.access_log)
    # Before the port answers: whoever sees it may stop the server. After the end, too: uvicorn raises the signal again,
    # and the default handler would make the exit status -15.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, server.handle_exit)
    with listen(arguments.host, arguments.port) as listener:
        chosen = {name: value for name, value in vars(arguments).items() if name in Settings.__struct_fields__}
        additions = room("mock", "--mock").additions() if arguments.mock else {"operations": more_operations()}
        app = create_app(Settings(api_keys=api_keys, **chosen), **additions)
        service: Service = app.state.service
        with closing(service.store):
            for flag, its_room in SERVE_ROOMS.items():
                if getattr(arguments, flag):
                    room(its_room, f"--{flag.replace('_', '-')}").attach(service, arguments, listener.getsockname())
            if arguments.api_key_file:
                read_api_keys_on_sighup(service, arguments)
            base_url = base_url_of(arguments.host, listener.getsockname()[1])
            print(banner(app, base_url, key_source, made_key), flush=True)
            collect_less_garbage()
            server.config.app = app  # uvicorn looks for it when it runs
            server.run(sockets=[listener])
    return 0


def base_url_of(host: str, port: int) -> str:
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104
    return f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"


def more_operations() -> Sequence[Operation]:
    """What eventstore_extras has for the service; nothing if this file stands alone."""
    with suppress(StartError):
        return tuple(room("analytics", "serve").OPERATIONS)
    return ()


def collect_less_garbage() -> None:
    """64 requests under way are so many new objects that Python, left to itself, looks for cycles all the time, and now
    and then through all modules, too. Without that there are 1.05 times as many single events."""
    gc.freeze()
    gc.set_threshold(10_000)


def positive(kind: Callable[[str], N], or_zero: bool = False) -> Callable[[str], N]:
    def parse(text: str) -> N:
        with suppress(ValueError):
            value = kind(text)
            if 0 < value <= MAX_FLAG or (or_zero and value == 0):
                return value
        least = "from 0" if or_zero else "greater than 0,"
        raise argparse.ArgumentTypeError(f"must be a number {least} to {MAX_FLAG}, got {text!r}")

    return parse


def rate_limits(text: str) -> Mapping[str, int]:
    if text == "documented":
        return DOCUMENTED_RATE_LIMITS
    numbers = text.split(",")
    if len(numbers) != len(DOCUMENTED_RATE_LIMITS):
        raise argparse.ArgumentTypeError(f"must be documented, or SINGLE,BULK like 1000,100; got {text!r}")
    return dict(zip(DOCUMENTED_RATE_LIMITS, map(positive(int), numbers), strict=True))


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    def _get_help_string(self, action: argparse.Action) -> str | None:
        return super()._get_help_string(action) if action.default not in (None, "", [], {}) else action.help


def parse_arguments(argv: Sequence[str]) -> argparse.Namespace:
    """The flags of the command that is named; only its room is imported. StartError."""
    parser = argparse.ArgumentParser(
        "eventstore", description="FlexPrice's usage-events API in one file on SQLite", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"eventstore {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    for name, (module, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary, description=summary, formatter_class=HelpFormatter,
                                      allow_abbrev=False)  # fmt: skip
        if name in argv[:1] and module:
            its_room = room(module, name)
            command.set_defaults(run=its_room.run)
            its_room.add_flags(name, command.add_argument)
        elif name in argv[:1]:
            command.set_defaults(run=serve)
            add_serve_flags(command.add_argument)
    arguments, unknown = parser.parse_known_args(argv)
    if unknown:
        command = commands.choices[arguments.command]
        similar = difflib.get_close_matches(unknown[0].partition("=")[0], command._option_string_actions, 1)
        hint = f"; is {similar[0]} meant?" if similar else ""
        command.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    return arguments


def room(name: str, purpose: str) -> ModuleType:
    """A module of eventstore_extras, imported now. StartError if this file stands alone."""
    try:
        return importlib.import_module(f"eventstore_extras.{name}")
    except ModuleNotFoundError as error:
        if error.name != "eventstore_extras":
            raise
        raise StartError(f"{purpose} needs the folder eventstore_extras beside {__file__}") from None


def add_db_flag(add: AddFlag, text: str) -> None:
    add("--db", metavar="PATH", default=Settings().db, help=text)


def add_serve_flags(add: AddFlag) -> None:
    """Flags that are named like a field of Settings set it."""
    defaults = Settings()
    add_db_flag(add, 'database file, made if absent; ":memory:" is a temporary one')
    add("--host", default="127.0.0.1", help="address to listen on")
    add("--port", type=int, default=8080, help="port to listen on; 0 takes a free one")
    add("--api-key", metavar="KEY[=ENVIRONMENT]", action="append", default=[], help="may be given several times; "
        "else EVENTSTORE_API_KEYS, else FLEXPRICE_API_KEY, else one is made for this run")  # fmt: skip
    add("--api-key-file", metavar="FILE", help="KEY=ENVIRONMENT a line, comments behind a #; read again on SIGHUP")
    add("--max-body-bytes", type=positive(int), default=defaults.max_body_bytes, help="longest request body")
    add("--query-timeout-s", type=positive(float), default=defaults.query_timeout_s, help="longest time for one query")
    add("--queue-events", type=positive(int), default=defaults.queue_events, help="events that may wait for the disk")
    add("--queue-bytes", type=positive(int), default=defaults.queue_bytes, help="bytes of requests held at a time")
    add("--rate-limit", dest="rate_limits", metavar="documented|SINGLE,BULK", type=rate_limits, default={},
        help="requests a minute for each key: FlexPrice's documented 1000,100, or other numbers; none by default"
        )  # fmt: skip
    add("--mock", action="store_true", help="open /_mock, which resets the events and lets requests fail, for tests")
    add("--visibility-lag-ms", type=positive(int, or_zero=True), default=defaults.visibility_lag_ms, help="show events "
        "to queries so long after they were accepted")  # fmt: skip
    add("--keep-alive-s", type=positive(int), default=KEEP_ALIVE_S, help="close a connection that idles for so long; "
        "more than a proxy in front keeps one")  # fmt: skip
    add("--forward-to", metavar="URL", help="send every event on to FlexPrice, or another eventstore; its key is "
        "EVENTSTORE_FORWARD_API_KEY, else FLEXPRICE_API_KEY")  # fmt: skip
    add("--forward-environment", default="development", help="whose events")
    add("--forward-interval-ms", type=positive(int), default=1000, help="longest wait for a batch to fill")
    add("--retain-days", metavar="N", type=positive(float), help="delete events that were stored longer ago than that")
    add("--access-log", action="store_true", help="log every request, not only refused ones")
    add("--log-level", choices=["debug", "info", "warning", "error"], default="info", help="what to log")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status: 0, 1 if it stopped half-way, 2 if it cannot start."""
    try:
        arguments = parse_arguments(sys.argv[1:] if argv is None else argv)
        return int(arguments.run(arguments))
    except StartError as error:
        say(str(error))
        return 2


if __name__ == "__main__":
    sys.modules["eventstore"] = sys.modules["__main__"]  # what eventstore_extras imports is this module, not another
    sys.exit(main())
