"""Runs quantkit commands in-process and reads their output."""

from __future__ import annotations

from pathlib import Path

from click.testing import CliRunner, Result
from support.constants import FAST

from quantkit.cli.main import main

RECIPE = "tiny-v3-awq4"


def run(*arguments: str | Path) -> Result:
    """Run a command in this process, and check that it prints no traceback."""
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    assert "Traceback" not in result.output
    return result


def overrides(**changes: object) -> list[str]:
    """Return --set options of a fast build; dotted keys have double underscores."""
    values = {**FAST, **{key.replace("__", "."): str(value) for key, value in changes.items()}}
    return [part for key, value in values.items() for part in ("--set", f"{key}={value}")]


def build(output: Path, *options: str, **changes: object) -> Result:
    """Run a fast build of tiny-v3 without benchmarks."""
    return run(
        "build", RECIPE, "--skip-evaluation", *options, *overrides(output__path=output, **changes)
    )


def read_error(result: Result, code: int) -> str:
    """Return the message of a failed command, and check its exit code and stdout."""
    assert result.exit_code == code, result.output
    assert "error: " not in result.stdout
    *_, message = result.stderr.partition("error: ")
    return message.rstrip("\n")
