"""Decoder layers that run without their model: transformers' modules, the checkpoint's tensors.

quantkit never holds a model. `MetaModel` lives on the meta device; one layer at a time receives its
tensors, and runs with the arguments that transformers' own forward makes (`outer_model`). In place
of routed experts, `ExpertTap` records the router's output and returns zeros, so that a layer runs
in the memory of its dense part and the experts can follow in waves. Their output is added to the
layer's where the layer adds it to the residual; a layer that does more with it (a norm, a factor)
runs once more with the sum as the tap's answer (contract tests and layout checks compare both with
transformers' own forward).
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.checkpoint.hf_config import (
    find_text_key,
    get_auto_class,
    get_text_config,
    hide_warnings,
    make_hf_config,
)
from quantkit.contracts import Block, Config, Experts
from quantkit.errors import CheckpointError
from quantkit.io.files import make_config_error
from quantkit.models.modules import MatmulLinear, fill_computed_buffers
from quantkit.models.outer_model import OuterModel, make_outer_model
from quantkit.models.text_part import leave_out_parts


@dataclass(frozen=True, kw_only=True)
class MetaModel:
    """A model without weights, and what its layers need to run; see `make_meta_model`."""

    config: Any  # transformers PretrainedConfig of the text model
    model: Any  # transformers' causal language model on the meta device
    full_config: Any  # of the wrapper, if the text model lies in one
    outer: OuterModel  # the model around the layers, in `dtype` on `device`
    device: torch.device
    dtype: torch.dtype
    left_out: Mapping[str, nn.Module] = field(default_factory=dict)  # a wrapper's parts, by name
    tables: Mapping[str, Tensor] = field(default_factory=dict)  # weights that arguments depend on


@dataclass(frozen=True, kw_only=True)
class RouterOutput:
    """A router's selection: inputs [tokens, hidden], experts [tokens, k], weights [tokens, k]."""

    hidden: Tensor
    index: Tensor
    weight: Tensor


class ExpertTap(nn.Module):
    """Placeholder of routed experts: keeps the last router output and returns zeros, or `answer`.

    `inside`: the layer does more with the answer than to add it to its output.
    """

    def __init__(self, inside: bool = False) -> None:
        super().__init__()
        self.last: RouterOutput | None = None
        self.answer: Tensor | None = None
        self.inside = inside

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """Return zeros [tokens, hidden]."""
        rows = hidden_states.reshape(-1, hidden_states.shape[-1])
        self.last = RouterOutput(hidden=rows, index=top_k_index, weight=top_k_weights)
        if self.answer is None:
            return torch.zeros_like(hidden_states)
        return self.answer.to(hidden_states).reshape(hidden_states.shape)


class ScaledInputTap(ExpertTap):
    """Placeholder of experts that are all given every token [experts * tokens, hidden], multiplied
    by the router's weight, which is 0 but for one expert.
    """

    def __init__(self, count: int, inside: bool = False) -> None:
        super().__init__(inside)
        self.count = count

    def forward(self, hidden_states: Tensor) -> Tensor:  # type: ignore[override]  # of their own
        """Return zeros [experts * tokens, hidden]."""
        self.last = split_scaled_inputs(hidden_states, self.count)
        result = torch.zeros_like(hidden_states)
        if self.answer is not None:
            first = result[: len(self.last.hidden)]
            first.copy_(self.answer.to(first).reshape(first.shape))
        return result


def split_scaled_inputs(hidden: Tensor, count: int) -> RouterOutput:
    """Return the one input of each token, from [experts * tokens, hidden], and its expert."""
    each = hidden.reshape(count, -1, hidden.shape[-1])  # [experts, tokens, hidden]
    index = each.abs().sum(-1).argmax(0)[:, None]  # [tokens, 1]
    return RouterOutput(
        hidden=each.sum(0), index=index, weight=torch.ones_like(index, dtype=hidden.dtype)
    )


@dataclass(frozen=True, kw_only=True)
class DecoderLayer:
    """One layer with its weights: `name` in the model, and the tap in place of its experts."""

    name: str
    module: nn.Module
    tap: ExpertTap | None


def make_meta_model(config: Config, device: torch.device, dtype: torch.dtype) -> MetaModel:
    """Make the model of `config` on the meta device, to compute in `dtype` on `device`.

    No code of the checkpoint runs. Raises CheckpointError if transformers does not accept the
    config.
    """
    hf_config = make_hf_config(config)
    try:
        with hide_warnings():
            with torch.device("meta"):
                model = get_auto_class(hf_config).from_config(hf_config, dtype=dtype)
            left_out = leave_out_parts(model) if find_text_key(model.config) else {}
            fill_computed_buffers(model, device)
            outer = make_outer_model(model.eval(), device, dtype)
    except CheckpointError as fault:
        raise CheckpointError(f"{config.where}: {fault}") from fault
    except Exception as fault:
        raise make_config_error(config.where, config.text("model_type"), fault) from fault
    return MetaModel(
        config=get_text_config(hf_config),
        full_config=hf_config,
        model=model,
        outer=outer,
        device=device,
        dtype=dtype,
        left_out=left_out,
    )


def cast_meta_model(meta_model: MetaModel, dtype: torch.dtype) -> MetaModel:
    """Return the model to compute in another dtype."""
    if dtype == meta_model.dtype:
        return meta_model
    config, device = meta_model.full_config, meta_model.device
    with hide_warnings(), torch.device("meta"):  # buffers in the dtypes that transformers chooses
        model = get_auto_class(config).from_config(copy.deepcopy(config), dtype=dtype)
    if meta_model.left_out:
        leave_out_parts(model)
    fill_computed_buffers(model, device)
    outer = make_outer_model(model.eval(), device, dtype, meta_model.tables)
    return replace(meta_model, model=model, outer=outer, dtype=dtype)


def load_tables(meta_model: MetaModel, tables: Mapping[str, Tensor]) -> MetaModel:
    """Return the model with weights outside its layers on which the arguments of layers depend,
    such as a learned factor of a rotary table; by their names in transformers.
    """
    if not tables:
        return meta_model
    outer = load_outer_model(meta_model, tables)
    return replace(meta_model, outer=outer, tables=tables)


def load_outer_model(meta_model: MetaModel, tensors: Mapping[str, Tensor]) -> OuterModel:
    """Return the model without its layers, with these tensors, to embed tokens or to compute
    logits.
    """
    return make_outer_model(meta_model.model, meta_model.device, meta_model.dtype, tensors)


def make_decoder_layer(
    meta_model: MetaModel, block: Block, tensors: Mapping[str, Tensor]
) -> DecoderLayer:
    """Make one decoder layer from `tensors`, with a tap in place of its experts.

    tensors: full names, without routed experts. Floating tensors are cast to the model's dtype,
    except `list_float32_buffers`.
    """
    layer = copy_module(meta_model.model.get_submodule(block.path))
    tap = None
    if block.experts:
        parent, _, leaf = get_layer_name(block, block.experts.module).rpartition(".")
        tap = make_tap(block.experts)
        setattr(layer.get_submodule(parent), leaf, tap)
    for name, module in list(layer.named_modules()):
        if type(module) is nn.Linear:
            layer.set_submodule(name, MatmulLinear(module.weight, module.bias))
    named = join_parts(block, tensors.items())
    exact = list_float32_buffers(meta_model.model, [block], layer, block.path)
    state = cast_tensors(layer, named, meta_model, exact)
    load_tensors(layer, state, block.name)
    return DecoderLayer(name=block.path, module=layer, tap=tap)


def copy_module(module: nn.Module) -> nn.Module:
    """Return a copy that shares the configurations, which layers only read: copying them takes
    longer than copying the layer.
    """
    configs = [x.config for x in module.modules() if "config" in x.__dict__]
    return copy.deepcopy(module, {id(config): config for config in configs})


def list_float32_buffers(
    model: Any, blocks: Sequence[Block], module: nn.Module, path: str = ""
) -> frozenset[str]:
    """Return the buffers of a module at `path` in the model that stay in float32, by local name:
    those of modules with experts, such as the score bias of a router, and those that transformers
    keeps in float32. Others, such as decays of a linear attention, have the dtype of the states.
    """
    kept = {
        *(getattr(model, "_keep_in_fp32_modules", None) or ()),
        *(getattr(model, "_keep_in_fp32_modules_strict", None) or ()),
    }
    routed = tuple(
        f"{block.path}.{get_layer_name(block, block.experts.module)}".rpartition(".")[0] + "."
        for block in blocks
        if block.experts
    )
    places = {name: f"{path}.{name}" if path else name for name, _ in module.named_buffers()}
    return frozenset(
        name
        for name, place in places.items()
        if place.startswith(routed) or any(f".{x}." in f".{place}." for x in kept)
    )


def cast_tensors(
    module: nn.Module,
    tensors: Iterable[tuple[str, Tensor]],
    meta_model: MetaModel,
    exact: Collection[str],
) -> dict[str, Tensor]:
    """Return the tensors of a module by its names, on the device and in the dtype of the meta
    model; those of `exact` in float32, integers in the module's dtype.
    """
    own: dict[str, Tensor] = module.state_dict()

    def get_dtype(name: str) -> torch.dtype:
        if name in own and not own[name].is_floating_point():
            known: torch.dtype = own[name].dtype
            return known
        return torch.float32 if name in exact else meta_model.dtype

    return {
        name: tensor.to(device=meta_model.device, dtype=get_dtype(name)) for name, tensor in tensors
    }


def make_tap(experts: Experts) -> ExpertTap:
    """Return the placeholder of a block's experts."""
    if experts.scaled_inputs:
        return ScaledInputTap(experts.count, experts.inside)
    return ExpertTap(experts.inside)


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
        if local == stored or local.startswith(f"{stored}."):
            return renamed + local.removeprefix(stored)
    return local


def join_parts(block: Block, tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Yield tensors by their names in transformers' layer; those stored in parts are joined.

    tensors: by full name.
    """
    owner = {part: (name, parts) for name, parts in block.joined for part in parts}
    waiting: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors:
        if full not in owner:
            yield get_layer_name(block, full), tensor
            continue
        name, parts = owner[full]
        present = waiting.setdefault(name, {})
        present[full] = tensor
        if len(present) == len(parts):
            del waiting[name]
            yield name, torch.cat([present[part] for part in parts])  # along the rows


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
    meta_model: MetaModel, layer: DecoderLayer, rows: Tensor, lengths: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Run a layer over concatenated sequences, with the arguments of transformers' own forward.

    rows of states (`outer.form`) [tokens, width] -> (rows after it [tokens, width], valid
    [sequences * longest] bool: the padded positions that are tokens). Sequences are padded on the
    right: under causal attention no token sees the padding.
    """
    valid = make_padding_mask(lengths, meta_model.device)  # [sequences, longest]
    form = meta_model.outer.form
    padded = torch.zeros(*valid.shape, form.width, dtype=form.dtype, device=meta_model.device)
    padded[valid] = rows.to(padded)  # [tokens, width] -> [sequences, longest, width]
    call = meta_model.outer.record(*valid.shape)[layer.name]
    with torch.no_grad():
        out = call.run(layer.module, form, padded)
    return out[valid], valid.reshape(-1)  # [sequences, longest, width] -> [tokens, width]


def run_layer_with_sum(
    meta_model: MetaModel,
    layer: DecoderLayer,
    rows: Tensor,
    lengths: Sequence[int],
    total: Tensor,
) -> Tensor:
    """Return rows after a layer whose experts return `total`: [tokens, width], [tokens, hidden]."""
    assert layer.tap is not None  # the caller has experts
    valid = make_padding_mask(lengths, meta_model.device)  # [sequences, longest]
    answer = torch.zeros(*valid.shape, total.shape[-1], device=meta_model.device)
    answer[valid] = total.to(answer)  # [tokens, h] -> [sequences, longest, h]
    layer.tap.answer = answer
    try:
        return run_layer(meta_model, layer, rows, lengths)[0]
    finally:
        layer.tap.answer = None


def embed_tokens(outer: OuterModel, ids: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return rows at the first layer of concatenated sequences: [tokens] -> [tokens, width]."""
    valid = make_padding_mask(lengths, ids.device)  # [sequences, longest]
    padded = torch.zeros(valid.shape, dtype=torch.long, device=ids.device)
    padded[valid] = ids.long()
    rows = outer.embed(padded)  # [sequences, longest, width]
    return rows[valid.to(rows.device)]  # [tokens, width]


def make_random_rows(outer: OuterModel, lengths: Sequence[int], seed: int) -> Tensor:
    """Return rows [tokens, width] of random states at the layers, for checks; ids are below 64."""
    generator = torch.Generator().manual_seed(seed)
    count, form = sum(lengths), outer.form
    hidden = torch.randn((count, form.hidden.width), generator=generator)
    if not form.has_ids:
        return hidden
    ids = torch.randint(0, 64, (count, 1), generator=generator)
    return torch.cat([hidden, ids.float()], -1)


def make_padding_mask(lengths: Sequence[int], device: torch.device) -> Tensor:
    """Return [sequences, longest] bool, true for tokens, false for padding."""
    count = torch.tensor(lengths, device=device)
    return torch.arange(max(lengths), device=device)[None] < count[:, None]


def select_expert_tokens(index: Tensor, weight: Tensor, expert: int) -> tuple[Tensor, Tensor]:
    """Return the tokens routed to `expert` and their router weights: [n], [n].

    index, weight: [tokens, k].
    """
    is_routed = index == expert  # [tokens, k]
    token = is_routed.any(-1).nonzero(as_tuple=True)[0]  # [n]
    return token, (weight * is_routed).sum(-1)[token]
