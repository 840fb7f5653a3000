"""Checkpoints within a block: after a wave of its experts, so that a long block need not be
repeated.

A checkpoint holds what cannot be computed again quickly: the wave's tensors, the hidden states that
it moved, and the sums over experts. The dense part runs again after an interruption: it gives the
same bytes in a small share of the block's time.
"""

from __future__ import annotations

import time
from pathlib import Path

import torch
from torch import Tensor

from quantkit.build.context import BlockContext, ExpertPassState
from quantkit.build.hidden_states import StreamName, spool_dtype
from quantkit.build.progress_log import WaveCheckpoint
from quantkit.build.spool import Spool
from quantkit.checkpoint.header import read_header
from quantkit.checkpoint.tensors import ShardWriter, get_dtype_name, read_tensor
from quantkit.contracts import TensorSpec
from quantkit.io.files import sync_folder


def load_wave_checkpoint(context: BlockContext) -> ExpertPassState:
    """Return the saved state of the routed experts of this block; an empty state without a
    checkpoint.

    Restores the streams that the search pass moves. Those of the quantize pass are restored by
    `restore_streams`, because the stored dense part overwrites them first.
    """
    saved = context.build.progress.wave
    if saved is None:
        return ExpertPassState()
    if not saved.quantized:
        restore_targets(context, saved)
    sums: dict[str, Tensor] = {}
    if saved.sums:
        sums = load_sums(states_folder(context) / saved.sums, context.build.device)
    return ExpertPassState(
        searched=saved.searched,
        quantized=saved.quantized,
        errors=[sums["errors"]] if "errors" in sums else [],
        sample=sums.get("sample"),
        scaled_sample=sums.get("scaled_sample"),
    )


def restore_streams(context: BlockContext) -> None:
    """Continue the quantize pass where an interrupted build stopped: its streams, and the records
    of its experts.
    """
    saved = context.build.progress.wave
    if saved is not None and saved.quantized:
        restore_targets(context, saved)
        context.state.record.modules.extend(saved.modules)


def restore_targets(context: BlockContext, saved: WaveCheckpoint) -> None:
    """Put the states that a checkpoint names in the place of those without experts."""
    targets = context.state.targets
    for name, file in saved.states.items():
        new = targets[name]
        path = new.path.with_name(file)
        targets[name] = Spool.open(path, new.rows, new.width, spool_dtype(new.dtype))
        new.delete()
        context.state.saved.add(name)


def checkpoint_if_due(context: BlockContext, state: ExpertPassState) -> None:
    """Save a wave if a checkpoint is due and more waves follow; the last wave of a block is saved
    with the block.
    """
    progress, block = context.build.progress, context.state
    is_last = state.quantized == context.experts.experts.count or bool(state.held)
    if progress.journal is None or is_last or not block.interval.is_due():
        return
    began, folder = time.monotonic(), states_folder(context)
    moved: list[StreamName] = list(block.targets) if state.quantized else searched_streams(context)
    for name in moved:
        block.targets[name].flush()
    sums = save_wave(folder, f"sums.{context.name}.{state.searched}.{state.quantized}", state)
    sync_folder(folder)
    prefix = f"{context.experts.experts.module}."
    checkpoint = WaveCheckpoint(
        loop=progress.loop,
        steps=progress.done,
        searched=state.searched,
        quantized=state.quantized,
        states={name: block.targets[name].path.name for name in moved},
        sums=sums,
        modules=tuple(x for x in block.record.modules if x.module.startswith(prefix)),
        stored=tuple(writer.commit() for writer in context.build.writers),
    )
    progress.record_wave(checkpoint, folder)
    block.saved.update(moved)
    block.interval.restart(cost=time.monotonic() - began)


def states_folder(context: BlockContext) -> Path:
    """Return the folder of the hidden states."""
    return next(iter(context.streams.values())).folder


def searched_streams(context: BlockContext) -> list[StreamName]:
    """Return the streams that the search pass moves: those that see original weights."""
    is_original = context.build.plan.propagation == "original"
    names = {"reference", "original", *(["calibration"] if is_original else [])}
    return [name for name in context.state.targets if name in names]


def save_wave(folder: Path, name: str, state: ExpertPassState) -> str | None:
    """Write the sums over experts; return the file's name, None when there are no sums."""
    sums: dict[str, Tensor] = {}
    if state.errors:
        sums["errors"] = torch.cat(state.errors, dim=1)  # [candidates, experts]
    for key, tensor in (("sample", state.sample), ("scaled_sample", state.scaled_sample)):
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


def load_sums(path: Path, device: torch.device) -> dict[str, Tensor]:
    """Read what `save_wave` wrote."""
    header = read_header(path)
    return {name: read_tensor(path, header, name).to(device) for name in header.specs}
