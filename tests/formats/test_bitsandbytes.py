"""NF4 to the bit, and artifacts read by bitsandbytes, transformers and `quantkit.load`."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import numpy as np
import pytest
import torch
from bitsandbytes.nn import Linear4bit
from hypothesis import given
from hypothesis import strategies as st
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from support.dequantized import Stored
from support.format_examples import SELECTIONS, list_model_modules, make_linear
from support.plans import plan_checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import quantkit
from quantkit import pipeline, registry
from quantkit.artifact.load_model import Experts4bit, read_schemes
from quantkit.artifact.read_manifest import read_manifest
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Contents, Linear, Quantized, Scheme
from quantkit.errors import ArtifactError, NumericsError, RecipeError, UsageError
from quantkit.formats import bitsandbytes as nf4
from quantkit.io import package_data
from quantkit.methods.nf4 import METHOD
from quantkit.numerics import nf4 as codebook
from quantkit.plan.decisions import make_scheme
from quantkit.recipe.parse import Quantize, parse_recipe
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

IDS = torch.arange(2, 66)[None]  # [1, 64]


def make_nf4_scheme(double_quant: bool = False) -> Scheme:
    return Scheme(
        bits=4, group_size=64, symmetric=True, scale_dtype="float32", kind="nf4",
        double_quant=double_quant, source_dtype="bfloat16",
    )  # fmt: skip


def make_weights(*shape: int, seed: int = 0) -> Tensor:
    """Return random bfloat16 weights in float32; one row is large, one block is zero."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) * 0.02
    weight[..., 0, :] *= 30
    weight[..., 1:2, :64] = 0
    return weight.bfloat16().float()


def solve_nf4(weight: Tensor, double_quant: bool = False) -> Quantized:
    return METHOD.solve(weight, None, make_nf4_scheme(double_quant))


# --- codes


def test_pack_gives_golden_bytes() -> None:
    """Twice the codebook, and a row that starts with its largest weights (formats/README.md)."""
    weight = torch.zeros(2, 64)
    weight[0, :16] = 2 * torch.tensor(codebook.CODEBOOK)
    weight[1, :3] = torch.tensor([4, -4, 0.1])
    tensors = nf4.FORMAT.pack(solve_nf4(weight.bfloat16().float()), make_nf4_scheme())
    first, second = tensors["weight"].reshape(2, 32).tolist()
    assert bytes(first).hex() == "0123456789abcdef" + "77" * 24
    assert bytes(second).hex() == "f0" + "77" * 31
    assert tensors["weight.absmax"].tolist() == [2.0, 4.0]
    assert len(tensors[nf4.STATE_TENSOR]) == 77
    assert json.loads(bytes(tensors[nf4.STATE_TENSOR].tolist())) == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]
    }  # fmt: skip


def find_nearest_values(weight: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """Return the nearest of 16 values by trying each, in float64, and absmax."""
    blocks = weight.double().numpy().reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    values = np.array(codebook.CODEBOOK)
    back = [
        [min(values * a, key=lambda v: abs(v - w)) for w in block]
        for block, a in zip(blocks, absmax)
    ]
    return np.array(back).reshape(weight.shape), absmax.reshape(*weight.shape[:-1], -1)


def test_codes_are_the_nearest_values() -> None:
    """A float64 reference without midpoints; of two equally near values either is right."""
    weight = make_weights(6, 192)
    quantized, (expected, absmax) = solve_nf4(weight), find_nearest_values(weight)
    assert np.array_equal(quantized.scale.numpy(), absmax) and quantized.zero is None
    back = np.array(codebook.CODEBOOK)[quantized.codes.numpy()] * np.repeat(absmax, 64, axis=-1)
    ours, best = np.abs(back - weight.double().numpy()), np.abs(expected - weight.double().numpy())
    assert (ours <= best + 1e-6 * np.repeat(absmax, 64, axis=-1)).all()


def make_ties() -> Tensor:
    """Return weights on every midpoint and one step on each side; tiny, subnormal, huge blocks."""
    values = torch.tensor(codebook.CODEBOOK)
    middle = (values[1:] + values[:-1]) / 2
    near = [middle, middle.nextafter(torch.tensor(9.0)), middle.nextafter(torch.tensor(-9.0))]
    row = torch.cat([torch.ones(1), *near, torch.zeros(18)])  # [64]
    return torch.stack([row * scale for scale in (1.0, -1.0, 3.0, 0.7, 1e-37, 1e-39, 1e-44, 3e38)])


@pytest.mark.parametrize(
    "weight", [make_weights(48, 576), make_weights(1, 2, 64), make_weights(3, 40, 128), make_ties()]
)
def test_codes_equal_bitsandbytes(weight: Tensor) -> None:
    """Bit for bit, for matrices and batches, in several pieces."""
    quantized = solve_nf4(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codebook.pack_pairs(quantized.codes), packed)
    assert torch.equal(quantized.scale.reshape(-1), state.absmax)
    assert quantized.codes.shape == weight.shape and quantized.scale.shape == (
        *weight.shape[:-1],
        weight.shape[-1] // 64,
    )
    kernel_codes, kernel_absmax = codebook.quantize_with_kernel(weight)  # the path of accelerators
    assert torch.equal(kernel_codes.reshape(weight.shape), quantized.codes) and torch.equal(
        kernel_absmax, state.absmax
    )


def test_piece_size_does_not_change_codes(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = make_weights(40, 256)
    whole = solve_nf4(weight)
    monkeypatch.setattr(codebook, "PIECE_BLOCKS", 7)
    in_pieces = solve_nf4(weight)
    assert torch.equal(whole.codes, in_pieces.codes) and torch.equal(whole.scale, in_pieces.scale)


def test_nf4_rejects_integers_partial_blocks_and_nan() -> None:
    integers = Scheme(bits=4, group_size=64, symmetric=True, scale_dtype="float32")
    with pytest.raises(NumericsError, match="no codes of 4-bit integers; use method rtn"):
        METHOD.solve(make_weights(4, 64), None, integers)
    with pytest.raises(NumericsError, match="blocks of 64 weights, found rows of 96"):
        solve_nf4(make_weights(4, 96))
    for wrong in (float("nan"), float("inf")):
        weight = make_weights(4, 64)
        weight[2, 5] = wrong
        with pytest.raises(NumericsError, match="NaN or infinite"):
            solve_nf4(weight)


# --- stored tensors


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 576), (1, 64), (40, 512)])
def test_bitsandbytes_reads_stored_tensors(shape: tuple[int, int], double_quant: bool) -> None:
    """Its QuantState takes the tensors unchanged, and its dequantized weight equals ours."""
    weight, scheme = make_weights(2, *shape)[0], make_nf4_scheme(double_quant)
    tensors = nf4.FORMAT.pack(solve_nf4(weight, double_quant), scheme)
    dtypes = {torch.uint8: "U8", torch.float32: "F32"}
    linear = make_linear(out=shape[0], width=shape[1])
    stored = {
        f"{linear.name}.{local}": (dtypes[x.dtype], tuple(x.shape)) for local, x in tensors.items()
    }
    assert stored == {
        spec.name: (spec.dtype, spec.shape) for spec in nf4.FORMAT.layout(linear, scheme)
    }
    parts = {
        name.removeprefix("weight."): tensor for name, tensor in tensors.items() if name != "weight"
    }
    state = bnb.QuantState.from_dict(dict(parts), torch.device("cpu"))
    assert (state.shape, state.dtype, state.nested, state.blocksize) == (
        shape,
        torch.bfloat16,
        double_quant,
        64,
    )
    theirs = bnb.dequantize_4bit(tensors["weight"], state)
    ours = nf4.FORMAT.dequantize(tensors, scheme)
    assert ours.dtype == torch.float32 and torch.equal(ours.bfloat16(), theirs)
    packed, own = bnb.quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    saved = own.as_dict(packed=True)
    assert torch.equal(packed, tensors["weight"]) and {f"weight.{name}" for name in saved} == set(
        tensors
    ) - {"weight"}
    if not double_quant:  # every byte, the JSON included; nested codes may differ on ties
        assert all(torch.equal(tensor, parts[name]) for name, tensor in saved.items())
    assert torch.allclose(bnb.dequantize_4bit(packed, own), theirs, rtol=2**-6, atol=2**-12)


def test_double_quantization_adds_under_one_percent_error() -> None:
    """8-bit scales add less than 1 % to the weights' error and follow the nested map."""
    weight = make_weights(256, 512, seed=3)
    losses = {}
    for double_quant in (False, True):
        tensors = nf4.FORMAT.pack(solve_nf4(weight, double_quant), make_nf4_scheme(double_quant))
        losses[double_quant] = float(
            (nf4.FORMAT.dequantize(tensors, make_nf4_scheme(double_quant)) - weight).norm()
        )
    assert losses[False] < losses[True] < 1.01 * losses[False]
    state = json.loads(bytes(tensors[nf4.STATE_TENSOR].tolist()))
    scale = tensors["weight.nested_quant_map"][tensors["weight.absmax"].long()]
    scale = scale * tensors["weight.nested_absmax"].repeat_interleave(256) + state["nested_offset"]
    expected = torch.tensor(codebook.CODEBOOK)[solve_nf4(weight).codes.long()] * scale.reshape(
        256, 8
    ).repeat_interleave(64, 1)
    assert torch.allclose(
        nf4.FORMAT.dequantize(tensors, make_nf4_scheme(True)), expected, rtol=1e-6
    )


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_state_length_is_independent_of_offset(offset: float) -> None:
    text = nf4.format_state((2048, 7168), make_nf4_scheme(True), offset)
    assert len(text) == len(nf4.format_state((2048, 7168), make_nf4_scheme(True), 0.0))
    assert json.loads(text)["nested_offset"] == offset


@pytest.mark.parametrize("count", [1, 255, 256, 257, 70_000])
def test_mean_of_scales_is_accurate(count: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)) * 0.1
    assert float(codebook.compute_mean(values)) == pytest.approx(
        float(values.double().mean()), rel=1e-7
    )


def test_thread_count_does_not_change_bytes() -> None:
    """Enough blocks for torch to split a sum over threads."""
    weight = make_weights(4096, 1024)
    packed, n_threads = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            packed.append(nf4.FORMAT.pack(solve_nf4(weight, True), make_nf4_scheme(True)))
    finally:
        torch.set_num_threads(n_threads)
    assert all(torch.equal(tensor, packed[1][name]) for name, tensor in packed[0].items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (nf4.STATE_TENSOR, torch.zeros(5, dtype=torch.uint8)),
        (nf4.STATE_TENSOR, torch.tensor(list(b'{"shape": [999999, 64]}'), dtype=torch.uint8)),
        ("weight", torch.zeros(5, 1, dtype=torch.uint8)),
        ("weight.absmax", torch.zeros(8, dtype=torch.float16)),
    ],
)
def test_dequantize_rejects_contradicting_tensors(name: str, value: Tensor) -> None:
    """bitsandbytes' kernels would read past their end."""
    tensors = nf4.FORMAT.pack(solve_nf4(make_weights(8, 64)), make_nf4_scheme())
    with pytest.raises(ArtifactError, match="pull or build the artifact again"):
        nf4.FORMAT.dequantize({**tensors, name: value}, make_nf4_scheme())


# --- config, plan, rejections


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_transformers_and_sglang_skip_exactly_the_kept_modules(selection: str) -> None:
    modules = list_model_modules()
    quantized = [name for name in modules if re.search(selection, name)]
    kept = [name for name in modules if name not in quantized]
    entries = nf4.list_skipped(quantized, kept)
    assert [name for name in modules if should_convert_module(name, entries)] == quantized
    named = {
        name
        for name in modules
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    }
    assert named == set(kept)  # SGLang: a name, or its start up to a dot


def test_config_entry_of_double_quant() -> None:
    entry = nf4.FORMAT.quantization_config(
        Contents(schemes={"model.layers.0.a": make_nf4_scheme(True)}, kept=["lm_head"])
    )
    assert entry is not None and entry["llm_int8_skip_modules"] == ["lm_head"]
    assert (entry["bnb_4bit_quant_type"], entry["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert (entry["quant_method"], entry["bnb_4bit_compute_dtype"]) == ("bitsandbytes", "bfloat16")
    with pytest.raises(UsageError, match="has one double_quant and one dtype, found 2 schemes"):
        nf4.FORMAT.quantization_config(
            Contents(schemes={"a": make_nf4_scheme(True), "b": make_nf4_scheme(False)}, kept=[])
        )
    with pytest.raises(
        UsageError, match="gate is kept, but transformers would take its name for a quantized"
    ):
        nf4.list_skipped(["other.gate"], ["gate"])


@pytest.mark.parametrize(
    ("linear", "reason"),
    [
        (
            make_linear(width=96),
            "blocks of 64 weights would cross the rows of 96; keep this linear",
        ),
        (
            make_linear(role="router"),
            "transformers builds this router without bitsandbytes; keep it",
        ),
        (
            make_linear(role="embedding"),
            "transformers builds this embedding without bitsandbytes; keep it",
        ),
        (make_linear(role="head"), "transformers builds this head without bitsandbytes; keep it"),
    ],
)
def test_accepts_names_reason_of_unsupported_linear(linear: Linear, reason: str) -> None:
    assert nf4.FORMAT.accepts(make_nf4_scheme(), linear) == reason
    assert nf4.FORMAT.accepts(make_nf4_scheme(), make_linear(role="routed_expert")) is None
    integers = Scheme(bits=4, group_size=64, symmetric=True, scale_dtype="bfloat16")
    assert "found 4-bit integers; use method nf4" in str(
        nf4.FORMAT.accepts(integers, make_linear())
    )


@pytest.mark.parametrize(
    "name", [name for name in registry.list_names("formats") if name != "bitsandbytes"]
)
def test_other_formats_reject_nf4(name: str) -> None:
    assert "use format bitsandbytes" in str(
        registry.get_format(name).accepts(make_nf4_scheme(), make_linear())
    )


KEYS = {"quantize": "{method: nf4}", "format": "bitsandbytes", "calibration": "null"}


def test_plan_warns_of_engines_without_nf4_experts() -> None:
    experts, dense = plan_checkpoint("deepseek_v3", **KEYS), plan_checkpoint("llama", **KEYS)
    warning = (
        "transformers, vLLM, SGLang: no loader for routed experts in NF4; "
        "quantkit.load(folder) has one"
    )
    assert warning in experts.warnings and not any("NF4" in other for other in dense.warnings)
    assert not experts.needs_calibration
    attention = "[{match: '*.self_attn.*', quantize: default}, {match: '*', keep: source}]"
    assert warning not in plan_checkpoint("deepseek_v3", rules=attention, **KEYS).warnings


@pytest.mark.parametrize(
    ("stored", "dtype"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")]
)
def test_state_and_config_have_source_dtype(stored: str, dtype: str) -> None:
    """In each linear's state, and as the compute dtype; FP8 blocks count as bfloat16."""
    scheme = make_scheme(Quantize(method="nf4"), stored)
    assert (scheme.source_dtype, scheme.scale_dtype, scheme.kind, scheme.double_quant) == (
        dtype,
        "float32",
        "nf4",
        True,
    )
    assert json.loads(nf4.format_state((64, 64), scheme, 0.1))["dtype"] == dtype
    entry = nf4.FORMAT.quantization_config(Contents(schemes={"model.layers.0.a": scheme}, kept=[]))
    assert entry is not None and entry["bnb_4bit_compute_dtype"] == dtype
    assert make_scheme(Quantize(method="nf4"), "F8_E4M3").source_dtype == "bfloat16"


def test_mtp_layer_has_no_fallback_without_calibration() -> None:
    assert not any(
        "mtp-rtn" in warning
        for warning in plan_checkpoint("deepseek_v3", mtp="quantize", **KEYS).warnings
    )


def test_plan_rejects_wrong_format_and_group_size() -> None:
    with pytest.raises(RecipeError, match="found nf4; use format bitsandbytes"):
        plan_checkpoint("llama", quantize="{method: nf4}", calibration="null")
    with pytest.raises(
        RecipeError, match="group_size 64 does not divide 96 input features; keep this linear"
    ):
        plan_checkpoint("llama", config={"intermediate_size": 96}, **KEYS)


def test_build_without_bitsandbytes_fails_before_reading(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs the package bitsandbytes.*pip install 'quantkit\[bitsandbytes\]'"
    ):
        build(tmp_path / "no-source", tmp_path / "out", **KEYS)


# --- artifacts


def build_nf4(
    tmp_path: Path,
    name: str,
    *,
    double_quant: bool = True,
    rules: str = "all-linear",
    fp8: bool = False,
) -> Path:
    source = write_checkpoint(
        tmp_path / "source", make_tiny_config(name, num_nextn_predict_layers=0), fp8=fp8
    )
    quantize = f"{{method: nf4, double_quant: {str(double_quant).lower()}}}"
    result = build(source, tmp_path / "artifact", **{**KEYS, "quantize": quantize}, rules=rules)
    verify_artifact(result.path)
    assert result.fidelity.modules and all(
        0 < module.relative_error < 0.15 for module in result.fidelity.modules
    )
    assert not any(module.fallback for module in result.fidelity.modules)
    assert "bitsandbytes" in result.fidelity.versions
    return result.path


def compute_logits(model: Any) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(IDS).logits
    return logits.float()


def list_packed_linears(model: Any) -> dict[str, Linear4bit]:
    return {
        name: module for name, module in model.named_modules() if isinstance(module, Linear4bit)
    }


@pytest.mark.parametrize(
    ("name", "rules", "double_quant"),
    [
        ("llama", "all-linear", True),
        ("llama", "all-linear", False),
        ("qwen2", "[{match: '*.mlp.*', quantize: default}, {match: '*', keep: source}]", True),
        (
            "deepseek_v3",
            "[{match: '*.self_attn.*', quantize: default}, {match: '*', keep: source}]",
            True,
        ),
    ],
)
def test_transformers_loads_stored_weights(
    name: str, rules: str, double_quant: bool, tmp_path: Path
) -> None:
    """Packed weights equal ours in bfloat16; logits are close in float32, rough as loaded."""
    path = build_nf4(tmp_path, name, double_quant=double_quant, rules=rules)
    loaded, loading_info = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(loading_info.values()), loading_info
    ours = Stored.open(path).model()
    packed = list_packed_linears(loaded)
    assert set(packed) == set(read_schemes(read_manifest(path), Checkpoint.open(path), path)[1])
    for module_name, module in packed.items():
        unpacked = bnb.dequantize_4bit(module.weight, module.weight.quant_state)
        assert torch.equal(unpacked, ours.get_submodule(module_name).weight.bfloat16())
        module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
    # experts stay in the artifact's bfloat16 and would compute in it
    for weight in loaded.parameters():
        weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data
    expected = compute_logits(ours)
    assert torch.allclose(compute_logits(loaded), expected, atol=1e-4, rtol=1e-4)
    rough = compute_logits(AutoModelForCausalLM.from_pretrained(path))
    assert float((rough - expected).norm() / expected.norm()) < (
        0.1 if name == "deepseek_v3" else 0.04
    )


FAMILIES = [
    ("deepseek_v3", True, True),
    ("mixtral", False, False),
    ("qwen2_moe", True, False),
    ("llama", True, False),
]


@pytest.mark.parametrize(("name", "double_quant", "fp8"), FAMILIES)
def test_load_runs_nf4_experts(name: str, double_quant: bool, fp8: bool, tmp_path: Path) -> None:
    """The logits of a mixture that no engine loads equal those of the dequantized model."""
    path = build_nf4(tmp_path, name, double_quant=double_quant, fp8=fp8)
    model = quantkit.load(path, device="cpu", dtype="float32")
    quantized = read_schemes(read_manifest(path), Checkpoint.open(path), path)[1]
    assert len(list_packed_linears(model)) == len(quantized) and not model.training
    assert any(isinstance(module, Experts4bit) for module in model.modules()) == (name != "llama")
    expected = compute_logits(Stored.open(path).model())
    assert torch.allclose(compute_logits(model), expected, atol=1e-5, rtol=1e-5)
    answer = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 7)
    default = quantkit.load(path, device="cpu")
    assert default.dtype == torch.bfloat16
    if name == "llama":  # in a mixture, near-ties of the router decide
        assert float((compute_logits(default) - expected).norm() / expected.norm()) < 0.04


def test_load_unpacks_other_formats(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", make_tiny_config("deepseek_v3"))
    for name, quantize in (
        ("awq", "{method: rtn, group_size: 64}"),
        ("dense", "{method: rtn, bits: 3}"),
    ):
        path = build(
            source, tmp_path / name, quantize=quantize, format=name, calibration="null"
        ).path
        model = quantkit.load(path, dtype="float32", device="cpu")
        assert not list_packed_linears(model) and torch.allclose(
            compute_logits(model), compute_logits(Stored.open(path).model()), atol=1e-5
        )
    kept = build(
        source, tmp_path / "kept", rules="[{match: '*', keep: source}]", calibration="null"
    ).path
    assert compute_logits(quantkit.load(kept)).shape == (1, 64, 768)


def test_load_rejects_bad_arguments_and_manifests(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no quantkit/manifest\.json: not an artifact"):
        quantkit.load(write_checkpoint(tmp_path / "source", make_tiny_config("llama")))
    path = build_nf4(tmp_path, "llama")
    with pytest.raises(
        UsageError, match="dtype: expected bfloat16, float16, float32, found 'int8'"
    ):
        quantkit.load(path, dtype="int8")
    with pytest.raises(UsageError, match="device: expected one of this machine, found 'gpu'"):
        quantkit.load(path, device="gpu")
    manifest = json.loads((path / "quantkit" / "manifest.json").read_text())
    del next(iter(manifest["modules"].values()))["scheme"]["bits"]
    (path / "quantkit" / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ArtifactError, match="its manifest does not say how modules are quantized"):
        quantkit.load(path)


def test_importing_quantkit_does_not_import_torch() -> None:
    process = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, quantkit; quantkit.load; print('torch' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert process.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["tiny-v3-nf4", "tiny-v3-rtn4"])
def test_recipe_without_calibration_keeps_its_gate(name: str, tmp_path: Path) -> None:
    """With less text and no benchmarks: no calibration stream, KL within the gate, loadable."""
    text = (package_data.locate_folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    shorter = {
        "fidelity.windows": "24",
        "compute.device": "cpu",
        "output.path": str(tmp_path / "out"),
    }
    recipe = parse_recipe(text, f"{name}.yaml", shorter)
    (result,) = pipeline.build_artifacts(
        recipe,
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda plans: None,
        on_progress=lambda progress: None,
    )
    assert result.fidelity.calibration is None and recipe.gates["kl_mean"].max is not None
    measured = result.fidelity.distribution[0].kl_mean
    assert measured is not None and measured.value is not None
    assert recipe.gates["kl_mean"].max / 10 < measured.value < recipe.gates["kl_mean"].max
    loaded = quantkit.load(result.path, device="cpu", dtype="float32")
    assert torch.allclose(
        compute_logits(loaded),
        compute_logits(Stored.open(result.path).model()),
        atol=1e-4,
        rtol=1e-4,
    )
    assert len(list_packed_linears(loaded)) == (144 if name == "tiny-v3-nf4" else 0)
