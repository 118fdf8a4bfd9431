"""What the tests of meters, features, usage of a meter and analytics share.

FEW are events whose usage is worked out by hand.
"""

from __future__ import annotations

from typing import Any

import httpx

from helpers import STAGING_KEY, at, event

NOW_TEXT = "2025-10-15T11:38:47.962Z"
ULID = "[0-9A-HJKMNP-TV-Z]{26}"
SECOND_US = 1_000_000
BAD_RATES: list[Any] = [0, "0", -1, "-0.5", "x", "", True, [], "1e999", "NaN"]
ABSENT = object()


def found(client: httpx.Client, path: str) -> dict[str, Any]:
    response = client.get(f"/v1/{path}")
    assert response.status_code == 200, response.text
    return dict(response.json())


def names(rows: list[dict[str, Any]]) -> str:
    return "".join(row["name"] for row in rows)


def sent(event_id: object, seconds: float, n: object = ABSENT, **fields: Any) -> dict[str, Any]:
    """Make an event from so many seconds before now, with n and other properties."""
    columns = {name: fields.pop(name) for name in ("source", "external_customer_id", "event_name") if name in fields}
    properties = fields if n is ABSENT else fields | {"n": n}
    return event(f"{event_id}", timestamp=at(round(-seconds * SECOND_US)), properties=properties, **columns)


# RANGE is the 100 seconds before now. The first of these events lies before it, and the last one at its end, so neither
# of them is in the range.
FEW = [
    sent(0, 200, 10, g="c"), sent(1, 75, 4, g="a"), sent(2, 50, "6.5", g="b"), sent(3, 25, g="b"), sent(5, 25, -2, g="a"),
    sent(4, 25, "x"), sent(9, 0, 99),
]  # fmt: skip
RANGE = {"start_time": at(-100 * SECOND_US), "end_time": at()}


def kind_with_multiplier(kind: str) -> dict[str, Any]:
    return {"multiplier": "2"} if kind == "SUM_WITH_MULTIPLIER" else {}


def make_meter_of_staging(client: httpx.Client) -> str:
    body = {"name": "s", "event_name": "call", "aggregation": {"type": "COUNT"}, "reset_usage": "NEVER"}
    answer = client.post("/v1/meters", json=body, headers={"x-api-key": STAGING_KEY})
    return str(answer.json()["id"])


LIFETIME = {  # aggregation -> its value in RANGE, and with reset_usage NEVER
    "COUNT": (5, 6),
    "SUM": (8.5, 18.5),
    "AVG": (1.7, 18.5 / 6),
    "MAX": (6.5, 10),
    "COUNT_UNIQUE": (4, 5),
    "LATEST": (0, 0),
    "SUM_WITH_MULTIPLIER": (17, 37),
    "WEIGHTED_SUM": (4 * 0.75 + 6.5 * 0.5 - 2 * 0.25, 10 + 4 * 0.75 + 6.5 * 0.5 - 2 * 0.25),
}
BUCKETED = {  # -> the aggregation, the buckets of 11:37 and 11:38, the value, and the value with NEVER
    "MAX": ({"kind": "MAX"}, [6.5, 0], 6.5, 16.5),
    "MAX of groups": ({"kind": "MAX", "group_by": "g"}, [10.5, 0], 8.5, 18.5),  # a has -2 in 11:38
    "SUM": ({"kind": "SUM"}, [10.5, 0], 8.5, 18.5),
}
