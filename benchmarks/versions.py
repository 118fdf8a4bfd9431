"""Compare two versions of eventstore in one run. Each has a file of its format; the measurements alternate."""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.bench import Bench, Effort
from benchmarks.compare import cost_ratio
from benchmarks.load import generators
from benchmarks.measurements import SERVED, Measurement
from benchmarks.table import format_number, machine, markdown

__all__ = ["compare_versions"]


def _measure(measurement: Measurement, old: Bench, new: Bench) -> list[list[str]]:
    """Measure old, new, new, old, ... and return a line for each row of the measurement."""
    rounds = []
    for number in range(old.effort.rounds):
        order = (old, new) if number % 2 == 0 else (new, old)
        figures = {bench: measurement.ours(bench) for bench in order}
        rounds.append((figures[old], figures[new]))
    lines = []
    for position, (name, unit) in enumerate(measurement.units.items()):
        pairs = [(before[position], after[position]) for before, after in rounds]
        medians = map(statistics.median, zip(*pairs, strict=True))
        ratio = statistics.median(cost_ratio(unit, after, before) for before, after in pairs)
        lines.append([name, unit, *map(format_number, medians), f"{ratio:.2f}"])
    return lines


def compare_versions(clone: Path, size: int, effort: Effort, folder: Path) -> int:
    """Measure the version in another clone beside this one, and print the table. Returns the exit status."""
    lines: list[Sequence[str]] = [["", "unit", "before", "after", "cost after / before"]]
    description = machine(folder)
    with generators(2) as pool, ExitStack() as stack:
        benches = []
        for name, options in (("before", [clone.resolve()]), ("after", [])):
            (folder / name).mkdir()
            print(f"{name}: filling the table", file=sys.stderr, flush=True)
            benches.append(stack.enter_context(Bench(folder / name, size, effort, pool, *options)))
        for measurement in SERVED:
            print(next(iter(measurement.units)), file=sys.stderr, flush=True)
            lines += _measure(measurement, *benches)
    print(f"{description}; {size:,} events\n\n{markdown(lines)}")
    return 0
