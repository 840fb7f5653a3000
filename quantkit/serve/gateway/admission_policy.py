"""The admission policy: which request runs, waits or is rejected.

Without a clock, sockets or asyncio: every decision is a function of the calls.

A request has as many turns as it makes the engine generate sequences. At most `max_running` turns
run and `max_waiting` requests wait. The next request to run has the smallest
`arrival + priority * aging`; priority 0 is the most urgent. It waits until all its turns fit, and
no later one passes it; one with more turns than `max_running` runs alone. Two consequences, both
tested:

- no starvation: a request yields only to requests that arrive less than `priority * aging` seconds
  after it;
- priorities hold: of two requests that arrive within `aging` seconds of each other, the more urgent
  one runs first.

If the queue is full, the last request in this order is rejected. It may be one that waits already.

A request enters before its body is read, when its turns are unknown and count as one. It is
rejected there if even its most urgent priority would be.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from math import inf
from typing import Literal

PRIORITY_LEVELS = 10
"""Priorities are 0 (first) to 9."""
MAX_RETRY_AFTER = 60
_SMOOTHING = 0.1  # weight of the latest request in the mean service time


@dataclass(frozen=True, slots=True)
class AdmissionResult:
    """The outcome of an offer: "run", "wait", "full" or "over" (the key has too many turns).

    displaced: the request that lost its place in the queue to this one.
    """

    outcome: Literal["run", "wait", "full", "over"]
    displaced: int | None = None


class AdmissionPolicy:
    """Entered, running and waiting requests. A request is a number that the caller chooses."""

    def __init__(self, *, max_running: int, max_waiting: int, aging: float) -> None:
        self.max_running, self.max_waiting, self.aging = max_running, max_waiting, aging
        self.running: dict[int, float] = {}  # request -> start time
        # (arrival + priority * aging, request), the next to run first
        self.waiting: list[tuple[float, int]] = []
        self.n_running = 0  # turns; those of one request count as at most max_running
        self._rank: dict[int, float] = {}
        self._client: dict[int, str] = {}
        self._turns: dict[int, int] = {}
        self._turns_by_client: Counter[str] = Counter()
        self._mean_seconds = 1.0  # service time

    def enter(
        self, request: int, priority: int, client: str, now: float, *, max_turns: int = 0
    ) -> Literal["entered", "full", "over"]:
        """Register a request whose body is not read yet.

        priority: the most urgent one that it may turn out to have. max_turns: as for `offer`.
        """
        if max_turns and self._turns_by_client[client] >= max_turns:
            return "over"
        is_full = self.n_running >= self.max_running and len(self.waiting) >= self.max_waiting
        if is_full and not self._precedes_last((now + priority * self.aging, -inf)):
            return "full"
        self._count(request, client, 1)
        return "entered"

    def offer(
        self,
        request: int,
        priority: int,
        client: str,
        now: float,
        *,
        turns: int = 1,
        max_turns: int = 0,
    ) -> AdmissionResult:
        """Admit, queue or reject a request, which may have entered before.

        max_turns: running and waiting turns that `client` may have; 0: no limit.
        """
        self._uncount(request)
        if max_turns and self._turns_by_client[client] + turns > max_turns:
            return AdmissionResult("over")
        entry = (now + priority * self.aging, request)
        if self._fits(turns) and (not self.waiting or entry < self.waiting[0]):
            self._count(request, client, turns)
            self._start(request, now)
            return AdmissionResult("run")
        displaced = None
        if len(self.waiting) >= self.max_waiting:
            if not self._precedes_last(entry):
                return AdmissionResult("full")
            displaced = self.waiting[-1][1]
            self._drop(displaced)
        insort(self.waiting, entry)
        self._rank[request] = entry[0]
        self._count(request, client, turns)
        return AdmissionResult("wait", displaced)

    def release(self, request: int, now: float) -> list[int]:
        """Remove a request that finished, gave up or was cancelled; return those to run next.

        Idempotent: an unknown request is ignored.
        """
        started = self.running.pop(request, None)
        if started is not None:
            self._mean_seconds += _SMOOTHING * (now - started - self._mean_seconds)
            self.n_running -= self._occupied(self._turns[request])
            self._uncount(request)
        elif request in self._rank:
            self._drop(request)
        else:
            self._uncount(request)
        following = []
        while self.waiting and self._fits(self._turns[self.waiting[0][1]]):
            request = self.waiting.pop(0)[1]
            del self._rank[request]
            self._start(request, now)
            following.append(request)
        return following

    def retry_after(self) -> int:
        """Estimate the seconds until a place is free: turns in the queue x mean service time."""
        waiting = sum(self._occupied(self._turns[request]) for _, request in self.waiting)
        expected = (waiting + 1) * self._mean_seconds / self.max_running
        return max(1, min(MAX_RETRY_AFTER, round(expected)))

    def _occupied(self, turns: int) -> int:
        return min(turns, self.max_running)

    def _fits(self, turns: int) -> bool:
        return self.n_running + self._occupied(turns) <= self.max_running

    def _precedes_last(self, entry: tuple[float, float]) -> bool:
        return bool(self.waiting) and entry < self.waiting[-1]

    def _start(self, request: int, now: float) -> None:
        self.running[request] = now
        self.n_running += self._occupied(self._turns[request])

    def _drop(self, request: int) -> None:
        entry = (self._rank.pop(request), request)
        del self.waiting[bisect_left(self.waiting, entry)]
        self._uncount(request)

    def _count(self, request: int, client: str, turns: int) -> None:
        self._client[request], self._turns[request] = client, turns
        self._turns_by_client[client] += turns

    def _uncount(self, request: int) -> None:
        if request not in self._client:
            return
        client = self._client.pop(request)
        self._turns_by_client[client] -= self._turns.pop(request)
        if not self._turns_by_client[client]:
            del self._turns_by_client[client]
