"""How long `quantkit publish` to a folder and `quantkit pull` from it take against `cp -r`: an artifact of about 1 GB.

    PYTHONPATH=tests .venv/bin/python -m bench.transfer [--bytes N] [--rounds N] [--folder DIR]

publish reads every byte twice (verify, send), pull hashes what arrives and verifies it; both write each byte once and
wait until it is on the disk, as `cp -r` with `sync` does. The best of the rounds, which take turns.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.verify import parse_options, write_artifact

QUANTKIT = [sys.executable, "-m", "quantkit"]


def time_command(command: list[str]) -> tuple[float, float]:
    """Wall time of a command, and what it computed."""
    begun, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    computed = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - begun, computed


def run_round(place: Path) -> dict[str, tuple[float, float]]:
    """One round: each copies the artifact to a place that is not there yet."""
    artifact, there = place / "artifact", place / "there"
    commands = {
        "cp": ["cp", "-r", str(artifact), str(place / "cp")],
        "cp and sync": [
            "sh",
            "-c",
            'cp -r "$0" "$1" && sync -f "$1"',
            str(artifact),
            str(place / "sync"),
        ],
        "verify": [*QUANTKIT, "verify", str(artifact)],
        "publish": [*QUANTKIT, "publish", "--force", str(artifact), str(there)],
        "publish again": [*QUANTKIT, "publish", "--force", str(artifact), str(there)],
        "pull": [*QUANTKIT, "pull", str(there), str(place / "got")],
    }
    subprocess.run(["sync"], check=True)
    found = {name: time_command(command) for name, command in commands.items()}
    for name in ("cp", "sync", "there", "got"):
        shutil.rmtree(place / name)
    return found


def main() -> None:
    """Write, measure, print."""
    chosen = parse_options(__doc__)
    place = Path(tempfile.mkdtemp(prefix="bench-transfer-", dir=chosen.folder))
    try:
        write_artifact(place / "artifact", "awq", int(chosen.bytes))
        n_bytes = sum(
            path.stat().st_size for path in (place / "artifact").rglob("*") if path.is_file()
        )
        rounds = [run_round(place) for _ in range(chosen.rounds)]
        best = {name: min(found[name] for found in rounds) for name in rounds[0]}
        print(f"{n_bytes / 1e9:.2f} GB in one folder")
        for name, (took, computed) in best.items():
            rate, ratio, synced = (
                n_bytes / took / 1e6,
                took / best["cp"][0],
                took / best["cp and sync"][0],
            )
            print(
                f"    {name:14} {took:6.2f} s ({computed:.2f} s of a core), {rate:5.0f} MB/s: ",
                end="",
            )
            print(f"{ratio:.2f} x cp, {synced:.2f} x cp and sync")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
