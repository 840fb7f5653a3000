"""Documentation is true: every command, recipe, make target, link and module that the pages name
exists.
"""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import pytest
from support.paths import ROOT

from quantkit.cli.main import main

README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = sorted(
    path
    for path in [
        *ROOT.glob("*.md"),
        *(
            page
            for folder in ("quantkit", "recipes", "calibration", "evals", "tests")
            for page in (ROOT / folder).rglob("*.md")
        ),
    ]
    if "golden" not in path.parts
)
TARGETS = re.findall(
    r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
)
UNDOCUMENTED_TARGETS = {"help", "clean"}
MAX_README_LINES = 150


def page_id(path: Path) -> str:
    """Return the page's path from the root."""
    return path.relative_to(ROOT).as_posix()


def read_page(path: Path) -> str:
    """Return the text of a page."""
    return path.read_text(encoding="utf-8")


@pytest.mark.parametrize("command", sorted(main.list_commands(None)))  # type: ignore[arg-type]
def test_readme_names_command(command: str) -> None:
    assert re.search(rf"quantkit {command}\b", README)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_readme_names_recipe(recipe: str) -> None:
    assert f"`{recipe}`" in README


@pytest.mark.parametrize("target", sorted({*TARGETS} - UNDOCUMENTED_TARGETS))
def test_pages_name_make_target(target: str) -> None:
    assert any(re.search(rf"make {target}\b", read_page(page)) for page in PAGES)


def test_readme_is_short() -> None:
    assert len(README.splitlines()) <= MAX_README_LINES


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_names_existing_commands(page: Path) -> None:
    """`quantkit NAME` in an indented block or in backticks."""
    blocks = re.findall(r"^    (.*)$|`([^`\n]+)`", read_page(page), flags=re.MULTILINE)
    names = {
        match[1] for block in blocks if (match := re.match(r"quantkit ([a-z]+)\b", "".join(block)))
    }
    assert names <= {*main.list_commands(None), "serve"}  # type: ignore[arg-type]


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_names_existing_make_targets(page: Path) -> None:
    """`make NAME` at the start of a code span or an indented line; NAME may end in `*`."""
    names = re.findall(r"(?:^    |`)make ([a-z-]+)(\*?)", read_page(page), flags=re.MULTILINE)
    known = set(re.findall(r"^([a-z-]+):", read_page(ROOT / "Makefile"), flags=re.MULTILINE))
    for name, star in names:
        assert name in known or (star and any(target.startswith(name) for target in known)), name


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_links_to_existing_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#\s]+)(?:#[^)]*)?\)", read_page(page))
    local = [link for link in links if not re.match(r"[a-z]+://", link)]
    assert [link for link in local if not (page.parent / link).exists()] == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_page_names_existing_modules(page: Path) -> None:
    """Every `name.py` and `folder/` in backticks is in the repository."""
    text = read_page(page)
    files = {path.relative_to(ROOT).as_posix() for path in ROOT.rglob("*.py")}
    for name in re.findall(r"`([a-z0-9_/]+\.py)`", text):
        assert any(file == name or file.endswith(f"/{name}") for file in files), name


def test_pytest_collects_every_folder(pytestconfig: pytest.Config) -> None:
    """pytest leaves out folders called "build" unless it is configured otherwise."""
    files = (ROOT / "tests").rglob("test_*.py")
    folders = {part for path in files for part in path.relative_to(ROOT).parent.parts}
    patterns = pytestconfig.getini("norecursedirs")
    assert "build" in folders
    assert not [x for x in folders if any(fnmatch(x, pattern) for pattern in patterns)]
