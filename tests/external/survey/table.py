"""Print the results of a survey as a Markdown table, next to those of an earlier one.

PYTHONPATH=tests .venv/bin/python -m external.survey.table RESULTS.jsonl [BEFORE.jsonl]
"""

from __future__ import annotations

import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from external.survey.families import GROUPS

Results = Mapping[str, Mapping[str, Any]]
MAX_REASON = 160


def read_results(path: Path) -> Results:
    """Return the lines of a survey by type."""
    lines = map(json.loads, path.read_text(encoding="utf-8").splitlines())
    return {line["type"]: line for line in lines}


def format_reason(result: Mapping[str, Any]) -> str:
    """Return the reason of a refusal without what all of them share."""
    message = str(result.get("message", ""))
    reason = message.partition("derived: ")[2] or message
    return reason.partition("; use a model of")[0].replace("|", "/")[:MAX_REASON]


def format_row(name: str, result: Mapping[str, Any], before: Results) -> str:
    """Return one row: type, status before and now, figures or reason."""
    figures = format_reason(result)
    if "kl_transformers" in result:
        how = "derived" if result["derived"] else "table"
        figures = (
            f"{how}; KL {result['kl_reported']:.4f}, transformers {result['kl_transformers']:.4f}"
        )
    earlier = str(before.get(name, {}).get("status", "")).partition(",")[0]
    return f"| {name} | {earlier} | {result['status']} | {figures} |"


def iterate_lines(results: Results, before: Results) -> Iterator[str]:
    """Yield the table of each group and its counts."""
    for group, names in GROUPS.items():
        present = {name: results[name] for name in names if name in results}
        if not present:
            continue
        counts = Counter(result["status"] for result in present.values())
        total = ", ".join(f"{status} {count}" for status, count in counts.most_common())
        yield f"\n**{group}**: {len(present)} types: {total}\n"
        yield "| type | before | now | KL, or reason |\n|---|---|---|---|"
        yield from (format_row(name, result, before) for name, result in present.items())


def main() -> None:
    """Print the table."""
    results, *before = map(read_results, map(Path, sys.argv[1:]))
    sys.stdout.write("\n".join(iterate_lines(results, before[0] if before else {})) + "\n")


if __name__ == "__main__":
    main()
