"""Send bytes on real connections: upgrades, long heads, malformed requests, half-closed and abandoned connections."""

from __future__ import annotations

import asyncio
import gc
import gzip
import itertools
import json
import re
import shutil
import socket
import struct
import time
import urllib.parse
import weakref
import zlib
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx
import pytest
from starlette.applications import Starlette
from uvicorn.server import ServerState

import eventstore
from eventstore_extras import connections
from forked import changed
from helpers import (
    BODY,
    HEAD,
    KEY,
    POST,
    Live,
    answer_on,
    becomes,
    counts,
    event,
    eventually,
    metering,
    posting,
    refused,
    request_bytes,
    run,
    serving,
    store,
    stores_nothing,
    table,
)

UPGRADES = {
    "h2c": "Connection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAAP__\r\n",
    "websocket": "Connection: keep-alive, Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n"
                 "Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n",
    "TLS": "Upgrade: TLS/1.0\r\nconnection: upgrade\r\n",
    "two": "Upgrade: h2c\r\nConnection: upgrade\r\nUPGRADE: websocket, TLS/1.2\r\nX-Empty:\r\n",
}  # fmt: skip
NUMBERS = itertools.count()


def body_of(*ids: str) -> bytes:
    events = [event(event_id) for event_id in ids]
    return json.dumps(events[0] if len(events) == 1 else {"events": events}).encode()


def new_id() -> str:
    return f"http_{next(NUMBERS)}"


def on_each_route(**options: Any) -> list[tuple[bytes, int]]:
    """Return a request to each kind of route with the status of its answer."""
    return [
        (request_bytes("POST", "/v1/events", body_of(new_id()), **options), 202),
        (request_bytes("POST", "/v1/events/bulk", body_of(new_id(), new_id()), **options), 202),
        (request_bytes("GET", "/v1/events?page_size=1", **options), 200),
        (request_bytes("POST", "/v1/events/query", b'{"page_size": 1}', **options), 200),
        (
            request_bytes(
                "POST", "/v1/events/usage", b'{"event_name": "call", "aggregation_type": "COUNT"}', **options
            ),
            200,
        ),
        (request_bytes("GET", "/health", **options), 200),
        (request_bytes("POST", "/no/such/route", b"{}", **options), 404),
        (request_bytes("POST", "/v1/events", body_of(new_id()), **{**options, "key": "wrong"}), 401),
    ]


ROUTES = ["single", "bulk", "list", "query", "usage", "health", "unknown route", "wrong key"]


def answers_to(live: Live, *packets: bytes, shut_down: bool = False) -> list[httpx.Response]:
    """Send the packets, then read every answer until the server closes the connection."""
    with live.connect() as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for packet in packets:
            sock.sendall(packet)
            if len(packets) < 5:
                time.sleep(0.005)  # so that the server receives the packets one by one
        if shut_down:
            sock.shutdown(socket.SHUT_WR)
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    return answers_in(received)


def answers_in(received: bytes) -> list[httpx.Response]:
    """Split the bytes into answers by their Content-Length; nothing else may be between them."""
    found = []
    while received:
        head, _, received = received.partition(b"\r\n\r\n")
        match = re.fullmatch(rb"HTTP/1\.1 (\d{3}) [^\r]*((?:\r\n[^\r]+)*)", head)
        assert match, head
        lines = [line.partition(b": ") for line in match[2].split(b"\r\n")[1:]]
        headers = [(name, value) for name, _, value in lines]
        length = int(dict(headers)[b"content-length"])
        assert len(received) >= length
        found.append(httpx.Response(int(match[1]), headers=headers, content=received[:length]))
        received = received[length:]
    return found


def statuses(answers: list[httpx.Response]) -> list[int]:
    return [answer.status_code for answer in answers]


LAST = request_bytes("GET", "/health", headers="Connection: close\r\n")


@pytest.mark.slow
@table("upgrade", UPGRADES)
@table("chunked", [False, True], ids=["length", "chunked"])
@table("route", range(len(ROUTES)), ids=ROUTES)
def test_a_request_to_upgrade_is_answered_like_any_other_in_any_packets(
    live: Live, upgrade: str, chunked: bool, route: int
) -> None:
    request, status = on_each_route(headers=UPGRADES[upgrade], chunked=chunked)[route]
    head_end = request.index(b"\r\n\r\n") + 4
    ways = {
        "one packet": [request + LAST],
        "body in a second packet": [request[:head_end], request[head_end:] + LAST],
        "in the middle of both": [request[:40], request[40 : head_end + 3], request[head_end + 3 :] + LAST],
        "byte by byte": [bytes([byte]) for byte in request + LAST],
    }
    for way, packets in ways.items():
        assert statuses(answers_to(live, *packets)) == [status, 200], way


@pytest.mark.slow
def test_pipelined_requests_to_upgrade_are_all_answered_in_order(live: Live) -> None:
    sent, expected = b"", []
    for upgrade in UPGRADES.values():
        for chunked in (False, True):
            for request, status in on_each_route(headers=upgrade, chunked=chunked):
                sent += request + request_bytes("GET", "/health")
                expected += [status, 200]
    assert statuses(answers_to(live, sent + LAST)) == [*expected, 200]
    for size in (7, 500):
        packets = [sent[start : start + size] for start in range(0, len(sent), size)]
        assert statuses(answers_to(live, *packets, LAST)) == [*expected, 200]


def test_an_event_sent_with_a_request_to_upgrade_is_stored_once(live: Live) -> None:
    with live.client() as client, live.connect() as sock:
        for upgrade in UPGRADES.values():
            sock.sendall(request_bytes("POST", "/v1/events", body_of("upgraded"), headers=upgrade))
            assert answer_on(sock).status_code == 202
        found = client.get("/v1/events/upgraded").json()
        assert found["event"]["id"] == "upgraded"
        assert counts(store(client, event("upgraded"))) == (0, 1)
    assert "pip install" not in live.log
    assert "Unsupported upgrade" not in live.log


def test_a_request_to_upgrade_may_have_a_large_body(live: Live) -> None:
    large = json.dumps(event(new_id(), properties={"text": "x" * 3_000_000})).encode()
    for chunked in (False, True):
        request = request_bytes("POST", "/v1/events", large, UPGRADES["h2c"], chunked=chunked)
        assert statuses(answers_to(live, request + LAST)) == [202, 200]


def test_a_request_to_upgrade_may_expect_100_continue(live: Live) -> None:
    request = request_bytes("POST", "/v1/events", body_of(new_id()), UPGRADES["h2c"] + "Expect: 100-continue\r\n")
    head, body = request.split(b"\r\n\r\n")
    with live.connect() as sock:
        sock.sendall(head + b"\r\n\r\n")
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"
        sock.sendall(body)
        assert answer_on(sock).status_code == 202


@table("version, headers", [("1.0", ""), ("1.1", "Connection: close\r\n")], ids=["HTTP/1.0", "close"])
def test_a_request_to_upgrade_is_answered_on_a_connection_that_is_not_kept_open(
    live: Live, version: str, headers: str
) -> None:
    request = request_bytes("POST", "/v1/events", body_of(new_id()), UPGRADES["h2c"] + headers, version=version)
    assert statuses(answers_to(live, request)) == [202]
    assert statuses(answers_to(live, request[:-10], request[-10:])) == [202]
    assert statuses(answers_to(live, request + LAST)) == [202]


@table("target", ["example.com:443", "/v1/events"])
def test_connect_is_refused_after_earlier_requests_are_answered(live: Live, target: str) -> None:
    connect = f"CONNECT {target} HTTP/1.1\r\nHost: a\r\n\r\n".encode()
    first = request_bytes("POST", "/v1/events", body_of(new_id()))
    assert statuses(answers_to(live, connect)) == [405]
    assert statuses(answers_to(live, first + connect + b"tunnelled bytes")) == [202, 405]


JAVA = """
import java.net.URI;
import java.net.http.*;
import java.util.concurrent.*;

class Client {
    public static void main(String[] arguments) throws Exception {
        HttpClient client = HttpClient.newHttpClient();  // HTTP/2 by default: each request asks for an upgrade to h2c
        for (int number = 0; number < 20; number++) {
            String body = "{\\"event_name\\": \\"java\\", \\"external_customer_id\\": \\"cust\\", \\"event_id\\": \\"java_" + number + "\\"}";
            HttpRequest.BodyPublisher publisher = number % 2 == 0
                ? HttpRequest.BodyPublishers.ofString(body)
                : HttpRequest.BodyPublishers.fromPublisher(HttpRequest.BodyPublishers.ofString(body));  // chunked
            HttpRequest.Builder request = HttpRequest.newBuilder(URI.create(arguments[0] + "/v1/events"))
                .header("x-api-key", arguments[1]).POST(publisher);
            if (number % 5 == 4) request.expectContinue(true);
            HttpResponse<String> response = client.send(request.build(), HttpResponse.BodyHandlers.ofString());
            System.out.println(response.statusCode() + " " + response.version());
        }
    }
}
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("javac"), reason="needs a JDK")
def test_the_http_client_of_java_loses_no_events(live: Live, tmp_path: Path) -> None:
    (tmp_path / "Client.java").write_text(JAVA)
    done = run("java", "-Djdk.httpclient.HttpClient.log=headers", tmp_path / "Client.java", live.url, KEY)
    assert done.stdout.split("\n") == ["202 HTTP_1_1"] * 20 + [""], done.stderr
    assert "Upgrade: h2c" in done.stderr, "this Java does not request an upgrade"
    with live.client() as client:
        found = client.get("/v1/events", params={"event_name": "java"}).json()["events"]
        assert {one["id"] for one in found} == {f"java_{number}" for number in range(20)}


def curl_speaks_http2() -> bool:
    return bool(shutil.which("curl")) and "HTTP2" in run("curl", "--version").stdout


@pytest.mark.skipif(not curl_speaks_http2(), reason="needs curl with HTTP/2")
@table("chunked", [False, True], ids=["length", "chunked"])
def test_curl_with_http2_stores_an_event(live: Live, chunked: bool) -> None:
    headers = ["-H", "Transfer-Encoding: chunked"] if chunked else []
    command = ["curl", "-sv", "--http2", f"{live.url}/v1/events", "-H", f"x-api-key: {KEY}", *headers]
    done = run(*command, "-d", body_of(new_id()).decode(), "-w", " %{http_code}")
    assert done.stdout.endswith(" 202"), done.stderr
    assert "Upgrade: h2c" in done.stderr


LIMIT = connections.MAX_HEAD_BYTES
LONG_HEADS = {
    "one header": (f"GET /health HTTP/1.1\r\nX-Long: {'a' * 100_000}\r\n\r\n", 431, "headers_too_large"),
    "many headers": ("GET /health HTTP/1.1\r\n" + "X: y\r\n" * 12_000 + "\r\n", 431, "headers_too_large"),
    "1,001 headers": ("GET /health HTTP/1.1\r\n" + "X:\r\n" * 1_001 + "\r\n", 431, "headers_too_large"),
    "name": (f"GET /health HTTP/1.1\r\n{'X' * 100_000}: y\r\n\r\n", 431, "headers_too_large"),
    "to upgrade": (f"GET /health HTTP/1.1\r\n{UPGRADES['h2c']}X: {'a' * 100_000}\r\n\r\n", 431, "headers_too_large"),
    "URL": (f"GET /health?{'a' * 100_000} HTTP/1.1\r\n\r\n", 414, "uri_too_long"),
    "URL without an end": ("GET /" + "a" * 100_000, 414, "uri_too_long"),
    "header without an end": ("GET / HTTP/1.1\r\nX: " + "a" * 100_000, 431, "headers_too_large"),
    "line breaks": ("\r\n" * 50_000, 431, "headers_too_large"),
}


@table("name", LONG_HEADS)
@table("size", [10**6, 10_000], ids=["one packet", "pieces"])
def test_a_head_over_the_limit_is_refused_and_the_connection_is_closed(live: Live, name: str, size: int) -> None:
    text, status, code = LONG_HEADS[name]
    sent = text.encode()
    for before in (b"", request_bytes("POST", "/v1/events", body_of(new_id()))):
        pieces = [(before + sent)[start : start + size] for start in range(0, len(before + sent), size)]
        *answers, last = answers_to(live, *pieces)
        assert statuses(answers) == [202] * bool(before)
        refused(last, status, code, str(LIMIT))
    assert f": {status} {code}: " in live.log


def test_a_head_just_below_the_limit_is_answered(live: Live) -> None:
    with live.connect() as sock:
        for header in (f"X: {'a' * (LIMIT - 200)}\r\n", "X: y\r\n" * 997):
            sock.sendall(request_bytes("GET", "/health", headers=header))
            assert answer_on(sock).status_code == 200
        sock.sendall(request_bytes("GET", f"/health?{'a' * (LIMIT - 200)}"))
        assert answer_on(sock).status_code == 200


def test_many_pipelined_requests_do_not_count_as_a_long_head(live: Live) -> None:
    sent = request_bytes("POST", "/v1/events/query", b'{"page_size": 1}', "X-Long: " + "a" * 1000 + "\r\n") * 100
    assert len(sent) > LIMIT
    assert statuses(answers_to(live, sent + LAST)) == [200] * 101


def test_a_body_in_tiny_chunks_does_not_count_as_a_long_head(live: Live) -> None:
    body = json.dumps(event(new_id(), properties={"text": "x" * 30_000})).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    head = request_bytes("POST", "/v1/events", headers="Transfer-Encoding: chunked\r\n")
    assert len(chunks) > 2 * LIMIT
    assert statuses(answers_to(live, head + chunks + b"0\r\nX-Trailer: 1\r\n\r\n" + LAST)) == [202, 200]


@table(
    "part", [b"0\r\nX: ", b"1;", b"5\r\nabcde\r\n0\r\n" + b"X: y\r\n" * 12_000], ids=["trailer", "chunk", "trailers"]
)
def test_trailers_and_chunk_sizes_are_limited_like_a_head(live: Live, part: bytes) -> None:
    head = request_bytes("POST", "/v1/events", headers="Transfer-Encoding: chunked\r\n")
    with live.client() as client, stores_nothing(client), live.connect() as sock:
        sock.settimeout(5)
        sock.sendall(head + part + b"a" * 100_000)
        refused(answer_on(sock), 431, "headers_too_large")
        assert sock.recv(1) == b""


def resident_bytes(live: Live) -> int:
    status = Path(f"/proc/{live.process.pid}/status")
    if not status.exists():
        pytest.skip("needs /proc, to read the memory of another process")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024


@pytest.mark.slow
@table("start, piece", [
    (b"GET / HTTP/1.1\r\n", b"X: " + b"a" * 8000 + b"\r\n"), (b"GET / HTTP/1.1\r\nX: ", b"a" * 8192),
    (b"GET /", b"a" * 8192), (b"", b"\r\n" * 4096),
], ids=["headers", "header", "URL", "line breaks"])  # fmt: skip
def test_a_head_of_400_mb_takes_neither_memory_nor_time(live: Live, start: bytes, piece: bytes) -> None:
    with live.client() as client, live.connect() as sock:
        before = resident_bytes(live)
        started = time.monotonic()
        try:
            sock.sendall(start)
            for _ in range(100):  # 4 MB each
                sock.sendall(piece * 512)
        except OSError:  # the server has closed the connection
            pass
        assert time.monotonic() - started < 5
        assert store(client, event(new_id())).status_code == 202
        assert resident_bytes(live) < before + 20_000_000


def test_a_request_is_answered_after_the_client_shuts_down_its_sending_side(live: Live) -> None:
    for chunked in (False, True):
        for request, status in on_each_route(chunked=chunked):
            assert statuses(answers_to(live, request, shut_down=True)) == [status]


@table("rest", [b"", b"POST /v1/ev", posting(body_of("never"))[:-1]], ids=["nothing", "half a head", "half a body"])
def test_complete_requests_before_a_half_close_are_answered_and_an_incomplete_one_is_not_stored(
    live: Live, rest: bytes
) -> None:
    requests = on_each_route()
    answers = answers_to(live, b"".join(request for request, _ in requests) + rest, shut_down=True)
    assert statuses(answers) == [status for _, status in requests]
    with live.client() as client:
        assert client.get("/v1/events/never").status_code == 404


@table("part", [b"", b"POST /v1/ev", posting(body_of("never"))[:-1]], ids=["nothing", "half a head", "half a body"])
def test_a_half_closed_connection_without_a_complete_request_is_closed(live: Live, part: bytes) -> None:
    with live.client() as client, live.connect() as sock:
        sock.sendall(part)
        sock.shutdown(socket.SHUT_WR)
        sock.settimeout(1)
        assert sock.recv(1) == b""
        assert client.get("/v1/events/never").status_code == 404


BAD_HTTP = {
    "garbage": b"garbage\r\n\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "no such version": b"GET /v1/events HTTP/9.9\r\n" + HEAD + b"\r\n",
    "bytes in the path": b"GET /v1/events?source=\xff HTTP/1.1\r\n" + HEAD + b"\r\n",
    "escaped bytes in a parameter": b"GET /v1/events?source=%ff HTTP/1.1\r\n" + HEAD + b"\r\n",
    "length in words": POST + b"Content-Length: many\r\n\r\n" + BODY,
    "negative length": POST + b"Content-Length: -1\r\n\r\n" + BODY,
    "empty length": POST + b"Content-Length: \r\n\r\n" + BODY,
    "length of 30 digits": POST + b"Content-Length: " + b"9" * 30 + b"\r\n\r\n" + BODY,
    "two lengths": POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\n" + BODY,
    "length and chunks": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    "bad chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n",
    "length too short": POST + b"Connection: close\r\nContent-Length: 10\r\n\r\n" + BODY,
    "33 MiB announced, none sent": POST + b"Content-Length: %d\r\n\r\n" % (33 * 2**20),
}


@pytest.mark.slow
@table("request_bytes", BAD_HTTP.values(), ids=BAD_HTTP)
def test_malformed_http_is_refused_with_the_usual_error_body(live: Live, request_bytes: bytes) -> None:
    with live.client() as client, stores_nothing(client), live.connect() as sock:
        sock.sendall(request_bytes)
        refused(answer_on(sock))


def test_pipelined_requests_are_answered_in_order(live: Live) -> None:
    event_id = "pipelined"
    body = json.dumps(event(event_id)).encode()
    with live.client(), live.connect() as sock:
        sock.sendall(
            b"HEAD /v1/events HTTP/1.1\r\n" + HEAD + b"\r\n"
            + POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body) + body
            + b"GET /v1/events/pipelined HTTP/1.1\r\n" + HEAD + b"Connection: close\r\n\r\n"
        )  # fmt: skip
        received = b"".join(iter(lambda: sock.recv(65536), b""))
    statuses = re.findall(rb"HTTP/1\.1 (\d+)", received)
    assert statuses == [b"200", b"100", b"202", b"200"]
    rest = received[received.index(b"\r\n\r\n") + 4 :]
    assert rest.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 202"), "the answer to HEAD has no body"
    assert event_id.encode() in rest


def test_a_body_over_the_limit_is_refused_before_it_ends(live: Live) -> None:
    with live.client() as client, stores_nothing(client), live.connect() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n4000000\r\n" + b" " * (2**25 + 1))
        refused(answer_on(sock), part=str(2**25))


def test_nothing_is_stored_if_the_client_disconnects_before_the_body_ends(live: Live) -> None:
    with live.client() as client, stores_nothing(client):
        seen = live.log.count("client went away")
        with live.connect() as sock:
            sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % (len(BODY) + 1) + BODY)
        eventually(lambda: live.log.count("client went away") > seen)


MALFORMED = {
    "no method": (b"garbage\r\n\r\n", "not valid HTTP/1.1"),
    "u umlaut in the path": ("GET /v1/events/ü HTTP/1.1\r\n\r\n".encode(), "percent-encoded"),
    "u umlaut in the query": ("GET /v1/events?source=ü HTTP/1.1\r\n\r\n".encode(), "%C3%BC"),
    "Latin-1 in the query": ("GET /v1/events?source=ü HTTP/1.1\r\n\r\n".encode("latin-1"), "percent-encoded"),
    "space in the query": (b"GET /v1/events?source=a b HTTP/1.1\r\n\r\n", "%20"),
    "control character in the query": (b"GET /v1/events?source=a\x01 HTTP/1.1\r\n\r\n", "percent-encoded"),
    "URL without a path": (b"GET http:// HTTP/1.1\r\n\r\n", "percent-encoded"),
    "bad length": (b"POST /v1/events HTTP/1.1\r\nContent-Length: many\r\n\r\n", "Content-Length"),
}


@table("hello", [b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03", b"\x16\x03\x03\x00\xb1\x01\x00\x00\xad\x03\x03"])
def test_a_client_that_speaks_tls_is_told_so(live: Live, hello: bytes) -> None:
    (answer,) = answers_to(live, hello)
    refused(answer, part="the request is not HTTP but TLS: use http://, or a proxy with TLS in front of this server")
    eventually(lambda: "is not HTTP but TLS" in live.log)


@table("name", MALFORMED)
def test_a_malformed_request_is_refused_after_earlier_requests_are_answered(live: Live, name: str) -> None:
    sent, part = MALFORMED[name]
    for before in (b"", request_bytes("POST", "/v1/events", body_of(new_id()))):
        *answers, last = answers_to(live, before + sent)
        assert statuses(answers) == [202] * bool(before)
        refused(last, part=part)


def test_a_malformed_chunk_is_refused_after_earlier_requests_are_answered_and_stores_nothing(live: Live) -> None:
    bad = request_bytes("POST", "/v1/events", headers="Transfer-Encoding: chunked\r\n") + b"2\r\n{}\r\nzz\r\n"
    with live.client() as client, stores_nothing(client):
        assert statuses(answers_to(live, bad)) == [400]
    assert statuses(answers_to(live, request_bytes("POST", "/v1/events", body_of(new_id())) * 2 + bad)) == [
        202,
        202,
        400,
    ]


def test_a_request_that_is_answered_before_it_ends_gets_no_second_answer(live: Live) -> None:
    head = request_bytes("POST", "/v1/events", headers="Transfer-Encoding: chunked\r\n", key="wrong")
    with live.connect() as sock:
        sock.sendall(head)
        refused(answer_on(sock), 401, "unauthorized")
        sock.sendall(b"zz\r\n")
        assert sock.recv(65536) == b""


def test_the_answer_arrives_even_if_the_client_keeps_sending(live: Live) -> None:
    with live.connect() as sock:
        for _ in range(50):
            sock.sendall(b"garbage\r\n" * 10_000)
        refused(answer_on(sock))
        assert sock.recv(1) == b""


DRIPS = {  # the bytes to send first, and those to repeat
    "head": (b"", b"X"),
    "second head": (posting(BODY) + b"GET / HTTP/1.1\r\nX: ", b"y"),
    "line breaks": (b"", b"\r\n"),
    "line breaks after an answer": (posting(BODY), b"\r\n"),
    "body after its answer": (request_bytes("POST", "/v1/events", b"x" * 10**6, key="wrong")[: -(10**6)], b"x"),
    "trailers after their answer": (
        request_bytes("POST", "/v1/events", headers="Transfer-Encoding: chunked\r\n", key="wrong") + b"0\r\nX: ",
        b"y",
    ),
}


@pytest.mark.slow
def test_a_client_cannot_keep_a_connection_open_with_occasional_bytes(tmp_path: Path) -> None:
    code = changed("connections", HEADERS_TIMEOUT_S=0.5, BODY_TIMEOUT_S=0.5)
    with Live(tmp_path, "--api-key", KEY, "--keep-alive-s", "1", code=code) as live, ExitStack() as stack:
        drips = {name: (stack.enter_context(live.connect()), drip) for name, (_, drip) in DRIPS.items()}
        for name, (first, _) in DRIPS.items():
            drips[name][0].sendall(first)
        deadline = time.monotonic() + 60
        while drips:
            assert time.monotonic() < deadline, f"open: {[*drips]}"
            drips = {name: (sock, drip) for name, (sock, drip) in drips.items() if takes(sock, drip)}
            time.sleep(0.05)


def takes(sock: socket.socket, data: bytes) -> bool:
    try:
        sock.sendall(data)
    except OSError:
        return False
    return True


def test_a_lost_connection_leaves_no_timer_behind() -> None:
    """A port probe connects and leaves. Its protocol object must not be kept until the timer for headers expires."""

    async def probe() -> int:
        loop = asyncio.get_running_loop()
        config = eventstore.uvicorn_server(Starlette(), 1).config
        config.load()
        state = ServerState()
        listening = await loop.create_server(lambda: connections.Protocol(config, state, {}, loop), "127.0.0.1", 0)
        address = listening.sockets[0].getsockname()
        made: weakref.WeakSet[Any] = weakref.WeakSet()
        for sent in (b"", b"GET / HT", b"garbage\r\n"):
            with socket.create_connection(address) as sock:
                sock.sendall(sent)
                await becomes(lambda: state.connections)
                made.update(state.connections)
                if sent.startswith(b"garbage"):
                    sock.setblocking(False)
                    await loop.sock_recv(sock, 1)  # wait for its answer
                if sent:  # close with a reset
                    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            await becomes(lambda: not state.connections)
        listening.close()
        await asyncio.sleep(0.05)
        gc.collect()
        return len(made)

    assert asyncio.run(probe()) == 0


# ---------------------------------------------------------------------------------------------- headers of every answer

CORS = {
    "access-control-allow-origin": "*", "access-control-allow-headers": "*", "access-control-max-age": "86400",
    "access-control-allow-methods": "GET, POST, PUT, DELETE, OPTIONS",
}  # fmt: skip
ULID = "[0-7][0-9A-HJKMNP-TV-Z]{25}"


def has_common_headers(answer: httpx.Response) -> bool:
    names = [name for name, _ in answer.headers.multi_items()]
    assert len(names) == len({*names}), "a header is sent twice"
    assert {name: answer.headers.get(name) for name in CORS} == CORS
    return bool(re.fullmatch(ULID, answer.headers["x-request-id"]))


def test_every_answer_has_the_headers_for_cors_and_a_request_id(live: Live) -> None:
    for request, status in [*on_each_route(), *on_each_route(chunked=True)]:
        (answer,) = answers_to(live, request, shut_down=True)
        assert answer.status_code == status
        assert has_common_headers(answer)
    for sent, status in (
        (b"garbage\r\n\r\n", 400), (request_bytes("PUT", "/v1/events"), 405), (request_bytes("HEAD", "/v1/events"), 200),
        (request_bytes("GET", "/"), 200), (request_bytes("GET", "/openapi.json"), 200),
        (request_bytes("POST", "/v1/events", b"{"), 400), (request_bytes("GET", "/v1/events/none"), 404),
        (LONG_HEADS["URL"][0].encode(), 414), (LONG_HEADS["one header"][0].encode(), 431),
    ):  # fmt: skip
        with live.connect() as sock:
            sock.sendall(sent)
            head = sock.recv(65_536).partition(b"\r\n\r\n")[0] + b"\r\n\r\n"
        status_line, *lines = head.decode().split("\r\n")
        pairs = [line.partition(": ") for line in lines if line]
        answer = httpx.Response(int(status_line.split()[1]), headers=[(name, value) for name, _, value in pairs])
        assert answer.status_code == status
        assert has_common_headers(answer)


def test_a_refusal_by_a_rate_limit_and_an_internal_error_have_the_common_headers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(tmp_path, rate_limits={"/v1/events": 1}) as client:
        answers = [client.post("/v1/events", json=event()) for _ in range(2)]
        monkeypatch.setattr(client.app.state.service, "view", None)
        answers.append(client.get("/v1/events"))
    assert statuses(answers) == [202, 429, 500]
    assert all(map(has_common_headers, answers))
    assert len({answer.headers["x-request-id"] for answer in answers}) == 3


@table(
    "path", ["/v1/events", "/v1/events/bulk", "/", "/health", "/nowhere", "/v1/events/a%0Ab", "*", "//", "/v1/events/"]
)
@table("key", ["", "wrong", KEY])
def test_a_preflight_is_answered_on_any_path_without_a_key(live: Live, path: str, key: str) -> None:
    headers = "Origin: http://localhost:3000\r\nAccess-Control-Request-Method: POST\r\n" \
              "Access-Control-Request-Headers: x-api-key,content-type\r\n"  # fmt: skip
    (answer,) = answers_to(live, request_bytes("OPTIONS", path, headers=headers, key=key), shut_down=True)
    assert (answer.status_code, answer.content) == (200, b"")
    assert has_common_headers(answer)


def test_the_page_keeps_its_own_protections(live: Live) -> None:
    with live.client() as client:
        headers = client.get("/").headers
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert (headers["x-frame-options"], headers["x-content-type-options"]) == ("DENY", "nosniff")


SENT_IDS = ["a", "x" * 128, "7f9c 2b1e", "!~", 'say "hi"', "01K7KTMS8T63FH1CFJ2NHKT6X7"]
OTHER_IDS = ["", "x" * 129, "é", "a\tb", "\x7f", "\u202e"]


@table("sent", SENT_IDS + OTHER_IDS)
def test_a_request_id_is_echoed_if_it_is_short_printable_ascii_and_made_otherwise(live: Live, sent: str) -> None:
    request = request_bytes("GET", "/nowhere").replace(
        b"Host", b"X-Request-ID: %b\r\nHost" % sent.encode("latin-1", "ignore")
    )
    if sent == "\u202e":
        request = request_bytes("GET", "/nowhere").replace(b"Host", b"X-Request-ID: \xe2\x80\xae\r\nHost")
    (answer,) = answers_to(live, request, shut_down=True)
    answered = answer.headers["x-request-id"]
    assert answered == sent if sent in SENT_IDS else re.fullmatch(ULID, answered)
    eventually(lambda: json.dumps(answered)[1:-1] in live.log)


def test_each_log_line_about_a_request_has_its_id(live: Live) -> None:
    sent = {f"id-{number}": request for number, request in enumerate([
        request_bytes("POST", "/v1/events", b"{"), request_bytes("GET", "/v1/events", key="wrong"),
        request_bytes("GET", "/nowhere"), request_bytes("GET", "/v1/events?event_nam=1"),
        request_bytes("POST", "/v1/events", b"{}" * 10)[:-5],
    ])}  # fmt: skip
    before = len(live.log)
    for request_id, request in sent.items():
        answers_to(live, request.replace(b"Host", b"X-Request-ID: %b\r\nHost" % request_id.encode()), shut_down=True)
    eventually(lambda: all(request_id in live.log for request_id in sent))
    lines = [line for line in live.log[before:].splitlines() if "WARNING" in line]
    assert len(lines) >= len(sent)
    assert all(sum(line.count(request_id) for request_id in sent) == 1 for line in lines), lines


# ---------------------------------------------------------------------------------------------- paths


@table("slash", ["/", "%2F"])
def test_a_slash_at_the_end_of_a_fixed_path_is_accepted_without_a_redirect(tmp_path: Path, slash: str) -> None:
    with metering(tmp_path, rate_limits={"/v1/events": 2}) as client:
        for answer in (
            client.post(f"/v1/events{slash}", json=event("a")), client.post(f"/v1/events/bulk{slash}", json={"events": [event("b")]}),
            client.get(f"/v1/events{slash}?page_size=1"), client.post(f"/v1/events/query{slash}", json={}),
            client.get(f"/v1/events/monitoring{slash}"), client.get(f"/v1/events/lookup{slash}?id=a"),
            client.get(f"/health{slash}"), client.get(f"/v1/meters{slash}"), client.head(f"/v1/events{slash}"),
        ):  # fmt: skip
            assert answer.status_code in (200, 202), (answer.url, answer.text)
        limits = client.post(f"/v1/events{slash}", json=event("c")).headers
        assert limits["x-ratelimit-remaining"] == "0"
        refused(client.post(f"/v1/events{slash}", json=event("d")), 429, "too_many_requests")


def test_a_slash_at_the_end_of_an_id_belongs_to_the_id(client: httpx.Client) -> None:
    store(client, event("a/"), event("bulk/"), event("a"))
    for event_id in ("a/", "bulk/", "a"):
        assert client.get(f"/v1/events/{event_id}").json()["event"]["id"] == event_id
    refused(client.post("/v1/events//"), 404, "not_found")
    refused(client.put("/v1/events/"), 405, "method_not_allowed")


@table("path", ["/v1/events%0A", "/v1/events/bulk%0A", "/v1/events%0D", "/v1/events/query%0A", "/v1/meters%0A", "/health%0A",
                "/v1/meters/a/disable%0A", "/%0A", "/v1/events%0A/", "/v1//events", "/V1/events", "/v1/events;a"])  # fmt: skip
def test_a_path_matches_as_a_whole(tmp_path: Path, path: str) -> None:
    with (
        metering(tmp_path, rate_limits={"/v1/events": 1000, "/v1/events/bulk": 1000}) as client,
        stores_nothing(client),
    ):
        for body in (event(), {"events": [event()]}):
            answer = client.post(path, json=body)
            refused(answer, 404, "not_found")
            assert "x-ratelimit-limit" not in answer.headers


# ---------------------------------------------------------------------------------------------- what a caller sent, escaped

NASTY = {
    "line break": "a\nFORGED LINE", "carriage return": "a\rb", "escape": "\x1b[2J", "C1": "\x9b31m\x85", "delete": "\x7f",
    "override": "\u202egnp.exe\u202c", "isolates": "\u2066\u2067\u2068\u2069", "marks": "\u200e\u200f\u061c", "NUL": "\x00",
    "separators": "\u2028\u2029", "zero width": "\u200b\u200c\u200d\u2060", "BOM": "\ufeff", "tags": "\U000e0041", "soft hyphen": "\xad",
}  # fmt: skip


@pytest.mark.slow
@table("text", NASTY.values(), ids=NASTY)
def test_what_a_caller_sent_is_escaped_in_messages_and_in_the_log(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, text: str
) -> None:
    escaped = urllib.parse.quote(text, safe="")
    with metering(tmp_path) as client:
        for answer in (
            client.get(f"/v1/events?{escaped}=1&{escaped}=2"), client.get(f"/v1/events?order={escaped}"),
            client.get(f"/v1/{escaped}"), client.get(f"/v1/events/{escaped}"), client.get(f"/v1/events?property_filters={escaped}"),
            client.post("/v1/events", json={text: 1}), client.post("/v1/events", json=event(timestamp=text)),
            client.post("/v1/events", json=event(source={text: text})), client.post("/v1/events", json=text),
            client.post("/v1/events", json=event(properties=text)), client.post(f"/v1/events/{escaped}", json={}),
            client.post("/v1/events/bulk", json={"events": [event(text, timestamp=text) | {text: 1}]}),
            client.post("/v1/events/bulk", json={"events": text}), client.post("/v1/events/query", json={"order": text, text: 1}),
            client.post("/v1/events/usage", json={"event_name": "e", "aggregation_type": text, "timezone": text}),
            client.post("/v1/events/analytics", json={"group_by": [text]}), client.get(f"/v1/meters?sort={escaped}"),
            client.post("/v1/meters", json={"name": text, "aggregation": {"type": text, text: 1, "multiplier": text}}),
            client.post("/v1/features", json={"name": "n", "type": text, "meter_id": text, "meter": {text: text}}),
            client.post("/v1/features/search", json={"sort": [{"field": text}], "status": text}), client.get(f"/v1/meters/{escaped}"),
            client.get("/v1/events", headers={b"x-request-id": text.encode(), b"x-api-key": text.encode()}),
            client.post("/v1/events", content=b"x", headers={b"content-encoding": text.encode()}),
        ):  # fmt: skip
            assert answer.status_code >= 400
            body = answer.json()
            assert body["message"].isprintable(), body["message"]
            assert all(
                fault["message"].isprintable() and fault["field"].isprintable()
                for fault in body["details"].get("errors", [])
            )
            assert all(value.isprintable() for value in answer.headers.values())
    assert len(caplog.records) > 20
    assert [record.getMessage() for record in caplog.records if not record.getMessage().isprintable()] == []


def test_printable_text_is_echoed_as_it_is(client: httpx.Client) -> None:
    refused(client.get("/v1/events?order=größer 世 😀"), part='got "größer 世 😀"')
    refused(client.post("/v1/events", json=event(timestamp='a "b" \\')), part=r'got "a \"b\" \\"')


# ---------------------------------------------------------------------------------------------- encodings of a body

JSON_BODY = json.dumps(event(source="größe" * 20)).encode()
ENCODED: dict[str, tuple[bytes, str, str]] = {
    "gzip": (gzip.compress(JSON_BODY), "gzip", "Content-Encoding: gzip"),
    "gzip without the header": (gzip.compress(JSON_BODY), "", "Content-Encoding: gzip"),
    "deflate": (zlib.compress(JSON_BODY), "deflate", "Content-Encoding: deflate"),
    "deflate without the header": (zlib.compress(JSON_BODY), "", "Content-Encoding: deflate"),
    "raw deflate": (zlib.compress(JSON_BODY)[2:-4], "deflate", "Content-Encoding: deflate"),
    "br": (b"\x1b\x1a\x00\xf8\x8d", "br", "Content-Encoding: br"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x58", "zstd", "Content-Encoding: zstd"),
    "zstd without the header": (b"\x28\xb5\x2f\xfd\x04\x58", "", "Content-Encoding: zstd"),
    "two encodings": (gzip.compress(gzip.compress(JSON_BODY)), "gzip, gzip", "Content-Encoding: gzip, gzip"),
    "BOM": (b"\xef\xbb\xbf" + JSON_BODY, "", "byte order mark"),
    "UTF-16": (JSON_BODY.decode().encode("utf-16"), "", "UTF-16"),
    "UTF-16 big-endian": (JSON_BODY.decode().encode("utf-16-be"), "", "UTF-16"),
    "UTF-16 little-endian": (JSON_BODY.decode().encode("utf-16-le"), "", "UTF-16"),
    "UTF-32": (JSON_BODY.decode().encode("utf-32"), "", "UTF-32"),
    "percent-encoded": (urllib.parse.quote(JSON_BODY).encode(), "", "percent-encoded"),
}  # fmt: skip


@table("name", ENCODED)
@table("path", ["/v1/events", "/v1/events/bulk", "/v1/events/query", "/v1/events/usage"])
def test_a_body_in_another_encoding_is_named_for_what_it_is(shared: httpx.Client, path: str, name: str) -> None:
    body, encoding, part = ENCODED[name]
    with stores_nothing(shared):
        refused(shared.post(path, content=body, headers={"content-encoding": encoding} if encoding else {}), part=part)


@table("encoding", ["gzip", "identity", "", "br"])
def test_a_plain_body_is_accepted_whatever_its_content_encoding_says(client: httpx.Client, encoding: str) -> None:
    for body in (JSON_BODY, b" \n" + JSON_BODY):
        assert client.post("/v1/events", content=body, headers={"content-encoding": encoding}).status_code == 202


def test_a_key_in_the_header_authorization_is_answered_with_the_right_header(live: Live) -> None:
    response = httpx.get(f"{live.url}/v1/events", headers={"Authorization": f"Bearer {KEY}"})
    refused(response, 401, "unauthorized")
    assert "the header x-api-key is missing: send your key in it, not in Authorization" in response.text
