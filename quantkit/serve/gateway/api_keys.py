"""API keys and their file.

A key is 256 random bits. One SHA-256 of it is as secure as a slow hash: it cannot be guessed.

The file is JSON: {"keys": [{"name": "team-a", "sha256": "...", "priority": 2, "most": 8}]}.
`priority` is the most urgent priority that the key may use (0 is first), `most` its number of
concurrent requests (0: the gateway's limit `per_key`).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from quantkit.errors import UsageError
from quantkit.serve.gateway.admission_policy import PRIORITY_LEVELS

KEY_PREFIX = "qk-"


class ApiKey(BaseModel):
    """An entry of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, StringConstraints(pattern=r"^[\w.@-]{1,64}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    priority: int = Field(default=0, ge=0, lt=PRIORITY_LEVELS)
    most: int = Field(default=0, ge=0)


class KeyFile(BaseModel):
    """The whole file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keys: tuple[ApiKey, ...] = Field(strict=False)


ANONYMOUS = ApiKey(name="anonymous", sha256="0" * 64)
"""The client of every request if the gateway has no keys."""


def create_key(name: str, *, priority: int = 0, most: int = 0) -> tuple[str, ApiKey]:
    """Create a key. Return its text, to be shown once, and its entry. UsageError for a bad name."""
    text = KEY_PREFIX + secrets.token_urlsafe(32)
    try:
        return text, ApiKey(name=name, sha256=hash_key(text), priority=priority, most=most)
    except ValidationError as error:
        raise UsageError(
            f"{name!r}: {error.errors()[0]['msg']}; use letters, digits, . @ - _ in the name"
        ) from None


def parse_keys(values: Mapping[str, object], where: str) -> tuple[ApiKey, ...]:
    """Parse the entries of a file. UsageError names the invalid one; names must be unique."""
    try:
        keys = KeyFile.model_validate(values).keys
    except ValidationError as error:
        fault = error.errors()[0]
        field = ".".join(map(str, fault["loc"]))
        raise UsageError(
            f"{where}: {field}: {fault['msg']}; make entries with `quantkit key`"
        ) from None
    names = [key.name for key in keys]
    duplicate = next((name for name in names if names.count(name) > 1), None)
    if duplicate:
        raise UsageError(f"{where}: {duplicate}: expected once, found twice; rename or remove one")
    return keys


def authenticate(keys: tuple[ApiKey, ...], authorization: str) -> ApiKey | None:
    """Return the key of an Authorization header ("Bearer ..."), or None.

    The digest is compared with every entry, each in constant time.
    """
    scheme, _, text = authorization.partition(" ")
    digest = hash_key(text.strip()) if scheme.lower() == "bearer" else ""
    match = None
    for key in keys:
        if hmac.compare_digest(key.sha256, digest):
            match = key
    return match


def hash_key(text: str) -> str:
    """Return the SHA-256 of a key in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
