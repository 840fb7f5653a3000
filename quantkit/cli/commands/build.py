"""`quantkit build`: build the artifacts of a recipe. `--help` imports neither torch nor rich."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.cli.console import escape_controls, handle_errors, print_json_list
from quantkit.cli.log_to import LOG_TO, check_tracker_option, log_results
from quantkit.cli.model_target import (
    CHOSEN_FILE,
    add_model_options,
    check_no_recipe_file,
    make_request,
    save_chosen,
    show_choices,
)
from quantkit.cli.options import JSON, JUNIT, SET, TRUST_TASK_CODE, parse_overrides
from quantkit.errors import GateMissed, UsageError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from quantkit.cli.build_log import BuildLog
    from quantkit.cli.rich_output import ProgressBar
    from quantkit.pipeline import BuildResult
    from quantkit.plan.plan import Plan
    from quantkit.plan.recipe_draft import RecipeRequest
    from quantkit.recipe.schema import Recipe


@click.command()
@click.argument("target", metavar="RECIPE|MODEL")
@add_model_options
@SET
@click.option(
    "--output",
    metavar="DIR",
    help="Folder of the artifact, in place of output.path; needed outside the working folder.",
)
@click.option(
    "--recipe",
    "recipe_file",
    type=click.Path(path_type=Path, dir_okay=False),
    help="For a model: the file for its recipe.  [default: recipe.yaml]",
)
@click.option(
    "--overwrite",
    is_flag=True,
    help="Replace the artifact at output.path once the new one is complete.",
)
@click.option(
    "--restart", is_flag=True, help="Discard the progress of an interrupted build and start over."
)
@click.option("--skip-evaluation", is_flag=True, help="Skip the benchmarks; the report says so.")
@click.option("--full", is_flag=True, help="Print every table of the report, not six lines.")
@click.option(
    "--verbose",
    is_flag=True,
    help="Print the log to stderr: every block and module. It is also in OUTPUT.build.log.",
)
@TRUST_TASK_CODE
@LOG_TO
@JUNIT
@JSON
@handle_errors
def command(
    target: str,
    method: str | None,
    scheme: str | None,
    bits: int | None,
    format_name: str | None,
    rules: str | None,
    overrides: tuple[str, ...],
    output: str | None,
    recipe_file: Path | None,
    overwrite: bool,
    restart: bool,
    skip_evaluation: bool,
    full: bool,
    verbose: bool,
    trusted_code: tuple[str, ...],
    tracker: str | None,
    junit: Path | None,
    json_out: bool,
) -> None:
    """Quantize a model as a recipe says, measure it, and write the artifact.

    RECIPE is a file or the name of a recipe that ships with quantkit. MODEL is a folder, a hub id
    (owner/name) or builtin:tiny-v3: a recipe is chosen for it, printed with the reasons, and
    written to recipe.yaml, which builds the same artifact. If a build is interrupted, the same
    command resumes after the last finished block; the bytes are the same. Exits with 3 if a gate is
    missed. A recipe file that writes outside the working folder needs --output or a confirmation.
    Ends with six lines, from verdict to next command; OUTPUT.build.log has each block and module.

    \b
    Example: quantkit build tiny-v3-awq4
             quantkit build ./my-model
             quantkit build Qwen/Qwen3-8B --bits 8 --output artifacts/qwen3-8b
    """
    from quantkit.cli.build_log import log_build
    from quantkit.cli.rich_output import ProgressBar
    from quantkit.pipeline import build_artifacts

    check_tracker_option(tracker)
    request = make_request(target, method, scheme, bits, format_name, rules, output)
    text, parsed = prepare_recipe(request, overrides, recipe_file, quiet=json_out)
    bars, evaluate = sys.stderr.isatty() and not json_out and not verbose, not skip_evaluation
    with log_build(verbose=verbose) as log, ProgressBar(bars) as progress_bar:
        results = build_artifacts(
            parsed,
            text,
            overwrite=overwrite,
            evaluate=evaluate,
            trusted_code=trusted_code,
            on_plan=partial(start_build, log, progress_bar, quiet=json_out, evaluate=evaluate),
            on_progress=progress_bar.update,
            restart=restart,
            on_message=log.show_message,
        )
    write_results(results, junit, json_out, full=full)
    log_and_check_gates(results, tracker)


def prepare_recipe(
    request: RecipeRequest, overrides: tuple[str, ...], recipe_file: Path | None, *, quiet: bool
) -> tuple[str, Recipe]:
    """Return text and recipe of a target; print and write the recipe that is chosen for a model."""
    from quantkit.plan.model_recipe import read_target

    read = read_target(request, parse_overrides(overrides))
    if read.chosen is None:
        check_no_recipe_file(recipe_file, request.model)
        confirm_output(request.model, read.recipe)
        return read.text, read.recipe
    if not quiet:
        show_choices(read.chosen)
    save_chosen(read.text, read.recipe, recipe_file or Path(CHOSEN_FILE))
    return read.text, read.recipe


def start_build(
    log: BuildLog,
    progress_bar: ProgressBar,
    plans: Sequence[Plan],
    *,
    quiet: bool,
    evaluate: bool,
) -> None:
    """Open the log file of a build whose plan is accepted, set the phases of its progress, and
    print the plan.
    """
    from quantkit.cli.rich_output import show
    from quantkit.plan.summary import summarize_plan
    from quantkit.plan.time_estimate import estimate_plan, list_phases
    from quantkit.report.terminal_plan import render_plans

    log.open_file(Path(plans[0].path))
    times = [estimate_plan(plan) for plan in plans]
    progress_bar.set_phases(list_phases(plans, times[0], evaluate=evaluate))
    if not quiet:
        summaries = [summarize_plan(plan, (), time) for plan, time in zip(plans, times)]
        show(render_plans(summaries))


def write_results(
    results: Sequence[BuildResult], junit: Path | None, json_out: bool, *, full: bool
) -> None:
    """Print the reports of artifacts, and write their gates as JUnit XML."""
    from quantkit.cli.rich_output import show
    from quantkit.io.files import write_output
    from quantkit.report.junit import format_junit
    from quantkit.report.terminal import render_results

    if junit:
        write_output(junit, format_junit([result.fidelity for result in results]))
    if json_out:
        print_json_list([result.fidelity.model_dump(mode="json") for result in results])
        return
    for times in dict.fromkeys(format_times(result) for result in results):
        click.echo(times, err=True)
    click.echo()
    show(render_results([(result.path, result.fidelity) for result in results], full=full))


def confirm_output(name: str, recipe: Recipe) -> None:
    """Ask before a recipe file writes outside the working folder; raises UsageError without a
    terminal and without consent.
    """
    from quantkit.recipe.recipe_file import describe_stray_output, find_stray_output

    path = find_stray_output(name, recipe)
    if path is None:
        return
    message = describe_stray_output(name, path)
    if sys.stdin.isatty() and sys.stderr.isatty():
        click.echo(escape_controls(message), err=True)
        if click.confirm("Write there?", default=False, err=True):
            return
    raise UsageError(f"{message}; pass --output DIR, or --set output.path=DIR, to write there")


def format_times(result: BuildResult) -> str:
    """Return the seconds of each step and the peak memory of a build."""
    times = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in result.seconds.items())
    return f"{times}; peak memory {result.peak_bytes / 1e9:.2f} GB"


def log_and_check_gates(results: Sequence[BuildResult], tracker: str | None) -> None:
    """Log artifacts to a tracker, and raise GateMissed if a gate of any of them was missed."""
    log_results(tracker, [result.path for result in results])
    check_gates(results)


def check_gates(results: Sequence[BuildResult]) -> None:
    """Raise GateMissed if a gate of any artifact was missed."""
    missed = [
        (f"{result.path.name}: " if len(results) > 1 else "", gate)
        for result in results
        for gate in result.fidelity.gates
        if gate.ok is False
    ]
    if missed:
        raise GateMissed(
            "; ".join(
                f"{artifact}gate {gate.figure} {gate.bound}: found {gate.value}"
                for artifact, gate in missed
            )
        )
