"""Group sizes of every form of quantization_config, and what ranks may not cut."""

from __future__ import annotations

from typing import Any

import pytest

from quantkit.contracts import Config
from quantkit.serve.sizing.group_sizes import (
    get_split_unit,
    has_row_scales,
    read_stored_schemes,
)


def make_config(entry: object) -> Config:
    return Config(values={"quantization_config": entry})


def group(**weights: object) -> dict[str, object]:
    return {"targets": ["Linear"], "weights": weights}


CASES: dict[str, tuple[dict[str, Any], list[tuple[int | None, int | None]], int]] = {
    "awq": ({"quant_method": "awq", "bits": 4, "group_size": 128}, [(4, 128)], 128),
    "older awq": ({"quant_method": "awq", "w_bit": 4, "q_group_size": 64}, [(4, 64)], 64),
    "gptq per row": ({"quant_method": "gptq", "bits": 4, "group_size": -1}, [(4, -1)], 1),
    "gptq dynamic": (
        {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": 128,
            "dynamic": {"+:.*down_proj": {"bits": 8, "group_size": 32}, "-:lm_head": {},
                        "+:.*up_proj": {"bits": 8}},
        },
        [(4, 128), (8, 32), (8, 128)],
        128,
    ),
    "config groups": (
        {
            "quant_method": "compressed-tensors",
            "config_groups": {
                "group_0": group(num_bits=4, group_size=128, strategy="group"),
                "group_1": group(num_bits=8, strategy="channel", group_size=None),
                "group_2": group(num_bits=8, strategy="block", block_structure=[128, 96]),
            },
        },
        [(4, 128), (8, -1), (8, 96)],
        384,
    ),
    "fp8 blocks": ({"quant_method": "fp8", "weight_block_size": [128, 64]}, [(None, 64)], 64),
    "bitsandbytes 4": ({"quant_method": "bitsandbytes", "load_in_4bit": True}, [(4, 64)], 64),
    "bitsandbytes 8": ({"quant_method": "bitsandbytes", "load_in_8bit": True}, [(8, None)], 1),
    "mxfp4": ({"quant_method": "mxfp4"}, [(None, 32)], 32),
    "unknown": ({"quant_method": "x", "config_groups": {"group_0": 1}}, [], 1),
}  # fmt: skip


@pytest.mark.parametrize(("entry", "schemes", "unit"), CASES.values(), ids=CASES)
def test_every_form_is_read(
    entry: dict[str, Any], schemes: list[tuple[int | None, int | None]], unit: int
) -> None:
    assert [(x.bits, x.group_size) for x in read_stored_schemes(entry)] == schemes
    assert get_split_unit(make_config(entry)) == unit
    assert has_row_scales(entry) == any(size == -1 for _, size in schemes)


@pytest.mark.parametrize("entry", [None, [], "awq"])
def test_no_quantization_has_no_groups(entry: object) -> None:
    assert read_stored_schemes(entry) == () and get_split_unit(make_config(entry)) == 1
