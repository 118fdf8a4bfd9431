"""API keys: their text in flags, variables and files, and the command `keys`, which makes and lists keys.

SIGHUP makes `serve` read the file of keys again.
"""

from __future__ import annotations

import hashlib
import re
import secrets
import sqlite3
import sys
from argparse import Namespace
from collections.abc import Iterable, Mapping
from pathlib import Path

from msgspec.structs import replace

from eventstore import (
    ROLES,
    AddFlag,
    ApiKey,
    FoundKeys,
    Service,
    StartError,
    check_key,
    check_name,
    log,
    plural,
    quoted,
    say,
)

__all__ = ["add_flags", "find_api_keys", "read_again", "run"]

# ---------------------------------------------------------------------------------------------- Keys of the server

_HASHED_KEY = re.compile(r"sha256:([0-9a-f]{64})")


def _split(source: str, text: str) -> tuple[str, dict[str, str]]:
    """Return the key, and its environment, label and role by name. Raises StartError if the text has another form."""
    first, *attributes = (part.strip() for part in text.split(";"))
    key, separator, environment = (part.strip() for part in first.partition("="))
    given = {name.strip(): value.strip() for name, _, value in (part.partition("=") for part in attributes)}
    if given.keys() - {"label", "role"} or "=" in environment or "," in text:
        problem = "an API key has a ',', a second '=', or a ';' without label= or role= behind it"
        several = "EVENTSTORE_API_KEYS has commas between them, a file has each on a line"
        raise StartError(f"{source}: {problem}: are several keys meant? {several}")
    if separator and not environment:
        raise StartError(f"{source}: an API key ends in '=' with no environment after it: write KEY=ENVIRONMENT")
    return key, {"environment": environment, **given}


def _parse_api_key(source: str, text: str) -> ApiKey:
    key, values = _split(source, text)
    check_key(key, f"{source}: ")
    for name, value in values.items():
        check_name(value, f"{source}: the {name}")
    if (role := values.get("role", "")) not in ("", *ROLES):
        raise StartError(f"{source}: the role must be {' or '.join(ROLES)}, got {quoted(role)}")
    parsed = ApiKey.hashed(key, values["environment"] or "development", values.get("label", ""), role)
    hashed = _HASHED_KEY.fullmatch(key)
    return replace(parsed, digest=bytes.fromhex(hashed[1])) if hashed else parsed


def _parse_api_keys(texts: Iterable[tuple[str, str]]) -> tuple[ApiKey, ...]:
    """Parse pairs of a source and `KEY[=ENVIRONMENT][; label=LABEL][; role=ROLE]`. KEY may be `sha256:` and its hash.

    Raises StartError naming the source (flag, file line, variable), never the key.
    """
    keys: dict[bytes, tuple[ApiKey, str]] = {}
    for source, text in texts:
        parsed = _parse_api_key(source, text)
        if parsed.digest in keys:
            known_source = keys[parsed.digest][1]
            again = "twice" if known_source == source else f"as {known_source}"
            raise StartError(f"{source} names the same key {again}: a key is bound to one environment")
        keys[parsed.digest] = parsed, source
    return tuple(key for key, _ in keys.values())


def _read_key_file(path: str) -> list[tuple[str, str]]:
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


def _keys_of_flags(flags: Namespace) -> FoundKeys:
    texts = [("--api-key", text) for text in flags.api_key]
    if flags.api_key_file:
        texts += _read_key_file(flags.api_key_file)
    sources = {"--api-key": flags.api_key, "--api-key-file": flags.api_key_file}
    return FoundKeys(_parse_api_keys(texts), " and ".join(flag for flag, given in sources.items() if given))


def find_api_keys(flags: Namespace, environ: Mapping[str, str]) -> FoundKeys | None:
    """Return the keys of the flags, else those of the environment variables, else None. Raises StartError."""
    if flags.api_key or flags.api_key_file:
        return _keys_of_flags(flags)
    for name in ("EVENTSTORE_API_KEYS", "FLEXPRICE_API_KEY"):
        value = environ.get(name)
        if value is None:
            continue
        if name == "FLEXPRICE_API_KEY" and "=" in value:
            raise StartError("FLEXPRICE_API_KEY has a '=' in it: a key with its environment is for EVENTSTORE_API_KEYS")
        parts = value.split(",") if name == "EVENTSTORE_API_KEYS" else [value]
        texts = [(name, text) for text in parts if text.strip()]
        if not texts:
            raise StartError(f"{name} is set, but holds no key: write a key into it, or unset it")
        return FoundKeys(_parse_api_keys(texts), name)
    return None


def read_again(service: Service, arguments: Namespace) -> None:
    """Load the keys again. If the file cannot be used, keep the present keys."""
    try:
        found = _keys_of_flags(arguments)
        service.replace_api_keys(found.keys)
    except (StartError, sqlite3.Error) as error:
        log.error("the API keys stay as they were: %s", error)
    else:
        log.info("%s from %s", plural(len(found.keys), "API key"), found.source)
        for name in service.outboxes.keys() - {key.environment for key in found.keys}:
            log.warning("no API key is left for the environment %s, whose events are forwarded", quoted(name))


# ---------------------------------------------------------------------------------------------- The command `keys`


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
    _parse_api_keys([("the new key", line)])
    print(line)
    if not arguments.clear:
        print(f"The key, which is not stored anywhere: {key}", file=sys.stderr)
    return 0


def _list(path: str | None) -> int:
    if not path:
        raise StartError("keys list needs --api-key-file FILE")
    found = _read_key_file(path)
    keys = _parse_api_keys(found)
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
