"""The text model inside a wrapper, and the parts that text does not run through.

A wrapper is a vision-language or audio model of transformers. `leave_out_parts` takes its encoders
and projectors out, so that the rest of quantkit sees a language model whose layers lie deeper. The
names of tensors in a checkpoint come from transformers' own renaming at load: the same model is
stored with three prefixes of its text (`model.layers`, `model.language_model.layers`,
`language_model.model.layers`).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from quantkit.contracts import ModelPart
from quantkit.errors import CheckpointError
from quantkit.models.modules import list_prefixes
from quantkit.models.outer_model import find_layers, get_head, get_module_name
from quantkit.models.stubs import Stub

SHOWN = 3


class LeftOut(Stub):
    """Stands for a part of a wrapper that text does not run through; it cannot be called."""

    def __call__(self, *_arguments: Any, **_keywords: Any) -> Any:
        """Raise NotImplementedError."""
        raise NotImplementedError(
            "this part of the model is not loaded, as text does not run through it; load the "
            "folder with transformers"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> LeftOut:
        """Return itself: it has no state, and the part is never run."""
        return self


def find_text_root(model: Any) -> str:
    """Return the name of the module that holds a model's embedding and layers: its text model."""
    layers, _ = find_layers(model)
    inside = {*list_prefixes(get_module_name(model, model.get_input_embeddings()))}
    return max((name for name in list_prefixes(layers)[:-1] if name in inside), key=len)


def leave_out_parts(model: Any) -> dict[str, nn.Module]:
    """Replace everything around the text model and the head; return the parts by name."""
    root = find_text_root(model)
    kept = {*list_prefixes(root)}
    head = get_head(model)
    if head is not None:
        kept |= {*list_prefixes(get_module_name(model, head))}
    parts: dict[str, nn.Module] = {}
    for around in list_prefixes(root)[:-1]:
        for name, child in model.get_submodule(around).named_children():
            path = f"{around}.{name}" if around else name
            if path not in kept and list(child.parameters()):
                parts[path] = child
    for path, child in parts.items():
        model.set_submodule(path, LeftOut(child))
    return parts


def put_parts_back(model: Any, parts: Mapping[str, nn.Module]) -> Any:
    """Return a copy of a model with the parts that were left out."""
    whole = copy.deepcopy(model)
    for path, part in parts.items():
        whole.set_submodule(path, copy.deepcopy(part))
    return whole


def name_in_model(model: Any, names: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Return stored name -> name in transformers' model, as transformers loads it.

    Also returns the stored names that it converts to other tensors, mapped to the first of them.
    model: with all parts.
    """
    known = model.state_dict()
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix
    result: dict[str, str] = {}
    converted: set[str] = set()
    for name in names:
        renamed, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if renamed not in known and name in known:
            renamed, pattern = rename_source_key(name, [], [], prefix, known)
        result[name] = renamed
        converted |= {name} if pattern is not None else set()
    return result, converted


def find_parts(
    model: Any,
    left_out: Collection[str],
    named: Mapping[str, str],
    converted: Collection[str],
    claimed: Collection[str],
) -> tuple[ModelPart, ...]:
    """Return the copied parts: those left out, and tensors that transformers does not load.

    model: with all parts; named: stored name -> name in the model; claimed: stored names of the
    text model. transformers lists patterns of tensors that it does not load, such as multi-token
    prediction; engines do. Raises CheckpointError for a part without some of its tensors.
    """
    skipped = [re.compile(x) for x in model._keys_to_ignore_on_load_unexpected or ()]
    paths = sorted(left_out, key=len, reverse=True)
    known, parts = model.state_dict().keys(), dict[str, list[str]]()
    for name, path in named.items():
        if name in claimed:
            continue
        part = next((x for x in paths if path.startswith(f"{x}.")), None)
        if part is None and path not in known and any(x.search(path) for x in skipped):
            part = get_skipped_part(name)
        if part is not None:
            parts.setdefault(part, []).append(name)
    missing = {*known} - {*named.values()}
    absent = [re.compile(x) for x in model._keys_to_ignore_on_load_missing or ()]
    for part in paths:
        own = parts.get(part, [])
        gaps = [x for x in sorted(missing) if x.startswith(f"{part}.")]
        gaps = [x for x in gaps if not any(y.search(x) for y in absent)]
        if gaps and not {*own} & {*converted}:
            more = f" and {len(gaps) - SHOWN} more" if len(gaps) > SHOWN else ""
            raise CheckpointError(
                f"{part}: expected the tensors of transformers' {type(model).__name__}, found none "
                f"for {', '.join(gaps[:SHOWN])}{more}; fetch the checkpoint again"
            )
    return tuple(ModelPart(name=part, tensors=tuple(own)) for part, own in parts.items())


def get_skipped_part(name: str) -> str:
    """Return the part of a tensor that transformers does not load: "mtp", "model.layers.61"."""
    pieces = name.split(".")
    number = next((n for n, piece in enumerate(pieces) if piece.isdigit()), None)
    if "mtp" in pieces:
        return ".".join(pieces[: pieces.index("mtp") + 1])
    return ".".join(pieces[: number + 1]) if number is not None else pieces[0]


def find_relocation(canonical: str, stored: str) -> tuple[str, str]:
    """Return the prefixes in which two names of one tensor differ, without the last dot.

    ("model.layers.0.norm.weight", "model.language_model.layers.0.norm.weight") -> ("model",
    "model.language_model").
    """
    first, second = canonical.split("."), stored.split(".")
    same = 0
    while same < min(len(first), len(second)) and first[-1 - same] == second[-1 - same]:
        same += 1
    return ".".join(first[: len(first) - same]), ".".join(second[: len(second) - same])


def relocate(name: str, prefixes: tuple[str, str]) -> str:
    """Return a name with the first prefix replaced by the second; either may be empty."""
    before, after = prefixes
    rest = name.removeprefix(f"{before}.") if before else name
    if before and rest == name:
        return name
    return f"{after}.{rest}" if after else rest
