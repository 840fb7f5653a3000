"""`quantkit eval`: run benchmarks on any backend."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from ruamel.yaml import YAML

from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON, TRUST_TASK_CODE
from quantkit.cli.rich_output import ProgressBar, show
from quantkit.errors import EvaluationError, UsageError
from quantkit.report.terminal import render_table

if TYPE_CHECKING:
    from quantkit.evaluate.options import EvaluationOptions
    from quantkit.evaluate.results import EvaluationResult


@click.command()
@click.argument("artifact")
@click.option(
    "--tasks",
    multiple=True,
    metavar="NAME[,NAME]",
    help="math, code, general, a task or a task's YAML file.",
)
@click.option(
    "--backend",
    type=click.Choice(["transformers", "vllm", "openai"]),
    default="transformers",
    help="The program that runs the model.",
)
@click.option(
    "--endpoint", metavar="URL", help="openai: the server's API, e.g. http://localhost:8000/v1."
)
@click.option(
    "--model", metavar="NAME", help="openai: the served model's name; default: the only one."
)
@click.option(
    "--concurrency", type=click.IntRange(1), default=16, help="openai: concurrent requests (16)."
)
@click.option(
    "--tries", type=click.IntRange(1), default=8, help="openai: attempts per request (8)."
)
@click.option(
    "--timeout",
    type=click.FloatRange(0.1),
    default=600,
    help="openai: seconds without a byte before a request fails (600).",
)
@click.option(
    "--key-variable",
    default="OPENAI_API_KEY",
    help="openai: environment variable with the API key (OPENAI_API_KEY).",
)
@click.option(
    "--engine",
    multiple=True,
    metavar="KEY=VALUE",
    help="vllm: an engine argument, e.g. max_model_len=4096.",
)
@click.option(
    "--native",
    is_flag=True,
    help="transformers: use its kernels for the format instead of unpacked weights.",
)
@click.option(
    "--device-map", default="", help="transformers: auto, balanced, sequential or a device."
)
@click.option("--dtype", default="", help="transformers: bfloat16, float16 or float32.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, help="transformers: items per batch (64)."
)
@click.option("--limit", type=click.IntRange(1), help="Run the first N items of each task only.")
@click.option(
    "--chat-template", is_flag=True, help="Apply the model's chat template to the prompts."
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, help="Answers per item, averaged per item."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Nucleus sampling: share of probability kept.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Tokens per answer; default: the task's limit."
)
@click.option(
    "--think-end",
    default="",
    metavar="TEXT",
    help="Score only the text after this marker, e.g. '</think>'.",
)
@click.option(
    "--source",
    is_flag=False,
    flag_value="",
    metavar="[MODEL]",
    help="Run the source model too, and compare.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Compare with the results in the folder of an earlier evaluation.",
)
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    help="Folder of the results; default: ARTIFACT.eval.",
)
@click.option(
    "--resume", is_flag=True, help="Continue an interrupted evaluation; stored answers are reused."
)
@TRUST_TASK_CODE
@JSON
@handle_errors
def command(  # noqa: PLR0913  # one parameter per option
    artifact: str, tasks: tuple[str, ...], backend: Any, endpoint: str | None, model: str | None,
    concurrency: int, tries: int, timeout: float, key_variable: str, engine: tuple[str, ...],
    native: bool, device_map: str, dtype: str, batch_size: int, limit: int | None,
    chat_template: bool, seeds: int, temperature: float, top_p: float, max_tokens: int | None,
    think_end: str, source: str | None, baseline: Path | None, output: Path | None, resume: bool,
    trusted_code: tuple[str, ...], json_out: bool,
) -> None:  # fmt: skip
    """Run benchmarks on an artifact, a model or a server.

    ARTIFACT is a folder, builtin:NAME, a hub id, or with --backend openai a name for the served
    model. An interrupted evaluation continues with --resume and sends no request twice. Exits with
    1 if a task could not be run, or if more than 20 % of its answers are cut or have no result.

    Example: quantkit eval artifacts/tiny-v3-awq4 --tasks tiny-v3-math --limit 50 --source
    """
    # torch and transformers: `quantkit eval --help` starts without
    from quantkit.evaluate import evaluation, results
    from quantkit.evaluate.backends import connect_server
    from quantkit.evaluate.options import Decoding, EvaluationOptions
    from quantkit.evaluate.target import resolve_target, select_default_tasks

    if source is not None and (baseline is not None or backend != "transformers"):
        raise UsageError(
            "--source: expected --backend transformers and no --baseline; evaluate the source by "
            "itself"
        )
    decoding = Decoding(
        temperature=temperature, top_p=top_p, max_tokens=max_tokens, chat=chat_template,
        think_end=think_end,
    )  # fmt: skip
    setup = EvaluationOptions(
        backend=backend, limit=limit, seeds=seeds, decoding=decoding, batch_size=batch_size,
        device_map=device_map, dtype=dtype, native=native, engine=parse_engine_arguments(engine),
        trusted_code=trusted_code,
    )  # fmt: skip
    if endpoint is not None:
        server = connect_server(
            endpoint, model=model or "", chat=chat_template, concurrency=concurrency, tries=tries,
            seconds=timeout, key_variable=key_variable,
        )  # fmt: skip
        setup = replace(setup, server=server)
    setup.check()
    folder = results.select_output_folder(artifact, output, resume=resume)
    subject = resolve_target(artifact, backend)
    names = [name for group in tasks for name in group.split(",") if name] or [
        *select_default_tasks(subject)
    ]
    with ProgressBar(sys.stderr.isatty() and not json_out) as progress_bar:
        outcome = evaluation.evaluate_target(
            subject, names, setup, folder, source=source, baseline=baseline,
            on_progress=progress_bar.update,
        )  # fmt: skip
    print_result(outcome, setup, json_out)
    if outcome.missing:
        raise EvaluationError(f"not run: {', '.join(outcome.missing)}; results.json says why")
    if outcome.faults:
        raise EvaluationError("; ".join(outcome.faults))


def print_result(result: EvaluationResult, setup: EvaluationOptions, json_out: bool) -> None:
    """Print the tables of an evaluation and its folder, or JSON."""
    from quantkit.report.evaluation_tables import make_evaluation_tables

    if json_out:
        print_json(result.document)
        return
    show(*(render_table(part) for part in make_evaluation_tables(result, setup)))
    click.echo(result.folder)


def parse_engine_arguments(pairs: tuple[str, ...]) -> dict[str, object]:
    """Return KEY=VALUE pairs as a mapping; values are YAML scalars such as 4096 or true."""
    parts = [pair.partition("=") for pair in pairs]
    if any(not name or not separator for name, separator, _ in parts):
        raise UsageError("--engine: expected KEY=VALUE, e.g. --engine max_model_len=4096")
    return {name: YAML(typ="safe", pure=True).load(value) for name, _, value in parts}
