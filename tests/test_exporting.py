"""The command `export`: formats, filters, files and standard output."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import eventstore
from eventstore_extras import stored
from helpers import (
    EVER,
    NASTY_PROPERTIES,
    NASTY_TEXTS,
    SCRIPT,
    at,
    command_line,
    counts,
    database,
    event,
    exported,
    ids,
    imported,
    lines_of,
    nasty_folder,
    run,
    serving,
    sizes_in,
    store,
    stored_ids,
    table,
)

# ---------------------------------------------------------------------------------------------- formats


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


def test_export_writes_rows_for_flexprices_own_table(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        store(client, event("a", source="s", timestamp="2026-08-06T12:23:31.987654+05:30", properties={"n": "\u00e9"}))
    assert json.loads(exported(tmp_path, "--tenant-id", "tenant_1", form="clickhouse")) == {
        "id": "a", "tenant_id": "tenant_1", "environment_id": "development", "external_customer_id": "cust",
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
    whole = run(*SCRIPT, "export", cwd=tmp_path)
    assert whole.stdout.encode() == exported(tmp_path)
    assert re.fullmatch(r"eventstore: exported 5,000 events; .+ s\n", whole.stderr)
    with subprocess.Popen([*SCRIPT, "export"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout
        assert process.stderr
        assert b'"00000"' in process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 1)
    elsewhere = run(*SCRIPT, "export", "--environment", "production", cwd=tmp_path)
    assert (elsewhere.returncode, elsewhere.stdout) == (0, "")
    assert "the database also has events of development" in elsewhere.stderr


@pytest.mark.slow
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
@table(("form", "number"), [("ndjson", 1), ("ndjson", 3000), ("csv", 1), ("parquet", 1)])
def test_a_full_disk_under_standard_output_is_named(tmp_path: Path, form: str, number: int) -> None:
    imported(tmp_path, lines_of(*[event(f"{n:05}") for n in range(number)]))
    with open("/dev/full", "wb") as full:
        done = run(
            *SCRIPT, "export", "--format", form, cwd=tmp_path, capture_output=False, stdout=full, stderr=subprocess.PIPE
        )
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


CANNOT_START = [  # arguments, what the message names
    ("export --db missing.db", "missing.db"),
    ("export --start-time yesterday", "--start-time must be RFC 3339"),
    (
        "export --start-time 2026-01-02T00:00:00Z --end-time 2026-01-01T00:00:00Z",
        '--end-time is "2026-01-01T00:00:00Z", before --start-time "2026-01-02T00:00:00Z"',
    ),
    ("export --property-filters x", "--property-filters must look like"),
    ("export --format clickhouse", "--tenant-id"),
    ("export --tenant-id t", "--tenant-id goes with --format clickhouse"),
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
    before = sizes_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert command_line(*arguments.split()) == 2
    output, message = capsys.readouterr()
    assert (output, re.fullmatch(r"eventstore: .+\n", message) is not None) == ("", True), message
    assert part in message
    assert sizes_in(tmp_path) == before
