"""Classification of an artifact's tensors by the manifest's modules and the shards' headers.

Every stored tensor gets a role: part of a quantized linear, an FP8 weight or its scales, or an
ordinary tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import get_args

from quantkit import registry
from quantkit.artifact.layout import MANIFEST
from quantkit.checkpoint.encoding import FP8
from quantkit.checkpoint.logical_tensors import find_copied_codes
from quantkit.contracts import Contents, Format, Linear, Scheme, SchemeKind, TensorSpec
from quantkit.dtypes import FLOAT_NAMES
from quantkit.errors import UsageError
from quantkit.formats.common.checks import FINITE, MAGNITUDE, FormatChecks, ValueCheck

FP8_SIDE = 128
FLOATING = frozenset({"F64", "F32", "F16", "BF16", FP8})
FP4_SCALES = {"mxfp4": ("uint8",), "nvfp4": ("float8_e4m3fn",)}
"""Dtypes of scales by kind of scheme; floats for other kinds."""
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
"""Reads all bytes of a small tensor, by its full name."""


@dataclass(frozen=True, kw_only=True)
class TensorContents:
    """Roles of all tensors: linears and schemes by module, numbers by tensor, and faults."""

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
        """The contents that quantization_config must describe."""
        return Contents(
            schemes=self.schemes,
            kept=self.kept,
            fp8=self.fp8,
            fp8_block=FP8_SIDE if self.fp8 else None,
        )


def classify_tensors(
    name: object,
    modules: Mapping[str, object],
    specs: Mapping[str, TensorSpec],
    read: ReadSmall,
    copied: Sequence[str] = (),
) -> TensorContents:
    """Give every tensor its role.

    name: the manifest's format, which must be known if a module is quantized; copied: modules of a
    wrapper's parts, which may hold any values.
    """
    schemes, faults = read_schemes(modules)
    if not isinstance(name, str) or name not in registry.list_names("formats"):
        known = ", ".join(registry.list_names("formats"))
        format_fault = f"{MANIFEST}: format: expected one of {known}, found {name!r:.60}"
        return (
            TensorContents(name=None, faults=(*faults, format_fault))
            if schemes or name is not None
            else classify_others(None, {}, specs, copied)
        )
    output, checks = registry.get_format(name), registry.get_checks(name)
    parts = group_by_module(schemes, specs)
    linears: dict[str, Linear] = {}
    numbers: dict[str, ValueCheck] = {}
    packed: set[str] = set()
    for module, scheme in schemes.items():
        tensors = parts.get(module, {})
        packed |= {f"{module}.{local}" for local in tensors}
        linear, fault = classify_linear(module, scheme, tensors, output, checks, read)
        if fault or linear is None:
            faults.append(fault or f"{module}: expected its codes, found none")
            continue
        linears[module] = linear
        numbers |= {
            f"{module}.{local}": check
            for local, check in checks.value_checks(linear, scheme).items()
        }
        if "bias" in tensors:
            numbers[f"{module}.bias"] = FINITE
    others = classify_others(output, {n: s for n, s in specs.items() if n in packed}, specs, copied)
    logical = dict(others.logical)
    for module, linear in linears.items():
        shape = (linear.out_features, linear.in_features)
        logical[f"{module}.weight"] = TensorSpec(name=f"{module}.weight", dtype="BF16", shape=shape)
        if "bias" in parts[module]:
            logical[f"{module}.bias"] = specs[f"{module}.bias"]
    return TensorContents(
        name=name,
        linears=linears,
        schemes=schemes,
        kept=others.kept,
        fp8=others.fp8,
        numbers={**others.numbers, **numbers},
        logical=logical,
        faults=(*faults, *others.faults),
    )


def read_schemes(modules: Mapping[str, object]) -> tuple[dict[str, Scheme], list[str]]:
    """Return the schemes in the manifest's modules, and a sentence for each invalid one."""
    schemes: dict[str, Scheme] = {}
    faults: list[str] = []
    for module, record in modules.items():
        values = record.get("scheme") if isinstance(record, Mapping) else None
        scheme = parse_scheme(values)
        if scheme is None:
            faults.append(f"{MANIFEST}: modules.{module}: expected a scheme, found {values!r:.100}")
        else:
            schemes[module] = scheme
    return schemes, faults


def group_by_module(
    schemes: Mapping[str, Scheme], specs: Mapping[str, TensorSpec]
) -> dict[str, dict[str, TensorSpec]]:
    """Return the tensors of each quantized module by local name."""
    modules: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in specs.items():
        module = name
        while module := module.rpartition(".")[0]:
            if module in schemes:
                modules.setdefault(module, {})[name.removeprefix(f"{module}.")] = spec
                break
    return modules


def classify_linear(
    module: str,
    scheme: Scheme,
    tensors: Mapping[str, TensorSpec],
    output: Format,
    checks: FormatChecks,
    read: ReadSmall,
) -> tuple[Linear | None, str | None]:
    """Return a quantized linear by its tensors, or why they do not fit its scheme."""
    try:
        shape = checks.read_shape(tensors, scheme, lambda local: read(f"{module}.{local}"))
    except (IndexError, ZeroDivisionError):  # a tensor without dimensions
        shape = None
    if shape is None or not all(shape):
        return (
            None,
            f"{module}: expected the tensors of {scheme.bits}-bit codes, found "
            f"{', '.join(sorted(tensors)) or 'none'}",
        )
    linear = Linear(
        name=module, out_features=shape[0], in_features=shape[1], role="mlp", bias="bias" in tensors
    )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return (
            None,
            f"{module}: group_size {scheme.group_size} does not divide its {linear.in_features} "
            "inputs",
        )
    expected_specs = {
        spec.name.removeprefix(f"{module}."): spec for spec in output.layout(linear, scheme)
    }
    for local in sorted(set(expected_specs) | (set(tensors) - {"bias"})):
        expected, actual = (
            f"{spec.dtype} {list(spec.shape)}" if (spec := specs.get(local)) else "none"
            for specs in (expected_specs, tensors)
        )
        if expected != actual:
            settings = f"{scheme.bits} bits, group_size {scheme.group_size}"
            return (
                None,
                f"tensor {module}.{local}: its scheme ({settings}) asks for {expected}, found "
                f"{actual}",
            )
    return linear, None


def read_parts(parts: object, modules: Iterable[str]) -> tuple[list[str], str | None]:
    """Return the manifest's parts, or why they are no list of modules without a quantized one."""
    if not isinstance(parts, list) or not all(isinstance(part, str) and part for part in parts):
        return [], f"{MANIFEST}: parts: expected a list of names, found {parts!r:.60}"
    names = tuple(f"{part}." for part in parts)
    inside = (module for module in modules if f"{module}.".startswith(names))
    if module := next(inside, None):
        expected = f"{MANIFEST}: parts: expected copied modules"
        return [], f"{expected}, found {module}, which is quantized"
    return parts, None


def classify_others(
    output: Format | None,
    packed: Mapping[str, TensorSpec],
    specs: Mapping[str, TensorSpec],
    parts: Sequence[str],
) -> TensorContents:
    """Classify everything that is not part of a quantized linear."""
    suffix = output.fp8_scale if output else None
    copied = tuple(f"{part}." for part in parts)
    blocks = {
        n
        for n, spec in specs.items()
        if spec.dtype == FP8 and n not in packed and n.endswith(".weight")
    }
    scales = {f"{name.removesuffix('weight')}{suffix}": name for name in blocks} if suffix else {}
    others = {name: spec for name, spec in specs.items() if name not in packed}
    codes = find_copied_codes(others)
    logical = {name: x for name, x in others.items() if name not in scales and name not in codes}
    faults = list(find_fp8_faults(suffix, scales, others))
    faults += [
        f"tensor {name}: {spec.dtype} outside the modules that the manifest lists as quantized"
        for name, spec in logical.items()
        if spec.dtype not in FLOATING and not f"{name}.".startswith(copied)
    ]
    return TensorContents(
        name=None,
        kept=tuple(
            n.removesuffix(".weight")
            for n, s in logical.items()
            if n.endswith(".weight") and len(s.shape) == 2
        ),
        fp8=tuple(name.removesuffix(".weight") for name in logical if name in blocks),
        numbers={
            name: MAGNITUDE if name in scales else FINITE
            for name, s in others.items()
            if s.dtype in FLOATING and not f"{name}.".startswith(copied)
        },
        logical=logical,
        faults=tuple(faults),
    )


def find_fp8_faults(
    suffix: str | None, scales: Mapping[str, str], others: Mapping[str, TensorSpec]
) -> Iterator[str]:
    """Yield FP8 tensors that the format cannot hold, and weights without fitting block scales."""
    if suffix is None:
        yield from (
            f"tensor {n}: FP8, which this format does not hold"
            for n, s in others.items()
            if s.dtype == FP8
        )
        return
    for name, weight in scales.items():
        shape = [-(-side // FP8_SIDE) for side in others[weight].shape]
        expected = f"F32 {shape}"
        actual = f"{others[name].dtype} {list(others[name].shape)}" if name in others else "none"
        if expected != actual:
            yield (
                f"tensor {name}: expected {expected} for the FP8 blocks of {weight}, found {actual}"
            )


def parse_scheme(values: object) -> Scheme | None:
    """Parse a scheme of the manifest; None if it is invalid."""
    if not isinstance(values, Mapping) or set(values) != SCHEME_KEYS:
        return None
    bits, group, kind = values["bits"], values["group_size"], values["kind"]
    flags = all(type(values[key]) is bool for key in ("symmetric", "double_quant"))
    sizes = (
        type(bits) is int and 2 <= bits <= 8 and type(group) is int and (group == -1 or group > 0)
    )
    floats = tuple(FLOAT_NAMES)
    names = kind in get_args(SchemeKind) and values["scale_dtype"] in FP4_SCALES.get(kind, floats)
    if not (flags and sizes and names and values["source_dtype"] in (None, *floats)):
        return None
    return Scheme(**{str(key): value for key, value in values.items()})


def make_quantization_config(
    output: Format, contents: Contents
) -> tuple[dict[str, object] | None, str | None]:
    """Return the format's quantization_config for these contents, or why it refuses."""
    try:
        return (output.quantization_config(contents) if contents.schemes else None), None
    except UsageError as fault:
        return None, str(fault)
