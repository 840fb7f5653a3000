"""Rules of the tests themselves: shared code lies in tests/support."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

from support.paths import ROOT

TESTS = ROOT / "tests"


def read_sources(folder: Path) -> dict[str, str]:
    """Return the Python files below a folder by relative path."""
    return {
        path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8")
        for path in sorted(folder.rglob("*.py"))
    }


def list_imports(source: str) -> Iterator[str]:
    """Yield the modules, and the names in modules, that a file imports."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def find_imported_tests(sources: Mapping[str, str]) -> list[tuple[str, str]]:
    """Return (file, test module) for each import of a test file."""
    modules = {
        path.removesuffix(".py").replace("/", ".")
        for path in sources
        if Path(path).name.startswith("test_")
    }
    return [
        (path, name)
        for path, source in sources.items()
        for name in list_imports(source)
        if name.removeprefix("tests.") in modules
    ]


def test_no_file_imports_a_test_file() -> None:
    sources = read_sources(TESTS)
    assert "test_suite.py" in sources
    assert find_imported_tests(sources) == []


def test_planted_import_of_a_test_file_is_reported() -> None:
    sources = {
        "build/test_a.py": "SMALL = 1\n",
        "build/test_b.py": "from build.test_a import SMALL\n",
        "plan/test_c.py": "from build import test_a\n",
        "support/d.py": "def read():\n    import tests.build.test_a\n",
        "io/test_e.py": "from support.builds import build\n",
    }
    assert find_imported_tests(sources) == [
        ("build/test_b.py", "build.test_a"),
        ("plan/test_c.py", "build.test_a"),
        ("support/d.py", "tests.build.test_a"),
    ]
