"""Everything of a block but its routed experts: learn, fold, check, solve, store, move on."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from quantkit.build.context import BlockContext
from quantkit.build.expert_ops import tokens_per_expert
from quantkit.build.hidden_states import Routing, StreamName, run_batch, run_stream
from quantkit.build.quantize_linear import QuantizedLinear, QuantizeRequest, quantize_group
from quantkit.contracts import InputStats, LinearGroup, Rescale, Scheme
from quantkit.models import scaling
from quantkit.models.layers import (
    ExpertTap,
    MetaModel,
    RouterOutput,
    decoder_layer,
    observing,
    relative,
    run,
)
from quantkit.numerics import gram as grams
from quantkit.numerics.error_propagation import residual_gap

Tensors = Mapping[str, Tensor]


SAMPLE_TOKENS = 512
"""Calibration tokens that show whether folding changed anything; a sequence that is longer stands whole."""


@dataclass(frozen=True, kw_only=True)
class ScalingCheckSample:
    """The first calibration sequences at a block, run in the precision of the figures, not in calibration's.

    rows [tokens, hidden] go in, `out` comes out without routed experts; `asked` is what the router asked of those.
    """

    rows: Tensor
    lengths: tuple[int, ...]
    out: Tensor
    asked: RouterOutput | None


@dataclass(frozen=True, kw_only=True)
class BlockCalibration:
    """What the calibration stream told of a block before its experts ran.

    `original` is what the router decided for the same text in the original model, None where that does not run beside;
    `sample` is None where nothing can be folded.
    """

    stats: Mapping[str, InputStats]  # by group name
    routing: Routing | None
    original: Routing | None = None
    sample: ScalingCheckSample | None
    expert_tokens: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class ScaledBlock:
    """Dense tensors of a block (float32, full names) after folding, with the statistics that go with them."""

    tensors: Tensors
    stats: Mapping[str, InputStats]
    rescaled: frozenset[str]  # names of the groups that were scaled
    expert_scale: Tensor | None = (
        None  # [hidden], what gate and up of the routed experts are multiplied by
    )
    seen: Tensor | None = None  # what the experts see of the sample after folding [tokens, hidden]


class GramAccumulator:
    """A running sum of the statistics of one group input, of `width` channels.

    With `crossed` the original model's inputs come beside; with `stream`, too, the stream of so many channels that the
    group's output is added to.
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
        """Add tokens [n, in], what the original model has in their place, and what the stream lacks [n, stream]."""
        grams.accumulate(self.gram, self.abs_sum, rows)
        if self.cross is not None and original is not None:
            grams.accumulate_cross(self.cross, rows, original)
        if self.residual is not None and gap is not None:
            grams.accumulate_residual(self.residual, rows, gap)
        self.tokens += len(rows)

    def stats(self) -> InputStats:
        """The statistics of all tokens, once they were added."""
        gram, mean = grams.complete(self.gram), self.abs_sum / max(self.tokens, 1)
        count = torch.tensor(self.tokens)
        return InputStats(
            gram=gram, mean_abs=mean, n_tokens=count, cross=self.cross, residual=self.residual
        )


def reference_pass(work: BlockContext, layer: nn.Module, tap: ExpertTap | None) -> Routing | None:
    """Move the reference stream, if there is one, through the original dense part; what its router decided."""
    stream = work.streams.get("reference")
    if stream is None:
        return None
    return run_stream(work.job.skeleton, layer, tap, stream, work.targets["reference"], stream.seen)


def run_sample(
    work: BlockContext, layer: nn.Module, tap: ExpertTap | None
) -> ScalingCheckSample | None:
    """Run the original dense part over the first calibration sequences; None where no fold will have to be checked."""
    if not work.folds:
        return None
    stream = work.streams["calibration"]
    longest = stream.batches[0].lengths
    lengths = longest[: max(1, SAMPLE_TOKENS // longest[0])]
    rows = stream.hidden.read(0, sum(lengths))
    out, valid = run(work.job.skeleton, layer, rows, lengths)
    return ScalingCheckSample(rows=rows, lengths=lengths, out=out, asked=router_output(tap, valid))


def router_output(tap: ExpertTap | None, valid: Tensor) -> RouterOutput | None:
    """The tap's last request, token rows only; None where there are no routed experts."""
    if tap is None or tap.last is None:
        return None
    last = tap.last
    return RouterOutput(
        hidden=last.hidden[valid], index=last.index[valid], weight=last.weight[valid].float()
    )


def strip_padding(x: Tensor, valid: Tensor) -> Tensor:
    """What was observed without its padding: [sequences, longest, n], valid [sequences * longest] -> [tokens, n]."""
    return x.reshape(-1, x.shape[-1])[valid]


def calibrate_dense(
    work: BlockContext, tensors: Tensors, sample: ScalingCheckSample | None
) -> BlockCalibration:
    """Run the original dense part over the calibration stream and sum the grams of the groups to be quantized.

    With `propagate: both` the same text in the original model runs beside it, batch by batch.
    """
    stream, bones, groups = work.streams["calibration"], work.job.learning, work.quantized_groups()
    beside = work.streams.get("original")
    layer, tap = decoder_layer(bones, work.block, tensors)
    widths = {linear.name: linear.in_features for linear in work.block.linears}
    crossed, hidden = beside is not None, stream.hidden.width
    sums = {
        name: GramAccumulator(
            widths[group.readers[0]],
            bones.device,
            crossed=crossed,
            stream=hidden if group.adds_to else 0,
        )
        for name, group in groups.items()
    }
    observe = {name: relative(work.block, group.readers[0]) for name, group in groups.items()}
    if crossed:
        observe |= {
            group.adds_to: relative(work.block, group.adds_to)
            for group in groups.values()
            if group.adds_to
        }
    here, there = list[Routing](), list[Routing]()
    with observing(layer, observe) as inputs:
        for batch in stream.batches:
            original: dict[str, Tensor] = {}
            if beside is not None:
                valid, routing = run_batch(
                    bones, layer, tap, beside, batch, work.targets["original"], beside.seen
                )
                original = {name: strip_padding(x, valid) for name, x in inputs.items()}
                there += [routing] if routing else []
            valid, routing = run_batch(
                bones, layer, tap, stream, batch, work.targets["calibration"], stream.learned
            )
            here += [routing] if routing else []
            for name, total in sums.items():
                at = groups[name].adds_to
                gap = (
                    residual_gap(original[at], strip_padding(inputs[at], valid))
                    if at and original
                    else None
                )
                total.add(strip_padding(inputs[name], valid), original.get(name), gap)
    count = work.block.experts.count if work.block.experts else 0
    decided, stats = Routing.joined(here), {name: total.stats() for name, total in sums.items()}
    return BlockCalibration(
        stats=stats,
        routing=decided,
        original=Routing.joined(there),
        sample=sample,
        expert_tokens=tuple(tokens_per_expert(decided, count).tolist()) if decided else (),
    )


def candidate_scales(
    group: LinearGroup, rescale: Rescale, learned: BlockCalibration, tensors: Tensors
) -> Tensor:
    """Candidate scales [n, in] of a group's input."""
    assert group.absorber is not None  # Work.rescale_of asks for one
    into_norm, stats = (
        tensors[f"{group.absorber.module}.weight"].dim() == 1,
        learned.stats[group.name],
    )
    scaling.check_input(group.absorber.module, stats.mean_abs, stats.gram)
    return scaling.candidates(rescale, stats.mean_abs, group.absorber, into_norm)


def batch_by_shape(
    work: BlockContext, group: LinearGroup, tensors: Tensors
) -> list[tuple[Tensor, Scheme | None]]:
    """The weights of a group's dense readers, kept ones included: equal shapes of one scheme as one batch."""
    found: dict[tuple[torch.Size, Scheme | None], list[Tensor]] = {}
    for reader in group.readers:
        weight = tensors[f"{reader}.weight"]
        found.setdefault((weight.shape, work.job.plan.decisions[reader].scheme), []).append(weight)
    return [
        (torch.stack(weights), scheme) for (_, scheme), weights in found.items()
    ]  # [readers, out, in]


def fold_groups(
    work: BlockContext, tensors: Tensors, learned: BlockCalibration, expert_errors: Sequence[Tensor]
) -> ScaledBlock:
    """Choose a scale per group and fold it. `expert_errors` [n, experts]: what the routed experts add."""
    changed, stats, rescaled, expert_scale = dict(tensors), dict(learned.stats), set[str](), None
    for name, group in work.quantized_groups().items():
        rescale = work.rescale_of(group)
        if rescale is None or group.absorber is None:
            continue
        scales = candidate_scales(group, rescale, learned, tensors)
        batches, gram = batch_by_shape(work, group, tensors), learned.stats[name].gram
        added = torch.zeros(len(scales), dtype=torch.float64, device=gram.device)
        if (
            group.routed_experts and expert_errors
        ):  # summed at once: the cut into waves must not change the sum
            added = torch.cat(list(expert_errors), dim=1).sum(1)  # [n, experts] -> [n]
        choice = scaling.search(name, added, batches, gram, rescale, scales)
        work.record.choices.append(choice)
        if choice.rescaled:
            scale = scales[choice.candidate]
            scaling.absorb(changed, group.absorber, scale)
            scaling.multiply_readers(changed, group, scale)
            stats[name] = scaling.rescaled_stats(stats[name], scale)
            rescaled.add(name)
            expert_scale = scale if group.routed_experts else expert_scale
    folded = ScaledBlock(
        tensors=changed, stats=stats, rescaled=frozenset(rescaled), expert_scale=expert_scale
    )
    return check_scaling(work, folded, learned.sample) if learned.sample else folded


def check_scaling(
    work: BlockContext, folded: ScaledBlock, sample: ScalingCheckSample
) -> ScaledBlock:
    """The folded dense part must give what the original gave; adds what its experts see of the sample."""
    layer, tap = decoder_layer(work.job.skeleton, work.block, folded.tensors)
    out, valid = run(work.job.skeleton, layer, sample.rows, sample.lengths)
    part = "the block's output without its experts" if tap else "the block's output"
    change = scaling.check_unchanged(work.block.name, part, sample.out, out, work.tolerance)
    work.record.fold_change = max(work.record.fold_change, change)
    now = router_output(tap, valid)
    if now is None or sample.asked is None or work.block.experts is None:
        return folded
    count = work.block.experts.count
    before, after = (
        scaling.routing_matrix(request.index, request.weight, count)
        for request in (sample.asked, now)
    )
    scaling.check_unchanged(
        work.block.name, "the router's decisions", before, after, scaling.ROUTING_TOLERANCE
    )
    return replace(folded, seen=now.hidden)


def quantize_dense(work: BlockContext, folded: ScaledBlock) -> dict[str, Tensor]:
    """Solve and write everything but the routed experts; the weights as stored, float32, by full name."""
    group_of = {reader: group for group in work.block.groups for reader in group.readers}
    linears = {f"{x.name}.weight": x for x in work.block.linears if x.role != "routed_expert"}
    stored, ready = dict[str, Tensor](), dict[str, QuantizedLinear]()
    for name, tensor in folded.tensors.items():
        decision = work.job.plan.decisions[linears[name].name] if name in linears else None
        if decision is None or decision.action == "keep":
            stored[name] = work.keep(name, tensor)
            continue
        if name not in ready:  # the first of those that read its input
            ready |= quantize_readers(
                work, folded, decision.linear.name, group_of.get(decision.linear.name)
            )
        done = ready.pop(name)
        work.write(done)
        stored[name] = done.weight
    return stored


def quantize_readers(
    work: BlockContext, folded: ScaledBlock, linear: str, group: LinearGroup | None
) -> dict[str, QuantizedLinear]:
    """A linear and the others of its group that are quantized and at hand, by the names of their weights."""
    decisions, name = work.job.plan.decisions, group.name if group else ""
    stats = folded.stats.get(name)
    here = (
        [reader for reader in group.readers if f"{reader}.weight" in folded.tensors]
        if group
        else [linear]
    )
    readers = [reader for reader in here if decisions[reader].action == "quantize"]
    asked = [
        QuantizeRequest(
            decision=decisions[reader],
            weight=folded.tensors[f"{reader}.weight"],
            stats=stats,
            tokens=0 if stats is None else int(stats.n_tokens),
            rescaled=name in folded.rescaled,
            fallbacks=work.fallbacks_of(reader),
        )
        for reader in readers
    ]
    return {
        f"{x.decision.linear.name}.weight": found
        for x, found in zip(asked, quantize_group(asked, work.job.formats))
    }


def run_stored_block(work: BlockContext, stored: Tensors) -> dict[StreamName, Routing | None]:
    """Move the streams that see stored weights through the dense part; what their routers decided."""
    moving: dict[StreamName, MetaModel] = (
        {"quantized": work.job.skeleton} if "quantized" in work.streams else {}
    )
    if work.calibration and work.job.plan.recipe.propagate != "original":
        moving["calibration"] = work.job.learning
    found: dict[StreamName, Routing | None] = {}
    for name, bones in moving.items():
        layer, tap = decoder_layer(bones, work.block, stored)
        found[name] = run_stream(
            bones, layer, tap, work.streams[name], work.targets[name], work.streams[name].seen
        )
    return found
