"""Placement of a model on GPUs: tensor and pipeline parallelism, longest context, most users.

A group of tp x pp GPUs holds one copy of the model: each layer is split into tp parts, and the
layers are distributed over pp stages (as in vLLM). KV heads are split over as many ranks as there
are heads; every rank holds the whole latent cache (MLA).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from math import ceil

from quantkit.serve.sizing.gpus import Gpu
from quantkit.serve.sizing.memory import MemoryEstimate
from quantkit.serve.sizing.model import KV_BYTES, Attention, KvDtype, Model

MAX_NODES = 16  # one copy of a model is not served on more
MAX_USERS = 1_000_000


@dataclass(frozen=True, kw_only=True, slots=True)
class ParallelConfig:
    """A tensor-parallel size, and why engines reject it; fault: None if they accept it."""

    tp: int
    fault: str | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Placement:
    """The GPUs of one copy of a model, and the bytes on the fullest of them without the margin."""

    tp: int
    pp: int
    nodes: int
    weights_bytes: int
    kv_bytes: int

    @property
    def gpus(self) -> int:
        return self.tp * self.pp


@dataclass(frozen=True, kw_only=True)
class Fit:
    """A model on a kind of GPU.

    min_gpus: total bytes / memory, rounded up, ignoring sharding. placement: the first of
    `iterate_candidates` that holds the model, None if there is none up to MAX_NODES nodes.
    single_gpu_context: the longest context on a single GPU, 0 if it does not hold the weights.
    max_context: for the planned users, max_users: at the planned context, on the placement's GPUs.
    """

    memory: MemoryEstimate
    gpu: Gpu
    min_gpus: int
    parallel_configs: tuple[ParallelConfig, ...]
    placement: Placement | None
    single_gpu_context: int
    max_context: int | None = None
    max_users: int | None = None

    @property
    def fits_single_gpu(self) -> bool:
        """Whether a single GPU is enough."""
        return self.placement is not None and self.placement.gpus == 1

    @property
    def tensor_parallel_sizes(self) -> tuple[int, ...]:
        """Tensor-parallel sizes that engines accept, up to two nodes."""
        return tuple(config.tp for config in self.parallel_configs if config.fault is None)


def fit_model(memory: MemoryEstimate, gpu: Gpu) -> Fit:
    """Find the fewest GPUs that hold the model with its cache and margin, and their limits."""
    configs = tuple(
        ParallelConfig(tp=tp, fault=find_tensor_parallel_fault(memory.model, tp))
        for tp in list_tensor_parallel_sizes(gpu)
    )
    allowed = [config.tp for config in configs if config.fault is None]
    placement = find_placement(memory, gpu, allowed)
    return Fit(
        memory=memory,
        gpu=gpu,
        min_gpus=ceil(memory.total_bytes / gpu.memory_bytes),
        parallel_configs=configs,
        placement=placement,
        single_gpu_context=compute_single_gpu_context(memory, gpu),
        max_context=compute_max_context(memory, gpu, placement) if placement else None,
        max_users=compute_max_users(memory, gpu, placement) if placement else None,
    )


def list_tensor_parallel_sizes(gpu: Gpu) -> list[int]:
    """Return the sizes to check: all within a node, and two nodes."""
    sizes = [*range(1, gpu.per_node + 1), *([2 * gpu.per_node] if gpu.per_node > 1 else [])]
    return list(dict.fromkeys(sizes))


def find_tensor_parallel_fault(model: Model, tp: int) -> str | None:
    """Return why engines reject `tp` ranks for this model; None if they accept it."""
    if tp == 1:
        return None  # nothing is split, and blocks at an edge may be smaller
    attention = model.layers[0].attention
    if attention.kind == "grouped" and attention.kv_heads % tp and tp % attention.kv_heads:
        return f"{attention.kv_heads} KV heads and {tp} ranks: neither divides the other"
    faults = (constraint.find_fault(tp) for constraint in model.sharding_constraints)
    return next((fault for fault in faults if fault), None)


# ---------------------------------------------------------------------------------- bytes per GPU


def iterate_stages(model: Model, pp: int) -> Iterator[range]:
    """Yield the layers of each pipeline stage.

    Equal shares; the rest goes to the stages before the last, from the last but one backwards, as
    in vLLM.
    """
    share, rest = divmod(len(model.layers), pp)
    start = 0
    for stage in range(pp):
        extra = 1 if pp - 1 - rest <= stage < pp - 1 else 0
        yield range(start, start + share + extra)
        start += share + extra


def compute_weights_per_gpu(memory: MemoryEstimate, tp: int, pp: int) -> list[float]:
    """Return the weight bytes on each GPU of a stage, by stage; the MTP block is on the last."""
    model, n_bytes = memory.model, list[float]()
    for number, layers in enumerate(iterate_stages(model, pp)):
        total = sum(
            model.layers[n].dense.compute_bytes_per_rank(tp)
            + model.layers[n].routed.compute_bytes_per_rank(tp)
            for n in layers
        )
        if number == 0 or (number == pp - 1 and model.is_tied):
            total += model.embedding.compute_bytes_per_rank(tp)
        if number == pp - 1:
            total += model.head.compute_bytes_per_rank(tp) + model.other.compute_bytes_per_rank(1)
            total += model.mtp.compute_bytes_per_rank(tp) if memory.speculative else 0
        n_bytes.append(total)
    return n_bytes


def count_kv_shards(attention: Attention, tp: int) -> int:
    """Return the number of parts into which `tp` ranks split the cache of a layer."""
    return min(tp, attention.kv_heads) if attention.kind == "grouped" else 1


def compute_kv_per_gpu(model: Model, context: int, kv: KvDtype, tp: int, pp: int) -> list[float]:
    """Return the cache bytes of one request on each GPU of a stage, by stage."""
    per_layer = [
        layer.attention.kv_elements
        * layer.attention.count_cached_tokens(context)
        * KV_BYTES[kv]
        / count_kv_shards(layer.attention, tp)
        for layer in model.layers
    ]
    return [sum(per_layer[n] for n in layers) for layers in iterate_stages(model, pp)]


def compute_fullest_gpu(
    memory: MemoryEstimate, tp: int, pp: int, context: int, users: int
) -> tuple[float, float]:
    """Return the bytes of weights and of cache on the fullest GPU."""
    weights = compute_weights_per_gpu(memory, tp, pp)
    per_user = compute_kv_per_gpu(memory.model, context, memory.kv, tp, pp)
    cache = [users * n_bytes for n_bytes in per_user]
    return max(zip(weights, cache, strict=True), key=sum)


def is_placeable(
    memory: MemoryEstimate, gpu: Gpu, tp: int, pp: int, context: int, users: int
) -> bool:
    """Return whether the fullest GPU holds its part with the margin."""
    n_bytes = sum(compute_fullest_gpu(memory, tp, pp, context, users))
    return n_bytes * (1 + memory.margin) <= gpu.memory_bytes


# ----------------------------------------------------------------------------------------- search


def find_placement(memory: MemoryEstimate, gpu: Gpu, allowed: Sequence[int]) -> Placement | None:
    """Return the first of `iterate_candidates` that holds the model."""
    context, users = memory.context, memory.users
    for tp, pp, nodes in iterate_candidates(gpu, allowed, len(memory.model.layers)):
        if is_placeable(memory, gpu, tp, pp, context, users):
            weights, cache = compute_fullest_gpu(memory, tp, pp, context, users)
            return Placement(
                tp=tp, pp=pp, nodes=nodes, weights_bytes=round(weights), kv_bytes=round(cache)
            )
    return None


def iterate_candidates(
    gpu: Gpu, allowed: Sequence[int], num_layers: int
) -> Iterator[tuple[int, int, int]]:
    """Yield (tp, pp, nodes) from few GPUs to many.

    First tensor parallelism in one node, then with pipeline stages, then whole nodes. Stages take a
    node, or a half or a quarter of it: servers are not sold with seven of eight GPUs, and few
    stages have lower latency.
    """
    inside = [tp for tp in allowed if tp <= gpu.per_node]
    for tp in inside:
        yield tp, 1, 1
    depths = range(2, min(num_layers, gpu.per_node) + 1)
    pairs = [(tp, pp) for tp in inside for pp in depths if gpu.per_node % (tp * pp) == 0]
    for tp, pp in sorted(pairs, key=lambda pair: (pair[0] * pair[1], pair[1])):
        yield tp, pp, 1
    if gpu.link.kind == "none":
        return  # a single machine
    widest = max(tp for tp in inside if gpu.per_node % tp == 0)
    for nodes in range(2, MAX_NODES + 1):
        pp = nodes * gpu.per_node // widest
        if pp <= num_layers:
            yield widest, pp, nodes


@dataclass(frozen=True, kw_only=True, slots=True)
class TensorParallelShortfall:
    """The memory that a whole node lacks to hold a model by tensor parallelism alone.

    missing_bytes: per GPU. fits_fp8_cache: whether it would fit with an FP8 cache. max_users: users
    that would fit. is_latent: whether every rank holds the whole cache.
    """

    tp: int
    missing_bytes: int
    fits_fp8_cache: bool
    max_users: int
    is_latent: bool


def find_shortfall(fit: Fit) -> TensorParallelShortfall | None:
    """Return the shortfall of tensor parallelism over a node if pipeline stages were chosen.

    None if there are no stages, or if neither an FP8 cache nor fewer users would avoid them.
    """
    memory, gpu, tp = fit.memory, fit.gpu, fit.gpu.per_node
    is_staged = fit.placement is not None and fit.placement.pp > 1
    if not is_staged or tp not in fit.tensor_parallel_sizes:
        return None
    context, users = memory.context, memory.users
    n_bytes = sum(compute_fullest_gpu(memory, tp, 1, context, users)) * (1 + memory.margin)
    max_users = find_largest(users, lambda n: is_placeable(memory, gpu, tp, 1, context, n))
    fits_fp8_cache = is_placeable(replace(memory, kv="fp8"), gpu, tp, 1, context, users)
    if not fits_fp8_cache and not max_users:
        return None
    return TensorParallelShortfall(
        tp=tp,
        missing_bytes=round(n_bytes - gpu.memory_bytes),
        fits_fp8_cache=fits_fp8_cache,
        max_users=max_users,
        is_latent=memory.model.layers[0].attention.kind == "latent",
    )


def compute_max_context(memory: MemoryEstimate, gpu: Gpu, placement: Placement) -> int:
    """Return the longest context of every user that fits, at most the model's."""
    tp, pp = placement.tp, placement.pp
    limit = memory.model.max_context or 2**24
    return find_largest(limit, lambda n: is_placeable(memory, gpu, tp, pp, n, memory.users))


def compute_single_gpu_context(memory: MemoryEstimate, gpu: Gpu) -> int:
    """Return the longest context of every user on one GPU; 0 if it does not hold the weights."""
    limit = memory.model.max_context or 2**24
    return find_largest(limit, lambda n: is_placeable(memory, gpu, 1, 1, n, memory.users))


def compute_max_users(memory: MemoryEstimate, gpu: Gpu, placement: Placement) -> int:
    """Return the most concurrent requests of the planned context."""
    tp, pp = placement.tp, placement.pp
    return find_largest(MAX_USERS, lambda n: is_placeable(memory, gpu, tp, pp, memory.context, n))


def find_largest(limit: int, holds: Callable[[int], bool]) -> int:
    """Return the largest number up to `limit` for which `holds` is true; 0 if it is never true.

    `holds` must be true for all smaller numbers too.
    """
    low, high = 0, limit
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if holds(middle) else (low, middle - 1)
    return low
