"""Recipe files, and the recipes that ship with quantkit by name.

A recipe file may be a stranger's, and a build writes where it says. A file alone may name folders
below the working folder only; an override may name any.
"""

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
    path = locate_recipe(name)
    text = read_text_file(path)
    return text, parse_recipe(text, name, overrides)


def locate_recipe(name: str) -> Path:
    """Return the file of a recipe; raises UsageError if there is none."""
    path = Path(name)
    if is_shipped(name):
        path = locate_folder("recipes") / f"{name}.yaml"
    if not is_file(path):
        shipped = ", ".join(sorted(file.stem for file in locate_folder("recipes").glob("*.yaml")))
        raise UsageError(
            f"{printable(name, 300)}: no such recipe file; recipes that ship with quantkit: "
            f"{shipped}"
        )
    return path


def is_shipped(name: str) -> bool:
    """Return whether a name is not that of a file, so that it can only be a shipped recipe's."""
    path = Path(name)
    return not path.suffix and not is_file(path)


def find_stray_output(name: str, recipe: Recipe) -> Path | None:
    """Return where a recipe file writes if that is not plainly below the working folder.

    None for a folder below it without a hidden part, for `output.path` set by an override, and for
    shipped recipes. Links and `..` are resolved: a folder that comes with a recipe may hold links.
    """
    if is_shipped(name) or recipe.is_overridden("output.path"):
        return None
    place, path = Path.cwd().resolve(), Path(recipe.output.path).absolute().resolve()
    if path != place and path.is_relative_to(place):
        parts = path.relative_to(place).parts
        return path if any(part.startswith(".") for part in parts) else None
    return path


def describe_stray_output(name: str, path: Path) -> str:
    """Return the message for the path of `find_stray_output`."""
    return (
        f"{printable(name, 300)}: output.path: expected a folder below the working folder "
        f"{Path.cwd()}, found {printable(str(path), 300)}"
    )


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
