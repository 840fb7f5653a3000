"""The config.json of a source; a missing key is read on demand, as transformers reads it.

Without torch and transformers, whose import takes seconds, as long as no key is missing.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit import registry
from quantkit.contracts import Config


def make_source_config(values: Mapping[str, object], where: str) -> Config:
    """Return the config.json of a model; keys that it lacks are read as transformers does."""
    return Config(values=values, where=where, read_missing=read_missing_value)


def read_missing_value(config: Config, key: str) -> object:
    """Return the value that transformers reads for a key that config.json lacks, None if none."""
    from quantkit.checkpoint.hf_config import read_value  # imports transformers: seconds

    return read_value(config, key)


def read_text_config(config: Config) -> Config:
    """Return the configuration of the text model with all keys, as transformers reads it.

    That of a family with a table is returned unchanged: its keys have their usual names, and
    `read_missing` finds the others.
    """
    model_type = registry.resolve_model_type(str(config.values.get("model_type")))
    if model_type in registry.list_names("architectures"):
        return config
    from quantkit.checkpoint.hf_config import make_text_config  # imports transformers: seconds

    return make_text_config(config)
