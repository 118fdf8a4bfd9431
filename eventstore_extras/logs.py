"""The log of `serve`: its formats, the request that each line belongs to, and a limit on lines that repeat."""

from __future__ import annotations

import json
import logging
import time
from argparse import Namespace
from datetime import UTC, datetime
from typing import Any

from eventstore import CALLER

__all__ = ["set_up"]

_PERIOD_S = 60.0
_MOST_EQUAL, _MOST_SIMILAR = 100, 1000  # lines with the same text, and with the same template, in each period


def _is_summary(record: logging.LogRecord) -> bool:
    return getattr(record, "is_summary", False)


def _request_fields(record: logging.LogRecord) -> dict[str, Any]:
    """Return the known facts about the request that the line belongs to; an empty dict outside a request."""
    scope = CALLER.get().scope
    if not scope or _is_summary(record):
        return {}
    key = scope.get("api_key")
    route = getattr(scope.get("endpoint"), "path", None)
    fields = {
        "request_id": scope.get("request_id"),
        "client": (scope.get("client") or [None])[0],
        "key": key and key.label,
        "environment": scope.get("environment"),
        "route": route and f"{scope['method']} {route}",
        "status": scope.get("status"),
    }
    if "start_s" in scope:  # not in a request that is not valid HTTP
        fields["duration_ms"] = round(1000 * (time.perf_counter() - scope["start_s"]), 1)
    return {name: value for name, value in fields.items() if value not in (None, "")}


def _as_word(value: object) -> str:
    text = str(value)
    return text if text.isprintable() and not set(' "=]') & set(text) else json.dumps(text)


class _TextFormatter(logging.Formatter):
    def __init__(self) -> None:
        super().__init__("%(asctime)s %(levelname)s %(name)s: %(message)s%(request)s")

    def format(self, record: logging.LogRecord) -> str:
        fields = " ".join(f"{name}={_as_word(value)}" for name, value in _request_fields(record).items())
        record.request = f" [{fields}]" if fields else ""
        return super().format(record)


class _JsonFormatter(logging.Formatter):
    """One JSON object a line, in ASCII."""

    def format(self, record: logging.LogRecord) -> str:
        line = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **_request_fields(record),
        }
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line)


class _Repeats:
    """Limits the lines of a handler that repeat, and logs how many were left out."""

    def __init__(self, handler: logging.Handler) -> None:
        self._handler = handler
        self._since_s = 0.0
        self._seen: dict[tuple[str, str, int], int] = {}  # (logger, text or template, limit) -> lines in this period

    def passes(self, record: logging.LogRecord) -> bool:
        if _is_summary(record):
            return True
        if time.monotonic() > self._since_s + _PERIOD_S:
            self._summarize()
        kinds = (record.name, record.getMessage(), _MOST_EQUAL), (record.name, str(record.msg), _MOST_SIMILAR)
        for kind in kinds:
            if kind in self._seen or kind[2] == _MOST_SIMILAR or len(self._seen) < 2 * _MOST_SIMILAR:
                self._seen[kind] = self._seen.get(kind, 0) + 1
        return all(self._seen.get(kind, 0) <= kind[2] for kind in kinds)

    def _summarize(self) -> None:
        seen, self._seen, self._since_s = self._seen, {}, time.monotonic()
        for (name, text, most), count in seen.items():
            if count > most:
                message = "%d more lines in the last minute were left out: %s"
                summary = logging.LogRecord(name, logging.WARNING, "", 0, message, (count - most, text), None)
                summary.is_summary = True
                self._handler.handle(summary)


def set_up(arguments: Namespace) -> None:
    """Make the root logger's handlers write the format of `--log-format`, and limit lines that repeat."""
    formatter = _JsonFormatter() if arguments.log_format == "json" else _TextFormatter()
    for handler in logging.getLogger().handlers:
        handler.setFormatter(formatter)
        handler.addFilter(_Repeats(handler).passes)
