"""Events sent on to FlexPrice or another eventstore: `eventstore replay`."""

from __future__ import annotations

import argparse
import asyncio
import email.utils
import hashlib
import importlib.util
import itertools
import os
import random
import re
import signal
import sqlite3
import sys
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import closing, suppress
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import msgspec
from msgspec import Struct
from msgspec.structs import replace

from eventstore import (
    ENCODER,
    END_CLAUSE,
    EVENT_FILTERS,
    MAX_BATCH,
    SELECT_NAME,
    START_CLAUSE,
    AddFlag,
    Cursor,
    EventQuery,
    FieldError,
    Parameters,
    StartError,
    __version__,
    check_key,
    counted,
    echo,
    excerpt,
    filter_clauses,
    list_events,
    parse_cursor,
    positive,
    say,
)
from eventstore_extras.job import StopError, run_job
from eventstore_extras.transfer import (
    StoredRow,
    add_filter_flags,
    exported_event,
    flag_query,
    open_stored,
    other_environments,
    progress_bar,
    select_rows,
    stored_events,
    whole_file,
)

if TYPE_CHECKING:
    import httpx

NEWEST_SEQ = "SELECT coalesce(max(seq), 0) FROM events"


def arrived_events(conn: sqlite3.Connection, query: EventQuery, after: int, last: int) -> Iterator[list[StoredRow]]:
    """The events that match with a seq in (after, last], in the order in which they were stored, in pages."""
    while True:
        parameters: Parameters = {"after": after, "last": last}
        clauses = [*filter_clauses(query, parameters), START_CLAUSE, END_CLAUSE, "seq > :after", "seq <= :last"]
        page = select_rows(conn, f"NOT INDEXED WHERE {' AND '.join(clauses)} ORDER BY seq", parameters)
        if not page:
            return
        yield page
        after = page[-1][0]


BATCH_BYTES = 10_000_000  # what FlexPrice recommends at most
REQUEST_TIMEOUT_S = 60.0
BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 30.0
SAVE_INTERVAL_S = 0.5
SAY_INTERVAL_S = 30.0  # between two lines that say why it does not go on


class ReplayProgress(Struct):
    """How far a replay is sure, as the file beside the database holds it."""

    target: str
    environment: str
    filters: dict[str, str | None]
    arrived: int  # the newest seq when the replay began; what came later is sent in the order in which it came
    cursor: str | None = None  # everything up to it is accepted, in (timestamp, id) order
    is_caught_up: bool = False  # the pass in (timestamp, id) order is done
    accepted: int = 0

    @property
    def place(self) -> str:
        return f"cursor {self.cursor or 'at the start'}{f', row {self.arrived}' if self.is_caught_up else ''}"


PROGRESS = msgspec.json.Decoder(ReplayProgress)


class Batch(NamedTuple):
    body: bytes
    rows: list[StoredRow]


class RefusedError(Exception):
    """A batch that there is no sense in sending again."""


def target_url(text: str) -> str:
    """The base URL of an API, ending in /v1. StartError."""
    try:
        parts = urllib.parse.urlsplit(text.strip())
        valid = parts.scheme in ("http", "https") and parts.hostname and not (parts.query or parts.fragment)
        valid = valid and (parts.port is None or parts.port > 0) and not re.search(r"\s", text.strip())
    except ValueError:
        valid = False
    if not valid:
        example = "https://us.api.flexprice.io/v1 or http://host:8080"
        raise StartError(f"--to must be a URL like {example}, got {echo(text)}")
    url = text.strip().rstrip("/")
    if re.search(r"/v\d+/|/events", url):
        raise StartError(f"--to must be the base URL, with or without /v1 at its end, got {echo(text)}")
    return url if url.endswith("/v1") else f"{url}/v1"


def batches(pages: Iterable[list[StoredRow]], batch_size: int) -> Iterator[Batch]:
    """Bodies for /events/bulk of at most so many events, and of 10 MB unless one event is longer."""
    rows: list[StoredRow] = []
    events: list[bytes] = []
    size = 0
    for row in itertools.chain.from_iterable(pages):
        event = ENCODER.encode(exported_event(row[1]))
        if rows and (len(rows) == batch_size or size + len(event) > BATCH_BYTES):
            yield Batch(b'{"events":[' + b",".join(events) + b"]}", rows)
            rows, events, size = [], [], 0
        rows.append(row)
        events.append(event)
        size += len(event) + 1
    if rows:
        yield Batch(b'{"events":[' + b",".join(events) + b"]}", rows)


async def until_sigterm(work: Coroutine[None, None, None]) -> None:
    """SIGTERM cancels it, as asyncio lets SIGINT: an exception amid its loop would leave tasks that nothing wakes."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        await task
    finally:
        signal.signal(signal.SIGTERM, before)


class Replay:
    """Sends batches, several at a time, and notes up to where all of them were accepted."""

    def __init__(self, arguments: argparse.Namespace, progress: ReplayProgress, path: Path) -> None:
        self._url = f"{progress.target}/events/bulk"
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
        import httpx  # noqa: PLC0415 - only the extra `cli` has it

        concurrency = self._arguments.concurrency
        limits = httpx.Limits(max_connections=concurrency)
        headers = {"x-api-key": key, "content-type": "application/json", "user-agent": f"eventstore/{__version__}"}
        async with httpx.AsyncClient(headers=headers, timeout=REQUEST_TIMEOUT_S, limits=limits) as client:
            try:
                for pages in self.passes(conn, query):
                    for batch in batches(pages, self._arguments.batch_size):
                        if len(self._pending) == concurrency:
                            advance(await self._settle_oldest())
                        self._pending.append((batch, asyncio.create_task(self._send(client, batch))))
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
            after = parse_cursor(progress.cursor) if progress.cursor else None
            yield stored_events(conn, replace(query, after=after))
        progress.is_caught_up = True
        newest = int(conn.execute(NEWEST_SEQ).fetchone()[0])
        yield arrived_events(conn, query, progress.arrived, newest)
        progress.arrived = newest

    async def _settle_oldest(self) -> int:
        batch, task = self._pending[0]
        first, last = batch.rows[0][1], batch.rows[-1][1]
        try:
            await task
        except RefusedError as refusal:
            batch_ids = f"the batch of {counted(len(batch.rows), 'event')} from {echo(first.id)} to {echo(last.id)}"
            sure = f"everything before it is accepted ({self.progress.place})"
            again = f"when that is mended, {again_command(self._arguments)} goes on from there"
            raise StopError(f"{refusal}; it is {batch_ids}; {sure}; {again}") from None
        self._pending.popleft()
        self.progress.accepted += len(batch.rows)
        if self.progress.is_caught_up:
            self.progress.arrived = batch.rows[-1][0]
        else:
            self.progress.cursor = Cursor(last.timestamp_us, last.id).text
        if time.monotonic() - self._saved_s > SAVE_INTERVAL_S:  # a crash sends half a second's batches again
            self.save()
        return len(batch.rows)

    def save(self) -> None:
        with whole_file(self._path, f"cannot keep the progress in {self._path}", "make room for it") as file:
            file.write(ENCODER.encode(self.progress) + b"\n")
        self._saved_s = time.monotonic()

    async def _send(self, client: httpx.AsyncClient, batch: Batch) -> None:
        """Until it is accepted. RefusedError."""
        import httpx  # noqa: PLC0415 - only the extra `cli` has it

        self.sent += len(batch.rows)
        for attempt in itertools.count():
            wait_s = random.uniform(0, min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(attempt, 16)))  # noqa: S311
            try:
                response = await client.post(self._url, content=batch.body)
            except httpx.InvalidURL as error:
                raise RefusedError(f"{self._url} is no URL: {error}") from None
            except httpx.RequestError as error:
                problem = f"{self._url} cannot be reached: {str(error) or type(error).__name__}"
            else:
                if response.status_code == 202:
                    self._success_s = time.monotonic()
                    self.accepted += len(batch.rows)
                    self.known += int(response.headers.get("x-events-duplicate", 0))
                    return
                problem = f"{self._url} answered {response.status_code}: {answer_message(response)}"
                if response.status_code == 401:
                    problem += f" (the key came from {'--api-key' if self._arguments.api_key else 'FLEXPRICE_API_KEY'})"
                if response.status_code != 429 and response.status_code < 500:
                    raise RefusedError(problem)
                wait_s = max(wait_s, retry_after_s(response.headers.get("retry-after", "")))
            limit_s = self._arguments.give_up_after_s
            if time.monotonic() + wait_s - self._success_s > limit_s:
                raise RefusedError(f"given up, no batch was accepted for {limit_s:g} s (--give-up-after-s): {problem}")
            self.retried += 1
            if time.monotonic() > self._said_s + SAY_INTERVAL_S:
                self._said_s = time.monotonic()
                say(f"{problem}; trying again, for at most {limit_s:g} s without success")
            await asyncio.sleep(wait_s)


def retry_after_s(text: str) -> float:
    """What a Retry-After header asks for: a number of seconds or a date; 0 if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    with suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


def answer_message(response: httpx.Response) -> str:
    """What an error answer says, on one line: of this server or FlexPrice the message, else the start of the body."""
    text = excerpt(response.content)
    with suppress(ValueError, TypeError, KeyError, IndexError, AttributeError):
        body = response.json()
        error = body.get("error")
        text = body.get("message") or (error["message"] if isinstance(error, dict) else error) or text
        text = f"{text} ({body['details']['errors'][0]['message']})"
    if 200 <= response.status_code < 400:
        location = response.headers.get("location", "")
        where = f" It redirects to {echo(location)}, where the key is not sent." if location else ""
        text = f"{text} - 202 was expected.{where} Is --to the URL of the API?"
    return str(" ".join(text.split()))


def load_progress(arguments: argparse.Namespace, conn: sqlite3.Connection, target: str) -> tuple[ReplayProgress, Path]:
    """The progress of the same replay, if it ran before, and its file. StartError."""
    filters = {name: getattr(arguments, name) for name in EVENT_FILTERS}
    newest = int(conn.execute(NEWEST_SEQ).fetchone()[0])
    fresh = ReplayProgress(target, arguments.environment, filters, newest)
    name = hashlib.sha256(ENCODER.encode([target, arguments.environment, filters])).hexdigest()[:16]
    path = Path(f"{arguments.db}.replay-{name}.json")
    if arguments.restart or not path.exists():
        return fresh, path
    try:
        progress = PROGRESS.decode(path.read_bytes())
        cursor = progress.cursor and parse_cursor(progress.cursor)
    except (OSError, msgspec.DecodeError, FieldError) as error:
        raise StartError(f"cannot read the progress in {path}: {error}; --restart starts over") from error
    parameters = {"environment": arguments.environment, "id": cursor.id if cursor else ""}
    if progress.arrived > newest or (cursor and conn.execute(SELECT_NAME, parameters).fetchone() is None):
        raise StartError(f"{path} is the progress of another database of that name; --restart starts over")
    if progress.accepted:
        accepted = counted(progress.accepted, "event")
        say(f"going on at {progress.place}: {accepted} were accepted before (--restart starts over)")
    return progress, path


def replay_events(arguments: argparse.Namespace) -> int:
    """`eventstore replay`: 0, or StopError."""
    started_s = time.monotonic()
    target = target_url(arguments.to)
    query = flag_query(arguments)
    if importlib.util.find_spec("httpx") is None:
        raise StartError(f"replay needs httpx: {sys.executable} -m pip install httpx tqdm (or '.[cli]' in the clone)")
    with closing(open_stored(arguments.db)) as conn:
        progress, path = load_progress(arguments, conn, target)
        replay = Replay(arguments, progress, path)
        if arguments.dry_run:
            sizes = [
                len(batch.rows)
                for pages in replay.passes(conn, query)
                for batch in batches(pages, arguments.batch_size)
            ]
            would = f"{counted(sum(sizes), 'event')} in {counted(len(sizes), 'request')} to {target}/events/bulk"
            elsewhere = "" if sizes else other_environments(conn, arguments.environment)
            say(f"would send {would}; nothing was sent{elsewhere}")
            return 0
        key = replay_key(arguments.api_key, os.environ)
        try:
            with progress_bar(lambda: events_left(conn, query, progress), "event") as advance:
                asyncio.run(until_sigterm(replay.run(conn, query, key, advance)))
        except (KeyboardInterrupt, asyncio.CancelledError):
            sure = f"{counted(progress.accepted, 'event')} are accepted ({progress.place})"
            raise StopError(f"interrupted; {sure}; {again_command(arguments)} goes on from there") from None
        elsewhere = "" if replay.sent else other_environments(conn, arguments.environment)
    known = f" ({replay.known:,} of them it had)" if replay.known else ""
    counts = f"sent {counted(replay.sent, 'event')}: {replay.accepted:,} accepted{known}, {replay.retried:,} retried"
    say(f"{counts}; {time.monotonic() - started_s:.1f} s{elsewhere}")
    return 0


def again_command(arguments: argparse.Namespace) -> str:
    return f"the same command{' without --restart' if arguments.restart else ''}"


def events_left(conn: sqlite3.Connection, query: EventQuery, progress: ReplayProgress) -> int | None:
    """How many events a progress bar has before it, if that can be told quickly."""
    if progress.is_caught_up:
        return None
    start_us = parse_cursor(progress.cursor).timestamp_us if progress.cursor else query.start_us
    return list_events(conn, replace(query, start_us=start_us)).total_count or 0


def replay_key(flag: str | None, environ: Mapping[str, str]) -> str:
    key = flag or environ.get("FLEXPRICE_API_KEY", "").strip()
    if not key:
        raise StartError("no API key for the target: set FLEXPRICE_API_KEY, or give it with --api-key")
    return check_key(key)


def add_replay_flags(add: AddFlag) -> None:
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


def add_flags(command: str, add: AddFlag) -> None:
    """The flags of `replay`."""
    add_replay_flags(add)


def run(arguments: argparse.Namespace) -> int:
    """`eventstore replay`: its exit status. StartError."""
    return run_job(replay_events, arguments)
