"""What the event debugger promises since its count follows the filters, in a real browser."""

from __future__ import annotations

import http.client
import os
import re
import shutil
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from starlette.testclient import TestClient

from eventstore import ApiKey, Settings, create_app
from test_eventstore import _clean_environment, ago, browser, debugger, event, eventually, no_browser, store, table

__all__ = ["_clean_environment", "browser", "debugger"]  # fixtures

pytestmark = no_browser
COMMA = '{"city":["Paris, France"]}'


@pytest.fixture(autouse=True)
def _local_time(browser) -> Iterator[None]:
    """Each test begins by the clock of its computer, in Kabul: half an hour tells it from all whole zones."""
    browser.driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": "Asia/Kabul"})
    yield
    browser.ask("localStorage.clear()")
    browser.driver.execute_cdp_cmd("Emulation.setTimezoneOverride", {"timezoneId": ""})


def link(debugger, **parameters: str) -> str:
    return f"{debugger.live.url}/?{urllib.parse.urlencode(parameters)}"


def address(debugger) -> dict[str, list[str]]:
    return urllib.parse.parse_qs(urllib.parse.urlsplit(debugger.driver.current_url).query)


def bars(debugger) -> int:
    """How many events the histogram shows."""
    return debugger.ask(
        "[...document.querySelectorAll('#bars rect')].reduce((sum, bar) => sum + Number(bar.dataset.count), 0)"
    )


def places(debugger, *selectors: str) -> list[list[float]]:
    """Where things are on the screen, and how wide they are."""
    box = "(({ x, y, width }) => [x, y, width])(document.querySelector(arguments[0]).getBoundingClientRect())"
    return [[round(number) for number in debugger.ask(box, selector)] for selector in selectors]


# ---------------------------------------------------------------------------------------------- count and histogram


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
def test_the_count_and_the_histogram_follow_the_filters(debugger, filters, found):
    fields = [{"external_customer_id": "acme"}] * 2 + [{"external_customer_id": "acme", "event_name": "other"}]
    fields += [{"source": "app"}, {"properties": {"region": "eu"}}, {"properties": {"region": "us"}}]
    store(debugger.client, *(event(f"e{number}", timestamp=ago(9), **one) for number, one in enumerate(fields)))
    debugger.open(link(debugger, **filters))
    eventually(lambda: debugger.text("#matches") == found)
    assert bars(debugger) == int(found.split()[0])
    assert debugger.text("#bars-say") == "A bar is 15 minutes"


def test_a_filter_that_no_url_can_hold_is_counted_and_the_bars_say_that_they_leave_it_out(debugger):
    cities = ("Paris, France", "Paris, France", "Rome")
    store(
        debugger.client, *(event(f"e{n}", timestamp=ago(9), properties={"city": city}) for n, city in enumerate(cities))
    )
    debugger.open(link(debugger, property_filters=COMMA))
    eventually(lambda: debugger.text("#matches") == "2 events match")
    assert (len(debugger.ids()), bars(debugger)) == (2, 3)
    assert "the bars leave out the property filter" in debugger.text("#bars-say")


def test_an_event_at_the_end_of_the_range_is_listed_and_counted(debugger):
    hour = datetime.now(UTC).replace(minute=0, second=0, microsecond=0)
    start, end = ((hour - timedelta(hours=hours)).isoformat() for hours in (3, 2))
    store(debugger.client, event("first", timestamp=start), event("last", timestamp=end))
    debugger.open(link(debugger, range="own", start_time=start, end_time=end))
    debugger.shows("last", "first")
    eventually(lambda: debugger.text("#matches") == "2 events")
    assert bars(debugger) == 2


def test_the_count_is_live(debugger):
    store(debugger.client, event("a", timestamp=ago(9)))
    debugger.opens("#matches", "1 event")
    store(debugger.client, event("b", timestamp=ago(8)))
    debugger.opens("#matches", "2 events")


# ---------------------------------------------------------------------------------------------- usage


def usage_of_models(debugger, **parameters: str) -> None:
    for number in range(3):
        properties = {"model": "large", "tokens": ["1", 2, "many"][number], "job": {"cost": 5}}
        store(debugger.client, event(f"e{number}", timestamp=ago(9), properties=properties))
    debugger.open(link(debugger, view="usage", **parameters))


def test_usage_opens_with_a_question_and_what_there_is_to_choose(debugger):
    usage_of_models(debugger)
    debugger.opens("#ask h2", "Which events")
    assert debugger.texts("#ask button") == ["call", "cust", "model", "tokens", "job"]
    assert debugger.texts(".fault") == [""] * len(debugger.texts(".fault"))
    debugger.click("#ask button")
    debugger.opens("#usage-says", "COUNT of events")
    assert (debugger.text("#sum"), address(debugger)["event_name"]) == ("3", ["call"])
    assert debugger.ask("document.getElementById('ask').hidden")
    assert debugger.ask("[...document.getElementById('event_name').list.options].map((option) => option.value)") == [
        "call"
    ]


def test_a_sum_asks_of_which_property(debugger):
    usage_of_models(debugger, event_name="call", aggregation_type="SUM")
    debugger.opens("#ask h2", "SUM of which property?")
    debugger.click("#ask p:last-child button:nth-of-type(2)")
    debugger.opens("#usage-says", "2 of 3 events have a number in tokens")
    assert debugger.text("#sum") == "3"


@table(
    ("name", "says"),
    [
        ("model", "0 of 3 events have a number in model."),
        ("missing", "0 of 3 events have a number in missing."),
        (
            "job.cost",
            "0 of 3 events have a number in job.cost: properties are looked up at the top level, and job is an object.",
        ),
        ("no.such", "0 of 3 events have a number in no.such."),
    ],
)
def test_a_sum_of_nothing_says_so(debugger, name, says):
    usage_of_models(debugger, event_name="call", aggregation_type="SUM", property_name=name)
    debugger.opens("#usage-says", says)
    assert debugger.ask("document.querySelector('#usage table').hidden")


def test_windows_are_named_in_words(debugger):
    sizes = debugger.texts("#window_size option")
    assert sizes[:5] == ["the whole range", "1 minute", "15 minutes", "30 minutes", "1 hour"]
    assert sizes[-3:] == ["1 day", "1 week", "1 month"]


# ---------------------------------------------------------------------------------------------- time zone


def test_one_time_zone_is_named_and_holds_everywhere(debugger):
    time, in_kabul = datetime(2026, 3, 9, 20, 10, 5, 123456, UTC), "2026-03-10 00:40:05.123456"
    store(debugger.client, event("a", timestamp=time.isoformat()))
    where = {"range": "own", "start_time": "2026-03-09T00:00:00Z", "end_time": "2026-03-10T00:00:00Z", "open": "a"}
    for zone, at, start in (("Asia/Kabul (local)", in_kabul, "04:30"), ("UTC", "2026-03-09 20:10:05.123456", "00:00")):
        debugger.open(link(debugger, **where))
        debugger.opens("#detail dl", at)
        assert debugger.ask("document.getElementById('zone').selectedOptions[0].text") == zone
        assert at[5:23] in debugger.text(".row .time")
        assert debugger.ask("document.getElementById('start_time').value").startswith(f"2026-03-09T{start}")
        eventually(lambda start=start: debugger.text("#from") == f"2026-03-09 {start}")
        debugger.open(link(debugger, **where, view="usage", event_name="call", window_size="DAY"))
        debugger.opens("#windows td", at[:10] + " 00:00")
        debugger.find("#zone").send_keys("UTC")
        eventually(
            lambda: debugger.ask("document.readyState === 'complete' && document.getElementById('zone').value") == "utc"
        )
    debugger.open(link(debugger, range="own", start_time=where["start_time"]))
    eventually(lambda: debugger.text("#zone option:checked") == "UTC")  # it is remembered
    debugger.ask("(document.getElementById('start_time').value = '2026-03-09T12:00:00', readFields())")
    assert address(debugger)["start_time"] == ["2026-03-09T12:00:00.000Z"]


# ---------------------------------------------------------------------------------------------- the list and its event


def test_the_open_event_is_in_the_address_and_a_link_opens_it(debugger):
    from selenium.webdriver.common.keys import Keys

    store(debugger.client, event("odd / id?", timestamp=ago(9)), event("b", timestamp=ago(8)))
    debugger.shows("b", "odd / id?")
    debugger.click(".row:last-child .time")
    assert address(debugger) == {"open": ["odd / id?"]}
    debugger.press("k")
    assert address(debugger) == {"open": ["b"]}
    debugger.driver.back()
    eventually(lambda: debugger.ask("document.getElementById('detail').hidden"))
    debugger.open(link(debugger, open="odd / id?"))
    debugger.opens("#detail dl", "odd / id?")
    assert debugger.text(".row[aria-selected=true] .id") == "odd / id?"
    debugger.open(link(debugger, open="odd / id?", event_id="b"))  # it is not in the list
    debugger.opens("#detail dl", "odd / id?")
    debugger.press(Keys.ESCAPE)
    assert address(debugger) == {"event_id": ["b"]}
    debugger.open(link(debugger, open="nobody"))
    debugger.opens("#notice", "This environment has no event nobody.")


def test_an_empty_source_and_customer_id_look_alike(debugger):
    store(debugger.client, event("a"))
    debugger.shows("a")
    debugger.click(".row .time")
    names, values = debugger.texts("#detail dt"), debugger.texts("#detail dd")
    shown = dict(zip(names, values, strict=True))
    assert (shown["source"], shown["customer_id"]) == ("\u2013", "\u2013")


def test_the_marks_have_names_and_are_seen_on_the_row_under_the_pointer(debugger):
    from selenium.webdriver import ActionChains

    store(debugger.client, event("a", properties={"region": "eu"}))
    debugger.shows("a")
    opacity = "getComputedStyle(document.querySelector('.row .brief .only')).opacity"
    assert debugger.ask(opacity) == "0"
    ActionChains(debugger.driver).move_to_element(debugger.find(".row .time")).perform()
    eventually(lambda: debugger.ask(opacity) == "1")
    assert debugger.find(".row .brief .only").accessible_name == "Only events with region: eu"
    ActionChains(debugger.driver).move_to_element(debugger.find("h1")).perform()


@table(("span", "shown"), [("24h", False), ("7d", True)])
def test_a_phone_shows_the_date_where_the_range_is_longer_than_a_day(debugger, span, shown):
    debugger.look(390, 800)
    store(debugger.client, event("a"))
    debugger.open(link(debugger, range=span))
    debugger.shows("a")
    eventually(lambda: not debugger.ask("document.querySelector('.row.new')"))  # which says "new" in its place
    assert (f"{datetime.now(UTC) + timedelta(hours=4.5):%m-%d }" in debugger.find(".row .time").text + " ") is shown


# ---------------------------------------------------------------------------------------------- nothing there


def test_an_empty_environment_shows_how_to_send_the_first_event(debugger, tmp_path):
    debugger.opens("#first", "No events yet")
    name = debugger.key.replace("key", "environment")
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


def test_no_events_match_is_said_of_filters_only_and_the_environment_keeps_its_name(debugger):
    name = debugger.key.replace("key", "environment")
    debugger.open(link(debugger, source="nobody"))
    debugger.opens("#foot", "No events match.")
    assert debugger.text("#environment") == name
    store(debugger.client, event("old", timestamp="2026-01-02T03:04:05Z"))
    debugger.click("#clear")
    debugger.opens("#foot", "No events in this range. The newest is of 2026-01-02 07:34.")
    assert "match" not in debugger.text("#foot")
    debugger.open(link(debugger, property_filters="abc"))
    debugger.opens("#property_filters-fault", "must ")
    assert debugger.text("#environment") == name
    debugger.open(link(debugger, range="own", start_time="2026-01-01T00:00:00Z"))
    debugger.shows("old")


def test_monitoring_names_the_environment_in_a_header(tmp_path):
    settings = Settings(db=str(tmp_path / "db"), api_keys=(ApiKey.hashed("key", "Zürich 1"),))
    with TestClient(create_app(settings), headers={"x-api-key": "key"}) as client:
        assert client.get("/v1/events/monitoring").headers["X-Environment-Id"] == "Z%C3%BCrich%201"


# ---------------------------------------------------------------------------------------------- looks


def test_at_1400_pixels_a_date_field_shows_its_whole_date_and_all_filters_are_in_one_row(debugger):
    debugger.look(1400, 900)
    start, end = "2026-11-20T22:10:20Z", "2026-11-21T22:10:20Z"
    debugger.open(link(debugger, range="own", start_time=start, end_time=end))
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


def test_no_error_stands_under_a_focus_ring(debugger):
    debugger.open(link(debugger, property_filters="abc"))
    debugger.opens("#property_filters-fault", "must ")
    debugger.click("#property_filters")
    bottom, top = debugger.ask(
        "[document.getElementById('property_filters').getBoundingClientRect().bottom + 3, "  # the ring: 1 away, 2 wide
        "document.getElementById('property_filters-fault').getBoundingClientRect().top]"
    )
    assert top >= bottom


def test_nothing_moves_when_clear_filters_or_copied_appears(debugger):
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


def test_a_fault_names_its_field_once(debugger):
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


@table("slash", ["/", ""])
def test_it_works_below_a_path_behind_a_proxy(debugger, slash):
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


def test_the_page_names_no_address_from_the_root(debugger):
    source = debugger.ask("document.querySelector('script').textContent")
    assert re.findall(r"[\"'`]/(?:v1|health)", source) == []
