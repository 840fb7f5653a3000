"""The summary of a plan for the terminal and `--json`, as frozen values; sizes are in bytes."""

from __future__ import annotations

from pydantic import BaseModel, ConfigDict

FROZEN = ConfigDict(frozen=True, extra="forbid")


class PlanSource(BaseModel):
    """The source model, and where its headers come from."""

    model_config = FROZEN
    model: str
    revision: str | None = None
    architecture: str
    dtype: str
    compared_with: str = ""  # the weights that the figures of fidelity refer to
    parameters: int
    parameters_without_mtp: int | None = (
        None  # the number in the model's name; None without an MTP layer
    )
    bytes: int
    code: tuple[str, ...] | None = None  # Python files carried over; None: not on this machine yet
    read_from: str  # "headers", or "the published config, offline: sizes are computed"


class PlanTotals(BaseModel):
    """The whole artifact."""

    model_config = FROZEN
    modules_quantized: int
    modules_kept: int
    parameters: int
    tensors: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float


class PlanMemory(BaseModel):
    """Bytes of host memory and scratch disk; `parts` add up to the peak."""

    model_config = FROZEN
    budget: int
    peak: int
    parts: dict[str, int] = {}
    scratch_disk: int = 0
    scratch_reason: str = ""  # its contents
    experts_per_wave: int | None = None


class PlanPart(BaseModel):
    """A part of the model that text does not run through; it is copied.

    decoded: weights in codes that the format does not hold, stored as their values.
    """

    model_config = FROZEN
    name: str
    tensors: int
    bytes: int
    decoded: int = 0


class PlanShard(BaseModel):
    """One output file."""

    model_config = FROZEN
    file: str
    tensors: int
    bytes: int


class PlanText(BaseModel):
    """A part of the calibration or fidelity text; `part` is empty for a set without parts.

    kinds: labels of its kinds; tokens: None for a whole set; version: hash or revision.
    """

    model_config = FROZEN
    use: str
    set: str
    part: str
    kinds: tuple[str, ...]
    share: float
    tokens: int | None
    license: str
    version: str


class PlanStream(BaseModel):
    """The calibration or fidelity text as a whole.

    sequences: None for all of the set; is_counted: `tokens` were counted by the tokenizer, and are
    else an upper bound.
    """

    model_config = FROZEN
    use: str
    set: str
    sequences: int | None
    length: int
    tokens: int
    is_counted: bool


class PlanTasks(BaseModel):
    """The benchmarks; limit: items of each, None for all; gold_solutions: items of each."""

    model_config = FROZEN
    names: tuple[str, ...] = ()
    limit: int | None = None
    gold_solutions: int = 0


class PlanEngine(BaseModel):
    """An engine of the format; tried: the version with which tests load the format."""

    model_config = FROZEN
    engine: str
    is_supported: bool
    tried: str = ""
    reason: str = ""  # why it does not load the artifact


class PlanTime(BaseModel):
    """Estimated seconds of a build and of its steps; None with the reason if there is no estimate.

    reason: with an estimate, the builds that it is scaled from.
    """

    model_config = FROZEN
    seconds: float | None = None
    steps: dict[str, float] = {}
    reason: str = ""


class PlanSummary(BaseModel):
    """The output of `quantkit plan`."""

    model_config = FROZEN
    recipe: str
    output: str
    source: PlanSource
    rules: tuple[PlanRule, ...]
    totals: PlanTotals
    memory: PlanMemory
    shards: tuple[PlanShard, ...]
    copied: tuple[PlanPart, ...] = ()  # parts of a wrapper besides its text model
    texts: tuple[PlanText, ...] = ()
    streams: tuple[PlanStream, ...] = ()
    tasks: PlanTasks = PlanTasks()
    gates: tuple[str, ...] = ()  # "kl_worst_kind <= 0.4"
    engines: tuple[PlanEngine, ...] = ()
    time: PlanTime | None = None  # None: not estimated, as in plan.json
    sampled: tuple[str, ...] = ()  # a sentence per text that the model samples itself
    costs: tuple[str, ...] = ()  # a sentence per measurement that a key of the recipe adds
    warnings: tuple[str, ...] = ()


class PlanRule(BaseModel):
    """The decisions of one rule, and their bytes."""

    model_config = FROZEN
    label: str
    match: str
    action: str  # "awq int4 g128", "keep source"
    modules: int
    parameters: int
    bytes_before: int
    bytes_after: int
    bits_per_weight: float
