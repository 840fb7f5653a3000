"""Models by name: a folder, `builtin:<name>`, or a model of the Hugging Face Hub.

From the Hub, safetensors, JSON, tokenizer and license files and named chat templates are
downloaded; code is copied, never run.

Config, index and headers are read by requests of our own, which are bounded (io/hub_client.py),
with the checks of local headers. A download has a budget: twice the bytes of its listed files.
`HfApi.parse_safetensors_file_metadata` would lose: the file's size, which exposes a truncated
upload; the checks of offsets, shapes, dtypes, duplicate keys and nesting; headers above 25 MB; and
the refusal of a server that ignores the range and sends gigabytes.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import httpx2
from huggingface_hub import constants, snapshot_download, try_to_load_from_cache
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import filter_repo_objects  # type: ignore[attr-defined]

from quantkit.checkpoint.canonical_names import name_tensors
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.file_names import CONFIG, HUB_ID, INDEX, SINGLE
from quantkit.checkpoint.folder_rules import is_sidecar
from quantkit.checkpoint.foreign_weights import describe_foreign_weights, describe_model_file
from quantkit.checkpoint.header import PREFIX_BYTES, Header, parse_header, parse_header_length
from quantkit.checkpoint.logical_tensors import LogicalTensors, find_logical_tensors
from quantkit.checkpoint.remote_code import list_code_files
from quantkit.checkpoint.shards import (
    check_single_set,
    choose_unindexed,
    describe_unindexed,
    find_index_faults,
    make_index,
    read_weight_map,
)
from quantkit.checkpoint.side_files import describe_left_files, describe_left_names
from quantkit.checkpoint.source_config import make_source_config
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError, HubUnreachable, UsageError
from quantkit.io.bounded_http import ResponseLimits
from quantkit.io.files import (
    JSON_LIMIT_BYTES,
    expand_home,
    get_free_bytes,
    join_faults,
    parse_json,
    shorten_repr,
)
from quantkit.io.hub_client import MAX_FILE_BYTES, MAX_PAGES, HubBudget, HubReader, bound_hub
from quantkit.io.package_data import BUILTIN_PREFIX, locate_model
from quantkit.io.retry import ResponseRefused, TransientError

_ALLOWED_FILES = [
    "*.safetensors",
    "*.json",
    "*.model",
    "*.tiktoken",
    "*.jinja",
    "*.txt",
    "*.py",
    "LICEN*",
    "NOTICE*",
]
_IGNORED_FILES = [
    "*/*",
    "consolidated*",
]  # folders of other formats; the same weights a second time
_CONNECTIONS = 8
_MAX_FILES = 10_000  # DeepSeek-V3 has 163 shards
_FIRST_BYTES = 100_000  # most headers are shorter
_HEADER_SECONDS = 600.0  # of a range; the longest header has 100 MB
_API_BYTES = 100_000_000  # of the answers of the Hub's API for one download
_REQUESTS_PER_FILE = 20  # head, redirects, and tries after broken connections


@dataclass(frozen=True, kw_only=True, slots=True)
class ResolvedModel:
    """A model on this machine; `revision` is the Hub's commit, None for other models."""

    folder: Path
    revision: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelHeaders:
    """Config, logical and stored tensor specs of a model, without weights: the input of a plan.

    `code`: the Python files that an artifact carries over; None if they are not on this machine.
    """

    config: Config
    logical: LogicalTensors
    stored_specs: Mapping[str, TensorSpec]
    revision: str | None
    code: tuple[str, ...] | None = None
    notes: tuple[str, ...] = ()  # what differs from the files that transformers reads
    left_files: tuple[str, ...] = ()  # files that are not copied, a sentence per reason

    @property
    def specs(self) -> Mapping[str, TensorSpec]:
        """Specs of the logical tensors."""
        return self.logical.specs


def resolve_model(model: str, revision: str | None = None) -> ResolvedModel:
    """Return the folder of a model, downloaded into the Hub's cache if remote; raises
    CheckpointError.
    """
    local = _locate_local(model, revision)
    if local is not None:
        return ResolvedModel(folder=local, revision=None)
    with _translate_errors(model, revision):
        return _download_snapshot(model, revision)


def _download_snapshot(model: str, revision: str | None) -> ResolvedModel:
    """Download a snapshot into the Hub's cache, or return the cached one without a connection."""
    n_bytes, n_files = 0, 0
    allowed, ignored = _ALLOWED_FILES, _IGNORED_FILES
    with suppress(*_LIBRARY_FAULTS):  # the library then looks in its cache, or raises the same
        with HubReader(model) as reader:
            commit = _fetch_commit(reader, model, revision)
            wanted = _list_wanted(model, commit, reader)
        missing = [name for name in wanted if not _is_cached(model, name, commit)]
        n_bytes, n_files = sum(wanted[name] for name in missing), len(missing)
        allowed, ignored = [*map(glob.escape, wanted)], []
        _check_free_space(model, n_bytes)
    budget = HubBudget(
        n_bytes=2 * n_bytes + _API_BYTES,  # twice: connections break and files start again
        n_requests=_REQUESTS_PER_FILE * n_files + MAX_PAGES,
    )
    with bound_hub(budget):
        path = snapshot_download(
            model,
            revision=revision,
            allow_patterns=allowed,
            ignore_patterns=ignored,
        )
    return ResolvedModel(
        folder=Path(path), revision=Path(path).name
    )  # <cache>/models--org--name/snapshots/<commit>


def _list_wanted(model: str, commit: str, reader: HubReader) -> dict[str, int]:
    """Return name -> bytes of the files to download: those that a build reads from a folder."""
    files = {file.path: file.size for file in reader.list_files(commit)}
    wanted = [
        *filter_repo_objects(files, allow_patterns=_ALLOWED_FILES, ignore_patterns=_IGNORED_FILES),
        *(name for name in files if is_sidecar(name) and not name.startswith(".")),
    ]
    wanted = list(dict.fromkeys(wanted))
    if len(wanted) > _MAX_FILES:
        raise CheckpointError(
            f"{model}: expected at most {_MAX_FILES:,} files of a model, found {len(wanted):,}; "
            "use another model"
        )
    return {name: files[name] for name in wanted}


def _is_cached(model: str, name: str, commit: str) -> bool:
    return isinstance(try_to_load_from_cache(model, name, revision=commit), str)


def _check_free_space(model: str, n_bytes: int) -> None:
    """Raise CheckpointError if the cache's disk has no room for a download."""
    folder = Path(constants.HF_HUB_CACHE)
    free = get_free_bytes(folder)
    if n_bytes > free:
        raise CheckpointError(
            f"{model}: expected {n_bytes / 1e9:.1f} GB free in {folder} for the files of the "
            f"model, found {free / 1e9:.1f} GB; free some space or set HF_HOME to another disk"
        )


def _fetch_commit(reader: HubReader, model: str, revision: str | None) -> str:
    commit = reader.fetch_commit(revision or constants.DEFAULT_REVISION)
    if commit is None:
        raise CheckpointError(f"{model}: expected the Hub to name a commit, found none; try again")
    return commit


def read_model_headers(model: str, revision: str | None = None) -> ModelHeaders:
    """Return config and tensor specs; only config, index and headers are downloaded from the Hub.

    Raises CheckpointError.
    """
    local = _locate_local(model, revision)
    if local is not None:
        opened = Checkpoint.open(local, decode=True)
        return ModelHeaders(
            config=opened.config,
            logical=opened.logical,
            stored_specs=opened.stored_specs,
            revision=None,
            code=list_code_files(local),
            notes=opened.shards.notes,
            left_files=describe_left_files(local, opened.sidecars),
        )
    with _translate_errors(model, revision), HubReader(model) as reader:
        return _fetch_headers(model, revision, reader)


def find_local_folder(model: str) -> Path | None:
    """Return the folder of a model on this machine; None for a Hub id."""
    return _locate_local(model, None)


def _locate_local(model: str, revision: str | None) -> Path | None:
    """Return the folder of a local model; None for a Hub id."""
    try:
        path = expand_home(model)
        is_local, is_single_file = path.is_dir(), path.is_file()
    except (OSError, RuntimeError):  # a name too long for any file; an unknown user's home
        path, is_local, is_single_file = Path(), False, False
    if model.startswith(BUILTIN_PREFIX):
        folder = locate_model(model)
    elif is_local:
        folder = path.absolute()
    elif is_single_file:
        raise CheckpointError(describe_model_file(path.name))
    elif model.startswith(("/", "./", "../", "~")) or not HUB_ID.fullmatch(model):
        raise CheckpointError(
            f"source.model: expected a folder, {BUILTIN_PREFIX}<name> or a Hub id like org/name, "
            f"found {shorten_repr(model)}, which is none of these; check the path"
        )
    else:
        return None
    if revision is not None:
        raise UsageError(
            f"source.revision: expected none for a model on this machine ({model}), found "
            f"{shorten_repr(revision)}; remove it"
        )
    return folder


def _fetch_headers(model: str, revision: str | None, reader: HubReader) -> ModelHeaders:
    commit = _fetch_commit(reader, model, revision)
    present = {file.path for file in reader.list_files(commit)}
    if foreign := describe_foreign_weights([n for n in present if "/" not in n], model):
        raise CheckpointError(foreign)
    values = _fetch_json(reader, model, CONFIG, commit, infinite=True)
    config = make_source_config(values, f"{model}: {CONFIG}")
    index, unindexed = None, list[str]()
    if INDEX in present:
        index = read_weight_map(_fetch_json(reader, model, INDEX, commit), f"{model}: {INDEX}")
        if SINGLE in present:
            check_single_set(index, model)
    elif SINGLE not in present and not (
        unindexed := choose_unindexed([name for name in present if "/" not in name])
    ):
        raise CheckpointError(
            f"{model}: expected {SINGLE} or {INDEX} in the repository, found neither; quantkit "
            "reads safetensors only"
        )
    files = list(dict.fromkeys(index.values())) if index is not None else unindexed or [SINGLE]
    if missing := [file for file in files if file not in present]:
        raise CheckpointError(
            f"{model}: {INDEX}: expected the repository to hold every file, found {len(missing)} "
            f"missing, the first {shorten_repr(missing[0])}; the upload is not complete, use "
            "another revision"
        )

    def header(file: str) -> Header:
        return _fetch_header(reader, commit, file, f"{model}: {file}")

    headers = _map_parallel(header, files)
    order = make_index(headers) if index is None else index
    faults = find_index_faults(order, headers, f"{model}: {INDEX}")
    if faults:
        raise CheckpointError(join_faults(faults))
    named = name_tensors(headers, order, config)
    stored = {name: named.headers[file].specs[name] for name, file in named.files.items()}
    return ModelHeaders(
        config=config,
        logical=find_logical_tensors(config, stored, model),
        stored_specs=stored,
        revision=commit,
        notes=(*(describe_unindexed(unindexed) if unindexed else ()), *named.notes),
        left_files=describe_left_names(sorted(x for x in present if not is_sidecar(x))),
    )


def _fetch_json(
    reader: HubReader, model: str, name: str, commit: str, infinite: bool = False
) -> dict[str, object]:
    content = reader.read_file(commit, name, JSON_LIMIT_BYTES)
    return parse_json(content, f"{model}: {name}", infinite=infinite)


def _fetch_header(reader: HubReader, commit: str, file: str, where: str) -> Header:
    """Fetch and check a remote header, by one range request, or two if it is long."""

    def fetch(first: int, n_bytes: int) -> tuple[bytes, int]:
        return _fetch_range(reader, commit, file, first, n_bytes, where)

    start, n_file_bytes = fetch(0, _FIRST_BYTES)
    end = PREFIX_BYTES + parse_header_length(start[:PREFIX_BYTES], n_file_bytes, where)
    if end > len(start):
        start += fetch(len(start), end - len(start))[0]
    if len(start) < end:
        raise CheckpointError(
            f"{where}: header: expected {end} bytes, found {len(start)}; try again"
        )
    return parse_header(start[PREFIX_BYTES:end], where, n_file_bytes - end)


def _fetch_range(
    reader: HubReader, commit: str, file: str, first: int, n_bytes: int, where: str
) -> tuple[bytes, int]:
    """Return at most `n_bytes` bytes of a remote file from `first` on, and the size of the file."""
    limits = ResponseLimits(n_bytes=MAX_FILE_BYTES, seconds=_HEADER_SECONDS)
    byte_range = f"{first}-{first + n_bytes - 1}"
    with reader.open_file(commit, file, limits, byte_range) as response:
        if response.status_code != 206:
            raise CheckpointError(
                f"{where}: expected the server to send a part of the file (206), found "
                f"{response.status_code}; download the model and give its folder as source.model"
            )
        total = response.headers.get("Content-Range", "").rpartition("/")[2]
        if not total.isdecimal():
            raise CheckpointError(
                f"{where}: expected the file's size in Content-Range, found {shorten_repr(total)}; "
                "try again"
            )
        content = bytearray()
        for piece in response.iter_bytes():
            content += piece
            if len(content) >= n_bytes:
                break
    return bytes(content[:n_bytes]), int(total)


def _map_parallel(header: Callable[[str], Header], files: list[str]) -> dict[str, Header]:
    """Fetch the headers over a few connections at a time: DeepSeek-V3 has 163 shards."""
    with ThreadPoolExecutor(max_workers=_CONNECTIONS) as pool:
        return dict(zip(files, pool.map(header, files), strict=True))


_HUB_ERRORS: tuple[tuple[type[Exception], str], ...] = (
    (
        GatedRepoError,
        "expected access to this model, found a gate; accept its license on the Hub and `hf auth "
        "login`",
    ),
    (RevisionNotFoundError, "expected this revision on the Hub, found none; check source.revision"),
    (
        RepositoryNotFoundError,
        "expected this model on the Hub, found none that this user may see; check source.model",
    ),
    (
        RemoteEntryNotFoundError,
        f"expected a {CONFIG} in the repository, found none; use another model",
    ),
    (
        HFValidationError,
        "expected a Hub id like org/name and a revision, found something else; check source",
    ),
    (HfHubHTTPError, "expected an answer of the Hub, found an HTTP error; try again later"),
)
"""Errors of the Hub and their messages, specific ones first; connection errors excluded."""

_TRANSPORTS = frozenset({"httpx2", "httpcore2"})
"""HTTP libraries of huggingface_hub; their connection errors share no base class."""
_LIBRARY_FAULTS = (HfHubHTTPError, httpx2.HTTPError, OSError)
"""Errors after which a cached snapshot may do."""


@contextmanager
def _translate_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn every error of the Hub or the network into a CheckpointError that says what to do."""
    at = f"{model}@{revision}" if revision else model
    try:
        yield
    except CheckpointError:
        raise
    except ResponseRefused as fault:
        raise CheckpointError(f"{at}: {fault}; do not use this server") from fault
    except TransientError as fault:
        raise CheckpointError(
            f"{at}: expected an answer of the Hub in time, found: {fault}; try again later"
        ) from fault
    except Exception as fault:
        for kind, sentence in _HUB_ERRORS:
            if isinstance(fault, kind):
                raise CheckpointError(f"{at}: {sentence}") from fault
        if isinstance(fault, OSError) or type(fault).__module__.partition(".")[0] in _TRANSPORTS:
            raise _make_unreachable_error(at, fault) from fault
        raise


def _make_unreachable_error(at: str, fault: Exception) -> HubUnreachable:
    """Return the error for a Hub that cannot be reached, whatever the transport library."""
    endpoint = os.environ.get("HF_ENDPOINT", constants.ENDPOINT)
    state = (
        "offline mode (HF_HUB_OFFLINE)"
        if constants.HF_HUB_OFFLINE
        else f"no connection ({type(fault).__name__})"
    )
    return HubUnreachable(
        f"{at}: expected to reach {endpoint} or find the model in the local cache, found {state}; "
        "connect, or download the model elsewhere and give its folder as source.model"
    )
