"""Ignored fields and parameters: X-Ignored lists them, `--strict` refuses them. Field names may be in any case."""

from __future__ import annotations

import json
import logging
import re
import urllib.parse
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

import eventstore
from eventstore import Settings
from helpers import EVER, Json, event, ids, metering, page, refused, stores_nothing, table, usage

CALLS = {"event_name": "call", "aggregation_type": "COUNT"}
METER: Json = {"name": "calls", "event_name": "call", "aggregation": {"type": "COUNT"}, "reset_usage": "NEVER"}


@pytest.fixture(scope="module")
def api(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with metering(tmp_path_factory.mktemp("ignored")) as client:
        yield client


@pytest.fixture(scope="module")
def strict(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    with metering(tmp_path_factory.mktemp("strict"), strict=True) as client:
        yield client


def ignored(response: httpx.Response) -> list[str]:
    return [urllib.parse.unquote(name) for name in response.headers.get("x-ignored", "").split(", ") if name]


UNKNOWN: list[tuple[str, str, Json, list[str]]] = [
    ("POST", "/v1/events", event() | {"event_nam": "x", "metadata": {}}, ["event_nam", "metadata"]),
    ("POST", "/v1/events", event() | {"propertes": {}, "source": 5}, ["propertes"]),
    ("POST", "/v1/events", {"eventName": "call"}, ["eventName"]),
    ("POST", "/v1/events/bulk", {"events": [event(), event() | {"x": 1}, event() | {"y": 2}]}, ["x", "y"]),
    ("POST", "/v1/events/bulk", {"events": [event() | {"x": 1}, event() | {"source": 5, "y": 2}]}, ["x", "y"]),
    ("POST", "/v1/events/bulk", {"events": [event() | {"a b": 1}]}, ["a b"]),
    ("POST", "/v1/events/bulk", {"event": [], "events": [event() | {"x": 1}]}, ["event", "x"]),
    ("POST", "/v1/events/bulk", {"evnts": []}, ["evnts"]),
    ("POST", "/v1/events/query", {"page_sise": 3}, ["page_sise"]),
    ("POST", "/v1/events/query", {"page_sise": 3, "order": "up"}, ["page_sise"]),
    ("POST", "/v1/events/query?page_size=3", {}, ["page_size"]),
    ("GET", "/v1/events?event_nam=a&b=&b=&order=asc", {}, ["event_nam", "b"]),
    ("GET", "/v1/events?timezone=UTC&order=up", {}, ["timezone"]),
    ("GET", "/v1/events/monitoring?page_size=3", {}, ["page_size"]),
    ("GET", "/v1/events/lookup?id=none&customer_id=1", {}, ["customer_id"]),
    ("GET", "/v1/events/none?id=other", {}, ["id"]),
    ("GET", "/health?verbose=1", {}, ["verbose"]),
    ("POST", "/v1/events/usage", CALLS | {"windowSize": "DAY"}, ["windowSize"]),
    ("POST", "/v1/events/usage/meter", {"meter_id": "none", "group_by": []}, ["group_by"]),
    ("POST", "/v1/events/analytics", {"timezone": "UTC"}, ["timezone"]),
    ("POST", "/v1/meters", METER | {"aggregation": {"type": "COUNT", "typ": 1}}, ["aggregation.typ"]),
    ("POST", "/v1/meters", METER | {"filters": [{"key": "a", "values": ["b"], "op": "="}]}, ["filters[0].op"]),
    ("GET", "/v1/meters?name=x", {}, ["name"]),
    ("GET", "/v1/meters/none?expand=1", {}, ["expand"]),
    ("POST", "/v1/features", {"name": "a", "type": "boolean", "lookupKey": "k"}, ["lookupKey"]),
    ("POST", "/v1/features", {"name": "a", "type": "metered", "meter": METER | {"names": "x"}}, ["meter.names"]),
    ("POST", "/v1/features/search", {"sort": [{"field": "name", "dir": "asc"}]}, ["sort[0].dir"]),
    ("GET", "/v1/features?page=2", {}, ["page"]),
]  # fmt: skip


@table(("method", "path", "body", "names"), UNKNOWN)
def test_unknown_names_are_listed_whether_the_request_is_accepted_or_refused(
    api: httpx.Client, caplog: pytest.LogCaptureFixture, method: str, path: str, body: Json, names: list[str]
) -> None:
    with api_logging_again(api, caplog):
        response = api.request(method, path, json=body or None)
    assert ignored(response) == names, response.text
    request_name = f"{method} {path.partition('?')[0]}"
    for name in names:
        assert f'{request_name}: "{name}" is ignored, it is unknown' in caplog.text


def api_logging_again(client: Any, caplog: pytest.LogCaptureFixture) -> Any:
    """Forget which names were logged in this minute."""
    client.app.state.service._logged_minute = 0
    return caplog.at_level(logging.WARNING)


@table(("method", "path", "body", "names"), UNKNOWN)
def test_a_strict_server_refuses_what_another_one_ignores(
    strict: httpx.Client, method: str, path: str, body: Json, names: list[str]
) -> None:
    response = strict.request(method, path, json=body or None)
    if path.startswith("/health"):  # a load balancer may add parameters
        assert response.status_code == 200
        return
    found = {fault["field"]: fault["message"] for fault in refused(response)["errors"]}
    if "events" not in found:
        assert {*names} <= {*found}
    assert ignored(response) == names


NO_EFFECT: list[tuple[str, str, Json, list[str]]] = [
    ("POST", "/v1/events/query", {"iter_last_key": "1::a", "offset": 5}, ["offset"]),
    ("GET", "/v1/events?iter_first_key=1::a&offset=5", {}, ["offset"]),
    ("POST", "/v1/events/query", {"iter_last_key": "1::a", "offset": 0, "order": "asc"}, []),
    ("POST", "/v1/events/analytics", {"include_children": True, "breakdown_bucket": False}, ["include_children"]),
    ("POST", "/v1/events/usage", CALLS | {"timezone": "Asia/Kolkata"}, ["timezone"]),
    ("POST", "/v1/events/usage", CALLS | {"timezone": "Asia/Kolkata", "window_size": "DAY"}, []),
    ("POST", "/v1/events/usage", CALLS | {"timezone": "Mars/X", "window_size": "DAY"}, ["timezone"]),
    ("POST", "/v1/events/usage", CALLS | {"bucket_size": "DAY", "group_by": ["properties.a"]}, ["bucket_size", "group_by"]),
    ("POST", "/v1/events/usage", CALLS | {"aggregation_type": "max", "property_name": "n", "bucket_size": "DAY",
                                          "group_by": ["properties.a"], "window_size": "HOUR"}, ["window_size"]),
    ("POST", "/v1/events/usage", CALLS | {"window_size": "DAY", "billing_anchor": "2026-01-05T00:00:00Z"}, ["billing_anchor"]),
    ("POST", "/v1/events/usage", CALLS | {"window_size": "MONTH", "billing_anchor": "2026-01-05T00:00:00Z"}, []),
]  # fmt: skip


@table(("method", "path", "body", "names"), NO_EFFECT)
def test_known_names_without_effect_are_listed_as_well(
    api: httpx.Client, strict: httpx.Client, method: str, path: str, body: Json, names: list[str]
) -> None:
    assert ignored(api.request(method, path, json=body or None)) == names
    response = strict.request(method, path, json=body or None)
    if not names:
        assert response.status_code == 200, response.text
        return
    assert [fault["field"] for fault in refused(response)["errors"]] == names


def test_an_answer_to_known_names_has_no_x_ignored_header(api: httpx.Client) -> None:
    for response in (api.post("/v1/events", json=event()), api.get("/v1/events"), api.get("/"), api.get("/nowhere")):
        assert "x-ignored" not in response.headers


@table(("name", "meant"), [
    ("event_nam", "event_name"), ("eventName", "event_name"), ("EventName", "event_name"), ("event-name", "event_name"),
    ("externalCustomerId", "external_customer_id"), ("externalCustomerID", "external_customer_id"),
    ("customerId", "customer_id"), ("time_stamp", "timestamp"), ("metadata", ""), ("tokens", ""), ("", ""), ("\n", ""),
])  # fmt: skip
def test_a_name_close_to_a_known_one_gets_a_suggestion(strict: httpx.Client, name: str, meant: str) -> None:
    for path, body in (("/v1/events", event() | {name: 1}), ("/v1/events/bulk", {"events": [event() | {name: 1}]})):
        (fault,) = refused(strict.post(path, json=body))["errors"]
        assert re.findall(r"did you mean (\w*)\?", fault["message"]) == [meant] * bool(meant)
        assert fault["message"].startswith(f"{json.dumps(name)} is unknown: ")
        assert (fault["index"], fault["event_id"], fault["code"]) == (None, None, "invalid_format")


@table("path", ["/v1/events", "/v1/events/bulk"])
def test_a_missing_required_field_is_suggested_for_a_name_that_resembles_it(api: httpx.Client, path: str) -> None:
    bad = {"eventName": "call", "externalCustomerId": "cust", "other": 1}
    response = api.post(path, json={"events": [event(), bad]} if "bulk" in path else bad)
    refused(response, part='"eventName" is unknown: did you mean event_name?')
    refused(response, part='"externalCustomerId" is unknown: did you mean external_customer_id?')
    assert "other" not in response.json()["message"]


def test_a_strict_server_stores_nothing_of_a_batch_with_an_unknown_field(strict: httpx.Client) -> None:
    with stores_nothing(strict):
        response = strict.post("/v1/events/bulk", json={"events": [event("a"), event("b") | {"x": 1}]})
        refused(response, part='"x" is unknown')


def test_a_strict_server_does_not_log_as_ignored_what_it_refuses(
    strict: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    refused(strict.post("/v1/events", json=event("a") | {"refused_here": 1}))
    assert "refused_here" in caplog.text
    assert "is ignored" not in caplog.text


def test_the_flag_strict_sets_the_setting() -> None:
    assert eventstore.parse_arguments(["serve", "--strict"]).strict is True
    assert eventstore.parse_arguments(["serve"]).strict is Settings().strict is False


NASTY_NAMES = ["a\r\nSet-Cookie: x=1", "\x00", "\u202e\u2066", "é", "a, b", '"', "%0d%0a", " ", "😀", "\x85\x9b"]


@table("name", NASTY_NAMES)
def test_a_name_reaches_the_header_percent_encoded(
    api: httpx.Client, caplog: pytest.LogCaptureFixture, name: str
) -> None:
    query = urllib.parse.urlencode({name: 1})
    with api_logging_again(api, caplog):
        answers = [api.post("/v1/events", json=event() | {name: 1}), api.get(f"/v1/events?{query}"),
                   api.post("/v1/events/bulk", json={"events": [event() | {name: 1}]})]  # fmt: skip
    for answer in answers:
        assert answer.headers["x-ignored"] == urllib.parse.quote(name, safe="")
        assert "set-cookie" not in answer.headers
    assert all(record.getMessage().isprintable() for record in caplog.records)


@table("path", ["/v1/events", "/v1/events/bulk", "/v1/events/query", "/v1/events?"])
def test_the_header_lists_twenty_names_and_at_most_a_kilobyte(api: httpx.Client, path: str) -> None:
    def answer(names: dict[str, int]) -> str:
        body: Json = {"events": [event(str(number)) | {name: 1} for number, name in enumerate(names)]}
        if path == "/v1/events?":
            return str(api.get(path + urllib.parse.urlencode(names)).headers["x-ignored"])
        body = body if "bulk" in path else (event() if path == "/v1/events" else {}) | names
        return str(api.post(path, json=body).headers["x-ignored"])

    names = [f"x{number}" for number in range(100)]
    assert answer(dict.fromkeys(names[:20], 1)) == ", ".join(names[:20])
    assert answer(dict.fromkeys(names, 1)) == ", ".join([*names[:20], "..."])
    long = answer({f"{number}{'é' * 90}": 1 for number in range(5)})
    assert len(long) < 1100
    assert long.endswith(", ...")
    assert len(answer({"y" * 100_000 if path != "/v1/events?" else "y" * 10_000: 1})) < 1100


def test_each_answer_lists_only_the_names_of_its_own_request(api: httpx.Client) -> None:
    bodies: list[Json] = [{"events": [event() | {"x": 1}]}, {"events": [event()]}, {"events": [event() | {"y": 1}]}]
    assert [ignored(api.post("/v1/events/bulk", json=body)) for body in bodies * 2] == [["x"], [], ["y"]] * 2


def test_the_log_names_few_of_many_unknown_fields(api: httpx.Client, caplog: pytest.LogCaptureFixture) -> None:
    with api_logging_again(api, caplog):
        for number in range(50):
            assert api.post("/v1/events", json=event() | {f"z{number}": 1}).status_code == 202
    assert caplog.text.count(" is ignored") == 20


# ---------------------------------------------------------------------------------------------- names in another case


def test_field_names_of_an_event_may_be_in_any_case(client: httpx.Client) -> None:
    body = {"Event_Name": "call", "EXTERNAL_CUSTOMER_ID": "cust", "Event_ID": "a", "Source": "app", "cUSTOMER_ID": "c1",
            "Timestamp": "2025-10-15T11:00:00Z", "PROPERTIES": {"Event_Id": 1, "n": 2}}  # fmt: skip
    answers = [client.post("/v1/events", json=body), client.post("/v1/events/bulk", json={"events": [event("b"), body]}),
               client.post("/v1/events/bulk", json={"EVENTS": [body | {"Event_ID": "c"}]})]  # fmt: skip
    assert [(answer.status_code, ignored(answer)) for answer in answers] == [(202, [])] * 3
    stored = {each["id"]: each for each in page(client)["events"]}
    assert sorted(stored) == ["a", "b", "c"]
    assert stored["a"]["properties"] == stored["c"]["properties"] == {"Event_Id": 1, "n": 2}
    assert (stored["a"]["customer_id"], stored["a"]["source"]) == ("c1", "app")
    assert stored["a"]["timestamp"] == "2025-10-15T11:00:00Z"


@table("others", [{}, {"metadata": 1}, {"source": "app", "x": 1}, {"a b": 1}])
def test_a_name_in_another_case_is_found_beside_unknown_fields_of_other_events(
    client: httpx.Client, others: Json
) -> None:
    batch = [
        event("a") | others,
        event("b") | others,
        {k: v for k, v in event("c").items() if k != "event_id"} | {"Event_Id": "c"},
    ]
    assert client.post("/v1/events/bulk", json={"events": batch}).status_code == 202
    assert sorted(ids(client)) == ["a", "b", "c"]


@table(("members", "stored"), [
    ('"event_id": "a", "Event_Id": "b"', "b"), ('"Event_Id": "b", "event_id": "a"', "a"),
    ('"EVENT_ID": "b", "Event_Id": "a"', "a"), ('"event_id": "c", "Event_Id": "b", "event_id": "a"', "a"),
    (r'"\u0045vent_id": "a"', "a"), ('"event_\u0131d": "b", "event_id": "a"', "a"),
])  # fmt: skip
def test_the_last_of_several_spellings_of_a_name_counts(client: httpx.Client, members: str, stored: str) -> None:
    text = f'{{"event_name": "call", "external_customer_id": "cust", {members}}}'
    assert client.post("/v1/events", content=text.encode()).status_code == 202
    assert client.post("/v1/events/bulk", content=f'{{"events": [{text}, {text}]}}'.encode()).status_code == 202
    assert ids(client) == [stored]


def test_letters_fold_one_to_one_as_in_go(api: httpx.Client) -> None:
    # The long s is an s in another case; the sharp s is not "ss". The dotless i is another letter.
    assert ignored(api.post("/v1/events/query", json={"\u017fource": "app", "\u212aey": 1, "of\ufb00set": 1})) == [
        "\u212aey",
        "of\ufb00set",
    ]
    body = METER | {"aggregation": {"type": "COUNT", "expre\u00dfion": "x"}}
    assert ignored(api.post("/v1/meters", json=body)) == ["aggregation.expre\u00dfion"]


def test_field_names_of_other_requests_may_be_in_any_case(tmp_path: Path) -> None:
    with metering(tmp_path) as client:
        for number in range(3):
            client.post("/v1/events", json=event(f"{number}", source="app" if number else "web"))
        found = client.post("/v1/events/query", json={"Source": "app", "PAGE_SIZE": 1, "Order": "asc"})
        assert [each["id"] for each in found.json()["events"]] == ["1"]
        assert (found.json()["total_count"], ignored(found)) == (2, [])
        answer = client.post("/v1/events/usage", json={"Event_Name": "call", "AGGREGATION_TYPE": "count"} | EVER)
        assert answer.json()["value"] == usage(client, **EVER)["value"] == 3
        made = client.post("/v1/meters", json={"Name": "m", "EVENT_NAME": "call", "Reset_Usage": "NEVER",
                                               "Aggregation": {"Type": "SUM", "FIELD": "n"},
                                               "FILTERS": [{"Key": "a", "VALUES": ["b"]}]})  # fmt: skip
        assert (made.status_code, ignored(made)) == (201, []), made.text
        assert (made.json()["aggregation"]["field"], made.json()["filters"]) == ("n", [{"key": "a", "values": ["b"]}])
        items = client.post("/v1/events/analytics", json={"Group_By": ["source"]} | EVER).json()["items"]
        assert items == []
        (fault,) = refused(client.post("/v1/events/query", json={"ORDER": 5}))["errors"]
        assert (fault["field"], fault["code"]) == ("order", "invalid_type")


# ---------------------------------------------------------------------------------------------- "" in a body

EMPTY: list[tuple[str, Json, str]] = [
    ("/v1/events", event() | {"timestamp": ""}, "timestamp"),
    ("/v1/events/bulk", {"events": [event() | {"timestamp": ""}]}, "timestamp"),
    *[("/v1/events/query", {field: ""}, field) for field in ("start_time", "end_time", "sort", "order")],
    *[("/v1/events/usage", CALLS | {field: ""}, field) for field in ("start_time", "end_time", "billing_anchor")],
    ("/v1/events/usage", CALLS | {"multiplier": ""}, "multiplier"),
    ("/v1/events/usage", CALLS | {"aggregation_type": "SUM_WITH_MULTIPLIER", "multiplier": ""}, "multiplier"),
    *[("/v1/events/usage/meter", {"meter_id": "m", field: ""}, field) for field in ("start_time", "end_time", "billing_anchor")],
    *[("/v1/events/analytics", {field: ""}, field) for field in ("start_time", "end_time")],
    *[("/v1/features/search", {field: ""}, field) for field in ("start_time", "end_time", "order")],
    ("/v1/meters", METER | {"aggregation": {"type": "COUNT", "multiplier": ""}}, "aggregation.multiplier"),
    ("/v1/meters", METER | {"aggregation": {"type": "SUM_WITH_MULTIPLIER", "field": "n", "multiplier": ""}}, "aggregation.multiplier"),
]  # fmt: skip


@table(("path", "body", "field"), EMPTY)
def test_an_empty_time_order_or_number_is_refused(api: httpx.Client, path: str, body: Json, field: str) -> None:
    assert [fault["field"] for fault in refused(api.post(path, json=body))["errors"]] == [field]


@table(("path", "parameters"), [
    ("/v1/events", "start_time=&end_time=&sort=&order=&page_size=&offset=&count_total=&property_filters=&iter_last_key="),
    ("/v1/events/monitoring", "start_time=&end_time=&window_size=&source="),
    ("/v1/meters", "start_time=&end_time=&sort=&order=&limit=&offset=&status=&meter_ids="),
    ("/v1/features", "start_time=&end_time=&sort=&order=&limit=&offset=&status=&lookup_keys="),
])  # fmt: skip
def test_an_empty_parameter_in_a_url_is_absent(api: httpx.Client, path: str, parameters: str) -> None:
    empty, absent = api.get(f"{path}?{parameters}"), api.get(path)
    assert (empty.status_code, empty.json()) == (200, absent.json())


def test_other_empty_texts_in_a_body_are_absent(api: httpx.Client) -> None:
    for path, body in (
        ("/v1/events", event() | {"event_id": "", "customer_id": "", "source": ""}),
        ("/v1/events/query", {"event_name": "", "source": "", "iter_last_key": "", "iter_first_key": ""}),
        ("/v1/events/usage", CALLS | dict.fromkeys(("window_size", "bucket_size", "timezone", "customer_id"), "")),
        ("/v1/events/analytics", {"window_size": "", "external_customer_id": ""}),
        ("/v1/features/search", {"status": "", "lookup_key": "", "name_contains": ""}),
    ):
        response = api.post(path, json=body)
        assert response.status_code in (200, 202), response.text
        assert ignored(response) == []
