"""The text sets that `set: auto` stands for on this machine.

In order: mixtures of the hub; mixtures of local files (QUANTKIT_DATA); text of the model itself;
the built-in text. All but the first are fallbacks, which plan and report name with the reason.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from quantkit.io import package_data
from quantkit.recipe.schema import Recipe
from quantkit.texts.corpus_spec import DATA_VARIABLE, read_spec


@dataclass(frozen=True, kw_only=True, slots=True)
class TextChoice:
    """A calibration and a fidelity set that belong together."""

    calibration: str
    fidelity: str


HUB = TextChoice(calibration="everyday", fidelity="everyday-heldout")
LOCAL = TextChoice(calibration="everyday-local", fidelity="everyday-local-heldout")
OWN = TextChoice(calibration="self", fidelity="self-heldout")
BUILTIN = TextChoice(calibration="general-math-code", fidelity="general-heldout")


def resolve_text_sets(
    recipe: Recipe, find_hub_fault: Callable[[], str], find_self_fault: Callable[[Recipe], str]
) -> Recipe:
    """Return the recipe with the sets that `auto` stands for; unchanged if it names its sets.

    find_hub_fault: why the hub cannot be read, or "". find_self_fault: why the model cannot sample
    the text of a recipe, or "".
    """
    if not recipe.automatic_texts:
        return recipe

    def apply_choice(choice: TextChoice, reason: str) -> Recipe:
        return recipe.choose_texts({
            "calibration": (choice.calibration, reason),
            "fidelity": (choice.fidelity, reason),
        })

    hub_fault = find_hub_fault()
    if not hub_fault:
        return apply_choice(HUB, "")
    missing = find_missing_files()
    reason = f"the hub cannot be read: {hub_fault}"
    if not missing:
        return apply_choice(LOCAL, reason)
    reason += f"; {missing}"
    own = apply_choice(OWN, reason)
    if not (fault := find_self_fault(own)):
        return own
    return apply_choice(BUILTIN, f"{reason}; {fault}")


def find_missing_files() -> str:
    """Return why the mixtures of local files cannot be read, or ""."""
    folder = package_data.locate_folder("calibration")
    for name in (LOCAL.calibration, LOCAL.fidelity):
        for part in read_spec(name, folder).parts:
            if part.local is None:
                continue
            if part.local_path is None:
                return f"{DATA_VARIABLE} is not set"
            if not part.local_path.is_file():
                return f"{DATA_VARIABLE} has no {part.local.file}"
    return ""
