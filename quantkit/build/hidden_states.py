"""Hidden states of token sequences on their way through the blocks, on disk between blocks.

Three streams run: `calibration` (what methods learn from), `reference` (original weights) and `quantized` (the stored
weights); with `propagate: both` also `original`, the calibration text under original weights. A stream is a flat run of
tokens, sequence behind sequence, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from quantkit.build.spool import Spool, SpoolDtype
from quantkit.errors import CheckpointError
from quantkit.models.layers import ExpertTap, MetaModel, run
from quantkit.plan.memory import BATCH_TOKENS
from quantkit.texts.corpora import Tokens, pack_tokens

StreamName = Literal["calibration", "original", "reference", "quantized"]


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

    @staticmethod
    def joined(parts: Sequence[Routing]) -> Routing | None:
        """What was decided batch after batch; None for no batch."""
        if not parts:
            return None
        index, weight = (
            torch.cat([part.index for part in parts]),
            torch.cat([part.weight for part in parts]),
        )
        return Routing(index=index, weight=weight, seen=parts[0].seen)

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
    text_rows: int  # tokens of the text; solutions that are scored stand behind them
    batches: tuple[Batch, ...]
    folder: Path
    hidden: Spool
    seen: Spool | None
    learned: Spool | None

    @property
    def rows(self) -> int:
        return self.hidden.rows

    def close(self) -> None:
        """Stop using its files, which stay: while one is open, removing it frees no space."""
        for spool in (self.hidden, self.seen, self.learned):
            if spool is not None:
                spool.close()


def cut_batches(lengths: Sequence[int], limit: int = BATCH_TOKENS) -> tuple[Batch, ...]:
    """Cut sequences, in order, into batches of at most `limit` padded tokens (a longer sequence stands alone)."""
    cut: list[Batch] = []
    first, held = 0, list[int]()
    for length in lengths:
        if held and (len(held) + 1) * max(length, *held) > limit:
            cut.append(Batch(first=first, stop=first + sum(held), lengths=tuple(held)))
            first, held = first + sum(held), []
        held.append(length)
    return (
        (*cut, Batch(first=first, stop=first + sum(held), lengths=tuple(held)))
        if held
        else tuple(cut)
    )


def iterate_chunks(rows: int, size: int = BATCH_TOKENS) -> Iterator[tuple[int, int]]:
    """Row ranges of fixed size: the order in which sums over tokens are formed."""
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def sort_by_length(tokens: Tokens) -> Tokens:
    """The same sequences, longest first, so that a batch wastes little on padding."""
    order = sorted(range(tokens.n_sequences), key=lambda i: -tokens.lengths[i])
    return pack_tokens([(tokens.domains[i], tokens.sequence(i).tolist()) for i in order])


def concatenate_tokens(first: Tokens, second: Tokens) -> Tokens:
    """The sequences of both, one behind the other."""
    both = ((tokens, i) for tokens in (first, second) for i in range(tokens.n_sequences))
    return pack_tokens([(tokens.domains[i], tokens.sequence(i).tolist()) for tokens, i in both])


def open_stream(
    name: StreamName,
    text: Tokens,
    solutions: Tokens | None,
    embedding: Tensor,
    folder: Path,
    routed: bool,
    dtype: SpoolDtype,
) -> Stream:
    """Look a text's tokens up in `embedding` [vocabulary, hidden], longest sequence first, `solutions` behind them.

    CheckpointError for a token that the embedding does not have.
    """
    tokens, width = order_tokens(text, solutions), embedding.shape[1]
    ids = tokens.ids
    if len(ids) and int(ids.max()) >= len(embedding):
        raise CheckpointError(
            f"tokenizer: expected token ids below {len(embedding)}, the rows of the embedding, found {int(ids.max())}; "
            "the tokenizer belongs to another model, copy this model's there"
        )
    hidden = Spool.create(folder / f"{name}.0", len(ids), width, dtype)
    for first, stop in iterate_chunks(len(ids)):
        hidden.write(first, embedding[ids[first:stop].long()])  # [n] -> [n, hidden]
    return make_stream(name, text, tokens, folder, hidden, routed)


def reopen_stream(
    name: StreamName,
    text: Tokens,
    solutions: Tokens | None,
    path: Path,
    width: int,
    routed: bool,
    dtype: SpoolDtype,
) -> Stream:
    """A stream that an earlier, interrupted build left with its states [tokens, width] in the file `path`."""
    tokens = order_tokens(text, solutions)
    return make_stream(
        name, text, tokens, path.parent, Spool.open(path, len(tokens.ids), width, dtype), routed
    )


def order_tokens(text: Tokens, solutions: Tokens | None) -> Tokens:
    """A text, longest sequence first, with `solutions` behind it."""
    return (
        concatenate_tokens(sort_by_length(text), solutions) if solutions else sort_by_length(text)
    )


def make_stream(
    name: StreamName, text: Tokens, tokens: Tokens, folder: Path, hidden: Spool, routed: bool
) -> Stream:
    """A stream at `hidden`, with room for what routed experts are given where the model has some."""
    spools = ["seen", "learned"] if name == "calibration" else ["seen"]
    dtype = spool_dtype(hidden.dtype)
    made = [
        Spool.create(folder / f"{name}.{spool}", hidden.rows, hidden.width, dtype)
        for spool in spools
        if routed
    ]
    return Stream(
        name=name,
        tokens=tokens,
        text_rows=text.n_tokens,
        batches=cut_batches(tokens.lengths),
        folder=folder,
        hidden=hidden,
        seen=made[0] if made else None,
        learned=made[1] if len(made) > 1 else None,
    )


def run_batch(
    skeleton: MetaModel,
    layer: nn.Module,
    tap: ExpertTap | None,
    stream: Stream,
    batch: Batch,
    target: Spool,
    seen: Spool | None,
) -> tuple[Tensor, Routing | None]:
    """Run a layer without its routed experts over one batch of a stream, into `target`.

    Returns which padded position [sequences * longest] is a token, and what the router asks of the experts, whose
    inputs go to `seen`.
    """
    out, valid = run(skeleton, layer, stream.hidden.read(batch.first, batch.stop), batch.lengths)
    target.write(batch.first, out)
    if tap is None or tap.last is None or seen is None:
        return valid, None
    seen.write(batch.first, tap.last.hidden[valid])
    return valid, Routing(
        index=tap.last.index[valid], weight=tap.last.weight[valid].float(), seen=seen
    )


def run_stream(
    skeleton: MetaModel,
    layer: nn.Module,
    tap: ExpertTap | None,
    stream: Stream,
    target: Spool,
    seen: Spool | None,
) -> Routing | None:
    """Run a layer without its routed experts over a whole stream, into `target`; what the router asked of them."""
    routings = [
        run_batch(skeleton, layer, tap, stream, batch, target, seen)[1] for batch in stream.batches
    ]
    return Routing.joined([routing for routing in routings if routing])


def create_target(stream: Stream, block: str, mark: str = "") -> Spool:
    """Where a stream's states behind the block go; `mark` tells its file from others of the same block."""
    dtype = spool_dtype(stream.hidden.dtype)
    return Spool.create(
        stream.folder / f"{stream.name}.{block}{mark}", stream.rows, stream.hidden.width, dtype
    )


def spool_dtype(dtype: torch.dtype) -> SpoolDtype:
    """How hidden states computed in `dtype` are stored."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def move_stream(stream: Stream, target: Spool) -> Stream:
    """The stream behind the block; the states before it stay until a journal no longer needs them."""
    return replace(stream, hidden=target)
