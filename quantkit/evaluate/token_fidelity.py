"""Next-token distributions of source and artifact on the fidelity text.

The blocks have run during the build; after the last block come only the final norm and the
language-model head, applied in chunks, so that the figures exist for a model that no machine could
hold whole. The artifact's side is read back from its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from quantkit.build.hidden_states import Stream
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Layout
from quantkit.errors import NumericsError
from quantkit.figure_readers import ALL_TEXT
from quantkit.models import full_model
from quantkit.models.layers import MetaModel, load_outer_model
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
    """The reference and the quantized stream after the last block, each with its own head."""

    reference: Stream
    quantized: Stream
    source: LMHead
    artifact: LMHead

    def compare(self, rows: Tensor) -> TokenFidelity:
        """Compare both models' predictions of the token after each of `rows` [n] of the streams."""
        ids, chunks = self.reference.tokens.ids.long(), list[TokenFidelity]()
        for chunk in rows.split(HEAD_CHUNK):
            p = self.source.logits(self.reference.hidden.gather(chunk))
            q = self.artifact.logits(self.quantized.hidden.gather(chunk))
            chunks.append(fidelity.compare_logits(p.cpu(), q.cpu(), ids[chunk + 1]))
        tokens = fidelity.concatenate_tokens(chunks)
        figures = (tokens.kl, tokens.nll_source, tokens.nll_quantized)
        if not all(bool(figure.isfinite().all()) for figure in figures):
            raise NumericsError(
                "final norm and language-model head: expected finite distributions, found NaN or "
                "infinity; look for huge values among their weights in source and artifact, and at "
                "rms_norm_eps in config.json"
            )
        return tokens

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
    reference: Stream,
    quantized: Stream,
) -> StreamPair:
    """Read both heads and pair them with their streams."""
    return StreamPair(
        reference=reference,
        quantized=quantized,
        source=LMHead(skeleton, layout, source),
        artifact=LMHead(skeleton, layout, artifact),
    )


def measure_text(pair: StreamPair) -> TextFidelity:
    """Compare the two streams at every position of the text that has a next token."""
    rows, domains = select_scored_rows(pair.reference)
    documents, repeated = find_documents(pair.reference, rows)
    return TextFidelity(
        tokens=pair.compare(rows),
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
