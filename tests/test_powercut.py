"""The power fails at any moment of a server's life: what was told 202 is on the disk then, once and whole."""

from __future__ import annotations

import json
import random
import re
import shutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from powercut import Check, Cut, Disk, Entry, Recording, strace

from conftest import KEY, POST, ROOT, Live, answer_on, database, event, eventually, run

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")

CUTS = 200
STARTS = 6  # of the disks, on which a server is started, too
FEW_PAGES = "PRAGMA wal_autocheckpoint = 60"  # so that there are many checkpoints


def server(*pragmas: str) -> list[str]:
    """A server whose connections have these settings besides."""
    code = f"import sys, eventstore; eventstore.PRAGMAS += {pragmas!r}; sys.exit(eventstore.main())"
    return [sys.executable, "-c", code]


# ---------------------------------------------------------------------------------------------- what is recorded


def sent_event(name: str) -> dict:
    """All of it follows from its id."""
    return event(name, properties={"id": name, "filler": "x" * random.Random(name).randrange(300)})


def requests_of(client: int, choose: random.Random) -> list[list[dict]]:
    """Single events, now and then one of them again, or batches of up to 40."""
    if client < 3:
        names = [f"{client}-{number}" for number in range(20)]
        return [[sent_event(name)] for name in [*names, *choose.sample(names, 5)]]
    return [[sent_event(f"{client}-{at}-{n}") for n in range(choose.randint(2, 40))] for at in range(12)]


def send(live: Live, requests: list[list[dict]]) -> int:
    """Each waits for the 202 of the one before; returns the port from which they came."""
    with live.connect() as sock:
        for events in requests:
            single = len(events) == 1
            body = json.dumps(events[0] if single else {"events": events}).encode()
            head = POST if single else POST.replace(b"/v1/events", b"/v1/events/bulk")
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            assert answer_on(sock).status_code == 202
        return sock.getsockname()[1]


class Run:
    """Two servers one after the other on one folder, under strace, and who sent what to them."""

    def __init__(self, folder: Path, choose: random.Random, *pragmas: str):
        data = folder / "data"
        data.mkdir(parents=True)
        self.recording = Recording(data)
        self.requests: dict[int, list[list[dict]]] = {}  # by port
        for number in range(2):
            trace = folder / f"trace{number}.txt"
            command = [*strace(trace), *server(FEW_PAGES, *pragmas)]
            with Live(data, "--api-key", KEY, command=command, PYTHONPATH=str(ROOT)) as live:
                of_clients = [requests_of(5 * number + client, choose) for client in range(5)]
                with ThreadPoolExecutor(5) as pool:
                    for port, requests in zip(pool.map(send, [live] * 5, of_clients), of_clients, strict=True):
                        self.requests.setdefault(port, []).extend(requests)
                assert live.stop() == 0, live.log
            ended = re.compile(rf"^{live.process.pid} +\+\+\+ exited", re.MULTILINE)
            eventually(lambda trace=trace, ended=ended: ended.search(trace.read_text()))
            self.recording.add(trace)

    def cut(self, disk: Disk, folder: Path, choose: random.Random) -> Cut:
        folder.mkdir()
        disk.write_to(folder, choose)
        acknowledged = [request for port, sent in self.requests.items() for request in sent[: disk.answers[port]]]
        return Cut(folder, acknowledged, [request for sent in self.requests.values() for request in sent])


# ---------------------------------------------------------------------------------------------- what is checked


def stored(cut: Cut) -> list[tuple[str, str]]:
    with database(cut.folder) as conn:
        if not conn.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'events'").fetchone()[0]:
            return []  # the power failed before there was a table
        return conn.execute("SELECT id, properties FROM events").fetchall()


def the_file_is_sound(cut: Cut) -> Iterator[str]:
    with database(cut.folder) as conn:
        answer = conn.execute("PRAGMA integrity_check").fetchall()
    if answer != [("ok",)]:
        yield f"integrity_check: {answer[:3]}"


def what_was_acknowledged_is_there_once(cut: Cut) -> Iterator[str]:
    found = Counter(event_id for event_id, _ in stored(cut))
    for event_id in {one["event_id"] for request in cut.acknowledged for one in request}:
        if found[event_id] != 1:
            yield f"{event_id} was told 202 and is there {found[event_id]} times"


def batches_are_whole_or_absent(cut: Cut) -> Iterator[str]:
    found = {event_id for event_id, _ in stored(cut)}
    for request in cut.sent:
        there = len(found.intersection(one["event_id"] for one in request))
        if there not in (0, len(request)):
            yield f"of the batch of {request[0]['event_id']} {there} of {len(request)} events are there"


def nothing_else_is_there(cut: Cut) -> Iterator[str]:
    sent = {one["event_id"]: one["properties"] for request in cut.sent for one in request}
    for event_id, properties in stored(cut):
        if sent.get(event_id) != json.loads(properties):
            yield f"{event_id} is not as it was sent"


CHECKS: list[Check] = [  # whatever else the server promises to keep has its check here, and is in requests_of
    the_file_is_sound, what_was_acknowledged_is_there_once, batches_are_whole_or_absent, nothing_else_is_there,
]  # fmt: skip


def problems(cut: Cut, checks: Sequence[Check] = CHECKS) -> list[str]:
    return [problem for check in checks for problem in check(cut)]


def starts(cut: Cut) -> Iterator[str]:
    """The server does, and has what was acknowledged; events of before are known to it."""
    acknowledged = [one for request in cut.acknowledged for one in request]
    with Live(cut.folder, "--api-key", KEY) as live, live.client() as client:
        for at in range(0, len(acknowledged), 1000):
            response = client.post("/v1/events/bulk", json={"events": acknowledged[at : at + 1000]})
            if (inserted := response.headers.get("X-Events-Inserted")) != "0":
                yield f"{inserted} of the acknowledged events were new to the server: {response.text[:200]}"
        if live.stop() != 0:
            yield f"the server did not end well: {live.log}"


# ---------------------------------------------------------------------------------------------- the tests


@pytest.fixture
def record(tmp_path, choose):
    in_foreground = [word for word in strace(tmp_path / "trace.txt") if word != "-D"]
    if run(*in_foreground, "true").returncode != 0:
        pytest.skip("this process may not trace another")
    return lambda *pragmas: Run(tmp_path / "run", choose, *pragmas)


def check_that_much_happened(recording: Recording) -> None:
    """What has to be in a run for the test to mean what it says."""
    entries = [step.change for step in recording.steps if isinstance(step.change, Entry)]
    made = Counter(entry.name for entry in entries if entry.file)
    removed = Counter(entry.name for entry in entries if not entry.file)
    assert made["events.db-wal"] == removed["events.db-wal"] >= 2  # a shutdown, a second start, a shutdown
    database_file = next(entry.file for entry in entries if entry.name == "events.db")
    answers = [number for number, step in enumerate(recording.steps) if step.answered >= 0]
    while_answering = recording.steps[answers[0] : answers[-1]]
    assert sum(step.synced_from >= 0 and step.file == database_file for step in while_answering) > 5  # checkpoints


def test_whatever_was_acknowledged_is_there_after_a_power_cut_at_any_moment(tmp_path, record, choose):
    a_run = record()
    check_that_much_happened(a_run.recording)
    to_start = set(choose.sample(range(CUTS), STARTS))
    for disk in a_run.recording.disks(CUTS, choose):
        cut = a_run.cut(disk, tmp_path / f"disk{disk.number}", choose)
        found = problems(cut)
        if not found and disk.number in to_start:
            found = [*starts(cut), *problems(cut)]
        assert not found, (disk.number, found[:5])
        shutil.rmtree(cut.folder)


def test_power_cuts_lose_acknowledged_events_when_commits_are_not_synced(tmp_path, record, choose):
    """What the test above would say if the server did not keep its word."""
    a_run = record("PRAGMA synchronous = NORMAL")
    losing = 0
    for disk in a_run.recording.disks(50, choose):
        cut = a_run.cut(disk, tmp_path / f"disk{disk.number}", choose)
        losing += any("told 202 and is there 0 times" in problem for problem in problems(cut))
    assert losing > 10
