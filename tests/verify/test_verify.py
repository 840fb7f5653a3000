"""`verify` finds every difference between an artifact and its manifest, one sentence each."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from quantkit.artifact.layout import INDEX, MANIFEST, TIMINGS
from quantkit.errors import ArtifactError
from quantkit.verify.shallow import verify_artifact

FIRST, LAST = "model-00001-of-00003.safetensors", "model-00003-of-00003.safetensors"
PACKED = "model.layers.1.mlp.experts.0.gate_proj.qweight"


def get_error(path: Path) -> str:
    """Return verify's message for an artifact that differs from its manifest."""
    with pytest.raises(ArtifactError) as caught:
        verify_artifact(path)
    return str(caught.value)


def flip_bit(path: Path, at: int) -> None:
    """Change one bit of the byte at `at`; negative counts from the end."""
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


def edit_json(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file."""
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def read_header_and_data(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the JSON of a safetensors file, and the bytes after it."""
    content = path.read_bytes()
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def rewrite_header(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file and keep its data."""
    entries, data = read_header_and_data(path)
    change(entries)
    text = json.dumps(entries).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data)


def rename_entry(entries: dict[str, Any], old: str, new: str) -> None:
    """Rename an entry."""
    entries[new] = entries.pop(old)


def locate_shard(path: Path, tensor: str) -> Path:
    """Return the shard that holds a tensor, by the index."""
    return path / json.loads((path / INDEX).read_text())["weight_map"][tensor]


# ---------------------------------------------------------------------------------- valid artifacts


def test_verify_accepts_a_built_artifact(artifact: Path) -> None:
    report = verify_artifact(artifact)
    files = [path for path in artifact.rglob("*") if path.is_file()]
    assert report.status == "not judged"  # the benchmarks were left out, and the recipe gates them
    assert report.files == len(files) - 2  # but the manifest itself and the timings
    assert report.n_bytes == sum(
        p.stat().st_size for p in files if p.name not in {"manifest.json", "timings.json"}
    )
    assert report.tensors == sum(
        len(read_header_and_data(path)[0]) - 1 for path in artifact.glob("*.safetensors")
    )


def test_manifest_covers_every_file_but_itself_and_the_timings(artifact: Path) -> None:
    manifest = json.loads((artifact / MANIFEST).read_text())
    files = {
        path.relative_to(artifact).as_posix() for path in artifact.rglob("*") if path.is_file()
    }
    assert set(manifest["files"]) == files - {MANIFEST, TIMINGS}
    assert {"README.md", "recipe.yaml", "config.json", "tokenizer.json", INDEX, FIRST, LAST} <= set(
        manifest["files"]
    )
    assert {"quantkit/fidelity.json", "quantkit/plan.json"} <= set(manifest["files"])


def test_timings_may_differ_or_be_absent(artifact: Path) -> None:
    (artifact / TIMINGS).write_text('{"seconds": 1}')
    verify_artifact(artifact)
    (artifact / TIMINGS).unlink()
    verify_artifact(artifact)


def test_verify_does_not_start_torch(artifact: Path) -> None:
    program = (
        "import sys; from quantkit.cli.main import main\n"
        f"main(['verify', {str(artifact)!r}], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'pydantic', 'model_signing'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
    assert ": ok (" in done.stdout


# ------------------------------------------------------------------------------------------- damage


DAMAGES: Mapping[str, tuple[Callable[[Path], object], str]] = {
    "a flipped bit of a weight": (
        lambda path: flip_bit(path / LAST, -1),
        f"{LAST}: expected sha256 ",
    ),
    "a flipped bit of the report": (
        lambda path: flip_bit(path / "quantkit/fidelity.json", 100),
        "quantkit/fidelity.json: expected sha256 ",
    ),
    "a flipped bit of the model card": (
        lambda path: flip_bit(path / "README.md", 10),
        "README.md: expected sha256 ",
    ),
    "a shard cut short": (
        lambda path: (path / LAST).write_bytes((path / LAST).read_bytes()[:-100]),
        "the file is truncated",
    ),
    "a longer file": (
        lambda path: (path / "tokenizer.json").write_bytes(
            (path / "tokenizer.json").read_bytes() + b" "
        ),
        "tokenizer.json: expected 39072 bytes, found 39073",
    ),
    "a removed file": (
        lambda path: (path / "tokenizer.json").unlink(),
        "tokenizer.json: missing",
    ),
    "a removed shard": (
        lambda path: (path / FIRST).unlink(),
        f"{FIRST}: missing",
    ),
    "an added file": (
        lambda path: (path / "modeling_evil.py").write_text("import os"),
        "modeling_evil.py: not in the manifest",
    ),
    "an added file in a folder": (
        lambda path: (path / "quantkit/samples/more.parquet").write_text(""),
        "quantkit/samples/more.parquet: not in the manifest",
    ),
    "a renamed tensor": (
        lambda path: rewrite_header(
            locate_shard(path, PACKED), lambda h: rename_entry(h, PACKED, "model.other")
        ),
        "tensor model.other: expected none, found ['I32', [256, 16]]",
    ),
    "a tensor of another shape": (
        lambda path: rewrite_header(
            locate_shard(path, PACKED), lambda h: h[PACKED].update(shape=[16, 256])
        ),
        f"tensor {PACKED}: expected ['I32', [256, 16]], found ['I32', [16, 256]]",
    ),
    "an index that leads elsewhere": (
        lambda path: edit_json(
            path / INDEX, lambda index: index["weight_map"].update({PACKED: LAST})
        ),
        f"{INDEX}: weight_map does not agree with the shards' headers",
    ),
    "an index that forgets a tensor": (
        lambda path: edit_json(path / INDEX, lambda index: index["weight_map"].pop(PACKED)),
        f"{INDEX}: weight_map does not agree with the shards' headers",
    ),
    "an index with a wrong total": (
        lambda path: edit_json(path / INDEX, lambda index: index["metadata"].update(total_size=1)),
        f"{INDEX}: metadata.total_size: expected ",
    ),
    "no index with three shards": (
        lambda path: (path / INDEX).unlink(),
        f"{INDEX}: missing, with 3 shards",
    ),
    "an index that is no JSON": (
        lambda path: (path / INDEX).write_text("{"),
        f"{INDEX}: expected JSON",
    ),
    "a config without quantization_config": (
        lambda path: edit_json(
            path / "config.json", lambda config: config.pop("quantization_config")
        ),
        "config.json: quantization_config is not the one the artifact was built with",
    ),
    "a config with other bits": (
        lambda path: edit_json(
            path / "config.json", lambda config: config["quantization_config"].update(bits=8)
        ),
        "config.json: quantization_config is not the one the artifact was built with",
    ),
    "a config that is no JSON": (
        lambda path: (path / "config.json").write_text("[]"),
        "config.json: expected a JSON object, found list",
    ),
    "no config": (
        lambda path: (path / "config.json").unlink(),
        "config.json: missing",
    ),
    "a file that is a link": (
        lambda path: replace_by_link(path / "README.md"),
        "README.md: a link, expected a file",
    ),
    "a shard that is a link": (
        lambda path: replace_by_link(path / LAST),
        f"{LAST}: a link, expected a file",
    ),
    "a link to a folder": (
        lambda path: (path / "more").symlink_to("/", target_is_directory=True),
        "more: not in the manifest",
    ),
    "a link to nowhere": (
        lambda path: (path / "gone").symlink_to("/nonexistent"),
        "gone: not in the manifest",
    ),
}


def replace_by_link(path: Path) -> None:
    """Move a file out of the artifact and leave a link to it."""
    outside = path.parent.parent / path.name
    path.rename(outside)
    path.symlink_to(outside)


@pytest.mark.parametrize(("damage", "sentence"), DAMAGES.values(), ids=DAMAGES)
def test_verify_names_the_damage(
    artifact: Path, damage: Callable[[Path], object], sentence: str
) -> None:
    damage(artifact)
    message = get_error(artifact)
    assert message.startswith(f"{artifact}: not what its manifest says; pull or build it again:\n")
    assert sentence in message


def test_verify_continues_after_a_damaged_header(artifact: Path) -> None:
    """The shard's hash, its header and another file's fault are reported together."""
    flip_bit(artifact / LAST, 9)
    flip_bit(artifact / "README.md", 0)
    message = get_error(artifact)
    for sentence in (
        f"{LAST}: expected sha256",
        f"{LAST}: header: expected JSON",
        "README.md: expected sha256",
    ):
        assert sentence in message


def test_verify_reports_all_faults_at_once(artifact: Path) -> None:
    """Damaged JSON files too: one run shows everything that must be repaired."""
    flip_bit(artifact / LAST, -1)
    flip_bit(artifact / "quantkit/fidelity.json", 100)
    (artifact / "tokenizer.json").unlink()
    (artifact / "added.bin").write_bytes(b"x")
    (artifact / "config.json").write_text("{")
    (artifact / INDEX).write_text("{")
    lines = get_error(artifact).splitlines()[1:]
    named = [line.partition(": ")[0].removeprefix(f"{artifact}/") for line in lines]
    assert set(named) == {
        LAST,
        "quantkit/fidelity.json",
        "tokenizer.json",
        "added.bin",
        "config.json",
        INDEX,
    }


def test_verify_counts_many_faults(artifact: Path) -> None:
    for number in range(30):
        (artifact / f"{number:02d}.bin").write_bytes(b"")
    lines = get_error(artifact).splitlines()
    assert len(lines) == 22
    assert lines[1] == "00.bin: not in the manifest" and lines[-1] == "... and 10 more"


# --------------------------------------------------------------------- folders that are no artifact


def test_verify_rejects_a_folder_without_manifest(artifact: Path) -> None:
    (artifact / MANIFEST).unlink()
    assert (
        get_error(artifact)
        == f"{artifact}: no {MANIFEST}: not an artifact of quantkit, or its build did not finish"
    )


def test_verify_rejects_a_missing_folder(tmp_path: Path) -> None:
    assert (
        get_error(tmp_path / "x")
        == f"{tmp_path / 'x'}: expected the folder of an artifact, found none; check the path"
    )


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_verify_rejects_another_schema_version(artifact: Path, version: object) -> None:
    edit_json(artifact / MANIFEST, lambda manifest: manifest.update(schema_version=version))
    assert get_error(artifact) == (
        f"{artifact / MANIFEST}: schema_version: expected 1, found {version!r}; use the quantkit "
        "that made it"
    )


@pytest.mark.parametrize("key", ["files", "tensors"])
@pytest.mark.parametrize("value", [None, [], "x"])
def test_verify_rejects_a_manifest_without_its_sections(
    artifact: Path, key: str, value: object
) -> None:
    edit_json(artifact / MANIFEST, lambda manifest: manifest.update({key: value}))
    assert f"{MANIFEST}: {key}: expected an object, found {type(value).__name__}" in get_error(
        artifact
    )


@pytest.mark.parametrize("text", ["", "[]", "{", '{"a": 1, "a": 2}', '{"schema_version": 1}'])
def test_verify_rejects_an_invalid_manifest(artifact: Path, text: str) -> None:
    (artifact / MANIFEST).write_text(text)
    assert f"{MANIFEST}: " in get_error(artifact)


@pytest.mark.parametrize(
    "entry",
    [None, 1, [], {}, {"bytes": "1", "sha256": 1}, {"bytes": 39072}],
    ids=lambda entry: json.dumps(entry),
)
def test_verify_rejects_an_invalid_file_entry(artifact: Path, entry: object) -> None:
    edit_json(
        artifact / MANIFEST, lambda manifest: manifest["files"].update({"tokenizer.json": entry})
    )
    assert "\ntokenizer.json: expected " in get_error(artifact)


@pytest.mark.parametrize("name", ["../outside.json", "/etc/hostname", "quantkit"])
def test_manifest_cannot_lead_outside_the_folder(artifact: Path, name: str) -> None:
    """A name that is no file below the artifact's folder is a missing file."""
    (artifact.parent / "outside.json").write_text("{}")
    edit_json(
        artifact / MANIFEST,
        lambda manifest: manifest["files"].update({name: {"bytes": 2, "sha256": ""}}),
    )
    assert f"\n{name}: missing" in get_error(artifact)
