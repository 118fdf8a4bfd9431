"""Random operations on the application, compared with a model in plain Python; hypothesis shortens a failing run.

Everything random derives from one seed, which is printed. EVENTSTORE_TEST_EXAMPLES sets the number of runs.
"""

from __future__ import annotations

import itertools
import json
import os
import random
import tempfile
from collections.abc import Iterable
from datetime import datetime
from pathlib import Path

import httpx
import pytest
from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from eventstore import to_datetime, to_us
from helpers import (
    DAY_US,
    EVER,
    KEY,
    LEDGER_START,
    NOW,
    STAGING_KEY,
    ZONES,
    Json,
    analytics,
    ask,
    at,
    counts,
    event,
    feature_of,
    listed,
    make,
    meter_of,
    metered_usage,
    metering,
    monitored,
    page,
    refused,
    store,
    usage,
    windows_of,
)
from oracle import (
    AGGREGATIONS,
    check_items,
    cursor,
    expected_analytics,
    expected_meter_usage,
    expected_page,
    expected_usage,
    matches,
    sort_key,
    text_of,
    time_us,
)

EXAMPLES = int(os.environ.get("EVENTSTORE_TEST_EXAMPLES", "20"))

# ---------------------------------------------------------------------------------------------- random values

# Few of each kind, so that they collide, and all prone to be mistaken for something else.
NASTY = ["a", "A", "\x1e", '","', "}", "b", "a::b", "::", "1::2", "é", "e\u0301", "\uffff", "😀", "\0", "a\0b", '"', "\\", "%", "' --", "a\nb", " ",
         "lookup", "200", "true", "null", "x" * 300]  # fmt: skip
TEXTS = st.sampled_from(NASTY) | st.text(min_size=1, max_size=3)
PROPERTY_NAMES = st.sampled_from(["n", "a.b", 'quo"te', "back\\slash", "größe", "$"])
SCALARS = st.sampled_from([0, 1, -3, 2.5, 0.1, 1e-9, 10**15, 1.0, -0.0, 1e21, 2**53 + 1, 10**20, "", "7", "+7", ".5", "1e3", "007", "0x10", "1_0", "inf", "٣", " 5 ",
                           "true", "null", "a\tb", 'say "5"', "\\", "\0", "😀", True, False, None])  # fmt: skip
CONTAINERS = st.sampled_from([{}, [], {"a": [1]}, [7], [7.0], {"b": "é\n", "a": 1e3}])
HOUR_US = 3_600_000_000

# To the microsecond: where listings and windows begin and end, and the nights in which clocks change.
BORDERS_US = [NOW, NOW - 7 * DAY_US, *(to_us(LEDGER_START) + hours * HOUR_US for hours in (0, 46, 47, 48, 49, 240))]
MOMENTS = st.sampled_from([to_datetime(border + step).isoformat() for border in BORDERS_US for step in (-1, 0, 1)])
EXTREMES = ["0001-01-01T00:00:00.000001+00:00", "1969-12-31T23:59:59.999999+00:00", "9999-12-31T23:59:59.999999+00:00"]
ANY_TIMES = MOMENTS | st.sampled_from(EXTREMES)

EVENTS = st.fixed_dictionaries({
    "event_id": TEXTS, "event_name": st.sampled_from(["call", "call", " call\n", "Call", "ca::ll", "\0", "é", "😀"]),
    "external_customer_id": st.sampled_from(["a", "A", "é", "\0"]), "customer_id": st.sampled_from(["", "c1"]),
    "source": st.sampled_from(["", "a", "::"]), "timestamp": ANY_TIMES,
    "properties": st.dictionaries(PROPERTY_NAMES, SCALARS | CONTAINERS, max_size=3)})  # fmt: skip
BAD_FIELDS = st.sampled_from(
    [{"event_name": " "}, {"timestamp": "0000-01-01T00:00:00Z"}, {"properties": [1]}, {"source": 5}]
)
FILTER_VALUES = st.lists((SCALARS | CONTAINERS).map(text_of).filter(bool), min_size=1, max_size=8)
PROPERTY_FILTERS = st.dictionaries(PROPERTY_NAMES, FILTER_VALUES, min_size=1, max_size=2)
FILTERS = st.fixed_dictionaries({  # mostly few of them, so that events remain; "" does not filter
    "external_customer_id": st.sampled_from(["", "", "", "a"]), "event_name": st.sampled_from(["", "", "call", "😀"]),
    "source": st.sampled_from(["", "", "", "::"]), "property_filters": st.just({}) | st.just({}) | PROPERTY_FILTERS}, optional={
    "start_time": st.just("0001-01-01T00:00:00.000001+00:00") | ANY_TIMES, "end_time": MOMENTS | ANY_TIMES})  # fmt: skip
PAGE_SIZES = st.sampled_from([1, 2, 3, 50])
ORDERS = st.fixed_dictionaries({"sort": st.sampled_from(["timestamp", "event_name"]), "order": st.sampled_from(["asc", "desc"]),
                                "page_size": PAGE_SIZES})  # fmt: skip
ENVIRONMENTS = st.sampled_from(["development", "staging"])
METHODS = st.sampled_from(["GET", "POST"])
SOME_CUSTOMER = st.sampled_from(["a", "é"])

METER_FIELDS = {"name": st.sampled_from(["m", "é", '"']), "event_name": st.sampled_from(["call", "call", "Call", " é "]), "field": PROPERTY_NAMES,
                "filters": st.just({}) | st.just({}) | PROPERTY_FILTERS}  # fmt: skip
RESETS = st.sampled_from(["BILLING_PERIOD", "NEVER"])
BUCKETS = {"bucket_size": st.sampled_from(["HOUR", "6HOUR", "DAY", "MONTH"]), "reset_usage": st.just("BILLING_PERIOD")}
METERS = st.one_of(
    st.builds(meter_of, st.sampled_from([kind for kind in AGGREGATIONS if kind != "SUM_WITH_MULTIPLIER"]), reset_usage=RESETS, **METER_FIELDS),
    st.builds(meter_of, st.just("SUM_WITH_MULTIPLIER"), multiplier=st.sampled_from(["2.5", 3, "1e-3"]), reset_usage=RESETS, **METER_FIELDS),
    st.builds(meter_of, st.sampled_from(["SUM", "MAX"]), **BUCKETS, **METER_FIELDS),
    st.builds(meter_of, st.just("MAX"), group_by=PROPERTY_NAMES, **BUCKETS, **METER_FIELDS),
)  # fmt: skip
MULTIPLIERS = {"2.5": "2.5", 3: "3", "1e-3": "0.001"}  # as sent -> as answered
LOOKUP_KEYS = {
    "Tokens": "tokens",
    "tokens!": "tokens",
    "API calls": "api_calls",
    "日本": "",
    "é": "",
}  # by feature name
GROUPINGS = st.lists(
    st.sampled_from(["source", "properties.n", "properties.a.b", "external_customer_id", "feature_id"]), max_size=3
)

# ---------------------------------------------------------------------------------------------- comparisons


def as_sent(answered: Json) -> Json:
    """Return an event of an answer as its sender would write it."""
    assert datetime.fromisoformat(answered["ingested_at"]) == datetime.fromisoformat(at())
    timestamp = datetime.fromisoformat(answered["timestamp"]).isoformat()
    names = ("event_name", "external_customer_id", "customer_id", "source", "properties")
    return {"event_id": answered["id"], "timestamp": timestamp} | {name: answered[name] for name in names}


def json_texts(events: Iterable[Json]) -> list[str]:
    """Return each event as JSON: Python takes 1 and True for equal, JSON does not."""
    return [json.dumps(event, sort_keys=True) for event in events]


def ends_before_it_starts(query: Json) -> bool:
    return "start_time" in query and time_us(query.get("end_time", at())) < time_us(query["start_time"])


def is_published(meter_or_feature: Json) -> bool:
    return bool(meter_or_feature["status"] == "published")


def check_windows(answer: Json, expected: list[tuple[datetime, float]]) -> None:
    assert [time for time, _ in windows_of(answer)] == [time for time, _ in expected]
    values = [value for _, value in expected]
    assert [value for _, value in windows_of(answer)] == pytest.approx(values, rel=1e-9, abs=1e-9)


# ---------------------------------------------------------------------------------------------- the model


class Model(RuleBasedStateMachine):
    """The application and what it should hold: for each environment, the first event that was sent with each id."""

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.events: dict[str, dict[str, Json]] = {"development": {}, "staging": {}}
        self.meters: dict[str, dict[str, Json]] = {"development": {}, "staging": {}}
        self.features: dict[str, dict[str, Json]] = {"development": {}, "staging": {}}
        self.walks: list[Json] = []  # through pages, not finished yet
        self.client = metering(Path(self.folder.name)).__enter__()

    def teardown(self) -> None:
        for environment, events in self.events.items():
            answer = page(self.client_of(environment), "POST", **EVER, page_size=1000, order="asc")
            expected = sorted(events.values(), key=sort_key("timestamp"))
            assert json_texts(map(as_sent, answer["events"])) == json_texts(expected)
            self.list_meters_and_features(environment, "")
        self.client.__exit__(None, None, None)
        self.folder.cleanup()

    def client_of(self, environment: str) -> httpx.Client:
        self.client.headers["x-api-key"] = {"development": KEY, "staging": STAGING_KEY}[environment]
        return self.client

    @rule()
    def restart(self) -> None:
        self.client.__exit__(None, None, None)
        self.client = metering(Path(self.folder.name)).__enter__()

    # Events

    def add_events(self, environment: str, sent: list[Json]) -> tuple[int, int]:
        """Add events to the model and return the counts that the answer should have: new events and duplicates."""
        events = self.events[environment]
        before = len(events)
        for each in sent:
            events.setdefault(each["event_id"], each | {"event_name": each["event_name"].strip()})
        return len(events) - before, len(sent) - len(events) + before

    @rule(environment=ENVIRONMENTS, sent=EVENTS, has_id=st.booleans())
    def send_single_event(self, environment: str, sent: Json, has_id: bool) -> None:
        response = self.client_of(environment).post("/v1/events", json=sent if has_id else sent | {"event_id": ""})
        assert response.status_code == 202
        stored = sent | {"event_id": response.json()["event_id"]}
        assert not has_id or stored == sent
        assert counts(response) == self.add_events(environment, [stored])

    @initialize(sent=st.lists(EVENTS, min_size=10, max_size=20), environment=ENVIRONMENTS)
    def send_first_batch(self, environment: str, sent: list[Json]) -> None:
        self.send_batch(environment, sent)

    @rule(environment=ENVIRONMENTS, sent=st.lists(EVENTS, min_size=1, max_size=8))
    def send_batch(self, environment: str, sent: list[Json]) -> None:
        assert counts(store(self.client_of(environment), *sent)) == self.add_events(environment, sent)

    @rule(environment=ENVIRONMENTS, sent=st.lists(EVENTS, min_size=1, max_size=4), data=st.data())
    def send_known_ids_with_other_content(self, environment: str, sent: list[Json], data: st.DataObject) -> None:
        if known_ids := list(self.events[environment]):
            again = [each | {"event_id": data.draw(st.sampled_from(known_ids))} for each in sent]
            assert counts(store(self.client_of(environment), *again)) == (0, len(again))

    @rule(environment=ENVIRONMENTS, sent=st.lists(EVENTS, max_size=4), index=st.integers(0, 4), bad_field=BAD_FIELDS)
    def send_batch_with_bad_event(self, environment: str, sent: list[Json], index: int, bad_field: Json) -> None:
        sent.insert(index, event("bad") | bad_field)
        refused(self.client_of(environment).post("/v1/events/bulk", json={"events": sent}))

    @rule(environment=ENVIRONMENTS, event_id=TEXTS, is_known=st.booleans(), data=st.data())
    def look_up_event(self, environment: str, event_id: str, is_known: bool, data: st.DataObject) -> None:
        events = self.events[environment]
        event_id = data.draw(st.sampled_from([*events])) if events and is_known else event_id
        response = self.client_of(environment).get("/v1/events/lookup", params={"id": event_id})
        if event_id in events:
            assert json_texts([as_sent(response.json()["event"])]) == json_texts([events[event_id]])
        else:
            refused(response, 404, "not_found")

    # Pages

    def check_page(
        self, environment: str, method: str, query: Json, side: str = "", mark: Json | None = None, offset: int = 0
    ) -> Json | None:
        """Compare one page with the model. Return the expected page, or None if the query must be refused."""
        sent = query | {"offset": offset, "count_total": True} | ({side: cursor(mark)} if mark else {})
        if ends_before_it_starts(query):
            refused(ask(self.client_of(environment), method, **sent), part="start_time")
            return None
        answer = page(self.client_of(environment), method, **sent)
        expected = expected_page(self.events[environment].values(), query, side, mark, offset)
        assert json_texts(map(as_sent, answer["events"])) == json_texts(expected["events"])
        assert answer | {"events": None} == expected | {"events": None}
        return expected

    def check_pages_around(self, environment: str, filters: Json, page_size: int, offset: int, mark: Json) -> None:
        """Compare the pages before and after the event `mark` in all orders."""
        events = self.events[environment]
        if known := events.get(mark["event_id"]):  # its name comes from the table, its time from the cursor
            mark = mark | {"event_name": known["event_name"]}
        has_commas = any("," in value for values in filters.get("property_filters", {}).values() for value in values)
        methods = itertools.cycle(["POST"] if has_commas else ["GET", "POST", "POST", "GET", "GET"])  # GET splits there
        for sort, order in itertools.product(["timestamp", "event_name"], ["asc", "desc"]):
            query = filters | {"sort": sort, "order": order, "page_size": page_size}
            self.check_page(environment, next(methods), query, offset=offset)
            for side in ("iter_last_key", "iter_first_key"):
                if sort == "event_name" and not known:
                    response = ask(self.client_of(environment), next(methods), **query, **{side: cursor(mark)})
                    refused(response, part="start_time" if ends_before_it_starts(query) else side)
                else:
                    self.check_page(environment, next(methods), query, side, mark, offset)

    @rule(environment=ENVIRONMENTS, filters=FILTERS, page_size=PAGE_SIZES, offset=st.integers(0, 5), unknown=EVENTS,
          data=st.data())  # fmt: skip
    def list_pages(
        self, environment: str, filters: Json, page_size: int, offset: int, unknown: Json, data: st.DataObject
    ) -> None:
        """Compare pages around known events and an unknown one, over the filters' time range and over all times."""
        known = [*self.events[environment].values()]
        marks = data.draw(st.lists(st.sampled_from(known), min_size=1, max_size=2)) if known else []
        for mark, time_range in itertools.product([*marks, unknown], [{}, EVER]):
            self.check_pages_around(environment, filters | time_range, page_size, offset, mark)

    @rule(environment=ENVIRONMENTS, filters=FILTERS, order=ORDERS, is_forward=st.booleans())
    def begin_walk(self, environment: str, filters: Json, order: Json, is_forward: bool) -> None:
        side = "iter_first_key" if is_forward and order["order"] == "asc" else "iter_last_key"
        present = {each["event_id"] for each in self.events[environment].values() if matches(each, filters)}
        query = environment, filters | order
        self.walks.append({"query": query, "side": side, "present": present, "seen": [], "mark": None})

    @rule(method=METHODS, data=st.data(), pages=st.integers(1, 5))
    def continue_walk(self, method: str, data: st.DataObject, pages: int) -> None:
        """Fetch further pages. A finished walk has seen each event once that was present when it began."""
        for _ in range(pages if self.walks else 0):
            walk = self.walks[index := data.draw(st.integers(0, len(self.walks) - 1))]
            environment, query = walk["query"]
            found = self.check_page(environment, method, query, walk["side"] if walk["mark"] else "", walk["mark"])
            walk["seen"] += [each["event_id"] for each in found["events"]] if found else []
            if found and found["has_more"]:
                walk["mark"] = found["events"][-1]
                continue
            assert len(walk["seen"]) == len(set(walk["seen"]))
            assert walk["present"] <= set(walk["seen"])
            if not self.walks.pop(index) or not self.walks:
                return

    # Usage

    @rule(environment=ENVIRONMENTS, kind=st.sampled_from(AGGREGATIONS), times=st.tuples(MOMENTS, MOMENTS),
          fields=st.fixed_dictionaries({"property_name": PROPERTY_NAMES}, optional={
              "external_customer_id": SOME_CUSTOMER, "customer_id": st.just("c1"), "filters": PROPERTY_FILTERS}),
          size=st.sampled_from(["", "HOUR", "3HOUR", "DAY", "WEEK", "MONTH"]), zone=st.sampled_from(ZONES), in_buckets=st.booleans())  # fmt: skip
    def compute_usage(
        self, environment: str, kind: str, times: tuple[str, str], fields: Json, size: str, zone: str, in_buckets: bool
    ) -> None:
        query = {"start_time": min(times), "end_time": max(times), "timezone": zone, **fields}
        if size:
            query["bucket_size" if in_buckets and kind in ("SUM", "MAX") else "window_size"] = size
        if kind == "SUM_WITH_MULTIPLIER":
            query["multiplier"] = "2.5"
        value, windows = expected_usage(self.events[environment].values(), kind, query)
        answer = usage(self.client_of(environment), kind, **query)
        expected = None if "window_size" in query else pytest.approx(value, rel=1e-9, abs=1e-9)
        assert (answer["type"], answer["value"]) == (kind, expected)
        check_windows(answer, windows)

    @rule(environment=ENVIRONMENTS, times=st.tuples(ANY_TIMES, ANY_TIMES))
    def monitor(self, environment: str, times: tuple[str, str]) -> None:
        start, end = sorted(times, key=time_us)
        within = [
            each for each in self.events[environment].values() if matches(each, {"start_time": start, "end_time": end})
        ]
        expected = sum(time_us(each["timestamp"]) < time_us(end) for each in within)
        assert monitored(self.client_of(environment), start_time=start, end_time=end) == (expected, [])

    # Meters and features

    def add_meter(self, environment: str, sent: Json, answered: Json) -> None:
        """Compare a new meter with its request and add it to the model."""
        filters = [{"key": each["key"].strip(), "values": [value.strip() for value in each["values"]]}
                   for each in sent["filters"]]  # fmt: skip
        sent = sent | {"filters": filters}
        defaults = dict.fromkeys(("field", "expression", "multiplier", "bucket_size", "group_by"))
        aggregation = defaults | sent["aggregation"]
        if aggregation["multiplier"] is not None:
            aggregation["multiplier"] = MULTIPLIERS[aggregation["multiplier"]]
        expected = sent | {"aggregation": aggregation, "event_name": sent["event_name"].strip(), "status": "published"}
        assert answered.items() >= expected.items()
        self.meters[environment][answered["id"]] = answered

    @rule(environment=ENVIRONMENTS, sent=METERS)
    def create_meter(self, environment: str, sent: Json) -> None:
        self.add_meter(environment, sent, make(self.client_of(environment), "meters", sent))

    @rule(environment=ENVIRONMENTS, name=st.sampled_from([*LOOKUP_KEYS]), sent=METERS, has_known_meter=st.booleans(),
          data=st.data())  # fmt: skip
    def create_feature(
        self, environment: str, name: str, sent: Json, has_known_meter: bool, data: st.DataObject
    ) -> None:
        meters, features = self.meters[environment], self.features[environment]
        fields: Json = {"meter": sent}
        if has_known_meter and meters:
            fields = {"meter_id": data.draw(st.sampled_from([*meters]))}
        response = self.client_of(environment).post("/v1/features", json=feature_of(name, **fields))
        key = LOOKUP_KEYS[name]
        taken_keys = {feature["lookup_key"] for feature in features.values() if is_published(feature)}
        if "meter_id" in fields and not is_published(meters[fields["meter_id"]]):
            refused(response, part="meter_id")
        elif key and key in taken_keys:
            refused(response, 409, "already_exists", key)
        else:
            assert response.status_code == 201, response.text
            answered = response.json()
            assert (answered["name"], answered["lookup_key"]) == (name, key)
            assert answered["meter_id"] == answered["meter"]["id"]
            if "meter_id" in fields:
                assert answered["meter"] == meters[fields["meter_id"]]
            else:
                self.add_meter(environment, sent, answered["meter"])
            features[answered.pop("id")] = {key: value for key, value in answered.items() if key != "meter"}

    @rule(environment=ENVIRONMENTS, is_deleted=st.booleans(), data=st.data())
    def archive_meter(self, environment: str, is_deleted: bool, data: st.DataObject) -> None:
        if meters := self.meters[environment]:
            meter_id = data.draw(st.sampled_from([*meters]))
            method, path = ("DELETE", "") if is_deleted else ("POST", "/disable")
            assert self.client_of(environment).request(method, f"/v1/meters/{meter_id}{path}").status_code == 200
            meters[meter_id]["status"] = "archived"

    @rule(environment=ENVIRONMENTS, data=st.data())
    def delete_feature(self, environment: str, data: st.DataObject) -> None:
        """A feature's meter is archived with it, unless another published feature has the meter as well."""
        if published := {key: each for key, each in self.features[environment].items() if is_published(each)}:
            feature_id = data.draw(st.sampled_from([*published]))
            assert self.client_of(environment).delete(f"/v1/features/{feature_id}").status_code == 200
            deleted = published.pop(feature_id)
            deleted["status"] = "archived"
            if all(each["meter_id"] != deleted["meter_id"] for each in published.values()):
                self.meters[environment][deleted["meter_id"]]["status"] = "archived"

    @rule(environment=ENVIRONMENTS, status=st.sampled_from(["", "published", "archived"]))
    def list_meters_and_features(self, environment: str, status: str) -> None:
        client, meters = self.client_of(environment), self.meters[environment]
        features = [
            {"id": feature_id, **feature, "meter": meters[feature["meter_id"]]}
            for feature_id, feature in self.features[environment].items()
        ]
        for path, known in (("meters", [*meters.values()]), ("features", features)):
            newest_first = sorted(known, key=lambda each: each["id"], reverse=True)  # all have the same time
            assert listed(client, path, status=status) == [
                each for each in newest_first if status in ("", each["status"])
            ]
        for meter_id in {*self.meters["development"], *self.meters["staging"]} - meters.keys():
            refused(client.get(f"/v1/meters/{meter_id}"), 404, "not_found")

    @rule(environment=ENVIRONMENTS, times=st.tuples(MOMENTS, MOMENTS), zone=st.sampled_from(ZONES), data=st.data(),
          fields=st.fixed_dictionaries({}, optional={"external_customer_id": SOME_CUSTOMER, "customer_id": st.just("c1"),
                                                     "filters": PROPERTY_FILTERS, "window_size": st.sampled_from(["HOUR", "DAY", "WEEK"])}))  # fmt: skip
    def compute_meter_usage(
        self, environment: str, times: tuple[str, str], zone: str, data: st.DataObject, fields: Json
    ) -> None:
        if not self.meters[environment]:
            return
        meter = data.draw(st.sampled_from([*self.meters[environment].values()]))
        query = {"start_time": min(times), "end_time": max(times), "timezone": zone, **fields}
        if min(times) == max(times) and meter["aggregation"]["type"] == "WEIGHTED_SUM":
            return  # WEIGHTED_SUM divides by the length of the range
        value, windows = expected_meter_usage(meter, self.events[environment].values(), query)
        answer = metered_usage(self.client_of(environment), meter["id"], **query)
        has_value = "window_size" not in query or meter["aggregation"]["bucket_size"]
        assert answer["value"] == (pytest.approx(value, rel=1e-9, abs=1e-9) if has_value else None)
        check_windows(answer, windows)

    @rule(environment=ENVIRONMENTS, times=st.tuples(MOMENTS, MOMENTS), group_by=GROUPINGS,
          fields=st.fixed_dictionaries({}, optional={
              "external_customer_id": SOME_CUSTOMER, "property_filters": PROPERTY_FILTERS, "expand": st.just(["source"]),
              "sources": st.just(["a", "::"]), "window_size": st.sampled_from(["HOUR", "3HOUR", "DAY", "WEEK", "MONTH"])}))  # fmt: skip
    def compute_analytics(self, environment: str, times: tuple[str, str], group_by: list[str], fields: Json) -> None:
        """Leaves out archived meters: the clock stands still, so no event came before or after they were archived."""
        query = {"start_time": min(times), "end_time": max(times), "group_by": group_by, **fields}
        events, meters = self.events[environment].values(), self.meters[environment]
        items = analytics(self.client_of(environment), **query)
        expected = {(meter["id"], group): item for meter in meters.values() if is_published(meter)
                    for group, item in expected_analytics(meter, events, query).items()}  # fmt: skip
        check_items([item for item in items if is_published(meters[item["meter_id"]])], query, expected)


@pytest.mark.slow
def test_random_operations_match_a_plain_python_model(choose: random.Random) -> None:
    options = settings(max_examples=EXAMPLES, stateful_step_count=25, deadline=None, print_blob=True, report_multiple_bugs=False,
                       suppress_health_check=list(HealthCheck))  # fmt: skip
    run_state_machine_as_test(seed(choose.getrandbits(64))(Model), settings=options)
