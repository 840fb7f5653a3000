"""Command line: write the sets that are files, and their specs."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import click
from tools.calibration_sets import specs, tiny_v3

Row = tuple[str, str]

SETS: dict[str, tuple[specs.SetText, Callable[[], list[Row]]]] = {
    "tiny-v3": (specs.TINY, tiny_v3.make_calibration_rows),
    "tiny-v3-heldout": (specs.TINY_HELD_OUT, tiny_v3.make_held_out_rows),
}


def to_jsonl(rows: Sequence[Row]) -> bytes:
    """Return one JSON object per line, UTF-8."""
    lines = [
        json.dumps({"domain": domain, "text": text}, ensure_ascii=False) + "\n"
        for domain, text in rows
    ]
    return "".join(lines).encode("utf-8")


def make_set(name: str) -> tuple[bytes, str]:
    """Return the data file of a set and its spec."""
    text, make_rows = SETS[name]
    rows = make_rows()
    data = to_jsonl(rows)
    return data, specs.format_spec(
        text, hashlib.sha256(data).hexdigest(), {domain for domain, _ in rows}
    )


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Output folder.",
)
@click.option("--only", type=click.Choice(list(SETS)), multiple=True, help="Make these sets only.")
def main(out: Path, only: tuple[str, ...]) -> None:
    """Write the calibration and fidelity sets that quantkit ships.

    Example: PYTHONPATH=tests python -m tools.calibration_sets --out calibration
    """
    out.mkdir(parents=True, exist_ok=True)
    for name in only or SETS:
        data, spec = make_set(name)
        (out / f"{name}.jsonl").write_bytes(data)
        (out / f"{name}.yaml").write_text(spec, encoding="utf-8", newline="\n")
        click.echo(f"{out / name}.jsonl: {len(data):,} bytes")


if __name__ == "__main__":
    main()
