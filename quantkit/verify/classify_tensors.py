"""What an artifact's tensors hold, by its manifest's list of modules and the shards' headers: schemes, shapes, roles.

Every stored tensor gets a place: part of a quantized linear, an FP8 weight or its scales, or an ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import get_args

from quantkit import registry
from quantkit.artifact.layout import MANIFEST
from quantkit.checkpoint.fp8_pairs import FP8
from quantkit.contracts import Contents, Format, Linear, ScaleDtype, Scheme, TensorSpec
from quantkit.errors import UsageError
from quantkit.formats.common.checks import FINITE, MAGNITUDE, FormatChecks, ValueCheck

FP8_SIDE = 128
FLOATING = frozenset({"F64", "F32", "F16", "BF16", FP8})
SCHEME_KEYS = {
    "bits",
    "group_size",
    "symmetric",
    "scale_dtype",
    "kind",
    "double_quant",
    "source_dtype",
}

ReadSmall = Callable[[str], bytes]
"""All bytes of a small tensor by its full name."""


@dataclass(frozen=True, kw_only=True)
class Found:
    """What is where. `linears` and `schemes` by module; `numbers` and `fp8` by tensor; `faults`, a sentence each."""

    name: str | None
    linears: Mapping[str, Linear] = field(default_factory=dict)
    schemes: Mapping[str, Scheme] = field(default_factory=dict)
    kept: tuple[str, ...] = ()  # modules with a matrix that is not quantized
    fp8: tuple[str, ...] = ()  # those of them in FP8 blocks
    numbers: Mapping[str, ValueCheck] = field(default_factory=dict)
    logical: Mapping[str, TensorSpec] = field(
        default_factory=dict
    )  # as the model computes: every matrix a `weight`
    faults: tuple[str, ...] = ()

    @property
    def contents(self) -> Contents:
        """What the config must say."""
        return Contents(
            schemes=self.schemes,
            kept=self.kept,
            fp8=self.fp8,
            fp8_block=FP8_SIDE if self.fp8 else None,
        )


def read_contents(
    name: object, modules: Mapping[str, object], specs: Mapping[str, TensorSpec], read: ReadSmall
) -> Found:
    """Give every tensor its place. `name` is the manifest's format, which must be known when something is quantized."""
    faults: list[str] = []
    schemes: dict[str, Scheme] = {}
    for module, record in modules.items():
        told = record.get("scheme") if isinstance(record, Mapping) else None
        scheme = scheme_of(told)
        if scheme is None:
            faults.append(f"{MANIFEST}: modules.{module}: expected a scheme, found {told!r:.100}")
        else:
            schemes[module] = scheme
    if not isinstance(name, str) or name not in registry.list_names("formats"):
        known = ", ".join(registry.list_names("formats"))
        found = f"{MANIFEST}: format: expected one of {known}, found {name!r:.60}"
        return (
            Found(name=None, faults=(*faults, found))
            if schemes or name is not None
            else rest(None, {}, specs)
        )
    output, checks = registry.get_format(name), registry.get_checks(name)
    parts = parts_of(schemes, specs)
    linears: dict[str, Linear] = {}
    numbers: dict[str, ValueCheck] = {}
    taken: set[str] = set()
    for module, scheme in schemes.items():
        own = parts.get(module, {})
        taken |= {f"{module}.{local}" for local in own}
        linear, fault = linear_of(module, scheme, own, output, checks, read)
        if fault or linear is None:
            faults.append(fault or f"{module}: expected its codes, found none")
            continue
        linears[module] = linear
        numbers |= {
            f"{module}.{local}": wanted
            for local, wanted in checks.value_checks(linear, scheme).items()
        }
        if "bias" in own:
            numbers[f"{module}.bias"] = FINITE
    others = rest(output, {n: s for n, s in specs.items() if n in taken}, specs)
    logical = dict(others.logical)
    for module, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        logical[f"{module}.weight"] = TensorSpec(name=f"{module}.weight", dtype="BF16", shape=shape)
        if "bias" in parts[module]:
            logical[f"{module}.bias"] = specs[f"{module}.bias"]
    return Found(
        name=name,
        linears=linears,
        schemes=schemes,
        kept=others.kept,
        fp8=others.fp8,
        numbers={**others.numbers, **numbers},
        logical=logical,
        faults=(*faults, *others.faults),
    )


def parts_of(
    schemes: Mapping[str, Scheme], specs: Mapping[str, TensorSpec]
) -> dict[str, dict[str, TensorSpec]]:
    """The tensors of each quantized module by local name."""
    found: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        module = name
        while module := module.rpartition(".")[0]:
            if module in schemes:
                found.setdefault(module, {})[name.removeprefix(f"{module}.")] = spec
                break
    return found


def linear_of(
    module: str,
    scheme: Scheme,
    own: Mapping[str, TensorSpec],
    output: Format,
    checks: FormatChecks,
    read: ReadSmall,
) -> tuple[Linear | None, str | None]:
    """A quantized linear by its tensors; or why they are not those that the scheme asks for."""
    try:
        shape = checks.read_shape(own, scheme, lambda local: read(f"{module}.{local}"))
    except (IndexError, ZeroDivisionError):  # a tensor without dimensions
        shape = None
    if shape is None or not all(shape):
        return (
            None,
            f"{module}: expected the tensors of {scheme.bits}-bit codes, found {', '.join(sorted(own))}",
        )
    linear = Linear(
        name=module, out_features=shape[0], in_features=shape[1], role="mlp", bias="bias" in own
    )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return (
            None,
            f"{module}: group_size {scheme.group_size} does not divide its {linear.in_features} inputs",
        )
    wanted = {spec.name.removeprefix(f"{module}."): spec for spec in output.layout(linear, scheme)}
    for local in sorted(set(wanted) | (set(own) - {"bias"})):
        expected, found = (
            f"{spec.dtype} {list(spec.shape)}" if (spec := specs.get(local)) else "none"
            for specs in (wanted, own)
        )
        if expected != found:
            told = f"{scheme.bits} bits, group_size {scheme.group_size}"
            return (
                None,
                f"tensor {module}.{local}: its scheme ({told}) asks for {expected}, found {found}",
            )
    return linear, None


def rest(
    output: Format | None, taken: Mapping[str, TensorSpec], specs: Mapping[str, TensorSpec]
) -> Found:
    """Everything that is not part of a quantized linear."""
    suffix = output.fp8_scale if output else None
    blocks = {
        n
        for n, spec in specs.items()
        if spec.dtype == FP8 and n not in taken and n.endswith(".weight")
    }
    scales = {f"{name.removesuffix('weight')}{suffix}": name for name in blocks} if suffix else {}
    left = {name: spec for name, spec in specs.items() if name not in taken}
    logical = {name: spec for name, spec in left.items() if name not in scales}
    faults = list(fp8_faults(suffix, scales, left))
    faults += [
        f"tensor {name}: {spec.dtype} outside the modules that the manifest lists as quantized"
        for name, spec in logical.items()
        if spec.dtype not in FLOATING
    ]
    return Found(
        name=None,
        kept=tuple(
            n.removesuffix(".weight")
            for n, s in logical.items()
            if n.endswith(".weight") and len(s.shape) == 2
        ),
        fp8=tuple(name.removesuffix(".weight") for name in logical if name in blocks),
        numbers={
            name: MAGNITUDE if name in scales else FINITE
            for name, s in left.items()
            if s.dtype in FLOATING
        },
        logical=logical,
        faults=tuple(faults),
    )


def fp8_faults(
    suffix: str | None, scales: Mapping[str, str], left: Mapping[str, TensorSpec]
) -> Iterator[str]:
    """FP8 in a format that holds none, and FP8 weights without block scales of the right shape."""
    if suffix is None:
        yield from (
            f"tensor {n}: FP8, which this format does not hold"
            for n, s in left.items()
            if s.dtype == FP8
        )
        return
    for name, weight in scales.items():
        shape = [-(-side // FP8_SIDE) for side in left[weight].shape]
        expected = f"F32 {shape}"
        found = f"{left[name].dtype} {list(left[name].shape)}" if name in left else "none"
        if expected != found:
            yield f"tensor {name}: expected {expected} for the FP8 blocks of {weight}, found {found}"


def scheme_of(values: object) -> Scheme | None:
    """A scheme of the manifest; None when it is none."""
    if not isinstance(values, Mapping) or set(values) != SCHEME_KEYS:
        return None
    bits, group, dtypes = values["bits"], values["group_size"], get_args(ScaleDtype)
    flags = all(type(values[key]) is bool for key in ("symmetric", "double_quant"))
    sizes = (
        type(bits) is int and 2 <= bits <= 8 and type(group) is int and (group == -1 or group > 0)
    )
    names = values["scale_dtype"] in dtypes and values["kind"] in ("int", "nf4")
    if not (flags and sizes and names and values["source_dtype"] in (None, *dtypes)):
        return None
    return Scheme(**{str(key): value for key, value in values.items()})


def config_contents(
    output: Format, contents: Contents
) -> tuple[dict[str, object] | None, str | None]:
    """The entry that the format would write for what the tensors hold; or why it would refuse to."""
    try:
        return (output.quantization_config(contents) if contents.schemes else None), None
    except UsageError as fault:
        return None, str(fault)
