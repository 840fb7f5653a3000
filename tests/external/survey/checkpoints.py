"""Small random checkpoints of transformers' own classes, as `save_pretrained` writes them."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from external.survey.families import MEDIA_SIZES, OPTIONAL, SIZES, resolve_type
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from quantkit.io.package_data import locate_model

MAX_PARAMETERS = 90_000_000
MAX_DEPTH = 3
LOUD = 3.0
"""Factor of every eighth input channel, so that scaling has something to do."""
TABLES = "tid2eid"
INITIALIZED = ("A_log", "dt_bias", "conv")
"""Parameters that keep transformers' own values: random ones would not be stable."""


def is_media(name: str) -> bool:
    """Return whether a sub-configuration is that of an encoder of other media."""
    return any(word in name for word in ("vision", "audio", "speech", "vq", "code"))


def make_config(
    config_class: Any, own: Mapping[str, Any], media: bool = False, depth: int = 0
) -> Any:
    """Make a small configuration; `own` are values of this type, nested ones under their key."""
    parts = dict(getattr(config_class, "sub_configs", None) or {})
    aliases = dict(getattr(config_class, "attribute_map", None) or {})
    known = {*getattr(config_class, "__dataclass_fields__", {}), *aliases}
    values = {k: v for k, v in (MEDIA_SIZES if media else SIZES).items() if k in known}
    if "kv_lora_rank" in known:  # latent attention has as many key heads as heads
        values["num_key_value_heads"] = values["num_attention_heads"]
    values = {k: v for k, v in values.items() if not (v is None and k in OPTIONAL)}
    for name, part in parts.items() if depth < MAX_DEPTH else ():
        part_class = part
        if part.__name__ == "AutoConfig":
            default = getattr(config_class(), name, None)
            if default is None:
                continue
            part_class = type(default)
        values[name] = make_config(part_class, own.get(name, {}), is_media(name), depth + 1)
    values |= {k: v for k, v in own.items() if k not in parts}
    for alias, name in aliases.items():
        if alias in values and name in values and alias != name:
            del values[alias]
    return make_without_refused(config_class, values)


def make_without_refused(config_class: Any, values: dict[str, Any]) -> Any:
    """Make a configuration, without the values that its class names when it refuses them."""
    while True:
        try:
            return config_class(**values)
        except Exception as fault:  # whatever a config class raises
            text = str(fault)
            marks = [
                k for k in values if any(m in text for m in (f"'{k}'", f"`{k}`", f" {k} ", f"{k}:"))
            ]
            if not marks:
                raise
            del values[marks[0]]


def get_auto_class(model_type: str) -> Any:
    """Return transformers' factory of models of this type."""
    has_images = model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
    return AutoModelForImageTextToText if has_images else AutoModelForCausalLM


def write_random_model(name: str, folder: Path) -> None:
    """Save a random model of this name of the survey, with tiny-v3's tokenizer.

    Raises RuntimeError for a configuration that is not small, and whatever transformers raises.
    """
    model_type, own = resolve_type(name)
    config = make_config(CONFIG_MAPPING[model_type], own)
    auto = get_auto_class(model_type)
    with torch.device("meta"):
        count = sum(x.numel() for x in auto.from_config(config).parameters())
    if count > MAX_PARAMETERS:
        raise RuntimeError(f"{count / 1e6:.0f} M parameters")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.bfloat16)
    randomize(model)
    model.eval().save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model("builtin:tiny-v3") / file, folder / file)


def randomize(model: Any) -> None:
    """Give a model random weights that keep the size of their inputs, and score biases too."""
    generator = torch.Generator().manual_seed(0)
    for name, table in model.named_buffers():
        if name.endswith(TABLES):  # numbers of experts by token id
            count = model.config.get_text_config().num_local_experts
            table.copy_(torch.randint(0, count, table.shape, generator=generator))
    buffers = [(n, x) for n, x in model.named_buffers() if n.endswith("correction_bias")]
    for name, parameter in [*model.named_parameters(), *buffers]:
        value = torch.randn(parameter.shape, generator=generator)
        if any(word in name for word in INITIALIZED) or name.endswith(".D"):
            continue
        if parameter.dim() > 1:
            value = value * parameter.shape[-1] ** -0.5
            value[..., :: max(1, parameter.shape[-1] // 8)] *= LOUD
            parameter.data.copy_(value)
        else:
            parameter.data.copy_(parameter.float() + 0.1 * value)
