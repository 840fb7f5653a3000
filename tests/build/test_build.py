"""Options of the build loop, and how report and manifest show them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint

from quantkit.build import dense
from quantkit.build.context import BlockContext
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.verify.shallow import verify_artifact


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 in FP8: one dense block, one with 8 experts, one MTP block."""
    return write_checkpoint(
        tmp_path_factory.mktemp("v3") / "source", make_tiny_config("deepseek_v3"), fp8=True
    )


def calibration(**keys: object) -> str:
    """A calibration section."""
    values = {"set": "tiny-v3", "sequences": 48, "length": 128, "min_expert_tokens": 8, **keys}
    return json.dumps(values)


@pytest.mark.parametrize(
    ("policy", "name"), [("shared_gram", "shared-gram"), ("rtn", "rtn-too-few-tokens")]
)
def test_expert_with_too_few_tokens_takes_named_fallback(
    source: Path, tmp_path: Path, policy: str, name: str
) -> None:
    """Some experts of the layer are below the bound; only those fall back."""
    text = calibration(sequences=12, min_expert_tokens=150, under_calibrated=policy)
    report = build(source, tmp_path / "a", calibration=text).fidelity
    assert report.experts is not None
    few = {
        f"{block}.mlp.experts.{expert}" for block, expert, _ in report.experts.list_uncalibrated()
    }
    assert 0 < len(few) < 8
    (taken,) = report.fallbacks
    assert taken.kind == name
    assert {module.rpartition(".")[0] for module in taken.modules} == few
    manifest = json.loads((tmp_path / "a" / "quantkit" / "manifest.json").read_text())
    marked = {
        module.rpartition(".")[0]
        for module, values in manifest["modules"].items()
        if values["fallbacks"]
    }
    assert marked == few


def test_too_few_tokens_use_neither_gptq_nor_scales(tmp_path: Path) -> None:
    """Codes are rounded to nearest and down projections are not scaled; the record has the method
    and the tokens.
    """
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("qwen3_moe"))
    text = calibration(sequences=1, length=8, min_expert_tokens=9, under_calibrated="rtn")
    build(
        folder,
        tmp_path / "a",
        calibration=text,
        quantize="{method: awq, rounding: gptq, group_size: 64}",
    )
    manifest = json.loads((tmp_path / "a" / "quantkit" / "manifest.json").read_text())
    tokens = {name: block["expert_tokens"] for name, block in manifest["blocks"].items()}
    experts = {name: values for name, values in manifest["modules"].items() if ".experts." in name}
    assert any(map(any, tokens.values())) and experts
    for name, values in experts.items():
        block, _, rest = name.partition(".mlp.experts.")
        assert (values["method"], values["rounding"]) == ("rtn", "nearest")
        assert values["tokens"] == tokens[block][int(rest.partition(".")[0])]
        assert not (name.endswith("down_proj") and values["rescaled"])


def test_experts_all_calibrates_every_expert_on_all_tokens(source: Path, tmp_path: Path) -> None:
    """`experts: all`: every expert uses the whole text, and none is under-calibrated."""
    report = build(
        source, tmp_path / "a", calibration=calibration(experts="all", min_expert_tokens=10**6)
    ).fidelity
    assert report.calibration is not None
    experts = [module for module in report.modules if ".experts." in module.name]
    assert {module.tokens for module in experts} == {report.calibration.tokens}
    assert report.fallbacks == ()


def test_propagate_original_changes_statistics_of_later_blocks(
    source: Path, tmp_path: Path
) -> None:
    """The first block has the same statistics; the second does not."""
    reports = [
        build(source, tmp_path / way, propagate=way, rules="all-linear").fidelity
        for way in ("quantized", "original")
    ]
    errors = [{m.name: m.output_relative_error for m in report.modules} for report in reports]
    first = [name for name in errors[0] if name.startswith("model.layers.0.self_attn")]
    second = [name for name in errors[0] if name.startswith("model.layers.1.mlp")]
    assert first and all(errors[0][name] == errors[1][name] for name in first)
    assert second and any(errors[0][name] != errors[1][name] for name in second)


def test_mtp_block_is_kept_quantized_or_dropped(source: Path, tmp_path: Path) -> None:
    """Kept: BF16, bit for bit. Quantized: rounded to nearest, with a named fallback. Dropped:
    absent from tensors and config.
    """
    original = (
        Checkpoint.open(source).read(["model.layers.2.mlp.experts.0.up_proj.weight"]).popitem()[1]
    )
    build(source, tmp_path / "keep", mtp="keep")
    kept = load_file(tmp_path / "keep" / "model.safetensors")
    assert kept["model.layers.2.mlp.experts.0.up_proj.weight"].equal(original)
    quantized = build(source, tmp_path / "quantize", mtp="quantize").fidelity
    assert {f.kind for f in quantized.fallbacks} == {"mtp-rtn"}
    assert all(
        name.startswith("model.layers.2.") for f in quantized.fallbacks for name in f.modules
    )
    assert "model.layers.2.mlp.experts.0.up_proj.qweight" in load_file(
        tmp_path / "quantize" / "model.safetensors"
    )
    build(source, tmp_path / "drop", mtp="drop")
    dropped = load_file(tmp_path / "drop" / "model.safetensors")
    assert not any(name.startswith("model.layers.2.") for name in dropped)
    layers = {
        way: json.loads((tmp_path / way / "config.json").read_text())["num_nextn_predict_layers"]
        for way in ("keep", "drop")
    }
    assert layers == {"keep": 1, "drop": 0}
    for way in ("keep", "quantize", "drop"):
        verify_artifact(tmp_path / way)


def test_kept_tensors_equal_the_source_bit_for_bit(source: Path, tmp_path: Path) -> None:
    """RTN scales nothing: every kept tensor is the source's BF16 dequantization, FP8 blocks
    included.
    """
    build(source, tmp_path / "a", quantize="{method: rtn, group_size: 64}")
    stored, original = load_file(tmp_path / "a" / "model.safetensors"), Checkpoint.open(source)
    kept = [name for name in original.specs if name in stored]
    assert len(kept) > 30
    for name in kept:
        assert stored[name].equal(original.read([name])[name]), name


def test_awq_scales_attention_and_experts_without_changing_the_block(
    source: Path, tmp_path: Path
) -> None:
    """Scales are chosen where they help, folding is exact to rounding, errors are not above
    RTN's.
    """
    outcome = build(source, tmp_path / "awq", rules="all-linear")
    blocks = json.loads((outcome.path / "quantkit" / "manifest.json").read_text())["blocks"]
    choices = [choice for block in blocks.values() for choice in block["scales"]]
    assert any(choice["candidate"] for choice in choices)
    assert all(choice["error_chosen"] <= choice["error_plain"] for choice in choices)
    assert all(block["fold_change"] < 1e-3 for block in blocks.values())
    plain = build(
        source, tmp_path / "rtn", rules="all-linear", quantize="{method: rtn, group_size: 64}"
    ).fidelity
    pooled = outcome.fidelity.distribution[0].kl_mean, plain.distribution[0].kl_mean
    assert pooled[0] and pooled[1] and pooled[0].value is not None and pooled[1].value is not None
    assert pooled[0].value < 0.9 * pooled[1].value


@pytest.mark.parametrize(
    ("quantize", "checked"), [("{method: gptq, group_size: 64}", 0), ("{group_size: 64}", 2)]
)
def test_scaling_is_checked_only_where_something_can_be_scaled(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: str, checked: int
) -> None:
    """GPTQ alone scales nothing, so running a sample through each block would show nothing."""
    seen = list[str]()

    def check(
        context: BlockContext, scaled: dense.ScaledBlock, sample: dense.ScalingCheckSample
    ) -> dense.ScaledBlock:
        seen.append(context.name)
        return before(context, scaled, sample)

    before = dense.check_scaling
    monkeypatch.setattr(dense, "check_scaling", check)
    outcome = build(source, tmp_path / "a", rules="all-linear", quantize=quantize)
    assert len(seen) == checked
    verify_artifact(outcome.path)


def test_kept_experts_follow_the_scale_of_their_input(source: Path, tmp_path: Path) -> None:
    """Shared experts are quantized with AWQ, routed experts read the same input and are kept."""
    rules = '[{match: "*.shared_experts.*", quantize: default}, {match: "*", keep: bf16}]'
    outcome = build(source, tmp_path / "a", rules=rules)
    block = json.loads((outcome.path / "quantkit/manifest.json").read_text())["blocks"][
        "model.layers.1"
    ]
    assert any(choice["candidate"] for choice in block["scales"]) and block["fold_change"] < 1e-3


def test_dead_channels_and_zero_groups_give_a_valid_artifact(tmp_path: Path) -> None:
    """Zeros in a norm, a group of zero weights, an expert without tokens: the artifact has finite
    values.
    """
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("deepseek_v3"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.post_attention_layernorm.weight"][:4] = 0
    tensors["model.layers.1.mlp.experts.2.up_proj.weight"][:, :64] = 0
    tensors["model.layers.1.mlp.gate.e_score_correction_bias"][
        5
    ] = -1e4  # the router never picks expert 5
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    report = build(folder, tmp_path / "a").fidelity
    assert report.experts is not None and report.experts.layers[0].tokens[5] == 0
    kinds = {fallback.kind: fallback.modules for fallback in report.fallbacks}
    assert "model.layers.1.mlp.experts.2.up_proj" in kinds["zero-group"]
    assert any(".experts.5." in name for name in kinds["shared-gram"])
    for tensor in load_file(tmp_path / "a" / "model.safetensors").values():
        assert not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def test_non_finite_weight_stops_the_build(tmp_path: Path) -> None:
    """The error names the tensor, and nothing has the final name."""
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][3, 5] = float("nan")
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
        build(folder, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_kept_weight_has_the_dtype_of_its_rule(tmp_path: Path) -> None:
    """keep: bf16 halves a float32 source's weights, keep: source does not; scales follow the
    source's dtype.
    """
    folder = write_checkpoint(tmp_path / "source", make_tiny_config("llama", torch_dtype="float32"))
    rules = '[{match: "*.q_proj", keep: bf16}, {match: "*.k_proj", keep: bf16}, '
    rules += '{match: "*.v_proj", keep: bf16}, {match: "*.self_attn.*", keep: source}, '
    rules += '{match: "*.mlp.*", quantize: default}, {match: "*", keep: source}]'
    build(folder, tmp_path / "a", rules=rules)
    specs = Checkpoint.open(tmp_path / "a").specs
    assert specs["model.layers.0.self_attn.q_proj.weight"].dtype == "BF16"
    assert specs["model.layers.0.self_attn.o_proj.weight"].dtype == "F32"
    assert specs["model.layers.0.mlp.up_proj.scales"].dtype == "BF16"
    half = write_checkpoint(tmp_path / "half", make_tiny_config("llama", torch_dtype="float16"))
    build(half, tmp_path / "b", rules="all-linear")
    assert Checkpoint.open(tmp_path / "b").specs["model.layers.0.mlp.up_proj.scales"].dtype == "F16"
    verify_artifact(tmp_path / "b")
