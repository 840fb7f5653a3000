"""The assumptions of a cost calculation: one YAML file, validated by pydantic.

An unknown key is an error with its line.
"""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from quantkit.errors import RecipeError, UsageError
from quantkit.io.files import read_bytes
from quantkit.io.validation_errors import describe_fault
from quantkit.io.yaml_document import YamlDocument, format_path, parse_document

FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)
KIND = "file of assumptions"

Money = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**6)]
Text = Annotated[str, Field(min_length=1, max_length=200)]


NO_GPUS, DUPLICATE_API = "no_gpus", "duplicate_api"
"""Types of the errors that no single key causes."""


class Volume(BaseModel):
    """The workload."""

    model_config = FROZEN
    million_output_tokens_per_month: Positive
    input_per_output: Money = 3.0
    cached_input: Fraction = 0.0


class Throughput(BaseModel):
    """The throughput of one set of GPUs."""

    model_config = FROZEN
    output_tokens_per_s: Positive
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    source: str = ""


class Owned(BaseModel):
    """One set of GPUs that is bought."""

    model_config = FROZEN
    cards: Annotated[int, Field(ge=1, le=10**6)]
    price_per_card: Money
    nodes: Count = 1
    price_per_node: Money = 0.0
    years: Annotated[float, Field(gt=0, le=50)] = 3.0
    resale: Fraction = 0.0
    interest: Fraction = 0.0
    watts_per_card: Money
    watts_per_node: Money = 0.0
    load: Fraction = 1.0
    pue: Annotated[float, Field(ge=1, le=5)] = 1.0
    price_per_kwh: Money
    hosting_per_month: Money = 0.0
    staff: Money = 0.0
    staff_per_year: Money = 0.0


class Rented(BaseModel):
    """One set of GPUs that is rented by the hour."""

    model_config = FROZEN
    cards: Annotated[int, Field(ge=1, le=10**6)]
    price_per_card_hour: Money
    hosting_per_month: Money = 0.0
    staff: Money = 0.0
    staff_per_year: Money = 0.0


class Api(BaseModel):
    """The prices of an API per million tokens.

    Without `cached_input`, cached tokens have the price of other input tokens.
    """

    model_config = FROZEN
    name: Text
    input: Money
    cached_input: Money | None = None
    output: Money


class Assumptions(BaseModel):
    """The whole file."""

    model_config = FROZEN
    version: Literal[1]
    title: Text = "Cost"
    currency: Annotated[str, Field(min_length=1, max_length=8)] = "USD"
    volume: Volume
    throughput: Throughput
    owned: Owned | None = None
    rented: Rented | None = None
    api: Annotated[tuple[Api, ...], Field(strict=False, max_length=50)] = ()
    sensitivity: Annotated[float, Field(gt=0, lt=1)] = 0.25
    claimed: dict[str, Annotated[float, Field(allow_inf_nan=False)]] = {}

    @model_validator(mode="after")
    def check_sections(self) -> Assumptions:
        """Check that there are GPUs to compare with."""
        if self.owned is None and self.rented is None:
            raise PydanticCustomError(
                NO_GPUS, "expected a section owned, rented or both, found neither; add one"
            )
        return self

    @model_validator(mode="after")
    def check_api_names(self) -> Assumptions:
        """Check that the names of APIs are unique: they are part of the keys of cost items."""
        names = [api.name for api in self.api]
        duplicates = [(index, name) for index, name in enumerate(names) if name in names[:index]]
        if duplicates:
            raise PydanticCustomError(
                DUPLICATE_API, "names are listed twice", {"duplicates": duplicates}
            )
        return self


SECTIONS: dict[str, type[BaseModel]] = {
    "volume": Volume,
    "throughput": Throughput,
    "owned": Owned,
    "rented": Rented,
    "api": Api,
}


def read_default_text() -> str:
    """Return the text of the assumptions that ship with quantkit, every key explained."""
    file = importlib.resources.files("quantkit.serve.cost") / "assumptions.yaml"
    return file.read_text(encoding="utf-8")


def read_assumptions(path: Path) -> Assumptions:
    """Read a file; UsageError if it cannot be read, RecipeError with all its faults."""
    content = read_bytes(path, error=UsageError)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise UsageError(
            f"{path}: expected a UTF-8 text file, found byte 0x{content[fault.start]:02x} at "
            f"offset {fault.start}; save it as UTF-8"
        ) from None
    return parse_assumptions(text, str(path))


def parse_assumptions(text: str, name: str) -> Assumptions:
    """Parse assumptions; RecipeError with every fault and its line. name: for messages."""
    document = parse_document(text, name, KIND)
    try:
        return Assumptions.model_validate(document.values)
    except ValidationError as error:
        raise RecipeError(_format_faults(document, error)) from None


def _format_faults(document: YamlDocument, error: ValidationError) -> list[str]:
    """Return a message for every fault, in the order of lines."""
    faults = []
    for details in error.errors(include_url=False):
        if details["type"] == NO_GPUS:
            faults.append((1, f"{document.name}:1: {details['msg']}"))
            continue
        if details["type"] == DUPLICATE_API:
            for index, name in details["ctx"]["duplicates"]:
                where = f"{document.where(('api', index))}: api[{index}].name"
                message = f"{where}: {name!r} is listed twice; rename one"
                faults.append((document.line(("api", index)), message))
            continue
        path = tuple(details["loc"])
        section = SECTIONS.get(str(path[0])) if len(path) > 1 else Assumptions
        known = tuple((section or Assumptions).model_fields)
        message = (
            f"{document.where(path)}: {format_path(path)}: {describe_fault(path, details, known)}"
        )
        faults.append((document.line(path), message))
    return [message for _, message in sorted(faults, key=lambda fault: fault[0])]
