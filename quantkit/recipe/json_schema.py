"""JSON Schemas of recipes and of text sets, made from their pydantic models. Pure.

Editors complete and check YAML files with them. `quantkit plan` checks properties that a schema
cannot state: patterns that match nothing, keys that exclude each other, names of figures.
"""

from __future__ import annotations

import json
from typing import Any

from pydantic import TypeAdapter

from quantkit.io.yaml_document import parse_value
from quantkit.recipe.patterns import PRESETS
from quantkit.recipe.schema import Gate, Recipe, RuleEntry
from quantkit.recipe.value_types import SIZE_TEXT
from quantkit.texts.corpus_spec import SpecFile
from quantkit.texts.mixture_spec import MixtureFile

DIALECT = "https://json-schema.org/draft/2020-12/schema"
REFERENCE = "#/$defs/{model}"

Schema = dict[str, Any]


def make_recipe_schema() -> Schema:
    """Return the JSON Schema of a recipe.

    It also describes the short forms that the parser expands: presets and lists of rules, partial
    schemes of rules, `none`, and gates in short form.
    """
    schema = Recipe.model_json_schema()
    entry = RuleEntry.model_json_schema()
    definitions = schema["$defs"]
    definitions.pop("Rule")
    entry["properties"]["quantize"] |= {
        "anyOf": [{"const": "default"}, {"$ref": "#/$defs/Quantize"}]
    }
    entry["properties"]["preset"] = {
        **entry["properties"]["preset"],
        "anyOf": [{"enum": list(PRESETS)}],
    }
    definitions["RuleEntry"] = entry
    properties = schema["properties"]
    rules = {"type": "array", "items": {"$ref": "#/$defs/RuleEntry"}, "minItems": 1}
    properties["rules"] |= {"anyOf": [{"enum": list(PRESETS)}, rules, {"type": "null"}]}
    properties["fidelity"] |= {"anyOf": [*properties["fidelity"]["anyOf"], {"const": "none"}]}
    properties["gates"] |= {
        "additionalProperties": {"anyOf": [{"$ref": "#/$defs/Gate"}, {"type": "number"}, SIZE_TEXT]}
    }
    definitions.setdefault("Gate", Gate.model_json_schema())
    return {"$schema": DIALECT, **clean_schema(schema), "title": "quantkit recipe"}


def make_set_schema() -> Schema:
    """Return the JSON Schema of the spec of a text set: version 1, or a mixture of version 2."""
    schema = TypeAdapter(SpecFile | MixtureFile).json_schema()
    return {"$schema": DIALECT, **clean_schema(schema), "title": "quantkit text set"}


def clean_schema(value: Any) -> Any:
    """Return a schema whose examples are values, without titles and notes for the reference."""
    if isinstance(value, list):
        return [clean_schema(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    cleaned = {}
    for key, inner in value.items():
        if key == "type_text" or (key == "title" and isinstance(inner, str)):
            continue
        if key == "examples" and isinstance(inner, list):
            cleaned[key] = [parse_value(str(example), "example") for example in inner]
        else:
            cleaned[key] = clean_schema(inner)
    return cleaned


def format_schema(schema: Schema) -> str:
    """Return the text of a schema."""
    return json.dumps(schema, indent=2, ensure_ascii=False) + "\n"
