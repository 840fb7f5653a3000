"""The command line: a lazy group with one command per module of commands/.

Exit codes: 0 success, 1 failure, 2 usage or recipe error, 3 missed gate.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module

import click

from quantkit.library_settings import apply_settings
from quantkit.version import __version__

GROUPS: Mapping[str, Mapping[str, str]] = {
    "Quantize": {
        "doctor": "Check the environment: packages, devices, sandbox, hub, disk.",
        "init": "Print a commented recipe for a model.",
        "schema": "Print the JSON Schema of a recipe.",
        "plan": "Show what a build would do.",
        "build": "Quantize a model as a recipe says, measure it, and write the artifact.",
    },
    "Judge": {
        "report": "Print the fidelity report of an artifact.",
        "verify": "Check an artifact against its manifest.",
        "gate": "Check an artifact against gates.",
        "diff": "Compare artifact B with A.",
        "runs": "List the artifacts in FOLDER with their key figures.",
        "eval": "Run benchmarks on an artifact, a model or a server.",
    },
    "Hand over": {
        "sign": "Check an artifact and sign all of its files.",
        "publish": "Verify an artifact and upload it to DEST.",
        "pull": "Download an artifact from SRC and verify it.",
    },
    "Serve": {
        "size": "Estimate the memory and speed of a model.",
        "serve": "Verify an artifact, size it, and serve it.",
        "key": "Create an API key for the gateway.",
        "loadtest": "Measure a server under increasing load.",
        "cost": "Compare owned and rented GPUs with API prices per million tokens.",
    },
}
"""Task -> its commands in the order of work, each with its short help, the first sentence of its
docstring: `--help` imports no command."""

COMMANDS: Mapping[str, str] = {
    name: text for commands in GROUPS.values() for name, text in commands.items()
}
"""Command -> short help."""


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
        """Write the short helps by task, with one width of names, without importing any command."""
        width = max(map(len, COMMANDS))
        for task, commands in GROUPS.items():
            with formatter.section(task):
                rows = [(name.ljust(width), text) for name, text in commands.items()]
                formatter.write_dl(rows)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """Build a quantized safetensors artifact from a recipe, with a report of what it lost.

    Example: quantkit build tiny-v3-awq4
    """


if __name__ == "__main__":
    main()
