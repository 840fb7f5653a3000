"""NF4 to the bit (FORMATS.md, section 4), and artifacts as bitsandbytes, transformers and `quantkit.load` read them."""

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
from support.checkpoints import tiny_config, write_checkpoint
from support.dequantized import Stored
from support.format_examples import SELECTIONS, linear, model_modules
from support.plans import plan_of
from torch import Tensor
from transformers import AutoModelForCausalLM
from transformers.quantizers.quantizers_utils import should_convert_module

import quantkit
from quantkit import pipeline, registry
from quantkit.artifact.layout import read_manifest
from quantkit.artifact.load_model import Experts4bit, stored_as
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Contents, Linear, Quantized, Scheme
from quantkit.errors import ArtifactError, NumericsError, RecipeError, UsageError
from quantkit.formats import bitsandbytes as nf4
from quantkit.io import package_data
from quantkit.methods.nf4 import METHOD
from quantkit.numerics import nf4 as codebook
from quantkit.plan.decisions import scheme_of
from quantkit.recipe.parse import Quantize, parse
from quantkit.verify.shallow import verify

IDS = torch.arange(2, 66)[None]  # [1, 64]


def scheme(double_quant: bool = False) -> Scheme:
    return Scheme(
        bits=4, group_size=64, symmetric=True, scale_dtype="float32", kind="nf4", double_quant=double_quant,
        source_dtype="bfloat16",
    )  # fmt: skip


def weights(*shape: int, seed: int = 0) -> Tensor:
    """Random bfloat16 weights in float32, some rows loud, some blocks zero."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(shape, generator=generator) * 0.02
    found[..., 0, :] *= 30
    found[..., 1:2, :64] = 0
    return found.bfloat16().float()


def solved(weight: Tensor, double_quant: bool = False) -> Quantized:
    return METHOD.solve(weight, None, scheme(double_quant))


# --------------------------------------------------------------------------------------------------- the codes


def test_golden_words() -> None:
    """FORMATS.md's example: the codebook twice as large, and a row with its largest weights in front."""
    weight = torch.zeros(2, 64)
    weight[0, :16] = 2 * torch.tensor(codebook.VALUES)
    weight[1, :3] = torch.tensor([4, -4, 0.1])
    tensors = nf4.FORMAT.pack(solved(weight.bfloat16().float()), scheme())
    first, second = tensors["weight"].reshape(2, 32).tolist()
    assert bytes(first).hex() == "0123456789abcdef" + "77" * 24
    assert bytes(second).hex() == "f0" + "77" * 31
    assert tensors["weight.absmax"].tolist() == [2.0, 4.0]
    assert len(tensors[nf4.STATE]) == 77
    assert json.loads(bytes(tensors[nf4.STATE].tolist())) == {
        "quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [2, 64]
    }  # fmt: skip


def oracle(weight: Tensor) -> tuple[np.ndarray[Any, Any], np.ndarray[Any, Any]]:
    """The nearest of 16 values by trying each, in float64: the weight that is meant, and absmax."""
    blocks = weight.double().numpy().reshape(-1, 64)
    absmax = np.abs(blocks).max(1)
    values = np.array(codebook.VALUES)
    back = [
        [min(values * a, key=lambda v: abs(v - w)) for w in block]
        for block, a in zip(blocks, absmax)
    ]
    return np.array(back).reshape(weight.shape), absmax.reshape(*weight.shape[:-1], -1)


def test_codes_are_the_nearest_values() -> None:
    """A float64 reference that knows no midpoints; where two values are equally near either will do."""
    weight = weights(6, 192)
    found, (expected, absmax) = solved(weight), oracle(weight)
    assert np.array_equal(found.scale.numpy(), absmax) and found.zero is None
    back = np.array(codebook.VALUES)[found.codes.numpy()] * np.repeat(absmax, 64, axis=-1)
    ours, best = np.abs(back - weight.double().numpy()), np.abs(expected - weight.double().numpy())
    assert (ours <= best + 1e-6 * np.repeat(absmax, 64, axis=-1)).all()


def ties() -> Tensor:
    """Weights on every midpoint between two values and one step beside it; tiny, subnormal and huge blocks."""
    values = torch.tensor(codebook.VALUES)
    middle = (values[1:] + values[:-1]) / 2
    near = [middle, middle.nextafter(torch.tensor(9.0)), middle.nextafter(torch.tensor(-9.0))]
    row = torch.cat([torch.ones(1), *near, torch.zeros(18)])  # [64]
    return torch.stack([row * scale for scale in (1.0, -1.0, 3.0, 0.7, 1e-37, 1e-39, 1e-44, 3e38)])


@pytest.mark.parametrize(
    "weight", [weights(48, 576), weights(1, 2, 64), weights(3, 40, 128), ties()]
)
def test_codes_are_those_of_bitsandbytes(weight: Tensor) -> None:
    """Bit for bit, of matrices and of batches, in more pieces than one."""
    found = solved(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, quant_type="nf4")
    assert torch.equal(codebook.pair(found.codes), packed)
    assert torch.equal(found.scale.reshape(-1), state.absmax)
    assert found.codes.shape == weight.shape and found.scale.shape == (
        *weight.shape[:-1],
        weight.shape[-1] // 64,
    )
    kernel_codes, kernel_absmax = codebook.by_kernel(weight)  # what an accelerator would run
    assert torch.equal(kernel_codes.reshape(weight.shape), found.codes) and torch.equal(
        kernel_absmax, state.absmax
    )


def test_pieces_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = weights(40, 256)
    found = solved(weight)
    monkeypatch.setattr(codebook, "PIECE_BLOCKS", 7)
    again = solved(weight)
    assert torch.equal(found.codes, again.codes) and torch.equal(found.scale, again.scale)


def test_what_nf4_cannot_do() -> None:
    integers = Scheme(bits=4, group_size=64, symmetric=True, scale_dtype="float32")
    with pytest.raises(NumericsError, match="no codes of 4-bit integers; use method rtn"):
        METHOD.solve(weights(4, 64), None, integers)
    with pytest.raises(NumericsError, match="blocks of 64 weights, found rows of 96"):
        solved(weights(4, 96))
    for wrong in (float("nan"), float("inf")):
        weight = weights(4, 64)
        weight[2, 5] = wrong
        with pytest.raises(NumericsError, match="NaN or infinite"):
            solved(weight)


# ----------------------------------------------------------------------------------------------- what is stored


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(48, 576), (1, 64), (40, 512)])
def test_bitsandbytes_reads_what_is_stored(shape: tuple[int, int], double_quant: bool) -> None:
    """Its QuantState takes the tensors as they are, and its dequantized weight is ours."""
    weight, chosen = weights(2, *shape)[0], scheme(double_quant)
    tensors = nf4.FORMAT.pack(solved(weight, double_quant), chosen)
    dtypes = {torch.uint8: "U8", torch.float32: "F32"}
    one = linear(out=shape[0], width=shape[1])
    made = {
        f"{one.name}.{local}": (dtypes[x.dtype], tuple(x.shape)) for local, x in tensors.items()
    }
    assert made == {spec.name: (spec.dtype, spec.shape) for spec in nf4.FORMAT.layout(one, chosen)}
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
    ours = nf4.FORMAT.dequantize(tensors, chosen)
    assert ours.dtype == torch.float32 and torch.equal(ours.bfloat16(), theirs)
    packed, own = bnb.quantize_4bit(
        weight.bfloat16(), blocksize=64, quant_type="nf4", compress_statistics=double_quant
    )
    saved = own.as_dict(packed=True)
    assert torch.equal(packed, tensors["weight"]) and {f"weight.{name}" for name in saved} == set(
        tensors
    ) - {"weight"}
    if not double_quant:  # every byte, the JSON included; nested codes may differ in a tie
        assert all(torch.equal(tensor, parts[name]) for name, tensor in saved.items())
    assert torch.allclose(bnb.dequantize_4bit(packed, own), theirs, rtol=2**-6, atol=2**-12)


def test_double_quantization_loses_little() -> None:
    """Scales of 8 bits: the error of the weights grows by less than 1 %, and every scale is where its map says."""
    weight = weights(256, 512, seed=3)
    losses = {}
    for double_quant in (False, True):
        tensors = nf4.FORMAT.pack(solved(weight, double_quant), scheme(double_quant))
        losses[double_quant] = float(
            (nf4.FORMAT.dequantize(tensors, scheme(double_quant)) - weight).norm()
        )
    assert losses[False] < losses[True] < 1.01 * losses[False]
    state = json.loads(bytes(tensors[nf4.STATE].tolist()))
    scale = tensors["weight.nested_quant_map"][tensors["weight.absmax"].long()]
    scale = scale * tensors["weight.nested_absmax"].repeat_interleave(256) + state["nested_offset"]
    expected = torch.tensor(codebook.VALUES)[solved(weight).codes.long()] * scale.reshape(
        256, 8
    ).repeat_interleave(64, 1)
    assert torch.allclose(nf4.FORMAT.dequantize(tensors, scheme(True)), expected, rtol=1e-6)


@given(st.floats(width=32, allow_nan=False, allow_infinity=False))
def test_the_state_has_its_planned_length_whatever_the_offset(offset: float) -> None:
    text = nf4.state_text((2048, 7168), scheme(True), offset)
    assert len(text) == len(nf4.state_text((2048, 7168), scheme(True), 0.0))
    assert json.loads(text)["nested_offset"] == offset


@pytest.mark.parametrize("count", [1, 255, 256, 257, 70_000])
def test_the_mean_of_scales(count: int) -> None:
    values = torch.rand(count, generator=torch.Generator().manual_seed(count)) * 0.1
    assert float(codebook.mean(values)) == pytest.approx(float(values.double().mean()), rel=1e-7)


def test_threads_change_no_byte() -> None:
    """Enough blocks for torch to share a sum among threads."""
    weight = weights(4096, 1024)
    found, before = [], torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            found.append(nf4.FORMAT.pack(solved(weight, True), scheme(True)))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        (nf4.STATE, torch.zeros(5, dtype=torch.uint8)),
        (nf4.STATE, torch.tensor(list(b'{"shape": [999999, 64]}'), dtype=torch.uint8)),
        ("weight", torch.zeros(5, 1, dtype=torch.uint8)),
        ("weight.absmax", torch.zeros(8, dtype=torch.float16)),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(name: str, value: Tensor) -> None:
    """bitsandbytes' kernels would read beyond them."""
    tensors = nf4.FORMAT.pack(solved(weights(8, 64)), scheme())
    with pytest.raises(ArtifactError, match="pull or build the artifact again"):
        nf4.FORMAT.dequantize({**tensors, name: value}, scheme())


# ------------------------------------------------------------------------------------- config, plan, refusals


@pytest.mark.parametrize("selection", SELECTIONS.values(), ids=SELECTIONS.keys())
def test_transformers_and_sglang_skip_exactly_the_kept_modules(selection: str) -> None:
    modules = model_modules()
    quantized = [name for name in modules if re.search(selection, name)]
    kept = [name for name in modules if name not in quantized]
    entries = nf4.skipped(quantized, kept)
    assert [name for name in modules if should_convert_module(name, entries)] == quantized
    named = {
        name
        for name in modules
        for entry in entries
        if name == entry or name.startswith(f"{entry}.")
    }
    assert named == set(kept)  # SGLang: a name, or its beginning up to a dot


def test_config_entry() -> None:
    entry = nf4.FORMAT.quantization_config(
        Contents(schemes={"model.layers.0.a": scheme(True)}, kept=["lm_head"])
    )
    assert entry is not None and entry["llm_int8_skip_modules"] == ["lm_head"]
    assert (entry["bnb_4bit_quant_type"], entry["bnb_4bit_use_double_quant"]) == ("nf4", True)
    assert (entry["quant_method"], entry["bnb_4bit_compute_dtype"]) == ("bitsandbytes", "bfloat16")
    with pytest.raises(
        UsageError, match="room for one double_quant and one dtype, found 2 schemes"
    ):
        nf4.FORMAT.quantization_config(
            Contents(schemes={"a": scheme(True), "b": scheme(False)}, kept=[])
        )
    with pytest.raises(
        UsageError, match="gate is kept, but transformers would take its name for a quantized"
    ):
        nf4.skipped(["other.gate"], ["gate"])


@pytest.mark.parametrize(
    ("one", "reason"),
    [
        (linear(width=96), "blocks of 64 weights would cross the rows of 96; keep this linear"),
        (linear(role="router"), "transformers builds this router without bitsandbytes; keep it"),
        (
            linear(role="embedding"),
            "transformers builds this embedding without bitsandbytes; keep it",
        ),
        (linear(role="head"), "transformers builds this head without bitsandbytes; keep it"),
    ],
)
def test_what_cannot_be_loaded_is_refused(one: Linear, reason: str) -> None:
    assert nf4.FORMAT.accepts(scheme(), one) == reason
    assert nf4.FORMAT.accepts(scheme(), linear(role="routed_expert")) is None
    integers = Scheme(bits=4, group_size=64, symmetric=True, scale_dtype="bfloat16")
    assert "found 4-bit integers; use method nf4" in str(nf4.FORMAT.accepts(integers, linear()))


@pytest.mark.parametrize(
    "name", [name for name in registry.names("formats") if name != "bitsandbytes"]
)
def test_no_other_format_holds_nf4(name: str) -> None:
    assert "use format bitsandbytes" in str(registry.format(name).accepts(scheme(), linear()))


KEYS = {"quantize": "{method: nf4}", "format": "bitsandbytes", "calibration": "null"}


def test_the_plan_says_which_engines_do_not_load_experts() -> None:
    experts, dense = plan_of("deepseek_v3", **KEYS), plan_of("llama", **KEYS)
    told = "transformers, vLLM, SGLang: no loader for routed experts in NF4; quantkit.load(folder) has one"
    assert told in experts.warnings and not any("NF4" in warning for warning in dense.warnings)
    assert not experts.needs_calibration
    attention = "[{match: '*.self_attn.*', quantize: default}, {match: '*', keep: source}]"
    assert told not in plan_of("deepseek_v3", rules=attention, **KEYS).warnings


@pytest.mark.parametrize(
    ("stored", "told"), [("BF16", "bfloat16"), ("F16", "float16"), ("F32", "float32")]
)
def test_the_dtype_of_the_source_is_noted(stored: str, told: str) -> None:
    """In the state of each linear, and as what engines compute in; FP8 blocks are read as bfloat16."""
    found = scheme_of(Quantize(method="nf4"), stored)
    assert (found.source_dtype, found.scale_dtype, found.kind, found.double_quant) == (
        told,
        "float32",
        "nf4",
        True,
    )
    assert json.loads(nf4.state_text((64, 64), found, 0.1))["dtype"] == told
    entry = nf4.FORMAT.quantization_config(Contents(schemes={"model.layers.0.a": found}, kept=[]))
    assert entry is not None and entry["bnb_4bit_compute_dtype"] == told
    assert scheme_of(Quantize(method="nf4"), "F8_E4M3").source_dtype == "bfloat16"


def test_an_mtp_layer_is_nothing_special_to_a_method_without_data() -> None:
    assert not any(
        "mtp-rtn" in warning for warning in plan_of("deepseek_v3", mtp="quantize", **KEYS).warnings
    )


def test_faults_of_a_recipe_for_nf4() -> None:
    with pytest.raises(RecipeError, match="found nf4; use format bitsandbytes"):
        plan_of("llama", quantize="{method: nf4}", calibration="null")
    with pytest.raises(
        RecipeError, match="group_size 64 does not divide 96 input features; keep this linear"
    ):
        plan_of("llama", config={"intermediate_size": 96}, **KEYS)


def test_without_bitsandbytes_nothing_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "find_spec", lambda name: None)
    with pytest.raises(
        UsageError, match=r"needs the package bitsandbytes.*pip install 'quantkit\[bitsandbytes\]'"
    ):
        build(tmp_path / "no-source", tmp_path / "out", **KEYS)


# -------------------------------------------------------------------------------------------------- artifacts


def built(
    tmp_path: Path,
    name: str,
    *,
    double_quant: bool = True,
    rules: str = "all-linear",
    fp8: bool = False,
) -> Path:
    source = write_checkpoint(
        tmp_path / "source", tiny_config(name, num_nextn_predict_layers=0), fp8=fp8
    )
    quantize = f"{{method: nf4, double_quant: {str(double_quant).lower()}}}"
    outcome = build(source, tmp_path / "artifact", **{**KEYS, "quantize": quantize}, rules=rules)
    verify(outcome.path)
    assert outcome.fidelity.modules and all(
        0 < module.relative_error < 0.15 for module in outcome.fidelity.modules
    )
    assert not any(module.fallback for module in outcome.fidelity.modules)
    assert "bitsandbytes" in outcome.fidelity.versions
    return outcome.path


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model(IDS).logits
    return found.float()


def packed_linears(model: Any) -> dict[str, Linear4bit]:
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
def test_transformers_loads_what_was_stored(
    name: str, rules: str, double_quant: bool, tmp_path: Path
) -> None:
    """Every packed weight bit for bit in bfloat16, and the logits: in float32 closely, as loaded roughly."""
    path = built(tmp_path, name, double_quant=double_quant, rules=rules)
    theirs, told = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.float32, output_loading_info=True
    )
    assert not any(told.values()), told
    ours = Stored.open(path).model()
    found = packed_linears(theirs)
    assert set(found) == set(stored_as(read_manifest(path), Checkpoint.open(path), path)[1])
    for module_name, module in found.items():
        unpacked = bnb.dequantize_4bit(module.weight, module.weight.quant_state)
        assert torch.equal(unpacked, ours.get_submodule(module_name).weight.bfloat16())
        module.compute_dtype, module.support_avx512bf16_for_cpu = torch.float32, False
    for weight in (
        theirs.parameters()
    ):  # experts are left in the artifact's bfloat16, and would compute in it
        weight.data = weight.data.float() if weight.dtype == torch.bfloat16 else weight.data
    expected = logits(ours)
    assert torch.allclose(logits(theirs), expected, atol=1e-4, rtol=1e-4)
    rough = logits(AutoModelForCausalLM.from_pretrained(path))
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
def test_load_runs_experts_in_nf4(name: str, double_quant: bool, fp8: bool, tmp_path: Path) -> None:
    """The logits of a mixture that no engine loads are those of the dequantized model."""
    path = built(tmp_path, name, double_quant=double_quant, fp8=fp8)
    model = quantkit.load(path, device="cpu", dtype="float32")
    quantized = stored_as(read_manifest(path), Checkpoint.open(path), path)[1]
    assert len(packed_linears(model)) == len(quantized) and not model.training
    assert any(isinstance(module, Experts4bit) for module in model.modules()) == (name != "llama")
    expected = logits(Stored.open(path).model())
    assert torch.allclose(logits(model), expected, atol=1e-5, rtol=1e-5)
    answer = model.generate(IDS[:, :4], max_new_tokens=3, do_sample=False)
    assert answer.shape == (1, 7)
    default = quantkit.load(path, device="cpu")
    assert default.dtype == torch.bfloat16
    if name == "llama":  # in a mixture one near-tie of a router decides
        assert float((logits(default) - expected).norm() / expected.norm()) < 0.04


def test_load_unpacks_other_formats(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", tiny_config("deepseek_v3"))
    for name, quantize in (
        ("awq", "{method: rtn, group_size: 64}"),
        ("dense", "{method: rtn, bits: 3}"),
    ):
        path = build(
            source, tmp_path / name, quantize=quantize, format=name, calibration="null"
        ).path
        model = quantkit.load(path, dtype="float32", device="cpu")
        assert not packed_linears(model) and torch.allclose(
            logits(model), logits(Stored.open(path).model()), atol=1e-5
        )
    kept = build(
        source, tmp_path / "kept", rules="[{match: '*', keep: source}]", calibration="null"
    ).path
    assert logits(quantkit.load(kept)).shape == (1, 64, 768)


def test_what_load_refuses(tmp_path: Path) -> None:
    with pytest.raises(ArtifactError, match=r"no quantkit/manifest\.json: not an artifact"):
        quantkit.load(write_checkpoint(tmp_path / "source", tiny_config("llama")))
    path = built(tmp_path, "llama")
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


def test_importing_quantkit_does_not_start_torch() -> None:
    told = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, quantkit; quantkit.load; print('torch' in sys.modules)",
        ],
        capture_output=True,
        text=True,
        check=True,
    )
    assert told.stdout.strip() == "False"


@pytest.mark.parametrize("name", ["tiny-v3-nf4", "tiny-v3-rtn4"])
def test_recipes_without_calibration(name: str, tmp_path: Path) -> None:
    """As shipped, but with less text and no benchmarks: no calibration stream, the bound on the KL, and what loads."""
    text = (package_data.folder("recipes") / f"{name}.yaml").read_text(encoding="utf-8")
    shorter = {
        "fidelity.windows": "24",
        "compute.device": "cpu",
        "output.path": str(tmp_path / "out"),
    }
    recipe = parse(text, f"{name}.yaml", shorter)
    (outcome,) = pipeline.build_artifacts(
        recipe,
        text,
        overwrite=False,
        evaluate=False,
        on_plan=lambda plans: None,
        on_progress=lambda progress: None,
    )
    assert outcome.fidelity.calibration is None and recipe.gates["kl_mean"].max is not None
    measured = outcome.fidelity.distribution[0].kl_mean
    assert measured is not None and measured.value is not None
    assert recipe.gates["kl_mean"].max / 10 < measured.value < recipe.gates["kl_mean"].max
    loaded = quantkit.load(outcome.path, device="cpu", dtype="float32")
    assert torch.allclose(
        logits(loaded), logits(Stored.open(outcome.path).model()), atol=1e-4, rtol=1e-4
    )
    assert len(packed_linears(loaded)) == (144 if name == "tiny-v3-nf4" else 0)
