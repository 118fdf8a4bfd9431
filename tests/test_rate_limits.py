"""Test `serve --rate-limit` (SPEC 9)."""

from __future__ import annotations

from pathlib import Path
from unittest.mock import Mock

import httpx
import pytest

import eventstore
from helpers import NOW, STAGING_KEY, event, refused, serving, table, total


def limits(response: httpx.Response) -> list[int]:
    return [int(response.headers[f"X-RateLimit-{name}"]) for name in ("Limit", "Remaining", "Reset")]


@pytest.mark.slow
def test_requests_are_unlimited_without_the_flag(client: httpx.Client) -> None:
    for response in [client.post("/v1/events", json={}) for _ in range(1001)]:
        assert response.status_code == 400
        assert "x-ratelimit" not in str(response.headers)


@table(("flag", "path", "limit"), [pytest.param("documented", "/v1/events", 1000, marks=pytest.mark.slow), ("documented", "/v1/events/bulk", 100),
                                   ("3,2", "/v1/events", 3), ("3,2", "/v1/events/bulk", 2)])  # fmt: skip
def test_a_key_over_its_limit_gets_429_until_the_next_minute(tmp_path: Path, flag: str, path: str, limit: int) -> None:
    clock, reset = Mock(return_value=NOW), NOW // 60_000_000 * 60 + 60
    rate_limits = eventstore.parse_arguments(["serve", "--rate-limit", flag]).rate_limits
    good, other = {"events": [event()], **event()}, {"/v1/events": "/v1/events/bulk"}.get(path, "/v1/events")
    with serving(tmp_path, clock=clock, rate_limits=rate_limits) as client:
        for left in reversed(range(limit)):
            response = client.post(path, json={} if left else good)  # refused requests count as well
            assert (response.status_code, limits(response)) == (400 if left else 202, [limit, left, reset])
        stored = total(client)
        for step_us, retry_after in ((0, 13), (12_000_000, 1), (37_999, 1)):
            clock.return_value += step_us
            response = client.post(path, json=good)
            refused(response, 429, "too_many_requests", str(limit))
            assert (limits(response), int(response.headers["Retry-After"])) == ([limit, 0, reset], retry_after)
        assert total(client) == stored == 1
        for unlimited in ("/v1/events", "/v1/events/lookup?id=a", "/v1/events/monitoring", "/health"):
            response = client.get(unlimited)
            assert response.status_code in (200, 404)
            assert "x-ratelimit" not in str(response.headers)
        assert client.post(other, json=good).status_code == 202
        response = client.post(path, json=good, headers={"x-api-key": STAGING_KEY})
        assert (response.status_code, limits(response)) == (202, [limit, limit - 1, reset])
        refused(client.post(path, json=good, headers={"x-api-key": "unknown"}), 401, "unauthorized")
        clock.return_value += 1
        response = client.post(path, json=good)
        assert (response.status_code, limits(response)) == (202, [limit, limit - 1, reset + 60])


@table("flag", ["", "5", "0,5", "5,0", "-1,5", "a,b", "1,2,3", "1.5,2", "Documented", ","])
def test_an_invalid_rate_limit_exits_with_2(capsys: pytest.CaptureFixture[str], flag: str) -> None:
    with pytest.raises(SystemExit) as stopped:
        eventstore.main(["serve", "--rate-limit", flag])
    assert stopped.value.code == 2
    assert "--rate-limit" in capsys.readouterr().err
