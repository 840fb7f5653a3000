"""`quantkit loadtest`: measure a server under load."""

from __future__ import annotations

import os
from pathlib import Path

import click

from quantkit.artifact import loadtest_schema
from quantkit.artifact.layout import LOADTEST, MANIFEST
from quantkit.artifact.loadtest_schema import LoadTest
from quantkit.artifact.read_manifest import read_manifest
from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON
from quantkit.cli.rich_output import show
from quantkit.errors import UsageError
from quantkit.io.files import encode_json, write_output
from quantkit.io.path_safety import check_no_link
from quantkit.report.terminal import render_table
from quantkit.serve.loadtest import engine
from quantkit.serve.loadtest import guidellm as guidellm_tool
from quantkit.serve.loadtest.page import render_page
from quantkit.serve.loadtest.prompts import read_prompts
from quantkit.serve.loadtest.run import run_load_test
from quantkit.serve.loadtest.tables import make_level_table


@click.command()
@click.argument("url")
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    help="Store the result next to this artifact's report.",
)
@click.option(
    "--data", default="tiny-v3-math", help="Prompts: a JSONL or text file, or a set in evals/data."
)
@click.option(
    "--concurrency",
    default="1,2,4,8,16",
    metavar="N[,N]",
    help="Concurrent requests, level by level.",
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=64,
    help="Requests per level, at least 4 per concurrent request (64).",
)
@click.option(
    "--seconds",
    type=click.FloatRange(1),
    default=120,
    help="Time limit of a level in seconds (120).",
)
@click.option("--max-tokens", type=click.IntRange(1), default=128, help="Tokens per answer (128).")
@click.option(
    "--stop-at-eos", is_flag=True, help="Let answers end at EOS; by default all have one length."
)
@click.option("--chat", is_flag=True, help="Send requests to /v1/chat/completions.")
@click.option("--model", default="", help="The served model; default: the only one.")
@click.option(
    "--metrics", default="", metavar="URL", help="The engine's /metrics; default: the server's."
)
@click.option(
    "--tokenizer",
    default="",
    help="For servers that report no usage: a tokenizer's folder; default: the artifact.",
)
@click.option(
    "--key-variable",
    default="OPENAI_API_KEY",
    help="Environment variable with the API key (OPENAI_API_KEY).",
)
@click.option(
    "--guidellm",
    default="guidellm",
    metavar="PROGRAM",
    help="The GuideLLM program (guidellm on PATH).",
)
@click.option(
    "--note", default="", help="Server and hardware, for the record: 'vLLM 0.32, 8 x H100'."
)
@click.option(
    "--output", type=click.Path(path_type=Path), help="Write the result to this file as JSON."
)
@click.option(
    "--html", type=click.Path(path_type=Path), help="Write an HTML page with plots to this file."
)
@JSON
@handle_errors
def command(  # noqa: PLR0913  # one parameter per option
    url: str, artifact: Path | None, data: str, concurrency: str, requests: int, seconds: float,
    max_tokens: int, stop_at_eos: bool, chat: bool, model: str, metrics: str, tokenizer: str,
    key_variable: str, guidellm: str, note: str, output: Path | None, html: Path | None,
    json_out: bool,
) -> None:  # fmt: skip
    """Measure a server under increasing load.

    GuideLLM sends the requests. Reports time to first token, inter-token latency, throughput and
    prefix cache hits. URL is the server's API, http://HOST:PORT/v1, or the folder of an artifact
    whose stored result is printed again.

    Example: quantkit loadtest http://localhost:8000/v1 --artifact artifacts/tiny-v3-awq4 --html
    load.html
    """
    check_outside_artifact(output, "--output", LOADTEST)
    check_outside_artifact(html, "--html", None)
    if Path(url).is_dir():
        run = read_stored_run(Path(url))
    else:
        if len(note) > 500:
            raise UsageError(
                f"--note: expected at most 500 characters, found {len(note)}; shorten it"
            )
        key, address, steps = (
            os.environ.get(key_variable, ""),
            engine.get_base_url(url),
            parse_levels(concurrency),
        )
        if artifact is not None:
            read_manifest(artifact)
        prompts = read_prompts(data)
        setup = guidellm_tool.LoadTestSetup(
            program=guidellm_tool.find_program(guidellm), url=address,
            model=model or engine.read_served_model(url, key), chat=chat, max_tokens=max_tokens,
            ignore_eos=not stop_at_eos, tokenizer=tokenizer or str(artifact or ""), key=key,
            requests=requests, seconds=seconds,
        )  # fmt: skip
        if metrics:
            engine.check_metrics(metrics)
        run = run_load_test(
            setup, prompts, steps, metrics or address, lambda text: click.echo(text, err=True)
        )
        run = run.model_copy(update={"note": note})
        if artifact is not None:
            # a page there could not be checked
            write_run(run, check_no_link(artifact, LOADTEST), None)
    write_run(run, output, html)
    if json_out:
        print_json(run.model_dump(mode="json"))
    else:
        show(render_table(make_level_table(run)))


def check_outside_artifact(place: Path | None, option: str, name: str | None) -> None:
    """Raise UsageError for a path inside an artifact, where `verify` accepts `name` only."""
    for folder in place.resolve().parents if place else ():
        if place and (folder / MANIFEST).is_file() and place.resolve() != folder / (name or ""):
            inside = f", or {name} in it, which its manifest does not cover" if name else ""
            raise UsageError(
                f"{option}: {place}: expected a place outside the artifact {folder}{inside}; "
                "write it elsewhere"
            )


def write_run(run: LoadTest, result: Path | None, page: Path | None) -> None:
    """Write a run as JSON and as an HTML page."""
    if result is not None:
        write_output(result, encode_json(run.model_dump(mode="json")))
    if page is not None:
        write_output(page, render_page(run).encode())


def read_stored_run(artifact: Path) -> LoadTest:
    """Return the load test that an artifact holds."""
    file = artifact / LOADTEST
    if not file.is_file():
        raise UsageError(
            f"{file}: expected a load test, found none; run one with --artifact {artifact}"
        )
    return loadtest_schema.read_load_test(file)


def parse_levels(text: str) -> list[int]:
    """Return the levels of concurrency, smallest first."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and 1 <= int(part) <= 100_000 for part in parts):
        raise UsageError(f"--concurrency: expected numbers from 1, e.g. 1,4,16, found {text!r}")
    counts = sorted(int(part) for part in parts)
    if len(set(counts)) < len(counts):
        raise UsageError(
            f"--concurrency: expected every number once, found {text!r}; each is one level"
        )
    return counts
