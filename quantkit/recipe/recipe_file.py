"""Recipe files, and the recipes that ship with quantkit by name."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.io.files import is_file
from quantkit.io.package_data import locate_folder
from quantkit.io.yaml_document import printable
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.schema import Recipe


def read_recipe(name: str, overrides: Mapping[str, str]) -> tuple[str, Recipe]:
    """Return the text of a recipe and the parsed recipe.

    `name` is a file, or the name of a recipe that ships with quantkit. `overrides` maps dotted keys
    to values as in `--set`. Raises UsageError if there is no such file, RecipeError with every
    fault.
    """
    path = Path(name)
    if not is_file(path) and not path.suffix:
        path = locate_folder("recipes") / f"{name}.yaml"
    if not is_file(path):
        shipped = ", ".join(sorted(file.stem for file in locate_folder("recipes").glob("*.yaml")))
        raise UsageError(
            f"{printable(name, 300)}: no such recipe file; recipes that ship with quantkit: "
            f"{shipped}"
        )
    text = read_text_file(path)
    return text, parse_recipe(text, name, overrides)


def read_text_file(path: Path) -> str:
    """Return the text of a UTF-8 file; UsageError if it is missing or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: expected a UTF-8 text file, found: {error}; check the file"
        ) from error
