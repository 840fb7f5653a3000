"""`quantkit loadtest`: measure a server under load."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import click

from quantkit.artifact import loadtest_schema
from quantkit.artifact.layout import LOADTEST, MANIFEST, PLAN
from quantkit.artifact.loadtest_schema import LoadTest
from quantkit.artifact.read_manifest import read_manifest
from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON
from quantkit.cli.rich_output import show
from quantkit.errors import GateMissed, UsageError
from quantkit.io.files import encode_json, write_output
from quantkit.io.path_safety import check_no_link
from quantkit.recipe.slo import Slo
from quantkit.report.terminal import render_table
from quantkit.serve.cost.assumptions import Api, Assumptions, read_assumptions
from quantkit.serve.cost.hourly import HourlyCost, compute_hourly_cost, find_api
from quantkit.serve.loadtest import engine
from quantkit.serve.loadtest import guidellm as guidellm_tool
from quantkit.serve.loadtest.compare import (
    SideCost,
    check_comparable,
    make_side_table,
    serialize_comparison,
)
from quantkit.serve.loadtest.page import render_page
from quantkit.serve.loadtest.prompts import read_prompts
from quantkit.serve.loadtest.run import Endpoints, run_load_test
from quantkit.serve.loadtest.slo import judge_slo
from quantkit.serve.loadtest.slo_file import read_recipe_slo, read_slo
from quantkit.serve.loadtest.slo_tables import (
    format_value,
    make_length_table,
    make_server_table,
    make_slo_table,
)
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
    "--slo",
    default="",
    metavar="FILE",
    help="Judge targets: a YAML file with `slo:`, or `default`; default: the artifact's recipe.",
)
@click.option(
    "--cost",
    type=click.Path(path_type=Path),
    help="Assumptions of `quantkit cost`, for tokens and prices per unit of currency.",
)
@click.option(
    "--gpu-metrics",
    default="",
    metavar="URL",
    help="A DCGM exporter's /metrics, for GPU utilization, memory and power.",
)
@click.option(
    "--conversations",
    type=click.IntRange(0, 10_000),
    default=8,
    help="Conversations of 4 turns with a common system prompt, after the levels (8); 0: none.",
)
@click.option(
    "--compare",
    type=click.Path(path_type=Path),
    metavar="RESULT",
    help="Another result, of --output or in an artifact, to print side by side.",
)
@click.option(
    "--api", default="", metavar="NAME", help="The API in --cost whose prices hold for --compare."
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
    key_variable: str, guidellm: str, note: str, slo: str, cost: Path | None, gpu_metrics: str,
    conversations: int, compare: Path | None, api: str, output: Path | None, html: Path | None,
    json_out: bool,
) -> None:  # fmt: skip
    """Measure a server under increasing load.

    GuideLLM sends the requests. Reports time to first token, inter-token latency, throughput and
    prefix cache hits. URL is the server's API, http://HOST:PORT/v1, or a stored result: an
    artifact's folder, or a file of --output. With --slo targets are judged; exits with 3 if one is
    missed.

    Example: quantkit loadtest http://localhost:8000/v1 --artifact artifacts/tiny-v3-awq4 --html
    load.html
    """
    check_outside_artifact(output, "--output", LOADTEST)
    check_outside_artifact(html, "--html", None)
    stored = Path(url) if Path(url).exists() else None
    evidence = read_evidence(slo, cost, compare, api, artifact or stored)
    if stored is not None:
        run = read_stored_run(stored)
    else:
        levels = parse_levels(concurrency)
        if evidence.slo and evidence.slo.concurrency not in (None, *levels):
            raise UsageError(
                f"slo.concurrency: expected a level of --concurrency {concurrency}, found "
                f"{evidence.slo.concurrency}; add it"
            )
        check_note(note)
        key, address = os.environ.get(key_variable, ""), engine.get_base_url(url)
        if artifact is not None:
            read_manifest(artifact)
        prompts = read_prompts(data)
        setup = guidellm_tool.LoadTestSetup(
            program=guidellm_tool.find_program(guidellm), url=address,
            model=model or engine.read_served_model(url, key), chat=chat, max_tokens=max_tokens,
            ignore_eos=not stop_at_eos, tokenizer=tokenizer or str(artifact or ""), key=key,
            requests=requests, seconds=seconds,
        )  # fmt: skip
        engine.check_metrics(metrics, "--metrics")
        engine.check_metrics(gpu_metrics, "--gpu-metrics")
        run = run_load_test(
            setup, prompts, levels, Endpoints(engine=metrics or address, gpu=gpu_metrics),
            conversations, lambda text: click.echo(text, err=True),
        )  # fmt: skip
        run = run.model_copy(update={"note": note})
        if artifact is not None:
            # a page there could not be checked
            write_run(run, check_no_link(artifact, LOADTEST), None)
    write_run(run, output, html)
    print_run(run, evidence, json_out=json_out)


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Targets and references of a run; None without the option."""

    slo: Slo | None
    assumptions: Assumptions | None
    other: LoadTest | None
    api: Api | None

    @property
    def hourly(self) -> HourlyCost | None:
        """The cost of the GPUs per hour."""
        return compute_hourly_cost(self.assumptions) if self.assumptions else None

    @property
    def costs(self) -> tuple[SideCost, SideCost]:
        """The prices of both sides: the other side's are those of an API, or of the same GPUs."""
        other = SideCost(api=self.api) if self.api else SideCost(hourly=self.hourly)
        return SideCost(hourly=self.hourly), other


def read_evidence(
    slo: str, cost: Path | None, compare: Path | None, api: str, artifact: Path | None
) -> Evidence:
    """Read the files that options name; without --slo the targets of the artifact's recipe."""
    if api and (cost is None or compare is None):
        raise UsageError("--api: expected --cost and --compare with it; add them")
    assumptions = read_assumptions(cost) if cost else None
    is_artifact = artifact is not None and (artifact / PLAN).is_file()
    targets = read_slo(slo) if slo else None
    if not slo and artifact is not None and is_artifact:
        targets = read_recipe_slo(artifact)
    return Evidence(
        slo=targets,
        assumptions=assumptions,
        other=read_stored_run(compare) if compare else None,
        api=find_api(assumptions, api) if assumptions and api else None,
    )


def print_run(run: LoadTest, evidence: Evidence, *, json_out: bool) -> None:
    """Print a run, its targets and its comparison; GateMissed if a target is missed."""
    judged = judge_slo(evidence.slo, run, evidence.hourly) if evidence.slo else None
    other, currency = evidence.other, evidence.assumptions.currency if evidence.assumptions else ""
    if other is not None:
        check_comparable(run, other)
    if json_out:
        values = run.model_dump(mode="json")
        if judged is not None:
            targets = [result.model_dump(mode="json") for result in judged.results]
            values["slo"] = {"concurrency": judged.concurrency, "targets": targets}
        if other is not None:
            values["compare"] = serialize_comparison(run, other, evidence.costs, currency)
        print_json(values)
    else:
        tables = [make_level_table(run), make_length_table(run), make_server_table(run)]
        tables += [make_slo_table(judged)] if judged else []
        tables += [make_side_table(run, other, evidence.costs, currency)] if other else []
        show(*(render_table(table) for table in tables if table))
    if judged is not None and judged.missed:
        misses = [
            f"{result.figure} {result.bound}: found {format_value(result.value, result.figure)}"
            for result in judged.missed
        ]
        raise GateMissed(f"slo: at concurrency {judged.concurrency}: {'; '.join(misses)}")


def check_note(note: str) -> None:
    """Raise UsageError for a note that the schema does not hold."""
    if len(note) > 500:
        raise UsageError(f"--note: expected at most 500 characters, found {len(note)}; shorten it")


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


def read_stored_run(place: Path) -> LoadTest:
    """Return the load test that an artifact or a file holds."""
    file = place / LOADTEST if place.is_dir() else place
    if not file.is_file():
        raise UsageError(
            f"{file}: expected a load test, found none; run one with --artifact {place}"
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
