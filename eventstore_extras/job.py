"""How the commands that read or write events stop: at a signal, at an error, or half-way."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Coroutine

from eventstore import say

__all__ = ["StopError", "run_job", "until_sigterm"]


class StopError(Exception):
    """A command stopped half-way. The message says why, what is done, and how to continue."""


async def until_sigterm(work: Coroutine[None, None, None]) -> None:
    """Run a coroutine, and cancel it on SIGTERM, as asyncio does on SIGINT.

    An exception raised by a signal handler inside the event loop would leave other tasks waiting without end.
    """
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        await task
    finally:
        signal.signal(signal.SIGTERM, before)


def run_job(job: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """Run a command and return its exit status: 1 if it stopped half-way, after saying why. Raises StartError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # like Ctrl-C: files are removed, progress is saved
    try:
        return job(arguments)
    except BrokenPipeError:  # the reader of the output has closed it: discard what Python would still flush
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say("interrupted")
    except (StopError, OSError) as error:
        say(str(error))
    except sqlite3.Error as error:
        say(f"the database {arguments.db} cannot be read or written: {error}")
    return 1
