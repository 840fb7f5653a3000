"""From a recipe to its plan: resolve the source, read headers or the published config, size up the text."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quantkit import figures
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import HubUnreachable, RecipeError, UsageError
from quantkit.io import package_data
from quantkit.io.host import get_available_memory, has_bfloat16_instructions
from quantkit.io.suggestions import format_unknown_name
from quantkit.plan.plan import Plan, SourceFacts, make_plan, match_source
from quantkit.plan.published import find_published_config
from quantkit.recipe.schema import Recipe
from quantkit.texts import task_files
from quantkit.texts.corpus_files import bound_sequences
from quantkit.texts.corpus_spec import read_spec

UNKNOWN_SEQUENCES = 1024
"""Sequences a plan assumes of a hub set that a recipe takes whole."""

MEMORY_SHARE = 0.7
"""Of the memory that is free when a recipe names no budget: the rest is for the page cache and other programs."""


@dataclass(frozen=True, kw_only=True)
class ResolvedCompute:
    """Where blocks run and in which dtype, with `auto` resolved."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    calibration: Literal["float32", "bfloat16"]

    @property
    def hidden_bytes(self) -> Literal[2, 4]:
        """Width of the widest hidden value on disk."""
        return 4 if "float32" in (self.dtype, self.calibration) else 2


def resolve_compute(recipe: Recipe) -> ResolvedCompute:
    """The recipe's words, or a GPU in bfloat16 where there is one and else the CPU in float32.

    The calibration stream takes bfloat16 on a CPU too, if it multiplies bfloat16 by itself.
    """
    wanted = recipe.compute
    device = wanted.device
    if device != "cpu":
        import torch  # noqa: PLC0415  # seconds; a plan for the CPU does without

        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"{recipe.where('compute', 'device')}: compute.device: expected a CUDA device, found none"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = (
        wanted.dtype if wanted.dtype != "auto" else ("float32" if device == "cpu" else "bfloat16")
    )
    calibration = wanted.calibration
    if calibration == "auto":
        calibration = (
            "bfloat16" if dtype == "bfloat16" or has_bfloat16_instructions() else "float32"
        )
    return ResolvedCompute(device=device, dtype=dtype, calibration=calibration)


def resolve_source_facts(recipe: Recipe) -> SourceFacts:
    """Headers of the source; for a hub model that cannot be reached, the config its family publishes."""
    model, revision = recipe.source.model, recipe.source.revision
    try:
        headers = hub.read_model_headers(model, revision)
    except HubUnreachable:
        known = find_published_config(model)
        if known is None:
            raise
        return SourceFacts(
            model=model,
            revision=revision,
            config=known[1],
            specs=None,
            fingerprint=None,
            where=known[0],
        )
    return SourceFacts(
        model=model,
        revision=headers.revision,
        config=headers.config,
        specs=headers.specs,
        fingerprint=None,
        where=model,
    )


def make_source_facts(recipe: Recipe, source: Checkpoint, revision: str | None) -> SourceFacts:
    """What is known of a source whose files are here."""
    return SourceFacts(
        model=recipe.source.model,
        revision=revision,
        config=source.config,
        specs=source.specs,
        fingerprint=source.fingerprint(),
        where=recipe.source.model,
    )


def budget(recipe: Recipe) -> int:
    """Bytes of host memory a build may use."""
    return (
        recipe.memory if recipe.memory is not None else int(MEMORY_SHARE * get_available_memory())
    )


def bound_text_tokens(recipe: Recipe) -> dict[Literal["calibration", "fidelity"], int]:
    """Upper bounds of the streams, before a tokenizer is loaded: sequences times length, or the text's bytes.

    Gold solutions of the recipe's tasks run behind the fidelity text.
    """
    calibration, fidelity = recipe.calibration if recipe.learns else None, recipe.fidelity
    items = recipe.evaluation.likelihood * len(recipe.evaluation.tasks)
    solutions = items * fidelity.length if fidelity else 0  # of which most use a small part
    return {
        "calibration": most_tokens(calibration.set, calibration.sequences, calibration.length)
        if calibration
        else 0,
        "fidelity": most_tokens(fidelity.set, fidelity.windows, fidelity.length) + solutions
        if fidelity
        else 0,
    }


def most_tokens(name: str, sequences: int | None, length: int) -> int:
    """An upper bound of a set's tokens; a token has at least one byte. CalibrationError when there is no such set.

    The size of a set that is not here is not known: UNKNOWN_SEQUENCES are assumed.
    """
    spec = read_spec(name, package_data.locate_folder("calibration"))
    if sequences is not None:
        return sequences * length
    return (
        spec.file.stat().st_size
        if spec.file and spec.file.is_file()
        else UNKNOWN_SEQUENCES * length
    )


def plan_recipe(
    recipe: Recipe, source: SourceFacts, tokens: Mapping[Literal["calibration", "fidelity"], int]
) -> tuple[Plan, ...]:
    """A plan per format of the recipe, on this machine.

    RecipeError with every fault of the recipe, benchmarks that do not exist among them.
    """
    plans, faults = list[Plan](), list[str]()
    claimed, budget_bytes, hidden_bytes = (
        match_source(source),
        budget(recipe),
        resolve_compute(recipe).hidden_bytes,
    )
    for name in recipe.format:
        try:
            made = make_plan(
                recipe,
                source,
                claimed,
                name,
                budget_bytes=budget_bytes,
                tokens=tokens,
                hidden_bytes=hidden_bytes,
            )
        except RecipeError as error:
            faults += error.faults
        else:
            plans.append(made)
    faults += text_faults(recipe) + task_faults(recipe) + find_gate_faults(recipe)
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))
    return tuple(plans)


def text_faults(recipe: Recipe) -> list[str]:
    """Sets from which more sequences are asked than they can give: known before a tokenizer is loaded."""
    calibration, fidelity = recipe.calibration if recipe.learns else None, recipe.fidelity
    found = list[str]()
    if calibration:
        wanted = calibration.sequences
        found += too_many(
            recipe, ("calibration", "sequences"), calibration.set, wanted, calibration.length
        )
    if fidelity:
        found += too_many(
            recipe, ("fidelity", "windows"), fidelity.set, fidelity.windows, fidelity.length
        )
    return found


def too_many(
    recipe: Recipe, key: tuple[str, str], name: str, wanted: int | None, length: int
) -> list[str]:
    """The fault of asking a set for more sequences than it has; none where that is not known."""
    most = bound_sequences(read_spec(name, package_data.locate_folder("calibration")), length)
    if wanted is None or most is None or wanted <= most:
        return []
    return [
        f"{recipe.where(*key)}: {'.'.join(key)}: expected at most {most}, the set {name} has no more, found {wanted}; "
        "ask for fewer, null for all, or use a larger set"
    ]


def task_faults(recipe: Recipe) -> list[str]:
    """Benchmarks that do not exist: known before hours are spent on the model they should judge."""
    where, known = recipe.where("evaluation", "tasks"), task_files.list_task_names()
    missing = [
        name for name in recipe.evaluation.tasks if not task_files.find_task_path(name).is_file()
    ]
    return [
        f"{where}: evaluation.tasks: {format_unknown_name('benchmark', name, known)}"
        for name in missing
    ]


def find_gate_faults(recipe: Recipe) -> list[str]:
    """Gates on a domain that the fidelity text does not have: they would never be judged."""
    text = recipe.fidelity
    asked = [
        figure
        for figure in recipe.gates
        if figures.is_per_domain(figure.partition("@")[0])
        and "@" in figure
        and figure not in recipe.evaluation.tasks
    ]
    if text is None or not asked:
        return []
    domains = read_spec(text.set, package_data.locate_folder("calibration")).domains
    return [
        f"{recipe.where('gates', figure)}: gates.{figure}: {format_unknown_name(f'domain of {text.set}', found, domains)}"
        for figure in asked
        if (found := figure.partition("@")[2]) not in domains
    ]
