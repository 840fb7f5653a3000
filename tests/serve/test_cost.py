"""Costs: arithmetic of every item, a widely copied example, faults with lines, the page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from quantkit.cli.main import main
from quantkit.errors import RecipeError
from quantkit.serve.cost.assumptions import Assumptions, parse_assumptions, read_default_text
from quantkit.serve.cost.claims import is_rounding_of, recompute_claims
from quantkit.serve.cost.cost_items import compute_cost_items
from quantkit.serve.cost.sensitivity import compute_sensitivity, replace_assumption

COPIED = """
version: 1
title: a widely copied example
volume: {million_output_tokens_per_month: 30}
throughput: {output_tokens_per_s: 30, utilization: 0.5}
owned: {cards: 2, price_per_card: 1600, nodes: 1, price_per_node: 1500, years: 3,
        watts_per_card: 350, watts_per_node: 100, price_per_kwh: 0.12}
api: [{name: one, input: 0.5, output: 1.5}]
claimed: {owned.electricity: CLAIM}
"""
"""800 W for three years at 0.12 per kilowatt-hour, which guides put at 8,400."""


@pytest.fixture
def assumptions() -> Assumptions:
    return parse_assumptions(read_default_text(), "assumptions.yaml")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["cost", *arguments])


# -------------------------------------------------------------------------------------- cost items


def test_claim_of_8400_for_800_w_over_three_years_is_wrong() -> None:
    result = parse_assumptions(COPIED.replace("CLAIM", "8400"), "copied.yaml")
    made = compute_cost_items(result)
    assert made["owned.kilowatts"].value == 0.8
    assert (
        made["owned.electricity"].value
        == pytest.approx(0.8 * 3 * 365 * 24 * 0.12)
        == pytest.approx(2522.88)
    )
    (claim,) = recompute_claims(result, made, "copied.yaml")
    assert not claim.is_correct
    assert claim.message == (
        "owned.electricity: claimed 8,400, computed 2,522.88 USD (0.8 kW x 26,280 h x 0.12): "
        "wrong, 3.33 times too high"
    )


def test_command_reports_wrong_claim_and_fails(tmp_path: Path) -> None:
    path = tmp_path / "copied.yaml"
    path.write_text(COPIED.replace("CLAIM", "8400"))
    result = run(str(path))
    assert result.exit_code == 1
    assert (
        "1 of 1 figures do not come out" in result.stderr and "3.33 times too high" in result.stderr
    )
    assert "wrong" in result.stdout and "0.8 kW x 26,280 h x 0.12" in result.stdout
    path.write_text(COPIED.replace("CLAIM", "2523"))
    right = run(str(path))
    assert right.exit_code == 0 and "right" in right.stdout


def test_arithmetic_of_every_item_evaluates_to_its_value(assumptions: Assumptions) -> None:
    """Python evaluates the printed arithmetic."""
    checked_figures = 0
    for item in compute_cost_items(assumptions).values():
        if item.arithmetic == "an assumption":
            continue
        text = item.arithmetic.rpartition(", so ")[2].replace(",", "")
        text = re.sub(r"tokens/s|\b(?:kW|W|h|s|load|PUE|months)\b", "", text).replace("x", "*")
        assert re.fullmatch(r"[-+*/(). 0-9e]+", text), item.arithmetic
        assert eval(text) == pytest.approx(item.value, rel=1e-5), item.key
        checked_figures += 1
    assert checked_figures > 25


def test_break_even_volume_costs_the_same_on_both_sides(assumptions: Assumptions) -> None:
    made = compute_cost_items(assumptions)
    volume = made["break_even.owned.three dollars a million"].value
    again = assumptions.model_copy(
        update={
            "volume": assumptions.volume.model_copy(
                update={"million_output_tokens_per_month": volume}
            )
        }
    )
    costs = compute_cost_items(again)
    assert costs["api.three dollars a million.volume"].value == pytest.approx(
        costs["owned.volume"].value
    )
    assert costs["owned.volume"].value == made["owned.per_month"].value  # one set does it


def test_volume_beyond_capacity_needs_another_set(assumptions: Assumptions) -> None:
    served = compute_cost_items(assumptions)["capacity.served"].value
    for sets in (1, 2, 5):
        volume = assumptions.volume.model_copy(
            update={"million_output_tokens_per_month": served * (sets - 0.5)}
        )
        made = compute_cost_items(assumptions.model_copy(update={"volume": volume}))
        assert made["rented.volume"].value == sets * made["rented.per_month"].value


def test_swing_matches_changed_assumptions(assumptions: Assumptions) -> None:
    swings = {
        swing.key: swing for swing in compute_sensitivity(assumptions) if swing.side == "owned"
    }
    dear = read_default_text().replace("price_per_kwh: 0.12", "price_per_kwh: 0.15")
    assert dear != read_default_text()
    result = compute_cost_items(parse_assumptions(dear, "dear.yaml"))["owned.per_million"].value
    assert swings["owned.price_per_kwh"].at_high == pytest.approx(result)
    assert swings["throughput.utilization"].span > swings["owned.price_per_kwh"].span
    assert replace_assumption(assumptions, "owned", "years", 5.0).owned is not None
    spans = [swing.span for swing in compute_sensitivity(assumptions) if swing.side == "rented"]
    assert spans == sorted(spans, reverse=True)


@pytest.mark.parametrize(
    ("claimed", "value", "right"),
    [(2523, 2522.88, True), (2500, 2522.88, True), (2600, 2522.88, False),
     (8400, 2522.88, False), (0, 0, True), (1.03, 1.0332, True), (1.04, 1.0332, False),
     (-5, 5, False), (3000, 2522.88, False)],
)  # fmt: skip
def test_claim_is_correct_if_it_is_the_value_rounded(
    claimed: float, value: float, right: bool
) -> None:
    assert is_rounding_of(claimed, value) is right


# ------------------------------------------------------------------------------------ assumptions


def test_default_throughput_matches_its_stated_fraction_of_the_bound(
    assumptions: Assumptions,
) -> None:
    expected = re.fullmatch(
        r"an assumption: (\d+) % of the ([\d,]+) that `quantkit (.+)` .*",
        assumptions.throughput.source,
    )
    assert expected is not None and assumptions.owned is not None
    (card,) = json.loads(CliRunner().invoke(main, [*expected[3].split(), "--json"]).stdout)["cards"]
    bound = card["bounds"]["decode_all"]["tokens_per_s"]
    assert card["cards"] == assumptions.owned.cards and f"{bound:,.0f}" == expected[2]
    assert round(100 * assumptions.throughput.output_tokens_per_s / bound) == int(expected[1])


def test_default_assumptions_have_every_key() -> None:
    text = read_default_text()
    for model in Assumptions.model_fields:
        assert f"\n{model}:" in text
    result = parse_assumptions(text, "assumptions.yaml")
    for section in (result.owned, result.rented, result.volume, result.throughput):
        assert section is not None
        assert section.model_fields_set == set(type(section).model_fields)
    assert run("--defaults").stdout == text


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (("price_per_kwh: 0.12", "price_per_kw: 0.12"),
         "a.yaml:LINE: owned.price_per_kw: unknown key. Did you mean 'price_per_kwh'? Known: "
         "cards, "),
        (("utilization: 0.4 ", "utilization: 1.4 "), "throughput.utilization: expected at most 1, "
                                                     "found 1.4"),
        (("years: 3 ", "years: 0 "), "owned.years: expected more than 0, found 0"),
        (("cards: 8                   # GPUs\n  price_per_card: "
          "30000", "cards: eight\n  price_per_card: 30000"),
         "owned.cards: expected a whole number, found 'eight'"),
        (("version: 1", "version: 2"), "version: expected 1, found 2"),
        (("price_per_card_hour: 2.50 ", "# "), "rented.price_per_card_hour: missing; this key has "
                                               "no default"),
        (("claimed: {}", "claimed: {owned.power: 1}"), "claimed.owned.power: no figure named "
                                                       "'owned.power'"),
        (("name: three dollars a million", "name: DeepSeek-V3.2"), "'DeepSeek-V3.2' is listed "
                                                                   "twice"),
        (("claimed: {}", "claimed: &x {}"), "anchors (&x) are not allowed in a file of "
                                            "assumptions"),
    ],
)  # fmt: skip
def test_faults_are_reported_with_their_line(
    change: tuple[str, str], sentence: str, tmp_path: Path
) -> None:
    text = read_default_text().replace(*change)
    assert text != read_default_text()
    path = tmp_path / "a.yaml"
    path.write_text(text)
    result = run(str(path))
    assert result.exit_code == 2
    line = text[: text.find(change[1])].count("\n") + 1
    assert sentence.replace("LINE", str(line)) in result.stderr and "Traceback" not in result.output


def test_unreadable_file_or_file_without_gpus_is_rejected(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="expected a section owned, rented or both"):
        parse_assumptions(
            "version: 1\nvolume: {million_output_tokens_per_month: 1}\nthroughput: "
            "{output_tokens_per_s: 1}",
            "a",
        )
    assert run(str(tmp_path / "none.yaml")).exit_code == 2
    (tmp_path / "latin.yaml").write_bytes(b"title: \xe9")
    assert "expected a UTF-8 text file" in run(str(tmp_path / "latin.yaml")).stderr
    assert run("--output", "x.html").exit_code == 2
    assert run("--html", "--json").exit_code == 2


# ------------------------------------------------------------------------------------ output


def test_tables_fit_the_terminal_and_json_matches() -> None:
    result = run()
    assert result.exit_code == 0
    assert max(map(len, result.stdout.splitlines())) <= 100
    for expected in (
        "cheapest first: DeepSeek-V3.2",
        "Break-even",
        "Sensitivity",
        "0.7 load x 1.3 PUE",
        "never: ",
    ):
        assert expected in result.stdout, expected
    values = json.loads(run("--json").stdout)
    assert values["figures"]["owned.purchase"] == {
        "label": "purchase", "value": 320_000, "unit": "USD", "arithmetic": "8 x 30,000 + 1 x "
                                                                            "80,000",
    }  # fmt: skip
    assert values["assumptions"]["owned"]["pue"] == 1.3


def test_rented_gpus_without_api_are_computed() -> None:
    text = """
version: 1
volume: {million_output_tokens_per_month: 10}
throughput: {output_tokens_per_s: 100}
rented: {cards: 1, price_per_card_hour: 1.0}
"""
    made = compute_cost_items(parse_assumptions(text, "a"))
    assert "owned.per_month" not in made and made["rented.per_month"].value == 730


def test_page_escapes_names(tmp_path: Path) -> None:
    path, page = tmp_path / "a.yaml", tmp_path / "a.html"
    path.write_text(
        read_default_text().replace("name: DeepSeek-V3.2", 'name: "<script>alert(1)</script>"')
    )
    assert run(str(path), "--html", "--output", str(page)).exit_code == 0
    text = page.read_text()
    assert "<script>alert" not in text and "&lt;script&gt;alert" in text
    assert text.count("<script") == 3
