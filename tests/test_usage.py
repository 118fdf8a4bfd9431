"""Test usage, monitoring and the visibility lag; headings give SPEC's section numbers."""

from __future__ import annotations

import asyncio
import hashlib
import io
import itertools
import json
import random
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from itertools import groupby, pairwise
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock
from zoneinfo import ZoneInfo

import httpx
import pytest

from eventstore import EARLIEST, LATEST, ApiError, Reader, Span, View, prepare_file, to_us
from eventstore_extras import usage as usage_module
from eventstore_extras.usage import UsageQuery, Windows, select_cells
from helpers import (
    DAY_US,
    LEDGER_START,
    NAMES,
    NOW,
    STAGING_KEY,
    ZONES,
    Json,
    at,
    counts,
    event,
    eventually,
    ids,
    monitored,
    page,
    random_value,
    refused,
    service_of,
    serving,
    store,
    store_of,
    table,
    total,
    usage,
    windows_of,
)
from oracle import AGGREGATIONS, MINUTES, SIZES, expected_usage

# ---------------------------------------------------------------------------------------------- 7: usage


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, list[Json]]]:
    """A client, and the 400 events that its server has, with all kinds of properties, in ASCII and other text."""
    choose, events = random.Random(7), []
    for number in range(400):
        after = timedelta(seconds=choose.randrange(18 * 86_400)) if number % 4 else timedelta(hours=number)
        properties = {name: random_value(choose) for name in NAMES if choose.random() < 0.8}
        properties |= {} if number % 5 == 0 else {"region": choose.choice(["eu", "us", "5", 5, True, None, 'e"u'])}
        events.append(event(f"{choose.randrange(10**6):06}-{number}", event_name=choose.choice(["call", "call", "other"]),
                            external_customer_id=choose.choice("xyz"), customer_id=choose.choice(["", "c1"]),
                            timestamp=(LEDGER_START + after).isoformat(), properties=properties))  # fmt: skip
    with serving(tmp_path_factory.mktemp("ledger")) as client:
        for at_, ascii_only in ((0, True), (1, False)):
            body = json.dumps({"events": events[at_::2]}, ensure_ascii=ascii_only, separators=(",", ":")).encode()
            assert client.post("/v1/events/bulk", content=body).status_code == 202
        other = {"events": [event(properties=dict.fromkeys(NAMES, 1000), timestamp=events[0]["timestamp"])] * 10}
        assert client.post("/v1/events/bulk", json=other, headers={"x-api-key": STAGING_KEY}).status_code == 202
        yield client, events


@pytest.mark.slow
@table("kind", AGGREGATIONS)
def test_usage_matches_a_plain_python_model(ledger: tuple[httpx.Client, list[Json]], kind: str) -> None:
    client, events = ledger
    choose, compared = random.Random(kind), 0
    for number in range(45):
        start = LEDGER_START + timedelta(hours=choose.randrange(200))
        query: Json = {"start_time": start.isoformat(), "property_name": choose.choice(NAMES), "timezone": choose.choice(ZONES),
                 "end_time": (start + timedelta(hours=choose.randrange(4, 300, 4))).isoformat()}  # fmt: skip
        if kind == "SUM_WITH_MULTIPLIER":
            query["multiplier"] = choose.choice(["2.5", 2.5, "+25e-1"])
        if number % 3:
            query["window_size"] = choose.choice(SIZES)
        if kind in ("MAX", "SUM") and number % 2:
            query["bucket_size"] = choose.choice(SIZES)
            if kind == "MAX" and number % 4 == 1:
                query["group_by"] = [f"properties.{choose.choice(['region', *NAMES])}", "source"]
        for name, values in (("external_customer_id", "xyz"), ("customer_id", ["c1"])):
            if choose.random() < 0.2:
                query[name] = choose.choice(values)
        if choose.random() < 0.3:
            query["filters"] = {"region": choose.choice([["eu", "us"], ["5"], ["true"], ['e"u', "nowhere"]])}
        value, per_window = expected_usage(events, kind, query)
        answer = usage(client, kind, **query)
        windowed = "window_size" in query and "bucket_size" not in query
        assert answer["type"] == kind
        assert answer["value"] is None if windowed else answer["value"] == pytest.approx(value, rel=1e-9), query
        assert [time for time, _ in windows_of(answer)] == [time for time, _ in per_window], query
        expected = [each for _, each in per_window]
        assert [each for _, each in windows_of(answer)] == pytest.approx(expected, rel=1e-9), query
        if "group_by" in query:
            deprecated = query | {
                "group_by": None,
                "group_by_property": query["group_by"][0].removeprefix("properties."),
            }
            assert usage(client, kind, **deprecated) == answer
        compared += value > 0
    assert compared > (5 if kind == "LATEST" else 25)


NEW_YORK, KOLKATA = "America/New_York", "Asia/Kolkata"

# "size zone [billing_anchor]", {start of a window in UTC: its events, as times since that start}
IN_WINDOWS = {
    "MINUTE": ("MINUTE UTC", {"2026-01-01 00:00": "0:00:00 0:00:59.999999", "2026-01-01 00:01": "0:00:00"}),
    "15MIN": ("15MIN UTC", {"2026-01-01 00:00": "0:14:59", "2026-01-01 00:45": "0:00:00 0:14:59"}),
    "30MIN": (f"30MIN {KOLKATA}", {"2026-01-01 00:00": "0:29:59.999999", "2026-01-01 00:30": "0:00:00"}),
    "6HOUR": ("6HOUR Asia/Kathmandu", {"2026-01-01 00:15": "5:59:59", "2026-01-01 06:15": "0:00:00"}),
    "12HOUR": ("12HOUR UTC", {"2025-12-31 12:00": "0:00:00 11:59:59.999999", "2026-01-01 00:00": "0:00:00"}),
    "unknown zone": ("DAY Mars/Olympus", {"2026-01-01 00:00": "0:00:00 23:59:59", "2026-01-02 00:00": "0:00:00"}),
    "spring HOUR": (f"HOUR {NEW_YORK}", {"2026-03-08 06:00": "0:59:59.999999", "2026-03-08 07:00": "0:00:00 0:30:00"}),
    "spring 3HOUR": (f"3HOUR {NEW_YORK}", {"2026-03-08 05:00": "0:00:00 1:59:59", "2026-03-08 07:00": "0:00:00 2:59:59", "2026-03-08 10:00": "0:00:00"}),
    "spring DAY": (f"DAY {NEW_YORK}", {"2026-03-07 05:00": "23:59:59", "2026-03-08 05:00": "0:00:00 22:59:59", "2026-03-09 04:00": "0:00:00 23:59:59", "2026-03-10 04:00": "0:00:00"}),
    "spring WEEK": (f"WEEK {NEW_YORK}", {"2026-03-01 05:00": "167:59:59", "2026-03-08 05:00": "0:00:00 166:59:59", "2026-03-15 04:00": "0:00:00"}),
    "spring MONTH": (f"MONTH {NEW_YORK}", {"2026-03-01 05:00": "0:00:00 742:59:59", "2026-04-01 04:00": "0:00:00"}),
    "autumn 30MIN": (f"30MIN {NEW_YORK}", {"2026-11-01 05:30": "0:29:59", "2026-11-01 06:00": "0:00:00", "2026-11-01 06:30": "0:00:00"}),
    "autumn HOUR": (f"HOUR {NEW_YORK}", {"2026-11-01 05:00": "0:00:00 0:30:00", "2026-11-01 06:00": "0:00:00 0:30:00", "2026-11-01 07:00": "0:00:00"}),
    "autumn 3HOUR": (f"3HOUR {NEW_YORK}", {"2026-11-01 04:00": "0:00:00 3:59:59.999999", "2026-11-01 08:00": "0:00:00"}),
    "autumn DAY": (f"DAY {NEW_YORK}", {"2026-10-31 04:00": "23:59:59", "2026-11-01 04:00": "0:00:00 24:59:59", "2026-11-02 05:00": "0:00:00"}),
    "no midnight": ("DAY America/Sao_Paulo", {"2018-11-03 03:00": "23:59:59", "2018-11-04 03:00": "0:00:00 22:59:59", "2018-11-05 02:00": "0:00:00"}),
    "two midnights": ("3HOUR America/Havana", {"2024-11-03 04:00": "0:30:00 1:30:00 2:30:00 3:59:59", "2024-11-03 08:00": "0:00:00"}),
    "second midnight": ("3HOUR America/Havana", {"2024-11-03 04:00": "1:30:00 3:30:00", "2024-11-03 08:00": "0:00:00"}),
    "Kolkata HOUR": (f"HOUR {KOLKATA}", {"2026-01-01 09:30": "0:59:59.999999", "2026-01-01 10:30": "0:00:00"}),
    "Kolkata DAY": (f"DAY {KOLKATA}", {"2025-12-31 18:30": "0:00:00 23:59:59", "2026-01-01 18:30": "0:00:00"}),
    "new year's WEEK": ("WEEK UTC", {"2025-12-21 00:00": "167:59:59", "2025-12-28 00:00": "0:00:00 96:00:00 167:59:59", "2026-01-04 00:00": "0:00:00"}),
    "MONTH": ("MONTH UTC", {"2024-02-01 00:00": "0:00:00 695:59:59", "2024-03-01 00:00": "0:00:00"}),
    "from the 15th": ("MONTH UTC 2024-01-15", {"2024-12-15 00:00": "0:00:00 743:59:59", "2025-01-15 00:00": "0:00:00"}),
    "Kolkata's 5th": (f"MONTH {KOLKATA} 2024-01-05", {"2026-01-04 18:30": "0:00:00 743:59:59", "2026-02-04 18:30": "0:00:00"}),
    "the 29th, leap": ("MONTH UTC 2024-02-29", {"2024-01-29 00:00": "0:00:00 743:59:59", "2024-02-29 00:00": "0:00:00 695:59:59", "2024-03-29 00:00": "0:00:00"}),
    "the 29th": ("MONTH UTC 2024-02-29", {"2025-01-29 00:00": "0:00:00 743:59:59", "2025-03-01 00:00": "0:00:00 671:59:59", "2025-03-29 00:00": "0:00:00"}),
    "the 30th, leap": ("MONTH UTC 2024-01-30", {"2024-01-30 00:00": "0:00:00 743:59:59", "2024-03-01 00:00": "0:00:00 695:59:59", "2024-03-30 00:00": "0:00:00"}),
    "the 30th": ("MONTH UTC 2024-01-30", {"2025-01-30 00:00": "0:00:00 743:59:59", "2025-03-02 00:00": "0:00:00 671:59:59", "2025-03-30 00:00": "0:00:00"}),
    "the 31st, leap": ("MONTH UTC 2024-01-31", {"2023-12-31 00:00": "743:59:59", "2024-01-31 00:00": "0:00:00 743:59:59", "2024-03-02 00:00": "0:00:00 695:59:59", "2024-03-31 00:00": "0:00:00"}),
    "the 31st": ("MONTH UTC 2024-01-31", {"2025-01-31 00:00": "0:00:00 743:59:59", "2025-03-03 00:00": "0:00:00 671:59:59", "2025-03-31 00:00": "0:00:00"}),
    "an anchor for DAY": ("DAY UTC 2024-01-31", {"2026-01-01 00:00": "0:00:00", "2026-01-02 00:00": "23:59:59"}),
}  # fmt: skip


@table(("how", "windows"), IN_WINDOWS.values(), ids=IN_WINDOWS)
def test_an_event_counts_in_the_window_of_its_zone(client: httpx.Client, how: str, windows: dict[str, Any]) -> None:
    size, zone, *anchor = how.split()
    expected, times = [], []
    for stamp, offsets in windows.items():
        begin = datetime.fromisoformat(f"{stamp}+00:00")
        expected.append((begin, len(offsets.split())))
        for offset in offsets.split():
            hours, minutes, seconds = map(float, offset.split(":"))
            times.append(begin + timedelta(hours=hours, minutes=minutes, seconds=seconds))
    store(client, *[event(timestamp=time.isoformat()) for time in times])
    anchored = {"billing_anchor": f"{anchor[0]}T18:45:00Z"} if anchor else {}
    query = {"window_size": size, "timezone": zone, "start_time": times[0].isoformat(), **anchored}
    until_now = usage(client, **query, end_time=(times[-1] + timedelta(microseconds=1)).isoformat())
    assert (until_now["value"], windows_of(until_now)) == (None, expected)
    last_left_out = [*expected[:-1], (expected[-1][0], expected[-1][1] - 1)]  # the end is exclusive
    before = usage(client, **query, end_time=times[-1].isoformat())
    assert windows_of(before) == [(time, count) for time, count in last_left_out if count]


def test_the_start_is_inclusive_the_end_exclusive_and_both_default_as_in_a_list(client: httpx.Client) -> None:
    store(client, *[event(timestamp=at(us)) for us in (-7 * DAY_US - 1, -7 * DAY_US, -5, -1, 0)])
    assert usage(client)["value"] == 3
    assert usage(client, start_time=at(-5), end_time=at(-1))["value"] == 1
    assert usage(client, end_time=at(1))["value"] == 3
    for window_size, value in ((None, 0), ("DAY", None)):
        nothing: Json = {"value": value, "results": []}
        assert usage(client, start_time=at(-5), end_time=at(-5), window_size=window_size).items() >= nothing.items()
        assert usage(client, external_customer_id="nobody", window_size=window_size).items() >= nothing.items()


def test_usage_of_a_few_events_matches_results_worked_out_by_hand(client: httpx.Client) -> None:
    def sent(number: int, seconds: int, value: object) -> dict[str, Any]:
        return event(f"{number}", timestamp=at(-seconds * 10**6), properties={"n": value} if value != "none" else {})

    store(
        client,
        sent(1, 75, 4),
        sent(2, 50, "6.5"),
        sent(3, 25, "none"),
        sent(5, 25, -2),
        sent(4, 25, "x"),
        sent(9, 0, 99),
    )
    query = {"property_name": "n", "start_time": at(-100_000_000), "end_time": at()}
    expected = {"COUNT": 5, "SUM": 8.5, "AVG": 1.7, "MAX": 6.5, "COUNT_UNIQUE": 4, "LATEST": 0,
                "WEIGHTED_SUM": 4 * 0.75 + 6.5 * 0.5 - 2 * 0.25}  # fmt: skip
    for kind, value in expected.items():
        assert usage(client, kind, **query) == {
            "event_name": "call",
            "type": kind,
            "value": pytest.approx(value),
            "results": [],
        }
        assert usage(client, kind.lower(), **query)["type"] == kind
    assert usage(client, "SUM_WITH_MULTIPLIER", **query, multiplier="0.5")["value"] == 4.25
    store(client, sent(3333, 25, 7), sent(6, 25, 8))  # at the same time, the greater id is newer
    assert usage(client, "LATEST", **query)["value"] == 8
    for kind in ("SUM", "AVG", "MAX", "LATEST", "WEIGHTED_SUM"):  # a negative result is answered as 0
        negative = query | {"filters": {"n": ["-2"]}}
        assert usage(client, kind, **negative)["value"] == 0
        assert [each for _, each in windows_of(usage(client, kind, **negative, window_size="HOUR"))] == [0]


def test_unique_texts_of_any_length_are_told_apart(client: httpx.Client) -> None:
    """Long texts are compared by their hashes."""
    texts = [
        "x" * 63,
        "x" * 64,
        "x" * 65,
        "x" * 66,
        "x" * 100_000 + "a",
        "x" * 100_000 + "b",
        "é" * 64,
        "é" * 65,
        "",
        "5",
        "!5",
        '"5"',
        "\\",
        "a\0b",
        "a\0c",
    ]
    texts.append("#" + hashlib.blake2b(texts[2].encode(), digest_size=32).hexdigest())  # looks like the hash of another
    values: list[object] = [*texts, *texts, 5, None, {"a": "x" * 80}, {"a": "x" * 81}, {"a": "x" * 80}]
    store(client, *[event(timestamp=at(-1 - number), properties={"n": value}) for number, value in enumerate(values)])
    expected = len(texts) + 2
    assert usage(client, "COUNT_UNIQUE", property_name="n")["value"] == expected
    for size in ("MINUTE", "MONTH"):
        assert [
            value for _, value in windows_of(usage(client, "COUNT_UNIQUE", property_name="n", window_size=size))
        ] == [expected]


def test_long_unique_texts_are_not_held_in_memory(client: httpx.Client) -> None:
    long = [event(timestamp=at(-1), properties={"n": f"{number}" + "x" * 100_000}) for number in range(50)]
    store(client, *long)
    view = View("development", NOW)
    query = UsageQuery(
        view=view, start_us=0, end_us=NOW, filters={"event_name": "call"}, aggregation="COUNT_UNIQUE", property_name="n"
    )
    (cell,) = asyncio.run(store_of(client).read(lambda conn: select_cells(conn, query, [Span(0, NOW, 0)]), quick=False))
    assert len(cell) < 50 * 70


def test_the_number_of_unique_values_in_a_range_is_limited(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage_module, "_MAX_UNIQUE", 4)
    store(client, *[event(timestamp=at(-1 - number * DAY_US), properties={"n": value} if value else {}) for number, value in
                    enumerate(["a", "b", "", "c", "d", "a"])])  # fmt: skip
    query = {"event_name": "call", "aggregation_type": "COUNT_UNIQUE", "property_name": "n"}
    assert client.post("/v1/events/usage", json=query).json()["value"] == 4
    store(client, event(timestamp=at(-1), properties={"n": "e"}))
    response = client.post("/v1/events/usage", json=query)
    assert refused(response)["errors"][0]["field"] == "property_name"
    assert "more than 4 distinct values" in response.json()["message"]
    days = client.post("/v1/events/usage", json=query | {"window_size": "DAY"}).json()["results"]
    assert [day["value"] for day in days] == [1, 1, 1, 0, 1, 2]
    assert client.post("/v1/events/usage", json=query | {"start_time": at(-4 * DAY_US)}).json()["value"] == 4


# ---------------------------------------------------------------------------------------------- 7: time limits


def test_the_computation_of_windows_ends_when_its_time_is_over(tmp_path: Path) -> None:
    prepare_file(str(tmp_path / "events.db"))
    reader = Reader(str(tmp_path / "events.db"))
    windows = Windows("MINUTE", ZoneInfo("Europe/Berlin"))
    with closing(reader.conn), pytest.raises(TimeoutError):
        reader.run(lambda _: list(windows.bounds(0, 10**15)), limit_s=0)
    assert len([*windows.bounds(0, 600_000_000)]) == 11  # outside of an operation nothing limits it


FOREVER = "WITH RECURSIVE numbers(n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers) SELECT max(n) FROM numbers"
SHORT = FOREVER.replace("FROM numbers)", "FROM numbers WHERE n < 100000)")


def test_operations_of_one_request_share_its_time_limit(tmp_path: Path) -> None:
    ran = []

    def read(conn: Any) -> None:
        conn.execute(SHORT).fetchall()
        ran.append(conn)

    with serving(tmp_path, query_timeout_s=0.3) as client:
        with pytest.raises(ApiError, match="took longer"):
            asyncio.run(usage_module.read_all(service_of(client), [read] * 10_000))
        assert len(ran) < 10_000


def test_if_one_operation_of_a_request_fails_the_others_end(tmp_path: Path) -> None:
    def fail(_: Any) -> None:
        raise ZeroDivisionError

    with serving(tmp_path, query_timeout_s=3600) as client:
        service = service_of(client)
        with pytest.raises(ZeroDivisionError):
            asyncio.run(usage_module.read_all(service, [lambda conn: conn.execute(FOREVER).fetchall(), fail]))
        eventually(lambda: service.store.readers.running == 0)


@table("kind", AGGREGATIONS)
def test_without_a_property_all_events_are_counted_and_the_type_is_count(client: httpx.Client, kind: str) -> None:
    store(client, event(timestamp=at(-1), properties={"n": 5}), event(timestamp=at(-2)))
    multiplier = 3 if kind == "SUM_WITH_MULTIPLIER" else None
    for property_name in (None, ""):
        answer = usage(client, kind, property_name=property_name, multiplier=multiplier)
        assert (answer["type"], answer["results"]) == ("COUNT", [])
        assert answer["value"] == 2


BAD_MULTIPLIERS: list[Any] = ["0", 0, "-1", "x", "NaN", "Infinity", "1e999", " 2", "1_0", True, [], "0x2"]


@pytest.mark.slow
@table(("bad", "part"), [
    ({"event_name": None}, "event_name"), ({"event_name": ""}, "event_name"), ({"aggregation_type": None}, "aggregation_type"),
    ({"aggregation_type": "MEDIAN"}, "COUNT_UNIQUE"), ({"aggregation_type": 5}, "aggregation_type"),
    ({"window_size": "2HOUR"}, "15MIN"), ({"window_size": "day"}, "DAY"), ({"bucket_size": "YEAR"}, "MONTH"),
    ({"multiplier": "2"}, "multiplier goes with SUM_WITH_MULTIPLIER only, not with COUNT"),
    ({"aggregation_type": "SUM_WITH_MULTIPLIER", "multiplier": -1}, "multiplier must be a decimal number greater than 0, got -1"),
    *[({"aggregation_type": "SUM_WITH_MULTIPLIER", "multiplier": multiplier}, "multiplier")
    for multiplier in BAD_MULTIPLIERS],
    ({"start_time": "yesterday"}, "start_time"), ({"end_time": "2025-01-01"}, "end_time"), ({"billing_anchor": "5"}, "billing_anchor"),
    ({"start_time": at(1), "end_time": at()}, "before"), ({"start_time": at(1)}, "before"), ({"timezone": 5}, "timezone"),
    ({"filters": {"": ["x"]}}, "filters"), ({"filters": {"a": "x"}}, "filters"), ({"filters": []}, "filters"),
    ({"group_by": "properties.a"}, "group_by"), ({"group_by": [5]}, "group_by"), ({"property_name": ["n"]}, "property_name"),
    ({"window_size": "MINUTE", "start_time": at(-100_000 * 60_000_000)}, "MINUTE makes more than 100000"),
    ({"bucket_size": "MINUTE", "start_time": at(-100_000 * 60_000_000), "aggregation_type": "SUM", "property_name": "n"}, "bucket_size MINUTE makes more than 100000"),
    ({"bucket_size": "DAY", "window_size": "HOUR", "start_time": EARLIEST, "end_time": LATEST, "aggregation_type": "MAX", "property_name": "n"}, "bucket_size DAY"),
    ({"bucket_size": "DAY", "end_time": "0001-01-02T00:00:00Z", "aggregation_type": "MAX", "property_name": "n"}, "bucket_size makes a window outside"),
    ({"bucket_size": "DAY", "window_size": "MINUTE", "start_time": at(-100_000 * 60_000_000)}, "window_size MINUTE makes more than 100000"),
    *[({"window_size": size, "timezone": zone, "start_time": start, "end_time": end}, "window_size") for size, zone, start, end in (
    ("DAY", "UTC", None, "0001-01-02T00:00:00Z"),
    ("HOUR", "America/New_York", "0001-01-01T00:00:00Z", "0001-01-02T00:00:00Z"), ("DAY", "UTC", "9999-12-31T00:00:00Z", "9999-12-31T12:00:00Z"),
    ("HOUR", "Asia/Kolkata", "9999-12-31T20:00:00Z", "9999-12-31T21:00:00Z"))],
])  # fmt: skip
def test_an_invalid_usage_query_is_refused(shared: httpx.Client, bad: dict[str, Any], part: str) -> None:
    refused(shared.post("/v1/events/usage", json={"event_name": "call", "aggregation_type": "COUNT"} | bad), part=part)


@table("kind", ["SUM_WITH_MULTIPLIER", "sum_with_multiplier", "Sum_With_Multiplier"])
@table("absent", [{}, {"multiplier": None}], ids=["absent", "null"])
def test_the_multiplier_is_1_unless_it_is_sent(client: httpx.Client, kind: str, absent: Json) -> None:
    store(client, *[event(timestamp=at(-1), properties={"n": n}) for n in (2, 0.5)])
    query = {"event_name": "call", "aggregation_type": kind} | absent
    for more, expected in (({"property_name": "n"}, ("SUM_WITH_MULTIPLIER", 2.5)), ({}, ("COUNT", 2))):
        answer = client.post("/v1/events/usage", json=query | more).json()
        assert (answer["type"], answer["value"]) == expected
    windows = client.post("/v1/events/usage", json=query | {"property_name": "n", "window_size": "DAY"}).json()
    assert [each["value"] for each in windows["results"]] == [2.5]


@table("content", ["", "[]", "null", "5", "{", '{"event_name": "\\ud83d"}', "[" * 5000])
def test_a_malformed_usage_body_is_refused(shared: httpx.Client, content: str) -> None:
    refused(shared.post("/v1/events/usage", content=content))


@pytest.mark.slow
def test_100000_windows_are_answered(client: httpx.Client) -> None:
    store(client, event(timestamp=at(-1)), event(timestamp=at(-99_998 * 60_000_000)))
    answer = usage(client, window_size="MINUTE", start_time=at(-99_999 * 60_000_000))
    assert [count for _, count in windows_of(answer)] == [1, 1]


def test_sums_beyond_the_range_of_floats_are_answered_with_numbers(client: httpx.Client) -> None:
    store(client, *[event(timestamp=at(-1 - number * DAY_US), properties={"n": 1e308}) for number in range(7)])
    store(client, *[event(event_name="one", timestamp=at(-1), properties={"n": 1e308})] * 2)
    for name, kind in itertools.product(("call", "one"), ("SUM", "AVG", "MAX", "WEIGHTED_SUM", "SUM_WITH_MULTIPLIER")):
        multiplier = {"multiplier": "1e300"} if kind == "SUM_WITH_MULTIPLIER" else {}
        for sizes in ({}, {"window_size": "MONTH"}, {"window_size": "DAY"}, {"bucket_size": "DAY"}):
            answer = usage(client, kind, event_name=name, property_name="n", **multiplier, **sizes)
            windowed = "window_size" in sizes
            values = [value for _, value in windows_of(answer)] + ([] if windowed else [answer["value"]])
            assert all(isinstance(value, float) and value > 0 for value in values), (kind, sizes, answer)


# SQLite 3.40, 3.43 to 3.46, or 3.50 misreads the last digit of each by one.
UNEXACT = ["87831.178989", "13406.597127", "157.761139", "1.7976931348623158e308", 58437.773459, 1.909689623213514e-34,
           1.4255183989699612e266, 7.036870839547745e177]  # fmt: skip


@table("value", UNEXACT, ids=repr)
def test_the_maximum_and_the_latest_number_are_exact_to_the_last_digit(client: httpx.Client, value: Any) -> None:
    store(client, event(timestamp=at(-2), properties={"n": -1}), event(timestamp=at(-1), properties={"n": value}))
    for kind, windows in itertools.product(("MAX", "LATEST"), ({}, {"window_size": "DAY"})):
        answer = usage(client, kind, property_name="n", **windows)
        assert [answer["value"], *(each for _, each in windows_of(answer))][bool(windows)] == float(value)


def test_usage_compares_properties_regardless_of_how_their_json_was_written(client: httpx.Client) -> None:
    for number, properties in enumerate(['{"n":{"a":[1,2]},"m":"\u00a05"}', '{ "n" : { "a" : [ 1, 2 ] }, "m": "\\u00a05" }',
                                         '{"n": {"a": [1, 2]}, "m": "5 apples", "x": "\\\\"}']):  # fmt: skip
        content = f'{{"event_name": "call", "external_customer_id": "cust", "timestamp": "{at(-1 - number)}", "properties": {properties}}}'
        assert client.post("/v1/events", content=content.encode()).status_code == 202
    assert usage(client, "COUNT_UNIQUE", property_name="n")["value"] == 1
    assert usage(client, "SUM", property_name="m")["value"] == 0  # no value is a decimal number as a whole


NO_NUMBERS = [" 12", "12 ", "  ", "\t12", "12\n", "\r12", "12\f", "\v12", "\u00a012", "1 2", "inf", "-inf", "Infinity", "nan",
              "1e400", "-1e400", "9" * 400, True, False, None, [12], {"n": 12}, ""]  # fmt: skip


@pytest.mark.slow
@table("others", [{}, {"backslash": "\\"}], ids=["fast", "slowly"])
@table("value", NO_NUMBERS, ids=repr)
def test_a_value_that_is_not_exactly_a_number_counts_as_0(
    client: httpx.Client, value: Any, others: dict[str, Any]
) -> None:
    store(
        client,
        event(timestamp=at(-1), properties={"n": value} | others),
        event(timestamp=at(-1), properties={"n": "3"}),
    )
    for kind, result in (("SUM", 3), ("AVG", 1.5), ("MAX", 3)):
        assert usage(client, kind, property_name="n")["value"] == result


@pytest.mark.slow
@table(("size", "windows"), [("MONTH", 24_000), ("WEEK", 104_000), ("DAY", 730_000)])
def test_the_number_of_windows_is_limited_and_the_length_of_the_range_is_not(
    client: httpx.Client, size: str, windows: int
) -> None:
    query = {"event_name": "call", "aggregation_type": "COUNT", "window_size": size}
    query |= {"start_time": "0025-01-01T00:00:00Z", "end_time": "2025-01-01T00:00:00Z"}
    assert client.post("/v1/events/usage", json=query).status_code == (200 if windows <= 100_000 else 400)


# ---------------------------------------------------------------------------------------------- 7: windows around changes of clocks

DAYS = [datetime(2000, 1, 1) + timedelta(days=number) for number in range(38 * 365 + 10)]
A_SUNDAY, HOUR_S, DAY_S = datetime(2000, 1, 2), 3600, 86_400
SHORT_SIZES = {**MINUTES, "DAY": 1440}  # they depend only on the moment and the offsets of a change


class Change(NamedTuple):
    zone: ZoneInfo
    moment_s: int  # the first second of the new offset
    before: timedelta
    after: timedelta

    def wall(self, moment_s: float) -> datetime:
        """Return what the zone's clock shows. Python compares and subtracts two times of one zone as their clock shows them."""
        return datetime.fromtimestamp(moment_s, self.zone)


def seconds(naive_utc: datetime) -> int:
    return int(naive_utc.replace(tzinfo=UTC).timestamp())


def changes_of(zone: ZoneInfo) -> list[Change]:
    found, offsets = [], [zone.utcoffset(day) or timedelta() for day in DAYS]
    for day, (before, after) in zip(DAYS, pairwise(offsets), strict=False):
        if before != after:
            span = range(seconds(day - before), seconds(day + timedelta(days=1) - after) + 1)
            has_changed = lambda second, after=after: datetime.fromtimestamp(second, zone).utcoffset() == after  # noqa: E731
            found.append(Change(zone, span[bisect_left(span, True, key=has_changed)], before, after))
    return found


@cache
def all_changes() -> list[Change]:
    """Return the changes of every zone in tzdata; of zones with identical data, take the first listed."""
    folder = files("tzdata") / "zoneinfo"
    names = (files("tzdata") / "zones").read_text().split()
    zones = {folder.joinpath(*name.split("/")).read_bytes(): name for name in reversed(names)}
    return [change for data, name in zones.items() for change in changes_of(ZoneInfo.from_file(io.BytesIO(data), name))]


def starts_by_the_minute(change: Change, minutes: int, since_s: int, until_s: int) -> list[int]:
    """Find the starts of windows by reading the zone's clock every minute.

    A window starts when the clock first shows a time in it; one of up to an hour starts again whenever the clock shows
    its first minute.
    """
    found, sunday, length = [], A_SUNDAY.replace(tzinfo=change.zone), timedelta(minutes=minutes)
    first = reached = datetime.min.replace(tzinfo=change.zone)
    for moment_s in range(since_s, until_s, 60):
        wall = change.wall(moment_s)
        past = (wall - sunday) % length
        start = wall - past
        if start > reached > first or (minutes <= 60 and not past):
            found.append(moment_s * 10**6)
        reached = max(reached, start)
    return found


# Where ranges start, before and after the change.
STARTS_AFTER_S = (-3600.5, -1800, -0.000001, 0, 1, 899, 900, 1800, 3599.5, 3600, 5400)


@pytest.mark.slow
@table("size", SHORT_SIZES)
def test_short_windows_start_when_clocks_first_show_their_start_or_jump_over_it(size: str) -> None:
    """Try one change for each pair of offsets and time of day; the others have the same windows."""
    alike = {(change.before, change.after, change.moment_s % DAY_S): change for change in all_changes()}
    minutes = SHORT_SIZES[size]
    # At least one whole window on each side of the change.
    hours = 2 if minutes == 1 else 4 if minutes <= 60 else minutes // 60 + 6
    for change in alike.values():
        since_s, until_s = change.moment_s - hours * HOUR_S, change.moment_s + hours * HOUR_S
        windows, end_us = Windows(size, change.zone), until_s * 10**6
        bounds = [*windows.bounds(since_s * 10**6, end_us)]
        assert bounds[0] <= since_s * 10**6 < bounds[1], change
        assert bounds[-2] < end_us <= bounds[-1], change
        assert [start for start in bounds[1:] if start < end_us] == [
            start for start in starts_by_the_minute(change, minutes, since_s, until_s) if start > since_s * 10**6
        ], change
        for after_s in STARTS_AFTER_S[:: 3 if minutes == 1 else 1]:
            start_us = change.moment_s * 10**6 + int(after_s * 10**6)
            assert [*windows.bounds(start_us, end_us)] == bounds[bisect_right(bounds, start_us) - 1 :], (
                change,
                after_s,
            )


def following(label: datetime, month_day: int | None) -> datetime:
    if month_day is None:
        return label + timedelta(days=7)
    first = label - timedelta(days=month_day - 1)
    return (first + timedelta(days=31)).replace(day=1) + timedelta(days=month_day - 1)


def changes_that_differ(size: str) -> Iterable[Change]:
    """Return one change of each kind. Those of a kind lie alike in the week or the year, as do the changes around them."""
    kinds = {}
    for _, of_zone in groupby(all_changes(), key=lambda change: id(change.zone)):
        changes = [*of_zone]
        for number, change in enumerate(changes):
            around = [other for other in changes[max(number - 5, 0) : number + 6]
                      if abs(other.moment_s - change.moment_s) < 70 * DAY_S]  # fmt: skip
            shifts = tuple((other.moment_s - change.moment_s, other.before, other.after) for other in around)
            utc = datetime.fromtimestamp(change.moment_s, UTC)
            place = change.moment_s % (7 * DAY_S) if size == "WEEK" else (utc.replace(year=2000 + utc.year % 4))
            kinds[place, shifts] = change
    return kinds.values()


@pytest.mark.slow
@table("size", ["WEEK", "MONTH"])
def test_weeks_and_months_start_at_midnight_or_when_clocks_jump_over_it(size: str) -> None:
    """Try one change of each kind, also with months that start on the day of the change."""
    for change in changes_that_differ(size):
        for day in {1, change.wall(change.moment_s).day} if size == "MONTH" else {None}:
            start_us, end_us = ((change.moment_s + days * DAY_S) * 10**6 for days in (-1, 34))
            bounds = [*Windows(size, change.zone, day or 1).bounds(start_us, end_us)]
            assert all(one < other for one, other in pairwise(bounds)), change
            assert bounds[0] <= start_us < bounds[1], change
            assert bounds[-2] < end_us <= bounds[-1], change
            wall = change.wall(bounds[0] // 10**6)
            label = wall.replace(hour=0, minute=0)
            for start in bounds:
                wall, second = change.wall(start // 10**6), start / 10**6
                assert label <= wall <= label + timedelta(days=1), change  # a whole day is skipped in Samoa
                assert all(change.wall(second - back) < label for back in (1, *range(900, 6 * HOUR_S, 900))), change
                label = following(label, day)


@table("size", ["30MIN", "HOUR"])
def test_an_event_before_the_range_is_not_counted_when_clocks_go_back_between_edges(
    client: httpx.Client, size: str
) -> None:
    """In Chatham, clocks went back from 3:45 to 2:45 at 14:00 UTC."""
    store(
        client, *[event(timestamp=f"2026-04-04T{time}:00Z") for time in ("13:20", "13:59", "14:00", "14:14", "14:15")]
    )
    answer = usage(client, window_size=size, timezone="Pacific/Chatham", start_time="2026-04-04T14:00:00Z",
                   end_time="2026-04-04T15:00:00Z")  # fmt: skip
    first = {"30MIN": (13, 45), "HOUR": (13, 15)}[size]
    assert windows_of(answer) == [(datetime(2026, 4, 4, *first, tzinfo=UTC), 2), (datetime(2026, 4, 4, 14, 15, tzinfo=UTC), 1)]  # fmt: skip


@table("size", ["30MIN", "HOUR"])
def test_an_event_is_in_the_window_that_holds_it_when_clocks_jump_over_an_edge(client: httpx.Client, size: str) -> None:
    """In Chatham, clocks went from 2:45 to 3:45 at 14:00 UTC, so they never showed 3:00 and 3:30."""
    began = datetime(2025, 9, 27, 14, tzinfo=UTC)
    store(client, *[event(timestamp=(began + timedelta(minutes=minute)).isoformat()) for minute in range(30)])
    answer = usage(client, window_size=size, timezone="Pacific/Chatham", start_time=began.isoformat(),
                   end_time="2025-09-27T15:00:00Z")  # fmt: skip
    assert windows_of(answer) == [(began, 15), (began + timedelta(minutes=15), 15)]


@pytest.mark.slow
@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Chatham"])
def test_a_range_may_have_100000_windows_on_the_night_when_clocks_go_back(zone: str) -> None:
    start_us = to_us(datetime(2026, 11, 1, 6, 30, tzinfo=UTC))
    spans = Windows("MINUTE", ZoneInfo(zone)).spans(start_us, start_us + 100_000 * 60 * 10**6)
    assert len(spans) == 100_000


# ---------------------------------------------------------------------------------------------- 8: monitoring


def test_monitoring_counts_the_last_24_hours_or_a_range(client: httpx.Client) -> None:
    times = (-DAY_US - 1, -DAY_US, -2_000_000, -1, 0)
    store(client, *[event(event_name=f"n{us}", external_customer_id=f"c{us}", timestamp=at(us)) for us in times])
    client.post("/v1/events", json=event(timestamp=at(-1)), headers={"x-api-key": STAGING_KEY})
    assert monitored(client) == monitored(client, start_time="", end_time="") == (3, [])
    assert monitored(client, start_time=at(-DAY_US - 1), end_time=at(1)) == (5, [])
    assert monitored(client, start_time=at(-2_000_000), end_time=at(-1)) == (1, [])  # the end is exclusive
    assert monitored(client, start_time=at(-1), end_time=at(-1)) == (0, [])
    points = [("2025-10-14T11:38:00Z", 1), ("2025-10-15T11:38:00Z", 2)]
    assert monitored(client, window_size="MINUTE") == (3, points)
    points = [("2025-10-14T00:00:00Z", 2), ("2025-10-15T00:00:00Z", 3)]
    assert monitored(client, window_size="DAY", start_time=at(-DAY_US - 1), end_time=at(1)) == (5, points)


@table("query", [{"start_time": at(-1)}, {"end_time": at()}, {"start_time": "x", "end_time": at()}, {"window_size": "DAYS"},
                 {"start_time": at(1), "end_time": at()}, {"start_time": at(-1), "end_time": ""},
                 {"window_size": "DAY", "start_time": "9999-12-31T00:00:00Z", "end_time": "9999-12-31T05:00:00Z"},
                 {"window_size": "MINUTE", "start_time": at(-100_000 * 60_000_000), "end_time": at()}])  # fmt: skip
def test_an_invalid_monitoring_query_is_refused(shared: httpx.Client, query: dict[str, Any]) -> None:
    refused(shared.get("/v1/events/monitoring", params=query))


@table(
    ("parameters", "number"), [("", 3), ("external_customer_id=one", 2), ("property_filters=n:1", 1), ("source=x", 0)]
)
def test_monitoring_counts_events_that_match_the_filters(tmp_path: Path, parameters: str, number: int) -> None:
    common = {"timestamp": "2025-10-15T11:00:00Z"}
    with serving(tmp_path) as client:
        store(client, event("a", external_customer_id="one", properties={"n": 1}, **common),
              event("b", external_customer_id="one", **common), event("c", **common))  # fmt: skip
        assert client.get(f"/v1/events/monitoring?{parameters}").json()["total_count"] == number


# ---------------------------------------------------------------------------------------------- 4: visibility lag

LAG_MS = 1500


@pytest.fixture
def lagging(tmp_path: Path) -> Iterator[tuple[httpx.Client, Mock]]:
    """A client of a server with a visibility lag, and the server's clock."""
    clock = Mock(return_value=NOW)
    with serving(tmp_path, visibility_lag_ms=LAG_MS, clock=clock) as client:
        yield client, clock


def test_with_a_lag_an_event_is_accepted_at_once_and_becomes_visible_later(lagging: tuple[httpx.Client, Mock]) -> None:
    client, clock = lagging
    seen: dict[str, Callable[[], int]] = {
        "list": lambda: len(page(client)["events"]),
        "query": lambda: total(client),
        "lookup": lambda: int(client.get("/v1/events/lookup", params={"id": "1"}).status_code == 200),
        "usage": lambda: int(usage(client)["value"]),
        "monitoring": lambda: client.get("/v1/events/monitoring").json()["total_count"],
    }
    assert counts(store(client, event("1", timestamp=at(-1)))) == (1, 0)
    for after_us, number in [(0, 0), (LAG_MS * 1000 - 1, 0), (LAG_MS * 1000, 1), (DAY_US - 10, 1)]:
        clock.return_value = NOW + after_us
        assert {name: ask() for name, ask in seen.items()} == dict.fromkeys(seen, number)
    assert counts(store(client, event("1"))) == (0, 1)


def test_the_lag_starts_when_an_event_arrives_not_at_its_timestamp(lagging: tuple[httpx.Client, Mock]) -> None:
    client, clock = lagging
    clock.return_value = NOW + LAG_MS * 1000
    store(client, event("old", timestamp=at(-DAY_US)))
    assert ids(client) == []


def test_monitoring_counts_events_that_are_not_visible_yet(lagging: tuple[httpx.Client, Mock]) -> None:
    client, clock = lagging
    store(client, event(), event())
    clock.return_value += 1_000_000
    store(client, event())
    lag = []
    for _ in range(4):
        lag.append(client.get("/v1/events/monitoring").json()["consumption_lag"])
        clock.return_value += 500_000
    assert lag == [3, 1, 1, 0]
    refused(client.get("/v1/events/monitoring", headers={"x-api-key": "unknown"}), 401, "unauthorized")
    of_staging = client.get("/v1/events/monitoring", headers={"x-api-key": STAGING_KEY})
    assert of_staging.json()["consumption_lag"] == 0
