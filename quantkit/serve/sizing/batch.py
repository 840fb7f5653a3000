"""How many tokens a step may hold: what activations need, against what the engine leaves for them.

All experts lie in memory, so a step takes the same for its weights whichever experts its tokens hit. Its workspace
grows with its tokens: each is copied top_k times, through the experts and back. Under tensor parallelism that is all,
and known before anybody is routed. Under expert parallelism a rank must hold what it is sent, and in the worst case the
tokens of all ranks are sent to one: top_k (or the experts of a rank, if fewer) copies each, of full width.
"""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.serve.sizing.fit import Fit
from quantkit.serve.sizing.memory_fraction import Server, left_for_steps
from quantkit.serve.sizing.model import Mixture, Model

RUNTIME_BYTES = 2_000_000_000
"""Taken off what is left for the CUDA context, communication buffers and CUDA graphs: assumed, not measured."""

RESERVE = 0.2  # share of what is free that advice leaves alone, for fragmentation
STEP = 256  # tokens: what advice is rounded down to
LOGIT_BYTES = 4  # float32, of each request's last token


@dataclass(frozen=True, kw_only=True)
class MaxBatchedTokens:
    """Tokens per step that fit into what an engine leaves of the fullest card; never more than all requests hold.

    per_token: bytes of one token's activations, of which `routed_per_token` are copies for experts; safe: under tensor
    parallelism, whatever is routed where; worst: of each rank under expert parallelism if one is sent everything; even:
    if all are sent alike. used: bytes of a step of `safe` tokens; left: what is
    free beside it, the reserve included.
    """

    free_bytes: int
    runtime_bytes: int
    reserve_bytes: int
    logits_bytes: int
    per_token: int
    routed_per_token: int
    safe: int
    worst: int
    even: int
    used: int
    left: int


def compute_max_batched_tokens(fit: Fit, server: Server) -> MaxBatchedTokens | None:
    """How many tokens a step of an engine may hold on the cards a mixture was placed on; None for dense models and no
    placement."""
    placement, model = fit.placement, fit.needs.model
    if placement is None or model.mixture is None:
        return None
    free = left_for_steps(fit, placement, server)
    logits = fit.needs.users * model.vocabulary * LOGIT_BYTES
    reserve = round(RESERVE * free)
    room = free - RUNTIME_BYTES - reserve - logits
    ranks = placement.tp
    other = plain_bytes(model, ranks)
    routed = routed_bytes(model, model.mixture, ranks)
    local = -(-model.mixture.count // ranks)
    arriving = min(model.mixture.top_k, local)
    worst = other + copies_bytes(
        model, model.mixture.intermediate, arriving * ranks
    )  # every rank's tokens meet here
    even = other + copies_bytes(model, model.mixture.intermediate, model.mixture.top_k)
    most = fit.needs.users * fit.needs.context
    safe = tokens(room, other + routed, most)
    used = safe * (other + routed)
    return MaxBatchedTokens(
        free_bytes=free,
        runtime_bytes=RUNTIME_BYTES,
        reserve_bytes=reserve,
        logits_bytes=logits,
        per_token=other + routed,
        routed_per_token=routed,
        safe=safe,
        worst=tokens(room, worst, most),
        even=tokens(room, even, most),
        used=used,
        left=free - RUNTIME_BYTES - logits - used,
    )


def tokens(room: int, per_token: int, most: int) -> int:
    """Tokens that fit, in whole steps, of `most` that there can be."""
    return min(most, max(0, room // per_token // STEP * STEP))


def routed_bytes(model: Model, mixture: Mixture, tp: int) -> int:
    """Copies of one token for its experts on one of `tp` ranks: as vLLM's Marlin experts lay them out.

    workspace13 [tokens x top_k, max(2 N, K)] and workspace2 [tokens x top_k, max(N, K)] with N = intermediate / tp and
    K = hidden (vLLM 0.32, model_executor/layers/fused_moe/experts/marlin_moe.py: MarlinExperts.workspace_shapes).
    """
    return copies_bytes(model, -(-mixture.intermediate // tp), mixture.top_k)


def copies_bytes(model: Model, width: int, copies: int) -> int:
    """`copies` of one token's vectors before and after experts of this width, and its sum."""
    each = max(2 * width, model.hidden) + max(width, model.hidden)
    return (copies * each + model.hidden) * model.activation_bytes


def plain_bytes(model: Model, tp: int) -> int:
    """Everything else that is alive for one token at the widest moment of a layer: residual and normed vectors, and
    queries, keys and values or the dense MLP, whichever is wider."""
    attention = model.layers[0].attention
    heads = attention.heads * (attention.qk_width + attention.v_width) // tp + attention.elements
    widest = max(heads, 3 * model.widest // tp)
    return (4 * model.hidden + widest) * model.activation_bytes
