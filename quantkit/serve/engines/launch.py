"""The exact command of an engine, each flag with its reason. Pure.

Flags were read in vLLM 0.32 (engine/arg_utils.py, config/cache.py, config/scheduler.py) and SGLang 0.5.23
(srt/arg_groups/fields/). Both take priorities so that the lower number goes first, as the gateway counts.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from quantkit.errors import UsageError
from quantkit.formats.common.engine_names import DISABLE_SHARED_FUSION, SERVERS
from quantkit.serve.engines.target import Target
from quantkit.serve.sizing.batch import STEP, compute_max_batched_tokens
from quantkit.serve.sizing.fit import Fit, Placement, find_shortfall, fit_model
from quantkit.serve.sizing.gpus import Gpu
from quantkit.serve.sizing.memory import MemoryEstimate, told_users
from quantkit.serve.sizing.memory_fraction import Server, share_of, usual_step
from quantkit.serve.sizing.tables import format_shortfall

Engine = Literal["vllm", "sglang", "transformers"]
SHOWN: dict[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang", "transformers": "transformers"}
MASTER = "MASTER"
"""What stands for the first node's address in a command for several nodes."""
MASTER_PORT = 29501


@dataclass(frozen=True, kw_only=True, slots=True)
class Flag:
    """A flag, its value ("" for a switch), and why it stands there."""

    name: str
    value: str
    why: str

    @property
    def words(self) -> tuple[str, ...]:
        return (self.name, self.value) if self.value else (self.name,)


@dataclass(frozen=True, kw_only=True)
class Launch:
    """How to start an engine: `base` and `flags` on every node; `per_node` adds what differs, one entry per node."""

    engine: Engine
    base: tuple[str, ...]
    flags: tuple[Flag, ...]
    placement: Placement | None = None
    per_node: tuple[tuple[Flag, ...], ...] = ((),)
    notes: tuple[str, ...] = ()

    def words(self, node: int = 0) -> list[str]:
        """The command as a list of words."""
        return [
            *self.base,
            *(word for flag in (*self.flags, *self.per_node[node]) for word in flag.words),
        ]

    def text(self, node: int = 0) -> str:
        """The command for a shell, a flag per line."""
        flags = [shlex.join(flag.words) for flag in (*self.flags, *self.per_node[node])]
        return " \\\n  ".join([shlex.join(self.base), *flags])


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where the engine listens, and under which name it serves."""

    host: str
    port: int
    name: str
    path: str


def fit_of(needs: MemoryEstimate, card: Gpu) -> Fit:
    """How it fits; UsageError when no number of cards serves that context to so many."""
    fit = fit_model(needs, card)
    if fit.placement is None:
        raise UsageError(
            f"{needs.model.name}: {told_users(needs.users)} of {needs.context:,} tokens: "
            f"{needs.total_bytes / 1e9:,.0f} GB fit on no number of {card.name} that engines can cut it to; ask for "
            "less --context or --users, or name another --gpu (`quantkit size` compares them)"
        )
    return fit


def launch(
    engine: Literal["vllm", "sglang"], target: Target, needs: MemoryEstimate, fit: Fit, place: Place
) -> Launch:
    """The command of vLLM or SGLang for a placement."""
    placement = fit.placement
    assert placement is not None
    flags = vllm_flags if engine == "vllm" else sglang_flags
    base = shlex.split(SERVERS[SHOWN[engine]].format(path=shlex.quote(place.path)))
    return Launch(
        engine=engine,
        base=tuple(base),
        flags=(
            *address(place),
            *flags(needs, fit, placement),
            *(fusion(target) if engine == "sglang" else ()),
        ),
        placement=placement,
        per_node=nodes(engine, placement),
        notes=tuple(notes(target, fit)),
    )


def address(place: Place) -> Iterator[Flag]:
    """Where it is found."""
    yield Flag(name="--host", value=place.host, why="where it listens")
    yield Flag(name="--port", value=str(place.port), why="where it listens")
    yield Flag(name="--served-model-name", value=place.name, why="what clients write as `model`")


def vllm_flags(needs: MemoryEstimate, fit: Fit, placement: Placement) -> Iterator[Flag]:
    """vLLM's own, in the order of `vllm serve --help`."""
    yield Flag(name="--max-model-len", value=str(needs.context), why=context_why(needs))
    yield from parallel(placement, "--tensor-parallel-size", "--pipeline-parallel-size", fit)
    share, why = memory_share(fit, placement, "vllm")
    yield Flag(
        name="--gpu-memory-utilization", value=share, why=f"weights, cache and workspace: {why}"
    )
    yield from step(fit, "vllm", "--max-num-batched-tokens")
    dtype = "fp8" if needs.kv == "fp8" else "auto"
    yield Flag(name="--kv-cache-dtype", value=dtype, why=cache_why(needs))
    yield Flag(
        name="--enable-prefix-caching", value="", why="prompts that begin alike share their cache"
    )
    yield Flag(
        name="--max-num-seqs", value=str(needs.users), why="requests at once; the others wait"
    )
    yield Flag(
        name="--scheduling-policy",
        value="priority",
        why="a request's `priority` counts, lower first",
    )


def sglang_flags(needs: MemoryEstimate, fit: Fit, placement: Placement) -> Iterator[Flag]:
    """SGLang's own; its prefix cache (RadixAttention) is on unless it is switched off."""
    yield Flag(name="--context-length", value=str(needs.context), why=context_why(needs))
    yield from parallel(placement, "--tp-size", "--pp-size", fit)
    share, why = memory_share(fit, placement, "sglang")
    yield Flag(name="--mem-fraction-static", value=share, why=f"weights and cache: {why}")
    yield from step(fit, "sglang", "--chunked-prefill-size")
    dtype = "fp8_e4m3" if needs.kv == "fp8" else "auto"
    yield Flag(name="--kv-cache-dtype", value=dtype, why=cache_why(needs))
    yield Flag(
        name="--max-running-requests",
        value=str(needs.users),
        why="requests at once; the others wait",
    )
    yield Flag(name="--enable-priority-scheduling", value="", why="a request's `priority` counts")
    yield Flag(
        name="--schedule-low-priority-values-first",
        value="",
        why="lower first, as in vLLM and the gateway",
    )
    yield Flag(
        name="--default-priority-value", value="0", why="who says nothing is as urgent as in vLLM"
    )
    yield Flag(name="--enable-metrics", value="", why="/metrics, with the prefix cache's hit rate")


def parallel(placement: Placement, tensor: str, pipeline: str, fit: Fit) -> Iterator[Flag]:
    """How the model is cut."""
    why = f"of the degrees this model allows ({', '.join(map(str, fit.allowed))})"
    yield Flag(name=tensor, value=str(placement.tp), why=why)
    if placement.pp > 1:
        yield Flag(
            name=pipeline,
            value=str(placement.pp),
            why=f"{placement.cards} cards on {placement.nodes} node(s)",
        )


def memory_share(fit: Fit, placement: Placement, server: Server) -> tuple[str, str]:
    """The share of a card's memory to ask for, and why."""
    share = share_of(fit, placement, server)
    margin = f" x {1 + fit.needs.margin:g}" if server == "vllm" else ""
    held = f"({placement.weights_bytes / 1e9:.1f} + {placement.kv_bytes / 1e9:.1f}){margin}"
    told = f"{held} of {fit.card.memory_bytes / 1e9:.0f} GB a card = {share.needed:.2f}"
    if share.missing:
        return (
            f"{share.value:.2f}",
            f"{told}, held to {share.value:.2f}: {share.missing / 1e9:.2f} GB are missing",
        )
    return f"{share.value:.2f}", f"{told}; what is left over becomes cache"


def step(fit: Fit, server: Server, name: str) -> Iterator[Flag]:
    """Tokens of a step, where the engine's own number takes more than the plan leaves."""
    advised, usual = compute_max_batched_tokens(fit, server), usual_step(fit.card, server)
    if advised is None or advised.safe >= min(usual, fit.needs.users * fit.needs.context):
        return
    least = -(-fit.needs.users // STEP) * STEP  # each request decodes one token
    why = f"{advised.per_token:,} bytes a token; {usual:,}, the usual number, takes more than is left beside the cache"
    if advised.safe < least:
        why += ", and so may these: ask for fewer users"
    yield Flag(name=name, value=str(max(least, advised.safe)), why=why)


def context_why(needs: MemoryEstimate) -> str:
    longest = needs.model.longest
    return (
        f"longest request, prompt and answer; the model allows {longest:,}"
        if longest
        else "longest request"
    )


def cache_why(needs: MemoryEstimate) -> str:
    return (
        f"{needs.kv_bytes_per_token:,} bytes per token, {needs.kv_bytes / 1e9:.1f} GB for {needs.users} x "
        f"{needs.context:,} tokens"
    )


def fusion(target: Target) -> Iterator[Flag]:
    """SGLang counts shared experts among the routed ones, which must then be stored alike."""
    if target.fused_apart:
        why = "the shared experts are not stored like the routed ones"
        yield Flag(name=DISABLE_SHARED_FUSION, value="", why=why)


def nodes(engine: Engine, placement: Placement) -> tuple[tuple[Flag, ...], ...]:
    """What differs between nodes."""
    if placement.nodes == 1:
        return ((),)
    made = []
    for rank in range(placement.nodes):
        common = [
            Flag(
                name="--nnodes",
                value=str(placement.nodes),
                why="the model needs more than one node",
            ),
            Flag(name="--node-rank", value=str(rank), why="0 answers requests"),
        ]
        if engine == "vllm":
            common += [
                Flag(name="--master-addr", value=MASTER, why="the first node"),
                Flag(name="--master-port", value=str(MASTER_PORT), why="where the nodes meet"),
            ]
            common += [Flag(name="--headless", value="", why="no API here")] if rank else []
        else:
            common += [
                Flag(
                    name="--dist-init-addr",
                    value=f"{MASTER}:{MASTER_PORT}",
                    why="where the nodes meet",
                )
            ]
        made.append(tuple(common))
    return tuple(made)


def notes(target: Target, fit: Fit) -> Iterator[str]:
    """What an operator should know besides."""
    placement = fit.placement
    assert placement is not None
    yield (
        f"{placement.cards} x {fit.card.name}: at most {told_users(fit.max_users or 0)} of this context, or "
        f"{fit.max_context:,} tokens for {told_users(fit.needs.users)} (computed)"
    )
    if miss := find_shortfall(fit):
        yield format_shortfall(miss)
    if target.chat is False:
        yield "no chat template is stored: /v1/completions works; for /v1/chat/completions add --chat-template FILE"
    if target.status == "rejected":
        yield "this artifact misses a gate of its recipe (`quantkit report` says which)"
    if placement.nodes > 1:
        yield f"{MASTER} is the first node's address; start the command on every node, the weights at the same path"
