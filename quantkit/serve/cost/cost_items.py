"""From assumptions to costs: each item has a key, a value and arithmetic that can be repeated."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import ceil

from quantkit.serve.cost.assumptions import Api, Assumptions, Owned, Rented

HOURS_PER_YEAR = 8760
HOURS_PER_MONTH = 730
MILLION = 10**6


@dataclass(frozen=True, kw_only=True, slots=True)
class CostItem:
    """A number, its label, and its arithmetic in numbers: "0.8 kW x 26,280 h x 0.12"."""

    key: str
    label: str
    value: float
    unit: str
    arithmetic: str


CostItems = Mapping[str, CostItem]


def compute_cost_items(assumptions: Assumptions) -> dict[str, CostItem]:
    """Compute every item, by key, in the order of the arithmetic."""
    items: dict[str, CostItem] = {}
    for item in _iterate_items(assumptions, items):
        items[item.key] = item
    return items


def format_number(value: float) -> str:
    """Format a number for people: "26,280", "2,522.88", "0.028"; three digits below one."""
    if value and abs(value) < 1:
        return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"
    return _strip_zeros(f"{value:,.2f}" if abs(value) < 100_000 else f"{value:,.0f}")


def format_operand(value: float) -> str:
    """Format an operand to seven digits, so that the arithmetic can be repeated: "1.0332"."""
    return f"{value:,.0f}" if abs(value) >= 1e6 else format(value, ",.7g")


def _strip_zeros(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _iterate_items(assumptions: Assumptions, items: CostItems) -> Iterator[CostItem]:
    """Yield the items one by one; `items` has the previous ones."""
    currency = assumptions.currency
    yield from _iterate_capacity(assumptions)
    if assumptions.owned:
        yield from _iterate_owned(assumptions.owned, currency, items)
    if assumptions.rented:
        yield from _iterate_rented(assumptions.rented, currency, items)
    for side in list_sides(assumptions):
        yield from _iterate_volume(assumptions, side, items)
    for api in assumptions.api:
        yield from _iterate_api(api, assumptions)
    for side in list_sides(assumptions):
        for api in assumptions.api:
            yield from _iterate_break_even(side, api, items)


def list_sides(assumptions: Assumptions) -> tuple[str, ...]:
    """Return those of "owned" and "rented" that the assumptions have."""
    sections = (("owned", assumptions.owned), ("rented", assumptions.rented))
    return tuple(name for name, section in sections if section)


def _iterate_capacity(assumptions: Assumptions) -> Iterator[CostItem]:
    rate = assumptions.throughput.output_tokens_per_s
    utilization = assumptions.throughput.utilization
    maximum = rate * 3600 * HOURS_PER_MONTH / MILLION
    hours = f"{HOURS_PER_MONTH} h / 1,000,000"
    yield CostItem(
        key="capacity.most",
        label="one set at full load",
        value=maximum,
        unit="million output tokens per month",
        arithmetic=f"{format_operand(rate)} tokens/s x 3,600 s x {hours}",
    )
    yield CostItem(
        key="capacity.served",
        label="one set as utilized",
        value=maximum * utilization,
        unit="million output tokens per month",
        arithmetic=f"{format_operand(maximum)} x {format_operand(utilization)}",
    )


def _iterate_owned(owned: Owned, currency: str, items: CostItems) -> Iterator[CostItem]:
    months = 12 * owned.years
    purchase = owned.cards * owned.price_per_card + owned.nodes * owned.price_per_node
    gpus = f"{owned.cards} x {format_operand(owned.price_per_card)}"
    nodes = f"{owned.nodes} x {format_operand(owned.price_per_node)}"
    yield CostItem(
        key="owned.purchase",
        label="purchase",
        value=purchase,
        unit=currency,
        arithmetic=f"{gpus} + {nodes}",
    )
    yield CostItem(
        key="owned.amortization",
        label="amortization",
        value=purchase * (1 - owned.resale) / months,
        unit=f"{currency} per month",
        arithmetic=f"{format_operand(purchase)} x (1 - {format_operand(owned.resale)}) / "
        f"{format_operand(months)} months",
    )
    yield CostItem(
        key="owned.interest",
        label="interest",
        value=purchase * (1 + owned.resale) / 2 * owned.interest / 12,
        unit=f"{currency} per month",
        arithmetic=f"{format_operand(purchase)} x (1 + {format_operand(owned.resale)}) / 2 x "
        f"{format_operand(owned.interest)} / 12",
    )
    yield from _iterate_power(owned, currency)
    yield _make_hosting("owned", owned.hosting_per_month, currency)
    yield _make_staff("owned", owned.staff, owned.staff_per_year, currency)
    parts = ("amortization", "interest", "electricity_per_month", "hosting", "staff")
    yield _make_sum(
        "owned.per_month",
        "one owned set",
        [items[f"owned.{part}"] for part in parts],
        f"{currency} per month",
    )
    per_month = items["owned.per_month"].value
    yield CostItem(
        key="owned.total",
        label="over its lifetime",
        value=per_month * months,
        unit=currency,
        arithmetic=f"{format_operand(per_month)} x {format_operand(months)} months",
    )


def _iterate_power(owned: Owned, currency: str) -> Iterator[CostItem]:
    watts = owned.cards * owned.watts_per_card + owned.nodes * owned.watts_per_node
    kilowatts = watts / 1000 * owned.load * owned.pue
    gpus = f"{owned.cards} x {format_operand(owned.watts_per_card)} W"
    nodes = f"{owned.nodes} x {format_operand(owned.watts_per_node)} W"
    yield CostItem(
        key="owned.kilowatts",
        label="power drawn",
        value=kilowatts,
        unit="kW",
        arithmetic=f"({gpus} + {nodes}) / 1,000 x {format_operand(owned.load)} load x "
        f"{format_operand(owned.pue)} PUE",
    )
    hours = owned.years * HOURS_PER_YEAR
    cost = kilowatts * hours * owned.price_per_kwh
    yield CostItem(
        key="owned.electricity",
        label="electricity over its lifetime",
        value=cost,
        unit=currency,
        arithmetic=f"{format_operand(kilowatts)} kW x {format_operand(hours)} h x "
        f"{format_operand(owned.price_per_kwh)}",
    )
    yield CostItem(
        key="owned.electricity_per_month",
        label="electricity",
        value=cost / (12 * owned.years),
        unit=f"{currency} per month",
        arithmetic=f"{format_operand(cost)} / {format_operand(12 * owned.years)} months",
    )


def _iterate_rented(rented: Rented, currency: str, items: CostItems) -> Iterator[CostItem]:
    yield CostItem(
        key="rented.cards",
        label="rent",
        value=rented.cards * rented.price_per_card_hour * HOURS_PER_MONTH,
        unit=f"{currency} per month",
        arithmetic=f"{rented.cards} x {format_operand(rented.price_per_card_hour)} x "
        f"{HOURS_PER_MONTH} h",
    )
    yield _make_hosting("rented", rented.hosting_per_month, currency)
    yield _make_staff("rented", rented.staff, rented.staff_per_year, currency)
    parts = [items[f"rented.{part}"] for part in ("cards", "hosting", "staff")]
    yield _make_sum("rented.per_month", "one rented set", parts, f"{currency} per month")


def _make_hosting(side: str, per_month: float, currency: str) -> CostItem:
    return CostItem(
        key=f"{side}.hosting",
        label="hosting",
        value=per_month,
        unit=f"{currency} per month",
        arithmetic="an assumption",
    )


def _make_staff(side: str, people: float, per_year: float, currency: str) -> CostItem:
    return CostItem(
        key=f"{side}.staff",
        label="staff",
        value=people * per_year / 12,
        unit=f"{currency} per month",
        arithmetic=f"{format_operand(people)} x {format_operand(per_year)} / 12",
    )


def _make_sum(key: str, label: str, parts: list[CostItem], unit: str) -> CostItem:
    arithmetic = " + ".join(format_operand(part.value) for part in parts)
    total = sum(part.value for part in parts)
    return CostItem(key=key, label=label, value=total, unit=unit, arithmetic=arithmetic)


def _iterate_volume(assumptions: Assumptions, side: str, items: CostItems) -> Iterator[CostItem]:
    per_month, served = items[f"{side}.per_month"].value, items["capacity.served"].value
    currency = assumptions.currency
    yield CostItem(
        key=f"{side}.per_million",
        label=f"{side}, as utilized",
        value=per_month / served,
        unit=f"{currency} per million output tokens",
        arithmetic=f"{format_operand(per_month)} / {format_operand(served)}",
    )
    volume = assumptions.volume.million_output_tokens_per_month
    sets = ceil(volume / served)
    ratio = (
        f"{format_operand(volume)} / {format_operand(served)} = {format_operand(volume / served)}"
    )
    yield CostItem(
        key=f"{side}.volume",
        label=f"{side}, for the volume",
        value=sets * per_month,
        unit=f"{currency} per month",
        arithmetic=f"{ratio}, so {sets} x {format_operand(per_month)}",
    )


def _iterate_api(api: Api, assumptions: Assumptions) -> Iterator[CostItem]:
    volume, currency = assumptions.volume, assumptions.currency
    cached = api.input if api.cached_input is None else api.cached_input
    prompt = (1 - volume.cached_input) * api.input + volume.cached_input * cached
    per_million = api.output + volume.input_per_output * prompt
    uncached_price = f"{format_operand(1 - volume.cached_input)} x {format_operand(api.input)}"
    cached_price = f"{format_operand(volume.cached_input)} x {format_operand(cached)}"
    yield CostItem(
        key=f"api.{api.name}.per_million",
        label=f"{api.name}, input included",
        value=per_million,
        unit=f"{currency} per million output tokens",
        arithmetic=f"{format_operand(api.output)} + {format_operand(volume.input_per_output)} x "
        f"({uncached_price} + {cached_price})",
    )
    tokens = volume.million_output_tokens_per_month
    yield CostItem(
        key=f"api.{api.name}.volume",
        label=f"{api.name}, for the volume",
        value=tokens * per_million,
        unit=f"{currency} per month",
        arithmetic=f"{format_operand(tokens)} x {format_operand(per_million)}",
    )


def _iterate_break_even(side: str, api: Api, items: CostItems) -> Iterator[CostItem]:
    """Yield the volume from which one set costs less than the API; nothing if the API is free."""
    per_month = items[f"{side}.per_month"].value
    price = items[f"api.{api.name}.per_million"].value
    if price <= 0:
        return
    volume, maximum = per_month / price, items["capacity.most"].value
    yield CostItem(
        key=f"break_even.{side}.{api.name}",
        label=f"{side} against {api.name}",
        value=volume,
        unit="million output tokens per month",
        arithmetic=f"{format_operand(per_month)} / {format_operand(price)}",
    )
    yield CostItem(
        key=f"break_even.{side}.{api.name}.utilization",
        label="required utilization",
        value=volume / maximum,
        unit="of one set" if volume <= maximum else "of one set: more than its capacity",
        arithmetic=f"{format_operand(volume)} / {format_operand(maximum)}",
    )
