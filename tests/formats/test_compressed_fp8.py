"""INT4 beside the source's FP8 blocks: which module each reader takes for what (FORMATS.md 3.4 and 3.6)."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from support.format_examples import block_modules, linear
from torch import nn
from transformers.integrations.compressed_tensors import get_experts_scheme

from quantkit.contracts import Contents, Scheme
from quantkit.formats import compressed_tensors as ct
from quantkit.formats.common.engine_names import FUSED_MODULES

SCHEME = Scheme(bits=4, group_size=128, symmetric=True, scale_dtype="bfloat16")
MTP = 12
"""The number of the MTP block of the model below: transformers does not run it, vLLM does."""


def modules() -> list[str]:
    """A DeepSeek-V3 of 12 layers, the first three dense, and its MTP block."""
    inner = [name for layer in range(MTP + 1) for name in block_modules(layer, moe=layer >= 3)]
    mtp = [f"model.layers.{MTP}.{name}" for name in ("embed_tokens", "eh_proj", "shared_head.head")]
    return ["model.embed_tokens", *inner, *mtp, "lm_head"]


NEVER = r"|embed_tokens$|lm_head$|eh_proj$|shared_head|\.gate$"
"""What an FP8 checkpoint stores in BF16."""

CASES: Mapping[str, tuple[str, str]] = {
    "flagship, kv_b_proj BF16": (
        r"layers\.\d\b.*\.experts\.|layers\.1[01]\..*\.experts\.",
        "kv_b_proj$",
    ),
    "flagship, kv_b_proj FP8": (
        r"layers\.\d\b.*\.experts\.|layers\.1[01]\..*\.experts\.",
        "nothing",
    ),
    "MTP BF16": (r"layers\.(\d|1[01])\..*\.experts\.", rf"kv_b_proj$|layers\.{MTP}\."),
    "MTP quantized": (r"\.experts\.", "kv_b_proj$"),
    "MTP quantized, kv_b_proj FP8": (r"\.experts\.", "nothing"),
    "shared experts quantized": (r"experts\.", "kv_b_proj$"),
    "shared experts quantized, kv_b_proj FP8": (r"experts\.", "nothing"),
    "shared experts alone FP8": (r"\.experts\.", r"self_attn|layers\.[012]\."),
    "attention BF16": (r"\.experts\.", "self_attn"),
    "attention BF16 but for kv_b_proj": (r"\.experts\.", r"self_attn\.(?!kv_b_proj)"),
    "attention quantized": (r"self_attn\.(?!kv_b_proj)|\.experts\.", "kv_b_proj$"),
    "one layer FP8": (
        r"layers\.(?!10\.)\d+\.(mlp\.(?!gate$)|self_attn\.(?!kv_b_proj))|\.experts\.",
        "kv_b_proj$",
    ),
    "dense layers quantized": (r"layers\.[012]\..*\.mlp\.|\.experts\.", "kv_b_proj$"),
    "layers 1 and 10 quantized, kv_b_proj FP8": (
        r"layers\.(1|10)\.(mlp\.(?!gate$)|self_attn\.(?!kv_b))",
        r"\.experts\.",
    ),
}
"""What is quantized, and what stays BF16 beside that which an FP8 checkpoint stores so; the rest stays FP8."""


def contents(quantized: str, plain: str) -> tuple[Contents, dict[str, str | None]]:
    """The contents, and the right answer for every module: the format of its group, None where it is in none."""
    names = modules()
    codes = [name for name in names if re.search(quantized, name)]
    kept = [name for name in names if name not in codes]
    fp8 = [name for name in kept if not re.search(plain + NEVER, name)]
    right: dict[str, str | None] = dict.fromkeys(names)
    right |= dict.fromkeys(codes, "pack-quantized") | dict.fromkeys(fp8, "float-quantized")
    return Contents(schemes=dict.fromkeys(codes, SCHEME), kept=kept, fp8=fp8, fp8_block=128), right


def tree(names: list[str]) -> nn.Module:
    """A model on the meta device that has these linears under these names."""
    root = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        place = root
        for part in parents:
            if not hasattr(place, part):
                place.add_module(part, nn.Module())
            place = getattr(place, part)
        place.add_module(last, nn.Linear(256, 256, bias=False, device="meta"))
    return root


@pytest.mark.parametrize(("quantized", "plain"), CASES.values(), ids=CASES.keys())
def test_the_library_puts_every_module_into_its_group(quantized: str, plain: str) -> None:
    """compressed-tensors itself resolves the targets, as it does for transformers."""
    told, right = contents(quantized, plain)
    entry = ct.FORMAT.quantization_config(told)
    assert entry is not None and set(right.values()) == {None, "pack-quantized", "float-quantized"}
    config = QuantizationConfig.model_validate(entry)
    model = tree(list(right))
    apply_quantization_config(model, config)
    found = {
        name: getattr(getattr(module, "quantization_scheme", None), "format", None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert found == right
    if any(".experts." in name for name in told.schemes):
        assert get_experts_scheme(config).format == "pack-quantized"


# ------------------------------------------------------------------------------------ the rules of vLLM and SGLang


def named(entry: str, name: str) -> bool:
    """An entry of `ignore` or `targets` over a module's name."""
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def targets(config: Mapping[str, Any]) -> dict[str, str]:
    """Target -> format of its group, in the order in which vLLM and SGLang build the map."""
    return {
        target: group["format"]
        for group in config["config_groups"].values()
        for target in group["targets"]
    }


def by_class(found: Mapping[str, str], kind: str) -> str | None:
    """A class name is a target when the target is part of it."""
    return next((form for target, form in found.items() if target.lower() in kind.lower()), None)


def vllm(config: Mapping[str, Any], name: str, kind: str, members: tuple[str, ...]) -> str | None:
    """Name, then all members of a fused module, then class; `ignore` likewise, where a mix is an error."""
    parts = members or (name,)
    left = {any(named(entry, part) for entry in config["ignore"]) for part in parts}
    assert len(left) == 1, f"different schemes for the shards of {name}"
    if left == {True}:
        return None
    found = targets(config)
    own = next((form for target, form in found.items() if named(target, name)), None)
    shards = [next((form for t, form in found.items() if named(t, part)), None) for part in members]
    return own or (shards[0] if shards and all(shards) else None) or by_class(found, kind)


def sglang(config: Mapping[str, Any], name: str, kind: str, members: tuple[str, ...]) -> str | None:
    """Name, then class; members only after that. Plain names in `ignore` are suffixes. No match is an error."""
    if any(
        named(e, name) or (not e.startswith("re:") and name.endswith(f".{e}"))
        for e in config["ignore"]
    ):
        return None
    found = targets(config)
    own = next((form for target, form in found.items() if named(target, name)), None)
    answer = own or by_class(found, kind)
    assert answer, f"Unable to find matching target for {name}"
    return answer


ENGINES: Mapping[str, tuple[Callable[..., str | None], dict[str, tuple[str, ...]]]] = {
    "vllm": (
        vllm,
        {
            k: v
            for k, v in FUSED_MODULES.items()
            if k in ("qkv_proj", "gate_up_proj", "fused_qkv_a_proj")
        },
    ),
    "sglang": (sglang, {k: v for k, v in FUSED_MODULES.items() if k != "fused_qkv_a_proj"}),
}


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize(("quantized", "plain"), CASES.values(), ids=CASES.keys())
def test_engines_put_every_module_into_its_group(quantized: str, plain: str, engine: str) -> None:
    """Modules as the engines have them: fused, and the experts of a block asked for by the names of the first."""
    told, right = contents(quantized, plain)
    config, (resolve, fused) = ct.FORMAT.quantization_config(told), ENGINES[engine]
    assert config is not None
    for name, expected in right.items():
        parent, _, last = name.rpartition(".")
        if last == "embed_tokens" or last in ("lm_head", "head"):
            continue  # no linears there
        if ".experts." in name:
            if ".experts.0." in name:
                # vLLM's alias for "Linear", and SGLang's
                assert resolve(config, name, "RoutedExpertsLinear", ()) == expected, name
            continue
        assert resolve(config, name, "ColumnParallelLinear", ()) == expected, name
        for whole in (whole for whole, members in fused.items() if last in members):
            members = tuple(f"{parent}.{member}" for member in fused[whole])
            assert (
                resolve(config, f"{parent}.{whole}", "MergedColumnParallelLinear", members)
                == expected
            ), whole


def test_config_entry_of_both_variants() -> None:
    """FORMATS.md 3.6: A, whose FP8 group is every linear, for kv_b_proj in FP8; B, the other way round, without."""
    told, _ = contents(*CASES["flagship, kv_b_proj BF16"])
    entry: Any = ct.FORMAT.quantization_config(told)
    assert entry["format"] == "pack-quantized"
    first, second = entry["config_groups"]["group_0"], entry["config_groups"]["group_1"]
    assert (first["format"], first["targets"]) == ("pack-quantized", ["Linear"])
    assert not any("experts" in target for target in second["targets"])
    assert second == {
        "format": "float-quantized",
        "targets": second["targets"],
        "weights": {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "block",
            "block_structure": [128, 128],
            "dynamic": False,
        },
        "input_activations": {
            "num_bits": 8,
            "type": "float",
            "symmetric": True,
            "strategy": "group",
            "group_size": 128,
            "dynamic": True,
        },
        "output_activations": None,
    }
    assert any("kv_b_proj" in name for name in entry["ignore"])
    told, _ = contents(*CASES["flagship, kv_b_proj FP8"])
    entry = ct.FORMAT.quantization_config(told)
    first, second = entry["config_groups"]["group_0"], entry["config_groups"]["group_1"]
    assert first["targets"] == [r"re:model\.layers\.(3|4|5|6|7|8|9|10|11)\.mlp\.experts(\..*)?$"]
    assert (second["format"], second["targets"]) == ("float-quantized", ["Linear"])
    assert not any("kv_b_proj" in name for name in entry["ignore"])


def test_what_cannot_stay_in_fp8_is_told_with_its_reason() -> None:
    assert ct.FORMAT.accepts_fp8 is not None
    for role in ("attention", "mlp", "shared_expert"):
        assert ct.FORMAT.accepts_fp8(linear(role=role), 128) is None  # type: ignore[arg-type]
    assert "as if there were one per weight" in str(
        ct.FORMAT.accepts_fp8(linear(role="routed_expert"), 128)
    )
    assert "blocks of 128 x 128, found 64 x 64" in str(ct.FORMAT.accepts_fp8(linear(), 64))
