"""`quantkit size`: what a model takes, and what it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import click

from quantkit.cli.console import handle_errors, print_json, print_json_list, show
from quantkit.cli.options import JSON, SET, read_recipe
from quantkit.errors import UsageError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from quantkit.serve.sizing.fit import Fit
    from quantkit.serve.sizing.gpus import GpuCatalog
    from quantkit.serve.sizing.model import Model
    from quantkit.serve.sizing.read import Width

COMPARED_ON = "h100"
"""The card that models are compared on when none is named."""


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="ARTIFACT|RECIPE|CONFIG.JSON...")
@click.option(
    "--context", type=click.IntRange(min=1), help="Longest context of a request.  [default: 32768]"
)
@click.option(
    "--users",
    type=click.IntRange(1, 10**6),
    default=10,
    show_default=True,
    help="Requests at a time.",
)
@click.option(
    "--gpu",
    metavar="NAME",
    help="One card in full: its sources, degrees, batches. Default: every card.",
)
@click.option(
    "--kv",
    type=click.Choice(["bf16", "fp8"]),
    default="bf16",
    show_default=True,
    help="KV cache dtype.",
)
@click.option(
    "--margin",
    type=click.FloatRange(0, 10),
    default=0.15,
    show_default=True,
    help="Reserve, as a share.",
)
@click.option("--mtp", is_flag=True, help="Count the MTP block: for speculative decoding.")
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp8", "int8", "int4"]),
    help="Of a config.json: every parameter at this width, no scales (a rule of thumb).",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Several models side by side, with their fidelity reports' figures.",
)
@SET
@JSON
@handle_errors
def command(
    targets: tuple[str, ...],
    context: int | None,
    users: int,
    gpu: str | None,
    kv: Literal["bf16", "fp8"],
    margin: float,
    mtp: bool,
    dtype: Width | None,
    compare: bool,
    overrides: tuple[str, ...],
    json_out: bool,
) -> None:
    """Say what a model takes and what it runs on, from headers, a plan or a config.json alone.

    Memory is weights + KV cache of the longest context x users + a margin. Speeds are computed upper bounds.

    \b
    Example: quantkit size artifacts/tiny-v3-awq4 --context 512 --users 100
             quantkit size v3-gptq4-fp8 --gpu h200
             quantkit size --compare deepseek-ai/DeepSeek-V3 v3-awq4 r1-distill-qwen-32b-awq4
    """
    from quantkit.serve.sizing.fit import fits
    from quantkit.serve.sizing.gpus import read_cards
    from quantkit.serve.sizing.memory import CONTEXT, needs

    if len(targets) > 1 and not compare:
        raise UsageError(
            f"expected one model, found {len(targets)}: {', '.join(targets)}; add --compare"
        )
    dated = read_cards()
    wanted = (
        {gpu: dated.named(gpu)}
        if gpu
        else {COMPARED_ON: dated.cards[COMPARED_ON]}
        if compare
        else dated.cards
    )
    found = [
        (target, model) for target in targets for model in read_models(target, overrides, dtype)
    ]
    if (
        compare and context is None
    ):  # one for all: the longest that everybody can, as far as CONTEXT
        context = min(CONTEXT, *(model.longest or CONTEXT for _, model in found))
    asked = [
        (target, needs(model, context, users, kv, margin, speculative=mtp))
        for target, model in found
    ]
    sides = [
        (target, {key: fits(need, card) for key, card in wanted.items()}) for target, need in asked
    ]
    if compare:
        show_sides([(target, next(iter(by_card.values()))) for target, by_card in sides], json_out)
    elif json_out:
        print_json_list([json_values(by_card, dated) for _, by_card in sides])
    else:
        for _, by_card in sides:
            show(*view(by_card, dated, in_full=gpu is not None))


def read_models(target: str, overrides: Sequence[str], width: Width | None) -> tuple[Model, ...]:
    """The models that a target names: one per format of a recipe, else one."""
    from quantkit.io.package_data import names_recipe
    from quantkit.serve.sizing.read import assuming, model_of, recipe_models

    if names_recipe(target):
        made = recipe_models(read_recipe(target, overrides)[1])
        return tuple(assuming(model, width) for model in made) if width else made
    if overrides:
        raise UsageError(f"--set: {target} is no recipe; leave the option out")
    return (model_of(target, width),)


def view(found: dict[str, Fit], dated: GpuCatalog, *, in_full: bool) -> list[RenderableType]:
    """The tables of one model."""
    from rich.text import Text

    from quantkit.report.terminal import plain, table
    from quantkit.serve.sizing import tables
    from quantkit.serve.sizing.batch import advice
    from quantkit.serve.sizing.fit import missed
    from quantkit.serve.sizing.memory_fraction import SERVERS
    from quantkit.serve.sizing.roofline import bounds

    fits = list(found.values())
    model = fits[0].needs.model
    head = Text(plain(model.name), style="bold")
    head.append("\n" + plain(tables.headline(model)) + "\n", style="not bold")
    shown: list[RenderableType] = [head, table(tables.memory(fits[0].needs))]
    made = [(fit, bounds(fit)) for fit in fits]
    shown.append(table(tables.cards_table(made, dated)))
    for fit, limits in made if in_full else ():
        if single := tables.one_card_told(fit):
            shown.append(Text(f"{single}\n"))
        if miss := missed(fit):
            shown.append(Text(f"{tables.miss_told(miss)}.\n"))
        if limits:
            shown.append(table(tables.bounds_table(fit, limits)))
            shown += [Text(sentence) for sentence in (*tables.interconnect(fit, limits), "")]
        shown.append(table(tables.degrees(fit)))
        batches = tables.batches(fit)
        advised = {server: each for server in SERVERS if (each := advice(fit, server))}
        shown += [table(batches)] if batches else []
        shown += [table(tables.advice_table(advised, fit))] if advised else []
        shown.append(table(tables.card_facts(fit.card, dated)))
    return shown


def json_values(found: dict[str, Fit], dated: GpuCatalog) -> dict[str, object]:
    """One model as plain values."""
    from quantkit.serve.sizing.roofline import bounds
    from quantkit.serve.sizing.summary import fit_values, model_values, needs_values

    needs = next(iter(found.values())).needs
    cards = [fit_values(key, fit, bounds(fit)) for key, fit in found.items()]
    return {
        "model": model_values(needs.model),
        "needs": needs_values(needs),
        "cards_updated": str(dated.updated),
        "cards": cards,
    }


def show_sides(found: Sequence[tuple[str, Fit]], json_out: bool) -> None:
    """Several models side by side."""
    from quantkit.report.terminal import table
    from quantkit.serve.sizing.compare import Side, fidelity, report_of, sizes, speeds
    from quantkit.serve.sizing.roofline import bounds
    from quantkit.serve.sizing.summary import fit_values, model_values, needs_values

    sides = [
        Side(
            name=fit.needs.model.name.rpartition("/")[2],
            fit=fit,
            bounds=bounds(fit),
            fidelity=report_of(target),
        )
        for target, fit in found
    ]
    if json_out:
        print_json([
            {
                "model": model_values(side.fit.needs.model),
                "needs": needs_values(side.fit.needs),
                "on": fit_values(side.fit.card.name, side.fit, side.bounds),
                "fidelity": side.fidelity.model_dump(
                    mode="json", include={"distribution", "benchmarks", "status"}
                )
                if side.fidelity
                else None,
            }
            for side in sides
        ])
        return
    told = fidelity(sides)
    show(table(sizes(sides)), table(speeds(sides)), *([table(told)] if told else []))
