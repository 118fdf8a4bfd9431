"""The command `import`: formats, what stops it, what it leaves behind, memory."""

from __future__ import annotations

import array
import gzip
import itertools
import json
import os
import re
import signal
import sqlite3
import subprocess
import sys
import time
import zlib
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest

from eventstore import MEMBERS
from eventstore_extras import files, importing, text_formats
from eventstore_extras.entries import Entry, checked_row
from forked import Command, forked
from helpers import (
    KEY,
    SCRIPT,
    TEXT_FILE,
    Live,
    at,
    command_line,
    database,
    event,
    eventually,
    exported,
    imported,
    lines_of,
    refuse_to_write,
    refused_in_one_line,
    run,
    sizes_in,
    stored_ids,
    table,
    total,
)

needs_pipes = pytest.mark.skipif(os.name == "nt", reason="needs pipes and signals")

# ---------------------------------------------------------------------------------------------- formats

GOOD = b'{"event_id": "%d", "event_name": "call", "external_customer_id": "cust"}'
TWO = [event("a", timestamp=at(0), properties={"s": ']}[{"\\'}), event("b", timestamp=at(1), source="x")]
ARRAY, PRETTY = json.dumps(TWO).encode(), json.dumps(TWO, indent=2).encode()
AS_CSV = (b'timestamp,event_id,event_name,external_customer_id,source,properties\r\n'
          b'%b,a,call,cust,,"{""s"": ""]}[{\\""\\\\""}"\r\n\r\n%b,b,call,cust,x,\r\n' % (at(0).encode(), at(1).encode()))  # fmt: skip
FORMATS = {
    "lines": lines_of(*TWO),
    "lines with CRLF, blank ones and no end": b"\r\n" + lines_of(*TWO).replace(b"\n", b"\r\n \r\n").rstrip(),
    "array": ARRAY,
    "pretty array": b"\n\n" + PRETTY + b"\n",
    "bulk body": b'{"events": %b}' % ARRAY,
    "pretty bulk body with other members": b'{\n "events"\n:\n%b\n, "count": [2], "more": {"a": "]"}}\r\n' % PRETTY,
    "one page after another": b'{"events": [%b], "has_more": true}\n{"has_more": false, "events": [%b]}'
    % tuple(json.dumps(each).encode() for each in TWO),
    "lookups' answers": b"".join(
        b'{"event": %b, "events": [%b], "status": "processed"}' % ((json.dumps(each).encode(),) * 2) for each in TWO
    ),
    "lines that end in carriage returns": lines_of(*TWO).replace(b"\n", b"\r"),
    "JSON text sequence": b"".join(b"\x1e" + line + b"\n" for line in lines_of(*TWO).splitlines()),
    "pretty JSON text sequence": b"".join(b"\x1e" + json.dumps(each, indent=1).encode() + b"\n" for each in TWO),
    "csv": AS_CSV,
    "csv that ends in empty columns and rows": AS_CSV.replace(b"\r\n", b",,\r\n") + b",,,\r\n ,\r\n,,,,,,,,,,\r\n",
    "csv with rows longer than the header by empty cells": AS_CSV.replace(b"cust,x,", b"cust,x,,,,"),
    "csv with an empty column in the middle": AS_CSV.replace(b",event_id,", b", ,event_id,")
    .replace(b",a,", b",,a,")
    .replace(b",b,", b", ,b,"),
    "csv that ends in carriage returns": AS_CSV.replace(b"\r\n", b"\r"),
    "csv with a quoted header": AS_CSV.replace(b"event_id", b'"event_id"'),
}


@pytest.mark.slow
@table(
    "way", ["plain", "BOM", "utf-16", "utf-16-be", "utf-32", "utf-32-le", "gzip", "gzip in two parts", "standard input"]
)
@table("content", FORMATS.values(), ids=FORMATS)
def test_the_format_is_detected_by_the_content(tmp_path: Path, content: bytes, way: str) -> None:
    if way == "standard input":
        done = forked(tmp_path, "import", "-", given=content)
        assert (done.returncode, done.stdout) == (0, "")
        assert re.fullmatch(
            r"eventstore: imported 2 events into events\.db( \(created\))?: 2 new, 0 already stored; .+ s\n",
            done.stderr,
        )
    elif way == "gzip in two parts":
        imported(tmp_path, gzip.compress(content[:30]) + gzip.compress(content[30:]))
    else:
        changed = {"BOM": b"\xef\xbb\xbf" + content, "gzip": gzip.compress(content)}.get(way, content)
        imported(tmp_path, content.decode().encode(way) if way.startswith("utf") else changed)
    first, second = map(json.loads, exported(tmp_path).splitlines())
    assert (first["event_id"], first["properties"], second["source"]) == ("a", TWO[0]["properties"], "x")
    assert second["timestamp"] == at(1).replace("+00:00", "Z")


NO_EVENTS = {  # content, what the message says
    "PNG": (b"\x89PNG\r\n\x1a\n", ':1: is neither NDJSON nor JSON nor CSV with known columns and commas: it starts "'),
    "Markdown": (b"# Read me\n\nHello, world\n", ': it starts "# Read me"; '),
    "HTML": (b'<!doctype html>\n<html lang="en">\n', ': it starts "<!doctype html>"; '),
    "Python": (b'"""Counts events, such as "call"."""\n\nimport os\n', ': it starts "\\"\\"\\"Counts events, such as'),
    "a program": (b"\x7fELF\x02\x01\r\x01\n\x00", ': it starts "\\u007fELF\\u0002\\u0001'),
    "TOML": (b'[project]\nname = "x"\n', ': it starts "[project]"; '),
    "a log": (b"[2026-11-28 12:00:00] started, at last\n", ': it starts "[2026-11-28 12:00:00] started'),
    "another table": (b"name,city\na,b\n", ': it starts "name,city"; '),
    "a JSON text": (b'"event"\n', ': it starts "event"; '),
    "an error": (b'{"code": "unauthorized", "message": "x"}\n',
                 ':1: event_name: is required; external_customer_id: is required; it has the unknown fields "code", "message"; '),
    "other objects": (b'[{"name": "x"},\n{"name": "y"}]\n', 'events[0].external_customer_id: is required; it has the unknown fields "name"'),
}  # fmt: skip


@table(("content", "part"), NO_EVENTS.values(), ids=NO_EVENTS)
def test_a_file_without_any_event_is_refused_as_such(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, part: str
) -> None:
    imported(tmp_path, content, status=1)
    message = capsys.readouterr().err
    assert part in message
    assert "; nothing was stored; no events were found: name another file, or rename its fields or columns (" in message
    assert message.count("\n") == 1
    assert sorted(sizes_in(tmp_path)) == ["in"]


def test_after_a_good_event_a_bad_one_is_to_be_corrected(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, GOOD % 1 + b'\n{"name": "x"}\n', status=1)
    message = capsys.readouterr().err
    assert (
        'in:2: event_name: is required; external_customer_id: is required; it has the unknown fields "name"; '
        in message
    )
    assert message.endswith("; stored before it: 1 event, 1 of them new; correct it and import the file again\n")


OF_ONE_EVENT = {
    "ndjson": GOOD % 1 + b"\n", "json": b"[\n" + GOOD % 1 + b"\n]\n", "csv": b"event_name,external_customer_id\ncall,cust\n",
    "parquet": b"PAR1" + b"\0" * 100, "text": b"# Read me\n"}  # fmt: skip
SHOWN = {"ndjson": "NDJSON", "json": "JSON", "csv": "CSV", "parquet": "Parquet", "text": "no file of events"}


@table("way", ["plain", "gzip", "utf-16"])
@table(
    ("form", "actual"),
    [pair for pair in itertools.product(SHOWN, SHOWN) if pair[0] not in (pair[1], "text") and pair != ("csv", "text")],
)
def test_a_file_of_another_format_than_the_flag_says_is_refused_with_both(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], form: str, actual: str, way: str
) -> None:
    content = OF_ONE_EVENT[actual]
    if way == "gzip":
        content = gzip.compress(content)
    elif way == "utf-16" and "parquet" not in (form, actual):
        content = content.decode().encode("utf-16")
    imported(tmp_path, content, "--format", form, status=1)
    message = capsys.readouterr().err
    assert f"{tmp_path}/in: --format is {form}, but it looks like {SHOWN[actual]}: it starts " in message
    advice = "name a file of events" if actual == "text" else f"leave out --format, or give --format {actual}"
    assert message.endswith(f"; nothing was stored; {advice}\n")
    assert sorted(sizes_in(tmp_path)) == ["in"]


@table("actual", ["json", "csv", "parquet"])
def test_lines_of_another_format_are_not_rejected_one_by_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], actual: str
) -> None:
    imported(tmp_path, OF_ONE_EVENT[actual], "--format", "ndjson", "--skip-invalid", tmp_path / "rejects", status=1)
    assert f"--format is ndjson, but it looks like {SHOWN[actual]}: it starts " in capsys.readouterr().err


@table(("form", "content"), [
    ("json", b'{"has_more": false, "total": 1, "events": [' + GOOD % 1 + b"]}"),
    ("json", b'{"total": 1,\n"events": [' + GOOD % 1 + b"]}"),
    ("json", b"[7," + GOOD % 1 + b"]"),
    ("ndjson", b"\n\n" + GOOD % 1),
    ("ndjson", b"# a comment\n" + GOOD % 1),
    ("ndjson", b'"event_name": "cut off", "external_customer_id": "cust"}\n' + GOOD % 1),
    ("ndjson", b"[2026-11-28 12:00] started\n" + GOOD % 1),
    ("csv", b"\n\n ,\nevent_id,event_name,external_customer_id\n1,call,cust\n"),
])  # fmt: skip
def test_a_flag_for_the_format_is_believed_where_the_beginning_does_not_tell(
    tmp_path: Path, form: str, content: bytes
) -> None:
    imported(tmp_path, content, "--format", form, "--skip-invalid", tmp_path / "rejects")
    assert stored_ids(tmp_path) == ["1"]


EMPTY = {
    "nothing": b"", "blank lines": b"\n \r\n\n", "a mark": b"\xef\xbb\xbf", "gzip": gzip.compress(b""), "array": b"[]", "bulk": b'{"events": []}',
    "null": b'{"events": []}\n{"events": []}', "header": b"event_name,external_customer_id\n", "sequence": b"\x1e\n"}  # fmt: skip


@table("flags", [(), ("--dry-run",), ("--skip-invalid", "rejects")], ids=str)
@table("content", EMPTY.values(), ids=EMPTY)
def test_an_input_without_events_is_a_success_that_says_so(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    content: bytes,
    flags: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    imported(tmp_path, content, *flags)
    assert "import" in (message := capsys.readouterr().err)
    assert "; the input had no events; " in message
    assert message.count("\n") == 1


@table("name", ["/dev/null", "-"])
def test_the_null_device_and_an_empty_pipe_have_no_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    with open(os.devnull) as nothing:
        monkeypatch.setattr("sys.stdin", nothing)
        assert command_line("import", "--db", tmp_path / "events.db", name) == 0
    assert "imported 0 events into" in (message := capsys.readouterr().err)
    assert "; the input had no events; " in message


def test_a_summary_of_rejects_alone_does_not_call_the_input_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    imported(tmp_path, b"{}\n", "--skip-invalid", tmp_path / "rejects")
    assert "imported 0 events" in (message := capsys.readouterr().err)
    assert "1 rejected" in message
    assert "no events" not in message


NAMED = {  # content, problem
    "semicolons": (b"event_name;external_customer_id\na;b\n", ':1: its columns are separated by ";": write commas'),
    "tabs": (b"event_id\tevent_name\texternal_customer_id\n", ':1: its columns are separated by "\\t": write commas'),
    "spreadsheet": (b"PK\x03\x04\x14\x00\x06\x00", ": is a zip archive or a spreadsheet: unpack it, or save it as CSV"),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", ": is compressed with Zstandard: unpack it first"),
    "zstd in gzip": (gzip.compress(b"\x28\xb5\x2f\xfd\x04\x00"), ": is compressed with Zstandard: unpack it first"),
    "database": (b"SQLite format 3\x00\x10\x00", ": is a SQLite database: export its events"),
    "value without a name": (b"event_name,,external_customer_id\ncall,,cust\ncall,x,cust\n",
                             ":3: line: has a value in column 2, which the header does not name"),
    "value after the header's end": (b"event_name,external_customer_id,\ncall,cust,x\n", ":2: line: has 3 cells, the header has 2"),
    "second record of a sequence": (b"\x1e" + GOOD % 1 + b"\n\x1e{}\n", ": row 2: event_name: is required"),
    "not UTF-16": (b"[\0\x00\xd8]\0", ": is not valid UTF-16-LE: illegal UTF-16 surrogate"),
}  # fmt: skip


@table(("content", "problem"), NAMED.values(), ids=NAMED)
def test_a_file_that_cannot_be_imported_is_named_for_what_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, problem: str
) -> None:
    imported(tmp_path, content, status=1)
    assert f"eventstore: {tmp_path}/in{problem}" in (message := capsys.readouterr().err)
    assert message.count("\n") == 1


def test_rows_of_csv_keep_their_line_numbers(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    blank = b"\n" * 2500 + b",,,\n"
    rows = (b"1,call,cust\n", b'2,"call\n\nagain",cust\n', b"3,,cust\n")
    imported(tmp_path, blank + b"event_id,event_name,external_customer_id\n" + blank.join(rows), status=1)
    assert f"{tmp_path}/in:{2 + 3 * 2501 + 1 + 3}: event_name: is required" in capsys.readouterr().err
    assert b"call\\n\\nagain" in exported(tmp_path)
    with database(tmp_path) as conn:
        conn.execute("DELETE FROM events")
    imported(tmp_path, b"\n" * 2500 + GOOD % 1 + b"\n" * 3000 + b"{}", status=1)
    assert f"{tmp_path}/in:5501: event_name: is required" in capsys.readouterr().err


def test_elements_of_an_array_keep_their_bytes_and_line_numbers(tmp_path: Path) -> None:
    elements = ['{"a":"\\\\\\"]"}', '{"n":[1.50,0.10,12345678901234567890,1E400],"m":\n{"]}":"["}}', '"text, \\" ]"', "12.5e3",
                "null", "[[]]", "{}"]  # fmt: skip
    body = '{"events": [\n' + " ,\n".join(elements) + ' ]\n, "events2": [1], "x": 1} '
    rejects = tmp_path / "rejects"
    imported(tmp_path, body.encode(), "--skip-invalid", rejects)
    found = [MEMBERS.decode(line) for line in rejects.read_bytes().splitlines()]
    assert [bytes(reject["event"]).decode() for reject in found] == [text.replace("\n", "") for text in elements]
    locations = [(int(bytes(reject["line"])), int(bytes(reject["index"]))) for reject in found]
    assert locations == [(2, 0), (3, 1), (5, 2), (6, 3), (7, 4), (8, 5), (9, 6)]


# ---------------------------------------------------------------------------------------------- unreadable files

BROKEN = {  # content, problem; the event before it is stored
    "array not closed": (b"[\n" + GOOD % 1, ":2: the file ends inside the array: it is not whole"),
    "array that ends in a comma": (b"[\n" + GOOD % 1 + b",\n", ":3: the file ends inside the array: it is not whole"),
    "element not closed": (b"[" + GOOD % 1 + b',\n{"a": "', ":2: the file ends inside the array"),
    "no comma": (
        b"[" + GOOD % 1 + b"\n " + GOOD % 2 + b"]",
        ":2: is not valid JSON: JSON is malformed: expected ',' or ']'",
    ),
    "comma too many": (b"[" + GOOD % 1 + b",]", ":1: is not valid JSON: JSON is malformed: trailing comma in array"),
    "more after it": (b"[" + GOOD % 1 + b"]\n[]", ":2: is not valid JSON: JSON is malformed: trailing characters"),
    "no value": (b"[" + GOOD % 1 + b",\n nul ]", ":2: is not valid JSON: JSON is malformed: invalid character"),
    "bulk body not closed": (b'{"events": [' + GOOD % 1 + b"]", ":1: the file ends inside the array"),
    "no name": (b'{"events": [' + GOOD % 1 + b"], 1: 2}", ":1: is not valid JSON: JSON is malformed: expected a name"),
    "no colon": (b'{"events": [' + GOOD % 1 + b'], "a" 2}', ":1: is not valid JSON: JSON is malformed: expected ':'"),
    "no array": (
        b'{"events": [' + GOOD % 1 + b']}{"events": {"a": 1}}',
        ': must be an array of events, or {"events": [...]}',
    ),
    "too deep": (b"[" + GOOD % 1 + b"," + b"[" * 100_000 + b"]" * 100_001, ": is nested too deep"),
    "csv quote": (
        b'event_id,event_name,external_customer_id\n1,call,cust\n2,call,"cust\n',
        ":3: cannot be read as CSV: a quote opens here and",
    ),
    "csv with a lone carriage return": (
        b"event_id,event_name,external_customer_id\n1,call,cust\n2,call\rs,cust\n",
        ":3: cannot be read as CSV: a carriage return is neither in quotes nor at the end of a line",
    ),
    "gzip cut off": (gzip.compress(GOOD % 1 + b"\n", 0)[:-8], ": the gzip data is damaged or cut off"),
    "UTF-16 cut off": ((GOOD % 1 + b"\n{").decode().encode("utf-16")[:-1], ": is not valid UTF-16-LE: truncated data"),
}


@pytest.mark.slow
@table(("content", "problem"), BROKEN.values(), ids=BROKEN)
def test_an_unreadable_file_stops_even_an_import_that_skips_invalid_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, problem: str
) -> None:
    imported(tmp_path, content, "--skip-invalid", tmp_path / "rejects", status=1)
    assert f"{tmp_path}/in{problem}" in capsys.readouterr().err
    assert stored_ids(tmp_path) == ["1"]


@pytest.mark.slow
@table("start", [b"[", b'{"events": ['])
def test_a_value_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    monkeypatch.setattr(text_formats, "_BUFFER_BYTES", 10)
    monkeypatch.setattr(text_formats, "_MAX_VALUE_BYTES", 1 << 20)
    content = start + GOOD % 1 + b" " * (3 << 20) + b",\n" + GOOD % 2 + b',\n"' + b"x" * (3 << 20)
    imported(tmp_path, gzip.compress(content), "--skip-invalid", tmp_path / "rejects", status=1)
    assert f"{tmp_path}/in:3: a value is longer than 1 MB; stored before it: 2 events" in capsys.readouterr().err


BAD_FROM_THE_START = {
    "a bad event": b'{"event_name": "call"}\n' + GOOD % 1,
    "an array that ends at once": b"[",
    "an object that ends at once": b'{"events": [{"event_name": ',
    "gzip of nothing whole": gzip.compress(GOOD % 1)[:12],
}


@table("content", BAD_FROM_THE_START.values(), ids=BAD_FROM_THE_START)
def test_an_import_that_stops_at_the_first_event_creates_no_database(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    imported(tmp_path, content, status=1)
    assert "; stored before it: 0 events, 0 of them new; " in capsys.readouterr().err
    assert sorted(sizes_in(tmp_path)) == ["in"]


# ---------------------------------------------------------------------------------------------- the command


def test_a_dry_run_checks_every_event_and_stores_nothing(tmp_path: Path) -> None:
    (tmp_path / "events.ndjson").write_text(json.dumps(event("a") | {"propertes": 1}) + "\n" + json.dumps(event("b")))
    done = forked(tmp_path, "import", "events.ndjson", "--dry-run")
    assert done.returncode == 0
    assert not (tmp_path / "events.db").exists()
    assert "would import 2 events into events.db; nothing was stored" in done.stderr
    assert 'ignored unknown fields: "propertes"' in done.stderr


CANNOT_START = [  # arguments, what the message names
    ("import missing.ndjson", "missing.ndjson"),
    ("import folder", "folder"),
    ("import in --db :memory:", ":memory:"),
    ("import in --db text.db", "not a SQLite database"),
    ("import in --environment=", "--environment must not be empty: name an environment"),
    ("import in --environment 'production'", "--environment \"'production'\" is longer than 255 characters, in quotes"),
    (
        "import in --environment prod\x07",
        '--environment "prod\\u0007" is longer than 255 characters, in quotes, or has a control',
    ),
    ("import in --environment " + "x" * 256, "is longer than 255 characters"),
    ("import in --skip-invalid in", "overwrite"),
    ("import in --skip-invalid missing/rejects", "--skip-invalid"),
    ("import in --skip-invalid rejects --db missing/new.db", "the folder"),
]


@table(("arguments", "part"), CANNOT_START)
def test_an_import_that_cannot_start_says_why_in_one_line_and_changes_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, arguments: str, part: str
) -> None:
    imported(tmp_path, lines_of(event("a")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text(TEXT_FILE)
    before = sizes_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert part in refused_in_one_line(capsys, *arguments.split())
    assert sizes_in(tmp_path) == before


@pytest.mark.slow
def test_an_import_and_a_server_share_a_database(tmp_path: Path) -> None:
    (tmp_path / "in.ndjson").write_bytes(lines_of(*[event(f"i{number}") for number in range(20_000)]))
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        command = Command(tmp_path, "import", "in.ndjson")
        sent = 0
        while command.process.poll() is None:
            assert client.post("/v1/events", json=event(f"s{sent}")).status_code == 202
            sent += 1
        assert "20,000 new" in command.end().stderr
        assert sent > 0
        assert total(client) == 20_000 + sent
    assert "Error" not in live.log


# ---------------------------------------------------------------------------------------------- the summary

WITHOUT_ID = ("had no event_id and got one made from {} content and line: an equal event at the same place of another "
              "file would count as already stored")  # fmt: skip


@table("content", [
    lines_of(event(), event("a"), event()),
    json.dumps([event(), event("a"), event("")]).encode(),
    b"event_name,external_customer_id,event_id\ncall,cust,\ncall,cust,a\ncall,cust,\n",
], ids=["lines", "array", "csv"])  # fmt: skip
def test_the_summary_says_how_many_events_had_no_id(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    imported(tmp_path, content, "--dry-run")
    assert f"; nothing was stored; 2 events {WITHOUT_ID.format('their')}; " in capsys.readouterr().err
    imported(tmp_path, content)
    assert f": 3 new, 0 already stored; 2 events {WITHOUT_ID.format('their')}; " in capsys.readouterr().err
    imported(tmp_path, lines_of(event()), "--environment", "development")
    assert f"; 1 event {WITHOUT_ID.format('its')}; " in capsys.readouterr().err
    imported(tmp_path, lines_of(event("b")))
    assert "event_id" not in capsys.readouterr().err


OTHER = "have the event_id of an event with other content and cannot be stored under it: "


def test_the_summary_names_events_whose_id_belongs_to_another_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "".join(f"call,cust {number},123456789012345000\n" for number in range(3))
    content = f"event_name,external_customer_id,event_id\n{rows}call,cust,b\n".encode()
    named = 'line 3 ("123456789012345000"), line 4 ("123456789012345000")'
    for new, known in ((2, 2), (0, 4)):  # compared within the file, then with the database
        imported(tmp_path, content)
        assert f": {new} new, {known} already stored; 2 events {OTHER}{named}; " in capsys.readouterr().err
    imported(tmp_path, lines_of(event("b"), event("b", source="s")))
    one = OTHER.replace("have", "has")
    assert f': 0 new, 2 already stored; 1 event {one}line 2 ("b"); ' in capsys.readouterr().err
    imported(tmp_path, json.dumps([event("b"), event("b", source="s")]).encode())
    assert f'; 1 event {one}events[1] ("b"); ' in capsys.readouterr().err
    imported(tmp_path, lines_of(*[event("b", source=f"{number}") for number in range(9)]))
    assert "9 events have " in (message := capsys.readouterr().err)
    assert 'line 1 ("b"), line 2 ("b"), line 3 ("b"), line 4 ("b"), line 5 ("b"), ...; ' in message


OTHER_CONTENT = [{"source": "x"}, {"customer_id": "x"}, {"external_customer_id": "x"}, {"event_name": "x"},
                 {"timestamp": at(1_000)}, {"properties": {"n": 2}}, {"properties": {}}]  # fmt: skip
SAME_CONTENT = [{}, {"event_name": " call "}, {"timestamp": None}, {"timestamp": at(999)},
                {"properties": {"m": [1], "n": 1.0}}]  # fmt: skip


@table(("changes", "differs"), [(changes, True) for changes in OTHER_CONTENT] + [(changes, False) for changes in SAME_CONTENT],
       ids=str)  # fmt: skip
def test_a_repeated_event_is_compared_by_its_values(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], changes: dict[str, object], differs: bool
) -> None:
    """Times are compared to the millisecond, which is what FlexPrice keeps."""
    stored = event("a", timestamp=at(0), properties={"n": 1, "m": [1]})
    imported(tmp_path, lines_of(stored, stored | changes))
    assert (OTHER.replace("have", "has") in capsys.readouterr().err) is differs


def test_the_summary_names_a_new_environment(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, lines_of(event("a")))
    assert "environment" not in capsys.readouterr().err  # the default in a new database
    content, flags = lines_of(event("b")), ("--environment", "prodution")
    created = '; the environment "prodution" is new and {}, the database also has "development"; '
    imported(tmp_path, content, *flags, "--dry-run")
    assert created.format("would be created") in capsys.readouterr().err
    imported(tmp_path, content, *flags)
    assert created.format("was created") in capsys.readouterr().err
    imported(tmp_path, content, *flags)
    assert "environment" not in capsys.readouterr().err
    imported(tmp_path, content + b"{", "--environment", "stagin", status=1)
    assert '; the environment "stagin" is new and was created, ' in capsys.readouterr().err
    imported(tmp_path / "new", content, *flags)
    assert '; the environment "prodution" is new and was created; ' in capsys.readouterr().err


# ---------------------------------------------------------------------------------------------- pipes and signals


def importing_from_pipe(folder: Path, *flags: str) -> subprocess.Popen[bytes]:
    command = [*map(str, SCRIPT), "import", "-", *flags]
    return subprocess.Popen(command, cwd=folder, stdin=subprocess.PIPE, stderr=subprocess.PIPE)


def feed(process: subprocess.Popen[bytes], content: bytes) -> None:
    assert process.stdin
    process.stdin.write(content)
    process.stdin.flush()


def unread_bytes(process: subprocess.Popen[bytes]) -> int:
    """Return how many bytes of the pipe to the process it has not read yet."""
    import fcntl
    import termios

    assert process.stdin
    number = array.array("i", [0])
    fcntl.ioctl(process.stdin, termios.FIONREAD, number)
    return number[0]


def stored_number(folder: Path) -> int:
    """Return the number of events in folder/events.db, 0 before the import has created the table."""
    if not (folder / "events.db").exists():
        return 0
    with closing(sqlite3.connect(folder / "events.db")) as conn, suppress(sqlite3.OperationalError):
        return int(conn.execute("SELECT count(*) FROM events").fetchone()[0])
    return 0


def ten_events(way: str) -> bytes:
    lines = lines_of(*[event(f"{number}") for number in range(10)])
    if way == "csv":
        return b"event_name,external_customer_id,event_id\n" + b"".join(b"call,cust,%d\n" % n for n in range(10))
    packer = zlib.compressobj(wbits=31)
    return packer.compress(lines) + packer.flush(zlib.Z_SYNC_FLUSH) if way == "gzip" else lines


@pytest.mark.slow
@needs_pipes
@table("way", ["lines", "csv", "gzip"])
def test_events_of_a_pipe_are_stored_after_a_second_without_input(tmp_path: Path, way: str) -> None:
    """A kill that no program can handle loses nothing then."""
    with importing_from_pipe(tmp_path) as process:
        feed(process, ten_events(way))
        eventually(lambda: stored_number(tmp_path) == 10)
        process.kill()
    assert len(stored_ids(tmp_path)) == 10


@pytest.mark.slow
@needs_pipes
@table("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP], ids=lambda number: number.name)
def test_a_signal_stores_what_was_read_from_a_pipe(tmp_path: Path, number: signal.Signals) -> None:
    with importing_from_pipe(tmp_path) as process:
        feed(process, lines_of(*[event(f"{n}") for n in range(10)]) + b'{"half a line')
        eventually(lambda: unread_bytes(process) == 0)
        process.send_signal(number)
        message = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 1
    assert re.fullmatch(r"eventstore: interrupted; stored before it: 10 events, 10 of them new; to continue, import "
                        r"standard input again from its start: nothing is stored twice\n", message)  # fmt: skip
    assert len(stored_ids(tmp_path)) == 10


@needs_pipes
def test_events_that_trickle_in_are_stored_within_a_second(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    importer = importing._Importer(database := importing._Database(str(tmp_path / "events.db"), "development"), None)
    with closing(database):
        importer.add(Entry(1, lines_of(event("a"))))
        monkeypatch.setattr(importing, "_INPUT_WAIT_S", 0.0)
        importer.wait(lambda timeout_s: True)  # there is always some input
        assert importer.stored == stored_number(tmp_path) == 1
        importer.wait(lambda timeout_s: timeout_s is None)  # nothing to store: waits without end


@needs_pipes
@table(("way", "number"), [("file", 7), ("pipe", 10)])
def test_a_signal_while_events_are_checked_stores_what_was_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, way: str, number: int
) -> None:
    """A file stops after the event under check. A pipe cannot be read again, so all that it delivered is stored."""

    def interrupted(entry: Entry, *arguments: Any) -> Any:
        if entry.number == 7:
            os.kill(os.getpid(), signal.SIGINT)
        return checked_row(entry, *arguments)

    monkeypatch.setattr(importing, "checked_row", interrupted)
    before = signal.getsignal(signal.SIGINT)
    content = lines_of(*[event(f"{each}") for each in range(10)])
    (tmp_path / "in").write_bytes(content)
    reading, writing = os.pipe()
    os.write(writing, content)
    name = f"/dev/fd/{reading}" if way == "pipe" else tmp_path / "in"
    assert command_line("import", "--db", tmp_path / "events.db", name) == 1
    os.close(reading)
    os.close(writing)
    assert f"interrupted; stored before it: {number} events, {number} of them new; to" in capsys.readouterr().err
    assert stored_ids(tmp_path) == [f"{each}" for each in range(number)]
    assert signal.getsignal(signal.SIGINT) == before


@needs_pipes
def test_a_closed_standard_input_is_named(tmp_path: Path) -> None:
    done = run("sh", "-c", '"$@" <&-', "sh", *SCRIPT, "import", "-", cwd=tmp_path)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "standard input" in done.stderr


# ---------------------------------------------------------------------------------------------- a full disk


def test_a_full_disk_under_the_database_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, lines_of(event("a")))
    refuse_to_write(tmp_path, "new.id = 'c'")
    imported(tmp_path, lines_of(event("b"), event("c")), status=1)
    assert re.fullmatch(
        rf"eventstore: the database {tmp_path}/events.db refused the write: full; stored before it: 0 events, 0 of them "
        r"new; when it can be written again, import the file again\n",
        capsys.readouterr().err.partition("\n")[2],
    )


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
@table("number", [1, 5000])
def test_a_full_disk_under_the_rejects_stops_the_import(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], number: int
) -> None:
    bad = b'{"event_name": "call"}\n'
    imported(tmp_path, GOOD % 1 + b"\n" + bad * number + GOOD % 2, "--skip-invalid", "/dev/full", status=1)
    assert re.fullmatch(
        r"eventstore: cannot write --skip-invalid /dev/full: No space left on device; stored before it: 2 events, "
        r"2 of them new; free some disk space or name a file on another disk, and import the file again\n",
        capsys.readouterr().err,
    )
    assert stored_ids(tmp_path) == ["1", "2"]


# ---------------------------------------------------------------------------------------------- bounds


QUOTED = b'"{""list"": [' + b"1, " * 30_000 + b'1]}"'  # commas inside quotes do not count
ROWS = {  # the rows, and the line that the message names; None if they are fine
    "commas": (b"call,cust," + b"," * 20_000 + b"\n", 2),
    "short cells": (b"call,cust," + b"ab," * 20_000 + b"\n", 2),
    "quoted cells": (b"call,cust," + b'"a",' * 20_000 + b"\n", 2),
    "empty quoted cells": (b"call,cust," + b'"",' * 20_000 + b"\n", 2),
    "after a lone quote": (b'call"s,cust,' + b"," * 20_000 + b"\n", 2),
    "after a cell of several lines": (b'call,"cu\n\nst","' + b'""' * 100 + b'"' + b"," * 20_000 + b"\n", 2),
    "spread over lines": (b"call,cust" + b',"a\nb"' * 20_000 + b"\n", 2),
    "in the second row": (b"call,cust,\n" + b"," * 20_000 + b"\n", 3),
    "many commas in quotes": (b"call,cust," + QUOTED + b"\ncall,cust," + QUOTED + b"\n", None),
    "many commas in quotes of several lines": (b"call,cust," + QUOTED.replace(b"1, ", b"1,\n") + b"\n", None),
}


@table(("rows", "line"), ROWS.values(), ids=ROWS)
def test_a_row_of_csv_has_a_bounded_number_of_cells(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], rows: bytes, line: int | None
) -> None:
    content = b"event_name,external_customer_id,properties\n" + rows
    imported(tmp_path, content, status=1 if line else 0)
    assert (f"{tmp_path}/in:{line}: has more than 10000 cells" in capsys.readouterr().err) is bool(line)


BLANK = {  # the limit, the content after which it is exceeded, the blank parts
    "lines of white space": (b"", b" \t\n", 5, "in:6: is blank like the 5 lines before it"),
    "lines of white space after an event": (GOOD % 1 + b"\n", b" \r\n", 5, "in:7: is blank like the 5 lines before it"),
    "records of a sequence": (b"\x1e" + GOOD % 1 + b"\n", b"\x1e\n", 5, "row 7: is blank like the 5 rows before it"),
    "rows of commas": (b"event_id,event_name,external_customer_id\n1,call,cust\n", b",\n", 5, "in:8: is blank like the 5 rows before it"),
}  # fmt: skip


@table(("start", "blank", "limit", "problem"), BLANK.values(), ids=BLANK)
def test_the_number_of_blank_lines_one_after_another_is_bounded(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, start: bytes, blank: bytes,
    limit: int, problem: str,
) -> None:  # fmt: skip
    monkeypatch.setattr(text_formats, "_MAX_BLANK", limit)
    rest = {b"\x1e\n": b"\x1e" + GOOD % 2, b",\n": b"2,call,cust\n"}.get(blank, GOOD % 2 + b"\n")
    imported(tmp_path, start + blank * (limit - (blank[:1] == b"\x1e")) + rest + blank * limit)
    capsys.readouterr()
    imported(tmp_path, start + blank * (limit + 1) + rest, status=1)
    assert problem in capsys.readouterr().err


@table(("lines", "status"), [(10, 0), (11, 1)])
def test_a_row_of_csv_has_a_bounded_number_of_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, lines: int, status: int
) -> None:
    monkeypatch.setattr(text_formats, "_MAX_ROW_LINES", 10)
    row = b'call,"%s"\n' % b"\n".join([b"cust,"] * lines)
    imported(tmp_path, b"event_name,external_customer_id\n" + row, status=status)
    assert (f"{tmp_path}/in:2: has more than 10 lines" in capsys.readouterr().err) is bool(status)


def test_a_row_of_csv_with_many_lines_is_bounded(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = b"call,cust" + (b',"' + b"\nx" * 400 + b'"') * 4 + b"\n"
    imported(tmp_path, b"event_name,external_customer_id\n" + row, "--max-body-bytes", 1000, status=1)
    assert f"{tmp_path}/in:2: is longer than 2000 bytes" in capsys.readouterr().err


@pytest.mark.slow
@table("start", [b"", b"event_name,external_customer_id\n", b"["])
def test_an_import_of_nothing_but_blank_lines_can_be_interrupted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, start: bytes
) -> None:
    """The file is 0.1 MB, so that the file itself is read only once."""
    (tmp_path / "in").write_bytes(gzip.compress(start + b"\n" * 100_000_000, 1))
    pieces = []
    read = files._Arriving.read

    def interrupted_at_the_fifth_piece(self: files._Arriving, size: int) -> bytes:
        pieces.append(size)
        if len(pieces) == 5:
            os.kill(os.getpid(), signal.SIGINT)
        return read(self, size)

    monkeypatch.setattr(files._Arriving, "read", interrupted_at_the_fifth_piece)
    assert command_line("import", "--db", tmp_path / "events.db", tmp_path / "in") == 1
    assert "interrupted; stored before it: 0 events" in capsys.readouterr().err
    assert len(pieces) <= 6


# ---------------------------------------------------------------------------------------------- time and memory


@pytest.mark.slow
@table("frame", ["[%s]", '{"events": [%s]}', '{"event": %s}', "[%s,\n 1]"])
def test_one_large_event_in_an_array_takes_linear_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, frame: str
) -> None:
    """Linear time is 0.3 s of CPU time here; on a busy machine it takes no more."""
    monkeypatch.setattr(text_formats, "_BUFFER_BYTES", 1 << 16)
    read_more, parsed = text_formats._JsonText._read_more, []

    def counted(text: text_formats._JsonText) -> bool:
        is_more = read_more(text)
        parsed.append(len(text._text))
        return is_more

    monkeypatch.setattr(text_formats._JsonText, "_read_more", counted)
    large = json.dumps(event("a", properties={"list": ["x" * 10] * 500_000}))
    started_s = time.process_time()
    imported(tmp_path, (frame % large).encode(), "--skip-invalid", tmp_path / "rejects")
    assert time.process_time() - started_s < 5
    size = (tmp_path / "in").stat().st_size
    assert size > 100 * text_formats._BUFFER_BYTES
    assert size <= sum(parsed) < 4 * size  # quadratic: 50 * size
    assert stored_ids(tmp_path) == ["a"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@table("form", ["ndjson", "csv", "json"])
def test_an_import_needs_no_more_memory_for_a_large_file(tmp_path: Path, form: str) -> None:
    """The database stays small, as there are only 100 ids, and so do transactions: only holding the file would need more."""
    code = """if True:
        import sys, eventstore
        from eventstore_extras import files, importing, text_formats
        importing._GROUP_BYTES = 1 << 20
        eventstore.main(sys.argv[1:])
        print(open("/proc/self/status").read())
    """
    peaks = []
    for number in (100, 5_000):
        with (tmp_path / "in").open("w") as file:
            file.write("event_name,external_customer_id,event_id,properties.text\n" * (form == "csv"))
            for each in range(number):
                sent = json.dumps(event(f"{each % 100}", properties={"text": "x" * 5000}))
                lines = {"csv": f"call,cust,{each % 100},{'x' * 5000}\n", "json": f"{',' if each else '['}{sent}"}
                file.write(lines.get(form, sent + "\n"))
            file.write("]" * (form == "json"))
        done = forked(tmp_path, "import", "in", code=code)
        assert f"imported {number:,} events" in done.stderr
        peaks += [int(peak_kb) * 1024 for peak_kb in re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)]
    assert (tmp_path / "in").stat().st_size > 25_000_000
    assert peaks[1] - peaks[0] < 12_000_000
