"""Seconds of a build: a stopwatch of its steps, and the file timings.json."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from pydantic import BaseModel

from quantkit.artifact import layout
from quantkit.artifact.records import BlockRecord
from quantkit.errors import ArtifactError
from quantkit.io.files import read_json, write_json
from quantkit.io.host import get_peak_memory

LOG = logging.getLogger(__name__)


class Timings(BaseModel):
    """Figures that depend on the clock and the machine's load: the one file that the manifest does
    not hash.
    """

    seconds: dict[str, float]
    blocks: dict[str, float]
    threads: int
    cpus: int | None
    peak_rss_bytes: int


@dataclass(kw_only=True)
class StepTimer:
    """Seconds per step; mutable."""

    began: float = field(default_factory=time.monotonic)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        """Record and log the time since the last lap under `name`."""
        now = time.monotonic()
        self.laps[name] = now - self.began
        self.began = now
        LOG.info("%s: %.1f s", name, self.laps[name])


def write_timings(folder: Path, blocks: Sequence[BlockRecord], timer: StepTimer) -> None:
    """Write the seconds of this run, and of each block when it was built."""
    timings = Timings(
        seconds=timer.laps,
        blocks={block.name: block.seconds for block in blocks},
        threads=torch.get_num_threads(),
        cpus=os.cpu_count(),
        peak_rss_bytes=get_peak_memory(),
    )
    write_json(folder / layout.TIMINGS, timings.model_dump())


def read_timings(folder: Path) -> Timings:
    """Read the timings of an artifact; raises ArtifactError."""
    return Timings.model_validate(read_json(folder / layout.TIMINGS, ArtifactError))
