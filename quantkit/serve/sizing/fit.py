"""Whether and how a model fits on cards: tensor and pipeline parallelism, most context, most users.

A group of tp x pp cards holds one copy of the model: each layer cut into tp parts, the layers dealt to pp stages (as
vLLM deals them). KV heads are divided among ranks as far as there are any; a latent cache (MLA) is whole on every rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from quantkit.serve.sizing.gpus import Gpu
from quantkit.serve.sizing.memory import MemoryEstimate
from quantkit.serve.sizing.model import KV_BYTES, Attention, KvDtype, Model

MOST_NODES = 16  # beyond these nobody serves one copy of a model
MOST_USERS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """A tensor-parallel degree, and why an engine refuses it; `fault` None: it is allowed."""

    tp: int
    fault: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """Cards that one copy of the model takes, and bytes on the fullest of them without the margin."""

    tp: int
    pp: int
    nodes: int
    weights_bytes: int
    kv_bytes: int

    @property
    def cards(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, kw_only=True)
class Fit:
    """How a model stands to a card.

    least_cards: total bytes / memory, rounded up, before anybody asks how the model can be cut. placement: the first
    of `candidates` that holds it, None where there is no such number up to MOST_NODES nodes. max_context at the
    asked users, max_users at the asked context, both on the placement's cards; one_card_context on a single card.
    """

    needs: MemoryEstimate
    card: Gpu
    least_cards: int
    degrees: tuple[ParallelConfig, ...]
    placement: Placement | None
    one_card_context: int
    max_context: int | None = None
    max_users: int | None = None

    @property
    def one_card(self) -> bool:
        """Whether a single card is enough."""
        return self.placement is not None and self.placement.cards == 1

    @property
    def allowed(self) -> tuple[int, ...]:
        """Tensor-parallel degrees that engines accept, up to two nodes."""
        return tuple(degree.tp for degree in self.degrees if degree.fault is None)


def fit_model(needs: MemoryEstimate, card: Gpu) -> Fit:
    """The fewest cards that hold the model with its cache and margin, and what they leave room for."""
    degrees = tuple(
        ParallelConfig(tp=tp, fault=degree_fault(needs.model, tp)) for tp in asked_degrees(card)
    )
    least = ceil(needs.total_bytes / card.memory_bytes)
    placement = smallest(needs, card, [degree.tp for degree in degrees if degree.fault is None])
    return Fit(
        needs=needs,
        card=card,
        least_cards=least,
        degrees=degrees,
        placement=placement,
        one_card_context=alone(needs, card),
        max_context=max_context(needs, card, placement) if placement else None,
        max_users=max_users(needs, card, placement) if placement else None,
    )


def asked_degrees(card: Gpu) -> list[int]:
    """The degrees worth asking for: all within a node, and two nodes."""
    return list(
        dict.fromkeys([
            *range(1, card.per_node + 1),
            *([2 * card.per_node] if card.per_node > 1 else []),
        ])
    )


def degree_fault(model: Model, tp: int) -> str | None:
    """Why engines refuse to cut this model into `tp` parts; None when they accept it."""
    if tp == 1:
        return None  # nothing is cut, and blocks at an edge may be smaller
    attention = model.layers[0].attention
    if attention.kind == "grouped" and attention.kv_heads % tp and tp % attention.kv_heads:
        return f"{attention.kv_heads} KV heads and {tp} ranks: neither divides the other"
    return next((fault for division in model.divisions if (fault := division.fault(tp))), None)


# ----------------------------------------------------------------------------------------------------- bytes per card


def stages(model: Model, pp: int) -> Iterator[range]:
    """The layers of each pipeline stage: equal shares, the rest from the last but one stage backwards, as vLLM."""
    share, rest = divmod(len(model.layers), pp)
    start = 0
    for stage in range(pp):
        extra = 1 if pp - 1 - rest <= stage < pp - 1 else 0
        yield range(start, start + share + extra)
        start += share + extra


def weights_per_card(needs: MemoryEstimate, tp: int, pp: int) -> list[float]:
    """Bytes of weights on each card of a stage, stage by stage; the MTP block lies on the last."""
    model, found = needs.model, list[float]()
    for number, layers in enumerate(stages(model, pp)):
        held = sum(
            model.layers[n].dense.per_rank(tp) + model.layers[n].routed.per_rank(tp) for n in layers
        )
        if number == 0 or (number == pp - 1 and model.tied):
            held += model.embedding.per_rank(tp)
        if number == pp - 1:
            held += model.head.per_rank(tp) + model.outside.per_rank(1)
            held += model.mtp.per_rank(tp) if needs.speculative else 0
        found.append(held)
    return found


def kv_shards(attention: Attention, tp: int) -> int:
    """Parts into which `tp` ranks cut the cache of a layer."""
    return min(tp, attention.kv_heads) if attention.kind == "grouped" else 1


def kv_per_card(model: Model, context: int, kv: KvDtype, tp: int, pp: int) -> list[float]:
    """Bytes of one request's cache on each card of a stage, stage by stage."""
    per_layer = [
        layer.attention.elements
        * layer.attention.kept(context)
        * KV_BYTES[kv]
        / kv_shards(layer.attention, tp)
        for layer in model.layers
    ]
    return [sum(per_layer[n] for n in layers) for layers in stages(model, pp)]


def fullest(
    needs: MemoryEstimate, tp: int, pp: int, context: int, users: int
) -> tuple[float, float]:
    """Weights and cache on the fullest card."""
    weights = weights_per_card(needs, tp, pp)
    cache = [users * n_bytes for n_bytes in kv_per_card(needs.model, context, needs.kv, tp, pp)]
    return max(zip(weights, cache, strict=True), key=sum)


def fits_on(needs: MemoryEstimate, card: Gpu, tp: int, pp: int, context: int, users: int) -> bool:
    """Whether the fullest card holds its share with the margin."""
    return sum(fullest(needs, tp, pp, context, users)) * (1 + needs.margin) <= card.memory_bytes


# -------------------------------------------------------------------------------------------------------- the search


def smallest(needs: MemoryEstimate, card: Gpu, allowed: Sequence[int]) -> Placement | None:
    """The first of `candidates` that does."""
    for tp, pp, nodes in candidates(card, allowed, len(needs.model.layers)):
        if fits_on(needs, card, tp, pp, needs.context, needs.users):
            weights, cache = fullest(needs, tp, pp, needs.context, needs.users)
            return Placement(
                tp=tp, pp=pp, nodes=nodes, weights_bytes=round(weights), kv_bytes=round(cache)
            )
    return None


def candidates(card: Gpu, allowed: Sequence[int], layers: int) -> Iterator[tuple[int, int, int]]:
    """(tp, pp, nodes) from few cards to many: tensor parallelism in one node, then with stages, then whole nodes.

    Stages take a node, or a half or quarter of it: nobody buys seven of eight cards, and few stages answer sooner.
    """
    inside = [tp for tp in allowed if tp <= card.per_node]
    for tp in inside:
        yield tp, 1, 1
    deep = range(2, min(layers, card.per_node) + 1)
    pairs = [(tp, pp) for tp in inside for pp in deep if card.per_node % (tp * pp) == 0]
    for tp, pp in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
        yield tp, pp, 1
    if card.link.kind == "none":
        return  # a machine by itself
    widest = max(tp for tp in inside if card.per_node % tp == 0)
    for nodes in range(2, MOST_NODES + 1):
        pp = nodes * card.per_node // widest
        if pp <= layers:
            yield widest, pp, nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class NoFit:
    """Why a node is not filled by tensor parallelism alone: bytes that it misses on each card, and what would fit."""

    tp: int
    n_bytes: int
    fp8: bool  # with a cache in FP8
    users: int  # so many, as things are
    latent: bool  # whether each rank holds the whole cache


def find_shortfall(fit: Fit) -> NoFit | None:
    """What tensor parallelism over a whole node misses where stages were taken; None where nothing mends that."""
    needs, card, tp = fit.needs, fit.card, fit.card.per_node
    if fit.placement is None or fit.placement.pp == 1 or tp not in fit.allowed:
        return None
    taken = sum(fullest(needs, tp, 1, needs.context, needs.users)) * (1 + needs.margin)
    users = _most(needs.users, lambda n: fits_on(needs, card, tp, 1, needs.context, n))
    fp8 = fits_on(replace(needs, kv="fp8"), card, tp, 1, needs.context, needs.users)
    if not fp8 and not users:
        return None
    latent = needs.model.layers[0].attention.kind == "latent"
    return NoFit(
        tp=tp, n_bytes=round(taken - card.memory_bytes), fp8=fp8, users=users, latent=latent
    )


def max_context(needs: MemoryEstimate, card: Gpu, placement: Placement) -> int:
    """The longest context of every user that still fits, at most what the model allows."""
    limit = needs.model.longest or 2**24
    return _most(limit, lambda n: fits_on(needs, card, placement.tp, placement.pp, n, needs.users))


def alone(needs: MemoryEstimate, card: Gpu) -> int:
    """The longest context of every user on a single card; 0 where it does not hold the weights."""
    return _most(needs.model.longest or 2**24, lambda n: fits_on(needs, card, 1, 1, n, needs.users))


def max_users(needs: MemoryEstimate, card: Gpu, placement: Placement) -> int:
    """The most requests of the asked context at a time."""
    return _most(
        MOST_USERS, lambda n: fits_on(needs, card, placement.tp, placement.pp, needs.context, n)
    )


def _most(limit: int, holds: Callable[[int], bool]) -> int:
    """The largest number up to `limit` for which `holds`, which is true of all smaller ones; 0 when of none."""
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
