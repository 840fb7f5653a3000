"""The JSON Schema for editors accepts the same files as the parser."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from support.command_line import run
from support.paths import ROOT

from quantkit.errors import RecipeError
from quantkit.io.yaml_document import parse_document
from quantkit.recipe.json_schema import make_recipe_schema, make_set_schema
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.schema import SECTIONS, Recipe

RECIPES = sorted((ROOT / "recipes").glob("*.yaml"))
SETS = sorted((ROOT / "calibration").glob("*.yaml"))
LINE = "# yaml-language-server: $schema=recipe.schema.json"
SMALLEST = """\
version: 1
source: {model: builtin:tiny-v3}
fidelity: {set: tiny-v3-heldout}
output: {path: artifacts/x}
"""


def find_faults(schema: dict[str, Any], values: object) -> list[str]:
    """Return the faults that a validator reports for the values of a file."""
    jsonschema = pytest.importorskip("jsonschema")
    plain = json.loads(json.dumps(values))
    return [error.message for error in jsonschema.Draft202012Validator(schema).iter_errors(plain)]


def test_file_in_the_repository_is_what_the_command_prints() -> None:
    printed = run("schema")
    assert printed.exit_code == 0
    assert (ROOT / "recipes" / "recipe.schema.json").read_text(
        encoding="utf-8"
    ) == printed.stdout, "run: quantkit schema > recipes/recipe.schema.json"


def test_command_prints_the_schema_of_sets() -> None:
    assert json.loads(run("schema", "--of", "set").stdout) == make_set_schema()


def test_schema_names_every_key() -> None:
    schema = make_recipe_schema()
    assert schema["properties"].keys() == Recipe.model_fields.keys()
    names = {model.__name__: model.model_fields.keys() for model in SECTIONS.values()}
    assert {name: schema["$defs"][name]["properties"].keys() for name in names} == names


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_shipped_recipes_name_the_schema_and_satisfy_it(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.splitlines()[0] == LINE
    assert find_faults(make_recipe_schema(), parse_document(text, path.name).values) == []


@pytest.mark.parametrize("path", SETS, ids=lambda path: path.stem)
def test_shipped_sets_satisfy_their_schema(path: Path) -> None:
    values = parse_document(path.read_text(encoding="utf-8"), path.name).values
    assert find_faults(make_set_schema(), values) == []


@pytest.mark.parametrize(
    ("lines", "valid"),
    [
        ("rules: experts-only", True),
        ("rules: [{preset: attention-source}, {match: '*', quantize: {bits: 8}}]", True),
        ("memory: 64GB", True),
        ("memory: 64 gigabytes", False),
        ("gates: {kl_mean.max: 0.05, size: {max: 400GB}}", True),
        ("format: [awq, gptq-v2]", True),
        ("format: ggml", False),
        ("rules: experts", False),
        ("quantize: {method: agq}", False),
        ("quantize: {bits: 9}", False),
        ("propagate: none", False),
        ("calibration: null", True),
        ("fidelty: none", False),
    ],
)
def test_schema_and_parser_agree(lines: str, valid: bool) -> None:
    text = SMALLEST + lines + "\n"
    values = parse_document(text, "x.yaml").values
    assert (find_faults(make_recipe_schema(), values) == []) == valid
    try:
        parse_recipe(text, "x.yaml")
    except RecipeError:
        assert not valid
    else:
        assert valid
