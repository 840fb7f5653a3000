"""The files of an artifact next to its weights: config.json, the index, the source's sidecars,
recipe.yaml.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from quantkit.artifact.layout import CONFIG, INDEX, RECIPE
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.encoding import remove_quantization
from quantkit.contracts import Contents, Layout, ModelPart
from quantkit.formats.common.engine_names import LM_HEAD
from quantkit.io.files import iterate_chunks, make_folder, write_atomic, write_json
from quantkit.plan.plan import Plan
from quantkit.recipe.resolved_text import resolve_recipe_text


def make_config(plan: Plan) -> dict[str, object]:
    """Return the artifact's config.json: the source's, with quantization_config replaced by the
    artifact's own.
    """
    values = remove_quantization(plan.source.config.values)
    kept = [name for name, d in plan.decisions.items() if d.action == "keep" and d.codes is None]
    fp8 = [name for name in kept if plan.decisions[name].keep == "fp8"]
    kept += list_kept_matrices(plan.layout)
    kept += [] if plan.layout.head else [LM_HEAD]
    parts = {part.name: list_modules(part) for part in plan.layout.parts}
    contents = Contents(
        schemes=plan.schemes,
        kept=kept,
        fp8=[*fp8, *plan.fp8_parts],
        fp8_block=plan.kept.side,
        parts=parts,
        text_prefixes=list_text_prefixes(plan),
        aliases=dict(iterate_aliases(plan)) if parts else {},
    )
    entry = plan.format.quantization_config(contents) if contents.schemes else None
    if entry is not None:
        values["quantization_config"] = entry
    dropped = any(decision.action == "drop" for decision in plan.decisions.values())
    absent = plan.source.config.integer("num_nextn_predict_layers", 0) and not holds_mtp(plan)
    if dropped or absent:
        values["num_nextn_predict_layers"] = 0  # otherwise engines look for the MTP tensors
    return values


def list_text_prefixes(plan: Plan) -> tuple[str, ...]:
    """Return where the text model lies in the checkpoint and in transformers."""
    names = (name for block in plan.layout.blocks[:1] for name in (block.name, block.path))
    return tuple(dict.fromkeys(".".join(name.split(".")[:-2]) for name in names))


def iterate_aliases(plan: Plan) -> Iterator[tuple[str, str]]:
    """Yield the linears of blocks that have another name in transformers, with it."""
    from quantkit.models.layers import get_layer_name  # imports transformers: seconds

    for block in plan.layout.blocks:
        for linear in block.linears if block.module or block.renames else ():
            yield linear.name, f"{block.path}.{get_layer_name(block, linear.name)}"


def list_kept_matrices(layout: Layout) -> list[str]:
    """Return the modules of the matrices that no rule selects: transformers may run linears there.

    Also the name in transformers of a router or gate that is stored under another one.
    """
    names = [
        spec.name.removesuffix(".weight")
        for block in layout.blocks
        for spec in block.others
        if spec.name.endswith(".weight") and len(spec.shape) == 2
    ]
    for block in layout.blocks:
        renames = dict(block.renames)
        for linear in block.linears:
            local = linear.name.removeprefix(f"{block.name}.")
            if linear.role == "router" and local in renames:
                names.append(f"{block.name}.{renames[local]}")
    return names


def list_modules(part: ModelPart) -> list[str]:
    """Return the modules of a part's tensors."""
    return list(dict.fromkeys(name.rpartition(".")[0] for name in part.tensors))


def holds_mtp(plan: Plan) -> bool:
    """Return whether the artifact holds MTP layers: as blocks, or as a part that is copied.

    A copied one is called "mtp", or is a layer after the last one that transformers runs.
    """
    last = (part.name.rpartition(".")[2] for part in plan.layout.parts)
    return bool(list_mtp_blocks(plan)) or any(x == "mtp" or x.isdigit() for x in last)


def list_mtp_blocks(plan: Plan) -> tuple[str, ...]:
    """Return the names of the MTP blocks that the artifact holds."""
    return tuple(block.name for block in plan.layout.blocks if block.kind == "mtp")


def check_model_files(plans: Sequence[Plan], recipe_text: str) -> None:
    """Make config.json and recipe.yaml of each plan, so that a fault shows before the build.

    Raises QuantkitError as `write_model_files` would.
    """
    for plan in plans:
        make_config(plan)
        resolve_recipe_text(recipe_text, plan.recipe)


def write_model_files(folder: Path, plan: Plan, source: Checkpoint, recipe_text: str) -> None:
    """Write config.json, the index (for more than one shard), the source's sidecars and
    recipe.yaml.

    recipe_text: the recipe's file; the artifact's recipe is resolved, so that it builds the
    artifact again.
    """
    for path in source.sidecars:
        target = folder / path.relative_to(source.folder)
        make_folder(target.parent)  # additional_chat_templates
        write_atomic(target, iterate_chunks(path))
    write_json(folder / CONFIG, make_config(plan), infinite=True)
    write_atomic(folder / RECIPE, resolve_recipe_text(recipe_text, plan.recipe).encode())
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        write_json(
            folder / INDEX, {"metadata": {"total_size": plan.n_bytes}, "weight_map": weight_map}
        )
