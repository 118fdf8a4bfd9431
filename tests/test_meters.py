"""Meters and features: creating, listing and archiving them; the mock, the OpenAPI document and the SDK with them."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

import eventstore
from eventstore import ApiKey
from eventstore_extras.analytics import OPERATIONS
from eventstore_extras.mock import MockServer, running_server
from helpers import (
    KEY,
    KEYS,
    NOW,
    STAGING_KEY,
    Json,
    Live,
    analytics,
    at,
    counts,
    event,
    faulty_fields,
    feature_of,
    listed,
    make,
    make_feature,
    make_meter,
    meter_of,
    metered_usage,
    metering,
    refused,
    serving,
    store,
    table,
)
from meter_helpers import NOW_TEXT, SECOND_US, ULID, found, names


@pytest.fixture(scope="module")
def operations() -> Any:
    return OPERATIONS


def without(body: dict[str, Any], field: str) -> dict[str, Any]:
    """Return the body without a field of it, or of an object in it: aggregation.type."""
    outer, _, inner = field.partition(".")
    if inner:
        return body | {outer: without(body[outer], inner)}
    return {name: value for name, value in body.items() if name != field}


# ---------------------------------------------------------------------------------------------- Creating a meter


def test_a_meter_has_every_key(client: httpx.Client) -> None:
    sent = {"name": "Tokens", "event_name": " llm.call\n", "reset_usage": "BILLING_PERIOD",
            "aggregation": {"type": "SUM", "field": "tokens"}, "filters": [{"key": "model", "values": ["gpt-4o"]}]}  # fmt: skip
    meter = make(client, "meters", sent)
    assert re.fullmatch(f"meter_{ULID}", meter["id"])
    assert meter == {
        "id": meter["id"], "name": "Tokens", "tenant_id": "", "event_name": "llm.call",
        "aggregation": {"type": "SUM", "field": "tokens", "expression": None, "multiplier": None, "bucket_size": None, "group_by": None},
        "filters": [{"key": "model", "values": ["gpt-4o"]}], "reset_usage": "BILLING_PERIOD",
        "created_at": NOW_TEXT, "updated_at": NOW_TEXT, "status": "published"}  # fmt: skip
    assert found(client, f"meters/{meter['id']}") == meter
    assert listed(client) == [meter]


def test_filters_and_the_field_of_a_count_are_optional(client: httpx.Client) -> None:
    sent = {"name": "Calls", "event_name": "call", "aggregation": {"type": "COUNT"}, "reset_usage": "NEVER"}
    nothing_said = dict.fromkeys(("filters", "id", "status", "tenant_id"))
    no_field = dict.fromkeys(("field", "expression", "multiplier", "bucket_size", "group_by"))
    empty = dict.fromkeys(("field", "expression", "bucket_size", "group_by"), "")
    additions: list[Json] = [{}, nothing_said, {"filters": []}, {"aggregation": {"type": "COUNT"} | no_field},
                             {"aggregation": {"type": "COUNT"} | empty}, {"colour": "red"}]  # fmt: skip
    for more in additions:
        meter = make(client, "meters", sent | more)
        assert (meter["filters"], meter["status"], meter["reset_usage"]) == ([], "published", "NEVER")
        assert meter["aggregation"] == {"type": "COUNT"} | no_field


def test_the_server_makes_the_id_and_names_may_repeat(client: httpx.Client) -> None:
    first, second = (make(client, "meters", meter_of() | {"id": "mine"}) for _ in range(2))
    assert "mine" not in (first["id"], second["id"])
    assert first["id"] < second["id"]
    assert len(listed(client)) == 2


GOOD_METERS = {  # aggregation in the request, in the answer
    "any case of the type": ({"type": "sum", "field": "n"}, {"type": "SUM", "field": "n"}),
    "average": ({"type": "AVG", "field": "n"}, {"type": "AVG", "field": "n"}),
    "unique": ({"type": "COUNT_UNIQUE", "field": "n"}, {"type": "COUNT_UNIQUE", "field": "n"}),
    "latest": ({"type": "LATEST", "field": "n"}, {"type": "LATEST", "field": "n"}),
    "weighted": ({"type": "WEIGHTED_SUM", "field": "n"}, {"type": "WEIGHTED_SUM", "field": "n"}),
    "a literal field": ({"type": "SUM", "field": 'a.b"$ größe'}, {"field": 'a.b"$ größe'}),
    "a field of a count": ({"type": "COUNT", "field": "n"}, {"type": "COUNT"}),
    "no expression": ({"type": "SUM", "field": "n", "expression": ""}, {"expression": None}),
    "buckets": ({"type": "MAX", "field": "n", "bucket_size": "15MIN"}, {"bucket_size": "15MIN", "group_by": None}),
    "a sum's buckets": ({"type": "SUM", "field": "n", "bucket_size": "MONTH"}, {"bucket_size": "MONTH"}),
    "groups": ({"type": "MAX", "field": "n", "bucket_size": "DAY", "group_by": "a.b"}, {"bucket_size": "DAY", "group_by": "a.b"}),
    "groups without buckets": ({"type": "max", "field": "n", "group_by": "a.b"}, {"type": "MAX", "bucket_size": None, "group_by": "a.b"}),
    "groups with an empty bucket": ({"type": "MAX", "field": "n", "bucket_size": "", "group_by": "a"}, {"bucket_size": None, "group_by": "a"}),
    "no buckets": ({"type": "AVG", "field": "n", "bucket_size": "", "group_by": None}, {"bucket_size": None, "group_by": None}),
}  # fmt: skip


@table(("sent", "answered"), GOOD_METERS.values(), ids=GOOD_METERS)
def test_an_aggregation_is_answered_in_its_normal_form(
    shared: httpx.Client, sent: dict[str, Any], answered: dict[str, Any]
) -> None:
    meter = make(shared, "meters", meter_of() | {"aggregation": sent})
    assert meter["aggregation"].items() >= answered.items()
    assert meter["aggregation"].keys() == {"type", "field", "expression", "multiplier", "bucket_size", "group_by"}


MULTIPLIERS = {"2.5": "2.5", 2.5: "2.5", "+25e-1": "2.5", 1000: "1000", "0.10": "0.1", "007": "7", "5.": "5", ".5": "0.5", 3.0: "3",
               "1e-9": "0.000000001", "1e21": "1" + "0" * 21, "12345678901234567890": "12345678901234600000", "0.1234567890123456": "0.123456789012346",
               9007199254740991: "9007199254740991", 0.30000000000000004: "0.3"}  # fmt: skip


@table(("sent", "answered"), MULTIPLIERS.items(), ids=str)
@table("kind", ["SUM_WITH_MULTIPLIER", "SUM"])
def test_a_multiplier_is_answered_as_a_decimal_string_with_every_type(
    shared: httpx.Client, sent: Any, answered: str, kind: str
) -> None:
    assert make_meter(shared, kind, multiplier=sent)["aggregation"]["multiplier"] == answered


def test_blanks_around_the_keys_and_values_of_filters_are_removed(client: httpx.Client) -> None:
    store(client, *[event(timestamp=at(-1), properties={"model": value}) for value in ("a", "b c", " a ", "d")])
    sent = [{"key": " model\n", "values": ["\ta ", "b c", "a"]}, {"key": "model", "values": [" a", "b c "]}]
    filters = [{"key": "model", "values": ["a", "b c", "a"]}, {"key": "model", "values": ["a", "b c"]}]
    for meter in (make(client, "meters", meter_of() | {"filters": sent}),
                  make_feature(client, meter=meter_of() | {"filters": sent})["meter"]):  # fmt: skip
        assert meter["filters"] == filters
        assert metered_usage(client, meter["id"])["value"] == 2


RESETS = {"BILLING_PERIOD": "BILLING_PERIOD", "NEVER": "NEVER", "Periodic": "BILLING_PERIOD", "periodic": "BILLING_PERIOD",
          "PERIODIC": "BILLING_PERIOD", "Cumulative": "NEVER", "cumulative": "NEVER", "CUMULATIVE": "NEVER"}  # fmt: skip


@table(("sent", "answered"), RESETS.items(), ids=str)
def test_reset_usage_accepts_the_words_of_the_documents(shared: httpx.Client, sent: str, answered: str) -> None:
    assert make_meter(shared, reset_usage=sent)["reset_usage"] == answered
    inline = make_feature(shared, sent, lookup_key=f"reset {sent}", meter=meter_of(reset_usage=sent))["meter"]
    assert inline["reset_usage"] == answered


@table("field", ["name", "event_name"])
@table("letter", ["x", "é"])
def test_names_may_have_255_characters(shared: httpx.Client, field: str, letter: str) -> None:
    assert make_meter(shared, **{field: letter * 255})[field] == letter * 255
    too_long: Json = {field: letter * 256}
    assert faulty_fields(shared.post("/v1/meters", json=meter_of(**too_long))) == [field]


BAD_MULTIPLIERS: list[Any] = ["0", 0, "-1", -0.5, "x", "NaN", "Infinity", "1e999", " 2", "1_0", True, [], "0x2"]


def one_bad(**aggregation: Any) -> dict[str, Any]:
    return {"aggregation": aggregation}


BAD_METERS = {  # -> fields that replace those of a good meter, the faulty field
    "no name": ({"name": None}, "name"),
    "an empty name": ({"name": ""}, "name"),
    "a name that is a number": ({"name": 5}, "name"),
    "no event name": ({"event_name": None}, "event_name"),
    "an empty event name": ({"event_name": ""}, "event_name"),
    "a blank event name": ({"event_name": " \n"}, "event_name"),
    "an event name that is a list": ({"event_name": ["call"]}, "event_name"),
    "no aggregation": ({"aggregation": None}, "aggregation"),
    "an aggregation in a word": ({"aggregation": "COUNT"}, "aggregation"),
    "an aggregation in a list": ({"aggregation": [{"type": "COUNT"}]}, "aggregation"),
    "no type": (one_bad(field="n"), "aggregation.type"),
    "an empty type": (one_bad(type=""), "aggregation.type"),
    "an unknown type": (one_bad(type="MEDIAN", field="n"), "aggregation.type"),
    "a type that is a number": (one_bad(type=5, field="n"), "aggregation.type"),
    **{f"{kind} without a field": (one_bad(type=kind, field=field, **more), "aggregation.field")
       for kind, field, more in (("SUM", None, {}), ("AVG", "", {}), ("MAX", None, {}), ("COUNT_UNIQUE", None, {}), ("LATEST", "", {}),
                                 ("WEIGHTED_SUM", None, {}), ("SUM_WITH_MULTIPLIER", None, {"multiplier": 2}), ("sum", None, {}))},
    "a field that is a number": (one_bad(type="SUM", field=5), "aggregation.field"),
    "an expression": (one_bad(type="SUM", field="n", expression="a * b"), "aggregation.expression"),
    "an expression alone": (one_bad(type="COUNT", expression="1"), "aggregation.expression"),
    "no multiplier": (one_bad(type="SUM_WITH_MULTIPLIER", field="n"), "aggregation.multiplier"),
    **{f"multiplier {bad!r}": (one_bad(type="SUM_WITH_MULTIPLIER", field="n", multiplier=bad), "aggregation.multiplier")
       for bad in BAD_MULTIPLIERS},
    "a multiplier of no number without effect": (one_bad(type="COUNT", multiplier="x"), "aggregation.multiplier"),
    "an unknown bucket": (one_bad(type="MAX", field="n", bucket_size="2HOUR"), "aggregation.bucket_size"),
    "a bucket in lower case": (one_bad(type="MAX", field="n", bucket_size="day"), "aggregation.bucket_size"),
    "a bucket that is a number": (one_bad(type="MAX", field="n", bucket_size=15), "aggregation.bucket_size"),
    **{f"a bucket of {kind}": (one_bad(type=kind, field="n", bucket_size="DAY", **more), "aggregation.bucket_size")
       for kind, more in (("COUNT", {}), ("AVG", {}), ("LATEST", {}), ("COUNT_UNIQUE", {}), ("WEIGHTED_SUM", {}),
                          ("SUM_WITH_MULTIPLIER", {"multiplier": 2}))},
    **{f"groups of {kind}": (one_bad(type=kind, field="n", group_by="a"), "aggregation.group_by") for kind in ("SUM", "AVG", "LATEST")},
    "a group with properties. and no bucket": (one_bad(type="MAX", field="n", group_by="properties.a"), "aggregation.group_by"),
    "groups of a sum": (one_bad(type="SUM", field="n", bucket_size="DAY", group_by="a"), "aggregation.group_by"),
    "a group with properties.": (one_bad(type="MAX", field="n", bucket_size="DAY", group_by="properties.a"), "aggregation.group_by"),
    "groups of a count": (one_bad(type="COUNT", group_by="a"), "aggregation.group_by"),
    "a group in a list": (one_bad(type="MAX", field="n", bucket_size="DAY", group_by=["a"]), "aggregation.group_by"),
    "filters in an object": ({"filters": {"a": ["x"]}}, "filters"),
    "filters in a word": ({"filters": "a"}, "filters"),
    "a filter in a word": ({"filters": ["a"]}, "filters[0]"),
    "a filter without a key": ({"filters": [{"values": ["x"]}]}, "filters[0].key"),
    "a filter with an empty key": ({"filters": [{"key": "", "values": ["x"]}]}, "filters[0].key"),
    "a filter with a blank key": ({"filters": [{"key": " \t", "values": ["x"]}]}, "filters[0].key"),
    "a key that is a number": ({"filters": [{"key": 5, "values": ["x"]}]}, "filters[0].key"),
    "no values": ({"filters": [{"key": "a", "values": ["x"]}, {"key": "b"}]}, "filters[1].values"),
    "empty values": ({"filters": [{"key": "a", "values": ["x"]}, {"key": "b", "values": []}]}, "filters[1].values"),
    "a value without a list": ({"filters": [{"key": "b", "values": "x"}]}, "filters[0].values"),
    "a value that is a number": ({"filters": [{"key": "b", "values": [5]}]}, "filters[0].values"),
    "no reset": ({"reset_usage": None}, "reset_usage"),
    "an empty reset": ({"reset_usage": ""}, "reset_usage"),
    "an unknown reset": ({"reset_usage": "DAILY"}, "reset_usage"),
    "a reset that is a number": ({"reset_usage": 5}, "reset_usage"),
}  # fmt: skip


@table(("bad", "field"), BAD_METERS.values(), ids=BAD_METERS)
@table("inline", [False, True], ids=["", "inline"])
def test_a_bad_meter_is_a_400_that_names_the_field(
    shared: httpx.Client, bad: dict[str, Any], field: str, inline: bool
) -> None:
    before = len(listed(shared))
    if inline:
        response = shared.post("/v1/features", json=feature_of("Bad", meter=meter_of() | bad))
        (faulty,) = faulty_fields(response)
        assert faulty.startswith(f"meter.{field}")
    else:
        response = shared.post("/v1/meters", json=meter_of() | bad)
        (faulty,) = faulty_fields(response)
        assert faulty.startswith(field)  # filters[0].values, or filters[0].values[0]
    assert faulty in response.json()["message"]
    assert len(listed(shared)) == before


@table("missing", ["name", "event_name", "aggregation", "aggregation.type", "reset_usage"])
def test_required_fields_of_a_meter(shared: httpx.Client, missing: str) -> None:
    response = shared.post("/v1/meters", json=without(meter_of(), missing))
    (fault,) = refused(response)["errors"]
    assert (fault["index"], fault["field"], fault["code"]) == (0, missing, "required")


def test_one_answer_names_all_faults_of_a_meter(shared: httpx.Client) -> None:
    sent = {
        "name": "",
        "event_name": " ",
        "aggregation": {"type": "MAX", "bucket_size": "YEAR"},
        "filters": [{"key": "", "values": []}],
    }
    expected = [
        "aggregation.bucket_size",
        "aggregation.field",
        "event_name",
        "filters[0].key",
        "filters[0].values",
        "name",
        "reset_usage",
    ]
    assert faulty_fields(shared.post("/v1/meters", json=sent)) == expected


def test_an_expression_is_a_400_with_the_reason(shared: httpx.Client) -> None:
    sent = meter_of() | one_bad(type="SUM", expression="tokens * 2")
    response = shared.post("/v1/meters", json=sent)
    assert "aggregation.expression" in faulty_fields(response)
    assert "expression" in response.json()["message"]


NO_OBJECTS = ["", "[]", "null", "5", "{", '{"name": "\\ud83d"}', "[" * 5000, '{"name": "\xff"}']


@table("content", NO_OBJECTS)
@table("path", ["meters", "features", "features/search"])
def test_a_body_other_than_a_json_object_is_a_400(shared: httpx.Client, path: str, content: str) -> None:
    refused(shared.post(f"/v1/{path}", content=content.encode("latin-1")))


# ---------------------------------------------------------------------------------------------- Listing meters


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a client with the meters a to e, created at seconds 0, 10, 10, 20, 30; d is archived at 40.

    b and d are never reset.
    """
    clock = Mock(return_value=NOW)
    with metering(tmp_path_factory.mktemp("five"), clock=clock) as client:
        of_staging = meter_of(name="s")
        assert client.post("/v1/meters", json=of_staging, headers={"x-api-key": STAGING_KEY}).status_code == 201
        made = {}
        for name, event_name, second in (("a", "x", 0), ("b", "z", 10), ("c", "y", 10), ("d", "x", 20), ("e", "z", 30)):
            clock.return_value = NOW + second * SECOND_US
            reset_usage = "NEVER" if name in "bd" else "BILLING_PERIOD"
            made[name] = make_meter(client, name=name, event_name=event_name, reset_usage=reset_usage)
        clock.return_value = NOW + 40 * SECOND_US
        assert client.delete(f"/v1/meters/{made['d']['id']}").status_code == 200
        yield client, made


METER_LISTS = {  # query -> names
    "all": ({}, "edcba"),
    "nothing said": (dict.fromkeys(("limit", "offset", "status", "sort", "order", "start_time", "end_time", "event_name", "meter_ids"), ""), "edcba"),
    "ascending": ({"order": "asc"}, "abcde"),
    "descending": ({"order": "desc", "sort": "created_at"}, "edcba"),
    "by change": ({"sort": "updated_at"}, "decba"),
    "by name": ({"sort": "name", "order": "asc"}, "abcde"),
    "by id": ({"sort": "id"}, "edcba"),
    "by id, ascending": ({"sort": "id", "order": "asc"}, "abcde"),
    "by status": ({"sort": "status", "order": "asc"}, "dabce"),
    "by status, descending": ({"sort": "status"}, "ecbad"),
    "by reset": ({"sort": "reset_usage", "order": "asc"}, "acebd"),
    "by reset, descending": ({"sort": "reset_usage"}, "dbeca"),
    "by event name": ({"sort": "event_name", "order": "asc"}, "adcbe"),
    "by event name, descending": ({"sort": "event_name"}, "ebcda"),
    "published": ({"status": "published"}, "ecba"),
    "archived": ({"status": "archived"}, "d"),
    "deleted": ({"status": "deleted"}, ""),
    "inactive": ({"status": "inactive"}, ""),
    "from": ({"start_time": at(10 * SECOND_US)}, "edcb"),
    "after": ({"start_time": at(10 * SECOND_US + 1)}, "ed"),
    "until": ({"end_time": at(10 * SECOND_US)}, "cba"),
    "before": ({"end_time": at(10 * SECOND_US - 1)}, "a"),
    "between": ({"start_time": at(10 * SECOND_US), "end_time": at(20 * SECOND_US)}, "dcb"),
    "a moment": ({"start_time": at(20 * SECOND_US), "end_time": at(20 * SECOND_US)}, "d"),
    "of an event name": ({"event_name": "z"}, "eb"),
    "of an event name with spaces around": ({"event_name": " z "}, "eb"),
    "of an event name in another case": ({"event_name": "Z"}, ""),
    "the first page": ({"limit": 2}, "ed"),
    "the next page": ({"limit": 2, "offset": 2}, "cb"),
    "the last page": ({"limit": 2, "offset": 4}, "a"),
    "after the last": ({"limit": 2, "offset": 6}, ""),
    "several": ({"event_name": "x", "status": "archived", "order": "asc"}, "d"),
    "unknown parameters": ({"colour": "red"}, "edcba"),
}  # fmt: skip


@table(("query", "expected"), METER_LISTS.values(), ids=METER_LISTS)
def test_lists_of_meters_are_filtered_and_sorted(five: Any, query: dict[str, Any], expected: str) -> None:
    client, _ = five
    response = client.get("/v1/meters", params=query)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["items", "pagination"]
    assert names(answer["items"]) == expected
    limit, offset = int(query.get("limit") or 50), int(query.get("offset") or 0)
    all_of_them = 5 if "limit" in query else len(expected)
    assert answer["pagination"] == {"total": all_of_them, "limit": limit, "offset": offset + limit}


@table("separate", [True, False], ids=["repeated", "with commas"])
def test_meter_ids_may_be_repeated_or_separated_by_commas(five: Any, separate: bool) -> None:
    client, made = five
    wanted = [made["a"]["id"], made["d"]["id"], "meter_unknown"]
    parameters = [("meter_ids", one) for one in wanted] if separate else {"meter_ids": ",".join(wanted)}
    answer = client.get("/v1/meters", params=parameters).json()
    assert (names(answer["items"]), answer["pagination"]["total"]) == ("da", 2)
    assert client.get("/v1/meters", params={"meter_ids": "meter_unknown"}).json()["items"] == []


def test_meters_of_the_same_time_are_sorted_by_id_in_both_directions(client: httpx.Client) -> None:
    made = [make_meter(client, name=name)["id"] for name in "abcd"]
    assert made == sorted(made)
    for order, expected in (("asc", made), ("desc", made[::-1])):
        for sort in ("created_at", "updated_at", "event_name"):
            assert [one["id"] for one in listed(client, sort=sort, order=order)] == expected


@table(("limit", "given"), [(0, 50), (1, 1), (1000, 1000), ("", 50)])
def test_the_limit_is_1_to_1000_and_0_means_50(five: Any, limit: Any, given: int) -> None:
    client, _ = five
    answer = client.get("/v1/meters", params={"limit": limit}).json()
    assert (len(answer["items"]), answer["pagination"]) == (
        min(5, given),
        {"total": 5, "limit": given, "offset": given},
    )


BAD_LISTS = {
    "limit": ["-1", "1001", "x", "1.5"],
    "offset": ["-1", "x"],
    "status": ["PUBLISHED", "x"],
    "sort": ["lookup_key", "type", "NAME", "values", "archived_at_us", "name,id", "tenant_id"],
    "order": ["ASC", "up"],
    "start_time": ["yesterday", "2025-01-01"],
    "end_time": ["5"],
}


@table(
    ("path", "field", "value"),
    [
        (path, field, value)
        for field, values in BAD_LISTS.items()
        for value in values
        for path in ("meters", "features")
        if (path, field) != ("features", "sort")  # in the body of a search, sort is an array
    ],
)
def test_a_bad_parameter_of_a_list_is_a_400_that_names_it(five: Any, path: str, field: str, value: str) -> None:
    client, _ = five
    assert faulty_fields(client.get(f"/v1/{path}", params={field: value})) == [field]


@table("path", ["meters", "features"])
def test_an_end_before_the_start_of_a_list_is_a_400(five: Any, path: str) -> None:
    client, _ = five
    refused(client.get(f"/v1/{path}", params={"start_time": at(1), "end_time": at()}), part="before")


# ---------------------------------------------------------------------------------------------- Archiving meters

METHODS = {
    "disable": ("POST", "/disable", "Meter disabled successfully"),
    "DELETE": ("DELETE", "", "Meter deleted successfully"),
}
both_ways = table(("method", "suffix", "message"), METHODS.values(), ids=METHODS)


@both_ways
def test_an_archived_meter_stays_archived(
    timed: httpx.Client, clock: Any, method: str, suffix: str, message: str
) -> None:
    meter = make_meter(timed)
    clock.return_value += 1000
    for _ in range(2):
        response = timed.request(method, f"/v1/meters/{meter['id']}{suffix}")
        assert (response.status_code, response.json()) == (200, {"message": message})
    archived = found(timed, f"meters/{meter['id']}")
    assert archived == meter | {"status": "archived", "updated_at": "2025-10-15T11:38:47.963Z"}
    assert (listed(timed, status="published"), listed(timed)) == ([], [archived])


@table("meter_id", ["meter_unknown", "a/b", "x" * 300, "%00", "' OR 1=1 --", "search"])
def test_an_unknown_meter_is_a_404(shared: httpx.Client, meter_id: str) -> None:
    for method, suffix in (("GET", ""), ("POST", "/disable"), ("DELETE", "")):
        response = shared.request(
            method, httpx.URL(f"http://testserver/v1/meters/{meter_id.replace('/', '%2F')}{suffix}")
        )
        refused(response, 404, "not_found")


@table(("method", "path"), [("PUT", "/v1/meters/{id}"), ("PATCH", "/v1/meters/{id}"), ("PATCH", "/v1/features/{id}"), ("DELETE", "/v1/meters"),
                            ("PUT", "/v1/features"), ("GET", "/v1/events/analytics"), ("GET", "/v1/events/usage/meter")])  # fmt: skip
def test_an_unsupported_method_is_a_405_that_lists_the_others(client: httpx.Client, method: str, path: str) -> None:
    feature = make_feature(client)
    response = client.request(
        method, path.replace("{id}", feature["meter_id"] if "meters" in path else feature["id"]), json={}
    )
    if path.startswith("/v1/events/") and response.status_code == 404:
        return  # GET /v1/events/{id} serves these paths
    refused(response, 405, "method_not_allowed")
    assert response.headers["Allow"]
    assert method not in response.headers["Allow"].split(", ")


@table("path", ["/v1/meters/search", "/v1/features/feat_1/clone", "/v1/features/clone"])
def test_a_post_to_an_unsupported_route_changes_nothing(client: httpx.Client, path: str) -> None:
    response = client.post(path, json=meter_of())
    assert response.status_code in (404, 405)
    refused(response, response.status_code, {404: "not_found", 405: "method_not_allowed"}[response.status_code])
    assert (listed(client), listed(client, "features")) == ([], [])


# ---------------------------------------------------------------------------------------------- Environments, keys, restarts


def test_environments_do_not_see_each_others_meters_and_features(client: httpx.Client) -> None:
    feature = make_feature(client)
    store(client, event())
    client.headers["x-api-key"] = STAGING_KEY
    assert (listed(client), listed(client, "features"), analytics(client)) == ([], [], [])
    meter_id, feature_id = feature["meter_id"], feature["id"]
    for method, path in (("GET", f"meters/{meter_id}"), ("DELETE", f"meters/{meter_id}"), ("POST", f"meters/{meter_id}/disable"),
                         ("GET", f"features/{feature_id}"), ("PUT", f"features/{feature_id}"), ("DELETE", f"features/{feature_id}")):  # fmt: skip
        body = {"name": "x"} if method == "PUT" else None
        refused(client.request(method, f"/v1/{path}", json=body), 404, "not_found")
    refused(client.post("/v1/events/usage/meter", json={"meter_id": meter_id}), 404, "not_found")
    assert analytics(client, feature_ids=[feature_id]) == []
    client.headers["x-api-key"] = KEY
    assert found(client, f"features/{feature_id}") == feature


def test_keys_of_the_same_environment_share_meters_and_features(tmp_path: Path) -> None:
    with metering(tmp_path, api_keys=(*KEYS, ApiKey.hashed("second"))) as client:
        feature = make_feature(client)
        client.headers["x-api-key"] = "second"
        assert found(client, f"features/{feature['id']}") == feature
        assert listed(client) == [feature["meter"]]
        refused(client.post("/v1/features", json=feature_of()), 409, "already_exists")


@table("path", ["meters", "features", "meters/x", "features/x", "events/analytics", "events/usage/meter"])
@table("key", [None, "unknown"])
def test_every_route_without_a_known_key_is_a_401(shared: httpx.Client, path: str, key: str | None) -> None:
    headers = {} if key is None else {"x-api-key": key}
    bare = httpx.Headers(headers)
    known, shared.headers = shared.headers, bare
    try:
        for method in ("GET", "POST"):
            refused(shared.request(method, f"/v1/{path}", json={} if method == "POST" else None), 401, "unauthorized")
    finally:
        shared.headers = known


def test_meters_and_features_survive_a_restart(tmp_path: Path) -> None:
    def everything(client: httpx.Client) -> list[Any]:
        return [listed(client), listed(client, "features"), analytics(client, expand=["meter", "feature"])]

    with metering(tmp_path) as client:
        store(client, event(timestamp=at(-1), properties={"n": 5}))
        make_feature(
            client,
            "A",
            reporting_unit={"unit_singular": "k", "unit_plural": "ks", "conversion_rate": 0.1},
            metadata={"a": "é"},
        )
        make_meter(client, "MAX", bucket_size="DAY", group_by="g", filters={"n": ["5"]}, reset_usage="NEVER")
        client.delete(f"/v1/features/{make_feature(client, 'B')['id']}")
        before = everything(client)
    assert [len(part) for part in before] == [3, 2, 2]
    with metering(tmp_path) as client:
        assert everything(client) == before
        refused(client.post("/v1/features", json=feature_of("A")), 409, "already_exists")
        assert make_meter(client) in listed(client)


def test_queries_after_the_answer_know_the_meter(client: httpx.Client) -> None:
    store(client, event(timestamp=at(-1)))
    for number in range(20):
        meter = make_meter(client)
        assert metered_usage(client, meter["id"])["value"] == 1
        assert len(analytics(client)) == number + 1


# ---------------------------------------------------------------------------------------------- The mock


@pytest.fixture(scope="module")
def mock() -> Iterator[Any]:
    with running_server(api_keys={"first": "development", "second": "staging"}, clock=lambda: NOW) as server:
        yield server


@pytest.fixture
def caller(mock: MockServer) -> Iterator[Any]:
    mock.reset()
    with httpx.Client(base_url=mock.url.removesuffix("/v1"), headers={"x-api-key": "first"}) as client:
        yield client


def test_mock_meters_are_dicts_oldest_first_including_archived_ones(mock: MockServer, caller: httpx.Client) -> None:
    made = [make_meter(caller, name=name) for name in "abc"]
    caller.delete(f"/v1/meters/{made[1]['id']}")
    assert names(mock.meters()) == "abc"
    assert mock.meters() == listed(caller, order="asc")
    assert caller.post("/v1/meters", json=meter_of(name="d"), headers={"x-api-key": "second"}).status_code == 201


def test_mock_meters_has_more_than_one_page(mock: MockServer, caller: httpx.Client) -> None:
    with closing(sqlite3.connect(mock._store.path)) as conn:
        make_meter(caller, name="a")
        columns = [row[1] for row in conn.execute("PRAGMA table_info(meters)")]
        kept = ", ".join("id || value" if column == "id" else column for column in columns)
        many = "WITH RECURSIVE numbers(value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM numbers WHERE value < 1500)"
        conn.execute(f"INSERT INTO meters SELECT * FROM ({many} SELECT {kept} FROM meters, numbers)")
        conn.commit()
    assert len(mock.meters()) == 1501


def test_reset_of_the_mock_deletes_meters_and_features_of_all_environments(
    mock: MockServer, caller: httpx.Client
) -> None:
    for key in ("first", "second"):
        assert caller.post("/v1/features", json=feature_of(), headers={"x-api-key": key}).status_code == 201
    mock.reset()
    assert (mock.meters(), listed(caller), listed(caller, "features")) == ([], [], [])
    assert make_feature(caller)["lookup_key"] == "calls"


FAULTS = {"a meter": ("POST", "/v1/meters", meter_of()), "meters": ("GET", "/v1/meters", None), "a feature": ("POST", "/v1/features", feature_of()),
          "a search": ("POST", "/v1/features/search", {}), "analytics": ("POST", "/v1/events/analytics", {}),
          "usage": ("POST", "/v1/events/usage/meter", {"meter_id": "m"}), "one": ("GET", "/v1/meters/meter_1", None),
          "disable": ("POST", "/v1/meters/meter_1/disable", None), "delete": ("DELETE", "/v1/features/feat_1", None)}  # fmt: skip


@table(("method", "path", "body"), FAULTS.values(), ids=FAULTS)
def test_faults_apply_to_the_routes_of_meters_and_features(
    mock: MockServer, caller: httpx.Client, method: str, path: str, body: Any
) -> None:
    mock.fail(method=method, path=path, status=503, retry_after_s=7)
    response = caller.request(method, path, json=body)
    refused(response, 503, "service_unavailable")
    assert (response.headers["Retry-After"], mock.faults(), mock.meters()) == ("7", [], [])
    assert caller.request(method, path, json=body).status_code in (200, 201, 404)


def test_the_pytest_fixture_lists_meters(flexprice: Any) -> None:
    with httpx.Client(base_url=flexprice.url, headers={"x-api-key": flexprice.api_key}) as client:
        assert client.post("/features", json=feature_of()).status_code == 201
    assert names(flexprice.meters()) == "calls"
    flexprice.reset()
    assert flexprice.meters() == []


# ---------------------------------------------------------------------------------------------- Routes, OpenAPI, log


def test_the_list_of_routes() -> None:
    served = {(operation.method, operation.public_path) for operation in OPERATIONS}
    assert served == {("POST", "/v1/meters"), ("GET", "/v1/meters"), ("GET", "/v1/meters/{id}"), ("POST", "/v1/meters/{id}/disable"),
                      ("DELETE", "/v1/meters/{id}"), ("POST", "/v1/features"), ("GET", "/v1/features"), ("POST", "/v1/features/search"),
                      ("GET", "/v1/features/{id}"), ("PUT", "/v1/features/{id}"), ("DELETE", "/v1/features/{id}"),
                      ("POST", "/v1/events/usage/meter"),
                      ("POST", "/v1/events/analytics")}  # fmt: skip


@table("path", ["/v1/customers", "/v1/wallets", "/v1/events/huggingface-inference", "/v1/meter-usage/query"])
def test_an_unknown_route_is_a_404_that_lists_the_routes(client: httpx.Client, path: str) -> None:
    response = client.post(path, json={})
    refused(response, 404, "not_found")
    message = response.json()["message"]
    assert "Events API only" not in message
    served = [*eventstore.OPERATIONS, *OPERATIONS]
    assert [one.public_path for one in served if one.public_path not in message] == []


def test_the_service_alone_serves_no_meters(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        refused(client.post("/v1/meters", json=meter_of()), 404, "not_found")
        assert counts(store(client, event())) == (1, 0)


def test_rate_limits_do_not_count_meters_features_or_analytics(tmp_path: Path) -> None:
    with metering(tmp_path, rate_limits={"/v1/events": 1, "/v1/events/bulk": 1}) as client:
        for number in range(3):
            answers = [client.post("/v1/meters", json=meter_of()), client.post("/v1/features", json=feature_of(f"{number}")),
                       client.post("/v1/events/analytics", json={}), client.post("/v1/features/search", json={})]  # fmt: skip
            assert [answer.status_code for answer in answers] == [201, 201, 200, 200]
            assert "x-ratelimit" not in str([answer.headers for answer in answers])
        assert client.post("/v1/events", json=event()).status_code == 202
        refused(client.post("/v1/events", json=event()), 429, "too_many_requests")


def test_a_server_process_serves_meters(live: Live) -> None:
    with live.client() as client:
        feature = make_feature(client, "Served")
        assert feature["meter"] in listed(client)


def test_a_bad_meter_is_logged_in_one_line_and_a_good_one_is_not_logged(
    client: httpx.Client, caplog: pytest.LogCaptureFixture
) -> None:
    make_feature(client)
    assert caplog.text == ""
    client.post("/v1/meters", json={})
    client.post("/v1/features", json=feature_of())
    assert [record.levelname for record in caplog.records] == ["WARNING", "WARNING"]
