"""The command `eventstore backup`: copy the database while a server may be running, and check the copy."""

from __future__ import annotations

import argparse
import glob
import os
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from eventstore import AddFlag, StartError, add_db_flag, plural, real_path, say
from eventstore_extras.files import check_folder, progress_bar, whole_file
from eventstore_extras.job import StopError, run_job
from eventstore_extras.stored import open_stored

__all__ = ["add_flags", "run"]

_STEP_PAGES = 2000  # copied between two movements of the bar; also the longest wait after Ctrl-C
_COUNTS = """SELECT (SELECT count(*) FROM events), (SELECT coalesce(max(seq), 0) FROM events),
    (SELECT count(*) FROM environments), (SELECT count(*) FROM meters), (SELECT count(*) FROM features)"""
_SIZE = "SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"


def _check_target(path: str, db: str, replaces: bool) -> None:
    """Raise StartError if the copy cannot be written there."""
    if os.path.islink(path) or os.path.isdir(path):
        raise StartError(f"{path} is a link or a folder: name the file itself")
    if os.path.exists(path) and os.path.samefile(path, db):
        raise StartError(f"{path} is the database itself: name another file")
    if os.path.exists(path) and not replaces:
        raise StartError(f"{path} exists: name another file, or add --force to replace it")
    if in_use := [name for name in (f"{path}-wal", f"{path}-journal") if os.path.exists(name)]:
        raise StartError(f"{in_use[0]} exists: {path} may be in use; name another file, or remove it")
    check_folder(path)


def _copy(source: sqlite3.Connection, path: str, advance: Callable[[int], object]) -> None:
    """Copy a database into an empty file. Raises sqlite3.Error.

    The caller holds a read transaction: without it SQLite would start over whenever a server has written.
    """
    page_bytes = int(source.execute("PRAGMA page_size").fetchone()[0])
    done = 0

    def progress(_: int, left: int, pages: int) -> None:
        nonlocal done
        advance((pages - left) * page_bytes - done)
        done = (pages - left) * page_bytes

    # No other process opens the file, so it needs neither locks nor a journal, which a kill would leave behind.
    uri = f"{Path(path).absolute().as_uri()}?nolock=1"
    with closing(sqlite3.connect(uri, uri=True, isolation_level=None)) as target:
        target.execute("PRAGMA journal_mode = OFF")
        target.execute("PRAGMA synchronous = OFF")  # the file is synced as a whole when it is complete
        source.backup(target, pages=_STEP_PAGES, progress=progress)


def _check_copy(path: str, expected: tuple[int, ...]) -> None:
    """Raise StopError if the copy is damaged, or has other numbers of rows than expected."""
    uri = f"{Path(path).absolute().as_uri()}?immutable=1"  # no -wal and -shm beside it
    counts = None
    try:
        with closing(sqlite3.connect(uri, uri=True)) as conn:
            problems = [text for (text,) in conn.execute("PRAGMA integrity_check(3)")]
            counts = conn.execute(_COUNTS).fetchone()
    except sqlite3.Error as error:
        problems = [str(error)]
    if problems != ["ok"]:
        raise StopError(f"the copy is damaged, so it was removed: {'; '.join(problems)[:500]}; check the disk")
    if counts != expected:
        raise StopError(f"the copy has {counts} rows instead of {expected}, so it was removed; check the disk")


def _positions(db: str) -> dict[str, bytes]:
    """Return the files that record how far forwarding has come: the end of each name, and the content."""
    start = real_path(db)
    names = glob.glob(f"{glob.escape(start)}.forward-*.json")
    return {name.removeprefix(start): Path(name).read_bytes() for name in names}


def _write_positions(path: str, positions: dict[str, bytes]) -> None:
    """Write the positions beside the copy, and remove those of an older copy. Raises StopError."""
    for name in glob.glob(f"{glob.escape(path)}.forward-*.json"):
        if name.removeprefix(path) not in positions:
            os.unlink(name)
    for end, content in positions.items():
        with whole_file(path + end, f"cannot write {path}{end}", f"{path} is complete") as file:
            file.write(content)


def _copy_and_check(source: sqlite3.Connection, path: str) -> int:
    """Copy a database as it is now into an empty file; return the number of events. Raises StopError, sqlite3.Error."""
    source.execute("BEGIN")  # from the first SELECT on, this connection sees one state of the database
    counts: tuple[int, ...] = source.execute(_COUNTS).fetchone()
    (size_bytes,) = source.execute(_SIZE).fetchone()
    with progress_bar(lambda: int(size_bytes), "B") as advance:
        _copy(source, path, advance)
    source.execute("COMMIT")  # the server can shorten its log again
    _check_copy(path, counts)
    return counts[0]


def _back_up(arguments: argparse.Namespace) -> int:
    """Copy the database, check the copy, and put it in place. Raises StartError, StopError."""
    started_s = time.monotonic()
    db, path = arguments.db, arguments.file
    with closing(open_stored(db)) as source:
        _check_target(path, db, arguments.force)
        positions = _positions(db)  # before the copy: a position that is too old only sends events again
        with whole_file(path, f"cannot write {path}", "no copy was made") as file:
            try:
                events = _copy_and_check(source, file.name)
            except sqlite3.Error as error:
                raise StopError(f"cannot copy {db} to {path}: {error}; no copy was made") from error
    _write_positions(path, positions)
    beside = f", with {plural(len(positions), 'forwarding position')} beside it" if positions else ""
    taken_s = time.monotonic() - started_s
    say(f"copied {db} to {path}: {plural(events, 'event')}, checked{beside}; {taken_s:.1f} s")
    return 0


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `backup`."""
    add_db_flag(add, "database file; a server may be running on it")
    add("file", metavar="FILE", help="where to put the copy")
    add("--force", action="store_true", help="replace FILE if it exists")


def run(arguments: argparse.Namespace) -> int:
    """Run `eventstore backup` and return its exit status. Raises StartError."""
    return run_job(_back_up, arguments)
