"""Plain files: strict JSON, atomic writes, hashes and free space.

A reader sees the old file or the new one, never half of one: bytes go to a new file of a random
name, which is synced and renamed; the folder is synced too, so that the name survives a power
failure. No link is followed on the way: a name that can be predicted can be planted.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path

from quantkit.errors import CheckpointError, QuantkitError

JSON_LIMIT_BYTES = 100_000_000
CHUNK_BYTES = 1 << 20
"""Largest JSON file of a checkpoint; DeepSeek-V3's index of 92,000 names has 9 MB."""

PART = ".part"
"""Suffix of an unfinished file."""

_NEW_FILE = os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC

MAX_JSON_VALUES = 5_000_000
"""Values in one file: ten for each of 500,000 tensors. More need more memory than a build has."""


class NonFiniteNumber(ValueError):
    """NaN or infinity: Python's parser reads them, but JSON cannot hold them."""


class DuplicateKey(ValueError):
    """An object names a key twice; which of the two values counts depends on the reader."""


def shorten_repr(value: object, limit: int = 60) -> str:
    """Return `repr(value)`, cut in the middle so that a hostile value cannot fill the terminal."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-17:]}"


def join_faults(faults: Sequence[str], limit: int = 20) -> str:
    """Return one fault per line, and the number of the others after `limit` lines."""
    rest = len(faults) - limit
    return "\n".join(faults[:limit]) + (
        f"\nand {rest} more faults of this checkpoint" if rest > 0 else ""
    )


def reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """Return the pairs as a dict, as json's object_pairs_hook; raises DuplicateKey."""
    values = dict(pairs)
    if len(values) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(shorten_repr(twice))
    return values


def parse_finite(digits: str) -> float:
    """Parse a number, as json's parse_float and parse_constant.

    Raises NonFiniteNumber for NaN, Infinity and 1e999.
    """
    value = float(digits)
    if not isfinite(value):
        raise NonFiniteNumber(shorten_repr(digits))
    return value


def parse_infinite(digits: str) -> float:
    """Parse a number that may be infinite: "Infinity", "-Infinity"; raises NonFiniteNumber for the
    rest, such as NaN and 1e999.
    """
    return float(digits) if digits in {"Infinity", "-Infinity"} else parse_finite(digits)


def is_encodable(value: object) -> bool:
    """Return whether the texts in a JSON value can be encoded: "\\ud800" is half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def expand_home(path: str | Path) -> Path:
    """Return a path with `~` replaced by a home; that of an unknown user stays as it is, where
    pathlib raises RuntimeError.
    """
    return Path(os.path.expanduser(path))


def is_file(path: Path) -> bool:
    """Return whether a file exists; False for impossible names (too long, or with NUL)."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_json(
    text: bytes,
    where: str,
    error: type[QuantkitError] = CheckpointError,
    infinite: bool = False,
) -> dict[str, object]:
    """Parse one JSON object; `where` names the file in errors. infinite: accept Infinity.

    Raises `error` for anything but one UTF-8 object with unique keys and otherwise finite numbers,
    without a byte order mark.
    """
    if text.startswith(b"\xef\xbb\xbf"):
        raise error(
            f"{where}: expected plain UTF-8, found a byte order mark; save the file without it"
        )
    n_values = sum(map(text.count, (b",", b"[", b"{")))  # counted before they take memory
    if n_values > MAX_JSON_VALUES:
        raise error(
            f"{where}: expected at most {MAX_JSON_VALUES:,} values, found {n_values:,}; "
            "fetch the file again"
        )
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=reject_duplicate_keys,
            parse_float=parse_finite,
            parse_constant=parse_infinite if infinite else parse_finite,
        )
        if b"\\u" in text and not is_encodable(value):
            half = "half a surrogate pair (\\ud800 to \\udfff)"
            raise error(f"{where}: expected text, found {half}; fetch it again")
    except UnicodeDecodeError as fault:
        raise error(
            f"{where}: expected UTF-8, found byte 0x{text[fault.start]:02x} at offset "
            f"{fault.start}; save it as UTF-8"
        ) from None
    except NonFiniteNumber as fault:
        raise error(
            f"{where}: expected finite numbers, found {fault}; repair or fetch the file"
        ) from None
    except DuplicateKey as fault:
        raise error(
            f"{where}: expected every key once, found {fault} twice in one object; "
            "remove one of them"
        ) from None
    except json.JSONDecodeError as fault:
        raise error(
            f"{where}: expected JSON, found an error ({fault.msg.lower()}) at line {fault.lineno} "
            f"column {fault.colno}; repair or fetch the file"
        ) from None
    except (RecursionError, ValueError):  # nesting bombs; numbers of more than 4300 digits
        raise error(
            f"{where}: expected JSON, found nesting or a number beyond any real file; "
            "fetch it again"
        ) from None
    if isinstance(value, dict):
        return value
    kind = type(value).__name__
    raise error(f"{where}: expected a JSON object, found {kind}; fetch the file again")


def read_bytes(
    path: Path, limit: int = JSON_LIMIT_BYTES, error: type[QuantkitError] = CheckpointError
) -> bytes:
    """Read a small file; raises `error` if missing, unreadable or larger than `limit` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(
                f"{path}: expected at most {limit} bytes, found {size}; "
                "this is not the file it claims to be"
            )
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as fault:
        raise error(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None


def iterate_chunks(path: Path) -> Iterator[bytes]:
    """Yield the bytes of a file in chunks of at most CHUNK_BYTES.

    Raises CheckpointError if it cannot be read.
    """
    try:
        with path.open("rb") as file:
            while chunk := file.read(CHUNK_BYTES):
                yield chunk
    except OSError as fault:
        raise CheckpointError(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None


def read_prefix(path: Path, n_bytes: int) -> bytes:
    """Read the first bytes of a file of any size.

    Raises CheckpointError if the file cannot be read or is shorter.
    """
    prefix = read_prefix_at_most(path, n_bytes)
    if len(prefix) < n_bytes:
        raise CheckpointError(
            f"{path}: expected {n_bytes} bytes or more, found {len(prefix)}; fetch the file again"
        )
    return prefix


def read_prefix_at_most(path: Path, n_bytes: int) -> bytes:
    """Read the first `n_bytes` bytes of a file, fewer if it is shorter; raises CheckpointError."""
    try:
        with path.open("rb") as file:
            return file.read(n_bytes)
    except OSError as fault:
        raise CheckpointError(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None


def read_json(
    path: Path, error: type[QuantkitError] = CheckpointError, infinite: bool = False
) -> dict[str, object]:
    """Read the JSON object in a file; raises `error` as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, error=error), str(path), error, infinite)


def describe_os_error(fault: OSError) -> str:
    """Return the operating system's message without its error number."""
    return (fault.strerror or str(fault) or type(fault).__name__).lower()


def make_config_error(where: object, model_type: object, fault: Exception) -> CheckpointError:
    """Return the error for a config.json that transformers refuses.

    transformers raises whatever error a wrong value causes first; its text is part of the message.
    """
    return CheckpointError(
        f"{where}: expected a configuration that transformers makes a {model_type} of, "
        f"found: {type(fault).__name__}: {' '.join(str(fault).split()):.300}; "
        "repair the value, or upgrade transformers"
    )


def make_write_error(path: Path, fault: OSError) -> QuantkitError:
    """Return the error for a file that cannot be written, with the free space if that is short."""
    if fault.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = get_free_bytes(path) / 1e9
        return QuantkitError(
            f"{path}: cannot be written: {describe_os_error(fault)} ({free:.1f} GB free); "
            "free some space or choose another folder"
        )
    return QuantkitError(
        f"{path}: cannot be written: {describe_os_error(fault)}; fix that or choose another folder"
    )


def write_atomic(path: Path, content: bytes | Iterable[bytes], token: str | None = None) -> None:
    """Write a new file next to its place and rename it; a link at `path` is replaced.

    A large file's content is given in chunks. `token` names the new file, for a caller that must
    recognize the remains of a killed process; random by default. Raises QuantkitError and keeps the
    old file if that fails.
    """
    part = name_part(path.parent, token or secrets.token_hex(8))
    try:
        descriptor = os.open(part, _NEW_FILE | os.O_WRONLY, 0o666)
    except OSError as fault:
        raise make_write_error(path, fault) from fault
    try:
        try:
            for chunk in (content,) if isinstance(content, bytes) else content:
                write_all(descriptor, chunk)
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(part, path)
        sync_folder(path.parent)
    except BaseException as fault:
        with suppress(OSError):
            part.unlink(missing_ok=True)
        if isinstance(fault, OSError):
            raise make_write_error(path, fault) from fault
        raise


def name_part(folder: Path, token: str) -> Path:
    """Return the path of the unfinished file that `write_atomic` renames."""
    return folder / f".{token}{PART}"


def write_all(descriptor: int, content: bytes) -> None:
    """Write all bytes; raises OSError."""
    rest = memoryview(content)
    while rest:
        rest = rest[os.write(descriptor, rest) :]


def create_file(path: Path) -> int:
    """Return a descriptor, for reading and writing, of a new file; replaces a file or link of that
    name.

    Raises OSError.
    """
    path.unlink(missing_ok=True)
    return os.open(path, _NEW_FILE | os.O_RDWR, 0o644)


def open_plain_file(path: Path, flags: int) -> int:
    """Return a descriptor of an existing file that has one name and is no link; raises OSError.

    The names of files that a later run continues can be predicted: a link there leads to another
    file.
    """
    flags |= os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK  # a pipe does not block
    try:
        descriptor = os.open(path, flags)
    except OSError as fault:
        if fault.errno == errno.ELOOP:
            raise OSError(errno.ELOOP, "a link, expected a file", str(path)) from None
        raise
    state = os.fstat(descriptor)
    if not stat.S_ISREG(state.st_mode) or state.st_nlink > 1:
        os.close(descriptor)
        raise OSError(errno.EMLINK, "expected a file with one name", str(path))
    return descriptor


def open_part(part: Path) -> int:
    """Return a descriptor, for reading and writing, of an unfinished file that is continued, or of
    a new one; raises OSError for a link.
    """
    try:
        return open_plain_file(part, os.O_RDWR)
    except FileNotFoundError:
        return create_file(part)


def write_output(path: Path, content: bytes) -> None:
    """Write a file that a user names, atomically; follow links, and write into devices and pipes.

    A rename over /dev/null or /dev/stdout would replace it with a file for the whole machine.
    """
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(content)
        except OSError as fault:
            raise make_write_error(path, fault) from fault
    else:
        write_atomic(Path(os.path.realpath(path)), content)


def write_json(path: Path, value: object, infinite: bool = False) -> None:
    """Write a value as indented UTF-8 JSON, keys in the given order: equal values, equal bytes."""
    write_atomic(path, encode_json(value, infinite))


def encode_json(value: object, infinite: bool = False) -> bytes:
    """Return the bytes that `write_json` writes; `infinite`: as `parse_json` accepts it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=infinite) + "\n").encode()


def make_folder(folder: Path) -> None:
    """Make a folder and its parents, durably; raises QuantkitError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as fault:
        raise make_write_error(folder, fault) from fault


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files; missing ones are skipped."""
    for path in paths:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path, error: type[QuantkitError] = CheckpointError) -> str:
    """Return the hexadecimal sha256 of a file, read in pieces; raises `error` if unreadable."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        raise error(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None


def get_free_bytes(path: Path) -> int:
    """Return the bytes that this user may still write at `path`, which need not exist."""
    folder = path.absolute()
    while not folder.exists() and folder != folder.parent:
        folder = folder.parent
    return shutil.disk_usage(folder).free
