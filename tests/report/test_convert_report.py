"""Reports, manifests and gates of version 1, where outputs had an energy ratio."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from support.command_line import read_error, run
from support.report_variants import make_example

from quantkit.artifact.convert_report import convert_report
from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.layout import MANIFEST, PLAN
from quantkit.artifact.read_artifact import Artifact
from quantkit.artifact.read_manifest import get_output_error
from quantkit.errors import RecipeError
from quantkit.recipe.parse import describe_gate_conversions, parse_gates, parse_recipe
from quantkit.recipe.schema import Gate
from quantkit.report.notes import list_notes
from quantkit.verify.check_report import find_module_faults

RECIPE = "version: 1\nsource: {model: m}\nfidelity: {set: s}\noutput: {path: o}\ngates:\n"


def make_old(**changes: Any) -> dict[str, Any]:
    """Return the example as a file of version 1: energies of outputs, and a gate on them."""
    values = json.loads(make_example({}).to_json())
    for row in values["modules"]:
        if row["output_relative_error"] is not None:
            row["output_relative_error"] **= 2
    gate = {"figure": "module_output_error", "bound": "<= 0.01", "value": 0.0934**2, "ok": True}
    return {**values, "version": 1, "gates": [gate], **changes}


def test_an_old_report_has_the_figures_of_a_new_one() -> None:
    new, old = make_example({}), Fidelity.model_validate(make_old())
    for one, two in zip(new.modules, old.modules, strict=True):
        assert two.relative_error == one.relative_error
        assert two.output_relative_error == pytest.approx(one.output_relative_error)
    (gate,) = old.gates
    assert (gate.figure, gate.bound) == ("output_error", "<= 0.1")
    assert gate.value == pytest.approx(0.0934) and gate.ok is True
    assert json.loads(old.to_json())["version"] == 2 and "converted_from" not in old.to_json()


def test_an_old_report_says_that_it_was_converted() -> None:
    note = list_notes(Fidelity.model_validate(make_old()))[0]
    assert "version 1" in note and "converted" in note
    assert not any("version 1" in note for note in list_notes(make_example({})))


def test_a_report_is_converted_once() -> None:
    once = Fidelity.model_validate(make_old())
    assert Fidelity.model_validate(json.loads(once.to_json())).modules == once.modules
    assert convert_report(json.loads(once.to_json())) == json.loads(once.to_json())


HUGE = 10**400
"""An integer that JSON can hold and a float cannot."""


@pytest.mark.parametrize(
    "wrong",
    [
        {"modules": 3},
        {"modules": [7]},
        {"gates": "x"},
        {"modules": [{"output_relative_error": HUGE}]},
        {"distribution": [{"domain": "all", "kl_mean": {"value": HUGE, "se": 1}}]},
        {"gates": [{"figure": "t.recovery", "bound": "<= 1", "value": HUGE, "ok": True}],
         "benchmarks": [{"task": "t", "recovery": {"value": 1, "ci": [HUGE, HUGE]}}]},
    ],
)  # fmt: skip
def test_damaged_old_reports_are_refused_by_the_schema(wrong: Mapping[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        Fidelity.model_validate(make_old(**wrong))


def test_manifests_of_both_versions_give_the_norm_ratio(tmp_path: Path) -> None:
    assert get_output_error({"output_error": 0.0053}) == pytest.approx(0.0728, rel=1e-3)
    assert get_output_error({"output_relative_error": 0.0728}) == 0.0728
    assert get_output_error({"output_error": None}) is get_output_error({}) is None
    assert get_output_error({"output_error": HUGE}) is None
    scheme = {"bits": 4, "group_size": 64, "symmetric": True}
    manifest = {"modules": {"a": {"scheme": scheme, "output_error": 0.0025}}}
    rows = Artifact(path=tmp_path, manifest=manifest).modules
    row = rows[0] if isinstance(rows, list) else rows.to_dict("records")[0]
    assert row["output_relative_error"] == pytest.approx(0.05)


def test_copies_of_an_error_agree_in_both_versions() -> None:
    row = {"name": "a", "output_relative_error": 0.04}
    for key in ("output_error", "output_relative_error"):
        assert list(find_module_faults([row], {"a": {key: 0.04}})) == []
        (fault,) = find_module_faults([row], {"a": {key: 0.05}})
        assert "output_relative_error: expected 0.05" in fault


@pytest.mark.parametrize(
    "text", ["  module_output_error: {max: 0.01, min: 0}", "  module_output_error.max: 0.01"]
)
def test_a_gate_with_the_former_key_is_converted_and_said(text: str) -> None:
    gates = parse_gates(f"gates:\n{text}\n", "g.yaml", [])
    assert gates["output_error"].max == pytest.approx(0.1) and list(gates) == ["output_error"]
    (sentence,) = describe_gate_conversions(f"gates:\n{text}\n", "g.yaml")
    assert sentence.startswith("g.yaml:2: gates.module_output_error bounds an energy ratio")
    assert "max 0.01 -> 0.1" in sentence
    recipe = parse_recipe(f"{RECIPE}{text}\n", "r.yaml")
    assert recipe.gates == gates and "max 0.01 -> 0.1" in recipe.conversions[0]
    again = parse_recipe(f"{RECIPE}  output_error: {{max: 0.1}}\n", "r.yaml")
    assert again.conversions == () and again.gates == {"output_error": Gate(max=0.1)}


def test_both_keys_and_wrong_bounds_are_faults() -> None:
    both = "gates:\n  module_output_error: {max: 0.01}\n  output_error: {max: 0.1}\n"
    with pytest.raises(RecipeError, match="no figure .* named 'module_output_error'"):
        parse_gates(both, "g.yaml", [])
    for bound in ("[1]", HUGE):
        with pytest.raises(RecipeError, match="g.yaml:2: gates.output_error"):
            parse_gates(f"gates:\n  module_output_error: {{max: {bound}}}\n", "g.yaml", [])


def test_quantkit_gate_says_what_it_converted(artifact: Path) -> None:
    plan = json.loads((artifact / PLAN).read_text())
    assert "module_output_error" not in json.dumps(plan) and (artifact / MANIFEST).is_file()
    file = artifact.parent / "old.yaml"
    file.write_text("gates:\n  module_output_error: {max: 0.25}\n")
    result = run("gate", str(artifact), "--gates", str(file))
    assert "could not be judged: output_error <= 0.5" in read_error(result, 3)  # RTN has no inputs
    assert "max 0.25 -> 0.5" in result.stderr


def test_gates_of_an_old_report_get_the_interval_of_their_figure() -> None:
    """kl_mean is 0.000361 with an error of 0.0000214, the recovery 0.9964 [0.9824, 1.0096]."""
    gates = [
        {"figure": "kl_mean", "bound": f"<= {bound}", "value": 0.000361, "ok": True}
        for bound in (0.0005, 0.0004)
    ]
    gates += [
        {"figure": "tiny-v3-math.recovery", "bound": ">= 0.99", "value": 0.9964, "ok": True},
        {"figure": "size", "bound": "<= 9.00 MB", "value": 6_412_345, "ok": True},
    ]
    converted = Fidelity.model_validate(make_old(gates=gates)).gates
    unproven = "kept, not proven"
    assert [row.outcome for row in converted] == ["kept", unproven, unproven, "kept"]
    assert converted[0].ci == pytest.approx(
        (0.000361 - 1.96 * 2.14e-5, 0.000361 + 1.96 * 2.14e-5), rel=1e-4
    )
    assert (converted[0].n, converted[2].n, converted[3].ci) == (10_240, 300, None)
