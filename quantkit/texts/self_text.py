"""Text that a model samples itself: requests, their order, degenerate answers, the cache.

Request i has a kind, a prompt and a seed that follow from i alone. The kinds take turns, so that
any prefix of the requests is a mixture. Answers are kept in one journal per model, settings and
seed below the user's cache: a longer request continues it, an interrupted one resumes, and the
text of a request is the same in any case.
"""

from __future__ import annotations

import hashlib
import json
import zlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from quantkit.errors import ArtifactError, CalibrationError
from quantkit.io import user_cache
from quantkit.io.files import make_folder, sha256_file
from quantkit.io.journal import Journal
from quantkit.io.lock import hold_lock
from quantkit.texts.self_prompts import SeedPrompt, make_label

CACHE = "self-text"
"""The folder of the user's cache."""
CACHE_FORMAT = 1
LOCK_SECONDS = 5.0

MIN_TOKENS = 8
"""New tokens below which an answer is dropped as too short."""
MIN_JUDGED_BYTES = 256
"""Bytes below which an answer is not tested for repetition: short text compresses little."""
MIN_COMPRESSION = 0.18
"""Compressed over plain bytes, below which an answer is a loop (calibration/README.md)."""
TAIL_BYTES = 1024
"""End of an answer that is tested on its own, for a loop after good text."""
MIN_TAIL_COMPRESSION = 0.15
PROBE_TEXTS = 64
MIN_KEPT_SHARE = 0.25
"""Share of the first PROBE_TEXTS answers that must be usable."""

_TOKENIZER_FILES = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*",
                    "merges.txt", "chat_template*", "*.tiktoken", "*.model")  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """Parameters of sampling. max_tokens: new tokens of one answer, at most."""

    temperature: float = 1.0
    top_p: float = 0.95
    max_tokens: int = 512

    def describe(self) -> str:
        """Return "temperature 1, top_p 0.95"."""
        return f"temperature {self.temperature:g}, top_p {self.top_p:g}"


@dataclass(frozen=True, kw_only=True, slots=True)
class TextRequest:
    """One answer to be sampled; `seed` has 63 bits."""

    index: int
    prompt: SeedPrompt
    seed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SampledText:
    """A sampled document, prompt included.

    start: characters of the prompt; n_tokens: new tokens; ended: the model ended it, no limit.
    """

    index: int
    text: str
    start: int
    n_tokens: int
    ended: bool


class TextGenerator(Protocol):
    """Samples texts: in this process or from a server."""

    @property
    def group_size(self) -> int:
        """Requests that are passed together; part of what decides the last bits of a logit."""
        ...

    def generate(
        self,
        group: Sequence[TextRequest],
        needed: Collection[int],
        on_text: Callable[[SampledText], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        """Sample the requests of a group whose index is in `needed`, in any order.

        on_tokens: called with the number of new tokens, for progress.
        """
        ...

    def close(self) -> None:
        """Release the resources of the generator."""
        ...


@dataclass(frozen=True, kw_only=True, slots=True)
class SelfTexts:
    """Usable texts in the order of their requests, and the number of dropped answers."""

    texts: tuple[str, ...]
    labels: tuple[str, ...]
    skipped: int

    @property
    def sha256(self) -> str:
        """The hash of the texts."""
        return hashlib.sha256("\0".join(self.texts).encode()).hexdigest()


# --------------------------------------------------------------------------------------- requests


def make_request(
    index: int, prompts: Mapping[str, Sequence[SeedPrompt]], seed: int | str
) -> TextRequest:
    """Return request `index`: the kinds take turns, and the prompts of a kind take turns."""
    kinds = [kind for kind, rows in prompts.items() if rows]
    turn, place = divmod(index, len(kinds))
    rows = prompts[kinds[place]]
    digest = hashlib.sha256(f"quantkit self text {seed} {index}".encode()).digest()
    return TextRequest(
        index=index,
        prompt=rows[turn % len(rows)],
        seed=int.from_bytes(digest[:8], "big") >> 1,
    )


def draw_uniform(seed: int, position: int) -> float:
    """Return the number in [0, 1) that decides the token at a position of an answer."""
    digest = hashlib.sha256(f"{seed} {position}".encode()).digest()
    return float((int.from_bytes(digest[:8], "big") >> 11) / 2**53)


def find_degeneration(sample: SampledText) -> str:
    """Return why an answer is unusable: "short" or "repeated"; empty for usable text."""
    answer = sample.text[sample.start :].strip()
    if sample.n_tokens < MIN_TOKENS or not answer:
        return "short"
    data = answer.encode()
    if len(data) < MIN_JUDGED_BYTES:
        return ""
    tail = data[-TAIL_BYTES:]
    is_loop = _compress(data) < MIN_COMPRESSION or _compress(tail) < MIN_TAIL_COMPRESSION
    return "repeated" if is_loop else ""


def _compress(data: bytes) -> float:
    """Return compressed over plain bytes."""
    return len(zlib.compress(data, 9)) / len(data)


# ------------------------------------------------------------------------------------------ cache


def hash_tokenizer(folder: Path) -> str:
    """Return the sha256 of names and bytes of a folder's tokenizer and chat template files."""
    paths = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(f"{path.name}\0{sha256_file(path)}\n".encode())
    return digest.hexdigest()


def locate_cache(identity: Mapping[str, object]) -> Path:
    """Return the folder of the journals of a model's texts under these settings.

    identity: everything that decides a text and that is known without reading weights.
    """
    values = json.dumps({**identity, "format": CACHE_FORMAT}, sort_keys=True)
    return user_cache.locate_folder(CACHE) / hashlib.sha256(values.encode()).hexdigest()


def count_cached_tokens(folder: Path, length: int) -> int:
    """Return the tokens that the largest journal of a folder holds, as sequences of at most
    `length`; reads only, and neither locks nor repairs.
    """
    counts = [0]
    for path in folder.glob("*.jsonl"):
        samples = list[SampledText]()
        for line in path.read_bytes().split(b"\n"):
            try:
                sample = _parse_entry(json.loads(line)["entry"])
            except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
                continue
            samples += [sample] if sample is not None else []
        counts.append(sum(min(length, s.n_tokens) for s in samples if not find_degeneration(s)))
    return max(counts)


class SampleCache:
    """The answers of one journal; `add` returns when its answer is on disk. Mutable."""

    def __init__(self, journal: Journal, samples: dict[int, SampledText]) -> None:
        self._journal, self._samples = journal, samples

    def __len__(self) -> int:
        return len(self._samples)

    def get(self, index: int) -> SampledText | None:
        """Return the answer to a request, None if it is missing."""
        return self._samples.get(index)

    def add(self, sample: SampledText) -> None:
        """Store an answer; the first answer to a request stays. Raises QuantkitError if the disk
        refuses.
        """
        if sample.index not in self._samples:
            self._journal.append(_format_entry(sample))
            self._samples[sample.index] = sample


@contextmanager
def open_cache(path: Path, identity: Mapping[str, object]) -> Iterator[SampleCache]:
    """Open a journal under its lock, and create it if needed.

    A torn last line is dropped. A journal with other damage is replaced: its text can be sampled
    again. Raises UsageError if another process samples into it.
    """
    make_folder(path.parent)
    lock, job = path.with_suffix(".lock"), "sampling job of this model and seed"
    with hold_lock(lock, what=job, instead="another seed", seconds=LOCK_SECONDS):
        began = json.loads(json.dumps({"kind": "began", "identity": identity}))
        try:
            journal = Journal.open(path)
            samples = _read_samples(journal, began) if journal is not None else {}
        except ArtifactError:
            journal, samples = None, {}
        yield SampleCache(journal or Journal.begin(path, began), samples)


def _read_samples(journal: Journal, began: Mapping[str, object]) -> dict[int, SampledText]:
    """Return the answers by index; raises ArtifactError for entries of another shape."""
    first, *rest = journal.entries
    samples = [_parse_entry(entry) for entry in rest]
    if first != began or None in samples:
        raise ArtifactError(f"{journal.path}: expected sampled texts, found other entries")
    return {sample.index: sample for sample in samples if sample is not None}


def _format_entry(sample: SampledText) -> dict[str, object]:
    return {
        "kind": "text", "index": sample.index, "text": sample.text, "start": sample.start,
        "tokens": sample.n_tokens, "ended": sample.ended,
    }  # fmt: skip


def _parse_entry(entry: Mapping[str, object]) -> SampledText | None:
    """Return the answer of an entry; None for another entry."""
    index, text, start = entry.get("index"), entry.get("text"), entry.get("start")
    n_tokens, ended = entry.get("tokens"), entry.get("ended")
    is_answer = (
        type(index) is int
        and type(start) is int
        and type(n_tokens) is int
        and isinstance(text, str)
        and isinstance(ended, bool)
    )
    if not is_answer:
        return None
    assert isinstance(text, str)
    return SampledText(
        index=int(str(index)),
        text=text,
        start=int(str(start)),
        n_tokens=int(str(n_tokens)),
        ended=bool(ended),
    )


# --------------------------------------------------------------------------------------- sampling


def sample_texts(
    cache: SampleCache,
    request: Callable[[int], TextRequest],
    open_generator: Callable[[], TextGenerator],
    *,
    n_tokens: int,
    count_tokens: Callable[[str], int],
    on_tokens: Callable[[int], None] = lambda _: None,
    where: str = "self",
) -> SelfTexts:
    """Return the first usable texts that have `n_tokens` tokens together.

    Missing ones are sampled group by group. A group always starts at a multiple of its size and is
    generated whole, so that neither an interruption nor an earlier, shorter request changes a text.

    Args:
        request: index -> request.
        open_generator: called once an answer is missing.
        count_tokens: tokens of a text as calibration cuts it.
        on_tokens: called with the tokens of usable and of growing text.
        where: names the set in errors.

    Raises CalibrationError if most answers are degenerate.
    """
    texts, labels, skipped, total, index = list[str](), list[str](), 0, 0, 0
    while total < n_tokens:
        sample = cache.get(index)
        if sample is None:
            _generate_group(cache, request, open_generator(), index, total, on_tokens)
            continue
        if find_degeneration(sample):
            skipped += 1
        else:
            prompt = request(index).prompt
            texts.append(sample.text)
            labels.append(make_label(prompt.kind, prompt.language))
            total += count_tokens(sample.text)
        index += 1
        if index >= PROBE_TEXTS and total < n_tokens and len(texts) < MIN_KEPT_SHARE * index:
            raise CalibrationError(
                f"{where}: expected text of the model, found {skipped} of {index} answers empty or "
                "repeated. Choose another set, or check the model"
            )
        on_tokens(total)
    return SelfTexts(texts=tuple(texts), labels=tuple(labels), skipped=skipped)


def _generate_group(
    cache: SampleCache,
    request: Callable[[int], TextRequest],
    generator: TextGenerator,
    index: int,
    total: int,
    on_tokens: Callable[[int], None],
) -> None:
    """Sample the missing answers in the group of a request; `total`: tokens before it."""
    first = index - index % generator.group_size
    group = [request(number) for number in range(first, first + generator.group_size)]
    needed = [each.index for each in group if cache.get(each.index) is None]
    grown = 0

    def add_tokens(n_new: int) -> None:
        nonlocal grown
        grown += n_new
        on_tokens(total + grown)

    generator.generate(group, frozenset(needed), cache.add, add_tokens)
    missing = [number for number in needed if cache.get(number) is None]
    if missing:
        raise AssertionError(f"a generator left out the requests {missing}")
