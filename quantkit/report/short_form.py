"""The end of a build's output: an artifact in six lines, and one line per warning that matters.

A line has several wordings, from the most complete to the shortest; the first that fits into the
terminal is shown, and only the shortest wraps, between words. Nothing is printed here.
"""

from __future__ import annotations

import shlex
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rich.console import Console, ConsoleOptions
from rich.text import Text

from quantkit.artifact.fidelity_schema import BenchmarkResult, Fidelity
from quantkit.artifact.layout import PAGE
from quantkit.figure_readers import Reading, list_seen_kinds
from quantkit.figures import FIGURES
from quantkit.plan.size_gain import describe_small_gain
from quantkit.report import format_numbers
from quantkit.report.verdict import choose_status, format_verdict
from quantkit.texts.exposure import (
    compute_unseen_share,
    count_noun,
    describe_exposure,
    describe_narrowness,
    get_language,
)

STYLES = {"accepted": "green", "rejected": "bold red", "not judged": "yellow"}
"""Status, see `choose_status` -> style of the verdict."""
WORST, MEAN, YARDSTICK = (
    next(row for row in FIGURES if row.key == key)
    for key in ("kl_worst_kind", "kl_mean", "yardstick")
)


@dataclass(frozen=True, kw_only=True)
class SummaryLine:
    """A line: its label and its wordings, the most complete first; is_whole: never wrapped."""

    label: str
    wordings: tuple[str, ...]
    style: str = ""
    is_whole: bool = False


@dataclass(frozen=True)
class LabeledLines:
    """Lines with their labels in one column."""

    lines: Sequence[SummaryLine]

    def __rich_console__(self, _console: Console, options: ConsoleOptions) -> Iterator[Text]:
        """Yield the lines for rich; a path or command without room for it is not broken, so that
        it can be copied.
        """
        start = max(len(line.label) for line in self.lines) + 2
        room = max(20, options.max_width - start)
        for line in self.lines:
            text = choose_wording(line.wordings, room)
            parts = (
                [text]
                if line.is_whole
                else textwrap.wrap(text, room, break_long_words=False, break_on_hyphens=False)
            )
            shown = Text(line.label.ljust(start), style="dim", no_wrap=True, overflow="ignore")
            shown.append(f"\n{' ' * start}".join(parts), style=f"not dim {line.style}".rstrip())
            yield shown


def choose_wording(wordings: Sequence[str], room: int) -> str:
    """Return the first wording of at most `room` characters, else the last."""
    return next((text for text in wordings if len(text) <= room), wordings[-1])


def make_short_form(fidelity: Fidelity, artifact: Path, *, warnings: bool = True) -> LabeledLines:
    """Return verdict, size, KL, benchmarks, page and next command of an artifact in its folder.

    warnings: add the lines of `list_warnings`.
    """
    lines = [
        SummaryLine(
            label="verdict",
            wordings=(format_verdict(fidelity),),
            style=STYLES[choose_status(fidelity)],
        ),
        SummaryLine(label="size", wordings=word_size(fidelity)),
        SummaryLine(label="KL", wordings=word_kl(fidelity)),
        SummaryLine(label="benchmarks", wordings=word_benchmarks(fidelity.benchmarks)),
        *(list_warnings(fidelity) if warnings else ()),
        SummaryLine(label="page", wordings=(f"{artifact / PAGE}",), is_whole=True),
        SummaryLine(label="next", wordings=(make_next_command(fidelity, artifact),), is_whole=True),
    ]
    return LabeledLines([escape_line(line) for line in lines])


def escape_line(line: SummaryLine) -> SummaryLine:
    """Return the line without control characters: names and paths are untrusted."""
    wordings = tuple(
        "".join(character if character.isprintable() else " " for character in text)
        for text in line.wordings
    )
    return replace(line, wordings=wordings)


def word_size(fidelity: Fidelity) -> tuple[str, ...]:
    """Return "1.42x smaller, 5.45 MB from 7.73 MB; 5.95 bits per weight overall"."""
    artifact = fidelity.artifact
    size = format_numbers.format_size_change(artifact.bytes_source, artifact.bytes_artifact)
    bits = f"{size}; {artifact.bits_overall:.2f} bits per weight overall"
    quantized = f" ({artifact.bits_per_weight:.2f} of the quantized ones)"
    return (f"{bits}{quantized}", bits) if fidelity.artifact.roles else (bits,)


# --------------------------------------------------------------------------------------------- KL


def word_kl(fidelity: Fidelity) -> tuple[str, ...]:
    """Return the mean KL of the worst kind of text, and over all text, in one unit: with all
    intervals, with that of the worst kind, with none. The mean is compared with the yardstick's, if
    the report has one.
    """
    worst, mean = WORST.read(fidelity), MEAN.read(fidelity)
    if not mean.is_measured:
        return (mean.reason or "not measured",)
    power = format_numbers.choose_power(MEAN, [worst, mean])
    unit = f"{format_numbers.format_power(power)} nats/token" if power else "nats/token"
    yardstick = YARDSTICK.read(fidelity)
    whole, bare = (
        f"{format_numbers.format_reading(MEAN, reading, power)}{describe_yardstick(multiple)}"
        for reading, multiple in ((mean, yardstick), (drop_ends(mean), drop_ends(yardstick)))
    )
    if not worst.is_measured:  # text of one kind
        return (f"mean {whole} {unit}", f"mean {bare} {unit}")
    kind = f" ({worst.reason})" if worst.value is not None else ""
    first, short = (
        f"worst kind {format_numbers.format_reading(WORST, reading, power)}{kind}"
        for reading in (worst, drop_ends(worst))
    )
    return (
        f"{first}, mean {whole}, {unit}",
        f"{first}, mean {bare}, {unit}",
        f"{short}, mean {bare}, {unit}",
    )


def describe_yardstick(multiple: Reading) -> str:
    """Return " (0.30x of RTN)"; nothing without a yardstick."""
    if not multiple.is_measured:
        return ""
    return f" ({format_numbers.format_reading(YARDSTICK, multiple)} of RTN)"


def drop_ends(reading: Reading) -> Reading:
    """Return a reading without its interval."""
    return Reading(value=reading.value, reason=reading.reason)


# ------------------------------------------------------------------------------------- benchmarks


def word_benchmarks(rows: Sequence[BenchmarkResult]) -> tuple[str, ...]:
    """Return the scores of each task with its verdict; shorter: the numbers of verdicts and the
    lowest recovery.
    """
    if not rows:
        return ("none in the recipe",)
    counts = Counter(name_outcome(row) for row in rows)
    words = ", ".join(f"{n} {verdict}" for verdict, n in counts.items())
    recovery = [
        (row.recovery.value, row.task)
        for row in rows
        if row.recovery and row.recovery.value is not None
    ]
    if recovery:
        lowest, task = min(recovery)
        words += f"; lowest recovery {format_numbers.format_percent(lowest, 1)} ({task})"
    absent = {row.reason for row in rows if row.status == "not run"}
    if len(absent) == 1 and counts == {"not run": len(rows)}:
        names = f"{', '.join(row.task for row in rows)} not run: {absent.pop()}"
        return names, words
    return (
        "; ".join(format_task(row, with_source=True) for row in rows),
        ", ".join(format_task(row, with_source=False) for row in rows),
        words,
    )


def format_task(row: BenchmarkResult, *, with_source: bool) -> str:
    """Return "gsm8k 82.0 % from 82.3 % (pass)"."""
    if row.artifact is None:
        return f"{row.task} not run"
    before = format_numbers.format_percent(row.source, 1)
    source = f" from {before}" if with_source and row.source is not None else ""
    score = format_numbers.format_percent(row.artifact, 1)
    return f"{row.task} {score}{source} ({name_outcome(row)})"


def name_outcome(row: BenchmarkResult) -> str:
    """Return the verdict on a task without its figures: "not resolved"."""
    return "not valid" if row.fault else row.verdict.partition(" (")[0] or row.status


# --------------------------------------------------------------------------- warnings, next command


def list_warnings(fidelity: Fidelity) -> Iterator[SummaryLine]:
    """Yield a line per warning: little gained, fallbacks, narrow texts, prompts in the calibration
    text. `quantkit report --full` has the remedies.
    """
    for wordings in _word_warnings(fidelity):
        yield SummaryLine(label="warning", wordings=wordings, style="yellow")


def _word_warnings(fidelity: Fidelity) -> Iterator[tuple[str, ...]]:
    artifact = fidelity.artifact
    gain = describe_small_gain(artifact.bytes_source, artifact.bytes_artifact)
    if gain and fidelity.modules:
        yield (gain.partition(";")[0],)
    if fidelity.fallbacks:
        kinds = ", ".join(f"{row.kind} {len(row.modules):,}" for row in fidelity.fallbacks)
        n = sum(len(row.modules) for row in fidelity.fallbacks)
        yield f"{count_noun(n, 'module')} with a fallback: {kinds}", f"fallbacks: {kinds}"
    seen = list_seen_kinds(fidelity) or frozenset[str]()
    if sentence := describe_narrowness(seen):
        languages = len({get_language(label) for label in seen})
        kinds = f"{count_noun(len(seen), 'kind')} of text"
        short = f"narrow calibration: {kinds} in {count_noun(languages, 'language')}"
        yield sentence.partition(";")[0], short
    measured = fidelity.measured_on.kinds if fidelity.measured_on else {}
    if measured and describe_exposure(measured, seen):
        share = compute_unseen_share(measured, seen)
        yield (f"fidelity text: {share:.0%} of kinds that calibration did not have",)
    for result in fidelity.benchmarks:
        if result.fault:
            yield (f"not valid: {result.fault}",)
    for row in fidelity.calibration.overlaps if fidelity.calibration else ():
        if row.overlapping:
            prompts = f"{row.overlapping:,} of {row.items:,} prompts"
            yield (f"{row.task}: {prompts} are in the calibration text",)


def make_next_command(fidelity: Fidelity, artifact: Path) -> str:
    """Return the command after a build: details of an artifact that misses a gate or was not
    measured for one, else serving, or a check against the source if no engine loads it.
    """
    path = shlex.quote(str(artifact))
    is_complete = all(row.ok for row in fidelity.gates)
    if not is_complete:
        return f"quantkit report {path} --full"
    if fidelity.artifact.serving:
        return f"quantkit serve {path}"
    return f"quantkit verify {path} --deep"
