"""The command line: the only place that prints, exits and turns errors into text.

Data goes to stdout, progress to stderr. Exit codes: 0 done, 1 a failure, 2 usage or recipe, 3 a missed gate.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

import click

from quantkit import __version__
from quantkit.errors import GateMissed, QuantkitError, UsageError
from quantkit.verify import verify as verify_artifact

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quantkit.build import Progress
    from quantkit.schema import Recipe

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

REPRODUCIBLE = {"MKL_CBWR": "AVX2,STRICT", "CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
"""What the linear algebra libraries must be told before they load, so that the number of threads changes no bit."""


def failing_well(command: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Turn quantkit's own errors into one message and their exit code."""

    @wraps(command)
    def run(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:  # a decorator's relay, typed by ParamSpec
        try:
            return command(*args, **kwargs)
        except QuantkitError as error:
            click.echo(f"error: {error}", err=True)
            sys.exit(error.exit_code)
        except KeyboardInterrupt:
            click.echo("interrupted", err=True)
            sys.exit(130)

    return run


def read_recipe(name: str, overrides: Iterable[str]) -> tuple[str, Recipe]:
    """The text of a recipe file, or of a recipe that ships with quantkit, and what it says."""
    from quantkit.recipe import parse
    from quantkit.storage.builtin import folder

    path = Path(name)
    if not path.is_file() and not path.suffix:
        path = folder("recipes") / f"{name}.yaml"
    if not path.is_file():
        known = ", ".join(sorted(found.stem for found in folder("recipes").glob("*.yaml")))
        raise UsageError(f"{name}: no such recipe file; recipes that ship with quantkit: {known}")
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{name}: expected a UTF-8 text file, found: {error}; check the file") from error
    pairs = [entry.partition("=") for entry in overrides]
    if any(not separator for _, separator, _ in pairs):
        raise UsageError("--set: expected KEY=VALUE, e.g. --set output.path=artifacts/other")
    return text, parse(text, name, {key: value for key, _, value in pairs})


def show(*renderables: RenderableType) -> None:
    """Print to stdout, 100 columns wide when it is not a terminal."""
    from rich.console import Console

    console = Console() if sys.stdout.isatty() else Console(width=100)
    for renderable in renderables:
        console.print(renderable)


def as_json_list(found: list[Any]) -> None:
    """Print what a recipe gives: one object, or a list of them when it names several formats."""
    as_json(found[0] if len(found) == 1 else found)


def as_json(values: Any) -> None:
    """Print JSON to stdout."""
    click.echo(json.dumps(values, indent=1, ensure_ascii=False))


class Meter:
    """Progress with ETA on stderr: a bar per stage on a terminal, a line per tenth of a stage elsewhere."""

    def __init__(self, bars: bool) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars

        columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f} %"))
        times = (TextColumn("elapsed"), TimeElapsedColumn(), TextColumn("left"), TimeRemainingColumn())
        console = Console(stderr=True)
        self._bars = Bars(*columns, *times, TextColumn("{task.fields[note]}"), console=console) if bars else None
        self._tasks: dict[str, TaskID] = {}
        self._tenths: dict[str, int] = {}

    def __enter__(self) -> Meter:
        if self._bars:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bars:
            self._bars.stop()

    def tell(self, progress: Progress) -> None:
        """Show how far a stage is."""
        if self._bars:
            task = self._tasks.get(progress.stage)
            if task is None:
                task = self._tasks[progress.stage] = self._bars.add_task(progress.stage, note="")
            self._bars.update(task, completed=progress.done, total=progress.total, note=progress.note)
            return
        tenth = int(10 * progress.done / progress.total) if progress.total else 10
        if tenth > self._tenths.get(progress.stage, 0):
            self._tenths[progress.stage] = tenth
            click.echo(f"{progress.stage}: {10 * tenth} % {progress.note}".rstrip(), err=True)


SET = click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE", help="Override a key of the recipe.")
JSON = click.option("--json", "json_out", is_flag=True, help="Print JSON for machines instead of tables.")


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="quantkit")
def main() -> None:
    """One recipe in, one quantized safetensors artifact out, with the evidence of what it lost.

    Example: quantkit build tiny-v3-awq4
    """
    for name, value in REPRODUCIBLE.items():
        os.environ.setdefault(name, value)


@main.command()
@click.argument("recipe")
@SET
@JSON
@failing_well
def plan(recipe: str, overrides: tuple[str, ...], json_out: bool) -> None:
    """Show what a build would do, from headers or the published config alone.

    RECIPE is a file or the name of one that ships with quantkit.

    Example: quantkit plan v3-awq4
    """
    from quantkit.report.terminal import plans_view
    from quantkit.sources import facts, plan_recipe, text_tokens
    from quantkit.summary import plan_summary

    _, parsed = read_recipe(recipe, overrides)
    found = [plan_summary(made) for made in plan_recipe(parsed, facts(parsed), text_tokens(parsed))]
    if json_out:
        as_json_list([summary.model_dump(mode="json") for summary in found])
    else:
        show(plans_view(found))


@main.command()
@click.argument("recipe")
@SET
@click.option("--overwrite", is_flag=True, help="Replace an artifact under output.path once the new one is done.")
@click.option("--skip-evaluation", is_flag=True, help="Leave the benchmarks out; the report says so.")
@JSON
@failing_well
def build(recipe: str, overrides: tuple[str, ...], overwrite: bool, skip_evaluation: bool, json_out: bool) -> None:
    """Plan, quantize, measure and report: make the artifact of a recipe.

    RECIPE is a file or the name of one that ships with quantkit. Exits with 3 when a gate is missed.

    Example: quantkit build tiny-v3-awq4
    """
    from quantkit.pipeline import run
    from quantkit.report.terminal import fidelities_view, plans_view
    from quantkit.summary import plan_summary

    text, parsed = read_recipe(recipe, overrides)
    with Meter(sys.stderr.isatty() and not json_out) as meter:
        outcomes = run(
            parsed,
            text,
            overwrite=overwrite,
            evaluate=not skip_evaluation,
            planned=lambda plans: None if json_out else show(plans_view([plan_summary(made) for made in plans])),
            tell=meter.tell,
        )
    if json_out:
        as_json_list([outcome.fidelity.model_dump(mode="json") for outcome in outcomes])
    else:
        show(fidelities_view([outcome.fidelity for outcome in outcomes]))
        for outcome in outcomes:
            told = ", ".join(f"{name} {seconds:.1f} s" for name, seconds in outcome.seconds.items())
            peak = f"peak memory {outcome.peak_bytes / 1e9:.2f} GB"
            click.echo(f"{outcome.path}: {outcome.fidelity.status} ({told}; {peak})")
    missed = [(o.path.name, gate) for o in outcomes for gate in o.fidelity.gates if gate.ok is False]
    if missed:
        of = {name: f"{name}: " if len(outcomes) > 1 else "" for name, _ in missed}
        raise GateMissed("; ".join(f"{of[name]}gate {g.figure} {g.bound}: found {g.value}" for name, g in missed))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@click.option("--html", "html_out", is_flag=True, help="Make quantkit/fidelity.html again, the page for people.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the page here, not into the artifact.")
@JSON
@failing_well
def report(artifact: Path, html_out: bool, output: Path | None, json_out: bool) -> None:
    """Print an artifact's fidelity report again, or make its page again.

    Example: quantkit report artifacts/tiny-v3-awq4 --html --output review.html
    """
    from quantkit.report.read import read_report
    from quantkit.report.terminal import fidelity_view

    if output and not html_out:
        raise UsageError("--output: expected --html with it; tables and JSON go to the standard output")
    if html_out:
        from quantkit.report.html import rebuild

        page = rebuild(artifact, output)
        as_json({"html": str(page)}) if json_out else click.echo(page)
        return
    found = read_report(artifact)
    if json_out:
        as_json(found.model_dump(mode="json"))
    else:
        show(fidelity_view(found))


@main.command()
@click.argument("artifact", type=click.Path(path_type=Path))
@JSON
@failing_well
def verify(artifact: Path, json_out: bool) -> None:
    """Check every hash, header, index entry and the config of an artifact against its manifest.

    Example: quantkit verify artifacts/tiny-v3-awq4
    """
    found = verify_artifact(artifact)
    told = {"status": found.status, "files": found.files, "tensors": found.tensors, "bytes": found.n_bytes}
    if json_out:
        as_json({"artifact": str(artifact), "ok": True, **told})
    else:
        click.echo(
            f"{artifact}: ok ({found.files} files, {found.tensors} tensors, {found.n_bytes / 1e6:.1f} MB, "
            f"{found.status})"
        )


if __name__ == "__main__":
    main()
