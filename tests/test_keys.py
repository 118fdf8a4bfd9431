"""API keys: their sources, labels, roles, the file, and the command `keys`."""

from __future__ import annotations

import hashlib
import re
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from helpers import KEY, SCRIPT, Live, event, eventually, page, refusal, refused, run, store, table

BOTH = {"EVENTSTORE_API_KEYS": "one=production, two=staging", "FLEXPRICE_API_KEY": "app-key"}
SOURCES = [
    ("--api-key flag --api-key a-b=prod", BOTH, {"flag": "development", "a-b": "prod"}, "--api-key"),
    (
        "--api-key-file keys --api-key flag",
        BOTH,
        {"flag": "development", "one": "production", "two": "development"},
        "--api-key and --api-key-file",
    ),
    ("", BOTH, {"one": "production", "two": "staging"}, "EVENTSTORE_API_KEYS"),
    ("", {"FLEXPRICE_API_KEY": "app-key"}, {"app-key": "development"}, "FLEXPRICE_API_KEY"),
]


@pytest.mark.slow
@table(("flags", "environ", "accepted", "source"), SOURCES, ids=[source for *_, source in SOURCES])
def test_keys_come_from_the_first_source_that_has_any_and_are_not_shown(
    tmp_path: Path, flags: str, environ: dict[str, Any], accepted: dict[str, Any], source: str
) -> None:
    (tmp_path / "keys").write_text("# comment\none = production\n\ntwo  # the second\n")
    with Live(tmp_path, *flags.split(), **environ) as live:
        for key in ("flag", "a-b", "one", "two", "app-key", "app"):
            with live.client(key) as client:
                response = client.post("/v1/events", json=event())
                if key in accepted:
                    assert page(client)["events"][0]["environment_id"] == accepted[key]
                else:
                    refused(response, 401, "unauthorized")
        assert source in live.banner
        assert f"  debugger     {live.url}/\n" in live.banner
        shown = live.banner + live.log
        assert [key for key in ("a-b", "one=", "two=", "app-key", "evs_") if key in shown] == []


@table(
    ("source", "text"),
    [
        ("--api-key", "key=production=x"),
        ("--api-key", "key="),
        ("--api-key", "key; role=event_reader"),
        ("--api-key", "sha256:" + "0" * 64),
        ("EVENTSTORE_API_KEYS", "one, two"),
        ("FLEXPRICE_API_KEY", "key; label=app"),
    ],
)
def test_the_service_alone_refuses_keys_that_need_the_extras(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, text: str
) -> None:
    monkeypatch.setattr("eventstore._has_extras", lambda: False)
    flags, environ = ([source, text], {}) if source == "--api-key" else ([], {source: text})
    done = refusal(tmp_path, "serve", "--port", "0", *flags, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(
        rf"eventstore: {source} with more than KEY or KEY=ENVIRONMENT in it needs the folder eventstore_extras .*\n",
        done.stderr,
    )
    assert text not in done.stderr


@table("text", ["k1=production;k2=staging", "a=b=prod", "a,b", "a=b,c"])
@table("source", ["--api-key", "--api-key-file", "EVENTSTORE_API_KEYS", "FLEXPRICE_API_KEY"])
def test_a_key_that_contains_a_separator_is_refused_with_the_likely_reason(
    tmp_path: Path, source: str, text: str
) -> None:
    if "," in text and source == "EVENTSTORE_API_KEYS":
        text = "k1=production;k2=staging"
    (tmp_path / "keys").write_text(text)
    flags = {"--api-key": ["--api-key", text], "--api-key-file": ["--api-key-file", "keys"]}.get(source, [])
    environ = {} if flags else {source: text}
    done = refusal(tmp_path, "serve", "--port", "0", *flags, **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert source in done.stderr
    assert "EVENTSTORE_API_KEYS" in done.stderr
    assert "k1" not in done.stderr


UNUSABLE = [  # flags, variables, what the message says
    ("", {"EVENTSTORE_API_KEYS": ""}, "EVENTSTORE_API_KEYS is set, but holds no key"),
    ("", {"EVENTSTORE_API_KEYS": " , ,,"}, "EVENTSTORE_API_KEYS is set, but holds no key"),
    ("", {"EVENTSTORE_API_KEYS": "", "FLEXPRICE_API_KEY": "good"}, "EVENTSTORE_API_KEYS is set, but holds no key"),
    ("", {"FLEXPRICE_API_KEY": ""}, "FLEXPRICE_API_KEY is set, but holds no key"),
    ("", {"FLEXPRICE_API_KEY": " "}, "FLEXPRICE_API_KEY is set, but holds no key"),
    ("", {"EVENTSTORE_API_KEYS": '"k9=production"'}, "begins or ends with a quote"),
    ("", {"EVENTSTORE_API_KEYS": "'k9=production'"}, "begins or ends with a quote"),
    ("", {"EVENTSTORE_API_KEYS": 'k9="production"'}, "is longer than 255 characters, in quotes"),
    ("", {"FLEXPRICE_API_KEY": '"k9"'}, "begins or ends with a quote"),
    ('--api-key|"k9"', {}, "begins or ends with a quote"),
    ("--api-key|k9=pro\x1bduction", {}, 'the environment "pro\\u001bduction"'),
    ("--api-key|k9=pro\u202eduction", {}, "has a control character"),
    ("--api-key|k9=" + "e" * 256, {}, "longer than 255"),
    ("--api-key|k9; role=admin", {}, 'the role must be event_ingestor or event_reader, got "admin"'),
    ("--api-key|k9; lable=x", {}, "a ';' without label= or role="),
    ("--api-key|k9\x7f", {}, "has a space or a character outside ASCII"),
]


@table(("flags", "environ", "message"), UNUSABLE)
def test_a_key_that_cannot_be_used_is_refused_at_the_start_and_not_shown(
    tmp_path: Path, flags: str, environ: dict[str, str], message: str
) -> None:
    done = refusal(tmp_path, "serve", "--port", "0", *filter(None, flags.split("|")), **environ)
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"eventstore: [^\n\x1b\u202e]+\n", done.stderr)
    assert message in done.stderr
    assert "k9" not in done.stderr


REQUESTS = [  # what is sent, and the roles that may send it
    ("POST", "/v1/events", event(), ["event_ingestor"]),
    ("POST", "/v1/events/bulk", {"events": [event()]}, ["event_ingestor"]),
    ("GET", "/v1/events", None, ["event_reader"]),
    ("GET", "/v1/events/lookup?id=a", None, ["event_reader"]),
    ("GET", "/v1/events/monitoring", None, ["event_reader"]),
    ("POST", "/v1/events/query", {}, ["event_reader"]),
    ("POST", "/v1/events/usage", {"event_name": "e", "aggregation_type": "COUNT"}, ["event_reader"]),
    ("POST", "/v1/events/analytics", {"external_customer_id": "c"}, ["event_reader"]),
    ("GET", "/v1/meters", None, ["event_reader"]),
    ("POST", "/v1/events/usage/meter", {"meter_id": "m"}, ["event_reader"]),
    ("POST", "/v1/features/search", {}, ["event_reader"]),
    ("POST", "/v1/meters", {"name": "m", "event_name": "e", "aggregation": {"type": "COUNT"}}, []),
    ("POST", "/v1/features", {"name": "f", "type": "static", "lookup_key": "f"}, []),
    ("GET", "/health", None, ["event_ingestor", "event_reader"]),
]


@pytest.fixture(scope="module")
def live_with_roles(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("roles")
    digest = hashlib.sha256(b"hashed").hexdigest()
    keys = [
        "event_ingestor; role=event_ingestor",
        "event_reader=development; role=event_reader; label=dashboard",
        "any",
    ]
    (folder / "keys").write_text("\n".join([*keys, f"sha256:{digest}=staging; label=checkout"]))
    with Live(folder, "--api-key-file", "keys") as live:
        yield live


@pytest.mark.slow
@table(("method", "path", "body", "roles"), REQUESTS, ids=[f"{method} {path}" for method, path, *_ in REQUESTS])
def test_a_role_allows_only_its_requests(
    live_with_roles: Live, method: str, path: str, body: Any, roles: list[str]
) -> None:
    for role in ("event_ingestor", "event_reader"):
        with live_with_roles.client(role) as client:
            response = client.request(method, path, json=body)
            if role not in roles:
                refused(response, 403, "permission_denied")
                assert f"this key has the role {role}; the request needs a key" in response.json()["message"]
            else:
                assert response.status_code in (200, 202, 404)
    with live_with_roles.client("any") as client:
        assert client.request(method, path, json=body).status_code != 403


def test_a_hashed_key_is_accepted_and_its_hash_is_not(live_with_roles: Live) -> None:
    with live_with_roles.client("hashed") as client:
        assert store(client, event("a")).status_code == 202
        assert page(client)["events"][0]["environment_id"] == "staging"
    for text in (hashlib.sha256(b"hashed").hexdigest(), f"sha256:{hashlib.sha256(b'hashed').hexdigest()}"):
        with live_with_roles.client(text) as client:
            refused(client.get("/v1/events"), 401, "unauthorized")


@pytest.mark.slow
def test_a_new_keys_line_goes_into_the_file_and_the_key_itself_only_to_the_terminal(tmp_path: Path) -> None:
    made = run(*SCRIPT, "keys", "new", "--environment", "production", "--role", "event_reader", "--label", "a b",
               cwd=tmp_path)  # fmt: skip
    assert (made.returncode, made.stdout[:7]) == (0, "sha256:")
    key = made.stderr.split()[-1]
    assert key not in made.stdout
    (tmp_path / "keys").write_text(made.stdout)
    with Live(tmp_path, "--api-key-file", "keys") as live, live.client(key) as client:
        assert client.get("/v1/events").status_code == 200
        refused(client.post("/v1/events", json=event()), 403, "permission_denied")
    clear = run(*SCRIPT, "keys", "new", "--clear", cwd=tmp_path)
    assert re.fullmatch(r"evs_\S+=development\n", clear.stdout)
    (tmp_path / "keys").write_text(made.stdout + clear.stdout)
    listed = run(*SCRIPT, "keys", "list", "--api-key-file", "keys", cwd=tmp_path)
    digest = hashlib.sha256(key.encode()).hexdigest()
    assert re.split("  +", listed.stdout.splitlines()[1]) == [digest[:12], "production", "event_reader", "a b"]
    assert clear.stdout.split("=")[0] not in listed.stdout
    assert "1 key in clear text" in listed.stderr


@table(("flags", "message"), [
    (["list"], "keys list needs --api-key-file"),
    (["list", "--api-key-file", "missing"], "cannot read --api-key-file missing"),
    (["new", "--environment", "a,b"], '--environment must not contain ",", got "a,b"'),
    (["new", "--environment", "a#b"], '--environment must not contain "#", got "a#b"'),
    (["new", "--environment", "a=b"], '--environment must not contain "=", got "a=b"'),
    (["new", "--label", "a;b"], '--label must not contain ";", got "a;b"'),
    (["new", "--label", "a\nb"], "has a control character"),
    (["new", "--environment", ""], "--environment must not be empty: name an environment"),
    (["new", "--environment", " "], "--environment must not be empty: name an environment"),
])  # fmt: skip
def test_the_command_keys_refuses_bad_values(tmp_path: Path, flags: list[str], message: str) -> None:
    done = refusal(tmp_path, "keys", *flags)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@table(("text", "message"), [
    ("# two\na=x\nb c=y", "--api-key-file keys, line 3: an API key is empty, or has a space"),
    ("a=x\nb=", "--api-key-file keys, line 2: an API key ends in '='"),
    ("a=x\n\na=y", "--api-key-file keys, line 3 names the same key as --api-key-file keys, line 1"),
])  # fmt: skip
def test_a_bad_line_of_the_key_file_is_named(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "keys").write_text(text)
    done = refusal(tmp_path, "serve", "--port", "0", "--api-key-file", "keys")
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_a_warning_names_the_forwarded_environment_that_has_no_key_left(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text("old=development")
    to_nobody = ("--forward-to", "http://127.0.0.1:1")
    with Live(tmp_path, "--api-key-file", "keys", *to_nobody, EVENTSTORE_FORWARD_API_KEY="a-key") as live:
        (tmp_path / "keys").write_text("new=production")
        live.process.send_signal(signal.SIGHUP)
        eventually(lambda: 'no API key is left for the environment "development"' in live.log)


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_sighup_reads_the_key_file_again_and_a_bad_file_changes_nothing(tmp_path: Path) -> None:
    keys = tmp_path / "keys"
    keys.write_text("old=production")

    def statuses() -> dict[str, int]:
        with live.client("old") as old, live.client("new") as new:
            return {"old": old.get("/v1/events").status_code, "new": new.get("/v1/events").status_code}

    with Live(tmp_path, "--api-key-file", "keys") as live:
        assert statuses() == {"old": 200, "new": 401}
        keys.write_text("old=production\nnew=an environment that is new")
        live.process.send_signal(signal.SIGHUP)
        eventually(lambda: statuses() == {"old": 200, "new": 200})
        with live.client("new") as client:
            assert store(client, event("a")).status_code == 202
            assert page(client)["events"][0]["environment_id"] == "an environment that is new"
        for number, bad in enumerate(("", "a=b=c"), 1):
            keys.write_text(bad)
            live.process.send_signal(signal.SIGHUP)
            refusals = partial(live.log_has, "the API keys stay as they were", number)
            eventually(refusals)
        assert statuses() == {"old": 200, "new": 200}
        keys.write_text("new=an environment that is new")
        live.process.send_signal(signal.SIGHUP)
        eventually(lambda: statuses() == {"old": 401, "new": 200})


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="needs SIGHUP")
def test_sighup_without_a_key_file_is_one_line_in_the_log(tmp_path: Path) -> None:
    with Live(tmp_path, "--api-key", KEY) as live, live.client() as client:
        live.process.send_signal(signal.SIGHUP)
        eventually(lambda: "SIGHUP is ignored: there is no --api-key-file to read again" in live.log)
        assert store(client, event("a")).status_code == 202
        assert (live.stop(), live.log.count("\n")) == (0, 1)
