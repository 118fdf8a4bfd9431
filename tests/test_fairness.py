"""Fairness between clients: shares of the limits, turns in the queues, and requests whose client is gone."""

from __future__ import annotations

import asyncio
import json
import random
import socket
import sqlite3
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import ClientDisconnect

import eventstore
from eventstore import CALLER, ApiError, ApiKey, Caller, Reader, ReaderPool, Row, Settings, Shares, Store
from helpers import HEAD, KEY, Live, answer_on, event, eventually, refused, store, table

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
    with Live(tmp_path, *TWO_KEYS, "--queue-bytes", "1000000") as live, ExitStack() as stack:
        held = [stack.enter_context(held_back(live, KEY, 150_000)) for _ in range(6)]
        eventually(lambda: status_of_large_event(live, KEY) == 503)
        with live.client(OTHER) as other:
            for number in range(20):
                assert store(other, event(f"{number}", properties={"text": "x" * 50_000})).status_code == 202
        held[0].sendall(b"}")
        assert answer_on(held[0]).status_code == 202


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

    CALLER.set(Caller({"api_key": ApiKey(key, "development")}, receive))


async def of_key(key: bytes, call: Callable[[], Any]) -> Any:
    as_key(key)
    return await call()


def test_only_the_key_that_fills_the_queue_gets_a_503(tmp_path: Path) -> None:
    async def flood(made: Store) -> tuple[list[Any], list[Any]]:
        with locked(tmp_path):
            batches = [rows_of_batch(made, f"a{number}", 1000) for number in range(15)]
            flood = [asyncio.create_task(of_key(b"a", partial(made.insert, batch))) for batch in batches]
            await asyncio.sleep(0.05)
            singles = [rows_of_batch(made, f"b{number}", 1) for number in range(100)]
            others = [asyncio.create_task(of_key(b"b", partial(made.insert, single))) for single in singles]
            await asyncio.sleep(0.05)
        return await asyncio.gather(*flood, return_exceptions=True), await asyncio.gather(*others)

    with opened(tmp_path, queue_events=10_000) as made:
        of_a, of_b = asyncio.run(flood(made))
    assert [str(each) for each in of_a if isinstance(each, ApiError)] == [
        "10000 events wait to be written, the limit is 10000; nothing was stored, try again"
    ] * 5
    assert of_b == [1] * 100


async def noted(order: list[str], name: str, call: Callable[[], Any]) -> None:
    """Await a call with the key that the name begins with; then append the name."""
    as_key(name[:1].encode())
    await call()
    order.append(name)


def test_batches_of_two_keys_are_committed_in_turns(tmp_path: Path) -> None:
    order: list[str] = []
    note = partial(noted, order)

    async def flood(made: Store) -> None:
        with locked(tmp_path):
            blocker = asyncio.create_task(note("x", partial(made.insert, rows_of_batch(made, "x", 1))))
            await asyncio.sleep(0.1)  # the writer waits for the lock with this one
            many = [note(f"a{n}", partial(made.insert, rows_of_batch(made, f"a{n}", 1000))) for n in range(40)]
            tasks = [asyncio.create_task(each) for each in many]
            await asyncio.sleep(0)
            batch = rows_of_batch(made, "b", 1000)
            tasks.append(asyncio.create_task(note("b", partial(made.insert, batch))))
            await asyncio.sleep(0)
        await asyncio.gather(blocker, *tasks)

    with opened(tmp_path) as made:
        asyncio.run(flood(made))
    assert order.index("b") < 20  # in the order of arrival it would be the last of 42


def test_operations_are_grouped_and_take_turns_with_events(tmp_path: Path) -> None:
    order: list[str] = []
    note = partial(noted, order)

    async def flood(made: Store) -> None:
        with locked(tmp_path):
            blocker = asyncio.create_task(note("x", partial(made.insert, rows_of_batch(made, "x", 1))))
            await asyncio.sleep(0.1)
            tasks = [asyncio.create_task(note(f"a{n}", partial(made.write, change))) for n in range(500)]
            await asyncio.sleep(0)
            tasks.append(asyncio.create_task(note("b", partial(made.insert, rows_of_batch(made, "b", 1)))))
            await asyncio.sleep(0)
        await asyncio.gather(blocker, *tasks)

    def change(conn: sqlite3.Connection) -> None:
        conn.execute("INSERT INTO environments (name) VALUES (hex(randomblob(8)))")

    with opened(tmp_path) as made:
        asyncio.run(flood(made))
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
            await asyncio.sleep(0.1)
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

    def wait(conn: sqlite3.Connection) -> None:
        release.wait(30)
        order.append("a")

    def note(conn: sqlite3.Connection) -> None:
        order.append("b")

    async def flood(queries: ReaderPool) -> None:
        waiting = [asyncio.create_task(of_key(b"a", partial(queries.run, wait))) for _ in range(20)]
        await asyncio.sleep(0.05)
        for _ in range(5):
            await of_key(b"b", partial(queries.run, note))
        release.set()
        await asyncio.gather(*waiting)

    with pool(tmp_path) as queries:
        asyncio.run(flood(queries))
    assert order == ["b"] * 5 + ["a"] * 20


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
        while len(run) < eventstore.READER_THREADS:  # noqa: ASYNC110 - threads set no event
            await asyncio.sleep(0.001)
        gone.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        release.set()
        await of_key(b"a", partial(queries.run, lambda conn: None))
        return outcomes

    with pool(tmp_path) as queries:
        assert {type(each) for each in asyncio.run(flood(queries))} == {ClientDisconnect}
    assert len(run) == eventstore.READER_THREADS


ENDLESS = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"


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
    assert {str(each) for each in outcomes} == {
        "the query took longer than 0.2 s; narrow its time range or its filters"
    }


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


@table("path", ["meters", "features", "events/usage", "events/analytics", "events/query", "features/search"])
def test_a_body_without_events_may_have_one_megabyte(tmp_path: Path, path: str) -> None:
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        response = client.post(f"/v1/{path}", json={"filters": [{}] * 600_000})
        refused(response)
        assert "the body may be 1048576 bytes long" in response.json()["message"]
        assert store(client, event(properties={"text": "x" * 2_000_000})).status_code == 202


def test_unread_answers_count_towards_the_share_of_their_key(tmp_path: Path) -> None:
    with Live(tmp_path, *TWO_KEYS, "--queue-bytes", "30000000") as live, ExitStack() as stack:
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
