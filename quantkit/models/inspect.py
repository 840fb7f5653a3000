"""The layout of a dense model without a table, from transformers' modules on the meta device.

The only assumptions: an embedding, a list of blocks, a linear head. In the blocks each `nn.Linear`
can be quantized; vectors, convolutions and small matrices are kept, and so is everything outside
the blocks. Experts in one tensor are a reason to reject the model. Names do not tell which
linears share an input: `layout_checks` runs the blocks for that, so groups are empty here.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import replace
from functools import cache
from math import prod

import torch
from torch import Tensor, nn
from transformers.core_model_loading import revert_weight_conversion

from quantkit import registry
from quantkit.contracts import Block, Config, Layout, Linear, Role, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.formats.common.engine_names import FUSED_MODULES, LM_HEAD
from quantkit.models.layers import MetaModel
from quantkit.models.outer_model import find_layers, get_module_name
from quantkit.models.text_part import find_relocation, find_text_root, relocate

MAX_REASON_CHARS = 300
"""Longest reason in a message: transformers' errors can be long."""

MAX_KEPT_SHARE = 0.1
"""Largest part of a block's weights in convolutions, decay rates, gates: in all but linears."""


def make_refusal(config: Config, reason: str) -> CheckpointError:
    """Return the error for a model without a table from which none can be derived."""
    model_type, short = config.text("model_type"), " ".join(reason.split())[:MAX_REASON_CHARS]
    known = ", ".join(registry.list_names("architectures"))
    return CheckpointError(
        f"{config.where}: model_type {model_type!r} has no table in quantkit, and none can be "
        f"derived: {short}; use a model of a family that has one ({known}), or "
        f"add quantkit/architectures/{model_type}.py"
    )


def inspect_layout(config: Config, meta_model: MetaModel, disk: Mapping[str, str] = {}) -> Layout:
    """Return the layout of transformers' model of `config`, with empty groups.

    Every tensor is claimed once, under its name in the checkpoint. Raises CheckpointError with the
    first module or tensor that has no place in it.

    disk: the name in the checkpoint of tensors by their name in transformers, where it is known.
    """
    model = meta_model.model
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        found = f"{type(embedding).__name__} and {type(head).__name__}"
        raise make_refusal(config, f"expected an embedding and a linear head, found {found}")
    name, stack = find_layers(model)
    stored = find_stored_names(config, meta_model, disk)
    blocks = tuple(
        inspect_block(config, f"{name}.{number}", layer, stored)
        for number, layer in enumerate(stack)
    )
    ends = {x: f"{get_module_name(model, x)}.weight" for x in (embedding, head)}
    rest = {
        tensor: spec
        for tensor, spec in model.state_dict().items()
        if tensor not in ends.values() and not tensor.startswith(f"{name}.")
    }
    vocabulary, hidden = embedding.weight.shape
    head_name = stored[ends[head]].removesuffix(".weight")
    return Layout(
        embedding=Linear(
            name=stored[ends[embedding]].removesuffix(".weight"),
            out_features=vocabulary,
            in_features=hidden,
            role="embedding",
        ),
        blocks=blocks,
        final_tensors=tuple(
            TensorSpec(name=stored[tensor], dtype="BF16", shape=tuple(spec.shape))
            for tensor, spec in rest.items()
        ),
        # its bias, if any, is a final tensor: a tied head may have one too
        head=None
        if is_head_tied(config, meta_model)
        else replace(make_linear(head_name, head, "head"), bias=False),
        renames=tuple((stored[x], x) for x in (ends[embedding], *rest) if stored[x] != x),
    )


def find_stored_names(
    config: Config, meta_model: MetaModel, disk: Mapping[str, str] = {}
) -> dict[str, str]:
    """Return the name in a checkpoint of each tensor, by its name in transformers' model.

    It is that of `disk`; for other tensors of the text model that with which transformers saves it,
    with the prefix of the tensors in `disk`. Raises CheckpointError if transformers stores a tensor
    in another form, such as in parts.
    """
    tensors = meta_model.model.state_dict()
    written = revert_weight_conversion(meta_model.model, dict(tensors))
    stored = {id(tensor): name for name, tensor in written.items()}
    for name, tensor in tensors.items():
        if id(tensor) not in stored:
            raise make_refusal(
                config,
                f"transformers makes {name} from other tensors of the checkpoint; experts and "
                "convolutions in parts need a table",
            )
    saved = {name: stored[id(tensor)] for name, tensor in tensors.items()}
    layers, _ = find_layers(meta_model.model)
    root = f"{find_text_root(meta_model.model)}."
    known = next((x for x in saved if x.startswith(f"{layers}.") and x in disk), None)
    prefixes = find_relocation(saved[known], disk[known]) if known else ("", "")
    moved = {x: relocate(y, prefixes) if x.startswith(root) else y for x, y in saved.items()}
    return {name: disk.get(name, other) for name, other in moved.items()}


def is_head_tied(config: Config, meta_model: MetaModel) -> bool:
    """Return whether the head is tied to the embedding.

    Raises CheckpointError for other tied tensors.
    """
    keys = getattr(meta_model.model, "_tied_weights_keys", None) or {}
    pairs = set(keys) if isinstance(keys, Mapping) else set(keys)
    is_tied = bool(getattr(meta_model.model.config, "tie_word_embeddings", False))
    if is_tied and len(pairs) != 1:
        raise make_refusal(
            config, f"expected only the head to be tied to the embedding, found {sorted(pairs)}"
        )
    if is_tied and pairs != {f"{LM_HEAD}.weight"}:
        raise make_refusal(config, f"expected a tied head called {LM_HEAD}, found {sorted(pairs)}")
    return is_tied


def make_linear(name: str, linear: nn.Linear, role: Role) -> Linear:
    """Return the contract's Linear of a module."""
    return Linear(
        name=name,
        out_features=linear.out_features,
        in_features=linear.in_features,
        role=role,
        bias=linear.bias is not None,
    )


def name_block(path: str, layer: nn.Module, stored: Mapping[str, str]) -> str:
    """Return the name in the checkpoint of a block, whose name in transformers is `path`."""
    for tensor in layer.state_dict():
        full = stored[f"{path}.{tensor}"]
        if full.endswith(f".{tensor}"):
            return full.removesuffix(f".{tensor}")
    return path


def inspect_block(config: Config, path: str, layer: nn.Module, stored: Mapping[str, str]) -> Block:
    """Return the layout of a block; raises CheckpointError for matrices other than linears.

    path: the block's name in transformers; stored: names in the checkpoint by those.
    """
    name = name_block(path, layer, stored)
    modules = {
        local: module
        for local, module in layer.named_modules()
        if isinstance(module, nn.Linear) and is_linear_class(type(module))  # type: ignore[arg-type]  # a class is hashable
    }
    if not modules:
        kinds = {type(x).__name__ for x in layer.modules() if has_matrix(x)}
        raise make_refusal(
            config, f"{name} has no nn.Linear; its matrices are in {', '.join(sorted(kinds))}"
        )
    names = {x: stored[f"{path}.{x}.weight"].removesuffix(".weight") for x in modules}
    linears = {full: make_linear(full, modules[x], get_role(x)) for x, full in names.items()}
    claimed = {f"{x}.{kind}" for x in modules for kind in ("weight", "bias")}
    state = layer.state_dict()
    kept = {x: tensor for x, tensor in state.items() if x not in claimed}
    check_kept_tensors(config, name, kept, sum(tensor.numel() for tensor in state.values()))
    others = [
        TensorSpec(name=stored[f"{path}.{x}"], dtype="BF16", shape=tuple(tensor.shape))
        for x, tensor in kept.items()
    ]
    if outside := [
        x for x in (*linears, *(y.name for y in others)) if not x.startswith(f"{name}.")
    ]:
        raise make_refusal(config, f"{outside[0]} is stored outside {name}")
    stored_as = {x: full.removeprefix(f"{name}.") for x, full in names.items()}
    return Block(
        name=name,
        kind="decoder",
        linears=tuple(linears.values()),
        others=tuple(others),
        groups=(),
        fused=tuple(find_fused_sets(linears)),
        renames=tuple((full, x) for x, full in stored_as.items() if full != x),
        module=path if path != name else "",
    )


def get_role(path: str) -> Role:
    """Return the role of a linear of a dense block by its path."""
    return "attention" if "attn" in path or "attention" in path else "mlp"


def check_kept_tensors(config: Config, name: str, kept: Mapping[str, Tensor], total: int) -> None:
    """Check that the tensors of a block other than linears can be kept as they are.

    kept: by name in transformers; total: elements of the block. Raises CheckpointError.
    """
    for path, tensor in kept.items():
        if not tensor.is_floating_point():
            raise make_refusal(
                config, f"{name}.{path} has {tensor.dtype} values, which no reader knows"
            )
    sizes = {f"{name}.{path}": tuple(x.shape) for path, x in kept.items() if x.dim() > 1}
    check_kept_share(config, name, sizes, total, "are not in an nn.Linear")


def check_kept_share(
    config: Config, name: str, shapes: Mapping[str, tuple[int, ...]], total: int, why: str
) -> None:
    """Check that most of a block of `total` elements can be quantized; raises CheckpointError."""
    share = sum(map(prod, shapes.values())) / total
    if share > MAX_KEPT_SHARE:
        largest, shape = max(shapes.items(), key=lambda item: prod(item[1]))
        raise make_refusal(
            config,
            f"{share:.0%} of the weights of {name} {why}: {largest} {list(shape)}; experts need a "
            "table",
        )


def keep_linears(config: Config, block: Block, names: Collection[str]) -> Block:
    """Return a block in which these linears are tensors that are kept as they are.

    Raises CheckpointError if they are more than a small part of it, as experts are.
    """
    kept = [x for x in block.linears if x.name in names]
    shapes = {x.name: (x.out_features, x.in_features) for x in kept}
    total = sum(x.n_parameters for x in block.linears)
    check_kept_share(
        config,
        block.name,
        shapes,
        total,
        "are in linears that are not called once with every token",
    )
    weights = [(f"{name}.weight", shape) for name, shape in shapes.items()]
    biases = [(f"{x.name}.bias", (x.out_features,)) for x in kept if x.bias]
    others = (
        TensorSpec(name=name, dtype="BF16", shape=shape) for name, shape in (*weights, *biases)
    )
    return replace(
        block,
        linears=tuple(x for x in block.linears if x.name not in names),
        others=(*block.others, *others),
        fused=tuple(members for members in block.fused if not {*members} & {*names}),
    )


@cache
def is_linear_class(kind: type[nn.Linear]) -> bool:
    """Return whether modules of a class compute x W^T + b, shown by a small one of torch's own."""
    if kind is nn.Linear:
        return True
    generator = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(4, 3), torch.randn(2, 4, generator=generator)
    try:
        with torch.no_grad():
            return bool(torch.allclose(kind.forward(linear, x), linear(x), atol=1e-6))
    except (AttributeError, TypeError, RuntimeError, ValueError):  # it needs what this class adds
        return False


def has_matrix(module: nn.Module) -> bool:
    """Return whether a module has a matrix of its own."""
    return any(parameter.dim() > 1 for parameter in module.parameters(recurse=False))


def find_fused_sets(linears: Mapping[str, Linear]) -> list[tuple[str, ...]]:
    """Return the sets that engines fuse at load; they have these names in every family."""
    parents = dict.fromkeys(name.rpartition(".")[0] for name in linears)
    sets = {
        tuple(f"{parent}.{last}" for last in members): None
        for parent in parents
        for members in FUSED_MODULES.values()
    }
    return [members for members in sets if all(member in linears for member in members)]
