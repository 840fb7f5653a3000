"""Module names folded into ranges: "model.layers.{3-60}.mlp.experts.{0-7, 12}.down_proj".
Lossless."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")  # a component of a dotted name


def find_block_number(name: str) -> int | None:
    """Return the block number of a module or block: the first number in its name, or None."""
    match = _NUMBER.search(name)
    return int(match.group()) if match else None


def fold_names(names: Iterable[str]) -> list[str]:
    """Fold the numbers of names into ranges: the second number of a name first, then the first.

    ["a.0.b.1", "a.0.b.2", "a.1.b.1", "a.1.b.2"] -> ["a.{0-1}.b.{1-2}"].
    """
    lines = list(dict.fromkeys(names))
    for position in (1, 0):
        groups: dict[tuple[str, str], list[int]] = {}
        for line in lines:
            before, number, after = _split(line, position)
            groups.setdefault((before, after), []).extend([] if number is None else [number])
        lines = [
            before if not numbers else f"{before}{_format_ranges(sorted(set(numbers)))}{after}"
            for (before, after), numbers in groups.items()
        ]
    return lines


def _split(name: str, position: int) -> tuple[str, int | None, str]:
    """Split a name at its second number (position 1) or its first; None if it has no such
    number."""
    numbers = list(_NUMBER.finditer(name))
    if len(numbers) <= position:
        return name, None, ""
    match = numbers[position]
    return name[: match.start()], int(match.group()), name[match.end() :]


def _format_ranges(numbers: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    text = ", ".join("-".join(map(str, ends)) for ends in ranges)
    return text if len(numbers) == 1 else f"{{{text}}}"
