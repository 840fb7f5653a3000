"""Sentences that a report shows before its figures: what limits or flatters them."""

from __future__ import annotations

from quantkit.artifact.fidelity_schema import Fidelity
from quantkit.figure_readers import list_seen_kinds
from quantkit.plan.size_gain import describe_small_gain
from quantkit.texts.exposure import LEAST_TOKENS, describe_exposure, describe_narrowness


def list_notes(fidelity: Fidelity) -> list[str]:
    """Return sentences on the artifact's size, if little is gained, and on its texts."""
    artifact = fidelity.artifact
    note = describe_small_gain(artifact.bytes_source, artifact.bytes_artifact)
    size = [f"{capitalize_first(note)}."] if note and fidelity.modules else []
    return [
        *describe_conversion(fidelity),
        *describe_unproven(fidelity),
        *(f"Not valid: {row.fault}." for row in fidelity.benchmarks if row.fault),
        *size,
        *list_text_notes(fidelity),
    ]


def describe_conversion(fidelity: Fidelity) -> list[str]:
    """Return a sentence on a report that was read from a file of an earlier version."""
    if fidelity.converted_from is None:
        return []
    return [
        f"The report is of version {fidelity.converted_from}: relative errors of outputs were "
        "energy ratios there, and are converted to norm ratios, their square roots."
    ]


def describe_unproven(fidelity: Fidelity) -> list[str]:
    """Return a sentence on gates that are kept and not proven."""
    rows = [f"{row.figure} {row.bound}" for row in fidelity.gates if row.is_unproven]
    if not rows:
        return []
    verb = "is" if len(rows) == 1 else "are"
    return [
        f"{len(rows)} of {len(fidelity.gates)} gates {verb} kept and not proven, because the 95 % "
        f"interval crosses the bound: {', '.join(rows)}."
    ]


def list_text_notes(fidelity: Fidelity) -> list[str]:
    """Return sentences on a narrow calibration, and on fidelity text of calibrated kinds alone.

    A report of an earlier version does not say which kinds were calibrated on, and has no notes.
    """
    seen = list_seen_kinds(fidelity) or ()
    measured = fidelity.measured_on.kinds if fidelity.measured_on else {}
    kinds = [describe_narrowness(seen), describe_exposure(measured, seen) if measured else ""]
    notes = [capitalize_first(note) for note in kinds if note]
    texts = {"calibration": fidelity.calibration, "fidelity": fidelity.measured_on}
    notes += [
        f"{use.capitalize()} text: auto stands for {text.set}: {text.chosen}"
        for use, text in texts.items()
        if text and text.chosen
    ]
    pooled = fidelity.measured_on.pooled if fidelity.measured_on else {}
    if pooled:
        rows = "; ".join(f"{label}: {', '.join(members)}" for label, members in pooled.items())
        notes.append(f"Kinds with fewer than {LEAST_TOKENS:,} tokens are pooled: {rows}")
    overlaps = fidelity.calibration.overlaps if fidelity.calibration else ()
    notes += [
        f"{row.task}: {row.overlapping:,} of {row.items:,} prompts appear in the calibration text; "
        "its score flatters. Remove them from the calibration set"
        for row in overlaps
        if row.overlapping
    ]
    return [f"{note}." for note in notes if note]


def capitalize_first(sentence: str) -> str:
    """Return a sentence with its first letter in upper case, and the others as they are."""
    return f"{sentence[:1].upper()}{sentence[1:]}"
