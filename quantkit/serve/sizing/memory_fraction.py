"""The fraction of a GPU's memory that an engine gets, and the memory that a step may use.

vLLM's fraction (--gpu-memory-utilization) holds weights, cache and a step's activations; vLLM uses
nothing outside it. SGLang's (--mem-fraction-static) holds weights and cache; a step uses the rest.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import Literal

from quantkit.serve.sizing.fit import Fit, Placement
from quantkit.serve.sizing.gpus import GIB, Gpu

GpuEngine = Literal["vllm", "sglang"]
GPU_ENGINES: Mapping[GpuEngine, str] = {"vllm": "vLLM", "sglang": "SGLang"}
FRACTION_RANGE: Mapping[GpuEngine, tuple[float, float]] = {
    "vllm": (0.90, 0.96),
    "sglang": (0.85, 0.92),
}
"""The default fraction, and the largest one if the default is too small."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MemoryFraction:
    """A fraction of a GPU's memory.

    value: the fraction to set. required: the fraction that the plan needs. missing_bytes: the
    difference if the engine gets less than it needs.
    """

    value: float
    required: float
    missing_bytes: int


def compute_memory_fraction(fit: Fit, placement: Placement, engine: GpuEngine) -> MemoryFraction:
    """Compute the fraction to set: the default, or more if the plan needs more."""
    default, maximum = FRACTION_RANGE[engine]
    planned = placement.weights_bytes + placement.kv_bytes
    factor = 1 + fit.memory.margin if engine == "vllm" else 1
    required = planned * factor / fit.gpu.memory_bytes
    value = min(maximum, max(default, ceil(100 * required) / 100))
    missing = max(0, round((required - value) * fit.gpu.memory_bytes))
    return MemoryFraction(value=value, required=required, missing_bytes=missing)


def compute_step_memory(fit: Fit, placement: Placement, engine: GpuEngine) -> int:
    """Return the bytes of the fullest GPU that a step may use without shrinking the cache."""
    fraction = compute_memory_fraction(fit, placement, engine).value
    if engine == "sglang":
        return round((1 - fraction) * fit.gpu.memory_bytes)
    return round(fraction * fit.gpu.memory_bytes) - placement.weights_bytes - placement.kv_bytes


def get_default_batched_tokens(gpu: Gpu, engine: GpuEngine) -> int:
    """Return an engine's default number of tokens per step.

    vLLM 0.32: EngineArgs.get_batch_defaults, of its server. SGLang 0.5.23: chunked_prefill_size by
    memory.
    """
    gib = gpu.memory_bytes / GIB
    if engine == "vllm":
        return 16384 if gib >= 160 else 8192 if gib >= 70 and "A100" not in gpu.name else 2048
    return 2048 if gib < 35 else 4096 if gib < 60 else 8192 if gib < 160 else 16384
