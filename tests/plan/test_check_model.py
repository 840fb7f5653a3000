"""Whether transformers' layers take the tensors of a table."""

from __future__ import annotations

from dataclasses import replace

import pytest
from support.checkpoints import make_plan, make_tiny_config, write_checkpoint

from quantkit.errors import CheckpointError
from quantkit.plan.check_model import check_model, check_token_ids
from quantkit.plan.plan import Plan


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("a") / "m"
    return make_plan(write_checkpoint(folder, make_tiny_config("mixtral")))


def test_tensors_of_a_mixture_fit(plan: Plan) -> None:
    check_model(plan)


def test_tensors_that_no_layer_has_are_named(plan: Plan) -> None:
    block = plan.layout.blocks[1]
    wrong = replace(block, others=block.others[1:], linears=(
        replace(block.linears[0], bias=True), *block.linears[1:]
    ))  # fmt: skip
    layout = replace(plan.layout, blocks=(plan.layout.blocks[0], wrong))
    with pytest.raises(CheckpointError) as caught:
        check_model(replace(plan, layout=layout))
    message = str(caught.value)
    assert f"{block.others[0].name} is missing" in message
    assert f"{block.linears[0].name}.bias is not in transformers' layer" in message


def test_largest_token_needs_a_row(plan: Plan) -> None:
    rows = plan.layout.embedding.out_features
    check_token_ids(plan, [-1, rows - 1])
    with pytest.raises(CheckpointError, match=f"expected token ids below {rows}"):
        check_token_ids(plan, [0, rows])
