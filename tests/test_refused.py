"""Events that FlexPrice would answer with 202 and lose: `replay` and forwarding do not send them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from eventstore import ENCODER, Row, check_properties, parse_arguments, parse_time
from eventstore_extras import refused
from eventstore_extras.entries import exported_event
from eventstore_extras.refused import MAX_EVENT_BYTES, queued_bytes, unfit_for_flexprice
from fake_target import FakeTarget, answering, forwarding, refusing
from helpers import KEY, NOW, Json, Live, command_line, event, eventually, imported, lines_of, store, table

Captured = pytest.CaptureFixture[str]
Logs = pytest.LogCaptureFixture


def row_of(properties: str = "{}", timestamp: str = "2026-11-01T00:00:00Z") -> Row:
    """Return the row of an event with this JSON text as its properties."""
    return Row(1, "a", "cust", "", "call", "", parse_time(timestamp), NOW, check_properties(properties.encode()))


def reason_of(row: Row, max_bytes: int = MAX_EVENT_BYTES) -> str | None:
    unfit = unfit_for_flexprice(row, ENCODER.encode(exported_event(row)), max_bytes)
    return unfit.reason if unfit else None


def refused_events(folder: Path) -> list[Json]:
    path = folder / "events.db.refused.ndjson"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


# ---------------------------------------------------------------------------------------------- the rules

NUMBER, INTEGER = "number_too_large", "integer_too_large"


@table(
    ("value", "reason"),
    [
        ("1e23", NUMBER),
        ("-1E+23", NUMBER),
        ("100000000000000000000000", NUMBER),
        ("3e23", NUMBER),
        ("1e308", NUMBER),
        ("-1.7e308", NUMBER),
        ('"1e23"', NUMBER),
        ('"1e400"', NUMBER),
        ('"-3e23"', NUMBER),
        ('"+3.0E+23"', NUMBER),
        ('"100000000000000000000000"', NUMBER),
        ('"0.1e999999999999"', NUMBER),
        ('"\\u0031e400"', NUMBER),
        ('"1\\u0065400"', NUMBER),
        ('[[1, {"b": [3e23]}]]', NUMBER),
        ('{"b": {"c": ["x", "-1e24"]}}', NUMBER),
        ("[1e20, 1e23]", NUMBER),
        ("9.9e22", None),
        ("1e21", None),
        ("-1e22", None),
        ('"9.99e22"', None),
        ('"99999999999999999999999"', NUMBER),  # its nearest 64-bit float is 1e23
        ('"99999999999999970000000"', None),
        ('"1e-400"', None),
        ('"1e400 tokens"', None),
        ('"e400"', None),
        ('"0x1p999"', None),
        ('"Infinity"', None),
        ('"nan"', None),
        ('"12e345678-0000-4000-8000-000000000000"', None),
        ('"18446744073709551616"', None),
        ("18446744073709551616", INTEGER),
        ("1e20", INTEGER),
        ("1.5e20", INTEGER),
        ("999999999999999900000", INTEGER),
        ("-9223372036854775809", INTEGER),
        ("-1e20", INTEGER),
        ('{"b": [[18446744073709551616]]}', INTEGER),
        ("18446744073709551615", INTEGER),  # as a 64-bit float it is 2**64
        ("-9223372036854775808", INTEGER),  # which FlexPrice writes as -9223372036854776000
        ("18446744073709549568", None),
        ("-9223372036854774784", None),
        ("9223372036854775808", None),
        ("1e19", None),
        ("-9e18", None),
        ("true", None),
        ("null", None),
        ("0", None),
        ("1e-300", None),
    ],
)
def test_a_number_that_flexprice_cannot_take_is_found_at_any_depth(value: str, reason: str | None) -> None:
    assert reason_of(row_of(f'{{"a": {value}, "z": 1}}')) == reason


def test_a_key_that_spells_a_large_number_does_no_harm() -> None:
    assert reason_of(row_of('{"1e400": 1, "b": {"3e23": "x"}}')) is None


@table(
    ("timestamp", "is_fit"),
    [
        ("1678-01-01T00:00:00Z", True),
        ("1677-12-31T23:59:59.999999Z", False),
        ("1678-01-01T00:30:00+01:00", False),
        ("1000-01-01T00:00:00Z", False),
        ("0001-01-02T00:00:00Z", False),
        ("1969-12-31T23:59:59Z", True),
        ("2262-04-11T23:47:16.854775Z", True),
        ("2262-04-11T23:47:16.854776Z", False),
        ("2262-01-01T00:00:00Z", True),
        ("2263-01-01T00:00:00Z", False),
        ("9999-12-31T23:59:59Z", False),
    ],
)
def test_a_timestamp_that_flexprice_would_turn_into_another_year_is_found(timestamp: str, is_fit: bool) -> None:
    assert reason_of(row_of(timestamp=timestamp)) == (None if is_fit else "time_out_of_range")


@table(
    ("text", "written"),
    [("y", 1), ("<", 6), ("&", 6), ("\u2028", 6), ("\xfc", 2), ("\U0001f600", 4), ("\x01", 6), ("\n", 2), ('"', 2)],
)
def test_the_size_of_an_event_is_its_size_in_flexprices_queue(text: str, written: int) -> None:
    empty = queued_bytes(row_of('{"x": ""}'))
    assert queued_bytes(row_of(json.dumps({"x": text * 1000}))) == empty + written * 1000
    assert queued_bytes(row_of(json.dumps({"x": text * 1000}, ensure_ascii=False))) == empty + written * 1000


@table(
    ("sent", "written"),
    [
        ("1e20", "100000000000000000000"),
        ("-1e20", "-100000000000000000000"),
        ("1.50", "1.5"),
        ("1E0", "1"),
        ("1e21", "1e+21"),
        ("12345678901234567890", "12345678901234567000"),
        ("[1, true, null]", "[1,true,null]"),
    ],
)
def test_the_size_of_a_number_is_its_size_in_flexprices_queue(sent: str, written: str) -> None:
    empty = queued_bytes(row_of('{"x": ""}')) - 2
    assert queued_bytes(row_of(f'{{"x":   {sent}}}')) == empty + len(written)


@table(("text", "number"), [("y", 900_000), ("<", 150_000), ("\xfc", 450_000), ("&y", 128_000)])
def test_an_event_is_too_long_from_the_first_byte_beyond_the_limit(text: str, number: int) -> None:
    row = row_of(json.dumps({"x": text * number}))
    size = queued_bytes(row)
    assert reason_of(row, size) is None
    assert reason_of(row, size - 1) == "too_long"


def test_an_event_may_have_about_a_million_bytes() -> None:
    assert reason_of(row_of(json.dumps({"x": "y" * 999_000}))) is None
    assert reason_of(row_of(json.dumps({"x": "y" * 1_000_000}))) == "too_long"
    assert reason_of(row_of(json.dumps({"x": "\xfc" * 400_000}))) is None, "escaped, it has 2.4 MB"
    assert reason_of(row_of(json.dumps({"x": "<" * 200_000}))) == "too_long"


@table("properties", ['{"x": 1%s}' % ("0" * 400), '{"x": 1%s}' % ("0" * 5000), '{"x": -1e999}'])
def test_a_number_that_only_an_earlier_version_stored_is_put_aside(properties: str) -> None:
    assert reason_of(row_of()._replace(properties=properties)) == NUMBER
    assert reason_of(row_of()._replace(properties=properties), 100) == "too_long"


# ---------------------------------------------------------------------------------------------- forwarding

LOST = {
    "long": event("long", properties={"x": "y" * 1_100_000}),
    "late": event("late", timestamp="2500-01-01T00:00:00Z"),
    "number": event("number", properties={"x": {"y": ["3e23"]}}),
    "integer": event("integer", properties={"x": 2**64}),
}
REASONS = {"too_long": 1, "time_out_of_range": 1, "number_too_large": 1, "integer_too_large": 1}


def test_forwarding_puts_aside_what_flexprice_would_lose_and_sends_the_rest(tmp_path: Path, caplog: Logs) -> None:
    path = str(tmp_path / "events.db")
    with FakeTarget() as target, forwarding(target, db=path, clock=lambda: NOW) as (server, client):
        store(client, event("a"), LOST["number"], LOST["late"], event("b"), LOST["integer"], event("c"))
        store(client, LOST["long"])
        server.wait_until_forwarded()
        health = client.get("/health").json()
    assert target.ids == ["a", "b", "c"]
    assert health["forwarding"][0]["put_aside"] == REASONS
    lines = {line["event_id"]: line for line in refused_events(tmp_path)}
    assert [*lines] == ["number", "late", "integer", "long"]
    assert lines["number"]["properties"] == {"x": {"y": ["3e23"]}}
    assert (lines["late"]["refused_by"], lines["late"]["refused_at"]) == (target.url, "2025-10-15T11:38:47.962000Z")
    for event_id, part in [
        ("number", 'not sent: its properties have the number "3e23", which is too large: 1e23 or more. FlexPrice\'s '),
        ("late", "not sent: its timestamp 2500-01-01T00:00:00+00:00 is not from 1678-01-01 to 2262-04-11. FlexPrice "),
        (
            "integer",
            "not sent: its properties have the integer 18446744073709551616, which does not fit into 64 bits. ",
        ),
        ("long", "bytes in FlexPrice's queue, more than 1,000,000. FlexPrice answers 202, and then its queue refuses "),
    ]:
        assert part in lines[event_id]["refusal"]
    first, second = [record.message for record in caplog.records if "put aside" in record.message]
    assert first.startswith(
        "forwarding: 3 events put aside (1 number too large, 1 time out of range, 1 integer too large) in "
    )
    assert ': the first is "number", not sent: its properties have' in first
    assert " event put aside (1 too long) in " in second


@pytest.mark.slow
def test_an_event_is_put_aside_once_and_in_order(tmp_path: Path) -> None:
    path = str(tmp_path / "events.db")
    with FakeTarget(answering(503)) as target:
        for _ in range(2):
            with forwarding(target, db=path) as (server, client):
                store(client, event("a"), LOST["number"], event("b"))
                eventually(lambda: len(target.batches) > 1)
            assert refused_events(tmp_path) == []
            target.batches.clear()
        target.tricks = [refusing(400, "b")]
        with forwarding(target, db=path) as (server, client):
            server.wait_until_forwarded()
            assert client.get("/health").json()["forwarding"][0]["put_aside"] == {"refused": 1, "number_too_large": 1}
    assert target.ids == ["a"]
    assert [line["event_id"] for line in refused_events(tmp_path)] == ["number", "b"]


@pytest.mark.slow
def test_the_counts_of_earlier_runs_are_kept_and_shown(tmp_path: Path) -> None:
    folder = imported(tmp_path, lines_of(*LOST.values(), LOST["late"] | {"event_id": "later"}))
    environ = {"EVENTSTORE_FORWARD_API_KEY": KEY, "EVENTSTORE_API_KEYS": KEY}
    with FakeTarget() as target:
        for _ in range(2):
            with Live(folder, "--forward-to", target.url, **environ) as live, live.client() as client:
                expected = REASONS | {"time_out_of_range": 2}
                eventually(lambda: client.get("/health").json()["forwarding"][0].get("put_aside") == expected)  # noqa: B023
                assert live.stop() == 0
    assert re.search(
        r"\n +5 events put aside \(1 too long, 2 time out of range, .+\) in .*refused\.ndjson\n", live.banner
    )
    assert (target.ids, len(refused_events(folder))) == ([], 5)


@pytest.mark.slow
@table(("flags", "ids"), [(["--forward-everything"], [*LOST]), (["--forward-max-event-bytes", "2000000"], ["long"])])
def test_flags_of_serve_choose_the_events_to_send(tmp_path: Path, flags: list[str], ids: list[str]) -> None:
    folder = imported(tmp_path, lines_of(*LOST.values()))
    environ = {"EVENTSTORE_FORWARD_API_KEY": KEY, "EVENTSTORE_API_KEYS": KEY}
    with FakeTarget() as target, Live(folder, "--forward-to", target.url, *flags, **environ):
        eventually(lambda: target.ids == ids)
        eventually(lambda: len(refused_events(folder)) == len(LOST) - len(ids))


def test_the_documented_limit_is_the_default() -> None:
    serve = parse_arguments(["serve"])
    replay = parse_arguments(["replay", "--to", "http://x"])
    assert serve.forward_max_event_bytes == replay.max_event_bytes == refused.MAX_EVENT_BYTES


# ---------------------------------------------------------------------------------------------- replay


def replayed(folder: Path, url: str, *flags: object) -> int:
    return command_line("replay", "--db", folder / "events.db", "--to", url, "--api-key", KEY, *flags)


@pytest.mark.slow
@table("batch_size", [1, 2, 1000])
def test_replay_puts_aside_what_flexprice_would_lose_and_says_so(
    tmp_path: Path, capsys: Captured, batch_size: int
) -> None:
    folder = imported(tmp_path, lines_of(event("a"), *LOST.values(), event("b", timestamp="2025-11-01T00:00:00Z")))
    path = folder / "events.db.refused.ndjson"
    with FakeTarget() as target:
        assert replayed(folder, target.url, "--batch-size", batch_size) == 0
        summary = capsys.readouterr().err.splitlines()[-1]
        assert sorted(target.ids) == ["a", "b"]
        aside = r"4 events put aside \((1 [a-z ]+, ){3}1 [a-z ]+\)"
        assert re.search(rf"sent 2 events: 2 accepted, 0 retried; {aside} in {path}; ", summary)
        assert sorted(line["event_id"] for line in refused_events(folder)) == sorted(LOST)
        assert replayed(folder, target.url) == 0
        assert "put aside" not in capsys.readouterr().err
        assert (len(target.ids), len(refused_events(folder))) == (2, 4)


def test_replay_with_everything_sends_all_events(tmp_path: Path) -> None:
    folder = imported(tmp_path, lines_of(*LOST.values()))
    with FakeTarget() as target:
        assert replayed(folder, target.url, "--everything") == 0
    assert sorted(target.ids) == sorted(LOST)
    assert refused_events(folder) == []


def test_replay_accepts_the_limit_of_another_queue(tmp_path: Path) -> None:
    folder = imported(tmp_path, lines_of(event("a", properties={"x": "y" * 5000}), event("b")))
    with FakeTarget() as target:
        assert replayed(folder, target.url, "--max-event-bytes", 4000) == 0
    assert target.ids == ["b"]
    (line,) = refused_events(folder)
    assert "more than 4,000" in line["refusal"]


def test_a_dry_run_counts_the_events_it_would_put_aside(tmp_path: Path, capsys: Captured) -> None:
    folder = imported(tmp_path, lines_of(event("a"), *LOST.values()))
    assert replayed(folder, "http://x", "--dry-run") == 0
    message = capsys.readouterr().err
    assert "would send 1 event in 1 request to http://x/v1/events/bulk; would have 4 events put aside (" in message
    assert refused_events(folder) == []


def test_a_replay_that_stops_counts_the_events_put_aside(tmp_path: Path, capsys: Captured) -> None:
    folder = imported(tmp_path, lines_of(LOST["number"], event("b", timestamp="2262-01-01T00:00:00Z")))
    with FakeTarget(refusing(400, "b")) as target:
        assert replayed(folder, target.url, "--batch-size", 1, "--concurrency", 1) == 1
        assert "; 1 event put aside (1 number too large) in " in capsys.readouterr().err
        target.tricks.clear()
        assert replayed(folder, target.url) == 0
    assert target.ids == ["b"]
    assert [line["event_id"] for line in refused_events(folder)] == ["number"]


def test_replay_stops_if_it_cannot_write_the_refused_file(tmp_path: Path, capsys: Captured) -> None:
    folder = imported(tmp_path, lines_of(LOST["number"]))
    (folder / "events.db.refused.ndjson").mkdir()
    with FakeTarget() as target:
        assert replayed(folder, target.url) == 1
        message = capsys.readouterr().err
        assert "cannot write the events that are not sent to " in message
        assert ": Is a directory; correct this, then the same command continues" in message
        (folder / "events.db.refused.ndjson").rmdir()
        assert replayed(folder, target.url) == 0
    assert [line["event_id"] for line in refused_events(folder)] == ["number"]
