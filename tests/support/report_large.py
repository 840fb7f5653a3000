"""A report as large as DeepSeek-V3's: 61 layers, 58 of them with 256 routed experts, 45,000
modules; and samples."""

from __future__ import annotations

import random
from functools import cache
from math import exp
from pathlib import Path

import pyarrow as arrow
import pyarrow.parquet as parquet
from support.report_example import FIDELITY

from quantkit.artifact.fidelity_schema import Fidelity

LAYERS, EXPERTS, MIN_TOKENS = 61, 256, 256
KEPT_PARTS = ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj")


@cache
def make_large_report() -> Fidelity:
    """Return the report; a seed makes it reproducible."""
    dice = random.Random(0)
    modules, loads = [], []
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        modules += [
            {
                "name": f"{name}.self_attn.{part}",
                "rule": "rules[1]",
                "method": None,
                "scheme": "BF16",
            }
            for part in KEPT_PARTS
        ]
        if layer < 3:
            continue
        tokens = [round(dice.lognormvariate(8, 0.9)) for _ in range(EXPERTS)]
        loads.append({"block": name, "tokens": tokens})
        for expert, seen in enumerate(tokens):
            modules += [
                {
                    "name": f"{name}.mlp.experts.{expert}.{part}",
                    "rule": "rules[0]",
                    "method": "awq",
                    "rounding": "gptq",
                    "scheme": "int4 g128 asymmetric",
                    "relative_error": 0.09 + 0.02 * dice.random(),
                    "sqnr_db": 20 + dice.random(),
                    "output_relative_error": 0.01 * exp(dice.gauss(0, 0.6)) * (1 + layer / 30),
                    "tokens": seen,
                    "fallback": "shared-gram" if seen < MIN_TOKENS else None,
                    "rescaled": part == "down_proj",
                }
                for part in ("gate_proj", "up_proj", "down_proj")
            ]
    low = [module["name"] for module in modules if module.get("fallback")]
    meaning = "an expert saw fewer than 256 tokens and was solved with the statistics of its layer"
    return Fidelity.model_validate({
        **FIDELITY,
        "status": "rejected",
        "artifact": {
            **dict(FIDELITY["artifact"]),  # type: ignore[call-overload]
            "name": "deepseek-v3-awq4",
            "parameters": 684_489_845_504,
            "bytes_source": 688_570_000_000,
            "bytes_artifact": 400_890_000_000,
            "rules": [
                make_rule(
                    "rules[0]",
                    "awq+gptq int4 g128 asymmetric",
                    44_544,
                    653_908_770_816,
                    654_070_000_000,
                    4.16,
                ),
                make_rule("rules[1]", "keep", 548, 17_117_633_536, 19_080_000_000, 16.0),
                make_rule("mtp: keep", "keep", 780, 13_464_000_000, 15_420_000_000, 16.0),
            ],
        },
        "source": {
            **dict(FIDELITY["source"]),  # type: ignore[call-overload]
            "model": "deepseek-ai/DeepSeek-V3",
            "revision": "e815299b0bcbac849fa540c768ef21845365c9eb",
            "license": {"id": "other", "name": "deepseek", "link": "LICENSE-MODEL"},
        },
        "modules": modules,
        "blocks": [
            {"block": f"model.layers.{n}", "relative_error": 0.002 * n + 0.001 * dice.random()}
            for n in range(LAYERS)
        ],
        "routers": [
            {"block": f"model.layers.{n}", "agreement": 0.99 - n / 3000 - 0.003 * dice.random()}
            for n in range(3, LAYERS)
        ],
        "experts": {
            "min_tokens": MIN_TOKENS,
            "policy": "the shared gram of their layer",
            "layers": loads,
        },
        "fallbacks": [{"kind": "shared-gram", "meaning": meaning, "modules": low}],
        "gates": [
            {"figure": "kl_mean", "bound": "<= 0.05", "value": 0.000361, "ok": True},
            {
                "figure": "experts_uncalibrated",
                "bound": "<= 0",
                "value": float(len(low) // 3),
                "ok": False,
            },
            {
                "figure": "humaneval.recovery",
                "bound": ">= 0.95",
                "value": None,
                "ok": None,
                "reason": "not run",
            },
        ],
    })


def make_rule(
    label: str, action: str, modules: int, parameters: int, n_bytes: int, bits: float
) -> dict[str, object]:
    """Return the totals of a rule."""
    return {
        "label": label,
        "match": "*",
        "action": action,
        "modules": modules,
        "parameters": parameters,
        "bytes_before": n_bytes,
        "bytes_after": round(parameters * bits / 8),
        "bits_per_weight": bits,
    }


def write_samples(artifact: Path, items: int, answer: str = "") -> None:
    """Write the samples of a build: tokens of three domains, and `items` pairs, every third
    changed."""
    dice = random.Random(1)
    folder = artifact / "quantkit" / "samples"
    folder.mkdir(parents=True, exist_ok=True)
    n = 60_000
    columns = {
        "domain": [("code", "math", "prose")[k % 3] for k in range(n)],
        "kl": arrow.array([exp(dice.gauss(-9 + k % 3, 2.2)) for k in range(n)], arrow.float32()),
    }
    parquet.write_table(arrow.table(columns), folder / "tokens.parquet")
    parquet.write_table(
        arrow.Table.from_pylist([make_item(k, answer) for k in range(items)]),
        folder / "benchmarks.parquet",
    )


def make_item(item: int, answer: str) -> dict[str, object]:
    """Return one item; of three, one is lost or gained in turn."""
    changed, lost = item % 3 == 0, item % 6 == 0
    steps = " ".join(f"Step {n}: {n} + {item} = {n + item}." for n in range(40)) + answer
    right, wrong = f"{steps}\n#### {item}", f"{steps}\n#### {item + 1}"
    source, artifact = (right, wrong) if lost else (wrong, right)
    row = {"task": "gsm8k" if item % 2 else "mgsm_zh", "filter": "strict", "doc_id": item}
    row |= {"prompt": f"Question: what is {item}?\nAnswer:", "target": str(item)}
    for who, text in (("base", source), ("quant", artifact if changed else source)):
        row |= {
            f"{who}_response": text,
            f"{who}_score": float(text is right),
            f"{who}_outcome": text.split()[-1],
        }
        row |= {f"{who}_n_tokens": len(text) // 4, f"{who}_truncated": False}
    return row
