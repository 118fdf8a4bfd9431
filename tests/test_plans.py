"""Check which index each query uses and how many rows it reads."""

from __future__ import annotations

import itertools
import json
import random
import re
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import httpx
import pytest

import eventstore
from eventstore_extras import usage as usage_extra
from helpers import DAY_US, NOW, Json, at, event, ids, page, serving, store, store_of, table
from oracle import cursor, expected_page, matches, sort_key


def counting(counter: Iterator[int]) -> Callable[[], None]:
    """Return a progress handler that counts the virtual machine instructions of SQLite."""

    def count() -> None:
        next(counter)

    return count


def assert_sorts_only_ties(plan: str) -> None:
    """Check that the index has the order of the page, or all of it but the id if the index is one without it."""
    sorts = re.findall("USE TEMP B-TREE FOR (.*)", plan)
    if re.search("INDEX events_by_(customer|name) ", plan):
        assert set(sorts) <= {"RIGHT PART OF ORDER BY", "LAST TERM OF ORDER BY"}  # older and newer SQLite
    else:
        assert sorts == []


@table("descending", [True, False], ids=["desc", "asc"])
@table("by_name", [False, True], ids=["timestamp", "event_name"])
@table("filters", [{}, {"external_customer_id": "cust"}, {"event_name": "call"}], ids=str)
def test_a_deep_page_uses_an_index_and_costs_no_more_than_the_first(
    many: httpx.Client, by_name: bool, descending: bool, filters: dict[str, Any]
) -> None:
    query: Json = {"view": eventstore.View("development", NOW), "start_us": NOW - DAY_US, "end_us": NOW, "filters": filters, "offset": 0,
             "property_filters": {}, "page_size": 20, "by_name": by_name, "descending": descending, "after": None,
             "before": None, "count": None}  # fmt: skip
    pages = [{}, *[{side: number} for side in ("after", "before") for number in (100, 900)]]
    if by_name and "external_customer_id" in filters:
        del pages[0]  # no index has this order; all events of the customer are read and sorted
    steps = []
    with closing(sqlite3.connect(store_of(many).path)) as conn:
        for one in pages:
            cursors = {side: eventstore.Cursor(NOW + number - 2000, f"{number:04}") for side, number in one.items()}
            statements: list[str] = []
            counter = itertools.count()
            conn.set_trace_callback(statements.append)
            conn.set_progress_handler(counting(counter), 1)
            found = eventstore.list_events(conn, eventstore.EventQuery(**query | cursors))
            assert len(json.loads(bytes(found.events))) == 20
            conn.set_trace_callback(None)
            conn.set_progress_handler(None, 1)
            steps.append(next(counter))  # instructions of SQLite: a measure of cost that is the same on every computer
            (statement,) = [text for text in statements if "ORDER BY" in text]
            plan = "\n".join(row[3] for row in conn.execute(f"EXPLAIN QUERY PLAN {statement}"))
            assert "SEARCH events USING" in plan
            assert "SCAN events" not in plan
            if by_name and "external_customer_id" in filters:
                # sorting one customer's events is cheaper than scanning the events of all customers by name
                assert "events_by_customer" in plan
            else:
                assert_sorts_only_ties(plan)
    if not (by_name and "external_customer_id" in filters):
        assert max(steps) < 2 * min(steps)


@table("filters", [{"external_customer_id": "cust"}, {"event_name": "call"}], ids=str)
def test_a_page_among_many_events_of_one_microsecond_makes_only_its_own_json(
    tmp_path: Path, filters: dict[str, Any]
) -> None:
    path, ties = str(tmp_path / "events.db"), 2000
    eventstore.prepare_file(path)
    with closing(eventstore.connect(path)) as conn:
        environment = eventstore.environment_number(conn, "development")
        shuffled = [f"{number * 7 % ties:04}" for number in range(ties)]
        rows = [eventstore.Row(environment, id, "cust", "", "call", "", NOW - 1, NOW, "{}") for id in shuffled]
        eventstore.insert_events(conn, rows, 1)
    query = eventstore.EventQuery(
        view=eventstore.View("development", NOW), start_us=NOW - DAY_US, end_us=NOW, filters=filters, offset=0,
        property_filters={}, page_size=20, by_name=False, descending=True, after=eventstore.Cursor(NOW - 1, "1000"),
        before=None, count=False,
    )  # fmt: skip
    counter = itertools.count()
    with closing(sqlite3.connect(path)) as conn:
        conn.set_progress_handler(counting(counter), 1)
        found = json.loads(bytes(eventstore.list_events(conn, query).events))
        conn.set_progress_handler(None, 1)
    assert [each["id"] for each in found] == [f"{number:04}" for number in range(999, 979, -1)]
    assert next(counter) < 25 * ties  # 38 if the JSON of each event is made before the sort


RARE = {"external_customer_id": "rare", "event_name": "rare", "id": "0500"}
COMMON = {"external_customer_id": "cust", "event_name": "call", "source": ""}


@pytest.fixture(scope="module")
def rare_among_many(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The path of a file with 3,000 events: ten of a rare customer, ten others with a rare name."""
    path = str(tmp_path_factory.mktemp("rare") / "events.db")
    eventstore.prepare_file(path)
    with closing(eventstore.connect(path)) as conn:
        environment = eventstore.environment_number(conn, "development")
        rows = [
            eventstore.Row(environment, f"{number:04}", "rare" if number % 300 == 50 else "cust", "",
                           "rare" if number % 300 == 250 else f"call{number % 7}" if number % 2 else "call", "",
                           NOW - 3000 + number, NOW, "{}")
            for number in range(3000)
        ]  # fmt: skip
        eventstore.insert_events(conn, rows, 5)
    return path


@table(
    "rare",
    [names for n in range(4) for names in itertools.combinations(RARE, n)],
    ids=lambda names: "+".join(names) or "none",
)
@table(
    "common",
    [names for n in range(4) for names in itertools.combinations(COMMON, n)],
    ids=lambda names: "+".join(names) or "none",
)
def test_a_page_reads_only_the_rows_of_its_id_customer_or_name(
    rare_among_many: str, common: tuple[str, ...], rare: tuple[str, ...]
) -> None:
    """Try every combination of filters, sorts and cursors. Reading a row takes SQLite about 60 instructions."""
    filters = {name: COMMON[name] for name in common} | {name: RARE[name] for name in rare}
    if "id" in rare:
        rows = 1
    elif "external_customer_id" in filters:  # uses the index by customer even if the name is rarer
        rows = 10 if "external_customer_id" in rare else 3000
    else:
        rows = 10 if rare else 60  # without a rare filter an index has the order: only the page is read
    half = eventstore.Cursor(NOW - 1500, "1500")
    sides = [(None, None), (half, None), (None, half)]
    with closing(eventstore.connect_reader(rare_among_many)) as conn:
        statements: list[str] = []
        for by_name, descending, (after, before) in itertools.product([False, True], [False, True], sides):
            query = eventstore.EventQuery(view=eventstore.View("development", NOW), start_us=NOW - DAY_US, end_us=NOW, filters=filters,
                                          offset=0, page_size=20, by_name=by_name, descending=descending, count=None, after=after,
                                          before=before)  # fmt: skip
            counter = itertools.count()
            conn.set_progress_handler(counting(counter), 1)
            conn.set_trace_callback(statements.append)
            eventstore.list_events(conn, query)
            assert next(counter) < 100 * rows + 1500, (by_name, descending, after, before)
            conn.set_trace_callback(None)
            if not (by_name and "external_customer_id" in filters) and "id" not in filters:
                statement = next(text for text in statements if "ORDER BY" in text)
                assert_sorts_only_ties("\n".join(row[3] for row in conn.execute(f"EXPLAIN QUERY PLAN {statement}")))
            statements.clear()


@table(
    ("filters", "index"),
    [({}, "time"), ({"external_customer_id": "cust"}, "customer"), ({"event_name": "call"}, "name"), ({"source": ""}, "time"),
     ({"event_name": "call", "external_customer_id": "cust"}, "customer"), ({"external_customer_id": "cust", "id": "0001"}, "id")],
    ids=str,
)  # fmt: skip
def test_each_query_uses_the_index_that_suits_its_filters(
    many: httpx.Client, filters: dict[str, Any], index: str
) -> None:
    query: Json = {"view": eventstore.View("development", NOW), "start_us": NOW - DAY_US, "end_us": NOW, "filters": filters,
             "property_filters": {}}  # fmt: skip
    page: Json = {
        "offset": 0,
        "page_size": 20,
        "by_name": False,
        "descending": True,
        "after": None,
        "before": None,
        "count": True,
    }
    statements: list[str] = []
    with closing(eventstore.connect_reader(store_of(many).path)) as conn:
        conn.set_trace_callback(statements.append)
        eventstore.list_events(conn, eventstore.EventQuery(**query | page))
        for kind in ("COUNT", "SUM", "MAX", "LATEST"):
            aggregation = usage_extra.UsageQuery(**query, aggregation=kind, property_name="n")
            usage_extra.select_cells(conn, aggregation, [eventstore.Span(0, NOW, 0)])
        conn.set_trace_callback(None)
        selects = [text for text in statements if "FROM events" in text]
        assert len(selects) == 5
        for statement in selects:
            plan = [row[3] for row in conn.execute(f"EXPLAIN QUERY PLAN {statement}")]
            used = {
                re.findall(r"INDEX (\w+) ", step)[0]
                for step in plan
                if "SEARCH events" in step and "PRIMARY KEY" not in step
            }
            assert (used, [step for step in plan if "SCAN events" in step]) == ({f"events_by_{index}"}, [])


# ---------------------------------------------------------------------------------------------- ties


def tied_events(choose: random.Random) -> list[Json]:
    """Return 800 events with three times, a few customers and names, and ids in no order."""
    ids = [f"{number:04}" for number in range(800)]
    choose.shuffle(ids)
    return [
        event(event_id, external_customer_id=choose.choice(["a", "b"]), source="", timestamp=at(-choose.choice([1, 2, 2, 3])),
              event_name=choose.choice(["call", "call", "größe", "z"]))
        for event_id in ids
    ]  # fmt: skip


@pytest.fixture(scope="module")
def ties(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[httpx.Client, list[Json]]]:
    """A client of an application, and its events."""
    events = tied_events(random.Random(1))
    with serving(tmp_path_factory.mktemp("ties")) as client:
        store(client, *events)
        yield client, events


@pytest.mark.slow
@table("order", ["desc", "asc"])
@table("sort", ["timestamp", "event_name"])
@table(
    "filters",
    [{}, {"external_customer_id": "a"}, {"event_name": "call"}, {"event_name": "z", "external_customer_id": "b"}],
    ids=str,
)
def test_pages_among_hundreds_of_ties_are_right_at_any_depth(
    ties: tuple[httpx.Client, list[Json]], filters: Json, sort: str, order: str
) -> None:
    client, events = ties
    query = {**filters, "sort": sort, "order": order, "page_size": 50}
    matching = sorted((each for each in events if matches(each, query)), key=sort_key(sort), reverse=order == "desc")
    answer, seen = page(client, "POST", **query), list[str]()
    while True:
        seen += [each["id"] for each in answer["events"]]
        if not answer["has_more"]:
            break
        answer = page(client, "POST", **query, iter_last_key=answer["iter_last_key"])
    assert seen == [each["event_id"] for each in matching]
    for mark in matching[:: len(matching) // 4]:
        for side in ("iter_last_key",) if order == "asc" else ("iter_last_key", "iter_first_key"):
            expected = expected_page(events, query, side, mark)
            answer = page(client, "POST", **query, **{side: cursor(mark)})
            assert [each["id"] for each in answer["events"]] == [each["event_id"] for each in expected["events"]]
            del expected["events"]
            assert {name: answer[name] for name in expected} == expected
    for offset in (1, len(matching) - 3):
        expected = expected_page(events, query, offset=offset)
        assert ids(client, "POST", **query, offset=offset) == [each["event_id"] for each in expected["events"]]
