"""Start servers without starting Python: fork them from a process that has imported everything.

Importing takes a quarter of a second of CPU time, and the slow tests start hundreds of servers.
"""

from __future__ import annotations

import functools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

# Forks for each list of arguments that it receives, and answers with the process id. For a process id it answers with
# the exit status, or null while the process runs. It ends, and leaves its children alone, when the tests end.
_TEMPLATE = """if True:
    import importlib, json, os, socket, sys
    sys.path.insert(0, sys.argv[1])
    import eventstore
    for name in ("analytics", "connections", "forward", "keys", "logs", "mock", "retention", "serving"):
        importlib.import_module(f"eventstore_extras.{name}")
    tests = socket.socket(fileno=int(sys.argv[2]))
    while True:
        message, files, *_ = socket.recv_fds(tests, 1 << 18, 2)
        if not message:
            os._exit(0)
        asked = json.loads(message)
        if isinstance(asked, int):
            pid, status = os.waitpid(asked, os.WNOHANG)
            tests.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
        elif (pid := os.fork()) == 0:
            tests.close()
            for number, file in enumerate(files, 1):
                os.dup2(file, number)
                os.close(file)
            os.chdir(asked["folder"])
            os.environ.clear()
            os.environ.update(asked["environ"])
            sys.argv = ["eventstore", *asked["arguments"]]
            sys.exit(eventstore.main())
        else:
            for file in files:
                os.close(file)
            tests.send(b"%d" % pid)
"""


@functools.cache
def _template() -> tuple[socket.socket, subprocess.Popen[bytes]]:
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        command = [sys.executable, "-c", _TEMPLATE, str(Path(__file__).parent.parent), str(theirs.fileno())]
        return ours, subprocess.Popen(command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL)


_turn = threading.Lock()


def _ask(question: object, files: Sequence[int] = ()) -> Any:
    connection, _ = _template()
    with _turn:
        socket.send_fds(connection, [json.dumps(question).encode()], files)
        return json.loads(connection.recv(100))


class ForkedServer:
    """What tests use of subprocess.Popen, for `eventstore` in a forked process."""

    def __init__(self, arguments: Sequence[str], folder: Path, log: IO[str], environ: dict[str, str]) -> None:
        read_end, write_end = os.pipe()
        asked = {"arguments": arguments, "folder": str(folder.resolve()), "environ": environ}
        self.pid: int = _ask(asked, [write_end, log.fileno()])
        os.close(write_end)
        self.stdout: IO[str] = os.fdopen(read_end)
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the process runs."""
        if self._status is None:
            self._status = _ask(self.pid)
        return self._status

    def wait(self, timeout: float = 60) -> int:
        deadline = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > deadline:
                raise subprocess.TimeoutExpired(["eventstore"], timeout)
            time.sleep(0.002)
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # afterwards another process may have the id
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)
