"""A mock answers only to the names of this machine."""

from __future__ import annotations

import socket
from collections.abc import Iterator, Sequence
from pathlib import Path

import httpx
import pytest

from eventstore import StartError
from eventstore_extras.hosts import check_hosts, is_allowed
from eventstore_extras.mock import MockServer, running_server
from helpers import KEY, Live, refusal, refused, table

LOOPBACK = ["localhost", "LOCALHOST:80", "localhost.", "app.localhost:8080", "127.0.0.1", "127.0.0.1:1", "127.9.9.9",
            "[::1]", "[::1]:8080", "[0:0:0:0:0:0:0:1]"]  # fmt: skip
ELSEWHERE = ["evil.example", "evil.example:8080", "localhost.evil.example", "127.0.0.1.evil.example", "evillocalhost",
             "10.0.0.1", "0.0.0.0", "[fe80::1]", "[::]", "127.1", "2130706433", "evil@127.0.0.1", "127.0.0.1@evil", "",
             "127.0.0.1, evil.example", "127.0.0.1/x", "::1", "[::1", "\n", "null", "file://", "local\u017fost"]  # fmt: skip


@table("host", LOOPBACK)
def test_loopback_names_and_addresses_are_allowed(host: str) -> None:
    assert is_allowed(host)
    assert is_allowed(f"http://{host}")
    assert is_allowed(f"https://{host}")


@table("host", ELSEWHERE)
def test_other_hosts_are_not_allowed(host: str) -> None:
    assert not is_allowed(host)
    assert not is_allowed(f"http://{host}")


@table(
    ("allowed", "host", "is_found"),
    [
        (["Mock"], "mock:8080", True),
        (["mock."], "MOCK", True),
        (["mock"], "mock.evil.example", False),
        (["10.0.0.7"], "10.0.0.7:8080", True),
        (["10.0.0.7"], "10.0.0.8", False),
        (["fd00::7"], "[fd00::7]:8080", True),
        (["0.0.0.0"], "10.0.0.7", True),
        (["::"], "[fd00::7]", True),
        (["0.0.0.0"], "evil.example", False),
        (["*"], "evil.example", True),
    ],
)
def test_more_hosts_can_be_allowed(allowed: list[str], host: str, is_found: bool) -> None:
    assert is_allowed(host, check_hosts(allowed, "--allow-host")) is is_found


@table("host", ["", "http://mock", "mock:8080", "mock/v1", "two words", "a,b", "[mock]"])
def test_a_host_that_no_header_can_name_is_refused(host: str) -> None:
    with pytest.raises(StartError, match="allowed_hosts must be a name or an address without scheme and port, got "):
        check_hosts([host], "allowed_hosts")


# ---------------------------------------------------------------------------------------------- the mock


@pytest.fixture(scope="module")
def mock() -> Iterator[MockServer]:
    with running_server(allowed_hosts=["mock"]) as server:
        yield server


@pytest.mark.slow
@table("path", ["/v1/events", "/_mock/faults", "/health", "/openapi.json", "/", "/v1/nothing"])
@table("header", ["host", "origin"])
def test_a_mock_refuses_requests_from_another_site(mock: MockServer, path: str, header: str) -> None:
    value = {"host": "evil.example:8080", "origin": "http://evil.example"}[header]
    headers = {"x-api-key": mock.api_key, header: value}
    for method in ("GET", "POST", "DELETE"):
        answer = httpx.request(method, httpx.URL(mock.url).join(path), headers=headers)
        refused(answer, 403, "permission_denied", f'{header.title()} "{value}" is not this machine')


def test_a_mock_answers_local_pages_and_allowed_names(mock: MockServer) -> None:
    for headers in ({"host": "mock:8080"}, {"origin": "http://localhost:3000"}, {"origin": "http://mock"}, {}):
        assert httpx.get(f"{mock.url}/events", headers={"x-api-key": mock.api_key, **headers}).status_code == 200


@table("lines", ["", "Host:\r\n", "Host: localhost\r\nHost: evil.example\r\n", "Host: evil\xa0example\r\n"])
def test_a_request_without_a_single_good_host_is_refused(mock: MockServer, lines: str) -> None:
    with socket.create_connection(("127.0.0.1", httpx.URL(mock.url).port or 0), timeout=30) as sock:
        key = f"x-api-key: {mock.api_key}\r\n"
        sock.sendall(f"GET /v1/events HTTP/1.1\r\n{key}{lines}\r\n".encode("latin-1"))
        assert sock.recv(100).split()[1] in (b"400", b"403")


def of_host(live: Live, host: str) -> int:
    return httpx.get(f"{live.url}/v1/events", headers={"x-api-key": KEY, "host": host}).status_code


@pytest.mark.slow
@table(
    ("flags", "statuses"),
    [
        ([], {"127.0.0.1": 200, "localhost": 200, "mock": 200, "evil.example": 200}),
        (["--mock"], {"127.0.0.1": 200, "localhost": 200, "mock": 403, "evil.example": 403}),
        (["--mock", "--allow-host", "mock", "--allow-host", "other"], {"mock:80": 200, "other": 200, "evil.example": 403}),
        (["--mock", "--host", "0.0.0.0"], {"10.0.0.1": 200, "mock": 403}),
    ],
    ids=str,
)  # fmt: skip
def test_only_a_mock_checks_the_host(tmp_path: Path, flags: Sequence[str], statuses: dict[str, int]) -> None:
    with Live(tmp_path, "--api-key", KEY, *flags) as live:
        assert {host: of_host(live, host) for host in statuses} == statuses


def test_serve_refuses_an_allowed_host_that_no_header_can_name(tmp_path: Path) -> None:
    done = refusal(tmp_path, "serve", "--mock", "--port", "0", "--api-key", KEY, "--allow-host", "http://mock")
    problem = '--allow-host must be a name or an address without scheme and port, got "http://mock"'
    assert (done.returncode, done.stdout, done.stderr) == (2, "", f"eventstore: {problem}\n")


def test_without_a_flag_the_page_is_served_under_any_name_and_contains_no_key(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        page = client.get("/", headers={"Host": "events.example.com"})
        assert page.status_code == 200
        assert KEY not in page.text
        assert httpx.get(f"{live.url}/v1/events", headers={"Host": "evil.example"}).status_code == 401


@pytest.mark.slow
def test_with_allow_host_a_server_answers_to_that_name_and_loopback_only(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY, "--allow-host", "events.example.com") as live, live.client() as client:
        for path in ("/", "/v1/events", "/health"):
            assert client.get(path).status_code == 200
            assert client.get(path, headers={"Host": "events.example.com"}).status_code == 200
            refused(client.get(path, headers={"Host": "evil.example"}), 403, "permission_denied", "is not this machine")
        foreign = {"Origin": "https://evil.example"}
        refused(client.post("/v1/events", json={}, headers=foreign), 403, "permission_denied", "is not this machine")
