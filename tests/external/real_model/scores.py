"""`make eval-real`: GSM8K, HumanEval and MBPP on SmolLM2-135M-Instruct, source and each method.

    PYTHONPATH=tests .venv/bin/python -m external.real_model.scores \\
        [--model FOLDER] [--place FOLDER] [--only METHOD ...] [--limit 200] [--max-tokens 256]

`quantkit eval --source` evaluates each artifact and stores answers as they arrive, so an
interrupted run resumes. Artifacts of `make real-model` in the folder are reused, others are built.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from external.real_model.bench import (
    ONE_THREAD,
    PLACE,
    ROOT,
    build_artifact,
    get_artifact_path,
    prepare_bench,
    print_line,
    print_table,
)
from external.real_model.methods import BUILDS

TASKS = "gsm8k,humaneval,mbpp"


def evaluate_artifact(folder: Path, model: Path, arguments: Sequence[str]) -> dict[str, object]:
    """Return results.json of an artifact and its source; the answers of both stay on disk."""
    output = folder.with_name(f"{folder.name}.eval")
    data = os.environ.get("QUANTKIT_DATA", str(ROOT.parent / "shared" / "data"))
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "quantkit",
            "eval",
            str(folder),
            "--tasks",
            TASKS,
            "--source",
            str(model),
            "--dtype",
            "bfloat16",
            "--device-map",
            "cpu",
            "--batch-size",
            "64",
            "--output",
            str(output),
            "--resume",
            *arguments,
        ],
        env={**os.environ, **ONE_THREAD, "QUANTKIT_DATA": data},
    )
    if process.returncode != 0:
        sys.exit(f"{folder.name}: quantkit eval: exit code {process.returncode}")
    results: dict[str, object] = json.loads((output / "results.json").read_text(encoding="utf-8"))
    return results


def main() -> None:
    """Build missing artifacts, evaluate all, print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=PLACE / "smollm2-135m")
    parser.add_argument("--place", type=Path, default=PLACE)
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="methods, as in the table's first column"
    )
    parser.add_argument("--limit", default="200")
    parser.add_argument("--max-tokens", default="256")
    options = parser.parse_args()
    bench = prepare_bench(options.model, options.place)
    if bench is None:
        return
    rows = []
    for build in (build for build in BUILDS if not options.only or build.name in options.only):
        folder = get_artifact_path(bench, build, measured=True)
        if not (folder / "quantkit" / "manifest.json").is_file():
            print_line(f"{build.name} ...")
            build_artifact(bench, build, measured=True)
        results = evaluate_artifact(
            folder, bench.model, ["--limit", options.limit, "--max-tokens", options.max_tokens]
        )
        for row in results["comparison"]:  # type: ignore[attr-defined]
            delta = row["delta_pp"]
            rows.append([
                f"{build.name}, {row['task']}",
                str(row["n"]),
                f"{100 * row['source']:.1f} %",
                f"{100 * row['artifact']:.1f} %",
                f"{delta['value']:+.1f} [{delta['ci'][0]:+.1f}, {delta['ci'][1]:+.1f}]",
                f"{row['lost']}/{row['gained']}",
                row["verdict"],
            ])
    columns = (
        "method, task",
        "n",
        "source",
        "artifact",
        "Δ pp [95 % CI]",
        "lost/gained",
        "verdict",
    )
    print_table(
        f"SmolLM2-135M-Instruct, greedy, at most {options.max_tokens} tokens", columns, rows
    )


if __name__ == "__main__":
    main()
