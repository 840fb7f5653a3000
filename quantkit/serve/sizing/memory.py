"""The memory of serving: weights + KV cache of the longest context x users, and a margin."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.serve.sizing.model import KvDtype, Model

DEFAULT_CONTEXT, DEFAULT_USERS, DEFAULT_MARGIN = 32_768, 10, 0.15


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """The memory of `users` concurrent requests of `context` tokens; bytes over all GPUs.

    kv_bytes_per_token: of one request, before a window is full. kv_bytes: of all users.
    speculative: the MTP block is loaded too.
    """

    model: Model
    context: int
    users: int
    kv: KvDtype
    margin: float
    weights_bytes: int
    kv_bytes_per_token: int
    kv_bytes_per_user: int
    kv_bytes: int
    speculative: bool = False

    @property
    def margin_bytes(self) -> int:
        """Bytes for activations, workspaces, CUDA graphs and fragmentation."""
        return round(self.margin * (self.weights_bytes + self.kv_bytes))

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.margin_bytes


def estimate_memory(
    model: Model,
    context: int | None = None,
    users: int = DEFAULT_USERS,
    kv: KvDtype = "bf16",
    margin: float = DEFAULT_MARGIN,
    *,
    speculative: bool = False,
) -> MemoryEstimate:
    """Estimate the memory of `users` concurrent requests of up to `context` tokens.

    context: by default DEFAULT_CONTEXT, or the model's longest. margin: a fraction of weights and
    cache. speculative: count the MTP block, which engines load only for speculative decoding.

    Raises UsageError for a context longer than the model's, and for values out of range.
    """
    if context is None:
        context = min(DEFAULT_CONTEXT, model.max_context or DEFAULT_CONTEXT)
    if context < 1 or users < 1 or not 0 <= margin <= 10:
        raise UsageError(
            "expected a context and users of at least 1 and a margin from 0 to 10, found "
            f"{context}, {users} and {margin:g}; change them"
        )
    if model.max_context is not None and context > model.max_context:
        raise UsageError(
            f"{model.config.where}: max_position_embeddings: expected a context of at most "
            f"{model.max_context:,} tokens, found {context:,}; set --context "
            f"{model.max_context} or less"
        )
    kv_bytes_per_user = model.compute_kv_bytes(context, kv)
    return MemoryEstimate(
        model=model,
        context=context,
        users=users,
        kv=kv,
        margin=margin,
        weights_bytes=model.weights.n_bytes + (model.mtp.n_bytes if speculative else 0),
        kv_bytes_per_token=model.compute_kv_bytes_per_token(kv),
        kv_bytes_per_user=kv_bytes_per_user,
        kv_bytes=kv_bytes_per_user * users,
        speculative=speculative,
    )


def format_users(count: int) -> str:
    """Format a number of users: "1 user", "10 users"."""
    return f"{count:,} user" + ("s" if count != 1 else "")
