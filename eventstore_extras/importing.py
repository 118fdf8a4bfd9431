"""The command `eventstore import`: read events from NDJSON, JSON, CSV or Parquet, check them, and store them."""

from __future__ import annotations

import argparse
import gzip
import io
import os
import select
import signal
import sqlite3
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from typing import Any, BinaryIO, cast

from eventstore import (
    ENCODER,
    INSERT_ROWS,
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
    check_name,
    check_path,
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
from eventstore_extras.entries import NO_EVENTS, CheckedRow, Entry, InputError, checked_row, shown_content
from eventstore_extras.files import Stream, as_utf8, explain_missing_parquet, private_opener, progress_bar, unpacked
from eventstore_extras.job import StopError, run_job
from eventstore_extras.stored import environment_names, open_stored
from eventstore_extras.text_formats import check_format, check_known, detect_format, read_csv, read_json, read_ndjson

__all__ = ["add_flags", "run"]

_BUFFER_BYTES = 1024 * 1024

# ---------------------------------------------------------------------------------------------- formats


def _read_parquet(file: Stream, arguments: argparse.Namespace) -> Iterator[Entry]:
    with explain_missing_parquet():
        from eventstore_extras import parquet  # noqa: PLC0415 - only the extra `parquet` has its library
    return parquet.read_rows(cast(BinaryIO, file), arguments.max_body_bytes, arguments.assume_utc)


_READERS: dict[str, Callable[[Stream, argparse.Namespace], Iterator[Entry]]] = {
    "ndjson": lambda stream, arguments: read_ndjson(stream, arguments.max_body_bytes),
    "json": lambda stream, arguments: read_json(stream, arguments.max_body_bytes),
    "csv": lambda stream, arguments: read_csv(stream, arguments.max_body_bytes),
    "parquet": _read_parquet,
}


def _read_entries(
    file: io.BufferedReader, arguments: argparse.Namespace, before_read: Callable[[], object]
) -> Iterator[Entry]:
    """Yield the events of a file of any format, gzipped or not; call before_read() between pieces of a gzipped file.

    Yields the entries before a damaged part, then raises InputError.
    """
    try:
        packed = unpacked(file, before_read)
        check_known(packed.peek(1))
        is_text = "parquet" not in (arguments.format, detect_format(packed.peek(1)))
        stream = as_utf8(packed) if is_text else packed
        form = arguments.format
        if form == "auto":
            form = detect_format(stream.peek(1))
        else:
            check_format(form, stream.peek(1), may_start_badly=form == "ndjson" and bool(arguments.skip_invalid))
        if form == "parquet" and (packed is not file or not file.seekable()):
            raise InputError(None, "Parquet is read from its end: name a file that is not gzipped, not a pipe")
        if arguments.assume_utc and form != "parquet":
            raise InputError(None, f"--assume-utc is for Parquet, this is {form}: write its times with a zone")
        yield from _READERS[form](stream, arguments)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise InputError(None, f"the gzip data is damaged or cut off: {error}") from error
    except UnicodeDecodeError as error:
        raise InputError(None, f"is not valid {error.encoding.upper()}: {error.reason}") from error
    except OSError as error:
        raise InputError(None, f"cannot be read further: {error.strerror or error}") from error


# ---------------------------------------------------------------------------------------------- storing

_LOCK_TIMEOUT_S = 60.0
_GROUP_EVENTS = 4000  # events in a transaction, during which a server on the same database cannot write
_GROUP_BYTES = 16 * 1024 * 1024  # bytes of properties held in memory before a transaction stores them
_INPUT_WAIT_S = 1.0  # events of a pipe are stored when they have waited this long for more
_MAX_IGNORED = 100  # names of unknown fields kept for the summary
_MAX_NAMED = 5  # events or environments that the summary names
_DEFAULT_ENVIRONMENT = "development"


def _environment_note(names: list[str], environment: str, created: str) -> str:
    """Return a note for the summary if the environment is not among the names: the flag may have a typing error."""
    if environment in names:
        return ""
    others = ", ".join(map(quoted, names[:_MAX_NAMED])) + ", ..." * (len(names) > _MAX_NAMED)
    note = f"; the environment {quoted(environment)} is new and {created}"
    return f"{note}, the database also has {others}" if names else note


class _Database:
    """The database to import into.

    It is opened, and created if absent, when there are events to store: a file of bad events then leaves no database.
    """

    def __init__(self, path: str, environment: str) -> None:
        self.path = path
        self._environment = environment
        self._conn: sqlite3.Connection | None = None
        self._number = 0  # of the environment
        self.note = ""  # for the summary, if the environment is new

    def open(self) -> sqlite3.Connection:
        """Return the connection; open it on the first call. Raises StartError."""
        if self._conn is None:
            is_new = not os.path.exists(self.path)
            prepare_file(self.path)
            self._conn = connect(self.path, WRITER_PRAGMAS)
            if not (is_new and self._environment == _DEFAULT_ENVIRONMENT):
                self.note = _environment_note(environment_names(self._conn), self._environment, "was created")
            self._number = environment_number(self._conn, self._environment)
        return self._conn

    def store(self, rows: list[Row]) -> int:
        """Store rows in one transaction and return how many were new. Raises StartError, sqlite3.Error."""
        conn = self.open()
        rows = [Row(self._number, *row[1:]) for row in rows]  # before the lock is taken
        return insert_events(conn, rows, _LOCK_TIMEOUT_S)

    def differing(self, events: list[CheckedRow]) -> set[int]:
        """Return the positions of the events that are stored with other content. Raises sqlite3.Error."""
        positions: dict[str, list[int]] = {}
        for position, event in enumerate(events):
            positions.setdefault(event.row.id, []).append(position)
        ids, found = list(positions), set()
        for start in range(0, len(ids), INSERT_ROWS):
            chunk = ids[start : start + INSERT_ROWS]
            marks = ", ".join("?" * len(chunk))
            select = f"SELECT {', '.join(Row._fields)} FROM events WHERE environment = ? AND id IN ({marks})"
            for stored in map(Row._make, self.open().execute(select, (self._number, *chunk))):
                same_id = positions[stored.id]
                found |= {position for position in same_id if not events[position].is_stored_as(stored)}
        return found

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

    def __init__(self, path: str, file: io.FileIO) -> None:
        self.path = path
        self.number = 0
        self._file = file
        self._pending = bytearray()

    def add(self, entry: Entry, faults: list[Fault]) -> int:
        """Add an entry, which flush() writes, and return its size in bytes."""
        location = {entry.unit: entry.number}
        if entry.array_index is not None:
            location["index"] = entry.array_index
        errors = [{"field": fault.field, "code": fault.code, "message": fault.message} for fault in faults]
        line = ENCODER.encode({**location, "errors": errors, "event": shown_content(entry.content)}) + b"\n"
        self._pending += line
        self.number += 1
        return len(line)

    def flush(self) -> None:
        """Write the lines added since the last call. Raises OSError."""
        while self._pending:
            del self._pending[: self._file.write(self._pending)]


class _Importer:
    """Checks entries like events that came over HTTP, and stores the good ones in groups."""

    def __init__(self, database: _Database | None, rejects: _Rejects | None) -> None:
        """Without a database nothing is stored. Without `rejects` the first bad entry raises InputError."""
        self._database = database
        self._rejects = rejects
        self._make_id = IdMaker()
        self._events: list[CheckedRow] = []
        self._locations: list[str] = []  # of each event, for the summary
        self._bytes = 0
        self._since_s = 0.0  # when the first of these events was taken
        self._now = now_us()
        self.stored = self.new = 0
        self.without_id = 0
        self.ignored: set[str] = set()  # unknown fields
        self._differing = 0  # events whose id was stored with other content
        self._named: list[str] = []  # locations and ids of the first of these

    def add(self, entry: Entry) -> bool:
        """Take an entry; return True if it completed a group, which is now stored. Raises InputError, StopError."""
        faults = Faults(entry.array_index or 0, "event")
        if not self._bytes:
            self._since_s = time.monotonic()
        try:
            event = checked_row(entry, self._now, self._make_id, faults)
        except ApiError as error:
            if self._rejects is None:
                raise self._stopped_by(entry, _faults(error), sorted(faults.ignored)) from error
            self._bytes += self._rejects.add(entry, _faults(error))
        else:
            self._events.append(event)
            index = entry.array_index
            self._locations.append(f"{entry.unit} {entry.number}" if index is None else f"events[{index}]")
            self._bytes += len(event.row.properties)
        finally:
            if faults.ignored and len(self.ignored) < _MAX_IGNORED:
                self.ignored.update(faults.ignored)
        if len(self._events) < _GROUP_EVENTS and self._bytes < _GROUP_BYTES:
            return False
        self.commit()
        return True

    def _stopped_by(self, entry: Entry, faults: list[Fault], unknown: list[str]) -> InputError:
        """Return the error for a bad entry, with another advice if the first entries do not look like events."""
        problem, advice = _problem(entry, faults), None
        if unknown:
            problem += f"; it has the unknown fields {', '.join(map(quoted, unknown[:_MAX_NAMED]))}"
            is_event = len({fault.field for fault in faults} & {"event_name", "external_customer_id"}) < 2
            advice = None if is_event or self.stored or self._events else NO_EVENTS
        return InputError(entry.location, problem, advice)

    def wait(self, has_input: Callable[[float | None], bool]) -> None:
        """Wait for input, but store events that have waited for more input for a second. Raises StopError."""
        if self._bytes:
            left_s = self._since_s + _INPUT_WAIT_S - time.monotonic()
            if left_s <= 0 or not has_input(left_s):
                self.commit()
        has_input(None)

    def commit(self) -> None:
        """Store the events taken since the last commit, and write the rejects. Raises StopError."""
        new = self._store(self._database) if self._database and self._events else 0
        self.stored += len(self._events)
        self.without_id += sum(not event.has_id for event in self._events)
        self.new += new
        self._events, self._locations, self._bytes, self._now = [], [], 0, now_us()
        if self._rejects:
            self._flush(self._rejects)

    def _flush(self, rejects: _Rejects) -> None:
        try:
            rejects.flush()
        except OSError as error:
            reason = f"cannot write --skip-invalid {rejects.path}: {error.strerror}; {self.so_far}"
            advice = "free some disk space or name a file on another disk, and import the file again"
            raise StopError(f"{reason}; {advice}") from error

    def _store(self, database: _Database) -> int:
        """Store the events, and return how many were new. Note those that are stored with other content."""
        try:
            new = database.store([event.row for event in self._events])
            differing = sorted(database.differing(self._events)) if new < len(self._events) else []
        except sqlite3.Error as error:
            reason = f"the database {database.path} refused the write: {error}; {self.so_far}"
            raise StopError(f"{reason}; when it can be written again, import the file again") from error
        self._differing += len(differing)
        for position in differing[: _MAX_NAMED - len(self._named)]:
            self._named.append(f"{self._locations[position]} ({quoted(self._events[position].row.id)})")
        return new

    @property
    def so_far(self) -> str:
        """Describe the events before the one that stopped the import, for its message."""
        if self._database is None:
            return f"good before it: {plural(self.stored, 'event')}; nothing was stored"
        return f"stored before it: {plural(self.stored, 'event')}, {self.new:,} of them new{self.notes}"

    @property
    def notes(self) -> str:
        """Return what the user should know about the stored events, for a message."""
        notes = self._database.note if self._database else ""
        if self._differing:
            more = ", ..." if self._differing > len(self._named) else ""
            have = "has" if self._differing == 1 else "have"
            problem = f"{plural(self._differing, 'event')} {have} the event_id of an event with other content"
            notes += f"; {problem} and cannot be stored under it: {', '.join(self._named)}{more}"
        return notes


# ---------------------------------------------------------------------------------------------- the command


class _Signals:
    """Turns the signals that end a process into KeyboardInterrupt.

    It is raised only between events or before a read, so that the events already read are stored first.
    """

    def __init__(self) -> None:
        self._is_waiting = False
        self.is_stopping = False

    @contextmanager
    def handled(self) -> Iterator[None]:
        numbers = {signal.SIGINT, signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGINT)}
        before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            if before[number] != signal.SIG_IGN:  # nohup ignores SIGHUP
                signal.signal(number, self._handle)
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler or signal.SIG_DFL)

    def _handle(self, *_: object) -> None:
        self.is_stopping = True
        if self._is_waiting:
            raise KeyboardInterrupt

    def check(self) -> None:
        """Raise KeyboardInterrupt if there was a signal."""
        if self.is_stopping:
            raise KeyboardInterrupt

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let signals raise KeyboardInterrupt at once in the block, which must read nothing."""
        self._is_waiting = True
        try:
            self.check()
            yield
        finally:
            self._is_waiting = False

    def wait(self, pipe: io.FileIO, timeout_s: float | None) -> bool:
        """Wait until the pipe has more to read, or has ended; return False if the time ends first."""
        with self.waiting():
            return bool(select.select([pipe], [], [], timeout_s)[0])


class _Input(io.FileIO):
    """The file to import, which calls a function before it reads."""

    before_read: Callable[[], None]

    def readinto(self, buffer: Any) -> int | None:
        self.before_read()
        return super().readinto(buffer)


def _open_input(path: str) -> _Input:
    try:
        if path != "-":
            return _Input(path)
        if sys.stdin is None:
            raise StartError("standard input is closed: name a file, or send events to it")
        return _Input(sys.stdin.fileno(), closefd=False)
    except OSError as error:
        raise StartError(f"cannot read {path}: {error.strerror}") from error


def _check_database(path: str, reads_only: bool) -> bool:
    """Check the database file, and return whether it is still to be created. Raises StartError."""
    if path == ":memory:":
        raise StartError("--db :memory: would be gone after the import: name a file")
    check_path(path)
    is_new = not os.path.exists(path)
    if not is_new and reads_only:
        open_stored(path).close()
    elif not is_new:
        prepare_file(path)
    return is_new


def _open_rejects(arguments: argparse.Namespace, stack: ExitStack) -> _Rejects:
    path = arguments.skip_invalid
    for name in (arguments.file, arguments.db):
        with suppress(OSError):  # a name that does not exist yet
            if os.path.samefile(path, name):
                raise StartError(f"--skip-invalid {path} would overwrite {name}: name another file")
    try:
        return _Rejects(path, stack.enter_context(io.FileIO(path, "wb", opener=private_opener)))
    except OSError as error:
        raise StartError(f"cannot write --skip-invalid {path}: {error.strerror}") from error


def _import_file(
    file: io.BufferedReader, arguments: argparse.Namespace, importer: _Importer, signals: _Signals
) -> None:
    """Store the events of an open file, moving a bar by bytes, or by events if the file's size is unknown."""
    size = os.fstat(file.fileno()).st_size if file.seekable() else None
    done = 0
    with progress_bar(lambda: size, "event" if size is None else "B") as advance:

        def advance_to(position: int) -> None:
            nonlocal done
            if position > done:  # Parquet is not read from start to end
                advance(position - done)
                done = position

        def before_read() -> None:
            if size is not None:  # a pipe's events cannot be read again: they are stored before a signal takes effect
                signals.check()
                advance_to(file.tell())

        for entry in _read_entries(file, arguments, before_read):
            if importer.add(entry):
                advance_to(importer.stored if size is None else file.tell())
            if size is not None:
                signals.check()
        importer.commit()
        advance_to(importer.stored if size is None else size)


def _without_id_note(number: int) -> str:
    if not number:
        return ""
    its = "its" if number == 1 else "their"
    consequence = "an equal event at the same place of another file would count as already stored"
    return f"; {plural(number, 'event')} had no event_id and got one made from {its} content and line: {consequence}"


def _dry_run_note(arguments: argparse.Namespace, is_new: bool) -> str:
    if is_new:
        names = [_DEFAULT_ENVIRONMENT]
    else:
        with closing(open_stored(arguments.db)) as conn:
            names = environment_names(conn)
    return _environment_note(names, arguments.environment, "would be created")


def _say_imported(
    arguments: argparse.Namespace, importer: _Importer, rejects: _Rejects | None, is_new: bool, started_s: float
) -> None:
    rejected = f", {rejects.number:,} rejected and written to {arguments.skip_invalid}" if rejects else ""
    ignored = f"; ignored unknown fields: {', '.join(map(quoted, sorted(importer.ignored)))}"[:500]
    taken_s = f"{time.monotonic() - started_s:.1f} s{ignored if importer.ignored else ''}"
    events = plural(importer.stored, "event")
    is_empty = not importer.stored and not (rejects and rejects.number)
    notes = "; the input had no events" if is_empty else _without_id_note(importer.without_id)
    if arguments.dry_run:
        notes += _dry_run_note(arguments, is_new)
        say(f"would import {events} into {arguments.db}{rejected}; nothing was stored{notes}; {taken_s}")
    else:
        known = f"{importer.new:,} new, {importer.stored - importer.new:,} already stored{rejected}"
        made = " (created)" if is_new else ""
        say(f"imported {events} into {arguments.db}{made}: {known}{importer.notes}{notes}; {taken_s}")


def _import_events(arguments: argparse.Namespace) -> int:
    """Store the events of a file. Raises StartError, StopError."""
    started_s = time.monotonic()
    check_name(arguments.environment, "--environment")
    if not arguments.environment:
        raise StartError("--environment must not be empty: name an environment, or leave the flag out")
    with ExitStack() as stack:
        signals = _Signals()
        stack.enter_context(signals.handled())
        with signals.waiting():  # a named pipe opens only when another process opens it for writing
            raw = stack.enter_context(_open_input(arguments.file))
        is_new = _check_database(arguments.db, arguments.dry_run)
        rejects = _open_rejects(arguments, stack) if arguments.skip_invalid else None
        database = None
        if not arguments.dry_run:
            database = stack.enter_context(closing(_Database(arguments.db, arguments.environment)))
        importer = _Importer(database, rejects)
        if raw.seekable() or os.name == "nt":  # Windows cannot wait for pipes
            raw.before_read = signals.check
        else:
            raw.before_read = lambda: importer.wait(lambda timeout_s: signals.wait(raw, timeout_s))
        name = "standard input" if arguments.file == "-" else arguments.file
        try:
            _import_file(io.BufferedReader(raw, _BUFFER_BYTES), arguments, importer, signals)
            if database:
                database.open()  # creates the database even for a file without events
        except (InputError, KeyboardInterrupt) as error:  # Parquet's library turns an interrupted read into InputError
            importer.commit()
            if signals.is_stopping or not isinstance(error, InputError):
                again = f"to continue, import {name} again from its start: nothing is stored twice"
                raise StopError(f"interrupted; {importer.so_far}; {again}") from None
            outcome = f"{importer.so_far}; correct it and import the file again"
            if error.advice is not None:
                outcome = "; ".join(filter(None, ["nothing was stored", error.advice]))
            raise StopError(f"{name}{error.location}: {error}; {outcome}") from error
    _say_imported(arguments, importer, rejects, is_new, started_s)
    return 0


# ---------------------------------------------------------------------------------------------- flags


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `import`."""
    add_db_flag(add, "database file, created if absent")
    add("file", metavar="FILE", help="events as NDJSON, JSON or CSV, each of which may be gzipped, or as Parquet; "
        "- is standard input")  # fmt: skip
    add("--environment", default=_DEFAULT_ENVIRONMENT, help="environment to store them in")
    add("--format", choices=["auto", *_READERS], default="auto", help="format of FILE; auto looks at its content")
    add("--skip-invalid", metavar="REJECTS", help="continue after a bad event, and write it to this file with reasons")
    add("--max-body-bytes", type=positive(int), default=Settings().max_body_bytes, help="longest event, in bytes")
    add("--assume-utc", action="store_true", help="read Parquet's times that have no zone as UTC")
    add("--dry-run", action="store_true", help="check the file and say what would be imported, but store nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run `eventstore import` and return its exit status. Raises StartError."""
    return run_job(_import_events, arguments)
