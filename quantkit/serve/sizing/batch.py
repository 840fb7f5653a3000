"""Tokens per step: the memory of activations against the memory that the engine leaves for them.

All experts are in memory, so a step's weights take the same memory for any routing. Its workspace
grows with its tokens: each is copied top_k times, to the experts and back. Under tensor parallelism
that is all, and known before routing. Under expert parallelism a rank must hold the tokens that are
routed to it. In the worst case the tokens of all ranks are routed to one: top_k (or the experts of
a rank, if fewer) copies of each, at full width.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.serve.sizing.fit import Fit
from quantkit.serve.sizing.memory_fraction import GpuEngine, compute_step_memory
from quantkit.serve.sizing.model import Model, MoeConfig

RUNTIME_BYTES = 2_000_000_000
"""Memory of the CUDA context, communication buffers and CUDA graphs: assumed, not measured."""

RESERVE_FRACTION = 0.2  # of the step's memory that stays free, for fragmentation
TOKEN_MULTIPLE = 256  # limits are rounded down to it
LOGIT_BYTES = 4  # float32, of each request's last token


@dataclass(frozen=True, kw_only=True)
class MaxBatchedTokens:
    """Limits of the tokens per step on the fullest GPU; at most the tokens of all requests.

    bytes_per_token: activations of one token; expert_bytes_per_token: those of them that are copies
    for experts. safe: under tensor parallelism, for any routing. even, worst: per rank under expert
    parallelism, if tokens are spread evenly, or if all are routed to one rank. used_bytes: of a
    step of `safe` tokens; left_bytes: memory left by it, including the reserve.
    """

    free_bytes: int
    runtime_bytes: int
    reserve_bytes: int
    logits_bytes: int
    bytes_per_token: int
    expert_bytes_per_token: int
    safe: int
    worst: int
    even: int
    used_bytes: int
    left_bytes: int


def compute_max_batched_tokens(fit: Fit, engine: GpuEngine) -> MaxBatchedTokens | None:
    """Compute the tokens per step of an engine; None for dense models and without a placement."""
    placement, model = fit.placement, fit.memory.model
    if placement is None or model.moe is None:
        return None
    moe, ranks = model.moe, placement.tp
    free = compute_step_memory(fit, placement, engine)
    logits = fit.memory.users * model.vocab_size * LOGIT_BYTES
    reserve = round(RESERVE_FRACTION * free)
    room = free - RUNTIME_BYTES - reserve - logits
    layer_bytes = compute_layer_bytes(model, ranks)
    expert_bytes = compute_expert_bytes(model, moe, ranks)
    local_experts = -(-moe.num_experts // ranks)
    copies = min(moe.top_k, local_experts) * ranks  # the tokens of every rank arrive at one
    worst = layer_bytes + compute_copy_bytes(model, moe.intermediate_size, copies)
    even = layer_bytes + compute_copy_bytes(model, moe.intermediate_size, moe.top_k)
    maximum = fit.memory.users * fit.memory.context
    safe = count_tokens_that_fit(room, layer_bytes + expert_bytes, maximum)
    used = safe * (layer_bytes + expert_bytes)
    return MaxBatchedTokens(
        free_bytes=free,
        runtime_bytes=RUNTIME_BYTES,
        reserve_bytes=reserve,
        logits_bytes=logits,
        bytes_per_token=layer_bytes + expert_bytes,
        expert_bytes_per_token=expert_bytes,
        safe=safe,
        worst=count_tokens_that_fit(room, worst, maximum),
        even=count_tokens_that_fit(room, even, maximum),
        used_bytes=used,
        left_bytes=free - RUNTIME_BYTES - logits - used,
    )


def count_tokens_that_fit(room: int, bytes_per_token: int, maximum: int) -> int:
    """Return the tokens that fit, rounded down to TOKEN_MULTIPLE, at most `maximum`."""
    return min(maximum, max(0, room // bytes_per_token // TOKEN_MULTIPLE * TOKEN_MULTIPLE))


def compute_expert_bytes(model: Model, moe: MoeConfig, tp: int) -> int:
    """Return the bytes of one token's copies for its experts on one of `tp` ranks.

    As in vLLM's Marlin experts: workspace13 [tokens x top_k, max(2 N, K)] and workspace2
    [tokens x top_k, max(N, K)] with N = intermediate_size / tp and K = hidden_size (vLLM 0.32,
    model_executor/layers/fused_moe/experts/marlin_moe.py: MarlinExperts.workspace_shapes).
    """
    return compute_copy_bytes(model, -(-moe.intermediate_size // tp), moe.top_k)


def compute_copy_bytes(model: Model, width: int, copies: int) -> int:
    """Return the bytes of `copies` of one token's vectors before and after experts, and its sum."""
    per_copy = max(2 * width, model.hidden_size) + max(width, model.hidden_size)
    return (copies * per_copy + model.hidden_size) * model.activation_bytes


def compute_layer_bytes(model: Model, tp: int) -> int:
    """Return the bytes of one token's other activations at the widest point of a layer.

    Residual and normed vectors, and the wider of queries, keys and values or the dense MLP.
    """
    attention = model.layers[0].attention
    heads = attention.heads * (attention.qk_head_dim + attention.v_head_dim) // tp
    widest = max(heads + attention.kv_elements, 3 * model.max_intermediate_size // tp)
    return (4 * model.hidden_size + widest) * model.activation_bytes
