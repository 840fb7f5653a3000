"""The admission policy: which request runs, waits or is rejected.

Without a clock, sockets or asyncio: every decision is a function of the calls.

At most `max_running` requests run and `max_waiting` wait. The next request to run has the smallest
`arrival + priority * aging`; priority 0 is the most urgent. Two consequences, both tested:

- no starvation: a request yields only to requests that arrive less than `priority * aging` seconds
  after it;
- priorities hold: of two requests that arrive within `aging` seconds of each other, the more urgent
  one runs first.

If the queue is full, the last request in this order is rejected. It may be one that waits already.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import Counter
from dataclasses import dataclass
from typing import Literal

PRIORITY_LEVELS = 10
"""Priorities are 0 (first) to 9."""
MAX_RETRY_AFTER = 60
_SMOOTHING = 0.1  # weight of the latest request in the mean service time


@dataclass(frozen=True, slots=True)
class AdmissionResult:
    """The outcome of an offer: "run", "wait", "full" or "over" (the key has too many requests).

    displaced: the request that lost its place in the queue to this one.
    """

    outcome: Literal["run", "wait", "full", "over"]
    displaced: int | None = None


class AdmissionPolicy:
    """Running and waiting requests. A request is a number that the caller chooses."""

    def __init__(self, *, max_running: int, max_waiting: int, aging: float) -> None:
        self.max_running, self.max_waiting, self.aging = max_running, max_waiting, aging
        self.running: dict[int, float] = {}  # request -> start time
        # (arrival + priority * aging, request), the next to run first
        self.waiting: list[tuple[float, int]] = []
        self._rank: dict[int, float] = {}
        self._client: dict[int, str] = {}
        self._requests_by_client: Counter[str] = Counter()
        self._mean_seconds = 1.0  # service time

    def offer(
        self, request: int, priority: int, client: str, now: float, *, max_requests: int = 0
    ) -> AdmissionResult:
        """Admit, queue or reject a request.

        max_requests: running and waiting requests that `client` may have; 0: no limit.
        """
        if max_requests and self._requests_by_client[client] >= max_requests:
            return AdmissionResult("over")
        if len(self.running) < self.max_running:
            self.running[request] = now
            self._count(request, client)
            return AdmissionResult("run")
        entry = (now + priority * self.aging, request)
        displaced = None
        if len(self.waiting) >= self.max_waiting:
            if not self.waiting or entry >= self.waiting[-1]:
                return AdmissionResult("full")
            displaced = self.waiting[-1][1]
            self._drop(displaced)
        insort(self.waiting, entry)
        self._rank[request] = entry[0]
        self._count(request, client)
        return AdmissionResult("wait", displaced)

    def release(self, request: int, now: float) -> int | None:
        """Remove a request that finished, gave up or was cancelled; return the request to run next.

        Idempotent: an unknown request is ignored.
        """
        started = self.running.pop(request, None)
        if started is None:
            if request in self._rank:
                self._drop(request)
            return None
        self._mean_seconds += _SMOOTHING * (now - started - self._mean_seconds)
        self._uncount(request)
        if not self.waiting:
            return None
        following = self.waiting.pop(0)[1]
        del self._rank[following]
        self.running[following] = now
        return following

    def retry_after(self) -> int:
        """Estimate the seconds until a place is free: queue length x mean service time."""
        expected = (len(self.waiting) + 1) * self._mean_seconds / self.max_running
        return max(1, min(MAX_RETRY_AFTER, round(expected)))

    def _drop(self, request: int) -> None:
        entry = (self._rank.pop(request), request)
        del self.waiting[bisect_left(self.waiting, entry)]
        self._uncount(request)

    def _count(self, request: int, client: str) -> None:
        self._client[request] = client
        self._requests_by_client[client] += 1

    def _uncount(self, request: int) -> None:
        client = self._client.pop(request)
        self._requests_by_client[client] -= 1
        if not self._requests_by_client[client]:
            del self._requests_by_client[client]
