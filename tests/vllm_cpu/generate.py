"""Load an artifact in vLLM on this CPU and answer the prompts of a reference file greedily.

    .venv-vllm/bin/python tests/vllm_cpu/generate.py ARTIFACT REFERENCE.json ANSWERS.json

Runs in vLLM's own environment and imports nothing of quantkit: vLLM sees the artifact as any user's vLLM would. All
that is asked of vLLM beyond its defaults stands in the next two blocks.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

# Settings that vLLM documents. They must stand before it is imported.
os.environ.update(
    VLLM_ENABLE_V1_MULTIPROCESSING="0",  # one process: the class relaxed below is the one that serves
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB; the default is a share of the machine
    # Attention without MLA's compressed cache. Without AMX, vLLM's decode kernel for that cache is compiled for
    # DeepSeek-V3's size (512 + 64) only, and tiny-v3 (256 + 64) fails with "Unsupported block size: 16".
    VLLM_MLA_DISABLE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
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


def relax() -> None:
    """Let vLLM's kernel for four-bit experts on CPUs run where it can run; nothing it computes is changed.

    Both checks guard vllm.model_executor.layers.fused_moe.experts.cpu_moe.CPUExpertsInt4, the only class that serves
    AWQ experts on a CPU, and without them the load ends with "No WNA16 MoE backend supports the deployment
    configuration". On a GPU other classes serve, and none of this applies.

    - Routing: it declines DeepSeek's router, though it is handed finished expert numbers and weights and never sees
      how they were chosen (vLLM's pull request 51546 asks for the same).
    - Processor: it asks for AMX tiles, though its kernel also runs, and rightly, on AVX-512 BF16 and VNNI alone:
      measured on such a CPU, where what it says differs from plain bfloat16 weights by no more than rounding.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

    def always(*_: object) -> bool:
        return True

    CPUExpertsInt4._supports_routing_method = staticmethod(always)
    CPUExpertsInt4._supports_current_device = staticmethod(always)


def main(artifact: str, reference: str, answers: str) -> None:
    """Answer every prompt of `reference` and write prompt tokens, text and log-probabilities to `answers`."""
    import torch
    import vllm

    if not (torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()):
        sys.exit(
            "vLLM's kernel for four-bit experts needs a CPU with AVX-512 BF16 and VNNI; run this test on such a one"
        )
    relax()
    asked = json.loads(Path(reference).read_text(encoding="utf-8"))
    began = time.monotonic()
    engine = vllm.LLM(artifact, **ENGINE)
    loaded = time.monotonic()
    longest = max(len(item["steps"]) for item in asked)
    sampling = vllm.SamplingParams(temperature=0, max_tokens=longest, logprobs=ENGINE["max_logprobs"])
    made = engine.generate([item["prompt"] for item in asked], sampling, use_tqdm=False)
    answered = time.monotonic()
    found = [answer(item, output) for item, output in zip(asked, made, strict=True)]
    Path(answers).write_text(json.dumps(found), encoding="utf-8")
    processor = "AMX" if torch.cpu._is_amx_tile_supported() else "AVX-512 VNNI"
    sys.stderr.write(
        f"vLLM {vllm.__version__} on {processor}: loaded in {loaded - began:.1f} s, "
        f"answered in {answered - loaded:.1f} s\n"
    )


def answer(item: dict[str, Any], output: Any) -> dict[str, Any]:
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
