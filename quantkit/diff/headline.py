"""The result of a comparison in one sentence: what is resolved comes first, as a factor. Pure."""

from __future__ import annotations

from quantkit.artifact.fidelity_schema import Figure
from quantkit.diff.diff_schema import Diff, DistributionDiff, KLDiff, Quantity
from quantkit.diff.paired_figures import ALL_TASKS
from quantkit.figure_readers import ALL_TEXT
from quantkit.report import format_numbers
from quantkit.report.notes import capitalize_first
from quantkit.texts.exposure import count_noun

DOMINANT = 0.2
"""Share of a mean from which its largest token is named."""


def format_headline(diff: Diff) -> str:
    """Return the result in one sentence: KL, benchmarks, flipped items, size."""
    parts = [describe_kl(diff), *describe_benchmarks(diff), describe_size(diff.sizes)]
    return capitalize_first("; ".join(part for part in parts if part)) + "."


def describe_kl(diff: Diff) -> str:
    """Return how the KL of B compares with A's, resolved figures first; "" if not measured."""
    row = next((row for row in diff.kl if row.domain == ALL_TEXT), None)
    mean = next(
        (r for r in diff.distribution if (r.domain, r.figure) == (ALL_TEXT, "kl_mean")), None
    )
    if row is None:
        return describe_mean_alone(mean) if mean else ""
    sentences = [(row.typical_resolved, describe_typical(row))]
    if mean and mean.ratio:
        sentences.append((mean.resolved, describe_mean(row, mean)))
    resolved = [text for verdict, text in sentences if verdict in ("better", "worse")]
    others = [text for verdict, text in sentences if verdict not in ("better", "worse")]
    verdicts = {verdict for verdict, _ in sentences} & {"better", "worse"}
    start = f"B is {verdicts.pop()}: " if len(verdicts) == 1 else ""
    unresolved = [f"{', '.join(others)} (not resolved)"] if others else []
    return start + "; ".join([*resolved, *unresolved])


def describe_typical(row: KLDiff) -> str:
    """Return the typical ratio with the shares of tokens and documents."""
    text = f"KL of a typical token {format_numbers.format_factors(row.typical)}, "
    is_smaller = (row.typical.value or 1.0) < 1
    larger, documents = row.larger.value or 0.0, row.larger_documents
    share = format_numbers.format_percent(1 - larger if is_smaller else larger, 1)
    text += f"{'smaller' if is_smaller else 'larger'} on {share} of {row.tokens:,} tokens"
    if row.documents and documents is not None:
        count = row.documents - documents if is_smaller else documents
        text += f" and in {count:,} of {row.documents:,} documents"
    return text


def describe_mean(row: KLDiff, mean: DistributionDiff) -> str:
    """Return the ratio of the means, and what one token contributes."""
    text = f"mean KL {format_numbers.format_factors(mean.ratio)}"
    share, side = max((row.top_share_a, "A"), (row.top_share_b, "B"))
    if share < DOMINANT:
        return text
    rest = format_numbers.format_factors(row.trimmed)
    largest = f"the {row.left_out:,} largest tokens" if row.left_out > 1 else "it"
    return f"{text}, {100 * share:.0f} % of {side}'s from one token, {rest} without {largest}"


def describe_mean_alone(row: DistributionDiff) -> str:
    """Return the mean KL of both sides without paired tokens, or next to a source."""
    if row.a is None or row.b is None:
        return ""
    a, b = (format_numbers.format_digits(value) for value in (row.a, row.b))
    factor = f" ({format_numbers.format_factor(row.b / row.a)})" if row.a and row.b else ""
    words = {"better": ", resolved", "worse": ", resolved", "": ", without interval"}
    return f"mean KL {a} -> {b}{factor}{words.get(row.resolved, ', not resolved')}"


def describe_benchmarks(diff: Diff) -> list[str]:
    """Return the resolved benchmarks, and the flipped items."""
    paired = [row for row in diff.benchmarks if row.delta_pp and row.task != ALL_TASKS]
    if not paired:
        return []
    words = {
        word: [row.task for row in paired if row.verdict == word] for word in ("worse", "better")
    }
    sides = [f"{word} on {', '.join(tasks)}" for word, tasks in words.items() if tasks]
    lost = sum(flip.lost for flip in diff.flips)
    return [
        "B is " + " and ".join(sides)
        if sides
        else f"no resolved difference on {count_noun(len(paired), 'benchmark')}",
        f"{count_noun(lost, 'item')} lost, {len(diff.flips) - lost:,} gained",
    ]


def describe_size(rows: tuple[Quantity, ...]) -> str:
    """Return the weights of both sides with their ratio."""
    row = next((row for row in rows if row.name == "weights"), None)
    if row is None or row.a is None or row.b is None:
        return ""
    a, b = (format_numbers.format_size(round(value)) for value in (row.a, row.b))
    if row.a == row.b:
        return f"both have {a} of weights"
    return f"weights {a} -> {b} ({format_numbers.format_factors(Figure(value=row.b / row.a))})"
