"""What the tests of several files need: an application and a server to talk to, events, and the rules in Python."""

from __future__ import annotations

import http.client
import json
import math
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import NamedTuple
from zoneinfo import ZoneInfo

import httpx
import pytest
from starlette.testclient import TestClient

import eventstore
from eventstore import ApiKey, Settings, create_app
from eventstore_extras import analytics as analytics_room

ROOT = Path(__file__).resolve().parent
DEBUGGER = (ROOT / "debugger.html").read_text("utf-8")
KEY, STAGING_KEY = "key-of-development", "key-of-staging"
KEYS = (ApiKey.hashed(KEY), ApiKey.hashed(STAGING_KEY, "staging"))
NOW = 1_760_528_327_962_000  # 2025-10-15T11:38:47.962Z
DAY_US = 86_400_000_000
EVER = {"start_time": eventstore.EARLIEST, "end_time": eventstore.LATEST}
table = pytest.mark.parametrize
SEED = int(os.environ.get("EVENTSTORE_TEST_SEED") or random.randrange(2**32))


@pytest.fixture
def choose(request, capsys) -> random.Random:
    """What chance decides in a test; its seed is shown, passed or failed."""
    line = f"EVENTSTORE_TEST_SEED={SEED}"
    with capsys.disabled():
        print(f" {line} ", end="", flush=True)
    print(line)  # this one is captured, and shown with the failure
    return random.Random(f"{SEED} {request.node.name}")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite with one xdist worker per core. Files and tests named on the command line, `-n 0` and
    `-p no:xdist` run in one process. `-n` in addopts would be an unknown option with `-p no:xdist`."""
    is_whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # a worker calls this hook too, and must not start workers
    if is_whole and not is_worker and getattr(config.option, "numprocesses", 0) is None:
        config.option.numprocesses = "auto"
        config.option.dist = "worksteal"  # neighbours stay together and share their module's server or browser


def pytest_configure() -> None:
    """A script starts `pytest &` with SIGINT ignored, and what the tests start and interrupt would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def serving(folder: Path, operations=(), **settings):
    """A client of the application in this process, on folder/events.db. To be entered and left."""
    settings = {"db": str(folder / "events.db"), "api_keys": KEYS, "clock": lambda: NOW} | settings
    app = create_app(Settings(**settings), operations=operations)
    return TestClient(app, raise_server_exceptions=False, headers={"x-api-key": KEY})


@pytest.fixture(scope="module")
def operations():
    """What a module's clients have beside the service's own; a module that wants more has a fixture of this name."""
    return ()


@pytest.fixture
def client(tmp_path, operations):
    with serving(tmp_path, operations) as client:
        yield client


@pytest.fixture(scope="module")
def shared(tmp_path_factory, operations):
    """For tests that care for nothing but their own events."""
    with serving(tmp_path_factory.mktemp("shared"), operations) as client:
        yield client


def at(after_us: int = 0) -> str:
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=NOW + after_us)).isoformat()


def event(event_id: object = None, **fields) -> dict:
    return {"event_name": "call", "external_customer_id": "cust", "event_id": event_id, **fields}


def store(client, *events: dict) -> httpx.Response:
    response = client.post("/v1/events/bulk", json={"events": events})
    assert response.status_code == 202, response.text
    return response


def counts(response: httpx.Response) -> tuple[int, int]:
    """How many events were new, and how many were known."""
    return int(response.headers["X-Events-Inserted"]), int(response.headers["X-Events-Duplicate"])


def ask(client, method: str, **query) -> httpx.Response:
    """The same query as GET parameters or as a POST body."""
    if method == "POST":
        return client.post("/v1/events/query", json=query)
    if filters := query.pop("property_filters", None):
        query["property_filters"] = ";".join(f"{key}:{','.join(values)}" for key, values in filters.items())
    return client.get("/v1/events", params=query)


def page(client, method: str = "GET", **query) -> dict:
    response = ask(client, method, **query)
    assert response.status_code == 200, response.text
    return response.json()


def ids(client, method: str = "GET", **query) -> list[str]:
    return [stored["id"] for stored in page(client, method, **query)["events"]]


def total(client) -> int:
    return page(client, "POST", page_size=1, **EVER)["total_count"]


def refused(response: httpx.Response, status: int = 400, code: str = "validation_error", part: str = "") -> dict:
    """Checks the whole error answer (1); returns its details."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), response.text
    body = response.json()
    message, details = body["message"], body["details"]
    assert message
    assert part in message
    assert isinstance(details, dict)
    assert body == {"code": code, "message": message, "http_status_code": status, "details": details, "success": False,
                    "error": {"message": message, "internal_error": None}}  # fmt: skip
    return details


@contextmanager
def stores_nothing(client) -> Iterator[None]:
    """What happens inside leaves no event behind, and the server takes a good one after it."""
    before = total(client)
    yield
    assert total(client) == before
    assert counts(store(client, event())) == (1, 0)


def database(folder: Path, **options) -> closing[sqlite3.Connection]:
    """A connection to folder/events.db beside the server's. To be entered and left."""
    return closing(sqlite3.connect(folder / "events.db", **options))


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Keeps the server's writer waiting, as another process that writes would."""
    with database(folder, isolation_level=None) as conn:
        conn.execute("BEGIN IMMEDIATE")
        yield


def refuse_to_write(folder: Path, condition: str, into: str = "events") -> None:
    with database(folder) as conn:
        action = "BEGIN SELECT RAISE(ABORT, 'full'); END"
        conn.execute(f"CREATE TRIGGER full BEFORE INSERT ON {into} WHEN {condition} {action}")


def rows_of(folder: Path) -> list[tuple]:
    """Every event in the file, which is to be sound, by its id."""
    with database(folder) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        columns = "environment, id, event_name, external_customer_id, source, timestamp_us, properties"
        return sorted(conn.execute(f"SELECT {columns} FROM events"), key=lambda row: row[1])


def rows_to_insert(*event_ids: str) -> list[eventstore.Row]:
    return [eventstore.Row(1, event_id, "cust", "", "call", "", NOW, NOW, "{}") for event_id in event_ids]


TEXT_FILE = "Dear diary, this is no database. " * 100


def sizes_in(folder: Path) -> dict[str, int]:
    """The files in the folder: what is to be as before."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def free_port() -> int:
    """Return a port on which nothing listens. It lies below those that the system hands out, so no client or server of
    another test takes it by chance; each xdist worker has a range of its own."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.sample(range(20_000 + worker % 12 * 1000, 21_000 + worker % 12 * 1000), 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    options = {"timeout": 60, "capture_output": True, "text": True} | options
    return subprocess.run([*map(str, command)], check=False, **options)


def python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """A Python of its own that finds the modules of this repository."""
    return run(sys.executable, "-c", code, *arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


def command_line(*arguments: object) -> int:
    """The exit status of the command, run in this process."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        return eventstore.main([*map(str, arguments)])
    finally:
        signal.signal(signal.SIGTERM, handler)


def exported(folder: Path, *flags: object, form: str = "ndjson") -> bytes:
    """What `eventstore export` writes of folder/events.db."""
    output = folder / f"exported.{form}"
    assert command_line("export", "--db", folder / "events.db", "--format", form, "-o", output, *flags) == 0
    return output.read_bytes()


def imported(folder: Path, content: bytes, *flags: object, status: int = 0) -> Path:
    """Imports the content into folder/events.db; returns the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "in").write_bytes(content)
    assert command_line("import", "--db", folder / "events.db", folder / "in", *flags) == status
    return folder


def lines_of(*events: dict) -> bytes:
    return b"".join(json.dumps(each).encode() + b"\n" for each in events)


def stored_ids(folder: Path) -> list[str]:
    return [json.loads(line)["event_id"] for line in exported(folder).splitlines()]


NASTY_PROPERTIES = [
    '{"a": "\\u0000 \\u2028 \u2028 \U0001f600 \\ud83d\\ude00 \\" \\\\ \\n"}',
    '{"big": 123456789012345678901234567890, "kept": 0.10, "e": 1E5, "minus": -0.0}',
    '{\r\n  "pretty" : [ 1,\n 2 ]\r,\t"text": "two  spaces, [brackets] {and} \\"quotes\\""\n}',
    json.dumps({"megabyte": 'x"\\,\n' * 200_000}),
    '{"a": 1, "a": 2, "": {}, "\\ud83d\\ude00": null}',
    "{}",
]
NASTY_TEXTS = [
    'a,b;"c"',
    "line\nbreak\r\nand\rmore",
    "\rlone",
    " spaces ",
    "'; --",
    "\u00e9\U0001f600\u2028\ufeff",
    "nul\x00",
    "=1+1",
    "\\N",
    "#",
]


def nasty_folder(folder: Path) -> Path:
    fields = [(text, json.dumps(text)) for text in NASTY_TEXTS]
    with serving(folder) as client:
        events = [
            f'{{"event_id": "p{number}", "event_name": "call", "external_customer_id": "cust", "properties": {properties}}}'
            for number, properties in enumerate(NASTY_PROPERTIES)
        ]
        events += [
            f'{{"event_id": {quoted}, "event_name": {json.dumps("n" + text)}, "external_customer_id": {quoted}, '
            f'"customer_id": {quoted}, "source": {quoted}, "timestamp": "{at(-number)}"}}'
            for number, (text, quoted) in enumerate(fields)
        ]
        for text in ("0001-01-02T00:00:00Z", "9999-12-31T23:59:59.999999Z"):
            events.append(json.dumps(event(text, timestamp=text)))
        answer = client.post("/v1/events/bulk", content=f'{{"events": [{",".join(events)}]}}'.encode())
        assert answer.status_code == 202, answer.text
    return folder


is_root = not hasattr(os, "geteuid") or os.geteuid() == 0
SCRIPT = (sys.executable, ROOT / "eventstore.py")


class Live:
    """`eventstore serve` in a process and a folder of its own. To be entered and left."""

    def __init__(self, folder: Path, *flags: str, command=SCRIPT, **environ: str):
        folder.mkdir(exist_ok=True)
        self.log_file, self.banner = folder / "stderr.txt", ""
        with self.log_file.open("w") as log:
            self.process = subprocess.Popen([*command, "serve", "--port", "0", *flags], cwd=folder, text=True,
                                            stdout=subprocess.PIPE, stderr=log, env=os.environ | environ)  # fmt: skip
        watchdog = threading.Timer(60, self.process.kill)
        watchdog.start()
        while self.banner.count("curl") < 2 and (line := self.process.stdout.readline()):
            self.banner += line
        watchdog.cancel()
        self.curl_lines = re.findall(r"curl .*", self.banner)
        assert len(self.curl_lines) == 2, self.log
        self.url, self.port = re.search(r"(http://127.0.0.1:(\d+))/v1", self.banner).groups()

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def client(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": key}, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.port)), timeout=30)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.process.stdout.close()


HEAD = f"Host: test\r\nx-api-key: {KEY}\r\n".encode()
POST = b"POST /v1/events HTTP/1.1\r\n" + HEAD
BODY = json.dumps(event()).encode()


def posting(body: bytes) -> bytes:
    """A POST of an event as it is on the wire."""
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answer_on(sock: socket.socket) -> httpx.Response:
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


@pytest.fixture(scope="module")
def live(tmp_path_factory):
    with Live(tmp_path_factory.mktemp("live"), "--api-key", KEY) as live:
        yield live
        assert KEY not in live.banner + live.log
        assert "Traceback" not in live.log


@pytest.fixture(autouse=True, scope="session")
def _clean_environment():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("no_proxy", "127.0.0.1")
        patch.delenv("FLEXPRICE_API_KEY", raising=False)
        patch.delenv("EVENTSTORE_API_KEYS", raising=False)
        yield


def time_us(text: str) -> int:
    return (datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def place_by(sort: str) -> Callable[[dict], tuple]:
    """Where an event stands in the total order."""
    names = ("event_name", "timestamp", "event_id") if sort == "event_name" else ("timestamp", "event_id")
    return lambda one: tuple(one[name] for name in names)


def cursor(one: dict) -> str:
    return f"{time_us(one['timestamp'])}000::{one['event_id']}"


def usage(client, kind: str = "COUNT", **query) -> dict:
    query = {key: value for key, value in query.items() if value is not None}
    response = client.post("/v1/events/usage", json={"event_name": "call", "aggregation_type": kind} | query)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["event_name", "type", "value", "results"]
    assert [list(result) for result in answer["results"]] == [["window_size", "value"]] * len(answer["results"])
    return answer


def windows_of(answer: dict) -> list[tuple[datetime, float]]:
    return [(datetime.fromisoformat(row["window_size"]), row["value"]) for row in answer["results"]]


def monitored(client, **query) -> tuple[int, list[tuple[str, int]]]:
    response = client.get("/v1/events/monitoring", params=query)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["total_count", "consumption_lag", "post_processing_lag", "points"]
    assert (answer["consumption_lag"], answer["post_processing_lag"]) == (0, 0)
    assert [list(point) for point in answer["points"]] == [["timestamp", "event_count"]] * len(answer["points"])
    return answer["total_count"], [(point["timestamp"], point["event_count"]) for point in answer["points"]]


LEDGER_START = datetime(2024, 10, 25, tzinfo=UTC)  # clocks go back in Berlin on October 27, in New York on November 3
SIZES = ("MINUTE", "15MIN", "30MIN", "HOUR", "3HOUR", "6HOUR", "12HOUR", "DAY", "WEEK", "MONTH")
MINUTES = dict(zip(SIZES, (1, 15, 30, 60, 180, 360, 720), strict=False))
ZONES = ("UTC", "America/New_York", "Asia/Kolkata", "Europe/Berlin", "Pacific/Apia")
AGGREGATIONS = ("COUNT", "SUM", "AVG", "MAX", "COUNT_UNIQUE", "LATEST", "SUM_WITH_MULTIPLIER", "WEIGHTED_SUM")


NAMES = ["tokens", "a.b", 'quo"te', "größe", "back\\slash", "$", "it's", "世[0]", " "]


def random_value(choose: random.Random) -> object:
    return choose.choice([
        choose.randint(-20, 100), choose.randint(0, 10**20), round(choose.uniform(-5, 50), 3), choose.random() * 1e-9,
        f"{choose.uniform(0, 50):.2f}", str(choose.randint(-9, 9)), "1e3", "+7", ".5", "5.", "-0.0", "007",
        "", "text", "12 apples", "0x10", "1_0", "NaN", "inf", "1e400", "true", "null", "1,5", "½", "٣", "--1",
        " 12", "12 ", "\t7", "7\n", " ", "1 2",
        True, False, None, {"a": 1}, [7], [], "tab\there", 'say "5"', "back\\slash", '"5"', "é世😀", "line\u2028", "'; --",
    ])  # fmt: skip


def number_of(value: object) -> float:
    is_decimal = isinstance(value, str) and re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value, re.ASCII)
    if isinstance(value, bool) or not (is_decimal or isinstance(value, (int, float))):
        return 0.0
    return float(value) if math.isfinite(float(value)) else 0.0


def text_of(value: object) -> str | None:
    return value if isinstance(value, str) or value is None else json.dumps(value, separators=(",", ":"))


def window_start(time: datetime, size: str, zone: str) -> datetime:
    local = time.astimezone(ZoneInfo(zone))
    day = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if minutes := MINUTES.get(size):
        hour, minute = divmod((local.hour * 60 + local.minute) // minutes * minutes, 60)
        day = day.replace(hour=hour, minute=minute, fold=local.fold)
    elif size == "WEEK":
        day -= timedelta(days=day.isoweekday() % 7)
    elif size == "MONTH":
        day = day.replace(day=1)
    return day.astimezone(UTC)


class Taken(NamedTuple):
    """An event that counts, with the number and the text of the property that is aggregated."""

    time: datetime
    event_id: str
    properties: dict
    number: float
    text: str | None


def scalars_of(properties: dict) -> dict[str, str | None]:
    """What property filters compare with."""
    return {key: None if isinstance(value, (dict, list)) else text_of(value) for key, value in properties.items()}


def aggregate(
    kind: str, rows: list[Taken], start: datetime, end: datetime, multiplier: float = 1, group: str = ""
) -> float:
    """Of one window, which has an event at least; `group`: the property whose groups have each a maximum of their own."""
    groups: dict[str, list[float]] = {}
    for row in rows:
        groups.setdefault(text_of(row.properties.get(group)) or "", []).append(row.number)
    numbers = [row.number for row in rows]
    return {"COUNT": lambda: len(rows), "SUM": lambda: math.fsum(numbers), "AVG": lambda: math.fsum(numbers) / len(rows),
            "MAX": lambda: math.fsum(map(max, groups.values())), "COUNT_UNIQUE": lambda: len({row.text for row in rows} - {None}),
            "LATEST": lambda: max(rows, key=lambda row: row[:2]).number,
            "SUM_WITH_MULTIPLIER": lambda: math.fsum(numbers) * multiplier,
            "WEIGHTED_SUM": lambda: math.fsum(row.number * ((end - max(row.time, start)) / (end - start)) for row in rows)}[kind]()  # fmt: skip


def in_windows(rows: list[Taken], size: str, zone: str = "UTC") -> dict[datetime, list[Taken]]:
    """The windows that have events, in time order."""
    windows: dict[datetime, list[Taken]] = {}
    for row in sorted(rows, key=lambda row: row.time):
        windows.setdefault(window_start(row.time, size, zone), []).append(row)
    return windows


def brute_force(
    events: list[dict], kind: str, query: dict, never_reset: bool = False
) -> tuple[float, list[tuple[datetime, float]]]:
    """The value over all events and that of each window, by the words of SPEC 7."""
    start, end = (datetime.fromisoformat(query[name]) for name in ("start_time", "end_time"))
    taken, chosen = [], [name for name in ("external_customer_id", "customer_id") if query.get(name)]
    for sent in events:
        time, properties = datetime.fromisoformat(sent["timestamp"]), sent["properties"]
        value, scalars = properties.get(query["property_name"]), scalars_of(properties)
        if (time < end and (start <= time or never_reset) and sent["event_name"] == query.get("event_name", "call")
                and all(sent[name] == query[name] for name in chosen)
                and all(scalars.get(key) in values for key, values in query.get("filters", {}).items())):  # fmt: skip
            taken.append(Taken(time, sent["event_id"], properties, number_of(value), text_of(value)))

    def aggregated(rows: list[Taken]) -> float:
        group = query.get("group_by", ["properties."])[0].removeprefix("properties.")
        return aggregate(kind, rows, start, end, float(query.get("multiplier", 1)), group)

    size, zone = query.get("bucket_size") or query.get("window_size"), query.get("timezone", "UTC")
    in_range = [row for row in taken if start <= row.time]
    results = (
        [(time, max(aggregated(rows), 0.0)) for time, rows in in_windows(in_range, size, zone).items()] if size else []
    )
    if query.get("bucket_size"):
        whole = math.fsum(map(aggregated, in_windows(taken, size, zone).values()))
    else:
        whole = aggregated(taken) if taken else 0.0
    return max(whole, 0.0), results


# ---------------------------------------------------------------------------------------------- meters


def metering(folder: Path, **settings):
    """A client of the application with meters and features."""
    return serving(folder, analytics_room.OPERATIONS, **settings)


def meter_of(
    kind: str = "COUNT", *, name="calls", event_name="call", reset_usage="BILLING_PERIOD", filters=None, **how
) -> dict:
    """The body that makes a meter; the rest is its aggregation's, whose field is n."""
    how = {"type": kind, **({} if kind == "COUNT" else {"field": "n"}), **how}
    conditions = [{"key": key, "values": values} for key, values in (filters or {}).items()]
    return {
        "name": name,
        "event_name": event_name,
        "aggregation": how,
        "filters": conditions,
        "reset_usage": reset_usage,
    }


def feature_of(name: str = "Calls", **fields) -> dict:
    """The body that makes a feature: by default a metered one with a meter of its own."""
    meter = {} if "type" in fields or "meter_id" in fields else {"meter": meter_of()}
    return {"name": name, "type": "metered", **meter, **fields}


def make(client, path: str, body: dict) -> dict:
    response = client.post(f"/v1/{path}", json=body)
    assert (response.status_code, response.headers["content-type"]) == (201, "application/json"), response.text
    return response.json()


def make_meter(client, kind: str = "COUNT", **fields) -> dict:
    return make(client, "meters", meter_of(kind, **fields))


def make_feature(client, name: str = "Calls", **fields) -> dict:
    return make(client, "features", feature_of(name, **fields))


def listed(client, path: str = "meters", **query) -> list[dict]:
    """All meters or features that a list finds, the newest first."""
    response = client.get(f"/v1/{path}", params={"limit": 1000} | query)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert answer["pagination"]["total"] == len(answer["items"])
    return answer["items"]


def faulty_fields(response: httpx.Response) -> list[str]:
    """The fields that a refused body has wrong, sorted."""
    errors = refused(response)["errors"]
    assert all(each["code"] in ("required", "invalid_type", "invalid_format", "out_of_range") for each in errors)
    assert all((each["index"], each["event_id"]) in ((0, None), (None, None)) and each["message"] for each in errors)
    return sorted(each["field"] for each in errors)


def metered_usage(client, meter_id: str, **query) -> dict:
    response = client.post("/v1/events/usage/meter", json={"meter_id": meter_id} | query)
    assert response.status_code == 200, response.text
    answer = response.json()
    assert list(answer) == ["event_name", "type", "value", "results"]
    assert [list(result) for result in answer["results"]] == [["window_size", "value"]] * len(answer["results"])
    return answer


def usage_by_hand(meter: dict, events: list[dict], query: dict) -> tuple[float, list[tuple[datetime, float]]]:
    """The value and the windows of a meter, by the words of SPEC 13."""
    how, filters = meter["aggregation"], {key: [*values] for key, values in query.get("filters", {}).items() if values}
    for condition in meter["filters"]:
        both = filters.get(condition["key"], condition["values"])
        filters[condition["key"]] = [value for value in condition["values"] if value in both]
    asked = query | {"event_name": meter["event_name"], "property_name": how["field"], "filters": filters}
    asked |= {"multiplier": how["multiplier"] or 1} | (
        {"bucket_size": how["bucket_size"]} if how["bucket_size"] else {}
    )
    asked |= {"group_by": [f"properties.{how['group_by']}"]} if how["group_by"] else {}
    return brute_force(events, how["type"], asked, meter["reset_usage"] == "NEVER")


class Item(NamedTuple):
    """What is compared of an item of analytics, or of a point, whose width is none."""

    usage: float
    event_count: int
    points: dict[datetime, Item]
    width: str | None = None
    sources: list[str] | None = None


Group = tuple[tuple[str, str | None], ...]  # the dimensions, sorted, and what they are


def analytics_by_hand(meter: dict, events: list[dict], query: dict) -> dict[Group, Item]:
    """The items of one meter, by the words of SPEC 14. `events` are those that it may count."""
    how = meter["aggregation"]
    start, end = (datetime.fromisoformat(query[name]) for name in ("start_time", "end_time"))
    dimensions = sorted({*query.get("group_by", [])} - {"feature_id", "meter_id"})
    is_split = any(dimension.startswith(("source", "properties.")) for dimension in dimensions)
    conditions = [(each["key"], each["values"]) for each in meter["filters"]]
    conditions += [(key, values) for key, values in query.get("property_filters", {}).items() if values]

    def is_taken(one: dict) -> bool:
        scalars, customer = scalars_of(one["properties"]), query.get("external_customer_id")
        return (one["event_name"] == meter["event_name"] and start <= datetime.fromisoformat(one["timestamp"]) < end
                and customer in (None, "", one["external_customer_id"])
                and ("sources" not in query or one["source"] in query["sources"])
                and all(scalars.get(key) in values for key, values in conditions))  # fmt: skip

    def group_of(one: dict) -> Group:
        named = {name: one[name] or None for name in ("source", "external_customer_id")}
        named |= {f"properties.{key}": text_of(value) for key, value in one["properties"].items()}
        return tuple((dimension, named.get(dimension)) for dimension in dimensions)

    def taken(one: dict) -> Taken:
        value = one["properties"].get(how["field"])
        time = datetime.fromisoformat(one["timestamp"])
        return Taken(time, one["event_id"], one["properties"], max(number_of(value), 0.0), text_of(value))

    def aggregated(rows: list[Taken]) -> float:
        group = "" if is_split else how["group_by"] or ""
        return aggregate(how["type"], rows, start, end, float(how["multiplier"] or 1), group)

    def buckets(rows: list[Taken]) -> list[float]:
        return [*map(aggregated, in_windows(rows, how["bucket_size"]).values())]

    def point(rows: list[Taken]) -> Item:
        largest_of = how["bucket_size"] and how["type"] == "MAX"
        return Item(max(buckets(rows)) if largest_of else aggregated(rows), len(rows), {})

    groups: dict[Group, list[dict]] = {}
    for one in filter(is_taken, events):
        groups.setdefault(group_of(one), []).append(one)
    items, sizes = {}, [size for size in (query.get("window_size"), how["bucket_size"]) if size]
    width = max(sizes, key=SIZES.index) if sizes else None
    for group, members in groups.items():
        rows = [taken(one) for one in members]
        usage_of = math.fsum(buckets(rows)) if how["bucket_size"] else aggregated(rows)
        windows = in_windows(rows, width) if query.get("window_size") else {}
        sources = sorted({one["source"] for one in members} - {""})
        expanded = "source" in query.get("expand", []) and "source" not in dimensions
        points = {time: point(within) for time, within in windows.items()}
        items[group] = Item(usage_of, len(rows), points, width, sources if expanded else None)
    return items


def analytics(client, **query) -> list[dict]:
    """The items. What belongs to prices is as ever, and has been looked at."""
    response = client.post("/v1/events/analytics", json=query)
    assert response.status_code == 200, response.text
    answer = response.json()
    items = answer.pop("items")
    assert answer == {
        "subtotal": "0",
        "total_discount": "0",
        "total_cost": "0",
        "currency": "",
        "custom_analytics": None,
    }
    for item in items:
        assert item.keys() == ITEM_KEYS
        assert {item[key] for key in ("subtotal", "total_discount", "total_cost")} == {"0"}
        assert {item[key] for key in NULL_KEYS} == {None}
        for point in item["points"]:
            assert point.keys() == POINT_KEYS
            assert {point[key] for key in POINT_KEYS - {"timestamp", "usage", "event_count", "buckets"}} == {"0"}
            assert point["buckets"] is None
        for decimal in (item["total_usage"], *(point["usage"] for point in item["points"])):
            assert re.fullmatch(r"(0|[1-9]\d*)(\.\d*[1-9])?", decimal), decimal
    return items


NULL_KEYS = {"currency", "price_id", "price", "sub_line_item_id", "subscription_id", "subscription_line_item", "plan_id",
             "plan", "add_on_id", "addon", "commitment_info", "group", "bucket_summaries"}  # fmt: skip
ITEM_KEYS = NULL_KEYS | {
    "feature_id", "name", "meter_id", "event_name", "aggregation_type", "total_usage", "total_usage_display",
    "reporting_unit", "unit", "unit_plural", "event_count", "external_customer_id", "source", "sources", "properties",
    "window_size", "points", "subtotal", "total_discount", "total_cost", "meter", "feature"}  # fmt: skip
POINT_KEYS = {"timestamp", "usage", "event_count", "subtotal", "discount", "cost", "computed_commitment_utilized_amount",
              "computed_overage_amount", "computed_true_up_amount", "buckets"}  # fmt: skip


def grouped(items: list[dict], query: dict) -> dict[tuple[str, Group], Item]:
    """Answered items as `analytics_by_hand` has them, by meter and group."""
    dimensions = sorted({*query.get("group_by", [])} - {"feature_id", "meter_id"})
    by_group = {}
    for item in items:
        named = {name: item[name] for name in ("source", "external_customer_id")}
        named |= {f"properties.{key}": value for key, value in (item["properties"] or {}).items()}
        assert {name for name, value in named.items() if value is not None} <= {*dimensions}
        assert (item["properties"] is None) is not any(name.startswith("properties.") for name in dimensions)
        points = {
            datetime.fromisoformat(point["timestamp"]): Item(float(point["usage"]), point["event_count"], {})
            for point in item["points"]
        }
        assert [*points] == sorted(points)
        key = item["meter_id"], tuple((dimension, named.get(dimension)) for dimension in dimensions)
        assert key not in by_group
        by_group[key] = Item(
            float(item["total_usage"]), item["event_count"], points, item["window_size"], item["sources"]
        )
    assert len(by_group) == len(items)
    return by_group


def check_items(items: list[dict], query: dict, expected: dict[tuple[str, Group], Item]) -> None:
    """The answered items are the expected ones, but for what floats lose."""
    answered = grouped(items, query)
    assert answered.keys() == expected.keys(), query
    for key, wanted in expected.items():
        got = answered[key]
        assert got.usage == pytest.approx(wanted.usage, rel=1e-9, abs=1e-9), (key, query)
        assert got._replace(usage=0, points={}) == wanted._replace(usage=0, points={}), (key, query)
        assert got.points.keys() == wanted.points.keys(), (key, query)
        usages = [[one.points[time].usage for time in wanted.points] for one in (got, wanted)]
        assert usages[0] == pytest.approx(usages[1], rel=1e-9, abs=1e-9), (key, query)
        counted = [[one.points[time].event_count for time in wanted.points] for one in (got, wanted)]
        assert counted[0] == counted[1], (key, query)
