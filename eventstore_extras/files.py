"""Read files in bounded memory, write files that appear when they are complete, and show progress on a terminal."""

from __future__ import annotations

import gzip
import importlib.util
import io
import itertools
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from eventstore import StartError
from eventstore_extras.job import StopError

__all__ = [
    "Stream", "explain_missing_parquet", "numbered_lines", "progress_bar", "sync_folder", "unpacked", "whole_file",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- reading

Stream = io.BufferedReader | gzip.GzipFile
_SKIP_BYTES = 1024 * 1024
_MIN_GZIP_READ_BYTES = 4096  # the gzip module reads heads in smaller pieces, data in larger ones


def unpacked(file: io.BufferedReader) -> Stream:
    """Return the stream that decompresses a gzipped file, or the file itself if it is not gzipped."""
    return gzip.GzipFile(fileobj=_Arriving(file)) if file.peek(2).startswith(b"\x1f\x8b") else file


class _Arriving:
    """A file for GzipFile that returns what a pipe holds, instead of waiting until a whole buffer is full."""

    def __init__(self, file: io.BufferedReader) -> None:
        self._file = file
        self.seek = file.seek

    def read(self, size: int) -> bytes:
        is_head = size < _MIN_GZIP_READ_BYTES  # the gzip module needs all the bytes of a head that it asks for
        return self._file.read(size) if is_head else self._file.read1(size)


def numbered_lines(stream: Stream, limit_bytes: int) -> Iterator[tuple[int, bytes, bool]]:
    """Yield (number from 1, line, True); of a line longer than the limit yield (number, its start, False)."""
    for number in itertools.count(1):
        line = stream.readline(limit_bytes + 1)
        if not line:
            return
        is_whole = len(line) <= limit_bytes or line.endswith(b"\n")
        rest = b"" if is_whole else b"..."
        while rest and not rest.endswith(b"\n"):
            rest = stream.readline(_SKIP_BYTES)
        yield number, line, is_whole


# ---------------------------------------------------------------------------------------------- writing


@contextmanager
def whole_file(path: str | Path, problem: str, note: str) -> Iterator[BinaryIO]:
    """Open a file for writing; it takes its name, replacing another file, once it is complete and on the disk.

    Raises StopError with problem, reason and note if it cannot be written; a file of that name then stays as it was.
    """
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync_folder(path)
    except OSError as error:
        raise StopError(f"{problem}: {error.strerror or error}; {note}") from error
    finally:
        with suppress(OSError):
            os.unlink(temporary)


def sync_folder(path: str | Path) -> None:
    """Write a file's name to the disk; without this a power cut may undo a rename. Windows cannot and does nothing."""
    with suppress(OSError):
        folder = os.open(os.path.dirname(os.path.abspath(path)), os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)


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
