"""`quantkit build`: the artifact of a recipe."""

from __future__ import annotations

import sys
from pathlib import Path

import click

from quantkit.cli.console import ProgressBar, as_json_list, handle_errors, show
from quantkit.cli.options import JSON, JUNIT, SET, read_recipe
from quantkit.errors import GateMissed


@click.command()
@click.argument("recipe")
@SET
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace an artifact under output.path once the new one is done.",
)
@click.option(
    "--restart", is_flag=True, help="Drop what an interrupted build has done, and begin anew."
)
@click.option(
    "--skip-evaluation", is_flag=True, help="Leave the benchmarks out; the report says so."
)
@JUNIT
@JSON
@handle_errors
def COMMAND(
    recipe: str,
    overrides: tuple[str, ...],
    overwrite: bool,
    restart: bool,
    skip_evaluation: bool,
    junit: Path | None,
    json_out: bool,
) -> None:
    """Plan, quantize, measure and report: make the artifact of a recipe.

    RECIPE is a file or the name of one that ships with quantkit. Interrupted, the same command goes on behind the last
    finished block and ends with the same bytes. Exits with 3 when a gate is missed.

    Example: quantkit build tiny-v3-awq4
    """
    from quantkit.io.files import write_output
    from quantkit.pipeline import build_artifacts
    from quantkit.plan.summary import summarize_plan
    from quantkit.report.junit import format_junit as junit_bytes
    from quantkit.report.terminal import render_plans, render_reports

    text, parsed = read_recipe(recipe, overrides)
    with ProgressBar(sys.stderr.isatty() and not json_out) as meter:
        outcomes = build_artifacts(
            parsed,
            text,
            overwrite=overwrite,
            evaluate=not skip_evaluation,
            on_plan=lambda plans: (
                None if json_out else show(render_plans([summarize_plan(made) for made in plans]))
            ),
            on_progress=meter.tell,
            restart=restart,
            on_message=lambda told: click.echo(told, err=True),
        )
    if junit:
        write_output(junit, junit_bytes([outcome.fidelity for outcome in outcomes]))
    if json_out:
        as_json_list([outcome.fidelity.model_dump(mode="json") for outcome in outcomes])
    else:
        show(render_reports([outcome.fidelity for outcome in outcomes]))
        for outcome in outcomes:
            told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.seconds.items())
            peak = f"peak memory {outcome.peak_bytes / 1e9:.2f} GB"
            click.echo(f"{outcome.path}: {outcome.fidelity.status} ({told}; {peak})")
    missed = [
        (o.path.name, gate) for o in outcomes for gate in o.fidelity.gates if gate.ok is False
    ]
    if missed:
        of = {name: f"{name}: " if len(outcomes) > 1 else "" for name, _ in missed}
        raise GateMissed(
            "; ".join(f"{of[name]}gate {g.figure} {g.bound}: found {g.value}" for name, g in missed)
        )
