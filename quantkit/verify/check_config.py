"""Checks of config.json against the tensors: quantization, module lists as engines read them,
shape.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

from quantkit import registry
from quantkit.checkpoint.file_names import CONFIG
from quantkit.checkpoint.source_config import make_source_config
from quantkit.errors import ArtifactError, CheckpointError, QuantkitError
from quantkit.formats.common.checks import IntegerCodes, Loader, Treatment, group_by_codes
from quantkit.formats.common.engine_names import LM_HEAD, expand_fused_names
from quantkit.plan.match_checkpoint import match_layout
from quantkit.verify.classify_tensors import TensorContents, make_quantization_config

MAX_SHOWN = 3
"""Modules of one kind of fault that a message names; the others are counted."""


def find_config_faults(values: Mapping[str, object], contents: TensorContents) -> Iterator[str]:
    """Yield where config.json and the tensors disagree about quantization, one sentence each."""
    entry = values.get("quantization_config")
    if contents.name is None:
        if entry is not None:
            yield "config.json: quantization_config: expected none, as nothing is quantized"
        return
    output, checks = registry.get_format(contents.name), registry.get_checks(contents.name)
    if values.get("tie_word_embeddings") is True and LM_HEAD not in contents.kept:
        contents = replace(contents, kept=(*contents.kept, LM_HEAD))
    expected, fault = make_quantization_config(output, contents.contents)
    if fault:
        yield f"config.json: {fault}"
        return
    if expected is None or not isinstance(entry, Mapping):
        if entry is not None or expected is not None:
            expectation = f"that of format {contents.name}" if expected else "none"
            yield f"config.json: quantization_config: expected {expectation}, found {entry!r:.60}"
        return
    yield from find_differences(expected, entry, checks.module_lists, "quantization_config")
    for loader in checks.loaders:
        try:
            yield from find_loader_faults(loader, entry, contents)
        except ArtifactError as unreadable:
            yield str(unreadable)


def find_loader_faults(
    loader: Loader, entry: Mapping[str, object], contents: TensorContents
) -> Iterator[str]:
    """Yield the modules that an engine would misread.

    Raises ArtifactError for an unreadable list.
    """
    treatment, blocks = loader.classify(entry), set(contents.fp8)
    wrong: dict[tuple[Treatment, Treatment], list[str]] = {}
    stored: Mapping[Treatment, Sequence[str]] = {
        **dict(group_by_codes(contents.schemes)),
        "fp8": contents.fp8,
        "plain": [name for name in contents.kept if name not in blocks],
    }
    for kind, names in stored.items():
        for name in expand_fused_names(names) if loader.has_fused_names else names:
            seen = treatment(name)
            if seen != kind and not (seen == "codes" and isinstance(kind, IntegerCodes)):
                wrong.setdefault((kind, seen), []).append(name)
    for (kind, seen), names in wrong.items():
        yield format_misread(loader.engines, kind, seen, names)


TREATMENT_WORDS: Mapping[str, str] = {
    "codes": "quantized",
    "fp8": "in FP8 blocks",
    "plain": "not quantized",
}


def format_misread(
    engines: str, stored_as: Treatment, read_as: Treatment, names: Sequence[str]
) -> str:
    """Return the sentence for modules that engines would read as something else."""
    more = f" and {len(names) - MAX_SHOWN} more" if len(names) > MAX_SHOWN else ""
    verb = "is" if len(names) == 1 else "are"
    stored, read = (
        TREATMENT_WORDS["codes" if isinstance(kind, IntegerCodes) else kind]
        for kind in (stored_as, read_as)
    )
    if isinstance(stored_as, IntegerCodes) and isinstance(read_as, IntegerCodes):
        stored, read = f"of {stored_as}", f"of {read_as}"
    return (
        f"config.json: quantization_config: {', '.join(names[:MAX_SHOWN])}{more} {verb} {stored} "
        f"in the tensors, but {read} to {engines}"
    )


def find_differences(
    expected: object, actual: object, skip: frozenset[str], where: str
) -> Iterator[str]:
    """Yield the keys whose values differ.

    Keys in `skip`, lists of modules, are judged by meaning.
    """
    if isinstance(expected, Mapping) and isinstance(actual, Mapping):
        for key in dict.fromkeys([*expected, *map(str, actual)]):
            if key not in skip:
                yield from find_differences(
                    expected.get(key, MISSING), actual.get(key, MISSING), skip, f"{where}.{key}"
                )
    elif type(expected) is not type(actual) or expected != actual:
        yield (
            f"config.json: {where}: the tensors ask for {format_value(expected)}, found "
            f"{format_value(actual)}"
        )


MISSING = object()


def format_value(value: object) -> str:
    """Format a value for a sentence."""
    return "nothing" if value is MISSING else f"{value!r:.60}"


def find_model_faults(
    values: Mapping[str, object], contents: TensorContents
) -> tuple[list[str], str | None]:
    """Return how the tensors differ from config.json's model, or why that was not checked."""
    plain = {key: value for key, value in values.items() if key != "quantization_config"}
    if fault := find_size_fault(plain, len(contents.logical)):
        return [fault], None
    config = make_source_config(plain, CONFIG)
    try:
        model_type = config.text("model_type")
        if model_type not in registry.list_names("architectures"):
            return (
                [],
                f"no table for model_type {model_type!r}: tensors were not compared with the "
                "model's shape",
            )
        matched = match_layout(
            registry.get_architecture(model_type), config, contents.logical, CONFIG
        )
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
    if extra := [item.name for item in matched.left_out]:
        return [
            f"{extra[0]}: expected no tensor that engines do not read, found {len(extra)}"
        ], None
    absent = len(matched.architecture.layout(config).blocks) - len(matched.layout.blocks)
    return [
        f"config.json: announces {absent} MTP block, of which no tensor is stored"
    ] if absent else [], None


LAYERS = ("num_hidden_layers", "num_nextn_predict_layers")
EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts")


def find_size_fault(values: Mapping[str, object], tensors: int) -> str | None:
    """Return why a model of this size cannot be in so few tensors.

    Checked before a table of tensors is made, which an absurd number would make enormous.
    """
    counts = {key: n for key in (*LAYERS, *EXPERTS) if type(n := values.get(key)) is int}
    if too_large := [key for key, n in counts.items() if n > tensors]:
        return (
            f"config.json: {too_large[0]}: expected at most {tensors}, the number of tensors, "
            f"found {counts[too_large[0]]:.3g}"
        )
    n_experts = max([counts.get(key, 0) for key in LAYERS]) * max([
        counts.get(key, 0) for key in EXPERTS
    ])
    if n_experts > 10 * tensors + 1000:
        return (
            f"config.json: expected the layers and experts of {tensors} tensors, found {n_experts} "
            "experts in all"
        )
    return None
