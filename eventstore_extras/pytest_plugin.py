"""The pytest fixture `flexprice`; pytest finds this plugin by its entry point.

From before the first conftest.py to the end of the run, FLEXPRICE_API_HOST and FLEXPRICE_API_KEY name the fixture's
server. A client that an application creates at import therefore cannot send test events to production.
"""

from __future__ import annotations

import os
import socket
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from eventstore_extras.mock import MockServer

__all__ = ["UnusedFaultWarning", "flexprice"]

_API_KEY = "eventstore-test-key"
_VARIABLES = ("FLEXPRICE_API_HOST", "FLEXPRICE_API_KEY")


class UnusedFaultWarning(UserWarning):
    """A test added a fault, but no request met it."""


class _ReservedPort:
    """A port bound for the server. Connections are refused at once until the server listens on it."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self._variables_before = {name: os.environ.get(name) for name in _VARIABLES}

    def set_variables(self) -> None:
        os.environ.update(zip(_VARIABLES, (self.url, _API_KEY), strict=True))

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


@pytest.fixture(scope="session")
def _flexprice_server(pytestconfig: pytest.Config) -> Iterator[MockServer]:
    from eventstore_extras.mock import running_server  # noqa: PLC0415 - slow to import for a run without the fixture

    listener = pytestconfig.stash[_RESERVED_PORT].listener
    with running_server(api_keys={_API_KEY: "development"}, listener=listener) as server:
        yield server


@pytest.fixture
def flexprice(_flexprice_server: MockServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockServer]:
    """An empty FlexPrice, which the test's code finds by FLEXPRICE_API_HOST and FLEXPRICE_API_KEY."""
    _flexprice_server.reset()
    for name, value in zip(_VARIABLES, (_flexprice_server.url, _API_KEY), strict=True):
        monkeypatch.setenv(name, value)
    yield _flexprice_server
    for fault in _flexprice_server.faults(unused=True):
        fields = ", ".join(f"{name}={value!r}" for name, value in fault.items() if value is not None)
        warnings.warn(UnusedFaultWarning(f"no request met the fault flexprice.fail({fields})"), stacklevel=1)
