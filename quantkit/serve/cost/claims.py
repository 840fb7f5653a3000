"""Published figures, recomputed: wrong ones are reported with the arithmetic. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from math import floor, log10

from quantkit.errors import RecipeError
from quantkit.io.suggestions import format_unknown_name
from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.cost_items import CostItem, CostItems, format_number


@dataclass(frozen=True, kw_only=True, slots=True)
class Claim:
    """The claimed value of a cost item, and whether it is correct."""

    item: CostItem
    claimed: float
    is_correct: bool

    @property
    def message(self) -> str:
        """One sentence: "owned.electricity: claimed 8,400, computed 2,522.88 USD (...): wrong"."""
        value = self.item.value
        computed = f"{format_number(value)} {self.item.unit} ({self.item.arithmetic})"
        text = f"{self.item.key}: claimed {format_number(self.claimed)}, computed {computed}"
        if self.is_correct:
            return f"{text}: right"
        if value == 0 or self.claimed <= 0:
            return f"{text}: wrong"
        ratio = self.claimed / value
        factor, direction = format_number(max(ratio, 1 / ratio)), "high" if ratio > 1 else "low"
        return f"{text}: wrong, {factor} times too {direction}"


def recompute_claims(assumptions: Assumptions, items: CostItems, name: str) -> list[Claim]:
    """Return every claim with its verdict; RecipeError if a claim names no cost item."""
    unknown = [key for key in assumptions.claimed if key not in items]
    if unknown:
        raise RecipeError([
            f"{name}: claimed.{key}: {format_unknown_name('figure', key, tuple(items))}"
            for key in unknown
        ])
    return [
        Claim(
            item=items[key], claimed=claimed, is_correct=is_rounding_of(claimed, items[key].value)
        )
        for key, claimed in assumptions.claimed.items()
    ]


def is_rounding_of(claimed: float, value: float) -> bool:
    """Return whether a claim is the value rounded to its own number of digits, at least two."""
    if claimed == value:
        return True
    if claimed == 0 or value == 0:
        return False
    digits = len(f"{abs(claimed):.10g}".replace(".", "").lstrip("0").rstrip("0"))
    place = floor(log10(abs(value))) - max(2, digits) + 1
    return abs(claimed - value) <= 0.5 * 10.0**place * (1 + 1e-9)
