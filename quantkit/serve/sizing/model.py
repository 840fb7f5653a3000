"""A model for sizing: bytes by sharding, attention by layer, constraints of tensor parallelism."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from quantkit.contracts import Config

ReadFrom = Literal["headers", "plan", "config"]
KvDtype = Literal["bf16", "fp8"]

KV_BYTES: Mapping[KvDtype, int] = {"bf16": 2, "fp8": 1}
"""Bytes of a cached value. The scales of an FP8 cache, one per layer or head, are not counted."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Attention:
    """The attention of one layer: its KV cache and its compute.

    kv_elements: cached values per token. grouped (MHA, GQA, MQA; arXiv 2305.13245):
    2 x kv_heads x head_dim. latent (MLA, arXiv 2405.04434): kv_lora_rank + qk_rope_head_dim, shared
    by all heads, so every tensor-parallel rank holds all of it. window: tokens of a sliding window;
    None for full attention.
    """

    kind: Literal["grouped", "latent"]
    heads: int
    kv_heads: int
    kv_elements: int
    qk_head_dim: int
    v_head_dim: int
    window: int | None = None

    def count_cached_tokens(self, context: int) -> int:
        """Return the tokens of a context that stay in the cache."""
        return context if self.window is None else min(context, self.window)


@dataclass(frozen=True, kw_only=True, slots=True)
class Weights:
    """Stored bytes, sharded over tensor-parallel ranks or replicated on each; parameters.

    fp8_parameters: those of the parameters that are stored in FP8.
    """

    sharded: int = 0
    replicated: int = 0
    parameters: int = 0
    fp8_parameters: int = 0

    @property
    def n_bytes(self) -> int:
        return self.sharded + self.replicated

    def compute_bytes_per_rank(self, tp: int) -> float:
        """Return the bytes on each of `tp` ranks."""
        return self.sharded / tp + self.replicated

    def __add__(self, other: Weights) -> Weights:
        return Weights(
            sharded=self.sharded + other.sharded,
            replicated=self.replicated + other.replicated,
            parameters=self.parameters + other.parameters,
            fp8_parameters=self.fp8_parameters + other.fp8_parameters,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Layer:
    """One decoder layer. routed: all its routed experts; dense: all its other weights."""

    attention: Attention
    dense: Weights
    routed: Weights = Weights()


@dataclass(frozen=True, kw_only=True, slots=True)
class MoeConfig:
    """The routed experts of a layer; if layers differ, those of the widest.

    num_layers: layers with routed experts.
    """

    num_experts: int
    top_k: int
    intermediate_size: int
    num_layers: int

    def compute_expected_experts(self, tokens: float) -> float:
        """Return the expected number of experts that `tokens` tokens are routed to.

        E (1 - (1 - k/E)^n), for a router that spreads tokens evenly.
        """
        unused: float = (1.0 - self.top_k / self.num_experts) ** tokens
        return self.num_experts * (1.0 - unused)


@dataclass(frozen=True, kw_only=True, slots=True)
class ShardingConstraint:
    """A size that tensor parallelism splits; each part must be a multiple of `unit`."""

    name: str
    size: int
    unit: int = 1

    def find_fault(self, tp: int) -> str | None:
        """Return why `tp` ranks cannot split it; None if they can."""
        if self.size % tp:
            return f"{self.name}: {self.size:,} is not divisible by {tp}"
        if self.size // tp % self.unit:
            part = f"{self.size:,} / {tp} = {self.size // tp:,}"
            return f"{self.name}: {part} is not a multiple of {self.unit}"
        return None


@dataclass(frozen=True, kw_only=True)
class Model:
    """A model for sizing; `read.read_model` makes it.

    scheme: the storage of the weights, as text. head: without bytes if it is tied to the embedding.
    other: tensors outside blocks, such as the final norm. mtp: the block for multi-token
    prediction, which engines load only for speculative decoding. max_intermediate_size: of the
    dense MLPs and shared experts. max_context: of the config, None if it has none.
    """

    name: str
    read_from: ReadFrom
    model_type: str
    config: Config
    scheme: str
    layers: tuple[Layer, ...]
    embedding: Weights
    head: Weights
    other: Weights
    mtp: Weights
    moe: MoeConfig | None
    sharding_constraints: tuple[ShardingConstraint, ...]
    hidden_size: int
    max_intermediate_size: int
    vocab_size: int
    max_context: int | None
    activation_bytes: int = 2

    @property
    def weights(self) -> Weights:
        """All weights but those of `mtp`."""
        total = self.embedding + self.head + self.other
        for layer in self.layers:
            total = total + layer.dense + layer.routed
        return total

    @property
    def routed(self) -> Weights:
        """The routed experts of all layers."""
        return sum((layer.routed for layer in self.layers), Weights())

    @property
    def is_tied(self) -> bool:
        """Whether the embedding is also the head."""
        return self.head.n_bytes == 0

    def compute_kv_bytes(self, context: int, kv: KvDtype) -> int:
        """Return the KV cache bytes of one request of `context` tokens, over all ranks."""
        elements = sum(
            layer.attention.kv_elements * layer.attention.count_cached_tokens(context)
            for layer in self.layers
        )
        return elements * KV_BYTES[kv]

    def compute_kv_bytes_per_token(self, kv: KvDtype) -> int:
        """Return the KV cache bytes of one more token while no window is full."""
        return sum(layer.attention.kv_elements for layer in self.layers) * KV_BYTES[kv]
