"""Checkpoints with tensors that no engine reads, other names, or another head."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.builds import build
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint
from transformers import AutoModel, AutoModelForSequenceClassification

from quantkit.artifact.layout import PLAN
from quantkit.errors import CheckpointError, RecipeError
from quantkit.plan import sources
from quantkit.plan.model_recipe import read_target
from quantkit.plan.recipe_draft import RecipeRequest
from quantkit.verify.deep import verify_deep
from quantkit.verify.shallow import verify_artifact

pytestmark = pytest.mark.usefixtures("quick_builds")

RTN = {
    "quantize": "{method: rtn, bits: 8, group_size: 64, symmetric: true}",
    "format": "compressed_tensors",
    "rules": "all-linear",
    "calibration": "null",
}
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"
NO_TEXT = {"fidelity": "none"}


def write(folder: Path, **changes: object) -> Path:
    """Write a small Qwen3 with a tied head."""
    config = make_tiny_config("qwen3", tie_word_embeddings=True, **changes)
    return write_checkpoint(folder, config)


def change_tensors(folder: Path, change: Any) -> Path:
    """Replace the tensors of a checkpoint by change(tensors)."""
    path = folder / "model.safetensors"
    save_file(change(load_file(path)), path, metadata={"format": "pt"})
    return folder


def change_config(folder: Path, **changes: object) -> Path:
    """Change keys of config.json."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))
    return folder


def add_clutter(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Add what trainers, old libraries and other quantizers leave; wrap every name."""
    block = "model.layers.0.self_attn"
    extra = {
        HEAD: tensors[EMBEDDING].clone(),
        f"{block}.rotary_emb.inv_freq": torch.ones(16),
        f"{block}.bias": torch.ones(1, 1, 8, 8, dtype=torch.bool),
        f"{block}.masked_bias": torch.tensor(-1e4),
        f"{block}.q_proj.bias": torch.zeros(len(tensors[f"{block}.q_proj.weight"])),
    }
    return {f"_orig_mod.{name}": tensor for name, tensor in {**tensors, **extra}.items()}


def test_clutter_changes_no_byte_of_the_artifact(tmp_path: Path) -> None:
    clean = build(write(tmp_path / "clean"), tmp_path / "a", **RTN, **NO_TEXT).path
    wild = change_tensors(write(tmp_path / "wild"), add_clutter)
    path = build(wild, tmp_path / "b", **RTN, **NO_TEXT).path
    for name in ("model.safetensors", "config.json"):
        assert (path / name).read_bytes() == (clean / name).read_bytes()
    verify_artifact(path)
    verify_deep(path, str(wild), None, 0, lambda _: None)
    plan = json.loads((path / PLAN).read_text())
    assert len(plan["dropped"]) == 5
    said = "\n".join(plan["summary"]["warnings"])
    assert f"{HEAD} left out: equal to {EMBEDDING}, to which config.json ties it" in said
    for reason in ("rotary embeddings", "a causal mask", "masked positions", "zeros; the module"):
        assert reason in said
    assert "tensors renamed: a wrapper of training tools removed" in said


def test_values_decide_what_is_left_out_before_anything_is_built(tmp_path: Path) -> None:
    def untie(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        head = tensors[EMBEDDING].clone()
        head[700, 3] += 1
        bias = torch.zeros(len(tensors["model.layers.1.mlp.up_proj.weight"]))
        bias[5] = 1
        return {**tensors, HEAD: head, "model.layers.1.mlp.up_proj.bias": bias}

    folder = change_tensors(write(tmp_path / "m"), untie)
    with pytest.raises(CheckpointError) as caught:
        make_plan(folder, **RTN)
    message = str(caught.value)
    assert f"tensors '{HEAD}' and '{EMBEDDING}': expected equal values" in message
    assert "found another value in row 700" in message
    assert "up_proj.bias': expected zeros" in message and "at element 5" in message


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("model.layers.0.self_attn.bias", r"self_attn.bias"),  # a vector is no mask
        (
            "model.layers.0.mlp.up_projj.weight",
            r"up_projj.weight \(nearest: .*mlp.up_proj.weight\)",
        ),
        ("model.layers.0.mlp.up_proj.lora_A.weight", r"part of an adapter; merge it"),
        ("model.layers.2.mlp.up_proj.weight", r"block 2; config.json announces 2 blocks, from 0"),
    ],
)
def test_what_nobody_can_place_is_refused_with_a_reason(
    name: str, reason: str, tmp_path: Path
) -> None:
    folder = change_tensors(write(tmp_path / "m"), lambda x: {**x, name: torch.ones(3)})
    with pytest.raises(CheckpointError, match=rf"not claimed by the architecture: .*{reason}"):
        make_plan(folder, **RTN)


def strip_base(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return the tensors of a base model: no prefix, no head."""
    return {name.removeprefix("model."): tensor for name, tensor in tensors.items() if name != HEAD}


def test_embedding_model_is_built_without_a_head(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", make_tiny_config("qwen3", tie_word_embeddings=False))
    change_config(change_tensors(folder, strip_base), architectures=["Qwen3Model"])
    with pytest.raises(RecipeError, match="fidelity: expected none for an embedding model"):
        make_plan(folder, **RTN)
    path = build(folder, tmp_path / "a", **RTN, **NO_TEXT).path
    verify_artifact(path)
    verify_deep(path, str(folder), None, 0, lambda _: None)
    compare_outputs(AutoModel, folder, path, "last_hidden_state")


def test_score_of_a_reward_model_is_kept(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", make_tiny_config("qwen3", tie_word_embeddings=False))
    generator = torch.Generator().manual_seed(0)
    score = torch.randn(16, 128, generator=generator).to(torch.bfloat16)

    def replace_head(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        del tensors[HEAD]
        return {**tensors, "score.weight": score}

    change_tensors(folder, replace_head)
    change_config(
        folder,
        architectures=["Qwen3ForSequenceClassification"],
        id2label={str(number): f"LABEL_{number}" for number in range(16)},
        label2id={f"LABEL_{number}": number for number in range(16)},
        pad_token_id=0,
    )
    with pytest.raises(RecipeError, match="fidelity: expected none for a classifier or reward"):
        make_plan(folder, **RTN)
    path = build(folder, tmp_path / "a", **RTN, **NO_TEXT).path
    assert torch.equal(load_file(path / "model.safetensors")["score.weight"], score)
    assert (
        "score" in json.loads((path / "config.json").read_text())["quantization_config"]["ignore"]
    )
    verify_artifact(path)
    verify_deep(path, str(folder), None, 0, lambda _: None)
    compare_outputs(AutoModelForSequenceClassification, folder, path, "logits")


def compare_outputs(kind: Any, folder: Path, path: Path, field: str) -> None:
    """Check that transformers loads both, and that 8 bits change the output little."""
    tokens = torch.randint(1, 700, (1, 40), generator=torch.Generator().manual_seed(0))
    loaded, info = kind.from_pretrained(path, output_loading_info=True)
    assert not any(info.values()), info
    with torch.no_grad():
        actual = loaded(tokens)[field].float()
        expected = kind.from_pretrained(folder)(tokens)[field].float()
    assert 0 < float((actual - expected).norm() / expected.norm()) < 0.1


def test_mtp_layer_that_the_recipe_drops_need_not_fit(tmp_path: Path) -> None:
    config = make_tiny_config("deepseek_v3", num_nextn_predict_layers=0)
    folder = write_checkpoint(tmp_path / "m", config)
    extra = {"model.layers.2.eh_proj.weight": torch.ones(4, 8)}
    change_tensors(folder, lambda x: {**x, **extra})
    with pytest.raises(CheckpointError, match="block 2; config.json announces 2 blocks"):
        make_plan(folder, **{**RTN, "rules": "experts-only"})
    plan = make_plan(folder, **{**RTN, "rules": "experts-only", "mtp": "drop"})
    assert [item.name for item in plan.left_out] == list(extra)


def test_embedding_model_needs_no_recipe(tmp_path: Path) -> None:
    config = make_tiny_config("qwen3", tie_word_embeddings=False, architectures=["Qwen3Model"])
    folder = change_tensors(write_checkpoint(tmp_path / "m", config), strip_base)
    chosen = read_target(RecipeRequest(model=str(folder)), {})
    assert chosen.recipe.fidelity is None
    assert "\nfidelity: none" in chosen.text
    with pytest.raises(RecipeError, match=r"keys in fidelity, found .*override fidelity itself"):
        read_target(RecipeRequest(model=str(folder)), {"fidelity.set": "tiny-v3-heldout"})


def test_embedding_model_is_not_calibrated_on_text_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its states times the embedding, to which the head is tied, are no words."""
    monkeypatch.setattr(sources, "find_hub_fault", lambda: "no network")
    monkeypatch.delenv("QUANTKIT_DATA", raising=False)
    config = make_tiny_config("qwen3", tie_word_embeddings=True, architectures=["Qwen3Model"])
    folder = change_tensors(write_checkpoint(tmp_path / "m", config), strip_base)
    source = sources.read_model_facts(str(folder))
    recipe = read_target(RecipeRequest(model=str(folder)), {}).recipe
    resolved = sources.resolve_texts(recipe, source)
    assert resolved.calibration and resolved.calibration.set == "general-math-code"
    assert "no language head" in resolved.chosen_texts["calibration"][1]
    with pytest.raises(RecipeError, match=r"calibration\.set: the model has no language head"):
        make_plan(
            folder,
            **NO_TEXT,
            calibration="{set: self, sequences: 4}",
            quantize="{method: gptq, bits: 4, group_size: 64, symmetric: true}",
        )
