"""Features: creating, searching and deleting them, and the official SDK, which makes meters through them."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from threading import Barrier
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from eventstore_extras.analytics import OPERATIONS
from helpers import (
    KEY,
    NOW,
    STAGING_KEY,
    Json,
    Live,
    analytics,
    at,
    counts,
    database,
    event,
    faulty_fields,
    feature_of,
    listed,
    make,
    make_feature,
    make_meter,
    meter_of,
    metering,
    refuse_to_write,
    refused,
    store,
    table,
)
from meter_helpers import BAD_RATES, NOW_TEXT, SECOND_US, ULID, found, names


@pytest.fixture(scope="module")
def operations() -> Any:
    return OPERATIONS


# ---------------------------------------------------------------------------------------------- Creating a feature


def test_a_feature_has_every_key_and_its_meter(client: httpx.Client) -> None:
    sent = {"name": "Tokens", "type": "metered", "unit_singular": "token", "unit_plural": "tokens", "metadata": {"team": "core"},
            "description": "of all models", "meter": meter_of("SUM", name="Sum of tokens"),
            "reporting_unit": {"unit_singular": "thousand", "unit_plural": "thousands", "conversion_rate": 1000}}  # fmt: skip
    feature = make(client, "features", sent)
    assert re.fullmatch(f"feat_{ULID}", feature["id"])
    (meter,) = listed(client)
    assert meter.items() >= {"name": "Sum of tokens", "event_name": "call", "status": "published"}.items()
    assert feature == {
        "id": feature["id"], "name": "Tokens", "lookup_key": "tokens", "description": "of all models", "meter_id": meter["id"],
        "metadata": {"team": "core"}, "type": "metered", "unit_singular": "token", "unit_plural": "tokens",
        "reporting_unit": sent["reporting_unit"], "alert_settings": None, "group_id": None, "group": None,
        "environment_id": "development", "tenant_id": "", "status": "published", "created_at": NOW_TEXT, "updated_at": NOW_TEXT,
        "created_by": "", "updated_by": "", "meter": meter}  # fmt: skip
    assert found(client, f"features/{feature['id']}") == feature
    assert listed(client, "features") == client.post("/v1/features/search", json={}).json()["items"] == [feature]


NOTHING_SAID = {
    "absent": {},
    "null": dict.fromkeys(("lookup_key", "description", "unit_singular", "unit_plural", "reporting_unit", "metadata",
                           "meter_id", "alert_settings", "group_id")),
    "empty": dict.fromkeys(("lookup_key", "description", "unit_singular", "unit_plural", "meter_id", "group_id"), "") | {"metadata": {}},
    "ignored": {"alert_settings": {"alert_enabled": True}, "group_id": "group_1", "group": {"id": "g"}, "status": "archived", "id": "mine"},
}  # fmt: skip


@table("said", NOTHING_SAID.values(), ids=NOTHING_SAID)
def test_a_feature_needs_only_a_name_a_type_and_a_meter(client: httpx.Client, said: dict[str, Any]) -> None:
    feature = make_feature(client, meter=meter_of(), **said)
    expected: Json = {"lookup_key": "calls", "description": "", "metadata": {}, "reporting_unit": None, "alert_settings": None,
                "group_id": None, "group": None, "status": "published", "type": "metered"}  # fmt: skip
    assert feature.items() >= expected.items()
    assert (feature["unit_singular"] or "", feature["unit_plural"] or "") == ("", "")
    assert feature["id"] != "mine"


@table("kind", ["boolean", "static", "config"])
@table("meter", [{}, {"meter_id": "meter_unknown"}, {"meter": meter_of()}], ids=["", "a meter's id", "a meter"])
def test_only_a_metered_feature_has_a_meter(client: httpx.Client, kind: str, meter: dict[str, Any]) -> None:
    feature = make_feature(client, type=kind, **meter)
    assert (feature["type"], feature["meter_id"], feature["meter"]) == (kind, "", None)
    assert listed(client) == []
    assert listed(client, "features") == [feature]


def test_meter_id_wins_over_meter(client: httpx.Client) -> None:
    meter = make_meter(client)
    feature = make_feature(client, meter_id=meter["id"], meter=meter_of("SUM"))
    assert (feature["meter_id"], feature["meter"]) == (meter["id"], meter)
    assert listed(client) == [meter]


LOOKUP_KEYS = {"Tokens": "tokens", "API Calls (2024)": "api_calls_2024", "  x--y  ": "x_y", "A__B": "a_b", "Größe": "gr_e", "日本": "", "___": "",
               "9 to 5!": "9_to_5", "a.b/c": "a_b_c", "٣": "", "camelCase": "camelcase"}  # fmt: skip


@table(("name", "key"), LOOKUP_KEYS.items(), ids=str)
def test_a_lookup_key_is_taken_as_sent_or_made_from_the_name(client: httpx.Client, name: str, key: str) -> None:
    assert make_feature(client, name)["lookup_key"] == key
    assert make_feature(client, name, lookup_key="As-It Is!")["lookup_key"] == "As-It Is!"


@table("sent", [1000, 1000.0, "1000", "1e3", 0.5, "0.001", 3])
def test_a_conversion_rate_is_answered_as_a_number(shared: httpx.Client, sent: Any) -> None:
    unit = {"unit_singular": "thousand", "unit_plural": "thousands", "conversion_rate": sent}
    answered = make_feature(shared, f"rate {sent!r}", lookup_key=f"rate {sent!r}", reporting_unit=unit)[
        "reporting_unit"
    ]
    assert answered == unit | {"conversion_rate": float(sent)}
    assert not isinstance(answered["conversion_rate"], str)


def unit(**fields: Any) -> dict[str, Any]:
    return {"reporting_unit": {"unit_singular": "k", "unit_plural": "ks", "conversion_rate": 1000} | fields}


BAD_FEATURES = {  # -> fields of a feature, the faulty ones
    "no name": ({"name": None}, ["name"]),
    "an empty name": ({"name": ""}, ["name"]),
    "a long name": ({"name": "x" * 256, "lookup_key": "x"}, ["name"]),
    "a name that is a number": ({"name": 5}, ["name"]),
    "no type": ({"type": None}, ["type"]),
    "an unknown type": ({"type": "toggle"}, ["type"]),
    "a type in upper case": ({"type": "METERED"}, ["type"]),
    "no meter": ({"meter": None}, ["meter", "meter_id"]),
    "a bad meter of a boolean": ({"type": "boolean", "meter": {"name": ""}}, ["meter"]),
    "a bad meter of a static": ({"type": "static", "meter": meter_of() | {"event_name": " "}}, ["meter.event_name"]),
    "a bad meter of a config": ({"type": "config", "meter": meter_of() | {"reset_usage": "x"}}, ["meter.reset_usage"]),
    "a bad meter beside an id": ({"meter_id": "meter_1", "meter": meter_of("SUM", field="")}, ["meter.aggregation.field"]),
    "an empty meter beside an id": ({"meter_id": "meter_1", "meter": {}}, ["meter."]),
    "an empty meter id": ({"meter": None, "meter_id": ""}, ["meter", "meter_id"]),
    "a meter in a word": ({"meter": "meter_1"}, ["meter"]),
    "a meter id that is a number": ({"meter_id": 5}, ["meter_id"]),
    "a lookup key that is a number": ({"lookup_key": 5}, ["lookup_key"]),
    "a description in a list": ({"description": ["x"]}, ["description"]),
    "one unit": ({"unit_singular": "token"}, ["unit_plural", "unit_singular"]),
    "the other unit": ({"unit_plural": "tokens"}, ["unit_plural", "unit_singular"]),
    "a long unit": ({"unit_singular": "x" * 51, "unit_plural": "tokens"}, ["unit_singular"]),
    "a long plural": ({"unit_singular": "token", "unit_plural": "é" * 51}, ["unit_plural"]),
    "a long reporting unit": (unit(unit_singular="x" * 256), ["reporting_unit.unit_singular"]),
    "a long plural of a reporting unit": (unit(unit_plural="x" * 256), ["reporting_unit.unit_plural"]),
    "a unit that is a number": ({"unit_singular": 5, "unit_plural": "tokens"}, ["unit_singular"]),
    "an empty reporting unit": ({"reporting_unit": {}}, ["reporting_unit"]),
    "a reporting unit in a word": ({"reporting_unit": "k"}, ["reporting_unit"]),
    "a reporting unit without singular": (unit(unit_singular=""), ["reporting_unit"]),
    "a reporting unit without plural": (unit(unit_plural=None), ["reporting_unit"]),
    "a reporting unit without rate": (unit(conversion_rate=None), ["reporting_unit"]),
    **{f"rate {bad!r}": (unit(conversion_rate=bad), ["reporting_unit"]) for bad in BAD_RATES},
    "metadata in a list": ({"metadata": []}, ["metadata"]),
    "metadata with a number": ({"metadata": {"a": 5}}, ["metadata"]),
    "metadata with null": ({"metadata": {"a": None}}, ["metadata"]),
    "metadata with an object": ({"metadata": {"a": {}}}, ["metadata"]),
}  # fmt: skip


@pytest.mark.slow
@table(("bad", "fields"), BAD_FEATURES.values(), ids=BAD_FEATURES)
def test_a_bad_feature_is_a_400_that_names_the_field(
    shared: httpx.Client, bad: dict[str, Any], fields: list[Any]
) -> None:
    before = len(listed(shared)), len(listed(shared, "features"))
    faulty = faulty_fields(shared.post("/v1/features", json=feature_of() | bad))
    assert faulty
    assert all(one.startswith(tuple(fields)) for one in faulty)
    assert (len(listed(shared)), len(listed(shared, "features"))) == before


def test_one_answer_names_all_faults_of_a_feature_and_its_meter(shared: httpx.Client) -> None:
    sent = feature_of("", metadata=[], meter=meter_of("SUM", field="", name="", reset_usage="x"))
    expected = ["metadata", "meter.aggregation.field", "meter.name", "meter.reset_usage", "name"]
    assert faulty_fields(shared.post("/v1/features", json=sent)) == expected


def test_a_feature_with_an_unknown_meter_is_a_404_and_with_an_archived_one_a_400(client: httpx.Client) -> None:
    of_staging = client.post("/v1/meters", json=meter_of(), headers={"x-api-key": STAGING_KEY}).json()
    for unknown in ("meter_unknown", of_staging["id"]):
        refused(client.post("/v1/features", json=feature_of(meter_id=unknown)), 404, "not_found")
    archived = make_meter(client)["id"]
    client.delete(f"/v1/meters/{archived}")
    assert faulty_fields(client.post("/v1/features", json=feature_of(meter_id=archived))) == ["meter_id"]
    assert listed(client, "features") == []


# ---------------------------------------------------------------------------------------------- Lookup keys

TAKEN = {
    "by name": ({}, {}),
    "given": ({"lookup_key": "k"}, {"lookup_key": "k", "name": "Other"}),
    "given, from a name": ({"lookup_key": "calls", "name": "Other"}, {}),
    "a boolean": ({"type": "boolean"}, {}),
}


@table(("first", "second"), TAKEN.values(), ids=TAKEN)
def test_a_taken_lookup_key_is_a_409_and_nothing_is_stored(
    client: httpx.Client, first: dict[str, Any], second: dict[str, Any]
) -> None:
    made = make(client, "features", feature_of() | {"meter": meter_of()} | first)
    meters = listed(client)
    response = client.post("/v1/features", json=feature_of() | second)
    refused(response, 409, "already_exists", "lookup_key")
    assert f'"{made["lookup_key"]}"' in response.json()["message"]
    assert (listed(client, "features"), listed(client)) == ([made], meters)


def test_an_empty_lookup_key_is_never_taken(client: httpx.Client) -> None:
    assert [make_feature(client, "日本")["lookup_key"] for _ in range(3)] == ["", "", ""]
    assert len(listed(client)) == 3


def test_a_lookup_key_is_free_after_deletion_and_in_another_environment(client: httpx.Client) -> None:
    first = make_feature(client)
    response = client.post("/v1/features", json=feature_of(), headers={"x-api-key": STAGING_KEY})
    assert (response.status_code, response.json()["environment_id"]) == (201, "staging")
    client.delete(f"/v1/features/{first['id']}")
    second = make_feature(client)
    assert [one["id"] for one in listed(client, "features")] == [second["id"], first["id"]]
    refused(client.post("/v1/features", json=feature_of()), 409, "already_exists")


def test_one_of_several_simultaneous_features_gets_the_lookup_key(client: httpx.Client) -> None:
    """Each request has a connection and a thread, and all are sent at the same moment."""
    callers = 6
    with ThreadPoolExecutor(callers) as pool:
        for turn in range(10):
            start = Barrier(callers)

            def send(number: int, turn: int = turn, start: Barrier = start) -> int:
                start.wait()
                body = feature_of(f"turn {turn}", meter=meter_of(name=f"{turn} {number}"))
                return client.post("/v1/features", json=body).status_code

            assert sorted(pool.map(send, range(callers))) == [201] + [409] * (callers - 1)
            assert (len(listed(client, "features")), len(listed(client))) == (turn + 1, turn + 1)


@table("into", ["meters", "features"])
def test_a_failed_commit_of_a_feature_is_a_500_and_stores_no_meter(
    client: httpx.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture, into: str
) -> None:
    refuse_to_write(tmp_path, "true", into)
    response = client.post("/v1/features", json=feature_of())
    refused(response, 500, "database_error")
    assert "full" in caplog.text
    assert "full" not in response.text
    assert (listed(client), listed(client, "features")) == ([], [])
    assert counts(store(client, event())) == (1, 0)
    with database(tmp_path) as conn:
        conn.execute("DROP TRIGGER full")
    assert make_feature(client)["meter"] in listed(client)


# ---------------------------------------------------------------------------------------------- Searching features


@pytest.fixture(scope="module")
def six(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a client with the features A to F, created at seconds 0 to 50.

    B is deleted at 60, E is boolean, A and C have the same meter.
    """
    clock = Mock(return_value=NOW)
    with metering(tmp_path_factory.mktemp("six"), clock=clock) as client:
        client.post("/v1/features", json=feature_of("S"), headers={"x-api-key": STAGING_KEY})
        made = {"A": make_feature(client, "A", lookup_key="key%_a")}
        for number, (name, fields) in enumerate({"B": {}, "C": {"meter_id": made["A"]["meter_id"]}, "D": {"lookup_key": "Ka"},
                                                 "E": {"type": "boolean"}, "F": {}}.items(), 1):  # fmt: skip
            clock.return_value = NOW + number * 10 * SECOND_US
            made[name] = make_feature(client, name, **fields)
        clock.return_value = NOW + 60 * SECOND_US
        assert client.delete(f"/v1/features/{made['B']['id']}").status_code == 200
        yield client, made


SCALAR_SEARCHES = {  # query -> names
    "all": ({}, "FEDCBA"),
    "nothing said": (dict.fromkeys(("status", "lookup_key", "name_contains", "expand"), ""), "FEDCBA"),
    "ascending": ({"order": "asc"}, "ABCDEF"),
    "published": ({"status": "published"}, "FEDCA"),
    "archived": ({"status": "archived"}, "B"),
    "deleted": ({"status": "deleted"}, ""),
    "by key": ({"lookup_key": "key%_a"}, "A"),
    "by a key in another case": ({"lookup_key": "ka"}, ""),
    "by a part of the name": ({"name_contains": "c"}, "C"),
    "by a part that is a pattern": ({"name_contains": "%"}, ""),
    "from": ({"start_time": at(40 * SECOND_US)}, "FE"),
    "until": ({"end_time": at(10 * SECOND_US)}, "BA"),
    "between": ({"start_time": at(10 * SECOND_US), "end_time": at(20 * SECOND_US)}, "CB"),
    "the first page": ({"limit": 4}, "FEDC"),
    "the next page": ({"limit": 4, "offset": 4}, "BA"),
    "expanded": ({"expand": "meters"}, "FEDCBA"),
    "several": ({"name_contains": "B", "status": "published"}, ""),
}  # fmt: skip


@table(("query", "expected"), SCALAR_SEARCHES.values(), ids=SCALAR_SEARCHES)
@table("method", ["GET", "POST"])
def test_search_by_parameters_and_by_a_body(six: Any, method: str, query: dict[str, Any], expected: str) -> None:
    client, _ = six
    response = (
        client.get("/v1/features", params=query) if method == "GET" else client.post("/v1/features/search", json=query)
    )
    assert response.status_code == 200, response.text
    answer = response.json()
    assert names(answer["items"]) == expected
    limit, offset = query.get("limit", 50), query.get("offset", 0)
    assert answer["pagination"] == {
        "total": 6 if "limit" in query else len(expected),
        "limit": limit,
        "offset": offset + limit,
    }
    assert all((one["meter"] or {"id": ""})["id"] == one["meter_id"] for one in answer["items"])


SEARCHES = {
    "by id": ({"feature_ids": ["A", "E", "?"]}, "EA"),
    "by meter": ({"meter_ids": ["A", "?"]}, "CA"),
    "by keys": ({"lookup_keys": ["f", "Ka", "nowhere"]}, "FD"),
    "by id and meter": ({"feature_ids": ["C", "D"], "meter_ids": ["A"]}, "C"),
    "by key and keys": ({"lookup_key": "f", "lookup_keys": ["Ka"]}, ""),
    "sorted": ({"sort": [{"field": "name", "direction": "asc"}]}, "ABCDEF"),
    "sorted backwards": ({"sort": [{"field": "name", "direction": "desc"}]}, "FEDCBA"),
    "sorted by change": ({"sort": [{"field": "updated_at", "direction": "desc"}]}, "BFEDCA"),
    "sorted by key": ({"sort": [{"field": "lookup_key", "direction": "asc"}]}, "DBCEFA"),
    "sorted by type": ({"sort": [{"field": "type", "direction": "asc"}, {"field": "name", "direction": "asc"}]}, "EABCDF"),
    "sorted by status": ({"sort": [{"field": "status", "direction": "asc"}, {"field": "name", "direction": "asc"}]}, "BACDEF"),
    "sorted by status backwards": ({"sort": [{"field": "status", "direction": "desc"}]}, "FEDCAB"),
    "sorted by id": ({"sort": [{"field": "id", "direction": "asc"}]}, "ABCDEF"),
    "its sort goes before its order": ({"sort": [{"field": "id", "direction": "asc"}], "order": "desc"}, "ABCDEF"),
    "expanded twice": ({"expand": " meters,meters"}, "FEDCBA"),
    "sorted by two": ({"sort": [{"field": "updated_at", "direction": "asc"}, {"field": "name", "direction": "asc"}]}, "ACDEFB"),
    "not sorted": ({"sort": []}, "FEDCBA"),
    "no condition": ({"filters": []}, "FEDCBA"),
    "null": (dict.fromkeys(("limit", "offset", "status", "order", "feature_ids", "meter_ids", "lookup_key", "lookup_keys",
                            "name_contains", "start_time", "end_time", "expand", "sort", "filters")), "FEDCBA"),
    "unknown fields": ({"colour": "red"}, "FEDCBA"),
}  # fmt: skip


@table(("query", "expected"), SEARCHES.values(), ids=SEARCHES)
def test_search_by_lists_and_in_order(six: Any, query: dict[str, Any], expected: str) -> None:
    client, made = six
    ids = {"feature_ids": lambda name: made[name]["id"], "meter_ids": lambda name: made[name]["meter_id"]}
    sent = {field: [ids[field](name) if name in made else name for name in value or []] if field in ids and value else value
            for field, value in query.items()}  # fmt: skip
    response = client.post("/v1/features/search", json=sent)
    assert response.status_code == 200, response.text
    assert names(response.json()["items"]) == expected


def test_name_contains_ignores_case(client: httpx.Client) -> None:
    for name in ("API calls", "Größe", "100% of_x"):
        make_feature(client, name)
    for part, expected in (
        ("api", "API calls"),
        ("CALL", "API calls"),
        ("RÖ", "Größe"),
        ("0% OF_", "100% of_x"),
        ("of%x", ""),
        ("_", "100% of_x"),
    ):
        assert names(client.post("/v1/features/search", json={"name_contains": part}).json()["items"]) == expected, part


@table(("bad", "field"), [
    ({"limit": 1001}, "limit"), ({"limit": -1}, "limit"), ({"limit": "x"}, "limit"), ({"offset": -1}, "offset"), ({"status": "x"}, "status"),
    ({"order": "up"}, "order"), ({"feature_ids": "feat_1"}, "feature_ids"), ({"meter_ids": [5]}, "meter_ids"), ({"lookup_keys": {}}, "lookup_keys"),
    ({"name_contains": 5}, "name_contains"), ({"start_time": "x"}, "start_time"), ({"sort": "name"}, "sort"), ({"sort": [{"field": "id"}]}, "sort[0].direction"),
    ({"sort": [{"field": "name", "direction": ""}]}, "sort[0].direction"), ({"sort": [{"direction": "asc"}]}, "sort[0].field"),
    ({"sort": [{"field": "name", "direction": "asc"}, {"field": "name"}]}, "sort[1].direction"),
    *[({"sort": [{"field": field, "direction": "asc"}]}, "sort[0].field") for field in ("event_name", "reset_usage", "meter_id", "NAME", "metadata")],
    *[({"expand": expand}, "expand") for expand in ("prices", "meter", "meters,plans", "Meters", "meters.x", ",", " ", 5, ["meters"])],
    ({"sort": [{"field": "name", "direction": "up"}]}, "sort"), ({"filters": [{"field": "name"}]}, "filters"),
    ({"start_time": at(1), "end_time": at()}, "end_time"),
], ids=str)  # fmt: skip
def test_a_bad_search_is_a_400_that_names_the_field(six: Any, bad: dict[str, Any], field: str) -> None:
    client, _ = six
    response = client.post("/v1/features/search", json=bad)
    (faulty,) = faulty_fields(response)
    assert faulty.startswith(field)
    assert field in response.json()["message"]


@table(("parameters", "expected"), [({"sort": "lookup_key", "order": "asc"}, "DBCEFA"), ({"sort": "type,name"}, "FDCBAE"),
                                    ({"sort": "status", "order": "asc"}, "BACDEF"), ({"expand": "meters"}, "FEDCBA")])  # fmt: skip
def test_search_by_parameters_sorts_by_the_columns_of_features(six: Any, parameters: Json, expected: str) -> None:
    client, _ = six
    assert names(client.get("/v1/features", params=parameters).json()["items"]) == expected


@table(
    ("parameters", "field"),
    [({"sort": "event_name"}, "sort"), ({"sort": "name,reset_usage"}, "sort"), ({"expand": "plans"}, "expand")],
)
def test_a_bad_parameter_of_a_search_is_a_400_that_names_it(six: Any, parameters: Json, field: str) -> None:
    client, _ = six
    assert faulty_fields(client.get("/v1/features", params=parameters)) == [field]


# ---------------------------------------------------------------------------------------------- Changing features


UPDATES: dict[str, Json] = {
    "nothing": {},
    "null": dict.fromkeys(("name", "description", "metadata", "unit_singular", "unit_plural", "reporting_unit", "filters")),
    "a name": {"name": "N" * 255},
    "a description": {"description": "new"},
    "no description": {"description": ""},
    "metadata": {"metadata": {"b": "2"}},
    "no metadata": {"metadata": {}},
    "units": {"unit_singular": "x" * 50, "unit_plural": "é" * 50},
    "one of the units": {"unit_plural": "TOKENS"},
    "no units": {"unit_singular": "", "unit_plural": ""},
    "a reporting unit": {"reporting_unit": {"unit_singular": "m", "unit_plural": "x" * 255, "conversion_rate": 1e6}},
    "everything": {"name": "All", "description": "d", "metadata": {"b": "2"}, "unit_singular": "a", "unit_plural": "b",
                   "reporting_unit": {"unit_singular": "m", "unit_plural": "ms", "conversion_rate": 0.5}},
}  # fmt: skip


@table("changes", UPDATES.values(), ids=UPDATES)
def test_a_feature_is_changed_by_what_is_sent(timed: httpx.Client, clock: Any, changes: Json) -> None:
    feature = make_feature(
        timed, "Tokens", description="old", metadata={"a": "1"}, unit_singular="token", unit_plural="tokens", **unit()
    )
    others = [make_feature(timed, "Other")]
    clock.return_value += 1000
    response = timed.put(f"/v1/features/{feature['id']}", json=changes)
    assert response.status_code == 200, response.text
    later = {name: value for name, value in changes.items() if value is not None}
    assert response.json() == feature | later | {"updated_at": "2025-10-15T11:38:47.963Z"}
    assert found(timed, f"features/{feature['id']}") == response.json()
    assert listed(timed, "features") == [*others, response.json()]


def test_the_lookup_key_the_type_and_the_meter_of_a_feature_stay(client: httpx.Client) -> None:
    feature = make_feature(client)
    ignored = {"lookup_key": "other", "type": "boolean", "meter_id": "meter_1", "meter": {}, "id": "mine", "status": "archived",
               "alert_settings": {"alert_enabled": True}, "group_id": "g", "filters": []}  # fmt: skip
    response = client.put(f"/v1/features/{feature['id']}", json=ignored | {"name": "New"})
    assert (response.status_code, response.json()) == (200, feature | {"name": "New"})


BAD_UPDATES: dict[str, tuple[Json, str]] = {
    "an empty name": ({"name": ""}, "name"),
    "a long name": ({"name": "x" * 256}, "name"),
    "a name that is a number": ({"name": 5}, "name"),
    "a description in a list": ({"description": []}, "description"),
    "a long unit": ({"unit_singular": "x" * 51}, "unit_singular"),
    "a long plural": ({"unit_plural": "x" * 51}, "unit_plural"),
    "only a singular": ({"unit_plural": ""}, "unit_plural"),
    "only a plural": ({"unit_singular": "", "unit_plural": "x"}, "unit_singular"),
    "an empty reporting unit": ({"reporting_unit": {}}, "reporting_unit"),
    "half a reporting unit": ({"reporting_unit": {"conversion_rate": 5}}, "reporting_unit"),
    "a reporting unit with a bad rate": (unit(conversion_rate=0), "reporting_unit.conversion_rate"),
    "a long reporting unit": (unit(unit_plural="x" * 256), "reporting_unit.unit_plural"),
    "metadata with a number": ({"metadata": {"a": 5}}, "metadata"),
    "filters": ({"filters": [{"key": "a", "values": ["b"]}]}, "filters"),
}


@table(("changes", "field"), BAD_UPDATES.values(), ids=BAD_UPDATES)
def test_a_bad_change_is_a_400_and_changes_nothing(client: httpx.Client, changes: Json, field: str) -> None:
    feature = make_feature(client, unit_singular="token", unit_plural="tokens")
    faulty = faulty_fields(client.put(f"/v1/features/{feature['id']}", json={"description": "new"} | changes))
    assert faulty
    assert all(each.startswith(field) for each in faulty)
    assert found(client, f"features/{feature['id']}") == feature


def test_a_first_unit_needs_the_other(client: httpx.Client) -> None:
    feature = make_feature(client)
    path = f"/v1/features/{feature['id']}"
    assert faulty_fields(client.put(path, json={"unit_singular": "token"})) == ["unit_plural"]
    assert client.put(path, json={"unit_singular": "token", "unit_plural": "tokens"}).json()["unit_plural"] == "tokens"


def test_an_archived_feature_can_be_changed_and_stays_archived(client: httpx.Client) -> None:
    feature = make_feature(client)
    client.delete(f"/v1/features/{feature['id']}")
    answer = client.put(f"/v1/features/{feature['id']}", json={"name": "Old"}).json()
    assert (answer["name"], answer["status"], answer["meter"]["status"]) == ("Old", "archived", "archived")


@table("content", ["", "[]", "null", "{"])
def test_a_change_without_a_json_object_is_a_400(client: httpx.Client, content: str) -> None:
    feature = make_feature(client)
    refused(client.put(f"/v1/features/{feature['id']}", content=content))
    assert found(client, f"features/{feature['id']}") == feature


def test_analytics_shows_a_changed_feature(client: httpx.Client) -> None:
    store(client, event(timestamp=at(-1)))
    feature = make_feature(client)
    client.put(
        f"/v1/features/{feature['id']}",
        json={"name": "New", "unit_singular": "a", "unit_plural": "b"} | unit(conversion_rate=0.5),
    )
    (item,) = analytics(client)
    assert (item["name"], item["unit"], item["total_usage_display"]) == ("New", "a", "2")


# ---------------------------------------------------------------------------------------------- Deleting features


def test_deleting_a_feature_archives_it_and_its_meter(timed: httpx.Client, clock: Any) -> None:
    feature = make_feature(timed)
    clock.return_value += 1000
    response = timed.delete(f"/v1/features/{feature['id']}")
    assert (response.status_code, response.json()) == (200, {"message": "feature deleted successfully"})
    later = {"status": "archived", "updated_at": "2025-10-15T11:38:47.963Z"}
    assert found(timed, f"features/{feature['id']}") == feature | later | {"meter": feature["meter"] | later}
    assert (listed(timed, "features", status="published"), listed(timed, status="published")) == ([], [])


def test_a_meter_is_archived_with_the_last_feature_that_has_it(client: httpx.Client) -> None:
    meter = make_meter(client)
    first, second = (make_feature(client, name, meter_id=meter["id"]) for name in "ab")
    for feature, status in ((first, "published"), (second, "archived")):
        assert client.delete(f"/v1/features/{feature['id']}").status_code == 200
        assert found(client, f"meters/{meter['id']}")["status"] == status


def test_a_feature_without_a_meter_can_be_deleted_twice(client: httpx.Client) -> None:
    feature = make_feature(client, type="boolean")
    for _ in range(2):
        assert client.delete(f"/v1/features/{feature['id']}").status_code == 200
    assert found(client, f"features/{feature['id']}")["status"] == "archived"


def test_a_second_deletion_keeps_the_meter_that_another_feature_has(client: httpx.Client) -> None:
    """The second DELETE of a feature must not archive its former meter."""
    meter = make_meter(client)
    first, _ = (make_feature(client, name, meter_id=meter["id"]) for name in "ab")
    for _ in range(2):
        assert client.delete(f"/v1/features/{first['id']}").status_code == 200
    assert found(client, f"meters/{meter['id']}")["status"] == "published"


@table("feature_id", ["feat_unknown", "x" * 300, "' OR 1=1 --"])
def test_an_unknown_feature_is_a_404(shared: httpx.Client, feature_id: str) -> None:
    for method, body in (("GET", None), ("DELETE", None), ("PUT", {}), ("PUT", {"name": "x"})):
        refused(shared.request(method, f"/v1/features/{feature_id}", json=body), 404, "not_found")


# ---------------------------------------------------------------------------------------------- SDK


def test_the_official_sdk_creates_finds_changes_and_deletes_a_feature_with_its_meter(live: Live) -> None:
    from flexprice import Flexprice

    meter = {"name": "Tokens", "event_name": "sdk.call", "reset_usage": "BILLING_PERIOD", "filters": [{"key": "model", "values": ["a", "b"]}],
             "aggregation": {"type": "SUM_WITH_MULTIPLIER", "field": "n", "multiplier": "2.5"}}  # fmt: skip
    unit = {"unit_singular": "thousand", "unit_plural": "thousands", "conversion_rate": 1000}
    with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
        made = sdk.features.create_feature(name="SDK tokens", type_="metered", meter=meter, reporting_unit=unit, unit_singular="token",
                                           unit_plural="tokens", metadata={"a": "b"})  # fmt: skip
        assert (made.lookup_key, made.type, made.status, made.meter.id) == (
            "sdk_tokens",
            "metered",
            "published",
            made.meter_id,
        )
        assert (made.reporting_unit.conversion_rate, made.metadata, made.environment_id) == (
            1000,
            {"a": "b"},
            "development",
        )
        aggregation = made.meter.aggregation
        assert (aggregation.type, aggregation.field, aggregation.multiplier) == ("SUM_WITH_MULTIPLIER", "n", "2.5")
        assert [(one.key, one.values) for one in made.meter.filters] == [("model", ["a", "b"])]
        assert isinstance(made.created_at, datetime)
        sort = [{"field": "name", "direction": "asc"}]
        page = sdk.features.query_feature(
            lookup_key="sdk_tokens", limit=10, sort=sort, status="published", expand="meters"
        )
        assert [one.id for one in page.items] == [made.id]
        assert (page.pagination.total, page.pagination.limit, page.pagination.offset) == (1, 10, 10)
        assert page.items[0] == made
        changed = sdk.features.update_feature(id=made.id, name="Renamed", metadata={"c": "d"}, unit_plural="TOKENS",
                                              reporting_unit=unit | {"conversion_rate": 10})  # fmt: skip
        assert (changed.id, changed.name, changed.lookup_key) == (made.id, "Renamed", "sdk_tokens")
        assert (changed.metadata, changed.unit_singular, changed.unit_plural) == ({"c": "d"}, "token", "TOKENS")
        assert (changed.reporting_unit.conversion_rate, changed.meter) == (10, made.meter)
        assert sdk.features.query_feature(feature_ids=[made.id]).items == [changed]
        assert sdk.features.delete_feature(id=made.id).message == "feature deleted successfully"
        assert sdk.features.query_feature(lookup_keys=["sdk_tokens"], status="published").items == []
        again = sdk.features.create_feature(name="SDK tokens", type_="boolean")
        assert (again.meter_id, again.meter, again.metadata) == ("", None, {})


def test_the_official_async_sdk_creates_finds_and_deletes_a_feature(live: Live) -> None:
    from flexprice import Flexprice

    async def round_trip() -> tuple[Any, ...]:
        async with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
            made = await sdk.features.create_feature_async(name="Async", type_="metered", meter=meter_of())
            page = await sdk.features.query_feature_async(feature_ids=[made.id])
            deleted = await sdk.features.delete_feature_async(id=made.id)
            return made.id, [one.id for one in page.items], deleted.message

    made, found_ids, message = asyncio.run(round_trip())
    assert (found_ids, message) == ([made], "feature deleted successfully")


SDK_REFUSALS = {
    "a bad meter": (lambda sdk: sdk.features.create_feature(name="a", type_="metered", meter=meter_of(event_name=" ")), 400, "meter.event_name"),
    "no meter": (lambda sdk: sdk.features.create_feature(name="a", type_="metered"), 400, "meter"),
    "a change to no name": (lambda sdk: sdk.features.update_feature(id=sdk.features.create_feature(name="b", type_="boolean").id, name=""), 400, "name"),
    "a change of an unknown feature": (lambda sdk: sdk.features.update_feature(id="feat_x", name="a"), 404, "feat_x"),
    "an unknown feature": (lambda sdk: sdk.features.delete_feature(id="feat_x"), 404, "feat_x"),
    "an unknown meter's usage": (lambda sdk: sdk.events.get_usage_by_meter(meter_id="meter_x"), 404, "meter_x"),
    "a bad group": (lambda sdk: sdk.events.get_usage_analytics(group_by=["colour"]), 400, "group_by"),
}  # fmt: skip


@pytest.mark.slow
@table(("call", "status", "message"), SDK_REFUSALS.values(), ids=SDK_REFUSALS)
def test_the_official_sdk_raises_the_servers_message(
    live: Live, call: Callable[..., Any], status: int, message: str
) -> None:
    from flexprice import Flexprice
    from flexprice.models.errors import ErrorResponse

    with (
        Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk,
        pytest.raises(ErrorResponse, match=message) as refusal,
    ):
        call(sdk)
    assert refusal.value.status_code == refusal.value.data.http_status_code == status
    assert refusal.value.data.code == {400: "validation_error", 404: "not_found"}[status]


def test_the_official_sdk_raises_statuses_that_its_document_lacks(live: Live) -> None:
    from flexprice import Flexprice
    from flexprice.models.errors import FlexpriceError

    with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
        sdk.features.create_feature(name="Taken", type_="boolean")
        with pytest.raises(FlexpriceError) as refusal:
            sdk.features.create_feature(name="Taken", type_="boolean")
        assert (refusal.value.status_code, "already_exists" in refusal.value.body) == (409, True)
        with pytest.raises(FlexpriceError) as refusal:
            sdk.features.create_feature(name="Other", type_="metered", meter_id="meter_x")
        assert (refusal.value.status_code, "not_found" in refusal.value.body) == (404, True)
