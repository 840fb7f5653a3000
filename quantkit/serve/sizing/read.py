"""Reading of a Model: an artifact or model folder, a recipe, a config.json, a published hub id.

Without torch and without weights: headers, plans and configs alone. A family without an
architecture table needs transformers, and seconds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

from quantkit import registry
from quantkit.checkpoint.file_names import CONFIG, INDEX, SINGLE
from quantkit.checkpoint.logical_tensors import find_logical_tensors
from quantkit.checkpoint.shards import open_shards
from quantkit.checkpoint.source_config import make_source_config
from quantkit.contracts import Config, Scheme, TensorSpec
from quantkit.errors import CheckpointError, RecipeError, UsageError
from quantkit.io.files import read_json
from quantkit.io.package_data import BUILTIN_PREFIX, locate_model
from quantkit.plan import published
from quantkit.plan.match_checkpoint import (
    MatchedLayout,
    check_assumed_dtypes,
    list_expected_tensors,
    read_fp8_block_size,
)
from quantkit.plan.plan import (
    SourceFacts,
    apply_rules,
    list_written_tensors,
    load_architecture,
    match_source,
)
from quantkit.recipe.schema import Recipe
from quantkit.serve.sizing.group_sizes import has_row_scales, read_stored_schemes
from quantkit.serve.sizing.model import Layer, Model, ReadFrom, Weights
from quantkit.serve.sizing.weight_bytes import make_model

Width = Literal["bf16", "fp16", "fp8", "int8", "int4"]
WIDTHS: Mapping[Width, int] = {"bf16": 16, "fp16": 16, "fp8": 8, "int8": 8, "int4": 4}
"""Bits of a weight, for the rule of thumb that stores every parameter at one width."""


def read_model(target: str, width: Width | None = None) -> Model:
    """Read a folder (with or without weights), a config.json, or a hub id with a shipped config.

    width: store every parameter at that width, without scales.

    Raises UsageError for anything else, CheckpointError for a damaged one.
    """
    path = Path(target)
    if path.is_dir():
        if not (path / CONFIG).is_file():
            raise UsageError(
                f"{target}: expected the folder of an artifact or a model, found no {CONFIG} in it"
            )
        has_weights = (path / INDEX).exists() or (path / SINGLE).exists()
        model = read_stored_model(path) if has_weights else read_config_model(path / CONFIG)
    elif path.is_file():
        model = read_config_model(path)
    elif target.startswith(BUILTIN_PREFIX):
        model = replace(read_stored_model(locate_model(target)), name=target)
    elif entry := published.find_published_config(target):
        model = plan_from_config(entry[1], target)
    else:
        raise UsageError(
            f"{target}: expected an artifact, a recipe, a config.json or a hub id whose config "
            f"ships with quantkit ({', '.join(published.list_published_models()[:3])}, ...), found "
            "none of them; check the path, or download its config.json"
        )
    return model if width is None else assume_width(model, width)


def read_stored_model(folder: Path) -> Model:
    """Read the model whose weights are in a folder, from their headers: exact bytes."""
    values = read_json(folder / CONFIG, infinite=True)
    config = make_source_config(values, str(folder / CONFIG))
    shards = open_shards(folder)
    scheme, name = describe_scheme(config, shards.specs), folder.resolve().name
    if not has_architecture(config):
        return read_unknown_family(config, name, "headers", scheme, shards.specs.values())
    layout = load_architecture(config).layout(config)
    entry = config.values.get("quantization_config")
    by_row = has_row_scales(entry)
    return make_model(
        layout,
        shards.specs.values(),
        config,
        name=name,
        read_from="headers",
        scheme=scheme,
        by_row=by_row,
    )


def read_config_model(path: Path) -> Model:
    """Read the model that a config.json describes; UsageError for a damaged or other file."""
    try:
        config = make_source_config(read_json(path, UsageError, infinite=True), str(path))
        return plan_from_config(config, str(path))
    except CheckpointError as fault:  # the user named this file, not a checkpoint
        raise UsageError(str(fault)) from fault


def plan_from_config(config: Config, name: str) -> Model:
    """Make a model without its weights: every tensor as its family publishes it.

    Raises UsageError for a quantized config other than FP8 blocks: packed sizes need headers.
    """
    entry = config.values.get("quantization_config")
    if isinstance(entry, Mapping) and entry.get("quant_method") != "fp8":
        raise UsageError(
            f"{config.where}: quantization_config: expected none or fp8, found "
            f"{entry.get('quant_method')!r}, whose bytes are in the headers of packed weights; "
            "name the folder that holds them, or the recipe"
        )
    if not has_architecture(config):
        return read_unknown_family(config, name, "config", "BF16")
    check_assumed_dtypes(config)
    layout, block_size = load_architecture(config).layout(config), read_fp8_block_size(config)
    tensors = [*list_expected_tensors(layout, config).values()]
    tensors += [scale for spec in tensors if (scale := make_scale_spec(spec, block_size))]
    scheme = describe_scheme(config, {spec.name: spec for spec in tensors})
    return make_model(layout, tensors, config, name=name, read_from="config", scheme=scheme)


def has_architecture(config: Config) -> bool:
    """Return whether the family has a table in architectures/."""
    model_type = registry.resolve_model_type(config.text("model_type"))
    return model_type in registry.list_names("architectures")


def read_unknown_family(
    config: Config,
    name: str,
    read_from: ReadFrom,
    scheme: str,
    specs: Iterable[TensorSpec] | None = None,
) -> Model:
    """Make a model whose family has no table, from transformers' own modules."""
    # torch and transformers take seconds to import
    from quantkit.serve.sizing.from_transformers import size_with_transformers

    return size_with_transformers(config, name, read_from, scheme, specs)


def make_scale_spec(spec: TensorSpec, block_size: int | None) -> TensorSpec | None:
    """Return the block scales of an FP8 weight; None for other tensors."""
    if block_size is None or not spec.dtype.startswith("F8"):
        return None
    # [out, in] -> [block rows, block columns]
    shape = tuple(-(-size // block_size) for size in spec.shape)
    return TensorSpec(name=f"{spec.name}_scale_inv", dtype="F32", shape=shape)


def plan_recipe_models(recipe: Recipe) -> tuple[Model, ...]:
    """Return the artifacts that a recipe will build, one model per format.

    Without the network if the source's config is shipped. Raises RecipeError with the plan's
    faults.
    """
    source = read_source_facts(recipe)
    return plan_source_models(recipe, source, match_source(source))


def plan_source_models(
    recipe: Recipe, source: SourceFacts, matched: MatchedLayout
) -> tuple[Model, ...]:
    """Return the artifacts that a recipe will build from a source, one model per format.

    Raises RecipeError with the plan's faults.
    """
    faults = list[str]()
    models = []
    for format_name in recipe.format:
        _, decisions, format_faults = apply_rules(recipe, source, matched, format_name)
        faults += format_faults
        if not format_faults:
            tensors = list_written_tensors(source, matched, format_name, decisions)
            schemes = {decision.scheme for decision in decisions.values() if decision.scheme}
            models.append(
                make_model(
                    matched.layout,
                    tensors,
                    source.config,
                    name=Path(recipe.path(format_name)).name,
                    read_from="plan",
                    scheme=format_planned_scheme(format_name, schemes),
                    by_row=any(scheme.group_size == -1 for scheme in schemes),
                )
            )
    if faults:
        raise RecipeError(list(dict.fromkeys(faults)))
    return tuple(models)


def format_planned_scheme(format_name: str, schemes: Collection[Scheme]) -> str:
    """Describe the storage of a planned artifact."""
    return format_scheme(
        format_name, [scheme.bits for scheme in schemes], [scheme.group_size for scheme in schemes]
    )


def format_scheme(method: str, bits: Iterable[object], groups: Iterable[object]) -> str:
    """Describe a method with its bits and group sizes, each once: "awq, 4 bits g128".

    Values that are not positive integers are left out.
    """
    widths, sizes = (
        "/".join(map(str, sorted({n for n in values if isinstance(n, int) and n > 0})))
        for values in (bits, groups)
    )
    return method + (f", {widths} bits" if widths else "") + (f" g{sizes}" if sizes else "")


def read_source_facts(recipe: Recipe) -> SourceFacts:
    """Read the source: its local headers, the shipped config of its family, or the hub's data."""
    model, revision = recipe.source.model, recipe.source.revision
    folder = locate_model(model) if model.startswith(BUILTIN_PREFIX) else Path(model)
    if folder.is_dir():
        values = read_json(folder / CONFIG, infinite=True)
        config = make_source_config(values, str(folder / CONFIG))
        logical = find_logical_tensors(config, open_shards(folder).specs, str(folder))
        return SourceFacts(
            model=model,
            revision=revision,
            config=config,
            specs=logical.specs,
            encoded=logical.encoded,
            fingerprint=None,
            where=str(folder),
        )
    if entry := published.find_published_config(model):
        return SourceFacts(
            model=model,
            revision=revision,
            config=entry[1],
            specs=None,
            fingerprint=None,
            where=entry[0],
        )
    from quantkit.plan.sources import (
        resolve_source_facts,  # torch and the hub's client: seconds, and the network
    )

    return resolve_source_facts(recipe)


def describe_scheme(config: Config, specs: Mapping[str, TensorSpec]) -> str:
    """Describe the storage of the weights: "BF16", "FP8 128x128", "awq, 4 bits g128"."""
    entry = config.values.get("quantization_config")
    if not isinstance(entry, Mapping):
        dtypes = [spec.dtype for spec in specs.values()]
        return max(set(dtypes), key=dtypes.count) if dtypes else "no weights"
    method = str(entry.get("quant_method"))
    if method == "fp8":
        return f"FP8 {size}x{size}" if (size := read_fp8_block_size(config)) else "FP8"
    schemes = read_stored_schemes(entry)
    return format_scheme(
        method, [scheme.bits for scheme in schemes], [scheme.group_size for scheme in schemes]
    )


# --------------------------------------------------------------------------------- rule of thumb


def assume_width(model: Model, width: Width) -> Model:
    """Return the model with every parameter at `width`, without scales, norms and routers included.

    Raises UsageError for a model whose widths are known from headers or a plan.
    """
    if model.read_from != "config":
        origin = "stored" if model.read_from == "headers" else "planned"
        raise UsageError(
            f"{model.name}: --dtype: expected a config.json, found {origin} weights with widths of "
            "their own; leave the option out"
        )

    def convert(weights: Weights) -> Weights:
        total = weights.parameters * WIDTHS[width] // 8
        replicated = round(total * weights.replicated / weights.n_bytes) if weights.n_bytes else 0
        return Weights(
            sharded=total - replicated,
            replicated=replicated,
            parameters=weights.parameters,
            fp8_parameters=weights.parameters if width == "fp8" else 0,
        )

    return replace(
        model,
        scheme=f"every parameter at {WIDTHS[width]} bits ({width}), no scales",
        layers=tuple(
            Layer(
                attention=layer.attention,
                dense=convert(layer.dense),
                routed=convert(layer.routed),
            )
            for layer in model.layers
        ),
        embedding=convert(model.embedding),
        head=convert(model.head),
        other=convert(model.other),
        mtp=convert(model.mtp),
        sharding_constraints=tuple(
            replace(constraint, unit=1) for constraint in model.sharding_constraints
        ),
    )
