"""quantkit: quantize a language model as a recipe says, and report what it lost.

The public API (quantkit/api.py), imported on first use so that `import quantkit` is fast:

    import quantkit

    [planned] = quantkit.plan("./my-model")                  # a folder, a hub id, or a recipe
    [result] = quantkit.build("./my-model", bits=4, output="artifacts/mine")
    with quantkit.show_progress() as progress:               # bars, in notebooks too
        quantkit.build("recipe.yaml", on_progress=progress)
    quantkit.verify(result.path)
    artifact = quantkit.open_artifact(result.path)
    artifact.report.distribution                             # KL, perplexity, top-1
    artifact.modules.nlargest(10, "output_relative_error")            # with pandas installed
    quantkit.diff("artifacts/other", result.path)
    model = quantkit.load(result.path)                       # a transformers model

`quantkit.plan`, `.build`, `.verify` and `.diff` are functions and also subpackages. The attribute
is the function; modules of the subpackages are imported by `from quantkit.plan.plan import Plan`.
"""

from __future__ import annotations

import sys
from importlib import import_module
from types import ModuleType
from typing import TYPE_CHECKING

from quantkit.version import __version__

if TYPE_CHECKING:
    from quantkit.api import build, diff, load, open_artifact, plan, show_progress, verify

__all__ = [
    "__version__",
    "build",
    "diff",
    "load",
    "open_artifact",
    "plan",
    "show_progress",
    "verify",
]


class _Package(ModuleType):
    """The package: a subpackage with the name of a function does not replace the function.

    The import system binds each imported subpackage to its parent. Without this class
    `quantkit.plan` would be the function before the first import of quantkit.plan, and the
    subpackage afterwards.
    """

    def __setattr__(self, name: str, value: object) -> None:
        """Ignore the binding of a subpackage to the name of a function of the API."""
        if name in __all__ and isinstance(value, ModuleType):
            return
        super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def __getattr__(name: str) -> object:
    """Import a function of the API on first use (PEP 562)."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module("quantkit.api"), name)


def __dir__() -> list[str]:
    """Return the names of the API."""
    return sorted(__all__)
