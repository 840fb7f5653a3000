"""Greedy answers of an artifact in vLLM on this CPU to the prompts of a reference file.

    .venv-vllm/bin/python tests/external/vllm_cpu/generate.py ARTIFACT REFERENCE.json ANSWERS.json

Runs in vLLM's own environment and imports nothing of quantkit: vLLM loads the artifact as any
user's vLLM would. relaxed.py and `ENGINE` hold all settings that differ from vLLM's defaults.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from relaxed import check_processor, relax_checks

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
    "0"  # one process, so that the class patched by relax_checks is the one that serves
)
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "enforce_eager": True,  # compiling takes longer than 20 answers
    # vLLM's rotary kernel for CPUs rotates DeepSeek's heads incorrectly (every answer is garbage);
    # "none" selects torch's implementation of the same operations.
    "compilation_config": {"custom_ops": ["none"]},
    "max_logprobs": 20,
    "seed": 0,
}


def main(artifact: str, reference: str, answers: str) -> None:
    """Answer each prompt of `reference`; write prompt tokens, text and log-probabilities to
    `answers`.
    """
    import torch
    import vllm

    check_processor()
    relax_checks()
    references = json.loads(Path(reference).read_text(encoding="utf-8"))
    start = time.monotonic()
    engine = vllm.LLM(artifact, **ENGINE)
    loaded = time.monotonic()
    longest = max(len(item["steps"]) for item in references)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=longest, logprobs=ENGINE["max_logprobs"]
    )
    outputs = engine.generate([item["prompt"] for item in references], sampling, use_tqdm=False)
    finished = time.monotonic()
    results = [
        format_answer(item, output) for item, output in zip(references, outputs, strict=True)
    ]
    Path(answers).write_text(json.dumps(results), encoding="utf-8")
    processor = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512 VNNI"
    sys.stderr.write(
        f"vLLM {vllm.__version__} on {processor}: loaded in {loaded - start:.1f} s, "
        f"answered in {finished - loaded:.1f} s\n"
    )


def format_answer(item: dict[str, Any], output: Any) -> dict[str, Any]:
    """Return vLLM's output for one prompt in the form of compare.Answer."""
    completion = output.outputs[0]
    steps = [
        {"token": token, "logprobs": {other: entry.logprob for other, entry in likely.items()}}
        for token, likely in zip(completion.token_ids, completion.logprobs, strict=True)
    ]
    return {
        "task_id": item["task_id"],
        "prompt": item["prompt"],
        "prompt_tokens": list(output.prompt_token_ids),
        "text": completion.text,
        "steps": steps,
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
