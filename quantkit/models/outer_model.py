"""transformers' model around its decoder layers: embedding, arguments of the layers, and logits.

A layer is run with the arguments that the model's own forward makes: masks, rotary tables,
positions. `OuterModel` is transformers' model with a stub in place of each layer. One forward of it
records the arguments of every layer for one shape of batch; another embeds tokens; a third computes
logits from the states after the last layer, with final norm, head, multipliers and soft caps. All
of it is transformers' code, and no layer has weights here.

Padding is on the right and no mask says so: under causal layers no token sees it.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from quantkit.errors import CheckpointError
from quantkit.models.layer_calls import LayerCall, count_bytes, is_ids, name_tensors
from quantkit.models.modules import MatmulLinear, freeze, list_prefixes
from quantkit.models.state_rows import StateForm, StatePart, find_token_axes
from quantkit.models.stubs import EmbeddingStub, HeadStub, LayerStub, RowEmbedding, Stub

MAX_KEPT_BYTES = 1 << 26
"""Recorded arguments that are kept for the next layer; the largest are masks [n, 1, t, t]."""
PROBE_SHAPES = ((2, 3), (3, 5))
"""Sequences and tokens of the forwards that determine the form of states and outputs."""
PROBE_TOKENS = (5, 6)
"""Token ids that begin two texts: what differs between them depends on the text."""
MAX_EXTRA_OUTPUTS = 3
FORM_ERRORS = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)
"""Exceptions of transformers' forward when a layer's output has an unexpected form."""


class OuterModel:
    """transformers' model without its layers; see `make_outer_model`.

    form: of the rows of states at the layers. Mutable: it keeps the arguments that it recorded
    last.
    """

    form: StateForm

    def __init__(
        self, model: Any, name: str, stubs: Sequence[LayerStub], device: torch.device
    ) -> None:
        self._model = model
        self._stubs = stubs
        self._device = device
        self._names = [f"{name}.{number}" for number in range(len(stubs))]
        self._stateful = [
            (path, copy.deepcopy(module))
            for path, module in model.named_modules()
            if module._non_persistent_buffers_set and not list(module.children())
        ]
        self._ids = dict[str, frozenset[str]]()  # by name of the layer, see LayerCall
        self._kept: dict[tuple[int, int], dict[str, LayerCall]] = {}

    def record(self, sequences: int, tokens: int) -> Mapping[str, LayerCall]:
        """Return the call of each layer, by its name, for a batch of this shape."""
        shape = (sequences, tokens)
        if shape not in self._kept:
            self._forward(torch.zeros(shape, dtype=torch.long))
            calls = {
                name: replace(stub.calls[0], ids=self._ids[name])
                for name, stub in zip(self._names, self._stubs, strict=True)
            }
            self._kept[shape] = calls
            while count_bytes(self._kept) > MAX_KEPT_BYTES:
                del self._kept[next(iter(self._kept))]
            return calls
        return self._kept[shape]

    def record_for(self, ids: Tensor) -> Mapping[str, LayerCall]:
        """Return the call of each layer for token ids [sequences, tokens]; nothing is kept."""
        self._forward(ids)
        return {name: stub.calls[0] for name, stub in zip(self._names, self._stubs, strict=True)}

    def embed(self, ids: Tensor) -> Tensor:
        """Return rows of states at the first layer: [sequences, tokens] -> [.., width]."""
        self._forward(ids)
        hidden = self._stubs[0].hidden
        assert hidden is not None  # the probe has shown one call
        return self.form.pack(hidden, ids)

    def compute_logits(self, rows: Tensor) -> Tensor:
        """Return logits of states after the last layer: [tokens, width] -> [tokens, vocabulary].

        Each token is a sequence of its own, so that no mask or table grows with their number.
        """
        last = self._stubs[-1]
        last.answer, _ = self.form.unpack(rows[:, None])  # of [tokens, 1, width]
        try:
            logits = self._forward(torch.zeros(len(rows), 1, dtype=torch.long))
        finally:
            last.answer = None
        return logits[:, 0]  # [tokens, 1, vocabulary] -> [tokens, vocabulary]

    def is_ids_argument(self, name: str) -> bool:
        """Return whether an argument is the token ids; name: as in `name_tensors` of a record."""
        return any(name == f".{layer}{path}" for layer, x in self._ids.items() for path in x)

    def depends_on_length(self, shortest: int, longest: int) -> bool:
        """Return whether a sequence of `shortest` tokens gets other tables in a longer batch.

        Rotary embeddings of type longrope and dynamic depend on the longest sequence.
        """
        short, long = (dict(name_tensors(self.record(1, n))) for n in (shortest, longest))
        return any(
            not torch.equal(x, long[name][tuple(slice(size) for size in x.shape)])
            for name, x in short.items()
            if name in long and x.is_floating_point() and x.dim() == long[name].dim()
        )

    def determine_form(self) -> None:
        """Set `form`, the form of the layers' output, and which arguments are the token ids.

        Raises CheckpointError if no form gives each layer states of every token once.
        """
        faults, forms = list[str](), list[str]()
        for n_extra in (None, *range(MAX_EXTRA_OUTPUTS + 1)):
            for stub in self._stubs:
                stub.n_extra = n_extra
            try:
                fault = self._probe()
            except FORM_ERRORS as error:
                forms.append(f"{type(error).__name__}: {error}")
                continue
            if fault is None:
                return
            faults.append(fault)
        raise CheckpointError(f"its layers cannot be run one by one ({(faults or forms)[0]})")

    def _probe(self) -> str | None:
        """Set `form` and the names of ids; return the fault of a forward that does not call each
        layer once, with states of every token.
        """
        states, texts = list[list[Tensor]](), list[Tensor]()
        named = list[dict[str, dict[str, Tensor]]]()
        for shape, first in zip(PROBE_SHAPES, PROBE_TOKENS, strict=True):
            ids = first + torch.arange(shape[0] * shape[1]).reshape(shape) % 2
            logits = self._forward(ids)
            fault = self._find_fault(logits, shape)
            if fault is not None:
                return fault
            states.append([stub.hidden for stub in self._stubs if stub.hidden is not None])
            texts.append(ids)
            calls = zip(self._names, self._stubs, strict=True)
            named.append({name: dict(name_tensors(stub.calls[0])) for name, stub in calls})
        parts = set[StatePart]()
        for name, pair in zip(self._names, zip(*states, strict=True), strict=True):
            axis = find_token_axes([tuple(x.shape) for x in pair], PROBE_SHAPES)
            if axis is None:
                return f"{name} is given states {list(pair[0].shape)}, not one of each token"
            sizes = tuple(pair[0].shape)
            per_token = (*sizes[:axis], *sizes[axis + 2 :])
            parts.add(StatePart(axis=axis, shape=per_token, dtype=pair[0].dtype))
        if len(parts) > 1:
            shapes = " and ".join(sorted(str(list(x.shape)) for x in parts))
            return f"its layers are given states of different shapes per token: {shapes}"
        first_named, *others = named
        self._ids = {
            name: frozenset(
                path
                for path in tensors
                if all(is_ids(x[name].get(path), ids) for x, ids in zip(named, texts, strict=True))
            )
            for name, tensors in first_named.items()
        }
        self.form = StateForm(hidden=parts.pop(), has_ids=any(self._ids.values()))
        return None

    def _find_fault(self, logits: Tensor, shape: tuple[int, int]) -> str | None:
        """Return how the last forward differs from one that calls each layer once."""
        for name, stub in zip(self._names, self._stubs, strict=True):
            if len(stub.calls) != 1:
                return f"{name} is called {len(stub.calls)} times in one forward"
            if not isinstance(stub.hidden, Tensor):
                return f"{name} is not given its states as a tensor"
        is_complete = tuple(logits.shape[:2]) == shape
        return None if is_complete else f"logits {list(logits.shape)} do not cover every token"

    def find_exchange(self) -> str | None:
        """Describe a value besides states that a layer gets from an earlier one; None for none."""
        stores = dict[int, str]()
        for stub in self._stubs:
            stub.marks = tuple(torch.zeros(()) for _ in range(stub.n_extra or 0))
        try:
            self._forward(torch.zeros(PROBE_SHAPES[0], dtype=torch.long))
        except FORM_ERRORS:  # it computes with what layers return
            return "its layers are given values that earlier layers return besides their states"
        finally:
            marks = {id(x): n for n, stub in enumerate(self._stubs) for x in stub.marks}
            for stub in self._stubs:
                stub.marks = ()
        for name, stub in zip(self._names, self._stubs, strict=True):
            for path, value in name_tensors(stub.calls[0]):
                if id(value) in marks:
                    owner = self._names[marks[id(value)]]
                    return f"{name} is given {path[1:]}, which {owner} returns besides its states"
            for key, value in stub.calls[0].keywords.items():
                if isinstance(value, MutableMapping) and not value:
                    if id(value) in stores:
                        return f"its layers are given {key}, which earlier layers fill"
                    stores[id(value)] = key
        return None

    def _forward(self, ids: Tensor) -> Tensor:
        """Run transformers' forward on token ids [sequences, tokens]; return its logits."""
        for path, module in self._stateful:  # rotary embeddings may remember the longest text
            self._model.set_submodule(path, copy.deepcopy(module))
        for stub in self._stubs:
            stub.calls, stub.hidden = [], None
        with torch.no_grad():
            logits: Tensor = self._model(input_ids=ids.to(self._device), use_cache=False).logits
        return logits


def make_outer_model(
    model: Any, device: torch.device, dtype: torch.dtype, tensors: Mapping[str, Tensor] = {}
) -> OuterModel:
    """Make the outer model of transformers' `model`, whose parameters are on the meta device.

    tensors: full names; those that are absent are zeros, which is enough to record arguments.
    `embed` needs all but the head's, `compute_logits` all but the embedding's. Raises
    CheckpointError for a model whose layers cannot be replaced.
    """
    name, layers = find_layers(model)
    embedding, head = model.get_input_embeddings(), get_head(model)
    stubs = [LayerStub(layer) for layer in layers]
    replaced = {
        id(layers): nn.ModuleList(stubs),
        id(embedding): make_embedding(model, embedding, device, dtype, tensors),
        id(head): make_head(model, head, device, dtype, tensors),
        id(model.config): model.config,
    }
    outer = copy.deepcopy(model, replaced)  # an object in its second argument is not copied
    for module_name, module in outer.named_modules():
        fill_tensors(module, module_name, device, dtype, tensors)
    result = OuterModel(outer, name, stubs, device)
    result.determine_form()
    return result


def find_layers(model: Any) -> tuple[str, nn.ModuleList]:
    """Return name and list of a model's layers: the only outermost list with as many modules.

    The nearest module around the embedding that has such a list counts: an encoder of images may
    have as many layers. Raises CheckpointError.
    """
    count = getattr(model.config.get_text_config(decoder=True), "num_hidden_layers", None)
    embedding = get_module_name(model, model.get_input_embeddings())
    lists = dict[str, nn.ModuleList]()
    for scope in reversed(list_prefixes(embedding)[:-1]):
        lists = find_lists(model, scope)
        fitting = [(name, module) for name, module in lists.items() if len(module) == count]
        if len(fitting) == 1:
            return fitting[0]
        if fitting:
            break
    lengths = ", ".join(str(len(module)) for module in lists.values()) or "none"
    raise CheckpointError(f"expected one list of {count} blocks, found lists of {lengths}")


def find_lists(model: Any, scope: str) -> dict[str, nn.ModuleList]:
    """Return the outermost lists of modules inside a module of `model`, by their full names."""
    lists = dict[str, nn.ModuleList]()
    for local, module in model.get_submodule(scope).named_modules():
        name = f"{scope}.{local}" if scope else local
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{x}.") for x in lists):
            lists[name] = module
    return lists


def get_head(model: Any) -> Any:
    """Return a model's language head: its own, or that of a model inside; None without one."""
    head = model.get_output_embeddings()
    if head is not None:
        return head
    embedding = get_module_name(model, model.get_input_embeddings())
    inner = (model.get_submodule(path) for path in list_prefixes(embedding)[1:-1])
    heads = (x.get_output_embeddings() for x in inner if isinstance(x, PreTrainedModel))
    return next((x for x in heads if x is not None), None)


def get_module_name(model: Any, module: nn.Module) -> str:
    """Return the full name of a module of `model`."""
    names: Iterator[str] = (name for name, other in model.named_modules() if other is module)
    return next(names)


def make_embedding(
    model: Any,
    embedding: Any,
    device: torch.device,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor],
) -> Stub:
    """Make the module that embeds tokens: the embedding itself if its weight is among `tensors`."""
    name, own = get_module_name(model, embedding), copy.deepcopy(embedding)
    weight = tensors.get(f"{name}.weight")
    if weight is None:
        return EmbeddingStub(embedding, device, dtype)
    for local, module in own.named_children():  # a norm of the embedded rows
        fill_tensors(module, f"{name}.{local}", device, dtype, tensors)
    return RowEmbedding(own, weight, device, dtype)


def make_head(
    model: Any, head: Any, device: torch.device, dtype: torch.dtype, tensors: Mapping[str, Tensor]
) -> nn.Module:
    """Make the language-model head if its weight is among `tensors`, else a stub."""
    name = get_module_name(model, head)
    weight, bias = tensors.get(f"{name}.weight"), tensors.get(f"{name}.bias")
    if weight is None:
        return HeadStub(head)
    weight = weight.to(device=device, dtype=dtype)
    return MatmulLinear(weight, None if bias is None else bias.to(device=device, dtype=dtype))


def fill_tensors(
    module: nn.Module,
    name: str,
    device: torch.device,
    dtype: torch.dtype,
    tensors: Mapping[str, Tensor],
) -> None:
    """Give the meta tensors of one module their values; absent ones become zeros without memory."""
    for kind, tensor in [
        *module.named_parameters(recurse=False),
        *module.named_buffers(recurse=False),
    ]:
        if not tensor.is_meta:
            continue
        is_buffer = kind in module._buffers
        own = dtype if tensor.is_floating_point() and not is_buffer else tensor.dtype
        value = tensors.get(f"{name}.{kind}" if name else kind)
        if value is None:
            value = torch.zeros((), device=device, dtype=own).expand(tensor.shape)
        value = value.to(device=device, dtype=own)
        setattr(module, kind, value if is_buffer else freeze(value))
