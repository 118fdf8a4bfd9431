"""The limits that the documentation states, at each limit and one above it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from helpers import Json, event, metering, refused, table

METER = {"name": "m", "event_name": "e", "reset_usage": "NEVER", "aggregation": {"type": "COUNT"}}
FEATURE = {"name": "f", "type": "boolean"}
NAME_LIMIT = 1024


def nested(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": value}
    return value


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
    "bytes of a body without events": ("events/query", 1_048_576, lambda n: {"event_name": "x" * (n - 17)}),
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
