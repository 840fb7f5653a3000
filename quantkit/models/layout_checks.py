"""Checks of a derived layout on a small random instance of the same configuration.

Checked on it (`small_instance`), after experts and logits (`logit_checks`):

    readers      linears with the same input values form a group; a linear that is not called once
                 with all tokens is kept;
    absorbers    a tensor absorbs a group's scale if dividing it and multiplying the readers leaves
                 the block's output unchanged, and the output of each module that it does not
                 depend on in so short a text, such as an indexer that selects the best 2048 tokens.

Only checked properties are used: without an absorber a group's input is not scaled.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from quantkit.contracts import Absorber, Block, Config, Layout, LinearGroup
from quantkit.models.block_trial import (
    LENGTHS,
    BlockTrial,
    InputReaders,
    select_block_tensors,
)
from quantkit.models.inspect import mark_routers
from quantkit.models.layers import (
    MetaModel,
    make_random_rows,
)
from quantkit.models.row_maps import list_row_maps


def make_absorber(block: Block, reading: InputReaders, hf_config: Any) -> Absorber | None:
    """Return the absorber of a reading with its rows in this block, or None."""
    if reading.absorber is None:
        return None
    module, sizes = f"{block.name}.{reading.absorber}", {x.name: x for x in block.linears}
    shapes = {spec.name.removesuffix(".weight"): spec.shape for spec in block.others}
    reader = f"{block.name}.{reading.readers[0]}"  # a router of its own class is no linear yet
    into = sizes[reader].in_features if reader in sizes else shapes[reader][-1]
    if module not in sizes:
        return Absorber(module=module) if shapes[module] == (into,) else None
    maps = list_row_maps(sizes[module].out_features, into, hf_config)
    if reading.rows not in maps:  # found on the small instance, and not possible in this one
        return None
    return Absorber(module=module, rows=maps[reading.rows])


def iterate_absorber_candidates(
    block: Block, reading: InputReaders, hf_config: Any
) -> Iterator[InputReaders]:
    """Yield possible absorbers of a reading's scale: norms of its width, then other linears."""
    sizes = {x.name.removeprefix(f"{block.name}."): x for x in block.linears}
    into = sizes[reading.readers[0]].in_features
    for spec in block.others:
        module, _, kind = spec.name.removeprefix(f"{block.name}.").rpartition(".")
        if kind == "weight" and spec.shape == (into,):
            yield replace(reading, absorber=module)
    for name, linear in sizes.items():
        if name not in reading.readers:
            for rows in list_row_maps(linear.out_features, into, hf_config):
                yield replace(reading, absorber=name, rows=rows)


def make_groups(
    block: Block, readings: tuple[InputReaders, ...], hf_config: Any
) -> tuple[LinearGroup, ...]:
    """Return the readings as groups of this block."""
    return tuple(
        LinearGroup(
            name=f"{block.name}.{reading.readers[0]}.in",
            readers=tuple(f"{block.name}.{reader}" for reader in reading.readers),
            absorber=make_absorber(block, reading, hf_config),
            routed_experts=reading.routed_experts,
        )
        for reading in readings
    )


def find_absorbers(
    trial: BlockTrial, readings: tuple[InputReaders, ...]
) -> tuple[InputReaders, ...]:
    """Return the readings, each with the first absorber that passes.

    They are unchanged if the absorbers fail together.
    """
    block, hf_config = trial.block, trial.meta_model.config
    absorbed = tuple(
        next(
            (
                candidate
                for candidate in iterate_absorber_candidates(block, reading, hf_config)
                if trial.holds(make_groups(block, (candidate,), hf_config))
            ),
            reading,
        )
        for reading in readings
    )
    is_valid = trial.holds(make_groups(block, absorbed, hf_config))
    return absorbed if is_valid else readings


@dataclass(frozen=True, kw_only=True)
class BlockFindings:
    """Findings on one block of the instance: readings with absorbers; by full name, linears that
    are not called once with every token before the experts, and modules of the router.
    """

    readings: tuple[InputReaders, ...]
    uncalled: tuple[str, ...]
    routers: tuple[str, ...] = ()


def inspect_blocks(
    config: Config, meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> list[BlockFindings]:
    """Return the findings of each block.

    Blocks of one structure first try the readings of the first such block.
    """
    rows = make_random_rows(meta_model.outer, LENGTHS, seed=3)  # [tokens, width]
    known: dict[tuple[str, ...], tuple[InputReaders, ...]] = {}
    known_routers: dict[tuple[str, ...], tuple[str, ...]] = {}
    known_silent: dict[tuple[str, ...], dict[str, bool]] = {}
    result = []
    for block in layout.blocks:
        trial = BlockTrial(
            config=config,
            meta_model=meta_model,
            block=block,
            tensors=select_block_tensors(block, tensors),
            rows=rows,
        )
        kind = tuple(name.removeprefix(block.name) for name in trial.tensors)
        if kind not in known_routers:
            known_routers[kind] = trial.find_routers()
            known_silent[kind] = trial.find_silent_modules()
        routers = tuple(f"{block.name}{local}" for local in known_routers[kind])
        marked = mark_routers(block, routers) if routers else block
        trial = replace(trial, block=marked, silent=known_silent[kind])
        readings = trial.readings()
        best = known.get(kind, ())
        is_same = [r.readers for r in best] == [r.readers for r in readings]
        if not (is_same and trial.holds(make_groups(block, best, meta_model.config))):
            best = find_absorbers(trial, readings)
        known[kind] = best
        uncalled = tuple(x.name for x in trial.dense if not trial.is_called_once(x))
        result.append(BlockFindings(readings=best, uncalled=uncalled, routers=routers))
    return result
