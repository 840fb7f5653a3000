"""How much host memory and scratch disk a build takes, from shapes alone; pure.

The budget decides one number, how many slices of a block's experts are held at once (a wave).
Everything else is fixed by the model: the part of a block that is not experts, one batch of hidden
states, the language-model head at the end. Nothing grows with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from quantkit.contracts import Block, Experts, Layout, Linear
from quantkit.plan.decisions import Decision, select_quantized_groups

BASE_BYTES = 900_000_000
"""Python, torch and transformers without a model: 620 MB measured on Linux x86-64 with torch 2.13,
and a reserve.
"""

BATCH_TOKENS = 4096
"""Tokens of one forward batch and of one chunk of a wave. Fixed, so that sums do not depend on the
budget.
"""

COPIES_BYTES = 2 + 2 + 4 + 4
"""Per weight of what is held: BF16 as read, BF16 read ahead, float32 original, float32 stored."""

SLICE_EXPERTS = 16
"""Routed experts of a layer that are scaled and quantized as one unit, at most."""

MIN_SLICES = 8
"""Slices that a layer's experts are cut into, at least, so that small models can be spread over
devices, too.
"""

SOLVE_COPIES = 6
"""float32 copies of the matrix at hand that scale search, range search and packing hold at the same
time.
"""

FEEDBACK_GRAMS = 3
"""float32 copies of a Gram matrix that rounding gptq holds beside it."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Peak bytes of the largest block, and what they consist of."""

    budget_bytes: int
    base_bytes: int
    dense_bytes: int  # the block without routed experts: source, working copy, grams, solve
    batch_bytes: int  # activations of one batch
    expert_bytes: int  # one routed expert in a wave
    slice_experts: int  # experts per slice; 0 for a dense model
    wave_experts: int  # experts that are held at once, whole slices; 0 for a dense model
    head_bytes: int  # final norm, lm_head and one chunk of logits
    scratch_bytes: int

    @property
    def peak_bytes(self) -> int:
        """The larger of the heaviest block and the head."""
        block = self.dense_bytes + self.batch_bytes + self.wave_experts * self.expert_bytes
        return self.base_bytes + max(block, self.head_bytes)

    @property
    def needed_bytes(self) -> int:
        """The least budget that works: a wave of one slice."""
        block = self.dense_bytes + self.batch_bytes + self.slice_experts * self.expert_bytes
        return self.base_bytes + max(block, self.head_bytes)


def slice_size(experts: int) -> int:
    """Return how many of a layer's routed experts form a slice, whatever the budget and the number
    of devices.
    """
    return max(1, min(SLICE_EXPERTS, experts // MIN_SLICES))


def solved_together(
    block: Block, decisions: Mapping[str, Decision]
) -> Iterator[tuple[Linear, ...]]:
    """Quantized linears of one input, solved as one matrix: of a group, gate and up of an expert,
    or one alone.
    """
    sized = {linear.name: linear for linear in block.linears}
    sets = [group.readers for group in block.groups]
    if block.experts:  # all are of one size, and mostly of one rule
        first = [block.experts.linear(e, block.experts.gate) for e in range(block.experts.count)]
        second = [block.experts.linear(e, block.experts.up) for e in range(block.experts.count)]
        sets += zip(first, second)
    for names in (*sets, *((name,) for name in sized)):
        if found := tuple(sized[name] for name in names if decisions[name].action == "quantize"):
            yield found


def estimate_solve_bytes(linears: Sequence[Linear], feedback: bool) -> int:
    """Working memory while matrices of one input are searched, rounded and packed; feedback
    factorizes their gram.
    """
    grams = FEEDBACK_GRAMS * 4 * linears[0].in_features ** 2 if feedback else 0
    return SOLVE_COPIES * 4 * sum(linear.n_parameters for linear in linears) + grams


def dense_bytes(block: Block, decisions: Mapping[str, Decision], grams: int) -> int:
    """A block without its routed experts: BF16 as read, the next one read ahead, float32 twice,
    grams, solving.

    `grams` matrices are summed for each input: none, the gram, or with it the cross of two streams,
    which also needs a batch of every input twice. The tensors of an MTP block come one by one.
    """
    linears = [linear for linear in block.linears if linear.role != "routed_expert"]
    sizes = [COPIES_BYTES * linear.n_parameters for linear in linears]
    together = solved_together(block, decisions)
    solving = max(
        (estimate_solve_bytes(x, any(decisions[y.name].feeds_back for y in x)) for x in together),
        default=0,
    )
    if block.kind == "mtp":
        return max(sizes) + solving
    groups = list(select_quantized_groups(block, decisions).values()) if grams else []
    sized = {linear.name: linear for linear in linears}
    readers = [sized[group.readers[0]] for group in groups]
    summed = sum(4 * grams * reader.in_features**2 for reader in readers)
    if (
        grams > 1
    ):  # both inputs of a batch, both streams, and what the stream lacks beside each gram
        adding = [reader for reader, group in zip(readers, groups) if group.adds_to]
        summed += 2 * BATCH_TOKENS * 4 * sum(reader.in_features for reader in readers)
        summed += sum(4 * x.n_parameters + 2 * BATCH_TOKENS * 4 * x.out_features for x in adding)
    scaled = scaled_expert_bytes(block, decisions, grams)
    return sum(sizes) + solving + scaled + summed


def scaled_expert_bytes(block: Block, decisions: Mapping[str, Decision], grams: int) -> int:
    """Return the bytes of one expert's weights and grams after scaling, float32: a slice is scaled
    expert by expert.
    """
    experts = block.experts
    if not grams or experts is None or decisions[experts.linear(0, experts.gate)].scheme is None:
        return 0
    hidden, width = experts.hidden, experts.intermediate
    return 4 * (3 * hidden * width + grams * (hidden**2 + width**2))


def estimate_expert_bytes(experts: Experts, quantized: bool, grams: int) -> int:
    """One expert of a wave: BF16 as read, the next one read ahead, float32 twice; its grams when it
    is quantized.
    """
    weights = COPIES_BYTES * 3 * experts.hidden * experts.intermediate
    if not (quantized and grams):
        return weights
    return weights + 4 * grams * (experts.hidden**2 + experts.intermediate**2)


def batch_bytes(layout: Layout, block: Block) -> int:
    """Activations of one batch in float32: a few copies of the widest input and output."""
    linears = [
        linear for linear in block.linears if linear.role in {"attention", "mlp", "shared_expert"}
    ]
    widest = max(max(linear.in_features, linear.out_features) for linear in linears)
    return BATCH_TOKENS * 4 * (4 * layout.embedding.in_features + 4 * widest)


def memory_plan(
    layout: Layout,
    decisions: Mapping[str, Decision],
    *,
    budget_bytes: int,
    grams: int,
    tokens: Mapping[Literal["calibration", "fidelity"], int],
    hidden_bytes: Literal[2, 4],
) -> MemoryPlan:
    """Wave size and peaks for the heaviest decoder block of the model.

    `grams` is how many matrices are summed for each input (`dense_bytes`), `tokens` are the lengths
    of the streams, `hidden_bytes` the width of a stored hidden value. Two states of a stream are on
    disk at a time, and in a block with experts also what the router saw.
    """
    blocks = layout.blocks
    hidden = layout.embedding.in_features
    dense = max(dense_bytes(block, decisions, grams) for block in blocks)
    batch = max(batch_bytes(layout, block) for block in blocks)
    expert, most = 0, 0
    for block in blocks:
        if block.experts:
            quantized = decisions[block.experts.linear(0, block.experts.gate)].action == "quantize"
            expert = max(expert, estimate_expert_bytes(block.experts, quantized, grams))
            most = max(most, block.experts.count)
    room = budget_bytes - BASE_BYTES - dense - batch
    part, fitting = (slice_size(most), room // expert) if expert else (0, 0)
    wave = most if fitting >= most else max(part, fitting // part * part)
    head = layout.head or layout.embedding
    spools = 2 * (tokens["calibration"] + 2 * tokens["fidelity"])  # before and behind a block
    if expert:  # what the experts see: by original weights, and for calibration also by stored ones
        spools += 2 * tokens["calibration"] + 2 * tokens["fidelity"]
    if grams > 1:  # the calibration text in the original model
        spools += (3 if expert else 2) * tokens["calibration"]
    if wave < most:  # a wave moves two of them on beside the states that the journal holds on to
        spools += tokens["calibration"] + tokens["fidelity"]
    return MemoryPlan(
        budget_bytes=budget_bytes,
        base_bytes=BASE_BYTES,
        dense_bytes=dense,
        batch_bytes=batch,
        expert_bytes=expert,
        slice_experts=part,
        wave_experts=wave,
        head_bytes=(2 + 4) * head.n_parameters + 4 * 8 * HEAD_CHUNK * head.out_features,
        scratch_bytes=spools * hidden * (4 if expert else hidden_bytes),  # waves add up in float32
    )


HEAD_CHUNK = 512
"""Positions whose logits over the whole vocabulary are held at once, for source and artifact, in
float64.
"""
