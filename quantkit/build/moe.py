"""The passes over the routed experts of a block, a wave of slices at a time.

The quantize pass reads each slice, gathers its statistics, quantizes it and moves the streams on.
Where one scale is searched for the input of all experts (AWQ), a search pass comes first, because
the error of a candidate is summed over all of them: it gathers statistics and errors, and keeps the
slices if all fit into memory; otherwise the quantize pass reads them once more. Either pass
continues after the experts that an interrupted build has finished.

The pure functions of `expert_ops` and `quantize_experts` run on the executor. The passes below
read, reduce their results in ascending order of experts, write, and save checkpoints.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor

from quantkit.build import dense, yardstick
from quantkit.build.block_plan import ExpertRange
from quantkit.build.context import BlockContext, ExpertPassState
from quantkit.build.dense import BlockCalibration, ScaledBlock, ScalingCheckSample
from quantkit.build.expert_ops import (
    ExpertBiases,
    ExpertSlice,
    RoutedStream,
    SliceStats,
    candidate_errors,
    collect_stats,
    expert_outputs,
    sum_outputs,
)
from quantkit.build.hidden_states import (
    Routing,
    StreamName,
    create_target,
    run_stream_with_sums,
)
from quantkit.build.quantize_experts import ExpertResult, ExpertSettings, quantize_experts
from quantkit.build.wave_checkpoint import checkpoint_if_due, searched_streams
from quantkit.models import scaling
from quantkit.models.layers import RouterOutput, make_decoder_layer

Tensors = Mapping[str, Tensor]
Routings = Mapping[StreamName, Routing | None]
Report = Callable[[float], None]

CALIBRATION_STREAMS: frozenset[StreamName] = frozenset({"calibration", "original"})
"""Streams that run in the dtype of calibration."""


def search_scales_pass(
    context: BlockContext,
    tensors: Tensors,
    calibration: BlockCalibration | None,
    reference: Routing | None,
    state: ExpertPassState,
) -> None:
    """Sum the errors of candidate scales over all experts, in `state`; nothing where no scale is
    searched.
    """
    plan = context.plan.experts
    if plan is None or not plan.needs_search:
        return
    group = context.plan.expert_group
    assert group is not None and group.rescale and calibration  # a search needs all three
    scales = dense.candidate_scales(group, calibration, tensors)
    errors = partial(candidate_errors, scales=scales, rescale=group.rescale, scheme=plan.scheme)
    keep = plan.is_one_wave and not state.searched
    for wave in plan.waves(state.searched):
        slices = read_wave(context, wave)
        run_original_experts(context, slices, calibration, reference, state)
        stats = collect_wave_stats(context, slices, calibration)
        state.errors.extend(context.build.executor.map(errors, slices, stats))
        if keep:
            state.held.extend(zip(slices, stats, strict=True))
        state.searched = wave[-1].stop
        checkpoint_if_due(context, state)
        context.report_share(0.5 * state.searched / plan.experts.count)
        del slices, stats  # before the next wave is read


def quantize_pass(
    context: BlockContext,
    scaled: ScaledBlock,
    calibration: BlockCalibration | None,
    reference: Routing | None,
    state: ExpertPassState,
    routings: Routings,
) -> None:
    """Scale, quantize and write every expert, and move the streams through it; check that scaling
    changed nothing.
    """
    plan = context.plan.experts
    if plan is None:
        return
    settings, rounded = expert_settings(context, scaled, calibration), list[ExpertSlice]()
    seen = {name: routing for name, routing in routings.items() if name != yardstick.STREAM}
    start = 0.5 if plan.needs_search else 0.0
    for wave in plan.waves(state.quantized):
        tasks = iterate_tasks(context, wave, calibration, reference, state)
        if yardstick.is_measured(context):
            tasks = yardstick.round_experts(context, tasks, rounded)
        stored = [write_result(context, x, state) for x in quantize_tasks(context, tasks, settings)]
        add_expert_outputs(context, stored, seen)
        if rounded:
            add_expert_outputs(context, rounded, {yardstick.STREAM: routings[yardstick.STREAM]})
        del stored  # before the next wave is read
        rounded.clear()
        state.quantized = wave[-1].stop
        checkpoint_if_due(context, state)
        context.report_share(start + (1 - start) * state.quantized / plan.experts.count)
    copy_stacked(context)
    if state.scaled_sample is not None and state.sample is not None:
        change = scaling.check_unchanged(
            context.name,
            "the routed experts' output",
            state.sample,
            state.scaled_sample,
            context.tolerance,
        )
        record = context.state.record
        record.fold_change = max(record.fold_change, change)


def store_experts(context: BlockContext) -> None:
    """Quantize and write the experts of a block that no stream runs through, without statistics."""
    plan = context.plan.experts
    if plan is None:
        return
    settings = ExpertSettings(
        plan=plan, linears=context.plan.linears, formats=context.build.formats
    )
    for wave in plan.waves():
        tasks = ((part, None) for part in read_wave(context, wave))
        for result in quantize_tasks(context, tasks, settings):
            write_result(context, result)
        context.report_share(wave[-1].stop / plan.experts.count)
    copy_stacked(context)


def copy_stacked(context: BlockContext) -> None:
    """Write the stored tensors of kept experts that hold all of them."""
    if context.experts.are_together:
        for stacked in context.plan.block.stacked:
            context.build.copy_stacked(stacked.name)


# ------------------------------------------------------------------------------ the steps of a pass


def read_wave(context: BlockContext, wave: Sequence[ExpertRange]) -> list[ExpertSlice]:
    """Read slices of experts in float32."""
    names, device = context.experts.experts, context.build.device
    tensors = context.build.reads.take(context.experts.read_request(wave))

    def stack(part: ExpertRange, projection: str, kind: str = "weight") -> Tensor:
        parts = [
            tensors.pop(f"{names.linear(e, projection)}.{kind}").to(device).float()
            for e in range(part.first, part.stop)
        ]
        return torch.stack(parts)  # [n, out, in], of biases [n, out]

    def stack_biases(part: ExpertRange) -> ExpertBiases:
        return ExpertBiases(
            gate=None if names.gate is None else stack(part, names.gate, "bias"),
            up=stack(part, names.up, "bias"),
            down=stack(part, names.down, "bias"),
        )

    return [
        ExpertSlice(
            first=part.first,
            gate=None if names.gate is None else stack(part, names.gate),
            up=stack(part, names.up),
            down=stack(part, names.down),
            biases=stack_biases(part) if names.bias else None,
        )
        for part in wave
    ]


def iterate_tasks(
    context: BlockContext,
    wave: Sequence[ExpertRange],
    calibration: BlockCalibration | None,
    reference: Routing | None,
    state: ExpertPassState,
) -> Iterator[tuple[ExpertSlice, SliceStats | None]]:
    """Yield the slices of a wave with their statistics, and let go of each: those held, or read and
    run first.
    """
    if state.held:
        tasks, state.held = state.held, []
    else:
        slices = read_wave(context, wave)
        if not context.experts.needs_search:
            run_original_experts(context, slices, calibration, reference, state)
        tasks = list(zip(slices, collect_wave_stats(context, slices, calibration), strict=True))
        del slices
    while tasks:
        yield tasks.pop(0)


def run_original_experts(
    context: BlockContext,
    slices: Sequence[ExpertSlice],
    calibration: BlockCalibration | None,
    reference: Routing | None,
    state: ExpertPassState,
) -> None:
    """Move the streams that see original weights through slices, and the sample that shows what
    scaling changes.
    """
    routings: dict[StreamName, Routing | None] = {"reference": reference} if reference else {}
    if calibration and calibration.original:
        routings["original"] = calibration.original
    if calibration and context.build.plan.propagation == "original":
        routings["calibration"] = calibration.routing
    add_expert_outputs(context, slices, routings)
    tokens = sample_tokens(calibration.sample) if calibration and calibration.sample else None
    if tokens is not None:
        for experts in slices:
            output = sum_outputs(experts, tokens, context.activation)
            state.sample = output if state.sample is None else state.sample + output


def sample_tokens(sample: ScalingCheckSample, hidden: Tensor | None = None) -> RouterOutput | None:
    """Return the sample at the experts as the original router sent it, in float32, with `hidden` in
    its place if given.
    """
    if sample.routed is None:
        return None
    routed = sample.routed
    x = (routed.hidden if hidden is None else hidden).float()
    return RouterOutput(hidden=x, index=routed.index, weight=routed.weight)


def collect_wave_stats(
    context: BlockContext, slices: Sequence[ExpertSlice], calibration: BlockCalibration | None
) -> list[SliceStats | None]:
    """Gather the statistics of slices over the calibration stream; None each where there are none
    to gather.
    """
    plan, executor = context.experts, context.build.executor
    if calibration is None or plan.scheme is None or calibration.routing is None:
        return [None] * len(slices)
    original = calibration.original.expert_inputs if calibration.original else None
    collect = partial(
        collect_stats,
        tokens=RoutedStream(
            routing=calibration.routing, device=context.build.device, original=original
        ),
        activation=context.activation,
        all_tokens=experts_using_all_tokens(context, calibration),
        has_original=original is not None,
    )
    size = -(-len(slices) // executor.workers)
    parts = [slices[i : i + size] for i in range(0, len(slices), size)]
    return [stats for part in executor.map(collect, parts) for stats in part]


def quantize_tasks(
    context: BlockContext,
    tasks: Iterator[tuple[ExpertSlice, SliceStats | None]],
    settings: ExpertSettings,
) -> Iterator[ExpertResult]:
    """Quantize slices on the executor, in ascending order of experts."""
    return context.build.executor.map(partial(quantize_task, settings=settings), tasks)


def quantize_task(
    task: tuple[ExpertSlice, SliceStats | None], settings: ExpertSettings
) -> ExpertResult:
    """Quantize one slice."""
    return quantize_experts(*task, settings)


def write_result(
    context: BlockContext, result: ExpertResult, state: ExpertPassState | None = None
) -> ExpertSlice:
    """Write a quantized slice, add its share to the sample's output, and return its weights as
    stored.
    """
    for name, tensor in result.kept.items() if not context.experts.are_together else ():
        context.write_kept(name, tensor)
    context.write(result.tensors, result.records)
    if state is not None and result.sample_output is not None:
        total, share = state.scaled_sample, result.sample_output
        state.scaled_sample = share if total is None else total + share
    return result.weights


def add_expert_outputs(
    context: BlockContext, slices: Sequence[ExpertSlice], routings: Routings
) -> None:
    """Add the outputs of slices to streams after the block."""
    for name, routing in routings.items():
        assert routing is not None  # only blocks with experts have slices
        add_to_stream(context, slices, name, routing)


def add_to_stream(
    context: BlockContext, slices: Sequence[ExpertSlice], name: StreamName, routing: Routing
) -> None:
    """Add the outputs of slices to a stream; states that a checkpoint names stay as they are."""
    build, state = context.build, context.state
    before = target = state.targets[name]
    if name in state.saved:
        mark, width = f".{slices[0].first}", context.plan.target_width
        target = create_target(context.streams[name], context.name, mark, width)
    for chunk in RoutedStream(routing=routing, device=build.device):
        states = before.read(chunk.first, chunk.stop).to(chunk.hidden)  # [tokens, width]
        hidden = states[:, : chunk.hidden.shape[1]]  # without the ids
        outputs = partial(expert_outputs, tokens=chunk, activation=context.activation)
        for part in build.executor.map(outputs, slices):
            for output in part:  # in ascending order of experts
                hidden.index_add_(0, output.rows, output.values)
        target.write(chunk.first, states)
    if target is not before:
        state.targets[name] = target
        state.saved.discard(name)
        before.close()


def return_sums_inside(
    context: BlockContext, original: Tensors, stored: Tensors, rounded: Tensors
) -> None:
    """Run each stream through a layer that takes the sum of its experts inside, now that the sums
    are complete; nothing for other layers.

    original, stored, rounded (of the yardstick): dense tensors of the block, float32, by full name.
    """
    block, state, build = context.plan.block, context.state, context.build
    if block.experts is None or not block.experts.inside:
        return
    for name, sums in list(state.targets.items()):
        weights = original if name in searched_streams(context) else stored
        weights = rounded if name == yardstick.STREAM else weights
        model = build.calibration_model if name in CALIBRATION_STREAMS else build.model
        layer = make_decoder_layer(model, block, weights)
        target, stream = sums, context.streams[name]
        if name in state.saved or sums.width != stream.hidden.width:
            target = create_target(stream, context.name, ".inside")
        run_stream_with_sums(model, layer, stream, sums, target)
        if target is sums:
            continue
        state.targets[name] = target
        if name in state.saved:  # a checkpoint names the sums: they are removed with it
            sums.close()
        else:
            sums.delete()
        state.saved.discard(name)


# -------------------------------------------------------------------------- experts with few tokens


def experts_using_all_tokens(
    context: BlockContext, calibration: BlockCalibration
) -> frozenset[int]:
    """Return the experts whose grams are taken over all tokens: by recipe, or because the router
    sent too few.
    """
    keys = context.build.plan.recipe.calibration
    if keys and keys.experts == "all":
        return frozenset(range(len(calibration.expert_tokens)))
    is_shared = keys is not None and keys.under_calibrated == "shared_gram"
    return under_calibrated(context, calibration) if is_shared else frozenset()


def under_calibrated(context: BlockContext, calibration: BlockCalibration) -> frozenset[int]:
    """Return the experts with fewer tokens than the recipe requires; none when every expert uses
    every token.
    """
    keys = context.build.plan.recipe.calibration
    if keys is None or keys.experts == "all":
        return frozenset()
    return frozenset(
        e for e, count in enumerate(calibration.expert_tokens) if count < keys.min_expert_tokens
    )


def expert_settings(
    context: BlockContext, scaled: ScaledBlock, calibration: BlockCalibration | None
) -> ExpertSettings:
    """Return what holds for all experts of the block, now that its scales are chosen."""
    keys = context.build.plan.recipe.calibration
    sample = calibration.sample if calibration else None
    return ExpertSettings(
        plan=context.experts,
        linears=context.plan.linears,
        formats=context.build.formats,
        input_scale=scaled.expert_scale,
        under_calibrated=under_calibrated(context, calibration) if calibration else frozenset(),
        policy=keys.under_calibrated if keys else None,
        sample=sample_tokens(sample, scaled.expert_inputs) if sample else None,
        activation=context.activation,
    )
