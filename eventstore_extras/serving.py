"""What eventstore_extras adds to the command `serve`: flags, operations, and the modules that some flags start."""

from __future__ import annotations

import importlib
import logging
import signal
import socket
import threading
from argparse import Namespace
from functools import partial
from types import ModuleType
from typing import Any

from starlette.middleware import Middleware

from eventstore import AddFlag, Service, positive
from eventstore_extras.connections import inherited_socket, raise_file_limit
from eventstore_extras.logs import set_up

__all__ = ["add_flags", "additions", "attach", "prepare"]

_MODULES = {  # flag -> the module that it starts
    "mock": "mock", "forward_to": "forward", "retain_days": "retention", "metrics": "metrics"
}  # fmt: skip

_log = logging.getLogger("eventstore")


def add_flags(add: AddFlag) -> None:
    """Add the flags of `serve` that need eventstore_extras."""
    add("--api-key-file", metavar="FILE", help="a key a line, as for --api-key; comments behind a #; read again on "
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
        "keys are of several")  # fmt: skip
    add("--forward-interval-ms", type=positive(int), default=1000, help="longest wait for a batch to fill")
    add("--forward-max-event-bytes", metavar="N", type=positive(int), default=1_000_000, help="longest event, in "
        "FlexPrice's queue, that is forwarded; a longer one is put aside")  # fmt: skip
    add("--forward-everything", action="store_true", help="the target is not FlexPrice: also forward what FlexPrice "
        "would lose")  # fmt: skip
    add("--retain-days", metavar="N", type=positive(float), help="delete events that were stored longer ago than that")
    add("--metrics", metavar="ADDRESS:PORT", help="serve metrics in Prometheus' text format at this address, without a "
        "key")  # fmt: skip
    add("--log-format", choices=["text", "json"], default="text", help="how to write the log")
    add("--delete-unforwarded", action="store_true", help="with --forward-to, let --retain-days also delete events of "
        "environments that are not forwarded")  # fmt: skip


def prepare(arguments: Namespace) -> socket.socket | None:
    """Prepare the process, and return the listening socket if another process has opened it. Raises StartError."""
    set_up(arguments)
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


def attach(service: Service, arguments: Namespace, address: Any) -> None:
    """Start what the flags ask for. `address` is the one that the server listens on. Raises StartError."""
    for flag, module in _MODULES.items():
        if getattr(arguments, flag):
            _module(module).attach(service, arguments, address)
    if hasattr(signal, "SIGHUP"):  # not on Windows
        signal.signal(signal.SIGHUP, partial(_on_hangup, service, arguments))


def _on_hangup(service: Service, arguments: Namespace, *_: object) -> None:
    if not arguments.api_key_file:
        _log.info("SIGHUP is ignored: there is no --api-key-file to read again")
        return
    # Use a thread: a new environment waits for the write lock, and requests must not wait with it.
    again = partial(_module("keys").read_again, service, arguments)
    threading.Thread(target=again, daemon=True).start()


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"eventstore_extras.{name}")
