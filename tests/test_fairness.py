"""Fairness between clients: shares of the limits, turns in the queues, and requests whose client is gone."""

from __future__ import annotations

import asyncio
import json
import os
import random
import re
import socket
import sqlite3
import struct
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from starlette.requests import ClientDisconnect

import eventstore
from eventstore import (
    CALLER,
    ApiError,
    ApiKey,
    Caller,
    FieldError,
    Reader,
    ReaderPool,
    Row,
    Settings,
    Shares,
    Store,
    Turn,
    check_properties,
)
from eventstore_extras import connections
from eventstore_extras.mock import running_server
from helpers import (
    BODY,
    HEAD,
    KEY,
    Live,
    answer_on,
    becomes,
    event,
    eventually,
    free_port,
    posting,
    refused,
    request_bytes,
    serving,
    store,
    store_of,
    table,
)

OTHER = "other-key"
TWO_KEYS = ("--api-key", KEY, "--api-key", OTHER)


def test_a_new_key_finds_room_and_all_keys_stay_below_four_thirds_of_the_limit(choose: random.Random) -> None:
    shares = Shares(1_000_000)
    taken: list[tuple[bytes, int]] = []
    for _ in range(3000):
        key, amount = b"%d" % choose.randrange(1, 6), choose.randrange(1, 20_000)
        if choose.random() < 0.7:
            newcomer = key not in {holder for holder, _ in taken}
            if shares.take(key, amount):
                taken.append((key, amount))
            else:
                assert not newcomer or amount > 1_000_000 * 0.25 / (0.25 + 0.75 * 5)
        elif taken:
            shares.give_back(*taken.pop(choose.randrange(len(taken))))
        assert shares.total == sum(amount for _, amount in taken) <= 1_000_000 * 4 / 3
    for each in taken:
        shares.give_back(*each)
    assert (shares.total, dict(shares._used)) == (0, {})


def test_one_key_alone_may_use_the_whole_limit_and_one_request_alone_more() -> None:
    shares = Shares(100)
    assert [shares.take(b"a", 50), shares.take(b"a", 50), shares.take(b"a", 1)] == [True, True, False]
    shares.give_back(b"a", 100)
    assert shares.take(b"a", 500)
    assert shares.take(b"a", 500, own=500)
    assert not shares.take(b"b", 50)


def held_back(live: Live, key: str, size: int) -> socket.socket:
    """Send all but the last byte of a body."""
    sock = live.connect()
    body = json.dumps(event(properties={"text": "x" * size})).encode()
    sock.sendall(b"POST /v1/events HTTP/1.1\r\nHost: t\r\nx-api-key: %s\r\n" % key.encode())
    sock.sendall(b"Content-Length: %d\r\n\r\n" % len(body) + body[:-1])
    return sock


def test_only_the_key_that_holds_bodies_back_gets_a_503(tmp_path: Path) -> None:
    metrics = f"127.0.0.1:{free_port()}"
    flags = ("--queue-bytes", "1000000", "--metrics", metrics)
    with Live(tmp_path, *TWO_KEYS, *flags) as live, ExitStack() as stack:
        held = [stack.enter_context(held_back(live, KEY, 150_000)) for _ in range(6)]
        eventually(lambda: held_bytes(metrics) > 6 * 150_000)  # otherwise the next one could take their room
        assert status_of_large_event(live, KEY) == 503
        with live.client(OTHER) as other:
            for number in range(20):
                assert store(other, event(f"{number}", properties={"text": "x" * 50_000})).status_code == 202
        held[0].sendall(b"}")
        assert answer_on(held[0]).status_code == 202


def held_bytes(metrics: str) -> float:
    found = re.search(r"(?m)^eventstore_held_bytes (\S+)", httpx.get(f"http://{metrics}/metrics").text)
    assert found
    return float(found[1])


def status_of_large_event(live: Live, key: str) -> int:
    with live.client(key) as client:
        return client.post("/v1/events", json=event(properties={"text": "x" * 150_000})).status_code


@contextmanager
def opened(tmp_path: Path, **settings: Any) -> Iterator[Store]:
    made = Store(Settings(db=str(tmp_path / "events.db"), api_keys=(ApiKey.hashed(KEY),), **settings))
    try:
        yield made
    finally:
        made.close()


@contextmanager
def locked(tmp_path: Path) -> Iterator[None]:
    """Hold the write lock, so that everything waits behind the writer's present group."""
    with closing(sqlite3.connect(tmp_path / "events.db", isolation_level=None)) as conn:
        conn.execute("BEGIN IMMEDIATE")
        yield
        conn.execute("ROLLBACK")


def rows_of_batch(made: Store, name: str, number: int) -> list[Row]:
    environment = made.environments["development"]
    return [Row(environment, f"{name} {each}", "c", "", "e", "", 0, 0, "{}") for each in range(number)]


def as_key(key: bytes, gone: asyncio.Event | None = None) -> None:
    async def receive() -> dict[str, Any]:
        await (gone or asyncio.Event()).wait()
        return {"type": "http.disconnect"}

    caller = Caller({}, receive)
    caller.key = key
    CALLER.set(caller)


async def taken_by_the_writer(made: Store) -> None:
    """Wait until the writer has taken all that was sent to it; with `locked`, it waits for the lock with these."""
    await asyncio.sleep(0)
    await becomes(lambda: not (made.writer._few or made.writer._many or made.writer._operations))


async def of_key(key: bytes, call: Callable[[], Any]) -> Any:
    as_key(key)
    return await call()


def test_only_the_key_that_fills_the_queue_gets_a_503(tmp_path: Path) -> None:
    async def flood(made: Store) -> tuple[list[Any], list[Any]]:
        with locked(tmp_path):
            batches = [rows_of_batch(made, f"a{number}", 1000) for number in range(15)]
            flood = [asyncio.create_task(of_key(b"a", partial(made.insert, batch))) for batch in batches]
            await asyncio.sleep(0)
            singles = [rows_of_batch(made, f"b{number}", 1) for number in range(100)]
            others = [asyncio.create_task(of_key(b"b", partial(made.insert, single))) for single in singles]
            await asyncio.sleep(0)
        return await asyncio.gather(*flood, return_exceptions=True), await asyncio.gather(*others)

    with opened(tmp_path, queue_events=10_000) as made:
        of_a, of_b = asyncio.run(flood(made))
    assert [str(each) for each in of_a if isinstance(each, ApiError)] == [
        "10000 events wait to be written, the limit is 10000; nothing was stored, try again"
    ] * 5
    assert of_b == [1] * 100


class Groups:
    """The number of events in each commit of a store."""

    def __init__(self, made: Store) -> None:
        self.sizes: list[int] = []
        made.writer.on_commit = lambda events, seconds: self.sizes.append(events)


async def while_locked(made: Store, tmp_path: Path, *calls: tuple[bytes, int, int]) -> None:
    """Store requests of (key, their number, events in each), which all wait when the writer takes the first group."""
    with locked(tmp_path):
        tasks = [asyncio.create_task(of_key(b"x", partial(made.insert, rows_of_batch(made, "x", 1))))]
        await becomes(lambda: not made.writer._few and made.writer.waiting_events == 1)
        for key, number, events in calls:
            batches = [rows_of_batch(made, f"{key!r} {events} {each}", events) for each in range(number)]
            tasks += [asyncio.create_task(of_key(key, partial(made.insert, batch))) for batch in batches]
        await asyncio.sleep(0)
    await asyncio.gather(*tasks)


def test_small_requests_without_an_end_keep_no_batch_waiting(tmp_path: Path) -> None:
    with opened(tmp_path) as made:
        groups = Groups(made)
        asyncio.run(while_locked(made, tmp_path, (b"a", 3000, 2), (b"b", 1, 500)))
    assert groups.sizes == [1, 2500, 2000, 2000]


def test_a_commit_is_short_if_its_events_are_long(tmp_path: Path) -> None:
    async def send(made: Store, number: int) -> None:
        caller = Caller({"held_bytes": 8_000_000})
        caller.key = b"a"
        CALLER.set(caller)
        await made.insert(rows_of_batch(made, f"{number}", 20))

    async def flood(made: Store) -> None:
        with locked(tmp_path):
            tasks = [asyncio.create_task(of_key(b"x", partial(made.insert, rows_of_batch(made, "x", 20))))]
            await becomes(lambda: not made.writer._many and made.writer.waiting_events == 20)
            tasks += [asyncio.create_task(send(made, number)) for number in range(6)]
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    with opened(tmp_path) as made:
        groups = Groups(made)
        asyncio.run(flood(made))
    assert groups.sizes == [20, 40, 40, 40]  # 16 MB in each


async def noted(order: list[str], name: str, call: Callable[[], Any]) -> None:
    """Await a call with the key that the name begins with; then append the name."""
    as_key(name[:1].encode())
    await call()
    order.append(name)


async def order_of_answers(made: Store, tmp_path: Path, flood: Sequence[Callable[[], Any]], last: Any) -> list[str]:
    """While the writer waits, send many calls of one key, then one of another. Return the order of their answers."""
    order: list[str] = []
    note = partial(noted, order)
    with locked(tmp_path):
        blocker = asyncio.create_task(note("x", partial(made.insert, rows_of_batch(made, "x", 1))))
        await taken_by_the_writer(made)
        tasks = [asyncio.create_task(note(f"a{number}", call)) for number, call in enumerate(flood)]
        await asyncio.sleep(0)
        tasks.append(asyncio.create_task(note("b", last)))
        await asyncio.sleep(0)
    await asyncio.gather(blocker, *tasks)
    return order


def test_batches_of_two_keys_are_committed_in_turns(tmp_path: Path) -> None:
    with opened(tmp_path) as made:
        flood = [partial(made.insert, rows_of_batch(made, f"a{number}", 1000)) for number in range(40)]
        last = partial(made.insert, rows_of_batch(made, "b", 1000))
        order = asyncio.run(order_of_answers(made, tmp_path, flood, last))
    assert order.index("b") < 20  # in the order of arrival it would be the last of 42


def test_operations_are_grouped_and_take_turns_with_events(tmp_path: Path) -> None:
    def change(conn: sqlite3.Connection) -> None:
        conn.execute("INSERT INTO environments (name) VALUES (hex(randomblob(8)))")

    with opened(tmp_path) as made:
        last = partial(made.insert, rows_of_batch(made, "b", 1))
        order = asyncio.run(order_of_answers(made, tmp_path, [partial(made.write, change)] * 500, last))
        with closing(sqlite3.connect(tmp_path / "events.db")) as conn:
            assert conn.execute("SELECT count(*) FROM environments").fetchone()[0] == 501
    assert order.index("b") <= 101  # after one group of operations at most


def test_an_operation_that_fails_undoes_only_itself(tmp_path: Path) -> None:
    def change(conn: sqlite3.Connection, name: str) -> str:
        conn.execute("INSERT INTO environments (name) VALUES (?)", [name])
        if name == "refused":
            raise ApiError("not_found", "no")
        if name == "bug":
            raise KeyError(name)
        return name

    async def flood(made: Store) -> list[Any]:
        with locked(tmp_path):
            names = ["x", "one", "refused", "two", "bug", "three"]
            tasks = [
                asyncio.create_task(of_key(b"a", partial(made.write, partial(change, name=name)))) for name in names
            ]
            await asyncio.sleep(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    with opened(tmp_path) as made:
        outcomes = asyncio.run(flood(made))
        with closing(sqlite3.connect(tmp_path / "events.db")) as conn:
            names = {name for (name,) in conn.execute("SELECT name FROM environments")}
    assert [each.code if isinstance(each, ApiError) else each for each in outcomes] == [
        "x", "one", "not_found", "two", "internal_error", "three"]  # fmt: skip
    assert names == {"development", "x", "one", "two", "three"}


# ---------------------------------------------------------------------------------------------- queries


@contextmanager
def pool(tmp_path: Path, timeout_s: float = 30.0) -> Iterator[ReaderPool]:
    with opened(tmp_path):
        made = ReaderPool(str(tmp_path / "events.db"), timeout_s)
        try:
            yield made
        finally:
            made.close()


def test_a_query_of_one_key_does_not_wait_for_those_of_another(tmp_path: Path) -> None:
    release = threading.Event()
    order: list[str] = []
    begun: list[str] = []

    def wait(conn: sqlite3.Connection) -> None:
        begun.append("a")
        release.wait(30)
        order.append("a")

    def note(conn: sqlite3.Connection) -> None:
        order.append("b")

    async def flood(queries: ReaderPool) -> None:
        waiting = [asyncio.create_task(of_key(b"a", partial(queries.run, wait))) for _ in range(20)]
        await becomes(lambda: len(begun) == eventstore.READER_THREADS)
        for _ in range(5):
            await of_key(b"b", partial(queries.run, note))
        release.set()
        await asyncio.gather(*waiting)

    with pool(tmp_path) as queries:
        asyncio.run(flood(queries))
    assert order == ["b"] * 5 + ["a"] * 20


def test_queries_of_a_key_that_has_too_many_are_refused_and_those_of_another_are_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventstore, "_MAX_QUERIES", 20)
    release = threading.Event()

    async def flood(queries: ReaderPool) -> None:
        waiting = [asyncio.create_task(of_key(b"a", partial(queries.run, lambda conn: release.wait(30))))
                   for _ in range(20)]  # fmt: skip
        await becomes(lambda: queries.waiting == 20 - eventstore.READER_THREADS)
        with pytest.raises(ApiError, match="20 queries run or wait, the limit is 20; try again") as refusal:
            await of_key(b"a", partial(queries.run, lambda conn: "a"))
        assert (refusal.value.code, refusal.value.retry_after_s) == ("service_unavailable", 1)
        assert await of_key(b"b", partial(queries.run, lambda conn: "b")) == "b"
        release.set()
        await asyncio.gather(*waiting)
        assert await of_key(b"a", partial(queries.run, lambda conn: "a")) == "a"

    with pool(tmp_path) as queries:
        asyncio.run(flood(queries))


def test_threads_are_woken_only_for_queries_that_may_run(tmp_path: Path) -> None:
    release = threading.Event()

    async def flood(queries: ReaderPool) -> int:
        with patch.object(queries._threads, "submit", wraps=queries._threads.submit) as submit:
            waiting = [asyncio.create_task(of_key(b"a", partial(queries.run, lambda conn: release.wait(30))))
                       for _ in range(60)]  # fmt: skip
            await becomes(lambda: queries.waiting == 60 - eventstore.READER_THREADS)
            release.set()
            await asyncio.gather(*waiting)
            return submit.call_count

    with pool(tmp_path) as queries:
        assert asyncio.run(flood(queries)) == eventstore.READER_THREADS


def test_a_query_whose_client_is_gone_is_not_run(tmp_path: Path) -> None:
    release = threading.Event()
    run: list[int] = []

    def wait(conn: sqlite3.Connection) -> None:
        run.append(1)
        release.wait(30)

    async def ask(queries: ReaderPool, gone: asyncio.Event) -> None:
        as_key(b"a", gone)
        await queries.run(wait)

    async def flood(queries: ReaderPool) -> list[Any]:
        gone = asyncio.Event()
        tasks = [asyncio.create_task(ask(queries, gone)) for _ in range(60)]
        await becomes(lambda: len(run) == eventstore.READER_THREADS)
        assert queries.waiting == 60 - eventstore.READER_THREADS
        gone.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert (queries.waiting, queries.running) == (0, eventstore.READER_THREADS)  # nothing of them stays in memory
        release.set()
        await of_key(b"a", partial(queries.run, lambda conn: None))
        return outcomes

    with pool(tmp_path) as queries:
        assert {type(each) for each in asyncio.run(flood(queries))} == {ClientDisconnect}
    assert len(run) == eventstore.READER_THREADS


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


@pytest.fixture
def endless_queries(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Let the queries of all servers run until they are interrupted; note when they start and end."""
    noted = []

    async def read(made: Store, operation: Any, quick: bool = True) -> Any:
        def count(conn: sqlite3.Connection) -> None:
            noted.append("started")
            try:
                conn.execute(ENDLESS).fetchone()
            finally:
                noted.append("ended")

        return await made.readers.run(count)

    monkeypatch.setattr(Store, "read", read)
    return noted


@contextmanager
def waiting(query: bytes, monkeypatch: pytest.MonkeyPatch) -> Iterator[socket.socket]:
    """Send a query to a new server. The query has ten minutes; 0.1 s after the end of what its client sends it ends."""
    monkeypatch.setattr(connections, "_EOF_S", 0.1)
    with running_server(api_keys={KEY: "development"}, allowed_hosts=["test"], query_timeout_s=600) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port), timeout=30) as sock:
            sock.sendall(query)
            yield sock


LONG_QUERIES = {
    "page": request_bytes("GET", "/v1/events"),
    "usage": request_bytes("POST", "/v1/events/usage", b'{"event_name": "call", "aggregation_type": "COUNT"}'),
    "large body": request_bytes("POST", "/v1/events/query", b'{"event_name": "call"' + b" " * 200_000 + b"}"),
    "pipelined pages": request_bytes("GET", "/v1/events") * 3,
}


@table("query", LONG_QUERIES.values(), ids=LONG_QUERIES)
@table("how", ["closed", "reset"])
def test_a_query_ends_without_an_error_when_its_client_closes_the_connection(
    endless_queries: list[str],
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    query: bytes,
    how: str,
) -> None:
    with waiting(query, monkeypatch) as sock:
        eventually(lambda: "started" in endless_queries)
        if how == "reset":
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        sock.close()
        eventually(lambda: endless_queries.count("ended") == endless_queries.count("started"))
        eventually(lambda: caplog.records)  # of the query that has ended
    assert [record.message for record in caplog.records if record.levelname == "ERROR"] == []


def test_a_client_that_has_shut_down_its_sending_side_is_told_why_its_long_query_ended(
    endless_queries: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with waiting(LONG_QUERIES["page"], monkeypatch) as sock:
        sock.shutdown(socket.SHUT_WR)
        refused(answer_on(sock), 408, "request_timeout", "sending side was closed more than 0.1 s ago")
        eventually(lambda: endless_queries == ["started", "ended"])


@table("how", ["gone", "cancelled"])
def test_a_running_query_ends_when_nobody_waits_for_it(tmp_path: Path, how: str) -> None:
    started, ended = threading.Event(), threading.Event()

    def count(conn: sqlite3.Connection) -> None:
        started.set()
        try:
            conn.execute(ENDLESS).fetchone()
        finally:
            ended.set()

    async def ask(queries: ReaderPool, gone: asyncio.Event) -> None:
        as_key(b"a", gone)
        await queries.run(count)

    async def leave(queries: ReaderPool) -> None:
        gone = asyncio.Event()
        task = asyncio.create_task(ask(queries, gone))
        await asyncio.to_thread(started.wait, 30)
        if how == "gone":
            gone.set()
        else:
            task.cancel()
        await asyncio.gather(task, return_exceptions=True)

    with pool(tmp_path) as queries:
        asyncio.run(leave(queries))
        assert ended.wait(30)


def test_the_time_limit_includes_the_time_in_the_queue(tmp_path: Path) -> None:
    release = threading.Event()

    async def ask(queries: ReaderPool) -> list[Any]:
        tasks = [
            asyncio.create_task(of_key(b"a", partial(queries.run, lambda conn: release.wait(30)))) for _ in range(9)
        ]
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        release.set()
        return outcomes

    with pool(tmp_path, timeout_s=0.2) as queries:
        outcomes = asyncio.run(ask(queries))
        assert queries.timeouts == 9
    assert {str(each) for each in outcomes} == {
        "the query took longer than 0.2 s; narrow its time range or its filters"
    }


def test_a_timeout_is_counted_once_although_both_sides_notice_it(tmp_path: Path) -> None:
    async def ask(queries: ReaderPool) -> None:
        with pytest.raises(ApiError, match=r"the query took longer than 0\.1 s"):
            await of_key(b"a", partial(queries.run, lambda conn: conn.execute(ENDLESS).fetchone()))
        await becomes(lambda: queries.running == 0)

    with pool(tmp_path, timeout_s=0.1) as queries:
        asyncio.run(ask(queries))
        assert queries.timeouts == 1


def test_a_reader_that_cannot_open_the_file_leaves_its_turn_to_the_next(tmp_path: Path) -> None:
    release = threading.Event()
    folder = tmp_path / "folder"
    folder.mkdir()

    async def ask(queries: ReaderPool) -> list[Any]:
        waiting = [asyncio.create_task(of_key(b"a", partial(queries.run, lambda conn: release.wait(30))))
                   for _ in range(eventstore.READER_THREADS)]  # fmt: skip
        await becomes(lambda: queries.running == eventstore.READER_THREADS)
        folder.rename(tmp_path / "elsewhere")
        failed = [of_key(b"b", partial(queries.run, lambda conn: 1)) for _ in range(2 * eventstore.READER_THREADS)]
        outcomes = await asyncio.gather(*failed, return_exceptions=True)
        (tmp_path / "elsewhere").rename(folder)
        assert await of_key(b"b", partial(queries.run, lambda conn: 1)) == 1
        release.set()
        await asyncio.gather(*waiting)
        return outcomes

    with pool(folder) as queries:
        outcomes = asyncio.run(ask(queries))
    assert [each.code for each in outcomes] == ["database_error"] * 2 * eventstore.READER_THREADS


def test_a_pool_that_closes_ends_running_queries_and_refuses_the_others(tmp_path: Path) -> None:
    started = threading.Event()

    def count(conn: sqlite3.Connection) -> None:
        started.set()
        conn.execute(ENDLESS).fetchone()

    async def ask(queries: ReaderPool) -> list[Any]:
        tasks = [asyncio.create_task(of_key(b"a", partial(queries.run, count))) for _ in range(9)]
        await asyncio.to_thread(started.wait, 30)
        await asyncio.to_thread(queries.close)
        tasks.append(asyncio.create_task(of_key(b"b", partial(queries.run, count))))
        return await asyncio.gather(*tasks, return_exceptions=True)

    with opened(tmp_path):
        outcomes = asyncio.run(ask(ReaderPool(str(tmp_path / "events.db"), 30.0)))
    assert [str(each) for each in outcomes] == ["the server is shutting down; nothing was done"] * 10


# ---------------------------------------------------------------------------------------------- turns


def test_keys_take_turns_at_a_lock() -> None:
    order: list[bytes] = []

    async def hold(turn: Turn, key: bytes) -> None:
        as_key(key)
        async with turn:
            order.append(key)
            await asyncio.sleep(0)

    async def crowd() -> None:
        turn = Turn()
        await asyncio.gather(*[hold(turn, key) for key in [b"a"] * 5 + [b"b"] * 3 + [b"c"]])
        await asyncio.gather(hold(turn, b"d"), hold(turn, b"e"))

    asyncio.run(crowd())
    assert b"".join(order) == b"a" + b"abc" + b"ab" + b"ab" + b"a" + b"de"


def test_a_lock_is_held_by_one_and_passed_on_although_some_that_wait_are_cancelled(choose: random.Random) -> None:
    async def crowd() -> None:
        turn, holders, done = Turn(), 0, 0

        async def hold(key: bytes) -> None:
            nonlocal holders, done
            as_key(key)
            async with turn:
                holders += 1
                assert holders == 1
                await asyncio.sleep(0)
                await asyncio.sleep(0)
                holders -= 1
            done += 1

        tasks = [asyncio.create_task(hold(b"%d" % choose.randrange(3))) for _ in range(200)]
        cancelled: set[int] = set()
        while not all(task.done() for task in tasks):
            await asyncio.sleep(0)
            number = choose.randrange(200)
            if choose.random() < 0.3 and not holders and not tasks[number].done():
                tasks[number].cancel()
                cancelled.add(number)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert {n for n, each in enumerate(outcomes) if isinstance(each, asyncio.CancelledError)} == cancelled
        assert done == 200 - len(cancelled)
        await asyncio.wait_for(hold(b"last"), 30)

    asyncio.run(crowd())


@table("call", ["value_text(?)", "property_text(?, 'a')", "property_number(?, 'a')"])
def test_a_function_over_long_properties_ends_at_the_deadline(tmp_path: Path, call: str) -> None:
    with opened(tmp_path):
        reader = Reader(str(tmp_path / "events.db"))
        long = json.dumps({"a": "x" * 100_000})
        statement = f"SELECT {call}"
        assert reader.run(lambda conn: conn.execute(statement, [long]).fetchone()) is not None
        with pytest.raises(TimeoutError):
            reader.run(lambda conn: conn.execute(statement, [long]).fetchone(), -1.0)
        reader.conn.close()


@table("size", [100, 3_000_000], ids=["small", "large"])
def test_only_short_pages_are_read_on_the_event_loop(tmp_path: Path, size: int) -> None:
    threads: list[str] = []

    def select(conn: sqlite3.Connection) -> int:
        (text,) = conn.execute("SELECT properties FROM events").fetchone()
        threads.append(threading.current_thread().name)
        return len(text)

    async def read(made: Store) -> int:
        row = rows_of_batch(made, "a", 1)[0]._replace(properties=json.dumps({"text": "x" * size}))
        await made.insert([row])
        return await made.read(select)

    with opened(tmp_path) as made:
        assert asyncio.run(read(made)) > size
    assert [name.startswith("eventstore-reader") for name in threads] == [size > 1_000_000]


# ---------------------------------------------------------------------------------------------- bodies and answers


@pytest.mark.slow
@table("path", ["meters", "features", "events/usage", "events/analytics", "events/query", "features/search"])
def test_a_body_without_events_may_have_one_megabyte(live: Live, path: str) -> None:
    with live.client() as client:
        response = client.post(f"/v1/{path}", json={"filters": [{}] * 600_000})
        refused(response)
        assert "the body may be 1048576 bytes long" in response.json()["message"]
        assert store(client, event(properties={"text": "x" * 2_000_000})).status_code == 202


LARGE: dict[str, Callable[[], bytes]] = {  # made on demand: they are large
    "empty objects": lambda: b'{"a": [%b]}' % b",".join([b"{}"] * 450_000),
    "empty arrays": lambda: b'{"a": [%b]}' % b",".join([b"[]"] * 450_000),
    "numbers": lambda: b'{"a": [%b]}' % b",".join([b"1"] * 2_600_000),
    "members": lambda: b"{%b}" % b",".join(b'"k%d":1' % number for number in range(2_600_000)),
    "deep arrays": lambda: b'{"a": [%b]}' % b",".join([b"[" * 400 + b"]" * 400] * 2000),
    "text with commas": lambda: b'{"a": "%b"}' % (b", " * 2_600_000),
    "names": lambda: b"{%b}" % b",".join(b'"k%d":1' % number for number in range(240_000)),
    "names that end with a backslash": lambda: (
        b"{%b}" % b",".join(b'"k%d\\\\":1' % number for number in range(240_000))
    ),
    "strings": lambda: b'{"a": [%b]}' % b",".join([b'"text"'] * 2_600_000),
    "escapes": lambda: b'{"a": "%b"}' % (b"\\n" * 5_100_000),
}
LIMIT_ON_VALUES = (
    "500,000 objects and arrays if longer than 1,000,000 bytes, got more; a name counts as two, five commas or ten "
    "backslashes as one"
)


@table("bulk", [False, True], ids=["single", "batch"])
@table("name", LARGE)
def test_large_properties_of_very_many_values_are_refused(tmp_path: Path, name: str, bulk: bool) -> None:
    body = b'{"event_name": "e", "external_customer_id": "c", "properties": %b}' % LARGE[name]()
    with serving(tmp_path) as client:
        path, sent = ("/v1/events/bulk", b'{"events": [%b]}' % body) if bulk else ("/v1/events", body)
        response = client.post(path, content=sent)
        refused(response)
        assert f"properties may hold {LIMIT_ON_VALUES}" in response.text
        assert store_of(client).writer.waiting_events == 0


BELOW_THE_LIMITS: dict[str, Callable[[], bytes]] = {
    "objects, below a megabyte": lambda: b'{"a": [%b]}' % b",".join([b"{}"] * 300_000),
    "numbers and a text": lambda: b'{"a": [%b], "text": "%b"}' % (b",".join([b"1"] * 400_000), b"x" * 2_000_000),
    "a text with commas": lambda: b'{"text": "%b"}' % (b"one, two " * 400_000),
    "a text with quotes": lambda: b'{"text": "%b"}' % (rb"a \"quoted\" word, " * 200_000),
    "names": lambda: b"{%b}" % b",".join(b'"k%d":1' % number for number in range(220_000)),
    "texts": lambda: b'{"a": [%b]}' % b",".join([b'"0123456789"'] * 2_000_000),
    "a text with colons": lambda: b'{"text": "%b"}' % (b"12:30:00 " * 1_000_000),
    "numbers": lambda: b'{"a": [%b]}' % b",".join([b"1.5e300"] * 200_000),
}


@table("name", BELOW_THE_LIMITS)
def test_properties_below_these_limits_are_stored_as_they_were_sent(tmp_path: Path, name: str) -> None:
    properties = BELOW_THE_LIMITS[name]()
    body = b'{"event_name": "e", "external_customer_id": "c", "properties": %b}' % properties
    with serving(tmp_path) as client:
        assert client.post("/v1/events", content=body).status_code == 202
        assert properties in client.get("/v1/events").content


@table(("item", "weight"), [("{}", 10), ("[]", 10), ('"x"', 0), ('"n%d":1', 20)])
def test_properties_may_hold_exactly_as_many_values_as_documented(item: str, weight: int) -> None:
    number = int(4_950_000 / (weight + 2))
    items = ",".join(item % each if "%" in item else item for each in range(number))
    items = f"{{{items}}}" if ":" in item else f"[{items}]"
    others = 2 * 10 + 2 + 2 * 20  # of {"a": [...], "b": "..."} itself
    rest = 5_000_000 - ((weight + 2) * number - 2) - others
    properties = f'{{"a": {items}, "b": "{"," * (rest // 2)}{"x" * 1_000_000}"}}'
    assert check_properties(properties.encode()) == properties
    with pytest.raises(FieldError, match=f"may hold {LIMIT_ON_VALUES}"):
        check_properties(properties.replace("xx", ",x", 1).encode())


@table(("extra", "problem"), [(0, ""), (1, "may hold 8,000,000 commas and opening braces and brackets if longer than")])
def test_a_batch_may_hold_exactly_as_many_values_as_documented(tmp_path: Path, extra: int, problem: str) -> None:
    def batch(commas: int) -> bytes:
        one = b'{"event_name": "e", "external_customer_id": "c", "properties": {"text": "%b"}}'
        texts = [b"," * (commas // 5)] * 4 + [b"," * (commas - 4 * (commas // 5))]  # properties may have 2.5 million
        return b'{"events": [%b]}' % b",".join(one % text for text in texts)

    others = sum(batch(0).count(mark) for mark in (b",", b"{", b"["))
    with serving(tmp_path) as client:
        response = client.post("/v1/events/bulk", content=batch(8_000_000 - others + extra))
    assert (response.status_code == 400) == bool(problem)
    assert problem in response.text


def test_msgspec_does_not_parse_numbers_that_take_it_long() -> None:
    """msgspec takes 10 us for 1.5e300; in a body of 1 MB these numbers stopped the event loop for a second."""
    parsed: list[str] = []

    def note(frame: FrameType, what: str, _: object) -> None:
        if what == "call" and frame.f_code is eventstore._double.__code__:
            parsed.append(frame.f_locals["number"])

    numbers = ["1.5e300", "-1e-300", "2.2250738585072011e-308", "0.25", "1E5", f"0.{'0' * 300}1"]
    sys.setprofile(note)
    try:
        text = check_properties(f'{{"a": [{", ".join(numbers)}, 7], "b": {numbers[0]}}}'.encode())
    finally:
        sys.setprofile(None)
    assert parsed == [*numbers, numbers[0]]
    assert numbers[2] in text


@table(("number", "told"), [(1001, "got 1001"), (20_000, "got 20000"), (410_000, "got more than 1000")])
def test_events_far_above_the_limit_are_not_counted(tmp_path: Path, number: int, told: str) -> None:
    body = b'{"events": [%b]}' % b",".join([b'{"a":1}'] * number)
    with serving(tmp_path) as client:
        assert f"events must hold 1 to 1000 events, {told}" in client.post("/v1/events/bulk", content=body).text


@table(("path", "size", "in_thread"), [("", 90_000, False), ("", 110_000, True), ("/bulk", 990, False),
                                       ("/bulk", 1_100, True), ("/bulk", -19, False), ("/bulk", -21, True)])  # fmt: skip
def test_large_bodies_are_decoded_beside_the_event_loop(tmp_path: Path, path: str, size: int, in_thread: bool) -> None:
    threads = []

    def clock() -> int:
        threads.append(threading.current_thread())
        return eventstore.now_us()

    sent: Any = event(properties={"text": "x" * size})
    if size < 0:  # thousands of objects and arrays
        sent = {"events": [event(properties={"a": [{}] * (-size - 3)})] * 1000}
    elif path:
        sent = {"events": [event(properties={"text": "x" * (size - 110)})] * 1000}
    with serving(tmp_path, clock=clock) as client:
        assert client.post(f"/v1/events{path}", json=sent).status_code == 202
        assert any(thread.name.startswith("asyncio_") for thread in threads) is in_thread


@pytest.mark.slow
def test_large_batches_have_different_ids_and_name_their_bad_events(tmp_path: Path) -> None:
    large = [event(properties={"text": "x" * 2000}) for _ in range(1000)]
    with Live(tmp_path, "--api-key", KEY) as live, ExitStack() as stack:
        socks = [stack.enter_context(live.connect()) for _ in range(4)]
        for sock in socks:
            sock.sendall(posting(json.dumps({"events": large}).encode()).replace(b"events", b"events/bulk", 1))
        assert [answer_on(sock).headers["x-events-inserted"] for sock in socks] == ["1000"] * 4
        with live.client() as client:
            large[700] = event(properties={"text": "x" * 2000}, timestamp="never")
            details = refused(client.post("/v1/events/bulk", json={"events": large}))
            assert "events[700].timestamp" in json.dumps(details) or "700" in json.dumps(details)
            assert client.get("/v1/events/monitoring").json()["total_count"] == 4000


def test_a_request_that_is_cancelled_or_fails_gives_its_shares_back(tmp_path: Path) -> None:
    bodies = [b"{", b'{"event_name": "e"}', json.dumps(event(properties={"text": "x" * 150_000})).encode()]

    async def ask(app: Any) -> None:
        service, transport = app.state.service, httpx.ASGITransport(app)
        async with httpx.AsyncClient(transport=transport, base_url="http://t", headers={"x-api-key": KEY}) as client:
            with locked(tmp_path):
                for body in [BODY, *bodies] * 3:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(0.05):
                            await client.post("/v1/events", content=body)
                    assert service.shares.total == 0
                    assert dict(service.shares._used) == {}
                assert service.store.writer.waiting_events == 0
                assert CALLER.get().key == b""  # what the program does next is not done for this client
            eventually_stored = await client.post("/v1/events", content=BODY)
            assert eventually_stored.status_code == 202

    app = eventstore.create_app(Settings(db=str(tmp_path / "events.db"), api_keys=(ApiKey.hashed(KEY),)))
    try:
        asyncio.run(ask(app))
    finally:
        app.state.service.store.close()


@pytest.mark.slow
def test_unread_answers_count_towards_the_share_of_their_key(tmp_path: Path) -> None:
    with Live(tmp_path, *TWO_KEYS, "--queue-bytes", "60000000") as live, ExitStack() as stack:
        with live.client() as client:
            store(client, *[event(properties={"text": "x" * 200_000}) for _ in range(50)])
        unread = []
        for _ in range(8):
            sock = stack.enter_context(socket.socket())
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            sock.connect(("127.0.0.1", int(live.port)))
            sock.sendall(b"GET /v1/events HTTP/1.1\r\n" + HEAD + b"\r\n")
            unread.append(sock)
        eventually(lambda: "bytes of requests and unread answers are under way" in live.log)
        with live.client(OTHER) as other:
            assert len(other.get("/v1/events").content) > 10_000_000
        for sock in unread:
            sock.close()
        with live.client() as client:
            eventually(lambda: client.get("/v1/events").status_code == 200)


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere threads have no priority of their own")
def test_only_threads_that_run_queries_have_a_lower_priority(tmp_path: Path) -> None:
    def priority(_: object = None) -> int:
        return os.getpriority(os.PRIO_PROCESS, 0)

    async def priorities(made: Store) -> list[int]:
        return [
            priority(),
            await made.read(priority, quick=False),
            await made.read(priority),
            await made.write(priority),
        ]

    with opened(tmp_path) as made:
        own, query, quick, write = asyncio.run(priorities(made))
    assert query == min(19, own + 5)
    assert (quick, write) == (own, own)
