"""The GPTQ format to the bit, and whole artifacts through an independent reader."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint
from support.format_examples import SELECTIONS, list_model_modules, make_linear
from support.gptq_examples import M_WORDS, M, as_numpy

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Contents, Format, Quantized, Scheme
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import gptq, gptq_v2
from quantkit.formats.common.checks import group_by_codes
from quantkit.formats.common.engine_names import FUSED_MODULES
from quantkit.methods import rtn
from quantkit.numerics import affine

pytestmark = pytest.mark.usefixtures("quick_builds")


def make_scheme(
    bits: int = 4, group: int = 128, symmetric: bool = True, kind: str = "int"
) -> Scheme:
    return Scheme(
        bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16", kind=kind
    )  # type: ignore[arg-type]


# --- bits


def test_pack_gives_golden_words() -> None:
    """Two groups of four inputs: qzeros and g_idx depend on groups, qweight does not."""
    tensors = gptq.FORMAT.pack(
        Quantized(codes=M.T, scale=torch.ones(8, 2).bfloat16(), zero=None), make_scheme(group=4)
    )
    assert tensors["qweight"].tolist() == [M_WORDS]
    assert (
        tensors["qzeros"].tolist() == [[2004318071]] * 2
    )  # 0x77777777: the zero point 8 minus one
    assert tensors["g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert tensors["scales"].shape == (2, 8)
    assert [tensors[name].dtype for name in ("qweight", "qzeros", "g_idx")] == [torch.int32] * 3


def test_pack_gives_golden_words_of_8_bits() -> None:
    codes = torch.tensor([[0, 1, 128, 255]] * 4, dtype=torch.uint8)  # [out, in]
    tensors = gptq.FORMAT.pack(
        Quantized(codes=codes, scale=torch.ones(4, 1).bfloat16(), zero=None), make_scheme(8, -1)
    )
    assert [word & 0xFFFFFFFF for word in tensors["qweight"].flatten().tolist()] == [0xFF800100] * 4
    assert tensors["qzeros"].tolist() == [[0x7F7F7F7F]]
    assert tensors["g_idx"].tolist() == [0] * 4


def read_weight(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """Return the weight [out, in], read by the page alone: with g_idx, and qzeros plus 1."""
    shifts, mask = np.arange(0, 32, bits, dtype=np.uint32), np.uint32(2**bits - 1)
    qweight, qzeros = (tensors[name].view(np.uint32) for name in ("qweight", "qzeros"))
    width, out = qweight.shape[0] * 32 // bits, qweight.shape[1]
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & mask).reshape(width, out)
    zeros = ((qzeros[:, :, None] >> shifts) & mask).reshape(-1, out).astype(np.int64) + 1
    group = tensors["g_idx"]
    return ((codes.astype(np.int64) - zeros[group]) * tensors["scales"].astype(np.float64)[group]).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_independent_reader_finds_same_weights(bits: int, group: int) -> None:
    scheme, linear = make_scheme(bits, group), make_linear(out=40, width=256)
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(bits)) * 0.03
    quantized = rtn.METHOD.solve(weight, None, scheme)
    tensors = gptq.FORMAT.pack(quantized, scheme)
    dtypes = {torch.int32: "I32", torch.bfloat16: "BF16"}
    stored = {
        f"{linear.name}.{local}": (dtypes[x.dtype], tuple(x.shape)) for local, x in tensors.items()
    }
    assert stored == {
        spec.name: (spec.dtype, spec.shape) for spec in gptq.FORMAT.layout(linear, scheme)
    }
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    expected = affine.dequantize(quantized, scheme)
    assert torch.equal(gptq.FORMAT.dequantize(tensors, scheme), expected)
    assert np.array_equal(read_weight(as_numpy(tensors), bits), expected.double().numpy())


def test_pack_rejects_large_codes_and_zero_points() -> None:
    scale = torch.ones(8, 1).bfloat16()
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        gptq.FORMAT.pack(Quantized(codes=M.T + 1, scale=scale, zero=None), make_scheme(group=-1))
    with pytest.raises(UsageError, match="expected no zero points.*use symmetric: true"):
        gptq.FORMAT.pack(
            Quantized(codes=M.T, scale=scale, zero=torch.zeros_like(scale).byte()),
            make_scheme(group=-1),
        )


# --- accepted linears


@pytest.mark.parametrize(
    ("scheme", "linear", "reason"),
    [
        (
            make_scheme(bits=3),
            make_linear(),
            "vLLM and SGLang read GPTQ with 4-bit or 8-bit integers, found 3 bits; use format "
            "gptq_v2",
        ),
        (make_scheme(kind="nf4"), make_linear(), "found nf4; use format bitsandbytes"),
        (
            make_scheme(symmetric=False),
            make_linear(),
            "cannot hold the zero point 0, found symmetric: false; use symmetric: true",
        ),
        (make_scheme(group=16), make_linear(), "support group sizes 32, 64, 128 and -1, found 16"),
        (
            make_scheme(),
            make_linear(width=192),
            "no engine loads GPTQ with group_size 128 over 192 input features",
        ),
        (
            make_scheme(),
            make_linear(out=12),
            "12 x 256 features do not fill GPTQ's words of 8 codes",
        ),
        (make_scheme(group=-1), make_linear(width=28), "256 x 28 features do not fill"),
        (
            make_scheme(),
            make_linear(role="router"),
            "build this router without GPTQ and find no weight; keep it",
        ),
        (make_scheme(), make_linear(role="embedding"), "build this embedding without GPTQ"),
        (
            make_scheme(),
            make_linear("model.layers.0.self_attn.kv_b_proj"),
            "SGLang reads kv_b_proj wrongly",
        ),
        (
            make_scheme(),
            make_linear("model.layers.0.self_attn.q_a_proj"),
            "SGLang reads q_a_proj wrongly",
        ),
        (
            Scheme(bits=4, group_size=128, symmetric=True, scale_dtype="float32"),
            make_linear(),
            "hold GPTQ scales in 16 bits, found float32",
        ),
    ],
)
def test_accepts_names_reason_of_unsupported_linear(
    scheme: Scheme, linear: gptq.Linear, reason: str
) -> None:
    assert reason in str(gptq.FORMAT.accepts(scheme, linear))


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_accepts_supported_linears(bits: int, group: int) -> None:
    for role in ("attention", "mlp", "shared_expert", "routed_expert"):
        assert gptq.FORMAT.accepts(make_scheme(bits, group), make_linear(role=role)) is None  # type: ignore[arg-type]


# --- config.json


def is_skipped_by_dynamic(entry: dict[str, object], module: str) -> bool:
    """Match as vLLM, SGLang and GPTQModel do: from the start, the first hit decides."""
    return any(re.match(rule.removeprefix("-:"), module) for rule in entry["dynamic"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_loader_selects_exactly_the_quantized_modules(selection: str) -> None:
    modules = list_model_modules()
    quantized = [name for name in modules if re.search(selection, name)]
    kept = [name for name in modules if name not in quantized]
    entry = gptq.FORMAT.quantization_config(
        Contents(schemes=dict.fromkeys(quantized, make_scheme()), kept=kept)
    )
    assert entry is not None
    (suffixes,) = entry["modules_in_block_to_quantize"]  # type: ignore[misc]
    for name in modules:
        assert is_skipped_by_dynamic(entry, name) == (name in kept), name
        assert name.endswith(tuple(suffixes)) == (name in quantized), f"transformers: {name}"
        assert any(part in name for part in suffixes) == (name in quantized), f"vLLM: {name}"
    for name in (name for name in modules if ".experts." not in name):
        parent, _, last = name.rpartition(".")
        for fused in (fused for fused, members in FUSED_MODULES.items() if last in members):
            assert is_skipped_by_dynamic(entry, f"{parent}.{fused}") == (name in kept), (
                f"{parent}.{fused}"
            )
    for layer in range(3, 24):
        prefix = f"model.layers.{layer}.mlp.experts"  # vLLM's prefix of all experts of a block
        assert is_skipped_by_dynamic(entry, prefix) == (f"{prefix}.0.up_proj" in kept)


def test_config_entry_is_complete() -> None:
    modules = list_model_modules(layers=3, dense_layers=1)
    quantized = [
        name
        for name in modules
        if ".experts.0" in name or ".experts.1" in name or ".experts.2" in name
    ]
    kept = [name for name in modules if name not in quantized]
    assert gptq.FORMAT.quantization_config(
        Contents(schemes=dict.fromkeys(quantized, make_scheme()), kept=kept)
    ) == {
        "quant_method": "gptq",
        "bits": 4,
        "group_size": 128,
        "sym": True,
        "desc_act": False,
        "checkpoint_format": "gptq",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {
            r"-:model\.embed_tokens$": {},
            r"-:model\.layers\.0(\..*)?$": {},
            r"-:model\.layers\.(1|2)\.self_attn(\..*)?$": {},
            r"-:model\.layers\.(1|2)\.mlp\.gate$": {},
            r"-:model\.layers\.(1|2)\.mlp\.shared_experts(\..*)?$": {},
            r"-:lm_head$": {},
        },
        "modules_in_block_to_quantize": [
            [
                f"mlp.experts.{e}.{x}"
                for e in range(3)
                for x in ("gate_proj", "up_proj", "down_proj")
            ]
        ],
    }


def test_dynamic_overrides_other_schemes() -> None:
    """The most frequent scheme is the general one; the first matching rule decides."""
    modules = list_model_modules(layers=3, dense_layers=1)
    schemes = {
        n: make_scheme(8, -1) if "shared" in n else make_scheme()
        for n in modules
        if "_proj" in n and "_attn" not in n
    }
    schemes["model.layers.0.mlp.down_proj"] = make_scheme(group=32)
    kept = [name for name in modules if name not in schemes]
    entry = gptq.FORMAT.quantization_config(Contents(schemes=schemes, kept=kept))
    assert entry is not None and (entry["bits"], entry["group_size"], entry["sym"]) == (
        4,
        128,
        True,
    )
    overrides = {key: value for key, value in entry["dynamic"].items() if not key.startswith("-:")}  # type: ignore[attr-defined]
    assert overrides == {
        r"+:model\.layers\.(1|2)\.mlp\.shared_experts(\..*)?$": {
            "bits": 8,
            "group_size": -1,
            "sym": True,
        },
        r"+:model\.layers\.0\.mlp\.down_proj$": {"bits": 4, "group_size": 32, "sym": True},
    }
    for loader in gptq.CHECKS.loaders[:2]:  # SGLang and GPTQModel, vLLM
        classify = loader.classify(entry)
        assert all(
            classify(name) == group_by_codes({"": scheme})[0][0] for name, scheme in schemes.items()
        )
        assert all(classify(name) == "plain" for name in kept)
    (suffixes,) = entry["modules_in_block_to_quantize"]  # type: ignore[misc]
    assert all(name.endswith(tuple(suffixes)) == (name in schemes) for name in modules)


EXPERTS = [
    make_linear(f"model.layers.{layer}.mlp.experts.0.up_proj", role="routed_expert")
    for layer in range(2)
]


@pytest.mark.parametrize("output", [gptq.FORMAT, gptq_v2.FORMAT])
def test_sglang_does_not_load_mixed_routed_experts(output: Format) -> None:
    """SGLang applies no rule of `dynamic` to routed experts."""
    assert output.limits is not None
    reason = (
        "reads all routed experts as GPTQ of 4 bits, group 128, symmetric; some of these are not"
    )
    for schemes, kept in (
        ({make_linear(): make_scheme()}, EXPERTS),
        ({EXPERTS[0]: make_scheme()}, EXPERTS[1:]),
        ({EXPERTS[0]: make_scheme(), make_linear(): make_scheme(), EXPERTS[1]: make_scheme(8)}, []),
    ):
        assert output.limits("qwen3_moe", schemes, kept)["SGLang"] == reason
    assert "SGLang" not in output.limits(
        "qwen3_moe", dict.fromkeys(EXPERTS, make_scheme()), [make_linear()]
    )


# --- artifacts


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_independent_reader_finds_source_within_half_step(name: str, tmp_path: Path) -> None:
    """Weights rounded to nearest are within half a step of the source; the config names them."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config(name))
    result = build(
        folder,
        tmp_path / "artifact",
        format="gptq",
        quantize="{method: rtn, bits: 4, group_size: 64, symmetric: true}",
        rules="all-linear" if name == "llama" else "experts-only",
    )
    stored, source = load_file(result.path / "model.safetensors"), Checkpoint.open(folder)
    entry = json.loads((result.path / "config.json").read_text())["quantization_config"]
    packed = [full.removesuffix(".qweight") for full in stored if full.endswith(".qweight")]
    assert packed and not any(f"{module}.weight" in stored for module in packed)
    assert not any(is_skipped_by_dynamic(entry, module) for module in packed)
    for module in packed:
        tensors = as_numpy({
            x: stored[f"{module}.{x}"] for x in ("qweight", "qzeros", "scales", "g_idx")
        })
        original = source.read([f"{module}.weight"])[f"{module}.weight"].double().numpy()
        step = tensors["scales"].astype(np.float64)[tensors["g_idx"]].T
        # symmetric codes reach from -8 to 7: the largest positive weight may be off by half a step
        assert (np.abs(read_weight(tensors, 4) - original) <= 0.53 * step).all(), module


def test_kept_mtp_experts_do_not_stop_sglang(tmp_path: Path) -> None:
    """Only speculative decoding runs an MTP block; a kept layer of experts does stop SGLang."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("deepseek_v3"))
    quantize = {
        "format": "gptq",
        "quantize": "{method: rtn, bits: 4, group_size: 64, symmetric: true}",
    }
    warning = (
        "SGLang: reads all routed experts as GPTQ of 4 bits, group 64, symmetric; "
        "some of these are not"
    )
    assert warning not in make_plan(folder, **quantize, rules="experts-only").warnings
    attention = '[{match: "*.mlp.shared_experts.*", quantize: default}, {match: "*", keep: source}]'
    assert warning in make_plan(folder, **quantize, rules=attention).warnings
