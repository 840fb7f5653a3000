"""The command of an engine, each flag with its reason.

Flags were read in vLLM 0.32 (engine/arg_utils.py, config/cache.py, config/scheduler.py) and SGLang
0.5.23 (srt/arg_groups/fields/). Both are configured so that the lower priority number runs first,
as in the gateway.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import UsageError
from quantkit.formats.common.engine_names import DISABLE_SHARED_FUSION, SERVERS
from quantkit.serve.engines.target import Target
from quantkit.serve.sizing.batch import TOKEN_MULTIPLE, compute_max_batched_tokens
from quantkit.serve.sizing.fit import Fit, Placement, find_shortfall, fit_model
from quantkit.serve.sizing.gpus import Gpu
from quantkit.serve.sizing.memory import MemoryEstimate, format_users
from quantkit.serve.sizing.memory_fraction import (
    GpuEngine,
    compute_memory_fraction,
    get_default_batched_tokens,
)
from quantkit.serve.sizing.tables import format_shortfall

Engine = Literal["vllm", "sglang", "transformers"]
ENGINE_NAMES: dict[Engine, str] = {
    "vllm": "vLLM",
    "sglang": "SGLang",
    "transformers": "transformers",
}
MASTER = "MASTER"
"""The placeholder of the first node's address in a command for several nodes."""
MASTER_PORT = 29501


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """A flag, its value ("" for a switch), and its reason."""

    name: str
    value: str
    reason: str

    @property
    def arguments(self) -> tuple[str, ...]:
        return (self.name, self.value) if self.value else (self.name,)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The command of an engine.

    `base` and `flags` are the same on every node; `per_node` has the flags that differ, one entry
    per node.
    """

    engine: Engine
    base: tuple[str, ...]
    flags: tuple[Flag, ...]
    placement: Placement | None = None
    per_node: tuple[tuple[Flag, ...], ...] = ((),)
    notes: tuple[str, ...] = ()

    def get_command(self, node: int = 0) -> list[str]:
        """Return the command as a list of arguments."""
        return [
            *self.base,
            *(word for flag in (*self.flags, *self.per_node[node]) for word in flag.arguments),
        ]

    def format_command(self, node: int = 0) -> str:
        """Return the command for a shell, one flag per line."""
        flags = [shlex.join(flag.arguments) for flag in (*self.flags, *self.per_node[node])]
        return " \\\n  ".join([shlex.join(self.base), *flags])


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """The address of an engine, the model's name in the API, and the path of the weights."""

    host: str
    port: int
    name: str
    path: str


def fit_or_raise(memory: MemoryEstimate, gpu: Gpu) -> Fit:
    """Fit a model on GPUs; UsageError if no number of GPUs holds it."""
    fit = fit_model(memory, gpu)
    if fit.placement is None:
        raise UsageError(
            f"{memory.model.name}: {format_users(memory.users)} of {memory.context:,} tokens: "
            f"{memory.total_bytes / 1e9:,.0f} GB fit on no number of {gpu.name} GPUs that engines "
            "can shard it to; lower --context or --users, or name another --gpu "
            "(`quantkit size` compares them)"
        )
    return fit


def make_launch(
    engine: Literal["vllm", "sglang"],
    target: Target,
    memory: MemoryEstimate,
    fit: Fit,
    endpoint: Endpoint,
) -> Launch:
    """Make the command of vLLM or SGLang for a placement."""
    placement = fit.placement
    assert placement is not None
    iterate_flags = iterate_vllm_flags if engine == "vllm" else iterate_sglang_flags
    base = shlex.split(SERVERS[ENGINE_NAMES[engine]].format(path=shlex.quote(endpoint.path)))
    return Launch(
        engine=engine,
        base=tuple(base),
        flags=(
            *iterate_address_flags(endpoint),
            *iterate_flags(memory, fit, placement),
            *(iterate_fusion_flags(target) if engine == "sglang" else ()),
        ),
        placement=placement,
        per_node=make_node_flags(engine, placement),
        notes=tuple(iterate_notes(target, fit)),
    )


def iterate_address_flags(endpoint: Endpoint) -> Iterator[Flag]:
    """Yield the flags of the address and of the model's name."""
    yield Flag(name="--host", value=endpoint.host, reason="address to listen on")
    yield Flag(name="--port", value=str(endpoint.port), reason="port to listen on")
    yield Flag(name="--served-model-name", value=endpoint.name, reason="`model` in requests")


def iterate_vllm_flags(memory: MemoryEstimate, fit: Fit, placement: Placement) -> Iterator[Flag]:
    """Yield vLLM's flags in the order of `vllm serve --help`."""
    yield Flag(name="--max-model-len", value=str(memory.context), reason=explain_context(memory))
    yield from iterate_parallel_flags(
        placement, "--tensor-parallel-size", "--pipeline-parallel-size", fit
    )
    fraction, reason = format_memory_fraction(fit, placement, "vllm")
    yield Flag(
        name="--gpu-memory-utilization",
        value=fraction,
        reason=f"weights, cache and workspace: {reason}",
    )
    yield from iterate_batch_flags(fit, "vllm", "--max-num-batched-tokens")
    dtype = "fp8" if memory.kv == "fp8" else "auto"
    yield Flag(name="--kv-cache-dtype", value=dtype, reason=explain_cache(memory))
    yield Flag(
        name="--enable-prefix-caching", value="", reason="prompts with a common prefix share cache"
    )
    yield Flag(
        name="--max-num-seqs", value=str(memory.users), reason="concurrent requests; others wait"
    )
    yield Flag(
        name="--scheduling-policy",
        value="priority",
        reason="honours a request's `priority`, lower first",
    )


def iterate_sglang_flags(memory: MemoryEstimate, fit: Fit, placement: Placement) -> Iterator[Flag]:
    """Yield SGLang's flags. Its prefix cache (RadixAttention) is on by default."""
    yield Flag(name="--context-length", value=str(memory.context), reason=explain_context(memory))
    yield from iterate_parallel_flags(placement, "--tp-size", "--pp-size", fit)
    fraction, reason = format_memory_fraction(fit, placement, "sglang")
    yield Flag(name="--mem-fraction-static", value=fraction, reason=f"weights and cache: {reason}")
    yield from iterate_batch_flags(fit, "sglang", "--chunked-prefill-size")
    dtype = "fp8_e4m3" if memory.kv == "fp8" else "auto"
    yield Flag(name="--kv-cache-dtype", value=dtype, reason=explain_cache(memory))
    yield Flag(
        name="--max-running-requests",
        value=str(memory.users),
        reason="concurrent requests; others wait",
    )
    yield Flag(
        name="--enable-priority-scheduling", value="", reason="honours a request's `priority`"
    )
    yield Flag(
        name="--schedule-low-priority-values-first",
        value="",
        reason="lower first, as in vLLM and the gateway",
    )
    yield Flag(
        name="--default-priority-value",
        value="0",
        reason="the default priority of vLLM for requests without one",
    )
    yield Flag(
        name="--enable-metrics", value="", reason="/metrics, with the prefix cache's hit rate"
    )


def iterate_parallel_flags(
    placement: Placement, tensor: str, pipeline: str, fit: Fit
) -> Iterator[Flag]:
    """Yield the flags of tensor and pipeline parallelism, by the engine's names for them."""
    sizes = ", ".join(map(str, fit.tensor_parallel_sizes))
    yield Flag(name=tensor, value=str(placement.tp), reason=f"this model allows {sizes}")
    if placement.pp > 1:
        yield Flag(
            name=pipeline,
            value=str(placement.pp),
            reason=f"{placement.gpus} GPUs on {placement.nodes} node(s)",
        )


def format_memory_fraction(fit: Fit, placement: Placement, engine: GpuEngine) -> tuple[str, str]:
    """Return the fraction of a GPU's memory for the engine, and its reason."""
    fraction = compute_memory_fraction(fit, placement, engine)
    margin = f" x {1 + fit.memory.margin:g}" if engine == "vllm" else ""
    sizes = f"({placement.weights_bytes / 1e9:.1f} + {placement.kv_bytes / 1e9:.1f}){margin}"
    memory = fit.gpu.memory_bytes / 1e9
    reason = f"{sizes} of {memory:.0f} GB per GPU = {fraction.required:.2f}"
    if fraction.missing_bytes:
        missing = f"{fraction.missing_bytes / 1e9:.2f} GB are missing"
        reason += f", limited to {fraction.value:.2f}: {missing}"
    else:
        reason += "; the rest becomes cache"
    return f"{fraction.value:.2f}", reason


def iterate_batch_flags(fit: Fit, engine: GpuEngine, name: str) -> Iterator[Flag]:
    """Yield the flag of the tokens per step, if the engine's default exceeds the free memory."""
    limit = compute_max_batched_tokens(fit, engine)
    default = get_default_batched_tokens(fit.gpu, engine)
    if limit is None or limit.safe >= min(default, fit.memory.users * fit.memory.context):
        return
    # Each request decodes one token per step.
    minimum = -(-fit.memory.users // TOKEN_MULTIPLE) * TOKEN_MULTIPLE
    reason = (
        f"{limit.bytes_per_token:,} bytes per token; {default:,}, the default, exceed the memory "
        "that the cache leaves"
    )
    if limit.safe < minimum:
        reason += ", and so may these: lower --users"
    yield Flag(name=name, value=str(max(minimum, limit.safe)), reason=reason)


def explain_context(memory: MemoryEstimate) -> str:
    """Explain the context length."""
    maximum = memory.model.max_context
    return (
        f"longest request, prompt and output; the model allows {maximum:,}"
        if maximum
        else "longest request"
    )


def explain_cache(memory: MemoryEstimate) -> str:
    """Explain the size of the KV cache."""
    return (
        f"{memory.kv_bytes_per_token:,} bytes per token, {memory.kv_bytes / 1e9:.1f} GB for "
        f"{memory.users} x {memory.context:,} tokens"
    )


def iterate_fusion_flags(target: Target) -> Iterator[Flag]:
    """Yield SGLang's flag for shared experts that are stored differently from routed ones.

    By default SGLang fuses shared experts with the routed ones, which requires the same format.
    """
    if target.has_separate_experts:
        yield Flag(
            name=DISABLE_SHARED_FUSION,
            value="",
            reason="shared experts are stored differently from routed experts",
        )


def make_node_flags(engine: Engine, placement: Placement) -> tuple[tuple[Flag, ...], ...]:
    """Return the flags that differ between nodes, one entry per node."""
    if placement.nodes == 1:
        return ((),)
    per_node = []
    for rank in range(placement.nodes):
        flags = [
            Flag(
                name="--nnodes",
                value=str(placement.nodes),
                reason="the model needs more than one node",
            ),
            Flag(name="--node-rank", value=str(rank), reason="rank 0 serves the API"),
        ]
        if engine == "vllm":
            flags += [
                Flag(name="--master-addr", value=MASTER, reason="address of the first node"),
                Flag(
                    name="--master-port",
                    value=str(MASTER_PORT),
                    reason="rendezvous port of the nodes",
                ),
            ]
            flags += [Flag(name="--headless", value="", reason="no API on this node")] * bool(rank)
        else:
            flags += [
                Flag(
                    name="--dist-init-addr",
                    value=f"{MASTER}:{MASTER_PORT}",
                    reason="rendezvous address of the nodes",
                )
            ]
        per_node.append(tuple(flags))
    return tuple(per_node)


def iterate_notes(target: Target, fit: Fit) -> Iterator[str]:
    """Yield notes for the operator."""
    placement = fit.placement
    assert placement is not None
    yield (
        f"{placement.gpus} x {fit.gpu.name}: at most {format_users(fit.max_users or 0)} of this "
        f"context, or {fit.max_context:,} tokens for {format_users(fit.memory.users)} (computed)"
    )
    if shortfall := find_shortfall(fit):
        yield format_shortfall(shortfall)
    if target.has_chat_template is False:
        yield (
            "no chat template is stored: /v1/completions works; for /v1/chat/completions add "
            "--chat-template FILE"
        )
    if target.status == "rejected":
        yield "this artifact fails a gate of its recipe; see `quantkit report`"
    if placement.nodes > 1:
        yield (
            f"{MASTER} stands for the first node's address; start the command on every node, with "
            "the weights at the same path"
        )
