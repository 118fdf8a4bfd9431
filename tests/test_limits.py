"""The limits that the documentation states, at each limit and one above it."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import pytest

from eventstore import ApiKey, parse_arguments
from eventstore_extras.mock import running_server
from helpers import KEY, Json, answer_on, becomes, event, metering, refused, service_of, serving, table, write_lock

METER = {"name": "m", "event_name": "e", "reset_usage": "NEVER", "aggregation": {"type": "COUNT"}}
FEATURE = {"name": "f", "type": "boolean"}
NAME_LIMIT = 1024


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


def until(minutes: int) -> str:
    return f"{datetime(2026, 1, 1, tzinfo=UTC) + timedelta(minutes=minutes):%Y-%m-%dT%H:%M:%SZ}"


def minutes(number: int) -> Json:
    return {"start_time": until(0), "end_time": until(number)}


USAGE = {"event_name": "e", "aggregation_type": "SUM", "property_name": "n"}


def filters(keys: int, values: int) -> Json:
    return {f"k{number}": ["x"] * values for number in range(keys)}


MONITORED = f"events/monitoring?window_size=MINUTE&start_time={until(0)}&end_time="

# The path, the limit, and the body that has a number of something. The body at the limit gets a 2xx.
LIMITS: dict[str, tuple[str, int, Callable[[int], Json]]] = {
    "events of a batch": ("events/bulk", 1000, lambda n: {"events": [event()] * n}),
    "levels of properties": ("events", 500, lambda n: event(properties=nested(n))),
    **{
        f"characters of {field}": ("events", NAME_LIMIT, lambda n, field=field: event() | {field: "é" * n})  # type: ignore[misc]
        for field in ("event_name", "external_customer_id", "event_id", "customer_id", "source")
    },
    "events of a page": ("events/query", 100_000, lambda n: {"page_size": n}),
    "keys of a filter": ("events/query", 50, lambda n: {"property_filters": {f"k{i}": ["x"] for i in range(n)}}),
    "values of a filter": ("events/query", 1000, lambda n: {"property_filters": {"k": ["x"] * n}}),
    "sources of analytics": ("events/analytics", 1000, lambda n: {"sources": [f"s{i}" for i in range(n)]}),
    "groups of analytics": ("events/analytics", 50, lambda n: {"group_by": [f"properties.p{i}" for i in range(n)]}),
    "characters of a meter's name": ("meters", 255, lambda n: METER | {"name": "é" * n}),
    "characters of a meter's event name": ("meters", 255, lambda n: METER | {"event_name": "é" * n}),
    "keys of a meter's filters": (
        "meters", 50, lambda n: METER | {"filters": [{"key": f"k{i}", "values": ["x"]} for i in range(n)]}
    ),
    "values of a meter's filters": ("meters", 1000, lambda n: METER | {"filters": [{"key": "k", "values": ["x"] * n}]}),
    "characters of a feature's name": ("features", 255, lambda n: FEATURE | {"name": "é" * n}),
    "characters of a lookup key": ("features", 255, lambda n: FEATURE | {"lookup_key": "é" * n}),
    "characters of a unit": ("features", 50, lambda n: FEATURE | {"unit_singular": "é" * n, "unit_plural": "é"}),
    "meters of a list": ("meters?limit=", 1000, lambda n: {"limit": n}),
    "features of a list": ("features?limit=", 1000, lambda n: {"limit": n}),
    "features of a search": ("features/search", 1000, lambda n: {"limit": n}),
    "characters of the plural of a unit": (
        "features", 50, lambda n: FEATURE | {"unit_singular": "é", "unit_plural": "é" * n}
    ),
    "characters of a reporting unit": (
        "features", 255,
        lambda n: FEATURE | {"reporting_unit": {"unit_singular": "é" * n, "unit_plural": "é", "conversion_rate": 1}},
    ),
    "levels of an event's properties in a batch": ("events/bulk", 500, lambda n: {"events": [event(properties=nested(n))]}),
    "windows of usage": ("events/usage", 100_000, lambda n: USAGE | {"window_size": "MINUTE", **minutes(n)}),
    "buckets of usage": ("events/usage", 100_000, lambda n: USAGE | {"bucket_size": "MINUTE", **minutes(n)}),
    "windows of analytics": (
        "events/analytics", 100_000,
        lambda n: {"window_size": "MINUTE", **minutes(n)},
    ),
    "windows of monitoring": (MONITORED, 100_000, lambda n: {"limit": until(n)}),
    "events to skip": ("events/query", 2**53, lambda n: {"offset": n}),
    "events to skip in a GET": ("events?offset=", 2**53, lambda n: {"limit": n}),
    "digits of a cursor's time": (
        "events/query", 21, lambda n: {"iter_last_key": f"{'1'.zfill(n)}::x", **minutes(1)}
    ),
    **{
        f"{what} of a property filter of {path}": (path, limit, lambda n, field=field, make=make: USAGE | {field: make(n)})  # type: ignore[misc]
        for path, field in (("events/usage", "filters"), ("events/analytics", "property_filters"))
        for what, limit, make in (
            ("keys", 50, lambda n: filters(n, 1)), ("values", 1000, lambda n: filters(1, n)),
            ("values in two keys", 1000, lambda n: filters(1, 500) | {"other": ["x"] * (n - 500)}),
        )
    },
}  # fmt: skip


@pytest.fixture
def client(tmp_path: Path) -> Iterator[httpx.Client]:
    with metering(tmp_path) as client:
        yield client


def ask(client: httpx.Client, path: str, body: Json) -> httpx.Response:
    if "?" in path:
        return client.get(f"/v1/{path}{body['limit']}")
    return client.post(f"/v1/{path}", json=body)


@table("name", LIMITS)
def test_a_documented_limit_allows_its_number_and_refuses_one_more(client: httpx.Client, name: str) -> None:
    path, limit, body = LIMITS[name]
    response = ask(client, path, body(limit))
    assert response.is_success, response.text
    refused(ask(client, path, body(limit + 1)))


def test_the_documented_limit_on_a_request_id(client: httpx.Client) -> None:
    longest = "x" * 128
    assert client.get("/v1/events", headers={"X-Request-ID": longest}).headers["x-request-id"] == longest
    assert client.get("/v1/events", headers={"X-Request-ID": f"{longest}x"}).headers["x-request-id"] != f"{longest}x"


# ---------------------------------------------------------------------------------------------- heads and bodies


def head_of(size: int) -> bytes:
    head = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nX-Long: %s\r\n\r\n"
    return head % (b"x" * (size - len(head % b"")))


HEADS: dict[str, tuple[int, int, Callable[[int], bytes]]] = {
    "bytes of a head": (65_536, 431, head_of),
    "bytes of a head with a long URL": (
        65_536, 414, lambda n: b"GET /health?" + b"x" * (n - 42) + b" HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    ),
    "headers": (1000, 431, lambda n: b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\n" + b"a:\r\n" * (n - 1) + b"\r\n"),
}  # fmt: skip


@table("name", HEADS)
def test_a_head_may_have_exactly_as_many_bytes_and_headers_as_documented(name: str) -> None:
    limit, status, head = HEADS[name]
    with running_server() as server:
        url = httpx.URL(server.url)
        for size, expected in ((limit, 200), (limit + 1, status)):
            with socket.create_connection((url.host, url.port), timeout=30) as sock:
                sock.sendall(head(size))
                assert answer_on(sock).status_code == expected


def test_a_body_may_have_exactly_as_many_bytes_as_the_flag_says(tmp_path: Path) -> None:
    body = json.dumps(event()).encode()
    with serving(tmp_path, max_body_bytes=1000) as client:
        assert client.post("/v1/events", content=body.ljust(1000)).status_code == 202
        refused(client.post("/v1/events", content=body.ljust(1001)), 400, part="1000 bytes")


def test_the_bodies_of_a_key_may_take_exactly_as_many_bytes_as_the_flag_says(tmp_path: Path) -> None:
    body = json.dumps(event()).encode()
    with serving(tmp_path, queue_bytes=10_000) as client:
        shares = service_of(client).shares
        shares.take(ApiKey.hashed(KEY).digest, 9000)
        assert client.post("/v1/events", content=body.ljust(1000)).status_code == 202
        refused(client.post("/v1/events", content=body.ljust(1001)), 503, "service_unavailable", "the limit is 10000")
        assert shares.total == 9000


def test_exactly_as_many_events_of_a_key_as_the_flag_says_may_wait(tmp_path: Path) -> None:
    async def fill(app: Any) -> list[int]:
        transport, headers = httpx.ASGITransport(app), {"x-api-key": KEY}

        def is_waiting(number: int) -> bool:
            return bool(app.state.service.store.writer.waiting_events == number)

        async with httpx.AsyncClient(transport=transport, base_url="http://t", headers=headers, timeout=60) as client:
            batches = [{"events": [event()] * number} for number in (6, 4, 1)]
            asked = []
            with write_lock(tmp_path):
                for batch, waiting in zip(batches, (6, 10, 10), strict=True):
                    asked.append(asyncio.create_task(client.post("/v1/events/bulk", json=batch)))
                    await becomes(partial(is_waiting, waiting))
                refused(await asked.pop(), 503, "service_unavailable")
            return [(await each).status_code for each in asked]

    with serving(tmp_path, queue_events=10) as client:
        app: Any = client.app
        assert asyncio.run(fill(app)) == [202, 202]


@table(("flags", "is_allowed"), [(("--batch-size", "1000"), True), (("--batch-size", "1001"), False)])
def test_the_documented_limit_on_the_events_of_a_request_of_replay(flags: tuple[str, str], is_allowed: bool) -> None:
    with nullcontext() if is_allowed else pytest.raises(SystemExit):
        parse_arguments(["replay", "--to", "http://127.0.0.1:1", *flags])
