"""Next-token distributions of source and artifact on the fidelity text.

The blocks have run during the build; after the last block come only the final norm and the
language-model head, applied in chunks, so that the figures exist for a model that no machine could
hold whole. The artifact's side is read back from its files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.build.hidden_states import Stream, StreamName
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Layout
from quantkit.errors import NumericsError
from quantkit.figure_readers import ALL_TEXT
from quantkit.models import full_model
from quantkit.models.layers import MetaModel, cast_meta_model, load_outer_model
from quantkit.numerics import fidelity
from quantkit.numerics.clustered import Array
from quantkit.numerics.fidelity import Estimate, TokenFidelity
from quantkit.plan.memory import HEAD_CHUNK


@dataclass(frozen=True, kw_only=True)
class TextFidelity:
    """Fidelity of every scored token of the text, in stream order, and each token's domain.

    rows: [n] int64, the rows of the stream whose next tokens these are; documents: [n] int64, the
    document of each token; repeated: tokens whose context begins an earlier document too
    (`find_documents`).
    """

    tokens: TokenFidelity
    yardstick: TokenFidelity | None = None  # of weights rounded to nearest
    bfloat16: TokenFidelity | None = None  # of the source with its head in bfloat16
    rows: Tensor
    domains: tuple[str, ...]  # one per token
    documents: Tensor
    repeated: int

    def summarize(self) -> dict[str, Mapping[str, Estimate]]:
        """Return every figure over all tokens ("all") and for each domain."""
        summaries: dict[str, Mapping[str, Estimate]] = {
            ALL_TEXT: fidelity.summarize_tokens(self.tokens, self.documents)
        }
        for domain in sorted(set(self.domains)):
            mask = torch.tensor([name == domain for name in self.domains])
            summaries[domain] = fidelity.summarize_tokens(
                TokenFidelity(
                    kl=self.tokens.kl[mask],
                    nll_source=self.tokens.nll_source[mask],
                    nll_quantized=self.tokens.nll_quantized[mask],
                    same_top=self.tokens.same_top[mask],
                ),
                self.documents[mask],
            )
        return summaries


class LMHead:
    """What follows the blocks of one checkpoint: final norm and language-model head."""

    def __init__(self, skeleton: MetaModel, layout: Layout, checkpoint: Checkpoint) -> None:
        stored, name = full_model.name_head(skeleton, layout)
        tensors = checkpoint.read([*(spec.name for spec in layout.final_tensors), stored])
        weight = tensors.pop(stored)
        named = {layout.get_path(x): tensor for x, tensor in tensors.items()}
        self._outer = load_outer_model(skeleton, {**named, name: weight})
        self._device, self._dtype = skeleton.device, skeleton.dtype

    def logits(self, hidden: Tensor) -> Tensor:
        """Compute logits: [n, hidden] -> [n, vocab]."""
        return self._outer.compute_logits(hidden.to(device=self._device, dtype=self._dtype))


@dataclass(frozen=True, kw_only=True)
class StreamPair:
    """The reference and the quantized stream after the last block, each with its own head.

    yardstick: the stream of weights rounded to nearest, which has the artifact's head; bfloat16:
    the source's head in bfloat16.
    """

    reference: Stream
    quantized: Stream
    source: LMHead
    artifact: LMHead
    yardstick: Stream | None = None
    bfloat16: LMHead | None = None

    def compare(self, rows: Tensor) -> TokenFidelity:
        """Compare both models' predictions of the token after each of `rows` [n] of the streams."""
        return self.compare_sides(rows, [(self.artifact, self.quantized)])[0]

    def compare_sides(
        self, rows: Tensor, sides: Sequence[tuple[LMHead, Stream]]
    ) -> list[TokenFidelity]:
        """Compare the predictions of each head after its stream with the source's, at `rows` [n].

        Raises NumericsError for distributions that are not finite.
        """
        ids, chunks = self.reference.tokens.ids.long(), [list[TokenFidelity]() for _ in sides]
        for chunk in rows.split(HEAD_CHUNK):
            p = self.source.logits(self.reference.hidden.gather(chunk)).cpu()
            for (head, stream), parts in zip(sides, chunks, strict=True):
                q = head.logits(stream.hidden.gather(chunk))
                parts.append(fidelity.compare_logits(p, q.cpu(), ids[chunk + 1]))
        compared = [fidelity.concatenate_tokens(parts) for parts in chunks]
        for tokens in compared:
            figures = (tokens.kl, tokens.nll_source, tokens.nll_quantized)
            if not all(bool(figure.isfinite().all()) for figure in figures):
                raise NumericsError(
                    "final norm and language-model head: expected finite distributions, found NaN "
                    "or infinity; look for huge values among their weights in source and artifact, "
                    "and at rms_norm_eps in config.json"
                )
        return compared

    def rank_predictions(self, rows: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """Return the `count` most probable tokens after each of `rows` [n] of the streams.

        Returns ids [n, 2, count] int64 and probabilities [n, 2, count] float64, the source's first.
        """
        sides = ((self.source, self.reference), (self.artifact, self.quantized))
        ids, p = list[Tensor](), list[Tensor]()
        for chunk in rows.split(HEAD_CHUNK):
            ranked = [
                fidelity.rank_predictions(head.logits(stream.hidden.gather(chunk)).cpu(), count)
                for head, stream in sides
            ]
            ids.append(torch.stack([of_side for of_side, _ in ranked], dim=1))
            p.append(torch.stack([of_side for _, of_side in ranked], dim=1))
        return torch.cat(ids), torch.cat(p)


def load_stream_pair(
    skeleton: MetaModel,
    layout: Layout,
    source: Checkpoint,
    artifact: Checkpoint,
    streams: Mapping[StreamName, Stream],
) -> StreamPair:
    """Read both heads and pair them with their streams.

    Unless the figures are computed in bfloat16, the source's head is read in bfloat16, too.
    """
    half = None
    if skeleton.dtype != torch.bfloat16:
        half = LMHead(cast_meta_model(skeleton, torch.bfloat16), layout, source)
    return StreamPair(
        reference=streams["reference"],
        quantized=streams["quantized"],
        yardstick=streams.get("yardstick"),
        source=LMHead(skeleton, layout, source),
        artifact=LMHead(skeleton, layout, artifact),
        bfloat16=half,
    )


def measure_text(pair: StreamPair) -> TextFidelity:
    """Compare the streams with the reference at every position that has a next token."""
    rows, domains = select_scored_rows(pair.reference)
    documents, repeated = find_documents(pair.reference, rows)
    sides = {"artifact": (pair.artifact, pair.quantized)}
    if pair.yardstick is not None:
        sides["yardstick"] = (pair.artifact, pair.yardstick)
    if pair.bfloat16 is not None:
        sides["bfloat16"] = (pair.bfloat16, pair.reference)
    compared = dict(zip(sides, pair.compare_sides(rows, list(sides.values())), strict=True))
    return TextFidelity(
        tokens=compared["artifact"],
        yardstick=compared.get("yardstick"),
        bfloat16=compared.get("bfloat16"),
        rows=rows,
        domains=domains,
        documents=documents,
        repeated=repeated,
    )


def select_scored_rows(stream: Stream) -> tuple[Tensor, tuple[str, ...]]:
    """Select the rows whose next token is scored: the tokens after the first of each sequence, in
    a chat the assistant's.

    Returns the rows [n] and the domain of each row's sequence.
    """
    tokens = stream.tokens
    rows, domains = list[Tensor](), list[str]()
    for start, length, domain, answers in zip(
        tokens.starts, tokens.lengths, tokens.domains, tokens.answers, strict=True
    ):
        if start >= stream.text_rows:
            continue
        for first, end in ((0, length),) if answers is None else answers:
            scored = torch.arange(start + max(first, 1) - 1, start + end - 1)
            rows.append(scored)
            domains += [domain] * len(scored)
    return torch.cat(rows), tuple(domains)


def find_documents(stream: Stream, rows: Tensor) -> tuple[Tensor, int]:
    """Return the document of each of `rows` [n], and how many of them repeat another document.

    A document is a sequence of the text. Documents that begin alike have the same predictions
    there, which are one observation: their tokens count as those of one document.
    """
    tokens = stream.tokens
    numbers = [n for n, start in enumerate(tokens.starts) if start < stream.text_rows]
    owner = torch.empty(stream.text_rows, dtype=torch.int64)
    sequences = {n: tokens.sequence(n).numpy() for n in numbers}
    before: int | None = None
    for n in sorted(numbers, key=lambda n: sequences[n].tolist()):
        start, length, shared = tokens.starts[n], len(sequences[n]), 0
        if before is not None:
            shared = _count_shared(sequences[before], sequences[n])
            first = tokens.starts[before]
            owner[start : start + shared] = owner[first : first + shared]
        owner[start + shared : start + length] = n
        before = n
    starts = torch.tensor([tokens.starts[n] for n in numbers])
    own = torch.searchsorted(starts, rows, right=True) - 1
    documents = owner[rows]
    return documents, int((documents != own).sum())


def _count_shared(first: Array, second: Array) -> int:
    """Return the number of ids with which both sequences begin."""
    length = min(len(first), len(second))
    differs = np.flatnonzero(first[:length] != second[:length])
    return int(differs[0]) if len(differs) else length
