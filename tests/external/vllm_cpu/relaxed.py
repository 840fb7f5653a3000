"""What is asked of vLLM on this CPU beyond its defaults, by `make test-vllm` alone.

Importing this sets the environment, so it comes before vLLM.
"""

from __future__ import annotations

import os
import sys

# Settings that vLLM documents. They must stand before it is imported.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB; the default is a share of the machine
    # Attention without MLA's compressed cache. Without AMX, vLLM's decode kernel for that cache is compiled for
    # DeepSeek-V3's size (512 + 64) only, and tiny-v3 (256 + 64) fails with "Unsupported block size: 16".
    VLLM_MLA_DISABLE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def check_processor() -> None:
    """SystemExit where vLLM's kernel for four-bit experts cannot run."""
    import torch

    if not (torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()):
        sys.exit(
            "vLLM's kernel for four-bit experts needs a CPU with AVX-512 BF16 and VNNI; run this test on such a one"
        )


def relax_checks() -> None:
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
