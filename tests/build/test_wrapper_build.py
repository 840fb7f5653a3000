"""A vision-language model from plan to artifact: text quantized, the rest as it was."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from support.builds import build
from support.wrappers import write_wrapper
from transformers import AutoModelForMultimodalLM

from quantkit.artifact.load_model import load_model
from quantkit.checkpoint.checkpoint import Checkpoint
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
