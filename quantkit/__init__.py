"""quantkit: one recipe in, one quantized safetensors artifact out, with the evidence of what it lost."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

__version__ = "0.1.0"


def load(folder: str | Path, *, device: str | None = None, dtype: str | None = None) -> Any:
    """The artifact in `folder` as a transformers causal language model in eval mode (quantkit/loading.py).

    NF4 stays packed in bitsandbytes linears, routed experts too; other formats are unpacked to plain weights.
    device: "cpu", "cuda", ..., None for a GPU where there is one; dtype: "bfloat16", "float16" or "float32", None for
    the model's own. Raises QuantkitError for a folder that is no artifact, or for a missing package.
    """
    return import_module("quantkit.artifact.load_model").load_model(
        folder, device=device, dtype=dtype
    )  # torch starts here, not above
