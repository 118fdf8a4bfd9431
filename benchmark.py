"""How fast eventstore is, beside the least that the same machine would need for it.

    python benchmark.py          # one table, in six to ten minutes (--quick: in seconds; --full: to 10,000,000 events)
    python benchmark.py soak     # ten minutes of mixed load: do memory, file, WAL, handles and latencies stay flat?

Each figure stands beside a floor, which is measured on the same file, in the same run and in turns with it (floor,
ours, floor, ours, ...): raw `sqlite3` with the server's pragmas and schema, or a Starlette route that does nothing
but answer the same bytes, in uvicorn. Figures are medians of the rounds. The ratio says how many times the floor's
cost ours is: 1.0 is as good as the floor, 2.0 takes twice the time or the space. Ratios travel to other machines,
absolute figures do not.

The servers are real processes on a file in a temporary folder (`--dir` chooses the disk). So are the load generators:
asyncio on uvloop, one process for each kind of load. wrk, on the same requests and with as many connections, got
between 3 % fewer and 8 % more answers a second (medians of five runs in turns on two cores): within their noise.
"""

from __future__ import annotations

import argparse
import asyncio
import http.client
import itertools
import json
import math
import multiprocessing
import os
import platform
import re
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

import eventstore
from eventstore import DAY_US, MAX_BATCH, READER_PRAGMAS, WRITER_PRAGMAS, Row, now_us, to_datetime

KEY = "key-of-the-benchmark"
ENVIRONMENT, ENVIRONMENT_NUMBER = "development", 1  # the first in a file
CUSTOMERS = 5000
PAGE_COLUMNS = ", ".join(column for column in Row._fields if column != "environment")
INSERT = f"{eventstore.INSERT} ({', '.join('?' * len(Row._fields))}) {eventstore.ON_KNOWN_ID}"

# ---------------------------------------------------------------------------------------------- load generator


class Load(NamedTuple):
    """What one process sends until the time is over: every request once, or round and round."""

    port: int
    requests: Sequence[bytes]
    connections: int
    seconds: float
    repeat: bool = True
    per_second: float = 0  # 0: flat out


class Outcome(NamedTuple):
    answered: int
    seconds: float
    histogram: Counter[int]  # of latencies, in steps of 1 %: 100 * ln(us)

    @property
    def per_second(self) -> float:
        return self.answered / self.seconds

    def percentile_ms(self, percent: float) -> float:
        left = self.answered * percent / 100
        for step, count in sorted(self.histogram.items()):
            left -= count
            if left <= 0:
                return math.exp(step / 100) / 1000
        return math.nan


class Sending:
    """One load under way: what its connections share."""

    def __init__(self, load: Load) -> None:
        self.load = load
        self.sent = 0
        self.histogram: Counter[int] = Counter()
        self.start = self.end = time.perf_counter()

    def next(self) -> tuple[float, bytes] | None:
        """A request and when it is due; None if there is none to send any more."""
        load, now = self.load, time.perf_counter()
        due = self.start + self.sent / load.per_second if load.per_second else now
        if max(now, due) >= self.start + load.seconds or (self.sent >= len(load.requests) and not load.repeat):
            return None
        self.sent += 1
        return due, load.requests[(self.sent - 1) % len(load.requests)]


class Connection(asyncio.Protocol):
    """A keep-alive connection that sends a request as soon as the one before is answered."""

    _head = re.compile(rb"HTTP/1\.1 (\d+) .*?\r\ncontent-length: (\d+)(?=\r\n).*?\r\n\r\n", re.DOTALL | re.IGNORECASE)

    def __init__(self, sending: Sending) -> None:
        self.sending = sending
        self.loop = asyncio.get_running_loop()
        self.done = self.loop.create_future()
        self.received = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport: Any = transport

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed a connection"))

    def send(self) -> None:
        following = self.sending.next()
        if following is None:
            self.done.set_result(None)
            self.transport.close()
            return
        self.due, self.request = following  # latency counts from due: a server that is late does not excuse itself
        delay_s = self.due - time.perf_counter()
        if delay_s > 0:
            self.loop.call_later(delay_s, self.write_now)
        else:
            self.transport.write(self.request)

    def write_now(self) -> None:
        self.due = time.perf_counter()  # a timer is a millisecond early or late, which is not the server's doing
        self.transport.write(self.request)

    def data_received(self, data: bytes) -> None:
        self.received += data
        head = self._head.match(self.received)
        if not head or len(self.received) < head.end() + int(head[2]):
            return
        if head[1] not in (b"200", b"202"):
            self.done.set_exception(RuntimeError(f"answered {self.received[:500]!r} to {self.request[:200]!r}"))
            self.transport.close()
            return
        self.sending.end = time.perf_counter()
        self.sending.histogram[round(100 * math.log(1e6 * (self.sending.end - self.due)))] += 1
        self.received = b""
        self.send()


async def send_all(load: Load) -> Outcome:
    loop = asyncio.get_running_loop()
    sending = Sending(load)
    connections = [
        (await loop.create_connection(partial(Connection, sending), "127.0.0.1", load.port))[1]
        for _ in range(load.connections)
    ]
    sending.start = time.perf_counter()
    for connection in connections:
        connection.send()
    await asyncio.gather(*(connection.done for connection in connections))
    return Outcome(sending.histogram.total(), sending.end - sending.start, sending.histogram)


def run_load(load: Load) -> Outcome:
    """What a generator process runs."""
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:  # uvloop, if there is one
        return runner.run(send_all(load))


@contextmanager
def generators(number: int) -> Iterator[ProcessPoolExecutor]:
    """Processes that wait for a load, started before anything is measured. Ctrl-C is for this process alone."""
    context = multiprocessing.get_context("spawn")
    ignore_interrupt = (signal.SIGINT, signal.SIG_IGN)
    with ProcessPoolExecutor(number, context, initializer=signal.signal, initargs=ignore_interrupt) as pool:
        list(pool.map(time.sleep, [0.5] * number))
        yield pool


# ---------------------------------------------------------------------------------------------- events, requests


def make_row(number: int, event_id: str, customers: int = CUSTOMERS, timestamp_us: int = 0) -> Row:
    properties = (
        f'{{"model":"model-{number % 20}","endpoint":"/v1/items/{number % 100}","tokens":{number % 5000},'
        f'"duration_ms":{number % 977 / 10},"region":"eu-west-{number % 3}"}}'
    )
    customer, now = f"cust_{number * 7919 % customers}", now_us()
    at_us = timestamp_us or now
    return Row(ENVIRONMENT_NUMBER, event_id, customer, "", "api_request", "benchmark", at_us, now, properties)


def wire_event(row: Row) -> dict[str, object]:
    """The row as a client sends it; without an id if it has none."""
    return {
        "event_name": row.event_name,
        "external_customer_id": row.external_customer_id,
        "source": row.source,
        "timestamp": to_datetime(row.timestamp_us),
        "properties": msgspec.Raw(row.properties.encode()),
    } | ({"event_id": row.id} if row.id else {})


def http_request(method: str, path: str, content: object = None) -> bytes:
    body = b"" if content is None else msgspec.json.encode(content)
    head = f"{method} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nx-api-key: {KEY}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def bulk_requests(batches: int, make_id: Callable[[], object]) -> list[bytes]:
    rows = [make_row(number, str(make_id())) for number in range(batches * MAX_BATCH)]
    bodies = [{"events": [wire_event(row) for row in rows[i::batches]]} for i in range(batches)]
    return [http_request("POST", "/v1/events/bulk", body) for body in bodies]


def single_requests(count: int) -> list[bytes]:
    rows = [make_row(number, str(uuid.uuid4())) for number in range(count)]
    return [http_request("POST", "/v1/events", wire_event(row)) for row in rows]


# ---------------------------------------------------------------------------------------------- servers


class Server:
    """A server in a process of its own, up from the first answered /health. To be entered and left."""

    def __init__(self, *command: object) -> None:
        start = time.perf_counter()
        self.process = subprocess.Popen([sys.executable, *map(str, command)], stdout=subprocess.PIPE, text=True)
        try:
            banner = iter(self.process.stdout or ())
            found = next(filter(None, (re.search(r"http://127.0.0.1:(\d+)", line) for line in banner)), None)
            if found is None:
                raise RuntimeError(f"{command[0]} ended before it listened")
            self.port = int(found[1])
            self.ask(http_request("GET", "/health"))
        except BaseException:
            self.__exit__()
            raise
        self.start_up_s = time.perf_counter() - start

    def ask(self, request: bytes) -> bytes:
        """The body of one answer."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=600) as sock:
            sock.sendall(request)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            body = answer.read()
        if answer.status not in (200, 201, 202):
            raise RuntimeError(f"answered {answer.status} {body[:500]!r} to {request[:200]!r}")
        return body

    @property
    def rss_mb(self) -> float:
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        status = Path(f"/proc/{self.process.pid}/status")
        text = status.read_text() if status.exists() else subprocess.check_output(command, text=True)
        found = re.search(r"VmRSS:\s*(\d+)", text) or re.search(r"(\d+)", text)
        return int(found[1]) / 1024 if found else math.nan

    @property
    def handles(self) -> float:
        """Open files and sockets; nan where there is no /proc."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.exists() else math.nan

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            self.process.stdout.close()  # type: ignore[union-attr]


def serve_flags(db: Path, *more: object) -> list[str]:
    return list(map(str, ("serve", "--port", 0, "--db", db, "--api-key", f"{KEY}={ENVIRONMENT}", *more)))


def our_server(db: Path, *flags: object) -> Server:
    return Server(eventstore.__file__, *serve_flags(db, *flags))


def aging_server(db: Path, *flags: object) -> Server:
    """One whose clock is fast: a day takes a minute."""
    return Server(__file__, "aging", json.dumps(serve_flags(db, "--log-level", "error", *flags)))


def serve_aging(flags: Sequence[str]) -> int:
    start_us = now_us()
    arguments = eventstore.parse_arguments(flags)
    arguments.clock = lambda: start_us + 24 * 60 * (now_us() - start_us)
    return eventstore.serve(arguments)


def floor_server(db: Path) -> Server:
    return Server(__file__, "floor", db)


def serve_floor(db: str) -> None:
    """A bare Starlette route. POST /setup tells it what to answer, and what to fetch before it does."""
    conn = eventstore.connect(db, READER_PRAGMAS)
    statement, body = "", b"{}"
    parameters: Iterator[dict[str, object]] = iter(())

    async def set_up(request: Request) -> Response:
        nonlocal statement, parameters, body
        setup = await request.json()
        statement, body = setup["statement"], setup["answer"].encode()
        parameters = itertools.cycle(setup["parameters"])
        return Response(b"{}")

    async def answer(request: Request) -> Response:
        await request.body()
        if statement:
            conn.execute(statement, next(parameters)).fetchall()
        return Response(body, media_type="application/json")

    app = Starlette(
        routes=[Route("/setup", set_up, methods=["POST"]), Route("/{path:path}", answer, methods=["GET", "POST"])]
    )
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(app, http="httptools", log_level="warning", access_log=False, server_header=False)
        uvicorn.Server(config).run(sockets=[listener])


# ---------------------------------------------------------------------------------------------- one table size


class Effort(NamedTuple):
    sizes: tuple[int, ...] = (10_000, 1_000_000)
    rounds: int = 3
    seconds: float = 1.0  # for each run that has no fixed amount of work
    batches: int = 48
    singles: int = 20_000


QUICK = Effort((1_000, 2_000), 1, 0.05, 4, 200)
FULL = Effort((10_000, 1_000_000, 10_000_000))


class Bench:
    """A file of `size` events with the server and the floor server on it. To be entered and left."""

    def __init__(self, folder: Path, size: int, effort: Effort, pool: ProcessPoolExecutor) -> None:
        self.db, self.size, self.effort, self.pool = folder / f"events-{size}.db", size, effort, pool
        self.customers = min(CUSTOMERS, size // 100)
        self.start_us = now_us() - 6 * DAY_US  # within the last seven days, which a page has by default
        self.end_us = now_us()

    def __enter__(self) -> Bench:
        fill(self.db, self.size, self.customers, self.start_us, self.end_us)
        self.bytes_per_event = self.db.stat().st_size / self.size
        with ExitStack() as stack:  # Ctrl-C in here stops what has been started
            self.ours = stack.enter_context(our_server(self.db, "--query-timeout-s", 600))  # 10 M events, 20 meters
            self.floor = stack.enter_context(floor_server(self.db))
            self._servers = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.db}{suffix}").unlink(missing_ok=True)

    def send(self, server: Server, requests: Sequence[bytes], connections: int, **options: Any) -> Future[Outcome]:
        options = {"seconds": self.effort.seconds} | options
        return self.pool.submit(run_load, Load(server.port, requests, connections, **options))

    def set_floor(self, statement: str, parameters: Sequence[dict[str, object]], answer: bytes) -> None:
        setup = {"statement": statement, "parameters": parameters, "answer": answer.decode()}
        self.floor.ask(http_request("POST", "/setup", setup))

    @contextmanager
    def added(self) -> Iterator[sqlite3.Connection]:
        """A writing connection; what is stored inside, by it or by the server, is gone afterwards."""
        with closing(eventstore.connect(str(self.db), WRITER_PRAGMAS)) as conn:
            yield conn
        # By another connection: this one's cache would be warm in the next round, while the server's is not.
        with closing(eventstore.connect(str(self.db), WRITER_PRAGMAS)) as conn:
            conn.execute("DELETE FROM events WHERE seq > ?", [self.size])
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def fill(db: Path, size: int, customers: int, start_us: int, end_us: int) -> None:
    """A file of events in the order of their times, with random ids, written as the server writes them."""
    api_key = eventstore.ApiKey.hashed(KEY, ENVIRONMENT)
    eventstore.Store(eventstore.Settings(db=str(db), api_keys=(api_key,))).close()  # makes the tables
    conn = eventstore.connect(str(db), ("PRAGMA synchronous = OFF", "PRAGMA cache_size = -1048576"))
    step_us = (end_us - start_us) / max(size, 1)
    for at in range(0, size, MAX_BATCH * 10):
        numbers = range(at, min(at + MAX_BATCH * 10, size))
        rows = [make_row(number, str(uuid.uuid4()), customers, start_us + int(number * step_us)) for number in numbers]
        eventstore.insert_events(conn, rows, eventstore.WRITE_LOCK_TIMEOUT_S)
    conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    conn.close()


# ---------------------------------------------------------------------------------------------- measurements

Figures = tuple[float, ...]


class Measurement(NamedTuple):
    """Two ways to the same figures, the server's and the floor's."""

    units: dict[str, str]  # of each figure, by its name; what ends in /s is better when greater, all else when smaller
    floor_name: str
    ours: Callable[[Bench], Figures]
    floor: Callable[[Bench], Figures]


def send_bulk(make_id: Callable[[], object], bench: Bench) -> Figures:
    requests = bulk_requests(bench.effort.batches, make_id)
    with bench.added():
        outcome = bench.send(bench.ours, requests, 8, seconds=60, repeat=False).result()
    return (outcome.per_second * MAX_BATCH,)


def insert_raw(conn: sqlite3.Connection, rows: Iterable[Row]) -> None:
    conn.execute("BEGIN IMMEDIATE")
    conn.executemany(INSERT, rows)
    conn.execute("COMMIT")


def insert_bulk_raw(make_id: Callable[[], object], bench: Bench) -> Figures:
    count = bench.effort.batches * MAX_BATCH
    rows = [make_row(number, str(make_id())) for number in range(count)]
    with bench.added() as conn:
        start = time.perf_counter()
        for at in range(0, count, MAX_BATCH):
            insert_raw(conn, rows[at : at + MAX_BATCH])
        return (count / (time.perf_counter() - start),)


def no_id() -> str:
    """The server makes one."""
    return ""


MAKE_ID = eventstore.IdMaker()


def ordered_id() -> str:
    """What the server would make."""
    return MAKE_ID(now_us())


def send_singles(bench: Bench) -> Figures:
    with bench.added():
        outcome = bench.send(bench.ours, single_requests(bench.effort.singles), 64, repeat=False).result()
    return outcome.per_second, outcome.percentile_ms(99)


def answer_singles(bench: Bench) -> Figures:
    bench.set_floor("", [], b'{"message":"Event accepted for processing","event_id":"%s"}' % str(uuid.uuid4()).encode())
    outcome = bench.send(bench.floor, single_requests(bench.effort.singles), 64, repeat=False).result()
    return outcome.per_second, outcome.percentile_ms(99)


class Page(NamedTuple):
    """A page of 50 in the URL and in SQL; `places` makes the values that both hold, always other ones."""

    query: str
    where: str
    places: Callable[[Bench, int], dict[str, object]]

    def requests(self, bench: Bench) -> list[bytes]:
        url = "/v1/events?page_size=50" + self.query
        return [http_request("GET", url.format(**self.places(bench, i))) for i in range(20)]

    def set_floor(self, bench: Bench) -> None:
        where = f"environment = :environment AND timestamp_us >= :start_us AND {self.where}"
        statement = f"SELECT {PAGE_COLUMNS} FROM events WHERE {where} ORDER BY timestamp_us DESC, id DESC LIMIT 51"
        common = {"environment": ENVIRONMENT_NUMBER, "start_us": bench.end_us - 7 * DAY_US, "end_us": bench.end_us}
        answer = bench.ours.ask(self.requests(bench)[0])
        if (count := len(json.loads(answer)["events"])) != 50:
            raise RuntimeError(f"the page {self.query} has {count} events")
        bench.set_floor(statement, [common | self.places(bench, i) for i in range(20)], answer)


def deep_place(bench: Bench, number: int) -> dict[str, object]:
    """A cursor that 90 % of the events come before."""
    conn = sqlite3.connect(bench.db)
    seq = bench.size // 10 - number
    at_us, event_id = conn.execute("SELECT timestamp_us, id FROM events WHERE seq = ?", [seq]).fetchone()
    conn.close()
    return {"at_us": at_us, "id": event_id, "cursor": f"{at_us * 1000}::{event_id}"}


def customer_place(bench: Bench, number: int) -> dict[str, object]:
    return {"customer": f"cust_{number % bench.customers}"}


def model_place(_: Bench, number: int) -> dict[str, object]:
    return {"model": f"model-{number}"}


RECENT = "timestamp_us <= :end_us"
OF_CUSTOMER = f"{RECENT} AND external_customer_id = :customer"
OF_MODEL = f"{RECENT} AND properties ->> '$.model' = :model"
FIRST_PAGE = Page("", RECENT, lambda bench, number: {})
PAGES = {
    "page of 50, first": FIRST_PAGE,
    "page of 50, 90 % deep": Page("&iter_last_key={cursor}", "(timestamp_us, id) < (:at_us, :id)", deep_place),
    "page of 50, one customer": Page("&external_customer_id={customer}", OF_CUSTOMER, customer_place),
    "page of 50, a property of 1 in 20": Page("&property_filters=model:{model}", OF_MODEL, model_place),
}


def send_pages(page: Page, bench: Bench) -> Figures:
    return (bench.send(bench.ours, page.requests(bench), 8).result().per_second,)


def answer_pages(page: Page, bench: Bench) -> Figures:
    page.set_floor(bench)
    return (bench.send(bench.floor, page.requests(bench), 8).result().per_second,)


def send_pages_under_ingest(bench: Bench) -> Figures:
    with bench.added():
        endless = bulk_requests(8, no_id)
        ingest = bench.send(bench.ours, endless, 8, seconds=bench.effort.seconds * 1.5)
        pages = bench.send(bench.ours, FIRST_PAGE.requests(bench), 8).result()
        ingest.result()
    return pages.per_second, pages.percentile_ms(50), pages.percentile_ms(99)


def answer_pages_under_ingest(bench: Bench) -> Figures:
    FIRST_PAGE.set_floor(bench)
    with bench.added() as conn:
        future = bench.send(bench.floor, FIRST_PAGE.requests(bench), 8)
        while not future.done():
            insert_raw(conn, [make_row(number, ordered_id()) for number in range(MAX_BATCH)])
    pages = future.result()
    return pages.per_second, pages.percentile_ms(50), pages.percentile_ms(99)


SUM = {"aggregation_type": "SUM", "property_name": "tokens"}
COUNT_UNIQUE = {"aggregation_type": "COUNT_UNIQUE", "property_name": "endpoint"}
RAW_SUM, RAW_COUNT_UNIQUE = "total(properties ->> '$.tokens')", "count(DISTINCT properties ->> '$.endpoint')"
USAGES = {
    "usage: COUNT": ({"aggregation_type": "COUNT"}, "count(*)", ""),
    "usage: SUM": (SUM, RAW_SUM, ""),
    "usage: COUNT_UNIQUE": (COUNT_UNIQUE, RAW_COUNT_UNIQUE, ""),
    "usage: SUM for each DAY": (SUM | {"window_size": "DAY"}, RAW_SUM, f"GROUP BY timestamp_us / {DAY_US}"),
}


def send_usage(asked: dict[str, str], bench: Bench) -> Figures:
    start_time, end_time = to_datetime(bench.start_us), to_datetime(bench.end_us)
    body = {"event_name": "api_request", "start_time": start_time, "end_time": end_time, **asked}
    request = http_request("POST", "/v1/events/usage", body)
    answer = json.loads(bench.ours.ask(request))
    if asked["aggregation_type"] == "COUNT" and answer["value"] != bench.size:
        raise RuntimeError(f"the table has {answer['value']} events, not {bench.size}")
    return (1000 / bench.send(bench.ours, [request], 1).result().per_second,)


MODELS = ('"model-1"', '"model-2"', '"model-3"')
METERS = [  # of each other one the events of three models
    (kind, field, bool(number % 2))
    for number in range(4)
    for kind, field in (("COUNT", ""), ("SUM", "tokens"), ("MAX", "tokens"), ("AVG", "duration_ms"),
                        ("COUNT_UNIQUE", "endpoint"))
]  # fmt: skip


def send_analytics(bench: Bench) -> Figures:
    """The usage of all meters by region and day."""
    if not json.loads(bench.ours.ask(http_request("GET", "/v1/meters")))["items"]:
        for kind, field, is_filtered in METERS:
            filters = [{"key": "model", "values": [json.loads(model) for model in MODELS]}] * is_filtered
            meter = {"name": kind, "event_name": "api_request", "aggregation": {"type": kind, "field": field},
                     "filters": filters, "reset_usage": "BILLING_PERIOD"}  # fmt: skip
            bench.ours.ask(http_request("POST", "/v1/meters", meter))
    start_time, end_time = to_datetime(bench.start_us), to_datetime(bench.end_us)
    asked = {"group_by": ["properties.region"], "window_size": "DAY", "start_time": start_time, "end_time": end_time}
    request = http_request("POST", "/v1/events/analytics", asked)
    return repeated_ms(lambda: bench.ours.ask(request), bench)


def meter_raw(kind: str, field: str, is_filtered: bool) -> tuple[str, str]:
    """What analytics asks of one meter, as SQL."""
    function = {"SUM": "total", "COUNT_UNIQUE": "count"}.get(kind, kind)
    distinct = "DISTINCT " if kind == "COUNT_UNIQUE" else ""
    aggregate = f"{function}({distinct}properties ->> '$.{field}')" if field else "count(*)"
    columns = f"properties ->> '$.region' AS region, timestamp_us / {DAY_US} AS day, count(*), {aggregate}"
    where = f"AND properties -> '$.model' IN ({', '.join(map(repr, MODELS))}) " if is_filtered else ""
    return columns, f"{where}GROUP BY region, day"


def aggregate_raw(wanted: Sequence[tuple[str, str]], bench: Bench) -> Figures:
    where = "environment = ? AND event_name = 'api_request' AND timestamp_us >= ? AND timestamp_us < ?"
    conn = eventstore.connect(str(bench.db), READER_PRAGMAS)
    parameters = (ENVIRONMENT_NUMBER, bench.start_us, bench.end_us)

    def aggregate() -> None:
        for columns, more in wanted:
            conn.execute(f"SELECT {columns} FROM events WHERE {where} {more}", parameters).fetchall()

    with closing(conn):
        return repeated_ms(aggregate, bench)


def repeated_ms(act: Callable[[], object], bench: Bench) -> Figures:
    """How long it takes, at least once: what may take longer than a run does."""
    start = time.perf_counter()
    for count in itertools.count(1):
        act()
        if (seconds := time.perf_counter() - start) > bench.effort.seconds:
            return (1000 * seconds / count,)
    raise AssertionError


def forward_events(bench: Bench) -> Figures:
    """What there is goes to an empty server, from the start of the one that sends it."""
    with tempfile.TemporaryDirectory(dir=bench.db.parent) as folder, our_server(Path(folder) / "there.db") as target:
        there = eventstore.connect(f"{folder}/there.db", READER_PRAGMAS)
        with closing(there), our_server(bench.db, "--forward-to", f"http://127.0.0.1:{target.port}"):
            start, sent = time.perf_counter(), 0
            while sent < bench.size and (not sent or time.perf_counter() < start + bench.effort.seconds):
                time.sleep(0.001)
                sent = there.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
            seconds = time.perf_counter() - start
    for progress in bench.db.parent.glob(f"{bench.db.name}.forward-*.json"):
        progress.unlink()
    return (sent / seconds,)


def insert_into_empty(bench: Bench) -> Figures:
    """The floor of it: the same events stored there."""
    with tempfile.TemporaryDirectory(dir=bench.db.parent) as folder:
        fill(Path(folder) / "there.db", 0, bench.customers, 0, 0)
        rows = [
            make_row(number, str(uuid.uuid4())) for number in range(min(bench.size, bench.effort.batches * MAX_BATCH))
        ]
        with closing(eventstore.connect(f"{folder}/there.db", WRITER_PRAGMAS)) as conn:
            start = time.perf_counter()
            for at in range(0, len(rows), MAX_BATCH):
                insert_raw(conn, rows[at : at + MAX_BATCH])
            return (len(rows) / (time.perf_counter() - start),)


RETAIN_DAYS = 30


def store_old(conn: sqlite3.Connection, bench: Bench) -> range:
    """The seqs of events that retention deletes, behind those of the table."""
    at_us = bench.start_us - 2 * RETAIN_DAYS * DAY_US
    count = bench.effort.batches * MAX_BATCH
    rows = [make_row(number, str(uuid.uuid4()), bench.customers, at_us) for number in range(count)]
    insert_raw(conn, [row._replace(ingested_at_us=at_us) for row in rows])
    (last,) = conn.execute("SELECT max(seq) FROM events").fetchone()
    conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return range(last + 1 - count, last + 1)


def left_of(conn: sqlite3.Connection, old: range) -> int:
    (count,) = conn.execute("SELECT count(*) FROM events WHERE seq BETWEEN ? AND ?", [old[0], old[-1]]).fetchone()
    return int(count)


def delete_beside_singles(conn: sqlite3.Connection, old: range, bench: Bench, server: Server,
                          act: Callable[[], object]) -> Figures:  # fmt: skip
    """How fast old events go while single ones are stored, and how long those take."""
    start, before = time.perf_counter(), left_of(conn, old)
    singles = bench.send(server, single_requests(bench.effort.singles), 8, per_second=500)
    while (left := left_of(conn, old)) and (left == before or not singles.done()):
        act()
    return (before - left) / (time.perf_counter() - start), singles.result().percentile_ms(99)


def retain(bench: Bench) -> Figures:
    with bench.added() as conn:
        old = store_old(conn, bench)
        with our_server(bench.db, "--retain-days", RETAIN_DAYS) as server:
            while left_of(conn, old) == len(old):  # it looks through the whole table first
                time.sleep(0.01)
            return delete_beside_singles(conn, old, bench, server, lambda: time.sleep(0.01))


def delete_raw(bench: Bench) -> Figures:
    bench.set_floor("", [], b"{}")
    with bench.added() as conn:
        old = store_old(conn, bench)
        steps = itertools.count(old[0], MAX_BATCH)

        def delete_some() -> None:
            first = next(steps)
            conn.execute("DELETE FROM events WHERE seq BETWEEN ? AND ?", [first, first + MAX_BATCH - 1])

        return delete_beside_singles(conn, old, bench, bench.floor, delete_some)


def start_up(server: Callable[[Path], Server], bench: Bench) -> Figures:
    with server(bench.db) as started:
        return 1000 * started.start_up_s, started.rss_mb


def wire_bytes_per_event(_: Bench) -> Figures:
    return (statistics.mean(len(msgspec.json.encode(wire_event(make_row(i, str(uuid.uuid4()))))) for i in range(1000)),)


SQLITE, ROUTE, ROUTE_AND_SQLITE = "sqlite3", "Starlette", "Starlette + sqlite3"
MEASUREMENTS = (
    *(
        Measurement({name: "events/s"}, SQLITE, partial(send_bulk, ours), partial(insert_bulk_raw, raw))
        for name, ours, raw in (
            ("bulk of 1000, uuid4 ids", uuid.uuid4, uuid.uuid4),
            ("bulk of 1000, ids made here", no_id, ordered_id),
        )
    ),
    Measurement({"single events": "events/s", "single events, p99": "ms"}, ROUTE, send_singles, answer_singles),
    *(
        Measurement({name: "pages/s"}, ROUTE_AND_SQLITE, partial(send_pages, page), partial(answer_pages, page))
        for name, page in PAGES.items()
    ),
    Measurement(
        {
            "first page under ingest": "pages/s",
            "first page under ingest, p50": "ms",
            "first page under ingest, p99": "ms",
        },
        ROUTE_AND_SQLITE,
        send_pages_under_ingest,
        answer_pages_under_ingest,
    ),
    *(
        Measurement({name: "ms"}, SQLITE, partial(send_usage, asked), partial(aggregate_raw, [(aggregate, group)]))
        for name, (asked, aggregate, group) in USAGES.items()
    ),
    Measurement({"forwarding to an empty server": "events/s"}, SQLITE, forward_events, insert_into_empty),
    Measurement(
        {f"analytics: {len(METERS)} meters by property and DAY": "ms"},
        SQLITE,
        send_analytics,
        partial(aggregate_raw, [meter_raw(*meter) for meter in METERS]),
    ),
    Measurement(
        {"retention, old events deleted": "events/s", "retention, single events beside it, p99": "ms"},
        ROUTE_AND_SQLITE,
        retain,
        delete_raw,
    ),
    Measurement(
        {"start to the first answer": "ms", "memory, idle": "MB"},
        ROUTE,
        partial(start_up, our_server),
        partial(start_up, floor_server),
    ),
    Measurement({"memory after all this": "MB"}, ROUTE, lambda it: (it.ours.rss_mb,), lambda it: (it.floor.rss_mb,)),
    Measurement(
        {"file, for each event": "bytes"}, "JSON as sent", lambda it: (it.bytes_per_event,), wire_bytes_per_event
    ),
)
ROWS = [(name, unit, it.floor_name) for it in MEASUREMENTS for name, unit in it.units.items()]


ENOUGH_S = 120  # for all rounds of a measurement: what takes longer is not for chance to decide, and has no other round


class Compared(NamedTuple):
    ours: float
    floor: float
    ratio: float  # of costs: how many times the floor's


def cost_ratio(unit: str, value: float, base: float) -> float:
    return base / value if unit.endswith("/s") else value / base


def compare(measurement: Measurement, bench: Bench) -> list[Compared]:
    """Floor, ours, floor, ours, ...: the medians for each row of the measurement."""
    rounds: list[tuple[Figures, Figures]] = []
    start = time.perf_counter()
    while len(rounds) < bench.effort.rounds and (not rounds or time.perf_counter() - start < ENOUGH_S):
        rounds.append((measurement.floor(bench), measurement.ours(bench)))
    compared = []
    for i, unit in enumerate(measurement.units.values()):
        pairs = [(ours[i], floor[i]) for floor, ours in rounds]
        ratio = statistics.median(cost_ratio(unit, *pair) for pair in pairs)
        ours, floor = map(statistics.median, zip(*pairs, strict=True))
        compared.append(Compared(ours, floor, ratio))
    return compared


# ---------------------------------------------------------------------------------------------- the table


def number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """A table with its columns aligned: the first two to the left, numbers to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)


def fsyncs_per_s(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(500):
            file.write(bytes(4096))
            os.fsync(file.fileno())
        return 500 / (time.perf_counter() - start)


def machine(folder: Path) -> str:
    """What the figures hold for."""
    cpuinfo, mounts = Path("/proc/cpuinfo"), Path("/proc/mounts")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    mounted = [line.split()[1:3] for line in mounts.read_text().splitlines()] if mounts.exists() else []
    above = [(len(place), kind) for place, kind in mounted if folder.resolve().is_relative_to(place)]
    kind = max(above)[1] if above else "unknown file system"
    return (
        f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.system()}; Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}; "
        f"{kind}, {fsyncs_per_s(folder):,.0f} synced writes/s of 4 KB"
    )


def benchmark(effort: Effort, folder: Path) -> int:
    """Measure everything at every size and print the table."""
    table = [["", "floor"], *([f"{name}, {unit}", floor_name] for name, unit, floor_name in ROWS)]
    results: list[list[Compared]] = []
    on = machine(folder)
    with generators(2) as pool:
        for size in effort.sizes:
            print(f"{size:,} events: filling the table", file=sys.stderr, flush=True)
            with Bench(folder, size, effort, pool) as bench:
                results.append([])
                for measurement in MEASUREMENTS:
                    print(f"{size:,} events: {next(iter(measurement.units))}", file=sys.stderr, flush=True)
                    results[-1] += compare(measurement, bench)
    for size, result in zip(effort.sizes, results, strict=True):
        cells = [[number(it.ours), number(it.floor), f"{it.ratio:.2f}"] for it in result]
        table = [a + b for a, b in zip(table, [[f"{size:,} events", "its floor", "ratio"], *cells], strict=True)]
    growth = [
        f"{cost_ratio(unit, last.ours, first.ours):.2f}"
        for (_, unit, _), first, last in zip(ROWS, results[0], results[-1], strict=True)
    ]
    print(f"{on}\n\n{markdown([[*line, cell] for line, cell in zip(table, ['growth', *growth], strict=True)])}")
    return 0


# ---------------------------------------------------------------------------------------------- soak


class Mixed(NamedTuple):
    """One kind of request of the mixed load, at a pace that leaves the server room."""

    per_second: float
    connections: int
    requests: Callable[[int], list[bytes]]  # as many as asked for, or fewer to be sent round and round


def recent_usage(_: int) -> list[bytes]:
    """Over the last ten seconds: what it reads does not grow with the table."""
    start_time, end_time = to_datetime(now_us() - 10_000_000), to_datetime(now_us())
    asked = {"aggregation_type": "SUM", "property_name": "tokens", "start_time": start_time, "end_time": end_time}
    return [http_request("POST", "/v1/events/usage", {"event_name": "api_request", **asked})]


EVER = "start_time=2000-01-01T00:00:00Z&end_time=3000-01-01T00:00:00Z"  # the server's clock runs ahead
KNOWN_IDS = [str(uuid.uuid4()) for _ in range(MAX_BATCH)]
MIX = {
    "bulk": Mixed(2, 2, lambda count: bulk_requests(count, uuid.uuid4)),
    "single": Mixed(100, 8, single_requests),
    "page": Mixed(50, 4, lambda _: [http_request("GET", f"/v1/events?{EVER}")]),
    "customer": Mixed(50, 4, lambda _: [http_request("GET", f"/v1/events?{EVER}&external_customer_id=cust_42")]),
    "usage": Mixed(1, 1, recent_usage),
    "duplicate": Mixed(1, 1, lambda _: bulk_requests(1, iter(KNOWN_IDS).__next__)),
}
MOST_INTERVAL_S = 10
# What the last third may be of the second third: this many times, and this much more.
P99S = [f"{name} p99 ms" for name in MIX]
FLAT = {
    "RSS MB": (1.1, 4),
    "WAL MB": (1.1, 8),
    "file MB": (1.1, 8),
    "behind": (1.1, 3000),
    "handles": (1, 2),
} | dict.fromkeys(P99S, (1.5, 5))
LEAST_EVENTS = 0.95


def behind(server: Server) -> int:
    """How many events it has not forwarded yet."""
    monitoring = server.ask(
        http_request("GET", "/v1/events/monitoring?start_time=2000-01-01T00:00:00Z&end_time=2000-01-02T00:00:00Z")
    )
    return int(json.loads(monitoring)["post_processing_lag"])


def interval(server: Server, db: Path, pool: ProcessPoolExecutor, seconds: float) -> dict[str, float]:
    """Send the mix for so long; what the server looks like in the middle of it, and how it answered."""
    loads = {
        name: Load(server.port, kind.requests(math.ceil(kind.per_second * seconds)), kind.connections, seconds,
                   per_second=kind.per_second)
        for name, kind in MIX.items()
    }  # fmt: skip
    futures = {name: pool.submit(run_load, load) for name, load in loads.items()}
    time.sleep(seconds / 2)
    sizes = {"WAL MB": Path(f"{db}-wal").stat().st_size / 2**20, "file MB": db.stat().st_size / 2**20}
    seen = {"RSS MB": server.rss_mb, **sizes, "behind": behind(server), "handles": server.handles}
    outcomes = {name: future.result() for name, future in futures.items()}
    events = outcomes["bulk"].answered * MAX_BATCH + outcomes["single"].answered
    latencies = [outcome.percentile_ms(99) for outcome in outcomes.values()]
    return {"events/s": events / seconds, **dict(zip(P99S, latencies, strict=True)), **seen}


def rises(samples: Sequence[dict[str, float]]) -> list[str]:
    """What did not stay flat from the second third to the last; the first is for warming up."""
    third = len(samples) // 3
    before, after = (
        {name: statistics.median(sample[name] for sample in part) for name in samples[0]}
        for part in (samples[third:-third], samples[-third:])
    )
    found = [name for name, (times, more) in FLAT.items() if after[name] > before[name] * times + more]
    found += ["events/s"] * (after["events/s"] < before["events/s"] * LEAST_EVENTS)
    return [f"{name} went from {number(before[name])} to {number(after[name])}" for name in found]


def soak(minutes: float, folder: Path) -> int:
    """Mixed load for so long, a day of the server's clock a minute; exit status 1 if something did not stay flat. It
    forwards everything, and keeps what is not older than a day."""
    db, interval_s = folder / "soak.db", min(MOST_INTERVAL_S, minutes * 60 / 12)
    print(machine(folder), flush=True)
    samples: list[dict[str, float]] = []
    with ExitStack() as stack:  # Ctrl-C: the servers end, so the loads do
        pool = stack.enter_context(generators(len(MIX)))
        target = stack.enter_context(aging_server(folder / "target.db", "--retain-days", 1))
        forwarding = ("--forward-to", f"http://127.0.0.1:{target.port}")
        server = stack.enter_context(aging_server(db, "--retain-days", 1, *forwarding))
        start = time.monotonic()
        while (elapsed_s := time.monotonic() - start) < minutes * 60 or len(samples) < 3:
            samples.append(interval(server, db, pool, interval_s))
            figures = ", ".join(f"{name} {number(value)}" for name, value in samples[-1].items())
            print(f"{elapsed_s:5.0f} s: {figures}", flush=True)
    found = rises(samples)
    print(
        "not flat: " + "; ".join(found)
        if found
        else "flat: memory, file, WAL, handles and latencies stayed as they were"
    )
    return 1 if found else 0


# ---------------------------------------------------------------------------------------------- command line


def main(argv: Sequence[str] | None = None) -> int:
    os.environ["EVENTSTORE_FORWARD_API_KEY"] = KEY
    parser = argparse.ArgumentParser("benchmark", description="How fast eventstore is, beside the least possible.")
    parser.add_argument("--dir", help="where to make the temporary folder: this disk is measured")
    effort = parser.add_mutually_exclusive_group()
    effort.set_defaults(effort=Effort())
    for name, value in (("--quick", QUICK), ("--full", FULL)):
        sizes = " and ".join(f"{size:,}" for size in value.sizes)
        effort.add_argument(name, dest="effort", action="store_const", const=value, help=f"tables of {sizes} events")
    commands = parser.add_subparsers(dest="command")
    commands.add_parser("soak").add_argument("--minutes", type=float, default=10)
    commands.add_parser("floor").add_argument("db")
    commands.add_parser("aging").add_argument("flags", type=json.loads)
    arguments = parser.parse_args(argv)
    if arguments.command == "floor":
        serve_floor(arguments.db)
        return 0
    if arguments.command == "aging":
        return serve_aging(arguments.flags)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    with tempfile.TemporaryDirectory(prefix="eventstore-benchmark-", dir=arguments.dir) as folder:
        if arguments.command == "soak":
            return soak(arguments.minutes, Path(folder))
        return benchmark(arguments.effort, Path(folder))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
