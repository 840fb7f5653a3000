"""One build of a recipe in a separate process, with its cost. Run by bench.py as a script.

    python tests/external/real_model/run_quantkit.py RECIPE CHANGES.json COST.json

Libraries are imported before the measurement, as for the other tools. Reading and hashing the
source is part of it, because blocks are read while they are quantized.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import transformers.models.llama.modeling_llama  # noqa: F401  # imported by the first block
from peers.cost import measure_cost

from quantkit import pipeline
from quantkit.plan.plan import Plan
from quantkit.progress import Progress
from quantkit.recipe.parse import parse_recipe


def ignore_progress(_: Progress | Sequence[Plan]) -> None:
    """Discard progress events."""


def main() -> None:
    """Build the recipe and write its cost."""
    file, changes, report = sys.argv[1:]
    text = Path(file).read_text(encoding="utf-8")
    recipe = parse_recipe(text, file, json.loads(Path(changes).read_text(encoding="utf-8")))
    with measure_cost(Path(report)):
        pipeline.build_artifacts(
            recipe,
            text,
            overwrite=True,
            evaluate=False,
            on_plan=ignore_progress,
            on_progress=ignore_progress,
        )


if __name__ == "__main__":
    main()
