"""The command `eventstore export`: write stored events as NDJSON, CSV, rows for ClickHouse, or Parquet."""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import os
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager, suppress
from typing import BinaryIO, cast

import msgspec

from eventstore import ENCODER, AddFlag, Row, StartError, list_events, plural, say, to_datetime
from eventstore_extras.entries import ExportedEvent, csv_cell, exported_event
from eventstore_extras.files import check_folder, explain_missing_parquet, progress_bar, whole_file
from eventstore_extras.job import StopError, run_job
from eventstore_extras.stored import add_filter_flags, flag_query, no_events_hint, open_stored, stored_events

__all__ = ["add_flags", "run"]

# ---------------------------------------------------------------------------------------------- formats

_Pages = Iterator[list[Row]]
_Write = Callable[[_Pages, BinaryIO], None]


def _page_writer(encode: Callable[[list[Row]], bytes], header: bytes = b"") -> _Write:
    """Return a function that writes a header, then each page as encode() encodes it."""

    def write(pages: _Pages, output: BinaryIO) -> None:
        output.write(header)
        output.writelines(map(encode, pages))

    return write


def _ndjson_lines(rows: list[Row]) -> bytes:
    return ENCODER.encode_lines(map(exported_event, rows))


def _ndjson_writer(_: argparse.Namespace) -> _Write:
    return _page_writer(_ndjson_lines)


def _csv_lines(rows: list[Row]) -> bytes:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\r\n")  # with "\n" the writer would not quote a cell's lone \r
    for row in rows:
        time_text = msgspec.to_builtins(to_datetime(row.timestamp_us))
        writer.writerow([csv_cell(row.event_name), csv_cell(row.id, is_id=True), csv_cell(row.external_customer_id),
                         csv_cell(row.customer_id), csv_cell(row.source), time_text, row.properties])  # fmt: skip
    return text.getvalue().encode()


def _csv_writer(_: argparse.Namespace) -> _Write:
    return _page_writer(_csv_lines, header=",".join(ExportedEvent.__struct_fields__).encode() + b"\r\n")


def _clickhouse_writer(arguments: argparse.Namespace) -> _Write:
    """Write JSONEachRow for FlexPrice's own ClickHouse table `events`."""

    def milliseconds(time_us: int) -> str:
        return to_datetime(time_us).replace(tzinfo=None).isoformat(" ", "milliseconds")

    def encode(rows: list[Row]) -> bytes:
        return ENCODER.encode_lines(
            {
                "id": row.id,
                "tenant_id": arguments.tenant_id,
                "environment_id": arguments.environment_id,
                "external_customer_id": row.external_customer_id,
                "event_name": row.event_name,
                "customer_id": row.customer_id,
                "source": row.source,
                "timestamp": milliseconds(row.timestamp_us),
                "ingested_at": milliseconds(row.ingested_at_us),
                "properties": row.properties,
            }
            for row in rows
        )

    return _page_writer(encode)


def _parquet_writer(arguments: argparse.Namespace) -> _Write:
    with explain_missing_parquet():
        from eventstore_extras import parquet  # noqa: PLC0415 - only the extra `parquet` has its library
    return parquet.parquet_writer(arguments.environment, arguments.property_columns, arguments.output)


_WHERE_IDS_ARE = (
    "FlexPrice shows the rows of its own environments only; its Postgres has the ids: "
    "SELECT tenant_id, id AS environment_id, name FROM environments"
)
_ENVIRONMENT_ID = re.compile(r"(?i:[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12})|env_[0-9A-Za-z]{26}")
_WRITERS: dict[str, Callable[[argparse.Namespace], _Write]] = {
    "ndjson": _ndjson_writer,
    "csv": _csv_writer,
    "clickhouse": _clickhouse_writer,
    "parquet": _parquet_writer,
}


def _writer(arguments: argparse.Namespace) -> _Write:
    """Return the function that writes the chosen format. Raises StartError if a flag does not fit the format."""
    if arguments.output is None and sys.stdout is None:  # closed by the shell, as in `eventstore export >&-`
        raise StartError("standard output is closed: name a file with --output")
    name = (arguments.output or "").removesuffix(".gz")
    form = arguments.format or next((form for form in ("csv", "parquet") if name.endswith(f".{form}")), "ndjson")
    if form == "clickhouse" and not (arguments.tenant_id and arguments.environment_id):
        raise StartError(f"--format clickhouse needs --tenant-id and --environment-id: {_WHERE_IDS_ARE}")
    if form != "clickhouse" and (arguments.tenant_id or arguments.environment_id):
        raise StartError("--tenant-id and --environment-id go with --format clickhouse")
    if arguments.property_columns and form != "parquet":
        raise StartError("--properties-column goes with --format parquet: the other formats have no typed columns")
    return _WRITERS[form](arguments)


# ---------------------------------------------------------------------------------------------- the command


@contextmanager
def _standard_output() -> Iterator[BinaryIO]:
    """Provide standard output. Raises StopError if it cannot be written, but BrokenPipeError if its reader is gone."""
    try:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
    except BrokenPipeError:
        raise
    except OSError as error:
        name = "standard output"
        with suppress(OSError):  # Linux knows the name of its file
            name += f" ({os.readlink(f'/proc/self/fd/{sys.stdout.fileno()}')})"
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # discard what Python would still flush
        problem = f"cannot write {name}: {error.strerror or error}; the export is incomplete, the database is unchanged"
        raise StopError(f"{problem}; free some disk space, or name a file on another disk, and export again") from error


def _check_output(path: str, db: str) -> None:
    """Raise StartError if the path is the database, or if nothing can be written there."""
    if os.path.islink(path):
        raise StartError(f"--output {path} is a link: name the file itself")
    if os.path.exists(path) and (not os.path.isfile(path) or os.path.samefile(path, db)):
        raise StartError(f"--output {path} is the database, or not a regular file: name another one")
    check_folder(path, f"--output {path}: ")


@contextmanager
def _open_output(path: str | None, db: str) -> Iterator[BinaryIO]:
    """Open the output: a file, or standard output if path is None. Raises StartError, StopError."""
    if path is None:
        with _standard_output() as output:
            yield output
        return
    _check_output(path, db)
    with whole_file(path, f"cannot write --output {path}", "no file was made") as file:
        if path.endswith(".gz"):  # without a time and a name in it, so that equal exports are equal bytes
            with gzip.GzipFile("", "wb", 6, file, mtime=0) as packed:
                yield cast(BinaryIO, packed)
        else:
            yield file


def _export_events(arguments: argparse.Namespace) -> int:
    """Write the events that the flags choose. Raises StartError, StopError."""
    started_s = time.monotonic()
    query, write = flag_query(arguments), _writer(arguments)
    done = 0

    def pages() -> _Pages:
        nonlocal done
        for page in stored_events(conn, query):
            yield [row for _, row in page]
            done += len(page)
            advance(len(page))

    with (
        closing(open_stored(arguments.db, arguments.environment)) as conn,
        _open_output(arguments.output, arguments.db) as output,
    ):
        among_data = arguments.output is None
        with progress_bar(lambda: list_events(conn, query).total_count or 0, "event", among_data) as advance:
            write(pages(), output)
        hint = "" if done else no_events_hint(conn, arguments.environment)
    say(f"exported {plural(done, 'event')}; {time.monotonic() - started_s:.1f} s{hint}")
    return 0


# ---------------------------------------------------------------------------------------------- flags

_COLUMN_TYPES = ("string", "float64", "int64", "bool")


def _property_column(text: str) -> tuple[str, str]:
    name, _, kind = text.rpartition(":")
    if not name or kind not in _COLUMN_TYPES:
        types = ", ".join(_COLUMN_TYPES)
        raise argparse.ArgumentTypeError(f"must look like tokens:float64, TYPE one of {types}; got {text!r}")
    return name, kind


def _environment_id(text: str) -> str:
    if _ENVIRONMENT_ID.fullmatch(text):
        return text
    shape = "a UUID or env_ and 26 characters, not the environment's name"
    raise argparse.ArgumentTypeError(f"must be the id that FlexPrice gave the environment, {shape}; got {text!r}")


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `export`."""
    add_filter_flags(add)
    add("--format", choices=[*_WRITERS], help="what to write; clickhouse is JSONEachRow for FlexPrice's own table; "
        "by default csv or parquet if FILE ends in .csv or .parquet, else ndjson")  # fmt: skip
    add("--tenant-id", metavar="ID", help="your tenant's id in FlexPrice, for --format clickhouse")
    add("--environment-id", metavar="ID", type=_environment_id, help="the id of your environment in FlexPrice, for "
        "--format clickhouse")  # fmt: skip
    add("--properties-column", dest="property_columns", metavar="NAME:TYPE", type=_property_column, action="append",
        default=[], help="write a property as a column of Parquet as well; may be given several times; TYPE is one of "
        f"{', '.join(_COLUMN_TYPES)}")  # fmt: skip
    add("-o", "--output", metavar="FILE", help="file to write, instead of standard output; a name that ends in .gz "
        "compresses")  # fmt: skip


def run(arguments: argparse.Namespace) -> int:
    """Run `eventstore export` and return its exit status. Raises StartError."""
    return run_job(_export_events, arguments)
