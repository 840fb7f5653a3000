"""Folders and files that hold weights in another form: a description, and the one right step.

File names only, no file access: the same rules hold for folders and for repositories of the Hub.
"""

from __future__ import annotations

from collections.abc import Collection

from quantkit.checkpoint.file_names import ADAPTER_CONFIG, INDEX, SINGLE

PICKLED = (".bin", ".pt", ".pth", ".ckpt")
_EXPECTED = f"expected {SINGLE} or {INDEX}"
_SHOWN = 3


def describe_foreign_weights(names: Collection[str], where: str) -> str | None:
    """Describe the weights of a folder without safetensors; None for a set, or for unknown files.

    names: its files, without those in sub-folders.
    """
    if SINGLE in names or INDEX in names:
        return None
    if ADAPTER_CONFIG in names:
        return (
            f"{where}: {_EXPECTED}, found an adapter (LoRA) without its base model; merge it with "
            "peft (merge_and_unload, then save_pretrained into a new folder), and use that folder"
        )
    if gguf := _list_names(names, (".gguf",)):
        return (
            f"{where}: {_EXPECTED}, found GGUF files ({gguf}), quantized for llama.cpp; use the "
            "model that they were made from, which their model card names"
        )
    if names_of_mistral := [name for name in names if name.startswith("consolidated.")]:
        return (
            f"{where}: {_EXPECTED}, found {names_of_mistral[0]} only, whose tensors have Mistral's "
            "own names; fetch the files of the repository that transformers reads"
        )
    has_safetensors = any(name.endswith(".safetensors") for name in names)
    if not has_safetensors and (pickled := _list_names(names, PICKLED)):
        return (
            f"{where}: {_EXPECTED}, found pickled weights ({pickled}) only; quantkit reads "
            "safetensors only, convert them with transformers (from_pretrained, then "
            "save_pretrained into a new folder)"
        )
    return None


def describe_model_file(name: str) -> str:
    """Return why a file is no model, and what to give in its place."""
    if name.casefold().endswith(".gguf"):
        return (
            f"source.model: expected a folder of safetensors, found the GGUF file {name}, which is "
            "quantized for llama.cpp; use the model that it was made from"
        )
    return (
        f"source.model: expected the folder of a model, found the file {name}; give the folder "
        "that holds it and config.json"
    )


def _list_names(names: Collection[str], endings: tuple[str, ...]) -> str:
    matching = sorted(name for name in names if name.casefold().endswith(endings))
    return ", ".join(matching[:_SHOWN])
