"""Where the data that ships with quantkit lies: in an installed wheel, or in the repository it runs from."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Literal

from quantkit.errors import UsageError

BUILTIN_PREFIX = "builtin:"
_PACKAGE = Path(__file__).resolve().parent.parent


def locate_folder(kind: Literal["recipes", "calibration", "evals"]) -> Path:
    """The folder of recipes, calibration sets or evaluation tasks; raises UsageError when the install lacks it."""
    places = (_PACKAGE / "data" / kind, _PACKAGE.parent / kind)
    for place in places:
        if place.is_dir():
            return place
    raise UsageError(
        f"{places[0]}: expected the {kind} that ship with quantkit, found none; install quantkit again"
    )


def is_recipe_name(target: str) -> bool:
    """Whether a name is a recipe's: of a YAML file, or of one that ships with quantkit where no such path is here."""
    path = Path(target)
    shipped = not path.suffix and (locate_folder("recipes") / f"{target}.yaml").is_file()
    return path.suffix in (".yaml", ".yml") or (shipped and not path.exists())


def list_models() -> tuple[str, ...]:
    """The models that ship with quantkit, as `builtin:<name>` names them."""
    found = (_PACKAGE / "data" / "models").glob("*/checkpoint/config.json")
    return tuple(sorted(path.parent.parent.name.replace("_", "-") for path in found))


def locate_model(model: str) -> Path:
    """The checkpoint folder of "builtin:<name>"; raises UsageError that lists the known ones."""
    name = model.removeprefix(BUILTIN_PREFIX)
    known = list_models()
    if name in known:
        return _PACKAGE / "data" / "models" / name.replace("-", "_") / "checkpoint"
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {BUILTIN_PREFIX}{near[0]}? " if near else ""
    listing = ", ".join(BUILTIN_PREFIX + entry for entry in known) or "none; install quantkit again"
    raise UsageError(f"source.model: no built-in model {model!r}; {hint}known: {listing}")
