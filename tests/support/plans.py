"""Plans of small checkpoints."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit import registry
from quantkit.contracts import Config, TensorSpec
from quantkit.plan.match_checkpoint import list_expected_tensors
from quantkit.plan.plan import Plan, SourceFacts, make_plan, match_source
from quantkit.recipe.parse import parse_recipe


def make_specs(config: Mapping[str, object]) -> dict[str, TensorSpec]:
    """Return the headers of a checkpoint with this config."""
    values = Config(values=config)
    return list_expected_tensors(
        registry.get_architecture(values.text("model_type")).layout(values), values
    )


def plan_checkpoint(
    model_type: str = "deepseek_v3",
    *,
    budget: int = 8 * 10**9,
    specs: Mapping[str, TensorSpec] | None = None,
    config: Mapping[str, object] = {},
    **keys: str,
) -> Plan:
    """Return the plan for a random checkpoint of a TINY config.

    Keyword arguments are keys of the recipe.
    """
    values = {**registry.get_architecture(model_type).tiny, **config}
    lines = {
        "version": "1",
        "source": "{model: org/name}",
        "quantize": "{method: awq, rounding: nearest, group_size: 64}",
        "calibration": "{set: tiny-v3, sequences: 8, length: 128}",
        "fidelity": "{set: tiny-v3-heldout, windows: 8, length: 128}",
        "output": "{path: out}",
        "compute": "{device: cpu}",
    }
    lines |= keys
    lines.setdefault("propagate", "quantized")  # last: messages name lines
    text = "\n".join(f"{key}: {value}" for key, value in lines.items())
    facts = SourceFacts(
        model="org/name",
        revision=None,
        config=Config(values=values),
        specs=make_specs(values) if specs is None else specs,
        fingerprint=None,
        where="org/name",
    )
    tokens = {"calibration": 1024, "fidelity": 1024}
    recipe = parse_recipe(text, "r.yaml")
    matched, name = match_source(facts), recipe.format[0]
    return make_plan(
        recipe, facts, matched, name, budget_bytes=budget, tokens=tokens, hidden_bytes=4
    )
