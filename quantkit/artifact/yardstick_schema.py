"""Schema of the references for the KL of an artifact: rounding to nearest, and bfloat16."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from quantkit.artifact.figure_schema import Figure
from quantkit.plan.plan_schema import FROZEN


class YardstickResult(BaseModel):
    """The KL of rounding to nearest on one domain, and the artifact's as a multiple of it.

    Domain "all" pools every token. ratio: mean KL of the artifact over that of the yardstick;
    typical: geometric mean over the tokens of the ratio of their KL, which no single token decides.
    Both are over the same tokens.
    """

    model_config = FROZEN
    domain: str
    tokens: int
    kl_mean: Figure
    ratio: Figure
    typical: Figure


class Yardstick(BaseModel):
    """The same modules, bits and groups, rounded to nearest without calibration."""

    model_config = FROZEN
    method: Literal["rtn"] = "rtn"
    top1: Figure
    rows: Annotated[tuple[YardstickResult, ...], Field(min_length=1)]  # all text first

    @property
    def kl_mean(self) -> Figure:
        """Mean KL of rounding to nearest, over all text."""
        return self.rows[0].kl_mean

    @property
    def ratio(self) -> Figure:
        """Mean KL of the artifact over that of rounding to nearest, over all text."""
        return self.rows[0].ratio


class NoiseFloor(BaseModel):
    """KL that bfloat16 alone costs the source, over all text.

    what: what runs in bfloat16 and in float32 next to it. A difference between artifacts below it
    is one that an engine's arithmetic makes as well.
    """

    model_config = FROZEN
    what: str
    kl_mean: Figure
    top1: Figure
