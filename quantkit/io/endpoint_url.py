"""The URL of a server's API, as recipes and results may record it."""

from __future__ import annotations

from urllib.parse import urlsplit


def normalize_endpoint_url(url: str) -> str:
    """Return the URL without a final slash. Raises ValueError if it is none or has a secret."""
    try:
        parts = urlsplit(url)
        has_host = parts.scheme in ("http", "https") and bool(parts.hostname)
    except ValueError:  # brackets of an address that do not match
        has_host = False
    if not has_host:
        raise ValueError(f"expected http://HOST:PORT/v1, found {url!r}; name the server's API")
    if parts.username or parts.password or parts.query:
        raise ValueError(
            "expected no user, password or query in the address; keys come from the environment"
        )
    return url.rstrip("/")
