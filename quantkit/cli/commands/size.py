"""`quantkit size`: estimate the memory and speed of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import click
from rich.console import RenderableType
from rich.text import Text

from quantkit.cli.console import handle_errors, print_json, print_json_list
from quantkit.cli.options import JSON, SET, parse_overrides
from quantkit.cli.rich_output import show
from quantkit.errors import UsageError
from quantkit.io.package_data import is_recipe_name
from quantkit.recipe.recipe_file import read_recipe
from quantkit.report.terminal import render_table, strip_control_characters
from quantkit.serve.sizing import tables
from quantkit.serve.sizing.batch import compute_max_batched_tokens
from quantkit.serve.sizing.compare import (
    SizedModel,
    find_report,
    make_fidelity_table,
    make_size_table,
    make_speed_table,
)
from quantkit.serve.sizing.fit import Fit, find_shortfall, fit_model
from quantkit.serve.sizing.gpus import GpuCatalog, read_gpus
from quantkit.serve.sizing.memory import DEFAULT_CONTEXT, estimate_memory
from quantkit.serve.sizing.memory_fraction import GPU_ENGINES
from quantkit.serve.sizing.model import Model
from quantkit.serve.sizing.read import Width, assume_width, plan_recipe_models, read_model
from quantkit.serve.sizing.roofline import compute_bounds
from quantkit.serve.sizing.summary import serialize_fit, serialize_memory, serialize_model

COMPARED_ON = "h100"
"""The default GPU of --compare."""


@click.command()
@click.argument("targets", nargs=-1, required=True, metavar="ARTIFACT|RECIPE|CONFIG.JSON...")
@click.option(
    "--context",
    type=click.IntRange(min=1),
    help="Longest context of a request in tokens.  [default: 32768]",
)
@click.option(
    "--users",
    type=click.IntRange(1, 10**6),
    default=10,
    show_default=True,
    help="Concurrent requests.",
)
@click.option(
    "--gpu",
    metavar="NAME",
    help="Print one GPU in full: its sources, parallelism, batches. Default: all GPUs.",
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
    help="Memory reserve, as a share.",
)
@click.option("--mtp", is_flag=True, help="Include the MTP block, for speculative decoding.")
@click.option(
    "--dtype",
    type=click.Choice(["bf16", "fp16", "fp8", "int8", "int4"]),
    help="For a config.json: all parameters at this width, without scales (a rule of thumb).",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Compare several models side by side, with the figures of their fidelity reports.",
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
    """Estimate the memory and speed of a model.

    Reads headers, a plan or a config.json only. Memory is weights + KV cache of the longest context
    x users + a margin. Speeds are computed upper bounds, not measured.

    \b
    Example: quantkit size artifacts/tiny-v3-awq4 --context 512 --users 100
             quantkit size v3-gptq4-fp8 --gpu h200
             quantkit size --compare deepseek-ai/DeepSeek-V3 v3-awq4 r1-distill-qwen-32b-awq4
    """
    if len(targets) > 1 and not compare:
        raise UsageError(
            f"expected one model, found {len(targets)}: {', '.join(targets)}; add --compare"
        )
    catalog = read_gpus()
    if gpu:
        gpus = {gpu: catalog.get_gpu(gpu)}
    elif compare:
        gpus = {COMPARED_ON: catalog.gpus[COMPARED_ON]}
    else:
        gpus = dict(catalog.gpus)
    models = [
        (target, model) for target in targets for model in read_models(target, overrides, dtype)
    ]
    if compare and context is None:  # the longest context that all support, up to CONTEXT
        context = min(
            DEFAULT_CONTEXT, *(model.max_context or DEFAULT_CONTEXT for _, model in models)
        )
    estimates = [
        (target, estimate_memory(model, context, users, kv, margin, speculative=mtp))
        for target, model in models
    ]
    fits_by_gpu = [
        (target, {key: fit_model(estimate, device) for key, device in gpus.items()})
        for target, estimate in estimates
    ]
    if compare:
        show_sides([(target, next(iter(fit.values()))) for target, fit in fits_by_gpu], json_out)
    elif json_out:
        print_json_list([make_json(fit, catalog) for _, fit in fits_by_gpu])
    else:
        for _, fit in fits_by_gpu:
            show(*make_tables(fit, catalog, in_full=gpu is not None))


def read_models(target: str, overrides: Sequence[str], width: Width | None) -> tuple[Model, ...]:
    """Return the models of a target: one per format of a recipe, otherwise one."""
    if is_recipe_name(target):
        models = plan_recipe_models(read_recipe(target, parse_overrides(overrides))[1])
        return tuple(assume_width(model, width) for model in models) if width else models
    if overrides:
        raise UsageError(f"--set: {target} is no recipe; leave the option out")
    return (read_model(target, width),)


def make_tables(
    fits_by_gpu: dict[str, Fit], catalog: GpuCatalog, *, in_full: bool
) -> list[RenderableType]:
    """Return the tables of one model."""
    all_fits = list(fits_by_gpu.values())
    model = all_fits[0].memory.model
    head = Text(strip_control_characters(model.name), style="bold")
    head.append(
        "\n" + strip_control_characters(tables.format_headline(model)) + "\n", style="not bold"
    )
    parts: list[RenderableType] = [head, render_table(tables.make_memory_table(all_fits[0].memory))]
    limited = [(fit, compute_bounds(fit)) for fit in all_fits]
    parts.append(render_table(tables.make_gpu_table(limited, catalog)))
    for fit, limits in limited if in_full else ():
        if single := tables.format_single_gpu(fit):
            parts.append(Text(f"{single}\n"))
        if miss := find_shortfall(fit):
            parts.append(Text(f"{tables.format_shortfall(miss)}.\n"))
        if limits:
            parts.append(render_table(tables.make_bounds_table(fit, limits)))
            parts += [Text(sentence) for sentence in (*tables.iterate_link_notes(fit, limits), "")]
        parts.append(render_table(tables.make_parallelism_table(fit)))
        batches = tables.make_batch_table(fit)
        advised = {
            server: batch
            for server in GPU_ENGINES
            if (batch := compute_max_batched_tokens(fit, server))
        }
        parts += [render_table(batches)] if batches else []
        parts += [render_table(tables.make_batched_tokens_table(advised, fit))] if advised else []
        parts.append(render_table(tables.make_gpu_facts_table(fit.gpu, catalog)))
    return parts


def make_json(fits_by_gpu: dict[str, Fit], catalog: GpuCatalog) -> dict[str, object]:
    """Return one model as JSON values."""
    estimate = next(iter(fits_by_gpu.values())).memory
    return {
        "model": serialize_model(estimate.model),
        "needs": serialize_memory(estimate),
        "cards_updated": str(catalog.updated),
        "cards": [serialize_fit(key, fit, compute_bounds(fit)) for key, fit in fits_by_gpu.items()],
    }


def show_sides(models: Sequence[tuple[str, Fit]], json_out: bool) -> None:
    """Print several models side by side."""
    sides = [
        SizedModel(
            name=fit.memory.model.name.rpartition("/")[2],
            fit=fit,
            bounds=compute_bounds(fit),
            fidelity=find_report(target),
        )
        for target, fit in models
    ]
    if json_out:
        print_json([
            {
                "model": serialize_model(side.fit.memory.model),
                "needs": serialize_memory(side.fit.memory),
                "on": serialize_fit(side.fit.gpu.name, side.fit, side.bounds),
                "fidelity": side.fidelity.model_dump(
                    mode="json", include={"distribution", "benchmarks", "status"}
                )
                if side.fidelity
                else None,
            }
            for side in sides
        ])
        return
    figures = make_fidelity_table(sides)
    show(
        render_table(make_size_table(sides)),
        render_table(make_speed_table(sides)),
        *([render_table(figures)] if figures else []),
    )
