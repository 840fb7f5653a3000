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

from quantkit.build.hidden_states import Stream
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Layout
from quantkit.errors import NumericsError
from quantkit.models.layers import MetaModel, make_final_norm
from quantkit.numerics import fidelity
from quantkit.numerics.fidelity import Estimate, TokenFidelity
from quantkit.numerics.matmul import linear
from quantkit.plan.memory import HEAD_CHUNK

ALL = "all"


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Per scored token: its figures, its domain and where it stands (row of the stream)."""

    tokens: TokenFidelity
    domains: tuple[str, ...]  # one per token

    def summaries(self) -> dict[str, Mapping[str, Estimate]]:
        """Every figure for all tokens together and for each domain."""
        found: dict[str, Mapping[str, Estimate]] = {ALL: fidelity.summarize_tokens(self.tokens)}
        for domain in sorted(set(self.domains)):
            picked = torch.tensor([name == domain for name in self.domains])
            found[domain] = fidelity.summarize_tokens(
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

    def __init__(self, skeleton: MetaModel, layout: Layout, checkpoint: Checkpoint) -> None:
        head = layout.head or layout.embedding
        weight = f"{head.name}.weight"
        read = checkpoint.read([*(spec.name for spec in layout.final_tensors), weight])
        self._norm = make_final_norm(skeleton, layout, read)
        self._weight = read[weight].to(device=skeleton.device, dtype=skeleton.dtype)

    def logits(self, hidden: Tensor) -> Tensor:
        """[n, hidden] -> [n, vocabulary]."""
        normed: Tensor = self._norm(hidden.to(self._weight))
        return linear(normed, self._weight)


@dataclass(frozen=True, kw_only=True)
class Sides:
    """The two streams behind the last block, each with the head it ends in."""

    reference: Stream
    quantized: Stream
    source: Head
    artifact: Head

    def compare(self, rows: Tensor) -> TokenFidelity:
        """The two models' predictions of the token behind each of `rows` [n] of the streams."""
        ids, parts = self.reference.tokens.ids.long(), list[TokenFidelity]()
        for row in rows.split(HEAD_CHUNK):
            p = self.source.logits(self.reference.hidden.gather(row))
            q = self.artifact.logits(self.quantized.hidden.gather(row))
            parts.append(fidelity.compare_logits(p.cpu(), q.cpu(), ids[row + 1]))
        found = fidelity.concatenate_tokens(parts)
        if not all(
            bool(x.isfinite().all()) for x in (found.kl, found.nll_source, found.nll_quantized)
        ):
            raise NumericsError(
                "final norm and language-model head: expected finite distributions, found NaN or infinity; look for "
                "huge values among their weights in source and artifact, and at rms_norm_eps in config.json"
            )
        return found


def sides(
    skeleton: MetaModel,
    layout: Layout,
    source: Checkpoint,
    artifact: Checkpoint,
    reference: Stream,
    quantized: Stream,
) -> Sides:
    """Read both heads."""
    return Sides(
        reference=reference,
        quantized=quantized,
        source=Head(skeleton, layout, source),
        artifact=Head(skeleton, layout, artifact),
    )


def measure(both: Sides) -> Measured:
    """Compare the two streams at every position of the text that has a next token."""
    rows, domains = scored(both.reference)
    return Measured(tokens=both.compare(rows), domains=domains)


def scored(stream: Stream) -> tuple[Tensor, tuple[str, ...]]:
    """Rows of the text that have a next token in their sequence, and the sequence's domain: [n], n names."""
    tokens = stream.tokens
    sequences = zip(tokens.starts, tokens.lengths, tokens.domains, strict=True)
    found = [
        (torch.arange(start, start + length - 1), domain)
        for start, length, domain in sequences
        if start < stream.text_rows
    ]
    return torch.cat([rows for rows, _ in found]), tuple(
        domain for rows, domain in found for _ in range(len(rows))
    )
