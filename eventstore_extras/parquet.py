"""Events as Parquet, for import and export. Loaded when Parquet is asked for: only the extra `parquet` has arro3.

arro3 is Apache's Arrow and Parquet in Rust. It writes rows as JSON by itself, whatever their types, so a file is read
as lines of NDJSON.
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
from functools import partial
from itertools import chain, repeat
from typing import Any, BinaryIO, cast
from uuid import UUID

import msgspec
from arro3.core import Array, DataType, Field, RecordBatch, RecordBatchReader, Schema, struct_array
from arro3.io import read_parquet, write_ndjson, write_parquet

from eventstore import MAX_PROPERTY_DEPTH, MEMBERS, Row, StartError, decoder_of, quoted
from eventstore_extras.transfer import (
    EXPORTED_COLUMNS,
    PROPERTY_COLUMN,
    Entry,
    Pages,
    TypedRow,
    UnreadableError,
    check_columns,
)

# ---------------------------------------------------------------------------------------------- reading

BATCH_ROWS = 256  # held at a time, and as JSON, too
MAX_COLUMNS = 1000  # each takes memory as long as the file is read
MAX_REASON_CHARS = 200
STACK_BYTES = 256 * 1024 * 1024  # of addresses; 8 MiB are overrun by 1,500 levels
ROWS = msgspec.json.Decoder(TypedRow)
BAD_TIME = b'"ERROR: Cast error: Failed to convert '  # the library writes this for a time that it cannot write
UUID_TYPE = DataType.binary(16)
UTC_TIME = DataType.timestamp("us", tz="UTC")
TIMES = ("timestamp", "ingested_at")
IGNORED = {*EXPORTED_COLUMNS} - {"id", "ingested_at"}


def rows(source: BinaryIO, limit_bytes: int, assume_utc: bool) -> Iterator[Entry]:
    """The rows of a file, numbered from 1. UnreadableError, after those before the place."""
    check_ends(source)
    reader = open_file(source)
    check_schema(reader.schema, assume_utc)
    number = 0
    while True:
        with reasons(f"cannot be read from row {number + 1} on: it is damaged, or its columns are encrypted"):
            batch = next(reader, None)
        if batch is None:
            return
        for row, problem in batch_rows(batch):
            number += 1
            is_long = len(row.properties or row.members) + len(row.named) > limit_bytes
            yield Entry(number, None, row, f"is longer than {limit_bytes} bytes" if is_long else problem, "row")


def check_ends(source: BinaryIO) -> None:
    """The marks that a file has at both ends; the library panics without them."""
    source.seek(0)
    start, size = source.read(4), source.seek(0, io.SEEK_END)
    source.seek(max(size - 8, 0))
    footer_bytes, end = source.read(4), source.read(4)
    source.seek(0)
    if b"PARE" in (start, end):
        raise UnreadableError(None, "is encrypted: decrypt it, and import what comes out")
    if start != b"PAR1":
        raise UnreadableError(None, "is not Parquet: it does not start with PAR1")
    if end != b"PAR1" or int.from_bytes(footer_bytes, "little") > size - 12:
        raise UnreadableError(None, "is cut off: a Parquet file has its table of contents at its end")


def open_file(source: BinaryIO) -> RecordBatchReader:
    """The file's reader. It is opened in a thread with a large stack, as the library recurses into nested types."""

    def open_unless_deep() -> RecordBatchReader | str:
        reader = read_parquet(source, batch_size=BATCH_ROWS)
        return size_problem(reader.schema) or reader  # what is too deep must go in this thread, too

    threading.stack_size(STACK_BYTES)
    with reasons("cannot be read as Parquet"), ThreadPoolExecutor(1) as executor:
        opened = executor.submit(open_unless_deep).result()
    threading.stack_size(0)
    if isinstance(opened, str):
        raise UnreadableError(None, opened)
    return opened


@contextmanager
def reasons(problem: str) -> Iterator[None]:
    """The library's exceptions as UnreadableError. A panic of Rust is one of them, and writes to standard error too."""
    sys.stderr.flush()
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    except BaseException as error:
        if isinstance(error, OSError) or not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise UnreadableError(None, f"{problem} ({reason(error)})") from error
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def is_panic(error: BaseException) -> bool:
    return type(error).__name__ == "PanicException"


def reason(error: BaseException) -> str:
    """What the library says, without the names of its own layers."""
    said = re.search(r'value: .*?\("(.*)"\)', str(error), re.DOTALL) if is_panic(error) else None
    text = said[1] if said else re.sub(r"^(.*error: )+", "", str(error))
    return " ".join(text.split())[:MAX_REASON_CHARS]


def check_schema(schema: Schema, assume_utc: bool) -> None:
    """The columns of a file and their types. UnreadableError names the first bad one."""
    check_columns(schema.names, None, "the schema")
    for field in fields_of(schema):
        if problem := type_problem(field, assume_utc):
            kind = str(field.type).strip().removeprefix("arro3.core.DataType<").removesuffix(">")
            raise UnreadableError(None, f"the column {quoted(field.name)} {problem}; it is {kind[:MAX_REASON_CHARS]}")


def fields_of(schema: Schema) -> list[Field]:
    return [schema.field(at) for at in range(len(schema.names))]


def size_problem(schema: Schema) -> str:
    """What is wrong if a file has too many columns, those of structs counted, too, or too deep ones."""
    number, found = 0, [(field, 1) for field in fields_of(schema)]
    while found:
        field, level = found.pop()
        if level > MAX_PROPERTY_DEPTH:
            return f"the schema is nested deeper than {MAX_PROPERTY_DEPTH} levels: write properties as JSON text"
        if DataType.is_struct(field.type):
            found += [(member, level + 1) for member in field.type.fields]
        else:
            number += 1
    advice = "write properties as JSON text or as a map"
    return f"the schema has {number} columns, at most {MAX_COLUMNS} are read: {advice}" if number > MAX_COLUMNS else ""


def is_text(kind: DataType) -> bool:
    kind = (kind.value_type if DataType.is_dictionary(kind) else None) or kind
    return any(test(kind) for test in (DataType.is_string, DataType.is_large_string, DataType.is_string_view))


def type_problem(field: Field, assume_utc: bool) -> str:
    """What is wrong with the type of a column."""
    name, kind = field.name, field.type
    if DataType.is_null(kind) or name in IGNORED:
        return ""
    if name.startswith(PROPERTY_COLUMN):
        return "must hold single values: only properties may be a struct or a map" if DataType.is_nested(kind) else ""
    if name == "properties":
        fits = is_text(kind) or DataType.is_struct(kind) or DataType.is_map(kind)
        return "" if fits else "must be JSON text, a struct or a map"
    if name in TIMES and DataType.is_timestamp(kind):
        return "" if kind.tz or assume_utc else "has times without a zone: --assume-utc takes them as UTC"
    if name in TIMES:
        return "" if is_text(kind) else "must be a timestamp, or RFC 3339 text"
    return "" if is_text(kind) or kind == UUID_TYPE else "must be text"


def batch_rows(batch: RecordBatch) -> Iterable[tuple[TypedRow, str]]:
    """The rows, and what is wrong with each."""
    try:
        return zip(decoded(batch), repeat(""))
    except UNWRITABLE:  # for one of its rows
        return map(row_of, (batch.slice(at, 1) for at in range(batch.num_rows)))


def row_of(batch: RecordBatch) -> tuple[TypedRow, str]:
    try:
        return decoded(batch)[0], ""
    except UNWRITABLE as error:
        names = [name for name in batch.schema.names if is_unwritable(batch.select([name]))]
        return TypedRow(), f"holds what cannot be written as JSON in {', '.join(map(quoted, names))} ({reason(error)})"


UNWRITABLE = (UnreadableError, RecursionError, msgspec.DecodeError)


def is_unwritable(batch: RecordBatch) -> bool:
    try:
        decoded(batch)
    except UNWRITABLE:
        return True
    return False


def decoded(batch: RecordBatch) -> list[TypedRow]:
    """The rows of a batch, by way of their JSON, where null is absent."""
    names = [name for name in batch.schema.names if name not in IGNORED and not name.startswith(PROPERTY_COLUMN)]
    columns: list[Any] = [in_us(batch.column(name)) for name in names]
    if named := [field for field in fields_of(batch.schema) if field.name.startswith(PROPERTY_COLUMN)]:
        fields = [field.with_name(field.name.removeprefix(PROPERTY_COLUMN)).with_nullable(True) for field in named]
        columns.append(struct_array([batch.column(field.name) for field in named], fields=fields))
    json_names = ["event_id" if name == "id" else name for name in names] + ["named"] * bool(named)
    if "properties" in names and not is_text(batch.column("properties").type):
        json_names[names.index("properties")] = "members"
    lines = io.BytesIO()
    with reasons("the library refuses"):
        write_ndjson(RecordBatch.from_arrays(columns, names=json_names), lines)
    text = lines.getvalue()
    if BAD_TIME in text:
        raise UnreadableError(None, "a time out of range")
    found = ROWS.decode_lines(text)
    for name, column in zip(json_names, columns, strict=True):
        if column.type == UUID_TYPE:
            for row in found:
                if text := getattr(row, name):
                    setattr(row, name, str(UUID(text)))
    return found


def in_us(column: Array) -> Array:
    """Times as microseconds since 1970; as text, for others to refuse, where those are no 64-bit integers."""
    if not DataType.is_timestamp(column.type):
        return column
    times = column.cast(UTC_TIME)
    if times.null_count == column.null_count:
        return times.cast(DataType.int64())
    return column.cast(DataType.timestamp(column.type.time_unit or "us", tz="UTC"))


# ---------------------------------------------------------------------------------------------- writing

GROUP_BYTES = 64 * 1024 * 1024  # of events before they are packed, which a row group may hold in memory
GROUP_ROWS = 100_000
EVENT_BYTES = 250  # without its properties
TEXT = DataType.string()
SCHEMA = [Field(name, TEXT, nullable=False) for name in (
    "event_name", "event_id", "external_customer_id", "customer_id", "source")] + [
    Field(name, UTC_TIME, nullable=False) for name in TIMES] + [
    Field(name, TEXT, nullable=False) for name in ("properties", "environment")]  # fmt: skip
PropertyColumn = tuple[str, str]
KINDS: dict[str, tuple[type, DataType]] = {
    "string": (str, TEXT),
    "float64": (float, DataType.float64()),
    "int64": (int, DataType.int64()),
    "bool": (bool, DataType.bool()),
}


def writer(
    environment: str, columns: Sequence[PropertyColumn], output: str | None
) -> Callable[[Pages, BinaryIO], None]:
    """What writes pages as a Parquet file. StartError."""
    twice = [name for name, number in Counter(name for name, _ in columns).items() if number > 1]
    if twice:
        raise StartError(f"--properties-column {twice[0]} is there twice: name a property once")
    if output is None and sys.stdout.isatty():
        raise StartError("--format parquet is nothing for a terminal: name a file with --output")
    if (output or "").endswith(".gz"):
        raise StartError(f"--output {output}: Parquet is compressed already; leave .gz out")
    return partial(write, environment=environment, columns=columns)


def write(pages: Pages, output: BinaryIO, environment: str, columns: Sequence[PropertyColumn]) -> None:
    schema = Schema(SCHEMA + [Field(PROPERTY_COLUMN + name, KINDS[kind][1]) for name, kind in columns])
    first = next(pages, [])
    event_bytes = EVENT_BYTES + sum(len(row.properties) for row in first) // max(len(first), 1)
    batches = (RecordBatch.from_arrays(arrays(page, environment, columns), schema=schema)
               for page in chain([first], pages))  # fmt: skip
    guarded = Guarded(batches, output)
    write_parquet(
        RecordBatchReader.from_batches(schema, iter(guarded)),
        cast(Any, guarded),
        compression="zstd(3)",
        column_dictionary_enabled=dict.fromkeys(("event_id", *TIMES), False),
        column_encoding=dict.fromkeys(TIMES, "delta_binary_packed"),
        max_row_group_size=max(1, min(GROUP_ROWS, GROUP_BYTES // event_bytes)),
    )
    if guarded.error:
        raise guarded.error


class Guarded:
    """Batches and a file for the library, which panics at an exception: that is kept, and the library finishes."""

    def __init__(self, batches: Iterable[RecordBatch], output: BinaryIO) -> None:
        self._batches = batches
        self._output = output
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
                self._output.write(content)
        except (Exception, KeyboardInterrupt) as error:
            self.error = error
        return len(content)

    def flush(self) -> None:  # whoever opened the file does
        pass

    def seek(self, *_: object) -> int:  # the library wants there to be one, and does not call it
        raise io.UnsupportedOperation("seek")


def arrays(page: list[Row], environment: str, columns: Sequence[PropertyColumn]) -> list[Array]:
    """The columns of a page as SCHEMA and the asked for properties have them."""
    texts = ("event_name", "id", "external_customer_id", "customer_id", "source")
    found = [Array([getattr(row, name) for row in page], TEXT) for name in texts]
    times = [row.timestamp_us for row in page], [row.ingested_at_us for row in page]
    found += [Array(values, DataType.int64()).cast(UTC_TIME) for values in times]
    found += [Array([row.properties for row in page], TEXT), Array([environment] * len(page), TEXT)]
    if columns:
        members = [MEMBERS.decode(row.properties) for row in page]
        for name, kind in columns:
            python, arrow = KINDS[kind]
            found.append(Array([typed(each.get(name), python) for each in members], arrow))
    return found


def typed(value: msgspec.Raw | None, kind: type) -> Any:
    """A property as a column of its type has it; None if it is of another one."""
    if value is None:
        return None
    try:
        found = decoder_of(kind).decode(value)
    except msgspec.DecodeError:
        return None
    return found if kind is not int or -(2**63) <= found < 2**63 else None
