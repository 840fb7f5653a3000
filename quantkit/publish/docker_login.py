"""Credentials of `docker login`, as docker keeps them: in config.json, or in the helper that it names."""

from __future__ import annotations

import base64
import json
import os
import subprocess
from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import TransferError
from quantkit.io.files import read_json

_HUB = "https://index.docker.io/v1/"
_HELPER_SECONDS = 60

Login = tuple[str, str]
"""User and password; the user "<token>" means that the password is an identity token."""


def find_login(host: str) -> Login | None:
    """What docker would use for a registry; None without a login. Raises TransferError when the file is none."""
    path = Path(os.environ.get("DOCKER_CONFIG") or Path.home() / ".docker") / "config.json"
    if not path.is_file():
        return None
    config = read_json(path, TransferError)
    names = [
        host,
        f"https://{host}",
        f"http://{host}",
        *([_HUB] if host in {"docker.io", "index.docker.io"} else []),
    ]
    helpers, auths = _object(config, "credHelpers"), _object(config, "auths")
    for name in names:
        helper = helpers.get(name) or config.get("credsStore")
        found = _asked(str(helper), name) if helper else None
        if found is None and isinstance(entry := auths.get(name), Mapping):
            found = _kept(entry, path)
        if found is not None:
            return found
    return None


def _object(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _kept(entry: Mapping[str, object], path: Path) -> Login | None:
    """The login in an entry of `auths`; an empty one says that a helper has it."""
    if isinstance(token := entry.get("identitytoken"), str) and token:
        return "<token>", token
    if not isinstance(kept := entry.get("auth"), str) or not kept:
        return None
    try:
        user, colon, password = base64.b64decode(kept, validate=True).decode().partition(":")
    except ValueError:  # no base64, or no text in it
        colon = ""
    if not colon:
        raise TransferError(
            f"{path}: auths: expected user:password in base64, found something else; log in again"
        )
    return user, password


def _asked(helper: str, name: str) -> Login | None:
    """What docker-credential-<helper> says; None when it knows nothing or is not there."""
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=name, capture_output=True, text=True, timeout=_HELPER_SECONDS, check=False,
        )  # fmt: skip
        found = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if not isinstance(found, dict) or not isinstance(found.get("Username"), str):
        return None
    return found["Username"], str(found.get("Secret", ""))
