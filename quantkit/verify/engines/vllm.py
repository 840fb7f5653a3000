"""vLLM's classes of models and the slots that they make. Pure.

Read in vllm/model_executor/models of VERSION: `hf_to_vllm_mapper`, `packed_modules_mapping`,
`load_weights` and the experts' `make_expert_params_mapping`. A class that is not listed was not
read. tests/verify/test_engine_maps.py compares the tables with an installed vLLM.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.verify.engines import slots
from quantkit.verify.engines.model_map import EngineMaps, WrapperMap

VERSION = "0.32.0"
WRAPPER: Mapping[str, str] = {
    "model.language_model.": "language_model.model.",
    "model.vision_tower.": "vision_tower.",
    "model.multi_modal_projector.": "multi_modal_projector.",
    "lm_head.": "language_model.lm_head.",
}
QWEN_WRAPPER: Mapping[str, str] = {
    "model.language_model.": "language_model.model.",
    "model.visual.": "visual.",
    "lm_head.": "language_model.lm_head.",
    "model.": "language_model.model.",
}
TOWER = ("vision_tower.", "multi_modal_projector.")

MAPS = EngineMaps(
    engine="vLLM",
    version=VERSION,
    models={
        "LlamaForCausalLM": ("llama.py", slots.LLAMA),
        "MistralForCausalLM": ("mistral.py", slots.LLAMA),
        "MixtralForCausalLM": ("mixtral.py", slots.MIXTRAL),
        "Qwen2ForCausalLM": ("qwen2.py", slots.QWEN2),
        "Qwen2MoeForCausalLM": ("qwen2_moe.py", slots.QWEN2_MOE),
        "Qwen3ForCausalLM": ("qwen3.py", slots.QWEN3),
        "Qwen3MoeForCausalLM": ("qwen3_moe.py", slots.QWEN3_MOE),
        "DeepseekV2ForCausalLM": ("deepseek_v2.py", slots.make_deepseek("fused_qkv_a_proj")),
        "DeepseekV3ForCausalLM": ("deepseek_v2.py", slots.make_deepseek("fused_qkv_a_proj")),
        "Glm4MoeForCausalLM": ("glm4_moe.py", slots.GLM4_MOE),
        "GemmaForCausalLM": ("gemma.py", slots.GEMMA),
        "Gemma2ForCausalLM": ("gemma2.py", slots.GEMMA2),
        "Gemma3ForCausalLM": ("gemma3.py", slots.GEMMA3),
        "Gemma3ForConditionalGeneration": (
            "gemma3_mm.py",
            WrapperMap(text=slots.GEMMA3, prefixes=WRAPPER, parts=TOWER),
        ),
        "Qwen2VLForConditionalGeneration": (
            "qwen2_vl.py",
            WrapperMap(text=slots.QWEN2, prefixes=QWEN_WRAPPER, parts=("visual.",)),
        ),
        "Qwen2_5_VLForConditionalGeneration": (
            "qwen2_5_vl.py",
            WrapperMap(text=slots.QWEN2, prefixes=QWEN_WRAPPER, parts=("visual.",)),
        ),
        "Qwen3VLForConditionalGeneration": (
            "qwen3_vl.py",
            WrapperMap(text=slots.QWEN3, prefixes=QWEN_WRAPPER, parts=("visual.",)),
        ),
    },
)
