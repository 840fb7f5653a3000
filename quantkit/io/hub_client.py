"""Bounded requests to the Hugging Face Hub: ours, and those of huggingface_hub and datasets.

The Hub serves repositories of strangers, and HF_ENDPOINT may name a mirror that lies. Our requests
go through a client that bounds head, body, encoding and time. Within `bound_hub`, huggingface_hub
and datasets use the same kind of client, with a budget over all requests: a listing without end and
a file without a size end there.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from urllib.parse import quote

import httpx2
from huggingface_hub import constants, get_token, set_client_factory
from huggingface_hub.errors import OfflineModeIsEnabled
from huggingface_hub.hf_api import RepoFile
from huggingface_hub.utils import _http, hf_raise_for_status  # type: ignore[attr-defined]

from quantkit.io.bounded_http import (
    IDENTITY,
    LIMITS_KEY,
    MAX_VALUES,
    ResponseLimits,
    bound_response,
    call_with_deadline,
)
from quantkit.io.files import shorten_repr
from quantkit.io.public_hosts import is_public_host
from quantkit.io.retry import ResponseRefused, TransientError
from quantkit.version import __version__

MAX_PAGES = 1000
"""Pages of a listing: the Hub sends 1,000 entries in each."""
API_ANSWER = ResponseLimits(n_bytes=8_000_000, n_values=MAX_VALUES, seconds=120.0)
"""An answer of the Hub's API; that of a repository of 100,000 files has 5 MB."""
MAX_FILE_BYTES = 1 << 40
"""Size of a file: the Hub accepts 500 GB at most."""
MAX_WAIT_SECONDS = 600
"""Wait that a server may demand: the Hub's rate limits are of five minutes."""
_RATE_LIMIT_RESET = re.compile(r";\s*t\s*=\s*([0-9]+)")
_SILENCE_SECONDS = 60.0
_OFFICIAL_ENDPOINT = "https://huggingface.co"


@dataclass(kw_only=True, slots=True)
class HubBudget:
    """What all requests of one download may use together; mutable, used by several threads.

    n_bytes: of all bodies; n_requests: redirects count; seconds: None where the rate bounds it.
    """

    n_bytes: int
    n_requests: int
    seconds: float | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _began: float = field(default_factory=time.monotonic)
    _received: int = 0
    _requests: int = 0

    def count_request(self, _request: object = None) -> None:
        """Count a request, as an event hook. Raises ResponseRefused or TransientError."""
        with self._lock:
            self._requests += 1
            n_requests = self._requests
        if n_requests > self.n_requests:
            raise ResponseRefused(f"expected at most {self.n_requests:,} requests, needed more")
        self._check_time()

    def count_bytes(self, n_bytes: int) -> None:
        """Count received bytes. Raises ResponseRefused or TransientError."""
        with self._lock:
            self._received += n_bytes
            received = self._received
        if received > self.n_bytes:
            raise ResponseRefused(
                f"expected at most {self.n_bytes:,} bytes of all answers, found more"
            )
        self._check_time()

    def _check_time(self) -> None:
        if self.seconds is not None and time.monotonic() - self._began > self.seconds:
            raise TransientError(f"the download took more than {self.seconds:.0f} seconds")


class BudgetStream(httpx2.SyncByteStream):
    """The body of an answer, counted in a budget."""

    def __init__(self, stream: httpx2.SyncByteStream, budget: HubBudget) -> None:
        self._stream, self._budget = stream, budget

    def __iter__(self) -> Iterator[bytes]:
        for piece in self._stream:
            self._budget.count_bytes(len(piece))
            yield piece

    def close(self) -> None:
        """Close the connection."""
        self._stream.close()


class HubClient(httpx2.Client):
    """A client that bounds each answer: head, body, encoding and time.

    Raises ResponseRefused, TransientError and the errors of httpx2 and huggingface_hub's offline
    mode.
    """

    def __init__(self, budget: HubBudget | None = None) -> None:
        requests: list[Any] = [check_online, check_target]
        responses: list[Any] = [refuse_long_wait, bound_response]
        if budget is not None:
            requests.append(budget.count_request)
            responses.append(partial(charge_response, budget))
        super().__init__(
            timeout=_SILENCE_SECONDS,
            follow_redirects=True,
            event_hooks={"request": requests, "response": responses},
        )

    def send(
        self,
        request: httpx2.Request,
        *,
        stream: bool = False,
        auth: Any = httpx2.USE_CLIENT_DEFAULT,
        follow_redirects: Any = httpx2.USE_CLIENT_DEFAULT,
    ) -> httpx2.Response:
        """Send a request and wait for the head of its answer; read the body unless `stream`."""
        request.headers |= IDENTITY
        request.extensions.setdefault(LIMITS_KEY, choose_limits(request, is_stream=stream))
        answer = call_with_deadline(
            partial(
                super().send, request, stream=True, auth=auth, follow_redirects=follow_redirects
            )
        )
        if not stream:
            try:
                answer.read()
            finally:
                answer.close()
        return answer


def refuse_long_wait(response: httpx2.Response) -> None:
    """Raise TransientError if an answer demands a long wait, as an event hook.

    huggingface_hub sleeps as long as the headers of a rate limit say.
    """
    waits = [response.headers.get("Retry-After", "").strip()]
    waits += _RATE_LIMIT_RESET.findall(response.headers.get("RateLimit", ""))
    seconds = max((int(wait[:20]) for wait in waits if wait.isdecimal()), default=0)
    if seconds > MAX_WAIT_SECONDS:
        raise TransientError(f"the server demands a wait of {seconds:,} seconds")


def charge_response(budget: HubBudget, response: httpx2.Response) -> None:
    """Count the body of an answer in a budget, as an event hook."""
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = BudgetStream(response.stream, budget)


def choose_limits(request: httpx2.Request, *, is_stream: bool) -> ResponseLimits:
    """Return the limits of an answer: the requested range, a file, or JSON that memory holds."""
    first, _, last = request.headers.get("Range", "").removeprefix("bytes=").partition("-")
    if first.isdecimal() and last.isdecimal():
        return ResponseLimits(n_bytes=max(0, int(last[:20]) - int(first[:20]) + 1))
    if is_stream and "/api/" not in request.url.path:
        return ResponseLimits(n_bytes=MAX_FILE_BYTES)
    return API_ANSWER


def check_online(_request: httpx2.Request) -> None:
    """Refuse requests in huggingface_hub's offline mode; raises OfflineModeIsEnabled."""
    if constants.is_offline_mode():
        raise OfflineModeIsEnabled("expected the Hub to be used, found offline mode")


def check_target(request: httpx2.Request) -> None:
    """Check the target of a request, redirected ones too. Raises ResponseRefused."""
    url, own = request.url, httpx2.URL(constants.ENDPOINT)
    if url.host == own.host and url.scheme in {"https", own.scheme}:
        return
    if url.scheme != "https" or not is_public_host(url.host):
        raise ResponseRefused(
            "expected downloads from public hosts over https, found a redirect to "
            f"{shorten_repr(f'{url.scheme}://{url.host}')}"
        )


_SCOPE_LOCK = threading.RLock()


@contextmanager
def bound_hub(budget: HubBudget, *, allows_xet: bool = True) -> Iterator[None]:
    """Bound the requests of huggingface_hub and datasets to the Hub; one thread at a time.

    allows_xet: use Xet's own client, which no budget reaches, with the official Hub, whose storage
    limits its answers. Afterwards the client factory is the caller's again.
    """
    with _SCOPE_LOCK:
        factory, has_no_xet = _http._GLOBAL_CLIENT_FACTORY, constants.HF_HUB_DISABLE_XET
        set_client_factory(partial(HubClient, budget))
        if not allows_xet or constants.ENDPOINT != _OFFICIAL_ENDPOINT:
            constants.HF_HUB_DISABLE_XET = True
        try:
            yield
        finally:
            set_client_factory(factory)
            constants.HF_HUB_DISABLE_XET = has_no_xet


def make_headers() -> dict[str, str]:
    """Return the headers of a request; those of huggingface_hub's `build_hf_headers` need a request
    of their own, which is not bounded.
    """
    token = None if constants.HF_HUB_DISABLE_IMPLICIT_TOKEN else get_token()
    login = {"Authorization": f"Bearer {token}"} if token else {}
    return {"User-Agent": f"quantkit/{__version__}", **login, **IDENTITY}


class HubReader:
    """Bounded reads of one model repository. Raises the errors of HubClient and of
    huggingface_hub's `hf_raise_for_status`.
    """

    def __init__(self, repository: str) -> None:
        self._client, self._repository = HubClient(), repository

    def __enter__(self) -> HubReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the connections; huggingface_hub keeps its own for the whole process."""
        self._client.close()

    def fetch_commit(self, revision: str) -> str | None:
        """Return the commit of a branch, tag or commit."""
        name = quote(revision, safe="")
        answer = self._get(f"{self._get_api()}/revision/{name}").json()
        commit = answer.get("sha") if isinstance(answer, dict) else None
        return commit if isinstance(commit, str) and commit.isalnum() else None

    def list_files(self, commit: str) -> Iterator[RepoFile]:
        """Yield the files of a commit.

        The pages are requested here, because huggingface_hub follows them without end and to any
        host. Raises ResponseRefused after MAX_PAGES pages.
        """
        url = httpx2.URL(f"{self._get_api()}/tree/{commit}", params={"recursive": True})
        page = url
        for _ in range(MAX_PAGES):
            answer = self._get(page)
            yield from parse_listing(answer.json())
            link = answer.links.get("next", {}).get("url")
            if link is None:
                return
            page = url.join(link)
            if (page.scheme, page.netloc) != (url.scheme, url.netloc):
                raise ResponseRefused(
                    f"expected the listing to stay at {url.host}, found a page at "
                    f"{shorten_repr(page.host)}"
                )
        raise ResponseRefused(
            f"expected the files of a model, found more than {MAX_PAGES} pages of them"
        )

    @contextmanager
    def open_file(
        self, commit: str, name: str, limits: ResponseLimits, byte_range: str = ""
    ) -> Iterator[httpx2.Response]:
        """Request a file, or a range "first-last" of it, and close the connection afterwards."""
        url = f"{constants.ENDPOINT}/{self._repository}/resolve/{commit}/{quote(name)}"
        headers = make_headers() | ({"Range": f"bytes={byte_range}"} if byte_range else {})
        request = self._client.build_request(
            "GET", url, headers=headers, extensions={LIMITS_KEY: limits}
        )
        answer = self._client.send(request, stream=True)
        try:
            if answer.is_error:
                answer.read()
            hf_raise_for_status(answer)
            yield answer
        finally:
            answer.close()

    def read_file(self, commit: str, name: str, max_bytes: int) -> bytes:
        """Return a file of at most `max_bytes`."""
        limits = ResponseLimits(n_bytes=max_bytes)
        with self.open_file(commit, name, limits) as answer:
            return answer.read()

    def _get_api(self) -> str:
        return f"{constants.ENDPOINT}/api/models/{self._repository}"

    def _get(self, url: str | httpx2.URL) -> httpx2.Response:
        """Return the answer of the Hub's API."""
        answer = self._client.get(url, headers=make_headers())
        hf_raise_for_status(answer)
        return answer


def parse_listing(page: object) -> Iterator[RepoFile]:
    """Yield the files of a page of a listing. Raises ResponseRefused for anything else."""
    if not isinstance(page, list):
        raise ResponseRefused(f"expected a list of files, found {shorten_repr(page)}")
    for entry in page:
        if isinstance(entry, dict) and entry.get("type") == "directory":
            continue
        try:
            file = RepoFile(**entry)  # type: ignore[no-untyped-call]
        except (TypeError, KeyError, AttributeError, ValueError):
            file = None
        if (
            file is None
            or not isinstance(file.path, str)
            or type(file.size) is not int
            or file.size < 0
        ):
            raise ResponseRefused(
                f"expected path and size of a file in the listing, found {shorten_repr(entry)}"
            )
        yield file
