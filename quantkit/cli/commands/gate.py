"""`quantkit gate`: check an artifact against gates."""

from __future__ import annotations

import json
from pathlib import Path

import click

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.artifact.layout import PLAN
from quantkit.artifact.read_report import read_sealed_report
from quantkit.cli.console import echo, handle_errors, print_json
from quantkit.cli.options import JSON, JUNIT
from quantkit.cli.rich_output import show
from quantkit.errors import ArtifactError, GateMissed, UsageError
from quantkit.io.files import read_json, write_output
from quantkit.recipe.parse import describe_gate_conversions, parse_gates
from quantkit.recipe.recipe_file import read_text_file
from quantkit.recipe.schema import Gate
from quantkit.report import gates, tables, terminal
from quantkit.report.junit import format_junit as junit_bytes


@click.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option(
    "--gates",
    "gates_file",
    type=click.Path(path_type=Path),
    help="A YAML file with `gates:`, e.g. a recipe; default: the artifact's own recipe.",
)
@JUNIT
@JSON
@handle_errors
def command(artifact: Path, gates_file: Path | None, junit: Path | None, json_out: bool) -> None:
    """Check an artifact against gates.

    The gates are those of a file, or of the artifact's recipe. Nothing in the artifact changes.
    Exits with 3 if a gate is missed, or if its figure was never measured; a build with such a gate
    is "not judged" and exits with 0.

    Example: quantkit gate artifacts/tiny-v3-awq4 --gates strict.yaml --junit gates.xml
    """
    if not artifact.is_dir():
        raise UsageError(f"{artifact}: expected an artifact's folder, found none; check the path")
    built, _ = read_sealed_report(artifact)
    bounds, conversions = read_gates(gates_file, artifact, built)
    for sentence in conversions:
        click.echo(sentence, err=True)
    judged = gates.apply_gates(bounds, built)
    if junit:
        write_output(junit, junit_bytes([judged]))
    if json_out:
        results = [gate.model_dump(mode="json") for gate in judged.gates]
        print_json({
            "artifact": str(artifact),
            "status": judged.status,
            "built": built.status,
            "gates": results,
        })
    else:
        show(terminal.render_table(tables.make_gate_table(judged)))
        kept, unproven, missed, unmeasured = (
            sum(gate.outcome == outcome for gate in judged.gates)
            for outcome in ("kept", "kept, not proven", "missed", "not judged")
        )
        counts = (
            f"of {len(judged.gates)} gates {kept} kept, {unproven} kept but not proven, {missed} "
            f"missed, {unmeasured} without a figure"
        )
        echo(f"{artifact}: {judged.status}: {counts} (when built: {built.status})")
    check_gates(judged)


def read_gates(
    file: Path | None, artifact: Path, report: Fidelity
) -> tuple[dict[str, Gate], tuple[str, ...]]:
    """Return the gates of a YAML file, or those of the artifact's recipe, and a sentence for each
    former key among them.

    UsageError if it has none.
    """
    tasks = [row.task for row in report.benchmarks]
    if file is not None:
        text = read_text_file(file)
        return parse_gates(text, str(file), tasks), describe_gate_conversions(text, str(file))
    plan_file = artifact / PLAN
    recipe = read_json(plan_file, ArtifactError).get("recipe")
    own = (
        {key: recipe.get(key) for key in ("gates", "evaluation")}
        if isinstance(recipe, dict)
        else {}
    )
    if not own.get("gates"):
        raise UsageError(
            f"{artifact}: its recipe has no gates; name a file that has some with --gates FILE"
        )
    planned = own["evaluation"].get("tasks") if isinstance(own["evaluation"], dict) else None
    text, name = json.dumps({"gates": own["gates"]}), str(plan_file)
    parsed = parse_gates(text, name, planned if isinstance(planned, list) else tasks)
    return parsed, describe_gate_conversions(text, name)


def check_gates(judged: Fidelity) -> None:
    """Raise GateMissed if a gate is missed or could not be judged."""
    faults = [
        f"gate {gate.figure} {gate.bound}: found {gate.value}"
        for gate in judged.gates
        if gate.ok is False
    ]
    unknown = [
        f"{gate.figure} {gate.bound} ({gate.reason})" for gate in judged.gates if gate.ok is None
    ]
    faults += [f"could not be judged: {', '.join(unknown)}"] if unknown else []
    if faults:
        raise GateMissed("; ".join(faults))
