"""What each layer's attention keeps of a token, from config.json alone, as transformers' own modules would."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.contracts import Config
from quantkit.errors import CheckpointError
from quantkit.serve.sizing.model import Attention

ABSENT_WINDOW: Mapping[str, int] = {"mistral": 4096}
"""The sliding window of families for which transformers assumes one where config.json has no such key."""

WINDOW_KEYS = {
    "full_attention": None,
    "sliding_attention": "sliding_window",
    "chunked_attention": "attention_chunk_size",
}
"""Kinds of layers in `layer_types`, and the key with the tokens they keep."""


def read_attention(config: Config) -> tuple[Attention, ...]:
    """Attention of each decoder layer. CheckpointError for a kind of layer whose memory is not known here."""
    count = read_positive(config, "num_hidden_layers")
    base = (
        read_latent_attention(config)
        if config.has("kv_lora_rank")
        else read_grouped_attention(config)
    )
    return tuple(
        Attention(
            kind=base.kind,
            heads=base.heads,
            kv_heads=base.kv_heads,
            elements=base.elements,
            qk_width=base.qk_width,
            v_width=base.v_width,
            window=window,
        )
        for window in read_windows(config, count)
    )


def read_latent_attention(config: Config) -> Attention:
    """Multi-head latent attention: one compressed vector and one rotary key per token, whatever the heads."""
    rank, rope = config.integer("kv_lora_rank"), config.integer("qk_rope_head_dim")
    return Attention(
        kind="latent",
        heads=read_positive(config, "num_attention_heads"),
        kv_heads=1,
        elements=rank + rope,
        qk_width=config.integer("qk_nope_head_dim") + rope,
        v_width=config.integer("v_head_dim"),
    )


def read_grouped_attention(config: Config) -> Attention:
    """Multi-head, grouped-query or multi-query attention: a key and a value per key/value head."""
    heads = read_positive(config, "num_attention_heads")
    kv_heads = read_positive(config, "num_key_value_heads", heads)
    width = config.integer("head_dim", config.integer("hidden_size") // heads)
    return Attention(
        kind="grouped",
        heads=heads,
        kv_heads=kv_heads,
        elements=2 * kv_heads * width,
        qk_width=width,
        v_width=width,
    )


def read_positive(config: Config, key: str, default: int | None = None) -> int:
    """An integer of at least 1; CheckpointError for anything else."""
    found = config.integer(key, default)
    if found < 1:
        raise CheckpointError(
            f"{config.where}: {key}: expected at least 1, found {found}; repair config.json"
        )
    return found


def read_windows(config: Config, count: int) -> list[int | None]:
    """The sliding window of each of `count` layers; None where a layer sees everything."""
    types = config.values.get("layer_types")
    if isinstance(types, list):
        return read_layer_types(config, types, count)
    window, family = find_window(config), config.text("model_type")
    if window is None:
        return [None] * count
    if family in ("qwen2", "qwen3"):
        first = config.integer("max_window_layers", 28)
        return [window if layer >= first else None for layer in range(count)]
    if family == "qwen2_moe":
        first = config.integer("max_window_layers", 28)
        return [window if layer % 2 == 0 and layer < first else None for layer in range(count)]
    if config.has("sliding_window_pattern"):  # every n-th layer sees everything: gemma3, cohere2
        every = config.integer("sliding_window_pattern")
        return [None if every and (layer + 1) % every == 0 else window for layer in range(count)]
    return [window] * count


def find_window(config: Config) -> int | None:
    """The tokens a sliding layer keeps; None where the config has no such layers."""
    family = config.text("model_type")
    if family.startswith("qwen") and not config.flag("use_sliding_window"):
        return None
    if "sliding_window" not in config.values:
        return ABSENT_WINDOW.get(family)
    return config.integer("sliding_window") if config.has("sliding_window") else None


def read_layer_types(config: Config, types: list[object], count: int) -> list[int | None]:
    """Windows by `layer_types`, which newer configs write out."""
    if len(types) != count:
        raise CheckpointError(
            f"{config.where}: layer_types: expected {count} entries, found {len(types)}; repair config.json"
        )
    unknown = next((kind for kind in types if kind not in WINDOW_KEYS), None)
    if unknown is not None:
        raise CheckpointError(
            f"{config.where}: layer_types: the memory of {unknown!r} layers is not known here, only that of "
            f"{', '.join(WINDOW_KEYS)}; size this model with its engine"
        )
    return [config.integer(key) if (key := WINDOW_KEYS[str(kind)]) else None for kind in types]
