"""The build loop: block by block, a table of contents.

For each block: run the original weights to gather statistics, choose and fold scales, quantize and
write, and move the streams of hidden states through the weights as stored. The steps are in `dense`
and `moe`, the plan of each block in `block_plan`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path

import torch

from quantkit.artifact.records import BlockRecord
from quantkit.artifact.writer import ArtifactWriter
from quantkit.build import dense, moe, yardstick
from quantkit.build.block_figures import check_finite, format_block, format_module, measure_block
from quantkit.build.block_plan import (
    BlockPlan,
    ReadRequest,
    embedding_read,
    final_read,
    part_reads,
    plan_blocks,
)
from quantkit.build.context import BlockContext, BlockState, BuildContext, Reads
from quantkit.build.dense import ScaledBlock
from quantkit.build.executors.protocol import Executor
from quantkit.build.executors.serial import SerialExecutor
from quantkit.build.hidden_states import create_target, move_stream
from quantkit.build.open_streams import Streams, StreamTexts, open_streams
from quantkit.build.progress_log import BuildProgress
from quantkit.build.wave_checkpoint import load_wave_checkpoint, restore_streams
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.prefetch import ScheduledReads
from quantkit.models.experts import make_gating
from quantkit.models.layers import (
    cast_meta_model,
    load_tables,
    make_decoder_layer,
    make_meta_model,
)
from quantkit.plan.plan import Plan
from quantkit.progress import Progress, ProgressCallback

LOG = logging.getLogger(__name__)


@dataclass(kw_only=True)
class BuiltBlocks:
    """The result of a build loop, which grows block by block: the streams after the last block, a
    record per block.
    """

    streams: Streams
    blocks: list[BlockRecord] = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class BuildPrecision:
    """Where the build computes: `dtype` of the streams for figures, `calibration` of the
    calibration stream.
    """

    device: torch.device
    dtype: torch.dtype
    calibration: torch.dtype


def build_blocks(
    plans: Sequence[Plan],
    source: Checkpoint,
    texts: StreamTexts,
    writers: Sequence[ArtifactWriter],
    folder: Path,
    precision: BuildPrecision,
    on_progress: ProgressCallback,
    progress: BuildProgress | None = None,
    executor: Executor | None = None,
) -> BuiltBlocks:
    """Quantize a model into the writer of each plan, with hidden states in `folder`; return the
    streams for the figures.

    The plans differ in their format alone. `progress` holds the finished steps of an interrupted
    build, and records each further step. Raises CheckpointError for weights that cannot be used and
    NumericsError when scaling changes a block's output.
    """
    progress, block_plans = progress or BuildProgress(), plan_blocks(plans)
    total = len(block_plans)
    with ScheduledReads(
        lambda request: source.read(request.tensors, request.finite),
        schedule_reads(plans[0], block_plans, progress),
    ) as reads:
        build = make_context(plans, source, writers, reads, precision, progress, executor)
        built = BuiltBlocks(
            streams=open_streams(build, texts, folder), blocks=list(progress.blocks)
        )
        began = len(built.blocks)
        for number, plan in islice(enumerate(block_plans), began, None):
            report = partial(
                report_block, on_progress, built.blocks, plan.block.name, number, total, began
            )
            before, record = dict(built.streams), BlockRecord(name=plan.block.name)
            started = time.monotonic()
            built.streams = build_block(build, plan, before, record, report)
            record.seconds = time.monotonic() - started
            built.blocks.append(record)
            progress.commit_step(writers, before, built.streams, folder, record)
            log_block(record)
            report(1.0)
        if progress.done < total + 2:  # steps: the embedding, the blocks, and all other tensors
            for request in (final_read(plans[0]), *part_reads(plans[0])):
                for name, tensor in reads.take(request).items():
                    build.write_kept(name, tensor)
            progress.commit_step(writers, built.streams, built.streams, folder)
    return built


def build_block(
    build: BuildContext, plan: BlockPlan, streams: Streams, record: BlockRecord, report: moe.Report
) -> Streams:
    """Build one block, from its source tensors to the streams after it."""
    if plan.mode == "drop":
        return streams
    context = open_block(build, plan, streams, record, report)
    if plan.mode == "store":
        store_block(context)
        return streams
    quantize_block(context)
    for name, target in context.state.targets.items():
        check_finite(plan.block.name, name, target)
    return {name: move_stream(streams[name], x) for name, x in context.state.targets.items()}


def quantize_block(context: BlockContext) -> None:
    """Gather statistics, scale, quantize, and move the streams; continue after the last checkpoint
    of the block.
    """
    plan, record = context.plan, context.state.record
    (request,) = plan.dense_reads
    tensors = context.build.read(request)
    layer = make_decoder_layer(context.build.model, plan.block, tensors)
    calibration = None
    if context.calibration:
        sample = dense.run_sample(context, layer)
        calibration = dense.calibrate_dense(context, tensors, sample)
        record.expert_tokens = calibration.expert_tokens
    reference = dense.run_reference(context, layer, calibration)
    del layer
    state = load_wave_checkpoint(context)
    moe.search_scales_pass(context, tensors, calibration, reference, state)
    scaled = ScaledBlock(tensors=tensors, stats={}, rescaled=frozenset())
    if calibration:
        scaled = dense.scale_groups(context, tensors, calibration, state.errors)
    stored = dense.quantize_dense(context, scaled)
    routings = dense.run_stored_block(context, stored)
    rounded = yardstick.round_dense(context, tensors) if yardstick.is_measured(context) else {}
    if rounded:
        routings[yardstick.STREAM] = yardstick.run_dense(context, rounded)
    restore_streams(context)
    moe.quantize_pass(context, scaled, calibration, reference, state, routings)
    moe.return_sums_inside(context, tensors, stored, rounded)
    if "reference" in context.streams:
        measure_block(context, reference, routings["quantized"])


def store_block(context: BlockContext) -> None:
    """Quantize and write a block that no stream runs through; methods that need statistics give way
    to rounding.
    """
    for request in context.plan.dense_reads:
        tensors = context.build.read(request)
        dense.quantize_dense(context, ScaledBlock(tensors=tensors, stats={}, rescaled=frozenset()))
    moe.store_experts(context)


def open_block(
    build: BuildContext, plan: BlockPlan, streams: Streams, record: BlockRecord, report: moe.Report
) -> BlockContext:
    """Return the context of a block, with a new file for the states of each stream after it."""
    wave, targets = build.progress.wave, {}
    if plan.mode == "run":
        mark = f".again-{wave.searched}-{wave.quantized}" if wave else ""
        targets = {
            name: create_target(x, plan.block.name, mark, plan.target_width)
            for name, x in streams.items()
        }
    return BlockContext(
        build=build,
        plan=plan,
        streams=streams,
        state=BlockState(record=record, targets=targets),
        report_share=report,
        gating=make_gating(build.model, plan.block),
    )


def make_context(
    plans: Sequence[Plan],
    source: Checkpoint,
    writers: Sequence[ArtifactWriter],
    reads: Reads,
    precision: BuildPrecision,
    progress: BuildProgress,
    executor: Executor | None,
) -> BuildContext:
    """Return what stays the same for every block."""
    model = make_meta_model(plans[0].source.config, precision.device, precision.dtype)
    layout = plans[0].layout
    tables = source.read(layout.tables)
    model = load_tables(model, {layout.get_path(name): x for name, x in tables.items()})
    return BuildContext(
        plan=plans[0],
        model=model,
        calibration_model=cast_meta_model(model, precision.calibration),
        formats=tuple(plan.format for plan in plans),
        writers=tuple(writers),
        reads=reads,
        source=source,
        executor=executor or SerialExecutor(),
        progress=progress,
    )


def schedule_reads(
    plan: Plan, blocks: Sequence[BlockPlan], progress: BuildProgress
) -> list[ReadRequest]:
    """Return the expected order of reads after the finished steps; it affects prefetching only."""
    wave = progress.wave
    steps = [[embedding_read(plan)]]
    for block in blocks:
        is_resumed = wave is not None and len(steps) == progress.done
        done = (wave.searched, wave.quantized) if wave is not None and is_resumed else (0, 0)
        steps.append(list(block.iterate_reads(*done)))
    steps.append([final_read(plan), *part_reads(plan)])
    return [request for step in steps[progress.done :] for request in step]


def log_block(record: BlockRecord) -> None:
    """Log a finished block at level INFO and its modules at DEBUG."""
    LOG.info(format_block(record))
    for module in record.modules:
        LOG.debug(format_module(module))


def report_block(
    on_progress: ProgressCallback,
    blocks: Sequence[BlockRecord],
    name: str,
    number: int,
    total: int,
    began: int,
    share: float,
) -> None:
    """Report the share of a block that is done, and the error of the hidden states so far: after
    the last finished block.

    began: blocks that an earlier run has finished.
    """
    error = next((x.output_error for x in reversed(blocks) if x.output_error is not None), None)
    note = name if error is None else f"{name}, error {100 * error:.2f} %"
    on_progress(Progress(stage="blocks", done=number + share, total=total, note=note, began=began))
