"""Two small sides with every kind of difference."""

from __future__ import annotations

import copy
import random
from collections.abc import Sequence
from math import exp
from typing import Any

from support.report_example import FIDELITY

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.diff.sides import ItemKey, PairedItem, Side, SolutionScore
from quantkit.diff.token_texts import TokenFigures
from quantkit.report.samples import Answer

N_TOKENS = 600
PROMPT, HASHES = "Question: what is {}?\nAnswer:", ("doc{}", "prompt{}", "target{}")
RECIPE: dict[str, object] = {
    "version": 1,
    "quantize": {"method": "awq", "bits": 4},
    "format": ["awq"],
    "rules": [
        {"label": "rules[0]", "match": "*", "quantize": {"method": "awq", "bits": 4}, "keep": None}
    ],
    "calibration": {"set": "tiny-v3", "sequences": None},
}
EXPERT = "model.layers.1.mlp.experts.{}.gate_proj"


def make_answer(text: str, score: float) -> Answer:
    """Return a short answer whose result is its last word."""
    return Answer(
        text=text,
        score=score,
        outcome=text.split()[-1] if text else "",
        n_tokens=len(text),
        truncated=False,
    )


def make_items(
    scores: Sequence[float], source: Sequence[float], task: str = "tiny-v3-math"
) -> dict[ItemKey, PairedItem]:
    """Return items 0, 1, ...; a correct answer is the number itself, a wrong one the next."""
    return {
        (task, "answer", n): PairedItem(
            hashes=(HASHES[0].format(n), HASHES[1].format(n), HASHES[2].format(n)),
            prompt=PROMPT.format(n),
            target=str(n),
            answer=make_answer(f"It is {n if mine else n + 1}", mine),
            source=make_answer(f"It is {n if theirs else n + 1}", theirs),
        )
        for n, (mine, theirs) in enumerate(zip(scores, source, strict=True))
    }


def make_tokens(scale: float, seed: int = 0) -> TokenFigures:
    """Return the same tokens at a distance of `scale` from the source."""
    dice, noise = random.Random(0), random.Random(seed)
    domains = ["math" if n % 3 else "code" for n in range(N_TOKENS)]
    nll_source = [dice.expovariate(1.0) for _ in range(N_TOKENS)]
    kl = [scale * exp(dice.gauss(0, 1.5)) for _ in range(N_TOKENS)]
    nll = [value + noise.gauss(0, 1) * scale**0.5 for value in nll_source]
    same = [noise.random() > scale**0.5 for _ in range(N_TOKENS)]
    return TokenFigures(
        domains=domains,
        kl=kl,
        nll_source=nll_source,
        nll=nll,
        same_top=same,
        documents=[n // 12 for n in range(N_TOKENS)],
        ids=[n % 50 for n in range(N_TOKENS)],
        places=[(n // 12, 1 + n % 12) for n in range(N_TOKENS)],
    )


def make_report(**changes: Any) -> Fidelity:
    """Return the example report with changes, over N_TOKENS tokens."""
    return Fidelity.model_validate({
        **copy.deepcopy(FIDELITY),
        "distribution": make_distribution(),
        **changes,
    })


def make_distribution() -> list[dict[str, Any]]:
    """Return the figures of all text and of its 400 tokens of math."""
    rows: Any = copy.deepcopy(FIDELITY["distribution"])
    return [{**rows[0], "tokens": N_TOKENS}, {**rows[1], "tokens": 2 * N_TOKENS // 3}]


def make_likelihood_rows(artifact: float) -> list[dict[str, Any]]:
    """Return the report's row of gold solutions."""
    row = {
        "task": "tiny-v3-math",
        "n": 20,
        "tokens": 100,
        "source": -0.5,
        "artifact": artifact,
        "data_sha256": "12" * 32,
    }
    return [row]


def make_solutions(lost: float) -> dict[tuple[str, int], SolutionScore]:
    """Return twenty solutions that are about `lost` nats per token less likely."""
    result = {}
    for n in range(20):
        at = -0.4 - 0.01 * n
        result["tiny-v3-math", n] = SolutionScore(
            n_tokens=5, source=at, value=at - lost * (1 + n % 3)
        )
    return result


SOURCE = [1.0] * 45 + [0.0] * 15
A_SCORES = [1.0] * 42 + [0.0] * 15 + [1.0] * 3  # 3 lost, 3 gained
B_SCORES = [1.0] * 30 + [0.0] * 27 + [1.0] * 3  # 12 more lost


def make_side_a() -> Side:
    """Return an AWQ artifact at 4 bits."""
    return Side(
        name="first",
        kind="artifact",
        fidelity=make_report(likelihood=make_likelihood_rows(-0.502)),
        recipe=RECIPE,
        plan={
            "rules": [{"label": "rules[0]", "modules": 2, "bytes_after": 4_000_000}],
            "totals": {"tensors": 4},
        },
        decisions={EXPERT.format(n): "awq int4 g128 asymmetric" for n in range(2)}
        | {"lm_head": "keep"},
        tensors={
            **{f"{EXPERT.format(n)}.qweight": ("I32", (256, 16)) for n in range(2)},
            "lm_head.weight": ("BF16", (768, 256)),
            "model.norm.weight": ("BF16", (256,)),
        },
        files={"model.safetensors": ("ab" * 32, 6_412_345), "config.json": ("cd" * 32, 900)},
        source_files={"model.safetensors": "77" * 32},
        versions={"python": "3.11.7", "torch": "2.13.0"},
        items=make_items(A_SCORES, SOURCE),
        tokens=make_tokens(0.0004, seed=1),
        solutions=make_solutions(0.001),
    )


def make_side_b() -> Side:
    """Return an RTN artifact at 3 bits with a quantized head; two figures better, others worse."""
    modules: Any = copy.deepcopy(FIDELITY["modules"])
    modules[0] |= {"method": "rtn", "scheme": "int3 g128 asymmetric", "output_relative_error": 0.21}
    modules[1] |= {
        "method": "rtn",
        "scheme": "int3 g128 asymmetric",
        "output_relative_error": 0.05,
        "fallback": None,
    }
    head = {**modules[0], "name": "lm_head", "relative_error": 0.12, "output_relative_error": 0.02}
    artifact: Any = {
        **copy.deepcopy(FIDELITY)["artifact"],
        "bytes_artifact": 5_100_000,
        "bits_per_weight": 3.25,
    }  # type: ignore[dict-item]
    measured = make_distribution()
    measured[0] |= {"kl_mean": {"value": 0.004}, "top1": {"value": 0.94}}
    gates = [{"figure": "kl_mean", "bound": "<= 0.001", "value": 0.004, "ok": False}]
    return Side(
        name="second",
        kind="artifact",
        fidelity=make_report(
            status="rejected",
            likelihood=make_likelihood_rows(-0.54),
            artifact={**artifact, "name": "second", "scheme": "RTN, 3 bits", "format": "dense"},
            modules=[*modules[:2], head, *modules[2:]],
            distribution=measured,
            blocks=[
                {"block": "model.layers.0", "relative_error": 0.0},
                {"block": "model.layers.1", "relative_error": 0.2},
            ],
            routers=[
                {"block": "model.layers.1", "agreement": 0.95},
                {"block": "model.layers.2", "agreement": 0.99},
            ],
            fallbacks=[],
            gates=gates,
        ),
        recipe={
            **RECIPE,
            "quantize": {"method": "rtn", "bits": 3},
            "rules": [
                {
                    "label": "rules[0]",
                    "match": "*",
                    "quantize": {"method": "rtn", "bits": 3},
                    "keep": None,
                }
            ],
            "calibration": None,
            "format": ["dense"],
        },
        plan={
            "rules": [{"label": "rules[0]", "modules": 3, "bytes_after": 2_700_000}],
            "totals": {"tensors": 4},
        },
        decisions={EXPERT.format(n): "rtn int3 g128 asymmetric" for n in range(2)}
        | {"lm_head": "rtn int3 g128 asymmetric"},
        tensors={
            **{f"{EXPERT.format(n)}.weight": ("BF16", (128, 256)) for n in range(2)},
            "lm_head.weight": ("F16", (768, 256)),
            "model.norm.weight": ("BF16", (128,)),
        },
        files={"model.safetensors": ("ee" * 32, 5_100_000), "config.json": ("cd" * 32, 900)},
        source_files={"model.safetensors": "77" * 32},
        versions={"python": "3.11.7", "torch": "2.14.0"},
        items=make_items(B_SCORES, SOURCE),
        tokens=make_tokens(0.004, seed=2),
        solutions=make_solutions(0.02),
    )
