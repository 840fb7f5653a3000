"""The Python API: one function per command, with the same meaning and errors.

`quantkit` exports these names lazily. They are not called plan, build, report, diff and verify,
because `quantkit.plan` and the others are subpackages: importing one of them would replace a
function of the same name.

Every function raises QuantkitError or a subclass (quantkit/errors.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.read_report import read_artifact_report
from quantkit.diff.compare import compare_sides
from quantkit.diff.diff_schema import Diff
from quantkit.diff.sides import read_sides
from quantkit.errors import UsageError
from quantkit.library_settings import apply_settings
from quantkit.plan.plan_schema import PlanSummary
from quantkit.plan.summary import summarize_plan
from quantkit.progress import Progress
from quantkit.recipe.recipe_file import describe_stray_output, find_stray_output, read_recipe
from quantkit.verify import shallow
from quantkit.verify.shallow import VerifyReport

if TYPE_CHECKING:
    from quantkit.pipeline import BuildResult
    from quantkit.plan.plan import Plan


def plan_recipe(
    recipe: str | Path, *, overrides: Mapping[str, object] | None = None
) -> tuple[PlanSummary, ...]:
    """Return the plan of a build, one per format of the recipe; reads headers, no weights.

    Args:
        recipe: a recipe file, or the name of a recipe that ships with quantkit.
        overrides: values by dotted key that replace the recipe's, e.g. {"quantize.bits": 8}.

    Raises:
        RecipeError: with every fault of the recipe.
        UsageError: if there is no such recipe or model.
    """
    apply_settings()
    from quantkit.plan import sources  # imports torch

    _, parsed = read_recipe(str(recipe), _as_text(overrides))
    plans = sources.plan_recipe(parsed, sources.resolve_source_facts(parsed))
    sampled = sources.describe_sampled_texts(plans[0].recipe)
    return tuple(summarize_plan(plan, sampled) for plan in plans)


def build_recipe(
    recipe: str | Path,
    *,
    overrides: Mapping[str, object] | None = None,
    overwrite: bool = False,
    restart: bool = False,
    evaluate: bool = True,
    trusted_code: Sequence[str] = (),
    on_plan: Callable[[tuple[PlanSummary, ...]], None] | None = None,
    on_progress: Callable[[Progress], None] | None = None,
    on_message: Callable[[str], None] | None = None,
) -> tuple[BuildResult, ...]:
    """Build the artifacts of a recipe, one per format, and return their paths and reports.

    An interrupted build resumes when it is called again. The bytes are those of the command if
    torch was not imported before: some settings are read when it loads (library_settings). Unlike
    the command, a missed gate raises nothing: the result's `fidelity.status` is then "rejected".

    Args:
        recipe: a recipe file, or the name of a recipe that ships with quantkit.
        overrides: values by dotted key that replace the recipe's, e.g. {"output.path": "mine"}.
        overwrite: replace the artifact at output.path once the new one is complete.
        restart: discard the progress of an interrupted build.
        evaluate: run the benchmarks of the recipe.
        trusted_code: sha256 of Python files that the recipe's tasks may run.
        on_plan: called with the plans before anything is written.
        on_progress: called with the progress of long steps.
        on_message: called with messages, e.g. that an interrupted build is resumed.

    Raises:
        RecipeError: with every fault of the recipe.
        UsageError: if output.path exists and `overwrite` is not set, or if a recipe file, not
            `overrides`, names a folder outside the working folder.
    """
    apply_settings()
    from quantkit.pipeline import build_artifacts  # imports torch and transformers

    text, parsed = read_recipe(str(recipe), _as_text(overrides))
    if (stray := find_stray_output(str(recipe), parsed)) is not None:
        raise UsageError(
            f"{describe_stray_output(str(recipe), stray)}; pass overrides={{'output.path': DIR}} "
            "to write there"
        )

    def report_plans(plans: Sequence[Plan]) -> None:
        if on_plan:
            on_plan(tuple(summarize_plan(plan) for plan in plans))

    return build_artifacts(
        parsed,
        text,
        overwrite=overwrite,
        evaluate=evaluate,
        trusted_code=trusted_code,
        on_plan=report_plans,
        on_progress=on_progress or _ignore,
        restart=restart,
        on_message=on_message or _ignore,
    )


def load(
    artifact: str | Path, *, device: str | None = None, dtype: str | None = None
) -> Any:  # transformers' PreTrainedModel, which is not typed
    """Return an artifact as a transformers causal language model in eval mode.

    NF4 stays packed in bitsandbytes linears, routed experts too; other formats are unpacked to
    plain weights.

    Args:
        artifact: the folder of the artifact.
        device: "cpu", "cuda", ...; None takes a GPU if there is one.
        dtype: "bfloat16", "float16" or "float32"; None takes the dtype of the model.

    Raises:
        ArtifactError: if the folder is no artifact.
        UsageError: if a package is missing.
    """
    from quantkit.artifact.load_model import (
        load_model as load_model,  # imports torch and transformers
    )

    return load_model(artifact, device=device, dtype=dtype)


def verify_artifact(artifact: str | Path) -> VerifyReport:
    """Check every hash, header, number and index entry of an artifact, and return the counts.

    quantkit.verify.deep.verify_deep also checks a sample of tensors against the source.

    Raises:
        ArtifactError: with the first fault.
    """
    return shallow.verify_artifact(Path(artifact))


def read_report(artifact: str | Path) -> Fidelity:
    """Return the fidelity report of an artifact.

    Raises:
        ArtifactError: if the folder is no artifact, or its report does not match the manifest.
    """
    return read_artifact_report(Path(artifact))


def diff_artifacts(a: str | Path, b: str | Path, *, partial: bool = False) -> Diff:
    """Compare artifact `b` with `a`, and return all differences.

    Args:
        a: an artifact, its fidelity.json, or the source of `b` (a folder or builtin:NAME).
        b: an artifact or its fidelity.json.
        partial: omit parts that cannot be compared instead of raising.

    Raises:
        NotComparable: if the sources, the texts or the prompts of the two differ.
    """
    return compare_sides(*read_sides(str(a), str(b)), partial=partial)


def _as_text(overrides: Mapping[str, object] | None) -> dict[str, str]:
    """Return values as `--set` takes them: text as it is, others as JSON, which is YAML."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in (overrides or {}).items()
    }


def _ignore(_: object) -> None:
    """Ignore a message."""
