"""`serve --metrics`: a second listener that shows metrics in Prometheus' text format.

The server counts in plain Python, and prometheus_client makes the text when Prometheus asks for it: its own counters
take a lock at each step, which would cost 5 % of the single events. docs/monitoring.md describes every metric.
"""

from __future__ import annotations

import itertools
import os
import platform
import shutil
import sqlite3
import sys
import time
from argparse import Namespace
from bisect import bisect_left
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from eventstore import Service, StartError, __version__, listen_error, quoted

try:
    import prometheus_client
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
except ImportError as error:
    _install = f"{sys.executable} -m pip install prometheus_client (or '.[metrics]' in the clone)"
    raise StartError(f"--metrics needs prometheus_client: {_install}") from error

__all__ = ["Metrics", "attach"]

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_EVENTS = (1, 10, 100, 1_000, 2_000, 4_000, 8_000, 16_000)
_METHODS = {"GET", "HEAD", "POST", "PUT", "DELETE", "OPTIONS", "PATCH"}
_INGEST = {"/v1/events", "/v1/events/bulk"}


class _Histogram:
    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self.sum += value

    def buckets(self) -> list[tuple[str, float]]:
        names = [*map(str, map(float, self._bounds)), "+Inf"]
        return list(zip(names, map(float, itertools.accumulate(self._counts)), strict=True))


def _counter(name: str, text: str, values: Mapping[Any, int], labels: Sequence[str] = ()) -> CounterMetricFamily:
    """Make a counter with a value for each tuple of label values; prometheus_client adds _total to its name."""
    metric = CounterMetricFamily(name, text, labels=labels)
    for label_values, value in values.items():
        metric.add_metric(label_values, value)
    return metric


def _gauge(name: str, text: str, value: float | Mapping[str, float]) -> GaugeMetricFamily:
    """Make a gauge from one value, or from one for each environment."""
    metric = GaugeMetricFamily(name, text, labels=["environment"] if isinstance(value, Mapping) else [])
    for environment, each in value.items() if isinstance(value, Mapping) else [(None, value)]:
        metric.add_metric([] if environment is None else [environment], each)
    return metric


def _size_of(path: str) -> int:
    with suppress(FileNotFoundError):
        return os.path.getsize(path)
    return 0


class Metrics:
    """Counts the requests and commits of a server, and collects all its metrics."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._requests: dict[tuple[str, str, str], _Histogram] = defaultdict(lambda: _Histogram(_SECONDS))
        self._events: Counter[tuple[str, str]] = Counter()  # (accepted, duplicate or refused; environment) -> number
        self._commit_seconds, self._commit_events = _Histogram(_SECONDS), _Histogram(_EVENTS)
        service.store.writer.on_commit = self._on_commit

    def around(self, app: ASGIApp) -> ASGIApp:
        """Wrap an application in middleware that counts its requests."""

        async def count(scope: Scope, receive: Receive, send: Send) -> None:
            if scope["type"] != "http":
                await app(scope, receive, send)
                return
            start_s = time.perf_counter()
            answer: Message = {}

            async def send_and_note(message: Message) -> None:
                if message["type"] == "http.response.start":
                    answer.update(message)
                await send(message)

            try:
                await app(scope, receive, send_and_note)
            finally:
                self._on_request(scope, answer, time.perf_counter() - start_s)

        return count

    def _on_request(self, scope: Scope, answer: Message, seconds: float) -> None:
        status = answer.get("status", 499)  # nginx's status for a client that went away before its answer
        route = getattr(scope.get("endpoint"), "path", "unmatched")
        method = scope["method"] if scope["method"] in _METHODS else "other"
        self._requests[route, method, str(status)].observe(seconds)
        if route not in _INGEST or method != "POST" or "environment" not in scope:
            return
        environment = scope["environment"]
        if status == 202:
            counts = {name: int(value) for name, value in answer["headers"] if name.startswith(b"x-events-")}
            self._events["accepted", environment] += counts[b"x-events-inserted"]
            self._events["duplicate", environment] += counts[b"x-events-duplicate"]
        else:
            self._events["refused", environment] += scope.get("events", 1)

    def _on_commit(self, events: int, seconds: float) -> None:
        self._commit_seconds.observe(seconds)
        self._commit_events.observe(events)

    def collect(self) -> Iterator[Metric]:
        """Yield all metrics; prometheus_client calls it for each scrape."""
        yield self._requests_metric()
        for what, text in (("accepted", "stored for the first time"), ("duplicate", "whose id was stored already"),
                           ("refused", "of refused requests; 1 for a body that could not be read")):  # fmt: skip
            found = {(name,): number for (kind, name), number in list(self._events.items()) if kind == what}
            yield _counter(f"eventstore_events_{what}", f"Events {text}.", found, ["environment"])
        yield from self._store_metrics()
        yield from self._file_metrics()
        yield from self._outbox_metrics()
        yield from self._retention_metrics()
        build = {"version": __version__, "sqlite": sqlite3.sqlite_version, "python": platform.python_version()}
        info = GaugeMetricFamily("eventstore_build_info", "Versions; the value is always 1.", labels=[*build])
        info.add_metric([*build.values()], 1)
        yield info

    def _requests_metric(self) -> Metric:
        seconds = HistogramMetricFamily("eventstore_http_request_duration_seconds", "Time from head to answer.",
                                        labels=["route", "method", "status"])  # fmt: skip
        for labels, histogram in list(self._requests.items()):
            seconds.add_metric(labels, histogram.buckets(), histogram.sum)
        return seconds

    def _store_metrics(self) -> Iterator[Metric]:
        writer, readers, shares = self._service.store.writer, self._service.store.readers, self._service.shares
        yield _gauge("eventstore_writer_waiting_events", "Events that wait for their commit.", writer.waiting_events)
        yield _gauge("eventstore_held_bytes", "Bytes of bodies and unread answers in memory.", shares.total)
        for name, text, histogram in (
            ("duration_seconds", "Time of a commit.", self._commit_seconds),
            ("events", "Events of a commit.", self._commit_events),
        ):
            metric = HistogramMetricFamily(f"eventstore_commit_{name}", text)
            metric.add_metric([], histogram.buckets(), histogram.sum)
            yield metric
        yield _counter("eventstore_commit_failures", "Commits that failed.", {(): writer.failed_commits})
        yield _gauge("eventstore_queries_running", "Queries in reader threads.", readers.running)
        yield _gauge("eventstore_queries_waiting", "Queries that wait for a reader thread.", readers.waiting)
        yield _counter("eventstore_query_timeouts", "Queries that took too long.", {(): readers.timeouts})

    def _file_metrics(self) -> Iterator[Metric]:
        path = self._service.store.path
        yield _gauge("eventstore_database_bytes", "Size of the database file.", _size_of(path))
        yield _gauge("eventstore_wal_bytes", "Size of the write-ahead log.", _size_of(f"{path}-wal"))
        with suppress(OSError):  # the folder was removed
            free_bytes = shutil.disk_usage(os.path.dirname(path)).free
            yield _gauge("eventstore_disk_free_bytes", "Free bytes of the database's disk.", free_bytes)

    def _outbox_metrics(self) -> Iterator[Metric]:
        outboxes = dict(self._service.outboxes)
        if not outboxes:
            return
        now_us = self._service.settings.clock()
        ages = {name: (now_us - each.oldest_us) / 1e6 if each.oldest_us else 0.0 for name, each in outboxes.items()}
        for metric, text, values in (
            ("waiting_events", "Events not yet delivered.", {name: each.waiting for name, each in outboxes.items()}),
            ("oldest_age_seconds", "Age of the oldest event not yet delivered.", ages),
            ("blocked", "1 if the target refuses everything.", {name: bool(o.blocked) for name, o in outboxes.items()}),
        ):
            yield _gauge(f"eventstore_forward_{metric}", text, values)
        sent = {(name,): each.sent for name, each in outboxes.items()}
        yield _counter("eventstore_forward_sent_events", "Events delivered.", sent, ["environment"])
        aside = {(name, why): n for name, each in outboxes.items() for why, n in dict(each.put_aside).items()}
        yield _counter("eventstore_forward_put_aside_events", "Events not delivered, by reason.", aside,
                       ["environment", "reason"])  # fmt: skip

    def _retention_metrics(self) -> Iterator[Metric]:
        retention = self._service.retention
        if retention:
            yield _counter("eventstore_retention_deleted_events", "Events deleted.", {(): retention.deleted})
            yield _gauge("eventstore_retention_last_sweep_timestamp_seconds", "End of the last sweep.",
                         retention.swept_us / 1e6)  # fmt: skip


def _parse_address(text: str) -> tuple[str, int]:
    host, colon, port = text.rpartition(":")
    if not colon or not port.isdecimal() or int(port) > 65_535:
        raise StartError(
            f"--metrics must be ADDRESS:PORT, such as 127.0.0.1:9100, with a port of 0 to 65535, got {quoted(text)}"
        )
    return host.strip("[]") or "127.0.0.1", int(port)


def attach(service: Service, arguments: Namespace, address: Any) -> None:
    """Start the listener of `--metrics` in a thread. Raises StartError if the port cannot be opened."""
    host, port = _parse_address(arguments.metrics)
    metrics = Metrics(service)
    registry = prometheus_client.CollectorRegistry()
    registry.register(metrics)
    prometheus_client.ProcessCollector(registry=registry)
    try:
        server, _ = prometheus_client.start_http_server(port, host, registry)
    except (OSError, UnicodeError) as error:
        raise listen_error(error, f"--metrics {arguments.metrics}", "--metrics", "--metrics") from error
    service.wrappers.append(metrics.around)
    shown = f"[{host}]" if ":" in host else host
    service.notices.append(f"metrics      http://{shown}:{server.server_port}/metrics")
