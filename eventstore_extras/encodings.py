"""Refuse a body that is compressed or not in UTF-8. Without this module, JSON's own error would say less."""

from __future__ import annotations

from starlette.requests import Request

from eventstore import MAX_ECHO_CHARS, ApiError, printable

__all__ = ["refuse_encoded"]

_COMPRESSED = {  # how a compressed body begins
    b"\x1f\x8b": "gzip", b"\x28\xb5\x2f\xfd": "zstd",
    b"x\x01": "deflate", b"x\x9c": "deflate", b"x\xda": "deflate",
}  # fmt: skip


def refuse_encoded(request: Request, body: bytes) -> None:
    """Raises ApiError if a body is compressed, or has another encoding than UTF-8. `body` does not begin with a {."""
    seen = next((name for start, name in _COMPRESSED.items() if body.startswith(start)), "")
    sent = request.headers.get("content-encoding", "").strip().lower()
    if seen or (sent not in ("", "identity") and body.lstrip()[:1] not in (b"{", b"[")):
        problem = f"is compressed (Content-Encoding: {printable(sent[:MAX_ECHO_CHARS]) or seen}): send it uncompressed"
    elif body.startswith((b"\xff\xfe", b"\xfe\xff", b"\0")) or body[1:2] == b"\0":
        problem = "is in UTF-16 or UTF-32: send it in UTF-8"
    elif body.startswith(b"\xef\xbb\xbf"):
        problem = "begins with a byte order mark (BOM): send it without one"
    elif body[:3].lower() == b"%7b":
        problem = "is percent-encoded: send it as it is, only URLs are percent-encoded"
    else:
        return
    raise ApiError("validation_error", f"the body {problem}")
