"""`python -m benchmarks.aging serve FLAGS`: our server with a clock that runs through a day in a minute."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eventstore import now_us, parse_arguments, serve

__all__: list[str] = []

_SPEED = 24 * 60


def _main(flags: Sequence[str]) -> int:
    start_us = now_us()
    arguments = parse_arguments(flags)
    arguments.clock = lambda: start_us + _SPEED * (now_us() - start_us)
    return serve(arguments)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
