"""The command `import`: formats, what stops it, what it leaves behind, memory."""

from __future__ import annotations

import gzip
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eventstore import MEMBERS
from eventstore_extras import importing
from helpers import (
    KEY,
    SCRIPT,
    TEXT_FILE,
    Live,
    at,
    command_line,
    event,
    exported,
    imported,
    lines_of,
    python,
    run,
    sizes_in,
    stored_ids,
    table,
    total,
)

# ---------------------------------------------------------------------------------------------- formats

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
def test_the_format_is_detected_by_the_content(tmp_path: Path, content: bytes, way: str) -> None:
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


@table(
    "content",
    [b"\x89PNG\r\n\x1a\n", b"event_name;external_customer_id\na;b\n", b"# Read me\n"],
    ids=["PNG", "semicolons", "text"],
)
def test_a_file_of_no_known_format_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes
) -> None:
    imported(tmp_path, content, status=1)
    assert (
        "in:1: is neither NDJSON nor JSON nor CSV with known columns and commas: it starts" in capsys.readouterr().err
    )


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

GOOD = b'{"event_id": "%d", "event_name": "call", "external_customer_id": "cust"}'
BROKEN = {  # content, problem, and how many events are stored; of an array none are, because it is read as a whole
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
def test_an_unreadable_file_stops_even_an_import_that_skips_invalid_events(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, problem: str, stored_events: int
) -> None:
    imported(tmp_path, content, "--skip-invalid", tmp_path / "rejects", status=1)
    assert f"{tmp_path}/in{problem}" in capsys.readouterr().err
    assert ["1"] * stored_events == (stored_ids(tmp_path) if (tmp_path / "events.db").exists() else [])


def test_an_array_over_the_size_limit_is_refused_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    array = json.dumps([event("a"), event("b")]).encode()
    monkeypatch.setattr(importing, "_MAX_ARRAY_BYTES", 1 << 20)
    fitting = array + b" " * ((1 << 20) - len(array))
    imported(tmp_path, fitting)
    assert stored_ids(tmp_path) == ["a", "b"]
    imported(tmp_path, gzip.compress(fitting + b" "), status=1)
    assert f"{tmp_path}/in: is a JSON array of more than 1 MB: convert it to NDJSON, " in capsys.readouterr().err


BAD_FROM_THE_START = {
    "a text": b"Dear all,\n",
    "a csv of something else": b"name,city\na,b\n",
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
    done = run(*SCRIPT, "import", "events.ndjson", "--dry-run", cwd=tmp_path)
    assert done.returncode == 0
    assert not (tmp_path / "events.db").exists()
    assert "would import 2 events into events.db; nothing was stored" in done.stderr
    assert 'ignored unknown fields: "propertes"' in done.stderr


CANNOT_START = [  # arguments, what the message names
    ("import missing.ndjson", "missing.ndjson"),
    ("import folder", "folder"),
    ("import in --db :memory:", ":memory:"),
    ("import in --db text.db", "not a SQLite database"),
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
    capsys.readouterr()
    assert command_line(*arguments.split()) == 2
    output, message = capsys.readouterr()
    assert (output, re.fullmatch(r"eventstore: .+\n", message) is not None) == ("", True), message
    assert part in message
    assert sizes_in(tmp_path) == before


@pytest.mark.slow
def test_an_import_and_a_server_share_a_database(tmp_path: Path) -> None:
    (tmp_path / "in.ndjson").write_bytes(lines_of(*[event(f"i{number}") for number in range(20_000)]))
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        process = subprocess.Popen([*SCRIPT, "import", "in.ndjson"], cwd=tmp_path, stderr=subprocess.PIPE, text=True)
        sent = 0
        while process.poll() is None:
            assert client.post("/v1/events", json=event(f"s{sent}")).status_code == 202
            sent += 1
        assert "20,000 new" in process.communicate()[1]
        assert sent > 0
        assert total(client) == 20_000 + sent
    assert "Error" not in live.log


# ---------------------------------------------------------------------------------------------- time and memory


def test_one_large_event_in_an_array_takes_linear_time(tmp_path: Path) -> None:
    """Linear time is 2 s here, quadratic time 20 s; of the processor, so that a busy machine does not matter."""
    started_s = time.process_time()
    imported(tmp_path, json.dumps([event("a", properties={"list": ["x" * 10] * 2_000_000})]).encode())
    assert time.process_time() - started_s < 10
    assert (tmp_path / "in").stat().st_size > 25_000_000


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
@table("form", ["ndjson", "csv"])
@pytest.mark.slow
def test_an_import_needs_no_more_memory_for_a_large_file(tmp_path: Path, form: str) -> None:
    """The database stays small, as there are only 100 ids, and so do transactions: only holding the file would need more."""
    code = """if True:
        import sys, eventstore
        from eventstore_extras import importing
        importing._GROUP_BYTES = 1 << 20
        eventstore.main(sys.argv[1:])
        print(open("/proc/self/status").read())
    """
    peaks = []
    for number in (100, 5_000):
        with (tmp_path / "in").open("w") as file:
            file.write("event_name,external_customer_id,event_id,properties.text\n" * (form == "csv"))
            for each in range(number):
                sent = event(f"{each % 100}", properties={"text": "x" * 5000})
                file.write(f"call,cust,{each % 100},{'x' * 5000}\n" if form == "csv" else json.dumps(sent) + "\n")
        done = python(code, "import", tmp_path / "in", "--db", tmp_path / "events.db")
        assert f"imported {number:,} events" in done.stderr
        peaks += [int(peak_kb) * 1024 for peak_kb in re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)]
    assert (tmp_path / "in").stat().st_size > 25_000_000
    assert peaks[1] - peaks[0] < 12_000_000
