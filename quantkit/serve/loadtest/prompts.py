"""The prompts of a load test: of a task that ships with quantkit, or of a file."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from itertools import cycle, islice
from pathlib import Path

from quantkit.errors import UsageError
from quantkit.io.files import parse_json, read_bytes
from quantkit.io.package_data import locate_folder

KEYS = ("prompt", "text", "question")
LIMIT_BYTES = 1_000_000_000


@dataclass(frozen=True, kw_only=True)
class Prompts:
    """The texts in the order of their file, and its hash."""

    name: str
    texts: tuple[str, ...]
    sha256: str

    def take(self, count: int) -> list[str]:
        """Return `count` texts, repeated from the start: repeated texts hit a prefix cache."""
        return list(islice(cycle(self.texts), count))


def read_prompts(name: str) -> Prompts:
    """Read prompts: a name in evals/, a JSONL file with one of KEYS, or a text file by line."""
    path = Path(name)
    data = locate_folder("evals") / "data"
    if not path.is_file() and not path.suffix:
        path = data / f"{name}.jsonl"
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in data.glob("*.jsonl")))
        raise UsageError(
            f"--data {name}: expected a file, or one of {known}, found neither; check the path"
        )
    content = read_bytes(path, LIMIT_BYTES, UsageError)
    try:
        lines = [line for line in content.decode("utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError:
        raise UsageError(
            f"{path}: expected UTF-8 text, found other bytes; save it as UTF-8"
        ) from None
    texts = (
        lines
        if path.suffix == ".txt"
        else [parse_prompt(line, f"{path}:{n + 1}") for n, line in enumerate(lines)]
    )
    if not texts:
        raise UsageError(f"{path}: expected prompts, found none; add a line")
    return Prompts(name=name, texts=tuple(texts), sha256=hashlib.sha256(content).hexdigest())


def parse_prompt(line: str, where: str) -> str:
    """Return the prompt of a line of JSON."""
    values = parse_json(line.encode(), where, UsageError)
    text = next((values[key] for key in KEYS if isinstance(values.get(key), str)), None)
    if not isinstance(text, str):
        raise UsageError(
            f"{where}: expected a text under {', '.join(KEYS)}, found none; add one of these keys"
        )
    return text
