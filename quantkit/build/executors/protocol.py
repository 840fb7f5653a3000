"""The seam between the build loop and the devices that compute."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, TypeVar

Result = TypeVar("Result")


class Executor(Protocol):
    """Runs pure functions on tasks; results come in the order of the tasks, whichever worker
    computes them.

    `workers` is how many tasks run at the same time: the loop cuts work that shares a pass over a
    stream into as many parts.
    """

    workers: int

    def map(self, function: Callable[..., Result], *arguments: Iterable[Any]) -> Iterator[Result]:
        """Yield function(a, b, ...) for each a, b, ... of `arguments`, in order, like
        `concurrent.futures`' map.

        `function` must be pure: its result depends on its arguments alone, and it changes nothing.
        At most `workers` results wait to be taken, so that memory holds no more than the plan
        counts. A task's error is raised where its result would be.
        """
        ...
