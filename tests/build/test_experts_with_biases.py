"""gpt_oss: experts with biases, from BF16 and from MXFP4, quantized or kept as they are stored."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file
from support.builds import build, build_all
from support.checkpoints import make_plan, make_recipe_text
from support.damage import overwrite_element
from support.gpt_oss import write_gpt_oss, write_mxfp4
from transformers import AutoModelForCausalLM

from quantkit import pipeline
from quantkit.artifact.load_model import load_model
from quantkit.cli.main import main
from quantkit.errors import ArtifactError
from quantkit.plan.summary import summarize_plan
from quantkit.recipe.parse import parse_recipe
from quantkit.serve.engines.target import read_target
from quantkit.verify import deep, shallow

KEYS = {
    "format": "compressed_tensors",
    "rules": "all-linear",
    "quantize": "{method: awq, rounding: gptq, bits: 4, group_size: 32, symmetric: true}",
    "calibration": "{set: tiny-v3, sequences: 6, length: 48, min_expert_tokens: 4}",
    "fidelity": "{set: tiny-v3-heldout, windows: 2, length: 48}",
}
RTN = {**KEYS, "quantize": "{method: rtn, bits: 4, group_size: 32, symmetric: true}"}
KEPT = '[{{match: "*.experts.*", keep: {}}}, {{match: "*_proj", quantize: {{}}}}]'
IDS = torch.tensor([[3, 4, 5, 6, 7, 8, 9]])
EXPERTS = "model.layers.0.mlp.experts"


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A BF16 gpt_oss, and one with its experts in MXFP4."""
    place = tmp_path_factory.mktemp("gpt_oss")
    plain = write_gpt_oss(place / "plain", num_hidden_layers=1, layer_types=["full_attention"])
    return plain, write_mxfp4(plain, place / "mxfp4")


def compute_logits(model: torch.nn.Module) -> torch.Tensor:
    with torch.no_grad():
        logits: torch.Tensor = model(input_ids=IDS, use_cache=False).logits
    return logits


def test_experts_are_quantized_one_by_one_with_their_biases(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """Biases keep their bits under the names of single linears; router and sinks are kept."""
    plain, _ = sources
    result = build(plain, tmp_path / "out", **KEYS)
    before, after = (load_file(x / "model.safetensors") for x in (plain, result.path))
    for e in range(4):
        both = before[f"{EXPERTS}.gate_up_proj_bias"][e]
        assert torch.equal(after[f"{EXPERTS}.{e}.gate_proj.bias"], both[0::2])
        assert torch.equal(after[f"{EXPERTS}.{e}.up_proj.bias"], both[1::2])
        down = before[f"{EXPERTS}.down_proj_bias"][e]
        assert torch.equal(after[f"{EXPERTS}.{e}.down_proj.bias"], down)
        assert after[f"{EXPERTS}.{e}.up_proj.weight_packed"].dtype == torch.int32
    for name in ("mlp.router.bias", "self_attn.sinks"):
        assert torch.equal(after[f"model.layers.0.{name}"], before[f"model.layers.0.{name}"])
    assert "model.layers.0.mlp.router.weight" in after
    shallow.verify_artifact(result.path)
    proven = deep.verify_deep(result.path, None, None, 0, lambda _: None).counts(["unproven"])
    assert not proven


@pytest.mark.parametrize("form", ["bf16", "mxfp4"])
def test_reported_kl_is_that_of_transformers_models(
    form: str, sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """transformers decodes the release itself."""
    source = sources[form == "mxfp4"]
    keys = {**(KEYS if form == "bf16" else RTN)}
    keys["fidelity"] = "{set: tiny-v3-heldout, windows: 1, length: 48}"
    result = build(source, tmp_path / "out", **keys)
    recipe = parse_recipe(make_recipe_text(source, tmp_path / "out", **keys), "test.yaml")
    ids = pipeline.tokenize(recipe, source).tokens["fidelity"].sequence(0).long()[None]
    original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
    artifact = load_model(result.path, device="cpu", dtype="float32")
    with torch.no_grad():
        p, q = (
            x(ids, use_cache=False).logits[0, :-1].double().log_softmax(-1)
            for x in (original, artifact)
        )
    reported = result.fidelity.distribution[0].kl_mean.value
    assert reported == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)


def test_kept_experts_in_mxfp4_are_copied_bit_for_bit(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """Attention is quantized with AWQ scales; the norm before the experts keeps its values."""
    _, source = sources
    keys = {**KEYS, "rules": KEPT.format("source")}
    summary = summarize_plan(make_plan(source, **keys))
    rule = next(x for x in summary.rules if x.action == "keep MXFP4 g32")
    assert rule.bytes_before == rule.bytes_after == 4 * 3 * 128 * 128 * 17 // 32
    result = build(source, tmp_path / "out", **keys)
    before, after = (load_file(x / "model.safetensors") for x in (source, result.path))
    stored = [name for name in before if name.startswith(f"{EXPERTS}.")]
    assert len(stored) == 6 and {name for name in after if ".experts." in name} == {*stored}
    assert all(torch.equal(before[name], after[name]) for name in stored)
    norm = "model.layers.0.post_attention_layernorm.weight"
    assert torch.equal(before[norm], after[norm])
    entry = json.loads((result.path / "config.json").read_text())["quantization_config"]
    assert any("mlp" in pattern for pattern in entry["ignore"])
    shallow.verify_artifact(result.path)
    assert not deep.verify_deep(result.path, None, None, 0, lambda _: None).counts(["unproven"])
    decoded = build(source, tmp_path / "bf16", **{**keys, "rules": KEPT.format("bf16")})
    ours, twin = (load_model(x.path, device="cpu", dtype="float32") for x in (result, decoded))
    assert torch.equal(compute_logits(ours), compute_logits(twin))


def test_a_changed_scale_of_copied_experts_is_found(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    _, source = sources
    result = build(source, tmp_path / "out", **{**RTN, "rules": KEPT.format("source")})
    name = f"{EXPERTS}.down_proj_scales"
    overwrite_element(result.path, name, 0, b"\x90")
    with pytest.raises(
        ArtifactError, match=r"experts\.0\.down_proj\.weight: expected the source's"
    ):
        deep.verify_deep(result.path, None, None, 0, lambda _: None)


def test_kept_experts_in_bf16_load_in_transformers(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    """They stay in one tensor for each layer, as engines read them."""
    plain, _ = sources
    keys = {**RTN, "rules": KEPT.format("source")}
    assert not [x for x in make_plan(plain, **keys).warnings if x.startswith("vLLM")]
    result = build(plain, tmp_path / "out", **keys)
    before, after = (load_file(x / "model.safetensors") for x in (plain, result.path))
    same = [f"{EXPERTS}.{x}" for x in ("gate_up_proj", "gate_up_proj_bias", "down_proj")]
    assert all(torch.equal(before[name], after[name]) for name in same)
    theirs, about = AutoModelForCausalLM.from_pretrained(
        result.path, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"]
    ours = load_model(result.path, device="cpu", dtype="float32")
    assert torch.allclose(compute_logits(ours), compute_logits(theirs.eval()), atol=1e-5)


def test_plan_verify_and_serve_say_that_no_engine_loads_single_experts(
    sources: tuple[Path, Path], tmp_path: Path
) -> None:
    plain, source = sources
    sentence = "loads the experts of gpt_oss as MXFP4 blocks or as tensors with all experts of a "
    sentence += "layer, and no single ones"
    (warning,) = (x for x in make_plan(plain, **RTN).warnings if sentence in x)
    assert warning.startswith("vLLM, SGLang, transformers: ")
    result = build(source, tmp_path / "out", **RTN)
    assert any(f"Not for vLLM: {sentence}" in x for x in result.fidelity.artifact.notes)
    done = CliRunner().invoke(main, ["verify", str(result.path)])
    assert done.exit_code == 0 and f"not for vLLM, SGLang, transformers: {sentence}" in done.output
    target = read_target(str(result.path))
    assert sentence in target.refused["vLLM"] and sentence in target.refused["SGLang"]
    done = CliRunner().invoke(main, ["serve", str(result.path), "--engine", "vllm", "--dry-run"])
    assert done.exit_code == 2 and f"vLLM: {sentence}" in done.output
    assert "serve it with --engine transformers" in done.output


def test_every_format_holds_biases(sources: tuple[Path, Path], tmp_path: Path) -> None:
    """The model of each is that of its own codes."""
    plain, _ = sources
    keys = {**RTN, "quantize": "{method: rtn, bits: 4, group_size: 32}"}
    keys["format"] = "[awq, gptq_v2, dense]"
    models = [
        compute_logits(load_model(x.path, device="cpu", dtype="float32"))
        for x in build_all(plain, tmp_path / "out", **keys)
    ]
    assert torch.equal(models[0], models[1])
    assert float((models[0] - models[2]).norm() / models[0].norm()) < 0.05  # rounded to BF16
    nf4 = {"quantize": "{method: nf4, bits: 4, group_size: 64}", "format": "bitsandbytes"}
    result = build(plain, tmp_path / "nf4", **{**RTN, **nf4})
    loaded = load_model(result.path, device="cpu", dtype="float32")
    biases = [name for name, _ in loaded.named_parameters() if name.endswith("0.up_proj.bias")]
    assert biases == [f"{EXPERTS}.0.up_proj.bias"]
    stored = load_file(result.path / "model.safetensors")[biases[0]]
    assert torch.equal(loaded.get_parameter(biases[0]).bfloat16(), stored)
