"""Many module names in few lines: "model.layers.{3-60}.mlp.experts.{0-7, 12}.down_proj". Pure, and nothing is lost."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_NUMBER = re.compile(r"(?<=\.)\d{1,9}(?=\.|$)")  # a component of a dotted name


def find_block_number(name: str) -> int | None:
    """The number of the block that a module or block lies in: the first number in its name."""
    found = _NUMBER.search(name)
    return int(found.group()) if found else None


def fold_names(names: Iterable[str]) -> list[str]:
    """The names with their numbers as ranges: the last numbers of equal names first, then those before.

    ["a.0.b.1", "a.0.b.2", "a.1.b.1", "a.1.b.2"] -> ["a.{0-1}.b.{1-2}"].
    """
    lines = list(dict.fromkeys(names))
    for position in (1, 0):
        groups: dict[tuple[str, str], list[int]] = {}
        for line in lines:
            before, number, after = _cut(line, position)
            groups.setdefault((before, after), []).extend([] if number is None else [number])
        lines = [
            before if not numbers else f"{before}{_told(sorted(set(numbers)))}{after}"
            for (before, after), numbers in groups.items()
        ]
    return lines


def _cut(name: str, position: int) -> tuple[str, int | None, str]:
    """A name around its second number (position 1) or its first; number None when it has none there."""
    found = list(_NUMBER.finditer(name))
    if len(found) <= position:
        return name, None, ""
    match = found[position]
    return name[: match.start()], int(match.group()), name[match.end() :]


def _told(numbers: Sequence[int]) -> str:
    ranges: list[list[int]] = []
    for number in numbers:
        if ranges and number == ranges[-1][-1] + 1:
            ranges[-1] = [ranges[-1][0], number]
        else:
            ranges.append([number])
    text = ", ".join("-".join(map(str, each)) for each in ranges)
    return text if len(numbers) == 1 else f"{{{text}}}"
