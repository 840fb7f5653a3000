"""Builds in NVFP4 and MXFP4: read by compressed-tensors and transformers, verified, reported."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.base import BaseCompressor
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_plan, make_recipe_text, make_tiny_config, write_checkpoint
from support.damage import overwrite_element
from support.fp4 import VALUES, scale_step
from transformers import AutoModelForCausalLM

from quantkit import pipeline
from quantkit.artifact.load_model import load_model
from quantkit.errors import ArtifactError
from quantkit.plan.summary import summarize_plan
from quantkit.recipe.parse import parse_recipe
from quantkit.verify.deep import verify_deep
from quantkit.verify.shallow import verify_artifact

KEYS = {
    "format": "compressed_tensors",
    "rules": "all-linear",
    "calibration": "{set: tiny-v3, sequences: 8, length: 64}",
    "fidelity": "{set: tiny-v3-heldout, windows: 1, length: 64}",
}
LAYOUTS = {
    "nvfp4": ("nvfp4-pack-quantized", 4.5, "NVFP4 g16", "tensor_group"),
    "mxfp4": ("mxfp4-pack-quantized", 4.25, "MXFP4 g32", "group"),
}

pytestmark = pytest.mark.usefixtures("quick_builds")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("fp4") / "source", make_tiny_config("llama"))


def read_slowly(parts: dict[str, torch.Tensor]) -> np.ndarray:
    """Return the weight [out, in] float64 of a linear's tensors, byte by byte."""
    packed = parts["weight_packed"].numpy()
    kind = "nvfp4" if "weight_global_scale" in parts else "mxfp4"
    steps = np.vectorize(scale_step(kind))(parts["weight_scale"].view(torch.uint8).numpy())
    if kind == "nvfp4":
        steps = steps / float(parts["weight_global_scale"])
    codes = np.stack([packed & 15, packed >> 4], axis=-1).reshape(len(packed), -1)
    values = np.array([*VALUES, *(-v for v in VALUES)])[codes]
    return values * np.repeat(steps, 16 if kind == "nvfp4" else 32, axis=1)


def compute_logits(folder: Path, ids: torch.Tensor) -> torch.Tensor:
    """Return the float32 logits of transformers' model.

    compressed-tensors decodes FP4 to bfloat16 at the first forward, whatever the model's dtype;
    transformers' own `float` refuses models that were quantized.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).eval()
    with torch.no_grad():
        model(ids[:, :2], use_cache=False)
        logits: torch.Tensor = torch.nn.Module.float(model)(ids, use_cache=False).logits
    return logits


@pytest.mark.parametrize("method", ["rtn", "gptq"])
@pytest.mark.parametrize("scheme", LAYOUTS)
def test_artifact_is_read_by_others_as_reported(
    source: Path, tmp_path: Path, scheme: str, method: str
) -> None:
    layout, bits, label, strategy = LAYOUTS[scheme]
    keys = {**KEYS, "quantize": f"{{scheme: {scheme}, method: {method}}}"}
    result = build(source, tmp_path / "out", **keys)
    stored, config = (
        load_file(result.path / "model.safetensors"),
        json.loads((result.path / "config.json").read_text()),
    )
    entry = config["quantization_config"]
    (group,) = QuantizationConfig.model_validate(entry).config_groups.values()
    assert group.format == layout and group.weights.strategy == strategy
    assert group.input_activations is None
    compressor = BaseCompressor.get_value_from_registry(layout)
    modules = {x.rpartition(".")[0] for x in stored if x.endswith(".weight_packed")}
    assert len(modules) == 14
    own = load_model(result.path).state_dict()
    for module in modules:
        parts = {k.removeprefix(f"{module}."): v for k, v in stored.items() if module in k}
        weight = compressor.decompress(parts, group)["weight"]
        expected = read_slowly(parts)
        assert weight.dtype == torch.bfloat16
        assert np.array_equal(weight.double().numpy(), expected)  # nothing is rounded
        assert np.array_equal(own[f"{module}.weight"].double().numpy(), expected)
    artifact = result.fidelity.artifact
    assert artifact.bits_per_weight == pytest.approx(bits, abs=0.01)
    assert artifact.scheme.startswith(f"{method}, {label}")
    verify_artifact(result.path)
    deep = verify_deep(result.path, None, None, 0, lambda _: None)
    assert not deep.counts(["unproven"])


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_transformers_has_the_kl_that_the_report_says(
    source: Path, tmp_path: Path, scheme: str
) -> None:
    keys = {**KEYS, "quantize": f"{{scheme: {scheme}}}"}
    result = build(source, tmp_path / "out", **keys)
    recipe = parse_recipe(make_recipe_text(source, tmp_path / "out", **keys), "test.yaml")
    assert recipe.quantize.method == "gptq"
    ids = pipeline.tokenize(recipe, source).tokens["fidelity"].sequence(0).long()[None]
    p, q = (
        compute_logits(folder, ids)[0, :-1].double().log_softmax(-1)
        for folder in (source, result.path)
    )
    reported = result.fidelity.distribution[0].kl_mean.value
    assert reported == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_linears_that_engines_merge_have_one_global_scale(source: Path, tmp_path: Path) -> None:
    """vLLM takes one for q, k and v: the largest, which changes the others' weights."""
    result = build(source, tmp_path / "out", **{**KEYS, "quantize": "{scheme: nvfp4, method: rtn}"})
    stored = load_file(result.path / "model.safetensors")
    for names in (("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
                  ("mlp.gate_proj", "mlp.up_proj")):  # fmt: skip
        scales = {
            float(stored[f"model.layers.{layer}.{name}.weight_global_scale"])
            for name in names
            for layer in (0,)
        }
        assert len(scales) == 1
    faults = "q_proj.*quantize by rtn, nearest.*quantize by gptq, gptq"
    rules = (
        "[{match: '*.q_proj', quantize: {method: rtn, rounding: nearest}}, "
        "{match: '*_proj', quantize: {}}]"
    )
    with pytest.raises(Exception, match=faults):
        make_plan(source, **{**KEYS, "rules": rules, "quantize": "{scheme: nvfp4}"})


def test_a_scale_that_is_no_number_is_found(source: Path, tmp_path: Path) -> None:
    result = build(source, tmp_path / "out", **{**KEYS, "quantize": "{scheme: nvfp4, method: rtn}"})
    name = "model.layers.0.mlp.up_proj.weight_scale"
    overwrite_element(result.path, name, 3, b"\x7f")
    with pytest.raises(ArtifactError, match=r"up_proj\.weight_scale"):
        verify_artifact(result.path)


def test_plan_names_engines_that_do_not_load_it(source: Path) -> None:
    plan = make_plan(source, **{**KEYS, "quantize": "{scheme: mxfp4}"})
    (warning,) = (text for text in plan.warnings if "MXFP4" in text)
    assert warning.startswith("SGLang: has no known reader of MXFP4 weights")
    actions = {rule.action for rule in summarize_plan(plan).rules}
    assert "gptq MXFP4 g32" in actions


@pytest.mark.parametrize("output", ["awq", "gptq", "gptq_v2", "bitsandbytes", "dense"])
def test_other_formats_name_the_format_that_stores_fp4(source: Path, output: str) -> None:
    with pytest.raises(Exception, match="found nvfp4; use (format compressed_tensors|method nf4)"):
        make_plan(source, **{**KEYS, "format": output, "quantize": "{scheme: nvfp4, method: rtn}"})


def test_fp4_next_to_integers(source: Path, tmp_path: Path) -> None:
    rules = (
        "[{match: '*.mlp.*', quantize: {}}, "
        "{match: '*_proj', quantize: {scheme: nvfp4, method: rtn}}]"
    )
    integers = "{method: rtn, bits: 4, group_size: 32, symmetric: true}"
    result = build(source, tmp_path / "out", **{**KEYS, "rules": rules, "quantize": integers})
    stored = load_file(result.path / "model.safetensors")
    assert stored["model.layers.0.mlp.up_proj.weight_packed"].dtype == torch.int32
    assert stored["model.layers.0.self_attn.q_proj.weight_packed"].dtype == torch.uint8
    verify_artifact(result.path)
    ids = torch.arange(40)[None]
    with torch.no_grad():
        own = load_model(result.path, device="cpu", dtype="float32")(ids, use_cache=False).logits
    assert torch.allclose(own, compute_logits(result.path, ids), atol=0.02)


@pytest.mark.parametrize("scheme", LAYOUTS)
def test_routed_experts(tmp_path: Path, scheme: str) -> None:
    """vLLM takes one global scale for gate and up of an expert; transformers reads no FP4."""
    source = write_checkpoint(tmp_path / "source", make_tiny_config("qwen3_moe"))
    keys = {**KEYS, "rules": "experts-only", "quantize": f"{{scheme: {scheme}, method: rtn}}"}
    (warning,) = (text for text in make_plan(source, **keys).warnings if "integer codes" in text)
    assert warning.startswith("transformers: reads routed experts of compressed-tensors")
    result = build(source, tmp_path / "out", **keys)
    stored = load_file(result.path / "model.safetensors")
    own = load_model(result.path).state_dict()
    experts = {name.partition(".gate_proj.")[0] for name in stored if ".gate_proj." in name}
    stacks = {name.rpartition(".")[0] for name in experts}
    for stack in stacks:
        merged = own[f"{stack}.gate_up_proj"]
        for expert in range(len(merged)):
            gate, up = (
                {k.removeprefix(prefix): v for k, v in stored.items() if k.startswith(prefix)}
                for prefix in (f"{stack}.{expert}.{name}_proj." for name in ("gate", "up"))
            )
            expected = np.concatenate([read_slowly(gate), read_slowly(up)])
            assert np.array_equal(merged[expert].double().numpy(), expected)
            if scheme == "nvfp4":
                assert torch.equal(gate["weight_global_scale"], up["weight_global_scale"])
    assert stacks
    verify_artifact(result.path)
    assert not verify_deep(result.path, None, None, 0, lambda _: None).counts(["unproven"])
