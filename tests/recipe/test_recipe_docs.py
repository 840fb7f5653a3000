"""recipes/README.md is the page that the schema generates, and it documents every key."""

from __future__ import annotations

import re

import pytest
from tools.recipe_reference import CHOICES, PAGE, RECIPES, render_page

from quantkit import registry
from quantkit.io.yaml_document import parse_value
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.schema import SECTIONS, Recipe, list_keys

MODELS = {"": Recipe, **SECTIONS}
FIELDS = [
    pytest.param(section, name, field, id=f"{section}.{name}".lstrip("."))
    for section, model in MODELS.items()
    for name, field in model.model_fields.items()
]
SMALLEST = """\
version: 1
source: {model: builtin:tiny-v3}
calibration: {set: tiny-v3}
fidelity: {set: tiny-v3-heldout}
evaluation: {tasks: [gsm8k]}
output: {path: artifacts/x}
"""


def test_page_is_generated_from_the_schema() -> None:
    assert PAGE.read_text(encoding="utf-8") == render_page(), (
        "run: python tests/tools/recipe_reference.py --write"
    )


def test_page_documents_every_key() -> None:
    page = PAGE.read_text(encoding="utf-8")
    rows = set(re.findall(r"^\| `([a-zA-Z_.\[\]]+)` \|", page, re.MULTILINE))
    documented = {row.replace("[]", "").replace(".NAME", "") for row in rows}
    assert set(list_keys()) - documented == set()


@pytest.mark.parametrize(("section", "name", "field"), FIELDS)
def test_every_key_has_a_meaning_and_an_example_that_parses(section, name, field) -> None:
    assert field.description and field.description.endswith(".")
    if not section and name in SECTIONS:
        return
    [example] = field.examples
    parse_value(example, "example")
    if section == "rules":
        entry = {"match": "'*'", "quantize": "default", name: example}
        if name == "keep":
            del entry["quantize"]
        if name == "preset":
            entry = {name: example}
        overrides = {"rules": "[{" + ", ".join(f"{k}: {v}" for k, v in entry.items()) + "}]"}
    elif section == "gates":
        figure = "kl_mean" if name in ("max", "min") else "gsm8k"
        overrides = {f"gates.{figure}.{name}": example}
        if name == "proven":
            overrides["gates.gsm8k.min_score"] = "0.5"
    else:
        overrides = {f"{section}.{name}".lstrip("."): example}
    if (section, name) == ("slo", "concurrency"):
        overrides["slo.targets"] = "{errors: {max: 0}}"
    if name == "double_quant":
        overrides["quantize.method"] = "nf4"
    parse_recipe(SMALLEST, "x.yaml", overrides)


@pytest.mark.parametrize(
    ("key", "kind"),
    [("quantize.method", "methods"), ("quantize.rounding", "roundings"), ("format", "formats")],
)
def test_page_lists_the_registered_plugins(key: str, kind: registry.Kind) -> None:
    [row] = re.findall(rf"^\| `{re.escape(key)}` \| ([^|]*) \|", PAGE.read_text(), re.MULTILINE)
    assert set(registry.list_names(kind)) == set(re.findall(r"`(\w+)`", row))


def test_table_of_recipes_names_each_recipe_once() -> None:
    listed = [name for _, names in CHOICES for name in names.split(", ")]
    assert sorted(listed) == sorted(path.stem for path in RECIPES.glob("*.yaml"))
