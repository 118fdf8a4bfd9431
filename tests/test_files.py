"""Files that appear when they are complete, decompression, and progress bars."""

from __future__ import annotations

import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

from eventstore_extras import exporting
from eventstore_extras.files import whole_file
from eventstore_extras.job import StopError
from eventstore_extras.refused import append_lines
from forked import ROOT
from helpers import (
    KEY,
    SCRIPT,
    Live,
    command_line,
    event,
    eventually,
    exported,
    free_port,
    imported,
    is_root,
    lines_of,
    python,
    run,
    serving,
    store,
    table,
)

posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX modes, links and signals")


def test_an_exported_file_appears_when_it_is_complete(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
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


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
@table("missing", [False, True], ids=["tqdm", "no tqdm"])
def test_a_terminal_shows_a_progress_bar_if_tqdm_is_installed(tmp_path: Path, missing: bool) -> None:
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


# ---------------------------------------------------------------------------------------------- temporary files


@posix
def test_an_export_removes_what_killed_exports_of_that_name_left(tmp_path: Path) -> None:
    """It leaves those of a running one, of another name, and files that only look similar."""
    imported(tmp_path, lines_of(event("a")))
    code = """if True:
        import os, sys
        from eventstore_extras.files import whole_file
        with whole_file(sys.argv[1], "", ""):
            print("open", flush=True)
            sys.stdin.read()
            os.kill(os.getpid(), 9)
    """
    others = {"exported.ndjson.1.tmp", "exported.ndjson.0123456789abcdeX.tmp", "exported.ndjson.0123456789abcdef.tmpx"}
    for name in others:
        (tmp_path / name).touch()
    command = [sys.executable, "-c", code, str(tmp_path / "exported.ndjson")]
    environ = os.environ | {"PYTHONPATH": str(ROOT)}
    processes = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environ) for _ in range(2)
    ]
    try:
        for process in processes:
            assert process.stdout
            assert process.stdout.readline() == b"open\n"
        exported(tmp_path)
        assert len(temporary_files(tmp_path)) == 2
        assert processes[0].communicate()[0] == b""
        exported(tmp_path)
        assert len(temporary_files(tmp_path)) == 1
    finally:
        for process in processes:
            process.kill()
            process.communicate()
    exported(tmp_path)
    assert temporary_files(tmp_path) == []
    assert {path.name for path in tmp_path.iterdir()} == others | {"events.db", "in", "exported.ndjson"}


def temporary_files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if re.search(r"\.[0-9a-f]{16}\.tmp$", path.name)]


@posix
def test_a_temporary_name_cannot_be_foreseen_or_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = set()
    for _ in range(2):
        with whole_file(tmp_path / "out", "", "") as file:
            names |= set(temporary_files(tmp_path))
    assert len(names) == 2
    monkeypatch.setattr("secrets.token_hex", lambda size: "0" * 2 * size)
    (tmp_path / "out.0000000000000000.tmp").symlink_to("victim")
    problem = pytest.raises(StopError, match="cannot write: File exists; no file was made")
    with problem, whole_file(tmp_path / "out", "cannot write", "no file was made") as file:
        file.write(b"stolen")
    assert {path.name for path in tmp_path.iterdir()} == {"out", "out.0000000000000000.tmp"}


# ---------------------------------------------------------------------------------------------- rights


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@pytest.fixture
def open_umask() -> Iterator[None]:
    """Let new files be readable by all, unless the program says otherwise."""
    before = os.umask(0o000)
    yield
    os.umask(before)


@posix
@pytest.mark.usefixtures("open_umask")
def test_new_files_that_hold_events_can_be_read_by_their_owner_only(tmp_path: Path) -> None:
    with serving(tmp_path, db=str(tmp_path / "events.db")) as client:
        store(client, event("a"))
        assert [mode(path) for path in sorted(tmp_path.glob("events.db*"))] == [0o600] * 3
    imported(tmp_path / "imported", lines_of(event("a")) + b"{}", "--skip-invalid", tmp_path / "rejects")
    append_lines(tmp_path / "refused", [b"{}"])
    exported(tmp_path)
    for name in ("imported/events.db", "rejects", "refused", "exported.ndjson"):
        assert mode(tmp_path / name) == 0o600, name


@posix
@table("before", [0o644, 0o640, 0o400, 0o600])
def test_a_file_that_exists_keeps_its_mode_and_owner(tmp_path: Path, before: int) -> None:
    imported(tmp_path, lines_of(event("a")) + b"{}", "--skip-invalid", tmp_path / "rejects")
    output = tmp_path / "exported.ndjson"
    for path in (output, tmp_path / "events.db"):
        path.touch()
        if is_root:
            os.chown(path, 65534, 65534)
        path.chmod(before)
    exported(tmp_path)
    imported(tmp_path, lines_of(event("b")))
    for path in (output, tmp_path / "events.db"):
        found = path.stat()
        assert (mode(path), found.st_uid) == (before, 65534 if is_root else os.getuid())


@posix
def test_a_planted_link_is_not_followed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, lines_of(event("a")))
    (tmp_path / "victim").write_text("precious")
    for target in ("victim", "missing"):
        (tmp_path / "link").unlink(missing_ok=True)
        (tmp_path / "link").symlink_to(target)
        flags = ("import", "--db", tmp_path / "events.db", tmp_path / "in", "--skip-invalid", tmp_path / "link")
        assert command_line(*flags) == 2
        assert (
            f"cannot write --skip-invalid {tmp_path}/link: it is a link: name the file itself"
            in capsys.readouterr().err
        )
        assert command_line("export", "--db", tmp_path / "events.db", "-o", tmp_path / "link") == 2
        with pytest.raises(OSError, match="it is a link"):
            append_lines(tmp_path / "link", [b"{}"])
    assert (tmp_path / "victim").read_text() == "precious"
    assert not (tmp_path / "missing").exists()


# ---------------------------------------------------------------------------------------------- closed standard files


CLOSED = [  # what is closed, the command, its exit status, and what standard output and standard error contain
    ("2>&-", "import in", 0, "", ""),
    ("2>&-", "export", 0, '"event_id":"a"', ""),
    ("2>&-", "export --format parquet -o out.parquet", 0, "", ""),
    ("2>&-", "export --db missing.db", 2, "", ""),
    ("2>&-", "prune --before 2024-01-01T00:00:00Z", 0, "", ""),
    ("2>&-", "replay --to http://127.0.0.1:9 --dry-run", 0, "", ""),
    (">&-", "import in", 0, "", "imported 1 event"),
    (">&-", "export", 2, "", "standard output is closed: name a file with --output"),
    (">&-", "export --format parquet", 2, "", "standard output is closed"),
    (">&-", "export -o out", 0, "", "exported 1 event"),
    (">&-", "prune --before 2024-01-01T00:00:00Z", 0, "", "deleted 0 events"),
    (">&-", "replay --to http://127.0.0.1:9 --dry-run", 0, "", "would send 1 event"),
    ("<&-", "import -", 2, "", "standard input is closed"),
    ("<&-", "import in", 0, "", "imported 1 event"),
    ("<&-", "export", 0, '"event_id":"a"', "exported 1 event"),
    ("<&- >&- 2>&-", "import in", 0, "", ""),
    ("<&- >&- 2>&-", "export -o out", 0, "", ""),
    ("<&- >&- 2>&-", "import -", 2, "", ""),
    ("2>/dev/full", "import in", 0, "", ""),
]


@pytest.mark.slow
@posix
@table(("closed", "command", "status", "output", "message"), CLOSED)
def test_commands_work_with_closed_standard_files(
    tmp_path: Path, closed: str, command: str, status: int, output: str, message: str
) -> None:
    imported(tmp_path, lines_of(event("a")))
    done = run("sh", "-c", f'"$@" {closed}', "sh", *SCRIPT, *command.split(), cwd=tmp_path)
    assert (done.returncode, output in done.stdout, message in done.stderr) == (status, True, True), done.stderr
    assert (done.stdout == "") is (output == "")
    assert done.stderr.count("\n") == (message != "")
    with serving(tmp_path) as client:
        assert store(client, event("b")).status_code == 202
    if "out" in command:
        assert (tmp_path / command.rsplit(maxsplit=1)[-1]).stat().st_size > 0


@pytest.mark.slow
@posix
@table("closed", ["<&-", "2>&-", "<&- 2>&-"])
def test_a_server_with_closed_standard_files_serves(tmp_path: Path, closed: str) -> None:
    shell = ("sh", "-c", f'exec "$@" {closed}', "sh")
    with Live(tmp_path, "--api-key", KEY, command=(*shell, *SCRIPT)) as live, live.client() as client:
        assert client.get("/v1/events?nonsense=1", headers={"x-api-key": "wrong"}).status_code == 401
        store(client, event("a"))
        assert live.stop() == 0
    with serving(tmp_path) as client:
        assert store(client, event("b")).status_code == 202


@pytest.mark.slow
@posix
def test_a_server_without_standard_output_serves(tmp_path: Path) -> None:
    port = free_port()
    shell = ("sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh")
    command = [*map(str, (*shell, *SCRIPT)), "serve", "--port", str(port), "--api-key", KEY]
    with subprocess.Popen(command, cwd=tmp_path) as process:
        try:
            with httpx.Client(base_url=f"http://127.0.0.1:{port}", headers={"x-api-key": KEY}) as client:
                eventually(lambda: answers(client))
                store(client, event("a"))
        finally:
            process.terminate()
        assert process.wait(30) == 0


def answers(client: httpx.Client) -> bool:
    with suppress(httpx.TransportError):
        return client.get("/health").status_code == 200
    return False
