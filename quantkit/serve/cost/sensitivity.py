"""The effect of each assumption on the cost of a million tokens, with all others fixed. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.cost_items import compute_cost_items, list_sides

VARIED: dict[str, tuple[str, ...]] = {
    "throughput": ("output_tokens_per_s", "utilization"),
    "owned": (
        "price_per_card", "price_per_node", "years", "resale", "interest", "watts_per_card", "load",
        "pue", "price_per_kwh", "hosting_per_month", "staff", "staff_per_year",
    ),
    "rented": ("price_per_card_hour", "hosting_per_month", "staff", "staff_per_year"),
}  # fmt: skip
"""Section -> assumptions that are varied."""

UPPER_LIMITS = {
    "utilization": 1.0,
    "load": 1.0,
    "resale": 1.0,
    "interest": 1.0,
    "pue": 5.0,
    "years": 50.0,
}
LOWER_LIMITS = {"pue": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Swing:
    """One assumption, varied down and up: its values, and the cost of a million output tokens.

    side: "owned" or "rented". key: such as "owned.price_per_kwh". base: the cost without variation.
    """

    side: str
    key: str
    low: float
    high: float
    at_low: float
    at_high: float
    base: float

    @property
    def span(self) -> float:
        return abs(self.at_high - self.at_low)


def compute_sensitivity(assumptions: Assumptions) -> list[Swing]:
    """Return every swing, by side and then by its span, the largest first."""
    order = list_sides(assumptions)
    swings = [swing for side in order for swing in _iterate_swings(assumptions, side)]
    return sorted(
        (swing for swing in swings if swing.span > 0),
        key=lambda swing: (order.index(swing.side), -swing.span),
    )


def _iterate_swings(assumptions: Assumptions, side: str) -> Iterator[Swing]:
    base = compute_cost_items(assumptions)[f"{side}.per_million"].value
    for section in ("throughput", side):
        for name in VARIED[section]:
            value = float(getattr(getattr(assumptions, section), name))
            low = max(LOWER_LIMITS.get(name, 0.0), value * (1 - assumptions.sensitivity))
            high = min(UPPER_LIMITS.get(name, float("inf")), value * (1 + assumptions.sensitivity))
            costs = [
                compute_cost_items(replace_assumption(assumptions, section, name, varied))[
                    f"{side}.per_million"
                ].value
                for varied in (low, high)
            ]
            yield Swing(
                side=side,
                key=f"{section}.{name}",
                low=low,
                high=high,
                at_low=costs[0],
                at_high=costs[1],
                base=base,
            )


def replace_assumption(
    assumptions: Assumptions, section: str, name: str, value: float
) -> Assumptions:
    """Return the assumptions with one of them replaced."""
    part = getattr(assumptions, section).model_copy(update={name: value})
    return assumptions.model_copy(update={section: part})
