"""`quantkit.load`: an artifact of any format as a transformers model that runs on this machine.

NF4 artifacts stay packed: every quantized linear is a bitsandbytes `Linear4bit`, and so are the
projections of routed experts, which transformers itself cannot load (it fuses the experts of a
layer into two tensors). Other formats are unpacked, so that the model needs the memory of its
source. Only safetensors and JSON are read; no code of the folder runs. Hashes are not checked:
`quantkit verify` does that.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig

from quantkit import contracts, registry
from quantkit.artifact.layout import GENERATION_CONFIG
from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.hf_config import read_dtype
from quantkit.contracts import Layout, Linear, Scheme
from quantkit.errors import ArtifactError, UsageError
from quantkit.formats import bitsandbytes as nf4
from quantkit.io.files import read_json
from quantkit.models import full_model
from quantkit.models.experts import Gating, make_gating
from quantkit.models.layers import (
    MetaModel,
    RouterOutput,
    get_layer_name,
    make_meta_model,
    select_expert_tokens,
)
from quantkit.numerics import nf4 as codebook
from quantkit.plan.plan import load_architecture

DTYPES: Mapping[str, torch.dtype] = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
}
CPU_KERNEL_ROWS = 32
"""bitsandbytes' bfloat16 kernel for CPUs works on this many rows of a weight at once."""


def load_model(folder: str | Path, *, device: str | None = None, dtype: str | None = None) -> Any:
    """Load the artifact in `folder` as a transformers causal language model in eval mode.

    device: "cpu", "cuda", ...; None takes a GPU if there is one. dtype: "bfloat16", "float16" or
    "float32", the compute dtype; None takes the dtype of config.json. Raises ArtifactError or
    CheckpointError for a folder without a valid artifact, UsageError for a missing package, an
    unknown dtype or an absent device.
    """
    path = Path(folder)
    manifest, checkpoint = read_manifest(path), Checkpoint.open(path)
    format_name, schemes = read_schemes(manifest, checkpoint, path)
    config = checkpoint.config
    device_name = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype_name = dtype or read_dtype(config)
    if dtype_name not in DTYPES:
        raise UsageError(
            f"dtype: expected {', '.join(DTYPES)}, found {dtype_name!r}; name one of them"
        )
    meta = make_meta_model(config, get_device(device_name), DTYPES[dtype_name])
    layout = load_architecture(config, checkpoint.specs).layout(config)
    checkpoint = checkpoint.split_experts(layout.blocks)
    if format_name == "bitsandbytes":
        model = build_packed_model(meta, layout, checkpoint, schemes)
    else:
        model = full_model.make_model(
            meta, layout, full_model.make_reader(checkpoint, format_name, schemes)
        )
    if (path / GENERATION_CONFIG).is_file():
        model.generation_config = read_generation_config(path / GENERATION_CONFIG)
    return model


def read_generation_config(path: Path) -> Any:
    """Read a generation_config.json; raises ArtifactError if transformers refuses it."""
    values = dict(read_json(path, ArtifactError))
    try:
        return GenerationConfig.from_dict(values)
    except (
        TypeError,
        ValueError,
        AttributeError,
    ) as fault:  # transformers raises the first error that a wrong value causes
        raise ArtifactError(
            f"{path}: expected settings that transformers takes, found: "
            f"{' '.join(str(fault).split()):.300}; repair the value, or remove the file"
        ) from fault


def get_device(name: str) -> torch.device:
    """Return the device of that name; raises UsageError if this machine lacks it."""
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as fault:
        raise UsageError(
            f"device: expected one of this machine, found {name!r}: {fault}; name another"
        ) from fault
    return device


def read_schemes(
    manifest: Mapping[str, object], checkpoint: Checkpoint, path: Path
) -> tuple[str | None, dict[str, Scheme]]:
    """Return the format of the packed linears (None if there are none) and the scheme of each."""
    entry = checkpoint.config.values.get("quantization_config")
    if not isinstance(entry, dict):
        return None, {}
    name = str(manifest.get("format") or read_config_format(entry))
    registry.check_packages(name)
    try:
        modules = get_section(manifest, "modules", path)
        return name, {module: Scheme(**values["scheme"]) for module, values in modules.items()}  # type: ignore[index]
    except (KeyError, TypeError) as fault:
        raise ArtifactError(
            f"{path}: its manifest does not say how modules are quantized: {fault}"
        ) from fault


def read_config_format(entry: Mapping[str, object]) -> str:
    """Return the format by config.json, for manifests without one.

    gptq_v2 shares its quant_method with gptq, so that checkpoint_format decides.
    """
    return str(entry.get("checkpoint_format") or entry.get("quant_method")).replace("-", "_")


# ---------------------------------------------------------------------------------------------- NF4


def build_packed_model(
    meta: MetaModel, layout: Layout, checkpoint: Checkpoint, schemes: Mapping[str, Scheme]
) -> Any:
    """Return the model with a Linear4bit for every linear in `schemes` that transformers runs."""
    model = full_model.make_empty_model(meta)
    for block in layout.blocks:
        if block.kind != "decoder":
            continue
        linears = {
            linear.name: build_linear4bit(meta, linear, checkpoint, schemes[linear.name])
            for linear in block.linears
            if linear.name in schemes
        }
        experts = block.experts
        gating = make_gating(meta, block)
        if experts and gating and experts.first in schemes:
            routed = Experts4bit(experts, linears, gating)
            model.set_submodule(f"{block.path}.{get_layer_name(block, experts.module)}", routed)
        for linear in block.linears:
            if linear.name in linears and linear.role != "routed_expert":
                model.set_submodule(
                    f"{block.path}.{get_layer_name(block, linear.name)}", linears[linear.name]
                )
    kind = codebook.import_bitsandbytes("nn").Linear4bit
    packed = {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if type(module) is kind
    }
    return full_model.fill_model(
        model,
        meta,
        layout,
        full_model.iterate_state_dict(meta, layout, full_model.make_reader(checkpoint), schemes),
        packed,
    )


def build_linear4bit(
    meta: MetaModel, linear: Linear, checkpoint: Checkpoint, scheme: Scheme
) -> nn.Module:
    """Return one linear as stored, without its bias, which is loaded with the rest of the model."""
    bitsandbytes = codebook.import_bitsandbytes("nn")
    names = [spec.name for spec in nf4.list_tensors(linear, scheme)]
    missing = [name for name in names if name not in checkpoint.specs]
    if missing:
        raise ArtifactError(
            f"{checkpoint.folder}: tensor {missing[0]}: expected, found none; {nf4.REPAIR_HINT}"
        )
    tensors = {
        name.removeprefix(f"{linear.name}."): part for name, part in checkpoint.read(names).items()
    }
    state = nf4.extract_quant_state(tensors, scheme)
    with torch.device("meta"):
        module = bitsandbytes.Linear4bit(
            linear.in_features,
            linear.out_features,
            bias=linear.bias,
            compute_dtype=meta.dtype,
            compress_statistics=scheme.double_quant,
            quant_type="nf4",
        )
    module.weight = bitsandbytes.Params4bit.from_prequantized(
        data=tensors["weight"], quantized_stats=state, device=str(meta.device), module=module
    )
    fits = meta.dtype == torch.bfloat16 and linear.out_features % CPU_KERNEL_ROWS == 0
    module.support_avx512bf16_for_cpu = module.support_avx512bf16_for_cpu and fits
    result: nn.Module = module
    return result


class Experts4bit(nn.Module):
    """The routed experts of a layer, one Linear4bit per projection; transformers fuses two tensors.

    Submodules are named as in the checkpoint: "0.gate_proj".
    """

    def __init__(
        self, names: contracts.Experts, linears: Mapping[str, nn.Module], gating: Gating
    ) -> None:
        super().__init__()
        self.names = names
        self.gating = gating
        for e in range(names.count):
            self.add_module(
                str(e),
                nn.ModuleDict({x: linears[names.linear(e, x)] for x in names.projections}),
            )

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Run the routed experts: hidden [tokens, hidden], index and weights [tokens, k]."""
        routed = RouterOutput(hidden=hidden_states, index=top_k_index, weight=top_k_weights)
        output = torch.zeros_like(hidden_states)
        for e in top_k_index.unique().tolist():
            token, weight = select_expert_tokens(routed.index, routed.weight, e)  # [n], [n]
            expert: Any = self.get_submodule(str(e))
            x = hidden_states[token]  # [tokens, hidden] -> [n, hidden]
            gate = None if self.names.gate is None else expert[self.names.gate](x)
            intermediate = self.gating(gate, expert[self.names.up](x))  # -> [n, intermediate]
            output.index_add_(
                0, token, expert[self.names.down](intermediate) * weight[:, None].to(intermediate)
            )
        return output
