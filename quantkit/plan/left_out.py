"""Stored tensors that the layout of a model does not have: left out with a reason, or refused.

Tensors that no engine reads are left out: buffers that engines compute, a tied weight stored twice,
biases of zeros, parts that the recipe drops. Everything else is refused, with the nearest expected
name. Pure: conditions on values are returned as checks, which `check_values` reads.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Literal

from quantkit.contracts import Architecture, Layout, TensorSpec
from quantkit.formats.common.engine_names import LM_HEAD
from quantkit.io.yaml_document import printable

ROTARY = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb|rope)\."
    r"(\w*inv_freq|cos_cached|sin_cached|cos_cache|sin_cache)$"
)
MASK = re.compile(r"(^|\.)(attn|attention|self_attn|self_attention|crossattention)\.bias$")
MASK_VALUE = re.compile(
    r"(^|\.)(attn|attention|self_attn|self_attention|crossattention)\.masked_bias$"
)
POSITIONS = re.compile(r"(^|\.)position_ids$")
_BLOCK = re.compile(r"(.*?\.)?(\d+)\.")
_ADAPTER_PARTS = (".lora_", ".base_layer.", "lora_magnitude_vector")
MAX_CANDIDATES = 4000
"""Names that are compared with an unknown one."""
MAX_NEAREST = 8
"""Unknown names for which the nearest is searched; a message shows no more."""


@dataclass(frozen=True, kw_only=True)
class ValueCheck:
    """A condition on the values of `name`: equal to `other`, or all zero."""

    kind: Literal["equal", "zero"]
    name: str
    other: str = ""


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """A stored tensor that the artifact does not hold, and why.

    check: the condition on its values; None if its name and shape suffice.
    """

    name: str
    reason: str
    check: ValueCheck | None = None


def find_left_out(
    architecture: Architecture,
    layout: Layout,
    expected: Mapping[str, TensorSpec],
    specs: Mapping[str, TensorSpec],
    dropped_parts: Sequence[str] = (),
) -> tuple[LeftOut, ...]:
    """Return the stored tensors outside the layout that may be left out, in stored order.

    dropped_parts: prefixes of tensors that the recipe drops.
    """
    items = list[LeftOut]()
    for name, spec in specs.items():
        if name in expected:
            continue
        if reason := describe_buffer(spec):
            items.append(LeftOut(name=name, reason=reason))
        elif any(fnmatchcase(name, glob) for glob in architecture.dropped):
            items.append(LeftOut(name=name, reason="no engine reads it"))
        elif dropped_parts and name.startswith(tuple(dropped_parts)):
            items.append(LeftOut(name=name, reason="the recipe drops it (mtp: drop)"))
        elif item := find_duplicate(layout, expected, spec) or find_zero_bias(expected, spec):
            items.append(item)
    return tuple(items)


def describe_buffer(spec: TensorSpec) -> str:
    """Return why a stored buffer is left out; "" for any other tensor."""
    shape = spec.shape
    if ROTARY.search(spec.name):
        return "a table of rotary embeddings, which engines compute"
    if MASK.search(spec.name) and len(shape) >= 2 and shape[-1] == shape[-2]:
        return "a causal mask, which engines compute"
    if MASK_VALUE.search(spec.name) and spec.n_elements == 1:
        return "the value of masked positions, which engines know"
    if POSITIONS.search(spec.name) and spec.dtype.startswith("I"):
        return "a list of positions, which engines compute"
    return ""


def find_duplicate(
    layout: Layout, expected: Mapping[str, TensorSpec], spec: TensorSpec
) -> LeftOut | None:
    """Return a tied head that is stored a second time; None for other tensors."""
    embedding = f"{layout.embedding.name}.weight"
    is_head = layout.head is None and layout.output == "logits" and spec.name == f"{LM_HEAD}.weight"
    if not is_head or embedding not in expected or expected[embedding].shape != spec.shape:
        return None
    return LeftOut(
        name=spec.name,
        reason=f"equal to {embedding}, to which config.json ties it: stored once",
        check=ValueCheck(kind="equal", name=spec.name, other=embedding),
    )


def find_zero_bias(expected: Mapping[str, TensorSpec], spec: TensorSpec) -> LeftOut | None:
    """Return a bias of a module that has none in transformers; None for other tensors."""
    weight = expected.get(f"{spec.name.removesuffix('.bias')}.weight")
    is_bias = spec.name.endswith(".bias") and weight is not None
    if not is_bias or weight is None or spec.shape != weight.shape[:1]:
        return None
    return LeftOut(
        name=spec.name,
        reason="zeros; the module has no bias in transformers",
        check=ValueCheck(kind="zero", name=spec.name),
    )


def describe_unplaced(
    names: Sequence[str],
    expected: Mapping[str, TensorSpec],
    missing: Collection[str],
    layout: Layout,
) -> Iterator[str]:
    """Yield a sentence per tensor that has no place: the reason, and the nearest expected name."""
    candidates = list(missing or expected)[:MAX_CANDIDATES]
    for number, name in enumerate(names):
        reason = describe_foreign_part(name, layout)
        near = (
            difflib.get_close_matches(name, candidates, n=1, cutoff=0.75)
            if number < MAX_NEAREST
            else ()
        )
        nearest = f" (nearest: {near[0]})" if near and not reason else ""
        yield f"not claimed by the architecture: {printable(name)}{reason or nearest}"


def describe_foreign_part(name: str, layout: Layout) -> str:
    """Return in parentheses the part of a model that a name belongs to; "" if unknown."""
    if any(part in name for part in _ADAPTER_PARTS):
        return " (part of an adapter; merge it into the weights)"
    stack = layout.blocks[0].name.rpartition(".")[0] if layout.blocks else ""
    match = _BLOCK.match(name)
    if match and match[1] == f"{stack}." and int(match[2]) >= len(layout.blocks):
        return f" (block {match[2]}; config.json announces {len(layout.blocks)} blocks, from 0 on)"
    return ""


def summarize_left_out(items: Sequence[LeftOut]) -> list[str]:
    """Return a sentence per reason, with the number of tensors and their names."""
    groups: dict[str, list[str]] = {}
    for item in items:
        groups.setdefault(item.reason, []).append(item.name)
    return [f"{format_names(names)} left out: {reason}" for reason, names in groups.items()]


def format_names(names: Sequence[str]) -> str:
    """Format names for a sentence: all of a few, or a count and an example."""
    if len(names) == 1:
        return printable(names[0])
    return f"{len(names)} tensors ({printable(names[0])}, ...)"
