"""Kept weights whose codes an artifact's format does not hold: they are decoded. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from quantkit.checkpoint.encoding import EncodedWeight
from quantkit.contracts import Layout
from quantkit.plan.decisions import Decision, keeps_stacked


def mark_decoded(
    decisions: Mapping[str, Decision], encoded: Mapping[str, EncodedWeight]
) -> dict[str, Decision]:
    """Return the decisions with the encoding of kept weights that are decoded; FP8 blocks have
    warnings of their own.
    """

    def mark(name: str, decision: Decision) -> Decision:
        weight = encoded.get(f"{name}.weight")
        is_plain = (decision.action, decision.keep) == ("keep", "source")
        if weight is None or weight.block is not None or not is_plain:
            return decision
        return replace(decision, decoded_from=weight.label)

    return {name: mark(name, decision) for name, decision in decisions.items()}


def find_decoded_experts(
    layout: Layout, encoded: Mapping[str, EncodedWeight], decisions: Mapping[str, Decision]
) -> dict[str, EncodedWeight]:
    """Return the stored tensors with all experts of a block that are kept and decoded, by name."""
    weights = dict[str, EncodedWeight]()
    for block in layout.blocks:
        if block.experts is None or not keeps_stacked(block, decisions):
            continue
        decision = decisions[block.experts.first]
        if decision.encoding is None and decision.keep == "source":
            names = [x.name for x in block.stacked if x.name in encoded]
            weights |= {name: encoded[name] for name in names}
    return weights


def describe_decoded(
    layout: Layout,
    encoded: Mapping[str, EncodedWeight],
    decisions: Mapping[str, Decision],
    format_name: str,
) -> list[str]:
    """Return a warning for kept weights that are stored in codes and are decoded."""
    weights = {
        name: encoded[f"{name}.weight"]
        for name, decision in decisions.items()
        if decision.decoded_from
    }
    weights |= find_decoded_experts(layout, encoded, decisions)
    if not weights:
        return []
    (first, *others), plain = weights, [*weights.values()]
    labels = ", ".join(dict.fromkeys(weight.label for weight in plain))
    more = ", ..." if others else ""
    before, after = (
        sum(sizes)
        for sizes in zip(*((weight.n_bytes, weight.spec.n_bytes) for weight in plain), strict=True)
    )
    return [
        f"{len(plain)} kept weights in {labels} ({first}{more}) are decoded to "
        f"{plain[0].spec.dtype}, {after / 1e9:.2f} GB instead of {before / 1e9:.2f} GB, because "
        f"format {format_name} does not hold their codes: a rule with quantize makes them smaller"
    ]
