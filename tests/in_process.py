"""Send requests to an application in this process.

The tests send tens of thousands of requests. The shortest takes 0.7 ms of CPU time here, 4 ms with Starlette's
TestClient.
"""

from __future__ import annotations

import asyncio
from contextlib import ExitStack
from typing import Any, Self

import httpx
from anyio.from_thread import start_blocking_portal
from starlette.applications import Starlette


class _Transport(httpx.BaseTransport):
    """Passes requests to an application that runs in another thread's event loop."""

    def __init__(self, app: Starlette) -> None:
        self._application = httpx.ASGITransport(app, raise_app_exceptions=False, client=("testclient", 50000))
        self.loop: asyncio.AbstractEventLoop

    def handle_request(self, request: httpx.Request) -> httpx.Response:
        request.read()  # a body may be an iterator, which the event loop cannot read
        return asyncio.run_coroutine_threadsafe(self._answer(request), self.loop).result()

    async def _answer(self, request: httpx.Request) -> httpx.Response:
        answer = await self._application.handle_async_request(request)
        assert isinstance(answer.stream, httpx.AsyncByteStream)
        stream = httpx.ByteStream(b"".join([part async for part in answer.stream]))
        return httpx.Response(answer.status_code, headers=answer.headers, stream=stream)


class InProcessClient(httpx.Client):
    """A client of an application, which starts with the client's context and stops with it."""

    def __init__(self, app: Starlette, **options: Any) -> None:
        self.app = app
        self._requests = _Transport(app)
        self._running = ExitStack()
        super().__init__(transport=self._requests, base_url="http://testserver", **options)

    def __enter__(self) -> Self:
        with self._running as starting:
            portal = starting.enter_context(start_blocking_portal())
            starting.enter_context(portal.wrap_async_context_manager(self.app.router.lifespan_context(self.app)))
            self._requests.loop = portal.call(asyncio.get_running_loop)
            self._running = starting.pop_all()
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._running.close()
