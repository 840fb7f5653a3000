"""INT4 next to the source's FP8 blocks: the group that each reader assigns to every module.

The rules are in quantkit/formats/README.md, compressed-tensors.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

import pytest
from compressed_tensors.quantization import QuantizationConfig, apply_quantization_config
from support.format_examples import list_block_modules, make_linear
from torch import nn
from transformers.integrations.compressed_tensors import get_experts_scheme

from quantkit.contracts import Contents, Scheme
from quantkit.formats import compressed_tensors as ct
from quantkit.formats.common.engine_names import FUSED_MODULES

SCHEME = Scheme(bits=4, group_size=128, symmetric=True, scale_dtype="bfloat16")
MTP = 12
"""The index of the MTP block of the model below: vLLM runs it, transformers does not."""


def list_modules() -> list[str]:
    """Return the linears of a DeepSeek-V3 of 12 layers, three of them dense, and its MTP block."""
    inner = [name for layer in range(MTP + 1) for name in list_block_modules(layer, moe=layer >= 3)]
    mtp = [f"model.layers.{MTP}.{name}" for name in ("embed_tokens", "eh_proj", "shared_head.head")]
    return ["model.embed_tokens", *inner, *mtp, "lm_head"]


NEVER = r"|embed_tokens$|lm_head$|eh_proj$|shared_head|\.gate$"
"""The modules that an FP8 checkpoint stores in BF16."""

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
"""Patterns of the quantized modules, and of those in BF16 besides NEVER; the rest is FP8."""


def make_contents(quantized: str, plain: str) -> tuple[Contents, dict[str, str | None]]:
    """Return the contents, and for every module the format of its group, None without one."""
    names = list_modules()
    codes = [name for name in names if re.search(quantized, name)]
    kept = [name for name in names if name not in codes]
    fp8 = [name for name in kept if not re.search(plain + NEVER, name)]
    expected: dict[str, str | None] = dict.fromkeys(names)
    expected |= dict.fromkeys(codes, "pack-quantized") | dict.fromkeys(fp8, "float-quantized")
    return Contents(
        schemes=dict.fromkeys(codes, SCHEME), kept=kept, fp8=fp8, fp8_block=128
    ), expected


def make_meta_tree(names: list[str]) -> nn.Module:
    """Return a model on the meta device with linears of these names."""
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
def test_compressed_tensors_finds_group_of_every_module(quantized: str, plain: str) -> None:
    """The library itself resolves the targets, as it does for transformers."""
    contents, expected = make_contents(quantized, plain)
    entry = ct.FORMAT.quantization_config(contents)
    assert entry is not None and set(expected.values()) == {
        None,
        "pack-quantized",
        "float-quantized",
    }
    config = QuantizationConfig.model_validate(entry)
    model = make_meta_tree(list(expected))
    apply_quantization_config(model, config)
    resolved = {
        name: getattr(getattr(module, "quantization_scheme", None), "format", None)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    }
    assert resolved == expected
    if any(".experts." in name for name in contents.schemes):
        assert get_experts_scheme(config).format == "pack-quantized"


# --- rules of vLLM and SGLang


def matches_name(entry: str, name: str) -> bool:
    """Return whether an entry of `ignore` or `targets` matches a module's name."""
    return bool(re.match(entry[3:], name)) if entry.startswith("re:") else entry == name


def map_targets(config: Mapping[str, Any]) -> dict[str, str]:
    """Return target -> format of its group, in the order of vLLM's and SGLang's map."""
    return {
        target: group["format"]
        for group in config["config_groups"].values()
        for target in group["targets"]
    }


def find_by_class(formats: Mapping[str, str], kind: str) -> str | None:
    """Return the format of the first target that is a substring of the class name."""
    return next(
        (format_ for target, format_ in formats.items() if target.lower() in kind.lower()), None
    )


def vllm(config: Mapping[str, Any], name: str, kind: str, members: tuple[str, ...]) -> str | None:
    """Name, then all members of a fused module, then class; mixed members in `ignore` fail."""
    parts = members or (name,)
    is_ignored = {any(matches_name(entry, part) for entry in config["ignore"]) for part in parts}
    assert len(is_ignored) == 1, f"different schemes for the shards of {name}"
    if is_ignored == {True}:
        return None
    formats = map_targets(config)
    by_name = next(
        (format_ for target, format_ in formats.items() if matches_name(target, name)), None
    )
    shards = [
        next((format_ for t, format_ in formats.items() if matches_name(t, part)), None)
        for part in members
    ]
    return (
        by_name or (shards[0] if shards and all(shards) else None) or find_by_class(formats, kind)
    )


def sglang(config: Mapping[str, Any], name: str, kind: str, members: tuple[str, ...]) -> str | None:
    """Name, then class, then members; plain names in `ignore` are suffixes; no match fails."""
    if any(
        matches_name(e, name) or (not e.startswith("re:") and name.endswith(f".{e}"))
        for e in config["ignore"]
    ):
        return None
    formats = map_targets(config)
    by_name = next(
        (format_ for target, format_ in formats.items() if matches_name(target, name)), None
    )
    format_ = by_name or find_by_class(formats, kind)
    assert format_, f"Unable to find matching target for {name}"
    return format_


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
def test_engines_find_group_of_every_module(quantized: str, plain: str, engine: str) -> None:
    """The engines' own modules: fused linears, and a block's experts by the names of the first."""
    contents, expected_formats = make_contents(quantized, plain)
    config, (resolve, fused) = ct.FORMAT.quantization_config(contents), ENGINES[engine]
    assert config is not None
    for name, expected in expected_formats.items():
        parent, _, last = name.rpartition(".")
        if last == "embed_tokens" or last in ("lm_head", "head"):
            continue  # no linears there
        if ".experts." in name:
            if ".experts.0." in name:
                # vLLM's alias for "Linear", and SGLang's
                assert resolve(config, name, "RoutedExpertsLinear", ()) == expected, name
            continue
        assert resolve(config, name, "ColumnParallelLinear", ()) == expected, name
        for fused_name in (fused_name for fused_name, members in fused.items() if last in members):
            members = tuple(f"{parent}.{member}" for member in fused[fused_name])
            assert (
                resolve(config, f"{parent}.{fused_name}", "MergedColumnParallelLinear", members)
                == expected
            ), fused_name


def test_config_entry_of_variants_a_and_b() -> None:
    """With kv_b_proj in FP8 the FP8 group targets "Linear" (A), else the INT4 group does (B)."""
    contents, _ = make_contents(*CASES["flagship, kv_b_proj BF16"])
    entry: Any = ct.FORMAT.quantization_config(contents)
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
    contents, _ = make_contents(*CASES["flagship, kv_b_proj FP8"])
    entry = ct.FORMAT.quantization_config(contents)
    first, second = entry["config_groups"]["group_0"], entry["config_groups"]["group_1"]
    assert first["targets"] == [r"re:model\.layers\.(3|4|5|6|7|8|9|10|11)\.mlp\.experts(\..*)?$"]
    assert (second["format"], second["targets"]) == ("float-quantized", ["Linear"])
    assert not any("kv_b_proj" in name for name in entry["ignore"])


def test_accepts_fp8_names_reason() -> None:
    assert ct.FORMAT.accepts_fp8 is not None
    for role in ("attention", "mlp", "shared_expert"):
        assert ct.FORMAT.accepts_fp8(make_linear(role=role), 128) is None  # type: ignore[arg-type]
    assert "as if there were one per weight" in str(
        ct.FORMAT.accepts_fp8(make_linear(role="routed_expert"), 128)
    )
    assert "blocks of 128 x 128, found 64 x 64" in str(ct.FORMAT.accepts_fp8(make_linear(), 64))
