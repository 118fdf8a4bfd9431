"""Test what the service promises about ingest, queries, lookup and errors; headings give SPEC's section numbers.

Most tests talk to the application in this process. Where the wire matters, they start `eventstore.py serve` as a user
would. The database is always a real file, and the clock stands still, so no test waits or measures time.

tests/test_usage.py tests usage, monitoring and the visibility lag; tests/test_command_line.py tests flags, keys and the
banner. The other files of tests/ cover everything around the service.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import re
import sqlite3
import urllib.parse
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from datetime import datetime
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

import eventstore
from eventstore import ApiError, ApiKey, Settings, Store, create_app
from helpers import (
    BODY,
    DAY_US,
    EVER,
    KEY,
    KEYS,
    NOW,
    STAGING_KEY,
    Json,
    Live,
    answer_on,
    ask,
    at,
    becomes,
    counts,
    database,
    event,
    eventually,
    ids,
    page,
    refused,
    rows_of,
    rows_to_insert,
    serving,
    store,
    store_of,
    stores_nothing,
    table,
    total,
    write_lock,
)
from oracle import cursor, expected_page, sort_key

# ---------------------------------------------------------------------------------------------- 2: one event

both_ways = table("method", ["GET", "POST"])


def test_a_single_event_is_answered_with_202_and_its_id(client: httpx.Client) -> None:
    response = client.post("/v1/events", json=event("evt_1"))
    assert (response.status_code, response.headers["content-type"]) == (202, "application/json")
    assert response.json() == {"message": "Event accepted for processing", "event_id": "evt_1"}
    assert counts(response) == (1, 0)


@both_ways
def test_a_stored_event_is_returned_with_all_its_fields(client: httpx.Client, method: str) -> None:
    store(client, event("evt_1", customer_id="c1", source="app", properties={"n": {"a": [1, None]}}, timestamp=at(-1)))
    (stored,) = page(client, method)["events"]
    times = stored.pop("timestamp"), stored.pop("ingested_at")
    assert stored == {"id": "evt_1", "external_customer_id": "cust", "customer_id": "c1", "event_name": "call",
                      "source": "app", "environment_id": "development", "properties": {"n": {"a": [1, None]}}
                      }  # fmt: skip
    assert [datetime.fromisoformat(time) for time in times] == [datetime.fromisoformat(at(us)) for us in (-1, 0)]
    assert all(time.endswith("Z") for time in times)


OPTIONAL = ("event_id", "customer_id", "source", "timestamp", "properties")
EMPTY_FIELDS = {"absent": {}, "null": dict.fromkeys(OPTIONAL), "empty": dict.fromkeys(OPTIONAL[:3], ""),
                "zero time": {"timestamp": "0001-01-01T00:00:00Z", "properties": {}},
                "zero time in digits": {"timestamp": "0001-01-01T00:00:00.000000000Z"}}  # fmt: skip


@table("fields", EMPTY_FIELDS.values(), ids=EMPTY_FIELDS)
def test_only_the_name_and_the_customer_of_an_event_are_required(client: httpx.Client, fields: dict[str, Any]) -> None:
    response = client.post("/v1/events", json={"event_name": "call", "external_customer_id": "cust"} | fields)
    (stored,) = page(client)["events"]
    assert stored["id"] == response.json()["event_id"]
    assert (stored["customer_id"], stored["source"], stored["properties"]) == ("", "", {})
    assert stored["timestamp"] == stored["ingested_at"]
    assert datetime.fromisoformat(stored["timestamp"]) == datetime.fromisoformat(at())


TIMES = [
    ("2025-10-15T11:38:47Z", "2025-10-15T11:38:47Z"),
    ("2025-10-15t11:38:47z", "2025-10-15T11:38:47Z"),
    ("2025-10-15T11:38:47.9Z", "2025-10-15T11:38:47.9Z"),
    ("2025-10-15T11:38:40.000000Z", "2025-10-15T11:38:40Z"),
    ("2025-10-15T11:38:47.000001Z", "2025-10-15T11:38:47.000001Z"),
    ("2025-10-15T11:38:47.962000999Z", "2025-10-15T11:38:47.962Z"),
    ("2025-10-15T11:38:47.123456789+05:30", "2025-10-15T06:08:47.123456Z"),
    ("2025-10-14T23:38:47-12:00", "2025-10-15T11:38:47Z"),
    ("2024-02-29T23:59:59.9999999Z", "2024-02-29T23:59:59.999999Z"),
    ("1969-12-31T23:59:59.9999999Z", "1969-12-31T23:59:59.999999Z"),
    ("1969-12-31T23:59:59Z", "1969-12-31T23:59:59Z"),
    ("0001-01-01T00:00:00.000001Z", "0001-01-01T00:00:00.000001Z"),
    ("0000-12-31T19:00:00.000001-05:00", "0001-01-01T00:00:00.000001Z"),
    ("9999-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"),
]


@table(("sent", "stored"), TIMES)
def test_a_timestamp_is_truncated_to_microseconds_and_returned_in_utc_in_gos_format(
    shared: httpx.Client, sent: str, stored: str
) -> None:
    store(shared, event(f"at {sent}", timestamp=sent))
    (found,) = page(shared, **EVER, event_id=f"at {sent}")["events"]
    assert found["timestamp"] == stored


def test_generated_ids_are_ulids_and_ascend_even_if_the_clock_goes_back(tmp_path: Path) -> None:
    clock, made = Mock(return_value=NOW), []
    with serving(tmp_path, clock=clock) as client:
        for step_us in (0, 0, 1, 999, -5_000_000, 0, 1000, 10_000_000):
            clock.return_value += step_us
            made.append(client.post("/v1/events", json=event()).json()["event_id"])
        store(client, *[event(source="bulk")] * 100)
        made += sorted(ids(client, "POST", source="bulk", page_size=100))
    assert all(re.fullmatch(r"event_[0-7][0-9A-HJKMNP-TV-Z]{25}", event_id) for event_id in made)
    assert made == sorted(set(made))
    digits = ("0123456789ABCDEFGHJKMNPQRSTVWXYZ".index(letter) for letter in made[0].removeprefix("event_")[9::-1])
    assert sum(digit << 5 * power for power, digit in enumerate(digits)) == NOW // 1000


def test_only_the_event_name_is_stripped_of_white_space(client: httpx.Client) -> None:
    store(client, event(" id ", event_name=" \t api call\u00a0\n", external_customer_id=" c ", source=" s "))
    (stored,) = page(client, event_name="api call")["events"]
    assert (stored["id"], stored["external_customer_id"], stored["source"]) == (" id ", " c ", " s ")


def test_unknown_fields_and_the_content_type_are_ignored(client: httpx.Client) -> None:
    content = json.dumps(event("evt_1", tenant_id=5, id="x", ingested_at=[{"deep": None}]))
    for content_type in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
        response = client.post("/v1/events", content=content, headers={"content-type": content_type})
        assert response.status_code == 202
    assert ids(client) == ["evt_1"]


VALUES = [
    "12345678901234567890", "-0", "0.10", "1e3", "1E+03", "1.7976931348623157e308", "123456789012345678.123456789",
    "1" * 309, '"200"', "true", "null", "[]", "{}", '{"a":{"b":[1,[2.50,{"c":null}]]}}', '"\u00e9\u4e16\U0001f600"',
    r'"\u00e9\ud83d\ude00"', r'"\u0000"', r'"a\u0000b\n\t\"\\\/"', '""', "[" * 300 + "]" * 300,
]  # fmt: skip


@both_ways
@table("raw", VALUES, ids=lambda raw: raw[:30])
def test_properties_keep_their_types_and_digits(shared: httpx.Client, raw: str, method: str) -> None:
    def literally(text: str) -> Any:
        return json.loads(text, parse_int=lambda digits: ("int", digits), parse_float=lambda digits: ("float", digits))

    properties = f'{{"a": {raw}, "\\u0000": 1, "": {{}}}}'
    content = f'{{"event_name": "call", "external_customer_id": "cust", "properties": {properties}}}'
    response = shared.post("/v1/events", content=content.encode())
    assert response.status_code == 202, response.text
    answer = ask(shared, method, event_id=response.json()["event_id"])
    assert literally(answer.text)["events"][0]["properties"] == literally(properties)


@table("path", ["/v1/events", "/v1/events/bulk"])
def test_another_connection_sees_an_event_once_it_is_answered_with_202(
    client: httpx.Client, tmp_path: Path, path: str
) -> None:
    with database(tmp_path) as conn:
        for number in range(1, 6):
            sent = event(f"evt_{number}")
            assert client.post(path, json={"events": [sent], **sent}).status_code == 202
            assert conn.execute("SELECT count(*), max(id) FROM events").fetchone() == (number, f"evt_{number}")


def test_later_events_with_the_same_id_do_not_change_the_first(client: httpx.Client) -> None:
    store(client, event("evt_1", properties={"n": 1}))
    (first,) = page(client)["events"]
    later = event("evt_1", event_name="other", external_customer_id="x", timestamp="2024-01-01T00:00:00Z", source="y")
    response = client.post("/v1/events", json=later)
    assert (response.status_code, response.json()["event_id"], counts(response)) == (202, "evt_1", (0, 1))
    assert counts(store(client, later, event("evt_2"))) == (1, 1)
    assert page(client, **EVER, event_id="evt_1")["events"] == [first]


# ---------------------------------------------------------------------------------------------- 3: batches


@table("size", [1, 2, 257, 999, 1000])
def test_a_batch_of_up_to_1000_events_is_stored(client: httpx.Client, size: int) -> None:
    response = store(client, *[event(f"evt_{number}") for number in range(size)])
    assert response.json() == {"message": "Events accepted for processing"}
    assert counts(response) == (size, 0)
    assert sorted(ids(client, "POST", page_size=1000)) == sorted(f"evt_{number}" for number in range(size))


def test_duplicates_in_a_batch_are_counted_and_the_first_is_kept(client: httpx.Client) -> None:
    store(client, event("known"))
    batch = [event("a", source="1"), event("known"), event("b"), event("a", source="2"), event("a", source="3")]
    assert counts(store(client, *batch)) == (2, 3)
    assert [stored["source"] for stored in page(client, event_id="a")["events"]] == ["1"]
    assert counts(store(client, *batch)) == (0, 5)


INVALID_BATCHES = {
    "empty": ('{"events": []}', " 0"), "1001": (json.dumps({"events": [event()] * 1001}), "1001"),
    "54321": (json.dumps({"events": [{}] * 54_321}), "54321"), "object": ('{"events": {"event_id": "a"}}', ""),
    "string": ('{"events": "all"}', ""), "number": ('{"events": 7}', ""), "null": ('{"events": null}', ""),
    "missing": ("{}", ""), "one event": (json.dumps(event()), ""),
}  # fmt: skip


@table(("content", "number"), INVALID_BATCHES.values(), ids=INVALID_BATCHES)
def test_an_invalid_batch_is_refused_with_the_limit_and_the_number_sent(
    shared: httpx.Client, content: str, number: str
) -> None:
    with stores_nothing(shared):
        response = shared.post("/v1/events/bulk", content=content)
        refused(response, part="1000")
        assert number in response.json()["message"]


def test_a_batch_with_invalid_events_stores_nothing_and_lists_every_fault(client: httpx.Client) -> None:
    batch = [event(f"evt_{number}") for number in range(1000)]
    batch[17] = event("evt_9", event_name=" ")
    batch[40] = event(timestamp="yesterday")
    batch[999] = event(7, external_customer_id=None, properties=[])
    with stores_nothing(client):
        response = client.post("/v1/events/bulk", json={"events": batch})
        details = refused(response, part="3 of 1000 events are invalid; nothing was stored")
    assert (details["rejected"], details["truncated"], len(details["errors"])) == (3, False, 5)
    assert details["errors"][:2] == [
        {"index": 17, "event_id": "evt_9", "field": "event_name", "code": "required",
         "message": "event_name is required"},
        {"index": 40, "event_id": None, "field": "timestamp", "code": "invalid_format",
         "message": 'timestamp must be RFC 3339 with a zone, got "yesterday"; write it like 2026-11-01T00:00:00Z'},
    ]  # fmt: skip
    faults = {"event_id": "invalid_type", "external_customer_id": "required", "properties": "invalid_type"}
    assert {fault["field"]: fault["code"] for fault in details["errors"][2:]} == faults
    assert {(fault["index"], fault["event_id"]) for fault in details["errors"][2:]} == {(999, None)}


def test_a_batch_item_that_is_not_an_object_is_reported_at_its_index(client: httpx.Client) -> None:
    with stores_nothing(client):
        details = refused(client.post("/v1/events/bulk", json={"events": [event(), None, 5, event(), [event()], "x"]}))
    assert details["rejected"] == 4
    assert [index for index, _ in itertools.groupby(fault["index"] for fault in details["errors"])] == [1, 2, 4, 5]


@table(("bad", "truncated"), [(99, False), (100, False), (101, True), (1000, True)])
def test_at_most_100_faults_are_listed(shared: httpx.Client, bad: int, truncated: bool) -> None:
    batch = [event(event_name=None)] * bad + [event()] * (1000 - bad)
    with stores_nothing(shared):
        details = refused(shared.post("/v1/events/bulk", json={"events": batch}), part=f"{bad} of 1000 events")
    assert (details["rejected"], details["truncated"], len(details["errors"])) == (bad, truncated, min(bad, 100))


def test_values_in_error_messages_are_truncated_to_100_characters(shared: httpx.Client) -> None:
    response = shared.post("/v1/events", json=event("i" * 5000, timestamp="x" * 5000, properties=["y" * 5000]))
    refused(response)
    assert [letter for letter in "ixy" if letter * 101 in response.text] == []


def test_50_concurrent_retries_of_one_event_store_it_once(live: Live) -> None:
    def send(attempt: int) -> httpx.Response:
        sent = event("retried", properties={"attempt": attempt})
        return store(client, sent) if attempt % 2 else client.post("/v1/events", json=sent)

    with live.client() as client, ThreadPoolExecutor(50) as pool:
        answers = list(pool.map(send, range(50)))
        (stored,) = page(client, event_id="retried")["events"]
    assert {answer.status_code for answer in answers} == {202}
    assert sorted(counts(answer) for answer in answers) == [(0, 1)] * 49 + [(1, 0)]
    assert counts(answers[stored["properties"]["attempt"]]) == (1, 0)


def test_overlapping_concurrent_batches_each_get_their_own_counts(client: httpx.Client) -> None:
    batches = [range(start, start + 300) for start in range(0, 1000, 50)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(pool.map(lambda batch: counts(store(client, *[event(f"{id}") for id in batch])), batches))
    assert [sum(answer) for answer in answers] == [300] * len(batches)
    assert sum(new for new, _ in answers) == len({*itertools.chain(*batches)}) == total(client)


# ---------------------------------------------------------------------------------------------- 1: bad input

LEVELS = 1_000_000  # deeper than the stack, the only limit since Python 3.14
DEEP = b"[" * LEVELS + b"]" * LEVELS
DEEP_OBJECTS = b'{"a":' * LEVELS + b"1" + b"}" * LEVELS
NOT_OBJECTS = {
    "nothing": b"", "blanks": b" \n", "words": b"hello", "cut off": b'{"event_name": "call", "source": "ap',
    "not closed": b'{"events": [{"event_name": "call"}', "two values": b"{} {}", "comma at the end": b'{"a": 1,}',
    "NaN": b'{"a": NaN}', "leading zero": b'{"a": 01}', "single quotes": b"{'a': 1}", "line break": b'{"a": "\n"}',
    "unknown escape": b'{"a": "\\q"}', "byte order mark": b"\xef\xbb\xbf{}", "UTF-16": "{}".encode("utf-16"),
    "invalid UTF-8": b'{"a": "\xff"}', "invalid UTF-8 key": b'{"\xc3": 1}', "UTF-8 surrogate": b'{"a": "\xed\xa0\x80"}',
    "lone surrogate": b'{"a": "\\ud800"}', "lone low surrogate": b'{"a": "\\udc00 "}',
    "lone surrogate in a key": b'{"\\ud800x": 1}', "deep arrays": b'{"a": ' + DEEP + b"}", "deep objects": DEEP_OBJECTS,
    "deep array": DEEP, "null": b"null", "array": b"[]", "number": b"1", "string": b'"{}"',
}  # fmt: skip


@table("content", NOT_OBJECTS.values(), ids=NOT_OBJECTS)
def test_a_body_that_is_not_a_json_object_is_refused(shared: httpx.Client, content: bytes) -> None:
    with stores_nothing(shared):
        for path in ("/v1/events", "/v1/events/bulk", "/v1/events/query"):
            refused(shared.post(path, content=content))


BAD_TIMES = [
    "yesterday", "2025-10-15", "2025-10-15T11:38:47", "2025-10-15T11:38Z", "2025-10-15 11:38:47Z", "1760528327", "0",
    "2025-10-15T11:38:60Z", "2016-12-31T23:59:60Z", "2025-10-15T24:00:00Z", "2025-10-15T11:60:00Z",
    "2025-02-30T00:00:00Z", "2025-02-29T00:00:00Z", "2025-13-01T00:00:00Z", "2025-00-01T00:00:00Z",
    "0000-02-30T00:00:00Z", "12025-10-15T11:38:47Z", "-2025-10-15T11:38:47Z", "25-10-15T11:38:47Z",
    "2025-W42-3T11:38:47Z", "2025-288T11:38:47Z", "20251015T113847Z", "2025-10-15T11:38:47.Z", "2025-10-15T11:38:47,5Z",
    "2025-10-15T11:38:47.0123456789Z", "2025-10-15T11:38:47+0530", "2025-10-15T11:38:47+05",
    "2025-10-15T11:38:47+24:00", "2025-10-15T11:38:47+05:60", "2025-10-15T11:38:47 UTC", "2025-10-15T11:38:47ZZ",
    " 2025-10-15T11:38:47Z", "2025-10-15T11:38:47Z\n",
    "\u0662\u0660\u0662\u0665-10-15T11:38:47Z", "Wed, 15 Oct 2025 11:38:47 GMT",
]  # fmt: skip
TIMES_OUT_OF_RANGE = [
    "0000-01-01T00:00:00Z", "0000-02-29T00:00:00Z", "0000-12-31T23:59:59.999999Z", "0001-01-01T00:00:00+00:01",
    "9999-12-31T23:59:59-00:01",
]  # fmt: skip
BAD_FIELDS = [  # field, its JSON ("" leaves the field out), error code
    *[("event_name", raw, "required") for raw in ("", "null", '""', r'" \t\n"')],
    *[("external_customer_id", raw, "required") for raw in ("", "null", '""')],
    *[("event_name", raw, "invalid_type") for raw in ("5", "true", '["call"]', "{}")],
    *[(name, "5", "invalid_type") for name in ("external_customer_id", "event_id", "customer_id", "source")],
    *[("timestamp", raw, "invalid_type") for raw in ("1760528327", "1760528327.5", "{}", "false")],
    *[("timestamp", json.dumps(time), "invalid_format") for time in BAD_TIMES],
    *[("timestamp", json.dumps(time), "out_of_range") for time in TIMES_OUT_OF_RANGE],
    *[("properties", raw, "invalid_type") for raw in ("[]", '[{"a": 1}]', '"a"', '"{}"', '""', "5", "false")],
    *[("properties", f'{{"a": {raw}}}', "out_of_range") for raw in ("1e400", "-1e400", "[1e999]", "1" * 5000)],
]


@table(("field", "raw", "code"), BAD_FIELDS, ids=lambda value: value[:40])
def test_an_event_with_an_invalid_field_is_refused_and_the_field_named(
    shared: httpx.Client, field: str, raw: str, code: str
) -> None:
    fields = {name: json.dumps(value) for name, value in event("evt_1").items()} | {field: raw}
    bad = "{" + ", ".join(f'"{name}": {value}' for name, value in fields.items() if value) + "}"
    with stores_nothing(shared):
        details = refused(shared.post("/v1/events", content=bad.encode()), part=field)
        (fault,) = details["errors"]
        assert fault.pop("message").startswith(f"{field} ")
        assert fault == {"index": 0, "event_id": None if field == "event_id" else "evt_1", "field": field, "code": code}
        assert (details["rejected"], details["truncated"]) == (1, False)
        batch = f'{{"events": [{json.dumps(event())}, {bad}]}}'
        details = refused(shared.post("/v1/events/bulk", content=batch.encode()), part="1 of 2 events is invalid")
        assert [(fault["index"], fault["field"], fault["code"]) for fault in details["errors"]] == [(1, field, code)]


BAD_JSON = {"deep arrays": b'{"a": %s}' % DEEP, "deep objects": DEEP_OBJECTS, "lone surrogate": rb'{"a": "\ud800"}',
            "low surrogate": rb'{"a": ["\udc00"]}', "surrogate key": rb'{"\ud83d": 1}', "not UTF-8": b'{"a": "\xff"}',
            "not closed": b'{"a": 1', "closed wrongly": b'{"a": 1]', "no colon": b'{"a" 1}', "cut off": b'{"a": tru}'
            }  # fmt: skip


@table("raw", BAD_JSON.values(), ids=BAD_JSON)
def test_malformed_json_in_properties_is_refused(shared: httpx.Client, raw: bytes) -> None:
    single = b'{"event_name": "call", "external_customer_id": "cust", "properties": %s}' % raw
    with stores_nothing(shared):
        refused(shared.post("/v1/events", content=single))
        refused(shared.post("/v1/events/bulk", content=b'{"events": [%s]}' % single))
        refused(shared.post("/v1/events/query", content=b'{"property_filters": %s}' % raw))


@table("send", [bytes, lambda content: iter([content])], ids=["announced", "chunked"])
@table("path", ["/v1/events", "/v1/events/bulk", "/v1/events/query"])
def test_a_body_up_to_the_limit_is_accepted_and_a_longer_one_refused(
    tmp_path: Path, path: str, send: Callable[..., Any]
) -> None:
    fitting = json.dumps({"events": [event()], **event()}).encode().ljust(2000)
    with serving(tmp_path, max_body_bytes=2000) as client:
        with stores_nothing(client):
            refused(client.post(path, content=send(fitting + b" ")), part="2000")
        assert client.post(path, content=send(fitting)).status_code in (200, 202)


@table("send", [b"".join, iter], ids=["announced", "chunked"])
def test_a_body_of_33_mib_exceeds_the_default_limit(live: Live, send: Callable[..., Any]) -> None:
    with live.client() as client, stores_nothing(client):
        refused(client.post("/v1/events/bulk", content=send([b" " * 2**20] * 33)), part=str(2**25))


HOSTILE = [
    "'; DROP TABLE events; --", "' OR '1'='1", '" OR ""="', ") OR (1=1", "%", "_", "*", "?1", ":environment", "@a",
    "$1", "$.a", "$[0]", "$", "a.b", '"a"', "a'b", 'a"b', "\\", "\\u0041", "a\\", "[0]", "#-1", "a::b", "::", "1::2",
    "null", "{}", "a/b?c=d&e#f+g%20", "../..", "lookup", " ", "a\nb", "\u0000", "a\u0000b", "\u00e9", "e\u0301",
    "\u4e16\U0001f600",
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("hostile")) as client:
        for text in HOSTILE:
            sent = event(text, event_name=f"n{text}n", external_customer_id=text, customer_id=text, source=text)
            store(client, sent | {"properties": {text: text, "same": text}})
        yield client


@both_ways
@table("field", ["event_id", "event_name", "external_customer_id", "source"])
def test_fragments_of_sql_and_paths_are_stored_and_found_literally(
    hostile: httpx.Client, field: str, method: str
) -> None:
    for text in HOSTILE:
        assert ids(hostile, method, **{field: f"n{text}n" if field == "event_name" else text}) == [text]
    assert ids(hostile, method, **{field: "x' OR 1=1 --"}) == []


@table("key", [None, "same"], ids=["key", "value"])
def test_fragments_of_sql_and_paths_are_taken_literally_in_property_filters(
    hostile: httpx.Client, key: str | None
) -> None:
    for text in HOSTILE:
        assert ids(hostile, "POST", property_filters={key or text: [text]}) == [text]


@both_ways
@table(("sort", "key"), [("timestamp", str), ("event_name", "n{}n".format)])
def test_fragments_of_sql_and_paths_are_taken_literally_in_cursors(
    hostile: httpx.Client, sort: str, key: Callable[[str], str], method: str
) -> None:
    in_order = sorted(HOSTILE, key=key)
    for number, text in enumerate(in_order):
        query = {"sort": sort, "order": "asc", "iter_last_key": f"{NOW}000::{text}"}
        assert ids(hostile, method, **query) == in_order[number + 1 :]


# ---------------------------------------------------------------------------------------------- 1: keys, routes, log


@table("key", [None, "", "wrong", KEY.upper(), KEY[:-1], KEY + "x", f"{KEY}, {KEY}", b"\xff\xfe"])
def test_every_request_without_a_known_key_gets_401(shared: httpx.Client, key: Any) -> None:
    paths = ("/v1/events", "/v1/events/bulk", "/v1/events/query", "/v1/customers", "/v1", "/v1/", "/x")
    headers = {} if key is None else {"x-api-key": key}
    with stores_nothing(shared):
        for method, path in itertools.product(("GET", "POST", "PUT"), paths):
            request = httpx.Request(method, f"{shared.base_url}{path}", headers=headers, content=BODY)
            refused(shared.send(request), 401, "unauthorized", "x-api-key")


@both_ways
@table("key", [KEY, "", "wrong"])
def test_health_needs_no_key(shared: httpx.Client, method: str, key: str) -> None:
    response = shared.request(method, "/health", headers={"x-api-key": key})
    assert (response.status_code, response.headers["content-type"]) == (200, "application/json")
    assert response.json()["status"] == "ok"


@table("path", ["/v1/customers", "/v1/meters/1", "/v1/meters/search", "/v1/invoices", "/v1", "/v2/events",
                "/index.html", "/v1/a%0Ab"])  # fmt: skip
def test_an_unknown_route_gets_404_and_a_list_of_the_routes(
    shared: httpx.Client, path: str, caplog: pytest.LogCaptureFixture
) -> None:
    for method in ("GET", "POST", "DELETE"):
        response = shared.request(method, path)
        refused(response, 404, "not_found", "this server has /v1/events,")
        routes = response.json()["message"].partition("this server has ")[2].split(", ")
        assert sorted(routes) == sorted({operation.public_path for operation in eventstore.OPERATIONS})
    said = [record.message for record in caplog.records]
    assert [line.partition("no route ")[2].endswith("the answer lists the routes") for line in said] == [True] * 3
    assert "/v1/events/bulk" not in caplog.text


@table(("path", "meant"), [
    ("/v1/evnts", "POST or GET /v1/events"), ("/v1/event", "POST or GET /v1/events"), ("/V1/Events", "POST or GET /v1/events"),
    ("/v1//events", "POST or GET /v1/events"), ("/v2/events", "POST or GET /v1/events"), ("/v1/v1/events/bulk", "POST /v1/events/bulk"),
    ("/api/v1/events/query", "POST /v1/events/query"), ("/v1/analytics/usage", None), ("/v1/events.bulk", "POST /v1/events/bulk"),
    ("/healthz", "GET or POST /health"), ("/v1/openapi.json", "GET /openapi.json"), ("/v1/customers", None), ("/metrics", None),
    ("/" + "v1/events" * 2000, None),
])  # fmt: skip
def test_a_route_that_resembles_another_gets_404_and_a_suggestion(
    shared: httpx.Client, path: str, meant: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    response = shared.post(path)
    refused(response, 404, "not_found", f"did you mean {meant}? this server has /v1/events," if meant else "no route")
    assert ("did you mean" in response.json()["message"]) is bool(meant)
    assert (f"did you mean {meant}?" in caplog.text) is bool(meant)


@table("path", ["/events", "/events/bulk", "/events/lookup", "/events/usage"])
def test_a_route_without_v1_gets_404_and_a_hint_about_the_base_url(shared: httpx.Client, path: str) -> None:
    refused(shared.post(path), 404, "not_found", f'the base URL ends in /v1: did you mean "/v1{path}"?')


WRONG_METHODS = [("PUT", "/v1/events", {"GET", "POST"}), ("DELETE", "/v1/events/bulk", {"POST"}),
                 ("PATCH", "/v1/events/query", {"POST"}), ("DELETE", "/health", {"GET", "POST"}),
                 ("POST", "/", {"GET", "HEAD"})]  # fmt: skip


@table(("method", "path", "allowed"), WRONG_METHODS)
def test_a_wrong_method_gets_405_and_the_allowed_methods(
    shared: httpx.Client, method: str, path: str, allowed: Any
) -> None:
    response = shared.request(method, path)
    refused(response, 405, "method_not_allowed")
    assert allowed <= set(response.headers["Allow"].split(", ")) <= allowed | {"GET", "HEAD"}


def test_keys_never_appear_in_the_log(shared: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(0)
    for headers in ({}, {"x-api-key": "wrong-but-secret"}):
        for method, path in (("POST", "/v1/events"), ("GET", "/v1/events"), ("GET", "/nowhere"), ("PUT", "/v1/events")):
            shared.request(method, path, headers=headers)
    assert "401" in caplog.text
    assert [key for key in (KEY, STAGING_KEY, "wrong-but-secret") if key in caplog.text] == []


REFUSED = [("POST", "/v1/events", "{", 400), ("POST", "/v1/events", json.dumps(event(timestamp="a\nb")), 400),
           ("GET", "/v1/events?order=%0Aup", "", 400), ("GET", "/v1/a%0Ab", "", 404), ("PUT", "/v1/events", "", 405)
           ]  # fmt: skip


@table("request_", REFUSED, ids=str)
def test_only_refused_requests_are_logged_each_on_one_line(
    shared: httpx.Client, caplog: pytest.LogCaptureFixture, request_: Any
) -> None:
    method, path, content, status = request_
    store(shared, event())
    shared.request(method, path, content=content)
    (record,) = [record for record in caplog.records if record.name == "eventstore"]
    assert record.levelname == "WARNING"
    assert f"{method} {path.partition('?')[0]}: {status}" in record.getMessage()
    assert "\n" not in record.getMessage()


def test_environments_do_not_see_each_others_events(client: httpx.Client) -> None:
    store(client, event("same", source="development"), event("only_here"))
    for key, environment, expected in ((STAGING_KEY, "staging", ["same"]), (KEY, "development", ["same", "only_here"])):
        client.headers["x-api-key"] = key
        response = client.post("/v1/events", json=event("same", source=environment))
        assert counts(response) == ((1, 0) if key == STAGING_KEY else (0, 1))
        found = page(client, "POST")
        assert [stored["id"] for stored in found["events"]] == expected
        assert {stored["environment_id"] for stored in found["events"]} == {environment}
        assert found["total_count"] == len(expected)
        assert [stored["source"] for stored in page(client, event_id="same")["events"]] == [environment]
        by_name = ask(client, "GET", sort="event_name", iter_last_key=f"{NOW}000::only_here")
        assert by_name.status_code == (400 if key == STAGING_KEY else 200)


def test_an_application_cannot_be_created_without_a_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="API key"):
        create_app(Settings(db=str(tmp_path / "events.db")))
    assert list(tmp_path.iterdir()) == []


@table("body", [{"events": [event()]}, {"events": []}, {"events": 1, "source": "x"}])
def test_a_batch_that_is_sent_to_the_route_for_one_event_gets_a_hint(shared: httpx.Client, body: Json) -> None:
    refused(shared.post("/v1/events", json=body), part="; a batch of events goes to POST /v1/events/bulk")


@table(("method", "path", "part"), [
    ("POST", "/v1/events/xyz", 'no route "/v1/events/xyz"'), ("POST", "/v1/events/x/", 'no route "/v1/events/x/"'),
    ("GET", "/v1/events/query", "if you mean /v1/events/query, use POST"), ("GET", "/v1/events/bulk", "use POST"),
    ("GET", "/v1/events/usage", "use POST"),
])  # fmt: skip
def test_a_misspelled_route_gets_404_and_a_hint(shared: httpx.Client, method: str, path: str, part: str) -> None:
    refused(shared.request(method, path), 404, "not_found", part)


def test_each_unknown_name_that_is_ignored_is_logged_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with serving(tmp_path) as client:
        for _ in range(2):
            store(client, event("a") | {"propertes": {"n": 1}}, event("b"))
            assert client.post("/v1/events", json=event("c") | {"propertes": 1}).status_code == 202
            client.get("/v1/events?page_sise=3")
            client.post("/v1/events/query", json={"page_sise": 3})
            usage = {"event_name": "call", "aggregation_type": "COUNT", "timezone": "Mars/X", "window_size": "DAY"}
            client.post("/v1/events/usage", json=usage)
    said = [record.message for record in caplog.records if " is ignored, " in record.message]
    assert [message.partition(" is ignored")[0] for message in said] == [
        'POST /v1/events/bulk: "propertes"', 'POST /v1/events: "propertes"', 'GET /v1/events: "page_sise"',
        'POST /v1/events/query: "page_sise"', 'POST /v1/events/usage: "timezone"']  # fmt: skip


# ---------------------------------------------------------------------------------------------- 4, 5: queries

KEYS_OF_A_PAGE = {"events", "has_more", "iter_first_key", "iter_last_key", "offset"}


@both_ways
@table("field", ["event_id", "event_name", "external_customer_id", "source"])
def test_a_filter_matches_exactly(client: httpx.Client, field: str, method: str) -> None:
    values = {"event_id": "a", "event_name": "call", "external_customer_id": "cust", "source": "app"}
    other = values | {"event_id": "b", field: values[field].upper()}
    store(client, values, other)
    assert ids(client, method, **{field: values[field]}) == ["a"]
    assert ids(client, method, **values) == ["a"]
    assert ids(client, method, **other) == [other["event_id"]]
    assert ids(client, method, **{field: values[field][:-1] + "%"}) == []


@both_ways
def test_the_range_includes_both_ends(client: httpx.Client, method: str) -> None:
    store(client, *[event(f"{us:+}", timestamp=at(us)) for us in (-11, -10, 0, 10, 11)])
    assert ids(client, method, start_time=at(-10), end_time=at(10)) == ["+10", "+0", "-10"]
    assert ids(client, method, start_time=at(10), end_time=at(10)) == ["+10"]


@both_ways
def test_the_range_defaults_to_the_seven_days_before_now(client: httpx.Client, method: str) -> None:
    too_old, week_ago, day_ago = f"{-7 * DAY_US - 1}", f"{-7 * DAY_US}", f"{-DAY_US}"
    store(client, *[event(us, timestamp=at(int(us))) for us in (too_old, week_ago, day_ago, "0", "1")])
    assert ids(client, method) == ["0", day_ago, week_ago]
    assert ids(client, method, start_time=None, end_time=None) == ["0", day_ago, week_ago]
    assert ids(client, method, start_time=at(-9 * DAY_US)) == ["0", day_ago, week_ago, too_old]
    assert ids(client, method, end_time=at(-DAY_US)) == [day_ago, week_ago, too_old]
    assert ids(client, method, end_time=at(1)) == ["1", "0", day_ago]


@table("plus", ["+", "%20", "%2B"])
def test_a_plus_that_arrives_as_a_space_is_read_as_a_plus(client: httpx.Client, plus: str) -> None:
    store(client, event("before", timestamp=at(-1)), event("now"))
    local = f"2025-10-15T17:08:47.962{plus}05:30"
    answer = client.get(f"/v1/events?start_time={local}&end_time={local}")
    assert [stored["id"] for stored in answer.json()["events"]] == ["now"]


PAGE_SIZES = [
    *[("GET", size, given) for size, given in [("", 50), (1, 1), (7, 7), (49, 49), (50, 50), (51, 50), (1000, 50)]],
    *[("GET", size, 50) for size in (10**30, 0, -1, -(10**30))],
    *[("POST", size, given) for size, given in [(None, 50), (1, 1), (51, 51), (1000, 1000), (1001, 1001)]],
    *[("POST", size, 1001) for size in (5000, 100_000, 1e5)],  # all but the newest event
    *[("POST", size, given) for size, given in [(0, 50), (-1, 50), (-(10**18), 50)]],
]


@table(("method", "size", "given"), PAGE_SIZES)
def test_a_page_has_the_requested_size_up_to_the_limit(many: httpx.Client, method: str, size: Any, given: int) -> None:
    found = page(many, method, offset=1, page_size=size)
    newest_first = [f"{number:04}" for number in range(1001, -1, -1)]
    assert [stored["id"] for stored in found["events"]] == newest_first[1 : 1 + given]
    assert found["has_more"] is (given < 1001)
    assert found["offset"] == 1 + (given if found["has_more"] else size)


def test_a_large_page_is_not_read_on_the_event_loop(many: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    quick_read = Mock(side_effect=TimeoutError)
    monkeypatch.setattr(store_of(many)._quick_reader, "run", quick_read)
    assert len(page(many, "POST", page_size=100_000)["events"]) == 1002
    assert not quick_read.called
    assert len(page(many, "POST", page_size=50)["events"]) == 50
    assert quick_read.called


@pytest.mark.slow
def test_a_page_of_100000_events_is_answered_and_the_next_one_continues(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        with closing(eventstore.connect(str(tmp_path / "events.db"))) as conn:
            rows = rows_to_insert(*[f"{number:06}" for number in range(100_003)])
            eventstore.insert_events(conn, rows, 5)
        query: Json = {"page_size": 100_000, "order": "asc"}
        first = page(client, "POST", **query)
        assert [stored["id"] for stored in first["events"]] == [row.id for row in rows[:100_000]]
        assert (first["has_more"], first["total_count"], first["offset"]) == (True, 100_003, 100_000)
        for more in ({"offset": first["offset"]}, {"iter_first_key": first["iter_last_key"]}):
            last = page(client, "POST", **query, **more)
            assert [stored["id"] for stored in last["events"]] == ["100000", "100001", "100002"]
            assert not last["has_more"]


@both_ways
def test_an_empty_page_has_every_key_and_null_cursors(client: httpx.Client, method: str) -> None:
    nothing = {"events": [], "has_more": False, "iter_first_key": None, "iter_last_key": None, "offset": 50}
    assert page(client, method) == nothing | ({"total_count": 0} if method == "POST" else {})


TOTALS = [
    *[("GET", {"count_total": form}, 1002) for form in ("true", "TRUE", "True", "1", "t", "T")],
    *[("GET", {"count_total": form}, "absent") for form in ("", "false", "FALSE", "False", "0", "f", "F")],
    *[("GET", {}, "absent"), ("POST", {}, 1002), ("POST", {"count_total": None}, 1002)],
    *[("POST", {"count_total": True}, 1002), ("POST", {"count_total": False}, None)],
]


@table(("method", "query", "answered"), TOTALS)
def test_get_returns_a_total_on_request_and_post_by_default(
    many: httpx.Client, method: str, query: dict[str, Any], answered: Any
) -> None:
    found = page(many, method, **query)
    assert found.pop("total_count", "absent") == answered
    assert set(found) == KEYS_OF_A_PAGE


BAD_QUERIES = [
    *[("page_size", value) for value in ("x", "1.5", "7 ", "1e2", "0x10", "1_0", "\u0667")],
    *[("offset", value) for value in ("-1", "x", "1.5", "9" * 30)],
    *[("sort", value) for value in ("Timestamp", "EVENT_NAME", "id", "timestamp ", "timestamp;--")],
    *[("order", value) for value in ("DESC", "Asc", "up", "desc ")],
    *[("count_total", value) for value in ("yes", "2", "on", "tru", " true")],
    *[("property_filters", value) for value in ("a", ":v", "a:1;b", "a:1;", ";", "a:1;:v")],
]
BAD_TIMES_AND_CURSORS = [
    *itertools.product(("start_time", "end_time"), (*BAD_TIMES, *TIMES_OUT_OF_RANGE)),
    *itertools.product(("iter_first_key", "iter_last_key"), (
        "x", "1760528327962000000", "1760528327962000000:a", "::a", "a::b", "1.5::a", "12::", " 1::a", "1e3::a",
        "\u0661::a", "0x1::a", "9" * 30 + "::a", "' OR 1=1::a")),
]  # fmt: skip
BAD_VALUES: dict[str, list[Any]] = {
    "page_size": ["7", 1.5, True, [], 1e300, 100_001, 100_001.0, 10**18],
    "offset": [-1, "0", 0.5, 10**30],
    "sort": [1, "Desc", ["asc"]],
    "order": [1, "Desc", ["asc"]],
    "count_total": ["true", 1, "yes"],
    **{name: [5, {}] for name in ("start_time", "iter_last_key", "event_name", "event_id")},
    "property_filters": ["a:b", [], {"a": "b"}, {"a": [1]}, {"a": [None]}, {"": ["v"]}],
}
BAD_BODIES = [(name, value) for name, values in BAD_VALUES.items() for value in values]


@table(("method", "field", "value"), [
    *[("GET", *bad) for bad in BAD_QUERIES + BAD_TIMES_AND_CURSORS],
    *[("POST", *bad) for bad in BAD_BODIES + BAD_TIMES_AND_CURSORS],
], ids=lambda value: str(value)[:40])  # fmt: skip
def test_an_invalid_parameter_is_refused_and_named(many: httpx.Client, method: str, field: str, value: Any) -> None:
    response = many.get("/v1/events", params={field: value}) if method == "GET" else ask(many, "POST", **{field: value})
    (fault,) = refused(response, part=field)["errors"]
    assert (fault["field"], fault["index"], fault["event_id"]) == (field, None, None)
    assert fault["code"] in ("invalid_type", "invalid_format", "out_of_range")


def test_all_invalid_parameters_are_named_at_once(many: httpx.Client) -> None:
    details = refused(many.get("/v1/events?page_size=x&offset=-1&sort=up&start_time=now"))
    assert {fault["field"] for fault in details["errors"]} == {"page_size", "offset", "sort", "start_time"}


def test_a_direction_in_sort_is_refused_with_a_hint_to_use_order(many: httpx.Client) -> None:
    (fault,) = refused(many.get("/v1/events?sort=name:desc"))["errors"]
    allowed = 'sort must be one of timestamp, event_name, got "name:desc"'
    assert fault["message"] == f"{allowed}; send the direction in order: desc or asc"


CONTRADICTIONS = {
    "end before start": {"start_time": at(0), "end_time": at(-1)},
    "start after now": {"start_time": at(1)},
    "both cursors": {"iter_first_key": f"{NOW}000::a", "iter_last_key": f"{NOW}000::a"},
}


@both_ways
@table("query", CONTRADICTIONS.values(), ids=CONTRADICTIONS)
def test_contradictory_parameters_are_refused(many: httpx.Client, method: str, query: dict[str, Any]) -> None:
    (fault,) = refused(ask(many, method, **query))["errors"]
    assert fault["field"].endswith(("_time", "_key"))


@table("name", ["event_name", "page_size", "order", "iter_last_key"])
def test_a_parameter_given_twice_is_refused(many: httpx.Client, name: str) -> None:
    refused(many.get(f"/v1/events?{name}=&{name}="), part=name)


def test_unknown_parameters_and_null_fields_are_ignored(many: httpx.Client) -> None:
    assert page(many, tenant="x", limit=3, event_name="") == page(many)
    fields = dict.fromkeys(eventstore.EventQueryIn.__struct_fields__)
    assert page(many, "POST", **fields, unknown={}) == page(many, "POST")


# ---------------------------------------------------------------------------------------------- 4: property filters

MATCHES = [  # the filter's value, the property's JSON
    *[("200", raw) for raw in ("200", "200.0", "2e2", "0.2E+3", "2000e-1", '"200"')],
    *[("1", raw) for raw in ("1", "1.0", "1e0", '"1"')], *[("0", raw) for raw in ("0", "-0", "-0.0", "0e9", '"0"')],
    *[("0.1", raw) for raw in ("0.1", "0.10", "1e-1")], *[("-2.5", raw) for raw in ("-2.5", "-25e-1", '"-2.5"')],
    *[("1000000", raw) for raw in ("1000000", "1e6")], ("100000000000000000000", "1e20"), ("0.000001", "1e-6"),
    *[("1e21", raw) for raw in ("1e21", "1E+21", "1000000000000000000000")], ("-1.5e300", "-1.5e300"),
    *[("1e-7", raw) for raw in ("1e-7", "0.0000001", "1.0e-07")], ("0.30000000000000004", "0.30000000000000004"),
    ("5e-324", "5e-324"), ("1.7976931348623157e308", "1.7976931348623157e308"), ("0.1", "0.10000000000000000555"),
    ("9007199254740991", "9007199254740991"), ("9007199254740992", "9007199254740993"),  # 2**53 + 1
    ("12345678901234567000", "12345678901234567890"), ("-9223372036854776000", "-9223372036854775808"),
    *[(text, raw) for text in ("true", "false") for raw in (text, f'"{text}"')], ("0.10", '"0.10"'), ("1.0", '"1.0"'),
    ("null", '"null"'), ("{}", '"{}"'), ("x", r'"\u0078"'), ('"x"', r'"\"x\""'), ("a\\b", r'"a\\b"'),
    ("a/b", r'"a\/b"'), ("a\nb", r'"a\nb"'), ("\u00e9", '"\u00e9"'), ("\u00e9", r'"\u00e9"'),
    ("\U0001f600", r'"\ud83d\ude00"'), ("\u0000", r'"\u0000"'), ("", '""'), (" ", '" "'), ("%", '"%"'),
    ("[]", "[]"), ("{}", "{}"), ("[200]", "[200]"), ("[200]", "[ 2e2 ]"), ("[200]", '"[200]"'), ("[1,[true,null]]", "[1, [true, null]]"),
    *[('{"b":1}', raw) for raw in ('{"b":1}', '{ "b" : 1.0 }')], ('{"a":0.1,"b":[{}]}', '{"b": [{}], "a": 0.10}'),
    ('["\u00e9/"]', r'["\u00e9\/"]'), (r'["\n"]', r'["\n"]'),
]  # fmt: skip
DIFFERS = [  # the same, but the filter must not match
    ("200", "2000"), ("20", "200"), ("200", '"200 "'), ("200.0", "200"), ("200.0", "200.0"), ("0.1", '"0.10"'),
    ("0.10", "0.1"), ("0.10", "0.10"), ("1e3", "1e3"), ("1e6", "1000000"), ("1e+21", "1e21"), ("-0", "-0"), ("+1", "1"),
    ("9007199254740993", "9007199254740993"), ("0.1", "0.10000000000000002"), ("01", "1"), (" 1", "1"),
    ("1", "true"), ("0", "false"), ("true", "1"), ("false", "0"), ("True", "true"), ("TRUE", '"true"'), ("null", "null"),
    ("", "null"), ("0", "null"), ("{}", "[]"), ("1", "[1]"), ("[1]", "1"), ("[1.0]", "[1.0]"), ("[ 1 ]", "[1]"),
    ('{"b":1,"a":2}', '{"b":1,"a":2}'), ('"x"', '"x"'), ("\\u0078", '"x"'), ("e", '"\u00e9"'), ("%", '"x"'), ("_", '"x"'),
    ("X", '"x"'),
]  # fmt: skip


@pytest.mark.slow
@table("matches", [True, False])
@table("more", ["", r', "with a backslash": "\t"'])
def test_a_property_filter_compares_values_as_flexprice_does(client: httpx.Client, matches: bool, more: str) -> None:
    for number, (value, raw) in enumerate(MATCHES if matches else DIFFERS):
        for space in ("", " "):
            properties = f'{{"a"{space}:{space}{raw}{more}}}'
            content = f'{{"event_name": "e", "external_customer_id": "{number}", "properties": {properties}}}'
            assert client.post("/v1/events", content=content.encode()).status_code == 202
        for values in ([value], [value, "eu", "0.25"], ["nowhere", "7", value, "[8]"]):
            query: Json = {"external_customer_id": str(number), "property_filters": {"a": values}}
            found = {
                method: len(ids(client, method, **query))
                for method in ("GET", "POST")
                if method == "POST" or "," not in value
            }
            assert {2 * matches} == {*found.values()}, (value, raw)


LITERAL_KEYS = [
    "a.b", "$", "$.a", "$.a.b", "1st", "0", "[0]", "a[0]", "#-1", "*", 'a"b', '"', "a'b", "a\\b", "\\", "\\u0061",
    "a b", " ", "a:b", "a;b", "a,b", "cl\u00e9", "\U0001f600", "a\u0000b", "\u0000", "a\nb", "\u007f", "A", "null",
]  # fmt: skip


@table("ensure_ascii", [True, False], ids=["escaped", "unescaped"])
def test_a_property_key_is_taken_literally(client: httpx.Client, ensure_ascii: bool) -> None:
    others = {"a": {"b": "hit", "": "hit"}, "x": ["hit"], "b": "hit", "\u00e9": "miss", "u0061": "hit"}
    for number, key in enumerate(LITERAL_KEYS):
        for name, properties in ("hit", {key: "hit"}), ("no", {key: "miss", **others}), ("longer", {f"{key}x": "hit"}):
            sent = event(event_name=name, external_customer_id=f"{number}", properties=properties)
            assert client.post("/v1/events", content=json.dumps(sent, ensure_ascii=ensure_ascii)).status_code == 202
        for method in ("POST",) if {":", ";", ","} & set(key) else ("GET", "POST"):
            found = page(client, method, external_customer_id=f"{number}", property_filters={key: ["hit"]})
            assert (key, [stored["event_name"] for stored in found["events"]]) == (key, ["hit"])


@both_ways
def test_values_of_a_key_are_alternatives_and_keys_must_all_match(client: httpx.Client, method: str) -> None:
    for model, region in itertools.product("abc", "xyz"):
        store(client, event(model + region, properties={"model": model, "region": region}))
    query = {"order": "asc", "property_filters": {"model": ["a", "c"], "region": ["y", "z", "nowhere"]}}
    assert ids(client, method, **query) == ["ay", "az", "cy", "cz"]
    assert ids(client, method, **query, event_id="ay", event_name="call") == ["ay"]
    counted = page(client, method, **query, count_total=True, page_size=1)
    assert (counted["total_count"], counted["has_more"]) == (4, True)


@both_ways
def test_a_filter_is_split_at_the_first_colon(client: httpx.Client, method: str) -> None:
    store(client, event("1", properties={"url": "http://x:80/"}), event("2", properties={"url": "http"}))
    assert ids(client, method, property_filters={"url": ["http://x:80/"]}) == ["1"]


@table("filters", [{}, {"a": []}, {"a": None}, {"a": [], "b": ["1"]}, None])
def test_a_property_key_without_values_is_ignored(client: httpx.Client, filters: Any) -> None:
    store(client, event("1", properties={"b": 1}))
    assert ids(client, "POST", property_filters=filters) == ["1"]


# ---------------------------------------------------------------------------------------------- 4: order and paging

four_orders = table(("sort", "order"), [*itertools.product(["timestamp", "event_name"], ["desc", "asc"])])


def crowd(randomness: random.Random, size: int, prefix: str = "") -> list[dict[str, Any]]:
    """Return events with awkward ids and so few names and times that most of them tie."""
    return [
        event(prefix + randomness.choice(["", "::", "Z", "a", "\u00e9", "\U0001f600"]) + str(number),
              event_name=randomness.choice("AaB"), external_customer_id=randomness.choice("cd"),
              timestamp=at(-randomness.randrange(5)))
        for number in range(size)
    ]  # fmt: skip


WALKS = {  # the order, and the parameter in which a client sends a page's iter_last_key
    "desc": ("desc", "iter_last_key"),
    "asc": ("asc", "iter_last_key"),
    "asc, as FlexPrice's clients do": ("asc", "iter_first_key"),
}


@pytest.mark.slow
@table("sort", ["timestamp", "event_name"])
@table(("order", "side"), WALKS.values(), ids=WALKS)
@table(("size", "filters"), [(1, {}), (7, {"external_customer_id": "c"}), (7, {"event_name": "a"}), (50, {})], ids=str)
def test_paging_visits_every_event_once_and_in_order_while_others_arrive(
    client: httpx.Client, sort: str, order: str, side: str, size: int, filters: Json
) -> None:
    methods = itertools.cycle(["GET", "POST", "POST"])
    randomness = random.Random(size)
    originals, arriving = crowd(randomness, 40), iter(crowd(randomness, 60, "new"))
    store(client, *originals)
    query: Json = {"sort": sort, "order": order, "page_size": size, **filters}
    known, visited, has_more = list(originals), list[str](), True
    while has_more:
        found = page(client, next(methods), **query)
        has_more, query[side] = found["has_more"], found["iter_last_key"]
        assert len(found["events"]) == size or not has_more
        visited += [stored["id"] for stored in found["events"]]
        if new := list(itertools.islice(arriving, 2)):
            store(client, *new)
            known += new
    known = [one for one in known if filters.items() <= one.items()]
    in_order = [one["event_id"] for one in sorted(known, key=sort_key(sort), reverse=order == "desc")]
    assert visited == [event_id for event_id in in_order if event_id in set(visited)]
    assert {one["event_id"] for one in originals if one in known} <= set(visited)


@pytest.mark.slow
@four_orders
@both_ways
def test_every_page_matches_a_plain_python_model(client: httpx.Client, sort: str, order: str, method: str) -> None:
    randomness = random.Random(4)
    events = crowd(randomness, 40)
    store(client, *events)
    for _ in range(60):
        start, end = sorted(randomness.choices(range(-5, 1), k=2))
        size, offset, mark = randomness.randint(1, 12), randomness.randint(0, 20), randomness.choice(events)
        query = {"sort": sort, "order": order, "page_size": size, "start_time": at(start), "end_time": at(end)}
        query |= randomness.choice([{}, {"external_customer_id": "c"}, {"event_name": "a"}])
        side = randomness.choice(["", "iter_last_key", "iter_first_key"])
        cursors = {side: cursor(mark)} if side else {}
        found = page(client, method, **query, **cursors, offset=offset, count_total=True)
        found["events"] = [stored["id"] for stored in found["events"]]
        expected = expected_page(events, query, side, mark if side else None, offset)
        assert found == expected | {"events": [one["event_id"] for one in expected["events"]]}


@both_ways
@four_orders
def test_iter_first_key_polls_for_new_events(client: httpx.Client, sort: str, order: str, method: str) -> None:
    newest = "iter_first_key" if order == "desc" else "iter_last_key"

    def new(number: int) -> dict[str, Any]:
        return event(f"evt::{number}", event_name=f"n{number}", timestamp=at(number // 2 - 500))  # two of each time

    def poll(key: str | None) -> tuple[list[str], bool, str | None]:
        found = page(client, method, sort=sort, order=order, iter_first_key=key, page_size=3)
        assert found["offset"] is None
        return [stored["id"] for stored in found["events"]], found["has_more"], found[newest]

    store(client, *map(new, range(5)))
    key = page(client, method, sort=sort, order=order)[newest]
    assert poll(key) == ([], False, None)
    store(client, *map(new, range(5, 9)))
    found, has_more, next_key = poll(key)
    assert (sorted(found), has_more) == (["evt::5", "evt::6", "evt::7"], True)
    assert (found == sorted(found)) is (order == "asc")
    assert poll(next_key)[:2] == (["evt::8"], False)


@both_ways
@table(("order", "side", "neighbour"), [
    ("desc", "iter_last_key", "0500"), ("desc", "iter_first_key", "0501"),
    ("asc", "iter_last_key", "0501"), ("asc", "iter_first_key", "0501"),
])  # fmt: skip
def test_a_cursor_of_an_unknown_event_works_when_sorting_by_time_but_not_by_name(
    many: httpx.Client, method: str, order: str, side: str, neighbour: str
) -> None:
    query = {"page_size": 1, "order": order, side: f"{NOW - 1500}000::0500x"}
    assert ids(many, method, **query) == [neighbour]
    advice = "if the event was deleted, start again without a cursor"
    details = refused(ask(many, method, **query, sort="event_name"), part=f'is event_name, got "0500x": {advice}')
    assert [fault["field"] for fault in details["errors"]] == [side]


# ---------------------------------------------------------------------------------------------- 6: lookup

ODD_IDS = ["a/b", "/", "//a//", "?", "a?b=c#d", "%", "%2F", "a::b", "::", "lookup", "bulk", "query", "usage",
               "monitoring", " ", "a b", "+", ".", "..", "a/../b", "é世😀", "e\u0301", "a\nb", "&id=x", ";", "\u0000"]  # fmt: skip


@pytest.fixture(scope="module")
def odd_ids(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with serving(tmp_path_factory.mktemp("odd_ids")) as client:
        store(client, *[event(event_id, properties={"n": event_id}) for event_id in ODD_IDS])
        yield client


def found(response: httpx.Response) -> dict[str, Any]:
    assert response.status_code == 200, response.text
    answer = response.json()
    constant: Json = {"status": "processed", "processed_events": [], "debug_tracker": None}
    assert answer == {"event": answer["event"], "events": [answer["event"]], **constant}
    return dict(answer["event"])


@table("event_id", ODD_IDS)
def test_an_event_can_be_looked_up_by_any_id(odd_ids: httpx.Client, event_id: str) -> None:
    (listed,) = page(odd_ids, event_id=event_id)["events"]
    assert listed["properties"] == {"n": event_id}
    assert found(odd_ids.get("/v1/events/lookup", params={"id": event_id})) == listed


@table("event_id", [event_id for event_id in ODD_IDS if event_id not in ("lookup", "monitoring")])
def test_an_event_can_be_looked_up_by_any_id_in_the_path(live: Live, event_id: str) -> None:
    with live.client() as client, live.connect() as sock:  # a socket, because HTTP clients normalize paths
        store(client, event(event_id))
        path = urllib.parse.quote(event_id).encode()
        sock.sendall(b"GET /v1/events/%b HTTP/1.1\r\nHost: a\r\nx-api-key: %b\r\n\r\n" % (path, KEY.encode()))
        assert found(answer_on(sock))["id"] == event_id


def test_a_lookup_finds_events_of_any_time_but_only_of_its_environment(client: httpx.Client) -> None:
    store(client, event("old", timestamp="0001-01-02T00:00:00Z"), event("new", timestamp="9999-12-30T00:00:00Z"))
    for event_id in ("old", "new"):
        assert found(client.get(f"/v1/events/{event_id}"))["id"] == event_id
        for path in (f"/v1/events/{event_id}", f"/v1/events/lookup?id={event_id}"):
            refused(client.get(path, headers={"x-api-key": STAGING_KEY}), 404, "not_found", event_id)


@table(("narrowed", "is_found"), [
    ({"external_customer_id": "cust"}, True), ({"external_customer_id": "other"}, False),
    ({"external_customer_id": "", "start_time": "", "end_time": ""}, True),
    ({"start_time": at()}, True), ({"end_time": at()}, True),  # both inclusive, as in section 4
    ({"start_time": at(1)}, False), ({"end_time": at(-1)}, False),
])  # fmt: skip
def test_a_lookup_can_be_narrowed_by_customer_and_time(
    client: httpx.Client, narrowed: dict[str, Any], is_found: bool
) -> None:
    store(client, event("evt_1", timestamp=at()))
    for path, query in (("/v1/events/lookup", {"id": "evt_1"}), ("/v1/events/evt_1", {})):
        response = client.get(path, params=narrowed | query)
        if is_found:
            assert found(response)["id"] == "evt_1"
        else:
            refused(response, 404, "not_found", "evt_1")


@table("query", ["", "?id=", "?external_customer_id=cust", "?id=a&id=b", "?id=a&start_time=yesterday",
                 "?id=%ff", f"?id=a&start_time={NOW}", "?id=a&start_time=2025-01-02T00:00:00Z&end_time=2025-01-01T00:00:00Z"])  # fmt: skip
def test_an_invalid_lookup_is_refused(shared: httpx.Client, query: str) -> None:
    refused(shared.get(f"/v1/events/lookup{query}"))


# ---------------------------------------------------------------------------------------------- the store


@pytest.mark.slow
@table("more", [0, 1, 500], ids=["one statement", "with BEGIN", "several statements"])
def test_requests_that_share_a_commit_are_counted_separately(tmp_path: Path, more: int) -> None:
    with serving(tmp_path) as client:
        store(client, event("known"), event('old \0 \x1e "::"'))
    requests = [["a", "known", "a"], ["b", "a"], ["known"], ['old \0 \x1e "::"', 'c \0 \x1e "::"']]
    requests.append([f"{number}" for number in range(64 * more)])
    group = [rows_to_insert(*event_ids) for event_ids in requests]
    with closing(eventstore.connect(str(tmp_path / "events.db"))) as conn:
        assert eventstore.insert_group(conn, group) == [1, 1, 0, 1, 64 * more]
        assert eventstore.insert_group(conn, group) == [0] * 5
        elsewhere = [[row._replace(environment=2) for row in rows] for rows in group]
        assert eventstore.insert_group(conn, [*elsewhere, *group]) == [2, 1, 0, 2, 64 * more, *[0] * 5]
        assert not conn.in_transaction
    assert len(rows_of(tmp_path)) == 2 * (5 + 64 * more)


def test_a_restart_keeps_all_events(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        store(client, event("a", properties={"n": 0.10}), event("b::c"))
        before = page(client)
    assert [path.name for path in tmp_path.iterdir()] == ["events.db"]
    with serving(tmp_path) as client:
        assert page(client) == before
        assert counts(store(client, event("a"), event("new"))) == (1, 1)


def test_closing_the_store_commits_queued_events_and_refuses_later_ones(tmp_path: Path) -> None:
    async def close_while_writing() -> list[int]:
        store = Store(Settings(db=str(tmp_path / "events.db"), api_keys=KEYS))
        with write_lock(tmp_path):
            waiting = [asyncio.ensure_future(store.insert(rows_to_insert(f"{number}"))) for number in range(50)]
            await asyncio.sleep(0)  # let each of them run until it waits for the writer
            closed = asyncio.ensure_future(asyncio.to_thread(store.close))
            await asyncio.sleep(0)
        await closed
        with pytest.raises(ApiError) as refusal:
            await store.insert(rows_to_insert("late"))
        assert refusal.value.code == "service_unavailable"
        return await asyncio.gather(*waiting)

    assert asyncio.run(close_while_writing()) == [1] * 50
    with database(tmp_path) as conn:
        assert conn.execute("SELECT count(*), count(*) FILTER (WHERE id = 'late') FROM events").fetchone() == (50, 0)


def test_a_single_event_overtakes_queued_batches(tmp_path: Path) -> None:
    async def store_beside_batches() -> None:
        store = Store(Settings(db=str(tmp_path / "events.db"), api_keys=KEYS))

        def insert(*event_ids: str) -> asyncio.Future[int]:
            return asyncio.ensure_future(store.insert(rows_to_insert(*event_ids)))

        with write_lock(tmp_path):
            inserting = [insert("first")]
            await asyncio.sleep(0)  # let it be queued
            await becomes(lambda: not store.writer._few)  # the writer has taken it and waits for the lock
            inserting += [insert(*(f"{batch}-{number}" for number in range(1000))) for batch in range(4)]
            inserting += [insert("single")]
            await asyncio.sleep(0)
        await asyncio.gather(*inserting)
        await asyncio.to_thread(store.close)

    asyncio.run(store_beside_batches())
    with database(tmp_path) as conn:
        stored = [event_id for (event_id,) in conn.execute("SELECT id FROM events ORDER BY seq")]
    assert (stored[:3], len(stored)) == (["first", "single", "0-0"], 4002)


def test_an_event_takes_less_than_500_bytes_in_the_file(tmp_path: Path) -> None:
    make_id, properties = random.Random(0), {"model": "model-7", "endpoint": "/v1/items/42", "tokens": 1250,
                                             "duration_ms": 12.5, "region": "eu-west-1"}  # fmt: skip
    with serving(tmp_path) as client:
        for batch in range(20):
            store(client, *(event(str(uuid.UUID(int=make_id.getrandbits(128))), external_customer_id=f"cust_{i}",
                                  timestamp=at(batch), source="app", properties=properties)
                            for i in range(1000)))  # fmt: skip
    assert (tmp_path / "events.db").stat().st_size < 500 * 20_000


def test_a_view_shows_events_with_readable_environments_and_times(tmp_path: Path) -> None:
    keys = (*KEYS, ApiKey.hashed("third", "später"))
    with serving(tmp_path, api_keys=keys) as client:
        store(client, event("a", timestamp="1969-12-31T23:59:59.5Z", source="app", properties={"n": 1}), event("b"))
        client.headers["x-api-key"] = "third"
        store(client, event("a"))
    with database(tmp_path) as conn:
        conn.row_factory = sqlite3.Row
        first, second, third = map(dict, conn.execute("SELECT * FROM readable_events ORDER BY seq"))
    ingested_at = "2025-10-15T11:38:47.962000Z"
    assert first == {"seq": 1, "environment": "development", "id": "a", "external_customer_id": "cust",
                     "customer_id": "", "event_name": "call", "source": "app",
                     "timestamp": "1969-12-31T23:59:59.500000Z", "ingested_at": ingested_at,
                     "properties": '{"n":1}'}  # fmt: skip
    assert (second["id"], second["timestamp"], third["environment"]) == ("b", ingested_at, "später")


def test_the_sequence_number_of_a_deleted_event_is_not_reused(tmp_path: Path) -> None:
    def numbers() -> list[int]:
        with database(tmp_path, isolation_level=None) as conn:
            found = [seq for (seq,) in conn.execute("SELECT seq FROM events ORDER BY seq")]
            conn.execute("DELETE FROM events")
            return found

    with serving(tmp_path) as client:
        store(client, event("a"), event("b"))
        before = numbers()
        store(client, event("a"), event("c"))
    assert min(numbers()) > max(before)


def test_health_says_why_events_cannot_be_stored_and_recovers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventstore, "WRITE_LOCK_TIMEOUT_S", 0.2)
    monkeypatch.setattr(eventstore, "_TRIAL_PAUSE_S", 0.2)
    with serving(tmp_path) as client:
        with write_lock(tmp_path):
            refused(client.post("/v1/events", json=event("a")), 503, "service_unavailable")
            failing = client.get("/health")
            assert (failing.status_code, failing.json()["status"]) == (503, "failing")
            assert failing.json()["reason"] == "another process has locked the database"
        eventually(lambda: client.get("/health").status_code == 200)
        assert client.get("/health").json() == {"status": "ok", "version": eventstore.__version__}
