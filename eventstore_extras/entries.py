"""One event as files hold it, as a JSON object or as a row of CSV or Parquet: its columns, its checks, its errors."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from datetime import datetime
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, Struct
from msgspec.structs import replace

from eventstore import (
    ENCODER,
    MAX_TIME_US,
    MEMBERS,
    MIN_TIME_US,
    ApiError,
    EventIn,
    Faults,
    FieldError,
    IdMaker,
    Row,
    check_properties,
    decode,
    decode_fields,
    event_row,
    parse_time,
    quoted,
    raise_fault,
    to_datetime,
)

__all__ = [
    "EXPORTED_COLUMNS", "NO_EVENTS", "PROPERTY_PREFIX", "CheckedRow", "Entry", "ExportedEvent", "InputError",
    "TableRow", "check_columns", "checked_row", "csv_cell", "csv_values", "exported_event", "no_events",
    "shown_content",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- exported events


class ExportedEvent(Struct):
    """An event in the form that NDJSON, `replay` and POST /v1/events/bulk use (API: Sending events)."""

    event_name: str
    event_id: str
    external_customer_id: str
    customer_id: str
    source: str
    timestamp: datetime
    properties: Raw


def exported_event(row: Row) -> ExportedEvent:
    """Return the event of a stored row. Line breaks between its properties' tokens are removed: one event, one line."""
    properties = row.properties.encode()
    if b"\n" in properties or b"\r" in properties:
        properties = msgspec.json.format(properties, indent=-1)  # keeps digits and escapes as they were sent
    return ExportedEvent(row.event_name, row.id, row.external_customer_id, row.customer_id, row.source,
                         to_datetime(row.timestamp_us), Raw(properties))  # fmt: skip


# ---------------------------------------------------------------------------------------------- entries and errors


class TableRow(Struct, omit_defaults=True):
    """A row of a table with typed columns. Times are microseconds since 1970, or text.

    A Parquet row without an event_id gets a hash of this struct's JSON as its id. If the fields had other names or
    another order, a file that is imported again would be stored twice.
    """

    event_name: str | None = None
    external_customer_id: str | None = None
    event_id: str | None = None
    customer_id: str | None = None
    source: str | None = None
    timestamp: int | str | None = None
    ingested_at: int | str | None = None
    properties: str | None = None  # JSON text
    members: Raw = Raw()  # properties that are an object in the file, not JSON text
    named: Raw = Raw()  # the columns `properties.NAME`, as one object


Content = bytes | dict[str, str] | TableRow  # JSON; the non-empty cells of a CSV row by column; a row of Parquet


class Entry(NamedTuple):
    """One event of a file, before it is checked."""

    number: int  # of the line or row, from 1
    content: Content
    problem: str = ""  # why the content cannot be an event
    array_index: int | None = None  # in the file's JSON array, from 0
    unit: str = "line"  # or "row": what `number` counts

    @property
    def location(self) -> str:
        return f":{self.number}" if self.unit == "line" else f": row {self.number}"


class InputError(Exception):
    """The import cannot continue beyond `location`, which is text to append to the file's name."""

    def __init__(self, location: str | int | None, problem: str, advice: str | None = None) -> None:
        """An integer location is the number of a line; None stands for the whole file.

        `advice` says what to do with a file in which no event was found; it may be "" if the problem says so.
        """
        super().__init__(problem)
        self.location = f":{location}" if isinstance(location, int) else location or ""
        self.advice = advice


# ---------------------------------------------------------------------------------------------- columns

PROPERTY_PREFIX = "properties."
EXPORTED_COLUMNS = ("id", "ingested_at", "tenant_id", "environment_id", "environment")  # only exports have these
NO_EVENTS = (
    f"no events were found: name another file, or rename its fields or columns ({', '.join(EventIn.__struct_fields__)})"
)
_KNOWN_COLUMNS = (*EventIn.__struct_fields__, *EXPORTED_COLUMNS)


def _is_property(column: str) -> bool:
    return column.startswith(PROPERTY_PREFIX) and column != PROPERTY_PREFIX


def _printable(text: str) -> str:
    """Replace bytes that are not UTF-8. They were escaped when the CSV file was read."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def no_events(line: int, start: str) -> InputError:
    """Return the error for a file that starts like no known format."""
    problem = f"is neither NDJSON nor JSON nor CSV with known columns and commas: it starts {quoted(start[:40])}"
    return InputError(line, problem, NO_EVENTS)


def check_columns(columns: list[str], line: int | None = None) -> None:
    """Check the column names in a CSV file's header, or in a Parquet schema if line is None. Raises InputError."""
    table = "the header" if line else "the schema"
    unknown = [name for name in columns if name not in _KNOWN_COLUMNS and not _is_property(name)]
    missing = [name for name in ("event_name", "external_customer_id") if name not in columns]
    twice = [name for name, number in Counter(columns).items() if number > 1]
    if {"id", "event_id"} <= {*columns}:
        twice.append("id and event_id")
    separated = re.search(rf"(?:^|[;|\t])({'|'.join(_KNOWN_COLUMNS)})[;|\t]", columns[0]) if columns else None
    if line and separated:
        problem = f"its columns are separated by {quoted(separated[0][-1])}: write commas"
    elif line and len(unknown) == len(columns):
        raise no_events(line, _printable(",".join(columns)))
    elif unknown:
        names, known = ", ".join(map(quoted, unknown[:10])), ", ".join(_KNOWN_COLUMNS)
        problem = f"{table} has unknown columns: {names}; known are {known}, properties.NAME"
    elif missing:
        problem = f"{table} has no column {missing[0]}"
    elif twice:
        problem = f"{table} has the column {twice[0]} twice"
    else:
        return
    raise InputError(line, problem)


# ---------------------------------------------------------------------------------------------- an entry's event


class CheckedRow(NamedTuple):
    """The row to store for an entry, with 0 as its environment."""

    row: Row
    has_id: bool  # False if the id was made here
    has_time: bool  # False if the timestamp is the time of the import

    def is_stored_as(self, stored: Row) -> bool:
        """Compare with the stored row of the same id: times to the millisecond, which is what FlexPrice keeps."""
        row = self.row
        if self.has_time and row.timestamp_us // 1000 != stored.timestamp_us // 1000:
            return False
        texts = [(each.external_customer_id, each.customer_id, each.event_name, each.source) for each in (row, stored)]
        properties = row.properties, stored.properties
        return texts[0] == texts[1] and (
            properties[0] == properties[1]
            or bool(msgspec.json.decode(properties[0]) == msgspec.json.decode(properties[1]))
        )


def _content_id(entry: Entry) -> str:
    """Make the id of an event without one. Importing the same file again makes the same ids."""
    content = entry.content if isinstance(entry.content, bytes) else ENCODER.encode(entry.content)
    number = entry.number if entry.array_index is None else entry.array_index
    return "import_" + hashlib.sha256(b"%d:%b" % (number, content)).hexdigest()[:32]


class _JsonEvent(Struct, forbid_unknown_fields=True):
    """An event as a client sends it, or from a server's answer, which has `id` and other fields in addition."""

    event_name: str | None = None
    external_customer_id: str | None = None
    event_id: str | None = None
    customer_id: str | None = None
    source: str | None = None
    timestamp: str | None = None
    properties: Raw = Raw()
    id: str | None = None
    ingested_at: Raw = Raw()
    tenant_id: Raw = Raw()
    environment_id: Raw = Raw()


_JSON_EVENT = msgspec.json.Decoder(_JsonEvent)
_ANSWERED_ONLY = ("ingested_at", "tenant_id", "environment_id")


def _json_event(content: bytes, faults: Faults) -> EventIn:
    """Decode an event. An event from a server's answer has an `id` instead of an event_id."""
    event = decode_fields(_JSON_EVENT, content, faults)
    if not content.startswith(b"{"):
        faults.raise_any()
    event_id = event.event_id or event.id
    if event_id != event.id:
        faults.ignore(name for name in ("id", *_ANSWERED_ONLY) if getattr(event, name))
    return EventIn(event.event_name, event.external_customer_id, event_id, event.customer_id, event.source,
                   event.timestamp or None, event.properties)  # fmt: skip


_TABLE_FIELDS = frozenset(TableRow.__struct_fields__)
_RESERVED_CELL = re.compile(r"\\+N|\\*(?:NULL|null)")
# What tools write for a missing id.
_NO_ID = r"\s*(?:\\N|None|(?i:[(<\[]?null[)>\]]?|nan|undefined|#n/a|#[a-z0-9/]+[!?]))\s*"
_ROUNDED_ID = r"[+-]?\d+(?:[.,]\d*)?[eE]\+\d+|[+-]?\d[.,]\d+[eE]\d\d+"  # such as 1.23457E+17
_ROUNDED_ID_CELL = re.compile(_ROUNDED_ID, re.ASCII)
_RESERVED_ID_CELL = re.compile(rf"\\+N|\\*(?:{_NO_ID}|{_ROUNDED_ID})", re.ASCII)


def csv_cell(text: str, is_id: bool = False) -> str:
    """Return the CSV cell for a text. A text that an import would misread, such as NULL, gets a backslash."""
    return "\\" + text if (_RESERVED_ID_CELL if is_id else _RESERVED_CELL).fullmatch(text) else text


def _cell_text(cell: str, is_id: bool = False) -> str:
    """Return the text of a cell that csv_cell() made."""
    return cell[1:] if cell.startswith("\\") and csv_cell(cell[1:], is_id) == cell else cell


def _id_text(cell: str) -> str:
    """Return the id in a cell. Raises FieldError if it stands for no id, or for a number that has lost its digits."""
    text = _cell_text(cell, is_id=True)
    if text != cell or not _RESERVED_ID_CELL.fullmatch(cell):
        return text
    if _ROUNDED_ID_CELL.fullmatch(cell):
        advice = "format that column as text before the file is opened, or export the events again"
        problem = f"is {quoted(cell)}, a number that a spreadsheet has rounded: {advice}"
    else:
        problem = f"is {quoted(cell)}, which usually stands for no value: leave the cell empty"
    raise FieldError("invalid_format", problem)


_NULL_CELLS = frozenset(["", "\\N", "NULL", "null"])  # SQL tools write these for an absent value


def csv_values(columns: list[str], cells: list[str]) -> dict[str, str]:
    """Return the cells that hold a value, by column. In a property's own column NULL is a text, such as a name."""
    return {name: cell for name, cell in zip(columns, cells, strict=True)
            if cell not in _NULL_CELLS or (cell in ("NULL", "null") and _is_property(name))}  # fmt: skip


_SPACED_TIME = re.compile(r"(\d{4}-\d\d-\d\d) (\d\d:\d\d:\d\d(?:\.\d{1,9})?)", re.ASCII)


def _with_zone(text: Any) -> Any:
    match = _SPACED_TIME.fullmatch(text or "")
    return f"{match[1]}T{match[2]}Z" if match else text


def _csv_row(cells: dict[str, str], faults: Faults) -> TableRow:
    """Make a TableRow from the cells of a CSV row. Raises ApiError if a cell is not UTF-8."""
    try:
        "".join(cells.values()).encode()
    except UnicodeEncodeError:
        raise_fault("line", "invalid_format", "is not UTF-8")
    named = {name.removeprefix(PROPERTY_PREFIX): cell for name, cell in cells.items() if _is_property(name)}
    row = TableRow()
    for name in cells.keys() & _TABLE_FIELDS:
        setattr(row, name, _cell_text(cells[name]))
    row.named = Raw(ENCODER.encode(named) if named else b"")
    row.event_id = faults.check("event_id", _id_text, cells.get("id") or cells.get("event_id"))
    if "id" in cells:  # FlexPrice's own table, whose times are UTC but do not say so
        row.timestamp, row.ingested_at = _with_zone(row.timestamp), _with_zone(row.ingested_at)
    return row


_NULL = Raw(b"null")


def _is_same_value(left: Raw, right: Raw) -> bool:
    """Compare two JSON values; an integer and a float are equal if they are the same double."""
    values = msgspec.json.decode(left), msgspec.json.decode(right)
    if {*map(type, values)} == {int, float}:
        return float(values[0]) == float(values[1])
    return bool(values[0] == values[1])


def _merged_properties(properties: bytes, named: dict[str, Raw]) -> bytes:
    """Add the properties of columns `properties.NAME`. Raises ApiError if `properties` differs from a column."""
    try:
        members = MEMBERS.decode(check_properties(properties))
    except FieldError:
        return properties  # event_row() reports this fault
    for name in sorted(named.keys() & members.keys()):
        if not _is_same_value(named[name], members[name]):
            raise_fault(PROPERTY_PREFIX + name, "invalid_format", "has another value in the column properties")
    if named.keys() <= members.keys():
        return properties  # unchanged, including its white space
    return ENCODER.encode(members | named | members)


def _table_event(row: TableRow) -> EventIn:
    """Return the event of a table's row, without its times. Raises ApiError if a property has two values."""
    properties = row.properties.encode() if row.properties else bytes(row.members)
    named: dict[str, Raw] = MEMBERS.decode(row.named) if row.named else {}
    if named := {name: value for name, value in named.items() if value != _NULL}:
        properties = _merged_properties(properties, named)
    return EventIn(row.event_name, row.external_customer_id, row.event_id, row.customer_id, row.source, None,
                   Raw(properties))  # fmt: skip


def _time_us(value: int | str) -> int:
    """Return a table's time in microseconds since 1970. Raises FieldError."""
    if isinstance(value, str):
        return parse_time(value)
    if not MIN_TIME_US <= value <= MAX_TIME_US:
        raise FieldError("out_of_range", f"must lie in the years 1 to 9999 in UTC, got {value} microseconds from 1970")
    return value


def _with_times(row: Row, columns: TableRow, faults: Faults) -> Row:
    """Return the row to store with the times of a table's row, where the table has them."""
    timestamp_us = faults.check("timestamp", _time_us, None if columns.timestamp == "" else columns.timestamp)
    ingested_at_us = faults.check("ingested_at", _time_us, columns.ingested_at)
    if timestamp_us is None or timestamp_us == MIN_TIME_US:  # Go's zero time counts as absent
        timestamp_us = row.timestamp_us
    if ingested_at_us is None:
        ingested_at_us = row.ingested_at_us
    return Row(*row[:-3], timestamp_us, ingested_at_us, row.properties)  # takes half the time of _replace()


def checked_row(entry: Entry, now: int, make_id: IdMaker, faults: Faults) -> CheckedRow:
    """Check an entry like an event that came over HTTP. Raises ApiError listing all its faults."""
    if entry.problem:
        raise_fault(entry.unit, "invalid_format", entry.problem)
    columns = None
    if isinstance(entry.content, bytes):
        event = _json_event(entry.content, faults)
    else:
        columns = _csv_row(entry.content, faults) if isinstance(entry.content, dict) else entry.content
        event = _table_event(columns)
    has_id = bool(event.event_id)
    event.event_id = event.event_id or _content_id(entry)
    row = event_row(event, 0, now, make_id, faults)
    if columns:
        row = _with_times(row, columns, faults)
    faults.raise_any()
    return CheckedRow(row, has_id, row.timestamp_us != now)


# ---------------------------------------------------------------------------------------------- rejected entries

_ANY_JSON = msgspec.json.Decoder(Raw)


def shown_content(content: Content) -> Any:
    """Return an entry's content for the file of rejects: as JSON, or as text if it is not JSON."""
    if isinstance(content, dict):
        return {column: _printable(cell) for column, cell in content.items()}
    if isinstance(content, TableRow):
        times = {name: to_datetime(time) for name in ("timestamp", "ingested_at")
                 if isinstance(time := getattr(content, name), int) and MIN_TIME_US <= time <= MAX_TIME_US}  # fmt: skip
        return replace(content, **times)
    try:
        decode(_ANY_JSON, content)
        return Raw(msgspec.json.format(content, indent=-1))
    except (ApiError, RecursionError, msgspec.DecodeError):
        return content.decode(errors="replace")
