"""Deletes old events: `serve --retain-days N`, and the command `eventstore prune`.

No event is deleted before every target that it is forwarded to has accepted it.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from typing import NamedTuple, Protocol

from eventstore import (
    DAY_US,
    MIN_TIME_US,
    WRITER_PRAGMAS,
    AddFlag,
    ApiError,
    FieldError,
    Service,
    Sql,
    StartError,
    T,
    add_db_flag,
    all_of,
    connect,
    execute_writing,
    log,
    now_us,
    parse_time,
    plural,
    prepare_file,
    say,
    sql,
    to_datetime,
)
from eventstore_extras.forward import ForwardProgress, forward_progress_path, read_all_forward_progress
from eventstore_extras.job import StopError, run_job, until_sigterm

__all__ = [
    "CLOCK_INTERVAL_S",
    "HOUR_US",
    "MAX_ROWS",
    "MIN_ROWS",
    "SPAN",
    "DatabaseFile",
    "Expired",
    "Sweep",
    "add_flags",
    "attach",
    "checkpoint",
    "run",
]

# ---------------------------------------------------------------------------------------------- deleting

SPAN = 100_000  # seqs that one query scans
_FIRST_ROWS, MIN_ROWS, MAX_ROWS = 50, 10, 1000  # to delete in one transaction
_TARGET_S = 0.005  # for one transaction: requests that store events wait for it and its commit
_PAUSE_FACTOR = 2  # the pause after a transaction is this many times as long as the transaction
_FIND_EXPIRED = "SELECT count(*), max(seq) FROM (SELECT seq FROM events NOT INDEXED WHERE {} ORDER BY seq LIMIT :rows)"


class Database(Protocol):
    """What a sweep needs: the Store of a server, or a DatabaseFile."""

    async def read(self, operation: Callable[[sqlite3.Connection], T], quick: bool = True) -> T: ...

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...


class Expired(NamedTuple):
    """The events that may be deleted: stored before a time, and accepted by every target they are forwarded to."""

    before_us: int
    forwarded: Sequence[ForwardProgress]
    after: int = 0  # only events with a greater seq
    through: int = 2**63 - 1  # and not a greater one than this

    def _where(self) -> Sql:
        expired = "seq > :after AND seq <= :through AND ingested_at_us < :before_us"
        clauses = [sql(expired, after=self.after, through=self.through, before_us=self.before_us)]
        for number, progress in enumerate(self.forwarded):
            other = f"environment IS NOT (SELECT id FROM environments WHERE name = :environment{number})"
            values = {f"environment{number}": progress.environment, f"seq{number}": progress.seq}
            clauses.append(Sql(f"({other} OR seq <= :seq{number})", values))
        return all_of(clauses)

    def find(self, conn: sqlite3.Connection, rows: int) -> tuple[int, int]:
        """Count the events, up to a number of rows, and return the count and the seq of the last one counted."""
        where = self._where()
        count, last = conn.execute(*sql(_FIND_EXPIRED.format(where), where, rows=rows)).fetchone()
        return count, last or 0

    def count(self, conn: sqlite3.Connection) -> int:
        return self.find(conn, rows=-1)[0]  # -1: without a limit

    def delete(self, conn: sqlite3.Connection) -> float:
        """Delete the events. Returns the seconds it took, without the wait for a lock or for the disk."""
        started_s = time.perf_counter()
        where = self._where()
        conn.execute(*sql(f"DELETE FROM events NOT INDEXED WHERE {where}", where))
        return time.perf_counter() - started_s


def checkpoint(path: str) -> None:
    """Copy the WAL into the database and restart it, unless another connection is in the way.

    An ingest request waits at most 0.03 s for this. Without it the writer does the same at 64 MB, which takes 0.14 s.
    """
    with closing(connect(path, ["PRAGMA busy_timeout = 0"])) as conn:
        conn.execute("PRAGMA wal_checkpoint(PASSIVE)")  # most of the work, without the lock that writers need
        conn.execute("PRAGMA wal_checkpoint(RESTART)")


class Sweep:
    """Deletes expired events in order of arrival, in transactions so short that ingest requests are not delayed."""

    def __init__(self, path: str, database: Database, expired: Expired) -> None:
        self._path = path
        self._database = database
        self._expired = expired
        self.deleted = 0

    async def run(self, thorough: bool) -> None:
        """Delete the expired events. Stop at the first span without any, unless the sweep is thorough.

        Few expired events come after such a span: only imported events can be older than events that arrived before.
        """
        read = partial(self._database.read, quick=False)
        after, newest = await read(_seq_range)
        rows = _FIRST_ROWS
        while after < newest:
            span = self._expired._replace(after=after, through=min(after + SPAN, newest))
            count, last = await read(partial(span.find, rows=rows))
            if count:
                taken_s = await self._database.write(span._replace(through=last).delete)
                self.deleted += count
                rows = round(max(MIN_ROWS, min(MAX_ROWS, 2 * rows, rows * _TARGET_S / taken_s)))
                after = last
                await asyncio.to_thread(checkpoint, self._path)
                await asyncio.sleep(_PAUSE_FACTOR * taken_s)
            elif thorough:
                after = span.through
            else:
                return


def _seq_range(conn: sqlite3.Connection) -> tuple[int, int]:
    """Return the seq before the first event, and that of the last one; (0, 0) for an empty table."""
    first, last = conn.execute("SELECT (SELECT min(seq) FROM events), (SELECT max(seq) FROM events)").fetchone()
    return (first - 1, last) if last else (0, 0)


def _removal_advice(db: str, progress: ForwardProgress) -> str:
    """Say how to end the protection of events for a target that no longer receives any."""
    path = forward_progress_path(db, progress.target, progress.environment)
    return f"if nothing is forwarded there any more, remove {path}"


# ---------------------------------------------------------------------------------------------- retention

HOUR_US = 3600 * 1_000_000
CLOCK_INTERVAL_S = 1.0  # between two reads of the clock, which may be changed meanwhile


class _Retention:
    """Deletes events that were stored more than this many days ago, at the start and every hour."""

    def __init__(self, service: Service, days: float) -> None:
        self._store = service.store
        self._clock = service.settings.clock
        self._kept_us = int(days * DAY_US)

    async def _sweep(self, now: int, thorough: bool) -> None:
        before_us = max(now - self._kept_us, MIN_TIME_US)
        try:
            expired = Expired(before_us, read_all_forward_progress(self._store.path))
            sweep = Sweep(self._store.path, self._store, expired)
            await sweep.run(thorough)
        except (ApiError, StartError) as error:
            log.error("retention: %s; the next try is in an hour", error)
        except Exception:
            log.exception("retention failed; the next try is in an hour")
        else:
            if sweep.deleted:
                before = to_datetime(before_us).isoformat().replace("+00:00", "Z")
                log.info("retention: deleted %s, stored before %s", plural(sweep.deleted, "event"), before)

    async def run(self) -> None:
        """Run until cancelled."""
        swept_us: int | None = None
        while True:
            now = self._clock()
            if swept_us is None or abs(now - swept_us) >= HOUR_US:  # abs: the clock may be set back
                await self._sweep(now, thorough=swept_us is None)
                swept_us = now
            await asyncio.sleep(CLOCK_INTERVAL_S)


def attach(service: Service, arguments: argparse.Namespace, _: object) -> None:
    """Set up `serve --retain-days N`. Raises StartError."""
    for progress in read_all_forward_progress(service.store.path):
        outbox = service.outboxes.get(progress.environment)
        if outbox is None or outbox.host != urllib.parse.urlsplit(progress.target).netloc:
            advice = _removal_advice(service.store.path, progress)
            log.warning("retention: this server does not forward to %s, and keeps the events not accepted there; %s",
                        progress.target, advice)  # fmt: skip
    days = arguments.retain_days
    service.tasks.append(_Retention(service, days).run)
    unit = "day" if days == 1 else "days"
    service.notices.append(f"keeps        events for {days:,.15g} {unit} after they were stored")


# ---------------------------------------------------------------------------------------------- prune

_LOCK_TIMEOUT_S = 60.0


class DatabaseFile:
    """A database without its server, which may be running in another process."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn

    async def read(self, operation: Callable[[sqlite3.Connection], T], quick: bool = True) -> T:
        return operation(self._conn)

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        execute_writing(self._conn, _LOCK_TIMEOUT_S, "BEGIN IMMEDIATE")
        result = operation(self._conn)
        self._conn.execute("COMMIT")
        return result


def _delete(conn: sqlite3.Connection, db: str, expired: Expired) -> int:
    """Delete the expired events and return their number. Raises StopError if interrupted."""
    sweep = Sweep(db, DatabaseFile(conn), expired)
    try:
        asyncio.run(until_sigterm(sweep.run(thorough=True)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        deleted = f"{plural(sweep.deleted, 'event')} deleted"
        raise StopError(f"interrupted; {deleted}; the same command continues from there") from None
    return sweep.deleted


def _before_us(text: str) -> int:
    try:
        before_us = parse_time(text)
    except FieldError as error:
        raise StartError(f"--before {error}") from None
    if before_us > now_us():
        raise StartError(f"--before {text} is in the future: it would delete events that are still to come")
    return before_us


def _kept_note(events: int, db: str, forwarded: Sequence[ForwardProgress]) -> str:
    """Say why some events before the time were kept."""
    if events <= 0:
        return ""
    targets = ", ".join(f"{progress.target} ({_removal_advice(db, progress)})" for progress in forwarded)
    return f"; {plural(events, 'event')} of that time stay until accepted by {targets}"


def _prune_events(arguments: argparse.Namespace) -> int:
    """Run the command and return 0. Raises StartError, or StopError if it stops before the end."""
    started_s = time.monotonic()
    db, before_us = arguments.db, _before_us(arguments.before)
    if not os.path.exists(db):
        raise StartError(f"there is no database {db}: name one with --db")
    prepare_file(db)
    with closing(connect(db, WRITER_PRAGMAS)) as conn:
        expired = Expired(before_us, read_all_forward_progress(db))
        # Counted first, because afterwards the deleted events are gone.
        old = expired._replace(forwarded=()).count(conn) if expired.forwarded else 0
        number = expired.count(conn) if arguments.dry_run else _delete(conn, db, expired)
    verb = "would delete" if arguments.dry_run else "deleted"
    deleted = f"{verb} {plural(number, 'event')} stored before {arguments.before} from {db}"
    kept = _kept_note(old - number, db, expired.forwarded)
    say(f"{deleted}; {time.monotonic() - started_s:.1f} s{kept}")
    return 0


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `prune`."""
    add_db_flag(add, "database file; a server may be running on it")
    add("--before", metavar="TIME", required=True, help="RFC 3339; events stored before it are deleted")
    add("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run `eventstore prune` and return its exit status. Raises StartError."""
    return run_job(_prune_events, arguments)
