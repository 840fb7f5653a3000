"""Load an artifact in vLLM on this CPU and answer the prompts of a reference file greedily.

    .venv-vllm/bin/python tests/external/vllm_cpu/generate.py ARTIFACT REFERENCE.json ANSWERS.json

Runs in vLLM's own environment and imports nothing of quantkit: vLLM sees the artifact as any user's vLLM would. All
that is asked of vLLM beyond its defaults stands in relaxed.py and below.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from relaxed import check_processor, relax

os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = (
    "0"  # one process: the class that is relaxed is the one that serves
)
ENGINE: dict[str, Any] = {
    "dtype": "bfloat16",
    "max_model_len": 512,
    "enforce_eager": True,  # 20 answers are not worth compiling for
    # vLLM's own rotary kernel for CPUs turns DeepSeek's heads wrongly (every answer is garbage); "none" takes the
    # same operations from torch.
    "compilation_config": {"custom_ops": ["none"]},
    "max_logprobs": 20,
    "seed": 0,
}


def main(artifact: str, reference: str, answers: str) -> None:
    """Answer every prompt of `reference` and write prompt tokens, text and log-probabilities to `answers`."""
    import torch
    import vllm

    check_processor()
    relax()
    asked = json.loads(Path(reference).read_text(encoding="utf-8"))
    began = time.monotonic()
    engine = vllm.LLM(artifact, **ENGINE)
    loaded = time.monotonic()
    longest = max(len(item["steps"]) for item in asked)
    sampling = vllm.SamplingParams(
        temperature=0, max_tokens=longest, logprobs=ENGINE["max_logprobs"]
    )
    made = engine.generate([item["prompt"] for item in asked], sampling, use_tqdm=False)
    answered = time.monotonic()
    found = [format_answer(item, output) for item, output in zip(asked, made, strict=True)]
    Path(answers).write_text(json.dumps(found), encoding="utf-8")
    processor = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512 VNNI"
    sys.stderr.write(
        f"vLLM {vllm.__version__} on {processor}: loaded in {loaded - began:.1f} s, "
        f"answered in {answered - loaded:.1f} s\n"
    )


def format_answer(item: dict[str, Any], output: Any) -> dict[str, Any]:
    """What vLLM made of one prompt, in the form of compare.Answer."""
    completion = output.outputs[0]
    steps = [
        {"token": token, "logprobs": {other: told.logprob for other, told in likely.items()}}
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
