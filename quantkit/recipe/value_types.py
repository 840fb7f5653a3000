"""Types of the values in a recipe, and the documentation of its keys."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, WithJsonSchema

from quantkit import registry
from quantkit.io.suggestions import format_unknown_name
from quantkit.io.yaml_document import printable

FROZEN = ConfigDict(frozen=True, extra="forbid", strict=True)

_UNITS = {"": 1, "B": 1, "kB": 10**3, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12,
          "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}  # fmt: skip


def parse_size(value: object) -> int:
    """Return the bytes of "64GB" (decimal), "512MiB" (binary) or a plain number; ValueError
    otherwise.
    """
    text = str(value) if isinstance(value, int) and not isinstance(value, bool) else value
    parts = (
        re.fullmatch(r"(\d{1,19})(\.\d{1,6})? ?([A-Za-z]*)", text)
        if isinstance(text, str)
        else None
    )
    if parts is None or parts[3] not in _UNITS:
        actual = f"'{printable(text)}'" if isinstance(text, str) else type(value).__name__
        raise ValueError(
            f"expected a size such as 64GB, 512MiB or a number of bytes, found {actual}"
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
    if value == []:  # checked here: a minimum length would add a second fault to that of a name
        raise ValueError("expected a format or a list of some, found an empty list")
    return (value,) if isinstance(value, str) else value


def none_as_null(value: object) -> object:
    return None if value == "none" else value


def _sized(value: object) -> object:
    """Return the bytes of a bound such as "400GB"; other values unchanged."""
    return float(parse_size(value)) if isinstance(value, str) and value[:1].isdigit() else value


def describe(meaning: str, example: str = "", type_text: str = "") -> Any:
    """Return the documentation of a key.

    `type_text` replaces the type derived from the annotation.
    """
    return Field(
        description=meaning,
        examples=[example] if example else None,
        json_schema_extra={"type_text": type_text} if type_text else None,
    )


Text = Annotated[str, Field(min_length=1, max_length=1000)]

Count = Annotated[int, Field(ge=1, le=2**31 - 1)]

Seed = Annotated[int, Field(ge=0, le=2**31 - 1)]

Number = Annotated[float, Field(allow_inf_nan=False)]

Share = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]

Points = Annotated[float, Field(ge=0, le=100)]

Commit = Annotated[str, Field(pattern="^[0-9a-f]{40}$")]  # a branch or a tag moves

SIZE_TEXT = {"type": "string", "pattern": r"^\d{1,19}(\.\d{1,6})? ?([kKMGT]?B|[KMGT]iB)?$"}
"""JSON Schema of a size as text."""

Size = Annotated[
    int,
    BeforeValidator(parse_size),
    WithJsonSchema({"anyOf": [{"type": "integer", "exclusiveMinimum": 0}, SIZE_TEXT]}),
]

Bound = Annotated[
    float,
    Field(allow_inf_nan=False),
    BeforeValidator(_sized),
    WithJsonSchema({"anyOf": [{"type": "number"}, SIZE_TEXT]}),
]


def _list_format_names() -> list[str]:
    """Return every spelling of a format: compressed_tensors and compressed-tensors."""
    names = registry.list_names("formats")
    return sorted({*names, *(name.replace("_", "-") for name in names)})


RoundingName = Annotated[
    str,
    AfterValidator(lambda name: _registered("roundings", name)),
    WithJsonSchema({"enum": list(registry.list_names("roundings"))}),
]
MethodName = Annotated[
    str,
    AfterValidator(lambda name: _registered("methods", name)),
    WithJsonSchema({"enum": list(registry.list_names("methods"))}),
]

FormatName = Annotated[
    str, AfterValidator(lambda name: _registered("formats", name.replace("-", "_")))
]

FormatNames = Annotated[
    tuple[FormatName, ...],
    Field(strict=False, max_length=8),
    BeforeValidator(_listed),
    AfterValidator(_distinct),
    WithJsonSchema({
        "anyOf": [
            {"enum": _list_format_names()},
            {
                "type": "array",
                "items": {"enum": _list_format_names()},
                "minItems": 1,
                "maxItems": 8,
                "uniqueItems": True,
            },
        ]
    }),
]

TaskNames = Annotated[
    tuple[Text, ...], Field(strict=False, max_length=1000), AfterValidator(_distinct)
]
