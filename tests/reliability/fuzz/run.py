"""Fuzzing of one parser with atheris, in a process with limited memory.

    python -m reliability.fuzz.run NAME INPUTS SEED RESULT

libFuzzer keeps inputs that reach new lines of quantkit and mutates them further; two of three
mutations are those of `mutate`. An input that exceeds the time limit or crashes the process ends
it. Other failures are recorded and fuzzing continues. RESULT is a JSON file with the counts and
tracebacks.
"""

from __future__ import annotations

import json
import random
import resource
import sys
import tempfile
import time
import traceback
from pathlib import Path

import atheris
from reliability.fuzz import targets

SECONDS = 240
"""Limit per input on the clock; the slowest input takes one second on an idle machine. A template
that loops takes two seconds of processor time, and a busy machine gives a tenth of them.
"""
RESULT_INPUTS = 5_000
"""Inputs after which the counts so far are written."""

MEMORY_BYTES = 1_500_000_000
"""Limit in addition to the memory of the imports."""

MAX_TRACEBACKS = 5


class FuzzRun:
    """Counts and failures of one parser."""

    def __init__(self, target: targets.Target, n_inputs: int, result: Path, folder: Path) -> None:
        self.target, self.n_inputs, self.result, self.folder = target, n_inputs, result, folder
        self.tried = self.accepted = self.rejected = self.n_tracebacks = 0
        self.tracebacks: list[str] = []
        self.slowest = 0.0

    def run_input(self, data: bytes) -> None:
        """Run one input; libFuzzer's callback."""
        start = time.perf_counter()
        try:
            message = targets.run_target(self.target, self.folder, data)
            self.accepted += message is None
            self.rejected += message is not None
        except Exception:  # noqa: BLE001  # any other exception is a defect
            self.n_tracebacks += 1
            if len(self.tracebacks) < MAX_TRACEBACKS:
                self.tracebacks.append(f"{data[:2000]!r}\n{traceback.format_exc()[-2000:]}")
        self.slowest = max(self.slowest, time.perf_counter() - start)
        self.tried += 1
        if self.tried == self.n_inputs or self.tried % RESULT_INPUTS == 0:
            self.write_result()

    def write_result(self) -> None:
        """Write the counts so far."""
        counts = {
            name: getattr(self, name)
            for name in ("tried", "accepted", "rejected", "n_tracebacks", "tracebacks")
        }
        counts |= {
            "slowest_seconds": self.slowest,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        }
        self.result.write_text(json.dumps({"parser": self.target.name, **counts}))

    def mutate(self, data: bytes, max_size: int, seed: int) -> bytes:
        """Mutate an input: libFuzzer's mutation, ours, or ours of a seed, so that inputs stay near
        valid.
        """
        rng = random.Random(seed)
        kind = rng.randrange(3)
        if kind == 0:
            return bytes(atheris.Mutate(data, max_size))
        base = data if kind == 1 else rng.choice(self.target.seeds)
        return self.target.mutate(base, rng)[:max_size]


def read_address_space() -> int:
    """Return the bytes mapped by this process."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(name: str, n_inputs: int, seed: int, result: str) -> None:
    """Fuzz one parser; ends the process."""
    target = targets.TARGETS[name]
    folder = Path(tempfile.mkdtemp())
    corpus = Path(tempfile.mkdtemp())
    targets.prepare_folder(target, folder)
    with atheris.instrument_imports(include=["quantkit"]):  # targets import when they run
        for number, data in enumerate(target.seeds):
            (corpus / str(number)).write_bytes(data)
            targets.run_target(target, folder, data)
    fuzz_run = FuzzRun(target, n_inputs, Path(result), folder)
    limit = read_address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    longest = 4 * max(map(len, target.seeds)) + 8000
    options = [
        f"-runs={n_inputs + 100}",
        f"-seed={seed}",
        f"-timeout={SECONDS}",
        f"-max_len={longest}",
        "-verbosity=0",
    ]
    options.append(f"-artifact_prefix={folder}/")
    atheris.Setup(
        [sys.argv[0], *options, str(corpus)], fuzz_run.run_input, custom_mutator=fuzz_run.mutate
    )
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
