"""Progress of a long step, reported by builds, benchmarks and transfers to the command line."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`done` of `total` units of `stage`, with an optional note."""

    stage: str
    done: float
    total: float
    note: str = ""


ProgressCallback = Callable[[Progress], None]
"""Receives every `Progress` of a step."""
