"""The outbox: `serve --forward-to`."""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import os
import random
import re
import shutil
import signal
import socket
import ssl
import threading
import time
from collections import Counter
from contextlib import closing, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette

import eventstore
from eventstore_extras import forward, sending
from eventstore_extras.mock import running_server
from fake_target import (
    FakeTarget,
    Handler,
    Trick,
    accept,
    answer_413,
    answering,
    cut,
    cut_after_status,
    forwarding,
    lag,
    refusing,
    reply,
)
from forked import forked
from helpers import (
    KEY,
    NOW,
    Json,
    Live,
    becomes,
    database,
    event,
    eventually,
    python,
    refusal,
    rows_of,
    run,
    serving,
    store,
    table,
)
from test_reliability import Sender, check_ledgers, known_row
from test_reliability import sending as running

Logs = pytest.LogCaptureFixture
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)
    monkeypatch.setattr(sending, "BLOCKED_PAUSE_S", 0.01)
    monkeypatch.setattr(forward, "FAILURE_PAUSE_S", 0.01)
    monkeypatch.setattr(forward, "WATCH_INTERVAL_S", 0.01)


def numbered(count: int, start: int = 0, **fields: Any) -> list[Json]:
    return [event(f"{number:05}", **fields) for number in range(start, start + count)]


def numbers(count: int, start: int = 0) -> list[str]:
    """Return the ids of these events."""
    return [f"{number:05}" for number in range(start, start + count)]


def filled(folder: Path, count: int, environment: int = 1) -> str:
    """Make a database with this many events of an environment, stored a second ago."""
    path = str(folder / "events.db")
    eventstore.prepare_file(path)
    with closing(eventstore.connect(path)) as conn:
        for name in ("development", "staging"):
            eventstore.environment_number(conn, name)
        stored_us = eventstore.now_us() - 1_000_000
        rows = [eventstore.Row(environment, f"{environment}-{number:05}", "cust", "", "call", "", NOW, stored_us, "{}")
                for number in range(count)]  # fmt: skip
        eventstore.insert_events(conn, rows, 5)
    return path


def saved_progress(folder: Path) -> Json:
    (path,) = folder.glob("events.db.forward-????????????????.json")
    return dict(json.loads(path.read_bytes()))


# ---------------------------------------------------------------------------------------------- which events are sent


def test_all_events_of_the_environment_are_sent_as_stored_in_order_of_arrival(tmp_path: Path) -> None:
    path = filled(tmp_path, 2500)
    odd = event(
        "odd",
        source="s",
        customer_id="c",
        timestamp="2025-01-01T00:00:00.000001Z",
        properties={"n": 0.10, "big": 12345678901234567890},
    )
    with FakeTarget() as target, forwarding(target, db=path) as (server, client):
        store(client, odd, event("later"))
        client.post("/v1/events", json=event("elsewhere"), headers={"x-api-key": "other"})
        server.wait_until_forwarded()
        assert lag(client) == (0, f"127.0.0.1:{target.port}")
        assert lag(client, "other") == (0, None)
    assert target.ids == [*(f"1-{number:05}" for number in range(2500)), "odd", "later"]
    assert target.accepted[2500] == odd
    assert max(map(len, target.batches)) == 1000
    assert {*target.paths} == {"/v1/events/bulk"}
    progress = saved_progress(tmp_path)
    assert progress.pop("seq") in (2502, 2503)
    assert progress == {"target": target.url, "environment": "development", "last_seq": 2502, "last_id": "later",
                        "accepted": 2502, "refused": 0, "put_aside": {}}  # fmt: skip


def test_the_lag_counts_the_events_that_are_not_accepted_yet() -> None:
    with FakeTarget(answering(503)) as target, forwarding(target) as (server, client):
        store(client, *numbered(1))
        with pytest.raises(TimeoutError, match=r"after 0\.05 s: 1 event not forwarded to 127\.0\.0\.1:\d+ yet"):
            server.wait_until_forwarded(0.05)
        store(client, *numbered(6, 1))
        assert lag(client)[0] == 7
        assert lag(client, "other")[0] == 0
        with pytest.raises(TimeoutError, match=r"7 events not forwarded to 127\.0\.0\.1:\d+ yet"):
            server.wait_until_forwarded(0.05)
        target.tricks.clear()
        server.wait_until_forwarded()
        assert lag(client)[0] == 0
    assert target.ids == numbers(7)


@pytest.mark.slow
def test_events_that_another_process_stores_are_sent(tmp_path: Path) -> None:
    path = filled(tmp_path, 0)
    (tmp_path / "in.ndjson").write_text(json.dumps(event("imported")))
    with FakeTarget() as target, forwarding(target, db=path) as (server, client):
        store(client, event("over HTTP"))
        assert forked(tmp_path, "import", "in.ndjson").returncode == 0
        server.wait_until_forwarded()
    assert target.ids == ["over HTTP", "imported"]


def test_events_of_another_environment_are_skipped_span_by_span(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(forward, "SPAN", 10)
    path = filled(tmp_path, 95, environment=2)
    with FakeTarget() as target, forwarding(target, db=path) as (server, client):
        store(client, event("first"))
        eventually(lambda: target.ids == ["first"])
        eventually(lambda: lag(client)[0] == 0)
        server.wait_until_forwarded()
    assert saved_progress(tmp_path)["last_id"] == "first"


@pytest.mark.slow
def test_a_request_has_at_most_10_mb_unless_one_event_is_larger(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sending, "unfit_for_flexprice", lambda *_: None)
    with serving(tmp_path) as client:
        for each in numbered(20, properties={"x": "y" * 1_500_000}):
            store(client, each)
        store(client, event("huge", properties={"x": "y" * 17_000_000}))
        store(client, event("after"))
    path = str(tmp_path / "events.db")
    with FakeTarget() as target, forwarding(target, db=path) as (server, _):
        server.wait_until_forwarded()
    assert [len(batch) for batch in target.batches] == [6, 6, 6, 2, 1, 1]
    assert sum(size > 10_000_000 for size in target.sizes) == 1
    assert target.ids[-2:] == ["huge", "after"]


# ---------------------------------------------------------------------------------------------- what a target answers

ECHOED = json.dumps({"message": f"the key {KEY} is not\nmine \x1b[31m"}).encode()
NESTED = b'{"success": false, "error": {"message": "not so", "internal_error": null}}'


@pytest.mark.slow
@table(
    ("trick", "level", "part"),
    [
        (answering(429, b'{"message": "slow down"}'), "WARNING", "answered 429: slow down; trying again"),
        (answering(408), "WARNING", "answered 408; trying again"),
        (answering(500, b"<html>oops"), "WARNING", "answered 500: <html>oops"),
        (answering(500, NESTED), "WARNING", "answered 500: not so; trying again"),
        (answering(500, b'{"error": "Internal"}'), "WARNING", "answered 500: Internal; trying again"),
        (answering(500, b'{"details": 7}'), "WARNING", 'answered 500: {"details": 7}; trying again'),
        (answering(500, b"[" * 60_000), "WARNING", "answered 500: [[["),
        (answering(503, b"x" * 10_000_000), "WARNING", "answered 503: xxx"),
        (answering(500, b'{"message": "' + b"m" * 60_000 + b'"}'), "WARNING", "answered 500: mmm"),
        (cut, "WARNING", " bytes: Server disconnected without sending a response.; trying again"),
        (answering(200, b"<p>hello"), "ERROR", "answered 200: <p>hello - 202 was expected. Is forward_to the URL"),
        (answering(301, location="http://127.0.0.1:1/"), "ERROR", 'It redirects to "http://127.0.0.1:1/", where the key'),
        (answering(401, ECHOED), "ERROR", "answered 401: the key *** is not mine [31m (the key came from forward_to)"),
        (answering(403), "ERROR", "answered 403"),
        (answering(404), "ERROR", "nothing is forwarded until this is corrected"),
        (answering(405), "ERROR", "answered 405"),
        (answering(418), "ERROR", "answered 418"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_no_event_is_skipped_after_an_answer_other_than_202(caplog: Logs, trick: Trick, level: str, part: str) -> None:
    with FakeTarget(trick, trick, trick, accept) as target, forwarding(target) as (server, client):
        store(client, *numbered(3))
        store(client, *numbered(3, 3))
        server.wait_until_forwarded()
    assert target.ids == numbers(6)
    (line,) = [record for record in caplog.records if record.message.startswith("forwarding: ")]
    assert line.levelname == level
    assert part in line.message
    assert KEY not in line.message
    assert (len(line.message) < 700, line.message.isprintable()) == (True, True)


@pytest.mark.slow
def test_batches_shrink_for_a_target_that_resets_large_ones_and_grow_again(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sending, "GROW_AFTER", 2)
    with FakeTarget() as target, forwarding(target, db=str(tmp_path / "events.db")) as (server, client):
        target.max_bytes = 100_000
        store(client, *numbered(1000, properties={"x": "y" * 4000}))
        server.wait_until_forwarded()
        assert target.sizes
        assert 50_000 < max(target.sizes) <= 100_000
        assert target.resets < len(target.sizes) * 2
        target.max_bytes = 2_000_000
        store(client, *numbered(1000, 1000, properties={"x": "y" * 4000}))
        server.wait_until_forwarded()
        assert 1_000_000 < max(target.sizes) <= 2_000_000
    assert target.ids == numbers(2000)
    assert not (tmp_path / "events.db.refused.ndjson").exists()


def test_an_event_whose_connection_is_reset_each_time_is_neither_dropped_nor_skipped(
    tmp_path: Path, caplog: Logs, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(sending, "unfit_for_flexprice", lambda *_: None)
    path = str(tmp_path / "events.db")
    with FakeTarget() as target, forwarding(target, db=path) as (server, client):
        target.max_bytes = 100_000
        store(client, event("a"), event("large", properties={"x": "y" * 3_000_000}), event("b"))
        eventually(lambda: target.resets > 8)
        assert (target.ids, lag(client)[0]) == (["a"], 2)
        target.max_bytes = 4_000_000
        server.wait_until_forwarded()
    assert target.ids == ["a", "large", "b"]
    assert "broke off a request of 3,000," in caplog.text
    assert not (tmp_path / "events.db.refused.ndjson").exists()


def test_a_request_without_an_answer_is_sent_again(caplog: Logs, monkeypatch: Patch) -> None:
    monkeypatch.setattr(sending, "STALL_TIMEOUT_S", 0.5)
    silence = threading.Event()

    def hang(*_: object) -> bool:
        return silence.wait(30)

    with FakeTarget(hang, accept) as target, forwarding(target) as (server, client):
        store(client, *numbered(3))
        server.wait_until_forwarded()
        silence.set()
    assert "cannot be reached: ReadTimeout" in caplog.text
    # If the target needs 0.5 s on a busy machine, it receives the same events once more.
    assert [*dict.fromkeys(target.ids)] == ["00000", "00001", "00002"]


@pytest.mark.skipif(not shutil.which("openssl"), reason="needs openssl")
def test_a_target_with_a_bad_certificate_does_not_get_the_key(tmp_path: Path, caplog: Logs) -> None:
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-subj", "/CN=127.0.0.1")
    run("openssl", "req", "-x509", *curve, "-keyout", tmp_path / "key.pem", "-out", tmp_path / "own.pem")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "own.pem", tmp_path / "key.pem")
    target = FakeTarget()
    target.server.socket = context.wrap_socket(target.server.socket, server_side=True)
    target.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # it would print the failed handshake
    target.url = target.url.replace("http:", "https:")
    with target, forwarding(target) as (_, client):
        store(client, event("a"))
        eventually(lambda: "cannot be reached: [SSL: CERTIFICATE_VERIFY_FAILED]" in caplog.text)
        assert lag(client)[0] == 1
    assert target.batches == []


API_ERRORS = {
    "of this server": b'{"code": "validation_error", "message": "no", "http_status_code": 400, "details": {}, "success": false, "error": {"message": "no", "internal_error": null}}',
    "of FlexPrice": b'{"code": "validation_error", "message": "no", "http_status_code": 400}',
    "of an older FlexPrice": b'{"success": false, "error": {"message": "no", "internal_error": "event_name"}}',
    "a text": b'{"error": "no"}',
    "of a thousand events": json.dumps({"code": "validation_error", "message": "no", "details": {"e": ["x" * 99] * 1000}}).encode(),
}  # fmt: skip
FOREIGN_ERRORS = {
    "empty": b"",
    "nginx": b"<html><head><title>400 The plain HTTP request was sent to HTTPS port</title></head></html>",
    "text": b"Request Entity Too Large",
    "text as JSON": b'"no"',
    "list": b'[{"code": "validation_error", "message": "no"}]',
    "null": b"null",
    "cut off": b'{"code": "validation_error", "message": "no", "details": {',
    "not UTF-8": b'{"code": "validation_error", "message": "\xff"}',
    "nested": b"[" * 60_000,
    "API Gateway": b'{"message": "Bad Request"}',
    "Kong": b'{"message": "Request size limit exceeded", "request_id": "1"}',
    "number as code": b'{"code": 400, "message": "blocked"}',
    "Spring": b'{"timestamp": "2026-11-20T00:00:00Z", "status": 400, "error": "Bad Request", "path": "/v1/events/bulk"}',
    "Google": b'{"error": {"code": 400, "message": "no", "status": "INVALID_ARGUMENT"}}',
    "Cloudflare": b'{"success": false, "errors": [{"message": "no"}]}',
    "empty object": b"{}",
    "empty message": b'{"code": "validation_error", "message": ""}',
    "empty error": b'{"error": ""}',
}


@pytest.mark.slow
@table("body", API_ERRORS.values(), ids=API_ERRORS)
def test_the_apis_own_error_puts_the_refused_event_aside(tmp_path: Path, body: bytes) -> None:
    def refuse(handler: Handler, ids: list[str]) -> bool:
        return "00001" in ids and reply(handler, 400, body)

    with FakeTarget(refuse) as target, forwarding(target, db=str(tmp_path / "events.db")) as (server, client):
        store(client, *numbered(3))
        server.wait_until_forwarded()
    assert target.ids == ["00000", "00002"]
    (line,) = (tmp_path / "events.db.refused.ndjson").read_text().splitlines()
    assert json.loads(line)["event_id"] == "00001"


@pytest.mark.slow
@table("status", [400, 413, 422])
@table("body", FOREIGN_ERRORS.values(), ids=FOREIGN_ERRORS)
def test_a_refusal_that_is_not_the_apis_blocks_and_no_event_is_put_aside(
    tmp_path: Path, caplog: Logs, status: int, body: bytes
) -> None:
    trick = answering(status, body)
    path = str(tmp_path / "events.db")
    with FakeTarget(trick, trick, trick, trick, accept) as target, forwarding(target, db=path) as (server, client):
        store(client, *numbered(3))
        server.wait_until_forwarded()
    assert target.ids == numbers(3)
    assert not (tmp_path / "events.db.refused.ndjson").exists()
    (line,) = [record for record in caplog.records if record.message.startswith("forwarding: ")]
    assert line.levelname == "ERROR"
    assert f"answered {status}" in line.message
    assert "not an error of the API: does a proxy or firewall refuse this request of " in line.message
    assert "nothing is forwarded until this is corrected" in line.message


def test_a_proxys_413_makes_batches_smaller_and_blocks_at_a_single_event(tmp_path: Path, caplog: Logs) -> None:
    with FakeTarget() as target, forwarding(target, db=str(tmp_path / "events.db")) as (server, client):
        target.max_bytes, target.too_large = 2_000, answer_413
        store(client, *numbered(100, properties={"x": "y" * 100}), event("large", properties={"x": "y" * 3000}))
        eventually(lambda: "not an error of the API" in caplog.text)
        assert target.ids == numbers(100)
        assert lag(client)[0] == 1
        target.max_bytes = 4_000
        server.wait_until_forwarded()
    assert target.ids == [*numbers(100), "large"]
    assert not (tmp_path / "events.db.refused.ndjson").exists()


def test_a_refusal_that_is_cut_off_is_sent_again(tmp_path: Path) -> None:
    def cut_refusal(handler: Handler, _: object) -> bool:
        handler.wfile.write(b'HTTP/1.1 400 Bad Request\r\ncontent-length: 1000\r\n\r\n{"code": "validation_error"')
        handler.wfile.flush()
        return cut(handler)

    path = str(tmp_path / "events.db")
    with FakeTarget(cut_refusal, accept) as target, forwarding(target, db=path) as (server, client):
        store(client, *numbered(3))
        server.wait_until_forwarded()
    assert target.ids == numbers(3)
    assert not (tmp_path / "events.db.refused.ndjson").exists()


@table("trick", [answering(202), cut_after_status], ids=["empty", "cut off"])
def test_a_202_counts_whatever_its_body(trick: Trick) -> None:
    with FakeTarget(trick) as target, forwarding(target) as (server, client):
        store(client, *numbered(3))
        server.wait_until_forwarded()
        store(client, *numbered(3, 3))
        server.wait_until_forwarded()
    assert list(itertools.chain(*target.batches)) == numbers(6)


@pytest.mark.slow
def test_pauses_last_as_long_as_the_target_asks_and_longer_while_it_is_blocked(monkeypatch: Patch) -> None:
    monkeypatch.setattr(sending, "BLOCKED_PAUSE_S", 0.3)
    tricks = (answering(429, retry_after="1"), answering(401), answering(503), accept)
    with FakeTarget(*tricks) as target, forwarding(target) as (server, client):
        store(client, event("a"))
        server.wait_until_forwarded()
    first, second, third = (after - before for before, after in itertools.pairwise(target.times))
    assert first >= 1
    assert 0.3 <= second < 1
    assert third < 0.3


# ---------------------------------------------------------------------------------------------- lag


@pytest.mark.slow
def test_an_outage_of_a_week_loses_no_event_and_is_logged_once(caplog: Logs) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    clock, started_s = SimpleNamespace(us=NOW), time.monotonic()
    with FakeTarget(answering(503)) as target, forwarding(target, clock=lambda: clock.us) as (server, client):
        for hour in range(7 * 24):
            store(client, *numbered(10, 10 * hour))
            clock.us += 3600 * 1_000_000
        assert lag(client)[0] == 1680
        eventually(lambda: "has fallen behind" in caplog.text)
        target.tricks.clear()
        server.wait_until_forwarded()
        eventually(lambda: "has caught up" in caplog.text)
    assert target.ids == numbers(1680)
    logged = [record for record in caplog.records if "forwarding" in record.message]
    levels = Counter(record.levelname for record in logged if "answered 503" not in record.message)
    assert levels == {"WARNING": 1, "INFO": 2}
    (line,) = [record.message for record in logged if "works again after" in record.message]
    assert re.search(
        r"^forwarding to 127\.0\.0\.1:\d+ works again after (\d+ min )?\d+ s; 1,680 events sent since$", line
    )
    taken_s = time.monotonic() - started_s
    assert 1 <= sum("answered 503" in record.message for record in logged) <= 1 + taken_s / 60


@table(
    ("events", "waited_s", "running_s", "is_behind"),
    [
        (0, 0, 3600, False),
        (10_000, 59, 3600, False),
        (10_001, 0, 3600, True),
        (1, 61, 3600, True),
        (12, 7200, 60, False),
        (12, 7200, 61, True),
        (10_001, 7200, 14, False),
        (10_001, 7200, 15, True),
    ],
)
def test_forwarding_is_behind_with_10001_events_or_after_a_minute_but_not_right_after_the_start(
    caplog: Logs, events: int, waited_s: int, running_s: int, is_behind: bool
) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    clock = SimpleNamespace(us=NOW - running_s * 1_000_000)
    monitor = forward.LagMonitor("host", lambda: clock.us, 0.0)
    clock.us = NOW
    for _ in range(3):
        monitor.check(forward.Backlog(events, NOW - waited_s * 1_000_000))
    waiting = f"{eventstore.plural(events, 'event')} wait, the first for {waited_s} s"
    assert [record.message for record in caplog.records] == [
        f"forwarding to host has fallen behind: {waiting}"
    ] * is_behind
    monitor.check(forward.Backlog(1001, NOW))
    assert "has caught up" not in caplog.text
    for _ in range(2):
        monitor.check(forward.Backlog(1000, NOW))
    assert caplog.text.count("has caught up") == is_behind


def hang(*_: object) -> bool:
    time.sleep(1)
    return False


@pytest.mark.slow
@table(
    ("tricks", "began"),
    [
        ([answering(503)] * 3, "answered 503; trying again"),
        ([answering(500)] * 2, "answered 500; trying again"),
        ([answering(429, retry_after="0")] * 2, "answered 429; trying again"),
        (
            [answering(401)] * 2,
            "answered 401: it does not accept the key; give a key of that API as forward_to (the key",
        ),
        ([answering(403)] * 2, "answered 403; nothing is forwarded until"),
        ([answering(400, b"<html>")] * 2, "not an error of the API"),
        ([cut], "broke off a request of"),
        ([hang], "cannot be reached: ReadTimeout; trying again"),
        ([answering(503), answering(401), cut, hang], "answered 503; trying again"),
    ],
)
def test_the_end_of_each_kind_of_outage_is_logged_once(
    caplog: Logs, monkeypatch: Patch, tricks: list[Trick], began: str
) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    monkeypatch.setattr(sending, "STALL_TIMEOUT_S", 0.5)
    with FakeTarget(*tricks, accept) as target, forwarding(target) as (server, client):
        store(client, *numbered(5))
        eventually(lambda: "works again" in caplog.text)
        store(client, event("later"))
        server.wait_until_forwarded()
    first, second = [record.message for record in caplog.records if record.message.startswith("forwarding")]
    assert began in first
    assert re.fullmatch(
        rf"forwarding to 127\.0\.0\.1:{target.port} works again after \d+ s; 5 events sent since", second
    )


def test_the_end_of_an_outage_in_which_no_connection_was_accepted_is_logged(caplog: Logs) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    with FakeTarget() as before:
        port = before.port
    with forwarding(before) as (server, client):
        store(client, *numbered(5))
        eventually(lambda: "cannot be reached: " in caplog.text)
        assert "works again" not in caplog.text
        with FakeTarget(port=port):
            server.wait_until_forwarded()
            eventually(lambda: "works again after " in caplog.text)
    assert "; 5 events sent since" in caplog.text


def test_an_outage_that_outlasts_the_server_is_not_reported_as_over(caplog: Logs) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    with FakeTarget(answering(503)) as target, forwarding(target) as (_, client):
        store(client, event("a"))
        eventually(lambda: "answered 503" in caplog.text)
    assert "works again" not in caplog.text


# ---------------------------------------------------------------------------------------------- the service's view


def served(folder: Path, target: FakeTarget, **settings: Any) -> tuple[eventstore.Service, eventstore.Outbox]:
    """Return a service that forwards to the target, and its outbox."""
    path = filled(folder, 3)
    keys = (eventstore.ApiKey.hashed(KEY),)
    service: eventstore.Service
    service = eventstore.create_app(eventstore.Settings(db=path, api_keys=keys, **settings)).state.service
    there = sending.Target(target.url, sending.Key(target.api_key, "the test"), "forward_to")
    forward.forward(service, there, interval_s=0.01)
    return service, service.outboxes["development"]


def test_the_outbox_shows_what_became_of_the_events(tmp_path: Path) -> None:
    async def watch() -> None:
        async with service.lifespan(Starlette()):
            await becomes(lambda: outbox.blocked != "")
            assert "answered 401" in outbox.blocked
            assert await outbox.behind() == outbox.waiting == 3
            assert 0 < eventstore.now_us() - outbox.oldest_us < 3600 * 1_000_000
            target.tricks = [refusing(400, "1-00001")]
            await becomes(lambda: outbox.sent == 2)
            assert (outbox.blocked, await outbox.behind(), outbox.waiting, outbox.oldest_us) == ("", 0, 0, 0)
            assert outbox.put_aside == {"refused": 1}

    with FakeTarget(answering(401)) as target:
        service, outbox = served(tmp_path, target)
        assert (outbox.host, outbox.sent, outbox.put_aside) == (f"127.0.0.1:{target.port}", 0, {})
        asyncio.run(watch())


def test_forwarding_and_its_lag_do_not_wait_behind_queries(tmp_path: Path) -> None:
    async def watch() -> None:
        async with service.lifespan(Starlette()):
            release = threading.Event()
            queries = [asyncio.create_task(service.store.read(lambda _: release.wait(30), quick=False))
                       for _ in range(2 * eventstore.READER_THREADS)]  # fmt: skip
            await becomes(lambda: outbox.sent == 3)
            assert await outbox.behind() == 0
            assert not any(query.done() for query in queries)
            release.set()
            assert all(await asyncio.gather(*queries))

    with FakeTarget() as target:
        service, outbox = served(tmp_path, target)
        asyncio.run(watch())


# ---------------------------------------------------------------------------------------------- refused events


@pytest.mark.slow
@table("status", [400, 413, 422])
def test_each_refused_event_is_put_aside_and_the_others_are_sent(tmp_path: Path, caplog: Logs, status: int) -> None:
    poison = ("00000", "00333", "00334", "00999")
    path = str(tmp_path / "events.db")
    with FakeTarget(refusing(status, *poison)) as target:
        with forwarding(target, db=path, clock=lambda: NOW) as (server, client):
            store(client, *numbered(1000, properties={"a\nb": "c"}))
            server.wait_until_forwarded()
            assert lag(client)[0] == 0
            store(client, event("after"))
            server.wait_until_forwarded()
        assert target.ids == [*(number for number in numbers(1000) if number not in poison), "after"]
    lines = [json.loads(line) for line in (tmp_path / "events.db.refused.ndjson").read_text().splitlines()]
    assert [line["event_id"] for line in lines] == [*poison]
    time_text = "2025-10-15T11:38:47.962000Z"
    refusal = lines[1].pop("refusal")
    assert lines[1] == {"event_name": "call", "event_id": "00333", "external_customer_id": "cust", "customer_id": "",
                        "source": "", "timestamp": time_text, "properties": {"a\nb": "c"}, "refused_at": time_text,
                        "refused_by": target.url}  # fmt: skip
    assert f"answered {status}: 2 of them are invalid (no poison)" in refusal
    logged = [record for record in caplog.records if "is refused and was written to" in record.message]
    assert (len(logged), logged[0].levelname) == (4, "ERROR")
    assert saved_progress(tmp_path)["refused"] == 4


def test_another_target_gets_all_events_from_the_first_one_on(tmp_path: Path) -> None:
    path = filled(tmp_path, 3)
    with FakeTarget() as first, FakeTarget() as second:
        for target in (first, second):
            with forwarding(target, db=path) as (server, _):
                server.wait_until_forwarded()
        assert first.ids == second.ids == ["1-00000", "1-00001", "1-00002"]


@pytest.mark.slow
def test_a_refused_event_can_be_corrected_and_imported(tmp_path: Path) -> None:
    path = str(tmp_path / "events.db")
    with FakeTarget(refusing(400, "bad")) as target, forwarding(target, db=path) as (server, client):
        store(client, event("good"), event("bad"))
        server.wait_until_forwarded()
        refused = tmp_path / "events.db.refused.ndjson"
        refused.write_text(refused.read_text().replace('"bad"', '"corrected"'))
        done = forked(tmp_path, "import", refused.name)
        assert done.returncode == 0, done.stderr
        assert "1 new" in done.stderr
        server.wait_until_forwarded()
    assert target.ids == ["good", "corrected"]


def test_forwarding_waits_until_a_refused_event_can_be_written(tmp_path: Path, caplog: Logs) -> None:
    refused = tmp_path / "events.db.refused.ndjson"
    refused.mkdir()
    path = str(tmp_path / "events.db")
    with FakeTarget(refusing(400, "bad")) as target, forwarding(target, db=path) as (server, client):
        store(client, event("bad"))
        eventually(lambda: "cannot be written to" in caplog.text)
        store(client, event("good"))
        assert lag(client)[0] == 2
        refused.rmdir()
        server.wait_until_forwarded()
    assert target.ids == ["good"]
    assert [json.loads(line)["event_id"] for line in refused.read_text().splitlines()] == ["bad"]


def test_an_incomplete_line_left_by_a_power_cut_does_not_damage_the_next_one(tmp_path: Path) -> None:
    refused = tmp_path / "events.db.refused.ndjson"
    refused.write_bytes(b'{"event_name":"ca')
    path = str(tmp_path / "events.db")
    with FakeTarget(refusing(400, "bad")) as target, forwarding(target, db=path) as (server, client):
        store(client, event("bad"))
        server.wait_until_forwarded()
    torn, whole = refused.read_text().splitlines()
    assert (torn, json.loads(whole)["event_id"]) == ('{"event_name":"ca', "bad")


# ---------------------------------------------------------------------------------------------- start and end

FORWARDING = {"EVENTSTORE_FORWARD_API_KEY": KEY, "EVENTSTORE_API_KEYS": KEY}


@pytest.mark.slow
def test_a_key_of_this_server_that_the_target_refuses_is_named_with_the_variable_to_set(tmp_path: Path) -> None:
    filled(tmp_path, 1)
    with (
        running_server(api_keys={"other": "development"}) as target,
        Live(tmp_path, "--forward-to", target.url, FLEXPRICE_API_KEY=KEY) as live,
    ):
        eventually(lambda: "answered 401" in live.log)
        problem = "it does not accept the key; give a key of that API as EVENTSTORE_FORWARD_API_KEY"
        assert f"{target.url}/events/bulk answered 401: {problem} (the key came from FLEXPRICE_API_KEY)" in live.log
        assert "banner" not in live.log
        assert KEY not in live.log


@pytest.mark.slow
def test_after_a_kill_at_most_the_batches_of_half_a_second_are_sent_again(tmp_path: Path) -> None:
    filled(tmp_path, 30_000)

    def slow(*_: object) -> bool:
        time.sleep(0.05)
        return False

    with FakeTarget(slow) as target:
        with Live(tmp_path, "--forward-to", target.url, **FORWARDING) as live:
            assert f"\n  forwards to  {target.url}, environment development (30,000 events behind)\n" in live.banner
            eventually(lambda: len(target.batches) >= 15)
            live.stop(signal.SIGKILL)
        target.tricks.clear()
        with Live(tmp_path, "--forward-to", target.url, **FORWARDING) as live, live.client() as client:
            eventually(lambda: lag(client)[0] == 0)
            assert live.stop() == 0
        with Live(tmp_path, "--forward-to", target.url, **FORWARDING) as live:
            assert "(0 events behind)" in live.banner
    times = Counter(target.ids)
    assert [*times] == [f"1-{number:05}" for number in range(30_000)]
    assert {*times.values()} <= {1, 2}
    assert sum(number == 2 for number in times.values()) <= 13_000  # ten batches in half a second, and the last ones
    assert saved_progress(tmp_path)["last_id"] == "1-29999"


TELLS_WHEN_IT_STOPS = """
import sys, eventstore
from eventstore_extras import forward
run = forward.Forwarder.run
async def told(self):
    stop = self._stopping.set
    self._stopping.set = lambda: (stop(), print("the forwarder stops", file=sys.stderr, flush=True))
    await run(self)
forward.Forwarder.run = told
sys.exit(eventstore.main())
"""


@table(("trick", "accepted"), [("hangs", 0), ("slow", 2000), ("refuses", 1000), ("is down", 0)])
@pytest.mark.slow
def test_sigterm_ends_forwarding_within_ten_seconds_and_saves_the_progress(
    tmp_path: Path, trick: str, accepted: int
) -> None:
    filled(tmp_path, 3000)

    def slow(*_: object) -> bool:
        eventually(lambda: live.log_has("the forwarder stops"))
        return False

    tricks: dict[str, list[Trick]] = {"slow": [accept, slow], "refuses": [accept, answering(401)]}
    with socket.create_server(("127.0.0.1", 0), backlog=100) as silent, FakeTarget(*tricks.get(trick, [])) as target:
        port = {"hangs": silent.getsockname()[1], "is down": 1}.get(trick, target.port)
        flags = ("--forward-to", f"http://127.0.0.1:{port}")
        with Live(tmp_path, *flags, code=TELLS_WHEN_IT_STOPS, **FORWARDING) as live, live.client() as client:
            if trick == "hangs":
                silent.accept()
            elif trick != "is down":
                eventually(lambda: len(target.batches) >= 2)
            assert store(client, event("meanwhile")).status_code == 202
            started = time.monotonic()
            live.begin_to_stop()
            assert live.process.wait(30) == 0
            assert time.monotonic() - started < 10
            assert KEY not in live.log + live.banner
            assert "Traceback" not in live.log
    assert saved_progress(tmp_path)["accepted"] == accepted
    assert rows_of(tmp_path)[-1][1] == "meanwhile"


@pytest.mark.slow
def test_two_servers_that_forward_to_each_other_send_each_event_back_once() -> None:
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
            received = [sum(len(request.json["events"]) for request in server.requests()) for server in (a, b)]
            assert received == [10 + 20, 10 + 20]  # from the client, and all that the other server has


@table(
    ("flags", "environ", "part"),
    [
        (["--forward-to", "ftp://host"], FORWARDING, "--forward-to must be a URL like"),
        (["--forward-to", "host:8080"], FORWARDING, "--forward-to must be a URL like"),
        (["--forward-to", "http://host/v1/events"], FORWARDING, "--forward-to must be the base URL"),
        (["--forward-to", "http://host/v2"], FORWARDING, "--forward-to must be the base URL, with or without /v1"),
        (["--forward-to", "http://me:secret@host/v1"], FORWARDING, "must not have a user or password"),
        (["--forward-to", "http://host"], {"EVENTSTORE_API_KEYS": KEY}, "set EVENTSTORE_FORWARD_API_KEY or FLEXPRICE_API_KEY"),
        (["--forward-to", "http://host"], FORWARDING | {"EVENTSTORE_FORWARD_API_KEY": "two words"}, "EVENTSTORE_FORWARD_API_KEY: an API key is empty, or has a space"),
        (["--forward-to", "http://host", "--forward-environment", "prod"], FORWARDING, '--forward-environment is "prod", but no API key writes to it: the keys belong to "development"'),
        (["--forward-to", "http://host", "--api-key", "a=x", "--api-key", "b=y"], FORWARDING, '--forward-to needs --forward-environment: the API keys belong to several environments, "x", "y"'),
        (["--forward-to", "http://localhost:{port}", "--port", "{port}"], FORWARDING, "is this server itself"),
        (["--forward-to", "http://127.0.0.1:{port}/v1", "--port", "{port}", "--host", "0.0.0.0"], FORWARDING, "is this server itself"),
        (["--forward-to", "http://host", "--forward-interval-ms", "0"], FORWARDING, "--forward-interval-ms: must be a number greater than 0"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_serve_does_not_start_with_a_target_that_cannot_work(
    tmp_path: Path, flags: list[str], environ: dict[str, str], part: str
) -> None:
    with eventstore.listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    flags = [flag.format(port=port) for flag in flags]
    done = refusal(tmp_path, "serve", "--port", "0", *flags, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert "secret" not in done.stderr
    assert [*tmp_path.glob("*-wal")] == [], "the database was not closed"


@pytest.mark.slow
def test_the_only_environment_with_a_key_is_forwarded_and_named_by_banner_and_health(tmp_path: Path) -> None:
    filled(tmp_path, 3)  # of development, from an earlier key
    environ = FORWARDING | {"EVENTSTORE_API_KEYS": f"{KEY}=production"}
    with FakeTarget() as target, Live(tmp_path, "--forward-to", target.url, **environ) as live, live.client() as client:
        assert (
            f"\n  forwards to  {target.url}, environment production (0 events behind)\n"
            "               not forwarded: development, staging\n" in live.banner
        )
        health = client.get("/health").json()
        assert health["forwarding"] == [{"environment": "production", "to": f"127.0.0.1:{target.port}"}]
        store(client, event("a"))
        eventually(lambda: target.ids == ["a"])


@pytest.mark.slow
def test_the_environment_with_a_key_can_be_chosen_among_several(tmp_path: Path) -> None:
    environ = FORWARDING | {"EVENTSTORE_API_KEYS": f"{KEY}=b,other=a"}
    with FakeTarget() as target:
        flags = ("--forward-to", target.url, "--forward-environment", "b")
        with Live(tmp_path, *flags, **environ) as live, live.client() as client, live.client("other") as other:
            store(other, event("not this one"))
            store(client, event("this one"))
            eventually(lambda: target.ids == ["this one"])


def test_an_environment_with_events_but_without_a_key_is_not_forwarded(tmp_path: Path) -> None:
    filled(tmp_path, 3)
    flags = ("--forward-to", "http://host", "--forward-environment", "development", "--api-key", "k=production")
    done = refusal(tmp_path, "serve", "--port", "0", *flags, EVENTSTORE_FORWARD_API_KEY=KEY)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        '--forward-environment is "development", but no API key writes to it: the keys belong to "production"'
        in done.stderr
    )


@pytest.mark.slow
@table(
    ("content", "part"),
    [
        (b"{", "cannot read the progress in"),
        (b'{"target": 1}', "cannot read the progress in"),
        (b'{"target": "T", "environment": "development", "seq": 4, "last_seq": 4, "last_id": "d"}', "belongs to another database of that name"),
        (b'{"target": "T", "environment": "development", "seq": 2, "last_seq": 2, "last_id": "x"}', "belongs to another database of that name"),
    ],
    ids=["cut off", "something else", "farther than this database", "another event"],
)  # fmt: skip
def test_a_progress_file_that_does_not_fit_is_refused_with_advice(tmp_path: Path, content: bytes, part: str) -> None:
    path = filled(tmp_path, 3)
    with FakeTarget() as target:
        file = forward.forward_progress_path(path, target.url, "development")
        file.write_bytes(content)
        with pytest.raises(eventstore.StartError, match=part) as refusal, forwarding(target, db=path):
            pass
        assert str(file) in str(refusal.value)
        assert "remove it, and all events are sent" in str(refusal.value)
        file.unlink()
        with forwarding(target, db=path) as (server, _):
            server.wait_until_forwarded()
    assert target.ids == ["1-00000", "1-00001", "1-00002"]


def test_forwarding_continues_after_its_last_event_was_deleted(tmp_path: Path) -> None:
    path = filled(tmp_path, 3)
    with FakeTarget() as target:
        for number in range(2):
            with forwarding(target, db=path) as (server, client):
                server.wait_until_forwarded()
                with database(tmp_path) as conn:
                    conn.execute("DELETE FROM events")
                    conn.commit()
                store(client, event(f"new {number}"))
                server.wait_until_forwarded()
    assert target.ids == ["1-00000", "1-00001", "1-00002", "new 0", "new 1"]


@pytest.mark.slow
def test_serve_says_how_to_install_httpx(tmp_path: Path) -> None:
    code = "import sys; sys.modules['httpx'] = None; import eventstore; sys.exit(eventstore.main())"
    done = python(code, "serve", "--port", "0", "--forward-to", "http://host", "--api-key", KEY, cwd=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert "--forward-to needs httpx: " in done.stderr


def test_a_temporary_database_leaves_no_progress_file_behind(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    with FakeTarget() as target, forwarding(target) as (server, client):
        store(client, event("a"))
        server.wait_until_forwarded()
        (file,) = tmp_path.rglob("*.forward-????????????????.json")
        assert json.loads(file.read_bytes())["target"] == target.url
    assert [*tmp_path.iterdir()] == []


def test_forwarding_survives_an_unexpected_exception(caplog: Logs, monkeypatch: Patch) -> None:
    fails = iter([True, True])
    arrived_rows = sending.arrived_rows

    def failing(*arguments: Any) -> object:
        if next(fails, False):
            raise RuntimeError("a bug")
        return arrived_rows(*arguments)

    monkeypatch.setattr(forward, "arrived_rows", failing)
    with FakeTarget() as target, forwarding(target) as (server, client):
        store(client, event("a"))
        eventually(lambda: target.ids == ["a"])
        server.wait_until_forwarded()
    assert caplog.text.count("RuntimeError: a bug") == 2


# ---------------------------------------------------------------------------------------------- kills and bad lines

KILLS = int(os.environ.get("EVENTSTORE_TEST_STORM", "6"))


class BadLine:
    """A proxy between a server and its target that loses requests and answers."""

    def __init__(self, seed: int) -> None:
        self.target_port = 0
        self.is_calm = False  # when calm, nothing is lost
        self.happened: Counter[str] = Counter()
        self.choose = random.Random(seed)
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def _handler(self) -> type[Handler]:
        line = self

        class LineHandler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                line._pass_on(self, self.rfile.read(int(self.headers["content-length"])))

            def handle(self) -> None:
                with suppress(OSError):  # the server that sent the request was killed
                    super().handle()

            def log_message(self, *_: object) -> None:
                pass

        return LineHandler

    def _pass_on(self, handler: Handler, body: bytes) -> None:
        chance = 1.0 if self.is_calm else self.choose.random()
        if chance < 0.05:
            self.happened["cut before"] += cut(handler)
        elif chance < 0.1:
            self.happened["503"] += reply(handler, 503, b"busy")
        elif chance < 0.15:
            self.happened["429"] += reply(handler, 429, retry_after="0")
        elif chance < 0.2:
            time.sleep(0.3)
            self.happened["late"] += cut(handler)
        else:
            self._relay(handler, body, lose_answer=chance < 0.35)

    def _relay(self, handler: Handler, body: bytes, lose_answer: bool) -> None:
        url, headers = f"http://127.0.0.1:{self.target_port}{handler.path}", {"x-api-key": handler.headers["x-api-key"]}
        try:
            answer = httpx.post(url, content=body, headers=headers, timeout=30)
        except httpx.HTTPError:
            self.happened["502"] += reply(handler, 502, b"<html>no upstream")
            return
        if lose_answer:
            self.happened["cut after"] += cut(handler)
        else:
            self.happened[str(answer.status_code)] += reply(handler, answer.status_code, answer.content)

    def __enter__(self) -> BadLine:
        threading.Thread(target=self.server.serve_forever, args=[0.01]).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.mark.slow
def test_acknowledged_events_reach_the_target_once_despite_kills_and_a_bad_line(
    tmp_path: Path, choose: random.Random
) -> None:
    senders = [Sender(choose.getrandbits(64), sizes=(1, 1, 5, 40, 400)) for _ in range(3)]
    folders = {"source": tmp_path / "source", "target": tmp_path / "target"}
    servers: dict[str, Live] = {}
    with BadLine(choose.getrandbits(64)) as line:

        def start(name: str) -> None:
            # Some of the ids are numbers: 4e1234.
            to_ours = ["--forward-to", line.url, "--forward-interval-ms", "20", "--forward-everything"]
            flags = to_ours if name == "source" else []
            servers[name] = Live(folders[name], *flags, **FORWARDING)
            if name == "target":
                line.target_port = int(servers[name].port)
            for sender in senders:
                sender.port = int(servers["source"].port) if "source" in servers else 0

        try:
            for name in folders:
                start(name)
            with running(senders) as stop:
                for _ in range(KILLS):
                    time.sleep(choose.choice([0.05, 0.2, 0.5, 1.0]))
                    for name in choose.choice([["source"], ["source"], ["target"], ["source", "target"]]):
                        assert servers[name].stop(signal.SIGKILL) == -signal.SIGKILL
                        servers.pop(name).__exit__()
                    for name in folders.keys() - servers.keys():
                        start(name)
                eventually(lambda: line.happened["202"] and len(line.happened) >= 3)
                stop()
            line.is_calm = True
            with servers["source"].client() as client:
                eventually(lambda: lag(client)[0] == 0)
        finally:
            for server in servers.values():
                server.stop()
                server.__exit__()
    check_ledgers(folders["source"], senders)
    stored, forwarded = rows_of(folders["source"]), rows_of(folders["target"])
    assert forwarded == stored
    assert forwarded == [known_row(row[1]) for row in stored]
    assert not (folders["source"] / "events.db.refused.ndjson").exists()
