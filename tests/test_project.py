"""The project around the code: the benchmark and the wheel."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys

import benchmark
import eventstore
from conftest import DEBUGGER, KEY, ROOT, Live, event, ids, run, store, table

# ---------------------------------------------------------------------------------------------- the benchmark

QUICK_BENCHMARK = (sys.executable, ROOT / "benchmark.py", "--quick", "--dir")


def test_the_benchmark_has_a_number_in_every_cell_and_cleans_up(tmp_path):
    done = run(*QUICK_BENCHMARK, tmp_path, timeout=300)
    assert done.returncode == 0, done.stderr
    lines = [line.strip("|").split("|") for line in done.stdout.splitlines() if line.startswith("|")]
    head, _, *rows = [[cell.strip() for cell in line] for line in lines]
    assert head == ["", "floor", "1,000 events", "its floor", "ratio", "2,000 events", "its floor", "ratio", "growth"]
    assert [name for name, *_ in rows] == [f"{name}, {unit}" for name, unit, _ in benchmark.ROWS]
    assert [cell for _, _, *cells in rows for cell in cells if not re.fullmatch(r"[0-9,]+(\.[0-9]+)?", cell)] == []
    assert list(tmp_path.iterdir()) == []


@table("number", [signal.SIGINT, signal.SIGTERM])
def test_a_benchmark_that_is_interrupted_leaves_nothing_behind(tmp_path, number):
    process = subprocess.Popen([*map(str, QUICK_BENCHMARK), str(tmp_path)], stderr=subprocess.PIPE, text=True)
    with process:
        assert any("single events" in line for line in process.stderr)
        (folder,) = tmp_path.iterdir()
        assert [path.suffix for path in folder.glob("*.db")] == [".db"]
        process.send_signal(number)
        process.stderr.read()  # ends when its servers have ended, too
        assert process.wait(60) == 130
    assert list(tmp_path.iterdir()) == []


@table(
    ("later", "verdict"),
    [
        ({}, []),
        ({"RSS MB": 103, "page p99 ms": 20, "WAL MB": 60}, []),
        ({"RSS MB": 130}, ["RSS MB went from 100 to 130"]),
        ({"WAL MB": 100}, ["WAL MB went from 64.0 to 100"]),
        ({"handles": 50}, ["handles went from 40.0 to 50.0"]),
        ({"page p99 ms": 40}, ["page p99 ms went from 20.0 to 40.0"]),
        ({"events/s": 1000}, ["events/s went from 2,000 to 1,000"]),
    ],
)
def test_the_soak_names_what_did_not_stay_flat(later, verdict):
    warm = {"events/s": 2000, "RSS MB": 100, "WAL MB": 64, "handles": 40} | dict.fromkeys(benchmark.P99S, 20)
    cold = dict.fromkeys(warm, 1)
    assert benchmark.rises([cold] * 3 + [warm] * 3 + [warm | later] * 3) == verdict


# ---------------------------------------------------------------------------------------------- the wheel


def test_the_wheel_serves_from_a_clean_environment(tmp_path):
    ignored = shutil.ignore_patterns(".*", "*venv*", "*.db*", "__pycache__", "build", "dist")
    shutil.copytree(ROOT, tmp_path / "checkout", ignore=ignored)
    programs = tmp_path / "venv" / ("Scripts" if os.name == "nt" else "bin")
    wheel = tmp_path / "dist" / f"flexprice_eventstore-{eventstore.__version__}-py3-none-any.whl"
    for command in (
        [sys.executable, "-m", "build", "--wheel", "--outdir", wheel.parent, tmp_path / "checkout"],
        [sys.executable, "-m", "venv", tmp_path / "venv"],
        [programs / "python", "-m", "pip", "install", wheel],
    ):
        done = run(*command, timeout=600, cwd=tmp_path)
        assert done.returncode == 0, done.stdout + done.stderr
    (site_packages,) = (path.parent for path in (tmp_path / "venv").rglob("eventstore.py"))
    assert [path.name for pattern in ("*.sql", "*.html") for path in site_packages.glob(pattern)] == []
    with Live(tmp_path / "elsewhere", "--api-key", KEY, command=[programs / "eventstore"]) as live:
        with live.client() as client:
            store(client, event("from the wheel"))
            assert ids(client) == ["from the wheel"]
            assert client.get("/").text == DEBUGGER
        assert live.stop() == 0
