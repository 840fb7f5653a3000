"""Shipped recipes are planned without a network, and their comments state the plan's figures."""

from __future__ import annotations

import importlib.resources
import json
from functools import cache
from pathlib import Path
from unittest import mock

import pytest
import torch
from click.testing import CliRunner
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit import registry
from quantkit.checkpoint import hub
from quantkit.cli.main import main
from quantkit.contracts import Config
from quantkit.errors import HubUnreachable
from quantkit.plan.match_checkpoint import list_expected_tensors
from quantkit.plan.plan_schema import PlanSummary

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
PUBLISHED = sorted({
    (name, file)
    for name in registry.list_names("architectures")
    for file in (registry.get_architecture(name).published or {}).values()
})
CARDS = {
    "r1-distill-qwen-32b-awq4": 32.76,
    "qwen3-30b-a3b-gptq4": 30.53,
    "mixtral-8x7b-awq4": 46.70,
    "v3-gptq4-fp8": 684.49,
    "v3-nf4": 684.49,
}
"""Billions of parameters as in the model cards (32.8, 30.5, 46.7, 685 with MTP), with one more
digit.
"""


def no_hub(model: str, revision: str | None, _client: object) -> hub.ModelHeaders:
    """Raise as if the Hub were unreachable."""
    raise HubUnreachable(f"{model}@{revision}: no answer")


@cache
def plan_offline(path: Path) -> PlanSummary:
    """Return the output of `quantkit plan` for a recipe without a network."""
    command = ["plan", str(path), "--json", "--set", "compute.device=cpu"]
    with mock.patch.object(hub, "_fetch_headers", no_hub):
        done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    return PlanSummary.model_validate(json.loads(done.stdout))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_planned_without_a_network(path: Path) -> None:
    """The format accepts every quantized linear, and the memory suffices."""
    plan = plan_offline(path)
    assert plan.totals.modules_quantized > 0 and plan.totals.modules_kept > 0
    assert (
        plan.totals.bytes_after < 0.65 * 2 * plan.totals.parameters
    )  # BF16 has 2 bytes a parameter
    assert plan.memory.peak <= plan.memory.budget
    assert not any("applies to no linear" in warning for warning in plan.warnings)


@pytest.mark.parametrize("name", CARDS)
def test_comments_of_recipes_state_the_plans_figures(name: str) -> None:
    [path] = (path for path in RECIPES if path.stem == name)
    plan, text = plan_offline(path), path.read_text(encoding="utf-8")
    assert round(plan.source.parameters / 1e9, 2) == CARDS[name]
    assert plan.memory.budget < 1.5 * plan.memory.peak  # enough, and not much more
    for size in (plan.totals.bytes_before, plan.totals.bytes_after):
        assert f"{size / 1e9:.2f} GB" in text


@pytest.mark.parametrize(("model_type", "file"), PUBLISHED)
def test_published_config_matches_the_model_of_transformers(model_type: str, file: str) -> None:
    """Parameter by parameter the same number.

    MTP blocks, which transformers does not make, apart.
    """
    folder = importlib.resources.files("quantkit.architectures") / "published"
    config = Config(values=json.loads((folder / file).read_text(encoding="utf-8")), where=file)
    assert config.text("model_type") == model_type
    layout = registry.get_architecture(model_type).layout(config)
    mtp = tuple(f"{block.name}." for block in layout.blocks if block.kind == "mtp")
    ours = {
        n: s.n_elements
        for n, s in list_expected_tensors(layout, config).items()
        if not n.startswith(mtp or ("\0",))
    }
    values = {key: value for key, value in config.values.items() if key != "quantization_config"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values))
    buffers = sum(
        b.numel() for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")
    )
    assert sum(ours.values()) == sum(p.numel() for p in model.parameters()) + buffers
