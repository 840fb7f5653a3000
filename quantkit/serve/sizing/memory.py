"""Memory that serving takes: weights + KV cache of the longest context x concurrent requests, and a margin."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.serve.sizing.model import KvDtype, Model

DEFAULT_CONTEXT, USERS, MARGIN = 32_768, 10, 0.15
"""What is planned for when nobody says otherwise."""


@dataclass(frozen=True, kw_only=True)
class MemoryEstimate:
    """What `users` requests of `context` tokens at a time take; bytes over all cards together."""

    model: Model
    context: int
    users: int
    kv: KvDtype
    margin: float
    weights_bytes: int
    kv_bytes_per_token: int  # of one request, before a window is full
    kv_bytes_per_user: int
    kv_bytes: int  # of all users
    speculative: bool = False  # the MTP block is loaded too

    @property
    def margin_bytes(self) -> int:
        """What activations, workspaces, CUDA graphs and fragmentation may take."""
        return round(self.margin * (self.weights_bytes + self.kv_bytes))

    @property
    def total_bytes(self) -> int:
        return self.weights_bytes + self.kv_bytes + self.margin_bytes


def estimate_memory(
    model: Model,
    context: int | None = None,
    users: int = USERS,
    kv: KvDtype = "bf16",
    margin: float = MARGIN,
    *,
    speculative: bool = False,
) -> MemoryEstimate:
    """What a model needs for `users` concurrent requests, each as long as `context` allows (CONTEXT tokens, or the
    model's longest); `margin` is a share.
    `speculative` counts the MTP block, which engines load for speculative decoding alone.

    Raises UsageError for a context longer than the model's, and for numbers that mean nothing.
    """
    context = min(DEFAULT_CONTEXT, model.longest or DEFAULT_CONTEXT) if context is None else context
    if context < 1 or users < 1 or not 0 <= margin <= 10:
        raise UsageError(
            f"expected a context and users of at least 1 and a margin between 0 and 10, found {context}, {users} and "
            f"{margin:g}; give others"
        )
    if model.longest is not None and context > model.longest:
        raise UsageError(
            f"{model.config.where}: max_position_embeddings: the model was made for {model.longest:,} tokens, found a "
            f"context of {context:,}; ask for --context {model.longest} or less"
        )
    per_user = model.kv_bytes(context, kv)
    return MemoryEstimate(
        model=model,
        context=context,
        users=users,
        kv=kv,
        margin=margin,
        weights_bytes=model.weights.n_bytes + (model.mtp.n_bytes if speculative else 0),
        kv_bytes_per_token=model.kv_bytes_per_token(kv),
        kv_bytes_per_user=per_user,
        kv_bytes=per_user * users,
        speculative=speculative,
    )


def told_users(count: int) -> str:
    """ "1 user", "10 users"."""
    return f"{count:,} user" + ("s" if count != 1 else "")
