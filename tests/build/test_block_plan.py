"""The plan of each block: modes, groups, fallbacks, slices, waves and reads, all known before a
weight is read.
"""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint

from quantkit.build.block_plan import BlockPlan, ExpertRange, plan_blocks
from quantkit.plan.memory import choose_slice_size

AWQ = "{method: awq, bits: 4, group_size: 64}"
GPTQ = "{method: gptq, bits: 4, group_size: 64}"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3 in FP8: one dense block, one with 8 experts, one MTP block."""
    folder = tmp_path_factory.mktemp("v3") / "source"
    return write_checkpoint(folder, make_tiny_config("deepseek_v3"), fp8=True)


def plan(source: Path, wave_experts: int = 8, **keys: str) -> tuple[BlockPlan, ...]:
    """Plan the blocks of a recipe with memory for so many experts."""
    whole = make_plan(source, **keys)
    memory = replace(whole.memory, wave_experts=wave_experts)
    return plan_blocks([replace(whole, memory=memory)])


@pytest.mark.parametrize(
    ("experts", "size"), [(256, 16), (128, 16), (64, 8), (60, 7), (16, 2), (8, 1), (4, 1)]
)
def test_slice_is_an_eighth_of_the_experts_within_1_and_16(experts: int, size: int) -> None:
    assert choose_slice_size(experts) == size


def test_mode_says_whether_streams_run_through_a_block(source: Path) -> None:
    modes = {
        mtp: [block.mode for block in plan(source, mtp=mtp)] for mtp in ("keep", "quantize", "drop")
    }
    assert modes == {
        "keep": ["run", "run", "store"],
        "quantize": ["run", "run", "store"],
        "drop": ["run", "run", "drop"],
    }
    rtn = plan(source, quantize="{method: rtn, bits: 4, group_size: 64}", fidelity="none")
    assert [block.mode for block in rtn] == ["store"] * 3


def test_slices_ignore_memory_and_waves_follow_it(source: Path) -> None:
    large, small = (plan(source, wave_experts=size)[1].experts for size in (8, 3))
    assert large is not None and small is not None
    assert large.slices == small.slices == tuple(ExpertRange(first=e, stop=e + 1) for e in range(8))
    assert large.is_one_wave and not small.is_one_wave
    assert [[part.first for part in wave] for wave in small.waves()] == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7],
    ]
    assert [[part.first for part in wave] for wave in small.waves(done=4)] == [[4, 5, 6], [7]]


@pytest.mark.parametrize(
    ("quantize", "wave_experts", "reads"), [(AWQ, 8, 1), (AWQ, 4, 4), (GPTQ, 8, 1), (GPTQ, 4, 2)]
)
def test_experts_are_read_twice_only_for_a_search_that_does_not_fit(
    source: Path, quantize: str, wave_experts: int, reads: int
) -> None:
    block = plan(source, wave_experts, quantize=quantize)[1]
    assert block.experts is not None
    assert block.experts.needs_search == (quantize == AWQ)
    requests = [request for request in block.iterate_reads() if ".experts." in request.name]
    assert len(requests) == reads
    assert requests[0].name == f"model.layers.1.mlp.experts.0:{wave_experts}"
    assert "model.layers.1.mlp.experts.0.down_proj.weight" in requests[0].tensors
    assert len(requests[0].tensors) == 3 * wave_experts


def test_resumed_reads_start_after_the_finished_experts(source: Path) -> None:
    block = plan(source, 4, quantize=AWQ)[1]
    dense, *names = (request.name for request in block.iterate_reads(searched=8, quantized=4))
    assert dense == "model.layers.1"
    assert names == ["model.layers.1.mlp.experts.4:8"]


def test_reads_cover_every_tensor_of_a_block_once(source: Path) -> None:
    for block in plan(source, quantize=GPTQ):
        tensors = [name for request in block.iterate_reads() for name in request.tensors]
        weights = {f"{linear.name}.weight" for linear in block.block.linears}
        others = {spec.name for spec in block.block.others}
        assert len(tensors) == len(set(tensors)) and weights | others <= set(tensors)


def test_groups_name_their_readers_and_scale_search(source: Path) -> None:
    dense, moe, _ = plan(source, rules="all-linear", quantize=AWQ)
    assert {group.scale_method for group in dense.groups.values()} == {"awq"}
    assert all(group.rescale is not None for group in dense.groups.values())
    group = moe.expert_group
    assert group is not None
    assert "model.layers.1.mlp.gate" in group.others  # the router reads the same input
    assert "model.layers.1.mlp.shared_experts.up_proj" in group.readers
    gptq = plan(source, rules="all-linear", quantize=GPTQ)
    assert not any(group.scale_method for block in gptq for group in block.groups.values())
    assert not any(block.may_scale for block in gptq)


def test_fallbacks_that_are_known_in_advance_are_named(source: Path) -> None:
    mtp = plan(source, mtp="quantize")[2]
    experts = [x for name, x in mtp.linears.items() if ".experts." in name and x.is_quantized]
    assert experts and all(linear.fallbacks == ("mtp-rtn",) for linear in experts)


def test_kept_linears_have_the_dtype_they_are_stored_in(source: Path) -> None:
    dense = plan(source)[0]
    names = {str(x.stored_dtype) for x in dense.linears.values() if not x.is_quantized}
    assert names == {"torch.bfloat16"}


def test_plan_is_frozen_and_printable(source: Path) -> None:
    block = plan(source, 4, quantize=AWQ)[1]
    with pytest.raises(FrozenInstanceError):
        block.mode = "drop"  # type: ignore[misc]
    text = block.describe()
    assert text.startswith("model.layers.1: run\n")
    assert "8 in 8 slices of 1, 4 slices in memory at once, read twice" in text
    assert "scaled by awq" in text
