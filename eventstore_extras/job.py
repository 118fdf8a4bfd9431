"""What the commands that read or write events and then end have in common: how they stop."""

from __future__ import annotations

import argparse
import asyncio
import os
import signal
import sqlite3
import sys
from collections.abc import Callable, Coroutine

from eventstore import say


class StopError(Exception):
    """A command stopped half-way; the message says where, what is done and what to do."""


async def until_sigterm(work: Coroutine[None, None, None]) -> None:
    """SIGTERM cancels it, as asyncio lets SIGINT: an exception amid its loop would leave tasks that nothing wakes."""
    loop, task = asyncio.get_running_loop(), asyncio.ensure_future(work)
    before = signal.signal(signal.SIGTERM, lambda *_: loop.call_soon_threadsafe(task.cancel))
    try:
        await task
    finally:
        signal.signal(signal.SIGTERM, before)


def run_job(job: Callable[[argparse.Namespace], int], arguments: argparse.Namespace) -> int:
    """The exit status of a command: 1 if it stopped half-way, having said why. StartError."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: files are removed, progress is kept
    try:
        return job(arguments)
    except BrokenPipeError:  # whoever read the export has enough; what Python would still flush goes nowhere
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except KeyboardInterrupt:
        say("interrupted")
    except (StopError, OSError) as error:
        say(str(error))
    except sqlite3.Error as error:
        say(f"the database {arguments.db} cannot be read or written: {error}")
    return 1
