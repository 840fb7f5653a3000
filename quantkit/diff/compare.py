"""The comparison of two sides: all differences, or NotComparable with the reason."""

from __future__ import annotations

from quantkit.diff import changes, loadtest_diff, paired_figures, paired_tokens, token_texts
from quantkit.diff.comparability import (
    BASELINE_NOISE,
    Comparability,
    assess_comparability,
    compute_baseline_gap,
    is_same_text,
)
from quantkit.diff.diff_schema import ComparedModel, Diff, WorseToken
from quantkit.diff.headline import format_headline
from quantkit.diff.sides import Side
from quantkit.errors import NotComparable
from quantkit.report.notes import describe_conversion

WITHOUT_IDS = {
    True: "was built by an earlier version, which kept no token ids",
    False: "holds no text of its tokens (fidelity.keep_text)",
}
"""Why tokens cannot be listed, by `keeps_text` of the report."""


def compare_sides(a: Side, b: Side, *, partial: bool = False) -> Diff:
    """Return the differences of B from A.

    Raises NotComparable for different sources, texts or prompts; `partial` leaves such parts out.
    """
    allowed = assess_comparability(a, b)
    if allowed.reasons and not partial:
        raise NotComparable(
            "\n".join(f"{reason}; --partial compares the rest" for reason in allowed.reasons)
        )
    items, reworded = paired_figures.count_items(a, b, allowed)
    diff = Diff(
        a=_describe_side(a),
        b=_describe_side(b),
        left_out=allowed.reasons,
        notes=_list_notes(a, b, allowed),
        sizes=changes.compare_sizes(a, b),
        recipe=changes.compare_recipes(a, b),
        plan=changes.compare_plans(a, b),
        made_with=changes.list_changes(a.versions, b.versions) if a.versions and b.versions else (),
        gates=changes.compare_gates(a, b),
        decisions=changes.group_decisions(a, b) or changes.group_schemes(a, b),
        tensors=changes.group_tensors(a, b),
        kl=paired_tokens.compare_kl(a, b, allowed),
        distribution=paired_tokens.pair_distributions(a, b, allowed),
        worse_tokens=list_worse_tokens(a, b, allowed),
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
    return diff.model_copy(update={"headline": format_headline(diff)})


def list_worse_tokens(a: Side, b: Side, allowed: Comparability) -> tuple[WorseToken, ...]:
    """Return the tokens that got worse most; none if the tokens are not comparable."""
    if allowed.source or allowed.text or a.tokens is None or b.tokens is None:
        return ()
    if not paired_tokens.is_pairable(a.tokens, b.tokens):
        return ()
    return token_texts.list_worse_tokens(a.tokens, b.tokens, (a.texts, b.texts))


def _describe_side(side: Side) -> ComparedModel:
    fidelity = side.fidelity
    return ComparedModel(
        name=side.name,
        kind=side.kind,
        status="source" if side.kind == "source" else fidelity.status,
        scheme=fidelity.artifact.scheme,
        format=fidelity.artifact.format,
        source=fidelity.source.model,
    )


def _list_notes(a: Side, b: Side, allowed: Comparability) -> tuple[str, ...]:
    """Return the conditions that a reader of the tables must know."""
    notes = []
    if changes.has_same_weights(a, b):
        notes.append("The weight files of both are identical.")
    for side in (a, b):
        if side.kind == "report":
            notes.append(
                f"{side.name} is a single fidelity.json: no recipe, no tensors, and no items or "
                "tokens to pair."
            )
        elif side.kind == "source" and side.tensors is None:
            notes.append(f"{side.name} cannot be reached, so its tensors are not compared.")
    notes += [
        f"{side.name}: {describe_conversion(side.fidelity)[0]}"
        for side in (a, b)
        if side.kind != "source" and side.fidelity.converted_from is not None
    ]
    notes += [
        f"{side.name} {WITHOUT_IDS[side.fidelity.keeps_text]}: the tokens that got worse are not "
        "listed."
        for side in (a, b)
        if side.tokens is not None and side.tokens.places is None and side.kind != "source"
    ]
    if allowed.source:
        return tuple(notes + loadtest_diff.list_loadtest_notes(a, b))
    notes += _list_calibration_notes(a, b)
    gap = compute_baseline_gap(a, b)
    if gap > BASELINE_NOISE and not allowed.text:
        notes.append(
            f"The source's own losses differ by up to {gap:.2g} nats between the two builds: they "
            "were computed by another device, dtype or version."
        )
    notes += _list_item_notes(a, b, allowed)
    return tuple(notes + loadtest_diff.list_loadtest_notes(a, b))


def _list_calibration_notes(a: Side, b: Side) -> list[str]:
    """Return a note if the output errors are not comparable."""
    texts = a.fidelity.calibration, b.fidelity.calibration
    if "source" in (a.kind, b.kind) or not any(texts) or is_same_text(*texts):
        return []
    uncalibrated = [side.name for side in (a, b) if side.fidelity.calibration is None]
    reason = (
        f"{uncalibrated[0]} used no calibration text"
        if uncalibrated
        else "They used different calibration texts"
    )
    return [
        f"{reason}, so modules are compared by the error of their weights; calibrated methods "
        "accept larger weight errors for smaller output errors."
    ]


def _list_item_notes(a: Side, b: Side, allowed: Comparability) -> list[str]:
    """Return notes on items that only one side has, and on changed scores of the source."""
    if a.items is None or b.items is None:
        return []
    notes, first, second = [], a.items, b.items
    for task in dict.fromkeys(task for task, _, _ in (*first, *second)):
        of_a, of_b = ({key for key in items if key[0] == task} for items in (first, second))
        if of_a and of_b and of_a != of_b and task not in allowed.tasks:
            notes.append(
                f"{task}: {len(of_a & of_b):,} items are in both, {len(of_a ^ of_b):,} in one only."
            )
    changed = 0
    for key, item in first.items():
        other = second[key].source if key in second else None
        if (
            key[0] not in allowed.tasks
            and item.source
            and other
            and item.source.score != other.score
        ):
            changed += 1
    if changed:
        notes.append(
            f"The source itself has other scores on {changed:,} items: another device or version "
            "generated its answers."
        )
    return notes
