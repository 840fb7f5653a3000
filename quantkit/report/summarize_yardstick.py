"""The yardstick and the noise floor of a report, from the tokens of their streams."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from quantkit.artifact.figure_schema import Figure
from quantkit.artifact.yardstick_schema import NoiseFloor, Yardstick, YardstickResult
from quantkit.evaluate.token_fidelity import TextFidelity
from quantkit.figure_readers import ALL_TEXT
from quantkit.numerics import clustered, fidelity
from quantkit.numerics.clustered import Ratio
from quantkit.numerics.fidelity import Estimate, TokenFidelity

BFLOAT16 = "final norm and language-model head in bfloat16, the blocks in float32"


def make_figure(estimate: Estimate) -> Figure:
    """Return an estimate as a figure with its standard error and interval."""
    return Figure(value=estimate.value, se=estimate.error, ci=estimate.interval)


def summarize_yardstick(measured: TextFidelity) -> Yardstick | None:
    """Return the yardstick of a text, None if it was not measured."""
    tokens = measured.yardstick
    if tokens is None:
        return None
    top1 = fidelity.estimate_proportion(tokens.same_top, measured.documents)
    return Yardstick(top1=make_figure(top1), rows=tuple(iterate_rows(measured, tokens)))


def iterate_rows(measured: TextFidelity, tokens: TokenFidelity) -> Iterator[YardstickResult]:
    """Yield the row of all text, then one for each domain of two tokens or more."""
    domains = np.array(measured.domains)
    for domain in (ALL_TEXT, *sorted(set(measured.domains))):
        places = np.flatnonzero((domains == domain) | (domain == ALL_TEXT))
        if domain == ALL_TEXT or len(places) > 1:
            yield compare_domain(domain, measured, tokens, places)


def compare_domain(
    domain: str, measured: TextFidelity, tokens: TokenFidelity, places: clustered.Array
) -> YardstickResult:
    """Return the row of one domain: the KL of the same tokens, artifact over yardstick."""
    documents = measured.documents[places]
    rounded, own = tokens.kl[places], measured.tokens.kl[places]
    ratio = typical = Ratio(value=float("nan"), interval=(None, None))
    if len(places) > 1 and bool(rounded.any()) and bool(own.any()):
        compared = clustered.compare_kl(to_array(rounded), to_array(own), to_array(documents))
        ratio, typical = compared.mean, compared.typical
    return YardstickResult(
        domain=domain,
        tokens=len(places),
        kl_mean=make_figure(fidelity.estimate_positive_mean(rounded, documents)),
        ratio=Figure(value=ratio.value, ci=ratio.interval),
        typical=Figure(value=typical.value, ci=typical.interval),
    )


def to_array(values: Tensor) -> clustered.Array:
    """Return values as an array of numpy."""
    return values.numpy()


def summarize_noise(measured: TextFidelity) -> NoiseFloor | None:
    """Return what bfloat16 costs the source, None for figures that are in bfloat16 themselves."""
    tokens, documents = measured.bfloat16, measured.documents
    if tokens is None:
        return None
    return NoiseFloor(
        what=BFLOAT16,
        kl_mean=make_figure(fidelity.estimate_positive_mean(tokens.kl, documents)),
        top1=make_figure(fidelity.estimate_proportion(tokens.same_top, documents)),
    )
