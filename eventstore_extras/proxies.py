"""Finds the proxy that leads to a target: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in upper or lower case.

httpx would read the same variables, but it fails with a traceback on a value that it does not know, and it matches
neither networks nor names with a leading dot in NO_PROXY.
"""

from __future__ import annotations

import ipaddress
import os
import re
import socket
import sys
import urllib.parse
from contextlib import suppress
from typing import TYPE_CHECKING, NamedTuple
from urllib.request import getproxies

from eventstore import StartError, quoted

if TYPE_CHECKING:
    import httpx

__all__ = ["Proxy", "find_proxy", "is_unreachable", "port_of", "transport_of"]

_IpAddress = ipaddress.IPv4Address | ipaddress.IPv6Address
_SCHEMES = ("http", "https", "socks5", "socks5h")
_EXAMPLE = "http://host:3128 or socks5://host:1080"


class Proxy(NamedTuple):
    url: str
    source: str  # the variable that it came from

    @property
    def name(self) -> str:
        """The proxy as messages show it: without its user and password."""
        parts = urllib.parse.urlsplit(self.url)
        return f"{parts.scheme}://{parts.netloc.rpartition('@')[2]} ({self.source})"

    @property
    def password(self) -> str:
        return urllib.parse.unquote(urllib.parse.urlsplit(self.url).password or "")


# ---------------------------------------------------------------------------------------------- hosts


def port_of(url: urllib.parse.SplitResult) -> int:
    return url.port or {"http": 80, "https": 443}[url.scheme]


def _address(host: str) -> _IpAddress | None:
    """Return the host as an IP address, or None if it is a name. Short forms such as 127.1 are addresses."""
    with suppress(ValueError):
        address = ipaddress.ip_address(urllib.parse.unquote(host))
        return getattr(address, "ipv4_mapped", None) or address
    with suppress(OSError, UnicodeError):
        return ipaddress.IPv4Address(socket.inet_aton(host))
    return None


def _is_loopback(host: str) -> bool:
    address = _address(host)
    if address is None:
        return host == "localhost" or host.endswith(".localhost")
    return address.is_loopback or address.is_unspecified


def _matches(entry: str, host: str, port: int) -> bool:
    """Return True if an entry of NO_PROXY matches: a name, domain, address or network, perhaps with a port."""
    entry = entry.rpartition("://")[2].rstrip("/")
    if found := re.fullmatch(
        r"\[(.+)\](?::(\d{1,5})|(/\d+))?", entry
    ):  # an IPv6 address with a port or a prefix length
        entry, entry_port = found[1] + (found[3] or ""), found[2]
    else:
        found = re.fullmatch(r"([^:]*):(\d{1,5})", entry)
        entry, entry_port = (found[1], found[2]) if found else (entry, None)
    if entry_port is not None and int(entry_port) != port:
        return False
    if address := _address(host):
        with suppress(ValueError):
            return address in ipaddress.ip_network(entry, strict=False)
        return entry == host
    name = entry.removeprefix("*").strip(".")
    return name != "" and (host == name or host.endswith(f".{name}"))


def _is_exempt(no_proxy: str, host: str, port: int) -> bool:
    entries = re.split(r"[,;\s]+", no_proxy.lower())
    return "*" in entries or any(_matches(entry, host, port) for entry in entries if entry)


# ---------------------------------------------------------------------------------------------- proxies


def _source(kind: str, value: str) -> str:
    """Return the name of the variable with this value, as the user wrote it."""
    names = (name for name, found in os.environ.items() if name.lower() == f"{kind}_proxy" and found == value)
    return min(names, key=lambda name: name != name.lower(), default="the system's settings")


def _check(url: str, source: str) -> Proxy:
    """Return the proxy with this URL. Raises StartError, which names the source and never shows a password."""
    _, at, after = url.rpartition("@")
    shown = quoted(f"***@{after}" if at else url)
    try:
        parts = urllib.parse.urlsplit(url)
        valid = bool(parts.hostname) and parts.port != 0 and url.isprintable() and " " not in url
        valid = valid and parts.path in ("", "/") and not (parts.query or parts.fragment)
    except ValueError:
        valid = False
    if not valid:
        advice = "; percent-encode special characters in the user and password" if at else ""
        raise StartError(f"{source} must be the URL of a proxy, like {_EXAMPLE}, got {shown}{advice}")
    if parts.scheme not in _SCHEMES:
        known = f"{'://, '.join(_SCHEMES[:-1])}:// or {_SCHEMES[-1]}://"
        raise StartError(f"{source} must begin with {known}, got {shown}")
    return Proxy(url, source)


def find_proxy(url: str) -> Proxy | None:
    """Return the proxy for a target. Return None to connect directly, always to this machine.

    Raises StartError if the variable that applies to the target cannot be used; ignores the other variables.
    """
    parts = urllib.parse.urlsplit(url)
    host = (parts.hostname or "").rstrip(".")
    settings = getproxies()
    kind = next((kind for kind in (parts.scheme, "all") if settings.get(kind, "").strip()), "")
    if not kind or _is_loopback(host) or _is_exempt(settings.get("no", ""), host, port_of(parts)):
        return None
    value = settings[kind].strip()
    return _check(value if "://" in value else f"http://{value}", _source(kind, settings[kind]))


# ---------------------------------------------------------------------------------------------- connections


def _check_usable(proxy: Proxy) -> None:
    """Raise StartError unless httpx can use the proxy."""
    import httpx  # noqa: PLC0415 - only the extra `cli` installs it

    try:
        httpx.AsyncHTTPTransport(verify=False, proxy=proxy.url)
        _ = httpx.URL(proxy.url).host  # decodes the host, as each request would
    except ImportError:
        install = f"{sys.executable} -m pip install 'httpx[socks]'"
        raise StartError(f"the proxy {proxy.name} needs a library for SOCKS: {install}") from None
    except (httpx.InvalidURL, ValueError) as error:
        raise StartError(f"the proxy {proxy.name} has no valid URL: {error}") from None


def transport_of(proxy: Proxy | None, limits: httpx.Limits) -> httpx.AsyncHTTPTransport:
    """Return the transport that makes httpx's connections, through a proxy if there is one.

    Raises StartError if httpx cannot use the proxy, or the certificates that environment variables name.
    """
    import httpx  # noqa: PLC0415 - only the extra `cli` installs it

    if proxy:
        _check_usable(proxy)
    try:
        return httpx.AsyncHTTPTransport(limits=limits, proxy=proxy.url if proxy else None)
    except OSError as error:  # or its subclass ssl.SSLError
        names = [name for name in ("SSL_CERT_FILE", "SSL_CERT_DIR") if os.environ.get(name)]
        source = names[0] if names else "the file of certificates"
        raise StartError(f"{source} cannot be read: {error.strerror or error}") from None


def is_unreachable(error: Exception) -> bool:
    """Return True if no connection was opened. With a proxy, this means that the proxy itself cannot be reached.

    A failed TLS handshake does not count: through a proxy, it is a handshake with the target.
    """
    import httpx  # noqa: PLC0415 - only the extra `cli` installs it

    is_tls = str(error) == "" or str(error).startswith("[SSL")  # without a text: closed during the handshake
    return isinstance(error, httpx.ConnectTimeout) or (isinstance(error, httpx.ConnectError) and not is_tls)
