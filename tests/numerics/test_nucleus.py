"""Nucleus sampling against an oracle in float64 that sorts and searches in plain Python."""

from __future__ import annotations

import math

import pytest
import torch

from quantkit.numerics import nucleus
from quantkit.numerics.nucleus import sample_nucleus


def list_nucleus(logits: list[float], temperature: float, top_p: float) -> list[tuple[int, float]]:
    """Return (token, probability) of the nucleus, most probable first."""
    largest = max(logits)
    weights = [math.exp((logit - largest) / temperature) for logit in logits]
    rows = sorted(enumerate(weights), key=lambda row: (-row[1], row[0]))
    inside, mass, total = [], 0.0, sum(weights)
    for token, weight in rows:
        if mass >= top_p:
            break
        inside.append((token, weight / total))
        mass += weight / total
    return inside


def pick(inside: list[tuple[int, float]], uniform: float) -> tuple[int, float]:
    """Return the token at a point of the nucleus, and the distance to the next boundary."""
    target, mass = uniform * sum(p for _, p in inside), 0.0
    for token, probability in inside:
        if target < mass + probability:
            return token, min(target - mass, mass + probability - target)
        mass += probability
    return inside[-1][0], 0.0


@pytest.mark.parametrize("candidates", [4, 1024])
@pytest.mark.parametrize("top_p", [0.3, 0.95, 1.0])
@pytest.mark.parametrize("temperature", [0.5, 1.0])
def test_tokens_equal_oracle(
    top_p: float, temperature: float, candidates: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nucleus, "CANDIDATES", candidates)
    generator = torch.Generator().manual_seed(int(10 * top_p))
    logits = 2 * torch.randn(64, 50, generator=generator)
    uniforms = torch.rand(64, generator=generator, dtype=torch.float64)
    tokens = sample_nucleus(logits, uniforms, temperature, top_p).tolist()
    compared = 0
    for row, uniform, token in zip(logits.double().tolist(), uniforms.tolist(), tokens):
        inside = list_nucleus(row, temperature, top_p)
        expected, distance = pick(inside, uniform)
        assert token in dict(inside)
        if distance > 1e-6:
            compared += 1
            assert token == expected
    assert compared > 50


def test_row_does_not_depend_on_other_rows() -> None:
    logits = torch.randn(8, 3000, generator=torch.Generator().manual_seed(1))
    uniforms = torch.linspace(0, 0.999, 8, dtype=torch.float64)
    together = sample_nucleus(logits, uniforms, 1.0, 0.95)
    alone = [sample_nucleus(logits[i : i + 1], uniforms[i : i + 1], 1.0, 0.95) for i in range(8)]
    assert together.tolist() == torch.cat(alone).tolist()


def test_largest_uniform_stays_inside() -> None:
    logits = torch.tensor([[0.0, 5.0, 4.0, -30.0]])
    uniform = torch.tensor([1 - 2**-53], dtype=torch.float64)
    assert sample_nucleus(logits, uniform, 1.0, 0.95).tolist() == [2]
    assert sample_nucleus(logits, torch.zeros(1, dtype=torch.float64), 1.0, 0.95).tolist() == [1]
