"""The pytest fixture `flexprice`: each test runs tests that use it."""

from __future__ import annotations

import os
import urllib.request
from pathlib import Path

import pytest

import eventstore_extras.mock  # noqa: F401 - pytester makes each run forget what it imported
from helpers import python, table

pytest_plugins = "pytester"
PLUGINS = ("-p", "no:schemathesis", "-p", "no:hypothesispytest", "-p", "no:anyio")  # they take a second to import


def run_tests(pytester: pytest.Pytester, *flags: str) -> pytest.RunResult:
    """Run the tests in pytester's folder in this process."""
    return pytester.runpytest_inprocess("-q", *PLUGINS, *flags)


def run_tests_in_a_process(pytester: pytest.Pytester, *flags: str) -> pytest.RunResult:
    """Run tests in another process because they fork, replace the time or threads, or look at what is imported."""
    return pytester.runpytest_subprocess("-q", *PLUGINS, *flags)


@pytest.mark.slow
def test_the_fixture_is_an_empty_server_that_the_application_finds(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import os, urllib.request

        import pytest

        def application_code(event_id):
            body = ('{"event_name": "call", "external_customer_id": "cust", "event_id": "%s"}' % event_id).encode()
            headers = {"x-api-key": os.environ["FLEXPRICE_API_KEY"]}
            urllib.request.urlopen(urllib.request.Request(os.environ["FLEXPRICE_API_HOST"] + "/events", body, headers))

        servers = []

        @pytest.mark.parametrize("event_id", ["one", "two"])
        def test_each_starts_empty(flexprice, event_id):
            assert flexprice.events() == flexprice.faults() == []
            application_code(event_id)
            assert [event["id"] for event in flexprice.events()] == [event_id]
            flexprice.fail(status=500)
            assert len(flexprice.faults()) == 1
            flexprice.reset()
            flexprice.fail(delay_ms=1, times=2)
            application_code(event_id)
            servers.append(flexprice.url)

        def test_there_is_one_server_for_the_run(flexprice):
            assert set(servers) == {flexprice.url}
        """
    )
    run_tests(pytester, "-W", "error").assert_outcomes(passed=3)


MODULE_LEVEL_CLIENT = """
import os, urllib.request

HOST = os.environ.get("FLEXPRICE_API_HOST", "https://us.api.flexprice.io/v1")  # as an application reads it at import
KEY = os.environ.get("FLEXPRICE_API_KEY", "a real key")

def send():
    body = b'{"event_name": "call", "external_customer_id": "cust"}'
    return urllib.request.urlopen(urllib.request.Request(HOST + "/events", body, {"x-api-key": KEY}), timeout=60)
"""


@pytest.mark.slow
def test_a_client_created_at_import_reaches_only_the_mock(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makeconftest("import application")
    pytester.makepyfile(
        """
        import time, urllib.error

        import pytest
        import application

        def test_without_the_fixture_is_refused_at_once():
            start = time.monotonic()
            with pytest.raises(urllib.error.URLError, match="refused"):
                application.send()
            assert time.monotonic() - start < 30

        def test_with_the_fixture_finds_its_event(flexprice):
            application.send()
            assert len(flexprice.events()) == 1 and application.HOST == flexprice.url
        """
    )
    run_tests(pytester, "-p", "no:randomly").assert_outcomes(passed=2)


@pytest.mark.slow
@table(("flags", "ini"), [(["--flexprice-real"], ""), ([], "[pytest]\nflexprice_real = true")])
def test_flexprice_real_keeps_the_variables(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, flags: list[str], ini: str
) -> None:
    monkeypatch.setenv("FLEXPRICE_API_HOST", "http://real.example/v1")
    monkeypatch.setenv("FLEXPRICE_API_KEY", "real")
    pytester.makefile(".ini", pytest=ini)
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makepyfile(
        """
        import os
        import application

        def test_real():
            assert (application.HOST, application.KEY) == ("http://real.example/v1", "real")

        def test_with_the_fixture(flexprice):
            assert os.environ["FLEXPRICE_API_HOST"] == flexprice.url

        def test_real_again():
            assert os.environ["FLEXPRICE_API_HOST"] == "http://real.example/v1"
        """
    )
    run_tests(pytester, *flags).assert_outcomes(passed=3)


@pytest.mark.slow
def test_the_variables_are_restored_after_the_run(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FLEXPRICE_API_KEY", "mine")
    monkeypatch.delenv("FLEXPRICE_API_HOST", raising=False)
    pytester.makepyfile("""
        import os

        def test_it(flexprice):
            assert os.environ["FLEXPRICE_API_HOST"] == flexprice.url
            assert os.environ["FLEXPRICE_API_KEY"] == flexprice.api_key
    """)
    run_tests(pytester).assert_outcomes(passed=1)
    assert os.environ["FLEXPRICE_API_KEY"] == "mine"
    assert "FLEXPRICE_API_HOST" not in os.environ


@pytest.mark.slow
def test_each_xdist_worker_has_its_own_server(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makepyfile(
        """
        import pathlib
        import application
        import pytest

        @pytest.mark.parametrize("number", range(8))
        def test_it(flexprice, number, worker_id):
            application.send()
            assert len(flexprice.events()) == 1
            pathlib.Path(f"{worker_id}.url").write_text(flexprice.url)
        """
    )
    run_tests_in_a_process(pytester, "-n", "2").assert_outcomes(passed=8)
    urls = [path.read_text() for path in pytester.path.glob("*.url")]
    assert len(urls) == len(set(urls)) == 2


@pytest.mark.slow
def test_requests_shows_each_request_and_its_fault(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makepyfile(
        """
        import urllib.error, urllib.request

        import application
        import pytest

        def test_retries_are_counted(flexprice):
            flexprice.fail(path="/v1/events", status=503, retry_after_s=1)
            for expected in (503, 202):
                try:
                    application.send()
                except urllib.error.HTTPError as error:
                    assert error.code == expected
            with pytest.raises(urllib.error.HTTPError, match="401"):
                urllib.request.urlopen(flexprice.url + "/events?page_size=1")
            first, second, third = flexprice.requests()
            assert (first.method, first.path, first.status, first.json["event_name"]) == ("POST", "/v1/events", 503, "call")
            assert first.fault["retry_after_s"] == 1 and second.fault is third.fault is None
            assert "x-api-key" not in first.headers and first.headers["content-length"] == str(len(first.body))
            assert [request.status for request in (second, third)] == [202, 401]
            assert (third.query, third.body) == ("page_size=1", b"")
            flexprice.reset()
            assert flexprice.requests() == []
        """
    )
    run_tests(pytester).assert_outcomes(passed=1)


@pytest.mark.slow
def test_an_unused_fault_is_a_warning(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makepyfile(
        """
        import application

        def test_adds_faults_that_it_does_not_use(flexprice):
            flexprice.fail(path="/v1/events/bulk", status=429)
            flexprice.fail(delay_ms=1, times=5)
            application.send()
        """
    )
    result = run_tests(pytester)
    result.assert_outcomes(passed=1, warnings=1)
    result.stdout.fnmatch_lines(["*UnusedFaultWarning*flexprice.fail(path='/v1/events/bulk', times=1, status=429)*"])


@pytest.mark.slow
def test_a_run_without_the_fixture_does_not_import_the_server(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import sys

        def test_only_the_plugin_is_imported():
            modules = [name for name in sys.modules if name.startswith("eventstore")]
            assert sorted(modules) == ["eventstore_extras", "eventstore_extras.pytest_plugin"]
        """
    )
    run_tests_in_a_process(pytester).assert_outcomes(passed=1)


# ---------------------------------------------------------------------------------------------- outside its tests


@pytest.mark.slow
def test_outside_of_its_tests_the_port_refuses_connections_and_open_ones_are_closed(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makeconftest("import application")
    pytester.makepyfile(
        """
        import http.client, os, time, urllib.error

        import httpx
        import pytest
        import application

        CLIENT = httpx.Client(base_url=application.HOST, headers={"x-api-key": application.KEY})  # keeps connections
        CONNECTION = http.client.HTTPConnection(application.HOST.split("/")[2])

        def is_refused():
            with pytest.raises(urllib.error.URLError, match="refused"):
                application.send()
            with pytest.raises(httpx.ConnectError, match="refused"):
                CLIENT.get("/events")

        def test_first():
            is_refused()

        def test_with_the_fixture(flexprice):
            assert CLIENT.get("/events").status_code == 200
            CONNECTION.request("GET", "/health")
            assert CONNECTION.getresponse().read()

        def test_between():
            is_refused()
            with pytest.raises((http.client.HTTPException, ConnectionError)):
                CONNECTION.request("GET", "/health")
                CONNECTION.getresponse()

        @pytest.mark.parametrize("number", range(3))
        def test_with_the_fixture_again(flexprice, number):
            assert CLIENT.get("/events").json()["events"] == []
            application.send()

        def test_with_a_child_that_outlives_it(flexprice):
            assert CLIENT.get("/events").status_code == 200
            reading, writing = os.pipe()
            if os.fork() == 0:
                os.close(writing)
                os.read(reading, 1)  # until the parent ends
                os._exit(0)
            os.close(reading)

        def test_last():
            is_refused()
        """
    )
    run_tests_in_a_process(pytester).assert_outcomes(passed=8)


@pytest.mark.slow
def test_a_request_in_progress_when_its_test_ends_stores_nothing_in_the_next_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import http.client, urllib.parse
        import pytest

        BODY = b'{"event_name": "call", "external_customer_id": "cust"}'
        CONNECTIONS = []  # keeps them open

        @pytest.mark.parametrize("number", range(6))
        def test_starts_empty_and_ends_before_its_answers(flexprice, number):
            assert flexprice.events() == flexprice.requests() == flexprice.faults() == []
            flexprice.fail(method="POST", delay_ms=600_000, times=20)
            for _ in range(20):
                connection = http.client.HTTPConnection(urllib.parse.urlsplit(flexprice.url).netloc)
                connection.request("POST", "/v1/events", BODY, {"x-api-key": flexprice.api_key})
                CONNECTIONS.append(connection)
        """
    )
    run_tests(pytester).assert_outcomes(passed=6)


# ---------------------------------------------------------------------------------------------- forks

FORKING_CONFTEST = """
import os
import pytest
from _pytest.runner import runtestprotocol

def pytest_configure(config):
    config.addinivalue_line("markers", "forked: run the test in a child, as pytest-forked does")

@pytest.hookimpl(tryfirst=True)
def pytest_runtest_protocol(item):
    if not item.get_closest_marker("forked"):
        return None
    child = os.fork()
    if child == 0:
        os._exit(any(report.failed for report in runtestprotocol(item, log=False, nextitem=None)))
    outcome = "failed" if os.waitpid(child, 0)[1] else "passed"
    item.ihook.pytest_runtest_logstart(nodeid=item.nodeid, location=item.location)
    item.ihook.pytest_runtest_logreport(
        report=pytest.TestReport(item.nodeid, item.location, {}, outcome, None, "call"))
    return True
"""


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_leaves_the_server_alone(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makeconftest(FORKING_CONFTEST)
    pytester.makepyfile(
        """
        import multiprocessing, os, sys, urllib.error

        import application
        import pytest

        FORKING = multiprocessing.get_context("fork")

        @pytest.mark.forked
        def test_in_a_child_before_the_server_starts(flexprice):
            application.send()
            assert len(flexprice.events()) == 1

        def test_children_send_to_the_parents_server(flexprice):
            for target, arguments, status in ((application.send, (), 0), (sys.exit, (3,), 3), (os._exit, (4,), 4)):
                child = FORKING.Process(target=target, args=arguments)
                child.start()
                child.join()
                assert child.exitcode == status
            assert len(flexprice.events()) == 1
            application.send()
            assert len(flexprice.events()) == len(flexprice.requests()) == 2

        @pytest.mark.forked
        @pytest.mark.parametrize("number", range(2))
        def test_in_a_child_after_the_server_has_started(flexprice, number):
            assert flexprice.events() == []
            flexprice.fail(status=503)
            with pytest.raises(urllib.error.HTTPError, match="503"):
                application.send()
            application.send()
            assert [request.status for request in flexprice.requests()] == [503, 202]

        @pytest.mark.forked
        def test_in_a_child_without_the_fixture():
            with pytest.raises(urllib.error.URLError, match="refused"):
                application.send()

        def test_in_the_parent_again(flexprice):
            application.send()
            assert len(flexprice.events()) == 1
        """
    )
    run_tests_in_a_process(pytester).assert_outcomes(passed=6)


# ---------------------------------------------------------------------------------------------- proxies


@pytest.mark.slow
@table("client", ["urllib", "httpx", "requests"])
def test_requests_to_the_server_do_not_go_through_a_proxy(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, client: str
) -> None:
    pytest.importorskip(client)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:1")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("NO_PROXY", "corp.example, .internal")
    monkeypatch.setattr(urllib.request, "_opener", None)  # it keeps the proxies of its first request
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makepyfile(
        f"""
        import os
        import application

        def get(url):
            if "{client}" == "urllib":
                return application.send().status
            import {client}
            return {client}.post(url + "/events", headers={{"x-api-key": application.KEY}},
                                 json={{"event_name": "call", "external_customer_id": "cust"}}).status_code

        def test_it(flexprice):
            assert get(flexprice.url) == get(flexprice.url.replace("127.0.0.1", "localhost")) == 202
            assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "corp.example,.internal,127.0.0.1,localhost"
        """
    )
    run_tests(pytester).assert_outcomes(passed=1)


NO_PROXY = [  # before the run, and no_proxy and NO_PROXY during it
    ({}, ["127.0.0.1,localhost"] * 2),
    ({"no_proxy": "*"}, ["*"] * 2),
    ({"no_proxy": ""}, ["127.0.0.1,localhost"] * 2),
    ({"no_proxy": "a", "NO_PROXY": "b, c"}, ["a,127.0.0.1,localhost", "b,c,127.0.0.1,localhost"]),
    ({"NO_PROXY": "localhost,127.0.0.1"}, ["localhost,127.0.0.1"] * 2),
    ({"no_proxy": "127.0.0.1:8080"}, ["127.0.0.1:8080,127.0.0.1,localhost"] * 2),
]


@pytest.mark.slow
@table(("before", "during"), NO_PROXY)
def test_no_proxy_keeps_what_it_has_and_is_restored(
    pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch, before: dict[str, str], during: list[str]
) -> None:
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.delenv(name, raising=False)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    pytester.makepyfile(f"""
        import os

        def test_it():
            assert [os.environ["no_proxy"], os.environ["NO_PROXY"]] == {during}
    """)
    run_tests(pytester).assert_outcomes(passed=1)
    assert {name: value for name, value in os.environ.items() if name.lower() == "no_proxy"} == before


# ---------------------------------------------------------------------------------------------- replaced clocks and threads

BILLING = """
import datetime, json, os, urllib.request

def call(path, body=None):
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(os.environ["FLEXPRICE_API_HOST"] + path, data,
                                     {"x-api-key": os.environ["FLEXPRICE_API_KEY"]})
    with urllib.request.urlopen(request, timeout=20) as answer:
        return json.load(answer)

def finds_its_events(flexprice):
    now = datetime.datetime.now(datetime.timezone.utc)
    call("/features", {"name": "Calls", "type": "metered", "meter": {"name": "calls", "event_name": "call",
        "aggregation": {"type": "COUNT"}, "reset_usage": "BILLING_PERIOD"}})
    batch = [{"event_name": "call", "external_customer_id": "cust", "properties": {"n": 1}}] * 1000
    call("/events/bulk", {"events": batch})
    how = {"event_name": "call", "aggregation_type": "SUM", "property_name": "n"}
    for zone in ("UTC", "Europe/Berlin"):
        for size in ("MINUTE", "HOUR", "DAY", "MONTH"):
            windows = call("/events/usage", {**how, "window_size": size, "timezone": zone})["results"]
            assert sum(window["value"] for window in windows) == 1000
            assert call(f"/events/monitoring?window_size={size}")["total_count"] == 1000
    (item,) = call("/events/analytics", {"external_customer_id": "cust", "window_size": "DAY"})["items"]
    assert item["total_usage"] == "1000"
    assert len(flexprice.events(start_time=now - datetime.timedelta(minutes=1))) == 1000
    assert flexprice.events(end_time=now - datetime.timedelta(minutes=1)) == []
    assert len(flexprice.meters()) == 1
    return flexprice.events(event_name="call")[0]["timestamp"]
"""


@pytest.mark.slow
@table("first", ["a fixture", "the test"])
def test_a_first_use_while_time_is_frozen_does_no_harm(pytester: pytest.Pytester, first: str) -> None:
    pytester.makepyfile(billing=BILLING)
    pytester.makeconftest("""
        import pytest
        from freezegun import freeze_time

        @pytest.fixture(scope="session")
        def frozen_session():
            with freeze_time("2031-05-06 07:08:09.25"):
                yield
    """)
    tests = {
        "a fixture": "def test_frozen(frozen_session, flexprice):\n    frozen(flexprice)",
        "the test": "def test_frozen(request, frozen_session):\n    frozen(request.getfixturevalue('flexprice'))",
    }
    pytester.makepyfile(
        f"""
import time
from freezegun import freeze_time
import billing

def frozen(flexprice):
    assert billing.finds_its_events(flexprice) == "2031-05-06T07:08:09.25Z"

{tests[first]}

@freeze_time("2020-01-01")
def test_frozen_earlier(flexprice):
    assert billing.finds_its_events(flexprice) == "2020-01-01T00:00:00Z"

@freeze_time("2040-01-01", tick=True)
def test_ticking(flexprice):
    assert billing.finds_its_events(flexprice).startswith("2040-01-01T00:")

def test_with_times_replaced(flexprice, monkeypatch):
    monkeypatch.setattr(time, "time", lambda: 2_000_000_000.0)
    monkeypatch.setattr(time, "time_ns", lambda: 2_000_000_000_000_000_000)
    billing.call("/events", {{"event_name": "call", "external_customer_id": "cust"}})
    assert billing.call("/events/usage", {{"event_name": "call", "aggregation_type": "COUNT"}})["value"] == 1
    assert flexprice.events()[0]["timestamp"] == "2033-05-18T03:33:20Z"
"""
    )
    # the session's frozen time would last until the end
    pytester.makepyfile(
        test_later="import billing\n\ndef test_later(flexprice):\n    billing.finds_its_events(flexprice)"
    )
    run_tests_in_a_process(pytester).assert_outcomes(passed=5)


@pytest.mark.slow
def test_a_clock_that_is_frozen_during_a_query_does_not_end_it(tmp_path: Path) -> None:
    code = """if True:  # in another process: modules that are imported while time is frozen keep freezegun's classes
        from freezegun import freeze_time
        from eventstore import Reader, prepare_file

        def count(conn):
            steps = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 100000) SELECT max(i) FROM n"
            with freeze_time("2090-01-01"):
                return conn.execute(steps).fetchone()[0]

        prepare_file("events.db")
        print(Reader("events.db").run(count, 30))
    """
    assert python(code, cwd=tmp_path).stdout == "100000\n"


@pytest.mark.slow
@table("where", ["the module", "conftest.py"])
def test_with_gevent_the_fixture_names_the_problem_in_one_line(pytester: pytest.Pytester, where: str) -> None:
    pytest.importorskip("gevent")
    patch = "from gevent import monkey\nmonkey.patch_all()\n"
    pytester.makeconftest(patch if where == "conftest.py" else "")
    pytester.makepyfile(f"{patch if where == 'the module' else ''}\ndef test_it(flexprice):\n    assert 0")
    result = run_tests_in_a_process(pytester, "-W", "ignore")
    result.assert_outcomes(errors=1)
    lines = [line for line in result.outlines if "needs threads" in line and not line.startswith("ERROR")]
    assert len(lines) == 1
    assert "patch with thread=False" in lines[0]


@pytest.mark.slow
def test_the_fixture_works_with_gevent_without_its_threads(pytester: pytest.Pytester) -> None:
    pytest.importorskip("gevent")
    pytester.makepyfile(application=MODULE_LEVEL_CLIENT)
    pytester.makepyfile(
        """
        from gevent import monkey, joinall, spawn
        monkey.patch_all(thread=False)
        import application

        def test_it(flexprice):
            assert [greenlet.value.status for greenlet in joinall([spawn(application.send) for _ in range(9)])] == [202] * 9
            assert len(flexprice.events()) == 9
        """
    )
    run_tests_in_a_process(pytester, "-W", "ignore").assert_outcomes(passed=1)


@pytest.mark.slow
def test_a_run_that_patches_threads_while_the_server_runs_ends(pytester: pytest.Pytester) -> None:
    pytest.importorskip("gevent")
    pytester.makepyfile(
        """
        def test_it(flexprice):
            pass

        def test_patches_everything():
            from gevent import monkey
            monkey.patch_all()
        """
    )
    run_tests_in_a_process(pytester, "-W", "ignore").assert_outcomes(passed=2)


# ---------------------------------------------------------------------------------------------- ignored names


@pytest.mark.slow
def test_names_that_the_server_ignored_are_a_warning_with_the_name_of_the_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        test_names=r"""
        import httpx

        EVENT = {"event_name": "call", "external_customer_id": "cust"}

        def post(flexprice, path="/events", **fields):
            answer = httpx.post(flexprice.url + path, json=EVENT | fields, headers={"x-api-key": flexprice.api_key})
            assert answer.status_code == 202

        def test_typos(flexprice):
            post(flexprice, sorce="web")
            post(flexprice, sorce="web")
            flexprice.reset()
            post(flexprice)
            post(flexprice, path="/events?a%0Ab=1", **{"ä,": 1})
            (first, second) = flexprice.requests()
            assert (first.ignored, sorted(second.ignored)) == ([], ["a\nb", "ä,"])

        def test_no_typo(flexprice):
            post(flexprice)

        def test_expected_typo(flexprice):
            post(flexprice, sorce="web")
            assert flexprice.ignored_names() == ['POST /v1/events ignored "sorce"']
        """
    )
    result = run_tests(pytester)
    result.assert_outcomes(passed=3, warnings=2)
    warned = [
        line
        for line in result.outlines
        if "IgnoredNameWarning: test_names.py::test_typos: POST /v1/events ignored" in line
    ]
    assert len(warned) == 2
    assert warned[0].endswith('"sorce"')
    assert r'"a\nb"' in warned[1]
    assert run_tests(pytester, "-W", "error::eventstore_extras.pytest_plugin.IgnoredNameWarning").ret == 1
    silent = run_tests(pytester, "-W", "ignore::eventstore_extras.pytest_plugin.IgnoredNameWarning")
    silent.assert_outcomes(passed=3, warnings=0)
