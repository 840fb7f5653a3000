"""Random checkpoints in the hub's layout from TINY configs: BF16, or FP8 in 128x128 blocks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from quantkit import registry
from quantkit.checkpoint.tensors import TORCH_DTYPES
from quantkit.contracts import Config
from quantkit.io.package_data import locate_model
from quantkit.plan import sources
from quantkit.plan.match_checkpoint import FP8_ROLES, list_expected_tensors
from quantkit.plan.plan import Plan
from quantkit.recipe.parse import parse_recipe

BLOCK = 128


def make_tiny_config(model_type: str, **changes: object) -> dict[str, object]:
    """Return the TINY config of an architecture with changes."""
    return {**registry.get_architecture(model_type).tiny, **changes}


def write_checkpoint(
    folder: Path, config: dict[str, object], *, fp8: bool = False, seed: int = 0
) -> Path:
    """Write random weights for every tensor of the layout, and tiny-v3's tokenizer (768 tokens)."""
    folder.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(seed)
    layout = registry.get_architecture(str(config["model_type"])).layout(Config(values=config))
    fp8_names = (
        {f"{x.name}.weight" for x in layout.linears if x.role in FP8_ROLES} if fp8 else set()
    )
    tensors: dict[str, torch.Tensor] = {}
    for name, spec in list_expected_tensors(layout, Config(values=config)).items():
        if len(spec.shape) == 1 and name.endswith("norm.weight"):
            value = 1 + 0.2 * torch.randn(spec.shape, generator=generator)
        elif len(spec.shape) == 1:
            value = 0.05 * torch.randn(spec.shape, generator=generator)
        else:
            value = torch.randn(spec.shape, generator=generator) * spec.shape[1] ** -0.5
            value[:, :: max(1, spec.shape[1] // 8)] *= 4  # a few large channels for scaling
        if name in fp8_names:
            tensors[name], tensors[f"{name}_scale_inv"] = quantize_to_fp8(value)
        else:
            tensors[name] = value.to(TORCH_DTYPES[spec.dtype])
    if fp8:
        entry = {
            "quant_method": "fp8",
            "weight_block_size": [BLOCK, BLOCK],
            "activation_scheme": "dynamic",
        }
        config = {**config, "quantization_config": entry}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(locate_model("builtin:tiny-v3") / name, folder / name)
    return folder


def quantize_to_fp8(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantize [out, in] to float8_e4m3fn and scale_inv [out / 128, in / 128] (rounded up)."""
    rows, columns = weight.shape
    quantized = torch.empty(rows, columns, dtype=torch.float8_e4m3fn)
    scales = torch.empty(-(-rows // BLOCK), -(-columns // BLOCK))
    for i in range(scales.shape[0]):
        for j in range(scales.shape[1]):
            block = slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK)
            scales[i, j] = weight[block].abs().amax() / 448
            quantized[block] = (weight[block] / scales[i, j]).to(torch.float8_e4m3fn)
    return quantized, scales


def make_recipe_text(model: Path | str, output: Path, /, **keys: str) -> str:
    """Return a small recipe over tiny-v3's text with some keys replaced."""
    lines = {
        "version": "1",
        "source": f"{{model: {model}}}",
        "quantize": "{method: awq, rounding: nearest, bits: 4, group_size: 64}",
        "format": "awq",
        "calibration": "{set: tiny-v3, sequences: 48, length: 128, min_expert_tokens: 8}",
        "fidelity": "{set: tiny-v3-heldout, windows: 12, length: 128}",
        "output": f"{{path: {output}}}",
        "memory": "4GB",
        "compute": "{device: cpu}",
    }
    lines |= keys
    lines.setdefault("propagate", "quantized")  # last: messages name lines
    return "\n".join(f"{key}: {value}" for key, value in lines.items()) + "\n"


def make_plan(folder: Path, **keys: str) -> Plan:
    """Return the plan of `make_recipe_text` for a checkpoint."""
    recipe = parse_recipe(make_recipe_text(folder, folder.parent / "out", **keys), "r.yaml")
    (plan,) = sources.plan_recipe(recipe, sources.resolve_source_facts(recipe))
    return plan
