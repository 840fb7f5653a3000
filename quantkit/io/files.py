"""Plain files: JSON read with suspicion, bytes written beside and renamed, hashes, free space.

A reader of an artifact sees the old file or the new one, never half of one: bytes go to `<name>.part`, are synced,
renamed, and the folder is synced, so that the name survives a power cut too.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from math import isfinite
from pathlib import Path

from quantkit.errors import CheckpointError, QuantkitError

JSON_LIMIT_BYTES = 100_000_000
"""No JSON file of a checkpoint is larger; DeepSeek-V3's index of 92,000 names has 9 MB."""

PART = ".part"


MAX_JSON_VALUES = 5_000_000
"""In one JSON file, ten for each of 500,000 tensors; ten million need more memory than a build is given."""


class NonFiniteNumber(ValueError):
    """A number that JSON has not: it could be read and not be written again."""


class DuplicateKey(ValueError):
    """An object names a key twice; which of the two values counts would depend on the reader."""


def shorten_repr(value: object, limit: int = 60) -> str:
    """`repr` for an error message, cut in the middle, so that a hostile value cannot fill the terminal."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[: limit - 20]}...{text[-17:]}"


def join_faults(faults: Sequence[str], limit: int = 20) -> str:
    """One fault per line, the rest counted."""
    rest = len(faults) - limit
    return "\n".join(faults[:limit]) + (
        f"\nand {rest} more faults of this checkpoint" if rest > 0 else ""
    )


def reject_duplicate_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    """json's object_pairs_hook; raises DuplicateKey."""
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        raise DuplicateKey(shorten_repr(twice))
    return found


def parse_finite(digits: str) -> float:
    """json's parse_float and parse_constant; raises NotFinite for NaN, Infinity and 1e999."""
    value = float(digits)
    if not isfinite(value):
        raise NonFiniteNumber(shorten_repr(digits))
    return value


def is_encodable(value: object) -> bool:
    """Whether the texts in a value of JSON can be encoded: "\\ud800" alone is half a character."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return False
    return True


def is_file(path: Path) -> bool:
    """Whether a file is there; a name that no file can have, being too long or with NUL, is like another."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


def parse_json(
    text: bytes, where: str, error: type[QuantkitError] = CheckpointError
) -> dict[str, object]:
    """The JSON object in `text`; `where` names the file in errors.

    Raises `error` for anything but one UTF-8 object with unique keys and finite numbers, without a byte order mark.
    """
    if text.startswith(b"\xef\xbb\xbf"):
        raise error(
            f"{where}: expected plain UTF-8, found a byte order mark; save the file without it"
        )
    if (
        found := sum(map(text.count, (b",", b"[", b"{")))
    ) > MAX_JSON_VALUES:  # counted before they take memory
        raise error(
            f"{where}: expected at most {MAX_JSON_VALUES:,} values, found {found:,}; fetch the file again"
        )
    try:
        value = json.loads(
            text.decode("utf-8"),
            object_pairs_hook=reject_duplicate_keys,
            parse_float=parse_finite,
            parse_constant=parse_finite,
        )
        if b"\\u" in text and not is_encodable(value):
            raise error(
                f"{where}: expected text, found half a surrogate pair (\\ud800 to \\udfff); fetch it again"
            )
    except UnicodeDecodeError as fault:
        raise error(
            f"{where}: expected UTF-8, found byte 0x{text[fault.start]:02x} at offset {fault.start}; save it as UTF-8"
        ) from None
    except NonFiniteNumber as fault:
        raise error(
            f"{where}: expected finite numbers, found {fault}; repair or fetch the file"
        ) from None
    except DuplicateKey as fault:
        raise error(
            f"{where}: expected every key once, found {fault} twice in one object; remove one of them"
        ) from None
    except json.JSONDecodeError as fault:
        raise error(
            f"{where}: expected JSON, found an error ({fault.msg.lower()}) at line {fault.lineno} "
            f"column {fault.colno}; repair or fetch the file"
        ) from None
    except (RecursionError, ValueError):  # nesting bombs; numbers of more than 4300 digits
        raise error(
            f"{where}: expected JSON, found nesting or a number beyond any real file; fetch it again"
        ) from None
    if not isinstance(value, dict):
        raise error(
            f"{where}: expected a JSON object, found {type(value).__name__}; fetch the file again"
        )
    return value


def read_bytes(
    path: Path, limit: int = JSON_LIMIT_BYTES, error: type[QuantkitError] = CheckpointError
) -> bytes:
    """The bytes of a small file; raises `error` when it is missing, unreadable or larger than `limit` bytes."""
    try:
        size = path.stat().st_size
        if size > limit:
            raise error(
                f"{path}: expected at most {limit} bytes, found {size}; this is not the file it claims to be"
            )
        with path.open("rb") as file:
            return file.read(limit)
    except OSError as fault:
        raise error(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None


def read_prefix(path: Path, n_bytes: int) -> bytes:
    """The first bytes of a file of any size; raises CheckpointError when it cannot be read or is shorter."""
    try:
        with path.open("rb") as file:
            found = file.read(n_bytes)
    except OSError as fault:
        raise CheckpointError(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None
    if len(found) < n_bytes:
        raise CheckpointError(
            f"{path}: expected {n_bytes} bytes or more, found {len(found)}; fetch the file again"
        )
    return found


def read_json(path: Path, error: type[QuantkitError] = CheckpointError) -> dict[str, object]:
    """The JSON object in a file; raises `error` as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, error=error), str(path), error)


def describe_os_error(fault: OSError) -> str:
    """What the operating system said, without its error number."""
    return (fault.strerror or str(fault) or type(fault).__name__).lower()


def make_config_error(where: object, model_type: object, fault: Exception) -> CheckpointError:
    """For a config.json that transformers makes no model of: a wrong value surfaces as whatever it first breaks."""
    return CheckpointError(
        f"{where}: expected a configuration that transformers makes a {model_type} of, found: {type(fault).__name__}: "
        f"{' '.join(str(fault).split()):.300}; repair the value, or upgrade transformers"
    )


def make_write_error(path: Path, fault: OSError) -> QuantkitError:
    """The error for a file that could not be written, with the free space when that is the cause."""
    if fault.errno in {errno.ENOSPC, errno.EDQUOT}:
        free = get_free_bytes(path) / 1e9
        return QuantkitError(
            f"{path}: cannot be written: {describe_os_error(fault)} ({free:.1f} GB free); free some space or choose another folder"
        )
    return QuantkitError(
        f"{path}: cannot be written: {describe_os_error(fault)}; mend that or choose another folder"
    )


def write_atomic(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it; raises QuantkitError and leaves the old file when that fails."""
    part = path.with_name(path.name + PART)
    try:
        with part.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
        sync_folder(path.parent)
    except OSError as fault:
        part.unlink(missing_ok=True)
        raise make_write_error(path, fault) from fault


def write_output(path: Path, content: bytes) -> None:
    """Write a file that a user names: as `write_atomic` does, behind a link; a device or pipe is written to.

    Renamed over, /dev/null or /dev/stdout would be a file from then on, for everybody on the machine.
    """
    if path.exists() and not path.is_file():
        try:
            path.write_bytes(content)
        except OSError as fault:
            raise make_write_error(path, fault) from fault
    else:
        write_atomic(Path(os.path.realpath(path)), content)


def write_json(path: Path, value: object) -> None:
    """Write a value as indented UTF-8 JSON with keys in the order given: the same value gives the same bytes."""
    write_atomic(path, encode_json(value))


def encode_json(value: object) -> bytes:
    """A value as `write_json` writes it."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode()


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, to stay after a power cut; raises QuantkitError."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        sync_folder(folder.parent)
    except OSError as fault:
        raise make_write_error(folder, fault) from fault


def remove_files(paths: Iterable[Path]) -> None:
    """Remove files that may be gone already."""
    for path in paths:
        path.unlink(missing_ok=True)


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256_file(path: Path, error: type[QuantkitError] = CheckpointError) -> str:
    """Hexadecimal sha256 of a file, read in small pieces; raises `error` when it cannot be read."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as fault:
        raise error(
            f"{path}: expected a readable file, found: {describe_os_error(fault)}; check the path"
        ) from None


def get_free_bytes(path: Path) -> int:
    """Bytes that this user may still write where `path` lies or would lie."""
    place = path.absolute()
    while not place.exists() and place != place.parent:
        place = place.parent
    return shutil.disk_usage(place).free
