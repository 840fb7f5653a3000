"""Every tensor of a source is in the artifact or has a listed reason; others are faults."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint
from support.gpt_oss import write_gpt_oss, write_mxfp4

from quantkit.artifact.account_tensors import (
    account_tensors,
    list_held_names,
    map_stored_tensors,
)
from quantkit.artifact.layout import FIDELITY, SINGLE
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import ArtifactError
from quantkit.report.make import account_source
from quantkit.verify.deep import verify_deep

KEYS = {
    "quantize": "{method: rtn, bits: 4, group_size: 64}",
    "calibration": "null",
    "fidelity": "none",
    "rules": "all-linear",
}
INV_FREQ = "model.layers.0.self_attn.rotary_emb.inv_freq"


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """A llama with a tied head that is stored twice, and a rotary table."""
    config = make_tiny_config("llama", num_hidden_layers=1, tie_word_embeddings=True)
    folder = write_checkpoint(tmp_path / "source", config)
    tensors = load_file(folder / SINGLE)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors[INV_FREQ] = torch.ones(8)
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    return folder


def test_report_and_verify_count_every_tensor(source: Path, tmp_path: Path) -> None:
    n_tensors = len(load_file(source / SINGLE))
    artifact = build(source, tmp_path / "out", **KEYS).path
    said = json.loads((artifact / FIDELITY).read_text())["source_tensors"]
    assert said.startswith(
        f"{n_tensors} accounted for: {n_tensors - 2} in the artifact, 2 left out ("
    )
    assert "source tensors" in (artifact / "README.md").read_text()
    account = verify_deep(artifact, None, 1, 0, lambda _: None).account
    assert account.describe() == said
    assert {name for names in account.left_out.values() for name in names} == {
        "lm_head.weight",
        INV_FREQ,
    }
    check_planted_faults(source, artifact)


def check_planted_faults(source: Path, artifact: Path) -> None:
    """Remove a norm, then the codes of a linear, from the artifact: the build refuses each."""
    plan, opened = make_plan(source, **KEYS), Checkpoint.open(source, decode=True)
    tensors = load_file(artifact / SINGLE)
    assert account_source(plan, opened, artifact).missing == ()
    for gone in ("model.norm.", "model.layers.0.mlp.down_proj."):
        left = {name: value for name, value in tensors.items() if not name.startswith(gone)}
        assert len(left) < len(tensors)
        save_file(left, artifact / SINGLE, metadata={"format": "pt"})
        with pytest.raises(ArtifactError, match=f"found neither for {gone}weight; start over"):
            account_source(plan, opened, artifact)
    save_file(tensors, artifact / SINGLE, metadata={"format": "pt"})
    forgotten = replace(plan, left_out=())  # a reason that nobody lists
    with pytest.raises(ArtifactError, match="found neither for"):
        account_source(forgotten, opened, artifact)


def test_codes_scales_and_weights_are_one_logical_tensor(tmp_path: Path) -> None:
    """Both stored tensors of an FP8 weight are accounted for by the weight, and lost with it."""
    folder = write_checkpoint(tmp_path / "fp8", make_tiny_config("deepseek_v3"), fp8=True)
    checkpoint = Checkpoint.open(folder, decode=True)
    made = map_stored_tensors(checkpoint)
    scales = [name for name in made if name.endswith("_scale_inv")]
    assert scales and all(made[name] == (name.removesuffix("_scale_inv"),) for name in scales)
    names = set(checkpoint.specs)
    assert account_tensors(checkpoint, {}, (), (), names).missing == ()
    weight = scales[0].removesuffix("_scale_inv")
    lost = account_tensors(checkpoint, {}, (), (), names - {weight})
    assert set(lost.missing) == {weight, scales[0]}


def test_codes_of_experts_together_are_parts_of_every_expert(tmp_path: Path) -> None:
    """Copied as they are stored, or one by one; codes, scales and biases are lost by their name."""
    plain = write_gpt_oss(tmp_path / "a", num_hidden_layers=1, layer_types=["full_attention"])
    folder = write_mxfp4(plain, tmp_path / "b")
    blocks = make_plan(folder, **KEYS).layout.blocks
    opened = Checkpoint.open(folder, decode=True).split_experts(blocks)
    module, made = "model.layers.0.mlp.experts", map_stored_tensors(opened)
    singles = tuple(f"{module}.{e}.down_proj.weight" for e in range(4))
    assert made[f"{module}.down_proj_blocks"] == made[f"{module}.down_proj_scales"] == singles
    together = list_held_names(Checkpoint.open(folder).split_experts(blocks))
    assert account_tensors(opened, {}, (), (), together).missing == ()
    assert account_tensors(opened, {}, (), (), set(opened.specs)).missing == ()
    lost = account_tensors(opened, {}, (), (), set(opened.specs) - {singles[1]})
    assert set(lost.missing) == {f"{module}.down_proj_blocks", f"{module}.down_proj_scales"}
    tensors = load_file(folder / SINGLE)
    del tensors[f"{module}.down_proj_bias"]
    save_file(tensors, folder / SINGLE, metadata={"format": "pt"})
    fewer = list_held_names(Checkpoint.open(folder).split_experts(blocks))
    assert account_tensors(opened, {}, (), (), fewer).missing == (f"{module}.down_proj_bias",)
