"""What a layout without a table is proven by: a small random instance of the same configuration, run both ways.

The instance has all blocks of the real model and every switch of its config.json, in small widths. On it

    logits       run block by block, as a build runs them, equal those of transformers' own forward;
    readers      linears are grouped when they were given the same values, and each is called once with all tokens;
    absorbers    a tensor absorbs a group's scale if dividing it and multiplying the readers changes nothing.

What is not proven is not used: without an absorber a group's input is not scaled.
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
"""Tokens of the two sequences: unequal, so that padding is tried, and longer than the window."""
WINDOW = 8
VOCABULARY = 96
LOGITS_TOLERANCE = 1e-4
"""Relative difference of logits that two orders of float32 sums explain; what is forgotten makes 1e-2 and more."""
SCALING_TOLERANCE = 1e-6
"""The same for a fold by powers of two, which changes no bit but for what a kernel adds up in another order."""


@dataclass(frozen=True, kw_only=True)
class InputReaders:
    """Linears of a block that read one input, and who absorbs its scale in which of the ways of `row_maps`."""

    readers: tuple[str, ...]  # within the block
    absorber: str | None = None
    rows: str = ""


# ------------------------------------------------------------------------------------------------- the small instance


def reduce_config(config: Config, hf_config: Any) -> Config:
    """The same configuration with few heads, narrow layers, a small vocabulary and a short window."""
    heads, hidden = hf_config.num_attention_heads, hf_config.hidden_size
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    width = getattr(hf_config, "head_dim", None) or hidden // heads
    some = min(kv_heads, 2)
    few = some * min(heads // kv_heads, 2)
    narrow = few * width + (0 if hidden == heads * width else 64)
    wanted = {
        "hidden_size": narrow,
        "num_attention_heads": few,
        "num_key_value_heads": some,
        "intermediate_size": narrow + 32,
        "vocab_size": VOCABULARY,
        "sliding_window": WINDOW,
    }
    names = {key: hf_config.attribute_map.get(key, key) for key in wanted}
    changes = {
        names[key]: value
        for key, value in wanted.items()
        if isinstance(getattr(hf_config, key, None), int)
    }
    tokens = {"pad_token_id": None, "bos_token_id": 0, "eos_token_id": 1}
    return Config(values={**config.values, **changes, **tokens}, where=config.where)


def make_random_tensors(bones: MetaModel) -> dict[str, Tensor]:
    """Values for every tensor of the model: matrices that keep the scale of their input, norms around 1, biases."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in bones.model.state_dict().items():
        value = torch.randn(tensor.shape, generator=generator)
        if tensor.dim() > 1:
            found[name] = value * tensor.shape[-1] ** -0.5
        else:
            found[name] = 0.1 * value + (0 if name.endswith(".bias") else 1)
    return found


def select_block_tensors(block: Block, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A block's tensors, by full name."""
    return {name: tensor for name, tensor in tensors.items() if name.startswith(f"{block.name}.")}


# ------------------------------------------------------------------------------------------------------------- logits


def check_logits(
    config: Config, bones: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> None:
    """Run the instance both ways; CheckpointError when the logits differ, or when a layer cannot be run alone."""
    ids = torch.randint(0, VOCABULARY, (sum(LENGTHS),), generator=torch.Generator().manual_seed(1))
    head = (layout.head or layout.embedding).name
    try:
        rows = tensors[f"{layout.embedding.name}.weight"][ids]  # [tokens] -> [tokens, hidden]
        for block in layout.blocks:
            layer, _ = make_decoder_layer(bones, block, select_block_tensors(block, tensors))
            rows, _ = run_layer(bones, layer, rows, LENGTHS)
        ours = (
            make_final_norm(bones, layout, tensors)(rows) @ tensors[f"{head}.weight"].T
        )  # -> [tokens, vocabulary]
        model = full_model.make_model(bones, layout, tensors.__getitem__)
        with torch.no_grad():
            parts = [model(part[None], use_cache=False).logits[0] for part in ids.split(LENGTHS)]
    except Exception as fault:  # whatever transformers' layer needs and is not given
        raise make_refusal(
            config, f"its layers cannot be run one by one ({type(fault).__name__}: {fault})"
        ) from fault
    theirs = torch.cat(parts)  # [tokens, vocabulary]
    change = float((ours - theirs).norm() / theirs.norm())
    if not change <= LOGITS_TOLERANCE:
        raise make_refusal(
            config,
            f"run block by block, a small instance gives other logits than transformers (by {change:.0e} of their "
            "size), so something outside the blocks, such as a multiplier of embedding or logits, is not reproduced",
        )


# ------------------------------------------------------------------------------------------------------- who reads what


@dataclass(frozen=True, kw_only=True)
class BlockTrial:
    """A block of the instance with an input and what it makes of it."""

    config: Config
    bones: MetaModel
    block: Block
    tensors: Mapping[str, Tensor]  # of the block, by full name
    rows: Tensor  # [tokens, hidden]

    @cached_property
    def out(self) -> Tensor:
        """[tokens, hidden] behind the block as it is."""
        return self.run(self.tensors)

    def run(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """[tokens, hidden] behind the block with these tensors."""
        layer, _ = make_decoder_layer(self.bones, self.block, tensors)
        return run_layer(self.bones, layer, self.rows, LENGTHS)[0]

    def readings(self) -> tuple[InputReaders, ...]:
        """The linears by the values they were given; CheckpointError for one not called once with every token."""
        layer, _ = make_decoder_layer(self.bones, self.block, self.tensors)
        names = [linear.name.removeprefix(f"{self.block.name}.") for linear in self.block.linears]
        calls = record_inputs(
            layer, names, lambda: run_layer(self.bones, layer, self.rows, LENGTHS)
        )
        tokens = len(LENGTHS) * max(LENGTHS)
        groups: list[tuple[Tensor, list[str]]] = []
        for name, linear in zip(names, self.block.linears, strict=True):
            given = calls[name]
            if len(given) != 1 or given[0].numel() != tokens * linear.in_features:
                raise make_refusal(
                    self.config,
                    f"{linear.name} was called {len(given)} times for one block, or not with every token once",
                )
            match = next(
                (
                    readers
                    for x, readers in groups
                    if x.shape == given[0].shape and torch.equal(x, given[0])
                ),
                None,
            )
            if match is None:
                groups.append((given[0], match := []))
            match.append(name)
        return tuple(InputReaders(readers=tuple(readers)) for _, readers in groups)

    def holds(self, groups: tuple[LinearGroup, ...]) -> bool:
        """Whether scaling the inputs of these groups leaves the block's output as it is."""
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
    """The inputs of every call of these modules while `forward` runs."""
    seen: dict[str, list[Tensor]] = {name: [] for name in names}

    def remember(name: str) -> Any:
        def hook(_module: nn.Module, args: tuple[Tensor, ...]) -> None:
            seen[name].extend(args[:1])

        return hook

    handles = [
        layer.get_submodule(name).register_forward_pre_hook(remember(name)) for name in names
    ]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return seen


def make_random_scale(absorber: Absorber, width: int, generator: torch.Generator) -> Tensor:
    """[width] powers of two other than 1, alike for channels that share a row."""
    index = torch.tensor(absorber.rows.index() if absorber.rows else range(width))
    exponent = torch.randint(0, 4, (int(index.max()) + 1,), generator=generator)
    return torch.tensor([0.25, 0.5, 2.0, 4.0])[exponent][index]


# ---------------------------------------------------------------------------------------------------------- absorbers


def list_row_maps(out: int, into: int, hf_config: Any) -> dict[str, HeadRows | None]:
    """The ways in which `out` rows of a linear can make `into` channels, by name."""
    heads = hf_config.num_attention_heads
    kv_heads = getattr(hf_config, "num_key_value_heads", None) or heads
    width = into // heads
    found: dict[str, HeadRows | None] = {}
    if out == into:
        found["row by row"] = None
    if out == 2 * into:
        found["second half"] = HeadRows(heads=1, kv_heads=1, width=into, stride=into, offset=into)
    if out == kv_heads * width:
        found["values"] = HeadRows(
            heads=heads, kv_heads=kv_heads, width=width, stride=width, offset=0
        )
    if out == (heads + 2 * kv_heads) * width:
        start = (heads + kv_heads) * width
        found["values last"] = HeadRows(
            heads=heads, kv_heads=kv_heads, width=width, stride=width, offset=start
        )
    if out == 3 * heads * width:
        found["values of each head last"] = HeadRows(
            heads=heads, kv_heads=heads, width=width, stride=3 * width, offset=2 * width
        )
    return found if width * heads == into or "row by row" in found or "second half" in found else {}


def make_absorber(block: Block, reading: InputReaders, hf_config: Any) -> Absorber | None:
    """The absorber of a reading, with the rows as they lie in this block."""
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
    """Who might absorb the scale of a reading: norms of its width, then earlier linears whose rows could make it."""
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
    """The readings as groups of this block."""
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
    """The readings with the first absorber that was proven for each; without any if they fail together."""
    block, hf_config = trial.block, trial.bones.config
    found = tuple(
        next(
            (
                one
                for one in iterate_absorber_candidates(block, reading, hf_config)
                if trial.holds(make_groups(block, (one,), hf_config))
            ),
            reading,
        )
        for reading in readings
    )
    return found if trial.holds(make_groups(block, found, hf_config)) else readings


def find_readings(
    config: Config, bones: MetaModel, layout: Layout, tensors: Mapping[str, Tensor]
) -> list[tuple[InputReaders, ...]]:
    """Per block who reads what and who absorbs it; blocks built alike are tried with what the first one gave."""
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(
        sum(LENGTHS), layout.embedding.in_features, generator=generator
    )  # [tokens, hidden]
    known: dict[tuple[str, ...], tuple[InputReaders, ...]] = {}
    found = []
    for block in layout.blocks:
        trial = BlockTrial(
            config=config,
            bones=bones,
            block=block,
            tensors=select_block_tensors(block, tensors),
            rows=rows,
        )
        readings = trial.readings()
        kind = tuple(name.removeprefix(block.name) for name in trial.tensors)
        best = known.get(kind, ())
        alike = tuple(one.readers for one in best) == tuple(one.readers for one in readings)
        if not (alike and trial.holds(make_groups(block, best, bones.config))):
            best = find_absorbers(trial, readings)
        known[kind] = best
        found.append(best)
    return found
