"""The texts that a build of a recipe runs."""

from __future__ import annotations

from quantkit.io.package_data import locate_folder
from quantkit.plan.plan import TextUse
from quantkit.recipe.schema import Recipe
from quantkit.texts.corpus_spec import is_shipped_set


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


def keeps_fidelity_text(recipe: Recipe) -> bool:
    """Return whether the artifact holds the tokens of the fidelity text.

    Unless the recipe says so, not those of the user's own files, which may be private.
    """
    text = recipe.fidelity
    if text is None or text.keep_text is not None:
        return text is not None and bool(text.keep_text)
    return is_shipped_set(text.set, locate_folder("calibration"))
