"""Events in and out: `eventstore import` and `eventstore export`."""

from __future__ import annotations

import argparse
import codecs
import csv
import gzip
import hashlib
import importlib
import importlib.util
import io
import itertools
import os
import re
import sqlite3
import sys
import time
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from datetime import datetime
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO, NamedTuple, NoReturn, cast

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from eventstore import (
    EARLIEST,
    ENCODER,
    EVENT,
    EVENT_FILTERS,
    LATEST,
    MAX_TIME_US,
    MEMBERS,
    MIN_TIME_US,
    WRITER_PRAGMAS,
    AddFlag,
    ApiError,
    Cursor,
    EventIn,
    EventQuery,
    EventQueryIn,
    Fault,
    Faults,
    FieldError,
    IdMaker,
    Row,
    Settings,
    Sql,
    StartError,
    View,
    add_db_flag,
    after_cursor,
    all_of,
    check_properties,
    connect,
    connect_reader,
    decode,
    decode_fields,
    environment_number,
    event_query,
    event_row,
    excerpt,
    index_of,
    insert_events,
    list_events,
    matching,
    now_us,
    parse_property_filters,
    parse_time,
    plural,
    positive,
    prepare_file,
    quoted,
    raise_fault,
    say,
    sql,
    to_datetime,
)
from eventstore_extras.job import StopError, run_job

# ---------------------------------------------------------------------------------------------- reading files

CHUNK_BYTES = 1024 * 1024
HEAD_BYTES = 64 * 1024  # enough to see the format
IMPORT_LOCK_TIMEOUT_S = 60.0
IMPORT_EVENTS = 4000  # of a commit: a server beside it waits for that long
RAW = msgspec.json.Decoder(Raw)
LINE_OVERHEAD_BYTES = 1024  # an exported line names every field: it is longer than the body that brought the event


class TableEvent(EventIn):
    """A row of a table, which may say when the event was ingested, too, as FlexPrice's own table export does."""

    ingested_at: str | None = None


class TypedRow(Struct, omit_defaults=True):
    """A row of a table whose columns have types: times in microseconds since 1970, or as text."""

    event_name: str | None = None
    external_customer_id: str | None = None
    event_id: str | None = None
    customer_id: str | None = None
    source: str | None = None
    timestamp: int | str | None = None
    ingested_at: int | str | None = None
    properties: str | None = None  # JSON text
    members: Raw = Raw()  # the object that it is where it is none
    named: Raw = Raw()  # the columns `properties.NAME`, as one object


class Entry(NamedTuple):
    """One event of a file as it was found there."""

    line: int
    number: int | None  # in its JSON array, from 0
    content: Any  # the bytes of its JSON, a table's cells, or its TypedRow
    problem: str = ""  # that makes the rest not worth a look
    unit: str = "line"  # or "row": what `line` counts, from 1

    @property
    def place(self) -> str:
        return f":{self.line}" if self.unit == "line" else f": row {self.line}"


class UnreadableError(Exception):
    """A file cannot be read on from a line."""

    def __init__(self, line: int | None, problem: str) -> None:
        super().__init__(problem)
        self.place = "" if line is None else f":{line}"


class _Rejoined(io.RawIOBase):
    """A stream whose first bytes, read to look at them, are put back."""

    def __init__(self, head: bytes, rest: io.BufferedReader | gzip.GzipFile, error: Exception | None) -> None:
        self._head = head
        self._rest = rest
        self._error = error

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if self._error and not self._head:
            raise self._error
        chunk = self._head[: len(buffer)] or self._rest.read1(len(buffer))
        self._head = self._head[len(chunk) :]
        buffer[: len(chunk)] = chunk
        return len(chunk)


def look_into(stream: io.BufferedReader | gzip.GzipFile) -> tuple[bytes, io.BufferedReader]:
    """The first bytes of a stream, and the stream as if they had not been read."""
    head, error = b"", None
    try:
        while len(head) < HEAD_BYTES and (chunk := stream.read1(HEAD_BYTES)):
            head += chunk
    except (EOFError, OSError, zlib.error) as damage:  # what could be read comes first
        error = damage
    return head, io.BufferedReader(_Rejoined(head, stream, error), CHUNK_BYTES)


_EVENTS_MEMBER = re.compile(rb'\s*\{\s*"events"\s*:')
_ARRAY_START = re.compile(rb'\s*(\{\s*"events"\s*:\s*)?\[')


def input_format(head: bytes) -> str:
    if head.startswith((b"PAR1", b"PARE")):  # the second one is encrypted
        return "parquet"
    start = head.lstrip()[:1]
    if start == b"[" or _EVENTS_MEMBER.match(head):
        return "json"
    return "ndjson" if start in (b"{", b"") else "csv"


def read_entries(raw: io.BufferedReader, arguments: argparse.Namespace) -> Iterator[Entry]:
    """What a file holds, whatever its format, gzipped or not. UnreadableError, after the entries before the place."""
    try:
        head, stream = look_into(raw)
        if packed := head.startswith(b"\x1f\x8b"):
            head, stream = look_into(gzip.GzipFile(fileobj=stream))
        if head.startswith(codecs.BOM_UTF8):
            head = head[len(stream.read(len(codecs.BOM_UTF8))) :]
        form = input_format(head) if arguments.format == "auto" else arguments.format
        if form == "parquet" and (packed or not raw.seekable()):
            raise UnreadableError(None, "Parquet is read from its end: give it as a file, not packed and not by a pipe")
        if arguments.assume_utc and form != "parquet":
            raise UnreadableError(None, f"--assume-utc is for Parquet, this is {form}: write its times with a zone")
        yield from READERS[form](raw if form == "parquet" else stream, arguments)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise UnreadableError(None, f"the gzip data is damaged or cut off: {error}") from error
    except OSError as error:
        raise UnreadableError(None, f"cannot be read on: {error.strerror or error}") from error


def lines(stream: io.BufferedReader, limit_bytes: int) -> Iterator[tuple[int, bytes, bool]]:
    """The lines with their numbers; of one that is too long the start only, and False."""
    for number in itertools.count(1):
        line = stream.readline(limit_bytes + 1)
        if not line:
            return
        is_whole = len(line) <= limit_bytes or line.endswith(b"\n")
        rest = b"" if is_whole else b"..."
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(CHUNK_BYTES)
        yield number, line, is_whole


def json_lines(stream: io.BufferedReader, limit_bytes: int) -> Iterator[Entry]:
    for number, line, is_whole in lines(stream, limit_bytes + LINE_OVERHEAD_BYTES):
        if not is_whole:
            yield Entry(number, None, line[:1000], f"is longer than {limit_bytes} bytes")
        elif content := line.strip():
            problem = "is { alone: each event is one whole line" if content == b"{" else ""
            yield Entry(number, None, content, problem)


_STRING = rb'"[^"\\]*(?:\\.[^"\\]*)*"'
_TO_BRACKET = re.compile(rb'[^"{}\[\]]*(?:' + _STRING + rb'[^"{}\[\]]*)*([{}\[\]])', re.DOTALL)
_SCALAR = re.compile(_STRING + rb'|[^\s,"\[\]{}]+', re.DOTALL)
_SPACE = re.compile(rb"[ \t\r\n]*")


def json_array(stream: io.BufferedReader, limit_bytes: int) -> Iterator[Entry]:
    return _Array(stream, limit_bytes + LINE_OVERHEAD_BYTES).entries()


class _Array:
    """Cuts a JSON array of any length into its elements, holding one of them and a chunk.

    A regular expression leaps from bracket to bracket; a JSON parser would need the whole array in memory.
    """

    def __init__(self, stream: io.BufferedReader, limit_bytes: int) -> None:
        self._stream = stream
        self._limit_bytes = limit_bytes
        self._buffer = b""
        self._at = 0  # what is before it is done with
        self._line = 1

    def entries(self) -> Iterator[Entry]:
        while (start := _ARRAY_START.match(self._buffer)) is None:
            if len(self._buffer) > HEAD_BYTES or not self._more():
                raise UnreadableError(self._line, 'must start with [ or {"events": [')
        self._advance(start.end())
        for index in itertools.count():
            if self._next_byte() == b"]" and not index:
                break
            yield Entry(self._line, index, self._element(index))
            byte = self._next_byte()
            if byte == b"]":
                break
            if byte != b",":
                where = f"the comma or ] after events[{index}] is missing"
                raise UnreadableError(self._line, where if byte else "the file ends inside the array: it is not whole")
            self._advance(self._at + 1)
        self._check_rest(b'{"events":[' if start[1] else b"[")

    def _check_rest(self, start: bytes) -> None:
        """What follows the events must close what came before them; other members are ignored, as over HTTP."""
        line = self._line
        while len(self._buffer) - self._at <= self._limit_bytes and self._more():
            pass
        try:
            decode(RAW, start + self._buffer[self._at :])
        except ApiError:
            raise UnreadableError(line, f"after the events: {excerpt(self._buffer[self._at + 1 :])}") from None

    def _more(self) -> bool:
        chunk = self._stream.read1(CHUNK_BYTES)
        self._buffer = self._buffer[self._at :] + chunk
        self._at = 0
        return bool(chunk)

    def _advance(self, at: int) -> None:
        self._line += self._buffer.count(b"\n", self._at, at)
        self._at = at

    def _next_byte(self) -> bytes:
        """The next one that is no white space; none at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._at)
            self._advance(space.end() if space else self._at)
            if self._at < len(self._buffer) or not self._more():
                return self._buffer[self._at : self._at + 1]

    def _element(self, index: int) -> bytes:
        first = self._next_byte()
        if first in (b",", b"]", b"}", b":"):
            raise UnreadableError(self._line, f"events[{index}] is missing")
        scalar = first not in (b"{", b"[")
        size, depth = 0, 0
        while True:
            match = (_SCALAR if scalar else _TO_BRACKET).match(self._buffer, self._at + size)
            if match and not (scalar and match.end() == len(self._buffer)):
                size = match.end() - self._at
                depth += 0 if scalar else 1 if match[1] in b"{[" else -1
                if depth == 0:
                    break
            elif len(self._buffer) - self._at > self._limit_bytes:
                limit = self._limit_bytes - LINE_OVERHEAD_BYTES
                raise UnreadableError(self._line, f"events[{index}] is longer than {limit} bytes")
            elif not self._more():
                raise UnreadableError(self._line, f"the file ends inside events[{index}]: it is not whole")
        content = self._buffer[self._at : self._at + size]
        self._advance(self._at + size)
        return content


def parquet_room() -> ModuleType:
    """The module that knows Parquet, and needs a library. StartError."""
    try:
        return importlib.import_module("eventstore_extras.parquet")
    except ModuleNotFoundError as error:
        install = f"{sys.executable} -m pip install arro3-core arro3-io (or '.[parquet]' in the clone)"
        raise StartError(f"Parquet needs {(error.name or '').partition('.')[0]}: {install}") from None


READERS: dict[str, Callable[[io.BufferedReader, argparse.Namespace], Iterator[Entry]]] = {
    "ndjson": lambda stream, arguments: json_lines(stream, arguments.max_body_bytes),
    "json": lambda stream, arguments: json_array(stream, arguments.max_body_bytes),
    "csv": lambda stream, arguments: table_rows(stream, arguments.max_body_bytes),
    "parquet": lambda file, arguments: parquet_room().rows(file, arguments.max_body_bytes, arguments.assume_utc),
}

NULL = Raw(b"null")
PROPERTY_COLUMN = "properties."
EXPORTED_COLUMNS = ("id", "ingested_at", "tenant_id", "environment_id", "environment")  # what only an export has


def table_rows(stream: io.BufferedReader, limit_bytes: int) -> Iterator[Entry]:
    """The rows of a CSV file as `column -> cell`, without the empty cells."""

    def texts() -> Iterator[str]:
        for number, line, is_whole in lines(stream, 2 * limit_bytes):  # each quote in a cell is written twice
            if not is_whole:
                raise UnreadableError(number, f"is longer than {2 * limit_bytes} bytes")
            yield line.decode(errors="surrogateescape")

    csv.field_size_limit(limit_bytes)
    reader = csv.reader(texts(), strict=True)
    columns: list[str] | None = None
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:  # an open quote swallows the lines after it, so there is no going on
            reason = "a quote opens here and is never closed" if "end of data" in str(error) else error
            raise UnreadableError(line, f"cannot be read as CSV: {reason}") from error
        if cells is None:
            return
        if columns is None:
            columns = check_columns(cells, line)
        elif len(cells) not in (len(columns), 0):
            problem = f"has {plural(len(cells), 'cell')}, the header has {len(columns)}"
            yield Entry(line, None, dict(enumerate(cells)), problem)
        elif cells:
            null = "\\N" if "id" in columns else ""  # ClickHouse's
            row = {name: cell for name, cell in zip(columns, cells, strict=True) if cell not in ("", null)}
            yield Entry(line, None, row)


def check_columns(columns: list[str], line: int | None, head: str = "the header") -> list[str]:
    """The names of a table's columns. UnreadableError."""
    known = (*EventIn.__struct_fields__, *EXPORTED_COLUMNS)
    unknown = [name for name in columns if name not in known and not re.match(r"properties\..", name, re.DOTALL)]
    missing = [name for name in ("event_name", "external_customer_id") if name not in columns]
    twice = [name for name, number in Counter(columns).items() if number > 1]
    if len(unknown) == len(columns) and line:
        start = quoted(readable(",".join(columns))[:40])
        raise UnreadableError(
            line, f"is neither NDJSON nor JSON nor CSV with known columns and commas: it starts {start}"
        )
    if unknown:
        problem = (
            f"unknown columns: {', '.join(map(quoted, unknown[:10]))}; known are {', '.join(known)}, properties.NAME"
        )
        raise UnreadableError(line, f"{head} has {problem}")
    if missing:
        raise UnreadableError(line, f"{head} has no column {missing[0]}")
    if twice or {"id", "event_id"} <= set(columns):
        raise UnreadableError(line, f"{head} has the column {(twice or ['id and event_id'])[0]} twice")
    return columns


_TABLE_TIME = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d(?:\.\d{1,9})?)", re.ASCII)


def table_event(row: dict[str, str]) -> TableEvent:
    """The event of a CSV file's row. ApiError."""
    try:
        "".join(row.values()).encode()
    except UnicodeEncodeError:
        raise_fault("line", "invalid_format", "is not UTF-8")
    event = TableEvent(properties=Raw(table_properties(row)))
    for name in row.keys() & {*TableEvent.__struct_fields__} - {"properties"}:
        setattr(event, name, row[name])
    event.event_id = row.get("id", event.event_id)
    if "id" in row:
        for name in ("timestamp", "ingested_at"):
            if time := _TABLE_TIME.fullmatch(row.get(name, "")):
                setattr(event, name, f"{time[1]}T{time[2]}Z")
    return event


def table_properties(row: dict[str, str]) -> bytes:
    """The JSON of the column `properties` together with the columns `properties.NAME`, which hold texts."""
    named = {name.removeprefix(PROPERTY_COLUMN): row[name] for name in row if name.startswith(PROPERTY_COLUMN)}
    texts = {name: Raw(ENCODER.encode(cell)) for name, cell in named.items()}
    return with_named(row.get("properties", "").encode(), texts)


def with_named(raw: bytes, named: dict[str, Raw]) -> bytes:
    """The JSON of properties together with those that have columns of their own. ApiError if the two differ."""
    if not named:
        return raw
    try:
        members = MEMBERS.decode(check_properties(raw))
    except FieldError:
        return raw  # whoever stores it says what is wrong
    for name in sorted(named.keys() & members.keys()):
        if not is_same(named[name], members[name]):
            raise_fault(
                PROPERTY_COLUMN + name, "invalid_format", "is in the column properties, too, with another value"
            )
    if named.keys() <= members.keys():
        return raw  # as it is, spaces and all
    return ENCODER.encode(members | named | members)


def is_same(one: Raw, other: Raw) -> bool:
    """Whether two JSON texts mean the same; of a number as a double has it, if one of them comes from a double."""
    values = msgspec.json.decode(one), msgspec.json.decode(other)
    kinds = {*map(type, values)}
    return values[0] == values[1] if kinds != {int, float} else float(values[0]) == float(values[1])


def typed_event(row: TypedRow) -> EventIn:
    """The event of a row whose columns have types, without its times. ApiError."""
    properties = row.properties.encode() if row.properties else bytes(row.members)
    if row.named:
        named = MEMBERS.decode(row.named)
        properties = with_named(properties, {name: value for name, value in named.items() if value != NULL})
    return EventIn(row.event_name, row.external_customer_id, row.event_id, row.customer_id, row.source, None,
                   Raw(properties))  # fmt: skip


def time_us(value: int | str) -> int:
    """A time of a TypedRow in microseconds since 1970. FieldError."""
    if isinstance(value, str):
        return parse_time(value)
    if not MIN_TIME_US <= value <= MAX_TIME_US:
        raise FieldError("out_of_range", f"must lie in the years 1 to 9999 in UTC, got {value} microseconds from 1970")
    return value


# ---------------------------------------------------------------------------------------------- import


class Importer:
    """Checks entries as if they came over HTTP and stores them, a few thousand in one transaction.

    The database is opened, and made if absent, for the first good event: no file without one leaves it behind.
    """

    def __init__(
        self, arguments: argparse.Namespace, connect: Callable[[], sqlite3.Connection] | None, rejects: BinaryIO | None
    ) -> None:
        """Without connect nothing is stored: a dry run."""
        self._arguments = arguments
        self._name = "standard input" if arguments.file == "-" else arguments.file
        self._environment = 0
        self._connect = connect
        self._conn: sqlite3.Connection | None = None
        self._rejects = rejects
        self._make_id = IdMaker()
        self._rows: list[Row] = []
        self._bytes = 0
        self._now = now_us()
        self.stored = self.new = self.rejected = 0
        self.ignored: set[str] = set()  # fields that nothing has

    def open(self) -> None:
        """Open the database, unless it is open or this is a dry run. StartError."""
        if self._connect:
            self._conn, self._connect = self._connect(), None
            self._environment = environment_number(self._conn, self._arguments.environment)

    def add(self, entry: Entry) -> bool:
        """Whether this entry completed a group, which is now stored. StopError if it is bad and nobody takes those."""
        try:
            row = self._row(entry)
        except ApiError as error:
            self._reject(entry, error)
            return False
        if self._connect:
            self.open()
            row = row._replace(environment=self._environment)
        self._rows.append(row)
        self._bytes += len(row.properties)
        if len(self._rows) < IMPORT_EVENTS and self._bytes < GROUP_BYTES:
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """Store what was added. The events are made before the lock is taken, which leaves a server its turn."""
        try:
            new = insert_events(self._conn, self._rows, IMPORT_LOCK_TIMEOUT_S) if self._conn else 0
        except sqlite3.Error as error:
            reason = f"the database refused the write: {error}; {self.so_far}"
            raise StopError(f"{reason}; when it can be written again, import the file again") from error
        self.stored += len(self._rows)
        self.new += new
        self._rows, self._bytes, self._now = [], 0, now_us()
        if self._rejects:
            self._rejects.flush()

    @property
    def so_far(self) -> str:
        if self._arguments.dry_run:
            return f"good before it: {plural(self.stored, 'event')}; nothing was stored"
        return f"stored before it: {plural(self.stored, 'event')}, {self.new:,} of them new"

    def stop(self, place: str, problem: str) -> NoReturn:
        """Store what came before the place, and say so."""
        self.commit()
        raise StopError(f"{self._name}{place}: {problem}; {self.so_far}; correct it and import the file again")

    def _row(self, entry: Entry) -> Row:
        if entry.problem:
            raise_fault(entry.unit, "invalid_format", entry.problem)
        faults = Faults(whole="event")
        if isinstance(entry.content, dict):
            event: EventIn = table_event(entry.content)
        elif isinstance(entry.content, TypedRow):
            return self._typed_row(entry, entry.content, faults)
        else:
            faults.index = entry.number or 0
            event = decode_fields(EVENT, entry.content, faults)
            if faults.ignored and len(self.ignored) < 100:
                self.ignored |= faults.ignored
            if not entry.content.startswith(b"{"):
                faults.raise_any()
        event.event_id = event.event_id or content_id(entry)
        row = event_row(event, self._environment, self._now, self._make_id, faults)
        ingested_at = event.ingested_at if isinstance(event, TableEvent) else None
        ingested_at_us = faults.check("ingested_at", parse_time, ingested_at)
        faults.raise_any()
        return row if ingested_at_us is None else row._replace(ingested_at_us=ingested_at_us)

    def _typed_row(self, entry: Entry, found: TypedRow, faults: Faults) -> Row:
        event = typed_event(found)
        event.event_id = event.event_id or content_id(entry)
        row = event_row(event, self._environment, self._now, self._make_id, faults)
        timestamp_us = faults.check("timestamp", time_us, found.timestamp)
        ingested_at_us = faults.check("ingested_at", time_us, found.ingested_at)
        faults.raise_any()
        at_us = self._now if timestamp_us is None or timestamp_us == MIN_TIME_US else timestamp_us
        stored_us = self._now if ingested_at_us is None else ingested_at_us
        return Row(*row[:-3], at_us, stored_us, row.properties)  # in half of _replace's time

    def _reject(self, entry: Entry, error: ApiError) -> None:
        message = f"event {error.message.removeprefix('the body ')}"
        faults = error.details.errors or [Fault(None, None, "event", "invalid_format", message)]
        if self._rejects is None:
            prefix = "" if entry.number is None else f"events[{entry.number}]."
            problems = [f"{prefix}{fault.field}: {fault.message.removeprefix(fault.field + ' ')}" for fault in faults]
            self.stop(entry.place, "; ".join(problems))
        place = {entry.unit: entry.line} if entry.number is None else {"line": entry.line, "index": entry.number}
        errors = [{"field": fault.field, "code": fault.code, "message": fault.message} for fault in faults]
        self._rejects.write(ENCODER.encode({**place, "errors": errors, "event": shown_content(entry.content)}) + b"\n")
        self.rejected += 1


def content_id(entry: Entry) -> str:
    """The id of an event that has none: importing the same file again makes the same one."""
    content = entry.content if isinstance(entry.content, bytes) else ENCODER.encode(entry.content)
    number = entry.line if entry.number is None else entry.number
    return "import_" + hashlib.sha256(b"%d:%b" % (number, content)).hexdigest()[:32]


def readable(cell: str) -> str:
    """A cell in which bytes that are not UTF-8 are replaced."""
    return cell.encode(errors="surrogateescape").decode(errors="replace")


def shown_content(found: Any) -> Any:
    """What was found in a file, as JSON; as a text if it is none."""
    if isinstance(found, dict):
        return {str(key): readable(cell) for key, cell in found.items()}
    if isinstance(found, TypedRow):
        times = {name: to_datetime(time) for name in ("timestamp", "ingested_at")
                 if isinstance(time := getattr(found, name), int) and MIN_TIME_US <= time <= MAX_TIME_US}  # fmt: skip
        return replace(found, **times)
    try:
        decode(RAW, found)
        return Raw(msgspec.json.format(found, indent=-1))
    except (ApiError, RecursionError, msgspec.DecodeError):
        return found.decode(errors="replace")


def import_events(arguments: argparse.Namespace) -> int:
    """`eventstore import`: 0, or StopError at the first bad event."""
    started_s = time.monotonic()
    with ExitStack() as stack:
        source = open_input(arguments, stack)
        size = os.fstat(source.fileno()).st_size if source.seekable() else None
        if arguments.db == ":memory:":
            raise StartError("--db :memory: would be gone after the import: name a file")
        made = "" if os.path.exists(arguments.db) else ", which was made for them"
        if not made or not os.path.isdir(os.path.dirname(os.path.abspath(arguments.db))):
            prepare_file(arguments.db)  # says what is wrong with it before anything is read, or made
        rejects = stack.enter_context(open_rejects(arguments)) if arguments.skip_invalid else None
        importer = Importer(arguments, None if arguments.dry_run else partial(open_database, arguments, stack), rejects)
        advance = stack.enter_context(progress_bar(lambda: size, "event" if size is None else "B"))
        done = 0
        try:
            for entry in read_entries(source, arguments):
                if importer.add(entry):  # Parquet is not read from start to end
                    done, before = importer.stored if size is None else max(done, source.tell()), done
                    advance(done - before)
            importer.open()
            importer.commit()
            advance(importer.stored - done if size is None else size - done)
        except UnreadableError as error:
            importer.stop(error.place, str(error))
        except KeyboardInterrupt:
            again = "import the file again to go on, nothing is stored twice"
            raise StopError(f"interrupted; at least {plural(importer.stored, 'event')} stored; {again}") from None
    say_imported(arguments, importer, made, started_s)
    return 0


def say_imported(arguments: argparse.Namespace, importer: Importer, made: str, started_s: float) -> None:
    path = arguments.skip_invalid
    rejected = f", {importer.rejected:,} rejected and written to {path}" if path else ""
    ignored = f"; ignored, no field has that name: {', '.join(map(quoted, sorted(importer.ignored)))}"[:500]
    taken_s = f"{time.monotonic() - started_s:.1f} s{ignored if importer.ignored else ''}"
    events = plural(importer.stored, "event")
    if arguments.dry_run:
        say(f"would import {events} into {arguments.db}{rejected}; nothing was stored; {taken_s}")
    else:
        known = f"{importer.new:,} new, {importer.stored - importer.new:,} already stored{rejected}"
        say(f"imported {events} into {arguments.db}{made}: {known}; {taken_s}")


def open_input(arguments: argparse.Namespace, stack: ExitStack) -> io.BufferedReader:
    if arguments.file == "-":
        return cast(io.BufferedReader, sys.stdin.buffer)
    try:
        return stack.enter_context(open(arguments.file, "rb"))
    except OSError as error:
        raise StartError(f"cannot read {arguments.file}: {error.strerror}") from error


def open_database(arguments: argparse.Namespace, stack: ExitStack) -> sqlite3.Connection:
    prepare_file(arguments.db)
    return stack.enter_context(closing(connect(arguments.db, WRITER_PRAGMAS)))


def open_rejects(arguments: argparse.Namespace) -> BinaryIO:
    path = arguments.skip_invalid
    try:
        for name in (arguments.file, arguments.db):
            if os.path.exists(path) and os.path.exists(name) and os.path.samefile(path, name):
                raise StartError(f"--skip-invalid {path} would overwrite {name}: name another file")
        return open(path, "wb")
    except OSError as error:
        raise StartError(f"cannot write --skip-invalid {path}: {error.strerror}") from error


# ---------------------------------------------------------------------------------------------- stored events

PAGE_EVENTS = 1000
GROUP_BYTES = 16 * 1024 * 1024  # what an import holds before it commits, an export before it writes
StoredRow = tuple[int, Row]  # with its seq
SELECT_ROWS = f"SELECT {', '.join(Row._fields)}, seq FROM events"


def stored_events(conn: sqlite3.Connection, query: EventQuery) -> Iterator[list[StoredRow]]:
    """The events that match, oldest first, in pages. No cursor stays open between them: it would keep a server's WAL
    from being checkpointed."""
    while True:
        where = all_of([matching(query), after_cursor(query, query.after, "", descending=False)])
        text = f"{index_of(query.filters)} WHERE {where} ORDER BY timestamp_us, id"
        page = select_rows(conn, sql(text, where))
        if not page:
            return
        yield page
        query = replace(query, after=Cursor(page[-1][1].timestamp_us, page[-1][1].id))


def select_rows(conn: sqlite3.Connection, clauses: Sql) -> list[StoredRow]:
    """The first thousand rows, fewer if they are large: a thousand of 32 MiB would fill any memory."""
    page: list[StoredRow] = []
    size = 0
    with closing(conn.execute(f"{SELECT_ROWS} {clauses} LIMIT {PAGE_EVENTS}", clauses.values)) as found:
        for *columns, seq in found:
            page.append((seq, Row(*columns)))
            size += len(columns[-1])
            if size >= GROUP_BYTES:
                break
    return page


def flag_query(arguments: argparse.Namespace) -> EventQuery:
    """The query of the filter flags, over all time by default. StartError names the flag."""
    faults = Faults()
    flags = {name: getattr(arguments, name) for name in EVENT_FILTERS}
    flags["property_filters"] = faults.check("property_filters", parse_property_filters, flags["property_filters"])
    sent = EventQueryIn(**flags, count_total=True, page_size=1)
    sent.start_time, sent.end_time = sent.start_time or EARLIEST, sent.end_time or LATEST
    try:
        return event_query(sent, View(arguments.environment, 0), PAGE_EVENTS, faults)
    except ApiError as error:
        problems = error.details.errors or []
        flagged = [f"--{fault.field.replace('_', '-')}{fault.message.removeprefix(fault.field)}" for fault in problems]
        flagged = [message.replace("before start_time", "before --start-time") for message in flagged]
        raise StartError("; ".join(flagged)) from error


def open_stored(path: str) -> sqlite3.Connection:
    """A reading connection to a database that exists. StartError."""
    if not os.path.exists(path):
        raise StartError(f"there is no database {path}: name one with --db")
    prepare_file(path)
    return connect_reader(path)


@contextmanager
def progress_bar(
    total: Callable[[], int | None], unit: str, among_data: bool = False
) -> Iterator[Callable[[int], object]]:
    """A function that takes how much more is done; on a terminal it moves a bar, if tqdm is installed."""
    if not sys.stderr.isatty() or (among_data and sys.stdout.isatty()) or importlib.util.find_spec("tqdm") is None:
        yield lambda _: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415 - only the extra `cli` has it

    with tqdm(total=total(), unit=unit, unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:
        yield bar.update


# ---------------------------------------------------------------------------------------------- export


class ExportedEvent(Struct):
    """One event as ndjson and replay have it: what POST /v1/events/bulk takes (API: Sending events)."""

    event_name: str
    event_id: str
    external_customer_id: str
    customer_id: str
    source: str
    timestamp: datetime
    properties: Raw


def exported_event(row: Row) -> ExportedEvent:
    properties = row.properties.encode()
    if b"\n" in properties or b"\r" in properties:  # one event is one line; digits and escapes stay as they are
        properties = msgspec.json.format(properties, indent=-1)
    return ExportedEvent(row.event_name, row.id, row.external_customer_id, row.customer_id, row.source,
                         to_datetime(row.timestamp_us), Raw(properties))  # fmt: skip


def ndjson(rows: Iterable[Row]) -> bytes:
    return ENCODER.encode_lines(map(exported_event, rows))


def csv_lines(rows: Iterable[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # with "\n", a lone \r in a cell would not be quoted
    for row in rows:
        time_text = msgspec.to_builtins(to_datetime(row.timestamp_us))
        writer.writerow([row.event_name, row.id, row.external_customer_id, row.customer_id, row.source, time_text,
                         row.properties])  # fmt: skip
    return text.getvalue().encode()


CSV_HEADER = ",".join(ExportedEvent.__struct_fields__).encode() + b"\r\n"


def clickhouse_lines(rows: Iterable[Row], tenant_id: str, environment: str) -> bytes:
    """JSONEachRow for FlexPrice's ClickHouse table `events`."""

    def milliseconds(time_us: int) -> str:
        return to_datetime(time_us).replace(tzinfo=None).isoformat(" ", "milliseconds")

    return ENCODER.encode_lines(
        {
            "id": row.id,
            "tenant_id": tenant_id,
            "environment_id": environment,
            "external_customer_id": row.external_customer_id,
            "event_name": row.event_name,
            "customer_id": row.customer_id,
            "source": row.source,
            "timestamp": milliseconds(row.timestamp_us),
            "ingested_at": milliseconds(row.ingested_at_us),
            "properties": row.properties,
        }
        for row in rows
    )


Pages = Iterator[list[Row]]


def write_pages(encode: Callable[[list[Row]], bytes], pages: Pages, output: BinaryIO, header: bytes = b"") -> None:
    output.write(header)
    output.writelines(encode(page) for page in pages)


def writer(arguments: argparse.Namespace) -> Callable[[Pages, BinaryIO], None]:
    """What writes the format that was asked for. StartError if the flags do not fit it."""
    if arguments.format is None:
        arguments.format = "parquet" if (arguments.output or "").endswith((".parquet", ".parquet.gz")) else "ndjson"
    if (arguments.format == "clickhouse") is not bool(arguments.tenant_id):
        raise StartError("--tenant-id goes with --format clickhouse, which needs it: your tenant's id in FlexPrice")
    if arguments.property_columns and arguments.format != "parquet":
        raise StartError("--properties-column goes with --format parquet: the other formats have no typed columns")
    environment = arguments.environment
    clickhouse = partial(clickhouse_lines, tenant_id=arguments.tenant_id, environment=environment)
    writers: dict[str, Callable[[], Callable[[Pages, BinaryIO], None]]] = {
        "ndjson": lambda: partial(write_pages, ndjson),
        "csv": lambda: partial(write_pages, csv_lines, header=CSV_HEADER),
        "clickhouse": lambda: partial(write_pages, clickhouse),
        "parquet": lambda: parquet_room().writer(environment, arguments.property_columns, arguments.output),
    }
    return writers[arguments.format]()


def export_events(arguments: argparse.Namespace) -> int:
    """`eventstore export`: 0, or StopError."""
    started_s = time.monotonic()
    query, write = flag_query(arguments), writer(arguments)
    done = 0

    def pages() -> Pages:
        nonlocal done
        for page in stored_events(conn, query):
            yield [row for _, row in page]
            done += len(page)
            advance(len(page))

    with closing(open_stored(arguments.db)) as conn, open_output(arguments.output, arguments.db) as output:
        among_data = arguments.output is None
        with progress_bar(lambda: list_events(conn, query).total_count or 0, "event", among_data) as advance:
            write(pages(), output)
        elsewhere = "" if done else other_environments(conn, arguments.environment)
    say(f"exported {plural(done, 'event')}; {time.monotonic() - started_s:.1f} s{elsewhere}")
    return 0


def other_environments(conn: sqlite3.Connection, environment: str) -> str:
    """For whoever finds nothing: where there are events."""
    has_events = "EXISTS (SELECT 1 FROM events WHERE environment = environments.id)"
    names = conn.execute(f"SELECT name FROM environments WHERE {has_events} ORDER BY name")
    others = ", ".join(name for (name,) in names if name != environment)
    return f"; --environment is {environment}, the database has events of {others}, too" if others else ""


@contextmanager
def open_output(path: str | None, db: str) -> Iterator[BinaryIO]:
    """Standard output, or a file that appears under its name when it is complete. StartError, StopError."""
    if path is None:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = os.path.realpath(path)
    if os.path.exists(path) and (not os.path.isfile(path) or os.path.samefile(path, db)):
        raise StartError(f"--output {path} is the database, or no file: name another one")
    folder = os.path.dirname(path)
    if not os.access(folder, os.W_OK):
        problem = "cannot be written" if os.path.isdir(folder) else "does not exist"
        raise StartError(f"--output {path}: the folder {folder} {problem}: make it so, or name another file")
    with whole_file(path, f"cannot write --output {path}", "no file was made") as file:
        if path.endswith(".gz"):  # without a time and a name in it: equal exports are equal bytes
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                yield cast(BinaryIO, packed)
        else:
            yield file


@contextmanager
def whole_file(path: str | Path, problem: str, note: str) -> Iterator[BinaryIO]:
    """A file that appears under its name, in another's place, when it is complete and on the disk. StopError."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path)
    except OSError as error:
        raise StopError(f"{problem}: {error.strerror or error}; {note}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def sync_folder(path: str | Path) -> None:
    """After it a power cut cannot take a new file's name away; on Windows there is no such thing."""
    with suppress(OSError):
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


# ---------------------------------------------------------------------------------------------- flags


def add_import_flags(add: AddFlag) -> None:
    add_db_flag(add, "database file, made if absent")
    add("file", metavar="FILE", help="events as NDJSON, JSON or CSV, each also gzipped, or as Parquet; - is standard "
        "input")  # fmt: skip
    add("--environment", default="development", help="where to store them")
    add("--format", choices=["auto", *READERS], default="auto", help="by the content, or this one")
    add("--skip-invalid", metavar="REJECTS", help="go on after a bad event, and write it to this file with the reasons")
    add("--max-body-bytes", type=positive(int), default=Settings().max_body_bytes, help="longest event")
    add("--assume-utc", action="store_true", help="take Parquet's times that have no zone as UTC")
    add("--dry-run", action="store_true", help="say what would be imported, and store nothing")


def add_filter_flags(add: AddFlag) -> None:
    add_db_flag(add, "database file")
    add("--environment", default="development", help="whose events")
    for name in EVENT_FILTERS:
        note = {"start_time": "all time", "end_time": "all time"}.get(name)
        text = f"RFC 3339, inclusive; {note} if absent" if note else "as in GET /v1/events"
        metavar = "KEY:V1,V2;KEY2:V3" if name == "property_filters" else "TIME" if note else "TEXT"
        add(f"--{name.replace('_', '-')}", metavar=metavar, help=text)


COLUMN_TYPES = ("string", "float64", "int64", "bool")


def property_column(text: str) -> tuple[str, str]:
    name, _, kind = text.rpartition(":")
    if not name or kind not in COLUMN_TYPES:
        types = ", ".join(COLUMN_TYPES)
        raise argparse.ArgumentTypeError(f"must look like tokens:float64, TYPE one of {types}; got {text!r}")
    return name, kind


def add_export_flags(add: AddFlag) -> None:
    add_filter_flags(add)
    add("--format", choices=["ndjson", "csv", "clickhouse", "parquet"], help="what to write; clickhouse is "
        "JSONEachRow for FlexPrice's own table; ndjson by default, or parquet if FILE ends so")  # fmt: skip
    add("--tenant-id", help="for --format clickhouse")
    add("--properties-column", dest="property_columns", metavar="NAME:TYPE", type=property_column, action="append",
        default=[], help=f"a property as a column of Parquet, too; may be given several times; TYPE is one of "
        f"{', '.join(COLUMN_TYPES)}")  # fmt: skip
    add("-o", "--output", metavar="FILE", help="else standard output; a name that ends in .gz compresses")


COMMANDS: dict[str, tuple[Callable[[AddFlag], None], Callable[[argparse.Namespace], int]]] = {
    "import": (add_import_flags, import_events),
    "export": (add_export_flags, export_events),
}


def add_flags(command: str, add: AddFlag) -> None:
    """The flags of one of the commands."""
    COMMANDS[command][0](add)


def run(arguments: argparse.Namespace) -> int:
    """The command that was named; its exit status. StartError."""
    return run_job(COMMANDS[arguments.command][1], arguments)
