"""Bounds for data sets of the hub, which the library `datasets` reads.

The library follows links of untrusted repositories: a README may point to any address, and
its files may have no end. Within `bound_data_set`, requests to the Hub have one budget, and file
systems of other servers are refused before a request.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

from fsspec import AbstractFileSystem
from fsspec.registry import _registry, known_implementations, register_implementation

from quantkit.errors import QuantkitError
from quantkit.io.hub_client import HubBudget, bound_hub
from quantkit.io.retry import ResponseRefused, TransientError
from quantkit.texts.corpus_spec import get_first_line

MAX_DOWNLOAD_BYTES = 20_000_000_000
"""Bytes of all answers: ten times the shards of a large set from which a mixture reads rows."""
MAX_REQUESTS = 20_000
DOWNLOAD_SECONDS = 6 * 3600.0
LOCAL_PROTOCOLS = frozenset({"hf", "file", "local", "memory", "data"})
"""Protocols without a server, and the Hub's."""
_ARCHIVES = frozenset({"tar", "zip", "libarchive"})


class DataSetFault(Exception):
    """A data set that cannot be read; `str` is one line that says why."""


class RefusedFileSystem(AbstractFileSystem):  # type: ignore[misc]  # fsspec has no types
    """Stands for the file systems of other servers."""

    @classmethod
    def _strip_protocol(cls, path: str) -> NoReturn:
        """Raise ResponseRefused: the first call with an address."""
        raise ResponseRefused(
            "expected the files of the data set's repository, found an address of another server"
        )

    @staticmethod
    def _get_kwargs_from_urls(path: str) -> NoReturn:
        """Raise ResponseRefused, as above."""
        RefusedFileSystem._strip_protocol(path)


@contextmanager
def bound_data_set() -> Iterator[None]:
    """Bound what `datasets` downloads, and refuse other servers than the Hub."""
    budget = HubBudget(
        n_bytes=MAX_DOWNLOAD_BYTES, n_requests=MAX_REQUESTS, seconds=DOWNLOAD_SECONDS
    )
    with bound_hub(budget, allows_xet=False):
        before = dict(_registry)
        for protocol in known_implementations.keys() - LOCAL_PROTOCOLS - _ARCHIVES:
            register_implementation(protocol, RefusedFileSystem, clobber=True)
        try:
            yield
        finally:
            _registry.clear()
            _registry.update(before)


@contextmanager
def translate_library_faults() -> Iterator[None]:
    """Raise DataSetFault for any error of the libraries, and QuantkitError as it is."""
    try:
        yield
    except QuantkitError:
        raise
    except Exception as error:  # the files decide which of many libraries fails
        raise DataSetFault(describe_library_fault(error)) from error


def describe_library_fault(error: BaseException) -> str:
    """Return one line: a bound's own sentence, which the library may have wrapped, or its error."""
    return get_first_line(find_bound_fault(error) or error)


def find_bound_fault(error: BaseException) -> BaseException | None:
    """Return the error of a bound that caused `error`; None if there is none."""
    inner: BaseException | None = error
    while inner is not None and not isinstance(inner, ResponseRefused | TransientError):
        inner = inner.__cause__ or inner.__context__
    return inner
