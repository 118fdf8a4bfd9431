"""Long answers: their content, and the memory that they hold while they are made and sent."""

from __future__ import annotations

import asyncio
import itertools
import json
import re
import sys
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.requests import ClientDisconnect

import eventstore
from eventstore import CALLER, ApiKey, Caller, Service, Settings, Shares, Store
from helpers import KEY, Json, Live, becomes, event, page, refused, rows_to_insert, serving, store, table

OTHER = "other-key"
EVER = {"start_time": "2000-01-01T00:00:00Z", "end_time": "2030-01-01T00:00:00Z"}
CONFUSING = ['","properties":{}', "\x1e", "\\", '"', "ü\U0001f600", "],[", "{}", "\n"]
LONGEST = "x" * 1000

HOW = {  # _QUICK_PAGE_SIZE, _SHORT_PAGE_SIZE, _SHORT_PAGE_BYTES, _MAX_PAGE_BYTES
    "in a thread": (0, 10_000, 8_000_000, 100_000_000),
    "after a short attempt": (500, 10_000, 100, 100_000_000),
    "without a short attempt": (0, 0, 0, 100_000_000),
    "event by event": (0, 0, 0, 100),
}


def limit(monkeypatch: pytest.MonkeyPatch, *limits: int) -> None:
    names = ("_QUICK_PAGE_SIZE", "_SHORT_PAGE_SIZE", "_SHORT_PAGE_BYTES", "_MAX_PAGE_BYTES")
    for name, value in zip(names, limits, strict=True):
        monkeypatch.setattr(eventstore, name, value)


def pages(client: httpx.Client, **query: Any) -> Iterator[Json]:
    while True:
        found = page(client, "POST", **query)
        yield found
        if not found["has_more"]:
            return
        query |= {"iter_last_key": found["iter_last_key"]}


@table("how", HOW)
def test_a_page_is_the_same_however_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str) -> None:
    size = 1 if how == "event by event" else 7

    def answers() -> list[Any]:
        found: list[Any] = [client.get("/v1/events/lookup", params={"id": f"{LONGEST}9"}).json()]
        for order, sort in itertools.product(("asc", "desc"), ("timestamp", "event_name")):
            for filters in ({}, {"event_name": "n1"}, {"external_customer_id": "nobody"}):
                found += pages(client, order=order, sort=sort, page_size=size, **filters, **EVER)
        newest = found[1]["iter_first_key"]
        return [
            *found,
            *[page(client, order=order, iter_first_key=newest, page_size=size, **EVER) for order in ("asc", "desc")],
        ]

    with serving(tmp_path) as client:
        for number, text in enumerate([*CONFUSING, *[LONGEST] * 12]):
            store(client, event(f"{text}{number}", event_name=f"n{number % 3}", properties={text: [{"a": text}]}))
        expected = answers()
        limit(monkeypatch, *HOW[how])
        assert answers() == expected


def asking(
    tmp_path: Path,
    act: Callable[[Service, httpx.AsyncClient, httpx.AsyncClient], Coroutine[Any, Any, None]],
    **settings: Any,
) -> None:
    """Call `act` with a service that has 100 events of 2,500 bytes, and clients with two keys."""
    keys = tuple(map(ApiKey.hashed, (KEY, OTHER)))
    app = eventstore.create_app(Settings(db=str(tmp_path / "events.db"), api_keys=keys, **settings))
    service: Service = app.state.service

    async def run() -> None:
        rows = [
            row._replace(properties=json.dumps({"text": "x" * 2300})) for row in rows_to_insert(*map(str, range(100)))
        ]
        await service.store.insert(rows)
        clients = [
            httpx.AsyncClient(
                transport=httpx.ASGITransport(app), base_url="http://t", headers={"x-api-key": key}, params=EVER
            )
            for key in (KEY, OTHER)
        ]
        await act(service, *clients)
        assert (service.shares.total, dict(service.shares._used)) == (0, {})

    try:
        asyncio.run(run())
    finally:
        service.store.close()


ALL = {"page_size": 100, **EVER}


def test_each_key_makes_one_long_page_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limit(monkeypatch, 0, 0, 0, 1_000_000)
    read = Store.read
    begun: list[bytes] = []

    async def act(service: Service, client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
        release = asyncio.Event()

        async def read_later(made: Store, *arguments: Any, **options: Any) -> Any:
            begun.append(CALLER.get().key)
            await release.wait()
            return await read(made, *arguments, **options)

        monkeypatch.setattr(Store, "read", read_later)
        asked = [
            asyncio.create_task(each.post("/v1/events/query", json=ALL)) for each in (client, client, client, other)
        ]
        await becomes(lambda: len(begun) >= 2)
        for _ in range(100):
            await asyncio.sleep(0)
        assert len(begun) == len(set(begun)) == 2
        assert service.shares.total > 2_000_000  # the pages that are being made, and the bodies
        release.set()
        assert [(await each).status_code for each in asked] == [200] * 4
        assert len(begun) == 4

    asking(tmp_path, act)


def test_the_time_limit_of_a_long_page_includes_its_wait_for_a_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 0, 0, 0, 1_000_000)

    async def act(service: Service, client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
        key = ApiKey.hashed(KEY).digest
        async with service.page_turns[key]:
            refused(await client.post("/v1/events/query", json=ALL), 503, "service_unavailable", "longer than 0.1 s")
        assert service.store.readers.timeouts == 1

    asking(tmp_path, act, query_timeout_s=0.1)


@table("how", ["gone", "cancelled"])
def test_a_long_page_that_nobody_waits_for_leaves_the_queue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str
) -> None:
    limit(monkeypatch, 0, 0, 0, 1_000_000)
    made: list[object] = []
    monkeypatch.setattr(Store, "read", lambda *arguments, **_: made.append(arguments))

    async def act(service: Service, client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
        turn = service.page_turns[ApiKey.hashed(KEY).digest]
        async with turn:
            gone = asyncio.Event()
            monkeypatch.setattr(Caller, "until_gone", lambda _: disconnected(gone))
            asked = [asyncio.create_task(client.post("/v1/events/query", json=ALL)) for _ in range(5)]
            await becomes(lambda: len(turn._waiting) == 5)
            assert service.store.readers._shares.total == 5
            if how == "gone":
                gone.set()
            else:
                [each.cancel() for each in asked]
            await asyncio.wait(asked)
            [each.exception() for each in asked if not each.cancelled()]
            assert service.store.readers._shares.total == 0
        await becomes(lambda: not turn._is_taken)
        assert made == []

    asking(tmp_path, act)


async def disconnected(gone: asyncio.Event) -> Exception:
    await gone.wait()
    return ClientDisconnect()


def test_a_key_whose_unread_answers_leave_too_little_gets_a_503_and_another_key_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 0, 0, 0, 128_000_000)

    async def act(service: Service, client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
        key = ApiKey.hashed(KEY).digest
        service.shares.take(key, 600_000)  # leaves 400,000 bytes, and 550,000 for another key
        refused(await client.post("/v1/events/query", json=ALL), 503, "service_unavailable", "read the answers")
        for size, status in ((70, 200), (100, 503)):
            assert (await client.post("/v1/events/query", json=ALL | {"page_size": size})).status_code == status
        assert len((await other.post("/v1/events/query", json=ALL)).json()["events"]) == 100
        service.shares.give_back(key, 600_000)
        assert len((await client.post("/v1/events/query", json=ALL)).json()["events"]) == 100

    asking(tmp_path, act, queue_bytes=1_000_000)


def test_a_page_ends_early_at_half_of_the_limit_on_bytes_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    limit(monkeypatch, 0, 0, 0, 128_000_000)

    async def act(service: Service, client: httpx.AsyncClient, other: httpx.AsyncClient) -> None:
        answer = await client.post("/v1/events/query", json=ALL)
        found = answer.json()
        assert 190_000 < len(answer.content) <= 200_400
        assert (found["has_more"], found["offset"], found["total_count"]) == (True, len(found["events"]), 100)

    asking(tmp_path, act, queue_bytes=400_000)


def test_half_of_what_is_left_of_a_share_is_taken() -> None:
    shares = Shares(1000)
    assert shares.take_half(b"a", 200, own=0) == 200
    assert shares.take_half(b"a", 1000, own=0) == 400
    assert shares.take_half(b"a", 1000, own=600) == 500  # what the same request has taken does not count
    assert shares.take_half(b"a", 1000, own=0) == 0
    assert shares.take_half(b"b", 1000, own=0) == 87
    shares.give_back(b"a", 1100)
    shares.give_back(b"b", 87)
    assert shares.total == 0


@table("path", ["events?page_size=50", "events/lookup?id=0"])
def test_a_long_answer_is_sent_in_pieces(tmp_path: Path, path: str) -> None:
    sent: list[Json] = []

    async def act(client: Any) -> None:
        async def noting(scope: Any, receive: Any, send: Any) -> None:
            async def note(message: Json) -> None:
                sent.append(message)
                await send(message)

            await client.app(scope, receive, note)

        headers = {"x-api-key": KEY}
        async with httpx.AsyncClient(
            transport=httpx.ASGITransport(noting), base_url="http://t", headers=headers
        ) as asked:
            answer = await asked.get(f"/v1/{path}")
        found = answer.json()
        assert {len(each["properties"]["text"]) for each in found["events"]} == {400_000}
        assert int(answer.headers["content-length"]) == len(answer.content)

    with serving(tmp_path) as client:
        store(client, *[event(f"{number}", properties={"text": "x" * 400_000}) for number in range(4)])
        asyncio.run(act(client))
    assert max(len(message.get("body", b"")) for message in sent) == 131_072


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak of the memory from /proc")
@table("text", ["x", "ü\U0001f600"])
def test_a_long_page_takes_little_more_than_twice_its_bytes(tmp_path: Path, text: str) -> None:
    def peak_bytes() -> int:
        status = Path(f"/proc/{live.process.pid}/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+)", status)[1]) * 1024  # type: ignore[index]

    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        for _ in range(6):
            store(client, *[event(properties={"text": text * (20_000 // len(text.encode()))}) for _ in range(500)])
        Path(f"/proc/{live.process.pid}/clear_refs").write_text("5")
        before = peak_bytes()
        size = len(client.post("/v1/events/query", json={"page_size": 100_000}).content)
        assert size > 60_000_000
        assert peak_bytes() - before < 2.4 * size
