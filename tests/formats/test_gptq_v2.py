"""GPTQ version 2 to the bit, through a reader that shares no code with the writer."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint
from support.format_examples import make_linear
from support.gptq_examples import M_WORDS, M, as_numpy

import quantkit
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Contents, Linear, Quantized, Scheme
from quantkit.errors import NumericsError, UsageError
from quantkit.formats import gptq, gptq_v2
from quantkit.methods import rtn
from quantkit.numerics import affine

pytestmark = pytest.mark.usefixtures("quick_builds")


def make_scheme(
    bits: int = 4, group: int = 128, symmetric: bool = False, kind: str = "int"
) -> Scheme:
    return Scheme(
        bits=bits, group_size=group, symmetric=symmetric, scale_dtype="bfloat16", kind=kind
    )  # type: ignore[arg-type]


def test_pack_gives_golden_words() -> None:
    """qweight equals that of version 1; zero points are stored unmodified."""
    zero = torch.tensor([[8], [1], [2], [3], [4], [5], [6], [15]], dtype=torch.uint8)
    scale = torch.ones(8, 1).bfloat16()
    tensors = gptq_v2.FORMAT.pack(
        Quantized(codes=M.T, scale=scale, zero=zero), make_scheme(group=-1)
    )
    assert tensors["qweight"].tolist() == [M_WORDS]
    assert [word & 0xFFFFFFFF for word in tensors["qzeros"].flatten().tolist()] == [0xF6543218]
    symmetric = gptq_v2.FORMAT.pack(
        Quantized(codes=M.T, scale=scale, zero=None), make_scheme(group=-1, symmetric=True)
    )
    assert symmetric["qzeros"].tolist() == [[-2004318072]]  # 0x88888888
    version_1 = gptq.FORMAT.pack(
        Quantized(codes=M.T, scale=scale, zero=None), make_scheme(group=-1, symmetric=True)
    )
    assert {n for n in version_1 if not torch.equal(version_1[n], symmetric[n])} == {"qzeros"}


def test_zero_point_zero_round_trips() -> None:
    """A group of positive weights has the zero point 0, which version 1 cannot store."""
    zero = torch.zeros(8, 1, dtype=torch.uint8)
    tensors = gptq_v2.FORMAT.pack(
        Quantized(codes=M.T, scale=torch.ones(8, 1).bfloat16(), zero=zero), make_scheme(group=-1)
    )
    assert tensors["qzeros"].tolist() == [[0]]
    assert torch.equal(gptq_v2.FORMAT.dequantize(tensors, make_scheme(group=-1)), M.T.float())


def read_codes(words: np.ndarray, bits: int) -> np.ndarray:
    """Unpack [words, n] -> [codes, n] along the first axis: all bits in turn, lowest first, cut."""
    lines = (words.view(np.uint32)[:, None, :] >> np.arange(32, dtype=np.uint32)[None, :, None]) & 1
    # [words, 32, n] -> [codes, bits, n]
    by_code = lines.reshape(-1, bits, words.shape[1]).astype(np.int64)
    return np.asarray((by_code << np.arange(bits)[None, :, None]).sum(1))


def read_weight(tensors: dict[str, np.ndarray], bits: int) -> np.ndarray:
    """Return the weight [out, in] of version 2: nothing is added to the zero points."""
    group, scales = tensors["g_idx"], tensors["scales"].astype(np.float64)
    zeros = read_codes(np.ascontiguousarray(tensors["qzeros"].T), bits).T
    return ((read_codes(tensors["qweight"], bits) - zeros[group]) * scales[group]).T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("group", [32, 128, -1])
def test_independent_reader_finds_same_weights(bits: int, group: int, symmetric: bool) -> None:
    scheme, linear = make_scheme(bits, group, symmetric), make_linear(out=64, width=256)
    weight = torch.randn(64, 256, generator=torch.Generator().manual_seed(bits)) * 0.03 + 0.01
    quantized = rtn.METHOD.solve(weight, None, scheme)
    tensors = gptq_v2.FORMAT.pack(quantized, scheme)
    dtypes = {torch.int32: "I32", torch.bfloat16: "BF16"}
    stored = {
        f"{linear.name}.{local}": (dtypes[x.dtype], tuple(x.shape)) for local, x in tensors.items()
    }
    assert stored == {
        spec.name: (spec.dtype, spec.shape) for spec in gptq_v2.FORMAT.layout(linear, scheme)
    }
    expected = affine.dequantize(quantized, scheme)
    assert torch.equal(gptq_v2.FORMAT.dequantize(tensors, scheme), expected)
    assert np.array_equal(read_weight(as_numpy(tensors), bits), expected.double().numpy())


def test_pack_rejects_large_codes_and_missing_zero_points() -> None:
    scale, zero = torch.ones(8, 1).bfloat16(), torch.ones(8, 1, dtype=torch.uint8)
    with pytest.raises(NumericsError, match="do not fit 4 bits"):
        gptq_v2.FORMAT.pack(Quantized(codes=M.T + 1, scale=scale, zero=zero), make_scheme(group=-1))
    with pytest.raises(
        UsageError, match="says symmetric: false, found a matrix without zero points"
    ):
        gptq_v2.FORMAT.pack(Quantized(codes=M.T, scale=scale, zero=None), make_scheme(group=-1))


@pytest.mark.parametrize(
    ("scheme", "linear", "reason"),
    [
        (
            make_scheme(bits=5),
            make_linear(),
            "with 2, 3, 4 or 8 bits, found 5 bits; use format compressed_tensors",
        ),
        (make_scheme(kind="nf4"), make_linear(), "found nf4"),
        (make_scheme(), make_linear(width=192), "loads no group_size 128 over 192 input features"),
        (
            make_scheme(bits=3),
            make_linear(out=48),
            "48 x 256 features do not fill the words that GPTQModel reads, 32 codes at",
        ),
        (make_scheme(), make_linear(out=12), "12 x 256 features do not fill"),
        (
            make_scheme(),
            make_linear(role="router"),
            "GPTQModel builds this router without GPTQ and finds no weight; keep it",
        ),
    ],
)
def test_accepts_names_reason_of_unsupported_linear(
    scheme: Scheme, linear: Linear, reason: str
) -> None:
    assert reason in str(gptq_v2.FORMAT.accepts(scheme, linear))


@pytest.mark.parametrize(
    ("scheme", "linear", "engines"),
    [
        (
            make_scheme(symmetric=True),
            make_linear(),
            {"vLLM", "SGLang", "transformers", "GPTQModel", "llama.cpp"},
        ),
        (make_scheme(), make_linear(), {"transformers", "GPTQModel", "llama.cpp"}),
        (make_scheme(bits=3, symmetric=True), make_linear(), {"transformers", "GPTQModel"}),
        (
            make_scheme(symmetric=True),
            make_linear(role="routed_expert"),
            {"vLLM", "SGLang", "GPTQModel", "llama.cpp"},
        ),
        (
            make_scheme(8, -1, True),
            make_linear("a.q_a_proj"),
            {"vLLM", "transformers", "GPTQModel", "llama.cpp"},
        ),
    ],
)
def test_limits_name_engines_that_cannot_load(
    scheme: Scheme, linear: Linear, engines: set[str]
) -> None:
    assert gptq_v2.FORMAT.accepts(scheme, linear) is None and gptq_v2.FORMAT.limits is not None
    assert (
        set(gptq_v2.FORMAT.engines) - set(gptq_v2.FORMAT.limits("llama", {linear: scheme}, []))
        == engines
    )


def test_config_entry_names_version() -> None:
    entry = gptq_v2.FORMAT.quantization_config(
        Contents(schemes={"a.0.b": make_scheme(3)}, kept=["lm_head"])
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


def test_artifact_of_3_bits_round_trips(tmp_path: Path) -> None:
    """Stored weights are within half a step of the source; plan and card name the readers."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    quantize = "{method: rtn, bits: 3, group_size: 64, symmetric: false}"
    keys = {"format": "gptq_v2", "quantize": quantize, "rules": "all-linear"}
    assert (
        "vLLM, SGLang: GPTQ with symmetric codes of 4 or 8 bits only"
        in make_plan(folder, **keys).warnings
    )
    result = build(folder, tmp_path / "artifact", **keys)
    assert [serving.engine for serving in result.fidelity.artifact.serving] == [
        "transformers",
        "GPTQModel",
    ]
    stored, source = load_file(result.path / "model.safetensors"), Checkpoint.open(folder)
    entry = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert (entry["bits"], entry["sym"], entry["checkpoint_format"]) == (3, False, "gptq_v2")
    packed = [full.removesuffix(".qweight") for full in stored if full.endswith(".qweight")]
    assert len(packed) == 14
    loaded = quantkit.load(result.path, device="cpu", dtype="float32")
    for module in packed:
        tensors = as_numpy({
            x: stored[f"{module}.{x}"] for x in ("qweight", "qzeros", "scales", "g_idx")
        })
        original = source.read([f"{module}.weight"])[f"{module}.weight"].double().numpy()
        step = tensors["scales"].astype(np.float64)[tensors["g_idx"]].T
        # the zero point is rounded too: the end of a range may be half a step outside
        assert (np.abs(read_weight(tensors, 3) - original) <= 1.03 * step).all(), module
        assert np.array_equal(
            loaded.get_submodule(module).weight.detach().numpy(), read_weight(tensors, 3)
        ), module
