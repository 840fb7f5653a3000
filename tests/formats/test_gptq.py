"""The GPTQ format to the bit (golden words of FORMATS.md 2.1 and 2.2), and an independent reader of whole artifacts."""

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
from support.format_examples import SELECTIONS, linear, model_modules
from support.gptq_examples import M_WORDS, M, as_numpy

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Contents, Format, Quantized, Scheme
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import gptq, gptq_v2
from quantkit.formats.common.checks import group_by_codes
from quantkit.formats.common.engine_names import FUSED_MODULES
from quantkit.methods import rtn
from quantkit.numerics import affine


def scheme(bits: int = 4, group: int = 128, symmetric: bool = True, kind: str = "int") -> Scheme:
    return Scheme(
        bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16", kind=kind
    )  # type: ignore[arg-type]


# --------------------------------------------------------------------------------------------------- the bits


def test_golden_words() -> None:
    """Two groups of four inputs: the codes do not know of groups, zeros and g_idx do."""
    found = gptq.FORMAT.pack(
        Quantized(codes=M.T, scale=torch.ones(8, 2).bfloat16(), zero=None), scheme(group=4)
    )
    assert found["qweight"].tolist() == [M_WORDS]
    assert found["qzeros"].tolist() == [
        [2004318071],
        [2004318071],
    ]  # 0x77777777: the zero point 8, less one
    assert found["g_idx"].tolist() == [0, 0, 0, 0, 1, 1, 1, 1]
    assert found["scales"].shape == (2, 8)
    assert [found[name].dtype for name in ("qweight", "qzeros", "g_idx")] == [torch.int32] * 3


def test_golden_words_of_eight_bits() -> None:
    codes = torch.tensor([[0, 1, 128, 255]] * 4, dtype=torch.uint8)  # [out, in]
    found = gptq.FORMAT.pack(
        Quantized(codes=codes, scale=torch.ones(4, 1).bfloat16(), zero=None), scheme(8, -1)
    )
    assert [word & 0xFFFFFFFF for word in found["qweight"].flatten().tolist()] == [0xFF800100] * 4
    assert found["qzeros"].tolist() == [[0x7F7F7F7F]]
    assert found["g_idx"].tolist() == [0] * 4


def unpacked(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """A reader written from FORMATS.md 2.1 and 2.2 alone: it reads zeros and g_idx and adds the 1; -> [out, in]."""
    shifts, mask = np.arange(0, 32, bits, dtype=np.uint32), np.uint32(2**bits - 1)
    qweight, qzeros = (tensors[name].view(np.uint32) for name in ("qweight", "qzeros"))
    width, out = qweight.shape[0] * 32 // bits, qweight.shape[1]
    codes = ((qweight[:, None, :] >> shifts[None, :, None]) & mask).reshape(width, out)
    zeros = ((qzeros[:, :, None] >> shifts) & mask).reshape(-1, out).astype(np.int64) + 1
    group = tensors["g_idx"]
    return ((codes.astype(np.int64) - zeros[group]) * tensors["scales"].astype(np.float64)[group]).T


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group", [32, 64, 128, -1])
def test_an_independent_reader_finds_the_same_weights(bits: int, group: int) -> None:
    chosen, one = scheme(bits, group), linear(out=40, width=256)
    weight = torch.randn(40, 256, generator=torch.Generator().manual_seed(bits)) * 0.03
    quantized = rtn.METHOD.solve(weight, None, chosen)
    tensors = gptq.FORMAT.pack(quantized, chosen)
    dtypes = {torch.int32: "I32", torch.bfloat16: "BF16"}
    made = {
        f"{one.name}.{local}": (dtypes[x.dtype], tuple(x.shape)) for local, x in tensors.items()
    }
    assert made == {spec.name: (spec.dtype, spec.shape) for spec in gptq.FORMAT.layout(one, chosen)}
    assert all(tensor.is_contiguous() for tensor in tensors.values())
    expected = affine.dequantize(quantized, chosen)
    assert torch.equal(gptq.FORMAT.dequantize(tensors, chosen), expected)
    assert np.array_equal(unpacked(as_numpy(tensors), bits), expected.double().numpy())


def test_what_has_no_place_is_refused_while_packing() -> None:
    scale = torch.ones(8, 1).bfloat16()
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        gptq.FORMAT.pack(Quantized(codes=M.T + 1, scale=scale, zero=None), scheme(group=-1))
    with pytest.raises(UsageError, match="stores no zero points.*use symmetric: true"):
        gptq.FORMAT.pack(
            Quantized(codes=M.T, scale=scale, zero=torch.zeros_like(scale).byte()), scheme(group=-1)
        )


# ------------------------------------------------------------------------------------------- what is accepted


@pytest.mark.parametrize(
    ("chosen", "one", "reason"),
    [
        (
            scheme(bits=3),
            linear(),
            "vLLM and SGLang read GPTQ with 4-bit or 8-bit integers, found 3 bits; use format gptq_v2",
        ),
        (scheme(kind="nf4"), linear(), "found nf4; use format bitsandbytes"),
        (
            scheme(symmetric=False),
            linear(),
            "cannot hold the zero point 0, found symmetric: false; use symmetric: true",
        ),
        (scheme(group=16), linear(), "know group sizes 32, 64, 128 and -1, found 16"),
        (
            scheme(),
            linear(width=192),
            "no engine loads GPTQ with group_size 128 over 192 input features",
        ),
        (scheme(), linear(out=12), "12 x 256 features do not fill GPTQ's words of 8 codes"),
        (scheme(group=-1), linear(width=28), "256 x 28 features do not fill"),
        (
            scheme(),
            linear(role="router"),
            "build this router without GPTQ and find no weight; keep it",
        ),
        (scheme(), linear(role="embedding"), "build this embedding without GPTQ"),
        (scheme(), linear("model.layers.0.self_attn.kv_b_proj"), "SGLang reads kv_b_proj wrongly"),
        (scheme(), linear("model.layers.0.self_attn.q_a_proj"), "SGLang reads q_a_proj wrongly"),
        (
            Scheme(bits=4, group_size=128, symmetric=True, scale_dtype="float32"),
            linear(),
            "hold GPTQ scales in 16 bits, found float32",
        ),
    ],
)
def test_what_engines_cannot_load_is_refused(chosen: Scheme, one: gptq.Linear, reason: str) -> None:
    assert reason in str(gptq.FORMAT.accepts(chosen, one))


@pytest.mark.parametrize("group", [32, 64, 128, -1])
@pytest.mark.parametrize("bits", [4, 8])
def test_what_engines_load_is_accepted(bits: int, group: int) -> None:
    for role in ("attention", "mlp", "shared_expert", "routed_expert"):
        assert gptq.FORMAT.accepts(scheme(bits, group), linear(role=role)) is None  # type: ignore[arg-type]


# ------------------------------------------------------------------------------------------------- config.json


def skipped_by_dynamic(entry: dict[str, object], module: str) -> bool:
    """FORMATS.md 2.4, as vLLM, SGLang and GPTQModel match: from the start, first hit wins."""
    return any(re.match(rule.removeprefix("-:"), module) for rule in entry["dynamic"])  # type: ignore[attr-defined]


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_every_loader_quantizes_exactly_what_is_quantized(selection: str) -> None:
    modules = model_modules()
    quantized = [name for name in modules if re.search(selection, name)]
    kept = [name for name in modules if name not in quantized]
    entry = gptq.FORMAT.quantization_config(
        Contents(schemes=dict.fromkeys(quantized, scheme()), kept=kept)
    )
    assert entry is not None
    (inner,) = entry["modules_in_block_to_quantize"]  # type: ignore[misc]
    for name in modules:
        assert skipped_by_dynamic(entry, name) == (name in kept), name
        assert name.endswith(tuple(inner)) == (name in quantized), f"transformers: {name}"
        assert any(part in name for part in inner) == (name in quantized), f"vLLM: {name}"
    for name in (name for name in modules if ".experts." not in name):
        parent, _, last = name.rpartition(".")
        for fused in (fused for fused, members in FUSED_MODULES.items() if last in members):
            assert skipped_by_dynamic(entry, f"{parent}.{fused}") == (name in kept), (
                f"{parent}.{fused}"
            )
    for layer in range(3, 24):
        whole = f"model.layers.{layer}.mlp.experts"  # what vLLM asks for all experts of a block
        assert skipped_by_dynamic(entry, whole) == (f"{whole}.0.up_proj" in kept)


def test_config_entry() -> None:
    modules = model_modules(layers=3, dense_layers=1)
    quantized = [
        name
        for name in modules
        if ".experts.0" in name or ".experts.1" in name or ".experts.2" in name
    ]
    kept = [name for name in modules if name not in quantized]
    assert gptq.FORMAT.quantization_config(
        Contents(schemes=dict.fromkeys(quantized, scheme()), kept=kept)
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


def test_dynamic_tells_other_schemes() -> None:
    """FORMATS.md 2.4: the first rule that matches; the commonest scheme stands on top."""
    modules = model_modules(layers=3, dense_layers=1)
    schemes = {
        n: scheme(8, -1) if "shared" in n else scheme()
        for n in modules
        if "_proj" in n and "_attn" not in n
    }
    schemes["model.layers.0.mlp.down_proj"] = scheme(group=32)
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
        told = loader.told(entry)
        assert all(
            told(name) == group_by_codes({"": chosen})[0][0] for name, chosen in schemes.items()
        )
        assert all(told(name) == "plain" for name in kept)
    (inner,) = entry["modules_in_block_to_quantize"]  # type: ignore[misc]
    assert all(name.endswith(tuple(inner)) == (name in schemes) for name in modules)


EXPERTS = [
    linear(f"model.layers.{layer}.mlp.experts.0.up_proj", role="routed_expert")
    for layer in range(2)
]


@pytest.mark.parametrize("output", [gptq.FORMAT, gptq_v2.FORMAT])
def test_sglang_reads_every_routed_expert_as_the_config_says_on_top(output: Format) -> None:
    """FORMATS.md 2.4: its experts ask no rule of `dynamic`."""
    assert output.limits is not None
    why = "reads all routed experts as GPTQ of 4 bits, group 128, symmetric; here some are not"
    for schemes, kept in (
        ({linear(): scheme()}, EXPERTS),
        ({EXPERTS[0]: scheme()}, EXPERTS[1:]),
        ({EXPERTS[0]: scheme(), linear(): scheme(), EXPERTS[1]: scheme(8)}, []),
    ):
        assert output.limits("qwen3_moe", schemes, kept)["SGLang"] == why
    assert "SGLang" not in output.limits("qwen3_moe", dict.fromkeys(EXPERTS, scheme()), [linear()])


# --------------------------------------------------------------------------------------------- whole artifacts


@pytest.mark.parametrize("name", ["llama", "deepseek_v3"])
def test_an_artifact_is_what_an_independent_reader_expects(name: str, tmp_path: Path) -> None:
    """Rounded to nearest, every stored weight is within half a step of its source; the config names what is packed."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config(name))
    outcome = build(
        folder,
        tmp_path / "artifact",
        format="gptq",
        quantize="{method: rtn, bits: 4, group_size: 64, symmetric: true}",
        rules="all-linear" if name == "llama" else "experts-only",
    )
    stored, source = load_file(outcome.path / "model.safetensors"), Checkpoint.open(folder)
    entry = json.loads((outcome.path / "config.json").read_text())["quantization_config"]
    packed = [full.removesuffix(".qweight") for full in stored if full.endswith(".qweight")]
    assert packed and not any(f"{module}.weight" in stored for module in packed)
    assert not any(skipped_by_dynamic(entry, module) for module in packed)
    for module in packed:
        tensors = as_numpy({
            x: stored[f"{module}.{x}"] for x in ("qweight", "qzeros", "scales", "g_idx")
        })
        original = source.read([f"{module}.weight"])[f"{module}.weight"].double().numpy()
        step = tensors["scales"].astype(np.float64)[tensors["g_idx"]].T
        # symmetric steps reach from -8 to 7: the largest positive weight may be half a step and rounding away
        assert (np.abs(unpacked(tensors, 4) - original) <= 0.53 * step).all(), module


def test_what_mtp_keeps_is_no_matter_to_sglang(tmp_path: Path) -> None:
    """Only speculative decoding runs an MTP block; a whole layer of kept experts is another matter."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("deepseek_v3"))
    quantize = {
        "format": "gptq",
        "quantize": "{method: rtn, bits: 4, group_size: 64, symmetric: true}",
    }
    told = (
        "SGLang: reads all routed experts as GPTQ of 4 bits, group 64, symmetric; here some are not"
    )
    assert told not in make_plan(folder, **quantize, rules="experts-only").warnings
    attention = '[{match: "*.mlp.shared_experts.*", quantize: default}, {match: "*", keep: source}]'
    assert told in make_plan(folder, **quantize, rules=attention).warnings
