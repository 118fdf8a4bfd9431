"""Secrets in a target's texts are hidden before the texts are cut."""

from __future__ import annotations

import base64
import html
import json
import logging
import urllib.parse
from pathlib import Path

import pytest

from eventstore_extras import sending
from eventstore_extras.hiding import Hider
from fake_target import FakeTarget, answering, forwarding, reply
from helpers import KEY, command_line, event, imported, lines_of, store, table

KEYS = ["sk_live_4f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c", "a+b/c=&<\"quoted'>\\path~1234567890", "p%61ss/word?&#x=1234"]


def leaked(text: str, secret: str, chars: int = 12) -> list[str]:
    """Return the parts of a secret, this long or longer, that a text has."""
    return [secret[start : start + chars] for start in range(len(secret) - chars + 1)
            if secret[start : start + chars] in text]  # fmt: skip


SPELLINGS = {
    "as it is": lambda key: key,
    "upper case": str.upper,
    "as JSON": lambda key: json.dumps(key)[1:-1],
    "as JSON by Go": lambda key: json.dumps(key)[1:-1].replace("<", "\\u003c").replace("&", "\\u0026"),
    "as JSON, all escaped": lambda key: "".join(f"\\u{ord(char):04X}" for char in key),
    "as JSON with slashes escaped": lambda key: json.dumps(key)[1:-1].replace("/", "\\/"),
    "in a URL": lambda key: urllib.parse.quote(key, safe=""),
    "in a URL in lower case": lambda key: urllib.parse.quote(key, safe="").lower(),
    "in a URL, all escaped": lambda key: "".join(f"%{ord(char):02x}" for char in key),
    "in HTML": html.escape,
    "in HTML, all escaped": lambda key: "".join(f"&#{ord(char)};" for char in key),
    "in Base64": lambda key: base64.b64encode(key.encode()).decode(),
    "after a name, in Base64": lambda key: base64.b64encode(f"me:{key}".encode()).decode(),
    "after another name, in Base64": lambda key: base64.b64encode(f"user:{key}:x".encode()).decode(),
    "in HTML by PHP": lambda key: html.escape(key).replace("&#x27;", "&#039;"),
    "in HTML by name": lambda key: key.replace("&", "&amp;").replace("/", "&sol;").replace("+", "&plus;"),
    "in HTML, twice": lambda key: html.escape(html.escape(key)),
    "in a URL, twice": lambda key: urllib.parse.quote(urllib.parse.quote(key, safe=""), safe=""),
    "as JSON, twice": lambda key: json.dumps(json.dumps(key))[3:-3],
    "as Python shows it": lambda key: "".join(f"\\x{ord(char):02x}" for char in key),
    "as JSON in a URL": lambda key: urllib.parse.quote(json.dumps(key)[1:-1], safe=""),
    "in two lines": lambda key: f"{key[:20]}\r\n  {key[20:]}",
    "in hexadecimal": lambda key: key.encode().hex(),
    "in Base64 of short lines": lambda key: base64.b64encode(f"me:{key}".encode()).decode().replace("a", "\na"),
    "cut before its last character": lambda key: key[:-1],
    "cut before its first character": lambda key: key[1:],
    "only its middle": lambda key: key[5:20],
    "in Base64 for URLs": lambda key: base64.urlsafe_b64encode(f"u:{key}".encode()).decode(),
}


@table("secret", KEYS)
@table("spelling", SPELLINGS.values(), ids=SPELLINGS)
def test_a_secret_is_hidden_in_each_spelling_and_wherever_the_text_is_cut(secret: str, spelling: object) -> None:
    assert callable(spelling)
    spelled, hider = spelling(secret), Hider([secret])
    for before in range(0, 120, 7):
        text = hider.hide("." * before + spelled + " and the rest", 100)
        assert text.startswith("." * min(before, 100))
        assert leaked(text, spelled, 8) == []
        assert leaked(text, secret, 8) == []
        assert len(text) <= 100


@table("max_chars", [1, 2, 10, 100, 300])
def test_a_text_of_nothing_but_secrets_has_none_at_its_end(max_chars: int) -> None:
    for secret in KEYS:
        for spelled in (secret, "".join(f"&#x{ord(char):x};" for char in secret)):
            assert Hider([secret]).hide(spelled * 1000, max_chars) == "***"[:max_chars]


@table("shown", range(45))
def test_a_secret_where_the_text_is_cut_is_hidden(shown: int) -> None:
    text = Hider(KEYS).hide("." * (300 - shown) + KEYS[0] + "." * 1000, 300)
    assert text == ("." * (300 - shown) + "***" + "." * 100)[:300]


def test_other_texts_stay_as_they_are() -> None:
    for text in (
        '50% of {"a": "\\\\x"} &amp; &#65; &no; \\u12',
        "sk_live",
        "%%%&&&\\",
        "ß İ \U0001f600 &NotEqualTilde;",
    ):
        assert Hider(KEYS).hide(text, 300) == text


def test_several_secrets_are_hidden_the_longest_first() -> None:
    assert Hider(["key", "key-of-the-proxy", ""]).hide("key-of-the-proxy, key, kex", 100) == "***, ***, kex"
    assert Hider([]).hide("nothing", 100) == "nothing"


BODIES = {
    "plain text": lambda filler: f"{filler}{KEY} is unknown",
    "the API's error": lambda filler: json.dumps({"code": "x", "message": f"{filler}{KEY} is unknown"}),
    "escaped": lambda filler: '{"message": "%s%s"}' % (filler, "".join(f"\\u{ord(char):04x}" for char in KEY)),
    "details": lambda filler: json.dumps({"code": "x", "message": "no", "details": {"errors": [{"message": filler + KEY}]}}),
    "FlexPrice's error": lambda filler: json.dumps({"success": False, "error": {"message": filler + KEY * 9}}),
}  # fmt: skip


@pytest.mark.slow
@table("body", BODIES.values(), ids=BODIES)
def test_the_key_is_neither_in_the_log_nor_in_the_refused_file(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, body: object
) -> None:
    monkeypatch.setattr(sending, "BACKOFF_BASE_S", 0.001)
    monkeypatch.setattr(sending, "BLOCKED_PAUSE_S", 0.001)
    caplog.set_level(logging.INFO, "eventstore")
    assert callable(body)
    bodies = [body("x" * length).encode() for length in (60, 80, 95, 260, 290, 299)]
    tricks = [answering(status, each) for each in bodies for status in (500, 401)]
    refusals = [lambda handler, _, each=each: reply(handler, 400, each) for each in bodies]
    path = str(tmp_path / "events.db")
    with FakeTarget(*tricks) as target, forwarding(target, db=path) as (server, client):
        monkeypatch.setattr(sending.Throttle, "allows", lambda _: True)
        store(client, event("a"))
        target.tricks += [*refusals, lambda *_: False]
        server.wait_until_forwarded()
    refused = tmp_path / "events.db.refused.ndjson"
    text = caplog.text + (refused.read_text() if refused.exists() else "")
    assert "***" in text
    assert leaked(text, KEY) == []


@table("split", [3, 12, 20, 37])
def test_a_key_that_is_split_between_body_and_header_is_hidden(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], split: int
) -> None:
    key = "sk_live_4f9a8b7c6d5e4f3a2b1c0d9e8f7a6b5c"
    folder = imported(tmp_path, lines_of(event("a")))
    with FakeTarget(answering(302, f"unknown: {key[:split]}".encode(), location=f"{key[split:]}/login")) as target:
        assert command_line("replay", "--db", folder / "events.db", "--to", target.url, "--api-key", key) == 1
    message = capsys.readouterr().err
    assert "unknown: " in message
    assert "It redirects to " in message
    assert leaked(message, key) == []


@pytest.mark.parametrize("location", [f"http://other/{'x' * 70}?key={KEY}", f"/login?{urllib.parse.quote(KEY)}"])
def test_the_key_in_a_redirect_is_hidden(tmp_path: Path, capsys: pytest.CaptureFixture[str], location: str) -> None:
    folder = imported(tmp_path, lines_of(event("a")))
    with FakeTarget(answering(302, location=location)) as target:
        assert command_line("replay", "--db", folder / "events.db", "--to", target.url, "--api-key", KEY) == 1
    message = capsys.readouterr().err
    assert "It redirects to " in message
    assert leaked(message, KEY) == []
