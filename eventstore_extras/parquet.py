"""Read and write events as Parquet. Only the extra `parquet` has the library, so this module is imported on demand.

The library is arro3, Apache's Arrow and Parquet in Rust. It writes rows of any type as JSON, so a file is read as lines
of JSON. Where other libraries raise an exception, it may panic: each call that can panic is guarded below.
"""

from __future__ import annotations

import io
import os
import re
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import chain, repeat
from typing import Any, BinaryIO, cast
from uuid import UUID

import msgspec
from arro3.core import Array, DataType, Field, RecordBatch, RecordBatchReader, Schema, struct_array
from arro3.io import read_parquet, write_ndjson, write_parquet

from eventstore import MAX_PROPERTY_DEPTH, MEMBERS, Row, StartError, decoder_of, quoted
from eventstore_extras.entries import EXPORTED_COLUMNS, PROPERTY_PREFIX, Entry, InputError, TableRow, check_columns
from eventstore_extras.parquet_pages import PagesError, largest_pages

__all__ = ["parquet_writer", "read_rows"]

_UUID = DataType.binary(16)
_UTC_TIME = DataType.timestamp("us", tz="UTC")
_TIMES = ("timestamp", "ingested_at")

# ---------------------------------------------------------------------------------------------- reading: errors

_MAX_REASON_CHARS = 200


def _is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def _reason(error: BaseException) -> str:
    """Return the library's message without the names of its layers."""
    panic = re.search(r'value: .*?\("(.*)"\)', str(error), re.DOTALL) if _is_panic(error) else None
    text = panic[1] if panic else re.sub(r"^(.*error: )+", "", str(error))
    return " ".join(text.split())[:_MAX_REASON_CHARS]


@contextmanager
def _library_errors(problem: str) -> Iterator[None]:
    """Turn the library's exceptions, including panics, into InputError.

    A panic also prints a trace, so the block's standard error goes to /dev/null.
    """
    sys.stderr.flush()
    stderr, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) or not (isinstance(error, Exception) or _is_panic(error)):
            raise
        raise InputError(None, f"{problem} ({_reason(error)})") from error
    finally:
        os.dup2(stderr, 2)
        os.close(stderr)
        os.close(nowhere)


# ---------------------------------------------------------------------------------------------- reading: the schema

_MAX_COLUMNS = 1000  # each column of an open file takes memory


def _fields(schema: Schema) -> list[Field]:
    return [schema.field(number) for number in range(len(schema.names))]


def _size_problem(schema: Schema) -> str:
    """Say what is wrong if the schema has too many columns, including members of structs, or is nested too deep."""
    number, pending = 0, [(field, 1) for field in _fields(schema)]
    while pending:
        field, level = pending.pop()
        if level > MAX_PROPERTY_DEPTH:
            return f"the schema is nested deeper than {MAX_PROPERTY_DEPTH} levels: write properties as JSON text"
        if DataType.is_struct(field.type):
            pending += [(member, level + 1) for member in field.type.fields]
        else:
            number += 1
    if number > _MAX_COLUMNS:
        advice = "write properties as JSON text or as a map"
        return f"the schema has {number} columns, at most {_MAX_COLUMNS} are read: {advice}"
    return ""


def _is_ignored(column: str) -> bool:
    return column in EXPORTED_COLUMNS and column not in ("id", "ingested_at")


def _is_text(kind: DataType) -> bool:
    kind = (kind.value_type if DataType.is_dictionary(kind) else None) or kind
    return any(is_kind(kind) for is_kind in (DataType.is_string, DataType.is_large_string, DataType.is_string_view))


def _type_problem(field: Field, assume_utc: bool) -> str:
    """Say what is wrong with the type of a column."""
    name, kind = field.name, field.type
    if DataType.is_null(kind) or _is_ignored(name):
        return ""
    if name.startswith(PROPERTY_PREFIX):
        return "must hold single values: only properties may be a struct or a map" if DataType.is_nested(kind) else ""
    if name == "properties":
        fits = _is_text(kind) or DataType.is_struct(kind) or DataType.is_map(kind)
        return "" if fits else "must be JSON text, a struct or a map"
    if name in _TIMES and DataType.is_timestamp(kind):
        return "" if kind.tz or assume_utc else "has times without a zone: --assume-utc takes them as UTC"
    if name in _TIMES:
        return "" if _is_text(kind) else "must be a timestamp, or RFC 3339 text"
    return "" if _is_text(kind) or kind == _UUID else "must be text"


def _check_schema(schema: Schema, assume_utc: bool) -> None:
    """Check the names and types of the columns. Raises InputError naming the first column that does not fit."""
    check_columns(schema.names)
    for field in _fields(schema):
        if problem := _type_problem(field, assume_utc):
            kind = str(field.type).strip().removeprefix("arro3.core.DataType<").removesuffix(">")
            raise InputError(None, f"the column {quoted(field.name)} {problem}; it is {kind[:_MAX_REASON_CHARS]}")


# ---------------------------------------------------------------------------------------------- reading: the rows

_ROWS = msgspec.json.Decoder(TableRow)
_UNWRITABLE = (InputError, RecursionError, msgspec.DecodeError)
_BAD_TIME = b'"ERROR: Cast error: Failed to convert '  # the library's JSON for a time that it cannot write


def _in_microseconds(column: Array) -> Array:
    """Convert times to microseconds since 1970. A column becomes text, refused later, if one of them overflows."""
    if not DataType.is_timestamp(column.type):
        return column
    times = column.cast(_UTC_TIME)
    if times.null_count == column.null_count:  # a time that overflows becomes null
        return times.cast(DataType.int64())
    return column.cast(DataType.timestamp(column.type.time_unit or "us", tz="UTC"))


def _json_columns(batch: RecordBatch) -> tuple[list[str], list[Any]]:
    """Return the columns of a batch under the names of TableRow's fields; `properties.NAME` become one struct."""
    names: list[str] = []
    columns: list[Any] = []
    property_fields = []
    for field in _fields(batch.schema):
        if field.name.startswith(PROPERTY_PREFIX):
            property_fields.append(field)
        elif not _is_ignored(field.name):
            is_object = field.name == "properties" and not _is_text(field.type)
            names.append("members" if is_object else "event_id" if field.name == "id" else field.name)
            columns.append(_in_microseconds(batch.column(field.name)))
    if property_fields:
        members = [field.with_name(field.name.removeprefix(PROPERTY_PREFIX)).with_nullable(True)
                   for field in property_fields]  # fmt: skip
        names.append("named")
        columns.append(struct_array([batch.column(field.name) for field in property_fields], fields=members))
    return names, columns


def _decoded(batch: RecordBatch) -> list[TableRow]:
    """Decode the rows of a batch from the JSON that the library writes, in which nulls are absent."""
    names, columns = _json_columns(batch)
    lines = io.BytesIO()
    with _library_errors("the library refuses"):
        write_ndjson(RecordBatch.from_arrays(columns, names=names), lines)
    text = lines.getvalue()
    if _BAD_TIME in text:
        raise InputError(None, "a time out of range")
    rows = _ROWS.decode_lines(text)
    for name, column in zip(names, columns, strict=True):
        if column.type == _UUID:
            for row in rows:
                if digits := getattr(row, name):
                    setattr(row, name, str(UUID(digits)))
    return rows


def _is_unwritable(batch: RecordBatch) -> bool:
    try:
        _decoded(batch)
    except _UNWRITABLE:
        return True
    return False


def _single_row(batch: RecordBatch) -> tuple[TableRow, str]:
    try:
        return _decoded(batch)[0], ""
    except _UNWRITABLE as error:
        names = [quoted(name) for name in batch.schema.names if _is_unwritable(batch.select([name]))]
        return TableRow(), f"has a value that cannot be written as JSON in {', '.join(names)} ({_reason(error)})"


def _batch_rows(batch: RecordBatch) -> Iterable[tuple[TableRow, str]]:
    """Return the rows of a batch, each with the problem that it has, or an empty string."""
    try:
        return zip(_decoded(batch), repeat(""))
    except _UNWRITABLE:  # because of at least one row: decode each alone
        return map(_single_row, (batch.slice(number, 1) for number in range(batch.num_rows)))


# ---------------------------------------------------------------------------------------------- reading: the file

_BATCH_ROWS = 256  # held in memory at once, together with their JSON
_BATCH_BYTES = 128 * 1024 * 1024  # of a batch, if each text is as long as its column's largest page
_MAX_PAGE_BYTES = 256 * 1024 * 1024  # uncompressed
_MAX_PAGES_BYTES = 512 * 1024 * 1024  # of the largest pages of all columns of texts
_STACK_BYTES = 256 * 1024 * 1024  # address space, not memory; 1,500 levels overflow the usual 8 MiB


def _footer(file: BinaryIO) -> bytes:
    """Return a file's table of contents. Raises InputError if a mark at an end is wrong: the library would panic."""
    file.seek(0)
    start, size = file.read(4), file.seek(0, io.SEEK_END)
    file.seek(max(size - 8, 0))
    footer_bytes, end = int.from_bytes(file.read(4), "little"), file.read(4)
    if b"PARE" in (start, end):
        raise InputError(None, "is encrypted: decrypt it first, and import the result")
    if start != b"PAR1":
        raise InputError(None, "is not Parquet: it does not start with PAR1")
    if end != b"PAR1" or footer_bytes > size - 12:
        raise InputError(None, "is cut off: a Parquet file has its table of contents at its end")
    file.seek(size - 8 - footer_bytes)
    return file.read(footer_bytes)


def _largest_pages(file: BinaryIO) -> tuple[int, int]:
    """Return the sizes of the largest pages, or zeros if they cannot be read. Raises InputError."""
    footer = _footer(file)
    try:
        return largest_pages(file, footer)
    except PagesError:  # the library will say why it cannot read the file
        return 0, 0
    finally:
        file.seek(0)


def _batch_rows_for(page_bytes: int, pages_bytes: int) -> int:
    """Return how many rows to read at once. Raises InputError if one page, or one row, may take too much memory."""
    if page_bytes > _MAX_PAGE_BYTES:
        problem = f"has a page of {page_bytes >> 20} MB, at most {_MAX_PAGE_BYTES >> 20} MB are read"
        raise InputError(None, f"{problem}: write smaller pages, or fewer rows in each")
    if pages_bytes > _MAX_PAGES_BYTES:
        problem = f"has columns of texts with pages of {pages_bytes >> 20} MB together"
        raise InputError(None, f"{problem}, at most {_MAX_PAGES_BYTES >> 20} MB are read: write smaller pages")
    return max(1, min(_BATCH_ROWS, _BATCH_BYTES // max(pages_bytes, 1)))


def _open_reader(file: BinaryIO, batch_rows: int) -> RecordBatchReader:
    """Open a file in a thread with a large stack, as the library recurses into nested types. Raises InputError."""

    def open_unless_too_large() -> RecordBatchReader | str:
        reader = read_parquet(file, batch_size=batch_rows)
        return _size_problem(reader.schema) or reader  # freeing a deep schema also recurses: do it in this thread

    threading.stack_size(_STACK_BYTES)
    try:
        with _library_errors("cannot be read as Parquet"), ThreadPoolExecutor(1) as executor:
            opened = executor.submit(open_unless_too_large).result()
    finally:
        threading.stack_size(0)
    if isinstance(opened, str):
        raise InputError(None, opened)
    return opened


def read_rows(file: BinaryIO, limit_bytes: int, assume_utc: bool) -> Iterator[Entry]:
    """Yield the rows of a file. Yields the rows before a part that cannot be read, then raises InputError."""
    reader = _open_reader(file, _batch_rows_for(*_largest_pages(file)))
    _check_schema(reader.schema, assume_utc)
    number = 0
    while True:
        with _library_errors(f"cannot be read from row {number + 1} on: it is damaged, or its columns are encrypted"):
            batch = next(reader, None)
        if batch is None:
            return
        for row, problem in _batch_rows(batch):
            number += 1
            is_long = len(row.properties or row.members) + len(row.named) > limit_bytes
            yield Entry(number, row, f"is longer than {limit_bytes} bytes" if is_long else problem, unit="row")


# ---------------------------------------------------------------------------------------------- writing

_GROUP_BYTES = 64 * 1024 * 1024  # of events in a row group, which is held in memory until it is compressed
_GROUP_ROWS = 100_000
_EVENT_BYTES = 250  # of an event without its properties
_TEXT = DataType.string()
_FIELDS = [Field(name, _TEXT, nullable=False) for name in (
    "event_name", "event_id", "external_customer_id", "customer_id", "source")] + [
    Field(name, _UTC_TIME, nullable=False) for name in _TIMES] + [
    Field(name, _TEXT, nullable=False) for name in ("properties", "environment")]  # fmt: skip
_PROPERTY_TYPES: dict[str, tuple[type, DataType]] = {  # --properties-column's TYPE -> the types of Python and Arrow
    "string": (str, _TEXT),
    "float64": (float, DataType.float64()),
    "int64": (int, DataType.int64()),
    "bool": (bool, DataType.bool()),
}


class _ErrorGuard:
    """Hands batches to the library, and the library's output to the file.

    An exception from either side would make the library panic. So the first one is kept in `error`; after it no more
    batches are read, and nothing more is written.
    """

    def __init__(self, batches: Iterable[RecordBatch], file: BinaryIO) -> None:
        self._batches = batches
        self._file = file
        self.error: Exception | KeyboardInterrupt | None = None

    def __iter__(self) -> Iterator[RecordBatch]:
        try:
            for batch in self._batches:
                if self.error:
                    return
                yield batch
        except (Exception, KeyboardInterrupt) as error:
            self.error = error

    def write(self, content: bytes) -> int:
        try:
            if not self.error:
                self._file.write(content)
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
        return len(content)

    def flush(self) -> None:
        """Do nothing: the function that opened the file flushes it."""

    def seek(self, *_: object) -> int:
        """Raise: the library checks that there is a seek(), and does not call it."""
        raise io.UnsupportedOperation("seek")


def _typed(value: msgspec.Raw | None, kind: type) -> Any:
    """Return a property's value if it has the type of its column, else None."""
    if value is None:
        return None
    try:
        typed = decoder_of(kind).decode(value)
    except msgspec.DecodeError:
        return None
    return typed if kind is not int or -(2**63) <= typed < 2**63 else None


def _arrays(page: list[Row], environment: str, columns: Sequence[tuple[str, str]]) -> list[Array]:
    """Return the columns of a page: those of _FIELDS, then the chosen properties."""
    texts = ("event_name", "id", "external_customer_id", "customer_id", "source")
    arrays = [Array([getattr(row, name) for row in page], _TEXT) for name in texts]
    times = [row.timestamp_us for row in page], [row.ingested_at_us for row in page]
    arrays += [Array(values, DataType.int64()).cast(_UTC_TIME) for values in times]
    arrays += [Array([row.properties for row in page], _TEXT), Array([environment] * len(page), _TEXT)]
    if columns:
        properties = [MEMBERS.decode(row.properties) for row in page]
        for name, kind in columns:
            python_type, arrow_type = _PROPERTY_TYPES[kind]
            arrays.append(Array([_typed(members.get(name), python_type) for members in properties], arrow_type))
    return arrays


def _write(pages: Iterator[list[Row]], file: BinaryIO, environment: str, columns: Sequence[tuple[str, str]]) -> None:
    schema = Schema(_FIELDS + [Field(PROPERTY_PREFIX + name, _PROPERTY_TYPES[kind][1]) for name, kind in columns])
    first = next(pages, [])
    event_bytes = _EVENT_BYTES + sum(len(row.properties) for row in first) // max(len(first), 1)
    batches = (RecordBatch.from_arrays(_arrays(page, environment, columns), schema=schema)
               for page in chain([first], pages))  # fmt: skip
    guard = _ErrorGuard(batches, file)
    write_parquet(
        RecordBatchReader.from_batches(schema, iter(guard)),
        cast(Any, guard),
        compression="zstd(3)",
        column_dictionary_enabled=dict.fromkeys(("event_id", *_TIMES), False),
        column_encoding=dict.fromkeys(_TIMES, "delta_binary_packed"),
        max_row_group_size=max(1, min(_GROUP_ROWS, _GROUP_BYTES // event_bytes)),
    )
    if guard.error:
        raise guard.error


def parquet_writer(
    environment: str, columns: Sequence[tuple[str, str]], output: str | None
) -> Callable[[Iterator[list[Row]], BinaryIO], None]:
    """Return the function that writes pages of rows. Columns are property names with types. Raises StartError."""
    twice = [name for name, number in Counter(name for name, _ in columns).items() if number > 1]
    if twice:
        raise StartError(f"--properties-column {twice[0]} is given twice: name each property once")
    if output is None and sys.stdout.isatty():
        raise StartError("--format parquet cannot go to a terminal: name a file with --output")
    if (output or "").endswith(".gz"):
        raise StartError(f"--output {output}: Parquet is compressed already; leave .gz out")

    def write(pages: Iterator[list[Row]], file: BinaryIO) -> None:
        _write(pages, file, environment, columns)

    return write
