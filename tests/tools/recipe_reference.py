"""Writes recipes/README.md from the schema of recipes.

python tests/tools/recipe_reference.py [--write]     print the page, or write it
"""

from __future__ import annotations

import sys
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from annotated_types import Ge, Le
from pydantic import AfterValidator, BaseModel, BeforeValidator
from pydantic.fields import FieldInfo

from quantkit import figures, registry
from quantkit.recipe import value_types
from quantkit.recipe.patterns import PRESETS
from quantkit.recipe.quantize import METHOD_DEFAULTS
from quantkit.recipe.schema import SECTIONS, SUBSECTIONS, Recipe
from quantkit.texts.corpus_spec import DOMAINS

RECIPES = Path(__file__).parents[2] / "recipes"
PAGE = RECIPES / "README.md"

INTRODUCTION = """\
# Recipes

A recipe is a YAML file that says how a model becomes an artifact: source, method, format,
calibration text, held-out text, benchmarks and gates. `quantkit build NAME` takes a file or the
name of one of these recipes; `quantkit plan NAME` shows what a build would do, from headers or a
published config alone.

`--set KEY=VALUE` overrides a key by its dotted name:
`--set quantize.bits=8 --set output.path=artifacts/mine`. Unknown keys, wrong types and unknown
names are errors with file and line, all reported at once. In sizes GB is decimal, GiB binary.

`quantkit build MODEL`, `plan MODEL` and `init MODEL` choose a recipe for a model. The choice
depends on the headers of the model alone: `experts-only` for mixtures of experts, otherwise
`all-linear`; the largest group size of 128, 64, 32 that divides every quantized width; the first
format that vLLM and SGLang load; zero points where they load them; sequences by the number of
parameters. `method: awq` or `gptq` alone has the quality that the measurements name: GPTQ rounding,
and `propagate: both` for dense models.

Editors with a YAML language server complete and check recipes by
[recipe.schema.json](recipe.schema.json), which `quantkit schema` prints. Each recipe names it in
its first line. In a folder of your own: `quantkit schema > recipe.schema.json`.

This page is generated from `quantkit/recipe/schema.py` by
`python tests/tools/recipe_reference.py --write`.

## Which recipe to choose
"""

CHOICES = (
    ("the demo: two CPU cores, no network", "tiny-v3-awq4"),
    ("the demo with other methods and formats", "tiny-v3-gptq4, tiny-v3-gptq4-fp8, tiny-v3-nf4, "
                                                "tiny-v3-rtn4"),
    ("a small dense model on a CPU", "smollm2-135m-awq4, smollm2-135m-gptq4"),
    ("a base for QLoRA adapters (bitsandbytes)", "smollm2-135m-nf4"),
    ("a dense model for one 24 GB GPU", "r1-distill-qwen-32b-awq4"),
    ("another mixture of experts", "mixtral-8x7b-awq4, qwen3-30b-a3b-gptq4"),
    ("DeepSeek-V3 for vLLM and SGLang", "v3-awq4"),
    ("DeepSeek-V3, all except routed experts in the source's FP8", "v3-gptq4-fp8"),
    ("DeepSeek-V3 for transformers with bitsandbytes", "v3-nf4"),
)  # fmt: skip
"""Purpose, recipes."""

PLUGINS: Mapping[str, registry.Kind] = {
    "method": "methods",
    "rounding": "roundings",
    "format": "formats",
}
"""Keys whose values are plug-ins."""

NOTES = {
    "quantize": "Values that follow from a method need not be written: {methods}.",
    "rules": "Presets:\n\n{presets}",
    "gates": (
        "A gate is `figure: {{max: NUMBER}}`, `figure: {{min: NUMBER}}`, or `task: {{...}}` with "
        "the other keys; `kl_mean.max: 0.05` is short for `kl_mean: {{max: 0.05}}`.\n\n"
        "Figures of the fidelity text: {pooled}. Each of them can be bounded on one domain, e.g. "
        "`kl_mean@{domain}` (domains: {domains}).\n\nOther figures: {others}. `likelihood@TASK` "
        "bounds one task."
    ),
}
"""Text after the table of a section."""


def render_page() -> str:
    """Return the text of recipes/README.md."""
    parts = [INTRODUCTION, render_choices(), "## Top-level keys\n"]
    parts.append(render_keys(Recipe.model_fields, ""))
    for section, model in SECTIONS.items():
        parts.append(f"## {section}\n")
        parts.append(f"{' '.join((model.__doc__ or '').split())}\n")
        prefix = {"rules": "rules[].", "gates": "gates.NAME."}.get(section, f"{section}.")
        parts.append(render_keys(model.model_fields, prefix))
        if section in NOTES:
            parts.append(NOTES[section].format(**note_values()) + "\n")
        for (outer, key), inner in SUBSECTIONS.items():
            if outer == section:
                parts.append(f"### {outer}.{key}\n")
                parts.append(f"{' '.join((inner.__doc__ or '').split())}\n")
                parts.append(render_keys(inner.model_fields, f"{outer}.{key}."))
    return "\n".join(parts)


def render_choices() -> str:
    """Return the table of recipes by purpose."""
    rows = [
        (purpose, ", ".join(f"[{name}]({name}.yaml)" for name in names.split(", ")))
        for purpose, names in CHOICES
    ]
    return render_table(("purpose", "recipe"), rows)


def render_keys(fields: dict[str, FieldInfo], prefix: str) -> str:
    """Return the table of keys of one model."""
    rows = [
        (
            f"`{prefix}{name}`",
            render_type(name, field),
            render_default(field),
            field.description or "",
            f"`{field.examples[0]}`" if field.examples else "",
        )
        for name, field in fields.items()
    ]
    return render_table(("key", "type", "default", "meaning", "example"), rows)


def render_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "".join(f"| {' | '.join(line)} |\n" for line in cells)


def render_type(name: str, field: FieldInfo) -> str:
    """Return type and allowed values of a key."""
    extra = field.json_schema_extra
    if isinstance(extra, dict) and "type_text" in extra:
        return str(extra["type_text"])
    if name in PLUGINS:
        names = ", ".join(f"`{plugin}`" for plugin in registry.list_names(PLUGINS[name]))
        return f"one or a list of {names}" if name == "format" else names
    if field is Recipe.model_fields.get(name) and name in SECTIONS:
        kind = "mapping"
        return f"{kind} or `none`" if name == "fidelity" else (
            f"{kind} or `null`" if field.default is None and not field.is_required() else kind
        )  # fmt: skip
    return describe_annotation(field.annotation, field.metadata)


def describe_annotation(annotation: Any, metadata: Sequence[Any]) -> str:
    """Return a type in words: "integer, 2 to 8", "`keep`, `drop`", "size or `null`"."""
    if get_origin(annotation) is typing.Annotated:
        inner, *more = get_args(annotation)
        flat = [item for part in more for item in getattr(part, "metadata", None) or [part]]
        return describe_annotation(inner, flat)
    if get_origin(annotation) in (typing.Union, types.UnionType):
        options = [option for option in get_args(annotation) if option is not type(None)]
        texts = [describe_annotation(option, metadata) for option in options]
        return " or ".join([*texts, *["`null`"] * (len(options) < len(get_args(annotation)))])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if annotation is bool:
        return "`true`, `false`"
    validators = [
        item.func for item in metadata if isinstance(item, BeforeValidator | AfterValidator)
    ]
    if value_types.parse_size in validators:
        return "size"
    if annotation in (int, float):
        return describe_number(annotation, metadata)
    return {str: "text"}.get(annotation, str(annotation))


def describe_number(annotation: type, metadata: Sequence[Any]) -> str:
    """Return a number's type with its bounds."""
    kind = "integer" if annotation is int else "number"
    least = max((item.ge for item in metadata if isinstance(item, Ge)), default=None)
    most = min((item.le for item in metadata if isinstance(item, Le)), default=None)
    if most is not None and most >= 2**31 - 1:
        most = None
    if least is None:
        return kind
    return f"{kind}, {least} to {most}" if most is not None else f"{kind} >= {least}"


def render_default(field: FieldInfo) -> str:
    """Return the default of a key as YAML."""
    if field.is_required():
        return "required"
    value = field.default
    if isinstance(value, BaseModel):
        return "its keys' defaults"
    if value is None:
        return "`null`"
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    if isinstance(value, tuple):
        return f"`{value[0]}`" if len(value) == 1 else "`[]`"
    if value == 5 * 10**9:
        return "`5GB`"
    return "`{}`" if value == {} else f"`{value}`"


def note_values() -> dict[str, str]:
    """Return the values that NOTES insert."""
    methods = "; ".join(
        f"{method}: "
        + ", ".join(f"`{key}: {str(value).lower()}`" for key, value in defaults.items())
        for method, defaults in METHOD_DEFAULTS.items()
    )
    presets = render_table(
        ("preset", "rules"),
        [
            (
                f"`{name}`",
                "; ".join(
                    f"`{pattern}` {'quantize' if action == 'quantize' else 'keep'}"
                    for pattern, action in rules
                ),
            )
            for name, rules in PRESETS.items()
        ],
    )
    return {
        "methods": methods,
        "presets": presets.rstrip("\n"),
        "pooled": ", ".join(
            f"`{figure}`" for figure in figures.list_keys() if figures.is_per_domain(figure)
        ),
        "domain": DOMAINS[-1],
        "domains": ", ".join(DOMAINS),
        "others": ", ".join(
            f"`{figure}`" for figure in figures.list_keys() if not figures.is_per_domain(figure)
        ),
    }


if __name__ == "__main__":
    if "--write" in sys.argv[1:]:
        PAGE.write_text(render_page(), encoding="utf-8")
    else:
        sys.stdout.write(render_page())
