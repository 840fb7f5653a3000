"""`make bench-memory`: peak memory with 8 and with 32 MoE blocks, against the recipe's `memory:`.

Quantizes two synthetic FP8 checkpoints of one shape, each in a process of its own. Exits with 1 if
the peaks differ by 5 % or more, or if a peak exceeds the budget.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path

from support.checkpoints import make_recipe_text, make_tiny_config, write_checkpoint

SHAPE = {
    "hidden_size": 512,
    "intermediate_size": 1024,
    "moe_intermediate_size": 256,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "num_nextn_predict_layers": 0,
    "first_k_dense_replace": 1,
}
BUDGET = "1050MB"
BUDGET_BYTES = 1_050_000_000


def measure_peak(place: Path, blocks: int) -> tuple[int, int, int]:
    """Return the checkpoint's bytes, experts per wave and peak resident bytes of one build."""
    source = write_checkpoint(
        place / f"source{blocks}",
        make_tiny_config("deepseek_v3", **SHAPE, num_hidden_layers=blocks + 1),
        fp8=True,
    )
    recipe = place / f"{blocks}.yaml"
    calibration = "{set: tiny-v3, sequences: 100, length: 128}"
    recipe.write_text(
        make_recipe_text(
            source, place / f"artifact{blocks}", memory=BUDGET, calibration=calibration
        )
    )
    quantkit = [sys.executable, "-m", "quantkit"]
    planned = subprocess.run(
        [*quantkit, "plan", str(recipe), "--json"], check=True, capture_output=True, text=True
    )
    subprocess.run(
        [
            *(*quantkit, "build", str(recipe), "--skip-evaluation"),
            *("--output", str(place / f"artifact{blocks}")),
        ],
        check=True,
        stdout=subprocess.DEVNULL,
    )
    timings = json.loads((place / f"artifact{blocks}" / "quantkit" / "timings.json").read_text())
    wave = json.loads(planned.stdout)["memory"]["experts_per_wave"]
    return (source / "model.safetensors").stat().st_size, wave, timings["peak_rss_bytes"]


def main() -> None:
    """Build both and print both peaks."""
    peaks = []
    for blocks in (8, 32):
        with tempfile.TemporaryDirectory() as place:
            size, wave, resident = measure_peak(Path(place), blocks)
        peaks.append(resident)
        print(
            f"{blocks:2d} MoE blocks: source {size / 1e6:.0f} MB, {wave} experts per wave, peak "
            f"{resident / 1e6:.0f} MB"
        )
    difference = abs(peaks[1] - peaks[0]) / peaks[0]
    print(
        f"difference {100 * difference:.1f} % (goal < 5 %); budget {BUDGET}, largest peak "
        f"{max(peaks) / 1e6:.0f} MB"
    )
    raise SystemExit(1 if difference >= 0.05 or max(peaks) > BUDGET_BYTES else 0)


if __name__ == "__main__":
    main()
