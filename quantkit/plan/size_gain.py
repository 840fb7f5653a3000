"""Whether an artifact is smaller than its source, for plan and report."""

from __future__ import annotations

SMALL_GAIN = 0.9
"""Share of the source's bytes above which plan and report warn."""


def describe_small_gain(before: int, after: int) -> str:
    """Return a sentence if an artifact has more than SMALL_GAIN of its source's bytes, or ""."""
    if after <= SMALL_GAIN * before:
        return ""
    return (
        f"the artifact has {after / before:.0%} of the source's size; quantize more modules, or "
        "choose a format that keeps the others as the source stores them"
    )
