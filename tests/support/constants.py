"""Constants that tests share."""

from __future__ import annotations

import shutil

CHROMIUM = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)


FAST = {
    "quantize.method": "rtn",
    "quantize.rounding": "nearest",
    "calibration.sequences": "32",
    "fidelity.windows": "8",
    "fidelity.length": "128",
    "evaluation.likelihood": "8",
    "output.shard_bytes": "3MB",
    "compute.device": "cpu",
}
"""Overrides that make tiny-v3-awq4 build in half a second, in three shards."""
