"""Data that ships with quantkit, in an installed wheel or in the repository."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from quantkit.errors import UsageError
from quantkit.io.files import is_file

BUILTIN_PREFIX = "builtin:"
_PACKAGE = Path(__file__).resolve().parent.parent


def locate_folder(kind: Literal["recipes", "calibration", "evals"]) -> Path:
    """Return the folder of recipes, calibration sets or evaluation tasks.

    Raises UsageError if the installation lacks it.
    """
    folders = (_PACKAGE / "data" / kind, _PACKAGE.parent / kind)
    for folder in folders:
        if folder.is_dir():
            return folder
    raise UsageError(
        f"{folders[0]}: expected the {kind} that ship with quantkit, found none; "
        "install quantkit again"
    )


def is_recipe_name(target: str) -> bool:
    """Return whether `target` is a YAML file, or a shipped recipe's name and no existing path."""
    path = Path(target)
    shipped = not path.suffix and is_file(locate_folder("recipes") / f"{target}.yaml")
    return path.suffix in (".yaml", ".yml") or (shipped and not path.exists())


def list_models() -> tuple[str, ...]:
    """Return the names of the models that ship with quantkit, without "builtin:"."""
    configs = (_PACKAGE / "data" / "models").glob("*/checkpoint/config.json")
    return tuple(sorted(path.parent.parent.name.replace("_", "-") for path in configs))


def locate_model(model: str) -> Path:
    """Return the checkpoint folder of "builtin:<name>"; raises UsageError with the known names."""
    name = model.removeprefix(BUILTIN_PREFIX)
    known = list_models()
    if name in known:
        return _PACKAGE / "data" / "models" / name.replace("-", "_") / "checkpoint"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {BUILTIN_PREFIX}{near[0]}? " if near else ""
    listing = ", ".join(BUILTIN_PREFIX + entry for entry in known)
    listing = listing or "none; install quantkit again"
    raise UsageError(f"source.model: no built-in model {model!r}; {hint}known: {listing}")
