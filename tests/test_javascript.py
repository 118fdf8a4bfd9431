"""FlexPrice's SDK for JavaScript, as npm has it, against a real server."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from forked import ROOT
from helpers import KEY, Live, environ_to_download, run

SDK = "@flexprice/sdk@^2.0.1"
CLIENT = """
import { Flexprice } from "@flexprice/sdk";
const flexprice = new Flexprice({ serverURL: process.env.FLEXPRICE_API_HOST, apiKeyAuth: process.env.FLEXPRICE_API_KEY });
async function refusal(call) {
    try { await call; } catch (e) { return { name: e.name, message: e.message, statusCode: e.statusCode, body: e.body }; }
}
"""


@pytest.fixture(scope="session")
def node_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A folder with the SDK in it."""
    if not (shutil.which("node") and shutil.which("npm")):
        pytest.skip("needs node and npm")
    folder = tmp_path_factory.mktemp("node")
    (folder / "package.json").write_text('{"private": true}')
    install = ("npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", SDK)
    done = run(*install, cwd=folder, timeout=300, env=environ_to_download())
    if done.returncode != 0:
        pytest.skip(f"npm cannot install {SDK}: {done.stderr.strip()[-300:]}")
    return folder


@pytest.fixture
def javascript(node_folder: Any, live: Live) -> Callable[..., str]:
    """Runs a module and returns what it prints."""

    def run_module(code: str, **variables: str) -> str:
        (node_folder / "module.mjs").write_text(code)
        environ = os.environ | {"FLEXPRICE_API_HOST": f"{live.url}/v1", "FLEXPRICE_API_KEY": KEY} | variables
        done = run("node", "module.mjs", cwd=node_folder, env=environ)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run_module


@pytest.mark.slow
def test_the_snippet_of_the_readme_sends_an_event_and_lists_it(javascript: Any, live: Live) -> None:
    (snippet,) = re.findall(r"^```js\n(.*?)^```$", (ROOT / "README.md").read_text("utf-8"), re.MULTILINE | re.DOTALL)
    here = snippet.replace("http://127.0.0.1:8080", live.url)
    assert here != snippet
    printed = javascript(here)
    assert re.search(r"eventName: 'api_request'.*tokens: '1250'", printed, re.DOTALL), printed


@pytest.mark.slow
def test_the_javascript_sdk_sends_lists_pages_and_aggregates(javascript: Any) -> None:
    code = """
        const who = { externalCustomerId: "js" };
        await flexprice.events.ingestEvent({ eventName: "one", eventId: "js one", ...who });
        const events = [...Array(120).keys()].map((n) =>
            ({ eventName: "many", eventId: `js ${n}`, properties: { n: String(n) }, ...who }));
        await flexprice.events.ingestEventsBulk({ events });
        const pages = [await flexprice.events.listRawEvents({ ...who, pageSize: 50 })];
        while (pages.at(-1).hasMore)
            pages.push(await flexprice.events.listRawEvents({ ...who, pageSize: 50, iterLastKey: pages.at(-1).iterLastKey }));
        const usage = await flexprice.events.getUsageStatistics(
            { eventName: "many", aggregationType: "SUM", propertyName: "n", ...who });
        console.log(JSON.stringify({
            sizes: pages.map((page) => page.events.length),
            different: new Set(pages.flatMap((page) => page.events.map((event) => event.id))).size,
            usage: usage.value,
            found: (await flexprice.events.getEvent("js one")).event.id,
        }));
    """
    answer = json.loads(javascript(CLIENT + code))
    assert answer == {"sizes": [50, 50, 21], "different": 121, "usage": sum(range(120)), "found": "js one"}


@pytest.mark.slow
def test_the_javascript_sdk_throws_the_servers_message(javascript: Any) -> None:
    code = """
        const events = [{ eventName: "good", externalCustomerId: "c" }, { eventName: "", externalCustomerId: "c" }];
        console.log(JSON.stringify([
            await refusal(flexprice.events.ingestEventsBulk({ events })), await refusal(flexprice.events.getEvent("nope")),
        ]));
    """
    bad_event, unknown = json.loads(javascript(CLIENT + code))
    assert (bad_event["name"], bad_event["statusCode"]) == ("ErrorsErrorsErrorResponse", 400)
    assert bad_event["message"] == "1 of 2 events is invalid; nothing was stored"
    (fault,) = json.loads(bad_event["body"])["details"]["errors"]
    assert (fault["index"], fault["field"]) == (1, "event_name")
    assert unknown["statusCode"] == 404
    assert "nope" in unknown["message"]


@contextmanager
def other_server() -> Iterator[tuple[str, list[str]]]:
    """A server that answers with its own refusal, and what came to it."""
    came: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            came.append(self.path)
            self.send_response(400)
            self.send_header("content-type", "application/json")
            self.end_headers()
            error = {"message": "from the other server", "internal_error": None}
            body = {
                "code": "validation_error",
                "http_status_code": 400,
                "details": {},
                "success": False,
                "error": error,
            }
            self.wfile.write(json.dumps(body | {"message": error["message"]}).encode())

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1", came
        server.shutdown()


@pytest.mark.slow
def test_with_one_javascript_client_customers_go_elsewhere_and_events_here(javascript: Any) -> None:
    code = """
        const other = { serverURL: process.env.OTHER_URL };
        const e = await refusal(flexprice.customers.createCustomer({ externalId: "cust_42", name: "Ada" }, other));
        await flexprice.events.ingestEvent({ eventName: "call", externalCustomerId: "cust_42", eventId: "js elsewhere" });
        console.log(e.message, (await flexprice.events.getEvent("js elsewhere")).event.id);
    """
    with other_server() as (url, came):
        assert javascript(CLIENT + code, OTHER_URL=url) == "from the other server js elsewhere\n"
        assert came == ["/v1/customers"]


@pytest.mark.slow
def test_with_one_python_client_customers_go_elsewhere_and_events_here(live: Live) -> None:
    from flexprice import Flexprice
    from flexprice.models.errors import FlexpriceError

    with other_server() as (url, came), Flexprice(server_url=f"{live.url}/v1", api_key_auth=KEY) as sdk:
        with pytest.raises(FlexpriceError, match="from the other server"):
            sdk.customers.create_customer(external_id="cust_42", name="Ada", server_url=url)
        sdk.events.ingest_event(event_name="call", external_customer_id="cust_42", event_id="elsewhere")
        assert sdk.events.get_event(id="elsewhere", external_customer_id="cust_42").event.id == "elsewhere"
        assert came == ["/v1/customers"]
