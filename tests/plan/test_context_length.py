"""Texts longer than the model's context: warned of, or refused for a table of positions."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import make_plan, make_recipe_text, make_tiny_config, write_checkpoint

from quantkit.contracts import Config, TensorSpec
from quantkit.errors import UsageError
from quantkit.evaluate.check_plan import plan_and_check
from quantkit.plan.context_length import find_context_faults, read_context_length
from quantkit.plan.match_checkpoint import match_layout
from quantkit.plan.plan import load_architecture
from quantkit.plan.sources import resolve_source_facts
from quantkit.recipe.parse import parse_recipe


def test_longer_texts_are_said(tmp_path: Path) -> None:
    config = make_tiny_config("llama", max_position_embeddings=100)
    plan = make_plan(write_checkpoint(tmp_path / "m", config))
    said = [warning for warning in plan.warnings if "context" in warning]
    assert [warning.partition(":")[0] for warning in said] == [
        "calibration.length",
        "fidelity.length",
    ]
    assert "128 tokens are more than the model's context of 100" in said[0]


def test_texts_that_fit_are_not_said(tmp_path: Path) -> None:
    config = make_tiny_config("llama", max_position_embeddings=128)
    plan = make_plan(write_checkpoint(tmp_path / "m", config))
    assert not [warning for warning in plan.warnings if "context" in warning]


@pytest.mark.parametrize(
    "values", [{"n_positions": 64}, {"text_config": {"max_position_embeddings": 64}}]
)
def test_context_is_read_under_every_name(values: dict[str, object]) -> None:
    assert read_context_length(Config(values=values)) == 64
    assert read_context_length(Config(values={})) is None


def test_texts_longer_than_a_table_of_positions_are_refused(tmp_path: Path) -> None:
    config = Config(values=make_tiny_config("llama", n_positions=64, max_position_embeddings=64))
    layout = match_layout(load_architecture(config), config, None, "m").layout
    recipe = parse_recipe(make_recipe_text("m", tmp_path / "out"), "r.yaml")
    assert find_context_faults(recipe, config, layout) == []
    table = TensorSpec(name="transformer.wpe.weight", dtype="BF16", shape=(64, 128))
    layout = replace(layout, final_tensors=(*layout.final_tensors, table))
    faults = find_context_faults(recipe, config, layout)
    assert len(faults) == 2
    assert "calibration.length: expected at most 64, the positions of transformer.wpe" in faults[0]


def plan_texts(folder: Path, **keys: str) -> tuple[str, ...]:
    """Return the warnings of a plan whose texts were tokenized."""
    recipe = parse_recipe(make_recipe_text(folder, folder.parent / "out", **keys), "r.yaml")
    (plan,) = plan_and_check(recipe, resolve_source_facts(recipe))
    return plan.warnings


def test_plan_says_what_only_tokens_tell(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path / "m", make_tiny_config("llama"))
    text = tmp_path / "a.jsonl"
    text.write_text('{"text": "one two three four"}\n' * 40 + '{"text": ""}\n')
    keys = {"calibration": f"{{set: {text}, sequences: 2, length: 16}}", "fidelity": "none"}
    assert "a.jsonl: part text: 1 rows without text are skipped" in plan_texts(folder, **keys)
    keys["calibration"] = f"{{set: {text}, sequences: 4000, length: 16}}"
    with pytest.raises(UsageError, match="part text: expected 64,000 tokens"):
        plan_texts(folder, **keys)
