"""Every key of a recipe: type, default, allowed values and meaning, as frozen pydantic models.

`recipe.parse` fills them from text. recipes/README.md is generated from the descriptions of the
fields (tests/tools/recipe_reference.py).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    model_serializer,
)

from quantkit import registry
from quantkit.io.yaml_document import YamlDocument
from quantkit.recipe import patterns
from quantkit.recipe.quantize import Quantize
from quantkit.recipe.sections import (
    AUTO,
    Calibration,
    Compute,
    Endpoint,
    Evaluation,
    FidelityText,
    Output,
    Source,
)
from quantkit.recipe.slo import Slo
from quantkit.recipe.value_types import (
    FROZEN,
    Bound,
    FormatNames,
    Points,
    Seed,
    Share,
    Size,
    Text,
    describe,
    none_as_null,
)


class Rule(BaseModel):
    """One resolved rule; exactly one of `quantize` and `keep` is set. The first rule that matches a
    module applies.
    """

    model_config = FROZEN
    label: str  # "rules[0]" as written, or "experts-only[1]"
    line: int = Field(exclude=True)  # in the recipe; 0 for a rule that the recipe does not write
    optional: bool = Field(default=False, exclude=True)  # chosen by default: may match nothing
    match: Text
    quantize: Quantize | None = None
    keep: Literal["source", "bf16"] | None = None

    def matches(self, module: str) -> bool:
        """Return whether the pattern matches the full dotted name of a module."""
        return patterns.matches_module(self.match, module)

    def names(self, module: str) -> bool:
        """Return whether the pattern also spells out the last part of the name, as protected roles
        require.
        """
        return patterns.names_module(self.match, module)


class Gate(BaseModel):
    """Bounds of a figure (max, min) or a task (the others). A build with a missed gate exits with
    3.
    """

    model_config = FROZEN
    max: Annotated[
        Bound | None,
        describe("The figure must not be above.", "0.05", "number, for `size` also a size"),
    ] = None
    min: Annotated[
        Bound | None,
        describe("The figure must not be below.", "0.9", "number, for `size` also a size"),
    ] = None
    min_recovery: Annotated[
        Share | None, describe("Least score of the artifact as a share of the source's.", "0.97")
    ] = None
    margin_pp: Annotated[
        Points | None,
        describe(
            "Non-inferiority: the 95 % interval of the difference must lie above minus this many "
            "percentage points.",
            "2",
        ),
    ] = None
    max_lost: Annotated[
        Seed | None,
        describe("Most items that the source solves and the artifact does not.", "20"),
    ] = None
    min_score: Annotated[Share | None, describe("Least score of the artifact.", "0.8")] = None
    max_truncated_pp: Annotated[
        Points | None,
        describe(
            "Most percentage points by which the artifact's answers cut by the token limit exceed "
            "the source's.",
            "2",
        ),
    ] = None
    max_unparsed_pp: Annotated[
        Points | None,
        describe(
            "Most percentage points by which the artifact's answers without a result exceed the "
            "source's.",
            "2",
        ),
    ] = None
    proven: Annotated[
        bool,
        describe(
            "The whole 95 % interval must keep the bound. `gates: {proven: true}` says so for all "
            "gates.",
            "true",
        ),
    ] = False

    @model_serializer(mode="wrap")
    def omit_default(self, handler: SerializerFunctionWrapHandler) -> dict[str, object]:
        """Leave `proven` out if it is false, as in recipes before this key: their hash stays."""
        values: dict[str, object] = handler(self)
        return {key: value for key, value in values.items() if key != "proven" or value}


class Recipe(BaseModel):
    """A whole recipe with its defaults filled in. `rules` None: the default rules of the
    architecture.
    """

    model_config = FROZEN
    version: Annotated[Literal[1], describe("Version of the recipe format.", "1")]
    source: Annotated[Source, describe("The model to quantize.")]
    quantize: Annotated[
        Quantize, describe("The default scheme; a rule may change any of its keys.")
    ] = Quantize()
    format: Annotated[
        FormatNames,
        describe(
            "How codes are stored and which engines read them: modules of quantkit/formats/. Of "
            "several formats each gets an artifact at `output.path-<format>`, from one "
            "quantization.",
            "[awq, dense]",
        ),
    ] = ("awq",)
    rules: Annotated[
        tuple[Rule, ...] | None,
        describe(
            "Which modules are quantized: a preset, or a list of rules of which the first match "
            "applies. `null`: `experts-only` for models with routed experts, otherwise "
            "`all-linear`.",
            "experts-only",
            "preset or list of rules",
        ),
    ] = None
    calibration: Annotated[
        Calibration | None, describe("The calibration text; `null` if no method needs any.")
    ] = None
    fidelity: Annotated[
        FidelityText | None,
        BeforeValidator(none_as_null),
        describe("The held-out text; `none` measures nothing, and the report says so."),
    ]  # no default: measuring nothing must be written
    evaluation: Annotated[Evaluation, describe("The benchmarks.")] = Evaluation()
    gates: Annotated[
        dict[str, Gate],
        describe(
            "Figure or task -> bound. A build with a missed gate exits with 3. `proven: true` here "
            "applies to all gates."
        ),
        Field(json_schema_extra={"properties": {"proven": {"type": "boolean"}}}),
    ] = {}
    slo: Annotated[
        Slo | None, describe("Targets for a service: `quantkit loadtest` judges them, no build.")
    ] = None
    output: Annotated[Output, describe("The artifact.")]
    memory: Annotated[
        Size | None,
        describe(
            "Host memory that a build may use; `null` is 70 % of the available memory. It sets "
            "how many experts are quantized at once, and never changes the result.",
            "64GB",
        ),
    ] = None
    mtp: Annotated[
        Literal["keep", "quantize", "drop"],
        describe(
            "The multi-token-prediction layer: kept, quantized by rounding to nearest, or dropped.",
            "drop",
        ),
    ] = "keep"
    propagate: Annotated[
        Literal["auto", "quantized", "original", "both"],
        describe(
            "Weights that carry the calibration text to the next block. With `both`, dense layers "
            "also compensate the error of the blocks before them, for twice the time. `auto`: "
            "`both` for dense models, `quantized` for models with routed experts.",
            "both",
        ),
    ] = "auto"
    compute: Annotated[Compute, describe("Device and dtypes.")] = Compute()
    _document: YamlDocument = PrivateAttr(default=YamlDocument(name="recipe", values={}, lines={}))
    _overrides: tuple[tuple[str, str], ...] = PrivateAttr(default=())
    _conversions: tuple[str, ...] = PrivateAttr(default=())
    _chosen_texts: tuple[tuple[str, tuple[str, str]], ...] = PrivateAttr(default=())

    @property
    def name(self) -> str:
        """The name of the file in messages."""
        return self._document.name

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Overridden keys with their text, except those that do not change the content of the
        artifact.
        """
        return tuple(pair for pair in self._overrides if pair[0] not in {"memory", "output.path"})

    @property
    def conversions(self) -> tuple[str, ...]:
        """Sentences on keys of former versions that were converted."""
        return self._conversions

    def is_overridden(self, key: str) -> bool:
        """Return whether a dotted key, e.g. "output.path", was overridden."""
        return any(name == key for name, _ in self._overrides)

    @property
    def automatic_texts(self) -> tuple[str, ...]:
        """The texts whose set is still `auto`: "calibration", "fidelity"."""
        texts = {
            "calibration": self.calibration if self.needs_calibration else None,
            "fidelity": self.fidelity,
        }
        return tuple(use for use, text in texts.items() if text is not None and text.set == AUTO)

    @property
    def chosen_texts(self) -> dict[str, tuple[str, str]]:
        """The sets that `auto` stands for: text -> (set, reason), "" for the first choice."""
        return dict(self._chosen_texts)

    def choose_texts(self, chosen: Mapping[str, tuple[str, str]]) -> Recipe:
        """Return the recipe with sets for `automatic_texts`: text -> (set, reason)."""
        uses = self.automatic_texts
        changes = {
            use: getattr(self, use).model_copy(update={"set": chosen[use][0]}) for use in uses
        }
        recipe = self.model_copy(update=changes)
        recipe._chosen_texts = tuple((use, chosen[use]) for use in uses)
        return recipe

    def pin_source(self, revision: str | None) -> Recipe:
        """Return the recipe with the source's commit; unchanged for a model of this machine."""
        if revision is None:
            return self
        source = self.source.model_copy(update={"revision": revision})
        return self.model_copy(update={"source": source})

    def dump(self) -> dict[str, object]:
        """Return the recipe as JSON values, with all defaults and with presets resolved."""
        return self.model_dump(mode="json", exclude={"slo"} if self.slo is None else None)

    def where(self, *path: str | int) -> str:
        """Return file and line of a key for a message: where("quantize", "group_size") ->
        "recipe.yaml:14".
        """
        return self._document.where(path)

    def path(self, format_name: str) -> str:
        """Return the path of the artifact in a format: output.path, plus "-<format>" if there are
        several.
        """
        return (
            self.output.path
            if len(self.format) == 1
            else f"{self.output.path}-{format_name.replace('_', '-')}"
        )

    @property
    def endpoint(self) -> Endpoint | None:
        """The server that samples text of the model itself."""
        return self.calibration.endpoint if self.calibration is not None else None

    @property
    def needs_calibration(self) -> bool:
        """Whether any method of the recipe needs statistics of calibration text."""
        used = {
            self.quantize.method,
            *(rule.quantize.method for rule in self.rules or () if rule.quantize),
        }
        return any(registry.get_method(name).needs_stats for name in used)

    @property
    def hash(self) -> str:
        """sha256 of the keys that decide the artifact: all but output.path, memory and slo."""
        absent = (
            {"trust_remote_code"} if self.source.trust_remote_code is None else set[str]()
        )  # omitted if unset, as in recipes before this key
        values = self.model_dump(
            mode="json",
            exclude={"memory": True, "slo": True, "output": {"path"}, "source": absent},
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class RuleEntry(BaseModel):
    """One entry of `rules` as written: `match` with `quantize` or `keep`, or `preset`."""

    model_config = FROZEN
    match: Annotated[
        Text | None,
        describe(
            "Pattern over the full dotted module name: a glob, or `re:` and a regular expression. "
            "A pattern that matches no module is an error. Routers, embeddings, heads and MTP "
            "projections are quantized only by a rule that spells out the last part of their name.",
            "'*.mlp.*'",
        ),
    ] = None
    quantize: Annotated[
        object,
        describe(
            "Quantize the modules with the default scheme, or with some of its keys changed.",
            "{bits: 8}",
            "`default` or mapping",
        ),
    ] = None
    keep: Annotated[
        Literal["source", "bf16"] | None,
        describe(
            "Do not quantize the modules: store them as in the source if the format can, or as "
            "BF16.",
            "bf16",
        ),
    ] = None
    preset: Annotated[
        str | None,
        describe("Insert the rules of a preset at this place of the list.", "attention-source"),
    ] = None


SECTIONS: Mapping[str, type[BaseModel]] = {
    "source": Source, "quantize": Quantize, "rules": RuleEntry, "calibration": Calibration,
    "fidelity": FidelityText, "evaluation": Evaluation, "gates": Gate, "slo": Slo,
    "output": Output, "compute": Compute,
}  # fmt: skip
"""Sections with keys of their own; for rules and gates the model of one entry."""

SUBSECTIONS: Mapping[tuple[str, str], type[BaseModel]] = {("calibration", "endpoint"): Endpoint}
"""Keys of sections that are mappings with keys of their own."""


def list_keys() -> tuple[str, ...]:
    """Return every key, dotted: "version", "source.model", ..., "rules.match", "gates.max"."""
    keys: list[str] = []
    for name in Recipe.model_fields:
        section = SECTIONS.get(name)
        keys += [f"{name}.{field}" for field in section.model_fields] if section else [name]
    return tuple(keys)
