"""The output of the model of a config.json: logits, labels of a head, or hidden states."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

from quantkit.checkpoint.canonical_names import HEADS
from quantkit.contracts import Config, Layout, Linear, TensorSpec
from quantkit.formats.common.engine_names import LM_HEAD

Output = Literal["logits", "labels", "states"]

_LABELS = re.compile(r"\w+For(Sequence|Token)Classification|\w+For(Process)?RewardModel")
_STATES = re.compile(r"\w+Model")


def read_output_kind(config: Config) -> Output:
    """Return the kind of output of the class in `architectures`; logits without one."""
    names = config.values.get("architectures")
    name = str(names[0]) if isinstance(names, list) and len(names) == 1 else ""
    if _LABELS.fullmatch(name):
        return "labels"
    return "states" if _STATES.fullmatch(name) and "For" not in name else "logits"


def adapt_head(layout: Layout, config: Config, specs: Mapping[str, TensorSpec] | None) -> Layout:
    """Return the layout with the head of the class in `architectures`.

    A classifier or reward model has the stored linears under `score.` or `classifier.`, an
    embedding model has none. A model that stores a language head keeps its layout.
    """
    kind = read_output_kind(config)
    if specs is None or kind == "logits" or f"{LM_HEAD}.weight" in specs:
        return layout
    if kind == "states":
        return replace(layout, head=None, output=kind)
    stored = {
        name: spec
        for name, spec in specs.items()
        if name.startswith(HEADS) and not name.startswith(f"{LM_HEAD}.")
    }
    weights = [name for name, spec in stored.items() if is_linear_weight(spec)]
    if not weights:
        head = Linear(
            name="score",
            out_features=config.integer("num_labels", 2),
            in_features=layout.embedding.in_features,
            role="head",
        )
        return replace(layout, head=head, output=kind)
    rows, columns = stored[weights[-1]].shape
    head = Linear(
        name=weights[-1].removesuffix(".weight"),
        out_features=rows,
        in_features=columns,
        role="head",
    )
    others = tuple(spec for name, spec in stored.items() if name != weights[-1])
    return replace(layout, head=head, final_tensors=(*layout.final_tensors, *others), output=kind)


def is_linear_weight(spec: TensorSpec) -> bool:
    """Return whether a stored tensor is the weight of a linear."""
    return spec.name.endswith(".weight") and len(spec.shape) == 2
