"""Builds of small random checkpoints."""

from __future__ import annotations

from pathlib import Path

from support.checkpoints import recipe_text

from quantkit import pipeline
from quantkit.plan.plan import Plan
from quantkit.progress import Progress
from quantkit.recipe.parse import parse


def ignore(_: Progress | Plan) -> None:
    """Nobody watches."""


def build(folder: Path, output: Path, **keys: str) -> pipeline.BuildResult:
    """A build without benchmarks."""
    (outcome,) = build_all(folder, output, **keys)
    return outcome


def build_all(folder: Path, output: Path, **keys: str) -> tuple[pipeline.BuildResult, ...]:
    """The artifacts of a small recipe, one per format."""
    text = recipe_text(folder, output, **keys)
    return pipeline.build_artifacts(
        parse(text, "test.yaml"),
        text,
        overwrite=False,
        evaluate=False,
        on_plan=ignore,
        on_progress=ignore,
    )
