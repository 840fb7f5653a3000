"""Records that a build makes of each block and each quantized linear."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantkit.contracts import Scheme
from quantkit.models.scaling import ScaleChoice
from quantkit.plan.plan import Plan

KEPT_CODES = "source"
"""Method and rounding of a linear whose codes are the source's."""


@dataclass(frozen=True, kw_only=True)
class ModuleRecord:
    """Record of one quantized linear for manifest and report; errors compare stored and original
    weight.

    relative_error: ||W - Q|| / ||W||; sqnr_db: the same in dB, None without any loss;
    output_relative_error: ||X (W - Q)^T|| / ||X W^T|| over the calibration inputs X, None without
    statistics; tokens: calibration tokens that reached its input; rescaled: whether its input was
    scaled, in the columns of W. If its rows absorbed the scale of a later linear's input, W is the
    scaled weight.
    method: the effective method; fallbacks: their names.
    """

    module: str
    rule: str
    method: str
    rounding: str
    scheme: Scheme
    relative_error: float
    sqnr_db: float | None
    output_relative_error: float | None
    tokens: int
    rescaled: bool
    fallbacks: tuple[str, ...]


def list_kept_codes(plan: Plan) -> list[ModuleRecord]:
    """Return the records of linears that keep the source's codes: nothing is lost."""
    return [
        ModuleRecord(
            module=name,
            rule=decision.rule,
            method=KEPT_CODES,
            rounding=KEPT_CODES,
            scheme=decision.codes,
            relative_error=0.0,
            sqnr_db=None,
            output_relative_error=None,
            tokens=0,
            rescaled=False,
            fallbacks=(),
        )
        for name, decision in plan.decisions.items()
        if decision.codes is not None
    ]


@dataclass(frozen=True, kw_only=True)
class CoverageRecord:
    """How far calibration spans the fidelity text's activations at one input (numerics.coverage).

    input: the first quantized module that reads it, or the routed experts; tokens: of calibration;
    effective_rank: directions of `channels` that they excite; unspanned: kind of text -> mean share
    of a token's energy outside of these directions. None for a gram that is not finite.
    """

    input: str
    channels: int
    tokens: int
    effective_rank: float | None
    unspanned: dict[str, float | None]


@dataclass(kw_only=True)
class BlockRecord:
    """Record of one block.

    `fold_change`: change of its output by folding, caused by rounding alone; `coverage`: None
    without calibration or without fidelity text.
    """

    name: str
    seconds: float = 0.0
    modules: list[ModuleRecord] = field(default_factory=list)
    choices: list[ScaleChoice] = field(default_factory=list)
    expert_tokens: tuple[int, ...] = ()
    output_error: float | None = None
    router_agreement: float | None = None
    coverage: tuple[CoverageRecord, ...] | None = None
    fold_change: float = 0.0
