"""Values of an event's fields and properties, and the cost of a batch with odd fields."""

from __future__ import annotations

import itertools
import json
import math
import random
import struct
import sys
import tracemalloc
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

import eventstore
from helpers import (
    DAY_US,
    EVER,
    Json,
    analytics,
    at,
    counts,
    event,
    exported,
    feature_of,
    imported,
    listed,
    make,
    make_meter,
    meter_of,
    metered_usage,
    metering,
    monitored,
    page,
    refused,
    store,
    stores_nothing,
    table,
    total,
    usage,
)
from oracle import number_text

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


@pytest.mark.slow
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


SAME_NUMBERS = {  # text -> spellings of the number
    "200": ["200", "200.0", "2e2", "20.0E+1", '"200"'],
    "1": ["1", "1.0", "1e0", "10e-1", '"1"'],
    "0": ["0", "-0", "-0.0", "0.00", '"0"'],
    "0.1": ["0.1", "0.10", "1e-1"],
    "-1000000": ["-1000000", "-1e6", "-1000000.0"],
    "1e21": ["1e21", "1E+21", "1000000000000000000000.0"],
    "1e-7": ["1e-7", "0.0000001"],
    "9007199254740992": ["9007199254740992", "9007199254740993", "9.007199254740993e15"],
    "[1,0.1]": ["[1,0.1]", "[ 1.0, 0.10 ]", '"[1,0.1]"'],
    "true": ["true", '"true"'],
}
OTHER_NUMBERS = ["true", "0.2", "7", '"other"', "null", "[]", "1e22"]
NOTES = {"plain": "", "with a backslash": r', "note": "\t"'}


@pytest.mark.slow
@table("note", NOTES.values(), ids=NOTES)
@table(("text", "raws"), SAME_NUMBERS.items(), ids=SAME_NUMBERS)
def test_spellings_of_a_number_are_one_value_everywhere(tmp_path: Path, text: str, raws: list[str], note: str) -> None:
    others, now = [raw for raw in OTHER_NUMBERS if raw not in raws], {"start_time": at(-1), "end_time": at(1)}
    with metering(tmp_path) as client:
        for number, raw in enumerate([*raws, *others]):
            send_properties(client, f'{{"n": {raw}{note}}}', f"evt_{number}")
        found = page(client, "POST", property_filters={"n": [text]}, order="asc")["events"]
        assert [stored["id"] for stored in found] == [f"evt_{number}" for number in range(len(raws))]
        assert all(f'"n": {raw}' in client.get("/v1/events").text for raw in raws)
        assert monitored(client, **now, property_filters=f"n:{text}")[0] == len(raws) or "," in text
        of_text: Json = {"filters": {"n": [text, "x"]}, **now}
        assert usage(client, **of_text)["value"] == len(raws)
        assert usage(client, "COUNT_UNIQUE", property_name="n", **of_text)["value"] == 1
        distinct = len({text, *others} - {"null"})
        assert usage(client, "COUNT_UNIQUE", property_name="n", **now)["value"] == distinct
        by_day = usage(client, "COUNT_UNIQUE", property_name="n", window_size="DAY", **now)
        assert [window["value"] for window in by_day["results"]] == [distinct]
        plain, filtered = make_meter(client), make_meter(client, filters={"n": [text, "x"]})
        unique = make_meter(client, "COUNT_UNIQUE")
        assert metered_usage(client, filtered["id"], **now)["value"] == len(raws)
        assert metered_usage(client, plain["id"], **of_text)["value"] == len(raws)
        items = analytics(client, group_by=["properties.n"], **now)
        counted = {item["meter_id"]: item for item in items if item["properties"] == {"n": text}}
        assert {meter: item["total_usage"] for meter, item in counted.items()} == {
            plain["id"]: f"{len(raws)}", filtered["id"]: f"{len(raws)}", unique["id"]: "1"}  # fmt: skip
        only = analytics(client, property_filters={"n": [text]}, **now)
        assert [item["event_count"] for item in only] == [len(raws)] * 3


def test_a_bucketed_maximum_groups_spellings_of_a_number_together(client: httpx.Client) -> None:
    for number, region in enumerate(["1", "1.0", "1e0", "true", '"true"', '{"a": 1, "b": 2}', '{"b":2.0,"a":1}']):
        send_properties(client, f'{{"n": {number + 1}, "region": {region}}}', f"evt_{number}")
    answer = usage(client, "MAX", property_name="n", bucket_size="DAY", group_by=["properties.region"], end_time=at(1))
    assert answer["value"] == 3 + 5 + 7


def test_the_text_of_a_number_is_the_shortest_one_of_its_float(choose: random.Random) -> None:
    floats = [struct.unpack("d", choose.randbytes(8))[0] for _ in range(2000)]
    floats += [choose.random() * 10 ** choose.randint(-9, 24) for _ in range(2000)]
    floats += [float(choose.getrandbits(choose.randint(1, 70))) for _ in range(2000)]
    for number in filter(math.isfinite, floats):
        text = eventstore.value_text(json.dumps(number))
        assert text == number_text(number)
        assert float(text) == number


# ---------------------------------------------------------------------------------------------- the zero time

ZERO_TIMES = [
    "0001-01-01T00:00:00Z", "0001-01-01T00:00:00.000Z", "0001-01-01t00:00:00.000000000z", "0001-01-01T00:00:00+00:00",
    "0001-01-01T05:30:00+05:30", "0000-12-31T19:00:00-05:00",
]  # fmt: skip
SUM = {"event_name": "call", "aggregation_type": "SUM", "property_name": "n"}
TAKING_TIMES: dict[str, tuple[str, str, Json]] = {
    "GET list": ("GET", "/v1/events", {"count_total": "true"}),
    "POST query": ("POST", "/v1/events/query", {}),
    "lookup": ("GET", "/v1/events/lookup", {"id": "old"}),
    "lookup by path": ("GET", "/v1/events/old", {}),
    "monitoring": ("GET", "/v1/events/monitoring", {}),
    "monitoring by hour": ("GET", "/v1/events/monitoring", {"window_size": "HOUR"}),
    "usage": ("POST", "/v1/events/usage", SUM),
    "usage by day": ("POST", "/v1/events/usage", SUM | {"window_size": "DAY", "timezone": "Europe/Berlin"}),
    "usage by bucket": ("POST", "/v1/events/usage", SUM | {"bucket_size": "MINUTE"}),
    "usage of a meter": ("POST", "/v1/events/usage/meter", {"window_size": "WEEK"}),
    "analytics": ("POST", "/v1/events/analytics", {}),
    "analytics by week": ("POST", "/v1/events/analytics", {"window_size": "WEEK", "group_by": ["properties.n"]}),
    "GET meters": ("GET", "/v1/meters", {}),
    "GET features": ("GET", "/v1/features", {}),
    "POST features": ("POST", "/v1/features/search", {}),
}


@pytest.fixture(scope="module")
def with_meters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """A client of an application with two meters, one of them in weekly buckets, a feature and three events."""
    with metering(tmp_path_factory.mktemp("meters")) as client:
        make_meter(client, "SUM", field="n")
        make_meter(client, "MAX", field="n", bucket_size="WEEK")
        make(client, "features", feature_of("Calls", meter=meter_of("COUNT")))
        old = event("old", timestamp="2001-01-01T00:00:00Z", properties={"n": 100})
        store(
            client, old, event("week", timestamp=at(-5 * DAY_US), properties={"n": 2}), event("now", timestamp=at(-1))
        )
        yield client


@pytest.mark.slow
@table(("method", "path", "query"), TAKING_TIMES.values(), ids=TAKING_TIMES)
def test_the_zero_time_counts_as_absent(with_meters: httpx.Client, method: str, path: str, query: Json) -> None:
    if path.endswith("/usage/meter"):
        query = query | {"meter_id": listed(with_meters)[-1]["id"]}

    def answer(more: Json) -> Json:
        sent: Any = {"params": query | more} if method == "GET" else {"json": query | more}
        response = with_meters.request(method, path, **sent)
        assert response.status_code == 200, response.text
        return dict(response.json())

    without_times = answer({})
    for fields, zero in itertools.product((["start_time"], ["end_time"], ["start_time", "end_time"]), ZERO_TIMES):
        assert answer(dict.fromkeys(fields, zero)) == without_times, (fields, zero)


def test_a_zero_billing_anchor_counts_as_absent(with_meters: httpx.Client) -> None:
    for zero in ZERO_TIMES:
        query = {"window_size": "MONTH", "start_time": "2000-12-01T00:00:00Z", "billing_anchor": zero}
        answer = with_meters.post("/v1/events/usage", json=SUM | query).json()
        assert answer["results"][0]["window_size"] == "2001-01-01T00:00:00Z"


def test_a_zero_time_in_a_flag_counts_as_absent(tmp_path: Path) -> None:
    with metering(tmp_path) as client:
        store(client, event("old", timestamp="0001-01-01T00:00:00.000001Z"), event("now"))
    for flags in ([], ["--start-time", ZERO_TIMES[0]], ["--start-time", ZERO_TIMES[-1], "--end-time", ZERO_TIMES[1]]):
        assert len(exported(tmp_path, *flags).splitlines()) == 2


@table("size", [None, "MINUTE", "DAY", "WEEK", "MONTH"])
def test_analytics_over_the_first_microsecond_is_empty(with_meters: httpx.Client, size: str | None) -> None:
    assert analytics(with_meters, start_time=eventstore.EARLIEST, end_time=eventstore.EARLIEST, window_size=size) == []


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


def calls(service: Any, body: bytes) -> int:
    """Return how many functions, built-in ones included, decode and check a batch as its request does."""
    noted: Counter[str] = Counter()
    sys.setprofile(lambda frame, what, function: noted.update([what]))
    try:
        with suppress(eventstore.ApiError):
            faults = eventstore.Faults(whole="event")
            eventstore.event_rows(service, eventstore.decode_batch(body, faults), "development", faults, bulk=True)
    finally:
        sys.setprofile(None)
    return noted["call"] + noted["c_call"]


def test_a_batch_with_unknown_or_wrong_fields_is_about_as_much_work_as_a_plain_one(client: Any) -> None:
    service = client.app.state.service
    plain = calls(service, batch(lambda _: {}))
    assert calls(service, batch(lambda _: {"metadata": "x"})) < 1.1 * plain
    assert calls(service, batch(lambda number: {"source": 7} if number == 500 else {})) < 1.5 * plain


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


@pytest.mark.slow
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


def millions() -> bytes:
    return b",".join(b'"%d":1' % number for number in range(1_000_000))


MANY: dict[str, tuple[str, Callable[[], bytes]]] = {  # the bodies are made on demand: they are large
    "fields of an event": ("/v1/events", lambda: b'{"event_name":"call","external_customer_id":"cust",%b}' % millions()),
    "fields of an event in a batch": ("/v1/events/bulk", lambda: b'{"events":[{"event_name":"call","external_customer_id":"cust",%b}]}' % millions()),
    "fields of a batch": ("/v1/events/bulk", lambda: b'{"events":[{"event_name":"call","external_customer_id":"cust"}],%b}' % millions()),
    "empty events": ("/v1/events/bulk", lambda: b'{"events":[%b]}' % b",".join([b"{}"] * 4_000_000)),
    "events with a brace": ("/v1/events/bulk", lambda: b'{"events":[%b]}' % b",".join([b'{"x":{}}'] * 400_000)),
    "filters of a meter": ("/v1/meters", lambda: b'{"filters":[%b]}' % b",".join([b"{}"] * 150_000)),
    "filters of a wrong type": ("/v1/meters", lambda: b'{"filters":[%b,1]}' % b",".join([b"{}"] * 150_000)),
    "names to group by": ("/v1/events/analytics", lambda: b'{"group_by":[%b]}' % b",".join([b'"?"'] * 200_000)),
    "a query of 2 MB": ("/v1/events/query", lambda: b'{"source":"%b"}' % (b"x" * 2_000_000)),
}  # fmt: skip


@pytest.mark.slow
@table("name", MANY)
def test_millions_of_names_or_items_take_little_memory(tmp_path: Path, name: str) -> None:
    path, make_body = MANY[name]
    body = make_body()
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
