"""Kills, full and failing disks, locks, damaged files, floods and signals: acknowledged requests survive them.

CONTRIBUTING.md says how to run more rounds. Everything random derives from one seed, which is printed.
"""

from __future__ import annotations

import http.client
import itertools
import json
import os
import random
import re
import selectors
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import Mock

import httpx
import pytest

import eventstore
from forked import changed
from helpers import (
    BODY,
    DAY_US,
    EVER,
    KEY,
    NOW,
    POST,
    SCRIPT,
    Json,
    Live,
    answer_on,
    ask,
    at,
    counts,
    database,
    event,
    eventually,
    feature_of,
    free_port,
    ids,
    is_root,
    meter_of,
    metering,
    page,
    posting,
    python,
    refuse_to_write,
    refused,
    rows_of,
    rows_to_insert,
    run,
    serving,
    store,
    store_of,
    stores_nothing,
    table,
    total,
    usage,
    write_lock,
)
from oracle import cursor

# ---------------------------------------------------------------------------------------------- commits


def test_a_failed_commit_is_a_500_that_stores_nothing_and_the_next_commit_works(
    client: httpx.Client, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store(client, event("before"))
    refuse_to_write(tmp_path, "new.event_name = 'boom'")
    boom = event("boom", event_name="boom")
    for path, body in (("/v1/events", boom), ("/v1/events/bulk", {"events": [event("good"), boom, event("before")]})):
        caplog.clear()
        with stores_nothing(client):
            response = client.post(path, json=body)
            refused(response, 500, "database_error")
        assert "IntegrityError: full" in caplog.text  # the cause goes to the log, not to the caller
        assert "full" not in response.text
    assert counts(store(client, event("good"), event("before"))) == (1, 1)


class FailsOnce:
    """A connection whose first statement that begins with `start` fails, as if memory had run out."""

    def __init__(self, conn: sqlite3.Connection, start: str) -> None:
        self._conn, self._start = conn, start

    def __getattr__(self, name: str) -> Any:
        return getattr(self._conn, name)

    def execute(self, statement: str, *values: Any) -> sqlite3.Cursor:
        if self._start and statement.startswith(self._start):
            self._start = ""
            raise sqlite3.OperationalError("out of memory")
        return self._conn.execute(statement, *values)


def test_events_that_cannot_be_counted_after_their_commit_are_acknowledged(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        store(client, event("known"))
        with closing(eventstore.connect(str(tmp_path / "events.db"))) as conn:
            failing: Any = FailsOnce(conn, eventstore.SELECT_NEW_IDS)
            assert eventstore.insert_group(failing, [rows_to_insert("known"), rows_to_insert("new", "new")]) == [1, 1]
        assert sorted(ids(client)) == ["known", "new"]


def test_after_a_failed_rollback_no_event_joins_the_open_transaction(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        writer: Any = store_of(client).writer
        writer._conn = FailsOnce(writer._conn, "ROLLBACK")
        refuse_to_write(tmp_path, "new.id = '200'")
        response = client.post("/v1/events/bulk", json={"events": [event(f"{number}") for number in range(300)]})
        refused(response, 500, "database_error")
        assert writer._conn.in_transaction
        assert counts(store(client, event("after"))) == (1, 0)
        assert ids(client) == ["after"]
    assert [row[1] for row in rows_of(tmp_path)] == ["after"]


def test_a_failed_commit_refuses_all_of_its_requests_and_no_others(tmp_path: Path) -> None:
    clock, later = Mock(return_value=NOW), [f"{number}" for number in range(40)]
    with serving(tmp_path, clock=clock) as client, ThreadPoolExecutor(41) as pool:

        def send(event_id: str) -> Future[httpx.Response]:
            return pool.submit(client.post, "/v1/events", json=event(event_id))

        refuse_to_write(tmp_path, "new.id = '20'")
        with write_lock(tmp_path):  # the first commit waits for it; the others wait for the first, and share a commit
            answers = {"first": send("first")}
            eventually(lambda: clock.call_count == 1)
            answers |= {event_id: send(event_id) for event_id in later}
            eventually(lambda: clock.call_count == 41)
        stored = {event_id for event_id, answer in answers.items() if answer.result().status_code == 202}
        for event_id in answers.keys() - stored:
            refused(answers[event_id].result(), 500, "database_error")
        assert set(ids(client)) == stored
        assert ("first" in stored, "20" in stored) == (True, False)
        assert len(stored) < 40  # some shared the commit of event 20
        retried = [event(event_id) for event_id in answers.keys() - stored - {"20"}]
        assert counts(store(client, *retried)) == (len(retried), 0)


def test_a_full_queue_is_a_503_while_reads_continue(tmp_path: Path) -> None:
    clock = Mock(return_value=NOW)
    with serving(tmp_path, queue_events=3, clock=clock) as client, ThreadPoolExecutor(3) as pool:
        with write_lock(tmp_path):
            waiting = [pool.submit(client.post, "/v1/events", json=event(f"{number}")) for number in range(3)]
            eventually(lambda: clock.call_count == 3)
            for path in ("/v1/events", "/v1/events/bulk"):
                response = client.post(path, json={"events": [event("late")], **event("late")})
                refused(response, 503, "service_unavailable")
                assert int(response.headers["Retry-After"]) > 0
            assert ids(client) == []
            assert client.get("/health").status_code == 200
        assert [answer.result().status_code for answer in waiting] == [202] * 3
        assert counts(store(client, event("late"))) == (1, 0)
        assert sorted(ids(client)) == ["0", "1", "2", "late"]
        assert counts(store(client, *[event()] * 1000)) == (1000, 0)  # more than the limit, but nothing waits


@pytest.mark.slow
def test_a_slow_query_delays_no_other_request_and_beyond_its_time_is_a_503(tmp_path: Path) -> None:
    properties = {f"p{number}": "\\" * 100 for number in range(50)}
    filters = {f"p{number}": ["x", "\\" * 100] if number < 49 else ["x"] for number in range(50)}
    with serving(tmp_path) as client, ThreadPoolExecutor(1) as pool:
        store(client, *[event(f"{number:03}", properties=properties) for number in range(200)])
        slow, meanwhile = pool.submit(ask, client, "POST", property_filters=filters), 0
        while not slow.done():
            assert client.get("/health").status_code == 200
            assert ids(client, page_size=1) == ["199"]
            meanwhile += not slow.done()
        assert (meanwhile > 0, slow.result().json()["events"]) == (True, [])
    with serving(tmp_path, query_timeout_s=0.01) as client:
        response = ask(client, "POST", property_filters=filters)
        refused(response, 503, "service_unavailable", "0.01 s")
        assert int(response.headers["Retry-After"]) > 0
        assert client.get("/health").status_code == 200


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
@table(("path", "body"), [("events", event()), ("events/bulk", {"events": [event()] * 3}), ("meters", meter_of()), ("features", feature_of())],
       ids=["event", "bulk", "meter", "feature"])  # fmt: skip
def test_the_wal_is_synced_between_its_last_write_and_the_answer(
    tmp_path: Path, path: str, body: dict[str, Any]
) -> None:
    """Check the system calls: a kill loses no written data, so it cannot show whether files were synced."""
    trace = tmp_path / "trace.txt"
    calls_to_trace = "trace=pwrite64,fsync,fdatasync,write,writev,sendto,sendmsg"
    strace = ["strace", "-f", "-yy", "-s", "20", "-e", calls_to_trace, "-o", trace]
    if run(*strace, "true").returncode != 0:
        pytest.skip("this process may not trace another")
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        store(client, event("before"))
        tracing = subprocess.Popen([*map(str, strace), "-p", str(live.process.pid)], stderr=subprocess.PIPE, text=True)
        assert tracing.stderr
        assert "attached" in tracing.stderr.readline()
        assert client.post(f"/v1/{path}", json=body).status_code in (201, 202)
        tracing.send_signal(signal.SIGINT)  # it lets go
        tracing.communicate(timeout=30)
    calls = trace.read_text().splitlines()
    (answer,) = [number for number, call in enumerate(calls) if re.search("HTTP/1.1 20[12]", call)]
    wal = [re.findall(r"(pwrite64|fdatasync|fsync)\(", call)[0] for call in calls[:answer] if "events.db-wal" in call]
    assert "pwrite64" in wal
    assert wal[-1] in ("fdatasync", "fsync")


# ---------------------------------------------------------------------------------------------- repeated kills

STORM_KILLS = int(os.environ.get("EVENTSTORE_TEST_STORM", "7"))


def known_event(event_id: str) -> dict[str, Any]:
    """Make an event from its id, a hexadecimal number, so that a stored event can be compared with the one sent."""
    number = int(event_id, 16)
    return event(event_id, event_name=f"name{number % 5}", external_customer_id=f"cust{number % 99}", source="storm",
                 timestamp=at(-(number % DAY_US)), properties={"id": event_id, "filler": "x" * (number % 400)})  # fmt: skip


def known_row(event_id: str) -> tuple[Any, ...]:
    """Return the row that the file has for the same event."""
    sent = known_event(event_id)
    return (1, event_id, sent["event_name"], sent["external_customer_id"], "storm",
            NOW - int(event_id, 16) % DAY_US, json.dumps(sent["properties"]))  # fmt: skip


class Sender:
    """A client that sends events and batches, continues after errors, and keeps a ledger of their ids."""

    def __init__(
        self, start: int, sizes: Sequence[int] = (1, 1, 1, 1, 5, 40, 1000), patience: float = 0.7, features: float = 0
    ):
        self.choose, self.sizes, self.patience = random.Random(start), sizes, patience
        self.features = features  # the share of requests that make a feature and its meter instead of a batch
        self.port, self.stop = 0, threading.Event()
        self.acknowledged: list[str] = []
        self.given_up: list[list[str]] = []  # got no answer and was not sent again: stored whole or not at all
        self.made: list[str] = []  # the features that were acknowledged, by name
        self.deleted: list[str] = []  # those whose deletion was acknowledged
        self.maybe_deleted: list[str] = []  # those whose deletion got no answer
        self.not_made: list[str] = []  # given up
        self.outcomes: Counter[int | None] = Counter()  # None: no answer

    def run(self) -> None:
        while not self.stop.is_set():
            self.turn()

    def turn(self) -> None:
        if self.choose.random() < self.features:
            self.make_a_feature(f"{self.choose.getrandbits(128):032x}")
            return
        batch = [f"{self.choose.getrandbits(128):032x}" for _ in range(self.choose.choice(self.sizes))]
        if self.in_the_end(lambda: self.send(batch)):
            self.acknowledged += batch
            self.look_up(self.choose.choice(self.acknowledged))
        else:
            self.given_up.append(batch)

    def in_the_end(self, accepted: Callable[[], bool]) -> bool:
        """Tries once, or until it is accepted."""
        is_patient, deadline = self.choose.random() < self.patience, time.monotonic() + 60
        while not (done := accepted()) and is_patient:
            assert time.monotonic() < deadline, f"never accepted: {self.outcomes}"
            time.sleep(0.01)
        return done

    def make_a_feature(self, name: str) -> None:
        """Create a feature and its meter; delete some of the features, which archives both."""
        answers: list[tuple[int | None, bytes]] = []

        def accepted() -> bool:
            status, _, content = self.request(
                "POST", "/v1/features", feature_of(name, meter=meter_of("SUM", name=name))
            )
            assert status != 409 or answers, "its name was never sent before"
            answers.append((status, content))
            return status in (201, 409)  # 409: it was made, and the answer was lost

        if not self.in_the_end(accepted):
            self.not_made.append(name)
            return
        self.made.append(name)
        status, content = answers[-1]
        if status == 201 and self.choose.random() < 0.3:
            path = f"/v1/features/{json.loads(content)['id']}"
            self.deleted.append(name) if self.request("DELETE", path)[0] == 200 else self.maybe_deleted.append(name)

    def send(self, batch: list[str]) -> bool:
        events = [known_event(event_id) for event_id in batch]
        path, body = ("/v1/events", events[0]) if len(events) == 1 else ("/v1/events/bulk", {"events": events})
        status, headers, _ = self.request("POST", path, body)
        if status != 202:
            return False
        assert int(headers["X-Events-Inserted"]) in (0, len(batch)), "only a part of the batch was there"
        return True

    def look_up(self, event_id: str) -> None:
        assert self.request("GET", f"/v1/events/{event_id}")[0] != 404, "what was acknowledged is gone"

    def request(self, method: str, path: str, body: object = None) -> tuple[int | None, http.client.HTTPMessage, bytes]:
        with closing(http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)) as connection:
            try:
                connection.request(method, path, json.dumps(body), {"x-api-key": KEY})
                answer = connection.getresponse()
                result: tuple[int | None, http.client.HTTPMessage, bytes] = (
                    answer.status,
                    answer.headers,
                    answer.read(),
                )
            except (OSError, http.client.HTTPException):  # the server is gone, or does not listen yet
                result = None, http.client.HTTPMessage(), b""
                time.sleep(0.05)  # leave the CPU to the next server
        self.outcomes[result[0]] += 1
        return result


@contextmanager
def sending(senders: list[Sender]) -> Iterator[Callable[[], None]]:
    """Run the senders. Provides a function that stops them, after their last batches are acknowledged or given up."""
    with ThreadPoolExecutor(len(senders)) as pool:
        running = [pool.submit(sender.run) for sender in senders]

        def stop() -> None:
            for sender in senders:
                sender.stop.set()
            for each in running:
                each.result()

        try:
            yield stop
        finally:
            for sender in senders:
                sender.stop.set()


def check_ledgers(folder: Path, senders: list[Sender]) -> None:
    """Check that the file has each acknowledged event once and as sent, and otherwise only whole unanswered batches."""
    rows = rows_of(folder)
    stored = [row[1] for row in rows]
    present, acknowledged = set(stored), {event_id for sender in senders for event_id in sender.acknowledged}
    given_up = [set(batch) for sender in senders for batch in sender.given_up]
    assert len(stored) == len(present), "an event is there twice"
    assert acknowledged <= present, f"{len(acknowledged - present)} of {len(acknowledged)} acknowledged are lost"
    assert [batch for batch in given_up if batch & present not in (set(), batch)] == [], "batches in pieces"
    assert present <= acknowledged.union(*given_up), "events that were never sent"
    assert rows == [known_row(event_id) for event_id in stored]


def check_features(folder: Path, senders: list[Sender]) -> None:
    """Check that each acknowledged feature is stored once with its meter, and is archived if it was deleted."""
    with metering(folder) as client:
        features, meters = (every(client, path) for path in ("features", "meters"))
    names = [feature["name"] for feature in features]
    made, not_made, deleted, maybe_deleted = (
        {name for sender in senders for name in getattr(sender, part)}
        for part in ("made", "not_made", "deleted", "maybe_deleted")
    )
    assert len(names) == len(set(names)), "a feature is there twice"
    assert made <= set(names), f"{len(made - set(names))} of {len(made)} acknowledged features are lost"
    assert set(names) <= made | not_made, "features that were never sent"
    assert sorted(feature["meter"]["name"] for feature in features) == sorted(names)
    assert sorted(meter["id"] for meter in meters) == sorted(feature["meter_id"] for feature in features), (
        "half a feature"
    )
    archived = {feature["name"] for feature in features if feature["status"] == "archived"}
    assert deleted <= archived <= deleted | maybe_deleted
    assert archived == {meter["name"] for meter in meters if meter["status"] == "archived"}


def every(client: httpx.Client, path: str) -> list[dict[str, Any]]:
    """Return all meters or features of an environment, oldest first."""
    found: list[dict[str, Any]] = []
    parameters: dict[str, Any] = {"limit": 1000, "order": "asc"}
    while items := client.get(f"/v1/{path}", params={**parameters, "offset": len(found)}).json()["items"]:
        found += items
    return found


@pytest.mark.slow
def test_acknowledged_requests_survive_repeated_kill_9(tmp_path: Path, choose: random.Random) -> None:
    senders = [Sender(choose.getrandbits(64), features=0.2) for _ in range(6)]
    with sending(senders) as stop:
        for kill in range(STORM_KILLS + 1):
            with Live(tmp_path, "--api-key", KEY) as live:
                for sender in senders:
                    sender.port = int(live.port)
                if kill == STORM_KILLS:
                    eventually(lambda: sum(sender.outcomes[201] for sender in senders) > STORM_KILLS)
                    stop()
                else:
                    time.sleep(choose.choice([0, 0.02, 0.2, 0.4, 0.8]) + choose.random() / 5)
                assert live.stop(signal.SIGKILL) == -signal.SIGKILL
            if choose.random() < 0.3:  # the next one dies on its way up, where it recovers the file
                starting = subprocess.Popen([*SCRIPT, "serve", "--port", "0"], cwd=tmp_path, stdout=subprocess.DEVNULL)
                time.sleep(choose.random() * 0.8)
                starting.kill()
                starting.wait()
    outcomes = sum((sender.outcomes for sender in senders), Counter())
    assert set(outcomes) <= {None, 200, 201, 202, 409}
    assert outcomes[None] > STORM_KILLS  # requests were cut off
    check_ledgers(tmp_path, senders)
    check_features(tmp_path, senders)


# ---------------------------------------------------------------------------------------------- full disks, locks, damaged files


class Disk(NamedTuple):
    folder: Path
    fill: Callable[[Live], None]
    free: Callable[[Live], None]


@pytest.fixture(params=["file system", "limit"])
def disk(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Disk]:
    """A disk that a test can fill and free: a file system of 4 MB, or a limit on the size of the server's files."""
    resource = pytest.importorskip("resource", reason="Windows has neither")
    folder = tmp_path / "disk"
    folder.mkdir()
    if request.param == "limit":
        if not hasattr(resource, "prlimit"):
            pytest.skip("only Linux limits another process")

        def limit(live: Live, length: int) -> None:
            with suppress(ProcessLookupError):  # a limit ends with its process
                resource.prlimit(live.process.pid, resource.RLIMIT_FSIZE, (length, resource.RLIM_INFINITY))

        wal = folder / "events.db-wal"
        yield Disk(folder, lambda live: limit(live, wal.stat().st_size + 9000), lambda live: limit(live, -1))
        return
    if not (shutil.which("mount") and run("mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", folder).returncode == 0):
        pytest.skip("mounting a file system takes root")

    def fill(_: Live) -> None:
        with (folder / "filler").open("wb", buffering=0) as filler, suppress(OSError):
            while filler.write(b"x" * 512):
                pass

    try:
        yield Disk(folder, fill, lambda _: (folder / "filler").unlink())
    finally:
        assert run("umount", "--lazy", folder).returncode == 0


def take_turns(sender: Sender, status: int) -> None:
    """Send until more than five requests have got this status."""

    def is_done() -> bool:
        sender.turn()
        return sender.outcomes[status] > 5

    eventually(is_done)


@pytest.mark.slow
def test_a_server_on_a_full_disk_refuses_events_until_there_is_room(tmp_path: Path, disk: Disk) -> None:
    sender = Sender(1, sizes=[1, 1, 20], patience=0)
    with Live(tmp_path, "--api-key", KEY, "--db", str(disk.folder / "events.db")) as live, live.client() as client:
        sender.port = int(live.port)

        def send_until(status: int) -> None:
            sender.outcomes.clear()
            take_turns(sender, status)

        send_until(202)
        disk.fill(live)
        send_until(500)
        refused(client.post("/v1/events/bulk", json={"events": [event()] * 100}), 500, "database_error")
        stored = ids(client, "POST", page_size=1000, source="storm", **EVER)  # reads continue
        assert len(stored) == len(sender.acknowledged)
        disk.free(live)
        send_until(202)
        assert set(sender.outcomes) == {200, 202}
        assert "full" in live.log or "disk I/O error" in live.log  # the cause
        assert live.stop(signal.SIGKILL) == -signal.SIGKILL
    check_ledgers(disk.folder, [sender])


@pytest.mark.slow
def test_a_server_killed_on_a_full_disk_starts_again_when_there_is_room(tmp_path: Path, disk: Disk) -> None:
    flags = ("--api-key", KEY, "--db", str(disk.folder / "events.db"))
    sender = Sender(1, sizes=[20], patience=0)
    with Live(tmp_path, *flags) as live:
        sender.port = int(live.port)
        take_turns(sender, 202)
        disk.fill(live)
        take_turns(sender, 500)
        assert live.stop(signal.SIGKILL) == -signal.SIGKILL
        disk.free(live)
    with Live(tmp_path, *flags) as live:
        sender.port = int(live.port)
        sender.turn()
        assert live.stop() == 0
    check_ledgers(disk.folder, [sender])


# ---------------------------------------------------------------------------------------------- a disk that fails

SYNCS, WRITES = "fsync,fdatasync", "pwrite64"


def failing(calls: str, when: str = "1+", path: Path | None = None) -> list[str]:
    """Return a strace command that fails these system calls with EIO: of each thread, those that `when` selects."""
    if not shutil.which("strace") or run("strace", "true").returncode != 0:
        pytest.skip("needs strace, and the right to trace another process")
    of_path = ["-P", str(path)] if path else []
    injection = f"inject={calls}:error=EIO:when={when}"
    return ["strace", "-f", "-y", *of_path, "-e", f"trace={SYNCS},{WRITES}", "-e", injection]


@contextmanager
def failing_disk(live: Live, calls: str, when: str = "1+") -> Iterator[None]:
    command = [*failing(calls, when), "-o", os.devnull, "-p", str(live.process.pid)]
    tracing = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert tracing.stderr
    assert "attached" in tracing.stderr.readline()
    yield
    tracing.send_signal(signal.SIGINT)  # it lets go
    tracing.communicate(timeout=30)


@pytest.mark.slow
@table("calls", [WRITES, SYNCS])
def test_while_a_disk_fails_requests_are_500s_and_nothing_is_acknowledged(tmp_path: Path, calls: str) -> None:
    batch = [event(f"{number}", source="x" * 100) for number in range(300)]
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        store(client, event("before"))
        with failing_disk(live, calls):
            for path, body in (("/v1/events", event("single")), ("/v1/events/bulk", {"events": batch})) * 2:
                refused(client.post(path, json=body), 500, "database_error")
                assert ids(client) == ["before"]
            assert client.get("/health").json()["reason"] == "the disk answered with an error"
        assert counts(store(client, *batch, event("single"))) == (301, 0)  # by itself
        assert client.get("/health").status_code == 200
        assert live.stop(signal.SIGKILL) == -signal.SIGKILL
    assert len(rows_of(tmp_path)) == 302


def test_events_stored_after_a_failed_sync_are_whole_and_the_refused_ones_are_gone(tmp_path: Path) -> None:
    """The failed commit's frames are still in the WAL. Overwriting their beginning must invalidate all of them."""
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        store(client, event("before"))
        with failing_disk(live, SYNCS, "1"):
            refused(client.post("/v1/events/bulk", json={"events": [event()] * 1000}), 500, "database_error")
            store(client, event("after"))
        assert live.stop(signal.SIGKILL) == -signal.SIGKILL
    assert [row[1] for row in rows_of(tmp_path)] == ["after", "before"]


@pytest.mark.slow
def test_a_start_syncs_what_a_failed_sync_left_before_it_answers(tmp_path: Path) -> None:
    """After a failed sync and a kill, the system can read the WAL, but the disk may lack parts of it."""
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        store(client, event("before"))
        with failing_disk(live, SYNCS):
            refused(client.post("/v1/events", json=event("unsynced")), 500, "database_error")
        assert live.stop(signal.SIGKILL) == -signal.SIGKILL
    copies = [shutil.copytree(tmp_path, tmp_path.parent / f"{tmp_path.name}-{calls}") for calls in (WRITES, SYNCS)]
    for folder, calls in zip(copies, (WRITES, SYNCS), strict=True):
        assert "the disk answered with an error" in refused_to_start(folder, *failing(calls), "-o", os.devnull)
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        assert not (tmp_path / "events.db-wal").stat().st_size  # all of it is in the file
        assert counts(store(client, event("unsynced"))) in ((0, 1), (1, 0))
        assert live.stop() == 0
    assert [row[1] for row in rows_of(tmp_path)] == ["before", "unsynced"]


FAILS_AND_TRIES_AGAIN = """
import sqlite3, sys
conn = sqlite3.connect("events.db", isolation_level=None)
for pragma in ("journal_mode = WAL", "synchronous = FULL", "wal_autocheckpoint = 0"):
    conn.execute(f"PRAGMA {pragma}")
for statement in sys.argv[1:]:
    for _ in range(2):
        try:
            conn.execute(statement)
        except sqlite3.OperationalError as error:
            assert str(error) == "disk I/O error", error
"""


@table(("statement", "name"), [("INSERT INTO numbers SELECT randomblob(3000) FROM numbers", "events.db-wal"),
                               ("PRAGMA wal_checkpoint", "events.db")])  # fmt: skip
def test_sqlite_writes_pages_again_after_a_failed_sync(tmp_path: Path, statement: str, name: str) -> None:
    """After a failed sync the system may consider the pages clean, so a second sync alone proves nothing.

    The server relies on SQLite to write the pages again before it syncs again.
    """
    made = python("import os, sqlite3; conn = sqlite3.connect('events.db', isolation_level=None);"
                  "conn.execute('PRAGMA journal_mode = WAL'); conn.execute('CREATE TABLE numbers (n)');"
                  "conn.execute('INSERT INTO numbers VALUES (randomblob(3000)), (2), (3), (4)'); os._exit(0)",
                  cwd=tmp_path)  # fmt: skip
    assert made.returncode == 0, made.stderr
    command = [*failing(SYNCS, "1", tmp_path / name), "-o", tmp_path / "trace.txt"]
    done = run(*command, sys.executable, "-c", FAILS_AND_TRIES_AGAIN, statement, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    trace = (tmp_path / "trace.txt").read_text()
    failed, again = re.split(r".*sync\(.*EIO.*", trace)
    written, rewritten = (
        re.findall(r"pwrite64\(.*, (\d+), (\d+)\) = \d+", part.partition("sync(")[0]) for part in (failed, again)
    )
    assert written
    assert set(written) <= set(rewritten)


def test_a_lock_of_another_process_is_a_503_for_all_waiting_requests_while_reads_continue(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventstore, "WRITE_LOCK_TIMEOUT_S", 0.5)
    with serving(tmp_path) as client, ThreadPoolExecutor(33) as pool:
        store(client, event("before"))
        with write_lock(tmp_path):  # for longer than a commit waits; the requests are too many for one commit
            many = {"events": [event()] * 1000}
            waiting = [pool.submit(client.post, "/v1/events/bulk", json=many) for _ in range(32)]
            waiting.append(pool.submit(client.post, "/v1/events", json=event("single")))
            assert ids(client) == ["before"]
            eventually(lambda: all(answer.done() for answer in waiting))
            for answer in waiting:
                refused(answer.result(), 503, "service_unavailable", "another process")
                assert int(answer.result().headers["Retry-After"]) > 0
        assert counts(store(client, event("before"), event("after"))) == (1, 1)
        assert ids(client) == ["before", "after"]


def killed_with(folder: Path, *batches: list[dict[str, Any]]) -> None:
    """Store the batches on a server and kill it: the first batch is in the file, the others are only in its WAL."""
    with Live(folder, "--api-key", KEY) as live, live.client() as client:
        for number, batch in enumerate(batches):
            store(client, *batch)
            if number == 0:
                with database(folder) as conn:
                    assert conn.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone() == (0, 0, 0)
        assert live.stop(signal.SIGKILL) == -signal.SIGKILL


def batch_of(name: str) -> list[dict[str, Any]]:
    return [event(f"{name}{number}") for number in range(20)]


def ids_after_a_restart(folder: Path) -> list[str]:
    with Live(folder, "--api-key", KEY) as live, live.client() as client:
        found = sorted(ids(client, "POST", page_size=1000))
        assert counts(store(client, event("new"))) == (1, 0)
        assert (live.stop(), live.log) == (0, "")
    assert len(rows_of(folder)) == len(found) + 1
    return found


@pytest.mark.slow
def test_a_file_without_its_wal_has_the_checkpointed_events(tmp_path: Path) -> None:
    killed_with(tmp_path, batch_of("a"), batch_of("b"))
    (tmp_path / "events.db-wal").unlink()
    assert ids_after_a_restart(tmp_path) == sorted(one["event_id"] for one in batch_of("a"))


@pytest.mark.slow
@table("share", [0.2, 0.5, 0.8, 0.99])
def test_a_wal_that_is_cut_off_has_the_whole_batches_before_the_cut(tmp_path: Path, share: float) -> None:
    names = "abcdefgh"
    killed_with(tmp_path, *map(batch_of, names))
    wal = tmp_path / "events.db-wal"
    os.truncate(wal, int(wal.stat().st_size * share))
    found = ids_after_a_restart(tmp_path)
    kept = len(found) // 20
    assert found == sorted(one["event_id"] for name in names[:kept] for one in batch_of(name))
    assert 1 <= kept < len(names)


def refused_to_start(folder: Path, *prefix: str) -> str:
    """Start a server that must refuse to start; return its one line of error."""
    done = run(*prefix, *SCRIPT, "serve", "--port", "0", cwd=folder)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"eventstore: .+\n", done.stderr)
    return done.stderr


@pytest.mark.slow
@table("share", [0.01, 0.5, 0.99])
def test_a_file_that_was_cut_off_is_refused_at_the_start(tmp_path: Path, share: float) -> None:
    with serving(tmp_path) as client:
        store(client, *[event()] * 1000)
    file = tmp_path / "events.db"
    os.truncate(file, int(file.stat().st_size * share))
    before = file.read_bytes()
    assert "restore it from a copy" in refused_to_start(tmp_path)
    assert file.read_bytes() == before


@pytest.mark.slow
def test_a_file_made_read_only_is_served_until_the_next_start_refuses_it(tmp_path: Path) -> None:
    prefix: tuple[str, ...] = ()
    if is_root:  # root writes into any file, unless that right is taken from it
        prefix = ("setpriv", "--bounding-set=-dac_override")
        if not (shutil.which("setpriv") and run(*prefix, "true").returncode == 0):
            pytest.skip("this root cannot do without its right to write into any file")
    (tmp_path / "data").mkdir()
    file = tmp_path / "data" / "events.db"
    with (
        Live(tmp_path, "--api-key", KEY, "--db", str(file), command=[*prefix, *SCRIPT]) as live,
        live.client() as client,
    ):
        store(client, event("a"))
        for path in (*file.parent.iterdir(), file.parent):
            path.chmod(path.stat().st_mode & ~0o222)
        store(client, event("b"))
        assert ids(client) == ["b", "a"]
        assert live.stop() == 0
    assert "read-only" in refused_to_start(file.parent, *prefix)
    for path in (file.parent, *file.parent.iterdir()):
        path.chmod(path.stat().st_mode | 0o200)
    assert [row[1] for row in rows_of(file.parent)] == ["a", "b"]


@pytest.mark.slow
@table("name", ["events.db", "events.db-wal"])
def test_while_a_file_of_a_running_server_is_missing_writes_are_refused(tmp_path: Path, name: str) -> None:
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        store(client, event("a"))
        (tmp_path / name).rename(tmp_path / "elsewhere")
        for _ in range(2):
            refused(client.post("/v1/events", json=event("b")), 500, "database_error")
        assert "removed or replaced" in live.log
        assert ids(client) == ["a"]
        (tmp_path / "elsewhere").rename(tmp_path / name)
        assert counts(store(client, event("b"))) == (1, 0)
        assert live.stop() == 0
    assert [row[1] for row in rows_of(tmp_path)] == ["a", "b"]


@pytest.mark.slow
def test_a_server_whose_wal_was_removed_writes_it_to_the_file_when_it_stops(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        store(client, *batch_of("a"))
        (tmp_path / "events.db-wal").unlink()
        refused(client.post("/v1/events", json=event("b")), 500, "database_error")
        assert live.stop() == 0
    assert len(rows_of(tmp_path)) == 20


# ---------------------------------------------------------------------------------------------- overload


def peak_memory_bytes(live: Live) -> int:
    status = Path(f"/proc/{live.process.pid}/status")
    if not status.exists():
        pytest.skip("only Linux says how much memory another process took")
    return int(re.findall(r"VmHWM:\s+(\d+) kB", status.read_text())[0]) * 1024


@pytest.mark.slow
def test_requests_beyond_the_queue_are_503s_and_memory_stays_bounded(tmp_path: Path) -> None:
    """Send 150 requests of 1 MiB while nothing can be written; the server may hold 16 MiB."""
    large = {"filler": "x" * 2**20}
    with Live(tmp_path, "--api-key", KEY, "--queue-bytes", str(2**24)) as live, live.client() as client:
        store(client, event("warm", properties=large))
        before = peak_memory_bytes(live)
        with ThreadPoolExecutor(150) as pool:
            with write_lock(tmp_path):
                sent = {
                    f"{number}": pool.submit(request_on, live, event(f"{number}", properties=large))
                    for number in range(150)
                }
                eventually(lambda: sum(answer.done() for answer in sent.values()) >= 130)
                assert ids(client, event_name="none") == []  # reads with small answers continue
            answers = {event_id: answer.result() for event_id, answer in sent.items()}
        assert peak_memory_bytes(live) - before < 2**27
        accepted = {event_id for event_id, answer in answers.items() if answer.status_code == 202}
        assert accepted
        refusals = [answers[event_id] for event_id in answers.keys() - accepted]
        for answer in refusals:
            refused(answer, 503, "service_unavailable")
            assert int(answer.headers["Retry-After"]) > 0
        messages = {answer.json()["message"] for answer in refusals}
        assert any("bytes" in message for message in messages)
        # On a busy machine the requests take longer than 5 s to send. By then those in the queue have failed.
        assert all("bytes" in message or "has locked the database" in message for message in messages)
        for event_id in answers:  # the server works again
            assert counts(store(client, event(event_id))) == ((0, 1) if event_id in accepted else (1, 0))
        assert live.stop() == 0


def request_on(live: Live, one: dict[str, Any]) -> httpx.Response:
    """Send an event on a plain socket: creating an HTTP client would take longer than the request."""
    body = json.dumps(one).encode()
    with live.connect() as sock:
        sock.sendall(posting(body))
        return answer_on(sock)


@pytest.fixture
def many_files() -> Iterator[Any]:
    """Let this process open a few thousand connections."""
    resource = pytest.importorskip("resource", reason="Windows has no such limit")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    if limits[1] < 2500:
        pytest.skip("this process may not open 2000 connections")
    resource.setrlimit(resource.RLIMIT_NOFILE, (limits[1], limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.slow
def test_a_thousand_idle_slow_and_vanishing_clients_do_not_stop_other_clients(tmp_path: Path, many_files: Any) -> None:
    few_files = ("sh", "-c", 'ulimit -S -n 256 && exec "$0" "$@"')  # the soft limit, which the server raises
    with ExitStack() as stack:
        live = stack.enter_context(Live(tmp_path, "--api-key", KEY, command=[*few_files, *SCRIPT]))
        client = stack.enter_context(live.client())
        crowd_of = [stack.enter_context(live.connect()) for _ in range(1000)]
        slow, vanishing = crowd_of[:100], crowd_of[100:200]  # the others say nothing
        body = json.dumps(event()).encode()
        for sock in slow + vanishing:
            sock.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        for at_ in range(len(body)):
            for sock in slow:
                sock.sendall(body[at_ : at_ + 1])
            if at_ < 20:
                assert counts(store(client, event(f"{at_}"))) == (1, 0)
                assert len(ids(client)) == at_ + 1
                for sock in vanishing[at_ * 5 :][:5]:
                    sock.sendall(body[:-1])
                    sock.close()
        assert {answer_on(sock).status_code for sock in slow} == {202}
        assert total(client) == 120
        eventually(lambda: live.log.count("client went away") == 100)
        assert live.stop() == 0
        assert "Traceback" not in live.log


IMPATIENT = changed("connections", HEADERS_TIMEOUT_S=2)


def threads_and_files(live: Live) -> tuple[int, int]:
    counted = [Path(f"/proc/{live.process.pid}/{name}") for name in ("task", "fd")]
    if not counted[0].exists():
        pytest.skip("only Linux says how many threads and files another process has")
    return len(list(counted[0].iterdir())), len(list(counted[1].iterdir()))


@pytest.mark.slow
def test_two_thousand_silent_connections_use_no_thread_delay_no_client_and_are_closed(
    tmp_path: Path, many_files: Any
) -> None:
    with ExitStack() as stack:
        live = stack.enter_context(Live(tmp_path, "--api-key", KEY, code=IMPATIENT))
        client = stack.enter_context(live.client())
        store(client, event("before"))
        threads, files = threads_and_files(live)
        silent = [stack.enter_context(live.connect()) for _ in range(2000)]
        for number in range(20):
            assert counts(store(client, event(f"{number}"))) == (1, 0)
        assert threads_and_files(live)[0] == threads
        assert [sock.recv(1) for sock in silent] == [b""] * 2000
        eventually(lambda: threads_and_files(live) == (threads, files))
        assert (live.stop(), live.log) == (0, "")


@pytest.mark.slow
def test_only_a_connection_whose_headers_do_not_arrive_is_closed(tmp_path: Path) -> None:
    one = posting(BODY)
    with (
        Live(tmp_path, "--api-key", KEY, code=IMPATIENT) as live,
        live.connect() as slow,
        live.connect() as idle,
        live.connect() as half,
        live.connect() as later_half,
        live.connect() as silent,
    ):
        slow.sendall(one[:-10])  # its headers are there
        for sock in (idle, later_half):
            sock.sendall(one)
        for sock in (idle, later_half):
            assert answer_on(sock).status_code == 202
        for sock in (half, later_half):
            sock.sendall(one[:30])
        assert [sock.recv(1) for sock in (half, later_half, silent)] == [b""] * 3
        slow.sendall(one[-10:])
        assert answer_on(slow).status_code == 202
        for _ in range(2):
            idle.sendall(one)
            assert answer_on(idle).status_code == 202
        assert live.stop() == 0


def test_a_page_that_would_be_too_long_is_cut_and_the_next_one_continues(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventstore, "_MAX_PAGE_BYTES", 100_000)
    monkeypatch.setattr(eventstore, "_SHORT_PAGE_BYTES", 100_000)
    sizes = [20_000] * 10 + [150_000] + [10] * 40 + [60_000, 60_000]
    sent = [
        event(f"{number:02}", timestamp=at(number), properties={"p": "x" * size}) for number, size in enumerate(sizes)
    ]
    for one in sent:
        store(client, one)
    expected = [one["event_id"] for one in sent]
    for order, by_cursor in itertools.product(("asc", "desc"), (True, False)):
        query: Json = {"order": order, "page_size": 50, **EVER}
        found: list[str] = []
        pages: list[Json] = []
        while not pages or pages[-1]["has_more"]:
            pages.append(page(client, "POST", **query))
            found += [one["id"] for one in pages[-1]["events"]]
            query |= {"iter_last_key": pages[-1]["iter_last_key"]} if by_cursor else {"offset": pages[-1]["offset"]}
        assert found == (expected if order == "asc" else expected[::-1])
        assert {one["total_count"] for one in pages} == {len(sent)}
        assert all(len(one["events"]) == 1 or len(json.dumps(one)) < 110_000 for one in pages)
        assert len(pages) < 20
    after = page(client, "POST", page_size=50, iter_first_key=cursor(sent[10]), **EVER)
    assert ([one["id"] for one in after["events"]][-1], after["has_more"]) == ("11", True)  # the nearest ones
    assert client.get("/v1/events/lookup", params={"id": "10"}).json()["event"]["properties"]["p"] == "x" * 150_000
    assert usage(client, "COUNT_UNIQUE", property_name="p", **EVER)["value"] == 4


@pytest.mark.slow
def test_endlessly_overlapping_reads_do_not_let_the_wal_grow_endlessly(tmp_path: Path) -> None:
    over, overlaps = threading.Event(), []

    def read_in_turns() -> None:
        """One of two connections always reads from a snapshot."""
        paths = [tmp_path / "events.db"] * 2
        with ExitStack() as stack:
            for conn in itertools.cycle([stack.enter_context(closing(sqlite3.connect(path))) for path in paths]):
                conn.execute("BEGIN")
                conn.execute("SELECT count(*) FROM sqlite_schema").fetchone()
                overlaps.append(conn)
                if len(overlaps) > 1:
                    overlaps[-2].rollback()
                if over.wait(0.02):
                    return

    with serving(tmp_path, wal_bytes=2**21) as client, ThreadPoolExecutor(1) as pool:
        reading, wal, sizes = pool.submit(read_in_turns), tmp_path / "events.db-wal", []
        eventually(lambda: len(overlaps) > 1)
        for number in range(30):
            store(client, *[event(f"{number} {index}", source="x" * 200) for index in range(1000)])
            sizes.append(wal.stat().st_size)
        over.set()
        reading.result()
    assert max(sizes) < 8 * 2**20, sizes  # it would have had 30 times a batch's
    assert len(rows_of(tmp_path)) == 30_000


@pytest.mark.slow
def test_an_idle_connection_is_closed_later_than_proxies_would_close_it(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY, "--keep-alive-s", "1") as live, live.connect() as sock:
        sock.sendall(posting(BODY))
        assert answer_on(sock).status_code == 202
        assert sock.recv(1) == b""  # the default would keep it longer than this socket waits
        assert sock.gettimeout() < eventstore.parse_arguments(["serve"]).keep_alive_s
    by_default = eventstore.uvicorn_server(Mock(), shutdown_timeout_s=1)
    assert by_default.config.timeout_keep_alive == eventstore.parse_arguments(["serve"]).keep_alive_s == 75


# ---------------------------------------------------------------------------------------------- signals


@pytest.mark.slow
@table("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])
def test_a_signal_finishes_requests_in_progress_and_leaves_one_whole_file(tmp_path: Path, number: Any) -> None:
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as idle, live.connect() as sock:
        store(idle, event("before"))
        body = json.dumps(event("under way")).encode()
        sock.sendall(POST + b"Expect: 100-continue\r\nContent-Length: %d\r\n\r\n" % len(body))
        assert sock.recv(100) == b"HTTP/1.1 100 Continue\r\n\r\n"  # the server waits for the body
        live.begin_to_stop(number)
        sock.sendall(body)
        assert answer_on(sock).status_code == 202
        assert (live.process.wait(30), live.log) == (0, "")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["events.db", "stderr.txt"]
    with closing(sqlite3.connect(f"file:{tmp_path}/events.db?immutable=1", uri=True)) as conn:
        assert conn.execute("SELECT id FROM events ORDER BY rowid").fetchall() == [("before",), ("under way",)]


@pytest.mark.slow
@table("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_as_soon_as_the_port_answers_ends_the_server_cleanly(tmp_path: Path, number: Any) -> None:
    port = free_port()
    command = [*map(str, SCRIPT), "serve", "--port", str(port)]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:

        def answers() -> bool:
            with suppress(ConnectionRefusedError), socket.create_connection(("127.0.0.1", port)):
                return True
            return False

        while not answers():
            assert process.poll() is None
        process.send_signal(number)
        assert (process.communicate(timeout=30)[1], process.returncode) == (b"", 0)


@pytest.mark.slow
def test_a_signal_under_load_loses_no_acknowledged_event_and_ends_within_ten_seconds(
    tmp_path: Path, choose: random.Random
) -> None:
    senders = [Sender(choose.getrandbits(64), patience=0) for _ in range(8)]
    body = json.dumps(event("slow")).encode()
    with Live(tmp_path, "--api-key", KEY) as live:
        for sender in senders:
            sender.port = int(live.port)
        with sending(senders) as stop:
            eventually(lambda: all(len(sender.acknowledged) > 30 for sender in senders))
            with live.connect() as slow, live.connect() as half, live.connect() as idle:
                slow.sendall(posting(body)[:-1])
                half.sendall(b"POST /v1/events HTTP/1.1\r\nHost:")
                idle.sendall(POST + b"Content-Length: 0\r\n\r\n")
                refused(answer_on(idle))  # and the connection stays open
                live.process.send_signal(signal.SIGTERM)
                assert live.process.wait(10) == 0
                stop()
                refused(answer_on(slow), 503, "service_unavailable", "shutting down")
                assert (idle.recv(1), half.recv(1)) == (b"", b"")
        assert "Traceback" not in live.log
    outcomes = sum((sender.outcomes for sender in senders), Counter())
    assert set(outcomes) <= {None, 200, 202, 503}
    assert outcomes[None] > 0  # some came too late
    assert not (tmp_path / "events.db-wal").exists()
    check_ledgers(tmp_path, senders)


@pytest.mark.slow
def test_a_signal_while_the_database_is_locked_refuses_waiting_requests_and_ends_within_ten_seconds(
    tmp_path: Path,
) -> None:
    body = json.dumps(event()).encode()
    with (
        Live(tmp_path, "--api-key", KEY, "--queue-events", "1") as live,
        live.connect() as one,
        live.connect() as other,
    ):
        with write_lock(tmp_path):
            for sock in (one, other):
                sock.sendall(posting(body))
            with selectors.DefaultSelector() as selector:  # select() takes no descriptor above 1023
                for sock in (one, other):
                    selector.register(sock, selectors.EVENT_READ)
                too_many: Any = selector.select(30)[0][0].fileobj
            refused(answer_on(too_many), 503, "service_unavailable", "1 events wait")  # so the other one does
            live.process.send_signal(signal.SIGTERM)
            assert live.process.wait(10) == 0
        waiting = one if too_many is other else other
        refused(answer_on(waiting), 503, "service_unavailable")
    assert rows_of(tmp_path) == []
