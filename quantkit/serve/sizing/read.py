"""From what a user names to a Model: an artifact or model folder, a recipe, a config.json, a published hub id.

No torch and no weights: headers, plans and configs alone. A family without a table takes transformers, and seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from quantkit import registry
from quantkit.checkpoint.file_names import CONFIG, INDEX, SINGLE
from quantkit.checkpoint.fp8_pairs import get_scale_suffix, select_logical_specs
from quantkit.checkpoint.shards import open_shards
from quantkit.contracts import Config, Scheme, TensorSpec
from quantkit.errors import CheckpointError, RecipeError, UsageError
from quantkit.io.files import read_json
from quantkit.io.package_data import BUILTIN_PREFIX, locate_model
from quantkit.plan import published
from quantkit.plan.match_checkpoint import list_expected_tensors, read_fp8_block_size
from quantkit.plan.plan import (
    SourceFacts,
    apply_rules,
    list_written_tensors,
    load_architecture,
    match_source,
)
from quantkit.recipe.schema import Recipe
from quantkit.serve.sizing.model import Layer, Model, ReadFrom, Weights
from quantkit.serve.sizing.weight_bytes import weigh

Width = Literal["bf16", "fp16", "fp8", "int8", "int4"]
WIDTHS: Mapping[Width, int] = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}
"""Bits of a weight, for the rule of thumb that counts every parameter alike."""


def read_model(target: str, width: Width | None = None) -> Model:
    """The model in a folder (with or without weights), of a config.json, or of a hub id whose config is shipped.

    `width`: every parameter at that width instead, without scales. Raises UsageError for what is none of these,
    CheckpointError for a damaged one.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UsageError(
                f"{target}: expected the folder of an artifact or a model, found no {CONFIG} in it"
            )
        has_weights = (path / INDEX).exists() or (path / SINGLE).exists()
        made = stored_model(path) if has_weights else config_model(path / CONFIG)
    elif path.is_file():
        made = config_model(path)
    elif target.startswith(BUILTIN_PREFIX):
        made = replace(stored_model(locate_model(target)), name=target)
    elif found := published.find_published_config(target):
        made = planned_by_config(found[1], target)
    else:
        raise UsageError(
            f"{target}: expected an artifact, a recipe, a config.json or a hub id whose config ships with quantkit "
            f"({', '.join(published.list_published_models()[:3])}, ...), found none of them; check the path, or fetch its config.json"
        )
    return made if width is None else assume_width(made, width)


def stored_model(folder: Path) -> Model:
    """The model whose weights lie in a folder, from their headers: exact bytes."""
    config = Config(values=read_json(folder / CONFIG), where=str(folder / CONFIG))
    shards = open_shards(folder)
    told, name = scheme_of(config, shards.specs), folder.resolve().name
    if not tabled(config):
        return unknown(config, name, "headers", told, shards.specs.values())
    layout = load_architecture(config).layout(config)
    entry = config.values.get("quantization_config")
    by_row = any(word in str(entry) for word in ("'group_size': -1", "'channel'"))
    return weigh(
        layout,
        shards.specs.values(),
        config,
        name=name,
        read_from="headers",
        scheme=told,
        by_row=by_row,
    )


def config_model(path: Path) -> Model:
    """The model that a config.json alone describes; UsageError for one that is damaged or describes none."""
    try:
        return planned_by_config(
            Config(values=read_json(path, UsageError), where=str(path)), str(path)
        )
    except CheckpointError as fault:  # the file is all that was named: no checkpoint is at fault
        raise UsageError(str(fault)) from fault


def planned_by_config(config: Config, name: str) -> Model:
    """A model before its weights are here: every tensor as its family publishes it.

    Raises CheckpointError for a config that was quantized otherwise than in FP8 blocks: packed sizes need headers.
    """
    entry = config.values.get("quantization_config")
    if isinstance(entry, Mapping) and entry.get("quant_method") != "fp8":
        raise UsageError(
            f"{config.where}: quantization_config: {entry.get('quant_method')!r}: the bytes of packed weights are in "
            "their headers; name the folder that holds them, or the recipe"
        )
    if not tabled(config):
        return unknown(config, name, "config", "BF16")
    layout, side = load_architecture(config).layout(config), read_fp8_block_size(config)
    tensors = [*list_expected_tensors(layout, config).values()]
    tensors += [scale for spec in tensors if (scale := scales_of(spec, side))]
    told = scheme_of(config, {spec.name: spec for spec in tensors})
    return weigh(layout, tensors, config, name=name, read_from="config", scheme=told)


def tabled(config: Config) -> bool:
    """Whether the family has a table in architectures/."""
    return config.text("model_type") in registry.list_names("architectures")


def unknown(
    config: Config,
    name: str,
    read_from: ReadFrom,
    scheme: str,
    specs: Iterable[TensorSpec] | None = None,
) -> Model:
    """A model whose family has no table, by transformers' own modules."""
    from quantkit.serve.sizing.from_transformers import stranger  # torch and transformers: seconds

    return stranger(config, name, read_from, scheme, specs)


def scales_of(spec: TensorSpec, side: int | None) -> TensorSpec | None:
    """The block scales beside an FP8 weight."""
    if side is None or not spec.dtype.startswith("F8"):
        return None
    shape = tuple(
        -(-size // side) for size in spec.shape
    )  # [out, in] -> [block rows, block columns]
    return TensorSpec(name=f"{spec.name}_scale_inv", dtype="F32", shape=shape)


def plan_recipe_models(recipe: Recipe) -> tuple[Model, ...]:
    """What a recipe will build, a model per format; without the network where the source's config is shipped.

    Raises RecipeError with the faults that a plan finds.
    """
    source = source_facts(recipe)
    claimed, faults = match_source(source), list[str]()
    found = []
    for format_name in recipe.format:
        _, decisions, told = apply_rules(recipe, source, claimed, format_name)
        faults += told
        if not told:
            tensors = list_written_tensors(source, claimed, format_name, decisions)
            schemes = {decision.scheme for decision in decisions.values() if decision.scheme}
            found.append(
                weigh(
                    claimed.layout,
                    tensors,
                    source.config,
                    name=Path(recipe.path(format_name)).name,
                    read_from="plan",
                    scheme=planned_scheme(format_name, schemes),
                    by_row=any(scheme.group_size == -1 for scheme in schemes),
                )
            )
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))
    return tuple(found)


def planned_scheme(format_name: str, schemes: Collection[Scheme]) -> str:
    """How the artifact will be stored, in words."""
    return packed(
        format_name, [scheme.bits for scheme in schemes], [scheme.group_size for scheme in schemes]
    )


def packed(method: str, bits: Iterable[object], groups: Iterable[object]) -> str:
    """A method with its widths and groups, each once: "awq, 4 bits g128"; what is no positive number is left out."""
    widths, sizes = (
        "/".join(map(str, sorted({n for n in found if isinstance(n, int) and n > 0})))
        for found in (bits, groups)
    )
    return method + (f", {widths} bits" if widths else "") + (f" g{sizes}" if sizes else "")


def source_facts(recipe: Recipe) -> SourceFacts:
    """The source's headers where they are here, the shipped config of its family, else what the hub says."""
    model, revision = recipe.source.model, recipe.source.revision
    folder = locate_model(model) if model.startswith(BUILTIN_PREFIX) else Path(model)
    if folder.is_dir():
        config = Config(values=read_json(folder / CONFIG), where=str(folder / CONFIG))
        specs = select_logical_specs(open_shards(folder).specs, get_scale_suffix(config))
        return SourceFacts(
            model=model,
            revision=revision,
            config=config,
            specs=specs,
            fingerprint=None,
            where=str(folder),
        )
    if known := published.find_published_config(model):
        return SourceFacts(
            model=model,
            revision=revision,
            config=known[1],
            specs=None,
            fingerprint=None,
            where=known[0],
        )
    from quantkit.plan.sources import (
        resolve_source_facts,  # torch and the hub's client: seconds, and the network
    )

    return resolve_source_facts(recipe)


def scheme_of(config: Config, specs: Mapping[str, TensorSpec]) -> str:
    """How the weights are stored, in words: "BF16", "FP8 128x128", "awq, 4 bits g128"."""
    entry = config.values.get("quantization_config")
    if not isinstance(entry, Mapping):
        dtypes = [spec.dtype for spec in specs.values()]
        return max(set(dtypes), key=dtypes.count) if dtypes else "no weights"
    method = str(entry.get("quant_method"))
    if method == "fp8":
        return f"FP8 {side}x{side}" if (side := read_fp8_block_size(config)) else "FP8"
    parts: list[object] = [entry]
    if isinstance(groups := entry.get("config_groups"), Mapping):  # compressed-tensors
        parts = [
            group["weights"]
            for group in groups.values()
            if isinstance(group, Mapping) and "weights" in group
        ]
    elif isinstance(
        dynamic := entry.get("dynamic"), Mapping
    ):  # gptq: what other linears have instead
        parts += dynamic.values()
    told = [part for part in parts if isinstance(part, Mapping)]
    bits = [part.get("bits", part.get("num_bits")) for part in told]
    return packed(method, bits, [part.get("group_size") for part in told])


# ---------------------------------------------------------------------------------------------------- rule of thumb


def assume_width(model: Model, width: Width) -> Model:
    """The model if every parameter took `width`, without scales, norms and routers included: what people reckon."""
    if model.read_from != "config":
        where = "here" if model.read_from == "headers" else "planned"
        raise UsageError(
            f"{model.name}: --dtype: its weights are {where}, with widths of their own; leave the option out"
        )

    def at(weights: Weights) -> Weights:
        total = weights.parameters * WIDTHS[width] // 8
        copied = round(total * weights.copied / weights.n_bytes) if weights.n_bytes else 0
        fp8 = weights.parameters if width == "fp8" else 0
        return Weights(
            divided=total - copied, copied=copied, parameters=weights.parameters, fp8_parameters=fp8
        )

    return replace(
        model,
        scheme=f"every parameter at {WIDTHS[width]} bits ({width}), no scales",
        layers=tuple(
            Layer(attention=layer.attention, dense=at(layer.dense), routed=at(layer.routed))
            for layer in model.layers
        ),
        embedding=at(model.embedding),
        head=at(model.head),
        outside=at(model.outside),
        mtp=at(model.mtp),
        divisions=tuple(replace(division, unit=1) for division in model.divisions),
    )
