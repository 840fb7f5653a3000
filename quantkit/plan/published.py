"""Configs that families publish under hub ids, shipped so that plans and sizes need no network."""

from __future__ import annotations

import importlib.resources
import json

from quantkit import registry
from quantkit.contracts import Config


def find_published_config(model: str) -> tuple[str, Config] | None:
    """File and config that a family publishes for a hub id, shipped so that its plan needs no network."""
    folder = importlib.resources.files("quantkit.architectures") / "published"
    for name in registry.list_names("architectures"):
        files = registry.get_architecture(name).published or {}
        if model in files:
            values = json.loads((folder / files[model]).read_text(encoding="utf-8"))
            return files[model], Config(values=values, where=files[model])
    return None


def list_published_models() -> tuple[str, ...]:
    """Every hub id whose config is shipped."""
    families = registry.list_names("architectures")
    return tuple(
        sorted(
            model for name in families for model in registry.get_architecture(name).published or {}
        )
    )
