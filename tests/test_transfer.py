"""Events in and out: import, export and replay."""

from __future__ import annotations

import gzip
import io
import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest.mock import Mock

import pytest

import eventstore
from conftest import (
    EVER,
    KEY,
    NASTY_PROPERTIES,
    NASTY_TEXTS,
    NOW,
    SCRIPT,
    TEXT_FILE,
    Live,
    at,
    command_line,
    counts,
    database,
    event,
    eventually,
    exported,
    ids,
    imported,
    lines_of,
    nasty_folder,
    page,
    python,
    refuse_to_write,
    run,
    serving,
    sizes_in,
    store,
    stored_ids,
    table,
    total,
)
from eventstore_extras import forward, transfer

# ---------------------------------------------------------------------------------------------- import and export


@table("form", ["ndjson", "csv"])
def test_export_import_export_gives_the_same_bytes_whatever_the_data(tmp_path, form):
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


def test_csv_and_bulk_take_ndjson_s_events_without_loss(tmp_path):
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
    "csv": AS_CSV,
    "csv with a quoted header": AS_CSV.replace(b"event_id", b'"event_id"'),
}


@table("way", ["plain", "BOM", "gzip", "gzip in two parts", "standard input"])
@table("content", FORMATS.values(), ids=FORMATS)
def test_a_file_is_read_by_its_content(tmp_path, content, way):
    if way == "standard input":
        done = run(*SCRIPT, "import", "-", cwd=tmp_path, input=content.decode(), text=True)
        assert (done.returncode, done.stdout) == (0, "")
        assert re.fullmatch(
            r"eventstore: imported 2 events into events\.db(, which was made for them)?: 2 new, 0 already stored; .+ s\n",
            done.stderr,
        )
    elif way == "gzip in two parts":
        imported(tmp_path, gzip.compress(content[:30]) + gzip.compress(content[30:]))
    else:
        changed = {"BOM": b"\xef\xbb\xbf" + content, "gzip": gzip.compress(content)}.get(way, content)
        imported(tmp_path, changed)
    first, second = map(json.loads, exported(tmp_path).splitlines())
    assert (first["event_id"], first["properties"], second["source"]) == ("a", TWO[0]["properties"], "x")
    assert second["timestamp"] == at(1).replace("+00:00", "Z")


def test_an_array_is_cut_in_the_same_places_wherever_its_chunks_end(tmp_path, monkeypatch):
    texts = ['{"a": "\\\\\\"]"}', '["]", {"}": "["}]', "{}", '"text, \\" ]"', "12.5e3", "null", "[[]]"]
    body = ('{"events": [\n' + " , ".join(texts) + ' ]\n, "x": 1} ').encode()
    for size in range(1, len(body) + 1):
        monkeypatch.setattr(transfer, "CHUNK_BYTES", size)
        entries = list(transfer.json_array(io.BufferedReader(io.BytesIO(body)), 1000))
        assert [(entry.line, entry.number, entry.content.decode()) for entry in entries] == [
            (2, number, text) for number, text in enumerate(texts)
        ]


def test_csv_columns_make_properties_and_flexprices_own_export_comes_back(tmp_path, capsys):
    table_export = (
        '"id","tenant_id","external_customer_id","environment_id","event_name","customer_id","source","timestamp",'
        '"ingested_at","properties"\n'
        '"evt","t","cust","env","call",\\N,"api","2026-08-06 06:53:31.000","2026-08-06 06:53:32.250","{""n"": 1.50}"\n'
    )
    named = ('event_name,external_customer_id,event_id,properties.model,properties,properties.a.b\n'
             'call,cust,both,gpt,"{""n"": 1.50}",x\ncall,cust,none,,,\ncall,cust,one,,,007\n')  # fmt: skip
    imported(tmp_path, table_export.encode())
    imported(tmp_path, named.encode())
    with serving(tmp_path) as client:
        found = {stored["id"]: stored for stored in page(client, "POST", **EVER)["events"]}
        raw = client.post("/v1/events/query", json=EVER).text
    assert (found["evt"]["timestamp"], found["evt"]["ingested_at"]) == (
        "2026-08-06T06:53:31Z",
        "2026-08-06T06:53:32.25Z",
    )
    assert (found["evt"]["customer_id"], found["evt"]["environment_id"]) == ("", "development")
    assert '{"n":1.50,"model":"gpt","a.b":"x"}' in raw
    assert (found["none"]["properties"], found["one"]["properties"]) == ({}, {"a.b": "007"})
    capsys.readouterr()
    for header, part in (("event_name,external_customer_id,when,properties.", '"when", "properties."'), ("event_name", "external_customer_id"),
                         ("event_name,external_customer_id,source,source", "source twice"),
                         ("event_name,external_customer_id,id,event_id", "id and event_id twice")):  # fmt: skip
        imported(tmp_path, header.encode() + b"\n", status=1)
        assert f"{tmp_path}/in:1: the header " in (message := capsys.readouterr().err)
        assert part in message


def test_an_event_without_an_id_gets_one_of_its_content_and_number(tmp_path, capsys):
    same = {"event_name": "call", "external_customer_id": "cust"}
    for content in (lines_of(same, same, {**same, "source": "x"}), json.dumps([same, same]).encode(),
                    b"event_name,external_customer_id\ncall,cust\ncall,cust\n"):  # fmt: skip
        folder = tmp_path / str(len(content))
        imported(folder, content)
        before = exported(folder)
        imported(folder, content)
        imported(folder, gzip.compress(content.replace(b"\n", b"\r\n")))
        assert exported(folder) == before
        made = stored_ids(folder)
        assert len({*made}) == len(made) > 1
        assert all(re.fullmatch("import_[0-9a-f]{32}", event_id) for event_id in made)
    imported(folder, b"", "--environment", "staging")
    assert re.search(r"events\.db: 0 new, 0 already stored; \d+\.\d s\n\Z", capsys.readouterr().err)
    imported(folder, lines_of(event("s")), "--environment", "staging")
    assert (exported(folder), len(exported(folder, "--environment", "staging").splitlines())) == (before, 1)


GOOD = b'{"event_id": "%d", "event_name": "call", "external_customer_id": "cust"}'
BEFORE, AFTER = GOOD % 1 + b"\n", b"\n" + GOOD % 3
BAD_LINES = {  # what is between a good first and a good third event; the place and the problem
    "no JSON": (BEFORE + b"{,}" + AFTER, "2: event: is not valid JSON: "),
    "over several lines": (BEFORE + b"{" + AFTER, "2: line: is { alone: each event is one whole line"),
    "no object": (BEFORE + b"[1]" + AFTER, "2: event: must be an object, got [1]"),
    "no name": (BEFORE + b'{"external_customer_id": "c"}' + AFTER, "2: event_name: is required"),
    "two faults": (BEFORE + b'{"timestamp": "now", "event_name": 5, "external_customer_id": "c"}' + AFTER,
                   '2: event_name: must be a string, got 5; timestamp: must be RFC 3339 with a zone, got "now"'),
    "no UTF-8": (BEFORE + b'{"event_name": "\xff"}' + AFTER, "2: event: is not valid JSON: byte 16 is not UTF-8"),
    "too long": (BEFORE + b'{"event_name": "%b"}' % (b"x" * 3000) + AFTER, "2: line: is longer than 1000 bytes"),
    "in an array": (b"[\n" + BEFORE + b',\n{"event_name": "a"}, ' + GOOD % 3 + b"]",
                    "4: events[1].external_customer_id: is required"),
    "a number in an array": (b"[" + BEFORE + b", 12," + GOOD % 3 + b"]", "2: events[1].event: must be an object, got 12"),
    "csv": (b"event_id,event_name,external_customer_id,properties\n1,call,cust,\n2,call,cust,[1]\n3,call,cust,",
            "3: properties: must be an object, got [1]"),
    "csv cells": (b"event_id,event_name,external_customer_id\n1,call,cust\n2,call\n3,call,cust", "3: line: has 2 cells, the header has 3"),
    "csv no UTF-8": (b"event_id,event_name,external_customer_id\n1,call,cust\n2,c\xff,cust\n3,call,cust", "3: line: is not UTF-8"),
    "csv property twice": (b'event_id,event_name,external_customer_id,properties,properties.a\n1,call,cust,,\n2,c,cust,"{""a"":1}",5\n3,call,cust,,',
                           "3: properties.a: is in the column properties, too"),
    "csv time without a zone": (b"event_id,event_name,external_customer_id,timestamp\n1,call,cust,\n2,c,cust,2026-08-06 06:53:31.000\n3,call,cust,",
                                "3: timestamp: must be RFC 3339"),
}  # fmt: skip


@table(("content", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_event_stops_an_import_or_goes_to_the_rejects(tmp_path, capsys, content, problem):
    imported(tmp_path, content, "--max-body-bytes", 1000, status=1)
    message = capsys.readouterr().err
    assert message.startswith(f"eventstore: {tmp_path}/in:{problem}")
    assert "; stored before it: 1 event, 1 of them new; " in message
    assert stored_ids(tmp_path) == ["1"]
    rejects = tmp_path / "rejects.ndjson"
    capsys.readouterr()
    imported(tmp_path, content, "--max-body-bytes", 1000, "--skip-invalid", rejects)
    assert f": 1 new, 1 already stored, 1 rejected and written to {rejects}; " in capsys.readouterr().err
    assert stored_ids(tmp_path) == ["1", "3"]
    (reject,) = map(json.loads, rejects.read_bytes().splitlines())
    assert reject["line"] == int(problem.partition(":")[0])
    assert reject.get("index") == (1 if "events[1]" in problem else None)
    assert [{*error} for error in reject["errors"]] == [{"field", "code", "message"}] * len(reject["errors"])
    for error in reject["errors"]:
        assert error["field"] in problem
        assert error["message"].startswith(f"{error['field']} ")
    assert reject["event"]


BROKEN = {
    "array not closed": (b"[" + GOOD % 1, "1: the file ends inside the array"),
    "element not closed": (b"[" + GOOD % 1 + b',\n{"a": "', "2: the file ends inside events[1]"),
    "no comma": (b"[" + GOOD % 1 + b" " + GOOD % 2 + b"]", "1: the comma or ] after events[0] is missing"),
    "comma too many": (b"[" + GOOD % 1 + b",]", "1: events[1] is missing"),
    "more after it": (b"[" + GOOD % 1 + b"]\n[]", "1: after the events: []"),
    "bulk body not closed": (b'{"events": [' + GOOD % 1 + b"]", "1: after the events"),
    "csv quote": (
        b'event_id,event_name,external_customer_id\n1,call,cust\n2,call,"cust\n',
        "3: cannot be read as CSV: a quote opens here and",
    ),
    "gzip cut off": (gzip.compress(GOOD % 1 + b"\n", 0)[:-8], " the gzip data is damaged or cut off"),
}


@table(("content", "problem"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_on_stops_even_an_import_that_skips(tmp_path, capsys, content, problem):
    imported(tmp_path, content, "--skip-invalid", tmp_path / "rejects", status=1)
    assert f"{tmp_path}/in:{problem}" in capsys.readouterr().err
    assert stored_ids(tmp_path) == ["1"]


NOTHING_IN_IT = {
    "a text": b"Dear all,\n",
    "a csv of something else": b"name,city\na,b\n",
    "a bad event": b'{"event_name": "call"}\n' + GOOD % 1,
    "an array that ends at once": b"[",
    "an object that ends at once": b'{"events": [{"event_name": ',
    "gzip of nothing whole": gzip.compress(GOOD % 1)[:12],
}


@table("content", NOTHING_IN_IT.values(), ids=NOTHING_IN_IT)
def test_an_import_without_a_good_event_to_begin_with_leaves_no_database_behind(tmp_path, capsys, content):
    imported(tmp_path, content, status=1)
    assert "; stored before it: 0 events, 0 of them new; " in capsys.readouterr().err
    assert sorted(sizes_in(tmp_path)) == ["in"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@table("form", ["json", "ndjson", "csv"])
def test_an_import_needs_no_more_memory_for_a_large_file(tmp_path, form):
    """The few ids keep the database small, and the groups are small: what would grow is what holds the file."""
    report = ("import eventstore, sys; from eventstore_extras import transfer; "
              "transfer.GROUP_BYTES = transfer.CHUNK_BYTES = 1 << 20; eventstore.main(sys.argv[1:]); print(open('/proc/self/status').read())")  # fmt: skip
    peaks = []
    for number in (100, 5_000):
        with (tmp_path / "in").open("w") as file:
            file.write({"json": "[", "csv": "event_name,external_customer_id,event_id,properties.text\n"}.get(form, ""))
            for each in range(number):
                sent = event(f"{each % 100}", properties={"text": "x" * 5000})
                line = f"call,cust,{each % 100},{'x' * 5000}\n" if form == "csv" else json.dumps(sent) + "\n"
                file.write("," + line if form == "json" and each else line)
            file.write("]" * (form == "json"))
        done = python(report, "import", tmp_path / "in", "--db", tmp_path / "events.db")
        assert f"imported {number:,} events" in done.stderr
        peaks.append(int(re.search(r"VmHWM:\s+(\d+) kB", done.stdout)[1]) * 1024)
    assert (tmp_path / "in").stat().st_size > 25_000_000
    assert peaks[1] - peaks[0] < 12_000_000


@pytest.mark.slow
def test_an_import_and_a_server_share_a_file(tmp_path):
    (tmp_path / "in.ndjson").write_bytes(lines_of(*[event(f"i{number}") for number in range(20_000)]))
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        process = subprocess.Popen([*SCRIPT, "import", "in.ndjson"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        sent = 0
        while process.poll() is None:
            assert client.post("/v1/events", json=event(f"s{sent}")).status_code == 202
            sent += 1
        assert "20,000 new" in process.stderr.read()
        process.stderr.close()
        assert sent > 0
        assert total(client) == 20_000 + sent
    assert "Error" not in live.log


@table("filters", [{}, {"external_customer_id": "c1"}, {"event_name": "n2"}, {"event_id": "e7"}, {"source": "s0"},
                   {"start_time": at(10)}, {"end_time": at(10)}, {"start_time": at(3), "end_time": at(9), "event_name": "n1"},
                   {"property_filters": {"p": ["1", "2"], "q": ["x"]}}], ids=str)  # fmt: skip
def test_export_filters_as_a_query_does_over_all_time_by_default(tmp_path_factory, filters):
    folder = tmp_path_factory.getbasetemp() / "filtered"
    if not folder.exists():
        folder.mkdir()
        with serving(folder) as client:
            store(client, *[event(f"e{n}", event_name=f"n{n % 3}", external_customer_id=f"c{n % 4}", source=f"s{n % 2}",
                                  timestamp=at(n), properties={"p": n % 5, "q": "x"}) for n in range(20)])  # fmt: skip
    flags = dict(filters)
    if "property_filters" in flags:
        flags["property_filters"] = "p:1,2;q:x"
    flags = itertools.chain.from_iterable((f"--{name.replace('_', '-')}", value) for name, value in flags.items())
    found = [json.loads(line)["event_id"] for line in exported(folder, *flags).splitlines()]
    with serving(folder) as client:
        assert found == ids(client, "POST", **(EVER | filters), order="asc")
    assert found


def test_an_export_of_one_customer_does_not_look_through_the_others_events(tmp_path):
    events = [event(f"{n}", external_customer_id=f"cust {n % 100}", timestamp=at(n)) for n in range(1000)]
    imported(tmp_path, lines_of(*events))
    steps = []
    with database(tmp_path) as conn:
        for flags, number in ([], 1000), (["--external-customer-id", "cust 7"], 10):
            query = transfer.flag_query(eventstore.parse_arguments(["export", *flags]))
            counter = itertools.count()
            conn.set_progress_handler(lambda counter=counter: next(counter) and None, 1)
            assert sum(map(len, transfer.stored_events(conn, query))) == number
            steps.append(next(counter))  # of SQLite's machine
    assert steps[1] < steps[0] / 20


def test_pages_of_an_export_meet_whatever_their_size_and_times(tmp_path, monkeypatch):
    with serving(tmp_path) as client:
        store(client, *[event(f"{n:03}", timestamp=at(n // 10), properties={"x": "y" * n}) for n in range(300)])
    monkeypatch.setattr(transfer, "PAGE_EVENTS", 7)
    monkeypatch.setattr(transfer, "GROUP_BYTES", 500)
    assert stored_ids(tmp_path) == [f"{n:03}" for n in range(300)]


def test_export_writes_rows_for_flexprices_own_table(tmp_path):
    with serving(tmp_path) as client:
        store(client, event("a", source="s", timestamp="2026-08-06T12:23:31.987654+05:30", properties={"n": "\u00e9"}))
    assert json.loads(exported(tmp_path, "--tenant-id", "tenant_1", form="clickhouse")) == {
        "id": "a", "tenant_id": "tenant_1", "environment_id": "development", "external_customer_id": "cust",
        "event_name": "call", "customer_id": "", "source": "s", "timestamp": "2026-08-06 06:53:31.987",
        "ingested_at": "2025-10-15 11:38:47.962", "properties": '{"n":"\u00e9"}'}  # fmt: skip


def test_an_exported_file_appears_when_it_is_complete(tmp_path, capsys, monkeypatch):
    imported(tmp_path, lines_of(event("a")))
    (tmp_path / "out.ndjson").write_text("before")
    for error, part in (
        (KeyboardInterrupt(), "interrupted"),
        (OSError(28, "No space left on device"), "No space left"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(transfer, "ndjson", Mock(side_effect=error))
            capsys.readouterr()
            assert command_line("export", "--db", tmp_path / "events.db", "-o", tmp_path / "out.ndjson") == 1
        assert re.fullmatch(rf"eventstore: .*{part}.*\n", capsys.readouterr().err)
        assert (tmp_path / "out.ndjson").read_text() == "before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["events.db", "in", "out.ndjson"]


@pytest.mark.slow
def test_standard_output_holds_data_only_and_may_be_closed_early(tmp_path):
    imported(tmp_path, lines_of(*[event(f"{n:05}") for n in range(5000)]))
    whole = run(*SCRIPT, "export", cwd=tmp_path, text=False)
    assert whole.stdout == exported(tmp_path)
    assert re.fullmatch(rb"eventstore: exported 5,000 events; .+ s\n", whole.stderr)
    with subprocess.Popen([*SCRIPT, "export"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert b'"00000"' in process.stdout.readline()
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 1)
    elsewhere = run(*SCRIPT, "export", "--environment", "production", cwd=tmp_path)
    assert (elsewhere.returncode, elsewhere.stdout) == (0, "")
    assert "events of development, too" in elsewhere.stderr


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
@table("missing", [False, True], ids=["tqdm", "no tqdm"])
def test_on_a_terminal_a_bar_shows_how_far_it_is_if_tqdm_is_there(tmp_path, missing):
    import fcntl
    import pty
    import termios

    imported(tmp_path, lines_of(event("a"), event("b")))
    code = f"import sys; {'sys.modules.update(tqdm=None);' * missing} import eventstore; sys.exit(eventstore.main())"
    terminal, screen = pty.openpty()
    fcntl.ioctl(screen, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
    try:
        for arguments, shown in (("export -o out", "2.00/2.00"), ("import in --db new.db", "100%")):
            done = python(
                code, *arguments.split(), cwd=tmp_path, capture_output=False, stderr=screen, stdout=subprocess.PIPE
            )
            written = os.read(terminal, 100_000).decode()
            assert (done.returncode, done.stdout) == (0, "")
            assert (shown in written) is not missing
            assert "ported 2 events" in written
    finally:
        os.close(terminal)
        os.close(screen)


CANNOT_RUN = [  # arguments, what the message names
    ("import missing.ndjson", "missing.ndjson"),
    ("import folder", "folder"),
    ("import in --db :memory:", ":memory:"),
    ("import in --db text.db", "not a SQLite database"),
    ("import in --skip-invalid in", "overwrite"),
    ("import in --skip-invalid missing/rejects", "--skip-invalid"),
    ("import in --skip-invalid rejects --db missing/new.db", "the folder"),
    ("export --db missing.db", "missing.db"),
    ("export --start-time yesterday", "--start-time must be RFC 3339"),
    (
        "export --start-time 2026-01-02T00:00:00Z --end-time 2026-01-01T00:00:00Z",
        '--end-time is "2026-01-01T00:00:00Z", before --start-time "2026-01-02T00:00:00Z"',
    ),
    ("export --property-filters x", "--property-filters must look like"),
    ("export --format clickhouse", "--tenant-id"),
    ("export -o events.db", "events.db"),
    ("export -o folder", "folder"),
    ("replay --to ftp://host", "ftp://host"),
    ("replay --to localhost:8080", "localhost:8080"),
    ("replay --to http://host:99999", "99999"),
    ("replay --to http://host/v1?key=1", "key=1"),
    ("replay --to http://127.0.0.1:1", "FLEXPRICE_API_KEY"),
    (
        "replay --to http://127.0.0.1:1 --api-key s\u00e9cret",
        "--api-key: an API key is empty, or has a space or a character outside ASCII",
    ),
]


@table(("arguments", "part"), CANNOT_RUN)
def test_what_cannot_be_done_is_said_in_one_line_before_anything_is(tmp_path, capsys, monkeypatch, arguments, part):
    imported(tmp_path, lines_of(event("a")))
    (tmp_path / "folder").mkdir()
    (tmp_path / "text.db").write_text(TEXT_FILE)
    before = sizes_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    assert command_line(*arguments.split()) == 2
    output, message = capsys.readouterr()
    assert (output, re.fullmatch(r"eventstore: .+\n", message) is not None) == ("", True), message
    assert part in message
    assert sizes_in(tmp_path) == before


# ---------------------------------------------------------------------------------------------- replay


class Target:
    """An HTTP server before an application in this process; it can answer otherwise, and remembers what came."""

    def __init__(self, folder: Path, *tricks: Callable[[BaseHTTPRequestHandler, bytes], bool]):
        """A trick is asked about each request and says whether it dealt with it; one that did is not asked again."""
        folder.mkdir(exist_ok=True)
        self.most_bytes, self.too_large = 1 << 40, reset  # what becomes of a larger body
        self.folder, self.tricks, self.bodies, self.times, self.lock = folder, [*tricks], [], [], threading.Lock()
        target = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                if (size := int(self.headers["content-length"])) > target.most_bytes:
                    target.too_large(self, size)
                    return
                body = self.rfile.read(size)
                with target.lock:
                    target.bodies.append(body)
                    target.times.append(time.monotonic())
                    trick = target.tricks[0] if target.tricks else None
                    if trick and trick(self, body):
                        target.tricks.pop(0)
                        return
                answer = target.client.post(self.path, content=body, headers={"x-api-key": self.headers["x-api-key"]})
                reply(self, answer.status_code, answer.content, **answer.headers)

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> Target:
        self.client = serving(self.folder)
        self.client.__enter__()
        threading.Thread(target=self.server.serve_forever, args=[0.01]).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()
        self.client.__exit__(None, None, None)

    def ids_sent(self) -> list[list[str]]:
        return [[sent["event_id"] for sent in json.loads(body)["events"]] for body in self.bodies]


def reply(handler, status: int, body: bytes = b"", **headers: str) -> bool:
    handler.send_response(status)
    for name, value in ({"content-length": str(len(body))} | headers).items():
        handler.send_header(name.replace("_", "-"), value)
    handler.end_headers()
    handler.wfile.write(body)
    return True


def reset(handler, size: int) -> None:
    """As a proxy does that has read enough."""
    time.sleep(0.001)
    handler.rfile.read(size // 2)
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    socket.close(handler.connection.detach())


def answer_413(handler, size: int) -> None:
    handler.rfile.read(size)
    reply(handler, 413)


def drop(handler, _: bytes) -> bool:
    handler.connection.shutdown(socket.SHUT_RDWR)
    return True


def replayed(folder: Path, url: str, *flags: object, key: str = KEY) -> int:
    return command_line("replay", "--db", folder / "events.db", "--to", url, "--api-key", key, *flags)


def a_source(folder: Path, number: int = 100) -> Path:
    return imported(folder / "source", lines_of(*[event(f"{n:05}", timestamp=at(n)) for n in range(number)]))


def test_a_replay_outlasts_429_500_and_broken_connections(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forward, "BACKOFF_BASE_S", 0.001)
    source = a_source(tmp_path)
    tricks = [lambda handler, _: reply(handler, 429, retry_after="1"), lambda handler, _: reply(handler, 500), drop,
              lambda handler, _: reply(handler, 503, b"busy", retry_after="0"), drop]  # fmt: skip
    with Target(tmp_path / "target", *tricks) as target:
        assert replayed(source, f"{target.url}/v1/", "--batch-size", 10, "--concurrency", 1) == 0
        assert target.times[1] - target.times[0] >= 1  # what Retry-After asked for
        assert target.ids_sent()[5:] == [[f"{n:05}" for n in range(at, at + 10)] for at in range(0, 100, 10)]
        assert target.ids_sent()[:5] == target.ids_sent()[5:6] * 5
    assert re.search(r"sent 100 events: 100 accepted, 5 retried; .+ s\n$", capsys.readouterr().err)
    assert exported(tmp_path / "target") == exported(source)


@table(("text", "seconds"), [("7", 7), ("", 0), ("soon", 0), ("-5", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)])
def test_retry_after_is_a_number_or_a_date(text, seconds):
    assert forward.retry_after_s(text) == seconds
    in_an_hour = (datetime.now(UTC) + timedelta(hours=1)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 3000 < forward.retry_after_s(in_an_hour) <= 3600


def test_a_refused_batch_stops_a_replay_which_goes_on_from_there_later(tmp_path, capsys):
    source = a_source(tmp_path)
    flags = ("--batch-size", 10, "--concurrency", 3)

    def poisoned(handler, body: bytes) -> bool:
        return b'"00045"' in body and reply(
            handler, 400, b'{"message": "no poison", "details": {"errors": [{"message": "in 5"}]}}'
        )

    with Target(tmp_path / "target", poisoned) as target:
        assert replayed(source, target.url, *flags, key="wrong") == 1
        message = capsys.readouterr().err
        assert "answered 401: the header x-api-key holds a key" in message
        assert "(the key came from --api-key)" in message
        assert replayed(source, target.url, *flags) == 1
        message = capsys.readouterr().err
        for part in ("answered 400: no poison (in 5)", '"00040" to "00049"', f"{(NOW + 39) * 1000}::00039"):
            assert part in message
        assert set(stored_ids(source)[:40]) <= set(ids(target.client, "POST", **EVER, page_size=1000))
        del target.bodies[:]
        assert replayed(source, f"{target.url}/v1", *flags) == 0
        message = capsys.readouterr().err
        assert "going on at cursor" in message
        assert "40 events were accepted before (--restart starts over)" in message
        assert sorted(itertools.chain(*target.ids_sent())) == [f"{n:05}" for n in range(40, 100)]
        del target.bodies[:]
        assert replayed(source, target.url, *flags, "--restart") == 0
        assert len(target.bodies) == 10
        assert "100 accepted (100 of them it had)" in capsys.readouterr().err
    assert exported(tmp_path / "target") == exported(source)


@table("status", [200, 301])
def test_what_does_not_answer_202_is_no_target_and_a_redirect_gets_no_key(tmp_path, capsys, status):
    source = a_source(tmp_path)
    with Target(
        tmp_path / "target", lambda handler, _: reply(handler, status, b"<p>hello", location="http://127.0.0.1:1/")
    ) as target:
        assert replayed(source, target.url) == 1
        assert f"answered {status}: <p>hello - 202 was expected" in capsys.readouterr().err
        assert len(target.bodies) == 1


@pytest.mark.slow
def test_a_replay_sends_less_at_a_time_to_a_target_that_resets_large_bodies_or_answers_413(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(forward, "BACKOFF_BASE_S", 0.001)
    source = imported(
        tmp_path / "source", lines_of(*[event(f"{n:05}", properties={"x": "y" * 4000}) for n in range(500)])
    )
    with Target(tmp_path / "target") as target:
        target.most_bytes = 100_000
        for target.too_large in reset, answer_413:
            assert replayed(source, target.url, "--restart") == 0
            assert "sent 500 events: 500 accepted" in capsys.readouterr().err
            assert 50_000 < max(map(len, target.bodies)) <= 100_000
            assert sorted(itertools.chain(*target.ids_sent())) == [f"{n:05}" for n in range(500)]
            del target.bodies[:]
        target.most_bytes = 4_000
        assert replayed(source, target.url, "--restart", "--concurrency", 1) == 1
        assert 'answered 413:; it is the batch of 1 event from "00000" to "00000"; ' in capsys.readouterr().err
    assert exported(tmp_path / "target") == exported(source)


def test_a_replay_gives_up_when_nothing_is_accepted_for_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(forward, "BACKOFF_BASE_S", 0.001)
    source = a_source(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as closed:
        url = f"http://127.0.0.1:{closed.getsockname()[1]}"
    assert replayed(source, url, "--give-up-after-s", 0.2) == 1
    message = capsys.readouterr().err
    for part in ("no batch was accepted for 0.2 s (--give-up-after-s)", "cannot be reached", "cursor at the start"):
        assert part in message
    assert message.count("; trying again, for at most 0.2 s") == 1, "said at once, and not at each try"
    assert not [*source.glob("*.replay-*")], "nothing was accepted: there is no progress to keep"


@table("url", ["http://events:8080", "http://v2/", "https://host/eventstore", "https://host/a/v1"])
def test_a_host_and_a_prefix_may_have_any_name(url):
    assert forward.target_url(url, "--to") == f"{url.rstrip('/').removesuffix('/v1')}/v1"


@table("path", ["/v1/events", "/v1/events/bulk", "/v2/x", "/events", "/v1/x", "/v2", "/api/V1", "/v1beta/"])
def test_a_target_is_a_base_url(tmp_path, capsys, path):
    assert replayed(a_source(tmp_path), f"http://127.0.0.1:1{path}") == 2
    assert "--to must be the base URL, with or without /v1 at its end" in capsys.readouterr().err


@table(
    "content",
    [b"\x89PNG\r\n\x1a\n", b"event_name;external_customer_id\na;b\n", b"# Read me\n"],
    ids=["PNG", "semicolons", "text"],
)
def test_what_has_no_format_is_refused_as_such(tmp_path, capsys, content):
    imported(tmp_path, content, status=1)
    assert (
        "in:1: is neither NDJSON nor JSON nor CSV with known columns and commas: it starts" in capsys.readouterr().err
    )


def test_an_export_into_no_folder_cannot_start(tmp_path, capsys):
    imported(tmp_path, lines_of(event("a")))
    assert command_line("export", "--db", tmp_path / "events.db", "-o", tmp_path / "none" / "out") == 2
    assert "none does not exist" in capsys.readouterr().err


def test_events_stored_after_a_replay_began_are_sent_whatever_their_time(tmp_path, capsys):
    source = a_source(tmp_path)

    def store_more(handler, body: bytes) -> bool:
        target.tricks.clear()
        (source / "more").write_bytes(lines_of(event("older", timestamp=at(-5)), event("newer", timestamp=at(1000))))
        assert run(*SCRIPT, "import", "more", cwd=source).returncode == 0
        return False

    with Target(tmp_path / "target") as target:
        target.tricks.append(store_more)
        assert replayed(source, target.url, "--batch-size", 10, "--concurrency", 1) == 0
        assert exported(tmp_path / "target") == exported(source)
        imported(source, lines_of(event("oldest", timestamp=at(-50)), event("last", timestamp=at(2000))))
        del target.bodies[:]
        assert replayed(source, target.url) == 0
        assert target.ids_sent() == [["oldest", "last"]]
        assert replayed(source, target.url) == 0
        assert len(target.bodies) == 1
    assert "sent 0 events: 0 accepted, 0 retried" in capsys.readouterr().err
    assert exported(tmp_path / "target") == exported(source)


@table("deleted", ["the last one sent", "all that was sent", "all"])
def test_a_replay_goes_on_though_events_were_deleted_meanwhile(tmp_path, capsys, deleted):
    source = a_source(tmp_path)
    flags = ("--batch-size", 10, "--concurrency", 1)
    where = {"the last one sent": "id = '00049'", "all that was sent": "id < '00050'", "all": "true"}[deleted]

    def poisoned(handler, body: bytes) -> bool:
        return b'"00050"' in body and reply(handler, 400)

    with Target(tmp_path / "target", poisoned) as target:
        assert replayed(source, target.url, *flags) == 1
        with database(source) as conn:
            conn.execute(f"DELETE FROM events WHERE {where}")
            conn.commit()
        target.bodies.clear()
        for new in ([], ["new"]):
            imported(source, lines_of(*map(event, new)))
            assert replayed(source, target.url, *flags) == 0
        expected = [] if deleted == "all" else [f"{n:05}" for n in range(50, 100)]
        assert list(itertools.chain(*target.ids_sent())) == [*expected, "new"]
    assert "50 events were accepted before" in capsys.readouterr().err


def test_a_replay_of_a_filter_has_its_own_progress_and_a_dry_one_sends_nothing(tmp_path, capsys):
    source = a_source(tmp_path)
    imported(source, lines_of(event("other", event_name="other", timestamp=at(1))))
    with Target(tmp_path / "target") as target:
        names = sorted(path.name for path in source.iterdir())
        assert replayed(source, target.url, "--dry-run", "--batch-size", 40) == 0
        assert f"would send 101 events in 3 requests to {target.url}/v1/events/bulk" in capsys.readouterr().err
        assert (target.bodies, sorted(path.name for path in source.iterdir())) == ([], names)
        assert replayed(source, target.url, "--event-name", "other") == 0
        assert target.ids_sent() == [["other"]]
        assert replayed(source, target.url) == 0
        assert len(target.bodies) == 2
        assert len([*source.glob("events.db.replay-????????????????.json")]) == 2
        for others in 1, 200:
            (source / "events.db").unlink()
            imported(source, lines_of(*[event(f"new {n}") for n in range(others)]))
            assert replayed(source, target.url) == 2
            assert "another database" in capsys.readouterr().err


@pytest.mark.slow
def test_a_request_holds_at_most_10_mb(tmp_path):
    source = imported(
        tmp_path / "source", lines_of(*[event(f"{n:02}", properties={"x": "y" * 1_500_000}) for n in range(20)])
    )
    with Target(tmp_path / "target") as target:
        assert replayed(source, target.url, "--concurrency", 1) == 0
        assert [len(sent) for sent in target.ids_sent()] == [6, 6, 6, 2]
        assert max(map(len, target.bodies)) < 10_000_000


@pytest.mark.slow
def test_a_replay_that_is_killed_goes_on_where_it_was_sure(tmp_path):
    sent = [event(f"{n:05}", timestamp=at(n * 7919 % 3000)) for n in range(3000)]
    with Live(tmp_path / "source", "--api-key", KEY) as source, Live(tmp_path / "target", "--api-key", KEY) as target:
        (tmp_path / "source" / "in.ndjson").write_bytes(lines_of(*sent))
        assert run(*SCRIPT, "import", "in.ndjson", cwd=tmp_path / "source").returncode == 0
        command = (*SCRIPT, "replay", "--to", target.url, "--batch-size", "10")
        options = {"cwd": tmp_path / "source", "env": os.environ | {"FLEXPRICE_API_KEY": KEY}}
        with source.client() as client:
            store(client, event("over HTTP", timestamp=at(0)))
        with target.client() as client:
            for number, status, end in ((signal.SIGKILL, -9, 600), (signal.SIGINT, 1, 1200), (signal.SIGTERM, 1, 1800)):
                refuse_to_write(tmp_path / "target", f"new.timestamp_us >= {NOW + end}")  # and it tries again
                process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, **options)
                eventually(lambda end=end: total(client) > end - 10)
                process.send_signal(number)
                message = process.communicate(timeout=30)[1]
                assert process.returncode == status
                lines = [line for line in message.splitlines() if "trying again" not in line]
                assert len(lines) == (2 if status == 1 else 0)
                if status == 1:
                    assert re.match(
                        r"eventstore: interrupted; .+ are accepted \(cursor .+; the same command", lines[-1]
                    )
                with database(tmp_path / "target") as conn:
                    conn.execute("DROP TRIGGER full")
            assert total(client) < 1801
        done = run(*command, **options)
        assert done.returncode == 0
        assert re.match(r"eventstore: going on at cursor \d+::\d+: 1,\d{3} events were accepted before", done.stderr)
        accepted = int(re.search(r"sent .+: ([\d,]+) accepted", done.stderr)[1].replace(",", ""))
        assert 1200 <= accepted < 1300
        exports = [run(*SCRIPT, "export", cwd=tmp_path / name).stdout for name in ("source", "target")]
        assert exports[0] == exports[1]
        assert len(exports[0].splitlines()) == 3001


@table("number", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_a_replay_with_one_line_even_where_python_swallows_an_exception(tmp_path, number):
    a_source(tmp_path)
    code = f"""if True:
        import asyncio, os, signal, sys, weakref, eventstore, httpx
        async def post(*_, **__):
            freed = {{"this one"}}
            watch = weakref.ref(freed, lambda _: os.kill(os.getpid(), signal.{number}))
            del freed
            await asyncio.sleep(30)  # which the signal cuts short
        httpx.AsyncClient.send = post
        sys.exit(eventstore.main())
    """
    done = python(code, "replay", "--to", "http://127.0.0.1:1", "--api-key", "k", cwd=tmp_path / "source")
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"eventstore: interrupted; 0 events are accepted \(.+\n", done.stderr)


def test_without_httpx_replay_says_what_to_install(tmp_path):
    a_source(tmp_path)
    code = "import sys; sys.modules['httpx'] = None; import eventstore; sys.exit(eventstore.main())"
    done = python(code, "replay", "--to", "http://127.0.0.1:1", "--api-key", "k", cwd=tmp_path / "source")
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"eventstore: replay needs httpx: .+ -m pip install httpx.*\n", done.stderr)


def test_a_dry_run_of_an_import_checks_all_and_stores_nothing(tmp_path):
    (tmp_path / "events.ndjson").write_text(json.dumps(event("a") | {"propertes": 1}) + "\n" + json.dumps(event("b")))
    done = run(*SCRIPT, "import", "events.ndjson", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert not (tmp_path / "events.db").exists()
    assert "would import 2 events into events.db; nothing was stored" in done.stderr
    assert 'ignored, no field has that name: "propertes"' in done.stderr
