"""Matches a checkpoint's headers against the layout of its architecture, tensor by tensor. Pure."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil

from quantkit import registry
from quantkit.checkpoint.encoding import FP8
from quantkit.checkpoint.stacked import split_specs
from quantkit.contracts import Architecture, Block, Config, Layout, Linear, Role, TensorSpec
from quantkit.dtypes import FLOAT_NAMES
from quantkit.errors import CheckpointError
from quantkit.io.files import shorten_repr
from quantkit.plan.left_out import LeftOut, describe_unplaced, find_left_out
from quantkit.plan.model_output import adapt_head, read_output_kind

FP8_ROLES: frozenset[Role] = frozenset({"attention", "mlp", "shared_expert", "routed_expert"})
"""Roles that an FP8 DeepSeek checkpoint stores in 128x128 blocks; all others stay BF16."""

INTEGER_DTYPES = frozenset({"I64", "I32", "I16", "I8", "U8"})
"""Dtypes of kept tensors such as a table of experts by token."""
READABLE_DTYPES = frozenset({"F64", "F32", "F16", "BF16", FP8})
"""Dtypes of weights. Integers are codes of a quantization that config.json does not name."""

SHOWN_FAULTS = 8
MAX_MTP_BLOCKS = 8
"""Blocks after the last one that may be MTP blocks; no model has more."""

NO_CLASS = "vLLM and SGLang choose the model's class by this key of config.json"


@dataclass(frozen=True, kw_only=True)
class MatchedLayout:
    """A layout whose tensors are all present (or assumed), and the tensors that were dropped."""

    architecture: Architecture
    layout: Layout
    specs: Mapping[str, TensorSpec]  # every logical tensor, by full name
    left_out: tuple[LeftOut, ...] = ()  # stored tensors that the artifact does not hold
    warnings: tuple[str, ...]


def read_fp8_block_size(config: Config) -> int | None:
    """Return the side of the FP8 blocks that the config states, or None.

    Headers say whether there are any, and describe every other encoding.
    """
    entry = config.values.get("quantization_config")
    if not isinstance(entry, Mapping) or entry.get("quant_method") != "fp8":
        return None
    size = entry.get("weight_block_size")
    if not isinstance(size, list) or len(size) != 2 or size[0] != size[1]:
        return None
    return size[0] if type(size[0]) is int and size[0] > 0 else None


def check_assumed_dtypes(config: Config) -> None:
    """Check that tensors can be assumed without headers: plain ones or FP8 in square blocks.

    Raises CheckpointError otherwise.
    """
    if config.values.get("quantization_config") and read_fp8_block_size(config) is None:
        raise CheckpointError(
            f"{config.where}: quantization_config: expected none or FP8 in square blocks, as no "
            "header is at hand, found another; connect, or download the model and give its folder "
            "as source.model"
        )


def make_linear_specs(linear: Linear, dtype: str) -> tuple[TensorSpec, ...]:
    """Return the weight of a linear, and its bias if it has one."""
    weight = TensorSpec(
        name=f"{linear.name}.weight", dtype=dtype, shape=(linear.out_features, linear.in_features)
    )
    if not linear.bias:
        return (weight,)
    return weight, TensorSpec(
        name=f"{linear.name}.bias", dtype="BF16", shape=(linear.out_features,)
    )


def list_expected_tensors(layout: Layout, config: Config) -> dict[str, TensorSpec]:
    """Return every tensor of the layout, with the dtype that the family publishes.

    Raises CheckpointError if the architecture lists a tensor twice.
    """
    plain = FLOAT_NAMES.get(config.text("torch_dtype", config.text("dtype", "bfloat16")), "BF16")
    fp8 = read_fp8_block_size(config) is not None
    specs: dict[str, TensorSpec] = {}
    others = [*layout.final_tensors, *(spec for block in layout.blocks for spec in block.others)]
    tensors = [replace(spec, dtype=plain) if spec.dtype == "BF16" else spec for spec in others]
    for linear in layout.linears:
        tensors += make_linear_specs(linear, FP8 if fp8 and linear.role in FP8_ROLES else plain)
    for spec in tensors:
        if spec.name in specs:
            raise CheckpointError(f"architecture table: {spec.name} is listed twice")
        specs[spec.name] = spec
    return specs


def compute_stored_bytes(spec: TensorSpec, block: int | None) -> int:
    """Return the bytes of a tensor in the source, with its FP8 scales."""
    if spec.dtype != FP8 or block is None:
        return spec.n_bytes
    rows, columns = spec.shape
    return spec.n_bytes + 4 * ceil(rows / block) * ceil(columns / block)


def match_layout(
    architecture: Architecture,
    config: Config,
    specs: Mapping[str, TensorSpec] | None,
    where: str,
    *,
    drop_mtp: bool = False,
) -> MatchedLayout:
    """Match the layout against the checkpoint's headers; without headers assume the published ones.

    An MTP block that config.json announces but that has no tensors (common in re-uploads) is left
    out with a warning, and so is one that the recipe drops (`drop_mtp`) and that does not fit.
    Raises CheckpointError with tensors that are missing, unexpected or of another shape.
    """
    layout, warnings = (
        adapt_head(architecture.layout(config), config, specs),
        (architecture.derived,) if architecture.derived else (),
    )
    if specs is None:
        check_assumed_dtypes(config)
        specs = list_expected_tensors(layout, config)
        return MatchedLayout(
            architecture=architecture, layout=layout, specs=specs, warnings=warnings
        )
    specs, _ = split_specs(specs, layout.blocks)
    absent = tuple(
        b
        for b in layout.blocks
        if b.kind == "mtp" and not any(n.startswith(f"{b.name}.") for n in specs)
    )
    unfit = tuple(b for b in layout.blocks if drop_mtp and is_unfit(b, config, layout, specs))
    layout = replace(
        layout, blocks=tuple(b for b in layout.blocks if b not in absent and b not in unfit)
    )
    expected = list_expected_tensors(layout, config)
    parts = list_dropped_parts(layout, unfit) if drop_mtp else ()
    layout = remove_parts(layout, parts)
    copied = {name: specs[name] for part in layout.parts for name in part.tensors}
    left_out = find_left_out(architecture, layout, {**expected, **copied}, specs, parts)
    ignored = {*copied, *(item.name for item in left_out)}
    faults = find_mismatches(expected, specs, ignored, layout)
    if faults:
        raise make_mismatch_error(where, config, faults)
    if not architecture.derived:
        check_model_class(config, where)
    class_warning = find_class_warning(config, architecture)
    return MatchedLayout(
        architecture=architecture,
        layout=layout,
        specs={name: specs[name] for name in (*expected, *copied)},
        left_out=left_out,
        warnings=(
            *warnings,
            *(format_absent_mtp(block) for block in absent),
            *((class_warning,) if class_warning else ()),
        ),
    )


def remove_parts(layout: Layout, prefixes: tuple[str, ...]) -> Layout:
    """Return the layout without the parts that have a tensor with one of these prefixes."""
    kept = (part for part in layout.parts if not any(x.startswith(prefixes) for x in part.tensors))
    return replace(layout, parts=tuple(kept))


def make_mismatch_error(where: str, config: Config, faults: Sequence[str]) -> CheckpointError:
    """Return the error for tensors that do not fit config.json."""
    more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
    return CheckpointError(
        f"{where}: the tensors do not fit model_type {config.text('model_type')} with this "
        "config.json: "
        + "; ".join(faults[:SHOWN_FAULTS])
        + f"{more}; check that config.json and weights belong together"
    )


def check_model_class(config: Config, where: str) -> None:
    """Check that `architectures` names the causal language model of model_type, if it is there.

    transformers chooses the class by model_type, vLLM and SGLang by architectures: a folder that
    names two families is two models. Raises CheckpointError.
    """
    model_type, names = config.text("model_type"), config.values.get("architectures")
    family = registry.resolve_model_type(model_type).replace("_", "")
    fits = isinstance(names, list) and [str(name).casefold() for name in names] == [
        f"{family}forcausallm"
    ]
    if read_output_kind(config) != "logits" and isinstance(names, list):
        fits = str(names[0]).casefold().startswith(family)
    if names and not fits:
        raise CheckpointError(
            f"{where}: architectures: expected the causal language model of {model_type}, found "
            f"{shorten_repr(names)}; engines choose the model's class by it, repair the value"
        )


def names_no_class(values: Mapping[str, object]) -> bool:
    """Return whether config.json has no `architectures`: engines do not know the model's class."""
    return not values.get("architectures")


def find_class_warning(config: Config, architecture: Architecture) -> str | None:
    """Return a warning about `architectures`, by which vLLM and SGLang choose the class."""
    names, classes = config.values.get("architectures"), architecture.classes
    expected = f"expected {' or '.join(classes) or 'the class of the model'}"
    if names_no_class(config.values):
        return f"architectures: {expected}, found none: {NO_CLASS}; add it to config.json"
    if read_output_kind(config) != "logits":
        return None
    if classes and not (isinstance(names, list) and {*map(str, names)} & {*classes}):
        return (
            f"architectures: {expected}, found {shorten_repr(names)}: vLLM and SGLang choose the "
            "model's class by it; check that config.json and weights belong together"
        )
    return None


def find_mismatches(
    expected: Mapping[str, TensorSpec],
    specs: Mapping[str, TensorSpec],
    left_out: Collection[str],
    layout: Layout,
) -> list[str]:
    """Return a fault for each tensor that is missing, unexpected, or of another shape or kind."""
    missing = [name for name in expected if name not in specs]
    faults = [f"missing: {name} {list(expected[name].shape)}" for name in missing]
    unplaced = [name for name in specs if name not in expected and name not in left_out]
    faults += describe_unplaced(unplaced, expected, missing, layout)
    faults += [
        f"{name}: expected shape {list(spec.shape)}, found {list(specs[name].shape)}"
        for name, spec in expected.items()
        if name in specs and specs[name].shape != spec.shape
    ]
    faults += [
        f"{name}: expected {kind}, found {specs[name].dtype}"
        for name, spec in expected.items()
        if name in specs and (kind := find_other_kind(spec.dtype, specs[name].dtype))
    ]
    return faults


def find_other_kind(expected: str, actual: str) -> str | None:
    """Return the kind of numbers that a tensor should have; None if its dtype is of this kind."""
    if expected in INTEGER_DTYPES:
        return None if actual in INTEGER_DTYPES else "integers"
    return None if actual in READABLE_DTYPES else "floating point numbers"


def is_unfit(block: Block, config: Config, layout: Layout, specs: Mapping[str, TensorSpec]) -> bool:
    """Return whether an MTP block's tensors are not those of its layout."""
    if block.kind != "mtp":
        return False
    expected = list_expected_tensors(replace(layout, blocks=(block,)), config)
    mine = {name: spec for name, spec in expected.items() if name.startswith(f"{block.name}.")}
    stored = {name: spec for name, spec in specs.items() if name.startswith(f"{block.name}.")}
    return bool(stored) and bool(find_mismatches(mine, stored, (), layout))


def list_dropped_parts(layout: Layout, unfit: Sequence[Block]) -> tuple[str, ...]:
    """Return the prefixes of the tensors of MTP blocks that are not in the layout."""
    names = {block.name for block in layout.blocks}
    stack = layout.blocks[0].name.rpartition(".")[0] if layout.blocks else ""
    after = (f"{stack}.{len(layout.blocks) + number}" for number in range(MAX_MTP_BLOCKS))
    dropped = [*(block.name for block in unfit), *(name for name in after if name not in names)]
    return (*dict.fromkeys(f"{name}." for name in dropped), "mtp.", "model.mtp.")


def format_absent_mtp(block: Block) -> str:
    """Return the warning for an MTP block without tensors."""
    return (
        f"config.json announces the MTP block {block.name}, the checkpoint has none of its "
        "tensors: left out"
    )
