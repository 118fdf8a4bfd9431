"""What meters and features share: names, rows, archiving and lists (API: Lists).

From top to bottom: numbers, times and names; rows; lists; the schemas of a list for the OpenAPI document.
"""

from __future__ import annotations

import math
import sqlite3
from collections.abc import Callable, Iterable, Sequence
from decimal import Decimal
from typing import Any, Protocol

from msgspec import Struct
from msgspec.structs import replace
from starlette.requests import Request

from eventstore import (
    DECIMAL,
    ENCODER,
    IN_ENVIRONMENT,
    MAX_OFFSET,
    PARAMETER_PARSERS,
    Faults,
    FieldError,
    Sql,
    T,
    View,
    all_of,
    check_offset,
    check_order,
    given_time,
    one_of,
    parse_int,
    parse_parameters,
    parse_time,
    query_of_parameters,
    quoted,
    sql,
    to_datetime,
    whole_within,
)
from eventstore_extras.openapi import ORDER_SCHEMA, PARAMETER_SCHEMAS, TIME_SCHEMA, choice, enum_schema, ref
from eventstore_extras.usage import check_positive

__all__ = [
    "LIST_ENUMS", "LIST_PARAMETERS", "LIST_SCHEMA", "MAX_NAME_CHARS", "NAME_SCHEMA", "SORTS", "Columns", "Done",
    "ListQuery", "Pagination", "Sort", "archive_row", "check_decimal", "check_length", "check_name",
    "check_positive_decimal", "check_sort", "decimal_text", "fetch_page", "insert_row", "is_any_of", "list_query",
    "parse_list", "plain_decimal", "sorts_by", "time_text", "update_row",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- Texts and names

MAX_NAME_CHARS = 255  # of a name, an event name or a lookup key


def plain_decimal(number: Decimal) -> str:
    """Write a number without an exponent and without zeros at the end of its fraction."""
    digits = format(number, "f")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits


def decimal_text(value: float) -> str:
    """Write whole numbers below 2**53 in full, others to 15 significant digits (API: Analytics)."""
    if value.is_integer() and abs(value) < 2**53:
        return str(int(value))
    return plain_decimal(Decimal(f"{value:.15g}"))


def time_text(time_us: int) -> str:
    """Write a time as Go does, without zeros at the end of the fraction (API: Times)."""
    seconds, dot, digits = to_datetime(time_us).isoformat().removesuffix("+00:00").partition(".")
    return f"{seconds}{dot}{digits.rstrip('0')}Z"


def check_length(field: str, value: str | None, faults: Faults, max_chars: int = MAX_NAME_CHARS) -> str:
    """Check the length of an optional text; return "" if it is absent."""
    if value and len(value) > max_chars:
        faults.add(field, "out_of_range", f"may have {max_chars} characters, got {len(value)}")
    return value or ""


def check_name(field: str, value: str | None, faults: Faults) -> str:
    """Check a required text of up to 255 characters."""
    if not value:
        faults.add(field, "required", "is required")
    return check_length(field, value, faults)


def check_decimal(value: str | float) -> float:
    """Check a number or its text, of any sign. Raises FieldError."""
    text = str(value)
    if not DECIMAL.fullmatch(text) or math.isinf(float(text)):
        raise FieldError("invalid_format", f"must be a decimal number, got {quoted(text)}")
    return float(text)


def check_positive_decimal(value: str | float) -> float:
    """Check a number or its text. Raises FieldError: invalid_format for other texts, out_of_range for 0 or less."""
    check_decimal(value)
    return check_positive(value)


# ---------------------------------------------------------------------------------------------- Rows

Columns = dict[str, Any]  # name -> value, of a new row


class Done(Struct):
    """The answer to a request that archived a meter or a feature."""

    message: str


def insert_row(conn: sqlite3.Connection, table: str, view: View, columns: Columns) -> None:
    """Insert a meter or a feature into the view's environment."""
    values = columns | {"created_at_us": view.now_us, "updated_at_us": view.now_us}
    selected = ", ".join(f":{name}" for name in values)
    statement = f"""INSERT INTO {table} (environment, {", ".join(values)})
        SELECT environments.id, {selected} FROM environments WHERE environments.name = :environment"""
    conn.execute(statement, values | {"environment": view.environment})


def update_row(conn: sqlite3.Connection, table: str, view: View, row_id: str, columns: Columns) -> None:
    """Change columns of a meter or a feature."""
    changed = columns | {"updated_at_us": view.now_us}
    assignments = ", ".join(f"{name} = :{name}" for name in changed)
    statement = f"UPDATE {table} SET {assignments} WHERE {IN_ENVIRONMENT} AND id = :id"
    conn.execute(statement, {**changed, "environment": view.environment, "id": row_id})


def archive_row(conn: sqlite3.Connection, table: str, view: View, row_id: str, unless: str = "FALSE") -> None:
    """Archive a meter or a feature unless a condition on its row holds. If it is archived already, keep its times."""
    statement = f"""UPDATE {table}
        SET archived_at_us = ifnull(archived_at_us, :now_us), updated_at_us = ifnull(archived_at_us, :now_us)
        WHERE {IN_ENVIRONMENT} AND id = :id AND NOT {unless}"""
    conn.execute(statement, {"environment": view.environment, "id": row_id, "now_us": view.now_us})


# ---------------------------------------------------------------------------------------------- Lists

_DEFAULT_LIMIT, _MAX_LIMIT = 50, 1000
_STATUSES = ("published", "archived", "deleted", "inactive", "active", "draft")  # the last four match no row
_SORTS = {"created_at": "created_at_us", "updated_at": "updated_at_us", "name": "name", "id": "id",
          "status": "archived_at_us IS NULL"}  # fmt: skip
# The fields by which each table can be sorted, with their SQL.
SORTS = {
    "meters": _SORTS | {"event_name": "event_name", "reset_usage": "reset_usage"},
    "features": _SORTS | {"lookup_key": "lookup_key", "type": "type"},
}
Sort = tuple[str | None, str | None]  # field (None: created_at), direction (None: the list's order)


class Pagination(Struct):
    total: int
    limit: int
    offset: int  # where the next page starts


class _ListIn(Protocol):
    """The fields that the requests for all lists have."""

    limit: int | float | None
    offset: int | float | None
    status: str | None
    order: str | None
    start_time: str | None
    end_time: str | None


class ListQuery(Struct, frozen=True):
    """A checked list: which rows, in which order, and which page of them."""

    where: Sql
    order_by: str
    limit: int
    offset: int

    def narrowed(self, *clauses: Sql) -> ListQuery:
        """Return the same list with more conditions."""
        return replace(self, where=all_of([self.where, *clauses]))


_check_status = one_of(*_STATUSES)
_check_limit = whole_within(0, _MAX_LIMIT)


def parse_list(struct: type[T], request: Request, repeatable: Iterable[str], faults: Faults) -> T:
    """Make the struct of a list from a query string; `repeatable` names the parameters that become arrays."""
    arrays: dict[str, Callable[[str], Any]] = {name: lambda text: text.split(",") for name in repeatable}
    parameters = parse_parameters(request["query_string"], faults, repeatable)
    names = [name for name in struct.__struct_fields__ if name != "filters"]  # type: ignore[attr-defined]
    parsers = PARAMETER_PARSERS | {"limit": parse_int} | arrays
    return query_of_parameters(struct, parameters, names, faults, parsers)


def check_sort(table: str) -> Callable[[str], str]:
    """Make a check that a text is a field by which the table can be sorted."""
    return one_of(*SORTS[table])


def sorts_by(table: str, names: Iterable[Any], faults: Faults) -> list[Sort]:
    """Make the sort from the fields that a query string names; `order` is the direction of all."""
    return [(faults.check("sort", check_sort(table), name), None) for name in names]


def _created_within(table: str, sent: _ListIn, faults: Faults) -> list[Sql]:
    """Build the conditions for start_time and end_time, both inclusive."""
    start_us = faults.check("start_time", parse_time, given_time(sent.start_time))
    end_us = faults.check("end_time", parse_time, given_time(sent.end_time))
    if start_us is not None and end_us is not None and end_us < start_us:
        problem = f"is {quoted(sent.end_time or '')}, before {quoted(sent.start_time or '')}"
        faults.add("end_time", "out_of_range", problem)
    since = [] if start_us is None else [sql(f"{table}.created_at_us >= :since_us", since_us=start_us)]
    until = [] if end_us is None else [sql(f"{table}.created_at_us <= :until_us", until_us=end_us)]
    return [*since, *until]


def _has_status(table: str, status: str | None) -> list[Sql]:
    if status is None:
        return []
    archived_at = f"{table}.archived_at_us"
    conditions = {"published": f"{archived_at} IS NULL", "archived": f"{archived_at} IS NOT NULL"}
    return [sql(conditions.get(status, "FALSE"))]


def _order_by(table: str, sorts: Sequence[Sort], order: str) -> str:
    """Build the terms of ORDER BY. The last one is the id, in the direction of the term before it."""
    checked = [(field or "created_at", direction or order) for field, direction in sorts or [(None, None)]]
    terms = [f"{table}.{SORTS[table][field]} {direction}" for field, direction in checked]
    return ", ".join([*terms, f"{table}.id {checked[-1][1]}"])


def list_query(table: str, sent: _ListIn, sorts: Sequence[Sort], environment: str, faults: Faults) -> ListQuery:
    """Check the fields that all lists have, and record their faults (API: Lists)."""
    where = sql(f"{table}.{IN_ENVIRONMENT}", environment=environment)
    created = _created_within(table, sent, faults)
    status = faults.check("status", _check_status, sent.status)
    order = faults.check("order", check_order, sent.order) or "desc"
    limit = faults.check("limit", _check_limit, sent.limit) or _DEFAULT_LIMIT
    offset = faults.check("offset", check_offset, sent.offset) or 0
    where = all_of([where, *created, *_has_status(table, status)])
    return ListQuery(where, _order_by(table, sorts, order), limit, offset)


def is_any_of(column: str, values: Iterable[object], name: str) -> Sql:
    """Build `column IN (...)` with one parameter for all values: SQLite may limit a statement to 32,766 parameters."""
    return sql(f"{column} IN (SELECT value FROM json_each(:{name}))", **{name: ENCODER.encode(list(values)).decode()})


def fetch_page(
    conn: sqlite3.Connection, columns: str, tables: str, query: ListQuery
) -> tuple[list[tuple[Any, ...]], Pagination]:
    """Return the rows of the page, and the number of rows on all pages."""
    found = f"FROM {tables} WHERE {query.where}"
    page = f"ORDER BY {query.order_by} LIMIT {query.limit} OFFSET {query.offset}"
    rows = conn.execute(f"SELECT {columns} {found} {page}", query.where.values).fetchall()
    total = conn.execute(f"SELECT count(*) {found}", query.where.values).fetchone()[0]
    return rows, Pagination(total, query.limit, query.offset + query.limit)


# ---------------------------------------------------------------------------------------------- OpenAPI

_LIMIT = {"minimum": 0, "maximum": _MAX_LIMIT}
NAME_SCHEMA = {"type": "string", "minLength": 1, "maxLength": MAX_NAME_CHARS}
LIST_ENUMS = {"ListStatus": enum_schema(_STATUSES)}
LIST_SCHEMA: dict[str, Any] = {  # for the fields of a body
    **dict.fromkeys(("start_time", "end_time"), TIME_SCHEMA),
    "limit": {"type": ["integer", "null"]} | _LIMIT,
    "offset": {"type": ["integer", "null"], "minimum": 0, "maximum": MAX_OFFSET},
    "status": choice("ListStatus"), "order": ORDER_SCHEMA,
}  # fmt: skip
LIST_PARAMETERS: dict[str, Any] = {
    **{name: PARAMETER_SCHEMAS[name] for name in ("start_time", "end_time", "offset", "order")},
    "limit": {"type": "integer"} | _LIMIT, "status": ref("ListStatus"),
    "meter_ids": {"type": "string"},
}  # fmt: skip
