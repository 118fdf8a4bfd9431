"""Hides secrets in texts from elsewhere: a target's answer may repeat the API key that it got, or a part of it."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable

__all__ = ["Hider"]

_PART_CHARS = 12  # a shorter part of a secret says little, and may be a word such as "development"
_MIN_ENCODED_CHARS = 8  # a shorter secret in another form occurs by chance
# One character as JSON, a URL or HTML may spell it, perhaps twice. White space and backslashes are skipped.
_CHARACTER = re.compile(
    r"\\+(?:u([0-9a-f]{4})|x([0-9a-f]{2}))|%(?:25)*([0-9a-f]{2})|&(?:amp;)*(#?\w+;)|[^\s\\]", re.IGNORECASE
)
_AS_IN_BASE64 = str.maketrans("-_", "+/")  # as one of its alphabets


def _read(text: str) -> list[tuple[str, int, int]]:
    """Return the characters of a text without their case and without backslashes, and where each begins and ends."""
    found = []
    for match in _CHARACTER.finditer(text):
        code = match[1] or match[2] or match[3]
        chars = chr(int(code, 16)) if code else html.unescape(f"&{match[4]}") if match[4] else match[0]
        found += [(char.lower()[:1].translate(_AS_IN_BASE64), *match.span()) for char in chars if char != "\\"]
    return found


def _spellings(secret: str) -> list[str]:
    """Return the secret as `_read` reads it, as it is, and in hexadecimal and Base64.

    Base64 has three forms, one for each offset in a group of three bytes. Its first and last characters depend on the
    neighbours.
    """
    raw = secret.encode()
    forms = [raw.hex()]
    for before in range(3):
        encoded = base64.b64encode(b"\0" * before + raw).decode()
        forms.append(encoded[-(-8 * before // 6) : 8 * (before + len(raw)) // 6])
    forms = [secret.replace("\\", ""), *[form for form in forms if len(form) >= _MIN_ENCODED_CHARS]]
    return ["".join(char for char, *_ in _read(secret)), *[form.lower().translate(_AS_IN_BASE64) for form in forms]]


class Hider:
    """Replaces secrets, and longer parts of them, by `***`."""

    def __init__(self, secrets: Iterable[str]) -> None:
        self._parts: dict[int, set[str]] = {}  # by length
        for secret in filter(None, secrets):
            for form in filter(None, _spellings(secret)):
                size = min(_PART_CHARS, len(form))
                parts = {form[at : at + size] for at in range(len(form) - size + 1)}
                self._parts.setdefault(size, set()).update(parts)

    def hide(self, text: str, max_chars: int) -> str:
        """Replace the secrets, then cut the text to `max_chars`: half a secret would not be recognized."""
        read = _read(text[: 10 * max_chars + 1000])
        chars = "".join(char for char, *_ in read)
        secret = {
            each
            for size, parts in self._parts.items()
            for at in range(len(chars) - size + 1)
            if chars[at : at + size] in parts
            for each in range(at, at + size)
        }
        pieces, end = [], 0
        for each in sorted(secret):
            _, start, next_end = read[each]
            if each - 1 not in secret:
                pieces += [text[end:start], "***"]
            end = next_end
        rest = text[end : end + max_chars] if end < 10 * max_chars else ""  # where this was cut, a secret may begin
        return "".join([*pieces, rest])[:max_chars]
