"""The layout of a dense model without a table, from transformers' modules on the meta device.

The only assumptions: an embedding, a list of blocks whose matrices are all `nn.Linear`, a norm, a
head. Any other module with a tensor is a reason to reject the model. Names do not tell which
linears share an input: `layout_checks` runs the blocks for that, so groups are empty here.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping

from quantkit import registry
from quantkit.contracts import Block, Config, Layout, Linear, Role, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.formats.common.engine_names import FUSED_MODULES, LM_HEAD
from quantkit.models.layers import MetaModel

MAX_REASON_CHARS = 300
"""Longest reason in a message: transformers' errors can be long."""


def make_refusal(config: Config, reason: str) -> CheckpointError:
    """Return the error for a model without a table from which none can be derived."""
    model_type, short = config.text("model_type"), " ".join(reason.split())[:MAX_REASON_CHARS]
    known = ", ".join(registry.list_names("architectures"))
    return CheckpointError(
        f"{config.where}: model_type {model_type!r} has no table in quantkit, and none can be "
        f"derived: {short}; use a model of a family that has one ({known}), or "
        f"add quantkit/architectures/{model_type}.py"
    )


def inspect_layout(config: Config, meta_model: MetaModel) -> Layout:
    """Return the layout of transformers' model of `config`, with empty groups.

    Every tensor is claimed once. Raises CheckpointError with the first module or tensor that has no
    place in it.
    """
    model = meta_model.model
    name_of = {module: name for name, module in model.named_modules()}
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if type(embedding) is not nn.Embedding or type(head) is not nn.Linear:
        found = f"{type(embedding).__name__} and {type(head).__name__}"
        raise make_refusal(config, f"expected an embedding and a linear head, found {found}")
    stack = find_block_list(config, meta_model)
    blocks = tuple(
        inspect_block(config, f"{name_of[stack]}.{number}", layer)
        for number, layer in enumerate(stack)
    )
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    block_prefixes = tuple(f"{layer.name}." for layer in blocks)
    ends = {f"{name_of[embedding]}.weight", f"{name_of[head]}.weight"}
    rest = {
        name: shape
        for name, shape in shapes.items()
        if name not in ends and not name.startswith(block_prefixes)
    }
    weight, bias = find_final_norm(config, rest)
    if renamed := get_model_conversion_mapping(model, add_legacy=False):
        patterns = ", ".join(
            str(pattern) for rename in renamed for pattern in rename.source_patterns
        )
        raise make_refusal(
            config,
            f"transformers loads its tensors under other names than the checkpoint's ({patterns})",
        )
    vocabulary, hidden = embedding.weight.shape
    return Layout(
        embedding=Linear(
            name=name_of[embedding], out_features=vocabulary, in_features=hidden, role="embedding"
        ),
        blocks=blocks,
        final_norm=weight,
        final_norm_bias=bias,
        head=None if is_head_tied(config, meta_model) else make_linear(name_of[head], head, "head"),
    )


def find_block_list(config: Config, meta_model: MetaModel) -> nn.ModuleList:
    """Return the only list of repeated blocks; raises CheckpointError."""
    count = getattr(meta_model.config, "num_hidden_layers", None)
    lists = [
        child
        for child in meta_model.model.base_model.children()
        if isinstance(child, nn.ModuleList)
    ]
    if len(lists) != 1 or len(lists[0]) != count:
        found = ", ".join(str(len(modules)) for modules in lists) or "none"
        raise make_refusal(config, f"expected one list of {count} blocks, found lists of {found}")
    return lists[0]


def is_head_tied(config: Config, meta_model: MetaModel) -> bool:
    """Return whether the head is tied to the embedding.

    Raises CheckpointError for other tied tensors.
    """
    keys = getattr(meta_model.model, "_tied_weights_keys", None) or {}
    pairs = set(keys) if isinstance(keys, Mapping) else set(keys)
    is_tied = bool(getattr(meta_model.config, "tie_word_embeddings", False))
    if is_tied and len(pairs) != 1:
        raise make_refusal(
            config, f"expected only the head to be tied to the embedding, found {sorted(pairs)}"
        )
    if is_tied and pairs != {f"{LM_HEAD}.weight"}:
        raise make_refusal(config, f"expected a tied head called {LM_HEAD}, found {sorted(pairs)}")
    return is_tied


def find_final_norm(
    config: Config, rest: Mapping[str, tuple[int, ...]]
) -> tuple[TensorSpec, TensorSpec | None]:
    """Return weight and bias of the norm after the blocks.

    Raises CheckpointError if other tensors are outside the blocks.
    """
    weights = [name for name, shape in rest.items() if name.endswith(".weight") and len(shape) == 1]
    if len(weights) != 1:
        raise make_refusal(
            config, f"expected one norm after the blocks, found {', '.join(rest) or 'nothing'}"
        )
    [name] = weights
    bias = f"{name.removesuffix('.weight')}.bias"
    if other := [tensor for tensor in rest if tensor not in {name, bias}]:
        raise make_refusal(
            config,
            f"{other[0]} {list(rest[other[0]])} is outside the embedding, blocks, norm and head",
        )
    spec = TensorSpec(name=name, dtype="BF16", shape=rest[name])
    return spec, TensorSpec(name=bias, dtype="BF16", shape=rest[bias]) if bias in rest else None


def make_linear(name: str, linear: nn.Linear, role: Role) -> Linear:
    """Return the contract's Linear of a module."""
    return Linear(
        name=name,
        out_features=linear.out_features,
        in_features=linear.in_features,
        role=role,
        bias=linear.bias is not None,
    )


def inspect_block(config: Config, name: str, layer: nn.Module) -> Block:
    """Return the layout of a block; raises CheckpointError for matrices other than linears."""
    linears = {
        f"{name}.{path}": make_linear(
            f"{name}.{path}",
            module,
            "attention" if "attn" in path or "attention" in path else "mlp",
        )
        for path, module in layer.named_modules()
        if type(module) is nn.Linear
    }
    claimed = {f"{linear}.{kind}" for linear in linears for kind in ("weight", "bias")}
    others = []
    for path, tensor in layer.state_dict().items():
        full = f"{name}.{path}"
        if full in claimed:
            continue
        if tensor.dim() != 1 or not tensor.is_floating_point():
            raise make_refusal(
                config,
                f"{full} {list(tensor.shape)} is neither a norm's vector nor the weight of an "
                "nn.Linear; experts, convolutions and state spaces need a table",
            )
        others.append(TensorSpec(name=full, dtype="BF16", shape=tuple(tensor.shape)))
    if not linears:
        raise make_refusal(config, f"{name} has no nn.Linear")
    return Block(
        name=name,
        kind="decoder",
        linears=tuple(linears.values()),
        others=tuple(others),
        groups=(),
        fused=tuple(find_fused_sets(linears)),
    )


def find_fused_sets(linears: Mapping[str, Linear]) -> list[tuple[str, ...]]:
    """Return the sets that engines fuse at load; they have these names in every family."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in linears)
    sets = {
        tuple(f"{parent}.{last}" for last in members): None
        for parent in parents
        for members in FUSED_MODULES.values()
    }
    return [members for members in sets if all(member in linears for member in members)]
