"""FlexPrice for tests: `running_server()`, its faults, and the routes under /_mock that `serve --mock` opens."""

from __future__ import annotations

import _thread
import argparse
import asyncio
import atexit
import difflib
import inspect
import json
import math
import os
import socket
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, Unpack

import msgspec
import uvicorn
from msgspec import Struct
from msgspec.structs import replace
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventstore import (
    EARLIEST,
    ENCODER,
    EVENT_FILTERS,
    IN_ENVIRONMENT,
    LATEST,
    WRITE_LOCK_TIMEOUT_S,
    ApiError,
    ApiKey,
    EventQueryIn,
    Faults,
    JsonResponse,
    Operation,
    Reader,
    Service,
    Settings,
    StartError,
    Store,
    T,
    View,
    check_key,
    connect,
    connect_reader,
    create_app,
    decode_fields,
    event_query,
    execute_writing,
    list_events,
    parse_cursor,
    plural,
    quoted,
    read_body,
    uvicorn_server,
)
from eventstore_extras import analytics, mock_clock
from eventstore_extras.faults import (
    FIELDS,
    FaultFields,
    FaultInjection,
    FaultQueue,
    InjectedFault,
    check_fault,
    decode_fault,
)
from eventstore_extras.hosts import AllowedHosts, check_hosts, hosts_of_flags
from eventstore_extras.meters import all_meters
from eventstore_extras.stored import environment_names

if TYPE_CHECKING:
    from eventstore_extras.forward import Forwarder

__all__ = [
    "Deleted",
    "EventFilters",
    "HasAddress",
    "InjectedFaults",
    "MockServer",
    "ReceivedRequest",
    "SettingsFields",
    "additions",
    "attach",
    "running_server",
]

_MAX_RECEIVED, _MAX_RECEIVED_BYTES = 10_000, 64 * 1024 * 1024
_MAX_IGNORED = 100  # different lines about ignored names, between two calls of `take_ignored`
_DEFAULT_API_KEY = "eventstore-test-key"
_SHUTDOWN_TIMEOUT_S = 1
_CLOSE_TIMEOUT_S = 30  # for requests whose connections were closed; they took 1 to 113 ms on an idle machine
_FORWARD_INTERVAL_S = 0.01

# ---------------------------------------------------------------------------------------------- the routes under /_mock


class InjectedFaults(Struct):
    faults: list[InjectedFault]


class Deleted(Struct):
    deleted: int


def _delete_rows(store: Store, tables: Iterable[str], environment: str | None = None) -> int:
    """Delete the rows of one environment, or of all; return how many. Blocks: do not call it in an event loop."""
    where = "" if environment is None else f" WHERE {IN_ENVIRONMENT}"
    deleted = 0
    with closing(connect(store.path, store.writer_pragmas)) as conn:
        for table in tables:
            statement = f"DELETE FROM {table}{where}"
            deleted += execute_writing(conn, WRITE_LOCK_TIMEOUT_S, statement, {"environment": environment}).rowcount
    return deleted


class _Routes:
    """The handlers of the routes under /_mock."""

    def __init__(self, fault_queue: FaultQueue) -> None:
        self._fault_queue = fault_queue

    async def reset_events(self, service: Service, request: Request) -> Response:
        """DELETE /_mock/events: deletes the events of the key's environment."""
        return await self._delete(service, request, ["events"])

    async def reset_meters(self, service: Service, request: Request) -> Response:
        """DELETE /_mock/meters: deletes the meters and features of the key's environment."""
        return await self._delete(service, request, ["features", "meters"])

    async def _delete(self, service: Service, request: Request, tables: list[str]) -> Response:
        count = await asyncio.to_thread(_delete_rows, service.store, tables, request["environment"])
        return JsonResponse(Deleted(count))

    async def inject_fault(self, service: Service, request: Request) -> Response:
        """POST /_mock/faults: adds a fault for the next requests of the key's environment."""
        fault = decode_fault(await read_body(service, request))
        self._fault_queue.add(fault, request["environment"])
        return await self.list_faults(service, request)

    async def list_faults(self, service: Service, request: Request) -> Response:
        """GET /_mock/faults: lists the faults that still wait for requests."""
        return JsonResponse(InjectedFaults(self._fault_queue.waiting(request["environment"])))

    async def clear_faults(self, service: Service, request: Request) -> Response:
        """DELETE /_mock/faults: removes all faults of the key's environment."""
        return JsonResponse(Deleted(self._fault_queue.clear(request["environment"])))

    def operations(self) -> tuple[Operation, ...]:
        example = {"method": "POST", "path": "/v1/events/bulk", "times": 2, "status": 429, "retry_after_s": 1}
        schema = {name: field.schema for name, field in FIELDS.items() if field.schema}
        return (
            Operation("DELETE", "/_mock/events", self.reset_events, Deleted),
            Operation("DELETE", "/_mock/meters", self.reset_meters, Deleted),
            Operation("POST", "/_mock/faults", self.inject_fault, InjectedFaults, InjectedFault,
                      example=example, schemas={"InjectedFault": schema}),
            Operation("GET", "/_mock/faults", self.list_faults, InjectedFaults),
            Operation("DELETE", "/_mock/faults", self.clear_faults, Deleted),
        )  # fmt: skip


def _additions(fault_queue: FaultQueue, allowed_hosts: Sequence[str]) -> dict[str, Any]:
    return {
        "operations": [*analytics.OPERATIONS, *_Routes(fault_queue).operations()],
        "middleware": [Middleware(AllowedHosts, allowed=allowed_hosts), Middleware(FaultInjection, queue=fault_queue)],
    }


def additions(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return the arguments of `create_app` that make the server of `serve --mock` a mock. Raises StartError."""
    return _additions(FaultQueue(), hosts_of_flags(arguments))


def attach(service: Service, _arguments: object, _address: object) -> None:
    """Add the line about the mock to the banner of `serve --mock`."""
    service.notices.append("mock         /_mock/events, /_mock/meters and /_mock/faults are open")


# ---------------------------------------------------------------------------------------------- recording requests


class ReceivedRequest(Struct, frozen=True):
    """A request that a mock received, and the status of its answer."""

    method: str
    path: str  # decoded, without the query string
    query: str
    headers: dict[str, str]  # names in lower case, without the key
    body: bytes  # as far as the server has read it
    status: int | None  # None: not answered, or not yet
    fault: dict[str, Any] | None  # the injected fault that applied to the request
    ignored: list[str] = []  # names in the request that the server ignored; "..." if there are more

    @property
    def json(self) -> Any:
        """Return the body, decoded from JSON. Raises ValueError if it is not JSON."""
        return json.loads(self.body)


def _names_in(values: Iterable[bytes]) -> list[str]:
    """Return the names in an `X-Ignored` header, which are percent-encoded and separated by commas."""
    return [urllib.parse.unquote(name.strip().decode("latin-1")) for value in values for name in value.split(b",")]


class _Recorder:
    """ASGI middleware around everything else: keeps the latest requests, with or without a known key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._received: deque[ReceivedRequest] = deque()
        self._bytes = 0
        self._ignored: dict[str, None] = {}  # lines, in their order
        self._lock = threading.Lock()  # tests read from another thread than the server's

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        body = bytearray()
        status: int | None = None

        async def receive_and_keep() -> Message:
            message = await receive()
            body.extend(message.get("body", b""))
            return message

        async def send_and_keep(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                ignored = [value for name, value in message["headers"] if name.lower() == b"x-ignored"]
                # Record before sending: a client that has the answer must find its request.
                self._record(scope, bytes(body), status, _names_in(ignored))
            await send(message)

        try:
            await self._app(scope, receive_and_keep, send_and_keep)
        finally:
            if status is None:
                self._record(scope, bytes(body), None)

    def _record(self, scope: Scope, body: bytes, status: int | None, ignored: Sequence[str] = ()) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        headers.pop("x-api-key", None)
        fault = msgspec.structs.asdict(scope["fault"]) if "fault" in scope else None
        query = scope["query_string"].decode("latin-1")
        request = ReceivedRequest(scope["method"], scope["path"], query, headers, body, status, fault, [*ignored])
        with self._lock:
            if ignored and len(self._ignored) < _MAX_IGNORED:
                names = ", ".join(map(quoted, ignored))
                self._ignored[f"{request.method} {quoted(request.path)[1:-1]} ignored {names}"] = None
            self._received.append(request)
            self._bytes += len(body)
            while len(self._received) > _MAX_RECEIVED or self._bytes > _MAX_RECEIVED_BYTES:
                self._bytes -= len(self._received.popleft().body)

    def received(self) -> list[ReceivedRequest]:
        with self._lock:
            return list(self._received)

    def clear(self) -> None:
        with self._lock:
            self._received.clear()
            self._bytes = 0

    def take_ignored(self) -> list[str]:
        with self._lock:
            taken, self._ignored = [*self._ignored], {}
        return taken


# ---------------------------------------------------------------------------------------------- running_server


class SettingsFields(TypedDict, total=False):
    """The fields of `Settings` that `running_server` takes as keywords, for type checkers."""

    db: str
    max_body_bytes: int
    query_timeout_s: float
    queue_events: int
    queue_bytes: int
    wal_bytes: int
    warn_free_bytes: int | None
    rate_limits: Mapping[str, int]
    visibility_lag_ms: int
    strict: bool
    clock: Callable[[], int]


class EventFilters(TypedDict, total=False):
    """The filters that `MockServer.events` takes as keywords, for type checkers."""

    external_customer_id: str | None
    event_name: str | None
    event_id: str | None
    source: str | None
    start_time: str | datetime | None
    end_time: str | datetime | None
    property_filters: Mapping[str, Sequence[str]] | None


def _check_names(problem: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raise TypeError, listing the known names, if one of the given names is unknown.

    Without this check only type checkers would find it: Python ignores annotations.
    """
    unknown = sorted({*given} - {*known})
    if unknown:
        similar = [name for each in unknown for name in difflib.get_close_matches(each.lower(), known, 1)]
        hint = f": did you mean {' and '.join(similar)}?" if similar else ""
        raise TypeError(f"{problem.format(', '.join(unknown))} {', '.join(known)}{hint}")


def _as_text(value: object) -> str:
    """Convert a time whose type replaces datetime, as in freezegun. Raises NotImplementedError for other types."""
    if isinstance(value, datetime):
        return value.isoformat()
    raise NotImplementedError


def _convert(arguments: Mapping[str, Any], kind: type[T]) -> T:
    """Convert Python values to a wire type, as if they came as JSON. Raises ApiError naming values of a wrong type."""
    faults = Faults()
    body = ENCODER.encode(msgspec.to_builtins(arguments, enc_hook=_as_text))
    converted = decode_fields(msgspec.json.Decoder(kind), body, faults)
    faults.raise_any()
    return converted


def _check_arguments(api_keys: object, allowed_hosts: object) -> None:
    """Raise TypeError if an argument of running_server() has a type that would fail later or be misunderstood."""
    rule = 'api_keys must map keys to names of environments, such as {"key": "development"}'
    if not isinstance(api_keys, Mapping):
        raise TypeError(f"{rule}, got {type(api_keys).__name__}")  # not the value, which may be a key
    for key, environment in api_keys.items():
        check_key(key, "api_keys: ")
        if not isinstance(environment, str) or not environment:
            raise TypeError(f"{rule}, got the name {environment!r}")
    if isinstance(allowed_hosts, str):
        raise TypeError(f"allowed_hosts must be a list of names, got {allowed_hosts!r}")


def _has_threads() -> bool:
    """Return False if gevent or eventlet has replaced threads: a server would block the code that it serves."""
    return inspect.isbuiltin(_thread.start_new_thread)


def _require_threads() -> None:
    """Raise StartError if threads are replaced."""
    if not _has_threads():
        problem = "running_server() needs threads, which gevent or eventlet has replaced in this process"
        advice = "patch with thread=False, or run `eventstore serve --mock` as a separate process"
        raise StartError(f"{problem}: {advice}")


def _share_address(sock: socket.socket) -> None:
    """Let another socket have the same address, as long as only one of them listens."""
    option = socket.SO_REUSEPORT if sys.platform == "darwin" else socket.SO_REUSEADDR
    sock.setsockopt(socket.SOL_SOCKET, option, 1)


def _bound(address: Any = ("127.0.0.1", 0)) -> socket.socket:
    """Return a socket bound to this address. Another socket may have the address, unless it listens."""
    sock = socket.socket()
    _share_address(sock)
    sock.bind(address)
    return sock


class _Port:
    """A server in a thread, and its port, which can be closed for a while. A forked child leaves both alone.

    A socket cannot stop listening, so each opening makes a new one. While the port is closed, `reserved`, a bound
    socket, keeps other programs from taking it. If `reserved` itself listens, the port cannot be opened again.
    """

    def __init__(self, server: uvicorn.Server, reserved: socket.socket) -> None:
        self._server = server
        self._process = os.getpid()
        self._reserved = reserved
        self._listener = self._new_listener()
        self._runner = asyncio.Runner(loop_factory=server.config.get_loop_factory())
        self._thread = threading.Thread(target=self._serve, name="eventstore-server", daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._reserved.getsockname()[1]}/v1"

    @property
    def is_mine(self) -> bool:
        """True in the process that made the server."""
        return os.getpid() == self._process

    def _new_listener(self) -> socket.socket:
        if self._reserved.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
            return self._reserved
        _share_address(self._reserved)
        listener = _bound(self._reserved.getsockname())
        listener.listen(2048)
        return listener

    def _serve(self) -> None:
        with self._runner:
            self._runner.run(self._server.serve([self._listener]))

    def start(self) -> None:
        """Start the server. A request that comes before it is ready waits in the listening socket."""
        self._thread.start()

    def stop(self) -> None:
        if not self.is_mine or sys.is_finalizing() or not _has_threads():  # the thread has ended, or cannot end
            return
        self._server.should_exit = True
        self._thread.join()

    def open(self) -> None:
        """Accept connections again."""
        self._run_in_thread(self._open)

    def close(self) -> None:
        """Refuse connections, close those that are open, and finish the requests in progress."""
        self._run_in_thread(self._close)

    def _run_in_thread(self, function: Callable[[], Coroutine[Any, Any, None]]) -> None:
        if not self.is_mine:
            return
        _require_threads()
        while not self._server.started and self._thread.is_alive():
            time.sleep(0.001)
        asyncio.run_coroutine_threadsafe(function(), self._runner.get_loop()).result()

    async def _open(self) -> None:
        server = self._server
        if not server.servers:
            protocol: Any = server.config.http_protocol_class
            factory = partial(protocol, server.config, server.server_state, server.lifespan.state)
            self._listener = self._new_listener()
            server.servers.append(await asyncio.get_running_loop().create_server(factory, sock=self._listener))

    async def _close(self) -> None:
        with suppress(OSError):  # macOS refuses; on Linux a forked child's copy of the socket would keep listening
            self._listener.shutdown(socket.SHUT_RDWR)
        for listening in self._server.servers:
            listening.close()
        self._server.servers.clear()
        for _ in range(3):  # an accepted connection appears in `state.connections` only in a later round of the loop
            await asyncio.sleep(0)
        state = self._server.server_state
        for connection in [*state.connections]:
            transport = connection.transport
            number = transport.get_extra_info("socket").fileno()
            with suppress(OSError), socket.fromfd(number, socket.AF_INET, socket.SOCK_STREAM) as copy:
                copy.shutdown(socket.SHUT_RDWR)  # after abort() alone, a forked child's copy would stay connected
            transport.abort()
        if state.tasks:
            await asyncio.wait(state.tasks, timeout=_CLOSE_TIMEOUT_S)


class MockServer:
    """A server for tests. `running_server` and the pytest fixture `flexprice` make it."""

    def __init__(
        self,
        port: _Port,
        api_keys: Mapping[str, str],
        *,
        store: Store,
        fault_queue: FaultQueue,
        recorder: _Recorder,
        forwarder: Forwarder | None = None,
    ) -> None:
        self.url = port.url  # ends in /v1
        self.api_keys = dict(api_keys)  # key -> environment
        self.api_key = next(iter(api_keys))
        self._port = port
        self._store = store
        self._fault_queue = fault_queue
        self._recorder = recorder
        self._forwarder = forwarder

    def events(self, environment: str | None = None, **filters: Unpack[EventFilters]) -> list[dict[str, Any]]:
        """Return all stored events, oldest first, as dicts in the form of GET /v1/events.

        Includes events that a visibility lag still hides from queries. `filters` are those of POST /v1/events/query:
        external_customer_id, event_name, event_id, source, property_filters, start_time, end_time (API: Queries).
        Without a time range it returns events of all times. `environment` defaults to that of `api_key`.
        Raises TypeError if a filter is unknown, ApiError if a value is bad.
        """
        _check_names("events() has no filter {}: it takes", filters, EVENT_FILTERS)
        everything = {"start_time": EARLIEST, "end_time": LATEST, "order": "asc", "page_size": 1000}
        sent = _convert({**everything, **filters}, EventQueryIn)
        view = View(self._environment(environment), 0)
        query = event_query(sent, view, Faults())
        reader = Reader(self._store.path)
        found: list[dict[str, Any]] = []
        with closing(reader.conn):
            while True:
                page = reader.run(partial(list_events, query=query), math.inf)
                found += json.loads(ENCODER.encode(page.events))
                if not page.has_more:
                    return found
                query = replace(query, after=parse_cursor(page.iter_last_key or ""))

    def meters(self, environment: str | None = None) -> list[dict[str, Any]]:
        """Return all meters, oldest first, including those made with a feature, as GET /v1/meters returns them."""
        with closing(connect_reader(self._store.path)) as conn:
            found = all_meters(conn, self._environment(environment))
        return [msgspec.to_builtins(stored.meter) for stored in found]

    def _environment(self, name: str | None) -> str:
        """Return the environment's name, by default that of `api_key`. Raises ApiError if the name is unknown."""
        if name is None:
            return self.api_keys[self.api_key]
        with closing(connect_reader(self._store.path)) as conn:
            known = environment_names(conn)
        if name not in known:
            problem = f"environment must be one of {', '.join(map(quoted, known))}, got {quoted(name)}"
            raise ApiError("validation_error", problem)
        return name

    def reset(self) -> None:
        """Forget all events, meters, features, faults and requests."""
        _delete_rows(self._store, ["events", "features", "meters"])
        self._recorder.clear()
        self._fault_queue.clear()  # last: an event that they no longer refuse must not be deleted

    def fail(self, **fault: Unpack[FaultFields]) -> None:
        """Add a fault for the next requests that match, with any key. Takes the fields of POST /_mock/faults.

        Raises TypeError if a field is unknown, ApiError if a value is bad.
        """
        _check_names("fail() does not take {}; it takes", fault, [*FIELDS])
        self._fault_queue.add(check_fault(_convert(fault, InjectedFault), Faults()))

    def faults(self, unused: bool = False) -> list[dict[str, Any]]:
        """Return the faults that still wait for requests; with `unused` only those that no request has met."""
        return [msgspec.structs.asdict(fault) for fault in self._fault_queue.waiting(unused=unused)]

    def requests(self) -> list[ReceivedRequest]:
        """Return the requests since the last `reset`, in the order of their answers.

        Keeps the latest 10,000 requests, or fewer if their bodies exceed 64 MB.
        """
        return self._recorder.received()

    def ignored_names(self) -> list[str]:
        """Return and forget up to 100 different lines about requests with names that the server ignored.

        The fixture `flexprice` shows them as warnings at the end of a test.
        """
        return self._recorder.take_ignored()

    def refuse_connections(self) -> None:
        """Refuse connections and close open ones until `accept_connections` is called. Stored events stay."""
        self._port.close()

    def accept_connections(self) -> None:
        """Accept connections again, at the same URL."""
        self._port.open()

    @property
    def is_of_this_process(self) -> bool:
        """False in a forked child of the process that started the server."""
        return self._port.is_mine

    def wait_until_forwarded(self, timeout_s: float = 30.0) -> None:
        """Wait until the server of `forward_to` has accepted or refused all events. Raises TimeoutError."""
        deadline_s = time.monotonic() + timeout_s
        while self._forwarder and (behind := self._forwarder.lag_now()):
            if time.monotonic() > deadline_s:
                waiting = f"{plural(behind, 'event')} not forwarded to {self._forwarder.host} yet"
                raise TimeoutError(f"after {timeout_s:g} s: {waiting}")
            time.sleep(0.005)


class HasAddress(Protocol):
    """An API that events can be sent to: its base URL, and a key for it."""

    @property
    def url(self) -> str: ...

    @property
    def api_key(self) -> str: ...


def _forward_to(target: HasAddress, service: Service, environment: str) -> Forwarder:
    """Make the server forward the environment's events. Raises StartError where `serve --forward-to` does."""
    from eventstore_extras import forward, sending  # noqa: PLC0415 - only `forward_to` needs them

    sending.require_httpx("forward_to")
    url = sending.target_url(target.url, "forward_to")
    key = sending.Key(target.api_key, "forward_to")
    return forward.forward(service, sending.Target(url, key, "forward_to"), environment, _FORWARD_INTERVAL_S)


@contextmanager
def _ending(end: Callable[[], None]) -> Iterator[None]:
    """Call `end` when the block ends, or when the process ends inside it.

    When the process ends, Python stops the threads of the server and its store before it reaches the `finally` below.
    It stops them at any point of their work: about one of 300 processes crashed.
    """
    atexit.register(end)
    try:
        yield
    finally:
        atexit.unregister(end)
        end()


@contextmanager
def _serving_in_thread(app: ASGIApp, reserved: socket.socket, service: Service) -> Iterator[_Port]:
    """Serve until the block ends."""
    server = uvicorn_server(mock_clock.timed(app, service.settings.clock), shutdown_timeout_s=_SHUTDOWN_TIMEOUT_S)
    server.config.date_header = False  # uvicorn's would be the real time
    service.is_stopping = lambda: server.should_exit
    port = _Port(server, reserved)
    port.start()
    with _ending(port.stop):
        yield port


@contextmanager
def running_server(
    *,
    api_keys: Mapping[str, str] | None = None,
    listener: socket.socket | None = None,
    forward_to: HasAddress | None = None,
    allowed_hosts: Sequence[str] = (),
    **settings: Unpack[SettingsFields],
) -> Iterator[MockServer]:
    """Run a real server in a thread until the block ends, by default with a temporary database.

    `api_keys` maps keys to environments. `settings` are fields of `Settings`, such as `clock` or `visibility_lag_ms`.
    The server listens on a free port of this machine, or on that of `listener`, a bound socket, which it closes at the
    end. It answers requests to `localhost` and loopback addresses, and to the names in `allowed_hosts`. With
    `forward_to`, another MockServer or any object with a `url` and an `api_key`, it forwards the events of its first
    key's environment at once.

    Only the process that started the server stops it. Raises TypeError for an unknown field, StartError where `serve`
    does, or if gevent has replaced threads.
    """
    known = ("listener", "forward_to", *Settings.__struct_fields__, "allowed_hosts")
    _check_names("running_server() does not take {}; it takes", settings, known)
    if forward_to and not (hasattr(forward_to, "url") and hasattr(forward_to, "api_key")):
        raise TypeError(f"forward_to must be another server, or have a url and an api_key, got {forward_to!r}")
    _require_threads()
    api_keys = api_keys or {_DEFAULT_API_KEY: "development"}
    _check_arguments(api_keys, allowed_hosts)
    hashed = tuple(ApiKey.hashed(key, environment) for key, environment in api_keys.items())
    chosen: dict[str, Any] = {"api_keys": hashed, "db": ":memory:", **settings}
    chosen["clock"] = mock_clock.checked(settings.get("clock", mock_clock.wall_clock_us))
    fault_queue = FaultQueue()
    additions = _additions(fault_queue, check_hosts(allowed_hosts, "allowed_hosts"))
    with listener or _bound() as reserved:
        app = create_app(Settings(**chosen), **additions)
        service: Service = app.state.service
        with _ending(service.store.close):
            forwarder = _forward_to(forward_to, service, next(iter(api_keys.values()))) if forward_to else None
            recorder = _Recorder(app)
            with _serving_in_thread(recorder, reserved, service) as port:
                yield MockServer(port, api_keys, store=service.store, fault_queue=fault_queue, recorder=recorder,
                                 forwarder=forwarder)  # fmt: skip
