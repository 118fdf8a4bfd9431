"""Hides secrets in texts from elsewhere: a target's answer may repeat the API key that it got."""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Iterable

__all__ = ["Hider"]

_MIN_BASE64_CHARS = 8  # a shorter part of an encoded secret says nothing, and occurs by chance


def _spelled(secret: str) -> str:
    """Return a pattern for a secret, each character as it is or as JSON, a URL or HTML may spell it."""
    spellings = []
    for char in secret:
        code = ord(char)
        forms = [char, f"%{code:02x}", f"\\u{code:04x}", f"\\{char}", f"&#{code};", f"&#x{code:x};", html.escape(char)]
        spellings.append("(?:" + "|".join(map(re.escape, dict.fromkeys(forms))) + ")")
    return "".join(spellings)


def _encoded(secret: str) -> list[str]:
    """Return patterns for a secret inside Base64: it has three forms, one for each offset in a group of three bytes."""
    patterns = []
    for before in range(3):
        size_bits = 8 * (before + len(secret.encode()))
        encoded = base64.b64encode(b"\0" * before + secret.encode()).decode()
        certain = encoded[-(-8 * before // 6) : size_bits // 6]  # the other characters depend on the neighbours
        if len(certain) >= _MIN_BASE64_CHARS:
            patterns.append(re.escape(certain).replace(r"\+", "[+-]").replace("/", "[/_]"))
    return patterns


class Hider:
    """Replaces secrets by `***`."""

    def __init__(self, secrets: Iterable[str]) -> None:
        found = sorted(filter(None, secrets), key=len, reverse=True)
        patterns = [pattern for secret in found for pattern in (_spelled(secret), *_encoded(secret))]
        self._pattern = re.compile("|".join(patterns) or "(?!)", re.IGNORECASE)
        self._longest = max(map(len, found), default=0)

    def hide(self, text: str, max_chars: int) -> str:
        """Replace the secrets, then cut the text to `max_chars`: half a secret would not be recognized."""
        # Enough characters even if the text is nothing but secrets in their longest spelling.
        enough_chars = 3 * (max_chars + 3) * (self._longest + 1)
        return self._pattern.sub("***", text[:enough_chars])[:max_chars]
