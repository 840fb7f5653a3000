"""Service-level objectives: figures of a load test against its targets. Pure.

Percentiles have intervals of order statistics, as in the report; requests of a conversation are one
unit. Rates over time have intervals of batch means: the level is divided into BATCHES equal parts
whose means are taken as independent (Law and Carson 1979). A figure without an interval is "kept,
not proven" at best.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np

from quantkit.artifact.fidelity_schema import GateResult
from quantkit.artifact.loadtest_schema import LoadLevel, LoadTest
from quantkit.errors import UsageError
from quantkit.evaluate.statistics import wilson_interval
from quantkit.figure_readers import NOT_MEASURED, Reading
from quantkit.numerics import clustered
from quantkit.recipe.slo import Slo, SloFigure, parse_figure
from quantkit.report.gates import judge_lower, judge_upper, require_proof
from quantkit.serve.cost.hourly import HourlyCost

BATCHES = 10
NO_INTERVAL = (None, None)
COLUMNS: Mapping[str, str] = {
    "latency": "latency_ms",
    "ttft": "ttft_ms",
    "inter_token": "inter_token_ms",
}
"""Figure -> column of the requests and field of the level."""


@dataclass(frozen=True, kw_only=True)
class SloResult:
    """The targets judged at one concurrency, in the order of their file."""

    concurrency: int
    results: tuple[GateResult, ...]

    @property
    def missed(self) -> tuple[GateResult, ...]:
        """The targets that are missed."""
        return tuple(result for result in self.results if result.ok is False)


def find_level(run: LoadTest, slo: Slo) -> LoadLevel:
    """Return the level that must hold the targets; UsageError if the run does not have it."""
    if slo.concurrency is None:
        return max(run.levels, key=lambda level: level.concurrency)
    level = next((x for x in run.levels if x.concurrency == slo.concurrency), None)
    if level is None:
        levels = ", ".join(str(x.concurrency) for x in run.levels)
        raise UsageError(
            f"slo.concurrency: expected a level of the load test ({levels}), found "
            f"{slo.concurrency}; add it to --concurrency"
        )
    return level


def judge_slo(slo: Slo, run: LoadTest, cost: HourlyCost | None) -> SloResult:
    """Judge every target; UsageError if the run lacks the level."""
    level, results = find_level(run, slo), list[GateResult]()
    for key, bound in slo.targets.items():
        reading = read_figure(parse_figure(key), run, level, cost)
        if bound.max is not None:
            result = judge_upper(key, f"<= {bound.max:g}", reading, bound.max)
        else:
            least = bound.min or 0.0
            result = judge_lower(key, f">= {least:g}", reading, least)
        results.append(require_proof(result) if bound.proven else result)
    return SloResult(concurrency=level.concurrency, results=tuple(results))


def read_figure(
    figure: SloFigure, run: LoadTest, level: LoadLevel, cost: HourlyCost | None
) -> Reading:
    """Return a figure of a level, or of the conversations."""
    if figure.percentile is not None:
        return read_percentile(figure, level)
    readers: Mapping[str, Callable[[], Reading]] = {
        "errors": lambda: read_errors(level),
        "cache_hits": lambda: read_cache_hits(run),
        "gpu_utilization": lambda: read_utilization(level),
        "tokens_per_second": lambda: read_throughput(level),
        "tokens_per_currency": lambda: read_tokens_per_currency(level, cost),
    }
    return readers[figure.name]()


def read_percentile(figure: SloFigure, level: LoadLevel) -> Reading:
    """Return a percentile of a time in seconds, over the prompts of the figure's lengths."""
    share, requests = (figure.percentile or 0) / 100, level.requests
    if requests is None:
        if figure.least or figure.below is not None:
            return Reading(value=None, reason=f"{NOT_MEASURED}: the run has no single requests")
        spread = getattr(level, COLUMNS[figure.name])
        value = getattr(spread, f"p{figure.percentile}", None)
        reason = "no interval: the run has no single requests" if value is not None else ""
        return Reading(
            value=None if value is None else value / 1000,
            n=level.answered,
            ci=NO_INTERVAL,
            reason=reason or NOT_MEASURED,
        )
    is_bounded = bool(figure.least) or figure.below is not None
    rows = [
        (time / 1000, conversation)
        for time, tokens, conversation in zip(
            getattr(requests, COLUMNS[figure.name]),
            requests.prompt_tokens,
            requests.conversation,
            strict=True,
        )
        if time is not None
        and (not is_bounded or tokens is not None)
        and figure.least <= (tokens or 0)
        and (figure.below is None or (tokens or 0) < figure.below)
    ]
    if not rows:
        return Reading(value=None, reason=f"{NOT_MEASURED}: no request of this kind")
    times, groups = np.array([time for time, _ in rows]), np.array([group for _, group in rows])
    return Reading(
        value=float(np.quantile(times, share)),
        n=len(times),
        ci=clustered.compute_quantile_interval(times, share, groups),
    )


def read_errors(level: LoadLevel) -> Reading:
    """Return the share of requests that failed; unfinished ones do not count."""
    n = level.answered + level.errored
    interval = wilson_interval(level.errored, n)
    return Reading(value=level.errored / n, n=n, ci=(interval.low, interval.high))


def read_cache_hits(run: LoadTest) -> Reading:
    """Return the share of prompt tokens of the conversations that came from the prefix cache.

    By the usage of each answer if the server reports it, with an interval over conversations;
    otherwise by the engine's counters, without.
    """
    if run.conversations is None:
        return Reading(value=None, reason=f"{NOT_MEASURED}: the run has no conversations")
    level = run.conversations.level
    requests, rate = level.requests, level.cache.rate if level.cache else None
    if requests and None not in (*requests.cached_tokens, *requests.prompt_tokens):
        cached = np.array(requests.cached_tokens, dtype=np.float64)
        prompts = np.array(requests.prompt_tokens, dtype=np.float64)
        share = float(cached.sum() / prompts.sum())
        deviations = (cached - share * prompts) / prompts.mean()
        groups = clustered.number_documents(np.array(requests.conversation), len(cached))
        error, quantile = clustered.compute_mean_error(deviations, groups)
        ends = (max(0.0, share - quantile * error), min(1.0, share + quantile * error))
        return Reading(
            value=share, n=len(cached), ci=NO_INTERVAL if error == float("inf") else ends
        )
    if rate is None:
        reason = f"{NOT_MEASURED}: neither answers nor the engine's metrics count cached tokens"
        return Reading(value=None, reason=reason)
    reason = "no interval: by the engine's counters"
    return Reading(value=rate, n=level.answered, ci=NO_INTERVAL, reason=reason)


def read_utilization(level: LoadLevel) -> Reading:
    """Return the mean utilization of the GPUs, with an interval of batch means."""
    values = np.array(level.gpu.utilization if level.gpu else (), dtype=np.float64)
    if not len(values):
        reason = f"{NOT_MEASURED}: name a DCGM exporter with --gpu-metrics"
        return Reading(value=None, reason=reason)
    batches = np.arange(len(values)) * min(BATCHES, len(values)) // len(values)
    _, interval = clustered.compute_mean_interval(values, batches)
    return Reading(value=float(values.mean()), n=len(values), ci=interval)


def read_throughput(level: LoadLevel) -> Reading:
    """Return the output tokens per second, with an interval of batch means."""
    value, requests = level.output_tokens_per_second, level.requests
    if requests is None or None in requests.output_tokens:
        reason = "no interval: the run has no tokens of single requests"
        return Reading(value=value, n=level.answered, ci=NO_INTERVAL, reason=reason)
    starts, lengths = np.array(requests.start_s), np.array(requests.latency_ms) / 1000
    first = np.array([(time or 0) / 1000 for time in requests.ttft_ms])
    tokens = np.array(requests.output_tokens, dtype=np.float64)
    edges = np.linspace(0, max(level.seconds, float((starts + lengths).max())), BATCHES + 1)
    begins, durations = starts + first, np.maximum(lengths - first, 1e-9)
    done = np.clip((edges[:, None] - begins) / durations, 0, 1) @ tokens  # by the end of each part
    _, interval = clustered.compute_mean_interval(np.diff(done) / (edges[1] or 1.0))
    return Reading(value=value, n=len(tokens), ci=interval)


def read_tokens_per_currency(level: LoadLevel, cost: HourlyCost | None) -> Reading:
    """Return the output tokens per unit of currency at the measured throughput."""
    if cost is None or not cost.per_hour:
        return Reading(value=None, reason=f"{NOT_MEASURED}: name assumptions with --cost")
    reading, factor = read_throughput(level), 3600 / cost.per_hour
    low, high = reading.ci or NO_INTERVAL
    return Reading(
        value=None if reading.value is None else reading.value * factor,
        n=reading.n,
        ci=(None if low is None else low * factor, None if high is None else high * factor),
        reason=f"{cost.side} GPUs at {cost.per_hour:.4g} {cost.currency} per hour",
    )
