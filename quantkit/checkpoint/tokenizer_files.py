"""Diagnosis of a tokenizer that transformers cannot load: its own error may name no file."""

from __future__ import annotations

from pathlib import Path

from quantkit.checkpoint.file_names import CONFIG
from quantkit.contracts import Config
from quantkit.io.files import is_file, read_json

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

    from quantkit.checkpoint.hf_config import make_hf_config

    contents = {
        name: read_json(folder / name, infinite=name == CONFIG)
        for name in _FILES
        if is_file(folder / name)
    }
    values = contents.get(CONFIG, {})
    model_type = values.get("model_type")
    if not values or (isinstance(model_type, str) and model_type not in CONFIG_MAPPING):
        return  # a family that exists as code only, or none
    make_hf_config(Config(values=values, where=str(folder / CONFIG)))
