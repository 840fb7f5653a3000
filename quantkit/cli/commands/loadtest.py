"""`quantkit loadtest`: how a server bears load."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

import click

from quantkit.cli.console import as_json, handle_errors, show
from quantkit.cli.options import JSON
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.artifact.loadtest_schema import LoadTest


@click.command()
@click.argument("url")
@click.option(
    "--artifact",
    type=click.Path(path_type=Path),
    help="Keep result and page beside this artifact's report.",
)
@click.option(
    "--data", default="tiny-v3-math", help="Prompts: a JSONL or text file, or a set of evals/data."
)
@click.option(
    "--concurrency", default="1,2,4,8,16", metavar="N[,N]", help="Requests at once, level by level."
)
@click.option(
    "--requests",
    type=click.IntRange(1),
    default=64,
    help="Requests per level, at least 4 per place (64).",
)
@click.option(
    "--seconds", type=click.FloatRange(1), default=120, help="The longest a level may take (120)."
)
@click.option(
    "--max-tokens", type=click.IntRange(1), default=128, help="Tokens of an answer (128)."
)
@click.option(
    "--stop-at-eos", is_flag=True, help="Let answers end by themselves; else all have one length."
)
@click.option("--chat", is_flag=True, help="Ask /v1/chat/completions.")
@click.option("--model", default="", help="The served model; default: the only one.")
@click.option(
    "--metrics", default="", metavar="URL", help="The engine's /metrics; default: the server's."
)
@click.option(
    "--tokenizer",
    default="",
    help="For servers that tell no usage: a folder; default: the artifact.",
)
@click.option(
    "--key-variable", default="OPENAI_API_KEY", help="Where the API key is (OPENAI_API_KEY)."
)
@click.option(
    "--guidellm",
    default="guidellm",
    metavar="PROGRAM",
    help="GuideLLM's program (guidellm on PATH).",
)
@click.option("--note", default="", help="What serves, for the record: 'vLLM 0.32, 8 x H100'.")
@click.option("--output", type=click.Path(path_type=Path), help="Write the result there, as JSON.")
@click.option("--html", type=click.Path(path_type=Path), help="Write a page with plots there.")
@JSON
@handle_errors
def COMMAND(  # noqa: PLR0913  # every one is an option
    url: str, artifact: Path | None, data: str, concurrency: str, requests: int, seconds: float, max_tokens: int,
    stop_at_eos: bool, chat: bool, model: str, metrics: str, tokenizer: str, key_variable: str, guidellm: str,
    note: str, output: Path | None, html: Path | None, json_out: bool,
) -> None:  # fmt: skip
    """Ask a server more and more at once, by GuideLLM: time to first token, between tokens, throughput, prefix cache.

    URL is the server's API, http://HOST:PORT/v1, or the folder of an artifact whose kept result is shown again.

    Example: quantkit loadtest http://localhost:8000/v1 --artifact artifacts/tiny-v3-awq4 --html load.html
    """
    from quantkit.artifact.layout import LOADTEST, LOADTEST_PAGE
    from quantkit.artifact.read_manifest import read_manifest
    from quantkit.report.terminal import render_table
    from quantkit.serve.loadtest import engine
    from quantkit.serve.loadtest import guidellm as tool
    from quantkit.serve.loadtest.prompts import read_prompts
    from quantkit.serve.loadtest.run import run_load_test
    from quantkit.serve.loadtest.tables import make_level_table

    refuse_inside(output, "--output", LOADTEST)
    refuse_inside(html, "--html", LOADTEST_PAGE)
    if Path(url).is_dir():
        run = stored(Path(url))
    else:
        if len(note) > 500:
            raise UsageError(
                f"--note: expected at most 500 characters, found {len(note)}; shorten it"
            )
        key, address, steps = (
            os.environ.get(key_variable, ""),
            engine.get_base_url(url),
            levels_of(concurrency),
        )
        if artifact is not None:
            read_manifest(artifact)
        prompts = read_prompts(data)
        setup = tool.LoadTestSetup(
            program=tool.find_program(guidellm), url=address, model=model or engine.read_served_model(url, key), chat=chat,
            max_tokens=max_tokens, ignore_eos=not stop_at_eos, tokenizer=tokenizer or str(artifact or ""), key=key,
            requests=requests, seconds=seconds,
        )  # fmt: skip
        if metrics:
            engine.check_metrics(metrics)
        run = run_load_test(
            setup, prompts, steps, metrics or address, lambda text: click.echo(text, err=True)
        )
        run = run.model_copy(update={"note": note})
        if artifact is not None:
            keep(run, artifact / LOADTEST, artifact / LOADTEST_PAGE)
    keep(run, output, html)
    if json_out:
        as_json(run.model_dump(mode="json"))
    else:
        show(render_table(make_level_table(run)))


def refuse_inside(place: Path | None, option: str, name: str) -> None:
    """UsageError for a file in an artifact's folder that `verify` would not know; `name` is the one that it does."""
    from quantkit.artifact.layout import MANIFEST

    for folder in place.resolve().parents if place else ():
        if place and (folder / MANIFEST).is_file() and place.resolve() != folder / name:
            raise UsageError(
                f"{option}: {place}: expected a place outside the artifact {folder}, or {name} in it, which its "
                "manifest leaves room for; write it elsewhere"
            )


def keep(run: LoadTest, result: Path | None, page: Path | None) -> None:
    """Write a run as JSON and as a page."""
    from quantkit.io.files import encode_json, write_output

    if result is not None:
        write_output(result, encode_json(run.model_dump(mode="json")))
    if page is not None:
        from quantkit.serve.loadtest.page import render_page

        write_output(page, render_page(run).encode())


def stored(artifact: Path) -> LoadTest:
    """What an earlier run left in an artifact."""
    from quantkit.artifact.layout import LOADTEST
    from quantkit.artifact.loadtest_schema import read_load_test

    place = artifact / LOADTEST
    if not place.is_file():
        raise UsageError(
            f"{place}: expected a load test, found none; run one with --artifact {artifact}"
        )
    return read_load_test(place)


def levels_of(text: str) -> list[int]:
    """Numbers of requests at once, smallest first."""
    parts = text.split(",")
    if not all(part.strip().isdigit() and 1 <= int(part) <= 100_000 for part in parts):
        raise UsageError(f"--concurrency: expected numbers from 1, e.g. 1,4,16, found {text!r}")
    levels = sorted(int(part) for part in parts)
    if len(set(levels)) < len(levels):
        raise UsageError(
            f"--concurrency: expected every number once, found {text!r}; each is a level of its own"
        )
    return levels
