"""Next-token distributions of source and artifact on the fidelity text, from the streams behind the last block.

The blocks have been run while building; what is left is the final norm and the language-model head, in chunks, so
that the figures exist for a model that no machine here could hold. The artifact's side is read back from its files.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.contracts import Layout
from quantkit.layers import Skeleton, final_norm
from quantkit.memory import HEAD_CHUNK
from quantkit.numerics import fidelity
from quantkit.numerics.fidelity import Estimate, TokenFidelity
from quantkit.storage.checkpoint import Checkpoint
from quantkit.streams import Stream

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Per scored token: its figures, its domain and where it stands (row of the stream)."""

    tokens: TokenFidelity
    domains: tuple[str, ...]  # one per token

    def summaries(self) -> dict[str, Mapping[str, Estimate]]:
        """Every figure for all tokens together and for each domain."""
        found: dict[str, Mapping[str, Estimate]] = {ALL: fidelity.summary(self.tokens)}
        for domain in sorted(set(self.domains)):
            picked = torch.tensor([name == domain for name in self.domains])
            found[domain] = fidelity.summary(
                TokenFidelity(
                    kl=self.tokens.kl[picked],
                    nll_source=self.tokens.nll_source[picked],
                    nll_quantized=self.tokens.nll_quantized[picked],
                    same_top=self.tokens.same_top[picked],
                )
            )
        return found


def tokens_to_parquet(measured: Measured, path: Path) -> None:
    """Write every scored token's figures, in the order of the stream: what histograms are made of."""
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    columns = {
        "domain": arrow.array(measured.domains, arrow.string()),
        "kl": arrow.array(measured.tokens.kl.numpy()),
        "nll_source": arrow.array(measured.tokens.nll_source.numpy()),
        "nll_artifact": arrow.array(measured.tokens.nll_quantized.numpy()),
        "same_top": arrow.array(measured.tokens.same_top.numpy()),
    }
    parquet.write_table(arrow.table(columns), path)


class Head:
    """Final norm and language-model head of one checkpoint: hidden states [n, hidden] -> logits [n, vocabulary]."""

    def __init__(self, skeleton: Skeleton, layout: Layout, checkpoint: Checkpoint) -> None:
        head = layout.head or layout.embedding
        weight = f"{head.name}.weight"
        read = checkpoint.read([*(spec.name for spec in layout.final_tensors), weight])
        self._norm = final_norm(skeleton, layout, read)
        self._weight = read[weight].to(device=skeleton.device, dtype=skeleton.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary]."""
        normed: Tensor = self._norm(hidden.to(self._weight))
        return normed @ self._weight.T


def measure(
    skeleton: Skeleton,
    layout: Layout,
    source: Checkpoint,
    artifact: Checkpoint,
    reference: Stream,
    quantized: Stream,
) -> Measured:
    """Compare the two streams at every position that has a next token."""
    first, second = Head(skeleton, layout, source), Head(skeleton, layout, artifact)
    rows, targets, domains = scored(reference)
    parts = []
    for row, target in zip(rows.split(HEAD_CHUNK), targets.split(HEAD_CHUNK)):
        p = first.logits(reference.hidden.gather(row))
        q = second.logits(quantized.hidden.gather(row))
        parts.append(fidelity.compare(p.cpu(), q.cpu(), target))
    return Measured(tokens=fidelity.concatenate(parts), domains=domains)


def scored(stream: Stream) -> tuple[Tensor, Tensor, tuple[str, ...]]:
    """Rows that have a next token in their sequence, that token, and the sequence's domain: [n], [n], n names."""
    ids, tokens = stream.tokens.ids.long(), stream.tokens
    rows = [
        torch.arange(start, start + length - 1) for start, length in zip(tokens.starts, tokens.lengths, strict=True)
    ]
    row = torch.cat(rows)
    domains = tuple(domain for part, domain in zip(rows, tokens.domains, strict=True) for _ in range(len(part)))
    return row, ids[row + 1], domains
