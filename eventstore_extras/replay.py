"""The command `eventstore replay`: send stored events once, with filters, to FlexPrice or another eventstore.

A replay first sends the events that exist, oldest first, and then those that arrived during the replay. It keeps its
progress in a file, so that the same command continues where the last one stopped.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import sqlite3
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing

import msgspec
from msgspec.structs import replace

from eventstore import (
    EVENT_FILTERS,
    MAX_BATCH,
    AddFlag,
    Cursor,
    EventQuery,
    all_of,
    in_range,
    list_events,
    matching,
    now_us,
    plural,
    positive,
    quoted,
    say,
)
from eventstore_extras.files import progress_bar
from eventstore_extras.job import StopError, run_job, until_sigterm
from eventstore_extras.refused import (
    MAX_EVENT_BYTES,
    add_counts,
    append_lines,
    refused_line,
    refused_path,
    shown_counts,
)
from eventstore_extras.sending import (
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
    bulk_url,
    find_key,
    newest_seq,
    progress_path,
    require_httpx,
    resume_progress,
    target_url,
)
from eventstore_extras.stored import StoredRow, add_filter_flags, flag_query, no_events_hint, open_stored, stored_events

__all__ = ["add_flags", "run"]

_SAY_INTERVAL_S = 30.0  # between two lines that say why requests are sent again
_START_OVER = "with --restart all events are sent again, which does no harm"


class ReplayProgress(Progress, kw_only=True):
    filters: dict[str, str | None]
    seq: int = msgspec.field(name="arrived")  # in the first pass: the newest event when the replay began
    cursor: Cursor | None = None  # every event up to it in order of time is accepted
    is_caught_up: bool = False  # the first pass is complete: only events that arrived after `seq` remain

    def advance(self, last: StoredRow) -> None:
        if self.is_caught_up:
            super().advance(last)
        else:
            self.last_seq, row = last
            self.last_id = row.id
            self.cursor = Cursor(row.timestamp_us, row.id)

    @property
    def position(self) -> str:
        cursor = self.cursor.text if self.cursor else "at the start"
        return f"cursor {cursor}{f', row {self.seq}' if self.is_caught_up else ''}"


# ---------------------------------------------------------------------------------------------- passes


def _arrived_pages(conn: sqlite3.Connection, query: EventQuery, after: int, through: int) -> Iterator[list[StoredRow]]:
    """Yield the matching events that arrived after one seq, through another, in order of arrival."""
    while True:
        page = arrived_rows(conn, all_of([matching(query), in_range(query)]), after, through)
        if not page:
            return
        yield page
        after = page[-1][0]


def _passes(
    conn: sqlite3.Connection, query: EventQuery, progress: ReplayProgress
) -> Iterator[Iterator[list[StoredRow]]]:
    """Yield the passes that remain, each as pages of events, and record in the progress when a pass is complete.

    The first pass sends the existing events in order of time. The second one sends the events that arrived since the
    replay began, because they may be older than the cursor.
    """
    if not progress.is_caught_up:
        yield stored_events(conn, replace(query, after=progress.cursor))
    progress.is_caught_up = True
    newest = newest_seq(conn)
    yield _arrived_pages(conn, query, progress.seq, newest)
    progress.seq = newest


def _events_left(conn: sqlite3.Connection, query: EventQuery, progress: ReplayProgress) -> int | None:
    """Count the events of the first pass, for the progress bar. Counting those of the second one would take long."""
    if progress.is_caught_up:
        return None
    start_us = progress.cursor.timestamp_us if progress.cursor else query.start_us
    return list_events(conn, replace(query, start_us=start_us)).total_count or 0


# ---------------------------------------------------------------------------------------------- sending


class _FailedError(Exception):
    """A part of a batch was refused, or sending it was given up."""

    def __init__(self, problem: str, part: Batch | None = None) -> None:
        super().__init__(problem)
        self.part = part


def _max_event_bytes(arguments: argparse.Namespace) -> int | None:
    return None if arguments.everything else arguments.max_event_bytes


def _same_command(arguments: argparse.Namespace) -> str:
    return f"the same command{' without --restart' if arguments.restart else ''}"


class _Replay:
    """Sends batches, several at a time, and tracks the position up to which all of them are accepted."""

    def __init__(self, arguments: argparse.Namespace, file: ProgressFile[ReplayProgress]) -> None:
        self._arguments = arguments
        self._file = file
        self._progress = file.progress
        self._pending: deque[tuple[Batch, asyncio.Task[None]]] = deque()
        self._success_s = time.monotonic()  # when a part was last accepted
        self._notices = Throttle(_SAY_INTERVAL_S)
        self._outage = Outage()
        self._put_aside: dict[str, int] = {}  # events that were not sent, by reason
        self._failing = set[asyncio.Task[None] | None]()  # tasks whose last request failed
        self.sent = self.accepted = self.retried = self.duplicates = 0

    async def _wait(self, answer: Answer, waits: int) -> None:
        """Wait before a request is sent again. Raises _FailedError to give up."""
        if answer.outcome is Outcome.BLOCKED:
            raise _FailedError(answer.problem)
        backoff_s, limit_s = answer.backoff_s(waits), self._arguments.give_up_after_s
        if time.monotonic() + backoff_s - self._success_s > limit_s:
            given_up = f"given up, no batch was accepted for {limit_s:g} s (--give-up-after-s)"
            raise _FailedError(f"{given_up}: {answer.problem}")
        self.retried += 1
        if is_said := self._notices.allows():
            say(f"{answer.problem}; trying again, for at most {limit_s:g} s without success")
        self._outage.failed(is_said)
        self._failing.add(asyncio.current_task())
        await asyncio.sleep(backoff_s)

    def _say_end_of_outage(self, is_done: bool = False) -> None:
        if text := self._outage.end(is_done):
            say(f"{self._progress.target} {text}")

    async def _send(self, sender: Sender, batch: Batch) -> None:
        """Send a batch until all of it is accepted. Raises _FailedError."""
        self.sent += len(batch.rows)
        while batch.rows:
            try:
                part, answer = await sender.send_head(batch)
            except _FailedError as failure:
                raise _FailedError(str(failure), sender.head(batch)) from None
            if answer.outcome is not Outcome.ACCEPTED:
                raise _FailedError(answer.problem, part)
            self._success_s = time.monotonic()
            self.accepted += len(part.rows)
            self.duplicates += answer.duplicates
            self._failing.discard(asyncio.current_task())
            if not self._failing:
                self._outage.sent(len(part.rows))
                self._say_end_of_outage()
            batch = batch.part(len(part.rows))

    @property
    def aside_note(self) -> str:
        """The end of a summary: the number of undelivered events and their reasons, or ""."""
        if not self._put_aside:
            return ""
        return f"; {shown_counts(self._put_aside)} in {refused_path(self._arguments.db)}"

    @property
    def summary(self) -> str:
        known = f" ({self.duplicates:,} of them it already had)" if self.duplicates else ""
        counts = f"{self.accepted:,} accepted{known}, {self.retried:,} retried"
        return f"sent {plural(self.sent, 'event')}: {counts}{self.aside_note}"

    def _write_aside(self, put_aside: Sequence[PutAside]) -> None:
        """Write the events of a batch that are not sent to the file of refused events. Raises StopError."""
        path, now, target = refused_path(self._arguments.db), now_us(), self._progress.target
        try:
            append_lines(path, [refused_line(aside.row[1], target, aside.unfit.text, now) for aside in put_aside])
        except OSError as error:
            reason = f"cannot write the events that are not sent to {path}: {error.strerror or error}"
            raise StopError(f"{reason}; correct this, then {_same_command(self._arguments)} continues") from error
        add_counts(self._put_aside, (aside.unfit.reason for aside in put_aside))

    def _stop_error(self, failure: _FailedError, batch: Batch) -> StopError:
        rows = (failure.part or batch).rows
        ids = f"from {quoted(rows[0][1].id)} to {quoted(rows[-1][1].id)}"
        failed = f"this is the batch of {plural(len(rows), 'event')} {ids}"
        accepted = f"everything before it is accepted ({self._progress.position})"
        advice = f"correct this, then {_same_command(self._arguments)} continues from there"
        return StopError(f"{failure}; {failed}; {accepted}{self.aside_note}; {advice}")

    async def _finish_oldest(self) -> int:
        """Wait for the oldest batch, advance the progress past it, and return how many events it had."""
        batch, task = self._pending[0]
        try:
            await task
        except _FailedError as failure:
            raise self._stop_error(failure, batch) from None
        if batch.put_aside:
            self._write_aside(batch.put_aside)
        self._pending.popleft()
        self._progress.accepted += len(batch.rows)
        self._progress.advance(batch.last)
        if self._file.is_due():
            self._file.save()
        return batch.size

    async def _cancel_pending(self) -> None:
        tasks = [task for _, task in self._pending]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def run(
        self, conn: sqlite3.Connection, query: EventQuery, target: Target, advance: Callable[[int], object]
    ) -> None:
        """Send everything that remains. Raises StopError if events are refused, or if none are accepted for long."""
        concurrency = self._arguments.concurrency
        async with target:
            sender = Sender(target, self._wait)
            try:
                for pages in _passes(conn, query, self._progress):
                    for batch in batches(pages, self._arguments.batch_size, _max_event_bytes(self._arguments)):
                        if len(self._pending) == concurrency:
                            advance(await self._finish_oldest())
                        self._pending.append((batch, asyncio.create_task(self._send(sender, batch))))
                    while self._pending:
                        advance(await self._finish_oldest())
                self._say_end_of_outage(is_done=True)
            finally:
                await self._cancel_pending()
                if self._progress.accepted or self._put_aside or self._file.path.exists():
                    self._file.save()


# ---------------------------------------------------------------------------------------------- the command


def _target(arguments: argparse.Namespace, url: str) -> Target:
    """Return the API that `--to` names. Raises StartError."""
    sources = {"--api-key": arguments.api_key, "FLEXPRICE_API_KEY": os.environ.get("FLEXPRICE_API_KEY")}
    key = find_key(sources, "no API key for the target: set FLEXPRICE_API_KEY, or give it with --api-key")
    return Target(url, key, "--to", arguments.concurrency)


def _open_progress(arguments: argparse.Namespace, conn: sqlite3.Connection, url: str) -> ProgressFile[ReplayProgress]:
    """Return the progress of an earlier run of the same replay, or a new one. Raises StartError."""
    environment = arguments.environment
    filters = {name: getattr(arguments, name) for name in EVENT_FILTERS}
    path = progress_path(arguments.db, "replay", [url, environment, filters])
    new = ReplayProgress(target=url, environment=environment, filters=filters, seq=newest_seq(conn))
    if arguments.restart:
        return ProgressFile(path, new)
    file = resume_progress(conn, path, new, _START_OVER)
    if accepted := file.progress.accepted:
        before = f"{plural(accepted, 'event')} {'was' if accepted == 1 else 'were'} accepted before"
        say(f"continuing at {file.progress.position}: {before} (--restart starts over)")
    return file


def _dry_run(
    conn: sqlite3.Connection, query: EventQuery, progress: ReplayProgress, arguments: argparse.Namespace
) -> str:
    """Say what a replay would send."""
    sizes, put_aside = list[int](), dict[str, int]()
    for pages in _passes(conn, query, progress):
        for batch in batches(pages, arguments.batch_size, _max_event_bytes(arguments)):
            sizes += [len(batch.rows)] if batch.rows else []
            add_counts(put_aside, (aside.unfit.reason for aside in batch.put_aside))
    would = f"would send {plural(sum(sizes), 'event')} in {plural(len(sizes), 'request')}"
    aside = f"; would have {shown_counts(put_aside)}" if put_aside else ""
    elsewhere = "" if sizes or put_aside else no_events_hint(conn, progress.environment)
    return f"{would} to {bulk_url(progress.target)}{aside}; nothing was sent{elsewhere}"


def _replay_events(arguments: argparse.Namespace) -> int:
    """Run the command and return 0. Raises StartError, or StopError if it stops before the end."""
    started_s = time.monotonic()
    url, query = target_url(arguments.to, "--to"), flag_query(arguments)
    require_httpx("replay")
    with closing(open_stored(arguments.db, arguments.environment)) as conn:
        target = None if arguments.dry_run else _target(arguments, url)
        file = _open_progress(arguments, conn, url)
        if target is None:
            say(_dry_run(conn, query, file.progress, arguments))
            return 0
        replay = _Replay(arguments, file)
        try:
            with progress_bar(lambda: _events_left(conn, query, file.progress), "event") as advance:
                asyncio.run(until_sigterm(replay.run(conn, query, target, advance)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            accepted = f"{plural(file.progress.accepted, 'event')} are accepted ({file.progress.position})"
            again = f"{_same_command(arguments)} continues from there"
            raise StopError(f"interrupted; {accepted}{replay.aside_note}; {again}") from None
        elsewhere = "" if replay.sent else no_events_hint(conn, arguments.environment)
    say(f"{replay.summary}; {time.monotonic() - started_s:.1f} s{elsewhere}")
    return 0


def _batch_size(text: str) -> int:
    if (size := positive(int)(text)) > MAX_BATCH:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_BATCH}, got {text!r}")
    return size


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `replay`."""
    add_filter_flags(add)
    add("--to", metavar="URL", required=True, help="base URL of the API, like https://us.api.flexprice.io/v1")
    add("--api-key", metavar="KEY", help="key for that API; else FLEXPRICE_API_KEY")
    add("--batch-size", type=_batch_size, default=500, help=f"events per request, at most {MAX_BATCH}")
    add("--concurrency", type=positive(int), default=4, help="requests at the same time")
    add("--give-up-after-s", type=positive(float), default=600.0, help="stop when no batch was accepted for this long")
    add("--max-event-bytes", metavar="N", type=positive(int), default=MAX_EVENT_BYTES, help="longest event that "
        "is sent, by its size in FlexPrice's queue; longer ones go to the file of refused events")  # fmt: skip
    add("--everything", action="store_true", help="the target is not FlexPrice: also send what FlexPrice would lose")
    add("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    add("--restart", action="store_true", help="start over instead of continuing where the last run stopped")


def run(arguments: argparse.Namespace) -> int:
    """Run `eventstore replay` and return its exit status. Raises StartError."""
    return run_job(_replay_events, arguments)
