"""`--log-to`: an artifact as a run of MLflow and of Weights & Biases.

The clients' own packages are used where they are installed, with a local store and offline. The
fakes take their places elsewhere; their signatures are compared with the packages'.
"""

from __future__ import annotations

import inspect
import json
import math
import sys
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner, Result
from support.builds import build
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint

from quantkit.artifact.layout import FIDELITY, MANIFEST
from quantkit.cli.main import main
from quantkit.io.files import sha256_file
from quantkit.tracking.run_values import clean_name, read_run_values

pytestmark = pytest.mark.usefixtures("quick_builds")

METHOD = "{method: rtn, bits: 4, group_size: 64}"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small artifact with a measured fidelity text; tests must not change it."""
    place = tmp_path_factory.mktemp("tracked")
    source = write_checkpoint(place / "source", make_tiny_config("llama"))
    build(source, place / "model", quantize=METHOD)
    return place / "model"


def run_command(*words: object) -> Result:
    """Run quantkit in this process."""
    return CliRunner().invoke(main, [str(word) for word in words])


# ------------------------------------------------------------------------------------------- fakes


class FakeMlflowClient:
    """The calls of MlflowClient that quantkit makes."""

    calls: list[tuple[str, tuple[Any, ...], dict[str, Any]]]
    broken = ""

    def _record(self, name: str, *values: Any, **named: Any) -> None:
        if name == self.broken:
            raise ConnectionError("connection refused by tracking.example")
        type(self).calls.append((name, values, named))

    def get_experiment_by_name(self, name: str) -> None:
        self._record("get_experiment_by_name", name)

    def create_experiment(self, name: str) -> str:
        self._record("create_experiment", name)
        return "7"

    def create_run(self, experiment_id: str, *, run_name: str, tags: dict[str, str]) -> Any:
        self._record("create_run", experiment_id, run_name=run_name, tags=tags)
        return SimpleNamespace(info=SimpleNamespace(run_id="r1"))

    def log_batch(self, run_id: str, *, metrics: Any = (), params: Any = ()) -> None:
        self._record("log_batch", run_id, metrics=metrics, params=params)

    def log_artifact(self, run_id: str, local_path: str) -> None:
        self._record("log_artifact", run_id, local_path)

    def set_terminated(self, run_id: str, status: str) -> None:
        self._record("set_terminated", run_id, status)


class FakeEntity(SimpleNamespace):
    """Metric(key, value, timestamp, step) and Param(key, value)."""

    def __init__(self, key: str, value: Any, timestamp: int = 0, step: int = 0) -> None:
        super().__init__(key=key, value=value, timestamp=timestamp, step=step)


def make_module(name: str, **members: object) -> ModuleType:
    module = ModuleType(name)
    module.__spec__ = ModuleSpec(name, None)
    module.__dict__.update(members)
    return module


@pytest.fixture
def fake_mlflow(monkeypatch: pytest.MonkeyPatch) -> type[FakeMlflowClient]:
    """Take MLflow's place with a client that records its calls."""

    class Client(FakeMlflowClient):
        calls: list[Any] = []

    entities = make_module("mlflow.entities", Metric=FakeEntity, Param=FakeEntity)
    tracking = make_module("mlflow.tracking", MlflowClient=Client)
    package = make_module("mlflow", get_tracking_uri=lambda: "http://tracking.example")
    for module in (package, entities, tracking):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delenv("MLFLOW_EXPERIMENT_NAME", raising=False)
    return Client


def test_fake_has_the_signatures_of_mlflow() -> None:
    mlflow = pytest.importorskip("mlflow")
    from mlflow.entities import Metric, Param

    for name, method in vars(FakeMlflowClient).items():
        if name.startswith("_") or not callable(method):
            continue
        own = inspect.signature(method).parameters.values()
        real = inspect.signature(getattr(mlflow.tracking.MlflowClient, name)).parameters
        names = [x for x in own if x.kind is inspect.Parameter.KEYWORD_ONLY]
        assert {x.name for x in names} <= set(real), name
        places = [x.name for x in own if x.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
        assert places == list(real)[: len(places)], name
    assert list(inspect.signature(Metric).parameters)[:4] == ["key", "value", "timestamp", "step"]
    assert list(inspect.signature(Param).parameters)[:2] == ["key", "value"]


# ------------------------------------------------------------------------------------------ values


def test_values_are_those_of_the_report(artifact: Path) -> None:
    values = read_run_values(artifact)
    report = json.loads((artifact / FIDELITY).read_text())
    everything = next(row for row in report["distribution"] if row["domain"] == "all")
    assert values.figures["kl_mean"] == everything["kl_mean"]["value"] > 0
    low, high = (values.figures[f"interval/kl_mean/{end}"] for end in ("low", "high"))
    assert low < values.figures["kl_mean"] < high
    assert not {x for x in values.figures for y in values.figures if y.startswith(f"{x}/")}
    assert values.figures["size"] == report["artifact"]["bytes_artifact"]
    assert all(math.isfinite(value) for value in values.figures.values())
    errors = values.series["by_block/hidden_state_error"]
    assert errors == [row["relative_error"] for row in report["blocks"]] and len(errors) == 2
    assert values.manifest == sha256_file(artifact / MANIFEST)
    assert values.settings["scheme"] == report["artifact"]["scheme"]
    names = [file.relative_to(artifact).as_posix() for file in values.files]
    assert names == ["quantkit/fidelity.html", FIDELITY, "README.md"]


def test_names_have_characters_that_trackers_accept() -> None:
    assert clean_name("kl_mean/code (python)@x") == "kl_mean/code _python__x"


# --------------------------------------------------------------------------------------- with fakes


def test_report_logs_to_mlflow(artifact: Path, fake_mlflow: type[FakeMlflowClient]) -> None:
    done = run_command("report", artifact, "--log-to", "mlflow")
    assert done.exit_code == 0, done.output
    assert done.stdout == "MLflow run r1 of experiment quantkit at http://tracking.example\n"
    values, names = read_run_values(artifact), [call[0] for call in fake_mlflow.calls]
    assert names[:3] == ["get_experiment_by_name", "create_experiment", "create_run"]
    assert names[-1] == "set_terminated" and fake_mlflow.calls[-1][1] == ("r1", "FINISHED")
    tags = fake_mlflow.calls[2][2]["tags"]
    assert tags["quantkit.manifest_sha256"] == values.manifest
    batches = [call[2] for call in fake_mlflow.calls if call[0] == "log_batch"]
    sent = {(x.key, x.step): x.value for batch in batches for x in batch["metrics"]}
    assert sent["kl_mean", 0] == values.figures["kl_mean"]
    assert sent["by_block/hidden_state_error", 1] == values.series["by_block/hidden_state_error"][1]
    assert len({x.key for batch in batches for x in batch["params"]}) == len(values.settings)
    pages = [call[1][1] for call in fake_mlflow.calls if call[0] == "log_artifact"]
    assert pages == [str(file) for file in values.files]


def test_failing_server_never_loses_the_artifact(
    tmp_path: Path, fake_mlflow: type[FakeMlflowClient], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The build ends as without a tracker: a warning with a name; `report` logs it again."""
    source = write_checkpoint(tmp_path / "source", make_tiny_config("llama"))
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(make_recipe_text(source, tmp_path / "out", quantize=METHOD, fidelity="none"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(fake_mlflow, "broken", "log_batch")
    done = run_command("build", recipe, "--log-to", "mlflow")
    assert done.exit_code == 0 and (tmp_path / "out" / MANIFEST).is_file()
    (warning,) = [line for line in done.stderr.splitlines() if "warning:" in line]
    assert warning.startswith(
        "warning: tracker-failed: MLflow: expected it to take the run, found:"
    )
    assert "connection refused" in warning and "report" in warning and "logs it again" in warning
    assert fake_mlflow.calls[-1] == ("set_terminated", ("r1", "FAILED"), {})
    assert run_command("report", tmp_path / "out", "--log-to", "mlflow").exit_code == 1
    monkeypatch.setattr(fake_mlflow, "broken", "")
    assert run_command("report", tmp_path / "out", "--log-to", "mlflow").exit_code == 0


@pytest.mark.parametrize("tracker", ["mlflow", "wandb"])
def test_missing_extra_is_said_before_the_build(
    tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from quantkit.tracking import log_run

    monkeypatch.setattr(log_run, "find_spec", lambda name: None)
    monkeypatch.chdir(tmp_path)
    done = run_command("build", "tiny-v3-awq4", "--log-to", tracker)
    assert done.exit_code == 2 and not list(tmp_path.iterdir())
    assert f"expected the package {tracker}, found none; pip install quantkit[{tracker}]" in (
        done.stderr
    )


# ---------------------------------------------------------------------------- with the real clients


@pytest.mark.parametrize("store", ["sqlite", "file"])
def test_run_in_a_local_store_of_mlflow(
    store: str, artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    if store == "sqlite":
        pytest.importorskip("sqlalchemy")
    address = f"sqlite:///{tmp_path / 'runs.db'}" if store == "sqlite" else str(tmp_path / "runs")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", address)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "quality")
    monkeypatch.chdir(tmp_path)
    done = run_command("report", artifact, "--log-to", "mlflow")
    assert done.exit_code == 0, done.output
    client, values = mlflow.tracking.MlflowClient(), read_run_values(artifact)
    experiment = client.get_experiment_by_name("quality")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.status == "FINISHED" and run.info.run_name == "model"
    assert run.data.metrics["kl_mean"] == pytest.approx(values.figures["kl_mean"])
    assert run.data.tags["quantkit.manifest_sha256"] == values.manifest
    steps = client.get_metric_history(run.info.run_id, "by_block/hidden_state_error")
    assert [x.step for x in steps] == [0, 1]
    assert {x.path for x in client.list_artifacts(run.info.run_id)} == {
        "fidelity.html", "fidelity.json", "README.md",
    }  # fmt: skip


def test_run_of_wandb_offline(
    artifact: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    monkeypatch.setenv("WANDB_PROJECT", "quality")
    for name in ("WANDB_CACHE_DIR", "WANDB_CONFIG_DIR", "WANDB_DATA_DIR"):
        monkeypatch.setenv(name, str(tmp_path / name.lower()))
    monkeypatch.chdir(tmp_path)
    done = run_command("report", artifact, "--log-to", "wandb")
    assert done.exit_code == 0, done.output
    assert "of project quality at" in done.stdout
    wandb.teardown()  # as at the end of the process: the last records reach the file
    (log,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    written = log.read_bytes()
    assert read_run_values(artifact).manifest.encode() in written
    assert b"kl_mean" in written and b"by_block/hidden_state_error" in written


def test_wandb_has_the_calls() -> None:
    """Names and parameters of the calls in wandb_client.py."""
    if find_spec("wandb") is None:
        pytest.skip("wandb is not installed")
    import wandb

    parameters = inspect.signature(wandb.init).parameters
    assert {"project", "name", "job_type", "config", "settings"} <= set(parameters)
    for name in ("define_metric", "log", "log_artifact", "finish", "url", "dir"):
        assert hasattr(wandb.Run, name), name
    assert {"type", "metadata"} <= set(inspect.signature(wandb.Artifact).parameters)
