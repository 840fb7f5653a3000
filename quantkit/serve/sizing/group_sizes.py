"""Bits and group sizes that a quantization_config states, in the forms of every method.

A group is the inputs that share a scale: ranks that split the input of a linear must not cut one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from math import lcm

from quantkit.contracts import Config

BNB_BLOCK = 64
"""Weights per scale of bitsandbytes in 4 bits, if the config does not say."""
FIXED_GROUPS: Mapping[str, int] = {"mxfp4": 32, "nvfp4": 16, "mxfp8": 32}
"""Methods and formats of one group size."""
_GROUP_KEYS = (
    "group_size",
    "q_group_size",
    "weight_block_size",
    "block_structure",
    "bnb_4bit_blocksize",
)
_BITS_KEYS = ("bits", "num_bits", "w_bit", "weight_bits")


@dataclass(frozen=True, kw_only=True)
class StoredScheme:
    """Bits and group size of some linears; group_size -1 is one scale per row, None unknown."""

    bits: int | None
    group_size: int | None


def read_stored_schemes(entry: object) -> tuple[StoredScheme, ...]:
    """Return the schemes of a quantization_config, each once, in the order of the config."""
    return tuple(dict.fromkeys(_iterate_schemes(entry))) if isinstance(entry, Mapping) else ()


def _iterate_schemes(entry: Mapping[str, object]) -> Iterator[StoredScheme]:
    groups, dynamic = entry.get("config_groups"), entry.get("dynamic")
    if isinstance(groups, Mapping):  # compressed-tensors, modelopt
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if isinstance(weights, Mapping):
                yield _read_scheme(weights)
        return
    own = _read_scheme(entry)
    yield own
    if isinstance(dynamic, Mapping):  # gptq: exceptions by module; a skipped one has no scheme
        for name, exception in dynamic.items():
            if isinstance(exception, Mapping) and not str(name).startswith("-:"):
                yield _read_scheme({"group_size": own.group_size, "bits": own.bits, **exception})


def _read_scheme(values: Mapping[str, object]) -> StoredScheme:
    bits = next((n for key in _BITS_KEYS if type(n := values.get(key)) is int), None)
    method = str(values.get("quant_method", values.get("quant_algo", ""))).casefold()
    is_bnb = method == "bitsandbytes"
    if is_bnb:
        bits = 4 if values.get("load_in_4bit") else 8 if values.get("load_in_8bit") else bits
    for key in _GROUP_KEYS:
        size = values.get(key)
        if isinstance(size, list) and len(size) == 2:  # rows and columns of a block
            size = size[1]
        if type(size) is int and (size > 0 or size == -1):
            return StoredScheme(bits=bits, group_size=size)
    if values.get("strategy") == "channel":
        return StoredScheme(bits=bits, group_size=-1)
    if is_bnb and bits == 4:
        return StoredScheme(bits=bits, group_size=BNB_BLOCK)
    return StoredScheme(bits=bits, group_size=FIXED_GROUPS.get(method))


def has_row_scales(entry: object) -> bool:
    """Return whether a scheme has one scale per row, which any split of the input respects."""
    return any(scheme.group_size == -1 for scheme in read_stored_schemes(entry))


def get_split_unit(config: Config) -> int:
    """Return the inputs that no rank may cut: a multiple of every group; 1 without groups."""
    schemes = read_stored_schemes(config.values.get("quantization_config"))
    sizes = [scheme.group_size for scheme in schemes]
    return lcm(*(size for size in sizes if size is not None and size > 0))
