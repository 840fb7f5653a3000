"""The command on card and page builds the same bytes, from an empty folder, in a shell."""

from __future__ import annotations

import html
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from support.checkpoints import make_plan, make_recipe_text, make_tiny_config, write_checkpoint
from support.command_line import overrides, run
from support.constants import FAST
from support.report_variants import make_example

import quantkit
from quantkit.artifact.layout import MODEL_CARD, PAGE, RECIPE, TIMINGS
from quantkit.artifact.read_report import read_report
from quantkit.io.package_data import locate_folder
from quantkit.plan.plan import Plan
from quantkit.recipe.parse import parse_recipe
from quantkit.recipe.resolved_text import resolve_recipe_text
from quantkit.report import card, reproduce

MODEL_SETTINGS = [
    part
    for key, value in FAST.items()
    if key.partition(".")[0] in {"fidelity", "compute", "output"}
    for part in ("--set", f"{key}={value}")
]


def read_card_command(artifact: Path) -> str:
    """Return the command of the card, as a reader copies it."""
    heading = "Reproduce the artifact in an empty folder:\n"
    section = (artifact / MODEL_CARD).read_text().split(heading, 1)[1]
    block = re.search(r"^(`{3,})bash\n(.*?)\n\1$", section, re.DOTALL | re.MULTILINE)
    assert block is not None
    return block[2]


def read_page_command(artifact: Path) -> str:
    """Return the command of the page, as its button copies it."""
    section = (artifact / PAGE).read_text().split("<h3>Reproduce</h3>", 1)[1]
    return html.unescape(section.split("<pre><code>", 1)[1].split("</code>", 1)[0])


def hash_files(artifact: Path) -> dict[str, bytes]:
    """Return the content of every file that has the same bytes in two builds."""
    files = {
        path.relative_to(artifact).as_posix(): path.read_bytes()
        for path in artifact.rglob("*")
        if path.is_file()
    }
    files.pop(TIMINGS)
    return files


def run_in_shell(command: str, folder: Path) -> None:
    """Run a command in a shell as a user would, with this quantkit as `quantkit`."""
    tools = folder.with_name(f"{folder.name}-tools")
    tools.mkdir()
    root = Path(quantkit.__file__).parents[1]
    script = f'#!/bin/sh\nPYTHONPATH={root} exec {sys.executable} -m quantkit "$@"\n'
    (tools / "quantkit").write_text(script)
    (tools / "quantkit").chmod(0o755)
    folder.mkdir()
    environment = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}"}
    done = subprocess.run(
        ["bash", "-c", command], cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def check_rebuild(artifact: Path, folder: Path) -> None:
    """Run the command of card and page in an empty folder and compare every file."""
    command = read_card_command(artifact)
    assert command == read_page_command(artifact) == read_report(artifact).command
    run_in_shell(command, folder)
    (again,) = (path.parent for path in folder.rglob(RECIPE) if path.parent.name != "recipes")
    expected, actual = hash_files(artifact), hash_files(again)
    assert actual.keys() == expected.keys()
    assert [name for name in expected if actual[name] != expected[name]] == []


def test_build_with_overrides_is_made_again_from_an_empty_folder(tmp_path: Path) -> None:
    """Under another name, with benchmarks skipped and every kind of override."""
    (tmp_path / "a").mkdir()
    options = overrides(output__path=tmp_path / "a" / "mine", gates="{kl_mean: {max: 1e9}}")
    done = run("build", "tiny-v3-awq4", "--skip-evaluation", *options)
    assert done.exit_code == 0, done.output
    check_rebuild(tmp_path / "a" / "mine", tmp_path / "empty")


def test_build_of_a_model_is_made_again_from_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The recipe was chosen; the output folder is no part of the artifact."""
    source = write_checkpoint(tmp_path / "model", make_tiny_config("llama", num_hidden_layers=1))
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    options = ["--set", "fidelity.set=tiny-v3-heldout", "--output", str(tmp_path / "b" / "mine")]
    done = run("build", source, "--method", "rtn", "--skip-evaluation", *MODEL_SETTINGS, *options)
    assert done.exit_code == 0, done.output
    artifact = tmp_path / "b" / "mine"
    assert str(tmp_path / "b") not in (artifact / RECIPE).read_text()
    assert read_report(artifact).needs == (f"{source} (the folder of the source)",)
    shown = (artifact / MODEL_CARD).read_text()
    assert f"put {source} (the folder of the source) of the machine" in shown
    check_rebuild(artifact, tmp_path / "empty")


def make_shipped_plan(tmp_path: Path, text: str, **keys: str) -> Plan:
    """Return a plan whose recipe has this text and overrides."""
    plan = make_plan(write_checkpoint(tmp_path / "model", make_tiny_config("llama")))
    return replace(plan, recipe=parse_recipe(text, "r.yaml", keys))


def test_shipped_recipe_is_named_and_options_are_kept(tmp_path: Path) -> None:
    text = (locate_folder("recipes") / "tiny-v3-awq4.yaml").read_text()
    plan = make_shipped_plan(tmp_path, text)

    def make(plan: Plan, evaluate: bool = True, *codes: str) -> str:
        return reproduce.make_build_command(text, plan, evaluate=evaluate, trusted_code=codes).text

    assert make(plan) == "quantkit build tiny-v3-awq4"
    assert make(plan, False) == "quantkit build tiny-v3-awq4 --skip-evaluation"
    assert make(plan, True, "ab" * 32).endswith(f" --trust-task-code {'ab' * 32}")
    named = make_shipped_plan(tmp_path, text, **{"output.path": "/far/away/x y"})
    assert make(named) == "quantkit build tiny-v3-awq4 --output 'x y'"
    changed = make(make_shipped_plan(tmp_path, text, **{"quantize.bits": "8"}))
    assert changed.startswith("cat > tiny-v3-awq4.yaml <<'EOF'\n# yaml-language-server")
    assert "\n  bits: 8\n" in changed
    assert changed.endswith("\nEOF\nquantkit build tiny-v3-awq4.yaml")


@pytest.mark.parametrize(
    "line", ["# ```", "# $HOME `id` $(id) \\ ' \"", "# \t|<b>&amp;*", "# 雪", "# EOF"]
)
def test_recipe_in_the_command_is_not_changed_by_shell_or_markdown(
    line: str, tmp_path: Path
) -> None:
    """A hostile or odd line reaches the recipe as it is, and ends nothing."""
    text = f"{make_recipe_text('org/name', Path('out'))}{line}\n"
    plan = make_shipped_plan(tmp_path, text)
    command = reproduce.make_build_command(text, plan, evaluate=True, trusted_code=()).text
    (tmp_path / "shown").mkdir()
    report = make_example({"command": command})
    (tmp_path / "shown" / MODEL_CARD).write_text(card.render_card(report))
    assert read_card_command(tmp_path / "shown") == command
    folder = tmp_path / "run"
    folder.mkdir()
    before, _ = command.rsplit("\n", 1)
    subprocess.run(["bash", "-c", before], cwd=folder, check=True)
    assert (folder / "out.yaml").read_text() == text


def test_delimiter_is_no_line_of_the_recipe() -> None:
    assert reproduce.choose_delimiter("a: EOF\n") == "EOF"
    assert reproduce.choose_delimiter("a: 'b\nEOF\nEOF_\n'\n") == "EOF__"


@pytest.mark.parametrize("line", ["# \u202e", f"# {'long ' * 5_000}"], ids=["bidi", "long"])
def test_recipe_that_no_page_can_show_is_read_from_the_artifact(line: str, tmp_path: Path) -> None:
    text = f"{make_recipe_text('org/name', Path('out'))}{line}\n"
    plan = make_shipped_plan(tmp_path, text)
    built = reproduce.make_build_command(text, plan, evaluate=True, trusted_code=())
    command, needs = built.text, built.needs
    assert command == "quantkit build ./out/recipe.yaml --output again/out"
    assert needs[0] == "./out/recipe.yaml (the recipe in this artifact)"


def test_artifact_recipe_says_what_was_resolved(tmp_path: Path) -> None:
    """Commit, chosen sets and a path of this machine; a recipe that says them is kept."""
    text = make_recipe_text(
        "org/name", Path("/home/me/out"), calibration="{set: auto}", fidelity="{set: auto}"
    )
    chosen = {use: ("tiny-v3", "no hub") for use in ("calibration", "fidelity")}
    recipe = parse_recipe(text, "r.yaml").choose_texts(chosen).pin_source("0" * 40)
    resolved = resolve_recipe_text(text.replace("\n", "\r\n"), recipe)
    again = parse_recipe(resolved, "r.yaml")
    assert again.source.revision == "0" * 40 and again.hash == recipe.hash
    assert again.calibration is not None and again.calibration.set == "tiny-v3"
    assert again.output.path == "out" and "/home/me" not in resolved and "\r" not in resolved
    assert resolve_recipe_text(resolved, again) == resolved


def test_needs_name_the_local_files_alone(tmp_path: Path) -> None:
    text = make_recipe_text("org/name", Path("out"), calibration="{set: mine.jsonl, sequences: 8}")
    plan = make_shipped_plan(tmp_path, text)
    source = str(tmp_path / "model")
    assert reproduce.list_local_files(plan) == (
        f"{source} (the folder of the source)",
        "mine.jsonl (calibration text)",
    )
    hub = replace(plan, source=replace(plan.source, revision="0" * 40))
    assert reproduce.list_local_files(hub) == ("mine.jsonl (calibration text)",)
    builtin = replace(plan, source=replace(plan.source, model="builtin:tiny-v3"))
    assert reproduce.list_local_files(builtin) == ("mine.jsonl (calibration text)",)
