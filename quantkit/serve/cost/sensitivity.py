"""What a change of each assumption does to the cost of a million tokens, all others held. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from quantkit.serve.cost.assumptions import Assumptions
from quantkit.serve.cost.figures import figures, sides

MOVED: dict[str, tuple[str, ...]] = {
    "throughput": ("output_tokens_per_s", "utilization"),
    "owned": (
        "price_per_card", "price_per_node", "years", "resale", "interest", "watts_per_card", "load", "pue",
        "price_per_kwh", "hosting_per_month", "staff", "staff_per_year",
    ),
    "rented": ("price_per_card_hour", "hosting_per_month", "staff", "staff_per_year"),
}  # fmt: skip
"""Assumptions that are moved, by section."""

CAPPED = {
    "utilization": 1.0,
    "load": 1.0,
    "resale": 1.0,
    "interest": 1.0,
    "pue": 5.0,
    "years": 50.0,
}
LEAST = {"pue": 1.0}


@dataclass(frozen=True, kw_only=True, slots=True)
class Swing:
    """One assumption moved down and up: its values, and a million output tokens of `side` with each."""

    side: str
    key: str  # "owned.price_per_kwh"
    low: float
    high: float
    at_low: float
    at_high: float
    base: float

    @property
    def span(self) -> float:
        return abs(self.at_high - self.at_low)


def compute_sensitivity(found: Assumptions) -> list[Swing]:
    """Every swing, by side and then by how much it does."""
    swings = [swing for side in sides(found) for swing in _of(found, side)]
    order = sides(found)
    return sorted(
        (s for s in swings if s.span > 0), key=lambda swing: (order.index(swing.side), -swing.span)
    )


def _of(found: Assumptions, side: str) -> Iterator[Swing]:
    base = figures(found)[f"{side}.per_million"].value
    for section in ("throughput", side):
        for name in MOVED[section]:
            value = float(getattr(getattr(found, section), name))
            low = max(LEAST.get(name, 0.0), value * (1 - found.sensitivity))
            high = min(CAPPED.get(name, float("inf")), value * (1 + found.sensitivity))
            costs = [
                figures(moved(found, section, name, at))[f"{side}.per_million"].value
                for at in (low, high)
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


def moved(found: Assumptions, section: str, name: str, value: float) -> Assumptions:
    """The assumptions with one of them changed."""
    part = getattr(found, section).model_copy(update={name: value})
    return found.model_copy(update={section: part})
