"""The two disjoint sets for tiny-v3, from its own corpus: calibration and fidelity."""

from __future__ import annotations

import random

from tools.tiny_v3.corpus import DOMAIN, Item, Kind, draw_item, draw_kind
from tools.tiny_v3.held_out import make_held_out_sets

Row = tuple[str, str]  # domain, text

CALIBRATION_SEED, CALIBRATION_ITEMS = 20, 900
HELD_OUT_SEED = 21
HELD_OUT_MORE: dict[Kind, int] = {
    "eng_item": 60,
    "code_item": 40,
    "math_item": 20,
    "arith_item": 10,
}
"""Items in addition to eval_text.jsonl, which follows the training mix and has little prose."""


def make_calibration_rows() -> list[Row]:
    """Return items in the training mix, none held out and none with a held-out item's prompt."""
    held_out = make_held_out_sets()
    prompts = {
        row["prompt"] for name in ("eval_math.jsonl", "eval_code.jsonl") for row in held_out[name]
    }
    seen = {str(row["text"]) for row in held_out["eval_text.jsonl"]}
    rng = random.Random(CALIBRATION_SEED)
    items: list[Item] = []
    while len(items) < CALIBRATION_ITEMS:
        item = draw_item(draw_kind(rng), rng)
        if not item.held_out and item.prompt not in prompts and item.text not in seen:
            seen.add(item.text)
            items.append(item)
    return [(DOMAIN[item.kind], item.text) for item in items]


def make_held_out_rows() -> list[Row]:
    """Return the items of eval_text.jsonl, then further held-out items of each kind."""
    rows: list[Row] = [
        (_get_domain(row), str(row["text"])) for row in make_held_out_sets()["eval_text.jsonl"]
    ]
    seen = {text for _, text in rows}
    rng = random.Random(HELD_OUT_SEED)
    for kind, count in HELD_OUT_MORE.items():
        end = len(rows) + count
        while len(rows) < end:
            item = draw_item(kind, rng)
            if item.held_out and item.text not in seen:
                seen.add(item.text)
                rows.append((DOMAIN[kind], item.text))
    return rows


def _get_domain(row: dict[str, object]) -> str:
    return next(domain for kind, domain in DOMAIN.items() if kind == row["kind"])
