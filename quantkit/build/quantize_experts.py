"""Scaling and quantization of a slice of routed experts: a pure function, to run on any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from quantkit.artifact.records import ModuleRecord
from quantkit.build.block_plan import ExpertsPlan, LinearPlan
from quantkit.build.expert_ops import (
    Activation,
    ExpertBiases,
    ExpertSlice,
    SliceStats,
    sum_outputs,
)
from quantkit.build.quantize_linear import (
    QuantizedLinear,
    QuantizeRequest,
    quantize_group,
    select_expert_stats,
)
from quantkit.contracts import Format, InputStats
from quantkit.models import scaling
from quantkit.models.layers import RouterOutput

UNDER_CALIBRATED = {"shared_gram": "shared-gram", "rtn": "rtn-too-few-tokens"}
"""Policy of the recipe -> the name of the fallback in manifest and report."""


@dataclass(frozen=True, kw_only=True)
class ExpertSettings:
    """What holds for all experts of a block once its scales are chosen.

    `input_scale` [hidden] multiplies the input channels of gate and up; `under_calibrated` are the
    experts with too few tokens, which `policy` of the recipe decides over; `sample`: tokens whose
    routed output by scaled weights is returned, to check the scaling.
    """

    plan: ExpertsPlan
    linears: Mapping[str, LinearPlan]
    formats: tuple[Format, ...]
    input_scale: Tensor | None = None
    under_calibrated: frozenset[int] = frozenset()
    policy: str | None = None
    sample: RouterOutput | None = None
    activation: Activation | None = None  # of the sample's run


@dataclass(frozen=True, kw_only=True)
class ExpertResult:
    """A quantized slice: tensors by full name for each format, kept weights (float32), and the
    linears' figures.

    `weights` are the values as stored, float32: `expert_outputs` computes the streams' next states
    from them, chunk by chunk. `sample_output` [tokens, hidden] is the sample's routed output by
    scaled weights.
    """

    tensors: tuple[Mapping[str, Tensor], ...]
    kept: Mapping[str, Tensor]
    records: tuple[ModuleRecord, ...]
    weights: ExpertSlice
    sample_output: Tensor | None


@dataclass(kw_only=True)
class _Collected:
    """Results of the experts of a slice so far: mutable."""

    tensors: tuple[dict[str, Tensor], ...]
    kept: dict[str, Tensor] = field(default_factory=dict)
    records: list[ModuleRecord] = field(default_factory=list)

    def add(self, linear: QuantizedLinear) -> None:
        """Add a quantized linear."""
        for stored, tensors in zip(self.tensors, linear.tensors, strict=True):
            stored.update(tensors)
        self.records.append(linear.record)


def quantize_experts(
    experts: ExpertSlice, stats: SliceStats | None, settings: ExpertSettings
) -> ExpertResult:
    """Scale and quantize a slice, expert by expert, and leave its arguments as they are.

    Raises NumericsError for inputs, errors or scales that are not finite.
    """
    collected = _Collected(tensors=tuple({} for _ in settings.formats))
    common = share_scaled_input(stats, settings)
    stored: list[dict[str, Tensor]] = []
    biases: list[tuple[int, ExpertBiases]] = []
    sample_output = None
    for e in range(len(experts)):
        scaled, into, inner, is_down_scaled = scale_expert(experts, stats, common, e, settings)
        if settings.sample is not None and settings.activation is not None:
            output = sum_outputs(scaled, settings.sample, settings.activation)
            sample_output = output if sample_output is None else sample_output + output
        stored.append(quantize_expert(scaled, into, inner, is_down_scaled, settings, collected))
        if scaled.biases is not None:
            biases.append((scaled.first, scaled.biases))
    names = settings.plan.experts
    stacked = {
        projection: torch.stack([weights[projection] for weights in stored])  # [n, out, in]
        for projection in names.projections
    }
    rounded = [store_biases(number, each, settings, collected) for number, each in biases]
    return ExpertResult(
        tensors=collected.tensors,
        kept=collected.kept,
        records=tuple(collected.records),
        weights=ExpertSlice(
            first=experts.first,
            gate=None if names.gate is None else stacked[names.gate],
            up=stacked[names.up],
            down=stacked[names.down],
            biases=join_biases(rounded) if rounded else None,
        ),
        sample_output=sample_output,
    )


def share_scaled_input(stats: SliceStats | None, settings: ExpertSettings) -> InputStats | None:
    """Return the scaled statistics of gate's and up's input where all experts of a slice share
    them.
    """
    if stats is None or len(stats.into.gram) > 1:
        return None
    return scale_stats(select_expert_stats(stats.into, 0), settings.input_scale)


def scale_stats(stats: InputStats | None, scale: Tensor | None) -> InputStats | None:
    """Return statistics of x / scale, in new tensors."""
    if stats is None or scale is None:
        return stats
    copy = InputStats(
        gram=stats.gram.clone(),
        mean_abs=stats.mean_abs,
        n_tokens=stats.n_tokens,
        cross=None if stats.cross is None else stats.cross.clone(),
    )
    return scaling.rescale_stats(copy, scale)


def scale_expert(
    experts: ExpertSlice,
    stats: SliceStats | None,
    common: InputStats | None,
    e: int,
    settings: ExpertSettings,
) -> tuple[ExpertSlice, InputStats | None, InputStats | None, bool]:
    """Return expert `e` of a slice after scaling, the statistics of its inputs, and whether down's
    input was scaled.

    The rows of up absorb the scale of down's input. An expert with too few tokens under policy
    "rtn" chooses no scale.
    """
    gate = None if experts.gate is None else experts.gate[e]
    up, down, number = experts.up[e], experts.down[e], experts.first + e
    biases = select_biases(experts, e)
    scale = settings.input_scale
    if scale is not None:
        gate, up = None if gate is None else gate * scale, up * scale
    if stats is None:
        return one_expert(number, gate, up, down, biases), None, None, False
    into = common
    if into is None:
        into = scale_stats(select_expert_stats(stats.into, e), scale)
    inner = select_expert_stats(stats.inner, e)
    is_unlearned = settings.policy == "rtn" and number in settings.under_calibrated
    best = None if is_unlearned else search_down_scale(experts, stats, e, settings)
    if best is None:
        return one_expert(number, gate, up, down, biases), into, inner, False
    if biases is not None:
        biases = replace(biases, up=biases.up / best)
    scaled = one_expert(number, gate, up / best[:, None], down * best, biases)
    return scaled, into, scale_stats(inner, best), True


def one_expert(
    number: int, gate: Tensor | None, up: Tensor, down: Tensor, biases: ExpertBiases | None
) -> ExpertSlice:
    """Return a slice of one expert: gate, up [intermediate, hidden], down [hidden, intermediate],
    biases of one expert.
    """
    return ExpertSlice(
        first=number,
        gate=None if gate is None else gate[None],
        up=up[None],
        down=down[None],
        biases=biases,
    )


def select_biases(experts: ExpertSlice, e: int) -> ExpertBiases | None:
    """Return the biases of expert `e` of a slice, [1, out] each; None without any."""
    if experts.biases is None:
        return None
    gate, up, down = (experts.biases.gate, experts.biases.up, experts.biases.down)
    rows = slice(e, e + 1)
    return ExpertBiases(gate=None if gate is None else gate[rows], up=up[rows], down=down[rows])


def join_biases(parts: Sequence[ExpertBiases]) -> ExpertBiases:
    """Return the biases of several experts as those of one slice."""
    gates = [each.gate for each in parts if each.gate is not None]
    return ExpertBiases(
        gate=torch.cat(gates) if gates else None,
        up=torch.cat([each.up for each in parts]),
        down=torch.cat([each.down for each in parts]),
    )


def store_biases(
    number: int, biases: ExpertBiases, settings: ExpertSettings, collected: _Collected
) -> ExpertBiases:
    """Collect the biases of one expert as they are; return them as stored, float32."""
    names = settings.plan.experts

    def store(projection: str | None, bias: Tensor | None) -> Tensor | None:
        if projection is None or bias is None:
            return None
        name = names.linear(number, projection)
        collected.kept[f"{name}.bias"] = bias[0]
        dtype = settings.linears[name].bias_dtype
        return bias if dtype is None else bias.to(dtype).float()

    up, down = store(names.up, biases.up), store(names.down, biases.down)
    assert up is not None and down is not None
    return ExpertBiases(gate=store(names.gate, biases.gate), up=up, down=down)


def search_down_scale(
    experts: ExpertSlice, stats: SliceStats, e: int, settings: ExpertSettings
) -> Tensor | None:
    """Return the best scale [intermediate] of the input of a down projection; None when none is
    better.
    """
    plan, rescale = settings.plan, settings.plan.down_rescale
    if rescale is None or plan.scheme is None:
        return None
    name = plan.experts.linear(experts.first + e, plan.experts.down)
    mean_abs, gram = stats.inner.mean_abs[e], stats.inner.gram[e]
    scaling.check_input(name, mean_abs, gram)
    scales = rescale.candidates(mean_abs)  # [candidates, intermediate]
    nothing_added = torch.zeros(len(scales), dtype=torch.float64)
    batches = [(experts.down[e], plan.scheme)]
    choice = scaling.search_scales("down", nothing_added, batches, gram, rescale, scales)
    return scales[choice.candidate] if choice.is_rescaled else None


def quantize_expert(
    scaled: ExpertSlice,
    into: InputStats | None,
    inner: InputStats | None,
    is_down_scaled: bool,
    settings: ExpertSettings,
    collected: _Collected,
) -> dict[str, Tensor]:
    """Quantize or keep the projections of one expert; return their weights as stored, by
    projection.
    """
    names = settings.plan.experts
    weights = (weight[0] for weight in scaled.inputs)
    pair = dict(zip(names.inputs, weights, strict=True))  # they read the same input
    is_scaled = settings.input_scale is not None
    stored = quantize_projections(scaled.first, pair, into, is_scaled, settings, collected)
    last = {names.down: scaled.down[0]}
    return stored | quantize_projections(
        scaled.first, last, inner, is_down_scaled, settings, collected
    )


def quantize_projections(
    number: int,
    weights: Mapping[str, Tensor],
    stats: InputStats | None,
    is_scaled: bool,
    settings: ExpertSettings,
    collected: _Collected,
) -> dict[str, Tensor]:
    """Quantize or keep projections of one expert that read the same input; return their weights as
    stored.

    With too few tokens the recipe's policy decides, and names the fallback.
    """
    used, fallbacks = stats, tuple[str, ...]()
    if number in settings.under_calibrated and stats is not None and settings.policy:
        fallbacks = (UNDER_CALIBRATED[settings.policy],)
        used = None if settings.policy == "rtn" else stats
    stored, requests = dict[str, Tensor](), dict[str, QuantizeRequest]()
    for projection, weight in weights.items():
        name = settings.plan.experts.linear(number, projection)
        linear = settings.linears[name]
        if not linear.is_quantized:
            collected.kept[f"{name}.weight"] = weight
            dtype = linear.stored_dtype
            stored[projection] = weight if dtype is None else weight.to(dtype).float()
            continue
        requests[projection] = QuantizeRequest(
            decision=linear.decision,
            weight=weight,
            stats=used,
            tokens=0 if stats is None else int(stats.n_tokens),
            rescaled=is_scaled,
            fallbacks=linear.fallbacks + fallbacks,
        )
    quantized = quantize_group(list(requests.values()), settings.formats)
    for projection, result in zip(requests, quantized, strict=True):
        collected.add(result)
        stored[projection] = result.weight
    return stored
