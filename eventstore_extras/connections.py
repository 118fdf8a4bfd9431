"""HTTP connections: limits on size and time, upgrades, half-closed connections, and a stop that loses no answer.

`serve` and the mock use uvicorn with the protocol in this module. The service alone uses uvicorn's own.

One client must not exhaust the server, so every wait for a client has a limit: for a head, for a body, for the next
request, and for the client to read an answer. docs/deploying.md has the table of limits.
"""

from __future__ import annotations

import asyncio
import heapq
import os
import socket
import time
from collections import Counter, deque
from contextlib import suppress
from http import HTTPStatus
from types import FrameType
from typing import Any

import httptools
import uvicorn
from starlette.requests import ClientDisconnect
from uvicorn.protocols.http.flow_control import HIGH_WATER_LIMIT, FlowControl
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from eventstore import CALLER, CORS_HEADERS, ENCODER, ApiError, ApiKey, Caller, IdMaker, StartError, log, now_us, plural

__all__ = ["BODY_TIMEOUT_S", "HEADERS_TIMEOUT_S", "MAX_HEAD_BYTES", "WRITE_TIMEOUT_S", "Protocol", "Server",
           "inherited_socket", "raise_file_limit"]  # fmt: skip

HEADERS_TIMEOUT_S = 30.0  # time for a request's head, from its first byte or the connection; uvicorn sets none
BODY_TIMEOUT_S = 10.0  # in each such period _MIN_BYTES of a body must arrive
WRITE_TIMEOUT_S = 30.0  # in each such period the client must take _MIN_BYTES of an answer that waits for it
_MIN_BYTES = 10_000
MAX_HEAD_BYTES = 65_536  # request line and headers; uvicorn sets no limit
_MAX_HEADERS = 1_000  # of a request: each takes a hundred bytes of memory even if it is empty
# Sizes and extensions of a body's chunks may take 16 bytes a chunk, 2 bytes for each byte of data, and this. As in Go.
_MAX_CHUNK_OVERHEAD_BYTES = 16_384
_PIECE_BYTES = 4_096  # parsed at a time, so a head may exceed the limit by this much before it is refused
_MAX_UNPARSED_BYTES = 65_536  # received but not parsed; above it, stop reading from the connection
_MAX_BODY_PARTS = 1_000  # parsed before other connections get a turn; 256 KB in chunks of one byte take 100 ms
_EOF_S = 1.0  # from the moment when a client shuts down its sending side until its queries are ended
_LINGER_S = 2.0  # from the last answer until the connection closes, unless the client closes it first
_STOP_S = 0.5  # when the server stops, keep idle connections open this long: a request may be on its way
_MAX_CONNECTIONS = 10_000  # an idle one takes 10 KB
_LISTENERS = 16  # copies of a listening socket; uvloop accepts one connection from each per round of the event loop
_SPARE_FILES = 100  # open files that are not connections: the database, the forward target, modules
_LOG_PAUSE_S = 60.0

_make_request_id = IdMaker()


class _WholeResponses:
    """A transport that writes a response's head together with its body.

    With uvicorn's two writes the event loop spends 11 % more time on a page and 7 % more on a single event.
    """

    def __init__(self, transport: asyncio.Transport) -> None:
        self._transport = transport
        self._head = b""
        self.is_closing = transport.is_closing

    def write(self, data: bytes) -> None:
        if not self._head and data.startswith(b"HTTP/1.1 ") and not data.startswith(b"HTTP/1.1 100"):
            self._head = data
        elif not self.is_closing():  # uvicorn checks this only for the newest of pipelined requests
            self._transport.write(self._head + data)
            self._head = b""

    def flush(self) -> None:
        """Write a head that no body follows: the answer to HEAD."""
        if self._head:
            self.write(b"")

    def close(self) -> None:
        self.flush()
        self._transport.close()


class _Flow(FlowControl):
    """uvicorn's flow control, except that it does not read more while many bytes are not parsed."""

    def __init__(self, protocol: Protocol) -> None:
        super().__init__(protocol.transport)
        self._protocol = protocol

    def resume_reading(self) -> None:
        if self.read_paused and len(self._protocol.unparsed) <= _MAX_UNPARSED_BYTES:
            super().resume_reading()


class _ParsingTurns:
    """Connections with more data than can be parsed at once. In each round of the event loop one of them continues."""

    def __init__(self) -> None:
        self._waiting: deque[Protocol] = deque()

    def add(self, connection: Protocol) -> None:
        connection.waits_to_parse = True
        self._waiting.append(connection)
        if len(self._waiting) == 1:
            connection.loop.call_soon(self._continue)

    def _continue(self) -> None:
        connection = self._waiting[0]
        connection.waits_to_parse = False
        try:
            connection.parse_more()  # it may wait again, behind the others
        finally:
            self._waiting.popleft()
            if self._waiting:
                connection.loop.call_soon(self._continue)


class Protocol(HttpToolsProtocol):
    """uvicorn's HTTP/1.1, except that it ignores requests to upgrade, limits the size of a request's head and the time
    for each part of a request, parses pipelined requests only as it answers them, answers clients that have shut down
    their sending side, and refuses malformed requests with the JSON error body.

    `timeout_keep_alive_task` is the timer of the reading side: for a head, for a body, between requests, or before the
    connection closes. Methods that run for each request call HttpToolsProtocol's directly: with super() they take
    1.5 us longer, 5 %.
    """

    url = b""
    _lingers = False  # the last answer is sent; what the client still sends is dropped
    _answering: RequestResponseCycle | None = None  # not the newest request, if it is pipelined
    unparsed = b""  # received, and not parsed yet
    waits_to_parse = False  # in _ParsingTurns
    _framing_bytes = 0  # received since the last piece of a body or end of a request: head, chunk sizes, trailers
    _in_body = False  # between the end of a request's head and the end of the request
    _body_bytes = 0  # of bodies, received since the body timer was set
    _overhead_bytes = 0  # of a body in chunks: long sizes, extensions, trailers
    _body_parts = 0  # parts of bodies (chunks, or pieces of them) that were parsed in this turn
    _last_answer: bytes | None = None  # to send before closing, perhaps b""; once it is set, nothing more is read
    _unsent_bytes = 0  # size of the write buffer when _write_timer was set
    _write_timer: asyncio.TimerHandle | None = None
    _eof_timer: asyncio.TimerHandle | None = None
    waits_since_s = 0.0  # monotonic time of the last answer, else of the connection

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.flow = _Flow(self)
        if not hasattr(self.server_state, "turns"):
            self.server_state.turns = _ParsingTurns()  # type: ignore[attr-defined]
        self._turns: _ParsingTurns = self.server_state.turns  # type: ignore[attr-defined]
        self._responses = _WholeResponses(transport)
        self.waits_since_s = time.monotonic()
        self._gone: asyncio.Future[Exception] = self.loop.create_future()  # see Caller.until_gone
        self._set_timer(HEADERS_TIMEOUT_S, self.timeout_keep_alive_handler)
        room: _Room | None = getattr(self.server_state, "room", None)
        if room is not None and len(self.connections) > room.limit and not room.close_some(self):
            self._end_with(ApiError("service_unavailable", "too many connections are open; try again later"))
        if getattr(self.server_state, "is_stopping", False):
            self.shutdown()

    def connection_lost(self, exc: Exception | None) -> None:
        self._unset_keepalive_if_required()  # otherwise the timers hold this object until they expire
        if self._write_timer:
            self._write_timer.cancel()
        if self._eof_timer:
            self._eof_timer.cancel()
        if self._answering and not self._answering.response_complete:
            self._answering.disconnected = True  # uvicorn tells only the newest of pipelined requests
        self._end_queries(ClientDisconnect())
        super().connection_lost(exc)

    # ---- Reading

    def data_received(self, data: bytes) -> None:
        if self._last_answer is None:
            self.unparsed += data
            if not self.waits_to_parse:
                self.parse_unparsed()
            if self.flow.read_paused or self.unparsed:
                self._pause_or_resume()

    def _pause_or_resume(self) -> None:
        if len(self.unparsed) > _MAX_UNPARSED_BYTES:
            self.flow.pause_reading()
        elif len(self.cycle.body) <= HIGH_WATER_LIMIT:
            self.flow.resume_reading()  # paused for a pipelined request; while paused, a disconnect is not noticed

    def parse_unparsed(self) -> None:
        """Parse what was received. Keep the rest as bytes while requests wait in the pipeline, because a parsed request
        takes a hundred times as much memory, and after many parts of a body, so that other connections get a turn.
        """
        if not (self._framing_bytes or self._in_body):
            self._unset_keepalive_if_required()
        data = self.unparsed
        self.unparsed = b""
        parsed = self._body_parts = 0
        try:
            while parsed < len(data) and not self.pipeline and self._body_parts < _MAX_BODY_PARTS:
                piece = data[parsed : parsed + _PIECE_BYTES]
                if self._in_body:
                    self._parse_body(piece)
                else:
                    self._parse(piece)
                parsed += _PIECE_BYTES
        except (httptools.HttpParserError, ApiError) as error:
            self._refuse(error, data)
            return
        if parsed < len(data):
            self.unparsed = data[parsed:]
            self._unset_keepalive_if_required()
            if not self.pipeline:
                self._turns.add(self)
        elif self._eof_timer:
            self._end(b"")
        elif self.timeout_keep_alive_task is None:
            if self._in_body:
                self._set_body_timer()
            elif self._framing_bytes:
                self._set_timer(HEADERS_TIMEOUT_S, self.timeout_keep_alive_handler)

    def parse_more(self) -> None:
        """Parse what was left unparsed, and then read more."""
        if self._last_answer is None and not self.waits_to_parse and not self.transport.is_closing():
            self.parse_unparsed()
            self._pause_or_resume()

    def _parse(self, piece: bytes) -> None:
        """Feed a piece to the parser. The parser stops after the head of a request to upgrade: feed that head to a new
        parser without the header `upgrade`, then feed the rest (RFC 9110, 7.8: a server may ignore the header)."""
        self._framing_bytes += len(piece)
        while piece:
            try:
                self.parser.feed_data(piece)
                break
            except httptools.HttpParserUpgrade as upgrade:
                piece = piece[upgrade.args[0] :]
                method, version = self.parser.get_method(), self.parser.get_http_version()
                if method == b"CONNECT":
                    raise ApiError("method_not_allowed", "CONNECT is not allowed: this is not a proxy") from None
                lines = [b"%s %s HTTP/%s" % (method, self.url, version.encode())]
                lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
                self.parser = httptools.HttpRequestParser(self)
                self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))
        length = self._framing_bytes
        if length > _MAX_HEADERS and (length > MAX_HEAD_BYTES or len(self.headers or ()) > _MAX_HEADERS):
            raise self._head_too_long()

    def _parse_body(self, piece: bytes) -> None:
        """Parse a piece of a body. Raises ApiError if it is in chunks whose sizes and extensions exceed their data."""
        before_bytes, before_parts = self._body_bytes, self._body_parts
        self._parse(piece)
        data = 3 * (self._body_bytes - before_bytes) + 16 * (self._body_parts - before_parts)
        self._overhead_bytes = max(0, self._overhead_bytes + len(piece) - data)
        if not self._in_body:
            self._overhead_bytes = 0
        elif self._overhead_bytes > _MAX_CHUNK_OVERHEAD_BYTES:
            limit = f"{_MAX_CHUNK_OVERHEAD_BYTES:,} bytes of long sizes, extensions and trailers"
            raise ApiError("headers_too_large", f"the body's chunks may have {limit} more than data, got more")

    def _head_too_long(self) -> ApiError:
        part, code = "headers", "headers_too_large"
        if len(self.url) > MAX_HEAD_BYTES // 2:
            part, code = "URL", "uri_too_long"
        limits = f"{MAX_HEAD_BYTES} bytes and {_MAX_HEADERS:,} headers"
        return ApiError(code, f"the request's {part} must be shorter: a head may have {limits}")

    def on_headers_complete(self) -> None:
        if self._framing_bytes > MAX_HEAD_BYTES - 2 * _PIECE_BYTES or len(self.headers) > _MAX_HEADERS:
            line = len(self.parser.get_method()) + len(self.url) + len("  HTTP/1.1\r\n\r\n")
            length = line + sum(len(name) + len(value) + 4 for name, value in self.headers)
            if length > MAX_HEAD_BYTES or len(self.headers) > _MAX_HEADERS:
                raise self._head_too_long()
        if not self.parser.should_upgrade():
            if self.timeout_keep_alive_task is not None:
                self._unset_keepalive_if_required()
            HttpToolsProtocol.on_headers_complete(self)
            self.cycle.transport = self._responses  # type: ignore[assignment]
            self.cycle.scope["gone"] = self._gone  # type: ignore[typeddict-unknown-key]
            self._in_body = True
            if getattr(self.server_state, "is_stopping", False):
                self.cycle.keep_alive = False

    def on_body(self, body: bytes) -> None:
        self._framing_bytes = 0
        self._body_bytes += len(body)
        self._body_parts += 1
        HttpToolsProtocol.on_body(self, body)

    def on_message_complete(self) -> None:
        if self._in_body:  # false after the head of a request to upgrade, which is parsed again
            self._framing_bytes = 0
            self._in_body = False
            if self.cycle.response_complete:  # refused before its body had arrived
                self._set_timer(self.timeout_keep_alive, self.timeout_keep_alive_handler)
            elif self.timeout_keep_alive_task is not None:
                self._unset_keepalive_if_required()
            HttpToolsProtocol.on_message_complete(self)
            if not self.pipeline:
                self.flow.resume_reading()  # paused during a large body; while paused, a disconnect is not noticed

    def eof_received(self) -> bool:  # type: ignore[override]
        """Keep the connection open until the requests that arrived in full are answered, but end long queries: most
        clients have closed the connection, and only a few have shut down their sending side and still read."""
        if self._lingers:
            return False  # closes the connection
        problem = f"the connection's sending side was closed more than {_EOF_S:g} s ago: keep it open until the answer"
        error = ApiError("request_timeout", f"{problem}; the query was ended")
        self._eof_timer = self.loop.call_later(_EOF_S, self._end_queries, error)
        if self._last_answer is None and not self.unparsed:
            self._end(b"")
        return True

    def _end_queries(self, error: Exception) -> None:
        if not self._gone.done():
            self._gone.set_result(error)

    # ---- Timers

    def _set_timer(self, seconds: float, callback: Any) -> None:
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(seconds, callback)

    def _set_body_timer(self) -> None:
        self._body_bytes = 0
        self._set_timer(BODY_TIMEOUT_S, self._check_body)

    def _check_body(self) -> None:
        """Refuse a body that arrives too slowly, unless the server itself has paused reading."""
        self.timeout_keep_alive_task = None
        if self._body_bytes >= _MIN_BYTES or self.flow.read_paused:
            self._set_body_timer()
        else:
            problem = f"fewer than {_MIN_BYTES} bytes of the body arrived within {BODY_TIMEOUT_S:g} s"
            self._refuse(ApiError("request_timeout", f"{problem}; nothing was stored, try again"))

    def timeout_keep_alive_handler(self) -> None:
        if not self.transport.is_closing():
            self._close_transport()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._unsent_bytes = self.transport.get_write_buffer_size()
        self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._check_write)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._write_timer:
            self._write_timer.cancel()

    def _check_write(self) -> None:
        """Drop the connection if its client does not read."""
        unsent = self.transport.get_write_buffer_size()
        if self._unsent_bytes - unsent < _MIN_BYTES:
            self._drop_unread()
        else:
            self._unsent_bytes = unsent
            self._write_timer = self.loop.call_later(WRITE_TIMEOUT_S, self._check_write)

    def _drop_unread(self) -> None:
        if self.flow.write_paused:
            unsent = self.transport.get_write_buffer_size()
            log.warning("%s does not read its answer: %d bytes are dropped", (self.client or ["?"])[0], unsent)
            self.transport.abort()

    def _close_transport(self) -> None:
        self.transport.close()
        if self.transport.get_write_buffer_size():  # otherwise close() would wait for the client without a limit
            self._set_timer(WRITE_TIMEOUT_S, self.transport.abort)

    # ---- Answering and closing

    @property
    def is_idle(self) -> bool:
        """True if the connection waits for a request."""
        waits = (self.cycle is None or self.cycle.response_complete) and not (self._framing_bytes or self._in_body)
        return waits and self._last_answer is None

    @property
    def waits_for_client(self) -> bool:
        """True if the client has not sent all of a request, or does not read an answer."""
        return bool(self._framing_bytes) or self._in_body or self.flow.write_paused

    @property
    def key(self) -> bytes:
        """The digest of the API key of the newest request; empty if it had none."""
        key: ApiKey | None = self.cycle.scope.get("api_key") if self.cycle else None  # type: ignore[assignment]
        return key.digest if key else b""

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._answering = cycle
        HttpToolsProtocol._start_asgi_task(self, cycle, app)

    def on_response_complete(self) -> None:
        was_last = self._last_answer is not None and not self.pipeline
        self._responses.flush()
        HttpToolsProtocol.on_response_complete(self)
        self.waits_since_s = time.monotonic()
        if was_last:
            self._close()
        elif self.unparsed and not self.pipeline:
            self.parse_more()
        elif self._in_body and not self.pipeline and not self.transport.is_closing():
            self._set_body_timer()  # the rest of a body that is already answered must still arrive in time

    def shutdown(self) -> None:
        """Called when the server stops: finish what is under way. An idle connection's client may just have sent a
        request, so wait a moment before closing; the connection closes after the answer to such a request."""
        if self._last_answer is not None or self.transport.is_closing():
            return
        if self.cycle is not None and not self.cycle.response_complete:
            self.cycle.keep_alive = False
            grace_s = self.config.timeout_graceful_shutdown or 0
            self.loop.call_later(max(0, grace_s - _STOP_S), self._drop_unread)  # before uvicorn cancels the request
        elif not self._framing_bytes:
            self._set_timer(_STOP_S, self.timeout_keep_alive_handler)

    def _refuse(self, error: BaseException, data: bytes = b"") -> None:
        """Log the error. After the answers to earlier requests, send its JSON body and close the connection."""
        if isinstance(error, httptools.HttpParserCallbackError):
            error = error.__context__ or error  # what the callback raised
        if not isinstance(error, ApiError):
            hint = f"the request is not valid HTTP/1.1: {error}"
            if data.startswith(b"\x16\x03"):  # a TLS handshake
                hint = "the request is not HTTP but TLS: use http://, or a proxy with TLS in front of this server"
            elif isinstance(error, httptools.HttpParserInvalidURLError) or "Expected HTTP/" in hint:
                hint += "; spaces and characters outside ASCII in a URL must be percent-encoded: %20, and %C3%BC for ü"
            error = ApiError("validation_error", hint)
        self._end_with(error)

    def _end_with(self, error: ApiError) -> None:
        status, request_id = HTTPStatus(error.status), _make_request_id(now_us(), "")
        answer = f"{status} {error.code}: {error.message}"
        about = CALLER.set(Caller({"request_id": request_id, "client": self.client, "status": status.value}))
        log.warning("a request from %s: %s", (self.client or ["?"])[0], answer)
        CALLER.reset(about)
        body = ENCODER.encode(error.body)
        headers = [(b"content-type", b"application/json"), (b"connection", b"close"), *CORS_HEADERS,
                   (b"x-request-id", request_id.encode()), (b"content-length", b"%d" % len(body))]  # fmt: skip
        head = [f"HTTP/1.1 {status} {status.phrase}".encode(), *(b"%b: %b" % header for header in headers)]
        self._end(b"\r\n".join([*head, b"", body]))

    def _end(self, answer: bytes) -> None:
        """Read nothing more. Once the requests that arrived in full are answered, send `answer` and close."""
        self._last_answer, self.unparsed = answer, b""
        self._unset_keepalive_if_required()
        if self._in_body:  # the newest request will never be complete
            self.cycle.disconnected = True
            self.cycle.message_event.set()
            if self.pipeline:
                self.pipeline.popleft()
                return
            if self.cycle.response_started:
                self._last_answer = b""
        if self._in_body or self.cycle is None or self.cycle.response_complete:
            self._close()

    def _close(self) -> None:
        """Send the last answer, then read and drop data for _LINGER_S. Closing immediately with unread data would reset
        the connection, and the client could lose the answer."""
        self._unset_keepalive_if_required()
        if self.transport.is_closing():
            return
        if not self._last_answer:
            self._close_transport()
            return
        self.transport.write(self._last_answer)
        self.transport.write_eof()
        self._lingers = True
        self.flow.resume_reading()
        self._set_timer(_LINGER_S, self._close_transport)


class _Room:
    """The limit on open connections. At the limit on open files, the kernel would reset new ones without an answer."""

    def __init__(self, server: uvicorn.Server) -> None:
        self._connections = server.server_state.connections
        self._logged_s = -_LOG_PAUSE_S
        self.limit = _MAX_CONNECTIONS
        with suppress(ImportError):
            import resource  # noqa: PLC0415 - not on Windows

            files, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
            if files != resource.RLIM_INFINITY:
                self.limit = min(_MAX_CONNECTIONS, files - _SPARE_FILES)

    def close_some(self, newest: Protocol) -> bool:
        """Close a hundredth of the connections, and log it. Return False if none may be closed.

        Close idle connections. If none is idle, but one key has more than half of all connections, close those of that
        key that wait for their client. Take the key with the most connections first, longest waiting first.
        """
        now_s = newest.loop.time()
        if now_s >= self._logged_s + _LOG_PAUSE_S:
            self._logged_s = now_s
            log.warning("%s are open, the limit; idle ones are closed for new ones", plural(self.limit, "connection"))
        others = [
            each
            for each in self._connections
            if each is not newest and isinstance(each, Protocol) and not each.transport.is_closing()
        ]
        of_key = Counter(each.key for each in others)
        idle = [each for each in others if each.is_idle]
        waiting = [each for each in others if each.waits_for_client and of_key[each.key] > self.limit // 2]
        # Close many at once: searching 10,000 connections for each new one would block the event loop.
        number = self.limit // 100 if not idle else max(1, self.limit // 100)
        for each in heapq.nsmallest(number, idle or waiting, key=lambda each: (-of_key[each.key], each.waits_since_s)):
            each.transport.abort()
        return bool(number and (idle or waiting))


class Server(uvicorn.Server):
    """uvicorn's server with this module's protocol."""

    def __init__(self, config: uvicorn.Config) -> None:
        config.http = Protocol
        super().__init__(config)
        self._copies: list[socket.socket] = []

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on several copies of each socket: with one, a client that connects again and again fills the queue of
        new connections, and others wait there for seconds."""
        self.server_state.room = _Room(self)  # type: ignore[attr-defined]  # not earlier: reads the raised file limit
        self._copies = [each.dup() for each in sockets or () for _ in range(1, _LISTENERS)]
        await super().startup([*(sockets or ()), *self._copies] or None)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Stop; on a second SIGINT drop all connections, for which uvicorn would wait."""
        super().handle_exit(sig, frame)
        for connection in list(self.server_state.connections) if self.force_exit else []:
            connection.loop.call_soon_threadsafe(connection.transport.abort)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self.server_state.is_stopping = True  # type: ignore[attr-defined]
        await super().shutdown([*(sockets or ()), *self._copies])


def raise_file_limit() -> None:
    """Raise the limit on open files to the maximum: each connection is a file, and the usual limit is 1024."""
    with suppress(ImportError, ValueError, OSError):
        import resource  # noqa: PLC0415 - not on Windows

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def inherited_socket(fd: int | None) -> socket.socket | None:
    """Return the listening socket that systemd or another parent passed: as `--fd`, else as LISTEN_FDS says.

    Return None if no socket was passed. Raises StartError if it is not a listening TCP socket.
    """
    source = f"--fd {fd}"
    if fd is None:
        if os.environ.get("LISTEN_PID") != str(os.getpid()):
            return None
        source, fd = "LISTEN_FDS", 3
        if os.environ.get("LISTEN_FDS") != "1":
            raise StartError(f"LISTEN_FDS must be 1, got {os.environ.get('LISTEN_FDS')!r}: pass one socket")
    try:
        passed = socket.socket(fileno=fd)
        is_listening = passed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    except OSError as error:
        raise StartError(f"{source}: file descriptor {fd} is not a socket: {error.strerror}") from error
    if not is_listening or passed.family not in (socket.AF_INET, socket.AF_INET6):
        raise StartError(f"{source}: file descriptor {fd} is not a listening TCP socket")
    return passed
