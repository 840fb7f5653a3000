"""Routed experts in slices: pure functions of weights, statistics and tokens.

Nothing here reads or writes a file of its own, keeps a journal or knows a model. A slice is a fixed
range of experts (`plan.memory.choose_slice_size`), so batched operations have the same shapes for
every memory budget and number of devices. Sums over tokens are formed chunk by chunk, sums over
experts in ascending order: neither the budget nor the number of threads or workers changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.build.hidden_states import Routing, iterate_chunks
from quantkit.build.spool import Spool
from quantkit.contracts import InputStats, Rescale, Scheme
from quantkit.models import scaling
from quantkit.models.layers import RouterOutput, select_expert_tokens
from quantkit.numerics import gram as grams

Activation = Callable[[Tensor | None, Tensor], Tensor]
"""Outputs of gate (None without one) and up [tokens, n] -> input of down [tokens, n]."""


@dataclass(frozen=True, kw_only=True)
class ExpertBiases:
    """Biases of a slice of experts: gate (None without one) and up [n, intermediate], down [n,
    hidden].
    """

    gate: Tensor | None
    up: Tensor
    down: Tensor


@dataclass(frozen=True, kw_only=True)
class ExpertSlice:
    """Weights of experts first .. first + n - 1: gate and up [n, intermediate, hidden], down [n,
    hidden, intermediate]. `gate` and `biases` are None for experts without them.
    """

    first: int
    gate: Tensor | None
    up: Tensor
    down: Tensor
    biases: ExpertBiases | None = None

    def __len__(self) -> int:
        return self.up.shape[0]

    @property
    def inputs(self) -> tuple[Tensor, ...]:
        """Weights that read the experts' input: gate and up, or up alone."""
        return (self.up,) if self.gate is None else (self.gate, self.up)


@dataclass(frozen=True, kw_only=True)
class SliceStats:
    """Input statistics of a slice, batched [n, in, in]: `into` of gate and up, `inner` of down."""

    into: InputStats
    inner: InputStats


@dataclass(frozen=True, kw_only=True)
class RoutedTokens:
    """Consecutive tokens and the router's decision: hidden [n, hidden]; index, weight [n, k].

    `first` is the row of the first token; `original` [n, hidden]: the states of the original
    model in place of `hidden`.
    """

    first: int
    hidden: Tensor
    index: Tensor
    weight: Tensor
    original: Tensor | None = None

    @property
    def stop(self) -> int:
        return self.first + len(self.hidden)


@dataclass(frozen=True, kw_only=True)
class RoutedStream:
    """Iterable over the tokens of a stream, in chunks of fixed size; each iteration reads the file
    once more.
    """

    routing: Routing
    device: torch.device
    original: Spool | None = None

    def __iter__(self) -> Iterator[RoutedTokens]:
        for first, stop in iterate_chunks(self.routing.expert_inputs.rows):
            part = self.routing.part(first, stop)
            hidden = self.routing.expert_inputs.read(first, stop).to(self.device, torch.float32)
            original = None if self.original is None else self.original.read(first, stop).to(hidden)
            yield RoutedTokens(
                first=first, hidden=hidden, index=part.index, weight=part.weight, original=original
            )


@dataclass(frozen=True, kw_only=True)
class ExpertOutput:
    """What one expert adds to a chunk of tokens: `values` [n, hidden] at `rows` [n] of the
    chunk.
    """

    rows: Tensor
    values: Tensor


def expert_hidden(x: Tensor, experts: ExpertSlice, e: int, activation: Activation) -> Tensor:
    """Input of down of expert number `e` of the slice, in most families act(gate x) * up x:
    [tokens, hidden] -> [tokens, intermediate].
    """
    gate = None if experts.gate is None else x @ experts.gate[e].T
    up = x @ experts.up[e].T
    if experts.biases is not None:
        up += experts.biases.up[e]
        if gate is not None and experts.biases.gate is not None:
            gate += experts.biases.gate[e]
    return activation(gate, up)


class _StatsAccumulator:
    """Mutable sums of one slice's statistics. `common`: all its experts use all tokens, so their
    input has one gram.
    """

    def __init__(
        self, experts: ExpertSlice, all_tokens: frozenset[int], has_original: bool
    ) -> None:
        n, hidden, width = len(experts), experts.up.shape[-1], experts.down.shape[-1]
        device = experts.up.device
        self.experts, self.all_tokens = experts, all_tokens
        self.common = all(experts.first + e in all_tokens for e in range(n))
        self.inputs = inputs = 1 if self.common else n
        self.gram_in = torch.zeros(inputs, hidden, hidden, device=device)
        self.abs_in = torch.zeros(inputs, hidden, device=device)
        self.gram_mid = torch.zeros(n, width, width, device=device)
        self.abs_mid = torch.zeros(n, width, device=device)
        self.count = torch.zeros(n, dtype=torch.int64, device=device)
        self.cross_in = torch.zeros_like(self.gram_in) if has_original else None
        self.cross_mid = torch.zeros_like(self.gram_mid) if has_original else None

    def add(self, tokens: RoutedTokens, activation: Activation) -> None:
        """Add a chunk of tokens."""
        x, other = tokens.hidden, tokens.original
        if self.common:
            grams.accumulate_gram(self.gram_in[0], self.abs_in[0], x)
            if self.cross_in is not None and other is not None:
                grams.accumulate_cross(self.cross_in[0], x, other)
        for e in range(len(self.experts)):
            number = self.experts.first + e
            rows = (
                slice(None)
                if number in self.all_tokens
                else select_expert_tokens(tokens.index, tokens.weight, number)[0]
            )
            routed = x[rows]  # [tokens, hidden] -> [n, hidden]
            if len(routed):
                self._add_expert(e, routed, None if other is None else other[rows], activation)

    def _add_expert(
        self, e: int, routed: Tensor, original: Tensor | None, activation: Activation
    ) -> None:
        """Add the tokens of one expert: routed, original [n, hidden]."""
        hidden = expert_hidden(routed, self.experts, e, activation)  # [n, intermediate]
        self.count[e] += len(routed)
        grams.accumulate_gram(self.gram_mid[e], self.abs_mid[e], hidden)
        if not self.common:
            grams.accumulate_gram(self.gram_in[e], self.abs_in[e], routed)
        if original is not None and self.cross_in is not None and self.cross_mid is not None:
            target = expert_hidden(original, self.experts, e, activation)
            grams.accumulate_cross(self.cross_mid[e], hidden, target)
            if not self.common:
                grams.accumulate_cross(self.cross_in[e], routed, original)

    def stats(self) -> SliceStats:
        """Return the statistics of all tokens that were added."""
        tokens = self.count.clamp(min=1)[:, None]
        return SliceStats(
            into=InputStats(
                gram=grams.complete_gram(self.gram_in),
                mean_abs=self.abs_in / tokens[: self.inputs],
                n_tokens=self.count[: self.inputs],
                cross=self.cross_in,
            ),
            inner=InputStats(
                gram=grams.complete_gram(self.gram_mid),
                mean_abs=self.abs_mid / tokens,
                n_tokens=self.count,
                cross=self.cross_mid,
            ),
        )


def collect_stats(
    slices: Sequence[ExpertSlice],
    tokens: Iterable[RoutedTokens],
    activation: Activation,
    all_tokens: frozenset[int],
    has_original: bool = False,
) -> tuple[SliceStats, ...]:
    """Return the statistics of each slice's inputs over the tokens that the router sends to its
    experts.

    Slices do not depend on each other; they share one pass over the tokens to save reads. Experts
    in `all_tokens` use every token; if that is every expert of a slice, `into` is batched [1, in,
    in]. With `has_original` the tokens carry the original model's inputs, for the cross statistics:
    routed as here, so that an expert learns what its own tokens would have been.
    """
    sums = [_StatsAccumulator(experts, all_tokens, has_original) for experts in slices]
    for chunk in tokens:
        for accumulator in sums:
            accumulator.add(chunk, activation)
    return tuple(accumulator.stats() for accumulator in sums)


def candidate_errors(
    experts: ExpertSlice, stats: SliceStats, scales: Tensor, rescale: Rescale, scheme: Scheme | None
) -> Tensor:
    """Return the error [candidates, n] of gate and up for each candidate scale [candidates, hidden]
    of their input.
    """
    first, *others = (
        scaling.compute_scale_errors(rescale, weight, stats.into.gram, scales, scheme)
        for weight in experts.inputs
    )
    return sum(others, first)


def expert_outputs(
    experts: ExpertSlice, tokens: RoutedTokens | RouterOutput, activation: Activation
) -> tuple[ExpertOutput, ...]:
    """Return the weighted outputs of a slice's experts for tokens, in ascending order of experts.

    They are added one expert at a time: a sum over the slice would round differently with other
    slices.
    """
    outputs = []
    for e in range(len(experts)):
        rows, weight = select_expert_tokens(tokens.index, tokens.weight, experts.first + e)
        if len(rows):
            hidden = expert_hidden(tokens.hidden[rows], experts, e, activation)
            y = hidden @ experts.down[e].T  # [n, hidden]
            if experts.biases is not None:
                y += experts.biases.down[e]
            outputs.append(ExpertOutput(rows=rows, values=y * weight[:, None].to(y)))
    return tuple(outputs)


def sum_outputs(experts: ExpertSlice, tokens: RouterOutput, activation: Activation) -> Tensor:
    """Return the output of a slice for each token: [tokens, hidden]."""
    total = torch.zeros_like(tokens.hidden)
    for output in expert_outputs(experts, tokens, activation):
        total.index_add_(0, output.rows, output.values)
    return total


def count_tokens(routing: Routing, experts: int) -> Tensor:
    """Return how many tokens the router sent to each expert: [experts] int64."""
    return torch.bincount(routing.index.reshape(-1).cpu(), minlength=experts)
