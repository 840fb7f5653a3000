"""Hosts to which a server may redirect: those of the internet, not of this machine's network."""

from __future__ import annotations

import re
from ipaddress import ip_address

_NUMERIC = re.compile(r"\d+|0x[0-9a-f]*")  # "127.1" and "0x7f000001" are addresses
_LOCAL_SUFFIXES = (".localhost", ".local", ".internal", ".lan", ".home.arpa", ".localdomain")


def is_public_host(host: str) -> bool:
    """Return whether a host is not of this machine or its network, as far as its name says."""
    host = host.strip("[]").lower().rstrip(".")
    try:
        return ip_address(host).is_global
    except ValueError:
        pass
    last = host.rpartition(".")[2]
    return "." in host and not _NUMERIC.fullmatch(last) and not host.endswith(_LOCAL_SUFFIXES)
