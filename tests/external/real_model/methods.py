"""`make real-model`: SmolLM2-135M-Instruct by each method, 4 bits, groups of 64, what it loses and what it costs.

    PYTHONPATH=tests .venv/bin/python -m external.real_model.methods [--model FOLDER] [--place FOLDER] [--only METHOD ...]

Each method is built twice: as its recipe says, for the figures of its report, and with `fidelity: none`, for what
quantization alone costs; both must give the same weights, byte by byte. What needs no text is held against `cp`.
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
    """The report of a measured build and the cost of an unmeasured one, once both have the same weights."""
    cost = build_artifact(bench, build, measured=False)
    build_artifact(bench, build, measured=True)
    same = {
        hash_weights(get_artifact_path(bench, build, measured=measured))
        for measured in (False, True)
    }
    if len(same) != 1:
        raise SystemExit(
            f"{build.name}: expected the same weights with and without fidelity, found others"
        )
    return read_report(get_artifact_path(bench, build, measured=True)), cost


def time_copy(source: Path, folder: Path) -> Cost:
    """What `cp` needs to read the source's weights and to write the artifact's: the fastest of a few times."""
    scratch = folder.with_name(f"{folder.name}.copy")
    scratch.mkdir(exist_ok=True)
    command = f"cat {source}/*.safetensors > /dev/null; cp {folder}/*.safetensors {scratch}/; sync {scratch}/*"
    took = []
    for _ in range(REPEATS):
        began, before = time.monotonic(), read_children_cpu()
        subprocess.run(["sh", "-c", command], check=True)
        took.append((time.monotonic() - began, read_children_cpu() - before))
    for file in scratch.iterdir():
        file.unlink()
    scratch.rmdir()
    return Cost(cpu_s=min(cpu for _, cpu in took), wall_s=min(wall for wall, _ in took), peak_rss=0)


def read_children_cpu() -> float:
    """User and system seconds of the children waited for."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def format_row(build: Build, report: Fidelity, cost: Cost, n_bytes: int) -> list[str]:
    """A line of the table."""
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
    """Build, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", type=Path, default=PLACE / "smollm2-135m")
    parser.add_argument("--place", type=Path, default=PLACE)
    parser.add_argument("--only", nargs="+", metavar="METHOD", help="of the table's first column")
    given = parser.parse_args()
    bench = prepare_bench(given.model, given.place)
    if bench is None:
        return
    rows, copies, costs = [], dict[str, Cost](), dict[str, Cost]()
    for build in (build for build in BUILDS if not given.only or build.name in given.only):
        print_line(f"{build.name} ...")
        found, costs[build.name] = build_twice(bench, build)
        folder = get_artifact_path(bench, build, measured=True)
        rows.append(format_row(build, found, costs[build.name], count_weight_bytes(folder)))
        if not build.calibrated:
            copies[build.name] = time_copy(bench.model, folder)
    print_line(
        f"source: {count_weight_bytes(given.model):,} bytes of weights; test text: wikitext-2, {bench.sets.form}"
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
        "Without text, against reading the source and writing the artifact with cp",
        ("method", "CPU s", "wall s", "cp CPU s", "cp wall s", "CPU ratio", "wall ratio"),
        [format_copy_row(name, costs[name], copy) for name, copy in copies.items()],
    )


def format_copy_row(name: str, cost: Cost, copy: Cost) -> list[str]:
    """A line of the second table."""
    seconds = [f"{value:.2f}" for value in (cost.cpu_s, cost.wall_s, copy.cpu_s, copy.wall_s)]
    return [name, *seconds, f"{cost.cpu_s / copy.cpu_s:.1f}", f"{cost.wall_s / copy.wall_s:.1f}"]


if __name__ == "__main__":
    main()
