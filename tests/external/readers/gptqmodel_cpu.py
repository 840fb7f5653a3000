"""Reader of awq and gptq artifacts: GPTQModel on this CPU, through transformers or its own loader.

    python tests/external/readers/gptqmodel_cpu.py JOBS.json

JOBS.json is a list of {"artifact", "loader": "transformers" | "gptqmodel" | null, "dtype",
"tokens", "output"}. The safetensors file `output` receives the weights that GPTQModel unpacks from
the stored tensors and, with a loader, the logits of the tokens and the kernel of each quantized
module. Imports nothing of quantkit and runs in its own process: importing gptqmodel replaces parts
of transformers for every model created later.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

# The kernels run uncompiled; compiling them takes longer than all the jobs.
os.environ.update(TORCHDYNAMO_DISABLE="1", HF_HUB_OFFLINE="1")

import torch
from gptqmodel import GPTQModel
from gptqmodel.nn_modules.qlinear import BaseQuantLinear
from gptqmodel.nn_modules.qlinear.torch import TorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import dynamic_get
from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM


def load_model(artifact: Path, loader: str, dtype: torch.dtype) -> Any:
    """Load an artifact as a model in `dtype`; quantized kernels may compute in 16 bits."""
    if loader == "gptqmodel":
        return GPTQModel.load(str(artifact), device="cpu", dtype=dtype).model
    model, loading_info = AutoModelForCausalLM.from_pretrained(
        artifact, dtype=dtype, device_map="cpu", output_loading_info=True
    )
    if any(loading_info.values()):
        sys.exit(f"{artifact}: expected no loading issues from transformers, found {loading_info}")
    return model


def unpack_weights(artifact: Path) -> dict[str, torch.Tensor]:
    """Return each packed weight [out, in] in float32, unpacked by GPTQModel's plain kernels."""
    entry = json.loads((artifact / "config.json").read_text(encoding="utf-8"))[
        "quantization_config"
    ]
    weights = {}
    for file in sorted(artifact.glob("*.safetensors")):
        with safe_open(file, "pt") as stored:
            modules = [
                key.removesuffix(".qweight")
                for key in list(stored.keys())
                if key.endswith(".qweight")
            ]
            for name in modules:
                parts = [
                    "qweight",
                    "qzeros",
                    "scales",
                    *(["g_idx"] if entry["quant_method"] == "gptq" else []),
                ]
                tensors = {key: stored.get_tensor(f"{name}.{key}") for key in parts}
                tensors["scales"] = tensors["scales"].float()
                settings = entry | (
                    dynamic_get(entry["dynamic"], name) or {}
                )  # the module's bits, group_size and sym
                weights[name] = (unpack_gptq if "g_idx" in tensors else unpack_awq)(
                    tensors, settings
                ).contiguous()
    return weights


def unpack_awq(tensors: dict[str, torch.Tensor], entry: dict[str, Any]) -> torch.Tensor:
    """Unpack one AWQ weight [out, in]."""
    width = len(tensors["qweight"])
    group = width if entry["group_size"] == -1 else entry["group_size"]
    return dequantize_gemm(
        **tensors, bits=entry["bits"], group_size=group
    ).T  # [in, out] -> [out, in]


def unpack_gptq(tensors: dict[str, torch.Tensor], entry: dict[str, Any]) -> torch.Tensor:
    """Unpack one GPTQ weight [out, in]; the kernel expects zero points in version 2's encoding."""
    width, out = len(tensors["g_idx"]), tensors["scales"].shape[1]
    module = TorchLinear(
        bits=entry["bits"],
        group_size=entry["group_size"],
        sym=entry["sym"],
        desc_act=entry["desc_act"],
        in_features=width,
        out_features=out,
        register_buffers=True,
    ).eval()
    for key, tensor in tensors.items():
        setattr(module, key, tensor.clone())
    if entry["checkpoint_format"] == "gptq":
        convert_gptq_v1_to_v2_format_module(module, bits=entry["bits"], pack_dtype=torch.int32)
    return module.dequantize_weight().T  # [in, out] -> [out, in]


def main(jobs: str) -> None:
    """Run each job of the list."""
    torch.set_num_threads(1)
    for job in json.loads(Path(jobs).read_text(encoding="utf-8")):
        artifact, kernels = Path(job["artifact"]), dict[str, str]()
        tensors = unpack_weights(artifact)
        if job["loader"]:
            model = load_model(artifact, job["loader"], getattr(torch, job["dtype"]))
            with torch.no_grad():
                tensors["logits"] = model(
                    load_file(job["tokens"])["tokens"]
                ).logits.float()  # [rows, tokens, vocabulary]
            kernels = {
                name: type(x).__name__
                for name, x in model.named_modules()
                if isinstance(x, BaseQuantLinear)
            }
        save_file(tensors, job["output"], metadata={"kernels": json.dumps(kernels)})


if __name__ == "__main__":
    main(*sys.argv[1:])
