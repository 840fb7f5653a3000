"""FP8 weights in blocks: independent arithmetic, a real model's BF16 twin, mismatched scales."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from quantkit.checkpoint import fp8
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CheckpointError
from quantkit.io import package_data

CONFIG = {
    "model_type": "x",
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [2, 2]},
}
WEIGHT = torch.ones(3, 3).to(torch.float8_e4m3fn)
SCALE = torch.tensor([[1.0, 2], [3, 4]])


def save(folder: Path, *shards: dict[str, Tensor], config: object = CONFIG) -> Path:
    """Write a checkpoint of shards with an index."""
    (folder / "config.json").write_text(json.dumps(config))
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"{number}.safetensors")
    weight_map = {
        name: f"{number}.safetensors" for number, shard in enumerate(shards) for name in shard
    }
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    return folder


def test_worked_example_of_partial_blocks(tmp_path: Path) -> None:
    opened = Checkpoint.open(save(tmp_path, {"a.weight": WEIGHT, "a.weight_scale_inv": SCALE}))
    assert list(opened.specs) == ["a.weight"]
    assert opened.specs["a.weight"].dtype == "F8_E4M3"
    assert set(opened.stored_specs) == {"a.weight", "a.weight_scale_inv"}
    read = opened.read(["a.weight"])["a.weight"]
    assert read.dtype == torch.bfloat16
    assert read.tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]
    assert opened.read_rows("a.weight", 1, 3).tolist() == [[1, 1, 2], [3, 3, 4]]
    blocks = opened.read_fp8_blocks("a.weight")
    assert torch.equal(blocks.codes.view(torch.uint8), WEIGHT.view(torch.uint8))
    assert torch.equal(blocks.scale, SCALE)
    assert torch.equal(blocks.values, read)


def compressed_tensors_config(*structures: list[int]) -> dict[str, object]:
    """Return config.json of a compressed-tensors artifact: a group of codes, and one per block
    structure.
    """
    weights: list[dict[str, object]] = [
        {"num_bits": 4},
        *({"block_structure": size} for size in structures),
    ]
    groups = {f"group_{number}": {"weights": weight} for number, weight in enumerate(weights)}
    return {"quantization_config": {"quant_method": "compressed-tensors", "config_groups": groups}}


def test_compressed_tensors_artifact_names_its_scales_weight_scale(tmp_path: Path) -> None:
    """compressed-tensors uses weight_scale for packed codes too, which stay separate tensors."""
    tensors = {
        "a.weight": WEIGHT,
        "a.weight_scale": SCALE,
        "b.weight_packed": torch.ones(2, 2, dtype=torch.int32),
    }
    shards = tensors, {"b.weight_scale": torch.ones(2, 2).bfloat16()}
    opened = Checkpoint.open(save(tmp_path, *shards, config=compressed_tensors_config([2, 2])))
    assert sorted(opened.specs) == ["a.weight", "b.weight_packed", "b.weight_scale"]
    assert opened.read(["a.weight"])["a.weight"].tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]


@pytest.mark.parametrize(
    ("change", "config", "message"),
    [
        (
            {"a.weight_scale": None},
            compressed_tensors_config([2, 2]),
            "expected its scale 'a.weight_scale', found none",
        ),
        (
            {"a.weight_scale": SCALE[:1]},
            compressed_tensors_config([2, 2]),
            r"expected a scale of shape \[2, 2\]",
        ),
        (
            {"a.weight": WEIGHT.float()},
            compressed_tensors_config([2, 2]),
            "expected 'a.weight' of this scale as F8_E4M3, found F32",
        ),
        (
            {},
            compressed_tensors_config(),
            "config_groups: block_structure: expected two positive integers",
        ),
    ],
)
def test_faults_name_the_tensors(
    tmp_path: Path, change: dict[str, Tensor | None], config: object, message: str
) -> None:
    tensors = {"a.weight": WEIGHT, "a.weight_scale": SCALE, **change}
    shard = {name: tensor.contiguous() for name, tensor in tensors.items() if tensor is not None}
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(save(tmp_path, shard, config=config))


def cast_like_deepseek(weight: Tensor, scale: Tensor, block: int) -> Tensor:
    """FP8 -> float32, times the scale of its block, -> bfloat16: element by element, without shared
    code.
    """
    values = weight.to(torch.float32)
    rows = torch.arange(weight.shape[0])[:, None] // block
    columns = torch.arange(weight.shape[1])[None, :] // block
    return (values * scale[rows, columns]).to(torch.bfloat16)


@pytest.mark.parametrize("strip_elements", [1, 6, 1 << 17])
def test_dequantization_equals_deepseeks_for_every_byte_and_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, strip_elements: int
) -> None:
    monkeypatch.setattr(fp8, "_STRIP_ELEMENTS", strip_elements)
    generator = torch.Generator().manual_seed(0)
    codes = torch.arange(256, dtype=torch.uint8)
    codes = codes[(codes & 0x7F) != 0x7F]  # all that are numbers
    for out_features, in_features in ((3, 5), (4, 4), (7, 2), (1, 9)):
        pick = torch.randint(len(codes), (out_features, in_features), generator=generator)
        weight = codes[pick].view(torch.float8_e4m3fn)
        scale = torch.rand(-(-out_features // 2), -(-in_features // 2), generator=generator) * 1e-3
        opened = Checkpoint.open(save(tmp_path, {"w": weight, "w_scale_inv": scale}))
        expected = cast_like_deepseek(weight, scale, 2)
        assert torch.equal(opened.read(["w"])["w"], expected)
        for start in range(out_features):
            assert torch.equal(opened.read_rows("w", start, out_features), expected[start:])


def test_scale_may_be_in_another_shard(tmp_path: Path) -> None:
    opened = Checkpoint.open(save(tmp_path, {"a.weight": WEIGHT}, {"a.weight_scale_inv": SCALE}))
    assert opened.read(["a.weight"])["a.weight"].tolist() == [[1, 1, 2], [1, 1, 2], [3, 3, 4]]


@pytest.mark.parametrize("where", ["shared", "package"])
def test_tiny_model_in_fp8_is_close_to_its_bf16_twin(where: str) -> None:
    shared = Path(__file__).parents[3] / "shared" / "tiny-v3"
    folder = package_data.locate_model("builtin:tiny-v3") if where == "package" else shared / "fp8"
    if not folder.is_dir() or not (shared / "bf16").is_dir():
        pytest.skip("the BF16 twin of tiny-v3 is not on this machine")
    opened = Checkpoint.open(folder)
    original = load_file(shared / "bf16" / "model.safetensors")
    assert set(opened.specs) == set(original)
    n_fp8, n_partial = 0, 0
    for name, spec in opened.specs.items():
        read = opened.read([name])[name].float()
        expected = original[name].float()
        if spec.dtype != "F8_E4M3":
            assert torch.equal(read, expected)
            continue
        n_fp8 += 1
        n_partial += spec.shape[0] % 128 != 0
        error = (read - expected).norm() / expected.norm()
        assert 0.005 < error < 0.04  # three mantissa bits: 2**-4 at most, uniformly spread
        last = spec.shape[0] // 128 * 128
        assert (
            last == spec.shape[0] or (read - expected)[last:].norm() < 0.04 * expected[last:].norm()
        )
    assert n_fp8 > 100
    assert n_partial > 0


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (
            {"a.weight": WEIGHT},
            CONFIG,
            "F: tensor 'a.weight': expected its scale 'a.weight_scale_inv', found none in any "
            "file; fetch the checkpoint again",
        ),
        (
            {"a.weight": WEIGHT, "a.weight_scale_inv": torch.ones(1, 2)},
            CONFIG,
            "F: tensor 'a.weight': expected a scale of shape [2, 2] for [3, 3] in blocks of [2, "
            "2], found [1, 2]; fetch the checkpoint again",
        ),
        (
            {"a.weight": WEIGHT, "a.weight_scale_inv": SCALE.to(torch.int32)},
            CONFIG,
            "F: tensor 'a.weight': expected a scale of F32, BF16, F16, F8_E8M0, U8, found "
            "I32; fetch the checkpoint again",
        ),
        (
            {"a.weight_scale_inv": SCALE},
            CONFIG,
            "F: tensor 'a.weight_scale_inv': expected the weight 'a.weight' of this scale, found "
            "none in any file; fetch the checkpoint again",
        ),
        (
            {"a.weight": torch.ones(3, 3), "a.weight_scale_inv": SCALE},
            CONFIG,
            "F: tensor 'a.weight_scale_inv': expected 'a.weight' of this scale as F8_E4M3, found "
            "F32; fetch the checkpoint again",
        ),
        (
            {"a.weight": WEIGHT[0]},
            CONFIG,
            "F: tensor 'a.weight': expected two or three dimensions for FP8, found shape [3]; "
            "convert it to BF16",
        ),
        (
            {"a": torch.ones(2).to(torch.float8_e5m2)},
            CONFIG,
            "F: tensor 'a': expected FP8 as F8_E4M3, found F8_E5M2; convert it to BF16",
        ),
        (
            {"a.weight": WEIGHT, "a.weight_scale_inv": SCALE},
            {"quantization_config": {"weight_block_size": [0, True]}},
            "F: tensor 'a.weight': quantization_config.weight_block_size: expected two positive "
            "integers, as the weight [3, 3] is FP8 with scales [2, 2], found [0, True]; add the "
            "size of the blocks",
        ),
    ],
)
def test_mismatched_weights_and_scales_are_rejected(
    tmp_path: Path, tensors: dict[str, Tensor], config: object, message: str
) -> None:
    folder = save(tmp_path, tensors, config=config)
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder)
    assert str(caught.value).replace(str(tmp_path), "F") == message
