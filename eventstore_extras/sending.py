"""Sends batches of events to FlexPrice or another eventstore: what `replay` and forwarding share.

Rows become batches, a `Sender` posts them to a `Target`, the retry rules decide what each answer means, and a
`ProgressFile` remembers how far sending has come.
"""

from __future__ import annotations

import asyncio
import bisect
import email.utils
import hashlib
import importlib.util
import itertools
import math
import random
import re
import sqlite3
import sys
import threading
import time
import urllib.parse
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any, Generic, NamedTuple, TypeVar

import msgspec
from msgspec import Struct

from eventstore import ENCODER, Sql, StartError, __version__, all_of, check_key, excerpt, plural, quoted, real_path, sql
from eventstore_extras.entries import exported_event
from eventstore_extras.files import whole_file
from eventstore_extras.hiding import Hider
from eventstore_extras.proxies import find_proxy, is_unreachable, transport_of
from eventstore_extras.refused import Unfit, unfit_for_flexprice
from eventstore_extras.stored import StoredRow, select_rows

__all__ = [
    "ARRIVED",
    "BACKOFF_BASE_S",
    "BACKOFF_CAP_S",
    "BATCH_BYTES",
    "BLOCKED_PAUSE_S",
    "GROW_AFTER",
    "SAVE_INTERVAL_S",
    "STALL_TIMEOUT_S",
    "Answer",
    "Batch",
    "Key",
    "Outage",
    "Outcome",
    "Progress",
    "ProgressFile",
    "PutAside",
    "Sender",
    "Target",
    "Throttle",
    "arrived_rows",
    "batches",
    "bulk_url",
    "find_key",
    "lasted",
    "newest_seq",
    "progress_path",
    "read_progress",
    "require_httpx",
    "resume_progress",
    "retry_after_s",
    "target_url",
]

# ---------------------------------------------------------------------------------------------- batches

BATCH_BYTES = 10_000_000  # FlexPrice recommends no larger request
ARRIVED = "seq > :after AND seq <= :through"  # SQLite numbers events in order of arrival
_NEWEST_SEQ = "SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'events'"


class PutAside(NamedTuple):
    """An event that is not sent."""

    row: StoredRow
    unfit: Unfit
    before: int  # number of events in the batch that come before it and are sent


class Batch(NamedTuple):
    """Events to send in one request, and the events between them that are not sent: FlexPrice would lose them."""

    rows: list[StoredRow]
    events: list[bytes]  # the same events as JSON
    put_aside: Sequence[PutAside] = ()

    @property
    def body(self) -> bytes:
        return b'{"events":[' + b",".join(self.events) + b"]}"

    @property
    def last(self) -> StoredRow:
        """The last event, whether it is sent or not."""
        if self.put_aside and self.put_aside[-1].before == len(self.rows):
            return self.put_aside[-1].row
        return self.rows[-1]

    @property
    def size(self) -> int:
        return len(self.rows) + len(self.put_aside)

    def part(self, start: int, end: int | None = None) -> Batch:
        return Batch(self.rows[start:end], self.events[start:end])

    def head(self, max_bytes: int) -> Batch:
        """Return as many of the first events as fit into this size, and at least one."""
        sizes = itertools.accumulate(len(event) + 1 for event in self.events)
        return self.part(0, max(bisect.bisect_right(list(sizes), max_bytes), 1))


def batches(pages: Iterable[list[StoredRow]], batch_size: int, max_event_bytes: int | None) -> Iterator[Batch]:
    """Yield the rows in batches of at most `batch_size` events and 10 MB. A larger event is a batch by itself.

    Events that FlexPrice would lose are in `put_aside`. If `max_event_bytes` is None, all events are sent.
    """
    rows, events, put_aside, size = list[StoredRow](), list[bytes](), list[PutAside](), 0
    for row in itertools.chain.from_iterable(pages):
        event = ENCODER.encode(exported_event(row[1]))
        number = len(rows) + len(put_aside)
        if number and (number == batch_size or size + len(event) > BATCH_BYTES):
            yield Batch(rows, events, put_aside)
            rows, events, put_aside, size = [], [], [], 0
        if max_event_bytes and (unfit := unfit_for_flexprice(row[1], event, max_event_bytes)):
            put_aside.append(PutAside(row, unfit, len(rows)))
        else:
            rows.append(row)
            events.append(event)
        size += len(event) + 1
    if rows or put_aside:
        yield Batch(rows, events, put_aside)


def newest_seq(conn: sqlite3.Connection) -> int:
    """Return the seq of the event that arrived last, even if it was deleted since. SQLite never reuses the number."""
    return int(conn.execute(_NEWEST_SEQ).fetchone()[0])


def arrived_rows(conn: sqlite3.Connection, condition: Sql, after: int, through: int) -> list[StoredRow]:
    """Return a page of the events that meet a condition and arrived after one seq, through another."""
    where = all_of([condition, sql(ARRIVED, after=after, through=through)])
    return select_rows(conn, sql(f"NOT INDEXED WHERE {where} ORDER BY seq", where))


# ---------------------------------------------------------------------------------------------- progress

SAVE_INTERVAL_S = 0.5  # after a crash, the batches of this interval are sent again


class Throttle:
    """Allows something at most once per interval."""

    def __init__(self, interval_s: float) -> None:
        self._interval_s = interval_s
        self._last_s = -math.inf

    def allows(self) -> bool:
        """Return True and start an interval, unless one is running."""
        now_s = time.monotonic()
        if now_s - self._last_s < self._interval_s:
            return False
        self._last_s = now_s
        return True


class Progress(Struct, kw_only=True):
    """How far sending to one target has come. Files of earlier versions have the same field names."""

    target: str
    environment: str
    seq: int = 0  # sending in order of arrival continues after this event
    last_seq: int = 0  # seq of the last event that was accepted or not sent; identifies the database with `last_id`
    last_id: str = ""
    accepted: int = 0  # events

    def advance(self, last: StoredRow) -> None:
        """Record that the target accepted this event and all events before it, except those in the refused file."""
        self.seq = self.last_seq = last[0]
        self.last_id = last[1].id


P = TypeVar("P", bound=Progress)


class ProgressFile(Generic[P]):
    """A progress and the file that keeps it. Nothing may change the progress while it is being saved."""

    def __init__(self, path: Path, progress: P) -> None:
        self.path = path
        self.progress = progress
        self._saved = b""
        self._throttle = Throttle(SAVE_INTERVAL_S)
        self._lock = threading.Lock()  # a save whose task is cancelled continues in its thread: the next one must wait

    @property
    def is_saved(self) -> bool:
        return ENCODER.encode(self.progress) == self._saved

    def is_due(self) -> bool:
        """Return True, at most once per SAVE_INTERVAL_S, if the progress has changed since it was saved."""
        return not self.is_saved and self._throttle.allows()

    def save(self) -> None:
        """Write the file and sync it. Raises StopError."""
        with self._lock:
            content = ENCODER.encode(self.progress)
            with whole_file(self.path, f"cannot save the progress in {self.path}", "free some disk space") as file:
                file.write(content + b"\n")
            self._saved = content


def progress_path(db: str, kind: str, identity: Any) -> Path:
    """Return the path beside the database where the progress of this replay or forwarding is kept."""
    return Path(f"{real_path(db)}.{kind}-{hashlib.sha256(ENCODER.encode(identity)).hexdigest()[:16]}.json")


def read_progress(path: Path, progress_type: type[P], advice: str) -> P:
    """Return the progress in a file. Raises StartError, which ends with the advice, if the file is damaged."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=progress_type)
    except (OSError, msgspec.DecodeError) as error:
        raise StartError(f"cannot read the progress in {path}: {error}; {advice}") from error


def resume_progress(conn: sqlite3.Connection, path: Path, new: P, advice: str) -> ProgressFile[P]:
    """Return the progress in a file if it exists, else the new one.

    Raises StartError, which ends with the advice, if the file is damaged or belongs to another database.
    """
    if not path.exists():
        return ProgressFile(path, new)
    progress = read_progress(path, type(new), advice)
    found = conn.execute("SELECT id FROM events WHERE seq = ?", [progress.last_seq]).fetchone()
    is_other = found is not None and found[0] != progress.last_id  # an event that is missing was deleted since
    if is_other or max(progress.seq, progress.last_seq) > newest_seq(conn):
        raise StartError(f"{path} belongs to another database of that name, or to a newer copy of this one; {advice}")
    return ProgressFile(path, progress)


# ---------------------------------------------------------------------------------------------- retry rules

BACKOFF_BASE_S = 0.5
BACKOFF_CAP_S = 30.0
BLOCKED_PAUSE_S = 30.0
_RETRY_AFTER_CAP_S = 3600.0  # some servers ask for years
_MAX_BREAKS = 2  # a bad connection breaks requests of any size; more breaks suggest that the batch is too large
GROW_AFTER = 20  # accepted parts before a larger one is tried; a try above the target's limit costs three requests


class Outcome(Enum):
    """What the answer to a batch means for it."""

    ACCEPTED = "the target has stored the events"
    RETRY = "the same request may succeed later"
    BROKEN = "the connection broke off: retry, but a batch that breaks it repeatedly may be too large"
    TOO_LARGE = "fewer events at a time may be accepted"
    REFUSED = "the target will never accept at least one of the events"
    BLOCKED = "the target accepts nothing until somebody corrects the settings"


_OUTCOMES = {
    202: Outcome.ACCEPTED,
    400: Outcome.REFUSED,
    408: Outcome.RETRY,
    413: Outcome.TOO_LARGE,
    422: Outcome.REFUSED,
    429: Outcome.RETRY,
}


def _outcome_of(status: int) -> Outcome:
    return Outcome.RETRY if status >= 500 else _OUTCOMES.get(status, Outcome.BLOCKED)


class Answer(NamedTuple):
    outcome: Outcome
    problem: str = ""  # one line, without the key
    retry_after_s: float = 0.0
    duplicates: int = 0  # accepted events that the target already had
    is_foreign: bool = False  # from a proxy or firewall in front of the API: says nothing about an event

    def backoff_s(self, waits: int) -> float:
        """Return how long to wait before the next try.

        The pause is random, up to a limit that doubles with each earlier wait, and at least as long as the target asks
        for. It is fixed for a target that is BLOCKED.
        """
        if self.outcome is Outcome.BLOCKED:
            return BLOCKED_PAUSE_S
        limit_s = min(BACKOFF_CAP_S, BACKOFF_BASE_S * 2 ** min(waits, 16))
        return max(random.uniform(0, limit_s), min(self.retry_after_s, _RETRY_AFTER_CAP_S))  # noqa: S311


def retry_after_s(text: str) -> float:
    """Return the seconds that a Retry-After header asks for, as a number or a date; 0 if it is neither."""
    if re.fullmatch(r"[0-9]{1,9}", text):
        return float(text)
    with suppress(ValueError, TypeError):
        return max(email.utils.parsedate_to_datetime(text).timestamp() - time.time(), 0.0)
    return 0.0


# ---------------------------------------------------------------------------------------------- outages

_SETTLED_S = 5.0  # after this long without a failure an outage is over
_LONG_OUTAGE_S = 10.0


def lasted(seconds: float) -> str:
    """Return a duration in its two largest units, like "45 s" or "2 days 3 h"."""
    whole = round(seconds)
    units = [("day", whole // 86_400), ("h", whole // 3600 % 24), ("min", whole // 60 % 60), ("s", whole % 60)]
    first = next((index for index, (_, number) in enumerate(units) if number), len(units) - 1)
    shown = [(name, number) for name, number in units[first : first + 2] if number] or [("s", 0)]
    return " ".join(plural(number, name) if name == "day" else f"{number} {name}" for name, number in shown)


class Outage:
    """Measures how long a target accepts nothing, and how many events it accepts afterwards."""

    def __init__(self) -> None:
        self._failed_s: float | None = None  # when it began
        self._works_s: float | None = None  # when the target answered again
        self._is_logged = False
        self._events = 0  # accepted since `_works_s`

    def failed(self, is_logged: bool) -> None:
        """Note that a request failed, and whether the log says so."""
        if self._failed_s is None:
            self._failed_s, self._is_logged = time.monotonic(), False
        self._works_s, self._events = None, 0
        self._is_logged |= is_logged

    def sent(self, events: int) -> None:
        """Note that the target answered, and how many events it accepted."""
        if self._failed_s is not None:
            self._works_s = self._works_s or time.monotonic()
            self._events += events

    def end(self, is_done: bool) -> str:
        """Return what to log if the outage has just ended, else "".

        An outage ends when nothing is left to send, or after five seconds without a failure. A short one is reported
        only if the log says that it began.
        """
        if self._failed_s is None or self._works_s is None:
            return ""
        if not is_done and time.monotonic() - self._works_s < _SETTLED_S:
            return ""
        outage_s = self._works_s - self._failed_s
        self._failed_s = None
        if not self._is_logged and outage_s < _LONG_OUTAGE_S:
            return ""
        return f"works again after {lasted(outage_s)}; {plural(self._events, 'event')} sent since"


# ---------------------------------------------------------------------------------------------- the target

STALL_TIMEOUT_S = 60.0  # the longest time without a byte from the target
_REQUEST_TIMEOUT_S = 300.0  # a slow connection needs 80 s for 10 MB
_ANSWER_BYTES = 1024 * 1024  # read at most this much of an answer; an error may name each event of a batch
_MAX_MESSAGE_CHARS, _MAX_LINE_CHARS = 300, 2000


class _Message(Struct):
    message: str


class _Details(Struct):
    errors: list[_Message] | None = None


class _ErrorBody(Struct):
    """The body of an error: `message` from this server, `error` from FlexPrice."""

    message: str | None = None
    error: str | _Message | None = None
    details: _Details | None = None


_ERROR_FIELDS = {"code", "message", "http_status_code", "details", "success", "error"}
_INNER_ERROR_FIELDS = {"message", "internal_error", "details"}


def _is_api_error(content: bytes) -> bool:
    """Return True if this is an error body of FlexPrice or of this server, and not that of a proxy or a gateway.

    The forms are `code` with `message`, and `error` as a text or as an object with a message. Gateways send `message`
    alone, a number as the code, or other fields beside `error`.
    """
    try:
        body = msgspec.json.decode(content)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        return False
    if not isinstance(body, dict):
        return False
    message, error = body.get("message"), body.get("error")
    if isinstance(message, str) and message:
        return isinstance(body.get("code"), str) or isinstance(body.get("details"), dict)
    if not body.keys() <= _ERROR_FIELDS:
        return False
    if isinstance(error, dict):
        return isinstance(error.get("message"), str) and error.keys() <= _INNER_ERROR_FIELDS
    return isinstance(error, str) and error != ""


def _error_message(content: bytes, hider: Hider) -> str:
    """Return the message of an error body, or the start of a body in another form, without secrets."""
    text = excerpt(hider.hide(content.decode(errors="ignore"), _MAX_MESSAGE_CHARS).encode())
    with suppress(msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        body = msgspec.json.decode(content, type=_ErrorBody)
        text = body.message or (body.error.message if isinstance(body.error, _Message) else body.error) or text
        if body.details and body.details.errors:
            text = f"{text} ({body.details.errors[0].message})"
    return hider.hide(text, _MAX_MESSAGE_CHARS)


class Key(NamedTuple):
    value: str
    source: str  # the flag or variable that it came from
    setting: str = ""  # the flag or variable that sets only this key


def find_key(sources: Mapping[str, str | None], missing: str) -> Key:
    """Return the key of the first source that has one. The first source must be the one that sets only this key.

    Raises StartError if the key is invalid, or with the message `missing` if no source has one.
    """
    for source, value in sources.items():
        if key := (value or "").strip():
            return Key(check_key(key, f"{source}: "), source, next(iter(sources)))
    raise StartError(missing)


def target_url(text: str, flag: str) -> str:
    """Return the base URL of an API, ending in /v1. Raises StartError naming the flag."""
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
        host = quoted(parts.hostname or "")
        raise StartError(f"{flag} must not have a user or password before {host}: logs show the URL")
    url = text.strip().rstrip("/")
    segments = parts.path.rstrip("/").removesuffix("/v1").split("/")
    if any(re.fullmatch(r"v\d.*|events", segment, re.IGNORECASE) for segment in segments):
        raise StartError(f"{flag} must be the base URL, with or without /v1 at its end, got {quoted(text)}")
    return url if url.endswith("/v1") else f"{url}/v1"


def bulk_url(base_url: str) -> str:
    return f"{base_url}/events/bulk"


def require_httpx(purpose: str) -> None:
    """Raise StartError, naming the purpose and the command that installs httpx, if it is missing."""
    if importlib.util.find_spec("httpx") is None:
        install = f"{sys.executable} -m pip install httpx tqdm (or '.[cli]' in the clone)"
        raise StartError(f"{purpose} needs httpx: {install}")


class Target:
    """The API that receives the batches. Use it as an async context manager.

    `flag` is the setting that named the URL. The constructor raises StartError if httpx cannot parse the URL, or cannot
    use the proxy or the certificates that environment variables name.
    """

    def __init__(self, url: str, key: Key, flag: str, connections: int = 1) -> None:
        import httpx  # noqa: PLC0415 - only the extra `cli` installs it

        self.url = url
        self.bulk_url = bulk_url(url)
        try:
            _ = httpx.URL(self.bulk_url).host  # decodes the host, as each request would
        except (httpx.InvalidURL, UnicodeError) as error:
            raise StartError(f"{flag} must be a valid URL, got {quoted(url)}: {error}") from None
        self._key = key
        self._flag = flag
        self.proxy = find_proxy(self.bulk_url)
        self._hider = Hider([key.value, self.proxy.password if self.proxy else ""])
        # Ask for no compression: an answer of a few bytes could unpack to gigabytes.
        headers = {"x-api-key": key.value, "content-type": "application/json", "accept-encoding": "identity",
                   "user-agent": f"eventstore/{__version__}"}  # fmt: skip
        # With a transport, httpx does not look for proxies itself.
        transport = transport_of(self.proxy, httpx.Limits(max_connections=connections))
        self._client = httpx.AsyncClient(headers=headers, timeout=STALL_TIMEOUT_S, transport=transport)

    async def __aenter__(self) -> Target:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._client.aclose()

    def _log_line(self, text: str) -> str:
        """Make one printable line of a target's answer, and hide the key, which some targets repeat."""
        hidden = self._hider.hide(text, _MAX_LINE_CHARS)
        printable = "".join(char if char.isprintable() else " " for char in hidden)
        return f"{self.bulk_url} {' '.join(printable.split())}"

    def _refusal(self, status: int, headers: Mapping[str, str], start: bytes) -> str:
        """Describe an answer other than 202, with what it says about the settings."""
        message, is_own = _error_message(start, self._hider), _is_api_error(start)
        if status == 401 and (is_own or not message):  # the API's message names the target's settings, not ours
            message = f"it does not accept the key; give a key of that API as {self._key.setting or self._key.source}"
        problem = f"answered {status}{': ' if message else ''}{message}"
        if status == 401 or (status == 403 and is_own):
            problem += f" (the key came from {self._key.source})"
        if status < 400:
            location = headers.get("location", "")
            hidden = quoted(self._hider.hide(location, _MAX_MESSAGE_CHARS))
            redirect = f" It redirects to {hidden}, where the key is not sent." if location else ""
            problem += f" - 202 was expected.{redirect} Is {self._flag} the URL of the API?"
        if self.proxy and self.url.startswith("http:"):  # the proxy may answer itself; with TLS it cannot
            problem += f" (through the proxy {self.proxy.name})"
        return problem

    def _answer(self, status: int, headers: Mapping[str, str], start: bytes, size: int) -> Answer:
        """Interpret a response to a request of this size by its status, its headers and the start of its body."""
        outcome = _outcome_of(status)
        if outcome is Outcome.ACCEPTED:
            duplicates = headers.get("x-events-duplicate", "")
            return Answer(outcome, duplicates=int(duplicates) if re.fullmatch("[0-9]{1,9}", duplicates) else 0)
        is_foreign = outcome in (Outcome.REFUSED, Outcome.TOO_LARGE) and not _is_api_error(start)
        if is_foreign and outcome is Outcome.REFUSED:
            outcome = Outcome.BLOCKED
        problem = self._refusal(status, headers, start)
        if is_foreign:
            problem += f" - not an error of the API: does a proxy or firewall refuse this request of {size:,} bytes?"
        wait_s = retry_after_s(headers.get("retry-after", ""))
        return Answer(outcome, self._log_line(problem), wait_s, is_foreign=is_foreign)

    def _failure(self, error: Exception, size: int) -> Answer:
        """Interpret the exception of a request with a body of this size."""
        import httpx  # noqa: PLC0415 - only the extra `cli` installs it

        reason, name = str(error) or type(error).__name__, self.proxy and self.proxy.name
        through = f" through the proxy {name}" if name else ""
        if isinstance(error, (httpx.ReadError, httpx.WriteError, httpx.RemoteProtocolError)):
            return Answer(Outcome.BROKEN, self._log_line(f"broke off a request of {size:,} bytes{through}: {reason}"))
        outcome = Outcome.RETRY
        if name and isinstance(error, httpx.ProxyError):
            status = re.match(r"[1-9][0-9]{2}\b", reason)  # a SOCKS proxy sends none
            if status and _outcome_of(int(status[0])) is not Outcome.RETRY:
                outcome = Outcome.BLOCKED
            through, reason = "", f"the proxy {name} refuses to connect: {reason}"
        elif name and is_unreachable(error):
            through, reason = "", f"the proxy {name} cannot be reached: {reason}"
        return Answer(outcome, self._log_line(f"cannot be reached{through}: {reason}"))

    async def post(self, body: bytes) -> Answer:
        """Send one request. A failure to connect, send or receive becomes an Answer, not an exception."""
        import httpx  # noqa: PLC0415 - only the extra `cli` installs it

        status, headers, start = 0, httpx.Headers(), b""
        try:
            async with (
                asyncio.timeout(_REQUEST_TIMEOUT_S),
                self._client.stream("POST", self.bulk_url, content=body) as response,
            ):
                status, headers = response.status_code, response.headers
                async for chunk in response.aiter_raw():
                    start += chunk
                    if len(start) > _ANSWER_BYTES:
                        break
        except Exception as error:
            is_socks = self.proxy and self.proxy.url.startswith("socks")  # the SOCKS library raises other types
            if not isinstance(error, httpx.RequestError | TimeoutError) and not is_socks:
                raise
            is_unclear = _outcome_of(status) is Outcome.REFUSED and not _is_api_error(start)
            if not status or is_unclear:  # any other status counts, even if the rest of the answer is lost
                return self._failure(error, len(body))
        return self._answer(status, headers, start, len(body))


# ---------------------------------------------------------------------------------------------- sending


class Sender:
    """Sends batches until the target accepts or refuses them, in smaller parts if it does not take them whole.

    `wait` is called with the answer and the number of earlier waits before a request is sent again. It sleeps, or
    raises an exception to give up.
    """

    def __init__(self, target: Target, wait: Callable[[Answer, int], Awaitable[None]]) -> None:
        self._target = target
        self._wait = wait
        self._max_bytes = BATCH_BYTES
        self._accepted = 0  # parts since `_max_bytes` changed

    def _shrink(self, part: Batch) -> None:
        self._max_bytes = min(self._max_bytes, len(part.body) // 2)  # a concurrent request may have shrunk it further
        self._accepted = 0

    def _grow(self, answer: Answer) -> None:
        self._accepted += answer.outcome is Outcome.ACCEPTED
        if self._accepted >= GROW_AFTER:
            self._max_bytes = min(self._max_bytes * 2, BATCH_BYTES)
            self._accepted = 0

    def head(self, batch: Batch) -> Batch:
        """Return as many of the first events as one request may have now."""
        return batch.head(self._max_bytes)

    async def send_head(self, batch: Batch) -> tuple[Batch, Answer]:
        """Send as many of the first events as the target takes at a time.

        Returns those events and the final answer: ACCEPTED, REFUSED, or TOO_LARGE for a single event. A single event
        that is too large for a proxy is BLOCKED instead: the proxy's limit can be raised.
        """
        waits = breaks = 0
        while True:
            part = self.head(batch)
            answer = await self._target.post(part.body)
            if answer.outcome is Outcome.TOO_LARGE and len(part.rows) > 1:
                self._shrink(part)
                continue
            if answer.outcome is Outcome.TOO_LARGE and answer.is_foreign:
                answer = answer._replace(outcome=Outcome.BLOCKED)
            if answer.outcome in (Outcome.ACCEPTED, Outcome.REFUSED, Outcome.TOO_LARGE):
                self._grow(answer)
                return part, answer
            breaks += answer.outcome is Outcome.BROKEN
            if answer.outcome is Outcome.BROKEN and breaks > _MAX_BREAKS and len(part.rows) > 1:
                self._shrink(part)
            await self._wait(answer, waits)  # even after shrinking: a proxy may break off because the target is down
            waits += 1
