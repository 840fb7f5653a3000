"""Trying again what may work when tried again, with waits that grow."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from quantkit.errors import TransferError

_LONGEST_WAIT = 15.0  # seconds

Result = TypeVar("Result")


class TransientError(Exception):
    """A connection ended or a server failed for the moment: the same again may work. `str` says how."""


class Cancelled(Exception):
    """Another file's transfer failed or the user interrupted: this one ends too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Tries in a row without any progress in between, and seconds before the second."""

    tries: int = 8
    first_wait: float = 0.5


def retry(
    work: Callable[[], Result], where: str, patience: RetryPolicy, progress: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> Result:  # fmt: skip
    """Do something that may be interrupted, again; TransferError after `tries` in a row without progress."""
    failed, before, pause = 0, progress(), stop or threading.Event()
    while True:
        try:
            return work()
        except TransientError as fault:
            failed = 1 if progress() > before else failed + 1
            before = max(before, progress())
            if failed >= patience.tries:
                times = "1 failure" if failed == 1 else f"{failed} failures in a row"
                raise TransferError(
                    f"{where}: expected a connection that holds, found {times} ({fault}); what arrived is kept, the "
                    "same command goes on"
                ) from fault
        if pause.wait(min(patience.first_wait * 2 ** (failed - 1), _LONGEST_WAIT)):
            raise Cancelled
