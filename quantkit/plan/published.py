"""Published configs by Hub id; they ship with quantkit, so that plans and sizes need no network."""

from __future__ import annotations

import importlib.resources
import json

from quantkit import registry
from quantkit.contracts import Config


def find_published_config(model: str) -> tuple[str, Config] | None:
    """Return file name and config of a Hub id, or None if it does not ship with quantkit."""
    folder = importlib.resources.files("quantkit.architectures") / "published"
    for name in registry.list_names("architectures"):
        files = registry.get_architecture(name).published or {}
        if model in files:
            values = json.loads((folder / files[model]).read_text(encoding="utf-8"))
            return files[model], Config(values=values, where=files[model])
    return None


def list_published_models() -> tuple[str, ...]:
    """Return every Hub id whose config ships with quantkit."""
    families = registry.list_names("architectures")
    return tuple(
        sorted(
            model for name in families for model in registry.get_architecture(name).published or {}
        )
    )
