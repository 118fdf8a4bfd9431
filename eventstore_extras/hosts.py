"""Refuses requests that web pages send to a mock, whose key is well known, or to a server with --allow-host.

With DNS rebinding, the name of a page's site resolves to 127.0.0.1, but requests still name the site in `Host`. If a
page sends requests to 127.0.0.1 itself, they name its site in `Origin`.
"""

from __future__ import annotations

import argparse
import ipaddress
import re
from collections.abc import Collection, Iterable
from contextlib import suppress

from starlette.requests import Request
from starlette.types import ASGIApp, Receive, Scope, Send

from eventstore import ApiError, StartError, error_response, quoted

__all__ = ["AllowedHosts", "check_hosts", "hosts_of_flags", "is_allowed"]

_NAME = r"\[[0-9a-f:.]+\]|[^][:/@,\\\s]+"
_AUTHORITY = re.compile(rf"(?:https?://)?({_NAME})(?::[0-9]*)?", re.IGNORECASE)  # `Host`, or `Origin` with a scheme
_WILDCARDS = {"0.0.0.0", "::"}  # noqa: S104 - such a server listens on every address of this machine


def _normalized(name: str) -> str:
    return name.lower().strip("[]").removesuffix(".")


def _address_of(name: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address | None:
    with suppress(ValueError):
        return ipaddress.ip_address(_normalized(name))
    return None


def check_hosts(hosts: Iterable[str], where: str) -> tuple[str, ...]:
    """Return names or addresses in the form that `is_allowed` takes. Raises StartError naming the flag or argument."""
    found = []
    for host in hosts:
        name = host if ":" not in host or host.startswith("[") else f"[{host}]"
        if not re.fullmatch(_NAME, name, re.IGNORECASE) or (name.startswith("[") and not _address_of(name)):
            raise StartError(f"{where} must be a name or an address without scheme and port, got {quoted(host)}")
        found.append(_normalized(name))
    return tuple(found)


def hosts_of_flags(arguments: argparse.Namespace) -> tuple[str, ...]:
    """Return the hosts of `--host` and `--allow-host` in the form that `is_allowed` takes. Raises StartError."""
    return (*check_hosts([arguments.host], "--host"), *check_hosts(arguments.allow_host, "--allow-host"))


def is_allowed(header: str, allowed: Collection[str] = ()) -> bool:
    """Return whether the value of `Host` or `Origin` names this machine's loopback, or one of `allowed`.

    `allowed` comes from `check_hosts`. With `*` in it every host is allowed; with 0.0.0.0 or :: every address.
    """
    found = _AUTHORITY.fullmatch(header)
    if "*" in allowed or found is None:
        return "*" in allowed
    name = _normalized(found[1])
    if address := _address_of(name):
        # A site cannot rebind an address: browsers do not look it up.
        return address.is_loopback or name in allowed or not _WILDCARDS.isdisjoint(allowed)
    return name == "localhost" or name.endswith(".localhost") or name in allowed


class AllowedHosts:
    """ASGI middleware: answers 403 if `Host` is missing, or if `Host` or `Origin` names a host that is not allowed."""

    def __init__(self, app: ASGIApp, allowed: Collection[str] = ()) -> None:
        self._app = app
        self._allowed = allowed

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        app = self._app
        if scope["type"] == "http":
            hosts = [value.decode("latin-1") for name, value in scope["headers"] if name == b"host"]
            origins = [value.decode("latin-1") for name, value in scope["headers"] if name == b"origin"]
            refused = [f"Host {quoted(value)}" for value in hosts or [""] if not is_allowed(value, self._allowed)]
            refused += [f"Origin {quoted(value)}" for value in origins if not is_allowed(value, self._allowed)]
            if refused:
                names = "localhost, loopback addresses, its --host and the names that it allows"
                rule = f"a mock, or a server with --allow-host, answers to {names}"
                advice = "to allow a name, use --allow-host NAME or running_server(allowed_hosts=[NAME])"
                problem = f"{refused[0]} is not this machine: {rule}; {advice}"
                app = error_response(Request(scope), ApiError("permission_denied", problem))
        await app(scope, receive, send)
