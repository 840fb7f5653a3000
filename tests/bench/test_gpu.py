"""The GPU benchmark's code runs, on small shapes; without a device it says that it has not run."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from bench import gpu

SCRIPT = Path(gpu.__file__)
PHASES = ("read", "calibrate", "search", "factorize", "round", "pack")


def test_every_phase_does_its_work(capsys: pytest.CaptureFixture[str]) -> None:
    found = gpu.measure_block(gpu.TINY, torch.device("cpu"), 3)
    assert tuple(found.seconds) == PHASES
    weights = 3 * 3 * gpu.TINY.hidden * gpu.TINY.intermediate
    groups = weights / gpu.TINY.group_size
    assert found.work["read"] == weights
    assert found.work["pack"] == weights / 2 + groups * (
        2 + 0.5
    )  # a BF16 scale and a 4-bit zero point each
    gpu.print_phases(gpu.TINY, found, 3)
    told = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in told[1:-1]] == list(PHASES)
    assert told[-1].startswith("a block ") and " 58 blocks " in told[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what happens without a CUDA device")
def test_without_a_device_it_says_that_it_has_not_run() -> None:
    done = subprocess.run([sys.executable, str(SCRIPT)], check=True, capture_output=True, text=True)
    assert done.stdout.startswith("no CUDA device: this benchmark has not run")
