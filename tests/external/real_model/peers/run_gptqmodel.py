"""GPTQModel: GPTQ, 4 bits, group size 64, symmetric, other settings default (act-group-aware
order).

python run_gptqmodel.py MODEL TOKENS.json ARTIFACT COST.json
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from cost import measure_cost
from gptqmodel import GPTQModel, QuantizeConfig, extension


def main() -> None:
    """Load, quantize and save a model; quantizing and saving are measured."""
    model_folder, tokens, artifact, report = sys.argv[1:]
    rows = json.loads(Path(tokens).read_text(encoding="utf-8"))
    calibration = [
        {
            "input_ids": torch.tensor([row]),
            "attention_mask": torch.ones(1, len(row), dtype=torch.long),
        }
        for row in rows
    ]
    extension.load(
        name="pack_block_cpu"
    )  # compiled once for all models (half a minute), so not measured
    model = GPTQModel.load(
        model_folder, QuantizeConfig(bits=4, group_size=64, sym=True), device="cpu"
    )
    with measure_cost(Path(report)):
        model.quantize(calibration, batch_size=1)
        model.save(artifact)


if __name__ == "__main__":
    main()
