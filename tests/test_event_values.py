"""What an event's fields and properties may hold, and what a batch with odd fields costs the others."""

from __future__ import annotations

import json
import time
import tracemalloc
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import eventstore
from helpers import (
    EVER,
    Json,
    counts,
    event,
    exported,
    imported,
    make_meter,
    metered_usage,
    metering,
    page,
    refused,
    store,
    stores_nothing,
    table,
    total,
    usage,
)

# ---------------------------------------------------------------------------------------------- repeated keys

BACKSLASH = r'"note": "a\\b"'
REPEATED = {
    "number": '{"tokens": 10, "tokens": 250}',
    "compact": '{"tokens":10,"tokens":250}',
    "three times": '{"tokens": 1, "tokens": 2, "other": 5, "tokens": 250}',
    "backslash before": f'{{{BACKSLASH}, "tokens": 10, "tokens": 250}}',
    "backslash after": f'{{"tokens": 10, "tokens": 250, {BACKSLASH}}}',
    "backslash in the first value": r'{"tokens": "\n", "tokens": 250}',
    "escaped key": r'{"tokens": 10, "token\u0073": 250}',
    "space before colon": '{"tokens" : 10, "tokens"\t\n: 250}',
    "colon in a text": '{"tokens": 10, "url": "http://x:80/", "tokens": 250}',
    "escaped colon": r'{"tokens": 10, "url": "\u003a", "tokens": 250}',
    "as many colons as escaped ones": r'{"a\u003Ab": 1, "tokens": 10, "tokens": 250}',
    "first one nested": '{"tokens": {"a": [1, {"b": 2}]}, "tokens": 250}',
    "last one text": '{"tokens": 10, "tokens": "250"}',
    "after a deep object": '{"deep": ' + '{"a":' * 400 + "1" + "}" * 400 + ', "tokens": 10, "tokens": 250}',
}  # fmt: skip


def send_properties(client: httpx.Client, properties: str, event_id: str = "evt") -> None:
    body = f'{{"event_name": "call", "external_customer_id": "cust", "event_id": "{event_id}", "properties": {properties}}}'
    response = client.post("/v1/events", content=body.encode())
    assert response.status_code == 202, response.text


@table("properties", REPEATED.values(), ids=REPEATED)
def test_the_last_value_of_a_repeated_key_counts_everywhere(tmp_path: Path, properties: str) -> None:
    with metering(tmp_path) as client:
        send_properties(client, properties)
        stored = page(client, **EVER)["events"][0]["properties"]
        assert stored == json.loads(properties)
        for value, found in (("10", 0), ("1", 0), ("250", 1)):
            assert page(client, "POST", property_filters={"tokens": [value]})["total_count"] == found
        for kind in ("SUM", "MAX", "LATEST"):
            assert usage(client, kind, property_name="tokens", **EVER)["value"] == 250
        meter = make_meter(client, "SUM", field="tokens", filters={"tokens": ["250"]})
        assert float(metered_usage(client, meter["id"], **EVER)["value"]) == 250
    sent = json.loads(exported(tmp_path).splitlines()[0])["properties"]
    assert sent == json.loads(properties)


def test_events_that_differ_only_in_earlier_values_of_a_key_have_one_distinct_value(client: httpx.Client) -> None:
    texts = ['{"a": {"b": 1, "b": 2}}', '{"a": {"b": 3, "b": 2}}', '{"a": 7, "a": {"b": 2}}', '{"a":{"b":2}}']
    for number, properties in enumerate(texts):
        send_properties(client, properties, f"evt_{number}")
    assert usage(client, "COUNT_UNIQUE", property_name="a", **EVER)["value"] == 1
    assert [stored["properties"] for stored in page(client)["events"]] == [{"a": {"b": 2}}] * 4


def test_without_a_repeated_key_properties_are_stored_byte_by_byte(client: httpx.Client) -> None:
    for number, properties in enumerate([
        '{ "a" : 1.50 , "b": "x:y" }', r'{"u": "\u003a\u00e9", "n": 1e2}', '{"a": {"a": 1}, "b": [{"a": 2}, {"a": 3}]}',
    ]):  # fmt: skip
        send_properties(client, properties, f"evt_{number}")
        assert properties in client.get("/v1/events", params={"event_id": f"evt_{number}"}).text


def test_numbers_keep_their_digits_beside_a_repeated_key(client: httpx.Client) -> None:
    send_properties(client, '{"a": 1, "a": 0.10, "long": 12345678901234567890.50, "e": [1E+03, -0, 1.0]}')
    answer = client.get("/v1/events").text
    assert '{"a":0.10,"long":12345678901234567890.50,"e":[1E+03,-0,1.0]}' in answer


def test_an_import_keeps_the_last_value_of_a_repeated_key(tmp_path: Path) -> None:
    line = b'{"event_id": "e", "event_name": "call", "external_customer_id": "cust", "properties": {"a": 1, "a": 2}}\n'
    folder = imported(tmp_path, line)
    assert json.loads(exported(folder))["properties"] == {"a": 2}
    assert b'"a":1' not in exported(folder).replace(b" ", b"")


# ---------------------------------------------------------------------------------------------- numbers

LARGEST = str(int(1.7976931348623157e308))  # 309 digits
TOO_LARGE = {
    "400 digits": '{"a": %s}' % ("1" * 400),
    "309 digits": '{"a": 18%s}' % ("0" * 307),
    "negative": '{"a": -%s}' % ("9" * 310),
    "nested": '{"a": [{"b": [[%s]]}]}' % ("1" * 400),
    "4300 digits": '{"a": %s}' % ("7" * 4300),
    "beside a text": '{"a": "%s", "b": %s}' % ("1" * 400, "1" * 400),
    "earlier value of a repeated key": '{"a": 1e999, "a": 1}',
}  # fmt: skip
NOT_TOO_LARGE = {
    "the largest": '{"a": %s}' % LARGEST,
    "the largest, negative": '{"a": -%s}' % LARGEST,
    "300 digits": '{"a": [%s]}' % ("9" * 300),
    "digits in a text": '{"a": "%s"}' % ("1" * 400),
    "fraction": '{"a": 0.%s}' % ("1" * 400),
    "true beside many digits": '{"a": true, "b": "%s"}' % ("5" * 400),
}  # fmt: skip


@table("properties", TOO_LARGE.values(), ids=TOO_LARGE)
def test_a_number_that_no_double_can_hold_is_refused(tmp_path: Path, shared: httpx.Client, properties: str) -> None:
    body = f'{{"event_name": "call", "external_customer_id": "cust", "properties": {properties}}}'
    with stores_nothing(shared):
        (fault,) = refused(shared.post("/v1/events", content=body.encode()))["errors"]
        assert (fault["field"], fault["code"]) == ("properties", "out_of_range")
        refused(shared.post("/v1/events/bulk", content=f'{{"events": [{body}]}}'.encode()))
    imported(tmp_path, body.encode(), status=1)


@table("properties", NOT_TOO_LARGE.values(), ids=NOT_TOO_LARGE)
def test_a_number_of_many_digits_that_a_double_can_hold_comes_back_as_sent(
    client: httpx.Client, properties: str
) -> None:
    send_properties(client, properties)
    assert properties in client.get("/v1/events").text


# ---------------------------------------------------------------------------------------------- lengths

LIMITED = ["event_name", "external_customer_id", "event_id", "customer_id", "source"]


@table("field", LIMITED)
@table("letter", ["x", "\U0001f600"])
def test_a_field_may_have_1024_characters_and_no_more(
    tmp_path: Path, shared: httpx.Client, field: str, letter: str
) -> None:
    longest, bad = event(f"{field}{letter}") | {field: letter * 1024}, event() | {field: letter * 1025}
    assert shared.post("/v1/events", json=longest).status_code == 202
    assert store(shared, longest | {"source": "s" * 1024, "customer_id": "c" * 1024}).status_code == 202
    for path, body in (("/v1/events", bad), ("/v1/events/bulk", {"events": [event(), bad]})):
        with stores_nothing(shared):
            (fault,) = refused(shared.post(path, json=body))["errors"]
        assert (fault["field"], fault["code"]) == (field, "out_of_range")
        assert fault["message"] == f"{field} may have 1,024 characters, got 1,025"
    imported(tmp_path, json.dumps(bad).encode(), status=1)
    schema = shared.get("/openapi.json").json()["components"]["schemas"]["EventIn"]["properties"][field]
    assert schema["maxLength"] == 1024


def test_every_field_that_is_too_long_is_named(shared: httpx.Client) -> None:
    bad = dict.fromkeys(LIMITED, "x" * 200000)
    assert [fault["field"] for fault in refused(shared.post("/v1/events", json=bad))["errors"]] == LIMITED


# ---------------------------------------------------------------------------------------------- unknown and wrong fields


def batch(change: Callable[[int], Json]) -> bytes:
    events = [event(f"{number}", source="s", properties={"n": number}) | change(number) for number in range(1000)]
    return json.dumps({"events": events}).encode()


def least_s(service: Any, body: bytes) -> float:
    """Return the shortest processor time of decoding and checking a batch, as its request does."""
    durations = []
    for _ in range(15):
        start = time.process_time()
        with suppress(eventstore.ApiError):
            faults = eventstore.Faults(whole="event")
            eventstore.event_rows(service, eventstore.decode_batch(body, faults), "development", faults, bulk=True)
        durations.append(time.process_time() - start)
    return min(durations)


def test_a_batch_with_unknown_or_wrong_fields_costs_about_as_much_as_a_plain_one(
    client: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    service = client.app.state.service
    plain = least_s(service, batch(lambda _: {}))
    unknown = least_s(service, batch(lambda _: {"metadata": "x"}))
    wrong = least_s(service, batch(lambda number: {"source": 7} if number == 500 else {}))
    assert unknown < 1.5 * plain  # measured: 1.05; the rest is what a busy machine adds
    assert wrong < 3 * plain  # measured: 1.3


@table("position", [0, 500, 999])
def test_an_unknown_field_anywhere_in_a_batch_is_named_in_the_log(
    client: httpx.Client, caplog: pytest.LogCaptureFixture, position: int
) -> None:
    body = batch(lambda number: {"propertes": {}} if number == position else {})
    assert client.post("/v1/events/bulk", content=body).status_code == 202
    assert '"propertes" is ignored' in caplog.text
    assert total(client) == 1000


ODD: dict[str, Callable[[int], Json]] = {
    "one field": lambda _: {"metadata": "x"},
    "fifteen fields": lambda _: {f"field_{number}": number for number in range(15)},
    "a hundred fields": lambda _: {f"field_{number}": number for number in range(100)},
    "each its own": lambda number: {f"x{number}": 1},
    "the last one": lambda number: {"x": 1} if number == 999 else {},
    "a name with a space": lambda _: {"a b": {}},
    "a long name": lambda _: {"x" * 200: 1},
}  # fmt: skip


@table("change", ODD.values(), ids=ODD)
def test_a_batch_with_unknown_fields_is_stored_and_its_faults_are_found(
    client: httpx.Client, change: Callable[[int], Json]
) -> None:
    assert counts(client.post("/v1/events/bulk", content=batch(change))) == (1000, 0)
    assert {each["properties"]["n"] for each in page(client, "POST", page_size=1000)["events"]} == {*range(1000)}
    details = refused(
        client.post("/v1/events/bulk", content=batch(lambda n: change(n) | {"source": 5} if n % 9 == 0 else change(n)))
    )
    assert (details["rejected"], details["truncated"]) == (112, True)
    assert [fault["index"] for fault in details["errors"]] == [*range(0, 900, 9)]


MILLIONS = b",".join(b'"%d":1' % number for number in range(1_000_000))
MANY: dict[str, tuple[str, bytes]] = {
    "fields of an event": ("/v1/events", b'{"event_name":"call","external_customer_id":"cust",%b}' % MILLIONS),
    "fields of an event in a batch": ("/v1/events/bulk", b'{"events":[{"event_name":"call","external_customer_id":"cust",%b}]}' % MILLIONS),
    "fields of a batch": ("/v1/events/bulk", b'{"events":[{"event_name":"call","external_customer_id":"cust"}],%b}' % MILLIONS),
    "empty events": ("/v1/events/bulk", b'{"events":[%b]}' % b",".join([b"{}"] * 4_000_000)),
    "events with a brace": ("/v1/events/bulk", b'{"events":[%b]}' % b",".join([b'{"x":{}}'] * 400_000)),
    "filters of a meter": ("/v1/meters", b'{"filters":[%b]}' % b",".join([b"{}"] * 150_000)),
    "filters of a wrong type": ("/v1/meters", b'{"filters":[%b,1]}' % b",".join([b"{}"] * 150_000)),
    "names to group by": ("/v1/events/analytics", b'{"group_by":[%b]}' % b",".join([b'"?"'] * 200_000)),
    "a query of 2 MB": ("/v1/events/query", b'{"source":"%b"}' % (b"x" * 2_000_000)),
}  # fmt: skip


@table("name", MANY)
def test_millions_of_names_or_items_take_little_memory(tmp_path: Path, name: str) -> None:
    path, body = MANY[name]
    with metering(tmp_path) as client:
        tracemalloc.start()
        try:
            response = client.post(path, content=body)
            peak_bytes = tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()
    assert response.status_code == (202 if "fields" in name else 400), response.text
    assert peak_bytes < 4 * len(body) + 30_000_000  # the client and the server have copies of the body


def test_one_wrong_event_in_a_batch_is_named(client: httpx.Client) -> None:
    with stores_nothing(client):
        body = batch(lambda number: {"source": 7, "y": 1} if number == 998 else {})
        details = refused(client.post("/v1/events/bulk", content=body), part="1 of 1000 events is invalid")
    assert [(fault["index"], fault["field"], fault["code"]) for fault in details["errors"]] == [
        (998, "source", "invalid_type")]  # fmt: skip
