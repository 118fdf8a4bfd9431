"""What the tests of several files need: an application and a server to talk to, events, and the rules in Python."""

from __future__ import annotations

import http.client
import json
import math
import os
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from zoneinfo import ZoneInfo

import httpx
import pytest
from starlette.testclient import TestClient

import eventstore
from eventstore import ApiKey, Settings, create_app

ROOT = Path(__file__).resolve().parent
DEBUGGER = (ROOT / "debugger.html").read_text("utf-8")
KEY, STAGING_KEY = "key-of-development", "key-of-staging"
KEYS = (ApiKey.hashed(KEY), ApiKey.hashed(STAGING_KEY, "staging"))
NOW = 1_760_528_327_962_000  # 2025-10-15T11:38:47.962Z
DAY_US = 86_400_000_000
EVER = {"start_time": eventstore.EARLIEST, "end_time": eventstore.LATEST}
table = pytest.mark.parametrize


def pytest_configure() -> None:
    """A script starts `pytest &` with SIGINT ignored, and what the tests start and interrupt would inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def serving(folder: Path, **settings):
    """A client of the application in this process, on folder/events.db. To be entered and left."""
    settings = {"db": str(folder / "events.db"), "api_keys": KEYS, "clock": lambda: NOW} | settings
    return TestClient(create_app(Settings(**settings)), raise_server_exceptions=False, headers={"x-api-key": KEY})


@pytest.fixture
def client(tmp_path):
    with serving(tmp_path) as client:
        yield client


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """For tests that care for nothing but their own events."""
    with serving(tmp_path_factory.mktemp("shared")) as client:
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


def refuse_to_write(folder: Path, condition: str) -> None:
    with database(folder) as conn:
        action = "BEGIN SELECT RAISE(ABORT, 'full'); END"
        conn.execute(f"CREATE TRIGGER full BEFORE INSERT ON events WHEN {condition} {action}")


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


def eventually(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(0.005)


def run(*command: object, **options) -> subprocess.CompletedProcess[str]:
    options = {"timeout": 60, "capture_output": True, "text": True} | options
    return subprocess.run([*map(str, command)], check=False, **options)


def python(code: str, *arguments: object, **options) -> subprocess.CompletedProcess[str]:
    """A Python of its own that finds the modules of this repository."""
    return run(sys.executable, "-c", code, *arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


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


def brute_force(events: list[dict], kind: str, query: dict) -> tuple[float, list[tuple[datetime, float]]]:
    """The value over all events and that of each window, by the words of SPEC 7."""
    start, end = (datetime.fromisoformat(query[name]) for name in ("start_time", "end_time"))
    taken = []
    for sent in events:
        time, properties = datetime.fromisoformat(sent["timestamp"]), sent["properties"]
        chosen = [name for name in ("external_customer_id", "customer_id") if query.get(name)]
        scalars = {
            key: None if isinstance(value, (dict, list)) else text_of(value) for key, value in properties.items()
        }
        if (start <= time < end and sent["event_name"] == "call" and all(sent[name] == query[name] for name in chosen)
                and all(scalars.get(key) in values for key, values in query.get("filters", {}).items())):  # fmt: skip
            taken.append((time, sent["event_id"], properties))

    def aggregate(rows: list) -> float:
        values = [number_of(properties.get(query["property_name"])) for _, _, properties in rows]
        texts = {text_of(properties.get(query["property_name"])) for _, _, properties in rows} - {None}
        group_property = query.get("group_by", ["properties."])[0].removeprefix("properties.")
        groups: dict[str, list[float]] = {}
        for value, (_, _, properties) in zip(values, rows, strict=True):
            groups.setdefault(text_of(properties.get(group_property)) or "", []).append(value)
        return {"COUNT": lambda: len(rows), "SUM": lambda: math.fsum(values), "AVG": lambda: math.fsum(values) / len(rows),
                "MAX": lambda: math.fsum(map(max, groups.values())), "COUNT_UNIQUE": lambda: len(texts),
                "LATEST": lambda: number_of(max(rows, key=lambda row: row[:2])[2].get(query["property_name"])),
                "SUM_WITH_MULTIPLIER": lambda: math.fsum(values) * 2.5,
                "WEIGHTED_SUM": lambda: math.fsum(value * ((end - row[0]) / (end - start))
                                                  for value, row in zip(values, rows, strict=True))}[kind]()  # fmt: skip

    size, cells = query.get("bucket_size") or query.get("window_size"), {}
    for row in taken:
        cells.setdefault(window_start(row[0], size or "MONTH", query.get("timezone", "UTC")), []).append(row)
    per_cell = [(time, aggregate(cells[time])) for time in sorted(cells)]
    whole = (
        math.fsum(value for _, value in per_cell) if query.get("bucket_size") else aggregate(taken) if taken else 0.0
    )
    return max(whole, 0.0), [(time, max(value, 0.0)) for time, value in per_cell] if size else []
