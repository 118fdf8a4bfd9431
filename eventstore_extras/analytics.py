"""POST /v1/events/analytics: usage by meter, group and window (API: Analytics).

From top to bottom: the answer's wire types, the answer from what the scans found, the handler.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from decimal import Decimal
from functools import partial

import msgspec
from msgspec import Struct
from msgspec.structs import asdict
from starlette.requests import Request
from starlette.responses import Response

from eventstore import ENCODER, READER_THREADS, JsonResponse, Operation, Service, T, check_time, read_fields
from eventstore_extras.analytics_scans import (
    AGGREGATES,
    ANALYTICS_SCHEMAS,
    DIMENSIONS,
    ITEMS_LIMIT,
    MAX_ITEMS,
    AnalyticsIn,
    Cell,
    Group,
    Query,
    Scan,
    checked_query,
    checked_scans,
    point_size,
    refuse_size,
    run_scan,
)
from eventstore_extras.features import OPERATIONS as FEATURE_OPERATIONS
from eventstore_extras.features import Feature, NamedMeter, ReportingUnit, named_meters
from eventstore_extras.meters import OPERATIONS as METER_OPERATIONS
from eventstore_extras.meters import Meter
from eventstore_extras.resources import decimal_text, plain_decimal, time_text
from eventstore_extras.usage import read_all, shares_of

__all__ = ["OPERATIONS", "Analytics", "AnalyticsIn", "AnalyticsItem", "AnalyticsPoint"]

# ---------------------------------------------------------------------------------------------- Wire types


class AnalyticsPoint(Struct):
    timestamp: str  # the window's start
    usage: str
    event_count: int
    subtotal: str = "0"
    discount: str = "0"
    cost: str = "0"
    computed_commitment_utilized_amount: str = "0"
    computed_overage_amount: str = "0"
    computed_true_up_amount: str = "0"
    buckets: None = None


class ExpandedMeter(Meter, kw_only=True):
    environment_id: str
    created_by: str = ""
    updated_by: str = ""


class ExpandedFeature(Feature, kw_only=True):
    """A feature inside an item, without its meter: the item itself holds that."""

    meter: Meter | msgspec.UnsetType | None = msgspec.UNSET  # type: ignore[assignment]


class AnalyticsItem(Struct, kw_only=True):
    """The usage of one meter, or of one group of its events."""

    feature_id: str
    name: str
    meter_id: str
    event_name: str
    aggregation_type: str
    total_usage: str
    total_usage_display: str
    reporting_unit: ReportingUnit | None
    unit: str | None
    unit_plural: str | None
    event_count: int
    external_customer_id: str | None
    source: str | None
    sources: list[str] | None
    properties: dict[str, str] | None
    window_size: str | None
    points: list[AnalyticsPoint]
    subtotal: str = "0"
    total_discount: str = "0"
    total_cost: str = "0"
    currency: None = None
    price_id: None = None
    price: None = None
    sub_line_item_id: None = None
    subscription_id: None = None
    subscription_line_item: None = None
    plan_id: None = None
    plan: None = None
    add_on_id: None = None
    addon: None = None
    commitment_info: None = None
    group: None = None
    bucket_summaries: None = None
    meter: ExpandedMeter | None
    feature: ExpandedFeature | None


class Analytics(Struct):
    """Usage by meter and group (API: Analytics)."""

    subtotal: str
    total_discount: str
    total_cost: str
    currency: str
    custom_analytics: None
    items: list[AnalyticsItem]


_ANALYTICS = msgspec.json.Decoder(AnalyticsIn)

# ---------------------------------------------------------------------------------------------- Answer


class _Tally(Struct):
    """What the scans found for one meter and group."""

    event_count: int = 0
    value: float | None = None
    points: dict[int, tuple[int, float]] = {}  # start of the window -> number of its events, their aggregate
    sources: set[str] = set()


def _merged(merge: Callable[[float, float], float] | None, earlier: float | None, later: float) -> float:
    return later if merge is None or earlier is None else merge(earlier, later)


class _Tallies:
    """Everything that the scans found. Raises ApiError if it is too much for one answer."""

    def __init__(self, query: Query) -> None:
        self._query = query
        self._points = 0
        self.found: dict[tuple[str, Group], _Tally] = {}  # by meter id and group

    def add(self, scan: Scan, cells: Iterable[Cell]) -> None:
        check_time()
        for cell in cells:
            self._add(scan, cell)
            if max(len(self.found), self._points) > MAX_ITEMS:
                refuse_size(self._query, ITEMS_LIMIT)

    def _add(self, scan: Scan, cell: Cell) -> None:
        named, event_count, value = scan.meters[cell.number], cell.event_count, cell.value
        group = cell.group[:-1] if scan.finds_sources else cell.group
        tally = self.found.setdefault((named.meter.id, group), _Tally())
        merge = scan.aggregate(named).merge
        if scan.finds_sources and cell.group[-1] is not None:
            tally.sources.add(cell.group[-1])
        if scan.finds_totals:
            tally.event_count += event_count
            tally.value = _merged(operator.add if scan.is_bucketed else merge, tally.value, value)
        if scan.finds_points:
            earlier_count, earlier = tally.points.get(cell.window_us, (0, None))
            self._points += earlier is None
            point = cell.largest_bucket if scan.is_bucketed else value
            tally.points[cell.window_us] = earlier_count + event_count, _merged(merge, earlier, point)


def _usage_text(named: NamedMeter, event_count: int, value: float) -> str:
    usage = AGGREGATES[named.aggregation.type].finish(value, event_count, named.aggregation)
    number = min(float(usage), sys.float_info.max)  # infinity cannot be written in digits
    return plain_decimal(Decimal(repr(number))) if named.aggregation.type == "AVG" else decimal_text(number)


def _expanded(kind: type[T], struct: Struct | None, **more: object) -> T | None:
    return None if struct is None else kind(**asdict(struct) | more)


def _properties(group: Mapping[str, str | None]) -> dict[str, str] | None:
    """Return the group's properties, except those its events lack; None if the request groups by no property."""
    values = {name.removeprefix("properties."): value for name, value in group.items() if name not in DIMENSIONS}
    return {name: value for name, value in values.items() if value is not None} if values else None


def _item(query: Query, named: NamedMeter, group: Mapping[str, str | None], tally: _Tally) -> AnalyticsItem:
    check_time()
    meter, feature = named.meter, named.feature
    total = _usage_text(named, tally.event_count, tally.value or 0.0)
    unit = feature.reporting_unit if feature else None
    environment = query.events.view.environment
    return AnalyticsItem(
        feature_id=feature.id if feature else "", name=named.name, meter_id=meter.id, event_name=meter.event_name,
        aggregation_type=named.aggregation.type, total_usage=total,
        total_usage_display=unit.converted(total) if unit else "", reporting_unit=unit,
        unit=feature.unit_singular or None if feature else None,
        unit_plural=feature.unit_plural or None if feature else None,
        event_count=tally.event_count, external_customer_id=group.get("external_customer_id"),
        source=group.get("source"), sources=sorted(tally.sources) if query.lists_sources else None,
        properties=_properties(group), window_size=point_size(query, named),
        points=[AnalyticsPoint(time_text(start_us), _usage_text(named, event_count, value), event_count)
                for start_us, (event_count, value) in sorted(tally.points.items())],
        meter=_expanded(ExpandedMeter, meter, environment_id=environment) if "meter" in query.expand else None,
        feature=_expanded(ExpandedFeature, feature, meter=msgspec.UNSET) if "feature" in query.expand else None,
    )  # fmt: skip


def _answer(query: Query, meters: Sequence[NamedMeter], found: Iterable[tuple[Scan, Sequence[Cell]]]) -> bytes:
    tallies = _Tallies(query)
    for scan, cells in found:
        tallies.add(scan, cells)
    by_id = {named.meter.id: named for named in meters}
    items = [
        _item(query, by_id[meter_id], dict(zip(query.dimensions, group, strict=True)), tally)
        for (meter_id, group), tally in tallies.found.items()
    ]
    items.sort(key=lambda item: (item.name, item.meter_id, item.source or "", sorted((item.properties or {}).items()),
                                 item.external_customer_id or ""))  # fmt: skip
    return ENCODER.encode(Analytics("0", "0", "0", "", None, items))


async def compute_analytics(service: Service, request: Request) -> Response:
    """POST /v1/events/analytics: usage by meter, group and window (API: Analytics)."""
    faults = service.faults(request)
    query = checked_query(await read_fields(service, request, _ANALYTICS, faults), service.view(request), faults)
    read = partial(service.store.read, quick=False)
    find = partial(named_meters, environment=query.events.view.environment, feature_ids=query.feature_ids)
    meters = await read(find)
    scans = await read(lambda _: checked_scans(query, meters))
    shares = [scan._replace(spans=spans) for scan in scans for spans in shares_of(scan.spans)]
    cells: list[list[Cell]] = []
    selects = [partial(run_scan, query=query, scan=share, found=cells) for share in shares]
    found = await read_all(service, selects, READER_THREADS - 1)  # leave one thread for the key's other requests
    return JsonResponse(await read(lambda _: _answer(query, meters, zip(shares, found, strict=True))))


# Pass these to create_app(settings, operations=OPERATIONS) to serve meters, features and analytics.
OPERATIONS = (
    *METER_OPERATIONS,
    *FEATURE_OPERATIONS,
    Operation("POST", "/v1/events/analytics", compute_analytics, Analytics, AnalyticsIn, role="event_reader",
              schemas=ANALYTICS_SCHEMAS,
              example={"external_customer_id": "cust_42", "group_by": ["properties.model"], "window_size": "DAY"}),
)  # fmt: skip
