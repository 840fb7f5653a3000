"""Parsing of recipes: text -> Recipe, or all faults at once. Pure: the caller reads the file.

Values are never guessed: an unknown key, a wrong type or an unknown name is a fault with file
and line.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, TypeVar

from pydantic import BaseModel, Field, ValidationError

from quantkit import figures
from quantkit.errors import RecipeError
from quantkit.io.suggestions import format_unknown_name, suggest_name
from quantkit.io.validation_errors import describe_fault
from quantkit.io.yaml_document import (
    INVALID_TEXT,
    KeyPath,
    YamlDocument,
    format_path,
    is_invalid_text,
    parse_document,
    parse_value,
    printable,
)
from quantkit.recipe.patterns import PRESETS, find_pattern_fault
from quantkit.recipe.quantize import Quantize
from quantkit.recipe.rewrite import rewrite_yaml
from quantkit.recipe.schema import (
    SECTIONS,
    SUBSECTIONS,
    Gate,
    Recipe,
    Rule,
    RuleEntry,
)
from quantkit.recipe.value_types import FROZEN
from quantkit.texts.mixture_spec import LABEL_PATTERN

BOUNDS = tuple(key for key in Gate.model_fields if key != "proven")
_RULE_SHAPE = (
    "a rule is {match: PATTERN, quantize: default} or {match: PATTERN, keep: source}, "
    "or {preset: NAME}"
)


class Gates(BaseModel):
    """A file of gates alone."""

    model_config = FROZEN
    gates: Annotated[dict[str, Gate], Field(min_length=1)]


def parse_recipe(text: str, name: str, overrides: Mapping[str, str] = {}) -> Recipe:
    """Parse a recipe.

    Args:
        text: the YAML text.
        name: the file's name in messages.
        overrides: values of dotted keys that replace those of the text ("output.path" -> "x").

    Raises:
        RecipeError: with every fault, in the order of the lines.
    """
    document, faults = _with_overrides(parse_document(text, name), overrides)
    document, conversions = convert_gates(_expand_gates(document))
    check = _Check(document=document, faults=faults)
    recipe = check.model(
        Recipe, {key: value for key, value in document.values.items() if key != "rules"}, ()
    )
    default = _Check(document=document, faults=[]).model(
        Quantize, document.values.get("quantize", {}), ()
    )
    resolved = check.rules(document.values.get("rules"), default or Quantize())
    check.gates(
        document.values.get("gates"),
        document.values.get("evaluation"),
        document.values.get("fidelity", {}),
    )
    if faults or recipe is None:
        raise RecipeError([sentence for _, sentence in sorted(faults, key=lambda fault: fault[0])])
    recipe = recipe.model_copy(update={"rules": resolved})
    recipe._document = document
    recipe._overrides = tuple(overrides.items())
    recipe._conversions = conversions
    return recipe


def apply_overrides(text: str, recipe: Recipe) -> str:
    """Return the recipe's text with `Recipe.overrides` written into it: it builds the same
    artifact.

    Overrides of output.path and memory, which do not change the content, are left out.
    """
    return rewrite_yaml(text, [_parse_override(key, value) for key, value in recipe.overrides])


def write_overrides(text: str, overrides: Mapping[str, str]) -> str:
    """Return a recipe's text with all overrides written into it, output.path and memory too."""
    return rewrite_yaml(text, [_parse_override(key, value) for key, value in overrides.items()])


def parse_gates(text: str, name: str, tasks: Sequence[str]) -> dict[str, Gate]:
    """Return the `gates:` of a YAML text, e.g. of a recipe; RecipeError with every fault of them.

    `tasks`: the benchmarks of the report to be checked.
    """
    document, _ = convert_gates(_expand_gates(parse_document(text, name)))
    check = _Check(document=document, faults=[])
    for key in document.values.keys() - Recipe.model_fields.keys():
        check.add_fault(
            (key,),
            f"unknown key.{suggest_name(key, tuple(Recipe.model_fields))} Expected gates.",
        )
    parsed = check.model(Gates, {"gates": document.values.get("gates")}, ())
    check.gates(document.values.get("gates"), {"tasks": list(tasks)}, {})
    if check.faults or parsed is None:
        raise RecipeError([
            sentence for _, sentence in sorted(check.faults, key=lambda fault: fault[0])
        ])
    return parsed.gates


def describe_gate_conversions(text: str, name: str) -> tuple[str, ...]:
    """Return a sentence for each former key among the `gates:` of a YAML text."""
    return convert_gates(_expand_gates(parse_document(text, name)))[1]


def expand_preset(name: str, default: Quantize, line: int | None = None) -> tuple[Rule, ...]:
    """Return the rules of a preset.

    With `line` None (chosen by the architecture) they are optional.
    """
    return tuple(
        Rule(
            label=f"{name}[{index}]",
            line=line or 0,
            optional=line is None,
            match=pattern,
            quantize=default if action == "quantize" else None,
            keep="source" if action == "keep" else None,
        )
        for index, (pattern, action) in enumerate(PRESETS[name])
    )


# ---------------------------------------------------------------------------------------- the parts

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """Validates parts of a document and adds a (line, sentence) to `faults` for each error."""

    document: YamlDocument
    faults: list[tuple[int, str]]

    def add_fault(self, path: KeyPath, sentence: str) -> None:
        """Add a fault of the value at `path`."""
        self.faults.append((
            self.document.line(path),
            f"{self.document.where(path)}: {format_path(path)}: {sentence}",
        ))

    def model(self, model: type[_Model], values: object, path: KeyPath) -> _Model | None:
        """Return the values as a model; on errors add the faults and return None."""
        try:
            return model.model_validate(values)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                place = (*path, *(part for part in details["loc"] if part != "[key]"))
                self.add_fault(place, describe_fault(place, details, _allowed_keys(place[:-1])))
            return None

    def rules(self, value: object, default: Quantize) -> tuple[Rule, ...] | None:
        """Return the rules of the value of `rules`: None, a preset, or a list."""
        if value is None:
            return None
        if isinstance(value, str):
            return self.preset(value, ("rules",), default)
        if not isinstance(value, list) or not value:
            self.add_fault(
                ("rules",),
                f"expected a preset ({', '.join(PRESETS)}) or a list of rules that is not empty",
            )
            return None
        return tuple(
            rule
            for index, item in enumerate(value)
            for rule in self.rule(item, ("rules", index), default)
        )

    def rule(self, item: object, path: KeyPath, default: Quantize) -> tuple[Rule, ...]:
        """Return the rules of one entry: one, or those of a preset; none if it has faults."""
        entry = self.model(RuleEntry, item, path)
        if entry is None:
            return ()
        if entry.preset is not None and entry.model_fields_set == {"preset"}:
            return self.preset(entry.preset, (*path, "preset"), default)
        if (
            entry.match is None
            or entry.preset is not None
            or (entry.quantize is None) == (entry.keep is None)
        ):
            self.add_fault(path, _RULE_SHAPE)
            return ()
        pattern_fault = find_pattern_fault(entry.match)
        if pattern_fault:
            self.add_fault((*path, "match"), printable(pattern_fault, 200))
            return ()
        scheme = default if entry.quantize == "default" else None
        if entry.quantize is not None and scheme is None:
            changes = entry.quantize
            changed = default.apply_changes(changes) if isinstance(changes, dict) else changes
            scheme = self.model(Quantize, changed, (*path, "quantize"))
            if scheme is None:
                return ()
        line = self.document.line(path)
        return (
            Rule(
                label=format_path(path),
                line=line,
                match=entry.match,
                quantize=scheme,
                keep=entry.keep,
            ),
        )

    def preset(self, name: str, path: KeyPath, default: Quantize) -> tuple[Rule, ...]:
        """Return the rules of a preset that the recipe names."""
        if name not in PRESETS:
            self.add_fault(path, format_unknown_name("preset", printable(name), tuple(PRESETS)))
            return ()
        return expand_preset(name, default, self.document.line(path))

    def gates(self, gates: object, evaluation: object, fidelity: object) -> None:
        """Add faults for gates on unknown or unmeasured figures, and for wrong bounds."""
        entries = evaluation.get("tasks") if isinstance(evaluation, dict) else None
        tasks = (
            [task for task in entries if isinstance(task, str)] if isinstance(entries, list) else []
        )
        for figure, bounds in gates.items() if isinstance(gates, dict) else ():
            path = ("gates", figure)
            base, _, domain = str(figure).partition("@")
            is_partial = (
                re.fullmatch(LABEL_PATTERN, domain) is not None
                if figures.is_per_domain(base)
                else figures.is_per_task(base) and domain in tasks
            )
            if figure not in (*figures.list_keys(), *tasks) and not is_partial:
                self.add_fault(path, _describe_unknown_figure(str(figure), tasks))
            elif figures.is_streamed(base) and fidelity in (None, "none"):
                self.add_fault(
                    path,
                    "needs a fidelity text, found fidelity: none; name a set, or drop this gate",
                )
            elif isinstance(bounds, dict):
                allowed = [key for key in BOUNDS if (key in ("max", "min")) != (figure in tasks)]
                bound_keys = {key for key in bounds if bounds[key] is not None and key != "proven"}
                if not bound_keys or bound_keys & set(BOUNDS) - set(allowed):
                    self.add_fault(
                        path, f"expected {' or '.join(f'{{{key}: NUMBER}}' for key in allowed)}"
                    )
                if not figures.is_size(base) and any(
                    isinstance(bounds.get(key), str) for key in ("max", "min")
                ):
                    self.add_fault(path, "expected a number; only size takes one such as 400GB")


def _expand_gates(document: YamlDocument) -> YamlDocument:
    """Return the document with gates such as `kl_mean.max: 1` expanded to `kl_mean: {max: 1}`, and
    `proven: true` among them put into each.

    A duplicate bound is left as it is, which makes it a fault.
    """
    gates = document.values.get("gates")
    if not isinstance(gates, dict):
        return document
    expanded: dict[str, object] = {}
    for key, value in gates.items():
        figure, _, bound = key.rpartition(".")
        others = expanded.get(figure, gates.get(figure, {}))
        if (
            figure
            and bound in Gate.model_fields
            and isinstance(others, dict)
            and bound not in others
        ):
            expanded[figure] = {**others, bound: value}
        else:
            expanded.setdefault(key, value)
    is_proven = expanded.get("proven")
    if isinstance(is_proven, bool):
        del expanded["proven"]
        expanded = {
            key: {"proven": is_proven, **bounds} if isinstance(bounds, dict) else bounds
            for key, bounds in expanded.items()
        }
    return replace(document, values={**document.values, "gates": expanded})


def convert_gates(document: YamlDocument) -> tuple[YamlDocument, tuple[str, ...]]:
    """Return the document with gates of a former key under the present one, and a sentence on it.

    A document with both keys is left as it is, which makes the former one a fault.
    """
    gates = document.values.get("gates")
    former, present = figures.ENERGY_GATE, figures.NORM_GATE
    if not isinstance(gates, dict) or former not in gates or present in gates:
        return document, ()
    bounds, changes = gates[former], list[str]()
    if isinstance(bounds, dict):
        roots = {key: figures.convert_energy(value) for key, value in bounds.items()}
        changes = [
            f"{key} {bounds[key]:g} -> {root:.4g}"
            for key, root in roots.items()
            if root != bounds[key]
        ]
        bounds = roots
    converted = {(present if key == former else key): value for key, value in gates.items()}
    converted[present] = bounds
    dotted = (("gates", f"{former}.{bound}") for bound in Gate.model_fields)  # "KEY.max: 0.01"
    place = next((p for p in (("gates", former), *dotted) if p in document.lines), ("gates",))
    line = document.lines.get(place)
    lines = document.lines if line is None else {**document.lines, ("gates", present): line}
    sentence = (
        f"{document.where(place)}: gates.{former} bounds an energy ratio; read as "
        f"{present}, its square root{': ' if changes else ''}{', '.join(changes)}; write {present}"
    )
    values = {**document.values, "gates": converted}
    return replace(document, values=values, lines=lines), (sentence,)


def _describe_unknown_figure(figure: str, tasks: Sequence[str]) -> str:
    """Return the message for an unknown figure, with a suggestion."""
    base, at, domain = figure.partition("@")
    if at and figures.is_per_domain(base):
        return (
            f"expected a kind of the fidelity text after @, such as math or web-zh, found "
            f"'{printable(domain)}'."
        )
    sentence = format_unknown_name(
        "figure or task of evaluation.tasks", printable(figure), (*figures.list_keys(), *tasks)
    )
    return f"{sentence} Of one kind of text: kl_mean@code."


def _with_overrides(
    document: YamlDocument, overrides: Mapping[str, str]
) -> tuple[YamlDocument, list[tuple[int, str]]]:
    faults: list[tuple[int, str]] = []
    for key, text in overrides.items():
        try:
            document = document.with_value(*_parse_override(key, text))
        except RecipeError as error:
            faults += [(0, sentence) for sentence in error.faults]
    return document, faults


def _parse_override(key: str, text: str) -> tuple[KeyPath, object]:
    """Return path and value of an override; RecipeError if its text has invalid characters."""
    path = tuple(key.split("."))
    if is_invalid_text(text):
        raise RecipeError([f"override {printable(key)}: {INVALID_TEXT}"])
    return path, text if _is_text(path) else parse_value(text, f"override {printable(key)}")


def _is_text(path: KeyPath) -> bool:
    """Return whether a key takes any text: an override such as "123" is then not parsed."""
    section = SECTIONS.get(str(path[0])) if len(path) == 2 else None
    field = section.model_fields.get(str(path[-1])) if section else None
    return field is not None and field.annotation is str


def _allowed_keys(path: KeyPath) -> tuple[str, ...]:
    """Return the keys that the mapping at `path` may have."""
    model: type[BaseModel] = Recipe
    if path and path[-1] == "quantize":
        model = Quantize
    elif path:
        model = SECTIONS.get(str(path[0]), Recipe)
        model = SUBSECTIONS.get((str(path[0]), str(path[-1])), model)
    return tuple(model.model_fields)
