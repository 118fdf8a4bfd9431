"""One event as files hold it: columns of CSV, ids of events without one, faults and rejects."""

from __future__ import annotations

import gzip
import json
import re
from pathlib import Path

import httpx
import pytest

from helpers import EVER, at, event, exported, imported, lines_of, page, serving, store, stored_ids, table


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


# ---------------------------------------------------------------------------------------------- cells without a value

HEADER = "event_name,external_customer_id,event_id,customer_id,source,timestamp,properties"
NULLS = {  # the cells event_id, customer_id, source, timestamp and properties of three rows
    "backslash N": r"\N,\N,\N,\N,\N",
    "quoted backslash N": r'"\N","\N","\N","\N","\N"',
    "NULL": "NULL,NULL,NULL,NULL,NULL",
    "quoted NULL": '"NULL","NULL","NULL","NULL","NULL"',
    "null": "null,null,null,null,null",
    "empty": ",,,,",
    "quoted and empty": '"","","","",""',
}


@table("cells", NULLS.values(), ids=NULLS)
def test_a_null_in_csv_is_an_absent_value(tmp_path: Path, capsys: pytest.CaptureFixture[str], cells: str) -> None:
    rows = [f"call,cust {number},{cells}\r\n" for number in range(3)]
    imported(tmp_path, f"{HEADER}\r\n{''.join(rows)}".encode())
    assert "3 new, 0 already stored; 3 events had no event_id and got one made" in capsys.readouterr().err
    found = [json.loads(line) for line in exported(tmp_path).splitlines()]
    assert sorted(each["external_customer_id"] for each in found) == ["cust 0", "cust 1", "cust 2"]
    for each in found:
        assert each["event_id"].startswith("import_")
        assert (each["customer_id"], each["source"], each["properties"]) == ("", "", {})


def test_the_made_id_does_not_depend_on_how_a_null_is_written(tmp_path: Path) -> None:
    for cells in NULLS.values():
        imported(tmp_path, f"{HEADER}\ncall,cust,{cells}\n".encode())
    assert len(stored_ids(tmp_path)) == 1


@table("null", [r"\N", "NULL", "null"])
def test_a_null_in_a_required_column_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], null: str) -> None:
    for row, field in ((f"{null},cust", "event_name"), (f"call,{null}", "external_customer_id")):
        imported(tmp_path, f"event_name,external_customer_id\n{row}\n".encode(), status=1)
        assert f"in:2: {field}: is required" in capsys.readouterr().err


def test_null_is_a_text_in_a_property_of_its_own_column(tmp_path: Path) -> None:
    header = "event_name,external_customer_id,event_id,properties.surname,properties.age"
    imported(tmp_path, f"{header}\ncall,cust,a,NULL,\\N\ncall,cust,b,Null,null\n".encode())
    properties = [json.loads(line)["properties"] for line in exported(tmp_path).splitlines()]
    assert properties == [{"surname": "NULL"}, {"surname": "Null", "age": "null"}]


def test_texts_that_look_like_nulls_survive_an_export_as_csv(tmp_path: Path) -> None:
    texts = [
        "NULL",
        "null",
        "\\N",
        "\\\\N",
        "\\NULL",
        "N",
        "\\",
        "None",
        "nan",
        " NULL ",
        "1.23457E+17",
        "#N/A",
        "\\1E+5",
    ]
    events = [event(text, event_name=f"{text}.", external_customer_id=text, customer_id=text, source=text, timestamp=at(0))
              for text in texts]  # fmt: skip
    imported(tmp_path, lines_of(*events))
    again = imported(tmp_path / "again", exported(tmp_path, form="csv"))
    assert exported(again) == exported(tmp_path)
    assert sorted(stored_ids(again)) == sorted(texts)


BAD_IDS = ["1.23457E+17", "1.23457e+17", "-1.2E+05", "1E+17", "1.23456789012346E17", "[NULL]", "(null)", "<null>", "Null",
           "nan", "NaN", "None", "undefined", "#N/A", "#REF!", "#NAME?", " NULL"]  # fmt: skip


@table("bad_id", [*BAD_IDS, "1,23457E+17"])
@table("quote", ["", '"'], ids=["unquoted", "quoted"])
def test_an_id_that_a_program_has_mangled_is_refused_with_advice(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], bad_id: str, quote: str
) -> None:
    quote = '"' if "," in bad_id else quote
    rows = [f"call,cust {number},{quote}{bad_id}{quote}" for number in range(3)]
    for column in ("event_id", "id"):
        header = f"event_name,external_customer_id,{column}"
        imported(tmp_path, "\n".join([header, *rows]).encode(), status=1)
        message = capsys.readouterr().err
        assert f"in:2: event_id: is {json.dumps(bad_id)}, " in message
        advice = "format that column as text" if "E" in bad_id.upper() and "1" in bad_id else "leave the cell empty"
        assert advice in message
        assert "stored before it: 0 events" in message


@table("good_id", ["1E5", "123456789012345678", "none", "12e34567-e89b", "1.5", "nullable", "v1.2e+5", "E+17"])
def test_an_id_that_only_resembles_a_mangled_one_is_stored(tmp_path: Path, good_id: str) -> None:
    imported(tmp_path, f"event_name,external_customer_id,event_id\ncall,cust,{good_id}\n".encode())
    assert stored_ids(tmp_path) == [good_id]


# ---------------------------------------------------------------------------------------------- a server's answers


def answers(client: httpx.Client) -> dict[str, bytes]:
    """Return the server's answers about its events, as files that a user may make of them."""
    first, last = (client.get("/v1/events", params={"order": order, **EVER}).content for order in ("asc", "desc"))
    queried = client.post("/v1/events/query", json=EVER).content
    events = json.loads(queried)["events"]
    lookups = [client.get("/v1/events/lookup", params={"id": each["id"]}).content for each in events]
    return {
        "page": first,
        "page with spaces": json.dumps(json.loads(first), indent=2).encode(),
        "page with sorted keys": json.dumps(json.loads(last), sort_keys=True, indent=2).encode(),
        "query": queried,
        "pages on a line each": first + b"\n" + last + b"\n",
        "pages without a line break": first + queried,
        "lines": lines_of(*events),
        "array": json.dumps(events).encode(),
        "lookups": b"\n".join(lookups),
        "lookups with spaces": b"".join(json.dumps(json.loads(each), indent=2).encode() for each in lookups),
        "lookups with sorted keys": b"".join(json.dumps(json.loads(each), sort_keys=True).encode() for each in lookups),
    }


def test_a_servers_own_answers_add_nothing_and_lose_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path) as client:
        store(client, event("a", properties={"n": 1.5}), event(None, source="s"), event("c::d", timestamp=at(7)))
        files = answers(client)
    before = exported(tmp_path)
    for number, (kind, content) in enumerate(files.items()):
        capsys.readouterr()
        imported(tmp_path, content)
        assert re.search(r": 0 new, \d already stored; [\d.]+ s\n$", capsys.readouterr().err), kind
        assert exported(tmp_path) == before, kind
        again = exported(imported(tmp_path / str(number), content))
        assert list(map(json.loads, again.splitlines())) == list(map(json.loads, before.splitlines())), kind


def test_an_id_beside_an_event_id_is_an_unknown_field(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    imported(tmp_path, lines_of(event("a", id="row 1", environment_id="e"), event("b", id="row 1", ingested_at=at(0))))
    assert stored_ids(tmp_path) == ["a", "b"]
    assert 'ignored unknown fields: "environment_id", "id", "ingested_at"' in capsys.readouterr().err
    imported(tmp_path, lines_of({"event_name": "call", "external_customer_id": "cust", "id": 17}), status=1)
    assert "in:1: id: must be a string, got 17" in capsys.readouterr().err
