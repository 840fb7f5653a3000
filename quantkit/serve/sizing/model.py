"""A model as a server sees it: bytes by who shares them, attention by layer, what tensor parallelism must divide."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quantkit.contracts import Config

ReadFrom = Literal["headers", "plan", "config"]
KvDtype = Literal["bf16", "fp8"]

KV_BYTES: Mapping[KvDtype, int] = {"bf16": 2, "fp8": 1}
"""Bytes of a cached value; the scales of an FP8 cache are one number per layer or head and are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """What one layer keeps of each token, and what attending costs.

    elements: KV values per token. grouped (MHA, GQA, MQA; arXiv 2305.13245): 2 x kv_heads x head_dim; latent (MLA,
    arXiv 2405.04434): kv_lora_rank + qk_rope_head_dim, shared by all heads, so that every tensor-parallel rank holds
    all of it. window: tokens that a sliding window keeps; None keeps all.
    """

    kind: Literal["grouped", "latent"]
    heads: int
    kv_heads: int
    elements: int
    qk_width: int  # per head
    v_width: int  # per head
    window: int | None = None

    def kept(self, context: int) -> int:
        """Tokens of a context that stay in the cache."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Stored bytes: `divided` by tensor parallelism, or `copied` on every rank; parameters, and those kept in FP8."""

    divided: int = 0
    copied: int = 0
    parameters: int = 0
    fp8_parameters: int = 0

    @property
    def n_bytes(self) -> int:
        return self.divided + self.copied

    def per_rank(self, tp: int) -> float:
        """Bytes on each of `tp` ranks."""
        return self.divided / tp + self.copied

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            divided=self.divided + other.divided,
            copied=self.copied + other.copied,
            parameters=self.parameters + other.parameters,
            fp8_parameters=self.fp8_parameters + other.fp8_parameters,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer. `routed` is all its routed experts together, `dense` everything else in it."""

    attention: Attention
    dense: Weights
    routed: Weights = Weights()


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """The routed experts of a layer; of every layer that has some, the widest."""

    count: int
    top_k: int
    intermediate: int
    layers: int  # that have experts

    def distinct(self, tokens: float) -> float:
        """Experts that `tokens` tokens hit, expected where the router spreads them evenly: E (1 - (1 - k/E)^n)."""
        missed: float = (1.0 - self.top_k / self.count) ** tokens
        return self.count * (1.0 - missed)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingConstraint:
    """A size that tensor parallelism cuts: each part must be a whole multiple of `unit`."""

    what: str
    size: int
    unit: int = 1

    def fault(self, tp: int) -> str | None:
        """Why `tp` ranks cannot share it; None when they can."""
        if self.size % tp:
            return f"{self.what} {self.size:,} / {tp} is no whole number"
        if self.size // tp % self.unit:
            return f"{self.what} {self.size:,} / {tp} = {self.size // tp:,} is no multiple of {self.unit}"
        return None


@dataclass(frozen=True, kw_only=True)
class Model:
    """What sizing knows of a model; made by `read.model_of`."""

    name: str
    read_from: ReadFrom
    model_type: str
    config: Config
    scheme: str  # how the weights are stored, in words
    layers: tuple[Layer, ...]
    embedding: Weights
    head: Weights  # without bytes where it is tied to the embedding; the final norm is in `outside`
    outside: Weights
    mtp: Weights  # multi-token prediction: loaded and run by speculative decoding alone
    mixture: MoeConfig | None
    divisions: tuple[ShardingConstraint, ...]
    hidden: int
    widest: int  # of the dense MLPs' and shared experts' intermediate sizes
    vocabulary: int
    max_context: int | None  # the context the config allows
    activation_bytes: int = 2

    @property
    def weights(self) -> Weights:
        """Everything that is loaded; `mtp` is not, but for speculative decoding."""
        total = self.embedding + self.head + self.outside
        for layer in self.layers:
            total = total + layer.dense + layer.routed
        return total

    @property
    def routed(self) -> Weights:
        """The routed experts of all layers."""
        return sum((layer.routed for layer in self.layers), Weights())

    @property
    def tied(self) -> bool:
        """Whether the embedding is the head too."""
        return self.head.n_bytes == 0

    def kv_bytes(self, context: int, kv: KvDtype) -> int:
        """Bytes of the KV cache of one request of `context` tokens, on all ranks of a group together."""
        per_element = KV_BYTES[kv]
        return (
            sum(layer.attention.elements * layer.attention.kept(context) for layer in self.layers)
            * per_element
        )

    def kv_bytes_per_token(self, kv: KvDtype) -> int:
        """Bytes that one more token costs while no window is full."""
        return sum(layer.attention.elements for layer in self.layers) * KV_BYTES[kv]
