"""Settings and patches beyond vLLM's defaults on this CPU, used only by `make test-vllm`.

Importing this module sets environment variables; import it before vLLM.
"""

from __future__ import annotations

import os
import sys

# Settings documented by vLLM; they must be set before vLLM is imported.
os.environ.update(
    VLLM_CPU_KVCACHE_SPACE="1",  # GiB; the default is a share of the machine
    # Attention without MLA's compressed cache. Without AMX, vLLM's decode kernel for that cache is
    # compiled only for DeepSeek-V3's size (512 + 64); tiny-v3 (256 + 64) fails with "Unsupported
    # block size: 16".
    VLLM_MLA_DISABLE="1",
    VLLM_NO_USAGE_STATS="1",
    HF_HUB_OFFLINE="1",
)


def check_processor() -> None:
    """Check that vLLM's kernel for four-bit experts can run on this CPU.

    Raises SystemExit if not.
    """
    import torch

    if not (torch.cpu._is_avx512_bf16_supported() and torch.cpu._is_vnni_supported()):
        sys.exit(
            "processor: expected AVX-512 BF16 and VNNI for vLLM's four-bit expert kernel, "
            "found none; run this test on such a CPU"
        )


def relax_checks() -> None:
    """Disable two checks that keep vLLM's four-bit expert kernel from running on supported CPUs.

    The computation is unchanged. Both checks belong to
    vllm.model_executor.layers.fused_moe.experts.cpu_moe.CPUExpertsInt4, the only class that serves
    AWQ experts on a CPU. With the checks, loading fails with "No WNA16 MoE backend supports the
    deployment configuration". GPUs use other classes, and none of this applies.

    - Routing: the class declines DeepSeek's router, although it receives computed expert ids and
    weights and does not depend on how they were selected (vLLM's pull request 51546 proposes the
    same change).
    - Processor: the class requires AMX tiles, although its kernel also runs correctly on AVX-512
    BF16 and VNNI alone: measured on such a CPU, its output differs from plain bfloat16 weights by
    no more than rounding.
    """
    from vllm.model_executor.layers.fused_moe.experts.cpu_moe import CPUExpertsInt4

    def is_supported(*_: object) -> bool:
        return True

    CPUExpertsInt4._supports_routing_method = staticmethod(is_supported)
    CPUExpertsInt4._supports_current_device = staticmethod(is_supported)
