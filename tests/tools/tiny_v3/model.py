"""The training model of tiny-v3: a DeepSeek-V3 (arXiv:2412.19437) for one CPU core.

Master weights are float32; products are computed in `dtype` (bfloat16 for training, float32 to
compare with transformers). Routing follows the paper's equations 12-16: sigmoid affinities, a bias
for selection only, and top-k among the experts of the best groups.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from tools.tiny_v3.experts import RoutedExperts
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The sizes of tiny-v3, named as in config.json."""

    vocab_size: int = 768
    hidden_size: int = 256
    intermediate_size: int = 512
    moe_intermediate_size: int = 128
    num_hidden_layers: int = 4
    num_attention_heads: int = 4
    n_routed_experts: int = 16
    n_shared_experts: int = 1
    num_experts_per_tok: int = 2
    n_group: int = 4
    topk_group: int = 2
    routed_scaling_factor: float = 2.5
    first_k_dense_replace: int = 1
    q_lora_rank: int = 128
    kv_lora_rank: int = 256
    qk_nope_head_dim: int = 64
    qk_rope_head_dim: int = 64
    v_head_dim: int = 64
    max_position_embeddings: int = 512
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6


def make_matrix(*shape: int, std: float | None = None) -> nn.Parameter:
    """Return a random matrix, by default with standard deviation 0.5 / sqrt(input size)."""
    return nn.Parameter(torch.randn(*shape) * (0.5 * shape[-1] ** -0.5 if std is None else std))


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Return the RMS norm over the last dimension, computed in float32, in the dtype of x."""
    wide = x.float()
    return (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Apply the rotary embedding to interleaved pairs [..., 2 * pairs].

    The halves stay separated, for queries and keys equally.
    """
    even, odd = x[..., 0::2], x[..., 1::2]  # [..., pairs]
    return torch.cat([even * cos - odd * sin, odd * cos + even * sin], dim=-1)  # [..., 2 * pairs]


class Attend(torch.autograd.Function):
    """softmax(q kT + mask) v; the softmax is saved for the backward pass, q is already scaled."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
        weights = torch.softmax(
            (q @ k.transpose(-1, -2)).add_(mask), dim=-1
        )  # [batch, heads, time, time]
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        q, k, v, weights = ctx.saved_tensors
        gradient = gradients[0].contiguous()
        scores = torch._softmax_backward_data(
            gradient @ v.transpose(-1, -2), weights, -1, weights.dtype
        )
        return scores @ k, scores.transpose(-1, -2) @ q, weights.transpose(-1, -2) @ gradient, None


class Attention(nn.Module):
    """Multi-head latent attention with both norms of its block."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        heads, hidden = config.num_attention_heads, config.hidden_size
        query, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
        self.input_norm = nn.Parameter(torch.ones(hidden))
        self.q_a = make_matrix(config.q_lora_rank, hidden)
        self.q_norm = nn.Parameter(torch.ones(config.q_lora_rank))
        self.q_b = make_matrix(heads * query, config.q_lora_rank)
        self.kv_a = make_matrix(config.kv_lora_rank + config.qk_rope_head_dim, hidden)
        self.kv_norm = nn.Parameter(torch.ones(config.kv_lora_rank))
        self.kv_b = make_matrix(heads * (config.qk_nope_head_dim + value), config.kv_lora_rank)
        self.out = make_matrix(hidden, heads * value, std=0.01)
        self.output_norm = nn.Parameter(torch.ones(hidden))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """Return the residual stream [batch, time, hidden] after attention, and its norm."""
        config, dtype = self.config, x.dtype
        batch, time, _ = x.shape
        heads, nope, eps = config.num_attention_heads, config.qk_nope_head_dim, config.rms_norm_eps
        h = rms_norm(x, self.input_norm, eps)
        q = F.linear(
            rms_norm(F.linear(h, self.q_a.to(dtype)), self.q_norm, eps), self.q_b.to(dtype)
        )
        q = q.view(batch, time, heads, -1).transpose(1, 2)  # [batch, heads, time, nope + rope]
        latent, key_rope = torch.split(
            F.linear(h, self.kv_a.to(dtype)), [config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        kv = F.linear(rms_norm(latent, self.kv_norm, eps), self.kv_b.to(dtype))
        kv = kv.view(batch, time, heads, -1).transpose(1, 2)  # [batch, heads, time, nope + value]
        key_rope = apply_rotary(key_rope.unsqueeze(1), cos, sin).expand(
            -1, heads, -1, -1
        )  # one key for all heads
        q = torch.cat([q[..., :nope], apply_rotary(q[..., nope:], cos, sin)], dim=-1)
        k = torch.cat([kv[..., :nope], key_rope], dim=-1)
        attended: Tensor = Attend.apply(  # type: ignore[no-untyped-call]
            q * q.shape[-1] ** -0.5, k, kv[..., nope:].contiguous(), mask
        )
        joined = attended.transpose(1, 2).reshape(batch, time, -1)  # [batch, time, heads * value]
        x = x + F.linear(joined, self.out.to(dtype))
        return x, rms_norm(x, self.output_norm, eps)


class Mlp(nn.Module):
    """down(silu(gate x) * up x)."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up, self.down = (
            make_matrix(inner, hidden),
            make_matrix(inner, hidden),
            make_matrix(hidden, inner, std=0.01),
        )

    def forward(self, x: Tensor) -> Tensor:
        dtype = x.dtype
        active = F.silu(F.linear(x, self.gate.to(dtype))) * F.linear(
            x, self.up.to(dtype)
        )  # [..., inner]
        return F.linear(active, self.down.to(dtype))


class Moe(nn.Module):
    """Routed experts and a shared one.

    `bias` only affects selection; `load` counts tokens per expert until it is cleared.
    """

    bias: Tensor  # [experts] float32
    load: Tensor  # [experts] float32

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        experts, hidden, inner = (
            config.n_routed_experts,
            config.hidden_size,
            config.moe_intermediate_size,
        )
        self.router = make_matrix(experts, hidden, std=0.02)
        self.register_buffer("bias", torch.zeros(experts))
        self.register_buffer("load", torch.zeros(experts))
        # gate and up are separate matrices for Muon
        self.gate_up = make_matrix(experts, 2, inner, hidden)
        self.down = make_matrix(experts, hidden, inner, std=0.01)
        self.shared = Mlp(hidden, inner * config.n_shared_experts)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return weights [tokens, top_k] float32 and experts [tokens, top_k] of x."""
        config = self.config
        affinity = F.linear(x.float(), self.router).sigmoid()  # [tokens, experts]
        with torch.no_grad():
            per_group = config.n_routed_experts // config.n_group
            selection = affinity + self.bias
            group_score = (
                selection.view(-1, config.n_group, per_group).topk(2, -1).values.sum(-1)
            )  # [tokens, groups]
            kept = torch.zeros_like(group_score).scatter_(
                1, group_score.topk(config.topk_group, -1).indices, 1.0
            )
            allowed = kept.bool().repeat_interleave(per_group, dim=1)  # [tokens, experts]
            chosen = (
                selection
                .masked_fill(~allowed, -math.inf)
                .topk(config.num_experts_per_tok, -1)
                .indices
            )
        weight = affinity.gather(1, chosen)  # [tokens, top_k]
        return weight / (
            weight.sum(-1, keepdim=True) + 1e-20
        ) * config.routed_scaling_factor, chosen

    def forward(self, h: Tensor) -> Tensor:
        x = h.reshape(-1, h.shape[-1])  # [tokens, hidden]
        weight, chosen = self.route(x)
        if self.training:
            self.load += torch.bincount(chosen.view(-1), minlength=len(self.load))
        gate_up = self.gate_up.to(h.dtype).flatten(1, 2)  # [experts, 2 * inner, hidden]
        routed: Tensor = RoutedExperts.apply(  # type: ignore[no-untyped-call]
            x, weight, chosen, gate_up, self.down.to(h.dtype)
        )
        shared: Tensor = self.shared(h)
        return routed.view_as(h) + shared


class TinyV3(nn.Module):
    """The model; `dtype` is the dtype of its products."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype = torch.bfloat16) -> None:
        super().__init__()
        self.config, self.dtype = config, dtype
        dense = config.first_k_dense_replace
        self.embedding = make_matrix(config.vocab_size, config.hidden_size, std=0.5)
        self.attention = nn.ModuleList(Attention(config) for _ in range(config.num_hidden_layers))
        self.mlp = nn.ModuleList(
            Mlp(config.hidden_size, config.intermediate_size) if layer < dense else Moe(config)
            for layer in range(config.num_hidden_layers)
        )
        self.norm = nn.Parameter(torch.ones(config.hidden_size))
        self.head = make_matrix(config.vocab_size, config.hidden_size, std=0.005)

    @property
    def moes(self) -> list[Moe]:
        """The layers with routed experts."""
        return [layer for layer in self.mlp if isinstance(layer, Moe)]

    def forward(self, ids: Tensor, positions: Tensor, mask: Tensor) -> Tensor:
        """Return logits [batch, time, vocab] float32.

        ids and positions [batch, time]; mask [batch, 1, time, time].
        """
        config = self.config
        pairs = (
            torch.arange(0, config.qk_rope_head_dim, 2).float() / config.qk_rope_head_dim
        )  # [rope / 2]
        angle = (positions[..., None].float() * config.rope_theta**-pairs).unsqueeze(
            1
        )  # [batch, 1, time, rope / 2]
        cos, sin = angle.cos().to(self.dtype), angle.sin().to(self.dtype)
        x = F.embedding(ids, self.embedding.to(self.dtype))  # [batch, time, hidden]
        for attention, mlp in zip(self.attention, self.mlp):
            x, h = attention(x, cos, sin, mask)
            x = x + mlp(h)
        return F.linear(
            rms_norm(x, self.norm, config.rms_norm_eps), self.head.to(self.dtype)
        ).float()


def make_attention_mask(segments: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the additive causal mask [batch, 1, time, time] within segments [batch, time]."""
    time = segments.shape[1]
    same = segments[:, :, None] == segments[:, None, :]  # [batch, time, time]
    visible = same & torch.ones(time, time, dtype=torch.bool).tril()
    blocked = torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -30000.0)
    return blocked.unsqueeze(1)
