"""What an artifact holds: every tensor in writing order, and the files they are cut into; from decisions alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from quantkit.checkpoint.file_names import SINGLE, format_shard_name
from quantkit.contracts import Block, Format, Layout, TensorSpec
from quantkit.plan.decisions import Decision


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file and the tensors it holds, in the order they are written."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def n_bytes(self) -> int:
        return sum(spec.n_bytes for spec in self.tensors)


def kept_spec(spec: TensorSpec, keep: Literal["source", "bf16"] = "source") -> TensorSpec:
    """A tensor that is not quantized, as written: FP8 blocks become the BF16 they stand for, whatever else if asked."""
    as_bf16 = keep == "bf16" or spec.dtype.startswith("F8")
    return TensorSpec(name=spec.name, dtype="BF16" if as_bf16 else spec.dtype, shape=spec.shape)


@dataclass(frozen=True, kw_only=True)
class Kept:
    """How weights that are not quantized are stored: `scale` and `side` of FP8 blocks where the format holds them."""

    specs: Mapping[str, TensorSpec]
    scale: str | None
    side: int | None

    def weight(self, decision: Decision) -> tuple[TensorSpec, ...]:
        """The weight of a kept linear as its rule has it stored; with FP8 blocks, their scales too."""
        spec = self.specs[f"{decision.linear.name}.weight"]
        if decision.keep != "fp8":
            return (kept_spec(spec, decision.keep),)
        assert self.scale is not None and self.side is not None  # `in_blocks` asks for both
        shape = tuple(
            ceil(size / self.side) for size in spec.shape
        )  # [out, in] -> [block rows, block columns]
        return spec, TensorSpec(
            name=f"{decision.linear.name}.{self.scale}", dtype="F32", shape=shape
        )


def block_outputs(
    block: Block, decisions: Mapping[str, Decision], kept: Kept, output: Format
) -> list[TensorSpec]:
    """What a block leaves behind, in writing order: norms and biases, then its linears, routed experts last."""
    found = [kept_spec(kept.specs[spec.name]) for spec in block.others]
    for linear in block.linears:
        decision = decisions[linear.name]
        if decision.scheme is not None:
            found += output.layout(linear, decision.scheme)
        else:
            found += kept.weight(decision)
        if linear.bias:
            found.append(kept_spec(kept.specs[f"{linear.name}.bias"]))
    return [] if any(decisions[x.name].action == "drop" for x in block.linears) else found


def outputs(
    layout: Layout, decisions: Mapping[str, Decision], kept: Kept, output: Format
) -> list[TensorSpec]:
    """Every tensor of the artifact in writing order."""
    found = [*kept.weight(decisions[layout.embedding.name])]
    for block in layout.blocks:
        found += block_outputs(block, decisions, kept, output)
    found += [kept_spec(kept.specs[spec.name]) for spec in layout.final_tensors]
    return found + ([*kept.weight(decisions[layout.head.name])] if layout.head else [])


def shards(tensors: Sequence[TensorSpec], limit_bytes: int) -> tuple[Shard, ...]:
    """Cut the tensors into files of at most `limit_bytes` (a larger tensor gets a file of its own)."""
    cut: list[list[TensorSpec]] = [[]]
    size = 0
    for spec in tensors:
        if cut[-1] and size + spec.n_bytes > limit_bytes:
            cut.append([])
            size = 0
        cut[-1].append(spec)
        size += spec.n_bytes
    if len(cut) == 1:
        return (Shard(file=SINGLE, tensors=tuple(cut[0])),)
    return tuple(
        Shard(file=format_shard_name(i, len(cut)), tensors=tuple(part))
        for i, part in enumerate(cut, 1)
    )
