"""The command line: a lazy group with one command per module of commands/.

Exit codes: 0 success, 1 failure, 2 usage or recipe error, 3 missed gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click

from quantkit.library_settings import apply_settings
from quantkit.version import __version__

COMMANDS: Mapping[str, str] = {
    "build": "Quantize a model as a recipe says, measure it, and write the artifact.",
    "cost": "Compare owned and rented GPUs with API prices per million tokens.",
    "diff": "Compare artifact B with A.",
    "doctor": "Check the environment: packages, devices, sandbox, hub, disk.",
    "eval": "Run benchmarks on an artifact, a model or a server.",
    "gate": "Check an artifact against gates.",
    "init": "Print a commented recipe for a model.",
    "key": "Create an API key for the gateway.",
    "loadtest": "Measure a server under increasing load.",
    "plan": "Show what a build would do.",
    "publish": "Verify an artifact and upload it to DEST.",
    "pull": "Download an artifact from SRC and verify it.",
    "report": "Print the fidelity report of an artifact.",
    "runs": "List the artifacts in FOLDER with their key figures.",
    "schema": "Print the JSON Schema of a recipe.",
    "serve": "Verify an artifact, size it, and serve it.",
    "sign": "Check an artifact and sign all of its files.",
    "size": "Estimate the memory and speed of a model.",
    "verify": "Check an artifact against its manifest.",
}
"""Command -> short help, the first sentence of its docstring: `--help` imports no command."""


class LazyGroup(click.Group):
    """A click group that imports a command's module if the command runs or shows its help."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the names of all commands."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the module of a command and return its `command`; None for an unknown name."""
        if cmd_name not in COMMANDS:
            return None
        apply_settings()  # before a command imports torch
        command: click.Command = import_module(f"quantkit.cli.commands.{cmd_name}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the short helps of COMMANDS, without importing any command."""
        with formatter.section("Commands"):
            formatter.write_dl(sorted(COMMANDS.items()))


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """Build a quantized safetensors artifact from a recipe, with a report of what it lost.

    Example: quantkit build tiny-v3-awq4
    """


if __name__ == "__main__":
    main()
