"""Embed the service in a program that adds an operation and middleware."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
from starlette.applications import Starlette
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Mount
from starlette.testclient import TestClient
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import eventstore
from eventstore import Settings, create_app
from helpers import KEYS, STAGING_KEY, event, refused, store, table


class Name(msgspec.Struct):
    name: str


class Greeting(msgspec.Struct):
    text: str


async def greet(service: eventstore.Service, request: Request) -> Response:
    """Answer POST /v1/hello with a greeting."""
    name = json.loads(await eventstore.read_body(service, request))["name"]
    return eventstore.JsonResponse(Greeting(f"hello {name} of {request['environment']}"))


class Stamp:
    """Middleware that names the environment of the request in a header of the answer."""

    def __init__(self, app: ASGIApp, name: str) -> None:
        self.app, self.name = app, name

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def stamped(message: Message) -> None:
            if message["type"] == "http.response.start":
                stamp = (self.name.encode(), scope.get("environment", "none").encode())
                message["headers"] = [*message["headers"], stamp]
            await send(message)

        await self.app(scope, receive, stamped)


@pytest.mark.slow
def test_added_operations_and_middleware_are_served_and_described_like_the_built_in_ones(tmp_path: Path) -> None:
    from openapi_spec_validator import validate

    hello = eventstore.Operation("POST", "/v1/hello", greet, Greeting, Name, example={"name": "you"},
                                 schemas={"Name": {"name": {"type": "string", "maxLength": 9}}})  # fmt: skip
    settings = Settings(db=str(tmp_path / "events.db"), api_keys=KEYS)
    app = create_app(settings, operations=[hello], middleware=[Middleware(Stamp, name="x-stamp")])
    with TestClient(app, headers={"x-api-key": STAGING_KEY}) as client:
        refused(client.post("/v1/hello", json={"name": "a"}, headers={"x-api-key": "unknown"}), 401, "unauthorized")
        answer = client.post("/v1/hello", json={"name": "a"})
        assert (answer.status_code, answer.json()) == (200, {"text": "hello a of staging"})
        assert answer.headers["x-stamp"] == store(client, event()).headers["x-stamp"] == "staging"
        refused(client.get("/v1/hello"), 405, "method_not_allowed", "allowed: POST")
        refused(client.get("/v1/nowhere"), 404, "not_found", "/v1/hello")
        refused(client.post("/hello"), 404, "not_found", 'did you mean "/v1/hello"?')
        answer = client.post("/v1/hello/?nam=a", json={"name": "a"}, headers={"x-request-id": "mine"})
        assert (answer.status_code, answer.json()["text"]) == (200, "hello a of staging")
        assert (answer.headers["x-request-id"], answer.headers["x-ignored"]) == ("mine", "nam")
        assert (
            answer.headers["access-control-allow-origin"] == client.options("/x").headers["access-control-allow-origin"]
        )
        validate(document := client.get("/openapi.json").json())
    described = document["paths"]["/v1/hello"]["post"]
    assert described["security"] == [{"ApiKey": []}]
    assert described["requestBody"]["content"]["application/json"]["example"] == {"name": "you"}
    schemas = document["components"]["schemas"]
    assert (schemas["Name"]["required"], schemas["Name"]["properties"]["name"]["maxLength"]) == (["name"], 9)
    assert schemas["Greeting"]["properties"] == {"text": {"type": "string"}}


@pytest.mark.parametrize(
    ("method", "path", "status", "part"),
    [
        ("GET", "events", 200, ""),
        ("HEAD", "events", 200, ""),
        ("PUT", "events", 405, "allowed: GET, HEAD, POST"),
        ("DELETE", "events/x", 405, "allowed: GET, HEAD"),
        ("POST", "events/x", 404, 'no route "/v1/events/x"'),
        ("GET", "nowhere", 404, 'no route "/v1/nowhere"'),
    ],
)
def test_a_mounted_application_finds_its_routes(tmp_path: Path, method: str, path: str, status: int, part: str) -> None:
    app = create_app(Settings(db=str(tmp_path / "events.db"), api_keys=KEYS))
    client = TestClient(Starlette(routes=[Mount("/below", app)]), headers={"x-api-key": STAGING_KEY})
    try:
        answer = client.request(method, f"/below/v1/{path}")
    finally:
        app.state.service.store.close()
    assert (answer.status_code, part in answer.text.replace("\\", "")) == (status, True)
    if status == 405:
        assert part == f"allowed: {answer.headers['allow']}"


def _send_a_batch(client: TestClient) -> None:
    store(client, event("a"), event("b"))


def _send_a_large_event(client: TestClient) -> None:
    client.post("/v1/events", json=event("a", properties={"text": "x" * eventstore._LARGE_EVENT_BYTES}))


def _query(client: TestClient) -> None:
    client.get("/v1/slow")


@table("request_", [_send_a_batch, _send_a_large_event, _query])
def test_threads_switch_more_often_during_work_that_takes_long_and_as_before_afterwards(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request_: Callable[[TestClient], None]
) -> None:
    during = []

    async def run_query(service: eventstore.Service, request: Request) -> Response:
        during.append(await service.store.read(lambda conn: sys.getswitchinterval(), quick=False))
        return Response()

    def see_rows(*arguments: Any, **options: Any) -> list[eventstore.Row]:
        during.append(sys.getswitchinterval())
        return event_rows(*arguments, **options)

    event_rows = eventstore.event_rows
    monkeypatch.setattr(eventstore, "event_rows", see_rows)
    before = sys.getswitchinterval()
    operation = eventstore.Operation("GET", "/v1/slow", run_query, None)
    with TestClient(create_app(Settings(db=str(tmp_path / "e.db"), api_keys=KEYS), operations=[operation])) as client:
        client.headers["x-api-key"] = STAGING_KEY
        request_(client)
    assert during[0] < before
    assert sys.getswitchinterval() == before
