"""The admission queue for asyncio: a coroutine waits for a slot, with a timeout.

A cancelled coroutine releases its slot or its place in the queue, even if the slot was granted at
that moment: `acquire` returns a slot or leaves nothing in the queue.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import count

from quantkit.serve.gateway.admission_policy import AdmissionPolicy

_MESSAGES = {
    "full": "the queue is full",
    "over": "this key has too many concurrent requests",
    "bytes": "the gateway holds as many bytes of requests as it may",
    "displaced": "the queue is full and a more urgent request took this place",
    "late": "timed out in the queue",
}


class QueueFull(Exception):
    """A rejected request: reason, a key of _MESSAGES; retry_after, seconds."""

    def __init__(self, reason: str, retry_after: int) -> None:
        self.reason, self.retry_after = reason, retry_after
        super().__init__(f"{_MESSAGES[reason]}; retry after {retry_after} s")


class AdmissionQueue:
    """Slots at an engine."""

    def __init__(
        self, policy: AdmissionPolicy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.policy = policy
        self._clock = clock
        self._numbers = count()
        # Result of a future: True, the slot is granted; False, the place was lost.
        self._waiting: dict[int, asyncio.Future[bool]] = {}

    def enter(self, priority: int, client: str, *, max_turns: int = 0) -> int:
        """Register a request before its body is read.

        priority: the most urgent one that it may have. Returns a number that `acquire` and
        `release` take. Raises QueueFull if the request would be rejected in any case.
        """
        slot = next(self._numbers)
        outcome = self.policy.enter(slot, priority, client, self._clock(), max_turns=max_turns)
        if outcome != "entered":
            raise QueueFull(outcome, self.policy.retry_after())
        return slot

    async def acquire(
        self,
        slot: int,
        priority: int,
        client: str,
        *,
        timeout: float,
        turns: int = 1,
        max_turns: int = 0,
    ) -> None:
        """Wait at most `timeout` seconds until an entered request may run.

        Raises QueueFull if the request is rejected.
        """
        offer = self.policy.offer(
            slot, priority, client, self._clock(), turns=turns, max_turns=max_turns
        )
        if offer.outcome == "run":
            return
        if offer.outcome != "wait":
            raise QueueFull(offer.outcome, self.policy.retry_after())
        if offer.displaced is not None:
            self._wake(offer.displaced, False)
        future = self._waiting[slot] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(timeout):
                is_granted = await future
        except TimeoutError:
            self.release(slot)
            raise QueueFull("late", self.policy.retry_after()) from None
        except BaseException:
            self.release(slot)
            raise
        if not is_granted:
            raise QueueFull("displaced", self.policy.retry_after())

    def release(self, slot: int) -> None:
        """Release a slot, a place in the queue, or an entered request. Idempotent."""
        self._waiting.pop(slot, None)
        for following in self.policy.release(slot, self._clock()):
            self._wake(following, True)

    def _wake(self, slot: int, is_granted: bool) -> None:
        """Wake a waiting coroutine. One that was cancelled at this moment releases by itself."""
        future = self._waiting.pop(slot)
        if not future.done():
            future.set_result(is_granted)
