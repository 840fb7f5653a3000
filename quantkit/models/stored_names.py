"""Names under which a checkpoint stores the tensors of transformers' model.

transformers renames tensors when it loads a checkpoint, stacks the experts of a layer into 3-D
tensors, and joins others. `find_stored_names` reverts that for random values with transformers' own
conversion and compares values; names are not interpreted. A model whose experts no reader knows
(a norm of their own, a class of their own) is rejected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from quantkit.contracts import StackedTensor
from quantkit.models.expert_form import ExpertForm, is_experts_module, read_form
from quantkit.models.layers import MetaModel
from quantkit.models.outer_model import find_layers
from quantkit.models.text_part import find_relocation, find_text_root, relocate

NO_READER = "which no reader here knows"
PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
MIXTRAL = ("block_sparse_moe", {"gate": "w1", "up": "w3", "down": "w2"})
"""Experts in a module of this name have these names in every engine."""


@dataclass(frozen=True, kw_only=True)
class ExpertNames:
    """Names of the experts of a layer in the checkpoint: expert e's up is MODULE.e.UP.

    `stacked`: the tensors of the checkpoint that hold all experts; engines read single experts by
    these names from a quantized artifact.
    """

    module: str
    gate: str | None
    up: str
    down: str
    bias: bool = False
    stacked: tuple[StackedTensor, ...] = ()


@dataclass(frozen=True, kw_only=True)
class StoredNames:
    """Names in a checkpoint, by names in transformers' model.

    tensors: of tensors stored as they are; joined: of tensors stored in parts along the rows; rows:
    the number of rows of each part; experts: by the path of the experts' module; saved: the names
    with which transformers saves the parts, which may have another prefix.
    """

    tensors: Mapping[str, str]
    joined: Mapping[str, tuple[str, ...]]
    rows: Mapping[str, tuple[int, ...]]
    experts: Mapping[str, ExpertNames]
    saved: Mapping[str, str]


class UnknownForm(Exception):
    """A tensor or module that no reader knows; the message is the reason."""


def find_stored_names(
    meta_model: MetaModel, values: Mapping[str, Tensor], disk: Mapping[str, str] = {}
) -> tuple[StoredNames, dict[str, Tensor]]:
    """Return the names in a checkpoint, and the values of logical tensors under them.

    values: random tensors by their names in transformers' model; disk: the name in the checkpoint
    of tensors by those names, where it is known. Other tensors of the text model have the name with
    which transformers saves them, with the prefix of the tensors in `disk`. Raises UnknownForm.
    """
    model = meta_model.model
    written: dict[str, Tensor] = revert_weight_conversion(model, dict(values))
    names = {id(tensor): name for name, tensor in written.items()}
    saved = {name: names[id(x)] for name, x in values.items() if id(x) in names}
    move = make_relocation(model, saved, disk)
    tensors = {name: disk.get(name) or move(name, x) for name, x in saved.items()}
    own = {*saved.values()}
    parts = {move(name, name): x for name, x in written.items() if name not in own}
    saved_parts = {move(name, name): name for name in written if name not in own}
    result: dict[str, Tensor] = {}
    experts: dict[str, ExpertNames] = {}
    claimed: set[str] = set()
    for path, module in model.named_modules():
        form = get_form(path, module) if is_experts_module(module) else None
        if form is None:  # kept as it is, if it is a small part of its block
            continue
        kinds = {x.name: f"{path}.{x.name}" for x in form.parameters}
        own_values = {kind: values[x] for kind, x in kinds.items()}
        pieces, biases = form.split(own_values, "weight"), form.split(own_values, "bias")
        if all(x in disk or x in saved for x in kinds.values()):
            stored = {kind: tensors.get(x) or disk[x] for kind, x in kinds.items()}
            experts[path] = name_stacked(name_on_disk(model, path, tensors), form, stored)
        else:
            experts[path] = name_experts(path, pieces, biases, parts)
        result |= name_pieces(experts[path], pieces, "weight")
        result |= name_pieces(experts[path], biases, "bias")
        claimed |= {*kinds.values()}
    result |= {tensors[name]: values[name] for name in tensors if name not in claimed}
    index = index_parts(parts)
    joined = {
        name: find_parts(name, x, parts, index)
        for name, x in values.items()
        if name not in tensors and name not in claimed
    }
    result |= {part: parts[part] for part_names in joined.values() for part in part_names}
    stored_names = StoredNames(
        tensors=tensors,
        joined=joined,
        rows={name: tuple(len(parts[x]) for x in names) for name, names in joined.items()},
        experts=experts,
        saved=saved_parts,
    )
    return stored_names, result


def measure_parts(meta_model: MetaModel, stored: StoredNames) -> StoredNames:
    """Return the names with the rows that the parts have in another model of the same kind."""
    if not stored.joined:
        return stored
    model = meta_model.model
    written = revert_weight_conversion(model, dict(model.state_dict()))
    rows = {
        name: tuple(len(written[stored.saved[x]]) for x in part_names)
        for name, part_names in stored.joined.items()
    }
    return replace(stored, rows=rows)


def make_relocation(
    model: Any, saved: Mapping[str, str], disk: Mapping[str, str]
) -> Callable[[str, str], str]:
    """Return a function that gives a saved name of the text model the prefix of the checkpoint.

    saved: names with which transformers saves tensors; the function takes a tensor's name in the
    model and the one to change.
    """
    layers, _ = find_layers(model)
    root = f"{find_text_root(model)}."
    known = next((x for x in saved if x.startswith(f"{layers}.") and x in disk), None)
    prefixes = find_relocation(saved[known], disk[known]) if known else ("", "")

    def move(name: str, stored: str) -> str:
        return relocate(stored, prefixes) if name.startswith(root) else stored

    return move


# ------------------------------------------------------------------------------------------ experts


def get_form(path: str, module: Any) -> ExpertForm | None:
    """Return the form of an experts module, None for a class of its own; raises UnknownForm."""
    if getattr(module, "has_post_expert_norm", False):
        raise UnknownForm(f"its experts {path} have a norm of their own, {NO_READER}")
    return read_form(module)


def name_experts(
    path: str,
    pieces: Mapping[str, Tensor],
    biases: Mapping[str, Tensor],
    parts: Mapping[str, Tensor],
) -> ExpertNames:
    """Return the names of the experts among `parts` of the checkpoint; raises UnknownForm.

    pieces: projections of all experts [experts, out, in]; biases: theirs [experts, out].
    """
    known = {make_key(x): name for name, x in parts.items() if x.dim() == 2}
    matches: dict[str, set[tuple[str, str]]] = {}  # projection -> owner, local name
    for projection, stacked in pieces.items():
        for e, weight in enumerate(stacked):
            name = known.get(make_key(weight))
            if name is None or not torch.equal(parts[name], weight):
                raise UnknownForm(
                    f"its experts {path} are not stored one by one: no tensor of the checkpoint is "
                    f"the {projection} projection of one"
                )
            owner, mark, last = name.removesuffix(".weight").rpartition(f".{e}.")
            if not mark or not name.endswith(".weight"):
                raise UnknownForm(f"expert {e} of {path} is stored as {name}, {NO_READER}")
            matches.setdefault(projection, set()).add((owner, last))
    pairs = [pair for names in matches.values() for pair in names]
    if len(pairs) != len(matches) or len({owner for owner, _ in pairs}) > 1:
        raise UnknownForm(f"the experts of {path} have names that differ, {NO_READER}")
    local = {projection: next(iter(pair))[1] for projection, pair in matches.items()}
    names = ExpertNames(
        module=pairs[0][0],
        gate=local.get("gate"),
        up=local["up"],
        down=local["down"],
        bias=bool(biases),
    )
    for name, bias in name_pieces(names, biases, "bias"):
        if name not in parts or not torch.equal(parts[name], bias):
            raise UnknownForm(f"the checkpoint has no tensor {name} with the bias of an expert")
    return names


def name_on_disk(model: Any, path: str, tensors: Mapping[str, str]) -> str:
    """Return a module's name below the stored name of its layer."""
    layers, _ = find_layers(model)
    number, _, local = path.removeprefix(f"{layers}.").partition(".")
    layer = f"{layers}.{number}"
    for name, stored in tensors.items():
        own = name.removeprefix(f"{layer}.")
        if own != name and stored.endswith(f".{own}"):
            return f"{stored.removesuffix(f'.{own}')}.{local}"
    return path


def name_stacked(path: str, form: ExpertForm, stored: Mapping[str, str]) -> ExpertNames:
    """Return names of experts whose tensors are stored as they are, by their local names."""
    names = MIXTRAL[1] if MIXTRAL[0] in path.split(".") else PROJECTIONS
    return ExpertNames(
        module=path,
        gate=names["gate"] if form.has_gate else None,
        up=names["up"],
        down=names["down"],
        bias=form.has_bias,
        stacked=tuple(
            StackedTensor(
                name=stored[x.name],
                projections=tuple(names[projection] for projection in x.projections),
                transposed=x.transposed,
                interleaved=x.interleaved,
                flat=x.flat,
                kind=x.kind,
            )
            for x in form.parameters
        ),
    )


def name_pieces(
    names: ExpertNames, pieces: Mapping[str, Tensor], kind: Literal["weight", "bias"]
) -> Iterator[tuple[str, Tensor]]:
    """Yield the matrices [out, in] or biases [out] of experts by full name."""
    local = {"gate": names.gate, "up": names.up, "down": names.down}
    for projection, stacked in pieces.items():
        for e, weight in enumerate(stacked):
            yield f"{names.module}.{e}.{local[projection]}.{kind}", weight.contiguous()


def make_key(weight: Tensor) -> tuple[object, ...]:
    """Return shape and first values of a random matrix, which identify it."""
    return (*weight.shape, *weight.flatten()[:4].tolist())


# --------------------------------------------------------------------------------- tensors in parts


def index_parts(parts: Mapping[str, Tensor]) -> dict[tuple[object, ...], list[str]]:
    """Return the names of tensors by the key of their first row."""
    index: dict[tuple[object, ...], list[str]] = {}
    for name, tensor in parts.items():
        if tensor.dim() and len(tensor):
            index.setdefault(make_key(tensor[0]), []).append(name)
    return index


def find_parts(
    name: str,
    tensor: Tensor,
    parts: Mapping[str, Tensor],
    index: Mapping[tuple[object, ...], Sequence[str]],
) -> tuple[str, ...]:
    """Return the parts of a tensor along its rows, in order; index: of `index_parts`.

    Raises UnknownForm.
    """
    row, result = 0, list[str]()
    while row < len(tensor):
        near = [x for x in index.get(make_key(tensor[row]), ()) if is_at(tensor, row, parts[x])]
        if not near:
            raise UnknownForm(
                f"transformers makes {name} from other tensors of the checkpoint, and not by "
                "joining their rows"
            )
        result.append(near[0])
        row += len(parts[near[0]])
    return tuple(result)


def is_at(tensor: Tensor, row: int, part: Tensor) -> bool:
    """Return whether `part` is contained in `tensor` from a row on."""
    return torch.equal(tensor[row : row + len(part)], part)
