"""`make bench-quality`: what RTN and AWQ lose on tiny-v3, from emitted files, as one table.

The `dense` format holds 3 bits, which no AWQ engine reads; its weights are the dequantized ones in BF16. Mean KL in
nats per token over all held-out text, against the BF16 dequantization of the FP8 source.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quantkit.build import Progress
from quantkit.pipeline import run
from quantkit.plan import Plan
from quantkit.recipe import parse
from quantkit.storage.builtin import folder

GOALS = {("all-linear", 4): 0.82, ("experts-only", 4): 0.65}


def ignore(_: Progress | Plan) -> None:
    """Only the end counts."""


def mean_kl(place: Path, method: str, bits: int, rules: str) -> tuple[float, float]:
    """Mean KL and perplexity ratio of one build."""
    text = (folder("recipes") / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    changes = {
        "quantize.method": method,
        "quantize.bits": str(bits),
        "format": "awq" if bits == 4 else "dense",
        "rules": rules,
        "output.path": str(place / f"{method}{bits}-{rules}"),
    }
    recipe = parse(text, "tiny-v3-awq4.yaml", changes)
    pooled = run(recipe, text, overwrite=False, evaluate=False, planned=ignore, tell=ignore).fidelity.distribution[0]
    assert pooled.kl_mean and pooled.ppl_ratio and pooled.kl_mean.value and pooled.ppl_ratio.value  # always measured
    return pooled.kl_mean.value, pooled.ppl_ratio.value


def main() -> None:
    """Eight builds, one table; exit 1 when a goal of the README is missed."""
    table = Table("rules", "bits", "RTN KL", "AWQ KL", "AWQ / RTN", "goal", "RTN ppl", "AWQ ppl", box=None)
    missed = False
    with tempfile.TemporaryDirectory() as place:
        for rules in ("all-linear", "experts-only"):
            for bits in (4, 3):
                rtn, rtn_ppl = mean_kl(Path(place), "rtn", bits, rules)
                awq, awq_ppl = mean_kl(Path(place), "awq", bits, rules)
                goal = GOALS.get((rules, bits))
                missed |= goal is not None and awq / rtn > goal
                shown = f"<= {goal}" if goal else ""
                table.add_row(
                    rules, str(bits), f"{rtn:.6f}", f"{awq:.6f}", f"{awq / rtn:.3f}", shown, f"{rtn_ppl:.4f}",
                    f"{awq_ppl:.4f}",
                )  # fmt: skip
    Console(width=110).print(table)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
