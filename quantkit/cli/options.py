"""Options and arguments that several commands share, and what they mean."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.artifact.fidelity_schema import Fidelity
    from quantkit.recipe.schema import Gate, Recipe

SET = click.option(
    "--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe."
)
JSON = click.option(
    "--json", "json_out", is_flag=True, help="Print JSON for machines instead of tables."
)
JOBS = click.option("--jobs", type=click.IntRange(1, 64), default=4, help="Files at once (4).")
TRIES = click.option(
    "--tries", type=click.IntRange(1), default=8, help="Failures in a row without progress (8)."
)
DRY_RUN = click.option(
    "--dry-run", is_flag=True, help="Move nothing; say what would move, and how many bytes."
)
JUNIT = click.option(
    "--junit", type=click.Path(path_type=Path), help="Write the gates as JUnit XML, for CI systems."
)


def read_recipe(name: str, overrides: Iterable[str]) -> tuple[str, Recipe]:
    """The text of a recipe file, or of a recipe that ships with quantkit, and what it says."""
    from quantkit.io.files import is_file
    from quantkit.io.package_data import locate_folder
    from quantkit.io.yaml_document import printable
    from quantkit.recipe.parse import parse_recipe

    path = Path(name)
    if not is_file(path) and not path.suffix:
        path = locate_folder("recipes") / f"{name}.yaml"
    if not is_file(path):
        known = ", ".join(sorted(found.stem for found in locate_folder("recipes").glob("*.yaml")))
        raise UsageError(
            f"{printable(name, 300)}: no such recipe file; recipes that ship with quantkit: {known}"
        )
    text = _text(path)
    pairs = [entry.partition("=") for entry in overrides]
    if any(not separator for _, separator, _ in pairs):
        raise UsageError("--set: expected KEY=VALUE, e.g. --set output.path=artifacts/other")
    return text, parse_recipe(text, name, {key: value for key, _, value in pairs})


def read_gates(file: Path | None, artifact: Path, report: Fidelity) -> dict[str, Gate]:
    """The gates in a YAML file, or without one those of the artifact's recipe; UsageError when there are none."""
    from quantkit.recipe.parse import parse_gates

    tasks = [row.task for row in report.benchmarks]
    if file is not None:
        return parse_gates(_text(file), str(file), tasks)
    from quantkit.artifact.layout import PLAN
    from quantkit.errors import ArtifactError
    from quantkit.io.files import read_json

    place = artifact / PLAN
    recipe = read_json(place, ArtifactError).get("recipe")
    own = (
        {key: recipe.get(key) for key in ("gates", "evaluation")}
        if isinstance(recipe, dict)
        else {}
    )
    if not own.get("gates"):
        raise UsageError(
            f"{artifact}: its recipe has no gates; name a file that has some with --gates FILE"
        )
    asked = own["evaluation"].get("tasks") if isinstance(own["evaluation"], dict) else None
    return parse_gates(
        json.dumps({"gates": own["gates"]}), str(place), asked if isinstance(asked, list) else tasks
    )


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UsageError(f"{path}: no such file; check the path") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{path}: expected a UTF-8 text file, found: {error}; check the file"
        ) from error
