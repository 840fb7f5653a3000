"""`quantkit eval`: benchmarks on any backend."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from quantkit.cli.console import ProgressBar, as_json, handle_errors, show
from quantkit.cli.options import JSON
from quantkit.errors import EvaluationError, UsageError


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
    help="Who answers.",
)
@click.option(
    "--endpoint", metavar="URL", help="openai: the server's API, e.g. http://localhost:8000/v1."
)
@click.option(
    "--model", metavar="NAME", help="openai: the served model's name; default: the only one."
)
@click.option(
    "--concurrency", type=click.IntRange(1), default=16, help="openai: requests at once (16)."
)
@click.option(
    "--tries", type=click.IntRange(1), default=8, help="openai: tries of a request in all (8)."
)
@click.option(
    "--timeout", type=click.FloatRange(0.1), default=600, help="openai: seconds of silence (600)."
)
@click.option(
    "--key-variable",
    default="OPENAI_API_KEY",
    help="openai: where the API key is (OPENAI_API_KEY).",
)
@click.option(
    "--engine",
    multiple=True,
    metavar="KEY=VALUE",
    help="vllm: an argument, e.g. max_model_len=4096.",
)
@click.option(
    "--native",
    is_flag=True,
    help="transformers: its own kernels for the format, not unpacked weights.",
)
@click.option(
    "--device-map", default="", help="transformers: auto, balanced, sequential or a device."
)
@click.option("--dtype", default="", help="transformers: bfloat16, float16 or float32.")
@click.option(
    "--batch-size", type=click.IntRange(1), default=64, help="transformers: answers at once (64)."
)
@click.option("--limit", type=click.IntRange(1), help="The first N items of each task.")
@click.option(
    "--chat-template", is_flag=True, help="Ask in a conversation, by the model's chat template."
)
@click.option(
    "--seeds", type=click.IntRange(1), default=1, help="Answers per item, averaged per item."
)
@click.option("--temperature", type=click.FloatRange(0), default=0.0, help="0 is greedy.")
@click.option(
    "--top-p",
    type=click.FloatRange(0, 1, min_open=True),
    default=1.0,
    help="Share of probability kept.",
)
@click.option(
    "--max-tokens", type=click.IntRange(1), help="Tokens of an answer; default: the task's."
)
@click.option(
    "--think-end", default="", metavar="TEXT", help="Score what follows this, e.g. '</think>'."
)
@click.option(
    "--source",
    is_flag=False,
    flag_value="",
    metavar="[MODEL]",
    help="Ask the source too, and compare.",
)
@click.option(
    "--baseline",
    type=click.Path(path_type=Path),
    help="Compare with this folder of an earlier evaluation.",
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Where results go; default: ARTIFACT.eval."
)
@click.option("--resume", is_flag=True, help="Go on with the answers that are there.")
@JSON
@handle_errors
def COMMAND(  # noqa: PLR0913  # every one is an option
    artifact: str, tasks: tuple[str, ...], backend: Any, endpoint: str | None, model: str | None, concurrency: int,
    tries: int, timeout: float, key_variable: str, engine: tuple[str, ...], native: bool, device_map: str, dtype: str,
    batch_size: int, limit: int | None, chat_template: bool, seeds: int, temperature: float, top_p: float,
    max_tokens: int | None, think_end: str, source: str | None, baseline: Path | None, output: Path | None,
    resume: bool, json_out: bool,
) -> None:  # fmt: skip
    """Ask an artifact, a model or a server the items of benchmarks, and score what it answers.

    ARTIFACT is a folder, builtin:NAME, a hub id, or with --backend openai the name of what is served. Interrupted, it
    goes on with --resume, and asks nothing twice. Exits with 1 when a task could not be run.

    Example: quantkit eval artifacts/tiny-v3-awq4 --tasks tiny-v3-math --limit 50 --source
    """
    from quantkit.evaluate import evaluation, results
    from quantkit.evaluate.backends import connect_server
    from quantkit.evaluate.options import Decoding, EvaluationOptions
    from quantkit.evaluate.target import resolve_target, select_default_tasks
    from quantkit.report import evaluation_tables
    from quantkit.report.terminal import render_table

    if source is not None and (baseline is not None or backend != "transformers"):
        raise UsageError(
            "--source: expected --backend transformers and no --baseline; evaluate the source by itself"
        )
    decoding = Decoding(
        temperature=temperature,
        top_p=top_p,
        max_tokens=max_tokens,
        chat=chat_template,
        think_end=think_end,
    )
    setup = EvaluationOptions(
        backend=backend, limit=limit, seeds=seeds, decoding=decoding, batch_size=batch_size, device_map=device_map,
        dtype=dtype, native=native, engine=arguments(engine),
    )  # fmt: skip
    if endpoint is not None:
        server = connect_server(
            endpoint, model=model or "", chat=chat_template, concurrency=concurrency, tries=tries, seconds=timeout,
            key_variable=key_variable,
        )  # fmt: skip
        setup = replace(setup, server=server)
    setup.check()
    folder = results.select_output_folder(artifact, output, resume=resume)
    who = resolve_target(artifact, backend)
    names = [name for group in tasks for name in group.split(",") if name] or [
        *select_default_tasks(who)
    ]
    with ProgressBar(sys.stderr.isatty() and not json_out) as meter:
        outcome = evaluation.evaluate_target(
            who, names, setup, folder, source=source, baseline=baseline, on_progress=meter.tell
        )
    if json_out:
        as_json(outcome.document)
    else:
        show(
            *(
                render_table(made)
                for made in evaluation_tables.make_evaluation_tables(outcome, setup)
            )
        )
        click.echo(outcome.folder)
    if outcome.missing:
        raise EvaluationError(f"not run: {', '.join(outcome.missing)}; results.json says why")


def arguments(pairs: tuple[str, ...]) -> dict[str, object]:
    """KEY=VALUE as a mapping; a value is read as YAML: 4096 is a number, true a truth."""
    from ruamel.yaml import YAML

    parts = [pair.partition("=") for pair in pairs]
    if any(not name or not separator for name, separator, _ in parts):
        raise UsageError("--engine: expected KEY=VALUE, e.g. --engine max_model_len=4096")
    return {name: YAML(typ="safe", pure=True).load(value) for name, _, value in parts}
