"""A run of MLflow: server and experiment by MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME."""

from __future__ import annotations

import os
import time
from contextlib import suppress
from typing import Any

from quantkit.tracking.run_values import RunValues

EXPERIMENT = "quantkit"
MOST_METRICS = 1_000
MOST_PARAMETERS = 100
"""Limits of one request of MLflow."""
MAX_VALUE = 5_000
"""Characters of a parameter; MLflow takes 6,000."""


def send_to_mlflow(values: RunValues) -> str:
    """Make a run with parameters, metrics, files and the hash as a tag; return its address.

    A run that fails on the way is marked as failed. Raises the errors of the client.
    """
    import mlflow
    from mlflow.entities import Metric, Param
    from mlflow.tracking import MlflowClient

    client: Any = MlflowClient()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or EXPERIMENT
    known = client.get_experiment_by_name(name)
    experiment = known.experiment_id if known else client.create_experiment(name)
    tags = {
        "mlflow.runName": values.name,
        "quantkit.manifest_sha256": values.manifest,
        "quantkit.status": values.settings["status"],
    }
    run_id = client.create_run(experiment, run_name=values.name, tags=tags).info.run_id
    try:
        now = int(time.time() * 1000)
        metrics = [Metric(key, value, now, 0) for key, value in values.figures.items()]
        metrics += [
            Metric(key, value, now, step)
            for key, numbers in values.series.items()
            for step, value in enumerate(numbers)
            if value is not None
        ]
        parameters = [Param(key, value[:MAX_VALUE]) for key, value in values.settings.items()]
        for start in range(0, len(metrics), MOST_METRICS):
            client.log_batch(run_id, metrics=metrics[start : start + MOST_METRICS])
        for start in range(0, len(parameters), MOST_PARAMETERS):
            client.log_batch(run_id, params=parameters[start : start + MOST_PARAMETERS])
        for file in values.files:
            client.log_artifact(run_id, str(file))
    except BaseException:
        with suppress(Exception):  # the first fault is the one to report
            client.set_terminated(run_id, "FAILED")
        raise
    client.set_terminated(run_id, "FINISHED")
    return f"MLflow run {run_id} of experiment {name} at {mlflow.get_tracking_uri()}"
