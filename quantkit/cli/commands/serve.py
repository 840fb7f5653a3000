"""`quantkit serve`: serve an artifact with an OpenAI-compatible API."""

from __future__ import annotations

import shutil
import textwrap
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from quantkit.cli.console import handle_errors, print_json
from quantkit.cli.options import JSON
from quantkit.errors import UsageError
from quantkit.io.private_copy import make_private_copy
from quantkit.serve.engines import engine_process, launch_plan, start
from quantkit.serve.engines.launch_plan import LaunchPlan, serialize_plan
from quantkit.serve.engines.start import GatewayOptions, make_engine_upstream
from quantkit.serve.gateway.settings import Upstream

ENGINE_NOTE = "the gateway's engine, on a port that is free now; a start takes another"
ENGINES = ["auto", "vllm", "sglang", "transformers"]


@click.command()
@click.argument("artifact")
@click.argument("engine_flags", nargs=-1, metavar="[-- ENGINE_FLAGS...]")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    help="The engine; auto: chosen by hardware and installed packages.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the command and its reasons; verify and start nothing."
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Longest request in tokens (32768, or the model's longest).",
)
@click.option("--users", type=click.IntRange(1), default=10, help="Concurrent requests (10).")
@click.option("--gpu", metavar="NAME", help="The GPU, e.g. h100; default: the GPU of this machine.")
@click.option(
    "--kv", type=click.Choice(["bf16", "fp8"]), default="bf16", help="Dtype of the KV cache (bf16)."
)
@click.option("--host", default="127.0.0.1", help="Address to listen on (127.0.0.1).")
@click.option(
    "--port", type=click.IntRange(1, 65535), default=8000, help="Port to listen on (8000)."
)
@click.option(
    "--name", default="", help="The model's name for clients; default: the folder's name."
)
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    help="A Jinja chat template, for models without one.",
)
@click.option("--docker", is_flag=True, help="Print a docker command only.")
@click.option("--kubernetes", is_flag=True, help="Print a Kubernetes manifest only.")
@click.option(
    "--pull",
    default="",
    metavar="SRC",
    help="kubernetes: an init container pulls the artifact from this address and verifies it.",
)
@click.option(
    "--gateway",
    is_flag=True,
    help="Start a gateway in front of the engine: queue, API keys, deadlines, failover, metrics.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="gateway: a limit, e.g. waiting=200.",
)
@click.option(
    "--keys", type=click.Path(path_type=Path), help="gateway: file of API keys; see `quantkit key`."
)
@click.option(
    "--fallback",
    multiple=True,
    metavar="URL[=MODEL]",
    help="gateway: a server to use if the engine fails.",
)
@click.option(
    "--fallback-key",
    default="",
    metavar="VARIABLE",
    help="gateway: environment variable with the fallbacks' API key.",
)
@click.option(
    "--engine-key",
    default="",
    metavar="VARIABLE",
    help="gateway in front of a URL: environment variable with that server's API key.",
)
@click.option(
    "--allow-host",
    multiple=True,
    metavar="NAME",
    help="without keys: a name that clients and web pages may call the server by.",
)
@click.option(
    "--open-metrics",
    is_flag=True,
    help="gateway: serve /metrics and /ready without a key, also to other machines.",
)
@click.option(
    "--canary",
    "canary_seconds",
    type=click.FloatRange(10),
    metavar="SECONDS",
    help="gateway: compare log-probabilities of known text with the report's, this often.",
)
@click.option(
    "--monitoring",
    type=click.Path(path_type=Path, file_okay=False),
    metavar="DIR",
    help="Write Prometheus' configuration, alert rules and a Grafana dashboard; start nothing.",
)
@click.option(
    "--start-seconds",
    type=click.FloatRange(1),
    default=3600,
    help="Time limit for the engine to load (3600).",
)
@click.option(
    "--no-verify", is_flag=True, help="Skip the check of the artifact against its manifest."
)
@click.option(
    "--private-copy",
    type=click.Path(path_type=Path, exists=True, file_okay=False),
    metavar="FOLDER",
    help="Copy the artifact into a new private folder in FOLDER; verify and serve the copy.",
)
@JSON
@handle_errors
def command(  # noqa: PLR0913  # one parameter per option
    artifact: str, engine_flags: tuple[str, ...], engine: Any, dry_run: bool, context: int | None,
    users: int, gpu: str | None, kv: Any, host: str, port: int, name: str,
    chat_template: Path | None, docker: bool, kubernetes: bool, pull: str, gateway: bool,
    limits: tuple[str, ...], keys: Path | None, fallback: tuple[str, ...], fallback_key: str,
    engine_key: str, allow_host: tuple[str, ...], open_metrics: bool,
    canary_seconds: float | None, monitoring: Path | None, start_seconds: float, no_verify: bool,
    private_copy: Path | None, json_out: bool,
) -> None:  # fmt: skip
    """Verify an artifact, size it, and serve it.

    The engine is vLLM, SGLang or transformers. ARTIFACT is a folder; with --dry-run also a
    config.json or a hub id whose config ships with quantkit; with --gateway also the address of a
    running server (http://HOST:PORT/v1). Arguments after -- are passed to the engine.

    Example: quantkit serve artifacts/tiny-v3-awq4 --dry-run --gpu rtx4090
    """
    is_container, is_started = docker or kubernetes, not (dry_run or docker or kubernetes)
    check_modes(
        gateway=gateway, is_container=is_container, pull=pull if not kubernetes else "",
        is_copied_in_vain=bool(private_copy) and (not is_started or artifact.startswith("http")),
    )  # fmt: skip
    gateway_options = GatewayOptions(
        is_enabled=gateway, host=host, port=port, limits=limits, keys=keys, fallbacks=fallback,
        key_variable=fallback_key, allowed_hosts=allow_host, has_open_metrics=open_metrics,
        running=users, canary_seconds=canary_seconds or 0.0,
    )  # fmt: skip
    gateway_options.check()
    if artifact.startswith(("http://", "https://")):
        serve_address(artifact, engine_key, gateway_options, dry_run=dry_run, json_out=json_out)
        return
    if engine_key:
        raise UsageError(
            "--engine-key: expected the address of a server as ARTIFACT; leave the option out"
        )
    # the engine of a gateway is reachable from this machine only
    engine_host, engine_port = (
        (engine_process.LOOPBACK, engine_process.choose_engine_port(port))
        if gateway
        else (host, port)
    )
    serve_options = launch_plan.ServeOptions(
        artifact=artifact, engine=engine, context=context, users=users, gpu=gpu, kv=kv,
        host=engine_host, port=engine_port, name=name, chat_template=chat_template,
        extra=engine_flags,
    )  # fmt: skip
    plan = launch_plan.plan_launch(serve_options, containers=is_container)
    if is_container:
        for text in launch_plan.render_containers(
            plan, docker=docker, kubernetes=kubernetes, pull=pull
        ):
            click.echo(text)
    elif monitoring is not None:
        for file in start.write_monitoring(plan, gateway_options, monitoring):
            click.echo(file)
    elif dry_run:
        print_plan(plan, gateway_options.adapt_to(plan), json_out)
    else:
        start_plan(plan, gateway_options, private_copy, no_verify, start_seconds)


def check_modes(*, gateway: bool, is_container: bool, pull: str, is_copied_in_vain: bool) -> None:
    """Raise UsageError for options that do not go together.

    pull: the value of --pull without --kubernetes.
    """
    if gateway and is_container:
        raise UsageError(
            "--docker, --kubernetes: expected no --gateway, since they print an engine alone; "
            "leave it out, and run `quantkit serve http://HOST:PORT/v1 --gateway` in front of the "
            "engine's container"
        )
    if pull:
        raise UsageError("--pull: expected --kubernetes with it; add it")
    if is_copied_in_vain:
        raise UsageError("--private-copy: expected an artifact to be started; leave it out")


def start_plan(
    plan: LaunchPlan,
    gateway: GatewayOptions,
    private_copy: Path | None,
    no_verify: bool,
    seconds: float,
) -> None:
    """Start an engine with the artifact of a plan, or with a private copy of it.

    The engine gets a path without links, which could lead elsewhere when it opens the files.
    """
    folder = Path(plan.target.path).resolve()
    with ExitStack() as stack:
        if private_copy is not None:
            if no_verify or plan.target.kind != "artifact":
                raise UsageError(
                    "--private-copy: expected an artifact that is verified; leave it out for "
                    "other models, and leave out --no-verify"
                )
            print_status(f"copying {folder} into {private_copy}")
            folder = stack.enter_context(make_private_copy(folder, private_copy))
        if plan.target.kind == "artifact" and str(folder) != plan.target.path:
            plan = launch_plan.plan_launch(replace(plan.options, artifact=str(folder)))
        start.start_engine(
            plan,
            gateway.adapt_to(plan),
            verified=no_verify,
            seconds=seconds,
            log=print_status,
        )


def serve_address(
    address: str, engine_key: str, gateway: GatewayOptions, *, dry_run: bool, json_out: bool
) -> None:
    """Run a gateway in front of a server, or print it with `dry_run`."""
    if not gateway.is_enabled:
        raise UsageError(
            f"{address}: the address of a server: expected --gateway, to be started in front of it"
        )
    if gateway.canary_seconds:
        raise UsageError(
            "--canary: expected an artifact, found the address of a server; leave it out"
        )
    server = start.make_server_upstream(address, engine_key)
    if dry_run:
        print_gateway(gateway, server, json_out)
    else:
        start.run_gateway(server, gateway, print_status)


def print_status(text: str) -> None:
    """Print a line to stderr."""
    click.echo(text, err=True)


def print_gateway(front: GatewayOptions, server: Upstream, json_out: bool) -> None:
    """Print the gateway that would run in front of a server."""
    if json_out:
        print_json({"gateway": front.to_json(server)})
    else:
        click.echo("\n".join(front.describe(server)))


def print_comment(text: str, before: str = "") -> None:
    """Print a shell comment as wide as the terminal.

    Lines after the first are indented by `before`.
    """
    width = shutil.get_terminal_size((100, 0)).columns  # 100 where stdout is no terminal
    lines = textwrap.fill(
        text,
        width,
        initial_indent=f"# {before}",
        subsequent_indent="# " + " " * len(before),
        break_long_words=False,
        break_on_hyphens=False,
    )
    click.echo(lines)


def print_plan(plan: LaunchPlan, front: GatewayOptions, json_out: bool) -> None:
    """Print the command, ready to be copied; its reasons and the gateway are comments."""
    engine = make_engine_upstream(plan) if front.is_enabled else None
    if json_out:
        print_json(serialize_plan(plan) | ({"gateway": front.to_json(engine)} if engine else {}))
        return
    for line in (*front.describe(engine), ENGINE_NOTE, *plan.summary) if engine else plan.summary:
        print_comment(line)
    for flag in plan.launch.flags:
        print_comment(flag.reason, f"  {' '.join(flag.arguments):38}  ")
    for note in plan.launch.notes:
        print_comment(note)
    for node in range(len(plan.launch.per_node)):
        if len(plan.launch.per_node) > 1:
            click.echo(f"# node {node}")
        click.echo(plan.launch.format_command(node))
