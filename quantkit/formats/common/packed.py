"""Values that the formats of packed integer codes share: scale dtypes, group sizes, bits.

Without torch, since plans use them too.
"""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.contracts import Quantized, Scheme
from quantkit.dtypes import FLOAT_NAMES
from quantkit.errors import UsageError

SCALE_DTYPES: Mapping[str, str] = {x: FLOAT_NAMES[x] for x in ("float16", "bfloat16")}
"""The scale dtypes that engines load, and their names in safetensors."""
GROUP_SIZES = (32, 64, 128, -1)
OWN_FORMATS: Mapping[str, str] = {
    "nf4": "bitsandbytes",
    "fp8": "compressed_tensors",
    "int8": "compressed_tensors",
    "mxfp4": "compressed_tensors",
    "nvfp4": "compressed_tensors",
}
"""Kind of codes that only one format stores -> that format."""
SERVED_BITS = (4, 8)
"""Those of the Marlin kernels of vLLM and SGLang; others fall back to slow kernels or fail."""


def check_zero_points(quantized: Quantized, scheme: Scheme, format_name: str) -> None:
    """Raise UsageError unless the matrix has zero points exactly if its scheme is asymmetric."""
    if (quantized.zero is None) != scheme.symmetric:
        raise UsageError(
            f"format {format_name}: the scheme says symmetric: {str(scheme.symmetric).lower()}, "
            f"found a matrix {'without' if quantized.zero is None else 'with'} zero points; method "
            "and scheme must agree"
        )
