"""The fixtures of all tests."""

from __future__ import annotations

import gc
import itertools
import os
import random
import shutil
import signal
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import certifi
import httpx
import pytest

pytest.register_assert_rewrite("browser", "helpers", "oracle")  # before they are imported

from browser import Debugger, environment_of  # noqa: E402
from eventstore import Operation  # noqa: E402
from helpers import KEY, NOW, Live, at, event, metering, run, serving, store  # noqa: E402

# Without cached bytecode each server would compile its modules again, and each worker all tests.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False
os.environ["HYPOTHESIS_NO_PLUGINS"] = "1"  # otherwise Hypothesis imports trio

END = "-----END CERTIFICATE-----\n"
SEED = int(os.environ.get("EVENTSTORE_TEST_SEED") or random.randrange(2**32))


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config: pytest.Config) -> None:
    """Run the whole suite with xdist, and files or tests named on the command line in one process.

    Tests often wait, so two cores have three workers, or six if the run includes slow tests; there are at most 12.

    `-n 0` and `-p no:xdist` turn this off. With `-n` in addopts, `-p no:xdist` would fail with an unknown option.
    """
    is_whole = config.args_source is not pytest.Config.ArgsSource.ARGS
    is_worker = "PYTEST_XDIST_WORKER" in os.environ  # a worker calls this hook too, and must not start workers
    if is_whole and not is_worker and getattr(config.option, "numprocesses", 0) is None:
        cores = os.cpu_count() or 1
        many = cores * 3 // 2 if "not slow" in config.option.markexpr else cores * 3
        config.option.numprocesses = max(cores, min(many, 12))
        config.option.dist = "worksteal"  # neighbours stay together and share their module's server or browser


def pytest_configure() -> None:
    """Do not ignore signals: `pytest &` in a script starts with SIGINT ignored, `nohup pytest` with SIGHUP, and the
    processes that tests start inherit that."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) is signal.SIG_IGN:  # not on Windows
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Start the longest tests first, so that none of them begins when the other workers have finished.

    xdist gives each worker consecutive tests, as many as the others; put a part of the longest at the start of each.
    """

    def seconds(item: pytest.Item) -> float:
        marker = item.get_closest_marker("slow")
        return marker.args[0] if marker and marker.args else 0

    workers: int = getattr(config, "workerinput", {}).get("workercount", 1)
    longest = sorted(filter(seconds, items), key=seconds, reverse=True)
    others = [item for item in items if not seconds(item)]
    ordered: list[pytest.Item] = []
    for number in range(workers):
        share = (len(items) - len(ordered)) // (workers - number)
        first = longest[number::workers]
        count = max(share - len(first), 0)
        ordered += [*first, *others[:count]]
        del others[:count]
    items[:] = [*ordered, *others]


def pytest_collection_finish() -> None:
    """Exempt all modules and tests from garbage collections, each of which would look at them for 0.2 s."""
    gc.freeze()


@pytest.fixture(autouse=True, scope="session")
def _clean_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Remove what would change the tests, here and in the processes that they start.

    httpx reads its file of certificates for each client, even one of plain HTTP; all of them take 37 ms, one takes 1 ms.
    """
    one_certificate = tmp_path_factory.mktemp("certificates") / "one.pem"
    one_certificate.write_text(Path(certifi.where()).read_text().partition(END)[0] + END)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SSL_CERT_FILE", str(one_certificate))
        patch.setenv("no_proxy", "127.0.0.1")
        patch.delenv("FLEXPRICE_API_KEY", raising=False)
        patch.delenv("EVENTSTORE_API_KEYS", raising=False)
        yield


@pytest.fixture
def choose(request: pytest.FixtureRequest, capsys: pytest.CaptureFixture[str]) -> random.Random:
    """The random choices of a test. Their seed is printed, whether the test passes or fails."""
    line = f"EVENTSTORE_TEST_SEED={SEED}"
    with capsys.disabled():
        print(f" {line} ", end="", flush=True)
    print(line)  # captured, and shown with a failure
    return random.Random(f"{SEED} {request.node.name}")


@pytest.fixture(scope="module")
def operations() -> Sequence[Operation]:
    """The operations that a module's clients have in addition to the service's own; a module may override it."""
    return ()


@pytest.fixture
def client(tmp_path: Path, operations: Sequence[Operation]) -> Iterator[httpx.Client]:
    """A client of an empty application, on tmp_path/events.db."""
    with serving(tmp_path, operations) as client:
        yield client


@pytest.fixture
def clock() -> Any:
    """The clock of `timed`: set its `return_value`."""
    return Mock(return_value=NOW)


@pytest.fixture
def timed(tmp_path: Path, clock: Any) -> Iterator[httpx.Client]:
    """A client of an application with meters and features, whose clock can be set."""
    with metering(tmp_path, clock=clock) as client:
        yield client


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, operations: Sequence[Operation]) -> Iterator[httpx.Client]:
    """A client for all tests of a module that look at their own events alone."""
    with serving(tmp_path_factory.mktemp("shared"), operations) as client:
        yield client


@pytest.fixture(scope="module")
def many(tmp_path_factory: pytest.TempPathFactory) -> Iterator[httpx.Client]:
    """1002 events, their ids in the order of their times."""
    with serving(tmp_path_factory.mktemp("many")) as client:
        events = [event(f"{number:04}", timestamp=at(number - 2000)) for number in range(1002)]
        store(client, *events[:1000])
        store(client, *events[1000:])
        yield client


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Live]:
    """A server process for all tests of a module. At the end neither its output nor its log may show the key."""
    with Live(tmp_path_factory.mktemp("live"), "--api-key", KEY) as live:
        yield live
        assert KEY not in live.banner + live.log
        assert "Traceback" not in live.log


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debugger]:
    """A browser, and a server that has a fresh environment, with its own key, for each test."""
    keys = [f"key-{number}" for number in range(99)]
    flags = itertools.chain.from_iterable(("--api-key", f"{key}={environment_of(key)}") for key in keys)
    with Live(tmp_path_factory.mktemp("debugger"), *flags) as live:
        debugger = Debugger()
        debugger.live, debugger.keys = live, keys
        yield debugger
        debugger.driver.quit()
        assert "Traceback" not in live.log
        assert "ignored" not in live.log  # the server logs unknown names that it ignores; the page sends none


@pytest.fixture
def debugger(browser: Debugger) -> Iterator[Debugger]:
    """The page as the link in the banner opens it; `debugger.client` uses the same key."""
    browser.key = browser.keys.pop()
    with browser.live.client(browser.key) as browser.client:
        browser.complaints()
        browser.look()
        browser.open(f"{browser.live.url}/#key={browser.key}")
        browser.opens("#pulse", "Live")
        yield browser
        browser.ask("localStorage.clear()")
        assert browser.complaints() == []


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A folder on a disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    if not (shutil.which("mount") and run("mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", folder).returncode == 0):
        pytest.skip("mounting a file system takes root")
    try:
        yield folder
    finally:
        assert run("umount", "--lazy", folder).returncode == 0
