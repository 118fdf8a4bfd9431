"""Start servers and commands without starting Python: fork them from a process that has imported everything.

Importing takes a quarter of a second of CPU time, and the slow tests start hundreds of processes.
"""

from __future__ import annotations

import functools
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).resolve().parent.parent
MAIN = "import sys, eventstore; sys.exit(eventstore.main())"

# Forks for each piece of code that it receives, and answers with the process id. The files it receives with the code
# become the new process's standard input, output and errors, then its descriptors 3 and up. For a process id it answers
# with the exit status, or null while the process runs. When the tests end, even if they are killed, it kills the
# processes that a failed test left behind, and ends.
_TEMPLATE = """if True:
    import gc, importlib, json, os, socket, sys
    sys.path.insert(0, sys.argv[1])
    import anyio._backends._asyncio, encodings.idna, eventstore, httpcore, httpx, uvloop
    import uvicorn.protocols.http.httptools_impl
    for name in ("analytics", "connections", "forward", "keys", "logs", "mock", "retention", "serving",
                 "backup", "exporting", "importing", "text_formats"):
        importlib.import_module(f"eventstore_extras.{name}")
    gc.freeze()  # otherwise each process would collect these objects when it ends, and copy their memory: 0.13 s
    tests, running = socket.socket(fileno=int(sys.argv[2])), set()
    while True:
        message, files, *_ = socket.recv_fds(tests, 1 << 18, 9)
        if not message:
            for pid in running:
                os.kill(pid, 9)
            os._exit(0)
        asked = json.loads(message)
        if isinstance(asked, int):
            pid, status = os.waitpid(asked, os.WNOHANG)
            running.discard(pid)
            tests.send(json.dumps(os.waitstatus_to_exitcode(status) if pid else None).encode())
        elif (pid := os.fork()) == 0:
            tests.close()
            for number, file in enumerate(files):
                os.dup2(file, number)
                os.close(file)
            os.chdir(asked["folder"])
            os.environ.clear()
            os.environ.update(asked["environ"])
            sys.argv = ["eventstore", *asked["arguments"]]
            exec(asked["code"], {})
            sys.exit()
        else:
            running.add(pid)
            for file in files:
                os.close(file)
            tests.send(b"%d" % pid)
"""


class Template:
    """A process that has imported everything, to be forked. The words of `prefix` start it, such as those of strace."""

    def __init__(self, *prefix: str) -> None:
        self._connection, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._turn = threading.Lock()
        with theirs:
            command = [*prefix, sys.executable, "-c", _TEMPLATE, str(ROOT), str(theirs.fileno())]
            self._process = subprocess.Popen(  # Ctrl-C ends the tests alone, which then stop their servers
                command, pass_fds=[theirs.fileno()], stdout=subprocess.DEVNULL, process_group=0
            )

    def ask(self, question: object, files: Sequence[int] = ()) -> Any:
        with self._turn:
            socket.send_fds(self._connection, [json.dumps(question).encode()], files)
            return json.loads(self._connection.recv(100))

    def close(self) -> None:
        self._connection.close()
        self._process.wait()


@functools.cache
def _default_template() -> Template:
    return Template()


class ForkedProcess:
    """Python code in a forked process, with the methods of subprocess.Popen that tests use."""

    def __init__(
        self,
        arguments: Sequence[str],
        folder: Path,
        files: Sequence[int],
        environ: dict[str, str],
        code: str = MAIN,
        template: Template | None = None,
    ) -> None:
        asked = {"arguments": arguments, "folder": str(folder.resolve()), "environ": environ, "code": code}
        self._template = template or _default_template()
        self.pid: int = self._template.ask(asked, files)
        self._status: int | None = None

    def poll(self) -> int | None:
        """Return the exit status, negative for a signal, or None while the process runs."""
        if self._status is None:
            self._status = self._template.ask(self.pid)
        return self._status

    def wait(self, timeout: float = 60) -> int:
        if self.poll() is None:
            ended = os.pidfd_open(self.pid)
            poll = select.poll()
            poll.register(ended, select.POLLIN)
            has_ended = poll.poll(timeout * 1000)
            os.close(ended)
            if not has_ended:
                raise subprocess.TimeoutExpired(["eventstore"], timeout)
        while (status := self.poll()) is None:  # strace may see the end first
            pass
        return status

    def send_signal(self, number: int) -> None:
        if self.poll() is None:  # afterwards another process may have the id
            os.kill(self.pid, number)

    def terminate(self) -> None:
        self.send_signal(signal.SIGTERM)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def start(
    folder: Path,
    arguments: Sequence[str],
    files: Sequence[int],
    environ: Mapping[str, str],
    code: str = MAIN,
    template: Template | None = None,
) -> subprocess.Popen[bytes] | ForkedProcess:
    """Start `eventstore`, or other code, with these files as its standard input, output and errors."""
    environ = os.environ | environ
    if sys.platform == "linux":
        return ForkedProcess(arguments, folder, files, environ, code, template)
    return subprocess.Popen([sys.executable, "-c", code, *arguments], cwd=folder, stdin=files[0], stdout=files[1],
                            stderr=files[2], env=environ | {"PYTHONPATH": str(ROOT)})  # fmt: skip


def changed(module: str, **values: object) -> str:
    """Return code that runs `eventstore` with other values of these names in a module of eventstore_extras."""
    changes = "".join(f"{module}.{name} = {value!r}; " for name, value in values.items())
    return f"import sys, eventstore; from eventstore_extras import {module}; {changes}sys.exit(eventstore.main())"


class Command:
    """A running `eventstore`, or other code, with the folder as its working directory.

    Its standard input is a pipe that holds `given`, at most 64 KiB.
    """

    def __init__(
        self,
        folder: Path,
        *arguments: object,
        code: str = MAIN,
        given: bytes = b"",
        stdout: IO[Any] | None = None,
        template: Template | None = None,
        **environ: str,
    ) -> None:
        self._arguments = [*map(str, arguments)]
        self._output, self._errors = tempfile.TemporaryFile("w+"), tempfile.TemporaryFile("w+")  # noqa: SIM115
        read_end, write_end = os.pipe()
        os.write(write_end, given)
        os.close(write_end)
        files = [read_end, (stdout or self._output).fileno(), self._errors.fileno()]
        self.process = start(folder, self._arguments, files, environ, code, template)
        os.close(read_end)

    def end(self) -> subprocess.CompletedProcess[str]:
        """Wait until the command has ended, for 60 s at most, and return its outcome."""
        try:
            status = self.process.wait(60)
        finally:
            self.process.kill()
        with self._output, self._errors:
            self._output.seek(0)
            self._errors.seek(0)
            return subprocess.CompletedProcess(self._arguments, status, self._output.read(), self._errors.read())


def forked(folder: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    """Run a Command to its end."""
    return Command(folder, *arguments, **options).end()
