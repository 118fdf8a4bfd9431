"""Upgrades of older files: every answer stays the same, and an interrupted upgrade leaves one of the two formats."""

from __future__ import annotations

import json
import logging
import os
import random
import re
import shutil
import sqlite3
import sys
import sysconfig
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import eventstore
from eventstore import StartError, connect, prepare_file
from eventstore_extras import forward, upgrades
from eventstore_extras.stored import open_stored
from forked import ROOT
from helpers import (
    NOW,
    SCRIPT,
    command_line,
    database,
    event,
    exported,
    fill,
    metering,
    run,
    serving,
    store,
    table,
    write_lock,
)
from powercut import Recording, strace

DATA = ROOT / "tests" / "data"
FORMATS = [1]
KEYS_OF_DATA = tuple(eventstore.ApiKey.hashed(f"key-of-{name}", name) for name in ("development", "staging"))
INDEXES = {
    1: {"events_by_customer": ["environment", "external_customer_id", "timestamp_us", "id"],
        "events_by_name": ["environment", "event_name", "timestamp_us", "id"]},
    2: {"events_by_customer": ["environment", "external_customer_id", "timestamp_us"],
        "events_by_name": ["environment", "event_name", "timestamp_us"]},
}  # fmt: skip


def copy_of(number: int, folder: Path, more_events: int = 0) -> Path:
    """Copy the file of this format and its forwarding progress to folder/events.db, and add events."""
    folder.mkdir(exist_ok=True)
    for path in DATA.glob(f"format-{number}.db*"):
        shutil.copy(path, folder / path.name.replace(f"format-{number}", "events"))
    with closing(connect(str(folder / "events.db"))) as conn:
        rows = [
            eventstore.Row(1, f"more-{n}", f"c{n % 50}", "", f"n{n % 7}", "", NOW + n // 9, NOW, "{}")
            for n in range(more_events)
        ]
        eventstore.insert_events(conn, rows, 5)
    return folder / "events.db"


class Contents(NamedTuple):
    version: int
    indexes: dict[str, list[str]]
    events: list[tuple[Any, ...]]


def contents(folder: Path) -> Contents:
    """Check the integrity of folder/events.db and return its format, the two indexes and the events."""
    with database(folder) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        indexes = {name: [row[2] for row in conn.execute(f"PRAGMA index_info({name})")] for name in INDEXES[1]}
        version = conn.execute("PRAGMA user_version").fetchone()[0]
        return Contents(version, indexes, conn.execute("SELECT * FROM events ORDER BY seq").fetchall())


def check_whole(found: Contents, events: list[tuple[Any, ...]]) -> None:
    """Check that the file has one of the two formats, never something between, and all events."""
    assert found.indexes == INDEXES[found.version]
    assert found.events == events


# ---------------------------------------------------------------------------------------------- answers


def differences(old: object, new: object, path: str = "") -> Iterator[str]:
    """Yield where a new answer differs from the old one. Later versions may add fields."""
    if isinstance(old, dict) and isinstance(new, dict):
        for name, value in old.items():
            yield from differences(value, new.get(name, "(missing)"), f"{path}.{name}")
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (old_value, new_value) in enumerate(zip(old, new, strict=True)):
            yield from differences(old_value, new_value, f"{path}[{position}]")
    elif old != new:
        yield f"{path}: {old!r} is now {new!r}"


@pytest.mark.slow
@table("number", FORMATS)
def test_every_recorded_answer_about_an_old_file_is_still_the_same(number: int, tmp_path: Path) -> None:
    copy_of(number, tmp_path)
    found = []
    with metering(tmp_path, api_keys=KEYS_OF_DATA) as client:
        for recorded in json.loads((DATA / f"format-{number}.json").read_text("utf-8")):
            kind = {name: recorded[name] for name in ("params", "json") if name in recorded}
            headers = {"x-api-key": f"key-of-{recorded['environment']}"}
            answer = client.request(recorded["method"], recorded["path"], headers=headers, **kind)
            found += [f"{recorded['path']} {kind} {each}" for each in differences(recorded["answer"], answer.json())]
    assert found == []


def test_forwarding_continues_at_the_position_beside_an_old_file(tmp_path: Path) -> None:
    path = copy_of(1, tmp_path)
    prepare_file(str(path))
    (recorded,) = forward.read_all_forward_progress(str(path))
    with closing(eventstore.connect_reader(str(path))) as conn:
        file = forward.open_forward_progress(conn, str(path), recorded.target, recorded.environment)
        left = f"SELECT id FROM events WHERE {eventstore.IN_ENVIRONMENT} AND seq > :seq"
        parameters = {"environment": "development", "seq": file.progress.seq}
        waiting = [event_id for (event_id,) in conn.execute(left, parameters)]
    assert (file.progress, waiting) == (recorded, ["waits"])


@table("form", ["ndjson", "csv"])
def test_an_export_is_the_same_before_and_after_the_upgrade(form: str, tmp_path: Path) -> None:
    copy_of(1, tmp_path)
    before = exported(tmp_path, form=form)
    assert contents(tmp_path).version == 1
    prepare_file(str(tmp_path / "events.db"))
    assert contents(tmp_path).version == 2
    assert exported(tmp_path, form=form) == before
    assert before.count(b"\n") > 60


# ---------------------------------------------------------------------------------------------- the upgrade

WRITING = ["import {events}", "prune --before 2020-01-01T00:00:00Z"]
READING = ["export -o {output}", "replay --to http://127.0.0.1:9 --dry-run", "prune --before 2020-01-01T00:00:00Z --dry-run",
           "import {events} --dry-run", "backup {output}"]  # fmt: skip


def run_command(folder: Path, command: str) -> int:
    (folder / "new.ndjson").write_text(json.dumps(event("new")) + "\n")
    words = command.format(events=folder / "new.ndjson", output=folder / "out").split()
    return command_line(words[0], "--db", folder / "events.db", *words[1:])


@table("command", WRITING, ids=lambda command: command.split()[0])
def test_a_command_that_writes_upgrades_the_file_and_says_so(
    command: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(1, tmp_path)
    before = contents(tmp_path)
    monkeypatch.setattr(eventstore.log, "hasHandlers", lambda: False)  # pytest adds a handler, commands do not
    assert run_command(tmp_path, command) == 0
    lines = capfd.readouterr().err.splitlines()
    assert lines[0] == f"eventstore: upgrading {path} from format 1 to 2: 62 events"
    assert re.fullmatch(
        rf"eventstore: upgraded {path} to format 2 in \d+\.\d s; older versions cannot open it any more", lines[1]
    )
    found = contents(tmp_path)
    assert (found.version, found.indexes) == (2, INDEXES[2])
    assert found.events[: len(before.events)] == before.events


@table("command", READING, ids=lambda command: command.split()[0])
def test_a_command_that_only_reads_leaves_an_old_file_as_it_is(command: str, tmp_path: Path) -> None:
    copy_of(1, tmp_path)
    before = contents(tmp_path)
    assert run_command(tmp_path, command) == 0
    assert contents(tmp_path) == before


def test_a_server_upgrades_at_its_first_start_and_logs_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    copy_of(1, tmp_path)
    caplog.set_level(logging.INFO)
    for expected in (2, 0):  # lines of the first start, and of the second
        caplog.clear()
        with serving(tmp_path):
            assert len([each for each in caplog.messages if "upgrad" in each]) == expected
    assert contents(tmp_path).version == 2


def test_a_long_upgrade_logs_how_much_is_done(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The share is computed from SQLite's instructions; a SQLite that needs more or fewer fails here."""
    monkeypatch.setattr(upgrades, "_REPORT_INTERVAL_S", 0.0)
    monkeypatch.setattr(upgrades, "_HANDLER_INSTRUCTIONS", 1000)
    caplog.set_level(logging.INFO)
    prepare_file(str(copy_of(1, tmp_path, more_events=1000)))
    shares = [int(share) for share in re.findall(r"about (\d+)% done", caplog.text)]
    assert len(shares) > 15
    assert shares == sorted(shares)
    assert 90 <= shares[-1] <= 99


def test_an_upgraded_file_equals_a_new_one(tmp_path: Path) -> None:
    prepare_file(str(copy_of(1, tmp_path / "old")))
    prepare_file(str(tmp_path / "new.db"))
    schemas = []
    for path in (tmp_path / "old" / "events.db", tmp_path / "new.db"):
        with closing(sqlite3.connect(path)) as conn:
            lines = [
                re.sub(r"IF NOT EXISTS |--.*|\s", "", sql or "")
                for (sql,) in conn.execute("SELECT sql FROM sqlite_schema")
            ]
            schemas.append((sorted(lines), conn.execute("PRAGMA user_version").fetchone()))
    assert schemas[0] == schemas[1]


def test_an_upgraded_file_takes_no_more_space_and_new_events_reuse_what_is_free(tmp_path: Path) -> None:
    path = copy_of(1, tmp_path, more_events=3000)
    size = path.stat().st_size
    prepare_file(str(path))
    assert path.stat().st_size == size
    with database(tmp_path) as conn:
        assert conn.execute("PRAGMA freelist_count").fetchone()[0] * 4096 > size / 20


# ---------------------------------------------------------------------------------------------- what can go wrong


@table("full", ["database", "temporary files"])
def test_an_upgrade_that_does_not_fit_says_how_much_it_needs(
    full: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, temporary = copy_of(1, tmp_path / "data", more_events=5000), tmp_path / "temporary"
    temporary.mkdir()
    before = contents(path.parent)
    folder = str(path.parent if full == "database" else temporary)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setenv("SQLITE_TMPDIR", str(temporary))
    with monkeypatch.context() as patch:  # two disks, one of them full
        patch.setattr(upgrades, "_disk_of", lambda name: name == folder)
        patch.setattr(shutil, "disk_usage", lambda name: usage._replace(free=20_000 if name == folder else 10**9))
        with pytest.raises(StartError) as raised:
            prepare_file(str(path))
    needed = "takes N MB on the disk of"
    message = (
        f"{path} is unchanged: to upgrade it to format 2 {needed} {folder}, which has 0.0 MB left: make room there"
    )
    assert re.fullmatch(re.escape(message).replace("N", r"[01]\.[1-9]"), str(raised.value))
    assert contents(path.parent) == before


def test_an_upgrade_on_a_disk_that_fills_up_leaves_the_file_as_it_is(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(1, small_disk, more_events=15_000)
    before = contents(small_disk)
    monkeypatch.setattr(upgrades, "_check_space", lambda *_: None)
    with closing(connect(str(path))) as conn:
        fill(small_disk / "filler")
        with pytest.raises(StartError, match="is unchanged: the disk is full; make room"):
            upgrades.upgrade(conn, str(path), 2)
    (small_disk / "filler").unlink()
    assert contents(small_disk) == before
    prepare_file(str(path))
    check_whole(contents(small_disk), before.events)


def test_the_space_that_is_required_is_enough(tmp_path: Path) -> None:
    """Compare with what the WAL takes at most; the temporary files cannot be seen."""
    path = copy_of(1, tmp_path, more_events=20_000)
    with closing(sqlite3.connect(path, isolation_level=None)) as reader:  # keeps the WAL from being removed
        reader.execute("SELECT count(*) FROM events").fetchone()
        prepare_file(str(path))
        wal_bytes = Path(f"{path}-wal").stat().st_size
        with closing(sqlite3.connect(path, isolation_level=None)) as conn:
            required = upgrades._space_needed(conn).wal
    assert wal_bytes <= required < 3 * wal_bytes


def test_an_upgrade_beside_a_process_that_writes_waits_and_then_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy_of(1, tmp_path)
    monkeypatch.setattr(eventstore, "PRAGMAS", (*eventstore.PRAGMAS, "PRAGMA busy_timeout = 1"))
    with write_lock(tmp_path), pytest.raises(StartError, match="is unchanged: another process writes to it; wait"):
        prepare_file(str(path))
    assert contents(tmp_path).version == 1


@pytest.mark.slow
def test_of_two_processes_that_start_together_one_upgrades(tmp_path: Path) -> None:
    path = copy_of(1, tmp_path, more_events=2000)
    before = contents(tmp_path)
    command = (*SCRIPT, "prune", "--before", "2020-01-01T00:00:00Z", "--db", path)
    with ThreadPoolExecutor(3) as pool:
        done = list(pool.map(lambda _: run(*command), range(3)))
    assert [each.returncode for each in done] == [0, 0, 0]
    assert "".join(each.stderr for each in done).count("upgraded") == 1
    check_whole(contents(tmp_path), before.events)


def test_the_service_alone_says_what_it_needs_to_upgrade_a_file(tmp_path: Path) -> None:
    path = copy_of(1, tmp_path)
    before = contents(tmp_path)
    for name in ("eventstore.py", "schema.sql", "debugger.html"):
        shutil.copy(ROOT / name, tmp_path)
    # -S: without the links of site-packages to this checkout
    environ = os.environ | {"PYTHONPATH": os.pathsep.join(sysconfig.get_path(name) for name in ("purelib", "platlib"))}
    done = run(sys.executable, "-S", tmp_path / "eventstore.py", "serve", "--port", "0", "--db", path, env=environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == (
        f"eventstore: {path} has format 1, not this eventstore's 2: upgrading it needs the folder eventstore_extras "
        f"beside {tmp_path}/eventstore.py\n"
    )
    assert contents(tmp_path) == before


@table("version", [3, 99])
def test_a_file_of_a_newer_format_is_refused_and_left_as_it_is(version: int, tmp_path: Path) -> None:
    path = copy_of(1, tmp_path)
    with database(tmp_path) as conn:
        conn.execute(f"PRAGMA user_version = {version}")
    before = path.read_bytes()
    for open_file in (prepare_file, open_stored):
        with pytest.raises(
            StartError, match=rf"was written by a newer eventstore \(format {version}, not this one's 2\)"
        ):
            open_file(str(path))
    assert path.read_bytes() == before


def test_an_upgrade_runs_again_if_an_older_server_set_the_number_back(tmp_path: Path) -> None:
    path = copy_of(1, tmp_path)
    prepare_file(str(path))
    before = contents(tmp_path)
    with database(tmp_path) as conn:
        conn.execute("PRAGMA user_version = 1")
    prepare_file(str(path))
    assert contents(tmp_path) == before


# ---------------------------------------------------------------------------------------------- kills and power cuts

PRUNE = (*SCRIPT, "prune", "--before", "2020-01-01T00:00:00Z", "--db", "events.db")


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_a_kill_at_any_write_leaves_the_old_format_or_the_new_one(tmp_path: Path, choose: random.Random) -> None:
    """Kill the process at a write, a sync, a truncation or a removal, chosen at random from all those of an upgrade."""
    calls = "pwrite64,fdatasync,fsync,ftruncate,unlink"
    original = copy_of(1, tmp_path / "original", more_events=6000)
    before, versions = contents(original.parent), set()

    def upgraded(folder: Path, *options: str) -> Path:
        shutil.copytree(original.parent, folder)
        run("strace", "-f", "-o", folder / "trace", "-e", f"trace={calls}", *options, *PRUNE, cwd=folder)
        return folder

    every_call = re.findall(r"^\d+ +(\w+)\(", (upgraded(tmp_path / "whole") / "trace").read_text(), re.MULTILINE)
    assert len(every_call) > 500
    for number in [0, len(every_call) - 1, *choose.sample(range(1, len(every_call) - 1), 8)]:
        name = every_call[number]
        kill = f"inject={name}:signal=KILL:when={every_call[: number + 1].count(name)}"  # strace counts each call's own
        folder = upgraded(tmp_path / f"killed {number}", "-e", kill)
        assert "killed by SIGKILL" in (folder / "trace").read_text()
        found = contents(folder)
        check_whole(found, before.events)
        versions.add(found.version)
        prepare_file(str(folder / "events.db"))
        check_whole(contents(folder), before.events)
    assert versions == {1, 2}


WRITE_SYNCED = """
import os, sys
file = os.open("events.db", os.O_CREAT | os.O_WRONLY, 0o644)
os.write(file, open(sys.argv[1], "rb").read())
os.fsync(file)
os.fsync(os.open(".", os.O_RDONLY))
"""


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("strace"), reason="needs strace")
def test_a_power_cut_at_any_moment_leaves_the_old_format_or_the_new_one(tmp_path: Path, choose: random.Random) -> None:
    original = copy_of(1, tmp_path / "original", more_events=600)
    before, versions = contents(original.parent), set()
    folder = tmp_path / "data"
    folder.mkdir()
    recording = Recording(folder)
    for number, command in enumerate([(sys.executable, "-c", WRITE_SYNCED, original), PRUNE]):
        trace = tmp_path / f"trace{number}"
        assert run(*(word for word in strace(trace) if word != "-D"), *command, cwd=folder).returncode == 0
        recording.add(trace)
    assert recording.files() == {
        "events.db": (folder / "events.db").read_bytes()
    }  # else the model of the disk is wrong
    for disk in recording.disks(60, choose):
        if disk.run == 1:
            after = tmp_path / f"cut {disk.number}"
            after.mkdir()
            disk.write_to(after, choose)
            found = contents(after)
            check_whole(found, before.events)
            versions.add(found.version)
            prepare_file(str(after / "events.db"))
            check_whole(contents(after), before.events)
    assert versions == {1, 2}


# ---------------------------------------------------------------------------------------------- going back


def test_the_documented_statements_turn_a_file_back_into_format_1_with_all_its_events(tmp_path: Path) -> None:
    path = copy_of(1, tmp_path)
    before, schema = contents(tmp_path), "SELECT sql FROM sqlite_schema ORDER BY name"
    with database(tmp_path) as conn:
        schema_before = [re.sub("IF NOT EXISTS ", "", sql or "") for (sql,) in conn.execute(schema)]
    with serving(tmp_path) as client:
        store(client, event("stored by the new version"))
    (statements,) = re.findall(r"<<'SQL'\n(.*?)SQL\n", (ROOT / "docs" / "upgrading.md").read_text("utf-8"), re.DOTALL)
    with database(tmp_path) as conn:
        conn.executescript(statements)
        assert [sql or "" for (sql,) in conn.execute(schema)] == schema_before
    after = contents(tmp_path)
    assert (after.version, after.indexes) == (1, INDEXES[1])
    assert [row[2] for row in after.events] == [*(row[2] for row in before.events), "stored by the new version"]
    prepare_file(str(path))
    check_whole(contents(tmp_path), after.events)
