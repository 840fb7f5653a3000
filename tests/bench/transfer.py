"""`make bench-transfer`: time of `quantkit publish` and `pull` in a folder, relative to `cp -r`.

    PYTHONPATH=tests .venv/bin/python -m bench.transfer [--bytes N] [--rounds N] [--folder DIR]

The artifact has about 1 GB. publish reads every byte twice (verify, send); pull hashes the bytes
that arrive and verifies them. Both write each byte once and wait until it is on disk, like `cp -r`
with `sync`. The commands alternate; the fastest round counts.
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
    """Return the wall time and the CPU time of a command."""
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, check=True, capture_output=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_seconds = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return time.perf_counter() - start, cpu_seconds


def run_round(place: Path) -> dict[str, tuple[float, float]]:
    """Time each command once; each copies the artifact to a new folder."""
    artifact, remote = place / "artifact", place / "remote"
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
        "publish": [*QUANTKIT, "publish", "--force", str(artifact), str(remote)],
        "publish again": [*QUANTKIT, "publish", "--force", str(artifact), str(remote)],
        "pull": [*QUANTKIT, "pull", str(remote), str(place / "pulled")],
    }
    subprocess.run(["sync"], check=True)
    times = {name: time_command(command) for name, command in commands.items()}
    for name in ("cp", "sync", "remote", "pulled"):
        shutil.rmtree(place / name)
    return times


def main() -> None:
    """Write the artifact, time the commands, and print the ratios."""
    options = parse_options(__doc__)
    place = Path(tempfile.mkdtemp(prefix="bench-transfer-", dir=options.folder))
    try:
        write_artifact(place / "artifact", "awq", int(options.bytes))
        n_bytes = sum(
            path.stat().st_size for path in (place / "artifact").rglob("*") if path.is_file()
        )
        rounds = [run_round(place) for _ in range(options.rounds)]
        best = {name: min(times[name] for times in rounds) for name in rounds[0]}
        print(f"{n_bytes / 1e9:.2f} GB in one folder")
        for name, (wall, cpu) in best.items():
            rate, ratio, synced = (
                n_bytes / wall / 1e6,
                wall / best["cp"][0],
                wall / best["cp and sync"][0],
            )
            print(
                f"    {name:14} {wall:6.2f} s ({cpu:.2f} s of a core), {rate:5.0f} MB/s: ",
                end="",
            )
            print(f"{ratio:.2f} x cp, {synced:.2f} x cp and sync")
    finally:
        shutil.rmtree(place)


if __name__ == "__main__":
    main()
