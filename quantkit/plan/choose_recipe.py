"""Choice of a recipe for a model: every key with its value and the reason. Pure.

`quantkit build MODEL`, `plan MODEL` and `init MODEL` call it with the headers of the model. The
choice depends on the model and the request only, never on the machine.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from quantkit import registry
from quantkit.errors import RecipeError, UsageError
from quantkit.formats.common.engine_names import SERVERS
from quantkit.io.suggestions import format_unknown_name
from quantkit.plan.decisions import Decision
from quantkit.plan.engine_limits import find_unsupported_engines
from quantkit.plan.explain_recipe import describe_choice, explain_draft, list_widths
from quantkit.plan.match_checkpoint import MatchedLayout
from quantkit.plan.plan import SourceFacts, apply_rules
from quantkit.plan.recipe_draft import Draft, RecipeRequest, Storage, list_scheme
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.patterns import PRESETS
from quantkit.recipe.schema import Recipe
from quantkit.recipe.write_recipe import Section, write_recipe

GROUP_SIZES = (128, 64, 32)
CHOSEN_NAME = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class ChosenRecipe:
    """A recipe, its commented text, and the choices that the text states."""

    title: str
    text: str
    recipe: Recipe
    sections: tuple[Section, ...]
    engines: tuple[str, ...]

    @property
    def choices(self) -> tuple[tuple[str, str, str], ...]:
        """Key, value and reason of every choice that has a reason."""
        return tuple(
            (f"{section.name}.{choice.key}".lstrip("."), choice.value, choice.reason)
            for section in self.sections
            for choice in section.choices
            if choice.reason
        )


WITH_ZERO_POINTS = (
    Storage(format_name="awq", symmetric=False),
    Storage(format_name="compressed_tensors", symmetric=False),
    Storage(format_name="compressed_tensors", symmetric=True),
    Storage(format_name="gptq", symmetric=True),
    Storage(format_name="gptq_v2", symmetric=False),
)
SYMMETRIC = (
    Storage(format_name="compressed_tensors", symmetric=True),
    Storage(format_name="gptq", symmetric=True),
    Storage(format_name="compressed_tensors", symmetric=False),
    Storage(format_name="awq", symmetric=False),
    Storage(format_name="gptq_v2", symmetric=False),
)
STORAGES: Mapping[str, tuple[Storage, ...]] = {
    "gptq": SYMMETRIC,
    "nf4": (Storage(format_name="bitsandbytes", symmetric=True),),
}
"""Method -> storages in the order in which they are tried; WITH_ZERO_POINTS for other methods."""


def choose_recipe(
    request: RecipeRequest, source: SourceFacts, matched: MatchedLayout
) -> ChosenRecipe:
    """Choose every key of a recipe for a model.

    The first storage of the method that vLLM and SGLang load, else one that vLLM loads, else one
    that any engine loads.

    Raises UsageError for an unknown name in the request, RecipeError if no storage holds the model.
    """
    check_request(request)
    drafts = [draft_recipe(request, source, matched, storage) for storage in list_storages(request)]
    outcomes = [evaluate_draft(draft, source, matched) for draft in drafts]
    usable = [outcome for outcome in outcomes if not outcome.faults]
    if not usable:
        raise RecipeError(outcomes[0].faults)
    servers = tuple(SERVERS)
    best = max(
        usable, key=lambda outcome: sum(n in outcome.engines for n in (*servers, servers[0]))
    )
    sections = explain_draft(best.draft, source, matched, best.engines, best.decisions)
    title = describe_choice(best.draft, source, matched)
    return make_chosen(title, sections, best.engines)


def make_chosen(
    title: str, sections: tuple[Section, ...], engines: tuple[str, ...], notes: Sequence[str] = ()
) -> ChosenRecipe:
    """Write and parse a recipe; notes: paragraphs for the comment at its head."""
    text = write_recipe(title, sections, notes)
    return ChosenRecipe(
        title=title,
        text=text,
        recipe=parse_recipe(text, CHOSEN_NAME),
        sections=sections,
        engines=engines,
    )


def add_notes(chosen: ChosenRecipe, notes: Sequence[str]) -> ChosenRecipe:
    """Return a chosen recipe with paragraphs in the comment at its head."""
    return make_chosen(chosen.title, chosen.sections, chosen.engines, notes)


def check_request(request: RecipeRequest) -> None:
    """Raise UsageError for a method, format, preset or width that quantkit does not have."""
    known: Sequence[tuple[str, str | None, Sequence[str]]] = (
        ("method", request.method, registry.list_names("methods")),
        ("format", request.format, registry.list_names("formats")),
        ("rules", request.rules, tuple(PRESETS)),
    )
    for option, value, names in known:
        if value is not None and value not in names:
            raise UsageError(f"--{option}: {format_unknown_name(option, value, names)}")
    if request.method == "nf4" and request.bits not in {None, 4}:
        raise UsageError(f"--bits: expected 4 with method nf4, found {request.bits}; leave it out")


def list_storages(request: RecipeRequest) -> tuple[Storage, ...]:
    """Return the storages to try, in order."""
    storages = STORAGES.get(request.method or "awq", WITH_ZERO_POINTS)
    if request.format is None:
        return storages
    named = tuple(storage for storage in storages if storage.format_name == request.format)
    return named or (
        Storage(format_name=request.format, symmetric=False),
        Storage(format_name=request.format, symmetric=True),
    )


# ------------------------------------------------------------------------------------------ drafts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A draft, the engines that load its artifact, and the faults of its plan."""

    draft: Draft
    decisions: Mapping[str, Decision]
    engines: tuple[str, ...]
    faults: tuple[str, ...]


def draft_recipe(
    request: RecipeRequest, source: SourceFacts, matched: MatchedLayout, storage: Storage
) -> Draft:
    """Return the draft of a storage, with the largest group size that divides every width."""
    has_experts = any(block.experts for block in matched.layout.blocks)
    draft = Draft(
        request=request,
        method=request.method or "awq",
        bits=request.bits or 4,
        rules=request.rules or ("experts-only" if has_experts else "all-linear"),
        storage=storage,
        group_size=64 if request.method == "nf4" else GROUP_SIZES[0],
    )
    if draft.method == "nf4":
        return draft
    _, decisions, _ = apply_rules(parse_draft(draft), source, matched, storage.format_name)
    widths = list_widths(decisions)
    fitting = (size for size in GROUP_SIZES if all(width % size == 0 for width in widths))
    return replace(draft, group_size=next(fitting, -1))


def evaluate_draft(draft: Draft, source: SourceFacts, matched: MatchedLayout) -> Outcome:
    """Apply the rules of a draft, and list the engines that load the result."""
    name = draft.storage.format_name
    _, decisions, faults = apply_rules(parse_draft(draft), source, matched, name)
    output = registry.get_format(name)
    refusing = find_unsupported_engines(output, source.config, matched.layout, decisions)
    return Outcome(
        draft=draft,
        decisions=decisions,
        engines=tuple(engine for engine in output.engines if engine not in refusing),
        faults=tuple(faults),
    )


def parse_draft(draft: Draft) -> Recipe:
    """Return the recipe of a draft, without texts."""
    lines = (
        "version: 1",
        "source: {model: chosen}",
        f"quantize: {{{', '.join(f'{c.key}: {c.value}' for c in list_scheme(draft))}}}",
        f"format: {draft.storage.format_name}",
        f"rules: {draft.rules}",
        "fidelity: none",
        "output: {path: chosen}",
    )
    return parse_recipe("\n".join(lines), CHOSEN_NAME)
