"""Proxies between this machine and the target of `replay` and `serve --forward-to`."""

from __future__ import annotations

import importlib.util
import os
import re
import sys
from pathlib import Path

import pytest

from eventstore import StartError
from eventstore_extras import sending
from eventstore_extras.proxies import Proxy, find_proxy
from fake_target import FakeTarget, answering, answering_proxy, forwarding
from helpers import KEY, command_line, event, eventually, imported, lines_of, refusal, store, table

Captured = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: Patch) -> None:
    for name in [*os.environ]:
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)
    monkeypatch.setattr(sending, "BLOCKED_PAUSE_S", 0.01)


@pytest.fixture
def source(tmp_path: Path, capsys: Captured) -> Path:
    """A folder with a database of two events."""
    folder = imported(tmp_path / "source", lines_of(event("a"), event("b")))
    capsys.readouterr()  # what the import said
    return folder


def replayed(folder: Path, url: str) -> int:
    return command_line("replay", "--db", folder / "events.db", "--to", url, "--api-key", KEY,
                        "--give-up-after-s", 0.01)  # fmt: skip


# ---------------------------------------------------------------------------------------------- which proxy


@table(
    ("environ", "expected"),
    [
        ({"HTTPS_PROXY": "http://p:3128"}, Proxy("http://p:3128", "HTTPS_PROXY")),
        ({"https_proxy": "http://p:3128"}, Proxy("http://p:3128", "https_proxy")),
        ({"Https_Proxy": "http://p:3128"}, Proxy("http://p:3128", "Https_Proxy")),
        ({"HTTPS_PROXY": "http://upper", "https_proxy": "http://lower"}, Proxy("http://lower", "https_proxy")),
        ({"ALL_PROXY": "socks5://p", "HTTPS_PROXY": "p:1"}, Proxy("http://p:1", "HTTPS_PROXY")),
        ({"all_proxy": "socks5h://p"}, Proxy("socks5h://p", "all_proxy")),
        ({"ALL_PROXY": " HTTP://p:1/ "}, Proxy("HTTP://p:1/", "ALL_PROXY")),
        ({"ALL_PROXY": "me:it@[::1]:3128"}, Proxy("http://me:it@[::1]:3128", "ALL_PROXY")),
        ({"HTTP_PROXY": "http://p"}, None),
        ({"HTTPS_PROXY": " "}, None),
        ({"HTTPS_PROXY": "", "ALL_PROXY": "https://p"}, Proxy("https://p", "ALL_PROXY")),
    ],
)
def test_the_proxy_of_the_targets_scheme_comes_before_the_one_for_all(
    monkeypatch: Patch, environ: dict[str, str], expected: Proxy | None
) -> None:
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    assert find_proxy("https://api.example.com/v1") == expected


@table(
    ("no_proxy", "url", "is_exempt"),
    [
        ("example.com", "http://api.example.com", True),
        (".example.com", "http://api.example.com", True),
        ("*.example.com", "http://api.example.com", True),
        ("API.Example.com.", "http://api.example.com", True),
        (".example.com", "http://example.com", True),
        ("ample.com", "http://api.example.com", False),
        ("api.example.com.org", "http://api.example.com", False),
        ("other, example.com", "http://example.com", True),
        ("other example.com", "http://example.com", True),
        (" ,, ;", "http://example.com", False),
        ("*", "http://example.com", True),
        ("other,*", "http://example.com", True),
        ("example.com:8080", "http://example.com:8080", True),
        ("example.com:8080", "http://example.com", False),
        ("example.com:80", "http://example.com", True),
        ("http://example.com/", "http://example.com", True),
        ("10.1.2.3", "http://10.1.2.3", True),
        ("10.1.2.3:81", "http://10.1.2.3", False),
        ("10.0.0.0/8", "http://10.1.2.3", True),
        ("10.1.2.3/8", "http://10.200.0.1", True),
        ("192.168.0.0/16", "http://10.1.2.3", False),
        ("2.3", "http://10.1.2.3", False),
        ("[fd00::1]", "http://[fd00::1]", True),
        ("fd00::1", "http://[fd00:0::1]", True),
        ("[fd00::1]:443", "http://[fd00::1]", False),
        ("fd00::/8", "http://[fd00::1]", True),
        ("[fd00::]/8", "http://[fd00::1]", True),
        ("fe80::/10", "http://example.com", False),
        ("fe80::/999", "http://[fe80::1]", False),
        ("localhost,[::1]", "http://example.com", False),
        ("[::1", "http://[fe80::1]", False),
        ("]:[,[]:1,:,/8,[/]", "http://example.com", False),
        ("example.com:" + "9" * 5000, "http://example.com", False),
    ],
)  # fmt: skip
@table("name", ["NO_PROXY", "no_proxy", "No_Proxy"])
def test_no_proxy_lists_hosts_domains_addresses_and_networks(
    monkeypatch: Patch, name: str, no_proxy: str, url: str, is_exempt: bool
) -> None:
    monkeypatch.setenv("ALL_PROXY", "http://proxy:3128")
    monkeypatch.setenv(name, no_proxy)
    assert (find_proxy(url) is None) is is_exempt


@table("host", ["localhost", "LOCALHOST.", "api.localhost", "127.0.0.1", "127.9.9.9", "127.1", "0.0.0.0", "[::1]",
                "[::]", "[::ffff:127.0.0.1]"])  # fmt: skip
@table("value", ["http://proxy:3128", "socks://proxy", "http://[::1"])
def test_an_address_of_this_machine_is_reached_without_a_proxy(monkeypatch: Patch, host: str, value: str) -> None:
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, value)
    assert find_proxy(f"http://{host}:8080/v1") is None


def test_forwarding_to_this_machine_ignores_proxies(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    monkeypatch.setenv("ALL_PROXY", "socks://127.0.0.1:1")
    with FakeTarget() as target, forwarding(target) as (server, client):
        store(client, event("a"))
        server.wait_until_forwarded()
    assert target.ids == ["a"]


# ---------------------------------------------------------------------------------------------- values that cannot work

UNUSABLE = [
    ("socks://p:1080", 'must begin with http://, https://, socks5:// or socks5h://, got "socks://p:1080"'),
    ("socks4a://p", 'must begin with http://, https://, socks5:// or socks5h://, got "socks4a://p"'),
    ("ftp://p", 'got "ftp://p"'),
    ("http://", 'must be the URL of a proxy, like http://host:3128 or socks5://host:1080, got "http://"'),
    ("://p", 'must be the URL of a proxy'),
    ("http:/p:3128", 'must be the URL of a proxy'),
    ("http://p:port", 'got "http://p:port"'),
    ("p:99999", 'got "http://p:99999"'),
    ("http://p:0", 'got "http://p:0"'),
    ("http://[::1", 'got "http://[::1"'),
    ("http://a b", 'got "http://a b"'),
    ("http://p?x", 'got "http://p?x"'),
    ("http://\u2603", "Invalid IDNA hostname"),
    ("http://xn--a", "has no valid URL"),
    ("http://me:se#cret@p:3128", 'got "***@p:3128"; percent-encode special characters in the user and password'),
    ("me:se/cret@p", 'got "***@p"; percent-encode'),
    ("http://me:1/secret@p", 'got "***@p"; percent-encode'),
    ("ftp://me:secret@p", 'got "***@p"'),
]  # fmt: skip


@table(("value", "part"), UNUSABLE)
def test_replay_does_not_start_with_a_proxy_that_cannot_work(
    monkeypatch: Patch, capsys: Captured, source: Path, value: str, part: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", value)
    assert replayed(source, "http://events.example") == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "ALL_PROXY" in line
    assert part in line
    assert "secret" not in line


@table(("name", "value"), [("https_proxy", "socks://p"), ("ALL_PROXY", "http://p:port")])
def test_serve_does_not_start_with_a_proxy_that_cannot_work(tmp_path: Path, name: str, value: str) -> None:
    environ = {name: value, "FLEXPRICE_API_KEY": KEY}
    done = refusal(tmp_path, "serve", "--port", 0, "--forward-to", "https://events.example", **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(rf'eventstore: {name} must .+, got "{value}"\n', done.stderr)


def test_a_socks_proxy_needs_a_library(monkeypatch: Patch, capsys: Captured, source: Path) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)
    monkeypatch.setenv("ALL_PROXY", "socks5://me:secret@p")
    assert replayed(source, "http://events.example") == 2
    message = capsys.readouterr().err
    assert re.fullmatch(r"eventstore: the proxy socks5://p \(ALL_PROXY\) needs .+ -m pip install 'httpx\[socks\]'\n",
                        message)  # fmt: skip


def test_replay_does_not_start_without_its_certificates(monkeypatch: Patch, capsys: Captured, source: Path) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", str(source / "missing.pem"))
    assert replayed(source, "https://events.example") == 2
    assert capsys.readouterr().err == "eventstore: SSL_CERT_FILE cannot be read: No such file or directory\n"


# ---------------------------------------------------------------------------------------------- proxies at work


def test_events_are_sent_through_the_proxy(monkeypatch: Patch, source: Path) -> None:
    with FakeTarget() as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{proxy.port}")
        assert replayed(source, "http://events.example") == 0
    assert proxy.ids == ["a", "b"]
    assert proxy.paths == ["http://events.example/v1/events/bulk"]


STATUS = b"HTTP/1.1 %s\r\ncontent-length: 0\r\n\r\n"


@pytest.mark.slow
@table(
    ("answer", "part", "is_blocked"),
    [
        (STATUS % b"407 Proxy Authentication Required", "refuses to connect: 407 Proxy Authentication Required", True),
        (STATUS % b"403 Forbidden", "refuses to connect: 403 Forbidden", True),
        (STATUS % b"400 Bad Request", "refuses to connect: 400 Bad Request", True),
        (STATUS % b"502 Bad Gateway", "refuses to connect: 502 Bad Gateway", False),
        (b"HTTP/1.1 200 OK\r\n\r\n", "", False),
        (b"220 mail\r\n\r\n", "", False),
        (b"", "", False),
    ],
)
def test_a_proxy_that_does_not_connect_is_named(
    monkeypatch: Patch, capsys: Captured, source: Path, answer: bytes, part: str, is_blocked: bool
) -> None:
    with answering_proxy(answer) as port:
        monkeypatch.setenv("HTTPS_PROXY", f"http://me:secret@127.0.0.1:{port}")
        assert replayed(source, "https://events.example") == 1
    message = capsys.readouterr().err
    assert f"the proxy http://127.0.0.1:{port} (HTTPS_PROXY)" in message
    assert part in message
    assert ("given up" in message) is not is_blocked
    assert "secret" not in message


@table("url", ["http://events.example", "https://events.example"])
@table("proxy", ["http://me:secret@127.0.0.1:1", "http://me:secret@nowhere.invalid"])
def test_a_proxy_that_cannot_be_reached_is_named(
    monkeypatch: Patch, capsys: Captured, source: Path, url: str, proxy: str
) -> None:
    monkeypatch.setenv("ALL_PROXY", proxy)
    assert replayed(source, url) == 1
    message = capsys.readouterr().err
    assert f"the proxy {proxy.replace('me:secret@', '')} (ALL_PROXY) cannot be reached: " in message
    assert "secret" not in message


@pytest.mark.slow
@table("status", [403, 407, 502])
def test_an_answer_that_may_be_the_proxys_names_it(
    monkeypatch: Patch, caplog: pytest.LogCaptureFixture, status: int
) -> None:
    with FakeTarget(answering(status)) as proxy:
        monkeypatch.setenv("HTTP_PROXY", f"http://me:secret@127.0.0.1:{proxy.port}")
        target = FakeTarget()
        target.url = "http://events.example/v1"
        with forwarding(target) as (_, client):
            store(client, event("a"))
            named = f"answered {status} (through the proxy http://127.0.0.1:{proxy.port} (HTTP_PROXY))"
            eventually(lambda: named in caplog.text)
        target.server.server_close()
    assert "secret" not in caplog.text


@pytest.mark.skipif(importlib.util.find_spec("socksio") is None, reason="needs socksio")
def test_a_socks_proxy_that_speaks_another_protocol_is_named(
    monkeypatch: Patch, capsys: Captured, source: Path
) -> None:
    with answering_proxy(STATUS % b"400 Bad Request") as port:
        monkeypatch.setenv("ALL_PROXY", f"socks5://me:secret@127.0.0.1:{port}")
        assert replayed(source, "https://events.example") == 1
    message = capsys.readouterr().err
    assert f"cannot be reached through the proxy socks5://127.0.0.1:{port} (ALL_PROXY): " in message
    assert "secret" not in message


def test_a_variable_that_does_not_apply_to_the_target_is_ignored(monkeypatch: Patch) -> None:
    monkeypatch.setenv("HTTP_PROXY", "socks://p")
    monkeypatch.setenv("ALL_PROXY", "http://[")
    monkeypatch.setenv("HTTPS_PROXY", "http://p")
    assert find_proxy("https://events.example") == Proxy("http://p", "HTTPS_PROXY")
    with pytest.raises(StartError, match="HTTP_PROXY must begin with"):
        find_proxy("http://events.example")
