"""The command `replay`."""

from __future__ import annotations

import itertools
import json
import os
import re
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from eventstore_extras import sending
from helpers import (
    EVER,
    KEY,
    NOW,
    SCRIPT,
    TEXT_FILE,
    Live,
    at,
    command_line,
    database,
    event,
    eventually,
    exported,
    ids,
    imported,
    lines_of,
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

CANNOT_RUN = [  # arguments, what the message names
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
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)
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
    assert sending.retry_after_s(text) == seconds
    in_an_hour = (datetime.now(UTC) + timedelta(hours=1)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 3000 < sending.retry_after_s(in_an_hour) <= 3600


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
        assert "continuing at cursor" in message
        assert "40 events were accepted before (--restart starts over)" in message
        assert sorted(itertools.chain(*target.ids_sent())) == [f"{n:05}" for n in range(40, 100)]
        del target.bodies[:]
        assert replayed(source, target.url, *flags, "--restart") == 0
        assert len(target.bodies) == 10
        assert "100 accepted (100 of them it already had)" in capsys.readouterr().err
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


def test_a_replay_sends_less_at_a_time_to_a_target_that_resets_large_bodies_or_answers_413(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)
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
        assert 'answered 413; this is the batch of 1 event from "00000" to "00000"; ' in capsys.readouterr().err
    assert exported(tmp_path / "target") == exported(source)


def test_a_replay_gives_up_when_nothing_is_accepted_for_long(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)
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
    assert sending.target_url(url, "--to") == f"{url.rstrip('/').removesuffix('/v1')}/v1"


@table("path", ["/v1/events", "/v1/events/bulk", "/v2/x", "/events", "/v1/x", "/v2", "/api/V1", "/v1beta/"])
def test_a_target_is_a_base_url(tmp_path, capsys, path):
    assert replayed(a_source(tmp_path), f"http://127.0.0.1:1{path}") == 2
    assert "--to must be the base URL, with or without /v1 at its end" in capsys.readouterr().err


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
        assert re.match(r"eventstore: continuing at cursor \d+::\d+: 1,\d{3} events were accepted before", done.stderr)
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
