"""The pytest fixture `flexprice`, as pytest finds it by its entry point. The server is imported when a test asks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from eventstore_extras.mock import MockServer


@pytest.fixture(scope="session")
def _flexprice_server() -> Iterator[MockServer]:
    from eventstore_extras.mock import running_server  # noqa: PLC0415 - a run without the fixture need not wait for it

    with running_server() as server:
        yield server


@pytest.fixture
def flexprice(_flexprice_server: MockServer, monkeypatch: pytest.MonkeyPatch) -> MockServer:
    """A FlexPrice of one's own: empty, and found by FLEXPRICE_API_HOST and FLEXPRICE_API_KEY."""
    _flexprice_server.reset()
    monkeypatch.setenv("FLEXPRICE_API_HOST", _flexprice_server.url)
    monkeypatch.setenv("FLEXPRICE_API_KEY", _flexprice_server.api_key)
    return _flexprice_server
