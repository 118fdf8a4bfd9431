"""Read files in bounded memory, write files that appear when they are complete, and show progress on a terminal."""

from __future__ import annotations

import codecs
import errno
import glob
import gzip
import importlib.util
import io
import itertools
import json
import os
import re
import secrets
import stat
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import IO, Any, BinaryIO, cast

from eventstore import StartError
from eventstore_extras.job import StopError

__all__ = [
    "LineReader", "Stream", "as_utf8", "check_folder", "explain_missing_parquet", "private_opener", "progress_bar",
    "sync_folder", "unpacked", "whole_file",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- reading

Stream = io.BufferedReader | gzip.GzipFile
_SKIP_BYTES = _PIECE_BYTES = 1024 * 1024
_HEAD_BYTES = 64 * 1024
_SPLIT_BYTES = 16 * 1024  # small, because each line copies the rest of the buffer
_MIN_GZIP_READ_BYTES = 4096  # the gzip module reads headers in smaller pieces, data in larger ones


class _Arriving:
    """A file for GzipFile that returns what a pipe holds, instead of waiting until a whole buffer is full."""

    def __init__(self, file: io.BufferedReader, before_read: Callable[[], object]) -> None:
        self._file = file
        self._before_read = before_read
        self.seek = file.seek

    def read(self, size: int) -> bytes:
        self._before_read()
        is_header = size < _MIN_GZIP_READ_BYTES  # the gzip module needs a whole header
        return self._file.read(size) if is_header else self._file.read1(size)


def unpacked(file: io.BufferedReader, before_read: Callable[[], object] = lambda: None) -> Stream:
    """Return the stream that decompresses a gzipped file, or the file itself if it is not gzipped.

    The stream calls before_read() before it reads each piece of the gzipped file.
    """
    return gzip.GzipFile(fileobj=_Arriving(file, before_read)) if file.peek(2).startswith(b"\x1f\x8b") else file


class _Joined(io.RawIOBase):
    """The bytes of several pieces."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        if not self._rest:
            self._rest = next(filter(None, self._pieces), b"")
        size = min(len(buffer), len(self._rest))
        buffer[:size], self._rest = self._rest[:size], self._rest[size:]
        return size


def as_utf8(stream: Stream) -> io.BufferedReader:
    """Return the text of a stream in UTF-8, without a byte order mark. Reading it may raise UnicodeDecodeError.

    peek() of the new stream returns its first line, or the start of a long one, even if it arrives in pieces.
    """
    read = partial(stream.read1, _PIECE_BYTES)
    head = read()
    while (
        b"\n" not in head and not re.search(rb"\r.", head, re.DOTALL) and len(head) < _HEAD_BYTES and (more := read())
    ):
        head += more
    encoding = json.detect_encoding(head[:4])
    head = head.removeprefix(codecs.BOM_UTF8)
    pieces: Iterator[bytes] = itertools.chain([head], iter(read, b""))
    if not encoding.startswith("utf-8"):
        pieces = map(str.encode, codecs.iterdecode(pieces, encoding))
    return io.BufferedReader(_Joined(pieces), _PIECE_BYTES)


class _Split:
    """Reads lines that end in a byte other than a line feed."""

    def __init__(self, stream: Stream, end: bytes) -> None:
        self._stream = stream
        self._end = end
        self._rest = b""

    def readline(self, size: int) -> bytes:
        pieces = []
        while size and (self._rest or self._fill()):
            end = self._rest.find(self._end, 0, size) + 1 or size
            piece, self._rest = self._rest[:end], self._rest[end:]
            pieces.append(piece)
            size = 0 if piece.endswith(self._end) else size - len(piece)
        return b"".join(pieces)

    def _fill(self) -> bytes:
        self._rest = self._stream.read1(_SPLIT_BYTES)
        return self._rest


class LineReader:
    """Reads lines in bounded memory. They may end in another byte, such as a carriage return."""

    def __init__(self, stream: Stream, limit_bytes: int, end: bytes = b"\n") -> None:
        self.number = 0  # of the line read last, from 1
        self._stream = stream
        self._limit_bytes = limit_bytes
        self._end = end
        self._source = stream if end == b"\n" else _Split(stream, end)

    def line(self) -> tuple[bytes, bool]:
        """Return the next line and True, or the start of a line longer than the limit and False; b"" at the end."""
        line = self._source.readline(self._limit_bytes + 1)
        self.number += 1
        is_whole = len(line) <= self._limit_bytes or line.endswith(self._end)
        rest = b"" if is_whole else b"..."
        while rest and not rest.endswith(self._end):
            rest = self._source.readline(_SKIP_BYTES)
        return line, is_whole

    def skip_blank(self) -> None:
        """Skip empty lines a thousand times as fast as line(). Each call copies the stream's whole buffer."""
        if self._end == b"\n":
            while blank := len(head := self._stream.peek(1)) - len(head.lstrip(b"\r\n")):
                self.number += self._stream.read(blank).count(b"\n")


# ---------------------------------------------------------------------------------------------- writing


def private_opener(path: str, flags: int) -> int:
    """Open a file for open(..., opener=private_opener): a new one can be read by its owner only.

    Raises OSError if the name is a link, unless it is in /dev, such as /dev/stdout: another user may have made the link
    so that this process overwrites another file.
    """
    is_device = os.path.dirname(os.path.abspath(path)) == "/dev"
    try:
        return os.open(path, flags if is_device else flags | getattr(os, "O_NOFOLLOW", 0), 0o600)
    except OSError as error:
        if error.errno == errno.ELOOP:
            raise OSError(error.errno, "it is a link: name the file itself", path) from error
        raise


def _try_lock(file: IO[bytes]) -> bool:
    """Lock a file until it is closed; return False if another process has locked it. Raises OSError."""
    if os.name == "nt":  # Windows does not remove open files
        return True
    import fcntl  # noqa: PLC0415 - not on Windows

    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def check_folder(path: str, prefix: str = "") -> None:
    """Raise StartError, which starts with the prefix, unless files can be created in the folder of this path."""
    folder = os.path.dirname(os.path.abspath(path))
    if not os.path.isdir(folder):
        raise StartError(f"{prefix}the folder {folder} does not exist: make it, or name another file")
    if not os.access(folder, os.W_OK):
        raise StartError(f"{prefix}the folder {folder} cannot be written: allow it, or name another file")


def _temporary_file(path: str | Path) -> BinaryIO:
    """Create a file beside another one, and lock it, so that no other process takes it for a leftover."""
    while True:
        file = open(f"{path}.{secrets.token_hex(8)}.tmp", "xb", opener=private_opener)  # noqa: SIM115 - returned
        with suppress(OSError):  # some file systems cannot lock
            if not _try_lock(file) or not os.fstat(file.fileno()).st_nlink:  # another process took it for a leftover
                file.close()
                continue
        return cast(BinaryIO, file)


def _remove_leftovers(path: Path) -> None:
    """Remove the temporary files of this path whose processes have ended."""
    for name in glob.glob(f"{glob.escape(str(path))}.*.tmp"):
        if re.fullmatch(r"\.[0-9a-f]{16}\.tmp", name.removeprefix(str(path))):
            with suppress(OSError), open(name, "rb", opener=private_opener) as file:
                if os.name == "nt":
                    file.close()
                if _try_lock(file):
                    os.unlink(name)


def _keep_rights(path: str | Path, descriptor: int) -> None:
    """Give a new file the mode, and if possible the owner and the group, of the file that it will replace."""
    with suppress(OSError, AttributeError):  # the file is new, or this is Windows
        before = os.lstat(path)
        for owner in (before.st_uid, -1):
            with suppress(OSError):
                os.fchown(descriptor, owner, before.st_gid)
                break
        mode = stat.S_IMODE(before.st_mode)
        is_other_group = os.fstat(descriptor).st_gid != before.st_gid
        os.fchmod(descriptor, mode & ~stat.S_IRWXG if is_other_group else mode)


def sync_folder(path: str | Path) -> None:
    """Write a file's name to the disk; without this a power cut may undo a rename. Windows cannot and does nothing."""
    with suppress(OSError):
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


@contextmanager
def whole_file(path: str | Path, problem: str, note: str) -> Iterator[BinaryIO]:
    """Open a file for writing; it takes its name, replacing another file, once it is complete and on the disk.

    It keeps the mode of the file that it replaces. Also removes temporary files that killed processes left.
    Raises StopError with problem, reason and note if it cannot be written; a file of that name then stays as it was.
    """
    try:
        _remove_leftovers(Path(path))
        with _temporary_file(path) as file:
            try:
                _keep_rights(path, file.fileno())
                yield file
                file.flush()
                os.fsync(file.fileno())
                if os.name == "nt":  # Windows does not rename open files
                    file.close()
                os.replace(file.name, path)
            finally:
                with suppress(OSError):
                    os.unlink(file.name)
        sync_folder(path)
    except OSError as error:
        raise StopError(f"{problem}: {error.strerror or error}; {note}") from error


# ---------------------------------------------------------------------------------------------- optional libraries


@contextmanager
def progress_bar(
    total: Callable[[], int | None], unit: str, among_data: bool = False
) -> Iterator[Callable[[int], object]]:
    """Provide a function that takes how much has been done since its last call and moves a bar.

    The bar is shown on a terminal where tqdm is installed, unless data goes to the same terminal (among_data).
    """
    if not sys.stderr.isatty() or (among_data and sys.stdout.isatty()) or importlib.util.find_spec("tqdm") is None:
        yield lambda _: None
        return
    from tqdm import tqdm  # type: ignore[import-untyped]  # noqa: PLC0415 - only the extra `cli` has it

    with tqdm(total=total(), unit=unit, unit_scale=True, dynamic_ncols=True, file=sys.stderr) as bar:
        yield bar.update


@contextmanager
def explain_missing_parquet() -> Iterator[None]:
    """Guard the import of the Parquet module. Raises StartError with advice if its library is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        install = f"{sys.executable} -m pip install arro3-core arro3-io (or '.[parquet]' in the clone)"
        raise StartError(f"Parquet needs {(error.name or '').partition('.')[0]}: {install}") from None
