"""The log: the request that each line belongs to, lines of JSON, and lines that repeat."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from forked import changed
from helpers import KEY, Live, answer_on, event, eventually, refused, store, table

LABELLED = ("--api-key", f"{KEY}=production; label=check out")


def json_lines(live: Live) -> list[dict[str, Any]]:
    return [json.loads(line) for line in live.log.splitlines()]


def test_a_line_about_a_request_ends_with_the_facts_about_the_request(tmp_path: Path) -> None:
    with Live(tmp_path, *LABELLED) as live, live.client() as client:
        answer = client.post("/v1/events", json={}, headers={"X-Request-ID": "my id"})
        refused(answer)
        assert re.search(r' \[request_id="my id" client=127\.0\.0\.1 key="check out" environment=production '
                         r'route="POST /v1/events" status=400 duration_ms=[\d.]+\]\n', live.log)  # fmt: skip
        refused(client.get("/v1/events/unknown"), 404, "not_found")
        assert 'route="GET /v1/events/{id}" status=404' in live.log


def test_json_lines_have_the_same_fields(tmp_path: Path) -> None:
    with Live(tmp_path, *LABELLED, "--log-format", "json", "--access-log") as live, live.client() as client:
        answer = client.post("/v1/events", json={"event_name": "line\nbreak \u202e"})
        refused(answer)
        store(client, event("a"))
        lines = json_lines(live)
    (line,) = (line for line in lines if line["logger"] == "eventstore")
    assert line["request_id"] == answer.headers["x-request-id"]
    assert (line["key"], line["environment"], line["route"]) == ("check out", "production", "POST /v1/events")
    assert (line["level"], line["status"], line["client"]) == ("warning", 400, "127.0.0.1")
    assert line["message"].startswith("POST /v1/events: 400 validation_error: ")
    access = [line["status"] for line in lines if line["logger"] == "uvicorn.access"]
    assert access == [400, 202]


def test_a_line_about_malformed_http_has_the_id_of_its_answer(tmp_path: Path) -> None:
    with Live(tmp_path, *LABELLED, "--log-format", "json") as live, live.connect() as sock:
        sock.sendall(b"garbage\r\n\r\n")
        answer = answer_on(sock)
        refused(answer)
        (line,) = json_lines(live)
    assert (line["request_id"], line["client"], line["status"]) == (answer.headers["x-request-id"], "127.0.0.1", 400)
    assert "duration_ms" not in line


@pytest.mark.slow
@table("log_format", ["text", "json"])
def test_a_traceback_belongs_to_its_line(tmp_path: Path, log_format: str) -> None:
    with Live(tmp_path, *LABELLED, "--log-format", log_format) as live, live.client() as client:
        (tmp_path / "events.db").rename(tmp_path / "moved.db")
        refused(client.post("/v1/events", json=event("a")), 500, "database_error")
        if log_format == "json":
            (line,) = (line for line in json_lines(live) if "traceback" in line)
            assert "FileNotFoundError" in line["traceback"]
        else:
            assert "Traceback (most recent call last):\n" in live.log


@pytest.mark.slow
def test_lines_that_repeat_are_left_out_and_counted(tmp_path: Path) -> None:
    code = changed("logs", _PERIOD_S=0.5, _MOST_EQUAL=5, _MOST_SIMILAR=8)
    with Live(tmp_path, *LABELLED, code=code) as live, live.client() as client:

        def left_out() -> bool:
            for _ in range(20):
                client.get("/v1/no%20where")  # a % as in a template
            return "more lines in the last minute were left out: GET /v1/no%20where: 404 " in live.log

        eventually(left_out)
        counted = [int(number) for number in re.findall(r"(\d+) more lines", live.log)]
        assert min(counted) >= 1
        shown = live.log.count(": GET /v1/no%20where: 404 ") - len(counted)
        assert shown < 6 * (len(counted) + 1)
