"""Admission for asyncio: a coroutine waits for its turn, gives up after a while, and never keeps a place it lost.

Whoever is cancelled leaves, whether the turn was already granted or not: `enter` returns a turn or leaves nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from itertools import count

from quantkit.serve.gateway.admission_policy import AdmissionPolicy

_MESSAGES = {
    "full": "the queue is full",
    "over": "this key has too many requests at once",
    "displaced": "the queue is full and a more urgent request took this place",
    "late": "no turn came in time",
}


class QueueFull(Exception):
    """Turned away: why, in one word and in a sentence, and after how many seconds to come again."""

    def __init__(self, reason: str, retry_after: int) -> None:
        self.reason, self.retry_after = reason, retry_after
        super().__init__(f"{_MESSAGES[reason]}; try again in {retry_after} s")


class AdmissionQueue:
    """Turns at an engine."""

    def __init__(
        self, admission: AdmissionPolicy, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.admission = admission
        self._clock = clock
        self._numbers = count()
        self._waiting: dict[
            int, asyncio.Future[bool]
        ] = {}  # True: your turn; False: you lost your place

    async def enter(self, priority: int, who: str, *, patience: float, most: int = 0) -> int:
        """Wait for a turn, at most `patience` seconds; Busy when none comes. The number is for `leave`."""
        number = next(self._numbers)
        offer = self.admission.offer(number, priority, who, self._clock(), most=most)
        if offer.outcome == "run":
            return number
        if offer.outcome != "wait":
            raise QueueFull(offer.outcome, self.admission.retry_after())
        if offer.displaced is not None:
            self._tell(offer.displaced, False)
        granted = self._waiting[number] = asyncio.get_running_loop().create_future()
        try:
            async with asyncio.timeout(patience):
                mine = await granted
        except TimeoutError:
            self.leave(number)
            raise QueueFull("late", self.admission.retry_after()) from None
        except BaseException:
            self.leave(number)
            raise
        if not mine:
            raise QueueFull("displaced", self.admission.retry_after())
        return number

    def leave(self, number: int) -> None:
        """Give the turn, or the place in the queue, back."""
        self._waiting.pop(number, None)
        following = self.admission.leave(number, self._clock())
        if following is not None:
            self._tell(following, True)

    def _tell(self, number: int, mine: bool) -> None:
        """Wake who waits. One whose wait was cancelled in this very moment leaves by itself."""
        granted = self._waiting.pop(number)
        if not granted.done():
            granted.set_result(mine)
