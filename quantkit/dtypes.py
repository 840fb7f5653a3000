"""Names of dtypes in safetensors and in torch, and their sizes. Without torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

DTYPE_BYTES: Mapping[str, int] = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
}  # fmt: skip
"""Bytes of a value, by its dtype's name in safetensors."""

FloatDtype = Literal["bfloat16", "float16", "float32"]
FLOAT_DTYPES: Mapping[str, FloatDtype] = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
"""Name in safetensors -> name in torch, of the dtypes of models and scales."""
FLOAT_NAMES: Mapping[str, str] = {dtype: name for name, dtype in FLOAT_DTYPES.items()}
"""Name in torch -> name in safetensors."""
