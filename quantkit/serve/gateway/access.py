"""Checks of a request before its body: browsers of other sites, and the operator's endpoints.

A gateway without keys trusts every client that can reach its address. A browser can be made to
reach it by any web page: with a request across sites (the Origin header names the page's site), or
with DNS rebinding (the page's own host name resolves to this machine, and the Host header names
it). IP addresses in Host cannot be rebound.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from urllib.parse import urlsplit

from quantkit.serve.gateway.errors import RequestRejected

RawHeaders = Iterable[tuple[bytes, bytes]]
LOOPBACK_NAME = "localhost"


@dataclass(frozen=True)
class HostPolicy:
    """The names that Host and Origin may have; `host` is the address that the server listens on."""

    host: str
    allowed: tuple[str, ...]

    def check(self, headers: RawHeaders) -> None:
        """Raise RequestRejected if a browser of another site may have sent the request."""
        hosts = [parse_host(value.decode("latin-1")) for name, value in headers if name == b"host"]
        for host in hosts:
            if not (self.is_trusted(host) or is_address(host)):
                raise reject_site("Host", host)
        for name, value in headers:
            if name != b"origin":
                continue
            origin = parse_origin(value.decode("latin-1"))
            if not (self.is_trusted(origin) or (origin in hosts and is_address(origin))):
                raise reject_site("Origin", value.decode("latin-1"))

    def is_trusted(self, host: str) -> bool:
        """Return whether a name is this machine's or an allowed one."""
        names = {self.host.lower(), *(name.lower() for name in self.allowed)}
        return is_loopback(host) or (bool(host) and host in names)


def reject_site(header: str, name: str) -> RequestRejected:
    """Return the error for a name that is not allowed."""
    return RequestRejected(
        403,
        "permission_error",
        f"{header}: expected localhost, an IP address or a name of --allow-host, found "
        f"{name[:100]!r}; allow it, or use API keys",
    )


def parse_host(value: str) -> str:
    """Return the name or address in a Host header in lower case; "" if there is none."""
    return parse_origin(f"http://{value}")


def parse_origin(value: str) -> str:
    """Return the name or address in an Origin header in lower case; "" if there is none."""
    try:
        parts = urlsplit(value)
        if parts.username is not None or parts.path or parts.query or parts.fragment:
            return ""
        return (parts.hostname or "").rstrip(".")
    except ValueError:
        return ""


def is_address(host: str) -> bool:
    """Return whether a host is an IP address."""
    try:
        ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(host: str) -> bool:
    """Return whether a host is this machine itself: localhost, 127.0.0.0/8 or ::1."""
    if is_address(host):
        return ip_address(host).is_loopback
    return host == LOOPBACK_NAME or host.endswith(f".{LOOPBACK_NAME}")
