"""One event as files hold it: columns of CSV, ids of events without one, faults and rejects."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import pytest

from helpers import EVER, event, exported, imported, lines_of, page, serving, stored_ids, table


def test_csv_columns_become_properties_and_flexprices_own_table_is_imported(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    table_export = (
        '"id","tenant_id","external_customer_id","environment_id","event_name","customer_id","source","timestamp",'
        '"ingested_at","properties"\n'
        '"evt","t","cust","env","call",\\N,"api","2026-08-06 06:53:31.000","2026-08-06 06:53:32.250","{""n"": 1.50}"\n'
    )
    named = ('event_name,external_customer_id,event_id,properties.model,properties,properties.a.b\n'
             'call,cust,both,gpt,"{""n"": 1.50}",x\ncall,cust,none,,,\ncall,cust,one,,,007\n')  # fmt: skip
    imported(tmp_path, table_export.encode())
    imported(tmp_path, named.encode())
    with serving(tmp_path) as client:
        found = {stored["id"]: stored for stored in page(client, "POST", **EVER)["events"]}
        raw = client.post("/v1/events/query", json=EVER).text
    assert (found["evt"]["timestamp"], found["evt"]["ingested_at"]) == (
        "2026-08-06T06:53:31Z",
        "2026-08-06T06:53:32.25Z",
    )
    assert (found["evt"]["customer_id"], found["evt"]["environment_id"]) == ("", "development")
    assert '{"n":1.50,"model":"gpt","a.b":"x"}' in raw
    assert (found["none"]["properties"], found["one"]["properties"]) == ({}, {"a.b": "007"})
    capsys.readouterr()
    for header, part in (("event_name,external_customer_id,when,properties.", '"when", "properties."'), ("event_name", "external_customer_id"),
                         ("event_name,external_customer_id,source,source", "source twice"),
                         ("event_name,external_customer_id,id,event_id", "id and event_id twice")):  # fmt: skip
        imported(tmp_path, header.encode() + b"\n", status=1)
        assert f"{tmp_path}/in:1: the header " in (message := capsys.readouterr().err)
        assert part in message


def test_an_event_without_an_id_gets_one_from_its_content_and_number(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    same = {"event_name": "call", "external_customer_id": "cust"}
    for content in (lines_of(same, same, {**same, "source": "x"}), json.dumps([same, same]).encode(),
                    b"event_name,external_customer_id\ncall,cust\ncall,cust\n"):  # fmt: skip
        folder = tmp_path / str(len(content))
        imported(folder, content)
        before = exported(folder)
        imported(folder, content)
        imported(folder, gzip.compress(content.replace(b"\n", b"\r\n")))
        assert exported(folder) == before
        made = stored_ids(folder)
        assert len({*made}) == len(made) > 1
        assert all(re.fullmatch("import_[0-9a-f]{32}", event_id) for event_id in made)
    imported(folder, b"", "--environment", "staging")
    assert "events.db: 0 new, 0 already stored; " in capsys.readouterr().err.splitlines()[-1]
    imported(folder, lines_of(event("s")), "--environment", "staging")
    assert (exported(folder), len(exported(folder, "--environment", "staging").splitlines())) == (before, 1)


GOOD = b'{"event_id": "%d", "event_name": "call", "external_customer_id": "cust"}'
BEFORE, AFTER = GOOD % 1 + b"\n", b"\n" + GOOD % 3
BAD_LINES = {  # a file whose second event is bad; its line and the problem
    "no JSON": (BEFORE + b"{,}" + AFTER, "2: event: is not valid JSON: "),
    "over several lines": (BEFORE + b"{" + AFTER, "2: line: is a lone {: put each event on one line"),
    "no object": (BEFORE + b"[1]" + AFTER, "2: event: must be an object, got [1]"),
    "no name": (BEFORE + b'{"external_customer_id": "c"}' + AFTER, "2: event_name: is required"),
    "two faults": (BEFORE + b'{"timestamp": "now", "event_name": 5, "external_customer_id": "c"}' + AFTER,
                   '2: event_name: must be a string, got 5; timestamp: must be RFC 3339 with a zone, got "now"'),
    "no UTF-8": (BEFORE + b'{"event_name": "\xff"}' + AFTER, "2: event: is not valid JSON: byte 16 is not UTF-8"),
    "too long": (BEFORE + b'{"event_name": "%b"}' % (b"x" * 3000) + AFTER, "2: line: is longer than 1000 bytes"),
    "in an array": (b"[\n" + BEFORE + b',\n{"event_name": "a"}, ' + GOOD % 3 + b"]",
                    "4: events[1].external_customer_id: is required"),
    "a number in an array": (b"[" + BEFORE + b", 12," + GOOD % 3 + b"]", "2: events[1].event: must be an object, got 12"),
    "csv": (b"event_id,event_name,external_customer_id,properties\n1,call,cust,\n2,call,cust,[1]\n3,call,cust,",
            "3: properties: must be an object, got [1]"),
    "csv cells": (b"event_id,event_name,external_customer_id\n1,call,cust\n2,call\n3,call,cust", "3: line: has 2 cells, the header has 3"),
    "csv no UTF-8": (b"event_id,event_name,external_customer_id\n1,call,cust\n2,c\xff,cust\n3,call,cust", "3: line: is not UTF-8"),
    "csv property twice": (b'event_id,event_name,external_customer_id,properties,properties.a\n1,call,cust,,\n2,c,cust,"{""a"":1}",5\n3,call,cust,,',
                           "3: properties.a: has another value in the column properties"),
    "csv time without a zone": (b"event_id,event_name,external_customer_id,timestamp\n1,call,cust,\n2,c,cust,2026-08-06 06:53:31.000\n3,call,cust,",
                                "3: timestamp: must be RFC 3339"),
}  # fmt: skip


@table(("content", "problem"), BAD_LINES.values(), ids=BAD_LINES)
def test_a_bad_event_stops_an_import_or_goes_to_the_rejects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], content: bytes, problem: str
) -> None:
    imported(tmp_path, content, "--max-body-bytes", 1000, status=1)
    message = capsys.readouterr().err
    assert message.startswith(f"eventstore: {tmp_path}/in:{problem}")
    assert "; stored before it: 1 event, 1 of them new; " in message
    assert stored_ids(tmp_path) == ["1"]
    rejects = tmp_path / "rejects.ndjson"
    capsys.readouterr()
    imported(tmp_path, content, "--max-body-bytes", 1000, "--skip-invalid", rejects)
    assert f": 1 new, 1 already stored, 1 rejected and written to {rejects}; " in capsys.readouterr().err
    assert stored_ids(tmp_path) == ["1", "3"]
    (reject,) = map(json.loads, rejects.read_bytes().splitlines())
    assert reject["line"] == int(problem.partition(":")[0])
    assert reject.get("index") == (1 if "events[1]" in problem else None)
    assert [{*error} for error in reject["errors"]] == [{"field", "code", "message"}] * len(reject["errors"])
    for error in reject["errors"]:
        assert error["field"] in problem
        assert error["message"].startswith(f"{error['field']} ")
    assert reject["event"]
