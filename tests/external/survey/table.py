"""Print the results of surveys as the tables of tests/external/survey/README.md.

PYTHONPATH=tests .venv/bin/python -m external.survey.table GPTQ.jsonl [AWQ.jsonl]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from external.survey.families import GROUPS

Result = Mapping[str, Any]
Results = Mapping[str, Result]
MAX_REASON = 200
HEADER = """\
| type | how | inputs scaled | GPTQ: report | transformers | AWQ + GPTQ: report | transformers |
|---|---|---|---|---|---|---|"""


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


def iterate_group(names: Mapping[str, Result], scaled: Results) -> Iterator[str]:
    """Yield the table of a group's types that are built, and that of the others."""
    yield HEADER
    for name, result in names.items():
        if "kl_transformers" in result:
            how = "derived" if result["derived"] else "table"
            cells = f"{format_figures(result)} | {format_figures(scaled.get(name, {}))}"
            folded = scaled.get(name, result).get("scaled", "")
            yield f"| {name} | {how} | {folded} | {cells} |"
    others = {name: x for name, x in names.items() if "kl_transformers" not in x}
    if others:
        yield "\n| type | status | reason |\n|---|---|---|"
    for name, result in others.items():
        yield f"| {name} | {result['status']} | {format_reason(result)} |"


def iterate_lines(results: Results, scaled: Results) -> Iterator[str]:
    """Yield the tables of each group and its counts."""
    for group, names in GROUPS.items():
        present = {name: results[name] for name in names if name in results}
        if not present:
            continue
        yield f"\n## {group.capitalize()}\n"
        for title, rows in (("GPTQ", results), ("AWQ + GPTQ", scaled)):
            counts = Counter(rows[name]["status"] for name in present if name in rows)
            total = ", ".join(f"{count} {status}" for status, count in counts.most_common())
            if total:
                yield f"{title}: {len(present)} types, {total}.\n"
        yield from iterate_group(present, scaled)


def main() -> None:
    """Print the tables."""
    results, *scaled = map(read_results, map(Path, sys.argv[1:]))
    sys.stdout.write("\n".join(iterate_lines(results, scaled[0] if scaled else {})) + "\n")


if __name__ == "__main__":
    main()
