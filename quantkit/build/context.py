"""Values that the steps of the build loop share: the build, the block in progress, and the state
that changes on the way.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.artifact.records import BlockRecord, ModuleRecord
from quantkit.artifact.writer import ArtifactWriter
from quantkit.build.block_plan import BlockPlan, ExpertsPlan, ReadRequest
from quantkit.build.executors.protocol import Executor
from quantkit.build.expert_ops import Activation, ExpertSlice, SliceStats
from quantkit.build.hidden_states import Stream, StreamName
from quantkit.build.progress_log import BuildProgress, CheckpointInterval
from quantkit.build.spool import Spool
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.encoding import FP8
from quantkit.checkpoint.prefetch import ScheduledReads
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import Format
from quantkit.errors import NumericsError
from quantkit.models.layers import MetaModel
from quantkit.models.scaling import BFLOAT16_TOLERANCE, FLOAT32_TOLERANCE
from quantkit.plan.plan import Plan

Reads = ScheduledReads[ReadRequest, dict[str, Tensor]]


@dataclass(frozen=True, kw_only=True)
class BuildContext:
    """What stays the same for every block of a build; writers and reads are its only ties to the
    disk.
    """

    plan: Plan
    model: MetaModel
    calibration_model: MetaModel  # the same in the dtype of the calibration stream
    formats: tuple[Format, ...]  # the plan's first
    writers: tuple[ArtifactWriter, ...]  # one per format
    reads: Reads
    source: Checkpoint
    executor: Executor
    progress: BuildProgress

    @property
    def device(self) -> torch.device:
        return self.model.device

    def read(self, request: ReadRequest) -> dict[str, Tensor]:
        """Read tensors of the source, in float32 on the device; integers stay."""
        tensors = self.reads.take(request)
        return {name: to_float32(x.to(self.device)) for name, x in tensors.items()}

    def write_kept(self, name: str, tensor: Tensor) -> Tensor:
        """Store a tensor that is not quantized, in the dtype that each plan gives it; return it as
        the first writer stored it.
        """
        stored = []
        for writer, output in zip(self.writers, self.formats, strict=True):
            if self._keeps_codes(name, writer):
                stored.append(self._copy_codes(name, tensor, writer))
                continue
            dtype = writer.spec(name).dtype
            if dtype == FP8:
                stored.append(self._copy_fp8_blocks(name, tensor, writer, output))
                continue
            stored.append(tensor.to(TORCH_DTYPES[dtype]))
            writer.write({name: stored[-1]})
        return stored[0]

    def cast_kept(self, name: str, tensor: Tensor) -> Tensor:
        """Return an unscaled tensor as the first writer stores it, in float32; integers stay.

        Codes and FP8 blocks keep their values.
        """
        writer = self.writers[0]
        if self._keeps_codes(name, writer) or writer.spec(name).dtype == FP8:
            return tensor
        return to_float32(tensor.to(TORCH_DTYPES[writer.spec(name).dtype]))

    def _keeps_codes(self, name: str, writer: ArtifactWriter) -> bool:
        """Return whether a writer holds a kept weight as the source's codes, which may have the
        weight's own name.
        """
        if not writer.holds(name):
            return True
        encoded = self.source.logical.encoded.get(name)
        is_code = encoded is not None and encoded.scheme is not None
        return is_code and writer.spec(name).dtype in ("I8", FP8)

    def copy_stacked(self, name: str) -> None:
        """Copy a stored tensor with all experts of a block: its codes where the plan has them, else
        its values.
        """
        for writer in self.writers:
            is_plain = writer.holds(name)
            tensors = self.source.read_stacked(name, codes=not is_plain)
            if is_plain:
                tensors = {name: tensors[name].to(TORCH_DTYPES[writer.spec(name).dtype])}
            writer.write(tensors)

    def _copy_codes(self, name: str, tensor: Tensor, writer: ArtifactWriter) -> Tensor:
        """Copy the codes of a kept weight bit for bit; NumericsError unless they hold the values of
        `tensor`.
        """
        values = self.source.read([name])[name]
        if not torch.equal(values.to(tensor), tensor):
            raise NumericsError(
                f"{name}: expected the source's values, because its codes are kept, found others: "
                "its input or its rows were rescaled; plan.decisions.changes_kept_bits lacks a "
                "group"
            )
        writer.write(self.source.read_parts(name))
        return values.to(tensor.device)

    def _copy_fp8_blocks(
        self, name: str, tensor: Tensor, writer: ArtifactWriter, output: Format
    ) -> Tensor:
        """Copy the FP8 blocks of `name` bit for bit; NumericsError unless they hold the values of
        `tensor`.
        """
        blocks = self.source.read_fp8_blocks(name)
        if not torch.equal(blocks.values.to(tensor), tensor):
            raise NumericsError(
                f"{name}: expected the source's values, because its FP8 blocks are kept, found "
                "others: its input or its rows were rescaled; plan.decisions.touches_fp8 lacks a "
                "group"
            )
        scale_name = f"{name.removesuffix('weight')}{output.fp8_scale}"
        writer.write({name: blocks.codes, scale_name: blocks.scale.float()})
        return blocks.values.to(tensor.device)


@dataclass(kw_only=True)
class ExpertPassState:
    """Progress of the passes over a block's experts. Mutable; a wave checkpoint saves it.

    `searched`, `quantized`: experts that each pass has finished; `held`: slices and statistics that
    the search pass keeps in memory for the quantize pass, when all fit; `errors`: [candidates,
    experts] of each candidate scale, a part per slice; `sample`, `scaled_sample`: the sample's
    routed output [tokens, hidden] by original and by scaled weights.
    """

    searched: int = 0
    quantized: int = 0
    held: list[tuple[ExpertSlice, SliceStats | None]] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    sample: Tensor | None = None
    scaled_sample: Tensor | None = None


@dataclass(kw_only=True)
class BlockState:
    """What changes while a block is built: mutable.

    `record` is filled in step by step. `targets` are the files of the hidden states after the
    block. Those in `saved` are named by a wave checkpoint and must stay as they are: the next wave
    writes a new file, which replaces them in `targets`.
    """

    record: BlockRecord
    targets: dict[StreamName, Spool]
    saved: set[StreamName] = field(default_factory=set)
    interval: CheckpointInterval = field(default_factory=CheckpointInterval)


@dataclass(frozen=True, kw_only=True)
class BlockContext:
    """A block in progress: its plan, the streams before it, and its mutable `state`."""

    build: BuildContext
    plan: BlockPlan
    streams: Mapping[StreamName, Stream]
    state: BlockState
    report_share: Callable[[float], None]  # of the block's work that is done, 0 to 1
    gating: Activation | None = None  # of the experts

    @property
    def name(self) -> str:
        return self.plan.block.name

    @property
    def calibration(self) -> Stream | None:
        """The stream that gives statistics; None when no method of the recipe needs any."""
        return self.streams.get("calibration")

    @property
    def activation(self) -> Activation:
        """The function between the projections of the experts; only for blocks that have some."""
        assert self.gating is not None
        return self.gating

    @property
    def tolerance(self) -> float:
        """How much scaling may change the block by rounding in the compute dtype."""
        is_float32 = self.build.model.dtype == torch.float32
        return FLOAT32_TOLERANCE if is_float32 else BFLOAT16_TOLERANCE

    @property
    def experts(self) -> ExpertsPlan:
        """The plan of the routed experts; only for blocks that have some."""
        assert self.plan.experts is not None
        return self.plan.experts

    def write(
        self, tensors: tuple[Mapping[str, Tensor], ...], records: tuple[ModuleRecord, ...]
    ) -> None:
        """Store quantized tensors in every format, and record the figures of their linears."""
        for writer, stored in zip(self.build.writers, tensors, strict=True):
            writer.write(stored)
        self.state.record.modules.extend(records)

    def write_kept(self, name: str, tensor: Tensor) -> Tensor:
        """Store a tensor that is not quantized; return it as stored, in float32; integers stay."""
        return to_float32(self.build.write_kept(name, tensor))


def to_float32(tensor: Tensor) -> Tensor:
    """Return floating point numbers in float32, and integers as they are."""
    return tensor.float() if tensor.is_floating_point() else tensor
