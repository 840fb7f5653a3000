"""Models by name: a folder, `builtin:<name>`, or a model of the Hugging Face Hub.

From the Hub, safetensors, JSON, tokenizer and license files are downloaded; code is copied, never
run.

Remote headers are read by range requests of our own, with the checks of local headers.
`HfApi.parse_safetensors_file_metadata` would lose: the file's size, which exposes a truncated
upload; the checks of offsets, shapes, dtypes, duplicate keys and nesting; headers above 25 MB; and
the refusal of a server that ignores the range and sends gigabytes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download, hf_hub_url, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    RemoteEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, get_session, hf_raise_for_status  # type: ignore[attr-defined]

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.file_names import CONFIG, INDEX, SINGLE
from quantkit.checkpoint.fp8_pairs import (
    find_pair_faults,
    get_scale_suffix,
    read_block_size,
    select_logical_specs,
)
from quantkit.checkpoint.header import PREFIX_BYTES, Header, parse_header, parse_header_length
from quantkit.checkpoint.remote_code import list_code_files
from quantkit.checkpoint.shards import check_single_set, find_index_faults, read_weight_map
from quantkit.contracts import Config, TensorSpec
from quantkit.errors import CheckpointError, HubUnreachable, UsageError
from quantkit.io.files import join_faults, read_json, shorten_repr
from quantkit.io.package_data import BUILTIN_PREFIX, locate_model

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
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_CONNECTIONS = 8
_FIRST_BYTES = 100_000  # most headers are shorter


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
    specs: Mapping[str, TensorSpec]
    stored_specs: Mapping[str, TensorSpec]
    revision: str | None
    code: tuple[str, ...] | None = None


def resolve_model(model: str, revision: str | None = None) -> ResolvedModel:
    """Return the folder of a model, downloaded into the Hub's cache if remote; raises
    CheckpointError.
    """
    local = _locate_local(model, revision)
    if local is not None:
        return ResolvedModel(folder=local, revision=None)
    with _translate_errors(model, revision):
        path = snapshot_download(
            model, revision=revision, allow_patterns=_ALLOWED_FILES, ignore_patterns=_IGNORED_FILES
        )
    return ResolvedModel(
        folder=Path(path), revision=Path(path).name
    )  # <cache>/models--org--name/snapshots/<commit>


def read_model_headers(model: str, revision: str | None = None) -> ModelHeaders:
    """Return config and tensor specs; only config, index and headers are downloaded from the Hub.

    Raises CheckpointError.
    """
    local = _locate_local(model, revision)
    if local is not None:
        opened = Checkpoint.open(local)
        return ModelHeaders(
            config=opened.config,
            specs=opened.specs,
            stored_specs=opened.stored_specs,
            revision=None,
            code=list_code_files(local),
        )
    with _translate_errors(model, revision):
        return _fetch_headers(model, revision)


def _locate_local(model: str, revision: str | None) -> Path | None:
    """Return the folder of a local model; None for a Hub id."""
    try:
        path = Path(model).expanduser()
        is_local = path.is_dir()
    except (OSError, RuntimeError):  # a name too long for any file; an unknown user's home
        path, is_local = Path(), False
    if model.startswith(BUILTIN_PREFIX):
        folder = locate_model(model)
    elif is_local:
        folder = path.absolute()
    elif model.startswith(("/", "./", "../", "~")) or not _HUB_ID.fullmatch(model):
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


def _fetch_headers(model: str, revision: str | None) -> ModelHeaders:
    api = HfApi()
    info = api.model_info(model, revision=revision)
    commit = info.sha
    if commit is None:
        raise CheckpointError(f"{model}: expected the Hub to name a commit, found none; try again")
    present = {sibling.rfilename for sibling in info.siblings or ()}
    config = Config(
        values=read_json(_fetch_file(model, CONFIG, commit)), where=f"{model}: {CONFIG}"
    )
    index: dict[str, str] | None = None
    if INDEX in present:
        index = read_weight_map(read_json(_fetch_file(model, INDEX, commit)), f"{model}: {INDEX}")
        if SINGLE in present:
            check_single_set(index, model)
    elif SINGLE not in present:
        raise CheckpointError(
            f"{model}: expected {SINGLE} or {INDEX} in the repository, found neither; quantkit "
            "reads safetensors only"
        )
    files = list(dict.fromkeys(index.values())) if index is not None else [SINGLE]
    if missing := [file for file in files if file not in present]:
        raise CheckpointError(
            f"{model}: {INDEX}: expected the repository to hold every file, found {len(missing)} "
            f"missing, the first {shorten_repr(missing[0])}; the upload is not complete, use "
            "another revision"
        )

    def header(file: str) -> Header:
        return _fetch_header(hf_hub_url(model, file, revision=commit), f"{model}: {file}")

    headers = _map_parallel(header, files)
    faults = find_index_faults(index, headers, f"{model}: {INDEX}") if index is not None else []
    order = index if index is not None else dict.fromkeys(headers[SINGLE].specs, SINGLE)
    stored = {
        name: headers[file].specs[name]
        for name, file in order.items()
        if name in headers[file].specs
    }
    suffix = get_scale_suffix(config)
    faults = faults or find_pair_faults(stored, read_block_size(config, stored), model, suffix)
    if faults:
        raise CheckpointError(join_faults(faults))
    return ModelHeaders(
        config=config,
        specs=select_logical_specs(stored, suffix),
        stored_specs=stored,
        revision=commit,
    )


def _fetch_file(model: str, name: str, commit: str) -> Path:
    return Path(hf_hub_download(model, name, revision=commit))


def _fetch_header(url: str, where: str) -> Header:
    """Fetch and check a remote header, by one range request, or two if it is long."""
    start, n_file_bytes = _fetch_range(url, 0, _FIRST_BYTES, where)
    end = PREFIX_BYTES + parse_header_length(start[:PREFIX_BYTES], n_file_bytes, where)
    if end > len(start):
        start += _fetch_range(url, len(start), end - len(start), where)[0]
    if len(start) < end:
        raise CheckpointError(
            f"{where}: header: expected {end} bytes, found {len(start)}; try again"
        )
    return parse_header(start[PREFIX_BYTES:end], where, n_file_bytes - end)


def _fetch_range(url: str, first: int, n_bytes: int, where: str) -> tuple[bytes, int]:
    """Return at most `n_bytes` bytes of a remote file from `first` on, and the size of the file."""
    headers = {
        **build_hf_headers(),
        "Range": f"bytes={first}-{first + n_bytes - 1}",
        "Accept-Encoding": "identity",
    }
    with get_session().stream("GET", url, headers=headers, follow_redirects=True) as response:
        if response.is_error:
            response.read()
        hf_raise_for_status(response)
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

_TRANSPORTS = frozenset({"httpx", "httpx2", "httpcore", "httpcore2", "requests"})
"""HTTP libraries of huggingface_hub's versions; their connection errors share no base class."""


@contextmanager
def _translate_errors(model: str, revision: str | None) -> Iterator[None]:
    """Turn every error of the Hub or the network into a CheckpointError that says what to do."""
    at = f"{model}@{revision}" if revision else model
    try:
        yield
    except CheckpointError:
        raise
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
