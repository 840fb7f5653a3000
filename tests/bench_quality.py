"""`make bench-quality`: what RTN and AWQ lose on tiny-v3, from emitted files, as one table.

Mean KL in nats per token against the BF16 dequantization of the FP8 source, on 44,000 held-out tokens, AWQ averaged
over two draws of its calibration text: a few bistable tokens carry much of a mean KL, and a small text or a single
draw moves the ratio by more than methods differ. The `dense` format holds 3 bits, which no AWQ engine reads; its
weights are the dequantized ones in BF16.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import random
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

from quantkit.build import Progress
from quantkit.builtin_models.tiny_v3.corpus import DOMAIN, draw, draw_kind
from quantkit.calibration_sets.specs import TINY_HELD_OUT, spec_yaml
from quantkit.pipeline import run
from quantkit.plan import Plan
from quantkit.recipe import parse
from quantkit.report.schema import Distribution
from quantkit.storage.builtin import folder

GOALS = {("all-linear", 4): 0.82, ("experts-only", 4): 0.65}
HELD_OUT_ITEMS, HELD_OUT_SEED = 800, 99
CALIBRATION = {"awq": ("0", "1"), "rtn": ("0",)}  # seeds; RTN learns nothing


def ignore(_: Progress | Plan) -> None:
    """Only the end counts."""


def held_out(place: Path) -> Path:
    """A larger held-out text in tiny-v3's own mix, as a set of its own."""
    rng, rows, seen = random.Random(HELD_OUT_SEED), [], set[str]()
    while len(rows) < HELD_OUT_ITEMS:
        item = draw(draw_kind(rng), rng)
        if item.held_out and item.text not in seen:
            seen.add(item.text)
            rows.append({"domain": DOMAIN[item.kind], "text": item.text})
    data = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (place / "held-out.jsonl").write_bytes(data)
    spec = dataclasses.replace(TINY_HELD_OUT, name="held-out")
    (place / "held-out.yaml").write_text(
        spec_yaml(spec, hashlib.sha256(data).hexdigest(), {row["domain"] for row in rows})
    )
    return place / "held-out.yaml"


def measure(place: Path, text: Path, method: str, bits: int, rules: str, seed: str) -> Distribution:
    """The pooled figures of one build."""
    recipe_text = (folder("recipes") / "tiny-v3-awq4.yaml").read_text(encoding="utf-8")
    changes = {
        "quantize.method": method,
        "quantize.bits": str(bits),
        "format": "awq" if bits == 4 else "dense",
        "rules": rules,
        "calibration.sequences": "600",
        "calibration.seed": seed,
        "fidelity.set": str(text),
        "output.path": str(place / f"{method}{bits}-{rules}-{seed}"),
    }
    recipe = parse(recipe_text, "tiny-v3-awq4.yaml", changes)
    (outcome,) = run(recipe, recipe_text, overwrite=False, evaluate=False, planned=ignore, tell=ignore)
    return outcome.fidelity.distribution[0]


def mean_kl(runs: list[Distribution]) -> float:
    """Mean over builds of the mean KL."""
    return sum(run.kl_mean.value or 0.0 for run in runs if run.kl_mean) / len(runs)


def each(runs: list[Distribution]) -> str:
    """KL and standard error of each build."""
    return ", ".join(f"{r.kl_mean.value:.6f} ±{r.kl_mean.se:.6f}" for r in runs if r.kl_mean)


def main() -> None:
    """Twelve builds, one table; exit 1 when a goal of the README is missed."""
    table = Table("rules", "bits", "RTN mean KL", "AWQ mean KL", "AWQ / RTN", "goal", box=None)
    missed = False
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        text = held_out(place)
        for rules in ("all-linear", "experts-only"):
            for bits in (4, 3):
                runs = {m: [measure(place, text, m, bits, rules, s) for s in seeds] for m, seeds in CALIBRATION.items()}
                ratio, goal = mean_kl(runs["awq"]) / mean_kl(runs["rtn"]), GOALS.get((rules, bits))
                missed |= goal is not None and ratio > goal
                shown = f"<= {goal}" if goal else ""
                table.add_row(rules, str(bits), each(runs["rtn"]), each(runs["awq"]), f"{ratio:.3f}", shown)
    Console(width=120).print(table)
    raise SystemExit(1 if missed else 0)


if __name__ == "__main__":
    main()
