"""A block that takes long halts behind a wave of its experts, so that the wave need not be made again.

What goes on disk is what cannot be computed again quickly: the tensors of the wave, the hidden states that it moved,
and the sums over experts. The dense part is run again: the same bytes, in a small share of the block's time.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from quantkit.build.context import BlockContext
from quantkit.build.hidden_states import StreamName, spool_dtype
from quantkit.build.moe import ExpertPassState
from quantkit.build.progress_log import BuildProgress, WaveCheckpoint
from quantkit.build.spool import Spool
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.tensors import ShardWriter, get_dtype_name, read_tensor
from quantkit.contracts import TensorSpec
from quantkit.io.files import sync_folder

SECONDS = 60.0
"""Work that may be lost to an interruption; a wave that took less is not worth syncing gigabytes of states."""
SHARE = 20
"""How many times as long as the last halt took the work between two of them takes at least: 5 % at most."""


@dataclass
class CheckpointInterval:
    """When the build last made sure of its work, and how long that took, in seconds."""

    since: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    def due(self) -> bool:
        """Whether enough was done since."""
        return time.monotonic() - self.since >= max(SECONDS, SHARE * self.cost)


def load_wave_checkpoint(work: BlockContext, standing: BuildProgress) -> ExpertPassState:
    """What an interrupted build knew of the routed experts of this block; nothing when it had not come to them.

    The streams that the first pass moves go on where they were; those of the second are overwritten first (`go_on`).
    """
    halt = standing.halt
    if halt is None:
        return ExpertPassState()
    if not halt.solved:
        restore(work, halt)
    sums = (
        load(folder_of(work) / halt.sums, work.job.skeleton.device)
        if halt.sums
        else dict[str, Tensor]()
    )
    return ExpertPassState(
        surveyed=halt.surveyed,
        solved=halt.solved,
        errors=[sums["errors"]] if "errors" in sums else [],
        sample=sums.get("sample"),
        folded=sums.get("folded"),
    )


def restore_streams(work: BlockContext, found: ExpertPassState, standing: BuildProgress) -> None:
    """Take up the second pass where an interrupted build left it: its streams and what it noted of the experts."""
    if standing.halt is not None and found.solved:
        restore(work, standing.halt)
        work.record.modules.extend(standing.halt.modules)


def restore(work: BlockContext, halt: WaveCheckpoint) -> None:
    """Put the states that a halt kept in the place of those that were made again without experts."""
    for name, file in halt.states.items():
        made = work.targets[name]
        kept = Spool.open(made.path.with_name(file), made.rows, made.width, spool_dtype(made.dtype))
        made.delete()
        work.targets[name] = kept
        work.kept.add(name)


def checkpoint_if_due(
    work: BlockContext, found: ExpertPassState, standing: BuildProgress, pace: CheckpointInterval
) -> None:
    """Make sure of a wave, if it is time and more waves follow: the last one of a block is made sure of with it."""
    last = found.solved == work.experts.count or bool(found.held)
    if standing.journal is None or last or not pace.due():
        return
    began, folder = time.monotonic(), folder_of(work)
    moved: list[StreamName] = list(work.targets) if found.solved else surveyed(work)
    for name in moved:
        work.targets[name].flush()
    sums = save_wave(folder, f"sums.{work.block.name}.{found.surveyed}.{found.solved}", found)
    sync_folder(folder)
    modules = [
        record
        for record in work.record.modules
        if record.module.startswith(f"{work.experts.module}.")
    ]
    halt = WaveCheckpoint(
        loop=standing.loop,
        steps=standing.done,
        surveyed=found.surveyed,
        solved=found.solved,
        states={name: work.targets[name].path.name for name in moved},
        sums=sums,
        modules=tuple(modules),
        stored=tuple(sink.commit() for sink in work.job.sinks),
    )
    standing.pause(halt, folder)
    work.kept.update(moved)
    pace.since, pace.cost = time.monotonic(), time.monotonic() - began


def folder_of(work: BlockContext) -> Path:
    """Where the hidden states lie."""
    return next(iter(work.streams.values())).folder


def surveyed(work: BlockContext) -> list[StreamName]:
    """The streams that the first pass over the experts moves."""
    original = work.job.plan.recipe.propagate == "original"
    moving = {"reference", "original", *(["calibration"] if original else [])}
    return [name for name in work.targets if name in moving]


def save_wave(folder: Path, name: str, found: ExpertPassState) -> str | None:
    """Write what was summed up over the experts; the file's name, None when nothing was."""
    sums: dict[str, Tensor] = (
        {"errors": torch.cat(found.errors, dim=1)} if found.errors else {}
    )  # [n, experts]
    for key, tensor in (("sample", found.sample), ("folded", found.folded)):
        if tensor is not None:
            sums[key] = tensor  # [tokens, hidden]
    if not sums:
        return None
    specs = [
        TensorSpec(name=key, dtype=get_dtype_name(x.dtype), shape=tuple(x.shape))
        for key, x in sums.items()
    ]
    with ShardWriter(folder / name, specs) as writer:
        for key, tensor in sums.items():
            writer.write(key, tensor)
        writer.finish()
    return name


def load(path: Path, device: torch.device) -> dict[str, Tensor]:
    """What `save` wrote."""
    header = read_header(path)
    return {name: read_tensor(path, header, name).to(device) for name in header.specs}
