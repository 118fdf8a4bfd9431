"""Upgrades a database file of an older format, in place and in one transaction.

A crash, a kill or a power cut leaves the file in the old format or in the new one. The next start begins again.
"""

from __future__ import annotations

import os
import shutil
import sqlite3
import tempfile
import time
from typing import NamedTuple

from eventstore import StartError, log, plural, say

__all__ = ["upgrade"]

# Statements that turn a file of this format into one of the next. They must also succeed on a file that is upgraded
# already, because a server of an older version that still runs can set the format's number back.
_STEPS: dict[int, tuple[str, ...]] = {
    1: (  # leave the id out of two indexes: saves a fifth of the file
        "DROP INDEX IF EXISTS events_by_customer",
        "CREATE INDEX events_by_customer ON events (environment, external_customer_id, timestamp_us)",
        "DROP INDEX IF EXISTS events_by_name",
        "CREATE INDEX events_by_name ON events (environment, event_name, timestamp_us)",
    )
}
_REASONS = {  # by SQLite's error code
    sqlite3.SQLITE_BUSY: "another process writes to it; wait until that ends, or stop it, and start again",
    sqlite3.SQLITE_FULL: "the disk is full; make room for half as much as the file takes, and start again",
    sqlite3.SQLITE_INTERRUPT: "it was interrupted; start again",
}
_REPORT_INTERVAL_S = 10.0
_INSTRUCTIONS_PER_EVENT = 22  # of SQLite's virtual machine, to add an event to both indexes
_HANDLER_INSTRUCTIONS = 100_000
_ENTRY_BYTES = 20  # of an index entry, without its texts


def _report(message: str) -> None:
    """Log a line, or print it if logging is not set up, as in commands."""
    if log.hasHandlers():
        log.info("%s", message)
    else:
        say(message)


def _run_steps(conn: sqlite3.Connection, path: str, found: int, version: int) -> None:
    (events,) = conn.execute("SELECT count(*) FROM events").fetchone()
    _report(f"upgrading {path} from format {found} to {version}: {plural(events, 'event')}")
    reported_s = time.monotonic()
    executed = 0

    def watch() -> None:
        nonlocal executed, reported_s
        executed += _HANDLER_INSTRUCTIONS
        if time.monotonic() >= reported_s + _REPORT_INTERVAL_S:
            reported_s = time.monotonic()
            done = min(executed / (_INSTRUCTIONS_PER_EVENT * max(events, 1)), 0.99)
            _report(f"upgrading {path}: about {done:.0%} done")

    conn.set_progress_handler(watch, _HANDLER_INSTRUCTIONS)
    try:
        for step in range(found, version):
            for statement in _STEPS[step]:
                conn.execute(statement)
        conn.execute(f"PRAGMA user_version = {version}")
    finally:
        conn.set_progress_handler(None, 0)


class _Space(NamedTuple):
    """The bytes that the upgrade needs on the disk."""

    wal: float
    sort: float  # SQLite's temporary files


def _space_needed(conn: sqlite3.Connection) -> _Space:
    octets = "total(length(CAST({} AS BLOB)))".format
    events, customers, ids = conn.execute(
        f"SELECT count(*), {octets('external_customer_id')}, {octets('id')} FROM events"
    ).fetchone()
    (names,) = conn.execute(f"SELECT {octets('event_name')} FROM events").fetchone()
    # The WAL holds every page of the old indexes, which are two thirds full; the new ones fit into the same pages.
    # SQLite sorts one index at a time, in temporary files that hold it up to twice.
    wal = 1.5 * (customers + names + 2 * ids + 2 * _ENTRY_BYTES * events)
    return _Space(wal, 2 * (max(customers, names) + _ENTRY_BYTES * events))


def _disk_of(folder: str) -> int:
    return os.stat(folder).st_dev


def _sort_folder() -> str:
    """Return the folder of SQLite's temporary files."""
    folders = (os.environ.get("SQLITE_TMPDIR"), os.environ.get("TMPDIR"), "/var/tmp", "/usr/tmp")  # noqa: S108
    usable = (folder for folder in folders if folder and os.path.isdir(folder) and os.access(folder, os.W_OK | os.X_OK))
    return next(usable, tempfile.gettempdir())


def _check_space(conn: sqlite3.Connection, path: str, version: int) -> None:
    """Raise StartError if the upgrade is unlikely to fit on the disk."""
    space = _space_needed(conn)
    database, sorting = os.path.dirname(os.path.abspath(path)), _sort_folder()
    needed = {database: space.wal, sorting: space.sort}
    if _disk_of(database) == _disk_of(sorting):
        needed = {database: space.wal + space.sort}
    for folder, size in needed.items():
        if (free := shutil.disk_usage(folder).free) < size:
            amounts = f"{size / 1e6:,.1f} MB on the disk of {folder}, which has {free / 1e6:,.1f} MB left"
            raise StartError(f"{path} is unchanged: to upgrade it to format {version} takes {amounts}: make room there")


def upgrade(conn: sqlite3.Connection, path: str, version: int) -> None:
    """Upgrade the file from format 1 or later to `version`. Do nothing if another process has upgraded it.

    Raises StartError, and leaves the file as it is, if the disk is too small, if another process writes to the file, or
    if SQLite fails.
    """
    started_s = time.monotonic()
    try:
        conn.execute("BEGIN IMMEDIATE")
        (found,) = conn.execute("PRAGMA user_version").fetchone()
        if found < version:
            _check_space(conn, path, version)
            _run_steps(conn, path, found, version)
        conn.execute("COMMIT")
    except sqlite3.Error as error:
        reason = _REASONS.get(error.sqlite_errorcode & 0xFF, str(error))
        raise StartError(f"{path} was not upgraded to format {version} and is unchanged: {reason}") from error
    finally:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
    if found < version:
        taken_s = time.monotonic() - started_s
        _report(f"upgraded {path} to format {version} in {taken_s:.1f} s; older versions cannot open it any more")
