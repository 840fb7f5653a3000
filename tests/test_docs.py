"""The README cannot fall behind: every command, recipe, make target and plug-in folder it should name is in it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from quantkit.cli.main import main

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
TARGETS = re.findall(
    r"^([a-z-]+):.*##", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE
)


@pytest.mark.parametrize("command", sorted(main.commands))
def test_every_command_is_in_the_readme(command: str) -> None:
    assert re.search(rf"quantkit {command}\b", README)


@pytest.mark.parametrize("recipe", sorted(path.stem for path in (ROOT / "recipes").glob("*.yaml")))
def test_every_recipe_is_in_the_readme(recipe: str) -> None:
    assert f"`{recipe}`" in README


@pytest.mark.parametrize(
    "target", [target for target in TARGETS if target not in {"help", "clean", "wheel", "bench"}]
)
def test_every_target_is_in_the_readme(target: str) -> None:
    assert f"make {target}" in README


def test_every_file_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_every_module_the_readme_names_exists() -> None:
    named = set(re.findall(r"`([a-z_]+\.py)`", README))
    present = {path.name for path in (ROOT / "quantkit").rglob("*.py")}
    assert len(named) > 10
    assert named <= present
