"""Builds from encoded sources: the same artifact and figures as from the dequantized weights."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint
from support.encoded import EXAMPLES, write_encoded

from quantkit.plan.summary import summarize_plan

RECIPE = {
    "quantize": "{method: rtn, bits: 4, group_size: 32}",
    "format": "compressed_tensors",
    "calibration": "{set: tiny-v3, sequences: 4, length: 32}",
    "fidelity": "{set: tiny-v3-heldout, windows: 2, length: 32}",
    "rules": '[{match: "*.o_proj", keep: source}, {match: "*_proj", quantize: {}}]',
}


@pytest.mark.parametrize("name", EXAMPLES)
def test_build_equals_that_of_the_dequantized_source(tmp_path: Path, name: str) -> None:
    plain, encoded, decoded = (tmp_path / part for part in ("plain", "encoded", "decoded"))
    write_checkpoint(plain, make_tiny_config("llama"))
    write_encoded(plain, encoded, decoded, EXAMPLES[name])
    summary = summarize_plan(make_plan(encoded, **RECIPE))
    assert summary.source.dtype == EXAMPLES[name].label
    assert summary.source.compared_with == f"BF16 dequantization of {EXAMPLES[name].label}"
    results = [
        build(folder, tmp_path / f"out-{folder.name}", **RECIPE) for folder in (encoded, decoded)
    ]
    reports = [result.fidelity for result in results]
    assert reports[0].source.baseline == f"BF16 dequantization of {EXAMPLES[name].label}"
    assert reports[1].source.baseline == "BF16"
    assert reports[0].distribution == reports[1].distribution
    assert reports[0].distribution[0].kl_mean.value > 0
    own, twin = (load_file(result.path / "model.safetensors") for result in results)
    is_fp8 = EXAMPLES[name].label.startswith("FP8 128x128")
    for key, tensor in twin.items():
        if not is_fp8 or ".o_proj." not in key:
            assert torch.equal(own[key], tensor), key
    entry = json.loads((results[0].path / "config.json").read_text())["quantization_config"]
    assert entry["quant_method"] == "compressed-tensors"
    if not is_fp8:
        assert (
            entry
            == json.loads((results[1].path / "config.json").read_text())["quantization_config"]
        )
