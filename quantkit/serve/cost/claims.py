"""Figures that somebody published, redone: the ones that do not come out are named with the arithmetic. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10

from quantkit.errors import RecipeError
from quantkit.io.suggestions import format_unknown_name
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.figures import Figure, Figures, number


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """What was claimed of a figure, and whether it comes out."""

    figure: Figure
    claimed: float
    right: bool

    @property
    def told(self) -> str:
        """One sentence: "owned.electricity: claimed 8,400, by the arithmetic 2,522.88 (...): 3.33 times too high"."""
        value = self.figure.value
        how = f"{self.figure.key}: claimed {number(self.claimed)}, by the arithmetic {number(value)} {self.figure.unit} "
        how += f"({self.figure.arithmetic})"
        if self.right:
            return f"{how}: right"
        if value == 0 or self.claimed <= 0:
            return f"{how}: wrong"
        ratio = self.claimed / value
        return f"{how}: wrong, {number(max(ratio, 1 / ratio))} times too {'high' if ratio > 1 else 'low'}"


def recompute_claims(found: Assumptions, made: Figures, name: str) -> list[Claim]:
    """Every claim with its verdict; RecipeError for a claim about a figure that there is none of."""
    unknown = [key for key in found.claimed if key not in made]
    if unknown:
        raise RecipeError([
            f"{name}: claimed.{key}: {format_unknown_name('figure', key, tuple(made))}"
            for key in unknown
        ])
    return [
        Claim(figure=made[key], claimed=claimed, right=agrees(claimed, made[key].value))
        for key, claimed in found.claimed.items()
    ]


def agrees(claimed: float, value: float) -> bool:
    """Whether a claim is the value, rounded to no fewer than two digits, to as many as the claim shows."""
    if claimed == value:
        return True
    if claimed == 0 or value == 0:
        return False
    shown = len(f"{abs(claimed):.10g}".replace(".", "").lstrip("0").rstrip("0"))
    place = floor(log10(abs(value))) - max(2, shown) + 1
    return abs(claimed - value) <= 0.5 * 10.0**place * (1 + 1e-9)
