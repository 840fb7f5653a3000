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
from quantkit.recipe.quantize import SCHEME_METHOD, SCHEME_VALUES
from quantkit.recipe.schema import Recipe
from quantkit.recipe.write_recipe import Section, write_recipe

GROUP_SIZES = (128, 64, 32)
NF4_BLOCK = 64
FP4_GROUPS = {"mxfp4": 32, "nvfp4": 16}
CHOSEN_NAME = "recipe.yaml"


@dataclass(frozen=True, kw_only=True)
class ChosenRecipe:
    """A recipe, its commented text, and the choices that the text states.

    notes: paragraphs of the comment at its head.
    """

    title: str
    text: str
    recipe: Recipe
    sections: tuple[Section, ...]
    engines: tuple[str, ...]
    notes: tuple[str, ...] = ()

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
KEEPING = SYMMETRIC[0]
"""The storage that holds codes of the source next to integers."""
KEPT_CODES = "keeps the source's codes of the other linears, bit for bit, where others store BF16"
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
    request = prefer_kept_codes(request, source, matched)
    storages = list_storages(request)
    group_size = choose_group_size(request, source, matched, storages[0])
    drafts = [draft_recipe(request, matched, storage, group_size) for storage in storages]
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
        notes=tuple(notes),
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
        ("scheme", request.scheme, ("int", *SCHEME_VALUES)),
    )
    for option, value, names in known:
        if value is not None and value not in names:
            raise UsageError(f"--{option}: {format_unknown_name(option, value, names)}")
    if request.method == "nf4" and request.bits not in {None, 4}:
        raise UsageError(f"--bits: expected 4 with method nf4, found {request.bits}; leave it out")
    if request.scheme not in SCHEME_VALUES:
        return
    if request.bits not in {None, 4}:
        raise UsageError(
            f"--bits: expected 4 with scheme {request.scheme}, found {request.bits}; leave it out"
        )
    if request.scheme not in registry.get_method(request.method or SCHEME_METHOD).kinds:
        raise UsageError(
            f"--method: expected gptq, awq, rtn or rtn_mse with scheme {request.scheme}, found "
            f"{request.method}; leave it out"
        )


def list_storages(request: RecipeRequest) -> tuple[Storage, ...]:
    """Return the storages to try, in order."""
    if request.scheme in SCHEME_VALUES:
        return (Storage(format_name=request.format or KEEPING.format_name, symmetric=True),)
    storages = STORAGES.get(request.method or "awq", WITH_ZERO_POINTS)
    if request.format is None:
        return storages
    named = tuple(storage for storage in storages if storage.format_name == request.format)
    return named or (
        Storage(format_name=request.format, symmetric=False),
        Storage(format_name=request.format, symmetric=True),
    )


def prefer_kept_codes(
    request: RecipeRequest, source: SourceFacts, matched: MatchedLayout
) -> RecipeRequest:
    """Return the request with GPTQ in the format that holds the source's codes, if linears are kept
    in FP8 blocks or other codes, vLLM loads the result, and the request names nothing else.

    Other formats would store them as BF16. AWQ scales no input that such a linear reads.
    """
    is_plain = not source.encoded and source.fp8_side is None
    if is_plain or request.method or request.scheme in SCHEME_VALUES:
        return request
    if request.format not in {None, KEEPING.format_name}:
        return request
    keeping = replace(
        request,
        method="gptq",
        format=KEEPING.format_name,
        reasons={
            "method": "as low a loss as AWQ with GPTQ, whose scaling stops at kept codes",
            **({"format": KEPT_CODES} if request.format is None else {}),
            **request.reasons,
        },
    )
    group_size = choose_group_size(keeping, source, matched, KEEPING)
    outcome = evaluate_draft(draft_recipe(keeping, matched, KEEPING, group_size), source, matched)
    is_kept = any(decision.keep in ("fp8", "codes") for decision in outcome.decisions.values())
    loads = next(iter(SERVERS)) in outcome.engines
    return keeping if is_kept and loads and not outcome.faults else request


# ------------------------------------------------------------------------------------------ drafts


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A draft, the engines that load its artifact, and the faults of its plan."""

    draft: Draft
    decisions: Mapping[str, Decision]
    engines: tuple[str, ...]
    faults: tuple[str, ...]


def draft_recipe(
    request: RecipeRequest, matched: MatchedLayout, storage: Storage, group_size: int
) -> Draft:
    """Return the draft of a storage."""
    has_experts = any(block.experts for block in matched.layout.blocks)
    return Draft(
        request=request,
        method=request.method or (SCHEME_METHOD if request.scheme in SCHEME_VALUES else "awq"),
        scheme=request.scheme or "int",
        bits=request.bits or 4,
        rules=request.rules or ("experts-only" if has_experts else "all-linear"),
        storage=storage,
        group_size=group_size,
    )


def choose_group_size(
    request: RecipeRequest, source: SourceFacts, matched: MatchedLayout, storage: Storage
) -> int:
    """Return the largest group size that divides every quantized width, -1 without one; any storage
    quantizes the same linears.
    """
    if request.method == "nf4":
        return NF4_BLOCK
    if request.scheme is not None and request.scheme in FP4_GROUPS:
        return FP4_GROUPS[request.scheme]
    draft = draft_recipe(request, matched, storage, GROUP_SIZES[0])
    _, decisions, _ = apply_rules(parse_draft(draft), source, matched, storage.format_name)
    widths = list_widths(decisions)
    return next((x for x in GROUP_SIZES if all(width % x == 0 for width in widths)), -1)


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
