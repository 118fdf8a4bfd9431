"""Read stored events in pages: what `export`, `replay` and forwarding share, with the flags that choose events."""

from __future__ import annotations

import argparse
import asyncio
import math
import os
import sqlite3
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, closing, suppress
from pathlib import Path

from msgspec.structs import replace

from eventstore import (
    EARLIEST,
    EVENT_FILTERS,
    LATEST,
    READER_PRAGMAS,
    AddFlag,
    ApiError,
    Cursor,
    EventQuery,
    EventQueryIn,
    Faults,
    Reader,
    Row,
    Sql,
    StartError,
    T,
    View,
    add_db_flag,
    add_functions,
    after_cursor,
    all_of,
    check_format,
    check_path,
    event_query,
    given_time,
    index_of,
    matching,
    parse_property_filters,
    quoted,
    real_path,
    sql,
    start_errors,
)

__all__ = [
    "OwnReader", "StoredRow", "add_filter_flags", "environment_names", "flag_query", "no_events_hint",
    "open_stored", "select_rows", "stored_events",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- pages

_PAGE_EVENTS = 1000
_PAGE_BYTES = 16 * 1024 * 1024  # a page ends beyond this: a thousand events of 32 MiB would not fit into memory
_SELECT = f"SELECT {', '.join(Row._fields)}, seq FROM events"
StoredRow = tuple[int, Row]  # with its seq, the order of arrival


def select_rows(conn: sqlite3.Connection, clauses: Sql) -> list[StoredRow]:
    """Return the first thousand rows, or fewer if they are large."""
    page: list[StoredRow] = []
    size_bytes = 0
    with closing(conn.execute(f"{_SELECT} {clauses} LIMIT {_PAGE_EVENTS}", clauses.values)) as found:
        for *columns, seq in found:
            row = Row(*columns)
            page.append((seq, row))
            size_bytes += len(row.properties)
            if size_bytes >= _PAGE_BYTES:
                break
    return page


def stored_events(conn: sqlite3.Connection, query: EventQuery) -> Iterator[list[StoredRow]]:
    """Yield the events that match, oldest first, in pages.

    No statement stays open between pages: it would keep a server's write-ahead log from being checkpointed.
    """
    while True:
        where = all_of([matching(query), after_cursor(query, "", descending=False)])
        page = select_rows(conn, sql(f"{index_of(query.filters)} WHERE {where} ORDER BY timestamp_us, id", where))
        if not page:
            return
        yield page
        query = replace(query, after=Cursor(page[-1][1].timestamp_us, page[-1][1].id))


def _shutting_down() -> ApiError:
    return ApiError("service_unavailable", "the server is shutting down; try again", retry_after_s=1)


class OwnReader:
    """A connection and a thread that no other reader uses, so that reading never waits behind queries."""

    def __init__(self, path: str, name: str) -> None:
        self._path = path
        self._thread = ThreadPoolExecutor(1, f"eventstore-{name}")
        self._reader: Reader | None = None  # opened by the first read

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        """Run a reading operation. Raises sqlite3.Error, and ApiError once the reader is closed."""
        try:
            answer = asyncio.get_running_loop().run_in_executor(self._thread, self._read, operation)
        except RuntimeError:  # the thread has ended
            raise _shutting_down() from None
        return await answer

    def _read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        if self._reader is None:
            self._reader = Reader(self._path)
        try:
            return self._reader.run(operation, math.inf)
        except TimeoutError:
            raise _shutting_down() from None

    def close(self) -> None:
        """End the running operation and close the connection."""
        if self._reader:
            self._reader.is_closing = True
        self._thread.shutdown(cancel_futures=True)
        if self._reader:
            self._reader.conn.close()


_MAX_NAMED = 20  # environments that a message names


def _connect_uri(path: str, mode: str) -> sqlite3.Connection:
    uri = f"{Path(path).as_uri()}?mode={mode}"
    conn = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
    try:
        conn.execute("SELECT 1 FROM sqlite_schema").fetchone()  # connecting alone reads nothing
    except sqlite3.Error:
        conn.close()
        raise
    return conn


def _connect_for_reading(path: str) -> sqlite3.Connection:
    """Connect to a database. Raises StartError if its log is needed and cannot be read."""
    logs = [name for name in (f"{path}-wal", f"{path}-journal") if os.path.exists(name)]
    if os.access(path, os.W_OK) and os.access(os.path.dirname(path), os.W_OK):
        return _connect_uri(path, "rw")
    if logs:
        with suppress(sqlite3.OperationalError):  # without write access, SQLite reads a log only if it has a -shm
            return _connect_uri(path, "ro")
        if os.path.exists(f"{path}-shm") or any(map(os.path.getsize, logs)):
            problem = f"{logs[0]} belongs to it, and cannot be read where nothing can be written"
            raise StartError(f"cannot read {path}: {problem}; copy both to a folder that you can write to")
    return _connect_uri(path, "ro&immutable=1")  # otherwise SQLite would create a -shm


def _check_environment(conn: sqlite3.Connection, path: str, name: str) -> None:
    """Raise StartError, listing the known names, unless the database has the environment."""
    if name not in (names := environment_names(conn)):
        known = ", ".join(map(quoted, names[:_MAX_NAMED])) + ", ..." * (len(names) > _MAX_NAMED)
        has = f"has only {known}" if known else "has no environment yet"
        raise StartError(f"--environment is {quoted(name)}, but the database {path} {has}")


def open_stored(path: str, environment: str | None = None) -> sqlite3.Connection:
    """Open an existing database for reading, even on a read-only disk.

    Raises StartError, also if an environment is given that the database does not have.
    """
    if not os.path.exists(path):
        raise StartError(f"there is no database {path}: name one with --db")
    if not os.access(path, os.R_OK):
        raise StartError(f"cannot read the database {path}: allow it, or name another file with --db")
    check_path(path)
    with start_errors(path), ExitStack() as stack:
        conn = stack.enter_context(closing(_connect_for_reading(real_path(path))))
        if check_format(conn, path) is None:
            raise StartError(f"the database {path} is empty: name another one with --db")
        for pragma in READER_PRAGMAS:
            conn.execute(pragma)
        add_functions(conn)
        if environment is not None:
            _check_environment(conn, path, environment)
        stack.pop_all()
        return conn


def environment_names(conn: sqlite3.Connection) -> list[str]:
    """Return the names of the environments, oldest first."""
    return [name for (name,) in conn.execute("SELECT name FROM environments ORDER BY id")]


def no_events_hint(conn: sqlite3.Connection, environment: str) -> str:
    """Return the end of a summary without events: the names of other environments that have some."""
    has_events = "EXISTS (SELECT 1 FROM events WHERE environment = environments.id)"
    names = conn.execute(f"SELECT name FROM environments WHERE {has_events} ORDER BY name")
    others = ", ".join(name for (name,) in names if name != environment)
    return f"; --environment is {environment}, the database also has events of {others}" if others else ""


# ---------------------------------------------------------------------------------------------- flags


def add_filter_flags(add: AddFlag) -> None:
    """Add the flags that name a database and choose events from it."""
    add_db_flag(add, "database file")
    add("--environment", default="development", help="environment of the events")
    for name in EVENT_FILTERS:
        is_time = name in ("start_time", "end_time")
        text = "RFC 3339, inclusive; all time if absent" if is_time else "as in GET /v1/events"
        metavar = "KEY:V1,V2;KEY2:V3" if name == "property_filters" else "TIME" if is_time else "TEXT"
        add(f"--{name.replace('_', '-')}", metavar=metavar, help=text)


def flag_query(arguments: argparse.Namespace) -> EventQuery:
    """Return the query of the filter flags. Raises StartError naming the flags that are wrong."""
    faults = Faults()
    flags = {name: getattr(arguments, name) for name in EVENT_FILTERS}
    flags["property_filters"] = faults.check("property_filters", parse_property_filters, flags["property_filters"])
    sent = EventQueryIn(**flags, count_total=True, page_size=1)
    sent.start_time, sent.end_time = given_time(sent.start_time) or EARLIEST, given_time(sent.end_time) or LATEST
    try:
        return event_query(sent, View(arguments.environment, 0), faults)
    except ApiError as error:
        problems = error.details.errors or []
        messages = [f"--{fault.field.replace('_', '-')}{fault.message.removeprefix(fault.field)}" for fault in problems]
        text = "; ".join(messages).replace("before start_time", "before --start-time")
        raise StartError(text) from error
