"""Simulate power cuts: build what a disk may hold if the power fails at some moment of a run recorded with strace.

A file holds everything that was written to it before its last sync began. Each later write is present, missing or torn
at a multiple of 512 bytes, independently of the others; each later truncation is present or missing. Changes of a
folder's entries (a file created, renamed or removed) are safe once the folder is synced; each later one is present or
missing.
"""

from __future__ import annotations

import os
import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SECTOR_BYTES = 512
FILE_CALLS = ("openat", "pwrite64", "write", "ftruncate", "fsync", "fdatasync", "rename", "unlink")
SOCKET_CALLS = ("writev", "sendto", "sendmsg")  # and write: they tell a client that its events are stored
RECEIVING_CALLS = ("read", "recvfrom", "recvmsg")  # they tell the server that its own request was accepted


def strace(trace: Path) -> list[str]:
    """Return the words to put before a command to record it. strace runs in the background until the command ends."""
    calls = ",".join((*FILE_CALLS, *SOCKET_CALLS, *RECEIVING_CALLS))
    return ["strace", "-D", "-f", "--seccomp-bpf", "-yy", "-xx", "-s", "1000000", "-e", f"trace={calls}",
            "-e", "signal=none", "-o", str(trace)]  # fmt: skip


class Call(NamedTuple):
    begun: int  # line of the trace; other threads may write lines before `done`
    done: int
    name: str
    arguments: str
    result: int
    rest: str  # after the result: the path of a file that was opened


_LINE = re.compile(r"\d+ +(?:<\.\.\. \w+ resumed>(?P<end>.*)|(?P<name>\w+)\((?P<start>.*))", re.DOTALL)
_ENDED = re.compile(r"(.*)\) += (-?\d+)(.*)", re.DOTALL)
_HEX = re.compile(r"(?:\\x[0-9a-f]{2})+")
_WRITE = re.compile(r'(\d+)<(.*?)>, "([^"]*)", \d+(?:, (\d+))?')
_ACCEPTED = "".join(f"\\x{byte:02x}" for byte in b"HTTP/1.1 2")
_PEER = re.compile(r"<TCP:\[.*?->[^\]]*?:(\d+)\]>")


def unhex(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def readable(text: str) -> str:
    return _HEX.sub(lambda match: unhex(match[0]).decode(), text)


def calls_of(trace: Path, first_line: int, from_byte: int) -> list[Call]:
    """Return the calls of the trace from this byte on, ordered by when they began, but openat by when it returned.

    While one thread is in openat, another may write to and close a descriptor whose number openat then returns for
    another file. Ordered by its beginning, openat would claim that write.
    """
    begun: dict[str, tuple[int, str, str]] = {}  # by thread
    calls = []
    with trace.open() as lines:
        lines.seek(from_byte)
        for number, line in enumerate(lines, first_line):
            thread = line.split(" ", 1)[0]
            if not (match := _LINE.match(line)):
                continue
            if match["name"] and "<unfinished ...>" in match["start"]:
                begun[thread] = number, match["name"], match["start"].replace(" <unfinished ...>\n", "")
                continue
            at, name, start = begun.pop(thread, (number, match["name"], ""))
            if ended := _ENDED.match(start + (match["start"] or match["end"])):
                calls.append(Call(at, number, name, ended[1], int(ended[2]), ended[3]))
    return sorted(calls, key=lambda call: call.done if call.name == "openat" else call.begun)


class Write(NamedTuple):
    offset: int
    data: bytes

    def apply(self, content: bytearray) -> None:
        content.extend(bytes(max(self.offset - len(content), 0)))
        content[self.offset : self.offset + len(self.data)] = self.data

    def torn(self, choose: random.Random) -> Write:
        """Return the part of this write before, or after, a sector boundary within it."""
        edges = range(-self.offset % SECTOR_BYTES, len(self.data), SECTOR_BYTES)
        edge = choose.choice(edges or [0])
        return choose.choice([Write(self.offset, self.data[:edge]), Write(self.offset + edge, self.data[edge:])])


class Truncation(NamedTuple):
    size: int

    def apply(self, content: bytearray) -> None:
        del content[self.size :]
        content.extend(bytes(self.size - len(content)))

    def torn(self, choose: random.Random) -> Truncation:
        return self


class Entry(NamedTuple):
    """A change of a folder: the name now leads to a file (created, or renamed from another name) or was removed."""

    name: str
    file: int | None
    old_name: str = ""

    def apply(self, entries: dict[str, int]) -> None:
        entries.pop(self.old_name, None)
        entries.pop(self.name, None)
        if self.file is not None:
            entries[self.name] = self.file


Change = Write | Truncation | Entry


def change_entries(entries: dict[str, int], change: Change | None) -> None:
    assert isinstance(change, Entry)
    change.apply(entries)


def change_content(content: bytearray, change: Change | None, torn_by: random.Random | None = None) -> None:
    """Apply a change to a file's content, or only the part that reaches the disk if the write is torn."""
    assert isinstance(change, (Write, Truncation))
    (change.torn(torn_by) if torn_by else change).apply(content)


class Step(NamedTuple):
    """What a run did at a line of the trace: change a file or the folder, end a sync, or send or receive an answer."""

    line: int
    done: int  # the line at which the call returned; a sync that begins later covers it
    file: int | None  # None for the folder
    change: Change | None = None
    synced_from: int = -1  # the line at which the sync that ends here began
    answered: int = -1  # the port of a client that is sent a 2xx, or of a server that has sent one


class Recording:
    """The steps of consecutive runs on the files of one folder, which was empty before the first run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[Step] = []
        self._lines = 0
        self._starts: list[int] = []  # the first line of each run
        self._live: dict[str, int] = {}  # name -> file, as the system sees it
        self._sizes: dict[int, int] = defaultdict(int)
        self._offsets: dict[int, int] = {}  # by descriptor: where the next write() starts
        self._files = 0

    def add(self, trace: Path, from_byte: int = 0) -> None:
        """Add a run that has ended. Its trace begins at this byte, perhaps within a line of the process before."""
        self._starts.append(self._lines)
        for call in calls_of(trace, self._lines, from_byte):
            self._lines = max(self._lines, call.done)
            if "<TCP:" in call.arguments or call.name in RECEIVING_CALLS:
                if _ACCEPTED in call.arguments and (peer := _PEER.search(call.arguments)):
                    line = call.done if call.name in RECEIVING_CALLS else call.begun
                    self.steps.append(Step(line, call.done, None, answered=int(peer[1])))
            elif call.result >= 0 and call.name in FILE_CALLS and "(deleted)" not in call.arguments:
                getattr(self, f"_{call.name}")(call)
        self._lines += 1
        self.steps.sort(key=lambda step: step.line)

    def _name(self, path: str) -> str | None:
        """Return the name of a file in the folder, else None.

        SQLite's -shm file is ignored, because it does not survive a power cut.
        """
        folder, name = os.path.split(os.path.join(self.folder, readable(path)))
        return name if folder == str(self.folder) and not name.endswith("-shm") else None

    def _change(self, call: Call, file: int | None, change: Change) -> None:
        self.steps.append(Step(call.begun, call.done, file, change))

    def _openat(self, call: Call) -> None:
        path, flags = re.findall(r', "([^"]*)", ([A-Z_|]+)', call.arguments)[0]
        if (name := self._name(path)) is None:
            return
        self._offsets[call.result] = 0
        if name not in self._live and "O_CREAT" in flags:
            self._files += 1
            self._live[name] = self._files
            self._change(call, None, Entry(name, self._files))
        if name in self._live and "O_TRUNC" in flags:
            self._truncate(call, self._live[name], 0)
        if name in self._live and "O_APPEND" in flags:
            self._offsets[call.result] = self._sizes[self._live[name]]

    def _pwrite64(self, call: Call) -> None:
        match = _WRITE.fullmatch(call.arguments)
        assert match, call
        descriptor, path, data, offset = match.groups()
        if (file := self._live.get(self._name(path) or "")) is not None:
            at = self._offsets[int(descriptor)] if offset is None else int(offset)
            written = unhex(data)[: call.result]
            self._change(call, file, Write(at, written))
            self._sizes[file] = max(self._sizes[file], at + len(written))
            if offset is None:  # pwrite64 does not move the descriptor's offset
                self._offsets[int(descriptor)] = at + len(written)

    _write = _pwrite64

    def _ftruncate(self, call: Call) -> None:
        ((path, size),) = re.findall(r"^\d+<(.*?)>, (\d+)$", call.arguments)
        if (file := self._live.get(self._name(path) or "")) is not None:
            self._truncate(call, file, int(size))

    def _truncate(self, call: Call, file: int, size: int) -> None:
        self._change(call, file, Truncation(size))
        self._sizes[file] = size

    def _fsync(self, call: Call) -> None:
        (path,) = re.findall(r"^\d+<(.*?)>$", call.arguments)
        file = self._live.get(self._name(path) or "")
        if file is not None or Path(readable(path)) == self.folder:
            self.steps.append(Step(call.done, call.done, file, synced_from=call.begun))

    _fdatasync = _fsync

    def _rename(self, call: Call) -> None:
        old_name, name = (self._name(path) for path in re.findall(r'"([^"]*)"', call.arguments))
        if old_name in self._live and name:
            self._live[name] = self._live.pop(old_name)
            self._change(call, None, Entry(name, self._live[name], old_name))

    def _unlink(self, call: Call) -> None:
        name = self._name(re.findall(r'"([^"]*)"', call.arguments)[0])
        if name and self._live.pop(name, None) is not None:
            self._change(call, None, Entry(name, None))

    def files(self) -> dict[str, bytes]:
        """Return the folder's files after all recorded calls. If this model is right, they equal the real files."""
        disk = Disk()
        for step in self.steps:
            disk.take(step)
        return disk.files()

    def disks(self, cuts: int, choose: random.Random) -> Iterator[Disk]:
        """Yield the disk at the moment of each cut, in the order of time.

        Half of the cuts come right after an answer, if there are any: then the server has promised most. The others come
        at any step.
        """
        answers = [number + 1 for number, step in enumerate(self.steps) if step.answered >= 0]
        moments = [choose.choice(answers) for _ in range(cuts // 2)] if answers else []
        moments += [choose.randrange(len(self.steps) + 1) for _ in range(cuts - len(moments))]
        disk, at = Disk(), 0
        for number, moment in enumerate(sorted(moments)):
            for step in self.steps[at:moment]:
                disk.take(step)
            at = moment
            disk.number = number
            disk.run = sum(start < self.steps[max(at - 1, 0)].line for start in self._starts) - 1
            yield disk


class Disk:
    """The contents that are safely on the disk, and the changes that are not synced yet."""

    def __init__(self) -> None:
        self.number = 0  # number of the cut
        self.run = 0  # number of the run under way
        self.answers: dict[int, int] = defaultdict(int)  # by port: the 2xx answers sent to it, or by it
        self._contents: dict[int, bytearray] = defaultdict(bytearray)
        self._entries: dict[str, int] = {}
        self._pending: dict[int | None, list[Step]] = defaultdict(list)

    def take(self, step: Step) -> None:
        if step.answered >= 0:
            self.answers[step.answered] += 1
        elif step.change:
            self._pending[step.file].append(step)
        else:
            later = []
            for pending in self._pending[step.file]:
                if pending.done >= step.synced_from:
                    later.append(pending)
                elif step.file is None:
                    change_entries(self._entries, pending.change)
                else:
                    change_content(self._contents[step.file], pending.change)
            self._pending[step.file] = later

    def files(self) -> dict[str, bytes]:
        """Return every file with all changes, synced or not."""
        entries = dict(self._entries)
        for step in self._pending[None]:
            change_entries(entries, step.change)
        files = {}
        for name, file in entries.items():
            content = bytearray(self._contents[file])
            for step in self._pending[file]:
                change_content(content, step.change)
            files[name] = bytes(content)
        return files

    def write_to(self, folder: Path, choose: random.Random) -> None:
        """Write the files that may remain if the power fails now."""
        share = choose.choice([0, 0.5, 0.9, 1])  # of the changes that were not synced but reach the disk
        entries = dict(self._entries)
        for step in self._pending[None]:
            if choose.random() < share:
                change_entries(entries, step.change)
        for name, file in entries.items():
            content = bytearray(self._contents[file])
            for step in self._pending[file]:
                if choose.random() < share:
                    change_content(content, step.change)
                elif choose.random() < 0.5:
                    change_content(content, step.change, torn_by=choose)
            (folder / name).write_bytes(content)
