"""Events in and out: import, export and replay."""

from __future__ import annotations

import gzip
import itertools
import json
import os
import re
import struct
import subprocess
import sys
import time
from unittest.mock import Mock

import msgspec
import pytest

import eventstore
from eventstore_extras import exporting, importing, stored
from helpers import (
    EVER,
    KEY,
    NASTY_PROPERTIES,
    NASTY_TEXTS,
    SCRIPT,
    TEXT_FILE,
    Live,
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
    page,
    python,
    run,
    serving,
    sizes_in,
    store,
    stored_ids,
    table,
    total,
)

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
            r"eventstore: imported 2 events into events\.db( \(created\))?: 2 new, 0 already stored; .+ s\n",
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


def test_the_events_of_an_array_keep_their_bytes_and_know_their_lines(tmp_path, capsys):
    texts = [
        '{"a": "\\\\\\"]"}',
        '{"n": [1.50, 0.10, 12345678901234567890, 1E400],\n "m": {"]}": "["}}',
        '"text, \\" ]"',
        "12.5e3",
        "null",
        "[[]]",
        "{}",
    ]
    rejects = tmp_path / "rejects"
    body = '{"events": [\n' + " ,\n".join(texts) + ' ]\n, "events2": [1], "x": 1} '
    imported(tmp_path, body.encode(), "--skip-invalid", rejects)
    found = [msgspec.json.decode(line, type=Reject) for line in rejects.read_bytes().splitlines()]
    assert [(each.line, each.index) for each in found] == [(2, 0), (3, 1), *((line, line - 3) for line in range(5, 10))]
    assert [bytes(each.event).decode() for each in found] == [text.replace(",\n ", ",").replace(", ", ",").replace(": ", ":")
                                                              if text[0] in "{[" else text for text in texts]  # fmt: skip


class Reject(msgspec.Struct):
    line: int
    index: int
    event: msgspec.Raw


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
    assert capsys.readouterr().err.endswith("events.db: 0 new, 0 already stored; 0.0 s\n")
    imported(folder, lines_of(event("s")), "--environment", "staging")
    assert (exported(folder), len(exported(folder, "--environment", "staging").splitlines())) == (before, 1)


GOOD = b'{"event_id": "%d", "event_name": "call", "external_customer_id": "cust"}'
BEFORE, AFTER = GOOD % 1 + b"\n", b"\n" + GOOD % 3
BAD_LINES = {  # what is between a good first and a good third event; the place and the problem
    "no JSON": (BEFORE + b"{,}" + AFTER, "2: event: is not valid JSON: "),
    "over several lines": (BEFORE + b"{" + AFTER, "2: line: is a lone {: put each event on one line"),
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
                           "3: properties.a: has another value in the column properties"),
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


BROKEN = {  # what follows a good event, and how many events are stored: an array is read as a whole
    "array not closed": (b"[\n" + GOOD % 1, ":2: the file ends inside the array: it is not whole", 0),
    "element not closed": (b"[" + GOOD % 1 + b',\n{"a": "', ":2: the file ends inside the array", 0),
    "no comma": (
        b"[" + GOOD % 1 + b"\n " + GOOD % 2 + b"]",
        ":2: is not valid JSON: JSON is malformed: expected ',' or ']'",
        0,
    ),
    "comma too many": (b"[" + GOOD % 1 + b",]", ":1: is not valid JSON: JSON is malformed: trailing comma in array", 0),
    "more after it": (b"[" + GOOD % 1 + b"]\n[]", ":2: is not valid JSON: JSON is malformed: trailing characters", 0),
    "bulk body not closed": (b'{"events": [' + GOOD % 1 + b"]", ":1: the file ends inside the array", 0),
    "no array": (b'{"events": {"a": 1}}', ': must be an array of events, or {"events": [...]}', 0),
    "too deep": (b"[" + GOOD % 1 + b"," + b"[" * 100_000 + b"]" * 100_001, ": is nested too deep", 0),
    "csv quote": (
        b'event_id,event_name,external_customer_id\n1,call,cust\n2,call,"cust\n',
        ":3: cannot be read as CSV: a quote opens here and",
        1,
    ),
    "gzip cut off": (gzip.compress(GOOD % 1 + b"\n", 0)[:-8], ": the gzip data is damaged or cut off", 1),
}


@table(("content", "problem", "stored_events"), BROKEN.values(), ids=BROKEN)
def test_a_file_that_cannot_be_read_on_stops_even_an_import_that_skips(
    tmp_path, capsys, content, problem, stored_events
):
    imported(tmp_path, content, "--skip-invalid", tmp_path / "rejects", status=1)
    assert f"{tmp_path}/in{problem}" in capsys.readouterr().err
    assert ["1"] * stored_events == (stored_ids(tmp_path) if (tmp_path / "events.db").exists() else [])


def test_an_array_is_read_as_a_whole_up_to_a_limit(tmp_path, capsys, monkeypatch):
    array = json.dumps([event("a"), event("b")]).encode()
    monkeypatch.setattr(importing, "_MAX_ARRAY_BYTES", 1 << 20)
    fitting = array + b" " * ((1 << 20) - len(array))
    imported(tmp_path, fitting)
    assert stored_ids(tmp_path) == ["a", "b"]
    imported(tmp_path, gzip.compress(fitting + b" "), status=1)
    assert f"{tmp_path}/in: is a JSON array of more than 1 MB: convert it to NDJSON, " in capsys.readouterr().err


def test_one_large_event_in_an_array_takes_seconds_at_most(tmp_path):
    """Cutting it out of the array took quadratic time."""
    started_s = time.monotonic()
    imported(tmp_path, json.dumps([event("a", properties={"list": ["x" * 10] * 2_000_000})]).encode())
    assert time.monotonic() - started_s < 10
    assert (tmp_path / "in").stat().st_size > 25_000_000


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
@table("form", ["ndjson", "csv"])
def test_an_import_needs_no_more_memory_for_a_large_file(tmp_path, form):
    """The few ids keep the database small, and the groups are small: what would grow is what holds the file."""
    report = ("import eventstore, sys; from eventstore_extras import importing; "
              "importing._GROUP_BYTES = 1 << 20; eventstore.main(sys.argv[1:]); print(open('/proc/self/status').read())")  # fmt: skip
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
            query = stored.flag_query(eventstore.parse_arguments(["export", *flags]))
            counter = itertools.count()
            conn.set_progress_handler(lambda counter=counter: next(counter) and None, 1)
            assert sum(map(len, stored.stored_events(conn, query))) == number
            steps.append(next(counter))  # of SQLite's machine
    assert steps[1] < steps[0] / 20


def test_pages_of_an_export_meet_whatever_their_size_and_times(tmp_path, monkeypatch):
    with serving(tmp_path) as client:
        store(client, *[event(f"{n:03}", timestamp=at(n // 10), properties={"x": "y" * n}) for n in range(300)])
    monkeypatch.setattr(stored, "_PAGE_EVENTS", 7)
    monkeypatch.setattr(stored, "_PAGE_BYTES", 500)
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
            patch.setattr(exporting, "exported_event", Mock(side_effect=error))
            capsys.readouterr()
            assert command_line("export", "--db", tmp_path / "events.db", "-o", tmp_path / "out.ndjson") == 1
        assert re.fullmatch(rf"eventstore: .*{part}.*\n", capsys.readouterr().err)
        assert (tmp_path / "out.ndjson").read_text() == "before"
        assert sorted(path.name for path in tmp_path.iterdir()) == ["events.db", "in", "out.ndjson"]


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
    assert "the database also has events of development" in elsewhere.stderr


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


def test_a_dry_run_of_an_import_checks_all_and_stores_nothing(tmp_path):
    (tmp_path / "events.ndjson").write_text(json.dumps(event("a") | {"propertes": 1}) + "\n" + json.dumps(event("b")))
    done = run(*SCRIPT, "import", "events.ndjson", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert not (tmp_path / "events.db").exists()
    assert "would import 2 events into events.db; nothing was stored" in done.stderr
    assert 'ignored unknown fields: "propertes"' in done.stderr
