"""Run the examples of README.md and docs/, follow the links, and compare the pages with the code.

Each page gets its own server in its own folder. In a ```console block, lines after `$ ` are commands; a line after `> `
continues the command. The other lines are the expected output. Ids, keys, times of the run, durations and versions
may differ; a later command that uses an id from the page gets the id of the run. The ```python blocks of a page form one
program, which runs last and must print the page's ```text blocks. Blocks of other languages are not run.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, NamedTuple, get_args

import httpx
import msgspec
import pytest

import eventstore
from eventstore_extras import analytics, features, meters, usage
from eventstore_extras.mock import MockServer, running_server
from helpers import Live, eventually, free_port, refusal

ROOT = Path(__file__).resolve().parent.parent
README = ROOT / "README.md"
FILES = (README, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md")))
PAGES = {str(path.relative_to(ROOT)): path.read_text("utf-8") for path in FILES}
DEPLOYING, RELIABILITY, OUTBOX, MOVING, REFERENCE, API, ANALYTICS, METERS, FIDELITY = (
    PAGES[f"docs/{name}.md"]
    for name in ("deploying", "reliability", "outbox", "moving", "reference", "api", "analytics", "meters", "fidelity")
)
API_PAGES = tuple(PAGES[f"docs/{name}.md"] for name in ("api", "sending", "querying", "usage", "meters", "analytics"))
EVENTSTORE = (sys.executable, "-m", "eventstore")
KEY = "key-of-the-pages"
EVENT = {"event_name": "call", "external_customer_id": "cust"}
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
each_page = pytest.mark.parametrize("name", PAGES)
needs_shell = pytest.mark.skipif(not (shutil.which("bash") and shutil.which("curl")), reason="needs bash and curl")


def blocks(page: str, language: str) -> list[str]:
    return [text for name, text in BLOCK.findall(page) if name == language]


def section(page: str, heading: str, level: int = 2) -> str:
    """Return the text under a heading, up to the next heading of its level or above."""
    pattern = rf"^{'#' * level} {heading}\n(.*?)(?=^#{{2,{level}}} |\Z)"
    (found,) = re.findall(pattern, page, re.MULTILINE | re.DOTALL)
    return str(found)


def prose(page: str) -> str:
    return BLOCK.sub("", page)


# ---------------------------------------------------------------------------------------------- processes


def environment(folder: Path, **variables: str) -> dict[str, str]:
    (folder / ".curlrc").write_text("silent\nshow-error\n")  # without a terminal, curl prints a progress meter
    others = {name: value for name, value in os.environ.items() if not name.startswith(("EVENTSTORE_", "FLEXPRICE_"))}
    ours = {"FLEXPRICE_API_KEY": KEY, "CURL_HOME": str(folder), "PYTHONPATH": str(ROOT), "NO_PROXY": "127.0.0.1"}
    return others | ours | variables


def run(folder: Path, *command: object, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run a command; its stdout includes what it wrote to stderr."""
    return subprocess.run(
        [*map(str, command)], cwd=folder, env=environment(folder, **variables), stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=120, check=False
    )  # fmt: skip


def wait_for(port: int, process: subprocess.Popen[Any]) -> None:
    """Wait for an answer. The port accepts connections before that, while the server still opens its database."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            httpx.get(f"http://127.0.0.1:{port}/health", timeout=60)
            return
        except httpx.TransportError:
            assert process.poll() is None, f"{process.args!r} ended with {process.returncode}"
            time.sleep(0.05)
    raise AssertionError(f"nothing listens on port {port}")


@contextmanager
def ended(process: subprocess.Popen[Any]) -> Iterator[subprocess.Popen[Any]]:
    try:
        yield process
    finally:
        process.terminate()
        process.wait(30)


@contextmanager
def serving(folder: Path, port: int, **variables: str) -> Iterator[Live]:
    """Run `eventstore serve` in the folder, which holds its events.db."""
    with Live(folder, "--port", str(port), **environment(folder, **variables)) as live:
        yield live
        live.stop()


# ---------------------------------------------------------------------------------------------- examples


class Command(NamedTuple):
    text: str
    output: str


def commands(block: str) -> Iterator[Command]:
    for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]:
        first, *lines = part.splitlines()
        more = [line for line in lines if line.startswith("> ")]
        yield Command("\n".join([first, *(line[2:] for line in more)]), "\n".join(lines[len(more) :]))


VARYING = {
    "id": r"(?:event|meter|feat)_[0-9A-HJKMNP-TV-Z]{26}",
    "clock": r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(?:\.\d+)?Z",
    "cursor": r"\b\d{19}(?=::)",
    "duration": r"\b\d+\.\d s\b",
    "key": r"\bevs_[\w-]{32}(?![\w-])",
    "version": re.escape('"version":"') + r"[^\"]+",
}
VARIES = re.compile("|".join(f"(?P<{kind}>{pattern})" for kind, pattern in VARYING.items()))


def varies(found: re.Match[str], now: datetime) -> bool:
    """Return whether another run may print something else here. A time may vary if it is within an hour of now."""
    if found.lastgroup not in ("clock", "cursor"):
        return True
    moment = int(found[0]) / 1e9 if found.lastgroup == "cursor" else datetime.fromisoformat(found[0]).timestamp()
    return abs(moment - now.timestamp()) < 3600


def compare(command: str, expected: str, printed: str) -> dict[str, str]:
    """Assert that a command printed what the page shows, except what varies. Return the run's id for each id shown."""
    now = datetime.now(UTC)
    twins = list(VARIES.finditer(printed))
    masks = [f"<{twin.lastgroup}>" if varies(twin, now) else twin[0] for twin in twins]
    masks_left, twins_and_masks = iter(masks), iter(zip(twins, masks, strict=True))

    def mask_like_its_twin(found: re.Match[str]) -> str:
        twin, mask = next(twins_and_masks, (None, ""))
        return mask if twin and twin.lastgroup == found.lastgroup and mask != twin[0] else found[0]

    wanted = VARIES.sub(mask_like_its_twin, expected)
    assert VARIES.sub(lambda _: next(masks_left), printed).rstrip() == wanted.rstrip(), command
    pairs = zip(VARIES.finditer(expected), twins, strict=True)
    return {shown[0]: twin[0] for shown, twin in pairs if twin.lastgroup == "id"}


def with_ports(text: str, ports: dict[str, int]) -> str:
    """Replace the page's ports with free ones."""

    def free(found: re.Match[str]) -> str:
        return found[1] + str(ports.setdefault(found[2], free_port()))

    return re.sub(r"(127\.0\.0\.1:|--port )(\d+)", free, text)


def with_ids(text: str, ids: dict[str, str]) -> str:
    """Replace ids that the page has shown with those of the run."""
    return VARIES.sub(lambda found: ids.get(found[0], found[0]), text)


def here(command: str) -> str:
    """Make the command use this checkout and this Python."""
    command = command.replace(".venv/bin/eventstore", shlex.join(EVENTSTORE))
    return re.sub(r"^python3 ", f"{shlex.quote(sys.executable)} ", command)


# Their examples wait for servers and forwarding, import pandas, or run pytest.
LONG_TO_PASTE = ("docs/outbox.md", "docs/moving.md", "docs/import-export.md", "docs/testing.md")
PASTED = [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG_TO_PASTE)) for name, page in PAGES.items()
          if blocks(page, "console") or blocks(page, "python")]  # fmt: skip


@pytest.mark.slow
@needs_shell
@pytest.mark.parametrize("name", PASTED)
def test_the_commands_of_a_page_print_what_it_shows(name: str, tmp_path: Path) -> None:
    pasted = [command for block in blocks(PAGES[name], "console") for command in commands(block)]
    python = blocks(PAGES[name], "python")
    ports = {"8080": free_port()}
    started, missing = [], set()
    ids: dict[str, str] = {}
    with serving(tmp_path, ports["8080"]):
        try:
            for command, expected in pasted:
                text = here(with_ports(with_ids(command, ids), ports))
                program = text.split()[0]
                if shutil.which(program) is None:
                    missing.add(program)
                elif text.endswith("&"):
                    process = subprocess.Popen(["bash", "-c", f"exec {text[:-1]}"], cwd=tmp_path, env=environment(tmp_path),
                                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # fmt: skip
                    started.append(process)
                    wait_for(int(re.findall(r"--port (\d+)", text)[0]), process)
                else:
                    printed = run(tmp_path, "bash", "-c", text).stdout
                    ids |= compare(command, with_ports(expected, ports), printed)
            printed = run_program(name, with_ports("\n\n".join(python), ports), tmp_path)
            assert [text for text in blocks(PAGES[name], "text") if text not in printed] == []
        finally:
            for process in started:
                with ended(process):
                    pass
    if missing:
        pytest.skip(f"no {', '.join(sorted(missing))} here; everything else was run")


USES_THE_OTHER_FIXTURE = """

def test_the_other_fixture_is_a_server(slow_flexprice):
    assert slow_flexprice.events() == []
"""


def run_program(name: str, program: str, folder: Path) -> str:
    """Run the Python of a page and return its output; docs/testing.md is a test file, so pytest runs it."""
    is_test_file = name == "docs/testing.md"
    path = folder / ("test_pasted.py" if is_test_file else "pasted.py")
    path.write_text(program + USES_THE_OTHER_FIXTURE * is_test_file)
    plugins = ("no:cacheprovider", "no:schemathesis", "no:hypothesispytest")
    pytest_if_so = ["-m", "pytest", "-q", *(f"-p{plugin}" for plugin in plugins)] * is_test_file
    done = run(folder, sys.executable, *pytest_if_so, path)
    assert done.returncode == 0, done.stdout
    assert not is_test_file or "6 passed" in done.stdout
    return done.stdout


def test_compare_masks_only_what_varies() -> None:
    now = datetime.now(UTC).isoformat().replace("+00:00", "Z")
    compare("", "at 2026-11-01T03:30:00Z, now 2026-11-25T10:49:52.268441Z", f"at 2026-11-01T03:30:00Z, now {now}")
    old, new = "meter_01M80W6JV7116EN36KDG44YBRY", "meter_01M80W6JV7116EN36KDG44YBRZ"
    assert compare("", f"{old}; 0.0 s", f"{new}; 1.7 s") == {old: new}
    for expected in ("2026-11-01T03:30:00Z", now, "yesterday"):
        with pytest.raises(AssertionError):
            compare("", expected, "2025-11-01T03:30:00Z")


# ---------------------------------------------------------------------------------------------- the pages themselves


def anchors(page: str, levels: str = "#+") -> list[str]:
    """Return the anchors that GitHub makes from the headings."""
    headings = re.findall(rf"^{levels} (.+)$", prose(page), re.MULTILINE)
    return [re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings]


def links(page: str) -> list[str]:
    found = re.findall(r"\]\(([^)\s]+)\)", prose(page))
    return [link for link in found if not link.startswith(("http://", "https://"))]


@each_page
def test_every_link_leads_somewhere(name: str) -> None:
    for link in links(PAGES[name]):
        path, _, anchor = link.partition("#")
        target = (ROOT / name).parent / path if path else ROOT / name
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target.read_text("utf-8")), link


@each_page
def test_no_two_headings_of_a_page_share_an_anchor(name: str) -> None:
    found = anchors(PAGES[name])
    assert len(found) == len(set(found)), found  # a link always leads to the first one


@pytest.mark.parametrize("name", [name for name in PAGES if name.startswith("docs/")])
def test_every_section_is_in_its_pages_table_of_contents(name: str) -> None:
    contents = PAGES[name].partition("\n## ")[0]
    assert {f"#{anchor}" for anchor in anchors(PAGES[name], "##")} - set(links(contents)) == set()


def test_the_readme_links_to_every_page() -> None:
    direct = {Path(link.partition("#")[0]) for link in links(PAGES["README.md"])}
    assert {Path(name) for name in PAGES} - direct == {Path("README.md")}


def test_the_readmes_first_screen_links_to_the_differences_from_flexprice() -> None:
    assert "docs/fidelity.md" in links(PAGES["README.md"].partition("\n```")[0])


@each_page
def test_every_page_is_short(name: str) -> None:
    assert len(PAGES[name].splitlines()) <= (200 if name == "README.md" else 249)


@each_page
def test_lines_of_prose_are_at_most_120_characters_long(name: str) -> None:
    lines = [line for line in prose(PAGES[name]).splitlines() if not line.startswith("|")]
    assert [line for line in lines if len(line) > 120] == []


@each_page
def test_a_page_mentions_nothing_that_its_reader_does_not_have(name: str) -> None:
    assert re.findall(r"\bSPEC\b|/work/|\bissue \d", PAGES[name]) == []


@each_page
def test_every_code_block_says_its_language(name: str) -> None:
    fences = re.findall(r"^```(.*)$", PAGES[name], re.MULTILINE)
    assert all(fences[::2]), fences
    assert not any(fences[1::2]), fences


def test_the_files_that_the_readme_names_exist() -> None:
    names = re.findall(r"`([^`]+\.\w+|\w+/)`", section(PAGES["README.md"], "Files"))
    assert len(names) >= 4
    assert [name for name in names if not (ROOT / name).exists()] == []


def test_the_pytest_plugin_has_the_documented_name() -> None:
    (name,) = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]["entry-points"]["pytest11"]
    assert f"`pytest -p no:{name}`" in PAGES["docs/testing.md"]


def test_ci_runs_the_readmes_second_command() -> None:
    script = ROOT / ".ci" / "run"
    if not script.exists():
        pytest.skip("needs .ci, which this copy lacks")
    _, test = [block.splitlines()[1] for block in blocks(PAGES["README.md"], "sh") if block.startswith("# set up and")]
    assert test in script.read_text().splitlines()


# ---------------------------------------------------------------------------------------------- completeness


FLAG = re.compile(r"--[a-z][a-z-]+")


def help_of(folder: Path, command: str) -> dict[str, str]:
    """Return the flags of a command with their defaults, "" for none."""
    flags = {}
    shown = refusal(folder, command, "--help", COLUMNS="1000").stdout
    for text in re.split(r"^  (?=-)", shown, flags=re.MULTILINE)[1:]:
        (name, *_), default = FLAG.findall(text), re.search(r"\(default: (.*)\)$", text, re.MULTILINE)
        flags[name] = default[1] if default else ""
    return {flag: default for flag, default in flags.items() if flag != "--help"}


@pytest.mark.parametrize("command", ["serve", "import", "export", "replay", "prune", "backup", "keys"])
def test_every_flag_is_documented_with_its_default(tmp_path: Path, command: str) -> None:
    flags = help_of(tmp_path, command)
    table = section(REFERENCE, f"eventstore {command}", level=3)
    rows = dict(re.findall(r"^\| `(--[a-z-]+)[^|]*\| ([^|]*?) ?\|", table, re.MULTILINE))
    documented = {flag: re.sub("`|off|none", "", default) for flag, default in rows.items()}
    assert documented == {flag: default.replace("False", "").removesuffix(".0") for flag, default in flags.items()}


MODULES = (ROOT / "eventstore.py", *(ROOT / "eventstore_extras").glob("*.py"))
SERVED = (*eventstore.OPERATIONS, *analytics.OPERATIONS)


@pytest.mark.parametrize("operation", SERVED, ids=lambda operation: f"{operation.method} {operation.public_path}")
def test_every_route_is_documented(operation: eventstore.Operation) -> None:
    row = f"`{operation.method} {operation.public_path.replace('{id}', 'ID')}"
    assert re.search(rf"{re.escape(row)}[`?]", section(API, "Endpoints"))


def test_the_sections_of_the_api_that_the_code_names_exist() -> None:
    named = {name for path in MODULES for names in re.findall(r"\(API: ([^)]+)\)", path.read_text("utf-8"))
             for name in names.split(", ")}  # fmt: skip
    assert len(named) > 10
    own = re.findall(r"^#+ (.+)$", prose(API), re.MULTILINE)
    linked = re.findall(r"\[([^\]]+)\]\(\w+\.md[#\w-]*\)", API.partition("\n## ")[0])  # in the contents
    assert named - {*own, *(" ".join(text.split()) for text in linked)} == set()


@pytest.mark.parametrize("name", ["sending", "querying", "usage", "meters", "analytics"])
def test_the_api_page_links_to_every_section_of_the_pages_it_indexes(name: str) -> None:
    sections = {f"{name}.md#{anchor}" for anchor in anchors(PAGES[f"docs/{name}.md"], "##")}
    assert sections - set(links(API)) == set()


LEFT_OUT = [
    (route, int(status[0]))
    for row in section(FIDELITY, "What is left out").splitlines()
    if (status := re.findall(r"\b40[45]\b", row))
    for route in re.findall(r"`([A-Z]+ /v1/[^`]+)`", row)
]


@pytest.mark.slow
@pytest.mark.parametrize(("route", "status"), LEFT_OUT)
def test_a_route_that_is_left_out_is_refused_as_documented(route: str, status: int) -> None:
    method, path = route.split()
    with running_server() as server:
        url = server.url.removesuffix("/v1") + path
        answer = httpx.request(method, url, json={}, headers={"x-api-key": server.api_key})
    assert answer.status_code == status


def wire_types(kind: Any) -> Iterator[type[msgspec.Struct]]:
    """Yield a wire type and the types of its fields."""
    if hasattr(kind, "__struct_fields__"):
        yield kind
        for field in msgspec.structs.fields(kind):
            yield from wire_types(field.type)
    for part in get_args(kind):
        yield from wire_types(part)


# For each section, the types whose fields it must document; elsewhere, the same word may appear by chance.
SECTIONS: dict[str, list[Any]] = {
    "Meters": [meters.MeterIn, meters.MeterListIn, meters.MeterPage],
    "Features": [features.FeatureIn, features.FeatureSearchIn, features.FeaturePage, features.SortIn],
    "Usage of a meter": [meters.MeterUsageIn],
    "Analytics": [analytics.AnalyticsIn, analytics.AnalyticsItem, analytics.AnalyticsPoint],
}
ELSEWHERE = {"Features": ("Meters",), "Analytics": ("Meters", "Features")}  # sections that it links to


@pytest.mark.parametrize("heading", SECTIONS)
def test_the_fields_of_meters_and_analytics_are_documented_in_their_section(heading: str) -> None:
    fields = {name for kind in SECTIONS[heading] for struct in wire_types(kind) for name in struct.__struct_fields__}
    texts = [section(METERS if name in ("Meters", "Features") else ANALYTICS, name)
             for name in (heading, *ELSEWHERE.get(heading, ()))]  # fmt: skip
    assert fields - set(re.findall(r"\w+", " ".join(texts))) == set()


def test_every_field_and_code_is_documented() -> None:
    kinds = [kind for operation in SERVED for kind in (operation.body, operation.answer)]
    fields = {name for kind in (*kinds, eventstore.EventIn, eventstore.ErrorBody) for struct in wire_types(kind)
              for name in struct.__struct_fields__ if not re.fullmatch(r"item_\d+", name)}  # fmt: skip
    words = set(re.findall(r"\w+", " ".join(API_PAGES)))
    assert {*fields, *eventstore.STATUS_OF_CODE, *usage.AGGREGATIONS, *eventstore.WINDOW_SIZES} - words == set()


FAULTS = re.findall(r"\| `(\w+=[^`]+)` \|$", section(PAGES["docs/testing.md"], "Faults"), re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_a_documented_fault_does_what_the_page_says(fault: str) -> None:
    fields = {name: json.loads(value.lower()) for name, value in (part.split("=") for part in fault.split(", "))}
    with running_server() as server:
        server.fail(**fields | {"delay_ms": 1} if "delay_ms" in fields else fields)
        answer = httpx.post(f"{server.url}/events", json=EVENT, headers={"x-api-key": server.api_key})
        assert answer.status_code == fields.get("status", 202)
        assert len(server.events()) == (fields.get("stored", False) or "status" not in fields)


def test_the_documented_log_lines_are_in_the_source() -> None:
    rows = re.findall(r"^\|.*\| (?:WARNING|ERROR).*$", section(RELIABILITY, "What to watch"), re.MULTILINE)
    assert len(rows) == 18
    source = "".join(path.read_text("utf-8") for path in MODULES)
    for row in rows:
        for text in re.findall(r"`([^`]+)`", row.split("|")[1]):
            part = re.sub(r"\b\d+ (?=requests|MB)", "%d ", re.sub(r"^\d{3} \w+(: )?", "", text))
            part = part.replace("us.api.flexprice.io", "%s")
            assert part in source or part == "Exception in ASGI application", part  # logged by uvicorn


def test_a_file_of_another_format_is_refused_with_the_documented_message(tmp_path: Path) -> None:
    with closing(sqlite3.connect(tmp_path / "events.db")) as conn:
        conn.executescript((ROOT / "schema.sql").read_text("utf-8") + "; PRAGMA user_version = 3;")
    done = run(tmp_path, *EVENTSTORE, "serve", "--port", "0")
    assert done.returncode == 2
    assert done.stdout.removeprefix("eventstore: ").strip() in " ".join(REFERENCE.split())


# ---------------------------------------------------------------------------------------------- operation

BACKUPS = [command.text for block in blocks(section(RELIABILITY, "Backup"), "console") for command in commands(block)]
BACKUPS = [command for command in BACKUPS if "backup" in command]


def ids_on(port: int, key: str = KEY) -> list[str]:
    body = {"order": "asc", "page_size": 1000}
    page = httpx.post(f"http://127.0.0.1:{port}/v1/events/query", json=body, headers={"x-api-key": key})
    return [event["id"] for event in page.raise_for_status().json()["events"]]


def send(port: int, event_id: str, key: str = KEY) -> httpx.Response:
    event = EVENT | {"event_id": event_id}
    return httpx.post(f"http://127.0.0.1:{port}/v1/events", json=event, headers={"x-api-key": key})


@pytest.mark.slow
@needs_shell
@pytest.mark.parametrize("command", BACKUPS, ids=lambda command: command.split()[0])
def test_a_backup_of_a_running_server_can_be_restored_as_documented(tmp_path: Path, command: str) -> None:
    if shutil.which(command.split(maxsplit=1)[0]) is None:
        pytest.skip(f"needs {command.split(maxsplit=1)[0]}")
    port = free_port()
    (restore,) = blocks(section(RELIABILITY, "Restore"), "sh")
    restore = "\n".join(line for line in restore.splitlines() if line.startswith(("rm ", "cp ", "for ")))
    with serving(tmp_path, port) as live:
        for number in range(3):
            assert send(port, f"before {number}").status_code == 202
        assert "copied events.db to copy.db: 3 events, checked; " in run(tmp_path, "bash", "-c", here(command)).stdout
        assert send(port, "after").status_code == 202
        live.process.kill()  # leaves a -wal, which belongs to the old file
    assert (tmp_path / "events.db-wal").exists()
    (tmp_path / "events.db").write_bytes(b"damaged")
    assert run(tmp_path, "bash", "-c", restore).stdout == ""
    with serving(tmp_path, port):
        assert ids_on(port) == ["before 0", "before 1", "before 2"]
        assert send(port, "after").status_code == 202
        assert ids_on(port) == ["before 0", "before 1", "before 2", "after"]


@pytest.mark.slow
def test_a_key_can_be_changed_without_losing_a_request(tmp_path: Path) -> None:
    """Follow the documented steps while an application sends events and retries refused connections."""
    port, key, over, sent = free_port(), "old-key", threading.Event(), []

    def application() -> None:
        for number in count():
            event_id = f"event {number:04}"
            while True:
                try:
                    status = send(port, event_id, key).status_code
                except httpx.TransportError:
                    time.sleep(0.02)
                    continue
                sent.append((event_id, status))
                break
            if over.wait(0.01):
                return

    def wait_for_more() -> None:
        before = len(sent)
        eventually(lambda: len(sent) > before + 3)

    thread = threading.Thread(target=application)
    with serving(tmp_path, port, EVENTSTORE_API_KEYS="old-key=production"):
        thread.start()
        wait_for_more()
    with serving(tmp_path, port, EVENTSTORE_API_KEYS="old-key=production,new-key=production"):
        key = "new-key"
        wait_for_more()
    with serving(tmp_path, port, EVENTSTORE_API_KEYS="new-key=production"):
        wait_for_more()
        over.set()
        thread.join()
        assert {status for _, status in sent} == {202}
        assert ids_on(port, "new-key") == [event_id for event_id, _ in sent]
        assert send(port, "late", "old-key").status_code == 401


def published(server: MockServer, path: str) -> list[dict[str, Any]]:
    query = f"{server.url}/{path}?status=published&order=asc&limit=1000"
    answer = httpx.get(query, headers={"x-api-key": server.api_key}).raise_for_status()
    return list(answer.json()["items"])


def what_moves(server: MockServer) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the published meters and features without ids; a feature has its meter's position instead."""
    anew = dict.fromkeys(("id", "created_at", "updated_at", "meter_id", "meter"))
    rows = published(server, "meters")
    places = {meter["id"]: place for place, meter in enumerate(rows)}
    features = [
        feature | anew | {"place": places.get(feature["meter_id"])} for feature in published(server, "features")
    ]
    return [meter | anew for meter in rows], features


METERS_TO_MOVE = [
    {"type": "COUNT"},
    {"type": "MAX", "field": "n", "bucket_size": "DAY", "group_by": "model"},
    {"type": "SUM_WITH_MULTIPLIER", "field": "n", "multiplier": "0.1"},
]


def fill_with_meters(server: MockServer) -> None:
    """Create meters with zero, one and two features; features with a meter, an archived meter, and none."""

    def make(path: str, **body: object) -> str:
        answer = httpx.post(f"{server.url}/{path}", json=body, headers={"x-api-key": server.api_key})
        return str(answer.raise_for_status().json().get("id"))

    filtered = {"filters": [{"key": "model", "values": ["large", "small"]}], "reset_usage": "NEVER"}
    ids = [make("meters", name="Meter", event_name="call", aggregation=aggregation, **more)
           for aggregation in METERS_TO_MOVE for more in (filtered, {"reset_usage": "BILLING_PERIOD"})]  # fmt: skip
    unit = {"unit_singular": "thousand", "unit_plural": "thousands", "conversion_rate": 0.5}
    more = {"type": "metered", "unit_singular": "call", "unit_plural": "calls", "reporting_unit": unit,
            "description": "all of them", "metadata": {"team": "a"}}  # fmt: skip
    for name, meter_id in (("first", ids[1]), ("second", ids[1]), ("third", ids[2]), ("lost", ids[5])):
        make("features", name=name, lookup_key=f"key of the {name}", meter_id=meter_id, **more)
    make("features", name="none", type="boolean")
    make(f"meters/{ids[5]}/disable")


@pytest.mark.slow
def test_meters_and_features_are_moved_as_documented_and_a_second_run_changes_nothing(tmp_path: Path) -> None:
    (program,) = blocks(section(MOVING, "Meters and features"), "python")
    with running_server(api_keys={KEY: "a"}) as old, running_server(api_keys={"key-there": "a"}) as new:
        fill_with_meters(old)
        expected, features = what_moves(old)
        assert (len(expected), len(features)) == (5, 5)
        ports = {"8080": httpx.URL(old.url).port or 0, "8081": httpx.URL(new.url).port or 0}
        (tmp_path / "carry.py").write_text(with_ports(program, ports))
        lost = "left out, its meter is archived: lost"
        there = [f"there already: {name}" for name in ("first", "second", "third")]
        for printed in [lost], [*there, lost, "there already: none"]:
            done = run(tmp_path, sys.executable, "carry.py")
            assert done.stdout.splitlines() == printed
            assert what_moves(new) == (expected, [feature for feature in features if feature["name"] != "lost"])
        assert what_moves(old) == (expected, features)


@pytest.mark.skipif(not shutil.which("systemd-analyze"), reason="needs systemd-analyze")
def test_systemd_accepts_the_documented_units(tmp_path: Path) -> None:
    sockets, unit = blocks(DEPLOYING, "ini")
    unit = re.sub(r"^(ExecStart=)\S+", rf"\1{sys.executable}", unit, flags=re.MULTILINE)  # the program must exist
    (edited,) = blocks(OUTBOX, "systemd")
    edited = re.sub(r"^(ExecStart=)/\S+", rf"\1{sys.executable}", edited, flags=re.MULTILINE)
    (tmp_path / "eventstore.service").write_text(f"{unit}\n{edited}")
    (tmp_path / "eventstore.socket").write_text(sockets)
    done = run(tmp_path, "systemd-analyze", "verify", "--man=no", "./eventstore.service", "./eventstore.socket")
    assert [line for line in done.stdout.splitlines() if "eventstore." in line] == []


@pytest.mark.skipif(not shutil.which("caddy"), reason="needs caddy")
@pytest.mark.parametrize("number", [0, 1], ids=["a name of its own", "below a path"])
def test_caddy_accepts_the_documented_configuration(tmp_path: Path, number: int) -> None:
    (tmp_path / "Caddyfile").write_text(blocks(DEPLOYING, "caddyfile")[number])
    command = ("caddy", "validate", "--adapter", "caddyfile", "--config", "Caddyfile")
    done = run(tmp_path, *command, HOME=str(tmp_path))
    assert done.returncode == 0, done.stdout


@pytest.mark.skipif(not (shutil.which("nginx") and shutil.which("openssl")), reason="needs nginx and openssl")
@pytest.mark.parametrize("is_below", [False, True], ids=["a name of its own", "below a path"])
def test_nginx_accepts_the_documented_configuration(tmp_path: Path, is_below: bool) -> None:
    certificate, key = tmp_path / "events.pem", tmp_path / "events.key"
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes")
    run(tmp_path, "openssl", "req", "-x509", *curve, "-subj", "/CN=e", "-keyout", key, "-out", certificate)
    server, below = blocks(DEPLOYING, "nginx")
    if is_below:
        server = re.sub(r"    location / \{.*?\n    \}\n", lambda _: below, server, flags=re.DOTALL)
        assert "/flexprice/" in server
    server = server.replace("/etc/ssl/events.example.com.pem", str(certificate))
    server = server.replace("/etc/ssl/events.example.com.key", str(key))
    (tmp_path / "nginx.conf").write_text(f"pid {tmp_path}/pid; events {{}}\nhttp {{\n{server}\n}}\n")
    done = run(tmp_path, "nginx", "-t", "-c", tmp_path / "nginx.conf", "-e", "stderr")
    assert done.returncode == 0, done.stdout
    assert "[warn]" not in done.stdout
