"""What sizing found, as plain values for JSON."""

from __future__ import annotations

from quantkit.serve.sizing.batch import MaxBatchedTokens, compute_max_batched_tokens
from quantkit.serve.sizing.fit import Fit
from quantkit.serve.sizing.memory import MemoryEstimate
from quantkit.serve.sizing.memory_fraction import GPU_ENGINES
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.roofline import Bounds, active_bytes, active_parameters

Json = dict[str, object]


def serialize_model(model: Model) -> Json:
    """The model: sizes in bytes, parameters, experts."""
    mixture = model.mixture
    return {
        "name": model.name,
        "model_type": model.model_type,
        "scheme": model.scheme,
        "read_from": model.read_from,
        "parameters": model.weights.parameters,
        "active_parameters": active_parameters(model),
        "weights_bytes": model.weights.n_bytes,
        "mtp_bytes": model.mtp.n_bytes,
        "active_bytes": round(active_bytes(model)),
        "longest_context": model.longest,
        "experts": {"count": mixture.count, "top_k": mixture.top_k, "layers": mixture.layers}
        if mixture
        else None,
    }


def serialize_memory(needs: MemoryEstimate) -> Json:
    """Memory, part by part, in bytes."""
    return {
        "context": needs.context,
        "users": needs.users,
        "kv": needs.kv,
        "margin": needs.margin,
        "weights_bytes": needs.weights_bytes,
        "kv_bytes_per_token": needs.kv_bytes_per_token,
        "kv_bytes_per_user": needs.kv_bytes_per_user,
        "kv_bytes": needs.kv_bytes,
        "margin_bytes": needs.margin_bytes,
        "total_bytes": needs.total_bytes,
        "speculative": needs.speculative,
    }


def serialize_fit(key: str, fit: Fit, made: Bounds | None) -> Json:
    """A card: whether and how the model fits, and its bounds; bounds are computed, not measured."""
    placement = fit.placement
    advised = {
        server: found
        for server in GPU_ENGINES
        if (found := compute_max_batched_tokens(fit, server))
    }
    return {
        "card": key,
        "name": fit.card.name,
        "memory_bytes": fit.card.memory_bytes,
        "served": fit.card.served,
        "fits": placement is not None,
        "one_card": fit.one_card,
        "least_cards": fit.least_cards,
        "cards": placement.cards if placement else None,
        "nodes": placement.nodes if placement else None,
        "price_usd": placement.cards * fit.card.price_usd.value
        if placement
        else None,  # of the cards alone
        "watts": placement.cards * fit.card.watts.value if placement else None,
        "tensor_parallel": placement.tp if placement else None,
        "pipeline_parallel": placement.pp if placement else None,
        "allowed_tensor_parallel": list(fit.allowed),
        "refused_tensor_parallel": {str(d.tp): d.fault for d in fit.degrees if d.fault},
        "weights_bytes_per_card": placement.weights_bytes if placement else None,
        "kv_bytes_per_card": placement.kv_bytes if placement else None,
        "max_context": fit.max_context,
        "max_users": fit.max_users,
        "one_card_context": fit.one_card_context,  # 0: one card does not hold the weights
        "bounds": bounds_values(made) if made else None,
        "tokens_per_step": {server: advice_values(found) for server, found in advised.items()}
        or None,
    }


def advice_values(found: MaxBatchedTokens) -> Json:
    """Tokens per step of an engine."""
    return {
        "safe": found.safe,
        "expert_parallel_even": found.even,
        "expert_parallel_worst": found.worst,
        "bytes_per_token": found.per_token,
        "free_bytes": found.free_bytes,
        "left_bytes": found.left,
    }


def bounds_values(made: Bounds) -> Json:
    """Computed upper bounds in tokens per second, with what limits them."""
    named = {"decode_one": made.one, "decode_all": made.all, "prefill": made.prefill}
    return {
        "computed": True,
        **{
            name: {"tokens_per_s": bound.tokens_per_s, "limit": bound.limit}
            for name, bound in named.items()
        },
    }
