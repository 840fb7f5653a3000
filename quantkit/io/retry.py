"""Retries with exponential backoff."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from quantkit.errors import TransferError

_LONGEST_WAIT = 15.0  # seconds

Result = TypeVar("Result")


class TransientError(Exception):
    """A broken connection or a temporary server failure, worth a retry; `str` gives the reason."""


class ResponseRefused(Exception):
    """An answer that breaks a limit, now and on every try; `str` says what was expected."""


class Cancelled(Exception):
    """Another file's transfer failed or the user interrupted: this transfer ends too."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RetryPolicy:
    """Tries in a row without progress, and seconds before the second one; the wait then doubles."""

    tries: int = 8
    first_wait: float = 0.5


def retry(
    work: Callable[[], Result],
    where: str,
    policy: RetryPolicy,
    progress: Callable[[], int] = lambda: 0,
    stop: threading.Event | None = None,
) -> Result:
    """Call `work` again after each TransientError.

    progress: a count that rises with progress, which resets the number of failures. Raises
    TransferError after `policy.tries` failures in a row without progress, Cancelled if `stop` is
    set during a wait.
    """
    n_failed, last_progress, pause = 0, progress(), stop or threading.Event()
    while True:
        try:
            return work()
        except TransientError as fault:
            n_failed = 1 if progress() > last_progress else n_failed + 1
            last_progress = max(last_progress, progress())
            if n_failed >= policy.tries:
                times = "1 failure" if n_failed == 1 else f"{n_failed} failures in a row"
                raise TransferError(
                    f"{where}: expected a connection that holds, found {times} ({fault}); what "
                    "arrived is kept, run the same command again to resume"
                ) from fault
        if pause.wait(min(policy.first_wait * 2 ** (n_failed - 1), _LONGEST_WAIT)):
            raise Cancelled
