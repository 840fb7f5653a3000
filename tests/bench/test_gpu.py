"""The GPU benchmark runs on small shapes; without a device it prints that it has not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import gpu

SCRIPT = Path(gpu.__file__)
PHASES = ("read", "calibrate", "search", "factorize", "round", "pack")


def test_measure_block_runs_every_phase(capsys: pytest.CaptureFixture[str]) -> None:
    phases = gpu.measure_block(gpu.TINY, torch.device("cpu"), 3)
    assert tuple(phases.seconds) == PHASES
    weights = 3 * 3 * gpu.TINY.hidden * gpu.TINY.intermediate
    groups = weights / gpu.TINY.group_size
    assert phases.work["read"] == weights
    assert phases.work["pack"] == weights / 2 + groups * (
        2 + 0.5
    )  # a BF16 scale and a 4-bit zero point each
    gpu.print_phases(gpu.TINY, phases, 3)
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == list(PHASES)
    assert lines[-1].startswith("a block ") and " 58 blocks " in lines[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tests the output without a CUDA device")
def test_main_reports_missing_cuda_device() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("no CUDA device: this benchmark has not run")
