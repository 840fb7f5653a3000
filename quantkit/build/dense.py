"""The dense part of a block, everything but its routed experts: calibrate, scale, check, quantize,
move the streams.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from quantkit.build.block_plan import BlockPlan, GroupPlan
from quantkit.build.context import BlockContext
from quantkit.build.coverage import CoverageMeters
from quantkit.build.expert_ops import count_tokens
from quantkit.build.hidden_states import Routing, StreamName, run_batch, run_stream
from quantkit.build.quantize_linear import QuantizedLinear, QuantizeRequest, quantize_group
from quantkit.contracts import InputStats, LinearGroup, Scheme
from quantkit.models import scaling
from quantkit.models.layers import (
    DecoderLayer,
    ExpertTap,
    MetaModel,
    RouterOutput,
    get_layer_name,
    make_decoder_layer,
    observe_inputs,
    run_layer,
)
from quantkit.numerics import gram as grams
from quantkit.numerics.error_propagation import compute_residual_gap

Tensors = Mapping[str, Tensor]


SAMPLE_TOKENS = 512
"""Calibration tokens that show whether scaling changed anything; a longer sequence is used
whole.
"""


@dataclass(frozen=True, kw_only=True)
class ScalingCheckSample:
    """The first calibration sequences at a block, run in the precision of the figures, not in that
    of calibration.

    rows [tokens, width] go in, the states `out` [tokens, n] come out without routed experts;
    `routed` is the router's output for them.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    out: Tensor
    routed: RouterOutput | None


@dataclass(frozen=True, kw_only=True)
class BlockCalibration:
    """Statistics and routing of the calibration stream at a block, before its experts run.

    `original` is the routing of the same text in the original model, None where that does not run;
    `sample` is None where nothing can be scaled.
    """

    stats: Mapping[str, InputStats]  # by group name
    routing: Routing | None
    original: Routing | None = None
    sample: ScalingCheckSample | None
    expert_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScaledBlock:
    """Dense tensors of a block (float32, full names) after scaling, with the statistics that go
    with them.

    `rescaled` are the names of the scaled groups; `expert_scale` [hidden] multiplies gate and up of
    the routed experts; `expert_inputs` [tokens, hidden] is the sample at the experts after scaling.
    """

    tensors: Tensors
    stats: Mapping[str, InputStats]
    rescaled: frozenset[str]
    expert_scale: Tensor | None = None
    expert_inputs: Tensor | None = None


class GramAccumulator:
    """Mutable sums of the statistics of one group input, of `width` channels.

    `crossed`: with the original model's inputs, for the cross statistics; `stream`: the channels of
    the stream that the group's output is added to, for the residual statistics.
    """

    def __init__(
        self, width: int, device: torch.device, crossed: bool = False, stream: int = 0
    ) -> None:
        self.gram = torch.zeros(width, width, device=device)
        self.cross = torch.zeros_like(self.gram) if crossed else None
        self.residual = torch.zeros(stream, width, device=device) if crossed and stream else None
        self.abs_sum = torch.zeros(width, device=device)
        self.tokens = 0

    def add(self, rows: Tensor, original: Tensor | None = None, gap: Tensor | None = None) -> None:
        """Add tokens [n, in], the original model's inputs in their place [n, in], and the stream's
        gap [n, stream].
        """
        grams.accumulate_gram(self.gram, self.abs_sum, rows)
        if self.cross is not None and original is not None:
            grams.accumulate_cross(self.cross, rows, original)
        if self.residual is not None and gap is not None:
            grams.accumulate_residual(self.residual, rows, gap)
        self.tokens += len(rows)

    def stats(self) -> InputStats:
        """Return the statistics of all tokens that were added; call it once."""
        gram, mean = grams.complete_gram(self.gram), self.abs_sum / max(self.tokens, 1)
        count = torch.tensor(self.tokens)
        return InputStats(
            gram=gram, mean_abs=mean, n_tokens=count, cross=self.cross, residual=self.residual
        )


def run_reference(
    context: BlockContext, layer: DecoderLayer, calibration: BlockCalibration | None
) -> Routing | None:
    """Move the reference stream, if there is one, through the original dense part; return its
    routing.

    With calibration, record how far its grams span the inputs on the way.
    """
    stream, model = context.streams.get("reference"), context.build.model
    if stream is None:
        return None
    target = context.state.targets["reference"]
    if calibration is None:
        return run_stream(model, layer, stream, target, stream.expert_inputs)
    routings, meters = list[Routing](), CoverageMeters(context.plan, calibration.stats, stream)
    with observe_inputs(layer.module, observed_modules(context.plan, crossed=False)) as inputs:
        for batch in stream.batches:
            valid, routing = run_batch(model, layer, stream, batch, target, stream.expert_inputs)
            routings += [routing] if routing else []
            meters.add(batch, valid, inputs)
    context.state.record.coverage = meters.finish()
    return Routing.concatenate(routings)


def run_sample(context: BlockContext, layer: DecoderLayer) -> ScalingCheckSample | None:
    """Run the original dense part over the first calibration sequences; None where no scaling has
    to be checked.
    """
    if not context.plan.may_scale:
        return None
    stream = context.streams["calibration"]
    longest = stream.batches[0].lengths
    lengths = longest[: max(1, SAMPLE_TOKENS // longest[0])]
    rows = stream.hidden.read(0, sum(lengths))
    out, valid = run_layer(context.build.model, layer, rows, lengths)
    states = context.build.model.outer.form.get_hidden(out)
    return ScalingCheckSample(
        rows=rows, lengths=lengths, out=states, routed=router_output(layer.tap, valid)
    )


def router_output(tap: ExpertTap | None, valid: Tensor) -> RouterOutput | None:
    """Return the tap's last router output without padding; None where there are no routed
    experts.
    """
    if tap is None or tap.last is None:
        return None
    last = tap.last
    return RouterOutput(
        hidden=last.hidden[valid], index=last.index[valid], weight=last.weight[valid].float()
    )


def strip_padding(x: Tensor, valid: Tensor) -> Tensor:
    """[sequences, longest, n], valid [sequences * longest] -> [tokens, n]."""
    return x.reshape(-1, x.shape[-1])[valid]


# -------------------------------------------------------------------------------------- calibration


def calibrate_dense(
    context: BlockContext, tensors: Tensors, sample: ScalingCheckSample | None
) -> BlockCalibration:
    """Run the original dense part over the calibration stream and sum the grams of the groups to be
    quantized.

    With `propagate: both` the same text in the original model runs next to it, batch by batch.
    """
    stream, original = context.streams["calibration"], context.streams.get("original")
    block, model = context.plan.block, context.build.calibration_model
    groups = {name: group.group for name, group in context.plan.groups.items()}
    layer = make_decoder_layer(model, block, tensors)
    sums = make_accumulators(context.plan, model.device, original is not None)
    routings, original_routings = list[Routing](), list[Routing]()
    with observe_inputs(
        layer.module, observed_modules(context.plan, original is not None)
    ) as inputs:
        for batch in stream.batches:
            original_inputs: dict[str, Tensor] = {}
            if original is not None:
                target = context.state.targets["original"]
                valid, routing = run_batch(
                    model, layer, original, batch, target, original.expert_inputs
                )
                original_inputs = {name: strip_padding(x, valid) for name, x in inputs.items()}
                original_routings += [routing] if routing else []
            target = context.state.targets["calibration"]
            valid, routing = run_batch(
                model, layer, stream, batch, target, stream.calibration_inputs
            )
            routings += [routing] if routing else []
            for name, total in sums.items():
                norm, gap = groups[name].adds_to, None
                if norm and original_inputs:
                    gap = compute_residual_gap(
                        original_inputs[norm], strip_padding(inputs[norm], valid)
                    )
                total.add(strip_padding(inputs[name], valid), original_inputs.get(name), gap)
    count = block.experts.count if block.experts else 0
    joined = Routing.concatenate(routings)
    return BlockCalibration(
        stats={name: total.stats() for name, total in sums.items()},
        routing=joined,
        original=Routing.concatenate(original_routings),
        sample=sample,
        expert_tokens=tuple(count_tokens(joined, count).tolist()) if joined else (),
    )


def make_accumulators(
    plan: BlockPlan, device: torch.device, crossed: bool
) -> dict[str, GramAccumulator]:
    """Return empty sums for each group that is quantized, by its name."""
    linears = {linear.name: linear for linear in plan.block.linears}
    return {
        name: GramAccumulator(
            linears[group.group.readers[0]].in_features,
            device,
            crossed=crossed,
            stream=linears[group.group.readers[0]].out_features if group.group.adds_to else 0,
        )
        for name, group in plan.groups.items()
    }


def observed_modules(plan: BlockPlan, crossed: bool) -> dict[str, str]:
    """Return the modules of the layer whose inputs are observed: of each group, and with `crossed`
    of norms after it.
    """
    groups = {name: group.group for name, group in plan.groups.items()}
    modules = {name: get_layer_name(plan.block, group.readers[0]) for name, group in groups.items()}
    if crossed:
        norms = [group.adds_to for group in groups.values() if group.adds_to]
        modules |= {norm: get_layer_name(plan.block, norm) for norm in norms}
    return modules


# ------------------------------------------------------------------------------------------ scaling


def candidate_scales(group: GroupPlan, calibration: BlockCalibration, tensors: Tensors) -> Tensor:
    """Return the candidate scales [candidates, in] of a group's input; the group has a scale
    search.
    """
    absorber, rescale, stats = group.group.absorber, group.rescale, calibration.stats
    assert absorber is not None and rescale is not None  # the caller has checked
    is_norm = tensors[f"{absorber.module}.weight"].dim() == 1
    mean_abs, gram = stats[group.group.name].mean_abs, stats[group.group.name].gram
    scaling.check_input(absorber.module, mean_abs, gram)
    return scaling.compute_group_candidates(rescale, mean_abs, absorber, is_norm)


def batch_by_shape(
    context: BlockContext, group: LinearGroup, tensors: Tensors
) -> list[tuple[Tensor, Scheme | None]]:
    """Stack the weights of a group's dense readers, kept ones included: those of one shape and
    scheme as one batch.
    """
    batches: dict[tuple[torch.Size, Scheme | None], list[Tensor]] = {}
    for reader in group.readers:
        weight = tensors[f"{reader}.weight"]
        scheme = context.plan.linears[reader].decision.scheme
        batches.setdefault((weight.shape, scheme), []).append(weight)
    return [
        (torch.stack(weights), scheme) for (_, scheme), weights in batches.items()
    ]  # [readers, out, in]


def scale_groups(
    context: BlockContext,
    tensors: Tensors,
    calibration: BlockCalibration,
    expert_errors: Sequence[Tensor],
) -> ScaledBlock:
    """Choose a scale per group and fold it into the tensors.

    `expert_errors` [candidates, experts]: the part of the routed experts in the error of each
    candidate.
    """
    changed, stats, rescaled, expert_scale = (
        dict(tensors),
        dict(calibration.stats),
        set[str](),
        None,
    )
    for name, plan in context.plan.groups.items():
        group, rescale = plan.group, plan.rescale
        if rescale is None or group.absorber is None:
            continue
        scales = candidate_scales(plan, calibration, tensors)
        batches, gram = batch_by_shape(context, group, tensors), calibration.stats[name].gram
        added = torch.zeros(len(scales), dtype=torch.float64, device=gram.device)
        if group.routed_experts and expert_errors:  # summed at once, in ascending order of experts
            added = torch.cat(list(expert_errors), dim=1).sum(1)  # [n, experts] -> [n]
        choice = scaling.search_scales(name, added, batches, gram, rescale, scales)
        context.state.record.choices.append(choice)
        if choice.is_rescaled:
            scale = scales[choice.candidate]
            scaling.divide_absorber(changed, group.absorber, scale)
            scaling.multiply_readers(changed, group, scale)
            stats[name] = scaling.rescale_stats(stats[name], scale)
            rescaled.add(name)
            expert_scale = scale if group.routed_experts else expert_scale
    scaled = ScaledBlock(
        tensors=changed, stats=stats, rescaled=frozenset(rescaled), expert_scale=expert_scale
    )
    return check_scaling(context, scaled, calibration.sample) if calibration.sample else scaled


def check_scaling(
    context: BlockContext, scaled: ScaledBlock, sample: ScalingCheckSample
) -> ScaledBlock:
    """Check that the scaled dense part gives the original's output; add the experts' inputs of the
    sample.
    """
    model, block, record = context.build.model, context.plan.block, context.state.record
    layer = make_decoder_layer(model, block, scaled.tensors)
    out, valid = run_layer(model, layer, sample.rows, sample.lengths)
    part = "the block's output without its experts" if layer.tap else "the block's output"
    states = model.outer.form.get_hidden(out)
    change = scaling.check_unchanged(block.name, part, sample.out, states, context.tolerance)
    record.fold_change = max(record.fold_change, change)
    routed = router_output(layer.tap, valid)
    if routed is None or sample.routed is None or block.experts is None:
        return scaled
    before, after = (
        scaling.make_routing_matrix(output.index, output.weight, block.experts.count)
        for output in (sample.routed, routed)
    )
    scaling.check_unchanged(
        block.name, "the router's decisions", before, after, scaling.ROUTING_TOLERANCE
    )
    return replace(scaled, expert_inputs=routed.hidden)


# ------------------------------------------------------------------------------------- quantization


def quantize_dense(context: BlockContext, scaled: ScaledBlock) -> dict[str, Tensor]:
    """Quantize and write everything but the routed experts; return the weights as stored, float32,
    by full name.
    """
    stored = dict[str, Tensor]()
    for name, tensor, quantized in iterate_dense(context, scaled):
        if quantized is None:
            stored[name] = context.write_kept(name, tensor)
            continue
        context.write(quantized.tensors, (quantized.record,))
        stored[name] = quantized.weight
    return stored


def iterate_dense(
    context: BlockContext, scaled: ScaledBlock
) -> Iterator[tuple[str, Tensor, QuantizedLinear | None]]:
    """Yield the name and the scaled tensor of everything but the routed experts, with the quantized
    linear, None for what is kept.
    """
    groups = {reader: group for group in context.plan.groups.values() for reader in group.readers}
    waiting = dict[str, QuantizedLinear]()
    for name, tensor in scaled.tensors.items():
        linear = context.plan.linears.get(name.removesuffix(".weight"))
        if linear is None or not linear.is_quantized:
            yield name, tensor, None
            continue
        module = linear.decision.linear.name
        if name not in waiting:  # the first of those that read its input
            waiting |= quantize_readers(context, scaled, module, groups.get(module))
        yield name, tensor, waiting.pop(name)


def quantize_readers(
    context: BlockContext, scaled: ScaledBlock, linear: str, group: GroupPlan | None
) -> dict[str, QuantizedLinear]:
    """Quantize a linear with the others of its group whose tensors are present; return them by the
    names of weights.
    """
    name = group.group.name if group else ""
    stats = scaled.stats.get(name)
    readers = group.readers if group else (linear,)
    requests = [
        QuantizeRequest(
            decision=context.plan.linears[reader].decision,
            weight=scaled.tensors[f"{reader}.weight"],
            stats=stats,
            tokens=0 if stats is None else int(stats.n_tokens),
            rescaled=name in scaled.rescaled,
            fallbacks=context.plan.linears[reader].fallbacks,
        )
        for reader in readers
        if f"{reader}.weight" in scaled.tensors
    ]
    quantized = quantize_group(requests, context.build.formats)
    return {
        f"{request.decision.linear.name}.weight": linear
        for request, linear in zip(requests, quantized, strict=True)
    }


def run_stored_block(context: BlockContext, stored: Tensors) -> dict[StreamName, Routing | None]:
    """Move the streams that see stored weights through the dense part; return their routings."""
    models: dict[StreamName, MetaModel] = {}
    if "quantized" in context.streams:
        models["quantized"] = context.build.model
    if context.calibration and context.build.plan.propagation != "original":
        models["calibration"] = context.build.calibration_model
    routings: dict[StreamName, Routing | None] = {}
    for name, model in models.items():
        layer = make_decoder_layer(model, context.plan.block, stored)
        stream, target = context.streams[name], context.state.targets[name]
        routings[name] = run_stream(model, layer, stream, target, stream.expert_inputs)
    return routings
