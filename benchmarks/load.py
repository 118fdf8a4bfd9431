"""The load generator: sends prepared requests over keep-alive connections and measures the answers."""

from __future__ import annotations

import asyncio
import math
import multiprocessing
import re
import signal
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import NamedTuple, cast

import uvicorn

__all__ = ["Load", "Outcome", "event_loop_runner", "generators", "run_load"]


class Load(NamedTuple):
    """The requests that one generator process sends."""

    port: int
    requests: Sequence[bytes]
    connections: int
    seconds: float  # at most
    repeat: bool = True  # start again after the last request
    per_second: float = 0  # 0: as fast as the server answers


class Outcome(NamedTuple):
    answered: int
    seconds: float
    histogram: Counter[int]  # latency in steps of 1 % -> answers; a step is 100 * ln(microseconds)

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds

    def percentile_ms(self, percent: float) -> float:
        remaining = self.answered * percent / 100
        for step, count in sorted(self.histogram.items()):
            remaining -= count
            if remaining <= 0:
                return math.exp(step / 100) / 1000
        return math.nan


class _Run:
    """The state of a load that is being sent; all its connections share it."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.sent = 0
        self.histogram: Counter[int] = Counter()
        self.start = self.end = time.perf_counter()

    def next_request(self) -> tuple[float, bytes] | None:
        """Return the time at which the next request is due, and the request; None at the end of the load."""
        load, now = self.load, time.perf_counter()
        due = self.start + self.sent / load.per_second if load.per_second else now
        if max(now, due) >= self.start + load.seconds or (self.sent >= len(load.requests) and not load.repeat):
            return None
        self.sent += 1
        return due, load.requests[(self.sent - 1) % len(load.requests)]


class _Connection(asyncio.Protocol):
    """A keep-alive connection that sends a request as soon as the one before is answered."""

    _head = re.compile(rb"HTTP/1\.1 (\d+) .*?\r\ncontent-length: (\d+)(?=\r\n).*?\r\n\r\n", re.DOTALL | re.IGNORECASE)

    def __init__(self, run: _Run) -> None:
        self._run = run
        self._loop = asyncio.get_running_loop()
        self._received = b""
        self.done = self._loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed a connection"))

    def send(self) -> None:
        following = self._run.next_request()
        if following is None:
            self.done.set_result(None)
            self._transport.close()
            return
        self._due, self._request = following  # latency counts from here, even if the server delays the sending
        delay_s = self._due - time.perf_counter()
        if delay_s > 0:
            self._loop.call_later(delay_s, self._send_on_time)
        else:
            self._transport.write(self._request)

    def _send_on_time(self) -> None:
        self._due = time.perf_counter()  # a timer is up to a millisecond off, which must not count as latency
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._head.match(self._received)
        if not head or len(self._received) < head.end() + int(head[2]):
            return
        if head[1] not in (b"200", b"202"):
            problem = f"answered {self._received[:500]!r} to {self._request[:200]!r}"
            self.done.set_exception(RuntimeError(problem))
            self._transport.close()
            return
        self._run.end = time.perf_counter()
        self._run.histogram[round(100 * math.log(1e6 * (self._run.end - self._due)))] += 1
        self._received = b""
        self.send()


async def _send_all(load: Load) -> Outcome:
    loop = asyncio.get_running_loop()
    run = _Run(load)
    connections = [
        (await loop.create_connection(partial(_Connection, run), "127.0.0.1", load.port))[1]
        for _ in range(load.connections)
    ]
    run.start = time.perf_counter()
    for connection in connections:
        connection.send()
    await asyncio.gather(*(connection.done for connection in connections))
    return Outcome(run.histogram.total(), run.end - run.start, run.histogram)


def event_loop_runner() -> asyncio.Runner:
    """Return a runner on the event loop that the server uses: uvloop, if it is installed."""
    return asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory())


def run_load(load: Load) -> Outcome:
    """Send the load in this process."""
    with event_loop_runner() as runner:
        return runner.run(_send_all(load))


@contextmanager
def generators(number: int) -> Iterator[ProcessPoolExecutor]:
    """Start the processes before anything is measured. They ignore Ctrl-C, which is for the parent process alone."""
    context = multiprocessing.get_context("spawn")
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(number, context, initializer=signal.signal, initargs=ignore_interrupt) as pool:
        list(pool.map(time.sleep, [0.5] * number))
        yield pool
