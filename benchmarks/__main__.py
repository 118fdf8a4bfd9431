"""The command line: `python -m benchmarks --help`."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.bench import FULL, QUICK, Effort
from benchmarks.compare import compare
from benchmarks.events import KEY
from benchmarks.hostile import measure_hostility
from benchmarks.peers import compare_with_peers
from benchmarks.soak import soak
from benchmarks.versions import compare_versions


def _parser() -> argparse.ArgumentParser:
    text = "How fast eventstore is, compared with the least that the same machine needs for the same work."
    parser = argparse.ArgumentParser("python -m benchmarks", description=text)
    parser.add_argument("--dir", help="where to create the temporary folder; the disk there is measured")
    effort = parser.add_mutually_exclusive_group()
    effort.set_defaults(effort=Effort())
    for flag, value in (("--quick", QUICK), ("--full", FULL)):
        sizes = " and ".join(f"{size:,}" for size in value.sizes)
        effort.add_argument(flag, dest="effort", action="store_const", const=value, help=f"tables of {sizes} events")
    commands = parser.add_subparsers(dest="command", title="instead of the table")
    soak_parser = commands.add_parser("soak", help="mixed load: do memory, file, WAL, handles and latencies stay flat?")
    soak_parser.add_argument("--minutes", type=float, default=10, help="default %(default)s")
    peers_parser = commands.add_parser("peers", help="the same events in Datasette and PocketBase")
    hostile_parser = commands.add_parser(
        "hostile", help="what an ordinary client sees beside one that tries to stop it"
    )
    hostile_parser.add_argument("--seconds", type=float, default=10, help="for each attack; default %(default)s")
    hostile_parser.add_argument("--events", type=int, default=200_000, help="of the hostile key; default %(default)s")
    peers_parser.add_argument("--events", type=int, default=20_000, help="a multiple of 1000; default %(default)s")
    versions_parser = commands.add_parser("versions", help="another version of eventstore beside this one")
    versions_parser.add_argument("clone", type=Path, help="a clone, or a worktree of git, with the other version")
    versions_parser.add_argument("--events", type=int, default=1_000_000, help="in each file; default %(default)s")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    os.environ["EVENTSTORE_FORWARD_API_KEY"] = KEY
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # cleans up as after Ctrl-C
    with tempfile.TemporaryDirectory(prefix="eventstore-benchmark-", dir=arguments.dir) as folder:
        if arguments.command == "soak":
            return soak(arguments.minutes, Path(folder))
        if arguments.command == "hostile":
            return measure_hostility(arguments.seconds, arguments.events, Path(folder))
        if arguments.command == "peers":
            return compare_with_peers(arguments.events, Path(folder))
        if arguments.command == "versions":
            return compare_versions(arguments.clone, arguments.events, arguments.effort, Path(folder))
        return compare(arguments.effort, Path(folder))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
