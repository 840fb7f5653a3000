"""Recipe files, the recipes that ship with quantkit by name, and recipes written for a model.

A recipe file may be a stranger's, and a build writes where it says. A file alone may name folders
below the working folder only; an override may name any.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from quantkit.checkpoint.file_names import HUB_ID
from quantkit.checkpoint.foreign_weights import PICKLED
from quantkit.errors import UsageError
from quantkit.io.files import expand_home, is_file, write_output
from quantkit.io.package_data import BUILTIN_PREFIX, is_recipe_name, locate_folder
from quantkit.io.yaml_document import printable
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.schema import Recipe

WEIGHT_ENDINGS = (".gguf", ".safetensors", *PICKLED)
"""Endings of files that hold weights: none is a recipe."""


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
            f"{printable(name, 300)}: no such recipe file, and no folder or hub id (owner/name) of "
            f"a model; recipes that ship with quantkit: {shipped}"
        )
    return path


def is_model(target: str) -> bool:
    """Return whether a command's target is a model: built in, a folder, or a hub id.

    A YAML file, with or without its ending, and the name of a shipped recipe without a folder of
    that name are recipes.
    """
    if target.startswith(BUILTIN_PREFIX) or target.casefold().endswith(WEIGHT_ENDINGS):
        return True  # a file of weights is refused with its right step, where models are located
    if is_recipe_name(target) or any(is_file(Path(target + end)) for end in ("", ".yaml")):
        return False
    return is_folder(expand_home(target)) or HUB_ID.fullmatch(target) is not None


def is_folder(path: Path) -> bool:
    """Return whether a folder exists; False for impossible names (too long, or with NUL)."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


def save_recipe(path: Path, text: str, recipe: Recipe) -> bool:
    """Write a recipe that was chosen for a model; return False if the file has it already.

    A file with the same values is kept, whatever its comments. Raises UsageError for another file.
    """
    if path.is_symlink() or path.exists():
        if is_same_recipe(path, recipe):
            return False
        raise UsageError(
            f"{path}: expected no file, or the recipe of this command, found another; `quantkit "
            f"build {path}` builds it; to keep it and write a new one, pass --recipe FILE"
        )
    write_output(path, text.encode())
    return True


def is_same_recipe(path: Path, recipe: Recipe) -> bool:
    """Return whether a file holds a recipe with the same values, output.path and memory too."""
    try:
        other = parse_recipe(read_text_file(path), str(path))
    except UsageError:  # RecipeError too: not a recipe
        return False
    return (other.hash, other.output.path, other.memory) == (
        recipe.hash,
        recipe.output.path,
        recipe.memory,
    )


def is_shipped(name: str) -> bool:
    """Return whether a name is not that of a file, so that it can only be a shipped recipe's."""
    path = Path(name)
    return not path.suffix and not is_file(path)


def find_shipped_recipe(text: str) -> str | None:
    """Return the name of the shipped recipe with this text; None without one."""
    files = sorted(locate_folder("recipes").glob("*.yaml"))
    return next((file.stem for file in files if read_text_file(file) == text), None)


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
