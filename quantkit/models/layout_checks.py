"""Checks of a derived layout on a small random instance of the same configuration.

The instance has all blocks of the real model and every switch of its config.json, with small
widths. Checked on it:

    logits       block by block, as in a build, they equal those of transformers' own forward;
    readers      linears with the same input values form a group; each runs once with all tokens;
    absorbers    a tensor absorbs a group's scale if dividing it and multiplying the readers leaves
                 the block's output unchanged.

Only checked properties are used: without an absorber a group's input is not scaled.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from quantkit.contracts import Absorber, Block, Config, HeadRows, Layout, LinearGroup
from quantkit.models import full_model, scaling
from quantkit.models.inspect import make_refusal
from quantkit.models.layers import MetaModel, make_decoder_layer, make_final_norm, run_layer

LENGTHS = (20, 13)
"""Tokens of the two sequences: unequal, to test padding, and longer than the window."""
WINDOW = 8
VOCABULARY = 96
LOGITS_TOLERANCE = 1e-4
"""Largest relative difference of logits; a missing part of the model causes 1e-2 and more."""
SCALING_TOLERANCE = 1e-6
"""The same for scaling by powers of two, which changes nothing but the order of a kernel's sums."""


@dataclass(frozen=True, kw_only=True)
class InputReaders:
    """Linears of a block with the same input, and the absorber of its scale.

    rows: name of the row map (`list_row_maps`) from the absorber's rows to the input's channels.
    """

    readers: tuple[str, ...]  # within the block
    absorber: str | None = None
    rows: str = ""


# ------------------------------------------------------------------------------- the small instance


def reduce_config(config: Config, hf_config: Any) -> Config:
    """Return the configuration with few heads, small widths, a small vocabulary and window."""
    heads, hidden = hf_config.num_attention_heads, hf_config.hidden_size
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    width = getattr(hf_config, "head_dim", None) or hidden // heads
    n_kv_heads = min(kv_heads, 2)
    n_heads = n_kv_heads * min(heads // kv_heads, 2)
    small_hidden = n_heads * width + (0 if hidden == heads * width else 64)
    sizes = {
        "hidden_size": small_hidden,
        "num_attention_heads": n_heads,
        "num_key_value_heads": n_kv_heads,
        "intermediate_size": small_hidden + 32,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
    }
    names = {key: hf_config.attribute_map.get(key, key) for key in sizes}
    changes = {
        names[key]: value
        for key, value in sizes.items()
        if isinstance(getattr(hf_config, key, None), int)
    }
    tokens = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    return Config(values={**config.values, **changes, **tokens}, where=config.where)


def make_random_tensors(meta_model: MetaModel) -> dict[str, Tensor]:
    """Return random tensors: matrices that keep their input's scale, norms around 1, biases."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for name, tensor in meta_model.model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            tensors[name] = value * tensor.shape[-1] ** -0.5
        else:
            tensors[name] = 0.1 * value + (0 if name.endswith(".bias") else 1)
    return tensors


def select_block_tensors(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return a block's tensors by full name."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{block.name}.")}


# ------------------------------------------------------------------------------------------- logits


def check_logits(
    config: Config, meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> None:
    """Compare logits of both ways to run the instance.

    Raises CheckpointError if they differ, or if a layer cannot be run alone.
    """
    ids = torch.randint(0, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    head = (layout.head or layout.embedding).name
    try:
        rows = tensors[f"{layout.embedding.name}.weight"][ids]  # [tokens] -> [tokens, hidden]
        for block in layout.blocks:
            layer, _ = make_decoder_layer(meta_model, block, select_block_tensors(block, tensors))
            rows, _ = run_layer(meta_model, layer, rows, LENGTHS)
        normed = make_final_norm(meta_model, layout, tensors)(rows)
        logits = normed @ tensors[f"{head}.weight"].T  # -> [tokens, vocabulary]
        model = full_model.make_model(meta_model, layout, tensors.__getitem__)
        with torch.no_grad():
            parts = [model(part[None], use_cache=False).logits[0] for part in ids.split(LENGTHS)]
    except Exception as fault:  # an argument that transformers' layer needs
        raise make_refusal(
            config, f"its layers cannot be run one by one ({type(fault).__name__}: {fault})"
        ) from fault
    expected = torch.cat(parts)  # [tokens, vocabulary]
    change = float((logits - expected).norm() / expected.norm())
    if not change <= LOGITS_TOLERANCE:
        raise make_refusal(
            config,
            f"run block by block, a small instance gives other logits than transformers (by "
            f"{change:.0e} of their size), so something outside the blocks, such as a multiplier "
            "of embedding or logits, is not reproduced",
        )


# ------------------------------------------------------------------------------------------ readers


@dataclass(frozen=True, kw_only=True)
class BlockTrial:
    """A block of the instance with an input and its output."""

    config: Config
    meta_model: MetaModel
    block: Block
    tensors: Mapping[str, Tensor]  # of the block, by full name
    rows: Tensor  # [tokens, hidden]

    @cached_property
    def out(self) -> Tensor:
        """Output [tokens, hidden] of the unchanged block."""
        return self.run(self.tensors)

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Return the output [tokens, hidden] of the block with these tensors."""
        layer, _ = make_decoder_layer(self.meta_model, self.block, tensors)
        return run_layer(self.meta_model, layer, self.rows, LENGTHS)[0]

    def readings(self) -> tuple[InputReaders, ...]:
        """Return the linears grouped by input values.

        Raises CheckpointError for a linear that is not called once with every token.
        """
        layer, _ = make_decoder_layer(self.meta_model, self.block, self.tensors)
        names = [linear.name.removeprefix(f"{self.block.name}.") for linear in self.block.linears]
        calls = record_inputs(
            layer, names, lambda: run_layer(self.meta_model, layer, self.rows, LENGTHS)
        )
        tokens = len(LENGTHS) * max(LENGTHS)
        groups: list[tuple[Tensor, list[str]]] = []
        for name, linear in zip(names, self.block.linears, strict=True):
            inputs = calls[name]
            if len(inputs) != 1 or inputs[0].numel() != tokens * linear.in_features:
                raise make_refusal(
                    self.config,
                    f"{linear.name} was called {len(inputs)} times for one block, or not with "
                    "every token once",
                )
            match = next(
                (
                    readers
                    for x, readers in groups
                    if x.shape == inputs[0].shape and torch.equal(x, inputs[0])
                ),
                None,
            )
            if match is None:
                groups.append((inputs[0], match := []))
            match.append(name)
        return tuple(InputReaders(readers=tuple(readers)) for _, readers in groups)

    def holds(self, groups: tuple[LinearGroup, ...]) -> bool:
        """Return whether scaling the inputs of these groups leaves the block's output unchanged."""
        changed, generator = dict(self.tensors), torch.Generator().manual_seed(2)
        for group in groups:
            if group.absorber:
                width = self.tensors[f"{group.readers[0]}.weight"].shape[1]
                scale = make_random_scale(group.absorber, width, generator)
                scaling.divide_absorber(changed, group.absorber, scale)
                scaling.multiply_readers(changed, group, scale)
        return float((self.run(changed) - self.out).norm()) <= SCALING_TOLERANCE * float(
            self.out.norm()
        )


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


# ---------------------------------------------------------------------------------------- absorbers


def list_row_maps(out: int, into: int, hf_config: Any) -> dict[str, HeadRows | None]:
    """Return the maps from `out` rows of a linear to `into` channels, by name."""
    heads = hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    width = into // heads
    maps: dict[str, HeadRows | None] = {}
    if out == into:
        maps["row by row"] = None
    if out == 2 * into:
        maps["second half"] = HeadRows(heads=1, kv_heads=1, width=into, stride=into, offset=into)
    if out == kv_heads * width:
        maps["values"] = HeadRows(
            heads=heads, kv_heads=kv_heads, width=width, stride=width, offset=0
        )
    if out == (heads + 2 * kv_heads) * width:
        start = (heads + kv_heads) * width
        maps["values last"] = HeadRows(
            heads=heads, kv_heads=kv_heads, width=width, stride=width, offset=start
        )
    if out == 3 * heads * width:
        maps["values of each head last"] = HeadRows(
            heads=heads, kv_heads=heads, width=width, stride=3 * width, offset=2 * width
        )
    is_possible = width * heads == into or "row by row" in maps or "second half" in maps
    return maps if is_possible else {}


def make_absorber(block: Block, reading: InputReaders, hf_config: Any) -> Absorber | None:
    """Return the absorber of a reading with its rows in this block, or None."""
    if reading.absorber is None:
        return None
    module, sizes = f"{block.name}.{reading.absorber}", {x.name: x for x in block.linears}
    if module not in sizes:
        return Absorber(module=module)
    into = sizes[f"{block.name}.{reading.readers[0]}"].in_features
    return Absorber(
        module=module, rows=list_row_maps(sizes[module].out_features, into, hf_config)[reading.rows]
    )


def iterate_absorber_candidates(
    block: Block, reading: InputReaders, hf_config: Any
) -> Iterator[InputReaders]:
    """Yield possible absorbers of a reading's scale: norms of its width, then other linears."""
    sizes = {x.name.removeprefix(f"{block.name}."): x for x in block.linears}
    into = sizes[reading.readers[0]].in_features
    for spec in block.others:
        module, _, kind = spec.name.removeprefix(f"{block.name}.").rpartition(".")
        if kind == "weight" and spec.shape == (into,):
            yield replace(reading, absorber=module)
    for name, linear in sizes.items():
        if name not in reading.readers:
            for rows in list_row_maps(linear.out_features, into, hf_config):
                yield replace(reading, absorber=name, rows=rows)


def make_groups(
    block: Block, readings: tuple[InputReaders, ...], hf_config: Any
) -> tuple[LinearGroup, ...]:
    """Return the readings as groups of this block."""
    return tuple(
        LinearGroup(
            name=f"{block.name}.{reading.readers[0]}.in",
            readers=tuple(f"{block.name}.{reader}" for reader in reading.readers),
            absorber=make_absorber(block, reading, hf_config),
        )
        for reading in readings
    )


def find_absorbers(
    trial: BlockTrial, readings: tuple[InputReaders, ...]
) -> tuple[InputReaders, ...]:
    """Return the readings, each with the first absorber that passes.

    They are unchanged if the absorbers fail together.
    """
    block, hf_config = trial.block, trial.meta_model.config
    absorbed = tuple(
        next(
            (
                candidate
                for candidate in iterate_absorber_candidates(block, reading, hf_config)
                if trial.holds(make_groups(block, (candidate,), hf_config))
            ),
            reading,
        )
        for reading in readings
    )
    is_valid = trial.holds(make_groups(block, absorbed, hf_config))
    return absorbed if is_valid else readings


def find_readings(
    config: Config, meta_model: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> list[tuple[InputReaders, ...]]:
    """Return each block's readings with absorbers.

    Blocks of one structure first try the readings of the first such block.
    """
    generator = torch.Generator().manual_seed(3)
    shape = (sum(LENGTHS), layout.embedding.in_features)
    rows = torch.randn(shape, generator=generator)  # [tokens, hidden]
    known: dict[tuple[str, ...], tuple[InputReaders, ...]] = {}
    result = []
    for block in layout.blocks:
        trial = BlockTrial(
            config=config,
            meta_model=meta_model,
            block=block,
            tensors=select_block_tensors(block, tensors),
            rows=rows,
        )
        readings = trial.readings()
        kind = tuple(name.removeprefix(block.name) for name in trial.tensors)
        best = known.get(kind, ())
        is_same = [r.readers for r in best] == [r.readers for r in readings]
        if not (is_same and trial.holds(make_groups(block, best, meta_model.config))):
            best = find_absorbers(trial, readings)
        known[kind] = best
        result.append(best)
    return result
