"""Calibration and fidelity text: sets of documents as files, and the token sequences that are cut from them.

A set is `<name>.yaml`, which states licence, origin and sha256, and `<name>.jsonl` with one
`{"domain": "prose" | "math" | "code", "text": ...}` a line; or a `datasets:` entry that names a data set of the hub.
Sequences are ragged and flat: nothing is padded, and no mask is needed.
"""

from __future__ import annotations

import hashlib
import os
import random
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from quantkit.checkpoint.remote_code import format_trust_hint, read_tokenizer_map
from quantkit.checkpoint.tokenizer_files import check_tokenizer_files
from quantkit.errors import CheckpointError, UsageError
from quantkit.texts.corpus_files import Document, read_documents, read_hub, read_local
from quantkit.texts.corpus_spec import Packing, first_line, read_spec

if TYPE_CHECKING:
    from torch import Tensor

RUST_PANIC = "PanicException"  # pyo3's, a BaseException that can be imported from nowhere

WINDOW_JOIN = "\n\n"  # between documents of a window; for wikitext this is how its perplexity is usually measured


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSet:
    """Documents with what must be known of them. `sha256` is of the file or, for the hub, of the joined rows."""

    name: str
    where: str  # the spec's path, for messages
    licence: str
    origin: str
    domains: tuple[str, ...]
    packing: Packing
    end_of_document: bool  # documents end with the tokenizer's EOS
    sha256: str
    documents: tuple[Document, ...]


class Tokenizer(Protocol):
    """What is used of a transformers tokenizer."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """Ragged token sequences. ids [n_tokens] int32; sequence i is ids[starts[i] : starts[i + 1]].

    domains: one per sequence; hash: sha256 of the ids (int32) and the starts (int64), both little-endian.
    """

    ids: Tensor
    starts: tuple[int, ...]
    domains: tuple[str, ...]
    hash: str

    @property
    def n_sequences(self) -> int:
        return len(self.starts)

    @property
    def n_tokens(self) -> int:
        return len(self.ids)

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens in each sequence."""
        ends = (*self.starts[1:], self.n_tokens)
        return tuple(end - start for start, end in zip(self.starts, ends))

    def sequence(self, index: int) -> Tensor:
        """[length of the sequence] int32, a view into `ids`."""
        start = self.starts[index]
        return self.ids[start : start + self.lengths[index]]


def load_set(name_or_path: str, folder: Path) -> CorpusSet:
    """Read the set `folder/<name>.yaml`, or the spec at a path that ends in .yaml; every hash is checked.

    CalibrationError names file, line and what to do, for a set that is malformed or not what its spec says.
    """
    spec = read_spec(name_or_path, folder)
    if spec.file is not None:
        documents, sha256 = read_documents(spec)
    elif spec.local is not None and spec.local.path is not None:
        documents, sha256 = read_local(spec)
    else:
        documents, sha256 = read_hub(spec)
    return CorpusSet(
        name=spec.name,
        where=str(spec.where),
        licence=spec.licence,
        origin=spec.origin,
        domains=spec.domains,
        packing=spec.packing,
        end_of_document=spec.end_of_document,
        sha256=sha256,
        documents=documents,
    )


def load_tokenizer(folder: Path, own_code: bool = False) -> Tokenizer:
    """The tokenizer of a model folder; its own code is run only with `own_code` (see there). Else CheckpointError."""
    from transformers import AutoTokenizer, PretrainedConfig

    # transformers would run the code of a config as well; without a config of ours it looks for one
    config = PretrainedConfig(auto_map=read_tokenizer_map(folder)) if own_code else None
    try:
        with unheard():
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
                str(folder), config=config, trust_remote_code=own_code, local_files_only=True
            )
            found = tokenizer(["a b"], add_special_tokens=True, verbose=False)["input_ids"]
        if not all(isinstance(number, int) for number in found[0]):
            raise TypeError("it gives no numbers")
    except (
        BaseException
    ) as error:  # the tokenizers library raises bare Exception, and panics of Rust that are none
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        check_tokenizer_files(folder)
        raise CheckpointError(
            f"{folder}: expected a tokenizer that transformers loads without code of its own, "
            f"found: {first_line(error):.300}. Copy tokenizer.json and tokenizer_config.json of the model there"
            f"{format_trust_hint(folder)}"
        ) from error
    return tokenizer


@contextmanager
def unheard() -> Iterator[None]:
    """Nothing reaches the terminal meanwhile: Rust prints keys of the file as they are, and backtraces."""
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [(number, os.dup(number)) for number in (1, 2)]
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in kept:
            os.dup2(nowhere, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in kept:
            os.dup2(copy, number)
            os.close(copy)
        os.close(nowhere)


def sample_sequences(
    corpus: CorpusSet, tokenizer: Tokenizer, sequences: int | None, length: int, seed: int
) -> Tokens:
    """`sequences` token sequences of at most `length` tokens, chosen by `seed`; None takes all, in file order.

    packing documents: one document each, truncated, EOS behind it where the set says so. packing windows: the
    documents of a domain are joined and cut into windows of exactly `length`, none overlapping. Either way exactly
    one BOS stands in front, if the tokenizer puts one there. The domains keep their proportion, and each has at least
    one sequence if there is room. UsageError when the set has fewer sequences than were asked for.
    """
    if length < 2 or (sequences is not None and sequences < 1):
        raise UsageError(
            f"{corpus.where}: expected at least 1 sequence of at least 2 tokens, "
            f"found {sequences} of {length}. Raise `sequences` or `length` in the recipe"
        )
    candidates = {
        domain: _candidates(corpus, domain, tokenizer, length) for domain in corpus.domains
    }
    chosen = _choose(corpus, candidates, sequences, length, seed)
    return pack_tokens([(domain, candidates[domain][index]) for domain, index in chosen])


def pack_tokens(rows: Sequence[tuple[str, Sequence[int]]]) -> Tokens:
    """Tokens from (domain, ids) per sequence."""
    import torch

    starts: list[int] = []
    flat: list[int] = []
    for _, ids in rows:
        starts.append(len(flat))
        flat.extend(ids)
    digest = hashlib.sha256(struct.pack(f"<{len(flat)}i", *flat))
    digest.update(struct.pack(f"<{len(starts)}q", *starts))
    return Tokens(
        ids=torch.tensor(flat, dtype=torch.int32),  # [n_tokens]
        starts=tuple(starts),
        domains=tuple(domain for domain, _ in rows),
        hash=digest.hexdigest(),
    )


def encode_continuation(
    tokenizer: Tokenizer, prompt: str, text: str, length: int
) -> tuple[list[int], int]:
    """Ids of a prompt with `text` behind it, and how many of them, the last, are the text's.

    A prompt that does not fit into `length` tokens loses its beginning, but for BOS; nothing is left of a text that
    does not fit with one token in front. The two are tokenized together, blanks between them being the text's, and the
    text's tokens are those that stand behind as many as the prompt has alone: one that spans both is the prompt's.
    """
    bare = prompt.rstrip()
    before, both = _encode(tokenizer, [bare, prompt + text])
    own, first = both[len(before) :], _bos(tokenizer)
    room = length - len(first) - len(own)
    if not own or room < 0 or len(first) + min(room, len(before)) < 1:
        return [], 0
    kept = both[max(0, len(before) - room) : len(before)]
    return [*first, *kept, *own], len(own)


def _candidates(
    corpus: CorpusSet, domain: str, tokenizer: Tokenizer, length: int
) -> list[list[int]]:
    """Every sequence that the documents of a domain give."""
    texts = [document.text for document in corpus.documents if document.domain == domain]
    bos = _bos(tokenizer)
    if corpus.packing == "documents":
        eos = (
            [tokenizer.eos_token_id]
            if corpus.end_of_document and tokenizer.eos_token_id is not None
            else []
        )
        return [[*bos, *ids, *eos][:length] for ids in _encode(tokenizer, texts)]
    stream = _encode(tokenizer, [WINDOW_JOIN.join(texts)])[0]
    room = length - len(bos)
    return [
        [*bos, *stream[start : start + room]] for start in range(0, len(stream) - room + 1, room)
    ]


def _bos(tokenizer: Tokenizer) -> list[int]:
    """The BOS that the tokenizer itself puts in front of a text; many name one and put none (GPT-2's, SmolLM2's)."""
    first = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"][0][:1]
    return list(first) if first == [tokenizer.bos_token_id] else []


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Ids of each text without special tokens, so that BOS and EOS are ours alone to add."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _choose(
    corpus: CorpusSet,
    candidates: Mapping[str, Sequence[object]],
    sequences: int | None,
    length: int,
    seed: int,
) -> list[tuple[str, int]]:
    """(domain, index) of each sequence to take."""
    available = {domain: len(rows) for domain, rows in candidates.items()}
    total = sum(available.values())
    if total < (sequences or 1):
        counts = ", ".join(f"{domain} {count}" for domain, count in available.items())
        advice = f"Ask for {total} or fewer, or null for all" if total else "Lower `length`"
        unit = "documents" if corpus.packing == "documents" else f"windows of {length} tokens"
        raise UsageError(
            f"{corpus.where}: expected {sequences or 1} sequences, found {total} {unit} ({counts}). "
            f"{advice}, lower `length`, or use a larger set"
        )
    if sequences is None:
        return [(domain, index) for domain, count in available.items() for index in range(count)]
    rng = random.Random(seed)
    chosen = [
        (domain, index)
        for domain, share in proportional(available, sequences).items()
        for index in rng.sample(range(available[domain]), share)
    ]
    rng.shuffle(chosen)  # so that any run of sequences is a mixture
    return chosen


def proportional(available: Mapping[str, int], wanted: int) -> dict[str, int]:
    """How many of `wanted` each domain gets: in proportion, never more than it has, at least one if there is room."""
    total = sum(available.values())
    least = {name: min(count, 1) for name, count in available.items()}
    if sum(least.values()) > wanted:
        least = dict.fromkeys(available, 0)
    shares = {name: max(wanted * count // total, least[name]) for name, count in available.items()}

    def lacking(name: str) -> int:  # times `total`: an integer, so that no rounding decides
        return wanted * available[name] - shares[name] * total

    while (missing := wanted - sum(shares.values())) != 0:
        if missing > 0:
            shares[
                max((name for name in shares if shares[name] < available[name]), key=lacking)
            ] += 1
        else:
            shares[min((name for name in shares if shares[name] > least[name]), key=lacking)] -= 1
    return shares
