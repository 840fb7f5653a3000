"""Source encodings: decoded bit for bit as their owners do, by rows, and refused if malformed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.encoded import EXAMPLES, Example
from torch import Tensor

from quantkit.checkpoint import strips
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CheckpointError

ROWS, COLUMNS = 160, 192


def save(folder: Path, tensors: Mapping[str, Tensor], entry: Mapping[str, object]) -> Path:
    """Write a checkpoint of one file."""
    folder.mkdir(exist_ok=True)
    save_file(
        {name: tensor.clone().contiguous() for name, tensor in tensors.items()},
        folder / "model.safetensors",
    )
    config = {"model_type": "x", "quantization_config": entry} if entry else {"model_type": "x"}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def make_weight(seed: int = 0) -> Tensor:
    """Return a random weight with rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(ROWS, COLUMNS, generator=generator)
    return weight * torch.rand(ROWS, 1, generator=generator).exp2()


def encode(example: Example) -> tuple[dict[str, Tensor], Tensor]:
    """Return the tensors of a module m in an encoding, and the weight they stand for."""
    parts, expected = example.encode(make_weight())
    return {f"m.{name}": part for name, part in {**parts, **example.extra}.items()}, expected


@pytest.mark.parametrize("name", EXAMPLES)
def test_weights_equal_the_owners_dequantization_bit_for_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(strips, "STRIP_ELEMENTS", 5 * COLUMNS)
    example = EXAMPLES[name]
    tensors, expected = encode(example)
    opened = Checkpoint.open(save(tmp_path, tensors, example.config), decode=True)
    assert list(opened.specs) == ["m.weight"]
    assert opened.specs["m.weight"].shape == (ROWS, COLUMNS)
    assert opened.logical.encoded["m.weight"].label == example.label
    assert sorted(opened.logical.unused) == sorted(f"m.{part}" for part in example.extra)
    weight = opened.read(["m.weight"])["m.weight"]
    assert weight.dtype == expected.dtype
    assert torch.equal(weight.view(torch.int16), expected.view(torch.int16))
    for start, stop in ((0, 1), (7, 131), (159, 160), (3, 3)):
        assert torch.equal(opened.read_rows("m.weight", start, stop), expected[start:stop])
    with pytest.raises(CheckpointError, match="expected rows within"):
        opened.read_rows("m.weight", 100, ROWS + 1)


def test_weights_have_the_dtype_of_the_model(tmp_path: Path) -> None:
    """AWQ stores float16 scales; a bfloat16 model rounds the product once, to bfloat16."""
    tensors, expected = encode(EXAMPLES["awq"])
    folder = save(tmp_path, tensors, EXAMPLES["awq"].config)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    opened = Checkpoint.open(folder, decode=True)
    assert opened.specs["m.weight"].dtype == "BF16"
    weight = opened.read(["m.weight"])["m.weight"]
    assert weight.dtype == torch.bfloat16
    assert (weight.float() - expected.float()).abs().max() <= expected.float().abs().max() * 2**-8


@pytest.mark.parametrize("name", EXAMPLES)
def test_codes_of_the_example_differ_between_rows(name: str) -> None:
    """The comparison can fail: no two rows of the expected weight are equal."""
    _, expected = EXAMPLES[name].encode(make_weight())
    assert len(expected.unique(dim=0)) == ROWS
    assert (expected.float() - make_weight()).norm() < 0.3 * make_weight().norm()


@pytest.mark.parametrize("name", EXAMPLES)
def test_missing_and_misshaped_parts_are_refused_from_the_headers(
    tmp_path: Path, name: str
) -> None:
    example = EXAMPLES[name]
    tensors, _ = encode(example)
    opened = Checkpoint.open(save(tmp_path / "good", tensors, example.config), decode=True)
    parts = opened.logical.encoded["m.weight"].parts
    optional = {"zero", "g_idx", "shape"}
    for part, spec in parts.items():
        if part in ("codes", "state"):
            continue
        longer = torch.cat([tensors[spec.name].reshape(-1).view(torch.uint8)] * 3).view(
            tensors[spec.name].dtype
        )
        changes: list[dict[str, Tensor]] = [{**tensors, spec.name: longer}]
        if part not in optional:
            changes.append({key: value for key, value in tensors.items() if key != spec.name})
        for number, changed in enumerate(changes):
            folder = save(tmp_path / f"{part}{number}", changed, example.config)
            with pytest.raises(CheckpointError, match=r"tensor 'm\.\w+'.*expected"):
                Checkpoint.open(folder, decode=True)
