"""Host memory and scratch disk of a build, estimated from shapes. Pure.

The budget sets one number: how many experts of a block are in memory at once (a wave). The model
fixes the rest: the part of a block without experts, one batch of hidden states, the language-model
head. Nothing grows with the number of blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from quantkit.contracts import Block, Experts, Layout, Linear
from quantkit.plan.decisions import Decision, keeps_stacked, select_quantized_groups

BASE_BYTES = 900_000_000
"""Python, torch and transformers without a model: 620 MB measured on Linux x86-64 with torch 2.13,
and a reserve.
"""

WHOLE_MODEL_COPIES = 1.7
"""Peak memory over size of an assembled model: its largest tensors briefly exist twice."""

BATCH_TOKENS = 4096
"""Tokens of a forward batch and of a chunk of a wave.

Fixed, so sums do not depend on the budget.
"""

COPIES_BYTES = 2 + 2 + 4 + 4
"""Bytes per weight in memory: BF16 as read, BF16 read ahead, float32 original, float32 stored."""

SCORE_COPIES = 3
"""float32 copies of the scores of eager attention; 2.1 measured with Gemma 2."""

STREAM_COPIES = 8
"""float32 copies of a batch's states in a block that mixes several streams; 8 measured with
DeepSeek-V4.
"""

SLICE_EXPERTS = 16
"""Routed experts of a layer that are scaled and quantized as one unit, at most."""

MIN_SLICES = 8
"""Slices per layer, at least, so that the experts of small models can be spread over devices."""

SOLVE_COPIES = 6
"""float32 copies of a matrix that scale search, range search and packing need at the same time."""

FEEDBACK_GRAMS = 3
"""float32 copies of a Gram matrix that rounding gptq needs in addition."""


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Peak bytes of the largest block, and their parts."""

    budget_bytes: int
    base_bytes: int
    dense_bytes: int  # the block without routed experts: source, working copy, grams, solve
    batch_bytes: int  # activations of one batch
    expert_bytes: int  # one routed expert in a wave
    slice_experts: int  # experts per slice; 0 for a dense model
    wave_experts: int  # experts that are held at once, whole slices; 0 for a dense model
    head_bytes: int  # final norm, lm_head as read, in float32 and bfloat16, one chunk of logits
    scratch_bytes: int

    @property
    def peak_bytes(self) -> int:
        """Bytes of the largest block or the head, whichever is larger."""
        block = self.dense_bytes + self.batch_bytes + self.wave_experts * self.expert_bytes
        return self.base_bytes + max(block, self.head_bytes)

    @property
    def needed_bytes(self) -> int:
        """The smallest sufficient budget: a wave of one slice of experts."""
        block = self.dense_bytes + self.batch_bytes + self.slice_experts * self.expert_bytes
        return self.base_bytes + max(block, self.head_bytes)


def choose_slice_size(experts: int) -> int:
    """Return how many of a layer's routed experts form a slice.

    It depends neither on the budget nor on the number of devices.
    """
    return max(1, min(SLICE_EXPERTS, experts // MIN_SLICES))


def iterate_solves(block: Block, decisions: Mapping[str, Decision]) -> Iterator[tuple[Linear, ...]]:
    """Yield quantized linears that share an input and are solved as one matrix.

    These are the readers of a group, gate and up of an expert, or a single linear.
    """
    sized = {linear.name: linear for linear in block.linears}
    sets = [group.readers for group in block.groups]
    if block.experts:  # all have one size, and most have one rule
        experts = block.experts
        sets += [tuple(experts.linear(e, x) for x in experts.inputs) for e in range(experts.count)]
    for names in (*sets, *((name,) for name in sized)):
        if linears := tuple(sized[name] for name in names if decisions[name].action == "quantize"):
            yield linears


def estimate_solve_bytes(linears: Sequence[Linear], feedback: bool) -> int:
    """Return the bytes to search, round and pack matrices of one input.

    Feedback factorizes a gram.
    """
    grams = FEEDBACK_GRAMS * 4 * linears[0].in_features ** 2 if feedback else 0
    return SOLVE_COPIES * 4 * sum(linear.n_parameters for linear in linears) + grams


def estimate_dense_bytes(
    block: Block, decisions: Mapping[str, Decision], grams: int, rounded_bytes: int = 0
) -> int:
    """Return the bytes of a block without its routed experts.

    Counts weights in BF16 as read, the next block read ahead, two float32 copies, grams and
    solving. `grams` is the number of matrices summed for each input: 0, 1 (the gram), or 2 (also
    the cross product of two streams, which needs a batch of every input twice). The tensors of an
    MTP block are processed one by one. rounded_bytes: per weight, of the yardstick's copy.
    """
    linears = [linear for linear in block.linears if linear.role != "routed_expert"]
    sizes = [(COPIES_BYTES + rounded_bytes) * linear.n_parameters for linear in linears]
    together = iterate_solves(block, decisions)
    solving = max(
        (
            estimate_solve_bytes(x, any(decisions[y.name].has_error_feedback for y in x))
            for x in together
        ),
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
    ):  # both inputs of a batch, both streams, and the residual gap in addition to each gram
        adding = [reader for reader, group in zip(readers, groups) if group.adds_to]
        summed += 2 * BATCH_TOKENS * 4 * sum(reader.in_features for reader in readers)
        summed += sum(4 * x.n_parameters + 2 * BATCH_TOKENS * 4 * x.out_features for x in adding)
    scaled = estimate_scaled_expert_bytes(block, decisions, grams)
    return sum(sizes) + solving + scaled + summed + estimate_stacked_bytes(block, decisions)


def estimate_stacked_bytes(block: Block, decisions: Mapping[str, Decision]) -> int:
    """Return the bytes of the largest tensor with all experts that is copied, in BF16."""
    experts = block.experts
    if experts is None or not keeps_stacked(block, decisions):
        return 0
    widest = max(len(stacked.projections) for stacked in block.stacked)
    return 2 * experts.count * widest * experts.hidden * experts.intermediate


def estimate_scaled_expert_bytes(
    block: Block, decisions: Mapping[str, Decision], grams: int
) -> int:
    """Return the bytes of one expert's weights and grams after scaling, in float32.

    A slice is scaled expert by expert.
    """
    experts = block.experts
    if not grams or experts is None or decisions[experts.first].scheme is None:
        return 0
    hidden, width = experts.hidden, experts.intermediate
    return 4 * (3 * hidden * width + grams * (hidden**2 + width**2))


def estimate_expert_bytes(
    experts: Experts, quantized: bool, grams: int, rounded_bytes: int = 0
) -> int:
    """Return the bytes of one expert of a wave: weights as in a block, and grams if quantized."""
    count = len(experts.projections) * experts.hidden * experts.intermediate
    weights = (COPIES_BYTES + rounded_bytes) * count
    if not (quantized and grams):
        return weights
    return weights + 4 * grams * (experts.hidden**2 + experts.intermediate**2)


def estimate_batch_bytes(layout: Layout, block: Block, longest: int) -> int:
    """Return the bytes of the float32 activations of one batch: copies of the widest input and
    output, and the scores of eager attention.

    longest: tokens of the longest sequence.
    """
    linears = [
        linear for linear in block.linears if linear.role in {"attention", "mlp", "shared_expert"}
    ]
    widest = max((max(x.in_features, x.out_features) for x in linears), default=0)
    copies = STREAM_COPIES if layout.state_width else 4
    activations = BATCH_TOKENS * 4 * (copies * get_state_width(layout) + 4 * widest)
    # heads * length^2 of each sequence; a batch holds one sequence, or BATCH_TOKENS in all
    scores = layout.eager_heads * longest * max(longest, BATCH_TOKENS if longest else 0)
    return activations + SCORE_COPIES * 4 * scores


def get_state_width(layout: Layout) -> int:
    """Return the numbers that a build stores for each token between two blocks."""
    return layout.state_width or layout.embedding.in_features


def plan_memory(
    layout: Layout,
    decisions: Mapping[str, Decision],
    *,
    budget_bytes: int,
    grams: int,
    tokens: Mapping[Literal["calibration", "fidelity"], int],
    hidden_bytes: Literal[2, 4],
    longest: int = 0,
    yardstick: bool = False,
) -> MemoryPlan:
    """Return the wave size and the peaks of the largest block.

    Two states of a stream are on disk at a time, in a block with experts also the router's input.

    Args:
        budget_bytes: host memory that the build may use.
        grams: matrices summed for each input (`estimate_dense_bytes`).
        tokens: lengths of the streams.
        hidden_bytes: bytes of a stored hidden value.
        longest: tokens of the longest sequence.
        yardstick: whether a third stream runs, with a float32 copy of a block's weights.
    """
    blocks, rounded_bytes = layout.blocks, 4 if yardstick else 0
    width = get_state_width(layout)
    dense = max(estimate_dense_bytes(b, decisions, grams, rounded_bytes) for b in blocks)
    batch = max(estimate_batch_bytes(layout, block, longest) for block in blocks)
    expert, max_experts, expert_width, sums = 0, 0, 0, 0
    for block in blocks:
        if block.experts:
            expert_width = max(expert_width, block.experts.hidden)
            if block.experts.inside and block.experts.hidden != width:  # in a file of their own
                sums = max(sums, block.experts.hidden)
            quantized = decisions[block.experts.first].action == "quantize"
            copy = estimate_expert_bytes(block.experts, quantized, grams, rounded_bytes)
            expert = max(expert, copy)
            max_experts = max(max_experts, block.experts.count)
    room = budget_bytes - BASE_BYTES - dense - batch
    part, fitting = (choose_slice_size(max_experts), room // expert) if expert else (0, 0)
    wave = max_experts if fitting >= max_experts else max(part, fitting // part * part)
    head = layout.head or layout.embedding
    both = 2 if grams > 1 else 1  # the calibration text, also in the original model
    stored = 2 if yardstick else 1  # streams of the fidelity text under stored weights
    texts = both * tokens["calibration"] + (1 + stored) * tokens["fidelity"]
    # states around a block; sums and inputs of the experts, for calibration from both weights
    numbers = (2 * width + sums + expert_width) * texts + expert_width * tokens["calibration"]
    if wave < max_experts:  # a wave advances those of stored weights besides those of the journal
        numbers += (sums or width) * (tokens["calibration"] + stored * tokens["fidelity"])
    return MemoryPlan(
        budget_bytes=budget_bytes,
        base_bytes=BASE_BYTES,
        dense_bytes=dense,
        batch_bytes=batch,
        expert_bytes=expert,
        slice_experts=part,
        wave_experts=wave,
        head_bytes=(2 + 4 + 2) * head.n_parameters + 4 * 8 * HEAD_CHUNK * head.out_features,
        scratch_bytes=numbers * (4 if expert else hidden_bytes),  # waves sum in float32
    )


HEAD_CHUNK = 512
"""Positions whose logits are in memory at once, for source and artifact, in float64."""


def count_parameters(layout: Layout) -> int:
    """Count the weights of the model that transformers runs: all but MTP blocks."""
    skipped = sum(
        linear.n_parameters
        for block in layout.blocks
        if block.kind == "mtp"
        for linear in block.linears
    )
    return sum(linear.n_parameters for linear in layout.linears) - skipped
