"""API keys in a file: reading it, reading it again on SIGHUP, and the command `keys`, which makes and lists keys."""

from __future__ import annotations

import hashlib
import secrets
import sqlite3
import sys
from argparse import Namespace
from pathlib import Path

from eventstore import ROLES, AddFlag, Service, StartError, find_api_keys, log, parse_api_keys, plural, quoted, say

__all__ = ["add_flags", "read_again", "read_key_file", "run"]


def read_key_file(path: str) -> list[tuple[str, str]]:
    """Return the source and the text of each key: one on a line, comments after a #. Raises StartError."""
    try:
        lines = Path(path).read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise StartError(f"cannot read --api-key-file {path}: {getattr(error, 'strerror', error)}") from error
    texts = [line.partition("#")[0].strip() for line in lines]
    found = [(f"--api-key-file {path}, line {number}", text) for number, text in enumerate(texts, 1) if text]
    if not found:
        raise StartError(f"--api-key-file {path} has no key in it: write KEY=ENVIRONMENT, each on a line")
    return found


def read_again(service: Service, arguments: Namespace) -> None:
    """Load the keys again. If the file cannot be used, keep the present keys."""
    try:
        found = find_api_keys(arguments, {})
        service.replace_api_keys(found.keys)
    except (StartError, sqlite3.Error) as error:
        log.error("the API keys stay as they were: %s", error)
    else:
        log.info("%s from %s", plural(len(found.keys), "API key"), found.source)
        for name in service.outboxes.keys() - {key.environment for key in found.keys}:
            log.warning("no API key is left for the environment %s, whose events are forwarded", quoted(name))


def add_flags(_: str, add: AddFlag) -> None:
    """Add the flags of `keys`."""
    add("action", choices=["new", "list"], help="make a key and print its line for the file, or list a file's keys")
    add("--environment", metavar="NAME", default="development", help="environment of the new key")
    add("--role", choices=ROLES, help="what the new key may do; everything if not given")
    add("--label", metavar="TEXT", help="name of the new key in the log")
    add("--clear", action="store_true", help="print the line with the key itself instead of its hash")
    add("--api-key-file", metavar="FILE", help="file whose keys are listed")


def _make(arguments: Namespace) -> int:
    """Print a new key's line for the file. Raises StartError if a flag cannot be written into such a line."""
    if not arguments.environment.strip():
        raise StartError("--environment must not be empty: name an environment, or leave the flag out")
    key = f"evs_{secrets.token_urlsafe(24)}"
    shown = key if arguments.clear else f"sha256:{hashlib.sha256(key.encode()).hexdigest()}"
    line = f"{shown}={arguments.environment}"
    line += f"; label={arguments.label}" if arguments.label else ""
    line += f"; role={arguments.role}" if arguments.role else ""
    checks = (("--environment", arguments.environment, "#,;="), ("--label", arguments.label or "", "#,;"))
    for flag, text, reserved in checks:
        if found := [character for character in reserved if character in text]:
            raise StartError(f"{flag} must not contain {quoted(found[0])}, got {quoted(text)}")
    parse_api_keys([("the new key", line)])
    print(line)
    if not arguments.clear:
        print(f"The key, which is not stored anywhere: {key}", file=sys.stderr)
    return 0


def _list(path: str | None) -> int:
    if not path:
        raise StartError("keys list needs --api-key-file FILE")
    found = read_key_file(path)
    keys = parse_api_keys(found)
    rows = [("hash", "environment", "role", "label")]
    rows += [(key.digest.hex()[:12], key.environment, key.role or "any", key.label or "-") for key in keys]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(text.ljust(width) for text, width in zip(row, widths, strict=True)).rstrip())
    clear = sum(not text.startswith("sha256:") for _, text in found)
    if clear:
        say(f"{plural(clear, 'key')} in clear text; `eventstore keys new` prints lines with hashes instead")
    return 0


def run(arguments: Namespace) -> int:
    """Run `eventstore keys` and return its exit status. Raises StartError."""
    return _list(arguments.api_key_file) if arguments.action == "list" else _make(arguments)
