"""How well the likelihood of gold solutions tells what generated answers lose: several artifacts of one model.

    PYTHONPATH=tests .venv/bin/python -m bench.likelihood                      # tiny-v3: methods and widths, minutes on two cores
    PYTHONPATH=tests .venv/bin/python -m bench.likelihood --smollm2 FOLDER     # SmolLM2-135M-Instruct on tasks that it can do, an hour
    PYTHONPATH=tests .venv/bin/python -m bench.likelihood --recipe FILE --task gsm8k --task humaneval --limit 64 --set KEY=VALUE

Each artifact stores dequantized weights, so that every width is measured in the same way. For each task it prints the
mean log-likelihood per token of the gold solutions, the generated score, the KL, and over the artifacts Spearman's and
Pearson's correlation of the likelihood's and of the KL's change with the score's.
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
from quantkit.recipe.parse import parse

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
}  # an artifact in five minutes


def ignore(_: Progress | list[Plan]) -> None:
    """Nobody listens."""


def artifact(
    text: str,
    place: Path,
    method: str,
    bits: int,
    tasks: Sequence[str],
    options: argparse.Namespace,
) -> Fidelity:
    """Build one artifact of all linears and run its benchmarks."""
    name, rounding = METHODS[method]
    keys = {
        "quantize.method": name, "quantize.rounding": rounding, "quantize.bits": str(bits), "format": "dense",
        "rules": "all-linear", "gates": "{}", "evaluation.tasks": json.dumps([*tasks]),
        "output.path": str(place / f"{method}-{bits}"), **dict(pair.split("=", 1) for pair in options.set),
    }  # fmt: skip
    if options.limit:
        keys["evaluation.limit"] = str(options.limit)
    recipe = parse(text, options.recipe.name, keys)
    (outcome,) = pipeline.build_artifacts(
        recipe, text, overwrite=True, evaluate=True, on_plan=ignore, on_progress=ignore
    )
    return outcome.fidelity


def short(report: Fidelity) -> str:
    """The scores of one artifact, as soon as it has them."""
    pooled = report.distribution[0].kl_mean
    scores = [
        f"{row.task} {100 * (row.artifact or 0):.1f} % of {100 * (row.source or 0):.1f} %"
        for row in report.benchmarks
    ]
    return ", ".join([f"KL {pooled.value:.5f}" if pooled and pooled.value else "no KL", *scores])


def told(found: dict[str, Fidelity], task: str) -> str:
    """A Markdown table of one task, and what correlates with its score."""
    lines = [
        f"\n{task}\n",
        "| artifact | KL | gold, nats/token | change | score | change, pp |",
        "|---|---|---|---|---|---|",
    ]
    likely, kl, scores = list[float](), list[float](), list[float]()
    for name, report in found.items():
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
            f"| {name} | {kl[-1]:.5f} | {gold.artifact:.5f} | {likely[-1]:+.5f} | {100 * (row.artifact or 0):.1f} % "
            f"| {scores[-1]:+.1f} |"
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
    """Build, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--recipe", type=Path, default=package_data.folder("recipes") / "tiny-v3-awq4.yaml"
    )
    parser.add_argument("--task", action="append", default=[])
    parser.add_argument("--method", action="append", choices=METHODS, default=[])
    parser.add_argument("--bits", action="append", type=int, default=[])
    parser.add_argument("--limit", type=int)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--smollm2", type=Path, metavar="FOLDER", help="as make real-model leaves it"
    )
    options = parser.parse_args()
    if options.smollm2:
        options.recipe = package_data.folder("recipes") / "smollm2-135m-awq4.yaml"
        changes = {"source.model": str(options.smollm2.resolve()), **SMOLLM2}
        options.set = [*(f"{key}={value}" for key, value in changes.items()), *options.set]
    text = options.recipe.read_text(encoding="utf-8")
    found = dict[str, Fidelity]()
    with tempfile.TemporaryDirectory(prefix="bench-likelihood-") as folder:
        place = Path(folder)
        tasks = options.task or (
            easy.write(place) if options.smollm2 else ["tiny-v3-math", "tiny-v3-code"]
        )
        for bits in options.bits or BITS:
            for method in options.method or METHODS:
                name = f"{method} {bits} bits"
                found[name] = artifact(text, place, method, bits, tasks, options)
                print(f"{name}: {short(found[name])}", flush=True)
    for task in tasks:
        print(told(found, Path(task).stem))


if __name__ == "__main__":
    main()
