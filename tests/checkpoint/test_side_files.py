"""Files next to the weights: which are copied, and the sentence for those that are not."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint

from quantkit.artifact.layout import MANIFEST
from quantkit.checkpoint.side_files import describe_left_files, list_files, list_side_files
from quantkit.errors import ArtifactError, CheckpointError
from quantkit.verify.shallow import verify_artifact

TRAVEL = {
    "1_Pooling/config.json": '{"pooling_mode_mean_tokens": true}',
    "LICENSES/Terms of use": "left: a blank in its name",
    "USE_POLICY.md": "text",
    "additional_chat_templates/tools.jinja": "{{ 1 }}",
    "assets/figure.png": "png",
    "modules.json": json.dumps([
        {"idx": 0, "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    ]),
    "processor_config.json": "{}",
}
STAY = {
    "consolidated.00.pth": "a pickle",
    "figure.svg": "a kind of file",
    "modeling_own.py": "code that no auto_map names",
    "onnx/model.onnx": "a second set of weights",
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


def write_files(folder: Path) -> Path:
    for name, text in {**TRAVEL, **dict.fromkeys((*STAY, *SILENT), "x")}.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def list_names(folder: Path) -> list[str]:
    return [path.relative_to(folder).as_posix() for path in list_side_files(folder)]


def test_data_travels_and_the_rest_is_said(tmp_path: Path) -> None:
    folder = write_files(tmp_path)
    assert list_names(folder) == sorted(set(TRAVEL) - {"LICENSES/Terms of use"})
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
    for name in set(TRAVEL) - {"LICENSES/Terms of use"}:
        assert (path / name).read_bytes() == (folder / name).read_bytes()
    assert not any((path / name).exists() for name in STAY)
    changed = tmp_path / "b"
    shutil.copytree(path, changed)
    modules = [{"type": "own_code.Pooling", "path": ""}]
    (changed / "modules.json").write_text(json.dumps(modules))
    files = json.loads((changed / MANIFEST).read_text())["files"]
    assert "modules.json" in files
    with pytest.raises(ArtifactError, match="modules.json: type: expected a class of sentence_tr"):
        verify_artifact(changed)
