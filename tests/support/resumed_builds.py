"""Small builds that are interrupted and resumed: recipe keys, and comparison of their files."""

from __future__ import annotations

from pathlib import Path

SYMMETRIC = "{method: awq, rounding: gptq, bits: 4, group_size: 64, symmetric: true}"
SMALL = {
    "calibration": "{set: tiny-v3, sequences: 12, length: 64, min_expert_tokens: 8}",
    "fidelity": "{set: tiny-v3-heldout, windows: 4, length: 64, yardstick: rtn}",
    "output": "{path: x, shard_bytes: 200kB}",
}


def read_files(place: Path) -> dict[str, bytes]:
    """Read every file below a folder, except timings and the log."""
    files = {
        path.relative_to(place).as_posix(): path.read_bytes()
        for path in place.rglob("*")
        if path.is_file()
    }
    return {
        name: content
        for name, content in files.items()
        if not name.endswith(("quantkit/timings.json", ".build.log"))
    }


def list_differences(one: dict[str, bytes], other: dict[str, bytes]) -> list[str]:
    """Return the names of files that differ."""
    return sorted(name for name in one.keys() | other.keys() if one.get(name) != other.get(name))
