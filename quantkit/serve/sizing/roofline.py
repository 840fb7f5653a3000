"""Upper bounds of the speed from bandwidth, arithmetic and links at their peak. Not measured.

A step takes at least as long as the slowest of reading its bytes, its arithmetic and its
all-reduce, all three at their peak and perfectly overlapped. Latencies, kernels below their peak
and scheduling come on top (the roofline model of Williams, Waterman and Patterson, Communications
of the ACM 52(4), 2009).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from quantkit.serve.sizing.fit import Fit, compute_kv_per_gpu, iterate_stages
from quantkit.serve.sizing.gpus import Gpu
from quantkit.serve.sizing.model import Attention, Layer, Model, MoeConfig, Weights

TERA = 1e12
Limit = Literal["memory", "arithmetic", "interconnect"]


@dataclass(frozen=True, kw_only=True, slots=True)
class StageTime:
    """The least time of a pipeline stage in seconds, by resource."""

    memory: float
    arithmetic: float
    interconnect: float

    @property
    def seconds(self) -> float:
        return max(self.memory, self.arithmetic, self.interconnect)

    @property
    def limit(self) -> Limit:
        times: dict[Limit, float] = {
            "memory": self.memory,
            "arithmetic": self.arithmetic,
            "interconnect": self.interconnect,
        }
        return max(times, key=lambda name: times[name])


@dataclass(frozen=True, kw_only=True, slots=True)
class Bound:
    """An upper bound in tokens per second, and the resource that sets it."""

    tokens_per_s: float
    limit: Limit


@dataclass(frozen=True, kw_only=True, slots=True)
class Bounds:
    """Bounds of one placement.

    one: decoding of a single request at its first tokens, the most that a user can see. all:
    decoding of every user at the longest context, together. prefill: prompt tokens of all requests
    together; prefill_without_link: with an infinitely fast interconnect.
    """

    one: Bound
    all: Bound
    prefill: Bound
    prefill_without_link: Bound


def compute_bounds(fit: Fit) -> Bounds | None:
    """Compute the bounds of a model on its placement; None without one."""
    if fit.placement is None:
        return None
    return Bounds(
        one=bound_decode(fit, 1, 0),
        all=bound_decode(fit, fit.memory.users, fit.memory.context),
        prefill=bound_prefill(fit, with_link=True),
        prefill_without_link=bound_prefill(fit, with_link=False),
    )


def bound_decode(fit: Fit, users: int, context: int) -> Bound:
    """Bound the tokens per second of `users` requests at `context` tokens each.

    The requests fill the pipeline in as many microbatches as it has stages, if there are enough.
    """
    assert fit.placement is not None
    microbatches = min(fit.placement.pp, users)
    stages = compute_decode_stages(fit, users / microbatches, context)
    slowest = max(stages, key=lambda stage: stage.seconds)
    round_seconds = max(sum(stage.seconds for stage in stages), microbatches * slowest.seconds)
    return Bound(tokens_per_s=users / round_seconds, limit=slowest.limit)


def compute_decode_stages(fit: Fit, batch: float, context: int) -> list[StageTime]:
    """Return the least time of each stage for `batch` requests, one token each."""
    assert fit.placement is not None
    model, gpu = fit.memory.model, fit.gpu
    tp, pp = fit.placement.tp, fit.placement.pp
    cache = compute_kv_per_gpu(model, context, fit.memory.kv, tp, pp)
    head = model.embedding if model.is_tied else model.head
    stages = []
    for number, indices in enumerate(iterate_stages(model, pp)):
        is_last = number == pp - 1
        layers = [model.layers[n] for n in indices]
        read = (
            sum(count_layer_bytes(layer, model.moe, batch, tp) for layer in layers)
            + batch * cache[number]
        )
        read += head.compute_bytes_per_rank(tp) if is_last else 0
        compute = sum(compute_layer_seconds(layer, model.moe, gpu, context) for layer in layers)
        compute += compute_matmul_seconds(head, gpu) if is_last else 0
        stages.append(
            StageTime(
                memory=read / gpu.bandwidth,
                arithmetic=batch * compute / tp,
                interconnect=batch * compute_link_seconds(model, gpu, tp, len(layers)),
            )
        )
    return stages


def bound_prefill(fit: Fit, *, with_link: bool) -> Bound:
    """Bound the prompt tokens per second of a full pipeline, by arithmetic and links.

    Reading the weights is spread over many tokens and not counted.
    """
    assert fit.placement is not None
    model, gpu, tp = fit.memory.model, fit.gpu, fit.placement.tp
    stages = []
    for indices in iterate_stages(model, fit.placement.pp):
        compute = sum(
            compute_prompt_seconds(model.layers[n], model.moe, gpu, fit.memory.context)
            for n in indices
        )
        link = compute_link_seconds(model, gpu, tp, len(indices)) if with_link else 0.0
        stages.append(StageTime(memory=0.0, arithmetic=compute / tp, interconnect=link))
    slowest = max(stages, key=lambda stage: stage.seconds)
    return Bound(tokens_per_s=1 / slowest.seconds, limit=slowest.limit)


# -------------------------------------------------------------------------------- bytes and flops


def count_layer_bytes(layer: Layer, moe: MoeConfig | None, batch: float, tp: int) -> float:
    """Count the weight bytes of a layer that a GPU reads for `batch` tokens.

    Of the routed experts, the expected number that the tokens are routed to.
    """
    fraction = moe.compute_expected_experts(batch) / moe.num_experts if moe else 1.0
    dense = layer.dense.compute_bytes_per_rank(tp)
    return dense + layer.routed.compute_bytes_per_rank(tp) * fraction


def count_active_bytes(model: Model, batch: float = 1.0) -> float:
    """Count the weight bytes that a step of `batch` tokens reads on all GPUs together.

    Without the embedding, of which a token reads one row.
    """
    head = (model.embedding if model.is_tied else model.head).n_bytes + model.other.n_bytes
    return head + sum(count_layer_bytes(layer, model.moe, batch, 1) for layer in model.layers)


def count_active_parameters(model: Model) -> int:
    """Count the parameters that compute for each token: top_k experts, and no embedding."""
    fraction = model.moe.top_k / model.moe.num_experts if model.moe else 1.0
    layers = sum(
        layer.dense.parameters + layer.routed.parameters * fraction for layer in model.layers
    )
    return round(layers + (model.embedding if model.is_tied else model.head).parameters)


def compute_matmul_seconds(weights: Weights, gpu: Gpu, fraction: float = 1.0) -> float:
    """Return the seconds of one GPU for one token: two flops per parameter.

    FP8 weights run at the FP8 rate if the GPU has one.
    """
    fp8 = weights.fp8_parameters if gpu.tflops.fp8 else 0
    fp8_seconds = 2 * fp8 / (gpu.tflops.fp8.value * TERA) if gpu.tflops.fp8 else 0.0
    bf16_seconds = 2 * (weights.parameters - fp8) / (gpu.tflops.bf16.value * TERA)
    return fraction * (fp8_seconds + bf16_seconds)


def compute_layer_seconds(layer: Layer, moe: MoeConfig | None, gpu: Gpu, context: float) -> float:
    """Return the seconds of one GPU for one token that attends to `context` tokens."""
    fraction = moe.top_k / moe.num_experts if moe else 1.0
    tokens = layer.attention.count_cached_tokens(int(context))
    attention = count_attention_flops(layer.attention, tokens) / (gpu.tflops.bf16.value * TERA)
    dense = compute_matmul_seconds(layer.dense, gpu)
    return dense + compute_matmul_seconds(layer.routed, gpu, fraction) + attention


def compute_prompt_seconds(layer: Layer, moe: MoeConfig | None, gpu: Gpu, context: int) -> float:
    """Return the seconds of one GPU for a token of a prompt, the mean over its positions."""
    window = layer.attention.window or context
    full = min(window, context)
    tokens = (full * (full + 1) / 2 + (context - full) * full) / context
    attention = count_attention_flops(layer.attention, tokens) / (gpu.tflops.bf16.value * TERA)
    return compute_layer_seconds(layer, moe, gpu, 0) + attention


def count_attention_flops(attention: Attention, tokens: float) -> float:
    """Count the flops of scores and weighted values of one token against `tokens` tokens."""
    return 2 * attention.heads * (attention.qk_head_dim + attention.v_head_dim) * tokens


def count_link_bytes(model: Model, tp: int, num_layers: int) -> float:
    """Count the bytes that a GPU sends per token.

    Two ring all-reduces per layer over `tp` GPUs: 2 (tp - 1) / tp of a vector each.
    """
    return 2 * num_layers * model.hidden_size * model.activation_bytes * 2 * (tp - 1) / tp


def compute_link_seconds(model: Model, gpu: Gpu, tp: int, num_layers: int) -> float:
    """Return the seconds of the links between GPUs for one token."""
    if tp == 1 or not gpu.link.one_way:
        return 0.0
    return count_link_bytes(model, tp, num_layers) / gpu.link.one_way
