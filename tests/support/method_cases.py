"""Measurements that tests of methods share."""

from __future__ import annotations

import torch


def peak_bytes(work: object) -> int:
    """Return the peak of bytes that torch allocated while `work` ran, beyond the start."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True
    ) as profile:
        work()  # type: ignore[operator]
    held = peak = 0
    for event in sorted(
        (e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"),
        key=lambda e: e.start_ns(),
    ):
        held += event.nbytes()
        peak = max(peak, held)
    return peak
