"""Read the events of text files: NDJSON, JSON text sequences, JSON documents and CSV, in bounded memory."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from itertools import islice

import msgspec
from msgspec import Raw

from eventstore import MEMBERS, plural, quoted
from eventstore_extras.entries import Entry, InputError, check_columns, csv_values, no_events
from eventstore_extras.files import LineReader, Stream

__all__ = ["check_format", "check_known", "detect_format", "read_csv", "read_json", "read_ndjson"]

# ---------------------------------------------------------------------------------------------- which format

_NAMES = {"ndjson": "NDJSON", "json": "JSON", "csv": "CSV", "parquet": "Parquet"}
_UNPACK = "unpack it first, or compress it with gzip"
_OTHER_FORMATS = {  # the first bytes of files that are often mistaken for text
    b"PK\x03\x04": "is a zip archive or a spreadsheet: unpack it, or save it as CSV",
    b"\xd0\xcf\x11\xe0": "is a spreadsheet or another Office file: save it as CSV",
    b"\x28\xb5\x2f\xfd": f"is compressed with Zstandard: {_UNPACK}",
    b"\xfd7zXZ": f"is compressed with xz: {_UNPACK}",
    b"BZh": f"is compressed with bzip2: {_UNPACK}",
    b"SQLite format 3\x00": "is a SQLite database: export its events with eventstore export --db, import the result",
    b"ARROW1": "is an Arrow file: write it as Parquet",
    b"Obj\x01": "is an Avro file: write it as Parquet or NDJSON",
}
_JSON_START = re.compile(  # an array, unlike a line of a log or a TOML file; a bulk body; an answer of the API
    rb'\s*(\[\s*([\[\]{"]|null|true|false|[\d.eE+-]+\s*[,\]]|$)'
    rb'|\{\s*"(events"\s*:|event"\s*:\s*\{|has_more"|debug_tracker"))'
)
_RECORD_SEPARATOR = b"\x1e"  # before each record of a JSON text sequence (RFC 7464)


def check_known(head: bytes) -> None:
    """Raise InputError if a file starts like one of another format."""
    for start, problem in _OTHER_FORMATS.items():
        if head.startswith(start):
            raise InputError(None, problem, "")


def detect_format(head: bytes) -> str:
    """Name the format of a file by its first bytes."""
    if head.startswith((b"PAR1", b"PARE")):  # PARE marks an encrypted file
        return "parquet"
    if _JSON_START.match(head):
        return "json"
    return "ndjson" if head.lstrip()[:1] in (b"{", b"", _RECORD_SEPARATOR) else "csv"


def check_format(form: str, head: bytes, may_start_badly: bool) -> None:
    """Raise InputError if a file that starts like this certainly has another format than --format says.

    NDJSON may start badly with --skip-invalid: the first line may be rubbish, and others good.
    """
    looks_like, line = detect_format(head), head.strip().partition(b"\n")[0]
    if looks_like == form or not line:
        return
    if (form, looks_like) == ("json", "ndjson"):  # the first line may also be a document, or its beginning
        try:
            names = MEMBERS.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return
        if names.keys() & {"event", "events"}:
            return
    is_known = looks_like != "csv" or re.search(rb'(^|,)"?event_name"?\s*(,|$)', line)
    if may_start_badly and not is_known:
        return
    shown = _NAMES[looks_like] if is_known else "no file of events"
    start = quoted(line[:40].decode(errors="replace"))
    advice = f"leave out --format, or give --format {looks_like}" if is_known else "name a file of events"
    raise InputError(None, f"--format is {form}, but it looks like {shown}: it starts {start}", advice)


def _line_end(stream: Stream) -> bytes:
    """Return the byte that ends a line: a carriage return if the start of the file lacks line feeds."""
    head = stream.peek(1)
    return b"\r" if b"\n" not in head and re.search(rb"\r.", head, re.DOTALL) else b"\n"


# ---------------------------------------------------------------------------------------------- NDJSON

_LINE_OVERHEAD_BYTES = 1024  # an exported line names every field: it may be longer than the event that was sent
_MANY_BLANK = 1000  # after this many blank lines, skip the empty ones that follow without reading each
_MAX_BLANK = 2_000_000  # lines of white space, records, or rows of commas, one after another; a spreadsheet has fewer


def _check_blank(blank: int, line: int | None, unit: str, place: str = "") -> None:
    """Raise InputError at the first blank line, record or row too many: a small compressed file may have billions."""
    if blank > _MAX_BLANK:
        before = f"{place}is blank like the {plural(_MAX_BLANK, unit)} before it"
        raise InputError(line, f"{before}: is this a file of events?")


def read_ndjson(stream: Stream, limit_bytes: int) -> Iterator[Entry]:
    """Yield an event per line, or per record of a JSON text sequence."""
    is_sequence = stream.peek(1).lstrip().startswith(_RECORD_SEPARATOR)
    lines = LineReader(
        stream, limit_bytes + _LINE_OVERHEAD_BYTES, _RECORD_SEPARATOR if is_sequence else _line_end(stream)
    )
    blank = 0
    while True:
        line, is_whole = lines.line()
        if not line:
            return
        content = line.strip(_RECORD_SEPARATOR + b" \t\r\n") if is_sequence else line.strip()
        # The first record separator is before the first record.
        number, unit = (lines.number - 1, "row") if is_sequence else (lines.number, "line")
        blank = 0 if content else blank + 1
        _check_blank(blank, None if is_sequence else number, unit, f"row {number}: " if is_sequence else "")
        if not is_whole:
            yield Entry(number, line[:1000], f"is longer than {limit_bytes} bytes", unit=unit)
        elif content:
            problem = "is a lone {: put each event on one line" if content == b"{" else ""
            yield Entry(number, content, problem, unit=unit)
        elif blank % _MANY_BLANK == 0:
            lines.skip_blank()


# ---------------------------------------------------------------------------------------------- JSON

_BUFFER_BYTES = 1024 * 1024
_MAX_VALUE_BYTES = 256 * 1024 * 1024  # of one value in a JSON document, which is held in memory
_NO_EVENTS = 'must be an array of events, or {"events": [...]}'
_SPACE = re.compile(rb"[ \t\r\n]*")
_ANY = msgspec.json.Decoder(Raw)
_KEY = msgspec.json.Decoder(str)


class _JsonText:
    """JSON that is read as it arrives. Methods take (consume) the text that they return or yield."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._text = b""
        self._at = 0  # where the rest of the text begins
        self._line = 1
        self._is_whole = False  # the stream has ended

    def events(self) -> Iterator[tuple[int, bytes]]:
        """Yield each event with the number of its line."""
        while byte := self._next_byte():
            if byte == b"[":
                yield from self._elements()
                if self._next_byte():
                    raise self._error("trailing characters")
            elif byte == b"{":
                yield from self._events_of_object()
            else:
                raise InputError(None, _NO_EVENTS)

    def _events_of_object(self) -> Iterator[tuple[int, bytes]]:
        """Yield the events of a bulk body, a page of a query, or a lookup's answer. Other members are ignored."""
        single: list[tuple[int, bytes]] = []
        has_events = False
        for _ in self._members(b"{", b"}"):
            key = self._key()
            byte, line = self._next_byte(), self._line
            if key == "events" and byte == b"[":
                has_events = True
                yield from self._elements()
                continue
            value = self._value()
            if key == "events" and value != b"null":
                raise InputError(None, _NO_EVENTS)
            if key == "event":
                single = [(line, value)]
        if not has_events and not single:
            raise InputError(None, _NO_EVENTS)
        if not has_events:  # some servers answer a lookup with `event` and with `events`
            yield from single

    def _elements(self) -> Iterator[tuple[int, bytes]]:
        for _ in self._members(b"[", b"]"):
            self._next_byte()
            yield self._line, self._value()

    def _members(self, opening: bytes, closing: bytes) -> Iterator[None]:
        """Take an array or an object. Yields before each member, which the caller must take."""
        self._expect(opening)
        is_empty = self._next_byte() == closing
        while not is_empty:
            yield
            if self._next_byte() == closing:
                break
            self._expect(b",", closing)
            if self._next_byte() == closing:
                raise self._error(f"trailing comma in {'array' if closing == b']' else 'object'}")
        self._expect(closing)

    def _key(self) -> str:
        if self._next_byte() != b'"':
            raise self._error("expected a name in quotes")
        try:
            key = _KEY.decode(self._value())
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise self._error(str(error)) from error
        self._expect(b":")
        return key

    def _value(self) -> bytes:
        """Take a value. Raises InputError if it is cut off, not JSON, or too long."""
        while True:
            try:
                _ANY.decode(memoryview(self._text)[self._at :])
                size, reason = len(self._text) - self._at, ""
                value = self._text[self._at :].rstrip()
                if len(value) < size or value.endswith((b"}", b"]", b'"')):  # otherwise a number may continue
                    return self._take(len(value))
            except RecursionError:
                raise InputError(None, "is nested too deep") from None
            except msgspec.DecodeError as error:
                reason = str(error).removeprefix("JSON is malformed: ")
                found = re.fullmatch(r"(.*) \(byte (\d+)\)", reason)
                reason, size = (found[1], int(found[2])) if found else ("truncated", 0)
            if reason == "trailing characters":
                return self._take(size - 1).rstrip()  # msgspec counts bytes from 1
            is_known = reason and "truncated" not in reason and self._at + size < len(self._text)
            if is_known or not self._read_more():
                if not reason:
                    return self._take(size).rstrip()
                raise self._error(reason, size)

    def _expect(self, byte: bytes, closing: bytes = b"") -> None:
        if self._next_byte() != byte:
            other = f" or '{closing.decode()}'" if closing else ""
            raise self._error(f"expected '{byte.decode()}'{other}")
        self._take(1)

    def _next_byte(self) -> bytes:
        """Take white space and return the byte after it, b"" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            if space and space.end() > self._at:
                self._take(space.end() - self._at)
            if self._at < len(self._text) or not self._read_more():
                return self._text[self._at : self._at + 1]

    def _take(self, size: int) -> bytes:
        taken = self._text[self._at : self._at + size]
        self._at += size
        self._line += taken.count(b"\n")
        return taken

    def _read_more(self) -> bool:
        """Read at least as much as the buffer has: each call decodes an unfinished value anew. False at the end."""
        rest = self._text[self._at :]
        if len(rest) > _MAX_VALUE_BYTES:
            raise InputError(self._line, f"a value is longer than {_MAX_VALUE_BYTES >> 20} MB")
        more = self._stream.read(max(_BUFFER_BYTES, min(len(rest), _MAX_VALUE_BYTES - len(rest))))
        self._text, self._at, self._is_whole = rest + more, 0, not more
        return bool(more)

    def _error(self, reason: str, at: int = 0) -> InputError:
        line = self._line + self._text.count(b"\n", self._at, self._at + at)
        if self._is_whole and ("truncated" in reason or self._at == len(self._text)):
            line = self._line + self._text.count(b"\n", self._at)
            return InputError(line, "the file ends inside the array: it is not whole")
        return InputError(line, f"is not valid JSON: JSON is malformed: {reason}")


def read_json(stream: Stream, limit_bytes: int) -> Iterator[Entry]:
    """Yield the elements of an array, or the events of an object or of several, such as a query's pages.

    Yields the events before a part that is not JSON, then raises InputError.
    """
    for index, (line, content) in enumerate(_JsonText(stream).events()):
        is_long = len(content) > limit_bytes + _LINE_OVERHEAD_BYTES
        yield Entry(line, content, f"is longer than {limit_bytes} bytes" if is_long else "", index)


# ---------------------------------------------------------------------------------------------- CSV

_MAX_CELLS = 10_000
_MAX_ROW_LINES = 1_000_000  # in quotes
_CELL = re.compile(rb',("(?:[^"]++|"")*+"?)?')  # the comma before a cell, and its text if it is in quotes
_REST_OF_CELL = re.compile(rb'(?:[^"]++|"")*+"?')  # in quotes that were opened in a line before


def _csv_problem(reason: str) -> str:
    if "end of data" in reason:
        return "a quote opens here and is never closed"
    if "new-line" in reason:
        return "a carriage return is neither in quotes nor at the end of a line: let all lines end in a line feed"
    return reason


def _without_blank_end(cells: list[str], least: int) -> list[str]:
    """Remove blank cells from the end of a row until `least` are left: tables often end in empty columns."""
    while len(cells) > least and not cells[-1].strip():
        cells.pop()
    return cells


def _csv_entry(line: int, columns: list[str], cells: list[str]) -> Entry:
    cells = _without_blank_end(cells, len(columns))
    unnamed = [at for at, name in enumerate(columns) if not name.strip()]
    problem = ""
    if len(cells) != len(columns):
        problem = f"has {plural(len(cells), 'cell')}, the header has {len(columns)}"
    elif filled := [at for at in unnamed if cells[at].strip()]:
        problem = f"has a value in column {filled[0] + 1}, which the header does not name"
    if problem:
        return Entry(line, {str(number): cell for number, cell in enumerate(cells)}, problem)
    values = csv_values(columns, cells)
    return Entry(line, {name: cell for name, cell in values.items() if name.strip()} if unnamed else values)


def _cells_in(line: bytes, is_first: bool) -> int:
    """Count the cells that begin in a line, up to one more than the limit."""
    if is_first:
        found = _CELL.finditer(b"," + line)
    else:
        rest = _REST_OF_CELL.match(line)
        found = _CELL.finditer(line, rest.end() if rest else 0)
    return sum(1 for _ in islice(found, _MAX_CELLS + 1))


class _CsvLines:
    """The lines of a CSV file, for csv.reader. Bounds the bytes and the cells of a row, which may have many lines."""

    def __init__(self, stream: Stream, limit_bytes: int) -> None:
        self._lines = LineReader(stream, limit_bytes, _line_end(stream))
        self._limit_bytes = limit_bytes
        self.begin_row()

    def begin_row(self) -> None:
        self.row_line = self._lines.number + 1  # where the row begins
        self._row_lines = self._bytes = self._commas = self._cells = 0

    def __iter__(self) -> _CsvLines:
        return self

    def __next__(self) -> str:
        line, is_whole = self._next_line()
        if not line:
            raise StopIteration
        is_first = not self._bytes
        if is_first:
            self.row_line = self._lines.number
        self._bytes += len(line)
        if not is_whole or self._bytes > self._limit_bytes:
            raise InputError(self.row_line, f"is longer than {self._limit_bytes} bytes")
        self._row_lines += 1
        if self._row_lines > _MAX_ROW_LINES:
            raise InputError(self.row_line, f"has more than {_MAX_ROW_LINES} lines")
        self._commas += line.count(b",")
        if self._commas >= _MAX_CELLS:  # most commas may be in quotes: count those between cells
            self._cells += _cells_in(line, is_first)
            if self._cells > _MAX_CELLS:
                raise InputError(self.row_line, f"has more than {_MAX_CELLS} cells")
        return line.decode(errors="surrogateescape")

    def _next_line(self) -> tuple[bytes, bool]:
        """Return the next line. Skips empty lines between rows."""
        blank = 0
        while True:
            line, is_whole = self._lines.line()
            if self._bytes or line.strip(b"\r\n") or not line:
                return line, is_whole
            blank += 1
            if blank >= _MANY_BLANK:
                self._lines.skip_blank()


def read_csv(stream: Stream, limit_bytes: int) -> Iterator[Entry]:
    """Yield the rows of a CSV file without the cells that are empty or NULL. Blank rows are skipped."""
    csv.field_size_limit(limit_bytes)
    first_line = stream.peek(1).strip().partition(b"\n")[0]
    lines = _CsvLines(stream, 2 * limit_bytes)  # a cell's quotes are doubled
    reader = csv.reader(lines, strict=True)
    columns: list[str] = []
    blank = 0
    while True:
        lines.begin_row()
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if not columns and b"event_name" not in first_line:
                raise no_events(lines.row_line, first_line[:40].decode(errors="replace")) from error
            # An open quote includes the lines that follow, so none of them can be read.
            raise InputError(lines.row_line, f"cannot be read as CSV: {_csv_problem(str(error))}") from error
        if cells is None:
            return
        if not any(map(str.strip, cells)):
            blank += 1
            _check_blank(blank, lines.row_line, "row")
            continue
        blank = 0
        if columns:
            yield _csv_entry(lines.row_line, columns, cells)
        else:
            columns = _without_blank_end(cells, 0)
            check_columns([name for name in columns if name.strip()], lines.row_line)
