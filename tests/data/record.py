"""Record what a version of eventstore answers: makes a database file with that version, asks it, and writes both here.

    python tests/data/record.py CLONE NUMBER

CLONE is a clone of that version, NUMBER its file format. Written are format-NUMBER.db, its forwarding progress, and
format-NUMBER.json with each request and its answer. tests/test_upgrades.py opens the file with the code as it is now,
and compares its answers. format-1 was made by commit 9477560.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

KEYS = {"development": "key-of-development", "staging": "key-of-staging"}
FORWARD_PORT = 18_099  # the progress of forwarding names its target, so the port is always the same
Json = dict[str, Any]

# ---------------------------------------------------------------------------------------------- what is stored

TEXTS = ["größe", "世界 😀", 'quo"te', "it's; --", "line\nbreak", "100% a,b:c", "nul\x00", " spaces "]
PROPERTIES = [
    '{"model":"large","tokens":%d,"region":"eu"}',
    '{"model":"small","tokens":"%d.25","cached":true}',
    '{ "model" : "größe \\u4e16", "tokens": -%d, "nested": {"a": [1, 2, {"b": null}]} }',
    '{"tokens":%d123456789012345678,"e":1E5,"minus":-7.5,"kept":0.10}',
    '{"model":null,"user":"user-%d","text":"tab\\t \\"quote\\" back\\\\slash \\ud83d\\ude00"}',
    '{"%d":[]}',
]


def stored_events() -> Iterator[bytes]:
    """Yield the bodies of the events: ties, texts of all kinds, times from year 1 to 9999, one large event."""
    names, customers, sources = ["call", "call", "größe", "z"], ["a", "b", "世界"], ["", "api", "größe"]
    for number in range(48):
        time = f"2025-03-{28 + number // 16}T{number // 16 * 10:02}:00:00.{number // 12:06}Z"  # a dozen at each time
        head = {"event_id": f"id-{number * 37 % 48:02}", "event_name": names[number % 4], "timestamp": time,
                "external_customer_id": customers[number % 3], "source": sources[number % 5 % 3]}  # fmt: skip
        properties = PROPERTIES[number % 6] % number
        yield f'{json.dumps(head)[:-1]}, "properties": {properties}}}'.encode()
    for number, text in enumerate(TEXTS):
        yield json.dumps({"event_id": f"id {text}", "event_name": text, "external_customer_id": text, "source": text,
                          "customer_id": text, "timestamp": f"2025-04-0{number + 1}T00:00:00+02:00",
                          "properties": {text: text, "tokens": number}}).encode()  # fmt: skip
    for time in ("0001-01-02T00:00:00Z", "1969-12-31T23:59:59.999999Z", "9999-12-31T23:59:59.999999Z"):
        yield json.dumps(
            {"event_id": time, "event_name": "far", "external_customer_id": "a", "timestamp": time}
        ).encode()
    large = {"filler": "x" * 9_000, "tokens": 5}
    yield json.dumps({"event_id": "large", "event_name": "call", "external_customer_id": "large",
                      "timestamp": "2025-04-10T00:00:00Z", "properties": large}).encode()  # fmt: skip


AGGREGATIONS: list[Json] = [
    {"type": "COUNT"}, {"type": "SUM", "field": "tokens"}, {"type": "AVG", "field": "tokens"},
    {"type": "MAX", "field": "tokens"}, {"type": "COUNT_UNIQUE", "field": "user"}, {"type": "LATEST", "field": "tokens"},
    {"type": "SUM_WITH_MULTIPLIER", "field": "tokens", "multiplier": "0.5"}, {"type": "WEIGHTED_SUM", "field": "tokens"},
    {"type": "SUM", "field": "tokens", "bucket_size": "DAY"},
    {"type": "MAX", "field": "tokens", "bucket_size": "HOUR", "group_by": "model"},
]  # fmt: skip


def store_all(client: httpx.Client) -> None:
    """Store the events, and a meter and a feature for each aggregation, some of them archived."""
    for body in stored_events():
        client.post("/v1/events", content=body).raise_for_status()
    other = {
        "event_id": "id-00",
        "event_name": "call",
        "external_customer_id": "a",
        "timestamp": "2025-03-29T00:00:00Z",
    }
    headers = {"x-api-key": KEYS["staging"]}
    client.post("/v1/events", json=other, headers=headers).raise_for_status()  # the same id in another environment
    for number, aggregation in enumerate(AGGREGATIONS):
        filters = [{"key": "model", "values": ["large", "größe 世"]}] if number % 3 == 2 else []
        meter = {"name": f"meter {number} ü", "event_name": "call", "aggregation": aggregation, "filters": filters,
                 "reset_usage": "NEVER" if number % 2 else "BILLING_PERIOD"}  # fmt: skip
        if number == 3:
            made = client.post("/v1/meters", json=meter).raise_for_status().json()
            client.post(f"/v1/meters/{made['id']}/disable").raise_for_status()
            continue
        units = {"unit_singular": "token", "unit_plural": "tokens", "metadata": {"team": "größe"},
                 "reporting_unit": {"unit_singular": "k", "unit_plural": "k", "conversion_rate": "1000"}}  # fmt: skip
        feature = {"name": f"Feature {number} ü", "type": "metered", "meter": meter, **(units if number % 2 else {})}
        made = client.post("/v1/features", json=feature).raise_for_status().json()
        if number == 5:
            client.delete(f"/v1/features/{made['id']}").raise_for_status()
    client.post("/v1/features", json={"name": "Static", "type": "static", "lookup_key": "fixed"}).raise_for_status()


# ---------------------------------------------------------------------------------------------- what is asked

EVER: Json = {"start_time": "0001-01-01T00:00:01Z", "end_time": "9999-12-31T23:59:59.999999Z"}
SPRING: Json = {"start_time": "2025-03-28T00:00:00Z", "end_time": "2025-04-11T00:00:00Z"}
FILTERS: list[Json] = [
    {}, {"external_customer_id": "a"}, {"external_customer_id": "世界"}, {"event_name": "call"}, {"event_name": "größe"},
    {"source": "größe"}, {"event_id": "id-07"}, {"event_name": "call", "external_customer_id": "b"},
    {"property_filters": {"model": ["large", "größe 世"]}}, {"property_filters": {"cached": ["true"]}},
    {"event_name": 'quo"te', "property_filters": {'quo"te': ['quo"te']}},
]  # fmt: skip


def walks() -> Iterator[Json]:
    """Yield a query for each way to page through the events: sorts, orders, filters."""
    for filters, sort, order in itertools.product(FILTERS, ("timestamp", "event_name"), ("asc", "desc")):
        yield {**EVER, **filters, "sort": sort, "order": order, "page_size": 9}


def other_requests(meters: list[Json], features: list[Json]) -> Iterator[tuple[str, str, Json]]:
    """Yield method, path and the body, or the parameters of a GET."""
    yield "GET", "/v1/events", {**EVER, "count_total": "true", "page_size": 50, "offset": 20}
    yield "GET", "/v1/events", {**SPRING, "external_customer_id": "b", "property_filters": "model:small,large"}
    yield "POST", "/v1/events/query", {**EVER, "page_size": 1000}
    for event_id in ("id-07", "id 世界 😀", "large", "0001-01-02T00:00:00Z"):
        yield "GET", "/v1/events/lookup", {"id": event_id}
    for size in ("15MIN", "DAY", "MONTH"):
        yield "GET", "/v1/events/monitoring", {**SPRING, "window_size": size}
    for aggregation, zone in itertools.product(AGGREGATIONS, ("UTC", "Europe/Berlin")):
        names = {"type": "aggregation_type", "field": "property_name", "group_by": "group_by_property"}
        query = {names.get(name, name): value for name, value in aggregation.items()}
        for windows in ({}, {"window_size": "DAY"}, {"window_size": "MONTH", "billing_anchor": "2025-01-15T00:00:00Z"}):
            yield "POST", "/v1/events/usage", {**SPRING, **query, **windows, "event_name": "call", "timezone": zone}
    yield "GET", "/v1/meters", {"limit": 1000, "sort": "name", "order": "asc"}
    yield "GET", "/v1/features", {"limit": 1000, "sort": "name", "status": "published"}
    yield "POST", "/v1/features/search", {"name_contains": "FEATURE", "limit": 3}
    for feature in features:
        yield "GET", f"/v1/features/{feature['id']}", {}
    for meter, windows in itertools.product(meters, ({}, {"window_size": "DAY"})):
        yield "POST", "/v1/events/usage/meter", {"meter_id": meter["id"], **SPRING, **windows}
    for group_by in ([], ["properties.model"], ["source", "external_customer_id"]):
        yield "POST", "/v1/events/analytics", {**SPRING, "group_by": group_by, "expand": ["source"]}
    yield "POST", "/v1/events/analytics", {**SPRING, "window_size": "DAY"}


class Recorder:
    def __init__(self, client: httpx.Client) -> None:
        self.client = client
        self.answers: list[Json] = []

    def ask(self, method: str, path: str, sent: Json, environment: str = "development") -> Json:
        kind: Json = {"params": sent} if method == "GET" else {"json": sent}
        headers = {"x-api-key": KEYS[environment]}
        answer: Json = self.client.request(method, path, headers=headers, **kind).raise_for_status().json()
        self.answers.append({"environment": environment, "method": method, "path": path, **kind, "answer": answer})
        return answer

    def walk(self, query: Json) -> None:
        """Ask for page after page, and for one page backwards; of the events record only the ids."""
        begun, page = len(self.answers), self.ask("POST", "/v1/events/query", query)
        while page["has_more"]:
            page = self.ask("POST", "/v1/events/query", query | {"iter_last_key": page["iter_last_key"]})
        if query["order"] == "desc" and page["events"]:
            self.ask("POST", "/v1/events/query", query | {"iter_first_key": page["iter_first_key"]})
        for each in self.answers[begun:]:
            each["answer"]["events"] = [{"id": event["id"]} for event in each["answer"]["events"]]

    def ask_all(self) -> None:
        for query in walks():
            self.walk(query)
        lists = [
            self.client.get(f"/v1/{path}", params={"limit": 1000}).json()["items"] for path in ("meters", "features")
        ]
        for method, path, sent in other_requests(*lists):
            self.ask(method, path, sent)
        self.ask("POST", "/v1/events/query", EVER, "staging")


# ---------------------------------------------------------------------------------------------- running the version


@contextmanager
def server(clone: Path, db: Path, *flags: str) -> Iterator[httpx.Client]:
    keys = [word for name, key in KEYS.items() for word in ("--api-key", f"{key}={name}")]
    command = [sys.executable, str(clone / "eventstore.py"), "serve", "--db", str(db), *keys, *flags]
    environ = os.environ | {"PYTHONPATH": str(clone), "EVENTSTORE_FORWARD_API_KEY": KEYS["development"]}
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        url = next(found[0] for line in process.stdout if (found := re.findall(r"base URL +(http\S+)/v1", line)))
        try:
            with httpx.Client(base_url=url, headers={"x-api-key": KEYS["development"]}, timeout=60) as client:
                yield client
        finally:
            process.send_signal(signal.SIGTERM)


def wait_until_forwarded(client: httpx.Client) -> None:
    while client.get("/v1/events/monitoring").json()["post_processing_lag"]:
        pass


def main(clone: Path, number: str) -> None:
    here, name = Path(__file__).resolve().parent, f"format-{number}.db"
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder, name)
        forwarding = ("--forward-to", f"http://127.0.0.1:{FORWARD_PORT}/v1", "--forward-environment", "development")
        target = server(clone, Path(folder, "target.db"), "--port", str(FORWARD_PORT))
        with target, server(clone, db, "--port", "0", *forwarding) as client:
            store_all(client)
            wait_until_forwarded(client)
        with server(clone, db, "--port", "0") as client:
            client.post("/v1/events", json={"event_id": "waits", "event_name": "call", "external_customer_id": "a",
                                            "timestamp": "2025-04-09T00:00:00Z"}).raise_for_status()  # fmt: skip
            recorder = Recorder(client)
            recorder.ask_all()
        for path in Path(folder).glob(f"{name}*"):
            shutil.copy(path, here)
        lines = ",\n".join(json.dumps(each, ensure_ascii=False) for each in recorder.answers)
        (here / f"format-{number}.json").write_text(f"[\n{lines}\n]\n", "utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), sys.argv[2])
