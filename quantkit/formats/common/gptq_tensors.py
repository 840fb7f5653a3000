"""What GPTQ files of both versions share: their tensors, but for the zero points, and their entry in config.json.

    qweight [in * bits / 32, out] int32    sequential codes of consecutive inputs, lowest first
    qzeros  [n_groups, out * bits / 32] int32    sequential zero points; version 1 stores them less one
    scales  [n_groups, out] float16 or bfloat16
    g_idx   [in] int32    the group of an input channel, always k // group_size

The activation order of a solver leaves no trace: groups stay where they are, desc_act is false.
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
    codes_told,
    dynamic,
    group_by_codes,
    matcher,
    pattern,
    texts,
)
from quantkit.formats.common.engine_names import (
    expand_fused_names,
    kept_patterns,
    lines,
    split_layer,
)
from quantkit.formats.common.packed import SCALE_DTYPES
from quantkit.numerics.runs import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

MLA = ("q_a_proj", "kv_a_proj_with_mqa", "kv_b_proj")
"""DeepSeek's compressed attention: SGLang joins the first two along the wrong axis and unpacks the last as AWQ."""


def limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Engines that do not read this mixture of linears in GPTQ of either version, and why."""
    found: dict[str, str] = {}
    kinds = group_by_codes({linear.name: scheme for linear, scheme in schemes.items()})
    if len(kinds) > 1:
        found |= dict.fromkeys(
            ("transformers", "llama.cpp"), "reads every GPTQ linear by one scheme"
        )
    beside = {name for _, names in kinds[1:] for name in names} | {linear.name for linear in kept}
    experts = [linear.name for linear in (*schemes, *kept) if linear.role == "routed_expert"]
    if any(name in beside for name in experts):
        found["SGLang"] = f"reads all routed experts as GPTQ of {kinds[0][0]}; here some are not"
    return found


def layout(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """qweight, qzeros, scales and g_idx of one linear, with full names."""
    width, out, bits = linear.in_features, linear.out_features, scheme.bits
    groups, dtype = scheme.groups(width), SCALE_DTYPES[scheme.scale_dtype]
    return (
        TensorSpec(name=f"{linear.name}.qweight", dtype="I32", shape=(width * bits // 32, out)),
        TensorSpec(name=f"{linear.name}.qzeros", dtype="I32", shape=(groups, out * bits // 32)),
        TensorSpec(name=f"{linear.name}.scales", dtype=dtype, shape=(groups, out)),
        TensorSpec(name=f"{linear.name}.g_idx", dtype="I32", shape=(width,)),
    )


def pack(quantized: Quantized, scheme: Scheme, less: int) -> dict[str, Tensor]:
    """codes [out, in], scale and zero [out, n_groups] -> local names, with zero points stored `less` that much.

    Raises NumericsError when a code or a zero point does not fit.
    """
    import torch  # starts when there is something to store

    from quantkit.numerics import affine, bitpack

    width = quantized.codes.shape[1]
    middle = torch.full_like(
        quantized.scale, affine.get_default_zero_point(scheme), dtype=torch.int32
    )
    zero = middle if quantized.zero is None else quantized.zero.to(torch.int32)  # [out, n_groups]
    group = width if scheme.group_size == -1 else scheme.group_size
    return {
        "qweight": bitpack.pack(
            quantized.codes.T, scheme.bits, axis=0
        ),  # [out, in] -> [in * bits / 32, out]
        "qzeros": bitpack.pack(
            zero.T - less, scheme.bits, axis=1
        ),  # [out, n_groups] -> [n_groups, out * bits / 32]
        "scales": quantized.scale.T.contiguous(),  # [out, n_groups] -> [n_groups, out]
        "g_idx": torch.arange(width, dtype=torch.int32, device=quantized.codes.device) // group,
    }


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme, less: int) -> Tensor:
    """The tensors of `pack` -> the weight [out, in] float32; symmetric schemes imply what their qzeros say."""
    from quantkit.numerics import affine, bitpack

    zero = (
        None
        if scheme.symmetric
        else bitpack.unpack(tensors["qzeros"], scheme.bits, axis=1).T + less
    )
    stored = Quantized(
        codes=bitpack.unpack(
            tensors["qweight"], scheme.bits, axis=0
        ).T,  # [in * bits / 32, out] -> [out, in]
        scale=tensors["scales"].T,  # [n_groups, out] -> [out, n_groups]
        zero=zero,
    )
    return affine.dequantize(stored, scheme)


def quantization_config(contents: Contents, format_name: str) -> dict[str, object]:
    """The entry for config.json. `dynamic` is what SGLang and GPTQModel read, the module list what transformers does.

    vLLM reads both. The commonest scheme stands on top, the others in `dynamic`, which transformers does not read.
    `format_name` is the value of checkpoint_format.
    """
    (general, _), *others = group_by_codes(contents.schemes)
    overrides = {
        f"+:{pattern}": values(codes)
        for codes, names in others
        for pattern in kept_patterns([*(contents.schemes.keys() - names), *contents.kept], names)
    }
    return {
        "quant_method": "gptq",
        **values(general),
        "desc_act": False,
        "checkpoint_format": format_name,
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {
            **{
                f"-:{pattern}": {}
                for pattern in kept_patterns(list(contents.schemes), contents.kept)
            },
            **overrides,
        },
        "modules_in_block_to_quantize": [quantized_suffixes(list(contents.schemes), contents.kept)],
    }


def values(codes: IntegerCodes) -> dict[str, object]:
    """Codes in the words of GPTQ's config."""
    return {"bits": codes.bits, "group_size": codes.group_size, "sym": codes.symmetric}


def quantized_suffixes(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Names within a block that mean the quantized modules and no kept one; full names where blocks differ.

    transformers asks whether a module's name ends with an entry, vLLM whether it contains one.
    """
    others = lines(expand_fused_names(kept))
    found: dict[str, None] = {}
    clear: dict[str, bool] = {}
    for name in quantized:
        suffix = split_layer(name)[2].removeprefix(".") or name
        if suffix not in clear:
            clear[suffix] = suffix not in others
        found[suffix if clear[suffix] else name] = None
    return list(found)


def shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """[out, in] by the specs of a linear's tensors."""
    if not {"g_idx", "scales"} <= set(specs):
        return None
    return specs["scales"].shape[-1], specs["g_idx"].shape[0]


def numbers(linear: Linear, scheme: Scheme, less: int) -> dict[str, ValueCheck]:
    """What the tensors of one linear must hold; symmetric zero points are the middle code `less` that much."""
    group = linear.in_features if scheme.group_size == -1 else scheme.group_size
    found = {"scales": SCALE, "g_idx": ValueCheck(kind="groups", group=group)}
    if scheme.symmetric:
        run, middle = count_codes_per_run(scheme.bits), (1 << (scheme.bits - 1)) - less
        words = sum(middle << slot * scheme.bits for slot in range(run))
        found["qzeros"] = ValueCheck(
            kind="repeated", pattern=words.to_bytes(run * scheme.bits // 8, "little")
        )
    return found


def by_suffix(entry: Mapping[str, object]) -> list[str]:
    """The nested list of suffixes that are quantized."""
    found = entry.get(LIST)
    if not isinstance(found, list) or not found:
        raise ArtifactError(
            f"config.json: quantization_config.{LIST}: expected a list of lists, found {found!r:.60}"
        )
    return [name for inner in found for name in texts(inner, LIST)]


def ending(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """transformers: a module is quantized when its name ends with an entry."""
    suffixes = tuple(by_suffix(entry))
    return lambda module: "codes" if module.endswith(suffixes) else "plain"


def overridden(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """SGLang and GPTQModel: "-:pattern" leaves a module alone, "+:pattern" gives it other codes than those on top."""
    general = codes_told(
        entry.get("bits"), entry.get("group_size"), entry.get("sym"), "bits, group_size, sym"
    )
    rules: dict[Treatment, list[str]] = {}
    for key, told in dynamic(entry).items():
        if key.startswith("-:") and told == {}:
            rules.setdefault("plain", []).append(pattern(key.removeprefix("-:"), "dynamic"))
        elif (
            key.startswith("+:")
            and isinstance(told, Mapping)
            and set(told) == {"bits", "group_size", "sym"}
        ):
            other = codes_told(told["bits"], told["group_size"], told["sym"], f"dynamic.{key}")
            rules.setdefault(other, []).append(pattern(key.removeprefix("+:"), "dynamic"))
        else:
            raise ArtifactError(
                "config.json: quantization_config.dynamic: expected '-:pattern' with {} or '+:pattern' with bits, "
                f"group_size and sym, found {key!r:.60}"
            )
    found = [(matcher(tuple(patterns)), treatment) for treatment, patterns in rules.items()]
    return lambda module: next(
        (treatment for named, treatment in found if named.match(module)), general
    )


def containing(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """vLLM: a module is quantized when its name contains an entry, and then as `dynamic` says."""
    named, treatment = matcher(tuple(map(re.escape, by_suffix(entry)))), overridden(entry)
    return lambda module: treatment(module) if named.search(module) else "plain"


LIST = "modules_in_block_to_quantize"


def checks(less: int) -> FormatChecks:
    """What `quantkit verify` must know of either version."""
    return FormatChecks(
        shape=shape,
        numbers=lambda linear, scheme: numbers(linear, scheme, less),
        loaders=(
            Loader(engines="SGLang and GPTQModel", told=overridden),
            Loader(engines="vLLM", told=containing, fused=False),
            Loader(engines="transformers", told=ending, fused=False),
        ),
        lists=frozenset({LIST, "dynamic"}),
    )
