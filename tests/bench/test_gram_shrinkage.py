"""The ways to combine grams of kinds of text, and the figures of the experiment."""

from __future__ import annotations

import argparse

import pytest
import torch
from bench import gram_shrinkage
from bench.gram_shrinkage import BASE, INCLUDED, NEAREST, PRIOR, WAYS, InputGrams
from torch import Tensor, nn

WIDTH = 64


def draw_tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.rand(WIDTH, generator=generator) + 0.1
    return torch.randn(200, WIDTH, generator=generator) * scale


def measure_tokens(x: Tensor) -> InputGrams:
    unit = x / x.norm(dim=-1, keepdim=True)
    gram = x.T @ x / len(x)
    return InputGrams(
        gram=gram,
        unit=unit.T @ unit / len(x),
        mean_abs=x.abs().mean(dim=0),
        ordinary=gram,
        massive=0,
    )


@pytest.fixture(scope="module")
def kinds() -> list[InputGrams]:
    return [measure_tokens(draw_tokens(seed)) for seed in range(3)]


@pytest.fixture(scope="module")
def prior() -> InputGrams:
    return measure_tokens(draw_tokens(9))


@pytest.mark.parametrize("way", WAYS)
def test_every_way_gives_a_positive_definite_gram(way, kinds, prior):
    gram = WAYS[way](kinds, prior)
    torch.testing.assert_close(gram, gram.T)
    assert float(torch.linalg.eigvalsh(gram.double()).min()) > 0


def test_shrinkage_to_identity_moves_every_eigenvalue_towards_their_mean(kinds, prior):
    before, after = (
        torch.linalg.eigvalsh(WAYS[way](kinds, prior).double()) for way in (BASE, "identity 0.3")
    )
    torch.testing.assert_close(after, 0.7 * before + 0.3 * before.mean(), rtol=1e-4, atol=1e-6)


def test_kinds_equal_ignores_the_size_of_a_kinds_activations(kinds, prior):
    louder = [measure_tokens(10 * draw_tokens(0)), *kinds[1:]]
    equal, mean = WAYS["kinds equal"], WAYS[BASE]
    torch.testing.assert_close(equal(louder, prior), equal(kinds, prior))
    assert not torch.allclose(mean(louder, prior), mean(kinds, prior))


def test_ratios_are_geometric_means_relative_to_the_plain_mean():
    errors = {}
    for linear, change in (("a", 2.0), ("b", 0.5), ("c", 8.0)):
        for kind in ("zh", "de"):
            errors[linear, BASE, "zh", kind, "all"] = 0.01
            errors[linear, "way", "zh", kind, "all"] = 0.01 * (change if kind == "zh" else 1)
    ratios = gram_shrinkage.compute_ratios(errors)
    assert ratios["way", "all", "unseen"] == pytest.approx(2)
    assert ratios["way", "all", "zh"] == pytest.approx(2)
    assert ratios["way", "all", "seen"] == ratios["way", "all", "seen de"] == pytest.approx(1)


@pytest.mark.parametrize("method", ("gptq", "awq"))
def test_quantization_by_grams_beats_rounding_to_nearest(method, kinds, prior):
    layer = nn.Module()
    layer.mlp = nn.Module()
    torch.manual_seed(0)
    layer.mlp.down_proj = nn.Linear(WIDTH, 80, bias=False)
    key, names = (0, "mlp.down_proj"), ("wikitext", "zh", "de")
    captured = {name: {key: kind} for name, kind in zip(names, kinds, strict=True)}
    captured |= {f"{name} test": captured[name] for name in names}
    captured[PRIOR] = {key: prior}
    options = argparse.Namespace(
        method=method, kinds=names, windows=1, ways=[BASE, NEAREST, INCLUDED, "identity 0.1"]
    )
    with torch.no_grad():
        records = gram_shrinkage.measure_input(layer, key, "zh", captured, options)
        ratios = gram_shrinkage.compute_ratios({
            tuple(record[:-1]): record[-1] for record in records
        })
    assert ratios[NEAREST, "all", "seen"] > 1.05
    assert ratios[INCLUDED, "all", "unseen"] < 1
