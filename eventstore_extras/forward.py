"""`serve --forward-to`: a server sends the events of one environment on to FlexPrice or another eventstore.

The database is the outbox. A task of the server reads events in order of arrival, sends them in batches, and keeps its
progress in a file beside the database. Events that the target refuses are written to another file.
"""

from __future__ import annotations

import argparse
import asyncio
import glob
import itertools
import logging
import os
import socket
import sqlite3
import urllib.parse
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from pathlib import Path
from typing import Any, NamedTuple

import msgspec

from eventstore import (
    IN_ENVIRONMENT,
    MAX_BATCH,
    ApiError,
    Outbox,
    Row,
    Service,
    StartError,
    connect_reader,
    log,
    plural,
    quoted,
    real_path,
    sql,
)
from eventstore_extras.job import StopError
from eventstore_extras.proxies import port_of
from eventstore_extras.refused import (
    MAX_EVENT_BYTES,
    add_counts,
    append_lines,
    refused_line,
    refused_path,
    shown_counts,
)
from eventstore_extras.sending import (
    ARRIVED,
    BATCH_BYTES,
    Answer,
    Batch,
    Outage,
    Outcome,
    Progress,
    ProgressFile,
    PutAside,
    Sender,
    Target,
    Throttle,
    arrived_rows,
    batches,
    find_key,
    newest_seq,
    progress_path,
    read_progress,
    require_httpx,
    resume_progress,
    target_url,
)
from eventstore_extras.stored import OwnReader, environment_names

__all__ = [
    "FAILURE_PAUSE_S",
    "SPAN",
    "WATCH_INTERVAL_S",
    "Backlog",
    "ForwardProgress",
    "Forwarder",
    "LagMonitor",
    "attach",
    "forward",
    "forward_progress_path",
    "open_forward_progress",
    "read_all_forward_progress",
]

# ---------------------------------------------------------------------------------------------- progress

_START_OVER = "remove it, and all events are sent again, which does no harm"


class ForwardProgress(Progress, kw_only=True):
    refused: int = 0  # events that the target refused
    # Events that FlexPrice would lose and that were not sent, by reason.
    put_aside: dict[str, int] = msgspec.field(default_factory=dict)

    @property
    def reasons(self) -> dict[str, int]:
        """The number of undelivered events for each reason."""
        return {"refused": self.refused, **self.put_aside} if self.refused else self.put_aside


def forward_progress_path(db: str, target: str, environment: str) -> Path:
    return progress_path(db, "forward", [target, environment])


def open_forward_progress(
    conn: sqlite3.Connection, db: str, target: str, environment: str
) -> ProgressFile[ForwardProgress]:
    """Return the progress of forwarding to this target, resumed from its file if there is one. Raises StartError."""
    new = ForwardProgress(target=target, environment=environment)
    return resume_progress(conn, forward_progress_path(db, target, environment), new, _START_OVER)


def read_all_forward_progress(db: str) -> list[ForwardProgress]:
    """Return the progress of each target that this database forwards or has forwarded to. Raises StartError."""
    paths = sorted(glob.glob(f"{glob.escape(real_path(db))}.forward-*.json"))
    return [read_progress(Path(path), ForwardProgress, _START_OVER) for path in paths]


# ---------------------------------------------------------------------------------------------- the outbox

SPAN = 100_000  # seqs that one query scans; most of them may belong to other environments
_COUNT_ARRIVED = f"SELECT count(*), min(ingested_at_us) FROM events NOT INDEXED WHERE {IN_ENVIRONMENT} AND {ARRIVED}"


class _Page(NamedTuple):
    """The next events to send."""

    batch: Batch | None
    through: int  # last seq that this page covers; progress moves here once the batch is delivered
    is_full: bool  # waiting for events would not help: the batch is full, or there are more rows to scan


class Backlog(NamedTuple):
    """The events that wait."""

    events: int
    oldest_us: int  # when the first of them was stored; 0 if none waits


def _next_page(conn: sqlite3.Connection, environment: str, after: int, max_event_bytes: int | None) -> _Page:
    newest = newest_seq(conn)  # read before the rows: later commits wait for the next page
    through = min(newest, after + SPAN)
    rows = arrived_rows(conn, sql(IN_ENVIRONMENT, environment=environment), after, through)
    batch = next(batches([rows], MAX_BATCH, max_event_bytes), None)
    if batch is None:
        return _Page(None, max(through, after), through < newest)
    is_full = batch.size == MAX_BATCH or batch.size < len(rows) or sum(map(len, batch.events)) >= BATCH_BYTES
    return _Page(batch, batch.last[0], is_full or through < newest)


def _backlog(conn: sqlite3.Connection, environment: str, after: int) -> Backlog:
    """Count the events that wait.

    Among the first 100,000 seqs only the environment's events count. Beyond them every seq counts, because an exact
    count of ten million takes too long.
    """
    unscanned = max(newest_seq(conn) - after - SPAN, 0)
    parameters = {"environment": environment, "after": after, "through": after + SPAN}
    events, oldest_us = conn.execute(_COUNT_ARRIVED, parameters).fetchone()
    return Backlog(events + unscanned, oldest_us or 0)


# ---------------------------------------------------------------------------------------------- lag

WATCH_INTERVAL_S = 5.0
_BEHIND_EVENTS, _BEHIND_S = 10_000, 60.0
_STARTUP_S = 15.0  # many events may wait at the start: allow this long to send them


class LagMonitor:
    """Logs when forwarding falls behind, and when it has caught up.

    Only the time since the start of the server counts: before that, nothing could be sent.
    """

    def __init__(self, host: str, clock: Callable[[], int], interval_s: float) -> None:
        self._host = host
        self._clock = clock
        self._started_us = clock()
        self._interval_s = interval_s
        self._is_behind = False

    def check(self, backlog: Backlog) -> None:
        now = self._clock()
        running_s = (now - self._started_us) / 1e6
        waited_s = (now - backlog.oldest_us) / 1e6 - self._interval_s if backlog.events else 0.0
        has_many = backlog.events > _BEHIND_EVENTS and running_s >= _STARTUP_S
        if not self._is_behind and (has_many or min(waited_s, running_s) > _BEHIND_S):
            self._is_behind = True
            waiting = f"{plural(backlog.events, 'event')} wait, the first for {waited_s:.0f} s"
            log.warning("forwarding to %s has fallen behind: %s", self._host, waiting)
        elif self._is_behind and backlog.events <= MAX_BATCH and waited_s <= _BEHIND_S:
            self._is_behind = False
            log.info("forwarding to %s has caught up", self._host)


# ---------------------------------------------------------------------------------------------- forwarding

FAILURE_PAUSE_S = 30.0  # after an error of this server
_LOG_INTERVAL_S = 60.0  # between two lines that say why nothing is forwarded
_GRACE_S = 2.0  # for the request under way when the server stops; the server itself waits a little longer


class _StoppingError(Exception):
    """The server is stopping, so nothing more is sent."""


class Forwarder:
    """Sends the events of one environment in order of arrival, one batch at a time, until the server stops."""

    def __init__(
        self,
        service: Service,
        target: Target,
        file: ProgressFile[ForwardProgress],
        interval_s: float,
        max_event_bytes: int | None,
    ) -> None:
        self.host = urllib.parse.urlsplit(target.url).netloc
        self.outbox = Outbox(self.host, self.lag)
        self._store = service.store
        self._clock = service.settings.clock
        self._target = target
        self._file = file
        self._progress = file.progress
        self._interval_s = interval_s
        self._max_event_bytes = max_event_bytes
        self._reader = OwnReader(service.store.path, "forwarder")
        self._sender = Sender(target, self._wait)
        self._monitor = LagMonitor(self.host, self._clock, interval_s)
        self._log_throttle = Throttle(_LOG_INTERVAL_S)
        self._outage = Outage()
        self._unfit: list[PutAside] = []  # in the batch that is being sent
        self._stopping = asyncio.Event()
        self._show_progress()

    @property
    def is_saved(self) -> bool:
        return self._file.is_saved

    def _show_progress(self) -> None:
        self.outbox.sent = self._progress.accepted
        self.outbox.put_aside = self._progress.reasons

    async def _measure(self) -> Backlog:
        """Count the events not yet forwarded, and show their number in the outbox."""
        environment, after = self._progress.environment, self._progress.seq
        backlog = await self._reader.read(lambda conn: _backlog(conn, environment, after))
        self.outbox.waiting, self.outbox.oldest_us = backlog
        return backlog

    async def _next_page(self) -> _Page:
        environment, after, max_bytes = self._progress.environment, self._progress.seq, self._max_event_bytes
        return await self._reader.read(lambda conn: _next_page(conn, environment, after, max_bytes))

    async def lag(self) -> int:
        """Return how many events wait; `_backlog` says how exact the number is."""
        return (await self._measure()).events

    def lag_now(self) -> int:
        """Return the same as `lag`. Any thread may call this, even when the server is not running."""
        with closing(connect_reader(self._store.path)) as conn:
            return _backlog(conn, self._progress.environment, self._progress.seq).events

    def _log(self, level: int, message: str) -> bool:
        """Log why nothing is forwarded, at most once a minute: a target may be down for a week.

        Returns True if the line was logged.
        """
        if allowed := self._log_throttle.allows():
            log.log(level, "forwarding: %s", message)
        return allowed

    def _log_end_of_outage(self, is_done: bool) -> None:
        if text := self._outage.end(is_done):
            log.info("forwarding to %s %s", self.host, text)

    async def _save(self) -> None:
        try:
            await asyncio.to_thread(self._file.save)
        except StopError as error:  # continue: after a crash, more events would be sent again
            self._log(logging.ERROR, str(error))

    def _check_running(self) -> None:
        if self._stopping.is_set():
            raise _StoppingError

    async def _pause(self, seconds: float) -> None:
        """Sleep. Raises _StoppingError as soon as the server stops."""
        if self._file.is_due():
            await self._save()
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        self._check_running()

    async def _wait(self, answer: Answer, waits: int) -> None:
        """Wait before a request is sent again. Raises _StoppingError."""
        backoff_s = answer.backoff_s(waits)
        self.outbox.blocked = answer.problem if answer.outcome is Outcome.BLOCKED else ""
        if answer.outcome is Outcome.BLOCKED:
            stopped = f"nothing is forwarded until this is corrected, trying again every {backoff_s:g} s"
            is_logged = self._log(logging.ERROR, f"{answer.problem}; {stopped}")
        else:
            is_logged = self._log(logging.WARNING, f"{answer.problem}; trying again")
        self._outage.failed(is_logged)
        await self._pause(backoff_s)

    async def _write_aside(self, rows: Sequence[tuple[Row, str]]) -> Path:
        """Write undelivered events and their reasons to the file of refused events. Try until the file can be written.

        Raises _StoppingError.
        """
        path, now = refused_path(self._store.path), self._clock()
        lines = [refused_line(row, self._target.url, reason, now) for row, reason in rows]
        while True:
            try:
                await asyncio.to_thread(append_lines, path, lines)
                return path
            except OSError as error:
                first = f"the refused event {quoted(rows[0][0].id)} cannot be written to {path}"
                reason = f"{first}: {error.strerror or error}"
                self._log(logging.ERROR, f"{reason}; nothing is forwarded until there is space for it")
                await self._pause(FAILURE_PAUSE_S)

    async def _put_refused_aside(self, row: Row, refusal: str) -> None:
        path = await self._write_aside([(row, refusal)])
        self._progress.refused += 1
        log.error("forwarding: event %s is refused and was written to %s: %s", quoted(row.id), path, refusal)

    async def _put_unfit_aside(self, through: int) -> None:
        """Put aside the events up to this seq that FlexPrice would lose. Raises _StoppingError."""
        found = list(itertools.takewhile(lambda aside: aside.row[0] <= through, self._unfit))
        if not found:
            return
        path = await self._write_aside([(aside.row[1], aside.unfit.text) for aside in found])
        del self._unfit[: len(found)]
        add_counts(self._progress.put_aside, (aside.unfit.reason for aside in found))
        self._progress.advance(found[-1].row)
        counts = Counter(aside.unfit.reason for aside in found)
        first = f"{'the first is ' if len(found) > 1 else ''}{quoted(found[0].row[1].id)}, {found[0].unfit.text}"
        log.error("forwarding: %s in %s: %s", shown_counts(counts), path, first)

    async def _deliver(self, batch: Batch) -> None:
        """Send a batch, and move the events that the target refuses to their file. Raises _StoppingError.

        A refused batch is halved until each event that causes the refusal stands alone.
        """
        while batch.rows:
            self._check_running()
            part, answer = await self._sender.send_head(batch)
            self.outbox.blocked = ""
            batch = batch.part(len(part.rows))
            self._outage.sent(len(part.rows) if answer.outcome is Outcome.ACCEPTED else 0)
            if answer.outcome is not Outcome.ACCEPTED and len(part.rows) > 1:
                middle = len(part.rows) // 2
                await self._deliver(part.part(0, middle))
                await self._deliver(part.part(middle))
                continue
            last = part.rows[-1]
            await self._put_unfit_aside(last[0])
            if answer.outcome is Outcome.ACCEPTED:
                self._progress.accepted += len(part.rows)
            else:
                await self._put_refused_aside(last[1], answer.problem)
            self._progress.advance(last)
            self._show_progress()
            if self._file.is_due():
                await self._save()

    async def _send_next(self) -> None:
        """Send the next batch, after waiting for more events if it is not full. Raises _StoppingError."""
        page = await self._next_page()
        if not page.is_full:
            await self._pause(self._interval_s)
            page = await self._next_page()
        if page.batch:
            self._unfit = list(page.batch.put_aside)
            await self._deliver(page.batch)
            await self._put_unfit_aside(page.through)
            self._show_progress()
        self._progress.seq = page.through
        self._log_end_of_outage(is_done=page.batch is None)

    async def _work(self) -> None:
        try:
            async with self._target:
                while True:
                    try:
                        await self._send_next()
                    except _StoppingError:
                        return
                    except Exception:  # a bug, or an unreadable database, must not end forwarding
                        log.exception("forwarding failed; trying again")
                        await asyncio.sleep(FAILURE_PAUSE_S)
        finally:
            self._log_end_of_outage(is_done=True)
            await self._save()

    async def _watch(self) -> None:
        while True:
            with suppress(ApiError, sqlite3.Error):  # the server is stopping, or `_work` logs the error
                self._monitor.check(await self._measure())
            await asyncio.sleep(WATCH_INTERVAL_S)

    async def run(self) -> None:
        """Forward until cancelled; then give the request under way two seconds to end, and save the progress."""
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping.set()
            await asyncio.wait([work], timeout=_GRACE_S)
        finally:
            work.cancel()
            watch.cancel()
            await asyncio.gather(work, watch, return_exceptions=True)
            await asyncio.to_thread(self._reader.close)


# ---------------------------------------------------------------------------------------------- starting


def _chosen_environment(service: Service, name: str | None) -> str:
    """Return the environment to forward: the named one, or the only one that has a key. Raises StartError."""
    keyed = sorted({key.environment for key in service.settings.api_keys})
    names = ", ".join(map(quoted, keyed))
    if name is None and len(keyed) > 1:
        problem = f"the API keys belong to several environments, {names}"
        raise StartError(f"--forward-to needs --forward-environment: {problem}")
    if name is not None and name not in keyed:
        problem = f"no API key writes to it: the keys belong to {names}"
        raise StartError(f"--forward-environment is {quoted(name)}, but {problem}")
    return keyed[0] if name is None else name


def forward(
    service: Service,
    target: Target,
    environment: str | None = None,
    interval_s: float = 1.0,
    max_event_bytes: int | None = MAX_EVENT_BYTES,
) -> Forwarder:
    """Make a server that has not started yet forward the events of an environment while it runs.

    If no environment is named, all API keys must belong to the same one. With None for `max_event_bytes` it also sends
    events that FlexPrice would lose. Raises StartError.
    """
    db, environment = service.store.path, _chosen_environment(service, environment)
    with closing(connect_reader(db)) as conn:
        others = sorted({*environment_names(conn)} - {environment})
        file = open_forward_progress(conn, db, target.url, environment)
        events = _backlog(conn, environment, file.progress.seq).events
    try:
        file.save()  # from now on, retention keeps the events that this target has not accepted
    except StopError as error:
        raise StartError(str(error)) from error
    forwarder = Forwarder(service, target, file, interval_s, max_event_bytes)
    service.outboxes[environment] = forwarder.outbox
    service.tasks.append(forwarder.run)
    service.notices.append(f"forwards to  {target.url}, environment {environment} ({plural(events, 'event')} behind)")
    if reasons := file.progress.reasons:
        service.notices.append(f"             {shown_counts(reasons)} in {refused_path(service.store.name)}")
    if target.proxy:
        service.notices.append(f"             through the proxy {target.proxy.name}")
    if others:
        service.notices.append(f"             not forwarded: {', '.join(others)}")
    return forwarder


def _is_of_this_machine(address: str) -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.bind((address, 0))
        return True
    return False


def _is_own_address(url: str, listening: tuple[Any, ...]) -> bool:
    """Return True if the URL leads to the socket address on which this server listens."""
    parts = urllib.parse.urlsplit(url)
    if port_of(parts) != listening[1]:
        return False
    addresses: set[str] = set()
    with suppress(OSError):  # the name cannot be resolved now
        addresses = {str(found[4][0]) for found in socket.getaddrinfo(parts.hostname, None)}
    if listening[0] in ("0.0.0.0", "::"):  # noqa: S104
        return any(map(_is_of_this_machine, addresses))
    return listening[0] in addresses


def attach(service: Service, arguments: argparse.Namespace, listening: tuple[Any, ...]) -> None:
    """Set up `serve --forward-to URL`. Raises StartError."""
    url = target_url(arguments.forward_to, "--forward-to")
    require_httpx("--forward-to")
    if _is_own_address(url, listening):
        raise StartError(f"--forward-to {url} is this server itself: name another one")
    names = ("EVENTSTORE_FORWARD_API_KEY", "FLEXPRICE_API_KEY")
    missing = f"no API key for --forward-to: set {' or '.join(names)} to a key of that API"
    key = find_key({name: os.environ.get(name) for name in names}, missing)
    for name in ("httpx", "httpcore"):  # they would log a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    target = Target(url, key, "--forward-to")
    max_event_bytes = None if arguments.forward_everything else arguments.forward_max_event_bytes
    interval_s = arguments.forward_interval_ms / 1000
    forward(service, target, arguments.forward_environment, interval_s, max_event_bytes)
