"""Diagnosis of a tokenizer that transformers cannot load: its own error may name no file."""

from __future__ import annotations

import copy
from pathlib import Path

from quantkit.checkpoint.file_names import CONFIG
from quantkit.io.files import is_file, make_config_error, read_json

_FILES = (
    CONFIG,
    "tokenizer_config.json",
    "tokenizer.json",
    "special_tokens_map.json",
    "added_tokens.json",
)


def check_tokenizer_files(folder: Path) -> None:
    """Check the tokenizer's files after transformers failed to load it.

    Raises CheckpointError for the first file that is no JSON object, and for a config.json that
    transformers refuses.
    """
    from transformers import CONFIG_MAPPING

    contents = {name: read_json(folder / name) for name in _FILES if is_file(folder / name)}
    values = {key: value for key, value in contents.get(CONFIG, {}).items() if key != "auto_map"}
    model_type = values.get("model_type")
    if not values or (isinstance(model_type, str) and model_type not in CONFIG_MAPPING):
        return  # a family that exists as code only, or none
    try:
        CONFIG_MAPPING[model_type].from_dict(copy.deepcopy(values))
    except Exception as fault:
        raise make_config_error(folder / CONFIG, model_type, fault) from fault
