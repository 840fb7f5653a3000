"""compressed-tensors: integer codes of 2 to 8 bits, MXFP4 and NVFP4 (formats/README.md).

Integers are "pack-quantized":

    weight_packed      [out, in * bits / 32] int32    sequential codes, lowest first; not transposed
    weight_scale       [out, n_groups] float16 or bfloat16
    weight_zero_point  [out * bits / 32, n_groups] int32    asymmetric only; packed along `out`
    weight_shape       [2] int64    out, in

FP4 and other codes of a source are in common/source_codes.py. Other linears stay BF16, or in the
source's FP8 blocks ("float-quantized"), bit for bit:

    weight        [out, in] float8_e4m3fn
    weight_scale  [ceil(out / 128), ceil(in / 128)] float32    the source's weight_scale_inv

vLLM, SGLang and transformers (with the package compressed-tensors) read it, symmetric routed
experts included; only transformers reads other widths than 4 and 8 bits, and zero points of other
widths than 4.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
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
from quantkit.formats.common import source_codes
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
    parse_name_list,
    require_bytes,
)
from quantkit.formats.common.engine_names import LM_HEAD, SERVERS, TRANSFORMERS, make_patterns
from quantkit.formats.common.packed import (
    GROUP_SIZES,
    OWN_FORMATS,
    SCALE_DTYPES,
    SERVED_BITS,
    check_zero_points,
)
from quantkit.formats.common.wrapper_names import (
    get_prefix,
    list_fp8_part_patterns,
    list_part_patterns,
    make_relative,
)
from quantkit.numerics.bitpack import count_codes_per_run

if TYPE_CHECKING:
    from torch import Tensor

QUANT_METHOD = "compressed-tensors"
BITS = range(2, 9)
FP8_BLOCK = 128
ROUTED = ".experts."
"""A substring of the name of every routed expert's linear and of no other."""


def find_rejection(scheme: Scheme, linear: Linear) -> str | None:
    """Return the first reason why engines could not load this linear, with what to do, or None."""
    if scheme.kind in source_codes.KINDS:
        return source_codes.find_rejection(linear)
    return find_scheme_fault(scheme) or find_linear_fault(scheme, linear)


def copies_codes(scheme: Scheme, linear: Linear) -> bool:
    """Return whether a kept linear's codes are stored unchanged.

    Experts in other codes than integers are decoded: a recipe that keeps them does not ask for an
    artifact that transformers cannot load.
    """
    is_other_expert = linear.role == "routed_expert" and scheme.kind != "int"
    return not is_other_expert and find_rejection(scheme, linear) is None


def find_scheme_fault(scheme: Scheme) -> str | None:
    """Return why no linear of this scheme can be stored, or None."""
    if scheme.kind != "int" or scheme.bits not in BITS:
        kind = f"{scheme.bits} bits" if scheme.kind == "int" else scheme.kind
        use = "dense to study it" if scheme.kind == "int" else OWN_FORMATS[scheme.kind]
        return (
            "vLLM, SGLang and transformers read compressed-tensors with 2 to 8 bits, "
            f"found {kind}; use format {use}"
        )
    if scheme.group_size not in GROUP_SIZES:
        return (
            "the compressed-tensors kernels of vLLM and SGLang support group sizes 32, 64, 128 and "
            f"-1, found {scheme.group_size}"
        )
    if scheme.scale_dtype not in SCALE_DTYPES:
        return (
            "vLLM and SGLang hold compressed-tensors scales in 16 bits, "
            f"found {scheme.scale_dtype}; use bfloat16 or float16"
        )
    return None


def find_linear_fault(scheme: Scheme, linear: Linear) -> str | None:
    """Return why this linear cannot be stored in a supported scheme, or None."""
    count = count_codes_per_run(scheme.bits)
    if linear.role in PROTECTED_ROLES:
        return (
            f"vLLM and SGLang build this {linear.role.replace('_', ' ')} without codes and find no "
            "weight; keep it"
        )
    if linear.role == "routed_expert" and not scheme.symmetric:
        return (
            "transformers cannot load experts with zero points from compressed-tensors, and SGLang "
            "unpacks them in AWQ's order; use symmetric: true, or format awq"
        )
    if linear.name.endswith(".kv_b_proj"):
        return (
            "SGLang looks for kv_b_proj's plain weight in compressed-tensors files; keep it, or "
            "use format awq"
        )
    if linear.in_features % count or (not scheme.symmetric and linear.out_features % count):
        return (
            f"{linear.out_features} x {linear.in_features} features do not fill the words of "
            f"{count} codes that vLLM and SGLang read; keep this linear"
        )
    if scheme.group_size != -1 and linear.in_features % scheme.group_size:
        return (
            f"no engine loads compressed-tensors with group_size {scheme.group_size} over "
            f"{linear.in_features} input features"
        )
    return None


def find_engine_limits(
    model_type: str, schemes: Mapping[Linear, Scheme], kept: Sequence[Linear]
) -> dict[str, str]:
    """Return the engines that do not load an artifact of these linears, with the reason."""
    reasons: dict[str, str] = {}
    servers, used = ("vLLM", "SGLang"), set(schemes.values())
    if microscaled := sorted({x.kind.upper() for x in used if x.kind in ("mxfp4", "nvfp4")}):
        reasons["SGLang"] = (
            f"has no known reader of {' and '.join(microscaled)} weights of compressed-tensors "
            "with inputs in 16 bits"
        )
    if any(scheme.bits not in SERVED_BITS for scheme in used):
        reasons |= dict.fromkeys(servers, "kernels for compressed-tensors of 4 and 8 bits only")
    elif any(not scheme.symmetric and scheme.bits != 4 for scheme in used):
        reasons |= dict.fromkeys(servers, "kernels for zero points with 4 bits only")
    if not all(scheme.symmetric for scheme in used):
        reasons["transformers"] = (
            "loads zero points of compressed-tensors only by from_pretrained(..., "
            "quantization_config=CompressedTensorsConfig(dequantize=True)), and of one scheme"
        )
    routed = {e.name: s for e, s in schemes.items() if e.role == "routed_expert"}
    if any(scheme.kind != "int" for scheme in routed.values()):
        reasons["transformers"] = (
            "reads routed experts of compressed-tensors in integer codes only; quantkit.load and "
            "`quantkit serve --engine transformers` read this artifact"
        )
    elif len(group_by_codes(routed)) > 1 and "transformers" not in reasons:
        reasons["transformers"] = "reads all routed experts of compressed-tensors by one scheme"
    return reasons


def list_tensors(linear: Linear, scheme: Scheme) -> tuple[TensorSpec, ...]:
    """Return the specs of one linear's tensors, with full names; zero points only if asymmetric."""
    if scheme.kind in source_codes.KINDS:
        return source_codes.list_tensors(linear, scheme)
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
    """Pack codes [out, in], scale and zero [out, n_groups]; return tensors by local name.

    Raises NumericsError if a code does not fit, UsageError if zero points contradict the scheme.
    """
    import torch  # slow to import; plans use this module without it

    from quantkit.numerics import bitpack

    if scheme.kind in source_codes.KINDS:
        return source_codes.pack(quantized, scheme)
    check_zero_points(quantized, scheme, "compressed_tensors")
    tensors = {
        # [out, in] -> [out, in * bits / 32]
        "weight_packed": bitpack.pack(quantized.codes, scheme.bits, axis=1),
        "weight_scale": quantized.scale.contiguous(),
    }
    if quantized.zero is not None:
        # [out, n_groups] -> [out * bits / 32, n_groups]
        tensors["weight_zero_point"] = bitpack.pack(quantized.zero, scheme.bits, axis=0)
    return {**tensors, "weight_shape": torch.tensor(quantized.codes.shape, dtype=torch.int64)}


def dequantize(tensors: Mapping[str, Tensor], scheme: Scheme) -> Tensor:
    """Return the weight [out, in] float32 of the tensors of `pack`, as engines compute it."""
    from quantkit.numerics import affine, bitpack

    if scheme.kind in source_codes.KINDS:
        return source_codes.dequantize(tensors, scheme)
    zero = (
        None
        if scheme.symmetric
        else bitpack.unpack(tensors["weight_zero_point"], scheme.bits, axis=0)
    )
    # [out, in * bits / 32] -> [out, in]
    codes = bitpack.unpack(tensors["weight_packed"], scheme.bits, axis=1)
    return affine.dequantize(
        Quantized(codes=codes, scale=tensors["weight_scale"], zero=zero), scheme
    )


def find_fp8_rejection(linear: Linear, block: int) -> str | None:
    """Return why a linear cannot stay in the source's FP8 blocks of that side, or None.

    The linear belongs to a block that transformers runs.
    """
    if block != FP8_BLOCK:
        return (
            f"vLLM and SGLang read FP8 in blocks of 128 x 128, found {block} x {block}; use keep: "
            "bf16"
        )
    if linear.role == "routed_expert":
        return (
            "transformers multiplies an expert's FP8 weight by its block scales as if there were "
            "one per weight; quantize the routed experts, or use keep: bf16"
        )
    return None


def make_quantization_config(contents: Contents) -> dict[str, object]:
    """Return the entry for config.json. Everything in BF16 must be in `ignore`.

    For one scheme without FP8: one group with the target "Linear". SGLang then disables the fusion
    of shared experts by itself if they are stored differently, and llama.cpp converts the artifact.
    Otherwise one group per scheme, the most frequent with the target "Linear", and one for FP8.
    Each group names its own format; the general one is that of the first, "pack-quantized" wherever
    there are integers, which SGLang checks for experts.
    """
    part_patterns = [f"re:{pattern}" for pattern in list_part_patterns(contents)]
    part_blocks = [f"re:{pattern}" for pattern in list_fp8_part_patterns(contents)]
    contents, prefix = make_relative(contents), get_prefix(contents)
    codes, every = list(contents.schemes), ["Linear"]
    blocks = set(contents.fp8)
    plain = [name for name in contents.kept if name not in blocks]
    # SGLang looks up kv_b_proj's block size in the group with target "Linear"
    fp8_is_rest = any(name.endswith(".kv_b_proj") for name in blocks)
    groups: list[dict[str, object]] = []
    for kind, names in group_by_codes(contents.schemes):
        others = [*(contents.schemes.keys() - names), *contents.kept]
        groups.append(
            make_packed_group(
                list_targets(others, names, prefix) if groups or fp8_is_rest else every, kind
            )
        )
    if blocks or part_blocks:
        text_blocks = list_targets([*codes, *plain], contents.fp8, prefix) if blocks else []
        targets = every if fp8_is_rest else hide_experts([*text_blocks, *part_blocks])
        groups.append(make_fp8_group(targets))
    return {
        "quant_method": QUANT_METHOD,
        "format": groups[0]["format"],
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "global_compression_ratio": None,
        "ignore": [*list_ignored([*codes, *contents.fp8], plain, prefix), *part_patterns],
        "config_groups": {f"group_{number}": group for number, group in enumerate(groups)},
    }


def make_packed_group(targets: Sequence[str], kind: IntegerCodes) -> dict[str, object]:
    """Return a group of integer codes.

    These come first: readers take the first group that matches an expert's name. Codes of the
    source have a format of their own.
    """
    if kind.kind in source_codes.KINDS:
        return source_codes.make_group(kind.kind, list(targets))
    return {
        "format": "pack-quantized",
        "targets": list(targets),
        "weights": make_weight_args(kind),
        "input_activations": None,
        "output_activations": None,
    }


def make_fp8_group(targets: Sequence[str]) -> dict[str, object]:
    """Return the group of FP8 blocks.

    Engines round its inputs to FP8 too, with one scale per token and 128 channels.
    """
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


def list_targets(others: Sequence[str], modules: Sequence[str], prefix: str = "") -> list[str]:
    """Return expressions that match these modules, fused ones included, and none of the others.

    prefix: an expression of what may precede the names.
    """
    expressions = [f"re:{prefix}{pattern}" for pattern in make_patterns(others, modules)]
    has_routed = any(ROUTED in module for module in modules)
    return expressions if has_routed else hide_experts(expressions)


def hide_experts(targets: Sequence[str]) -> list[str]:
    """Return equivalent expressions without the text "experts".

    transformers recognizes the group of the routed experts by it, and names of shared experts
    contain it too.
    """
    return [target.replace("experts", "exp[e]rts") for target in targets]


def make_weight_args(kind: IntegerCodes) -> dict[str, object]:
    """Return the weight arguments of a group; readers reject unknown keys, so none are added."""
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


def list_ignored(quantized: Sequence[str], kept: Sequence[str], prefix: str = "") -> list[str]:
    """Return the entries of `ignore`: plain names of single modules, "re:" and a pattern of others.

    Engines look up "lm_head" by its plain name. prefix: an expression of what may precede the
    names, which then are patterns.
    """
    plain = {f"{re.escape(name)}$": name for name in kept}
    patterns = make_patterns(quantized, kept)
    if prefix:
        return [*(x for x in kept if x == LM_HEAD), *(f"re:{prefix}{x}" for x in patterns)]
    return [plain.get(pattern, f"re:{pattern}") for pattern in patterns]


def read_shape(
    specs: Mapping[str, TensorSpec], scheme: Scheme, read: Callable[[str], bytes]
) -> tuple[int, int] | None:
    """Return [out, in] from the specs of a linear's tensors."""
    if scheme.kind in source_codes.KINDS:
        return source_codes.read_shape(specs, scheme)
    if not {"weight_packed", "weight_scale"} <= set(specs):
        return None
    return specs["weight_scale"].shape[0], specs["weight_packed"].shape[-1] * 32 // scheme.bits


def list_value_checks(linear: Linear, scheme: Scheme) -> dict[str, ValueCheck]:
    """Return the checks of one linear's tensors."""
    if scheme.kind in source_codes.KINDS:
        return source_codes.list_value_checks(scheme)
    sides = linear.out_features, linear.in_features
    shape = b"".join(side.to_bytes(8, "little") for side in sides)
    return {"weight_scale": SCALE, "weight_shape": require_bytes(shape, f"{list(sides)}")}


def classify_by_targets(entry: Mapping[str, object]) -> Callable[[str], Treatment]:
    """Return all engines' reading: `ignore`, then groups with a matching name, then "Linear"."""
    ignored, groups = compile_names(entry.get("ignore"), "ignore"), entry.get("config_groups")
    if not isinstance(groups, Mapping) or not all(
        isinstance(group, Mapping) for group in groups.values()
    ):
        raise ArtifactError(
            "config.json: quantization_config.config_groups: expected objects, "
            f"found {groups!r:.60}"
        )
    named: list[tuple[re.Pattern[str], Treatment]] = []
    rest: Treatment = "plain"
    for key, group in groups.items():
        of_source = source_codes.find_kind(group)
        is_fp8 = group.get("format") == "float-quantized" and of_source is None
        kind: Treatment = "fp8" if is_fp8 else parse_group_codes(group, key, of_source or "int")
        if group.get("targets") == ["Linear"]:
            rest = kind
        else:
            named.append((
                compile_names(group.get("targets"), f"config_groups.{key}.targets"),
                kind,
            ))

    def classify(module: str) -> Treatment:
        if ignored.match(module):
            return "plain"
        return next((kind for expression, kind in named if expression.match(module)), rest)

    return classify


def parse_group_codes(group: Mapping[str, object], key: str, kind: str) -> IntegerCodes:
    """Return the codes of a group of config_groups."""
    args = group.get("weights")
    if not isinstance(args, Mapping):
        raise ArtifactError(
            f"config.json: quantization_config.config_groups.{key}.weights: expected an object, "
            f"found {args!r:.60}"
        )
    values = args.get("num_bits"), args.get("group_size", -1), args.get("symmetric")
    return replace(parse_codes(*values, f"config_groups.{key}.weights"), kind=kind)


def compile_names(value: object, key: str) -> re.Pattern[str]:
    """Compile a list of names, and expressions after "re:", to one expression."""
    return compile_any(
        tuple(
            check_pattern(text.removeprefix("re:"), key)
            if text.startswith("re:")
            else f"{re.escape(text)}$"
            for text in parse_name_list(value, key)
        )
    )


CHECKS = FormatChecks(
    read_shape=read_shape,
    value_checks=list_value_checks,
    loaders=(Loader(engines="vLLM, SGLang and transformers", classify=classify_by_targets),),
    module_lists=frozenset({"ignore", "targets"}),
)

FORMAT = Format(
    accepts=find_rejection,
    layout=list_tensors,
    pack=pack,
    dequantize=dequantize,
    quantization_config=make_quantization_config,
    quant_method=QUANT_METHOD,
    one_scheme=False,
    fp8_scale="weight_scale",
    copies_codes=copies_codes,
    accepts_fp8=find_fp8_rejection,
    limits=find_engine_limits,
    engines={**SERVERS, **TRANSFORMERS},
)
