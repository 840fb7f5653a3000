"""The text of the recipe that an artifact carries: it builds the artifact again anywhere. Pure."""

from __future__ import annotations

from pathlib import PurePath

from quantkit.io.yaml_document import KeyPath, parse_document
from quantkit.recipe.parse import apply_overrides
from quantkit.recipe.rewrite import rewrite_yaml
from quantkit.recipe.schema import Recipe


def resolve_recipe_text(text: str, recipe: Recipe) -> str:
    """Return a recipe's text with everything written into it that decides the artifact.

    These are the values set on the command line, the commit of the source, and the sets that `auto`
    stands for. An `output.path` outside the working folder becomes the artifact's name, so that the
    text holds no path of this machine. Lines end with LF. A text that says all of this is returned
    as it is.
    """
    resolved = apply_overrides(end_lines(text), recipe)
    values = parse_document(resolved, recipe.name).values
    changes: list[tuple[KeyPath, object]] = []
    if recipe.source.revision != get_value(values, "source", "revision"):
        changes.append((("source", "revision"), recipe.source.revision))
    changes += [((use, "set"), name) for use, (name, _) in recipe.chosen_texts.items()]
    if is_stray_path(str(get_value(values, "output", "path"))):
        changes.append((("output", "path"), PurePath(recipe.output.path).name))
    return end_lines(rewrite_yaml(resolved, changes))


def end_lines(text: str) -> str:
    """Return a YAML text whose lines, the last one too, end with LF, unless its values differ."""
    ended = text.replace("\r\n", "\n").replace("\r", "\n")
    ended += "" if ended.endswith("\n") else "\n"
    if ended == text:
        return text
    same = parse_document(ended, "").values == parse_document(text, "").values
    return ended if same else text


def get_value(values: object, *path: str) -> object:
    """Return the value at a path of keys, None where there is none."""
    for key in path:
        values = values.get(key) if isinstance(values, dict) else None
    return values


def is_stray_path(text: str) -> bool:
    """Return whether a path is not plainly that of a folder below the working folder."""
    path = PurePath(text)
    return path.is_absolute() or not path.parts or any(x.startswith((".", "~")) for x in path.parts)


def read_output_name(text: str) -> str:
    """Return the name of the folder that a recipe's text writes to."""
    return PurePath(str(get_value(parse_document(text, "").values, "output", "path"))).name
