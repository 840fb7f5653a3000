"""Changes of recipe, plan, gates, sizes and tensors, by key and by name. Pure."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Literal

from quantkit.diff.diff_schema import Change, Quantity, TensorGroup
from quantkit.diff.sides import Side, Tensors
from quantkit.report import format_numbers
from quantkit.report.module_ranges import fold_names

ABSENT = "none"
UNQUANTIZED = "not quantized"


def compare_recipes(a: Side, b: Side) -> tuple[Change, ...]:
    """Return the keys of the resolved recipes that differ.

    A value that rules inherit from `quantize` is listed once, under `quantize`.
    """
    if a.recipe is None or b.recipe is None:
        return ()
    differences = list_changes(_flatten(a.recipe), _flatten(b.recipe))
    default = {
        change.key.rpartition(".")[2]: change
        for change in differences
        if change.key.startswith("quantize.")
    }

    def is_inherited(change: Change) -> bool:
        head, _, key = change.key.rpartition(".")
        same = default.get(key)
        return head.startswith("rules[") and head.endswith("].quantize") and same is not None and (
            (change.a, change.b) == (same.a, same.b)
        )  # fmt: skip

    return tuple(change for change in differences if not is_inherited(change))


def compare_plans(a: Side, b: Side) -> tuple[Change, ...]:
    """Return the keys of the plans that differ: results of the rules, and totals."""
    return (
        () if a.plan is None or b.plan is None else list_changes(_flatten(a.plan), _flatten(b.plan))
    )


def list_changes(first: Mapping[str, str], second: Mapping[str, str]) -> tuple[Change, ...]:
    """Return the keys whose text differs, in the order of the first, then of the second."""
    keys = dict.fromkeys((*first, *second))
    return tuple(
        Change(key=k, a=first.get(k), b=second.get(k))
        for k in keys
        if first.get(k) != second.get(k)
    )


def compare_gates(a: Side, b: Side) -> tuple[Change, ...]:
    """Return every bound of either side, with result and value on both."""
    results = [
        {
            f"{row.figure} {row.bound}": f"{row.outcome} ({format_numbers.format_gate_value(row)})"
            if row.value is not None
            else row.outcome
            for row in side.fidelity.gates
        }
        for side in (a, b)
    ]
    return tuple(
        Change(key=k, a=results[0].get(k), b=results[1].get(k))
        for k in dict.fromkeys((*results[0], *results[1]))
    )


def compare_fallbacks(a: Side, b: Side) -> tuple[Change, ...]:
    """Return the number of modules per fallback, if it differs."""
    first, second = (
        {row.kind: f"{len(row.modules):,}" for row in s.fidelity.fallbacks} for s in (a, b)
    )
    keys = dict.fromkeys((*first, *second))
    counts = (Change(key=k, a=first.get(k, "0"), b=second.get(k, "0")) for k in keys)
    return tuple(change for change in counts if change.a != change.b)


def group_decisions(a: Side, b: Side) -> tuple[TensorGroup, ...]:
    """Return the linear layers with different decisions, grouped by decision."""
    if a.decisions is None or b.decisions is None:
        return ()
    pairs = {
        name: (a.decisions.get(name, ABSENT), b.decisions.get(name, ABSENT))
        for name in {**a.decisions, **b.decisions}
    }
    return _group_names("decision", pairs)


def group_schemes(a: Side, b: Side) -> tuple[TensorGroup, ...]:
    """Return the matrices with different schemes, for sides without a plan."""
    first, second = (
        {m.name: m.scheme for m in side.fidelity.modules if m.method} for side in (a, b)
    )
    pairs = {
        name: (first.get(name, UNQUANTIZED), second.get(name, UNQUANTIZED))
        for name in {**first, **second}
    }
    return _group_names("scheme", pairs)


def group_tensors(a: Side, b: Side) -> tuple[TensorGroup, ...]:
    """Return the tensors that were added, removed, or changed in dtype or shape."""
    if a.tensors is None or b.tensors is None:
        return ()
    first, second = a.tensors, b.tensors
    common = [name for name in first if name in second]
    dtypes = {name: (first[name][0], second[name][0]) for name in common}
    shapes = {
        name: (_format_shape(first[name][1]), _format_shape(second[name][1])) for name in common
    }
    return (
        *_group_names(
            "removed", {name: (first[name][0], ABSENT) for name in first if name not in second}
        ),
        *_group_names(
            "added", {name: (ABSENT, second[name][0]) for name in second if name not in first}
        ),
        *_group_names("dtype", dtypes),
        *_group_names("shape", shapes),
    )


def compare_sizes(a: Side, b: Side) -> tuple[Quantity, ...]:
    """Return bytes, bits and counts of both sides."""
    first, second = a.fidelity.artifact, b.fidelity.artifact
    quantized = [bool(side.fidelity.modules) for side in (a, b)]
    rows = [
        Quantity(name="weights", unit="B", a=first.bytes_artifact, b=second.bytes_artifact),
        Quantity(
            name="bits per weight, all tensors",
            unit="bits",
            a=8 * first.bytes_artifact / first.parameters if first.parameters else None,
            b=8 * second.bytes_artifact / second.parameters if second.parameters else None,
        ),
        Quantity(
            name="bits per quantized weight",
            unit="bits",
            a=first.bits_per_weight if quantized[0] else None,
            b=second.bits_per_weight if quantized[1] else None,
        ),
        Quantity(name="tensors", unit="", a=_count_tensors(a.tensors), b=_count_tensors(b.tensors)),
        Quantity(name="quantized matrices", unit="", a=_count_quantized(a), b=_count_quantized(b)),
    ]
    if a.files and b.files:
        held = [sum(size for _, size in side.files.values()) for side in (a, b) if side.files]
        rows.insert(1, Quantity(name="the whole folder", unit="B", a=held[0], b=held[1]))
    return tuple(rows)


def has_same_weights(a: Side, b: Side) -> bool:
    """Return whether the weight files of both are identical."""
    first, second = (
        {n: f for n, f in (s.files or {}).items() if n.endswith(".safetensors")} for s in (a, b)
    )
    return bool(first) and first == second


def _count_quantized(side: Side) -> int:
    return sum(module.method is not None for module in side.fidelity.modules)


def _count_tensors(tensors: Tensors | None) -> int | None:
    return None if tensors is None else len(tensors)


def _flatten(values: object, path: str = "") -> dict[str, str]:
    """Flatten JSON values into text by dotted key: {"quantize.bits": "4"}; null is left out."""
    items: Iterable[tuple[str, object]]
    if isinstance(values, Mapping):
        items = ((f"{path}.{key}" if path else str(key), value) for key, value in values.items())
    elif isinstance(values, list) and any(isinstance(value, Mapping) for value in values):
        items = ((f"{path}[{place}]", value) for place, value in enumerate(values))
    else:
        text = f"{values:.10g}" if isinstance(values, float) else json.dumps(values)
        return {} if values is None else {path: values if isinstance(values, str) else text}
    return {key: text for name, value in items for key, text in _flatten(value, name).items()}


def _group_names(
    change: Literal["added", "removed", "dtype", "shape", "decision", "scheme"],
    pairs: Mapping[str, tuple[str, str]],
) -> tuple[TensorGroup, ...]:
    """Group the names whose two texts differ by those texts, the largest group first."""
    groups: dict[tuple[str, str], list[str]] = {}
    for name, (a, b) in pairs.items():
        if a != b:
            groups.setdefault((a, b), []).append(name)
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    return tuple(
        TensorGroup(change=change, a=a, b=b, count=len(n), names=tuple(fold_names(n)))
        for (a, b), n in ordered
    )


def _format_shape(shape: tuple[int, ...]) -> str:
    return f"[{', '.join(map(str, shape))}]"
