"""One block of a small random instance: its readers, and the effect of a change of its tensors."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.contracts import Absorber, Block, Config, Linear, LinearGroup
from quantkit.models import scaling
from quantkit.models.experts import BlockRun, run_block, run_router, select_dense_tensors
from quantkit.models.layer_calls import name_tensors
from quantkit.models.layers import (
    DecoderLayer,
    MetaModel,
    get_layer_name,
    make_decoder_layer,
    run_layer,
)

LENGTHS = (20, 13)
"""Tokens of the two sequences: unequal, to test padding, and longer than the window."""
SHORT = 5
SCALING_TOLERANCE = 1e-6
"""Largest relative change of states by scaling with powers of two: the order of a kernel's sums."""


@dataclass(frozen=True, kw_only=True)
class InputReaders:
    """Linears of a block with the same input, and the absorber of its scale.

    rows: name of the row map (`list_row_maps`) from the absorber's rows to the input's channels.
    """

    readers: tuple[str, ...]  # within the block
    absorber: str | None = None
    rows: str = ""
    routed_experts: bool = False


def select_block_tensors(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's tensors by full name."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{block.name}.")}


@dataclass(frozen=True, kw_only=True)
class ShortRun:
    """A block run on few tokens: states [SHORT, n] after it, and tensors of modules by path."""

    out: Tensor
    values: Mapping[str, Sequence[Tensor]]

    def equals(self, other: ShortRun, changed: Collection[str] = ()) -> bool:
        """Return whether two runs are equal but for the order of sums and `changed` modules."""
        pairs = [(self.out, other.out)]
        for path in self.values.keys() - {*changed}:
            pairs += zip(self.values[path], other.values[path], strict=True)
        return all(is_unchanged(x.float(), plain.float()) for plain, x in pairs)


@dataclass(frozen=True, kw_only=True)
class BlockTrial:
    """A block of the instance with an input and its output; silent: as of `find_silent_modules`."""

    config: Config
    meta_model: MetaModel
    block: Block
    tensors: Mapping[str, Tensor]  # of the block, by full name
    rows: Tensor  # of states [tokens, width]
    silent: Mapping[str, bool] = field(default_factory=dict)

    @cached_property
    def out(self) -> Tensor:
        """States [tokens, n] after the unchanged block."""
        return self.meta_model.outer.form.get_hidden(self.plain.out)

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the states [tokens, n] after the block with these tensors."""
        run = run_block(self.meta_model, self.block, tensors, self.rows, LENGTHS)
        return self.meta_model.outer.form.get_hidden(run.out)

    @cached_property
    def plain(self) -> BlockRun:
        """The unchanged block."""
        return run_block(self.meta_model, self.block, self.tensors, self.rows, LENGTHS)

    @cached_property
    def dense(self) -> tuple[Linear, ...]:
        """The linears of the block without routed experts."""
        return tuple(x for x in self.block.linears if x.role != "routed_expert")

    @cached_property
    def calls(self) -> dict[str, list[Tensor]]:
        """Return the inputs of every call of each dense linear, by its full name."""
        return self.record_calls(None)

    def record_calls(self, total: Tensor | None) -> dict[str, list[Tensor]]:
        """Return the inputs of every call of each dense linear while the experts return `total`
        [positions, hidden], or zeros.
        """
        dense = select_dense_tensors(self.block, self.tensors)
        layer = make_decoder_layer(self.meta_model, self.block, dense)
        if layer.tap is not None:
            layer.tap.answer = total
        paths = {x.name: get_layer_name(self.block, x.name) for x in self.dense}
        calls = record_inputs(
            layer.module,
            list(paths.values()),
            lambda: run_layer(self.meta_model, layer, self.rows, LENGTHS),
        )
        return {name: calls[path] for name, path in paths.items()}

    @cached_property
    def after_experts(self) -> frozenset[str]:
        """Names of the dense linears whose input depends on the experts' output."""
        if self.plain.total is None:
            return frozenset()
        other = self.record_calls(self.plain.total)
        return frozenset(
            name
            for name, inputs in self.calls.items()
            if any(not torch.equal(x, y) for x, y in zip(inputs, other[name], strict=True))
        )

    def is_called_once(self, linear: Linear) -> bool:
        """Return whether a linear is called once, with every token, before the experts."""
        inputs, tokens = self.calls[linear.name], len(LENGTHS) * max(LENGTHS)
        is_called = len(inputs) == 1 and inputs[0].numel() == tokens * linear.in_features
        return is_called and linear.name not in self.after_experts

    def readings(self) -> tuple[InputReaders, ...]:
        """Return the linears that are called once, grouped by input values."""
        groups: list[tuple[Tensor, list[str]]] = []
        for linear in filter(self.is_called_once, self.dense):
            (x,) = self.calls[linear.name]
            same = (readers for y, readers in groups if is_same_input(x, y))
            match = next(same, None)
            if match is None:
                groups.append((x, match := []))
            match.append(linear.name.removeprefix(f"{self.block.name}."))
        return tuple(
            InputReaders(readers=tuple(readers), routed_experts=self.is_read_by_experts(x))
            for x, readers in groups
        )

    def is_read_by_experts(self, x: Tensor) -> bool:
        """Return whether the routed experts read this input."""
        routed = self.plain.routed
        if routed is None or x.numel() != routed.hidden.numel():
            return False
        return torch.equal(x.reshape(routed.hidden.shape), routed.hidden)

    @cached_property
    def short_run(self) -> ShortRun:
        """The unchanged block, as of `run_short`."""
        return self.run_short(self.tensors)

    def find_silent_modules(self) -> dict[str, bool]:
        """Return the modules of the layer whose tensors do not change the states after a short run,
        by path, and whether their own output shows what they read.

        The states after the block show nothing about folds into such a module, or into a tensor
        that it reads.
        """
        layer = self.layer
        own = {
            path: [x for x in module.parameters(recurse=False) if x.is_floating_point()]
            for path, module in layer.module.named_modules()
        }
        plain = self.record_short(layer, dict.fromkeys((x for x in own if own[x]), True))
        silent = {}
        for path in plain.values:
            with exchange_values([(x, x.data.flip(0) * 1.5) for x in own[path]]):
                other = self.record_short(layer, {path: True})
            if other.equals(plain, {path}):
                silent[path] = not other.equals(plain)
        return silent

    @cached_property
    def layer(self) -> DecoderLayer:
        """The unchanged layer with a tap in place of its experts; to make one takes longer than a
        short run.
        """
        dense = select_dense_tensors(self.block, self.tensors)
        return make_decoder_layer(self.meta_model, self.block, dense)

    def run_short(self, tensors: Mapping[str, Tensor]) -> ShortRun:
        """Run the block with these tensors on few tokens, with experts that return zeros."""
        dense, parameters = select_dense_tensors(self.block, tensors), self.parameters
        changed = {name: x for name, x in dense.items() if x is not self.tensors[name]}
        if not changed.keys() <= parameters.keys():  # a part of a tensor that is stored in parts
            layer = make_decoder_layer(self.meta_model, self.block, dense)
            return self.record_short(layer, self.silent)
        with exchange_values([(parameters[name], x) for name, x in changed.items()]):
            return self.record_short(self.layer, self.silent)

    @cached_property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The parameters of `layer` by the full name of their tensor."""
        own = dict(self.layer.module.named_parameters())
        paths = {name: get_layer_name(self.block, name) for name in self.tensors}
        return {name: own[path] for name, path in paths.items() if path in own}

    def record_short(self, layer: DecoderLayer, modules: Mapping[str, bool]) -> ShortRun:
        """Run a layer on the first rows; record outputs of modules, or inputs."""
        values, remove = watch_modules(layer.module, modules)
        try:
            out, _ = run_layer(self.meta_model, layer, self.rows[:SHORT], (SHORT,))
        finally:
            remove()
        return ShortRun(out=self.meta_model.outer.form.get_hidden(out), values=values)

    def holds(self, groups: tuple[LinearGroup, ...]) -> bool:
        """Return whether scaling the inputs of these groups leaves the block's output unchanged,
        and the outputs of its silent modules but for the absorbers.

        Most wrong absorbers change a few tokens already, without the experts, which takes a tenth
        of the time.
        """
        changed, generator = dict(self.tensors), torch.Generator().manual_seed(2)
        for group in groups:
            if group.absorber:
                width = self.tensors[f"{group.readers[0]}.weight"].shape[1]
                scale = make_random_scale(group.absorber, width, generator)
                scaling.divide_absorber(changed, group.absorber, scale)
                scaling.multiply_readers(changed, group, scale)
                self.multiply_experts(changed, group, scale)
        absorbers = {
            get_layer_name(self.block, group.absorber.module) for group in groups if group.absorber
        }
        if not self.short_run.equals(self.run_short(changed), absorbers):
            return False
        return is_unchanged(self.run(changed), self.out)

    def multiply_experts(
        self, tensors: dict[str, Tensor], group: LinearGroup, scale: Tensor
    ) -> None:
        """Multiply the input channels of the routed experts, if they read the group's input."""
        experts = self.block.experts
        if experts is None or not group.routed_experts:
            return
        for e in range(experts.count):
            for projection in experts.inputs:
                name = f"{experts.linear(e, projection)}.weight"
                tensors[name] = tensors[name] * scale  # [out, in] * [in]

    def find_routers(self) -> tuple[str, ...]:
        """Return the modules that the routing depends on, and not by the experts' input; and gates
        with one row. By name after that of the block.
        """
        gates = [x.name for x in self.dense if self.block.experts and x.out_features == 1]
        routed = self.plain.routed
        if routed is None:
            return ()
        own = {x.name for x in self.dense}
        experts = self.block.experts
        if experts and experts.scaled_inputs:  # they change the experts' input too
            gates += [
                x.name.removesuffix(".weight")
                for x in self.block.others
                if x.name.endswith(".weight") and x.shape == (experts.count, experts.hidden)
            ]
            gates += [x.name for x in self.dense if x.out_features == experts.count]
        in_parts = {part for _, parts in self.block.joined for part in parts}
        matrices = [
            x.name.removesuffix(".weight")
            for x in self.block.others
            if x.name.endswith(".weight") and len(x.shape) == 2 and x.name not in in_parts
        ]
        routers, dense = [], select_dense_tensors(self.block, self.tensors)
        for name in (*own, *matrices):
            changed = {**dense, f"{name}.weight": dense[f"{name}.weight"].flip(0) * 1.5}
            run = run_router(self.meta_model, self.block, changed, self.rows, LENGTHS)
            if run is None or not torch.equal(run.hidden, routed.hidden):
                continue
            if not (
                torch.equal(run.index, routed.index) and torch.equal(run.weight, routed.weight)
            ):
                routers.append(name)
        return tuple(sorted(x.removeprefix(self.block.name) for x in {*routers, *gates}))


@contextmanager
def exchange_values(pairs: Sequence[tuple[nn.Parameter, Tensor]]) -> Iterator[None]:
    """Give parameters other values for a while."""
    before = [parameter.data for parameter, _ in pairs]
    for parameter, value in pairs:
        parameter.data = value.to(parameter)
    try:
        yield
    finally:
        for (parameter, _), value in zip(pairs, before, strict=True):
            parameter.data = value


def watch_modules(
    layer: nn.Module, modules: Mapping[str, bool]
) -> tuple[dict[str, list[Tensor]], Callable[[], None]]:
    """Record tensors of modules in the forwards of a layer: by path, their outputs if the value is
    true, else those inputs that their own parameters may multiply, which have a size of one in
    their last dimension. Return them and a function that ends it.
    """
    values: dict[str, list[Tensor]] = {path: [] for path in modules}

    def make_hook(path: str) -> Any:
        def hook(module: nn.Module, args: Any, keywords: Any, output: Any) -> None:
            used = [x for _, x in name_tensors(output if modules[path] else (args, keywords))]
            if not modules[path]:
                sizes = {n for x in module.parameters(recurse=False) for n in x.shape}
                used = [x for x in used if sizes & {*x.shape[-1:]}]
            values[path].extend(tensor.clone() for tensor in used)

        return hook

    handles = [
        layer.get_submodule(path).register_forward_hook(make_hook(path), with_kwargs=True)
        for path in modules
    ]

    def remove() -> None:
        for handle in handles:
            handle.remove()

    return values, remove


def is_same_input(x: Tensor, y: Tensor) -> bool:
    """Return whether two linears are given the same values, flattened or not."""
    if x.shape[-1] != y.shape[-1] or x.numel() != y.numel():
        return False
    return torch.equal(x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]))


def record_inputs(
    layer: nn.Module, names: list[str], forward: Callable[[], object]
) -> dict[str, list[Tensor]]:
    """Return the inputs of every call of these modules while `forward` runs."""
    inputs: dict[str, list[Tensor]] = {name: [] for name in names}

    def make_hook(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            inputs[name].extend(args[:1])

        return hook

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(make_hook(name)) for name in names
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return inputs


def make_random_scale(absorber: Absorber, width: int, generator: torch.Generator) -> Tensor:
    """Return [width] powers of two other than 1, equal for channels that share a row."""
    index = torch.tensor(absorber.rows.index() if absorber.rows else range(width))
    exponent = torch.randint(0, 4, (int(index.max()) + 1,), generator=generator)
    return torch.tensor([0.25, 0.5, 2.0, 4.0])[exponent][index]


def is_unchanged(out: Tensor, plain: Tensor) -> bool:
    """Return whether states are those of the unchanged block, but for the order of sums."""
    return float((out - plain).norm()) <= SCALING_TOLERANCE * float(plain.norm())
