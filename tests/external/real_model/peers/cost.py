"""CPU seconds and peak memory of what a tool does between loading a model and the last byte written.

For every tool the same, quantkit too; nothing is imported but the standard library.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def measure_cost(report: Path) -> Iterator[None]:
    """Write what the body cost to a JSON file; `process_cpu_s` also has what came before it, imports for the most."""
    before, began = read_cpu_seconds(), time.monotonic()
    yield
    after = read_cpu_seconds()
    found = {
        "cpu_s": after - before,
        "process_cpu_s": after,
        "wall_s": time.monotonic() - began,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    report.write_text(json.dumps(found) + "\n", encoding="utf-8")


def read_cpu_seconds() -> float:
    """User and system time of this process, all its threads, and the children it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(each.ru_utime + each.ru_stime for each in used)
