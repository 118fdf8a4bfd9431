"""Servers that receive batches from `replay` and forwarding, and fail in the ways that real ones do."""

from __future__ import annotations

import json
import socket
import socketserver
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx

from eventstore_extras.mock import HasAddress, MockServer, running_server
from helpers import KEY, Json, serving

Handler = BaseHTTPRequestHandler
Trick = Callable[[Handler, list[str]], bool]  # gets the ids of a batch; returns True if it has answered


# ---------------------------------------------------------------------------------------------- tricks


def reply(handler: Handler, status: int, body: bytes = b"", **headers: str) -> bool:
    handler.send_response(status)
    for name, value in ({"content-length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    try:
        handler.wfile.write(body)
    except OSError:  # the client has read enough
        handler.close_connection = True
    return True


def answering(status: int, body: bytes = b"", **headers: str) -> Trick:
    return lambda handler, _: reply(handler, status, body, **headers)


def refusing(status: int, *poison: str) -> Trick:
    """Refuse each batch that has one of these events."""

    def refuse(handler: Handler, ids: list[str]) -> bool:
        errors = [{"message": "no poison"}]
        answer = {"code": "validation_error", "message": "2 of them are invalid", "details": {"errors": errors}}
        return bool({*poison} & {*ids}) and reply(handler, status, json.dumps(answer).encode())

    return refuse


def accept(_handler: Handler, _ids: list[str]) -> bool:
    """Let the target accept the batch."""
    return False


def cut(handler: Handler, _: object = None) -> bool:
    """Close the connection without an answer."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True
    return True


def cut_after_status(handler: Handler, _: object) -> bool:
    handler.wfile.write(b"HTTP/1.1 202 Accepted\r\ncontent-length: 1000\r\n\r\n{")
    handler.wfile.flush()
    return cut(handler)


def reset(handler: Handler, size: int) -> None:
    """Reset the connection in the middle of the body, as some proxies do with a large one."""
    handler.rfile.read(min(size // 2, 1000))
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(handler.connection.detach())
    handler.close_connection = True


def answer_413(handler: Handler, size: int) -> None:
    handler.rfile.read(size)
    reply(handler, 413)


# ---------------------------------------------------------------------------------------------- proxies


@contextmanager
def answering_proxy(answer: bytes) -> Iterator[int]:
    """Run a proxy that answers each connection with these bytes and closes it. Yields its port."""

    class AnswerHandler(socketserver.BaseRequestHandler):
        def handle(self) -> None:
            self.request.recv(65_536)
            self.request.sendall(answer)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), AnswerHandler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        try:
            yield server.server_address[1]
        finally:
            server.shutdown()


# ---------------------------------------------------------------------------------------------- targets


class FakeTarget:
    """A target that accepts batches and remembers them, unless a trick answers instead.

    Each request uses up one trick, but the last one stays.
    """

    def __init__(self, *tricks: Trick, api_key: str = KEY, port: int = 0) -> None:
        self.api_key = api_key
        self.tricks = [*tricks]
        self.max_bytes, self.too_large = 1 << 40, reset  # what happens to a request with a larger body
        self.resets = 0
        self.batches: list[list[str]] = []  # the ids of each request, accepted or not
        self.sizes: list[int] = []
        self.times: list[float] = []
        self.paths: list[str] = []
        self.accepted: list[Json] = []
        self._lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", port), self._handler())
        self.port = self.server.server_port
        self.url = f"http://127.0.0.1:{self.port}/v1"

    def _handler(self) -> type[Handler]:
        target = self

        class TargetHandler(BaseHTTPRequestHandler):
            protocol_version, wbufsize = "HTTP/1.1", 65_536

            def do_POST(self) -> None:
                size = int(self.headers["content-length"])
                if size > target.max_bytes:
                    target.resets += 1
                    target.too_large(self, size)
                else:
                    target._receive(self, self.rfile.read(size))

            def log_message(self, *_: object) -> None:
                pass

        return TargetHandler

    def _receive(self, handler: Handler, body: bytes) -> None:
        ids = [each["event_id"] for each in json.loads(body)["events"]]
        with self._lock:
            self.batches.append(ids)
            self.sizes.append(len(body))
            self.times.append(time.monotonic())
            self.paths.append(handler.path)
            trick = self.tricks[0] if self.tricks else accept
            if len(self.tricks) > 1:
                self.tricks.pop(0)
        if not trick(handler, ids):
            self.accept(handler, body)

    def accept(self, handler: Handler, body: bytes) -> None:
        assert handler.headers["x-api-key"] == self.api_key
        self.accepted += json.loads(body)["events"]
        reply(handler, 202, b"{}")

    @property
    def ids(self) -> list[str]:
        """Return the ids of the events that were accepted."""
        return [each["event_id"] for each in self.accepted]

    def __enter__(self) -> FakeTarget:
        threading.Thread(target=self.server.serve_forever, args=[0.01]).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


class StoringTarget(FakeTarget):
    """A target that stores what it accepts in folder/events.db, with the application itself."""

    def __init__(self, folder: Path, *tricks: Trick) -> None:
        super().__init__(*tricks)
        folder.mkdir(exist_ok=True)
        self.client = serving(folder)

    def accept(self, handler: Handler, body: bytes) -> None:
        answer = self.client.post(handler.path, content=body, headers={"x-api-key": handler.headers["x-api-key"]})
        reply(handler, answer.status_code, answer.content, **answer.headers)

    def __enter__(self) -> StoringTarget:
        self.client.__enter__()
        super().__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        super().__exit__()
        self.client.__exit__(None, None, None)


@contextmanager
def forwarding(target: HasAddress, **settings: Any) -> Iterator[tuple[MockServer, httpx.Client]]:
    """Run a server that forwards to the target, and yield it with a client of it."""
    with (
        running_server(api_keys={KEY: "development", "other": "staging"}, forward_to=target, **settings) as server,
        # Without trust_env, httpx would read all certificates for each client: 35 ms.
        httpx.Client(
            base_url=server.url.removesuffix("/v1"),
            headers={"x-api-key": KEY},
            timeout=60,
            trust_env=False,
            verify=False,
        ) as client,
    ):
        yield server, client


def lag(client: httpx.Client, key: str = KEY) -> tuple[int, str | None]:
    """Return how many events of the key's environment wait to be forwarded, and the target's host."""
    answer = client.get("/v1/events/monitoring", headers={"x-api-key": key})
    return answer.json()["post_processing_lag"], answer.headers.get("X-Forward-To")
