"""compressed-tensors, "pack-quantized": integer codes of 2 to 8 bits beside ordinary BF16 weights (FORMATS.md, 3).

    weight_packed      [out, in * bits / 32] int32    sequential codes, lowest first; not transposed
    weight_scale       [out, n_groups] float16 or bfloat16
    weight_zero_point  [out * bits / 32, n_groups] int32    asymmetric only; packed along `out`
    weight_shape       [2] int64    out, in

Beside them may lie linears of an FP8 source, "float-quantized" and bit for bit:

    weight        [out, in] float8_e4m3fn
    weight_scale  [ceil(out / 128), ceil(in / 128)] float32    the source's weight_scale_inv under another name

Read by vLLM, SGLang and transformers (with the package compressed-tensors), the experts of symmetric mixtures included;
widths other than 4 and 8 bits, and zero points of other than 4, by transformers alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

from quantkit.contracts import (
    PROTECTED_ROLES,
    Contents,
    Format,
    Linear,
    Quantized,
    Scheme,
    TensorSpec,
)
from quantkit.errors import ArtifactError
from quantkit.formats.common.checks import (
    SCALE,
    FormatChecks,
    IntegerCodes,
    Loader,
    Treatment,
    ValueCheck,
    codes_told,
    exactly,
    group_by_codes,
    matcher,
    pattern,
    texts,
)
from quantkit.formats.common.engine_names import SERVERS, TRANSFORMERS, kept_patterns
from quantkit.formats.common.packed import GROUP_SIZES, SCALE_DTYPES, SERVED_BITS, require_agreement
from quantkit.numerics.runs import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

BITS = range(2, 9)
FP8_BLOCK = 128
ROUTED = ".experts."
"""In the name of every routed expert's linear and of no other."""


def accepts(scheme: Scheme, linear: Linear) -> str | None:
    """None, or the first reason why engines could not load this linear, with what to do."""
    return scheme_fault(scheme) or linear_fault(scheme, linear)


def scheme_fault(scheme: Scheme) -> str | None:
    """Why no linear of this scheme can be stored."""
    if scheme.kind != "int" or scheme.bits not in BITS:
        found = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = "dense to study it" if scheme.kind == "int" else "bitsandbytes"
        return f"vLLM, SGLang and transformers read compressed-tensors with 2 to 8 bits, found {found}; use format {use}"
    if scheme.group_size not in GROUP_SIZES:
        return (
            "the compressed-tensors kernels of vLLM and SGLang know group sizes 32, 64, 128 and -1, found "
            f"{scheme.group_size}"
        )
    if scheme.scale_dtype not in SCALE_DTYPES:
        return (
            f"vLLM and SGLang hold compressed-tensors scales in 16 bits, found {scheme.scale_dtype}; use bfloat16 or "
            "float16"
        )
    return None


def linear_fault(scheme: Scheme, linear: Linear) -> str | None:
    """Why this linear cannot be stored in a scheme that others can."""
    count = count_codes_per_run(scheme.bits)
    if linear.role in PROTECTED_ROLES:
        return f"vLLM and SGLang build this {linear.role.replace('_', ' ')} without codes and find no weight; keep it"
    if linear.role == "routed_expert" and not scheme.symmetric:
        return (
            "transformers cannot load experts with zero points from compressed-tensors, and SGLang unpacks them in "
            "AWQ's order; use symmetric: true, or format awq"
        )
    if linear.name.endswith(".kv_b_proj"):
        return "SGLang looks for kv_b_proj's plain weight in compressed-tensors files; keep it, or use format awq"
    if linear.in_features % count or (not scheme.symmetric and linear.out_features % count):
        return (
            f"{linear.out_features} x {linear.in_features} features do not fill the words of {count} codes that vLLM "
            "and SGLang read; keep this linear"
        )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return (
            f"no engine loads compressed-tensors with group_size {scheme.group_size} over {linear.in_features} input "
            "features"
        )
    return None


def limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Engines that do not load an artifact of these linears, and why."""
    found: dict[str, str] = {}
    servers, used = ("vLLM", "SGLang"), set(schemes.values())
    if any(scheme.bits not in SERVED_BITS for scheme in used):
        found |= dict.fromkeys(servers, "no kernels for compressed-tensors but of 4 or 8 bits")
    elif any(not scheme.symmetric and scheme.bits != 4 for scheme in used):
        found |= dict.fromkeys(servers, "no kernels for zero points but with 4 bits")
    if not all(scheme.symmetric for scheme in used):
        found["transformers"] = (
            "loads zero points of compressed-tensors only by from_pretrained(..., quantization_config="
            "CompressedTensorsConfig(dequantize=True)), and of one scheme"
        )
    elif (
        len(group_by_codes({e.name: s for e, s in schemes.items() if e.role == "routed_expert"}))
        > 1
    ):
        found["transformers"] = "reads all routed experts of compressed-tensors by one scheme"
    return found


def layout(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """weight_packed, weight_scale, weight_zero_point if asymmetric, and weight_shape of one linear, with full names."""
    out, groups, bits = linear.out_features, scheme.groups(linear.in_features), scheme.bits
    dtype, name = SCALE_DTYPES[scheme.scale_dtype], f"{linear.name}.weight"
    zero = TensorSpec(name=f"{name}_zero_point", dtype="I32", shape=(out * bits // 32, groups))
    return (
        TensorSpec(
            name=f"{name}_packed", dtype="I32", shape=(out, linear.in_features * bits // 32)
        ),
        TensorSpec(name=f"{name}_scale", dtype=dtype, shape=(out, groups)),
        *(() if scheme.symmetric else (zero,)),
        TensorSpec(name=f"{name}_shape", dtype="I64", shape=(2,)),
    )


def pack(quantized: Quantized, scheme: Scheme) -> dict[str, Tensor]:
    """codes [out, in], scale and zero [out, n_groups] -> local names.

    Raises NumericsError when a code does not fit, UsageError when zero points and scheme.symmetric contradict.
    """
    import torch  # starts when there is something to store

    from quantkit.numerics import bitpack

    require_agreement(quantized, scheme, "compressed_tensors")
    found = {
        "weight_packed": bitpack.pack(
            quantized.codes, scheme.bits, axis=1
        ),  # [out, in] -> [out, in * bits / 32]
        "weight_scale": quantized.scale.contiguous(),
    }
    if quantized.zero is not None:
        found["weight_zero_point"] = bitpack.pack(
            quantized.zero, scheme.bits, axis=0
        )  # [out, ...] -> [out * bits / 32, ...]
    return {**found, "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64)}


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """The tensors of `pack` -> the weight [out, in] float32 that engines compute with."""
    from quantkit.numerics import affine, bitpack

    zero = (
        None
        if scheme.symmetric
        else bitpack.unpack(tensors["weight_zero_point"], scheme.bits, axis=0)
    )
    codes = bitpack.unpack(
        tensors["weight_packed"], scheme.bits, axis=1
    )  # [out, in * bits / 32] -> [out, in]
    return affine.dequantize(
        Quantized(codes=codes, scale=tensors["weight_scale"], zero=zero), scheme
    )


def accepts_fp8(linear: Linear, block: int) -> str | None:
    """None, or why a linear of a block that transformers runs cannot stay in the source's FP8 blocks."""
    if block != FP8_BLOCK:
        return f"vLLM and SGLang read FP8 in blocks of 128 x 128, found {block} x {block}; use keep: bf16"
    if linear.role == "routed_expert":
        return (
            "transformers multiplies an expert's FP8 weight by its block scales as if there were one per weight; "
            "quantize the routed experts, or use keep: bf16"
        )
    return None


def quantization_config(contents: Contents) -> dict[str, object]:
    """The entry for config.json. What stays BF16 must be in `ignore`.

    Of one scheme without FP8, one group whose target is every linear: SGLang then sees by itself that it must not fuse
    a shared expert that is stored otherwise than the routed ones, and llama.cpp converts it. Otherwise a group per
    scheme, the commonest that of every linear, and one for FP8; each names its own format, and the one on top stays
    "pack-quantized" because SGLang asks it about experts.
    """
    codes, every = list(contents.schemes), ["Linear"]
    blocks = set(contents.fp8)
    plain = [name for name in contents.kept if name not in blocks]
    # SGLang looks for the block size of kv_b_proj in the group of "Linear"
    fp8_is_rest = any(name.endswith(".kv_b_proj") for name in blocks)
    groups: list[dict[str, object]] = []
    for kind, names in group_by_codes(contents.schemes):
        others = [*(contents.schemes.keys() - names), *contents.kept]
        groups.append(
            packed_group(targets(others, names) if groups or fp8_is_rest else every, kind)
        )
    if blocks:
        groups.append(
            fp8_group(
                every if fp8_is_rest else unlike_experts(targets([*codes, *plain], contents.fp8))
            )
        )
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": ignored([*codes, *contents.fp8], plain),
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def packed_group(targets: Sequence[str], kind: IntegerCodes) -> dict[str, object]:
    """A group of integer codes. They come first: readers take the first group that an expert's name fits."""
    return {
        "format": "pack-quantized",
        "targets": list(targets),
        "weights": weights(kind),
        "input_activations": None,
        "output_activations": None,
    }


def fp8_group(targets: Sequence[str]) -> dict[str, object]:
    """The group of FP8 blocks; engines round its inputs to FP8 too, 128 channels of a token by one scale."""
    eight = {"num_bits": 8, "type": "float", "symmetric": True}
    return {
        "format": "float-quantized",
        "targets": list(targets),
        "weights": {
            **eight,
            "strategy": "block",
            "block_structure": [FP8_BLOCK, FP8_BLOCK],
            "dynamic": False,
        },
        "input_activations": {
            **eight,
            "strategy": "group",
            "group_size": FP8_BLOCK,
            "dynamic": True,
        },
        "output_activations": None,
    }


def targets(others: Sequence[str], modules: Sequence[str]) -> list[str]:
    """Expressions that match these modules, fused ones included, and none of the others."""
    named = [f"re:{pattern}" for pattern in kept_patterns(others, modules)]
    return named if any(ROUTED in module for module in modules) else unlike_experts(named)


def unlike_experts(targets: Sequence[str]) -> list[str]:
    """The same without the text "experts", by which transformers finds the group of the routed experts.

    A shared expert has it in its name too.
    """
    return [target.replace("experts", "exp[e]rts") for target in targets]


def weights(kind: IntegerCodes) -> dict[str, object]:
    """The arguments of a group; readers refuse keys they do not know, so there are no others."""
    strategy = {"strategy": "channel"} if kind.group_size == -1 else {"strategy": "group"}
    size = {} if kind.group_size == -1 else {"group_size": kind.group_size}
    return {
        "num_bits": kind.bits,
        "type": "int",
        "symmetric": kind.symmetric,
        **strategy,
        **size,
        "dynamic": False,
    }


def ignored(quantized: Sequence[str], kept: Sequence[str]) -> list[str]:
    """Every kept module by its name where it stands alone ("lm_head" is looked for so), else by "re:" and a pattern."""
    plain = {f"{re.escape(name)}$": name for name in kept}
    return [plain.get(pattern, f"re:{pattern}") for pattern in kept_patterns(quantized, kept)]


def shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """[out, in] by the specs of a linear's tensors."""
    if not {"weight_packed", "weight_scale"} <= set(specs):
        return None
    return specs["weight_scale"].shape[0], specs["weight_packed"].shape[-1] * 32 // scheme.bits


def numbers(linear: Linear, scheme: Scheme) -> dict[str, ValueCheck]:
    """What the tensors of one linear must hold."""
    sides = linear.out_features, linear.in_features
    told = b"".join(side.to_bytes(8, "little") for side in sides)
    return {"weight_scale": SCALE, "weight_shape": exactly(told, f"{list(sides)}")}


def targeted(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """All engines: `ignore` first, then the group that names the module, then the one of every linear."""
    ignored, groups = names_of(entry.get("ignore"), "ignore"), entry.get("config_groups")
    if not isinstance(groups, Mapping) or not all(
        isinstance(group, Mapping) for group in groups.values()
    ):
        raise ArtifactError(
            f"config.json: quantization_config.config_groups: expected objects, found {groups!r:.60}"
        )
    named: list[tuple[re.Pattern[str], Treatment]] = []
    rest: Treatment = "plain"
    for key, group in groups.items():
        found: Treatment = (
            "fp8" if group.get("format") == "float-quantized" else kind_of(group, key)
        )
        if group.get("targets") == ["Linear"]:
            rest = found
        else:
            named.append((names_of(group.get("targets"), f"config_groups.{key}.targets"), found))

    def treatment(module: str) -> Treatment:
        if ignored.match(module):
            return "plain"
        return next((found for expression, found in named if expression.match(module)), rest)

    return treatment


def kind_of(group: Mapping[str, object], key: str) -> IntegerCodes:
    """The codes of a group."""
    told = group.get("weights")
    if not isinstance(told, Mapping):
        raise ArtifactError(
            f"config.json: quantization_config.config_groups.{key}.weights: expected an object, found {told!r:.60}"
        )
    found = told.get("num_bits"), told.get("group_size", -1), told.get("symmetric")
    return codes_told(*found, f"config_groups.{key}.weights")


def names_of(value: object, key: str) -> re.Pattern[str]:
    """One expression for a list of names, "re:" before those that are expressions."""
    return matcher(
        tuple(
            pattern(text.removeprefix("re:"), key)
            if text.startswith("re:")
            else f"{re.escape(text)}$"
            for text in texts(value, key)
        )
    )


CHECKS = FormatChecks(
    shape=shape,
    numbers=numbers,
    loaders=(Loader(engines="vLLM, SGLang and transformers", told=targeted),),
    lists=frozenset({"ignore", "targets"}),
)

FORMAT = Format(
    accepts=accepts,
    layout=layout,
    pack=pack,
    dequantize=dequantize,
    quantization_config=quantization_config,
    one_scheme=False,
    fp8_scale="weight_scale",
    accepts_fp8=accepts_fp8,
    limits=limits,
    engines={**SERVERS, **TRANSFORMERS},
)
