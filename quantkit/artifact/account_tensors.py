"""Every stored tensor of a source is in its artifact, or has a listed reason why not. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Block

UNUSED = "it quantizes activations or the KV cache"
DROPPED = "its block is left out (mtp: drop)"
MAX_SHOWN = 5


@dataclass(frozen=True, kw_only=True)
class SourceAccount:
    """The stored tensors of a source.

    held: number of those that the artifact holds, as they are or in codes; left_out: reason ->
    names; missing: those of which neither is true.
    """

    held: int
    left_out: Mapping[str, tuple[str, ...]]
    missing: tuple[str, ...]

    @property
    def total(self) -> int:
        """Stored tensors of the source."""
        return self.held + sum(map(len, self.left_out.values())) + len(self.missing)

    def describe(self) -> str:
        """Return "291 accounted for: 289 in the artifact, 2 left out (tied: 1; masks: 1)"."""
        reasons = "; ".join(f"{why}: {len(names):,}" for why, names in self.left_out.items())
        left = sum(map(len, self.left_out.values()))
        listed = f", {left:,} left out ({reasons})" if left else ""
        return f"{self.total:,} accounted for: {self.held:,} in the artifact{listed}"

    def describe_missing(self) -> str:
        """Return the fault of the missing tensors, "" without any."""
        if not self.missing:
            return ""
        shown = ", ".join(self.missing[:MAX_SHOWN])
        more = (
            f" and {len(self.missing) - MAX_SHOWN:,} more" if len(self.missing) > MAX_SHOWN else ""
        )
        return (
            f"expected each of the {self.total:,} tensors of the source in the artifact, or a "
            f"reason why it is left out, found neither for {shown}{more}"
        )


def account_tensors(
    source: Checkpoint,
    left_out: Mapping[str, str],
    dropped: Collection[str],
    quantized: Collection[str],
    names: Collection[str],
) -> SourceAccount:
    """Account for each stored tensor of a source.

    left_out: logical tensor -> reason; dropped: logical tensors of blocks that are left out;
    quantized: modules whose weight is in codes; names: the tensors of the artifact's files, and the
    logical ones that are made of them (`list_held_names`).
    """
    reasons = {name: DROPPED for name in dropped} | dict(left_out)
    modules = {name.rpartition(".")[0] for name in names if not name.endswith(".bias")}

    def is_held(name: str) -> bool:
        module, _, local = name.rpartition(".")
        return name in names or (local == "weight" and module in quantized and module in modules)

    held, listed, missing = 0, dict[str, list[str]](), list[str]()
    for stored, logical in map_stored_tensors(source).items():
        lost = [name for name in logical if not is_held(name)]
        why = UNUSED if not logical else reasons.get(lost[0]) if lost else ""
        if why and all(name in reasons for name in lost):
            listed.setdefault(why, []).append(stored)
        elif lost:
            missing.append(stored)
        else:
            held += 1
    return SourceAccount(
        held=held,
        left_out={why: tuple(entries) for why, entries in listed.items()},
        missing=tuple(missing),
    )


def list_held_names(artifact: Checkpoint) -> set[str]:
    """Return the stored tensors of an artifact, and the logical ones that are made of them.

    artifact: with the experts of stacked tensors split: an artifact may keep them together.
    """
    return {*artifact.stored_specs, *artifact.specs}


def map_stored_tensors(source: Checkpoint) -> dict[str, tuple[str, ...]]:
    """Return stored tensor -> logical tensors that are made of it; () for one of activations.

    Experts stored together may be in codes: codes and scales are each a part of every expert.
    """
    logical = source.logical
    decoded: dict[str, list[str]] = {name: [] for name in logical.unused}
    for name, weight in logical.encoded.items():
        for part in weight.parts.values():
            decoded.setdefault(part.name, []).append(name)
    split: dict[str, list[str]] = {}
    for name, expert in logical.experts.items():
        split.setdefault(expert.stacked.name, []).append(name)
    return {
        stored: tuple(
            name for whole in decoded.get(stored, [stored]) for name in split.get(whole, [whole])
        )
        for stored in source.stored_specs
    }


def list_block_tensors(block: Block) -> list[str]:
    """Return the logical tensors of a block."""
    linears = [f"{x.name}.{kind}" for x in block.linears for kind in ("weight", "bias")]
    return [*linears, *(spec.name for spec in block.others)]
