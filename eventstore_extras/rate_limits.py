"""`serve --rate-limit`: limits the ingest requests of each key (API: Rate limits)."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Mapping

import msgspec
from msgspec import Struct
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventstore import ApiError, Settings, error_response, positive

__all__ = ["DOCUMENTED_RATE_LIMITS", "RateLimits", "parse_rate_limits"]

DOCUMENTED_RATE_LIMITS = {"/v1/events": 1000, "/v1/events/bulk": 100}  # path -> POST requests a minute


def parse_rate_limits(text: str) -> Mapping[str, int]:
    """Parse `documented` or `SINGLE,BULK`. Raises argparse.ArgumentTypeError."""
    if text == "documented":
        return DOCUMENTED_RATE_LIMITS
    numbers = text.split(",")
    if len(numbers) != len(DOCUMENTED_RATE_LIMITS):
        raise argparse.ArgumentTypeError(f"must be documented, or SINGLE,BULK like 1000,100; got {text!r}")
    return dict(zip(DOCUMENTED_RATE_LIMITS, map(positive(int), numbers), strict=True))


class RateLimits(Struct):
    """ASGI middleware: count each key's ingest requests by the clock's minutes, and answer 429 above the limit."""

    app: ASGIApp
    settings: Settings
    minute: int = 0
    used: Counter[tuple[bytes, str]] = msgspec.field(default_factory=Counter)  # in this minute, by key and path

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        limit = self.settings.rate_limits.get(scope.get("path", "")) if scope.get("method") == "POST" else None
        if limit is None:
            await self.app(scope, receive, send)
            return
        now_s = self.settings.clock() // 1_000_000
        if now_s // 60 != self.minute:
            self.minute = now_s // 60
            self.used.clear()
        counted = (scope["api_key"].digest, scope["path"])
        self.used[counted] += 1
        reset_s = (self.minute + 1) * 60
        numbers = {b"limit": limit, b"remaining": max(limit - self.used[counted], 0), b"reset": reset_s}
        headers = [(b"x-ratelimit-" + name, str(number).encode()) for name, number in numbers.items()]

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *headers]}
            await send(message)

        app = self.app
        if self.used[counted] > limit:
            reason = f"this key may send {limit} requests a minute to {scope['path']}; nothing was stored"
            refusal = ApiError("too_many_requests", f"{reason}, try again later", retry_after_s=reset_s - now_s)
            app = error_response(Request(scope), refusal)
        await app(scope, receive, send_with_headers)
