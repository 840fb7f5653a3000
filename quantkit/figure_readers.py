"""How the figures of a fidelity report are read from it. Pure: a report is any value with the
attributes of `artifact.fidelity_schema.Fidelity`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from math import exp, hypot
from statistics import fmean
from typing import Any

NORMAL = 1.959964
"""Standard errors on each side of a 95 % interval, by the normal distribution."""
NOT_MEASURED = "not measured"
NOT_FINITE = "not finite"
ALL_TEXT = "all"
"""The domain that pools every token of the fidelity text."""
LOW_COVERAGE = 0.85
"""Coverage below which a report names the kind of text and the remedy (numerics/README.md)."""


@dataclass(frozen=True, kw_only=True)
class Reading:
    """A figure as read from a report.

    value None: `reason` says why ("not measured ..." or "not finite"). With a value, `reason` says
    which part of the artifact or of the text it covers.
    """

    value: float | None
    reason: str = ""
    n: int | None = None  # tokens or items
    se: float | None = None
    ci: tuple[float | None, float | None] | None = None

    @property
    def is_measured(self) -> bool:
        """Whether the figure was measured; the value may still be not finite."""
        return self.value is not None or self.reason == NOT_FINITE


Reader = Callable[[Any, str], Reading]
"""(report, domain or task; "" for all) -> the figure."""


def read_distribution(key: str, report: Any, domain: str) -> Reading:
    """Read a stored figure of the next-token distributions of one domain, "" for all text."""
    row = next((row for row in report.distribution if row.domain == (domain or ALL_TEXT)), None)
    if row is None and report.distribution:
        domains = ", ".join(row.domain for row in report.distribution)
        return Reading(value=None, reason=f"{NOT_MEASURED}: the text has {domains}")
    figure = row.figures.get(key) if row else None
    if row is None or figure is None:
        return Reading(value=None, reason=NOT_MEASURED)
    if figure.value is None:
        return Reading(value=None, reason=NOT_FINITE)
    return Reading(value=figure.value, n=row.tokens, se=figure.se, ci=figure.ci)


def read_yardstick_row(report: Any, domain: str, key: str) -> Reading:
    """Read a figure of the yardstick on one domain, "" for all text."""
    rows = report.yardstick.rows if report.yardstick is not None else ()
    row = next((row for row in rows if row.domain == (domain or ALL_TEXT)), None)
    if row is None:
        return Reading(value=None, reason=NOT_MEASURED)
    figure = getattr(row, key)
    if figure.value is None:
        return Reading(value=None, reason=NOT_FINITE)
    return Reading(value=figure.value, n=row.tokens, se=figure.se, ci=figure.ci)


def read_yardstick(report: Any, domain: str) -> Reading:
    """Read the mean KL as a multiple of the yardstick's."""
    return read_yardstick_row(report, domain, "ratio")


def read_yardstick_kl(report: Any, domain: str) -> Reading:
    """Read the mean KL of the yardstick."""
    return read_yardstick_row(report, domain, "kl_mean")


def read_noise(report: Any, domain: str) -> Reading:
    """Read the mean KL that bfloat16 costs the source, over all text."""
    if report.noise_floor is None or domain not in ("", ALL_TEXT):
        return Reading(value=None, reason=NOT_MEASURED)
    figure = report.noise_floor.kl_mean
    if figure.value is None:
        return Reading(value=None, reason=NOT_FINITE)
    return Reading(value=figure.value, se=figure.se, ci=figure.ci)


def read_extreme(values: Sequence[float | None], *, largest: bool) -> Reading:
    """Read the largest or smallest of values that were all measured; None is a value that is
    not finite."""
    finite = [value for value in values if value is not None]
    if not values:
        return Reading(value=None, reason=NOT_MEASURED)
    if len(finite) < len(values):
        return Reading(value=None, reason=NOT_FINITE)
    return Reading(value=max(finite) if largest else min(finite))


def list_kinds(report: Any) -> dict[str, Reading]:
    """Return the mean KL of every kind of text that the report measured, without the pooled row."""
    labels = [row.domain for row in report.distribution if row.domain != ALL_TEXT]
    return {label: read_distribution("kl_mean", report, label) for label in labels}


def list_seen_kinds(report: Any) -> frozenset[str] | None:
    """Return the kinds of text that the artifact was calibrated on; None if the report has none.

    An artifact without calibration has seen no kind, and a report of an earlier version does not
    say. A pooled kind is seen if all its members are.
    """
    if report.calibration is None or not report.calibration.kinds:
        return None
    seen = frozenset(report.calibration.kinds)
    pooled = report.measured_on.pooled if report.measured_on else {}
    return seen | {label for label, members in pooled.items() if seen.issuperset(members)}


def read_worst_kind(report: Any, _part: str) -> Reading:
    """Read the largest mean KL of a kind of text; `reason` names the kind."""
    kinds = list_kinds(report)
    reading = read_extreme([kind.value for kind in kinds.values()], largest=True)
    if reading.value is None:
        return reading
    label = max(kinds, key=lambda label: kinds[label].value or 0.0)
    return Reading(
        value=reading.value, se=kinds[label].se, ci=kinds[label].ci, n=kinds[label].n, reason=label
    )


def read_mean_over_kinds(report: Any, _part: str) -> Reading:
    """Read the mean of the kinds' mean KL: kinds count equally, whatever tokens they have."""
    return average_readings(list(list_kinds(report).values()))


def make_normal_interval(value: float, error: float) -> tuple[float, float]:
    """Return the 95 % interval of a figure by its standard error."""
    return value - NORMAL * error, value + NORMAL * error


def average_readings(readings: Sequence[Reading]) -> Reading:
    """Return the mean of independent readings, with its standard error if each has one."""
    values = [reading.value for reading in readings if reading.value is not None]
    if len(values) < len(readings):
        return Reading(value=None, reason=NOT_FINITE)
    if not values:
        return Reading(value=None, reason=NOT_MEASURED)
    mean, errors = fmean(values), [reading.se for reading in readings if reading.se is not None]
    if len(errors) < len(readings):
        return Reading(value=mean)
    error = hypot(*errors) / len(errors)
    return Reading(value=mean, se=error, ci=make_normal_interval(mean, error))


def read_shift(report: Any, _part: str) -> Reading:
    """Read the mean KL of unseen kinds over that of seen kinds; 1 is calibration that carries
    over.
    """
    kinds, seen = list_kinds(report), list_seen_kinds(report)
    if not kinds:
        return Reading(value=None, reason=NOT_MEASURED)
    if seen is None:
        return Reading(value=None, reason=f"{NOT_MEASURED}: the kinds calibrated on are unknown")
    groups = {
        "seen": [reading for label, reading in kinds.items() if label in seen],
        "unseen": [reading for label, reading in kinds.items() if label not in seen],
    }
    absent = [name for name, readings in groups.items() if not readings]
    if absent:
        return Reading(value=None, reason=f"{NOT_MEASURED}: the text has no {absent[0]} kind")
    below, above = average_readings(groups["seen"]), average_readings(groups["unseen"])
    if above.value is None or not below.value:
        return Reading(value=None, reason=NOT_FINITE)
    ratio = above.value / below.value
    if above.se is None or below.se is None or not above.value:
        return Reading(value=ratio)
    spread = exp(NORMAL * hypot(above.se / above.value, below.se / below.value))
    return Reading(value=ratio, ci=(ratio / spread, ratio * spread))


def read_likelihood(report: Any, task: str) -> Reading:
    """Read the change of a task's gold solutions, or the lowest of all tasks."""
    rows = [row for row in report.likelihood if task in ("", row.task)]
    missing = [row for row in rows if row.difference is None]
    if missing or not rows:
        reason = f"{NOT_MEASURED}: {missing[0].reason}" if missing else NOT_MEASURED
        return Reading(value=None, reason=reason)
    lowest = read_extreme([row.difference.value for row in rows], largest=False)
    row = next((row for row in rows if row.difference.value == lowest.value), None)
    return replace(lowest, n=row.n, ci=row.difference.ci) if row else lowest


def read_lost_items(report: Any, _part: str) -> Reading:
    """Read the number of items, over all tasks, that the source has right and the artifact
    wrong."""
    missing = [row.task for row in report.benchmarks if row.lost is None]
    if missing or not report.benchmarks:
        names = f": {', '.join(missing)} was not run" if missing else ""
        return Reading(value=None, reason=NOT_MEASURED + names)
    return Reading(value=float(sum(row.lost for row in report.benchmarks)))


def read_overlapping_items(report: Any, _part: str) -> Reading:
    """Read the number of benchmark prompts, over all tasks, that appear in the calibration text."""
    rows = report.calibration.overlaps if report.calibration else ()
    checked = [row for row in rows if row.items]
    if not checked:
        return Reading(value=None, reason=NOT_MEASURED)
    return Reading(value=float(sum(row.overlapping for row in checked)))


def read_output_error(report: Any, _part: str) -> Reading:
    """Read the largest relative output error; an expert that no token reached has none."""
    errors = [row.output_relative_error for row in report.modules if row.method is not None]
    known = [error for error in errors if error is not None]
    if not known:
        return Reading(value=None, reason=NOT_MEASURED)
    missing = len(errors) - len(known)
    reason = f"{missing:,} of {len(errors):,} modules not measured" if missing else ""
    return Reading(value=max(known), reason=reason)


def read_module_error(report: Any, _part: str) -> Reading:
    """Read the largest relative weight error of a quantized matrix."""
    errors = [row.relative_error for row in report.modules if row.method is not None]
    return read_extreme(errors, largest=True)


def read_block_error(report: Any, _part: str) -> Reading:
    """Read the largest relative error of the hidden states after a block."""
    return read_extreme([row.relative_error for row in report.blocks], largest=True)


def read_router_agreement(report: Any, _part: str) -> Reading:
    """Read the lowest share of expert choices of a layer that agree with the source's."""
    return read_extreme([row.agreement for row in report.routers], largest=False)


def read_uncalibrated(report: Any, _part: str) -> Reading:
    """Read the number of routed experts that saw too few calibration tokens."""
    if report.experts is None:
        return Reading(value=None, reason=NOT_MEASURED)
    return Reading(value=float(len(report.experts.list_uncalibrated())))


def read_coverage(report: Any, _part: str) -> Reading:
    """Read 1 - the largest unspanned share of a kind of text; `reason` names kind and input."""
    worst = report.find_worst_inputs()
    reading = read_extreme([share for share, _ in worst.values()], largest=True)
    if reading.value is None:
        return reading
    kind = max(worst, key=lambda kind: worst[kind][0])
    return Reading(value=1 - reading.value, reason=f"{kind} at {worst[kind][1].input}")


def read_fallbacks(report: Any, _part: str) -> Reading:
    """Read the number of modules that took any fallback."""
    return Reading(value=float(len({name for row in report.fallbacks for name in row.modules})))


def read_artifact(key: str) -> Reader:
    """Return a reader of a number of the artifact's summary."""
    return lambda report, _part: Reading(value=float(getattr(report.artifact, key)))
