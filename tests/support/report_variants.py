"""Variants of the example report."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from rich.console import Console, RenderableType
from support.report_example import FIDELITY

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.recipe.schema import Gate

GATES = {
    "kl_mean": Gate(max=0.0003),
    "kl_max": Gate(max=1),
    "top1": Gate(min=0.99, max=1),
    "tiny-v3-math": Gate(min_recovery=0.98),
    "tiny-v3-code": Gate(min_recovery=0.98),
    "router_agreement": Gate(min=0.99),
    "experts_uncalibrated": Gate(max=4),
}


def make_example(changes: Mapping[str, Any] | None = None) -> Fidelity:
    return Fidelity.model_validate({**FIDELITY, **(changes or {})})


def make_empty_report() -> Fidelity:
    """Return a report without measurements and quantized layers."""
    kept = {key: FIDELITY[key] for key in ("source", "artifact")}
    artifact = {**dict(kept["artifact"]), "roles": [], "serving": [], "notes": []}  # type: ignore[call-overload]
    return Fidelity.model_validate({**kept, "artifact": artifact})


def render_to_text(view: RenderableType, width: int = 100) -> str:
    text = io.StringIO()
    Console(file=text, width=width, color_system=None).print(view)
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
