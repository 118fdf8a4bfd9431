"""Adds to the command `serve`: flags, operations, and the modules that some flags start."""

from __future__ import annotations

import _sqlite3
import ctypes
import gc
import importlib
import signal
import socket
import threading
from argparse import Namespace
from contextlib import suppress
from functools import partial
from types import ModuleType
from typing import Any

from starlette.middleware import Middleware

from eventstore import AddFlag, Service, StartError, log, positive
from eventstore_extras.connections import inherited_socket, raise_file_limit
from eventstore_extras.logs import set_up

__all__ = ["add_flags", "additions", "attach", "prepare"]

_MODULES = {  # flag -> the module that it starts
    "mock": "mock", "forward_to": "forward", "retain_days": "retention", "metrics": "metrics"
}  # fmt: skip
_OF_FORWARDING = ("forward_environment", "forward_everything", "delete_unforwarded")  # flags that need --forward-to


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"eventstore_extras.{name}")


def add_flags(add: AddFlag) -> None:
    """Add the flags of `serve` that need eventstore_extras."""
    add("--api-key-file", metavar="FILE", help="one key on a line, as for --api-key; comments after a #; read again on "
        "SIGHUP")  # fmt: skip
    add("--fd", metavar="N", type=int, help="serve on this listening socket, which the parent process has opened; a "
        "socket unit of systemd is found without it")  # fmt: skip
    add("--rate-limit", dest="rate_limits", metavar="documented|SINGLE,BULK", default={},
        type=lambda text: _module("rate_limits").parse_rate_limits(text),
        help="requests a minute for each key: FlexPrice's documented 1000,100, or other numbers; none by default"
        )  # fmt: skip
    add("--mock", action="store_true", help="open /_mock, which resets the events and lets requests fail, for tests")
    add("--allow-host", metavar="NAME", action="append", default=[], help="answer only if Host is this name, loopback "
        "or --host; may be given several times, and * is any name; a mock does so without the flag"
        )  # fmt: skip
    add("--forward-to", metavar="URL", help="send every event on to FlexPrice, or another eventstore; its key is "
        "EVENTSTORE_FORWARD_API_KEY, else FLEXPRICE_API_KEY")  # fmt: skip
    add("--forward-environment", metavar="NAME", help="the environment whose events are forwarded; needed if the API "
        "keys belong to several environments")  # fmt: skip
    add("--forward-interval-ms", type=positive(int), default=1000, help="longest wait for a batch to fill")
    add("--forward-max-event-bytes", metavar="N", type=positive(int), default=1_000_000, help="longest event that "
        "is forwarded, by its size in FlexPrice's queue; longer ones go to the file of refused events")  # fmt: skip
    add("--forward-everything", action="store_true", help="the target is not FlexPrice: also forward what FlexPrice "
        "would lose")  # fmt: skip
    add("--retain-days", metavar="N", type=positive(float), help="delete events N days after they were stored")
    add("--metrics", metavar="ADDRESS:PORT", help="serve metrics in Prometheus' text format at this address, without a "
        "key")  # fmt: skip
    add("--log-format", choices=["text", "json"], default="text", help="how to write the log")
    add("--delete-unforwarded", action="store_true", help="with --forward-to, let --retain-days also delete events of "
        "environments that are not forwarded")  # fmt: skip


def _stop_counting_memory() -> None:
    """Turn off SQLite's memory statistics, which all threads update under one lock.

    With the statistics, four readers on two cores take 1.15 to 1.9 times as long to sum a million events, and clients
    get 0.8 times as many pages. SQLite accepts the setting only before it is initialised, so shut it down first. Change
    nothing if SQLite is in use, or if its library cannot be reached (Windows).
    """
    with suppress(OSError, AttributeError):
        sqlite = ctypes.CDLL(_sqlite3.__file__)
        sqlite.sqlite3_memory_used.restype = ctypes.c_int64
        sqlite.sqlite3_config.argtypes = [ctypes.c_int]  # the rest is variadic, which Apple silicon passes differently
        if sqlite.sqlite3_memory_used() == 0:
            sqlite.sqlite3_shutdown()
            sqlite.sqlite3_config(9, ctypes.c_int(0))  # SQLITE_CONFIG_MEMSTATUS
            sqlite.sqlite3_initialize()


def prepare(arguments: Namespace) -> socket.socket | None:
    """Prepare the process, and return the listening socket if another process has opened it. Raises StartError."""
    unused = [name for name in _OF_FORWARDING if getattr(arguments, name)]
    if unused and not arguments.forward_to:
        flag = f"--{unused[0].replace('_', '-')}"
        raise StartError(f"{flag} has no effect without --forward-to: add that flag, or leave {flag} out")
    set_up(arguments)
    _stop_counting_memory()
    raise_file_limit()
    return inherited_socket(arguments.fd)


def additions(arguments: Namespace) -> dict[str, Any]:
    """Return the keyword arguments of create_app that add the operations of eventstore_extras."""
    if arguments.mock:
        found: dict[str, Any] = _module("mock").additions(arguments)
        return found
    hosts = _module("hosts")
    layers = [Middleware(hosts.AllowedHosts, allowed=hosts.hosts_of_flags(arguments))] if arguments.allow_host else []
    return {"operations": _module("analytics").OPERATIONS, "middleware": layers}


def _tune_interpreter() -> None:
    """Run the garbage collector less often, and exclude the modules' objects from it.

    With 64 requests in progress the collector would run all the time: p99 of single events was 1.4 to 1.7 times as
    long.
    """
    gc.freeze()
    gc.set_threshold(10_000)


def _on_hangup(service: Service, arguments: Namespace, *_: object) -> None:
    if not arguments.api_key_file:
        log.info("SIGHUP is ignored: there is no --api-key-file to read again")
        return
    # Use a thread: to add an environment takes the write lock, and the event loop must not wait for it.
    again = partial(_module("keys").read_again, service, arguments)
    threading.Thread(target=again, daemon=True).start()


def attach(service: Service, arguments: Namespace, address: Any) -> None:
    """Start the modules that the flags name. The server listens on `address`. Raises StartError."""
    for flag, module in _MODULES.items():
        if getattr(arguments, flag):
            _module(module).attach(service, arguments, address)
    _tune_interpreter()
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, partial(_on_hangup, service, arguments))
