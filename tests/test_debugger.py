"""Test the debugger's page in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx

from browser import Debugger, Proxy, ago, bars_of, environment_of, needs_browser, places, some
from eventstore import ApiKey
from helpers import DEBUGGER, Live, event, eventually, run, serving, store, table


def test_the_page_is_small_and_self_contained_and_never_sets_markup() -> None:
    assert len(DEBUGGER.encode()) <= 76_000
    foreign = r"(?i)(?:src|href)=\"(?!data:)[^\"]*|\burl\([^)]*|@import|https?://(?!www\.w3\.org)\S*"
    assert re.findall(foreign, DEBUGGER) == []
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser"
    assert re.findall(markup, DEBUGGER) == []
    assert re.findall(r"<[^>]*\s(?:style|on\w+)=", DEBUGGER) == []


@table("method", ["GET", "HEAD"])
def test_the_page_needs_no_key_and_its_headers_forbid_foreign_content(shared: httpx.Client, method: str) -> None:
    response = shared.send(httpx.Request(method, shared.base_url))
    assert (response.status_code, response.headers["content-type"]) == (200, "text/html; charset=utf-8")
    assert response.text == (DEBUGGER if method == "GET" else "")
    policy = dict(part.split(" ", 1) for part in response.headers["Content-Security-Policy"].split("; "))
    for kind in ("script", "style"):
        assert re.fullmatch(r"'sha256-[\w+/]{43}='", policy.pop(f"{kind}-src"))
    assert policy == {"default-src": "'none'", "connect-src": "'self'", "img-src": "data:", "base-uri": "'none'",
                      "form-action": "'none'", "frame-ancestors": "'none'"}  # fmt: skip
    expected = {"X-Content-Type-Options": "nosniff", "X-Frame-Options": "DENY", "Referrer-Policy": "no-referrer",
                "Cache-Control": "no-cache"}  # fmt: skip
    assert {name: response.headers.get(name) for name in expected} == expected


@needs_browser
def test_the_key_in_the_link_leaves_the_address_bar_and_is_kept_for_the_session(debugger: Debugger) -> None:
    assert debugger.driver.current_url == f"{debugger.live.url}/"
    debugger.driver.refresh()
    debugger.opens("#pulse", "Live")
    assert debugger.key not in debugger.live.log + debugger.driver.page_source


@needs_browser
def test_without_a_valid_key_the_page_asks_for_one_and_keeps_the_filters(debugger: Debugger) -> None:
    store(debugger.client, event("a", source="app"), event("b"))
    debugger.ask("sessionStorage.clear()")
    debugger.open(f"{debugger.live.url}/?source=app")
    eventually(lambda: debugger.ask("document.getElementById('key-dialog').open"))
    for key, answer in (("wrong", "a key that this server does not know"), ("s\u00e9cret", "ASCII")):
        debugger.fill("#key-input", key)
        debugger.click("#key-form .main")
        debugger.opens("#key-fault", answer)
    debugger.fill("#key-input", debugger.key)
    debugger.click("#key-form .main")
    debugger.shows("a")
    assert debugger.driver.current_url == f"{debugger.live.url}/?source=app"


@needs_browser
def test_new_events_appear_and_are_marked_even_if_they_arrive_a_little_late(debugger: Debugger) -> None:
    store(debugger.client, event("first", timestamp=ago(5)))
    debugger.shows("first")
    store(debugger.client, event("second", timestamp=ago(1)))
    debugger.shows("second", "first")
    store(debugger.client, event("late", timestamp=ago(3)), event("third", timestamp=ago()))
    debugger.shows("third", "second", "late", "first")
    assert {"third", "second", "late"} <= set(debugger.texts(".row.new .id"))
    debugger.click("#pause")
    store(debugger.client, event("unseen"))
    polls = "performance.getEntriesByType('resource').filter((one) => one.name.endsWith('/health')).length"
    before = debugger.ask(polls)
    eventually(lambda: debugger.ask(polls) > before + 1)
    assert (debugger.text("#pulse"), debugger.ids()[0]) == ("Paused", "third")
    debugger.click("#pause")
    debugger.shows("unseen", "third", "second", "late", "first")


@needs_browser
def test_filters_are_in_the_address_and_a_link_reproduces_the_view(debugger: Debugger) -> None:
    events = [event("a", source="app", properties={"region": "eu", "city": "Paris, France"}), event("b", source="app"),
              event("c", event_name="other", external_customer_id="cust 2", properties={"region": "us", "n": 0.5})]  # fmt: skip
    store(debugger.client, *({**one, "timestamp": ago(3 - number)} for number, one in enumerate(events)))
    for field, text, found in (
        ("source", "app", ["b", "a"]), ("event_name", "other", ["c"]), ("external_customer_id", "cust 2", ["c"]),
        ("event_id", "b", ["b"]), ("property_filters", "region:eu,us", ["c", "a"]),
        ("property_filters", '{"city": ["Paris, France"]}', ["a"]), ("property_filters", "region:eu,us;n:0.5", ["c"]),
    ):  # fmt: skip
        debugger.shows("c", "b", "a")
        debugger.fill(f"#{field}", text)
        debugger.shows(*found)
        address = debugger.driver.current_url
        assert debugger.address() == {field: [text]}
        debugger.click("#clear")
    debugger.open(address + "&external_customer_id=cust%202&range=1h")
    debugger.shows("c")
    fields = "[...document.querySelectorAll('#query input, #query select')].map((field) => field.value)"
    assert debugger.ask(fields) == ["cust 2", "", "", "", "region:eu,us;n:0.5", "1h", "", ""]
    debugger.click("#clear")
    debugger.shows("c", "b", "a")
    debugger.driver.back()
    debugger.shows("c")


@needs_browser
def test_the_button_beside_a_value_filters_by_it_and_the_row_opens_the_event(debugger: Debugger) -> None:
    events = [event("a", source="app", properties={"city": "Paris, France", "n": 1}), event("b", properties={"n": 2})]
    store(debugger.client, *({**one, "timestamp": ago(3 - number)} for number, one in enumerate(events)))
    for selector, parameter, value in (
        (".source .only", "source", "app"), (".row:last-child .id .only", "event_id", "a"),
        (".row:last-child .brief .only", "property_filters", '{"city":["Paris, France"]}'),
        (".row:last-child .brief .only:last-of-type", "property_filters", "n:1"),
    ):  # fmt: skip
        debugger.shows("b", "a")
        debugger.click(selector)
        debugger.shows("a")
        assert debugger.address() == {parameter: [value]}
        debugger.click("#clear")
    debugger.shows("b", "a")
    debugger.click(".row:last-child .brief .value")
    assert "Paris, France" in debugger.text("#tree")
    assert len(debugger.ids()) == 2


@needs_browser
def test_an_error_of_the_api_is_shown_once_beside_its_field(debugger: Debugger) -> None:
    for field, text in (("property_filters", "abc"), ("property_filters", "{"), ("start_time", "yesterday")):
        parameters = {field: text} | ({"range": "own"} if field == "start_time" else {})
        debugger.visit(**parameters)
        debugger.opens(f"#{field}-fault", "must ")
        assert field not in debugger.text(f"#{field}-fault")  # the message stands beside the field
        assert debugger.ask("document.getElementById(arguments[0]).ariaInvalid", field) == "true"
    refusals = debugger.live.log.count("/v1/events/usage: 400")
    total = {"event_name": "call", "property_name": "n", "aggregation_type": "SUM_WITH_MULTIPLIER"}
    debugger.visit(view="usage", **total, multiplier="many")
    debugger.opens("#multiplier-fault", "must be a decimal number")
    eventually(lambda: debugger.ask("performance.now() > POLL_MS"))  # long enough for another request
    assert debugger.live.log.count("/v1/events/usage: 400") == refusals + 1
    assert not debugger.find("#next").is_displayed()  # the server would refuse the line to paste as well


@needs_browser
def test_scrolling_reaches_the_last_of_1000_events_with_few_rows_in_the_document(debugger: Debugger) -> None:
    store(debugger.client, *some(1000))
    debugger.open(f"{debugger.live.url}/")
    eventually(debugger.ids)
    seen = set(debugger.ids())

    def scroll_on() -> bool:
        debugger.ask("document.getElementById('scroll').scrollBy(0, 600)")
        debugger.ask("new Promise((drawn) => requestAnimationFrame(() => requestAnimationFrame(drawn)))")
        seen.update(debugger.ids())
        assert debugger.ask("document.querySelectorAll('.row').length") < 60
        return "e0000" in seen

    eventually(scroll_on)
    assert sorted(seen) == [f"e{number:04}" for number in range(1000)]
    debugger.opens("#foot", "These are all: 1,000 events.")
    store(debugger.client, event("new"))
    debugger.opens("#newest", "1 new event")
    debugger.click("#newest")
    eventually(lambda: debugger.ids()[:2] == ["new", "e0999"])


@needs_browser
def test_at_most_10000_events_are_held_while_scrolling_down_and_back(debugger: Debugger) -> None:
    for at in range(0, 12_000, 1000):
        numbers = range(at, at + 1000)
        store(debugger.client, *(event(f"e{number:05}", timestamp=ago(6000 - number / 10)) for number in numbers))
    debugger.open(f"{debugger.live.url}/")

    def reaches(event_id: str, end: int) -> Callable[[], bool]:
        def scroll() -> bool:
            debugger.ask("document.getElementById('scroll').scrollTo(0, arguments[0])", end)
            return event_id in debugger.ids()

        return scroll

    eventually(reaches("e00000", 10**9))
    assert debugger.ask("state.events.length") == 10_000
    eventually(reaches("e11999", 0))
    assert debugger.ask("state.events.length") <= 10_000
    held = debugger.ask("state.events.map((event) => event.id)")
    assert held == [f"e{number:05}" for number in range(11_999, 11_999 - len(held), -1)]
    store(debugger.client, event("new"))
    eventually(lambda: debugger.ids()[0] == "new")


EXACT = '{"price": 0.10, "big": 12345678901234567890, "it\'s": {"2": [1E+2, -0.0, "\\u0000\\\\"], "1": {}}, "no": null}'


@needs_browser
def test_an_event_is_shown_and_copied_exactly(debugger: Debugger) -> None:
    raw = '{"event_name": "call", "external_customer_id": "o\'neil", "event_id": "it\'s $(1) `2` %%", "properties": %s}'
    raw = raw.replace("%s", EXACT)
    assert debugger.client.post("/v1/events", content=raw).status_code == 202
    eventually(debugger.ids)
    debugger.click(".row .time")
    debugger.opens("#tree", "1: -0.0")  # drawn when the toggle event of the outer object arrives
    tree = debugger.text("#tree")
    for part in ("price: 0.10", "big: 12345678901234567890", "it's {2}", "2 [3]", "0: 1E+2", "1: -0.0", "no: null"):
        assert part in tree
    debugger.driver.set_permissions("clipboard-write", "granted")
    copied = []
    for number in range(1, 4):
        button = f"#detail .actions + .actions button:nth-child({number})"
        debugger.click(button)
        debugger.opens(button, "Copied")
        copied.append(debugger.pasted())
    as_json, query, send = copied
    stored = json.loads(as_json, parse_float=str, parse_int=str)
    sent = json.loads(raw, parse_float=str, parse_int=str)
    assert (stored["id"], stored["properties"]) == (sent["event_id"], sent["properties"])
    if not (shutil.which("bash") and shutil.which("curl")):
        return
    environ = os.environ | {"FLEXPRICE_API_KEY": debugger.key}
    found, again = (run("bash", "-c", line, env=environ).stdout for line in (query, send))
    assert json.loads(found, parse_float=str, parse_int=str)["event"] == stored
    assert json.loads(again)["event_id"] == sent["event_id"]
    assert len(debugger.ids()) == 1


@needs_browser
def test_copying_works_without_the_clipboard_api(debugger: Debugger) -> None:
    debugger.opens("#first", "No events yet")
    debugger.driver.set_permissions("clipboard-write", "granted")
    debugger.ask("void Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as on plain HTTP
    debugger.click("#first button")
    debugger.opens("#first button", "Copied")
    assert debugger.pasted() == f"{debugger.live.url}/v1"
    assert debugger.ask("document.querySelectorAll('textarea').length") == 1


@needs_browser
def test_the_answer_to_a_test_event_is_shown_stored_duplicate_or_refused_field_by_field(debugger: Debugger) -> None:
    debugger.click("#send")
    event_id = json.loads(debugger.ask("document.getElementById('send-input').value"))["event_id"]
    for outcome in ("202 stored", "202 duplicate: the first one with this id stays"):
        debugger.click("#send-form .main")
        debugger.opens("#answer", outcome)
    debugger.shows(event_id)
    for body, parts in (('{"timestamp": "yesterday"}', ["event_name is required", "timestamp must be RFC 3339"]),
                        ("{", ["400", "not valid JSON"])):  # fmt: skip
        debugger.fill("#send-input", body)
        debugger.click("#send-form .main")
        for part in parts:
            debugger.opens("#answer", part)
    debugger.click("#send-dialog .close")
    debugger.shows(event_id)


MARKUP = "<script>alert(1)</script><img src=x onerror=alert(2)>"


@needs_browser
def test_markup_in_an_event_is_shown_as_text_everywhere(debugger: Debugger) -> None:
    fields = dict.fromkeys(("event_name", "external_customer_id", "customer_id", "source", "event_id"), MARKUP)
    properties = {MARKUP: MARKUP, "deep": {MARKUP: [MARKUP]}}
    assert debugger.client.post("/v1/events", json={**fields, "properties": properties}).status_code == 202
    debugger.shows(MARKUP)
    assert debugger.ask("[...document.querySelectorAll('.row .value')].map((node) => node.textContent)") == [MARKUP] * 5
    debugger.click(".row .time")
    assert debugger.text("#detail h2") == MARKUP
    assert debugger.text("#tree").count(MARKUP) == 4
    debugger.click(".row .name .only")
    debugger.opens("#in-use", "(1)")
    debugger.ask("(state.view = 'usage', change())")
    debugger.opens("#usage-says", "COUNT")
    assert debugger.ask("document.querySelectorAll('img, script:not(:first-of-type)').length") == 0
    assert debugger.driver.title == "Event debugger"  # an alert would have raised an error by now


@needs_browser
def test_the_page_notices_that_the_server_stopped_and_reconnects(browser: Debugger, tmp_path: Path) -> None:
    browser.look()
    with Live(tmp_path) as live:
        link, key = re.findall(r"(http\S+/#key=(\S+))", live.banner)[0]
        with live.client(key) as client:
            store(client, event("before", timestamp=ago(5)))
        browser.open(link)
        browser.shows("before")
        assert live.stop() == 0
    browser.opens("#notice", "The server does not answer. Next try in ")
    assert browser.text("#pulse") == "Reconnecting"
    with Live(tmp_path, "--port", live.port, "--api-key", key) as live, live.client(key) as client:
        store(client, event("after"))
        browser.shows("after", "before")
        eventually(lambda: (browser.text("#notice"), browser.text("#pulse")) == ("", "Live"))
        assert key not in browser.driver.current_url
        browser.open("about:blank")
    assert browser.complaints("net::ERR_CONNECTION_REFUSED") == []


@needs_browser
def test_the_histogram_counts_events_and_changes_the_range(debugger: Debugger) -> None:
    from selenium.webdriver import ActionChains

    for hours in (1, 12, 23):
        time = ago(3600 * hours)  # the same time for all, so that they are in one bar
        store(debugger.client, *(event(f"{hours}_{number}", timestamp=time) for number in range(hours)))
    debugger.opens("#matches", "36 events")
    bars = bars_of(debugger)
    assert (96 <= len(bars) <= 97, sum(bars), [count for count in bars if count]) == (True, 36, [23, 12, 1])
    middle = next(index for index, count in enumerate(bars) if count == 12) - len(bars) / 2
    area = debugger.find("#bars")
    step = area.size["width"] / len(bars)
    drag = ActionChains(debugger.driver).move_to_element_with_offset(area, int((middle - 2) * step), 0)
    drag.click_and_hold().move_by_offset(int(5 * step), 0).release().perform()
    debugger.opens("#foot", "These are all: 12 events.")
    debugger.opens("#matches", "12 events")
    assert "range=own&start_time=" in debugger.driver.current_url
    debugger.opens("#pulse", "Fixed range")
    for widened in ("Last 24 hours", "Last 7 days"):
        ActionChains(debugger.driver).double_click(area).perform()
        chosen = "document.getElementById('range').selectedOptions[0].text"
        debugger.gives(chosen, widened)
    debugger.opens("#foot", "These are all: 36 events.")


@needs_browser
def test_the_list_can_be_used_with_the_keyboard_alone(debugger: Debugger) -> None:
    from selenium.webdriver.common.keys import Keys

    store(debugger.client, *some(100))
    debugger.open(f"{debugger.live.url}/")
    eventually(lambda: debugger.ids()[:1] == ["e0099"])
    debugger.press(*"jjjk", Keys.ENTER)
    assert "e0098" in debugger.text("#detail dl")
    assert debugger.ask("document.activeElement.id") == "detail"
    debugger.press("j")
    assert "e0097" in debugger.text("#detail dl")
    debugger.press(Keys.ESCAPE)
    assert debugger.ask("[document.getElementById('detail').hidden, document.activeElement.id]") == [True, "scroll"]
    debugger.press(*"j" * 40)
    assert debugger.ask("document.getElementById('scroll').scrollTop > 100")
    assert debugger.text(".row[aria-selected=true] .id") == "e0057"
    debugger.press("/", "nobody", Keys.ENTER)
    debugger.shows()
    assert debugger.text("#foot").startswith("No events match.")
    assert debugger.ask("document.activeElement.id") == "external_customer_id"
    assert debugger.ask("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    debugger.press(Keys.ESCAPE)
    assert debugger.ask("document.activeElement.tagName") == "BODY"
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((field) => !field.labels.length).map((field) => field.id)"
    assert debugger.ask(unnamed) == []


# Returns each visible text with its contrast to the nearest background that is not transparent.
CONTRASTS = """(() => {
  const channels = (color) => color.match(/[\\d.]+/g).map(Number);
  const light = (color) => channels(color).slice(0, 3).map((part) => part / 255)
    .map((part) => (part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4))
    .reduce((sum, part, index) => sum + part * [0.2126, 0.7152, 0.0722][index], 0);
  const background = (node) => node === null ? "rgb(255, 255, 255)"
    : channels(getComputedStyle(node).backgroundColor)[3] === 0 ? background(node.parentElement) : getComputedStyle(node).backgroundColor;
  const texts = [...document.querySelectorAll("body *")].filter((node) => node.checkVisibility() &&
    (node.matches("input, select, textarea") || [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim())));
  return texts.map((node) => {
    const [a, b] = [light(getComputedStyle(node).color), light(background(node))].sort((a, b) => b - a);
    return [node.id || node.className || node.tagName, (a + 0.05) / (b + 0.05)];
  });
})()"""


@needs_browser
@table("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_that_wcag_aa_requires(debugger: Debugger, scheme: str) -> None:
    from selenium.webdriver.common.keys import Keys

    debugger.look(scheme=scheme)
    properties = {"a": 1, "b": "c", "d": [None, True]}
    store(debugger.client, event("old", timestamp=ago(9), source="app", properties=properties))
    debugger.shows("old")
    store(debugger.client, event("new"))
    debugger.shows("new", "old")
    debugger.press("j", "j", Keys.ENTER)
    measured = debugger.ask(CONTRASTS)
    debugger.click("#show-usage")
    debugger.opens("#ask", "Which events")
    measured += debugger.ask(CONTRASTS)
    debugger.click("#send")
    debugger.click("#send-form .main")
    debugger.opens("#answer", "stored")
    measured += debugger.ask(CONTRASTS)
    backgrounds = debugger.ask("getComputedStyle(document.body).backgroundColor")
    assert (backgrounds == "rgb(244, 246, 249)") is (scheme == "light")
    assert len(measured) > 100
    assert [(name, ratio) for name, ratio in measured if ratio < 4.5] == []
    debugger.click("#send-dialog .close")


@needs_browser
@table("width", [375, 2560])
def test_no_view_scrolls_sideways(debugger: Debugger, width: int) -> None:
    debugger.look(width, 812)
    long = {"source": "s" * 200, "event_name": "n" * 200, "properties": {"key" * 50: "value" * 100}}
    store(debugger.client, event("wide" * 50, **long))
    debugger.open(f"{debugger.live.url}/")
    eventually(debugger.ids)
    too_wide = "[document.documentElement, document.getElementById('scroll')].filter((node) => node.scrollWidth > node.clientWidth).length"
    assert debugger.ask(too_wide) == 0
    debugger.click(".row .time")
    assert debugger.ask(too_wide) == 0
    assert debugger.ask("document.getElementById('detail').scrollWidth <= innerWidth")
    if width == 375:
        debugger.click("#detail [aria-label=Close]")
        debugger.click("#filters summary")
        assert debugger.ask(too_wide) == 0
        assert debugger.ask("document.getElementById('scroll').clientHeight") > 100
    debugger.click("#show-usage")
    assert debugger.ask(too_wide) == 0


# ---------------------------------------------------------------------------------------------- count and histogram


@needs_browser
@table(
    ("filters", "found"),
    [
        ({}, "6 events"),
        ({"external_customer_id": "acme"}, "3 events match"),
        ({"event_name": "call", "external_customer_id": "acme"}, "2 events match"),
        ({"source": "app"}, "1 event matches"),
        ({"event_id": "e3"}, "1 event matches"),
        ({"property_filters": "region:eu,us"}, "2 events match"),
        ({"property_filters": '{"region":["eu"]}'}, "1 event matches"),
        ({"event_name": "nothing"}, "0 events match"),
    ],
    ids=str,
)
def test_the_count_and_the_histogram_follow_the_filters(
    debugger: Debugger, filters: dict[str, Any], found: str
) -> None:
    fields: list[dict[str, Any]] = [{"external_customer_id": "acme"}] * 2 + [
        {"external_customer_id": "acme", "event_name": "other"}
    ]
    fields += [{"source": "app"}, {"properties": {"region": "eu"}}, {"properties": {"region": "us"}}]
    store(debugger.client, *(event(f"e{number}", timestamp=ago(9), **one) for number, one in enumerate(fields)))
    debugger.visit(**filters)
    eventually(lambda: debugger.text("#matches") == found)
    assert sum(bars_of(debugger)) == int(found.split(maxsplit=1)[0])
    assert debugger.text("#bars-say") == "A bar is 15 minutes"


@needs_browser
def test_the_bars_say_that_they_ignore_a_filter_that_get_cannot_express(debugger: Debugger) -> None:
    cities = ("Paris, France", "Paris, France", "Rome")
    store(
        debugger.client, *(event(f"e{n}", timestamp=ago(9), properties={"city": city}) for n, city in enumerate(cities))
    )
    debugger.visit(property_filters='{"city":["Paris, France"]}')
    eventually(lambda: debugger.text("#matches") == "2 events match")
    assert (len(debugger.ids()), sum(bars_of(debugger))) == (2, 3)
    assert "the bars leave out the property filter" in debugger.text("#bars-say")


@needs_browser
def test_an_event_at_the_end_of_the_range_is_listed_and_counted(debugger: Debugger) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start, end = ((hour - timedelta(hours=hours)).isoformat() for hours in (3, 2))
    store(debugger.client, event("first", timestamp=start), event("last", timestamp=end))
    debugger.visit(range="own", start_time=start, end_time=end)
    debugger.shows("last", "first")
    eventually(lambda: debugger.text("#matches") == "2 events")
    assert sum(bars_of(debugger)) == 2


@needs_browser
def test_the_count_is_updated_as_events_arrive(debugger: Debugger) -> None:
    store(debugger.client, event("a", timestamp=ago(9)))
    debugger.opens("#matches", "1 event")
    store(debugger.client, event("b", timestamp=ago(8)))
    debugger.opens("#matches", "2 events")


# ---------------------------------------------------------------------------------------------- forwarding


@needs_browser
def test_the_header_shows_where_the_server_forwards_to_and_how_far_it_is_behind(
    browser: Debugger, tmp_path: Path
) -> None:
    browser.look()
    flags = ("--api-key", "key", "--forward-to", "http://127.0.0.1:1/v1")  # nothing listens there
    with Live(tmp_path, *flags, EVENTSTORE_FORWARD_API_KEY="other") as live, live.client("key") as client:
        store(client, *some(1000))
        store(client, *(event(f"f{number}") for number in range(234)))
        browser.open(f"{live.url}/#key=key")
        browser.opens("#forwards", "forwards to 127.0.0.1:1, 1,234 behind")
        browser.click("#show-usage")
        assert browser.find("#forwards").is_displayed()
        browser.look(390, 800)
        assert browser.find("#forwards").is_displayed()
        browser.open("about:blank")


@needs_browser
def test_the_header_shows_nothing_about_forwarding_without_it(debugger: Debugger) -> None:
    debugger.opens("#matches", "0 events")
    assert debugger.text("#forwards") == ""


# ---------------------------------------------------------------------------------------------- the header and the footer


@needs_browser
def test_a_long_environment_name_is_truncated_and_the_header_stays_in_one_row(
    browser: Debugger, tmp_path: Path
) -> None:
    browser.look()
    with Live(tmp_path, "--api-key", "key=" + "long-name-" * 12) as live:
        browser.open(f"{live.url}/#key=key")
        browser.opens("#pulse", "Live")
        assert browser.ask("document.querySelector('header').getBoundingClientRect().height") < 60
        assert browser.ask("document.getElementById('environment').title") == "long-name-" * 12
        browser.open("about:blank")


@needs_browser
def test_the_footer_names_the_keys_that_work_in_this_view(debugger: Debugger) -> None:
    shown = "[...document.querySelectorAll('footer > span')].filter((node) => node.checkVisibility()).map((node) => node.textContent)"
    store(debugger.client, event("a", timestamp=ago(9)))
    debugger.shows("a")
    debugger.click("#show-usage")
    assert debugger.ask(shown) == ["/ filter"]
    debugger.click("#show-events")
    assert debugger.ask(shown) == ["j k move", "Enter open", "/ filter", "Esc close"]


# ---------------------------------------------------------------------------------------------- time zone


@needs_browser
def test_the_chosen_time_zone_applies_everywhere(debugger: Debugger) -> None:
    time, in_kabul = datetime(2026, 3, 9, 20, 10, 5, 123456, UTC), "2026-03-10 00:40:05.123456"
    store(debugger.client, event("a", timestamp=time.isoformat()))
    where = {"range": "own", "start_time": "2026-03-09T00:00:00Z", "end_time": "2026-03-10T00:00:00Z", "open": "a"}
    for zone, at, start in (("Asia/Kabul (local)", in_kabul, "04:30"), ("UTC", "2026-03-09 20:10:05.123456", "00:00")):
        debugger.visit(**where)
        debugger.opens("#detail dl", at)
        assert debugger.ask("document.getElementById('zone').selectedOptions[0].text") == zone
        assert at[5:23] in debugger.text(".row .time")
        assert debugger.ask("document.getElementById('start_time').value").startswith(f"2026-03-09T{start}")
        debugger.opens("#from", f"2026-03-09 {start}")
        debugger.visit(**where, view="usage", event_name="call", window_size="DAY")
        debugger.opens("#windows td", at[:10] + " 00:00")
        debugger.find("#zone").send_keys("UTC")
        eventually(
            lambda: debugger.ask("document.readyState === 'complete' && document.getElementById('zone').value") == "utc"
        )
    debugger.visit(range="own", start_time=where["start_time"])
    eventually(lambda: debugger.text("#zone option:checked") == "UTC")  # the zone is remembered
    debugger.ask("(document.getElementById('start_time').value = '2026-03-09T12:00:00', readFields())")
    assert debugger.address()["start_time"] == ["2026-03-09T12:00:00.000Z"]


# ---------------------------------------------------------------------------------------------- the list and its event


@needs_browser
def test_the_open_event_is_in_the_address_and_a_link_opens_it(debugger: Debugger) -> None:
    from selenium.webdriver.common.keys import Keys

    store(debugger.client, event("odd / id?", timestamp=ago(9)), event("b", timestamp=ago(8)))
    debugger.shows("b", "odd / id?")
    debugger.click(".row:last-child .time")
    assert debugger.address() == {"open": ["odd / id?"]}
    debugger.press("k")
    assert debugger.address() == {"open": ["b"]}
    debugger.driver.back()
    eventually(lambda: debugger.ask("document.getElementById('detail').hidden"))
    debugger.visit(open="odd / id?")
    debugger.opens("#detail dl", "odd / id?")
    assert debugger.text(".row[aria-selected=true] .id") == "odd / id?"
    debugger.visit(open="odd / id?", event_id="b")  # the list has only b
    debugger.opens("#detail dl", "odd / id?")
    debugger.press(Keys.ESCAPE)
    assert debugger.address() == {"event_id": ["b"]}
    debugger.visit(open="nobody")
    debugger.opens("#notice", "This environment has no event nobody.")


@needs_browser
def test_an_empty_source_and_customer_id_look_alike(debugger: Debugger) -> None:
    store(debugger.client, event("a"))
    debugger.shows("a")
    debugger.click(".row .time")
    names, values = debugger.texts("#detail dt"), debugger.texts("#detail dd")
    shown = dict(zip(names, values, strict=True))
    assert (shown["source"], shown["customer_id"]) == ("\u2013", "\u2013")


@needs_browser
def test_filter_buttons_have_names_and_appear_on_the_row_under_the_pointer(debugger: Debugger) -> None:
    from selenium.webdriver import ActionChains

    store(debugger.client, event("a", properties={"region": "eu"}))
    debugger.shows("a")
    opacity = "getComputedStyle(document.querySelector('.row .brief .only')).opacity"
    assert debugger.ask(opacity) == "0"
    ActionChains(debugger.driver).move_to_element(debugger.find(".row .time")).perform()
    eventually(lambda: debugger.ask(opacity) == "1")
    assert debugger.find(".row .brief .only").accessible_name == "Only events with region: eu"
    ActionChains(debugger.driver).move_to_element(debugger.find("h1")).perform()


@needs_browser
@table(("span", "shown"), [("24h", False), ("7d", True)])
def test_a_phone_shows_the_date_if_the_range_is_longer_than_a_day(debugger: Debugger, span: str, shown: bool) -> None:
    debugger.look(390, 800)
    store(debugger.client, event("a"))
    debugger.visit(range=span)
    debugger.shows("a")
    eventually(lambda: not debugger.ask("document.querySelector('.row.new')"))  # a new row shows "new" instead
    assert (f"{datetime.now(UTC) + timedelta(hours=4.5):%m-%d }" in debugger.find(".row .time").text + " ") is shown


# ---------------------------------------------------------------------------------------------- no events


@needs_browser
def test_an_empty_environment_shows_how_to_send_the_first_event(debugger: Debugger, tmp_path: Path) -> None:
    debugger.opens("#first", "No events yet")
    name = environment_of(debugger.key)
    assert (debugger.text("#environment"), debugger.find("#scroll").is_displayed()) == (name, False)
    url, curl, python = debugger.texts("#first pre")
    assert url == f"{debugger.live.url}/v1"
    for line in (curl, python):
        assert url in line
        assert "••••••••" in line
    assert debugger.key not in debugger.driver.page_source
    debugger.driver.set_permissions("clipboard-write", "granted")
    copied = []
    for number in range(3):
        debugger.find(f"#first .actions:nth-of-type({number + 1}) button").click()
        debugger.opens(f"#first .actions:nth-of-type({number + 1}) button", "Copied")
        copied.append(debugger.pasted())
    assert copied[0] == url
    assert copied[1].replace(debugger.key, "••••••••") == curl
    script = tmp_path / "first.py"
    script.write_text(copied[2])
    environ = os.environ | {"no_proxy": "127.0.0.1"}
    subprocess.run([sys.executable, script], check=True, timeout=60, env=environ)
    eventually(lambda: len(debugger.ids()) == 1)
    assert not debugger.find("#first").is_displayed()
    if shutil.which("bash") and shutil.which("curl"):
        subprocess.run(["bash", "-c", copied[1]], check=True, timeout=60, capture_output=True)
        eventually(lambda: len(debugger.ids()) == 2)


@needs_browser
def test_no_events_match_is_shown_only_with_filters_and_the_environment_keeps_its_name(debugger: Debugger) -> None:
    name = environment_of(debugger.key)
    debugger.visit(source="nobody")
    debugger.opens("#foot", "No events match.")
    assert debugger.text("#environment") == name
    store(debugger.client, event("old", timestamp="2026-01-02T03:04:05Z"))
    debugger.click("#clear")
    debugger.opens("#foot", "No events in this range. The newest is from 2026-01-02 07:34.")
    assert "match" not in debugger.text("#foot")
    debugger.visit(property_filters="abc")
    debugger.opens("#property_filters-fault", "must ")
    assert debugger.text("#environment") == name
    debugger.visit(range="own", start_time="2026-01-01T00:00:00Z")
    debugger.shows("old")


def test_monitoring_names_the_environment_in_a_header(tmp_path: Path) -> None:
    with serving(tmp_path, api_keys=(ApiKey.hashed("key", "Zürich 1"),)) as client:
        response = client.get("/v1/events/monitoring", headers={"x-api-key": "key"})
        assert response.headers["X-Environment-Id"] == "Z%C3%BCrich%201"


# ---------------------------------------------------------------------------------------------- layout


@needs_browser
def test_at_1400_pixels_dates_are_fully_visible_and_all_filters_are_in_one_row(debugger: Debugger) -> None:
    debugger.look(1400, 900)
    start, end = "2026-11-20T22:10:20Z", "2026-11-21T22:10:20Z"
    debugger.visit(range="own", start_time=start, end_time=end)
    debugger.opens("#pulse", "Fixed range")
    tops = debugger.ask(
        "[...document.querySelectorAll('#query > div')].map((field) => field.getBoundingClientRect().top)"
    )
    assert len(set(tops)) == 1
    for name in ("start_time", "end_time"):
        width = debugger.ask("document.getElementById(arguments[0]).getBoundingClientRect().width", name)
        needed = """(() => {
          const field = document.getElementById(arguments[0]), copy = field.cloneNode();
          copy.style.cssText = "position: absolute; width: auto";
          document.body.append(copy);
          const { width } = copy.getBoundingClientRect();
          copy.remove();
          return width;
        })()"""
        assert width >= debugger.ask(needed, name)


@needs_browser
@table("width", [380, 1280])
def test_the_state_stands_in_the_first_row(debugger: Debugger, width: int) -> None:
    debugger.look(width, 800)
    debugger.visit(range="own", start_time=ago(3600), end_time=ago(60))
    debugger.opens("#pulse", "Fixed range")
    tops = [debugger.ask("document.querySelector(arguments[0]).getBoundingClientRect().bottom", name) for name in ("h1", "#pulse", ".tabs")]  # fmt: skip
    assert abs(tops[0] - tops[1]) < 8
    assert debugger.ask("document.querySelector('h1').getBoundingClientRect().height") < 30
    assert (tops[2] > tops[1] + 20) is (width == 380)


@needs_browser
def test_no_focus_ring_covers_an_error(debugger: Debugger) -> None:
    debugger.visit(property_filters="abc")
    debugger.opens("#property_filters-fault", "must ")
    debugger.click("#property_filters")
    bottom, top = debugger.ask(
        # the ring is 2 pixels wide and 1 pixel away
        "[document.getElementById('property_filters').getBoundingClientRect().bottom + 3, "
        "document.getElementById('property_filters-fault').getBoundingClientRect().top]"
    )
    assert top >= bottom


@needs_browser
def test_nothing_moves_when_clear_filters_or_copied_appears(debugger: Debugger) -> None:
    store(debugger.client, event("a", source="app"))
    debugger.shows("a")
    fixed = ("#query", "#range", "#timeline", "#events", "#bars")
    before = places(debugger, *fixed)
    assert not debugger.find("#clear").is_displayed()
    debugger.fill("#source", "app")
    debugger.opens("#matches", "1 event matches")
    assert debugger.find("#clear").is_displayed()
    assert places(debugger, *fixed) == before
    debugger.click(".row .time")
    debugger.driver.set_permissions("clipboard-write", "granted")
    buttons = [f"#detail .actions + .actions button:nth-child({number})" for number in range(1, 5)]
    before = places(debugger, *buttons)
    debugger.click(buttons[0])
    debugger.opens(buttons[0], "Copied")
    assert places(debugger, *buttons) == before


@needs_browser
def test_an_error_names_its_field_once(debugger: Debugger) -> None:
    debugger.click("#send")
    debugger.fill("#send-input", "{}")
    debugger.click("#send-form .main")
    debugger.opens("#answer", "event_name is required")
    assert debugger.texts("#answer li") == ["event_name is required", "external_customer_id is required"]
    debugger.click("#send-dialog .close")


# ---------------------------------------------------------------------------------------------- below a path


@needs_browser
@table("slash", ["/", ""])
def test_the_page_works_below_a_path_behind_a_proxy(debugger: Debugger, slash: str) -> None:
    with Proxy(debugger.live.port, "/flexprice") as proxy:
        url = proxy.url
        debugger.open(f"{url}{slash}#key={debugger.key}")
        debugger.opens("#first pre", f"{url}/v1")
        store(debugger.client, event("a", source="app", timestamp=ago(5)), event("b", timestamp=ago(4)))
        debugger.shows("b", "a")
        debugger.fill("#source", "app")
        debugger.shows("a")
        debugger.opens("#matches", "1 event matches")
        debugger.click(".row .time")
        assert debugger.driver.current_url == f"{url}{slash}?source=app&open=a"
        assert debugger.ask("curl('v1/events')").startswith(f"curl '{url}/v1/events'")
        debugger.click("#show-usage")
        debugger.opens("#ask", "Which events")
        debugger.driver.refresh()  # the key is kept for this path
        debugger.opens("#ask", "Which events")
        debugger.click("#send")
        debugger.click("#send-form .main")
        debugger.opens("#answer", "202 stored")
        debugger.open(f"{debugger.live.url}/health")  # leave the proxy before it stops


@needs_browser
def test_the_page_uses_no_absolute_paths(debugger: Debugger) -> None:
    source = debugger.ask("document.querySelector('script').textContent")
    assert re.findall(r"[\"'`]/(?:v1|health)", source) == []
