"""An ordinary client beside one that tries to stop it, each with another key."""

from __future__ import annotations

import asyncio
import json
import multiprocessing
import socket
import statistics
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from benchmarks.servers import Server
from benchmarks.table import machine
from eventstore import MAX_BATCH
from eventstore import __file__ as service_file

__all__ = ["measure_hostility"]

_ORDINARY, _HOSTILE = "ordinary-key", "hostile-key"
_MEGABYTE = 1024 * 1024
_EVENT = {"event_name": "call", "external_customer_id": "cust", "properties": {"tokens": 1}}


def _request(method: str, path: str, body: object = None, key: str = _HOSTILE) -> bytes:
    text = b"" if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    head = f"{method} {path} HTTP/1.1\r\nHost: test\r\nx-api-key: {key}\r\nContent-Length: {len(text)}\r\n\r\n"
    return head.encode() + text


def _batch(size: int, events: int = MAX_BATCH) -> dict[str, object]:
    return {"events": [_EVENT | {"properties": {"text": "x" * size}}] * events}


# ---------------------------------------------------------------------------------------------- the hostile client


async def _answer(reader: asyncio.StreamReader) -> int:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next((int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.startswith(b"content-length")), 0)
    await reader.readexactly(length)
    return int(head.split()[1])


async def _repeat(port: int, request: bytes) -> None:
    """Send a request again and again on one connection; connect again when the server closes it."""
    while True:
        with suppress(OSError, asyncio.IncompleteReadError):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            while True:
                writer.write(request)
                await writer.drain()
                if await _answer(reader) == 503:
                    await asyncio.sleep(0.05)
        await asyncio.sleep(0.05)


async def _send_and(port: int, request: bytes, pause_s: float) -> None:
    """Send a request, read nothing, and disconnect after a pause; again and again."""
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection("127.0.0.1", port, limit=1024)
            writer.transport.pause_reading()  # type: ignore[attr-defined]
            writer.write(request)
            await asyncio.sleep(pause_s)
            writer.transport.abort()
        await asyncio.sleep(0.05)


async def _sip(port: int, request: bytes) -> None:
    """Send a request 20 times at once and read the answers byte by byte; again and again."""
    loop = asyncio.get_running_loop()
    while True:
        with suppress(OSError), socket.socket() as sock:
            sock.setblocking(False)
            await loop.sock_connect(sock, ("127.0.0.1", port))
            await loop.sock_sendall(sock, request * 20)
            for _ in range(1000):
                await loop.sock_recv(sock, 1)
                await asyncio.sleep(0.01)


class _Attack(NamedTuple):
    name: str
    clients: int
    act: Callable[[int, bytes], Awaitable[None]]
    request: Callable[[], bytes]


async def _hold(port: int, request: bytes) -> None:
    await _send_and(port, request, 60)


async def _abandon(port: int, request: bytes) -> None:
    await _send_and(port, request, 0.05)


_EVER = {"start_time": "2000-01-01T00:00:00Z", "end_time": "2030-01-01T00:00:00Z"}
_USAGE = {"event_name": "call", "aggregation_type": "COUNT_UNIQUE", "property_name": "text", **_EVER}
_FILTERS = {f"key{number}": ["x"] for number in range(50)}
_ATTACKS = [
    _Attack("nothing", 0, _repeat, lambda: b""),
    _Attack("8 bodies of 32 MB without their last byte", 8, _hold,
            lambda: _request("POST", "/v1/events", b" " * (32 * _MEGABYTE))[:-1]),
    _Attack("32 MB of empty filters to /v1/meters", 4, _repeat,
            lambda: _request("POST", "/v1/meters", b'{"filters": [' + b"{}," * (10 * _MEGABYTE) + b"{}]}")),
    _Attack("3 million unknown fields in an event", 4, _repeat,
            lambda: _request("POST", "/v1/events", b"{" + b",".join(b'"a%d":1' % n for n in range(2_500_000)) + b"}")),
    _Attack("32 MB of empty objects in properties", 4, _repeat,
            lambda: _request("POST", "/v1/events", json.dumps(_EVENT).encode()[:-15]
                             + b'{"a": [' + b"{}," * (10 * _MEGABYTE) + b"{}]}}")),
    _Attack("200 clients that make meters", 200, _repeat,
            lambda: _request("POST", "/v1/meters", {"name": "m", "event_name": "e", "aggregation": {"type": "COUNT"}})),
    _Attack("60 heavy usage requests, abandoned at once", 60, _abandon,
            lambda: _request("POST", "/v1/events/usage", _USAGE)),
    _Attack("60 heavy usage requests", 60, _repeat, lambda: _request("POST", "/v1/events/usage", _USAGE)),
    _Attack("pages with 50 filters over events of 1 MB", 8, _repeat,
            lambda: _request("POST", "/v1/events/query", {"property_filters": _FILTERS, "event_name": "large"})),
    _Attack("20 pages of 10 MB, never read", 20, _hold,
            lambda: _request("POST", "/v1/events/query", {"event_name": "large", "page_size": 10, **_EVER})),
    _Attack("200 times 20 pages of 20 MB, read byte by byte", 200, _sip,
            lambda: _request("POST", "/v1/events/query", {"event_name": "large", "page_size": 10, **_EVER})),
    _Attack("150 clients that send full batches", 150, _repeat,
            lambda: _request("POST", "/v1/events/bulk", _batch(100))),
    _Attack("100 MB of a URL without an end, no key", 4, _repeat, lambda: b"GET /" + b"a" * (100 * _MEGABYTE)),
    _Attack("pipelined requests, answers not read, no key", 4, _repeat,
            lambda: b"GET /health HTTP/1.1\r\n\r\n" * 1_000_000),
    _Attack("bodies in chunks of one byte", 4, _repeat,
            lambda: _request("POST", "/v1/events").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
                    + b"1\r\nx\r\n" * 5_000_000),
    _Attack("1,000 connections with heads of empty headers, no key", 1000, _hold,
            lambda: b"GET /health HTTP/1.1\r\n" + b"a:\r\n" * 15_000),
    _Attack("300 idle connections", 300, _hold, lambda: b""),
]  # fmt: skip


def _run_attack(port: int, number: int) -> None:
    async def attack() -> None:
        chosen = _ATTACKS[number]
        request = chosen.request()
        await asyncio.gather(*[chosen.act(port, request) for _ in range(chosen.clients)])

    asyncio.run(attack())


@contextmanager
def _attacking(port: int, number: int) -> Iterator[None]:
    process = multiprocessing.get_context("spawn").Process(target=_run_attack, args=(port, number), daemon=True)
    process.start()
    try:
        yield
    finally:
        process.kill()
        process.join()


# ---------------------------------------------------------------------------------------------- the ordinary client

_ORDINARY_REQUESTS = [
    _request("POST", "/v1/events", _EVENT, _ORDINARY),
    _request("GET", "/v1/events", None, _ORDINARY),
    _request("POST", "/v1/events/usage", {"event_name": "call", "aggregation_type": "SUM", "property_name": "tokens"},
             _ORDINARY),
]  # fmt: skip


class _Seen(NamedTuple):
    """The waits of the ordinary client in milliseconds, and the number of its refusals."""

    waits_ms: list[float]
    refused: int


async def _ordinary(port: int, seconds: float) -> _Seen:
    waits, refused = [], 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        for request in _ORDINARY_REQUESTS:
            start = time.perf_counter()
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(request)
            refused += await _answer(reader) not in (200, 202)
            writer.close()
            waits.append(1000 * (time.perf_counter() - start))
            await asyncio.sleep(0.02)
    return _Seen(waits, refused)


def _fill(server: Server, events: int) -> None:
    for key in (_HOSTILE, _ORDINARY):
        batch = _request("POST", "/v1/events/bulk", _batch(100), key)
        for _ in range(events // MAX_BATCH if key == _HOSTILE else 1):
            server.ask(batch)
    large = [_EVENT | {"event_name": "large", "properties": {"text": "\\" * 1_000_000}}] * 10
    server.ask(_request("POST", "/v1/events/bulk", {"events": large}))


def measure_hostility(seconds: float, events: int, folder: Path) -> int:
    """Print what the ordinary client sees during each attack, and the server's memory after it."""
    print(machine(folder))
    print("| the hostile client | median ms | worst ms | refused | RSS MB |")
    print("|---|---|---|---|---|")
    for number, attack in enumerate(_ATTACKS):
        keys = ("--api-key", f"{_HOSTILE}=a", "--api-key", f"{_ORDINARY}=b")
        command = (service_file, "serve", "--port", 0, "--db", folder / f"{number}.db", *keys, "--log-level", "error")
        with Server(*command) as server:
            _fill(server, events)
            with _attacking(server.port, number):
                time.sleep(2)
                seen = asyncio.run(_ordinary(server.port, seconds))
                rss_mb = server.rss_mb
        worst, median = max(seen.waits_ms), statistics.median(seen.waits_ms)
        print(f"| {attack.name} | {median:.0f} | {worst:.0f} | {seen.refused} | {rss_mb:.0f} |", flush=True)
    return 0
