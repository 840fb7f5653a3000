"""What a build records of each block and each quantized linear."""

from __future__ import annotations

from dataclasses import dataclass, field

from quantkit.contracts import Scheme
from quantkit.models.scaling import ScaleChoice


@dataclass(frozen=True, kw_only=True)
class ModuleRecord:
    """What the manifest and the report say of one quantized linear. Errors compare stored with
    original weights.

    relative_error: ||W - Q|| / ||W||; sqnr_db: the same in dB, None where nothing is lost;
    output_error: share of the output's energy that is lost on the calibration inputs, None without
    statistics; tokens: calibration tokens that reached its input; rescaled: whether its input was,
    in the columns of W. Where its rows absorbed the scale of a later linear's input, W is the
    weight with them folded. method: who chose the codes; fallbacks: names, if any.
    """

    module: str
    rule: str
    method: str
    rounding: str
    scheme: Scheme
    relative_error: float
    sqnr_db: float | None
    output_error: float | None
    tokens: int
    rescaled: bool
    fallbacks: tuple[str, ...]


@dataclass(kw_only=True)
class BlockRecord:
    """What the report says of one block.

    `fold_change`: how much folding moved its output, by rounding alone.
    """

    name: str
    seconds: float = 0.0
    modules: list[ModuleRecord] = field(default_factory=list)
    choices: list[ScaleChoice] = field(default_factory=list)
    expert_tokens: tuple[int, ...] = ()
    output_error: float | None = None
    router_agreement: float | None = None
    fold_change: float = 0.0
