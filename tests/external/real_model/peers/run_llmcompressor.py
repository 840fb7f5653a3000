"""llm-compressor: GPTQ symmetric (static act order, its default) or AWQ asymmetric, 4 bits, group
size 64.

    python run_llmcompressor.py gptq | awq MODEL TOKENS.json ARTIFACT COST.json

lm_head stays unquantized. AWQ pins memory for a GPU, which is an error on a CPU, so that call is
replaced with a no-op.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from cost import measure_cost
from datasets import Dataset
from llmcompressor import oneshot
from llmcompressor.modifiers.gptq import GPTQModifier
from llmcompressor.modifiers.quantization import QuantizationModifier
from llmcompressor.modifiers.transform.awq import AWQModifier
from llmcompressor.pipelines.cache import IntermediatesCache
from transformers import AutoModelForCausalLM, AutoTokenizer


def make_recipe(method: str) -> list[object]:
    """Return the modifiers of a method."""
    weights = QuantizationArgs(
        num_bits=4, group_size=64, symmetric=method == "gptq", strategy="group"
    )
    settings = {
        "config_groups": {"group_0": QuantizationScheme(targets=["Linear"], weights=weights)},
        "ignore": ["lm_head"],
    }
    if method == "gptq":
        return [GPTQModifier(**settings)]
    return [AWQModifier(), QuantizationModifier(**settings)]


def main() -> None:
    """Load, quantize and save a model; quantizing and saving are measured."""
    method, model_folder, tokens, artifact, report = sys.argv[1:]
    rows = json.loads(Path(tokens).read_text(encoding="utf-8"))
    calibration = Dataset.from_dict({
        "input_ids": rows,
        "attention_mask": [[1] * len(row) for row in rows],
    })
    IntermediatesCache.pin_memory = lambda *_: None
    model = AutoModelForCausalLM.from_pretrained(model_folder, dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    with measure_cost(Path(report)):
        oneshot(
            model=model,
            tokenizer=tokenizer,
            dataset=calibration,
            recipe=make_recipe(method),
            max_seq_length=len(rows[0]),
            num_calibration_samples=len(rows),
            shuffle_calibration_samples=False,
        )
        model.save_pretrained(artifact, save_compressed=True)
        tokenizer.save_pretrained(artifact)


if __name__ == "__main__":
    main()
