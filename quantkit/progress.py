"""Progress of a long step, reported by builds, benchmarks and transfers to the command line."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Progress:
    """`done` of `total` units of `stage`, with an optional note.

    began: units that an earlier, interrupted run has done.
    """

    stage: str
    done: float
    total: float
    note: str = ""
    began: float = 0.0


ProgressCallback = Callable[[Progress], None]
"""Receives every `Progress` of a step."""


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A stage that a command will report, with its expected seconds; None if they are not known."""

    stage: str
    seconds: float | None = None


@dataclass(frozen=True, kw_only=True)
class TimeLeft:
    """Seconds until a command ends; `unknown`: stages that follow, whose seconds are not known, so
    that `seconds` is the time of the running stage and of those in between.
    """

    seconds: float
    unknown: tuple[str, ...] = ()


class TimeKeeper:
    """Estimates one time left over all phases of a command. Mutable.

    The running stage is measured, those that follow have their expected seconds. A stage that is
    reported again from its start, as that of a second quantization, is the next phase of its name.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._began = self._last = clock()
        self._phases: tuple[Phase, ...] = ()
        self._running: Progress | None = None
        self._next = 0  # the first phase after the running one

    def set_phases(self, phases: Sequence[Phase]) -> None:
        """Set the stages that will follow, in their order."""
        self._phases, self._next = tuple(phases), 0

    def update(self, progress: Progress) -> TimeLeft | None:
        """Take a report; return the time left, None as long as nothing was measured."""
        now, running = self._clock(), self._running
        if running is None or progress.stage != running.stage or progress.done < running.done:
            self._began = self._last
            places = range(self._next, len(self._phases))
            matching = (n for n in places if self._phases[n].stage == progress.stage)
            self._next = next(matching, self._next - 1) + 1
        self._running, self._last = progress, now
        work = progress.total - progress.began
        share = (progress.done - progress.began) / work if work > 0 else 1.0
        here = self._estimate_running(progress, now - self._began, share)
        if here is None:
            return None
        later = self._phases[self._next :]
        unknown = next((n for n, phase in enumerate(later) if phase.seconds is None), len(later))
        return TimeLeft(
            seconds=here + sum(phase.seconds or 0.0 for phase in later[:unknown]),
            unknown=tuple(
                dict.fromkeys(
                    phase.stage.partition(",")[0]
                    for phase in later[unknown:]
                    if phase.seconds is None
                )
            ),
        )

    def _estimate_running(self, progress: Progress, elapsed: float, share: float) -> float | None:
        """Return the seconds left of the running stage."""
        if share >= MEASURED_SHARE:
            return elapsed * (1 - share) / share
        phase = self._phases[self._next - 1] if self._next else None
        if phase is None or phase.stage != progress.stage or phase.seconds is None:
            return None
        return max(0.0, phase.seconds - elapsed)


MEASURED_SHARE = 0.05
"""Share of a stage after which its own speed is used, and not the expected one."""


def format_duration(seconds: float) -> str:
    """Return 42.3 as "42 s", 300 as "5 min", 9000 as "2.5 h"."""
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    if seconds < 90 * 60:
        return f"{round(seconds / 60)} min"
    hours = seconds / 3600
    return f"{hours:.1f} h" if hours < 10 else f"{hours:,.0f} h"
