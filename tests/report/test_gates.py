"""Gates over every figure, the gate command, and JUnit XML against its schema."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as Xml

import pytest
from support.command_line import build, read_error, run
from support.report_example import FIDELITY
from support.report_variants import make_empty_report, make_example

from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity, Figure
from quantkit.errors import RecipeError, UsageError
from quantkit.figures import list_keys
from quantkit.recipe.parse import parse_gates
from quantkit.recipe.schema import Gate
from quantkit.report import gates
from quantkit.report.junit import format_junit

TASK = BenchmarkResult(
    task="t",
    n=300,
    source=0.8,
    artifact=0.79,
    lost=5,
    gained=2,
    delta_pp=Figure(value=-1.0, ci=(-2.5, 0.5)),
    recovery=Figure(value=0.9875, ci=(0.969, 1.006)),
    mcnemar_p=0.45,
    truncated=(0.0, 0.03),
    unparsed=(0.01, 0.0),
)


def judge_one(figure: str, gate: Gate, fidelity: Fidelity) -> tuple[float | None, bool | None, str]:
    """Return value, result and reason of a single bound."""
    (result,) = gates.judge_gates({figure: gate}, fidelity)
    return result.value, result.ok, result.reason


# ------------------------------------------------------------------------------------------ figures


@pytest.mark.parametrize(
    ("figure", "value"),
    [
        ("kl_mean@math", 0.00045),
        ("kl_mean@all", 0.000361),
        ("top1@math", 0.9971),
        ("module_error", 0.0912),
        ("output_error", 0.0934),
        ("block_error", 0.0123),
        ("fallbacks", 1.0),
        ("bits_per_weight", 4.25),
        ("size", 6_412_345.0),
    ],
)
def test_gate_compares_the_value_of_the_report_with_its_bound(figure: str, value: float) -> None:
    assert judge_one(figure, Gate(max=value), make_example()) == (value, True, "")
    assert judge_one(figure, Gate(max=value * 0.999), make_example()) == (value, False, "")
    assert judge_one(figure, Gate(min=value), make_example()) == (value, True, "")


def test_every_figure_has_a_value_in_a_full_report() -> None:
    pooled = {
        **dict(FIDELITY["distribution"][0]),
        "ppl_source": {"value": 3.1},
        "ppl_artifact": {"value": 3.2},
    }  # type: ignore[index]
    kinds = [{"domain": name, "tokens": 1, "kl_mean": {"value": 0.1}} for name in ("a", "b")]
    calibration = {**dict(FIDELITY["calibration"]), "kinds": {"a": 10}}  # type: ignore[arg-type]
    calibration["overlaps"] = [{"task": "t", "items": 9, "overlapping": 2}]
    gold = {"task": "t", "n": 9, "source": -0.5, "artifact": -0.6, "difference": {"value": -0.1}}
    place = {"input": "q", "channels": 9, "tokens": 9, "effective_rank": 5, "unspanned": {"a": 0.1}}
    one, noise = {"value": 1.0}, {"what": "w", "kl_mean": {"value": 1e-5}, "top1": {"value": 1.0}}
    rtn = {"domain": "all", "tokens": 9, "kl_mean": one, "ratio": one, "typical": one}
    report = make_example({
        "yardstick": {"top1": one, "rows": [rtn]},
        "noise_floor": noise,
        "calibration": calibration,
        "coverage": [{"block": "b", "inputs": [place]}],
        "distribution": [pooled, *kinds],
        "benchmarks": [TASK],
        "likelihood": [gold],
    })
    values = {figure: judge_one(figure, Gate(max=1e12), report)[0] for figure in list_keys()}
    assert [figure for figure, value in values.items() if value is None] == []
    assert values["lost_items"] == 5 and values["overlapping_items"] == 2


def test_figure_of_an_absent_domain_is_not_measured() -> None:
    assert judge_one("kl_mean@code", Gate(max=1), make_example()) == (
        None,
        None,
        "not measured: the text has all, math",
    )


def test_module_without_output_error_is_reported_and_without_error_fails() -> None:
    modules = [dict(module) for module in FIDELITY["modules"]]  # type: ignore[attr-defined]
    modules[0]["output_relative_error"] = None
    values = judge_one("output_error", Gate(max=1), make_example({"modules": modules}))
    assert values == (0.0934, True, "1 of 2 modules not measured")
    modules[0]["relative_error"] = float("nan")
    assert judge_one("module_error", Gate(max=1), make_example({"modules": modules})) == (
        None,
        False,
        "not finite",
    )


def test_lost_items_of_a_skipped_task_are_not_measured() -> None:
    silent = BenchmarkResult(task="u", status="not run", reason="no sandbox")
    report = make_example({"benchmarks": [TASK, silent]})
    assert judge_one("lost_items", Gate(max=9), report) == (
        None,
        None,
        "not measured: u was not run",
    )


# -------------------------------------------------------------------------------------------- tasks


@pytest.mark.parametrize(
    ("gate", "figure", "bound", "value", "ok", "reason"),
    [
        (Gate(margin_pp=3), "t.delta_pp.low", "> -3", -2.5, True, ""),
        (
            Gate(margin_pp=2.5),
            "t.delta_pp.low",
            "> -2.5",
            -2.5,
            False,
            "not resolved: 300 items cannot exclude",
        ),
        (
            Gate(margin_pp=1),
            "t.delta_pp.low",
            "> -1",
            -2.5,
            False,
            "not resolved: 300 items cannot exclude",
        ),
        (Gate(margin_pp=0), "t.delta_pp.low", "> 0", -2.5, False, "not resolved"),
        (Gate(max_lost=5), "t.lost", "<= 5", 5.0, True, ""),
        (Gate(max_lost=4), "t.lost", "<= 4", 5.0, False, ""),
        (Gate(min_score=0.79), "t.score", ">= 0.79", 0.79, True, ""),
        (Gate(min_score=0.8), "t.score", ">= 0.8", 0.79, False, ""),
        (Gate(max_truncated_pp=2), "t.truncated_pp", "<= 2", 3.0, False, ""),
        (Gate(max_truncated_pp=3), "t.truncated_pp", "<= 3", 3.0, True, ""),
        (Gate(max_unparsed_pp=0), "t.unparsed_pp", "<= 0", -1.0, True, ""),
        (Gate(min_recovery=0.98), "t.recovery", ">= 0.98", 0.9875, True, ""),
    ],
)
def test_bounds_of_a_task_are_judged(
    gate: Gate, figure: str, bound: str, value: float, ok: bool, reason: str
) -> None:
    (result,) = gates.judge_gates({"t": gate}, make_example({"benchmarks": [TASK]}))
    assert (result.figure, result.bound, result.value, result.ok) == (figure, bound, value, ok)
    assert result.reason.startswith(reason) and bool(result.reason) == bool(reason)


def test_loss_beyond_the_margin_fails_without_unresolved() -> None:
    worse = TASK.model_copy(update={"delta_pp": Figure(value=-5, ci=(-7.0, -3.0))})
    (result,) = gates.judge_gates({"t": Gate(margin_pp=2)}, make_example({"benchmarks": [worse]}))
    assert (result.ok, result.reason) == (False, "")


@pytest.mark.parametrize(
    "gate",
    [
        Gate(margin_pp=1),
        Gate(max_lost=0),
        Gate(min_score=0.1),
        Gate(min_recovery=0.5),
        Gate(max_truncated_pp=1),
    ],
)
def test_skipped_task_neither_passes_nor_fails(gate: Gate) -> None:
    silent = BenchmarkResult(task="t", status="not run", reason="no sandbox")
    for rows, reason in (([silent], "not run: no sandbox"), ([], "not run")):
        assert judge_one("t", gate, make_example({"benchmarks": rows})) == (None, None, reason)


def test_scores_of_zero_give_no_information() -> None:
    floor = TASK.model_copy(update={"source": 0.0, "artifact": 0.0, "recovery": None, "lost": 0})
    report = make_example({"benchmarks": [floor]})
    for gate in (Gate(margin_pp=1), Gate(max_lost=0), Gate(min_recovery=0.5)):
        value, ok, reason = judge_one("t", gate, report)
        assert (value, ok) == (None, None) and "score" in reason
    assert judge_one("t", Gate(min_score=0.5), report) == (0.0, False, "")


# --------------------------------------------------------------------------------------------- text


def test_parse_gates_reads_gate_files_and_recipes() -> None:
    result = parse_gates(
        "gates: {size: {max: 400GB}, kl_mean@math: {max: 0.1}, t: {margin_pp: 2}}", "g.yaml", ["t"]
    )
    assert result == {"size": Gate(max=4e11), "kl_mean@math": Gate(max=0.1), "t": Gate(margin_pp=2)}
    recipe = "version: 1\nsource: {model: x}\ngates: {top1: {min: 0.9}}\n"
    assert parse_gates(recipe, "recipe.yaml", []) == {"top1": Gate(min=0.9)}


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "gates: {u: {margin_pp: 2}}",
            "g.yaml:1: gates.u: no figure or task of evaluation.tasks named 'u'.",
        ),
        (
            "gates: {kl_maen: {max: 2}}",
            "g.yaml:1: gates.kl_maen: no figure or task of evaluation.tasks named 'kl_maen'. Did "
            "you mean 'kl_mean'?",
        ),
        (
            "gate: {kl_mean: {max: 2}}",
            "g.yaml:1: gate: unknown key. Did you mean 'gates'? Expected gates.",
        ),
        ("version: 1", "g.yaml:1: gates: expected a mapping of keys, found nothing"),
        ("gates: {}", "g.yaml:1: gates: expected one entry or more, found an empty mapping"),
        ("gates: {kl_mean.max: 1, kl_mean: {max: 2}}", "g.yaml:1: gates.kl_mean.max: no figure"),
        ("gates: {kl_mean.max: x}", "g.yaml:1: gates.kl_mean.max: expected a number, found 'x'"),
        ("gates: {kl_mean.maxx: 1}", "g.yaml:1: gates.kl_mean.maxx: no figure"),
    ],
)
def test_parse_gates_rejects_invalid_files(text: str, sentence: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_gates(text, "g.yaml", ["t"])
    assert any(result.startswith(sentence) for result in caught.value.faults), caught.value.faults
    assert issubclass(RecipeError, UsageError)


def test_parse_gates_accepts_dotted_bounds() -> None:
    dotted = (
        "gates: {kl_mean.max: 0.1, kl_mean.min: 0, t.min_recovery: 0.9, ppl_ratio: "
        "{max: 2}, size.max: 4GB}"
    )
    nested = (
        "gates: {kl_mean: {max: 0.1, min: 0}, t: {min_recovery: 0.9}, ppl_ratio: "
        "{max: 2}, size: {max: 4GB}}"
    )
    assert parse_gates(dotted, "g.yaml", ["t"]) == parse_gates(nested, "g.yaml", ["t"])


def test_plan_rejects_gates_on_domains_that_the_text_set_lacks(tmp_path: Path) -> None:
    (tmp_path / "x.yaml").write_text(
        "version: 1\nsource: {model: builtin:tiny-v3}\nquantize: {method: rtn}\n"
        "fidelity: {set: tiny-v3-heldout, length: 512}\ngates:\n  kl_mean@math: {max: 1}\n"
        f"output: {{path: {tmp_path / 'x'}}}\n"
    )
    assert run("plan", tmp_path / "x.yaml").exit_code == 0
    misspelled = (tmp_path / "x.yaml").read_text().replace("kl_mean@math", "kl_mean@maths")
    (tmp_path / "z.yaml").write_text(misspelled)
    message = read_error(run("plan", tmp_path / "z.yaml"), 2)
    assert "gates.kl_mean@maths: no domain of tiny-v3-heldout named 'maths'." in message
    assert "Did you mean 'math'?" in message
    wrong = (
        (tmp_path / "x.yaml").read_text().replace("tiny-v3-heldout", str(write_prose_set(tmp_path)))
    )
    (tmp_path / "y.yaml").write_text(wrong)
    message = read_error(run("plan", tmp_path / "y.yaml"), 2)
    assert "y.yaml:6: gates.kl_mean@math: no domain of" in message and "Known: prose." in message


def write_prose_set(folder: Path) -> Path:
    """Write a text set of one domain."""
    import hashlib

    (folder / "p.jsonl").write_text(json.dumps({"domain": "prose", "text": "one two three"}) + "\n")
    digest = hashlib.sha256((folder / "p.jsonl").read_bytes()).hexdigest()
    (folder / "p.yaml").write_text(
        f"version: 1\nname: p\nlicence: Apache-2.0\norigin: made up\ndomains: "
        f"[prose]\npacking: documents\nend: none\n"
        f"file: p.jsonl\nsha256: {digest}\n"
    )
    return folder / "p.yaml"


# -------------------------------------------------------------------------------------------- JUnit

ALLOWED: Mapping[str, tuple[set[str], set[str], set[str]]] = {
    "system-out": (set(), set(), set()),
    "testsuites": (set(), {"name", "time", "tests", "failures", "errors"}, {"testsuite"}),
    "testsuite": (
        {"name", "tests", "failures", "errors"},
        {
            "group",
            "time",
            "skipped",
            "timestamp",
            "hostname",
            "id",
            "package",
            "file",
            "log",
            "url",
        },
        {"testsuite", "properties", "testcase", "system-out", "system-err"},
    ),
    "testcase": (
        {"name"},
        {"time", "classname", "group"},
        {"skipped", "error", "failure", "system-out", "system-err"},
    ),
    "failure": (set(), {"type", "message"}, set()),
    "skipped": (set(), {"type", "message"}, set()),
}
"""Of Jenkins' junit-10.xsd: per element the attributes it needs, those it may have, and what may
stand in it."""


def parse_junit(content: bytes) -> Xml.Element:
    """The tree of a file that keeps every rule of the schema, with counts that agree with
    its cases."""
    root = Xml.fromstring(content)
    assert root.tag in {"testsuites", "testsuite"}
    for element in root.iter():
        needed, possible, children = ALLOWED[element.tag]
        assert needed <= set(element.attrib) <= needed | possible, element.attrib
        assert {child.tag for child in element} <= children
    for suite in (*root.iter("testsuite"), root):
        cases = list(suite.iter("testcase"))
        assert int(suite.get("tests", "-1")) == len(cases)
        assert int(suite.get("failures", "-1")) == sum(
            case.find("failure") is not None for case in cases
        )
        if suite.tag == "testsuite":
            assert int(suite.get("skipped", "-1")) == sum(
                case.find("skipped") is not None for case in cases
            )
    return root


def test_junit_marks_failed_and_skipped_gates() -> None:
    bounds = {"kl_mean": Gate(max=0.0003), "top1": Gate(min=0.9), "t": Gate(min_recovery=0.9)}
    report = gates.apply_gates(bounds, make_example())
    root = parse_junit(format_junit([report, gates.apply_gates({}, make_empty_report())]))
    cases = {case.get("name"): [child.tag for child in case] for case in root.iter("testcase")}
    assert cases == {
        "kl_mean <= 0.0003": ["failure"],
        "top1 >= 0.9": [],
        "t.recovery >= 0.9": ["skipped"],
    }
    assert [suite.get("tests") for suite in root] == ["3", "0"]
    failure = root.find(".//failure")
    assert failure is not None and failure.get("message") == "kl_mean <= 0.0003: found 0.000361"
    assert format_junit([report]) == format_junit([report])


def test_junit_says_that_a_kept_gate_is_not_proven() -> None:
    bounds = {"kl_mean": Gate(max=0.0004), "kl_max": Gate(max=1)}
    root = parse_junit(format_junit([gates.apply_gates(bounds, make_example())]))
    said = {case.get("name"): case.findtext("system-out") for case in root.iter("testcase")}
    assert said == {
        "kl_mean <= 0.0004": "kl_mean <= 0.0004: found 0.000361, kept, not proven: its interval "
        "crosses the bound",
        "kl_max <= 1": None,
    }


def test_junit_escapes_untrusted_names() -> None:
    name = 'a<b>&"\x00\x1b\ud800]]>'
    row = TASK.model_copy(update={"task": name, "status": "not run", "reason": name})
    artifact: dict[str, Any] = {**dict(FIDELITY["artifact"]), "name": name}  # type: ignore[call-overload]
    report = make_example({"artifact": artifact, "benchmarks": [row]})
    root = parse_junit(format_junit([gates.apply_gates({name: Gate(max_lost=1)}, report)]))
    assert root[0].get("name") == 'a<b>&"   ]]>'


# ---------------------------------------------------------------------------------- a real artifact


def test_gate_command_judges_by_other_gates_and_changes_no_file(
    built: Path, tmp_path: Path
) -> None:
    before = {path: path.read_bytes() for path in built.rglob("*") if path.is_file()}
    (tmp_path / "strict.yaml").write_text(
        "gates: {kl_mean: {max: 1.0e-9}, kl_mean@math: {max: 1}, size: {max: 9MB}}"
    )
    result = run(
        "gate", built, "--gates", tmp_path / "strict.yaml", "--junit", tmp_path / "gates.xml"
    )
    assert read_error(result, 3).startswith("gate kl_mean <= 1e-09: found 0.000")
    assert "rejected: of 3 gates 2 kept, 0 kept but not proven, 1 missed" in result.stdout
    assert [
        case.get("name")
        for case in parse_junit((tmp_path / "gates.xml").read_bytes()).iter("testcase")
    ] == [
        "kl_mean <= 1e-09",
        "kl_mean@math <= 1",
        "size <= 9.00 MB",
    ]
    values = json.loads(run("gate", built, "--gates", tmp_path / "strict.yaml", "--json").stdout)
    assert (values["status"], values["built"], len(values["gates"])) == (
        "rejected",
        "not judged",
        3,
    )
    assert {path: path.read_bytes() for path in built.rglob("*") if path.is_file()} == before


def test_gate_command_uses_the_recipe_of_the_artifact_by_default(built: Path) -> None:
    """Its benchmarks were skipped, so two of three gates have no figure; nothing is missed,
    and nothing is passed."""
    result = run("gate", built, "--json")
    values = json.loads(result.stdout)
    assert (result.exit_code, values["status"]) == (3, "not judged")
    assert (
        "error: could not be judged: tiny-v3-math." in result.stderr and "(not run" in result.stderr
    )
    assert [gate["ok"] for gate in values["gates"]] == [True, None, None]


def test_gate_command_rejects_invalid_input(built: Path, artifact: Path, tmp_path: Path) -> None:
    (tmp_path / "typo.yaml").write_text("gates: {kl_maen: {max: 1}}")
    assert "Did you mean 'kl_mean'?" in read_error(
        run("gate", built, "--gates", tmp_path / "typo.yaml"), 2
    )
    assert "absent.yaml: no such file" in read_error(
        run("gate", built, "--gates", tmp_path / "absent.yaml"), 2
    )
    assert "expected an artifact's folder, found none" in read_error(
        run("gate", tmp_path / "absent"), 2
    )
    assert "not an artifact of quantkit" in read_error(run("gate", tmp_path), 1)
    report = artifact / "quantkit/fidelity.json"
    report.write_text(report.read_text().replace('"kl_mean"', '"kl_mean" ', 1))
    assert "expected the file that quantkit/manifest.json names, found another" in read_error(
        run("gate", artifact), 1
    )


def test_gate_command_rejects_artifact_without_gates(tmp_path: Path) -> None:
    assert build(tmp_path / "a", "--junit", str(tmp_path / "b.xml"), gates="{}").exit_code == 0
    assert parse_junit((tmp_path / "b.xml").read_bytes()).get("tests") == "0"
    assert "its recipe has no gates; name a file" in read_error(run("gate", tmp_path / "a"), 2)


def test_build_writes_junit_if_a_gate_fails(tmp_path: Path) -> None:
    result = build(
        tmp_path / "a", "--junit", str(tmp_path / "b.xml"), gates="{kl_mean@code: {max: 1.0e-9}}"
    )
    assert result.exit_code == 3
    root = parse_junit((tmp_path / "b.xml").read_bytes())
    assert (root.get("tests"), root.get("failures")) == ("1", "1")


# ----------------------------------------------------------------------------------------- outcomes


def judge_kl(bound: float, proven: bool = False, key: str = "kl_mean") -> tuple[str, bool | None]:
    """Return outcome and result of an upper bound on the example, whose interval is known."""
    (result,) = gates.judge_gates({key: Gate(max=bound, proven=proven)}, make_example())
    return result.outcome, result.ok


def test_three_outcomes_by_figure_and_interval() -> None:
    """kl_mean is 0.000361 [0.000319, 0.000403]."""
    assert judge_kl(0.0005) == ("kept", True) == judge_kl(0.000403)
    assert judge_kl(0.0004) == ("kept, not proven", True)
    assert judge_kl(0.0003) == ("missed", False)
    assert judge_kl(0.0004, proven=True) == ("missed", False)
    assert judge_kl(0.0005, proven=True) == ("kept", True)
    assert judge_kl(0.05, key="kl_p999") == ("kept, not proven", True)  # no upper end
    assert judge_kl(1.0, key="kl_max") == ("kept", True)  # no interval
    lower = gates.judge_gates({"top1": Gate(min=0.995)}, make_example())[0]
    assert (lower.outcome, lower.n, lower.ci) == ("kept, not proven", 10_240, (0.9937, 0.9966))


def test_bounds_of_a_task_have_outcome_interval_and_items() -> None:
    report = make_example({"benchmarks": [TASK]})
    gate = Gate(min_recovery=0.98, min_score=0.7, max_lost=5)
    results = {row.figure: row for row in gates.judge_gates({"t": gate}, report)}
    assert results["t.recovery"].outcome == "kept, not proven"
    assert results["t.recovery"].ci == (0.969, 1.006) and results["t.recovery"].n == 300
    assert results["t.score"].outcome == "kept" and results["t.lost"].outcome == "kept"
    ci = results["t.score"].ci
    assert ci is not None and ci[0] is not None and 0.73 < ci[0] < 0.75
    strict = gates.judge_gates({"t": Gate(min_recovery=0.98, proven=True)}, report)[0]
    assert (strict.ok, strict.outcome) == (False, "missed") and "not proven" in strict.reason


def test_proven_is_a_key_of_all_gates_or_of_one() -> None:
    text = "gates: {proven: true, kl_mean: {max: 1}, top1: {min: 0.9, proven: false}}"
    parsed = parse_gates(text, "g.yaml", [])
    assert {key: gate.proven for key, gate in parsed.items()} == {"kl_mean": True, "top1": False}
    assert parsed["top1"].model_dump(exclude_none=True) == {"min": 0.9}  # the hash of old recipes
    for wrong, sentence in (
        ("gates: {proven: 3, kl_mean: {max: 1}}", "g.yaml:1: gates.proven"),
        ("gates: {kl_mean: {proven: true}}", "g.yaml:1: gates.kl_mean: expected {max: NUMBER}"),
    ):
        with pytest.raises(RecipeError, match=sentence):
            parse_gates(wrong, "g.yaml", [])


def test_unproven_gates_are_named_and_the_margin_of_pass_is_said() -> None:
    from quantkit.report import notes, tables

    row = TASK.model_copy(update={"required": 0.98, "verdict": "pass"})
    report = gates.apply_gates({"kl_mean": Gate(max=0.0004)}, make_example({"benchmarks": [row]}))
    assert report.status == "accepted"
    assert any("1 of 1 gates is kept and not proven" in note for note in notes.list_notes(report))
    table = tables.make_gate_table(report)
    assert table.rows[0][2:] == (
        "0.000361 [0.000319, 0.000403]",
        "10 %",
        "10,240",
        "kept, not proven",
    )
    assert "excludes a loss of more than 2 %" in tables.make_benchmark_table(report).note
