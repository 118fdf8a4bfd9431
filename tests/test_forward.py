"""The outbox: `serve --forward-to`."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import shutil
import signal
import socket
import ssl
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import httpx
import pytest
from test_reliability import Sender, check_ledgers, known_row, sending

import eventstore
from conftest import KEY, NOW, SCRIPT, Live, database, event, eventually, python, rows_of, run, serving, store, table
from eventstore_extras import forward
from eventstore_extras.mock import running_server


class Target:
    """A server that takes batches and remembers them, but for what its tricks answer otherwise."""

    def __init__(self, *tricks: Callable[[BaseHTTPRequestHandler, list[str]], bool], api_key: str = KEY):
        """Each trick is asked about one request, with its ids; one that says False lets it through."""
        self.api_key, self.tricks, self.batches, self.accepted, self.paths = api_key, [*tricks], [], [], []
        self.sizes: list[int] = []
        self.most_bytes, self.resets = 1 << 40, 0  # the connection of a larger body is reset
        target = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 65_536

            def do_POST(self):
                if (size := int(self.headers["content-length"])) > target.most_bytes:
                    target.resets += 1
                    reset(self)
                    return
                body = self.rfile.read(size)
                events = json.loads(body)["events"]
                ids = [one["event_id"] for one in events]
                target.paths.append(self.path)
                target.batches.append(ids)
                target.sizes.append(len(body))
                trick = target.tricks[0] if target.tricks else None
                if trick and len(target.tricks) > 1:
                    target.tricks.pop(0)
                if not (trick and trick(self, ids)):
                    assert self.headers["x-api-key"] == target.api_key
                    target.accepted += events
                    reply(self, 202, b"{}")

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    @property
    def ids(self) -> list[str]:
        return [one["event_id"] for one in self.accepted]

    def __enter__(self) -> Target:
        threading.Thread(target=self.server.serve_forever, args=[0.01]).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def reply(handler, status: int, body: bytes = b"", **headers: str) -> bool:
    handler.send_response(status)
    for name, value in ({"content-length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    try:
        handler.wfile.write(body)
    except OSError:  # whoever asked has read enough
        handler.close_connection = True
    return True


def answering(status: int, body: bytes = b"", **headers: str) -> Callable[[BaseHTTPRequestHandler, list[str]], bool]:
    return lambda handler, _: reply(handler, status, body, **headers)


def let_through(_handler: BaseHTTPRequestHandler, _ids: list[str]) -> bool:
    return False


def cut(handler: BaseHTTPRequestHandler, _: object) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def reset(handler: BaseHTTPRequestHandler) -> None:
    """As a proxy does that has read enough."""
    handler.rfile.read(1000)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(handler.connection.detach())
    handler.close_connection = True


def cut_after_the_status(handler: BaseHTTPRequestHandler, _: object) -> bool:
    handler.wfile.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 1000\r\n\r\n{")
    handler.wfile.flush()
    return cut(handler, _)


@pytest.fixture(autouse=True)
def _impatient(monkeypatch):
    """What waits in earnest for seconds waits for an instant."""
    monkeypatch.setattr(forward, "BACKOFF_BASE_S", 0.001)
    monkeypatch.setattr(forward, "BLOCKED_PAUSE_S", 0.01)
    monkeypatch.setattr(forward, "WATCH_INTERVAL_S", 0.01)


@contextmanager
def an_edge(target: object, **settings):
    """A server that forwards, and a client of it."""
    with (
        running_server(api_keys={KEY: "development", "other": "staging"}, forward_to=target, **settings) as server,
        httpx.Client(base_url=server.url.removesuffix("/v1"), headers={"x-api-key": KEY}, timeout=60) as client,
    ):
        yield server, client


def numbered(count: int, start: int = 0, **fields) -> list[dict]:
    return [event(f"{number:05}", **fields) for number in range(start, start + count)]


def filled(folder: Path, count: int, environment: int = 1) -> str:
    """A database with so many events of an environment, stored a second ago."""
    path = str(folder / "events.db")
    eventstore.prepare_file(path)
    with closing(eventstore.connect(path)) as conn:
        for name in ("development", "staging"):
            eventstore.environment_number(conn, name)
        rows = [eventstore.Row(environment, f"{environment}-{number:05}", "cust", "", "call", "", NOW, eventstore.now_us() - 1_000_000, "{}")
                for number in range(count)]  # fmt: skip
        eventstore.insert_events(conn, rows, 5)
    return path


def behind(client: httpx.Client, key: str = KEY) -> tuple[int, str | None]:
    answer = client.get("/v1/events/monitoring", headers={"x-api-key": key})
    return answer.json()["post_processing_lag"], answer.headers.get("X-Forward-To")


def progress_of(folder: Path) -> dict:
    (path,) = folder.glob("events.db.forward-????????????????.json")
    return json.loads(path.read_bytes())


# ---------------------------------------------------------------------------------------------- what is sent


def test_everything_is_sent_on_as_it_was_stored_in_the_order_of_arrival(tmp_path):
    path = filled(tmp_path, 2500)
    odd = event(
        "odd",
        source="s",
        customer_id="c",
        timestamp="2025-01-01T00:00:00.000001Z",
        properties={"n": 0.10, "big": 12345678901234567890},
    )
    with Target() as target, an_edge(target, db=path) as (edge, client):
        store(client, odd, event("later"))
        client.post("/v1/events", json=event("elsewhere"), headers={"x-api-key": "other"})
        edge.wait_until_forwarded()
        assert behind(client) == (0, f"127.0.0.1:{target.server.server_port}")
        assert behind(client, "other") == (0, None)
    assert target.ids == [*(f"1-{number:05}" for number in range(2500)), "odd", "later"]
    assert target.accepted[2500] == odd
    assert max(map(len, target.batches)) == 1000
    assert set(target.paths) == {"/v1/events/bulk"}
    assert progress_of(tmp_path) == {"target": target.url, "environment": "development", "seq": 2503, "last_seq": 2502,
                                     "last_id": "later", "accepted": 2502, "refused": 0, "late_s": 0} | {"seq": progress_of(tmp_path)["seq"]}  # fmt: skip


def test_what_is_not_accepted_yet_is_counted(tmp_path):
    with Target(answering(503)) as target, an_edge(target) as (edge, client):
        store(client, *numbered(1))
        with pytest.raises(TimeoutError, match=r"after 0\.05 s: 1 event not forwarded to 127\.0\.0\.1:\d+ yet"):
            edge.wait_until_forwarded(0.05)
        store(client, *numbered(6, 1))
        assert behind(client)[0] == 7
        assert behind(client, "other")[0] == 0
        with pytest.raises(TimeoutError, match=r"7 events not forwarded to 127\.0\.0\.1:\d+ yet"):
            edge.wait_until_forwarded(0.05)
        target.tricks[:] = []
        edge.wait_until_forwarded()
        assert behind(client)[0] == 0
    assert target.ids == [f"{number:05}" for number in range(7)]


def test_what_another_process_stores_is_sent_on_too(tmp_path):
    path = filled(tmp_path, 0)
    (tmp_path / "in.ndjson").write_text(json.dumps(event("imported")))
    with Target() as target, an_edge(target, db=path) as (edge, client):
        store(client, event("over HTTP"))
        assert run(*SCRIPT, "import", "in.ndjson", cwd=tmp_path).returncode == 0
        edge.wait_until_forwarded()
    assert target.ids == ["over HTTP", "imported"]


def test_events_of_another_environment_are_passed_over_a_span_at_a_time(tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "SPAN", 10)
    path = filled(tmp_path, 95, environment=2)
    with Target() as target, an_edge(target, db=path) as (edge, client):
        store(client, event("first"))
        eventually(lambda: target.ids == ["first"])
        eventually(lambda: behind(client)[0] == 0)
        edge.wait_until_forwarded()
    assert progress_of(tmp_path)["last_id"] == "first"


@pytest.mark.slow
def test_a_request_holds_at_most_10_mb_unless_one_event_is_longer(tmp_path):
    with serving(tmp_path) as client:
        for one in numbered(20, properties={"x": "y" * 1_500_000}):
            store(client, one)
        store(client, event("huge", properties={"x": "y" * 17_000_000}))
        store(client, event("after"))
    with Target() as target, an_edge(target, db=str(tmp_path / "events.db")) as (edge, _):
        edge.wait_until_forwarded()
    assert [len(batch) for batch in target.batches] == [6, 6, 6, 2, 1, 1]
    assert sum(size > 10_000_000 for size in target.sizes) == 1
    assert target.ids[-2:] == ["huge", "after"]


# ---------------------------------------------------------------------------------------------- what a target answers

ECHOED = json.dumps({"message": f"the key {KEY} is not\nmine \x1b[31m"}).encode()


@table(
    ("trick", "level", "part"),
    [
        (answering(429, b'{"message": "slow down"}'), "WARNING", "answered 429: slow down; trying again"),
        (answering(408), "WARNING", "answered 408"),
        (answering(500, b"<html>oops"), "WARNING", "answered 500: <html>oops"),
        (answering(503, b"x" * 10_000_000), "WARNING", "answered 503: xxx"),
        (answering(500, b'{"message": "' + b"m" * 60_000 + b'"}'), "WARNING", "answered 500: mmm"),
        (cut, "WARNING", " bytes: Server disconnected without sending a response.; trying again"),
        (answering(200, b"<p>hello"), "ERROR", "answered 200: <p>hello - 202 was expected. Is forward_to the URL"),
        (answering(301, location="http://127.0.0.1:1/"), "ERROR", 'It redirects to "http://127.0.0.1:1/", where the key'),
        (answering(401, ECHOED), "ERROR", "answered 401: the key *** is not mine [31m (the key came from forward_to)"),
        (answering(403), "ERROR", "answered 403"),
        (answering(404), "ERROR", "nothing is forwarded until that is mended"),
        (answering(405), "ERROR", "answered 405"),
        (answering(418), "ERROR", "answered 418"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_nothing_is_skipped_whatever_else_than_202_a_target_answers(caplog, trick, level, part):
    with Target(trick, trick, trick, let_through) as target, an_edge(target) as (edge, client):
        store(client, *numbered(3))
        store(client, *numbered(3, 3))
        edge.wait_until_forwarded()
    assert target.ids == [f"{number:05}" for number in range(6)]
    (line,) = [record for record in caplog.records if record.message.startswith("forwarding: ")]
    assert line.levelname == level
    assert part in line.message
    assert KEY not in line.message
    assert (len(line.message) < 700, line.message.isprintable()) == (True, True)


@pytest.mark.slow
def test_a_target_that_resets_large_bodies_gets_smaller_ones_and_larger_ones_once_it_takes_them(tmp_path, monkeypatch):
    monkeypatch.setattr(forward, "GROW_AFTER", 2)
    path = str(tmp_path / "events.db")
    with Target() as target, an_edge(target, db=path) as (edge, client):
        target.most_bytes = 100_000
        store(client, *numbered(1000, properties={"x": "y" * 4000}))
        edge.wait_until_forwarded()
        assert target.sizes
        assert 50_000 < max(target.sizes) <= 100_000
        assert target.resets < len(target.sizes) * 2
        target.most_bytes = 2_000_000
        store(client, *numbered(1000, 1000, properties={"x": "y" * 4000}))
        edge.wait_until_forwarded()
        assert 1_000_000 < max(target.sizes) <= 2_000_000
    assert target.ids == [f"{number:05}" for number in range(2000)]
    assert not (tmp_path / "events.db.refused.ndjson").exists()


def test_one_event_whose_connection_is_reset_each_time_is_neither_dropped_nor_passed_by(tmp_path, caplog):
    path = str(tmp_path / "events.db")
    with Target() as target, an_edge(target, db=path) as (edge, client):
        target.most_bytes = 100_000
        store(client, event("a"), event("large", properties={"x": "y" * 3_000_000}), event("b"))
        eventually(lambda: target.resets > 8)
        assert (target.ids, behind(client)[0]) == (["a"], 2)
        target.most_bytes = 4_000_000
        edge.wait_until_forwarded()
    assert target.ids == ["a", "large", "b"]
    assert "broke off a request of 3,000," in caplog.text
    assert not (tmp_path / "events.db.refused.ndjson").exists()


A, B, L, OK, NO = (forward.Outcome[name] for name in ("AGAIN", "BROKEN", "TOO_LARGE", "ACCEPTED", "REFUSED"))


@table(
    ("outcomes", "sizes", "waits"),
    [
        ([A] * 6 + [OK], [8] * 7, [0, 1, 2, 3, 4, 5]),
        ([B, B, A, OK], [8] * 4, [0, 1, 2]),
        ([B, B, B, A, OK], [8, 8, 8, 4, 4], [0, 1, 2, 3]),
        ([B, A, B, A, B, OK], [8] * 5 + [4], [0, 1, 2, 3, 4]),
        ([B] * 8 + [OK], [8, 8, 8, 4, 2, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([L, OK], [8, 4], []),
        ([L, L, L, L], [8, 4, 2, 1], []),
        ([B, NO], [8, 8], [0]),
    ],
    ids=["away", "broken twice", "three times", "among others", "for ever", "413", "413 for one event", "400"],
)
def test_a_batch_is_sent_in_parts_only_if_it_breaks_off_again_and_again_or_is_too_large(outcomes, sizes, waits):
    sent, waited, answers = [], [], iter(outcomes)

    async def post(body: bytes) -> forward.Answer:
        sent.append(len(json.loads(body)["events"]))
        return forward.Answer(next(answers))

    async def wait(_: forward.Answer, waits: int) -> None:
        waited.append(waits)

    batch = forward.Batch([(number, None) for number in range(8)], [b'{"event_id":"1"}'] * 8)
    part, answer = asyncio.run(forward.Sender(SimpleNamespace(post=post), wait).send_first(batch))
    assert (sent, waited) == (sizes, waits)
    assert (len(part.rows), answer.outcome) == (sizes[-1], outcomes[-1])


def test_a_target_that_never_answers_is_asked_again(caplog, monkeypatch):
    monkeypatch.setattr(forward, "STALL_TIMEOUT_S", 0.1)
    silence = threading.Event()
    hang = lambda *_: silence.wait(30)  # noqa: E731
    with Target(hang, let_through) as target, an_edge(target) as (edge, client):
        store(client, *numbered(3))
        edge.wait_until_forwarded()
        silence.set()
    assert "cannot be reached: ReadTimeout" in caplog.text
    assert target.ids == ["00000", "00001", "00002"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_bad_certificate_is_named_and_gets_no_key(tmp_path, caplog):
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=127.0.0.1")
    run("openssl", "req", "-x509", *curve, "-keyout", tmp_path / "key.pem", "-out", tmp_path / "own.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem", tmp_path / "key.pem")
    target = Target()
    target.server.socket = context.wrap_socket(target.server.socket, server_side=True)
    target.server.handle_error = lambda *_: None  # it would print that the handshake failed
    target.url = target.url.replace("http:", "https:")
    with target, an_edge(target) as (_, client):
        store(client, event("a"))
        eventually(lambda: "cannot be reached: [SSL: CERTIFICATE_VERIFY_FAILED]" in caplog.text)
        assert behind(client)[0] == 1
    assert target.batches == []


@table("trick", [answering(202), cut_after_the_status], ids=["empty", "cut off"])
def test_a_202_is_one_whatever_its_body(trick):
    with Target(trick) as target, an_edge(target) as (edge, client):
        store(client, *numbered(3))
        edge.wait_until_forwarded()
        store(client, *numbered(3, 3))
        edge.wait_until_forwarded()
    assert list(itertools.chain(*target.batches)) == [f"{number:05}" for number in range(6)]


def test_pauses_grow_up_to_30_s_and_last_as_long_as_retry_after(monkeypatch):
    monkeypatch.setattr(forward, "BACKOFF_BASE_S", 0.5)
    again = forward.Answer(forward.Outcome.AGAIN)
    longest = [max(again.pause_s(attempt) for _ in range(200)) for attempt in range(40)]
    assert longest[0] <= 0.5
    assert 15 < longest[8] <= 30
    assert 15 < longest[39] <= 30
    assert 7 <= again._replace(retry_after_s=7).pause_s(0) < 7.6
    assert again._replace(retry_after_s=1e9).pause_s(0) == 3600


def test_a_pause_lasts_as_long_as_the_target_asks_for(monkeypatch):
    pauses = []
    pause = forward.Forwarder._pause

    async def at_once(self, seconds: float) -> None:
        pauses.append(seconds)
        await pause(self, min(seconds, 0.01))

    monkeypatch.setattr(forward.Forwarder, "_pause", at_once)
    with Target(answering(429, retry_after="7"), answering(401), let_through) as target, an_edge(target) as (edge, client):  # fmt: skip
        store(client, event("a"))
        edge.wait_until_forwarded()
    assert [seconds for seconds in pauses if seconds >= 7] == [7]
    assert forward.BLOCKED_PAUSE_S in pauses


def test_a_weeks_outage_delays_and_loses_nothing_and_is_told_once(caplog):
    caplog.set_level(logging.INFO, "eventstore")
    clock = SimpleNamespace(us=NOW)
    with Target(answering(503)) as target, an_edge(target, clock=lambda: clock.us) as (edge, client):
        for hour in range(7 * 24):
            store(client, *numbered(10, 10 * hour))
            clock.us += 3600 * 1_000_000
        assert behind(client)[0] == 1680
        eventually(lambda: "has fallen behind" in caplog.text)
        target.tricks[:] = []
        edge.wait_until_forwarded()
        eventually(lambda: "has caught up" in caplog.text)
    assert target.ids == [f"{number:05}" for number in range(1680)]
    told = [record for record in caplog.records if "forwarding" in record.message]
    assert Counter(record.levelname for record in told if "answered 503" not in record.message) == {
        "WARNING": 1,
        "INFO": 1,
    }
    assert sum("answered 503" in record.message for record in told) <= 7 * 24 + 1


@table(
    ("waiting", "running_s", "is_told"),
    [
        ((0, 0), 3600, False),
        ((10_000, 59), 3600, False),
        ((10_001, 0), 3600, True),
        ((1, 61), 3600, True),
        ((12, 7200), 60, False),
        ((12, 7200), 61, True),
        ((10_001, 7200), 14, False),
        ((10_001, 7200), 15, True),
    ],
)
def test_it_is_behind_from_10000_events_or_a_minute_on_but_not_at_once_after_a_start(
    tmp_path, caplog, waiting, running_s, is_told
):
    caplog.set_level(logging.INFO, "eventstore")
    clock = SimpleNamespace(us=NOW - running_s * 1_000_000)
    service = SimpleNamespace(store=None, settings=SimpleNamespace(clock=lambda: clock.us))
    target = SimpleNamespace(url="https://host/v1")
    forwarder = forward.Forwarder(service, target, forward.ForwardProgress(target="", environment=""), tmp_path, 0.0)
    clock.us = NOW
    events, seconds = waiting
    for _ in range(3):
        forwarder._judge(events, NOW - seconds * 1_000_000)
    assert [record.message for record in caplog.records] == [
        f"forwarding to host has fallen behind: {eventstore.counted(events, 'event')} wait, the first for {seconds} s"
    ] * is_told
    forwarder._judge(1001, NOW)
    forwarder._judge(1000, NOW)
    forwarder._judge(1000, NOW)
    assert caplog.text.count("has caught up") == is_told


@table(
    ("late_before_s", "down_s", "running_s", "is_told"),
    [(0, 604_800, 60, False), (0, 604_800, 61, True), (50, 604_800, 10, False), (50, 604_800, 11, True), (50, 1, 11, True)],
    ids=str,
)  # fmt: skip
def test_time_in_which_no_server_ran_is_none_that_it_is_behind(tmp_path, caplog, late_before_s, down_s, running_s, is_told):  # fmt: skip
    clock = SimpleNamespace(us=NOW)
    service = SimpleNamespace(store=None, settings=SimpleNamespace(clock=lambda: clock.us))
    progress = forward.ForwardProgress(target="", environment="")
    for number, seconds in enumerate((late_before_s, running_s)):
        forwarder = forward.Forwarder(service, SimpleNamespace(url="https://host/v1"), progress, tmp_path, 0.0)
        clock.us += seconds * 1_000_000
        forwarder._judge(1, NOW)
        clock.us += down_s * 1_000_000
        assert ("has fallen behind" in caplog.text) == (is_told and number == 1)
    forwarder._judge(0, 0)
    assert progress.late_s == 0


def test_it_is_behind_though_the_server_restarts_each_minute(tmp_path, caplog):
    clock, path = SimpleNamespace(us=NOW), str(tmp_path / "events.db")
    silence = threading.Event()
    with Target(lambda *_: silence.wait(30)) as target:
        for late_s in (50, 101):
            with an_edge(target, db=path, clock=lambda: clock.us) as (_, client):
                store(client, event("a"))
                clock.us += 51 * 1_000_000
                eventually(lambda late_s=late_s: progress_of(tmp_path)["late_s"] == late_s)  # as a SIGKILL leaves it
                assert ("has fallen behind" in caplog.text) == (late_s == 101)
            clock.us += 3600 * 1_000_000
        silence.set()


# ---------------------------------------------------------------------------------------------- refused events


def refusing(status: int, *poison: str):
    def refuse(handler, ids: list[str]) -> bool:
        answer = {"message": "2 of them are invalid", "details": {"errors": [{"message": "no poison"}]}}
        return bool({*poison} & {*ids}) and reply(handler, status, json.dumps(answer).encode())

    return refuse


@table("status", [400, 413, 422])
def test_what_is_refused_is_put_aside_event_by_event_and_the_rest_goes_on(tmp_path, caplog, status):
    poison = ("00000", "00333", "00334", "00999")
    path = str(tmp_path / "events.db")
    with Target(refusing(status, *poison)) as target, an_edge(target, db=path, clock=lambda: NOW) as (edge, client):
        store(client, *numbered(1000, properties={"a\nb": "c"}))
        edge.wait_until_forwarded()
        assert behind(client)[0] == 0
        store(client, event("after"))
        edge.wait_until_forwarded()
    sent = [f"{number:05}" for number in range(1000) if f"{number:05}" not in poison]
    assert target.ids == [*sent, "after"]
    lines = [json.loads(line) for line in (tmp_path / "events.db.refused.ndjson").read_text().splitlines()]
    assert [line["event_id"] for line in lines] == [*poison]
    assert lines[1] == {"event_name": "call", "event_id": "00333", "external_customer_id": "cust", "customer_id": "", "source": "",
                        "timestamp": "2025-10-15T11:38:47.962000Z", "properties": {"a\nb": "c"}, "refused_at": "2025-10-15T11:38:47.962000Z",
                        "refused_by": target.url, "refusal": lines[1]["refusal"]}  # fmt: skip
    assert f"answered {status}: 2 of them are invalid (no poison)" in lines[1]["refusal"]
    told = [record for record in caplog.records if "is refused and was written to" in record.message]
    assert (len(told), told[0].levelname) == (4, "ERROR")
    assert progress_of(tmp_path)["refused"] == 4
    del target.batches[:]
    with target.__class__() as again:  # from the start of the same file, for another target
        with an_edge(again, db=path) as (edge, _):
            edge.wait_until_forwarded()
        assert len(again.ids) == 1001
    assert target.batches == []


def test_a_refused_event_is_corrected_and_imported(tmp_path):
    path = str(tmp_path / "events.db")
    with Target(refusing(400, "bad")) as target, an_edge(target, db=path) as (edge, client):
        store(client, event("good"), event("bad"))
        edge.wait_until_forwarded()
        refused = tmp_path / "events.db.refused.ndjson"
        refused.write_text(refused.read_text().replace('"bad"', '"mended"'))
        done = run(*SCRIPT, "import", refused.name, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert "1 new" in done.stderr
        edge.wait_until_forwarded()
    assert target.ids == ["good", "mended"]


def test_nothing_is_passed_over_that_cannot_be_put_aside(tmp_path, caplog):
    refused = tmp_path / "events.db.refused.ndjson"
    refused.mkdir()
    with Target(refusing(400, "bad")) as target, an_edge(target, db=str(tmp_path / "events.db")) as (edge, client):
        store(client, event("bad"))
        eventually(lambda: "cannot be written to" in caplog.text)
        store(client, event("good"))
        assert behind(client)[0] == 2
        refused.rmdir()
        edge.wait_until_forwarded()
    assert target.ids == ["good"]
    assert [json.loads(line)["event_id"] for line in refused.read_text().splitlines()] == ["bad"]


def test_half_a_line_that_a_power_cut_left_does_not_spoil_the_next(tmp_path):
    refused = tmp_path / "events.db.refused.ndjson"
    refused.write_bytes(b'{"event_name":"ca')
    with Target(refusing(400, "bad")) as target, an_edge(target, db=str(tmp_path / "events.db")) as (edge, client):
        store(client, event("bad"))
        edge.wait_until_forwarded()
    torn, whole = refused.read_text().splitlines()
    assert (torn, json.loads(whole)["event_id"]) == ('{"event_name":"ca', "bad")


# ---------------------------------------------------------------------------------------------- start and end

FORWARDING = {"EVENTSTORE_FORWARD_API_KEY": KEY, "EVENTSTORE_API_KEYS": KEY}


@pytest.mark.slow
def test_after_a_kill_it_goes_on_and_sends_at_most_half_a_second_of_batches_again(tmp_path):
    filled(tmp_path, 30_000)

    def slow(*_) -> bool:
        time.sleep(0.05)
        return False

    with Target(slow) as target:
        with Live(tmp_path, "--forward-to", target.url, **FORWARDING) as live:
            host = target.url.removeprefix("http://").removesuffix("/v1")
            assert f"\n  forwards to  http://{host}/v1, environment development (30,000 events behind)\n" in live.banner
            eventually(lambda: len(target.batches) >= 15)
            live.stop(signal.SIGKILL)
        target.tricks[:] = []
        with Live(tmp_path, "--forward-to", target.url, **FORWARDING) as live, live.client() as client:
            eventually(lambda: behind(client)[0] == 0)
            assert live.stop() == 0
    times = Counter(target.ids)
    assert [*dict.fromkeys(target.ids)] == [f"1-{number:05}" for number in range(30_000)]
    assert set(times.values()) <= {1, 2}
    assert sum(number == 2 for number in times.values()) <= 13_000  # ten in half a second, and those under way
    assert progress_of(tmp_path)["last_id"] == "1-29999"
    with Target() as other, Live(tmp_path, "--forward-to", target.url, **FORWARDING) as live:
        assert "(0 events behind)" in live.banner
        assert other.batches == []


def hanging():
    """A server that takes connections and never says a word."""
    return socket.create_server(("127.0.0.1", 0), backlog=100)


@pytest.mark.slow
@table("trick", ["hangs", "slow", "refuses", "is away"])
def test_sigterm_ends_it_within_ten_seconds_and_saves_what_was_sent(tmp_path, trick):
    filled(tmp_path, 3000)
    begun = threading.Event()

    def slow(*_) -> bool:
        begun.set()
        time.sleep(0.5)
        return False

    tricks = {"slow": [let_through, slow], "refuses": [let_through, answering(401)], "is away": []}
    with hanging() as silent, Target(*tricks.get(trick, [])) as target:
        port = silent.getsockname()[1] if trick == "hangs" else 1 if trick == "is away" else target.server.server_port
        with Live(tmp_path, "--forward-to", f"http://127.0.0.1:{port}", **FORWARDING) as live, live.client() as client:
            if trick == "hangs":
                silent.accept()
            elif trick != "is away":
                eventually(lambda: len(target.batches) >= 2)
            assert store(client, event("meanwhile")).status_code == 202
            started = time.monotonic()
            assert live.stop() == 0
            assert time.monotonic() - started < 10
            assert KEY not in live.log + live.banner
            assert "Traceback" not in live.log
    expected = {"slow": 2000, "refuses": 1000}.get(trick, 0)
    assert progress_of(tmp_path)["accepted"] == expected
    assert [row[1] for row in rows_of(tmp_path)][-1] == "meanwhile"


def test_a_cycle_of_two_servers_ends_by_the_ids():
    with eventstore.listen("127.0.0.1", 0) as listener:
        first = SimpleNamespace(url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", api_key=KEY)
        with (
            running_server(api_keys={KEY: "development"}, forward_to=first) as b,
            running_server(api_keys={KEY: "development"}, listener=listener, forward_to=b) as a,
        ):
            for number, server in enumerate((a, b)):
                url = server.url.removesuffix("/v1")
                with httpx.Client(base_url=url, headers={"x-api-key": KEY}) as client:
                    store(client, *numbered(10, 10 * number))
            eventually(lambda: len(a.events()) == len(b.events()) == 20)
            for server in (a, b, a, b):
                server.wait_until_forwarded()
            sent = [sum(len(request.json["events"]) for request in server.requests()) for server in (a, b)]
            assert sent == [10 + 20, 10 + 20]  # what came from applications, and all that the other one has


@table(
    ("flags", "environ", "part"),
    [
        (["--forward-to", "ftp://host"], FORWARDING, "--forward-to must be a URL like"),
        (["--forward-to", "host:8080"], FORWARDING, "--forward-to must be a URL like"),
        (["--forward-to", "http://host/v1/events"], FORWARDING, "--forward-to must be the base URL"),
        (["--forward-to", "http://host/v2"], FORWARDING, "--forward-to must be the base URL, with or without /v1"),
        (["--forward-to", "http://me:secret@host/v1"], FORWARDING, "must not hold a user or a password"),
        (["--forward-to", "http://host"], {"EVENTSTORE_API_KEYS": KEY}, "set EVENTSTORE_FORWARD_API_KEY or FLEXPRICE_API_KEY"),
        (["--forward-to", "http://host"], FORWARDING | {"EVENTSTORE_FORWARD_API_KEY": "two words"}, "EVENTSTORE_FORWARD_API_KEY: an API key is empty, or has a space"),
        (["--forward-to", "http://host", "--forward-environment", "prod"], FORWARDING, 'no key and no event has that environment, there are development'),
        (["--forward-to", "http://localhost:{port}", "--port", "{port}"], FORWARDING, "is this server itself"),
        (["--forward-to", "http://127.0.0.1:{port}/v1", "--port", "{port}", "--host", "0.0.0.0"], FORWARDING, "is this server itself"),
        (["--forward-to", "http://host", "--forward-interval-ms", "0"], FORWARDING, "--forward-interval-ms: must be a number greater than 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_what_cannot_be_forwarded_to_is_refused_at_the_start(tmp_path, flags, environ, part):
    with eventstore.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    flags = [flag.format(port=port) for flag in flags]
    done = run(*SCRIPT, "serve", "--port", "0", *flags, cwd=tmp_path, env=os.environ | environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert "secret" not in done.stderr
    assert [*tmp_path.glob("*-wal")] == [], "the database was not closed"


@table(
    ("content", "part"),
    [
        (b"{", "cannot read how far sending is"),
        (b'{"target": 1}', "cannot read how far sending is"),
        (b'{"target": "T", "environment": "development", "seq": 4, "last_seq": 4, "last_id": "d"}', "of another database of that name"),
        (b'{"target": "T", "environment": "development", "seq": 2, "last_seq": 2, "last_id": "x"}', "of another database of that name"),
    ],
    ids=["cut off", "something else", "farther than this database", "another event"],
)  # fmt: skip
def test_a_progress_file_that_does_not_fit_is_refused_and_says_what_to_do(tmp_path, content, part):
    path = filled(tmp_path, 3)
    with Target() as target:
        file = forward.progress_file(path, "forward", [target.url, "development"])
        file.write_bytes(content)
        with pytest.raises(eventstore.StartError, match=part) as refusal, an_edge(target, db=path):
            pass
        assert str(file) in str(refusal.value)
        assert "remove it, and all events are sent" in str(refusal.value)
        file.unlink()
        with an_edge(target, db=path) as (edge, _):
            edge.wait_until_forwarded()
    assert target.ids == ["1-00000", "1-00001", "1-00002"]


def test_a_deleted_event_does_not_make_another_database(tmp_path):
    path = filled(tmp_path, 3)
    with Target() as target:
        for number in range(2):
            with an_edge(target, db=path) as (edge, client):
                edge.wait_until_forwarded()
                with database(tmp_path) as conn:
                    conn.execute("DELETE FROM events")
                    conn.commit()
                store(client, event(f"new {number}"))
                edge.wait_until_forwarded()
    assert target.ids == ["1-00000", "1-00001", "1-00002", "new 0", "new 1"]


def test_without_httpx_serve_says_what_to_install(tmp_path):
    code = "import sys; sys.modules['httpx'] = None; import eventstore; sys.exit(eventstore.main())"
    done = python(code, "serve", "--port", "0", "--forward-to", "http://host", "--api-key", KEY, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--forward-to needs httpx: " in done.stderr


def test_a_temporary_database_leaves_no_progress_behind(tmp_path):
    with Target() as target, an_edge(target) as (edge, client):
        store(client, event("a"))
        edge.wait_until_forwarded()
        folder = Path(edge._store.path).parent
        assert progress_of(folder)["target"] == target.url
    assert not folder.exists()


def test_a_failure_that_nobody_thought_of_does_not_end_forwarding(caplog, monkeypatch):
    broken = iter([True, True])
    next_page = forward.next_page

    def failing(*arguments, **named):
        if next(broken, False):
            raise RuntimeError("a bug")
        return next_page(*arguments, **named)

    monkeypatch.setattr(forward, "next_page", failing)
    with Target() as target, an_edge(target) as (edge, client):
        store(client, event("a"))
        eventually(lambda: target.ids == ["a"])
        edge.wait_until_forwarded()
    assert caplog.text.count("RuntimeError: a bug") == 2


# ---------------------------------------------------------------------------------------------- a storm

STORM_KILLS = int(os.environ.get("EVENTSTORE_TEST_STORM", "16"))


class BadLine:
    """Between a server and its target: what is sent arrives or not, what is answered too."""

    def __init__(self, seed: int):
        self.port, self.choose, self.is_calm, self.happened = 0, random.Random(seed), False, Counter()
        line = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = self.rfile.read(int(self.headers["content-length"]))
                chance = 1.0 if line.is_calm else line.choose.random()
                if chance < 0.05:
                    line.happened["cut before"] += cut(self, None)
                elif chance < 0.1:
                    line.happened["503"] += reply(self, 503, b"busy")
                elif chance < 0.15:
                    line.happened["429"] += reply(self, 429, retry_after="0")
                elif chance < 0.2:
                    time.sleep(0.3)
                    line.happened["late"] += cut(self, None)
                else:
                    self.relay(body, lose_answer=chance < 0.35)

            def relay(self, body: bytes, lose_answer: bool) -> None:
                try:
                    answer = httpx.post(f"http://127.0.0.1:{line.port}{self.path}", content=body, headers={"x-api-key": self.headers["x-api-key"]}, timeout=30)  # fmt: skip
                except httpx.HTTPError:
                    line.happened["502"] += reply(self, 502, b"<html>no upstream")
                    return
                if lose_answer:
                    line.happened["cut after"] += cut(self, None)
                else:
                    line.happened[str(answer.status_code)] += reply(self, answer.status_code, answer.content)

            def handle(self) -> None:
                with suppress(OSError):  # the server that sent it is gone
                    super().handle()

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    __enter__, __exit__ = Target.__enter__, Target.__exit__


@pytest.mark.slow
def test_what_was_acknowledged_reaches_the_target_once_through_a_storm(tmp_path, choose):
    senders = [Sender(choose.getrandbits(64), sizes=(1, 1, 5, 40, 400)) for _ in range(3)]
    folders = {"source": tmp_path / "source", "target": tmp_path / "target"}
    servers: dict[str, Live] = {}
    with BadLine(choose.getrandbits(64)) as line:

        def start(name: str) -> None:
            flags = ["--forward-to", line.url, "--forward-interval-ms", "20"] if name == "source" else []
            servers[name] = Live(folders[name], *flags, **FORWARDING)
            if name == "target":
                line.port = int(servers[name].port)
            for sender in senders:
                sender.port = int(servers["source"].port) if "source" in servers else 0

        try:
            for name in folders:
                start(name)
            with sending(senders) as stop:
                for _ in range(STORM_KILLS):
                    time.sleep(choose.choice([0.05, 0.2, 0.5, 1.0]))
                    for name in choose.choice([["source"], ["source"], ["target"], ["source", "target"]]):
                        assert servers[name].stop(signal.SIGKILL) == -signal.SIGKILL
                        servers.pop(name).__exit__()
                    for name in folders.keys() - servers.keys():
                        start(name)
                stop()
            line.is_calm = True
            with servers["source"].client() as client:
                eventually(lambda: behind(client)[0] == 0)
        finally:
            for server in servers.values():
                server.stop()
                server.__exit__()
    check_ledgers(folders["source"], senders)
    stored, sent_on = rows_of(folders["source"]), rows_of(folders["target"])
    assert sent_on == stored
    assert sent_on == [known_row(row[1]) for row in stored]
    assert line.happened["202"], line.happened
    assert len(line.happened) >= 3, f"too little went wrong: {line.happened}"
    assert not (folders["source"] / "events.db.refused.ndjson").exists()
