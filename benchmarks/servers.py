"""The server processes of the benchmarks."""

from __future__ import annotations

import http.client
import math
import re
import socket
import subprocess
import sys
import time
from pathlib import Path

import eventstore
from benchmarks.events import ENVIRONMENT, KEY, http_request

__all__ = ["CLONE", "Server", "aging_server", "floor_server", "our_server", "serve_flags", "trusting_server"]

CLONE = Path(eventstore.__file__).resolve().parent  # the code to measure, unless another clone is named


class Server:
    """A context manager for a server process. The constructor returns once the server answers GET /health."""

    def __init__(self, *command: object, clone: Path = CLONE) -> None:
        start = time.perf_counter()
        words = [sys.executable, *map(str, command)]
        self.process = subprocess.Popen(words, cwd=clone, stdout=subprocess.PIPE, text=True)  # Python looks there first
        try:
            banner = iter(self.process.stdout or ())
            found = next(filter(None, (re.search(r"http://127.0.0.1:(\d+)", line) for line in banner)), None)
            if found is None:
                raise RuntimeError(f"{command[0]} ended before it listened")
            self.port = int(found[1])
            self.ask(http_request("GET", "/health"))
        except BaseException:
            self.__exit__()
            raise
        self.start_up_s = time.perf_counter() - start

    def ask(self, request: bytes) -> bytes:
        """Send one request and return the body of its answer. Raises RuntimeError if the server refuses it."""
        with socket.create_connection(("127.0.0.1", self.port), timeout=600) as sock:
            sock.sendall(request)
            answer = http.client.HTTPResponse(sock)
            answer.begin()
            body = answer.read()
        if answer.status not in (200, 201, 202):
            raise RuntimeError(f"answered {answer.status} {body[:500]!r} to {request[:200]!r}")
        return body

    @property
    def rss_mb(self) -> float:
        command = ["ps", "-o", "rss=", "-p", str(self.process.pid)]
        status = Path(f"/proc/{self.process.pid}/status")
        text = status.read_text() if status.exists() else subprocess.check_output(command, text=True)
        found = re.search(r"VmRSS:\s*(\d+)", text) or re.search(r"(\d+)", text)
        return int(found[1]) / 1024 if found else math.nan

    @property
    def handles(self) -> float:
        """The number of open files and sockets; nan on a system without /proc."""
        folder = Path(f"/proc/{self.process.pid}/fd")
        return len(list(folder.iterdir())) if folder.exists() else math.nan

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        try:
            self.process.wait(30)
        finally:
            self.process.kill()
            if self.process.stdout:
                self.process.stdout.close()


def serve_flags(db: Path, *flags: object) -> list[str]:
    return list(map(str, ("serve", "--port", 0, "--db", db, "--api-key", f"{KEY}={ENVIRONMENT}", *flags)))


def our_server(db: Path, *flags: object, clone: Path = CLONE) -> Server:
    return Server(clone / "eventstore.py", *serve_flags(db, *flags), clone=clone)


def aging_server(db: Path, *flags: object) -> Server:
    """Start a server whose clock runs through a day in a minute."""
    return Server("-m", "benchmarks.aging", *serve_flags(db, "--log-level", "error", *flags))


def trusting_server(db: Path, *flags: object, clone: Path = CLONE) -> Server:
    """Start our server, whose retention may delete most of the file at the start."""
    code = "import sys, eventstore; from eventstore_extras import retention; "
    return Server(
        "-c",
        code + "retention.MOST_AT_ONCE = 10**9; sys.exit(eventstore.main())",
        *serve_flags(db, *flags),
        clone=clone,
    )


def floor_server(db: Path) -> Server:
    """Start the server whose speed is the floor for ours."""
    return Server("-m", "benchmarks.floor", db)
