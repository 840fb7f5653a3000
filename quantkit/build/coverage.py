"""Coverage of a block: the fidelity text's activations against the grams of calibration.

The reference stream runs through the original dense part after the grams are complete. Its inputs
are observed on the way, so there is no further forward pass, and only a sample of each batch is
copied. The factor of a gram lies in the gram's own lower triangle, so there is no further matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.artifact.records import CoverageRecord
from quantkit.build.block_plan import BlockPlan
from quantkit.build.hidden_states import Batch, Stream
from quantkit.contracts import InputStats
from quantkit.numerics import coverage
from quantkit.numerics.coverage import CoverageFactor

SAMPLED_TOKENS = 1024
"""Tokens per kind of text that are scored, at most, spread evenly over the text."""

CHUNK_TOKENS = 512
"""Tokens that are copied and scored at once."""

GOLDEN_RATIO = 0.6180339887498949
"""Fractions of its multiples are spread evenly over 0 .. 1. A sample of tokens by them has every
position of a sequence, whatever its length; every k-th token would have the first or never.
"""


@dataclass(frozen=True, kw_only=True)
class TokenSample:
    """Tokens of the fidelity text that are scored.

    rows [m] int64: their rows of the stream, ascending; kinds [m] int64: their kinds of text, as
    places in `labels`.
    """

    rows: Tensor
    kinds: Tensor
    labels: tuple[str, ...]


class CoverageMeter:
    """Mutable sums of the unspanned shares at one input, by kind of text; `factor` is None for a
    gram that has none.
    """

    def __init__(self, factor: CoverageFactor | None, labels: int) -> None:
        self.factor = factor
        self.total = torch.zeros(labels, dtype=torch.float64)
        self.count = torch.zeros(labels, dtype=torch.int64)

    def add(self, tokens: Tensor, kinds: Tensor) -> None:
        """Add tokens [m, in] of the kinds of text `kinds` [m]."""
        if self.factor is None or not len(tokens):
            return
        shares = coverage.compute_unspanned_shares(self.factor, tokens).cpu()  # [m]
        self.total.index_add_(0, kinds, shares)
        self.count.index_add_(0, kinds, torch.ones_like(kinds))

    def shares(self) -> list[float | None]:
        """Return the mean share of each kind of text; None where nothing was measured."""
        pairs = zip(self.total.tolist(), self.count.tolist(), strict=True)
        return [total / count if count else None for total, count in pairs]


class CoverageMeters:
    """The meters of a block's inputs while the reference stream runs; `stats` by group name.

    The grams of `stats` hold their factors until `finish`.
    """

    def __init__(self, plan: BlockPlan, stats: Mapping[str, InputStats], stream: Stream) -> None:
        self.plan, self.stats, self.sample = plan, stats, sample_tokens(stream)
        self.meters = {
            name: CoverageMeter(coverage.factorize_coverage(x.gram), len(self.sample.labels))
            for name, x in stats.items()
        }

    def add(self, batch: Batch, valid: Tensor, inputs: Mapping[str, Tensor]) -> None:
        """Add the sampled tokens of a batch.

        inputs [sequences, longest, in] by group name, valid [sequences * longest].
        """
        bounds = torch.tensor([batch.first, batch.stop])
        first, stop = torch.searchsorted(self.sample.rows, bounds).tolist()
        chosen = self.sample.rows[first:stop] - batch.first  # [m]
        places = valid.nonzero().flatten()[chosen.to(valid.device)]  # [m], with padding counted
        kinds = self.sample.kinds[first:stop].split(CHUNK_TOKENS)
        for name, meter in self.meters.items():
            x = inputs[name].reshape(-1, inputs[name].shape[-1])  # [sequences * longest, in]
            for rows, part in zip(places.split(CHUNK_TOKENS), kinds, strict=True):
                meter.add(x[rows], part)

    def finish(self) -> tuple[CoverageRecord, ...]:
        """Return the record of each input, and give the grams back, bit for bit."""
        return tuple(self._finish_input(name, meter) for name, meter in self.meters.items())

    def _finish_input(self, name: str, meter: CoverageMeter) -> CoverageRecord:
        factor, stats = meter.factor, self.stats[name]
        rank = coverage.compute_effective_rank(factor) if factor else None
        if factor:
            coverage.restore_gram(factor)
        return CoverageRecord(
            input=name_input(self.plan, name),
            channels=len(stats.gram),
            tokens=int(stats.n_tokens),
            effective_rank=rank,
            unspanned=dict(zip(self.sample.labels, meter.shares(), strict=True)),
        )


def sample_tokens(stream: Stream) -> TokenSample:
    """Return the tokens of the stream's text that are scored: at most about SAMPLED_TOKENS of each
    kind of text.
    """
    tokens = stream.tokens
    ends = (start + length for start, length in zip(tokens.starts, tokens.lengths, strict=True))
    text = sum(end <= stream.text_rows for end in ends)  # sequences; solutions come after them
    labels = sorted(set(tokens.domains[:text]))
    places = torch.tensor([labels.index(label) for label in tokens.domains[:text]])
    kinds = places.repeat_interleave(torch.tensor(tokens.lengths[:text]))  # [text rows]
    chosen = torch.zeros(len(kinds), dtype=torch.bool)
    for place in range(len(labels)):
        rows = (kinds == place).nonzero().flatten()  # [tokens of the kind]
        order = torch.arange(len(rows), dtype=torch.float64) * GOLDEN_RATIO
        chosen[rows[order.frac() < SAMPLED_TOKENS / len(rows)]] = True
    rows = chosen.nonzero().flatten()
    return TokenSample(rows=rows, kinds=kinds[rows], labels=tuple(labels))


def name_input(plan: BlockPlan, name: str) -> str:
    """Return the first quantized module that reads the input of a group."""
    group, experts = plan.groups[name], plan.experts
    if group.readers:
        return group.readers[0]
    return experts.experts.module if experts and group.group.routed_experts else name
