"""The events of the benchmarks, and the HTTP requests that send them."""

from __future__ import annotations

import uuid
from collections.abc import Callable

import msgspec

from eventstore import MAX_BATCH, IdMaker, Row, now_us, to_datetime

__all__ = [
    "CUSTOMERS",
    "ENVIRONMENT",
    "ENVIRONMENT_NUMBER",
    "KEY",
    "bulk_requests",
    "http_request",
    "make_row",
    "no_id",
    "ordered_id",
    "single_requests",
    "uuid7",
    "wire_event",
]

KEY = "key-of-the-benchmark"
ENVIRONMENT, ENVIRONMENT_NUMBER = "development", 1  # the first environment of a file gets this number
CUSTOMERS = 5000

_make_id = IdMaker()


def no_id() -> str:
    """Leave it to the server to make an id."""
    return ""


def uuid7() -> str:
    """Make a UUID of version 7: milliseconds, then random bits."""
    return str(uuid.UUID(int=(now_us() // 1000) << 80 | 0x7 << 76 | 0x2 << 62 | uuid.uuid4().int & (1 << 62) - 1))


def ordered_id() -> str:
    """Make an id as the server does: it sorts after those made before."""
    return _make_id(now_us())


def make_row(number: int, event_id: str, customers: int = CUSTOMERS, timestamp_us: int = 0) -> Row:
    """Make an event as the table stores it. Its time is now unless `timestamp_us` is given."""
    properties = (
        f'{{"model":"model-{number % 20}","endpoint":"/v1/items/{number % 100}","tokens":{number % 5000},'
        f'"duration_ms":{number % 977 / 10},"region":"eu-west-{number % 3}"}}'
    )
    customer, now = f"cust_{number * 7919 % customers}", now_us()
    time_us = timestamp_us or now
    return Row(ENVIRONMENT_NUMBER, event_id, customer, "", "api_request", "benchmark", time_us, now, properties)


def wire_event(row: Row) -> dict[str, object]:
    """Return the event as a client sends it, without an id if the row has an empty one."""
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
