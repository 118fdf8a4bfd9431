"""The setting of the measurements at one table size: the file, our server and the floor server."""

from __future__ import annotations

import sqlite3
import uuid
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import NamedTuple

from benchmarks.events import CUSTOMERS, http_request, make_row
from benchmarks.load import Load, Outcome, run_load
from benchmarks.servers import CLONE, Server, floor_server, our_server
from eventstore import DAY_US, MAX_BATCH, WRITE_LOCK_TIMEOUT_S, WRITER_PRAGMAS, Row, connect, insert_events, now_us

__all__ = ["FULL", "QUICK", "Bench", "Effort", "create_tables"]


class Effort(NamedTuple):
    """How many events, rounds and requests to measure with."""

    sizes: tuple[int, ...] = (10_000, 1_000_000)
    rounds: int = 3
    seconds: float = 1.0  # of each load without a fixed number of requests
    batches: int = 48
    singles: int = 20_000


QUICK = Effort((1_000,), 1, 0.05, 4, 200)
FULL = Effort((10_000, 1_000_000, 10_000_000))


def create_tables(db: Path, clone: Path = CLONE) -> None:
    with our_server(db, clone=clone):
        pass


class Bench:
    """A context manager for a file of `size` events, and for our server and the floor server on it.

    With another `clone`, the file and our server are those of the version there.
    """

    def __init__(self, folder: Path, size: int, effort: Effort, pool: ProcessPoolExecutor, clone: Path = CLONE) -> None:
        self.db, self.size, self.effort, self.pool = folder / f"events-{size}.db", size, effort, pool
        self.clone = clone
        self.customers = min(CUSTOMERS, size // 100)
        self.start_us = now_us() - 6 * DAY_US  # within the seven days that a page covers by default
        self.end_us = now_us()

    def __enter__(self) -> Bench:
        self._fill()
        self.bytes_per_event = self.db.stat().st_size / self.size
        with ExitStack() as stack:  # stops the first server if the second one fails, or on Ctrl-C
            # Usage of 20 meters over 10,000,000 events takes minutes.
            self.ours = stack.enter_context(our_server(self.db, "--query-timeout-s", 600, clone=self.clone))
            self.floor = stack.enter_context(floor_server(self.db))
            self._servers = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._servers.close()
        for suffix in ("", "-wal", "-shm"):
            Path(f"{self.db}{suffix}").unlink(missing_ok=True)

    def _fill(self) -> None:
        """Store events in the order of their times, with random ids, as the server stores them."""
        create_tables(self.db, self.clone)
        step_us = (self.end_us - self.start_us) / self.size
        with closing(connect(str(self.db), ("PRAGMA synchronous = OFF", "PRAGMA cache_size = -1048576"))) as conn:
            for first in range(0, self.size, MAX_BATCH * 10):
                numbers = range(first, min(first + MAX_BATCH * 10, self.size))
                rows = [self.make_row(number, self.start_us + int(number * step_us)) for number in numbers]
                insert_events(conn, rows, WRITE_LOCK_TIMEOUT_S)
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")

    def make_row(self, number: int, timestamp_us: int = 0) -> Row:
        """Make an event of one of this table's customers, with a random id."""
        return make_row(number, str(uuid.uuid4()), self.customers, timestamp_us)

    def send(
        self,
        server: Server,
        requests: Sequence[bytes],
        connections: int,
        *,
        seconds: float | None = None,
        repeat: bool = True,
        per_second: float = 0,
    ) -> Future[Outcome]:
        """Send the requests from a generator process, by default for the effort's seconds."""
        seconds = self.effort.seconds if seconds is None else seconds
        return self.pool.submit(run_load, Load(server.port, requests, connections, seconds, repeat, per_second))

    def set_floor(self, statement: str, parameters: Sequence[dict[str, object]], answer: bytes) -> None:
        """Set what the floor server sends as its answer, and the statement that it runs before."""
        setup = {"statement": statement, "parameters": parameters, "answer": answer.decode()}
        self.floor.ask(http_request("POST", "/setup", setup))

    @contextmanager
    def temporary_events(self) -> Iterator[sqlite3.Connection]:
        """Yield a connection that writes. After the block, delete all events that it or the server stored meanwhile."""
        with closing(connect(str(self.db), WRITER_PRAGMAS)) as conn:
            yield conn
        # Close the connection first: otherwise its cache would be warm in the next round, unlike the server's.
        with closing(connect(str(self.db), WRITER_PRAGMAS)) as conn:
            conn.execute("DELETE FROM events WHERE seq > ?", [self.size])
            conn.execute("PRAGMA wal_checkpoint(TRUNCATE)")
