"""POST /v1/events/analytics: examples worked out by hand, and random events compared with plain Python.

The comparison includes the usage of a meter; its other tests are in test_meter_usage.py.
"""

from __future__ import annotations

import asyncio
import json
import random
import re
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

import eventstore
from eventstore_extras import analytics_scans
from eventstore_extras.analytics import OPERATIONS
from eventstore_extras.usage import add_text_hash
from helpers import (
    KEY,
    LEDGER_START,
    NAMES,
    NOW,
    STAGING_KEY,
    ZONES,
    Json,
    Live,
    analytics,
    at,
    event,
    faulty_fields,
    listed,
    make_feature,
    make_meter,
    meter_of,
    metered_usage,
    metering,
    random_value,
    refused,
    rows_to_insert,
    store,
    table,
    usage,
    windows_of,
)
from meter_helpers import (
    ABSENT,
    BUCKETED,
    FEW,
    LIFETIME,
    RANGE,
    SECOND_US,
    kind_with_multiplier,
    make_meter_of_staging,
    sent,
)
from oracle import AGGREGATIONS, SIZES, Item, check_items, expected_analytics, expected_meter_usage, window_start


@pytest.fixture(scope="module")
def operations() -> Any:
    return OPERATIONS


@pytest.fixture
def few(client: httpx.Client) -> httpx.Client:
    store(client, *FEW)
    return client


# ---------------------------------------------------------------------------------------------- Items


def test_an_item_has_every_key(client: httpx.Client) -> None:
    """Compute an item with all its fields."""
    who = {"external_customer_id": "cust_42", "event_name": "llm.call"}
    store(client, *[event(f"{number}", timestamp=f"2026-01-0{day}T10:00:00Z", properties={"tokens": tokens, "model": model}, **who)
                    for number, (day, tokens, model) in enumerate([(1, 3.5, "gpt-4o"), (2, "8", "gpt-4o"), (2, 10.25, "gpt-4o"), (2, 1, "o3")])])  # fmt: skip
    meter = {"name": "Sum", "event_name": "llm.call", "aggregation": {"type": "SUM", "field": "tokens"}, "reset_usage": "BILLING_PERIOD",
             "filters": [{"key": "model", "values": ["gpt-4o"]}]}  # fmt: skip
    feature = make_feature(client, "Tokens", meter=meter, unit_singular="token", unit_plural="tokens")
    query = {"external_customer_id": "cust_42", "start_time": "2026-01-01T08:00:00Z", "end_time": "2026-02-01T00:00:00Z",
             "window_size": "DAY", "group_by": ["properties.model"]}  # fmt: skip
    nothing = {"subtotal": "0", "discount": "0", "cost": "0", "computed_commitment_utilized_amount": "0", "computed_overage_amount": "0",
               "computed_true_up_amount": "0", "buckets": None}  # fmt: skip
    (item,) = analytics(client, **query)
    assert item.pop("external_customer_id") in (None, "cust_42")
    assert item == {
        "feature_id": feature["id"], "name": "Tokens", "meter_id": feature["meter_id"], "event_name": "llm.call", "aggregation_type": "SUM",
        "total_usage": "21.75", "total_usage_display": "", "reporting_unit": None, "unit": "token", "unit_plural": "tokens", "event_count": 3,
        "source": None, "sources": None, "properties": {"model": "gpt-4o"}, "window_size": "DAY",
        "points": [{"timestamp": "2026-01-01T00:00:00Z", "usage": "3.5", "event_count": 1} | nothing,
                   {"timestamp": "2026-01-02T00:00:00Z", "usage": "18.25", "event_count": 2} | nothing],
        "subtotal": "0", "total_discount": "0", "total_cost": "0", "currency": None, "price_id": None, "price": None, "sub_line_item_id": None,
        "subscription_id": None, "subscription_line_item": None, "plan_id": None, "plan": None, "add_on_id": None, "addon": None,
        "commitment_info": None, "group": None, "bucket_summaries": None, "meter": None, "feature": None}  # fmt: skip


def test_an_item_without_a_feature_has_the_name_of_its_meter_and_no_units(few: httpx.Client) -> None:
    meter = make_meter(few, "SUM", name="Sum of n")
    (item,) = analytics(few, **RANGE)
    assert (item["feature_id"], item["name"], item["meter_id"]) == ("", "Sum of n", meter["id"])
    assert [
        item[key]
        for key in ("unit", "unit_plural", "reporting_unit", "external_customer_id", "window_size", "properties")
    ] == [None] * 6
    assert (item["total_usage_display"], item["points"], item["event_count"]) == ("", [], 5)


@table("nothing", [{}, {"external_customer_id": "nobody"}, {"feature_ids": ["feat_unknown"]}, {"sources": ["nowhere"]},
                   {"property_filters": {"n": ["nothing"]}}, {"group_by": ["source"], "window_size": "DAY", "external_customer_id": "nobody"}], ids=str)  # fmt: skip
@table("how", [{}, {"kind": "MAX", "bucket_size": "DAY"}], ids=["", "bucketed"])
def test_without_events_there_is_no_item(client: httpx.Client, nothing: dict[str, Any], how: dict[str, Any]) -> None:
    if nothing:
        store(client, *FEW)
    make_meter(client, **how)
    make_meter(client, event_name="other")
    assert analytics(client, **RANGE, **nothing) == []


CLAMPED = {"COUNT": "5", "SUM": "10.5", "AVG": "2.1", "MAX": "6.5", "COUNT_UNIQUE": "4", "LATEST": "0", "SUM_WITH_MULTIPLIER": "21",
           "WEIGHTED_SUM": "6.25"}  # fmt: skip


@table(("kind", "total"), CLAMPED.items(), ids=CLAMPED)
@table("reset", ["BILLING_PERIOD", "NEVER"])
def test_analytics_count_a_negative_value_as_0(few: httpx.Client, kind: str, total: str, reset: str) -> None:
    make_meter(few, kind, reset_usage=reset, **kind_with_multiplier(kind))
    (item,) = analytics(few, **RANGE)
    assert (item["aggregation_type"], item["total_usage"], item["event_count"]) == (kind, total, 5)


HOUR_US = 3600 * SECOND_US
NOON = "2025-10-14T12:00:00+00:00"


def after_noon(minutes: int, n: object = ABSENT, **properties: Any) -> dict[str, Any]:
    time = datetime.fromisoformat(NOON) + timedelta(minutes=minutes)
    return event(timestamp=time.isoformat(), properties=properties if n is ABSENT else properties | {"n": n})


TWO_HOURS = {"start_time": NOON, "end_time": "2025-10-14T14:00:00Z"}
OF_TWO_HOURS = [after_noon(0, 4, g="a", k="k"), after_noon(30, 2, g="b", k="k"), after_noon(60, -3, g="b", k="k"), after_noon(90, "5", g="a", k="k"),
                after_noon(105, k="k")]  # fmt: skip

POINTS = {  # aggregation -> the points of the two hours, the total
    "COUNT": (["2", "3"], "5"),
    "SUM": (["6", "5"], "11"),
    "AVG": (["3", "1.6666666666666667"], "2.2"),
    "MAX": (["4", "5"], "5"),
    "COUNT_UNIQUE": (["2", "2"], "4"),
    "LATEST": (["2", "0"], "0"),
    "SUM_WITH_MULTIPLIER": (["12", "10"], "22"),
    "WEIGHTED_SUM": (["5.5", "1.25"], "6.75"),  # weights refer to the whole range, not to the window
}


@table(("kind", "expected"), POINTS.items(), ids=POINTS)
def test_points_hold_the_usage_of_each_window(client: httpx.Client, kind: str, expected: Any) -> None:
    store(client, *OF_TWO_HOURS)
    make_meter(client, kind, **kind_with_multiplier(kind))
    (item,) = analytics(client, **TWO_HOURS, window_size="HOUR")
    assert ([point["usage"] for point in item["points"]], item["total_usage"]) == expected
    assert [point["event_count"] for point in item["points"]] == [2, 3]
    assert [point["timestamp"] for point in item["points"]] == ["2025-10-14T12:00:00Z", "2025-10-14T13:00:00Z"]
    assert item["window_size"] == "HOUR"


IN_WINDOWS = {  # size -> the windows of events with n = 1, 2, 4, 8, 16, 32; October 12 was a Sunday
    "MINUTE": "09-30T23:59=1 10-11T23:59=2 10-12T00:00=4 10-12T00:14=8 10-12T11:30=16 10-14T12:00=32",
    "15MIN": "09-30T23:45=1 10-11T23:45=2 10-12T00:00=12 10-12T11:30=16 10-14T12:00=32",
    "30MIN": "09-30T23:30=1 10-11T23:30=2 10-12T00:00=12 10-12T11:30=16 10-14T12:00=32",
    "HOUR": "09-30T23:00=1 10-11T23:00=2 10-12T00:00=12 10-12T11:00=16 10-14T12:00=32",
    "3HOUR": "09-30T21:00=1 10-11T21:00=2 10-12T00:00=12 10-12T09:00=16 10-14T12:00=32",
    "6HOUR": "09-30T18:00=1 10-11T18:00=2 10-12T00:00=12 10-12T06:00=16 10-14T12:00=32",
    "12HOUR": "09-30T12:00=1 10-11T12:00=2 10-12T00:00=28 10-14T12:00=32",
    "DAY": "09-30T00:00=1 10-11T00:00=2 10-12T00:00=28 10-14T00:00=32",
    "WEEK": "09-28T00:00=1 10-05T00:00=2 10-12T00:00=60",
    "MONTH": "09-01T00:00=1 10-01T00:00=62",
}


@table(("size", "expected"), IN_WINDOWS.items(), ids=IN_WINDOWS)
def test_windows_of_every_size(client: httpx.Client, size: str, expected: str) -> None:
    times = [
        "09-30T23:59:59",
        "10-11T23:59:59.999999",
        "10-12T00:00:00",
        "10-12T00:14:59",
        "10-12T11:30:00",
        "10-14T12:00:00",
    ]
    store(client, *[event(timestamp=f"2025-{time}Z", properties={"n": 2**number}) for number, time in enumerate(times)])
    make_meter(client, "SUM")
    (item,) = analytics(client, start_time="2025-09-30T00:00:30Z", end_time="2025-10-15T00:00:00Z", window_size=size)
    points = [(point["timestamp"], point["usage"]) for point in item["points"]]
    assert points == [(f"2025-{time}:00Z", value) for time, value in (part.split("=") for part in expected.split())]
    assert item["window_size"] == size


BUCKETED_ITEMS: dict[str, tuple[Json, Json, str, str, list[str]]] = {  # -> the aggregation, the request, the total, the size of points, the points
    "MAX": ({"kind": "MAX"}, {}, "9", "HOUR", []),
    "MAX in minutes": ({"kind": "MAX"}, {"window_size": "MINUTE"}, "9", "HOUR", ["4", "5"]),
    "MAX in hours": ({"kind": "MAX"}, {"window_size": "HOUR"}, "9", "HOUR", ["4", "5"]),
    "MAX in days: the largest": ({"kind": "MAX"}, {"window_size": "DAY"}, "9", "DAY", ["5"]),
    "MAX of groups": ({"kind": "MAX", "group_by": "g"}, {}, "11", "HOUR", []),
    "MAX of groups in hours": ({"kind": "MAX", "group_by": "g"}, {"window_size": "HOUR"}, "11", "HOUR", ["6", "5"]),
    "MAX of groups in weeks": ({"kind": "MAX", "group_by": "g"}, {"window_size": "WEEK"}, "11", "WEEK", ["6"]),
    "MAX of groups, split by a property": ({"kind": "MAX", "group_by": "g"}, {"group_by": ["properties.k"]}, "9", "HOUR", []),
    "MAX of groups, split by source": ({"kind": "MAX", "group_by": "g"}, {"group_by": ["source"], "window_size": "DAY"}, "9", "DAY", ["5"]),
    "MAX of groups, split by meter": ({"kind": "MAX", "group_by": "g"}, {"group_by": ["feature_id"]}, "11", "HOUR", []),
    "MAX of groups, split by customer": ({"kind": "MAX", "group_by": "g"}, {"group_by": ["external_customer_id"]}, "11", "HOUR", []),
    "SUM": ({"kind": "SUM"}, {}, "11", "HOUR", []),
    "SUM in minutes": ({"kind": "SUM"}, {"window_size": "15MIN"}, "11", "HOUR", ["6", "5"]),
    "SUM in days": ({"kind": "SUM"}, {"window_size": "DAY"}, "11", "DAY", ["11"]),
}  # fmt: skip


@table(("how", "query", "total", "width", "points"), BUCKETED_ITEMS.values(), ids=BUCKETED_ITEMS)
def test_points_of_a_bucketed_meter_have_the_larger_of_window_and_bucket_size(
    client: httpx.Client, how: dict[str, Any], query: dict[str, Any], total: str, width: str, points: list[Any]
) -> None:
    store(client, *OF_TWO_HOURS)
    make_meter(client, **how, bucket_size="HOUR")
    (item,) = analytics(client, **TWO_HOURS, **query)
    assert (item["total_usage"], item["window_size"]) == (total, width)
    assert [point["usage"] for point in item["points"]] == points
    assert item["event_count"] == 5


GROUPED_ITEMS: dict[str, tuple[Json, list[Any]]] = {  # request -> for each item its total, the size of its points, the points
    "whole": ({}, [("7", None, [])]),
    "in minutes": ({"window_size": "MINUTE"}, [("7", "MINUTE", ["4", "2", "0", "5", "0"])]),
    "in hours": ({"window_size": "HOUR"}, [("7", "HOUR", ["6", "5"])]),
    "in days": ({"window_size": "DAY"}, [("7", "DAY", ["7"])]),
    "split by a property": ({"group_by": ["properties.k"], "window_size": "HOUR"}, [("5", "HOUR", ["4", "5"])]),
    "split by its own group": ({"group_by": ["properties.g"]}, [("0", None, []), ("5", None, []), ("2", None, [])]),
    "split by source": ({"group_by": ["source"]}, [("5", None, [])]),
    "split by customer": ({"group_by": ["external_customer_id"], "window_size": "HOUR"}, [("7", "HOUR", ["6", "5"])]),
}  # fmt: skip


@table(("query", "expected"), GROUPED_ITEMS.values(), ids=GROUPED_ITEMS)
def test_a_maximum_with_groups_and_without_buckets_takes_the_range_for_its_bucket(
    client: httpx.Client, query: dict[str, Any], expected: list[Any]
) -> None:
    store(client, *OF_TWO_HOURS)
    make_meter(client, "MAX", group_by="g")
    items = analytics(client, **TWO_HOURS, **query)
    assert [
        (item["total_usage"], item["window_size"], [point["usage"] for point in item["points"]]) for item in items
    ] == expected
    assert sum(item["event_count"] for item in items) == 5


DECIMALS = {  # -> the values to add up, the total
    "no value": ([], "0"),
    "zero": ([0, -0.0, "-0"], "0"),
    "negative": ([-5, "-1e9"], "0"),
    "no dust": ([0.1, 0.2], "0.3"),
    "no trailing zeros": ([2.5, "100.500"], "103"),
    "thousands": ([1e3, "1e3"], "2000"),
    "15 digits": ([123456789012.3456789], "123456789012.346"),
    "15 digits before the point": ([2251799813685248.5], "2251799813685250"),
    "rounded up": ([999999999999999.9], "1000000000000000"),
    "a small one": ([1e-9], "0.000000001"),
    "a very small one": (["1e-20"], "0.00000000000000000001"),
    "a large one": ([1e21], "1" + "0" * 21),
    "the largest in full": ([9007199254740991], "9007199254740991"),
    "the first that is not": ([9007199254740992], "9007199254740990"),
    "many digits": (["12345678901234567890"], "12345678901234600000"),
    "a huge one": ([1e300], "1" + "0" * 300),
}


@table(("values", "total"), DECIMALS.values(), ids=DECIMALS)
def test_usage_is_a_decimal_string_in_plain_digits(client: httpx.Client, values: list[Any], total: str) -> None:
    store(client, sent("none", 10), *[sent(number, 10, value) for number, value in enumerate(values)])
    make_meter(client, "SUM")
    (item,) = analytics(client, window_size="DAY")
    assert (item["total_usage"], [point["usage"] for point in item["points"]]) == (total, [total])


AVERAGES = {  # -> the values, the average
    "a third": ([1, 0, 0], "0.3333333333333333"),
    "two thirds": ([1, 1, 0], "0.6666666666666666"),
    "a whole number": ([1, 3], "2"),
    "a half": ([1, 2], "1.5"),
    "a sum that is not 0.3": ([0.1, 0.2], "0.15000000000000002"),
    "a large one": ([1e21, 1e21], "1" + "0" * 21),
    "the first whole number above 2**53": ([9007199254740992, 9007199254740992], "9007199254740992"),
    "a small one": ([1e-9, 2e-9], "0.0000000015000000000000002"),
    "nothing": ([0, "x"], "0"),
    "digits before and after the point": ([1000000, 1000001, 1000001], "1000000.6666666666"),
}


@table(("values", "average"), AVERAGES.values(), ids=AVERAGES)
def test_an_average_is_the_shortest_text_of_its_float(client: httpx.Client, values: list[Any], average: str) -> None:
    store(client, *[sent(number, 10, value) for number, value in enumerate(values)])
    make_meter(client, "AVG")
    (item,) = analytics(client, window_size="DAY")
    assert (item["total_usage"], [point["usage"] for point in item["points"]]) == (average, [average])


def test_a_sum_beyond_the_largest_float_is_answered_as_the_largest_float(client: httpx.Client) -> None:
    store(client, sent(1, 10, 1.7e308, g="a"), sent(2, 10, 1.7e308, g="b"))
    for how in ({"kind": "SUM"}, {"kind": "SUM_WITH_MULTIPLIER", "multiplier": "1e300"}, {"kind": "AVG"}, {"kind": "WEIGHTED_SUM"},
                {"kind": "MAX", "bucket_size": "DAY", "group_by": "g"}, {"kind": "SUM", "bucket_size": "DAY"}):  # fmt: skip
        make_meter(client, **how)
    for item in analytics(client, window_size="DAY"):
        assert all(re.fullmatch(r"\d{300,}", text) for text in (item["total_usage"], item["points"][0]["usage"])), item


DISPLAYS = [  # usage, conversion rate, display usage
    (21.75, 1000, "0.02"), (1500, 1000, "1.5"), (2000, "1000", "2"), (1005, 1000, "1.01"), (12345, 1000, "12.35"), (5, 1000, "0.01"), (4, 1000, "0"),
    (1, 8, "0.13"), (3, 8, "0.38"), (1, 3, "0.33"), (2, 3, "0.67"), (5, 0.1, "50"), (1, "0.001", "1000"), (0, 1000, "0"), (1.015, 1, "1.02"),
    (1e15, 1, "1000000000000000"), (1, 1e-9, "1000000000"), (199, 100, "1.99"), (1995, 1000, "2"), (100, 10, "10"),
]  # fmt: skip


@table(("value", "rate", "shown"), DISPLAYS)
def test_display_usage_is_divided_by_the_rate_and_rounded_half_away_from_zero(
    client: httpx.Client, value: float, rate: Any, shown: str
) -> None:
    store(client, sent(1, 10, value))
    unit = {"unit_singular": "thousand", "unit_plural": "thousands", "conversion_rate": rate}
    meter = make_meter(client, "SUM")
    make_feature(client, meter_id=meter["id"], reporting_unit=unit)
    (item,) = analytics(client)
    assert (item["total_usage_display"], item["reporting_unit"]) == (shown, unit | {"conversion_rate": float(rate)})


# ---------------------------------------------------------------------------------------------- Dimensions


def split(items: list[dict[str, Any]], *keys: str) -> dict[tuple[Any, ...], str]:
    """Return the items' usage by some of their keys."""
    by_keys = {tuple(tuple(sorted(item[key].items())) if isinstance(item[key], dict) else item[key] for key in keys): item["total_usage"]
               for item in items}  # fmt: skip
    assert len(by_keys) == len(items)
    return by_keys


@pytest.fixture
def mixed(client: httpx.Client) -> httpx.Client:
    store(client, sent(1, 10, 1, source="app", model="a", region="eu"), sent(2, 10, 2, source="web", model="a"),
          sent(4, 10, 4, model="b", region=None), sent(8, 10, 8, source="app", model=5, external_customer_id="other"),
          sent(16, 10, 16, source="app", model="5", region="eu"), sent(32, 10, 32, model=True))  # fmt: skip
    make_meter(client, "SUM", name="Sum")
    return client


def pairs(**properties: Any) -> tuple[Any, ...]:
    return tuple(sorted(properties.items()))


SPLITS = {  # -> group_by, keys of an item, the usage by these keys
    "feature": (["feature_id"], ("name",), {("Sum",): "63"}),
    "meter, twice": (["meter_id", "feature_id", "meter_id"], ("name",), {("Sum",): "63"}),
    "source": (["source"], ("source",), {("app",): "25", ("web",): "2", (None,): "36"}),
    "a property": (["properties.model"], ("properties",),
                   {(pairs(model="a"),): "3", (pairs(model="b"),): "4", (pairs(model="5"),): "24", (pairs(model="true"),): "32"}),
    "a property that is mostly missing": (["properties.region"], ("properties",), {(pairs(region="eu"),): "17", ((),): "46"}),
    "both": (["properties.region", "source"], ("source", "properties"),
             {("app", pairs(region="eu")): "17", ("app", ()): "8", ("web", ()): "2", (None, ()): "36"}),
    "two properties": (["properties.region", "properties.model"], ("properties",),
                       {(pairs(region="eu", model="a"),): "1", (pairs(model="a"),): "2", (pairs(model="b"),): "4", (pairs(model="5"),): "8",
                        (pairs(region="eu", model="5"),): "16", (pairs(model="true"),): "32"}),
    "customer": (["external_customer_id"], ("external_customer_id",), {("cust",): "55", ("other",): "8"}),
    "customer and source": (["source", "external_customer_id"], ("external_customer_id", "source"),
                            {("cust", "app"): "17", ("cust", "web"): "2", ("cust", None): "36", ("other", "app"): "8"}),
    "twice": (["source", "source", "properties.region", "properties.region"], ("source", "properties"),
              {("app", pairs(region="eu")): "17", ("app", ()): "8", ("web", ()): "2", (None, ()): "36"}),
    "a property of nobody": (["properties.nothing"], ("properties",), {((),): "63"}),
}  # fmt: skip


@table(("group_by", "keys", "expected"), SPLITS.values(), ids=SPLITS)
def test_usage_is_split_by_dimensions(
    mixed: httpx.Client, group_by: list[str], keys: tuple[str, ...], expected: dict[tuple[Any, ...], str]
) -> None:
    items = analytics(mixed, group_by=group_by)
    assert split(items, *keys) == expected
    if "source" not in keys:
        assert {item["source"] for item in items} == {None}
    if "properties" not in keys:
        assert [item["properties"] for item in items] == [None] * len(items)


def test_the_group_without_a_property_or_source_has_only_its_own_points(mixed: httpx.Client) -> None:
    items = analytics(mixed, group_by=["properties.region", "source"], window_size="DAY")
    assert all([point["usage"] for point in item["points"]] == [item["total_usage"]] for item in items)
    assert all([point["event_count"] for point in item["points"]] == [item["event_count"]] for item in items)
    assert sum(item["event_count"] for item in items) == 6


NARROWED = {
    "a customer": ({"external_customer_id": "other"}, "8"),
    "no customer": ({"external_customer_id": ""}, "63"),
    "sources": ({"sources": ["app", "nowhere"]}, "25"),
    "two sources": ({"sources": ["app", "web"]}, "27"),
    "a property": ({"property_filters": {"model": ["a", "true"]}}, "35"),
    "two properties": ({"property_filters": {"model": ["a", "5"], "region": ["eu"]}}, "17"),
    "no values": ({"property_filters": {"model": []}}, "63"),
    "no filters": ({"property_filters": {}}, "63"),
    "all of it": ({"sources": ["app"], "property_filters": {"region": ["eu"]}, "external_customer_id": "cust"}, "17"),
    "what has no effect": ({"include_children": True, "breakdown_bucket": True, "external_customer_ids": ["other"], "expand": ["price", "colour"]}, "63"),
    "null": (dict.fromkeys(("external_customer_id", "feature_ids", "sources", "property_filters", "start_time", "end_time", "window_size", "group_by",
                            "expand", "include_children", "breakdown_bucket")), "63"),
    "empty": ({"window_size": "", "group_by": [], "expand": []}, "63"),
}  # fmt: skip


@table(("query", "total"), NARROWED.values(), ids=NARROWED)
def test_usage_is_narrowed_by_filters(mixed: httpx.Client, query: dict[str, Any], total: str) -> None:
    assert [item["total_usage"] for item in analytics(mixed, **query)] == [total]


def test_expand_lists_the_sources_of_an_item(mixed: httpx.Client) -> None:
    """An event without a source adds none."""
    (item,) = analytics(mixed, expand=["source"])
    assert (item["sources"], item["source"]) == (["app", "web"], None)
    by_region = analytics(mixed, expand=["source"], group_by=["properties.region"])
    assert [item["sources"] for item in sorted(by_region, key=lambda item: len(item["properties"]))] == [
        ["app", "web"],
        ["app"],
    ]
    assert {item["sources"] for item in analytics(mixed, expand=["source"], group_by=["source"])} == {None}
    assert {item["sources"] for item in analytics(mixed)} == {None}


def test_expand_adds_the_meter_and_the_feature_to_an_item(few: httpx.Client) -> None:
    feature = make_feature(few, "A", metadata={"a": "b"})
    make_meter(few, name="B")
    meter = feature.pop("meter")
    owned = {"environment_id": "development", "created_by": "", "updated_by": ""}
    with_feature, without = analytics(few, **RANGE, expand=["meter", "feature"])
    assert with_feature["meter"] == meter | owned
    assert with_feature["feature"] == feature
    assert (without["meter"]["name"], without["feature"]) == ("B", None)
    (first, _) = analytics(few, **RANGE, expand=["feature"])
    assert (first["meter"], first["feature"]) == (None, feature)


def test_items_are_sorted_by_name_meter_source_and_properties(client: httpx.Client) -> None:
    for source in ("b", "a"):
        store(client, *[sent(f"{source}{model}", 10, source=source, model=model) for model in "yx"])
    makes = {name: [make_meter(client, name=name)["id"] for _ in range(2)] for name in ("m", "l")}
    make_feature(client, "a", meter_id=makes["m"][1])
    in_order = [
        makes["m"][1],
        *makes["l"],
        makes["m"][0],
    ]  # sorted by the name of the feature or, without a feature, of the meter
    items = analytics(client, group_by=["properties.model", "source"])
    assert [(item["meter_id"], item["source"], item["properties"]["model"]) for item in items] == [
        (meter_id, source, model) for meter_id in in_order for source in "ab" for model in "xy"
    ]


# ---------------------------------------------------------------------------------------------- Features and archived meters


def test_feature_ids_select_the_meters_of_these_features(few: httpx.Client) -> None:
    one, other, boolean = make_feature(few, "A"), make_feature(few, "B"), make_feature(few, "C", type="boolean")
    make_meter(few, name="D")
    assert [item["name"] for item in analytics(few, **RANGE)] == ["A", "B", "D"]
    assert [
        item["name"] for item in analytics(few, **RANGE, feature_ids=[other["id"], "feat_unknown", boolean["id"]])
    ] == ["B"]
    assert [item["name"] for item in analytics(few, **RANGE, feature_ids=[one["id"], other["id"]])] == ["A", "B"]
    for nothing in ([boolean["id"]], ["feat_unknown"], [""]):
        assert analytics(few, **RANGE, feature_ids=nothing) == []


def test_a_requested_then_a_published_then_the_oldest_feature_names_a_meter(tmp_path: Path) -> None:
    clock = Mock(return_value=NOW)
    with metering(tmp_path, clock=clock) as client:
        store(client, *FEW)
        meter_id = make_meter(client)["id"]
        features = {}
        for name in ("Old", "Older", "New"):
            clock.return_value += -1000 if name == "Older" else 2000
            features[name] = make_feature(client, name, meter_id=meter_id)["id"]

        def names(**query: Any) -> list[str]:
            items = analytics(client, **RANGE, **query)
            assert [item["feature_id"] for item in items] == [features[item["name"]] for item in items]
            return [item["name"] for item in items]

        assert names() == ["Older"]
        assert names(feature_ids=[features["New"]]) == ["New"]
        assert names(feature_ids=[features["New"], features["Old"]]) == ["Old"]
        client.delete(f"/v1/features/{features['Older']}")
        assert names() == ["Old"]  # a published feature comes before an archived one
        assert names(feature_ids=[features["Older"]]) == ["Older"]
        client.delete(f"/v1/features/{features['Old']}")
        client.delete(f"/v1/features/{features['New']}")
        assert names() == ["Older"]  # all features and the meter are archived now


@table("how", ["the meter", "its feature"])
def test_an_archived_meter_counts_the_events_stored_before_it_was_archived(tmp_path: Path, how: str) -> None:
    clock = Mock(return_value=NOW)
    with metering(tmp_path, clock=clock) as client:
        feature = make_feature(client)
        store(client, sent("before", 10))
        clock.return_value += SECOND_US
        path = f"meters/{feature['meter_id']}" if how == "the meter" else f"features/{feature['id']}"
        assert client.delete(f"/v1/{path}").status_code == 200
        clock.return_value += SECOND_US
        store(client, sent("after", 10))
        assert [item["total_usage"] for item in analytics(client)] == ["1"]
        assert client.delete(f"/v1/meters/{feature['meter_id']}").status_code == 200  # a second time changes nothing
        (item,) = analytics(client, window_size="DAY", group_by=["source"], feature_ids=[feature["id"]])
        assert (item["total_usage"], item["event_count"], item["points"][0]["usage"]) == ("1", 1, "1")
        assert metered_usage(client, feature["meter_id"])["value"] == 2


def test_analytics_counts_events_from_before_the_meter(few: httpx.Client) -> None:
    assert analytics(few, **RANGE) == []
    make_meter(few)
    assert [item["total_usage"] for item in analytics(few, **RANGE)] == ["5"]


# ---------------------------------------------------------------------------------------------- Bad requests and limits

NO_OBJECTS = ["", "[]", "null", "5", "{", '{"meter_id": "\\ud83d"}', "[" * 5000]


@table("content", NO_OBJECTS)
@table("path", ["usage/meter", "analytics"])
def test_a_body_other_than_a_json_object_is_a_400(shared: httpx.Client, path: str, content: str) -> None:
    refused(shared.post(f"/v1/events/{path}", content=content))


BAD_ANALYTICS = [
    *[({"group_by": [name]}, "group_by") for name in ("colour", "", "properties.", "properties", "name", "event_name", "properties.a-b", "properties.a b",
                                                     'properties.a"b', "PROPERTIES.a", "Source", "customer_id", "properties.$", "a.properties.b", 5)],
    ({"group_by": "source"}, "group_by"), ({"group_by": {}}, "group_by"), ({"window_size": "2HOUR"}, "window_size"), ({"window_size": "day"}, "window_size"),
    ({"window_size": 5}, "window_size"), ({"start_time": "yesterday"}, "start_time"), ({"end_time": "2025-01-01"}, "end_time"),
    ({"start_time": at(1), "end_time": at()}, "end_time"), ({"start_time": at(1)}, "end_time"), ({"feature_ids": "feat_1"}, "feature_ids"),
    ({"feature_ids": [5]}, "feature_ids"), ({"sources": "app"}, "sources"), ({"sources": [5]}, "sources"), ({"property_filters": []}, "property_filters"),
    ({"property_filters": {"a": "x"}}, "property_filters"), ({"property_filters": {"": ["x"]}}, "property_filters"), ({"expand": "meter"}, "expand"),
    ({"include_children": "yes"}, "include_children"), ({"breakdown_bucket": 5}, "breakdown_bucket"), ({"external_customer_id": 5}, "external_customer_id"),
    ({"window_size": "MINUTE", "start_time": at(-100_001 * 60 * SECOND_US)}, "window_size"),
]  # fmt: skip


@table(("bad", "field"), BAD_ANALYTICS, ids=str)
def test_a_bad_request_for_analytics_is_a_400_that_names_the_field(
    shared: httpx.Client, bad: dict[str, Any], field: str
) -> None:
    (faulty,) = faulty_fields(shared.post("/v1/events/analytics", json=bad))
    assert faulty.startswith(field)


@table("name", ["properties.größe", "properties._", "properties.a.b.c", "properties.1", "properties." + "x" * 1000])
def test_an_odd_name_of_a_dimension_is_never_a_500(shared: httpx.Client, name: str) -> None:
    assert shared.post("/v1/events/analytics", json={"group_by": [name]}).status_code in (200, 400)


def test_one_answer_names_all_faults_of_a_request_for_analytics(shared: httpx.Client) -> None:
    bad = {"group_by": ["colour"], "window_size": "x", "start_time": "y", "expand": 5}
    assert faulty_fields(shared.post("/v1/events/analytics", json=bad)) == [
        "expand",
        "group_by[0]",
        "start_time",
        "window_size",
    ]


@pytest.mark.slow
def test_100000_windows_are_answered_and_more_are_a_400(client: httpx.Client) -> None:
    store(client, sent(1, 10))
    make_meter(client)
    minute = 60 * SECOND_US
    end = datetime.fromisoformat("2025-10-16T00:00:00+00:00")
    for number, status in ((100_000, 200), (100_001, 400)):
        query = {
            "window_size": "MINUTE",
            "end_time": end.isoformat(),
            "start_time": (end - timedelta(microseconds=number * minute)).isoformat(),
        }
        response = client.post("/v1/events/analytics", json=query)
        assert response.status_code == status
    refused(response, part="100000")


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Ten meters over 10,001 events in different minutes with different values; 10,000 of them have the source `most`."""
    with metering(tmp_path_factory.mktemp("wide")) as client:
        events = [
            sent(number, 60 * (number + 1), k=f"{number}", source="most" if number else "") for number in range(10_001)
        ]
        for start in range(0, len(events), 1000):
            store(client, *events[start : start + 1000])
        for number in range(10):
            make_meter(client, name=f"{number}")
        yield client


@pytest.mark.slow
@table(
    ("query", "what"),
    [({"group_by": ["properties.k"]}, "items"), ({"window_size": "MINUTE"}, "points")],
    ids=["items", "points"],
)
def test_100000_items_or_points_are_answered_and_more_are_a_400(wide: Any, query: dict[str, Any], what: str) -> None:
    response = wide.post("/v1/events/analytics", json={"sources": ["most"]} | query)
    assert response.status_code == 200, response.text[:500]
    assert response.content.count(b'"meter_id":' if what == "items" else b'"timestamp":') == 100_000
    refused(wide.post("/v1/events/analytics", json=query), part="100000")
    assert len(analytics(wide)) == 10  # the server still answers


LIMITED: dict[str, tuple[str, int, Json, str]] = {  # -> the limit, its value in the test, the request, the faulty field
    "windows of bucketed meters": ("_MAX_SPANS", 30, {"window_size": "MINUTE"}, "window_size"),
    "results by group": ("_MAX_CELLS", 5, {"group_by": ["properties.g"]}, "group_by"),
    "results by window": ("_MAX_CELLS", 5, {"window_size": "15MIN"}, "window_size"),
    "results by meter": ("_MAX_CELLS", 4, {}, "feature_ids"),
}  # fmt: skip


@table(("limit", "number", "query", "field"), LIMITED.values(), ids=LIMITED)
def test_windows_and_results_of_all_meters_together_are_limited(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch, limit: str, number: int, query: Json, field: str
) -> None:
    store(client, *OF_TWO_HOURS)
    one = make_feature(client, "One", meter=meter_of("MAX", bucket_size="15MIN"))["id"]
    monkeypatch.setattr(analytics_scans, limit, number)
    assert len(analytics(client, **TWO_HOURS, **query, feature_ids=[one])) > 0
    for name in ("Two", "Three", "Four", "Five"):
        make_feature(client, name, meter=meter_of("MAX", bucket_size="15MIN"))
    response = client.post("/v1/events/analytics", json=TWO_HOURS | query)
    assert faulty_fields(response) == [field]
    assert f"makes more than {number} " in response.json()["message"]


def test_results_that_are_found_at_the_same_time_count_together(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    store(client, *OF_TWO_HOURS)
    make_feature(client, "One", meter=meter_of("MAX", bucket_size="15MIN"))
    two_scans = threading.Barrier(2)

    def begin_together(conn: sqlite3.Connection) -> None:
        two_scans.wait(timeout=20)
        add_text_hash(conn)

    monkeypatch.setattr(analytics_scans, "add_text_hash", begin_together)
    for limit, fields in (5, None), (4, ["window_size"]):
        monkeypatch.setattr(analytics_scans, "_MAX_CELLS", limit)
        response = client.post("/v1/events/analytics", json=TWO_HOURS | {"window_size": "15MIN"})
        assert fields == (None if response.status_code == 200 else faulty_fields(response))


@table("window", [{}, {"window_size": "DAY"}], ids=["", "with points"])
def test_analytics_tells_long_texts_apart(client: httpx.Client, window: Json) -> None:
    """Long texts are compared by their hashes."""
    texts = ["x" * 32, "x" * 64, "x" * 65, "x" * 50_000 + "a", "x" * 50_000 + "b"]
    store(client, *[sent(number, 10, text) for number, text in enumerate([*texts, *texts])])
    make_meter(client, "COUNT_UNIQUE")
    (item,) = analytics(client, **window)
    assert (item["total_usage"], [point["usage"] for point in item["points"]]) == ("5", ["5"] if window else [])


@pytest.mark.slow
def test_more_than_100000_groups_are_a_400(tmp_path: Path) -> None:
    (row,) = rows_to_insert("one")
    rows = [row._replace(id=f"{number}", timestamp_us=NOW - 1 - number, source="most" if number else "", properties=f'{{"k": {number}}}')
            for number in range(100_001)]  # fmt: skip
    with metering(tmp_path) as client:
        make_meter(client)
        store(client, event("first", event_name="other"))  # creates the environment
        with closing(eventstore.connect(str(tmp_path / "events.db"))) as conn:
            assert eventstore.insert_events(conn, rows, 5) == 100_001
        by_value = {"group_by": ["properties.k"]}
        refused(client.post("/v1/events/analytics", json=by_value), part="100000")
        response = client.post("/v1/events/analytics", json=by_value | {"sources": ["most"]})
        assert (response.status_code, response.content.count(b'"meter_id":')) == (200, 100_000)
        assert [item["total_usage"] for item in analytics(client)] == ["100001"]


def test_analytics_and_usage_that_take_too_long_are_a_503(tmp_path: Path) -> None:
    with metering(tmp_path) as client:
        store(client, *[sent(number, number % 90, number, k=f"{number}") for number in range(1000)])
        meter = make_meter(client, "COUNT_UNIQUE")
    with metering(tmp_path, query_timeout_s=0.0001) as client:
        query = {"group_by": ["properties.k", "source"], "window_size": "MINUTE"}
        for path, body in (("analytics", query), ("usage/meter", {"meter_id": meter["id"], "window_size": "MINUTE"})):
            response = client.post(f"/v1/events/{path}", json=body)
            refused(response, 503, "service_unavailable")
            assert int(response.headers["Retry-After"]) > 0
        assert client.get("/health").status_code == 200


def test_the_visibility_lag_hides_events_from_usage_and_analytics(tmp_path: Path) -> None:
    clock = Mock(return_value=NOW)
    with metering(tmp_path, visibility_lag_ms=1500, clock=clock) as client:
        meter = make_meter(client)
        store(client, sent(1, 10))
        assert (metered_usage(client, meter["id"])["value"], analytics(client)) == (0, [])
        assert [one["id"] for one in listed(client)] == [meter["id"]]
        clock.return_value += 1_500_000
        assert (metered_usage(client, meter["id"])["value"], len(analytics(client))) == (1, 1)


# ---------------------------------------------------------------------------------------------- Unusual names and values

ODD_TEXTS = ["a.b", 'quo"te', "größe", "back\\slash", "$", "it's", "世[0]", " ", "😀", "a\nb", "a\tb", "a\x1eb", '","', "}", "null", "true", "007",
             "e\u0301", "line\u2028", "' OR 1=1 --", "%", "_", "x" * 300]  # fmt: skip


# The server removes white space around the key of a meter's filter.
@pytest.mark.slow
@table("name", [*[text for text in ODD_TEXTS if text == text.strip()], "properties", "n"], ids=ascii)
@table("ascii_only", [True, False], ids=["escaped", "as it is"])
def test_fields_filters_and_groups_take_any_property_name(client: httpx.Client, name: str, ascii_only: bool) -> None:
    sent_events = [sent(number, 10, **{name: value}) for number, value in enumerate([3, "4", 5])] + [
        sent("none", 10, other=9)
    ]
    content = json.dumps({"events": sent_events}, ensure_ascii=ascii_only).encode()
    assert client.post("/v1/events/bulk", content=content).status_code == 202
    of_field = make_meter(client, "SUM", name="a", field=name)
    of_filter = make_meter(client, name="b", filters={name: ["3", "4"]})
    of_group = make_meter(client, "MAX", name="c", field=name, bucket_size="DAY", group_by=name)
    values = [metered_usage(client, meter["id"])["value"] for meter in (of_field, of_filter, of_group)]
    assert values == [12, 2, 12]
    assert [item["total_usage"] for item in analytics(client)] == ["12", "2", "12"]
    by_filter = analytics(client, property_filters={name: ["4", "5"]})
    assert [item["total_usage"] for item in by_filter] == ["9", "1", "9"]
    assert metered_usage(client, of_field["id"], filters={name: ["4", "5"]})["value"] == 9


@table("name", [text for text in ODD_TEXTS if text != text.strip()], ids=ascii)
def test_fields_and_groups_take_names_with_white_space_around_them(client: httpx.Client, name: str) -> None:
    store(client, *[sent(number, 10, **{name: value}) for number, value in enumerate([3, "4", 5])])
    of_field = make_meter(client, "SUM", field=name)
    of_group = make_meter(client, "MAX", field=name, group_by=name)
    assert [metered_usage(client, meter["id"])["value"] for meter in (of_field, of_group)] == [12, 12]
    assert metered_usage(client, of_field["id"], filters={name: ["4", "5"]})["value"] == 9


@table("ascii_only", [True, False], ids=["escaped", "as it is"])
def test_any_text_can_be_a_group(client: httpx.Client, ascii_only: bool) -> None:
    texts = [*ODD_TEXTS, "", "\0", "a\0b"]
    sent_events = [
        sent(number, 10, 2, k=text, source=text or "-", event_name="odd") for number, text in enumerate(texts)
    ]
    content = json.dumps({"events": sent_events}, ensure_ascii=ascii_only).encode()
    assert client.post("/v1/events/bulk", content=content).status_code == 202
    make_meter(client, "SUM", event_name="odd")
    by_property = analytics(client, group_by=["properties.k"])
    assert sorted(item["properties"]["k"] for item in by_property) == sorted(texts)
    by_source = analytics(client, group_by=["source"], window_size="DAY")
    assert sorted(item["source"] for item in by_source) == sorted(text or "-" for text in texts)
    assert {item["total_usage"] for item in [*by_property, *by_source]} == {"2"}
    assert {(len(item["points"]), item["points"][0]["usage"]) for item in by_source} == {(1, "2")}


@table("value", [{"a": [1, 2]}, [7, "x"], {}, []], ids=str)
def test_objects_and_arrays_are_grouped_by_their_json_text(client: httpx.Client, value: Any) -> None:
    """COUNT_UNIQUE uses the same text."""
    body = {"events": [sent(1, 10, k=value), sent(2, 10, k=value), sent(3, 10)]}
    assert client.post("/v1/events/bulk", content=json.dumps(body)).status_code == 202
    make_meter(client)
    items = analytics(client, group_by=["properties.k"])
    text = json.dumps(value, separators=(",", ":"))
    assert split(items, "properties") == {(pairs(k=text),): "2", ((),): "1"}


# ---------------------------------------------------------------------------------------------- Compared with plain Python


def test_the_rules_in_python_agree_with_examples_by_hand() -> None:
    """Check the rules in Python, with which the tests below compare the server."""

    def meter(kind: str, reset: str = "NEVER", filters: dict[str, Any] | None = None, **how: Any) -> Json:
        aggregation = {"type": kind, "field": "n", "multiplier": None, "bucket_size": None, "group_by": None} | how
        conditions = [{"key": key, "values": values} for key, values in (filters or {}).items()]
        return {"event_name": "call", "aggregation": aggregation, "filters": conditions, "reset_usage": reset}

    events = [one | {"source": ""} for one in FEW]
    for kind, values in LIFETIME.items():
        for reset, value in zip(("BILLING_PERIOD", "NEVER"), values, strict=True):
            whole, windows = expected_meter_usage(meter(kind, reset, **kind_with_multiplier(kind)), events, RANGE)
            assert whole == pytest.approx(value)
            assert windows == []
        items = expected_analytics(meter(kind, **kind_with_multiplier(kind)), events, RANGE)
        assert [*items] == [()]
        assert items[()].usage == pytest.approx(float(CLAMPED[kind]))
        assert items[()]._replace(usage=0) == Item(0, 5, {})
    for how, buckets, value, lifetime in BUCKETED.values():
        for reset, expected in (("BILLING_PERIOD", value), ("NEVER", lifetime)):
            bucketed = meter(how["kind"], reset, bucket_size="MINUTE", group_by=how.get("group_by"))
            whole, results = expected_meter_usage(bucketed, events, RANGE)
            assert (whole, [each for _, each in results]) == (expected, buckets)
    of_two_hours = [one | {"source": "", "event_id": f"{number}"} for number, one in enumerate(OF_TWO_HOURS)]
    for kind, (points, total) in POINTS.items():
        (item,) = expected_analytics(
            meter(kind, **kind_with_multiplier(kind)), of_two_hours, TWO_HOURS | {"window_size": "HOUR"}
        ).values()
        assert item.usage == pytest.approx(float(total))
        assert item.width == "HOUR"
        assert [point.usage for point in item.points.values()] == pytest.approx([float(point) for point in points])
    for how, query, total, width, points in BUCKETED_ITEMS.values():
        bucketed = meter(how["kind"], bucket_size="HOUR", group_by=how.get("group_by"))
        (item,) = expected_analytics(bucketed, of_two_hours, TWO_HOURS | query).values()
        assert (item.usage, item.width, [point.usage for point in item.points.values()]) == (
            float(total),
            width,
            [*map(float, points)],
        )


HOW: dict[str, list[dict[str, str]]] = {  # aggregation type -> the other fields of the ledger's meters
    "COUNT": [{}],
    "SUM": [{}, {"bucket_size": "DAY"}, {"bucket_size": "15MIN"}],
    "AVG": [{}],
    "MAX": [
        {},
        {"bucket_size": "6HOUR"},
        {"bucket_size": "DAY", "group_by": "region"},
        {"bucket_size": "MONTH", "group_by": "tokens"},
        {"group_by": "region"},
        {"group_by": "tokens"},
    ],
    "COUNT_UNIQUE": [{}],
    "LATEST": [{}],
    "SUM_WITH_MULTIPLIER": [{"multiplier": "2.5"}],
    "WEIGHTED_SUM": [{}],
}
REGIONS = ["eu", "us", "5", 5, True, None, 'e"u', 2.5, ""]


@pytest.fixture(scope="module")
def ledger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Yield a client, its meters of all types, and for each meter the events that it may count.

    Half of the events were stored before some meters were archived, half of them after. They cover 18 days; half of
    them are sent in ASCII.
    """
    choose, clock = random.Random(13), Mock(return_value=NOW)
    events = []
    for number in range(300):
        time = LEDGER_START + (
            timedelta(seconds=choose.randrange(18 * 86_400)) if number % 4 else timedelta(hours=number)
        )
        properties = {name: random_value(choose) for name in NAMES if choose.random() < 0.8}
        properties |= {} if number % 5 == 0 else {"region": choose.choice(REGIONS)}
        events.append(event(f"{choose.randrange(10**6):06}-{number}", event_name=choose.choice(["call", "call", "other"]), timestamp=time.isoformat(),
                            external_customer_id=choose.choice("xyz"), customer_id=choose.choice(["", "c1"]),
                            source=choose.choice(["", "app", "web"]), properties=properties))  # fmt: skip
    with metering(tmp_path_factory.mktemp("ledger"), clock=clock) as client:

        def send(some: list[dict[str, Any]], ascii_only: bool) -> None:
            body = json.dumps({"events": some}, ensure_ascii=ascii_only, separators=(",", ":")).encode()
            assert client.post("/v1/events/bulk", content=body).status_code == 202

        send(events[:150], ascii_only=True)
        meters = []
        for kind, hows in HOW.items():
            for how in hows:
                for reset in ("BILLING_PERIOD", "NEVER"):
                    filters = choose.choice([{}, {}, {"region": ["eu", "us", "5"]}, {"region": ["true", 'e"u']}])
                    field, name = choose.choice(["tokens", "tokens", *NAMES]), choose.choice(["call", "call", "other"])
                    meters.append(
                        make_meter(
                            client, kind, event_name=name, reset_usage=reset, filters=filters, **{"field": field} | how
                        )
                    )
        clock.return_value += SECOND_US
        archived = {meter["id"] for meter in choose.sample(meters, 6)}
        for meter_id in archived:
            assert client.delete(f"/v1/meters/{meter_id}").status_code == 200
        clock.return_value += SECOND_US
        send(events[150:], ascii_only=False)
        make_meter_of_staging(client)
        client.post("/v1/events/bulk", json={"events": events[:50]}, headers={"x-api-key": STAGING_KEY})
        yield (
            client,
            meters,
            events,
            {meter["id"]: events[:150] if meter["id"] in archived else events for meter in meters},
        )


DIMENSIONS = [[], [], ["source"], ["properties.region"], ["properties.tokens"], ["properties.a.b"], ["external_customer_id"],
              ["source", "properties.region"], ["properties.tokens", "feature_id", "properties.region"],
              ["external_customer_id", "source", "meter_id"], ["properties.region", "external_customer_id", "source"]]  # fmt: skip


def random_range(choose: random.Random) -> dict[str, Any]:
    start = LEDGER_START + timedelta(hours=choose.randrange(200))
    return {
        "start_time": start.isoformat(),
        "end_time": (start + timedelta(hours=choose.randrange(4, 300, 4))).isoformat(),
    }


@pytest.mark.slow
@table("group_by", DIMENSIONS, ids=[f"{number} {'+'.join(names)}" for number, names in enumerate(DIMENSIONS)])
def test_analytics_matches_plain_python(ledger: Any, group_by: list[Any]) -> None:
    client, meters, _, countable = ledger
    choose, compared = random.Random(f"analytics {group_by}"), 0
    for number in range(6):
        query = random_range(choose) | {"group_by": group_by}
        if number % 3:
            query["window_size"] = choose.choice(SIZES)
        if choose.random() < 0.3:
            query["external_customer_id"] = choose.choice("xyz")
        if choose.random() < 0.3:
            query["sources"] = choose.choice([["app"], ["app", "web", "nowhere"]])
        if choose.random() < 0.3:
            query["property_filters"] = {
                "region": choose.choice([["eu", "us"], ["5"], ["true"], ['e"u', "nowhere"], []])
            }
        if choose.random() < 0.3:
            query["expand"] = ["source", "meter"]
        items = analytics(client, **query)
        expected = {(meter["id"], group): item for meter in meters
                    for group, item in expected_analytics(meter, countable[meter["id"]], query).items()}  # fmt: skip
        check_items(items, query, expected)
        compared += sum(item.usage > 0 for item in expected.values())
    assert compared > 50


@pytest.mark.slow
@table("kind", AGGREGATIONS)
def test_usage_of_a_meter_matches_plain_python(ledger: Any, kind: str) -> None:
    client, meters, events, _ = ledger
    choose, compared = random.Random(f"usage {kind}"), 0
    for meter in (one for one in meters if one["aggregation"]["type"] == kind):
        for number in range(40 // len(HOW[kind])):
            query = random_range(choose) | {"timezone": choose.choice(ZONES)}
            if number % 3:
                query["window_size"] = choose.choice(SIZES)
            for name, values in (("external_customer_id", "xyz"), ("customer_id", ["c1"])):
                if choose.random() < 0.2:
                    query[name] = choose.choice(values)
            if choose.random() < 0.3:
                query["filters"] = choose.choice(
                    [{"region": ["eu", "us"]}, {"region": ["5"]}, {"region": ["true"], "nothing": []}]
                )
            value, results = expected_meter_usage(meter, events, query)
            answer, bucket = metered_usage(client, meter["id"], **query), meter["aggregation"]["bucket_size"]
            assert answer["type"] == kind
            assert answer["value"] == (
                None if "window_size" in query and not bucket else pytest.approx(value, rel=1e-9, abs=1e-9)
            ), query
            skipped = int(bucket is not None and meter["reset_usage"] == "NEVER" and starts_in_a_bucket(query, bucket))
            answered = windows_of(answer)
            assert [time for time, _ in answered] == [time for time, _ in results], query
            assert [each for _, each in answered[skipped:]] == pytest.approx(
                [each for _, each in results[skipped:]], rel=1e-9, abs=1e-9
            ), query
            compared += value > 0
    assert compared > (5 if kind == "LATEST" else 25)


def starts_in_a_bucket(query: dict[str, Any], bucket: str) -> bool:
    """Return whether the range's start cuts a bucket in two."""
    start = datetime.fromisoformat(query["start_time"])
    return window_start(start, bucket, query["timezone"]) != start


def test_usage_of_a_meter_matches_the_route_without_a_meter(ledger: Any) -> None:
    client, meters, _, _ = ledger
    choose = random.Random("both routes")
    for meter in (one for one in meters if one["reset_usage"] == "BILLING_PERIOD" and one["event_name"] == "call"):
        how = meter["aggregation"]
        if how["group_by"] and not how["bucket_size"]:
            continue  # the route without a meter ignores groups without buckets
        query = random_range(choose) | {"timezone": choose.choice(ZONES), "window_size": choose.choice([None, *SIZES])}
        asked = {"property_name": how["field"], "multiplier": how["multiplier"], "bucket_size": how["bucket_size"],
                 "filters": {one["key"]: one["values"] for one in meter["filters"]},
                 "group_by": how["group_by"] and [f"properties.{how['group_by']}"]}  # fmt: skip
        assert metered_usage(client, meter["id"], **query) == usage(client, how["type"], **query, **asked), meter


# ---------------------------------------------------------------------------------------------- SDK


def sdk_events(name: str) -> list[dict[str, Any]]:
    return [{"event_name": name, "external_customer_id": f"{name}_customer", "event_id": f"{name}_{number}", "properties": {"n": n, "model": model},
             "source": "sdk", "timestamp": f"2026-03-0{day}T10:00:00Z"}
            for number, (day, n, model) in enumerate([(1, "1.5", "a"), (2, "2", "a"), (2, "4", "b")])]  # fmt: skip


MARCH = {"start_time": datetime(2026, 3, 1, tzinfo=UTC), "end_time": datetime(2026, 4, 1, tzinfo=UTC)}


def sdk_meter(name: str) -> dict[str, Any]:
    return {
        "name": "m",
        "event_name": name,
        "reset_usage": "BILLING_PERIOD",
        "aggregation": {"type": "SUM", "field": "n"},
    }


def test_the_official_sdk_reads_usage_of_a_meter_and_analytics(live: Live) -> None:
    from flexprice import Flexprice

    with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
        sdk.events.ingest_events_bulk(events=sdk_events("sdk.analytics"))
        unit = {"unit_singular": "k", "unit_plural": "ks", "conversion_rate": 1000}
        feature = sdk.features.create_feature(name="Analysed", type_="metered", meter=sdk_meter("sdk.analytics"), reporting_unit=unit,
                                              unit_singular="token", unit_plural="tokens")  # fmt: skip
        whole = sdk.events.get_usage_by_meter(meter_id=feature.meter_id, **MARCH)
        assert (whole.value, whole.type, whole.event_name, whole.results) == (7.5, "SUM", "sdk.analytics", [])
        daily = sdk.events.get_usage_by_meter(
            meter_id=feature.meter_id, window_size="DAY", filters={"model": ["a"]}, **MARCH
        )
        assert [(one.window_size, one.value) for one in daily.results] == [
            ("2026-03-01T00:00:00Z", 1.5),
            ("2026-03-02T00:00:00Z", 2),
        ]
        answer = sdk.events.get_usage_analytics(external_customer_id="sdk.analytics_customer", feature_ids=[feature.id], window_size="DAY",
                                                group_by=["properties.model", "source"], expand=["meter", "feature"], **MARCH)  # fmt: skip
        assert (answer.total_cost, answer.currency, answer.custom_analytics) == ("0", "", None)
        assert [(item.properties, item.total_usage, item.source, item.event_count) for item in answer.items] == [
            ({"model": "a"}, "3.5", "sdk", 2),
            ({"model": "b"}, "4", "sdk", 1),
        ]
        item = answer.items[0]
        assert (item.name, item.unit, item.unit_plural, item.total_usage_display) == (
            "Analysed",
            "token",
            "tokens",
            "0",
        )
        assert (item.feature_id, item.feature.id, item.meter.id, item.meter.environment_id) == (
            feature.id,
            feature.id,
            feature.meter_id,
            "development",
        )
        assert (item.reporting_unit.conversion_rate, item.aggregation_type, item.window_size) == (1000, "SUM", "DAY")
        assert [(point.timestamp, point.usage, point.event_count, point.cost) for point in item.points] == [
            ("2026-03-01T00:00:00Z", "1.5", 1, "0"),
            ("2026-03-02T00:00:00Z", "2", 1, "0"),
        ]
        assert sdk.events.get_usage_analytics(external_customer_id="nobody", **MARCH).items == []


def test_the_official_async_sdk_reads_usage_of_a_meter_and_analytics(live: Live) -> None:
    from flexprice import Flexprice

    async def computed() -> tuple[Any, ...]:
        async with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
            await sdk.events.ingest_events_bulk_async(events=sdk_events("sdk.async"))
            feature = await sdk.features.create_feature_async(
                name="Async analysed", type_="metered", meter=sdk_meter("sdk.async")
            )
            whole = await sdk.events.get_usage_by_meter_async(meter_id=feature.meter_id, **MARCH)
            answer = await sdk.events.get_usage_analytics_async(feature_ids=[feature.id], expand=["source"], **MARCH)
            return whole.value, [(item.total_usage, item.sources) for item in answer.items]

    assert asyncio.run(computed()) == (7.5, [("7.5", ["sdk"])])


def test_a_server_process_answers_analytics(live: Live) -> None:
    with httpx.Client(base_url=live.url, headers={"x-api-key": KEY}) as client:
        store(client, event("http_1", event_name="http.call", timestamp="2026-05-01T00:00:00Z"))
        meter = make_meter(client, event_name="http.call")
        items = analytics(client, start_time="2026-05-01T00:00:00Z", end_time="2026-05-02T00:00:00Z")
        assert [(item["meter_id"], item["total_usage"]) for item in items] == [(meter["id"], "1")]
