"""SGLang's classes of models and the slots that they make. Pure.

Read in sglang/srt/models of VERSION: `stacked_params_mapping`, `make_expert_params_mapping` and
`load_weights`. SGLang skips a tensor that it has no parameter for, with a warning at most. A class
that is not listed was not read.
"""

from __future__ import annotations

from quantkit.verify.engines import slots
from quantkit.verify.engines.model_map import EngineMaps

VERSION = "0.5.23"
LATENT = "fused_qkv_a_proj_with_mqa"

MAPS = EngineMaps(
    engine="SGLang",
    version=VERSION,
    models={
        "LlamaForCausalLM": ("llama.py", slots.LLAMA),
        "MistralForCausalLM": ("mistral.py", slots.LLAMA),
        "MixtralForCausalLM": ("mixtral.py", slots.MIXTRAL),
        "Qwen2ForCausalLM": ("qwen2.py", slots.QWEN2),
        "Qwen2MoeForCausalLM": ("qwen2_moe.py", slots.QWEN2_MOE),
        "Qwen3ForCausalLM": ("qwen3.py", slots.QWEN3),
        "Qwen3MoeForCausalLM": ("qwen3_moe.py", slots.QWEN3_MOE),
        "DeepseekV2ForCausalLM": ("deepseek_v2.py", slots.make_deepseek(LATENT)),
        "DeepseekV3ForCausalLM": ("deepseek_v2.py", slots.make_deepseek(LATENT)),
        "Glm4MoeForCausalLM": ("glm4_moe.py", slots.GLM4_MOE),
        "Gemma2ForCausalLM": ("gemma2.py", slots.GEMMA2),
        "Gemma3ForCausalLM": ("gemma3_causal.py", slots.GEMMA3),
    },
)
