"""Credentials of `docker login`: from config.json, or from the credential helper that it names."""

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
"""User and password; with the user "<token>" the password is an identity token."""


def find_login(host: str) -> Login | None:
    """Return docker's login for a registry, or None. Raises TransferError for an invalid file."""
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
    helpers, auths = _get_object(config, "credHelpers"), _get_object(config, "auths")
    for name in names:
        helper = helpers.get(name) or config.get("credsStore")
        entry_login = _read_helper(str(helper), name) if helper else None
        if entry_login is None and isinstance(entry := auths.get(name), Mapping):
            entry_login = _read_entry(entry, path)
        if entry_login is not None:
            return entry_login
    return None


def _get_object(config: Mapping[str, object], key: str) -> Mapping[str, object]:
    value = config.get(key)
    return value if isinstance(value, Mapping) else {}


def _read_entry(entry: Mapping[str, object], path: Path) -> Login | None:
    """Return the login of an entry of `auths`; an empty entry means that a helper has it."""
    if isinstance(token := entry.get("identitytoken"), str) and token:
        return "<token>", token
    if not isinstance(encoded := entry.get("auth"), str) or not encoded:
        return None
    try:
        user, colon, password = base64.b64decode(encoded, validate=True).decode().partition(":")
    except ValueError:  # not base64, or not text
        colon = ""
    if not colon:
        raise TransferError(
            f"{path}: auths: expected user:password in base64, found something else; log in again"
        )
    return user, password


def _read_helper(helper: str, name: str) -> Login | None:
    """Return the login of docker-credential-<helper>; None if it has none or does not exist."""
    try:
        done = subprocess.run(
            [f"docker-credential-{helper}", "get"],
            input=name, capture_output=True, text=True, timeout=_HELPER_SECONDS, check=False,
        )  # fmt: skip
        answer = json.loads(done.stdout) if done.returncode == 0 else None
    except (OSError, ValueError, subprocess.TimeoutExpired):
        return None
    if not isinstance(answer, dict) or not isinstance(answer.get("Username"), str):
        return None
    return answer["Username"], str(answer.get("Secret", ""))
