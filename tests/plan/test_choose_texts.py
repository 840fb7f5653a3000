"""What `set: auto` stands for: hub, local files, text of the model itself, built-in text."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from quantkit.io import package_data
from quantkit.plan.choose_texts import BUILTIN, HUB, LOCAL, OWN, resolve_text_sets
from quantkit.plan.plan_texts import describe_set_choices, find_text_warnings, plan_texts
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.schema import Recipe
from quantkit.texts.corpus_spec import DATA_VARIABLE, read_spec
from quantkit.texts.exposure import LEAST_UNSEEN, compute_unseen_share, describe_narrowness

NO_HUB = "no connection"
TOO_LARGE = "the model needs 40 GB"
RECIPE = """
version: 1
source: {{model: builtin:tiny-v3}}
quantize: {{method: {method}}}
calibration: {calibration}
fidelity: {{set: {fidelity}}}
output: {{path: a}}
"""


def make_recipe(
    calibration: str = "{sequences: 8, length: 64}", fidelity: str = "auto", method: str = "awq"
) -> Recipe:
    text = RECIPE.format(calibration=calibration, fidelity=fidelity, method=method)
    return parse_recipe(text, "recipe.yaml", {})


def resolve(recipe: Recipe, hub: str = "", own: str = "") -> Recipe:
    return resolve_text_sets(recipe, lambda: hub, lambda _: own)


def get_sets(recipe: Recipe) -> tuple[str | None, str | None]:
    return (
        recipe.calibration and recipe.calibration.set,
        recipe.fidelity and recipe.fidelity.set,
    )


@pytest.fixture
def no_data(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(DATA_VARIABLE, raising=False)


def write_local_files(folder: Path) -> None:
    for name in (LOCAL.calibration, LOCAL.fidelity):
        for part in read_spec(name, package_data.locate_folder("calibration")).parts:
            if part.local is not None:
                path = folder / part.local.file
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_text("text")


def test_hub_is_the_first_choice_and_needs_no_reason(no_data: None) -> None:
    recipe = resolve(make_recipe())
    assert get_sets(recipe) == (HUB.calibration, HUB.fidelity)
    assert (
        recipe.chosen_texts["fidelity"] == (HUB.fidelity, "") and describe_set_choices(recipe) == ()
    )


def test_local_files_replace_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path))
    write_local_files(tmp_path)
    recipe = resolve(make_recipe(), hub=NO_HUB)
    assert get_sets(recipe) == (LOCAL.calibration, LOCAL.fidelity)
    assert NO_HUB in recipe.chosen_texts["calibration"][1]
    (tmp_path / "gsm8k" / "test.jsonl").unlink()
    recipe = resolve(make_recipe(), hub=NO_HUB)
    assert get_sets(recipe) == (OWN.calibration, OWN.fidelity)
    assert f"{DATA_VARIABLE} has no gsm8k/test.jsonl" in recipe.chosen_texts["fidelity"][1]


def test_model_samples_its_text_where_it_fits(no_data: None) -> None:
    recipe = resolve(make_recipe(), hub=NO_HUB)
    assert get_sets(recipe) == (OWN.calibration, OWN.fidelity)


def test_built_in_text_is_the_last_and_says_all_reasons(no_data: None) -> None:
    recipe = resolve(make_recipe(), hub=NO_HUB, own=TOO_LARGE)
    assert get_sets(recipe) == (BUILTIN.calibration, BUILTIN.fidelity)
    (first, second) = describe_set_choices(recipe)
    assert first.startswith("calibration.set: auto stands for general-math-code: ")
    assert all(reason in first for reason in (NO_HUB, f"{DATA_VARIABLE} is not set", TOO_LARGE))
    assert second.startswith("fidelity.set: auto stands for general-heldout: ")
    warnings = find_text_warnings(plan_texts(recipe))
    assert any(warning.startswith("narrow calibration: ") for warning in warnings)


def test_named_sets_stay_and_ask_nothing(no_data: None) -> None:
    def fail(*_: object) -> str:
        raise AssertionError("nothing has to be chosen")

    check: Callable[..., str] = fail
    recipe = make_recipe("{set: tiny-v3}", "tiny-v3-heldout")
    assert resolve_text_sets(recipe, check, check) is recipe
    recipe = make_recipe("null", "tiny-v3-heldout", method="rtn")
    assert resolve_text_sets(recipe, check, check) is recipe
    # RTN reads no calibration text: nothing to choose
    recipe = make_recipe("{set: auto}", "tiny-v3-heldout", method="rtn")
    assert resolve_text_sets(recipe, check, check) is recipe


def test_only_auto_is_replaced(no_data: None) -> None:
    assert get_sets(resolve(make_recipe("{set: tiny-v3}")))[0] == "tiny-v3"
    assert get_sets(resolve(make_recipe(fidelity="tiny-v3-heldout")))[1] == "tiny-v3-heldout"


def test_choice_is_part_of_the_recipe_hash(no_data: None) -> None:
    first, second = resolve(make_recipe()), resolve(make_recipe(), hub=NO_HUB)
    assert first.hash != second.hash
    assert first.where("calibration") == make_recipe().where("calibration")


@pytest.mark.parametrize("choice", [HUB, LOCAL])
def test_shipped_mixtures_are_broad_and_half_of_the_fidelity_text_is_unseen(choice: object) -> None:
    folder = package_data.locate_folder("calibration")
    calibration = read_spec(choice.calibration, folder).domains
    parts = read_spec(choice.fidelity, folder).parts
    shares = dict[str, float]()
    for part in parts:
        shares[part.label] = shares.get(part.label, 0.0) + part.share
    assert describe_narrowness(calibration) == ""
    assert compute_unseen_share(shares, calibration) >= 0.4
    raised = {
        row.kinds[0]: row.share
        for row in plan_texts(make_recipe(f"{{set: {choice.calibration}}}", choice.fidelity))
        if row.use == "fidelity"
    }
    assert compute_unseen_share(raised, calibration) >= LEAST_UNSEEN - 1e-9
    seen = set(shares) & set(calibration)
    assert len(seen) >= 3  # both sides of `shift`


@pytest.mark.parametrize("name", [HUB.calibration, HUB.fidelity])
def test_hub_parts_are_pinned_and_have_a_license(name: str) -> None:
    parts = read_spec(name, package_data.locate_folder("calibration")).parts
    assert all(part.hub or part.builtin or part.texts for part in parts)
    assert all(part.license for part in parts)


def test_calibration_and_fidelity_never_share_a_split() -> None:
    """No data set, split and configuration of the hub, and no file, is in both sets."""
    folder = package_data.locate_folder("calibration")
    for choice in (HUB, LOCAL):
        places = [
            {
                (part.hub.path, part.hub.name, part.hub.split)
                if part.hub
                else (part.local.file if part.local else (part.builtin, part.draw))
                for part in read_spec(name, folder).parts
            }
            for name in (choice.calibration, choice.fidelity)
        ]
        assert not places[0] & places[1]
