"""`make bench-likelihood`: correlation of gold-solution likelihood with generated scores.

    export PYTHONPATH=tests
    python -m bench.likelihood                    # tiny-v3: methods and bit widths, minutes
    python -m bench.likelihood --smollm2 FOLDER   # SmolLM2-135M-Instruct, an hour
    python -m bench.likelihood --recipe FILE --task gsm8k --task humaneval --limit 64

Each artifact stores dequantized weights, so all bit widths are measured in the same way. For each
task the benchmark prints the mean log-likelihood per token of the gold solutions, the generated
score, the KL, and, over the artifacts, Spearman's and Pearson's correlation of the changes in
likelihood and in KL with the change in score.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

import scipy.stats
from external.real_model import easy

from quantkit import pipeline
from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.io import package_data
from quantkit.plan.plan import Plan
from quantkit.progress import Progress
from quantkit.recipe.parse import parse_recipe

METHODS = {
    "rtn": ("rtn", "nearest"),
    "awq": ("awq", "nearest"),
    "gptq": ("gptq", "gptq"),
    "awq+gptq": ("awq", "gptq"),
}
BITS = (2, 3, 4)
SMOLLM2 = {
    "calibration.sequences": "32",
    "fidelity.windows": "16",
    "memory": "6GB",
}  # five minutes per artifact


def ignore(_: Progress | list[Plan]) -> None:
    """Ignore plans and progress."""


def build_artifact(
    text: str,
    place: Path,
    method: str,
    bits: int,
    tasks: Sequence[str],
    options: argparse.Namespace,
) -> Fidelity:
    """Quantize all linears, run the benchmarks, and return the report."""
    name, rounding = METHODS[method]
    keys = {
        "quantize.method": name,
        "quantize.rounding": rounding,
        "quantize.bits": str(bits),
        "format": "dense",
        "rules": "all-linear",
        "gates": "{}",
        "evaluation.tasks": json.dumps([*tasks]),
        "output.path": str(place / f"{method}-{bits}"),
        **dict(pair.split("=", 1) for pair in options.set),
    }
    if options.limit:
        keys["evaluation.limit"] = str(options.limit)
    recipe = parse_recipe(text, options.recipe.name, keys)
    (outcome,) = pipeline.build_artifacts(
        recipe, text, overwrite=True, evaluate=True, on_plan=ignore, on_progress=ignore
    )
    return outcome.fidelity


def format_scores(report: Fidelity) -> str:
    """Format the KL and the scores of one artifact."""
    pooled = report.distribution[0].kl_mean
    scores = [
        f"{row.task} {100 * (row.artifact or 0):.1f} % of {100 * (row.source or 0):.1f} %"
        for row in report.benchmarks
    ]
    return ", ".join([f"KL {pooled.value:.5f}" if pooled and pooled.value else "no KL", *scores])


def format_task(reports: dict[str, Fidelity], task: str) -> str:
    """Format one task as a Markdown table, followed by the correlations with its score."""
    lines = [
        f"\n{task}\n",
        "| artifact | KL | gold, nats/token | change | score | change, pp |",
        "|---|---|---|---|---|---|",
    ]
    likely, kl, scores = list[float](), list[float](), list[float]()
    for name, report in reports.items():
        gold = next(row for row in report.likelihood if row.task == task)
        row = next(row for row in report.benchmarks if row.task == task)
        pooled = report.distribution[0].kl_mean
        if gold.difference is None or row.delta_pp is None or pooled is None:
            lines.append(f"| {name} | | {gold.reason} | | {row.reason} | |")
            continue
        likely.append(gold.difference.value or 0.0)
        scores.append(row.delta_pp.value or 0.0)
        kl.append(pooled.value or 0.0)
        lines.append(
            f"| {name} | {kl[-1]:.5f} | {gold.artifact:.5f} | {likely[-1]:+.5f} | "
            f"{100 * (row.artifact or 0):.1f} % | {scores[-1]:+.1f} |"
        )
    lines.append("")
    if len(set(scores)) > 1:
        for name, values in (("gold", likely), ("minus KL", [-value for value in kl])):
            rank, line = scipy.stats.spearmanr(values, scores), scipy.stats.pearsonr(values, scores)
            words = (
                f"{name} against score over {len(scores)} artifacts: Spearman {rank.statistic:.2f} "
            )
            lines.append(
                f"{words}(p {rank.pvalue:.3g}), Pearson {line.statistic:.2f} (p {line.pvalue:.3g})"
            )
    return "\n".join(lines)


def main() -> None:
    """Build every artifact, measure it, and print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipe", type=Path, default=package_data.locate_folder("recipes") / "tiny-v3-awq4.yaml"
    )
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--method", action="append", choices=METHODS, default=[])
    parser.add_argument("--bits", action="append", type=int, default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--smollm2", type=Path, metavar="FOLDER", help="the model that `make real-model` writes"
    )
    options = parser.parse_args()
    if options.smollm2:
        options.recipe = package_data.locate_folder("recipes") / "smollm2-135m-awq4.yaml"
        changes = {"source.model": str(options.smollm2.resolve()), **SMOLLM2}
        options.set = [*(f"{key}={value}" for key, value in changes.items()), *options.set]
    text = options.recipe.read_text(encoding="utf-8")
    reports = dict[str, Fidelity]()
    with tempfile.TemporaryDirectory(prefix="bench-likelihood-") as folder:
        place = Path(folder)
        tasks = options.task or (
            easy.write_tasks(place) if options.smollm2 else ["tiny-v3-math", "tiny-v3-code"]
        )
        for bits in options.bits or BITS:
            for method in options.method or METHODS:
                name = f"{method} {bits} bits"
                reports[name] = build_artifact(text, place, method, bits, tasks, options)
                print(f"{name}: {format_scores(reports[name])}", flush=True)
    for task in tasks:
        print(format_task(reports, Path(task).stem))


if __name__ == "__main__":
    main()
