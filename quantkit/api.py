"""The Python API: one function per command, with the same meaning and errors.

`quantkit` exports these names lazily. The subpackages of the same names are importable
(`from quantkit.plan.plan import Plan`); `quantkit.plan` itself is the function (__init__.py).

Every function raises QuantkitError or a subclass (quantkit/errors.py).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from quantkit.artifact.read_artifact import Artifact
from quantkit.diff.compare import compare_sides
from quantkit.diff.diff_schema import Diff
from quantkit.diff.sides import read_sides
from quantkit.errors import UsageError
from quantkit.library_settings import apply_settings
from quantkit.plan.plan_schema import PlanSummary
from quantkit.plan.recipe_draft import RecipeRequest
from quantkit.plan.summary import summarize_plan
from quantkit.progress import Progress
from quantkit.progress_bars import show_progress as show_progress
from quantkit.recipe.recipe_file import describe_stray_output, find_stray_output
from quantkit.verify import shallow
from quantkit.verify.shallow import VerifyReport

if TYPE_CHECKING:
    from quantkit.pipeline import BuildResult
    from quantkit.plan.model_recipe import TargetRecipe


def plan(
    target: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    bits: int | None = None,
    format: str | None = None,
    rules: str | None = None,
    output: str | Path | None = None,
    overrides: Mapping[str, object] | None = None,
) -> tuple[PlanSummary, ...]:
    """Return the plan of a build, one per format of the recipe; reads headers, no weights.

    >>> import quantkit
    >>> [planned] = quantkit.plan("builtin:tiny-v3", bits=8)
    >>> planned.totals.modules_quantized, planned.rules[0].action
    (144, 'gptq int8 g128 symmetric')

    Args:
        target: a recipe file, the name of a recipe that ships with quantkit, or a model (a folder,
            a hub id or builtin:tiny-v3), for which a recipe is chosen.
        method, scheme, bits, format, rules: of a model's recipe; by default chosen.
        output: folder of the artifact.
        overrides: values by dotted key that replace the recipe's, e.g. {"memory": "8GB"}.

    Raises:
        RecipeError: with every fault of the recipe.
        UsageError: if there is no such recipe or model.
    """
    apply_settings()
    from quantkit.evaluate.check_plan import plan_and_check
    from quantkit.plan import sources  # imports torch
    from quantkit.plan.model_recipe import read_target

    request = _make_request(target, method, scheme, bits, format, rules, output)
    parsed = read_target(request, _as_text(overrides)).recipe
    plans = plan_and_check(parsed, sources.resolve_source_facts(parsed))
    sampled = sources.describe_sampled_texts(plans[0].recipe)
    return tuple(summarize_plan(plan, sampled) for plan in plans)


def build(
    target: str | Path,
    *,
    method: str | None = None,
    scheme: str | None = None,
    bits: int | None = None,
    format: str | None = None,
    rules: str | None = None,
    output: str | Path | None = None,
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

    >>> import quantkit
    >>> text = {"fidelity.windows": 8, "fidelity.length": 128}
    >>> [result] = quantkit.build(
    ...     "builtin:tiny-v3", method="rtn", output="a", evaluate=False, overrides=text
    ... )
    >>> result.fidelity.status, result.path.name
    ('accepted', 'a')

    The artifact holds the recipe. An interrupted build resumes when it is called again. The bytes
    are the command's if torch was not imported before (library_settings). A missed gate raises
    nothing: the result's `fidelity.status` is then "rejected".

    Args: those of `plan`, and
        overwrite: replace the artifact at output.path once the new one is complete.
        restart: discard the progress of an interrupted build.
        evaluate: run the benchmarks of the recipe.
        trusted_code: sha256 of Python files that the recipe's tasks may run.
        on_plan, on_progress, on_message: called with the plans before anything is written, with
            progress (`quantkit.show_progress`), and with messages. Logger "quantkit" gets more.

    Raises:
        UsageError: if output.path exists and `overwrite` is not set, or if a recipe file, not
            `output`, names a folder outside the working folder; RecipeError for its faults.
    """
    apply_settings()
    from quantkit.pipeline import build_artifacts  # imports torch and transformers

    request = _make_request(target, method, scheme, bits, format, rules, output)
    read = _read_target_to_build(request, overrides)
    return build_artifacts(
        read.recipe,
        read.text,
        overwrite=overwrite,
        evaluate=evaluate,
        trusted_code=trusted_code,
        on_plan=lambda plans: on_plan(tuple(map(summarize_plan, plans))) if on_plan else None,
        on_progress=on_progress or _ignore,
        restart=restart,
        on_message=on_message or _ignore,
    )


def _read_target_to_build(
    request: RecipeRequest, overrides: Mapping[str, object] | None
) -> TargetRecipe:
    """Return the recipe of a target; UsageError if its file writes outside the working folder."""
    from quantkit.plan.model_recipe import read_target  # imports torch

    read = read_target(request, _as_text(overrides))
    stray = None if read.chosen else find_stray_output(request.model, read.recipe)
    if stray is not None:
        raise UsageError(
            f"{describe_stray_output(request.model, stray)}; pass output=DIR to write there"
        )
    return read


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


def verify(artifact: str | Path) -> VerifyReport:
    """Check every hash, header, number and index entry of an artifact, and return the counts.

    quantkit.verify.deep.verify_deep also checks a sample of tensors against the source.

    Raises:
        ArtifactError: with the first fault.
    """
    return shallow.verify_artifact(Path(artifact))


def open_artifact(artifact: str | Path) -> Artifact:
    """Open an artifact: its report, and a table of its quantized modules.

    >>> import quantkit
    >>> artifact = quantkit.open_artifact("a")
    >>> artifact.report.status, artifact.format_name, len(artifact.modules)
    ('accepted', 'awq', 144)

    Raises:
        ArtifactError: if the folder is no artifact.
    """
    return Artifact.read(Path(artifact))


def diff(a: str | Path, b: str | Path, *, partial: bool = False) -> Diff:
    """Compare artifact `b` with `a`, and return all differences.

    Args:
        a: an artifact, its fidelity.json, or the source of `b` (a folder or builtin:NAME).
        b: an artifact or its fidelity.json.
        partial: omit parts that cannot be compared instead of raising.

    Raises:
        NotComparable: if the sources, the texts or the prompts of the two differ.
    """
    return compare_sides(*read_sides(str(a), str(b)), partial=partial)


def _make_request(
    target: str | Path,
    method: str | None,
    scheme: str | None,
    bits: int | None,
    format_name: str | None,
    rules: str | None,
    output: str | Path | None,
) -> RecipeRequest:
    """Return the request of a call."""
    return RecipeRequest(
        model=str(target),
        method=method,
        scheme=scheme,
        bits=bits,
        format=format_name,
        rules=rules,
        output=None if output is None else str(output),
    )


def _as_text(overrides: Mapping[str, object] | None) -> dict[str, str]:
    """Return values as `--set` takes them: text as it is, others as JSON, which is YAML."""
    return {
        key: value if isinstance(value, str) else json.dumps(value)
        for key, value in (overrides or {}).items()
    }


def _ignore(_: object) -> None:
    """Ignore a message."""
