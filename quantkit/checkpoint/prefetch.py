"""Prefetching: a background thread reads the next block while the current one is computed."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, Self, TypeVar

Request = TypeVar("Request")
Result = TypeVar("Result")


class ReadAhead(Generic[Request, Result]):
    """Calls `load(request)` one request ahead.

    At most two results exist at once, the current and the next: a memory plan counts both. An error
    of the background read is raised by the `take` of that request. Use as a context manager:
    leaving it waits for a running read and drops its result.
    """

    def __init__(self, load: Callable[[Request], Result]) -> None:
        self._load = load
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="read-ahead")
        self._announced: tuple[Request, Future[Result]] | None = None

    def take(self, request: Request, following: Request | None = None) -> Result:
        """Return load(request), prefetched if it was announced; then start reading `following`.

        Raises the errors of `load`.
        """
        announced, self._announced = self._announced, None
        if announced is not None and announced[0] == request:
            result = announced[1].result()
        else:
            if announced is not None:
                announced[1].cancel()
            result = self._thread.submit(
                self._load, request
            ).result()  # one thread: it starts after a running read
        announced = None
        if following is not None:
            self._announced = (following, self._thread.submit(self._load, following))
        return result

    def close(self) -> None:
        """Wait for a running read, drop its result and end the thread; safe to call twice."""
        self._announced = None
        self._thread.shutdown(wait=True, cancel_futures=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class ScheduledReads(Generic[Request, Result]):
    """Reads by request, one ahead of the caller by a schedule.

    `take` returns the result of exactly the request it is given. The schedule is the expected
    order. It affects prefetching only: a wrong schedule costs time and nothing else.
    Memory is that of `ReadAhead`. Use as a context manager.
    """

    def __init__(self, load: Callable[[Request], Result], schedule: Iterable[Request]) -> None:
        self._ahead = ReadAhead(load)
        self._schedule = deque(schedule)

    def take(self, request: Request) -> Result:
        """Return load(request), and prefetch the next of the schedule. Raises load's errors."""
        if request in self._schedule:
            while self._schedule.popleft() != request:
                pass
        return self._ahead.take(request, self._schedule[0] if self._schedule else None)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._ahead.close()
