"""Figures that somebody published, redone: the ones that do not come out are named with the arithmetic. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10

from quantkit import registry
from quantkit.errors import RecipeError
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.cost_items import CostItem, CostItems, format_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What was claimed of a figure, and whether it comes out."""

    figure: CostItem
    claimed: float
    is_correct: bool

    @property
    def message(self) -> str:
        """One sentence: "owned.electricity: claimed 8,400, by the arithmetic 2,522.88 (...): 3.33 times too high"."""
        value = self.figure.value
        how = f"{self.figure.key}: claimed {format_number(self.claimed)}, by the arithmetic {format_number(value)} {self.figure.unit} "
        how += f"({self.figure.arithmetic})"
        if self.is_correct:
            return f"{how}: right"
        if value == 0 or self.claimed <= 0:
            return f"{how}: wrong"
        ratio = self.claimed / value
        return f"{how}: wrong, {format_number(max(ratio, 1 / ratio))} times too {'high' if ratio > 1 else 'low'}"


def recompute_claims(found: Assumptions, made: CostItems, name: str) -> list[Claim]:
    """Every claim with its verdict; RecipeError for a claim about a figure that there is none of."""
    unknown = [key for key in found.claimed if key not in made]
    if unknown:
        raise RecipeError([
            f"{name}: claimed.{key}: {registry.unknown('figure', key, tuple(made))}"
            for key in unknown
        ])
    return [
        Claim(
            figure=made[key], claimed=claimed, is_correct=is_rounding_of(claimed, made[key].value)
        )
        for key, claimed in found.claimed.items()
    ]


def is_rounding_of(claimed: float, value: float) -> bool:
    """Whether a claim is the value, rounded to no fewer than two digits, to as many as the claim shows."""
    if claimed == value:
        return True
    if claimed == 0 or value == 0:
        return False
    shown = len(f"{abs(claimed):.10g}".replace(".", "").lstrip("0").rstrip("0"))
    place = floor(log10(abs(value))) - max(2, shown) + 1
    return abs(claimed - value) <= 0.5 * 10.0**place * (1 + 1e-9)
