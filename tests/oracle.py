"""The rules of the API once more, in plain Python. Tests compare the server's answers with the results of these functions.

Events are dicts as a client sends them, with all fields.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo

from helpers import DAY_US, Json, at

# ---------------------------------------------------------------------------------------------- property values


def number_of(value: object) -> float:
    """Return the number that aggregations take a value for: 0 unless it is a finite number or a decimal as text."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return 0.0
    if isinstance(value, str) and not re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?", value, re.ASCII):
        return 0.0
    return float(value) if math.isfinite(float(value)) else 0.0


def number_text(number: float) -> str:
    """Return the shortest text of a 64-bit float: in full from 1e-6 to 1e21, otherwise like 1e21 and 1.5e-7."""
    if number == 0:
        return "0"
    digits, _, exponent = repr(number).removesuffix(".0").partition("e")
    return (
        f"{Decimal(repr(number)):f}".removesuffix(".0") if 1e-6 <= abs(number) < 1e21 else f"{digits}e{int(exponent)}"
    )


def _json_of(value: object) -> str:
    if isinstance(value, dict):
        return f"{{{','.join(f'{_json_of(key)}:{_json_of(value[key])}' for key in sorted(value))}}}"
    if isinstance(value, list):
        return f"[{','.join(map(_json_of, value))}]"
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return number_text(float(value))
    return json.dumps(value, ensure_ascii=False)


def text_of(value: object) -> str | None:
    """Return the text by which filters, groups and COUNT_UNIQUE compare a property (SPEC 4)."""
    return value if isinstance(value, str) or value is None else _json_of(value)


def has_properties(event: Json, conditions: Iterable[tuple[str, Sequence[str]]]) -> bool:
    """Return whether each key has one of its values; null and a missing property equal no value."""
    properties = event.get("properties") or {}
    return all(text_of(properties.get(key)) in values for key, values in conditions)


# ---------------------------------------------------------------------------------------------- listing


def time_us(text: str) -> int:
    return (datetime.fromisoformat(text) - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)


def cursor(event: Json) -> str:
    return f"{time_us(event['timestamp'])}000::{event['event_id']}"


def sort_key(sort: str) -> Callable[[Json], tuple[str, ...]]:
    """Return a key function that sorts events in ascending order. Their times must be written alike."""
    names = ("event_name", "timestamp", "event_id") if sort == "event_name" else ("timestamp", "event_id")
    return lambda event: tuple(event[name] for name in names)


def matches(event: Json, query: Json) -> bool:
    """Return whether a listing finds the event, by its time range and filters (SPEC 4)."""
    end_us = time_us(query.get("end_time", at()))
    start_us = time_us(query["start_time"]) if "start_time" in query else end_us - 7 * DAY_US
    fields = [name for name in ("external_customer_id", "event_name", "source") if query.get(name)]
    return (
        start_us <= time_us(event["timestamp"]) <= end_us
        and all(event[name] == query[name] for name in fields)
        and has_properties(event, query.get("property_filters", {}).items())
    )


def expected_page(
    events: Iterable[Json], query: Json, side: str = "", mark: Json | None = None, offset: int = 0
) -> Json:
    """Return the page of a query with `count_total`, its events as they were sent (SPEC 4).

    With a `side`, iter_last_key or iter_first_key, the page begins at the cursor of the event `mark`, and the offset
    does not count.
    """
    key, descending, size = sort_key(query["sort"]), query["order"] == "desc", query["page_size"]
    reads_back = descending and side == "iter_first_key"  # in ascending order both keys lead forward
    rows = sorted((event for event in events if matches(event, query)), key=key, reverse=descending)
    if mark is None:
        candidates = rows[offset:]
    elif reads_back or not descending:
        candidates = [row for row in rows if key(row) > key(mark)]
    else:
        candidates = [row for row in rows if key(row) < key(mark)]
    found = candidates[-size:] if reads_back else candidates[:size]
    return {
        "events": found,
        "has_more": len(candidates) > size,
        "total_count": len(rows),
        "offset": None if mark else offset + size,
        "iter_first_key": cursor(found[0]) if found else None,
        "iter_last_key": cursor(found[-1]) if found else None,
    }


# ---------------------------------------------------------------------------------------------- windows

SIZES = ("MINUTE", "15MIN", "30MIN", "HOUR", "3HOUR", "6HOUR", "12HOUR", "DAY", "WEEK", "MONTH")
MINUTES = dict(zip(SIZES, (1, 15, 30, 60, 180, 360, 720), strict=False))


def window_start(time: datetime, size: str, zone: str) -> datetime:
    local = time.astimezone(ZoneInfo(zone))
    day = local.replace(hour=0, minute=0, second=0, microsecond=0, fold=0)
    if minutes := MINUTES.get(size):
        hour, minute = divmod((local.hour * 60 + local.minute) // minutes * minutes, 60)
        day = day.replace(hour=hour, minute=minute, fold=local.fold)
    elif size == "WEEK":
        day -= timedelta(days=day.isoweekday() % 7)
    elif size == "MONTH":
        day = day.replace(day=1)
    return day.astimezone(UTC)


class _Row(NamedTuple):
    """An event that an aggregation counts, with the number and the text of the aggregated property."""

    time: datetime
    event_id: str
    properties: Json
    number: float
    text: str | None


def _row(event: Json, field: str, least: float = -math.inf) -> _Row:
    value = event["properties"].get(field)
    number = max(number_of(value), least)
    return _Row(
        datetime.fromisoformat(event["timestamp"]), event["event_id"], event["properties"], number, text_of(value)
    )


def _by_window(rows: Iterable[_Row], size: str, zone: str = "UTC") -> dict[datetime, list[_Row]]:
    """Return the rows of each window that has any, in the order of time."""
    windows: dict[datetime, list[_Row]] = {}
    for row in sorted(rows, key=lambda row: row.time):
        windows.setdefault(window_start(row.time, size, zone), []).append(row)
    return windows


# ---------------------------------------------------------------------------------------------- usage

AGGREGATIONS = ("COUNT", "SUM", "AVG", "MAX", "COUNT_UNIQUE", "LATEST", "SUM_WITH_MULTIPLIER", "WEIGHTED_SUM")

Windows = list[tuple[datetime, float]]


class _Aggregation(NamedTuple):
    """How rows become one number. `start` and `end` are the range that weighs the rows of WEIGHTED_SUM."""

    kind: str
    start: datetime
    end: datetime
    multiplier: float = 1
    group_by: str = ""  # the property by which MAX is split; the maximums are added up

    def of(self, rows: Sequence[_Row]) -> float:
        """Aggregate at least one row."""
        numbers, span = [row.number for row in rows], self.end - self.start
        functions: dict[str, Callable[[], float]] = {
            "COUNT": lambda: len(rows),
            "SUM": lambda: math.fsum(numbers),
            "AVG": lambda: math.fsum(numbers) / len(rows),
            "MAX": lambda: self._sum_of_maximums(rows),
            "COUNT_UNIQUE": lambda: len({row.text for row in rows} - {None}),
            "LATEST": lambda: max(rows, key=lambda row: row[:2]).number,
            "SUM_WITH_MULTIPLIER": lambda: math.fsum(numbers) * self.multiplier,
            "WEIGHTED_SUM": lambda: math.fsum(
                row.number * ((self.end - max(row.time, self.start)) / span) for row in rows
            ),
        }
        return functions[self.kind]()

    def _sum_of_maximums(self, rows: Sequence[_Row]) -> float:
        groups: dict[str, list[float]] = {}
        for row in rows:
            groups.setdefault(text_of(row.properties.get(self.group_by)) or "", []).append(row.number)
        return math.fsum(map(max, groups.values()))


def _time_range(query: Json) -> tuple[datetime, datetime]:
    return datetime.fromisoformat(query["start_time"]), datetime.fromisoformat(query["end_time"])


def expected_usage(events: Iterable[Json], kind: str, query: Json, never_reset: bool = False) -> tuple[float, Windows]:
    """Return the value over the whole range and the value of each window (SPEC 7)."""
    start, end = _time_range(query)
    chosen = {name: query[name] for name in ("external_customer_id", "customer_id") if query.get(name)}
    chosen["event_name"] = query.get("event_name", "call")
    rows = [
        _row(event, query["property_name"])
        for event in events
        if chosen.items() <= event.items() and has_properties(event, query.get("filters", {}).items())
    ]
    rows = [row for row in rows if row.time < end and (start <= row.time or never_reset)]
    group_by = query.get("group_by", ["properties."])[0].removeprefix("properties.")
    aggregation = _Aggregation(kind, start, end, float(query.get("multiplier", 1)), group_by)
    bucket_size, zone = query.get("bucket_size"), query.get("timezone", "UTC")
    size = bucket_size or query.get("window_size")
    windows = _by_window([row for row in rows if start <= row.time], size, zone) if size else {}
    if bucket_size:
        whole = math.fsum(map(aggregation.of, _by_window(rows, bucket_size, zone).values()))
    else:
        whole = aggregation.of(rows) if rows else 0.0
    return max(whole, 0.0), [(time, max(aggregation.of(within), 0.0)) for time, within in windows.items()]


def expected_meter_usage(meter: Json, events: Iterable[Json], query: Json) -> tuple[float, Windows]:
    """Return the value and the windows of a meter (SPEC 13)."""
    how, filters = meter["aggregation"], {key: [*values] for key, values in query.get("filters", {}).items() if values}
    for condition in meter["filters"]:
        allowed = filters.get(condition["key"], condition["values"])
        filters[condition["key"]] = [value for value in condition["values"] if value in allowed]
    full_query = query | {
        "event_name": meter["event_name"],
        "property_name": how["field"],
        "filters": filters,
        "multiplier": how["multiplier"] or 1,
        "bucket_size": how["bucket_size"],
        "group_by": [f"properties.{how['group_by'] or ''}"],
    }
    return expected_usage(events, how["type"], full_query, meter["reset_usage"] == "NEVER")


# ---------------------------------------------------------------------------------------------- analytics


class Item(NamedTuple):
    """The fields of an item that tests compare, or of a point, which has neither points nor a width."""

    usage: float
    event_count: int
    points: dict[datetime, Item]
    width: str | None = None
    sources: list[str] | None = None


Group = tuple[tuple[str, str | None], ...]  # dimensions and values, in the order of the dimensions' names


def _dimensions(query: Json) -> list[str]:
    return sorted({*query.get("group_by", [])} - {"feature_id", "meter_id"})


def _group(values: Mapping[str, Any], dimensions: Iterable[str]) -> Group:
    return tuple((dimension, values.get(dimension)) for dimension in dimensions)


def _counted(meter: Json, events: Iterable[Json], query: Json) -> list[Json]:
    """Return the events of one meter that a query counts."""
    start, end = _time_range(query)
    conditions = [(each["key"], each["values"]) for each in meter["filters"]]
    conditions += [(key, values) for key, values in query.get("property_filters", {}).items() if values]
    return [
        event
        for event in events
        if event["event_name"] == meter["event_name"]
        and query.get("external_customer_id") in (None, "", event["external_customer_id"])
        and ("sources" not in query or event["source"] in query["sources"])
        and start <= datetime.fromisoformat(event["timestamp"]) < end
        and has_properties(event, conditions)
    ]


def _by_group(events: Iterable[Json], dimensions: Sequence[str]) -> dict[Group, list[Json]]:
    groups: dict[Group, list[Json]] = {}
    for event in events:
        values = {name: event[name] or None for name in ("source", "external_customer_id")}
        for dimension in dimensions:
            if dimension.startswith("properties."):
                values[dimension] = text_of(event["properties"].get(dimension.removeprefix("properties.")))
        groups.setdefault(_group(values, dimensions), []).append(event)
    return groups


def _expected_item(meter: Json, events: Sequence[Json], query: Json) -> Item:
    """Return the item of one group, whose events these are."""
    how, dimensions = meter["aggregation"], _dimensions(query)
    is_split = any(dimension.startswith(("source", "properties.")) for dimension in dimensions)
    group_by = "" if is_split else how["group_by"] or ""
    aggregation = _Aggregation(how["type"], *_time_range(query), float(how["multiplier"] or 1), group_by)

    def buckets(rows: Sequence[_Row]) -> list[float]:
        return [*map(aggregation.of, _by_window(rows, how["bucket_size"]).values())]

    def point(rows: Sequence[_Row]) -> Item:
        is_largest_bucket = how["bucket_size"] and how["type"] == "MAX"
        return Item(max(buckets(rows)) if is_largest_bucket else aggregation.of(rows), len(rows), {})

    rows = [_row(event, how["field"], least=0.0) for event in events]
    sizes = [size for size in (query.get("window_size"), how["bucket_size"]) if size]
    width = max(sizes, key=SIZES.index) if sizes else None
    windows = _by_window(rows, width) if width and query.get("window_size") else {}
    is_expanded = "source" in query.get("expand", []) and "source" not in dimensions
    return Item(
        usage=math.fsum(buckets(rows)) if how["bucket_size"] else aggregation.of(rows),
        event_count=len(rows),
        points={time: point(within) for time, within in windows.items()},
        width=width,
        sources=sorted({event["source"] for event in events} - {""}) if is_expanded else None,
    )


def expected_analytics(meter: Json, events: Iterable[Json], query: Json) -> dict[Group, Item]:
    """Return the items of one meter by group (SPEC 14)."""
    groups = _by_group(_counted(meter, events, query), _dimensions(query))
    return {group: _expected_item(meter, members, query) for group, members in groups.items()}


def _answered_items(items: Sequence[Json], query: Json) -> dict[tuple[str, Group], Item]:
    """Return the items of an answer by meter and group, after a check that each group has one item."""
    dimensions, found = _dimensions(query), {}
    for item in items:
        values = {name: item[name] for name in ("source", "external_customer_id")}
        values |= {f"properties.{key}": value for key, value in (item["properties"] or {}).items()}
        assert {name for name, value in values.items() if value is not None} <= {*dimensions}
        assert (item["properties"] is None) is not any(name.startswith("properties.") for name in dimensions)
        points = {
            datetime.fromisoformat(point["timestamp"]): Item(float(point["usage"]), point["event_count"], {})
            for point in item["points"]
        }
        assert [*points] == sorted(points)
        usage = float(item["total_usage"])
        found[item["meter_id"], _group(values, dimensions)] = Item(
            usage, item["event_count"], points, item["window_size"], item["sources"]
        )
    assert len(found) == len(items)
    return found


def is_close(got: float, wanted: float) -> bool:
    """Return whether the numbers differ by no more than what floats lose; `pytest.approx` takes 30 times as long."""
    return abs(got - wanted) <= max(1e-9 * abs(wanted), 1e-9)


def check_items(items: Sequence[Json], query: Json, expected: Mapping[tuple[str, Group], Item]) -> None:
    """Check that the answer has the expected items; usages may differ by what floats lose."""
    answered = _answered_items(items, query)
    assert answered.keys() == expected.keys(), query
    for key, wanted in expected.items():
        got = answered[key]
        assert is_close(got.usage, wanted.usage), (key, query)
        assert got._replace(usage=0, points={}) == wanted._replace(usage=0, points={}), (key, query)
        assert got.points.keys() == wanted.points.keys(), (key, query)
        usages = [(got.points[time].usage, point.usage) for time, point in wanted.points.items()]
        assert all(is_close(*pair) for pair in usages), (key, query, usages)
        event_counts = [[item.points[time].event_count for time in wanted.points] for item in (got, wanted)]
        assert event_counts[0] == event_counts[1], (key, query)
