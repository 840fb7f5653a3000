"""Does config.json say what the tensors hold: schemes, lists of modules as engines read them, the model's shape?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from quantkit import registry
from quantkit.checkpoint.file_names import CONFIG
from quantkit.contracts import Config
from quantkit.errors import ArtifactError, CheckpointError, QuantkitError
from quantkit.formats.common.checks import IntegerCodes, Loader, Treatment, group_by_codes
from quantkit.formats.common.engine_names import LM_HEAD, expand_fused_names
from quantkit.plan.match_checkpoint import match_layout
from quantkit.verify.classify_tensors import Found, config_contents

SHOWN = 3
"""Modules of one kind of fault that are named; the rest is counted."""


def config_faults(values: Mapping[str, object], found: Found) -> Iterator[str]:
    """Where config.json and the tensors disagree about quantization, one sentence each."""
    entry = values.get("quantization_config")
    if found.name is None:
        if entry is not None:
            yield "config.json: quantization_config: expected none, as nothing is quantized"
        return
    output, checks = registry.get_format(found.name), registry.get_checks(found.name)
    if values.get("tie_word_embeddings") is True and LM_HEAD not in found.kept:
        found = replace(found, kept=(*found.kept, LM_HEAD))
    expected, fault = config_contents(output, found.contents)
    if fault:
        yield f"config.json: {fault}"
        return
    if expected is None or not isinstance(entry, Mapping):
        if entry is not None or expected is not None:
            told = f"that of format {found.name}" if expected else "none"
            yield f"config.json: quantization_config: expected {told}, found {entry!r:.60}"
        return
    yield from differences(expected, entry, checks.module_lists, "quantization_config")
    for loader in checks.loaders:
        try:
            yield from loader_faults(loader, entry, found)
        except ArtifactError as unreadable:
            yield str(unreadable)


def loader_faults(loader: Loader, entry: Mapping[str, object], found: Found) -> Iterator[str]:
    """Modules that an engine would take for something else; ArtifactError for a list that it could not read."""
    treatment, blocks = loader.classify(entry), set(found.fp8)
    wrong: dict[tuple[Treatment, Treatment], list[str]] = {}
    held: Mapping[Treatment, Sequence[str]] = {
        **dict(group_by_codes(found.schemes)),
        "fp8": found.fp8,
        "plain": [name for name in found.kept if name not in blocks],
    }
    for kind, names in held.items():
        for name in expand_fused_names(names) if loader.has_fused_names else names:
            taken = treatment(name)
            if taken != kind and not (taken == "codes" and isinstance(kind, IntegerCodes)):
                wrong.setdefault((kind, taken), []).append(name)
    for (kind, taken), names in wrong.items():
        yield misread(loader.engines, kind, taken, names)


WORDS: Mapping[str, str] = {"codes": "quantized", "fp8": "in FP8 blocks", "plain": "not quantized"}


def misread(engines: str, held: Treatment, taken: Treatment, names: Sequence[str]) -> str:
    """The sentence for modules that engines would take for something else than they are."""
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    verb = "is" if len(names) == 1 else "are"
    here, there = (
        WORDS["codes" if isinstance(each, IntegerCodes) else each] for each in (held, taken)
    )
    if isinstance(held, IntegerCodes) and isinstance(taken, IntegerCodes):
        here, there = f"of {held}", f"of {taken}"
    return (
        f"config.json: quantization_config: {', '.join(names[:SHOWN])}{more} {verb} {here} in the tensors, but {there} "
        f"to {engines}"
    )


def differences(expected: object, found: object, skip: frozenset[str], where: str) -> Iterator[str]:
    """Keys whose values differ; lists of modules are judged by what they mean, not by their spelling."""
    if isinstance(expected, Mapping) and isinstance(found, Mapping):
        for key in dict.fromkeys([*expected, *map(str, found)]):
            if key not in skip:
                yield from differences(
                    expected.get(key, MISSING), found.get(key, MISSING), skip, f"{where}.{key}"
                )
    elif type(expected) is not type(found) or expected != found:
        yield f"config.json: {where}: the tensors ask for {told(expected)}, found {told(found)}"


MISSING = object()


def told(value: object) -> str:
    """A value for a sentence."""
    return "nothing" if value is MISSING else f"{value!r:.60}"


def model_faults(values: Mapping[str, object], found: Found) -> tuple[list[str], str | None]:
    """Where the tensors are not those of the model that config.json describes; or why that was not looked at."""
    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    if fault := size_fault(plain, len(found.logical)):
        return [fault], None
    config = Config(values=plain, where=CONFIG)
    try:
        model_type = config.text("model_type")
        if model_type not in registry.list_names("architectures"):
            return (
                [],
                f"no table for model_type {model_type!r}: tensors were not compared with the model's shape",
            )
        claimed = match_layout(registry.get_architecture(model_type), config, found.logical, CONFIG)
    except (CheckpointError, QuantkitError) as fault:
        return [str(fault)], None
    except (
        ArithmeticError,
        TypeError,
        ValueError,
        LookupError,
    ) as fault:  # sizes that are none: heads of 0, say
        return [
            f"config.json: expected the sizes of a model, found some that fit no model: {fault}"
        ], None
    absent = len(claimed.architecture.layout(config).blocks) - len(claimed.layout.blocks)
    return [
        f"config.json: announces {absent} MTP block, of which no tensor is stored"
    ] if absent else [], None


LAYERS = ("num_hidden_layers", "num_nextn_predict_layers")
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def size_fault(values: Mapping[str, object], tensors: int) -> str | None:
    """Why a model of so many layers and experts cannot be in so few tensors: no table is made of a number gone wild."""
    counts = {key: n for key in (*LAYERS, *EXPERTS) if type(n := values.get(key)) is int}
    if far := [key for key, n in counts.items() if n > tensors]:
        return f"config.json: {far[0]}: expected at most {tensors}, the number of tensors, found {counts[far[0]]:.3g}"
    together = max([counts.get(key, 0) for key in LAYERS]) * max([
        counts.get(key, 0) for key in EXPERTS
    ])
    if together > 10 * tensors + 1000:
        return f"config.json: expected the layers and experts of {tensors} tensors, found {together} experts in all"
    return None
