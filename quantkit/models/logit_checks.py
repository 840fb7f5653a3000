"""Proof of a derived layout: run as in a build, a small instance has transformers' logits.

The order: final tensors on which arguments depend, experts (`expert_checks`), then

    logits       block by block, as in a build, they equal those of transformers' own forward, for
                 texts shorter and longer than every window, alone and in a padded batch;
    arguments    those of the layers depend on the shape of a batch, not on its tokens, but for
                 states and token ids;

and the blocks' readers and absorbers (`layout_checks`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from quantkit.contracts import Config, Layout
from quantkit.errors import CheckpointError
from quantkit.models import expert_checks, full_model, layer_states
from quantkit.models.block_trial import LENGTHS, select_block_tensors
from quantkit.models.experts import run_block_batches
from quantkit.models.inspect import make_refusal
from quantkit.models.layer_calls import name_tensors
from quantkit.models.layers import MetaModel, embed_tokens, load_outer_model, load_tables
from quantkit.models.layout_checks import BlockFindings, inspect_blocks
from quantkit.models.small_instance import VOCABULARY
from quantkit.models.stored_names import UnknownForm

BATCHES = (LENGTHS, LENGTHS, (6, 4), (5,))
"""Batches of the comparison of logits: two of one shape, and texts shorter than the window."""
LOGITS_TOLERANCE = 1e-4
"""Largest relative difference of logits; a missing part of the model causes 1e-2 and more."""


@dataclass(frozen=True, kw_only=True)
class Proof:
    """Results of the checks: the layout of the instance with checked experts, whether sequences
    must run alone, the final tensors on which arguments of blocks depend, the findings of each
    block.
    """

    layout: Layout
    runs_alone: bool
    tables: tuple[str, ...]
    findings: Sequence[BlockFindings]


def prove_layout(
    config: Config, meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> Proof:
    """Check a layout on the instance; tensors: by stored name.

    Raises CheckpointError with the first property that it does not have.
    """
    try:
        tables = find_tables(meta_model, layout, tensors)
        meta_model = load_tables(meta_model, {layout.get_path(x): tensors[x] for x in tables})
        layout = expert_checks.check_experts(meta_model, layout, tensors, LENGTHS)
        runs_alone = check_logits(config, meta_model, layout, tensors)
    except CheckpointError:
        raise
    except UnknownForm as fault:
        raise make_refusal(config, str(fault)) from fault
    except Exception as fault:  # an argument that transformers' layer needs
        reason = meta_model.outer.find_exchange() or f"{type(fault).__name__}: {fault}"
        raise make_refusal(config, f"its layers cannot be run one by one ({reason})") from fault
    findings = inspect_blocks(config, meta_model, layout, tensors)
    return Proof(layout=layout, runs_alone=runs_alone, tables=tables, findings=findings)


def check_logits(
    config: Config, meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> bool:
    """Compare logits of both ways to run the instance; return whether sequences must run alone.

    Raises CheckpointError if the logits differ even so, and what transformers' layers raise.
    """
    lengths = [length for batch in BATCHES for length in batch]
    ids = torch.randint(0, VOCABULARY, (sum(lengths),), generator=torch.Generator().manual_seed(1))
    model = full_model.make_model(meta_model, layout, tensors.__getitem__)
    has_experts = any(block.experts for block in layout.blocks)
    sequences = ids.split(lengths)
    whole = (
        layer_states.record_states(model, meta_model.outer.form, sequences)
        if has_experts
        else layer_states.run_sequences(model, sequences)
    )
    check_arguments(config, meta_model, layout, tensors)

    def measure_change(batches: Sequence[tuple[int, ...]]) -> float:
        logits = compute_logits(meta_model, layout, tensors, ids, batches)
        return float((logits - whole.logits).norm() / whole.logits.norm())

    changes = [measure_change(BATCHES)]
    if min(changes) > LOGITS_TOLERANCE and has_experts:
        # before the slow sequences of their own: rounding changes the routing of deep mixtures
        changes.append(
            layer_states.compare_blocks(meta_model, layout, tensors, whole.states, BATCHES)
        )
    if min(changes) <= LOGITS_TOLERANCE:
        return False
    changes.append(measure_change(tuple((length,) for length in lengths)))
    if changes[-1] <= LOGITS_TOLERANCE:
        return True
    exchange = meta_model.outer.find_exchange()
    raise make_refusal(
        config,
        f"run block by block, a small instance gives other logits than transformers (by "
        f"{min(changes):.0e} of their size)" + (f": {exchange}" if exchange else ""),
    )


def find_tables(
    meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Return the final tensors on which the arguments of layers depend, by their stored names."""

    def record(names: Sequence[str]) -> dict[str, Tensor]:
        chosen = {layout.get_path(name): tensors[name] for name in names}
        outer = load_outer_model(meta_model, chosen) if names else meta_model.outer
        return dict(name_tensors(outer.record(1, max(LENGTHS))))

    def matters(names: Sequence[str]) -> bool:
        other = record(names)
        return any(x not in other or not torch.equal(y, other[x]) for x, y in plain.items())

    plain, names = record(()), [spec.name for spec in layout.final_tensors]
    return tuple(name for name in names if matters([name])) if matters(names) else ()


def select_outer_tensors(
    meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Return the tensors outside the blocks by their names in transformers' model."""
    stored, name = full_model.name_head(meta_model, layout)
    names = [f"{layout.embedding.name}.weight", *(spec.name for spec in layout.final_tensors)]
    return {**{layout.get_path(x): tensors[x] for x in names}, name: tensors[stored]}


def compute_logits(
    meta_model: MetaModel,
    layout: Layout,
    tensors: Mapping[str, Tensor],
    ids: Tensor,
    batches: Sequence[tuple[int, ...]],
) -> Tensor:
    """Return the logits of the instance run as in a build, block by block: [tokens] -> [tokens, v].

    Each block runs every batch before the next block runs any.
    """
    outer = load_outer_model(meta_model, select_outer_tensors(meta_model, layout, tensors))
    parts = ids.split([sum(batch) for batch in batches])
    states = [embed_tokens(outer, part, batch) for part, batch in zip(parts, batches, strict=True)]
    for block in layout.blocks:
        own = select_block_tensors(block, tensors)
        states = [run.out for run in run_block_batches(meta_model, block, own, states, batches)]
    return outer.compute_logits(torch.cat(states))


def check_arguments(
    config: Config, meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> None:
    """Check that the arguments of layers depend on the shape of a batch and not on its tokens, but
    for states and token ids.

    Raises CheckpointError.
    """
    outer = load_outer_model(meta_model, select_outer_tensors(meta_model, layout, tensors))
    shape = (1, max(LENGTHS))
    first, second = (
        dict(name_tensors(outer.record_for(torch.full(shape, token)))) for token in (3, 7)
    )
    for name, tensor in first.items():
        if outer.is_ids_argument(name):
            continue
        if name not in second or not torch.equal(tensor, second[name]):
            raise make_refusal(
                config,
                f"its layers take another argument than states and token ids that depends on the "
                f"text ({name.removeprefix('.')} {list(tensor.shape)})",
            )
