"""Measurements that tests of methods share."""

from __future__ import annotations

import torch


def peak_bytes(work: object) -> int:
    """Largest sum of bytes that torch held at once while `work` ran, beyond what it held before."""
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
