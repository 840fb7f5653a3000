"""The keys of a recipe that is chosen for a model, each with the reason for its value. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from quantkit import registry
from quantkit.checkpoint.source_config import read_text_config
from quantkit.io.files import expand_home
from quantkit.plan.decisions import Decision
from quantkit.plan.match_checkpoint import MatchedLayout
from quantkit.plan.plan import SourceFacts
from quantkit.plan.recipe_draft import Draft, choose_rounding, list_scheme
from quantkit.recipe.quantize import SCHEME_VALUES
from quantkit.recipe.write_recipe import Choice, Section

SHRINKAGE = 0.05
"""`calibration.shrinkage` of real models; measured in numerics/README.md."""
SMALL_MODEL = 10**9
"""Parameters below which short texts suffice: about 40 tokens per channel of the widest input."""
BUILTIN_TEXTS: Mapping[str, tuple[str, str, int]] = {
    "builtin:tiny-v3": ("tiny-v3", "tiny-v3-heldout", 512)
}
"""Built-in model -> calibration set, fidelity set and tokens per sequence, all in its language."""


WITHOUT_HEAD = Section(
    name="",
    choices=(Choice(key="fidelity", value="none", reason="the model has no language head"),),
)
"""The section `fidelity` of a classifier, reward or embedding model."""


def explain_draft(
    draft: Draft,
    source: SourceFacts,
    matched: MatchedLayout,
    engines: Sequence[str],
    decisions: Mapping[str, Decision],
) -> tuple[Section, ...]:
    """Return all sections of the recipe, each key with the reason for its value."""
    parameters = sum(spec.n_elements for spec in matched.specs.values())
    learns = registry.get_method(draft.method).needs_stats
    texts = choose_texts(draft.request.model, source, parameters)
    return (
        explain_source(draft, source),
        explain_scheme(draft, decisions, engines),
        Section(
            name="",
            choices=(
                Choice(
                    key="format",
                    value=draft.storage.format_name,
                    reason=explain_engines(draft, engines),
                ),
                Choice(key="rules", value=draft.rules, reason=explain_rules(draft, matched)),
            ),
        ),
        *([texts[0]] if learns else []),
        *(
            [texts[1], explain_gates(draft, parameters)]
            if matched.layout.output == "logits"
            else [WITHOUT_HEAD]
        ),
        Section(
            name="output",
            choices=(Choice(key="path", value=choose_output(draft), is_text=True),),
        ),
        Section(
            name="",
            choices=(
                Choice(
                    key="memory",
                    value="null",
                    reason="70 % of the memory that is available when the build starts",
                ),
                *([explain_propagation(matched)] if learns else []),
            ),
        ),
    )


def explain_source(draft: Draft, source: SourceFacts) -> Section:
    """Return the section `source`; a hub model is pinned to the commit whose headers were read."""
    revision = () if source.revision is None else (
        Choice(key="revision", value=source.revision, reason="the newest commit at this choice"),
    )  # fmt: skip
    model = Choice(key="model", value=draft.request.model, is_text=True)
    return Section(name="source", choices=(model, *revision))


def explain_scheme(
    draft: Draft, decisions: Mapping[str, Decision], engines: Sequence[str]
) -> Section:
    """Return the section `quantize`."""
    widths, request = list_widths(decisions), draft.request
    shown = ", ".join(f"{width:,}" for width in widths[:4]) + (", ..." if len(widths) > 4 else "")
    if draft.group_size == -1:
        group = f"no size of 128, 64, 32 divides every quantized width ({shown}): one per row"
    else:
        group = f"the largest of 128, 64, 32 that divides every quantized width ({shown})"
    default = {
        "method": "AWQ scaling with GPTQ rounding lost least in the measurements",
        "bits": "about a quarter of BF16; 8 lose less",
    }
    if draft.scheme in SCHEME_VALUES:
        default["method"] = "with FP4, AWQ scaling before GPTQ gained nothing in the measurements"
    reasons = {
        "method": request.explain("method") if request.method else default["method"],
        "scheme": request.explain("scheme"),
        "rounding": "codes compensate the rounding error of the columns before them"
        if choose_rounding(draft.method) == "gptq"
        else "the method uses no calibration text",
        "bits": request.explain("bits") if request.bits else default["bits"],
        "group_size": group,
        "symmetric": explain_zero_points(draft, engines),
    }
    choices = tuple(replace(choice, reason=reasons[choice.key]) for choice in list_scheme(draft))
    return Section(name="quantize", choices=choices)


def explain_zero_points(draft: Draft, engines: Sequence[str]) -> str:
    """Return why the scheme has zero points or none."""
    if not draft.storage.symmetric:
        return f"zero points lose less, and format {draft.storage.format_name} stores them"
    return f"without zero points {', '.join(engines) or 'quantkit.load'} can load this format"


def explain_engines(draft: Draft, engines: Sequence[str]) -> str:
    """Return which engines load the format."""
    loads = (
        f"loaded by {', '.join(engines)}" if engines else "no engine loads it; quantkit.load does"
    )
    return f"{draft.request.explain('format')}; {loads}" if draft.request.format else loads


def explain_rules(draft: Draft, matched: MatchedLayout) -> str:
    """Return why these modules are quantized."""
    if draft.request.rules:
        return draft.request.explain("rules")
    if draft.rules == "all-linear":
        return "a dense model; embedding and head stay as they are"
    routed = sum(
        linear.n_parameters
        for block in matched.layout.blocks
        for linear in block.linears
        if linear.role == "routed_expert"
    )
    total = sum(spec.n_elements for spec in matched.specs.values())
    return f"routed experts are {100 * routed / total:.0f} % of the parameters; the rest is kept"


def explain_propagation(matched: MatchedLayout) -> Choice:
    """Return the choice of `propagate`."""
    if any(block.experts for block in matched.layout.blocks):
        return Choice(
            key="propagate",
            value="quantized",
            reason="both gains nothing that can be resolved with routed experts",
        )
    return Choice(
        key="propagate",
        value="both",
        reason="dense layers compensate the blocks before them; less loss for twice the time",
    )


def explain_gates(draft: Draft, parameters: int) -> Section:
    """Return the section `gates`: a bound of the worst kind of text, wide for small models."""
    bound = choose_gate(draft.bits, parameters)
    reason = "nats per token, of the kind of text that loses most; a missed gate exits with 3"
    choice = Choice(key="kl_worst_kind", value=f"{{max: {bound}}}", reason=reason)
    return Section(name="gates", choices=(choice,))


def choose_gate(bits: int, parameters: int) -> float:
    """Return the bound of `kl_worst_kind`: small models and few bits lose more.

    Bounds against a failed build, not goals: SmolLM2-135M at 4 bits has .2 (calibration/README.md).
    """
    if bits >= 8:
        return 0.05
    if bits < 4:
        return 1.0
    return 0.4 if parameters < SMALL_MODEL else 0.2


def choose_texts(model: str, source: SourceFacts, parameters: int) -> tuple[Section, Section]:
    """Return the sections `calibration` and `fidelity`."""
    if model in BUILTIN_TEXTS:
        calibration, fidelity, length = BUILTIN_TEXTS[model]
        own, whole = "in the model's own language", Choice(key="length", value=str(length))
        return (
            Section(
                name="calibration",
                choices=(Choice(key="set", value=calibration, reason=own), whole),
            ),
            Section(
                name="fidelity", choices=(Choice(key="set", value=fidelity, reason=own), whole)
            ),
        )
    small = parameters < SMALL_MODEL
    length, why = (512 if small else 2048), "below a billion" if small else "a billion or more"
    limit = read_text_config(source.config).integer("max_position_embeddings", 0)
    if 0 < limit < length:
        length, why_length = limit, "the model's context"
    else:
        why_length = f"{why} parameters"
    sequences, windows = (128, 60) if small else (256, 32)
    auto = "the mixture everyday of the hub, or the first fallback that this machine has"
    held_out = "the held-out set that belongs to it; half of it of other kinds of text"
    return (
        Section(
            name="calibration",
            choices=(
                Choice(key="set", value="auto", reason=auto),
                Choice(
                    key="sequences",
                    value=str(sequences),
                    reason=f"{sequences * length:,} tokens; {why} parameters",
                ),
                Choice(key="length", value=str(length), reason=why_length),
                Choice(
                    key="shrinkage",
                    value=str(SHRINKAGE),
                    reason="kinds of text that the mixture does not have lose less",
                ),
            ),
        ),
        Section(
            name="fidelity",
            choices=(
                Choice(key="set", value="auto", reason=held_out),
                Choice(
                    key="windows",
                    value=str(windows),
                    reason=f"{windows * length:,} tokens; {why} parameters",
                ),
                Choice(key="length", value=str(length), reason=why_length),
            ),
        ),
    )


def choose_output(draft: Draft) -> str:
    """Return the folder of the artifact: artifacts/<model>-<method><bits>."""
    if draft.request.output is not None:
        return draft.request.output
    name = draft.request.model.removeprefix("builtin:")
    last = expand_home(name).resolve().name if name.startswith((".", "~")) else Path(name).name
    safe = re.sub(r"[^A-Za-z0-9._-]+", "-", last).strip("-.") or "model"
    return f"artifacts/{safe[:100]}{name_scheme(draft.method, draft.bits, draft.scheme)}"


def name_scheme(method: str, bits: int, scheme: str) -> str:
    """Return the end of the name of an artifact's folder: "-awq4", "-gptq-nvfp4"."""
    if method == "nf4":
        return "-nf4"
    return f"-{method.replace('_', '-')}{bits if scheme == 'int' else f'-{scheme}'}"


def describe_choice(draft: Draft, source: SourceFacts, matched: MatchedLayout) -> str:
    """Return the first line of the recipe's comment."""
    parameters = sum(spec.n_elements for spec in matched.specs.values())
    size = f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"
    codes = f"{draft.bits} bits" if draft.scheme == "int" else draft.scheme
    return (
        f"{draft.request.model} ({source.config.text('model_type')}, {size} parameters) -> "
        f"{draft.method}, {codes}, format {draft.storage.format_name}"
    )


def list_widths(decisions: Mapping[str, Decision]) -> list[int]:
    """Return the distinct input widths of the quantized linears, ascending."""
    return sorted({
        decision.linear.in_features
        for decision in decisions.values()
        if decision.action == "quantize"
    })
