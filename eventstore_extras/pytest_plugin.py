"""The pytest fixture `flexprice`; pytest finds this plugin by its entry point.

From before the first conftest.py to the end of the run, FLEXPRICE_API_HOST and FLEXPRICE_API_KEY name the fixture's
server, and no_proxy keeps requests to it away from proxies. A client that an application creates at import therefore
cannot send test events to production. Outside tests that use the fixture, the server's port refuses connections.
"""

from __future__ import annotations

import datetime
import importlib
import os
import socket
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from eventstore_extras.mock import MockServer

__all__ = ["IgnoredNameWarning", "UnusedFaultWarning", "flexprice"]

_API_KEY = "eventstore-test-key"
_LOOPBACK = ("127.0.0.1", "localhost")
_REAL_TYPES = {"datetime": datetime.datetime, "date": datetime.date}  # freezegun replaces names of modules only


class IgnoredNameWarning(UserWarning):
    """A request of a test had a field or a parameter that the server does not know, and ignored."""


class UnusedFaultWarning(UserWarning):
    """A test added a fault, but no request met it."""


def _no_proxy(name: str) -> str:
    """Return the value of the variable with this machine added. Some clients read only one of the two cases."""
    present = os.environ.get(name) or os.environ.get(name.swapcase()) or ""
    if present.strip() == "*":  # clients recognize it only alone
        return present
    hosts = [host.strip() for host in present.split(",") if host.strip()]
    return ",".join([*hosts, *(host for host in _LOOPBACK if host not in hosts)])


class _ReservedPort:
    """A port bound for the server. Connections are refused at once until the server listens on it."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self._variables_before: dict[str, str | None] = {}

    def variables(self) -> dict[str, str]:
        proxies = {name: _no_proxy(name) for name in ("no_proxy", "NO_PROXY")}
        return {"FLEXPRICE_API_HOST": self.url, "FLEXPRICE_API_KEY": _API_KEY, **proxies}

    def set_variables(self) -> None:
        self._variables_before = {name: os.environ.get(name) for name in self.variables()}
        os.environ.update(self.variables())

    def close(self) -> None:
        """Free the port and restore the variables."""
        self.listener.close()
        for name, value in self._variables_before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


_RESERVED_PORT = pytest.StashKey[_ReservedPort]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "set FLEXPRICE_API_HOST and FLEXPRICE_API_KEY only in tests that use the fixture flexprice"
    parser.getgroup("flexprice").addoption("--flexprice-real", action="store_true", help=text)
    parser.addini("flexprice_real", text, type="bool", default=False)


def _reserve_port(config: pytest.Config) -> None:
    if _RESERVED_PORT in config.stash:
        return
    reserved = config.stash[_RESERVED_PORT] = _ReservedPort()
    if not (config.known_args_namespace.flexprice_real or config.getini("flexprice_real")):
        reserved.set_variables()


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    _reserve_port(early_config)


def pytest_configure(config: pytest.Config) -> None:
    """Reserve the port if the hook above has not: a conftest.py that names the plugin loads it after that hook."""
    _reserve_port(config)


def pytest_unconfigure(config: pytest.Config) -> None:
    if reserved := config.stash.get(_RESERVED_PORT, None):
        reserved.close()


def _import_server() -> None:
    """Import the server with the real datetime: with freezegun's, its wire types would refuse every time afterwards."""
    with pytest.MonkeyPatch.context() as patch:
        for name, kind in _REAL_TYPES.items():
            patch.setattr(datetime, name, kind)
        importlib.import_module("eventstore_extras.mock")


def pytest_collection_finish(session: pytest.Session) -> None:
    """Import the server before any test runs, if a test needs it: the test may freeze or replace the time."""
    if any("flexprice" in getattr(item, "fixturenames", ()) for item in session.items):
        _import_server()


@contextmanager
def _running_server(config: pytest.Config) -> Iterator[MockServer]:
    """Run a server that refuses connections at first."""
    _import_server()
    from eventstore import StartError  # noqa: PLC0415 - slow to import for a run without the fixture
    from eventstore_extras.mock import running_server  # noqa: PLC0415

    listener = config.stash[_RESERVED_PORT].listener.dup()
    with ExitStack() as stack:
        problem = ""
        try:
            server = stack.enter_context(running_server(api_keys={_API_KEY: "development"}, listener=listener))
        except StartError as error:
            problem = str(error)
        if problem:  # outside of the except block, where pytest would show the message twice
            pytest.fail(problem, pytrace=False)
        server.refuse_connections()
        yield server


@pytest.fixture(scope="session")
def _flexprice_server(pytestconfig: pytest.Config) -> Iterator[MockServer]:
    with _running_server(pytestconfig) as server:
        yield server


def _warn_of_mistakes(server: MockServer, test: str) -> None:
    for line in server.ignored_names():
        warnings.warn(IgnoredNameWarning(f"{test}: {line}"), stacklevel=2)
    for fault in server.faults(unused=True):
        fields = ", ".join(f"{name}={value!r}" for name, value in fault.items() if value is not None)
        warnings.warn(UnusedFaultWarning(f"no request met the fault flexprice.fail({fields})"), stacklevel=2)


@pytest.fixture
def flexprice(
    _flexprice_server: MockServer, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[MockServer]:
    """An empty FlexPrice, which the test's code finds by FLEXPRICE_API_HOST and FLEXPRICE_API_KEY."""
    with ExitStack() as stack:
        server = _flexprice_server
        if not server.is_of_this_process:  # pytest-forked runs this test in a child; the server's thread stayed behind
            server = stack.enter_context(_running_server(request.config))
        server.reset()
        server.ignored_names()
        for name, value in request.config.stash[_RESERVED_PORT].variables().items():
            monkeypatch.setenv(name, value)
        server.accept_connections()
        yield server
        server.refuse_connections()
        _warn_of_mistakes(server, request.node.nodeid)
