"""GPTQ version 2 to the bit (golden words of FORMATS.md 2.2), read by a reader that shares no code with the writer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint
from support.format_examples import linear
from support.gptq_examples import M_WORDS, M, as_numpy

import quantkit
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Contents, Linear, Quantized, Scheme
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import gptq, gptq_v2
from quantkit.methods import rtn
from quantkit.numerics import affine


def scheme(bits: int = 4, group: int = 128, symmetric: bool = False, kind: str = "int") -> Scheme:
    return Scheme(
        bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16", kind=kind
    )  # type: ignore[arg-type]


def test_golden_words() -> None:
    """The codes are those of version 1, the zero points are stored as they are."""
    zero = torch.tensor([[8], [1], [2], [3], [4], [5], [6], [15]], dtype=torch.uint8)
    scale = torch.ones(8, 1).bfloat16()
    found = gptq_v2.FORMAT.pack(Quantized(codes=M.T, scale=scale, zero=zero), scheme(group=-1))
    assert found["qweight"].tolist() == [M_WORDS]
    assert [word & 0xFFFFFFFF for word in found["qzeros"].flatten().tolist()] == [0xF6543218]
    middle = gptq_v2.FORMAT.pack(
        Quantized(codes=M.T, scale=scale, zero=None), scheme(group=-1, symmetric=True)
    )
    assert middle["qzeros"].tolist() == [[-2004318072]]  # 0x88888888
    one = gptq.FORMAT.pack(
        Quantized(codes=M.T, scale=scale, zero=None), scheme(group=-1, symmetric=True)
    )
    assert {n for n in one if not torch.equal(one[n], middle[n])} == {"qzeros"}


def test_the_zero_point_that_version_1_cannot_store() -> None:
    """A group of positive weights has the zero point 0."""
    zero = torch.zeros(8, 1, dtype=torch.uint8)
    found = gptq_v2.FORMAT.pack(
        Quantized(codes=M.T, scale=torch.ones(8, 1).bfloat16(), zero=zero), scheme(group=-1)
    )
    assert found["qzeros"].tolist() == [[0]]
    assert torch.equal(gptq_v2.FORMAT.dequantize(found, scheme(group=-1)), M.T.float())


def stream(words: np.ndarray, bits: int) -> np.ndarray:
    """Codes along the first axis, [words, n] -> [codes, n]: every bit of every word in turn, lowest first, cut."""
    lines = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    taken = lines.reshape(-1, bits, words.shape[1]).astype(
        np.int64
    )  # [words, 32, n] -> [codes, bits, n]
    return np.asarray((taken << np.arange(bits)[None, :, None]).sum(1))


def unpacked(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """Weight [out, in] of version 2: nothing is added to the zero points."""
    group, scales = tensors["g_idx"], tensors["scales"].astype(np.float64)
    zeros = stream(np.ascontiguousarray(tensors["qzeros"].T), bits).T
    return ((stream(tensors["qweight"], bits) - zeros[group]) * scales[group]).T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_an_independent_reader_finds_the_same_weights(
    bits: int, group: int, symmetric: bool
) -> None:
    chosen, one = scheme(bits, group, symmetric), linear(out=64, width=256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(bits)) * 0.03 + 0.01
    quantized = rtn.METHOD.solve(weight, None, chosen)
    tensors = gptq_v2.FORMAT.pack(quantized, chosen)
    dtypes = {torch.int32: "I32", torch.bfloat16: "BF16"}
    made = {
        f"{one.name}.{local}": (dtypes[x.dtype], tuple(x.shape)) for local, x in tensors.items()
    }
    assert made == {
        spec.name: (spec.dtype, spec.shape) for spec in gptq_v2.FORMAT.layout(one, chosen)
    }
    expected = affine.dequantize(quantized, chosen)
    assert torch.equal(gptq_v2.FORMAT.dequantize(tensors, chosen), expected)
    assert np.array_equal(unpacked(as_numpy(tensors), bits), expected.double().numpy())


def test_what_has_no_place_is_refused_while_packing() -> None:
    scale, zero = torch.ones(8, 1).bfloat16(), torch.ones(8, 1, dtype=torch.uint8)
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        gptq_v2.FORMAT.pack(Quantized(codes=M.T + 1, scale=scale, zero=zero), scheme(group=-1))
    with pytest.raises(
        UsageError, match="says symmetric: false, found a matrix without zero points"
    ):
        gptq_v2.FORMAT.pack(Quantized(codes=M.T, scale=scale, zero=None), scheme(group=-1))


@pytest.mark.parametrize(
    ("chosen", "one", "reason"),
    [
        (
            scheme(bits=5),
            linear(),
            "with 2, 3, 4 or 8 bits, found 5 bits; use format compressed_tensors",
        ),
        (scheme(kind="nf4"), linear(), "found nf4"),
        (scheme(), linear(width=192), "loads no group_size 128 over 192 input features"),
        (
            scheme(bits=3),
            linear(out=48),
            "48 x 256 features do not fill the words that GPTQModel reads, 32 codes at",
        ),
        (scheme(), linear(out=12), "12 x 256 features do not fill"),
        (
            scheme(),
            linear(role="router"),
            "GPTQModel builds this router without GPTQ and finds no weight; keep it",
        ),
    ],
)
def test_what_no_reader_loads_is_refused(chosen: Scheme, one: Linear, reason: str) -> None:
    assert reason in str(gptq_v2.FORMAT.accepts(chosen, one))


@pytest.mark.parametrize(
    ("chosen", "one", "left"),
    [
        (
            scheme(symmetric=True),
            linear(),
            {"vLLM", "SGLang", "transformers", "GPTQModel", "llama.cpp"},
        ),
        (scheme(), linear(), {"transformers", "GPTQModel", "llama.cpp"}),
        (scheme(bits=3, symmetric=True), linear(), {"transformers", "GPTQModel"}),
        (
            scheme(symmetric=True),
            linear(role="routed_expert"),
            {"vLLM", "SGLang", "GPTQModel", "llama.cpp"},
        ),
        (
            scheme(8, -1, True),
            linear("a.q_a_proj"),
            {"vLLM", "transformers", "GPTQModel", "llama.cpp"},
        ),
    ],
)
def test_who_does_not_read_it_is_told(chosen: Scheme, one: Linear, left: set[str]) -> None:
    assert gptq_v2.FORMAT.accepts(chosen, one) is None and gptq_v2.FORMAT.limits is not None
    assert (
        set(gptq_v2.FORMAT.engines) - set(gptq_v2.FORMAT.limits("llama", {one: chosen}, [])) == left
    )


def test_config_entry_says_the_version() -> None:
    entry = gptq_v2.FORMAT.quantization_config(
        Contents(schemes={"a.0.b": scheme(3)}, kept=["lm_head"])
    )
    assert entry == {
        "quant_method": "gptq",
        "bits": 3,
        "group_size": 128,
        "sym": False,
        "desc_act": False,
        "checkpoint_format": "gptq_v2",
        "pack_dtype": "int32",
        "lm_head": False,
        "dynamic": {"-:lm_head$": {}},
        "modules_in_block_to_quantize": [["b"]],
    }


def test_an_artifact_of_three_bits(tmp_path: Path) -> None:
    """Every stored weight is within half a step of its source; the plan and the card say who reads it."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    quantize = "{method: rtn, bits: 3, group_size: 64, symmetric: false}"
    keys = {"format": "gptq_v2", "quantize": quantize, "rules": "all-linear"}
    assert (
        "vLLM, SGLang: no GPTQ but symmetric codes of 4 or 8 bits"
        in make_plan(folder, **keys).warnings
    )
    outcome = build(folder, tmp_path / "artifact", **keys)
    assert [serving.engine for serving in outcome.fidelity.artifact.serving] == [
        "transformers",
        "GPTQModel",
    ]
    stored, source = load_file(outcome.path / "model.safetensors"), Checkpoint.open(folder)
    entry = json.loads((outcome.path / "config.json").read_text())["quantization_config"]
    assert (entry["bits"], entry["sym"], entry["checkpoint_format"]) == (3, False, "gptq_v2")
    packed = [full.removesuffix(".qweight") for full in stored if full.endswith(".qweight")]
    assert len(packed) == 14
    loaded = quantkit.load(outcome.path, device="cpu", dtype="float32")
    for module in packed:
        tensors = as_numpy({
            x: stored[f"{module}.{x}"] for x in ("qweight", "qzeros", "scales", "g_idx")
        })
        original = source.read([f"{module}.weight"])[f"{module}.weight"].double().numpy()
        step = tensors["scales"].astype(np.float64)[tensors["g_idx"]].T
        # the zero point is rounded too: the end of a range may lie half a step outside
        assert (np.abs(unpacked(tensors, 3) - original) <= 1.03 * step).all(), module
        assert np.array_equal(
            loaded.get_submodule(module).weight.detach().numpy(), unpacked(tensors, 3)
        ), module
