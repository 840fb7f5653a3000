"""Builds from encoded sources: the same artifact and figures as from the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme
from compressed_tensors.utils.match import is_match
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint
from support.encoded import EXAMPLES, write_encoded

from quantkit.artifact.load_model import load_model
from quantkit.artifact.make_manifest import format_plan
from quantkit.plan.summary import summarize_plan
from quantkit.verify.deep import verify_deep
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

RECIPE = {
    "quantize": "{method: rtn, bits: 4, group_size: 32}",
    "format": "compressed_tensors",
    "calibration": "{set: tiny-v3, sequences: 4, length: 32}",
    "fidelity": "{set: tiny-v3-heldout, windows: 2, length: 32}",
    "rules": '[{match: "*.o_proj", keep: source}, {match: "*_proj", quantize: {}}]',
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_build_equals_that_of_the_dequantized_source(tmp_path: Path, name: str) -> None:
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("llama"))
    write_encoded(plain, encoded, decoded, EXAMPLES[name])
    dtype = "F16" if name.startswith(("awq", "gptq")) else "BF16"
    baseline = f"{dtype} dequantization of {EXAMPLES[name].label}"
    summary = summarize_plan(make_plan(encoded, **RECIPE))
    assert summary.source.dtype == EXAMPLES[name].label
    assert summary.source.compared_with == baseline
    results = [
        build(folder, tmp_path / f"out-{folder.name}", **RECIPE) for folder in (encoded, decoded)
    ]
    reports = [result.fidelity for result in results]
    assert reports[0].source.baseline == baseline
    assert reports[1].source.baseline == dtype
    assert reports[0].distribution == reports[1].distribution
    assert reports[0].distribution[0].kl_mean.value > 0
    own, twin = (load_file(result.path / "model.safetensors") for result in results)
    kept = {rule.action for rule in summary.rules if rule.action.startswith("keep")}
    plain = {"keep", f"keep, decoded from {EXAMPLES[name].label}"}
    is_copied = not kept <= plain  # FP8 blocks, or the codes of compressed-tensors
    for key, tensor in twin.items():
        if not is_copied or ".o_proj." not in key:
            assert torch.equal(own[key], tensor), key
    entry = json.loads((results[0].path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "compressed-tensors"
    if not is_copied:
        assert (
            entry
            == json.loads((results[1].path / "config.json").read_text())["quantization_config"]
        )


def test_kept_codes_are_copied_bit_for_bit_into_compressed_tensors(tmp_path: Path) -> None:
    """A kept linear of a compressed-tensors source keeps its codes where the format holds them."""
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("llama"))
    write_encoded(plain, encoded, decoded, EXAMPLES["int4-packed"])
    plan = make_plan(encoded, **RECIPE)
    kept = [name for name in plan.decisions if name.endswith("o_proj")]
    assert [plan.decisions[name].keep for name in kept] == ["codes"] * len(kept)
    assert not any("decoded to" in warning for warning in plan.warnings)
    actions = {rule.action for rule in summarize_plan(plan).rules}
    assert "keep int4 g32 symmetric" in actions
    result, twin = (
        build(folder, tmp_path / f"out-{folder.name}", **RECIPE) for folder in (encoded, decoded)
    )
    assert result.fidelity.distribution == twin.fidelity.distribution
    source, stored = (load_file(folder / "model.safetensors") for folder in (encoded, result.path))
    for name in kept:
        parts = {key for key in source if key.startswith(f"{name}.")}
        assert parts == {key for key in stored if key.startswith(f"{name}.")} != set()
        for part in parts:
            assert torch.equal(source[part], stored[part])
    verify_artifact(result.path)
    deep = verify_deep(result.path, None, None, 0, lambda _: None)
    assert {proof.kind for proof in deep.proofs if proof.name in kept} == {"copied"}
    state, expected = (load_model(folder).state_dict() for folder in (result.path, twin.path))
    assert all(torch.equal(state[name], expected[name]) for name in expected)


def test_kept_codes_of_experts_are_copied(tmp_path: Path) -> None:
    """Kimi-K2's experts are INT4; a recipe that quantizes attention alone keeps them."""
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("qwen3_moe"))
    write_encoded(plain, encoded, decoded, EXAMPLES["int4-packed"])
    rules = '[{match: "*.experts.*", keep: source}, {match: "*_proj", quantize: {}}]'
    symmetric = "{method: rtn, bits: 4, group_size: 32, symmetric: true}"
    keys = {**RECIPE, "rules": rules, "quantize": symmetric}
    result, twin = (
        build(folder, tmp_path / f"out-{folder.name}", **keys) for folder in (encoded, decoded)
    )
    assert result.fidelity.distribution == twin.fidelity.distribution
    source, stored = (load_file(folder / "model.safetensors") for folder in (encoded, result.path))
    experts = [name for name in source if ".experts." in name]
    assert len(experts) > 100
    assert all(torch.equal(source[name], stored[name]) for name in experts)


def test_inputs_of_kept_codes_are_not_rescaled(tmp_path: Path) -> None:
    """AWQ scales neither the rows of a kept up_proj nor the norm before it."""
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("llama"))
    write_encoded(plain, encoded, decoded, EXAMPLES["int4-packed"])
    keys = {
        "quantize": "{method: awq, rounding: nearest, bits: 4, group_size: 32, symmetric: true}",
        "rules": '[{match: "*.gate_proj", keep: source}, {match: "*.up_proj", keep: source}, '
        '{match: "*_proj", quantize: {}}]',
    }
    result = build(encoded, tmp_path / "out", **{**RECIPE, **keys})
    source, stored = (load_file(folder / "model.safetensors") for folder in (encoded, result.path))
    same = [key for key in source if ".up_proj." in key or ".gate_proj." in key]
    assert same
    assert all(torch.equal(source[key], stored[key]) for key in same)


def test_kept_codes_that_the_format_cannot_hold_are_decoded_and_said(tmp_path: Path) -> None:
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("llama"))
    write_encoded(plain, encoded, decoded, EXAMPLES["nf4"])
    plan = make_plan(encoded, **RECIPE)
    (warning,) = (text for text in plan.warnings if "decoded to" in text)
    assert warning.startswith(
        "2 kept weights in NF4 g64 (model.layers.0.self_attn.o_proj, ...) are decoded to BF16, "
    )
    assert "because format compressed_tensors does not hold their codes" in warning
    decisions = json.loads(format_plan(plan))["decisions"]
    assert decisions["model.layers.0.self_attn.o_proj"][0] == "keep, decoded from NF4 g64"


def test_codes_of_compressed_tensors_are_decoded_for_awq_and_said(tmp_path: Path) -> None:
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("llama"))
    write_encoded(plain, encoded, decoded, EXAMPLES["nvfp4-compressed"])
    plan = make_plan(encoded, **{**RECIPE, "format": "awq"})
    assert {d.keep for n, d in plan.decisions.items() if n.endswith("o_proj")} == {"source"}
    assert any("because format awq does not hold their codes" in x for x in plan.warnings)
    assert "keep, decoded from NVFP4 g16" in {x.action for x in summarize_plan(plan).rules}


COPIED = {
    "fp8-channel-compressed": ("float-quantized", "keep FP8 per row"),
    "fp8-channel-fbgemm": ("float-quantized", "keep FP8 per row"),
    "int8-channel": ("int-quantized", "keep INT8 per row"),
    "mxfp4-compressed": ("mxfp4-pack-quantized", "keep MXFP4 g32"),
    "nvfp4-compressed": ("nvfp4-pack-quantized", "keep NVFP4 g16"),
}


@pytest.mark.parametrize("name", COPIED)
def test_other_codes_are_copied_and_compressed_tensors_reads_them(
    tmp_path: Path, name: str
) -> None:
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("llama"))
    write_encoded(plain, encoded, decoded, EXAMPLES[name])
    plan, (layout, action) = make_plan(encoded, **RECIPE), COPIED[name]
    assert action in {rule.action for rule in summarize_plan(plan).rules}
    assert not any("decoded to" in warning for warning in plan.warnings)
    result = build(encoded, tmp_path / "out", **RECIPE)
    source, stored = (load_file(folder / "model.safetensors") for folder in (encoded, result.path))
    expected = load_file(decoded / "model.safetensors")
    config = json.loads((result.path / "config.json").read_text())["quantization_config"]
    read = QuantizationConfig.model_validate(config)
    for module in (n for n in plan.decisions if n.endswith("o_proj")):
        parts = {key for key in stored if key.startswith(f"{module}.")}
        assert parts and all(torch.equal(source[key], stored[key]) for key in parts)
        local = {key.removeprefix(f"{module}."): stored[key] for key in parts}
        (scheme,) = find_schemes(read, module)
        assert scheme.format == layout
        compressor = BaseCompressor.get_value_from_registry(layout)
        weight = compressor.decompress(local, scheme)["weight"].bfloat16()
        assert torch.equal(weight, expected[f"{module}.weight"])
    quantized = next(n for n, d in plan.decisions.items() if d.action == "quantize")
    assert [scheme.format for scheme in find_schemes(read, quantized)] == ["pack-quantized"]
    verify_artifact(result.path)
    deep = verify_deep(result.path, None, None, 0, lambda _: None)
    kinds = {proof.kind for proof in deep.proofs if proof.name.endswith("o_proj")}
    assert kinds == {"copied"}
    state = load_model(result.path).state_dict()
    assert all(torch.equal(state[x], expected[x]) for x in expected if ".o_proj." in x)


def find_schemes(config: QuantizationConfig, module: str) -> list[QuantizationScheme]:
    """Return the groups that select a linear, as compressed-tensors matches names; a group that
    names it goes before one of all linears.
    """
    linear = torch.nn.Linear(1, 1, device="meta")
    groups = [
        group
        for group in config.config_groups.values()
        if is_match(module, linear, group.targets, config.ignore)
    ]
    named = [group for group in groups if group.targets != ["Linear"]]
    return named or groups
