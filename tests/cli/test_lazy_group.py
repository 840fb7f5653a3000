"""The lazy group lists every command with its short help, and imports a command only if used."""

from __future__ import annotations

import os
import pkgutil
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import click
import pytest
from support.command_line import run
from support.paths import ROOT

from quantkit.cli import commands
from quantkit.cli.main import COMMANDS, main

MODULES = sorted(module.name for module in pkgutil.iter_modules(commands.__path__))
HEAVY = {"torch", "transformers", "lm_eval", "vllm"}


def test_every_module_is_a_listed_command() -> None:
    assert MODULES == sorted(COMMANDS) == main.list_commands(click.Context(main))


@pytest.mark.parametrize("name", MODULES)
def test_short_help_is_the_first_sentence_of_the_docstring(name: str) -> None:
    command = import_module(f"quantkit.cli.commands.{name}").command
    assert COMMANDS[name].rstrip(".") == command.get_short_help_str(limit=200).rstrip(".")


def test_help_lists_every_command_with_its_short_help() -> None:
    result = run("--help")
    assert result.exit_code == 0
    listed = " ".join(result.stdout.partition("Options:")[2].split())
    for name, short_help in COMMANDS.items():
        assert f"{name} {short_help}" in listed
    headings = re.findall(r"^(\w[\w ]*):$", result.stdout, flags=re.MULTILINE)
    assert headings == ["Options", "Quantize", "Judge", "Hand over", "Serve"]


@pytest.mark.parametrize("name", MODULES)
def test_help_ends_with_an_example(name: str) -> None:
    command = import_module(f"quantkit.cli.commands.{name}").command
    *_, last = (command.help or "").strip().split("\n\n")
    assert last.lstrip(" \b\n").startswith(f"Example: quantkit {name}")


def imported_by(arguments: list[str]) -> set[str]:
    """Return the modules that a command imports, in a process of its own."""
    program = (
        "import sys; from quantkit.cli.main import main\n"
        f"main({arguments!r}, standalone_mode=False)\n"
        "print(); print(*sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize("name", MODULES)
def test_help_of_a_command_imports_neither_torch_nor_other_commands(name: str) -> None:
    modules = imported_by([name, "--help"])
    assert not HEAVY & modules
    imported = {module.rpartition(".")[2] for module in modules if ".cli.commands." in module}
    assert imported == {name}


def test_group_help_imports_no_command() -> None:
    assert not [module for module in imported_by(["--help"]) if ".cli.commands." in module]


def test_unknown_command_is_a_usage_error() -> None:
    result = run("bild")
    assert result.exit_code == 2
    assert "No such command 'bild'" in result.stderr


def test_plan_of_a_model_that_is_not_here_does_not_import_transformers(tmp_path: Path) -> None:
    code = (
        "import sys; from quantkit.cli.main import main\n"
        "try: main(['plan', 'v3-awq4'])\n"
        "except SystemExit as end: assert not end.code, end.code\n"
        "assert 'transformers' not in sys.modules"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
