"""Folders that are no source: each form of weights gets one sentence with the one right step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CheckpointError

EXPECTED = "F: expected model.safetensors or model.safetensors.index.json"


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (
            ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json"),
            f"{EXPECTED}, found an adapter (LoRA) without its base model; merge it with peft "
            "(merge_and_unload, then save_pretrained into a new folder), and use that folder",
        ),
        (
            ("tiny-Q4_K_M.gguf", "README.md"),
            f"{EXPECTED}, found GGUF files (tiny-Q4_K_M.gguf), quantized for llama.cpp; use the "
            "model that they were made from, which their model card names",
        ),
        (
            ("config.json", "model.pt"),
            f"{EXPECTED}, found pickled weights (model.pt) only; quantkit reads safetensors only, "
            "convert them with transformers (from_pretrained, then save_pretrained into a new "
            "folder)",
        ),
        (
            ("config.json", "params.json", "consolidated.safetensors"),
            f"{EXPECTED}, found consolidated.safetensors only, whose tensors have Mistral's own "
            "names; fetch the files of the repository that transformers reads",
        ),
    ],
)
def test_folder_of_another_form_is_one_sentence(
    tmp_path: Path, names: tuple[str, ...], message: str
) -> None:
    for name in names:
        (tmp_path / name).write_text("{}")
    for read in (Checkpoint.open, lambda folder: hub.read_model_headers(str(folder))):
        with pytest.raises(CheckpointError) as caught:
            read(tmp_path)
        assert str(caught.value).replace(str(tmp_path), "F") == message


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x.gguf", "expected a folder of safetensors, found the GGUF file x.gguf"),
        ("model.safetensors", "expected the folder of a model, found the file model.safetensors"),
    ],
)
def test_a_file_is_no_model(tmp_path: Path, name: str, message: str) -> None:
    (tmp_path / name).write_bytes(b"GGUF")
    with pytest.raises(CheckpointError) as caught:
        hub.resolve_model(str(tmp_path / name))
    assert message in str(caught.value)


def write(folder: Path, tensors: dict[str, torch.Tensor], entry: object) -> Path:
    """Write a checkpoint of one file."""
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_text(
        json.dumps({"model_type": "x", "quantization_config": entry})
    )
    return folder


@pytest.mark.parametrize("method", ["bitsandbytes", "mxfp4", "gptq"])
def test_quantization_of_plain_weights_is_stale_and_ignored(tmp_path: Path, method: str) -> None:
    """QLoRA merged into BF16 weights, and a BF16 gpt-oss that states MXFP4."""
    folder = write(tmp_path, {"a.weight": torch.ones(2, 2).bfloat16()}, {"quant_method": method})
    opened = Checkpoint.open(folder, decode=True)
    assert opened.logical.notes == (
        f"config.json: quantization_config states {method}, but no weight is stored in codes (all "
        "are BF16): the entry is stale and ignored, the weights are used as they are",
    )
    assert opened.logical.describe() == opened.logical.notes
    assert opened.read(["a.weight"])["a.weight"].dtype == torch.bfloat16


def test_many_weights_with_one_fault_are_one_sentence(tmp_path: Path) -> None:
    tensors = {f"{n}.weight": torch.ones(4, 4, dtype=torch.int8) for n in range(20)}
    tensors |= {f"{n}.weight_scale": torch.ones(3, 1) for n in range(20)}
    folder = write(tmp_path, tensors, {"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, decode=True)
    assert str(caught.value) == (
        f"{folder}: tensor '0.weight' and 19 more: expected one scale per tensor, row or group for "
        "[4, 4], found shape [3, 1]; fetch the checkpoint again"
    )


def test_codes_of_an_unknown_quantization_name_its_method(tmp_path: Path) -> None:
    tensors = {f"{n}.weight": torch.ones(4, 4, dtype=torch.uint8) for n in "ab"}
    folder = write(tmp_path, tensors, {"quant_method": "hqq"})
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(folder, decode=True)
    (line,) = str(caught.value).splitlines()
    assert "tensor 'a.weight' and 1 more: expected floating point numbers or an encoding" in line
    assert line.endswith(
        "found U8 [4, 4] and quantization_config.quant_method hqq; start from the original weights"
    )


def test_a_weight_both_plain_and_in_codes_is_refused(tmp_path: Path) -> None:
    tensors = {
        "a.weight_packed": torch.zeros(4, 16, dtype=torch.uint8),
        "a.weight_scale": torch.ones(4, 1, dtype=torch.uint8),
        "a.weight": torch.ones(4, 32),
    }
    folder = write(tmp_path, tensors, {"quant_method": "compressed-tensors"})
    with pytest.raises(CheckpointError, match="expected the weight once, found it plain and in"):
        Checkpoint.open(folder, decode=True)
