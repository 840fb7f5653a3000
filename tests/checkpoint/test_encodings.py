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
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from quantkit.checkpoint import strips
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.encoding import remove_quantization
from quantkit.checkpoint.logical_tensors import find_logical_tensors
from quantkit.errors import CheckpointError
from quantkit.numerics.microscaling import decode_scale

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


def test_fused_experts_of_gpt_oss_equal_transformers(tmp_path: Path) -> None:
    """transformers computes with [experts, in, out], the transpose of the stored tensors."""
    generator = torch.Generator().manual_seed(0)
    blocks = torch.randint(256, (3, 8, 4, 16), dtype=torch.uint8, generator=generator)
    scales = torch.randint(110, 130, (3, 8, 4), dtype=torch.uint8, generator=generator)
    expected = convert_moe_packed_tensors(blocks, scales)
    tensors = {"m.down_proj_blocks": blocks, "m.down_proj_scales": scales}
    tensors["m.down_proj_bias"] = torch.ones(3, 8).bfloat16()
    opened = Checkpoint.open(save(tmp_path, tensors, {"quant_method": "mxfp4"}), decode=True)
    assert opened.specs["m.down_proj"].shape == (3, 128, 8)
    assert torch.equal(opened.read(["m.down_proj"])["m.down_proj"], expected)
    assert torch.equal(opened.read_rows("m.down_proj", 1, 2), expected[1:2])
    assert opened.specs["m.down_proj_bias"].dtype == "BF16"


@pytest.mark.parametrize("shape", [(3, 1, 1), (3,), (3, 8, 1), (3, 4, 3)])
def test_fused_experts_in_fp8_have_scales_of_their_own(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 8, 6, generator=generator).to(torch.float8_e4m3fn)
    scale = torch.rand(shape, generator=generator) + 0.5
    full = scale.reshape(*shape, *[1] * (3 - len(shape)))
    for axis, size in enumerate(weight.shape):
        full = full.repeat_interleave(size // full.shape[axis], axis)
    entry = {"quant_method": "fp8", "weight_block_size": [2, 2] if shape == (3, 4, 3) else None}
    tensors = {"m.gate_up_proj": weight, "m.gate_up_proj_scale_inv": scale}
    opened = Checkpoint.open(save(tmp_path, tensors, entry), decode=True)
    expected = (weight.float() * full).bfloat16()
    assert torch.equal(opened.read(["m.gate_up_proj"])["m.gate_up_proj"], expected)
    assert torch.equal(opened.read_rows("m.gate_up_proj", 1, 3), expected[1:])


def test_every_e8m0_scale_is_a_power_of_two() -> None:
    codes = torch.arange(256, dtype=torch.uint8)
    scale = decode_scale(codes)
    assert scale[:255].tolist() == [2.0 ** (code - 127) for code in range(255)]
    assert torch.isnan(scale[255])
    assert torch.equal(decode_scale(codes[:255].view(torch.float8_e8m0fnu)), scale[:255])


@pytest.mark.parametrize(("part", "value"), [("m.weight_scale", 255), ("m.weight", 0)])
def test_values_that_are_no_numbers_are_refused(tmp_path: Path, part: str, value: int) -> None:
    tensors = {
        "m.weight_packed": torch.full((2, 16), 1, dtype=torch.uint8),
        "m.weight_scale": torch.full((2, 1), 127, dtype=torch.uint8),
    }
    entry = EXAMPLES["mxfp4-compressed"].config
    if part in tensors:
        tensors[part][1, 0] = value
        opened = Checkpoint.open(save(tmp_path, tensors, entry), decode=True)
        with pytest.raises(CheckpointError, match=r"tensor 'm\.weight': expected finite values"):
            opened.read(["m.weight"])
    else:
        opened = Checkpoint.open(save(tmp_path, tensors, entry), decode=True)
        assert opened.read(["m.weight"])["m.weight"].unique().tolist() == [0.0, 0.5]


def test_stated_shapes_and_groups_are_checked_when_read(tmp_path: Path) -> None:
    tensors, _ = encode(EXAMPLES["int4-packed-g-idx"])
    for name, value, message in (
        ("m.weight_shape", torch.tensor([ROWS, COLUMNS - 32]), "expected \\[160, 192\\] by codes"),
        ("m.weight_g_idx", torch.full((COLUMNS,), 6, dtype=torch.int32), "expected groups 0 to 5"),
    ):
        folder = save(tmp_path / name, {**tensors, name: value}, EXAMPLES["int4-packed"].config)
        opened = Checkpoint.open(folder, decode=True)
        with pytest.raises(CheckpointError, match=message):
            opened.read(["m.weight"])


def test_groups_of_different_bits_are_told_apart_by_name_and_shape(tmp_path: Path) -> None:
    """Expressions of llm-compressor may be unsafe to run: shapes then decide."""
    four, expected = EXAMPLES["int4-packed"].encode(make_weight())
    three, other = EXAMPLES["int3-packed"].encode(make_weight(1))
    tensors = {f"a.{name}": part for name, part in four.items()}
    tensors |= {f"b.{name}": part for name, part in three.items()}
    groups = {}
    for number, name in enumerate(("int4-packed", "int3-packed")):
        (group,) = EXAMPLES[name].config["config_groups"].values()  # type: ignore[attr-defined]
        groups[str(number)] = {**group, "targets": [r"re:(.*)*(a|b)$"]}
    entry = {"quant_method": "compressed-tensors", "config_groups": groups}
    opened = Checkpoint.open(save(tmp_path, tensors, entry), decode=True)
    assert torch.equal(opened.read(["a.weight"])["a.weight"], expected)
    assert torch.equal(opened.read(["b.weight"])["b.weight"], other)


def test_quantization_config_of_a_text_config_is_read_and_removed(tmp_path: Path) -> None:
    tensors, expected = encode(EXAMPLES["int4-packed"])
    folder = save(tmp_path, tensors, {})
    config = {
        "model_type": "x",
        "text_config": {"quantization_config": EXAMPLES["int4-packed"].config},
    }
    (folder / "config.json").write_text(json.dumps(config))
    opened = Checkpoint.open(folder, decode=True)
    assert torch.equal(opened.read(["m.weight"])["m.weight"], expected)
    assert remove_quantization(config) == {"model_type": "x", "text_config": {}}


@pytest.mark.parametrize("dtype", [torch.float8_e8m0fnu, torch.uint8])
def test_fp8_blocks_give_powers_of_two_as_float32(tmp_path: Path, dtype: torch.dtype) -> None:
    """An artifact stores them as compressed-tensors does, in float32."""
    codes = torch.randn(130, 129).to(torch.float8_e4m3fn)
    scale = torch.tensor([[127, 120], [128, 0]], dtype=torch.uint8)
    tensors = {"m.weight": codes, "m.weight_scale_inv": scale.view(dtype)}
    entry = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    blocks = Checkpoint.open(save(tmp_path, tensors, entry)).read_fp8_blocks("m.weight")
    assert blocks.scale.dtype == torch.float32
    assert blocks.scale.tolist() == [[1.0, 2.0**-7], [2.0, 2.0**-127]]
    assert torch.equal(blocks.values[:128, :128], codes[:128, :128].bfloat16())


def test_shape_of_nf4_needs_the_files(tmp_path: Path) -> None:
    tensors, _ = encode(EXAMPLES["nf4"])
    opened = Checkpoint.open(save(tmp_path, tensors, EXAMPLES["nf4"].config), decode=True)
    with pytest.raises(CheckpointError, match="download the model and give its folder as source"):
        find_logical_tensors(opened.config, opened.stored_specs, "org/name")
