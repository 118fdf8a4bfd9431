"""`serve --metrics`: names, numbers, bounded labels, and the second listener."""

from __future__ import annotations

import errno
import re
import socket
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from eventstore import StartError
from eventstore_extras import metrics
from helpers import KEY, SCRIPT, Live, at, event, eventually, free_port, refusal, refused, run, service_of, store, table

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def metered(folder: Path, *flags: str, **environ: str) -> tuple[Live, int]:
    port = free_port()
    return Live(folder, "--metrics", f"127.0.0.1:{port}", "--api-key", f"{KEY}=production", *flags, **environ), port


def scraped(port: int) -> tuple[str, Samples]:
    answer = httpx.get(f"http://127.0.0.1:{port}/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    families = text_string_to_metric_families(answer.text)
    samples = {
        (each.name, tuple(sorted(each.labels.items()))): each.value for family in families for each in family.samples
    }
    return answer.text, samples


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[name, tuple(sorted(labels.items()))]


def test_requests_and_events_are_counted_by_route_and_environment(tmp_path: Path) -> None:
    live, port = metered(tmp_path)
    with live, live.client() as client:
        store(client, event("a"), event("b"))
        store(client, event("b"), event("c"))
        refused(client.post("/v1/events", json={}))
        refused(client.post("/v1/events/bulk", json={"events": [event("d"), event("e"), {}]}))
        refused(client.post("/v1/events/bulk", content=b"{"))
        client.get("/v1/events/a")
        client.get("/v1/events/b")
        httpx.get(f"{live.url}/v1/anything")
        _, samples = scraped(port)
    requests = "eventstore_http_request_duration_seconds_count"
    assert value(samples, requests, route="/v1/events/bulk", method="POST", status="202") == 2
    assert value(samples, requests, route="/v1/events", method="POST", status="400") == 1
    assert value(samples, requests, route="/v1/events/{id}", method="GET", status="200") == 2
    assert value(samples, requests, route="unmatched", method="GET", status="401") == 1
    for what, number in (("accepted", 3), ("duplicate", 1), ("refused", 1 + 3 + 1)):
        assert value(samples, f"eventstore_events_{what}_total", environment="production") == number
    assert value(samples, "eventstore_commit_events_sum") == 4
    assert value(samples, "eventstore_commit_failures_total") == 0
    assert value(samples, "eventstore_database_bytes") > 0
    assert value(samples, "eventstore_disk_free_bytes") > 0


def test_a_failed_commit_is_counted_and_its_events_are_refused(tmp_path: Path) -> None:
    live, port = metered(tmp_path)
    with live, live.client() as client:
        (tmp_path / "events.db").rename(tmp_path / "moved.db")
        body = {"events": [event("a"), event("b")]}
        refused(client.post("/v1/events/bulk", json=body), 500, "database_error")
        _, samples = scraped(port)
        assert value(samples, "eventstore_commit_failures_total") == 1
        assert value(samples, "eventstore_events_refused_total", environment="production") == 2
        (tmp_path / "moved.db").rename(tmp_path / "events.db")
        assert store(client, event("a")).status_code == 202
        _, samples = scraped(port)
        assert value(samples, "eventstore_commit_failures_total") == 1


@pytest.fixture(scope="module")
def forwarding(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Live, int]]:
    """A server that forwards to nobody and has a retention, and the port of its metrics."""
    live, port = metered(tmp_path_factory.mktemp("forwarding"), "--retain-days", "1", "--forward-to",
                         "http://127.0.0.1:1", "--forward-interval-ms", "10", EVENTSTORE_FORWARD_API_KEY="k")  # fmt: skip
    with live:
        yield live, port


@pytest.mark.slow
def test_names_follow_the_rules_of_prometheus(forwarding: tuple[Live, int]) -> None:
    """The rules that `promtool check metrics` applies: help, units, and _total for counters only."""
    live, port = forwarding
    with live.client() as client:
        store(client, event("a"))
        text, _ = scraped(port)
        families = list(text_string_to_metric_families(text))
    assert {"eventstore_forward_waiting_events", "eventstore_retention_deleted_events"} <= {
        each.name for each in families
    }
    for family in families:
        assert re.fullmatch(r"(eventstore|process)_[a-z_]+[a-z]", family.name)
        assert family.documentation.endswith(".")
        assert not re.search(r"_(total|count|sum|bucket|info_total|ms|kb|minutes)$", family.name)
        for sample in family.samples:
            assert sample.name.endswith("_total") is (family.type == "counter")
            if family.type == "histogram":
                assert re.fullmatch(rf"{family.name}_(bucket|count|sum)", sample.name)


def test_no_value_from_a_caller_becomes_a_label(tmp_path: Path) -> None:
    live, port = metered(tmp_path)
    with live, live.client() as client:
        for number in range(20):
            store(client, event(f"{number}", event_name=f"name {number}", external_customer_id=f"customer {number}"))
            client.get(f"/v1/events/{number}")
            client.get(f"/v1/nowhere/{number}")
            client.request(f"M{number}", "/v1/events")
        text, samples = scraped(port)
    assert "customer" not in text
    series = {labels for name, labels in samples if name == "eventstore_http_request_duration_seconds_count"}
    assert len(series) < 12


@pytest.mark.slow
def test_an_outbox_and_retention_have_metrics(forwarding: tuple[Live, int]) -> None:
    live, port = forwarding
    with live.client() as client:
        store(client, event("a", timestamp=at(-3)), event("b"))

        def is_measured() -> bool:
            _, samples = scraped(port)
            waiting = value(samples, "eventstore_forward_waiting_events", environment="production")
            return waiting == 2 and value(samples, "eventstore_retention_last_sweep_timestamp_seconds") > 0

        eventually(is_measured)
        _, samples = scraped(port)
        assert value(samples, "eventstore_forward_sent_events_total", environment="production") == 0
        assert value(samples, "eventstore_forward_oldest_age_seconds", environment="production") > 0
        assert value(samples, "eventstore_retention_deleted_events_total") == 0


@table(("flag", "message"), [
    ("9100", "--metrics must be ADDRESS:PORT, such as 127.0.0.1:9100, with a port of 0 to 65535, got \"9100\""),
    ("127.0.0.1:x", "--metrics must be ADDRESS:PORT"),
    ("127.0.0.1:99999", "--metrics must be ADDRESS:PORT"),
    ("192.0.2.1:9100", "cannot listen on --metrics 192.0.2.1:9100"),
])  # fmt: skip
def test_an_address_that_cannot_be_used_is_refused_at_the_start(tmp_path: Path, flag: str, message: str) -> None:
    done = refusal(tmp_path, "serve", "--port", "0", "--metrics", flag)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert message in done.stderr


@table(("flag", "reason"), [
    ("127.0.0.1:{taken}", "it is taken; choose another with --metrics (0 takes a free one)"),
    ("192.0.2.1:9100", "this machine does not have that address; choose another with --metrics"),
    ("no host:9100", "the name cannot be resolved; --metrics takes a name or an address"),
    ("a..b:9100", "the name cannot be resolved; --metrics takes"),
    ("http://127.0.0.1:9100", "the name cannot be resolved; --metrics takes"),
])  # fmt: skip
def test_a_second_listener_that_cannot_listen_names_flag_address_and_reason(
    client: httpx.Client, flag: str, reason: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        flag = flag.format(taken=taken.getsockname()[1])
        with pytest.raises(StartError) as raised:
            metrics.attach(service_of(client), Namespace(metrics=flag), None)
    assert str(raised.value).startswith(f"cannot listen on --metrics {flag}: {reason}")
    assert service_of(client).notices == []


def test_a_second_listener_on_a_privileged_port_says_that_it_needs_rights(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    refuse = Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    monkeypatch.setattr("prometheus_client.start_http_server", refuse)
    with pytest.raises(StartError, match=r"--metrics 127.0.0.1:80: ports below 1024 need more rights; choose another"):
        metrics.attach(service_of(client), Namespace(metrics="127.0.0.1:80"), None)


def test_the_banner_shows_an_ipv6_address_of_metrics_in_brackets(
    client: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("prometheus_client.start_http_server", Mock(return_value=(Mock(server_port=9100), None)))
    metrics.attach(service_of(client), Namespace(metrics="[::1]:9100"), None)
    assert service_of(client).notices == ["metrics      http://[::1]:9100/metrics"]


@pytest.mark.slow
def test_without_prometheus_client_the_flag_says_what_to_install(tmp_path: Path) -> None:
    (tmp_path / "prometheus_client.py").write_text("raise ImportError")
    done = run(*SCRIPT, "serve", "--port", "0", "--metrics", "127.0.0.1:0", cwd=tmp_path,
               env={"PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 2
    assert "-m pip install prometheus_client (or '.[metrics]' in the clone)" in done.stderr
