"""Texts that are longer than the model's context: a warning, or a fault of the recipe."""

from __future__ import annotations

from collections.abc import Iterator

from quantkit.contracts import Config, Layout
from quantkit.recipe.schema import Recipe

CONTEXT_KEYS = (
    "max_position_embeddings",
    "n_positions",
    "n_ctx",
    "max_seq_len",
    "max_sequence_length",
    "seq_length",
)
"""Keys of a config.json for the length of the context, in the order in which they are read."""
POSITION_TABLES = ("wpe", "embed_positions", "position_embeddings", "position_embedding")
"""Modules with a learned vector per position; a longer text has no vector."""


def read_context_length(config: Config) -> int | None:
    """Return the tokens of the model's context; None if config.json does not say."""
    for values in (config.values, config.values.get("text_config")):
        for key in CONTEXT_KEYS:
            value = values.get(key) if hasattr(values, "get") else None
            if type(value) is int and value > 0:
                return value
    return None


def list_text_lengths(recipe: Recipe) -> Iterator[tuple[tuple[str, str], int]]:
    """Yield the key and the value of each text's `length`."""
    if recipe.needs_calibration and recipe.calibration is not None:
        yield ("calibration", "length"), recipe.calibration.length
    if recipe.fidelity is not None:
        yield ("fidelity", "length"), recipe.fidelity.length


def find_context_warnings(recipe: Recipe, config: Config) -> list[str]:
    """Return a sentence per text that is longer than the model's context."""
    context = read_context_length(config)
    return [
        f"{'.'.join(key)}: {length} tokens are more than the model's context of {context}: the "
        "model was not trained on such positions"
        for key, length in list_text_lengths(recipe)
        if context is not None and length > context
    ]


def find_context_faults(recipe: Recipe, config: Config, layout: Layout) -> list[str]:
    """Return a fault per text that is longer than the model's table of positions."""
    tables = [
        spec
        for spec in layout.final_tensors
        if spec.name.removesuffix(".weight").rpartition(".")[2] in POSITION_TABLES
    ]
    context = read_context_length(config)
    if not tables or context is None:
        return []
    return [
        f"{recipe.where(*key)}: {'.'.join(key)}: expected at most {context}, the positions of "
        f"{tables[0].name}, found {length}; use fewer"
        for key, length in list_text_lengths(recipe)
        if length > context
    ]
