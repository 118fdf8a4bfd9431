"""The command `eventstore replay`."""

from __future__ import annotations

import itertools
import json
import re
import signal
from functools import partial
from pathlib import Path

import pytest

from eventstore_extras import sending
from fake_target import FakeTarget, Handler, StoringTarget, accept, answer_413, answering, cut, refusing, reset
from forked import Command, forked
from helpers import (
    EVER,
    KEY,
    NOW,
    Live,
    at,
    command_line,
    database,
    event,
    eventually,
    exported,
    free_port,
    ids,
    imported,
    lines_of,
    python,
    refuse_to_write,
    store,
    stored_ids,
    table,
    total,
)

Captured = pytest.CaptureFixture[str]
FLAGS = ("--batch-size", 10, "--concurrency", 1)


@pytest.fixture(autouse=True)
def _short_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A folder with a database of a hundred events."""
    return imported(tmp_path / "source", lines_of(*[event(f"{n:05}", timestamp=at(n)) for n in range(100)]))


def replayed(folder: Path, url: str, *flags: object, key: str = KEY) -> int:
    """Replay folder/events.db and return the exit status."""
    return command_line("replay", "--db", folder / "events.db", "--to", url, "--api-key", key, *flags)


def tens(start: int, end: int) -> list[list[str]]:
    """Return the ids of the batches of ten from one number to another."""
    return [[f"{n:05}" for n in range(first, first + 10)] for first in range(start, end, 10)]


# ---------------------------------------------------------------------------------------------- what a target answers


@pytest.mark.slow
def test_replay_retries_429_500_and_broken_connections(tmp_path: Path, source: Path, capsys: Captured) -> None:
    tricks = [
        answering(429, retry_after="1"),
        answering(500),
        cut,
        answering(503, b"busy", retry_after="0"),
        cut,
        accept,
    ]
    with StoringTarget(tmp_path / "target", *tricks) as target:
        assert replayed(source, f"{target.url}/", *FLAGS) == 0
        assert target.times[1] - target.times[0] >= 1  # as Retry-After asks for
        assert target.batches == tens(0, 10) * 5 + tens(0, 100)
    message = capsys.readouterr().err
    assert re.search(r"sent 100 events: 100 accepted, 5 retried; .+ s\n$", message)
    assert message.count(f"{target.url} works again after ") == 1
    assert re.search(r"works again after \d+ s; 100 events sent since\n", message)
    assert exported(tmp_path / "target") == exported(source)


REFUSED_KEY = "answered 401: it does not accept the key; give a key of that API"
OWN_ERROR = {"code": "permission_denied", "message": "this key has the role event_reader", "details": {}}
UNAUTHORIZED = {"code": "unauthorized", "message": "its banner says where its keys came from", "details": {}}


@table(("status", "body", "part"), [
    (401, json.dumps(UNAUTHORIZED), f"{REFUSED_KEY} as --api-key (the key came from FLEXPRICE_API_KEY)"),
    (401, '{"error": "Unauthorized"}', f"{REFUSED_KEY} as --api-key (the key came from FLEXPRICE_API_KEY)"),
    (401, '{"success": false, "error": {"message": "no"}}', f"{REFUSED_KEY} as --api-key (the key came from"),
    (401, "", f"{REFUSED_KEY} as --api-key (the key came from FLEXPRICE_API_KEY)"),
    (401, "<p>Log in first</p>", "answered 401: <p>Log in first</p> (the key came from FLEXPRICE_API_KEY)"),
    (403, json.dumps(OWN_ERROR), "answered 403: this key has the role event_reader (the key came from FLEXPRICE_API_KEY)"),
    (403, "<p>Forbidden</p>", "answered 403: <p>Forbidden</p>; this is the batch"),
], ids=str)  # fmt: skip
def test_a_refused_key_is_named_by_its_flag_or_variable(
    source: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch, status: int, body: str, part: str
) -> None:
    monkeypatch.setenv("FLEXPRICE_API_KEY", KEY)
    with FakeTarget(answering(status, body.encode())) as target:
        assert command_line("replay", "--db", source / "events.db", "--to", target.url) == 1
    message = capsys.readouterr().err
    assert f"{target.url}/events/bulk {part}" in message
    assert "banner" not in message


def test_a_refused_batch_stops_replay_and_the_same_command_continues_there(
    tmp_path: Path, source: Path, capsys: Captured
) -> None:
    flags = ("--batch-size", 10, "--concurrency", 3)
    with StoringTarget(tmp_path / "target") as target:
        assert replayed(source, target.url, *flags, key="wrong") == 1
        message = capsys.readouterr().err
        assert f"{target.url}/events/bulk {REFUSED_KEY} as --api-key (the key came from --api-key); this is" in message
        assert "banner" not in message
        target.tricks = [refusing(400, "00045")]
        assert replayed(source, target.url, *flags) == 1
        message = capsys.readouterr().err
        for part in (
            "answered 400: 2 of them are invalid (no poison); this is the batch of 10 events from",
            'from "00040" to "00049"; everything before it is accepted',
            f"(cursor {(NOW + 39) * 1000}::00039); correct this, then the same command continues from there",
        ):
            assert part in message
        assert {*stored_ids(source)[:40]} <= {*ids(target.client, "POST", **EVER, page_size=1000)}
        target.tricks.clear()
        target.batches.clear()
        assert replayed(source, target.url.removesuffix("/v1"), *flags) == 0
        message = capsys.readouterr().err
        assert "continuing at cursor" in message
        assert "40 events were accepted before (--restart starts over)" in message
        assert sorted(itertools.chain(*target.batches)) == [f"{n:05}" for n in range(40, 100)]
        target.batches.clear()
        assert replayed(source, target.url, *flags, "--restart") == 0
        assert len(target.batches) == 10
        assert "100 accepted (100 of them it already had)" in capsys.readouterr().err
    assert exported(tmp_path / "target") == exported(source)


@table("status", [400, 413, 422])
def test_replay_stops_at_the_refusal_of_a_proxy_and_the_same_command_continues(
    tmp_path: Path, source: Path, capsys: Captured, status: int
) -> None:
    flags = ("--batch-size", 1, "--concurrency", 1)
    with StoringTarget(tmp_path / "target", accept, answering(status, b"<html>plain HTTP")) as target:
        assert replayed(source, target.url, *flags) == 1
        message = capsys.readouterr().err
        assert f"answered {status}: <html>plain HTTP - not an error of the API: does a proxy or firewall" in message
        assert 'this is the batch of 1 event from "00001" to "00001"' in message
        target.tricks.clear()
        assert replayed(source, target.url) == 0
    assert exported(tmp_path / "target") == exported(source)


@table("status", [200, 301])
def test_replay_stops_at_an_answer_that_no_api_gives_and_follows_no_redirect(
    tmp_path: Path, source: Path, capsys: Captured, status: int
) -> None:
    with StoringTarget(tmp_path / "target", answering(status, b"<p>hello", location="http://127.0.0.1:1/")) as target:
        assert replayed(source, target.url) == 1
        assert f"answered {status}: <p>hello - 202 was expected" in capsys.readouterr().err
        assert len(target.batches) == 1


@pytest.mark.slow
def test_replay_sends_smaller_batches_to_a_target_that_resets_large_ones_or_answers_413(
    tmp_path: Path, capsys: Captured
) -> None:
    events = [event(f"{n:05}", properties={"x": "y" * 4000}) for n in range(500)]
    source = imported(tmp_path / "source", lines_of(*events))
    with StoringTarget(tmp_path / "target") as target:
        target.max_bytes = 100_000
        for target.too_large in reset, answer_413:
            assert replayed(source, target.url, "--restart") == 0
            assert "sent 500 events: 500 accepted" in capsys.readouterr().err
            assert 50_000 < max(target.sizes) <= 100_000
            assert sorted(itertools.chain(*target.batches)) == [f"{n:05}" for n in range(500)]
            target.batches.clear()
            target.sizes.clear()
        target.max_bytes = 4_000
        assert replayed(source, target.url, "--restart", "--concurrency", 1) == 1
        message = capsys.readouterr().err
        assert "answered 413 - not an error of the API" in message
        assert '; this is the batch of 1 event from "00000" to "00000"; ' in message
    assert exported(tmp_path / "target") == exported(source)


def test_replay_gives_up_when_no_batch_is_accepted_for_long(source: Path, capsys: Captured) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    assert replayed(source, url, "--give-up-after-s", 1) == 1
    message = capsys.readouterr().err
    for part in ("no batch was accepted for 1 s (--give-up-after-s)", "cannot be reached", "cursor at the start"):
        assert part in message
    assert message.count("; trying again, for at most 1 s") == 1, "said at each try"
    assert not [*source.glob("*.replay-*")], "there is a progress file, but no progress"


# ---------------------------------------------------------------------------------------------- which events are sent


@pytest.mark.slow
def test_replay_sends_events_that_arrived_after_its_start_whatever_their_time(
    tmp_path: Path, source: Path, capsys: Captured
) -> None:
    def store_more(_handler: Handler, _ids: list[str]) -> bool:
        target.tricks = [accept]
        (source / "more").write_bytes(lines_of(event("older", timestamp=at(-5)), event("newer", timestamp=at(1000))))
        assert forked(source, "import", "more").returncode == 0
        return False

    with StoringTarget(tmp_path / "target", store_more) as target:
        assert replayed(source, target.url, *FLAGS) == 0
        assert exported(tmp_path / "target") == exported(source)
        imported(source, lines_of(event("oldest", timestamp=at(-50)), event("last", timestamp=at(2000))))
        target.batches.clear()
        assert replayed(source, target.url) == 0
        assert target.batches == [["oldest", "last"]]
        assert replayed(source, target.url) == 0
        assert len(target.batches) == 1
    assert "sent 0 events: 0 accepted, 0 retried" in capsys.readouterr().err
    assert exported(tmp_path / "target") == exported(source)


@pytest.mark.slow
@table("deleted", ["the last one sent", "all that were sent", "all"])
def test_replay_continues_although_events_were_deleted_meanwhile(
    tmp_path: Path, source: Path, capsys: Captured, deleted: str
) -> None:
    where = {"the last one sent": "id = '00049'", "all that were sent": "id < '00050'", "all": "true"}[deleted]
    with StoringTarget(tmp_path / "target", refusing(400, "00050")) as target:
        assert replayed(source, target.url, *FLAGS) == 1
        with database(source) as conn:
            conn.execute(f"DELETE FROM events WHERE {where}")
            conn.commit()
        target.tricks.clear()
        target.batches.clear()
        for new in ([], ["new"]):
            imported(source, lines_of(*map(event, new)))
            assert replayed(source, target.url, *FLAGS) == 0
        expected = [] if deleted == "all" else [f"{n:05}" for n in range(50, 100)]
        assert list(itertools.chain(*target.batches)) == [*expected, "new"]
    assert "50 events were accepted before" in capsys.readouterr().err


def test_each_filter_has_its_own_progress_and_a_dry_run_sends_nothing(
    tmp_path: Path, source: Path, capsys: Captured
) -> None:
    imported(source, lines_of(event("other", event_name="other", timestamp=at(1))))
    with StoringTarget(tmp_path / "target") as target:
        names = sorted(path.name for path in source.iterdir())
        assert replayed(source, target.url, "--dry-run", "--batch-size", 40) == 0
        assert f"would send 101 events in 3 requests to {target.url}/events/bulk" in capsys.readouterr().err
        assert (target.batches, sorted(path.name for path in source.iterdir())) == ([], names)
        assert replayed(source, target.url, "--event-name", "other") == 0
        assert target.batches == [["other"]]
        assert replayed(source, target.url) == 0
        assert len(target.batches) == 2
        assert len([*source.glob("events.db.replay-????????????????.json")]) == 2


@table("count", [1, 200])
def test_the_progress_of_another_database_is_refused(
    tmp_path: Path, source: Path, capsys: Captured, count: int
) -> None:
    with StoringTarget(tmp_path / "target") as target:
        assert replayed(source, target.url) == 0
        (source / "events.db").unlink()
        imported(source, lines_of(*[event(f"new {n}") for n in range(count)]))
        assert replayed(source, target.url) == 2
        message = capsys.readouterr().err
        assert "belongs to another database of that name" in message
        assert "with --restart all events are sent again" in message


# ---------------------------------------------------------------------------------------------- start and end


@pytest.mark.slow
def test_a_replay_that_is_killed_continues_after_the_last_saved_position(tmp_path: Path) -> None:
    sent = [event(f"{n:05}", timestamp=at(n * 7919 % 3000)) for n in range(3000)]
    with Live(tmp_path / "source", "--api-key", KEY) as source, Live(tmp_path / "target", "--api-key", KEY) as target:
        (tmp_path / "source" / "in.ndjson").write_bytes(lines_of(*sent))
        assert forked(tmp_path / "source", "import", "in.ndjson").returncode == 0
        replay = partial(
            Command, tmp_path / "source", "replay", "--to", target.url, "--batch-size", "10", FLEXPRICE_API_KEY=KEY
        )
        with source.client() as client:
            store(client, event("over HTTP", timestamp=at(0)))
        with target.client() as client:
            for number, status, end in ((signal.SIGKILL, -9, 600), (signal.SIGINT, 1, 1200), (signal.SIGTERM, 1, 1800)):
                refuse_to_write(tmp_path / "target", f"new.timestamp_us >= {NOW + end}")  # which replay retries
                command = replay()
                eventually(lambda end=end: total(client) > end - 10)  # type: ignore[misc]
                command.process.send_signal(number)
                done = command.end()
                assert done.returncode == status
                lines = [line for line in done.stderr.splitlines() if "trying again" not in line]
                assert len(lines) == (2 if status == 1 else 0)
                if status == 1:
                    interrupted = r"eventstore: interrupted; .+ are accepted \(cursor .+; the same command continues"
                    assert re.match(interrupted, lines[-1])
                # Count while the trigger refuses: without it the target may store batches that replay sent before it ended.
                assert total(client) <= end + 1  # with the event over HTTP
                with database(tmp_path / "target") as conn:
                    conn.execute("DROP TRIGGER full")
        done = replay().end()
        assert done.returncode == 0
        assert re.match(r"eventstore: continuing at cursor \d+::\d+: 1,\d{3} events were accepted before", done.stderr)
        found = re.search(r"sent .+: ([\d,]+) accepted", done.stderr)
        assert found
        assert 1200 <= int(found[1].replace(",", "")) < 1300
        exports = [forked(tmp_path / name, "export").stdout for name in ("source", "target")]
        assert exports[0] == exports[1]
        assert len(exports[0].splitlines()) == 3001


@pytest.mark.slow
@table("number", ["SIGINT", "SIGTERM"])
def test_a_signal_ends_replay_even_where_python_ignores_exceptions(source: Path, number: str) -> None:
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
    done = forked(source, "replay", "--to", "http://127.0.0.1:1", "--api-key", "k", code=code)
    assert done.returncode == 1, done.stderr
    assert re.fullmatch(r"eventstore: interrupted; 0 events are accepted \(.+\n", done.stderr)


def test_replay_says_how_to_install_httpx(source: Path) -> None:
    code = "import sys; sys.modules['httpx'] = None; import eventstore; sys.exit(eventstore.main())"
    done = python(code, "replay", "--to", "http://127.0.0.1:1", "--api-key", "k", cwd=source)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"eventstore: replay needs httpx: .+ -m pip install httpx.*\n", done.stderr)
