"""A run of Weights & Biases: project, entity and mode by WANDB_PROJECT, WANDB_ENTITY, WANDB_MODE.

With WANDB_MODE=offline the run is written to ./wandb, and `wandb sync` sends it later.
"""

from __future__ import annotations

import os
from contextlib import suppress
from typing import Any

from quantkit.tracking.run_values import RunValues

PROJECT = "quantkit"
KIND = "quantization-report"
BLOCK = "by_block/block"


def send_to_wandb(values: RunValues) -> str:
    """Make a run with config, summary, series, the page and the hash; return its address.

    A run that fails on the way ends with exit code 1. Raises the errors of the client.
    """
    import wandb

    client: Any = wandb
    run = client.init(
        project=os.environ.get("WANDB_PROJECT") or PROJECT,
        name=values.name,
        job_type="quantize",
        config=dict(values.settings),
        settings=client.Settings(silent=True, console="off"),
    )
    try:
        run.define_metric(BLOCK)
        run.define_metric("by_block/*", step_metric=BLOCK)
        for step in range(max(map(len, values.series.values()), default=0)):
            row = {k: v[step] for k, v in values.series.items() if step < len(v)}
            run.log({BLOCK: step, **{k: v for k, v in row.items() if v is not None}})
        run.summary.update({**values.figures, "manifest_sha256": values.manifest})
        report = client.Artifact(
            f"{values.name}-report", type=KIND, metadata={"manifest_sha256": values.manifest}
        )
        for file in values.files:
            report.add_file(str(file))
        run.log_artifact(report)
    except BaseException:
        with suppress(Exception):  # the first fault is the one to report
            run.finish(exit_code=1)
        raise
    place = run.url or run.dir
    run.finish()
    return f"Weights & Biases run {run.id} of project {run.project} at {place}"
