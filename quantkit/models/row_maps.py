"""Which rows of a linear may feed the input channels of another: by heads, halves, one by one."""

from __future__ import annotations

from typing import Any

from quantkit.contracts import HeadRows
from quantkit.models.small_instance import count_kv_heads, read_size


def list_row_maps(out: int, into: int, hf_config: Any) -> dict[str, HeadRows | None]:
    """Return the maps from `out` rows of a linear to `into` channels, by name."""
    heads = read_size(hf_config, "num_attention_heads") or 1
    kv_heads = count_kv_heads(hf_config)
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
    queries = heads // kv_heads  # of each key/value head
    if out == kv_heads * (queries + 2) * width:
        maps["values of each head last"] = HeadRows(
            heads=heads,
            kv_heads=kv_heads,
            width=width,
            stride=(queries + 2) * width,
            offset=(queries + 1) * width,
        )
    if out % heads == 0 and out // heads > width:  # multi-head latent attention: keys, then values
        stride = out // heads
        maps["end of each head"] = HeadRows(
            heads=heads, kv_heads=heads, width=width, stride=stride, offset=stride - width
        )
    is_possible = width * heads == into or "row by row" in maps or "second half" in maps
    return maps if is_possible else {}
