"""The comparison with the floor: runs the measurements at every table size and prints the table."""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

from benchmarks.bench import Bench, Effort
from benchmarks.load import generators
from benchmarks.measurements import MEASUREMENTS, Figures, Measurement
from benchmarks.table import format_number, machine, markdown

__all__ = ["ROWS", "Compared", "compare", "cost_ratio", "table_lines"]

_MAX_ROUNDS_S = 120  # after this time no further round: a run that takes minutes does not depend on chance


class _TableRow(NamedTuple):
    name: str
    unit: str
    floor_name: str


ROWS = [_TableRow(name, unit, each.floor_name) for each in MEASUREMENTS for name, unit in each.units.items()]


class Compared(NamedTuple):
    """The medians of one row at one table size."""

    ours: float
    floor: float
    ratio: float  # our cost divided by the floor's


def cost_ratio(unit: str, value: float, base: float) -> float:
    """Return the cost of `value` divided by that of `base`; of a unit that ends in /s, more costs less."""
    return base / value if unit.endswith("/s") else value / base


def _measure(measurement: Measurement, bench: Bench) -> list[Compared]:
    """Measure floor, ours, floor, ours, ... and return the medians for each row of the measurement."""
    rounds: list[tuple[Figures, Figures]] = []
    start = time.perf_counter()
    while len(rounds) < bench.effort.rounds and (not rounds or time.perf_counter() - start < _MAX_ROUNDS_S):
        rounds.append((measurement.floor(bench), measurement.ours(bench)))
    compared = []
    for i, unit in enumerate(measurement.units.values()):
        pairs = [(ours[i], floor[i]) for floor, ours in rounds]
        ratio = statistics.median(cost_ratio(unit, *pair) for pair in pairs)
        ours, floor = map(statistics.median, zip(*pairs, strict=True))
        compared.append(Compared(ours, floor, ratio))
    return compared


def _measure_size(size: int, effort: Effort, folder: Path, pool: ProcessPoolExecutor) -> list[Compared]:
    """Run all measurements on a table of this size; returns one result for each row."""
    print(f"{size:,} events: filling the table", file=sys.stderr, flush=True)
    compared: list[Compared] = []
    with Bench(folder, size, effort, pool) as bench:
        for measurement in MEASUREMENTS:
            print(f"{size:,} events: {next(iter(measurement.units))}", file=sys.stderr, flush=True)
            compared += _measure(measurement, bench)
    return compared


def table_lines(sizes: Sequence[int], results: Sequence[list[Compared]]) -> list[list[str]]:
    """Return the cells of the table: for each row its floor, three cells for each size, and the growth."""
    head = ["", "floor"]
    for size in sizes:
        head += [f"{size:,} events", "its floor", "ratio"]
    lines = [[*head, "growth"]]
    for row, *at_sizes in zip(ROWS, *results, strict=True):
        line = [f"{row.name}, {row.unit}", row.floor_name]
        for compared in at_sizes:
            line += [format_number(compared.ours), format_number(compared.floor), f"{compared.ratio:.2f}"]
        growth = cost_ratio(row.unit, at_sizes[-1].ours, at_sizes[0].ours)
        lines.append([*line, f"{growth:.2f}"])
    return lines


def compare(effort: Effort, folder: Path) -> int:
    """Measure everything at every size and print the table. Returns the exit status."""
    description = machine(folder)
    with generators(2) as pool:
        results = [_measure_size(size, effort, folder, pool) for size in effort.sizes]
    print(f"{description}\n\n{markdown(table_lines(effort.sizes, results))}")
    return 0
