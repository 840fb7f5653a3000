"""A small gpt_oss: experts with biases, in BF16 or in the MXFP4 blocks of the release."""

from __future__ import annotations

import json
from pathlib import Path

from safetensors.torch import load_file, save_file
from support.encoded import encode_mxfp4
from support.underived_models import family, write_model
from torch import Tensor

ENTRY = {
    "quant_method": "mxfp4",
    "modules_to_not_convert": [
        "model.layers.*.self_attn",
        "model.layers.*.mlp.router",
        "model.embed_tokens",
        "lm_head",
    ],
}
"""quantization_config of the release."""


def write_gpt_oss(folder: Path, **changes: object) -> Path:
    """Write a random BF16 gpt_oss as transformers saves it."""
    return write_model(folder, family("gpt_oss", **changes))


def write_mxfp4(plain: Path, folder: Path) -> Path:
    """Write a BF16 gpt_oss with its experts in MXFP4, as the release has them."""
    folder.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    for name, tensor in load_file(plain / "model.safetensors").items():
        if not name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            tensors[name] = tensor
            continue
        experts, into, out = tensor.shape
        # [experts, in, out] -> [experts * out, in] -> bytes [experts * out, in / 2]
        packed, scale = encode_mxfp4(tensor.mT.reshape(-1, into).float())
        tensors[f"{name}_blocks"] = packed.reshape(experts, out, into // 32, 16)
        tensors[f"{name}_scales"] = scale.reshape(experts, out, into // 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": ENTRY}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((plain / name).read_bytes())
    return folder
