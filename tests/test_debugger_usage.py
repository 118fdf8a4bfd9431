"""Test the usage view of the debugger's page in a browser."""

from __future__ import annotations

import os
import re
import shutil
import sys
import sysconfig
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from browser import Debugger, ago, heights, needs_browser
from forked import ROOT
from helpers import Live, event, eventually, store, table

# ---------------------------------------------------------------------------------------------- usage


def usage_of_models(debugger: Debugger, **parameters: str) -> None:
    for number in range(3):
        properties = {"model": "large", "tokens": ["1", 2, "many"][number], "job": {"cost": 5}}
        store(debugger.client, event(f"e{number}", timestamp=ago(9), properties=properties))
    debugger.visit(view="usage", **parameters)


@needs_browser
def test_usage_is_shown_as_a_total_a_table_and_a_chart(debugger: Debugger) -> None:
    hour = datetime.now(UTC).replace(minute=30, second=0, microsecond=0)  # an hour begins in Kabul
    for event_id, before, tokens in (("a", 3, 1000), ("b", 3, "0.5"), ("c", 2, 250)):
        timestamp = (hour - timedelta(hours=before)).isoformat()
        store(debugger.client, event(event_id, timestamp=timestamp, properties={"tokens": tokens}))
    debugger.shows("c", "b", "a")
    debugger.click("#show-usage")
    debugger.fill("#event_name", "call")
    debugger.opens("#usage-says", "COUNT of events.")
    debugger.fill("#property_name", "tokens")
    debugger.find("#aggregation_type").send_keys("SUM")
    debugger.ask("document.activeElement.blur()")
    debugger.opens("#usage-says", "SUM of tokens")
    assert debugger.text("#sum") == "1,250.5"
    starts = [(hour + timedelta(hours=4.5 - before)).strftime("%Y-%m-%d %H:00") for before in (3, 2)]
    assert debugger.texts("#windows td") == [starts[0], "1,000.5", starts[1], "250"]
    assert heights(debugger) == [93, pytest.approx(93 * 250 / 1000.5)]
    debugger.open(debugger.driver.current_url)
    debugger.opens("#sum", "1,250.5")


@needs_browser
def test_usage_opens_with_a_question_and_suggestions(debugger: Debugger) -> None:
    usage_of_models(debugger)
    debugger.opens("#ask h2", "Which events")
    assert debugger.texts("#ask button") == ["call", "cust", "model", "tokens", "job"]
    assert debugger.texts(".fault") == [""] * len(debugger.texts(".fault"))
    debugger.click("#ask button")
    debugger.opens("#usage-says", "COUNT of events")
    assert (debugger.text("#sum"), debugger.address()["event_name"]) == ("3", ["call"])
    assert not debugger.find("#ask").is_displayed()
    assert debugger.ask("[...document.getElementById('event_name').list.options].map((option) => option.value)") == [
        "call"
    ]


@needs_browser
def test_a_sum_is_updated_as_events_arrive_unless_paused(debugger: Debugger) -> None:
    def arrives(tokens: int, matches: str) -> None:
        store(debugger.client, event(timestamp=ago(9), properties={"tokens": tokens}))
        debugger.opens("#matches", matches)

    usage_of_models(debugger, event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#sum", "3")
    arrives(10, "4 events match")
    eventually(lambda: debugger.text("#sum") == "13")
    # Without this line, a request under way could count the next event.
    eventually(lambda: debugger.ask("state.summed === state.total"))
    debugger.click("#pause")
    assert debugger.text("#pulse") == "Paused"
    arrives(100, "5 events match")
    arrives(1000, "6 events match")
    assert debugger.text("#sum") == "13"
    debugger.click("#pause")
    eventually(lambda: debugger.text("#sum") == "1,113")


@needs_browser
def test_a_sum_without_a_property_asks_for_one(debugger: Debugger) -> None:
    usage_of_models(debugger, event_name="call", aggregation_type="SUM")
    debugger.opens("#ask h2", "SUM of which property?")
    debugger.click("#ask div:last-child button:nth-of-type(2)")
    debugger.opens("#usage-says", "SUM of tokens. A number in tokens: 2 of 3 events.")
    assert debugger.text("#sum") == "3"


@needs_browser
@table(
    ("name", "says"),
    [
        ("model", "A number in model: 0 of 3 events."),
        ("missing", "A number in missing: 0 of 3 events."),
        ("job.cost", "0 of 3 events. Properties are looked up at the top level, and job is an object."),
        ("no.such", "A number in no.such: 0 of 3 events."),
    ],
)
def test_a_sum_says_that_no_event_has_a_number_in_the_property(debugger: Debugger, name: str, says: str) -> None:
    usage_of_models(debugger, event_name="call", aggregation_type="SUM", property_name=name)
    debugger.opens("#usage-says", says)
    assert not debugger.find("#usage table").is_displayed()


@needs_browser
def test_a_number_with_white_space_around_it_does_not_count_as_in_the_api(debugger: Debugger) -> None:
    numbers = ("1", " 2", "0x3", "4e0")
    store(debugger.client, *(event(timestamp=ago(9), properties={"tokens": number}) for number in numbers))
    debugger.visit(view="usage", event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#usage-says", "A number in tokens: 2 of 4 events.")
    assert debugger.text("#sum") == "5"


@needs_browser
def test_windows_are_named_in_words(debugger: Debugger) -> None:
    sizes = debugger.texts("#window_size option")
    assert sizes[:5] == ["the whole range", "1 minute", "15 minutes", "30 minutes", "1 hour"]
    assert sizes[-3:] == ["1 day", "1 week", "1 month"]


@needs_browser
def test_usage_refuses_a_malformed_property_filter(debugger: Debugger) -> None:
    usage_of_models(debugger, event_name="call", property_filters="abc")
    debugger.opens("#property_filters-fault", "must look like key1:v1,v2;key2:v3")
    assert debugger.text("#sum") == ""


# ---------------------------------------------------------------------------------------------- meters


def make_meter(debugger: Debugger, kind: str = "SUM", field: str | None = "tokens", **fields: Any) -> str:
    body = {"name": "Tokens", "event_name": "call", "aggregation": {"type": kind, "field": field}}
    response = debugger.client.post("/v1/meters", json=body | {"reset_usage": "BILLING_PERIOD"} | fields)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def store_tokens(debugger: Debugger, *tokens: object, hours: float = 2, **fields: Any) -> None:
    """Store an event for each number of tokens, all at about the same time, so many hours ago."""
    for number in tokens:
        properties = fields.get("properties", {}) | {"tokens": number}
        store(debugger.client, event(timestamp=ago(3600 * hours), **fields | {"properties": properties}))


def asked(debugger: Debugger, path: str) -> int:
    """Return how often the page has requested the path since it was opened."""
    names = "performance.getEntriesByType('resource').map((one) => new URL(one.name).pathname)"
    return list(debugger.ask(names)).count(path)


@needs_browser
def test_meters_are_offered_before_event_names_and_the_chosen_one_says_what_it_counts(debugger: Debugger) -> None:
    store_tokens(debugger, 1, 2, properties={"model": "large"})
    store_tokens(debugger, 4, properties={"model": "small"})
    large = make_meter(debugger, name="Large", filters=[{"key": "model", "values": ["large", "huge"]}])
    make_meter(debugger)
    debugger.visit(view="usage")
    debugger.opens("#ask h2", "Which events")
    assert debugger.texts("#ask .actions:first-of-type button") == ["Large", "Tokens"]
    assert debugger.texts("#meter_id option") == ["none", "Large", "Tokens"]
    debugger.click("#ask button")
    debugger.opens("#usage-says", "SUM of tokens in call, model large or huge. A number in tokens: 2 of 2 events.")
    assert debugger.text("#sum") == "3"
    assert debugger.address() == {"view": ["usage"], "meter_id": [large], "event_name": ["call"]}
    for field, shown in (("event_name", False), ("aggregation_type", False), ("group_by", True), ("window_size", True)):
        assert debugger.find(f"#{field}").is_displayed() is shown
    debugger.click("#clear")
    debugger.opens("#ask h2", "Which events")
    debugger.visit(view="usage", meter_id=large)  # without event_name, as a user may write the link
    debugger.opens("#sum", "3")
    debugger.visit(view="usage", meter_id="meter_unknown")
    debugger.opens("#notice", "This environment has no such meter.")


@needs_browser
@table(("group_by", "heads", "totals"), [
    ("source", ["app", "no source"], ["0.75", "0.1"]),
    ("model", ["large", "no model"], ["0.6", "0.25"]),
    ("properties.model", ["large", "no model"], ["0.6", "0.25"]),
    ("external_customer_id", ["cust", "other"], ["0.75", "0.1"]),
], ids=str)  # fmt: skip
def test_a_meter_can_be_grouped_by_source_customer_or_property(
    debugger: Debugger, group_by: str, heads: list[Any], totals: list[Any]
) -> None:
    store_tokens(debugger, "0.5", source="app", properties={"model": "large"})
    store_tokens(debugger, "0.25", source="app")
    store_tokens(debugger, "0.1", external_customer_id="other", properties={"model": "large"})
    debugger.visit(view="usage", meter_id=make_meter(debugger), group_by=group_by, window_size="DAY")
    debugger.opens("#sum", "0.85")
    texts = [f"{head}{head}" for head in heads]  # once as text, once as the title of its colour
    assert debugger.texts("#groups th")[1:] == texts
    rows = debugger.ask("[...document.querySelectorAll('#windows tr')].map((row) => row.innerText.split('\\t'))")
    assert rows[0] == ["whole range", *totals]
    assert len(rows) == 2
    assert rows[1][1:] == totals
    assert debugger.ask("document.getElementById('group_by').list.options.length") == 3  # source, tokens, model


@needs_browser
def test_analytics_is_requested_for_the_feature_of_the_chosen_meter_only(debugger: Debugger) -> None:
    store_tokens(debugger, 1, source="app")
    alone = make_meter(debugger, name="Alone")
    feature = {"name": "Tokens", "type": "metered", "meter_id": make_meter(debugger)}
    feature_id = debugger.client.post("/v1/features", json=feature).json()["id"]
    debugger.visit(view="usage")
    debugger.opens("#ask h2", "Which events")
    debugger.ask("(window.bodies = [], window.sent = request, request = (path, body, signal) => "
                 "(path.endsWith('analytics') && bodies.push(JSON.parse(body)), sent(path, body, signal)))")  # fmt: skip
    for meter_id, feature_ids in ((feature["meter_id"], [feature_id]), (alone, [])):
        debugger.ask("(bodies.length = 0, change({ meter_id: arguments[0], group_by: 'source' }))", meter_id)
        debugger.opens("#groups", "app")
        eventually(lambda: debugger.ask("bodies.length") == 2)
        assert debugger.ask("bodies.map(({ feature_ids }) => feature_ids)") == [feature_ids] * 2
        eventually(lambda: debugger.text("#sum") == "1")


@needs_browser
def test_a_meters_events_are_counted_and_summed_once(debugger: Debugger) -> None:
    store_tokens(debugger, 1, 2)
    store_tokens(debugger, 4, event_name="other")
    debugger.visit(view="usage", meter_id=make_meter(debugger))
    debugger.opens("#sum", "3")
    eventually(lambda: debugger.text("#matches") == "2 events match")  # of another request than the sum
    before = asked(debugger, "/v1/events/monitoring")
    eventually(lambda: asked(debugger, "/v1/events/monitoring") > before)
    assert asked(debugger, "/v1/events/usage/meter") == 2  # in all, and by window


@needs_browser
@table(("kind", "stacked"), [("SUM", True), ("COUNT", True), ("MAX", False)])
def test_the_chart_stacks_additive_kinds_and_each_part_has_a_title(
    debugger: Debugger, kind: str, stacked: bool
) -> None:
    store_tokens(debugger, 3, source="a")
    store_tokens(debugger, 1, source="b")
    meter_id = make_meter(debugger, kind, None if kind == "COUNT" else "tokens")
    debugger.visit(view="usage", meter_id=meter_id, group_by="source", window_size="DAY")
    debugger.opens("#usage-says", f"{kind} of ")
    parts = debugger.ask("""[...document.querySelectorAll('#chart rect')].map((part) => ({
        title: part.textContent, ...Object.fromEntries(["x", "y", "width", "height"].map((name) => [name, Number(part.getAttribute(name))]))
    }))""")
    values = [1, 1] if kind == "COUNT" else [3, 1]
    assert [part["title"].split(" · ")[1] for part in parts] == [f"a: {values[0]}", f"b: {values[1]}"]
    assert (parts[0]["x"] == parts[1]["x"]) is stacked
    assert (parts[1]["y"] < parts[0]["y"]) is stacked
    if not stacked:
        assert parts[1]["x"] == pytest.approx(parts[0]["x"] + parts[0]["width"])
    assert [part["height"] / parts[0]["height"] for part in parts] == [1, pytest.approx(values[1] / values[0])]
    assert debugger.find("#chart").accessible_name == "The windows: the table has the numbers"


@needs_browser
@table(("kind", "others"), [("SUM", ["19.5", "19.5"]), ("AVG", ["", ""])])
def test_the_largest_groups_have_a_colour_each_and_the_others_share_one(
    debugger: Debugger, kind: str, others: list[Any]
) -> None:
    for number in range(1, 12):
        store_tokens(debugger, number + 4.5 if number < 4 else number * 10, source=f"s{number:02}")
    meter_id = make_meter(debugger, kind)
    debugger.visit(view="usage", meter_id=meter_id, group_by="source", window_size="DAY")
    debugger.opens("#groups", "3 others")
    names = debugger.texts("#groups th title")
    assert names == [f"s{number:02}" for number in range(11, 3, -1)] + ["3 others"]
    columns = "[...document.querySelectorAll('#windows td:last-child')].map((cell) => cell.textContent)"
    assert debugger.ask(columns) == [others[0], *others[1:]]
    fills = debugger.ask("[...document.querySelectorAll('#groups rect')].map((part) => part.getAttribute('fill'))")
    assert len(set(fills)) == 9


@needs_browser
@table("scheme", ["light", "dark"])
def test_every_colour_of_the_chart_contrasts_with_the_background(debugger: Debugger, scheme: str) -> None:
    debugger.look(scheme=scheme)
    ratios = debugger.ask("""(() => {
      const canvas = new OffscreenCanvas(1, 1).getContext("2d", { willReadFrequently: true });
      const light = (color) => {
        canvas.fillStyle = color;
        canvas.fillRect(0, 0, 1, 1);
        return [...canvas.getImageData(0, 0, 1, 1).data].slice(0, 3).map((part) => part / 255)
          .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
          .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
      };
      const ground = light(getComputedStyle(document.querySelector("#usage")).backgroundColor);
      return Array.from({ length: 9 }, (_, index) => light(part(index, {}, "").getAttribute("fill")))
        .map((colour) => (Math.max(colour, ground) + 0.05) / (Math.min(colour, ground) + 0.05));
    })()""")
    assert len(ratios) == 9
    assert [ratio for ratio in ratios if ratio < 3] == []  # WCAG 1.4.11


@needs_browser
def test_an_empty_view_shows_what_to_send_first(debugger: Debugger) -> None:
    debugger.click("#show-usage")
    debugger.opens("#first", "No events yet")
    assert debugger.find("#first").is_displayed()
    meter_id = make_meter(debugger, event_name="image", filters=[{"key": "size", "values": ["xl", "l"]}])
    debugger.visit(view="usage", meter_id=meter_id)
    debugger.opens("#ask h2", "Nothing in this range: no tokens in image, size xl or l.")
    assert debugger.find("#next").is_displayed()
    debugger.driver.set_permissions("clipboard-write", "granted")
    debugger.click("#next button")
    debugger.opens("#next button", "Copied")
    line = debugger.pasted()
    assert line.replace(debugger.key, "\u2022" * 8) == debugger.text("#next pre")
    (body,) = re.findall(r"-d '(.*)'", line)
    assert debugger.client.post("/v1/events", content=body).status_code == 202
    debugger.opens("#sum", "1,250")
    assert not debugger.find("#next").is_displayed()


@needs_browser
@table(("name", "begun", "rest", "expected"), [
    ("event_name", "ca", "ll", "call"),
    ("property_filters", "model:", "large", "model:large"),
    ("start_time", "11112026", "\t093000AM", "2026-11-11T05:00:00.000Z"),
])  # fmt: skip
def test_text_that_a_user_is_typing_stays_when_a_meter_appears(
    debugger: Debugger, name: str, begun: str, rest: str, expected: str
) -> None:
    store_tokens(debugger, 1)
    debugger.visit(view="usage", range="own")
    debugger.opens("#ask h2", "Which events")
    debugger.find(f"#{name}").send_keys(begun)
    make_meter(debugger)
    eventually(lambda: debugger.find("#meter_id").is_displayed())
    debugger.press(rest)
    debugger.ask("document.activeElement.blur()")
    eventually(lambda: debugger.address().get(name) == [expected])


@needs_browser
def test_the_line_below_a_query_creates_a_meter_that_appears_at_once(debugger: Debugger) -> None:
    usage_of_models(
        debugger, event_name="call", aggregation_type="SUM_WITH_MULTIPLIER", property_name="tokens", multiplier="2"
    )
    debugger.opens("#sum", "6")
    assert not debugger.find("#meter_id").is_displayed()
    debugger.driver.set_permissions("clipboard-write", "granted")
    debugger.click("#next button")
    debugger.opens("#next button", "Copied")
    path, body = re.findall(r"curl '.*?(/v1/\w+)' .* -d '(.*)'", debugger.pasted())[0]
    assert debugger.client.post(path, content=body).status_code == 201
    eventually(lambda: debugger.find("#meter_id").is_displayed())
    debugger.find("#meter_id").send_keys("SUM_")
    debugger.ask("document.activeElement.blur()")
    debugger.opens("#usage-says", "SUM_WITH_MULTIPLIER of tokens in call.")
    assert debugger.text("#sum") == "6"


@needs_browser
def test_a_button_makes_the_question_a_meter_and_shows_it(debugger: Debugger) -> None:
    usage_of_models(
        debugger, event_name="call", aggregation_type="SUM", property_name="tokens", property_filters="model:large"
    )
    debugger.opens("#sum", "3")
    debugger.click("#next > .actions:last-child button")
    eventually(lambda: "meter_id" in debugger.address())
    debugger.opens("#usage-says", "SUM of tokens in call, model large.")
    (meter,) = debugger.client.get("/v1/meters").json()["items"]
    assert meter["filters"] == [{"key": "model", "values": ["large"]}]
    assert debugger.address()["meter_id"] == [meter["id"]]
    assert "property_filters" not in debugger.address()
    assert (debugger.text("#sum"), debugger.find("#next").is_displayed()) == ("3", False)


@needs_browser
def test_a_meter_that_cannot_be_made_says_why_and_the_button_can_be_used_again(debugger: Debugger) -> None:
    name = "n" * 300  # longer than an event name of a meter may be
    store(debugger.client, event(timestamp=ago(9), event_name=name))
    debugger.visit(view="usage", event_name=name)
    debugger.opens("#sum", "1")
    debugger.click("#next > .actions:last-child button")
    debugger.opens("#event_name-fault", "255")
    assert debugger.find("#next > .actions:last-child button").is_enabled()


@needs_browser
def test_the_unit_of_a_feature_stands_beside_its_usage(debugger: Debugger) -> None:
    store_tokens(debugger, 1)
    meter_id = make_meter(debugger)
    feature = {"name": "Tokens", "type": "metered", "meter_id": meter_id}
    units = {"unit_singular": "token", "unit_plural": "tokens"}
    assert debugger.client.post("/v1/features", json=feature | units).status_code == 201
    debugger.visit(view="usage", meter_id=meter_id)
    debugger.opens("#sum", "1 token")
    store_tokens(debugger, 2)
    debugger.opens("#sum", "3 tokens")
    other = {"lookup_key": "other", "unit_singular": "word", "unit_plural": "words"}
    assert debugger.client.post("/v1/features", json=feature | other).status_code == 201
    debugger.open(debugger.driver.current_url)
    eventually(lambda: debugger.text("#sum") == "3")  # two units: neither is the meter's


@needs_browser
def test_a_bucketed_maximum_says_that_it_is_a_sum(debugger: Debugger) -> None:
    store_tokens(debugger, 3, 5)
    store_tokens(debugger, 4, hours=5)
    aggregation = {"type": "MAX", "field": "tokens", "bucket_size": "HOUR"}
    meter_id = make_meter(debugger, aggregation=aggregation)
    debugger.visit(view="usage", meter_id=meter_id, window_size="")
    debugger.opens("#usage-says", "MAX of tokens in each hour, added up, in call.")
    assert debugger.text("#sum") == "9"


@needs_browser
@table(("values", "note"), [
    ([1, "2"], None),
    ([1, "12 apples"], 'Not a number: "12 apples".'),
    ([1, True], "Not a number: true."),
    ([1, {"a": 1}], 'Not a number: {"a":1}.'),
    ([1, None], None),
], ids=str)  # fmt: skip
def test_values_that_are_not_numbers_are_named_in_amber(
    debugger: Debugger, values: list[Any], note: str | None
) -> None:
    store_tokens(debugger, *values)
    debugger.visit(view="usage", event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#usage-says", "A number in tokens: ")
    assert (debugger.text("#usage-says .warn") != "") is (note is not None)
    assert note is None or note in debugger.text("#usage-says .warn")


@needs_browser
def test_the_chart_has_axes(debugger: Debugger) -> None:
    store_tokens(debugger, 1000, 250)
    debugger.visit(view="usage", event_name="call", aggregation_type="SUM", property_name="tokens", window_size="DAY")
    debugger.opens("#chart-top", "1,250")
    for name in ("#chart-top", "#chart-bottom", "#chart-from", "#chart-to"):
        assert debugger.find(name).is_displayed()
    debugger.visit(view="usage", event_name="nobody")
    debugger.opens("#usage-says", "COUNT of events")
    assert debugger.text("#chart-top") == debugger.text("#chart-from") == ""


@needs_browser
def test_opening_usage_requests_it_once(debugger: Debugger) -> None:
    usage_of_models(debugger, event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#sum", "3")
    before = asked(debugger, "/v1/events/monitoring")
    eventually(lambda: asked(debugger, "/v1/events/monitoring") > before + 1)  # the count was requested again
    assert asked(debugger, "/v1/events/usage") == 2  # in all, and by window


WITHOUT_METERS = "import sys, eventstore; from eventstore_extras import analytics; analytics.OPERATIONS = (); sys.exit(eventstore.main())"


@needs_browser
def test_without_meters_on_the_server_only_event_names_are_offered(browser: Debugger, tmp_path: Path) -> None:
    browser.look()
    command, environ = (sys.executable, "-c", WITHOUT_METERS), {"PYTHONPATH": str(ROOT)}
    with Live(tmp_path, "--api-key", "key", command=command, **environ) as live, live.client("key") as client:
        store(client, event(timestamp=ago(9), properties={"tokens": 1}))
        browser.complaints()
        browser.open(f"{live.url}/?view=usage#key=key")
        browser.opens("#ask h2", "Which events")
        assert browser.texts("#ask button") == ["call", "cust", "tokens"]
        for field in ("#meter_id", "#group_by", "#next"):
            assert not browser.find(field).is_displayed()
        eventually(lambda: asked(browser, "/health") > 1)
        assert asked(browser, "/v1/meters") == 1
        browser.click("#ask button")
        browser.opens("#sum", "1")
        assert browser.complaints() == []
        browser.open("about:blank")


@needs_browser
def test_the_service_alone_offers_event_names_and_says_that_usage_needs_the_extras(
    browser: Debugger, tmp_path: Path
) -> None:
    browser.look()
    for name in ("eventstore.py", "schema.sql", "debugger.html"):
        shutil.copy(ROOT / name, tmp_path)
    alone = (sys.executable, "-S", tmp_path / "eventstore.py")  # hides this checkout, which site-packages links to
    libraries = {"PYTHONPATH": os.pathsep.join(sysconfig.get_path(name) for name in ("purelib", "platlib"))}
    with Live(tmp_path, "--api-key", "key", command=alone, **libraries) as live, live.client("key") as client:
        store(client, event(timestamp=ago(9), properties={"tokens": 1}))
        browser.complaints()
        browser.open(f"{live.url}/?view=usage#key=key")
        browser.opens("#ask h2", "Which events")
        assert browser.texts("#ask button") == ["call", "cust", "tokens"]
        assert not browser.find("#meter_id").is_displayed()
        browser.click("#ask button")
        browser.opens("#notice", "POST /v1/events/usage needs the folder eventstore_extras beside eventstore.py")
        browser.click("#show-events")
        browser.opens("#matches", "1 event match")
        eventually(lambda: browser.text("#notice") == "")
        assert browser.complaints() == []
        browser.open("about:blank")
