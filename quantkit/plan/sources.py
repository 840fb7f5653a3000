"""From a recipe to its plans: resolves the source, reads headers or the published config, bounds
the text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from quantkit import figures
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.remote_code import list_code_files
from quantkit.checkpoint.side_files import describe_left_files
from quantkit.errors import CheckpointError, HubUnreachable, RecipeError, UsageError
from quantkit.io import package_data
from quantkit.io.files import join_faults
from quantkit.io.host import get_available_memory, has_bfloat16_instructions
from quantkit.io.suggestions import format_unknown_name
from quantkit.plan.check_values import find_value_faults
from quantkit.plan.choose_texts import resolve_text_sets
from quantkit.plan.context_length import find_context_faults, find_context_warnings
from quantkit.plan.left_out import format_names
from quantkit.plan.match_checkpoint import MatchedLayout
from quantkit.plan.plan import Plan, SourceFacts, make_plan, match_source
from quantkit.plan.plan_schema import PlanText
from quantkit.plan.plan_texts import describe_set_choices, find_text_warnings, plan_texts
from quantkit.plan.published import find_published_config
from quantkit.plan.self_texts import (
    describe_self_texts,
    find_sampling_fault,
    find_self_faults,
    list_self_texts,
)
from quantkit.recipe.schema import Recipe
from quantkit.texts import task_files
from quantkit.texts.corpus_files import bound_mixture_tokens, bound_sequences
from quantkit.texts.corpus_spec import read_spec
from quantkit.texts.hub_access import find_hub_fault

ASSUMED_SEQUENCES = 1024
"""Sequences that a plan assumes for a whole set of unknown size."""

MEMORY_SHARE = 0.7
"""Share of the available memory to use by default: the rest is for page cache and other programs.
"""


@dataclass(frozen=True, kw_only=True)
class ResolvedCompute:
    """Device and dtypes with `auto` resolved."""

    device: Literal["cpu", "cuda"]
    dtype: Literal["float32", "bfloat16"]
    calibration: Literal["float32", "bfloat16"]

    @property
    def value_bytes(self) -> Literal[2, 4]:
        """Bytes of a weight in the dtype of the blocks."""
        return 4 if self.dtype == "float32" else 2

    @property
    def hidden_bytes(self) -> Literal[2, 4]:
        """Bytes of the widest hidden value on disk."""
        return 4 if "float32" in (self.dtype, self.calibration) else 2


def resolve_compute(recipe: Recipe) -> ResolvedCompute:
    """Resolve the recipe's `compute`: `auto` is bfloat16 on a GPU if there is one, or float32 on
    the CPU.

    The calibration stream is bfloat16 on a CPU, too, if it has bfloat16 matrix products.
    """
    settings = recipe.compute
    device = settings.device
    if device != "cpu":
        import torch  # noqa: PLC0415  # takes seconds; a plan for the CPU does not need it

        if device == "cuda" and not torch.cuda.is_available():
            raise UsageError(
                f"{recipe.where('compute', 'device')}: compute.device: expected a CUDA device, "
                "found none"
            )
        device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = (
        settings.dtype
        if settings.dtype != "auto"
        else ("float32" if device == "cpu" else "bfloat16")
    )
    calibration = settings.calibration
    if calibration == "auto":
        calibration = (
            "bfloat16" if dtype == "bfloat16" or has_bfloat16_instructions() else "float32"
        )
    return ResolvedCompute(device=device, dtype=dtype, calibration=calibration)


def resolve_source_facts(recipe: Recipe) -> SourceFacts:
    """Read the headers of the source; if the Hub is unreachable use the published config."""
    return read_model_facts(recipe.source.model, recipe.source.revision)


def read_model_facts(model: str, revision: str | None = None) -> SourceFacts:
    """Read the headers of a model; if the Hub is unreachable use the published config.

    Raises CheckpointError.
    """
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
        specs=headers.logical.specs,
        encoded=headers.logical.encoded,
        fingerprint=None,
        where=model,
        code=headers.code,
        folder=hub.find_local_folder(model),
        notes=(*headers.notes, *headers.logical.describe(), *headers.left_files),
    )


def make_source_facts(recipe: Recipe, source: Checkpoint, revision: str | None) -> SourceFacts:
    """Return the facts of a source whose files are local."""
    return SourceFacts(
        model=recipe.source.model,
        revision=revision,
        config=source.config,
        specs=source.specs,
        encoded=source.logical.encoded,
        fingerprint=source.compute_fingerprint(),
        where=recipe.source.model,
        code=list_code_files(source.folder),
        folder=source.folder,
        notes=(
            *source.shards.notes,
            *source.logical.describe(),
            *describe_left_files(source.folder, source.sidecars),
        ),
    )


def resolve_texts(
    recipe: Recipe, source: SourceFacts, chosen: Mapping[str, tuple[str, str]] | None = None
) -> Recipe:
    """Return the recipe with the text sets that `auto` stands for.

    chosen: text -> (set, reason) of an interrupted build.
    """
    if chosen:
        return recipe.choose_texts(chosen)
    return resolve_text_sets(
        recipe, find_hub_fault, lambda changed: find_self_fault(changed, source)
    )


def find_self_fault(recipe: Recipe, source: SourceFacts) -> str:
    """Return why the model cannot sample the texts of a recipe, or ""."""
    if any(text.n_tokens == 0 for text in list_self_texts(recipe)):
        return "text of the model itself needs a number of sequences and windows"
    if recipe.endpoint is not None:
        return ""
    return find_sampling_fault(
        source.config,
        match_source(source, drop_mtp=recipe.mtp == "drop").layout,
        resolve_memory_budget(recipe),
        resolve_compute(recipe).value_bytes,
    )


def describe_sampled_texts(recipe: Recipe) -> tuple[str, ...]:
    """Return a sentence per text that the model samples; samples nothing."""
    compute = resolve_compute(recipe)
    return describe_self_texts(recipe, f"{compute.dtype} on {compute.device}")


def resolve_memory_budget(recipe: Recipe) -> int:
    """Return the bytes of host memory that a build may use."""
    return (
        recipe.memory if recipe.memory is not None else int(MEMORY_SHARE * get_available_memory())
    )


def bound_text_tokens(recipe: Recipe) -> dict[Literal["calibration", "fidelity"], int]:
    """Return upper bounds of the streams' tokens, before a tokenizer is loaded.

    The bound is sequences times length, or the bytes of the text. Gold solutions of the recipe's
    tasks follow the fidelity text.
    """
    calibration, fidelity = (
        recipe.calibration if recipe.needs_calibration else None,
        recipe.fidelity,
    )
    items = recipe.evaluation.likelihood * len(recipe.evaluation.tasks)
    solutions = items * fidelity.length if fidelity else 0  # of which most use a small part
    return {
        "calibration": bound_set_tokens(calibration.set, calibration.sequences, calibration.length)
        if calibration
        else 0,
        "fidelity": bound_set_tokens(fidelity.set, fidelity.windows, fidelity.length) + solutions
        if fidelity
        else 0,
    }


def bound_set_tokens(name: str, sequences: int | None, length: int) -> int:
    """Return an upper bound of a set's tokens; a token has at least one byte.

    ASSUMED_SEQUENCES are assumed for a set that is not local. Raises CalibrationError for an
    unknown set.
    """
    spec = read_spec(name, package_data.locate_folder("calibration"))
    if sequences is not None:
        return sequences * length
    if spec.parts:
        return bound_mixture_tokens(spec) or ASSUMED_SEQUENCES * length
    return (
        spec.file.stat().st_size
        if spec.file and spec.file.is_file()
        else ASSUMED_SEQUENCES * length
    )


def plan_recipe(
    recipe: Recipe,
    source: SourceFacts,
    tokens: Mapping[Literal["calibration", "fidelity"], int] | None = None,
    notes: Sequence[str] = (),
    counted: Mapping[Literal["calibration", "fidelity"], int] = {},
) -> tuple[Plan, ...]:
    """Return one plan per format of the recipe, for this machine.

    tokens: of the streams; by default upper bounds, before a tokenizer is loaded. notes: on texts
    that were tokenized. counted: tokens of the texts alone. Raises RecipeError with every fault of
    the recipe, unknown benchmarks included.
    """
    recipe = resolve_texts(recipe, source).pin_source(source.revision)
    tokens = bound_text_tokens(recipe) if tokens is None else tokens
    plans, faults = list[Plan](), list[str]()
    matched, budget_bytes, hidden_bytes = (
        match_source(source, drop_mtp=recipe.mtp == "drop"),
        resolve_memory_budget(recipe),
        resolve_compute(recipe).hidden_bytes,
    )
    check_values(source, matched)
    texts = plan_texts(recipe)
    warnings = (
        *source.notes,
        *describe_set_choices(recipe),
        *find_text_warnings(texts),
        *notes,
        *find_context_warnings(recipe, source.config),
        *describe_unread_values(source, matched),
    )
    for name in recipe.format:
        try:
            plan = make_plan(
                recipe,
                source,
                matched,
                name,
                budget_bytes=budget_bytes,
                tokens=tokens,
                hidden_bytes=hidden_bytes,
            )
        except RecipeError as error:
            faults += error.faults
        else:
            warned = (*plan.warnings, *warnings)
            plans.append(replace(plan, texts=texts, text_tokens=counted, warnings=warned))
    faults += find_context_faults(recipe, source.config, matched.layout)
    faults += find_output_faults(recipe, matched)
    faults += find_text_faults(recipe, texts) + find_task_faults(recipe) + find_gate_faults(recipe)
    value_bytes = resolve_compute(recipe).value_bytes
    faults += find_self_faults(recipe, source.config, matched.layout, budget_bytes, value_bytes)
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))
    return tuple(plans)


def check_values(source: SourceFacts, matched: MatchedLayout) -> None:
    """Check the values of tensors that are left out because of them, where the weights are local.

    Raises CheckpointError.
    """
    checks = [item.check for item in matched.left_out if item.check is not None]
    if checks and source.folder is not None:
        faults = list(find_value_faults(Checkpoint.open(source.folder, decode=True), checks))
        if faults:
            raise CheckpointError(join_faults(faults))


def describe_unread_values(source: SourceFacts, matched: MatchedLayout) -> list[str]:
    """Return a sentence if only the build can read the values of left-out tensors."""
    names = [item.name for item in matched.left_out if item.check is not None]
    if not names or source.folder is not None:
        return []
    return [f"{format_names(names)}: the values are compared when the build has the weights"]


def find_output_faults(recipe: Recipe, matched: MatchedLayout) -> list[str]:
    """Return faults for figures of a language model, if the source has no language head."""
    kind = matched.layout.output
    if kind == "logits":
        return []
    model = "a classifier or reward model" if kind == "labels" else "an embedding model"
    wanted = [
        key
        for key, value in (
            ("fidelity", recipe.fidelity),
            ("evaluation.tasks", recipe.evaluation.tasks or None),
        )
        if value is not None
    ]
    return [
        f"{recipe.where(key.partition('.')[0])}: {key}: expected none for {model}, which has no "
        "language head, found one; set it to none"
        for key in wanted
    ]


def find_text_faults(recipe: Recipe, texts: Sequence[PlanText]) -> list[str]:
    """Return faults for more sequences than a set has, before a tokenizer is loaded."""
    calibration, fidelity = (
        recipe.calibration if recipe.needs_calibration else None,
        recipe.fidelity,
    )
    faults = list[str]()
    if calibration:
        sequences = calibration.sequences
        faults += find_sequence_faults(
            recipe,
            ("calibration", "sequences"),
            calibration.set,
            sequences,
            calibration.length,
            texts,
        )
    if fidelity:
        faults += find_sequence_faults(
            recipe, ("fidelity", "windows"), fidelity.set, fidelity.windows, fidelity.length, texts
        )
    return faults


def find_sequence_faults(
    recipe: Recipe,
    key: tuple[str, str],
    name: str,
    sequences: int | None,
    length: int,
    texts: Sequence[PlanText],
) -> list[str]:
    """Return a fault if a set has fewer sequences, or more parts; none if its size is unknown."""
    spec = read_spec(name, package_data.locate_folder("calibration"))
    shares = {text.part: text.share for text in texts if text.use == key[0]}
    available = bound_sequences(spec, length, shares)
    if sequences is not None and sequences < len(spec.parts):
        return [
            f"{recipe.where(*key)}: {'.'.join(key)}: expected at least {len(spec.parts)}, one for "
            f"each part of the set {name}, found {sequences}; use more"
        ]
    if sequences is None or available is None or sequences <= available:
        return []
    return [
        f"{recipe.where(*key)}: {'.'.join(key)}: expected at most {available}, the size of the set "
        f"{name}, found {sequences}; use fewer, null for all, or a larger set"
    ]


def find_task_faults(recipe: Recipe) -> list[str]:
    """Return faults for unknown benchmarks, before the model is quantized."""
    where, known = recipe.where("evaluation", "tasks"), task_files.list_task_names()
    missing = [
        name for name in recipe.evaluation.tasks if not task_files.find_task_path(name).is_file()
    ]
    return [
        f"{where}: evaluation.tasks: {format_unknown_name('benchmark', name, known)}"
        for name in missing
    ]


def find_gate_faults(recipe: Recipe) -> list[str]:
    """Return faults for gates on a domain that the fidelity text does not have."""
    text = recipe.fidelity
    gated = [
        figure
        for figure in recipe.gates
        if figures.is_per_domain(figure.partition("@")[0])
        and "@" in figure
        and figure not in recipe.evaluation.tasks
    ]
    if text is None or not gated:
        return []
    domains = read_spec(text.set, package_data.locate_folder("calibration")).domains
    return [
        f"{recipe.where('gates', figure)}: gates.{figure}: "
        f"{format_unknown_name(f'domain of {text.set}', domain, domains)}"
        for figure in gated
        if (domain := figure.partition("@")[2]) not in domains
    ]
