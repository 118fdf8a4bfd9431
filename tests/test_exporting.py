"""The command `export`: formats, filters, files and standard output."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import eventstore
from eventstore_extras import stored
from forked import Template, forked
from helpers import (
    EVER,
    KEY,
    NASTY_PROPERTIES,
    NASTY_TEXTS,
    SCRIPT,
    Live,
    at,
    command_line,
    counts,
    database,
    event,
    exported,
    ids,
    imported,
    is_root,
    lines_of,
    nasty_folder,
    refused_in_one_line,
    run,
    serving,
    sizes_in,
    store,
    stored_ids,
    table,
    write_lock,
)

Run = Callable[..., subprocess.CompletedProcess[str]]

# ---------------------------------------------------------------------------------------------- formats


@pytest.mark.slow
@table("form", ["ndjson", "csv"])
def test_export_import_export_gives_the_same_bytes(tmp_path: Path, form: str) -> None:
    first = exported(nasty_folder(tmp_path), form=form)
    again = exported(imported(tmp_path / "again", first), form=form)
    assert again == first
    zipped = tmp_path / "zipped.gz"
    for _ in range(2):
        assert command_line("export", "--db", tmp_path / "events.db", "--format", form, "-o", zipped) == 0
        packed = zipped.read_bytes()
    assert exported(imported(tmp_path / "unpacked", packed), form=form) == first
    assert command_line("export", "--db", tmp_path / "again/events.db", "--format", form, "-o", zipped) == 0
    assert zipped.read_bytes() == packed


def test_ndjson_loses_nothing_through_csv_or_the_bulk_endpoint(tmp_path: Path) -> None:
    lines = exported(nasty_folder(tmp_path))
    assert len(lines.splitlines()) == len(NASTY_PROPERTIES) + len(NASTY_TEXTS) + 2  # one event, one line
    assert b'"properties":%b' % NASTY_PROPERTIES[1].encode() in lines
    assert b'"properties":{"pretty":[1,2],"text":"two  spaces, [brackets] {and} \\"quotes\\""}' in lines
    assert exported(imported(tmp_path / "csv", exported(tmp_path, form="csv"))) == lines
    (tmp_path / "bulk").mkdir()
    with serving(tmp_path / "bulk") as client:
        body = b'{"events": [' + b",".join(lines.splitlines()) + b"]}"
        assert counts(client.post("/v1/events/bulk", content=body)) == (18, 0)
    assert exported(tmp_path / "bulk") == lines


ENVIRONMENT_ID = "6f1c2a90-5a58-4a50-9d5e-2f4be0a0f5a1"


@table("environment_id", [ENVIRONMENT_ID, "env_01K8ZC3V9GQ4R5S6T7V8W9X0Y1"])
def test_export_writes_rows_for_flexprices_own_table(tmp_path: Path, environment_id: str) -> None:
    with serving(tmp_path) as client:
        store(client, event("a", source="s", timestamp="2026-08-06T12:23:31.987654+05:30", properties={"n": "\u00e9"}))
    flags = ("--tenant-id", "tenant_1", "--environment-id", environment_id)
    assert json.loads(exported(tmp_path, *flags, form="clickhouse")) == {
        "id": "a", "tenant_id": "tenant_1", "environment_id": environment_id, "external_customer_id": "cust",
        "event_name": "call", "customer_id": "", "source": "s", "timestamp": "2026-08-06 06:53:31.987",
        "ingested_at": "2025-10-15 11:38:47.962", "properties": '{"n":"\u00e9"}'}  # fmt: skip


# ---------------------------------------------------------------------------------------------- which events


@table("filters", [{}, {"external_customer_id": "c1"}, {"event_name": "n2"}, {"event_id": "e7"}, {"source": "s0"},
                   {"start_time": at(10)}, {"end_time": at(10)}, {"start_time": at(3), "end_time": at(9), "event_name": "n1"},
                   {"property_filters": {"p": ["1", "2"], "q": ["x"]}}], ids=str)  # fmt: skip
def test_export_filters_like_a_query_with_all_time_as_the_default_range(
    tmp_path_factory: pytest.TempPathFactory, filters: dict[str, Any]
) -> None:
    folder = tmp_path_factory.getbasetemp() / "filtered"
    if not folder.exists():
        folder.mkdir()
        with serving(folder) as client:
            store(client, *[event(f"e{n}", event_name=f"n{n % 3}", external_customer_id=f"c{n % 4}", source=f"s{n % 2}",
                                  timestamp=at(n), properties={"p": n % 5, "q": "x"}) for n in range(20)])  # fmt: skip
    flags: list[str] = []
    for name, value in filters.items():
        flags += [f"--{name.replace('_', '-')}", "p:1,2;q:x" if name == "property_filters" else value]
    found = [json.loads(line)["event_id"] for line in exported(folder, *flags).splitlines()]
    with serving(folder) as client:
        assert found == ids(client, "POST", **(EVER | filters), order="asc")
    assert found


def test_an_export_of_one_customer_does_not_read_other_customers_events(tmp_path: Path) -> None:
    events = [event(f"{n}", external_customer_id=f"cust {n % 100}", timestamp=at(n)) for n in range(1000)]
    imported(tmp_path, lines_of(*events))
    steps = []
    with database(tmp_path) as conn:
        for flags, number in ([], 1000), (["--external-customer-id", "cust 7"], 10):
            query = stored.flag_query(eventstore.parse_arguments(["export", *flags]))
            counted_steps = Mock(return_value=0)
            conn.set_progress_handler(counted_steps, 1)  # called for each step of SQLite's virtual machine
            assert sum(map(len, stored.stored_events(conn, query))) == number
            steps.append(counted_steps.call_count)
    assert steps[1] < steps[0] / 20


def test_pages_join_without_gaps_or_repeats(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with serving(tmp_path) as client:
        store(client, *[event(f"{n:03}", timestamp=at(n // 10), properties={"x": "y" * n}) for n in range(300)])
    monkeypatch.setattr(stored, "_PAGE_EVENTS", 7)
    monkeypatch.setattr(stored, "_PAGE_BYTES", 500)
    assert stored_ids(tmp_path) == [f"{n:03}" for n in range(300)]


# ---------------------------------------------------------------------------------------------- the command


@pytest.mark.slow
def test_standard_output_holds_only_data_and_may_be_closed_early(tmp_path: Path) -> None:
    imported(tmp_path, lines_of(*[event(f"{n:05}") for n in range(5000)]))
    whole = forked(tmp_path, "export")
    assert whole.stdout.encode() == exported(tmp_path)
    assert re.fullmatch(r"eventstore: exported 5,000 events; .+ s\n", whole.stderr)
    with subprocess.Popen([*SCRIPT, "export"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert b'"00000"' in process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 1)
    imported(tmp_path, b"", "--environment", "production")
    elsewhere = forked(tmp_path, "export", "--environment", "production")
    assert (elsewhere.returncode, elsewhere.stdout) == (0, "")
    assert "the database also has events of development" in elsewhere.stderr


@table("command", [
    "export", "export -o out", "export -o out.parquet", "export --format csv --event-name call",
    "replay --to http://127.0.0.1:9 --api-key x", "replay --to http://127.0.0.1:9 --dry-run",
])  # fmt: skip
@table(("present", "asked", "message"), [
    (["development"], "prodution", '"prodution", but the database events.db has only "development"'),
    (["development", "production"], "Production", 'has only "development", "production"'),
    (["production"], None, '--environment is "development", but the database events.db has only "production"'),
    (["development"], "", '--environment is "", but'),
    (["development"], "a\nb", '--environment is "a\\nb", but'),
    ([f"e{number}" for number in range(22)], "e", '"e18", "e19", ...'),
    ([], "development", "has no environment yet"),
], ids=str)  # fmt: skip
def test_an_unknown_environment_is_refused_with_the_known_ones(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    present: list[str],
    asked: str | None,
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    eventstore.prepare_file("events.db")
    with database(tmp_path) as conn:
        conn.executemany("INSERT INTO environments (name) VALUES (?)", [(name,) for name in present])
        conn.commit()
    before = sizes_in(tmp_path)
    flags = [] if asked is None else ["--environment", asked]
    assert message in refused_in_one_line(capsys, *command.split(), *flags)
    assert sizes_in(tmp_path) == before


@pytest.mark.slow
@table(("name", "flags", "start"), [
    ("events.csv", [], b"event_name,event_id,"),
    ("events.ndjson", [], b'{"event_name":'),
    ("csv", [], b'{"event_name":'),
    ("events.csv", ["--format", "ndjson"], b'{"event_name":'),
])  # fmt: skip
def test_the_name_of_the_output_chooses_the_format(tmp_path: Path, name: str, flags: list[str], start: bytes) -> None:
    imported(tmp_path, lines_of(event("a")))
    for file, open_file in ((tmp_path / name, open), (tmp_path / f"{name}.gz", gzip.open)):
        assert forked(tmp_path, "export", "-o", file, *flags).returncode == 0
        with open_file(file, "rb") as written:
            assert written.read().startswith(start)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@table(("form", "number"), [("ndjson", 1), ("ndjson", 3000), ("csv", 1), ("parquet", 1)])
def test_a_full_disk_under_standard_output_is_named(tmp_path: Path, form: str, number: int) -> None:
    imported(tmp_path, lines_of(*[event(f"{n:05}") for n in range(number)]))
    with open("/dev/full", "wb") as full:
        done = forked(tmp_path, "export", "--format", form, stdout=full)
    file = "/dev/full" if sys.platform == "linux" else ".*"
    assert done.returncode == 1
    assert re.fullmatch(
        rf"eventstore: cannot write standard output \({file}\): No space left on device; the export is incomplete, the "
        r"database is unchanged; free some disk space, or name a file on another disk, and export again\n",
        done.stderr,
    )
    assert len(stored_ids(tmp_path)) == number


@pytest.mark.skipif(os.name == "nt", reason="needs a shell")
def test_a_closed_standard_output_is_named(tmp_path: Path) -> None:
    imported(tmp_path, lines_of(event("a")))
    done = run("sh", "-c", '"$@" >&-', "sh", *SCRIPT, "export", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (2, "eventstore: standard output is closed: name a file with --output\n")


@table("name", ["production", "6f1c2a90", "env_production", ""])
def test_an_environment_name_is_refused_as_its_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    with pytest.raises(SystemExit, match="2"):
        command_line("export", "--format", "clickhouse", "--tenant-id", "t", "--environment-id", name)
    assert f"not the environment's name; got {name!r}" in capsys.readouterr().err


CANNOT_START = [  # arguments, what the message names
    ("export --db missing.db", "missing.db"),
    ("export --start-time yesterday", "--start-time must be RFC 3339"),
    (
        "export --start-time 2026-01-02T00:00:00Z --end-time 2026-01-01T00:00:00Z",
        '--end-time is "2026-01-01T00:00:00Z", before --start-time "2026-01-02T00:00:00Z"',
    ),
    ("export --property-filters x", "--property-filters must look like"),
    ("export --format clickhouse", "--format clickhouse needs --tenant-id and --environment-id"),
    ("export --format clickhouse --tenant-id t", "SELECT tenant_id, id AS environment_id, name FROM environments"),
    (f"export --format clickhouse --environment-id {ENVIRONMENT_ID}", "needs --tenant-id"),
    ("export --tenant-id t", "go with --format clickhouse"),
    (f"export --environment-id {ENVIRONMENT_ID}", "go with --format clickhouse"),
    ("export -o link", "--output link is a link: name the file itself"),
    ("export -o events.db", "events.db is the database"),
    ("export -o folder", "folder"),
    ("export -o missing/out", "missing does not exist"),
]


@table(("arguments", "part"), CANNOT_START)
def test_an_export_that_cannot_start_says_why_in_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, part: str
) -> None:
    imported(tmp_path, lines_of(event("a")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "link").symlink_to("in")
    before = sizes_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert part in refused_in_one_line(capsys, *arguments.split())
    assert sizes_in(tmp_path) == before


# ---------------------------------------------------------------------------------------------- a database that only is read

READING = ("export", "prune --before 2026-01-01T00:00:00Z --dry-run", "replay --to http://127.0.0.1:9 --dry-run",
           "import in --dry-run")  # fmt: skip
has_unshare = shutil.which("unshare") is not None and run("unshare", "-rm", "true").returncode == 0
read_only_mount = pytest.mark.skipif(not has_unshare, reason="needs a mount namespace (unshare -rm)")


READ_ONLY = """
import os, subprocess, sys, eventstore
subprocess.run(["sh", "-c", 'mount --bind "$PWD" "$PWD" && mount -o remount,bind,ro "$PWD"'], check=True)
os.chdir(os.getcwd())  # so far, the working directory is below the mount
sys.exit(eventstore.main())
"""


@pytest.fixture(scope="module")
def on_a_read_only_disk() -> Iterator[Run]:
    """Runs a command in a folder which it sees as a read-only file system."""
    template = Template("unshare", "-rm")
    yield partial(forked, code=READ_ONLY, template=template)
    template.close()


def killed(folder: Path, *events: Any) -> Path:
    """Leave a database as a killed server does: some events are only in the -wal."""
    with serving(folder):
        pass  # this makes the file; the server would leave its environments in the -wal
    with Live(folder, "--api-key", KEY) as live, live.client() as client:
        store(client, *events)
        live.process.kill()
    assert sizes_in(folder)["events.db-wal"] > 0
    return folder


@pytest.mark.slow
@read_only_mount
@table("command", READING)
def test_reading_commands_work_on_a_read_only_disk(tmp_path: Path, on_a_read_only_disk: Run, command: str) -> None:
    imported(tmp_path, lines_of(event("a")))
    before = sizes_in(tmp_path)
    done = on_a_read_only_disk(tmp_path, *command.split())
    assert (done.returncode, done.stderr.count("\n")) == (0, 1), done.stderr
    assert ('"event_id":"a"' in done.stdout) is (command == "export")
    assert sizes_in(tmp_path) == before


@pytest.mark.slow
@read_only_mount
def test_a_log_on_a_read_only_disk_is_read_or_the_command_refuses(tmp_path: Path, on_a_read_only_disk: Run) -> None:
    killed(tmp_path, event("a"))
    done = on_a_read_only_disk(tmp_path, "export")
    assert (done.returncode, '"event_id":"a"' in done.stdout) == (0, True), done.stderr
    (tmp_path / "events.db-shm").unlink()
    for log in ("events.db-wal", "events.db-journal"):
        (tmp_path / "events.db-wal").rename(tmp_path / log)
        done = on_a_read_only_disk(tmp_path, "export")
        assert (done.returncode, done.stdout) == (2, "")
        assert re.fullmatch(rf"eventstore: cannot read \S+/events\.db: \S+/{log} belongs to it, and cannot be read where "
                            r"nothing can be written; copy both to a folder that you can write to\n", done.stderr)  # fmt: skip
        (tmp_path / log).rename(tmp_path / "events.db-wal")
    (tmp_path / "events.db-wal").write_bytes(b"")  # holds nothing
    done = on_a_read_only_disk(tmp_path, "export")
    assert (done.returncode, "events" in done.stderr) == (0, True), done.stderr


@pytest.mark.slow
@read_only_mount
def test_the_newest_events_are_read_through_a_read_only_mount(tmp_path: Path, on_a_read_only_disk: Run) -> None:
    with serving(tmp_path) as client:
        for name in ("a", "b"):
            store(client, event(name))
            assert f'"event_id":"{name}"' in on_a_read_only_disk(tmp_path, "export").stdout


@pytest.mark.slow
@pytest.mark.skipif(not is_root or not shutil.which("setpriv"), reason="needs root, and setpriv to become another user")
def test_an_export_of_a_read_only_copy_creates_no_files_beside_it() -> None:
    as_another_user = ("setpriv", "--reuid", "65534", "--regid", "65534", "--clear-groups", *SCRIPT)
    with tempfile.TemporaryDirectory() as name:  # other users cannot enter tmp_path
        folder = Path(name)
        folder.chmod(0o755)
        imported(folder, lines_of(event("a")))
        export = (*as_another_user, "export", "--db", folder / "events.db")
        (folder / "events.db").chmod(0o444)
        done = run(*export)
        assert (done.returncode, '"event_id":"a"' in done.stdout) == (0, True), done.stderr
        (folder / "events.db").chmod(0o600)
        done = run(*export)
        assert (done.returncode, "cannot read the database" in done.stderr) == (2, True), done.stderr
        assert sorted(sizes_in(folder)) == ["events.db", "in"]


@table("command", READING)
def test_reading_commands_do_not_wait_for_the_write_lock(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, command: str
) -> None:
    imported(tmp_path, lines_of(event("a")))
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    with database(tmp_path, isolation_level=None) as conn:  # no -wal and -shm yet
        conn.execute("PRAGMA journal_mode = DELETE")
    with write_lock(tmp_path):
        assert command_line(*command.split()) == 0
    with serving(tmp_path), write_lock(tmp_path):
        assert command_line(*command.split()) == 0
    assert "cannot" not in capsys.readouterr().err


def test_an_empty_database_is_refused_and_stays_empty(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "events.db").touch()
    assert command_line("export", "--db", tmp_path / "events.db") == 2
    assert f"eventstore: the database {tmp_path}/events.db is empty: " in capsys.readouterr().err
    assert sizes_in(tmp_path) == {"events.db": 0}
