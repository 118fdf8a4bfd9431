"""FlexPrice for tests: `running_server()`, its faults, and the routes under /_mock that `serve --mock` opens."""

from __future__ import annotations

import asyncio
import atexit
import json
import math
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

import msgspec
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
    Store,
    T,
    View,
    connect,
    connect_reader,
    create_app,
    event_query,
    execute_writing,
    list_events,
    listen,
    parse_cursor,
    plural,
    read_body,
    uvicorn_server,
)
from eventstore_extras import analytics
from eventstore_extras.faults import FIELDS, FaultInjection, FaultQueue, InjectedFault, check_fault, decode_fault
from eventstore_extras.meters import all_meters

if TYPE_CHECKING:
    from eventstore_extras.forward import Forwarder

__all__ = [
    "Deleted",
    "HasAddress",
    "InjectedFaults",
    "MockServer",
    "ReceivedRequest",
    "additions",
    "attach",
    "running_server",
]

_MAX_RECEIVED, _MAX_RECEIVED_BYTES = 10_000, 64 * 1024 * 1024
_DEFAULT_API_KEY = "eventstore-test-key"
_SHUTDOWN_TIMEOUT_S = 1
_FORWARD_INTERVAL_S = 0.01


# ---------------------------------------------------------------------------------------------- the routes under /_mock


class InjectedFaults(Struct):
    faults: list[InjectedFault]


class Deleted(Struct):
    deleted: int


def _delete_rows(store: Store, tables: Iterable[str], environment: str | None = None) -> int:
    """Delete the rows of one environment, or of all; returns how many. Blocks: not for an event loop's thread."""
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


def _additions(fault_queue: FaultQueue) -> dict[str, Any]:
    return {
        "operations": [*analytics.OPERATIONS, *_Routes(fault_queue).operations()],
        "middleware": [Middleware(FaultInjection, queue=fault_queue)],
    }


def additions() -> dict[str, Any]:
    """Return the arguments of `create_app` that make the server of `serve --mock` a mock."""
    return _additions(FaultQueue())


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
    fault: dict[str, Any] | None  # the one that the request met

    @property
    def json(self) -> Any:
        """Return the body, decoded from JSON. Raises ValueError if it is not JSON."""
        return json.loads(self.body)


class _Recorder:
    """ASGI middleware around everything else: keeps the latest requests, with or without a known key."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app
        self._received: deque[ReceivedRequest] = deque()
        self._bytes = 0
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
                self._record(scope, bytes(body), status)  # first: a client with an answer must find its request
            await send(message)

        try:
            await self._app(scope, receive_and_keep, send_and_keep)
        finally:
            if status is None:
                self._record(scope, bytes(body), None)

    def _record(self, scope: Scope, body: bytes, status: int | None) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        headers.pop("x-api-key", None)
        fault = msgspec.structs.asdict(scope["fault"]) if "fault" in scope else None
        query = scope["query_string"].decode("latin-1")
        with self._lock:
            self._received.append(ReceivedRequest(scope["method"], scope["path"], query, headers, body, status, fault))
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


# ---------------------------------------------------------------------------------------------- running_server


def _check_names(function: str, given: Iterable[str], known: Sequence[str]) -> None:
    """Raises TypeError, listing the known names, if one of the given names is unknown."""
    if unknown := {*given} - {*known}:
        raise TypeError(f"{function}() does not take {', '.join(sorted(unknown))}; it takes {', '.join(known)}")


def _convert(arguments: Mapping[str, Any], kind: type[T]) -> T:
    """Convert Python values to a wire type, as if they came as JSON. Raises ApiError if a value has the wrong type."""
    try:
        return msgspec.convert(msgspec.to_builtins(arguments), kind)
    except msgspec.ValidationError as error:
        raise ApiError("validation_error", str(error)) from None


class MockServer:
    """A server for tests. `running_server` and the pytest fixture `flexprice` make it."""

    def __init__(
        self,
        url: str,
        api_keys: Mapping[str, str],
        *,
        store: Store,
        fault_queue: FaultQueue,
        recorder: _Recorder,
        forwarder: Forwarder | None = None,
    ) -> None:
        self.url = url  # ends in /v1
        self.api_keys = dict(api_keys)  # key -> environment
        self.api_key = next(iter(api_keys))
        self._store = store
        self._fault_queue = fault_queue
        self._recorder = recorder
        self._forwarder = forwarder

    def events(self, environment: str | None = None, **filters: Any) -> list[dict[str, Any]]:
        """Return all stored events, oldest first, as dicts in the form of GET /v1/events.

        Includes events that a visibility lag still hides from queries. `filters` are those of POST /v1/events/query:
        external_customer_id, event_name, event_id, source, property_filters, start_time, end_time (API: Queries).
        Without a time range it returns events of all times. `environment` defaults to that of `api_key`.
        Raises TypeError if a filter is unknown, ApiError if a value is bad.
        """
        if unknown := filters.keys() - EVENT_FILTERS:
            raise TypeError(f"events() has no filter {', '.join(sorted(unknown))}: it takes {', '.join(EVENT_FILTERS)}")
        sent = _convert({"start_time": EARLIEST, "end_time": LATEST, "order": "asc"} | filters, EventQueryIn)
        view = View(environment or self.api_keys[self.api_key], 0)
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
        """Return all meters, oldest first, also those made with a feature, as dicts in the form of GET /v1/meters."""
        with closing(connect_reader(self._store.path)) as conn:
            found = all_meters(conn, environment or self.api_keys[self.api_key])
        return [msgspec.to_builtins(stored.meter) for stored in found]

    def reset(self) -> None:
        """Forget all events, meters, features, faults and requests."""
        self._fault_queue.clear()
        self._recorder.clear()
        _delete_rows(self._store, ["events", "features", "meters"])

    def fail(self, **fault: Any) -> None:
        """Add a fault for the next requests that match, of any key. Takes the fields of POST /_mock/faults.

        Raises TypeError if a field is unknown, ApiError if a value is bad.
        """
        _check_names("fail", fault, [*FIELDS])
        self._fault_queue.add(check_fault(_convert(fault, InjectedFault), Faults()))

    def faults(self, unused: bool = False) -> list[dict[str, Any]]:
        """Return the faults that still wait for requests; with `unused` only those that no request has met."""
        return [msgspec.structs.asdict(fault) for fault in self._fault_queue.waiting(unused=unused)]

    def requests(self) -> list[ReceivedRequest]:
        """Return the requests since the last `reset`, in the order of their answers.

        Keeps the latest 10,000 requests, or fewer if their bodies exceed 64 MB.
        """
        return self._recorder.received()

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

    url: str
    api_key: str


def _forward_to(target: HasAddress, service: Service, environment: str) -> Forwarder:
    """Make the server forward the environment's events. Raises StartError where `serve --forward-to` does."""
    from eventstore_extras import forward, sending  # noqa: PLC0415 - they need httpx, which nothing else here does

    sending.require_httpx("forward_to")
    url = sending.target_url(target.url, "forward_to")
    key = sending.Key(target.api_key, "forward_to")
    return forward.forward(service, sending.Target(url, key, "forward_to"), environment, _FORWARD_INTERVAL_S)


@contextmanager
def _closed_at_exit(store: Store) -> Iterator[None]:
    """Close the store when the block ends, or when the process ends inside it.

    When a process ends, the `finally` below comes too late: Python has stopped the store's threads by then.
    """
    atexit.register(store.close)
    try:
        yield
    finally:
        atexit.unregister(store.close)
        store.close()


@contextmanager
def _serving_in_thread(app: ASGIApp, listener: socket.socket, service: Service) -> Iterator[None]:
    """Serve until the block ends. A request that comes before the thread is ready waits in the listening socket."""
    listener.listen(2048)
    server = uvicorn_server(app, shutdown_timeout_s=_SHUTDOWN_TIMEOUT_S)
    service.is_stopping = lambda: server.should_exit
    thread = threading.Thread(target=server.run, args=[[listener]], name="eventstore-server", daemon=True)
    thread.start()
    try:
        yield
    finally:
        server.should_exit = True
        if not sys.is_finalizing():  # Python has ended the thread by then, and from 3.13 on join() would never return
            thread.join()


@contextmanager
def running_server(
    *,
    api_keys: Mapping[str, str] | None = None,
    listener: socket.socket | None = None,
    forward_to: HasAddress | None = None,
    **settings: Any,
) -> Iterator[MockServer]:
    """Run a real server in a thread until the block ends, by default with a temporary database.

    `api_keys` maps keys to environments. `settings` are fields of `Settings`, such as `clock` or `visibility_lag_ms`.
    The server listens on a free port of this machine, or on `listener`, a bound socket, which it closes at the end.
    With `forward_to`, another MockServer or any object with a `url` and an `api_key`, it forwards the events of its
    first key's environment at once. Raises TypeError for an unknown field, and StartError where `serve` does.
    """
    _check_names("running_server", settings, ("listener", "forward_to", *Settings.__struct_fields__))
    if forward_to and not (hasattr(forward_to, "url") and hasattr(forward_to, "api_key")):
        raise TypeError(f"forward_to must be another server, or have a url and an api_key, got {forward_to!r}")
    api_keys = api_keys or {_DEFAULT_API_KEY: "development"}
    hashed = tuple(ApiKey.hashed(key, environment) for key, environment in api_keys.items())
    fault_queue = FaultQueue()
    with listener or listen("127.0.0.1", 0) as listening:
        app = create_app(Settings(**{"api_keys": hashed, "db": ":memory:"} | settings), **_additions(fault_queue))
        service: Service = app.state.service
        with _closed_at_exit(service.store):
            forwarder = _forward_to(forward_to, service, next(iter(api_keys.values()))) if forward_to else None
            recorder = _Recorder(app)
            with _serving_in_thread(recorder, listening, service):
                url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
                yield MockServer(url, api_keys, store=service.store, fault_queue=fault_queue, recorder=recorder,
                                 forwarder=forwarder)  # fmt: skip
