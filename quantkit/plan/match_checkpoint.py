"""Does a checkpoint hold what its architecture says, tensor by tensor? From headers alone; pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from math import ceil

from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.contracts import Architecture, Block, Config, Layout, Linear, Role, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.io.yaml_document import printable

FP8_ROLES: frozenset[Role] = frozenset({"attention", "mlp", "shared_expert", "routed_expert"})
"""What an FP8 DeepSeek checkpoint stores in 128x128 blocks; routers, embeddings, heads and eh_proj stay BF16."""

READABLE = frozenset({"F64", "F32", "F16", "BF16", FP8})
"""What weights are stored as. Integers are no weights, or codes of a quantization that config.json does not name."""

SHOWN_FAULTS = 8


@dataclass(frozen=True, kw_only=True)
class MatchedLayout:
    """A layout whose tensors were all found (or assumed), with what was left aside."""

    architecture: Architecture
    layout: Layout
    specs: Mapping[str, TensorSpec]  # every logical tensor, by full name
    dropped: tuple[str, ...]  # tensors no engine reads
    warnings: tuple[str, ...]


def read_fp8_block_size(config: Config) -> int | None:
    """Side of the FP8 blocks the config announces, None for an unquantized checkpoint.

    Raises CheckpointError for any other quantization: quantizing codes again would compound two errors.
    """
    entry = config.values.get("quantization_config")
    if entry is None:
        return None
    if not isinstance(entry, Mapping) or entry.get("quant_method") != "fp8":
        method = entry.get("quant_method") if isinstance(entry, Mapping) else entry
        raise CheckpointError(
            f"{config.where}: quantization_config.quant_method: expected fp8 or an unquantized checkpoint, "
            f"found {method!r}; start from the original weights"
        )
    size = entry.get("weight_block_size")
    if not (
        isinstance(size, list)
        and len(size) == 2
        and size[0] == size[1]
        and isinstance(size[0], int)
        and size[0]
    ):
        raise CheckpointError(
            f"{config.where}: quantization_config.weight_block_size: expected [n, n], found {size!r}; "
            "only FP8 in square blocks with weight_scale_inv can be read"
        )
    return int(size[0])


def linear_specs(linear: Linear, dtype: str) -> tuple[TensorSpec, ...]:
    """Weight and, if the linear has one, bias."""
    weight = TensorSpec(
        name=f"{linear.name}.weight", dtype=dtype, shape=(linear.out_features, linear.in_features)
    )
    if not linear.bias:
        return (weight,)
    return weight, TensorSpec(
        name=f"{linear.name}.bias", dtype="BF16", shape=(linear.out_features,)
    )


def list_expected_tensors(layout: Layout, config: Config) -> dict[str, TensorSpec]:
    """Every tensor the layout claims, with the dtype the family publishes. A double claim is a defect of the table."""
    plain = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}.get(
        config.text("torch_dtype", config.text("dtype", "bfloat16")), "BF16"
    )
    fp8 = read_fp8_block_size(config) is not None
    specs: dict[str, TensorSpec] = {}
    others = [*layout.final_tensors, *(spec for block in layout.blocks for spec in block.others)]
    found = [replace(spec, dtype=plain) if spec.dtype == "BF16" else spec for spec in others]
    for linear in layout.linears:
        found += linear_specs(linear, FP8 if fp8 and linear.role in FP8_ROLES else plain)
    for spec in found:
        if spec.name in specs:
            raise CheckpointError(f"architecture table: {spec.name} is claimed twice")
        specs[spec.name] = spec
    return specs


def stored_bytes(spec: TensorSpec, block: int | None) -> int:
    """Bytes in the source, the FP8 scales included."""
    if spec.dtype != FP8 or block is None:
        return spec.n_bytes
    rows, columns = spec.shape
    return spec.n_bytes + 4 * ceil(rows / block) * ceil(columns / block)


def match_layout(
    architecture: Architecture, config: Config, specs: Mapping[str, TensorSpec] | None, where: str
) -> MatchedLayout:
    """Match the layout against the checkpoint's headers; without headers assume what the family publishes.

    Raises CheckpointError listing tensors that are missing, unclaimed or of another shape. An announced MTP block
    of which nothing is stored (common in re-uploads) is left out with a warning.
    """
    layout, told = (
        architecture.layout(config),
        (architecture.derived,) if architecture.derived else (),
    )
    if specs is None:
        specs = list_expected_tensors(layout, config)
        return MatchedLayout(
            architecture=architecture, layout=layout, specs=specs, dropped=(), warnings=told
        )
    absent = tuple(
        b
        for b in layout.blocks
        if b.kind == "mtp" and not any(n.startswith(f"{b.name}.") for n in specs)
    )
    layout = replace(layout, blocks=tuple(block for block in layout.blocks if block not in absent))
    wanted = list_expected_tensors(layout, config)
    dropped = tuple(
        name for name in specs if any(fnmatchcase(name, glob) for glob in architecture.dropped)
    )
    faults = [
        f"missing: {name} {list(spec.shape)}" for name, spec in wanted.items() if name not in specs
    ]
    faults += [
        f"not claimed by the architecture: {printable(n)}"
        for n in specs
        if n not in wanted and n not in dropped
    ]
    faults += [
        f"{name}: expected shape {list(spec.shape)}, found {list(specs[name].shape)}"
        for name, spec in wanted.items()
        if name in specs and specs[name].shape != spec.shape
    ]
    faults += [
        f"{name}: expected floating point numbers, found {specs[name].dtype}"
        for name in wanted
        if name in specs and specs[name].dtype not in READABLE
    ]
    if faults:
        more = f"; and {len(faults) - SHOWN_FAULTS} more" if len(faults) > SHOWN_FAULTS else ""
        raise CheckpointError(
            f"{where}: the tensors do not fit model_type {config.text('model_type')} with this config.json: "
            + "; ".join(faults[:SHOWN_FAULTS]) + more + "; check that config.json and weights belong together"
        )  # fmt: skip
    return MatchedLayout(
        architecture=architecture,
        layout=layout,
        specs={name: specs[name] for name in wanted},
        dropped=dropped,
        warnings=(*told, *(absent_warning(block) for block in absent)),
    )


def absent_warning(block: Block) -> str:
    """Why an announced MTP block is not in the plan."""
    return f"config.json announces the MTP block {block.name}, the checkpoint has none of its tensors: left out"
