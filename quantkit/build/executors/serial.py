"""The executor of one device: one task at a time, in the calling thread."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

Result = TypeVar("Result")


@dataclass
class SerialExecutor:
    """Runs each task when its result is taken."""

    workers: int = 1

    def map(self, function: Callable[..., Result], *arguments: Iterable[Any]) -> Iterator[Result]:
        """Yield function(a, b, ...) for each a, b, ... of `arguments`, in order."""
        return map(function, *arguments)
