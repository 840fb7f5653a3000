"""The attention of each layer from config.json alone, with the defaults of transformers."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.contracts import Config
from quantkit.errors import CheckpointError
from quantkit.serve.sizing.model import Attention

ABSENT_WINDOW: Mapping[str, int] = {"mistral": 4096}
"""The sliding window that transformers assumes for a family if config.json has no such key."""

WINDOW_KEYS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
"""Layer type of `layer_types` -> the key of its window."""


def read_attention(config: Config) -> tuple[Attention, ...]:
    """Return the attention of each decoder layer; CheckpointError for an unknown layer type."""
    num_layers = read_positive(config, "num_hidden_layers")
    is_latent = config.has("kv_lora_rank")
    base = read_latent_attention(config) if is_latent else read_grouped_attention(config)
    return tuple(
        Attention(
            kind=base.kind,
            heads=base.heads,
            kv_heads=base.kv_heads,
            kv_elements=base.kv_elements,
            qk_head_dim=base.qk_head_dim,
            v_head_dim=base.v_head_dim,
            window=window,
        )
        for window in read_windows(config, num_layers)
    )


def read_latent_attention(config: Config) -> Attention:
    """Return multi-head latent attention: one compressed vector and one rotary key per token."""
    rank, rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    return Attention(
        kind="latent",
        heads=read_positive(config, "num_attention_heads"),
        kv_heads=1,
        kv_elements=rank + rope,
        qk_head_dim=config.integer("qk_nope_head_dim") + rope,
        v_head_dim=config.integer("v_head_dim"),
    )


def read_grouped_attention(config: Config) -> Attention:
    """Return multi-head, grouped-query or multi-query attention: key and value per KV head."""
    heads = read_positive(config, "num_attention_heads")
    kv_heads = read_positive(config, "num_key_value_heads", heads)
    head_dim = config.integer("head_dim", config.integer("hidden_size") // heads)
    return Attention(
        kind="grouped",
        heads=heads,
        kv_heads=kv_heads,
        kv_elements=2 * kv_heads * head_dim,
        qk_head_dim=head_dim,
        v_head_dim=head_dim,
    )


def read_positive(config: Config, key: str, default: int | None = None) -> int:
    """Return an integer of at least 1; CheckpointError for anything else."""
    value = config.integer(key, default)
    if value < 1:
        raise CheckpointError(
            f"{config.where}: {key}: expected at least 1, found {value}; repair config.json"
        )
    return value


def read_windows(config: Config, num_layers: int) -> list[int | None]:
    """Return the sliding window of each layer; None for full attention."""
    types = config.values.get("layer_types")
    if isinstance(types, list):
        return read_layer_types(config, types, num_layers)
    window, family = find_window(config), config.text("model_type")
    if window is None:
        return [None] * num_layers
    if family in ("qwen2", "qwen3"):
        first = config.integer("max_window_layers", 28)
        return [window if layer >= first else None for layer in range(num_layers)]
    if family == "qwen2_moe":
        first = config.integer("max_window_layers", 28)
        return [window if layer % 2 == 0 and layer < first else None for layer in range(num_layers)]
    if config.has("sliding_window_pattern"):  # every n-th layer is full: gemma3, cohere2
        period = config.integer("sliding_window_pattern")
        return [
            None if period and (layer + 1) % period == 0 else window for layer in range(num_layers)
        ]
    return [window] * num_layers


def find_window(config: Config) -> int | None:
    """Return the tokens of a sliding window; None if the config has no such layers."""
    family = config.text("model_type")
    if family.startswith("qwen") and not config.flag("use_sliding_window"):
        return None
    if "sliding_window" not in config.values:
        return ABSENT_WINDOW.get(family)
    return config.integer("sliding_window") if config.has("sliding_window") else None


def read_layer_types(config: Config, types: list[object], num_layers: int) -> list[int | None]:
    """Return the windows by `layer_types`, which newer configs have."""
    if len(types) != num_layers:
        raise CheckpointError(
            f"{config.where}: layer_types: expected {num_layers} entries, found {len(types)}; "
            "repair config.json"
        )
    unknown = next((kind for kind in types if kind not in WINDOW_KEYS), None)
    if unknown is not None:
        raise CheckpointError(
            f"{config.where}: layer_types: expected one of {', '.join(WINDOW_KEYS)}, whose memory "
            f"is known, found {unknown!r}; size this model with its engine"
        )
    return [config.integer(key) if (key := WINDOW_KEYS[str(kind)]) else None for kind in types]
