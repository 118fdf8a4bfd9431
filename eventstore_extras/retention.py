"""Deletes old events: `serve --retain-days N`, and the command `eventstore prune`.

No event is deleted before every target that it is forwarded to has accepted it. A wrong clock must not make fresh
events look old.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import shlex
import sqlite3
import time
import urllib.parse
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from contextlib import closing, suppress
from datetime import UTC, datetime
from functools import partial
from typing import NamedTuple, Protocol

from eventstore import (
    DAY_US,
    MIN_TIME_US,
    WRITER_PRAGMAS,
    AddFlag,
    ApiError,
    FieldError,
    Retention,
    Service,
    Sql,
    StartError,
    Store,
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
    quoted,
    say,
    sql,
    to_datetime,
)
from eventstore_extras.forward import ForwardProgress, forward_progress_path, read_all_forward_progress
from eventstore_extras.job import StopError, run_job, until_sigterm
from eventstore_extras.sending import lasted, newest_seq
from eventstore_extras.stored import OwnReader, open_stored

__all__ = [
    "CLOCK_INTERVAL_S",
    "HOUR_US",
    "MAX_ROWS",
    "MIN_ROWS",
    "MOST_AT_ONCE",
    "PLAUSIBLE_US",
    "SPAN",
    "DatabaseFile",
    "Expired",
    "SteadyClock",
    "Survey",
    "Sweep",
    "add_flags",
    "attach",
    "checkpoint",
    "monotonic_us",
    "run",
]

# ---------------------------------------------------------------------------------------------- deleting

SPAN = 100_000  # seqs that one query scans
_FIRST_ROWS, MIN_ROWS, MAX_ROWS = 50, 10, 1000  # to delete in one transaction
_TARGET_S = 0.005  # for one transaction; ingest requests wait for the transaction and its commit
_PAUSE_FACTOR = 2  # while events arrive, the pause after a transaction is this many times as long as the transaction
_FIND_EXPIRED = "SELECT count(*), max(seq) FROM (SELECT seq FROM events NOT INDEXED WHERE {} ORDER BY seq LIMIT :rows)"
_COUNT_KEPT = """
SELECT (SELECT name FROM environments WHERE id = environment), ingested_at_us < :plausible_us, count(*)
FROM events NOT INDEXED WHERE {} AND NOT ({}) GROUP BY environment, 2
"""
_COUNT_SPAN = """
SELECT coalesce(sum({}), 0), count(*), coalesce(max(ingested_at_us), 0)
FROM events NOT INDEXED WHERE seq > :after AND seq <= :through
"""
PLAUSIBLE_US = int(datetime(2024, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000  # no eventstore is older
Kept = Counter[tuple[str, bool]]  # events by their environment and whether they were stored before PLAUSIBLE_US


class Database(Protocol):
    """How a sweep reads and writes: through a server's store, or a DatabaseFile."""

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T: ...

    def write(self, operation: Callable[[sqlite3.Connection], T]) -> Awaitable[T]: ...


class Survey(NamedTuple):
    """The events in a range, and how many of them a sweep would delete."""

    expired: int
    events: int
    newest_us: int  # when the newest of them was stored


class Expired(NamedTuple):
    """The events that may be deleted: stored before a time, and accepted by every target they are forwarded to."""

    before_us: int
    forwarded: Sequence[ForwardProgress]
    after: int = 0  # only events with a seq above this,
    through: int = 2**63 - 1  # up to and including this
    plausible_us: int = PLAUSIBLE_US  # an event stored earlier than this was stored while the clock was wrong
    keeps_unforwarded: bool = False  # keep all events of environments that are not forwarded

    def _old(self) -> Sql:
        old = "seq > :after AND seq <= :through AND ingested_at_us < :before_us"
        return sql(old, after=self.after, through=self.through, before_us=self.before_us)

    def _allowed(self) -> Sql:
        """Return the condition that an old event may be deleted."""
        clauses = [sql("ingested_at_us >= :plausible_us", plausible_us=self.plausible_us)]
        for number, progress in enumerate(self.forwarded):
            other = f"environment IS NOT (SELECT id FROM environments WHERE name = :environment{number})"
            values = {f"environment{number}": progress.environment, f"seq{number}": progress.seq}
            clauses.append(Sql(f"({other} OR seq <= :seq{number})", values))
        if self.keeps_unforwarded:
            names = ", ".join(f":environment{number}" for number in range(len(self.forwarded)))
            clauses.append(Sql(f"environment IN (SELECT id FROM environments WHERE name IN ({names}))", {}))
        return all_of(clauses)

    def _where(self) -> Sql:
        return all_of([self._old(), self._allowed()])

    def find(self, conn: sqlite3.Connection, rows: int) -> tuple[int, int]:
        """Count the events, up to a number of rows, and return the count and the seq of the last one counted."""
        where = self._where()
        count, last = conn.execute(*sql(_FIND_EXPIRED.format(where), where, rows=rows)).fetchone()
        return count, last or 0

    def count(self, conn: sqlite3.Connection) -> int:
        return self.find(conn, rows=-1)[0]  # -1: without a limit

    def survey(self, conn: sqlite3.Connection) -> Survey:
        """Describe the events between the two seqs."""
        where = self._where()
        return Survey(*conn.execute(*sql(_COUNT_SPAN.format(where), where)).fetchone())

    def kept(self, conn: sqlite3.Connection) -> Kept:
        """Count the events that are old enough but may not be deleted."""
        old, allowed = self._old(), self._allowed()
        found = conn.execute(*sql(_COUNT_KEPT.format(old, allowed), old, allowed))
        return Kept({(name, bool(is_misdated)): count for name, is_misdated, count in found})

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


class _Found(NamedTuple):
    """The first events to delete in a span."""

    number: int
    last: int  # seq of the last of them, or 0
    kept: Kept  # the old events before the last one that must stay
    newest: int  # seq of the last event of the table


def _find_expired(conn: sqlite3.Connection, span: Expired, rows: int) -> _Found:
    count, last = span.find(conn, rows)
    kept = span._replace(through=last if count else span.through).kept(conn)
    return _Found(count, last, kept, newest_seq(conn))


def _seq_range(conn: sqlite3.Connection) -> tuple[int, int]:
    """Return the seq before the first event, and that of the last one; (0, 0) for an empty table."""
    first, last = conn.execute("SELECT (SELECT min(seq) FROM events), (SELECT max(seq) FROM events)").fetchone()
    return (first - 1, last) if last else (0, 0)


class Sweep:
    """Deletes expired events in order of arrival, in short transactions, because ingest requests wait for each.

    Pauses between transactions while events arrive.
    """

    def __init__(self, path: str, database: Database, expired: Expired) -> None:
        self._path = path
        self._database = database
        self._expired = expired
        self.deleted = 0
        self.kept = Kept()

    def _span(self, after: int, newest: int) -> Expired:
        return self._expired._replace(after=after, through=min(after + SPAN, newest))

    async def survey(self) -> Survey:
        """Describe all events, without deleting any."""
        after, newest = await self._database.read(_seq_range)
        found = Survey(0, 0, 0)
        while after < newest:
            span = self._span(after, newest)
            more = await self._database.read(span.survey)
            newest_us = max(found.newest_us, more.newest_us)
            found = Survey(found.expired + more.expired, found.events + more.events, newest_us)
            after = span.through
        return found

    async def run(self, thorough: bool) -> None:
        """Delete the expired events. Stop at the first span without any old ones, unless the sweep is thorough.

        Few expired events come after such a span: only imported events can be older than events that arrived before.
        """
        read = self._database.read
        after, newest = await read(_seq_range)
        rows, arrived = _FIRST_ROWS, 0
        while after < newest:
            span = self._span(after, newest)
            found = await read(partial(_find_expired, span=span, rows=rows))
            self.kept += found.kept
            if found.number:
                taken_s = await self._database.write(span._replace(through=found.last).delete)
                self.deleted += found.number
                rows = round(max(MIN_ROWS, min(MAX_ROWS, 2 * rows, rows * _TARGET_S / taken_s)))
                after = found.last
                await asyncio.to_thread(checkpoint, self._path)
                await asyncio.sleep(_PAUSE_FACTOR * taken_s if found.newest > arrived else 0)
                arrived = found.newest
            elif thorough or found.kept:
                after = span.through
            else:
                return


def _removal_advice(db: str, progress: ForwardProgress) -> str:
    """Say how to end the protection of events for a target that no longer receives any."""
    path = forward_progress_path(db, progress.target, progress.environment)
    return f"if nothing is forwarded there any more, remove {path}"


def _kept_note(kept: Kept, db: str, forwarded: Sequence[ForwardProgress]) -> str:
    """Say how many old events were kept, and why."""
    numbers, misdated = Counter[str](), 0  # the numbers by environment
    for (environment, is_misdated), count in kept.items():
        if is_misdated:
            misdated += count
        else:
            numbers[environment] += count
    targets = [progress for progress in forwarded if progress.environment in numbers]
    others = sorted(numbers.keys() - {progress.environment for progress in targets})
    notes = []
    if waiting := sum(numbers[name] for name in {progress.environment for progress in targets}):
        names = ", ".join(f"{progress.target} ({_removal_advice(db, progress)})" for progress in targets)
        notes.append(f"; keeps {plural(waiting, 'event')} of that time until accepted by {names}")
    if others:
        number, names = plural(sum(numbers[name] for name in others), "event"), ", ".join(map(quoted, others))
        notes.append(f"; keeps {number} of {names}, not forwarded; --delete-unforwarded deletes these")
    if misdated:
        year = to_datetime(PLAUSIBLE_US).year
        notes.append(f"; keeps {plural(misdated, 'event')} stored while the clock was before {year}, and so wrong")
    return "".join(notes)


# ---------------------------------------------------------------------------------------------- clocks

_JUMP_US = 60 * 1_000_000  # NTP corrects less than this without a jump
_NEWEST_STORED = "SELECT max(ingested_at_us) FROM (SELECT ingested_at_us FROM events ORDER BY seq DESC LIMIT 1000)"


def monotonic_us() -> int:
    return time.monotonic_ns() // 1000


def _lasted_us(duration_us: int) -> str:
    return lasted(abs(duration_us) / 1e6)


class SteadyClock:
    """The wall clock without jumps into the future, which it detects with the monotonic clock.

    `newest_us` is the time when the newest event was stored; 0 without events.
    """

    def __init__(self, wall: Callable[[], int], newest_us: int) -> None:
        self._wall = wall
        self._newest_us = newest_us
        self._read_us = monotonic_us()  # when the wall clock was last believed
        self._said_us = wall()  # its time at that moment
        self._is_ahead = False
        self.corrections = 0  # jumps into the future that were believed, because the clock had been wrong before

    def _was_behind(self, now: int) -> bool:
        """Return True if the jump to this time corrects a clock before 2024, or a day behind the newest event."""
        return self._said_us < PLAUSIBLE_US or self._said_us + DAY_US < self._newest_us <= now

    def now(self) -> int:
        """Return the time in microseconds. After a jump into the future, continue as if the clock had not jumped."""
        # Read in this order: a pause between the two looks like a jump ahead, which ends at the next call.
        read_us, said_us = monotonic_us(), self._wall()
        steady_us = self._said_us + read_us - self._read_us
        jump_us = said_us - steady_us
        if jump_us > _JUMP_US and not self._was_behind(said_us):
            if not self._is_ahead:
                self._is_ahead = True
                suspended = "deleting by the new time is suspended until it is set back or the server is restarted"
                log.warning("retention: the clock jumped ahead by %s; %s", _lasted_us(jump_us), suspended)
            return steady_us
        if jump_us > _JUMP_US:
            self.corrections += 1
            log.warning("retention: the clock, which was behind, was corrected by %s", _lasted_us(jump_us))
        elif jump_us < -_JUMP_US:
            log.warning("retention: the clock was set back by %s", _lasted_us(jump_us))
        elif self._is_ahead:
            log.info("retention: the clock is right again; nothing was deleted by the wrong time")
        self._is_ahead = False
        self._read_us, self._said_us = read_us, said_us
        return said_us


# ---------------------------------------------------------------------------------------------- retention

HOUR_US = 3600 * 1_000_000
CLOCK_INTERVAL_S = 1.0  # between two checks whether the clock has jumped
MOST_AT_ONCE = 1000  # events that the first sweep may delete even if they are most of the file
_GAP_DAYS = 7  # the clock may be wrong if nothing was stored for longer than this and twice the retention time


class _ServedDatabase:
    """The database of a server, read without waiting behind queries."""

    def __init__(self, store: Store) -> None:
        self._reader = OwnReader(store.path, "retention")
        self.read, self.write, self.close = self._reader.read, store.write, self._reader.close


def _newest_stored_us(conn: sqlite3.Connection) -> int:
    return conn.execute(_NEWEST_STORED).fetchone()[0] or 0


class _Retention:
    """Deletes events that were stored more than `days` ago, when the server starts and every hour."""

    def __init__(self, service: Service, days: float, deletes_unforwarded: bool) -> None:
        self.done = Retention()
        self._path = service.store.path
        self._database = _ServedDatabase(service.store)
        self._wall = service.settings.clock
        self._kept_us = int(days * DAY_US)
        self._outboxes = service.outboxes
        self._deletes_unforwarded = deletes_unforwarded
        self._newest_us: int | None = None  # when the newest event was stored, as the first sweep found it
        self._is_trusted = False  # whether the clock agrees with the events
        self._note = ""

    async def _doubt(self, now: int, sweep: Sweep) -> str:
        """Return why the clock may be wrong, judging by what a thorough sweep would delete."""
        expired, events, newest_us = await sweep.survey()
        if self._newest_us is None:
            self._newest_us = newest_us
        gap_us = now - self._newest_us
        if expired and gap_us > max(_GAP_DAYS * DAY_US, 2 * self._kept_us):
            return f"the newest event was stored {_lasted_us(gap_us)} ago by this clock"
        if expired > max(MOST_AT_ONCE, events / 2):
            return f"it would delete {expired:,} of {plural(events, 'event')} at once"
        return ""

    async def _try_sweep(self, now: int, thorough: bool) -> None:
        before_us = max(now - self._kept_us, MIN_TIME_US)
        before = to_datetime(before_us).isoformat().replace("+00:00", "Z")
        path = self._path
        forwarded = read_all_forward_progress(path)
        keeps_unforwarded = bool(forwarded or self._outboxes) and not self._deletes_unforwarded
        sweep = Sweep(path, self._database, Expired(before_us, forwarded, keeps_unforwarded=keeps_unforwarded))
        if not self._is_trusted:
            if doubt := await self._doubt(now, sweep):
                advice = f"if the clock is right, run: eventstore prune --db {shlex.quote(path)} --before {before}"
                log.warning("retention: suspended, because %s; %s", doubt, advice)
                return
            self._is_trusted = True
        try:
            await sweep.run(thorough)
        finally:
            self.done.deleted += sweep.deleted
        self.done.swept_us = now
        note = _kept_note(sweep.kept, path, forwarded)
        if sweep.deleted or note != self._note:
            log.info("retention: deleted %s, stored before %s%s", plural(sweep.deleted, "event"), before, note)
        self._note = note

    async def _sweep(self, now: int, thorough: bool) -> None:
        try:
            await self._try_sweep(now, thorough)
        except (ApiError, StartError) as error:
            log.error("retention: %s; the next try is in an hour", error)
        except Exception:
            log.exception("retention failed; the next try is in an hour")

    async def run(self) -> None:
        """Run until cancelled."""
        try:
            await self._sweep_hourly()
        finally:
            await asyncio.to_thread(self._database.close)

    async def _sweep_hourly(self) -> None:
        newest_us = 0
        with suppress(ApiError, sqlite3.Error):  # if the database cannot be read, the sweep logs the error
            newest_us = await self._database.read(_newest_stored_us)
        clock = SteadyClock(self._wall, newest_us)
        swept_us: int | None = None
        corrections = 0
        while True:
            read_us = monotonic_us()
            now = clock.now()
            if clock.corrections > corrections:
                corrections, self._is_trusted = clock.corrections, False
            if swept_us is None or read_us - swept_us >= HOUR_US:
                await self._sweep(now, thorough=swept_us is None)
                swept_us = read_us
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
    deletes_unforwarded = bool(vars(arguments).get("delete_unforwarded"))
    retention = _Retention(service, days, deletes_unforwarded)
    service.retention = retention.done
    service.tasks.append(retention.run)
    unit = "day" if days == 1 else "days"
    service.notices.append(f"keeps        events for {days:,.15g} {unit} after they were stored")
    if service.outboxes and not deletes_unforwarded:
        unforwarded = "those that are not forwarded (--delete-unforwarded changes that)"
        service.notices.append(f"             without limit {unforwarded}")


# ---------------------------------------------------------------------------------------------- prune

_LOCK_TIMEOUT_S = 60.0


class DatabaseFile:
    """A database without its server, which may be running in another process."""

    def __init__(self, conn: sqlite3.Connection) -> None:
        self._conn = conn

    async def read(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        return operation(self._conn)

    async def write(self, operation: Callable[[sqlite3.Connection], T]) -> T:
        execute_writing(self._conn, _LOCK_TIMEOUT_S, "BEGIN IMMEDIATE")
        result = operation(self._conn)
        self._conn.execute("COMMIT")
        return result


def _delete(sweep: Sweep) -> None:
    """Delete the expired events. Raises StopError if interrupted."""
    try:
        asyncio.run(until_sigterm(sweep.run(thorough=True)))
    except (KeyboardInterrupt, asyncio.CancelledError):
        deleted = f"{plural(sweep.deleted, 'event')} deleted"
        raise StopError(f"interrupted; {deleted}; the same command continues from there") from None


def _before_us(text: str) -> int:
    try:
        before_us = parse_time(text)
    except FieldError as error:
        raise StartError(f"--before {error}") from None
    if before_us > now_us():
        raise StartError(f"--before {text} is in the future: it would delete events that are still to come")
    return before_us


def _prune_events(arguments: argparse.Namespace) -> int:
    """Run the command and return 0. Raises StartError, or StopError if it stops before the end."""
    started_s = time.monotonic()
    db, before_us = arguments.db, _before_us(arguments.before)
    if not os.path.exists(db):
        raise StartError(f"there is no database {db}: name one with --db")
    if not arguments.dry_run:
        prepare_file(db)
    forwarded = read_all_forward_progress(db)
    # With a time before the earliest plausible one, delete the events that were stored while the clock was wrong.
    expired = Expired(before_us, forwarded, plausible_us=PLAUSIBLE_US if before_us > PLAUSIBLE_US else MIN_TIME_US,
                      keeps_unforwarded=bool(forwarded) and not arguments.delete_unforwarded)  # fmt: skip
    with closing(open_stored(db) if arguments.dry_run else connect(db, WRITER_PRAGMAS)) as conn:
        sweep = Sweep(db, DatabaseFile(conn), expired)
        if arguments.dry_run:
            number, kept = expired.count(conn), expired.kept(conn)
        else:
            _delete(sweep)
            number, kept = sweep.deleted, sweep.kept
    verb = "would delete" if arguments.dry_run else "deleted"
    deleted = f"{verb} {plural(number, 'event')} stored before {arguments.before} from {db}"
    say(f"{deleted}; {time.monotonic() - started_s:.1f} s{_kept_note(kept, db, forwarded)}")
    return 0


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `prune`."""
    add_db_flag(add, "database file; a server may be running on it")
    add("--before", metavar="TIME", required=True, help="RFC 3339; events stored before it are deleted")
    add("--delete-unforwarded", action="store_true", help="if this database has events that are forwarded, also delete "
        "those of other environments")  # fmt: skip
    add("--dry-run", action="store_true", help="say what would be deleted, and delete nothing")


def run(arguments: argparse.Namespace) -> int:
    """Run `eventstore prune` and return its exit status. Raises StartError."""
    return run_job(_prune_events, arguments)
