"""`propagate: both`: calibration runs through stored and original weights, and rounding corrects
the difference.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.builds import build
from support.checkpoints import make_tiny_config, write_checkpoint
from torch import Tensor
from torch.nn.functional import silu

from quantkit.build.dense import GramAccumulator
from quantkit.build.expert_ops import ExpertSlice, RoutedStream, collect_stats
from quantkit.build.hidden_states import Routing
from quantkit.build.spool import Spool
from quantkit.contracts import Experts
from quantkit.models.layers import select_expert_tokens
from quantkit.plan.memory import estimate_expert_bytes

pytestmark = pytest.mark.usefixtures("quick_builds")

EXPERTS, HIDDEN, INNER, TOKENS = 3, 32, 16, 90


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random DeepSeek-V3: one dense block, one with 8 experts, one MTP block."""
    return write_checkpoint(
        tmp_path_factory.mktemp("v3") / "source", make_tiny_config("deepseek_v3")
    )


def apply_gate(gate: Tensor | None, up: Tensor) -> Tensor:
    assert gate is not None
    return silu(gate) * up


def spool(path: Path, rows: Tensor) -> Spool:
    made = Spool.create(path, len(rows), rows.shape[1], "float32")
    made.write(0, rows)
    return made


@pytest.mark.parametrize("everyone", [frozenset[int](), frozenset({1}), frozenset({0, 1, 2})])
def test_crosses_of_experts_are_sums_over_their_tokens(
    tmp_path: Path, everyone: frozenset[int]
) -> None:
    g = torch.Generator().manual_seed(0)
    x, original = torch.randn(TOKENS, HIDDEN, generator=g), torch.randn(TOKENS, HIDDEN, generator=g)
    shapes = [(EXPERTS, INNER, HIDDEN), (EXPERTS, INNER, HIDDEN), (EXPERTS, HIDDEN, INNER)]
    gate, up, down = (torch.randn(shape, generator=g) * 0.2 for shape in shapes)
    index = torch.stack([torch.randperm(EXPERTS, generator=g)[:2] for _ in range(TOKENS)])
    wave = ExpertSlice(first=0, gate=gate, up=up, down=down)
    routing = Routing(
        index=index,
        weight=torch.rand(TOKENS, 2, generator=g),
        expert_inputs=spool(tmp_path / "x", x),
    )
    cpu = torch.device("cpu")
    stream = RoutedStream(routing=routing, device=cpu)
    both = RoutedStream(routing=routing, device=cpu, original=spool(tmp_path / "o", original))
    (actual,) = collect_stats([wave], both, apply_gate, everyone, has_original=True)
    (plain,) = collect_stats([wave], stream, apply_gate, everyone)
    assert plain.into.cross is None and plain.inner.cross is None
    assert torch.equal(plain.into.gram, actual.into.gram) and torch.equal(
        plain.inner.gram, actual.inner.gram
    )
    assert actual.into.cross is not None and actual.inner.cross is not None
    for e in range(EXPERTS):
        mine = (
            torch.arange(TOKENS)
            if e in everyone
            else select_expert_tokens(routing.index, routing.weight, e)[0]
        )
        now, before = x[mine].double(), original[mine].double()
        inner, meant = (
            silu(t @ gate[e].double().T) * (t @ up[e].double().T) for t in (now, before)
        )
        into = actual.into.cross[0 if len(everyone) == EXPERTS else e]
        assert torch.allclose(into.double(), (before - now).T @ now, rtol=1e-3, atol=1e-3)
        assert torch.allclose(
            actual.inner.cross[e].double(), (meant - inner).T @ inner, rtol=1e-3, atol=1e-3
        )


def test_residual_gap_is_summed_where_a_linear_adds_to_the_stream() -> None:
    g = torch.Generator().manual_seed(1)
    x, original, gap = (torch.randn(70, width, generator=g) for width in (16, 16, 24))
    total = GramAccumulator(16, x.device, crossed=True, stream=24)
    for part in range(0, 70, 32):
        here = slice(part, part + 32)
        total.add(x[here], original[here], gap[here])
    actual = total.stats()
    assert actual.residual is not None and actual.cross is not None
    assert torch.allclose(
        actual.residual.double(), gap.double().T @ x.double(), rtol=1e-4, atol=1e-4
    )
    assert GramAccumulator(16, x.device, stream=24).stats().residual is None


@pytest.mark.parametrize("method", ["gptq", "awq"])
def test_only_blocks_after_an_error_are_corrected(
    source: Path, tmp_path: Path, method: str
) -> None:
    """In the first block both streams are equal, so its tensors are; those of the next block
    differ, experts included.
    """
    actual = []
    for way in ("quantized", "both"):
        quantize = f"{{method: {method}, rounding: gptq, bits: 4, group_size: 32}}"
        build(source, tmp_path / way, propagate=way, rules="all-linear", quantize=quantize)
        actual.append(load_file(tmp_path / way / "model.safetensors"))
    one, two = actual
    assert one.keys() == two.keys()
    changed = {name for name in one if not one[name].equal(two[name])}
    assert not any(name.startswith("model.layers.0.") for name in changed)
    for part in ("self_attn.", "mlp.experts.0.gate_proj.", "mlp.experts.0.down_proj."):
        assert any(name.startswith(f"model.layers.1.{part}") for name in changed), part


def test_nearest_rounding_ignores_the_original_stream(source: Path, tmp_path: Path) -> None:
    """Rounding to nearest corrects nothing."""
    for way in ("quantized", "both"):
        build(
            source,
            tmp_path / way,
            propagate=way,
            quantize="{method: awq, rounding: nearest, bits: 4, group_size: 32}",
        )
    one, two = (load_file(tmp_path / way / "model.safetensors") for way in ("quantized", "both"))
    assert all(one[name].equal(two[name]) for name in one)


def test_the_memory_of_an_expert_counts_its_crosses() -> None:
    names = Experts(module="x", router="y", count=8, top_k=2, hidden=HIDDEN, intermediate=INNER)
    none, gram, both = (estimate_expert_bytes(names, True, grams) for grams in (0, 1, 2))
    assert gram - none == both - gram == 4 * (HIDDEN**2 + INNER**2)
