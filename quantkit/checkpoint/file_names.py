"""File names of a checkpoint in Hugging Face's layout."""

from __future__ import annotations

CONFIG = "config.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_CARD = "README.md"
ADAPTER_CONFIG = "adapter_config.json"
CHAT_TEMPLATES = "additional_chat_templates"
"""The folder of named chat templates."""

SINGLE = "model.safetensors"
"""The weight file of a checkpoint without an index."""
INDEX = "model.safetensors.index.json"


def format_shard_name(number: int, count: int) -> str:
    """Return the name of a shard, counted from 1: "model-00001-of-00003.safetensors"."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"
