"""Decoder layers that run without their model: transformers' own modules, our tensors, experts replaced by a tap.

quantkit never holds a model. The skeleton lives on the meta device; one layer at a time is given its tensors. Where
routed experts would run, `ExpertTap` notes what they were asked and answers zero, so that a layer runs in the memory
of its dense part and the experts can follow in waves: their output is added to the layer's, because every supported
family adds it to the residual (the contract tests compare the sum with transformers' own forward).
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from quantkit.contracts import Block, Config, Layout
from quantkit.errors import CheckpointError
from quantkit.io.files import make_config_error
from quantkit.numerics import matmul


@dataclass(frozen=True, kw_only=True)
class MetaModel:
    """A model without weights and what its layers need to run; made by `skeleton`."""

    config: Any  # transformers PretrainedConfig
    model: Any  # transformers' causal language model on the meta device
    rotary: nn.Module
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """What a router asked of the experts: inputs [tokens, hidden], experts [tokens, k], weights [tokens, k]."""

    hidden: Tensor
    index: Tensor
    weight: Tensor


class ExpertTap(nn.Module):
    """Stands where routed experts stand: keeps the last request and answers zero."""

    def __init__(self) -> None:
        super().__init__()
        self.last: RouterOutput | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """[tokens, hidden] -> zeros of the same shape."""
        self.last = RouterOutput(hidden=hidden_states, index=top_k_index, weight=top_k_weights)
        return torch.zeros_like(hidden_states)


class MatmulLinear(nn.Module):
    """A linear layer that numerics.products computes: in float32 on a CPU up to twice as fast as torch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out]."""
        return matmul.linear(x, self.weight, self.bias)


def make_meta_model(config: Config, device: torch.device, dtype: torch.dtype) -> MetaModel:
    """The model of `config` on the meta device, computing in `dtype` on `device`. No code of the checkpoint runs."""
    model_type = config.text("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{config.where}: model_type {model_type!r} is not part of this transformers release; upgrade transformers"
        )
    values = {
        key: value
        for key, value in config.values.items()
        if key not in {"quantization_config", "auto_map"}
    }
    try:
        hf_config = CONFIG_MAPPING[model_type].from_dict(
            copy.deepcopy(values)
        )  # it writes into nested values
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                hf_config, dtype=dtype, attn_implementation="sdpa"
            )
        # inv_freq is a buffer that no checkpoint stores: on the meta device it would be garbage
        rotary = get_rotary_class(model)(hf_config).to(device)
    except CheckpointError as fault:
        raise CheckpointError(f"{config.where}: {fault}") from fault
    except Exception as fault:
        raise make_config_error(config.where, model_type, fault) from fault
    check_attention_patterns(hf_config, config.where)
    model.eval()
    return MetaModel(config=hf_config, model=model, rotary=rotary, device=device, dtype=dtype)


def get_rotary_class(model: Any) -> type[nn.Module]:
    """The module that makes the rotary position embeddings; CheckpointError for a model whose layers get none."""
    found = getattr(model.base_model, "rotary_emb", None)
    if not isinstance(found, nn.Module):
        raise CheckpointError(
            f"expected layers that are given rotary position embeddings, found {type(model).__name__} without; only "
            "such layers can be run one by one"
        )
    return type(found)


def make_decoder_layer(
    skeleton: MetaModel, block: Block, tensors: Mapping[str, Tensor]
) -> tuple[nn.Module, ExpertTap | None]:
    """One decoder layer with `tensors` (full names, routed experts left out) and the tap in place of its experts.

    Floating tensors are cast to the skeleton's dtype, but for buffers the family keeps in float32.
    """
    layer: nn.Module = copy.deepcopy(skeleton.model.get_submodule(block.name))
    tap = None
    if block.experts:
        parent, _, leaf = get_layer_name(block, block.experts.module).rpartition(".")
        tap = ExpertTap()
        setattr(layer.get_submodule(parent), leaf, tap)
    for name, module in list(layer.named_modules()):
        if type(module) is nn.Linear:
            layer.set_submodule(name, MatmulLinear(module))
    buffers = {name for name, _ in layer.named_buffers()}
    state = {
        get_layer_name(block, name): tensor.to(
            device=skeleton.device,
            dtype=torch.float32 if get_layer_name(block, name) in buffers else skeleton.dtype,
        )
        for name, tensor in tensors.items()
    }
    load_tensors(layer, state, block.name)
    return layer, tap


def load_tensors(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Assign a whole state dict; what is missing or left over names itself."""
    result = module.load_state_dict(state, strict=False, assign=True)
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"{where}: transformers' layer wants other tensors than the architecture table: "
            f"missing {result.missing_keys}, unexpected {result.unexpected_keys}"
        )
    module.requires_grad_(False)


def get_layer_name(block: Block, name: str) -> str:
    """A full tensor or module name as transformers' layer calls it."""
    inner = name.removeprefix(f"{block.name}.")
    for stored, called in block.renames:
        if inner.startswith(f"{stored}."):
            inner = called + inner.removeprefix(stored)
    return inner


@contextmanager
def observe_inputs(layer: nn.Module, modules: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """A dict that holds, after every forward of `layer`, the first input of each module (key -> module path)."""
    seen: dict[str, Tensor] = {}

    def remember(key: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[key] = args[0].detach()

        return hook

    handles = [
        layer.get_submodule(path).register_forward_pre_hook(remember(key))
        for key, path in modules.items()
    ]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def run_layer(
    skeleton: MetaModel, layer: nn.Module, rows: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run a layer over sequences that lie one behind the other.

    rows [tokens, hidden] -> (output [tokens, hidden], valid [sequences * longest] bool: which padded position is a
    token). Sequences are padded on the right: under causal attention no token sees the padding.
    """
    valid = make_padding_mask(lengths, skeleton.device)  # [sequences, longest]
    hidden = torch.zeros(*valid.shape, rows.shape[-1], dtype=skeleton.dtype, device=skeleton.device)
    hidden[valid] = rows.to(
        device=skeleton.device, dtype=skeleton.dtype
    )  # [tokens, h] -> [sequences, longest, h]
    positions = torch.arange(valid.shape[1], device=skeleton.device)[None]  # [1, longest]
    make_mask = (
        create_sliding_window_causal_mask
        if has_sliding_window(skeleton, layer)
        else create_causal_mask
    )
    mask = make_mask(
        config=skeleton.config,
        inputs_embeds=hidden,
        attention_mask=None,
        past_key_values=None,
        position_ids=positions,
    )
    with torch.no_grad():
        out = layer(
            hidden,
            attention_mask=mask,
            position_ids=positions,
            position_embeddings=skeleton.rotary(hidden, positions),
            past_key_values=None,
            use_cache=False,
        )
    return out[valid], valid.reshape(-1)  # [sequences, longest, h] -> [tokens, h]


def check_attention_patterns(hf_config: Any, where: str) -> None:
    """CheckpointError for a layer that attends in another pattern than `run` has a mask for."""
    patterns = (
        hf_config.layer_types if "layer_types" in type(hf_config).__dataclass_fields__ else None
    )
    for number, pattern in enumerate(patterns or ()):
        if pattern not in {"full_attention", "sliding_attention"}:
            raise CheckpointError(
                f"{where}: layer_types[{number}]: expected full_attention or sliding_attention, found {pattern!r}; "
                "no other attention pattern can be run block by block"
            )


def has_sliding_window(skeleton: MetaModel, layer: nn.Module) -> bool:
    """Whether the layer sees only the last `sliding_window` tokens.

    A family whose config class has no field for layer types or for a window ignores both, whatever config.json says.
    """
    config, known = skeleton.config, type(skeleton.config).__dataclass_fields__
    if "layer_types" in known:
        attention: Any = layer.get_submodule("self_attn")
        return bool(config.layer_types[attention.layer_idx] == "sliding_attention")
    return "sliding_window" in known and config.sliding_window is not None


def make_padding_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """[sequences, longest] bool, true where a token stands."""
    count = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device)[None] < count[:, None]


def make_final_norm(
    skeleton: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """The norm behind the last block, with its tensors by full name."""
    module = layout.final_norm.name.rpartition(".")[0]
    norm: nn.Module = copy.deepcopy(skeleton.model.get_submodule(module))
    state = {
        spec.name.removeprefix(f"{module}."): tensors[spec.name] for spec in layout.final_tensors
    }
    cast = {
        name: tensor.to(device=skeleton.device, dtype=skeleton.dtype)
        for name, tensor in state.items()
    }
    load_tensors(norm, cast, "final norm")
    return norm


def select_expert_tokens(index: Tensor, weight: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Rows routed to `expert`, and their router weights: [n], [n]; index, weight: [tokens, k]."""
    hit = index == expert  # [tokens, k]
    token = hit.any(-1).nonzero(as_tuple=True)[0]  # [n]
    return token, (weight * hit).sum(-1)[token]
