"""What formats of packed integer codes agree on: scales, group sizes, bits. Without torch: plans ask too."""

from __future__ import annotations

from collections.abc import Mapping

from quantkit.contracts import Quantized, Scheme
from quantkit.errors import UsageError

SCALE_DTYPES: Mapping[str, str] = {"float16": "F16", "bfloat16": "BF16"}
"""The scales that engines hold beside codes, as safetensors calls them."""
GROUP_SIZES = (32, 64, 128, -1)
SERVED_BITS = (4, 8)
"""What the Marlin kernels of vLLM and SGLang know; other group sizes fall to slow kernels or fail."""


def check_zero_points(quantized: Quantized, scheme: Scheme, format_name: str) -> None:
    """UsageError when a matrix has zero points and its scheme says symmetric, or the other way round."""
    if (quantized.zero is None) != scheme.symmetric:
        raise UsageError(
            f"format {format_name}: the scheme says symmetric: {str(scheme.symmetric).lower()}, found a matrix "
            f"{'without' if quantized.zero is None else 'with'} zero points; method and scheme must agree"
        )
