"""The pytest fixture `flexprice`, as pytest finds it by its entry point. The server is imported when a test asks.

From before the first conftest.py to the end of the run FLEXPRICE_API_HOST and FLEXPRICE_API_KEY name the fixture's
server, so that a client which an application makes when it is imported does not send its test events to production.
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

API_KEY = "eventstore-test-key"
VARIABLES = ("FLEXPRICE_API_HOST", "FLEXPRICE_API_KEY")


class UnusedFaultWarning(UserWarning):
    """A fault that a test asked for, and that no request of it met."""


class _Reserved:
    """A port that is the server's, once there is one; until then whoever connects is refused at once."""

    def __init__(self) -> None:
        self.listener = socket.socket()
        self.listener.bind(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        self._before = {name: os.environ.get(name) for name in VARIABLES}

    def set_variables(self) -> None:
        os.environ.update(zip(VARIABLES, (self.url, API_KEY), strict=True))

    def close(self) -> None:
        self.listener.close()
        for name, value in self._before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


RESERVED = pytest.StashKey[_Reserved]()


def pytest_addoption(parser: pytest.Parser) -> None:
    text = "leave FLEXPRICE_API_HOST and FLEXPRICE_API_KEY as they are, but for tests with the fixture flexprice"
    parser.getgroup("flexprice").addoption("--flexprice-real", action="store_true", help=text)
    parser.addini("flexprice_real", text, type="bool", default=False)


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    pytest_configure(early_config)


def pytest_configure(config: pytest.Config) -> None:
    """Once, as early as pytest lets it: with `-p`, or named in a conftest.py, that is here and not above."""
    if RESERVED in config.stash:
        return
    reserved = config.stash[RESERVED] = _Reserved()
    if not (config.known_args_namespace.flexprice_real or config.getini("flexprice_real")):
        reserved.set_variables()


def pytest_unconfigure(config: pytest.Config) -> None:
    if reserved := config.stash.get(RESERVED, None):
        reserved.close()


@pytest.fixture(scope="session")
def _flexprice_server(pytestconfig: pytest.Config) -> Iterator[MockServer]:
    from eventstore_extras.mock import running_server  # noqa: PLC0415 - a run without the fixture need not wait for it

    listener = pytestconfig.stash[RESERVED].listener
    with running_server(api_keys={API_KEY: "development"}, listener=listener) as server:
        yield server


@pytest.fixture
def flexprice(_flexprice_server: MockServer, monkeypatch: pytest.MonkeyPatch) -> Iterator[MockServer]:
    """A FlexPrice of one's own: empty, and found by FLEXPRICE_API_HOST and FLEXPRICE_API_KEY."""
    _flexprice_server.reset()
    for name, value in zip(VARIABLES, (_flexprice_server.url, API_KEY), strict=True):
        monkeypatch.setenv(name, value)
    yield _flexprice_server
    for fault in _flexprice_server.faults(unused=True):
        asked = ", ".join(f"{name}={value!r}" for name, value in fault.items() if value is not None)
        warnings.warn(UnusedFaultWarning(f"no request met the fault flexprice.fail({asked})"), stacklevel=1)
