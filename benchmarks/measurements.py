"""What is measured: for each row of the table, our way and the floor's way to the same figure."""

from __future__ import annotations

import itertools
import json
import logging
import sqlite3
import statistics
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import NamedTuple

import msgspec
from starlette.requests import Request

from benchmarks.bench import Bench, create_tables
from benchmarks.events import (
    ENVIRONMENT,
    ENVIRONMENT_NUMBER,
    KEY,
    bulk_requests,
    http_request,
    make_row,
    no_id,
    ordered_id,
    single_requests,
    uuid7,
    wire_event,
)
from benchmarks.servers import Server, floor_server, our_server, trusting_server
from eventstore import (
    DAY_US,
    MAX_BATCH,
    READER_PRAGMAS,
    WRITER_PRAGMAS,
    ApiError,
    ApiKey,
    Row,
    Service,
    Settings,
    connect,
    decode_batch,
    event_rows,
    insert_statement,
    to_datetime,
)

__all__ = ["MEASUREMENTS", "SERVED", "Figures", "Measurement"]

Figures = tuple[float, ...]


class Measurement(NamedTuple):
    """One or more rows of the table, measured together."""

    units: dict[str, str]  # row -> unit; a unit that ends in /s is better when greater, any other when smaller
    floor_name: str
    ours: Callable[[Bench], Figures]
    floor: Callable[[Bench], Figures]


_SQLITE, _ROUTE, _ROUTE_AND_SQLITE = "sqlite3", "Starlette", "Starlette + sqlite3"


def _repeated_ms(act: Callable[[], object], bench: Bench) -> Figures:
    """Return the mean duration of `act`, repeated for the effort's seconds but at least once."""
    start, seconds, count = time.perf_counter(), 0.0, 0
    while seconds <= bench.effort.seconds:
        act()
        count += 1
        seconds = time.perf_counter() - start
    return (1000 * seconds / count,)


# ---------------------------------------------------------------------------------------------- ingest

_INSERT = insert_statement(1)


def _insert_raw(conn: sqlite3.Connection, rows: Iterable[Row]) -> None:
    conn.execute("BEGIN IMMEDIATE")
    conn.executemany(_INSERT, rows)
    conn.execute("COMMIT")


def _insert_batches_raw(conn: sqlite3.Connection, rows: Sequence[Row]) -> Figures:
    """Return the events per second of raw inserts, one transaction for each batch."""
    start = time.perf_counter()
    for first in range(0, len(rows), MAX_BATCH):
        _insert_raw(conn, rows[first : first + MAX_BATCH])
    return (len(rows) / (time.perf_counter() - start),)


def _send_bulk(make_id: Callable[[], object], bench: Bench) -> Figures:
    requests = bulk_requests(bench.effort.batches, make_id)
    with bench.temporary_events():
        outcome = bench.send(bench.ours, requests, 8, seconds=60, repeat=False).result()
    return (outcome.per_second * MAX_BATCH,)


def _insert_bulk_raw(make_id: Callable[[], object], bench: Bench) -> Figures:
    rows = [make_row(number, str(make_id())) for number in range(bench.effort.batches * MAX_BATCH)]
    with bench.temporary_events() as conn:
        return _insert_batches_raw(conn, rows)


def _send_singles(bench: Bench) -> Figures:
    with bench.temporary_events():
        outcome = bench.send(bench.ours, single_requests(bench.effort.singles), 64, repeat=False).result()
    return outcome.per_second, outcome.percentile_ms(99)


def _answer_singles(bench: Bench) -> Figures:
    bench.set_floor("", [], b'{"message":"Event accepted for processing","event_id":"%s"}' % str(uuid.uuid4()).encode())
    outcome = bench.send(bench.floor, single_requests(bench.effort.singles), 64, repeat=False).result()
    return outcome.per_second, outcome.percentile_ms(99)


def _check_batches(change: Callable[[int], dict[str, object]], bench: Bench) -> Figures:
    """Decode and check a batch as the server's event loop does, again and again. `change` makes its n-th event odd."""
    events = [wire_event(make_row(number, str(uuid.uuid4()))) | change(number) for number in range(MAX_BATCH)]
    body = msgspec.json.encode({"events": events})
    service = Service(Settings(db=":memory:", api_keys=(ApiKey.hashed(KEY, ENVIRONMENT),)), ())
    request = Request({"type": "http", "method": "POST", "environment": ENVIRONMENT})

    def check() -> None:
        with suppress(ApiError):
            faults = service.faults(request, whole="event")
            event_rows(service, decode_batch(body, faults), ENVIRONMENT, faults, bulk=True)

    logging.disable()  # the log names the unknown fields
    try:
        with closing(service.store):
            return _repeated_ms(check, bench)
    finally:
        logging.disable(logging.NOTSET)


def _unchanged(_: int) -> dict[str, object]:
    return {}


def _unknown_field(_: int) -> dict[str, object]:
    return {"metadata": "x"}


def _one_wrong(number: int) -> dict[str, object]:
    return {"source": 7} if number == MAX_BATCH // 2 else {}


_CHECKS = [
    Measurement({f"check of a batch, {what}": "ms"}, "without it",
                partial(_check_batches, change), partial(_check_batches, _unchanged))
    for what, change in {"an unknown field in each": _unknown_field, "one wrong value": _one_wrong}.items()
]  # fmt: skip

_INGEST = [
    Measurement({"bulk of 1000, uuid4 ids": "events/s"}, _SQLITE,
                partial(_send_bulk, uuid.uuid4), partial(_insert_bulk_raw, uuid.uuid4)),
    Measurement({"bulk of 1000, uuid7 ids": "events/s"}, _SQLITE,
                partial(_send_bulk, uuid7), partial(_insert_bulk_raw, uuid7)),
    Measurement({"bulk of 1000, ids made here (ULID)": "events/s"}, _SQLITE,
                partial(_send_bulk, no_id), partial(_insert_bulk_raw, ordered_id)),
    Measurement({"single events": "events/s", "single events, p99": "ms"}, _ROUTE, _send_singles, _answer_singles),
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- pages

_PAGE_COLUMNS = ", ".join(column for column in Row._fields if column != "environment")
_REQUESTS = 20  # different requests for each kind of page


class _Page(NamedTuple):
    """A page of 50 in two forms: as the end of a URL, and as a WHERE clause."""

    query: str
    where: str
    values: Callable[[Bench, int], dict[str, object]]  # of the n-th request, for both forms
    indexed_by: str = "time"  # of the floor: without a hint SQLite scans the events of all customers for one customer's

    def requests(self, bench: Bench) -> list[bytes]:
        url = "/v1/events?page_size=50" + self.query
        return [http_request("GET", url.format(**self.values(bench, n))) for n in range(_REQUESTS)]

    def set_floor(self, bench: Bench) -> None:
        where = f"environment = :environment AND timestamp_us >= :start_us AND {self.where}"
        rows = f"SELECT {_PAGE_COLUMNS} FROM events INDEXED BY events_by_{self.indexed_by} WHERE {where}"
        statement = f"{rows} ORDER BY timestamp_us DESC, id DESC LIMIT 51"
        common = {"environment": ENVIRONMENT_NUMBER, "start_us": bench.end_us - 7 * DAY_US, "end_us": bench.end_us}
        answer = bench.ours.ask(self.requests(bench)[0])
        if (count := len(json.loads(answer)["events"])) != 50:
            raise RuntimeError(f"the page {self.query} has {count} events")
        bench.set_floor(statement, [common | self.values(bench, n) for n in range(_REQUESTS)], answer)


def _deep_cursor(bench: Bench, n: int) -> dict[str, object]:
    """Return the cursor of an event that 90 % of the events come before."""
    with closing(sqlite3.connect(bench.db)) as conn:
        found = conn.execute("SELECT timestamp_us, id FROM events WHERE seq = ?", [bench.size // 10 - n])
        time_us, event_id = found.fetchone()
    return {"time_us": time_us, "id": event_id, "cursor": f"{time_us * 1000}::{event_id}"}


def _customer(bench: Bench, n: int) -> dict[str, object]:
    return {"customer": f"cust_{n % bench.customers}"}


def _model(_: Bench, n: int) -> dict[str, object]:
    return {"model": f"model-{n}"}


def _send_pages(page: _Page, bench: Bench) -> Figures:
    return (bench.send(bench.ours, page.requests(bench), 8).result().per_second,)


def _answer_pages(page: _Page, bench: Bench) -> Figures:
    page.set_floor(bench)
    return (bench.send(bench.floor, page.requests(bench), 8).result().per_second,)


_NOT_AFTER_END = "timestamp_us <= :end_us"
_FIRST_PAGE = _Page("", _NOT_AFTER_END, lambda bench, n: {})
_PAGE_KINDS = {
    "page of 50, first": _FIRST_PAGE,
    "page of 50, 90 % deep": _Page("&iter_last_key={cursor}", "(timestamp_us, id) < (:time_us, :id)", _deep_cursor),
    "page of 50, one customer": _Page(
        "&external_customer_id={customer}",
        f"{_NOT_AFTER_END} AND external_customer_id = :customer",
        _customer,
        "customer",
    ),
    "page of 50, a property of 1 in 20": _Page(
        "&property_filters=model:{model}", f"{_NOT_AFTER_END} AND properties ->> '$.model' = :model", _model
    ),
}


_TIES = 5000


@contextmanager
def _ties(bench: Bench) -> Iterator[None]:
    """Give one customer many events of the same microsecond, which is later than all others."""
    with bench.temporary_events() as conn:
        _insert_raw(conn, [make_row(n, f"tie-{n:05}", 1, bench.end_us - 1) for n in range(_TIES)])
        yield


_PAGE_IN_TIES = _Page(
    "&external_customer_id=cust_0&iter_last_key={cursor}",
    "external_customer_id = 'cust_0' AND (timestamp_us, id) < (:time_us, :id)",
    lambda bench, n: {"time_us": bench.end_us - 1, "id": f"tie-{_TIES // 2 + n:05}",
                      "cursor": f"{(bench.end_us - 1) * 1000}::tie-{_TIES // 2 + n:05}"},
)  # fmt: skip


def _in_ties(measure: Callable[[_Page, Bench], Figures], bench: Bench) -> Figures:
    with _ties(bench):
        return measure(_PAGE_IN_TIES, bench)


def _send_pages_under_ingest(bench: Bench) -> Figures:
    with bench.temporary_events():
        ingest = bench.send(bench.ours, bulk_requests(8, no_id), 8, seconds=bench.effort.seconds * 1.5)
        pages = bench.send(bench.ours, _FIRST_PAGE.requests(bench), 8).result()
        ingest.result()
    return pages.per_second, pages.percentile_ms(50), pages.percentile_ms(99)


def _answer_pages_under_ingest(bench: Bench) -> Figures:
    _FIRST_PAGE.set_floor(bench)
    with bench.temporary_events() as conn:
        future = bench.send(bench.floor, _FIRST_PAGE.requests(bench), 8)
        while not future.done():
            _insert_raw(conn, [make_row(number, ordered_id()) for number in range(MAX_BATCH)])
    pages = future.result()
    return pages.per_second, pages.percentile_ms(50), pages.percentile_ms(99)


_UNDER_INGEST = {
    "first page under ingest": "pages/s",
    "first page under ingest, p50": "ms",
    "first page under ingest, p99": "ms",
}
_PAGES = [
    *(
        Measurement({name: "pages/s"}, _ROUTE_AND_SQLITE, partial(_send_pages, page), partial(_answer_pages, page))
        for name, page in _PAGE_KINDS.items()
    ),
    Measurement(
        {f"page of 50, one customer, among {_TIES:,} of one microsecond": "pages/s"},
        _ROUTE_AND_SQLITE,
        partial(_in_ties, _send_pages),
        partial(_in_ties, _answer_pages),
    ),
    Measurement(_UNDER_INGEST, _ROUTE_AND_SQLITE, _send_pages_under_ingest, _answer_pages_under_ingest),
]

# ---------------------------------------------------------------------------------------------- usage


class _Usage(NamedTuple):
    """One usage in two forms: fields of a request, and SQL."""

    fields: dict[str, str]
    aggregate: str
    group_by: str = ""


_SUM = {"aggregation_type": "SUM", "property_name": "tokens"}
_RAW_SUM = "total(properties ->> '$.tokens')"
_USAGES = {
    "usage: COUNT": _Usage({"aggregation_type": "COUNT"}, "count(*)"),
    "usage: SUM": _Usage(_SUM, _RAW_SUM),
    "usage: COUNT_UNIQUE": _Usage(
        {"aggregation_type": "COUNT_UNIQUE", "property_name": "endpoint"}, "count(DISTINCT properties ->> '$.endpoint')"
    ),
    "usage: SUM for each DAY": _Usage(
        _SUM | {"window_size": "DAY"}, _RAW_SUM, f"GROUP BY timestamp_us / {DAY_US}"
    ),
}  # fmt: skip


def _send_usage(usage: _Usage, bench: Bench) -> Figures:
    time_range = {"start_time": to_datetime(bench.start_us), "end_time": to_datetime(bench.end_us)}
    request = http_request("POST", "/v1/events/usage", {"event_name": "api_request", **time_range, **usage.fields})
    answer = json.loads(bench.ours.ask(request))
    if usage.fields["aggregation_type"] == "COUNT" and answer["value"] != bench.size:
        raise RuntimeError(f"the table has {answer['value']} events, not {bench.size}")
    return (1000 / bench.send(bench.ours, [request], 1).result().per_second,)


def _aggregate_raw(selections: Sequence[tuple[str, str]], bench: Bench) -> Figures:
    """Run a SELECT for each pair of columns and further clauses, over all events of the table."""
    where = "environment = ? AND event_name = 'api_request' AND timestamp_us >= ? AND timestamp_us < ?"
    parameters = (ENVIRONMENT_NUMBER, bench.start_us, bench.end_us)

    def aggregate() -> None:
        for columns, clauses in selections:
            conn.execute(f"SELECT {columns} FROM events WHERE {where} {clauses}", parameters).fetchall()

    with closing(connect(str(bench.db), READER_PRAGMAS)) as conn:
        return _repeated_ms(aggregate, bench)


_USAGE = [
    Measurement({name: "ms"}, _SQLITE, partial(_send_usage, usage),
                partial(_aggregate_raw, [(usage.aggregate, usage.group_by)]))
    for name, usage in _USAGES.items()
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- analytics


class _Meter(NamedTuple):
    aggregation: str
    field: str
    is_filtered: bool  # to three models


_METERS = [
    _Meter(aggregation, field, bool(number % 2))
    for number in range(4)
    for aggregation, field in (("COUNT", ""), ("SUM", "tokens"), ("MAX", "tokens"), ("AVG", "duration_ms"),
                               ("COUNT_UNIQUE", "endpoint"))
]  # fmt: skip
_MODELS = ("model-1", "model-2", "model-3")


def _create_meters(bench: Bench) -> None:
    for meter in _METERS:
        filters = [{"key": "model", "values": _MODELS}] if meter.is_filtered else []
        body = {
            "name": meter.aggregation,
            "event_name": "api_request",
            "aggregation": {"type": meter.aggregation, "field": meter.field},
            "filters": filters,
            "reset_usage": "BILLING_PERIOD",
        }
        bench.ours.ask(http_request("POST", "/v1/meters", body))


def _send_analytics(bench: Bench) -> Figures:
    """Ask for the usage of all meters by region and day."""
    if not json.loads(bench.ours.ask(http_request("GET", "/v1/meters")))["items"]:
        _create_meters(bench)
    time_range = {"start_time": to_datetime(bench.start_us), "end_time": to_datetime(bench.end_us)}
    body = {"group_by": ["properties.region"], "window_size": "DAY", **time_range}
    request = http_request("POST", "/v1/events/analytics", body)
    return _repeated_ms(lambda: bench.ours.ask(request), bench)


def _meter_selection(meter: _Meter) -> tuple[str, str]:
    """Return the columns and clauses that answer for one meter, for `_aggregate_raw`."""
    function = {"SUM": "total", "COUNT_UNIQUE": "count"}.get(meter.aggregation, meter.aggregation)
    distinct = "DISTINCT " if meter.aggregation == "COUNT_UNIQUE" else ""
    aggregate = f"{function}({distinct}properties ->> '$.{meter.field}')" if meter.field else "count(*)"
    columns = f"properties ->> '$.region' AS region, timestamp_us / {DAY_US} AS day, count(*), {aggregate}"
    models = ", ".join(f"""'"{model}"'""" for model in _MODELS)
    where = f"AND properties -> '$.model' IN ({models}) " if meter.is_filtered else ""
    return columns, f"{where}GROUP BY region, day"


_ANALYTICS = Measurement(
    {f"analytics: {len(_METERS)} meters by property and DAY": "ms"},
    _SQLITE,
    _send_analytics,
    partial(_aggregate_raw, [_meter_selection(meter) for meter in _METERS]),
)

# ---------------------------------------------------------------------------------------------- forwarding


def _forward_events(bench: Bench) -> Figures:
    """Forward the table to an empty server, measured from the start of the forwarding server."""
    with tempfile.TemporaryDirectory(dir=bench.db.parent) as folder, our_server(Path(folder) / "target.db") as target:
        target_conn = connect(f"{folder}/target.db", READER_PRAGMAS)
        to_target = ("--forward-to", f"http://127.0.0.1:{target.port}")
        with closing(target_conn), our_server(bench.db, *to_target, clone=bench.clone):
            start, forwarded = time.perf_counter(), 0
            while forwarded < bench.size and (not forwarded or time.perf_counter() < start + bench.effort.seconds):
                time.sleep(0.001)
                forwarded = target_conn.execute("SELECT coalesce(max(seq), 0) FROM events").fetchone()[0]
            seconds = time.perf_counter() - start
    for progress in bench.db.parent.glob(f"{bench.db.name}.forward-*.json"):
        progress.unlink()
    return (forwarded / seconds,)


def _insert_into_empty(bench: Bench) -> Figures:
    rows = [bench.make_row(number) for number in range(min(bench.size, bench.effort.batches * MAX_BATCH))]
    with tempfile.TemporaryDirectory(dir=bench.db.parent) as folder:
        db = Path(folder) / "target.db"
        create_tables(db)
        with closing(connect(str(db), WRITER_PRAGMAS)) as conn:
            return _insert_batches_raw(conn, rows)


_FORWARDING = Measurement({"forwarding to an empty server": "events/s"}, _SQLITE, _forward_events, _insert_into_empty)

# ---------------------------------------------------------------------------------------------- retention

_RETAIN_DAYS = 30


def _store_old(conn: sqlite3.Connection, bench: Bench) -> range:
    """Store events that retention deletes. Returns their seqs, which follow those of the table."""
    time_us = bench.start_us - 2 * _RETAIN_DAYS * DAY_US
    count = bench.effort.batches * MAX_BATCH
    rows = [bench.make_row(number, time_us) for number in range(count)]
    _insert_raw(conn, [row._replace(ingested_at_us=time_us) for row in rows])
    (last,) = conn.execute("SELECT max(seq) FROM events").fetchone()
    conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return range(last + 1 - count, last + 1)


def _count_within(conn: sqlite3.Connection, seqs: range) -> int:
    (count,) = conn.execute("SELECT count(*) FROM events WHERE seq BETWEEN ? AND ?", [seqs[0], seqs[-1]]).fetchone()
    return int(count)


def _delete_beside_singles(
    conn: sqlite3.Connection, old: range, bench: Bench, server: Server, delete_some: Callable[[], object]
) -> Figures:
    """Return how many old events per second are deleted while single ones are stored, and the latency of those."""
    start, count_before = time.perf_counter(), _count_within(conn, old)
    singles = bench.send(server, single_requests(bench.effort.singles), 8, per_second=500)
    while (count := _count_within(conn, old)) and (count == count_before or not singles.done()):
        delete_some()
    return (count_before - count) / (time.perf_counter() - start), singles.result().percentile_ms(99)


def _retain(bench: Bench) -> Figures:
    def wait() -> None:
        time.sleep(0.01)

    with bench.temporary_events() as conn:
        old = _store_old(conn, bench)
        with trusting_server(bench.db, "--retain-days", _RETAIN_DAYS, clone=bench.clone) as server:
            while _count_within(conn, old) == len(old):  # the server scans the whole table before it deletes
                wait()
            return _delete_beside_singles(conn, old, bench, server, wait)


def _delete_raw(bench: Bench) -> Figures:
    bench.set_floor("", [], b"{}")
    with bench.temporary_events() as conn:
        old = _store_old(conn, bench)
        steps = itertools.count(old[0], MAX_BATCH)

        def delete_some() -> None:
            first = next(steps)
            conn.execute("DELETE FROM events WHERE seq BETWEEN ? AND ?", [first, first + MAX_BATCH - 1])

        return _delete_beside_singles(conn, old, bench, bench.floor, delete_some)


_RETENTION = Measurement(
    {"retention, old events deleted": "events/s", "retention, single events beside it, p99": "ms"},
    _ROUTE_AND_SQLITE,
    _retain,
    _delete_raw,
)

# ---------------------------------------------------------------------------------------------- start, memory, file


def _start_up(server: Callable[[Bench], Server], bench: Bench) -> Figures:
    with server(bench) as started:
        return 1000 * started.start_up_s, started.rss_mb


def _memory_after_bulk(bench: Bench) -> Figures:
    """Return the memory of a fresh server once its cache is full; a million events take no more."""
    with bench.temporary_events(), our_server(bench.db, clone=bench.clone) as server:
        bench.send(server, bulk_requests(bench.effort.batches, uuid.uuid4), 8, seconds=60, repeat=False).result()
        return (server.rss_mb,)


def _wire_bytes_per_event(_: Bench) -> Figures:
    rows = [make_row(number, str(uuid.uuid4())) for number in range(1000)]
    return (statistics.mean(len(msgspec.json.encode(wire_event(row))) for row in rows),)


_RESOURCES = [
    Measurement({"start to the first answer": "ms", "memory, idle": "MB"}, _ROUTE,
                partial(_start_up, lambda bench: our_server(bench.db, clone=bench.clone)),
                partial(_start_up, lambda bench: floor_server(bench.db))),
    Measurement({"memory after bulk": "MB"}, _ROUTE, _memory_after_bulk, lambda bench: (bench.floor.rss_mb,)),
    Measurement({"memory after all this": "MB"}, _ROUTE,
                lambda bench: (bench.ours.rss_mb,), lambda bench: (bench.floor.rss_mb,)),
    Measurement({"file, for each event": "bytes"}, "JSON as sent",
                lambda bench: (bench.bytes_per_event,), _wire_bytes_per_event),
]  # fmt: skip

MEASUREMENTS = (*_INGEST, *_CHECKS, *_PAGES, *_USAGE, _FORWARDING, _ANALYTICS, _RETENTION, *_RESOURCES)
SERVED = tuple(each for each in MEASUREMENTS if each not in _CHECKS)  # by a server process
