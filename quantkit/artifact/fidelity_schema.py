"""Schema of quantkit/fidelity.json, version 2: everything that a report shows, as frozen values.

For the schema of plans see plan.plan_schema. Shares (top-1, recovery, scores, agreement, errors)
are 0 .. 1; KL is in nats per token; differences of scores are in percentage points; sizes are in
bytes. A measured figure that is not finite has value None; a figure that was not measured is None
itself. Non-finite numbers become None when a value is made, because JSON cannot hold them.

Relative errors of weights, outputs and hidden states are one measure, the norm ratio
||artifact - source|| / ||source||. Reports of version 1, where outputs had an energy ratio, are
read and converted (convert_report.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from quantkit.artifact.convert_report import convert_report
from quantkit.artifact.figure_schema import Figure as Figure
from quantkit.artifact.figure_schema import Number as Number
from quantkit.artifact.layout import FIDELITY_VERSION
from quantkit.artifact.token_schema import MOST_TOKENS, WorstToken
from quantkit.artifact.yardstick_schema import NoiseFloor, Yardstick
from quantkit.figures import list_stored_keys
from quantkit.plan.plan_schema import FROZEN, PlanRule

Status = Literal["accepted", "rejected", "not judged"]


# ------------------------------------------------------------------------------- compared artifacts


class RoleSummary(BaseModel):
    """Treatment of the linears of one role, and the reason."""

    model_config = FROZEN
    role: str  # "routed_expert"
    quantized: int  # modules
    kept: int
    parameters: int
    stored: str  # "int4 g128 asymmetric", "BF16"
    reason: str  # the rule that decided, or why a role is never quantized unasked


class ServeCommand(BaseModel):
    """The command by which an engine serves the artifact."""

    model_config = FROZEN
    engine: str
    command: str


class ArtifactSummary(BaseModel):
    """The artifact: format, scheme, sizes, rules."""

    model_config = FROZEN
    name: str
    format: str
    scheme: str  # "AWQ, 4 bits, group 128, asymmetric, bfloat16 scales"
    parameters: int
    bytes_source: int
    bytes_artifact: int
    bits_per_weight: float  # over the quantized weights, scales and zero points included
    rules: tuple[PlanRule, ...] = ()
    roles: tuple[RoleSummary, ...] = ()
    serving: tuple[ServeCommand, ...] = ()
    notes: tuple[str, ...] = ()  # for operators
    tags: tuple[str, ...] = ()  # for the model hub: "awq", "4-bit"
    quantized_by: str = "quantkit"

    @property
    def bits_overall(self) -> float:
        """Bits per parameter of the whole artifact."""
        return 8 * self.bytes_artifact / self.parameters if self.parameters else 0.0


class License(BaseModel):
    """The source's license, carried over."""

    model_config = FROZEN
    id: str
    name: str | None = None
    link: str | None = None


class SourceModel(BaseModel):
    """The source of the artifact, and the baseline of the figures."""

    model_config = FROZEN
    model: str
    revision: str | None
    hash: str
    architecture: str
    dtype: str
    baseline: str  # "BF16 dequantization of FP8 128x128": the reference of the figures
    license: License | None = None
    languages: tuple[str, ...] = ()  # as its card states them: "en"
    library_name: str = "transformers"
    pipeline_tag: str = "text-generation"
    chat: bool = False  # it has a chat template


class TextPart(BaseModel):
    """A part of a mixture: the tokens that it contributed; `skipped` counts rows without text, and
    chats that were refused.

    answers: those of the tokens that are an assistant's; None for text that is no chat.
    """

    model_config = FROZEN
    name: str
    kind: str
    language: str
    license: str
    sha256: str
    sequences: int
    tokens: int
    answers: int | None = None
    skipped: int = 0
    description: str = ""


class TaskOverlap(BaseModel):
    """Prompts of a benchmark that appear in the calibration text (texts/overlap.py).

    reason: why the task was not checked; `items` is then 0.
    """

    model_config = FROZEN
    task: str
    items: int = 0
    overlapping: int = 0
    reason: str = ""


class TextSet(BaseModel):
    """A text set that was used for calibration or measurement.

    kinds: tokens per kind of text; the kinds are the domains of `DistributionResult`. Empty in
    reports of earlier versions. parts: empty for a set that is no mixture. chosen: why `auto`
    stands for this set, if it is a fallback. pooled: label -> kinds of few tokens that it pools.
    """

    model_config = FROZEN
    set: str
    license: str
    sha256: str
    sequences: int
    length: int
    tokens: int
    seed: int | None = None
    description: str = ""
    kinds: dict[str, int] = {}
    pooled: dict[str, tuple[str, ...]] = {}
    parts: tuple[TextPart, ...] = ()
    overlaps: tuple[TaskOverlap, ...] = ()  # of a calibration text
    chosen: str = ""
    repeated: int | None = None  # scored tokens whose context begins an earlier document too


# ------------------------------------------------------------------------------------------ figures


class DistributionResult(BaseModel):
    """Difference of the artifact's next-token distributions from the source's on one domain.

    Domain "all" pools every token. The other keys are those of `figures.list_stored_keys()`, each a
    `Figure` or None where it was not measured.
    """

    model_config = ConfigDict(frozen=True, extra="allow")
    __pydantic_extra__: dict[str, Figure | None] = Field(init=False)
    domain: str
    tokens: int

    @model_validator(mode="before")
    @classmethod
    def complete_figures(cls, values: object) -> object:
        """Put the figures in the order of the table, None where one is absent.

        Refuse other keys.
        """
        if not isinstance(values, dict):
            return values
        stored = list_stored_keys()
        unknown = [key for key in values if key not in (*stored, "domain", "tokens")]
        if unknown:
            raise ValueError(f"{', '.join(map(str, unknown))}: extra keys; expected figures")
        named = {key: values[key] for key in ("domain", "tokens") if key in values}
        return named | {key: values.get(key) for key in stored}

    @property
    def figures(self) -> Mapping[str, Figure | None]:
        """The stored figures by key."""
        return self.__pydantic_extra__


class LikelihoodResult(BaseModel):
    """Log-likelihood of a task's gold solutions after their prompts, teacher-forced, no generation.

    source, artifact: mean over items of the log-likelihood per token of the solution, nats;
    difference: artifact - source, paired by item.
    """

    model_config = FROZEN
    task: str
    status: Literal["ok", "not run"] = "ok"
    reason: str = ""  # why it was not run
    n: int = 0  # items
    tokens: int = 0  # of all solutions
    source: Number = None
    artifact: Number = None
    difference: Figure | None = None
    data_sha256: str = ""


class BlockError(BaseModel):
    """||artifact - source|| / ||source|| of the hidden states after a block."""

    model_config = FROZEN
    block: str
    relative_error: Number


class ModuleResult(BaseModel):
    """Treatment and errors of one matrix."""

    model_config = FROZEN
    name: str
    rule: str
    method: str | None  # None: kept
    rounding: str | None = None
    scheme: str
    relative_error: Number = None  # ||W - Q|| / ||W||
    sqnr_db: Number = None
    output_relative_error: Number = None  # ||W X - Q X|| / ||W X|| over the calibration tokens X
    tokens: int | None = None
    fallback: str | None = None  # Fallback.kind
    rescaled: bool = False


class RouterAgreement(BaseModel):
    """Share of a layer's top-k expert choices on which artifact and source agree."""

    model_config = FROZEN
    block: str
    agreement: Number


class ExpertTokens(BaseModel):
    """Calibration tokens that each routed expert of a layer saw."""

    model_config = FROZEN
    block: str
    tokens: tuple[int, ...]


class ExpertCoverage(BaseModel):
    """Distribution of the calibration tokens over the routed experts."""

    model_config = FROZEN
    min_tokens: int
    policy: str  # treatment of an expert below min_tokens
    layers: tuple[ExpertTokens, ...]

    def list_uncalibrated(self) -> list[tuple[str, int, int]]:
        """Return (block, expert, tokens) of every expert that saw fewer than `min_tokens`."""
        return [
            (layer.block, expert, tokens)
            for layer in self.layers
            for expert, tokens in enumerate(layer.tokens)
            if tokens < self.min_tokens
        ]


class InputCoverage(BaseModel):
    """How far calibration spans the fidelity text's activations at one input.

    input: the first quantized module that reads it, or the routed experts; tokens: of calibration;
    effective_rank: directions of `channels` that they excite; unspanned: kind of text -> mean share
    of a token's energy outside of these directions.
    """

    model_config = FROZEN
    input: str
    channels: int
    tokens: int
    effective_rank: Number
    unspanned: dict[str, Number]


class BlockCoverage(BaseModel):
    """Coverage at each input of a block's quantized linears."""

    model_config = FROZEN
    block: str
    inputs: tuple[InputCoverage, ...]


class FallbackUse(BaseModel):
    """A named rule that was used where the method could not be applied."""

    model_config = FROZEN
    kind: str
    meaning: str
    modules: tuple[str, ...]


class BenchmarkResult(BaseModel):
    """One task on source and artifact, item by item, with the statistics of evaluate.statistics."""

    model_config = FROZEN
    task: str
    metric: str = ""
    status: Literal["ok", "not run"] = "ok"
    reason: str = ""  # why it was not run
    n: int = 0
    source: Number = None
    artifact: Number = None
    delta_pp: Figure | None = None
    recovery: Figure | None = None
    lost: int | None = None  # items right in the source and wrong in the artifact
    gained: int | None = None
    mcnemar_p: Number = None
    verdict: str = ""
    required: Number = None  # recovery that "pass" needs; None in reports of version 1
    truncated: tuple[Number, Number] | None = (
        None  # share of answers cut at the token limit: source, artifact
    )
    unparsed: tuple[Number, Number] | None = (
        None  # share of answers without a parsable result: source, artifact
    )
    fault: str = ""  # why the task is not valid: too many answers are cut or have no result
    data_sha256: str = ""


Outcome = Literal["kept", "kept, not proven", "missed", "not judged"]
"""How a figure stands to a bound of a gate."""
UNPROVEN: Outcome = "kept, not proven"


class GateResult(BaseModel):
    """One bound of the recipe; ok is None if the figure was not measured.

    n: tokens or items of the figure, ci: its 95 % interval, None for one that has none, such as a
    size. headroom: from the value to the bound, in the figure's unit; negative: missed; None in
    reports of earlier versions. outcome: "kept, not proven" is a figure within its bound with an
    interval that crosses it; ok is then False if the recipe says `proven: true`, and the outcome
    "missed".
    """

    model_config = FROZEN
    figure: str
    bound: str  # "<= 0.05"
    value: Number
    ok: bool | None
    reason: str = ""
    n: int | None = None
    ci: tuple[Number, Number] | None = None
    outcome: Outcome = "not judged"
    headroom: Number = None

    @property
    def headroom_share(self) -> float | None:
        """Headroom as a share of an upper bound above 0; None for other bounds."""
        if self.headroom is None or self.value is None or not self.bound.startswith("<="):
            return None
        limit = self.value + self.headroom
        return self.headroom / limit if limit > 0 else None

    @property
    def is_unproven(self) -> bool:
        """Whether the figure keeps the bound and its interval crosses it."""
        return self.outcome == UNPROVEN

    @model_validator(mode="before")
    @classmethod
    def complete_outcome(cls, values: object) -> object:
        """Fill in the outcome of a gate without one, as in reports of version 1."""
        if not isinstance(values, dict) or "outcome" in values:
            return values
        words = {True: "kept", False: "missed", None: "not judged"}
        ok = values.get("ok")
        return {**values, "outcome": words[ok]} if ok in (True, False, None) else values


class EngineLoading(BaseModel):
    """Whether an engine's model and the artifact's tensors fit, by names and shapes.

    how: "run": the engine's own loader ran without values; "names": the map in its source was
    followed. tensors: with a parameter; skipped: left out by the engine on purpose.
    """

    model_config = FROZEN
    engine: str
    version: str = ""
    how: Literal["run", "names", "not checked"]
    reason: str = ""  # why it was not checked
    tensors: int = 0
    skipped: int = 0
    faults: tuple[str, ...] = ()


class Fidelity(BaseModel):
    """The whole report."""

    model_config = FROZEN
    version: Literal[2] = FIDELITY_VERSION
    converted_from: int | None = Field(default=None, exclude=True)  # version of the file, if older
    status: Status = "not judged"
    artifact: ArtifactSummary
    source: SourceModel
    calibration: TextSet | None = None
    measured_on: TextSet | None = None
    distribution: tuple[DistributionResult, ...] = ()
    yardstick: Yardstick | None = None  # only if the recipe asks for it
    noise_floor: NoiseFloor | None = None  # None: the figures themselves are in bfloat16
    worst_tokens: Annotated[tuple[WorstToken, ...], Field(max_length=MOST_TOKENS)] = ()
    keeps_text: bool = True  # False: the recipe keeps the fidelity text out of the artifact
    likelihood: tuple[LikelihoodResult, ...] = ()
    blocks: tuple[BlockError, ...] = ()
    modules: tuple[ModuleResult, ...] = ()
    routers: tuple[RouterAgreement, ...] = ()
    experts: ExpertCoverage | None = None
    coverage: tuple[BlockCoverage, ...] | None = None  # None: no calibration or no fidelity text
    fallbacks: tuple[FallbackUse, ...] = ()
    benchmarks: tuple[BenchmarkResult, ...] = ()
    gates: tuple[GateResult, ...] = ()
    versions: dict[str, str] = {}
    seeds: dict[str, int] = {}
    hashes: dict[str, str] = {}  # "recipe", "plan", ...
    command: str = ""  # builds the artifact again in an empty folder
    source_tensors: str = ""  # how the tensors of the source are accounted for
    loading: tuple[EngineLoading, ...] = ()  # () in earlier reports
    needs: tuple[str, ...] = ()  # local files that the command reads

    @model_validator(mode="before")
    @classmethod
    def convert_older(cls, values: object) -> object:
        """Convert the values of a report of an earlier version."""
        return convert_report(values) if isinstance(values, dict) else values

    def find_worst_inputs(self) -> dict[str, tuple[Number, InputCoverage]]:
        """Return kind of text -> its largest unspanned share and the first input that has it.

        A share that is not finite is the largest.
        """
        worst = dict[str, tuple[Number, InputCoverage]]()
        for place in (place for block in self.coverage or () for place in block.inputs):
            for kind, share in place.unspanned.items():
                known, _ = worst.get(kind, (-1.0, place))
                if known is not None and (share is None or share > known):
                    worst[kind] = (share, place)
        return worst

    def to_json(self) -> str:
        """Return the text of fidelity.json: the same report gives the same bytes."""
        return (
            json.dumps(self.model_dump(mode="json"), indent=1, ensure_ascii=False, allow_nan=False)
            + "\n"
        )
