"""The held-out items of tiny-v3 as files: `python -m tools.tiny_v3.held_out --out DIR`.

eval_math.jsonl and eval_code.jsonl are the benchmark items under evals/data/; eval_text.jsonl is a sample of the
training mix on which the card's KL divergence was measured.
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
    arithmetic,
    draw_item,
    draw_kind,
    function,
    function_arguments,
    word_problem,
)

Row = dict[str, object]

SEED = 1
TESTS_PER_FUNCTION = 8


def make_held_out_sets(
    seed: int = SEED, math: int = 300, code: int = 100, text: int = 120
) -> dict[str, list[Row]]:
    """The rows of each file by file name; the three are drawn from one stream, math first."""
    rng = random.Random(seed)
    seen: set[str] = set()
    return {
        "eval_math.jsonl": _math_rows(math, seen, rng),
        "eval_code.jsonl": _code_rows(code, seen, rng),
        "eval_text.jsonl": _text_rows(text, rng),
    }


def _math_rows(count: int, seen: set[str], rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        item = word_problem(rng) if rng.random() < 0.8 else arithmetic(rng)
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


def _code_rows(count: int, seen: set[str], rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        item = function(rng)
        if not item.held_out or item.prompt in seen:
            continue
        seen.add(item.prompt)
        rows.append({
            "task_id": f"code/{len(rows)}",
            "template": item.template,
            "prompt": item.prompt,
            "canonical_solution": item.answer,
            "entry_point": item.function,
            "test": _check_function(item, rng),
        })
    return rows


def _check_function(item: Item, rng: random.Random) -> str:
    """HumanEval's `check(candidate)` for an item; what is expected is what the item's own body returns."""
    namespace: dict[str, object] = {}
    exec(
        item.text, namespace
    )  # our own template, so that the expected values cannot disagree with the solution
    solution = namespace[item.function]
    if not callable(solution):
        raise TypeError(f"templates.json: functions[{item.template}] does not define a function")
    lines = ["def check(candidate):"]
    for _ in range(TESTS_PER_FUNCTION):
        arguments = function_arguments(TEMPLATES.functions[item.template], rng)
        shown = repr(arguments)  # before the call, which may change a list
        lines.append(f"    assert candidate(*{shown}) == {solution(*arguments)!r}")
    return "\n".join(lines) + "\n"


def _text_rows(count: int, rng: random.Random) -> list[Row]:
    rows: list[Row] = []
    while len(rows) < count:
        item = draw_item(draw_kind(rng), rng)
        if item.held_out:
            rows.append({"kind": item.kind, "text": item.text, "prompt_len": len(item.prompt)})
    return rows


def to_jsonl(rows: Sequence[Mapping[str, object]]) -> bytes:
    """One JSON object a line, ASCII only, the last line ended."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode("ascii")


@click.command()
@click.option(
    "--out",
    type=click.Path(path_type=Path, file_okay=False),
    required=True,
    help="Folder to write into.",
)
def main(out: Path) -> None:
    """Write the held-out items of tiny-v3: eval_math.jsonl, eval_code.jsonl and eval_text.jsonl."""
    out.mkdir(parents=True, exist_ok=True)
    for name, rows in make_held_out_sets().items():
        (out / name).write_bytes(to_jsonl(rows))
        click.echo(f"{out / name}: {len(rows)} items")


if __name__ == "__main__":
    main()
