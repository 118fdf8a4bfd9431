"""What the commands that read or write events and then end have in common: how they stop."""

from __future__ import annotations

import argparse
import os
import signal
import sqlite3
import sys
from collections.abc import Callable

from eventstore import say


class StopError(Exception):
    """A command stopped half-way; the message says where, what is done and what to do."""


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
