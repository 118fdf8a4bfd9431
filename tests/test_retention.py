"""Keeping less: `serve --retain-days` and `eventstore prune`."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import re
import shlex
import signal
import sqlite3
import threading
from argparse import Namespace
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from starlette.applications import Starlette
from starlette.testclient import TestClient

import eventstore
from eventstore import Row, Settings, create_app
from eventstore_extras import forward, retention, sending
from eventstore_extras.mock import running_server
from forked import Command, changed, forked
from helpers import (
    DAY_US,
    EVER,
    KEY,
    KEYS,
    NOW,
    Live,
    at,
    becomes,
    command_line,
    counts,
    database,
    event,
    eventually,
    ids,
    page,
    refusal,
    rows_of,
    store,
    table,
)

Patch = pytest.MonkeyPatch
ENVIRONMENTS = ("development", "staging")
HOUR_US = 3_600_000_000


def stored(folder: Path, ingested: list[tuple[int, int]]) -> str:
    """Make a database of these events, (environment, ingested_at_us). The id of each is its index."""
    path = str(folder / "events.db")
    eventstore.prepare_file(path)
    with closing(eventstore.connect(path)) as conn:
        for name in ENVIRONMENTS:
            eventstore.environment_number(conn, name)
        rows = [Row(environment, f"{number:05}", "cust", "", "call", "", NOW + number, time_us, "{}")
                for number, (environment, time_us) in enumerate(ingested)]  # fmt: skip
        eventstore.insert_events(conn, rows, 5)
    return path


def progress(path: str, target: str, environment: str, seq: int) -> Path:
    """Write a progress file that says that every event up to seq was forwarded, and return its path."""
    file = forward.forward_progress_path(path, target, environment)
    sending.ProgressFile(file, forward.ForwardProgress(target=target, environment=environment, seq=seq)).save()
    return file


def sweep(path: str, conn: sqlite3.Connection, expired: retention.Expired, thorough: bool = True) -> int:
    """Delete the expired events and return how many they were."""
    sweep = retention.Sweep(path, retention.DatabaseFile(conn), expired)
    asyncio.run(sweep.run(thorough))
    return sweep.deleted


def kept_ids(folder: Path) -> list[str]:
    return [row[1] for row in rows_of(folder)]


class Clock:
    """A wall clock and a monotonic clock."""

    def __init__(self, us: int = NOW) -> None:
        self.ahead_us = us  # the wall clock minus the monotonic clock
        self.monotonic_us = 0
        self.reads = 0

    @property
    def us(self) -> int:
        return self.ahead_us + self.monotonic_us

    def read(self) -> int:
        self.reads += 1
        return self.us

    def wait_until_read(self) -> None:
        """Wait until retention, whose loop reads it at least once a round, has seen the present time and acted on it."""
        reads = self.reads
        eventually(lambda: self.reads > reads + 2)


@pytest.fixture
def clock(monkeypatch: Patch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(retention, "monotonic_us", lambda: clock.monotonic_us)
    return clock


@contextmanager
def retaining(
    folder: Path, days: float, clock: Clock, outbox: str = "", delete_unforwarded: bool = False
) -> Iterator[httpx.Client]:
    """Yield a client of an application that keeps events for this many days. It may claim to forward an environment."""
    app = create_app(Settings(db=str(folder / "events.db"), api_keys=KEYS, clock=clock.read))
    if outbox:
        app.state.service.outboxes[outbox] = eventstore.Outbox("host", nothing_behind)
    retention.attach(app.state.service, Namespace(retain_days=days, delete_unforwarded=delete_unforwarded), None)
    with TestClient(app, headers={"x-api-key": KEY}) as client:
        yield client


async def nothing_behind() -> int:
    return 0


@pytest.fixture(autouse=True)
def _short_intervals(monkeypatch: Patch) -> None:
    monkeypatch.setattr(retention, "CLOCK_INTERVAL_S", 0.005)


# ---------------------------------------------------------------------------------------------- which events are deleted


@pytest.mark.slow
@table("seed", range(12))
def test_a_sweep_deletes_exactly_the_old_events_that_all_targets_accepted(
    tmp_path: Path, monkeypatch: Patch, seed: int
) -> None:
    choose = random.Random(seed)
    monkeypatch.setattr(retention, "SPAN", choose.choice([7, 100, 100_000]))
    monkeypatch.setattr(retention, "MAX_ROWS", choose.choice([1, 10, 1000]))
    monkeypatch.setattr(retention, "MIN_ROWS", 1)
    # Later events were stored later, except imported ones.
    ingested = [
        (choose.choice([1, 2]), NOW + number * 1000 - choose.choice([0, 0, 0, 500, 5000, DAY_US]))
        for number in range(500)
    ]
    path, before_us = stored(tmp_path, ingested), NOW + 250_000
    sent = {environment: choose.choice([None, 0, 100, 300, 500]) for environment in (1, 2)}
    for environment, seq in sent.items():
        if seq is not None:
            progress(path, "http://one", ENVIRONMENTS[environment - 1], seq)
            progress(path, "http://two", ENVIRONMENTS[environment - 1], min(seq + 50, 500))
    progress(path, "http://one", "an environment without events", 0)
    expired = retention.Expired(before_us, forward.read_all_forward_progress(path))
    with closing(eventstore.connect(path)) as conn:
        deleted = sweep(path, conn, expired)
    kept = [
        f"{number:05}"
        for number, (environment, time_us) in enumerate(ingested)
        if time_us >= before_us or ((seq := sent[environment]) is not None and number + 1 > seq)
    ]
    assert kept_ids(tmp_path) == kept
    assert deleted == 500 - len(kept)


def test_only_a_thorough_sweep_continues_after_a_span_without_old_events(tmp_path: Path, monkeypatch: Patch) -> None:
    monkeypatch.setattr(retention, "SPAN", 10)
    old, young = (1, NOW - 2 * DAY_US), (1, NOW)
    path = stored(tmp_path, [*[old] * 25, *[young] * 30, *[old] * 5])
    expired = retention.Expired(NOW - DAY_US, ())
    with closing(eventstore.connect(path)) as conn:
        for thorough, first, number in ((False, 25, 35), (True, 25, 30)):
            sweep(path, conn, expired, thorough)
            left = [name for (name,) in conn.execute("SELECT id FROM events ORDER BY seq")]
            assert (left[0], len(left)) == (f"{first:05}", number)


def test_a_server_deletes_old_events_at_its_start_and_every_hour(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    stored(tmp_path, [(1, NOW - 40 * DAY_US), (2, NOW - 31 * DAY_US), (1, NOW - 29 * DAY_US)])
    with retaining(tmp_path, 30, clock) as client:
        eventually(lambda: page(client, "POST", **EVER)["total_count"] == 1)
        told = "retention: deleted 2 events, stored before 2025-09-15T11:38:47.962000Z"
        eventually(lambda: told in caplog.text)
        clock.monotonic_us += DAY_US + HOUR_US // 2
        store(client, event("new"))
        eventually(lambda: ids(client, "POST", **EVER) == ["new"])
        assert counts(store(client, event("00000"), event("new"))) == (1, 1)  # a deleted id is free again
        clock.monotonic_us += HOUR_US - 1
        clock.wait_until_read()
        assert sorted(ids(client, "POST", **EVER)) == ["00000", "new"]


def test_retention_shows_what_it_deleted_and_does_not_wait_behind_queries(tmp_path: Path, clock: Clock) -> None:
    stored(tmp_path, [(1, NOW - 40 * DAY_US), (2, NOW - 31 * DAY_US), (1, NOW - 29 * DAY_US)])
    service = create_app(Settings(db=str(tmp_path / "events.db"), api_keys=KEYS, clock=clock.read)).state.service
    retention.attach(service, Namespace(retain_days=30, delete_unforwarded=False), None)
    done = service.retention
    assert (done.deleted, done.swept_us) == (0, 0)

    async def watch() -> None:
        release = threading.Event()
        queries = [asyncio.create_task(service.store.read(lambda _: release.wait(30), quick=False))
                   for _ in range(2 * eventstore.READER_THREADS)]  # fmt: skip
        async with service.lifespan(Starlette()):
            await becomes(lambda: (done.deleted, done.swept_us) == (2, NOW))
            assert not any(query.done() for query in queries)
            release.set()
            assert all(await asyncio.gather(*queries))

    asyncio.run(watch())


@table("order", ["asc", "desc"])
def test_paging_continues_after_the_events_of_earlier_pages_were_deleted(
    tmp_path: Path, clock: Clock, order: str
) -> None:
    path = stored(tmp_path, [(1, NOW - 2 * DAY_US)] * 60 + [(1, NOW)] * 40)
    with retaining(tmp_path, 365, clock) as client:
        query = EVER | {"order": order, "page_size": 30}
        first = page(client, "POST", **query)
        if order == "desc":
            first = page(client, "POST", **query, iter_last_key=first["iter_last_key"])  # 00040 to 00069
        with closing(eventstore.connect(path)) as conn:
            sweep(path, conn, retention.Expired(NOW - DAY_US, ()))
        following = page(client, "POST", **query, iter_last_key=first["iter_last_key"])
        assert following["total_count"] == 40
        expected = [f"{number:05}" for number in range(60, 90)] if order == "asc" else []
        assert [one["id"] for one in following["events"]] == expected
        assert following["has_more"] is (order == "asc")
        assert client.get("/v1/events/monitoring", params={"start_time": at(), "end_time": at(100)}).json()["total_count"] == 40  # fmt: skip
        answer = client.post("/v1/events/usage", json={"event_name": "call", "aggregation_type": "COUNT", "start_time": at(), "end_time": at(100)})  # fmt: skip
        assert answer.json()["value"] == 40


@pytest.mark.slow
@table("deletes_unforwarded", [False, True])
def test_no_event_is_deleted_before_the_target_accepts_it(
    tmp_path: Path, clock: Clock, monkeypatch: Patch, deletes_unforwarded: bool
) -> None:
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)
    app = create_app(Settings(db=str(tmp_path / "events.db"), api_keys=KEYS, clock=clock.read))
    service = app.state.service
    with running_server() as target:
        target.fail(status=503, times=1_000_000)
        to = sending.Target(target.url, sending.Key(target.api_key, "the test"), "forward_to")
        forwarder = forward.forward(service, to, "development", 0.01)
        retention.attach(service, Namespace(retain_days=1, delete_unforwarded=deletes_unforwarded), None)
        with TestClient(app, headers={"x-api-key": KEY}) as client:
            store(client, *[event(f"{number}") for number in range(10)])
            client.post("/v1/events", json=event("other"), headers={"x-api-key": "key-of-staging"})
            others = [] if deletes_unforwarded else ["other"]  # of an environment that is not forwarded
            for _ in range(3):
                clock.monotonic_us += 2 * DAY_US
                clock.wait_until_read()
                eventually(lambda: kept_ids(tmp_path) == [*map(str, range(10)), *others])
            target.reset()
            eventually(lambda: forwarder.lag_now() == 0 and forwarder.is_saved)
            clock.monotonic_us += HOUR_US
            eventually(lambda: kept_ids(tmp_path) == others)
            assert len(target.events()) == 10


def test_a_failed_sweep_is_logged_and_repeated_an_hour_later(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, [(1, NOW - 2 * DAY_US)] * 3)
    with database(tmp_path) as conn:
        conn.execute("CREATE TRIGGER full BEFORE DELETE ON events BEGIN SELECT RAISE(ABORT, 'full'); END")
    with retaining(tmp_path, 1, clock) as client:
        eventually(lambda: "retention: the database refused the write" in caplog.text)
        with database(tmp_path) as conn:
            conn.execute("DROP TRIGGER full")
        store(client, event("new"))
        assert page(client, "POST", **EVER)["total_count"] == 4
        clock.monotonic_us += HOUR_US
        eventually(lambda: ids(client, "POST", **EVER) == ["new"])
    assert caplog.text.count("the next try is in an hour") == 1


@pytest.mark.slow
def test_the_file_stops_growing_under_a_steady_load(tmp_path: Path) -> None:
    path, sizes = stored(tmp_path, []), []
    choose = random.Random(7)
    with closing(eventstore.connect(path)) as conn:
        for day in range(40):
            rows = [Row(1, f"{choose.getrandbits(128):032x}", f"cust{number % 99}", "", "call", "", NOW + day * DAY_US, NOW + day * DAY_US, "{}")
                    for number in range(2000)]  # fmt: skip
            eventstore.insert_events(conn, rows, 5)
            expired = retention.Expired(NOW + (day - 5) * DAY_US, ())
            sweep(path, conn, expired, thorough=False)
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            sizes.append(os.path.getsize(path))
        assert conn.execute("SELECT count(*) FROM events").fetchone()[0] == 6 * 2000
    assert max(sizes[20:]) <= 1.1 * max(sizes[6:20])


# ---------------------------------------------------------------------------------------------- what is not forwarded

OLD = NOW - 40 * DAY_US


@table(
    ("delete_unforwarded", "kept", "note"),
    [
        (False, ["00001", "00002", "00003"], '; keeps 2 events of "staging", not forwarded; --delete-unforwarded deletes these'),
        (True, ["00003"], ""),
    ],
)  # fmt: skip
def test_only_a_flag_lets_retention_delete_environments_that_are_not_forwarded(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, delete_unforwarded: bool, kept: list[str], note: str
) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    path = stored(tmp_path, [(1, OLD), (2, OLD), (2, OLD), (1, NOW)])
    progress(path, "http://host/v1", "development", 4)
    with retaining(tmp_path, 30, clock, outbox="development", delete_unforwarded=delete_unforwarded):
        eventually(lambda: "retention: deleted" in caplog.text)
    (line,) = [record.message for record in caplog.records if "retention: deleted" in record.message]
    deleted = eventstore.plural(4 - len(kept), "event")
    assert line == f"retention: deleted {deleted}, stored before 2025-09-15T11:38:47.962000Z{note}"
    assert kept_ids(tmp_path) == kept


def test_the_log_says_once_why_old_events_stay(tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    path = stored(tmp_path, [(1, OLD), (1, OLD), (2, OLD), (1, 7), (1, NOW)])
    progress(path, "http://host/v1", "development", 1)
    with retaining(tmp_path, 30, clock, outbox="development"):
        for _ in range(3):
            clock.wait_until_read()
            clock.monotonic_us += HOUR_US
        clock.wait_until_read()
    (line,) = [record.message for record in caplog.records if record.message.startswith("retention: deleted")]
    assert "; keeps 1 event of that time until accepted by http://host/v1 (if nothing is forwarded there" in line
    assert '; keeps 1 event of "staging", not forwarded; ' in line
    assert "; keeps 1 event stored while the clock was before 2024, and so wrong" in line
    assert kept_ids(tmp_path) == ["00001", "00002", "00003", "00004"]


def test_nothing_is_deleted_if_the_progress_file_of_the_forwarded_environment_is_missing(
    tmp_path: Path, clock: Clock
) -> None:
    stored(tmp_path, [(1, OLD), (2, OLD)])
    with retaining(tmp_path, 30, clock, outbox="development"):
        clock.wait_until_read()
    assert kept_ids(tmp_path) == ["00000", "00001"]


def test_old_events_of_other_environments_are_deleted_behind_many_that_wait_for_the_target(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(retention, "SPAN", 10)
    path = stored(tmp_path, [*[(1, OLD)] * 35, *[(2, OLD)] * 5, *[(1, OLD)] * 20, *[(2, OLD)] * 5, *[(2, NOW)] * 20])
    progress(path, "http://host/v1", "development", 0)
    expired = retention.Expired(NOW - DAY_US, forward.read_all_forward_progress(path))
    with closing(eventstore.connect(path)) as conn:
        assert sweep(path, conn, expired, thorough=False) == 10
    assert kept_ids(tmp_path) == [f"{number:05}" for number in [*range(35), *range(40, 60), *range(65, 85)]]


def test_a_running_server_deletes_other_environments_old_events_while_the_target_is_down(
    tmp_path: Path, clock: Clock, monkeypatch: Patch
) -> None:
    monkeypatch.setattr(retention, "SPAN", 10)
    path = stored(tmp_path, [*[(1, NOW)] * 30, (2, NOW)])
    progress(path, "http://host/v1", "development", 0)
    with retaining(tmp_path, 1, clock, outbox="development", delete_unforwarded=True):
        clock.wait_until_read()
        clock.monotonic_us += 2 * DAY_US
        eventually(lambda: kept_ids(tmp_path) == [f"{number:05}" for number in range(30)])


# ---------------------------------------------------------------------------------------------- clocks

JUMPED = "retention: the clock jumped ahead by 400 days; deleting by the new time is suspended"


@table("by_us", [400 * DAY_US, 40 * DAY_US, 2 * DAY_US])
def test_a_jump_of_the_clock_deletes_nothing_and_is_logged(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, by_us: int
) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    stored(tmp_path, [(1, NOW - number * HOUR_US) for number in range(23, -1, -1)])
    with retaining(tmp_path, 1, clock) as client:
        clock.wait_until_read()
        clock.ahead_us += by_us
        store(client, event("while the clock is wrong"))
        for _ in range(3):
            clock.monotonic_us += 1_000_000
            clock.wait_until_read()
        clock.ahead_us -= by_us
        clock.wait_until_read()
        clock.monotonic_us += HOUR_US - 4_000_000
        store(client, event("new"))
        clock.wait_until_read()
    assert len(kept_ids(tmp_path)) == 26
    messages = [record.message for record in caplog.records if record.message.startswith("retention: the clock")]
    assert messages == [
        f"retention: the clock jumped ahead by {by_us // DAY_US} days; deleting by the new time is suspended until it is "
        "set back or the server is restarted",
        "retention: the clock is right again; nothing was deleted by the wrong time",
    ]


def test_retention_continues_with_the_time_before_a_jump_that_stays(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, [(1, NOW), (1, NOW + 12 * HOUR_US)])
    with retaining(tmp_path, 1, clock):
        clock.wait_until_read()
        clock.ahead_us += 400 * DAY_US
        for _ in range(23):
            clock.monotonic_us += HOUR_US
            clock.wait_until_read()
        assert len(kept_ids(tmp_path)) == 2
        clock.monotonic_us += 2 * HOUR_US
        eventually(lambda: kept_ids(tmp_path) == ["00001"])
    assert caplog.text.count(JUMPED) == 1


def test_small_corrections_of_the_clock_are_believed(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, [(1, NOW)])
    with retaining(tmp_path, 1, clock):
        for _ in range(20):
            clock.ahead_us += 50_000_000
            clock.wait_until_read()
        clock.monotonic_us += DAY_US - 15 * 60 * 1_000_000  # a day later only with the corrections
        eventually(lambda: kept_ids(tmp_path) == [])
    assert "clock" not in caplog.text


@table("is_restarted", [False, True])
@table("wrong_us", [0, 30 * 365 * DAY_US], ids=["1970", "2000"])
def test_an_event_stored_while_the_clock_was_at_1970_stays_once_the_clock_is_right(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, wrong_us: int, is_restarted: bool
) -> None:
    caplog.set_level(logging.INFO, "eventstore")
    stored(tmp_path, [(1, NOW - 31 * DAY_US), (1, NOW - DAY_US)])
    clock.ahead_us = wrong_us
    with retaining(tmp_path, 30, clock) as client:
        store(client, event("early"))
        clock.wait_until_read()
        if not is_restarted:
            clock.ahead_us = NOW
            clock.wait_until_read()
            clock.monotonic_us += HOUR_US
            eventually(lambda: kept_ids(tmp_path) == ["00001", "early"])
            assert "retention: the clock, which was behind, was corrected by " in caplog.text
    clock.ahead_us = NOW
    with retaining(tmp_path, 30, clock):
        clock.wait_until_read()
        eventually(lambda: kept_ids(tmp_path) == ["00001", "early"])
        eventually(lambda: "; keeps 1 event stored while the clock was before 2024, and so wrong" in caplog.text)


def test_a_clock_set_back_deletes_nothing_and_a_later_jump_ahead_is_not_believed(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, [(1, NOW)])
    with retaining(tmp_path, 1, clock):
        for ahead_us in (-10 * DAY_US, 20 * DAY_US):
            clock.wait_until_read()
            clock.ahead_us += ahead_us
            clock.wait_until_read()
            clock.monotonic_us += HOUR_US
            clock.wait_until_read()
    assert kept_ids(tmp_path) == ["00000"]
    assert "retention: the clock was set back by 10 days" in caplog.text


SUSPENDED = "retention: suspended, because "


@table(("old", "new", "is_suspended"), [(1001, 0, True), (1001, 1000, True), (1001, 1003, False), (1000, 0, False)])
def test_the_first_sweep_asks_for_prune_before_it_deletes_most_of_the_file(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture, old: int, new: int, is_suspended: bool
) -> None:
    path = stored(tmp_path, [*[(1, NOW - 2 * DAY_US)] * old, *[(1, NOW)] * new])
    with retaining(tmp_path, 1, clock) as client:
        if not is_suspended:
            eventually(lambda: len(kept_ids(tmp_path)) == new)
            assert SUSPENDED not in caplog.text
            return
        eventually(lambda: SUSPENDED in caplog.text)
        assert (
            f"{SUSPENDED}it would delete {old:,} of {old + new:,} events at once; if the clock is right" in caplog.text
        )
        (command,) = re.findall(r"run: eventstore (prune .+)", caplog.text)
        clock.monotonic_us += HOUR_US
        clock.wait_until_read()
        assert len(kept_ids(tmp_path)) == old + new
        assert command_line(*shlex.split(command)) == 0
        assert len(kept_ids(tmp_path)) == new
        store(client, *[event(f"new {number}") for number in range(1000)])
        clock.monotonic_us += HOUR_US
        clock.wait_until_read()
        clock.monotonic_us += 2 * DAY_US  # the clock has agreed with the events: more than half may be deleted
        eventually(lambda: kept_ids(tmp_path) == [])
    assert command.endswith(f"--db {path} --before 2025-10-14T11:38:47.962000Z")


def test_a_start_with_a_clock_far_ahead_of_the_newest_event_asks_for_prune(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    stored(tmp_path, [(1, NOW), (1, 0)])
    clock.ahead_us += 400 * DAY_US
    with retaining(tmp_path, 30, clock) as client:
        eventually(lambda: SUSPENDED in caplog.text)
        store(client, event("new"))
        clock.monotonic_us += HOUR_US
        clock.wait_until_read()
        eventually(lambda: caplog.text.count(SUSPENDED) == 2)
    assert f"{SUSPENDED}the newest event was stored 400 days ago by this clock" in caplog.text
    assert kept_ids(tmp_path) == ["00000", "00001", "new"]


def test_prune_keeps_events_stored_while_the_clock_was_wrong_unless_it_names_such_a_time(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = stored(tmp_path, [(1, NOW), (1, 7), (1, NOW)])
    for before, kept, note in (
        ("2025-10-16T00:00:00Z", ["00001"], "; keeps 1 event stored while the clock was before 2024, and so wrong\n"),
        ("2023-01-01T00:00:00Z", [], " s\n"),
    ):
        assert command_line("prune", "--db", path, "--before", before) == 0
        assert capsys.readouterr().err.endswith(note)
        assert kept_ids(tmp_path) == kept


# ---------------------------------------------------------------------------------------------- flags and prune


@pytest.mark.slow
def test_the_banner_says_how_long_events_are_kept_and_0_days_are_refused(tmp_path: Path) -> None:
    for days, said in (("0.5", "0.5 days"), ("1", "1 day")):
        with Live(tmp_path, "--retain-days", days, "--api-key", KEY) as live:
            assert f"\n  keeps        events for {said} after they were stored\n" in live.banner
            assert live.stop() == 0
    for days in ("0", "-1", "x"):
        done = refusal(tmp_path, "serve", "--port", "0", "--retain-days", days)
        assert done.returncode == 2
        assert "--retain-days: must be a number greater than 0" in done.stderr
    Path(progress(str(tmp_path / "events.db"), "http://x", "development", 0)).write_text("{")
    done = refusal(tmp_path, "serve", "--port", "0", "--retain-days", "1")
    assert (done.returncode, done.stdout) == (2, "")
    assert "cannot read the progress in" in done.stderr
    with Live(tmp_path / "long", "--retain-days", "1000000000", "--api-key", KEY) as live, live.client() as client:
        assert "\n  keeps        events for 1,000,000,000 days after they were stored\n" in live.banner
        store(client, event())
        assert live.stop() == 0
        assert "retention" not in live.log


def test_a_target_that_no_longer_receives_events_is_logged_because_events_are_kept_for_it(
    tmp_path: Path, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    path = stored(tmp_path, [(1, NOW - 2 * DAY_US)] * 3)
    file = progress(path, "https://old/v1", "development", 1)
    with retaining(tmp_path, 1, clock):
        eventually(lambda: len(kept_ids(tmp_path)) == 2)
    (line,) = [record.message for record in caplog.records if "does not forward to" in record.message]
    assert (
        "https://old/v1, and keeps the events not accepted there; if nothing is forwarded there any more, "
        f"remove {file}" in line
    )
    file.unlink()
    caplog.clear()
    with retaining(tmp_path, 1, clock):
        eventually(lambda: kept_ids(tmp_path) == [])
    assert "does not forward to" not in caplog.text


@table(
    ("flags", "part"),
    [
        ("--before yesterday", '--before must be RFC 3339 with a zone, got "yesterday"'),
        ("--before 2999-01-01T00:00:00Z", "--before 2999-01-01T00:00:00Z is in the future"),
        ("--before 2025-01-01T00:00:00Z --db none.db", "there is no database none.db"),
        ("", "--before"),
    ],
)
def test_prune_says_why_it_cannot_start(tmp_path: Path, flags: str, part: str) -> None:
    stored(tmp_path, [(1, NOW)])
    done = refusal(tmp_path, "prune", *flags.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.db"]


@pytest.mark.slow
def test_prune_says_how_many_events_it_deleted_and_kept(tmp_path: Path) -> None:
    path = stored(tmp_path, [(1, NOW), (2, NOW + 1), (1, NOW + 2), (1, NOW + 3), (1, NOW + DAY_US)])
    file = progress(path, "https://host/v1", "development", 1)
    waiting = "keeps 2 events of that time until accepted by https://host/v1 (if nothing is forwarded there any more"
    other = '; keeps 1 event of "staging", not forwarded; --delete-unforwarded deletes these'

    def pruned(number: int, notes: str, *flags: str) -> list[str]:
        done = forked(tmp_path, "prune", "--before", "2025-10-16T00:00:00Z", *flags)
        assert (done.returncode, done.stdout) == (0, "")
        did = "would delete" if "--dry-run" in flags else "deleted"
        events = eventstore.plural(number, "event")
        start = f"eventstore: {did} {events} stored before 2025-10-16T00:00:00Z from events.db; "
        assert re.fullmatch(re.escape(start) + r"[\d.]+ s" + re.escape(notes) + "\n", done.stderr), done.stderr
        return kept_ids(tmp_path)

    waiting = f"; {waiting}, remove {file})"
    assert len(pruned(1, waiting + other, "--dry-run")) == 5
    assert len(pruned(2, waiting, "--dry-run", "--delete-unforwarded")) == 5
    assert pruned(1, waiting + other) == ["00001", "00002", "00003", "00004"]
    assert pruned(1, waiting, "--delete-unforwarded") == ["00002", "00003", "00004"]
    file.unlink()
    assert pruned(2, "") == ["00004"]


@pytest.mark.slow
def test_prune_does_not_disturb_a_server_under_load(tmp_path: Path) -> None:
    stored(tmp_path, [(1, NOW - DAY_US)] * 20_000)
    stop, statuses = threading.Event(), set[int]()
    sent: list[str] = []

    def send(client: httpx.Client, name: str) -> None:
        while not stop.is_set():
            batch = [f"{name}-{len(sent)}-{number}" for number in range(20)]
            statuses.add(client.post("/v1/events/bulk", json={"events": [event(one) for one in batch]}).status_code)
            sent.extend(batch)

    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        threads = [threading.Thread(target=send, args=(client, name)) for name in "ab"]
        for thread in threads:
            thread.start()
        try:
            done = forked(tmp_path, "prune", "--before", "2025-10-15T11:00:00Z")
        finally:
            stop.set()
            for thread in threads:
                thread.join()
        assert done.returncode == 0, done.stderr
        assert done.stderr.startswith("eventstore: deleted 20,000 events stored before")
        assert live.stop() == 0
    assert statuses == {202}
    assert kept_ids(tmp_path) == sorted(sent)


# Many small transactions: the signal arrives before the last one, even on a busy machine.
IN_SMALL_STEPS = changed("retention", MAX_ROWS=100)


@pytest.mark.slow
@table("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_prune_says_how_many_events_it_deleted_and_can_continue(
    tmp_path: Path, number: signal.Signals
) -> None:
    stored(tmp_path, [(1, NOW)] * 30_000)
    flags = ("prune", "--before", "2025-10-16T00:00:00Z")
    command = Command(tmp_path, *flags, code=IN_SMALL_STEPS)

    def left() -> int:
        with database(tmp_path) as conn:
            return int(conn.execute("SELECT count(*) FROM events").fetchone()[0])

    eventually(lambda: left() < 30_000)
    command.process.send_signal(number)
    done = command.end()
    remaining = left()
    assert done.returncode == 1, done.stderr
    assert (
        done.stderr
        == f"eventstore: interrupted; {30_000 - remaining:,} events deleted; the same command continues from there\n"
    )
    assert 0 < remaining < 30_000
    done = forked(tmp_path, *flags)
    assert f"deleted {remaining:,} events" in done.stderr
    assert json.dumps(kept_ids(tmp_path)) == "[]"
