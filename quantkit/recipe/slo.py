"""Service-level objectives: bounds for the figures of a load test. Pure."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, Field, ValidationError, model_validator

from quantkit.errors import RecipeError
from quantkit.io.suggestions import format_unknown_name
from quantkit.io.validation_errors import describe_fault
from quantkit.io.yaml_document import format_path, parse_document, printable
from quantkit.recipe.value_types import FROZEN, describe

Side = Literal["max", "min"]
PERCENTILES = (50, 90, 95, 99)
TIMES: Mapping[str, str] = {
    "latency": "latency of a request, s",
    "ttft": "time to first token, s",
    "inter_token": "mean time between the tokens of an answer, s",
}
RATES: Mapping[str, tuple[str, Side]] = {
    "errors": ("share of the requests that failed", "max"),
    "cache_hits": ("share of prompt tokens from the prefix cache, in conversations", "min"),
    "gpu_utilization": ("mean GPU utilization while generating", "min"),
    "tokens_per_second": ("output tokens per second, all requests", "min"),
    "tokens_per_currency": ("output tokens per unit of currency", "min"),
}
"""Figure -> its meaning, and the side of its bound."""
LENGTHS = re.compile(r"<(?P<below>[0-9]{1,9})|>=(?P<least>[0-9]{1,9})")
SHARES = ("errors", "cache_hits", "gpu_utilization")


@dataclass(frozen=True, kw_only=True)
class SloFigure:
    """A figure of a load test as a key names it: `latency_p50@<1000`, `errors`.

    percentile: of the times; None for rates. below, least: the prompts that count have fewer than
    `below` tokens and at least `least`.
    """

    name: str
    percentile: int | None = None
    least: int = 0
    below: int | None = None

    @property
    def side(self) -> Side:
        """The side of its bound: times have an upper one."""
        return "max" if self.percentile is not None else RATES[self.name][1]

    @property
    def meaning(self) -> str:
        """The measured quantity and its unit."""
        if self.percentile is None:
            return RATES[self.name][0]
        text = f"p{self.percentile} of the {TIMES[self.name]}"
        if self.below is not None:
            return f"{text}; prompts under {self.below:,} tokens"
        return f"{text}; prompts from {self.least:,} tokens" if self.least else text


def parse_figure(key: str) -> SloFigure:
    """Parse the key of a target; ValueError if it names no figure."""
    base, separator, lengths = key.partition("@")
    name, _, percentile = base.rpartition("_p")
    if name in TIMES and percentile in map(str, PERCENTILES):
        match = LENGTHS.fullmatch(lengths)
        if separator and match is None:
            raise ValueError(
                f"expected prompts as @<1000 or @>=1000 tokens, found @{printable(lengths)}"
            )
        return SloFigure(
            name=name,
            percentile=int(percentile),
            least=int(match["least"] or 0) if match else 0,
            below=int(match["below"]) if match and match["below"] else None,
        )
    if base in RATES and not separator:
        return SloFigure(name=base)
    known = (*RATES, *(f"{name}_p{number}" for name in TIMES for number in PERCENTILES))
    raise ValueError(format_unknown_name("figure", printable(key), known))


class SloBound(BaseModel):
    """The bound of a figure."""

    model_config = FROZEN
    max: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    min: Annotated[float | None, Field(ge=0, allow_inf_nan=False)] = None
    proven: bool = False


class Slo(BaseModel):
    """The targets of a service."""

    model_config = FROZEN
    concurrency: Annotated[
        int | None,
        Field(ge=1, le=100_000),
        describe(
            "The level of the load test that must hold the targets; `null`: its largest.", "16"
        ),
    ] = None
    targets: Annotated[
        dict[str, SloBound],
        Field(min_length=1),
        describe(
            "Figure of a load test -> `{max: NUMBER}` or `{min: NUMBER}`, with `proven: true` if "
            "the whole 95 % interval must hold the bound (serve/README.md lists the figures).",
            "{latency_p99: {max: 30}}",
            "mapping",
        ),
    ]

    @model_validator(mode="after")
    def check_targets(self) -> Slo:
        """Check figures, and the side and range of their bounds."""
        for key, bound in self.targets.items():
            try:
                figure = parse_figure(key)
            except ValueError as fault:
                raise ValueError(f"targets.{printable(key)}: {fault}") from None
            value, other = bound.max, bound.min
            if figure.side == "min":
                value, other = other, value
            if value is None or other is not None:
                raise ValueError(f"targets.{key}: expected {{{figure.side}: NUMBER}}")
            if figure.name in SHARES and value > 1:
                raise ValueError(
                    f"targets.{key}: expected a share from 0 to 1, found {value:g}; write 85 % as "
                    "0.85"
                )
        return self


class SloFile(BaseModel):
    """A file with `slo:` alone."""

    model_config = FROZEN
    slo: Slo


def parse_slo(text: str, name: str) -> Slo:
    """Return the `slo:` of a YAML text, e.g. of a recipe; RecipeError with every fault of it.

    Other keys are those of a recipe, which are not read here.
    """
    document = parse_document(text, name, "file of targets", "slo:")
    values = {key: value for key, value in document.values.items() if key == "slo"}
    try:
        return SloFile.model_validate(values).slo
    except ValidationError as error:
        faults = []
        for details in error.errors(include_url=False):
            path = tuple(details["loc"])
            known = tuple((SloFile if len(path) < 2 else Slo).model_fields)
            fault = describe_fault(path, details, known)
            faults.append(f"{document.where(path)}: {format_path(path)}: {fault}")
        raise RecipeError(faults) from None
