"""Who runs, who waits, who is turned away. No clock, no sockets, no asyncio: every decision is a function of calls.

At most `running` requests run and `waiting` wait. Who runs next has the smallest `arrival + priority * aging`; priority
0 is the most urgent. Two consequences, both kept by tests:

- no starvation: a request yields only to those that arrive less than `priority * aging` seconds after it;
- priorities hold: of two that arrived within `aging` seconds of each other the more urgent runs first.

When the queue is full the last in this order is turned away, which may be one that already waits.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from typing import Literal

PRIORITY_LEVELS = 10
"""Priorities are 0 (first) to 9."""
MAX_RETRY_AFTER = 60
_SMOOTHING = 0.1  # weight of the latest request in the mean time of service


@dataclass(frozen=True, slots=True)
class AdmissionResult:
    """What became of a request: "run", "wait", "full" or "over" (its key has too many); `displaced` lost its place."""

    outcome: Literal["run", "wait", "full", "over"]
    displaced: int | None = None


class AdmissionPolicy:
    """The state: who runs since when, who waits in which order. Requests are numbers that the caller chooses."""

    def __init__(self, *, running: int, waiting: int, aging: float) -> None:
        self.limit, self.room, self.aging = running, waiting, aging
        self.running: dict[int, float] = {}  # request -> since when
        self.order: list[
            tuple[float, int]
        ] = []  # (arrival + priority * aging, request), next first
        self._place: dict[int, float] = {}
        self._who: dict[int, str] = {}
        self._by_who: Counter[str] = Counter()
        self._mean = 1.0  # seconds of service

    def offer(
        self, request: int, priority: int, who: str, now: float, *, most: int = 0
    ) -> AdmissionResult:
        """A request of `who` asks to run; with `most`, at most so many of theirs run and wait."""
        if most and self._by_who[who] >= most:
            return AdmissionResult("over")
        if len(self.running) < self.limit:
            self.running[request] = now
            self._count(request, who)
            return AdmissionResult("run")
        entry = (now + priority * self.aging, request)
        displaced = None
        if len(self.order) >= self.room:
            if not self.order or entry >= self.order[-1]:
                return AdmissionResult("full")
            displaced = self.order[-1][1]
            self._drop(displaced)
        insort(self.order, entry)
        self._place[request] = entry[0]
        self._count(request, who)
        return AdmissionResult("wait", displaced)

    def leave(self, request: int, now: float) -> int | None:
        """A request is done, gave up or was cancelled, in whatever state; who runs in its stead. Twice does no harm."""
        since = self.running.pop(request, None)
        if since is None:
            if request in self._place:
                self._drop(request)
            return None
        self._mean += _SMOOTHING * (now - since - self._mean)
        self._uncount(request)
        if not self.order:
            return None
        following = self.order.pop(0)[1]
        del self._place[following]
        self.running[following] = now
        return following

    def retry_after(self) -> int:
        """Seconds after which a place should be free: the queue's length times the mean time of service."""
        expected = (len(self.order) + 1) * self._mean / self.limit
        return max(1, min(MAX_RETRY_AFTER, round(expected)))

    def _drop(self, request: int) -> None:
        entry = (self._place.pop(request), request)
        del self.order[bisect_left(self.order, entry)]
        self._uncount(request)

    def _count(self, request: int, who: str) -> None:
        self._who[request] = who
        self._by_who[who] += 1

    def _uncount(self, request: int) -> None:
        who = self._who.pop(request)
        self._by_who[who] -= 1
        if not self._by_who[who]:
            del self._by_who[who]
