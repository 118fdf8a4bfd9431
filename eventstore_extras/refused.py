"""Finds the events that FlexPrice would lose, and keeps them, with those that a target refuses, in a file.

FlexPrice answers 202 before it has stored an event. The rules here find the events that it then loses or breaks on.
`replay` and forwarding put them aside instead of sending them.
"""

from __future__ import annotations

import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
from msgspec import Raw, structs

from eventstore import DECIMAL, ENCODER, Row, plural, quoted, real_path, to_datetime
from eventstore_extras.entries import ExportedEvent, exported_event
from eventstore_extras.files import private_opener, sync_folder

__all__ = [
    "MAX_EVENT_BYTES", "RULES", "Rule", "Unfit", "add_counts", "append_lines", "queued_bytes", "refused_line",
    "refused_path", "shown_counts", "unfit_for_flexprice",
]  # fmt: skip

# ---------------------------------------------------------------------------------------------- what FlexPrice writes

_ENVELOPE_BYTES = 512  # what FlexPrice and Kafka add, except the two ids that they repeat
_MAX_NUMBER = 1e23
_EXPONENT_FROM = 1e21  # FlexPrice writes smaller numbers in full
_MIN_INTEGER, _MAX_INTEGER = -(2**63) + 512, 2**64 - 1024  # from here on the nearest 64-bit float is beyond 64 bits
_PROPERTIES = msgspec.json.Decoder()
_NUMBER_STARTS = frozenset("+-.0123456789")


class _LargeNumber(NamedTuple):
    value: float
    shown: str
    is_text: bool  # a string that spells a number


def _float_of(value: float) -> float:
    try:
        return float(value)
    except OverflowError:
        return math.inf if value > 0 else -math.inf


def _large_numbers(properties: str) -> list[_LargeNumber]:
    """Return the numbers that no 64-bit integer holds, and the strings that spell a number of 1e23 or more.

    FlexPrice reads each number as a 64-bit float, and writes 2**64 - 1 and -2**63 as integers beyond 64 bits.
    """
    try:
        values: list[Any] = [_PROPERTIES.decode(properties)]
    except (ValueError, msgspec.MsgspecError):  # an earlier version stored such numbers
        return [_LargeNumber(math.inf, "that no 64-bit float can hold", is_text=False)]
    found = []
    for value in values:  # the list grows while it is read
        kind = type(value)
        if kind is str:
            is_number = len(value) > 3 and value[0] in _NUMBER_STARTS and DECIMAL.fullmatch(value)
            if is_number and abs(float(value)) >= _MAX_NUMBER:
                found.append(_LargeNumber(float(value), quoted(value), is_text=True))
        elif kind is int or kind is float:
            if not _MIN_INTEGER < value < _MAX_INTEGER:
                found.append(_LargeNumber(_float_of(value), str(value)[:100], is_text=False))
        elif kind is dict:
            values += value.values()
        elif kind is list:
            values += value
    return found


def _as_written(value: Any) -> Any:
    """Return a JSON value with its numbers as FlexPrice writes them."""
    if isinstance(value, dict):
        return {key: _as_written(member) for key, member in value.items()}
    if isinstance(value, list):
        return [_as_written(item) for item in value]
    if isinstance(value, bool) or not isinstance(value, int | float):
        return value
    number = _float_of(value)
    if 1e-6 <= abs(number) < _EXPONENT_FROM:
        return Raw(f"{Decimal(repr(number)):f}".removesuffix(".0").encode())
    return Raw(repr(number).removesuffix(".0").encode())


def queued_bytes(row: Row) -> int:
    """Return the size that the event has in FlexPrice's queue, overestimated by about 100 bytes."""
    event = structs.asdict(exported_event(row))
    with suppress(ValueError, msgspec.MsgspecError):  # an earlier version stored a number that no float can hold
        event["properties"] = _as_written(msgspec.json.decode(row.properties))
    written = ENCODER.encode(event)
    escaped = sum(5 * written.count(sign) for sign in (b"<", b">", b"&"))
    escaped += sum(3 * written.count(sign.encode()) for sign in ("\u2028", "\u2029"))
    repeated = len(row.id.encode()) + len(row.external_customer_id.encode())
    return len(written) + escaped + repeated + _ENVELOPE_BYTES


# ---------------------------------------------------------------------------------------------- the rules

MAX_EVENT_BYTES = 1_000_000  # Kafka's client refuses a longer message
_LONGEST_SPELLING = 6  # bytes that FlexPrice may write for one byte of the event: it writes "<" as "\u003c"
_MIN_TIME_US = int(datetime(1678, 1, 1, tzinfo=UTC).timestamp()) * 1_000_000
_MAX_TIME_US = (2**63 - 1) // 1000  # 2262-04-11: the last nanosecond that fits into 64 bits


class _Candidate(NamedTuple):
    """An event that is to be sent."""

    row: Row
    max_bytes: int
    numbers: list[_LargeNumber]


class Rule(NamedTuple):
    """A kind of event that FlexPrice loses or breaks on, and why."""

    reason: str
    find: Callable[[_Candidate], str]  # returns the fault of an event, or ""
    consequence: str


class Unfit(NamedTuple):
    """The reason to put an event aside."""

    reason: str  # of the rule: events are counted by it
    text: str


def _find_length(event: _Candidate) -> str:
    size = queued_bytes(event.row)
    if size <= event.max_bytes:
        return ""
    return f"it has {size:,} bytes in FlexPrice's queue, more than {event.max_bytes:,}"


def _find_time(event: _Candidate) -> str:
    if _MIN_TIME_US <= event.row.timestamp_us <= _MAX_TIME_US:
        return ""
    return f"its timestamp {to_datetime(event.row.timestamp_us).isoformat()} is not from 1678-01-01 to 2262-04-11"


def _find_number(event: _Candidate) -> str:
    found = next((number.shown for number in event.numbers if abs(number.value) >= _MAX_NUMBER), "")
    return f"its properties have the number {found}, which is too large: 1e23 or more" if found else ""


def _find_integer(event: _Candidate) -> str:
    in_full = (number for number in event.numbers if not number.is_text and abs(number.value) < _EXPONENT_FROM)
    found = next((number.shown for number in in_full), "")
    return f"its properties have the integer {found}, which does not fit into 64 bits" if found else ""


RULES = (
    Rule("too_long", _find_length, "FlexPrice answers 202, and then its queue refuses the event: it is lost"),
    Rule("time_out_of_range", _find_time, "FlexPrice stores another year"),
    Rule("number_too_large", _find_number, "FlexPrice's consumer fails on it again and again if a meter counts it, "
         "and then takes in no more events"),
    Rule("integer_too_large", _find_integer, "FlexPrice cannot read any of the event's properties"),
)  # fmt: skip


def unfit_for_flexprice(row: Row, sent: bytes, max_bytes: int) -> Unfit | None:
    """Return why FlexPrice would lose an event or break on it, or None. `sent` is the event as JSON."""
    numbers = _large_numbers(row.properties)
    is_short = len(sent) * _LONGEST_SPELLING + 2 * _ENVELOPE_BYTES <= max_bytes
    if is_short and not numbers and _MIN_TIME_US <= row.timestamp_us <= _MAX_TIME_US:
        return None  # nearly all events end here, after checks that cost little
    event = _Candidate(row, max_bytes, numbers)
    for rule in RULES:
        if fault := rule.find(event):
            return Unfit(rule.reason, f"not sent: {fault}. {rule.consequence}")
    return None


# ---------------------------------------------------------------------------------------------- the file


class _RefusedEvent(ExportedEvent):
    """A line of the file of refused events: an event and three fields that `import` and a target ignore."""

    refused_at: datetime
    refused_by: str
    refusal: str


def refused_path(db: str) -> Path:
    return Path(f"{real_path(db)}.refused.ndjson")


def refused_line(row: Row, target: str, refusal: str, now_us: int) -> bytes:
    event = structs.asdict(exported_event(row))
    return ENCODER.encode(_RefusedEvent(**event, refused_at=to_datetime(now_us), refused_by=target, refusal=refusal))


def append_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Append lines to a file and sync it."""
    is_new = not path.exists()
    with open(path, "ab+", opener=private_opener) as file:
        if file.tell():
            file.seek(-1, os.SEEK_END)
            file.write(b"\n" * (file.read() != b"\n"))  # end a line that a power cut left incomplete
        file.writelines(line + b"\n" for line in lines)
        file.flush()
        os.fsync(file.fileno())
    if is_new:
        sync_folder(path)


# ---------------------------------------------------------------------------------------------- counts


def add_counts(counts: dict[str, int], reasons: Iterable[str]) -> None:
    for reason, number in Counter(reasons).items():
        counts[reason] = counts.get(reason, 0) + number


def shown_counts(counts: Mapping[str, int]) -> str:
    """Return the number of events, and the number for each reason, as text."""
    reasons = ", ".join(f"{number:,} {reason.replace('_', ' ')}" for reason, number in counts.items() if number)
    return f"{plural(sum(counts.values()), 'event')} put aside ({reasons})"
