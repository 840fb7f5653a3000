"""`--log-to`: an artifact's figures, page and hash as a run of an experiment tracker.

A tracker is opened before a build starts, and used after the artifact is sealed and has its
name: whatever the tracker does then, the artifact is complete.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path

from quantkit.errors import TransferError, UsageError
from quantkit.tracking.run_values import RunValues, read_run_values

TRACKERS: Mapping[str, str] = {"mlflow": "MLflow", "wandb": "Weights & Biases"}
"""Package and extra of quantkit -> the tracker's name."""


def check_tracker(tracker: str) -> None:
    """Raise UsageError with the command that installs a tracker's client, if it is missing."""
    if tracker not in TRACKERS:
        raise UsageError(f"--log-to: expected {' or '.join(TRACKERS)}, found {tracker!r:.40}")
    if find_spec(tracker) is None:
        raise UsageError(
            f"--log-to {tracker}: expected the package {tracker}, found none; "
            f"pip install quantkit[{tracker}]"
        )


def log_artifact(tracker: str, artifact: Path) -> str:
    """Log a sealed artifact; return where the run is.

    Raises UsageError as `check_tracker`, ArtifactError for an artifact without a report, and
    TransferError if the tracker fails, whatever it raises.
    """
    check_tracker(tracker)
    values = read_run_values(artifact)
    send = choose_client(tracker)
    try:
        return send(values)
    except Exception as fault:  # clients raise any error of server, network or disk
        said = " ".join(str(fault).split())[:300] or type(fault).__name__
        raise TransferError(
            f"{TRACKERS[tracker]}: expected it to take the run, found: {said}; the artifact is "
            f"complete, and `quantkit report {artifact} --log-to {tracker}` logs it again"
        ) from fault


def choose_client(tracker: str) -> Callable[[RunValues], str]:
    """Return the function that sends a run to a tracker."""
    if tracker == "mlflow":
        from quantkit.tracking.mlflow_client import send_to_mlflow

        return send_to_mlflow
    from quantkit.tracking.wandb_client import send_to_wandb

    return send_to_wandb
