"""`make real-model`: loss and cost of each method on SmolLM2-135M-Instruct, 4 bits, group size 64.

    PYTHONPATH=tests .venv/bin/python -m external.real_model.methods \\
        [--model FOLDER] [--place FOLDER] [--only METHOD ...]

Each method is built twice: with its recipe, for the figures of the report, and with `fidelity:
none`, for the cost of quantization alone; both builds must write identical weights. Methods without
calibration are compared with `cp`.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import time
from pathlib import Path

from external.real_model.bench import (
    PLACE,
    Bench,
    Build,
    Cost,
    build_artifact,
    count_weight_bytes,
    get_artifact_path,
    hash_weights,
    prepare_bench,
    print_line,
    print_table,
)

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.read_report import read_report

NO_TEXT = {"calibration": "null"}
RTN = {"quantize.method": "rtn", "quantize.rounding": "nearest", **NO_TEXT}
BUILDS = (
    Build(name="RTN sym", recipe="smollm2-135m-gptq4", changes=RTN),
    Build(name="RTN asym", recipe="smollm2-135m-awq4", changes=RTN),
    Build(name="GPTQ sym", recipe="smollm2-135m-gptq4", changes={}),
    Build(name="AWQ", recipe="smollm2-135m-awq4", changes={"quantize.rounding": "nearest"}),
    Build(name="AWQ+GPTQ", recipe="smollm2-135m-awq4", changes={}),
    Build(
        name="NF4", recipe="smollm2-135m-nf4", changes={"quantize.double_quant": "false", **NO_TEXT}
    ),
    Build(name="NF4 double", recipe="smollm2-135m-nf4", changes=NO_TEXT),
)
REPEATS = 5


def build_twice(bench: Bench, build: Build) -> tuple[Fidelity, Cost]:
    """Return the report of a measured build and the cost of an unmeasured one.

    Raises SystemExit if their weights differ.
    """
    cost = build_artifact(bench, build, measured=False)
    build_artifact(bench, build, measured=True)
    digests = {
        hash_weights(get_artifact_path(bench, build, measured=measured))
        for measured in (False, True)
    }
    if len(digests) != 1:
        raise SystemExit(
            f"{build.name}: expected equal weights with and without fidelity, found different ones"
        )
    return read_report(get_artifact_path(bench, build, measured=True)), cost


def time_copy(source: Path, folder: Path) -> Cost:
    """Time `cat` of the source's weights and `cp` of the artifact's; the fastest of several
    runs.
    """
    scratch = folder.with_name(f"{folder.name}.copy")
    scratch.mkdir(exist_ok=True)
    command = (
        f"cat {source}/*.safetensors > /dev/null; cp {folder}/*.safetensors {scratch}/; sync "
        f"{scratch}/*"
    )
    times = []
    for _ in range(REPEATS):
        start, before = time.monotonic(), read_children_cpu()
        subprocess.run(["sh", "-c", command], check=True)
        times.append((time.monotonic() - start, read_children_cpu() - before))
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    return Cost(
        cpu_s=min(cpu for _, cpu in times), wall_s=min(wall for wall, _ in times), peak_rss=0
    )


def read_children_cpu() -> float:
    """Return user and system seconds of finished child processes."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def format_row(build: Build, report: Fidelity, cost: Cost, n_bytes: int) -> list[str]:
    """Format a row of the first table."""
    pooled = report.distribution[0]
    kl, ratio, top = pooled.kl_mean, pooled.ppl_ratio, pooled.top1
    if not (kl and ratio and top) or kl.value is None or ratio.value is None or top.value is None:
        raise SystemExit(f"{build.name}: expected figures in the report, found none")
    return [
        build.name,
        f"{report.artifact.bits_per_weight:.2f}",
        f"{kl.value:.4f} ±{kl.se:.4f}",
        f"{ratio.value:.4f}",
        f"{100 * top.value:.1f} %",
        f"{cost.cpu_s:.1f}",
        f"{cost.peak_rss / 1e6:.0f}",
        f"{n_bytes:,}",
    ]


def main() -> None:
    """Build and measure each method, print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=PLACE / "smollm2-135m")
    parser.add_argument("--place", type=Path, default=PLACE)
    parser.add_argument(
        "--only", nargs="+", metavar="METHOD", help="methods, as in the table's first column"
    )
    options = parser.parse_args()
    bench = prepare_bench(options.model, options.place)
    if bench is None:
        return
    rows, copies, costs = [], dict[str, Cost](), dict[str, Cost]()
    for build in (build for build in BUILDS if not options.only or build.name in options.only):
        print_line(f"{build.name} ...")
        report, costs[build.name] = build_twice(bench, build)
        folder = get_artifact_path(bench, build, measured=True)
        rows.append(format_row(build, report, costs[build.name], count_weight_bytes(folder)))
        if not build.is_calibrated:
            copies[build.name] = time_copy(bench.model, folder)
    print_line(
        f"source: {count_weight_bytes(options.model):,} bytes of weights; test text: wikitext-2, "
        f"{bench.sets.form}"
    )
    columns = (
        "method",
        "bits/weight",
        "mean KL [nats]",
        "ppl ratio",
        "top-1",
        "CPU s",
        "peak MB",
        "weight bytes",
    )
    print_table("SmolLM2-135M-Instruct, 4 bits, groups of 64, one core", columns, rows)
    print_table(
        "Without calibration, relative to reading the source and writing the artifact with cp",
        ("method", "CPU s", "wall s", "cp CPU s", "cp wall s", "CPU ratio", "wall ratio"),
        [format_copy_row(name, costs[name], copy) for name, copy in copies.items()],
    )


def format_copy_row(name: str, cost: Cost, copy: Cost) -> list[str]:
    """Format a row of the second table."""
    seconds = [f"{value:.2f}" for value in (cost.cpu_s, cost.wall_s, copy.cpu_s, copy.wall_s)]
    return [name, *seconds, f"{cost.cpu_s / copy.cpu_s:.1f}", f"{cost.wall_s / copy.wall_s:.1f}"]


if __name__ == "__main__":
    main()
