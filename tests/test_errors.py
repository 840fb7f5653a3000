"""The tree in the docstring of errors.py equals the classes."""

from __future__ import annotations

import re

from quantkit import errors
from quantkit.errors import QuantkitError

LINE = re.compile(
    r"^(?P<branch>(?:[│ ]   )*)(?:[├└]── )?(?P<name>\w+) +(?P<code>\d)   (?P<meaning>\S.*)$"
)


def read_documented_tree() -> dict[str, tuple[str | None, int]]:
    """Return class -> (base, exit code) from the docstring."""
    tree: dict[str, tuple[str | None, int]] = {}
    above: list[str] = []
    for line in (errors.__doc__ or "").splitlines():
        match = LINE.match(line.removeprefix("    ")) if line.startswith("    ") else None
        if match:
            depth = 0 if not tree else len(match["branch"]) // 4 + 1
            above = [*above[:depth], match["name"]]
            tree[match["name"]] = (above[-2] if depth else None, int(match["code"]))
    return tree


def real(
    root: type[QuantkitError] = QuantkitError, base: str | None = None
) -> dict[str, tuple[str | None, int]]:
    """Return class -> (base, exit code) of the classes, from the root."""
    tree = {root.__name__: (base, root.exit_code)}
    for child in root.__subclasses__():
        tree |= real(child, root.__name__)
    return tree


def test_docstring_tree_equals_classes() -> None:
    assert read_documented_tree() == real()
    assert list(read_documented_tree()) == list(real())
    defined = {
        name
        for name, value in vars(errors).items()
        if getattr(value, "__module__", "") == errors.__name__
    }
    assert set(read_documented_tree()) == defined


def test_exit_codes_equal_those_of_the_command_line() -> None:
    """0 is success and no error's code."""
    assert {code for _, code in real().values()} == {1, 2, 3}


def test_recipe_error_lists_every_fault() -> None:
    error = errors.RecipeError(["a.yaml:1: one", "a.yaml:2: two"])
    assert error.faults == ("a.yaml:1: one", "a.yaml:2: two")
    assert str(error) == "a.yaml:1: one\na.yaml:2: two"
