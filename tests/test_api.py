"""The Python API as a user imports it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support.constants import FAST

import quantkit

LIGHT = """
import sys
import quantkit
assert not {"torch", "pydantic", "click"} & set(sys.modules), sorted(sys.modules)
from quantkit import plan, report, diff, verify, build  # subpackages
for package in (plan, report, diff, verify, build):
    assert package.__path__
assert set(quantkit.__all__) <= set(dir(quantkit))
assert quantkit.__version__
"""

PIPELINE = """
import json, sys
import quantkit
import quantkit.plan.plan, quantkit.report.make, quantkit.diff.compare, quantkit.verify.shallow

folder, overrides = sys.argv[1], json.loads(sys.argv[2])
[planned] = quantkit.plan_recipe("tiny-v3-awq4", overrides=overrides)
assert planned.totals.modules_quantized == 144
plans, stages = [], set()
[result] = quantkit.build_recipe(
    "tiny-v3-awq4", overrides=overrides, evaluate=False, on_plan=plans.extend,
    on_progress=lambda progress: stages.add(progress.stage),
)
assert [plan.output for plan in plans] == [folder] and "blocks" in stages
assert str(result.path) == folder
checked = quantkit.verify_artifact(folder)
report = quantkit.read_report(folder)
assert report == result.fidelity and checked.status == report.status
same = quantkit.diff_artifacts(folder, folder)
model = quantkit.load(folder, device="cpu")
print(json.dumps({"status": report.status, "files": checked.files, "model": type(model).__name__,
                  "diff": type(same).__name__}))
"""


def run_program(program: str, *arguments: str) -> str:
    """Run a program in a process of its own and return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_import_is_fast_and_leaves_the_subpackages_importable() -> None:
    run_program(LIGHT)


def test_api_plans_builds_verifies_reads_compares_and_loads(tmp_path: Path) -> None:
    folder = tmp_path / "artifact"
    overrides = {**FAST, "output.path": str(folder), "memory": 4 * 10**9}
    printed = run_program(PIPELINE, str(folder), json.dumps(overrides))
    result = json.loads(printed.splitlines()[-1])
    assert result["status"] == "not judged" and result["files"] > 5
    assert result["model"].endswith("ForCausalLM") and result["diff"] == "Diff"


def test_overrides_may_be_python_values() -> None:
    from quantkit.api import _as_text

    values = {"quantize.bits": 8, "output.path": "123", "calibration": None, "format": ["awq"]}
    assert _as_text(values) == {
        "quantize.bits": "8", "output.path": "123", "calibration": "null", "format": '["awq"]'
    }  # fmt: skip


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'quantise'"):
        _ = quantkit.quantise
