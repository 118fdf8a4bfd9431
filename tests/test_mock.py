"""A FlexPrice for tests: `running_server`, its faults, `serve --mock` and the pytest fixture."""

from __future__ import annotations

import asyncio
import os
import re
import socket
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest.mock import Mock

import httpx
import pytest

from eventstore import EVENT_FILTERS, ApiError, Settings, StartError, Store, to_us
from eventstore_extras import mock as mock_module
from eventstore_extras.faults import FIELDS, FaultFields, InjectedFault
from eventstore_extras.mock import EventFilters, MockServer, SettingsFields, running_server
from helpers import (
    BODY,
    DAY_US,
    KEY,
    NOW,
    STAGING_KEY,
    Live,
    at,
    counts,
    event,
    eventually,
    feature_of,
    posting,
    python,
    refused,
    store,
    stores_nothing,
    table,
    total,
)

if TYPE_CHECKING:
    from flexprice.utils import RetryConfig

# ---------------------------------------------------------------------------------------------- running_server


@pytest.fixture(scope="module")
def shared_mock() -> Iterator[MockServer]:
    with running_server() as server:
        yield server


@pytest.fixture
def mock(shared_mock: MockServer) -> MockServer:
    shared_mock.reset()
    return shared_mock


@pytest.fixture
def caller(mock: MockServer) -> Iterator[httpx.Client]:
    with calling(mock) as client:
        yield client


def calling(server: MockServer, key: str | None = None, **options: Any) -> httpx.Client:
    return httpx.Client(base_url=server.url, headers={"x-api-key": key or server.api_key}, **options)


def send(client: httpx.Client, event_id: str = "evt_1", **fields: Any) -> httpx.Response:
    return client.post("/events", json=event(event_id, **fields))


def ids_in(server: MockServer, **filters: Any) -> list[str]:
    return [stored["id"] for stored in server.events(**filters)]


@pytest.mark.filterwarnings("error")
@table("fails", [False, True], ids=["the block ends", "the block raises"])
def test_a_running_server_stops_and_cleans_up_when_its_block_ends(fails: bool) -> None:
    threads, files = set(threading.enumerate()), open_files()
    with pytest.raises(ZeroDivisionError) if fails else nullcontext(), running_server() as server:
        with calling(server) as client:
            assert send(client).status_code == 202
        assert ids_in(server) == ["evt_1"]
        port = httpx.URL(server.url).port
        opened = open_files() - files
        assert opened
        1 / (not fails)
    assert set(threading.enumerate()) == threads
    assert open_files() <= files
    assert not any(os.path.exists(path) for path in opened if path.startswith(tempfile.gettempdir()))
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port))


def open_files() -> set[str]:
    """Return the files that this process has open."""
    links = Path("/proc/self/fd")
    if not links.exists():
        pytest.skip("needs /proc to see open files")
    targets = {os.readlink(link) for link in links.iterdir() if link.is_symlink()}
    return {target for target in targets if target.startswith("/")}


def test_several_servers_are_independent() -> None:
    with running_server() as one, running_server() as other:
        other.fail(status=503, method="POST")
        with calling(one) as client:
            assert send(client).status_code == 202
        with calling(other) as client:
            assert send(client).status_code == 503
        assert (ids_in(one), ids_in(other)) == (["evt_1"], [])


def test_a_running_server_accepts_keys_and_settings(tmp_path: Path) -> None:
    keys = {"first": "production", "second": "staging"}
    with running_server(api_keys=keys, clock=lambda: NOW, max_body_bytes=200) as server:
        assert (server.api_key, server.api_keys) == ("first", keys)
        with calling(server) as first, calling(server, "second") as second:
            assert send(first, "1").status_code == send(second, "2").status_code == 202
            assert send(first, "3", source="x" * 200).status_code == 400
        assert [(stored["id"], stored["environment_id"]) for stored in server.events()] == [("1", "production")]
        (of_second,) = server.events(environment="staging")
        assert of_second["timestamp"] == "2025-10-15T11:38:47.962Z"


@table(("arguments", "part"), [
    ({"colour": "red"}, r"running_server\(\) does not take colour; it takes listener, forward_to, api_keys, db, "),
    ({"api_keys": "key"}, "api_keys must map keys to names of environments, such as .*, got str$"),
    ({"api_keys": ["key"]}, "api_keys must map keys to names of environments, .*, got list$"),
    ({"api_keys": {"key": None}}, "api_keys must map keys to names of environments, .*, got the name None"),
    ({"api_keys": {"key": ""}}, "api_keys must map keys to names of environments, .*, got the name ''"),
    ({"allowed_hosts": "eventstore"}, "allowed_hosts must be a list of names, got 'eventstore'"),
    ({"clock": 1760528327962000}, "clock must be a function that returns microseconds since 1970 as an int, got 1760528327962000"),
    ({"clock": time.time}, r"clock must be a function that returns microseconds since 1970 as an int, got \d+\.\d+"),
    ({"clock": lambda: None}, "clock must be a function .*, got None"),
    ({"forward_to": "http://127.0.0.1:1"}, "forward_to must be another server, or have a url and an api_key, got 'http:"),
])  # fmt: skip
def test_an_argument_of_an_unknown_name_or_a_wrong_type_is_an_error(arguments: dict[str, Any], part: str) -> None:
    with pytest.raises(TypeError, match=part), running_server(**arguments):
        pass


def test_events_returns_dicts_oldest_first_and_takes_filters(mock: MockServer, caller: httpx.Client) -> None:
    sent = [
        event(f"{number:04}", timestamp=at(-number * DAY_US), properties={"n": number % 2}) for number in range(1001)
    ]
    for some in (sent[:999], sent[999:]):
        assert caller.post("/events/bulk", json={"events": some}).status_code == 202
    assert ids_in(mock) == [f"{number:04}" for number in reversed(range(1001))]
    assert len(ids_in(mock, property_filters={"n": ["1"]})) == 500
    (found,) = mock.events(event_id="0003")
    assert found == caller.get("/events/0003").json()["event"]
    since = datetime.fromisoformat(at(-DAY_US))
    assert ids_in(mock, start_time=since) == ["0001", "0000"]


@table(("filters", "error", "part"), [
    ({"colour": "red"}, TypeError, "no filter colour: it takes external_customer_id, "),
    ({"page_size": 5}, TypeError, "no filter page_size"),
    ({"start_time": "yesterday"}, ApiError, "start_time must be RFC 3339"),
    ({"property_filters": {"status": "12"}}, ApiError, r'property_filters must be an object of string arrays, got \{"status":"12"\}'),
    ({"event_name": 5}, ApiError, "event_name must be a string, got 5"),
    ({"environment": "stagin"}, ApiError, 'environment must be one of "development", got "stagin"'),
    ({"environment": ""}, ApiError, 'environment must be one of "development", got ""'),
], ids=str)  # fmt: skip
def test_events_rejects_bad_filters(
    mock: MockServer, filters: dict[str, Any], error: type[Exception], part: str
) -> None:
    with pytest.raises(error, match=part):
        mock.events(**filters)


def test_a_key_that_no_header_can_carry_is_refused() -> None:
    with (
        pytest.raises(StartError, match="api_keys: an API key is empty, or has a space"),
        running_server(api_keys={"a b": "c"}),
    ):
        pass


@table(("fault", "part"), [
    ({"status": "500"}, 'status must be an integer, got "500"'), ({"status": True}, "status must be an integer, got true"),
    ({"status": 500, "stored": "yes"}, 'stored must be true or false, got "yes"'),
    ({"status": 429, "retry_after_s": "soon"}, 'retry_after_s must be an integer, got "soon"'),
    ({"delay_ms": 0.5}, "delay_ms must be an integer, got 0.5"), ({"status": 500, "path": 5}, "path must be a string, got 5"),
])  # fmt: skip
def test_a_fault_with_a_value_of_a_wrong_type_names_field_and_value(
    mock: MockServer, fault: dict[str, Any], part: str
) -> None:
    with pytest.raises(ApiError, match=re.escape(part)):
        mock.fail(**fault)
    assert mock.faults() == []


def test_meters_of_an_unknown_environment_are_an_error_that_lists_the_known_ones() -> None:
    with running_server(api_keys={"a": "one", "b": "two"}) as server:
        assert server.meters(environment="two") == []
        with pytest.raises(ApiError, match='environment must be one of "one", "two", got "three"'):
            server.meters(environment="three")


def test_a_misspelt_keyword_is_an_error_at_run_time_and_for_mypy(mock: MockServer) -> None:
    """mypy checks this file: it reports an unused `type: ignore`, so each of these lines is an error for it."""
    with pytest.raises(TypeError, match=r"fail\(\) does not take tmies; it takes method, .* did you mean times\?"):
        mock.fail(status=500, tmies=3)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"fail\(\) does not take statsu; .* did you mean status\?"):
        mock.fail(statsu=500)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match=r"events\(\) has no filter page_sise: it takes external_customer_id, "):
        mock.events(page_sise=1)  # type: ignore[call-arg]
    with pytest.raises(
        TypeError, match=r"externalCustomerId, sorce: it takes .* did you mean external_customer_id and s"
    ):
        mock.events(externalCustomerId="c", sorce="s")  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="does not take nope; it takes"), running_server(nope=4):  # type: ignore[call-arg]
        pass
    with pytest.raises(TypeError, match="mean allowed_hosts"), running_server(allow_hosts=["x"]):  # type: ignore[call-arg]
        pass
    with pytest.raises(TypeError, match="mean visibility_lag_ms"), running_server(visibilityLagMs=1):  # type: ignore[call-arg]
        pass
    with pytest.raises(ApiError):
        mock.fail(status="500")  # type: ignore[arg-type]
    with pytest.raises(ApiError):
        mock.events(source=5)  # type: ignore[arg-type]
    assert mock.faults() == []


def test_the_keywords_for_type_checkers_are_the_fields_that_exist() -> None:
    assert set(FaultFields.__annotations__) == set(InjectedFault.__struct_fields__) == set(FIELDS)
    assert set(EventFilters.__annotations__) == set(EVENT_FILTERS)
    assert set(SettingsFields.__annotations__) == set(Settings.__struct_fields__) - {"api_keys"}


def test_a_strict_server_refuses_what_others_ignore(mock: MockServer, caller: httpx.Client) -> None:
    assert send(caller, sorce="web").status_code == 202
    assert [request.ignored for request in mock.requests()] == [["sorce"]]
    assert mock.ignored_names() == ['POST /v1/events ignored "sorce"']
    assert mock.ignored_names() == []
    with running_server(strict=True) as strict, calling(strict) as client:
        refused(send(client, sorce="web"), part="sorce")
        refused(client.get("/events", params={"sorce": "web"}), part="sorce")
        assert strict.events() == []


def test_reset_forgets_events_and_faults(mock: MockServer, caller: httpx.Client) -> None:
    send(caller)
    mock.fail(status=500)
    mock.reset()
    assert (mock.events(), mock.faults()) == ([], [])
    assert counts(send(caller)) == (1, 0)


def test_faults_refuse_events_until_a_reset_has_deleted_the_others(
    mock: MockServer, caller: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    delete_rows, statuses = mock_module._delete_rows, []

    def send_and_delete(*arguments: Any) -> int:
        statuses.append(send(caller).status_code)
        return delete_rows(*arguments)

    monkeypatch.setattr(mock_module, "_delete_rows", send_and_delete)
    mock.fail(status=503, times=2)
    mock.reset()
    assert (statuses, mock.events(), mock.requests(), mock.faults()) == ([503], [], [], [])
    assert counts(send(caller)) == (1, 0)


def test_with_a_clock_that_stands_still_the_event_just_sent_counts_everywhere() -> None:
    with running_server(clock=lambda: NOW) as server, calling(server) as client:
        feature = client.post("/features", json=feature_of()).json()
        assert send(client).status_code == 202
        assert client.post("/events/", json=event("evt_2")).status_code == 202
        assert {stored["timestamp"] for stored in server.events()} == {"2025-10-15T11:38:47.962Z"}
        count = {"event_name": "call", "aggregation_type": "COUNT"}
        assert client.post("/events/usage", json=count).json()["value"] == 2
        (window,) = client.post("/events/usage", json=count | {"window_size": "HOUR"}).json()["results"]
        assert window["value"] == 2
        for size in ({}, {"window_size": "HOUR"}):
            assert client.get("/events/monitoring", params=size).json()["total_count"] == 2
            (item,) = client.post("/events/analytics", json={"external_customer_id": "cust", **size}).json()["items"]
            assert (item["total_usage"], item["event_count"]) == ("2", 2)
        usage = client.post("/events/usage/meter", json={"meter_id": feature["meter_id"]}).json()
        assert usage["value"] == 2
        assert len(client.get("/events").json()["events"]) == 2
        assert client.get(f"/meters/{feature['meter_id']}").json()["created_at"] == "2025-10-15T11:38:47.962Z"


@table("now", ["2025-10-15T11:38:47.962Z", "2040-01-01T00:00:00Z", "1970-01-01T00:00:00Z", "1969-07-20T20:17:40Z"])
def test_every_answer_has_one_date_which_comes_from_the_clock(now: str) -> None:
    time = datetime.fromisoformat(now)
    with running_server(clock=lambda: to_us(time)) as server, calling(server) as client:
        server.fail(status=503, method="POST")
        answers = [send(client), send(client), client.post("/events", content=b"{"), client.get("/nowhere"),
                   client.get("/events"), client.head("/events"), client.put("/events"), client.options("/events"),
                   client.get("/events", headers={"x-api-key": "wrong"}), client.get("/events", headers={"Host": "x.org"}),
                   client.get(server.url.removesuffix("v1")), client.get(server.url.replace("v1", "health"))]  # fmt: skip
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Store, "insert", Mock(side_effect=ZeroDivisionError))
            answers.append(send(client))
        statuses = [answer.status_code for answer in answers]
        assert statuses == [503, 202, 400, 404, 200, 200, 405, 200, 401, 403, 200, 200, 500]
        dates = {value for answer in answers for value in answer.headers.get_list("date")}
        assert dates == {time.strftime("%a, %d %b %Y %H:%M:%S GMT")}
        assert all(len(answer.headers.get_list("date")) == 1 for answer in answers)


def test_the_date_of_answers_follows_a_clock_that_moves() -> None:
    times = [NOW]
    with running_server(clock=lambda: times[-1]) as server, calling(server) as client:
        before = client.get("/events").headers["date"]
        times.append(NOW + DAY_US)
        after = client.get("/events").headers["date"]
    assert (before, after) == ("Wed, 15 Oct 2025 11:38:47 GMT", "Thu, 16 Oct 2025 11:38:47 GMT")


def test_the_date_of_answers_is_frozen_with_the_time() -> None:
    code = """if True:  # in another process: modules that are imported while time is frozen keep freezegun's classes
        import httpx
        from eventstore_extras.mock import running_server
        from freezegun import freeze_time
        with running_server() as server, freeze_time("2031-05-06 07:08:09.25"):
            answer = httpx.get(f"{server.url}/events", headers={"x-api-key": server.api_key})
            print(answer.status_code, answer.headers.get_list("date"))
    """
    assert python(code).stdout == "200 ['Tue, 06 May 2031 07:08:09 GMT']\n"


def test_a_server_can_be_unreachable_for_a_while_and_keeps_its_events() -> None:
    with running_server() as server, calling(server) as client:
        assert send(client).status_code == 202
        for _ in range(3):
            server.refuse_connections()
            server.refuse_connections()
            for _ in range(2):
                with pytest.raises(httpx.ConnectError, match="refused"):
                    send(client)
            server.accept_connections()
            server.accept_connections()
            assert counts(send(client)) == (0, 1)
        assert ids_in(server) == ["evt_1"]


def test_connections_accepted_just_before_a_server_becomes_unreachable_are_closed_as_well() -> None:
    is_asked, may_answer = threading.Event(), threading.Event()
    may_answer.set()

    def clock() -> int:
        is_asked.set()
        assert may_answer.wait(60)  # holds up the event loop
        return NOW

    with running_server(clock=clock, api_keys={KEY: "development"}) as server, ExitStack() as stack:
        address = ("127.0.0.1", httpx.URL(server.url).port)
        for _ in range(5):  # one round in twenty misses the moment
            is_asked.clear()
            may_answer.clear()
            socks = [stack.enter_context(socket.create_connection(address, timeout=60))]
            socks[0].sendall(posting(BODY))
            assert is_asked.wait(60)
            socks += [stack.enter_context(socket.create_connection(address, timeout=60)) for _ in range(5)]
            closing = threading.Thread(target=server.refuse_connections)
            closing.start()
            time.sleep(0.01)  # so that the event loop finds the connections and the order to close them together
            may_answer.set()
            closing.join()
            for sock in socks:
                with suppress(ConnectionResetError):
                    while sock.recv(1000):
                        pass
            server.accept_connections()


def test_while_a_server_is_unreachable_no_other_program_gets_its_port() -> None:
    with running_server() as server:
        server.refuse_connections()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(("127.0.0.1", httpx.URL(server.url).port))


# ---------------------------------------------------------------------------------------------- faults

FAULTS = {  # name -> the fault, the answers to two events, how many of the two are stored
    "an error": ({"status": 500}, [(500, "internal_error"), (202, None)], 1),
    "twice": ({"status": 502, "times": 2}, [(502, "bad_gateway"), (502, "bad_gateway")], 0),
    "every field": ({"method": "POST", "path": "/v1/events", "times": 1, "status": 429, "retry_after_s": 1,
                     "delay_ms": 1, "stored": False}, [(429, "too_many_requests"), (202, None)], 1),
    "any case of the method": ({"method": "post", "status": 503}, [(503, "service_unavailable"), (202, None)], 1),
    "another path": ({"path": "/v1/events/bulk", "status": 504}, [(202, None), (202, None)], 2),
    "another method": ({"method": "GET", "status": 504}, [(202, None), (202, None)], 2),
    "stored, answer lost": ({"status": 504, "stored": True}, [(504, "gateway_timeout"), (202, None)], 2),
    "accepted and lost": ({"status": 202, "stored": False}, [(202, None), (202, None)], 1),
    "slow": ({"delay_ms": 1}, [(202, None), (202, None)], 2),
}  # fmt: skip


@pytest.mark.slow
@table("how", ["HTTP", "Python"])
@table(("fault", "answers", "stored"), FAULTS.values(), ids=FAULTS)
def test_the_next_matching_requests_meet_a_fault(
    mock: MockServer,
    caller: httpx.Client,
    how: str,
    fault: dict[str, Any],
    answers: list[tuple[int, str | None]],
    stored: int,
) -> None:
    if how == "Python":
        mock.fail(**fault)
    else:
        waiting = caller.post("../_mock/faults", json=fault)
        assert waiting.status_code == 200, waiting.text
        assert waiting.json() == caller.get("../_mock/faults").json() == {"faults": mock.faults()}
    assert len(mock.faults()) == 1
    for number, (status, code) in enumerate(answers):
        answer = send(caller, f"evt_{number}")
        assert answer.headers.get("retry-after") == ("1" if status == 429 else None)
        if code:
            refused(answer, status, code)
        else:
            assert (answer.status_code, answer.json()["event_id"]) == (202, f"evt_{number}")
    assert len(mock.events()) == stored
    assert len(mock.faults()) == (
        1 if fault.get("path", "/v1/events") != "/v1/events" or fault.get("method") == "GET" else 0
    )


def test_faults_are_used_in_order_by_the_requests_they_match(mock: MockServer, caller: httpx.Client) -> None:
    mock.fail(method="GET", status=500)
    mock.fail(path="/v1/events/bulk", status=502)
    mock.fail(status=503, times=2)
    mock.fail(path="/v1/events/evt%5F1", status=504)
    assert [fault["times"] for fault in mock.faults()] == [1, 1, 2, 1]
    assert [send(caller).status_code for _ in range(3)] == [503, 503, 202]
    assert caller.post("/events/bulk", json={"events": [event()]}).status_code == 502
    assert [caller.get("/events/evt_1").status_code for _ in range(3)] == [500, 504, 200]
    assert mock.faults() == []


def test_a_fault_affects_only_its_environment_and_neither_the_mock_nor_health() -> None:
    with running_server(api_keys={"a": "one", "b": "two"}) as server:
        with calling(server, "a") as of_one, calling(server, "b") as of_two:
            of_one.post("../_mock/faults", json={"status": 500, "times": 2})
            assert of_two.get("../_mock/faults").json() == {"faults": []}
            assert [of_two.get("/events").status_code, of_one.get("../health").status_code] == [200, 200]
            assert of_one.get("/events").status_code == 500
            assert of_two.delete("../_mock/faults").json() == {"deleted": 0}
            assert of_one.delete("../_mock/faults").json() == {"deleted": 1}
            assert of_one.get("/events").status_code == 200
            server.fail(status=500)  # for any key
            assert of_two.delete("../_mock/faults").json() == {"deleted": 1}
            send(of_one)
            send(of_two)
            assert of_one.delete("../_mock/events").json() == {"deleted": 1}
        assert (server.events(), len(server.events(environment="two"))) == ([], 1)


def test_a_retry_after_a_lost_answer_stores_no_duplicate(mock: MockServer, caller: httpx.Client) -> None:
    mock.fail(status=500, stored=True)
    assert send(caller).status_code == 500
    assert counts(send(caller)) == (0, 1)
    assert ids_in(mock) == ["evt_1"]


@pytest.mark.slow
def test_a_delayed_event_is_stored_and_does_not_delay_the_shutdown(caplog: pytest.LogCaptureFixture) -> None:
    with running_server() as server:
        server.fail(method="POST", delay_ms=600_000)
        with pytest.raises(httpx.ReadTimeout), calling(server, timeout=httpx.Timeout(30, read=0.05)) as impatient:
            send(impatient)
        eventually(lambda: ids_in(server) == ["evt_1"])
    assert "Traceback" not in caplog.text


@table("fault", [{"status": 202}, {"status": 500, "stored": True}, {"delay_ms": 1}], ids=str)
def test_a_client_that_disconnects_while_sending_stores_nothing_whatever_the_fault(
    caplog: pytest.LogCaptureFixture, fault: dict[str, Any]
) -> None:
    with running_server(api_keys={KEY: "development"}) as server:
        server.fail(method="POST", **fault)
        with socket.create_connection(("127.0.0.1", httpx.URL(server.url).port)) as sock:
            sock.sendall(posting(BODY)[:-1])
        eventually(lambda: "client went away" in caplog.text)
        assert (server.events(), server.faults()) == ([], [])
    assert "Traceback" not in caplog.text


def test_answers_of_faults_count_towards_the_rate_limit() -> None:
    with running_server(rate_limits={"/v1/events": 2}, clock=lambda: NOW) as server, calling(server) as client:
        server.fail(status=503, times=3)
        answers = [send(client) for _ in range(3)]
        left = [(answer.status_code, answer.headers["X-RateLimit-Remaining"]) for answer in answers]
        assert left == [(503, "1"), (503, "0"), (429, "0")]
        assert [fault["times"] for fault in server.faults()] == [1]


@pytest.mark.slow
def test_a_stopping_server_sends_delayed_answers() -> None:
    with ThreadPoolExecutor() as pool:
        with running_server() as server:
            server.fail(method="POST", delay_ms=600_000)
            client = calling(server, timeout=60)
            answer = pool.submit(send, client)
            eventually(lambda: ids_in(server) == ["evt_1"])
        assert answer.result().status_code == 202
        client.close()


@table("fault", [{"status": 500, "stored": True}, {"status": 202}], ids=str)
def test_a_fault_does_not_replace_a_refusal(mock: MockServer, caller: httpx.Client, fault: dict[str, Any]) -> None:
    mock.fail(**fault)
    refused(send(caller, timestamp="yesterday"), part="timestamp")
    assert mock.events() == []


BAD_FAULTS = {
    "no effect": ({}, "status or delay_ms is required"),
    "no such status": ({"status": 418}, 'status must be one of 202, 429, 500, 502, 503, 504, got "418"'),
    "a status in words": ({"status": "500"}, "status must be an integer, got"),
    "no such path": ({"status": 500, "path": "/v1/customers"}, 'path must be a path of this API (/v1/events, '),
    "a path of the mock": ({"status": 500, "path": "/_mock/faults"}, "path must be a path of this API"),
    "a path without a key": ({"status": 500, "path": "/health"}, "path must be a path of this API"),
    "no such method": ({"status": 500, "method": "BREW"}, "method must be one that this path takes"),
    "not with this path": ({"status": 500, "method": "DELETE", "path": "/v1/events"}, 'got "DELETE"'),
    "a query cannot be stored": ({"status": 500, "method": "GET", "stored": True},
                                "stored is true, which goes with POST /v1/events and POST /v1/events/bulk only"),
    "a query cannot be accepted": ({"status": 202, "path": "/v1/events/query"},
                                  "status is 202, which goes with POST /v1/events and POST /v1/events/bulk only"),
    "stored with 202": ({"status": 202, "stored": True}, "stored must be false with status 202"),
    "stored=False without a status": ({"delay_ms": 5, "stored": False}, "stored must not be false without a status"),
    "zero times": ({"status": 500, "times": 0}, "times must be 1 to 1000000, got 0"),
    "a negative delay": ({"delay_ms": -1}, "delay_ms must be 0 to 600000, got -1"),
    "a delay too long": ({"delay_ms": 600_001}, "delay_ms must be 0 to 600000, got 600001"),
    "retry_after_s without an error": ({"delay_ms": 1, "retry_after_s": 3600}, "retry_after_s goes with an error status only"),
    "retry_after_s with 202": ({"status": 202, "retry_after_s": 1}, "retry_after_s goes with an error status only"),
    "a path template": ({"status": 500, "path": "/v1/events/{id}"}, "path must be one path, no query string, an id in place"),
    "a query": ({"status": 500, "path": "/v1/events/lookup?id=1"}, "path must be one path, no query string"),
    "not an integer": ({"status": 429, "retry_after_s": 0.5}, "retry_after_s must be an integer"),
}  # fmt: skip


@pytest.mark.slow
@table(("fault", "part"), BAD_FAULTS.values(), ids=BAD_FAULTS)
def test_a_bad_fault_is_refused_and_not_added(
    mock: MockServer, caller: httpx.Client, fault: dict[str, Any], part: str
) -> None:
    refused(caller.post("../_mock/faults", json=fault), part=part)
    with pytest.raises(ApiError):
        mock.fail(**fault)
    assert mock.faults() == []


@table(
    ("content", "part"),
    [("", "empty"), ("[]", "body must be an object, got []"), ('{"stauts": 500}', "stauts is not a field")],
)
def test_a_body_that_is_not_a_fault_is_refused(mock: MockServer, caller: httpx.Client, content: str, part: str) -> None:
    refused(caller.post("../_mock/faults", content=content), part=part)
    assert mock.faults() == []


@table("method", ["GET", "POST", "DELETE"])
@table("path", ["/_mock/events", "/_mock/faults"])
def test_without_the_flag_the_mock_routes_are_404(client: httpx.Client, method: str, path: str) -> None:
    with stores_nothing(client):
        refused(client.request(method, path, json={"status": 500}), 404, "not_found", "started with --mock")


def test_mock_routes_need_a_key_and_a_known_path(mock: MockServer, caller: httpx.Client) -> None:
    refused(httpx.delete(mock.url.replace("/v1", "/_mock/events")), 401, "unauthorized")
    refused(caller.get("../_mock/events"), 405, "method_not_allowed", "allowed: DELETE")
    refused(caller.get("../_mock/nothing"), 404, "not_found", "this server has /v1/events,")
    refused(caller.get("../_mock/fault"), 404, "not_found", "did you mean POST or GET or DELETE /_mock/faults?")
    assert {"/_mock/events", "/_mock/faults"} < set(caller.get("../openapi.json").json()["paths"])


@pytest.mark.slow
def test_serve_mock_opens_the_routes_and_keeps_the_event_count_right(tmp_path: Path) -> None:
    flags = ("--api-key", KEY, "--api-key", f"{STAGING_KEY}=staging", "--db", "events.db", "--mock")
    with Live(tmp_path, *flags) as live, live.client() as client, live.client(STAGING_KEY) as staging:
        assert "/_mock/events" in live.banner
        store(client, event("1"), event("2"), event("3"))
        store(staging, event("1"))
        assert client.delete("/_mock/events").json() == {"deleted": 3}
        assert client.post("/_mock/faults", json={"status": 503, "retry_after_s": 7}).status_code == 200
        refused(client.get("/v1/events"), 503, "service_unavailable")
        assert (total(client), total(staging)) == (0, 1)
        live.stop()
    with Live(tmp_path, *flags) as live:
        assert "events.db (1 event)" in live.banner


# ---------------------------------------------------------------------------------------------- its process


def test_the_server_does_not_import_pytest() -> None:
    code = ("import sys; from eventstore_extras import mock; server = mock.running_server(); server.__enter__(); "
            "print('pytest' in sys.modules)")  # fmt: skip
    assert python(code).stdout == "False\n"


def test_a_server_whose_block_never_ends_stops_with_the_process_and_leaves_no_file(tmp_path: Path) -> None:
    code = ("import sys, tempfile, urllib.request; from eventstore_extras.mock import running_server; "
            "tempfile.tempdir = sys.argv[1]; server = running_server(); url = server.__enter__().url; "
            "print(urllib.request.urlopen(url.removesuffix('v1') + 'health').status)")  # fmt: skip
    ended = python(code, tmp_path)
    assert (ended.returncode, ended.stdout, ended.stderr) == (0, "200\n", "")
    assert list(tmp_path.iterdir()) == []


FORKS = {  # what the child does
    "sys.exit": "sys.exit(0)",
    "os._exit": "os._exit(0)",
    "raises": "1 / 0",
    "leaves the block": "return",
    "collects garbage": "del server; gc.collect(); os._exit(0)",
    "stops it": "server.refuse_connections(); server.accept_connections(); running.close(); sys.exit(0)",
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@table("child", FORKS.values(), ids=FORKS)
def test_a_forked_child_neither_stops_the_server_nor_removes_its_database(tmp_path: Path, child: str) -> None:
    code = f"""if True:
        import contextlib, gc, os, sys, tempfile, urllib.request
        from eventstore_extras.mock import running_server

        def send(server):
            body = b'{{"event_name": "call", "external_customer_id": "cust"}}'
            headers = {{"x-api-key": server.api_key}}
            urllib.request.urlopen(urllib.request.Request(server.url + "/events", body, headers))

        def run():
            with contextlib.ExitStack() as running:
                server = running.enter_context(running_server())
                send(server)
                child = os.fork()
                if child == 0:
                    {child}
                os.waitpid(child, 0)
                send(server)
                print(len(server.events()), len(server.requests()))

        tempfile.tempdir = sys.argv[1]
        run()
    """
    done = python(code, tmp_path)
    assert (done.returncode, done.stdout) == (0, "2 2\n"), done.stderr
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------- the SDK


def retrying() -> RetryConfig:
    from flexprice.utils import BackoffStrategy, RetryConfig

    return RetryConfig("backoff", BackoffStrategy(1, 10, 1.5, 20_000, jitter_ms=0), True)


RETRIED = {
    "429 with Retry-After": [{"status": 429, "retry_after_s": 1}],
    "500 thrice": [{"status": 500, "times": 3}],
    "stored, the answer lost": [{"status": 500, "stored": True}],
    "one after the other": [{"status": 502}, {"status": 503, "stored": True}, {"status": 504}],
}


@pytest.mark.slow
@table("way", ["sync", "async", "bulk"])
@table("faults", RETRIED.values(), ids=RETRIED)
def test_retries_of_the_sdk_store_exactly_one_event(mock: MockServer, faults: list[dict[str, Any]], way: str) -> None:
    from flexprice import Flexprice

    for fault in faults:
        mock.fail(method="POST", **fault)
    sdk = Flexprice(server_url=mock.url, api_key_auth=mock.api_key, retry_config=retrying())
    one: Any = {"event_name": "call", "external_customer_id": "cust", "event_id": "evt_1"}

    async def ingest() -> object:
        async with sdk:
            return await sdk.events.ingest_event_async(**one)

    if way == "async":
        asyncio.run(ingest())
    else:
        with sdk:
            sdk.events.ingest_event(**one) if way == "sync" else sdk.events.ingest_events_bulk(events=[one])
    assert mock.faults() == []
    assert ids_in(mock) == ["evt_1"]
