"""Upper bounds of speed: what bandwidth, arithmetic and links allow, computed from peaks. Nothing here was measured.

A step takes at least as long as the slowest of reading its bytes, doing its arithmetic and moving its sums, all three
at their peak and perfectly at once. Latencies, kernels that miss their peak and scheduling come on top (the roofline of
Williams, Waterman and Patterson, Communications of the ACM 52(4), 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.serve.sizing.fit import Fit, kv_per_card, stages
from quantkit.serve.sizing.gpus import Gpu
from quantkit.serve.sizing.model import Attention, Layer, Mixture, Model, Weights

TERA = 1e12
Limit = Literal["memory", "arithmetic", "interconnect"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Step:
    """Seconds that a stage of the pipeline takes at least, by what it waits for."""

    memory: float
    arithmetic: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic, self.interconnect)

    @property
    def limit(self) -> Limit:
        told: dict[Limit, float] = {
            "memory": self.memory, "arithmetic": self.arithmetic, "interconnect": self.interconnect,
        }  # fmt: skip
        return max(told, key=lambda name: told[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """Tokens per second at most, and what keeps them from being more."""

    tokens_per_s: float
    limit: Limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Of one placement. one: a single request at its first tokens, the most that a user can ever see; all: every user
    at the longest context, together; prefill: prompt tokens, of all requests together."""

    one: Bound
    all: Bound
    prefill: Bound
    prefill_without_link: Bound  # were the cards as one


def compute_bounds(fit: Fit) -> Bounds | None:
    """The bounds on the cards a model was placed on; None where it was placed on none."""
    if fit.placement is None:
        return None
    return Bounds(
        one=decode(fit, 1, 0),
        all=decode(fit, fit.needs.users, fit.needs.context),
        prefill=prefill(fit, linked=True),
        prefill_without_link=prefill(fit, linked=False),
    )


def decode(fit: Fit, users: int, context: int) -> Bound:
    """Tokens per second of `users` requests at `context` tokens each; they fill the pipeline in as many parts as it
    has stages, as far as there are enough of them."""
    assert fit.placement is not None
    tp, pp = fit.placement.tp, fit.placement.pp
    parts = min(pp, users)
    steps = decode_steps(fit.needs.model, fit.card, tp, pp, users / parts, context, fit)
    slowest = max(steps, key=lambda step: step.seconds)
    turn = max(sum(step.seconds for step in steps), parts * slowest.seconds)
    return Bound(tokens_per_s=users / turn, limit=slowest.limit)


def decode_steps(
    model: Model, card: Gpu, tp: int, pp: int, batch: float, context: int, fit: Fit
) -> list[Step]:
    """The least time of each stage for `batch` requests, one token each."""
    cache = kv_per_card(model, context, fit.needs.kv, tp, pp)
    found = []
    for number, layers in enumerate(stages(model, pp)):
        last = number == pp - 1
        inside = [model.layers[n] for n in layers]
        read = (
            sum(layer_bytes(layer, model.mixture, batch, tp) for layer in inside)
            + batch * cache[number]
        )
        read += (model.embedding if model.tied else model.head).per_rank(tp) if last else 0
        work = sum(layer_seconds(layer, model.mixture, card, context) for layer in inside)
        work += seconds(model.embedding if model.tied else model.head, card) if last else 0
        found.append(
            Step(
                memory=read / card.bandwidth,
                arithmetic=batch * work / tp,
                interconnect=batch * link_seconds(model, card, tp, len(inside)),
            )
        )
    return found


def prefill(fit: Fit, *, linked: bool) -> Bound:
    """Prompt tokens per second of a full pipeline: arithmetic and links; reading weights once is spread over them."""
    assert fit.placement is not None
    model, card, tp = fit.needs.model, fit.card, fit.placement.tp
    steps = []
    for layers in stages(model, fit.placement.pp):
        work = sum(
            prompt_seconds(model.layers[n], model.mixture, card, fit.needs.context) for n in layers
        )
        link = link_seconds(model, card, tp, len(layers)) if linked else 0.0
        steps.append(Step(memory=0.0, arithmetic=work / tp, interconnect=link))
    slowest = max(steps, key=lambda step: step.seconds)
    return Bound(tokens_per_s=1 / slowest.seconds, limit=slowest.limit)


# --------------------------------------------------------------------------------------------------- bytes and flops


def layer_bytes(layer: Layer, mixture: Mixture | None, batch: float, tp: int) -> float:
    """Weights of a layer that a card reads for `batch` tokens: of routed experts those that are hit, as expected."""
    share = mixture.distinct(batch) / mixture.count if mixture else 1.0
    return layer.dense.per_rank(tp) + layer.routed.per_rank(tp) * share


def active_bytes(model: Model, batch: float = 1.0) -> float:
    """Weights that a step of `batch` tokens reads on all cards together; of an embedding no more than a row."""
    head = (model.embedding if model.tied else model.head).n_bytes + model.outside.n_bytes
    return head + sum(layer_bytes(layer, model.mixture, batch, 1) for layer in model.layers)


def active_parameters(model: Model) -> int:
    """Parameters that compute for each token: all but the embedding, and of routed experts the chosen ones."""
    share = model.mixture.top_k / model.mixture.count if model.mixture else 1.0
    inside = sum(layer.dense.parameters + layer.routed.parameters * share for layer in model.layers)
    return round(inside + (model.embedding if model.tied else model.head).parameters)


def seconds(weights: Weights, card: Gpu, share: float = 1.0) -> float:
    """Of one card for one token: two flops per parameter, at FP8's rate for FP8 weights where the card has it."""
    fp8 = weights.fp8_parameters if card.tflops.fp8 else 0
    at_fp8 = 2 * fp8 / (card.tflops.fp8.value * TERA) if card.tflops.fp8 else 0.0
    return share * (at_fp8 + 2 * (weights.parameters - fp8) / (card.tflops.bf16.value * TERA))


def layer_seconds(layer: Layer, mixture: Mixture | None, card: Gpu, context: float) -> float:
    """Of one card for one token that attends to `context` others."""
    share = mixture.top_k / mixture.count if mixture else 1.0
    attending = attention_flops(layer.attention, layer.attention.kept(int(context))) / (
        card.tflops.bf16.value * TERA
    )
    return seconds(layer.dense, card) + seconds(layer.routed, card, share) + attending


def prompt_seconds(layer: Layer, mixture: Mixture | None, card: Gpu, context: int) -> float:
    """Of one card for a token of a prompt of `context`, in the mean over its places."""
    window = layer.attention.window or context
    full = min(window, context)
    kept = (full * (full + 1) / 2 + (context - full) * full) / context
    attending = attention_flops(layer.attention, kept) / (card.tflops.bf16.value * TERA)
    return layer_seconds(layer, mixture, card, 0) + attending


def attention_flops(attention: Attention, kept: float) -> float:
    """Scores and weighted values of one token against `kept` others."""
    return 2 * attention.heads * (attention.qk_width + attention.v_width) * kept


def link_bytes(model: Model, tp: int, layers: int) -> float:
    """Bytes that a card sends per token: two sums per layer over `tp` cards, in rings: 2 (tp - 1) / tp of a vector."""
    return 2 * layers * model.hidden * model.activation_bytes * 2 * (tp - 1) / tp


def link_seconds(model: Model, card: Gpu, tp: int, layers: int) -> float:
    """Of the links between cards for one token."""
    return (
        link_bytes(model, tp, layers) / card.link.one_way if tp > 1 and card.link.one_way else 0.0
    )
