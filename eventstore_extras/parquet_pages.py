"""Reads the sizes of a Parquet file's pages: the library decodes whole pages, and a small file may hold gigabytes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

__all__ = ["PagesError", "largest_pages"]

_MAX_HEADER_BYTES = 64 * 1024  # a header may hold the smallest and the largest value
_HEADER_BYTES = 256  # enough for most
_TEXT_TYPES = (6, 7)  # BYTE_ARRAY and FIXED_LEN_BYTE_ARRAY; a value of the other types has up to 12 bytes


class PagesError(Exception):
    """The sizes cannot be read: the file is damaged, or parts of it are encrypted."""


class _Compact:
    """Reads Thrift's compact protocol: structs become dicts by field number. Raises IndexError at the end."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.at = 0
        self._readers: dict[int, Callable[[], Any]] = {
            **dict.fromkeys((1, 2, 3), self._byte),  # a boolean in a list, or a byte
            **dict.fromkeys((4, 5, 6), self._zigzag),
            7: lambda: self._bytes(8),
            8: lambda: self._bytes(self._varint()),
            **dict.fromkeys((9, 10), self._list),
            12: self.struct,
        }

    def struct(self) -> dict[int, Any]:
        fields: dict[int, Any] = {}
        number = 0
        while kind := self._byte():
            number = number + (kind >> 4) if kind >> 4 else self._zigzag()
            fields[number] = kind & 15 == 1 if kind & 15 in (1, 2) else self._readers[kind & 15]()
        return fields

    def _list(self) -> list[Any]:
        head = self._byte()
        size = head >> 4 if head >> 4 < 15 else self._varint()
        return [self._readers[head & 15]() for _ in range(size)]

    def _byte(self) -> int:
        self.at += 1
        return self._content[self.at - 1]

    def _bytes(self, size: int) -> bytes:
        self.at += size
        if self.at > len(self._content):
            raise IndexError
        return self._content[self.at - size : self.at]

    def _varint(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 127) << shift
            if byte < 128:
                return value
            shift += 7

    def _zigzag(self) -> int:
        value = self._varint()
        return value >> 1 if value % 2 == 0 else ~(value >> 1)


def _page_header(file: BinaryIO, position: int) -> tuple[dict[int, Any], int]:
    """Return the header that begins there, whose fields 2 and 3 are the page's sizes, and the header's own size."""
    for size in (_HEADER_BYTES, _MAX_HEADER_BYTES):
        file.seek(position)
        reader = _Compact(file.read(size))
        try:
            header = reader.struct()
        except IndexError:  # the header is longer
            continue
        if header[3] < 0:
            break
        return header, reader.at
    raise ValueError("no page header")


def _page_sizes(file: BinaryIO, column: dict[int, Any]) -> Iterator[int]:
    """Yield the uncompressed sizes of a column chunk's pages, by jumping from header to header."""
    # ColumnMetaData: 1 is the type, 7 the compressed size, 9 and 11 are where data and dictionary begin.
    meta = column[3]
    position = min(meta[9], meta.get(11) or meta[9])
    end = position + meta[7]
    while position < end:
        header, header_bytes = _page_header(file, position)
        yield header[2]
        position += header_bytes + header[3]


def largest_pages(file: BinaryIO, footer: bytes) -> tuple[int, int]:
    """Return the largest size of a page, and the sum of the largest of each column of texts or bytes, uncompressed.

    A value may be as long as its page, so a row may take that sum. Raises PagesError.
    """
    largest, texts = 0, Counter[int]()
    try:
        for group in _Compact(footer).struct().get(4, []):
            for number, column in enumerate(group.get(1, [])):
                size = max(_page_sizes(file, column), default=0)
                largest = max(largest, size)
                if column[3][1] in _TEXT_TYPES:
                    texts[number] = max(texts[number], size)
    except (LookupError, TypeError, AttributeError, ValueError, RecursionError) as error:
        raise PagesError from error
    return largest, texts.total()
