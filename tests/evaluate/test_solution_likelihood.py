"""Likelihood of gold solutions: equal to lm-eval on whole models, and no other figure changes."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from support import report_example
from support.builds import ignore_progress
from support.paths import ROOT
from support.whole_models import awq_weights, fp8_weights, whole_model
from transformers import AutoTokenizer

from quantkit import pipeline
from quantkit.artifact.fidelity_schema import Fidelity, Figure, LikelihoodResult
from quantkit.errors import RecipeError
from quantkit.evaluate import solution_likelihood, statistics, tasks
from quantkit.io import package_data
from quantkit.io.templates import TemplateWorker
from quantkit.plan import sources
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.schema import Gate
from quantkit.report import gates, tables
from quantkit.texts.corpora import encode_continuation, load_tokenizer

ITEMS = 12
TEXT = (package_data.locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text()


def build_result(place: Path, **changes: str) -> pipeline.BuildResult:
    """Build a quick artifact of tiny-v3 without generated benchmarks."""
    keys = {
        "quantize.method": "rtn",
        "quantize.rounding": "nearest",
        "fidelity.windows": "4",
        "gates.tiny-v3-math": "{min_score: 0}",
        "evaluation.likelihood": str(ITEMS),
        "output.path": str(place),
    }
    recipe = parse_recipe(
        TEXT,
        "tiny-v3-awq4.yaml",
        keys | {key.replace("__", "."): text for key, text in changes.items()},
    )
    (outcome,) = pipeline.build_artifacts(
        recipe,
        TEXT,
        overwrite=False,
        evaluate=False,
        on_plan=ignore_progress,
        on_progress=ignore_progress,
    )
    return outcome


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> pipeline.BuildResult:
    return build_result(tmp_path_factory.mktemp("likelihood") / "a", rules="all-linear")


def read_scores(outcome: pipeline.BuildResult) -> list[dict]:
    """Read samples/solutions.parquet."""
    return parquet.read_table(outcome.path / "quantkit/samples/solutions.parquet").to_pylist()


def pairs(name: str) -> list[tuple[str, str]]:
    """Read prompts and gold solutions directly from the data."""
    lines = (
        (package_data.locate_folder("evals") / "data" / f"{name}.jsonl")
        .read_text()
        .splitlines()[:ITEMS]
    )
    column = {"tiny-v3-math": "solution", "tiny-v3-code": "canonical_solution"}[name]
    return [(item["prompt"], item[column]) for item in map(json.loads, lines)]


@pytest.fixture(scope="module")
def models(outcome: pipeline.BuildResult) -> dict[str, torch.nn.Module]:
    """Load source and artifact in transformers, unpacked without quantkit's code."""
    source = package_data.locate_model("builtin:tiny-v3")
    sides = {
        "source": (source, fp8_weights(source)),
        "artifact": (outcome.path, awq_weights(outcome.path)),
    }
    return {side: whole_model(folder, weights) for side, (folder, weights) in sides.items()}


@pytest.mark.parametrize("side", ["source", "artifact"])
@pytest.mark.parametrize("task", ["tiny-v3-math", "tiny-v3-code"])
def test_likelihood_equals_whole_models(
    outcome: pipeline.BuildResult, models: dict, side: str, task: str
) -> None:
    """One item at a time, without padding; the solution's tokens follow the prompt's last word."""
    tokenizer = AutoTokenizer.from_pretrained(package_data.locate_model("builtin:tiny-v3"))
    solutions = [row for row in read_scores(outcome) if row["task"] == task]
    assert [row["doc_id"] for row in solutions] == list(range(ITEMS))
    for row, (prompt, solution) in zip(solutions, pairs(task), strict=True):
        ids = tokenizer(prompt + solution, return_tensors="pt").input_ids
        with torch.no_grad():
            logs = models[side](ids).logits[0, :-1].double().log_softmax(-1)
        n = row["n_tokens"]
        assert tokenizer.decode(ids[0, -n:]).strip() == solution.strip()
        expected = float(logs.gather(1, ids[0, 1:, None])[-n:].mean())
        assert row[side] == pytest.approx(expected, rel=1e-3, abs=2e-5), row["doc_id"]


@pytest.mark.parametrize("side", ["source", "artifact"])
def test_likelihood_equals_lm_eval(outcome: pipeline.BuildResult, models: dict, side: str) -> None:
    """Math only: no token spans prompt and solution; lm-eval would split such a token."""
    tokenizer = AutoTokenizer.from_pretrained(package_data.locate_model("builtin:tiny-v3"))
    lm = HFLM(pretrained=models[side], tokenizer=tokenizer, batch_size=4, max_length=512)
    requests = [
        Instance(
            request_type="loglikelihood",
            doc={},
            arguments=pair,
            idx=0,
            metadata=("tiny-v3-math", n, 1),
        )
        for n, pair in enumerate(pairs("tiny-v3-math"))
    ]
    expected = [total for total, _ in lm.loglikelihood(requests, disable_tqdm=True)]
    solutions = [
        row[side] * row["n_tokens"] for row in read_scores(outcome) if row["task"] == "tiny-v3-math"
    ]
    assert solutions == pytest.approx(expected, rel=1e-3, abs=2e-4)


def test_report_rows_summarize_the_items(outcome: pipeline.BuildResult) -> None:
    table, report = read_scores(outcome), outcome.fidelity
    assert [row.task for row in report.likelihood] == ["tiny-v3-math", "tiny-v3-code"]
    for row in report.likelihood:
        mine = [item for item in table if item["task"] == row.task]
        first, second = [item["source"] for item in mine], [item["artifact"] for item in mine]
        expected = statistics.paired_difference(first, second)
        assert (row.n, row.tokens) == (ITEMS, sum(item["n_tokens"] for item in mine))
        assert (row.source, row.artifact) == (
            pytest.approx(sum(first) / ITEMS),
            pytest.approx(sum(second) / ITEMS),
        )
        assert row.difference is not None
        assert (row.difference.value, row.difference.se) == (expected.mean, expected.standard_error)
        assert row.difference.ci == (expected.interval.low, expected.interval.high)
    assert any(row.source != row.artifact for row in report.likelihood)
    for shown in ("README.md", "quantkit/fidelity.html"):
        assert "Gold solutions (teacher-forced)" in (outcome.path / shown).read_text()


def test_likelihood_changes_no_other_figure(outcome: pipeline.BuildResult, tmp_path: Path) -> None:
    """Without solutions after the text, the artifact's bytes and the text's figures are equal."""
    without = build_result(tmp_path / "b", rules="all-linear", evaluation__likelihood="0")
    assert without.fidelity.likelihood == ()
    assert not (without.path / "quantkit/samples/solutions.parquet").exists()
    assert (without.path / "model.safetensors").read_bytes() == (
        outcome.path / "model.safetensors"
    ).read_bytes()
    for mine, theirs in zip(
        outcome.fidelity.distribution, without.fidelity.distribution, strict=True
    ):
        assert (mine.domain, mine.tokens) == (theirs.domain, theirs.tokens)
        for name in ("kl_mean", "kl_p99", "ppl_ratio", "top1"):
            assert getattr(mine, name).value == pytest.approx(
                getattr(theirs, name).value, rel=1e-4
            ), name
    errors = [row.relative_error for row in without.fidelity.blocks]
    assert [row.relative_error for row in outcome.fidelity.blocks] == pytest.approx(
        errors, rel=1e-5
    )
    agreement = [row.agreement for row in without.fidelity.routers]
    assert [row.agreement for row in outcome.fidelity.routers] == pytest.approx(agreement, rel=1e-9)


def test_worse_weights_lower_the_likelihood(outcome: pipeline.BuildResult, tmp_path: Path) -> None:
    worse = build_result(
        tmp_path / "c", quantize__bits="2", rules="all-linear", format="dense"
    ).fidelity
    for better, bad in zip(outcome.fidelity.likelihood, worse.likelihood, strict=True):
        assert bad.difference.ci[1] < better.difference.ci[0], bad.task  # type: ignore[union-attr, index]


def test_no_solutions_without_a_fidelity_text() -> None:
    keys = {"fidelity": "none", "gates": "{}", "output.path": "x"}
    texts = pipeline.tokenize(
        parse_recipe(TEXT, "x.yaml", keys), package_data.locate_model("builtin:tiny-v3")
    )
    assert texts.solutions.items == ()
    assert texts.counts()["fidelity"] == 0


# --------------------------------------------------------------------------------------------------
# ---- the tokens


def test_long_prompt_is_truncated_at_its_start() -> None:
    tokenizer = load_tokenizer(package_data.locate_model("builtin:tiny-v3"))
    prompt, solution = pairs("tiny-v3-math")[0]
    models, own = encode_continuation(tokenizer, prompt, solution, 512)
    assert models[0] == tokenizer.bos_token_id
    assert tokenizer.decode(models[1:]) == prompt + solution  # type: ignore[attr-defined]
    assert tokenizer.decode(models[-own:]) == solution  # type: ignore[attr-defined]
    cut, same = encode_continuation(tokenizer, prompt, solution, own + 4)
    assert (len(cut), same) == (own + 4, own)
    assert cut == [models[0], *models[-own - 3 :]]
    assert encode_continuation(tokenizer, prompt, solution, own) == ([], 0)


@pytest.mark.parametrize("name", ["tiny-v3-math", "tiny-v3-code", "gsm8k", "humaneval", "mbpp"])
def test_rendered_prompts_equal_lm_eval(name: str) -> None:
    """Prompts are equal including worked examples and spaces."""
    data = Path(os.environ.get("QUANTKIT_DATA", ROOT.parent / "shared" / "data"))
    if not name.startswith("tiny-v3") and not (data / name).is_dir():
        pytest.skip(f"{name} is not on this machine")
    (task,) = tasks.load_tasks([name], data)
    with TemplateWorker() as worker:
        ours = solution_likelihood.render_prompts(task, 5, worker)
    assert len(ours) == 5
    assert ours == solution_likelihood.build_prompts_with_lm_eval(task, 5)


def test_render_prompts_leaves_other_tasks_to_lm_eval() -> None:
    (task,) = tasks.load_tasks(["tiny-v3-math"])
    own_examples = {"sampler": "first_n", "samples": [{}], "doc_to_text": "{{x}}"}
    changes: tuple[dict[str, object], ...] = (
        {"description": "Solve."},
        {"doc_to_text": None},
        {"num_fewshot": 2},
        {"num_fewshot": 1, "fewshot_config": own_examples},
    )
    with TemplateWorker() as worker:
        for change in changes:
            changed = replace(task, config={**task.config, **change})
            assert solution_likelihood.render_prompts(changed, 3, worker) == []
        assert solution_likelihood.render_prompts(replace(task, files={}), 3, worker) == []


def test_likelihood_of_shipped_recipe_has_every_item() -> None:
    """tests/test_api.py checks in a process of its own that a build imports no lm-eval."""
    text = (package_data.locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    folder = package_data.locate_model("builtin:tiny-v3")
    assert len(pipeline.tokenize(parse_recipe(text, "x"), folder).solutions.items) == 128


def test_sequences_are_sorted_with_their_items() -> None:
    tokenizer = load_tokenizer(package_data.locate_model("builtin:tiny-v3"))
    solutions = solution_likelihood.tokenize_solutions(
        ["tiny-v3-math", "tiny-v3-code"], tokenizer, items=20, length=512
    )
    assert len(solutions.items) == solutions.tokens.n_sequences == 40
    assert list(solutions.tokens.lengths) == sorted(solutions.tokens.lengths, reverse=True)
    for number, item in enumerate(solutions.items):
        assert solutions.tokens.domains[number] == item.task
        prompt, solution = pairs(item.task)[item.doc_id] if item.doc_id < ITEMS else (None, None)
        if prompt is not None and solution is not None:
            ids = solutions.tokens.sequence(number).tolist()
            assert tokenizer.decode(ids[-item.n_tokens :]).strip() == solution.strip()  # type: ignore[attr-defined]


def test_task_given_by_path_is_reported_by_name(tmp_path: Path) -> None:
    """Reports must not have paths of this machine."""
    for part in ("tiny-v3-math.yaml", "data/tiny-v3-math.jsonl"):
        (tmp_path / part).parent.mkdir(exist_ok=True)
        (tmp_path / part).write_bytes((package_data.locate_folder("evals") / part).read_bytes())
    names = [str(tmp_path / "tiny-v3-math.yaml"), str(tmp_path / "absent.yaml")]
    tokenizer = load_tokenizer(package_data.locate_model("builtin:tiny-v3"))
    solutions = solution_likelihood.tokenize_solutions(names, tokenizer, items=4, length=200)
    scored_items = [
        solution_likelihood.ScoredSolution(solution=item, source=-1.0, artifact=-1.5 - item.doc_id)
        for item in solutions.items
    ]
    first, second = solution_likelihood.make_likelihood_rows(names, solutions, scored_items)
    assert (first.task, first.n, first.status) == ("tiny-v3-math", 4, "ok")
    assert (second.task, second.status) == ("absent", "not run") and "no such task" in second.reason


def test_unreadable_task_is_a_row_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    broken = (
        (package_data.locate_folder("evals") / "tiny-v3-math.yaml")
        .read_text()
        .replace('"{{solution}}"', '"{{no_column}}"')
    )
    (tmp_path / "broken.yaml").write_text(broken.replace("task: tiny-v3-math", "task: broken"))
    (tmp_path / "data").symlink_to(package_data.locate_folder("evals") / "data")
    silent = (tmp_path / "broken.yaml").read_text().replace("task: broken", "task: silent")
    (tmp_path / "silent.yaml").write_text(
        "\n".join(line for line in silent.splitlines() if "gold:" not in line)
    )
    tokenizer = load_tokenizer(package_data.locate_model("builtin:tiny-v3"))
    names = ["broken.yaml", "silent.yaml", "tiny-v3-code"]
    solutions = solution_likelihood.tokenize_solutions(names, tokenizer, items=2, length=512)
    scored_items = [
        solution_likelihood.ScoredSolution(solution=item, source=-1.0, artifact=-1.5)
        for item in solutions.items
    ]
    first, second = solution_likelihood.make_likelihood_rows(names, solutions, scored_items)
    assert (first.task, first.status) == ("broken", "not run")
    assert "no_column" in first.reason
    assert (second.task, second.n, second.difference.value) == ("tiny-v3-code", 2, -0.5)  # type: ignore[union-attr]


# -------------------------------------------------------------------------------------------------
# gates and plans


def report(*values: float | None) -> Fidelity:
    """Return a report with one task per value; None: not run."""
    models = Fidelity.model_validate(report_example.FIDELITY)
    rows = [
        LikelihoodResult(task=f"t{n}", status="not run", reason="no data")
        if value is None
        else LikelihoodResult(task=f"t{n}", n=9, difference=Figure(value=value))
        for n, value in enumerate(values)
    ]
    return models.model_copy(update={"likelihood": tuple(rows)})


@pytest.mark.parametrize(
    ("figure", "values", "value", "ok"),
    [
        ("likelihood", (-0.1, -0.3), -0.3, False),
        ("likelihood@t0", (-0.1, -0.3), -0.1, True),
        ("likelihood@t1", (-0.1, None), None, None),
        ("likelihood", (-0.1, None), None, None),
        ("likelihood", (), None, None),
    ],
)
def test_likelihood_gates(
    figure: str, values: tuple[float | None, ...], value: float | None, ok: bool | None
) -> None:
    (result,) = gates.judge_gates({figure: Gate(min=-0.2)}, report(*values))
    assert (result.value, result.ok) == (value, ok)


def test_likelihood_gate_must_name_a_task_of_the_recipe() -> None:
    ok = parse_recipe(
        TEXT, "x.yaml", {"gates": "{likelihood@tiny-v3-math: {min: -0.1}, likelihood: {min: -1}}"}
    )
    assert ok.gates["likelihood@tiny-v3-math"].min == -0.1
    assert sources.find_gate_faults(ok) == []
    for wrong, fault in (
        ("likelihood@gsm8k", "no figure or task"),
        ("kl_mean@tiny-v3-math", "expected a kind of the fidelity text after @"),
    ):
        with pytest.raises(RecipeError, match=fault):
            parse_recipe(TEXT, "x.yaml", {"gates": f"{{{wrong}: {{min: 0}}}}"})


def test_plan_counts_solution_tokens() -> None:
    counts = [
        sources.bound_text_tokens(
            parse_recipe(TEXT, "x.yaml", {"evaluation.likelihood": str(items)})
        )["fidelity"]
        for items in (0, 10, 64)
    ]
    assert [count - counts[0] for count in counts] == [0, 2 * 10 * 512, 2 * 64 * 512]
    recipe = parse_recipe(TEXT, "x.yaml", {"evaluation.likelihood": "64"})
    texts = pipeline.tokenize(recipe, package_data.locate_model("builtin:tiny-v3"))
    assert texts.tokens["fidelity"].n_tokens < texts.counts()["fidelity"] <= counts[2]


def test_likelihood_table_names_tasks_not_run() -> None:
    scored_items = tables.make_likelihood_table(report(-0.25, None))
    assert [row[0] for row in scored_items.rows] == ["t0", "t1"]
    assert "t1 was not run: no data." in scored_items.note
    assert tables.make_likelihood_table(report()).rows == ()
