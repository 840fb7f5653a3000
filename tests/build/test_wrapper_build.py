"""A vision-language model from plan to artifact: text quantized, the rest as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_plan
from support.encoded import EXAMPLES
from support.wrappers import VISION, encode_parts, write_wrapper
from transformers import AutoModelForMultimodalLM

from quantkit.artifact.load_model import load_model
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.plan.summary import summarize_plan
from quantkit.verify import deep, shallow

pytestmark = pytest.mark.usefixtures("quick_builds")

KEYS = {
    "format": "compressed_tensors",
    "rules": "all-linear",
    "quantize": "{method: gptq, bits: 4, group_size: 32, symmetric: true}",
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Source and artifact of a small LLaVA."""
    place = tmp_path_factory.mktemp("wrapper")
    source = write_wrapper(place / "source", "llava")
    return source, build(source, place / "artifact", **KEYS).path


def test_parts_are_copied_bit_for_bit(folders: tuple[Path, Path]) -> None:
    source, artifact = map(Checkpoint.open, folders)
    copied = [name for name in source.specs if not name.startswith("language_model.")]
    assert any("vision_tower" in name for name in copied)
    for name in copied:
        assert torch.equal(source.read([name])[name], artifact.read([name])[name])
    assert (folders[1] / "preprocessor_config.json").is_file()


def test_config_has_the_keys_of_the_source(folders: tuple[Path, Path]) -> None:
    source, artifact = (json.loads((x / "config.json").read_text()) for x in folders)
    assert artifact.pop("quantization_config")["ignore"]
    assert artifact == source


def test_transformers_loads_the_artifact(folders: tuple[Path, Path]) -> None:
    ids = torch.arange(5, 25)[None]
    model, about = AutoModelForMultimodalLM.from_pretrained(
        folders[1], dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"]
    ours = load_model(folders[1], device="cpu", dtype="float32")
    with torch.no_grad():
        expected, logits = model.eval()(input_ids=ids).logits, ours(input_ids=ids).logits
    assert torch.allclose(logits, expected, atol=1e-4)


def test_plan_and_card_name_the_parts(folders: tuple[Path, Path]) -> None:
    summary = json.loads((folders[1] / "quantkit" / "plan.json").read_text())["summary"]
    sizes = {part["name"]: part["tensors"] for part in summary["copied"]}
    assert set(sizes) == {"model.vision_tower", "model.multi_modal_projector"}
    card = (folders[1] / "README.md").read_text()
    assert f"model.vision_tower ({sizes['model.vision_tower']} tensors" in card
    assert "calibration and figures use text only" in card


def test_artifact_is_verified(folders: tuple[Path, Path]) -> None:
    assert shallow.verify_artifact(folders[1]).status == "not judged"
    report = deep.verify_deep(folders[1], str(folders[0]), None, 0, lambda _: None)
    assert report.counts(["unproven"]) == {}


def test_manifest_names_the_modules_that_are_copied(folders: tuple[Path, Path]) -> None:
    manifest = json.loads((folders[1] / "quantkit" / "manifest.json").read_text())
    assert sorted(manifest["parts"]) == ["multi_modal_projector", "vision_tower"]


RTN = {**KEYS, "quantize": "{method: rtn, bits: 4, group_size: 32, symmetric: true}"}


@pytest.mark.parametrize("name", ["fp8-blocks-compressed", "fp8-blocks-ue8m0"])
def test_parts_in_fp8_blocks_are_copied_with_their_scales(name: str, tmp_path: Path) -> None:
    """config.json says which modules are in FP8; transformers loads and runs them.

    Some linears have inputs that engines cannot round in groups of 128: they are decoded.
    """
    example = EXAMPLES[name]
    vision = {"model_type": "clip_vision_model", **VISION, "hidden_size": 128}
    plain = write_wrapper(tmp_path / "plain", "llava", vision_config=vision)
    source = encode_parts(plain, tmp_path / "source", example.encode, example.config)
    copied = {x.name: x.decoded for x in summarize_plan(make_plan(source, **RTN)).copied}
    assert copied == {"model.vision_tower": 2, "model.multi_modal_projector": 1}
    artifact = build(source, tmp_path / "artifact", **RTN).path
    before, after = (load_file(x / "model.safetensors") for x in (source, artifact))
    codes = [x for x, tensor in before.items() if tensor.dtype == torch.float8_e4m3fn]
    narrow = [x for x in codes if x.endswith(("mlp.fc2.weight", "linear_2.weight"))]
    assert len(codes) == 14 and all(after[x].dtype == torch.bfloat16 for x in narrow)
    for weight in {*codes} - {*narrow}:
        scale = before.get(f"{weight}_scale_inv", before.get(f"{weight}_scale"))
        assert scale is not None
        assert torch.equal(after[weight].view(torch.uint8), before[weight].view(torch.uint8))
        assert torch.equal(after[f"{weight}_scale"], scale.float())
    shallow.verify_artifact(artifact)
    assert (
        deep.verify_deep(artifact, str(source), None, 0, lambda _: None).counts(["unproven"]) == {}
    )
    model, about = AutoModelForMultimodalLM.from_pretrained(
        artifact, dtype=torch.float32, output_loading_info=True
    )
    assert not about["missing_keys"] and not about["unexpected_keys"]
    linear = model.model.multi_modal_projector.linear_1
    x = torch.randn(3, linear.in_features, generator=torch.Generator().manual_seed(0))
    decoded = Checkpoint.open(source, decode=True).read(["multi_modal_projector.linear_1.weight"])
    (weight_values,) = decoded.values()
    expected = torch.nn.functional.linear(x, weight_values.float(), linear.bias)
    with torch.no_grad():
        model.eval()(input_ids=torch.arange(5, 25)[None])  # the first forward decompresses
        assert float((linear(x) - expected).norm() / expected.norm()) < 0.05  # inputs are in FP8


def test_parts_in_codes_that_a_format_does_not_hold_are_decoded_and_said(
    folders: tuple[Path, Path], tmp_path: Path
) -> None:
    example = EXAMPLES["mxfp4-compressed"]
    source = encode_parts(folders[0], tmp_path / "source", example.encode, example.config)
    summary = summarize_plan(make_plan(source, **RTN))
    assert sum(part.decoded for part in summary.copied) == 14
    result = build(source, tmp_path / "artifact", **RTN)
    (note,) = (x for x in result.fidelity.artifact.notes if "model.vision_tower" in x)
    assert note.startswith("Copied, codes that the format does not hold decoded: ")
    assert "12 of them decoded" in note
    shallow.verify_artifact(result.path)
