"""The tensors and the config entry of both GPTQ versions (see formats/README.md, GPTQ).

    qweight [in * bits / 32, out] int32    sequential codes of consecutive inputs, lowest first
    qzeros  [n_groups, out * bits / 32] int32    sequential zero points; version 1 stores zero - 1
    scales  [n_groups, out] float16 or bfloat16
    g_idx   [in] int32    the group of an input channel, always k // group_size

Groups keep the order of the inputs, so a solver's activation order leaves no trace: desc_act is
false. `zero_offset` is what readers add to stored zero points: 1 in version 1, 0 in version 2.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.contracts import Contents, Linear, Quantized, Scheme, TensorSpec
from quantkit.errors import ArtifactError
from quantkit.formats.common.checks import (
    SCALE,
    FormatChecks,
    IntegerCodes,
    Loader,
    Treatment,
    ValueCheck,
    check_pattern,
    compile_any,
    group_by_codes,
    parse_codes,
    parse_dynamic,
    parse_name_list,
)
from quantkit.formats.common.engine_names import (
    expand_fused_names,
    join_lines,
    make_patterns,
    split_layer,
)
from quantkit.formats.common.packed import SCALE_DTYPES
from quantkit.formats.common.wrapper_names import (
    get_prefix,
    is_wrapper,
    list_full_names,
    list_part_patterns,
    make_relative,
)
from quantkit.numerics.bitpack import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

QUANT_METHOD = "gptq"
MLA_PROJECTIONS = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""DeepSeek's multi-head latent attention: SGLang joins the first two along the wrong axis and
unpacks the last as AWQ."""


def find_engine_limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Return the engines that do not load these linears in either GPTQ version, with the reason."""
    reasons: dict[str, str] = {}
    kinds = group_by_codes({linear.name: scheme for linear, scheme in schemes.items()})
    if len(kinds) > 1:
        reasons |= dict.fromkeys(
            ("transformers", "llama.cpp"), "reads every GPTQ linear by one scheme"
        )
    others = {name for _, names in kinds[1:] for name in names} | {linear.name for linear in kept}
    experts = [linear.name for linear in (*schemes, *kept) if linear.role == "routed_expert"]
    if any(name in others for name in experts):
        reasons["SGLang"] = (
            f"reads all routed experts as GPTQ of {kinds[0][0]}; some of these are not"
        )
    return reasons


def list_tensors(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """Return the specs of qweight, qzeros, scales and g_idx of one linear, with full names."""
    width, out, bits = linear.in_features, linear.out_features, scheme.bits
    groups, dtype = scheme.groups(width), SCALE_DTYPES[scheme.scale_dtype]
    return (
        TensorSpec(name=f"{linear.name}.qweight", dtype="I32", shape=(width * bits // 32, out)),
        TensorSpec(name=f"{linear.name}.qzeros", dtype="I32", shape=(groups, out * bits // 32)),
        TensorSpec(name=f"{linear.name}.scales", dtype=dtype, shape=(groups, out)),
        TensorSpec(name=f"{linear.name}.g_idx", dtype="I32", shape=(width,)),
    )


def pack(quantized: Quantized, scheme: Scheme, zero_offset: int) -> dict[str, Tensor]:
    """Pack codes [out, in], scale and zero [out, n_groups]; return tensors by local name.

    Raises NumericsError if a code or a stored zero point does not fit its bits.
    """
    import torch  # slow to import; plans use this module without it

    from quantkit.numerics import affine, bitpack

    width = quantized.codes.shape[1]
    middle = torch.full_like(
        quantized.scale, affine.get_default_zero_point(scheme), dtype=torch.int32
    )
    zero = middle if quantized.zero is None else quantized.zero.to(torch.int32)  # [out, n_groups]
    group = width if scheme.group_size == -1 else scheme.group_size
    return {
        # [out, in] -> [in * bits / 32, out]
        "qweight": bitpack.pack(quantized.codes.T, scheme.bits, axis=0),
        # [out, n_groups] -> [n_groups, out * bits / 32]
        "qzeros": bitpack.pack(zero.T - zero_offset, scheme.bits, axis=1),
        "scales": quantized.scale.T.contiguous(),  # [out, n_groups] -> [n_groups, out]
        "g_idx": torch.arange(width, dtype=torch.int32, device=quantized.codes.device) // group,
    }


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme, zero_offset: int) -> Tensor:
    """Return the weight [out, in] float32 of the tensors of `pack`.

    In symmetric schemes qzeros is not read: the zero point is implied.
    """
    from quantkit.numerics import affine, bitpack

    zero = (
        None
        if scheme.symmetric
        else bitpack.unpack(tensors["qzeros"], scheme.bits, axis=1).T + zero_offset
    )
    stored = Quantized(
        # [in * bits / 32, out] -> [out, in]
        codes=bitpack.unpack(tensors["qweight"], scheme.bits, axis=0).T,
        scale=tensors["scales"].T,  # [n_groups, out] -> [out, n_groups]
        zero=zero,
    )
    return affine.dequantize(stored, scheme)


def make_quantization_config(contents: Contents, format_name: str) -> dict[str, object]:
    """Return the entry for config.json.

    SGLang and GPTQModel read `dynamic`, transformers reads the list of modules, vLLM reads both.
    The most frequent scheme is the general one; the others are rules of `dynamic`, which
    transformers ignores. `format_name` is the value of checkpoint_format.
    """
    part_patterns = list_part_patterns(contents)
    whole, contents, prefix = contents, make_relative(contents), get_prefix(contents)
    (general, _), *others = group_by_codes(contents.schemes)
    overrides = {
        f"+:{prefix}{pattern}": make_codes_config(codes)
        for codes, names in others
        for pattern in make_patterns([*(contents.schemes.keys() - names), *contents.kept], names)
    }
    kept = [f"{prefix}{x}" for x in make_patterns(list(contents.schemes), contents.kept)]
    return {
        "quant_method": QUANT_METHOD,
        **make_codes_config(general),
        "desc_act": False,
        "checkpoint_format": format_name,
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {
            **{f"-:{pattern}": {} for pattern in (*kept, *part_patterns)},
            **overrides,
        },
        "modules_in_block_to_quantize": [list_module_suffixes(whole, contents)],
    }


def make_codes_config(codes: IntegerCodes) -> dict[str, object]:
    """Return codes under the keys of GPTQ's config."""
    return {"bits": codes.bits, "group_size": codes.group_size, "sym": codes.symmetric}


def list_module_suffixes(whole: Contents, relative: Contents) -> list[str]:
    """Return the entries that select quantized modules, in a wrapper with names for each engine.

    relative: the same contents with the names of `wrapper_names.make_relative`.
    """
    others = [module for modules in whole.parts.values() for module in modules]
    entries = list_quantized_suffixes(list(relative.schemes), [*relative.kept, *others])
    if not is_wrapper(whole):
        return entries
    names = [list_full_names(x, whole) if x in relative.schemes else [x] for x in entries]
    return [name for forms in names for name in forms]


def list_quantized_suffixes(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Return the names within a block that select quantized modules and no kept one.

    Full names where blocks differ. A module is quantized in transformers if its name ends with an
    entry, in vLLM if it contains one.
    """
    others = join_lines(expand_fused_names(kept))
    entries: dict[str, None] = {}
    is_unique: dict[str, bool] = {}
    for name in quantized:
        suffix = split_layer(name)[2].removeprefix(".") or name
        if suffix not in is_unique:
            is_unique[suffix] = suffix not in others
        entries[suffix if is_unique[suffix] else name] = None
    return list(entries)


def read_shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """Return [out, in] from the specs of a linear's tensors."""
    if not {"g_idx", "scales"} <= set(specs):
        return None
    return specs["scales"].shape[-1], specs["g_idx"].shape[0]


def list_value_checks(linear: Linear, scheme: Scheme, zero_offset: int) -> dict[str, ValueCheck]:
    """Return the checks of one linear's tensors.

    Symmetric zero points are the middle code minus `zero_offset`.
    """
    group = linear.in_features if scheme.group_size == -1 else scheme.group_size
    checks = {"scales": SCALE, "g_idx": ValueCheck(kind="groups", group=group)}
    if scheme.symmetric:
        run, middle = count_codes_per_run(scheme.bits), (1 << (scheme.bits - 1)) - zero_offset
        words = sum(middle << slot * scheme.bits for slot in range(run))
        checks["qzeros"] = ValueCheck(
            kind="repeated", pattern=words.to_bytes(run * scheme.bits // 8, "little")
        )
    return checks


def parse_suffixes(entry: Mapping[str, object]) -> list[str]:
    """Return the flattened list of the suffixes of quantized modules."""
    value = entry.get(MODULE_LIST)
    if not isinstance(value, list) or not value:
        raise ArtifactError(
            f"config.json: quantization_config.{MODULE_LIST}: expected a list of lists, "
            f"found {value!r:.60}"
        )
    return [name for suffixes in value for name in parse_name_list(suffixes, MODULE_LIST)]


def classify_by_suffix(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """Return transformers' reading: a module is quantized if its name ends with an entry."""
    suffixes = tuple(parse_suffixes(entry))
    return lambda module: "codes" if module.endswith(suffixes) else "plain"


def classify_by_rules(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """Return the reading of SGLang and GPTQModel.

    "-:pattern" leaves a module unquantized, "+:pattern" gives it codes other than the general ones.
    """
    general = parse_codes(
        entry.get("bits"), entry.get("group_size"), entry.get("sym"), "bits, group_size, sym"
    )
    rules: dict[Treatment, list[str]] = {}
    for key, value in parse_dynamic(entry).items():
        if key.startswith("-:") and value == {}:
            rules.setdefault("plain", []).append(check_pattern(key.removeprefix("-:"), "dynamic"))
        elif (
            key.startswith("+:")
            and isinstance(value, Mapping)
            and set(value) == {"bits", "group_size", "sym"}
        ):
            other = parse_codes(value["bits"], value["group_size"], value["sym"], f"dynamic.{key}")
            rules.setdefault(other, []).append(check_pattern(key.removeprefix("+:"), "dynamic"))
        else:
            raise ArtifactError(
                "config.json: quantization_config.dynamic: expected '-:pattern' with {} or "
                f"'+:pattern' with bits, group_size and sym, found {key!r:.60}"
            )
    compiled = [(compile_any(tuple(patterns)), treatment) for treatment, patterns in rules.items()]
    return lambda module: next(
        (treatment for expression, treatment in compiled if expression.match(module)), general
    )


def classify_as_vllm(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """Return vLLM's reading: a module is quantized, by `dynamic`, if its name contains an entry."""
    suffixes, treatment = (
        compile_any(tuple(map(re.escape, parse_suffixes(entry)))),
        classify_by_rules(entry),
    )
    return lambda module: treatment(module) if suffixes.search(module) else "plain"


MODULE_LIST = "modules_in_block_to_quantize"


def make_checks(zero_offset: int) -> FormatChecks:
    """Return the checks of `quantkit verify` for either version."""
    return FormatChecks(
        read_shape=read_shape,
        value_checks=lambda linear, scheme: list_value_checks(linear, scheme, zero_offset),
        loaders=(
            Loader(engines="SGLang and GPTQModel", classify=classify_by_rules),
            Loader(engines="vLLM", classify=classify_as_vllm, has_fused_names=False),
            Loader(engines="transformers", classify=classify_by_suffix, has_fused_names=False),
        ),
        module_lists=frozenset({MODULE_LIST, "dynamic"}),
    )
