"""`make bench-peers`: quantkit, GPTQModel and llm-compressor on SmolLM2-135M-Instruct in one run.

    PYTHONPATH=tests python -m external.real_model.against_peers \\
        GPTQMODEL_PYTHON LLMCOMPRESSOR_PYTHON [--keep] [--mixture] [--place FOLDER]

4 bits, group size 64, lm_head unquantized, the same 16,384 calibration tokens; the tools run one
after the other, each on one core. All artifacts are measured in the same way: unpacked by `unpack`,
run as whole models in float32 (`measure`). `--mixture`: on the mixture of seven kinds of text of
`text_kinds` instead of wikitext-2. `--keep` reuses the peers' artifacts of an earlier run.
The exit code is 1 if a goal is missed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from external.real_model.bench import (
    HERE,
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
    read_cost,
    run_on_one_core,
)
from external.real_model.measure import ModelComparer
from external.real_model.text_kinds import prepare_mixture_bench

from quantkit.numerics.fidelity import Estimate

SYMMETRIC = Build(name="GPTQ sym", recipe="smollm2-135m-gptq4", changes={})
ASYMMETRIC = Build(name="AWQ+GPTQ asym", recipe="smollm2-135m-awq4", changes={})
ONE_STREAM = Build(
    name="AWQ+GPTQ asym, one stream", recipe="smollm2-135m-awq4", changes={"propagate": "quantized"}
)  # as peers calibrate: without the original model's activations
# Better than any peer in a quarter of the fastest peer's time, with a fifth of the peers' text, run
# once.
QUICK = Build(
    name="GPTQ asym, quick, 6 sequences",
    recipe="smollm2-135m-awq4",
    changes={
        "quantize.method": "gptq",
        "quantize.rounding": "gptq_once",
        "propagate": "original",
        "calibration.sequences": "6",
    },
)
BUILDS = (SYMMETRIC, ASYMMETRIC, ONE_STREAM, QUICK)
KL_GOALS = {SYMMETRIC.name: 0.5, ASYMMETRIC.name: 0.4, ONE_STREAM.name: 0.47, QUICK.name: 0.75}
CPU_GOAL = 0.25


@dataclass(frozen=True, kw_only=True)
class Peer:
    """Another tool: its script, the arguments before the model, and the build it is compared
    with.
    """

    name: str
    python: str
    script: str
    arguments: tuple[str, ...]
    rival: Build
    environment: Mapping[str, str]


@dataclass(frozen=True, kw_only=True)
class Result:
    """An artifact's figures and the cost of building it."""

    name: str
    figures: Mapping[str, Estimate]
    cost: Cost
    n_bytes: int


def list_peers(gptqmodel: str, llmcompressor: str) -> tuple[Peer, ...]:
    """Return all peers, each with its own environment."""
    two_workers = {
        "GPTQMODEL_CPU_WORKERS": "2"
    }  # its default counts cores that the pinned process cannot use
    compressor = {"python": llmcompressor, "script": "run_llmcompressor.py", "environment": {}}
    return (
        Peer(
            name="GPTQModel GPTQ sym",
            python=gptqmodel,
            script="run_gptqmodel.py",
            arguments=(),
            rival=SYMMETRIC,
            environment=two_workers,
        ),
        Peer(name="llm-compressor GPTQ sym", arguments=("gptq",), rival=SYMMETRIC, **compressor),
        Peer(name="llm-compressor AWQ asym", arguments=("awq",), rival=ASYMMETRIC, **compressor),
    )


def run_peer(bench: Bench, peer: Peer, keep: bool) -> tuple[Path, Cost]:
    """Run a peer. Return its artifact and cost; with `keep`, those of an earlier run."""
    folder = bench.place / peer.name.replace(" ", "-")
    cost = folder.with_suffix(".json")
    if not (keep and cost.is_file() and folder.is_dir()):
        shutil.rmtree(folder, ignore_errors=True)
        script = str(HERE / "peers" / peer.script)
        paths = map(str, (bench.model, bench.tokens, folder, cost))
        run_on_one_core(
            [peer.python, script, *peer.arguments, *paths], bench.place, peer.environment
        )
    return folder, read_cost(cost)


def collect_results(bench: Bench, others: tuple[Peer, ...], keep: bool) -> list[Result]:
    """Return all results, quantkit's first.

    All artifacts are built before any is measured, so that no build shares the machine with a
    measurement.
    """
    artifacts = []
    for build in BUILDS:
        print_line(f"quantkit {build.name} ...")
        cost = build_artifact(bench, build, measured=False)
        artifacts.append((build.name, get_artifact_path(bench, build, measured=False), cost))
    for peer in others:
        print_line(f"{peer.name} ...")
        artifacts.append((peer.name, *run_peer(bench, peer, keep)))
    comparer = ModelComparer(bench.model, bench.load_text())
    results = []
    for name, folder, cost in artifacts:
        print_line(f"measuring {name} ...")
        results.append(
            Result(
                name=name,
                figures=compute_figures(comparer, folder),
                cost=cost,
                n_bytes=count_weight_bytes(folder),
            )
        )
    return results


def compute_figures(comparer: ModelComparer, folder: Path) -> Mapping[str, Estimate]:
    """Return the figures of an artifact; reuse stored figures of the same bytes and text."""
    path, key = folder.with_suffix(".figures.json"), [hash_weights(folder), comparer.text_hash]
    if path.is_file():
        stored = json.loads(path.read_text(encoding="utf-8"))
        if stored["of"] == key:
            return {name: Estimate(**values) for name, values in stored["figures"].items()}
    figures = comparer.compute_figures(folder)
    values = {name: dataclasses.asdict(estimate) for name, estimate in figures.items()}
    path.write_text(json.dumps({"of": key, "figures": values}) + "\n", encoding="utf-8")
    return figures


def format_row(result: Result) -> list[str]:
    """Format a row of the first table."""
    kl, ratio, top = (result.figures[name] for name in ("kl_mean", "ppl_ratio", "top1"))
    return [
        result.name,
        f"{kl.value:.4f} ±{kl.error or 0:.4f}",
        f"{ratio.value:.4f}",
        f"{100 * top.value:.1f} %",
        f"{result.cost.cpu_s:.1f}",
        f"{result.cost.peak_rss / 1e6:.0f}",
        f"{result.n_bytes:,}",
    ]


def print_kinds(results: list[Result]) -> None:
    """Print the mean KL of each kind of text."""
    keys = [key for key in results[0].figures if key.startswith("kl_mean@")]
    rows = [
        [result.name, *(f"{result.figures[key].value:.3f}" for key in keys)] for result in results
    ]
    print_table("mean KL", ("tool", *(key.partition("@")[2] for key in keys)), rows)


def compare_with_peers(
    results: list[Result], others: tuple[Peer, ...]
) -> tuple[list[list[str]], bool]:
    """Return the rows of the second table, quantkit / peer, and whether every goal is reached."""
    by_name = {result.name: result for result in results}
    theirs = [by_name[peer.name].cost for peer in others]
    fastest, leanest = min(cost.cpu_s for cost in theirs), min(cost.peak_rss for cost in theirs)
    rows, reached = [], True
    for build in BUILDS:
        ours = by_name[build.name]
        rivals = [
            by_name[peer.name].figures["kl_mean"].value
            for peer in others
            if peer.rival.recipe == build.recipe
        ]
        kl = ours.figures["kl_mean"].value / min(rivals)
        cpu, memory = ours.cost.cpu_s / fastest, ours.cost.peak_rss / leanest
        reached &= kl <= KL_GOALS[build.name] and cpu <= CPU_GOAL and memory < 1
        goals = f"KL <= {KL_GOALS[build.name]}, CPU <= {CPU_GOAL}, memory < 1"
        rows.append([build.name, f"{kl:.3f}", f"{cpu:.3f}", f"{memory:.3f}", goals])
    return rows, reached


def main() -> None:
    """Build all artifacts, measure them, print both tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("gptqmodel", type=os.path.abspath, help="a Python that has GPTQModel")
    parser.add_argument(
        "llmcompressor", type=os.path.abspath, help="a Python that has llm-compressor"
    )
    parser.add_argument("--model", type=Path, default=PLACE / "smollm2-135m")
    parser.add_argument("--place", type=Path, default=PLACE)
    parser.add_argument(
        "--keep", action="store_true", help="reuse the peers' artifacts and costs of an earlier run"
    )
    parser.add_argument(
        "--mixture",
        action="store_true",
        help="calibrate all tools on the mixture of text_kinds, and measure each of its kinds",
    )
    options = parser.parse_args()
    prepare = prepare_mixture_bench if options.mixture else prepare_bench
    bench = prepare(options.model, options.place)
    if bench is None:
        return
    others = list_peers(options.gptqmodel, options.llmcompressor)
    results = collect_results(bench, others, options.keep)
    columns = ("tool", "mean KL [nats]", "ppl ratio", "top-1", "CPU s", "peak MB", "weight bytes")
    print_table(
        "SmolLM2-135M-Instruct, 4 bits, groups of 64; "
        f"{'seven kinds of text' if options.mixture else f'wikitext-2 {bench.sets.form}'}",
        columns,
        list(map(format_row, results)),
    )
    if options.mixture:
        print_kinds(results)
    rows, reached = compare_with_peers(results, others)
    print_table(
        "quantkit / best peer: KL relative to the best with the same kind of codes, CPU to the "
        "fastest, memory to the smallest",
        ("quantkit", "KL", "CPU", "memory", "goals"),
        rows,
    )
    raise SystemExit(0 if reached else 1)


if __name__ == "__main__":
    main()
