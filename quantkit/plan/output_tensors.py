"""Tensors of an artifact in writing order, and their shards, from decisions alone."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Literal

from quantkit.checkpoint.encoding import FP8, EncodedWeight
from quantkit.checkpoint.file_names import SINGLE, format_shard_name
from quantkit.checkpoint.stacked import find_expert_parts, get_stacked_shape
from quantkit.contracts import Block, Format, Layout, Linear, TensorSpec
from quantkit.plan.decisions import Decision, keeps_stacked


@dataclass(frozen=True, kw_only=True)
class Shard:
    """One output file and its tensors in writing order."""

    file: str
    tensors: tuple[TensorSpec, ...]

    @property
    def n_bytes(self) -> int:
        return sum(spec.n_bytes for spec in self.tensors)


def make_kept_spec(spec: TensorSpec, keep: Literal["source", "bf16"] = "source") -> TensorSpec:
    """Return a kept tensor as written: FP8 becomes BF16, other dtypes with keep "bf16" only."""
    as_bf16 = keep == "bf16" or spec.dtype.startswith("F8")
    return TensorSpec(name=spec.name, dtype="BF16" if as_bf16 else spec.dtype, shape=spec.shape)


@dataclass(frozen=True, kw_only=True)
class KeptStorage:
    """Storage of kept weights: `scale` (tensor suffix) and `side` of FP8 blocks if the format has
    them; `encoded`: the source's weights in codes.
    """

    specs: Mapping[str, TensorSpec]
    scale: str | None
    side: int | None
    output: Format
    encoded: Mapping[str, EncodedWeight] = field(default_factory=dict)

    def list_weight_tensors(self, decision: Decision) -> tuple[TensorSpec, ...]:
        """Return the tensors of a kept weight as written, for FP8 blocks with its scales."""
        if decision.codes is not None:
            return self.output.layout(decision.linear, decision.codes)
        spec = self.specs[f"{decision.linear.name}.weight"]
        if decision.keep != "fp8":
            return (make_kept_spec(spec, "bf16" if decision.keep == "bf16" else "source"),)
        return self.list_fp8_tensors(spec)  # checked by keep_fp8_blocks

    def list_copied_tensors(self, name: str, is_coded: bool) -> tuple[TensorSpec, ...]:
        """Return a tensor of a part that text does not run through as written.

        is_coded: the artifact holds codes, next to which its format may hold FP8 blocks.
        """
        spec = self.specs[name]
        if not (is_coded and self.copies_fp8(spec)):
            return (make_kept_spec(spec),)
        return self.list_fp8_tensors(spec)

    def copies_fp8(self, spec: TensorSpec) -> bool:
        """Return whether a weight of a part stays in the FP8 blocks of the source.

        Engines round its inputs in groups of a block's width, which must divide them.
        """
        accepts = self.output.accepts_fp8
        if spec.dtype != FP8 or self.side is None or self.scale is None or accepts is None:
            return False
        name, (out, into) = spec.name.removesuffix(".weight"), spec.shape
        linear = Linear(name=name, out_features=out, in_features=into, role="mlp")
        is_run = name != spec.name and into % self.side == 0
        return is_run and accepts(linear, self.side) is None

    def list_fp8_tensors(self, spec: TensorSpec) -> tuple[TensorSpec, TensorSpec]:
        """Return the tensors of a weight in FP8 blocks: codes and scales."""
        assert self.side is not None  # checked before
        shape = tuple(ceil(size / self.side) for size in spec.shape)  # -> [block rows, columns]
        name = f"{spec.name.removesuffix('weight')}{self.scale}"
        return spec, TensorSpec(name=name, dtype="F32", shape=shape)

    def iterate_expert_tensors(self, block: Block, decision: Decision) -> Iterator[TensorSpec]:
        """Yield the stored tensors of kept experts as written, which are those of the source."""
        assert block.experts is not None  # the caller has checked
        parts = find_expert_parts([block])
        for stacked in block.stacked:
            weight = self.encoded.get(stacked.name)
            if weight is not None and decision.encoding is not None:
                yield from weight.parts.values()
                continue
            name = f"{block.experts.linear(0, stacked.projections[0])}.{stacked.kind}"
            shape = get_stacked_shape(stacked, parts[name], block.experts.count)
            spec = TensorSpec(name=stacked.name, dtype=self.specs[name].dtype, shape=shape)
            yield make_kept_spec(spec, "bf16" if decision.keep == "bf16" else "source")


def list_block_tensors(
    block: Block, decisions: Mapping[str, Decision], kept: KeptStorage, output: Format
) -> list[TensorSpec]:
    """Return the tensors of a block in writing order: norms, then linears, routed experts last."""
    tensors = [make_kept_spec(kept.specs[spec.name]) for spec in block.others]
    are_together = keeps_stacked(block, decisions)
    for linear in block.linears:
        decision = decisions[linear.name]
        if are_together and block.stores_together(linear):
            continue
        if decision.scheme is not None:
            tensors += output.layout(linear, decision.scheme)
        else:
            tensors += kept.list_weight_tensors(decision)
        if linear.bias:
            tensors.append(make_kept_spec(kept.specs[f"{linear.name}.bias"]))
    if are_together and block.experts:
        tensors += kept.iterate_expert_tensors(block, decisions[block.experts.first])
    return [] if any(decisions[x.name].action == "drop" for x in block.linears) else tensors


def list_output_tensors(
    layout: Layout, decisions: Mapping[str, Decision], kept: KeptStorage, output: Format
) -> list[TensorSpec]:
    """Return every tensor of the artifact in writing order."""
    tensors = [*kept.list_weight_tensors(decisions[layout.embedding.name])]
    for block in layout.blocks:
        tensors += list_block_tensors(block, decisions, kept, output)
    tensors += [make_kept_spec(kept.specs[spec.name]) for spec in layout.final_tensors]
    tensors += [*kept.list_weight_tensors(decisions[layout.head.name])] if layout.head else []
    is_coded = any(decision.action == "quantize" for decision in decisions.values())
    copied = (name for part in layout.parts for name in part.tensors)
    return tensors + [spec for name in copied for spec in kept.list_copied_tensors(name, is_coded)]


def split_into_shards(tensors: Sequence[TensorSpec], limit_bytes: int) -> tuple[Shard, ...]:
    """Split the tensors into files of at most `limit_bytes`; a larger tensor gets its own file."""
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
