"""Cut the power at any moment of a server's life: acknowledged requests must be on the disk, whole and once."""

from __future__ import annotations

import itertools
import json
import os
import random
import re
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from eventstore import ENCODER, StartError
from eventstore_extras import features, forward, meters, refused
from fake_target import FakeTarget, Handler, lag, reply
from forked import Template
from helpers import KEY, POST, Live, answer_on, database, event, eventually, feature_of, meter_of, run, table
from powercut import Disk, Entry, Recording, strace

pytestmark = pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")

CUTS = int(os.environ.get("EVENTSTORE_TEST_CUTS", "30"))
STARTS = 3  # disks on which a server is started as well
FEW_PAGES = "eventstore.PRAGMAS += ('PRAGMA wal_autocheckpoint = 60',)"  # causes many checkpoints
OFTEN = """
sending.SAVE_INTERVAL_S, sending.BACKOFF_CAP_S = 0, 0.1
retention.HOUR_US, retention.CLOCK_INTERVAL_S, retention.MAX_ROWS = 1, 0.02, 30
retention.MOST_AT_ONCE = 10**9  # the second server deletes all that the first one stored
"""
# Each run is two days later than the one before, so that all its events are due for deletion.
LATER = "arguments.clock = lambda: eventstore.now_us() + 2 * eventstore.DAY_US * {}"
FLAGS = ("--api-key", KEY, "--forward-interval-ms", "20", "--retain-days", "1", "--forward-to")


def server(number: int, *lines: str) -> str:
    """Return the code of the server with this number. Its clock makes all events of the previous server due."""
    code = ["import sys, eventstore", "from eventstore_extras import forward, retention, sending", FEW_PAGES, OFTEN, *lines,
            "arguments = eventstore.parse_arguments(sys.argv[1:])", LATER.format(number),
            "sys.exit(eventstore.serve(arguments))"]  # fmt: skip
    return "\n".join(code)


# ---------------------------------------------------------------------------------------------- recording


class Request(NamedTuple):
    path: str  # may contain {id}: the id in the previous answer
    body: dict[str, Any]
    answer: dict[str, Any] = {}  # noqa: RUF012

    @property
    def events(self) -> list[dict[str, Any]]:
        if not self.path.startswith("events"):
            return []
        events: list[dict[str, Any]] = self.body.get("events", [self.body])
        return events


def sent_event(name: str) -> dict[str, Any]:
    """Return an event whose properties follow from its id."""
    return event(name, properties={"id": name, "filler": "x" * random.Random(name).randrange(300)})


def is_refused(name: str) -> bool:
    """Return whether the target of forwarding refuses the event."""
    return random.Random(name).random() < 0.02


def requests_of(client: int, choose: random.Random) -> list[Request]:
    """Return single events with some duplicates, or batches of up to 40, or meters and features."""
    of_run = client % 6
    if of_run < 3:
        names = [f"{client}-{number}" for number in range(20)]
        return [Request("events", sent_event(name)) for name in [*names, *choose.sample(names, 5)]]
    if of_run < 5:
        batches = [[sent_event(f"{client}-{at}-{n}") for n in range(choose.randint(2, 40))] for at in range(12)]
        return [Request("events/bulk", {"events": batch}) for batch in batches]
    return [
        request
        for at in range(8)
        for request in (
            Request("features", feature_of(f"{client}-{at}", meter=meter_of("SUM", name=f"of {client}-{at}"))),
            Request("meters", meter_of(name=f"{client}-{at}", filters={"model": ["x" * 200]})),
            Request("meters/{id}/disable", {}),
        )
    ]


def send(live: Live, requests: list[Request]) -> tuple[int, list[Request]]:
    """Send the requests one by one. Return the port they were sent from, and the requests with their answers."""
    answer: dict[str, Any] = {}
    answered = []
    with live.connect() as sock:
        for request in requests:
            path = request.path.format(id=answer.get("id"))
            body = json.dumps(request.body).encode()
            head = POST.replace(b"/v1/events", f"/v1/{path}".encode())
            sock.sendall(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            response = answer_on(sock)
            assert response.status_code in (200, 201, 202), response.text
            answer = response.json() | ({"id": answer["id"]} if "id" in request.path else {})
            answered.append(request._replace(answer=answer))
        return sock.getsockname()[1], answered


class PickyTarget(FakeTarget):
    """A target that remembers the ids of each accepted batch, and refuses a batch if it refuses one of its events."""

    def __init__(self) -> None:
        self.accepted_batches: list[list[str]] = []
        self.answers_requests: Iterator[bool] = itertools.repeat(True)  # one value for each request
        super().__init__(self.judge)

    def judge(self, handler: Handler, ids: list[str]) -> bool:
        if not next(self.answers_requests):
            return reply(handler, 503, b"{}")
        if any(map(is_refused, ids)):
            return reply(handler, 400, b'{"error": "refused"}')
        self.accepted_batches.append(ids)
        return False


class Cut(NamedTuple):
    """The files after a cut, and what was sent, answered and accepted before it: the input of a check."""

    folder: Path
    sent: list[Request]
    acknowledged: list[Request]  # the requests that were answered
    target: str
    accepted: set[str]  # ids that the target has accepted
    due: set[str]  # ids old enough to be deleted once the target has accepted or refused them


# Whether the target answers: it stops during the first run. In the second, due events must wait until it is back.
PRESENCE = ((True,) * 8 + (False,), (False,) * 10 + (True,))


class Tracer(NamedTuple):
    """A process that strace records; servers are forked from it, so that strace need not record their imports."""

    template: Template
    trace: Path

    def wait_for_end_of(self, process: int) -> None:
        ended = re.compile(rb"^%d +\+\+\+ exited" % process, re.MULTILINE)
        with self.trace.open("rb") as file:

            def last_lines() -> bytes:
                file.seek(max(self.trace.stat().st_size - 20_000, 0))
                return file.read()

            eventually(lambda: ended.search(last_lines()))


class Run:
    """Two consecutive servers on one folder under strace, and the requests sent to them."""

    def __init__(self, folder: Path, tracer: Tracer, target: PickyTarget, choose: random.Random, *lines: str) -> None:
        self.data = folder / "data"
        self.data.mkdir(parents=True)
        self.target = target
        self.recording = Recording(self.data)
        self.requests: dict[int, list[Request]] = {}  # by port
        self.due: list[set[str]] = []  # by run
        for number in range(2):
            self.due.append({one["event_id"] for sent in self.requests.values() for it in sent for one in it.events})
            *first, last = PRESENCE[number]
            target.answers_requests = itertools.chain(first, itertools.repeat(last))
            start = tracer.trace.stat().st_size
            with Live(
                self.data, *FLAGS, target.url, code=server(number, *lines), command=tracer.template, **ENVIRON
            ) as live:
                self.send_all([requests_of(6 * number + client, choose) for client in range(6)], live)
                if last:
                    self.wait_until_nothing_is_due(live)
                assert live.stop() == 0, live.log
            tracer.wait_for_end_of(live.process.pid)
            self.recording.add(tracer.trace, start)
            self.check_the_recording()
        self.accepted = list(target.accepted_batches)

    def wait_until_nothing_is_due(self, live: Live) -> None:
        with live.client() as client:
            eventually(lambda: lag(client)[0] == 0 and not self.kept() & self.due[-1])

    def check_the_recording(self) -> None:
        """Fail if the model of the disk is wrong: its files, rebuilt from the trace, must equal the real ones."""
        real = {path.name: path.read_bytes() for path in self.data.iterdir()}
        del real["stderr.txt"]  # opened before strace starts
        rebuilt = self.recording.files()
        assert rebuilt.keys() == real.keys()
        assert [name for name, content in real.items() if rebuilt[name] != content] == [], "rebuilt differently"

    def kept(self) -> set[str]:
        with database(self.data) as conn:
            return {event_id for (event_id,) in conn.execute("SELECT id FROM events")}

    def send_all(self, of_clients: list[list[Request]], live: Live) -> None:
        with ThreadPoolExecutor(len(of_clients)) as pool:
            for port, requests in pool.map(send, [live] * len(of_clients), of_clients):
                self.requests.setdefault(port, []).extend(requests)

    def cut(self, disk: Disk, folder: Path, choose: random.Random) -> Cut:
        folder.mkdir()
        disk.write_to(folder, choose)
        acknowledged = [request for port, sent in self.requests.items() for request in sent[: disk.answers[port]]]
        accepted = self.accepted[: disk.answers[self.target.server.server_port]]
        return Cut(folder, [request for sent in self.requests.values() for request in sent], acknowledged,
                   self.target.url, set().union(*accepted), self.due[disk.run])  # fmt: skip


ENVIRON = {"EVENTSTORE_FORWARD_API_KEY": KEY}

# ---------------------------------------------------------------------------------------------- checks


def rows(cut: Cut, columns: str, of_table: str) -> list[tuple[Any, ...]]:
    with database(cut.folder) as conn:
        if not conn.execute("SELECT count(*) FROM sqlite_schema WHERE name = 'events'").fetchone()[0]:
            return []  # the power failed before the table was created
        return conn.execute(f"SELECT {columns} FROM {of_table}").fetchall()


def properties_sent(cut: Cut) -> dict[str, dict[str, Any]]:
    return {one["event_id"]: one["properties"] for request in cut.sent for one in request.events}


def in_refused_file(cut: Cut) -> set[str]:
    """Return the ids of events that stand on a complete line of the file of refused events."""
    sent, found = properties_sent(cut), set()
    path = Path(refused.refused_path(str(cut.folder / "events.db")))
    for line in path.read_bytes().splitlines() if path.exists() else []:
        with suppress(ValueError):
            one = json.loads(line)
            if sent[one["event_id"]] == one["properties"]:
                found.add(one["event_id"])
    return found


def the_file_is_sound(cut: Cut) -> Iterator[str]:
    with database(cut.folder) as conn:
        answer = conn.execute("PRAGMA integrity_check").fetchall()
    if answer != [("ok",)]:
        yield f"integrity_check: {answer[:3]}"


def acknowledged_events_are_stored_once(cut: Cut) -> Iterator[str]:
    """Check that each acknowledged event is stored once.

    An event that was due may be missing if the target accepted it or the file of refused events has it.
    """
    found = Counter(event_id for (event_id,) in rows(cut, "id", "events"))
    may_be_gone = cut.due & (cut.accepted | in_refused_file(cut))
    for event_id in {one["event_id"] for request in cut.acknowledged for one in request.events}:
        if found[event_id] != 1 and not (found[event_id] == 0 and event_id in may_be_gone):
            why = (
                ""
                if event_id not in cut.due
                else ", not in the refused file"
                if is_refused(event_id)
                else ", not accepted"
            )
            yield f"{event_id} was answered with 202 and is stored {found[event_id]} times{why}"


def batches_are_whole_or_absent(cut: Cut) -> Iterator[str]:
    found = {event_id for (event_id,) in rows(cut, "id", "events")}
    for request in cut.sent:
        names = {one["event_id"] for one in request.events}
        if not names & cut.due and (there := len(found & names)) not in (0, len(names)):
            yield f"the batch with {min(names)} is stored in part: {there} of {len(names)} events"


def only_events_that_were_sent_are_stored(cut: Cut) -> Iterator[str]:
    sent = properties_sent(cut)
    for event_id, properties in rows(cut, "id, properties", "events"):
        if sent.get(event_id) != json.loads(properties):
            yield f"{event_id} differs from what was sent"


def answered_now(cut: Cut, path: str, identity: str) -> dict[str, Any]:
    """Return a meter or a feature as the server would now answer it."""
    with database(cut.folder) as conn:
        if path == "meters":
            found: Any = meters.require_meter(conn, "development", identity).meter
        else:
            found = features.require_feature(conn, "development", identity)
        return dict(json.loads(ENCODER.encode(found)))


def meters_and_features_match_their_answers(cut: Cut) -> Iterator[str]:
    there = {path: {identity for (identity,) in rows(cut, "id", path)} for path in ("meters", "features")}
    disabled = {it.answer["id"] for it in cut.sent if it.path.endswith("disable")}
    must_be = {it.answer["id"] for it in cut.acknowledged if it.path.endswith("disable")}
    for path, identity, answer in {(it.path, it.answer["id"], json.dumps(it.answer)) for it in cut.acknowledged
                                   if it.path in there}:  # fmt: skip
        if identity not in there[path]:
            yield f"{identity} was answered with 201 and is missing"
            continue
        now, as_answered = answered_now(cut, path, identity), json.loads(answer)
        if now["status"] == "archived" and identity in disabled:
            now |= {"status": "published", "updated_at": as_answered["updated_at"]}
        elif identity in must_be:
            yield f"{identity} is not disabled, although that was answered with 200"
        if now != as_answered:
            yield f"{identity} is {now}, but the answer was {as_answered}"


def a_feature_and_its_meter_are_stored_together(cut: Cut) -> Iterator[str]:
    features = {(name, meter) for name, meter in rows(cut, "name, meter_id", "features")}
    of_features = {(name.removeprefix("of "), identity) for name, identity in rows(cut, "name, id", "meters")
                   if name.startswith("of ")}  # fmt: skip
    if features != of_features:
        yield f"features without their meters, or meters without their features: {features ^ of_features}"


def forwarding_is_never_ahead(cut: Cut) -> Iterator[str]:
    """Check that progress passes no event before the target accepts it or the file of refused events has it.

    Progress may lag behind: those events are sent again.
    """
    db, passed = str(cut.folder / "events.db"), cut.accepted | in_refused_file(cut)
    if not forward.forward_progress_path(db, cut.target, "development").exists():
        return
    with database(cut.folder) as conn:
        try:
            progress = forward.open_forward_progress(conn, db, cut.target, "development").progress
        except (StartError, sqlite3.Error) as error:
            yield f"progress: {error}"
            return
    for seq, event_id in rows(cut, "seq, id", "events"):
        if seq <= progress.seq and event_id not in passed:
            yield f"progress has passed {event_id}, which is {'not in the refused file' if is_refused(event_id) else 'not sent'}"


Check = Callable[[Cut], Iterator[str]]  # yields a sentence for each problem
CHECKS: list[Check] = [  # for another kind of stored data, add a check here and requests to requests_of
    the_file_is_sound, acknowledged_events_are_stored_once, batches_are_whole_or_absent, only_events_that_were_sent_are_stored,
    meters_and_features_match_their_answers, a_feature_and_its_meter_are_stored_together,
    forwarding_is_never_ahead,
]  # fmt: skip


def problems(cut: Cut, checks: Sequence[Check] = CHECKS) -> list[str]:
    return [problem for check in checks for problem in check(cut)]


def starts(cut: Cut, target: PickyTarget) -> Iterator[str]:
    """Start a server on the files. It must know the acknowledged events and forward those not accepted yet."""
    known = [one for request in cut.acknowledged for one in request.events if one["event_id"] not in cut.due]
    target.accepted_batches.clear()
    with Live(cut.folder, *FLAGS[:4], FLAGS[-1], target.url, **ENVIRON) as live, live.client() as client:
        for at in range(0, len(known), 1000):
            response = client.post("/v1/events/bulk", json={"events": known[at : at + 1000]})
            if (inserted := response.headers.get("X-Events-Inserted")) != "0":
                yield f"{inserted} of the acknowledged events were new to the server: {response.text[:200]}"
        eventually(lambda: lag(client)[0] == 0)
        if live.stop() != 0:
            yield f"the server did not stop cleanly: {live.log}"
    after = cut._replace(accepted=cut.accepted.union(*target.accepted_batches))
    passed = after.accepted | in_refused_file(after)
    for (event_id,) in rows(after, "id", "events"):
        if event_id not in passed:
            yield f"{event_id} is neither accepted nor in the refused file"
    yield from problems(after)


# ---------------------------------------------------------------------------------------------- tests

REUSED_DESCRIPTOR = r"""
1 openat(AT_FDCWD<{folder}>, "{a}", O_WRONLY|O_CREAT, 0644) = 5<{a}>
1 write(5<{a}>, "\x31", 1) = 1
2 openat(AT_FDCWD<{folder}>, "{b}", O_WRONLY|O_CREAT, 0644 <unfinished ...>
1 write(5<{a}>, "\x32", 1) = 1
2 <... openat resumed>) = 5<{b}>
2 write(5<{b}>, "\x33", 1) = 1
"""


def test_a_descriptor_belongs_to_a_file_once_openat_has_returned_it(tmp_path: Path) -> None:
    def hexadecimal(path: Path) -> str:
        return "".join(f"\\x{byte:02x}" for byte in bytes(path))

    paths = {
        name: hexadecimal(path) for name, path in (("folder", tmp_path), ("a", tmp_path / "a"), ("b", tmp_path / "b"))
    }
    trace = tmp_path / "trace.txt"
    trace.write_text(REUSED_DESCRIPTOR.format(**paths))
    recording = Recording(tmp_path)
    recording.add(trace)
    assert recording.files() == {"a": b"12", "b": b"3"}


@pytest.fixture
def target() -> Iterator[PickyTarget]:
    target = PickyTarget()
    with target:
        yield target


@pytest.fixture(scope="module")
def tracer(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Tracer]:
    trace = tmp_path_factory.mktemp("strace") / "trace.txt"
    in_foreground = [word for word in strace(trace) if word != "-D"]
    if run(*in_foreground, "true").returncode != 0:
        pytest.skip("this process is not allowed to trace another")
    template = Template(*strace(trace))
    yield Tracer(template, trace)
    template.close()


@pytest.fixture
def record(tmp_path: Path, tracer: Tracer, target: PickyTarget, choose: random.Random) -> Callable[..., Run]:
    return lambda *lines: Run(tmp_path / "run", tracer, target, choose, *lines)


def check_that_much_happened(a_run: Run) -> None:
    """Check that the run contained enough checkpoints, progress, answers and deletions to test anything."""
    steps = a_run.recording.steps
    entries = [step.change for step in steps if isinstance(step.change, Entry)]
    made = Counter(entry.name for entry in entries if entry.file)
    removed = Counter(entry.name for entry in entries if not entry.file)
    assert made["events.db-wal"] == removed["events.db-wal"] >= 2  # two shutdowns and a second start
    database_file = next(entry.file for entry in entries if entry.name == "events.db")
    answers = [number for number, step in enumerate(steps) if step.answered >= 0]
    while_answering = steps[answers[0] : answers[-1]]
    assert sum(step.synced_from >= 0 and step.file == database_file for step in while_answering) > 5  # checkpoints
    assert sum(count for name, count in made.items() if ".forward-" in name and name.endswith(".json")) > 10
    assert made["events.db.refused.ndjson"] == 1
    told = sum(step.answered == a_run.target.server.server_port for step in steps)
    assert told == len(a_run.accepted) > 10
    assert a_run.due[1].difference(*a_run.accepted[: 8 - 1])  # some had to wait
    assert a_run.kept()


@pytest.mark.slow(20)
def test_acknowledged_requests_survive_a_power_cut_at_any_moment(
    tmp_path: Path, record: Callable[..., Run], target: PickyTarget, choose: random.Random
) -> None:
    a_run = record()
    check_that_much_happened(a_run)
    to_start = set(choose.sample(range(CUTS), min(STARTS, CUTS)))
    for disk in a_run.recording.disks(CUTS, choose):
        cut = a_run.cut(disk, tmp_path / f"disk{disk.number}", choose)
        found = problems(cut)
        if not found and disk.number in to_start:
            found = [*starts(cut, target)]
        assert not found, (disk.number, found[:5])
        shutil.rmtree(cut.folder)
    # No cut above is likely to separate a feature from its meter; make sure that the check would notice.
    with database(a_run.data) as conn:
        conn.execute("DELETE FROM features WHERE id = (SELECT min(id) FROM features)")
        conn.commit()
    assert [*a_feature_and_its_meter_are_stored_together(cut._replace(folder=a_run.data))]


AHEAD = """
deliver = forward.Forwarder._deliver
async def ahead(self, batch):
    self._progress.advance(batch.rows[-1])
    await self._save()
    await deliver(self, batch)
forward.Forwarder._deliver = ahead
"""
CARELESS = """
forward.os.fsync = lambda _: None
retention.read_all_forward_progress = lambda _: []
sys.argv.append("--delete-unforwarded")
"""
LATE = "forward.append_lines = lambda path, lines: open(path, 'ab').writelines(line + b'\\n' for line in lines)"
NORMAL = """
eventstore.PRAGMAS += ("PRAGMA synchronous = NORMAL",)
retention.checkpoint = lambda _: None  # it would sync so soon that little is lost
"""


@pytest.mark.slow
@table(
    ("lines", "says"),
    [
        (NORMAL, ["answered with 202 and is stored 0 times", "answered with 201"]),
        (CARELESS, ["cannot read the progress", "is stored 0 times, not accepted"]),
        (LATE, ["not in the refused file"]),
        (AHEAD, ["progress has passed"]),
    ],
    ids=[
        "commits not synced",
        "progress not synced, deleted too early",
        "refused file written too late",
        "progress saved first",
    ],
)
def test_power_cuts_reveal_each_deliberate_defect(
    lines: str, says: list[str], tmp_path: Path, record: Callable[..., Run], choose: random.Random
) -> None:
    """Break one of the server's promises on purpose: the checks above must report it."""
    a_run = record(lines)
    missing = says
    for disk in a_run.recording.disks(50, choose):
        said = problems(a_run.cut(disk, tmp_path / f"disk{disk.number}", choose))
        missing = [known for known in missing if not any(known in problem for problem in said)]
        if not missing:
            break
    assert missing == []
