"""The layout of a model without a table, from transformers' modules on the meta device.

The only assumptions: an embedding, a list of blocks, a linear head. In the blocks each `nn.Linear`
can be quantized, and each projection of routed experts; vectors, convolutions and small matrices
are kept, and so is everything outside the blocks. Names do not show which linears share an input
or route tokens: `layout_checks` runs the blocks to determine that, so groups are empty here.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from functools import cache
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.quantizers.base import MODULES_TO_PATCH_FOR_QUANTIZATION

from quantkit import registry
from quantkit.checkpoint.tensors import get_dtype_name
from quantkit.contracts import Block, Config, Experts, Layout, Linear, Role, TensorSpec
from quantkit.errors import CheckpointError
from quantkit.formats.common.engine_names import FUSED_MODULES, LM_HEAD
from quantkit.models.expert_form import read_form
from quantkit.models.layers import MetaModel
from quantkit.models.outer_model import find_layers, get_head, get_module_name
from quantkit.models.stored_names import ExpertNames, StoredNames

MAX_REASON_CHARS = 300
"""Longest reason in a message: transformers' errors can be long."""

PARAMETERS = ("weight", "bias")
INTEGERS = frozenset({torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8})
"""Dtypes of tensors that are kept as they are, such as a table of experts by token."""
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


def inspect_layout(
    config: Config, meta_model: MetaModel, names: StoredNames, is_small: bool = False
) -> Layout:
    """Return the layout of transformers' model of `config`, with empty groups.

    is_small: the model is a small instance, in which matrices that are kept may be a large part.
    Every tensor is claimed once, under its name in the checkpoint. Raises CheckpointError with the
    first module or tensor that has no place in it.
    """
    model = meta_model.model
    embedding, head = model.get_input_embeddings(), get_head(model)
    if not isinstance(embedding, nn.Embedding) or type(head) is not nn.Linear:
        classes = f"{type(embedding).__name__} and {type(head).__name__}"
        raise make_refusal(config, f"expected an embedding and a linear head, found {classes}")
    name, stack = find_layers(model)
    stored = names.tensors
    blocks = tuple(
        inspect_block(config, f"{name}.{number}", layer, names, is_small)
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
            make_kept_spec(stored[tensor], spec, tuple(spec.shape)) for tensor, spec in rest.items()
        ),
        # its bias, if any, is a final tensor: a tied head may have one too
        head=None
        if is_head_tied(config, meta_model)
        else replace(make_linear(head_name, head, "head"), bias=False),
        renames=tuple((stored[x], x) for x in (ends[embedding], *rest) if stored[x] != x),
    )


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


def name_block(path: str, layer: nn.Module, stored: StoredNames) -> str:
    """Return the name in the checkpoint of a block, whose name in transformers is `path`.

    It is the prefix of a tensor whose local name is the same; if there is none, the prefix that all
    names share, up to the block's number.
    """
    names = list[str]()
    for tensor in layer.state_dict():
        full = stored.tensors.get(f"{path}.{tensor}", "")
        if full.endswith(f".{tensor}"):
            return full.removesuffix(f".{tensor}")
        names += [full] if full else []
    number = path.rpartition(".")[2]
    owners = {before for before, mark, _ in (x.partition(f".{number}.") for x in names) if mark}
    return f"{owners.pop()}.{number}" if len(owners) == 1 else path


def inspect_block(
    config: Config, path: str, layer: nn.Module, stored: StoredNames, is_small: bool
) -> Block:
    """Return the layout of a block; raises CheckpointError for matrices other than linears.

    path: the block's name in transformers; is_small: as for `inspect_layout`.
    """
    name = name_block(path, layer, stored)
    modules = {
        local: module
        for local, module in layer.named_modules()
        if isinstance(module, nn.Linear) and is_linear_class(type(module))  # type: ignore[arg-type]  # a class is hashable
    }
    mixtures = find_mixtures(config, path, layer, stored)
    if not modules and not mixtures:
        kinds = {type(x).__name__ for x in layer.modules() if has_matrix(x)}
        raise make_refusal(
            config, f"{name} has no nn.Linear; its matrices are in {', '.join(sorted(kinds))}"
        )
    names = {x: find_linear_name(config, f"{path}.{x}", stored) for x in modules}
    linears = {
        full: make_linear(full, modules[x], get_role(x, bool(mixtures)))
        for x, full in names.items()
    }
    claimed = {f"{x}.{kind}" for x in modules for kind in PARAMETERS}
    claimed |= {f"{x}.{kind}" for x in mixtures for kind in list_parameters(layer.get_submodule(x))}
    kept = {x: tensor for x, tensor in layer.state_dict().items() if x not in claimed}
    if not is_small:
        check_kept_tensors(config, name, layer, kept)
    joined = {x: stored.joined[f"{path}.{x}"] for x in kept if f"{path}.{x}" in stored.joined}
    others = list_kept_specs(path, kept, stored)
    experts = [make_experts(layer.get_submodule(x), y) for x, y in mixtures.items()]
    routed = [linear for each in experts for linear in list_expert_linears(each)]
    if outside := [
        x
        for x in (*linears, *(y.name for y in others), *(z.module for z in experts))
        if not x.startswith(f"{name}.")
    ]:
        raise make_refusal(config, f"{outside[0]} is stored outside {name}")
    stored_as = {
        **{f"{x}.{kind}": f"{full}.{kind}" for x, full in names.items() for kind in PARAMETERS},
        **{x: stored.tensors[f"{path}.{x}"] for x in kept if x not in joined},
        **{x: y.module for x, y in mixtures.items()},
    }
    return Block(
        name=name,
        kind="decoder",
        linears=(*linears.values(), *routed),
        others=tuple(others),
        groups=(),
        fused=(*find_fused_sets(linears), *([tuple(x.name for x in routed)] if routed else [])),
        experts=experts[0] if experts else None,
        renames=list_renames(name, stored_as),
        module=path if path != name else "",
        joined=tuple(joined.items()),
        stacked=tuple(each for x in mixtures.values() for each in x.stacked),
    )


def find_mixtures(
    config: Config, path: str, layer: nn.Module, stored: StoredNames
) -> dict[str, ExpertNames]:
    """Return the names of the experts of a layer, by the path of their module in the layer.

    Raises CheckpointError for several.
    """
    mixtures = {
        local: stored.experts[f"{path}.{local}"]
        for local, _ in layer.named_modules()
        if f"{path}.{local}" in stored.experts
    }
    if len(mixtures) > 1:
        raise make_refusal(config, f"{path} has experts in {' and '.join(mixtures)}")
    return mixtures


def find_linear_name(config: Config, module: str, stored: StoredNames) -> str:
    """Return the name of a linear in the checkpoint."""
    name = stored.tensors.get(f"{module}.weight")
    if name is None:
        raise make_refusal(config, f"{module} is stored in parts")
    return name.removesuffix(".weight")


def list_parameters(module: nn.Module) -> list[str]:
    """Return the local names of a module's parameters, those of its children included."""
    return [name for name, _ in module.named_parameters()]


def list_kept_specs(path: str, kept: Mapping[str, Tensor], stored: StoredNames) -> list[TensorSpec]:
    """Return the tensors of a block other than those of linears, as stored.

    path: the block's name in transformers; kept: by name in transformers' layer.
    """
    specs = []
    for local, tensor in kept.items():
        full = f"{path}.{local}"
        names = stored.joined.get(full) or (stored.tensors[full],)
        sizes = stored.rows.get(full) or tuple(tensor.shape[:1])
        for part, rows in zip(names, sizes or (0,), strict=True):
            shape = (rows, *tensor.shape[1:]) if tensor.dim() else ()
            specs.append(make_kept_spec(part, tensor, shape))
    return specs


def make_kept_spec(name: str, tensor: Tensor, shape: tuple[int, ...]) -> TensorSpec:
    """Return the spec of a tensor that is kept: integers, such as a table of experts by token, have
    their own dtype.
    """
    dtype = "BF16" if tensor.is_floating_point() else get_dtype_name(tensor.dtype)
    return TensorSpec(name=name, dtype=dtype, shape=shape)


def list_renames(name: str, stored: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    """Return local names in the checkpoint that differ from those in transformers, longest first.

    stored: full names in the checkpoint by path in transformers' layer.
    """
    pairs = {(full.removeprefix(f"{name}."), path) for path, full in stored.items()}
    pairs |= {
        (full.removesuffix(".weight"), path.removesuffix(".weight"))
        for full, path in pairs
        if full.endswith(".weight") and path.endswith(".weight")
    }  # modules, whose inputs are observed
    changed = {full for full, path in pairs if full != path}
    needed = {
        (full, path)
        for full, path in pairs
        if full != path or any(full.startswith(f"{other}.") for other in changed)
    }
    return tuple(sorted(needed, key=lambda x: (-len(x[0]), x)))


def make_experts(module: Any, names: ExpertNames) -> Experts:
    """Return the experts of transformers' module; `expert_checks` finds the rest by running it."""
    form = read_form(module)
    assert form is not None  # it has names
    return Experts(
        module=names.module,
        router="",
        count=form.count,
        top_k=0,
        hidden=form.hidden,
        intermediate=form.intermediate,
        gate=names.gate,
        up=names.up,
        down=names.down,
        bias=names.bias,
        single_methods=find_single_methods(module) if names.stacked else None,
    )


def find_single_methods(module: Any) -> tuple[str, ...]:
    """Return each quant_method with which transformers loads single experts, of a type whose
    checkpoints store them together.

    Saving such experts splits no tensor (`find_stored_names`), so that loading joins none. For some
    methods transformers replaces the class of the module by a list of experts.
    """
    replaced = MODULES_TO_PATCH_FOR_QUANTIZATION.get(type(module).__name__, {})
    return tuple(sorted(method.value for method in replaced.get("quantization_methods", ())))


def list_expert_linears(experts: Experts) -> Iterator[Linear]:
    """Yield the linears of experts, expert by expert."""
    for e in range(experts.count):
        for projection in experts.projections:
            out, into = experts.intermediate, experts.hidden
            if projection == experts.down:
                out, into = into, out
            yield Linear(
                name=experts.linear(e, projection),
                out_features=out,
                in_features=into,
                role="routed_expert",
                bias=experts.bias,
            )


def get_role(path: str, has_experts: bool = False) -> Role:
    """Return the role of a linear by its path; `has_experts`: its block has routed experts."""
    if "attn" in path or "attention" in path:
        return "attention"
    return "shared_expert" if has_experts and "shared" in path else "mlp"


def mark_routers(block: Block, names: Collection[str]) -> Block:
    """Return a block in which these modules have the role "router", which no general rule
    selects: linears, or kept matrices of a router's own class.
    """
    matrices = {
        spec.name.removesuffix(".weight"): spec for spec in block.others if len(spec.shape) == 2
    }
    dense = [x for x in block.linears if x.role != "routed_expert"]
    routed = [x for x in block.linears if x.role == "routed_expert"]
    marked = [replace(x, role="router") if x.name in names else x for x in dense]
    for name in names:
        if name in matrices:
            out, into = matrices[name].shape
            marked.append(Linear(name=name, out_features=out, in_features=into, role="router"))
    moved = {f"{name}.weight" for name in names if name in matrices}
    return replace(
        block,
        linears=(*marked, *routed),
        others=tuple(spec for spec in block.others if spec.name not in moved),
    )


def check_kept_tensors(
    config: Config, name: str, layer: nn.Module, kept: Mapping[str, Tensor]
) -> None:
    """Check that the tensors of a block other than linears and experts can be kept as they are.

    kept: by name in transformers. Buffers and embeddings do not count: nothing multiplies them.
    Raises CheckpointError.
    """
    tables = {x for x, _ in layer.named_buffers()}
    tables |= {f"{x}.weight" for x, y in layer.named_modules() if isinstance(y, nn.Embedding)}
    for path, tensor in kept.items():
        if not (tensor.is_floating_point() or tensor.dtype in INTEGERS):
            raise make_refusal(
                config, f"{name}.{path} has {tensor.dtype} values, which no reader knows"
            )
    total = sum(x.numel() for path, x in layer.state_dict().items() if path not in tables)
    matrices = {path: x for path, x in kept.items() if x.dim() > 1 and path not in tables}
    sizes = {f"{name}.{path}": tuple(x.shape) for path, x in matrices.items()}
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
            f"{share:.0%} of the weights of {name} {why}: {largest} {list(shape)}",
        )


def keep_linears(config: Config, block: Block, names: Collection[str]) -> Block:
    """Return a block that keeps the tensors of these linears as they are.

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
    """Return whether a class computes x W^T + b, tested with the weights of a small nn.Linear."""
    if kind is nn.Linear:
        return True
    generator = torch.Generator().manual_seed(0)
    linear, x = nn.Linear(4, 3), torch.randn(2, 4, generator=generator)
    try:
        with torch.no_grad():
            return bool(torch.allclose(kind.forward(linear, x), linear(x), atol=1e-6))
    except (AttributeError, TypeError, RuntimeError, ValueError):  # it uses attributes of its own
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
