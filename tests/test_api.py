"""The Python API as a user imports it."""

from __future__ import annotations

import doctest
import json
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
from support.constants import FAST
from support.paths import ROOT

import quantkit
import quantkit.api
from quantkit.artifact import read_artifact
from quantkit.artifact.read_artifact import Artifact
from quantkit.errors import ArtifactError
from quantkit.progress import Progress

NOTEBOOK = ROOT / "tests" / "tools" / "api_notebook.py"
LIGHT = """
import sys
import quantkit
assert not {"torch", "pydantic", "click"} & set(sys.modules), sorted(sys.modules)
assert not hasattr(quantkit, "plan_recipe")
assert set(quantkit.__all__) <= set(dir(quantkit))
assert quantkit.__version__
"""

PIPELINE = """
import json, sys
import quantkit
import quantkit.plan.plan, quantkit.report.make, quantkit.diff.compare, quantkit.verify.shallow
from quantkit.plan import sources  # the subpackages stay importable
from quantkit import plan, build, verify, diff, load, open_artifact
assert all(map(callable, (plan, build, verify, diff, load, open_artifact)))
assert quantkit.plan is plan and sources.plan_recipe is not plan

folder, overrides = sys.argv[1], json.loads(sys.argv[2])
[planned] = quantkit.plan("tiny-v3-awq4", overrides=overrides)
assert planned.totals.modules_quantized == 144
plans, stages = [], set()
[result] = quantkit.build(
    "tiny-v3-awq4", overrides=overrides, evaluate=False, on_plan=plans.extend,
    on_progress=lambda progress: stages.add(progress.stage),
)
assert [plan.output for plan in plans] == [folder] and "blocks" in stages
assert str(result.path) == folder
assert not {"lm_eval", "datasets"} & sys.modules.keys()  # 130 MB of the recipe's memory
checked = quantkit.verify(folder)
report = quantkit.open_artifact(folder).report
assert report == result.fidelity and checked.status == report.status
same = quantkit.diff(folder, folder)
model = quantkit.load(folder, device="cpu")
print(json.dumps({"status": report.status, "files": checked.files, "model": type(model).__name__,
                  "diff": type(same).__name__}))
"""


def run_program(program: str, *arguments: str, cwd: Path | None = None) -> str:
    """Run a program in a process of its own and return its stdout."""
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        capture_output=True,
        text=True,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
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


def test_examples_of_the_docstrings_are_true(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    checked = doctest.testmod(quantkit.api)
    assert checked.attempted and not checked.failed
    assert capfd.readouterr().out.strip() == ""


def test_notebook_runs_from_top_to_bottom(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(NOTEBOOK))
    printed = capfd.readouterr().out
    assert "144 modules" in printed and "worst module" in printed


def test_progress_shows_each_step_with_its_note(capsys: pytest.CaptureFixture[str]) -> None:
    with quantkit.show_progress() as progress:
        for done in (1, 4):
            progress(Progress(stage="blocks", done=done, total=4, note=f"layer {done}"))
        progress(Progress(stage="tasks", done=1, total=2))
    shown = capsys.readouterr().err
    assert re.search(r"blocks: 100%\|.* left .*layer 4", shown), shown
    assert re.search(r"tasks:  50%\|.* left ", shown), shown


def test_figures_of_modules_are_numbers_without_calibration(tmp_path: Path) -> None:
    """RTN has no error of outputs; `nlargest` needs a column of numbers."""
    pandas = pytest.importorskip("pandas")
    scheme = {"bits": 4, "group_size": 64, "symmetric": True}
    entry = {
        "scheme": scheme,
        "relative_error": 0.1,
        "sqnr_db": None,
        "output_relative_error": None,
    }
    modules = Artifact(path=tmp_path, manifest={"modules": {"a.b": entry}}).modules
    assert len(modules.nlargest(10, "output_relative_error")) == 1
    assert pandas.isna(modules.output_relative_error[0]) and modules.relative_error[0] == 0.1


def test_modules_are_a_list_of_rows_without_pandas(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(read_artifact, "find_spec", lambda _: None)
    manifest = {"modules": {"a.b": {"scheme": {"bits": 4, "group_size": 64, "symmetric": True}}}}
    [row] = Artifact(path=tmp_path, manifest=manifest).modules
    assert row["module"] == "a.b" and row["bits"] == 4 and row["output_relative_error"] is None
    with pytest.raises(ArtifactError, match=r"modules\.a: expected an object with a scheme"):
        _ = Artifact(path=tmp_path, manifest={"modules": {"a": 3}}).modules


def test_unknown_attribute_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'quantkit' has no attribute 'quantise'"):
        _ = quantkit.quantise
