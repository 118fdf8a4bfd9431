"""Parquet: pyarrow writes the files to import, and reads the exported ones, as does DuckDB."""

from __future__ import annotations

import base64
import gzip
import io
import json
import os
import re
import subprocess
import sys
from contextlib import closing
from datetime import UTC, date, datetime, time
from decimal import Decimal
from itertools import chain
from pathlib import Path
from typing import Any
from unittest.mock import Mock
from uuid import UUID

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow.parquet import encryption

import eventstore
from eventstore import Row
from eventstore_extras import parquet
from forked import forked
from helpers import (
    EVER,
    NOW,
    SCRIPT,
    at,
    command_line,
    event,
    exported,
    imported,
    lines_of,
    nasty_folder,
    page,
    refusal,
    run,
    serving,
    sizes_in,
    store,
    stored_ids,
    table,
)

UTC_TIME = pa.timestamp("us", "UTC")
COLUMNS = [(name, pa.string()) for name in ("event_name", "event_id", "external_customer_id", "customer_id", "source")]
COLUMNS += [
    ("timestamp", UTC_TIME),
    ("ingested_at", UTC_TIME),
    ("properties", pa.string()),
    ("environment", pa.string()),
]


def events_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in exported(folder).splitlines()]


def table_of(folder: Path, *flags: str) -> pa.Table:
    """Return the Parquet table that `eventstore export` writes of folder/events.db."""
    return pq.read_table(io.BytesIO(exported(folder, *flags, form="parquet")))


def parquet_of(columns: dict[str, Any], **options: Any) -> bytes:
    """Return a file with these columns, written by pyarrow, and with the required columns that are not among them."""
    number = len(next(iter(columns.values())))
    needed = {"event_name": ["call"] * number, "external_customer_id": ["cust"] * number,
              "event_id": [str(each) for each in range(number)]}  # fmt: skip
    file = io.BytesIO()
    pq.write_table(pa.table(needed | columns), file, **options)
    return file.getvalue()


# ---------------------------------------------------------------------------------------------- export


def test_a_file_holds_every_event_as_it_was_sent(tmp_path: Path) -> None:
    found = table_of(nasty_folder(tmp_path))
    assert found.schema.equals(pa.schema([pa.field(*column, nullable=False) for column in COLUMNS]))
    with serving(tmp_path) as client:
        stored = page(client, "POST", order="asc", page_size=1000, **EVER)["events"]
    assert found.num_rows == len(stored)
    for row, sent, line in zip(found.to_pylist(), stored, exported(tmp_path).splitlines(), strict=True):
        for name in ("event_name", "external_customer_id", "customer_id", "source"):
            assert row[name] == sent[name]
        assert (row["event_id"], row["environment"]) == (sent["id"], "development")
        for name in ("timestamp", "ingested_at"):
            assert row[name] == datetime.fromisoformat(sent[name])
        if "\n" not in row["properties"]:  # digits and spaces as sent
            assert row["properties"].encode() in line
        assert json.loads(row["properties"]) == json.loads(line)["properties"]


def test_export_import_export_gives_the_same_bytes(tmp_path: Path) -> None:
    flags = [part for column in ("n:float64", "a:string") for part in ("--properties-column", column)]
    first = exported(nasty_folder(tmp_path), *flags, form="parquet")
    folder = imported(tmp_path / "again", first)
    assert exported(folder, *flags, form="parquet") == first
    assert exported(folder) == exported(tmp_path)
    assert exported(tmp_path, form="parquet") == exported(
        imported(tmp_path / "3", exported(tmp_path, form="parquet")), form="parquet"
    )
    assert exported(imported(folder, first)) == exported(tmp_path)  # a second time


VALUES = {  # a property's JSON -> itself as float64, int64, string, bool
    "12": (12.0, 12, None, None),
    "1.50": (1.5, None, None, None),
    "5.0": (5.0, None, None, None),
    "-1E2": (-100.0, None, None, None),
    "9223372036854775807": (float(2**63), 2**63 - 1, None, None),
    "9223372036854775808": (float(2**63), None, None, None),
    "123456789012345678901": (123456789012345678901.0, None, None, None),
    '"12"': (None, None, "12", None),
    '"\\ud83d\\ude00"': (None, None, "\U0001f600", None),
    "true": (None, None, None, True),
    "null": (None, None, None, None),
    "[1]": (None, None, None, None),
    '{"a": 1}': (None, None, None, None),
}


def test_a_property_column_is_null_where_the_property_has_another_type(tmp_path: Path) -> None:
    names = [f"p{number}" for number in range(len(VALUES))]
    properties = "{%s}" % ", ".join(f'"{name}": {value}' for name, value in zip(names, VALUES, strict=True))
    line = b'{"event_name": "call", "external_customer_id": "cust", "properties": %b}\n' % properties.encode()
    imported(tmp_path, line + line.replace(properties.encode(), b"{}"))
    for at_, (kind, arrow) in enumerate(
        {"float64": pa.float64(), "int64": pa.int64(), "string": pa.string(), "bool": pa.bool_()}.items()
    ):
        flags = chain.from_iterable(("--properties-column", f"{name}:{kind}") for name in (*names, "a:b"))
        found = table_of(tmp_path, *flags)
        assert [found.schema.field(f"properties.{name}").type for name in names] == [arrow] * len(names)
        for name, values in zip(names, VALUES.values(), strict=True):
            assert sorted(found[f"properties.{name}"].to_pylist(), key=lambda value: value is None) == [
                values[at_],
                None,
            ]
        assert found["properties.a:b"].null_count == 2


@pytest.mark.slow
def test_filters_choose_events_and_the_name_of_the_file_chooses_the_format(tmp_path: Path) -> None:
    imported(tmp_path, lines_of(*[event(each, source=each) for each in ("a", "b", "c")]))
    imported(tmp_path, lines_of(event("s")), "--environment", "staging")
    assert table_of(tmp_path, "--source", "b")["event_id"].to_pylist() == ["b"]
    assert table_of(tmp_path, "--environment", "staging")["environment"].to_pylist() == ["staging"]
    assert table_of(tmp_path, "--source", "none").num_rows == 0
    for name, is_parquet in (("out.parquet", True), ("out.parquets", False)):
        assert command_line("export", "--db", tmp_path / "events.db", "-o", tmp_path / name) == 0
        assert ((tmp_path / name).read_bytes()[:4] == b"PAR1") is is_parquet
    whole = subprocess.check_output([*SCRIPT, "export", "--format", "parquet"], cwd=tmp_path)
    assert whole == (tmp_path / "out.parquet").read_bytes()
    with subprocess.Popen(
        [*SCRIPT, "export", "--format", "parquet"], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout
        assert process.stderr
        process.stdout.close()
        assert (process.stderr.read(), process.wait(30)) == (b"", 1)


def test_row_groups_fit_into_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    imported(tmp_path, lines_of(*[event(f"{n:05}", properties={"text": "x" * 100}) for n in range(3000)]))

    def groups() -> list[pq.RowGroupMetaData]:
        meta = pq.ParquetFile(io.BytesIO(exported(tmp_path, form="parquet"))).metadata
        return [meta.row_group(number) for number in range(meta.num_row_groups)]

    (one,) = groups()
    columns = {one.column(at_).path_in_schema: one.column(at_) for at_ in range(one.num_columns)}
    assert {column.compression for column in columns.values()} == {"ZSTD"}
    assert [name for name, column in columns.items() if column.has_dictionary_page] == [
        "event_name", "external_customer_id", "customer_id", "source", "properties", "environment"]  # fmt: skip
    monkeypatch.setattr(parquet, "_GROUP_ROWS", 2000)
    assert [group.num_rows for group in groups()] == [2000, 1000]
    monkeypatch.setattr(parquet, "_GROUP_BYTES", 500 * (parquet._EVENT_BYTES + len('{"text": ""}') + 100))
    assert [group.num_rows for group in groups()] == [500] * 6


@table(("error", "part"), [(OSError(28, "No space left on device"), "No space left on device; no file was made"),
                           (KeyboardInterrupt(), "interrupted")], ids=["full disk", "Ctrl-C"])  # fmt: skip
def test_an_export_that_fails_or_is_interrupted_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, part: str
) -> None:
    imported(tmp_path, lines_of(event("a")))
    capsys.readouterr()
    monkeypatch.setattr(parquet, "_arrays", Mock(side_effect=error))
    before = sizes_in(tmp_path)
    assert command_line("export", "--db", tmp_path / "events.db", "-o", tmp_path / "out.parquet") == 1
    assert part in capsys.readouterr().err
    assert sizes_in(tmp_path) == before


FULL_DISK = """
import resource, signal, sys, eventstore
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
sys.exit(eventstore.main(sys.argv[1:]))
"""


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="limits the size of files")
@table("name", ["out.parquet", "out.ndjson"])
def test_an_export_to_a_full_disk_makes_no_file(tmp_path: Path, name: str) -> None:
    """The limit on the size of files acts like a full disk: a part of the file is written."""
    imported(tmp_path, lines_of(*[event(os.urandom(20).hex()) for _ in range(5000)]))
    before = sizes_in(tmp_path)
    done = forked(tmp_path, "export", "-o", tmp_path / name, code=FULL_DISK)
    assert done.returncode == 1
    assert re.fullmatch(
        rf"eventstore: cannot write --output {tmp_path}/{name}: File too large; no file was made\n", done.stderr
    )
    assert {name: size for name, size in sizes_in(tmp_path).items() if ".db-" not in name} == before


# ---------------------------------------------------------------------------------------------- other programs


def test_duckdb_and_pandas_compute_the_same_usage_as_the_api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import duckdb
    import pandas

    with serving(tmp_path) as client:
        for batch in range(3):
            store(client, *[event(f"{batch}-{number}", event_name=("call", "image")[number % 2], timestamp=at(batch * 1000 + number),
                                  properties={"tokens": number / 4, "model": f"m{number % 3}"}) for number in range(500)])  # fmt: skip
        wanted = {}
        for name in ("call", "image"):
            asked = {
                "event_name": name,
                "external_customer_id": "cust",
                "aggregation_type": "SUM",
                "property_name": "tokens",
            }
            wanted[name] = float(client.post("/v1/events/usage", json=asked | EVER).json()["value"])
    (tmp_path / "e.parquet").write_bytes(exported(tmp_path, "--properties-column", "tokens:float64", form="parquet"))
    monkeypatch.chdir(tmp_path)
    with duckdb.connect() as database:
        sums = database.execute(
            """SELECT event_name, sum("properties.tokens") FROM 'e.parquet' GROUP BY ALL"""
        ).fetchall()
        when = "timestamp >= TIMESTAMPTZ '2025-10-15T11:38:47.963Z'"
        numbers = database.execute(f"SELECT count(*) FROM 'e.parquet' WHERE {when}").fetchall()
        database.execute("COPY (FROM 'e.parquet') TO 'theirs.parquet' (COMPRESSION gzip)")
    assert dict(sums) == wanted
    assert numbers == [(1000,)]
    frame = pandas.read_parquet("e.parquet")
    assert frame.groupby("event_name")["properties.tokens"].sum().to_dict() == wanted
    assert wanted["call"] > 0
    frame.to_parquet("pandas.parquet")
    for name in ("theirs.parquet", "pandas.parquet"):
        assert exported(imported(tmp_path / name[:6], Path(name).read_bytes())) == exported(tmp_path)


# ---------------------------------------------------------------------------------------------- import: types

MOMENT = datetime(2026, 8, 6, 6, 53, 31, 250_000, UTC)
LINE_TIME = "2026-08-06T06:53:31.250000Z"
TIMES = {
    "milliseconds": pa.timestamp("ms", "UTC"),
    "microseconds": pa.timestamp("us", "UTC"),
    "nanoseconds": pa.timestamp("ns", "UTC"),
    "a zone": pa.timestamp("us", "America/New_York"),
    "an offset": pa.timestamp("us", "+05:30"),
}


@table("kind", TIMES.values(), ids=TIMES)
def test_a_time_is_read_in_any_unit_and_zone(tmp_path: Path, kind: pa.DataType) -> None:
    imported(tmp_path, parquet_of({name: pa.array([MOMENT], kind) for name in ("timestamp", "ingested_at")}))
    assert events_of(tmp_path)[0]["timestamp"] == LINE_TIME
    assert table_of(tmp_path)["ingested_at"].to_pylist() == [MOMENT]


@table("options", [{}, {"use_deprecated_int96_timestamps": True}], ids=["microseconds", "int96"])
@table("name", ["timestamp", "ingested_at"])
def test_a_time_without_a_zone_is_refused_unless_utc_may_be_assumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: dict[str, bool], name: str
) -> None:
    content = parquet_of({name: pa.array([MOMENT.replace(tzinfo=None)], pa.timestamp("us"))}, **options)
    imported(tmp_path, content, status=1)
    message = f'/in: the column "{name}" has times without a zone: --assume-utc takes them as UTC; it is Timestamp('
    assert message in capsys.readouterr().err
    imported(tmp_path, content, "--assume-utc")
    assert table_of(tmp_path)[name].to_pylist() == [MOMENT]


def test_a_time_may_be_text_and_nulls_are_absent(tmp_path: Path) -> None:
    columns = {"timestamp": ["2026-08-06T08:53:31.250+02:00", None], "source": pa.array([None, "x"]).dictionary_encode(),
               "customer_id": pa.nulls(2), "properties": pa.array([None, ""], pa.large_string()), "ingested_at": pa.nulls(2, UTC_TIME)}  # fmt: skip
    imported(tmp_path, parquet_of(columns))
    first, second = events_of(tmp_path)
    assert first == {"event_name": "call", "event_id": "0", "external_customer_id": "cust", "customer_id": "",
                     "source": "", "timestamp": LINE_TIME, "properties": {}}  # fmt: skip
    assert (second["source"], second["properties"]) == ("x", {})
    assert abs(datetime.fromisoformat(second["timestamp"]) - datetime.now(UTC)).total_seconds() < 3600


PROPERTIES = {  # the column, the JSON of its two rows
    "text": (pa.array(['{"n": 1.50, "e": 1E5}', None]), ['{"n": 1.50, "e": 1E5}', "{}"]),
    "struct": (pa.array([{"a": 1, "b": {"c": [1, None], "d": "x"}}, {"a": None, "b": None}]), ['{"a":1,"b":{"c":[1,null],"d":"x"}}', "{}"]),
    "map": (pa.array([[("k", 0.5), ("l", None)], None], pa.map_(pa.string(), pa.float64())), ['{"k":0.5}', "{}"]),
    "struct in a map": (pa.array([[("k", {"t": MOMENT})], []], pa.map_(pa.string(), pa.struct([("t", UTC_TIME)]))),
                        ['{"k":{"t":"2026-08-06T06:53:31.250Z"}}', "{}"]),
    "empty": (pa.nulls(2), ["{}", "{}"]),
}  # fmt: skip


@table(("column", "texts"), PROPERTIES.values(), ids=PROPERTIES)
def test_properties_are_text_a_struct_or_a_map(tmp_path: Path, column: pa.Array, texts: list[str]) -> None:
    imported(tmp_path, parquet_of({"properties": column}))
    assert table_of(tmp_path).sort_by("event_id")["properties"].to_pylist() == texts


SCALARS = {  # a value of each type, and its JSON
    pa.string(): ("\u2028\x00", '"\u2028\\u0000"'),
    pa.string_view(): ("x", '"x"'),
    pa.dictionary(pa.int32(), pa.string()): ("x", '"x"'),
    pa.bool_(): (True, "true"),
    pa.int8(): (-1, "-1"),
    pa.int64(): (-(2**63), "-9223372036854775808"),
    pa.uint64(): (2**64 - 1, "18446744073709551615"),
    pa.float32(): (0.1, "0.1"),
    pa.float64(): (0.1, "0.1"),
    pa.decimal128(38, 2): (Decimal("-123456789012345678901234567.80"), "-123456789012345678901234567.80"),
    pa.date32(): (date(2026, 8, 6), '"2026-08-06"'),
    pa.time64("us"): (time(1, 2, 3, 4), '"01:02:03.000004"'),
    pa.timestamp("ns", "UTC"): (MOMENT, '"2026-08-06T06:53:31.250Z"'),
    pa.timestamp("us"): (MOMENT.replace(tzinfo=None), '"2026-08-06T06:53:31.250"'),
    pa.binary(): (b"\xff\x00", '"ff00"'),
}


def test_a_property_column_may_have_any_type_that_is_not_nested(tmp_path: Path) -> None:
    names = [f"properties.{number}" for number in range(len(SCALARS))]
    columns = {
        name: pa.array([value, None], kind) for name, (kind, (value, _)) in zip(names, SCALARS.items(), strict=True)
    }
    imported(tmp_path, parquet_of(columns | {"properties": ['{"first": 1.50}', '{"first": 1.50}']}))
    wanted = '{"first":1.50%s}' % "".join(f',"{number}":{text}' for number, (_, text) in enumerate(SCALARS.values()))
    assert table_of(tmp_path).sort_by("event_id")["properties"].to_pylist() == [wanted, '{"first": 1.50}']


def test_nan_is_an_absent_property_and_uuids_become_text(tmp_path: Path) -> None:
    made = UUID("4118e5e5-67f1-458f-a7a9-1748d6d583e9")
    columns = {"event_id": pa.array([made.bytes], pa.uuid()), "properties.nan": [float("nan")], "properties.one": [1]}
    imported(tmp_path, parquet_of(columns))
    assert (stored_ids(tmp_path), events_of(tmp_path)[0]["properties"]) == ([str(made)], {"one": 1})


def test_flexprices_own_table_is_imported_and_rows_without_an_id_get_one(tmp_path: Path) -> None:
    theirs = {"id": ["evt"], "tenant_id": [b"t"], "environment_id": ["env"], "environment": ["production"], "event_name": ["call"],
              "external_customer_id": ["cust"], "customer_id": [None], "source": ["api"], "properties": ['{"n": "1"}'],
              "timestamp": pa.array([MOMENT], pa.timestamp("ms", "UTC")), "ingested_at": pa.array([MOMENT], pa.timestamp("ms", "UTC"))}  # fmt: skip
    content = io.BytesIO()
    pq.write_table(pa.table(theirs), content)
    imported(tmp_path, content.getvalue())
    assert table_of(tmp_path).select(["event_id", "environment", "ingested_at"]).to_pylist() == [
        {"event_id": "evt", "environment": "development", "ingested_at": MOMENT}]  # fmt: skip
    nameless = parquet_of({"event_id": pa.nulls(3), "source": ["a", "a", "b"]})
    for _ in range(2):
        imported(tmp_path / "nameless", nameless)
    made = stored_ids(tmp_path / "nameless")
    assert len({*made}) == len(made) == 3
    assert all(re.fullmatch("import_[0-9a-f]{32}", event_id) for event_id in made)


# ---------------------------------------------------------------------------------------------- import: bad input

DEEP = "[" * 600 + "]" * 600
BAD_ROWS = {  # columns of three rows, of which the second is bad; the field and the problem
    "no name": ({"event_name": ["call", None, "call"]}, "event_name: is required"),
    "empty customer": ({"external_customer_id": ["c", "", "c"]}, "external_customer_id: is required"),
    "no JSON": ({"properties": ["{}", "{,}", None]}, "properties: is not valid JSON: "),
    "no object": ({"properties": ["{}", "[1]", None]}, "properties: must be an object, got [1]"),
    "too deep": ({"properties": ["{}", '{"a": %s}' % DEEP, None]}, "properties: is nested deeper than 500 levels"),
    "a time as text": ({"timestamp": [None, "2026-08-06 06:53:31", None]}, 'timestamp: must be RFC 3339 with a zone, got "2026-'),
    "a far time": ({"timestamp": pa.array([0, 2**53, 0], pa.timestamp("ms", "UTC"))}, 'timestamp: must lie in the years 1 to 9999 in UTC, got 9007199254740992000 microseconds from 1970'),
    "a far time in properties": ({"properties.t": pa.array([0, 2**53, 0], pa.timestamp("ms"))}, 'row: has a value that cannot be written as JSON in "properties.t"'),
    "a time beyond": ({"timestamp": pa.array([0, 2**62, 0], pa.timestamp("ms", "UTC"))}, "row: has a value that cannot be written as JSON in \"timestamp\" (a time out of range)"),
    "before 1": ({"timestamp": pa.array([0, -(2**56), 0], UTC_TIME)}, "timestamp: must lie in the years 1 to 9999 in UTC, got -72057594037927936 micro"),
    "two values": ({"properties": ["{}", '{"a": 1, "b": 2.0}', "{}"], "properties.a": [None, 2, 3], "properties.b": [None, 2, 3]},
                   "properties.a: has another value in the column properties"),
    "too long": ({"properties": ["{}", json.dumps({"a": "x" * 3000}), "{}"]}, "row: is longer than 1000 bytes"),
    "too long beside": ({"properties.a": ["", "x" * 3000, ""]}, "row: is longer than 1000 bytes"),
}  # fmt: skip


@table(("columns", "problem"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_bad_row_is_named_by_its_number_or_goes_to_the_rejects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], columns: dict[str, Any], problem: str
) -> None:
    content = parquet_of(columns)
    flags = ("--max-body-bytes", 1000) if "longer" in problem else ()
    imported(tmp_path, content, *flags, status=1)
    message = capsys.readouterr().err
    assert message.startswith(f"eventstore: {tmp_path}/in: row 2: {problem}")
    assert "; stored before it: 1 event, 1 of them new; " in message
    assert stored_ids(tmp_path) == ["0"]
    rejects = tmp_path / "rejects.ndjson"
    imported(tmp_path, content, "--skip-invalid", rejects, *flags)
    assert {*stored_ids(tmp_path)} == {"0", "2"}
    (reject,) = map(json.loads, rejects.read_bytes().splitlines())
    (error,) = reject["errors"]
    assert (reject["row"], error["field"]) == (2, problem.partition(":")[0])
    assert "row: has a value" in problem or reject["event"]["event_id"] == "1"
    assert "another value" not in problem or reject["event"]["named"] == {"a": 2, "b": 2}


def test_rows_are_counted_across_batches_and_groups(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    names = ["call"] * 3000
    names[2500] = ""
    imported(tmp_path, parquet_of({"event_name": names}, row_group_size=700), status=1)
    assert (
        "in: row 2501: event_name: is required; stored before it: 2,500 events, 2,500 of them"
        in capsys.readouterr().err
    )


class _Keys(encryption.KmsClient):  # type: ignore[misc]  # pyarrow has no types
    def __init__(self, _config: object) -> None:
        super().__init__()

    def wrap_key(self, key_bytes: bytes, _name: str) -> bytes:
        return base64.b64encode(key_bytes)


# ---------------------------------------------------------------------------------------------- files that expand


def large_rows(number: int, value_bytes: int, **options: Any) -> bytes:
    properties = json.dumps({"text": "x" * value_bytes})
    columns = {"event_name": ["call"], "external_customer_id": ["cust"], "properties": [properties]}
    limit = {"dictionary_pagesize_limit": 1 << 30}
    return parquet_of(
        {name: values * number for name, values in columns.items()}, compression="zstd", **limit, **options
    )


@pytest.mark.slow
@table("options", [{}, {"use_dictionary": False}, {"version": "1.0"}, {"data_page_version": "2.0"},
                   {"use_dictionary": False, "column_encoding": {"properties": "DELTA_BYTE_ARRAY"}}], ids=str)  # fmt: skip
def test_a_batch_has_few_rows_if_the_pages_expand_to_much(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    content = large_rows(40, 100_000, **options)
    assert len(content) < 20_000
    sizes = []
    decode = parquet._batch_rows

    def decoded(batch: Any) -> Any:
        sizes.append(batch.num_rows)
        return decode(batch)

    monkeypatch.setattr(parquet, "_batch_rows", decoded)
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 500_000)
    imported(tmp_path, content)
    assert (sum(sizes), max(sizes) <= 5) == (40, True)
    sizes.clear()
    imported(tmp_path, large_rows(300, 10))
    assert max(sizes) > 200
    assert len(stored_ids(tmp_path)) == 300


def test_a_page_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_MAX_PAGE_BYTES", 1 << 20)
    imported(tmp_path, large_rows(3, 3 << 20), status=1)
    assert f"{tmp_path}/in: has a page of 3 MB, at most 1 MB are read: write smaller pages" in capsys.readouterr().err


def test_a_row_of_many_columns_that_does_not_fit_into_memory_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parquet, "_MAX_PAGES_BYTES", 10 << 20)
    columns: dict[str, Any] = {f"properties.p{number}": ["x" * (1 << 20)] for number in range(9)}
    imported(tmp_path, parquet_of(columns), "--max-body-bytes", 10 << 20)
    columns |= {f"properties.n{number}": [number] for number in range(50)}
    imported(tmp_path, parquet_of(columns), "--max-body-bytes", 10 << 20)
    columns |= {f"properties.more{number}": ["x" * (1 << 20)] for number in range(2)}
    imported(tmp_path, parquet_of(columns), status=1)
    assert f"{tmp_path}/in: has columns of texts with pages of 11 MB together, at most 10 MB" in capsys.readouterr().err


def test_a_batch_has_few_rows_if_many_columns_expand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decode, sizes = parquet._batch_rows, []

    def decoded(batch: Any) -> Any:
        sizes.append(batch.num_rows)
        return decode(batch)

    monkeypatch.setattr(parquet, "_batch_rows", decoded)
    monkeypatch.setattr(parquet, "_BATCH_BYTES", 500_000)
    columns = {f"properties.p{number}": ["x" * 10_000] * 30 for number in range(10)}
    imported(tmp_path, parquet_of(columns, compression="zstd"))
    assert (sum(sizes), max(sizes) <= 5) == (30, True)


# ---------------------------------------------------------------------------------------------- files that cannot be read


def encrypted(**options: bool) -> bytes:
    settings = encryption.EncryptionConfiguration(footer_key="f", column_keys={"k": ["event_id"]}, **options)
    factory = encryption.CryptoFactory(_Keys)
    properties = factory.file_encryption_properties(encryption.KmsConnectionConfig(), settings)
    return parquet_of({"source": ["x"] * 3}, encryption_properties=properties)


def nested(depth: int) -> bytes:
    kind = pa.int64()
    for _ in range(depth):
        kind = pa.struct([("a", kind)])
    return parquet_of({"properties": pa.nulls(1, kind)}, store_schema=False)


GOOD = parquet_of({"source": ["x"] * 3})
BAD_FILES = {  # the content, or what makes it if that takes long; the problem, the flags
    "an empty one": (b"", "is not Parquet: it does not start with PAR1", "--format", "parquet"),
    "its mark alone": (b"PAR1", "is cut off: a Parquet file has its table of contents at its end"),
    "cut off": (GOOD[:-10], "is cut off: a Parquet file has its table of contents at its end"),
    "cut at the start": (GOOD[:4] + GOOD[-200:], "is cut off: a Parquet file has its table of contents at its end"),
    "contents damaged": (GOOD[:-40] + b"\xff" * 30 + GOOD[-10:], "cannot be read as Parquet ("),
    "encrypted": (encrypted, "is encrypted: decrypt it first, and import the result"),
    "encrypted columns": (lambda: encrypted(plaintext_footer=True), "cannot be read from row 1 on: it is damaged, or its columns are encrypted ("),
    "packed": (gzip.compress(GOOD), "Parquet is read from its end: name a file that is not gzipped, not a pipe"),
    "a list of dates": (parquet_of({"event_name": pa.array([[date(2026, 1, 1)]])}), 'the column "event_name" must be text; it is List(Date32'),
    "a number as a text": (parquet_of({"external_customer_id": [5]}), 'the column "external_customer_id" must be text; it is Int64'),
    "bytes as a text": (parquet_of({"source": [b"x"]}), 'the column "source" must be text; it is Binary'),
    "a date as a time": (parquet_of({"timestamp": [date(2026, 1, 1)]}), 'the column "timestamp" must be a timestamp, or RFC 3339 text; it is Date32'),
    "a list as properties": (parquet_of({"properties": [[1]]}), 'the column "properties" must be JSON text, a struct or a map; it is List('),
    "a nested property": (parquet_of({"properties.a": [{"b": 1}]}), 'the column "properties.a" must hold single values: only properties may be'),
    "an unknown column": (parquet_of({"when": [1]}), 'the schema has unknown columns: "when"; known are event_name, '),
    "two ids": (parquet_of({"id": ["x"]}), "the schema has the column id and event_id twice"),
    "a map of numbers": (parquet_of({"properties": pa.array([[(1, 2)]], pa.map_(pa.int64(), pa.int64()))}), "row 1: row: has a value that cannot be written as JSON in \"properties\" ("),
    "2,000 columns": (lambda: parquet_of({f"properties.{n}": [1] for n in range(2_000)}), "the schema has 2003 columns, at most 1000 are read: write properties as"),
    "2,000 members": (lambda: parquet_of({"properties": pa.nulls(1, pa.struct([(str(n), pa.int8()) for n in range(2_000)]))}), "the schema has 2003 columns, at most"),
    "600 levels": (lambda: nested(600), "the schema is nested deeper than 500 levels: write properties as JSON text"),
    "1,100 levels": (lambda: nested(1100), "the schema is nested deeper than 500 levels: write properties as JSON text"),
    "--assume-utc for CSV": (b"event_name,external_customer_id\n", "--assume-utc is for Parquet, this is csv: write its times with a zone", "--assume-utc"),
}  # fmt: skip


@pytest.mark.slow
@table("case", [pytest.param(case, id=name) for name, case in BAD_FILES.items()])
def test_a_file_that_cannot_be_read_is_refused_with_one_message(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], case: tuple[Any, ...]
) -> None:
    content, problem, *flags = case
    imported(tmp_path, content() if callable(content) else content, *flags, status=1)
    out, message = capfd.readouterr()
    assert (out, message.count("\n")) == ("", 1), message
    assert message.startswith(f"eventstore: {tmp_path}/in: {problem}")
    assert message.endswith("; stored before it: 0 events, 0 of them new; correct it and import the file again\n")
    assert sorted(sizes_in(tmp_path)) == ["in"]


def test_the_rows_before_a_damaged_page_are_stored(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = parquet_of({"source": ["x" * 10] * 1000}, use_dictionary=False, compression="none", row_group_size=500)
    page_start = content.rindex(b"x" * 10) - 10_000  # among the second group's
    damaged = content[:page_start] + b"\xff" * 100 + content[page_start + 100 :]
    imported(tmp_path, damaged, status=1)
    message = capsys.readouterr().err
    (row,) = map(int, re.findall(r"cannot be read from row (\d+) on: it is damaged", message))
    assert 256 < row <= 513
    assert f"stored before it: {row - 1} events, " in message
    assert len(stored_ids(tmp_path)) == row - 1


def test_an_import_of_a_damaged_file_ends_with_one_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Some changes make the library panic, which is not a Python exception and prints a trace."""
    content = parquet_of(
        {"source": ["a", "b"] * 200, "properties": [{"a": number, "b": ["x"]} for number in range(400)]}
    )
    refused = 0
    for at_ in range(4, len(content), 97):
        changed = bytearray(content)
        changed[at_] ^= 0xFF
        (tmp_path / "in").write_bytes(changed)
        status = command_line("import", "--db", tmp_path / "events.db", "--dry-run", tmp_path / "in")
        refused += status
        assert re.fullmatch(r"eventstore: .+\n", capfd.readouterr().err)
    assert refused > 10


# ---------------------------------------------------------------------------------------------- the command line


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="needs pipes")
def test_standard_input_may_be_a_file_but_not_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "in").write_bytes(GOOD)
    with (tmp_path / "in").open("rb") as file:
        done = run(*SCRIPT, "import", "-", cwd=tmp_path, stdin=file)
    assert "imported 3 events" in done.stderr
    with subprocess.Popen([*SCRIPT, "import", "-", "--db", "new.db"], cwd=tmp_path, stdin=subprocess.PIPE,
                          stderr=subprocess.PIPE) as process:  # fmt: skip
        message = process.communicate(GOOD, timeout=60)[1]
    assert process.returncode == 1
    assert message.startswith(b"eventstore: standard input: Parquet is read from its end: name a file that")
    assert not (tmp_path / "new.db").exists()


@table(("arguments", "part"), [
    ("--properties-column tokens", "must look like tokens:float64, TYPE one of string, float64, int64, bool; got 'tokens'"),
    ("--properties-column tokens:double", "got 'tokens:double'"),
    ("--properties-column :int64", "got ':int64'"),
    ("--properties-column a:int64", "--properties-column goes with --format parquet"),
    ("--format parquet --properties-column a:int64 --properties-column a:bool", "--properties-column a is given twice"),
    ("--format parquet -o out.gz", "--output out.gz: Parquet is compressed already; leave .gz out"),
    ("-o out.parquet.gz", "--output out.parquet.gz: Parquet is compressed already; leave .gz out"),
    ("--format parquet --tenant-id t", "go with --format clickhouse"),
])  # fmt: skip
def test_flags_that_do_not_fit_the_format_are_refused(tmp_path: Path, arguments: str, part: str) -> None:
    imported(tmp_path, lines_of(event("a")))
    done = refusal(tmp_path, "export", *arguments.split())
    assert (done.returncode, done.stdout) == (2, "")
    assert part in done.stderr
    assert sorted(sizes_in(tmp_path)) == ["events.db", "in"]


@pytest.mark.skipif(os.name == "nt", reason="needs a pseudo terminal")
def test_an_export_to_a_terminal_is_refused(tmp_path: Path) -> None:
    import pty

    imported(tmp_path, lines_of(event("a")))
    terminal, screen = pty.openpty()
    with os.fdopen(screen, "w") as stdout:
        done = forked(tmp_path, "export", "--format", "parquet", stdout=stdout)
    os.close(terminal)
    assert (done.returncode, done.stderr) == (
        2,
        "eventstore: --format parquet cannot go to a terminal: name a file with --output\n",
    )


@pytest.mark.slow
@table(
    "arguments",
    ["import in --db new.db", "import in --format parquet --db new.db", "export --db old.db -o out.parquet"],
)
def test_without_arro3_the_message_says_what_to_install_and_other_formats_work(tmp_path: Path, arguments: str) -> None:
    code = "import sys; sys.modules['arro3'] = None; import eventstore; sys.exit(eventstore.main())"
    (tmp_path / "lines").write_bytes(lines_of(event("a")))
    (tmp_path / "in").write_bytes(GOOD)
    assert forked(tmp_path, "import", "lines", "--db", "old.db", code=code).returncode == 0
    assert forked(tmp_path, "export", "--db", "old.db", code=code).returncode == 0
    done = forked(tmp_path, *arguments.split(), code=code)
    assert done.returncode == 2
    assert re.fullmatch(
        r"eventstore: Parquet needs arro3: .+ -m pip install arro3-core arro3-io \(or .+\)\n", done.stderr
    )
    assert sorted(sizes_in(tmp_path)) == ["in", "lines", "old.db"]


# ---------------------------------------------------------------------------------------------- memory

REPORT = "import sys, eventstore; eventstore.main(sys.argv[1:]); print(open('/proc/self/status').read())"


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux for the peak")
def test_import_and_export_need_no_more_memory_for_more_events(tmp_path: Path) -> None:
    """The database stays small, as there are only 100 ids: only holding the file would need more."""

    def peak(*arguments: object) -> int:
        done = forked(tmp_path, *arguments, code=REPORT)
        assert "ported" in done.stderr
        (peak_kb,) = re.findall(r"VmHWM:\s+(\d+) kB", done.stdout)
        return int(peak_kb) * 1024

    peaks = []
    for number in (20_000, 100_000):
        folder = tmp_path / str(number)
        folder.mkdir()
        rows = [Row(1, f"{each}", "cust", "", "call", "", NOW + each, NOW, f'{{"text": "{os.urandom(100).hex()}"}}')
                for each in range(number)]  # fmt: skip
        with serving(folder), closing(eventstore.connect(str(folder / "events.db"))) as conn:
            assert eventstore.insert_events(conn, rows, 5) == number
        out = peak("export", "--db", folder / "events.db", "-o", folder / "out.parquet")
        read = pq.read_table(folder / "out.parquet")
        few = pa.array([f"{each % 100}" for each in range(number)])
        pq.write_table(read.set_column(1, "event_id", few), folder / "few.parquet")
        peaks.append((out, peak("import", folder / "few.parquet", "--db", folder / "few.db")))
    assert (folder / "few.parquet").stat().st_size > 10_000_000
    for small, large in zip(*peaks, strict=True):
        assert large - small < 12_000_000
        assert large < 150_000_000
