"""Experts that a checkpoint stores together, read one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.stacked import split_specs
from quantkit.contracts import Block, Experts, StackedTensor, TensorSpec

EXPERTS, HIDDEN, INNER = 3, 6, 4
MODULE = "model.layers.0.mlp.experts"


def make_block(transposed: bool, interleaved: bool, flat: bool) -> Block:
    experts = Experts(
        module=MODULE, router="", count=EXPERTS, top_k=1, hidden=HIDDEN, intermediate=INNER
    )
    return Block(
        name="model.layers.0",
        kind="decoder",
        linears=(),
        others=(),
        groups=(),
        fused=(),
        experts=experts,
        stacked=(
            StackedTensor(
                name=f"{MODULE}.gate_up_proj",
                projections=("gate_proj", "up_proj"),
                transposed=transposed,
                interleaved=interleaved,
                flat=flat,
            ),
            StackedTensor(
                name=f"{MODULE}.down_proj",
                projections=("down_proj",),
                transposed=transposed,
                flat=flat,
            ),
        ),
    )


def stack(weights: list[Tensor], transposed: bool, flat: bool) -> Tensor:
    stacked = torch.stack([x.T if transposed else x for x in weights])
    return (stacked.flatten(0, 1) if flat else stacked).contiguous()


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("flat", [False, True])
def test_matrices_of_experts_are_those_that_were_stacked(
    transposed: bool, interleaved: bool, flat: bool, tmp_path: Path
) -> None:
    generator = torch.Generator().manual_seed(0)
    gate, up = (torch.randn(EXPERTS, INNER, HIDDEN, generator=generator) for _ in range(2))
    down = torch.randn(EXPERTS, HIDDEN, INNER, generator=generator)
    both = [
        torch.stack([g, u], 1).flatten(0, 1) if interleaved else torch.cat([g, u])
        for g, u in zip(gate, up, strict=True)
    ]
    block = make_block(transposed, interleaved, flat)
    tensors = {
        block.stacked[0].name: stack(both, transposed, flat),
        block.stacked[1].name: stack(list(down), transposed, flat),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    source = Checkpoint.open(tmp_path).split_experts([block])
    assert len(source.specs) == 3 * EXPERTS
    for projection, expected in (("gate_proj", gate), ("up_proj", up), ("down_proj", down)):
        for e in range(EXPERTS):
            name = f"{MODULE}.{e}.{projection}.weight"
            assert torch.equal(source.read([name])[name], expected[e])
            assert torch.equal(source.read_rows(name, 1, 3), expected[e][1:3])
            assert source.specs[name].shape == tuple(expected[e].shape)
            [stored] = source.list_parts(name)
            assert stored in tensors


def test_stacked_tensor_of_another_shape_stays_for_the_report() -> None:
    block = make_block(transposed=False, interleaved=False, flat=False)
    wrong = TensorSpec(name=block.stacked[1].name, dtype="BF16", shape=(EXPERTS, INNER, HIDDEN))
    specs, parts = split_specs({wrong.name: wrong}, [block])
    assert specs == {wrong.name: wrong} and not parts
