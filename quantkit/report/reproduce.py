"""The command that builds an artifact again from an empty folder. It depends on the artifact's own
recipe, not on how the build was started, so that the second artifact prints the same command.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import PurePath

from quantkit.artifact.layout import RECIPE
from quantkit.io.files import is_file
from quantkit.io.package_data import BUILTIN_PREFIX, locate_folder
from quantkit.plan.plan import Plan
from quantkit.recipe.recipe_file import find_shipped_recipe
from quantkit.recipe.resolved_text import read_output_name, resolve_recipe_text
from quantkit.recipe.schema import Recipe

SAME_BYTES = (
    "With the versions below and a processor of the same kind, every file but "
    "quantkit/timings.json gets the same bytes."
)
MAX_CHARACTERS = 20_000
"""Longest recipe that the command spells out; a card has 60,000 characters."""


@dataclass(frozen=True, kw_only=True)
class BuildCommand:
    """A command for a shell in an empty folder; needs: the local files that it reads, each with its
    use in parentheses.
    """

    text: str
    needs: tuple[str, ...] = ()


def make_build_command(
    text: str, plan: Plan, *, evaluate: bool, trusted_code: Sequence[str]
) -> BuildCommand:
    """Return the command that builds an artifact again.

    text: the recipe's file. The command names a recipe that ships with quantkit, writes the recipe
    with a here-document, or, for a recipe that is too long for a card or has characters that no
    page shows, reads it from the artifact.
    """
    recipe, needs = plan.recipe, list_local_files(plan)
    resolved, name = resolve_recipe_text(text, recipe), PurePath(recipe.output.path).name
    # a hidden folder is only written to if the command line names it
    output = name if name != read_output_name(resolved) or name.startswith(".") else ""
    before, shipped = "", find_shipped_recipe(resolved)
    if shipped is not None:
        target = shipped
    elif is_showable(resolved):
        target = shlex.quote(make_file_name(name))
        end = choose_delimiter(resolved)
        before = f"cat > {target} <<'{end}'\n{resolved}{end}\n"
    else:
        artifact = PurePath(plan.path).name
        target, output = shlex.quote(f"./{artifact}/{RECIPE}"), f"again/{name}"
        needs = (f"./{artifact}/{RECIPE} (the recipe in this artifact)", *needs)
    words = ["quantkit build", target]
    words += ["--output", shlex.quote(output)] if output else []
    words += ["--skip-evaluation"] if recipe.evaluation.tasks and not evaluate else []
    words += [f"--trust-task-code {shlex.quote(code)}" for code in trusted_code]
    return BuildCommand(text=before + " ".join(words), needs=needs)


def is_showable(text: str) -> bool:
    """Return whether a card and a page show every character of a text as it is."""
    shown = all(c.isprintable() or c in "\n\t" for c in text)
    return shown and len(text) <= MAX_CHARACTERS and text.endswith("\n")


def choose_delimiter(text: str) -> str:
    """Return a line that ends a here-document and is no line of its text."""
    end, lines = "EOF", set(text.split("\n"))
    while end in lines:
        end += "_"
    return end


def make_file_name(name: str) -> str:
    """Return a portable name for the recipe of an artifact."""
    return f"{re.sub(r'[^A-Za-z0-9._-]', '-', name).lstrip('.-') or 'recipe'}.yaml"


def list_local_files(plan: Plan) -> tuple[str, ...]:
    """Return what the build read from this machine besides quantkit: source and text files."""
    recipe, source = plan.recipe, plan.source
    is_local = source.revision is None and not source.model.startswith(BUILTIN_PREFIX)
    needs = [f"{source.model} (the folder of the source)"] if is_local else []
    return (*needs, *(f"{name} ({use} text)" for use, name in list_text_paths(recipe)))


def list_text_paths(recipe: Recipe) -> list[tuple[str, str]]:
    """Return use and path of each text set that does not ship with quantkit."""
    calibration = recipe.calibration if recipe.needs_calibration else None
    texts = (("calibration", calibration), ("fidelity", recipe.fidelity))
    folder = locate_folder("calibration")
    return [
        (use, text.set)
        for use, text in texts
        if text is not None and not is_file(folder / f"{text.set}.yaml")
    ]
