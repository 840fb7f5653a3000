"""The tree drawn in errors.py is the tree there is."""

from __future__ import annotations

import re

from quantkit import errors
from quantkit.errors import QuantkitError

LINE = re.compile(
    r"^(?P<branch>(?:[│ ]   )*)(?:[├└]── )?(?P<name>\w+) +(?P<code>\d)   (?P<meaning>\S.*)$"
)


def drawn() -> dict[str, tuple[str | None, int]]:
    """Class -> (base, exit code) as the docstring draws it."""
    found: dict[str, tuple[str | None, int]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = LINE.match(line.removeprefix("    ")) if line.startswith("    ") else None
        if match:
            depth = 0 if not found else len(match["branch"]) // 4 + 1
            above = [*above[:depth], match["name"]]
            found[match["name"]] = (above[-2] if depth else None, int(match["code"]))
    return found


def real(
    root: type[QuantkitError] = QuantkitError, base: str | None = None
) -> dict[str, tuple[str | None, int]]:
    """Class -> (base, exit code), from the root down."""
    found = {root.__name__: (base, root.exit_code)}
    for child in root.__subclasses__():
        found |= real(child, root.__name__)
    return found


def test_the_drawn_tree_is_the_real_one() -> None:
    assert drawn() == real()
    assert list(drawn()) == list(real())
    defined = {
        name
        for name, value in vars(errors).items()
        if getattr(value, "__module__", "") == errors.__name__
    }
    assert set(drawn()) == defined


def test_exit_codes_say_what_the_command_line_promises() -> None:
    """0 is success; nothing else is free for a caller to misread."""
    assert {code for _, code in real().values()} == {1, 2, 3}


def test_a_recipe_error_holds_every_fault() -> None:
    error = errors.RecipeError(["a.yaml:1: one", "a.yaml:2: two"])
    assert error.faults == ("a.yaml:1: one", "a.yaml:2: two")
    assert str(error) == "a.yaml:1: one\na.yaml:2: two"
