"""Two sides in, all that differs out, or one refusal that says why they do not compare."""

from __future__ import annotations

from quantkit.diff import changes, loadtest_diff, paired_figures
from quantkit.diff.comparability import (
    BASELINE_NOISE,
    Comparability,
    assess_comparability,
    compute_baseline_gap,
    is_same_text,
)
from quantkit.diff.diff_schema import ComparedModel, Diff
from quantkit.diff.sides import Side
from quantkit.errors import NotComparable


def compare_sides(a: Side, b: Side, *, partial: bool = False) -> Diff:
    """B compared with A.

    Raises NotComparable for another source, other text or other prompts; `partial` leaves such parts out instead.
    """
    allowed = assess_comparability(a, b)
    if allowed.reasons and not partial:
        raise NotComparable(
            "\n".join(f"{reason}; --partial compares the rest" for reason in allowed.reasons)
        )
    items, reworded = paired_figures.count_items(a, b, allowed)
    return Diff(
        a=_party(a),
        b=_party(b),
        left_out=allowed.reasons,
        notes=_notes(a, b, allowed),
        sizes=changes.compare_sizes(a, b),
        recipe=changes.compare_recipes(a, b),
        plan=changes.compare_plans(a, b),
        made_with=changes.list_changes(a.versions, b.versions) if a.versions and b.versions else (),
        gates=changes.compare_gates(a, b),
        decisions=changes.group_decisions(a, b) or changes.group_schemes(a, b),
        tensors=changes.group_tensors(a, b),
        distribution=paired_figures.pair_distributions(a, b, allowed),
        likelihood=paired_figures.pair_likelihoods(a, b, allowed),
        benchmarks=paired_figures.pair_benchmarks(a, b, allowed),
        blocks=paired_figures.compare_blocks(a, b, allowed),
        routers=paired_figures.compare_routers(a, b, allowed),
        modules=paired_figures.compare_modules(a, b, allowed),
        fallbacks=changes.compare_fallbacks(a, b),
        flips=paired_figures.list_flips(a, b, allowed),
        load=loadtest_diff.compare_loadtests(a, b),
        compared_items=items,
        reworded=reworded,
    )


def _party(side: Side) -> ComparedModel:
    fidelity = side.fidelity
    return ComparedModel(
        name=side.name,
        kind=side.kind,
        status="source" if side.kind == "source" else fidelity.status,
        scheme=fidelity.artifact.scheme,
        format=fidelity.artifact.format,
        source=fidelity.source.model,
    )


def _notes(a: Side, b: Side, allowed: Comparability) -> tuple[str, ...]:
    """What a reader must know before believing the tables."""
    found = []
    if changes.has_same_weights(a, b):
        found.append("The weight files of both are the same bytes.")
    for side in (a, b):
        if side.kind == "report":
            found.append(
                f"{side.name} is a fidelity.json alone: no recipe, no tensors, no items and no tokens to pair."
            )
        elif side.kind == "source" and side.tensors is None:
            found.append(f"{side.name} cannot be reached, so its tensors are not compared.")
    if allowed.source:
        return tuple(found + loadtest_diff.list_loadtest_notes(a, b))
    texts = a.fidelity.calibration, b.fidelity.calibration
    if "source" not in (a.kind, b.kind) and any(texts) and not is_same_text(*texts):
        alone = [side.name for side in (a, b) if side.fidelity.calibration is None]
        told = (
            f"{alone[0]} learned from no text"
            if alone
            else "They did not learn from the same calibration text"
        )
        found.append(
            f"{told}, so modules are compared by the error of their weights; "
            "a method that learns lets that grow to make the error of the outputs smaller."
        )
    gap = compute_baseline_gap(a, b)
    if gap > BASELINE_NOISE and not allowed.text:
        found.append(
            f"The source's own losses differ by up to {gap:.2g} nats between the two builds: another device, dtype or "
            "version computed them."
        )
    found += _asked(a, b, allowed)
    return tuple(found + loadtest_diff.list_loadtest_notes(a, b))


def _asked(a: Side, b: Side, allowed: Comparability) -> list[str]:
    """Items that only one side was asked, and items on which the source itself was scored otherwise."""
    if a.items is None or b.items is None:
        return []
    found, first, second = [], a.items, b.items
    for task in dict.fromkeys(task for task, _, _ in (*first, *second)):
        ours, theirs = ({key for key in items if key[0] == task} for items in (first, second))
        if ours and theirs and ours != theirs and task not in allowed.tasks:
            found.append(
                f"{task}: {len(ours & theirs):,} items are in both, {len(ours ^ theirs):,} in one only."
            )
    moved = 0
    for key, item in first.items():
        other = second[key].source if key in second else None
        if (
            key[0] not in allowed.tasks
            and item.source
            and other
            and item.source.score != other.score
        ):
            moved += 1
    if moved:
        found.append(
            f"The source itself was scored otherwise on {moved:,} items: another device or version answered."
        )
    return found
