"""The tensors of an artifact against the parameters of an engine's model. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from quantkit.contracts import Config, TensorSpec
from quantkit.verify.engines.model_map import (
    EngineMaps,
    ModelMap,
    Parameter,
    WrapperMap,
    list_parameters,
)

MAX_SHOWN = 5
EVERY_LAYER = re.compile(r"\blayers\.(\d+)\.")
TOGETHER = re.compile(r"\.experts\.(gate_up_proj|down_proj)(\.\w+)?$")
COMPUTED = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached")
"""Ends of tensors that engines compute and skip."""
How = Literal["run", "names", "not checked"]


@dataclass(frozen=True, kw_only=True)
class EngineCheck:
    """Whether an engine's model and an artifact fit.

    how: "run": the engine's own loader ran on names and shapes; "names": its published map was
    followed; "not checked": `reason` says why. tensors: those of the artifact that have a
    parameter; skipped: those that the engine leaves out on purpose; faults: a sentence each.
    """

    engine: str
    version: str = ""
    how: How
    reason: str = ""
    tensors: int = 0
    skipped: int = 0
    faults: tuple[str, ...] = ()

    def describe_check(self) -> str:
        """Return "291 tensors by the published map of vLLM 0.32.0; not run"."""
        if self.how == "not checked":
            return f"not checked: {self.reason}"
        name = f"{self.engine} {self.version}".rstrip()
        how = (
            f"loaded by {name} without values"
            if self.how == "run"
            else f"by the published map of {name}; not run"
        )
        skipped = f"; it skips {self.skipped:,} others" if self.skipped else ""
        noun = "tensor" if self.tensors == 1 else "tensors"
        faults = f"; {join_faults(self.faults)}" if self.faults else ""
        return f"{self.tensors:,} {noun} {how}{skipped}{faults}"


def join_faults(faults: tuple[str, ...]) -> str:
    """Return the first faults in one text, with the number of the others."""
    more = f"; and {len(faults) - MAX_SHOWN:,} more" if len(faults) > MAX_SHOWN else ""
    return "; ".join(faults[:MAX_SHOWN]) + more


def check_with_map(
    maps: EngineMaps,
    config: Config,
    tensors: Mapping[str, TensorSpec],
    forms: Mapping[str, object],
) -> EngineCheck:
    """Compare an artifact with the model that an engine makes of its config.json.

    tensors: the artifact's, by their stored names, packed weights as the weights that they decode
    to; forms: module -> how its weight is stored; modules with equal forms can be joined. Raises
    CheckpointError for a size that config.json lacks.
    """
    name = read_class(config)
    entry = maps.models.get(name)
    if entry is None:
        return make_unchecked(maps, f"quantkit has no map of {name or 'an unnamed class'}")
    if any(TOGETHER.search(name) for name in tensors):
        return make_unchecked(maps, "experts are stored together, which the map does not cover")
    _, model = entry
    text = model.text if isinstance(model, WrapperMap) else model
    prefixes: Mapping[str, str] = model.prefixes if isinstance(model, WrapperMap) else {}
    outside = model.parts if isinstance(model, WrapperMap) else ()
    parameters = list_model_parameters(model, text, config)
    expected = dict(list_tensors(parameters))
    faults, seen, skipped = list[str](), set[str](), 0
    for stored, spec in tensors.items():
        mapped = map_prefix(stored, prefixes)
        if mapped in expected:
            engine, shape = expected[mapped]
            seen.add(mapped)
            if tuple(spec.shape) != shape:
                actual = list(spec.shape)
                faults.append(
                    f"tensor {stored}: expected {list(shape)} for {engine}, found {actual}"
                )
        elif is_skipped(mapped, config) or mapped.startswith(outside or ("\0",)):
            skipped += 1
        else:
            faults.append(f"tensor {stored}: {name} of {maps.engine} has no parameter for it")
    for lost in expected.keys() - seen:
        faults.append(f"{expected[lost][0]}: expected tensor {lost} for it, found none")
    renamed = {map_prefix(f"{module}.", prefixes)[:-1]: form for module, form in forms.items()}
    faults += find_mixed_parts(parameters, renamed)
    return EngineCheck(
        engine=maps.engine,
        version=maps.version,
        how="names",
        tensors=len(seen),
        skipped=skipped,
        faults=tuple(sorted(faults)),
    )


def make_unchecked(maps: EngineMaps, reason: str) -> EngineCheck:
    """Return the check of an engine that was not made."""
    return EngineCheck(engine=maps.engine, version=maps.version, how="not checked", reason=reason)


def read_class(config: Config) -> str:
    """Return the class of the model that config.json names, "" for none."""
    names = config.values.get("architectures")
    return str(names[0]) if isinstance(names, list) and names else ""


def list_model_parameters(
    model: ModelMap | WrapperMap, text: ModelMap, config: Config
) -> dict[str, Parameter]:
    """Return the parameters of a language model, or of a wrapper's text model."""
    if isinstance(model, ModelMap):
        return list_parameters(text, config)
    inner = config.values.get("text_config")
    values = {**config.values, **inner} if isinstance(inner, Mapping) else config.values
    if "tie_word_embeddings" in config.values:
        values = {**values, "tie_word_embeddings": config.values["tie_word_embeddings"]}
    return list_parameters(
        text,
        Config(values=values, where=config.where, read_missing=config.read_missing),
        "language_model.model.",
        "language_model.lm_head",
    )


def list_tensors(
    parameters: Mapping[str, Parameter],
) -> Iterator[tuple[str, tuple[str, tuple[int, ...]]]]:
    """Yield tensor -> (the engine's parameter, the shape of the tensor)."""
    for name, parameter in parameters.items():
        rows, columns = parameter.rows, parameter.columns
        module, _, local = name.rpartition(".")
        yield name, (f"{parameter.engine}.{local}", (rows,) if columns is None else (rows, columns))
        if parameter.bias:
            yield f"{module}.bias", (f"{parameter.engine}.bias", (rows,))


def map_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """Return a tensor's name with the engine's prefix."""
    old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
    return prefixes[old] + name.removeprefix(old) if old else name


def is_skipped(name: str, config: Config) -> bool:
    """Return whether engines leave out a tensor: tables, a tied head, multi-token prediction."""
    if name.endswith(COMPUTED):
        return True
    if name.endswith("lm_head.weight") and config.flag("tie_word_embeddings", False):
        return True
    layer = EVERY_LAYER.search(name)
    predicts = config.integer("num_nextn_predict_layers", 0) > 0
    return bool(predicts and layer and int(layer[1]) >= config.integer("num_hidden_layers"))


def find_mixed_parts(
    parameters: Mapping[str, Parameter], forms: Mapping[str, object]
) -> Iterator[str]:
    """Yield joined modules whose parts are stored in different forms."""
    joined: dict[str, dict[str, object]] = {}
    for name, parameter in parameters.items():
        module = name.rpartition(".")[0]
        if module in forms and parameter.columns is not None:
            joined.setdefault(parameter.engine, {})[module] = forms[module]
    for engine, parts in joined.items():
        first, *others = parts
        for other in others:
            if parts[other] != parts[first]:
                yield (
                    f"{engine}: expected one form for the modules that it joins, found "
                    f"{first} as {parts[first]} and {other} as {parts[other]}"
                )
                break
