"""The values of `quantkit diff --json`: differences of B from A.

Shares are 0 .. 1, KL is in nats per token, score differences in percentage points, sizes in bytes.
A difference is B - A, a ratio B / A. Names of many tensors are folded:
"model.layers.{1-3}.mlp.gate.weight".
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel

from quantkit.artifact.fidelity_schema import Figure, Number, Status
from quantkit.artifact.token_schema import Choices, Probability, TokenPlace
from quantkit.plan.plan_schema import FROZEN
from quantkit.report.samples import Answer

SideKind = Literal["artifact", "report", "source"]
Resolution = Literal["better", "worse", "not resolved", ""]
"""Direction in which the interval of B against A excludes "no change"; "" without an interval."""


class ComparedModel(BaseModel):
    """One of the two compared models."""

    model_config = FROZEN
    name: str
    kind: SideKind  # report: a single fidelity.json, without recipe, tensors and samples
    status: Status | Literal["source"]
    scheme: str
    format: str
    source: str


class Change(BaseModel):
    """A key of a recipe or plan, a version or a gate, with both values as text; None if absent."""

    model_config = FROZEN
    key: str
    a: str | None
    b: str | None


class TensorGroup(BaseModel):
    """Tensors or modules with the same change."""

    model_config = FROZEN
    change: Literal["added", "removed", "dtype", "shape", "decision", "scheme"]
    a: str
    b: str
    count: int
    names: tuple[str, ...]  # folded


class Quantity(BaseModel):
    """A size or a count of the whole artifact; unit "B" is bytes."""

    model_config = FROZEN
    name: str
    unit: Literal["B", "bits", ""]
    a: Number
    b: Number


class ErrorShift(BaseModel):
    """An error of a module or block on both sides.

    by: the measured value; output errors if both sides have them, else weight errors.
    """

    model_config = FROZEN
    name: str
    by: Literal["outputs", "weights", "hidden states", "same experts"]
    a: Number
    b: Number
    shift: Number


class DistributionDiff(BaseModel):
    """A figure of the next-token distributions on one domain.

    difference, ratio: B - A or B / A over the same tokens, with its 95 % interval; one of them, by
    the figure, and neither if tokens cannot be paired.
    """

    model_config = FROZEN
    domain: str
    tokens: int
    figure: str
    a: Number
    b: Number
    difference: Figure | None = None
    ratio: Figure | None = None
    resolved: Resolution = ""


class KLDiff(BaseModel):
    """KL of the same tokens on both sides, on one domain: figures that are robust to heavy tails.

    typical: geometric mean over the tokens of B / A; larger: share of the tokens whose KL is larger
    in B, ties half; larger_documents of `documents` have a typical ratio above 1, sign_p is the
    sign test over them, None if the documents are not known. trimmed: ratio of the means without
    the `left_out` tokens with the largest KL in either; top_share_*: share of the mean that its
    largest token has.
    """

    model_config = FROZEN
    domain: str
    tokens: int
    typical: Figure
    typical_a: float
    typical_b: float
    typical_resolved: Resolution
    larger: Figure
    larger_resolved: Resolution
    documents: int | None
    larger_documents: int | None
    sign_p: Number
    documents_resolved: Resolution
    trimmed: Figure
    trimmed_a: float
    trimmed_b: float
    trimmed_resolved: Resolution
    left_out: int
    top_share_a: float
    top_share_b: float


class LikelihoodDiff(BaseModel):
    """Log-likelihood per token of a task's gold solutions in nats; the difference is paired."""

    model_config = FROZEN
    task: str
    n: int
    source: Number = None
    a: Number = None
    b: Number = None
    difference: Figure | None = None
    resolved: Resolution = ""


class BenchmarkDiff(BaseModel):
    """One task, paired by item.

    lost: right in A and wrong in B; gained: wrong in A and right in B.
    """

    model_config = FROZEN
    task: str
    filter: str = ""
    n: int = 0
    source: Number = None
    a: Number = None
    b: Number = None
    delta_pp: Figure | None = None
    lost: int | None = None
    gained: int | None = None
    mcnemar_p: Number = None
    verdict: str = ""


class FlippedItem(BaseModel):
    """An item whose score differs, with both answers."""

    model_config = FROZEN
    task: str
    item: int
    prompt: str
    target: str
    source_score: Number
    a: Answer
    b: Answer

    @property
    def lost(self) -> bool:
        """Whether B scores less than A."""
        return self.b.score < self.a.score


class WorseToken(TokenPlace):
    """A token whose KL is larger in B, in nats, with the predictions of source, A and B.

    p_*: probability of the true token. Predictions are empty where a side did not keep them: it
    keeps those of its largest KL.
    """

    kl_a: float
    kl_b: float
    p_source: Probability
    p_a: Probability
    p_b: Probability
    source: Choices = ()
    a: Choices = ()
    b: Choices = ()


class LoadDiff(BaseModel):
    """A figure of two load tests at one concurrency."""

    model_config = FROZEN
    at_once: int
    figure: str
    a: float
    b: float


class Diff(BaseModel):
    """All differences."""

    model_config = FROZEN
    version: Literal[2] = 2
    headline: str = ""
    a: ComparedModel
    b: ComparedModel
    left_out: tuple[str, ...] = ()  # reasons for parts that are not comparable
    notes: tuple[str, ...] = ()  # conditions of the comparison
    sizes: tuple[Quantity, ...] = ()
    recipe: tuple[Change, ...] = ()
    plan: tuple[Change, ...] = ()
    made_with: tuple[Change, ...] = ()
    gates: tuple[Change, ...] = ()
    decisions: tuple[TensorGroup, ...] = ()
    tensors: tuple[TensorGroup, ...] = ()
    kl: tuple[KLDiff, ...] = ()
    distribution: tuple[DistributionDiff, ...] = ()
    worse_tokens: tuple[WorseToken, ...] = ()
    likelihood: tuple[LikelihoodDiff, ...] = ()
    benchmarks: tuple[BenchmarkDiff, ...] = ()
    blocks: tuple[ErrorShift, ...] = ()
    routers: tuple[ErrorShift, ...] = ()
    modules: tuple[ErrorShift, ...] = ()
    fallbacks: tuple[Change, ...] = ()
    flips: tuple[FlippedItem, ...] = ()
    load: tuple[LoadDiff, ...] = ()
    compared_items: int = 0
    reworded: int = 0  # items with other answers and the same score
