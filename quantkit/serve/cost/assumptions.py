"""Every assumption behind a cost, in one YAML file; an unknown key is refused with its line."""

from __future__ import annotations

import importlib.resources
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from quantkit.errors import RecipeError, UsageError
from quantkit.io.files import read_bytes
from quantkit.io.validation_errors import describe_fault
from quantkit.io.yaml_document import YamlDocument, format_path, parse_document

FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)
KIND = "file of assumptions"

Money = Annotated[float, Field(ge=0, le=1e15, allow_inf_nan=False)]
Above = Annotated[float, Field(gt=0, le=1e15, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=0, le=10**6)]
Text = Annotated[str, Field(min_length=1, max_length=200)]


class Volume(BaseModel):
    """How much work."""

    model_config = FROZEN
    million_output_tokens_per_month: Above
    input_per_output: Money = 3.0
    cached_input: Share = 0.0


class Throughput(BaseModel):
    """What one set of cards delivers."""

    model_config = FROZEN
    output_tokens_per_s: Above
    utilization: Annotated[float, Field(gt=0, le=1)] = 0.4
    source: str = ""


class Owned(BaseModel):
    """One set of cards that is bought."""

    model_config = FROZEN
    cards: Annotated[int, Field(ge=1, le=10**6)]
    price_per_card: Money
    nodes: Count = 1
    price_per_node: Money = 0.0
    years: Annotated[float, Field(gt=0, le=50)] = 3.0
    resale: Share = 0.0
    interest: Share = 0.0
    watts_per_card: Money
    watts_per_node: Money = 0.0
    load: Share = 1.0
    pue: Annotated[float, Field(ge=1, le=5)] = 1.0
    price_per_kwh: Money
    hosting_per_month: Money = 0.0
    staff: Money = 0.0
    staff_per_year: Money = 0.0


class Rented(BaseModel):
    """One set of cards that is rented by the hour."""

    model_config = FROZEN
    cards: Annotated[int, Field(ge=1, le=10**6)]
    price_per_card_hour: Money
    hosting_per_month: Money = 0.0
    staff: Money = 0.0
    staff_per_year: Money = 0.0


class Api(BaseModel):
    """What an API charges per million tokens; without `cached_input` cached tokens cost what others do."""

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


SECTIONS: dict[str, type[BaseModel]] = {
    "volume": Volume, "throughput": Throughput, "owned": Owned, "rented": Rented, "api": Api,
}  # fmt: skip


def read_default_text() -> str:
    """The text of the assumptions that ship with quantkit, every key explained."""
    return (importlib.resources.files("quantkit.serve.cost") / "assumptions.yaml").read_text(
        encoding="utf-8"
    )


def read_assumptions(path: Path) -> Assumptions:
    """The assumptions in a file; UsageError when it cannot be read, RecipeError with every fault of it."""
    content = read_bytes(path, error=UsageError)
    try:
        text = content.decode("utf-8")
    except UnicodeDecodeError as fault:
        raise UsageError(
            f"{path}: expected a UTF-8 text file, found byte 0x{content[fault.start]:02x} at offset {fault.start}; "
            "save it as UTF-8"
        ) from None
    return parse_assumptions(text, str(path))


def parse_assumptions(text: str, name: str) -> Assumptions:
    """The assumptions in `text`; RecipeError with every fault and its line otherwise. `name`: how messages call it."""
    document = parse_document(text, name, KIND)
    try:
        found = Assumptions.model_validate(document.values)
    except ValidationError as error:
        raise RecipeError(_faults(document, error)) from None
    faults = _contradictions(document, found)
    if faults:
        raise RecipeError(faults)
    return found


def _faults(document: YamlDocument, error: ValidationError) -> list[str]:
    told = []
    for details in error.errors(include_url=False):
        path = tuple(details["loc"])
        section = SECTIONS.get(str(path[0])) if len(path) > 1 else Assumptions
        known = tuple((section or Assumptions).model_fields)
        told.append((
            document.line(path),
            f"{document.where(path)}: {format_path(path)}: {describe_fault(path, details, known)}",
        ))
    return [text for _, text in sorted(told, key=lambda fault: fault[0])]


def _contradictions(document: YamlDocument, found: Assumptions) -> list[str]:
    """What no key by itself is wrong about."""
    faults = []
    if found.owned is None and found.rented is None:
        faults.append(
            f"{document.name}:1: expected a section owned, rented or both, found neither; add one"
        )
    names = [api.name for api in found.api]
    for index, name in enumerate(names):
        if name in names[:index]:
            faults.append(
                f"{document.where(('api', index))}: api[{index}].name: {name!r} is listed twice; rename one"
            )
    return faults
