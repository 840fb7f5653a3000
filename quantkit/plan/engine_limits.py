"""Engines that cannot load an artifact, with the reason: format, experts or config.json. Pure."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.contracts import Block, Config, Format, Layout
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS
from quantkit.plan.decisions import Decision
from quantkit.plan.match_checkpoint import names_no_class

NO_CLASS_REASON = "chooses the model's class by architectures in config.json, which names none"
OWN_READERS = "quantkit.load and `quantkit serve --engine transformers` read this artifact"


def find_unsupported_engines(
    output: Format, config: Config, layout: Layout, decisions: Mapping[str, Decision]
) -> Mapping[str, str]:
    """Return the engines that cannot load the artifact of these decisions, with the reason."""
    unnamed = dict.fromkeys(SERVERS, NO_CLASS_REASON) if names_no_class(config.values) else {}
    if reason := find_expert_reason(config.text("model_type"), layout, decisions):
        return {
            **unnamed,
            **{x: reason for x in output.engines if x in {**SERVERS, **TRANSFORMERS}},
        }
    if any(loads_no_single(output, block, decisions) for block in layout.blocks):
        reason = format_no_single(config.text("model_type"), "tensors")
        unnamed |= {x: reason for x in output.engines if x in TRANSFORMERS}
    if output.limits is None:
        return unnamed
    mtp_linears = {
        linear.name for block in layout.blocks if block.kind == "mtp" for linear in block.linears
    }
    schemes = {d.linear: scheme for d in decisions.values() if (scheme := d.scheme or d.codes)}
    kept = [
        d.linear
        for name, d in decisions.items()
        if d.action == "keep" and d.codes is None and name not in mtp_linears
    ]
    limits = output.limits(config.text("model_type"), schemes, kept) if schemes else {}
    return {**unnamed, **limits}


def find_expert_reason(
    model_type: str, layout: Layout, decisions: Mapping[str, Decision]
) -> str | None:
    """Return why no engine loads the experts of an artifact; None if some do.

    vLLM, SGLang and transformers read those of gpt_oss as MXFP4 blocks or in tensors with all
    experts of a layer, and those of DBRX in such tensors. They fail on single experts, or skip them
    and compute with random values.
    """
    for block in layout.blocks:
        if block.experts is None:
            continue
        decision = decisions[block.experts.first]
        form = "MXFP4 blocks or as tensors" if block.experts.bias else "tensors"
        is_flat = any(x.flat for x in block.stacked)
        if (block.experts.bias or is_flat) and decision.action == "quantize":
            return format_no_single(model_type, form)
        if decision.encoding is not None:
            return (
                f"loads experts in {decision.encoding} if no other linear is quantized; "
                f"{OWN_READERS}, and keep: bf16 stores experts as it loads them"
            )
    return None


def loads_no_single(output: Format, block: Block, decisions: Mapping[str, Decision]) -> bool:
    """Return whether transformers does not load the experts of a block from single tensors.

    The derivation has found how it stores and loads them (`Experts.single_methods`); it skips other
    names, so that these experts would start at random.
    """
    experts = block.experts
    if experts is None or experts.single_methods is None:
        return False
    is_single = decisions[experts.first].action == "quantize"
    return is_single and output.quant_method not in experts.single_methods


def format_no_single(model_type: str, form: str) -> str:
    """Return the reason of engines that load experts together."""
    return (
        f"loads the experts of {model_type} as {form} with all experts of a layer, and no single "
        f"ones; {OWN_READERS}"
    )
