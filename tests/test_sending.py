"""Batches, target, retry rules and progress: what `replay` and `serve --forward-to` share."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import eventstore
from eventstore_extras import forward
from helpers import NOW, SCRIPT, at, event, run


def filled(folder: Path, count: int) -> str:
    """Make a database with this many events, a microsecond apart."""
    lines = [json.dumps(event(f"{number:05}", timestamp=at(number))) for number in range(count)]
    (folder / "in.ndjson").write_text("\n".join(lines))
    assert run(*SCRIPT, "import", "in.ndjson", cwd=folder).returncode == 0
    return str(folder / "events.db")


# ---------------------------------------------------------------------------------------------- files of earlier versions

TARGET = "http://h/v1"
FORWARD_FILE = "events.db.forward-76b96b740298faae.json"
FORWARD_PROGRESS = b'{"target":"http://h/v1","environment":"development","last_seq":2,"last_id":"00001","accepted":2,"seq":3,"refused":1,"late_s":7}\n'  # fmt: skip
REPLAY_FILE = "events.db.replay-846e3dde74978b09.json"
REPLAY_PROGRESS = b'{"target":"http://h/v1","environment":"development","last_seq":2,"last_id":"00001","accepted":2,"filters":{"external_customer_id":null,"event_name":null,"event_id":null,"source":null,"start_time":null,"end_time":null,"property_filters":null},"arrived":%d,"cursor":[%d,"00001"],"is_caught_up":%s}\n'  # fmt: skip


def test_forwarding_continues_with_the_progress_file_of_an_earlier_version(tmp_path):
    path = filled(tmp_path, 5)
    (tmp_path / FORWARD_FILE).write_bytes(FORWARD_PROGRESS)
    with closing(eventstore.connect_reader(path)) as conn:
        file = forward.open_forward_progress(conn, path, TARGET, "development")
    assert file.path == tmp_path / FORWARD_FILE
    assert (file.progress.seq, file.progress.accepted, file.progress.refused) == (3, 2, 1)
    assert forward.read_all_forward_progress(path) == [file.progress]
    file.save()
    assert json.loads(file.path.read_bytes()).items() <= json.loads(FORWARD_PROGRESS).items()


def test_replay_continues_with_the_progress_file_of_an_earlier_version(tmp_path):
    filled(tmp_path, 5)
    for arrived, is_caught_up, left in (5, b"false", 3), (5, b"true", 0), (4, b"true", 1):
        (tmp_path / REPLAY_FILE).write_bytes(REPLAY_PROGRESS % (arrived, NOW + 1, is_caught_up))
        done = run(*SCRIPT, "replay", "--to", "http://h", "--dry-run", cwd=tmp_path)
        assert ": 2 events were accepted before" in done.stderr
        assert f"would send {eventstore.counted(left, 'event')} in " in done.stderr
