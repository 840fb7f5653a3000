"""Hidden states of token sequences on their way through the blocks, on disk between blocks.

Three streams run: `calibration` (what methods learn from), `reference` (original weights) and `quantized` (the stored
weights). A stream is a flat run of tokens, sequence behind sequence, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from quantkit.errors import CheckpointError
from quantkit.layers import ExpertTap, Skeleton, observing, run
from quantkit.memory import BATCH_TOKENS
from quantkit.storage.corpora import Tokens, pack_tokens
from quantkit.storage.spool import Spool, SpoolDtype

StreamName = Literal["calibration", "reference", "quantized"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive sequences that are run together: rows first..stop of the stream."""

    first: int
    stop: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """What the router of one block decided for every token of a stream: experts and weights [tokens, k].

    `seen` [tokens, hidden] is what those experts are given.
    """

    index: Tensor
    weight: Tensor
    seen: Spool

    def part(self, first: int, stop: int) -> Routing:
        """The decisions for rows first..stop."""
        return Routing(index=self.index[first:stop], weight=self.weight[first:stop], seen=self.seen)


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens and where their hidden states [tokens, hidden] lie.

    `seen` holds what the routed experts of the current block are given; `learned` the same from the block's original
    weights, which a second pass over the experts still needs when `seen` has moved on (calibration only).
    """

    name: StreamName
    tokens: Tokens
    batches: tuple[Batch, ...]
    folder: Path
    hidden: Spool
    seen: Spool | None
    learned: Spool | None

    @property
    def rows(self) -> int:
        return self.hidden.rows


def batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> tuple[Batch, ...]:
    """Cut sequences, in order, into batches of at most `limit` padded tokens (a longer sequence stands alone)."""
    cut: list[Batch] = []
    first, held = 0, list[int]()
    for length in lengths:
        if held and (len(held) + 1) * max(length, *held) > limit:
            cut.append(Batch(first=first, stop=first + sum(held), lengths=tuple(held)))
            first, held = first + sum(held), []
        held.append(length)
    return (*cut, Batch(first=first, stop=first + sum(held), lengths=tuple(held))) if held else tuple(cut)


def chunks(rows: int, size: int = BATCH_TOKENS) -> Iterator[tuple[int, int]]:
    """Row ranges of fixed size: the order in which sums over tokens are formed."""
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def by_length(tokens: Tokens) -> Tokens:
    """The same sequences, longest first, so that a batch wastes little on padding."""
    order = sorted(range(tokens.n_sequences), key=lambda i: -tokens.lengths[i])
    return pack_tokens([(tokens.domains[i], tokens.sequence(i).tolist()) for i in order])


def start(name: StreamName, tokens: Tokens, embedding: Tensor, folder: Path, routed: bool, dtype: SpoolDtype) -> Stream:
    """Look the tokens up in `embedding` [vocabulary, hidden]; CheckpointError for a token it does not have."""
    ids, width = tokens.ids, embedding.shape[1]
    if len(ids) and int(ids.max()) >= len(embedding):
        raise CheckpointError(
            f"tokenizer: expected token ids below {len(embedding)}, the rows of the embedding, found {int(ids.max())}; "
            "the tokenizer belongs to another model, copy this model's there"
        )
    hidden = Spool.create(folder / f"{name}.0", len(ids), width, dtype)
    for first, stop in chunks(len(ids)):
        hidden.write(first, embedding[ids[first:stop].long()])  # [n] -> [n, hidden]
    spools = ["seen", "learned"] if name == "calibration" else ["seen"]
    made = [Spool.create(folder / f"{name}.{spool}", len(ids), width, dtype) for spool in spools if routed]
    return Stream(
        name=name,
        tokens=tokens,
        batches=batches(tokens.lengths),
        folder=folder,
        hidden=hidden,
        seen=made[0] if made else None,
        learned=made[1] if len(made) > 1 else None,
    )


def through(
    skeleton: Skeleton,
    layer: nn.Module,
    tap: ExpertTap | None,
    stream: Stream,
    target: Spool,
    seen: Spool | None,
    observe: Mapping[str, str] = {},
    learn: Callable[[str, Tensor], None] = lambda key, rows: None,
) -> Routing | None:
    """Run a layer without its routed experts over a whole stream, into `target`.

    `observe` names module paths whose inputs go, token rows only [tokens, in], to `learn(key, rows)`. What the router
    asks of the experts goes to `seen` and the returned Routing.
    """
    index, weight = [], []
    with observing(layer, observe) as inputs:
        for batch in stream.batches:
            out, valid = run(skeleton, layer, stream.hidden.read(batch.first, batch.stop), batch.lengths)
            target.write(batch.first, out)
            for key, x in inputs.items():
                learn(key, x.reshape(-1, x.shape[-1])[valid])  # [..., in] -> [tokens, in]
            if tap is not None and tap.last is not None and seen is not None:
                seen.write(batch.first, tap.last.hidden[valid])
                index.append(tap.last.index[valid])
                weight.append(tap.last.weight[valid].float())
    return Routing(index=torch.cat(index), weight=torch.cat(weight), seen=seen) if seen and index else None


def scratch(stream: Stream, block: str) -> Spool:
    """Where a stream's states behind the block go."""
    dtype: SpoolDtype = "bfloat16" if stream.hidden.dtype == torch.bfloat16 else "float32"
    return Spool.create(stream.folder / f"{stream.name}.{block}", stream.rows, stream.hidden.width, dtype)


def moved(stream: Stream, target: Spool) -> Stream:
    """The stream behind the block; the states before it are removed."""
    stream.hidden.delete()
    return replace(stream, hidden=target)
