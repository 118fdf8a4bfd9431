"""The command `eventstore import`: read events from NDJSON, JSON, CSV or Parquet, check them, and store them."""

from __future__ import annotations

import argparse
import codecs
import csv
import gzip
import io
import os
import re
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, suppress
from typing import BinaryIO, cast

import msgspec
from msgspec import Raw, Struct

from eventstore import (
    ENCODER,
    WRITER_PRAGMAS,
    AddFlag,
    ApiError,
    Fault,
    Faults,
    IdMaker,
    Row,
    Settings,
    StartError,
    add_db_flag,
    connect,
    environment_number,
    insert_events,
    now_us,
    plural,
    positive,
    prepare_file,
    quoted,
    say,
)
from eventstore_extras.entries import Entry, InputError, check_columns, entry_row, shown_content
from eventstore_extras.files import Stream, explain_missing_parquet, numbered_lines, progress_bar, unpacked
from eventstore_extras.job import StopError, run_job

__all__ = ["add_flags", "run"]

_BUFFER_BYTES = 1024 * 1024

# ---------------------------------------------------------------------------------------------- NDJSON

_LINE_OVERHEAD_BYTES = 1024  # an exported line names every field, which makes it longer than the event was when sent


def _read_ndjson(stream: Stream, limit_bytes: int) -> Iterator[Entry]:
    for number, line, is_whole in numbered_lines(stream, limit_bytes + _LINE_OVERHEAD_BYTES):
        if not is_whole:
            yield Entry(number, line[:1000], f"is longer than {limit_bytes} bytes")
        elif content := line.strip():
            problem = "is a lone {: put each event on one line" if content == b"{" else ""
            yield Entry(number, content, problem)


# ---------------------------------------------------------------------------------------------- JSON

# An array is decoded as a whole, because a streaming parser such as ijson does not keep numbers as they were sent. An
# array of 256 MB takes 370 MB of memory.
_MAX_ARRAY_BYTES = 256 * 1024 * 1024


class _Bulk(Struct):
    """The body of POST /v1/events/bulk. Other members are ignored, as over HTTP."""

    events: list[Raw]


_ARRAY = msgspec.json.Decoder(list[Raw])
_BULK = msgspec.json.Decoder(_Bulk)


def _read_json(stream: Stream, limit_bytes: int) -> Iterator[Entry]:
    """Yield the elements of an array, or of the array `events` in an object. Raises InputError if it is not JSON."""
    text = bytearray()
    while chunk := stream.read(_BUFFER_BYTES):
        text += chunk
        if len(text) > _MAX_ARRAY_BYTES:
            advice = "convert it to NDJSON, for example with jq -c '.[]'"
            raise InputError(None, f"is a JSON array of more than {_MAX_ARRAY_BYTES >> 20} MB: {advice}")
    line, end = 1, 0
    for index, element in enumerate(_decode_array(text)):
        content = bytes(element)
        start = text.index(content, end)  # only white space and a comma come before it, so this is the element itself
        line += text.count(b"\n", end, start)
        is_long = len(content) > limit_bytes + _LINE_OVERHEAD_BYTES
        yield Entry(line, content, f"is longer than {limit_bytes} bytes" if is_long else "", index)
        end = start + len(content)
        line += content.count(b"\n")


def _decode_array(text: bytearray) -> list[Raw]:
    try:
        return _ARRAY.decode(text) if re.match(rb"\s*\[", text) else _BULK.decode(text).events
    except msgspec.ValidationError:
        raise InputError(None, 'must be an array of events, or {"events": [...]}') from None
    except RecursionError:
        raise InputError(None, "is nested too deep") from None
    except msgspec.DecodeError as error:
        reason = str(error)
        if "truncated" in reason:
            raise InputError(text.count(b"\n") + 1, "the file ends inside the array: it is not whole") from None
        at = re.search(r"\(byte (\d+)\)", reason)
        line = text.count(b"\n", 0, int(at[1])) + 1 if at else None
        raise InputError(line, f"is not valid JSON: {reason}") from None


# ---------------------------------------------------------------------------------------------- CSV


def _read_csv(stream: Stream, limit_bytes: int) -> Iterator[Entry]:
    """Yield the rows of a CSV file without their empty cells."""
    csv.field_size_limit(limit_bytes)
    reader = csv.reader(_csv_lines(stream, 2 * limit_bytes), strict=True)  # a cell's quotes are doubled
    columns: list[str] = []
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:  # an open quote takes in the lines that follow, so none of them can be read
            reason = "a quote opens here and is never closed" if "end of data" in str(error) else error
            raise InputError(line, f"cannot be read as CSV: {reason}") from error
        if cells is None:
            return
        if not columns:
            check_columns(cells, line)
            columns = cells
        elif len(cells) not in (len(columns), 0):
            problem = f"has {plural(len(cells), 'cell')}, the header has {len(columns)}"
            yield Entry(line, {str(number): cell for number, cell in enumerate(cells)}, problem)
        elif cells:
            absent = ("", "\\N") if "id" in columns else ("",)  # ClickHouse writes \N for null
            row = {name: cell for name, cell in zip(columns, cells, strict=True) if cell not in absent}
            yield Entry(line, row)


def _csv_lines(stream: Stream, limit_bytes: int) -> Iterator[str]:
    for number, line, is_whole in numbered_lines(stream, limit_bytes):
        if not is_whole:
            raise InputError(number, f"is longer than {limit_bytes} bytes")
        yield line.decode(errors="surrogateescape")


# ---------------------------------------------------------------------------------------------- all formats


def _read_parquet(file: Stream, arguments: argparse.Namespace) -> Iterator[Entry]:
    with explain_missing_parquet():
        from eventstore_extras import parquet  # noqa: PLC0415 - only the extra `parquet` has its library
    return parquet.read_rows(cast(BinaryIO, file), arguments.max_body_bytes, arguments.assume_utc)


_READERS: dict[str, Callable[[Stream, argparse.Namespace], Iterator[Entry]]] = {
    "ndjson": lambda stream, arguments: _read_ndjson(stream, arguments.max_body_bytes),
    "json": lambda stream, arguments: _read_json(stream, arguments.max_body_bytes),
    "csv": lambda stream, arguments: _read_csv(stream, arguments.max_body_bytes),
    "parquet": _read_parquet,
}


def _detect_format(head: bytes) -> str:
    """Name the format of a file by its first bytes."""
    if head.startswith((b"PAR1", b"PARE")):  # PARE marks an encrypted file
        return "parquet"
    if re.match(rb'\s*(\[|\{\s*"events"\s*:)', head):
        return "json"
    return "ndjson" if head.lstrip()[:1] in (b"{", b"") else "csv"


def _read_entries(file: io.BufferedReader, arguments: argparse.Namespace) -> Iterator[Entry]:
    """Yield the events of a file of any format, gzipped or not.

    Raises InputError when the rest of the file cannot be read, after the entries before it.
    """
    try:
        stream = unpacked(file)
        if stream.peek(3).startswith(codecs.BOM_UTF8):
            stream.read(3)
        form = _detect_format(stream.peek(1)) if arguments.format == "auto" else arguments.format
        if form == "parquet" and (stream is not file or not file.seekable()):
            raise InputError(None, "Parquet is read from its end: name a file that is not gzipped, not a pipe")
        if arguments.assume_utc and form != "parquet":
            raise InputError(None, f"--assume-utc is for Parquet, this is {form}: write its times with a zone")
        yield from _READERS[form](stream, arguments)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(None, f"the gzip data is damaged or cut off: {error}") from error
    except OSError as error:
        raise InputError(None, f"cannot be read further: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------------- storing

_LOCK_TIMEOUT_S = 60.0
_GROUP_EVENTS = 4000  # events in a transaction, during which a server on the same database cannot write
_GROUP_BYTES = 16 * 1024 * 1024  # bytes of properties held in memory before a transaction stores them
_MAX_IGNORED = 100  # names of unknown fields kept for the summary


class _Database:
    """The database to import into. It is opened, and created if absent, when there are events to store, so that a file
    without a good event does not leave an empty database."""

    def __init__(self, path: str, environment: str) -> None:
        self._path = path
        self._environment = environment
        self._conn: sqlite3.Connection | None = None
        self._number = 0  # of the environment

    def open(self) -> sqlite3.Connection:
        """Return the connection, opening it first if need be. Raises StartError."""
        if self._conn is None:
            prepare_file(self._path)
            self._conn = connect(self._path, WRITER_PRAGMAS)
            self._number = environment_number(self._conn, self._environment)
        return self._conn

    def store(self, rows: list[Row]) -> int:
        """Store rows in one transaction and return how many were new. Raises StartError, sqlite3.Error."""
        conn = self.open()
        rows = [Row(self._number, *row[1:]) for row in rows]  # before the lock is taken
        return insert_events(conn, rows, _LOCK_TIMEOUT_S)

    def close(self) -> None:
        if self._conn:
            self._conn.close()


def _faults(error: ApiError) -> list[Fault]:
    """Return the faults of an event. An event that is not JSON has one fault, which names no field."""
    message = f"event {error.message.removeprefix('the body ')}"
    return error.details.errors or [Fault(None, None, "event", "invalid_format", message)]


def _problem(entry: Entry, faults: list[Fault]) -> str:
    """Return the faults of an event as text."""
    prefix = "" if entry.array_index is None else f"events[{entry.array_index}]."
    return "; ".join(f"{prefix}{fault.field}: {fault.message.removeprefix(fault.field + ' ')}" for fault in faults)


class _Rejects:
    """The file of --skip-invalid: bad entries, each as a line of JSON with its location and its faults."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.number = 0

    def write(self, entry: Entry, faults: list[Fault]) -> None:
        location = {entry.unit: entry.number}
        if entry.array_index is not None:
            location["index"] = entry.array_index
        errors = [{"field": fault.field, "code": fault.code, "message": fault.message} for fault in faults]
        reject = {**location, "errors": errors, "event": shown_content(entry.content)}
        self._file.write(ENCODER.encode(reject) + b"\n")
        self.number += 1

    def flush(self) -> None:
        self._file.flush()


class _Importer:
    """Checks entries like events that came over HTTP, and stores the good ones in groups."""

    def __init__(self, database: _Database | None, rejects: _Rejects | None) -> None:
        """Without a database nothing is stored. Without `rejects` the first bad entry raises InputError."""
        self._database = database
        self._rejects = rejects
        self._make_id = IdMaker()
        self._rows: list[Row] = []
        self._bytes = 0
        self._now = now_us()
        self.stored = self.new = 0
        self.ignored: set[str] = set()  # unknown fields

    def add(self, entry: Entry) -> bool:
        """Take an entry; return True if it completed a group, which is now stored. Raises InputError, StopError."""
        faults = Faults(entry.array_index or 0, "event")
        try:
            row = entry_row(entry, self._now, self._make_id, faults)
        except ApiError as error:
            if self._rejects is None:
                raise InputError(entry.location, _problem(entry, _faults(error))) from error
            self._rejects.write(entry, _faults(error))
            return False
        finally:
            if faults.ignored and len(self.ignored) < _MAX_IGNORED:
                self.ignored |= faults.ignored
        self._rows.append(row)
        self._bytes += len(row.properties)
        if len(self._rows) < _GROUP_EVENTS and self._bytes < _GROUP_BYTES:
            return False
        self.commit()
        return True

    def commit(self) -> None:
        """Store the events taken since the last commit. Raises StopError."""
        try:
            new = self._database.store(self._rows) if self._database and self._rows else 0
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
        """Describe the events before the one that stopped the import, for its message."""
        if self._database is None:
            return f"good before it: {plural(self.stored, 'event')}; nothing was stored"
        return f"stored before it: {plural(self.stored, 'event')}, {self.new:,} of them new"


# ---------------------------------------------------------------------------------------------- the command


def _import_events(arguments: argparse.Namespace) -> int:
    """Store the events of a file. Raises StartError, StopError."""
    started_s = time.monotonic()
    with ExitStack() as stack:
        file = _open_input(arguments.file, stack)
        is_new = _check_database(arguments.db)
        rejects = _Rejects(_open_rejects(arguments, stack)) if arguments.skip_invalid else None
        database = None
        if not arguments.dry_run:
            database = stack.enter_context(closing(_Database(arguments.db, arguments.environment)))
        importer = _Importer(database, rejects)
        try:
            _import_file(file, arguments, importer)
            if database:
                database.open()  # creates the database even for a file without events
        except InputError as error:
            importer.commit()
            name = "standard input" if arguments.file == "-" else arguments.file
            problem = f"{name}{error.location}: {error}; {importer.so_far}"
            raise StopError(f"{problem}; correct it and import the file again") from error
        except KeyboardInterrupt:
            done = f"at least {plural(importer.stored, 'event')} stored"
            raise StopError(f"interrupted; {done}; import the file again: nothing is stored twice") from None
    _say_imported(arguments, importer, rejects, is_new, started_s)
    return 0


def _open_input(path: str, stack: ExitStack) -> io.BufferedReader:
    if path == "-":
        return cast(io.BufferedReader, sys.stdin.buffer)
    try:
        return stack.enter_context(io.BufferedReader(io.FileIO(path), _BUFFER_BYTES))
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error


def _check_database(path: str) -> bool:
    """Check the database file, and return whether it is still to be created. Raises StartError."""
    if path == ":memory:":
        raise StartError("--db :memory: would be gone after the import: name a file")
    is_new = not os.path.exists(path)
    if not is_new or not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        prepare_file(path)
    return is_new


def _open_rejects(arguments: argparse.Namespace, stack: ExitStack) -> BinaryIO:
    path = arguments.skip_invalid
    for name in (arguments.file, arguments.db):
        with suppress(OSError):  # a name that does not exist yet
            if os.path.samefile(path, name):
                raise StartError(f"--skip-invalid {path} would overwrite {name}: name another file")
    try:
        return stack.enter_context(open(path, "wb"))
    except OSError as error:
        raise StartError(f"cannot write --skip-invalid {path}: {error.strerror}") from error


def _import_file(file: io.BufferedReader, arguments: argparse.Namespace, importer: _Importer) -> None:
    """Store the events of an open file, moving a bar by bytes, or by events if the file's size is unknown."""
    size = os.fstat(file.fileno()).st_size if file.seekable() else None
    done = 0
    with progress_bar(lambda: size, "event" if size is None else "B") as advance:

        def advance_to(position: int) -> None:
            nonlocal done
            if position > done:  # Parquet is not read from start to end
                advance(position - done)
                done = position

        for entry in _read_entries(file, arguments):
            if importer.add(entry):
                advance_to(importer.stored if size is None else file.tell())
        importer.commit()
        advance_to(importer.stored if size is None else size)


def _say_imported(
    arguments: argparse.Namespace, importer: _Importer, rejects: _Rejects | None, is_new: bool, started_s: float
) -> None:
    rejected = f", {rejects.number:,} rejected and written to {arguments.skip_invalid}" if rejects else ""
    ignored = f"; ignored unknown fields: {', '.join(map(quoted, sorted(importer.ignored)))}"[:500]
    taken_s = f"{time.monotonic() - started_s:.1f} s{ignored if importer.ignored else ''}"
    events = plural(importer.stored, "event")
    if arguments.dry_run:
        say(f"would import {events} into {arguments.db}{rejected}; nothing was stored; {taken_s}")
    else:
        known = f"{importer.new:,} new, {importer.stored - importer.new:,} already stored{rejected}"
        made = " (created)" if is_new else ""
        say(f"imported {events} into {arguments.db}{made}: {known}; {taken_s}")


# ---------------------------------------------------------------------------------------------- flags


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `import`."""
    add_db_flag(add, "database file, created if absent")
    add("file", metavar="FILE", help="events as NDJSON, JSON or CSV, each of which may be gzipped, or as Parquet; "
        "- is standard input")  # fmt: skip
    add("--environment", default="development", help="environment to store them in")
    add("--format", choices=["auto", *_READERS], default="auto", help="format of FILE; auto looks at its content")
    add("--skip-invalid", metavar="REJECTS", help="continue after a bad event, and write it to this file with reasons")
    add("--max-body-bytes", type=positive(int), default=Settings().max_body_bytes, help="longest event, in bytes")
    add("--assume-utc", action="store_true", help="read Parquet's times that have no zone as UTC")
    add("--dry-run", action="store_true", help="check the file and say what would be imported, but store nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run `eventstore import` and return its exit status. Raises StartError."""
    return run_job(_import_events, arguments)
