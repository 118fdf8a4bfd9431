"""The soak: minutes of mixed load, to see whether memory, file, WAL, handles and latencies stay flat."""

from __future__ import annotations

import json
import math
import statistics
import time
import uuid
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

from benchmarks.events import bulk_requests, http_request, single_requests
from benchmarks.load import Load, generators, run_load
from benchmarks.servers import Server, aging_server
from benchmarks.table import format_number, machine
from eventstore import MAX_BATCH, now_us, to_datetime

__all__ = ["P99S", "changes", "soak"]


class _Mixed(NamedTuple):
    """One kind of request of the mixed load. The rates leave the server time to spare."""

    per_second: float
    connections: int
    requests: Callable[[int], list[bytes]]  # makes this many, or fewer that are sent repeatedly


def _recent_usage(_: int) -> list[bytes]:
    """Ask for usage over the last ten seconds, so that the work does not grow with the table."""
    start_time, end_time = to_datetime(now_us() - 10_000_000), to_datetime(now_us())
    aggregation = {"aggregation_type": "SUM", "property_name": "tokens"}
    body = {"event_name": "api_request", "start_time": start_time, "end_time": end_time, **aggregation}
    return [http_request("POST", "/v1/events/usage", body)]


_ALL_TIMES = "start_time=2000-01-01T00:00:00Z&end_time=3000-01-01T00:00:00Z"  # the server's clock runs ahead of ours
_KNOWN_IDS = [str(uuid.uuid4()) for _ in range(MAX_BATCH)]
_MIX = {
    "bulk": _Mixed(2, 2, lambda count: bulk_requests(count, uuid.uuid4)),
    "single": _Mixed(100, 8, single_requests),
    "page": _Mixed(50, 4, lambda _: [http_request("GET", f"/v1/events?{_ALL_TIMES}")]),
    "customer": _Mixed(50, 4, lambda _: [http_request("GET", f"/v1/events?{_ALL_TIMES}&external_customer_id=cust_42")]),
    "usage": _Mixed(1, 1, _recent_usage),
    "duplicate": _Mixed(1, 1, lambda _: bulk_requests(1, iter(_KNOWN_IDS).__next__)),
}
_MAX_INTERVAL_S = 10
P99S = [f"{name} p99 ms" for name in _MIX]


def _behind(server: Server) -> int:
    """Return how many events the server has not forwarded yet."""
    any_day = "start_time=2000-01-01T00:00:00Z&end_time=2000-01-02T00:00:00Z"
    monitoring = server.ask(http_request("GET", f"/v1/events/monitoring?{any_day}"))
    return int(json.loads(monitoring)["post_processing_lag"])


def _measure_interval(server: Server, db: Path, pool: ProcessPoolExecutor, seconds: float) -> dict[str, float]:
    """Send the mix for `seconds`. Returns its latencies, and the server's sizes half-way through."""
    futures = {}
    for name, kind in _MIX.items():
        requests = kind.requests(math.ceil(kind.per_second * seconds))
        load = Load(server.port, requests, kind.connections, seconds, per_second=kind.per_second)
        futures[name] = pool.submit(run_load, load)
    time.sleep(seconds / 2)
    sizes = {
        "RSS MB": server.rss_mb,
        "WAL MB": Path(f"{db}-wal").stat().st_size / 2**20,
        "file MB": db.stat().st_size / 2**20,
        "behind": _behind(server),
        "handles": server.handles,
    }
    outcomes = {name: future.result() for name, future in futures.items()}
    events = outcomes["bulk"].answered * MAX_BATCH + outcomes["single"].answered
    latencies = [outcome.percentile_ms(99) for outcome in outcomes.values()]
    return {"events/s": events / seconds, **dict(zip(P99S, latencies, strict=True)), **sizes}


# Figure -> how much the last third may exceed the second: by this factor, plus this amount.
_MAX_GROWTH = {
    "RSS MB": (1.1, 4),
    "WAL MB": (1.1, 8),
    "file MB": (1.1, 8),
    "behind": (1.1, 3000),
    "handles": (1, 2),
    **dict.fromkeys(P99S, (1.5, 5)),
}
_MIN_EVENTS_FACTOR = 0.95


def changes(samples: Sequence[dict[str, float]]) -> list[str]:
    """Describe each figure that did not stay flat from the second third to the last. The first third is a warm-up."""
    third = len(samples) // 3
    before, after = (
        {name: statistics.median(sample[name] for sample in part) for name in samples[0]}
        for part in (samples[third:-third], samples[-third:])
    )
    changed = [name for name, (factor, amount) in _MAX_GROWTH.items() if after[name] > before[name] * factor + amount]
    changed += ["events/s"] * (after["events/s"] < before["events/s"] * _MIN_EVENTS_FACTOR)
    return [f"{name} went from {format_number(before[name])} to {format_number(after[name])}" for name in changed]


def soak(minutes: float, folder: Path) -> int:
    """Send mixed load and print a line for each interval. Returns exit status 1 if a figure did not stay flat.

    The server forwards all events and keeps them for a day, which takes a minute on its clock.
    """
    db, interval_s = folder / "soak.db", min(_MAX_INTERVAL_S, minutes * 60 / 12)
    print(machine(folder), flush=True)
    samples: list[dict[str, float]] = []
    with ExitStack() as stack:  # on Ctrl-C it ends the servers first, and that ends the loads
        pool = stack.enter_context(generators(len(_MIX)))
        target = stack.enter_context(aging_server(folder / "target.db", "--retain-days", 1))
        forwarding = ("--forward-to", f"http://127.0.0.1:{target.port}")
        server = stack.enter_context(aging_server(db, "--retain-days", 1, *forwarding))
        start = time.monotonic()
        while (elapsed_s := time.monotonic() - start) < minutes * 60 or len(samples) < 3:
            samples.append(_measure_interval(server, db, pool, interval_s))
            figures = ", ".join(f"{name} {format_number(value)}" for name, value in samples[-1].items())
            print(f"{elapsed_s:5.0f} s: {figures}", flush=True)
    changed = changes(samples)
    is_flat = "flat: memory, file, WAL, handles and latencies stayed as they were"
    print("not flat: " + "; ".join(changed) if changed else is_flat)
    return 1 if changed else 0
