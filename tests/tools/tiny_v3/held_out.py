"""The held-out items of tiny-v3 as files: `python -m tools.tiny_v3.held_out --out DIR`.

eval_math.jsonl and eval_code.jsonl are the benchmark items in evals/data/; eval_text.jsonl is a
sample of the training mix, the text of the card's KL divergence.
"""

from __future__ import annotations

import json
import random
from collections.abc import Mapping, Sequence
from pathlib import Path

import click
from tools.tiny_v3.corpus import (
    TEMPLATES,
    Item,
    draw_arguments,
    draw_item,
    draw_kind,
    make_arithmetic,
    make_function_item,
    make_word_problem,
)

Row = dict[str, object]

SEED = 1
TESTS_PER_FUNCTION = 8


def make_held_out_sets(
    seed: int = SEED, math: int = 300, code: int = 100, text: int = 120
) -> dict[str, list[Row]]:
    """Return the rows of each file by file name, drawn from one stream, math first."""
    rng = random.Random(seed)
    seen: set[str] = set()
    return {
        "eval_math.jsonl": _make_math_rows(math, seen, rng),
        "eval_code.jsonl": _make_code_rows(code, seen, rng),
        "eval_text.jsonl": _make_text_rows(text, rng),
    }


def _make_math_rows(count: int, seen: set[str], rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        item = make_word_problem(rng) if rng.random() < 0.8 else make_arithmetic(rng)
        if not item.held_out or item.prompt in seen:
            continue
        seen.add(item.prompt)
        rows.append({
            "task_id": f"math/{len(rows)}",
            "kind": item.kind,
            "prompt": item.prompt,
            "solution": item.answer,
            "answer": item.result,
        })
    return rows


def _make_code_rows(count: int, seen: set[str], rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        item = make_function_item(rng)
        if not item.held_out or item.prompt in seen:
            continue
        seen.add(item.prompt)
        rows.append({
            "task_id": f"code/{len(rows)}",
            "template": item.template,
            "prompt": item.prompt,
            "canonical_solution": item.answer,
            "entry_point": item.function,
            "test": _format_check(item, rng),
        })
    return rows


def _format_check(item: Item, rng: random.Random) -> str:
    """Return HumanEval's `check(candidate)` for an item; its own body gives the expected values."""
    namespace: dict[str, object] = {}
    exec(item.text, namespace)  # our own template: expected values always agree with the solution
    solution = namespace[item.function]
    if not callable(solution):
        raise TypeError(f"templates.json: functions[{item.template}] does not define a function")
    lines = ["def check(candidate):"]
    for _ in range(TESTS_PER_FUNCTION):
        arguments = draw_arguments(TEMPLATES.functions[item.template], rng)
        text = repr(arguments)  # before the call, which may change a list
        lines.append(f"    assert candidate(*{text}) == {solution(*arguments)!r}")
    return "\n".join(lines) + "\n"


def _make_text_rows(count: int, rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        item = draw_item(draw_kind(rng), rng)
        if item.held_out:
            rows.append({"kind": item.kind, "text": item.text, "prompt_len": len(item.prompt)})
    return rows


def to_jsonl(rows: Sequence[Mapping[str, object]]) -> bytes:
    """Return one JSON object per line, ASCII only, with a final line end."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Output folder.",
)
def main(out: Path) -> None:
    """Write the held-out items of tiny-v3: eval_math.jsonl, eval_code.jsonl and eval_text.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_held_out_sets().items():
        (out / name).write_bytes(to_jsonl(rows))
        click.echo(f"{out / name}: {len(rows)} items")


if __name__ == "__main__":
    main()
