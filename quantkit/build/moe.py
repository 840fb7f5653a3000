"""The routed experts of a block, wave by wave, in two passes over their weights.

The first pass runs the original experts: the reference stream moves on and the error of every candidate scale of
their common input is summed up over all of them. The second pass folds, solves and stores each wave and moves the
other streams on through what was stored. A single wave that holds all experts is read once. Each pass may begin behind
the waves that an interrupted build is done with.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from quantkit.build import dense, expert_ops
from quantkit.build.context import BlockContext
from quantkit.build.dense import BlockCalibration, ScaledBlock, ScalingCheckSample
from quantkit.build.expert_ops import ExpertSlice, SliceStats, add_outputs, collect_stats
from quantkit.build.hidden_states import Routing, StreamName, create_target
from quantkit.build.quantize_linear import QuantizeRequest, quantize_group, select_expert_stats
from quantkit.contracts import Block, InputStats, Rescale, Scheme
from quantkit.models import scaling
from quantkit.plan.plan import Plan

UNDER_CALIBRATED = {"shared_gram": "shared-gram", "rtn": "rtn-too-few-tokens"}
"""Policy of the recipe -> the name of the fallback in manifest and report."""


@dataclass(kw_only=True)
class ExpertPassState:
    """What the two passes found so far, and how many experts each is done with.

    `errors`: [n, experts] of each candidate scale, a part per wave; `sample`, `folded`: the sample's routed output
    [tokens, hidden] by original and by folded weights.
    """

    surveyed: int = 0
    solved: int = 0
    held: list[tuple[ExpertSlice, SliceStats | None]] = field(default_factory=list)
    errors: list[Tensor] = field(default_factory=list)
    sample: Tensor | None = None
    folded: Tensor | None = None


def waves(plan: Plan, block: Block, done: int = 0) -> list[tuple[int, int]]:
    """Expert ranges of a block's waves behind the first `done` experts; none for a dense block."""
    size, count = plan.memory.wave_experts, block.experts.count if block.experts else 0
    return (
        [(first, min(first + size, count)) for first in range(done, count, size)] if count else []
    )


def passes(plan: Plan, block: Block) -> int:
    """How often a block's experts are read: once when one wave holds them all, or when no stream runs through."""
    return 1 if is_never_run(plan, block) or len(waves(plan, block)) == 1 else 2


def is_never_run(plan: Plan, block: Block) -> bool:
    """Whether no stream runs through a block: an MTP block, or any when nothing is learned and nothing measured."""
    return block.kind == "mtp" or not plan.needs_forward


def experts_using_all_tokens(work: BlockContext, learned: BlockCalibration) -> frozenset[int]:
    """Experts whose grams are taken over all tokens: by recipe, or because the router sent too few."""
    calibration = work.job.plan.recipe.calibration
    if calibration and calibration.experts == "all":
        return frozenset(range(len(learned.expert_tokens)))
    shared = calibration is not None and calibration.under_calibrated == "shared_gram"
    return under_calibrated(work, learned) if shared else frozenset()


def under_calibrated(work: BlockContext, learned: BlockCalibration) -> frozenset[int]:
    """Experts the router sent fewer tokens than the recipe asks for; none when every expert sees every token."""
    calibration = work.job.plan.recipe.calibration
    if calibration is None or calibration.experts == "all":
        return frozenset()
    least = calibration.min_expert_tokens
    return frozenset(e for e, tokens in enumerate(learned.expert_tokens) if tokens < least)


def without_stats(work: BlockContext, learned: BlockCalibration | None) -> frozenset[int]:
    """Experts that learn nothing, by the recipe's policy for those that the router sent too few tokens."""
    calibration = work.job.plan.recipe.calibration
    by_policy = calibration is not None and calibration.under_calibrated == "rtn"
    return under_calibrated(work, learned) if by_policy and learned else frozenset()


def read_wave(work: BlockContext, first: int, stop: int) -> ExpertSlice:
    """Experts first..stop of the source in float32."""
    names, read = work.experts, next(work.job.reads)

    def stacked(projection: str) -> Tensor:
        wanted = [f"{names.linear(e, projection)}.weight" for e in range(first, stop)]
        return torch.stack([
            read.pop(name).to(work.job.skeleton.device).float() for name in wanted
        ])  # [n, out, in]

    return ExpertSlice(
        first=first, gate=stacked(names.gate), up=stacked(names.up), down=stacked(names.down)
    )


def statistics(
    work: BlockContext, wave: ExpertSlice, learned: BlockCalibration | None
) -> SliceStats | None:
    """Statistics of a wave over the calibration stream; None when nothing is learned or the experts are kept."""
    if learned is None or work.expert_scheme is None or work.calibration is None:
        return None
    assert learned.routing is not None  # the tap has seen the router
    original = None if learned.original is None else learned.original.seen
    return collect_stats(
        wave,
        learned.routing,
        work.job.activation,
        experts_using_all_tokens(work, learned),
        original,
    )


def search_scales_pass(
    work: BlockContext,
    tensors: Mapping[str, Tensor],
    learned: BlockCalibration | None,
    routing: Routing | None,
    found: ExpertPassState,
) -> Iterator[float]:
    """First pass, noted in `found`. Yields the share done; nothing at all for a dense block."""
    cut, group = waves(work.job.plan, work.block, found.surveyed), work.expert_group
    once = passes(work.job.plan, work.block) == 1 and not found.surveyed
    rescale = work.rescale_of(group) if group and learned and work.expert_scheme else None
    scales = None
    if rescale and group and learned:
        scales = dense.candidate_scales(group, rescale, learned, tensors)
    for first, stop in cut:
        wave = read_wave(work, first, stop)
        if routing is not None:
            advance(work, wave, {"reference": routing})
        if learned and learned.original is not None:
            advance(work, wave, {"original": learned.original})
        stats = statistics(work, wave, learned)
        if scales is not None and rescale and stats:
            found.errors.append(wave_errors(rescale, wave, stats, scales, work.expert_scheme))
        if learned and learned.sample:
            seen = learned.sample.asked.hidden if learned.sample.asked else None
            found.sample = added(found.sample, sample_output(work, wave, seen, learned.sample))
        if learned and work.job.plan.recipe.propagate == "original":
            advance(work, wave, {"calibration": learned.routing})
        if once:
            found.held.append((wave, stats))
        found.surveyed = stop
        yield stop / work.experts.count


def wave_errors(
    rescale: Rescale, wave: ExpertSlice, stats: SliceStats, scales: Tensor, scheme: Scheme | None
) -> Tensor:
    """Error [n, experts] of gate and up of a wave for each candidate scale [n, hidden] of their input."""
    gate = scaling.errors(rescale, wave.gate, stats.into.gram, scales, scheme)
    return gate + scaling.errors(rescale, wave.up, stats.into.gram, scales, scheme)


def added(total: Tensor | None, share: Tensor) -> Tensor:
    """A running sum that starts with its first summand."""
    return share if total is None else total + share


def sample_output(
    work: BlockContext, wave: ExpertSlice, seen: Tensor | None, sample: ScalingCheckSample
) -> Tensor:
    """What a wave adds to the sample's output [tokens, hidden], routed as the original router did."""
    assert seen is not None and sample.asked is not None  # only blocks with experts have waves
    x = seen.to(wave.gate)
    return add_outputs(torch.zeros_like(x), wave, x, sample.asked, work.job.activation)


def advance(
    work: BlockContext, wave: ExpertSlice, routings: Mapping[StreamName, Routing | None]
) -> None:
    """Add a wave's outputs to the streams behind the block; states that a journal holds on to stay as they are."""
    for name, routing in routings.items():
        assert routing is not None  # only blocks with experts have waves
        before = work.targets[name]
        if name in work.kept:
            work.targets[name] = create_target(
                work.streams[name], work.block.name, f".{wave.first}"
            )
            work.kept.remove(name)
        expert_ops.advance(wave, routing, before, work.targets[name], work.job.activation)
        if work.targets[name] is not before:
            before.close()


def quantize_pass(
    work: BlockContext,
    folded: ScaledBlock,
    learned: BlockCalibration | None,
    found: ExpertPassState,
    routings: Mapping[StreamName, Routing | None],
) -> Iterator[float]:
    """Second pass: fold, check, solve, store, and move the streams on. Yields the share done."""
    for first, stop in waves(work.job.plan, work.block, found.solved):
        if found.held:
            wave, stats = found.held.pop()
        else:
            wave = read_wave(work, first, stop)
            stats = statistics(work, wave, learned)
        wave, stats, down = fold_wave(work, wave, stats, folded, without_stats(work, learned))
        if learned and learned.sample:
            found.folded = added(
                found.folded, sample_output(work, wave, folded.seen, learned.sample)
            )
        advance(work, store(work, wave, stats, folded, down, learned), routings)
        found.solved = stop
        yield stop / work.experts.count
    if found.folded is not None and found.sample is not None:
        change = scaling.check_unchanged(
            work.block.name,
            "the routed experts' output",
            found.sample,
            found.folded,
            work.tolerance,
        )
        work.record.fold_change = max(work.record.fold_change, change)


def fold_wave(
    work: BlockContext,
    wave: ExpertSlice,
    stats: SliceStats | None,
    folded: ScaledBlock,
    unlearned: frozenset[int],
) -> tuple[ExpertSlice, SliceStats | None, tuple[bool, ...]]:
    """Multiply gate and up by the scale of their input; scale each down projection into the rows of its up.

    Too few tokens choose no scale either: the down projections of `unlearned` experts stay as they are.
    """
    none = (False,) * len(wave)
    if stats is None:
        return wave, None, none
    scale, into = folded.expert_scale, stats.into
    if (
        scale is not None
    ):  # in place: the wave and its grams are the largest things in memory, and ours alone
        wave = ExpertSlice(
            first=wave.first, gate=wave.gate.mul_(scale), up=wave.up.mul_(scale), down=wave.down
        )
        into = scaling.rescaled_stats(into, scale)
    group, scheme = work.expert_group, work.expert_scheme
    rescale = (
        work.search_of(group) if group else None
    )  # of the experts themselves, whatever holds their input
    if rescale is None or scheme is None:
        return wave, SliceStats(into=into, inner=stats.inner), none
    best, chosen = torch.ones_like(stats.inner.mean_abs), list[bool]()
    for e in range(len(wave)):
        if wave.first + e in unlearned:
            chosen.append(False)
            continue
        name = work.experts.linear(wave.first + e, work.experts.down)
        scaling.check_input(name, stats.inner.mean_abs[e], stats.inner.gram[e])
        scales = rescale.candidates(stats.inner.mean_abs[e])  # [n, intermediate]
        alone, batch = torch.zeros(len(scales), dtype=torch.float64), [(wave.down[e], scheme)]
        choice = scaling.search("down", alone, batch, stats.inner.gram[e], rescale, scales)
        best[e] = scales[choice.candidate]
        chosen.append(choice.rescaled)
    up, down = (
        wave.up.div_(best[:, :, None]),
        wave.down.mul_(best[:, None, :]),
    )  # rows of up make down's input
    inner = scaling.rescaled_stats(stats.inner, best)
    return (
        ExpertSlice(first=wave.first, gate=wave.gate, up=up, down=down),
        SliceStats(into=into, inner=inner),
        tuple(chosen),
    )


def store(
    work: BlockContext,
    wave: ExpertSlice,
    stats: SliceStats | None,
    folded: ScaledBlock,
    down: Sequence[bool],
    learned: BlockCalibration | None,
) -> ExpertSlice:
    """Solve and write every projection of a wave; the wave with the weights as stored."""
    names, group = work.experts, work.expert_group
    few = under_calibrated(work, learned) if learned else frozenset[int]()
    into_rescaled = group is not None and group.name in folded.rescaled
    stored: dict[str, list[Tensor]] = {names.gate: [], names.up: [], names.down: []}
    for e in range(len(wave)):
        into, inner = (
            (select_expert_stats(stats.into, e), select_expert_stats(stats.inner, e))
            if stats
            else (None, None)
        )
        lacking = wave.first + e in few
        both = {names.gate: wave.gate[e], names.up: wave.up[e]}  # they read the same input
        for weights, inputs, rescaled in (
            (both, into, into_rescaled),
            ({names.down: wave.down[e]}, inner, down[e]),
        ):
            for projection, found in quantize_projections(
                work, wave.first + e, weights, inputs, rescaled, lacking
            ).items():
                stored[projection].append(found)
    gate, up, out = (
        torch.stack(stored[p]) for p in (names.gate, names.up, names.down)
    )  # [n, out, in]
    return ExpertSlice(first=wave.first, gate=gate, up=up, down=out)


def quantize_projections(
    work: BlockContext,
    expert: int,
    weights: Mapping[str, Tensor],
    stats: InputStats | None,
    rescaled: bool,
    lacking: bool,
) -> dict[str, Tensor]:
    """Write projections of one expert that read the same input; their weights as stored.

    With too few tokens they are solved by the recipe's policy, which names the fallback.
    """
    recipe, used, given = work.job.plan.recipe, stats, tuple[str, ...]()
    if lacking and stats is not None and recipe.calibration:
        policy = recipe.calibration.under_calibrated
        given, used = (UNDER_CALIBRATED[policy],), None if policy == "rtn" else stats
    found, asked, tokens = (
        dict[str, Tensor](),
        dict[str, QuantizeRequest](),
        0 if stats is None else int(stats.n_tokens),
    )
    for projection, weight in weights.items():
        name = work.experts.linear(expert, projection)
        decision, fallbacks = work.job.plan.decisions[name], work.fallbacks_of(name) + given
        if decision.action == "keep":
            found[projection] = work.keep(f"{name}.weight", weight)
            continue
        asked[projection] = QuantizeRequest(
            decision=decision,
            weight=weight,
            stats=used,
            tokens=tokens,
            rescaled=rescaled,
            fallbacks=fallbacks,
        )
    for projection, solved in zip(asked, quantize_group(list(asked.values()), work.job.formats)):
        work.write(solved)
        found[projection] = solved.weight
    return found
