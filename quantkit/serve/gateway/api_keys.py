"""Who may ask. A key is 256 random bits, so one SHA-256 of it is as good as any slow hash: there is nothing to guess.

The file is JSON: {"keys": [{"name": "team-a", "sha256": "...", "priority": 2, "most": 8}]}. `priority` is the most
urgent one the key may use (0 is first), `most` its requests at once (0: the gateway's bound).
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Mapping
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from quantkit.errors import UsageError
from quantkit.serve.gateway.admission_policy import LEVELS

PREFIX = "qk-"


class Key(BaseModel):
    """An entry of the file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    name: Annotated[str, StringConstraints(pattern=r"^[\w.@-]{1,64}$")]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
    priority: int = Field(default=0, ge=0, lt=LEVELS)
    most: int = Field(default=0, ge=0)


class KeyFile(BaseModel):
    """All entries."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    keys: tuple[Key, ...] = Field(strict=False)


NOBODY = Key(name="anonymous", sha256="0" * 64)
"""Who asks where no keys are needed."""


def create_key(name: str, *, priority: int = 0, most: int = 0) -> tuple[str, Key]:
    """A fresh key, to be shown once, and its entry."""
    text = PREFIX + secrets.token_urlsafe(32)
    try:
        return text, Key(name=name, sha256=digest(text), priority=priority, most=most)
    except ValidationError as error:
        raise UsageError(
            f"{name!r}: {error.errors()[0]['msg']}; name the key by letters, digits, . @ - _"
        ) from None


def parse_keys(values: Mapping[str, object], where: str) -> tuple[Key, ...]:
    """The entries of a file; UsageError names the one that is wrong. Two entries may not share a name."""
    try:
        keys = KeyFile.model_validate(values).keys
    except ValidationError as error:
        fault = error.errors()[0]
        place = ".".join(map(str, fault["loc"]))
        raise UsageError(
            f"{where}: {place}: {fault['msg']}; make entries with `quantkit key`"
        ) from None
    names = [key.name for key in keys]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice:
        raise UsageError(f"{where}: {twice}: expected once, found twice; rename or remove one")
    return keys


def authenticate(keys: tuple[Key, ...], authorization: str) -> Key | None:
    """Whose "Bearer ..." this is; None when nobody's. Every entry is compared, each in constant time."""
    scheme, _, text = authorization.partition(" ")
    asked = digest(text.strip()) if scheme.lower() == "bearer" else ""
    found = None
    for key in keys:
        if hmac.compare_digest(key.sha256, asked):
            found = key
    return found


def digest(text: str) -> str:
    """SHA-256 in hexadecimal."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
