"""Drive the debugger's page in Chromium, and read what the page shows."""

from __future__ import annotations

import http.client
import shutil
import threading
import urllib.parse
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any, TypeVar

import httpx
import pytest

from helpers import Live, event, eventually

if TYPE_CHECKING:
    from selenium.webdriver.remote.webelement import WebElement

Test = TypeVar("Test", bound=Callable[..., None])


# Debian also builds the browser without windows and toolbars, which halves its CPU time. Start the browser itself: the
# script in /usr/bin does not pass on the signal that ends it.
CHROMIUM = shutil.which("chromium-headless-shell", path="/usr/lib/chromium") or shutil.which("chromium") or ""


def needs_browser(test: Test) -> Test:
    """Mark a test that drives Chromium as slow, and skip it if Chromium is missing."""
    is_there = CHROMIUM and shutil.which("chromedriver")
    needs = pytest.mark.skipif(not is_there, reason="needs a browser: apt-get install chromium chromium-driver")
    marked: Test = pytest.mark.slow(needs(test))
    return marked


# The page polls the server every second, and after a failure it waits twice as long each time, from 0.5 s to 8 s.
# Makes these waits four times as short, so that tests wait less. A button shows "Copied" for 1.5 s; on a loaded machine
# that may pass between two looks at the page, so it stays for a minute.
POLL_SOONER = """
const later = setTimeout, waits = [500, 1000, 2000, 4000, 8000];
const duration = (ms) => (waits.includes(ms) ? ms / 4 : ms === 1500 ? 60000 : ms);
globalThis.setTimeout = (call, ms, ...rest) => later(call, duration(ms), ...rest);
"""

# Answer a question as soon as the answer is the expected one, at the latest after a second: the page asks itself every
# 20 ms, because each question of a test costs 6 ms of CPU time.
WAIT_IN_PAGE = """(async (...arguments) => {
    for (let left = 50; ; left--) {
        const got = %s;
        if (!left || %s) return got;
        await new Promise((done) => setTimeout(done, 20));
    }
})(...arguments)"""


class Debugger:
    """The page in a real browser, used as a person would. Its time zone is Kabul, 4.5 hours ahead of UTC."""

    live: Live
    keys: list[str]
    key: str
    client: httpx.Client

    def __init__(self) -> None:
        from selenium import webdriver

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        for flag in (
            "headless=new",
            "no-sandbox",
            "disable-dev-shm-usage",
            "disable-gpu",
            "no-proxy-server",
            "disable-features=BackForwardCache,ProactivelySwapBrowsingInstance",  # keep no page that was left
        ):
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
        """Return the parameters in the address bar."""
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
        """Type the text into the field key by key, then leave the field."""
        field = self.find(selector)
        field.clear()
        field.send_keys(text)
        self.ask("document.activeElement.blur()")

    def ids(self) -> list[str]:
        return self.texts(".row .id")

    def shows(self, *event_ids: str) -> None:
        self.gives("[...document.querySelectorAll('.row .id')].map((node) => node.textContent)", [*event_ids])

    def gives(self, script: str, value: object) -> None:
        same = "JSON.stringify(got) === JSON.stringify(arguments[0])"
        eventually(lambda: self.ask(WAIT_IN_PAGE % (script, same), value) == value)

    def opens(self, selector: str, part: str) -> None:
        text = "document.querySelector(arguments[0])?.textContent ?? ''"
        eventually(lambda: part in self.ask(WAIT_IN_PAGE % (text, "got.includes(arguments[1])"), selector, part))

    def pasted(self) -> str:
        """Return the text in the clipboard, by pasting it into a field of the page."""
        from selenium.webdriver.common.keys import Keys

        self.click("#send")
        self.find("#send-input").clear()
        self.find("#send-input").send_keys(Keys.CONTROL, "v")
        text = self.ask("document.getElementById('send-input').value")
        self.click("#send-dialog .close")
        return str(text)

    def complaints(self, but: str = "the server responded with a status of 4") -> list[str]:
        """Return and clear the messages of the browser's console, except those of refusals that tests provoke."""
        lines: list[dict[str, str]] = self.driver.get_log("browser")  # type: ignore[no-untyped-call]
        return [line["message"] for line in lines if but not in line["message"]]


class Proxy:
    """A context manager for a reverse proxy that serves a server below a path, and nothing else.

    `answer` may return a status and a body for a path; then the proxy does not pass the request on. `headers` are
    added to what the server answers.
    """

    def __init__(self, port: str, prefix: str = "") -> None:
        self.answer: Callable[[str], tuple[int, str] | None] = lambda path: None
        self.headers: dict[str, str] = {}
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                path = "/" + self.path[len(prefix) :].removeprefix("/")
                if self.path.partition("?")[0] != prefix and not self.path.startswith(prefix + "/"):
                    self.send_error(404)
                elif given := proxy.answer(path):
                    self.reply(given[0], given[1].encode(), {})
                else:
                    upstream = http.client.HTTPConnection("127.0.0.1", int(port), timeout=30)
                    upstream.request(self.command, path, body, dict(self.headers))
                    answer = upstream.getresponse()
                    dropped = ("content-length", "connection", "date", "server")
                    headers = {name: value for name, value in answer.getheaders() if name.lower() not in dropped}
                    self.reply(answer.status, answer.read(), headers | proxy.headers)
                    upstream.close()

            do_POST = do_GET  # noqa: N815

            def reply(self, status: int, content: bytes, headers: dict[str, str]) -> None:
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(content))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}{prefix}"

    def __enter__(self) -> Proxy:
        threading.Thread(target=self.server.serve_forever, args=[0.01], daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()


def environment_of(key: str) -> str:
    return key.replace("key", "environment")


def ago(seconds: float = 0) -> str:
    return (datetime.now(UTC) - timedelta(seconds=seconds)).isoformat()


def bars_of(debugger: Debugger) -> list[int]:
    """Return the number of events for each bar of the histogram, after a check that only non-empty bars are drawn."""
    counts = debugger.ask("state.bars.counts")
    assert [height > 0 for height in heights(debugger, "bars")] == [count > 0 for count in counts]
    return list(counts)


def places(debugger: Debugger, *selectors: str) -> list[list[float]]:
    """Return x, y and width of each element, in pixels."""
    box = "(({ x, y, width }) => [x, y, width])(document.querySelector(arguments[0]).getBoundingClientRect())"
    return [[round(number) for number in debugger.ask(box, selector)] for selector in selectors]


def heights(debugger: Debugger, name: str = "chart") -> list[float]:
    """Return the heights of the bars of a drawing, in the order of time."""
    parts = "[...document.getElementById(arguments[0]).children]"
    return list(debugger.ask(f"{parts}.map((bar) => Number(bar.getAttribute('height')))", name))


def some(count: int, **fields: Any) -> list[dict[str, Any]]:
    """Return events of the last minutes, oldest first, with the ids e0000, e0001 ..."""
    return [event(f"e{number:04}", timestamp=ago(600 - number / 100), **fields) for number in range(count)]
