"""From assumptions to costs: each figure has a key, a value and the arithmetic that anybody can redo. Pure."""

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
    """A number, what it is, and how it came about in numbers: "0.8 kW x 26,280 h x 0.12"."""

    key: str
    label: str
    value: float
    unit: str
    arithmetic: str


CostItems = Mapping[str, CostItem]


def compute_cost_items(found: Assumptions) -> dict[str, CostItem]:
    """Every figure by its key, in the order of the arithmetic."""
    made: dict[str, CostItem] = {}
    for figure in _all(found, made):
        made[figure.key] = figure
    return made


def format_number(value: float) -> str:
    """As people read it: "26,280", "2,522.88", "0.028"; three digits below one."""
    if value and abs(value) < 1:
        return f"{value:.3g}" if abs(value) >= 1e-4 else f"{value:.2e}"
    return _bare(f"{value:,.2f}" if abs(value) < 100_000 else f"{value:,.0f}")


def format_operand(value: float) -> str:
    """As arithmetic needs it, to seven digits, so that it can be redone: "1.0332"."""
    return f"{value:,.0f}" if abs(value) >= 1e6 else format(value, ",.7g")


def _bare(text: str) -> str:
    return text.rstrip("0").rstrip(".") if "." in text else text


def _all(found: Assumptions, made: Mapping[str, CostItem]) -> Iterator[CostItem]:
    """Figures one by one; `made` holds those before."""
    yield from _capacity(found)
    if found.owned:
        yield from _owned(found.owned, found.currency, made)
    if found.rented:
        yield from _rented(found.rented, found.currency, made)
    for side in list_sides(found):
        yield from _per_volume(found, side, made)
    for api in found.api:
        yield from _api(api, found)
    for side in list_sides(found):
        for api in found.api:
            yield from _break_even(found, side, api, made)


def list_sides(found: Assumptions) -> tuple[str, ...]:
    """Which of "owned" and "rented" the assumptions have."""
    return tuple(
        name for name, section in (("owned", found.owned), ("rented", found.rented)) if section
    )


def _capacity(found: Assumptions) -> Iterator[CostItem]:
    rate, share = found.throughput.output_tokens_per_s, found.throughput.utilization
    most = rate * 3600 * HOURS_PER_MONTH / MILLION
    yield CostItem(
        key="capacity.most",
        label="one set at full load",
        value=most,
        unit="million output tokens a month",
        arithmetic=f"{format_operand(rate)} tokens/s x 3,600 s x {HOURS_PER_MONTH} h / 1,000,000",
    )
    yield CostItem(
        key="capacity.served",
        label="one set as utilized",
        value=most * share,
        unit="million output tokens a month",
        arithmetic=f"{format_operand(most)} x {format_operand(share)}",
    )


def _owned(owned: Owned, currency: str, made: Mapping[str, CostItem]) -> Iterator[CostItem]:
    months = 12 * owned.years
    purchase = owned.cards * owned.price_per_card + owned.nodes * owned.price_per_node
    yield CostItem(
        key="owned.purchase",
        label="purchase",
        value=purchase,
        unit=currency,
        arithmetic=f"{owned.cards} x {format_operand(owned.price_per_card)} + {owned.nodes} x {format_operand(owned.price_per_node)}",
    )
    yield CostItem(
        key="owned.amortization",
        label="amortization",
        value=purchase * (1 - owned.resale) / months,
        unit=f"{currency} a month",
        arithmetic=f"{format_operand(purchase)} x (1 - {format_operand(owned.resale)}) / {format_operand(months)} months",
    )
    yield CostItem(
        key="owned.interest",
        label="interest",
        value=purchase * (1 + owned.resale) / 2 * owned.interest / 12,
        unit=f"{currency} a month",
        arithmetic=f"{format_operand(purchase)} x (1 + {format_operand(owned.resale)}) / 2 x {format_operand(owned.interest)} / 12",
    )
    yield from _power(owned, currency)
    yield _flat("owned", owned.hosting_per_month, currency)
    yield _staff("owned", owned.staff, owned.staff_per_year, currency)
    parts = ("amortization", "interest", "electricity_per_month", "hosting", "staff")
    yield _sum(
        "owned.per_month",
        "one owned set",
        [made[f"owned.{part}"] for part in parts],
        f"{currency} a month",
    )
    yield CostItem(
        key="owned.total",
        label="over its life",
        value=made["owned.per_month"].value * months,
        unit=currency,
        arithmetic=f"{format_operand(made['owned.per_month'].value)} x {format_operand(months)} months",
    )


def _power(owned: Owned, currency: str) -> Iterator[CostItem]:
    watts = owned.cards * owned.watts_per_card + owned.nodes * owned.watts_per_node
    drawn = watts / 1000 * owned.load * owned.pue
    yield CostItem(
        key="owned.kilowatts",
        label="power drawn",
        value=drawn,
        unit="kW",
        arithmetic=f"({owned.cards} x {format_operand(owned.watts_per_card)} W + {owned.nodes} x "
        f"{format_operand(owned.watts_per_node)} W) / 1,000 x {format_operand(owned.load)} load x {format_operand(owned.pue)} PUE",
    )
    hours = owned.years * HOURS_PER_YEAR
    cost = drawn * hours * owned.price_per_kwh
    yield CostItem(
        key="owned.electricity",
        label="electricity over its life",
        value=cost,
        unit=currency,
        arithmetic=f"{format_operand(drawn)} kW x {format_operand(hours)} h x {format_operand(owned.price_per_kwh)}",
    )
    yield CostItem(
        key="owned.electricity_per_month",
        label="electricity",
        value=cost / (12 * owned.years),
        unit=f"{currency} a month",
        arithmetic=f"{format_operand(cost)} / {format_operand(12 * owned.years)} months",
    )


def _rented(rented: Rented, currency: str, made: Mapping[str, CostItem]) -> Iterator[CostItem]:
    yield CostItem(
        key="rented.cards",
        label="rent",
        value=rented.cards * rented.price_per_card_hour * HOURS_PER_MONTH,
        unit=f"{currency} a month",
        arithmetic=f"{rented.cards} x {format_operand(rented.price_per_card_hour)} x {HOURS_PER_MONTH} h",
    )
    yield _flat("rented", rented.hosting_per_month, currency)
    yield _staff("rented", rented.staff, rented.staff_per_year, currency)
    parts = [made[f"rented.{part}"] for part in ("cards", "hosting", "staff")]
    yield _sum("rented.per_month", "one rented set", parts, f"{currency} a month")


def _flat(side: str, per_month: float, currency: str) -> CostItem:
    return CostItem(
        key=f"{side}.hosting",
        label="hosting",
        value=per_month,
        unit=f"{currency} a month",
        arithmetic="as given",
    )


def _staff(side: str, people: float, per_year: float, currency: str) -> CostItem:
    return CostItem(
        key=f"{side}.staff",
        label="staff",
        value=people * per_year / 12,
        unit=f"{currency} a month",
        arithmetic=f"{format_operand(people)} x {format_operand(per_year)} / 12",
    )


def _sum(key: str, label: str, parts: list[CostItem], unit: str) -> CostItem:
    told = " + ".join(format_operand(part.value) for part in parts)
    return CostItem(
        key=key, label=label, value=sum(part.value for part in parts), unit=unit, arithmetic=told
    )


def _per_volume(found: Assumptions, side: str, made: Mapping[str, CostItem]) -> Iterator[CostItem]:
    per_month, served = made[f"{side}.per_month"].value, made["capacity.served"].value
    yield CostItem(
        key=f"{side}.per_million",
        label=f"{side}, as utilized",
        value=per_month / served,
        unit=f"{found.currency} per million output tokens",
        arithmetic=f"{format_operand(per_month)} / {format_operand(served)}",
    )
    volume = found.volume.million_output_tokens_per_month
    sets = ceil(volume / served)
    yield CostItem(
        key=f"{side}.volume",
        label=f"{side}, for the volume",
        value=sets * per_month,
        unit=f"{found.currency} a month",
        arithmetic=f"{format_operand(volume)} / {format_operand(served)} = {format_operand(volume / served)}, so {sets} x {format_operand(per_month)}",
    )


def _api(api: Api, found: Assumptions) -> Iterator[CostItem]:
    volume = found.volume
    cached = api.input if api.cached_input is None else api.cached_input
    prompt = (1 - volume.cached_input) * api.input + volume.cached_input * cached
    per_million = api.output + volume.input_per_output * prompt
    key = f"api.{api.name}"
    yield CostItem(
        key=f"{key}.per_million",
        label=f"{api.name}, prompts included",
        value=per_million,
        unit=f"{found.currency} per million output tokens",
        arithmetic=f"{format_operand(api.output)} + {format_operand(volume.input_per_output)} x ({format_operand(1 - volume.cached_input)} x "
        f"{format_operand(api.input)} + {format_operand(volume.cached_input)} x {format_operand(cached)})",
    )
    yield CostItem(
        key=f"{key}.volume",
        label=f"{api.name}, for the volume",
        value=volume.million_output_tokens_per_month * per_million,
        unit=f"{found.currency} a month",
        arithmetic=f"{format_operand(volume.million_output_tokens_per_month)} x {format_operand(per_million)}",
    )


def _break_even(
    found: Assumptions, side: str, api: Api, made: Mapping[str, CostItem]
) -> Iterator[CostItem]:
    """The volume from which one set costs less; none where the API is free."""
    per_month, price = made[f"{side}.per_month"].value, made[f"api.{api.name}.per_million"].value
    if price <= 0:
        return
    volume, most = per_month / price, made["capacity.most"].value
    yield CostItem(
        key=f"break_even.{side}.{api.name}",
        label=f"{side} against {api.name}",
        value=volume,
        unit="million output tokens a month",
        arithmetic=f"{format_operand(per_month)} / {format_operand(price)}",
    )
    yield CostItem(
        key=f"break_even.{side}.{api.name}.utilization",
        label="which takes a utilization of",
        value=volume / most,
        unit="of one set" if volume <= most else "of one set: more than it can do",
        arithmetic=f"{format_operand(volume)} / {format_operand(most)}",
    )
