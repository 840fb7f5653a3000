"""Streams: token sequences and their hidden states, on disk between blocks.

Three streams run: `calibration` (for statistics), `reference` (original weights) and `quantized`
(stored weights). With `propagate: both` also `original`, the calibration text under original
weights; with `fidelity.yardstick` also `yardstick`, the fidelity text under weights rounded to
nearest. A stream is a flat array of tokens, sequence after sequence, without padding.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from quantkit.build.spool import Spool, SpoolDtype
from quantkit.errors import CheckpointError
from quantkit.models.layers import (
    DecoderLayer,
    MetaModel,
    embed_tokens,
    run_layer,
    run_layer_with_sum,
)
from quantkit.models.outer_model import OuterModel
from quantkit.plan.memory import BATCH_TOKENS
from quantkit.texts.tokens import Tokens, pack_tokens

StreamName = Literal["calibration", "original", "reference", "quantized", "yardstick"]


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Consecutive sequences of one forward pass: rows first .. stop - 1 of the stream."""

    first: int
    stop: int
    lengths: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Routing:
    """The output of a block's router for every token of a stream: index and weight [tokens, k].

    `expert_inputs` [tokens, n] are the inputs of the experts.
    """

    index: Tensor
    weight: Tensor
    expert_inputs: Spool

    @staticmethod
    def concatenate(parts: Sequence[Routing]) -> Routing | None:
        """Concatenate the routings of batches; None without batches."""
        if not parts:
            return None
        index, weight = (
            torch.cat([part.index for part in parts]),
            torch.cat([part.weight for part in parts]),
        )
        return Routing(index=index, weight=weight, expert_inputs=parts[0].expert_inputs)

    def part(self, first: int, stop: int) -> Routing:
        """Return the routing of rows first .. stop - 1."""
        return Routing(
            index=self.index[first:stop],
            weight=self.weight[first:stop],
            expert_inputs=self.expert_inputs,
        )


@dataclass(frozen=True, kw_only=True)
class Stream:
    """Tokens and the files of their states [tokens, width], rows as in `models.state_rows`.

    `expert_inputs` are the inputs of the current block's routed experts; `calibration_inputs` are
    the same from the block's original weights (calibration stream only): statistics need them after
    `expert_inputs` come from stored weights.
    """

    name: StreamName
    tokens: Tokens
    text_rows: int  # tokens of the text; solutions to score come after them
    batches: tuple[Batch, ...]
    folder: Path
    hidden: Spool
    expert_inputs: Spool | None
    calibration_inputs: Spool | None

    @property
    def rows(self) -> int:
        return self.hidden.rows

    def close(self) -> None:
        """Close the files, which stay: removing an open file frees no space."""
        for spool in (self.hidden, self.expert_inputs, self.calibration_inputs):
            if spool is not None:
                spool.close()


def cut_batches(
    lengths: Sequence[int], limit: int = BATCH_TOKENS, equal_lengths: bool = False
) -> tuple[Batch, ...]:
    """Cut sequences, in order, into batches of at most `limit` padded tokens; a longer sequence is
    a batch of its own.

    With `equal_lengths` a batch holds sequences of one length, and nothing is padded.
    """
    cut: list[Batch] = []
    first, held = 0, list[int]()
    for length in lengths:
        is_other = equal_lengths and bool(held) and length != held[0]
        if held and (is_other or (len(held) + 1) * max(length, *held) > limit):
            cut.append(Batch(first=first, stop=first + sum(held), lengths=tuple(held)))
            first, held = first + sum(held), []
        held.append(length)
    return (
        (*cut, Batch(first=first, stop=first + sum(held), lengths=tuple(held)))
        if held
        else tuple(cut)
    )


def iterate_chunks(rows: int, size: int = BATCH_TOKENS) -> Iterator[tuple[int, int]]:
    """Return row ranges of fixed size: the order in which sums over tokens are formed."""
    return ((start, min(start + size, rows)) for start in range(0, rows, size))


def sort_by_length(tokens: Tokens) -> Tokens:
    """Return the same sequences, longest first, so that batches need little padding."""
    order = sorted(range(tokens.n_sequences), key=lambda i: -tokens.lengths[i])
    return pack_tokens(tokens.select(order))


def concatenate_tokens(first: Tokens, second: Tokens) -> Tokens:
    """Return the sequences of both, the second after the first."""
    return pack_tokens([
        row for tokens in (first, second) for row in tokens.select(range(tokens.n_sequences))
    ])


@dataclass(frozen=True, kw_only=True)
class StreamShape:
    """Properties that the streams of a build share.

    width: numbers of a row of states; `expert_width`: channels of the inputs of routed experts, 0
    without experts; `equal_lengths`: a batch holds sequences of one length.
    """

    folder: Path
    width: int
    expert_width: int
    equal_lengths: bool


def open_stream(
    name: StreamName,
    text: Tokens,
    solutions: Tokens | None,
    outer: OuterModel,
    vocabulary: int,
    shape: StreamShape,
    dtype: SpoolDtype,
) -> Stream:
    """Embed a text's tokens with `outer`, longest sequence first, then `solutions`.

    Raises CheckpointError for a token that the embedding of `vocabulary` rows does not have.
    """
    tokens = order_tokens(text, solutions)
    ids = tokens.ids
    if len(ids) and int(ids.max()) >= vocabulary:
        raise CheckpointError(
            f"tokenizer: expected token ids below {vocabulary}, the rows of the embedding, "
            f"found {int(ids.max())}; the tokenizer belongs to another model; copy this model's "
            "tokenizer files into the folder"
        )
    hidden = Spool.create(shape.folder / f"{name}.0", len(ids), shape.width, dtype)
    stream = make_stream(name, text, tokens, hidden, shape)
    for batch in stream.batches:
        hidden.write(batch.first, embed_tokens(outer, ids[batch.first : batch.stop], batch.lengths))
    return stream


def reopen_stream(
    name: StreamName,
    text: Tokens,
    solutions: Tokens | None,
    path: Path,
    shape: StreamShape,
    dtype: SpoolDtype,
) -> Stream:
    """Return the stream of an interrupted build, with its states in the file `path`."""
    tokens = order_tokens(text, solutions)
    hidden = Spool.open(path, len(tokens.ids), shape.width, dtype)
    return make_stream(name, text, tokens, hidden, shape)


def order_tokens(text: Tokens, solutions: Tokens | None) -> Tokens:
    """Return a text, longest sequence first, with `solutions` after it."""
    return (
        concatenate_tokens(sort_by_length(text), solutions) if solutions else sort_by_length(text)
    )


def make_stream(
    name: StreamName, text: Tokens, tokens: Tokens, hidden: Spool, shape: StreamShape
) -> Stream:
    """Return a stream at `hidden`, with files for the inputs of routed experts if the model has
    some.
    """
    names = ["seen", "learned"] if name == "calibration" else ["seen"]
    dtype = spool_dtype(hidden.dtype)
    spools = [
        Spool.create(shape.folder / f"{name}.{part}", hidden.rows, shape.expert_width, dtype)
        for part in names
        if shape.expert_width
    ]
    return Stream(
        name=name,
        tokens=tokens,
        text_rows=text.n_tokens,
        batches=cut_batches(tokens.lengths, equal_lengths=shape.equal_lengths),
        folder=shape.folder,
        hidden=hidden,
        expert_inputs=spools[0] if spools else None,
        calibration_inputs=spools[1] if len(spools) > 1 else None,
    )


def run_batch(
    model: MetaModel,
    layer: DecoderLayer,
    stream: Stream,
    batch: Batch,
    target: Spool,
    expert_inputs: Spool | None,
) -> tuple[Tensor, Routing | None]:
    """Run a layer without its routed experts over one batch of a stream, into `target`.

    Returns which padded positions [sequences * longest] are tokens, and the router's output; the
    inputs of the experts are written to `expert_inputs`. For a layer that takes the experts' sum
    inside, the sum [tokens, hidden] is formed in `target`, which has zeros until then.
    """
    out, valid = run_layer(model, layer, stream.hidden.read(batch.first, batch.stop), batch.lengths)
    tap = layer.tap
    if tap is None or not tap.inside:
        target.write(batch.first, out)
    if tap is None or tap.last is None or expert_inputs is None:
        return valid, None
    expert_inputs.write(batch.first, tap.last.hidden[valid])
    return valid, Routing(
        index=tap.last.index[valid],
        weight=tap.last.weight[valid].float(),
        expert_inputs=expert_inputs,
    )


def run_stream(
    model: MetaModel,
    layer: DecoderLayer,
    stream: Stream,
    target: Spool,
    expert_inputs: Spool | None,
) -> Routing | None:
    """Run a layer without its routed experts over a whole stream, into `target`; return the
    routing.
    """
    routings = [
        run_batch(model, layer, stream, batch, target, expert_inputs)[1] for batch in stream.batches
    ]
    return Routing.concatenate([routing for routing in routings if routing])


def run_stream_with_sums(
    model: MetaModel, layer: DecoderLayer, stream: Stream, sums: Spool, target: Spool
) -> None:
    """Run a layer over a whole stream with the sums of its experts [tokens, hidden], into `target`
    [tokens, width], which may be the same file if both have one width.
    """
    for batch in stream.batches:
        total = sums.read(batch.first, batch.stop)
        rows = stream.hidden.read(batch.first, batch.stop)
        target.write(batch.first, run_layer_with_sum(model, layer, rows, batch.lengths, total))


def create_target(stream: Stream, block: str, mark: str = "", width: int = 0) -> Spool:
    """Create the file of a stream's states after a block, or of sums of `width` channels; `mark`
    distinguishes files of the same block.
    """
    dtype, width = spool_dtype(stream.hidden.dtype), width or stream.hidden.width
    path = stream.folder / f"{stream.name}.{block}{mark}"
    return Spool.create(path, stream.rows, width, dtype)


def spool_dtype(dtype: torch.dtype) -> SpoolDtype:
    """Return the dtype in which hidden states computed in `dtype` are stored."""
    return "bfloat16" if dtype == torch.bfloat16 else "float32"


def move_stream(stream: Stream, target: Spool) -> Stream:
    """Return the stream after the block; the states before it stay until the journal no longer
    needs them.
    """
    return replace(stream, hidden=target)
