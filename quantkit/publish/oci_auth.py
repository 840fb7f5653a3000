"""Logins that an OCI registry demands: which hosts it may name, and which tokens are used.

A registry answers 401 with a realm, the address of its login. Without a rule it could make this
machine call any address, such as the metadata service of a cloud, and could send credentials there.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from urllib.parse import urlsplit

from quantkit.errors import TransferError
from quantkit.io.files import shorten_repr
from quantkit.io.public_hosts import is_public_host
from quantkit.publish.remote import remove_secrets

AUTH_HOSTS_VARIABLE = "QUANTKIT_OCI_AUTH_HOSTS"
"""Environment variable with further hosts of logins, separated by commas."""
MAX_TOKEN_CHARACTERS = 32_000
"""Longest token: servers refuse heads of more than 8 to 64 kB; those of Azure have 4 kB."""

MAX_CHALLENGE_CHARACTERS = 8_000
"""Longest challenge that is read: those of registries have 200 characters."""
_CHALLENGE = re.compile(r'(?<!\w)(\w{1,32})="([^"]*)"')  # linear in the length of a name
_TOKEN = re.compile(r"[\x21-\x7e]+")  # no space and no line end, which would add a header
_LABEL = r"[a-z0-9_](?:[a-z0-9_-]{0,62})"
_NAME = re.compile(rf"{_LABEL}(?:\.{_LABEL})+")
_SECOND_LEVEL = frozenset({"ac", "co", "com", "edu", "gov", "net", "or", "org"})


def parse_challenge(header: str) -> tuple[str, dict[str, str]]:
    """Return the kind ("basic", "bearer") and the parameters of a WWW-Authenticate header."""
    kind, _, rest = header[:MAX_CHALLENGE_CHARACTERS].partition(" ")
    return kind.lower(), dict(_CHALLENGE.findall(rest))


def check_realm(realm: str, registry: str, scheme: str, where: str) -> str:
    """Return the realm of a challenge.

    registry: host[:port], called with `scheme`. Raises TransferError for a realm without https, for
    one with a user, and for a host that is neither the registry's, of the same registered domain,
    nor in AUTH_HOSTS_VARIABLE.
    """
    try:
        parts = urlsplit(realm)
        host = (parts.hostname or "").lower()
        _ = parts.port  # ValueError for an invalid one
    except ValueError:
        host, parts = "", urlsplit("")
    own = (urlsplit(f"//{registry}").hostname or "").lower()
    is_plain = parts.scheme == "http" and scheme == "http" and host == own
    if not host or "@" in parts.netloc or not (parts.scheme == "https" or is_plain):
        raise TransferError(
            f"{where}: expected the registry to name a login over https, found "
            f"{shorten_repr(remove_secrets(realm))}; credentials are not sent there"
        )
    if host != own and host not in list_auth_hosts() and not is_same_domain(host, own):
        raise TransferError(
            f"{where}: expected a login at {own} or a host of its domain, found "
            f"{shorten_repr(host)}; if it is right, add it to {AUTH_HOSTS_VARIABLE}"
        )
    return realm


def list_auth_hosts() -> frozenset[str]:
    """Return the hosts of AUTH_HOSTS_VARIABLE."""
    hosts = os.environ.get(AUTH_HOSTS_VARIABLE, "").lower().split(",")
    return frozenset(host.strip() for host in hosts if host.strip())


def is_same_domain(one: str, other: str) -> bool:
    """Return whether two names are of one registered domain: auth.docker.io and
    registry-1.docker.io.
    """
    domain = get_registered_domain(one)
    return domain is not None and domain == get_registered_domain(other)


def get_registered_domain(host: str) -> str | None:
    """Return the last two labels of a public name, three below co.uk and the like; None for other
    hosts.
    """
    if not is_public_host(host) or not _NAME.fullmatch(host):
        return None
    labels = host.split(".")
    n_labels = 3 if len(labels[-1]) == 2 and labels[-2] in _SECOND_LEVEL else 2
    return ".".join(labels[-n_labels:]) if len(labels) >= n_labels else None


def parse_token(content: bytes, where: str) -> str:
    """Return the token in the answer of a login; raises TransferError for none or an unusable
    one.
    """
    try:
        values = json.loads(content)
    except (ValueError, RecursionError):
        values = None
    token = values.get("token") or values.get("access_token") if isinstance(values, Mapping) else ""
    if (
        not isinstance(token, str)
        or len(token) > MAX_TOKEN_CHARACTERS
        or not _TOKEN.fullmatch(token)
    ):
        raise TransferError(
            f"{where}: expected a token of printable characters from the registry's login, found "
            "something else; try again"
        )
    return token
