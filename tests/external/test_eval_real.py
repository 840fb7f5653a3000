"""Tests of GSM8K, HumanEval and MBPP on SmolLM2-135M, source and artifact, with the real sandbox.

Three items and 48 tokens each: five minutes on one core for four methods; `make eval-real` runs the
full benchmarks. Skipped without the model (QUANTKIT_SMOLLM2, default artifacts/real/smollm2-135m,
created by `make real-model`) or without the data (QUANTKIT_DATA, default ../shared/data).
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pyarrow.parquet as parquet
import pytest
from click.testing import CliRunner
from support.paths import ROOT

from quantkit.cli.main import main
from quantkit.evaluate.item_results import read_items
from quantkit.evaluate.sandbox import probe_sandbox

MODEL = Path(os.environ.get("QUANTKIT_SMOLLM2", ROOT / "artifacts" / "real" / "smollm2-135m"))
DATA = Path(os.environ.get("QUANTKIT_DATA", ROOT.parent / "shared" / "data"))
TASKS = ("gsm8k", "humaneval", "mbpp")
LIMIT, TOKENS = 3, 48
METHODS = {
    "rtn": (
        "smollm2-135m-awq4",
        ["quantize.method=rtn", "quantize.rounding=nearest", "calibration=null"],
    ),
    "awq": ("smollm2-135m-awq4", ["quantize.rounding=nearest"]),
    "gptq": ("smollm2-135m-gptq4", []),
    "nf4": ("smollm2-135m-nf4", ["calibration=null"]),
}
SHORT_TEXTS = [
    "calibration.sequences=4",
    "calibration.length=128",
    "fidelity.windows=2",
    "fidelity.length=128",
]


def run_quantkit(*arguments: str) -> str:
    """Run quantkit with --json and return its output; expect exit code 0."""
    result = CliRunner(catch_exceptions=False).invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_smollm2_runs_real_benchmarks(method, tmp_path, monkeypatch, tmp_path_factory):
    if not (MODEL / "model.safetensors").is_file():
        pytest.skip(
            f"{MODEL}: SmolLM2-135M not found; run `make real-model` or set QUANTKIT_SMOLLM2"
        )
    if not all((DATA / name).is_dir() for name in TASKS):
        pytest.skip(f"{DATA}: expected {', '.join(TASKS)}; set QUANTKIT_DATA")
    monkeypatch.setenv("QUANTKIT_DATA", str(DATA))
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "smollm2-baselines"))
    recipe, overrides = METHODS[method]
    changes = [
        f"source.model={MODEL}",
        f"output.path={tmp_path / 'artifact'}",
        "gates={}",
        "compute.device=cpu",
        *overrides,
    ]
    changes += [
        change
        for change in SHORT_TEXTS
        if "calibration=null" not in overrides or "calibration" not in change
    ]
    run_quantkit(
        "build",
        recipe,
        "--skip-evaluation",
        *(part for change in changes for part in ("--set", change)),
    )
    results = json.loads(
        run_quantkit(
            "eval",
            str(tmp_path / "artifact"),
            "--tasks",
            ",".join(TASKS),
            "--limit",
            str(LIMIT),
            "--max-tokens",
            str(TOKENS),
            "--batch-size",
            "8",
            "--dtype",
            "float32",
            "--device-map",
            "cpu",
            "--source",
            str(MODEL),
            "--output",
            str(tmp_path / "out"),
        )
    )
    items = read_items(tmp_path / "out" / "items.parquet")
    pairs = {(item.task, item.filter) for item in items}
    assert pairs == {
        ("gsm8k", "strict-match"),
        ("gsm8k", "flexible-extract"),
        ("humaneval", "pass@1"),
        ("mbpp", "pass@1"),
    }
    assert all(
        len([item for item in items if (item.task, item.filter) == pair]) == LIMIT for pair in pairs
    )
    assert all(1 <= item.n_tokens <= TOKENS for item in items)
    assert all(item.prompt.count("Question:") == 6 for item in items if item.task == "gsm8k"), (
        "expected five worked examples and the question"
    )
    code = [item for item in items if item.task != "gsm8k"]
    if probe_sandbox().kind == "none":
        assert {item.score for item in code} == {None}
    else:
        assert {item.score for item in items} <= {0.0, 1.0}
        assert any(item.parsed for item in code), (
            "expected at least one answer that parses as Python"
        )
        rows = {row["task"]: row for row in results["comparison"]}
        assert all(rows[task]["n"] == LIMIT for task in TASKS)
        for row in rows.values():
            assert (row["lost"] - row["gained"]) / LIMIT == pytest.approx(
                row["source"] - row["artifact"]
            )
    rows = parquet.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert any(row["first_divergence"] is not None for row in rows), (
        "expected 4 bits to change an answer of a small model"
    )
