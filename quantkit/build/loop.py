"""The build loop: block by block, expert by expert in waves; what is measured is what ships.

For each block the original weights tell the grams, scales are chosen and folded, every linear is solved and written,
and the streams of hidden states move on through the weights as they were stored. This file is a table of contents;
the steps are in `dense` and `routed`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers.activations import ACT2FN

from quantkit.artifact.records import BlockRecord
from quantkit.artifact.writer import ArtifactWriter
from quantkit.build import dense, moe, wave_checkpoint
from quantkit.build.context import BlockContext, BuildContext
from quantkit.build.dense import ScaledBlock
from quantkit.build.hidden_states import (
    Routing,
    Stream,
    StreamName,
    create_target,
    iterate_chunks,
    move_stream,
    open_stream,
    reopen_stream,
    spool_dtype,
)
from quantkit.build.progress_log import BuildProgress, WaveCheckpoint
from quantkit.build.spool import Spool
from quantkit.build.wave_checkpoint import CheckpointInterval
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.prefetch import ReadAhead
from quantkit.contracts import Block
from quantkit.errors import NumericsError
from quantkit.models.layers import decoder_layer, meta_model
from quantkit.numerics.fidelity import router_agreement
from quantkit.plan.plan import Plan
from quantkit.progress import Progress
from quantkit.texts.corpora import Tokens

Request = tuple[str, ...]
Streams = dict[StreamName, Stream]
StreamTexts = Mapping[Literal["calibration", "fidelity", "solutions"], Tokens]


ONE_THREAD = 1 << 14
"""Values that torch sums on one thread: larger sums are cut as there are threads, and end in another last digit."""


@dataclass(kw_only=True)
class BuiltBlocks:
    """What a build leaves behind: the streams behind the last block, and a record per block."""

    streams: Streams
    blocks: list[BlockRecord] = field(default_factory=list)


def build_blocks(
    plans: Sequence[Plan],
    source: Checkpoint,
    texts: StreamTexts,
    sinks: Sequence[ArtifactWriter],
    folder: Path,
    device: torch.device,
    dtype: torch.dtype,
    learning: torch.dtype,
    standing: BuildProgress | None = None,
) -> Generator[Progress, None, BuiltBlocks]:
    """Quantize a model into the sink of each plan, with hidden states in `folder`; returns the streams for the figures.

    `learning` is the dtype of the calibration stream, `dtype` that of the streams behind the figures; `standing` tells
    what an earlier build has done, and hears of each step.
    The plans differ in their format alone. Raises CheckpointError for weights that cannot be used and NumericsError
    when a fold changes a block's output.
    """
    standing = standing or BuildProgress()
    plan, bones = plans[0], meta_model(plans[0].source.config, device, dtype)
    total = len(plan.layout.blocks)
    with closing(in_order(source, requests(plan, standing.done, standing.halt))) as reads:
        job = BuildContext(
            plan=plan,
            skeleton=bones,
            learning=replace(bones, dtype=learning),
            activation=ACT2FN[
                getattr(bones.config, "hidden_act", "silu")
            ],  # of experts; who has some has the key
            formats=tuple(each.format for each in plans),
            sinks=tuple(sinks),
            decisions=tuple(each.decisions for each in plans),
            source=source,
            reads=reads,
        )
        built = BuiltBlocks(
            streams=open_streams(job, texts, folder, standing), blocks=standing.blocks
        )
        for number, block in enumerate(plan.layout.blocks[len(built.blocks) :], len(built.blocks)):
            began, record, before = (
                time.monotonic(),
                BlockRecord(name=block.name),
                dict(built.streams),
            )
            for share in quantize_block(job, block, built.streams, record, standing):
                yield Progress(stage="blocks", done=number + share, total=total, note=block.name)
            record.seconds = time.monotonic() - began
            built.blocks.append(record)
            standing.commit(sinks, before, built.streams, folder, record)
            yield Progress(stage="blocks", done=number + 1, total=total, note=block.name)
        if standing.done < total + 2:  # steps: the embedding, the blocks, and what follows them
            for name, tensor in next(reads).items():
                job.keep(name, tensor)
            standing.commit(sinks, built.streams, built.streams, folder)
    return built


def quantize_block(
    job: BuildContext, block: Block, streams: Streams, record: BlockRecord, standing: BuildProgress
) -> Iterator[float]:
    """One block, from its source tensors to the streams behind it; yields the share done.

    `standing` may tell of waves of its experts that an interrupted build finished, and hears of further ones.
    """
    if dropped(job.plan, block):
        return
    if moe.is_never_run(job.plan, block):
        yield from store_unseen(
            BlockContext(job=job, block=block, streams={}, targets={}, record=record)
        )
        return
    tensors, pace, halt = read_dense(job), CheckpointInterval(), standing.halt
    mark = f".again-{halt.surveyed}-{halt.solved}" if halt else ""
    targets = {name: create_target(stream, block.name, mark) for name, stream in streams.items()}
    work = BlockContext(job=job, block=block, streams=streams, targets=targets, record=record)
    layer, tap = decoder_layer(job.skeleton, block, tensors)
    reference = dense.reference_pass(work, layer, tap)
    learned = (
        dense.calibrate_dense(work, tensors, dense.run_sample(work, layer, tap))
        if work.calibration
        else None
    )
    del layer, tap
    found = wave_checkpoint.load_wave_checkpoint(work, standing)
    for share in moe.search_scales_pass(work, tensors, learned, reference, found):
        wave_checkpoint.checkpoint_if_due(work, found, standing, pace)
        yield 0.5 * share
    folded = ScaledBlock(tensors=tensors, stats={}, rescaled=frozenset())
    if learned:
        folded = dense.fold_groups(work, tensors, learned, found.errors)
        record.expert_tokens = learned.expert_tokens
    routings = dense.run_stored_block(work, dense.quantize_dense(work, folded))
    wave_checkpoint.restore_streams(work, found, standing)
    for share in moe.quantize_pass(work, folded, learned, found, routings):
        wave_checkpoint.checkpoint_if_due(work, found, standing, pace)
        yield 0.5 + 0.5 * share
    if "reference" in streams:
        measure(work, reference, routings["quantized"])
    for name, target in targets.items():
        check_finite(block, name, target)
    streams.update({name: move_stream(streams[name], target) for name, target in targets.items()})


def read_dense(job: BuildContext) -> dict[str, Tensor]:
    """The next request's tensors in float32 on the device."""
    return {
        name: tensor.to(job.skeleton.device).float() for name, tensor in next(job.reads).items()
    }


def store_unseen(work: BlockContext) -> Iterator[float]:
    """A block no forward pass reaches: stored as decided; in an MTP block methods that learn give way to rounding.

    Tensor by tensor: an MTP block carries an embedding and a head as large as the model's own.
    """
    for _ in dense_requests(work.job.plan, work.block):
        dense.quantize_dense(
            work, ScaledBlock(tensors=read_dense(work.job), stats={}, rescaled=frozenset())
        )
    cut, nothing = (
        moe.waves(work.job.plan, work.block),
        ScaledBlock(tensors={}, stats={}, rescaled=frozenset()),
    )
    for number, (first, stop) in enumerate(cut):
        moe.store(
            work, moe.read_wave(work, first, stop), None, nothing, (False,) * (stop - first), None
        )
        yield (number + 1) / len(cut)


def measure(work: BlockContext, reference: Routing | None, quantized: Routing | None) -> None:
    """Note how far the block's stored weights lead away from the original ones on the fidelity text."""
    rows = work.streams["reference"].text_rows
    work.record.output_error = relative_error(
        work.targets["reference"], work.targets["quantized"], rows
    )
    if reference and quantized:
        agreement = router_agreement(reference.index[:rows], quantized.index[:rows])
        work.record.router_agreement = float(agreement.mean())


def check_finite(block: Block, stream: StreamName, states: Spool) -> None:
    """NumericsError for NaN or infinity among the hidden states behind a block: every later figure would be none."""
    if not states.finite:
        raise NumericsError(
            f"{block.name}: expected finite hidden states behind it, found NaN or infinity in the {stream} stream; "
            "look for huge values among its weights and those before it, and at rms_norm_eps, rope_theta and "
            "rope_scaling in config.json"
        )


def relative_error(reference: Spool, quantized: Spool, rows: int) -> float:
    """||q - r|| / ||r|| of the first `rows` hidden states [tokens, hidden], summed in float64."""
    lost, energy = 0.0, 0.0
    for first, stop in iterate_chunks(rows):
        r, q = reference.read(first, stop).double(), quantized.read(first, stop).double()
        for apart, part in zip(
            (q - r).flatten().split(ONE_THREAD), r.flatten().split(ONE_THREAD), strict=True
        ):
            lost += float(apart.square().sum())
            energy += float(part.square().sum())
    return float((lost / energy) ** 0.5) if energy else 0.0


# ------------------------------------------------------------------------------------------- reading and beginning


def dropped(plan: Plan, block: Block) -> bool:
    """Whether the recipe drops the block."""
    return plan.decisions[block.linears[0].name].action == "drop"


def dense_requests(plan: Plan, block: Block) -> list[Request]:
    """Names of a block's tensors but for the routed experts': at once, or one by one where nothing runs them."""
    linears = [linear for linear in block.linears if linear.role != "routed_expert"]
    weights = [f"{linear.name}.weight" for linear in linears]
    biases = [f"{linear.name}.bias" for linear in linears if linear.bias]
    names = (*(spec.name for spec in block.others), *weights, *biases)
    return [(name,) for name in names] if moe.is_never_run(plan, block) else [names]


def wave_request(block: Block, first: int, stop: int) -> Request:
    """Names of the weights of experts first..stop."""
    experts = block.experts
    assert experts is not None  # only blocks with experts have waves
    projections = (experts.gate, experts.up, experts.down)
    return tuple(f"{experts.linear(e, p)}.weight" for e in range(first, stop) for p in projections)


def requests(plan: Plan, done: int = 0, halt: WaveCheckpoint | None = None) -> list[Request]:
    """Everything a build reads behind the first `done` steps, in order: the next is read while this one computes.

    With a halt the next step is a block that is done with some of its experts.
    """
    steps: list[list[Request]] = [[(f"{plan.layout.embedding.name}.weight",)]]
    for block in plan.layout.blocks:
        found = list[Request]()
        if not dropped(plan, block):
            behind = [0] * moe.passes(plan, block)  # experts that each pass begins behind
            if halt is not None and len(steps) == done:
                behind = [halt.surveyed, halt.solved]
            found += dense_requests(plan, block)
            found += [
                wave_request(block, *wave)
                for start in behind
                for wave in moe.waves(plan, block, start)
            ]
        steps.append(found)
    head = (f"{plan.layout.head.name}.weight",) if plan.layout.head else ()
    steps.append([(*(spec.name for spec in plan.layout.final_tensors), *head)])
    return [request for step in steps[done:] for request in step]


def in_order(
    source: Checkpoint, wanted: Sequence[Request]
) -> Generator[dict[str, Tensor], None, None]:
    """Read request after request, one ahead of the taker."""
    with ReadAhead(source.read) as ahead:
        for request, following in zip(wanted, [*wanted[1:], None]):
            yield ahead.take(request, following)


def open_streams(
    job: BuildContext, texts: StreamTexts, folder: Path, standing: BuildProgress
) -> Streams:
    """Store the embedding and start the streams with it, none for a text there is not; or take them up again."""
    routed_experts = any(block.experts for block in job.plan.layout.blocks)
    dtypes: dict[StreamName, torch.dtype] = {
        "calibration": job.learning.dtype,
        "original": job.learning.dtype,
    }
    texts_of: dict[StreamName, Tokens] = (
        {"calibration": texts["calibration"]} if job.plan.needs_calibration else {}
    )
    if job.plan.needs_calibration and job.plan.recipe.propagate == "both":
        texts_of["original"] = texts["calibration"]
    if job.plan.recipe.fidelity:
        texts_of |= {"reference": texts["fidelity"], "quantized": texts["fidelity"]}
    if routed_experts:  # wave after wave is added to the states: rounded in between, they would tell the waves' size
        dtypes = dict.fromkeys(texts_of, torch.float32)
    behind: dict[StreamName, Tokens] = dict.fromkeys(("reference", "quantized"), texts["solutions"])
    stored = {name: spool_dtype(dtypes.get(name, job.skeleton.dtype)) for name in texts_of}
    if standing.done:
        width, at = (
            job.plan.layout.embedding.in_features,
            {n: folder / file for n, file in standing.states.items()},
        )
        return {
            n: reopen_stream(n, t, behind.get(n), at[n], width, routed_experts, stored[n]) for n, t in texts_of.items()
        }  # fmt: skip
    ((name, weight),) = next(job.reads).items()
    job.keep(name, weight)
    streams = {
        n: open_stream(n, t, behind.get(n), weight, folder, routed_experts, stored[n])
        for n, t in texts_of.items()
    }
    standing.commit(job.sinks, {}, streams, folder)
    return streams
