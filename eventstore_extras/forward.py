"""Events sent on to FlexPrice or another eventstore: `eventstore replay`, and `serve --forward-to`."""

from __future__ import annotations

import argparse
import asyncio
import bisect
import email.utils
import hashlib
import importlib.util
import itertools
import json
import logging
import os
import random
import re
import socket
import sqlite3
import sys
import time
import urllib.parse
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from datetime import datetime
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import msgspec
from msgspec import Struct, structs
from msgspec.structs import replace

from eventstore import (
    ENCODER,
    EVENT_FILTERS,
    IN_ENVIRONMENT,
    MAX_BATCH,
    MINUTE_US,
    AddFlag,
    ApiError,
    Cursor,
    EventQuery,
    Outbox,
    Row,
    Service,
    StartError,
    T,
    __version__,
    all_of,
    check_key,
    connect_reader,
    excerpt,
    in_range,
    list_events,
    log,
    matching,
    plural,
    positive,
    quoted,
    say,
    sql,
    to_datetime,
)
from eventstore_extras.entries import ExportedEvent, exported_event
from eventstore_extras.files import progress_bar, sync_folder, whole_file
from eventstore_extras.job import StopError, run_job, until_sigterm
from eventstore_extras.stored import (
    StoredRow,
    add_filter_flags,
    flag_query,
    no_events_hint,
    open_stored,
    select_rows,
    stored_events,
)

# ---------------------------------------------------------------------------------------------- sending

BATCH_BYTES = 10_000_000  # what FlexPrice recommends at most
STALL_TIMEOUT_S = 60.0  # without a byte from the target
REQUEST_TIMEOUT_S = 300.0  # a slow line takes 80 s for 10 MB
ANSWER_BYTES = 64 * 1024  # what is read of an answer
MAX_MESSAGE_CHARS = 300
BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 30.0
RETRY_AFTER_CAP_S = 3600.0  # some ask for years
MOST_BREAKS = 2  # in one batch, before it is sent in parts: a bad line breaks some, whatever their size
GROW_AFTER = 20  # parts that were accepted: where there is a limit, to try for more costs three requests
SAVE_INTERVAL_S = 0.5  # a crash sends the batches of so long again


class Batch(NamedTuple):
    rows: list[StoredRow]
    events: list[bytes]  # the same, as they are sent

    @property
    def body(self) -> bytes:
        return b'{"events":[' + b",".join(self.events) + b"]}"

    def part(self, start: int, end: int | None = None) -> Batch:
        return Batch(self.rows[start:end], self.events[start:end])

    def first(self, most_bytes: int) -> Batch:
        """As many of its first events as fit, and one at least."""
        ends = list(itertools.accumulate(len(event) + 1 for event in self.events))
        return self.part(0, max(bisect.bisect_right(ends, most_bytes), 1))


def batches(pages: Iterable[list[StoredRow]], batch_size: int) -> Iterator[Batch]:
    """For /events/bulk, of at most so many events, and of 10 MB unless one event is longer."""
    batch, size = Batch([], []), 0
    for row in itertools.chain.from_iterable(pages):
        event = ENCODER.encode(exported_event(row[1]))
        if batch.rows and (len(batch.rows) == batch_size or size + len(event) > BATCH_BYTES):
            yield batch
            batch, size = Batch([], []), 0
        batch.rows.append(row)
        batch.events.append(event)
        size += len(event) + 1
    if batch.rows:
        yield batch


class Outcome(Enum):
    """What became of a batch that was sent."""

    ACCEPTED = "it is the target's"
    AGAIN = "it may be accepted if it is sent again"
    BROKEN = "as AGAIN, but if it breaks off again and again, it may be too large"
    BLOCKED = "nothing is accepted until somebody mends something"
    TOO_LARGE = "as REFUSED, but fewer of its events may be accepted"
    REFUSED = "some event in it is refused"


class Answer(NamedTuple):
    outcome: Outcome
    problem: str = ""  # on one line, without the key
    retry_after_s: float = 0.0
    duplicates: int = 0  # of those accepted the target had so many

    def pause_s(self, attempt: int) -> float:
        """How long to wait before the batch is sent again: growing, by chance, and as long as the target asks for."""
        most_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(attempt, 16))
        return max(random.uniform(0, most_s), min(self.retry_after_s, RETRY_AFTER_CAP_S))  # noqa: S311


class Target:
    """The API that batches are sent to; `flag` and `key_source` say who named it and its key. To be entered and left.

    Nothing that it answers makes `post` fail, and no answer is longer than a line of a log.
    """

    def __init__(self, url: str, key: str, key_source: str, flag: str, connections: int = 1) -> None:
        import httpx  # noqa: PLC0415 - only the extra `cli` has it

        self.url = url
        self.bulk_url = bulk_url(url)
        self._key = key
        self._key_source = key_source
        self._flag = flag
        # Not compressed: of an answer in a few bytes that unpack to gigabytes only the start is read.
        headers = {"x-api-key": key, "content-type": "application/json", "accept-encoding": "identity",
                   "user-agent": f"eventstore/{__version__}"}  # fmt: skip
        limits = httpx.Limits(max_connections=connections)
        self._client = httpx.AsyncClient(headers=headers, timeout=STALL_TIMEOUT_S, limits=limits)

    async def __aenter__(self) -> Target:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    async def post(self, body: bytes) -> Answer:
        import httpx  # noqa: PLC0415 - only the extra `cli` has it

        status, headers, start = 0, httpx.Headers(), b""
        outcome, problem = Outcome.AGAIN, ""
        try:
            async with (
                asyncio.timeout(REQUEST_TIMEOUT_S),
                self._client.stream("POST", self.bulk_url, content=body) as response,
            ):
                status, headers = response.status_code, response.headers
                async for chunk in response.aiter_raw():
                    start += chunk
                    if len(start) > ANSWER_BYTES:
                        break
        except httpx.InvalidURL as error:
            return Answer(Outcome.BLOCKED, f"{self.bulk_url} is no URL: {error}")
        except (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError) as error:
            reason = str(error) or type(error).__name__
            outcome, problem = Outcome.BROKEN, f"broke off a request of {len(body):,} bytes: {reason}"
        except (httpx.RequestError, TimeoutError) as error:
            problem = f"cannot be reached: {str(error) or type(error).__name__}"
        if status:  # what came after it, or did not come, does not count
            return self._answer(status, headers, start)
        return Answer(outcome, self._line(problem))

    def _answer(self, status: int, headers: Mapping[str, str], start: bytes) -> Answer:
        if status == 202:
            duplicates = headers.get("x-events-duplicate", "")
            return Answer(Outcome.ACCEPTED, duplicates=int(duplicates) if re.fullmatch("[0-9]{1,9}", duplicates) else 0)
        problem = f"answered {status}: {answer_message(start)}"
        if status == 401:
            problem += f" (the key came from {self._key_source})"
        if status < 400:
            location = headers.get("location", "")
            where = f" It redirects to {quoted(location)}, where the key is not sent." if location else ""
            problem += f" - 202 was expected.{where} Is {self._flag} the URL of the API?"
        return Answer(outcome_of(status), self._line(problem), retry_after_s(headers.get("retry-after", "")))

    def _line(self, text: str) -> str:
        """One line of a log, whatever the target says; some echo the key."""
        printable = "".join(char if char.isprintable() else " " for char in text.replace(self._key, "***"))
        return f"{self.bulk_url} {' '.join(printable.split())}"


class Sender:
    """Sends batches until the target has accepted or refused them, in parts while it takes only smaller ones."""

    def __init__(self, target: Target, wait: Callable[[Answer, int], Awaitable[None]]) -> None:
        self._target = target
        self._wait = wait  # until events may be sent again that have waited so many times before; or it fails
        self._most_bytes = BATCH_BYTES
        self._accepted = 0  # parts, since that changed

    async def send_first(self, batch: Batch) -> tuple[Batch, Answer]:
        """As many of its first events as the target takes at a time, one at least, and what it said to them: ACCEPTED,
        REFUSED, or to one alone TOO_LARGE."""
        waits = breaks = 0
        while True:
            part = batch.first(self._most_bytes)
            answer = await self._target.post(part.body)
            if answer.outcome is Outcome.TOO_LARGE and len(part.rows) > 1:
                self._shrink(part)
                continue
            if answer.outcome in (Outcome.ACCEPTED, Outcome.REFUSED, Outcome.TOO_LARGE):
                self._grow(answer)
                return part, answer
            breaks += answer.outcome is Outcome.BROKEN
            if answer.outcome is Outcome.BROKEN and breaks > MOST_BREAKS and len(part.rows) > 1:
                self._shrink(part)
            await self._wait(answer, waits)  # longer each time: a proxy before a target that is away breaks off, too
            waits += 1

    def _shrink(self, part: Batch) -> None:
        self._most_bytes = min(self._most_bytes, len(part.body) // 2)  # others under way may have come to less
        self._accepted = 0

    def _grow(self, answer: Answer) -> None:
        self._accepted += answer.outcome is Outcome.ACCEPTED
        if self._accepted >= GROW_AFTER:
            self._most_bytes = min(self._most_bytes * 2, BATCH_BYTES)
            self._accepted = 0


def bulk_url(url: str) -> str:
    return f"{url}/events/bulk"


def outcome_of(status: int) -> Outcome:
    if status in (400, 413, 422):
        return Outcome.TOO_LARGE if status == 413 else Outcome.REFUSED
    return Outcome.AGAIN if status in (408, 429) or status >= 500 else Outcome.BLOCKED


def retry_after_s(text: str) -> float:
    """What a Retry-After header asks for: a number of seconds or a date; 0 if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    with suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


def answer_message(content: bytes) -> str:
    """What an error answer says: of this server or FlexPrice the message, else the start of the body."""
    text = excerpt(content)
    with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
        body = json.loads(content)
        error = body.get("error")
        text = body.get("message") or (error["message"] if isinstance(error, dict) else error) or text
        text = f"{text} ({body['details']['errors'][0]['message']})"
    return str(text)[:MAX_MESSAGE_CHARS]


def target_url(text: str, flag: str) -> str:
    """The base URL of an API, ending in /v1. StartError."""
    try:
        parts = urllib.parse.urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        valid = valid and (parts.port is None or parts.port > 0) and not re.search(r"\s", text.strip())
    except ValueError:
        valid = False
    if not valid:
        example = "https://us.api.flexprice.io/v1 or http://host:8080"
        raise StartError(f"{flag} must be a URL like {example}, got {quoted(text)}")
    if "@" in parts.netloc:
        raise StartError(
            f"{flag} must not hold a user or a password before {quoted(parts.hostname or '')}: logs show it"
        )
    url = text.strip().rstrip("/")
    segments = parts.path.rstrip("/").removesuffix("/v1").split("/")
    if any(re.fullmatch(r"v\d.*|events", segment, re.IGNORECASE) for segment in segments):
        raise StartError(f"{flag} must be the base URL, with or without /v1 at its end, got {quoted(text)}")
    return url if url.endswith("/v1") else f"{url}/v1"


def need_httpx(purpose: str) -> None:
    if importlib.util.find_spec("httpx") is None:
        raise StartError(
            f"{purpose} needs httpx: {sys.executable} -m pip install httpx tqdm (or '.[cli]' in the clone)"
        )


def progress_file(db: str, kind: str, identity: Any) -> Path:
    """Where the progress of a replay or of forwarding is kept: for each identity a file of its own."""
    return Path(f"{db}.{kind}-{hashlib.sha256(ENCODER.encode(identity)).hexdigest()[:16]}.json")


class Progress(Struct, kw_only=True):
    """How far it is sure, as the file beside the database holds it."""

    target: str
    environment: str
    last_seq: int = 0  # of the last event that is accepted or put aside, by which the database is known again
    last_id: str = ""
    accepted: int = 0


P = TypeVar("P", bound=Progress)
NEWEST_SEQ = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'"
ARRIVED = "seq > :after AND seq <= :last"


def save_progress(path: Path, progress: Progress) -> None:
    with whole_file(path, f"cannot keep the progress in {path}", "make room for it") as file:
        file.write(ENCODER.encode(progress) + b"\n")


def read_progress(path: Path, decoder: msgspec.json.Decoder[P], again: str) -> P:
    """StartError says how to begin again if the file is damaged."""
    try:
        return decoder.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError) as error:
        raise StartError(f"cannot read how far sending is in {path}: {error}; {again}") from error


def check_database(conn: sqlite3.Connection, path: Path, progress: Progress, seq: int, again: str) -> None:
    """StartError if the progress, which is as far as seq, is of another database. An event that was deleted since makes
    none: what comes after the place is found without it."""
    found = conn.execute("SELECT id FROM events WHERE seq = ?", [progress.last_seq]).fetchone()
    if max(seq, progress.last_seq) > newest_seq(conn) or (found and found[0] != progress.last_id):
        raise StartError(f"{path} is of another database of that name, or of a newer state of this one: {again}")


def newest_seq(conn: sqlite3.Connection) -> int:
    """Of the event that came last, which may have been deleted since: its number is not used again."""
    return int(conn.execute(NEWEST_SEQ).fetchone()[0])


# ---------------------------------------------------------------------------------------------- replay

SAY_INTERVAL_S = 30.0  # between two lines that say why it does not go on


def arrived_events(conn: sqlite3.Connection, query: EventQuery, after: int, last: int) -> Iterator[list[StoredRow]]:
    """The events that match with a seq in (after, last], in the order in which they were stored, in pages."""
    while True:
        where = all_of([matching(query), in_range(query), sql(ARRIVED, after=after, last=last)])
        page = select_rows(conn, sql(f"NOT INDEXED WHERE {where} ORDER BY seq", where))
        if not page:
            return
        yield page
        after = page[-1][0]


class ReplayProgress(Progress, kw_only=True):
    filters: dict[str, str | None]
    arrived: int  # the newest seq when the replay began; what came later is sent in the order in which it came
    cursor: Cursor | None = None  # everything up to it is accepted, in (timestamp, id) order
    is_caught_up: bool = False  # the pass in (timestamp, id) order is done

    @property
    def place(self) -> str:
        cursor = self.cursor.text if self.cursor else "at the start"
        return f"cursor {cursor}{f', row {self.arrived}' if self.is_caught_up else ''}"


REPLAY_PROGRESS = msgspec.json.Decoder(ReplayProgress)


class RefusedError(Exception):
    """There is no sense in sending a batch again, or this part of it."""

    def __init__(self, problem: str, part: Batch | None = None) -> None:
        super().__init__(problem)
        self.part = part


class Replay:
    """Sends batches, several at a time, and notes up to where all of them were accepted."""

    def __init__(self, arguments: argparse.Namespace, progress: ReplayProgress, path: Path) -> None:
        self._arguments = arguments
        self._path = path
        self._saved_s = 0.0
        self._said_s = -SAY_INTERVAL_S
        self._success_s = time.monotonic()
        self._pending: deque[tuple[Batch, asyncio.Task[None]]] = deque()
        self.progress = progress
        self.sent = self.accepted = self.retried = self.known = 0

    async def run(
        self, conn: sqlite3.Connection, query: EventQuery, key: str, advance: Callable[[int], object]
    ) -> None:
        """StopError if a batch is refused, or none is accepted for too long."""
        concurrency = self._arguments.concurrency
        source = replay_key_source(self._arguments.api_key)
        async with Target(self.progress.target, key, source, "--to", concurrency) as target:
            sender = Sender(target, self._wait)
            try:
                for pages in self.passes(conn, query):
                    for batch in batches(pages, self._arguments.batch_size):
                        if len(self._pending) == concurrency:
                            advance(await self._settle_oldest())
                        self._pending.append((batch, asyncio.create_task(self._send(sender, batch))))
                    while self._pending:
                        advance(await self._settle_oldest())
            finally:
                tasks = [task for _, task in self._pending]
                for task in tasks:
                    task.cancel()
                await asyncio.gather(*tasks, return_exceptions=True)
                if self.progress.accepted or self._path.exists():
                    self.save()

    def passes(self, conn: sqlite3.Connection, query: EventQuery) -> Iterator[Iterator[list[StoredRow]]]:
        """First what there is, oldest first; then what was stored since the replay began, which may be older than the
        cursor."""
        progress = self.progress
        if not progress.is_caught_up:
            yield stored_events(conn, replace(query, after=progress.cursor))
        progress.is_caught_up = True
        newest = newest_seq(conn)
        yield arrived_events(conn, query, progress.arrived, newest)
        progress.arrived = newest

    async def _settle_oldest(self) -> int:
        batch, task = self._pending[0]
        try:
            await task
        except RefusedError as refusal:
            rows = (refusal.part or batch).rows
            ids = f"from {quoted(rows[0][1].id)} to {quoted(rows[-1][1].id)}"
            batch_ids = f"the batch of {plural(len(rows), 'event')} {ids}"
            sure = f"everything before it is accepted ({self.progress.place})"
            again = f"when that is mended, {again_command(self._arguments)} goes on from there"
            raise StopError(f"{refusal}; it is {batch_ids}; {sure}; {again}") from None
        self._pending.popleft()
        seq, last = batch.rows[-1]
        self.progress.accepted += len(batch.rows)
        self.progress.last_seq, self.progress.last_id = seq, last.id
        if self.progress.is_caught_up:
            self.progress.arrived = seq
        else:
            self.progress.cursor = Cursor(last.timestamp_us, last.id)
        if time.monotonic() - self._saved_s > SAVE_INTERVAL_S:
            self.save()
        return len(batch.rows)

    def save(self) -> None:
        save_progress(self._path, self.progress)
        self._saved_s = time.monotonic()

    async def _send(self, sender: Sender, batch: Batch) -> None:
        """Until it is accepted. RefusedError."""
        self.sent += len(batch.rows)
        while batch.rows:
            part, answer = await sender.send_first(batch)
            if answer.outcome is not Outcome.ACCEPTED:
                raise RefusedError(answer.problem, part)
            self._success_s = time.monotonic()
            self.accepted += len(part.rows)
            self.known += answer.duplicates
            batch = batch.part(len(part.rows))

    async def _wait(self, answer: Answer, waits: int) -> None:
        """RefusedError."""
        if answer.outcome is Outcome.BLOCKED:
            raise RefusedError(answer.problem)
        wait_s, limit_s = answer.pause_s(waits), self._arguments.give_up_after_s
        if time.monotonic() + wait_s - self._success_s > limit_s:
            given_up = f"given up, no batch was accepted for {limit_s:g} s (--give-up-after-s)"
            raise RefusedError(f"{given_up}: {answer.problem}")
        self.retried += 1
        if time.monotonic() > self._said_s + SAY_INTERVAL_S:
            self._said_s = time.monotonic()
            say(f"{answer.problem}; trying again, for at most {limit_s:g} s without success")
        await asyncio.sleep(wait_s)


def load_progress(arguments: argparse.Namespace, conn: sqlite3.Connection, target: str) -> tuple[ReplayProgress, Path]:
    """The progress of the same replay, if it ran before, and its file. StartError."""
    filters = {name: getattr(arguments, name) for name in EVENT_FILTERS}
    environment, arrived = arguments.environment, newest_seq(conn)
    path = progress_file(arguments.db, "replay", [target, environment, filters])
    if arguments.restart or not path.exists():
        return ReplayProgress(target=target, environment=environment, filters=filters, arrived=arrived), path
    again = "with --restart all events are sent again, which does no harm"
    progress = read_progress(path, REPLAY_PROGRESS, again)
    check_database(conn, path, progress, progress.arrived, again)
    if progress.accepted:
        accepted = plural(progress.accepted, "event")
        say(f"going on at {progress.place}: {accepted} were accepted before (--restart starts over)")
    return progress, path


def replay_events(arguments: argparse.Namespace) -> int:
    """`eventstore replay`: 0, or StopError."""
    started_s = time.monotonic()
    target = target_url(arguments.to, "--to")
    query = flag_query(arguments)
    need_httpx("replay")
    with closing(open_stored(arguments.db)) as conn:
        progress, path = load_progress(arguments, conn, target)
        replay = Replay(arguments, progress, path)
        if arguments.dry_run:
            say(would_send(conn, query, replay, arguments))
            return 0
        key = replay_key(arguments.api_key, os.environ)
        try:
            with progress_bar(lambda: events_left(conn, query, progress), "event") as advance:
                asyncio.run(until_sigterm(replay.run(conn, query, key, advance)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            sure = f"{plural(progress.accepted, 'event')} are accepted ({progress.place})"
            raise StopError(f"interrupted; {sure}; {again_command(arguments)} goes on from there") from None
        elsewhere = "" if replay.sent else no_events_hint(conn, arguments.environment)
    known = f" ({replay.known:,} of them it had)" if replay.known else ""
    counts = f"sent {plural(replay.sent, 'event')}: {replay.accepted:,} accepted{known}, {replay.retried:,} retried"
    say(f"{counts}; {time.monotonic() - started_s:.1f} s{elsewhere}")
    return 0


def would_send(conn: sqlite3.Connection, query: EventQuery, replay: Replay, arguments: argparse.Namespace) -> str:
    every = (batches(pages, arguments.batch_size) for pages in replay.passes(conn, query))
    sizes = [len(batch.rows) for batch in itertools.chain.from_iterable(every)]
    would = f"{plural(sum(sizes), 'event')} in {plural(len(sizes), 'request')} to {bulk_url(replay.progress.target)}"
    elsewhere = "" if sizes else no_events_hint(conn, arguments.environment)
    return f"would send {would}; nothing was sent{elsewhere}"


def again_command(arguments: argparse.Namespace) -> str:
    return f"the same command{' without --restart' if arguments.restart else ''}"


def events_left(conn: sqlite3.Connection, query: EventQuery, progress: ReplayProgress) -> int | None:
    """How many events a progress bar has before it, if that can be told quickly."""
    if progress.is_caught_up:
        return None
    start_us = progress.cursor.timestamp_us if progress.cursor else query.start_us
    return list_events(conn, replace(query, start_us=start_us)).total_count or 0


def replay_key_source(flag: str | None) -> str:
    return "--api-key" if flag else "FLEXPRICE_API_KEY"


def replay_key(flag: str | None, environ: Mapping[str, str]) -> str:
    key = flag or environ.get("FLEXPRICE_API_KEY", "").strip()
    if not key:
        raise StartError("no API key for the target: set FLEXPRICE_API_KEY, or give it with --api-key")
    return check_key(key, f"{replay_key_source(flag)}: ")


# ---------------------------------------------------------------------------------------------- forwarding

BLOCKED_PAUSE_S = 30.0
GRACE_S = 2.0  # for the request under way when the server stops; less than TASK_TIMEOUT_S
WATCH_INTERVAL_S = 5.0
BEHIND_EVENTS, BEHIND_S = 10_000, 60.0
START_S = 15.0  # after a start, in which many events that came before it are no news
REMOVE_IT = "remove it, and all events are sent again, which does no harm"
SPAN = 100_000  # rows that one query looks at: those of another environment are passed over


class ForwardProgress(Progress, kw_only=True):
    seq: int = 0  # all events up to it are accepted or put aside, or of another environment
    refused: int = 0
    late_s: int = 0  # how long servers have had time to send the first that waits


FORWARD_PROGRESS = msgspec.json.Decoder(ForwardProgress)


class RefusedEvent(ExportedEvent):
    """A line of the file of refused events: an event, and what else is ignored by whoever takes one."""

    refused_at: datetime
    refused_by: str
    refusal: str


class Page(NamedTuple):
    """The next events of an environment."""

    batch: Batch | None
    through: int  # the seq up to which nothing else has to be sent
    has_more: bool  # than is in it: no need to wait until it is full


BACKLOG = f"""SELECT count(*), min(ingested_at_us), ({NEWEST_SEQ})
    FROM events NOT INDEXED WHERE {IN_ENVIRONMENT} AND {ARRIVED}"""


def next_page(conn: sqlite3.Connection, environment: str, after: int) -> Page:
    newest = newest_seq(conn)  # first: what is committed meanwhile comes with the next page
    last = min(newest, after + SPAN)
    text = f"NOT INDEXED WHERE {IN_ENVIRONMENT} AND {ARRIVED} ORDER BY seq"
    rows = select_rows(conn, sql(text, environment=environment, after=after, last=last))
    batch = next(batches([rows], MAX_BATCH), None)
    if batch is None:
        return Page(None, max(last, after), last < newest)
    is_full = len(batch.rows) == MAX_BATCH or len(batch.rows) < len(rows) or len(batch.events[0]) >= BATCH_BYTES
    return Page(batch, batch.rows[-1][0], is_full or last < newest)


def backlog(conn: sqlite3.Connection, environment: str, after: int) -> tuple[int, int]:
    """How many events wait, and when the first was stored. Among more than 100,000 newer ones it counts those of other
    environments and the numbers that are not used, too: an exact count of ten million takes too long."""
    parameters = {"environment": environment, "after": after, "last": after + SPAN}
    count, oldest_us, newest = conn.execute(BACKLOG, parameters).fetchone()
    return count + max(newest - after - SPAN, 0), oldest_us or 0


class StoppingError(Exception):
    """The server stops: nothing more is sent."""


class Forwarder:
    """Sends an environment's events on, in the order in which they were stored, one batch at a time, for ever."""

    def __init__(
        self, service: Service, target: Target, progress: ForwardProgress, path: Path, interval_s: float
    ) -> None:
        self._store = service.store
        self._clock = service.settings.clock
        self._started_us = self._clock()
        self._target = target
        self._sender = Sender(target, self._wait)
        self._path = path
        self._interval_s = interval_s
        self._late_before_s = progress.late_s
        self._saving = asyncio.Lock()
        self._is_saved = True
        self._saved_s = 0.0
        self._said_us = -MINUTE_US
        self._stopping = asyncio.Event()
        self.progress = progress
        self.is_behind = False
        self.host = urllib.parse.urlsplit(target.url).netloc

    async def run(self) -> None:
        """Until it is cancelled: what is under way then has two seconds, and progress is saved."""
        work = asyncio.create_task(self._work())
        watch = asyncio.create_task(self._watch())
        try:
            await asyncio.shield(work)
        except asyncio.CancelledError:
            self._stopping.set()
            await asyncio.wait([work], timeout=GRACE_S)
        finally:
            for task in (work, watch):  # one after the other: each may be writing the progress
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)

    async def behind(self) -> int:
        """How many events are stored and not accepted; of more than 100,000 see `backlog`."""
        return (await self._look(backlog))[0]

    def behind_now(self) -> int:
        """The same for any thread, also while the server is not running."""
        with closing(connect_reader(self._store.path)) as conn:
            return backlog(conn, self.progress.environment, self.progress.seq)[0]

    async def _work(self) -> None:
        try:
            async with self._target:
                while True:
                    try:
                        await self._turn()
                    except StoppingError:
                        return
                    except Exception:  # a bug, or a database that cannot be read: the rest of the server goes on
                        log.exception("forwarding failed; trying again")
                        await asyncio.sleep(BLOCKED_PAUSE_S)
        finally:
            await self._save()

    async def _turn(self) -> None:
        """Send the next batch, once it is full or has waited for more."""
        page = await self._look(next_page)
        if not page.has_more:
            await self._save_now_and_then()
            await self._pause(self._interval_s)
            page = await self._look(next_page)
        if page.batch:
            await self._deliver(page.batch)
        self.progress.seq = page.through

    async def _look(self, read: Callable[..., T]) -> T:
        """At what comes after the place that is sure."""
        place = {"environment": self.progress.environment, "after": self.progress.seq}
        return await self._store.read(partial(read, **place), quick=False)

    async def _deliver(self, batch: Batch) -> None:
        """Until the target has accepted it; what it refuses is put aside, event by event."""
        while batch.rows:
            self._end_if_stopping()
            part, answer = await self._sender.send_first(batch)
            batch = batch.part(len(part.rows))
            if answer.outcome is not Outcome.ACCEPTED and len(part.rows) > 1:
                middle = len(part.rows) // 2
                await self._deliver(part.part(0, middle))
                await self._deliver(part.part(middle))
                continue
            if answer.outcome is Outcome.ACCEPTED:
                self.progress.accepted += len(part.rows)
            else:
                await self._put_aside(part.rows[0][1], answer.problem)
            self.progress.seq, last = part.rows[-1]
            self.progress.last_seq, self.progress.last_id = self.progress.seq, last.id
            self._is_saved = False
            await self._save_now_and_then()

    async def _wait(self, answer: Answer, waits: int) -> None:
        """StoppingError as soon as the server stops."""
        if answer.outcome is Outcome.BLOCKED:
            every = f"trying again every {BLOCKED_PAUSE_S:g} s"
            self._say(logging.ERROR, f"{answer.problem}; nothing is forwarded until that is mended, {every}")
            await self._pause(BLOCKED_PAUSE_S)
        else:
            self._say(logging.WARNING, f"{answer.problem}; trying again")
            await self._pause(answer.pause_s(waits))

    async def _pause(self, seconds: float) -> None:
        """StoppingError as soon as the server stops."""
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()
        self._end_if_stopping()

    def _end_if_stopping(self) -> None:
        """StoppingError."""
        if self._stopping.is_set():
            raise StoppingError

    def _say(self, level: int, message: str) -> None:
        """Once a minute at most: a target may be away for a week."""
        now = self._clock()
        if abs(now - self._said_us) >= MINUTE_US:  # or the clock was put back
            self._said_us = now
            log.log(level, "forwarding: %s", message)

    async def _put_aside(self, row: Row, problem: str) -> None:
        """Write a refused event into its file, which is on the disk before the event is passed over."""
        path = refused_file(self._store.path)
        refused = RefusedEvent(**structs.asdict(exported_event(row)), refused_at=to_datetime(self._clock()),
                               refused_by=self._target.url, refusal=problem)  # fmt: skip
        while True:
            try:
                await asyncio.to_thread(append_line, path, ENCODER.encode(refused) + b"\n")
                break
            except OSError as error:
                reason = f"the refused event {quoted(row.id)} cannot be written to {path}: {error.strerror or error}"
                self._say(logging.ERROR, f"{reason}; make room for it, nothing is forwarded until then")
                await self._pause(BLOCKED_PAUSE_S)
        self.progress.refused += 1
        log.error("forwarding: event %s is refused and was written to %s: %s", quoted(row.id), path, problem)

    async def _save_now_and_then(self) -> None:
        if not self._is_saved and time.monotonic() - self._saved_s > SAVE_INTERVAL_S:
            await self._save()

    async def _save(self) -> None:
        async with self._saving:
            progress = replace(self.progress)
            try:
                await asyncio.to_thread(save_progress, self._path, progress)
                self._is_saved = progress == self.progress
            except StopError as error:  # what is not noted is sent again, which does no harm
                self._say(logging.ERROR, str(error))
            self._saved_s = time.monotonic()

    async def _watch(self) -> None:
        """Say when it falls behind, and when it has caught up."""
        while True:
            with suppress(ApiError):
                self._judge(*await self._look(backlog))
            await self._save_now_and_then()
            await asyncio.sleep(WATCH_INTERVAL_S)

    def _judge(self, events: int, oldest_us: int) -> None:
        """What waited while no server ran is no news: the time counts from the start, and from earlier starts if those
        servers left something late."""
        now = self._clock()
        running_s = self._late_before_s + (now - self._started_us) / 1e6
        waited_s = (now - oldest_us) / 1e6 - self._interval_s if events else 0.0
        late_s = min(waited_s, running_s)
        if self.progress.late_s != (seconds := max(int(late_s), 0)):
            self.progress.late_s, self._is_saved = seconds, False
        has_many = events > BEHIND_EVENTS and running_s >= START_S
        if not self.is_behind and (has_many or late_s > BEHIND_S):
            self.is_behind = True
            waiting = f"{plural(events, 'event')} wait, the first for {waited_s:.0f} s"
            log.warning("forwarding to %s has fallen behind: %s", self.host, waiting)
        elif self.is_behind and events <= MAX_BATCH and waited_s <= BEHIND_S:
            self.is_behind = False
            log.info("forwarding to %s has caught up", self.host)


def refused_file(db: str) -> Path:
    return Path(f"{db}.refused.ndjson")


def append_line(path: Path, line: bytes) -> None:
    """Add a line to a file, which is on the disk then."""
    is_new = not path.exists()
    with open(path, "ab+") as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"\n" * (file.read() != b"\n"))  # a power cut left half a line, which would spoil this one
        file.write(line)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path)


def read_forward_progress(path: Path) -> ForwardProgress:
    """StartError says what to do with a damaged file."""
    return read_progress(path, FORWARD_PROGRESS, REMOVE_IT)


def load_forward_progress(
    conn: sqlite3.Connection, db: str, target: str, environment: str
) -> tuple[ForwardProgress, Path]:
    """How far forwarding came before, and the file that says so. StartError."""
    path = progress_file(db, "forward", [target, environment])
    if not path.exists():
        return ForwardProgress(target=target, environment=environment), path
    progress = read_forward_progress(path)
    check_database(conn, path, progress, progress.seq, REMOVE_IT)
    return progress, path


def is_own_address(url: str, listening: tuple[Any, ...]) -> bool:
    """Whether a URL leads to this very server."""
    parts = urllib.parse.urlsplit(url)
    if (parts.port or {"http": 80, "https": 443}[parts.scheme]) != listening[1]:
        return False
    addresses = set()
    with suppress(OSError):
        addresses = {found[4][0] for found in socket.getaddrinfo(parts.hostname, None)}
    if listening[0] not in ("0.0.0.0", "::"):  # noqa: S104
        return listening[0] in addresses
    return any(is_of_this_machine(str(address)) for address in addresses)


def is_of_this_machine(address: str) -> bool:
    with suppress(OSError), socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as sock:
        sock.bind((address, 0))
        return True
    return False


def forward(service: Service, target: Target, environment: str = "development", interval_s: float = 1.0) -> Forwarder:
    """From its start to its end a server sends an environment's events on. Before the start; StartError."""
    db = service.store.path
    with closing(connect_reader(db)) as conn:
        known = [name for (name,) in conn.execute("SELECT name FROM environments ORDER BY name")]
        if environment not in known:
            there = f"no key and no event has that environment, there are {', '.join(known)}"
            raise StartError(f"--forward-environment is {quoted(environment)}: {there}")
        progress, path = load_forward_progress(conn, db, target.url, environment)
        events, _ = backlog(conn, environment, progress.seq)
    try:
        save_progress(path, progress)  # before anything is deleted: it says that nothing was sent
    except StopError as error:
        raise StartError(str(error)) from error
    forwarder = Forwarder(service, target, progress, path, interval_s)
    service.outboxes[environment] = Outbox(forwarder.host, forwarder.behind)
    service.tasks.append(forwarder.run)
    service.notices.append(f"forwards to  {target.url}, environment {environment} ({plural(events, 'event')} behind)")
    return forwarder


def attach(service: Service, arguments: argparse.Namespace, listening: tuple[Any, ...]) -> None:
    """`serve --forward-to URL`. StartError."""
    url = target_url(arguments.forward_to, "--forward-to")
    need_httpx("--forward-to")
    if is_own_address(url, listening):
        raise StartError(f"--forward-to {url} is this server itself: name the one that its events shall go to")
    names = ("EVENTSTORE_FORWARD_API_KEY", "FLEXPRICE_API_KEY")
    source = next((name for name in names if os.environ.get(name, "").strip()), None)
    if source is None:
        raise StartError(f"no API key for --forward-to: set {' or '.join(names)} to the key there")
    for name in ("httpx", "httpcore"):  # they have a line for each request
        logging.getLogger(name).setLevel(logging.WARNING)
    key = check_key(os.environ[source].strip(), f"{source}: ")
    target = Target(url, key, source, "--forward-to")
    forward(service, target, arguments.forward_environment, arguments.forward_interval_ms / 1000)


# ---------------------------------------------------------------------------------------------- flags


def add_flags(_: str, add: AddFlag) -> None:
    """The flags of `replay`."""
    add_filter_flags(add)
    add("--to", metavar="URL", required=True, help="the base URL of the API, like https://us.api.flexprice.io/v1")
    add("--api-key", metavar="KEY", help="the key there; else FLEXPRICE_API_KEY")
    add("--batch-size", type=batch_size, default=500, help=f"events a request, at most {MAX_BATCH}")
    add("--concurrency", type=positive(int), default=4, help="requests under way at a time")
    add("--give-up-after-s", type=positive(float), default=600.0, help="stop when no batch was accepted for so long")
    add("--dry-run", action="store_true", help="say what would be sent, and send nothing")
    add("--restart", action="store_true", help="start over, not where the last run stopped")


def batch_size(text: str) -> int:
    if (size := positive(int)(text)) > MAX_BATCH:
        raise argparse.ArgumentTypeError(f"must be 1 to {MAX_BATCH}, got {text!r}")
    return size


def run(arguments: argparse.Namespace) -> int:
    """`eventstore replay`: its exit status. StartError."""
    return run_job(replay_events, arguments)
