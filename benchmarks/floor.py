"""`python -m benchmarks.floor DB`: the floor for our server, a bare Starlette route that sends prepared bytes.

POST /setup sets those bytes, and the SQL statement to run before each answer.
"""

from __future__ import annotations

import itertools
import socket
import sys
from collections.abc import Iterator

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from eventstore import READER_PRAGMAS, connect

__all__: list[str] = []


def _floor_app(db: str) -> Starlette:
    conn = connect(db, READER_PRAGMAS)
    statement, body = "", b"{}"
    parameters: Iterator[dict[str, object]] = iter(())

    async def set_up(request: Request) -> Response:
        nonlocal statement, parameters, body
        setup = await request.json()
        statement, body = setup["statement"], setup["answer"].encode()
        parameters = itertools.cycle(setup["parameters"])
        return Response(b"{}")

    async def answer(request: Request) -> Response:
        await request.body()
        if statement:
            conn.execute(statement, next(parameters)).fetchall()
        return Response(body, media_type="application/json")

    set_up_route = Route("/setup", set_up, methods=["POST"])
    return Starlette(routes=[set_up_route, Route("/{path:path}", answer, methods=["GET", "POST"])])


def _main(db: str) -> None:
    with socket.create_server(("127.0.0.1", 0), backlog=2048) as listener:
        print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
        config = uvicorn.Config(
            _floor_app(db), http="httptools", log_level="warning", access_log=False, server_header=False
        )
        uvicorn.Server(config).run(sockets=[listener])


if __name__ == "__main__":
    _main(sys.argv[1])
