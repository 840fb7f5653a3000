"""`quantkit size`: what a model takes, and what it runs on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

import click

from quantkit.cli.console import as_json, as_json_list, handle_errors, show
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
def COMMAND(
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
    from quantkit.serve.sizing.fit import fit_model
    from quantkit.serve.sizing.gpus import read_gpus
    from quantkit.serve.sizing.memory import DEFAULT_CONTEXT, estimate_memory

    if len(targets) > 1 and not compare:
        raise UsageError(
            f"expected one model, found {len(targets)}: {', '.join(targets)}; add --compare"
        )
    dated = read_gpus()
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
        context = min(DEFAULT_CONTEXT, *(model.longest or DEFAULT_CONTEXT for _, model in found))
    asked = [
        (target, estimate_memory(model, context, users, kv, margin, speculative=mtp))
        for target, model in found
    ]
    sides = [
        (target, {key: fit_model(need, card) for key, card in wanted.items()})
        for target, need in asked
    ]
    if compare:
        show_sides([(target, next(iter(by_card.values()))) for target, by_card in sides], json_out)
    elif json_out:
        as_json_list([json_values(by_card, dated) for _, by_card in sides])
    else:
        for _, by_card in sides:
            show(*view(by_card, dated, in_full=gpu is not None))


def read_models(target: str, overrides: Sequence[str], width: Width | None) -> tuple[Model, ...]:
    """The models that a target names: one per format of a recipe, else one."""
    from quantkit.io.package_data import is_recipe_name
    from quantkit.serve.sizing.read import assume_width, plan_recipe_models, read_model

    if is_recipe_name(target):
        made = plan_recipe_models(read_recipe(target, overrides)[1])
        return tuple(assume_width(model, width) for model in made) if width else made
    if overrides:
        raise UsageError(f"--set: {target} is no recipe; leave the option out")
    return (read_model(target, width),)


def view(found: dict[str, Fit], dated: GpuCatalog, *, in_full: bool) -> list[RenderableType]:
    """The tables of one model."""
    from rich.text import Text

    from quantkit.report.terminal import render_table, strip_control_characters
    from quantkit.serve.sizing import tables
    from quantkit.serve.sizing.batch import compute_max_batched_tokens
    from quantkit.serve.sizing.fit import find_shortfall
    from quantkit.serve.sizing.memory_fraction import GPU_ENGINES
    from quantkit.serve.sizing.roofline import compute_bounds

    fits = list(found.values())
    model = fits[0].needs.model
    head = Text(strip_control_characters(model.name), style="bold")
    head.append(
        "\n" + strip_control_characters(tables.format_headline(model)) + "\n", style="not bold"
    )
    shown: list[RenderableType] = [head, render_table(tables.make_memory_table(fits[0].needs))]
    made = [(fit, compute_bounds(fit)) for fit in fits]
    shown.append(render_table(tables.make_gpu_table(made, dated)))
    for fit, limits in made if in_full else ():
        if single := tables.format_single_gpu(fit):
            shown.append(Text(f"{single}\n"))
        if miss := find_shortfall(fit):
            shown.append(Text(f"{tables.format_shortfall(miss)}.\n"))
        if limits:
            shown.append(render_table(tables.make_bounds_table(fit, limits)))
            shown += [Text(sentence) for sentence in (*tables.iterate_link_notes(fit, limits), "")]
        shown.append(render_table(tables.make_parallelism_table(fit)))
        batches = tables.make_batch_table(fit)
        advised = {
            server: each
            for server in GPU_ENGINES
            if (each := compute_max_batched_tokens(fit, server))
        }
        shown += [render_table(batches)] if batches else []
        shown += [render_table(tables.make_batched_tokens_table(advised, fit))] if advised else []
        shown.append(render_table(tables.make_gpu_facts_table(fit.card, dated)))
    return shown


def json_values(found: dict[str, Fit], dated: GpuCatalog) -> dict[str, object]:
    """One model as plain values."""
    from quantkit.serve.sizing.roofline import compute_bounds
    from quantkit.serve.sizing.summary import serialize_fit, serialize_memory, serialize_model

    needs = next(iter(found.values())).needs
    cards = [serialize_fit(key, fit, compute_bounds(fit)) for key, fit in found.items()]
    return {
        "model": serialize_model(needs.model),
        "needs": serialize_memory(needs),
        "cards_updated": str(dated.updated),
        "cards": cards,
    }


def show_sides(found: Sequence[tuple[str, Fit]], json_out: bool) -> None:
    """Several models side by side."""
    from quantkit.report.terminal import render_table
    from quantkit.serve.sizing.compare import (
        ComparedModel,
        find_report,
        make_fidelity_table,
        make_size_table,
        make_speed_table,
    )
    from quantkit.serve.sizing.roofline import compute_bounds
    from quantkit.serve.sizing.summary import serialize_fit, serialize_memory, serialize_model

    sides = [
        ComparedModel(
            name=fit.needs.model.name.rpartition("/")[2],
            fit=fit,
            bounds=compute_bounds(fit),
            fidelity=find_report(target),
        )
        for target, fit in found
    ]
    if json_out:
        as_json([
            {
                "model": serialize_model(side.fit.needs.model),
                "needs": serialize_memory(side.fit.needs),
                "on": serialize_fit(side.fit.card.name, side.fit, side.bounds),
                "fidelity": side.fidelity.model_dump(
                    mode="json", include={"distribution", "benchmarks", "status"}
                )
                if side.fidelity
                else None,
            }
            for side in sides
        ])
        return
    told = make_fidelity_table(sides)
    show(
        render_table(make_size_table(sides)),
        render_table(make_speed_table(sides)),
        *([render_table(told)] if told else []),
    )
