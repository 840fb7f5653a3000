"""Results of sizing as plain values for JSON."""

from __future__ import annotations

from quantkit.serve.sizing.batch import MaxBatchedTokens, compute_max_batched_tokens
from quantkit.serve.sizing.fit import Fit
from quantkit.serve.sizing.memory import MemoryEstimate
from quantkit.serve.sizing.memory_fraction import GPU_ENGINES
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.roofline import Bounds, count_active_bytes, count_active_parameters

Json = dict[str, object]


def serialize_model(model: Model) -> Json:
    """Return the model: sizes in bytes, parameters, experts."""
    moe = model.moe
    return {
        "name": model.name,
        "model_type": model.model_type,
        "scheme": model.scheme,
        "read_from": model.read_from,
        "parameters": model.weights.parameters,
        "active_parameters": count_active_parameters(model),
        "weights_bytes": model.weights.n_bytes,
        "mtp_bytes": model.mtp.n_bytes,
        "active_bytes": round(count_active_bytes(model)),
        "longest_context": model.max_context,
        "experts": {"count": moe.num_experts, "top_k": moe.top_k, "layers": moe.num_layers}
        if moe
        else None,
    }


def serialize_memory(memory: MemoryEstimate) -> Json:
    """Return the memory by part, in bytes."""
    return {
        "context": memory.context,
        "users": memory.users,
        "kv": memory.kv,
        "margin": memory.margin,
        "weights_bytes": memory.weights_bytes,
        "kv_bytes_per_token": memory.kv_bytes_per_token,
        "kv_bytes_per_user": memory.kv_bytes_per_user,
        "kv_bytes": memory.kv_bytes,
        "margin_bytes": memory.margin_bytes,
        "total_bytes": memory.total_bytes,
        "speculative": memory.speculative,
    }


def serialize_fit(key: str, fit: Fit, bounds: Bounds | None) -> Json:
    """Return a GPU: whether and how the model fits, and its computed bounds.

    price_usd is the price of the GPUs alone. one_card_context is 0 if one GPU does not hold the
    weights.
    """
    placement = fit.placement
    limits = {
        engine: limit
        for engine in GPU_ENGINES
        if (limit := compute_max_batched_tokens(fit, engine))
    }
    return {
        "card": key,
        "name": fit.gpu.name,
        "memory_bytes": fit.gpu.memory_bytes,
        "served": fit.gpu.served,
        "fits": placement is not None,
        "one_card": fit.fits_single_gpu,
        "least_cards": fit.min_gpus,
        "cards": placement.gpus if placement else None,
        "nodes": placement.nodes if placement else None,
        "price_usd": placement.gpus * fit.gpu.price_usd.value if placement else None,
        "watts": placement.gpus * fit.gpu.watts.value if placement else None,
        "tensor_parallel": placement.tp if placement else None,
        "pipeline_parallel": placement.pp if placement else None,
        "allowed_tensor_parallel": list(fit.tensor_parallel_sizes),
        "refused_tensor_parallel": {
            str(config.tp): config.fault for config in fit.parallel_configs if config.fault
        },
        "weights_bytes_per_card": placement.weights_bytes if placement else None,
        "kv_bytes_per_card": placement.kv_bytes if placement else None,
        "max_context": fit.max_context,
        "max_users": fit.max_users,
        "one_card_context": fit.single_gpu_context,
        "bounds": serialize_bounds(bounds) if bounds else None,
        "tokens_per_step": {
            engine: serialize_max_batched_tokens(limit) for engine, limit in limits.items()
        }
        or None,
    }


def serialize_max_batched_tokens(limit: MaxBatchedTokens) -> Json:
    """Return the tokens per step of an engine."""
    return {
        "safe": limit.safe,
        "expert_parallel_even": limit.even,
        "expert_parallel_worst": limit.worst,
        "bytes_per_token": limit.bytes_per_token,
        "free_bytes": limit.free_bytes,
        "left_bytes": limit.left_bytes,
    }


def serialize_bounds(bounds: Bounds) -> Json:
    """Return the computed upper bounds in tokens per second, with their limits."""
    named = {"decode_one": bounds.one, "decode_all": bounds.all, "prefill": bounds.prefill}
    return {
        "computed": True,
        **{
            name: {"tokens_per_s": bound.tokens_per_s, "limit": bound.limit}
            for name, bound in named.items()
        },
    }
