"""The yardstick: the quantized modules in the same codes and groups, rounded to nearest.

A stream `yardstick` carries the fidelity text through these weights, next to those of the source
and of the artifact. Nothing of it is written into the artifact.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

from torch import Tensor

from quantkit import registry
from quantkit.build.block_plan import BlockPlan
from quantkit.build.context import BlockContext
from quantkit.build.dense import ScaledBlock, iterate_dense
from quantkit.build.expert_ops import ExpertSlice, SliceStats
from quantkit.build.hidden_states import Routing, StreamName, run_stream
from quantkit.build.quantize_experts import ExpertSettings, quantize_experts
from quantkit.contracts import FALLBACK_ROUNDING
from quantkit.models.layers import make_decoder_layer
from quantkit.plan.decisions import Decision

STREAM: StreamName = "yardstick"
RTN = "rtn"


def is_measured(context: BlockContext) -> bool:
    """Return whether the recipe asks for a yardstick."""
    return STREAM in context.streams


def round_decision(decision: Decision) -> Decision:
    """Return a decision with its scheme and method rtn; codes that rtn does not choose keep their
    method.
    """
    if decision.scheme is None:
        return decision
    kinds = registry.get_method(RTN).kinds
    method = RTN if decision.scheme.kind in kinds else decision.method
    return replace(decision, method=method, rounding=FALLBACK_ROUNDING, shrinkage=0.0)


def plan_rounding(plan: BlockPlan) -> BlockPlan:
    """Return the plan of a block in which nothing is scaled or calibrated."""
    experts = plan.experts
    return replace(
        plan,
        linears={
            name: replace(linear, decision=round_decision(linear.decision), fallbacks=())
            for name, linear in plan.linears.items()
        },
        groups={name: replace(group, scale_method=None) for name, group in plan.groups.items()},
        experts=experts and replace(experts, down_scale_method=None, needs_search=False),
    )


def round_dense(context: BlockContext, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the dense tensors of a block as RTN would store them, float32, by full name.

    tensors: those of the source, float32.
    """
    build = context.build
    rounding = replace(
        context,
        plan=plan_rounding(context.plan),
        build=replace(build, formats=build.formats[:1]),
    )
    scaled = ScaledBlock(tensors=tensors, stats={}, rescaled=frozenset())
    return {
        name: build.cast_kept(name, tensor) if quantized is None else quantized.weight
        for name, tensor, quantized in iterate_dense(rounding, scaled)
    }


def run_dense(context: BlockContext, rounded: Mapping[str, Tensor]) -> Routing | None:
    """Move the stream through rounded dense tensors; return its routing."""
    model, stream = context.build.model, context.streams[STREAM]
    layer = make_decoder_layer(model, context.plan.block, rounded)
    return run_stream(model, layer, stream, context.state.targets[STREAM], stream.expert_inputs)


def round_experts(
    context: BlockContext,
    tasks: Iterator[tuple[ExpertSlice, SliceStats | None]],
    rounded: list[ExpertSlice],
) -> Iterator[tuple[ExpertSlice, SliceStats | None]]:
    """Yield the tasks, and append to `rounded` each slice as RTN would store it."""
    plan = plan_rounding(context.plan)
    assert plan.experts is not None  # only blocks with experts have tasks
    formats = context.build.formats[:1]
    settings = ExpertSettings(plan=plan.experts, linears=plan.linears, formats=formats)
    for experts, stats in tasks:
        rounded.append(quantize_experts(experts, None, settings).weights)
        yield experts, stats
