"""`python -m benchmarks.aging serve FLAGS`: our server with clocks that run through a day in a minute."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from eventstore import now_us, parse_arguments, serve
from eventstore_extras import retention

__all__: list[str] = []

_SPEED = 24 * 60


def _main(flags: Sequence[str]) -> int:
    start_us, monotonic_us = now_us(), retention.monotonic_us
    retention.monotonic_us = lambda: _SPEED * monotonic_us()
    arguments = parse_arguments(flags)
    arguments.clock = lambda: start_us + _SPEED * (now_us() - start_us)
    return serve(arguments)


if __name__ == "__main__":
    sys.exit(_main(sys.argv[1:]))
