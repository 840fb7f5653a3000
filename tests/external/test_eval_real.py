"""GSM8K, HumanEval and MBPP on SmolLM2-135M, source against artifact: real prompts, real code, the real sandbox.

Three items and 48 tokens each: five minutes of one core for four methods; `make eval-real` is the whole. Skipped
without the model (QUANTKIT_SMOLLM2, else artifacts/real/smollm2-135m, which `make real-model` makes) or without the
data (QUANTKIT_DATA, else ../shared/data).
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
SHORT = [
    "calibration.sequences=4",
    "calibration.length=128",
    "fidelity.windows=2",
    "fidelity.length=128",
]


def run(*arguments: str) -> str:
    result = CliRunner(catch_exceptions=False).invoke(main, [*arguments, "--json"])
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_smollm2_on_the_real_benchmarks(method, tmp_path, monkeypatch, tmp_path_factory):
    if not (MODEL / "model.safetensors").is_file():
        pytest.skip(
            f"{MODEL}: no SmolLM2-135M; `make real-model` makes it, or set QUANTKIT_SMOLLM2"
        )
    if not all((DATA / name).is_dir() for name in TASKS):
        pytest.skip(f"{DATA}: not all of {', '.join(TASKS)}; set QUANTKIT_DATA")
    monkeypatch.setenv("QUANTKIT_DATA", str(DATA))
    monkeypatch.setenv("QUANTKIT_CACHE", str(tmp_path_factory.getbasetemp() / "smollm2-baselines"))
    recipe, own = METHODS[method]
    changes = [
        f"source.model={MODEL}",
        f"output.path={tmp_path / 'artifact'}",
        "gates={}",
        "compute.device=cpu",
        *own,
    ]
    changes += [
        change for change in SHORT if "calibration=null" not in own or "calibration" not in change
    ]
    run(
        "build",
        recipe,
        "--skip-evaluation",
        *(part for change in changes for part in ("--set", change)),
    )
    told = json.loads(run(
        "eval", str(tmp_path / "artifact"), "--tasks", ",".join(TASKS), "--limit", str(LIMIT), "--max-tokens",
        str(TOKENS), "--batch-size", "8", "--dtype", "float32", "--device-map", "cpu", "--source", str(MODEL),
        "--output", str(tmp_path / "out"),
    ))  # fmt: skip
    items = read_items(tmp_path / "out" / "items.parquet")
    first = {(item.task, item.filter) for item in items}
    assert first == {
        ("gsm8k", "strict-match"), ("gsm8k", "flexible-extract"), ("humaneval", "pass@1"), ("mbpp", "pass@1")
    }  # fmt: skip
    assert all(
        len([item for item in items if (item.task, item.filter) == each]) == LIMIT for each in first
    )
    assert all(1 <= item.n_tokens <= TOKENS for item in items)
    assert all(item.prompt.count("Question:") == 6 for item in items if item.task == "gsm8k"), (
        "five worked examples"
    )
    code = [item for item in items if item.task != "gsm8k"]
    if probe_sandbox().kind == "none":
        assert {item.score for item in code} == {None}
    else:
        assert {item.score for item in items} <= {0.0, 1.0}
        assert any(item.parsed for item in code), "a small model writes Python that at least parses"
        rows = {row["task"]: row for row in told["comparison"]}
        assert all(rows[task]["n"] == LIMIT for task in TASKS)
        for row in rows.values():
            assert (row["lost"] - row["gained"]) / LIMIT == pytest.approx(
                row["source"] - row["artifact"]
            )
    pairs = parquet.read_table(tmp_path / "out" / "pairs.parquet").to_pylist()
    assert any(row["first_divergence"] is not None for row in pairs), (
        "4 bits change some answer of a small model"
    )
