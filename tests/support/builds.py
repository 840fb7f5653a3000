"""Builds of small random checkpoints."""

from __future__ import annotations

from pathlib import Path

from support.checkpoints import make_recipe_text

from quantkit import pipeline
from quantkit.plan.plan import Plan
from quantkit.progress import Progress
from quantkit.recipe.parse import parse_recipe


def ignore_progress(_: Progress | Plan) -> None:
    """Ignore progress and plans."""


def build(folder: Path, output: Path, /, **keys: str) -> pipeline.BuildResult:
    """Build one artifact without benchmarks."""
    (result,) = build_all(folder, output, **keys)
    return result


def build_all(folder: Path, output: Path, /, **keys: str) -> tuple[pipeline.BuildResult, ...]:
    """Build the artifacts of a small recipe, one per format."""
    text = make_recipe_text(folder, output, **keys)
    return pipeline.build_artifacts(
        parse_recipe(text, "test.yaml"),
        text,
        overwrite=False,
        evaluate=False,
        on_plan=ignore_progress,
        on_progress=ignore_progress,
    )
