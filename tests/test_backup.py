"""The command `backup`: the copy's contents, refusals, failures, and kills of the server and of the backup."""

from __future__ import annotations

import os
import re
import signal
import sqlite3
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from eventstore_extras import backup
from eventstore_extras.forward import forward_progress_path
from forked import Command, forked
from helpers import (
    KEY,
    STAGING_KEY,
    Live,
    command_line,
    event,
    eventually,
    exported,
    imported,
    lines_of,
    metering,
    refused_in_one_line,
    serving,
    sizes_in,
    store,
    stored_ids,
    table,
)


def backed_up(folder: Path, *flags: object) -> Path:
    """Back up folder/events.db, and return a folder in which the copy is events.db."""
    copy = folder / "copy"
    copy.mkdir(exist_ok=True)
    assert command_line("backup", "--db", folder / "events.db", copy / "events.db", *flags) == 0
    return copy


# ---------------------------------------------------------------------------------------------- what the copy holds


def test_a_copy_of_a_running_server_holds_everything_up_to_its_moment(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with metering(tmp_path) as client:
        store(client, event("a"), event("b", properties={"n": 1.50}))
        client.post("/v1/events", json=event("s"), headers={"x-api-key": STAGING_KEY})
        meter = {"name": "m", "event_name": "call", "aggregation": {"type": "COUNT"}, "reset_usage": "NEVER"}
        made = client.post("/v1/meters", json=meter)
        assert (tmp_path / "events.db-wal").stat().st_size > 0
        copy = backed_up(tmp_path)
        message = capsys.readouterr().err
        store(client, event("c"))
        assert stored_ids(tmp_path) == ["a", "b", "c"]
    assert re.fullmatch(r"eventstore: copied \S+events\.db to \S+events\.db: 3 events, checked; .+ s\n", message)
    assert {name: (copy / name).stat().st_mode & 0o777 for name in sizes_in(copy)} == {"events.db": 0o600}
    with metering(copy) as client:
        assert stored_ids(copy) == ["a", "b"]
        assert client.get("/v1/events", headers={"x-api-key": STAGING_KEY}).json()["events"][0]["id"] == "s"
        assert client.get(f"/v1/meters/{made.json()['id']}").json() == made.json()
        assert exported(copy, "--event-id", "b").count(b'"n":1.5') == 1
        store(client, event("d"))


def test_forwarding_positions_go_with_the_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, lines_of(event("a")))
    path = forward_progress_path(str(tmp_path / "events.db"), "https://target", "development")
    path.write_bytes(b'{"target": "https://target"}')
    copy = backed_up(tmp_path)
    assert ", checked, with 1 forwarding position beside it; " in capsys.readouterr().err
    assert (copy / path.name).read_bytes() == path.read_bytes()
    (copy / path.name).rename(copy / "events.db.forward-0000.json")
    backed_up(tmp_path, "--force")
    assert sorted(sizes_in(copy)) == sorted(["events.db", path.name])


def test_a_copy_made_in_many_steps_ignores_what_is_written_meanwhile(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With SQLite's own rules each write would make the backup start over."""
    imported(tmp_path, lines_of(*[event(f"{number:05}") for number in range(500)]))
    monkeypatch.setattr(backup, "_STEP_PAGES", 1)
    steps = Mock()
    with serving(tmp_path) as client:

        def advance(size: int) -> None:
            steps(size)
            if steps.call_count % 10 == 0:
                store(client, event(f"meanwhile {steps.call_count}"))

        monkeypatch.setattr(backup, "progress_bar", lambda *_: contextmanager(lambda: iter([advance]))())
        copy = backed_up(tmp_path)
        assert steps.call_count >= 30
        assert len(stored_ids(tmp_path)) > 500
    assert stored_ids(copy) == [f"{number:05}" for number in range(500)]
    assert sum(call.args[0] for call in steps.call_args_list) == sizes_in(copy)["events.db"]


# ---------------------------------------------------------------------------------------------- what is refused


CANNOT_START = [  # arguments, what the message names
    ("missing.db copy.db", "there is no database missing.db"),
    ("events.db events.db", "events.db is the database itself"),
    ("events.db events.db --force", "events.db is the database itself"),
    ("events.db old.db", "old.db exists: name another file, or add --force"),
    ("events.db used.db", "used.db-wal exists: used.db may be in use"),
    ("events.db used.db --force", "used.db-wal exists: used.db may be in use"),
    ("events.db link --force", "link is a link or a folder"),
    ("events.db folder --force", "folder is a link or a folder"),
    ("events.db missing/copy.db", "missing does not exist"),
    ("in copy.db", "not a SQLite database"),
]


@table(("arguments", "part"), CANNOT_START)
def test_a_backup_that_cannot_start_says_why_in_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, part: str
) -> None:
    imported(tmp_path, lines_of(*[event(f"{number}") for number in range(20)]))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("old.db")
    for name in ("old.db", "used.db-wal"):
        (tmp_path / name).write_text("old")
    before = sizes_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert part in refused_in_one_line(capsys, "backup", "--db", *arguments.split())
    assert sizes_in(tmp_path) == before


DISK_IS_FULL = sqlite3.OperationalError("database or disk is full")
STOPS = [  # the name to replace in the module, its replacement, the message
    ("_copy", Mock(side_effect=DISK_IS_FULL), "cannot copy .*: database or disk is full; no"),
    ("_copy", Mock(side_effect=KeyboardInterrupt), "interrupted"),
    ("_copy", Mock(), "the copy is damaged, so it was removed: no such table: events; check the disk"),
    ("_COUNTS", "SELECT random()", "the copy has .* instead of .*, so it was removed; check the disk"),
]


@table(("name", "changed", "problem"), STOPS)
def test_a_backup_that_stops_leaves_the_older_copy_and_nothing_else(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    changed: object,
    problem: str,
) -> None:
    imported(tmp_path, lines_of(event("a")))
    (tmp_path / "copy.db").write_text("older")
    before = sizes_in(tmp_path)
    capsys.readouterr()
    monkeypatch.setattr(backup, name, changed)
    assert command_line("backup", "--db", tmp_path / "events.db", tmp_path / "copy.db", "--force") == 1
    assert re.fullmatch(f"eventstore: .*{problem}.*\n", capsys.readouterr().err)
    assert sizes_in(tmp_path) == before


def test_a_damaged_database_gives_no_copy(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, lines_of(*[event(f"{number}") for number in range(500)]))
    path = tmp_path / "events.db"
    content = bytearray(path.read_bytes())
    content[-30_000:-20_000] = os.urandom(10_000)
    path.write_bytes(content)
    assert command_line("backup", "--db", path, tmp_path / "copy.db") == 1
    assert re.search(r"eventstore: (the copy is damaged|cannot copy).*\n$", capsys.readouterr().err)
    assert sorted(sizes_in(tmp_path)) == ["events.db", "in"]


# ---------------------------------------------------------------------------------------------- load and kills


@contextmanager
def sending(live: Live, run_name: str) -> Iterator[list[str]]:
    """Send events in the background; provide the ids that were acknowledged so far, in order."""
    acknowledged: list[str] = []
    is_over = threading.Event()

    def send() -> None:
        with live.client() as client, suppress(httpx.TransportError):
            while not is_over.is_set():
                ids = [f"{run_name} {len(acknowledged) + each}" for each in range(100)]
                events = [event(each, properties={"text": "x" * 200}) for each in ids]
                if client.post("/v1/events/bulk", json={"events": events}).status_code == 202:
                    acknowledged.extend(ids)

    thread = threading.Thread(target=send)
    thread.start()
    try:
        yield acknowledged
    finally:
        is_over.set()
        thread.join()


def check_copy(path: Path, acknowledged: list[str]) -> None:
    """Check that a copy opens, is whole, and holds these events."""
    with closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        stored = {found for (found,) in conn.execute("SELECT id FROM events")}
    assert set(acknowledged) <= stored


BACKUP = ("backup", "copy.db", "--force")
KILLED_BACKUP = """
import os, signal, sys, eventstore
from eventstore_extras import backup
backup._STEP_PAGES = 10
copied = backup._copy
backup._copy = lambda source, path, _: copied(source, path, lambda size: os.kill(os.getpid(), signal.SIGKILL))
eventstore.main(["backup", "copy.db", "--force"])
"""


def check_backup(folder: Path, acknowledged: list[str]) -> None:
    """Back up folder/events.db, and check the copy."""
    done = forked(folder, *BACKUP)
    assert done.returncode == 0, done.stderr
    check_copy(folder / "copy.db", acknowledged)


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs kill -9")
def test_copies_hold_acknowledged_events_despite_kills_under_load(tmp_path: Path) -> None:
    """Kill backups and servers in turn. Each backup removes what a killed one left."""
    before: list[str] = []
    for number in range(4):
        with Live(tmp_path, "--api-key", KEY) as live, sending(live, f"run {number}") as acknowledged:
            eventually(lambda sent=acknowledged: len(sent) >= 1000)  # type: ignore[misc]
            expected = before + acknowledged[:]
            check_backup(tmp_path, expected)
            assert forked(tmp_path, code=KILLED_BACKUP).returncode == -signal.SIGKILL
            assert len(list(tmp_path.glob("copy.db.*.tmp"))) == 1
            check_copy(tmp_path / "copy.db", expected)  # the older copy
            last = Command(tmp_path, *BACKUP)
            live.stop(signal.SIGKILL)
            assert (done := last.end()).returncode == 0, done.stderr
            check_copy(tmp_path / "copy.db", expected)
        before += acknowledged
        check_backup(tmp_path, before)  # of the database as the killed server left it
        assert list(tmp_path.glob("copy.db?*")) == []
