"""The clock of a mock, which a test may stop or replace."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextvars import ContextVar
from email.utils import format_datetime

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventstore import to_datetime
from eventstore_extras.faults import INGEST_PATHS

__all__ = ["checked", "timed", "wall_clock_us"]

_reads_events: ContextVar[bool] = ContextVar("reads_events", default=False)  # True in a request that reads events


def wall_clock_us() -> int:
    """Return the wall clock, rounded: under freezegun time_ns() is off by up to 128 ns, and cutting could lose 1 us."""
    return (time.time_ns() + 500) // 1000


def checked(clock: object) -> Callable[[], int]:
    """Return a clock that is a microsecond ahead for requests that read events. Raises TypeError if it is not a clock.

    By default aggregations end before now: while a test's clock stands still, they would miss the event just sent.
    """
    now = clock() if callable(clock) else clock
    if not callable(clock) or not isinstance(now, int):
        raise TypeError(f"clock must be a function that returns microseconds since 1970 as an int, got {now!r}")
    return lambda: clock() + _reads_events.get()


def timed(app: ASGIApp, clock: Callable[[], int]) -> ASGIApp:
    """Wrap an application in middleware that tells the clock which requests read events.

    It also adds the clock's time to each answer as `Date`: the event debugger computes its ranges from that header.
    """

    async def answer(scope: Scope, receive: Receive, send: Send) -> None:
        async def send_dated(message: Message) -> None:
            if message["type"] == "http.response.start":
                date = format_datetime(to_datetime(clock()), usegmt=True)
                message["headers"] = [*message["headers"], (b"date", date.encode())]
            await send(message)

        if scope["type"] == "http":
            is_ingest = scope["method"] == "POST" and scope["path"].rstrip("/") in INGEST_PATHS
            _reads_events.set(scope["path"].startswith("/v1/events") and not is_ingest)
        await app(scope, receive, send_dated)

    return answer
