"""The command line: the banner and messages of `serve`, the values it refuses, and the files it leaves behind."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import socket
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

import eventstore
from eventstore_extras.serving import prepare
from helpers import (
    KEY,
    SCRIPT,
    TEXT_FILE,
    Live,
    event,
    ids,
    is_root,
    python,
    refusal,
    refused,
    refused_in_one_line,
    run,
    serving,
    sizes_in,
    store,
    table,
    total,
)


@table("statements", ["PRAGMA user_version = 3", "PRAGMA user_version = 99", "DROP TABLE environments"])
def test_a_file_of_another_format_is_refused_and_left_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, statements: str
) -> None:
    with serving(tmp_path) as client:
        store(client, event("a"))
    path = tmp_path / "events.db"
    with closing(sqlite3.connect(path)) as conn:
        conn.execute(statements)
    before = path.read_bytes()
    with open(os.devnull) as standard_input:
        monkeypatch.setattr("sys.stdin", standard_input)
        for command in ("serve --port 0", "import -", "export", "replay --to http://127.0.0.1:9 --dry-run"):
            done = refusal(tmp_path, *command.split())
            assert (done.returncode, done.stdout) == (2, "")
            assert re.fullmatch(r"eventstore: events\.db was written by (another|a newer) eventstore \(format .*\): export its events "
                                r"with the eventstore that wrote it and import them with this one, or .*\n", done.stderr)  # fmt: skip
    assert path.read_bytes() == before


CANNOT_START = [  # flags, what the message names
    ("--port {taken}", "it is taken; choose another with --port"),
    ("--mock --port {taken}", "it is taken; choose another with --port"),
    ("--host 192.0.2.1 --api-key secret", "192.0.2.1"),
    ("--db text.db", "not a SQLite database"),
    ("--db other.db", "other program"),
    ("--db newer.db", "a newer eventstore (format 99"),
    ("--db folder", "folder"),
    ("--db=", "--db"),
    ("--db missing/events.db", "does not exist"),
    pytest.param("--db sealed/events.db", "sealed", marks=pytest.mark.skipif(is_root, reason="root writes anywhere")),
    ("--api-key secret=", "--api-key: an API key ends in '=' with no environment"),
    ("--api-key =development", "empty"),
    ("--api-key s\u00e9cret", "ASCII"),
    ("--api-key secret=a --api-key secret=b", "twice"),
    ("--host 0.0.0.0", "--api-key"),
]


@table(("flags", "part"), CANNOT_START)
def test_serve_says_in_one_line_why_it_cannot_start_and_exits_with_2(tmp_path: Path, flags: str, part: str) -> None:
    (tmp_path / "text.db").write_text(TEXT_FILE)
    (tmp_path / "folder").mkdir()
    (tmp_path / "sealed").mkdir(mode=0o555)
    with serving(tmp_path, db=str(tmp_path / "newer.db")):
        pass
    for name, statement in (("newer.db", "PRAGMA user_version = 99"), ("other.db", "CREATE TABLE events (id)")):
        with closing(sqlite3.connect(tmp_path / name)) as conn:
            conn.execute(statement)
    before = sizes_in(tmp_path)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        words = flags.format(taken=taken.getsockname()[1]).split(" ")
        done = refusal(tmp_path, "serve", *(words if "--port" in words else ["--port", "0", *words]))
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"eventstore: .+\n", done.stderr)
    assert part in done.stderr
    assert "secret" not in done.stderr
    assert sizes_in(tmp_path) == before


@table(("host", "reason"), [
    ("127.0.0.1", "it is taken; choose another with --port (0 takes a free one)"),
    ("192.0.2.1", "this machine does not have that address; choose another with --host"),
    ("no host", "the name cannot be resolved; --host takes a name or an address of this machine, without a scheme"),
    ("http://localhost", "the name cannot be resolved; --host takes"), ("127.0.0.1:8080", "the name cannot be resolved; "),
    ("a..b", "the name cannot be resolved; "), ("x" * 70, "the name cannot be resolved; "), ("", "the name cannot be"),
])  # fmt: skip
def test_an_address_that_cannot_be_used_is_named_with_its_flags_and_what_to_do(host: str, reason: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(eventstore.StartError) as raised:
            eventstore.listen(host, port)
    assert str(raised.value).startswith(f"cannot listen on --host {host} --port {port}: {reason}")


def test_a_privileged_port_is_refused_with_its_flag(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "create_server", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied")))
    with pytest.raises(
        eventstore.StartError, match=r"--port 80: ports below 1024 need more rights; choose another with"
    ):
        eventstore.listen("127.0.0.1", 80)


@pytest.mark.slow
def test_help_and_version_are_printed_and_nothing_else_happens(tmp_path: Path) -> None:
    version = run(*SCRIPT, "--version", cwd=tmp_path)
    assert (version.returncode, version.stdout) == (0, f"eventstore {eventstore.__version__}\n")
    shown = run(*SCRIPT, "serve", "--help", cwd=tmp_path)
    flags = ("--db", "--host", "--port", "--api-key", "--max-body-bytes", "--query-timeout-s", "--queue-events",
             "--access-log", "--log-level", "127.0.0.1", "8080", "events.db", "33554432", "30", "100000")  # fmt: skip
    assert (shown.returncode, [flag for flag in flags if flag not in shown.stdout]) == (0, [])
    for command in ("import", "export", "replay"):
        shown = refusal(tmp_path, command, "--help")
        assert (shown.returncode, "--environment" in shown.stdout, "None" in shown.stdout) == (0, True, False)
    for bad_flags in ([], ["serve", "--port", "70000"], ["serve", "--queue-events", "0"], ["serve", "--max-body-bytes", "1" + "0" * 20], ["import"],
                      ["replay", "--to", "http://x", "--batch-size", "1001"]):  # fmt: skip
        assert refusal(tmp_path, *bad_flags).returncode == 2
    imported = python("import eventstore", cwd=tmp_path)
    assert (imported.returncode, imported.stdout, imported.stderr) == (0, "", "")
    assert list(tmp_path.iterdir()) == []


def test_the_banner_says_what_is_served_where_with_a_key_made_for_the_run(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        store(client, *[event()] * 1000)
        store(client, event())
    with Live(tmp_path) as live:
        for part in (eventstore.__version__, "events.db", "1,001 events", f"{live.url}/v1", "made for this run"):
            assert part in live.banner
        key = re.findall(r'x-api-key: ([^"]+)"', live.banner)[0]
        with live.client(key) as client:
            assert total(client) == 1001
        assert key not in live.log
        assert f"  debugger     {live.url}/#key={key}\n" in live.banner


@table("mode", [[], ["--mock"]], ids=str)
@table("host", ["no host", "http://localhost", "localhost:8080"])
def test_a_wrong_host_is_named_even_if_there_is_no_api_key(
    capsys: pytest.CaptureFixture[str], host: str, mode: list[str]
) -> None:
    message = refused_in_one_line(capsys, "serve", "--host", host, "--port", "0", *mode)
    assert f"cannot listen on --host {host} --port 0: the name cannot be resolved; --host takes a name" in message


@table("flag", ["--forward-environment x", "--forward-everything", "--delete-unforwarded"])
def test_a_flag_of_forwarding_needs_a_target(flag: str) -> None:
    name, *value = flag.split()
    arguments = eventstore.parse_arguments(["serve", name, *value])
    with pytest.raises(eventstore.StartError, match=f"{name} has no effect without --forward-to: add that"):
        prepare(arguments)


def test_a_misspelled_flag_gets_a_suggestion(tmp_path: Path) -> None:
    done = refusal(tmp_path, "serve", "--prot", "9")
    assert done.returncode == 2
    assert "unrecognized arguments: --prot 9; did you mean --port?" in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not (shutil.which("curl") and shutil.which("bash")), reason="needs bash and curl")
@table(("flags", "environ"), [("", {}), ("--api-key given", {"FLEXPRICE_API_KEY": "given"})], ids=["made", "given"])
def test_the_banners_curl_lines_work_as_pasted(tmp_path: Path, flags: str, environ: dict[str, Any]) -> None:
    with Live(tmp_path, *flags.split()) as live:
        sent, read = (run("bash", "-c", line, env=os.environ | environ) for line in live.curl_lines)
        event_id = json.loads(sent.stdout)["event_id"]
        assert [stored["id"] for stored in json.loads(read.stdout)["events"]] == [event_id]


@pytest.mark.slow
def test_memory_leaves_no_file(tmp_path: Path) -> None:
    (tmp_path / "temp").mkdir()
    with Live(tmp_path / "cwd", "--db", ":memory:", "--api-key", KEY, TMPDIR=str(tmp_path / "temp")) as live:
        with live.client() as client:
            store(client, event("a"))
            assert ids(client) == ["a"]
        assert live.stop() == 0
    assert list((tmp_path / "temp").iterdir()) == []
    assert [path.name for path in (tmp_path / "cwd").iterdir()] == ["stderr.txt"]


@pytest.mark.slow
@table(("flags", "shown"), [([], False), (["--access-log"], True)], ids=["default", "--access-log"])
def test_only_the_access_log_shows_requests_that_succeed(tmp_path: Path, flags: list[Any], shown: bool) -> None:
    with Live(tmp_path, "--api-key", KEY, *flags) as live, live.client() as client:
        store(client, event())
        refused(client.get("/v1/nowhere"), 404, "not_found")
        assert "404 not_found" in live.log
        assert ('/v1/events/bulk HTTP/1.1" 202' in live.log) is shown
