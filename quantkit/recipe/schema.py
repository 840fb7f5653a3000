"""Every key of a recipe, its type and its default; recipes/v3-awq4.yaml says what each means.

Frozen values. `recipe.parse` fills them from text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from decimal import Decimal
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PrivateAttr,
    model_validator,
)

from quantkit import registry
from quantkit.contracts import FALLBACK_ROUNDING
from quantkit.io.owned_dirs import validate_folder
from quantkit.io.suggestions import format_unknown_name
from quantkit.io.yaml_document import YamlDocument, printable
from quantkit.recipe import patterns

FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip


def size_bytes(value: object) -> int:
    """Bytes of "64GB" (decimal), "512MiB" (binary) or a plain number; ValueError says what was expected."""
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    parts = (
        re.fullmatch(r"(\d{1,19})(\.\d{1,6})? ?([A-Za-z]*)", text)
        if isinstance(text, str)
        else None
    )
    if parts is None or parts[3] not in _UNITS:
        found = f"'{printable(text)}'" if isinstance(text, str) else type(value).__name__
        raise ValueError(
            f"expected a size such as 64GB, 512MiB or a number of bytes, found {found}"
        )
    total = int(Decimal(parts[1] + (parts[2] or "")) * _UNITS[parts[3]])
    if not 0 < total < 2**63:
        raise ValueError(f"expected a size above 0 and below 8 EiB, found '{printable(str(text))}'")
    return total


def _registered(kind: registry.Kind, name: str) -> str:
    known = registry.list_names(kind)
    if name not in known:
        raise ValueError(format_unknown_name(kind.removesuffix("s"), name, known))
    return name


def _distinct(names: tuple[str, ...]) -> tuple[str, ...]:
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"{', '.join(twice)}: listed twice")
    return names


def _listed(value: object) -> object:
    if value == []:  # a length for pydantic to check would be a second fault beside that of a name
        raise ValueError("expected a format or a list of some, found an empty list")
    return (value,) if isinstance(value, str) else value


def _absent(value: object) -> object:
    return None if value == "none" else value


def _sized(value: object) -> object:
    """A bound on a size may be written as one: "400GB"."""
    return float(size_bytes(value)) if isinstance(value, str) and value[:1].isdigit() else value


Text = Annotated[str, Field(min_length=1, max_length=1000)]
Count = Annotated[int, Field(ge=1, le=2**31 - 1)]
Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]
Number = Annotated[float, Field(allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Points = Annotated[float, Field(ge=0, le=100)]
Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]  # a branch or a tag moves
Size = Annotated[int, BeforeValidator(size_bytes)]
Bound = Annotated[float, Field(allow_inf_nan=False), BeforeValidator(_sized)]
MethodName = Annotated[str, AfterValidator(lambda name: _registered("methods", name))]
RoundingName = Annotated[str, AfterValidator(lambda name: _registered("roundings", name))]
FormatName = Annotated[
    str, AfterValidator(lambda name: _registered("formats", name.replace("-", "_")))
]
FormatNames = Annotated[
    tuple[FormatName, ...],
    Field(strict=False, max_length=8),
    BeforeValidator(_listed),
    AfterValidator(_distinct),
]
TaskNames = Annotated[
    tuple[Text, ...], Field(strict=False, max_length=1000), AfterValidator(_distinct)
]


class Source(BaseModel):
    """What is quantized."""

    model_config = FROZEN
    model: Text
    revision: Text | None = None
    trust_remote_code: Commit | None = None  # the commit whose tokenizer may run code of its own


OWN: Mapping[str, Mapping[str, object]] = {
    "gptq": {"rounding": "gptq"},
    "nf4": {
        "rounding": "nearest", "bits": 4, "group_size": 64, "symmetric": True, "scale_dtype": "auto",
        "double_quant": True,
    },
}  # fmt: skip
"""What a method is by itself, so that a recipe need not say it; of nf4 only double_quant can be another."""


class Quantize(BaseModel):
    """How a selected matrix is quantized: the recipe's default, or that with a rule's changes."""

    model_config = FROZEN
    method: MethodName = "awq"
    rounding: RoundingName = FALLBACK_ROUNDING  # method gptq never has nearest
    bits: Annotated[int, Field(ge=2, le=8)] = 4
    group_size: Literal[32, 64, 128, -1] = 128
    symmetric: bool = False
    scale_dtype: Literal["auto", "bfloat16", "float16"] = "auto"
    double_quant: bool | None = None  # method nf4 only, and never null there

    @model_validator(mode="before")
    @classmethod
    def _own_values(cls, values: object) -> object:
        """What follows from the method need not be said twice."""
        return (
            {**OWN.get(str(values.get("method")), {}), **values}
            if isinstance(values, dict)
            else values
        )

    def changed(self, changes: Mapping[str, object]) -> dict[str, object]:
        """These keys with the `changes` of a rule; what one method is by itself does not pass to another."""
        method = str(changes.get("method", self.method))
        left = () if method == self.method else (*OWN.get(self.method, {}), *OWN.get(method, {}))
        return {key: value for key, value in self.model_dump().items() if key not in left} | {
            **changes
        }

    @model_validator(mode="after")
    def _nf4_fits(self) -> Quantize:
        if self.method != "nf4":
            if self.double_quant is not None:
                raise ValueError(
                    f"double_quant is for method nf4, found method: {self.method}; leave it out, or set method: nf4"
                )
            return self
        fixed = {key: value for key, value in OWN["nf4"].items() if key != "double_quant"}
        wrong = {key: getattr(self, key) for key in fixed if getattr(self, key) != fixed[key]}
        if wrong:
            expected, found = (
                ", ".join(f"{key}: {str(value).lower()}" for key, value in values.items())
                for values in (fixed, wrong)
            )
            raise ValueError(
                f"method nf4 is {expected}, found {found}; leave that out, or choose another method"
            )
        if self.double_quant is None:
            raise ValueError(
                "double_quant: method nf4 expects true or false, found nothing; leave it out for true"
            )
        return self

    @model_validator(mode="after")
    def _rounding_fits(self) -> Quantize:
        if self.method == "gptq" and self.rounding == "nearest":
            raise ValueError(
                "method gptq is a rounding, found rounding: nearest; set rounding: gptq, or method: awq for "
                "ranges by calibration and codes by plain rounding"
            )
        learns = registry.get_rounding(self.rounding).needs_stats
        if learns and not registry.get_method(self.method).needs_stats:
            raise ValueError(
                f"rounding {self.rounding} learns from calibration, and method {self.method} does without; set "
                "rounding: nearest, or method: gptq"
            )
        return self


class Rule(BaseModel):
    """One resolved rule; exactly one of `quantize` and `keep` is set. Of a recipe's rules the first match decides."""

    model_config = FROZEN
    label: str  # "rules[0]" as written, or "experts-only[1]"
    line: int = Field(exclude=True)  # in the recipe; 0 when it came from elsewhere
    optional: bool = Field(default=False, exclude=True)  # nobody wrote it, so it may match nothing
    match: Text
    quantize: Quantize | None = None
    keep: Literal["source", "bf16"] | None = None

    def matches(self, module: str) -> bool:
        """Whether the pattern matches the module's full dotted name."""
        return patterns.matches(self.match, module)

    def names(self, module: str) -> bool:
        """Whether the pattern also spells out the module's last part: what a protected role asks for."""
        return patterns.names(self.match, module)


class Calibration(BaseModel):
    """The text that tells which weights matter."""

    model_config = FROZEN
    set: Text
    sequences: Count | None = None
    length: Count = 2048
    seed: Seed = 0
    experts: Literal["routed", "all"] = "routed"
    min_expert_tokens: Seed = 256
    under_calibrated: Literal["shared_gram", "rtn"] = "shared_gram"


class FidelityText(BaseModel):
    """The text on which source and artifact are compared."""

    model_config = FROZEN
    set: Text
    windows: Count | None = None
    length: Annotated[Count, Field(ge=2)] = 2048  # a token and the next


class Evaluation(BaseModel):
    """The benchmarks, and how they are run."""

    model_config = FROZEN
    tasks: TaskNames = ()
    limit: Count | None = None
    likelihood: Seed = 64  # items of each task whose gold solution is scored in the streaming pass
    backend: Literal["transformers"] = "transformers"
    batch_size: Count = 128


class Gate(BaseModel):
    """What one figure or task must keep to."""

    model_config = FROZEN
    max: Bound | None = None
    min: Bound | None = None
    min_recovery: Share | None = None  # the artifact's score as a share of the source's
    margin_pp: Points | None = None  # the interval of the difference lies above -margin
    max_lost: Seed | None = None  # items right in the source and wrong in the artifact
    min_score: Share | None = None  # the artifact's own
    max_truncated_pp: Points | None = (
        None  # how much more of its answers the token limit cuts than of the source's
    )
    max_unparsed_pp: Points | None = None  # the same of answers in which no result is found


class Gates(BaseModel):
    """A file of gates alone."""

    model_config = FROZEN
    gates: Annotated[dict[str, Gate], Field(min_length=1)]


class Output(BaseModel):
    """The artifact."""

    model_config = FROZEN
    path: Annotated[Text, AfterValidator(validate_folder)]
    shard_bytes: Size = 5 * 10**9


class Compute(BaseModel):
    """Where and how precisely blocks run."""

    model_config = FROZEN
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    calibration: Literal["auto", "float32", "bfloat16"] = "auto"  # the stream methods learn from


class Recipe(BaseModel):
    """A whole recipe with its defaults filled in. `rules` None: the architecture's default rules."""

    model_config = FROZEN
    version: Literal[1]
    source: Source
    quantize: Quantize = Quantize()
    format: FormatNames = ("awq",)  # several: one artifact each, from one solve
    rules: tuple[Rule, ...] | None = None
    calibration: Calibration | None = None
    fidelity: Annotated[
        FidelityText | None, BeforeValidator(_absent)
    ]  # no default: whoever wants none says "none"
    evaluation: Evaluation = Evaluation()
    gates: dict[str, Gate] = {}
    output: Output
    memory: Size | None = None
    mtp: Literal["keep", "quantize", "drop"] = "keep"
    propagate: Literal["quantized", "original", "both"] = "quantized"
    compute: Compute = Compute()
    _document: YamlDocument = PrivateAttr(default=YamlDocument(name="recipe", values={}, lines={}))
    _overrides: tuple[tuple[str, str], ...] = PrivateAttr(default=())

    @property
    def name(self) -> str:
        """How messages call the file."""
        return self._document.name

    @property
    def overrides(self) -> tuple[tuple[str, str], ...]:
        """Keys that were set beside the file, with the text they were given; but for those that change no content."""
        return tuple(pair for pair in self._overrides if pair[0] not in {"memory", "output.path"})

    def dump(self) -> dict[str, object]:
        """The recipe as plain JSON values, every default written out and presets resolved."""
        return self.model_dump(mode="json")

    def where(self, *path: str | int) -> str:
        """Where a key stands, for a fault found later: where("quantize", "group_size") -> "recipe.yaml:14"."""
        return self._document.where(path)

    def path(self, format_name: str) -> str:
        """Where the artifact in a format goes: output.path, with "-<format>" behind it when there are several."""
        return (
            self.output.path
            if len(self.format) == 1
            else f"{self.output.path}-{format_name.replace('_', '-')}"
        )

    @property
    def learns(self) -> bool:
        """Whether any method of the recipe learns from calibration text."""
        used = {
            self.quantize.method,
            *(rule.quantize.method for rule in self.rules or () if rule.quantize),
        }
        return any(registry.get_method(name).needs_stats for name in used)

    @property
    def hash(self) -> str:
        """sha256 of what decides the artifact's content; where it lies and how much memory makes it do not."""
        absent = (
            {"trust_remote_code"} if self.source.trust_remote_code is None else set[str]()
        )  # as in older hashes
        values = self.model_dump(
            mode="json", exclude={"memory": True, "output": {"path"}, "source": absent}
        )
        return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


class RuleEntry(BaseModel):
    """One item of `rules` as written."""

    model_config = FROZEN
    match: Text | None = None
    quantize: object = None
    keep: Literal["source", "bf16"] | None = None
    preset: str | None = None


SECTIONS: Mapping[str, type[BaseModel]] = {
    "source": Source, "quantize": Quantize, "rules": RuleEntry, "calibration": Calibration, "fidelity": FidelityText,
    "evaluation": Evaluation, "gates": Gate, "output": Output, "compute": Compute,
}  # fmt: skip
"""What holds keys of its own: the sections, one rule, one gate."""


def keys() -> tuple[str, ...]:
    """Every key, dotted: "version", "source.model", ..., "rules.match", "gates.max"."""
    found: list[str] = []
    for name in Recipe.model_fields:
        inner = SECTIONS.get(name)
        found += [f"{name}.{field}" for field in inner.model_fields] if inner else [name]
    return tuple(found)
