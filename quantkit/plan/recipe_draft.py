"""A draft of a recipe for a model: the request, how codes are stored, and the scheme. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from quantkit import registry
from quantkit.recipe.quantize import SCHEME_VALUES
from quantkit.recipe.write_recipe import Choice


@dataclass(frozen=True, kw_only=True)
class RecipeRequest:
    """A model, and the keys of its recipe that are set; None: chosen.

    reasons: of keys that are set; by default the user requested them.
    """

    model: str
    method: str | None = None
    scheme: str | None = None
    bits: int | None = None
    format: str | None = None
    rules: str | None = None
    output: str | None = None
    reasons: Mapping[str, str] = field(default_factory=dict)

    def explain(self, key: str) -> str:
        """Return the reason for a key that is set."""
        return self.reasons.get(key, "as requested")


@dataclass(frozen=True, kw_only=True)
class Storage:
    """How codes are stored: a format, and whether the scheme has zero points."""

    format_name: str
    symmetric: bool


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A request with a storage and a group size, before the reasons are known."""

    request: RecipeRequest
    method: str
    scheme: str
    bits: int
    rules: str
    storage: Storage
    group_size: int


def list_scheme(draft: Draft) -> tuple[Choice, ...]:
    """Return the keys of `quantize` with their values, without reasons."""
    if draft.method == "nf4":
        return (Choice(key="method", value="nf4"),)
    if draft.scheme in SCHEME_VALUES:  # the other keys follow
        return (
            Choice(key="scheme", value=draft.scheme),
            Choice(key="method", value=draft.method),
            Choice(key="rounding", value=choose_rounding(draft.method)),
        )
    return (
        Choice(key="method", value=draft.method),
        Choice(key="rounding", value=choose_rounding(draft.method)),
        Choice(key="bits", value=str(draft.bits)),
        Choice(key="group_size", value=str(draft.group_size)),
        Choice(key="symmetric", value=str(draft.storage.symmetric).lower()),
    )


def choose_rounding(method: str) -> str:
    """Return the rounding that measured best: GPTQ if the method learns from calibration."""
    return "gptq" if registry.get_method(method).needs_stats else "nearest"
