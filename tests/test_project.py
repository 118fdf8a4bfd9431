"""The project around the code: benchmarks, imports, and the wheel."""

from __future__ import annotations

import ast
import graphlib
import gzip
import importlib
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

import eventstore
from benchmarks import compare, measurements, soak
from forked import ROOT
from helpers import DEBUGGER, KEY, Live, environ_to_download, event, ids, python, refused, run, store, table

# ---------------------------------------------------------------------------------------------- benchmarks

QUICK_BENCHMARK = (sys.executable, "-m", "benchmarks", "--quick", "--dir")


@pytest.mark.slow(15)
def test_the_benchmark_fills_every_cell_and_cleans_up(tmp_path: Path) -> None:
    done = run(*QUICK_BENCHMARK, tmp_path, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head == ["", "floor", "1,000 events", "its floor", "ratio", "growth"]
    assert [name for name, *_ in rows] == [f"{name}, {unit}" for name, unit, _ in compare.ROWS]
    assert [cell for _, _, *cells in rows for cell in cells if not re.fullmatch(r"[0-9,]+(\.[0-9]+)?", cell)] == []
    assert list(tmp_path.iterdir()) == []


def test_the_benchmarks_table_compares_each_size_with_its_floor_and_the_largest_with_the_smallest() -> None:
    results = [[compare.Compared(ours, 2 * ours, 0.5)] * len(compare.ROWS) for ours in (100, 50)]
    head, *lines = compare.table_lines((1000, 2000), results)
    assert head == ["", "floor", "1,000 events", "its floor", "ratio", "2,000 events", "its floor", "ratio", "growth"]
    for (name, unit, floor_name), line in zip(compare.ROWS, lines, strict=True):
        growth = "2.00" if unit.endswith("/s") else "0.50"
        assert line == [f"{name}, {unit}", floor_name, "100", "200", "0.50", "50.0", "100", "0.50", growth]


@pytest.mark.slow(20)
def test_the_benchmark_measures_another_version_beside_this_one(tmp_path: Path) -> None:
    done = run(*QUICK_BENCHMARK, tmp_path, "versions", ROOT, "--events", 1000, timeout=300, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head == ["", "unit", "before", "after", "cost after / before"]
    measured = [(name, unit) for each in measurements.SERVED for name, unit in each.units.items()]
    assert [(name, unit) for name, unit, *_ in rows] == measured
    assert [cell for _, _, *cells in rows for cell in cells if not re.fullmatch(r"[0-9,]+(\.[0-9]+)?", cell)] == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
@table("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_an_interrupted_benchmark_leaves_no_files(tmp_path: Path, number: Any) -> None:
    process = subprocess.Popen([*QUICK_BENCHMARK, str(tmp_path)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    with process:
        assert process.stderr
        assert any("bulk of 1000" in line for line in process.stderr)
        (folder,) = tmp_path.iterdir()
        assert [path.suffix for path in folder.glob("*.db")] == [".db"]
        process.send_signal(number)
        process.stderr.read()  # ends with the last of its servers
        assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == []


@table(
    ("later", "verdict"),
    [
        ({}, []),
        ({"RSS MB": 103, "page p99 ms": 20, "WAL MB": 60}, []),
        ({"RSS MB": 130}, ["RSS MB went from 100 to 130"]),
        ({"WAL MB": 100}, ["WAL MB went from 64.0 to 100"]),
        ({"file MB": 600}, ["file MB went from 500 to 600"]),
        ({"behind": 4000}, []),
        ({"behind": 5000}, ["behind went from 1,000 to 5,000"]),
        ({"handles": 50}, ["handles went from 40.0 to 50.0"]),
        ({"page p99 ms": 40}, ["page p99 ms went from 20.0 to 40.0"]),
        ({"events/s": 1000}, ["events/s went from 2,000 to 1,000"]),
    ],
)
def test_the_soak_names_the_figures_that_did_not_stay_flat(later: dict[str, Any], verdict: list[str]) -> None:
    warm: dict[str, float] = {
        "events/s": 2000,
        "RSS MB": 100,
        "WAL MB": 64,
        "file MB": 500,
        "behind": 1000,
        "handles": 40,
        **dict.fromkeys(soak.P99S, 20),
    }
    cold = dict.fromkeys(warm, 1.0)
    assert soak.changes([cold] * 3 + [warm] * 3 + [warm | later] * 3) == verdict


# ---------------------------------------------------------------------------------------------- imports


@pytest.mark.slow
def test_the_service_serves_alone_and_names_what_other_commands_need(tmp_path: Path) -> None:
    for name in ("eventstore.py", "schema.sql", "debugger.html"):
        shutil.copy(ROOT / name, tmp_path)
    alone = (sys.executable, "-S", tmp_path / "eventstore.py")  # without the links of site-packages to this checkout
    libraries = {"PYTHONPATH": os.pathsep.join(sysconfig.get_path(name) for name in ("purelib", "platlib"))}
    keys = ("--api-key", KEY, "--api-key", "other=staging")
    with Live(tmp_path, *keys, command=alone, **libraries) as live, live.client() as client:
        store(client, event("alone"))
        assert ids(client) == ["alone"]
        with live.client("other") as other:
            assert ids(other) == []
        refused(client.post("/v1/events", content=gzip.compress(b"{}")), part="the body is not valid JSON")
        assert client.get("/").text == DEBUGGER
        assert live.stop() == 0
    commands = ("import in", "export", "replay --to http://127.0.0.1:1 --dry-run", "prune --before now",
                "serve --port 0 --api-key KEY;role=event_reader", "serve --port 0 --mock", "serve --port 0 --forward-to http://host", "serve --port 0 --retain-days 1")  # fmt: skip
    code = f"import eventstore; print([eventstore.main(command.split()) for command in {commands}])"
    done = run(sys.executable, "-S", "-c", code, cwd=tmp_path, env=os.environ | libraries)
    assert done.stdout == f"{[2] * len(commands)}\n", done.stderr
    for command, message in zip(commands, done.stderr.splitlines(), strict=True):
        needing = command.split()[3] if command.startswith("serve") else command.split()[0]
        beside = re.escape(str(tmp_path / "eventstore.py"))
        needing += "( with more than KEY or KEY=ENVIRONMENT in it)?"
        assert re.fullmatch(rf"eventstore: {needing} needs the folder eventstore_extras beside {beside}", message)


def test_the_service_imports_no_extras_and_no_pytest() -> None:
    code = """if True:
        import sys, eventstore
        app = eventstore.create_app(eventstore.Settings(db=":memory:", api_keys=(eventstore.ApiKey.hashed("k"),)))
        app.state.service.store.close()
        print({name.partition(".")[0] for name in sys.modules} & {"eventstore_extras", "pytest", "_pytest"})
    """
    assert python(code).stdout == "set()\n"


@pytest.mark.slow
def test_a_command_imports_only_the_extras_that_it_needs_and_one_copy_of_the_service(tmp_path: Path) -> None:
    def imported(stderr: str) -> set[str]:
        return set(re.findall(r"^import '(eventstore\S*)'", stderr, re.MULTILINE))

    script = (sys.executable, "-v", ROOT / "eventstore.py")
    with Live(tmp_path, "--mock", command=script) as live:
        served = (
            "",
            ".openapi",
            ".usage",
            ".resources",
            ".meters",
            ".features",
            ".analytics",
            ".analytics_scans",
            ".connections",
            ".keys",
            ".logs",
            ".serving",
            ".faults",
            ".hosts",
            ".rate_limits",
            ".mock",
            ".mock_clock",
            ".stored",
        )
        assert imported(live.log) == {f"eventstore_extras{room}" for room in served}
    for command, needed in (("import -", {"job", "entries", "files", "stored", "text_formats", "importing"}), ("export", {"job", "entries", "files", "stored", "exporting"}),
                            ("prune --before 2025-01-01T00:00:00Z", {"job", "entries", "files", "stored", "sending", "hiding", "proxies", "refused", "forward", "retention"}),
                            ("replay --to http://127.0.0.1:1 --dry-run", {"job", "entries", "files", "stored", "sending", "hiding", "proxies", "refused", "replay"}),
                            ("backup copy.db", {"job", "files", "stored", "backup"})):  # fmt: skip
        done = run(*script, *command.split(), "--db", tmp_path / "new.db", cwd=tmp_path, stdin=subprocess.DEVNULL)
        assert done.returncode == 0, done.stderr
        assert imported(done.stderr) == {"eventstore_extras", *(f"eventstore_extras.{room}" for room in needed)}


EXTRAS = {f"eventstore_extras.{path.stem}": path for path in (ROOT / "eventstore_extras").glob("[!_]*.py")}


def imported_names(name: str) -> dict[str, set[str]]:
    """Return the modules of the project that an extra imports, each with the names that it uses of it."""
    used: dict[str, set[str]] = {}
    aliases: dict[str, str] = {}
    tree = ast.parse(EXTRAS[name].read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module == "eventstore_extras":
            aliases |= {alias.asname or alias.name: f"eventstore_extras.{alias.name}" for alias in node.names}
            used |= {f"eventstore_extras.{alias.name}": set() for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module in {*EXTRAS, "eventstore"}:
            used.setdefault(node.module, set()).update(alias.name for alias in node.names)
        elif isinstance(node, ast.Constant) and node.value in EXTRAS:  # for importlib.import_module
            used.setdefault(node.value, set())
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in aliases:
            used.setdefault(aliases[node.value.id], set()).add(node.attr)
    return used


def test_imports_form_no_circle() -> None:
    [*graphlib.TopologicalSorter({name: imported_names(name) for name in EXTRAS}).static_order()]  # raises CycleError


@table("name", sorted(EXTRAS))
def test_modules_use_only_public_names_of_each_other(name: str) -> None:
    for module, names in imported_names(name).items():
        assert names <= {*getattr(importlib.import_module(module), "__all__", ())}, module


def test_the_map_of_the_service_lists_its_sections_in_order() -> None:
    sections = re.findall(r"^# -{90,} (.+)$", (ROOT / "eventstore.py").read_text("utf-8"), re.MULTILINE)
    assert eventstore.__doc__
    assert re.findall(r"^ {4}(?:\w+ +| +)(?<=.{16})(\S.*?)  ", eventstore.__doc__, re.MULTILINE) == sections


def test_all_other_names_of_the_service_begin_with_an_underscore() -> None:
    tree = ast.parse((ROOT / "eventstore.py").read_text("utf-8"))
    named = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)}
    assignments = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    stored = [node for each in assignments for node in ast.walk(each) if isinstance(node, ast.Name)]
    named |= {node.id for node in stored if isinstance(node.ctx, ast.Store)} & vars(eventstore).keys()
    assert {name for name in named if not name.startswith("_")} == {*eventstore.__all__} - {"__version__"}


def test_the_packaging_folder_does_not_hide_the_library_of_that_name() -> None:
    assert python("import packaging.version").returncode == 0


# ---------------------------------------------------------------------------------------------- the tests themselves

SENDING_SIGINT = "tests/test_importing.py::test_a_signal_stores_what_was_read_from_a_pipe[SIGINT]"


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("sh"), reason="needs sh")
def test_tests_can_send_sigint_in_a_script_that_ignores_it() -> None:
    pytest_command = (sys.executable, "-m", "pytest", "-q", "-m", "", "-p", "no:cacheprovider", SENDING_SIGINT)
    done = run("sh", "-c", '"$@" & wait $!', "sh", *pytest_command, cwd=ROOT, timeout=300)
    assert (done.returncode, "1 passed" in done.stdout) == (0, True), done.stdout


# ---------------------------------------------------------------------------------------------- the wheel

USES_THE_FIXTURE = """
import os, urllib.request
import pytest
from eventstore_extras.mock import MockServer, running_server

def test_the_fixture(flexprice: MockServer) -> None:
    body = b'{"event_name": "call", "external_customer_id": "cust", "event_id": "a"}'
    headers = {"x-api-key": os.environ["FLEXPRICE_API_KEY"]}
    urllib.request.urlopen(urllib.request.Request(os.environ["FLEXPRICE_API_HOST"] + "/events", body, headers))
    assert [event["id"] for event in flexprice.events()] == ["a"]
    with pytest.raises(TypeError):
        flexprice.fail(500)  # type: ignore[call-arg, arg-type]  # where MockServer is Any, strict mypy calls this unused
    with pytest.raises(TypeError, match="did you mean status"):
        flexprice.fail(statsu=500)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="page_sise"):
        flexprice.events(page_sise=1)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="nope"), running_server(nope=4):  # type: ignore[call-arg]
        pass
"""
USES_THE_LIBRARY = """
import eventstore
from eventstore_extras import analytics

settings = eventstore.Settings(db=":memory:", api_keys=(eventstore.ApiKey.hashed("key"),))
eventstore.create_app(settings, operations=analytics.OPERATIONS)
store: eventstore.Store = eventstore.Store(settings)
eventstore.Settings(db=5)  # type: ignore[arg-type]
eventstore.create_app("events.db")  # type: ignore[arg-type]
store.closed()  # type: ignore[attr-defined]
"""
# Reading the types of these libraries takes longer than all the rest.
CHECKS_OUR_TYPES = """
[mypy]
strict = true
[mypy-anyio.*,httpx.*,msgspec.*,pytest.*,_pytest.*,starlette.*,uvicorn.*]
follow_imports = skip
"""


@pytest.mark.slow(40)
def test_the_wheel_works_in_a_clean_environment_and_has_types(tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns(".*", "*venv*", "*.db*", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    wheel = tmp_path / "dist" / f"flexprice_eventstore-{eventstore.__version__}-py3-none-any.whl"
    installed, elsewhere = [programs / "eventstore"], tmp_path / "elsewhere"

    def works(*command: object, cwd: Path = tmp_path) -> None:
        done = run(*command, timeout=600, cwd=cwd, env=environ_to_download())
        assert done.returncode == 0, done.stdout + done.stderr

    # The editable install below uses an isolated build; a second one here would only take time.
    works(sys.executable, "-m", "build", "--no-isolation", "--outdir", wheel.parent, tmp_path / "checkout")
    works(sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv")  # installing pip there takes five seconds
    install = (sys.executable, "-m", "pip", "--python", programs / "python", "install")
    works(*install, wheel)
    (package,) = (path.parent for path in (tmp_path / "venv").rglob("debugger.html"))
    assert {path.name for path in package.parent.iterdir() if "eventstore" in path.name or path.suffix == ".sql"} == {
        "eventstore", "eventstore_extras", f"flexprice_eventstore-{eventstore.__version__}.dist-info"}  # fmt: skip
    for command in (installed, [programs / "python", "-m", "eventstore"]):
        with Live(elsewhere, "--api-key", KEY, command=command) as live:
            with live.client() as client:
                store(client, event("from the wheel"))
                assert ids(client) == ["from the wheel"]
                assert client.get("/").text == DEBUGGER
            assert live.stop() == 0
    works(*install, f"{wheel}[cli]", "pytest")
    with Live(tmp_path / "target", "--api-key", KEY, command=installed) as target, target.client() as client:
        works(*installed, "export", "-o", "out.gz", cwd=elsewhere)
        works(*installed, "import", "out.gz", "--db", "copy.db", cwd=elsewhere)
        works(*installed, "replay", "--db", "copy.db", "--to", target.url, "--api-key", KEY, cwd=elsewhere)
        assert ids(client) == ["from the wheel"]
    (elsewhere / "test_it.py").write_text(USES_THE_FIXTURE)
    (elsewhere / "library.py").write_text(USES_THE_LIBRARY)
    works(programs / "python", "-m", "pytest", cwd=elsewhere)
    (elsewhere / "mypy.ini").write_text(CHECKS_OUR_TYPES)
    mypy = (sys.executable, "-m", "mypy", "--python-executable", programs / "python")
    works(*mypy, "test_it.py", "library.py", cwd=elsewhere)
    # An editable install must not copy the service: a copy would hide later changes in the checkout.
    works(*install, "--no-deps", "-e", tmp_path / "checkout")
    found = run(programs / "python", "-c", "import eventstore; print(eventstore.__file__)", cwd=elsewhere)
    assert found.stdout == f"{tmp_path / 'checkout' / 'eventstore.py'}\n"
    works(programs / "python", "-m", "eventstore", "--version", cwd=elsewhere)
