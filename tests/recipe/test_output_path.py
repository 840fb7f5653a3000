"""A recipe file alone writes below the working folder only."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner
from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint
from support.command_line import read_error, run

import quantkit
from quantkit.cli.commands import build
from quantkit.errors import UsageError
from quantkit.recipe.recipe_file import find_stray_output, read_recipe


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder, which holds links, next to a home with Python's user folder."""
    place, site = tmp_path / "place", tmp_path / "home/.local/lib/python3.11/site-packages"
    for folder in (place / "artifacts", site):
        folder.mkdir(parents=True)
    (place / "out").symlink_to("../home")
    (place / "inside").symlink_to("artifacts")
    monkeypatch.chdir(place)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return place


def write_recipe(place: Path, path: str) -> Path:
    """Write a recipe with an output."""
    text = make_recipe_text(
        "builtin:tiny-v3", Path("unused"), output=json.dumps({"path": path}), fidelity="none"
    )
    (place / "r.yaml").write_text(text)
    return place / "r.yaml"


STRAY = (
    "~/.local/lib/python3.11/site-packages/own", "../x", "/tmp/x", "a/../../x", "out/x", ".", "..x",
    "inside/../../x", ".local/lib/python3.11/site-packages", "a/.hidden/x", ".git",
)  # fmt: skip
PLAIN = ("x", "artifacts/x", "./a/b/../c", "inside/x", "a.b")


@pytest.mark.parametrize("path", STRAY)
def test_recipe_file_that_writes_elsewhere_is_refused(path: str, place: Path) -> None:
    """With `..`, `~` and links resolved; a hidden folder is no place for an artifact either."""
    recipe = write_recipe(place, path)
    before = sorted(place.parent.rglob("*"))
    message = read_error(run("build", recipe), 2)
    assert "output.path: expected a folder below the working folder" in message or (
        "output.path: expected a folder with a name of its own" in message
    )
    assert "\n" not in message
    assert sorted(place.parent.rglob("*")) == before


@pytest.mark.parametrize("path", PLAIN)
def test_recipe_file_writes_below_the_working_folder(path: str, place: Path) -> None:
    name = str(write_recipe(place, path))
    assert find_stray_output(name, read_recipe(name, {})[1]) is None


@pytest.mark.parametrize("option", [["--output"], ["--set", "output.path="]])
def test_command_line_may_name_any_folder(option: list[str], place: Path, tmp_path: Path) -> None:
    """The person who runs the command chooses; the artifact does not record the path."""
    source = write_checkpoint(tmp_path / "source", make_tiny_config("llama", num_hidden_layers=1))
    text = make_recipe_text(
        source, Path("/nowhere"), fidelity="none", calibration="null", rules="all-linear",
        quantize="{method: rtn, bits: 4, group_size: 64}",
    )  # fmt: skip
    (place / "r.yaml").write_text(text)
    target = str(tmp_path / "chosen")
    chosen = [*option, target] if option == ["--output"] else [option[0], option[1] + target]
    result = run("build", "r.yaml", "--skip-evaluation", *chosen)
    assert result.exit_code == 0, result.output
    assert (tmp_path / "chosen" / "recipe.yaml").read_text() == text.replace("/nowhere", "chosen")


def test_shipped_recipes_write_below_the_working_folder(place: Path) -> None:
    """They are trusted, and need no option."""
    for path in (Path(quantkit.__file__).parents[1] / "recipes").glob("*.yaml"):
        assert find_stray_output(path.stem, read_recipe(path.stem, {})[1]) is None
        assert find_stray_output(str(path), read_recipe(str(path), {})[1]) is None


@pytest.mark.parametrize(("answer", "writes"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_terminal_asks_before_it_writes_elsewhere(
    answer: str, writes: bool, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import click

    recipe = str(write_recipe(place, "../x"))

    @click.command()
    def ask() -> None:
        monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
        monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
        build.confirm_output(recipe, read_recipe(recipe, {})[1])

    result = CliRunner().invoke(ask, input=answer)
    assert "expected a folder below the working folder" in result.stderr
    if writes:
        assert result.exit_code == 0, result.output
    else:
        assert isinstance(result.exception, UsageError)
        assert "; pass --output DIR, or --set" in str(result.exception)


def test_python_function_refuses_a_file_and_takes_an_override(place: Path) -> None:
    recipe = write_recipe(place, "../x")
    with pytest.raises(UsageError, match=r"pass output=DIR to write there"):
        quantkit.build(recipe)
    name = str(recipe)
    assert find_stray_output(name, read_recipe(name, {"output.path": "/anywhere/x"})[1]) is None
