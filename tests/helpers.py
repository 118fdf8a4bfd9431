"""Helpers of several test files: events, an application and servers to send them to, and checks of the answers."""

from __future__ import annotations

import asyncio
import functools
import http.client
import io
import json
import logging
import os
import random
import re
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, redirect_stderr, redirect_stdout, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import httpx
import pytest

from eventstore import EARLIEST, LATEST, ApiKey, Operation, Row, Service, Settings, Store, create_app, main
from eventstore_extras import analytics as analytics_module
from forked import MAIN, ROOT, ForkedProcess, Template, start
from in_process import InProcessClient

DEBUGGER = (ROOT / "debugger.html").read_text("utf-8")
KEY, STAGING_KEY = "key-of-development", "key-of-staging"
KEYS = (ApiKey.hashed(KEY), ApiKey.hashed(STAGING_KEY, "staging"))
NOW = 1_760_528_327_962_000  # 2025-10-15T11:38:47.962Z
DAY_US = 86_400_000_000
EVER = {"start_time": EARLIEST, "end_time": LATEST}

_CERTIFICATES = os.environ.get("SSL_CERT_FILE")

Json = dict[str, Any]  # an event, a query or an answer
table = pytest.mark.parametrize
is_root = not hasattr(os, "geteuid") or os.geteuid() == 0

# ---------------------------------------------------------------------------------------------- the application in this process


@functools.cache
def _new_file() -> bytes:
    """Return an empty database file with the environments of KEYS. Copying it is faster than creating one for each test."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "events.db"
        Store(Settings(db=str(path), api_keys=KEYS)).close()
        return path.read_bytes()


def serving(folder: Path, operations: Sequence[Operation] = (), **settings: Any) -> InProcessClient:
    """Return a client of the application in this process, on folder/events.db; use it as a context manager.

    Without `db` and `api_keys`, a new file is a copy; give `db` if a test is about how the application creates the file.
    Queries may take ten minutes: on a busy machine the largest need more than the default.
    """
    path = folder / "events.db"
    if not settings.keys() & {"db", "api_keys"} and not path.exists():
        path.touch(0o600)  # the mode that the application gives it
        path.write_bytes(_new_file())
    chosen: dict[str, Any] = {"db": str(path), "api_keys": KEYS, "clock": lambda: NOW, "query_timeout_s": 600}
    chosen |= settings
    app = create_app(Settings(**chosen), operations=operations)
    return InProcessClient(app, headers={"x-api-key": KEY})


def service_of(client: httpx.Client) -> Service:
    """Return the service of an application in this process."""
    app: Any = cast(InProcessClient, client).app
    service: Service = app.state.service
    return service


def store_of(client: httpx.Client) -> Store:
    return service_of(client).store


def metering(folder: Path, **settings: Any) -> InProcessClient:
    """Return a client as `serving` does, of an application with meters and features."""
    return serving(folder, analytics_module.OPERATIONS, **settings)


# ---------------------------------------------------------------------------------------------- events


def at(after_us: int = 0) -> str:
    """Return the time so many microseconds after NOW as text."""
    return (datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=NOW + after_us)).isoformat()


def event(event_id: object = None, **fields: Any) -> Json:
    return {"event_name": "call", "external_customer_id": "cust", "event_id": event_id, **fields}


def store(client: httpx.Client, *events: Json) -> httpx.Response:
    response = client.post("/v1/events/bulk", json={"events": events})
    assert response.status_code == 202, response.text
    return response


def counts(response: httpx.Response) -> tuple[int, int]:
    """Return how many events were new, and how many were duplicates."""
    return int(response.headers["X-Events-Inserted"]), int(response.headers["X-Events-Duplicate"])


def _answered(response: httpx.Response) -> Json:
    assert response.status_code == 200, response.text
    return dict(response.json())


def ask(client: httpx.Client, method: str, **query: Any) -> httpx.Response:
    """Send the same query as GET parameters or as a POST body."""
    if method == "POST":
        return client.post("/v1/events/query", json=query)
    if filters := query.pop("property_filters", None):
        query["property_filters"] = ";".join(f"{key}:{','.join(values)}" for key, values in filters.items())
    return client.get("/v1/events", params=query)


def page(client: httpx.Client, method: str = "GET", **query: Any) -> Json:
    return _answered(ask(client, method, **query))


def ids(client: httpx.Client, method: str = "GET", **query: Any) -> list[str]:
    return [stored["id"] for stored in page(client, method, **query)["events"]]


def total(client: httpx.Client) -> int:
    """Return the number of all events."""
    return int(page(client, "POST", page_size=1, **EVER)["total_count"])


def refused(response: httpx.Response, status: int = 400, code: str = "validation_error", part: str = "") -> Json:
    """Check the whole error answer (SPEC 1) and return its details."""
    assert (response.status_code, response.headers["content-type"]) == (status, "application/json"), response.text
    body = response.json()
    message, details = body["message"], body["details"]
    assert message
    assert part in message
    assert isinstance(details, dict)
    assert body == {"code": code, "message": message, "http_status_code": status, "details": details, "success": False,
                    "error": {"message": message, "internal_error": None}}  # fmt: skip
    return dict(details)


@contextmanager
def stores_nothing(client: httpx.Client) -> Iterator[None]:
    """Check that the block stores no event, and that the server accepts one afterwards."""
    before = total(client)
    yield
    assert total(client) == before
    assert counts(store(client, event())) == (1, 0)


# ---------------------------------------------------------------------------------------------- the database file


def database(folder: Path, **options: Any) -> closing[sqlite3.Connection]:
    """Open another connection to folder/events.db; use it as a context manager."""
    return closing(sqlite3.connect(folder / "events.db", **options))


@contextmanager
def write_lock(folder: Path) -> Iterator[None]:
    """Hold the write lock, so that the server's writer has to wait."""
    with database(folder, isolation_level=None) as conn:
        conn.execute("BEGIN IMMEDIATE")
        yield


def refuse_to_write(folder: Path, condition: str, into: str = "events") -> None:
    """Let SQLite fail every insert of a `new` row that meets the condition."""
    with database(folder) as conn:
        action = "BEGIN SELECT RAISE(ABORT, 'full'); END"
        conn.execute(f"CREATE TRIGGER full BEFORE INSERT ON {into} WHEN {condition} {action}")


def rows_of(folder: Path) -> list[tuple[Any, ...]]:
    """Check the file's integrity and return its events in the order of their ids."""
    with database(folder) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        columns = "environment, id, event_name, external_customer_id, source, timestamp_us, properties"
        return sorted(conn.execute(f"SELECT {columns} FROM events"), key=lambda row: row[1])


def rows_to_insert(*event_ids: str) -> list[Row]:
    return [Row(1, event_id, "cust", "", "call", "", NOW, NOW, "{}") for event_id in event_ids]


def fill(filler: Path) -> None:
    """Leave room for a page, but not for a batch."""
    with filler.open("wb", buffering=0) as file, suppress(OSError):
        while file.write(b"x" * 4096):
            pass
    os.truncate(filler, filler.stat().st_size - 100_000)


# ---------------------------------------------------------------------------------------------- commands

TEXT_FILE = "Dear diary, this is no database. " * 100


def sizes_in(folder: Path) -> dict[str, int]:
    """Return the size of each file in the folder."""
    return {path.name: path.stat().st_size for path in folder.iterdir()}


def free_port() -> int:
    """Return a port on which nothing listens.

    It lies below the ports that the system hands out, so that no client or server of another test takes it by chance.
    Each xdist worker has its own range.
    """
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    for port in random.sample(range(20_000 + worker % 12 * 1000, 21_000 + worker % 12 * 1000), 1000):
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
    raise AssertionError("no free port")


def request_bytes(
    method: str,
    path: str,
    body: bytes = b"",
    headers: str = "",
    *,
    key: str = KEY,
    version: str = "1.1",
    chunked: bool = False,
) -> bytes:
    head = f"{method} {path} HTTP/{version}\r\nHost: test\r\nx-api-key: {key}\r\n{headers}"
    if chunked:
        pieces = [body[start : start + 20] for start in range(0, len(body), 20)]
        chunks = b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in pieces)
        return f"{head}Transfer-Encoding: chunked\r\n\r\n".encode() + chunks + b"0\r\n\r\n"
    if body:
        head += f"Content-Length: {len(body)}\r\n"
    return f"{head}\r\n".encode() + body


def eventually(condition: Callable[[], object], pause_s: float = 0.002) -> None:
    """Wait until the condition is true, asking less often the longer it takes."""
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, "it never happened"
        time.sleep(pause_s)
        pause_s = min(pause_s * 1.2, 0.05)


async def becomes(condition: Callable[[], object]) -> None:
    """Wait in an event loop until the condition is true."""
    async with asyncio.timeout(60):
        while not condition():  # noqa: ASYNC110 - another thread makes it true
            await asyncio.sleep(0.001)


def run(*command: object, **options: Any) -> subprocess.CompletedProcess[str]:
    options = {"timeout": 60, "capture_output": True, "text": True} | options
    return subprocess.run([*map(str, command)], check=False, **options)


def environ_to_download() -> dict[str, str]:
    """Return the environment of a command that needs all certificates: the tests' own has a single one (conftest.py)."""
    environ = {name: value for name, value in os.environ.items() if name != "SSL_CERT_FILE"}
    return environ | ({"SSL_CERT_FILE": _CERTIFICATES} if _CERTIFICATES else {})


def python(code: str, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run the code in another Python, which finds the modules of this repository."""
    return run(sys.executable, "-c", code, *arguments, env=os.environ | {"PYTHONPATH": str(ROOT)}, **options)


def command_line(*arguments: object) -> int:
    """Run `eventstore` in this process and return its exit status. Then undo its changes to signals and log handlers."""
    logs = [(log, log.formatter, [*log.filters]) for log in logging.getLogger().handlers]
    numbers = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        return main([*map(str, arguments)])
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for log, formatter, filters in logs:
            log.formatter, log.filters = formatter, filters


def refused_in_one_line(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """Run a command that must not start: exit status 2, no output, and one line on standard error. Return the line."""
    capsys.readouterr()
    assert command_line(*arguments) == 2
    output, message = capsys.readouterr()
    assert output == ""
    assert re.fullmatch(r"eventstore: .+\n", message)
    return message


def refusal(folder: Path, *arguments: object, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `eventstore` in this process, in the folder. Fail if it starts a server, or leaves a thread: it would not end."""
    threads_before = {*threading.enumerate()}
    output, errors = io.StringIO(), io.StringIO()
    server = Mock()
    server.run = lambda **_: pytest.fail("it started")
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(output), redirect_stderr(errors):
        patch.chdir(folder)
        patch.setattr("eventstore.uvicorn_server", lambda *_: server)
        for name, value in environ.items():
            patch.setenv(name, value)
        try:
            status: Any = command_line(*arguments)
        except SystemExit as exit_:
            status = exit_.code
    assert [thread for thread in {*threading.enumerate()} - threads_before if not thread.daemon] == []
    return subprocess.CompletedProcess(list(map(str, arguments)), status, output.getvalue(), errors.getvalue())


def exported(folder: Path, *flags: object, form: str = "ndjson") -> bytes:
    """Return what `eventstore export` writes from folder/events.db."""
    output = folder / f"exported.{form}"
    assert command_line("export", "--db", folder / "events.db", "--format", form, "-o", output, *flags) == 0
    return output.read_bytes()


def imported(folder: Path, content: bytes, *flags: object, status: int = 0) -> Path:
    """Import the content into folder/events.db and return the folder."""
    folder.mkdir(exist_ok=True)
    (folder / "in").write_bytes(content)
    assert command_line("import", "--db", folder / "events.db", folder / "in", *flags) == status
    return folder


def lines_of(*events: Json) -> bytes:
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
    """Store events with all nasty texts and properties in folder/events.db and return the folder."""
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


# ---------------------------------------------------------------------------------------------- a server in a process

# Runs the module of this checkout. It starts faster than the script, which Python compiles each time.
SCRIPT = (sys.executable, "-c", f"import sys; sys.path.insert(0, {str(ROOT)!r}); {MAIN}")


class Live:
    """A context manager for `eventstore serve` in a new process, with `folder` as its working directory.

    `command` is the command to run, or a template to fork; by default the template of all tests is forked.
    """

    def __init__(
        self,
        folder: Path,
        *flags: str,
        command: Sequence[object] | Template | None = None,
        code: str = MAIN,
        **environ: str,
    ) -> None:
        folder.mkdir(exist_ok=True)
        self.log_file, self.banner = folder / "stderr.txt", ""
        arguments = ["serve", "--port", "0", *flags]
        read_end, write_end = os.pipe()
        self.stdout = os.fdopen(read_end)
        with self.log_file.open("w") as log, os.fdopen(write_end, "w") as output:
            self.process: subprocess.Popen[bytes] | ForkedProcess
            if command is None or isinstance(command, Template):
                files = [0, output.fileno(), log.fileno()]
                self.process = start(folder, arguments, files, environ, code, command)
            else:
                self.process = subprocess.Popen([*map(str, command), *arguments], cwd=folder, stdout=output, stderr=log,
                                                env=os.environ | environ)  # fmt: skip
        watchdog = threading.Timer(60, self.process.kill)  # ends the loop below
        watchdog.start()
        while self.banner.count("curl") < 2 and (line := self.stdout.readline()):
            self.banner += line
        watchdog.cancel()
        self.curl_lines = re.findall(r"curl .*", self.banner)
        assert len(self.curl_lines) == 2, self.log
        self.url, self.port = re.findall(r"(http://127.0.0.1:(\d+))/v1", self.banner)[0]

    @property
    def log(self) -> str:
        return self.log_file.read_text()

    def log_has(self, text: str, times: int = 1) -> bool:
        return self.log.count(text) >= times

    def client(self, key: str = KEY) -> httpx.Client:
        return httpx.Client(base_url=self.url, headers={"x-api-key": key}, timeout=60)

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", int(self.port)), timeout=30)

    def begin_to_stop(self, number: int = signal.SIGTERM) -> None:
        """Send the signal, and wait until the server accepts no connection any more."""
        self.process.send_signal(number)
        with suppress(OSError):
            while True:
                self.connect().close()
                time.sleep(0.01)

    def stop(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        return self.process.wait(30)

    def __enter__(self) -> Live:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        self.stdout.close()


HEAD = f"Host: localhost\r\nx-api-key: {KEY}\r\n".encode()
POST = b"POST /v1/events HTTP/1.1\r\n" + HEAD
BODY = json.dumps(event()).encode()


def posting(body: bytes) -> bytes:
    """Return the bytes of a request that posts the body as an event."""
    return POST + b"Content-Length: %d\r\n\r\n" % len(body) + body


def answer_on(sock: socket.socket) -> httpx.Response:
    """Read one answer from the socket."""
    answer = http.client.HTTPResponse(sock)
    answer.begin()
    return httpx.Response(answer.status, headers=answer.getheaders(), content=answer.read())


# ---------------------------------------------------------------------------------------------- usage, meters, analytics

LEDGER_START = datetime(2024, 10, 25, tzinfo=UTC)  # clocks go back in Berlin on October 27, in New York on November 3
ZONES = ("UTC", "America/New_York", "Asia/Kolkata", "Europe/Berlin", "Pacific/Apia")


NAMES = ["tokens", "a.b", 'quo"te', "größe", "back\\slash", "$", "it's", "世[0]", " "]


def random_value(choose: random.Random) -> object:
    return choose.choice([
        choose.randint(-20, 100), choose.randint(0, 10**20), round(choose.uniform(-5, 50), 3), choose.random() * 1e-9,
        f"{choose.uniform(0, 50):.2f}", str(choose.randint(-9, 9)), "1e3", "+7", ".5", "5.", "-0.0", "007",
        "", "text", "12 apples", "0x10", "1_0", "NaN", "inf", "1e400", "true", "null", "1,5", "½", "٣", "--1",
        " 12", "12 ", "\t7", "7\n", " ", "1 2",
        True, False, None, {"a": 1}, [7], [], "tab\there", 'say "5"', "back\\slash", '"5"', "é世😀", "line\u2028", "'; --",
    ])  # fmt: skip


def _usage_in(response: httpx.Response) -> Json:
    answer = _answered(response)
    assert list(answer) == ["event_name", "type", "value", "results"]
    assert [list(result) for result in answer["results"]] == [["window_size", "value"]] * len(answer["results"])
    return answer


def usage(client: httpx.Client, kind: str = "COUNT", **query: Any) -> Json:
    query = {key: value for key, value in query.items() if value is not None}
    body = {"event_name": "call", "aggregation_type": kind} | query
    return _usage_in(client.post("/v1/events/usage", json=body))


def windows_of(answer: Json) -> list[tuple[datetime, float]]:
    return [(datetime.fromisoformat(row["window_size"]), row["value"]) for row in answer["results"]]


def monitored(client: httpx.Client, **query: Any) -> tuple[int, list[tuple[str, int]]]:
    """Return the total count of monitoring, and the time and count of each point."""
    answer = _answered(client.get("/v1/events/monitoring", params=query))
    assert list(answer) == ["total_count", "consumption_lag", "post_processing_lag", "points"]
    assert (answer["consumption_lag"], answer["post_processing_lag"]) == (0, 0)
    assert [list(point) for point in answer["points"]] == [["timestamp", "event_count"]] * len(answer["points"])
    return answer["total_count"], [(point["timestamp"], point["event_count"]) for point in answer["points"]]


def meter_of(
    kind: str = "COUNT",
    *,
    name: str = "calls",
    event_name: str = "call",
    reset_usage: str = "BILLING_PERIOD",
    filters: Mapping[str, Sequence[str]] | None = None,
    **how: Any,
) -> Json:
    """Return the body that makes a meter. `how` goes into its aggregation, whose field is n by default."""
    how = {"type": kind, **({} if kind == "COUNT" else {"field": "n"}), **how}
    conditions = [{"key": key, "values": values} for key, values in (filters or {}).items()]
    return {
        "name": name,
        "event_name": event_name,
        "aggregation": how,
        "filters": conditions,
        "reset_usage": reset_usage,
    }


def feature_of(name: str = "Calls", **fields: Any) -> Json:
    """Return the body that makes a feature, by default a metered one together with a new meter."""
    meter = {} if "type" in fields or "meter_id" in fields else {"meter": meter_of()}
    return {"name": name, "type": "metered", **meter, **fields}


def make(client: httpx.Client, path: str, body: Json) -> Json:
    response = client.post(f"/v1/{path}", json=body)
    assert (response.status_code, response.headers["content-type"]) == (201, "application/json"), response.text
    return dict(response.json())


def make_meter(client: httpx.Client, kind: str = "COUNT", **fields: Any) -> Json:
    return make(client, "meters", meter_of(kind, **fields))


def make_feature(client: httpx.Client, name: str = "Calls", **fields: Any) -> Json:
    return make(client, "features", feature_of(name, **fields))


def listed(client: httpx.Client, path: str = "meters", **query: Any) -> list[Json]:
    """Return all meters or features that a list finds, newest first."""
    answer = _answered(client.get(f"/v1/{path}", params={"limit": 1000} | query))
    assert answer["pagination"]["total"] == len(answer["items"])
    return list(answer["items"])


def faulty_fields(response: httpx.Response) -> list[str]:
    """Return the fields that the error answer names, sorted."""
    errors = refused(response)["errors"]
    assert all(each["code"] in ("required", "invalid_type", "invalid_format", "out_of_range") for each in errors)
    assert all((each["index"], each["event_id"]) in ((0, None), (None, None)) and each["message"] for each in errors)
    return sorted(each["field"] for each in errors)


def metered_usage(client: httpx.Client, meter_id: str, **query: Any) -> Json:
    return _usage_in(client.post("/v1/events/usage/meter", json={"meter_id": meter_id} | query))


_NULL_KEYS = {"currency", "price_id", "price", "sub_line_item_id", "subscription_id", "subscription_line_item", "plan_id",
             "plan", "add_on_id", "addon", "commitment_info", "group", "bucket_summaries"}  # fmt: skip
_ITEM_KEYS = _NULL_KEYS | {
    "feature_id", "name", "meter_id", "event_name", "aggregation_type", "total_usage", "total_usage_display",
    "reporting_unit", "unit", "unit_plural", "event_count", "external_customer_id", "source", "sources", "properties",
    "window_size", "points", "subtotal", "total_discount", "total_cost", "meter", "feature"}  # fmt: skip
_POINT_KEYS = {"timestamp", "usage", "event_count", "subtotal", "discount", "cost", "computed_commitment_utilized_amount",
              "computed_overage_amount", "computed_true_up_amount", "buckets"}  # fmt: skip


def analytics(client: httpx.Client, **query: Any) -> list[Json]:
    """Return the items of analytics, after a check that the fields about prices are empty."""
    answer = _answered(client.post("/v1/events/analytics", json=query))
    items: list[Json] = answer.pop("items")
    assert answer == {
        "subtotal": "0",
        "total_discount": "0",
        "total_cost": "0",
        "currency": "",
        "custom_analytics": None,
    }
    for item in items:
        assert item.keys() == _ITEM_KEYS
        assert {item[key] for key in ("subtotal", "total_discount", "total_cost")} == {"0"}
        assert {item[key] for key in _NULL_KEYS} == {None}
        for point in item["points"]:
            assert point.keys() == _POINT_KEYS
            assert {point[key] for key in _POINT_KEYS - {"timestamp", "usage", "event_count", "buckets"}} == {"0"}
            assert point["buckets"] is None
        for decimal in (item["total_usage"], *(point["usage"] for point in item["points"])):
            assert re.fullmatch(r"(0|[1-9]\d*)(\.\d*[1-9])?", decimal), decimal
    return items
