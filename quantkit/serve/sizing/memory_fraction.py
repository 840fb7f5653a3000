"""The share of a card's memory that an engine is given, and what of it is left for a step.

vLLM's share (--gpu-memory-utilization) holds weights, cache and a step's activations; beside it is nothing of vLLM's.
SGLang's (--mem-fraction-static) holds weights and cache; a step takes what is beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from quantkit.serve.sizing.fit import Fit, Placement
from quantkit.serve.sizing.gpus import GIB, Gpu

Server = Literal["vllm", "sglang"]
GPU_ENGINES: Mapping[Server, str] = {"vllm": "vLLM", "sglang": "SGLang"}
USUAL: Mapping[Server, tuple[float, float]] = {"vllm": (0.90, 0.96), "sglang": (0.85, 0.92)}
"""The share that is asked for where it is enough, and the most where it is not."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Share:
    """value: of a card's memory; needed: what the plan takes; missing: bytes of it that the engine is not given."""

    value: float
    needed: float
    missing: int


def share_of(fit: Fit, placement: Placement, server: Server) -> Share:
    """The share to ask for: the usual one, more where the plan needs more."""
    usual, most = USUAL[server]
    held = placement.weights_bytes + placement.kv_bytes
    needed = held * (1 + fit.needs.margin if server == "vllm" else 1) / fit.card.memory_bytes
    value = min(most, max(usual, ceil(100 * needed) / 100))
    return Share(
        value=value, needed=needed, missing=max(0, round((needed - value) * fit.card.memory_bytes))
    )


def left_for_steps(fit: Fit, placement: Placement, server: Server) -> int:
    """Bytes of the fullest card that a step may take without the planned cache getting smaller."""
    share = share_of(fit, placement, server).value
    if server == "sglang":
        return round((1 - share) * fit.card.memory_bytes)
    return round(share * fit.card.memory_bytes) - placement.weights_bytes - placement.kv_bytes


def usual_step(card: Gpu, server: Server) -> int:
    """Tokens of a step when nobody says otherwise: vLLM 0.32 (EngineArgs.get_batch_defaults, of its server), SGLang
    0.5.23 (chunked_prefill_size by memory)."""
    gib = card.memory_bytes / GIB
    if server == "vllm":
        return 16384 if gib >= 160 else 8192 if gib >= 70 and "A100" not in card.name else 2048
    return 2048 if gib < 35 else 4096 if gib < 60 else 8192 if gib < 160 else 16384
