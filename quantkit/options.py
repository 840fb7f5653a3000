"""Options and arguments that several commands share, and what they mean."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.schema import Recipe

SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
JSON = click.option("--json", "json_out", is_flag=True, help="Print JSON for machines instead of tables.")


def read_recipe(name: str, overrides: Iterable[str]) -> tuple[str, Recipe]:
    """The text of a recipe file, or of a recipe that ships with quantkit, and what it says."""
    from quantkit.recipe import parse
    from quantkit.storage.builtin import folder

    path = Path(name)
    if not path.is_file() and not path.suffix:
        path = folder("recipes") / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder("recipes").glob("*.yaml")))
        raise UsageError(f"{name}: no such recipe file; recipes that ship with quantkit: {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: expected a UTF-8 text file, found: {error}; check the file") from error
    pairs = [entry.partition("=") for entry in overrides]
    if any(not separator for _, separator, _ in pairs):
        raise UsageError("--set: expected KEY=VALUE, e.g. --set output.path=artifacts/other")
    return text, parse(text, name, {key: value for key, _, value in pairs})
