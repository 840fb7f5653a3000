"""`quantkit gate`: an artifact judged anew."""

from __future__ import annotations

from pathlib import Path

import click

from quantkit.cli.console import as_json, handle_errors, show
from quantkit.cli.options import JSON, JUNIT, read_gates
from quantkit.errors import GateMissed, UsageError


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--gates",
    "gates_file",
    type=click.Path(path_type=Path),
    help="A YAML file with `gates:`, a recipe too; else the artifact's own recipe.",
)
@JUNIT
@JSON
@handle_errors
def COMMAND(artifact: Path, gates_file: Path | None, junit: Path | None, json_out: bool) -> None:
    """Judge an artifact's figures by other gates, or by its recipe's again. Changes nothing in the artifact.

    Exits with 3 when a gate is missed or cannot be judged, because its figure was never measured; a build with such a
    gate is "not judged" and exits with 0.

    Example: quantkit gate artifacts/tiny-v3-awq4 --gates strict.yaml --junit gates.xml
    """
    from quantkit.artifact.read_report import read_sealed_report
    from quantkit.io.files import write_output
    from quantkit.report import gates, tables, terminal
    from quantkit.report.junit import format_junit as junit_bytes

    if not artifact.is_dir():
        raise UsageError(f"{artifact}: expected an artifact's folder, found none; check the path")
    report, _ = read_sealed_report(artifact)
    found = gates.apply_gates(read_gates(gates_file, artifact, report), report)
    missed = [gate for gate in found.gates if gate.ok is False]
    if junit:
        write_output(junit, junit_bytes([found]))
    if json_out:
        results = [gate.model_dump(mode="json") for gate in found.gates]
        as_json({
            "artifact": str(artifact),
            "status": found.status,
            "built": report.status,
            "gates": results,
        })
    else:
        show(terminal.render_table(tables.make_gate_table(found)))
        kept, open_ = (
            sum(gate.ok is True for gate in found.gates),
            sum(gate.ok is None for gate in found.gates),
        )
        told = f"{kept} of {len(found.gates)} gates kept, {len(missed)} missed, {open_} without a figure"
        click.echo(f"{artifact}: {found.status}: {told} (when built: {report.status})")
    faults = [f"gate {gate.figure} {gate.bound}: found {gate.value}" for gate in missed]
    unknown = [
        f"{gate.figure} {gate.bound} ({gate.reason})" for gate in found.gates if gate.ok is None
    ]
    faults += [f"could not be judged: {', '.join(unknown)}"] if unknown else []
    if faults:
        raise GateMissed("; ".join(faults))
