"""The verdict of an artifact's gates as one sentence, the same on every view. Pure."""

from __future__ import annotations

from quantkit.artifact.fidelity_schema import Fidelity, Status


def format_verdict(fidelity: Fidelity) -> str:
    """Return one sentence on the gates; it says how many are kept and not proven."""
    total = len(fidelity.gates)
    failed = sum(row.ok is False for row in fidelity.gates)
    unmeasured = sum(row.ok is None for row in fidelity.gates)
    unproven = count_unproven(fidelity)
    others = "other is" if unproven == 1 else "others are"
    rest = f", {unproven} {others} not proven" if unproven else ""
    if fidelity.status == "accepted":
        return format_accepted(total, unproven)
    if fidelity.status == "rejected":
        return (
            "Rejected: it fails the gate of its recipe."
            if total == 1
            else f"Rejected: it fails {failed} of the {total} gates of its recipe{rest}."
        )
    if unmeasured:
        return f"Not judged: {unmeasured} of {total} gates have no figure{rest}."
    return "Not judged: no gates."


def count_unproven(fidelity: Fidelity) -> int:
    """Return the number of gates whose figure keeps the bound with an interval that crosses it."""
    return sum(row.is_unproven for row in fidelity.gates)


def format_accepted(total: int, unproven: int) -> str:
    """Return the verdict of an artifact that keeps all gates, `unproven` of them not proven."""
    every = "the gate" if total == 1 else f"all {total} gates"
    if not unproven:
        return f"Accepted: it passes {every} of its recipe."
    if total == 1:
        return "Accepted: it keeps the gate of its recipe, which is not proven."
    return f"Accepted: it keeps {every} of its recipe, {unproven} of them not proven."


def choose_status(fidelity: Fidelity) -> Status:
    """Return the status that decides the color of a verdict: an artifact with gates that are kept
    and not proven looks like one that is not judged.
    """
    if fidelity.status == "accepted" and count_unproven(fidelity):
        return "not judged"
    return fidelity.status


def format_status(fidelity: Fidelity) -> str:
    """Return the status for a table: "accepted, 1 not proven"."""
    n = count_unproven(fidelity)
    return f"{fidelity.status}, {n} not proven" if n else fidelity.status
