"""Cost per hour of the GPUs of a set of assumptions, for figures of a load test. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from quantkit.errors import UsageError
from quantkit.io.suggestions import format_unknown_name
from quantkit.serve.cost.assumptions import Api, Assumptions
from quantkit.serve.cost.cost_items import HOURS_PER_MONTH, compute_cost_items, list_sides


@dataclass(frozen=True, kw_only=True)
class HourlyCost:
    """The cost of one set of GPUs per hour, its currency, and which set it is."""

    per_hour: float
    currency: str
    side: str  # "owned" or "rented"


def compute_hourly_cost(assumptions: Assumptions) -> HourlyCost:
    """Return the cost per hour of the owned set, or of the rented one if none is owned."""
    side, items = list_sides(assumptions)[0], compute_cost_items(assumptions)
    per_hour = items[f"{side}.per_month"].value / HOURS_PER_MONTH
    return HourlyCost(per_hour=per_hour, currency=assumptions.currency, side=side)


def find_api(assumptions: Assumptions, name: str) -> Api:
    """Return the prices of an API; UsageError if the assumptions do not have it."""
    api = next((api for api in assumptions.api if api.name == name), None)
    if api is None:
        known = tuple(api.name for api in assumptions.api)
        raise UsageError(f"--api: {format_unknown_name('API of the assumptions', name, known)}")
    return api


def compute_api_price(api: Api, prompt: float, output: float, cached: float = 0.0) -> float:
    """Return the price per million output tokens, input included, at these tokens per answer.

    cached: those of the prompt's tokens that are billed as cached.
    """
    price = api.input if api.cached_input is None else api.cached_input
    return api.output + ((prompt - cached) * api.input + cached * price) / output
