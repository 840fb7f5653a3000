"""`make bench-gpu`: one MoE block of DeepSeek-V3's shape on a CUDA device, phase by phase.

256 experts of 7168 x 2048 in random FP8 blocks, 131,072 tokens routed to 8 experts each. A slice
holds as many experts as the device's free memory allows. For each phase the benchmark prints
seconds and the rate of its leading products, and extrapolates to 58 blocks. `--tiny` runs the same
code with small shapes on the CPU; those figures say nothing about a GPU.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import silu

from quantkit import registry
from quantkit.build.expert_ops import ExpertSlice, RoutedStream, SliceStats, collect_stats
from quantkit.build.hidden_states import Routing
from quantkit.build.quantize_linear import select_expert_stats
from quantkit.build.spool import Spool
from quantkit.checkpoint import fp8
from quantkit.contracts import Experts, Linear, Scheme
from quantkit.methods import awq
from quantkit.models import scaling
from quantkit.numerics import awq_scales, cholesky, coordinate_descent, gptq
from quantkit.plan.memory import BATCH_TOKENS, estimate_expert_bytes, estimate_solve_bytes

BLOCKS = 58
"""MoE blocks of DeepSeek-V3."""
FP8_BLOCK = 128
SHARE = 0.8
"""Share of the device's free memory that slices may use."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Shape of one MoE block and of its calibration text."""

    experts: int
    top_k: int
    hidden: int
    intermediate: int
    tokens: int
    group_size: int

    @property
    def scheme(self) -> Scheme:
        return Scheme(bits=4, group_size=self.group_size, symmetric=False, scale_dtype="bfloat16")

    @property
    def block(self) -> Experts:
        """The experts as the layout describes them."""
        return Experts(
            module="x",
            router="r",
            count=self.experts,
            top_k=self.top_k,
            hidden=self.hidden,
            intermediate=self.intermediate,
        )


FULL = Shape(experts=256, top_k=8, hidden=7168, intermediate=2048, tokens=131_072, group_size=128)
TINY = Shape(experts=5, top_k=2, hidden=256, intermediate=128, tokens=2000, group_size=64)


@dataclass(kw_only=True)
class Phases:
    """Seconds and leading operations (or bytes) of each phase, summed over slices."""

    device: torch.device
    seconds: dict[str, float] = field(default_factory=dict)
    work: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def time_phase(self, name: str, work: float) -> Iterator[None]:
        """Add the time of the body, including the work that it starts on the device."""
        self.wait()
        began = time.monotonic()
        yield
        self.wait()
        self.seconds[name] = self.seconds.get(name, 0) + time.monotonic() - began
        self.work[name] = self.work.get(name, 0) + work

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()


def choose_slice_size(shape: Shape, device: torch.device) -> int:
    """Return how many experts fit into the free device memory, by the build's memory plan."""
    if device.type != "cuda":
        return 2
    linear = Linear(
        name="x", out_features=shape.intermediate, in_features=shape.hidden, role="routed_expert"
    )
    free = SHARE * torch.cuda.mem_get_info(device)[0] - estimate_solve_bytes([linear], True)
    return max(1, min(shape.experts, int(free // estimate_expert_bytes(shape.block, True, True))))


def read_weight(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Return a random FP8 weight as quantkit dequantizes it: [rows, columns] float32 on the CPU."""
    codes = torch.randint(
        0, 0x7F, (rows, columns), dtype=torch.uint8, generator=generator
    )  # 0x7F is NaN
    signs = torch.randint(0, 2, (rows, columns), dtype=torch.uint8, generator=generator) << 7
    stored = (codes | signs).view(torch.float8_e4m3fn)
    scales = 1e-4 * (
        1 + torch.rand(-(-rows // FP8_BLOCK), -(-columns // FP8_BLOCK), generator=generator)
    )
    return fp8.dequantize_fp8(
        lambda i, j: stored[i:j], scales, (FP8_BLOCK, FP8_BLOCK), 0, rows, columns
    ).float()


def read_slice(shape: Shape, first: int, stop: int, device: torch.device) -> ExpertSlice:
    """Return experts first..stop with random weights that depend only on the expert's number."""
    stacks: dict[str, list[Tensor]] = {"gate": [], "up": [], "down": []}
    for e in range(first, stop):
        generator = torch.Generator().manual_seed(e)
        for name, weights in stacks.items():
            size = (
                (shape.hidden, shape.intermediate)
                if name == "down"
                else (shape.intermediate, shape.hidden)
            )
            weights.append(read_weight(*size, generator).to(device))
    gate, up, down = (torch.stack(weights) for weights in stacks.values())
    return ExpertSlice(first=first, gate=gate, up=up, down=down)


def make_routing(shape: Shape, folder: Path, device: torch.device) -> Routing:
    """Write random tokens to disk and route each to `top_k` random experts."""
    generator = torch.Generator().manual_seed(0)
    seen = Spool.create(folder / "seen", shape.tokens, shape.hidden, "bfloat16")
    channels = torch.exp(torch.randn(shape.hidden, generator=generator))  # outlier channels
    for start in range(0, shape.tokens, BATCH_TOKENS):
        rows = min(BATCH_TOKENS, shape.tokens - start)
        seen.write(start, torch.randn(rows, shape.hidden, generator=generator) * channels)
    chance = torch.rand(shape.tokens, shape.experts, generator=generator)
    index = chance.topk(shape.top_k, dim=-1).indices.to(device)  # [tokens, experts] -> [tokens, k]
    weight = torch.full(index.shape, 1 / shape.top_k, device=device)
    return Routing(index=index, weight=weight, expert_inputs=seen)


def apply_gate(gate: Tensor | None, up: Tensor) -> Tensor:
    """Return the input of the down projection: gate, up [tokens, intermediate] -> the same."""
    assert gate is not None  # DeepSeek-V3's experts have one
    return silu(gate) * up


def run_slice(shape: Shape, wave: ExpertSlice, routing: Routing, phases: Phases) -> int:
    """Calibrate, search, factorize, round and pack one slice; return the packed bytes."""
    hidden, width, n = shape.hidden, shape.intermediate, len(wave)
    pairs = shape.tokens * shape.top_k * n / shape.experts  # tokens routed to this slice
    with phases.time_phase(
        "calibrate", pairs * (2 * hidden**2 + 2 * width**2 + 4 * hidden * width)
    ):
        tokens = RoutedStream(routing=routing, device=wave.gate.device)
        (stats,) = collect_stats([wave], tokens, apply_gate, frozenset())
    judged = min(awq_scales.SAMPLED_ROWS, width)
    with phases.time_phase("search", 20 * 2 * n * judged * 2 * hidden**2):
        tried = awq.METHOD.rescale
        assert tried is not None  # AWQ searches scales
        scales = tried.candidates(
            stats.into.mean_abs.mean(0)
        )  # [experts, hidden] -> [candidates, hidden]
        for weights in (wave.gate, wave.up):
            scaling.compute_scale_errors(tried, weights, stats.into.gram, scales, shape.scheme)
    with phases.time_phase(
        "factorize", n * (2 * hidden**3 + width**3) / 3
    ):  # gate and up each factorize their gram
        for e in range(n):
            for matrix in (stats.into, stats.into, stats.inner):
                cholesky.factorize_gram(matrix.gram[e])
    return round_slice(shape, wave, stats, phases)


def round_slice(shape: Shape, wave: ExpertSlice, stats: SliceStats, phases: Phases) -> int:
    """Round (which factorizes again) and pack every matrix of a slice; return the packed bytes."""
    output, packed = registry.get_format("awq"), 0
    for e in range(len(wave)):
        for weights, inputs in (
            (wave.gate, stats.into),
            (wave.up, stats.into),
            (wave.down, stats.inner),
        ):
            out, width = weights.shape[-2:]
            # rounding, two products per sweep, two row errors with the whole gram, and the factor
            with phases.time_phase(
                "round", (1 + 2 * coordinate_descent.SWEEPS + 4) * out * width**2 + width**3 / 3
            ):
                rounded = gptq.quantize_gptq(
                    weights[e], select_expert_stats(inputs, e), shape.scheme
                )
            with phases.time_phase("pack", 0):
                tensors = output.pack(rounded.quantized, shape.scheme)
                packed += sum(tensor.cpu().nbytes for tensor in tensors.values())
    return packed


def measure_block(shape: Shape, device: torch.device, experts: int) -> Phases:
    """Run `experts` experts of the block, slice by slice."""
    phases, size, packed = Phases(device=device), choose_slice_size(shape, device), 0
    with tempfile.TemporaryDirectory() as place:
        routing = make_routing(shape, Path(place), device)
        for first in range(0, experts, size):
            stop = min(first + size, experts)
            with phases.time_phase("read", 0):
                wave = read_slice(shape, first, stop, device)
            packed += run_slice(shape, wave, routing, phases)
    weights = experts * 3 * shape.hidden * shape.intermediate
    phases.work["read"], phases.work["pack"] = weights, packed  # bytes: FP8 in, INT4 out
    return phases


def print_phases(shape: Shape, phases: Phases, experts: int) -> None:
    """Print one line per phase and the sum."""
    scale, total = shape.experts / experts, 0.0
    size = f"{shape.hidden} x {shape.intermediate}"
    print(f"{experts} of {shape.experts} experts {size}, {shape.tokens} tokens, {phases.device}")
    for name, seconds in phases.seconds.items():
        unit = "GB/s" if name in {"read", "pack"} else "Gflop/s"
        total += 0 if name == "factorize" else seconds * scale
        print(
            f"{name:10s} {seconds * scale:10.3f} s a block  "
            f"{phases.work[name] / seconds / 1e9:12.2f} {unit}"
        )
    print(
        f"a block {total:.2f} s (round factorizes by itself); {BLOCKS} blocks "
        f"{BLOCKS * total / 3600:.3f} h"
    )


def main() -> None:
    """Measure and print; without a CUDA device, print that nothing was measured."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="small shapes on the CPU")
    parser.add_argument(
        "--experts", type=int, help="number of experts to measure; the rest is extrapolated"
    )
    options = parser.parse_args()
    if not options.tiny and not torch.cuda.is_available():
        print(
            "no CUDA device: this benchmark has not run, and nothing was measured (--tiny runs "
            "its code on the CPU)"
        )
        return
    shape = TINY if options.tiny else FULL
    device = torch.device("cpu" if options.tiny else "cuda")
    experts = min(options.experts or shape.experts, shape.experts)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), "torch", torch.__version__)
    print_phases(shape, measure_block(shape, device, experts), experts)


if __name__ == "__main__":
    main()
