"""config.json as transformers reads it: its config class with aliases, defaults and nested parts.

Remote code stays off: only classes of transformers itself are used. A wrapper is a configuration
with another one for its text model, such as that of a vision-language model.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)
from transformers.utils import logging

from quantkit import registry
from quantkit.contracts import Config
from quantkit.errors import CheckpointError
from quantkit.io.files import make_config_error

IGNORED_KEYS = frozenset({
    "quantization_config",
    "auto_map",
    "attn_implementation",
    "_attn_implementation",
})
"""Keys of config.json about a run of the model, not about the model."""
FLOAT_TAG = "__float__"
"""transformers 5 writes an infinite number as {"__float__": "Infinity"}."""
MAX_LAYERS = 10_000
"""Largest number of layers: config classes make lists of that length."""
MAX_LABELS = 1_000_000
MAX_DEPTH = 20


def make_hf_config(config: Config) -> Any:
    """Make transformers' configuration of a config.json.

    Raises CheckpointError for an unknown model type, an absurd number of layers, and whatever the
    config class refuses.
    """
    model_type = registry.resolve_model_type(config.text("model_type"))
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{config.where}: model_type {model_type!r} is not part of this transformers release; "
            "upgrade transformers"
        )
    check_counts(config.where, config.values)
    values = {key: value for key, value in config.values.items() if key not in IGNORED_KEYS}
    values["model_type"] = model_type
    try:
        with hide_warnings():
            # a copy: transformers writes into nested values
            return CONFIG_MAPPING[model_type].from_dict(decode_floats(values))
    except Exception as fault:
        raise make_config_error(config.where, model_type, fault) from fault


@contextmanager
def hide_warnings() -> Iterator[None]:
    """Hide warnings and log messages: transformers warns about keys with an older name."""
    level = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.set_verbosity(level)


def check_counts(
    where: str, values: Mapping[str, object], prefix: str = "", depth: int = 0
) -> None:
    """Check the numbers of which a config class makes lists; raises CheckpointError."""
    if depth > MAX_DEPTH:
        raise CheckpointError(
            f"{where}: expected at most {MAX_DEPTH} nested configurations, found more; repair it"
        )
    for key, value in values.items():
        if isinstance(value, Mapping):
            check_counts(where, value, f"{prefix}{key}.", depth + 1)
        if not isinstance(key, str):  # labels
            continue
        limit = MAX_LABELS if key == "num_labels" else MAX_LAYERS
        is_count = "layer" in key or "depth" in key or key in {"num_labels", "num_blocks"}
        if is_count and type(value) is int and value > limit:
            raise CheckpointError(
                f"{where}: {prefix}{key}: expected at most {limit:,}, found {value:.3g}; repair it"
            )


def decode_floats(value: Any) -> Any:
    """Return a copy of a JSON value with transformers' {"__float__": "Infinity"} as numbers."""
    if isinstance(value, Mapping):
        if set(value) == {FLOAT_TAG} and value[FLOAT_TAG] in {"Infinity", "-Infinity"}:
            return float(value[FLOAT_TAG])
        return {key: decode_floats(part) for key, part in value.items()}
    return [decode_floats(part) for part in value] if isinstance(value, list) else value


def get_text_config(hf_config: Any) -> Any:
    """Return the configuration of the text model: nested in a wrapper's, else the whole."""
    return hf_config.get_text_config(decoder=True)


def read_value(config: Config, key: str) -> object:
    """Return the value that transformers reads for a key that config.json lacks, None if none.

    It may be there under another name (`attribute_map`), or belong to the text model of a wrapper.
    A default of the config class is no value of the model: None. Raises CheckpointError if the
    class refuses the configuration.
    """
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str) or not has_language_model(model_type):
        return None
    hf_config = make_hf_config(config)
    text_config, part = get_text_config(hf_config), find_text_key(hf_config)
    nested = config.values.get(part) if part else None
    pairs = (text_config.attribute_map or {}).items()
    names = {key, *(x for x, y in pairs if y == key), *(y for x, y in pairs if x == key)}
    present = {*config.values, *(nested if isinstance(nested, Mapping) else ())}
    try:
        value = getattr(text_config, key, None) if names & present else None
    except RuntimeError:  # transformers' own for a value that layers do not share
        return None
    return value if isinstance(value, bool | int | float | str | list | dict) else None


def make_text_config(config: Config) -> Config:
    """Return the configuration of the text model with all keys, as transformers reads it.

    That of a type that transformers does not know is returned unchanged.
    """
    model_type = config.values.get("model_type")
    if not isinstance(model_type, str) or not has_language_model(model_type):
        return config
    text_config = get_text_config(make_hf_config(config))
    values: dict[str, object] = text_config.to_dict()
    names = text_config.attribute_map or {}
    values |= {alias: values[name] for alias, name in names.items() if name in values}
    return replace(config, values=values)


def read_dtype(config: Config) -> str:
    """Return the dtype of the model by its config.json: "bfloat16", "float32"."""
    hf_config = make_hf_config(config)
    dtype = get_text_config(hf_config).dtype or hf_config.dtype or "bfloat16"
    return str(dtype).removeprefix("torch.")


def find_text_key(hf_config: Any) -> str | None:
    """Return the key under which a wrapper holds its text model's configuration, else None."""
    text_config = get_text_config(hf_config)
    parts = (key for key in hf_config.sub_configs if getattr(hf_config, key, None) is text_config)
    return None if text_config is hf_config else next(parts, None)


def has_language_model(model_type: str) -> bool:
    """Return whether transformers has a language model of a type, alone or in a wrapper."""
    return model_type in CONFIG_MAPPING and (
        model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
        or model_type in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES
    )


def list_model_classes(model_type: str) -> tuple[str, ...]:
    """Return the names of transformers' language models of a type, the one it prefers first."""
    mappings = (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
    names = dict.fromkeys(mapping[model_type] for mapping in mappings if model_type in mapping)
    return tuple(str(name) for name in names)


def get_auto_class(hf_config: Any) -> Any:
    """Return transformers' factory of the model: the wrapper's, if the configuration is one.

    A wrapper's configuration may come with its text model alone; `architectures` says so.
    """
    model_type, names = hf_config.model_type, hf_config.architectures or []
    alone = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(model_type)
    if model_type not in MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES or alone in names:
        return AutoModelForCausalLM
    return (
        AutoModelForMultimodalLM if find_text_key(hf_config) or not alone else AutoModelForCausalLM
    )
