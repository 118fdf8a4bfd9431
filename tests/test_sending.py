"""Batches, retry rules, targets and progress: what `replay` and `serve --forward-to` share."""

from __future__ import annotations

import asyncio
import json
import time
from contextlib import closing
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest

from eventstore import Row, StartError, connect_reader, plural
from eventstore_extras import forward, sending
from eventstore_extras.sending import Answer, Batch, Key, Outcome, Target
from helpers import NOW, SCRIPT, at, event, imported, lines_of, run, table

# ---------------------------------------------------------------------------------------------- batches


def rows_of_sizes(*sizes: int) -> list[tuple[int, Row]]:
    """Return rows whose events are about as large as this as JSON."""
    return [(seq, Row(1, str(seq), "", "", "call", "", NOW, NOW, json.dumps({"x": "y" * size})))
            for seq, size in enumerate(sizes)]  # fmt: skip


@table(
    ("sizes", "batch_size", "expected"),
    [
        ([10] * 7, 3, [3, 3, 1]),
        ([4_000_000] * 5, 1000, [2, 2, 1]),
        ([10, 17_000_000, 10], 1000, [1, 1, 1]),
        ([], 1000, []),
    ],
    ids=["by number", "by 10 MB", "a larger event alone", "none"],
)
@pytest.mark.slow
def test_a_batch_has_a_maximum_number_of_events_and_10_mb(
    sizes: list[int], batch_size: int, expected: list[int]
) -> None:
    rows = rows_of_sizes(*sizes)
    pages = [rows[:2], rows[2:]]
    found = list(sending.batches(pages, batch_size, None))
    assert [len(batch.rows) for batch in found] == expected
    assert [row for batch in found for row in batch.rows] == rows
    assert [row.id for _, row in rows] == [
        sent["event_id"] for batch in found for sent in json.loads(batch.body)["events"]
    ]
    assert all(len(batch.body) <= 10_000_100 for batch in found if len(batch.rows) > 1)


# ---------------------------------------------------------------------------------------------- retry rules

A, B, L, OK, NO = Outcome.RETRY, Outcome.BROKEN, Outcome.TOO_LARGE, Outcome.ACCEPTED, Outcome.REFUSED


class ScriptedTarget(Target):
    """A target that answers with these outcomes, one after the other."""

    def __init__(self, outcomes: list[Outcome]) -> None:
        super().__init__("http://host/v1", Key("key", "the test"), "--to")
        self.outcomes = iter(outcomes)
        self.sizes: list[int] = []

    async def post(self, body: bytes) -> Answer:
        self.sizes.append(len(json.loads(body)["events"]))
        return Answer(next(self.outcomes))


@table(
    ("outcomes", "sizes", "waits"),
    [
        ([A] * 6 + [OK], [8] * 7, [0, 1, 2, 3, 4, 5]),
        ([B, B, A, OK], [8] * 4, [0, 1, 2]),
        ([B, B, B, A, OK], [8, 8, 8, 4, 4], [0, 1, 2, 3]),
        ([B, A, B, A, B, OK], [8] * 5 + [4], [0, 1, 2, 3, 4]),
        ([B] * 8 + [OK], [8, 8, 8, 4, 2, 1, 1, 1, 1], [0, 1, 2, 3, 4, 5, 6, 7]),
        ([L, OK], [8, 4], []),
        ([L, L, L, L], [8, 4, 2, 1], []),
        ([B, NO], [8, 8], [0]),
    ],
    ids=["down", "broken twice", "three times", "between others", "each time", "413", "413 for one event", "400"],
)
def test_a_batch_is_split_if_it_is_too_large_or_breaks_the_connection_repeatedly(
    outcomes: list[Outcome], sizes: list[int], waits: list[int]
) -> None:
    waited = []

    async def wait(_: Answer, waits: int) -> None:
        waited.append(waits)

    rows = rows_of_sizes(*[10] * 8)
    batch = Batch(rows, [b'{"event_id":"1"}'] * 8)
    target = ScriptedTarget(outcomes)
    part, answer = asyncio.run(sending.Sender(target, wait).send_head(batch))
    assert (target.sizes, waited) == (sizes, waits)
    assert (len(part.rows), answer.outcome) == (sizes[-1], outcomes[-1])


def test_pauses_grow_to_30_s_and_last_as_long_as_retry_after() -> None:
    retry = Answer(Outcome.RETRY)
    longest = [max(retry.backoff_s(waits) for _ in range(200)) for waits in range(40)]
    assert longest[0] <= 0.5
    assert 15 < longest[8] <= 30
    assert 15 < longest[39] <= 30
    assert 7 <= retry._replace(retry_after_s=7).backoff_s(0) < 7.6
    assert retry._replace(retry_after_s=1e9).backoff_s(0) == 3600
    assert Answer(Outcome.BLOCKED).backoff_s(0) == Answer(Outcome.BLOCKED).backoff_s(9) == 30


@table(("text", "seconds"), [("7", 7), ("", 0), ("soon", 0), ("-5", 0), ("Wed, 21 Oct 2015 07:28:00 GMT", 0)])
def test_retry_after_is_a_number_or_a_date(text: str, seconds: float) -> None:
    assert sending.retry_after_s(text) == seconds
    in_an_hour = (datetime.now(UTC) + timedelta(hours=1)).strftime("%a, %d %b %Y %H:%M:%S GMT")
    assert 3000 < sending.retry_after_s(in_an_hour) <= 3600


def test_a_throttle_allows_something_once_per_interval(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([0, 1, 29.9, 30, 31, 100, 129, 131])
    monkeypatch.setattr(time, "monotonic", lambda: next(times))
    throttle = sending.Throttle(30)
    allowed = [throttle.allows() for _ in range(8)]
    monkeypatch.undo()
    assert allowed == [True, False, False, True, False, True, False, True]


# ---------------------------------------------------------------------------------------------- outages


@table(
    ("seconds", "text"),
    [(0, "0 s"), (0.6, "1 s"), (60, "1 min"), (61, "1 min 1 s"), (3600, "1 h"), (11_999, "3 h 19 min"),
     (86_400, "1 day"), (2 * 86_400 + 3599, "2 days"), (400 * 86_400 + 7200, "400 days 2 h")],
)  # fmt: skip
def test_a_duration_is_said_in_its_two_largest_units(seconds: float, text: str) -> None:
    assert sending.lasted(seconds) == text


def test_the_end_of_an_outage_is_reported_once_with_its_length_and_the_events_sent_since(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    clock = SimpleNamespace(s=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.s)
    outage = sending.Outage()

    def said(events: int, is_done: bool = False) -> str:
        outage.sent(events)
        return outage.end(is_done)

    assert (said(7), said(7, is_done=True)) == ("", "")
    outage.failed(is_logged=True)
    clock.s += 3600
    outage.failed(is_logged=False)
    assert outage.end(is_done=True) == ""
    clock.s += 60
    assert said(10) == ""
    clock.s += 4
    outage.failed(is_logged=False)  # again, so it is not over
    clock.s += 56
    assert said(20) == ""
    clock.s += 5
    assert said(30) == "works again after 1 h 2 min; 50 events sent since"
    assert said(40, is_done=True) == ""
    outage.failed(is_logged=True)
    clock.s += 9
    assert said(1, is_done=True) == "works again after 9 s; 1 event sent since"
    outage.failed(is_logged=False)  # the log does not say that it began
    clock.s += 9
    assert said(1, is_done=True) == ""
    outage.failed(is_logged=False)
    clock.s += 10
    assert said(1, is_done=True) == "works again after 10 s; 1 event sent since"


# ---------------------------------------------------------------------------------------------- targets


@table("url", ["http://events:8080", "http://v2/", "https://host/eventstore", "https://host/a/v1"])
def test_a_target_may_have_any_host_and_prefix(url: str) -> None:
    assert sending.target_url(url, "--to") == f"{url.rstrip('/').removesuffix('/v1')}/v1"


@table("path", ["/v1/events", "/v1/events/bulk", "/v2/x", "/events", "/v1/x", "/v2", "/api/V1", "/v1beta/"])
def test_a_target_that_is_not_a_base_url_is_refused(path: str) -> None:
    with pytest.raises(StartError, match="--to must be the base URL, with or without /v1 at its end"):
        sending.target_url(f"http://127.0.0.1:1{path}", "--to")


@table("url", ["http://h:x", "http://h:0", "ftp://h", "h:80", "http://a b", "http://h?a=b", "http://h#a"])
def test_a_target_that_is_not_an_http_url_is_refused(url: str) -> None:
    with pytest.raises(StartError, match="--to must be a URL like"):
        sending.target_url(url, "--to")


@table("url", ["http://\u2603", "http://host/\x01", "http://xn--a"])
def test_a_target_that_httpx_cannot_parse_is_refused(url: str) -> None:
    with pytest.raises(StartError, match="--to must be a valid URL, got "):
        Target(sending.target_url(url, "--to"), Key("key", "the test"), "--to")


# ---------------------------------------------------------------------------------------------- progress


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a database of five events."""
    return imported(tmp_path, lines_of(*[event(f"{number:05}", timestamp=at(number)) for number in range(5)]))


def test_the_progress_is_due_when_it_has_changed_and_the_last_save_is_half_a_second_ago(tmp_path: Path) -> None:
    file = sending.ProgressFile(tmp_path / "progress", sending.Progress(target="T", environment="development"))
    assert not file.is_saved
    file.save()
    assert (file.is_saved, file.is_due()) == (True, False)
    file.progress.accepted += 1
    assert (file.is_saved, file.is_due(), file.is_due()) == (False, True, False)
    file.save()
    assert sending.read_progress(file.path, sending.Progress, "") == file.progress


# What version 0.1.0 wrote:
TARGET = "http://h/v1"
FORWARD_FILE = "events.db.forward-76b96b740298faae.json"
FORWARD_PROGRESS = b'{"target":"http://h/v1","environment":"development","last_seq":2,"last_id":"00001","accepted":2,"seq":3,"refused":1,"late_s":7}\n'  # fmt: skip
REPLAY_FILE = "events.db.replay-846e3dde74978b09.json"
REPLAY_PROGRESS = b'{"target":"http://h/v1","environment":"development","last_seq":2,"last_id":"00001","accepted":2,"filters":{"external_customer_id":null,"event_name":null,"event_id":null,"source":null,"start_time":null,"end_time":null,"property_filters":null},"arrived":%d,"cursor":[%d,"00001"],"is_caught_up":%s}\n'  # fmt: skip


def test_forwarding_continues_with_the_progress_file_of_an_earlier_version(folder: Path) -> None:
    path = str(folder / "events.db")
    (folder / FORWARD_FILE).write_bytes(FORWARD_PROGRESS)
    with closing(connect_reader(path)) as conn:
        file = forward.open_forward_progress(conn, path, TARGET, "development")
    assert file.path == folder / FORWARD_FILE
    assert (file.progress.seq, file.progress.accepted, file.progress.refused) == (3, 2, 1)
    assert forward.read_all_forward_progress(path) == [file.progress]
    file.save()
    saved = json.loads(file.path.read_bytes())
    assert saved == json.loads(FORWARD_PROGRESS.replace(b'"late_s":7', b'"put_aside":{}'))


@pytest.mark.slow
@table(("arrived", "is_caught_up", "left"), [(5, b"false", 3), (5, b"true", 0), (4, b"true", 1)])
def test_replay_continues_with_the_progress_file_of_an_earlier_version(
    folder: Path, arrived: int, is_caught_up: bytes, left: int
) -> None:
    (folder / REPLAY_FILE).write_bytes(REPLAY_PROGRESS % (arrived, NOW + 1, is_caught_up))
    done = run(*SCRIPT, "replay", "--to", "http://h", "--dry-run", cwd=folder)
    assert ": 2 events were accepted before" in done.stderr
    assert f"would send {plural(left, 'event')} in " in done.stderr
