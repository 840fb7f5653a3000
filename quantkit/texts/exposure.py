"""Which kinds of text calibration had, and which of them fidelity is measured on.

A label is a kind of text, "web", with its language unless that is English: "web-zh".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence

from quantkit.texts.self_prompts import ENGLISH

FEWEST_KINDS = 4
FEWEST_LANGUAGES = 2
LEAST_UNSEEN = 0.5
"""Share of the fidelity text that has kinds or languages that were not calibrated on."""
MOST_LABELS = 12
"""Labels of a fidelity text above which those with few tokens are pooled."""
LEAST_TOKENS = 1024
"""Tokens of a label below which it is pooled: the largest of 40 noisy means measures noise."""
SEEN_POOL, UNSEEN_POOL = "mul", "other"
"""Languages of pooled labels. mul: several languages (ISO 639-2), all calibrated on."""


def get_language(label: str) -> str:
    """Return the language of a label."""
    return label.partition("-")[2] or ENGLISH


def describe_narrowness(labels: Collection[str]) -> str:
    """Return a sentence if a calibration set has few kinds of text or one language, or "".

    Measured on SmolLM2-135M at 4 bits: calibrated on three kinds in English, Chinese loses six
    times as much as with a mixture that has it, and English prose twice as much.
    """
    languages = sorted({get_language(label) for label in labels})
    if not labels or (len(labels) >= FEWEST_KINDS and len(languages) >= FEWEST_LANGUAGES):
        return ""
    return (
        f"narrow calibration: {count_noun(len(labels), 'kind')} of text "
        f"({', '.join(sorted(labels))}) in {count_noun(len(languages), 'language')} "
        f"({', '.join(languages)}); other text loses more. Calibrate on a mixture of at least "
        f"{FEWEST_KINDS} kinds and {FEWEST_LANGUAGES} languages"
    )


def describe_exposure(fidelity: Mapping[str, float], calibrated: Collection[str]) -> str:
    """Return a sentence if less than half of the fidelity text is of kinds that calibration did not
    have, or "".

    fidelity: tokens or shares per label; calibrated: labels of the calibration set.
    """
    share = compute_unseen_share(fidelity, calibrated)
    if not calibrated or not fidelity or share >= LEAST_UNSEEN:
        return ""
    unseen = sorted(set(fidelity) - set(calibrated))
    names = f" ({', '.join(unseen)})" if unseen else ""
    return (
        f"fidelity text: {share:.0%} is of kinds that calibration did not have"
        f"{names}, expected at least {LEAST_UNSEEN:.0%}; the figures may flatter. Add other kinds "
        "or languages to the fidelity set"
    )


def compute_unseen_share(fidelity: Mapping[str, float], calibrated: Collection[str]) -> float:
    """Return the share of the fidelity text whose kinds calibration did not have."""
    total = sum(fidelity.values())
    unseen = sum(value for label, value in fidelity.items() if label not in calibrated)
    return unseen / total if total else 0.0


def pool_small_kinds(
    labels: Sequence[str], lengths: Sequence[int], calibrated: Collection[str]
) -> tuple[str, ...]:
    """Return the label under which each sequence is reported: of a text with many labels, those
    with few tokens are pooled over languages, calibrated and other ones apart.

    labels, lengths: one per sequence, lengths in tokens. "web-ko" and "web" with 300 tokens each
    become "web-mul" if both are calibrated on, "web-other" if neither is.
    """
    counts = Counter[str]()
    for label, length in zip(labels, lengths, strict=True):
        counts[label] += length
    if len(counts) <= MOST_LABELS:
        return tuple(labels)
    return tuple(
        label if counts[label] >= LEAST_TOKENS else name_pool(label, calibrated) for label in labels
    )


def name_pool(label: str, calibrated: Collection[str]) -> str:
    """Return the label that pools the languages of a kind."""
    return f"{label.partition('-')[0]}-{SEEN_POOL if label in calibrated else UNSEEN_POOL}"


def format_labels(labels: Sequence[str]) -> str:
    """Return labels, many of them by kind with the number of languages: "chat (12 languages)"."""
    if len(labels) <= MOST_LABELS:
        return ", ".join(labels)
    kinds: dict[str, list[str]] = {}
    for label in labels:
        kinds.setdefault(label.partition("-")[0], []).append(label)
    return ", ".join(
        rows[0] if len(rows) == 1 else f"{kind} ({len(rows)} languages)"
        for kind, rows in kinds.items()
    )


def raise_unseen_share(
    shares: Mapping[str, float], labels: Mapping[str, str], calibrated: Collection[str]
) -> dict[str, float]:
    """Return the shares of a fidelity set's parts, those of unseen kinds at least half together.

    shares and labels: per part. Nothing changes without calibration, or without a part that
    calibration did not have.
    """
    unseen = {name for name in shares if labels[name] not in calibrated}
    total = sum(shares[name] for name in unseen)
    if not calibrated or not unseen or total >= LEAST_UNSEEN:
        return dict(shares)
    return {
        name: share * LEAST_UNSEEN / total
        if name in unseen
        else share * (1 - LEAST_UNSEEN) / (1 - total)
        for name, share in shares.items()
    }


def pick_label(labels: Sequence[str], calibrated: Collection[str]) -> str:
    """Return the label that decides whether a part is seen: a calibrated one, if it has any."""
    return next((label for label in labels if label in calibrated), labels[0])


def count_noun(count: int, noun: str) -> str:
    """Return "1 kind" or "3 kinds"."""
    return f"{count:,} {noun}{'' if count == 1 else 's'}"
