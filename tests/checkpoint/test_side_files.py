"""Files next to the weights: which are copied, and the sentence for those that are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint

from quantkit.artifact.layout import MANIFEST, find_layout_faults
from quantkit.checkpoint.side_files import describe_left_files, list_files, list_side_files
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

TRAVEL = {
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "LICENSES/Terms of use": "left: a blank in its name",
    "USE_POLICY.md": "text",
    "additional_chat_templates/tools.jinja": "{{ 1 }}",
    "assets/figure.png": "png",
    "modules.json": json.dumps([
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "path": "2_Dense", "type": "sentence_transformers.models.Dense"},
        {"idx": 3, "path": "3_Dense", "type": "sentence_transformers.models.Dense"},
    ]),
    "2_Dense/config.json": '{"in_features": 64, "out_features": 32}',
    "3_Dense/config.json": "{}",
    "processor_config.json": "{}",
}
STAY = {
    "consolidated.00.pth": "a pickle",
    "figure.svg": "a kind of file",
    "modeling_own.py": "code that no auto_map names",
    "onnx/model.onnx": "a second set of weights",
    "3_Dense/pytorch_model.bin": "sentence-transformers does not load the module 3_Dense: save the",
    "original/params.json": "a file by which an engine would load something else",
}
SILENT = ("README.md", ".gitattributes", ".git/HEAD")
RTN = {
    "quantize": "{method: rtn, bits: 8, group_size: 64, symmetric: true}",
    "format": "compressed_tensors",
    "rules": "all-linear",
    "calibration": "null",
    "fidelity": "none",
}


DENSE = "2_Dense/model.safetensors"
WEIGHTS = {"linear.weight": torch.arange(6, dtype=torch.float32).reshape(2, 3)}


def write_files(folder: Path) -> Path:
    for name, text in {**TRAVEL, **dict.fromkeys((*STAY, *SILENT), "x")}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    save_file(WEIGHTS, folder / DENSE)
    return folder


def list_names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_side_files(folder)]


def test_data_travels_and_the_rest_is_said(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    assert list_names(folder) == sorted({*TRAVEL, DENSE} - {"LICENSES/Terms of use"})
    said = describe_left_files(folder, list_side_files(folder))
    for name, reason in STAY.items():
        assert any(name in line and reason in line for line in said), name
    assert any("LICENSES/Terms of use" in line for line in said)
    assert not any(name in line for line in said for name in SILENT)


@pytest.mark.parametrize(
    "entry",
    [
        {"type": "own_code.Pooling", "path": "1_Pooling"},
        {"type": "sentence_transformers.models.Pooling", "path": "../other"},
        {"type": "sentence_transformers.models.Pooling", "path": "/etc"},
        {"path": ""},
        "os.system",
    ],
)
def test_modules_of_other_code_stay_behind(entry: object, tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text(json.dumps([entry]))
    (tmp_path / "1_Pooling").mkdir()
    (tmp_path / "1_Pooling/config.json").write_text("{}")
    assert list_names(tmp_path) == []
    (said,) = describe_left_files(tmp_path, ())
    assert said.startswith(
        "not copied: 1_Pooling/config.json, modules.json: a file by which an engine would load"
    )


def test_linked_folders_are_not_followed(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/x.txt").write_text("x")
    (tmp_path / "b").symlink_to("/etc")
    assert list_files(tmp_path) == ["a/x.txt"]
    (tmp_path / "a/y.txt").symlink_to("/etc/hostname")
    with pytest.raises(CheckpointError, match="a/y.txt: expected a file inside the folder"):
        list_side_files(tmp_path)


def test_artifact_holds_what_travels_and_verifies(tmp_path: Path) -> None:
    folder = write_files(write_checkpoint(tmp_path / "m", make_tiny_config("llama")))
    said = "\n".join(make_plan(folder, **RTN).warnings)
    assert all(name in said for name in STAY)
    path = build(folder, tmp_path / "a", **RTN).path
    verify_artifact(path)
    manifest = json.loads((path / MANIFEST).read_text())
    assert len(manifest["files"][DENSE]["sha256"]) == 64
    assert not any(name.startswith("linear") for name in manifest["tensors"])
    for name in {*TRAVEL, DENSE} - {"LICENSES/Terms of use"}:
        assert (path / name).read_bytes() == (folder / name).read_bytes()
    assert not any((path / name).exists() for name in STAY)
    changed = tmp_path / "b"
    shutil.copytree(path, changed)
    with (changed / DENSE).open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"x")
    with pytest.raises(ArtifactError, match=f"{DENSE}: expected sha256"):
        verify_artifact(changed)
    modules = [{"type": "own_code.Pooling", "path": ""}]
    (changed / "modules.json").write_text(json.dumps(modules))
    files = json.loads((changed / MANIFEST).read_text())["files"]
    assert "modules.json" in files
    with pytest.raises(ArtifactError, match="modules.json: type: expected a class of sentence_tr"):
        verify_artifact(changed)


def write_dense(folder: Path, *, named: str = "2_Dense") -> Path:
    """Write the weights of a module, and a modules.json that names a folder."""
    (folder / "2_Dense").mkdir()
    save_file(WEIGHTS, folder / DENSE)
    entry = {"type": "sentence_transformers.models.Dense", "path": named}
    (folder / "modules.json").write_text(json.dumps([entry]))
    return folder


def test_weights_of_a_module_that_nothing_names_stay_behind(tmp_path: Path) -> None:
    assert list_names(write_dense(tmp_path, named="1_Pooling")) == ["modules.json"]
    (tmp_path / "modules.json").unlink()
    assert list_names(tmp_path) == []
    assert list(find_layout_faults(["config.json", "model.safetensors", DENSE, MANIFEST])) == [
        f"{DENSE}: a file of a module without the modules.json that names it"
    ]


def test_damaged_weights_of_a_module_are_refused(tmp_path: Path) -> None:
    folder = write_dense(tmp_path)
    assert list_names(folder) == [DENSE, "modules.json"]
    (folder / DENSE).write_bytes((folder / DENSE).read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=DENSE):
        list_side_files(folder)
