"""Windows of every time zone, around every change of its clocks from 2000 to 2037."""

from __future__ import annotations

import io
from bisect import bisect_left, bisect_right
from datetime import UTC, datetime, timedelta
from functools import cache
from importlib.resources import files
from itertools import pairwise
from typing import NamedTuple
from zoneinfo import ZoneInfo

import pytest

from conftest import MINUTES, event, store, table, usage, windows_of
from eventstore import Windows, to_us

DAYS = [datetime(2000, 1, 1) + timedelta(days=number) for number in range(38 * 365 + 10)]
A_SUNDAY, HOUR_S, DAY_S = datetime(2000, 1, 2), 3600, 86_400
SHORT_SIZES = {**MINUTES, "DAY": 1440}  # the change's moment and offsets are all that matters to them


class Change(NamedTuple):
    zone: ZoneInfo
    moment_s: int  # the first second of the new offset
    before: timedelta
    after: timedelta

    def wall(self, moment_s: float) -> datetime:
        return datetime.fromtimestamp(moment_s, self.zone).replace(tzinfo=None)


def seconds(naive_utc: datetime) -> int:
    return int(naive_utc.replace(tzinfo=UTC).timestamp())


def changes_of(zone: ZoneInfo) -> list[Change]:
    found, offsets = [], [zone.utcoffset(day) for day in DAYS]
    for day, (before, after) in zip(DAYS, pairwise(offsets), strict=False):
        if before != after:
            span = range(seconds(day - before), seconds(day + timedelta(days=1) - after) + 1)
            has_changed = lambda second, after=after: datetime.fromtimestamp(second, zone).utcoffset() == after  # noqa: E731
            found.append(Change(zone, span[bisect_left(span, True, key=has_changed)], before, after))
    return found


@cache
def all_changes() -> list[Change]:
    """Of each zone of tzdata; of several that are the same under other names, the first."""
    folder = files("tzdata") / "zoneinfo"
    names = (files("tzdata") / "zones").read_text().split()
    zones = {folder.joinpath(*name.split("/")).read_bytes(): name for name in reversed(names)}
    return [change for data, name in zones.items() for change in changes_of(ZoneInfo.from_file(io.BytesIO(data), name))]


def starts_by_the_minute(change: Change, minutes: int, since_s: int, until_s: int) -> list[int]:
    """Where windows start when somebody looks at the clock every minute: when it first shows what is in a later one;
    up to an hour long, whenever it shows a window's first minute."""
    found, reached = [], datetime.min
    for moment_s in range(since_s, until_s, 60):
        wall = change.wall(moment_s)
        past = (wall - A_SUNDAY) % timedelta(minutes=minutes)
        if wall - past > reached > datetime.min or (minutes <= 60 and not past):
            found.append(moment_s * 10**6)
        reached = max(reached, wall - past)
    return found


@table("size", SHORT_SIZES)
def test_short_windows_start_when_clocks_first_show_it_or_jump_over_it(size):
    """Every change of every zone: those of equal offsets at the same time of the day have the same windows."""
    alike = {(change.before, change.after, change.moment_s % DAY_S): change for change in all_changes()}
    minutes = SHORT_SIZES[size]
    hours = 4 if minutes <= 60 else 30
    for change in alike.values():
        since_s, until_s = change.moment_s - hours * HOUR_S, change.moment_s + hours * HOUR_S
        windows, end_us = Windows(size, change.zone), until_s * 10**6
        bounds = windows.bounds(since_s * 10**6, end_us)
        assert bounds[0] <= since_s * 10**6 < bounds[1], change
        assert bounds[-2] < end_us <= bounds[-1], change
        assert [start for start in bounds[1:] if start < end_us] == [
            start for start in starts_by_the_minute(change, minutes, since_s, until_s) if start > since_s * 10**6
        ], change
        for after_s in (-3600.5, -1800, -0.000001, 0, 1, 899, 900, 1800, 3599.5, 3600, 5400):  # wherever a range starts
            start_us = change.moment_s * 10**6 + int(after_s * 10**6)
            assert windows.bounds(start_us, end_us) == bounds[bisect_right(bounds, start_us) - 1 :], (change, after_s)


def following(label: datetime, month_day: int | None) -> datetime:
    if month_day is None:
        return label + timedelta(days=7)
    first = label - timedelta(days=month_day - 1)
    return (first + timedelta(days=31)).replace(day=1) + timedelta(days=month_day - 1)


@table("size", ["WEEK", "MONTH"])
def test_weeks_and_months_start_at_midnight_or_when_clocks_jump_over_it(size):
    """Every change of every zone, and months that start on its day, too."""
    for change in all_changes():
        for day in {1, change.wall(change.moment_s).day} if size == "MONTH" else {None}:
            start_us, end_us = ((change.moment_s + days * DAY_S) * 10**6 for days in (-1, 34))
            bounds = Windows(size, change.zone, day or 1).bounds(start_us, end_us)
            assert all(one < other for one, other in pairwise(bounds)), change
            assert bounds[0] <= start_us < bounds[1], change
            assert bounds[-2] < end_us <= bounds[-1], change
            wall = change.wall(bounds[0] // 10**6)
            label = wall.replace(hour=0, minute=0)
            for start in bounds:
                wall, second = change.wall(start // 10**6), start / 10**6
                assert label <= wall <= label + timedelta(days=1), change  # a whole day is skipped in Samoa
                assert all(change.wall(second - back) < label for back in (1, *range(900, 6 * HOUR_S, 900))), change
                label = following(label, day)


@table("size", ["30MIN", "HOUR"])
def test_an_event_before_the_range_is_not_counted_when_clocks_go_back_between_edges(client, size):
    """In Chatham they went from 3:45 to 2:45 at 14:00 UTC."""
    store(
        client, *[event(timestamp=f"2026-04-04T{time}:00Z") for time in ("13:20", "13:59", "14:00", "14:14", "14:15")]
    )
    answer = usage(client, window_size=size, timezone="Pacific/Chatham", start_time="2026-04-04T14:00:00Z",
                   end_time="2026-04-04T15:00:00Z")  # fmt: skip
    first = {"30MIN": (13, 45), "HOUR": (13, 15)}[size]
    assert windows_of(answer) == [(datetime(2026, 4, 4, *first, tzinfo=UTC), 2), (datetime(2026, 4, 4, 14, 15, tzinfo=UTC), 1)]  # fmt: skip


@table("size", ["30MIN", "HOUR"])
def test_an_event_is_in_the_window_that_holds_it_when_clocks_jump_over_an_edge(client, size):
    """In Chatham they went from 2:45 to 3:45 at 14:00 UTC: 3:00 and 3:30 were never shown."""
    began = datetime(2025, 9, 27, 14, tzinfo=UTC)
    store(client, *[event(timestamp=(began + timedelta(minutes=minute)).isoformat()) for minute in range(30)])
    answer = usage(client, window_size=size, timezone="Pacific/Chatham", start_time=began.isoformat(),
                   end_time="2025-09-27T15:00:00Z")  # fmt: skip
    assert windows_of(answer) == [(began, 15), (began + timedelta(minutes=15), 15)]


@pytest.mark.parametrize("zone", ["America/New_York", "Pacific/Chatham"])
def test_as_many_windows_as_are_allowed_are_made_on_the_night_on_which_clocks_go_back(zone):
    start_us = to_us(datetime(2026, 11, 1, 6, 30, tzinfo=UTC))
    bounds = Windows("MINUTE", ZoneInfo(zone)).bounds(start_us, start_us + 100_000 * 60 * 10**6)
    assert len(bounds) == 100_001
