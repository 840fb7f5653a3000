"""The texts that a build of a recipe runs. Pure."""

from __future__ import annotations

from quantkit.plan.plan import TextUse
from quantkit.recipe.schema import Recipe


def select_texts(recipe: Recipe) -> list[tuple[TextUse, str, int | None, int, int]]:
    """Return (stream, set, sequences, length, seed) of the texts that a build runs."""
    selected: list[tuple[TextUse, str, int | None, int, int]] = []
    calibration = recipe.calibration if recipe.needs_calibration else None
    if calibration:
        selected.append((
            "calibration",
            calibration.set,
            calibration.sequences,
            calibration.length,
            calibration.seed,
        ))
    if fidelity := recipe.fidelity:
        selected.append(("fidelity", fidelity.set, fidelity.windows, fidelity.length, 0))
    return selected
