"""`quantkit serve`: an artifact behind an OpenAI-compatible API."""

from __future__ import annotations

import shutil
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from quantkit.cli.console import as_json, handle_errors
from quantkit.cli.options import JSON
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from quantkit.serve.engines.launch_plan import LaunchPlan
    from quantkit.serve.engines.start import GatewayOptions
    from quantkit.serve.gateway.settings import Upstream

BEHIND = "the engine behind it, on a port that is free now; a start takes another"
ENGINES = ["auto", "vllm", "sglang", "transformers"]


@click.command()
@click.argument("artifact")
@click.argument("engine_flags", nargs=-1, metavar="[-- ENGINE_FLAGS...]")
@click.option(
    "--engine",
    type=click.Choice(ENGINES),
    default="auto",
    help="Who serves; auto: by what is here.",
)
@click.option(
    "--dry-run", is_flag=True, help="Print the command and its reasons; start and verify nothing."
)
@click.option(
    "--context",
    type=click.IntRange(1),
    help="Longest request in tokens (32768, or the model's longest).",
)
@click.option("--users", type=click.IntRange(1), default=10, help="Requests at once (10).")
@click.option("--gpu", metavar="NAME", help="The card, e.g. h100; default: the one that is here.")
@click.option(
    "--kv", type=click.Choice(["bf16", "fp8"]), default="bf16", help="Cached values (bf16)."
)
@click.option("--host", default="127.0.0.1", help="Where to listen (127.0.0.1).")
@click.option("--port", type=click.IntRange(1, 65535), default=8000, help="Where to listen (8000).")
@click.option("--name", default="", help="The model's name for clients; default: the folder's.")
@click.option(
    "--chat-template",
    type=click.Path(path_type=Path),
    help="A Jinja file, for models that bring none.",
)
@click.option("--docker", is_flag=True, help="Print a docker command instead.")
@click.option("--kubernetes", is_flag=True, help="Print a Kubernetes manifest instead.")
@click.option(
    "--gateway",
    is_flag=True,
    help="Queue, keys, deadlines, fail-over and metrics before the engine.",
)
@click.option(
    "--limit",
    "limits",
    multiple=True,
    metavar="NAME=VALUE",
    help="gateway: a bound, e.g. waiting=200.",
)
@click.option(
    "--keys", type=click.Path(path_type=Path), help="gateway: who may ask; see `quantkit key`."
)
@click.option(
    "--fallback",
    multiple=True,
    metavar="URL[=MODEL]",
    help="gateway: who stands in for the engine.",
)
@click.option(
    "--fallback-key",
    default="",
    metavar="VARIABLE",
    help="gateway: where the stand-ins' API key is.",
)
@click.option(
    "--engine-key",
    default="",
    metavar="VARIABLE",
    help="gateway before a URL: where that server's key is.",
)
@click.option(
    "--start-seconds",
    type=click.FloatRange(1),
    default=3600,
    help="What the engine gets to load (3600).",
)
@click.option(
    "--no-verify", is_flag=True, help="Do not check the artifact against its manifest first."
)
@JSON
@handle_errors
def COMMAND(  # noqa: PLR0913  # every one is an option
    artifact: str, engine_flags: tuple[str, ...], engine: Any, dry_run: bool, context: int | None, users: int,
    gpu: str | None, kv: Any, host: str, port: int, name: str, chat_template: Path | None, docker: bool,
    kubernetes: bool, gateway: bool, limits: tuple[str, ...], keys: Path | None, fallback: tuple[str, ...],
    fallback_key: str, engine_key: str, start_seconds: float, no_verify: bool, json_out: bool,
) -> None:  # fmt: skip
    """Verify an artifact, size it, and serve it by vLLM, SGLang or transformers.

    ARTIFACT is a folder; with --dry-run also a config.json or a hub id whose config ships with quantkit; with --gateway
    also the address of a server that runs (http://HOST:PORT/v1). What follows -- goes to the engine.

    Example: quantkit serve artifacts/tiny-v3-awq4 --dry-run --gpu rtx4090
    """
    from quantkit.serve.engines import engine_process, launch_plan, start

    if gateway and (docker or kubernetes):
        raise UsageError(
            "--docker, --kubernetes: print an engine alone, found --gateway; leave it out, and put `quantkit serve "
            "http://HOST:PORT/v1 --gateway` before the engine's container"
        )
    front = start.GatewayOptions(
        on=gateway, host=host, port=port, limits=limits, keys=keys, fallbacks=fallback, key_variable=fallback_key,
        running=users,
    )  # fmt: skip
    front.check()
    if artifact.startswith(("http://", "https://")):
        if not gateway:
            raise UsageError(
                f"{artifact}: the address of a server: expected --gateway, which is put before it"
            )
        server = start.make_server_upstream(artifact, engine_key)
        if dry_run:
            front_told(front, server, json_out)
        else:
            start.run_gateway(server, front, tell)
        return
    if engine_key:
        raise UsageError(
            "--engine-key: expected the address of a server as ARTIFACT; leave the option out"
        )
    place = (
        (engine_process.LOOPBACK, engine_process.find_free_port()) if gateway else (host, port)
    )  # behind a gateway: for it alone
    wanted = launch_plan.ServeOptions(
        artifact=artifact, engine=engine, context=context, users=users, gpu=gpu, kv=kv, host=place[0], port=place[1],
        name=name, chat_template=chat_template, extra=engine_flags,
    )  # fmt: skip
    plan = launch_plan.plan_launch(wanted, containers=docker or kubernetes)
    if docker or kubernetes:
        for text in launch_plan.render_containers(plan, docker=docker, kubernetes=kubernetes):
            click.echo(text)
    elif dry_run:
        told(plan, front.before(plan), json_out)
    else:
        start.start_engine(
            plan, front.before(plan), verified=no_verify, seconds=start_seconds, tell=tell
        )


def tell(text: str) -> None:
    """What happens, on stderr."""
    click.echo(text, err=True)


def front_told(front: GatewayOptions, server: Upstream, json_out: bool) -> None:
    """The gateway that would stand before a server, on stdout."""
    if json_out:
        as_json({"gateway": front.as_values(server)})
    else:
        click.echo("\n".join(front.lines(server)))


def comment(text: str, before: str = "") -> None:
    """A comment in a shell, as wide as the terminal; what `before` the text takes stays free below it."""
    width = shutil.get_terminal_size((100, 0)).columns  # 100 where stdout is no terminal
    told = textwrap.fill(
        text,
        width,
        initial_indent=f"# {before}",
        subsequent_indent="# " + " " * len(before),
        break_long_words=False,
        break_on_hyphens=False,
    )
    click.echo(told)


def told(plan: LaunchPlan, front: GatewayOptions, json_out: bool) -> None:
    """The command on stdout, ready to be copied; the reasons behind it, and what stands before it, as comments."""
    from quantkit.serve.engines.launch_plan import serialize_plan
    from quantkit.serve.engines.start import make_engine_upstream

    engine = make_engine_upstream(plan) if front.on else None
    if json_out:
        as_json(serialize_plan(plan) | ({"gateway": front.as_values(engine)} if engine else {}))
        return
    for line in (*front.lines(engine), BEHIND, *plan.head) if engine else plan.head:
        comment(line)
    for flag in plan.launch.flags:
        comment(flag.why, f"  {' '.join(flag.words):38}  ")
    for note in plan.launch.notes:
        comment(note)
    for node in range(len(plan.launch.per_node)):
        if len(plan.launch.per_node) > 1:
            click.echo(f"# node {node}")
        click.echo(plan.launch.text(node))
