"""A FlexPrice for tests: `running_server()`, and faults that are asked for, by `serve --mock` too."""

from __future__ import annotations

import asyncio
import atexit
import copy
import json
import math
import socket
import sys
import threading
import time
import urllib.parse
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import eventstore
from eventstore import (
    EARLIEST,
    ENCODER,
    EVENT_FILTERS,
    EXCEPTION_HANDLERS,
    IN_ENVIRONMENT,
    LATEST,
    MAX_ECHO_CHARS,
    MEMBERS,
    WRITE_LOCK_TIMEOUT_S,
    ApiError,
    ApiKey,
    EventQueryIn,
    Faults,
    FieldError,
    JsonResponse,
    Operation,
    Reader,
    Row,
    Service,
    Settings,
    Store,
    T,
    View,
    connect,
    connect_reader,
    create_app,
    decode,
    decode_fields,
    error_response,
    event_query,
    execute_writing,
    list_events,
    listen,
    one_of,
    parse_cursor,
    plural,
    quoted,
    read_body,
    uvicorn_server,
    whole_within,
)
from eventstore_extras import analytics
from eventstore_extras.meters import all_meters
from eventstore_extras.rate_limits import DOCUMENTED_RATE_LIMITS

if TYPE_CHECKING:
    from eventstore_extras.forward import Forwarder

INGEST_PATHS = frozenset(DOCUMENTED_RATE_LIMITS)
# What a mock answers on request: each status with one of its codes.
FAULT_CODES = {429: "too_many_requests", 500: "internal_error", 502: "bad_gateway", 503: "service_unavailable",
               504: "gateway_timeout"}  # fmt: skip
MAX_RECEIVED, MAX_RECEIVED_BYTES = 10_000, 64 * 1024 * 1024
MAX_FAULT_TIMES, MAX_DELAY_MS, MAX_RETRY_AFTER_S = 1_000_000, 600_000, 86_400


class InjectedFault(Struct):
    """What a mock does wrong on request, for the next `times` requests that match. None: any, or as ever."""

    method: str | None = None
    path: str | None = None
    times: int | None = None
    status: int | None = None
    retry_after_s: int | None = None
    delay_ms: int | None = None
    stored: bool | None = None


class InjectedFaults(Struct):
    faults: list[InjectedFault]


class Deleted(Struct):
    deleted: int


INJECTED_FAULT = msgspec.json.Decoder(InjectedFault)
FAULT_SCHEMA: dict[str, Any] = {
    "times": {"type": ["integer", "null"], "minimum": 1, "maximum": MAX_FAULT_TIMES},
    "status": {"enum": [202, *FAULT_CODES, None]},
    "retry_after_s": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_RETRY_AFTER_S},
    "delay_ms": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_DELAY_MS},
}


OPERATIONS = (*eventstore.own_operations(), *analytics.OPERATIONS)  # of the API, to which the mock's own are added
MOCK_API_KEY = "eventstore-test-key"
MOCK_SHUTDOWN_TIMEOUT_S = 1
MOCK_FORWARD_INTERVAL_S = 0.01


def is_for(fault: InjectedFault, method: str, path: str) -> bool:
    ingest = method == "POST" and path in INGEST_PATHS
    return fault.method in (None, method) and fault.path in (None, path) and (ingest or not needs_ingest(fault))


def needs_ingest(fault: InjectedFault) -> bool:
    """Whether only ingest can be answered so: accepted and lost, or stored and answered with an error."""
    return fault.status == 202 or bool(fault.stored)


def check_fault(sent: InjectedFault, faults: Faults) -> InjectedFault:
    """The fault with its defaults. ApiError names what is wrong with it, and a fault that no request can match."""
    status_of = one_of("202", *map(str, FAULT_CODES))
    checked = InjectedFault(
        method=sent.method.upper() if sent.method else None,
        path=faults.check("path", check_fault_path, sent.path),
        times=faults.check("times", whole_within(1, MAX_FAULT_TIMES), sent.times) or 1,
        status=faults.check("status", lambda status: int(status_of(str(status))), sent.status),
        retry_after_s=faults.check("retry_after_s", whole_within(0, MAX_RETRY_AFTER_S), sent.retry_after_s),
        delay_ms=faults.check("delay_ms", whole_within(0, MAX_DELAY_MS), sent.delay_ms),
        stored=sent.stored,
    )
    if sent.status is None and sent.delay_ms is None:
        faults.add("status", "required", "or delay_ms is required: what is to go wrong")
    if sent.status in (None, 202) and sent.retry_after_s is not None:
        faults.add("retry_after_s", "invalid_format", "goes with an error status only")
    if sent.stored and checked.status == 202:
        faults.add("stored", "invalid_format", "must be false with status 202: stored and accepted is no fault")
    if sent.stored is False and sent.status is None:
        faults.add("stored", "invalid_format", "must not be false without a status: 202 accepts an event and loses it")
    check_that_some_request_matches(checked, faults)
    faults.raise_any()
    return checked


def check_fault_path(path: str) -> str:
    """A path as requests are compared with it: decoded, without a query string."""
    if "?" in path or "{" in path:
        problem = f"must be one path, no query string, an id in place of {{id}}, got {quoted(path)}"
        raise FieldError("invalid_format", problem)
    return urllib.parse.unquote(path)


def check_that_some_request_matches(fault: InjectedFault, faults: Faults) -> None:
    served_here = [operation for operation in OPERATIONS if operation.path.startswith("/v1/")]
    there = [operation for operation in served_here if fault.path is None or operation.serves(fault.path)]
    methods = {operation.method for operation in there}
    methods |= {"HEAD"} if "GET" in methods else set()
    if not there:
        served = ", ".join(sorted({operation.public_path for operation in served_here}))
        faults.add("path", "invalid_format", f"must be a path of this API ({served}), got {quoted(fault.path or '')}")
    elif fault.method and fault.method not in methods:
        allowed = ", ".join(sorted(methods))
        problem = f"must be one that this path takes ({allowed}), got {quoted(fault.method)}"
        faults.add("method", "invalid_format", problem)
    elif needs_ingest(fault) and not any(is_for(fault, "POST", path) for path in INGEST_PATHS):
        name, value = ("stored", "true") if fault.stored else ("status", "202")
        ingest = " and ".join(f"POST {path}" for path in sorted(INGEST_PATHS))
        faults.add(name, "invalid_format", f"is {value}, which goes with {ingest} only")


class _Waiting(NamedTuple):
    fault: InjectedFault
    environment: str | None  # None: any
    is_unused: bool = True

    def concerns(self, environment: str | None) -> bool:
        return None in (environment, self.environment) or environment == self.environment


class FaultQueue:
    """The faults that wait for their requests, first come first served, of one environment or of all (None)."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()  # tests add from another thread than the server's

    def add(self, fault: InjectedFault, environment: str | None = None) -> None:
        with self._lock:
            self._waiting.append(_Waiting(fault, environment))

    def take(self, environment: str, method: str, path: str) -> InjectedFault | None:
        """The first fault for such a request; it is used up once."""
        with self._lock:
            for place, waiting in enumerate(self._waiting):
                fault = waiting.fault
                if waiting.concerns(environment) and is_for(fault, method, path):
                    left = (fault.times or 1) - 1
                    rest = waiting._replace(fault=replace(fault, times=left), is_unused=False)
                    self._waiting[place : place + 1] = [rest] if left else []
                    return fault
        return None

    def waiting(self, environment: str | None = None, unused: bool = False) -> list[InjectedFault]:
        """What waits for requests of this environment; None: of any. On request, only what none has met yet."""
        with self._lock:
            found = [waiting for waiting in self._waiting if waiting.concerns(environment)]
        return [waiting.fault for waiting in found if waiting.is_unused or not unused]

    def clear(self, environment: str | None = None) -> int:
        """Forget what waits for requests of this environment; None: of any. Returns how many."""
        with self._lock:
            kept = [waiting for waiting in self._waiting if not waiting.concerns(environment)]
            cleared = len(self._waiting) - len(kept)
            self._waiting = kept
        return cleared


class FaultInjection:
    """ASGI middleware of a mock: answers as the next fault says, and as ever when none waits."""

    def __init__(self, app: ASGIApp, queue: FaultQueue) -> None:
        self._app = app
        self._queue = queue

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        fault = None
        if "environment" in scope and scope["path"].startswith("/v1/"):
            fault = self._queue.take(scope["environment"], scope["method"], scope["path"])
        if fault is None:
            await self._app(scope, receive, send)
            return
        scope["fault"] = fault  # for Recorder
        answer: list[Message] = []

        async def keep(message: Message) -> None:
            answer.append(message)

        if fault.status == 202:
            await losing_ingest(scope["app"].state.service)(scope, receive, keep)
        elif fault.status is None or fault.stored:
            await self._app(scope, receive, keep)
        else:
            while (await receive()).get("more_body"):  # whoever records requests has all of it
                pass
        is_error = fault.status not in (None, 202)
        is_refused = bool(answer) and answer[0]["status"] >= 400  # a fault does not make a bad request good
        if is_error and not is_refused:
            answer.clear()
            error = ApiError(FAULT_CODES[fault.status or 500], "a fault that was asked for", None, fault.retry_after_s)
            await error_response(Request(scope), error)(scope, receive, keep)
        await self._hold_back(receive, fault.delay_ms or 0)
        for message in answer:
            await send(message)

    @staticmethod
    async def _hold_back(receive: Receive, delay_ms: int) -> None:
        """Wait, unless the client goes away or the server stops: neither is to be held up."""
        with suppress(TimeoutError, asyncio.CancelledError):
            async with asyncio.timeout(delay_ms / 1000):
                while delay_ms and (await receive())["type"] != "http.disconnect":
                    pass


class LosingStore:
    """Takes events as a store does, and forgets them."""

    def __init__(self, environments: Mapping[str, int]) -> None:
        self.environments = environments

    async def insert(self, rows: Sequence[Row]) -> int:
        return len(rows)


def losing_ingest(service: Service) -> ASGIApp:
    """The ingest routes, which answer as ever, refusals too, and store nothing."""
    losing = copy.copy(service)
    losing.store = cast(Store, LosingStore(service.store.environments))
    ingest = [operation for operation in OPERATIONS if operation.method == "POST" and operation.path in INGEST_PATHS]
    routes = [operation.route(losing) for operation in ingest]
    return Starlette(routes=routes, exception_handlers=EXCEPTION_HANDLERS)


def delete_rows(store: Store, tables: Iterable[str], environment: str | None = None) -> int:
    """Delete what one environment has, or all; returns how many rows. For any thread but an event loop's."""
    of_one = "" if environment is None else f" WHERE {IN_ENVIRONMENT}"
    deleted = 0
    with closing(connect(store.path, store.writer_pragmas)) as conn:
        for table in tables:
            statement = f"DELETE FROM {table}{of_one}"
            deleted += execute_writing(conn, WRITE_LOCK_TIMEOUT_S, statement, {"environment": environment}).rowcount
    return deleted


class Mock:
    """The routes under /_mock, and the faults that they know."""

    def __init__(self) -> None:
        self.fault_queue = FaultQueue()

    async def reset_events(self, service: Service, request: Request) -> Response:
        """DELETE /_mock/events: forgets the events of the key's environment."""
        return await self._reset(service, request, ["events"])

    async def reset_meters(self, service: Service, request: Request) -> Response:
        """DELETE /_mock/meters: forgets the meters and features of the key's environment."""
        return await self._reset(service, request, ["features", "meters"])

    async def _reset(self, service: Service, request: Request, tables: list[str]) -> Response:
        return JsonResponse(
            Deleted(await asyncio.to_thread(delete_rows, service.store, tables, request["environment"]))
        )

    async def inject_fault(self, service: Service, request: Request) -> Response:
        """POST /_mock/faults: what shall go wrong with the next requests of the key's environment."""
        faults = Faults()
        body = await read_body(service, request)
        for name in decode(MEMBERS, body) or {}:
            if name not in InjectedFault.__struct_fields__:
                known = ", ".join(InjectedFault.__struct_fields__)
                faults.add(name[:MAX_ECHO_CHARS], "invalid_format", f"is no field of a fault: it has {known}")
        fault = check_fault(decode_fields(INJECTED_FAULT, body, faults), faults)
        self.fault_queue.add(fault, request["environment"])
        return await self.list_faults(service, request)

    async def list_faults(self, service: Service, request: Request) -> Response:
        """GET /_mock/faults: the faults that still wait for their requests."""
        return JsonResponse(InjectedFaults(self.fault_queue.waiting(request["environment"])))

    async def clear_faults(self, service: Service, request: Request) -> Response:
        """DELETE /_mock/faults: from here on everything works."""
        return JsonResponse(Deleted(self.fault_queue.clear(request["environment"])))

    @property
    def additions(self) -> dict[str, Any]:
        """What create_app takes to serve them."""
        example = {"method": "POST", "path": "/v1/events/bulk", "times": 2, "status": 429, "retry_after_s": 1}
        operations = (
            Operation("DELETE", "/_mock/events", self.reset_events, Deleted),
            Operation("DELETE", "/_mock/meters", self.reset_meters, Deleted),
            Operation("POST", "/_mock/faults", self.inject_fault, InjectedFaults, InjectedFault,
                      example=example, schemas={"InjectedFault": FAULT_SCHEMA}),
            Operation("GET", "/_mock/faults", self.list_faults, InjectedFaults),
            Operation("DELETE", "/_mock/faults", self.clear_faults, Deleted),
        )  # fmt: skip
        return {
            "operations": [*analytics.OPERATIONS, *operations],
            "middleware": [Middleware(FaultInjection, queue=self.fault_queue)],
        }


def additions() -> dict[str, Any]:
    """What create_app takes to be a mock: `serve --mock`."""
    return Mock().additions


def attach(service: Service, _arguments: object, _address: object) -> None:
    """What `serve --mock` says in its banner."""
    service.notices.append("mock         /_mock/events, /_mock/meters and /_mock/faults are open")


class ReceivedRequest(Struct, frozen=True):
    """A request as it came to a mock, and what became of it."""

    method: str
    path: str  # decoded, without the query string
    query: str
    headers: dict[str, str]  # names in lower case, without the key
    body: bytes  # as far as the server has read it
    status: int | None  # None: it was not answered, or not yet
    fault: dict[str, Any] | None  # the one that it met

    @property
    def json(self) -> Any:
        """The body as JSON. ValueError if it is none."""
        return json.loads(self.body)


class Recorder:
    """ASGI middleware around everything: what came, whatever its key, the latest of it."""

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
                self._add(scope, bytes(body), status)  # before the client has its answer, and looks
            await send(message)

        try:
            await self._app(scope, receive_and_keep, send_and_keep)
        finally:
            if status is None:
                self._add(scope, bytes(body), None)

    def _add(self, scope: Scope, body: bytes, status: int | None) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        headers.pop("x-api-key", None)
        fault = msgspec.structs.asdict(scope["fault"]) if "fault" in scope else None
        query = scope["query_string"].decode("latin-1")
        with self._lock:
            self._received.append(ReceivedRequest(scope["method"], scope["path"], query, headers, body, status, fault))
            self._bytes += len(body)
            while len(self._received) > MAX_RECEIVED or self._bytes > MAX_RECEIVED_BYTES:
                self._bytes -= len(self._received.popleft().body)

    def received(self) -> list[ReceivedRequest]:
        with self._lock:
            return list(self._received)

    def clear(self) -> None:
        with self._lock:
            self._received.clear()
            self._bytes = 0


class MockServer:
    """A server for tests, as `running_server` and the pytest fixture `flexprice` give it."""

    def __init__(
        self,
        store: Store,
        mock: Mock,
        recorder: Recorder,
        url: str,
        api_keys: Mapping[str, str],
        *,
        forwarder: Forwarder | None = None,
    ) -> None:
        self.url = url  # ends in /v1
        self.api_keys = dict(api_keys)  # key -> environment
        self.api_key = next(iter(api_keys))
        self._store = store
        self._fault_queue = mock.fault_queue
        self._recorder = recorder
        self._forwarder = forwarder

    def events(self, environment: str | None = None, **filters: Any) -> list[dict[str, Any]]:
        """Everything stored, oldest first, seen by queries or not yet: dicts as GET /v1/events has them.

        `filters` are those of POST /v1/events/query (API: Queries): external_customer_id, event_name, event_id, source,
        property_filters, start_time, end_time; of all times by default. TypeError for another one, ApiError for a bad
        value. `environment` defaults to that of `api_key`.
        """
        if unknown := filters.keys() - EVENT_FILTERS:
            raise TypeError(f"events() has no filter {', '.join(sorted(unknown))}: it takes {', '.join(EVENT_FILTERS)}")
        sent = _convert({"start_time": EARLIEST, "end_time": LATEST, "order": "asc"} | filters, EventQueryIn)
        view = View(environment or self.api_keys[self.api_key], 0)
        query = event_query(sent, view, 1000, Faults())
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
        """All meters, oldest first, those that came with a feature too: dicts as GET /v1/meters has them."""
        with closing(connect_reader(self._store.path)) as conn:
            found = all_meters(conn, environment or self.api_keys[self.api_key])
        return [msgspec.to_builtins(stored.meter) for stored in found]

    def reset(self) -> None:
        """Forget all events, meters, features, faults and requests."""
        self._fault_queue.clear()
        self._recorder.clear()
        delete_rows(self._store, ["events", "features", "meters"])

    def fail(self, **fault: Any) -> None:
        """Let the next requests that match fail, whatever their key: the fields of POST /_mock/faults.

        TypeError for an unknown field, ApiError for a bad value.
        """
        check_names("fail", fault, InjectedFault.__struct_fields__)
        self._fault_queue.add(check_fault(_convert(fault, InjectedFault), Faults()))

    def requests(self) -> list[ReceivedRequest]:
        """What came since the last `reset`, in the order in which it was answered; of very many the latest:
        10,000, with 64 MB of bodies."""
        return self._recorder.received()

    def wait_until_forwarded(self, timeout_s: float = 30.0) -> None:
        """Until the server of `forward_to` has accepted or refused all events. TimeoutError."""
        deadline_s = time.monotonic() + timeout_s
        while self._forwarder and (behind := self._forwarder.behind_now()):
            if time.monotonic() > deadline_s:
                waiting = f"{plural(behind, 'event')} not forwarded to {self._forwarder.host} yet"
                raise TimeoutError(f"after {timeout_s:g} s: {waiting}")
            time.sleep(0.005)

    def faults(self, unused: bool = False) -> list[dict[str, Any]]:
        """The faults that still wait for requests; on request, only those that none has met yet."""
        return [msgspec.structs.asdict(fault) for fault in self._fault_queue.waiting(unused=unused)]


def check_names(function: str, given: Iterable[str], known: Sequence[str]) -> None:
    """TypeError that lists what there is."""
    if unknown := {*given} - {*known}:
        raise TypeError(f"{function}() does not take {', '.join(sorted(unknown))}; it takes {', '.join(known)}")


def _convert(arguments: Mapping[str, Any], kind: type[T]) -> T:
    """Python's values as the type that they have on the wire. ApiError for one that has another."""
    try:
        return msgspec.convert(msgspec.to_builtins(arguments), kind)
    except msgspec.ValidationError as error:
        raise ApiError("validation_error", str(error)) from None


class HasAddress(Protocol):
    """An API that events are sent to: its base URL, and a key for it."""

    url: str
    api_key: str


@contextmanager
def running_server(
    *,
    api_keys: Mapping[str, str] | None = None,
    listener: socket.socket | None = None,
    forward_to: HasAddress | None = None,
    **settings: Any,
) -> Iterator[MockServer]:
    """A real server in a thread, with a temporary database, until the block ends.

    `api_keys` maps keys to environments; `settings` are fields of `Settings`, such as `clock` or `visibility_lag_ms`.
    It takes a free port of this machine, or that of `listener`, a bound socket, which it closes in the end. With
    `forward_to`, another MockServer or whatever has a `url` and an `api_key`, it sends the events of its first key's
    environment on, at once; StartError as of `serve --forward-to`. TypeError for an unknown field.
    """
    check_names("running_server", settings, ("listener", "forward_to", *Settings.__struct_fields__))
    if forward_to and not (hasattr(forward_to, "url") and hasattr(forward_to, "api_key")):
        raise TypeError(f"forward_to must be another server, or have a url and an api_key, got {forward_to!r}")
    api_keys = api_keys or {MOCK_API_KEY: "development"}
    hashed = tuple(ApiKey.hashed(key, environment) for key, environment in api_keys.items())
    mock = Mock()
    with listener or listen("127.0.0.1", 0) as listening:
        listening.listen(2048)
        app = create_app(Settings(**{"api_keys": hashed, "db": ":memory:"} | settings), **mock.additions)
        forwarder = forwarding(app.state.service, forward_to, next(iter(api_keys.values()))) if forward_to else None
        recorder = Recorder(app)
        server = uvicorn_server(recorder, shutdown_timeout_s=MOCK_SHUTDOWN_TIMEOUT_S)
        thread = threading.Thread(target=server.run, args=[[listening]], name="eventstore-server", daemon=True)
        thread.start()
        close_store = app.state.service.store.close
        atexit.register(close_store)  # for who never leaves the block: later than this its threads have been ended
        try:  # the socket listens already: a request that comes before the thread is ready waits for it
            url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
            yield MockServer(app.state.service.store, mock, recorder, url, api_keys, forwarder=forwarder)
        finally:
            atexit.unregister(close_store)
            server.should_exit = True
            if not sys.is_finalizing():  # since Python 3.13 a thread that was ended then is waited for without end
                thread.join()
            close_store()


def forwarding(service: Service, to: HasAddress, environment: str) -> Forwarder:
    from eventstore_extras import forward  # noqa: PLC0415 - it needs httpx, which nothing else here does

    forward.need_httpx("forward_to")
    url = forward.target_url(to.url, "forward_to")
    target = forward.Target(url, to.api_key, "forward_to", "forward_to")
    return forward.forward(service, target, environment, MOCK_FORWARD_INTERVAL_S)
