"""Print the results of surveys as the tables of tests/external/survey/README.md.

PYTHONPATH=tests .venv/bin/python -m external.survey.table GPTQ.jsonl [AWQ.jsonl]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from external.survey.families import EXPERTS, GROUPS, VLLM

Result = Mapping[str, Any]
Results = Mapping[str, Result]
MAX_REASON = 200
COLUMNS = (
    "type", "how", "inputs scaled", "GPTQ: report", "transformers", "AWQ + GPTQ: report",
    "transformers", "engines tried",
)  # fmt: skip
HEADER = f"| {' | '.join(COLUMNS)} |\n{'|---' * len(COLUMNS)}|"


def read_results(path: Path) -> Results:
    """Return the lines of a survey by type; of a type with several, the last."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["type"]: line for line in lines}


def format_reason(result: Result) -> str:
    """Return the reason of a refusal without the parts that all of them share."""
    message = " ".join(str(result.get("message", "")).split())
    reason = message.partition("derived: ")[2] or message
    return reason.partition("; use a model of")[0].replace("|", "/")[:MAX_REASON]


def format_figures(result: Result) -> str:
    """Return two cells: the KL of the report, and the one that transformers computes."""
    if "kl_transformers" not in result:
        return f"{result.get('status', '')} | "
    mark = " (2)" if result.get("loader") == "quantkit" else ""
    return f"{result['kl_reported']:.6f} | {result['kl_transformers']:.6f}{mark}"


def format_engines(name: str, *results: Result) -> str:
    """Return the engines that ran an artifact of a type; "no" for none.

    transformers counts where it loaded the weights itself: a figure with (2) is that of
    `quantkit.load`.
    """
    is_loaded = any("kl_transformers" in x and x.get("loader") != "quantkit" for x in results)
    engines = [*(["transformers"] if is_loaded else []), *(["vLLM"] if name in VLLM else [])]
    return ", ".join(engines) or "no"


def format_how(name: str, result: Result) -> str:
    """Return whether the layout is a table's or derived, and what is special about its experts."""
    how = "derived" if result["derived"] else "table"
    return f"{how}: {EXPERTS[name]}" if name in EXPERTS else how


def is_built(*results: Result) -> bool:
    """Return whether an artifact was built and loaded."""
    return any("kl_transformers" in result for result in results)


def iterate_group(names: Sequence[str], results: Results, scaled: Results) -> Iterator[str]:
    """Yield the table of a group's types that are built, and that of the others."""
    pairs = {name: (results.get(name, {}), scaled.get(name, {})) for name in names}
    yield HEADER
    for name, (result, other) in pairs.items():
        if is_built(result, other):
            cells = f"{format_figures(result)} | {format_figures(other)}"
            folded = other.get("scaled") or result.get("scaled", "")
            how = format_how(name, result or other)
            engines = format_engines(name, result, other)
            yield f"| {name} | {how} | {folded} | {cells} | {engines} |"
    others = {name: x or y for name, (x, y) in pairs.items() if not is_built(x, y)}
    if others:
        yield "\n| type | status | reason |\n|---|---|---|"
    for name, result in others.items():
        yield f"| {name} | {result['status']} | {format_reason(result)} |"


def iterate_lines(results: Results, scaled: Results) -> Iterator[str]:
    """Yield the tables of each group and its counts."""
    for group, names in GROUPS.items():
        present = [name for name in names if name in results or name in scaled]
        if not present:
            continue
        yield f"\n## {group.capitalize()}\n"
        for title, rows in (("GPTQ", results), ("AWQ + GPTQ", scaled)):
            counts = Counter(rows[name]["status"] for name in present if name in rows)
            total = ", ".join(f"{count} {status}" for status, count in counts.most_common())
            if total:
                yield f"{title}: {counts.total()} types, {total}.\n"
        yield from iterate_group(present, results, scaled)


def main() -> None:
    """Print the tables."""
    results, *scaled = map(read_results, map(Path, sys.argv[1:]))
    sys.stdout.write("\n".join(iterate_lines(results, scaled[0] if scaled else {})) + "\n")


if __name__ == "__main__":
    main()
