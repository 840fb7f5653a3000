"""Names of models on the Hub, and file names of a checkpoint in Hugging Face's layout."""

from __future__ import annotations

import re

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
"""The id of a model on the Hub: owner/name."""

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
