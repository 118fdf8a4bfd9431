"""Connections: the limits on a client's time, the number of connections, inherited sockets, and how the server stops."""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import shlex
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import httpx
import pytest

from eventstore_extras import connections
from eventstore_extras.mock import running_server
from forked import ROOT, ForkedProcess, changed
from helpers import (
    BODY,
    HEAD,
    KEY,
    POST,
    SCRIPT,
    Live,
    answer_on,
    event,
    eventually,
    ids,
    posting,
    refused,
    store,
    table,
)

CONTINUED = POST + b"Expect: 100-continue\r\nContent-Length: 1000\r\n\r\n"


limited = partial(changed, "connections")


@pytest.fixture(scope="module")
def impatient(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    code = limited(BODY_TIMEOUT_S=1, WRITE_TIMEOUT_S=2)  # no less: a busy machine delays a client that is in time
    folder = tmp_path_factory.mktemp("impatient")
    with Live(folder, "--api-key", KEY, code=code) as live:
        yield live


UNFINISHED = [  # nothing of a body, a part of it, a part of a chunk, all chunks but the last
    b"Content-Length: 1000\r\n\r\n",
    b"Content-Length: 1000\r\n\r\n{",
    b"Transfer-Encoding: chunked\r\n\r\n5\r\n{",
    b"Transfer-Encoding: chunked\r\n\r\n1\r\n{\r\n",
]


@pytest.mark.slow
def test_bodies_that_do_not_arrive_in_time_are_refused_and_their_connections_closed(impatient: Live) -> None:
    with ExitStack() as stack:
        socks = [stack.enter_context(impatient.connect()) for _ in UNFINISHED]
        for sock, part in zip(socks, UNFINISHED, strict=True):  # all wait at the same time
            sock.sendall(POST + part)
        for sock in socks:
            response = answer_on(sock)
            refused(response, 408, "request_timeout")
            assert "fewer than 10000 bytes of the body arrived within 1 s" in response.json()["message"]
            assert sock.recv(1) == b""


@pytest.mark.slow
def test_a_body_may_take_longer_than_the_limit_while_enough_of_it_arrives(tmp_path: Path) -> None:
    body = json.dumps(event("slow", properties={"text": "x" * 250_000})).encode()
    code = limited(BODY_TIMEOUT_S=1)
    with Live(tmp_path, "--api-key", KEY, code=code) as live, live.connect() as sock:
        sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        start = time.monotonic()
        for at in range(0, len(body), 20_000):
            sock.sendall(body[at : at + 20_000])
            time.sleep(0.1)  # a tenth of the limit: a busy machine may be late
        assert answer_on(sock).status_code == 202
        assert time.monotonic() - start > 1


def test_a_body_that_is_already_refused_must_arrive_in_time_as_well(impatient: Live) -> None:
    with impatient.connect() as sock:
        sock.sendall(b"POST /v1/events HTTP/1.1\r\nHost: test\r\nContent-Length: 1000\r\n\r\nx")
        refused(answer_on(sock), 401, "unauthorized")
        sock.sendall(b"x")
        assert sock.recv(1000).startswith(b"HTTP/1.1 408 ") or sock.recv(1) == b""
        while sock.recv(1000):
            pass


def test_after_a_body_that_was_refused_early_the_connection_serves_the_next_request(impatient: Live) -> None:
    with impatient.connect() as sock:
        sock.sendall(b"POST /v1/events HTTP/1.1\r\nHost: test\r\nContent-Length: 10\r\n\r\nx")
        refused(answer_on(sock), 401, "unauthorized")
        sock.sendall(b"x" * 9)
        time.sleep(1.1)  # longer than the body's limit: the timer is the one between requests again
        sock.sendall(posting(BODY))
        assert answer_on(sock).status_code == 202


@pytest.mark.slow
def test_a_client_that_does_not_read_its_answer_is_dropped(impatient: Live) -> None:
    with impatient.client() as client:
        store(client, *[event(properties={"text": "x" * 200_000}) for _ in range(100)])
    with socket.socket() as sock:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(impatient.port)))
        sock.sendall(b"GET /v1/events HTTP/1.1\r\n" + HEAD + b"\r\n")
        eventually(lambda: "does not read its answer: " in impatient.log)
    with impatient.client() as client:
        assert len(client.get("/v1/events").content) > 10_000_000  # a client that reads gets all of it


def test_for_each_connection_above_the_limit_the_one_idle_for_longest_is_closed(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY, code=limited(_MAX_CONNECTIONS=20)) as live, ExitStack() as stack:
        idle = [stack.enter_context(live.connect()) for _ in range(30)]
        with live.client() as client:
            assert store(client, event("a")).status_code == 202
        for sock in idle[:10]:
            assert sock.recv(1) == b""
        idle[-1].sendall(posting(BODY))
        assert answer_on(idle[-1]).status_code == 202
        assert live.log.count("20 connections are open, the limit") == 1


def test_a_connection_above_the_limit_is_answered_with_503_if_none_is_idle(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY, code=limited(_MAX_CONNECTIONS=3)) as live, ExitStack() as stack:
        busy = [stack.enter_context(live.connect()) for _ in range(3)]
        for sock in busy:
            sock.sendall(CONTINUED)
            assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
        with live.connect() as sock:
            refused(answer_on(sock), 503, "service_unavailable")


@table("kind", ["idle", "body", "head"])
def test_the_connections_of_the_key_that_has_the_most_are_closed_first(tmp_path: Path, kind: str) -> None:
    keys = ("--api-key", KEY, "--api-key", "other-key")
    with Live(tmp_path, *keys, code=limited(_MAX_CONNECTIONS=100)) as live, ExitStack() as stack:
        other = stack.enter_context(live.connect())
        other.sendall(posting(BODY).replace(KEY.encode(), b"other-key"))
        assert answer_on(other).status_code == 202
        for _ in range(120):
            sock = stack.enter_context(live.connect())
            if kind == "idle":
                sock.sendall(posting(BODY))
                assert answer_on(sock).status_code == 202
            elif kind == "body":
                sock.sendall(CONTINUED)
                assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
            else:
                sock.sendall(b"POST /v1")
        new = stack.enter_context(live.connect())
        for sock in (new, other) if kind == "idle" else (new,):
            sock.sendall(posting(BODY).replace(KEY.encode(), b"other-key"))
            assert answer_on(sock).status_code == 202


# ---------------------------------------------------------------------------------------------- pipelines, chunks


class Noted(NamedTuple):
    """What is noted of the connections of a server in this process while it parses."""

    pipelined: list[int]  # number of requests that wait in a connection's pipeline
    body_parts: list[int]  # number of parts of bodies parsed in one turn
    unparsed: list[int]  # number of bytes


@pytest.fixture
def noted(monkeypatch: pytest.MonkeyPatch) -> Noted:
    notes = Noted([], [], [])
    parse = connections.Protocol.parse_unparsed

    def parse_and_note(self: connections.Protocol) -> None:
        parse(self)
        notes.pipelined.append(len(self.pipeline))
        notes.body_parts.append(self._body_parts)
        notes.unparsed.append(len(self.unparsed))

    monkeypatch.setattr(connections.Protocol, "parse_unparsed", parse_and_note)
    return notes


@contextmanager
def connected() -> Iterator[socket.socket]:
    """Start a server in this process, and connect to it."""
    with running_server(api_keys={KEY: "development"}) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port), timeout=30) as sock:
            yield sock


def read_in_background(sock: socket.socket) -> tuple[threading.Thread, bytearray]:
    """Start a thread that reads until the server closes the connection."""
    received = bytearray()

    def read() -> None:
        while data := sock.recv(65_536):
            received.extend(data)

    thread = threading.Thread(target=read)
    thread.start()
    return thread, received


GET = b"GET /v1/events/none HTTP/1.1\r\n\r\n"  # a short request: it gets a 401


@table("end", [b"GET /v1/events/none HTTP/1.1\r\nConnection: close\r\n\r\n", None], ids=["close", "end of file"])
def test_pipelined_requests_are_all_answered_but_few_are_parsed_ahead(noted: Noted, end: bytes | None) -> None:
    with connected() as sock:
        thread, received = read_in_background(sock)
        sock.sendall(GET * 5000 + (end or GET))
        if end is None:
            sock.shutdown(socket.SHUT_WR)
        thread.join(30)
    assert received.count(b"HTTP/1.1 401 ") == 5001
    assert 0 < max(noted.pipelined) <= 4096 // len(GET) + 1
    assert max(noted.unparsed) <= 65_536 + 256_000


def test_of_a_client_that_reads_no_answer_few_pipelined_requests_are_parsed(noted: Noted) -> None:
    with connected() as sock:
        sock.settimeout(0.5)
        with suppress(TimeoutError):
            sock.sendall(GET * 500_000)  # 15 MB, more than the buffers of both sides
        assert max(noted.pipelined) <= 4096 // len(GET) + 1
        assert max(noted.unparsed) <= 65_536 + 256_000


def test_a_pipeline_whose_client_resets_the_connection_ends_without_an_error(caplog: pytest.LogCaptureFixture) -> None:
    with connected() as sock:
        sock.sendall(posting(BODY) * 200)
        assert sock.recv(10)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    assert "Traceback" not in caplog.text


def test_a_body_in_many_chunks_is_parsed_in_turns_and_stored(noted: Noted) -> None:
    body = json.dumps(event("chunked", properties={"text": "x" * 100_000})).encode()
    chunks = b"".join(b"1\r\n%c\r\n" % byte for byte in body)
    with connected() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
        assert answer_on(sock).status_code == 202
        sock.sendall(posting(BODY))
        assert answer_on(sock).status_code == 202
    assert sum(noted.body_parts) >= len(body)
    assert max(noted.body_parts) <= 1000 + 4096 // len(b"1\r\nx\r\n") + 1


LONG = b"a" * 3000
OVERHEAD = {  # one chunk with a byte of data
    "extension": b"1;" + LONG + b"\r\nx\r\n", "extensions": b"1" + b";a" * 1500 + b"\r\nx\r\n",
    "quoted extension": b'1;a="' + LONG + b'"\r\nx\r\n', "short extensions": b"1;a=12345678901234567890\r\nx\r\n",
    "zeros": b"0" * 3000 + b"1\r\nx\r\n",
}  # fmt: skip


@table("kind", OVERHEAD)
def test_a_body_whose_chunks_have_more_overhead_than_data_is_refused(kind: str) -> None:
    with connected() as sock:
        sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n")
        with suppress(OSError):
            sock.sendall(OVERHEAD[kind] * (1 + 100_000 // len(OVERHEAD[kind]) * (4 if kind.startswith("short") else 1)))
        refused(answer_on(sock), 431, "headers_too_large", "the body's chunks may have 16,384 bytes")


@table("line", [b"%x;chunk-signature=" + b"a" * 64, b"%016x", b"%x;" + b"a" * 1000], ids=["signed", "zeros", "long"])
def test_a_body_whose_chunks_have_less_overhead_than_data_is_stored(line: bytes) -> None:
    body = json.dumps(event("chunked", properties={"text": "x" * 200_000})).encode()
    pieces = [body[start : start + 1000] for start in range(0, len(body), 1000)]
    chunks = b"".join(line % len(piece) + b"\r\n" + piece + b"\r\n" for piece in pieces)
    with connected() as sock:
        for _ in range(2):
            sock.sendall(POST + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + b"0\r\n\r\n")
            assert answer_on(sock).status_code == 202


REFUSED = {
    "not HTTP": b"hello\r\n\r\n",
    "long head": b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nx: " + b"a" * 65_536 + b"\r\n\r\n",
    "chunk": POST + b"Transfer-Encoding: chunked\r\n\r\nno size\r\n",
}


@table("sent", REFUSED.values(), ids=REFUSED)
def test_a_refused_connection_ends_when_its_client_closes_it(monkeypatch: pytest.MonkeyPatch, sent: bytes) -> None:
    monkeypatch.setattr(connections, "_LINGER_S", 3600)
    with running_server(api_keys={KEY: "development"}) as server:
        url = httpx.URL(server.url)
        with socket.create_connection((url.host, url.port), timeout=30) as sock:
            sock.sendall(sent)
            assert answer_on(sock).status_code in (400, 431)
        eventually(lambda: not server._port._server.server_state.connections)


@pytest.mark.skipif(os.name == "nt", reason="needs uvloop")
def test_several_connections_are_accepted_in_a_round_of_the_event_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    accepted: Counter[int] = Counter()  # by round
    rounds = 0
    loops: list[asyncio.AbstractEventLoop] = []
    connection_made = connections.Protocol.connection_made

    def next_round() -> None:
        nonlocal rounds
        rounds += 1
        if accepted.total() < 101:
            loops[0].call_soon(next_round)

    def note(self: connections.Protocol, transport: asyncio.Transport) -> None:
        connection_made(self, transport)
        accepted[rounds] += 1
        if not loops:
            loops.append(self.loop)
            next_round()

    monkeypatch.setattr(connections.Protocol, "connection_made", note)
    with running_server(api_keys={KEY: "development"}) as server, ExitStack() as stack:
        url = httpx.URL(server.url)
        release = threading.Event()

        def connect() -> None:
            stack.enter_context(socket.create_connection((url.host, url.port), timeout=30))

        connect()
        eventually(lambda: loops)
        loops[0].call_soon_threadsafe(release.wait, 30)
        for _ in range(100):
            connect()
        release.set()
        eventually(lambda: accepted.total() == 101)
    assert max(accepted.values()) >= 16


# ---------------------------------------------------------------------------------------------- inherited sockets


def serve_on(listener: socket.socket, folder: Path) -> subprocess.Popen[bytes] | ForkedProcess:
    fd = listener.fileno()
    with (folder / "log").open("a") as log:
        files = [0, log.fileno(), log.fileno()]
        if sys.platform == "linux":
            return ForkedProcess(["serve", "--fd", "3", "--api-key", KEY], folder, [*files, fd], dict(os.environ))
        command = (*SCRIPT, "serve", "--fd", str(fd), "--api-key", KEY)
        return subprocess.Popen(command, cwd=folder, pass_fds=[fd], stdout=log, stderr=log)


RESTARTS = int(os.environ.get("EVENTSTORE_TEST_STORM", "8"))


@pytest.mark.slow
@table("keeps_alive", [False, True], ids=["a connection for each request", "one connection"])
def test_restarts_refuse_no_connection_and_lose_no_answer(tmp_path: Path, keeps_alive: bool) -> None:
    """Clients that never retry, on a socket that stays open while the process behind it is replaced."""
    over = threading.Event()
    stored: list[str] = []
    problems: list[object] = []

    def send(name: str) -> None:
        connection, number = http.client.HTTPConnection("127.0.0.1", port, timeout=30), 0
        try:
            while not over.is_set():
                number += 1
                body = json.dumps(event(f"{name} {number}"))
                close = {} if keeps_alive else {"Connection": "close"}
                connection.request("POST", "/v1/events", body, {"x-api-key": KEY, **close})
                answer = connection.getresponse()
                answer.read()
                if answer.status != 202:
                    problems.append(answer.status)
                stored.append(f"{name} {number}")
        except (OSError, http.client.HTTPException) as error:
            problems.append(error)

    def served_or_failed(enough: int) -> bool:
        return len(stored) >= enough or bool(problems)

    with socket.create_server(("127.0.0.1", 0), backlog=128) as listener:
        port = listener.getsockname()[1]
        process = serve_on(listener, tmp_path)
        clients = [threading.Thread(target=send, args=[f"client {number}"]) for number in range(4)]
        for client in clients:
            client.start()
        for _ in range(RESTARTS):
            enough = len(stored) + 20
            eventually(partial(served_or_failed, enough))
            process.terminate()
            assert process.wait(30) == 0
            process = serve_on(listener, tmp_path)
        over.set()
        for client in clients:
            client.join()
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
        connection.request("GET", "/v1/events/monitoring", headers={"x-api-key": KEY})
        counted = json.loads(connection.getresponse().read())["total_count"]
        process.terminate()
        process.wait(30)
    assert (problems, counted) == ([], len(stored))


@pytest.mark.skipif(os.name == "nt", reason="needs LISTEN_FDS")
def test_a_socket_unit_of_systemd_passes_its_socket(tmp_path: Path) -> None:
    """systemd sets LISTEN_PID to the process it starts, and passes the socket as file descriptor 3."""
    code = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.argv[1], sys.argv[1:])"
    with socket.create_server(("127.0.0.1", 0)) as listener:
        wrapped = f'exec 3<&{listener.fileno()}; exec {sys.executable} -c "{code}" {shlex.join(SCRIPT)}'
        command = ["bash", "-c", f'{wrapped} "$@"', "bash"]
        process = subprocess.Popen([*command, "serve", "--api-key", KEY], cwd=tmp_path, text=True,
                                   pass_fds=[listener.fileno()], stdout=subprocess.PIPE,
                                   env=os.environ | {"LISTEN_FDS": "1"})  # fmt: skip
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port), timeout=30) as sock:
            sock.sendall(posting(BODY))
            assert answer_on(sock).status_code == 202
        process.terminate()
        shown, _ = process.communicate(timeout=30)
    assert f"http://127.0.0.1:{port}/v1" in shown
    assert process.returncode == 0


@pytest.mark.slow
@table(("kind", "message"), [
    ("closed", "is not a socket"),
    ("file", "is not a socket"),
    ("unix", "is not a listening TCP socket"),
    ("not listening", "is not a listening TCP socket"),
    ("two", "LISTEN_FDS must be 1, got '2'"),
])  # fmt: skip
def test_a_file_descriptor_that_cannot_be_served_on_is_refused_at_the_start(
    tmp_path: Path, kind: str, message: str
) -> None:
    with ExitStack() as stack:
        fd, environ = 99, dict(os.environ)
        if kind == "file":
            fd = stack.enter_context((tmp_path / "file").open("w")).fileno()
        elif kind == "unix":
            unix = stack.enter_context(socket.socket(socket.AF_UNIX))
            unix.bind(str(tmp_path / "unix"))
            unix.listen()
            fd = unix.fileno()
        elif kind == "not listening":
            fd = stack.enter_context(socket.socket()).fileno()
        if kind == "two":
            code = "import os, sys; os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS='2');"
            code += "import eventstore; sys.exit(eventstore.main())"
            command = [sys.executable, "-c", code, "serve", "--api-key", KEY]
            environ["PYTHONPATH"] = str(ROOT)
        else:
            command = [*map(str, SCRIPT), "serve", "--api-key", KEY, "--fd", str(fd)]
        passed = [] if kind in ("closed", "two") else [fd]
        done = subprocess.run(command, cwd=tmp_path, pass_fds=passed, capture_output=True, text=True, env=environ,
                              timeout=30, check=False)  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


# ---------------------------------------------------------------------------------------------- stopping


def test_a_request_that_arrives_while_the_server_stops_is_answered_and_closes_its_connection(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY, code=limited(_STOP_S=20)) as live:
        with live.connect() as used, live.connect() as new:
            used.sendall(posting(BODY))
            assert "connection" not in answer_on(used).headers
            live.begin_to_stop()
            for sock in (used, new):
                sock.sendall(posting(BODY))
                response = answer_on(sock)
                assert (response.status_code, response.headers["connection"]) == (202, "close")
                assert sock.recv(1) == b""
        assert live.process.wait(30) == 0


@pytest.mark.slow
def test_a_second_sigint_ends_the_server_at_once(tmp_path: Path) -> None:
    code = "import sys, eventstore; eventstore._SHUTDOWN_TIMEOUT_S = 60; sys.exit(eventstore.main())"
    with Live(tmp_path, "--api-key", KEY, code=code) as live:
        with live.client() as client:
            store(client, event("a"))
        with live.connect() as sock:
            sock.sendall(CONTINUED)
            assert sock.recv(100).startswith(b"HTTP/1.1 100 ")
            live.begin_to_stop(signal.SIGINT)
            live.process.send_signal(signal.SIGINT)
            assert live.process.wait(30) == 0  # otherwise it would wait for the request, which never ends
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        assert ids(client) == ["a"]


@pytest.mark.slow
@table("requests", [1, 5])
def test_answers_that_nobody_reads_are_dropped_when_the_server_stops(tmp_path: Path, requests: int) -> None:
    with Live(tmp_path, "--api-key", KEY) as live, socket.socket() as sock:
        with live.client() as client:
            store(client, *[event(properties={"text": "x" * 200_000}) for _ in range(50)])
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        sock.connect(("127.0.0.1", int(live.port)))
        sock.sendall((b"GET /v1/events HTTP/1.1\r\n" + HEAD + b"\r\n") * requests)
        assert sock.recv(10)
        assert live.stop() == 0
        assert "does not read its answer: " in live.log
        assert "Traceback" not in live.log


def test_connections_that_never_had_a_request_are_closed_first(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY, code=limited(_MAX_CONNECTIONS=5)) as live, ExitStack() as stack:
        used = stack.enter_context(live.connect())
        used.sendall(posting(BODY))
        assert answer_on(used).status_code == 202
        unused = [stack.enter_context(live.connect()) for _ in range(12)]
        for sock in unused[:8]:
            assert sock.recv(1) == b""
        used.sendall(posting(BODY))
        assert answer_on(used).status_code == 202
