"""`quantkit init`: print a commented recipe for a model."""

from __future__ import annotations

import click

from quantkit.cli.console import handle_errors
from quantkit.cli.model_target import add_model_options, make_request
from quantkit.cli.options import SET, parse_overrides
from quantkit.errors import UsageError


@click.command()
@click.argument("model")
@add_model_options
@SET
@click.option("--output", metavar="DIR", help="Folder of the artifact, as output.path.")
@click.option(
    "--for",
    "gpus",
    metavar="GPUS",
    help="Choose the scheme that fits these GPUs, e.g. 'H100 80GB x8'.",
)
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="With --for: longest context of a request in tokens.  [default: 32768]",
)
@click.option(
    "--users",
    type=click.IntRange(1, 10**6),
    help="With --for: concurrent requests.  [default: 10]",
)
@handle_errors
def command(
    model: str,
    method: str | None,
    scheme: str | None,
    bits: int | None,
    format_name: str | None,
    rules: str | None,
    overrides: tuple[str, ...],
    output: str | None,
    gpus: str | None,
    context: int | None,
    users: int | None,
) -> None:
    """Print a commented recipe for a model.

    MODEL is a folder, a hub id (owner/name) or builtin:tiny-v3. Every key has the reason for its
    value. With --for, the scheme is the one that loses least among those that fit the GPUs, by the
    arithmetic of `quantkit size`; the numbers are in a comment. Only headers are read.

    \b
    Example: quantkit init ./my-model > recipe.yaml
             quantkit init Qwen/Qwen3-30B-A3B --for "H100 80GB x1" --users 10 > recipe.yaml
    """
    # Reading headers needs torch's dtypes: `quantkit init --help` starts without.
    from quantkit.plan.choose_recipe import choose_recipe
    from quantkit.plan.model_recipe import finish_recipe
    from quantkit.plan.plan import match_source
    from quantkit.plan.sources import read_model_facts
    from quantkit.recipe.recipe_file import is_model
    from quantkit.serve.sizing.choose_scheme import GpuTarget, choose_scheme, parse_gpus
    from quantkit.serve.sizing.gpus import read_gpus
    from quantkit.serve.sizing.memory import DEFAULT_USERS

    if gpus is None and (context is not None or users is not None):
        raise UsageError("--context and --users: expected --for GPUS with them; add it")
    if not is_model(model):
        raise UsageError(
            f"{model}: expected a model (a folder, a hub id or builtin:NAME), found none; check "
            "the path"
        )
    kind = None if gpus is None else parse_gpus(gpus, read_gpus())
    request = make_request(model, method, scheme, bits, format_name, rules, output)
    source = read_model_facts(model)
    matched = match_source(source)
    if kind is None:
        chosen = choose_recipe(request, source, matched)
    else:
        target = GpuTarget(
            gpu=kind[0], count=kind[1], context=context, users=users or DEFAULT_USERS
        )
        chosen = choose_scheme(request, source, matched, target)
    click.echo(finish_recipe(request, chosen, parse_overrides(overrides)).text, nl=False)
