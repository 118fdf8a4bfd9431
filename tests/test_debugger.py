"""The debugger's page, in a browser."""

from __future__ import annotations

import http.client
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import threading
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest
from starlette.testclient import TestClient

from eventstore import ApiKey
from helpers import DEBUGGER, ROOT, Live, event, eventually, run, serving, store, table

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

Test = TypeVar("Test", bound=Callable[..., None])


def no_browser(test: Test) -> Test:
    """Mark a test that drives Chromium: slow, and skipped where there is none."""
    is_there = shutil.which("chromium") and shutil.which("chromedriver")
    needs = pytest.mark.skipif(not is_there, reason="needs a browser: apt-get install chromium chromium-driver")
    marked: Test = pytest.mark.slow(needs(test))
    return marked


# The page asks the server every 250 ms instead of every second, so that tests wait less.
POLL_SOONER = """
const later = setTimeout;
globalThis.setTimeout = (call, ms, ...rest) => later(call, ms === 1000 ? 250 : ms, ...rest);
"""


class Debugger:
    """The page in a real browser, as a person at its screen and keyboard has it: in Kabul, whose clock differs from UTC
    by half an hour more than whole hours."""

    live: Live
    keys: list[str]
    key: str
    client: httpx.Client

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = shutil.which("chromium") or ""
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu", "no-proxy-server"):
            options.add_argument(f"--{flag}")
        self.driver = webdriver.Chrome(options, webdriver.ChromeService(shutil.which("chromedriver")))
        self.driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Kabul"})
        self.driver.execute_cdp_cmd("Page.addScriptToEvaluateOnNewDocument", {"source": POLL_SOONER})
        self.look()

    def look(self, width: int = 1280, height: int = 800, scheme: str = "light") -> None:
        screen = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", screen)
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", media)

    def open(self, url: str) -> None:
        self.driver.execute_cdp_cmd("Page.navigate", {"url": "about:blank"})
        self.driver.get(url)

    def visit(self, **parameters: str) -> None:
        self.open(f"{self.live.url}/?{urllib.parse.urlencode(parameters)}")

    def address(self) -> dict[str, list[str]]:
        """What the address bar has after the question mark."""
        return urllib.parse.parse_qs(urllib.parse.urlsplit(self.driver.current_url).query)

    def ask(self, script: str, *arguments: object) -> Any:
        return self.driver.execute_script(f"return {script}", *arguments)

    def find(self, selector: str) -> WebElement:
        return self.driver.find_element("css selector", selector)

    def text(self, selector: str) -> str:
        return str(self.ask("document.querySelector(arguments[0])?.textContent ?? ''", selector))

    def texts(self, selector: str) -> list[str]:
        return list(self.ask("[...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector))

    def click(self, selector: str) -> None:
        self.find(selector).click()

    def press(self, *keys: str) -> None:
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def fill(self, selector: str, text: str) -> None:
        """What a person types, key by key, and then leaves the field."""
        field = self.find(selector)
        field.clear()
        field.send_keys(text)
        self.ask("document.activeElement.blur()")

    def ids(self) -> list[str]:
        return self.texts(".row .id")

    def shows(self, *event_ids: str) -> None:
        eventually(lambda: self.ids() == list(event_ids))

    def gives(self, script: str, value: object) -> None:
        eventually(lambda: self.ask(script) == value)

    def opens(self, selector: str, part: str) -> None:
        eventually(lambda: part in self.text(selector))

    def pasted(self) -> str:
        """What is in the clipboard."""
        from selenium.webdriver.common.keys import Keys

        self.click("#send")
        self.find("#send-input").clear()
        self.find("#send-input").send_keys(Keys.CONTROL, "v")
        text = self.ask("document.getElementById('send-input').value")
        self.click("#send-dialog .close")
        return str(text)

    def complaints(self, but: str = "the server responded with a status of 4") -> list[str]:
        """What the browser's console says, but for the answers that a test provokes; reading it empties it."""
        lines: list[dict[str, str]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [line["message"] for line in lines if but not in line["message"]]


def environment_of(key: str) -> str:
    return key.replace("key", "environment")


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Debugger]:
    """A browser, and a server with a fresh environment for each test, whose key the link of the banner would have."""
    keys = [f"key-{number}" for number in range(99)]
    flags = itertools.chain.from_iterable(("--api-key", f"{key}={environment_of(key)}") for key in keys)
    with Live(tmp_path_factory.mktemp("debugger"), *flags) as live:
        debugger = Debugger()
        debugger.live, debugger.keys = live, keys
        yield debugger
        debugger.driver.quit()
        assert "Traceback" not in live.log
        assert "ignored" not in live.log  # the page sends nothing that the API does not know


@pytest.fixture
def debugger(browser: Debugger) -> Iterator[Debugger]:
    """The debugger as its link opens it; `client` is one with the same key."""
    browser.key = browser.keys.pop()
    with browser.live.client(browser.key) as browser.client:
        browser.complaints()
        browser.look()
        browser.open(f"{browser.live.url}/#key={browser.key}")
        browser.opens("#pulse", "Live")
        yield browser
        browser.ask("localStorage.clear()")
        assert browser.complaints() == []


def ago(seconds: float = 0) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def bars_of(debugger: Debugger) -> list[int]:
    """The histogram: how many events each bar stands for; none is drawn where there are none."""
    counts = debugger.ask("state.bars.counts")
    assert [height > 0 for height in heights(debugger, "bars")] == [count > 0 for count in counts]
    return list(counts)


def places(debugger: Debugger, *selectors: str) -> list[list[float]]:
    """Where things are on the screen, and how wide they are."""
    box = "(({ x, y, width }) => [x, y, width])(document.querySelector(arguments[0]).getBoundingClientRect())"
    return [[round(number) for number in debugger.ask(box, selector)] for selector in selectors]


def heights(debugger: Debugger, name: str = "chart") -> list[float]:
    """Of the parts of a drawing, the first window's first."""
    parts = "[...document.getElementById(arguments[0]).children]"
    return list(debugger.ask(f"{parts}.map((bar) => Number(bar.getAttribute('height')))", name))


def some(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Events of the last minutes, the oldest first: e0000, e0001 ..."""
    return [event(f"e{number:04}", timestamp=ago(600 - number / 100), **fields) for number in range(count)]


def test_the_page_is_small_whole_and_sets_nothing_as_markup() -> None:
    assert len(DEBUGGER.encode()) <= 60_000
    foreign = r"(?i)(?:src|href)=\"(?!data:)[^\"]*|\burl\([^)]*|@import|https?://(?!www\.w3\.org)\S*"
    assert re.findall(foreign, DEBUGGER) == []
    markup = r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function|DOMParser"
    assert re.findall(markup, DEBUGGER) == []
    assert re.findall(r"<[^>]*\s(?:style|on\w+)=", DEBUGGER) == []


@table("method", ["GET", "HEAD"])
def test_the_page_needs_no_key_and_lets_nothing_foreign_in(shared: TestClient, method: str) -> None:
    response = TestClient(shared.app).request(method, "/")
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


@no_browser
def test_the_key_of_the_link_leaves_the_address_bar_and_stays_for_the_session(debugger: Debugger) -> None:
    assert debugger.driver.current_url == f"{debugger.live.url}/"
    debugger.driver.refresh()
    debugger.opens("#pulse", "Live")
    assert debugger.key not in debugger.live.log + debugger.driver.page_source


@no_browser
def test_without_a_key_or_with_a_wrong_one_it_asks_and_keeps_the_filters(debugger: Debugger) -> None:
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


@no_browser
def test_new_events_appear_by_themselves_and_marked_even_those_a_little_late(debugger: Debugger) -> None:
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


@no_browser
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


@no_browser
def test_the_mark_beside_a_value_filters_by_it_and_the_row_opens_the_event(debugger: Debugger) -> None:
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


@no_browser
def test_what_the_api_refuses_is_said_beside_its_field_once(debugger: Debugger) -> None:
    for field, text in (("property_filters", "abc"), ("property_filters", "{"), ("start_time", "yesterday")):
        parameters = {field: text} | ({"range": "own"} if field == "start_time" else {})
        debugger.visit(**parameters)
        debugger.opens(f"#{field}-fault", "must ")
        assert field not in debugger.text(f"#{field}-fault")  # it stands beside it
        assert debugger.ask("document.getElementById(arguments[0]).ariaInvalid", field) == "true"
    refusals = debugger.live.log.count("/v1/events/usage: 400")
    total = {"event_name": "call", "property_name": "n", "aggregation_type": "SUM_WITH_MULTIPLIER"}
    debugger.visit(view="usage", **total, multiplier="many")
    debugger.opens("#multiplier-fault", "must be a decimal number")
    eventually(lambda: debugger.ask("performance.now() > POLL_MS"))  # time enough to ask again
    assert debugger.live.log.count("/v1/events/usage: 400") == refusals + 1
    assert not debugger.find("#next").is_displayed()  # a line to paste would be refused, too


@no_browser
def test_usage_refuses_a_property_filter_that_is_none(debugger: Debugger) -> None:
    usage_of_models(debugger, event_name="call", property_filters="abc")
    debugger.opens("#property_filters-fault", "must look like key1:v1,v2;key2:v3")
    assert debugger.text("#sum") == ""


@no_browser
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


@no_browser
def test_of_very_many_events_a_stretch_is_held_and_the_way_back_is_the_same(debugger: Debugger) -> None:
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


@no_browser
def test_an_event_is_shown_and_copied_whole_to_the_last_digit(debugger: Debugger) -> None:
    raw = '{"event_name": "call", "external_customer_id": "o\'neil", "event_id": "it\'s $(1) `2` %%", "properties": %s}'
    raw = raw.replace("%s", EXACT)
    assert debugger.client.post("/v1/events", content=raw).status_code == 202
    eventually(debugger.ids)
    debugger.click(".row .time")
    debugger.opens("#tree", "1: -0.0")  # an inner object is drawn by the toggle event of the one around it
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


@no_browser
def test_without_an_api_for_the_clipboard_a_line_is_copied_all_the_same(debugger: Debugger) -> None:
    debugger.opens("#first", "No events yet")
    debugger.driver.set_permissions("clipboard-write", "granted")
    debugger.ask("void Object.defineProperty(navigator, 'clipboard', { value: undefined })")  # as on plain HTTP
    debugger.click("#first button")
    debugger.opens("#first button", "Copied")
    assert debugger.pasted() == f"{debugger.live.url}/v1"
    assert debugger.ask("document.querySelectorAll('textarea').length") == 1


@no_browser
def test_a_test_event_is_stored_or_known_or_refused_field_by_field(debugger: Debugger) -> None:
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


@no_browser
def test_markup_in_an_event_is_text_everywhere(debugger: Debugger) -> None:
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
    assert debugger.driver.title == "Event debugger"  # an alert would not let itself be ignored


@no_browser
def test_a_server_that_went_away_is_missed_and_found_again(browser: Debugger, tmp_path: Path) -> None:
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


@no_browser
def test_the_histogram_counts_narrows_and_widens(debugger: Debugger) -> None:
    from selenium.webdriver import ActionChains

    for hours in (1, 12, 23):
        time = ago(3600 * hours)  # one time, or they would straddle two bars on the quarter hour
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


@no_browser
def test_usage_is_shown_per_window_with_its_numbers(debugger: Debugger) -> None:
    hour = datetime.now(UTC).replace(minute=30, second=0, microsecond=0)  # when one begins in Kabul
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


@no_browser
def test_the_keyboard_does_it_all(debugger: Debugger) -> None:
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


# Of each text on the screen: its contrast with the nearest background that is not transparent.
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


@no_browser
@table("scheme", ["light", "dark"])
def test_every_text_has_the_contrast_of_wcag_aa(debugger: Debugger, scheme: str) -> None:
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


@no_browser
@table("width", [375, 2560])
def test_nothing_is_wider_than_the_screen(debugger: Debugger, width: int) -> None:
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


@no_browser
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


@no_browser
def test_a_filter_that_no_url_can_hold_is_counted_and_the_bars_say_that_they_leave_it_out(debugger: Debugger) -> None:
    cities = ("Paris, France", "Paris, France", "Rome")
    store(
        debugger.client, *(event(f"e{n}", timestamp=ago(9), properties={"city": city}) for n, city in enumerate(cities))
    )
    debugger.visit(property_filters='{"city":["Paris, France"]}')
    eventually(lambda: debugger.text("#matches") == "2 events match")
    assert (len(debugger.ids()), sum(bars_of(debugger))) == (2, 3)
    assert "the bars leave out the property filter" in debugger.text("#bars-say")


@no_browser
def test_an_event_at_the_end_of_the_range_is_listed_and_counted(debugger: Debugger) -> None:
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start, end = ((hour - timedelta(hours=hours)).isoformat() for hours in (3, 2))
    store(debugger.client, event("first", timestamp=start), event("last", timestamp=end))
    debugger.visit(range="own", start_time=start, end_time=end)
    debugger.shows("last", "first")
    eventually(lambda: debugger.text("#matches") == "2 events")
    assert sum(bars_of(debugger)) == 2


@no_browser
def test_the_count_is_live(debugger: Debugger) -> None:
    store(debugger.client, event("a", timestamp=ago(9)))
    debugger.opens("#matches", "1 event")
    store(debugger.client, event("b", timestamp=ago(8)))
    debugger.opens("#matches", "2 events")


# ---------------------------------------------------------------------------------------------- usage


def usage_of_models(debugger: Debugger, **parameters: str) -> None:
    for number in range(3):
        properties = {"model": "large", "tokens": ["1", 2, "many"][number], "job": {"cost": 5}}
        store(debugger.client, event(f"e{number}", timestamp=ago(9), properties=properties))
    debugger.visit(view="usage", **parameters)


@no_browser
def test_usage_opens_with_a_question_and_what_there_is_to_choose(debugger: Debugger) -> None:
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


@no_browser
def test_a_sum_follows_what_arrives_unless_paused(debugger: Debugger) -> None:
    def arrives(tokens: int, matches: str) -> None:
        store(debugger.client, event(timestamp=ago(9), properties={"tokens": tokens}))
        debugger.opens("#matches", matches)

    usage_of_models(debugger, event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#sum", "3")
    arrives(10, "4 events match")
    eventually(lambda: debugger.text("#sum") == "13")
    eventually(lambda: debugger.ask("state.summed === state.total"))  # nothing is under way that would see the next one
    debugger.click("#pause")
    assert debugger.text("#pulse") == "Paused"
    arrives(100, "5 events match")
    arrives(1000, "6 events match")
    assert debugger.text("#sum") == "13"
    debugger.click("#pause")
    eventually(lambda: debugger.text("#sum") == "1,113")


@no_browser
def test_a_sum_asks_of_which_property(debugger: Debugger) -> None:
    usage_of_models(debugger, event_name="call", aggregation_type="SUM")
    debugger.opens("#ask h2", "SUM of which property?")
    debugger.click("#ask div:last-child button:nth-of-type(2)")
    debugger.opens("#usage-says", "SUM of tokens. A number in tokens: 2 of 3 events.")
    assert debugger.text("#sum") == "3"


@no_browser
@table(
    ("name", "says"),
    [
        ("model", "A number in model: 0 of 3 events."),
        ("missing", "A number in missing: 0 of 3 events."),
        ("job.cost", "0 of 3 events. Properties are looked up at the top level, and job is an object."),
        ("no.such", "A number in no.such: 0 of 3 events."),
    ],
)
def test_a_sum_of_nothing_says_so(debugger: Debugger, name: str, says: str) -> None:
    usage_of_models(debugger, event_name="call", aggregation_type="SUM", property_name=name)
    debugger.opens("#usage-says", says)
    assert not debugger.find("#usage table").is_displayed()


@no_browser
def test_white_space_around_a_number_makes_it_none_as_in_the_api(debugger: Debugger) -> None:
    numbers = ("1", " 2", "0x3", "4e0")
    store(debugger.client, *(event(timestamp=ago(9), properties={"tokens": number}) for number in numbers))
    debugger.visit(view="usage", event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#usage-says", "A number in tokens: 2 of 4 events.")
    assert debugger.text("#sum") == "5"


@no_browser
def test_windows_are_named_in_words(debugger: Debugger) -> None:
    sizes = debugger.texts("#window_size option")
    assert sizes[:5] == ["the whole range", "1 minute", "15 minutes", "30 minutes", "1 hour"]
    assert sizes[-3:] == ["1 day", "1 week", "1 month"]


# ---------------------------------------------------------------------------------------------- meters


def make_meter(debugger: Debugger, kind: str = "SUM", field: str | None = "tokens", **fields: Any) -> str:
    body = {"name": "Tokens", "event_name": "call", "aggregation": {"type": kind, "field": field}}
    response = debugger.client.post("/v1/meters", json=body | {"reset_usage": "BILLING_PERIOD"} | fields)
    assert response.status_code == 201, response.text
    return str(response.json()["id"])


def store_tokens(debugger: Debugger, *tokens: object, hours: float = 2, **fields: Any) -> None:
    """Of one window each call, if it is two hours long or shorter than those between two calls."""
    for number in tokens:
        properties = fields.get("properties", {}) | {"tokens": number}
        store(debugger.client, event(timestamp=ago(3600 * hours), **fields | {"properties": properties}))


def asked(debugger: Debugger, path: str) -> int:
    """How often the page has asked for it since it was opened."""
    names = "performance.getEntriesByType('resource').map((one) => new URL(one.name).pathname)"
    return list(debugger.ask(names)).count(path)


@no_browser
def test_meters_are_offered_beside_event_names_and_one_chosen_says_what_it_counts(debugger: Debugger) -> None:
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
    debugger.visit(view="usage", meter_id=large)  # as somebody may write it
    debugger.opens("#sum", "3")
    debugger.visit(view="usage", meter_id="meter_unknown")
    debugger.opens("#notice", "This environment has no such meter.")


@no_browser
@table(("group_by", "heads", "totals"), [
    ("source", ["app", "no source"], ["0.75", "0.1"]),
    ("model", ["large", "no model"], ["0.6", "0.25"]),
    ("properties.model", ["large", "no model"], ["0.6", "0.25"]),
    ("external_customer_id", ["cust", "other"], ["0.75", "0.1"]),
], ids=str)  # fmt: skip
def test_a_meter_is_grouped_by_source_or_a_property(
    debugger: Debugger, group_by: str, heads: list[Any], totals: list[Any]
) -> None:
    store_tokens(debugger, "0.5", source="app", properties={"model": "large"})
    store_tokens(debugger, "0.25", source="app")
    store_tokens(debugger, "0.1", external_customer_id="other", properties={"model": "large"})
    debugger.visit(view="usage", meter_id=make_meter(debugger), group_by=group_by, window_size="DAY")
    debugger.opens("#sum", "0.85")
    assert debugger.texts("#groups th")[1:] == [f"{head}{head}" for head in heads]  # its mark has it as a title
    rows = debugger.ask("[...document.querySelectorAll('#windows tr')].map((row) => row.innerText.split('\\t'))")
    assert rows[0] == ["whole range", *totals]
    assert len(rows) == 2
    assert rows[1][1:] == totals
    assert debugger.ask("document.getElementById('group_by').list.options.length") == 3  # source, tokens, model


@no_browser
def test_of_a_meter_with_a_feature_analytics_is_asked_for_no_other(debugger: Debugger) -> None:
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
        assert debugger.text("#sum") == "1"


@no_browser
def test_a_meter_s_events_are_counted_and_added_up_once(debugger: Debugger) -> None:
    store_tokens(debugger, 1, 2)
    store_tokens(debugger, 4, event_name="other")
    debugger.visit(view="usage", meter_id=make_meter(debugger))
    debugger.opens("#sum", "3")
    assert debugger.text("#matches") == "2 events match"
    before = asked(debugger, "/v1/events/monitoring")
    eventually(lambda: asked(debugger, "/v1/events/monitoring") > before)
    assert asked(debugger, "/v1/events/usage/meter") == 2  # in all, and by window


@no_browser
@table(("kind", "stacked"), [("SUM", True), ("COUNT", True), ("MAX", False)])
def test_the_chart_stacks_what_can_be_added_up_and_has_a_title_for_each_part(
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


@no_browser
@table(("kind", "others"), [("SUM", ["19.5", "19.5"]), ("AVG", ["", ""])])
def test_of_many_groups_the_largest_have_a_colour_and_the_others_are_one(
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


@no_browser
@table("scheme", ["light", "dark"])
def test_every_colour_of_the_chart_is_seen(debugger: Debugger, scheme: str) -> None:
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


@no_browser
def test_empty_states_say_what_to_send_first(debugger: Debugger) -> None:
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


@no_browser
def test_a_question_is_made_a_meter_by_the_line_below_it_and_the_meter_is_there_at_once(debugger: Debugger) -> None:
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


@no_browser
def test_opening_usage_asks_for_it_once(debugger: Debugger) -> None:
    usage_of_models(debugger, event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#sum", "3")
    before = asked(debugger, "/v1/events/monitoring")
    eventually(lambda: asked(debugger, "/v1/events/monitoring") > before + 1)  # it has been counted again
    assert asked(debugger, "/v1/events/usage") == 2  # in all, and by window


@no_browser
def test_a_server_without_meters_offers_event_names_only(browser: Debugger, tmp_path: Path) -> None:
    browser.look()
    for name in ("eventstore.py", "schema.sql", "debugger.html"):
        shutil.copy(ROOT / name, tmp_path)
    alone = (sys.executable, "-S", tmp_path / "eventstore.py")  # without the links of site-packages to this checkout
    libraries = {"PYTHONPATH": os.pathsep.join(sysconfig.get_path(name) for name in ("purelib", "platlib"))}
    with Live(tmp_path, "--api-key", "key", command=alone, **libraries) as live, live.client("key") as client:
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


# ---------------------------------------------------------------------------------------------- forwarding


@no_browser
def test_it_says_where_the_server_forwards_to_and_how_far_it_is_behind(browser: Debugger, tmp_path: Path) -> None:
    browser.look()
    flags = ("--api-key", "key", "--forward-to", "http://127.0.0.1:1/v1")  # where nobody listens
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


@no_browser
def test_it_says_nothing_of_forwarding_where_there_is_none(debugger: Debugger) -> None:
    debugger.opens("#matches", "0 events")
    assert debugger.text("#forwards") == ""


# ---------------------------------------------------------------------------------------------- the header and the footer


@no_browser
def test_a_long_environment_name_is_cut_and_the_header_stays_in_one_row(browser: Debugger, tmp_path: Path) -> None:
    browser.look()
    with Live(tmp_path, "--api-key", "key=" + "long-name-" * 12) as live:
        browser.open(f"{live.url}/#key=key")
        browser.opens("#pulse", "Live")
        assert browser.ask("document.querySelector('header').getBoundingClientRect().height") < 60
        assert browser.ask("document.getElementById('environment').title") == "long-name-" * 12
        browser.open("about:blank")


@no_browser
def test_the_footer_names_the_keys_that_do_something(debugger: Debugger) -> None:
    shown = "[...document.querySelectorAll('footer > span')].filter((node) => node.checkVisibility()).map((node) => node.textContent)"
    store(debugger.client, event("a", timestamp=ago(9)))
    debugger.shows("a")
    debugger.click("#show-usage")
    assert debugger.ask(shown) == ["/ filter"]
    debugger.click("#show-events")
    assert debugger.ask(shown) == ["j k move", "Enter open", "/ filter", "Esc close"]


# ---------------------------------------------------------------------------------------------- time zone


@no_browser
def test_one_time_zone_is_named_and_holds_everywhere(debugger: Debugger) -> None:
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
    eventually(lambda: debugger.text("#zone option:checked") == "UTC")  # it is remembered
    debugger.ask("(document.getElementById('start_time').value = '2026-03-09T12:00:00', readFields())")
    assert debugger.address()["start_time"] == ["2026-03-09T12:00:00.000Z"]


# ---------------------------------------------------------------------------------------------- the list and its event


@no_browser
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
    debugger.visit(open="odd / id?", event_id="b")  # it is not in the list
    debugger.opens("#detail dl", "odd / id?")
    debugger.press(Keys.ESCAPE)
    assert debugger.address() == {"event_id": ["b"]}
    debugger.visit(open="nobody")
    debugger.opens("#notice", "This environment has no event nobody.")


@no_browser
def test_an_empty_source_and_customer_id_look_alike(debugger: Debugger) -> None:
    store(debugger.client, event("a"))
    debugger.shows("a")
    debugger.click(".row .time")
    names, values = debugger.texts("#detail dt"), debugger.texts("#detail dd")
    shown = dict(zip(names, values, strict=True))
    assert (shown["source"], shown["customer_id"]) == ("\u2013", "\u2013")


@no_browser
def test_the_marks_have_names_and_are_seen_on_the_row_under_the_pointer(debugger: Debugger) -> None:
    from selenium.webdriver import ActionChains

    store(debugger.client, event("a", properties={"region": "eu"}))
    debugger.shows("a")
    opacity = "getComputedStyle(document.querySelector('.row .brief .only')).opacity"
    assert debugger.ask(opacity) == "0"
    ActionChains(debugger.driver).move_to_element(debugger.find(".row .time")).perform()
    eventually(lambda: debugger.ask(opacity) == "1")
    assert debugger.find(".row .brief .only").accessible_name == "Only events with region: eu"
    ActionChains(debugger.driver).move_to_element(debugger.find("h1")).perform()


@no_browser
@table(("span", "shown"), [("24h", False), ("7d", True)])
def test_a_phone_shows_the_date_where_the_range_is_longer_than_a_day(
    debugger: Debugger, span: str, shown: bool
) -> None:
    debugger.look(390, 800)
    store(debugger.client, event("a"))
    debugger.visit(range=span)
    debugger.shows("a")
    eventually(lambda: not debugger.ask("document.querySelector('.row.new')"))  # which says "new" in its place
    assert (f"{datetime.now(UTC) + timedelta(hours=4.5):%m-%d }" in debugger.find(".row .time").text + " ") is shown


# ---------------------------------------------------------------------------------------------- nothing there


@no_browser
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


@no_browser
def test_no_events_match_is_said_of_filters_only_and_the_environment_keeps_its_name(debugger: Debugger) -> None:
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


# ---------------------------------------------------------------------------------------------- looks


@no_browser
def test_at_1400_pixels_a_date_field_shows_its_whole_date_and_all_filters_are_in_one_row(debugger: Debugger) -> None:
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


@no_browser
@table("width", [380, 1280])
def test_whatever_the_state_is_called_it_stands_in_the_first_row(debugger: Debugger, width: int) -> None:
    debugger.look(width, 800)
    debugger.visit(range="own", start_time=ago(3600), end_time=ago(60))
    debugger.opens("#pulse", "Fixed range")
    tops = [debugger.ask("document.querySelector(arguments[0]).getBoundingClientRect().bottom", name) for name in ("h1", "#pulse", ".tabs")]  # fmt: skip
    assert abs(tops[0] - tops[1]) < 8
    assert debugger.ask("document.querySelector('h1').getBoundingClientRect().height") < 30
    assert (tops[2] > tops[1] + 20) is (width == 380)


@no_browser
def test_no_error_stands_under_a_focus_ring(debugger: Debugger) -> None:
    debugger.visit(property_filters="abc")
    debugger.opens("#property_filters-fault", "must ")
    debugger.click("#property_filters")
    bottom, top = debugger.ask(
        "[document.getElementById('property_filters').getBoundingClientRect().bottom + 3, "  # the ring: 1 away, 2 wide
        "document.getElementById('property_filters-fault').getBoundingClientRect().top]"
    )
    assert top >= bottom


@no_browser
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


@no_browser
def test_a_fault_names_its_field_once(debugger: Debugger) -> None:
    debugger.click("#send")
    debugger.fill("#send-input", "{}")
    debugger.click("#send-form .main")
    debugger.opens("#answer", "event_name is required")
    assert debugger.texts("#answer li") == ["event_name is required", "external_customer_id is required"]
    debugger.click("#send-dialog .close")


# ---------------------------------------------------------------------------------------------- below a path


@contextmanager
def proxy(port: str, prefix: str) -> Iterator[str]:
    """A reverse proxy that has the server below a path, and nothing else."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.path.partition("?")[0] != prefix and not self.path.startswith(prefix + "/"):
                self.send_error(404)
                return
            upstream = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
            path = "/" + self.path[len(prefix) :].removeprefix("/")
            upstream.request(self.command, path, body, dict(self.headers))
            answer = upstream.getresponse()
            content = answer.read()
            self.send_response(answer.status)
            for name, value in answer.getheaders():
                if name.lower() not in ("content-length", "connection", "date", "server"):
                    self.send_header(name, value)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)
            upstream.close()

        do_POST = do_GET  # noqa: N815

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}{prefix}"
    finally:
        server.shutdown()
        server.server_close()


@no_browser
@table("slash", ["/", ""])
def test_it_works_below_a_path_behind_a_proxy(debugger: Debugger, slash: str) -> None:
    with proxy(debugger.live.port, "/flexprice") as url:
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
        debugger.driver.refresh()  # the key is kept below this path
        debugger.opens("#ask", "Which events")
        debugger.click("#send")
        debugger.click("#send-form .main")
        debugger.opens("#answer", "202 stored")
        debugger.open(f"{debugger.live.url}/health")  # not to miss the proxy


@no_browser
def test_the_page_names_no_address_from_the_root(debugger: Debugger) -> None:
    source = debugger.ask("document.querySelector('script').textContent")
    assert re.findall(r"[\"'`]/(?:v1|health)", source) == []
