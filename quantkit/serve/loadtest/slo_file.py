"""The targets of a load test: a file, the defaults, or those of an artifact's recipe."""

from __future__ import annotations

import importlib.resources
import json
from pathlib import Path

from quantkit.artifact.layout import PLAN
from quantkit.errors import ArtifactError
from quantkit.io.files import read_json
from quantkit.recipe.recipe_file import read_text_file
from quantkit.recipe.slo import Slo, parse_slo

DEFAULT = "default"


def read_slo(name: str) -> Slo:
    """Read targets: `default` for those that ship with quantkit, or a YAML file with `slo:`.

    Raises UsageError if the file cannot be read, RecipeError with all its faults.
    """
    if name == DEFAULT:
        return parse_slo(read_default_text(), "slo.yaml")
    return parse_slo(read_text_file(Path(name)), name)


def read_default_text() -> str:
    """Return the text of the targets that ship with quantkit."""
    file = importlib.resources.files("quantkit.serve.loadtest") / "slo.yaml"
    return file.read_text(encoding="utf-8")


def read_recipe_slo(artifact: Path) -> Slo | None:
    """Return the targets in the recipe of an artifact; None if it has none."""
    recipe = read_json(artifact / PLAN, ArtifactError).get("recipe")
    targets = recipe.get("slo") if isinstance(recipe, dict) else None
    if not targets:
        return None
    return parse_slo(json.dumps({"slo": targets}), str(artifact / PLAN))
