"""Power cuts, simulated: what a disk may hold when the power fails at some moment of a run that strace has recorded.

A file has what was written into it before its last sync began. Of what came later each write is there, missing or torn
at 512 bytes, whatever became of those around it; truncations are there or not. A folder's entries (a file made, renamed
or removed) are safe once the folder is synced; later ones are there or not.
"""

from __future__ import annotations

import random
import re
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

SECTOR_BYTES = 512
FILE_CALLS = ("openat", "pwrite64", "write", "ftruncate", "fsync", "fdatasync", "rename", "unlink")
SOCKET_CALLS = ("writev", "sendto", "sendmsg")  # and write: what tells a client that its events are stored
RECEIVING_CALLS = ("read", "recvfrom", "recvmsg")  # what tells the server that its own request was accepted


def strace(trace: Path) -> list[str]:
    """The command before the command that is to be recorded. It goes on in the background, until that one ends."""
    calls = ",".join((*FILE_CALLS, *SOCKET_CALLS, *RECEIVING_CALLS))
    return ["strace", "-D", "-f", "--seccomp-bpf", "-yy", "-xx", "-s", "1000000", "-e", f"trace={calls}",
            "-e", "signal=none", "-o", str(trace)]  # fmt: skip


class Call(NamedTuple):
    begun: int  # lines of the trace; another thread's calls may lie between them
    done: int
    name: str
    arguments: str
    result: int
    rest: str  # of a result: the path of a file that was opened


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


def calls_of(trace: Path, first_line: int) -> list[Call]:
    """Return the calls that ended, in the order in which they began; openat in the order in which it returned.

    A call that starts during openat may still use the descriptor that openat is about to get: another thread writes to
    it, closes it, and only then openat returns the same number for another file.
    """
    begun: dict[str, tuple[int, str, str]] = {}  # by thread
    calls = []
    with trace.open() as lines:
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
        """What is before, or from, one of the sector's edges within it."""
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
    """A folder's: a name leads to a file (made, or renamed from another), or to none any more (removed)."""

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
    """Apply the change of a file, or the part of it that reaches the disk if it is torn."""
    assert isinstance(change, (Write, Truncation))
    (change.torn(torn_by) if torn_by else change).apply(content)


class Step(NamedTuple):
    """Something that the run did at a line of the trace: it changed a file or the folder, ended a sync or an answer."""

    line: int
    done: int  # a sync that began later covers it
    file: int | None  # None: the folder
    change: Change | None = None
    synced_from: int = -1  # the line at which a sync began that has ended here
    answered: int = -1  # the port of a client that is told 2xx from here on, or of a server that has told it


class Recording:
    """What runs on the files of one folder did, one run after the other. The folder was empty before the first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.steps: list[Step] = []
        self._lines = 0
        self._starts: list[int] = []  # the first line of each run
        self._live: dict[str, int] = {}  # name -> file, as the system sees it
        self._sizes: dict[int, int] = defaultdict(int)
        self._offsets: dict[int, int] = {}  # by descriptor: where write() goes on
        self._files = 0

    def add(self, trace: Path) -> None:
        """Take in the trace of a run that has ended."""
        self._starts.append(self._lines)
        for call in calls_of(trace, self._lines):
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
        """The name of a file of the folder; SQLite's shared memory is none: it does not outlive the system."""
        file = self.folder / readable(path)
        return file.name if file.parent == self.folder and not file.name.endswith("-shm") else None

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
        """Return the folder's files as all recorded calls leave them. They differ from the real ones if this model is
        wrong."""
        disk = Disk()
        for step in self.steps:
            disk.take(step)
        return disk.files()

    def disks(self, cuts: int, choose: random.Random) -> Iterator[Disk]:
        """The disk as it may be after so many cuts, in the order of time: half of them right after an answer, when most
        is claimed and least may be missing, the others anywhere."""
        answers = [number + 1 for number, step in enumerate(self.steps) if step.answered >= 0]
        moments = [choose.choice(answers) for _ in range(cuts // 2)]
        moments += [choose.randrange(len(self.steps) + 1) for _ in range(cuts - cuts // 2)]
        disk, at = Disk(), 0
        for number, moment in enumerate(sorted(moments)):
            for step in self.steps[at:moment]:
                disk.take(step)
            at = moment
            disk.number = number
            disk.run = sum(start < self.steps[max(at - 1, 0)].line for start in self._starts) - 1
            yield disk


class Disk:
    """What the disk has for certain, and what is under way to it."""

    def __init__(self) -> None:
        self.number = 0  # of the cut
        self.run = 0  # which one is under way
        self.answers: dict[int, int] = defaultdict(int)  # how many 2xx each port was told, or told
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
        """Return every file with all that is under way to it."""
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
        """Make the files that are there after the power has failed now."""
        share = choose.choice([0, 0.5, 0.9, 1])  # of what was not synced, and is there
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
