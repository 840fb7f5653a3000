"""Schema of a measured number."""

from __future__ import annotations

from math import isfinite
from typing import Annotated

from pydantic import AfterValidator, BaseModel

from quantkit.plan.plan_schema import FROZEN


def _drop_non_finite(value: object) -> object:
    return None if isinstance(value, float) and not isfinite(value) else value


Number = Annotated[
    float | None, AfterValidator(_drop_non_finite)
]  # after: the text "nan" becomes a number first


class Figure(BaseModel):
    """A measured number with its standard error, or its 95 % confidence interval, if known."""

    model_config = FROZEN
    value: Number
    se: Number = None
    ci: tuple[Number, Number] | None = None
