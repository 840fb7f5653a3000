"""quantkit: quantize a language model as a recipe says, and report what it lost.

The public API (quantkit/api.py), imported on first use so that `import quantkit` is fast:

    import quantkit

    [plan] = quantkit.plan_recipe("tiny-v3-awq4")
    [result] = quantkit.build_recipe("tiny-v3-awq4", overrides={"output.path": "artifacts/mine"})
    quantkit.verify_artifact(result.path)
    quantkit.read_report(result.path).distribution
    quantkit.diff_artifacts("artifacts/tiny-v3-rtn4", result.path)
    model = quantkit.load(result.path)

`quantkit.plan`, `.build`, `.report`, `.diff` and `.verify` are subpackages, so the functions have
longer names.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.api import (
        build_recipe,
        diff_artifacts,
        load,
        plan_recipe,
        read_report,
        verify_artifact,
    )

__all__ = [
    "__version__",
    "build_recipe",
    "diff_artifacts",
    "load",
    "plan_recipe",
    "read_report",
    "verify_artifact",
]


def __getattr__(name: str) -> object:
    """Import a function of the API on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("quantkit.api"), name)


def __dir__() -> list[str]:
    """Return the names of the API."""
    return sorted(__all__)
