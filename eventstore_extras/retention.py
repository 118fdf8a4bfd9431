"""Keeping less: `serve --retain-days N`, and `eventstore prune`."""

from __future__ import annotations

import argparse
import asyncio
import glob
import os
import sqlite3
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

from eventstore import (
    DAY_US,
    MIN_TIME_US,
    WRITER_PRAGMAS,
    AddFlag,
    ApiError,
    FieldError,
    Service,
    StartError,
    T,
    add_db_flag,
    connect,
    execute_writing,
    log,
    now_us,
    parse_time,
    plural,
    prepare_file,
    say,
    to_datetime,
)
from eventstore_extras.forward import ForwardProgress, newest_seq, progress_file, read_forward_progress
from eventstore_extras.job import StopError, run_job, until_sigterm

HOUR_US = 3600 * 1_000_000
LOOK_INTERVAL_S = 1.0  # between two looks at the clock
SPAN = 100_000  # rows that one query looks at
GOAL_S = 0.005  # for the rows of one transaction; whoever stores events waits for it, and for its commit
FIRST_ROWS, LEAST_ROWS, MOST_ROWS = 50, 10, 1000
PAUSE_TIMES = 2  # as long as the transaction took, before the next
PRUNE_LOCK_TIMEOUT_S = 60.0
SELECT_DOOMED = (
    "SELECT count(*), max(seq) FROM (SELECT seq FROM events NOT INDEXED WHERE {where} ORDER BY seq LIMIT :rows)"
)


class Database(Protocol):
    """A Store, or a file without a server."""

    async def read(self, operation: Callable[[sqlite3.Connection], T], quick: bool = True) -> T: ...

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...


class Doomed(NamedTuple):
    """Events that may be deleted: stored before a time, and accepted wherever they are forwarded to."""

    before_us: int
    forwarded: Sequence[ForwardProgress]
    after: int = 0  # of these seqs
    through: int = 2**63 - 1

    def where(self, parameters: dict[str, object]) -> str:
        parameters |= {"before_us": self.before_us, "after": self.after, "through": self.through}
        clauses = ["seq > :after", "seq <= :through", "ingested_at_us < :before_us"]
        for number, progress in enumerate(self.forwarded):
            parameters |= {f"environment{number}": progress.environment, f"seq{number}": progress.seq}
            other = f"environment IS NOT (SELECT id FROM environments WHERE name = :environment{number})"
            clauses.append(f"({other} OR seq <= :seq{number})")
        return " AND ".join(clauses)

    def first(self, conn: sqlite3.Connection, rows: int) -> tuple[int, int]:
        """How many of them there are, counting as far as that, and the last one's seq."""
        parameters: dict[str, object] = {"rows": rows}
        statement = SELECT_DOOMED.format(where=self.where(parameters))
        count, last = conn.execute(statement, parameters).fetchone()
        return count, last or 0

    def delete(self, conn: sqlite3.Connection) -> float:
        """All of them; how long it took, without waiting for a lock and for the disk."""
        started_s = time.perf_counter()
        parameters: dict[str, object] = {}
        conn.execute(f"DELETE FROM events NOT INDEXED WHERE {self.where(parameters)}", parameters)
        return time.perf_counter() - started_s


class Sweep:
    """Deletes events, oldest first, in transactions so short that nobody who stores events notices."""

    def __init__(self, path: str, database: Database, doomed: Doomed) -> None:
        self._path = path
        self._database = database
        self._doomed = doomed
        self.deleted = 0

    async def run(self, thorough: bool) -> None:
        """Through the whole file if thorough, else until 100,000 rows have nothing to delete: `ingested_at` rises with
        seq, but for events that were imported with an older one."""
        read = partial(self._database.read, quick=False)
        newest = await read(newest_seq)
        after = await read(lambda conn: int(conn.execute("SELECT coalesce(min(seq), 1) - 1 FROM events").fetchone()[0]))
        rows = FIRST_ROWS
        while after < newest:
            span = self._doomed._replace(after=after, through=min(after + SPAN, newest))
            count, last = await read(partial(span.first, rows=rows))
            if count:
                taken_s = await self._database.write(span._replace(through=last).delete)
                self.deleted += count
                rows = round(max(LEAST_ROWS, min(MOST_ROWS, 2 * rows, rows * GOAL_S / taken_s)))
                after = last
                await asyncio.to_thread(checkpoint, self._path)
                await asyncio.sleep(PAUSE_TIMES * taken_s)
            elif thorough:
                after = span.through
            else:
                return


def checkpoint(path: str) -> None:
    """Write the WAL into the file and begin it anew, unless somebody is in the way. Left to the writer, who does it for
    64 MB at a time, it holds up for 0.14 s whoever stores events; so it is 0.03 s."""
    with closing(connect(path, ["PRAGMA busy_timeout = 0"])) as conn:
        conn.execute("PRAGMA wal_checkpoint(PASSIVE)")  # most of it without the lock that writers need
        conn.execute("PRAGMA wal_checkpoint(RESTART)")


def forwarded_from(db: str) -> list[ForwardProgress]:
    """How far forwarding is, for each target that this database's events go to or went to. StartError."""
    return [read_forward_progress(Path(path)) for path in sorted(glob.glob(f"{glob.escape(db)}.forward-*.json"))]


def gone(db: str, progress: ForwardProgress) -> str:
    """What to do with a target that takes nothing any more, and keeps events so."""
    file = progress_file(db, "forward", [progress.target, progress.environment])
    return f"if nothing is forwarded there any more, remove {file}"


class Retention:
    """Deletes what is older than so many days, at the start and every hour."""

    def __init__(self, service: Service, days: float) -> None:
        self._store = service.store
        self._clock = service.settings.clock
        self._kept_us = int(days * DAY_US)

    async def run(self) -> None:
        """Until it is cancelled."""
        swept_us: int | None = None
        while True:
            now = self._clock()
            if swept_us is None or abs(now - swept_us) >= HOUR_US:  # or the clock was put back
                await self.sweep(now, thorough=swept_us is None)
                swept_us = now
            await asyncio.sleep(LOOK_INTERVAL_S)

    async def sweep(self, now: int, thorough: bool) -> None:
        before_us = max(now - self._kept_us, MIN_TIME_US)
        try:
            sweep = Sweep(self._store.path, self._store, Doomed(before_us, forwarded_from(self._store.path)))
            await sweep.run(thorough)
        except (ApiError, StartError) as error:
            log.error("retention: %s; the next try is in an hour", error)
        except Exception:
            log.exception("retention failed; the next try is in an hour")
        else:
            if sweep.deleted:
                before = to_datetime(before_us).isoformat().replace("+00:00", "Z")
                log.info("retention: deleted %s, stored before %s", plural(sweep.deleted, "event"), before)


def attach(service: Service, arguments: argparse.Namespace, _: object) -> None:
    """`serve --retain-days N`. StartError."""
    for progress in forwarded_from(service.store.path):
        outbox = service.outboxes.get(progress.environment)
        if outbox is None or outbox.host != urllib.parse.urlsplit(progress.target).netloc:
            log.warning("retention: this server does not forward to %s, and what is not accepted there is kept; %s",
                        progress.target, gone(service.store.path, progress))  # fmt: skip
    service.tasks.append(Retention(service, arguments.retain_days).run)
    days = arguments.retain_days
    unit = "day" if days == 1 else "days"
    service.notices.append(f"keeps        events for {days:,.15g} {unit} after they were stored")


# ---------------------------------------------------------------------------------------------- prune


class File:
    """A database file as `Sweep` uses it, beside a server or without one."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn

    async def read(self, operation: Callable[[sqlite3.Connection], T], quick: bool = True) -> T:
        return operation(self._conn)

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        execute_writing(self._conn, PRUNE_LOCK_TIMEOUT_S, "BEGIN IMMEDIATE")
        result = operation(self._conn)
        self._conn.execute("COMMIT")
        return result


def prune_events(arguments: argparse.Namespace) -> int:
    """`eventstore prune`: 0, or StopError."""
    started_s = time.monotonic()
    before_us = prune_time(arguments.before)
    if not os.path.exists(arguments.db):
        raise StartError(f"there is no database {arguments.db}: name one with --db")
    prepare_file(arguments.db)
    with closing(connect(arguments.db, WRITER_PRAGMAS)) as conn:
        doomed = Doomed(before_us, forwarded_from(arguments.db))
        kept = count_rows(conn, doomed._replace(forwarded=())) if doomed.forwarded or arguments.dry_run else 0
        if arguments.dry_run:
            deleted = count_rows(conn, doomed)
        else:
            sweep = Sweep(arguments.db, File(conn), doomed)
            try:
                asyncio.run(until_sigterm(sweep.run(thorough=True)))
            except (KeyboardInterrupt, asyncio.CancelledError):
                done = f"{plural(sweep.deleted, 'event')} deleted"
                raise StopError(f"interrupted; {done}; the same command goes on from there") from None
            deleted = sweep.deleted
    did = "would delete" if arguments.dry_run else "deleted"
    events = f"{did} {plural(deleted, 'event')} stored before {arguments.before} from {arguments.db}"
    say(f"{events}; {time.monotonic() - started_s:.1f} s{not_yet(kept - deleted, arguments.db, doomed.forwarded)}")
    return 0


def prune_time(text: str) -> int:
    try:
        before_us = parse_time(text)
    except FieldError as error:
        raise StartError(f"--before {error}") from None
    if before_us > now_us():
        raise StartError(f"--before {text} is in the future: what is still to come would be deleted, too")
    return before_us


def count_rows(conn: sqlite3.Connection, doomed: Doomed) -> int:
    return doomed.first(conn, -1)[0]  # no limit


def not_yet(events: int, db: str, forwarded: Sequence[ForwardProgress]) -> str:
    """Why not everything before the time is deleted."""
    if events <= 0:
        return ""
    targets = ", ".join(f"{progress.target} ({gone(db, progress)})" for progress in forwarded)
    return f"; {plural(events, 'event')} of that time stay until accepted by {targets}"


def add_flags(_: str, add: AddFlag) -> None:
    """The flags of `prune`."""
    add_db_flag(add, "database file; a server may be running on it")
    add("--before", metavar="TIME", required=True, help="RFC 3339; what was stored before it is deleted")
    add("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def run(arguments: argparse.Namespace) -> int:
    """`eventstore prune`: its exit status. StartError."""
    return run_job(prune_events, arguments)
