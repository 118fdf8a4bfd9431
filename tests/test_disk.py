"""The disk and the database file: what /health and the log report, links, and relative paths."""

from __future__ import annotations

import asyncio
import os
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any, NamedTuple

import httpx
import pytest

import eventstore
from eventstore import ApiError, ApiKey, Settings, create_app
from eventstore_extras.forward import ForwardProgress, forward_progress_path, read_all_forward_progress
from helpers import (
    KEY,
    KEYS,
    Live,
    becomes,
    command_line,
    counts,
    event,
    eventually,
    fill,
    ids,
    refused,
    serving,
    store,
    store_of,
    table,
    write_lock,
)

# ---------------------------------------------------------------------------------------------- a full disk


def batch_of(size: int) -> list[dict[str, Any]]:
    return [event(source="x" * 50) for _ in range(size)]


def health(client: httpx.Client) -> tuple[int, str]:
    response = client.get("/health")
    return response.status_code, response.json()["status"]


def test_health_fails_on_a_full_disk_until_as_large_a_commit_fits(
    small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(eventstore, "_TRIAL_PAUSE_S", 0.0)
    filler = small_disk / "filler"
    with serving(small_disk, warn_free_bytes=0) as client:
        store(client, *batch_of(500))
        fill(filler)
        for _ in range(3):
            refused(client.post("/v1/events/bulk", json={"events": batch_of(500)}), 500, "database_error")
            assert client.get("/health").json()["reason"] == "the disk is full"
            assert health(client) == (503, "failing")
        stored = len(ids(client, "POST", page_size=1000))
        assert stored == 500
        store(client, event("small"))  # fits, and says nothing about the batches
        assert health(client) == (503, "failing")
        filler.unlink()
        assert health(client) == (200, "ok")
        assert len(ids(client, "POST", page_size=1000)) == 501  # the trial has stored nothing
        assert counts(store(client, *batch_of(500))) == (500, 0)


def test_a_commit_as_large_as_the_failed_one_ends_the_failure(small_disk: Path) -> None:
    filler = small_disk / "filler"
    with serving(small_disk, warn_free_bytes=0) as client:
        fill(filler)
        refused(client.post("/v1/events/bulk", json={"events": batch_of(1000)}), 500, "database_error")
        assert health(client) == (503, "failing")  # and from now on no trial for a second
        filler.unlink()
        store(client, *batch_of(1000))
        assert health(client) == (200, "ok")


def test_a_trial_writes_all_pages_but_keeps_none(tmp_path: Path) -> None:
    with serving(tmp_path) as client:
        store(client, event("known"))
        wal = tmp_path / "events.db-wal"
        before = wal.stat().st_size
        writer: Any = store_of(client).writer
        environment = store_of(client).environments["development"]
        row = eventstore.Row(environment, "", "cust", "", "call", "", 0, 0, '{"a": "%s"}' % ("x" * 1000))
        writer._failed_rows = [row._replace(id=f"{number}") for number in range(1000)]
        asyncio.run(writer.try_again())
        assert wal.stat().st_size > before + 1_000_000
        assert ids(client) == ["known"]
        assert counts(store(client, event("0"))) == (1, 0)
        assert writer._conn.execute("PRAGMA cache_size").fetchone() == (-32768,)


# ---------------------------------------------------------------------------------------------- a nearly full disk


class FakeDisk(NamedTuple):
    f_bavail: int
    f_blocks: int
    f_frsize: int = 4096


MB, GB = 10**6 // 4096, 10**9 // 4096


@pytest.fixture
def disk(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    def set_disk(free: int, size: int) -> None:
        monkeypatch.setattr(os, "statvfs", lambda _: FakeDisk(free, size), raising=False)

    return set_disk


@table(
    ("free", "size", "limit", "status"),
    [
        (6 * GB, 100 * GB, None, "ok"),
        (2 * GB, 100 * GB, None, "ok"),  # less than 5 %, but more than 1 GB
        (GB // 2, 100 * GB, None, "warning"),
        (60 * MB, 1 * GB, None, "ok"),  # less than 1 GB, but more than 5 %
        (40 * MB, 1 * GB, None, "warning"),
        (0, 1 * GB, None, "warning"),
        (40 * MB, 1 * GB, 30_000_000, "ok"),
        (40 * MB, 1 * GB, 50_000_000, "warning"),
        (0, 1 * GB, 0, "ok"),
    ],
)
def test_health_warns_before_the_disk_is_full(
    tmp_path: Path, disk: Any, free: int, size: int, limit: int | None, status: str
) -> None:
    disk(free, size)
    with serving(tmp_path, warn_free_bytes=limit) as client:
        assert health(client) == (200, status)
        reason = client.get("/health").json().get("reason", "")
        assert bool(re.match(r"the disk has [0-9.,]+ MB left", reason)) is (status == "warning")


def test_the_log_says_once_that_the_disk_is_nearly_full_and_once_that_it_is_not(
    tmp_path: Path, disk: Any, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    caplog.set_level("INFO", "eventstore")
    monkeypatch.setattr(eventstore, "_SPACE_PAUSE_S", 0.0)
    disk(10 * GB, 100 * GB)
    with serving(tmp_path) as client:
        store(client, event())
        disk(GB // 2, 100 * GB)
        for _ in range(3):
            store(client, event())  # without a look at /health
        eventually(lambda: "MB left" in caplog.text)
        disk(GB + 1, 100 * GB)  # just above the limit: no line yet
        store(client, event())
        disk(10 * GB, 100 * GB)
        store(client, event())
        eventually(lambda: "room again" in caplog.text)
    assert (caplog.text.count("MB left"), caplog.text.count("room again")) == (1, 1)


def test_a_failure_is_shown_rather_than_a_warning(tmp_path: Path, disk: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventstore, "WRITE_LOCK_TIMEOUT_S", 0.1)
    disk(0, 100 * GB)
    with serving(tmp_path) as client, write_lock(tmp_path):
        refused(client.post("/v1/events", json=event()), 503, "service_unavailable")
        assert health(client) == (503, "failing")


# ---------------------------------------------------------------------------------------------- bugs


def fail_with(error: Exception) -> Callable[[sqlite3.Connection], None]:
    def operation(_: sqlite3.Connection) -> None:
        raise error

    return operation


@table("error", [KeyError("a"), ZeroDivisionError(), TypeError(), sqlite3.ProgrammingError("binding")], ids=repr)
def test_a_bug_in_an_operation_is_an_internal_error_and_does_not_make_health_fail(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(tmp_path) as client:
        with pytest.raises(ApiError) as caught:
            asyncio.run(_write(store_of(client), fail_with(error)))
        assert caught.value.code == "internal_error"
        assert type(error).__name__ in caplog.text
        assert health(client) == (200, "ok")
        assert counts(store(client, event("a"))) == (1, 0)


@table("error", [sqlite3.OperationalError("disk I/O error"), sqlite3.DatabaseError("malformed"), OSError("gone")],
       ids=repr)  # fmt: skip
def test_a_failure_of_the_database_in_an_operation_makes_health_fail_until_a_commit_succeeds(
    tmp_path: Path, error: Exception
) -> None:
    with serving(tmp_path) as client:
        with pytest.raises(ApiError):
            asyncio.run(_write(store_of(client), fail_with(error)))
        assert store_of(client).writer.failure
        store(client, event("a"))
        assert health(client) == (200, "ok")


async def _write(store: eventstore.Store, operation: Callable[[sqlite3.Connection], None]) -> None:
    await store.write(operation)


# ---------------------------------------------------------------------------------------------- links and relative paths


@pytest.fixture(params=["file", "folder", "two links", "relative link"])
def linked(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[Path, Path]:
    """A path that leads to a database through links, and the real one."""
    real = tmp_path / "real" / "data.db"
    real.parent.mkdir()
    link = tmp_path / "link.db"
    if request.param == "folder":
        (tmp_path / "linked").symlink_to(real.parent)
        return tmp_path / "linked" / "data.db", real
    if request.param == "two links":
        (tmp_path / "first").symlink_to(real)
        link.symlink_to(tmp_path / "first")
    else:
        link.symlink_to(Path("real/data.db") if request.param == "relative link" else real)
    return link, real


@table("suffix", ["", "-wal"])
def test_a_removed_file_behind_a_link_is_noticed(linked: tuple[Path, Path], suffix: str) -> None:
    link, real = linked
    with serving(link.parent, db=str(link)) as client:
        store(client, event("a"))
        Path(f"{real}{suffix}").rename(f"{real}.away")
        refused(client.post("/v1/events", json=event("b")), 500, "database_error")
        assert health(client) == (503, "failing")
        Path(f"{real}.away").rename(f"{real}{suffix}")
        store(client, event("b"))
        assert sorted(ids(client)) == ["a", "b"]


def test_a_wal_behind_a_link_is_measured_by_its_own_size(linked: tuple[Path, Path]) -> None:
    link, real = linked
    with serving(link.parent, db=str(link)) as client:
        store(client, event("a"))
        writer: Any = store_of(client).writer
        store(client, event("b"))
        assert [status.st_ino for status in writer._files] == [
            os.stat(real).st_ino, os.stat(f"{real}-wal").st_ino]  # fmt: skip


def test_a_file_behind_a_link_that_ends_in_half_a_page_is_recovered_from_its_wal(tmp_path: Path) -> None:
    real, link, killed = tmp_path / "data.db", tmp_path / "link.db", tmp_path / "killed"
    link.symlink_to(killed / "data.db")
    killed.mkdir()
    with serving(tmp_path, db=str(real)) as client:
        store(client, event("a"))
        for name in ("data.db", "data.db-wal"):  # as a crash would leave them
            shutil.copy(tmp_path / name, killed / name)
    os.truncate(killed / "data.db", real.stat().st_size - 100)
    assert eventstore.prepare_file(str(link)) == 1


def test_a_relative_path_still_leads_to_the_file_after_a_change_of_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    with serving(tmp_path, db="events.db") as client:
        store(client, event("a"))
        monkeypatch.chdir(tmp_path / "elsewhere")
        store(client, event("b"))
        app: Any = client.app
        service = app.state.service
        service.replace_api_keys([*KEYS, ApiKey.hashed("new", "fresh")])
        assert health(client) == (200, "ok")
        assert client.get("/v1/events", headers={"x-api-key": "new"}).status_code == 200
        assert (service.store.name, service.store.path) == ("events.db", str(tmp_path / "events.db"))
    assert [path.name for path in tmp_path.iterdir() if path.is_file()] == ["events.db"]
    assert not any((tmp_path / "elsewhere").iterdir())


def test_prune_finds_the_progress_of_forwarding_behind_a_link(
    linked: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    link, real = linked
    with serving(link.parent, db=str(link)) as client:
        store(client, event("a"))
    new = ForwardProgress(target="http://t.test/v1", environment="development")
    path = forward_progress_path(str(link), new.target, new.environment)
    assert path.parent == real.parent
    path.write_bytes(eventstore.ENCODER.encode(new))
    assert command_line("prune", "--db", link, "--before", "2025-10-16T00:00:00Z") == 0
    assert "keeps 1 event of that time until accepted by http://t.test/v1" in capsys.readouterr().err
    assert len(read_all_forward_progress(str(real))) == 1
    assert ids_in(real) == ["a"]


def ids_in(db: Path) -> list[str]:
    with closing(sqlite3.connect(db)) as conn:
        return [event_id for (event_id,) in conn.execute("SELECT id FROM events")]


def test_the_banner_shows_the_path_that_was_given(tmp_path: Path) -> None:
    (tmp_path / "link.db").symlink_to("data.db")
    with Live(tmp_path, "--api-key", KEY, "--db", "link.db") as live:
        assert "link.db (0 events)" in live.banner
    assert (tmp_path / "data.db").exists()


# ---------------------------------------------------------------------------------------------- cancelled requests


def test_a_timeout_around_an_in_process_client_is_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(eventstore, "WRITE_LOCK_TIMEOUT_S", 1.0)
    app = create_app(Settings(db=str(tmp_path / "events.db"), api_keys=KEYS))
    transport = httpx.ASGITransport(app)
    service: eventstore.Service = app.state.service

    async def send() -> None:
        async with httpx.AsyncClient(transport=transport, base_url="http://t", headers={"x-api-key": KEY}) as client:
            with pytest.raises(TimeoutError):
                async with asyncio.timeout(0.05):
                    await client.post("/v1/events", json=event("a"))
            task = asyncio.create_task(client.post("/v1/events", json=event("b")))
            await becomes(lambda: service.store.writer.waiting_events == 1)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            service.is_stopping = lambda: True
            task = asyncio.create_task(client.post("/v1/events", json=event("c")))
            await becomes(lambda: service.store.writer.waiting_events == 1)
            task.cancel()
            refused(await task, 503, "service_unavailable", "shutting down")
            assert service.shares.total == 0

    with write_lock(tmp_path):
        asyncio.run(send())
    service.store.close()
