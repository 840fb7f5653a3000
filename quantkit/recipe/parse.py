"""A recipe's text -> Recipe, or every fault of it at once. Pure: files are read by the caller.

A value is never guessed: an unknown key, a wrong type or a name that does not exist is a fault with file and line.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from pydantic import BaseModel, ValidationError

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
from quantkit.recipe.patterns import PRESETS, pattern_fault
from quantkit.recipe.rewrite import rewritten
from quantkit.recipe.schema import (
    SECTIONS,
    Gate,
    Gates,
    Quantize,
    Recipe,
    Rule,
    RuleEntry,
)
from quantkit.texts.corpus_spec import DOMAINS

__all__ = [
    "Quantize",
    "Recipe",
    "Rule",
    "parse_recipe",
    "parse_gates",
    "expand_preset",
    "apply_overrides",
]

_RULE_SHAPE = "a rule is {match: PATTERN, quantize: default} or {match: PATTERN, keep: source}, or {preset: NAME}"


def parse_recipe(text: str, name: str, overrides: Mapping[str, str] = {}) -> Recipe:
    """The recipe in `text`; RecipeError with every fault, in the order of the lines, otherwise.

    `name` is how messages call the file; `overrides` maps dotted keys to values ("output.path" -> "x") and wins.
    """
    document, faults = _overridden(parse_document(text, name), overrides)
    document = _spelled_out(document)
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
    return recipe


def apply_overrides(text: str, recipe: Recipe) -> str:
    """`text`, the recipe's file, with what was set beside it written in: it makes the same artifact by itself.

    But for `Recipe.overrides`, where and in how much memory it is made.
    """
    return rewritten(text, [_change(key, value) for key, value in recipe.overrides])


def parse_gates(text: str, name: str, tasks: Sequence[str]) -> dict[str, Gate]:
    """The `gates:` of a YAML file, which may be a whole recipe; RecipeError with every fault of them.

    `tasks`: the benchmarks that the report to be judged has.
    """
    document = _spelled_out(parse_document(text, name))
    check = _Check(document=document, faults=[])
    for key in document.values.keys() - Recipe.model_fields.keys():
        check.fault(
            (key,),
            f"unknown key.{suggest_name(key, tuple(Recipe.model_fields))} Expected gates.",
        )
    found = check.model(Gates, {"gates": document.values.get("gates")}, ())
    check.gates(document.values.get("gates"), {"tasks": list(tasks)}, {})
    if check.faults or found is None:
        raise RecipeError([
            sentence for _, sentence in sorted(check.faults, key=lambda fault: fault[0])
        ])
    return found.gates


def expand_preset(name: str, default: Quantize, line: int | None = None) -> tuple[Rule, ...]:
    """The rules a preset stands for. `line` None: an architecture chose it and nobody wrote it, so it is optional."""
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


# ------------------------------------------------------------------------------------------------------- the parts

_Model = TypeVar("_Model", bound=BaseModel)


@dataclass(frozen=True, kw_only=True)
class _Check:
    """Turns parts of a document into models; `faults` (line, sentence) fills up on the way."""

    document: YamlDocument
    faults: list[tuple[int, str]]

    def fault(self, path: KeyPath, sentence: str) -> None:
        """Note what is wrong with the value at `path`."""
        self.faults.append((
            self.document.line(path),
            f"{self.document.where(path)}: {format_path(path)}: {sentence}",
        ))

    def model(self, model: type[_Model], values: object, path: KeyPath) -> _Model | None:
        """`values` as a model, or None and its faults."""
        try:
            return model.model_validate(values)
        except ValidationError as error:
            for details in error.errors(include_url=False):
                place = (*path, *(part for part in details["loc"] if part != "[key]"))
                self.fault(place, describe_fault(place, details, _known(place[:-1])))
            return None

    def rules(self, written: object, default: Quantize) -> tuple[Rule, ...] | None:
        """The value of `rules`: None, a preset, or a list."""
        if written is None:
            return None
        if isinstance(written, str):
            return self.preset(written, ("rules",), default)
        if not isinstance(written, list) or not written:
            self.fault(
                ("rules",),
                f"expected a preset ({', '.join(PRESETS)}) or a list of rules that is not empty",
            )
            return None
        return tuple(
            rule
            for index, item in enumerate(written)
            for rule in self.rule(item, ("rules", index), default)
        )

    def rule(self, item: object, path: KeyPath, default: Quantize) -> tuple[Rule, ...]:
        """One item of the list: one rule, or those of a preset; none when it has faults."""
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
            self.fault(path, _RULE_SHAPE)
            return ()
        wrong = pattern_fault(entry.match)
        if wrong:
            self.fault((*path, "match"), printable(wrong, 200))
            return ()
        scheme = default if entry.quantize == "default" else None
        if entry.quantize is not None and scheme is None:
            changes = entry.quantize
            changed = default.changed(changes) if isinstance(changes, dict) else changes
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
        """The rules of a preset that the recipe names."""
        if name not in PRESETS:
            self.fault(path, format_unknown_name("preset", printable(name), tuple(PRESETS)))
            return ()
        return expand_preset(name, default, self.document.line(path))

    def gates(self, gates: object, evaluation: object, fidelity: object) -> None:
        """Gates on figures that do not exist or that nothing measures, or bounded in a way that they do not have."""
        listed = evaluation.get("tasks") if isinstance(evaluation, dict) else None
        tasks = (
            [task for task in listed if isinstance(task, str)] if isinstance(listed, list) else []
        )
        for figure, bounds in gates.items() if isinstance(gates, dict) else ():
            path = ("gates", figure)
            base, _, domain = str(figure).partition("@")
            of_part = domain in (
                DOMAINS
                if figures.is_per_domain(base)
                else tasks
                if figures.is_per_task(base)
                else ()
            )
            if figure not in (*figures.list_keys(), *tasks) and not of_part:
                self.fault(path, _unknown_figure(str(figure), tasks))
            elif figures.is_streamed(base) and fidelity in (None, "none"):
                self.fault(
                    path,
                    "needs a fidelity text, found fidelity: none; name a set, or drop this gate",
                )
            elif isinstance(bounds, dict):
                allowed = [
                    key for key in Gate.model_fields if (key in ("max", "min")) != (figure in tasks)
                ]
                given = {key for key, value in bounds.items() if value is not None}
                if not given or given & set(Gate.model_fields) - set(allowed):
                    self.fault(
                        path, f"expected {' or '.join(f'{{{key}: NUMBER}}' for key in allowed)}"
                    )
                if not figures.is_size(base) and any(
                    isinstance(bounds.get(key), str) for key in ("max", "min")
                ):
                    self.fault(path, "expected a number; only size takes one such as 400GB")


def _spelled_out(document: YamlDocument) -> YamlDocument:
    """The document with gates such as `kl_mean.max: 1` as `kl_mean: {max: 1}`; a bound given twice stays a fault."""
    gates = document.values.get("gates")
    if not isinstance(gates, dict):
        return document
    found: dict[str, object] = {}
    for key, value in gates.items():
        figure, _, bound = key.rpartition(".")
        others = found.get(figure, gates.get(figure, {}))
        if (
            figure
            and bound in Gate.model_fields
            and isinstance(others, dict)
            and bound not in others
        ):
            found[figure] = {**others, bound: value}
        else:
            found.setdefault(key, value)
    return replace(document, values={**document.values, "gates": found})


def _unknown_figure(figure: str, tasks: Sequence[str]) -> str:
    """Why a gate names nothing, with what it may have meant."""
    base, at, domain = figure.partition("@")
    if at and figures.is_per_domain(base):
        return format_unknown_name("domain", printable(domain), DOMAINS)
    sentence = format_unknown_name(
        "figure or task of evaluation.tasks", printable(figure), (*figures.list_keys(), *tasks)
    )
    return f"{sentence} Of one domain: kl_mean@{DOMAINS[-1]}."


def _overridden(
    document: YamlDocument, overrides: Mapping[str, str]
) -> tuple[YamlDocument, list[tuple[int, str]]]:
    faults: list[tuple[int, str]] = []
    for key, text in overrides.items():
        try:
            document = document.with_value(*_change(key, text))
        except RecipeError as error:
            faults += [(0, sentence) for sentence in error.faults]
    return document, faults


def _change(key: str, text: str) -> tuple[KeyPath, object]:
    """Path and value of an override; RecipeError when it is no text."""
    path = tuple(key.split("."))
    if is_invalid_text(text):
        raise RecipeError([f"override {printable(key)}: {INVALID_TEXT}"])
    return path, text if _is_text(path) else parse_value(text, f"override {printable(key)}")


def _is_text(path: KeyPath) -> bool:
    """Whether the key takes any text, so that an override of "123" or "[x]" stays what it is."""
    section = SECTIONS.get(str(path[0])) if len(path) == 2 else None
    field = section.model_fields.get(str(path[-1])) if section else None
    return field is not None and field.annotation is str


def _known(path: KeyPath) -> tuple[str, ...]:
    """The keys that may stand in the mapping at `path`."""
    model: type[BaseModel] = Recipe
    if path and path[-1] == "quantize":
        model = Quantize
    elif path:
        model = SECTIONS.get(str(path[0]), Recipe)
    return tuple(model.model_fields)
