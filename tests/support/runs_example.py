"""Artifacts of a folder, as `quantkit runs` reads them."""

from __future__ import annotations

from typing import Any

from support.report_example import FIDELITY
from support.report_variants import make_example

from quantkit.recipe.schema import Gate
from quantkit.report import gates
from quantkit.report.runs import Run, mark_front


def make_run(
    name: str,
    size: int,
    kl: float,
    *,
    format_name: str = "awq",
    gate: float = 1.0,
    source: str = "builtin:tiny-v3",
) -> Run:
    """Return an artifact with a size in bytes, and a mean KL whose interval is 0.8 to 1.3 of it."""
    artifact: dict[str, Any] = {
        **dict(FIDELITY["artifact"]),  # type: ignore[call-overload]
        "name": name,
        "bytes_artifact": size,
        "format": format_name,
        "serving": [{"engine": "vLLM", "command": "vllm"}],
    }
    measured = {"value": kl, "ci": [0.8 * kl, 1.3 * kl]}
    rows = [
        {"domain": "all", "tokens": 900, "kl_mean": measured},
        {"domain": "math", "tokens": 400, "kl_mean": {"value": 2 * kl}},
    ]
    model: dict[str, Any] = {**dict(FIDELITY["source"]), "model": source}  # type: ignore[call-overload]
    model["hash"] = ("5f" if source == "builtin:tiny-v3" else "ab") * 32
    report = make_example({"artifact": artifact, "distribution": rows, "source": model})
    return Run(name=name, fidelity=gates.apply_gates({"kl_mean": Gate(max=gate)}, report))


def make_runs() -> list[Run]:
    """Return artifacts on and off the front, one of them broken."""
    return mark_front([
        make_run("tiny-awq4", 6_400_000, 0.00036),
        make_run("tiny-rtn4", 6_410_000, 0.0021, gate=0.001),
        make_run("tiny-gptq3", 4_900_000, 0.009, format_name="gptq", gate=0.01),
        make_run("tiny-awq8", 7_100_000, 0.00001),
        Run(name="half.building", fault="an interrupted build, or one in progress"),
    ])
