"""One parser under atheris: `python -m reliability.fuzz.run NAME INPUTS SEED RESULT`, in a process that may use so much memory.

libFuzzer keeps what reaches new lines of quantkit and changes it further; two of three changes are those of `mutate`.
An input that takes too long ends the process, and so does one that kills it; any other that is not answered as it
should be is noted, and the next is tried. RESULT is a JSON file of what was tried.
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

SECONDS = 30
"""Per input; the slowest takes one where nothing else runs."""

MEMORY_BYTES = 1_500_000_000
"""Beyond what the imports take."""

SHOWN = 5


class FuzzRun:
    """Counts and failures of one parser."""

    def __init__(self, chosen: targets.Target, wanted: int, result: Path, folder: Path) -> None:
        self.chosen, self.wanted, self.result, self.folder = chosen, wanted, result, folder
        self.tried = self.accepted = self.refused = self.n_tracebacks = 0
        self.tracebacks: list[str] = []
        self.slowest = 0.0

    def one(self, data: bytes) -> None:
        """libFuzzer's callback."""
        began = time.perf_counter()
        try:
            told = targets.run_target(self.chosen, self.folder, data)
            self.accepted += told is None
            self.refused += told is not None
        except Exception:  # noqa: BLE001  # whatever it is, it is what the run looks for
            self.n_tracebacks += 1
            if len(self.tracebacks) < SHOWN:
                self.tracebacks.append(f"{data[:2000]!r}\n{traceback.format_exc()[-2000:]}")
        self.slowest = max(self.slowest, time.perf_counter() - began)
        self.tried += 1
        if self.tried == self.wanted:
            self.write()

    def write(self) -> None:
        """What was tried so far."""
        told = {
            name: getattr(self, name)
            for name in ("tried", "accepted", "refused", "n_tracebacks", "tracebacks")
        }
        told |= {
            "slowest_seconds": self.slowest,
            "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss << 10,
        }
        self.result.write_text(json.dumps({"parser": self.chosen.name, **told}))

    def mutated(self, data: bytes, most: int, seed: int) -> bytes:
        """libFuzzer's mutator: its own, ours, or ours from a good input, without which all would drift into rubbish."""
        rng = random.Random(seed)
        kind = rng.randrange(3)
        if kind == 0:
            return bytes(atheris.Mutate(data, most))
        return self.chosen.mutate(data if kind == 1 else rng.choice(self.chosen.seeds), rng)[:most]


def read_address_space() -> int:
    """Bytes that this process has mapped."""
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()


def main(name: str, wanted: int, seed: int, result: str) -> None:
    """Fuzz; ends the process."""
    chosen = targets.TARGETS[name]
    folder = Path(tempfile.mkdtemp())
    corpus = Path(tempfile.mkdtemp())
    targets.prepare_folder(chosen, folder)
    with atheris.instrument_imports(include=["quantkit"]):  # which a target does when it is run
        for number, data in enumerate(chosen.seeds):
            (corpus / str(number)).write_bytes(data)
            targets.run_target(chosen, folder, data)
    fuzzed = FuzzRun(chosen, wanted, Path(result), folder)
    limit = read_address_space() + MEMORY_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    longest = 4 * max(map(len, chosen.seeds)) + 8000
    options = [
        f"-runs={wanted + 100}",
        f"-seed={seed}",
        f"-timeout={SECONDS}",
        f"-max_len={longest}",
        "-verbosity=0",
    ]
    options.append(f"-artifact_prefix={folder}/")
    atheris.Setup([sys.argv[0], *options, str(corpus)], fuzzed.one, custom_mutator=fuzzed.mutated)
    atheris.Fuzz()


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
