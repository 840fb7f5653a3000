"""How far a long step is, as builds, benchmarks and transfers tell it and the command line shows it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a long step is: `done` of `total` units of `stage`."""

    stage: str
    done: float
    total: float
    note: str = ""


ProgressCallback = Callable[[Progress], None]
"""Who hears of it."""
