"""How figures are printed: numbers, Markdown tables, and the machine that the figures were measured on."""

from __future__ import annotations

import os
import platform
import re
import sqlite3
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

__all__ = ["format_number", "machine", "markdown"]


def format_number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def markdown(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table. The first two columns are aligned to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    rule = ["-" * width if i < 2 else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    aligned = [
        [
            cell.ljust(width) if i < 2 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        for line in (lines[0], rule, *lines[1:])
    ]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in aligned)


def _fsyncs_per_s(folder: Path) -> float:
    with tempfile.TemporaryFile(dir=folder, buffering=0) as file:
        start = time.perf_counter()
        for _ in range(500):
            file.write(bytes(4096))
            os.fsync(file.fileno())
        return 500 / (time.perf_counter() - start)


def machine(folder: Path) -> str:
    """Describe the processor, the software and the disk of the folder in one line."""
    cpuinfo, mounts = Path("/proc/cpuinfo"), Path("/proc/mounts")
    models = re.findall(r"model name\s*: (.*)", cpuinfo.read_text()) if cpuinfo.exists() else []
    mounted = [line.split()[1:3] for line in mounts.read_text().splitlines()] if mounts.exists() else []
    above = [(len(mount), kind) for mount, kind in mounted if folder.resolve().is_relative_to(mount)]
    file_system = max(above)[1] if above else "unknown file system"
    return (
        f"{models[0] if models else platform.processor() or platform.machine()}, {os.cpu_count()} cores, "
        f"{platform.system()}; Python {platform.python_version()}, SQLite {sqlite3.sqlite_version}; "
        f"{file_system}, {_fsyncs_per_s(folder):,.0f} synced writes/s of 4 KB"
    )
