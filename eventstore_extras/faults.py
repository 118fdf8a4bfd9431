"""The faults of a mock: their fields and effects, their checks, the queue, and the middleware that injects them.

To add a fault, add a field to `FaultFields` and `InjectedFault`, and a row to `FIELDS`.
"""

from __future__ import annotations

import asyncio
import copy
import threading
import urllib.parse
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, TypedDict, cast

import msgspec
from msgspec import Struct
from msgspec.structs import replace
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import eventstore
from eventstore import (
    EXCEPTION_HANDLERS,
    MAX_ECHO_CHARS,
    MEMBERS,
    ApiError,
    Caller,
    Faults,
    FieldError,
    Routes,
    Row,
    Service,
    Store,
    decode,
    decode_fields,
    error_response,
    one_of,
    quoted,
    whole_within,
)
from eventstore_extras import analytics
from eventstore_extras.rate_limits import DOCUMENTED_RATE_LIMITS

__all__ = [
    "FIELDS",
    "INGEST_PATHS",
    "FaultFields",
    "FaultInjection",
    "FaultQueue",
    "InjectedFault",
    "check_fault",
    "decode_fault",
]

INGEST_PATHS = frozenset(DOCUMENTED_RATE_LIMITS)
_API_OPERATIONS = (*eventstore.OPERATIONS, *analytics.OPERATIONS)  # without the mock's own
_ERROR_CODES = {
    429: "too_many_requests",
    500: "internal_error",
    502: "bad_gateway",
    503: "service_unavailable",
    504: "gateway_timeout",
}

# ---------------------------------------------------------------------------------------------- what a fault does


class FaultFields(TypedDict, total=False):
    """The fields of a fault, for type checkers: the keywords of `MockServer.fail`."""

    method: str | None
    path: str | None
    times: int | None
    status: int | None
    retry_after_s: int | None
    delay_ms: int | None
    stored: bool | None


class InjectedFault(Struct):
    """A fault for the next `times` requests that match. Without `method` or `path` it matches any."""

    method: str | None = None
    path: str | None = None
    times: int | None = None
    status: int | None = None
    retry_after_s: int | None = None
    delay_ms: int | None = None
    stored: bool | None = None

    def needs_ingest(self) -> bool:
        """Return True if only a request that sends events can meet this fault."""
        return self.status == 202 or bool(self.stored)

    def matches(self, method: str, path: str) -> bool:
        is_ingest = method == "POST" and path in INGEST_PATHS
        return self.method in (None, method) and self.path in (None, path) and (is_ingest or not self.needs_ingest())


async def _answer_of(app: ASGIApp, request: Request) -> list[Message]:
    """Return what the application answers instead of sending it."""
    answer: list[Message] = []

    async def keep(message: Message) -> None:
        answer.append(message)

    await app(request.scope, request.receive, keep)
    return answer


async def _replace_by_error(fault: InjectedFault, request: Request, answer: list[Message]) -> list[Message]:
    """Replace the answer by the error of `status`, unless the server has refused the request itself."""
    is_refused = bool(answer) and answer[0]["status"] >= 400
    code = _ERROR_CODES.get(fault.status or 0)
    if code is None or is_refused:
        return answer
    error = ApiError(code, "injected fault", None, fault.retry_after_s)
    return await _answer_of(error_response(request, error), request)


async def _delay(fault: InjectedFault, request: Request, answer: list[Message]) -> list[Message]:
    """Delay the answer by `delay_ms`, or until the client goes away or the server stops."""
    with suppress(TimeoutError, asyncio.CancelledError):
        async with asyncio.timeout((fault.delay_ms or 0) / 1000):
            await Caller(request.scope, request.receive).until_gone()
    return answer


def _check_path(path: str) -> str:
    """Return the decoded path, as requests have it. Raises FieldError if it cannot be the path of one request."""
    if "?" in path or "{" in path:
        problem = f"must be one path, no query string, an id in place of {{id}}, got {quoted(path)}"
        raise FieldError("invalid_format", problem)
    return urllib.parse.unquote(path)


def _check_status(status: int) -> int:
    return int(one_of("202", *map(str, _ERROR_CODES))(str(status)))


class _Field(NamedTuple):
    """One field of a fault: the check of its value, its JSON schema, and what it does to a request.

    The effect is called if the field is set. It takes the answer so far and returns the answer to send.
    """

    check: Callable[[Any], Any]
    schema: Mapping[str, Any] | None = None  # None: derived from the type alone
    effect: Callable[[InjectedFault, Request, list[Message]], Awaitable[list[Message]]] | None = None


def _integer(least: int, most: int) -> _Field:
    return _Field(whole_within(least, most), {"type": ["integer", "null"], "minimum": least, "maximum": most})


# One row for each field of InjectedFault. Effects take place in this order.
FIELDS = {
    "method": _Field(str.upper),
    "path": _Field(_check_path),
    "times": _integer(1, 1_000_000),
    "status": _Field(_check_status, {"enum": [202, *_ERROR_CODES, None]}, _replace_by_error),
    "retry_after_s": _integer(0, 86_400),
    "delay_ms": _integer(0, 600_000)._replace(effect=_delay),
    "stored": _Field(bool),
}


# ---------------------------------------------------------------------------------------------- checking a fault


def _check_fields_together(sent: InjectedFault, errors: Faults) -> None:
    if sent.status is None and sent.delay_ms is None:
        errors.add("status", "required", "or delay_ms is required: a fault needs an effect")
    if sent.status in (None, 202) and sent.retry_after_s is not None:
        errors.add("retry_after_s", "invalid_format", "goes with an error status only")
    if sent.status == 202 and sent.stored:
        errors.add("stored", "invalid_format", "must be false with status 202, which accepts an event and loses it")
    if sent.status is None and sent.stored is False:
        errors.add("stored", "invalid_format", "must not be false without a status: 202 accepts an event and loses it")


def _check_that_a_request_can_match(fault: InjectedFault, errors: Faults) -> None:
    candidates = [operation for operation in _API_OPERATIONS if operation.path.startswith("/v1/")]
    on_path = [operation for operation in candidates if fault.path is None or operation.serves(fault.path)]
    methods = {operation.method for operation in on_path}
    methods |= {"HEAD"} if "GET" in methods else set()
    if not on_path:
        paths = ", ".join(sorted({operation.public_path for operation in candidates}))
        errors.add("path", "invalid_format", f"must be a path of this API ({paths}), got {quoted(fault.path or '')}")
    elif fault.method and fault.method not in methods:
        allowed = ", ".join(sorted(methods))
        problem = f"must be one that this path takes ({allowed}), got {quoted(fault.method)}"
        errors.add("method", "invalid_format", problem)
    elif fault.needs_ingest() and not any(fault.matches("POST", path) for path in INGEST_PATHS):
        name, value = ("stored", "true") if fault.stored else ("status", "202")
        ingest = " and ".join(f"POST {path}" for path in sorted(INGEST_PATHS))
        errors.add(name, "invalid_format", f"is {value}, which goes with {ingest} only")


def check_fault(sent: InjectedFault, errors: Faults) -> InjectedFault:
    """Return the fault with its defaults. Raises ApiError naming every wrong field."""
    values = {name: errors.check(name, field.check, getattr(sent, name)) for name, field in FIELDS.items()}
    fault = InjectedFault(**values | {"times": values["times"] or 1})
    _check_fields_together(sent, errors)
    _check_that_a_request_can_match(fault, errors)
    errors.raise_any()
    return fault


_INJECTED_FAULT = msgspec.json.Decoder(InjectedFault)


def decode_fault(body: bytes) -> InjectedFault:
    """Decode and check the body of POST /_mock/faults. Raises ApiError with every fault."""
    errors = Faults()
    for name in decode(MEMBERS, body) or {}:
        if name not in FIELDS:
            problem = f"is not a field of a fault: the fields are {', '.join(FIELDS)}"
            errors.add(name[:MAX_ECHO_CHARS], "invalid_format", problem)
    return check_fault(decode_fields(_INJECTED_FAULT, body, errors), errors)


# ---------------------------------------------------------------------------------------------- injecting faults


class _Waiting(NamedTuple):
    """A fault in the queue."""

    fault: InjectedFault
    environment: str | None  # None: all environments
    is_unused: bool = True

    def is_in(self, environment: str | None) -> bool:
        """Return True if the fault is for this environment; None stands for all environments."""
        return None in (environment, self.environment) or environment == self.environment


class FaultQueue:
    """The faults that wait for requests, in the order in which they were added."""

    def __init__(self) -> None:
        self._waiting: list[_Waiting] = []
        self._lock = threading.Lock()  # tests add faults from another thread than the server's

    def add(self, fault: InjectedFault, environment: str | None = None) -> None:
        with self._lock:
            self._waiting.append(_Waiting(fault, environment))

    def take(self, environment: str, method: str, path: str) -> InjectedFault | None:
        """Return the first fault that matches the request and count it as used once."""
        with self._lock:
            for index, waiting in enumerate(self._waiting):
                fault = waiting.fault
                if waiting.is_in(environment) and fault.matches(method, path):
                    times_left = (fault.times or 1) - 1
                    rest = waiting._replace(fault=replace(fault, times=times_left), is_unused=False)
                    self._waiting[index : index + 1] = [rest] if times_left else []
                    return fault
        return None

    def waiting(self, environment: str | None = None, unused: bool = False) -> list[InjectedFault]:
        """Return the faults of one environment, or of all (None); with `unused` only those that no request has met."""
        with self._lock:
            found = [waiting for waiting in self._waiting if waiting.is_in(environment)]
        return [waiting.fault for waiting in found if waiting.is_unused or not unused]

    def clear(self, environment: str | None = None) -> int:
        """Remove the faults of one environment, or of all (None). Returns how many there were."""
        with self._lock:
            kept = [waiting for waiting in self._waiting if not waiting.is_in(environment)]
            cleared = len(self._waiting) - len(kept)
            self._waiting = kept
        return cleared


class _LosingStore:
    """A store that accepts events and forgets them."""

    def __init__(self, environments: Mapping[str, int]) -> None:
        self.environments = environments

    async def insert(self, rows: Sequence[Row]) -> int:
        return len(rows)


def _losing_ingest(service: Service) -> ASGIApp:
    """Return the ingest routes on a store that loses the events. They check events and answer as usual."""
    losing = copy.copy(service)
    losing.store = cast(Store, _LosingStore(service.store.environments))
    ingest = [each for each in _API_OPERATIONS if each.method == "POST" and each.path in INGEST_PATHS]
    return Starlette(routes=[Routes(losing, ingest)], exception_handlers=EXCEPTION_HANDLERS)


async def _discard_body(_: Scope, receive: Receive, __: Send) -> None:
    """Read the body to its end, so that the recorder of requests has all of it, and answer nothing."""
    while (await receive()).get("more_body"):
        pass


class FaultInjection:
    """ASGI middleware: answers a request as the next fault says, or passes it on if no fault matches."""

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
        scope["fault"] = fault  # for the recorder of requests
        request = Request(scope, receive)
        answer = await _answer_of(self._app_meeting(fault, scope), request)
        for name, field in FIELDS.items():
            if field.effect and getattr(fault, name):
                answer = await field.effect(fault, request, answer)
        for message in answer:
            await send(message)

    def _app_meeting(self, fault: InjectedFault, scope: Scope) -> ASGIApp:
        """Return the application that handles the request before the effects of the fault change its answer."""
        if fault.status == 202:
            return _losing_ingest(scope["app"].state.service)
        return self._app if fault.status is None or fault.stored else _discard_body
