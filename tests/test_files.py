"""Files that appear when they are complete, decompression, and progress bars."""

from __future__ import annotations

import os
import re
import struct
import subprocess
from pathlib import Path
from unittest.mock import Mock

import pytest

from eventstore_extras import exporting
from helpers import command_line, event, imported, lines_of, python, table


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
