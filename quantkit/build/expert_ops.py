"""Routed experts in waves: as many at a time as memory holds, over tokens in chunks of fixed size.

Chunks are the outer loop, so each pass over a wave reads the stream once, in order; sums over tokens are formed chunk
by chunk and over experts in order, so that neither the budget nor the number of threads changes a bit.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.build.hidden_states import Routing, iterate_chunks
from quantkit.build.spool import Spool
from quantkit.contracts import InputStats
from quantkit.models.layers import RouterOutput, tokens_for_expert
from quantkit.numerics import gram as grams

Activation = Callable[[Tensor], Tensor]


@dataclass(frozen=True, kw_only=True)
class ExpertSlice:
    """Experts first .. first + n - 1: gate and up [n, intermediate, hidden], down [n, hidden, intermediate]."""

    first: int
    gate: Tensor
    up: Tensor
    down: Tensor

    def __len__(self) -> int:
        return self.gate.shape[0]


@dataclass(frozen=True, kw_only=True)
class SliceStats:
    """Statistics of a wave: the input of gate and up, the input of down; batched [n, in, in]."""

    into: InputStats
    inner: InputStats


def expert_hidden(x: Tensor, wave: ExpertSlice, e: int, activation: Activation) -> Tensor:
    """act(gate x) * up x of expert number `e` of the wave: [tokens, hidden] -> [tokens, intermediate]."""
    return activation(x @ wave.gate[e].T) * (x @ wave.up[e].T)


def advance(
    wave: ExpertSlice, routing: Routing, before: Spool, target: Spool, activation: Activation
) -> None:
    """Add the outputs of the wave's experts to the states `before` it [tokens, hidden], into `target`, maybe the same.
    """  # fmt: skip
    for first, stop in iterate_chunks(target.rows):
        x = routing.seen.read(first, stop).to(wave.gate)  # [tokens, hidden]
        out = before.read(first, stop).to(x)
        target.write(first, add_outputs(out, wave, x, routing.part(first, stop), activation))


def collect_stats(
    wave: ExpertSlice,
    routing: Routing,
    activation: Activation,
    everyone: frozenset[int],
    original: Spool | None = None,
) -> SliceStats:
    """Statistics of a wave's inputs over the tokens the router sends; over all tokens for the experts in `everyone`.

    If that is every expert of the wave, their common input has one gram: `into` is batched [1, in, in]. `original`
    [tokens, hidden] is what experts are given in the original model, for the cross of the statistics: routed as here,
    so that an expert learns what its own tokens would have been.
    """
    n, hidden, width, device = len(wave), wave.gate.shape[-1], wave.down.shape[-1], wave.gate.device
    common = all(wave.first + e in everyone for e in range(n))
    inputs = 1 if common else n
    gram_in, abs_in = (
        torch.zeros(inputs, hidden, hidden, device=device),
        torch.zeros(inputs, hidden, device=device),
    )
    gram_mid, abs_mid = (
        torch.zeros(n, width, width, device=device),
        torch.zeros(n, width, device=device),
    )
    count = torch.zeros(n, dtype=torch.int64, device=device)
    cross_in, cross_mid = (
        torch.zeros_like(gram) if original else None for gram in (gram_in, gram_mid)
    )
    for first, stop in iterate_chunks(routing.seen.rows):
        x, decided = (
            routing.seen.read(first, stop).to(wave.gate),
            routing.part(first, stop),
        )  # [tokens, hidden]
        other = original.read(first, stop).to(x) if original else None
        if common:
            grams.accumulate(gram_in[0], abs_in[0], x)
            if cross_in is not None and other is not None:
                grams.accumulate_cross(cross_in[0], x, other)
        for e in range(n):
            token = (
                slice(None)
                if wave.first + e in everyone
                else tokens_for_expert(decided.index, decided.weight, wave.first + e)[0]
            )
            mine = x[token]  # [tokens, hidden] -> [n, hidden]
            if not len(mine):
                continue
            made = expert_hidden(mine, wave, e, activation)  # [n, hidden] -> [n, intermediate]
            count[e] += len(mine)
            grams.accumulate(gram_mid[e], abs_mid[e], made)
            if not common:
                grams.accumulate(gram_in[e], abs_in[e], mine)
            if other is not None and cross_in is not None and cross_mid is not None:
                grams.accumulate_cross(
                    cross_mid[e], made, expert_hidden(other[token], wave, e, activation)
                )
                if not common:
                    grams.accumulate_cross(cross_in[e], mine, other[token])
    tokens = count.clamp(min=1)[:, None]
    into, inside = grams.complete(gram_in), grams.complete(gram_mid)
    return SliceStats(
        into=InputStats(
            gram=into, mean_abs=abs_in / tokens[:inputs], n_tokens=count[:inputs], cross=cross_in
        ),
        inner=InputStats(gram=inside, mean_abs=abs_mid / tokens, n_tokens=count, cross=cross_mid),
    )


def add_outputs(
    out: Tensor,
    wave: ExpertSlice,
    x: Tensor,
    routing: Routing | RouterOutput,
    activation: Activation,
) -> Tensor:
    """Add the wave's weighted outputs for x [tokens, hidden], routed as `routing` says, to out [tokens, hidden]."""
    for e in range(len(wave)):
        token, weight = tokens_for_expert(routing.index, routing.weight, wave.first + e)
        if len(token):
            y = expert_hidden(x[token], wave, e, activation) @ wave.down[e].T  # [n, hidden]
            out.index_add_(0, token, y * weight[:, None].to(y))
    return out


def tokens_per_expert(routing: Routing, count: int) -> Tensor:
    """How many tokens the router sent to each expert: [experts] int64."""
    return torch.bincount(routing.index.reshape(-1).cpu(), minlength=count)
