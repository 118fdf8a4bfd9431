"""Point the official Python SDK of FlexPrice at the server."""

from __future__ import annotations

import asyncio
from datetime import UTC, datetime

import pytest

from helpers import KEY, Live, table


@pytest.mark.slow
def test_the_official_sdk_writes_reads_and_pages(live: Live) -> None:
    from flexprice import Flexprice

    who = {"external_customer_id": "sdk_customer"}
    with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
        one = {"event_name": "call", "event_id": "sdk_1", "properties": {"tokens": "12"}, "source": "sdk", **who}
        assert sdk.events.ingest_event(**one) == {"message": "Event accepted for processing", "event_id": "sdk_1"}
        batch = [{"event_name": "batch", "event_id": f"sdk_{number}", **who} for number in range(1, 4)]
        assert sdk.events.ingest_events_bulk(events=batch) == {"message": "Events accepted for processing"}
        found = [sdk.events.list_raw_events(**who, page_size=1, order="asc")]
        while found[-1].has_more:
            key = found[-1].iter_last_key
            found.append(sdk.events.list_raw_events(**who, page_size=1, order="asc", iter_last_key=key))
        assert [[stored.id for stored in answer.events] for answer in found] == [["sdk_1"], ["sdk_2"], ["sdk_3"]]
        assert (found[0].total_count, found[0].offset, found[0].events[0].environment_id) == (3, 1, "development")
        tokens = sdk.events.list_raw_events(**who, property_filters={"tokens": ["12", "13"]})
        assert [(stored.id, stored.properties, stored.source) for stored in tokens.events] == [
            ("sdk_1", {"tokens": "12"}, "sdk")
        ]


def test_the_official_async_sdk_writes_and_reads(live: Live) -> None:
    from flexprice import Flexprice

    async def round_trip() -> list[str]:
        who = {"external_customer_id": "async_customer"}
        async with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
            await sdk.events.ingest_event_async(event_name="call", event_id="async_1", **who)
            await sdk.events.ingest_events_bulk_async(events=[{"event_name": "call", "event_id": "async_2", **who}])
            answer = await sdk.events.list_raw_events_async(**who, order="asc")
            return [stored.id for stored in answer.events]

    assert asyncio.run(round_trip()) == ["async_1", "async_2"]


@table(("key", "status", "message"), [(KEY, 400, "timestamp must be RFC 3339"), ("wrong", 401, "x-api-key")])
def test_the_official_sdk_raises_an_error_with_the_servers_message(
    live: Live, key: str, status: int, message: str
) -> None:
    from flexprice import Flexprice
    from flexprice.models.errors import FlexpriceError

    with Flexprice(server_url=f"{live.url}/v1", api_key_auth=key) as sdk:
        with pytest.raises(FlexpriceError, match=message) as refusal:
            sdk.events.ingest_event(event_name="call", external_customer_id="cust", timestamp="yesterday")
        assert refusal.value.status_code == status


def test_the_official_sdk_looks_up_an_event_and_computes_usage(live: Live) -> None:
    from flexprice import Flexprice

    who = {"event_name": "sdk_usage", "external_customer_id": "sdk_usage_customer"}
    with Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
        for number, (value, hour) in enumerate([("1.5", "03"), ("2", "05"), ("x", "06")]):
            sdk.events.ingest_event(**who, event_id=f"sdk/usage?{number}", properties={"n": value},
                                    timestamp=f"2026-03-08T{hour}:30:00Z")  # fmt: skip
        answer = sdk.events.get_event(id="sdk/usage?0", external_customer_id=who["external_customer_id"])
        assert (answer.event.id, answer.event.properties, answer.status) == ("sdk/usage?0", {"n": "1.5"}, "processed")
        query = who | {"property_name": "n", "start_time": datetime(2026, 3, 1, tzinfo=UTC),
                       "end_time": datetime(2026, 3, 9, tzinfo=UTC), "timezone": "America/New_York"}  # fmt: skip
        whole = sdk.events.get_usage_statistics(aggregation_type="SUM", **query)
        assert (whole.value, whole.type, whole.event_name, whole.results) == (3.5, "SUM", "sdk_usage", [])
        daily = sdk.events.get_usage_statistics(aggregation_type="SUM", window_size="DAY", **query)
        days = [datetime(2026, 3, day, 5, tzinfo=UTC) for day in (7, 8)]
        assert [(datetime.fromisoformat(row.window_size), row.value) for row in daily.results] == [
            (days[0], 1.5),
            (days[1], 2),
        ]
