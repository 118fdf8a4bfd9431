"""Test that the debugger shows what the server has, or says that it does not know."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from browser import Debugger, Proxy, ago, bars_of, environment_of, needs_browser, places, some
from eventstore_extras.mock import running_server
from helpers import NOW, Live, at, database, event, eventually, store, table


@contextmanager
def before_scripts(debugger: Debugger, source: str) -> Iterator[None]:
    """Run the source in each page that is opened inside the block, before the page's own script."""
    command = "Page.addScriptToEvaluateOnNewDocument"
    identifier = debugger.driver.execute_cdp_cmd(command, {"source": source})["identifier"]
    yield
    debugger.driver.execute_cdp_cmd("Page.removeScriptToEvaluateOnNewDocument", {"identifier": identifier})


@pytest.fixture
def proxy(debugger: Debugger) -> Iterator[Proxy]:
    """A proxy in front of the server, through which the page is open; the test may cause failures there."""
    with Proxy(debugger.live.port) as proxy:
        debugger.open(f"{proxy.url}/#key={debugger.key}")
        debugger.opens("#pulse", "Live")
        yield proxy
        debugger.open(f"{debugger.live.url}/health")  # leave the proxy before it stops
        debugger.complaints("the server responded with a status of ")


@pytest.fixture
def own(browser: Debugger, tmp_path: Path) -> Iterator[Live]:
    """A server for one test, with the key `key`; the page shows it."""
    browser.look()
    with Live(tmp_path, "--api-key", "key") as live, live.client("key") as browser.client:
        browser.open(f"{live.url}/#key=key")
        browser.opens("#pulse", "Live")
        yield live
        browser.open("about:blank")
        browser.complaints()


def delete(folder: Path, condition: str) -> None:
    with database(folder, timeout=30) as conn:
        conn.execute(f"DELETE FROM events WHERE {condition}")
        conn.commit()


# ---------------------------------------------------------------------------------------------- clocks


SHIFTED = """
const RealDate = Date;
globalThis.shift_ms = %s;
globalThis.Date = class extends RealDate {
  constructor(...given) { super(...(given.length ? given : [RealDate.now() + shift_ms])); }
  static now() { return RealDate.now() + shift_ms; }
};
"""


@needs_browser
@table("minutes", [-5, 20, -3 * 24 * 60, 40 * 365 * 24 * 60])
@table("span", ["15m", "24h"])
def test_a_wrong_clock_of_the_browser_changes_nothing(debugger: Debugger, minutes: int, span: str) -> None:
    store(debugger.client, event("a", timestamp=ago(100)), event("b", timestamp=ago(1)))
    with before_scripts(debugger, SHIFTED % (minutes * 60_000)):
        debugger.visit(range=span)
        debugger.shows("b", "a")
        debugger.opens("#matches", "2 events")
        assert (sum(bars_of(debugger)), debugger.text("#notice")) == (2, "")
        store(debugger.client, event("c"))
        debugger.shows("c", "b", "a")
        debugger.opens("#matches", "3 events")


@needs_browser
def test_a_clock_that_is_set_while_the_page_is_open_changes_nothing(debugger: Debugger) -> None:
    with before_scripts(debugger, SHIFTED % 0):
        debugger.visit(range="15m")
        debugger.opens("#pulse", "Live")
        for minutes, event_id in ((-90, "a"), (90, "b")):
            debugger.ask("globalThis.shift_ms = arguments[0]", minutes * 60_000)
            store(debugger.client, event(event_id))
            debugger.gives("document.querySelector('.row .id')?.textContent", event_id)
        debugger.opens("#matches", "2 events")
        assert debugger.text("#notice") == ""


@needs_browser
@table("now_us", [NOW, 0])
def test_the_clock_of_a_mock_decides_what_the_last_minutes_are(browser: Debugger, now_us: int) -> None:
    browser.look()
    with running_server(clock=lambda: now_us) as server:
        headers = {"x-api-key": server.api_key}
        sent = [event("now"), event("an hour ago", timestamp=at(now_us - NOW - 3_600_000_000))]
        httpx.post(f"{server.url}/events/bulk", headers=headers, json={"events": sent}).raise_for_status()
        browser.open(f"{server.url.removesuffix('v1')}?range=15m#key={server.api_key}")
        browser.shows("now")
        browser.opens("#matches", "1 event")
        browser.open("about:blank")
    browser.complaints()


@needs_browser
def test_an_event_that_leaves_the_range_leaves_list_and_count(debugger: Debugger) -> None:
    store(debugger.client, event("leaves", timestamp=ago(893)), event("stays", timestamp=ago(100)))
    debugger.visit(range="15m")
    debugger.shows("stays", "leaves")
    debugger.shows("stays")
    debugger.gives("document.getElementById('matches').textContent", "1 event")


@needs_browser
def test_the_page_follows_the_time_zone_of_the_machine(debugger: Debugger) -> None:
    store(debugger.client, event("a", timestamp=ago(9)))
    debugger.shows("a")
    override = "Emulation.setTimezoneOverride"
    debugger.driver.execute_cdp_cmd(override, {"timezoneId": "Asia/Tokyo"})
    try:
        debugger.opens("#zone option:checked", "Asia/Tokyo (local)")
        eventually(
            lambda: debugger.text(".row .time").strip() == debugger.ask("clock(state.events[0].timestamp).slice(-18)")
        )
    finally:
        debugger.driver.execute_cdp_cmd(override, {"timezoneId": "Asia/Kabul"})


@needs_browser
def test_a_page_that_was_hidden_shows_what_is_stored_when_it_is_seen_again(
    own: Live, browser: Debugger, tmp_path: Path
) -> None:
    store(browser.client, event("kept", timestamp=ago(20)), event("deleted", timestamp=ago(10)))
    browser.shows("deleted", "kept")
    hide = "(Object.defineProperty(document, 'hidden', { value: arguments[0], configurable: true }), document.dispatchEvent(new Event('visibilitychange')))"
    browser.ask(hide, True)
    delete(tmp_path, "id = 'deleted'")
    store(browser.client, event("late", timestamp=ago(30)), event("new", timestamp=ago(1)))
    browser.ask(hide, False)
    browser.shows("new", "kept", "late")
    browser.opens("#matches", "3 events")


# ---------------------------------------------------------------------------------------------- site data


BLOCKED = {
    "no access": "for (const name of ['localStorage', 'sessionStorage']) Object.defineProperty(window, name, "
    "{ get() { throw new DOMException('Access is denied', 'SecurityError'); } });",
    "no room": "Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError'); };",
    "absent": "for (const name of ['localStorage', 'sessionStorage']) "
    "Object.defineProperty(window, name, { value: null });",
}


@needs_browser
@table("kind", BLOCKED)
def test_without_site_data_the_page_keeps_key_and_zone_in_memory(debugger: Debugger, kind: str) -> None:
    store(debugger.client, event("a", timestamp=ago(5)))
    debugger.ask("sessionStorage.clear()")
    with before_scripts(debugger, BLOCKED[kind]):
        debugger.visit()
        eventually(lambda: debugger.ask("document.getElementById('key-dialog').open"))
        debugger.fill("#key-input", debugger.key)
        debugger.click("#key-form .main")
        debugger.shows("a")
        debugger.find("#zone").send_keys("UTC")
        eventually(
            lambda: (
                debugger.text(".row .time").strip()
                == ago()[5:10] + debugger.ask("state.events[0].timestamp")[10:23].replace("T", " ")
            )
        )
        debugger.open(f"{debugger.live.url}/#key={debugger.key}")
        debugger.shows("a")
        assert debugger.driver.current_url == f"{debugger.live.url}/"
    debugger.visit()


# ---------------------------------------------------------------------------------------------- server and proxy


@needs_browser
@table("view", ["events", "usage"])
def test_the_page_notices_that_a_server_hangs_and_that_it_answers_again(
    own: Live, browser: Debugger, view: str
) -> None:
    store(browser.client, event("before", timestamp=ago(5)))
    browser.shows("before")
    browser.click(f"#show-{view}")
    eventually(lambda: not browser.ask("state.stale"))
    own.process.send_signal(signal.SIGSTOP)
    try:
        browser.opens("#pulse", "Waiting")
        browser.opens("#pulse", "Reconnecting")
        assert "The server does not answer." in browser.text("#notice")
    finally:
        own.process.send_signal(signal.SIGCONT)
    browser.opens("#pulse", "Live")
    store(browser.client, event("after"))
    browser.opens("#matches", "2 events")
    assert browser.text("#notice") == ""


@needs_browser
def test_filters_changed_while_the_server_hangs_do_not_leave_the_old_events(own: Live, browser: Debugger) -> None:
    store(browser.client, event("a", timestamp=ago(5)), event("b", source="app", timestamp=ago(4)))
    browser.shows("b", "a")
    own.process.send_signal(signal.SIGSTOP)
    browser.fill("#source", "app")
    browser.opens("#pulse", "Reconnecting")
    assert (browser.ids(), browser.text("#foot")) == ([], "Loading …")
    own.process.send_signal(signal.SIGCONT)
    browser.shows("b")


FROM_PROXIES = {
    "404": (404, "<h1>Not Found</h1>"), "403": (403, "<h1>Forbidden</h1>"), "502": (502, "Bad Gateway"),
    "400": (400, "<h1>The plain HTTP request was sent to HTTPS port</h1>"), "401": (401, "<h1>Log in</h1>"),
    "404 as JSON": (404, '{"message": "no Route matched with those values"}'),
    "401 as JSON": (401, '{"message": "Unauthorized"}'), "a log-in page": (200, "<h1>Log in</h1>"), "null": (200, "null"),
    "an API's 404": (404, '{"code": "not_found", "message": "nothing here", "http_status_code": 404, "details": {}}'),
}  # fmt: skip


@needs_browser
@table("kind", FROM_PROXIES)
def test_an_answer_from_a_proxy_does_not_end_polling(debugger: Debugger, proxy: Proxy, kind: str) -> None:
    store(debugger.client, event("before", timestamp=ago(5)))
    debugger.shows("before")
    before = places(debugger, "#events", "#rows", "#bars")
    proxy.answer = lambda path: FROM_PROXIES[kind]
    debugger.opens("#pulse", "Reconnecting")
    assert (debugger.ids(), debugger.text("#notice") != "") == (["before"], True)
    assert places(debugger, "#events", "#rows", "#bars") == before
    proxy.answer = lambda path: None
    store(debugger.client, event("after"))
    debugger.shows("after", "before")
    debugger.gives("document.getElementById('notice').textContent", "")
    assert debugger.text("#pulse") == "Live"


@needs_browser
def test_a_single_lost_answer_shows_no_notice(debugger: Debugger, proxy: Proxy) -> None:
    store(debugger.client, event("a", timestamp=ago(5)))
    debugger.shows("a")
    changes = "(window.changes = [], new MutationObserver(() => changes.push(1)).observe(document.getElementById('notice'), { childList: true, subtree: true }))"
    debugger.ask(changes)
    asked: list[str] = []

    def every_third(path: str) -> tuple[int, str] | None:
        asked.append(path)
        return (502, "Bad Gateway") if len(asked) % 3 == 0 else None

    proxy.answer = every_third
    eventually(lambda: len(asked) > 20)
    assert (debugger.ask("changes"), debugger.text("#pulse")) == ([], "Live")


@needs_browser
def test_a_revoked_key_ends_polling_and_a_new_one_starts_it(browser: Debugger, tmp_path: Path) -> None:
    browser.look()
    keys = tmp_path / "keys"
    keys.write_text("old\n")
    with Live(tmp_path, "--api-key-file", str(keys)) as live, live.client("old") as client:
        store(client, event("a", timestamp=ago(5)))
        browser.open(f"{live.url}/#key=old")
        browser.shows("a")
        browser.click(".row .time")
        keys.write_text("new\n")
        live.process.send_signal(signal.SIGHUP)
        browser.opens("#pulse", "Refused")
        browser.opens("#key-fault", "does not know")
        assert (browser.ids(), browser.find("#detail").is_displayed()) == ([], False)
        browser.fill("#key-input", "new")
        browser.click("#key-form .main")
        browser.shows("a")
        browser.opens("#pulse", "Live")
        assert browser.text("#notice") == ""
        browser.open("about:blank")
    browser.complaints()


@needs_browser
def test_a_key_that_moves_to_another_environment_takes_the_page_along(browser: Debugger, tmp_path: Path) -> None:
    browser.look()
    keys = tmp_path / "keys"
    keys.write_text("key=blue\n")
    with Live(tmp_path, "--api-key-file", str(keys)) as live, live.client("key") as client:
        store(client, event("a", timestamp=ago(5)))
        browser.open(f"{live.url}/#key=key")
        browser.shows("a")
        keys.write_text("key=green\n")
        live.process.send_signal(signal.SIGHUP)
        browser.opens("#environment", "green")
        browser.shows()
        eventually(browser.find("#first").is_displayed)
        browser.open("about:blank")
    browser.complaints()


@needs_browser
def test_a_server_of_another_version_asks_for_a_reload(debugger: Debugger, proxy: Proxy) -> None:
    eventually(lambda: debugger.ask("state.version"))
    proxy.answer = lambda path: (200, '{"status":"ok","version":"99.0"}') if path == "/health" else None
    debugger.opens("#notice", "The server is version 99.0 now")
    debugger.click("#notice button")
    eventually(lambda: debugger.ask("state.version") == "99.0")
    assert debugger.text("#notice") == ""


@needs_browser
def test_a_server_that_cannot_store_events_is_named(debugger: Debugger, proxy: Proxy) -> None:
    failing = json.dumps({"status": "failing", "version": debugger.ask("state.version"), "reason": "the disk is full"})
    proxy.answer = lambda path: (503, failing) if path == "/health" else None
    debugger.opens("#notice", "The server cannot store events: the disk is full.")
    proxy.answer = lambda path: None
    debugger.gives("document.getElementById('notice').textContent", "")


@needs_browser
def test_names_that_the_server_ignored_are_shown(debugger: Debugger, proxy: Proxy) -> None:
    proxy.headers = {"X-Ignored": "event_nam, a%2Cb%0A, %FF"}
    debugger.opens("#notice", "event_nam, a,b\n, %FF.")
    debugger.click("#send")
    debugger.click("#send-form .main")
    debugger.opens("#answer", "Ignored: event_nam, a,b\n, %FF")
    debugger.click("#send-dialog .close")


@needs_browser
def test_a_misspelled_field_of_a_test_event_is_named(browser: Debugger, tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", "key") as live:
        browser.open(f"{live.url}/#key=key")
        browser.opens("#pulse", "Live")
        browser.click("#send")
        body = {"event_name": "call", "external_customer_id": "cust", "properteis": {}}
        browser.fill("#send-input", json.dumps(body))
        browser.click("#send-form .main")
        browser.opens("#answer", "Ignored: properteis")
        browser.click("#send-dialog .close")
        browser.opens("#notice", "The server ignored what it does not know in v1/events: properteis.")
        browser.open("about:blank")


@needs_browser
def test_two_tabs_show_two_environments(debugger: Debugger) -> None:
    store(debugger.client, event("mine", timestamp=ago(5)))
    debugger.shows("mine")
    (first,) = debugger.driver.window_handles
    other = debugger.keys.pop()
    debugger.driver.switch_to.new_window("tab")
    try:
        debugger.driver.get(f"{debugger.live.url}/#key={other}")
        debugger.opens("#environment", environment_of(other))
        debugger.opens("#first", "No events yet")
    finally:
        debugger.driver.close()
        debugger.driver.switch_to.window(first)
    store(debugger.client, event("new"))
    debugger.shows("new", "mine")
    debugger.driver.refresh()
    debugger.shows("new", "mine")


# ---------------------------------------------------------------------------------------------- the list follows


@needs_browser
def test_a_deleted_event_leaves_list_count_and_detail(own: Live, browser: Debugger, tmp_path: Path) -> None:
    store(browser.client, *(event(event_id, timestamp=ago(9 - at)) for at, event_id in enumerate("abc")))
    browser.shows("c", "b", "a")
    browser.click(".row:nth-child(2) .time")
    delete(tmp_path, "id = 'b'")
    browser.shows("c", "a")
    browser.opens("#matches", "2 events")
    browser.opens("#notice", "This environment has no event b.")
    assert not browser.find("#detail").is_displayed()
    assert browser.address() == {}
    delete(tmp_path, "1")
    browser.shows()
    assert browser.find("#first").is_displayed()


@needs_browser
def test_an_open_event_stays_while_others_are_deleted(own: Live, browser: Debugger, tmp_path: Path) -> None:
    store(browser.client, *(event(event_id, timestamp=ago(9 - at)) for at, event_id in enumerate("abc")))
    browser.shows("c", "b", "a")
    browser.click(".row:nth-child(2) .time")
    browser.ask("document.querySelector('#detail dl').id = 'untouched'")
    delete(tmp_path, "id <> 'b'")
    browser.shows("b")
    eventually(lambda: not browser.ask("state.doubted"))
    assert browser.find("#untouched").is_displayed()
    assert browser.text(".row[aria-selected=true] .id") == "b"


@needs_browser
def test_an_id_that_was_deleted_and_stored_again_shows_its_new_content(
    own: Live, browser: Debugger, tmp_path: Path
) -> None:
    store(browser.client, event("a", timestamp=ago(9), properties={"n": 1}), event("b", timestamp=ago(8)))
    browser.shows("b", "a")
    delete(tmp_path, "1")
    store(browser.client, event("a", timestamp=ago(1), properties={"n": 2}))
    browser.shows("a")
    browser.opens(".row .brief", "n: 2")


@needs_browser
def test_events_exchanged_for_as_many_older_ones_are_noticed(own: Live, browser: Debugger, tmp_path: Path) -> None:
    store(browser.client, event("a", timestamp=ago(9)), event("b", timestamp=ago(8)))
    browser.opens("#matches", "2 events")
    with database(tmp_path, timeout=30) as conn:
        conn.execute("UPDATE events SET id = id || '-other', timestamp_us = timestamp_us - 60000000")
        conn.commit()
    browser.shows("b-other", "a-other")


@needs_browser
def test_a_paused_list_follows_when_it_is_resumed(own: Live, browser: Debugger, tmp_path: Path) -> None:
    store(browser.client, event("a", timestamp=ago(9)), event("b", timestamp=ago(8)))
    browser.shows("b", "a")
    browser.click("#pause")
    delete(tmp_path, "id = 'a'")
    browser.opens("#matches", "1 event")
    assert (browser.text("#pulse"), browser.ids()) == ("Paused", ["b", "a"])
    browser.click("#pause")
    browser.shows("b")


@needs_browser
def test_a_sum_follows_deleted_events(own: Live, browser: Debugger, tmp_path: Path) -> None:
    store(browser.client, *(event(f"e{n}", timestamp=ago(9), properties={"tokens": n}) for n in range(1, 4)))
    browser.open(f"{own.url}/?view=usage&event_name=call&aggregation_type=SUM&property_name=tokens")
    browser.opens("#sum", "6")
    delete(tmp_path, "id = 'e2'")
    browser.gives("document.getElementById('sum').textContent", "4")
    delete(tmp_path, "1")
    eventually(lambda: "0 of 0 events" in browser.text("#usage-says") or browser.text("#sum") == "0")


@needs_browser
def test_events_deleted_while_the_list_is_scrolled_leave_it_and_the_view_stays(
    own: Live, browser: Debugger, tmp_path: Path
) -> None:
    store(browser.client, *some(900))
    browser.open(f"{own.url}/")
    eventually(browser.ids)

    def scrolls() -> bool:
        browser.ask("document.getElementById('scroll').scrollTo(0, 600 * 34)")
        return "e0290" in browser.ids()

    eventually(scrolls)
    eventually(lambda: browser.ask("state.total") == 900)
    first = "(() => { const top = list.getBoundingClientRect().top; return [...document.querySelectorAll('.row')].find((row) => row.getBoundingClientRect().bottom > top + 1).querySelector('.id').textContent; })()"
    seen = browser.ask(first)
    delete(tmp_path, "id >= 'e0800' OR id = 'e0290'")
    browser.opens("#matches", "799 events")
    eventually(lambda: "e0290" not in browser.ids())
    assert browser.ask(first) == seen
    delete(tmp_path, "id < 'e0795'")
    browser.shows(*[f"e{number:04}" for number in range(799, 794, -1)])


@needs_browser
def test_an_event_that_arrives_with_an_old_time_appears_and_is_marked(debugger: Debugger) -> None:
    store(debugger.client, *some(60))
    eventually(lambda: debugger.ids()[:1] == ["e0059"])
    debugger.opens("#matches", "60 events")
    store(debugger.client, event("late", timestamp=ago(600.45)))
    eventually(lambda: "late" in debugger.ask("state.events.map(({ id }) => id)"))
    assert debugger.ask("state.events.filter((one) => arrivedAt.has(one)).some(({ id }) => id === 'late')")
    debugger.opens("#matches", "61 events")


COSTS = "performance.getEntriesByType('resource').map((one) => [new URL(one.name).pathname, one.encodedBodySize])"


@needs_browser
def test_an_idle_page_costs_a_few_hundred_bytes_per_poll(debugger: Debugger, proxy: Proxy) -> None:
    store(
        debugger.client, *(event(f"e{n}", timestamp=ago(60 - n), properties={"text": "x" * 100_000}) for n in range(30))
    )
    eventually(lambda: len(debugger.ids()) > 10)
    for view, parts in (("events", ["/query"]), ("usage", ["/events", "/meters"])):
        debugger.click(f"#show-{view}")
        eventually(lambda: not debugger.ask("state.stale") and debugger.ask("state.bars"))
        eventually(lambda: debugger.ask("state.barsOf === barsWanted()"))
        debugger.ask("performance.clearResourceTimings()")
        eventually(lambda: len(debugger.ask(COSTS)) > 8)
        costs: list[Any] = debugger.ask(COSTS)
        assert [cost for cost in costs if cost[1] > 300] == []
        for part in parts:
            assert any(path.endswith(part) for path, _ in costs)


# ---------------------------------------------------------------------------------------------- filters and address


@needs_browser
@table("source", ["a\nb", "\nab", "a\r\nb", "a\rb"])
def test_a_filter_that_was_not_edited_keeps_its_line_break(debugger: Debugger, source: str) -> None:
    store(debugger.client, event("right", source=source, timestamp=ago(9)))
    store(debugger.client, event("wrong", source="ab", timestamp=ago(8)))
    debugger.shows("wrong", "right")
    debugger.click(".row:last-child .source .only")
    debugger.shows("right")
    debugger.fill("#event_name", "call")
    eventually(lambda: debugger.address().get("event_name") == ["call"])
    debugger.shows("right")
    assert debugger.address()["source"] == [source]
    debugger.fill("#source", "ab")
    if source.replace("\r", "").replace("\n", "") == "ab":
        assert debugger.ask("values.source") in (source, "ab")


@needs_browser
def test_a_value_that_a_field_cannot_show_survives_a_change_of_another(debugger: Debugger) -> None:
    store(debugger.client, event("a", timestamp="2026-01-02T03:04:05.678901Z", properties={"city": "x\ny"}))
    given = {"range": "own", "start_time": "2026-01-02T03:04:05.678901Z", "property_filters": "city:x\ny"}
    debugger.visit(**given)
    debugger.shows("a")
    debugger.fill("#event_name", "call")
    debugger.opens("#matches", "1 event matches")
    assert debugger.address() == {name: [value] for name, value in given.items()} | {"event_name": ["call"]}


@needs_browser
@table("name", ["toString", "constructor", "__proto__", "hasOwnProperty", "valueOf"])
def test_names_of_object_prototype_mean_nothing_in_the_address(debugger: Debugger, name: str) -> None:
    store(debugger.client, event("a", timestamp=ago(9), properties={"tokens": 1}))
    debugger.visit(range=name, view=name, open=name)
    debugger.shows("a")
    debugger.opens("#notice", f"This environment has no event {name}.")
    debugger.opens("#matches", "1 event")
    assert debugger.ask("values.range") == "24h"
    for kind in ("SUM", "COUNT_UNIQUE"):
        debugger.visit(view="usage", event_name="call", aggregation_type=kind, property_name=name)
        debugger.opens("#usage-says", f"in {name}: 0 of 1 event")


@needs_browser
def test_closing_takes_back_the_step_that_opened(debugger: Debugger) -> None:
    from selenium.webdriver.common.keys import Keys

    store(debugger.client, *some(5))
    debugger.visit(range="1h")
    eventually(lambda: len(debugger.ids()) == 5)
    before = debugger.ask("history.length")
    for number in range(1, 6):
        debugger.click(f".row:nth-child({number}) .time")
        eventually(lambda: "open" in debugger.address())
        debugger.press(Keys.ESCAPE)
        assert not debugger.find("#detail").is_displayed()
        eventually(lambda: debugger.address() == {"range": ["1h"]})
    assert debugger.ask("history.length") <= before + 1
    debugger.click(".row:nth-child(2) .time")
    debugger.press("j", "j")
    debugger.driver.back()
    eventually(lambda: debugger.address() == {"range": ["1h"]})
    assert not debugger.find("#detail").is_displayed()
    assert debugger.ask("document.activeElement.id") == "scroll"


@needs_browser
def test_an_event_opened_at_once_after_closing_another_stays_open(debugger: Debugger) -> None:
    store(debugger.client, *some(3))
    eventually(lambda: len(debugger.ids()) == 3)
    debugger.click(".row .time")
    debugger.ask("(closeEvent(), openEvent(state.events[2]))")
    eventually(lambda: debugger.address() == {"open": ["e0000"]} and not debugger.ask("isClosing"))
    assert "e0000" in debugger.text("#detail dl")
    debugger.driver.back()
    eventually(lambda: not debugger.find("#detail").is_displayed())


@needs_browser
@table("across", [".id", ".name", ".brief"])
def test_a_drag_over_text_selects_it_and_opens_nothing(debugger: Debugger, across: str) -> None:
    from selenium.webdriver import ActionChains

    store(debugger.client, event("an-event-with-a-long-id", timestamp=ago(9), properties={"region": "europe"}))
    eventually(debugger.ids)
    text = debugger.find(f".row {across} .value")
    half = text.size["width"] // 2 - 2
    drag = ActionChains(debugger.driver).move_to_element_with_offset(text, -half, 0)
    drag.click_and_hold().move_by_offset(2 * half, 0).release().perform()
    assert debugger.ask("getSelection().toString().length") > 1
    assert not debugger.find("#detail").is_displayed()
    debugger.click(".row .time")
    assert debugger.find("#detail").is_displayed()


# ---------------------------------------------------------------------------------------------- reading the table


def tree_of(debugger: Debugger) -> list[dict[str, Any]]:
    """Return the accessibility tree's nodes: role, name, properties, and the elements that properties point to."""
    debugger.driver.execute_cdp_cmd("Accessibility.enable", {})
    nodes = debugger.driver.execute_cdp_cmd("Accessibility.getFullAXTree", {})["nodes"]
    debugger.driver.execute_cdp_cmd("Accessibility.disable", {})
    found = []
    for node in nodes:
        if node["ignored"]:
            continue
        properties = {one["name"]: one["value"] for one in node.get("properties", [])}
        found.append({"role": node["role"]["value"], "name": node["name"]["value"], "element": node.get("backendDOMNodeId"),
                      "points": {name: value.get("relatedNodes") for name, value in properties.items()},
                      **{name: value.get("value") for name, value in properties.items()}})  # fmt: skip
    return found


@needs_browser
@table("width", [1280, 390])
def test_a_screen_reader_finds_headers_rows_and_the_active_row(debugger: Debugger, width: int) -> None:
    from selenium.webdriver.common.keys import Keys

    debugger.look(width, 800)
    store(debugger.client, *some(3))
    debugger.open(f"{debugger.live.url}/")
    eventually(lambda: len(debugger.ids()) == 3)
    debugger.ask("document.getElementById('scroll').focus()")
    debugger.press(Keys.ARROW_DOWN)
    nodes = tree_of(debugger)
    (grid,) = (node for node in nodes if node["role"] == "grid")
    assert (grid["name"], grid["focused"]) == ("Events, newest first", True)
    (active,) = grid["points"]["activedescendant"]
    (row,) = (node for node in nodes if node["element"] == active["backendDOMNodeId"])
    assert (row["role"], row["selected"]) == ("row", True)
    assert row["name"].startswith("call, cust, ")
    assert row["name"].endswith(", e0001")
    headers = [node["name"] for node in nodes if node["role"] == "columnheader"]
    assert headers == [
        "Time",
        "Event name",
        "Customer",
        *(["Source", "Event id"] if width == 1280 else []),
        "Properties",
    ]
    rows = [node for node in nodes if node["role"] == "row"]
    cells = [node for node in nodes if node["role"] == "gridcell"]
    assert (len(rows), len(cells)) == (4, 3 * len(headers))
    debugger.press(Keys.END)
    assert debugger.text(".row[aria-selected=true] .id") == "e0000"
    debugger.press(Keys.HOME, Keys.ENTER)
    (detail,) = (node for node in tree_of(debugger) if node.get("focused") and node["role"] != "RootWebArea")
    assert detail["name"] == "Event e0002"


@needs_browser
def test_the_list_has_an_active_row_as_soon_as_it_has_the_focus(debugger: Debugger) -> None:
    store(debugger.client, *some(3))
    eventually(lambda: len(debugger.ids()) == 3)
    debugger.ask("document.getElementById('scroll').focus()")
    active = "document.getElementById(list.getAttribute('aria-activedescendant')).querySelector('.id').textContent"
    assert debugger.ask(active) == "e0002"
    debugger.press("j", "j")
    assert (debugger.ask(active), debugger.ask("document.activeElement.id")) == ("e0000", "scroll")


@needs_browser
@table("width", [1280, 2000])
@table("length", [40, 300])
def test_ids_that_differ_only_at_their_end_look_different(debugger: Debugger, width: int, length: int) -> None:
    debugger.look(width, 800)
    long = "request-" + "0123456789" * (length // 10)
    store(
        debugger.client,
        *(event(f"{long}-{end}", external_customer_id=f"{long}-{end}", timestamp=ago(9)) for end in ("aa", "bb")),
    )
    eventually(lambda: len(debugger.ids()) == 2)
    for column in ("id", "customer"):
        ends = debugger.ask(
            """[...document.querySelectorAll(arguments[0])].map((cell) => {
              const end = cell.querySelector(".value").lastChild, box = end.getBoundingClientRect(), { right } = cell.getBoundingClientRect();
              return [end.textContent.slice(-2), box.width > 20 && box.right <= right];
            })""",
            f".row .{column}",
        )
        assert sorted(ends) == [["aa", True], ["bb", True]]


@needs_browser
def test_at_390_pixels_everything_is_reachable(debugger: Debugger) -> None:
    debugger.look(390, 800)
    store(debugger.client, *some(40, source="app", properties={"model": "large", "tokens": 5}))
    debugger.open(f"{debugger.live.url}/")
    eventually(lambda: len(debugger.ids()) > 5)
    outside = """[...document.querySelectorAll("button, input, select, summary, h1, #pulse, #matches")].filter((node) => {
      if (!node.checkVisibility() || node.matches(".only")) return false;
      const { left, right } = node.getBoundingClientRect();
      return left < 0 || right > innerWidth;
    }).map((node) => node.id || node.textContent)"""
    assert debugger.ask(outside) == []
    assert debugger.ask("list.clientHeight") > 250
    debugger.click(".row .time")
    assert debugger.ask(outside) == []
    debugger.click("#detail [aria-label=Close]")
    debugger.click("#filters summary")
    assert debugger.ask(outside) == []
    debugger.visit(view="usage", event_name="call", aggregation_type="SUM", property_name="tokens")
    debugger.opens("#sum", "200")
    assert debugger.ask(outside) == []


@needs_browser
def test_queries_leave_out_the_fields_that_are_empty(debugger: Debugger) -> None:
    store(debugger.client, event("a", timestamp=ago(9), properties={"city": "Paris, France"}))
    debugger.shows("a")
    debugger.ask("(window.bodies = [], window.sent = request, request = (path, body, signal) => "
                 "(bodies.push(body ?? path), sent(path, body, signal)))")  # fmt: skip
    debugger.fill("#property_filters", '{"city": ["Paris, France"]}')
    debugger.opens("#matches", "1 event matches")
    debugger.ask("change({ view: (state.view = 'usage'), event_name: 'call', window_size: '' })")
    debugger.opens("#sum", "1")
    bodies: list[str] = debugger.ask("bodies")
    assert any('"iter_first_key"' in body for body in bodies)
    assert [body for body in bodies if '""' in body or re.search(r"=(&|$)", body)] == []
