"""POST /v1/events/usage/meter: examples worked out by hand; test_analytics.py compares random ones with plain Python."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from eventstore_extras.analytics import OPERATIONS
from helpers import DAY_US, Json, analytics, at, event, faulty_fields, make_meter, metered_usage, refused, store, table
from meter_helpers import BUCKETED, FEW, LIFETIME, RANGE, SECOND_US, kind_with_multiplier, make_meter_of_staging, sent


@pytest.fixture(scope="module")
def operations() -> Any:
    return OPERATIONS


@pytest.fixture
def few(client: httpx.Client) -> httpx.Client:
    store(client, *FEW)
    return client


@table(("kind", "values"), LIFETIME.items(), ids=LIFETIME)
def test_usage_of_a_meter_by_hand(few: httpx.Client, kind: str, values: Any) -> None:
    for reset, value in zip(("BILLING_PERIOD", "NEVER"), values, strict=True):
        meter = make_meter(few, kind, reset_usage=reset, **kind_with_multiplier(kind))
        answer = metered_usage(few, meter["id"], **RANGE)
        assert answer == {"event_name": "call", "type": kind, "value": pytest.approx(value), "results": []}
        assert not isinstance(answer["value"], str)


QUIET = {"COUNT": (0, 3), "SUM": (0, 20.5), "AVG": (0, 20.5 / 3), "MAX": (0, 10), "COUNT_UNIQUE": (0, 3), "LATEST": (0, 6.5),
         "SUM_WITH_MULTIPLIER": (0, 41), "WEIGHTED_SUM": (0, 20.5)}  # fmt: skip


@table(("kind", "values"), QUIET.items(), ids=QUIET)
@table("seconds", [10, 0], ids=["", "an empty range"])
def test_a_range_without_events_has_usage_only_with_reset_usage_never(
    few: httpx.Client, kind: str, values: Any, seconds: int
) -> None:
    start, end = at(-45 * SECOND_US), at((-45 + seconds) * SECOND_US)
    for reset, value in zip(("BILLING_PERIOD", "NEVER"), values, strict=True):
        meter = make_meter(few, kind, reset_usage=reset, **kind_with_multiplier(kind))
        answer = metered_usage(few, meter["id"], start_time=start, end_time=end)
        assert (answer["value"], answer["results"]) == (pytest.approx(value), [])


@table("reset", ["BILLING_PERIOD", "NEVER"])
def test_with_windows_the_value_is_null(few: httpx.Client, reset: str) -> None:
    meter = make_meter(few, "SUM", reset_usage=reset)
    answer = metered_usage(few, meter["id"], **RANGE, window_size="MINUTE")
    assert answer["value"] is None
    assert answer["results"] == [
        {"window_size": "2025-10-15T11:37:00Z", "value": 10.5},
        {"window_size": "2025-10-15T11:38:00Z", "value": 0},  # a negative value is answered as 0
    ]


@table(("how", "buckets", "value", "lifetime"), BUCKETED.values(), ids=BUCKETED)
@table(
    "asked",
    [
        {},
        {"window_size": "DAY"},
        {"bucket_size": "DAY"},
        {"bucket_size": "YEAR"},
        {"window_size": "MONTH", "bucket_size": "HOUR"},
    ],
    ids=str,
)
def test_a_bucketed_meter_ignores_the_requested_windows_and_buckets(
    few: httpx.Client, how: dict[str, Any], buckets: list[Any], value: float, lifetime: float, asked: dict[str, Any]
) -> None:
    for reset, expected in (("BILLING_PERIOD", value), ("NEVER", lifetime)):
        meter = make_meter(few, **how, bucket_size="MINUTE", reset_usage=reset)
        answer = metered_usage(few, meter["id"], **RANGE, **asked)
        assert (answer["type"], answer["value"]) == (how["kind"], expected)
        stamps = ["2025-10-15T11:37:00Z", "2025-10-15T11:38:00Z"]
        assert [(one["window_size"], one["value"]) for one in answer["results"]] == [*zip(stamps, buckets, strict=True)]


def test_a_bucket_across_the_start_counts_once_with_reset_usage_never(few: httpx.Client) -> None:
    meter = make_meter(few, "MAX", bucket_size="MINUTE", reset_usage="NEVER")
    answer = metered_usage(few, meter["id"], start_time=at(-60 * SECOND_US), end_time=at())
    assert answer["value"] == 16.5  # 10 in 11:35, and 6.5 in 11:37, where 4 lies before the start


def test_buckets_before_the_range_do_not_count_toward_the_limit_of_windows(client: httpx.Client) -> None:
    """The limit of 100,000 windows applies to the range only."""
    store(client, event("old", timestamp="2015-01-01T00:00:30Z", properties={"n": 7}), sent("new", 10, 5))
    meter = make_meter(client, "MAX", bucket_size="MINUTE", reset_usage="NEVER")
    answer = metered_usage(client, meter["id"], **RANGE)
    assert (answer["value"], [one["value"] for one in answer["results"]]) == (12, [5])


@pytest.mark.slow
def test_an_event_on_the_first_day_of_year_1_counts(client: httpx.Client) -> None:
    """The week of this day starts before year 1 and is cut off; in New York the day itself starts before year 1."""
    first = {"external_customer_id": "first", "timestamp": "0001-01-01T00:00:01Z", "properties": {"n": 7}}
    store(client, event("first", **first), event("next week", **first | {"timestamp": "0001-01-07T00:00:00Z"}))
    meter_id = make_meter(client, "MAX", bucket_size="WEEK", reset_usage="NEVER")["id"]
    assert metered_usage(client, meter_id)["value"] == 14
    days = {"start_time": "0001-01-01T00:00:00Z", "end_time": "0001-01-08T00:00:00Z"}
    stamps = ["0001-01-01T00:00:00Z", "0001-01-07T00:00:00Z"]
    assert [one["window_size"] for one in metered_usage(client, meter_id, **days)["results"]] == stamps
    refused(client.post("/v1/events/usage/meter", json={"meter_id": meter_id, "timezone": "America/New_York"}))


@pytest.mark.slow
@table("bucket_size", ["MINUTE", "YEAR", "day", "", " ", "x" * 1000])
@table("kind", ["SUM", "COUNT"])
def test_the_bucket_size_of_a_request_is_not_read(few: httpx.Client, kind: str, bucket_size: str) -> None:
    meter = make_meter(few, kind)
    for more in ({}, {"window_size": "MINUTE"}):
        answer = metered_usage(few, meter["id"], **RANGE, **more, bucket_size=bucket_size)
        assert answer == metered_usage(few, meter["id"], **RANGE, **more)


def test_a_maximum_with_groups_and_without_buckets_adds_the_groups(few: httpx.Client) -> None:
    """In the range: a has 4 and -2, b has 6.5, and one event has neither; c has 10 before it."""
    for reset, value in (("BILLING_PERIOD", 10.5), ("NEVER", 20.5)):
        meter_id = make_meter(few, "MAX", group_by="g", reset_usage=reset)["id"]
        assert metered_usage(few, meter_id, **RANGE) == {
            "event_name": "call",
            "type": "MAX",
            "value": value,
            "results": [],
        }
        windows = metered_usage(few, meter_id, **RANGE, window_size="MINUTE", bucket_size="DAY")
        assert (windows["value"], [each["value"] for each in windows["results"]]) == (None, [10.5, 0])
        assert metered_usage(few, meter_id, **RANGE, filters={"g": ["a"]})["value"] == 4
        empty = metered_usage(few, meter_id, start_time=at(-45 * SECOND_US), end_time=at(-45 * SECOND_US))
        assert empty["value"] == (0 if reset == "BILLING_PERIOD" else 20.5)


@table("value", [7, "7", 7.0, "7.0"])
def test_groups_of_a_maximum_are_kept_apart_over_a_long_range(client: httpx.Client, value: object) -> None:
    """A group's events lie in all parts of the range; its maximum counts once."""
    store(client, *[sent(f"{day} {g}", day * 86_400, value, g=g) for day in (1, 2, 3, 5, 6) for g in "ab"])
    assert metered_usage(client, make_meter(client, "MAX", group_by="g")["id"])["value"] == 14
    assert [item["total_usage"] for item in analytics(client, window_size="DAY")] == ["14"]


MATCHED = {  # -> filters of the meter, of the request, number of matching events
    "none": ({}, {}, 5),
    "the meter's": ({"k": ["x", "y"]}, {}, 3),
    "the request's": ({}, {"k": ["x", "z"]}, 3),
    "values in both": ({"k": ["x", "y"]}, {"k": ["y", "z"]}, 1),
    "no value in both": ({"k": ["x"]}, {"k": ["y"]}, 0),
    "two keys": ({"k": ["x"]}, {"m": ["1"]}, 1),
    "two keys of the meter": ({"k": ["x", "y"], "m": ["1"]}, {}, 2),
    "no values in the request": ({"k": ["x"]}, {"k": []}, 2),
    "an unknown key": ({}, {"nothing": ["x"]}, 0),
    "a number's text": ({"m": ["2"]}, {}, 1),
    "a boolean's text": ({"m": ["true"]}, {}, 1),
}


@table(("of_meter", "of_request", "count"), MATCHED.values(), ids=MATCHED)
def test_the_filters_of_meter_and_request_must_both_match(
    client: httpx.Client, of_meter: dict[str, Any], of_request: dict[str, Any], count: int
) -> None:
    values: list[Json] = [{"k": "x", "m": 1}, {"k": "x", "m": "2"}, {"k": "y", "m": "1"}, {"k": "z", "m": True}, {}]
    store(client, *[sent(number, 10, **properties) for number, properties in enumerate(values)])
    meter = make_meter(client, filters=of_meter)
    assert metered_usage(client, meter["id"], filters=of_request)["value"] == count
    items = analytics(client, property_filters=of_request)
    assert [item["total_usage"] for item in items] == ([f"{count}"] if count else [])


def test_two_filters_with_the_same_key_must_both_match(client: httpx.Client) -> None:
    """All filters must match, so only values in both match."""
    store(client, *[sent(k, 10, k=k) for k in "xyz"])
    body = {"name": "a", "event_name": "call", "aggregation": {"type": "COUNT"}, "reset_usage": "NEVER",
            "filters": [{"key": "k", "values": ["x", "y"]}, {"key": "k", "values": ["y", "z"]}]}  # fmt: skip
    meter = client.post("/v1/meters", json=body).json()
    assert metered_usage(client, meter["id"])["value"] == 1
    assert metered_usage(client, meter["id"], filters={"k": ["x"]})["value"] == 0
    assert [item["total_usage"] for item in analytics(client)] == ["1"]


def test_usage_covers_all_customers_or_one_who_may_be_unknown(client: httpx.Client) -> None:
    store(
        client,
        event("1", customer_id="c1", timestamp=at(-1)),
        event("2", external_customer_id="other", timestamp=at(-1)),
    )
    meter_id = make_meter(client)["id"]
    assert (
        metered_usage(client, meter_id)["value"]
        == metered_usage(client, meter_id, external_customer_id="")["value"]
        == 2
    )
    assert metered_usage(client, meter_id, external_customer_id="other")["value"] == 1
    assert metered_usage(client, meter_id, customer_id="c1")["value"] == 1
    assert metered_usage(client, meter_id, customer_id="c1", external_customer_id="other")["value"] == 0
    assert metered_usage(client, meter_id, external_customer_id="nobody") == {
        "event_name": "call",
        "type": "COUNT",
        "value": 0,
        "results": [],
    }


def test_the_default_range_is_seven_days_and_the_end_is_exclusive(client: httpx.Client) -> None:
    store(client, *[event(timestamp=at(us)) for us in (-7 * DAY_US - 1, -7 * DAY_US, -5, -1, 0)])
    meter_id = make_meter(client)["id"]
    assert metered_usage(client, meter_id)["value"] == 3
    assert metered_usage(client, meter_id, start_time=at(-5), end_time=at(-1))["value"] == 1
    assert metered_usage(client, make_meter(client, reset_usage="NEVER")["id"])["value"] == 4
    assert [item["total_usage"] for item in analytics(client)] == ["3", "3"]
    assert [item["total_usage"] for item in analytics(client, start_time=at(-5), end_time=at(-1))] == ["1", "1"]
    assert [item["total_usage"] for item in analytics(client, end_time=at(1))] == ["3", "3"]


def test_windows_follow_the_time_zone_and_the_billing_anchor(client: httpx.Client) -> None:
    times = ["2026-01-04T18:30:00Z", "2026-02-04T18:29:59Z", "2026-02-04T18:30:00Z"]
    store(client, *[event(timestamp=time) for time in times])
    query = {"start_time": times[0], "end_time": "2026-03-01T00:00:00Z", "window_size": "MONTH",
             "timezone": "Asia/Kolkata", "billing_anchor": "2024-01-05T18:45:00Z"}  # fmt: skip
    answer = metered_usage(client, make_meter(client)["id"], **query)
    assert answer["results"] == [{"window_size": times[0], "value": 2}, {"window_size": times[2], "value": 1}]


def test_usage_counts_events_from_before_the_meter_and_after_its_archiving(client: httpx.Client) -> None:
    store(client, event(timestamp=at(-2)))
    meter_id = make_meter(client)["id"]
    assert metered_usage(client, meter_id)["value"] == 1
    client.delete(f"/v1/meters/{meter_id}")
    store(client, event(timestamp=at(-1)))
    assert metered_usage(client, meter_id)["value"] == 2


def test_a_count_counts_events_without_the_field(few: httpx.Client) -> None:
    meter = make_meter(few, "COUNT", field="n")
    assert metered_usage(few, meter["id"], **RANGE)["value"] == 5
    assert [item["total_usage"] for item in analytics(few, **RANGE)] == ["5"]


def test_only_sum_with_multiplier_uses_the_multiplier(few: httpx.Client) -> None:
    meter = make_meter(few, "SUM", multiplier="3")
    assert metered_usage(few, meter["id"], **RANGE)["value"] == 8.5
    assert [item["total_usage"] for item in analytics(few, **RANGE)] == ["10.5"]


@table("kind", ["SUM", "AVG", "MAX", "LATEST", "WEIGHTED_SUM", "SUM_WITH_MULTIPLIER"])
@table("reset", ["BILLING_PERIOD", "NEVER"])
def test_a_negative_usage_is_answered_as_0(client: httpx.Client, kind: str, reset: str) -> None:
    store(client, sent(1, 10, -5), sent(2, 200, -5))
    meter = make_meter(client, kind, reset_usage=reset, **kind_with_multiplier(kind))
    assert metered_usage(client, meter["id"], **RANGE)["value"] == 0
    assert [item["total_usage"] for item in analytics(client, **RANGE)] == ["0"]


def test_the_usage_of_an_unknown_meter_is_a_404(shared: httpx.Client) -> None:
    of_staging = make_meter_of_staging(shared)
    for meter_id in ("meter_unknown", of_staging, "' OR 1=1 --", "x" * 1000):
        refused(shared.post("/v1/events/usage/meter", json={"meter_id": meter_id}), 404, "not_found")


BAD_USAGES = [
    ({"meter_id": None}, "meter_id"), ({"meter_id": ""}, "meter_id"), ({"meter_id": 5}, "meter_id"), ({"window_size": "2HOUR"}, "window_size"),
    ({"window_size": "day"}, "window_size"), ({"start_time": "yesterday"}, "start_time"),
    ({"end_time": "2025-01-01"}, "end_time"), ({"start_time": at(1), "end_time": at()}, "end_time"), ({"billing_anchor": "5"}, "billing_anchor"),
    ({"filters": {"": ["x"]}}, "filters"), ({"filters": {"a": "x"}}, "filters"), ({"filters": []}, "filters"), ({"timezone": 5}, "timezone"),
    ({"external_customer_id": 5}, "external_customer_id"), ({"window_size": "MINUTE", "start_time": at(-100_000 * 60 * SECOND_US)}, "window_size"),
]  # fmt: skip


@table(("bad", "field"), BAD_USAGES, ids=str)
def test_a_bad_request_for_usage_is_a_400_that_names_the_field(
    shared: httpx.Client, bad: dict[str, Any], field: str
) -> None:
    body = {"meter_id": make_meter(shared)["id"]} | bad
    (faulty,) = faulty_fields(shared.post("/v1/events/usage/meter", json=body))
    assert faulty.startswith(field)


def test_too_many_buckets_are_a_400(shared: httpx.Client) -> None:
    meter = make_meter(shared, "MAX", bucket_size="MINUTE")
    body = {
        "meter_id": meter["id"],
        "start_time": at(-100_001 * 60 * SECOND_US),
        "window_size": "DAY",
        "bucket_size": "DAY",
    }
    response = shared.post("/v1/events/usage/meter", json=body)
    assert faulty_fields(response) == ["meter_id"]
    assert (
        "meter_id names a meter whose bucket_size MINUTE makes more than 100000 windows" in response.json()["message"]
    )
