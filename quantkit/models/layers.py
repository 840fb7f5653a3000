"""Decoder layers that run without their model: transformers' modules, the checkpoint's tensors.

quantkit never holds a model. `MetaModel` lives on the meta device; one layer at a time receives its
tensors. In place of routed experts, `ExpertTap` records the router's output and returns zeros, so
that a layer runs in the memory of its dense part and the experts can follow in waves. Their output
is added to the layer's, because every supported family adds it to the residual (the contract tests
compare the sum with transformers' own forward).
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
    """A model without weights, and what its layers need to run; see `make_meta_model`."""

    config: Any  # transformers PretrainedConfig
    model: Any  # transformers' causal language model on the meta device
    rotary: nn.Module
    device: torch.device
    dtype: torch.dtype


@dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """A router's selection: inputs [tokens, hidden], experts [tokens, k], weights [tokens, k]."""

    hidden: Tensor
    index: Tensor
    weight: Tensor


class ExpertTap(nn.Module):
    """Placeholder of routed experts: keeps the last router output and returns zeros."""

    def __init__(self) -> None:
        super().__init__()
        self.last: RouterOutput | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return zeros [tokens, hidden]."""
        self.last = RouterOutput(hidden=hidden_states, index=top_k_index, weight=top_k_weights)
        return torch.zeros_like(hidden_states)


class MatmulLinear(nn.Module):
    """A linear layer on `numerics.matmul`: in float32 on a CPU up to twice as fast as torch."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight, self.bias = linear.weight, linear.bias

    def forward(self, x: Tensor) -> Tensor:
        """Return x W^T + b: [..., in] -> [..., out]."""
        return matmul.linear(x, self.weight, self.bias)


def make_meta_model(config: Config, device: torch.device, dtype: torch.dtype) -> MetaModel:
    """Make the model of `config` on the meta device, to compute in `dtype` on `device`.

    No code of the checkpoint runs. Raises CheckpointError if transformers does not accept the
    config.
    """
    model_type = config.text("model_type")
    if model_type not in CONFIG_MAPPING:
        raise CheckpointError(
            f"{config.where}: model_type {model_type!r} is not part of this transformers release; "
            "upgrade transformers"
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
    """Return the class of rotary position embeddings; raises CheckpointError if there is none."""
    rotary = getattr(model.base_model, "rotary_emb", None)
    if not isinstance(rotary, nn.Module):
        raise CheckpointError(
            f"expected layers that are given rotary position embeddings, found "
            f"{type(model).__name__} without; only such layers can be run one by one"
        )
    return type(rotary)


def make_decoder_layer(
    meta_model: MetaModel, block: Block, tensors: Mapping[str, Tensor]
) -> tuple[nn.Module, ExpertTap | None]:
    """Make one decoder layer from `tensors`, with a tap in place of its experts.

    tensors: full names, without routed experts. Floating tensors are cast to the model's dtype,
    except buffers, which the family keeps in float32.
    """
    layer: nn.Module = copy.deepcopy(meta_model.model.get_submodule(block.name))
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
            device=meta_model.device,
            dtype=torch.float32 if get_layer_name(block, name) in buffers else meta_model.dtype,
        )
        for name, tensor in tensors.items()
    }
    load_tensors(layer, state, block.name)
    return layer, tap


def load_tensors(module: nn.Module, state: Mapping[str, Tensor], where: str) -> None:
    """Assign a whole state dict; raises CheckpointError with missing and unexpected names."""
    result = module.load_state_dict(state, strict=False, assign=True)
    if result.missing_keys or result.unexpected_keys:
        raise CheckpointError(
            f"{where}: transformers' layer expects other tensors than the architecture table: "
            f"missing {result.missing_keys}, unexpected {result.unexpected_keys}"
        )
    module.requires_grad_(False)


def get_layer_name(block: Block, name: str) -> str:
    """Return the name that transformers' layer uses for a full tensor or module name."""
    local = name.removeprefix(f"{block.name}.")
    for stored, renamed in block.renames:
        if local.startswith(f"{stored}."):
            local = renamed + local.removeprefix(stored)
    return local


@contextmanager
def observe_inputs(layer: nn.Module, modules: Mapping[str, str]) -> Iterator[dict[str, Tensor]]:
    """Yield a dict with the first input of each module after every forward of `layer`.

    modules: key of the dict -> module path.
    """
    inputs: dict[str, Tensor] = {}

    def make_hook(key: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[key] = args[0].detach()

        return hook

    handles = [
        layer.get_submodule(path).register_forward_pre_hook(make_hook(key))
        for key, path in modules.items()
    ]
    try:
        yield inputs
    finally:
        for handle in handles:
            handle.remove()


def run_layer(
    meta_model: MetaModel, layer: nn.Module, rows: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run a layer over concatenated sequences.

    rows [tokens, hidden] -> (output [tokens, hidden], valid [sequences * longest] bool: the padded
    positions that are tokens). Sequences are padded on the right: under causal attention no token
    sees the padding.
    """
    valid = make_padding_mask(lengths, meta_model.device)  # [sequences, longest]
    hidden = torch.zeros(
        *valid.shape, rows.shape[-1], dtype=meta_model.dtype, device=meta_model.device
    )
    # [tokens, h] -> [sequences, longest, h]
    hidden[valid] = rows.to(device=meta_model.device, dtype=meta_model.dtype)
    positions = torch.arange(valid.shape[1], device=meta_model.device)[None]  # [1, longest]
    make_mask = (
        create_sliding_window_causal_mask
        if has_sliding_window(meta_model, layer)
        else create_causal_mask
    )
    mask = make_mask(
        config=meta_model.config,
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
            position_embeddings=meta_model.rotary(hidden, positions),
            past_key_values=None,
            use_cache=False,
        )
    return out[valid], valid.reshape(-1)  # [sequences, longest, h] -> [tokens, h]


def check_attention_patterns(hf_config: Any, where: str) -> None:
    """Check that `run_layer` has a mask for every layer; raises CheckpointError."""
    patterns = (
        hf_config.layer_types if "layer_types" in type(hf_config).__dataclass_fields__ else None
    )
    for number, pattern in enumerate(patterns or ()):
        if pattern not in {"full_attention", "sliding_attention"}:
            raise CheckpointError(
                f"{where}: layer_types[{number}]: expected full_attention or sliding_attention, "
                f"found {pattern!r}; no other attention pattern can be run block by block"
            )


def has_sliding_window(meta_model: MetaModel, layer: nn.Module) -> bool:
    """Return whether the layer sees only the last `sliding_window` tokens.

    A family whose config class has no field for layer types or for a window ignores both, whatever
    config.json holds.
    """
    config, fields = meta_model.config, type(meta_model.config).__dataclass_fields__
    if "layer_types" in fields:
        attention: Any = layer.get_submodule("self_attn")
        return bool(config.layer_types[attention.layer_idx] == "sliding_attention")
    return "sliding_window" in fields and config.sliding_window is not None


def make_padding_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return [sequences, longest] bool, true for tokens, false for padding."""
    count = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device)[None] < count[:, None]


def make_final_norm(
    meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Make the norm after the last block from its tensors by full name."""
    module = layout.final_norm.name.rpartition(".")[0]
    norm: nn.Module = copy.deepcopy(meta_model.model.get_submodule(module))
    state = {
        spec.name.removeprefix(f"{module}."): tensors[spec.name] for spec in layout.final_tensors
    }
    cast = {
        name: tensor.to(device=meta_model.device, dtype=meta_model.dtype)
        for name, tensor in state.items()
    }
    load_tensors(norm, cast, "final norm")
    return norm


def select_expert_tokens(index: Tensor, weight: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Return the tokens routed to `expert` and their router weights: [n], [n].

    index, weight: [tokens, k].
    """
    is_routed = index == expert  # [tokens, k]
    token = is_routed.any(-1).nonzero(as_tuple=True)[0]  # [n]
    return token, (weight * is_routed).sum(-1)[token]
