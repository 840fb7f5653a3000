"""Rows of states: any shape per token goes through a row and comes back bit for bit."""

from __future__ import annotations

import pytest
import torch

from quantkit.models.state_rows import StateForm, StatePart, find_token_axes

BATCHES = ((2, 3), (3, 5))


@pytest.mark.parametrize(
    ("axis", "shape"), [(0, (8,)), (0, (4, 8)), (1, (4, 8)), (0, (2, 3, 5)), (2, (3, 2, 4))]
)
@pytest.mark.parametrize("has_ids", [False, True])
def test_states_return_from_rows(axis: int, shape: tuple[int, ...], has_ids: bool) -> None:
    hidden = torch.randn(*shape[:axis], 5, 7, *shape[axis:])
    ids = torch.arange(35).reshape(5, 7) + 2**24 - 40
    form = StateForm(hidden=StatePart(axis=axis, shape=shape), has_ids=has_ids)
    rows = form.pack(hidden, ids)
    assert rows.shape == (5, 7, hidden.numel() // 35 + has_ids) and rows.shape[-1] == form.width
    again, numbers = form.unpack(rows)
    assert torch.equal(again, hidden)
    assert torch.equal(form.get_hidden(rows), form.hidden.to_rows(hidden))
    assert numbers is None if not has_ids else torch.equal(numbers, ids)


def test_rows_of_one_token_hold_its_numbers_alone() -> None:
    """Streams first, as Gemma 3n has them: a row is one token of all streams."""
    hidden = torch.arange(2 * 5 * 7 * 3.0).reshape(2, 5, 7, 3)
    rows = StateForm(hidden=StatePart(axis=1, shape=(2, 3))).pack(hidden, None)
    assert torch.equal(rows[4, 6], hidden[:, 4, 6].flatten())


def test_ids_need_float32() -> None:
    part = StatePart(shape=(8,), dtype=torch.bfloat16)
    assert StateForm(hidden=part).dtype == torch.bfloat16
    form = StateForm(hidden=part, has_ids=True)
    rows = form.pack(torch.randn(1, 1, 8).bfloat16(), torch.tensor([[151_643]]))
    assert form.dtype == rows.dtype == torch.float32
    assert int(form.unpack(rows)[1]) == 151_643  # type: ignore[arg-type]  # it has ids


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        ([(2, 3, 64), (3, 5, 64)], 0),
        ([(2, 3, 4, 64), (3, 5, 4, 64)], 0),
        ([(2, 2, 3, 64), (2, 3, 5, 64)], 1),
        ([(3, 2, 64), (5, 3, 64)], None),  # tokens before sequences
        ([(2, 3, 3), (3, 5, 5)], None),  # a mask: other dimensions depend on the length
        ([(6, 64), (15, 64)], None),
    ],
)
def test_axes_of_tokens(shapes: list[tuple[int, ...]], axis: int | None) -> None:
    assert find_token_axes(shapes, BATCHES) == axis
