"""Layers that take the sum of their experts inside: waves and interruptions change no byte."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from support.builds import build
from support.underived_models import family, write_model

from quantkit.build import progress_log
from quantkit.build.progress_log import BuildProgress
from quantkit.plan import plan

pytestmark = pytest.mark.usefixtures("quick_builds")

KEYS = {
    "rules": "all-linear",
    "quantize": "{method: awq, rounding: gptq, bits: 4, group_size: 64, symmetric: true}",
    "format": "compressed_tensors",
    "calibration": "{set: tiny-v3, sequences: 6, length: 48, min_expert_tokens: 4}",
    "fidelity": "{set: tiny-v3-heldout, windows: 2, length: 48}",
}


class Killed(BaseException):
    """Stands for the end of the process; nothing catches it."""


def save_every_wave(patch: pytest.MonkeyPatch, size: int) -> None:
    """Hold so many experts at once, and save every wave."""
    real = plan.plan_memory

    def limit(*arguments: Any, **keywords: Any) -> Any:
        return replace(real(*arguments, **keywords), wave_experts=size)

    patch.setattr(plan, "plan_memory", limit)
    patch.setattr(progress_log, "MIN_SECONDS", 0.0)
    patch.setattr(progress_log, "MIN_COST_RATIO", 0)


def kill_after_wave(patch: pytest.MonkeyPatch) -> None:
    """End the process after the first wave that is saved."""
    real = BuildProgress.record_wave

    def record(*arguments: Any) -> None:
        real(*arguments)
        raise Killed

    patch.setattr(BuildProgress, "record_wave", record)


def read_weights(folder: Path) -> bytes:
    return (folder / "model.safetensors").read_bytes()


ONE_BLOCK = {
    "flex_olmo": {"num_hidden_layers": 1},
    "deepseek_v4": {  # sums of another width than the states, which hold token ids too
        "num_hidden_layers": 1,
        "layer_types": ["sliding_attention"],
        "mlp_layer_types": ["hash_moe"],
    },
}


@pytest.mark.parametrize(
    ("model_type", "propagate", "saved"),
    [
        ("flex_olmo", "quantized", 2),  # three waves, of which the last is saved with the block
        ("flex_olmo", "both", 2),
        ("deepseek_v4", "both", 5),  # and three waves of the search for a scale
    ],
)
def test_waves_and_interruptions_change_no_byte(
    model_type: str, propagate: str, saved: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_model(tmp_path / "source", family(model_type, **ONE_BLOCK[model_type]))
    keys = {**KEYS, "propagate": propagate}
    whole = build(source, tmp_path / "whole", **keys)
    ends = 0
    for _ in range(20):
        with monkeypatch.context() as patch:
            save_every_wave(patch, 3)
            kill_after_wave(patch)
            try:
                pieces = build(source, tmp_path / "pieces", **keys)
            except Killed:
                ends += 1
                continue
        break
    assert ends == saved
    assert read_weights(pieces.path) == read_weights(whole.path)
    assert pieces.fidelity.distribution[0] == whole.fidelity.distribution[0]
