"""Names of stored tensors: prefixes of training tools, a missing base prefix, stated ties."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.checkpoints import make_tiny_config

from quantkit.checkpoint.canonical_names import find_renames
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.contracts import Config
from quantkit.errors import CheckpointError

QWEN3 = Config(values={"model_type": "qwen3"})
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def rename(*names: str, config: Config = QWEN3) -> dict[str, str]:
    """Return the renamed tensors."""
    return find_renames(config, names)[0]


def save(folder: Path, tensors: dict[str, torch.Tensor], **changes: object) -> Path:
    """Write one weight file and a config of Qwen3; `metadata` is that of the file."""
    folder.mkdir()
    metadata = changes.pop("metadata", {})
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt", **metadata})  # type: ignore[dict-item]
    (folder / "config.json").write_text(json.dumps(make_tiny_config("qwen3", **changes)))
    return folder


def test_wrappers_are_removed_anywhere_in_a_name() -> None:
    assert rename("_orig_mod.lm_head.weight", "model.layers.0._orig_mod.mlp.up_proj.weight") == {
        "_orig_mod.lm_head.weight": HEAD,
        "model.layers.0._orig_mod.mlp.up_proj.weight": "model.layers.0.mlp.up_proj.weight",
    }


def test_data_parallel_prefix_is_removed_only_from_all_names() -> None:
    assert rename(f"module.{HEAD}", f"module.{EMBEDDING}") == {
        f"module.{HEAD}": HEAD,
        f"module.{EMBEDDING}": EMBEDDING,
    }
    assert rename(f"module.{HEAD}", EMBEDDING) == {}


@pytest.mark.parametrize(
    ("model_type", "stored", "expected"),
    [
        ("qwen3", "layers.0.mlp.up_proj.weight", "model.layers.0.mlp.up_proj.weight"),
        ("gpt2", "h.0.mlp.c_fc.weight", "transformer.h.0.mlp.c_fc.weight"),
        ("opt", "decoder.layers.0.fc1.weight", "model.decoder.layers.0.fc1.weight"),
    ],
)
def test_missing_base_prefix_is_added_but_not_to_heads(
    model_type: str, stored: str, expected: str
) -> None:
    config = Config(values={"model_type": model_type})
    names = (stored, HEAD, "score.weight")
    assert rename(*names, config=config) == {stored: expected}


def test_names_of_transformers_stay() -> None:
    config = Config(values={"model_type": "an unknown model"})
    assert rename("layers.0.w", config=config) == {}
    assert rename("model.layers.0.w", "layers.0.w") == {}


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(CheckpointError, match=r"found '_orig_mod.a' and 'a'; remove one"):
        rename("_orig_mod.a", "a")


def test_renames_are_described(tmp_path: Path) -> None:
    values = torch.randn(4, 3)
    source = Checkpoint.open(
        save(
            tmp_path / "m",
            {"module._orig_mod.layers.0.w": values, "module._orig_mod.norm.w": values.clone()},
        )
    )
    assert list(source.specs) == ["model.layers.0.w", "model.norm.w"]
    assert torch.equal(source.read(["model.layers.0.w"])["model.layers.0.w"], values)
    assert torch.equal(source.read_rows("model.norm.w", 1, 3), values[1:3])
    removed, module, added = source.shards.notes
    assert removed.startswith("2 tensors renamed: a wrapper of training tools removed")
    assert "module. of data parallel training removed" in module
    assert added == "2 tensors renamed: the prefix model. added, which transformers expects"
    assert source.compute_hashes()  # the files did not change, though their names differ


@pytest.mark.parametrize("metadata", [{EMBEDDING: HEAD}, {}])
def test_tied_head_stands_for_the_embedding(metadata: dict[str, str], tmp_path: Path) -> None:
    values = torch.randn(8, 3)
    tied = {"tie_word_embeddings": True, "metadata": metadata}
    source = Checkpoint.open(save(tmp_path / "m", {HEAD: values}, **tied))
    assert torch.equal(source.read([EMBEDDING])[EMBEDDING], values)
    assert list(source.specs) == [EMBEDDING]  # the plan leaves no second head out
    assert source.shards.notes == (
        f"{EMBEDDING} is stored as {HEAD}, to which config.json ties it",
    )


def test_head_that_metadata_ties_needs_no_tensor(tmp_path: Path) -> None:
    tied = {"tie_word_embeddings": True, "metadata": {HEAD: EMBEDDING}}
    source = Checkpoint.open(save(tmp_path / "m", {EMBEDDING: torch.randn(8, 3)}, **tied))
    assert list(source.specs) == [EMBEDDING] and source.shards.notes == ()


def test_metadata_ties_what_config_does_not(tmp_path: Path) -> None:
    values = torch.randn(8, 3)
    untied = {"tie_word_embeddings": False, "metadata": {EMBEDDING: HEAD}}
    source = Checkpoint.open(save(tmp_path / "m", {HEAD: values}, **untied))
    assert torch.equal(source.read([EMBEDDING])[EMBEDDING], values)
    assert source.shards.notes == (f"{EMBEDDING} is not stored: it is tied to {HEAD}",)


def test_head_of_an_untied_model_is_no_embedding(tmp_path: Path) -> None:
    source = Checkpoint.open(
        save(tmp_path / "m", {HEAD: torch.randn(8, 3)}, tie_word_embeddings=False)
    )
    assert list(source.specs) == [HEAD]


def test_metadata_cannot_name_what_is_not_stored(tmp_path: Path) -> None:
    source = Checkpoint.open(save(tmp_path / "m", {EMBEDDING: torch.ones(2)}, metadata={"a": "b"}))
    assert list(source.specs) == [EMBEDDING]


def write_shards(folder: Path, count: int, total: int) -> Path:
    """Write the first `count` shards of `total`, without an index."""
    save(folder, {"w": torch.ones(2)})
    (folder / "model.safetensors").unlink()
    for i in range(1, count + 1):
        save_file({f"w{i}": torch.ones(i)}, folder / f"model-{i:05d}-of-{total:05d}.safetensors")
    return folder


@pytest.mark.parametrize("count", [1, 3])
def test_whole_set_of_shards_needs_no_index(count: int, tmp_path: Path) -> None:
    source = Checkpoint.open(write_shards(tmp_path / "m", count, count))
    assert list(source.specs) == [f"w{i}" for i in range(1, count + 1)]
    assert "without an index" in source.shards.notes[0]


def test_missing_shard_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="without an index; fetch the index, or all shards"):
        Checkpoint.open(write_shards(tmp_path / "m", 2, 3))


def test_weight_file_of_another_name_is_named(tmp_path: Path) -> None:
    folder = save(tmp_path / "m", {"w": torch.ones(2)})
    (folder / "model.safetensors").rename(folder / "merged.safetensors")
    with pytest.raises(CheckpointError, match="found merged.safetensors; rename it to model.safe"):
        Checkpoint.open(folder)
