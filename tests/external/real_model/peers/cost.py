"""CPU seconds and peak memory of a tool from the loaded model to the last byte written.

The same for every tool, including quantkit; imports only the standard library.
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
    """Write the cost of the body to a JSON file; `process_cpu_s` includes the time before it
    (imports).
    """
    before, start = read_cpu_seconds(), time.monotonic()
    yield
    after = read_cpu_seconds()
    cost = {
        "cpu_s": after - before,
        "process_cpu_s": after,
        "wall_s": time.monotonic() - start,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }
    report.write_text(json.dumps(cost) + "\n", encoding="utf-8")


def read_cpu_seconds() -> float:
    """Return user and system time of this process, its threads and its finished children."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    usages = [resource.getrusage(kind) for kind in kinds]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)
