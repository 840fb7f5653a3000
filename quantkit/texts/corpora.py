"""Calibration and fidelity text: sets of documents as files, and token sequences cut from them.

A set is `<name>.yaml`, with license, origin and sha256, and `<name>.jsonl` with one
`{"domain": "prose" | "math" | "code", "text": ...}` per line; or a `datasets:` entry with a data
set of the hub. Sequences are ragged and flat: no padding, no mask.
"""

from __future__ import annotations

import hashlib
import os
import random
import sys
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Protocol

from quantkit.checkpoint.remote_code import format_trust_hint, read_tokenizer_map
from quantkit.checkpoint.tokenizer_files import check_tokenizer_files
from quantkit.errors import CheckpointError, UsageError
from quantkit.texts.chats import cut_chats
from quantkit.texts.corpus_files import (
    DOCUMENT_JOIN,
    CorpusPart,
    SelfSampler,
    TextDocument,
    read_parts,
    read_set,
)
from quantkit.texts.corpus_spec import get_first_line, read_spec
from quantkit.texts.exposure import pick_label, raise_unseen_share
from quantkit.texts.mixture_spec import Packing, PartPacking
from quantkit.texts.proportions import move_missing, split_proportionally
from quantkit.texts.tokens import Tokens, TokenSequence, pack_tokens

RUST_PANIC = "PanicException"  # pyo3's; a BaseException that no module exports

SHARE_UNITS = 1_000_000_000  # a share as an integer, so that rounding never decides
CHATS_AT_ONCE = 256


@dataclass(frozen=True, kw_only=True, slots=True)
class CorpusSet:
    """Documents and their metadata; `sha256` is of the file or, for the hub, of the joined rows."""

    name: str
    where: str  # path of the spec, for messages
    license: str
    origin: str
    domains: tuple[str, ...]
    packing: Packing
    end_of_document: bool  # documents end with the tokenizer's EOS
    sha256: str
    documents: tuple[TextDocument, ...]
    parts: tuple[CorpusPart, ...] = ()  # of a mixture, which has no documents of its own


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that quantkit uses."""

    @property
    def bos_token_id(self) -> int | None: ...

    @property
    def eos_token_id(self) -> int | None: ...

    def decode(self, token_ids: Sequence[int]) -> str: ...

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> Mapping[str, list[list[int]]]: ...


def load_set(name_or_path: str, folder: Path, sample_self: SelfSampler | None = None) -> CorpusSet:
    """Read the set `folder/<name>.yaml`, or the spec at a path that ends in .yaml; check its hash.

    sample_self: samples the parts that are text of the model itself. Raises CalibrationError with
    file, line and what to do, for a malformed set or one that differs from its spec.
    """
    spec = read_spec(name_or_path, folder)
    documents: tuple[TextDocument, ...] = ()
    parts = read_parts(spec, folder, sample_self)
    if parts:
        names = [f"{part.spec.name} {part.sha256}" for part in parts]
        sha256 = hashlib.sha256("\n".join(names).encode()).hexdigest()
    else:
        documents, sha256 = read_set(spec)
    return CorpusSet(
        name=spec.name,
        where=str(spec.where),
        license=spec.license,
        origin=spec.origin,
        domains=spec.domains,
        packing=spec.packing,
        end_of_document=spec.end_of_document,
        sha256=sha256,
        documents=documents,
        parts=parts,
    )


def load_tokenizer(folder: Path, trust_remote_code: bool = False) -> Tokenizer:
    """Load the tokenizer of a model folder; its own code runs only with `trust_remote_code`.

    Raises CheckpointError if transformers cannot load it (see checkpoint/remote_code.py).
    """
    from transformers import AutoTokenizer, PretrainedConfig

    # transformers would also run the code of the folder's config; it looks for one unless given one
    config = PretrainedConfig(auto_map=read_tokenizer_map(folder)) if trust_remote_code else None
    try:
        with silence_output():
            tokenizer: Tokenizer = AutoTokenizer.from_pretrained(
                str(folder),
                config=config,
                trust_remote_code=trust_remote_code,
                local_files_only=True,
            )
            (ids,) = tokenizer(["a b"], add_special_tokens=True, verbose=False)["input_ids"]
            (own,) = tokenizer(["a b"], add_special_tokens=False, verbose=False)["input_ids"]
        if not all(isinstance(number, int) for number in ids):
            raise TypeError("its ids are not integers")
        if not own:  # transformers makes an empty tokenizer for a folder without files of one
            raise ValueError("it has no tokens")
    # the tokenizers library raises bare Exception, and Rust panics, which are no Exception
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
        check_tokenizer_files(folder)
        raise CheckpointError(
            f"{folder}: expected a tokenizer that transformers loads without code of its own, "
            f"found: {get_first_line(error):.300}. Copy tokenizer.json and tokenizer_config.json "
            f"of the model there{format_trust_hint(folder)}"
        ) from error
    return tokenizer


@contextmanager
def silence_output() -> Iterator[None]:
    """Discard terminal output: Rust prints unescaped keys of the file, and backtraces."""
    sys.stdout.flush()
    sys.stderr.flush()
    copies = [(number, os.dup(number)) for number in (1, 2)]
    null = os.open(os.devnull, os.O_WRONLY)
    try:
        for number, _ in copies:
            os.dup2(null, number)
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, copy in copies:
            os.dup2(copy, number)
            os.close(copy)
        os.close(null)


def sample_sequences(
    corpus: CorpusSet,
    tokenizer: Tokenizer,
    sequences: int | None,
    length: int,
    seed: int,
    calibrated: Collection[str] = (),
) -> Tokens:
    """Sample `sequences` token sequences of at most `length` tokens by `seed`.

    None takes all, in file order. packing documents: one document per sequence, truncated, followed
    by EOS if the set asks for it. packing windows: the documents of a domain are joined and cut
    into windows of exactly `length` tokens that do not overlap. Every sequence starts with exactly
    one BOS if the tokenizer adds one. The domains keep their proportion, and each has at least one
    sequence if there is room. A part of a mixture has its share of `sequences * length` tokens,
    which its last document may exceed; of chats only the answers count.

    calibrated: for fidelity text, the labels of the calibration set; parts of other kinds then have
    at least half. Raises UsageError if the set has too few sequences.
    """
    if length < 2 or (sequences is not None and sequences < 1):
        raise UsageError(
            f"{corpus.where}: expected at least 1 sequence of at least 2 tokens, "
            f"found {sequences} of {length}. Raise `sequences` or `length` in the recipe"
        )
    if corpus.parts:
        labels = {part.spec.name: pick_label(part.spec.labels, calibrated) for part in corpus.parts}
        shares = raise_unseen_share(
            {part.spec.name: part.spec.share for part in corpus.parts}, labels, calibrated
        )
        unseen = [name for name, label in labels.items() if label not in calibrated]
        return _sample_parts(corpus, shares, unseen, tokenizer, sequences, length, seed)
    every = {
        domain: _list_candidates(corpus, domain, tokenizer, length) for domain in corpus.domains
    }
    candidates = {domain: [row for row in rows if len(row) > 1] for domain, rows in every.items()}
    too_short = sum(len(rows) - len(candidates[domain]) for domain, rows in every.items())
    picks = _choose_sequences(corpus, candidates, sequences, length, seed)
    rows = [TokenSequence(domain=domain, ids=candidates[domain][index]) for domain, index in picks]
    return pack_tokens(rows, too_short)


def encode_continuation(
    tokenizer: Tokenizer, prompt: str, text: str, length: int
) -> tuple[list[int], int]:
    """Return the ids of a prompt followed by `text`, and how many of the last ids are the text's.

    A prompt that does not fit into `length` tokens loses its start, but not BOS. Returns no ids if
    the text does not fit with one token before it. Prompt and text are tokenized together; blanks
    between them belong to the text. The text's tokens are those after as many as the prompt alone
    has: a token that spans both belongs to the prompt.
    """
    stripped = prompt.rstrip()
    prompt_ids, ids = _encode(tokenizer, [stripped, prompt + text])
    text_ids, bos = ids[len(prompt_ids) :], find_prefix(tokenizer)
    room = length - len(bos) - len(text_ids)
    if not text_ids or room < 0 or len(bos) + min(room, len(prompt_ids)) < 1:
        return [], 0
    context_ids = ids[max(0, len(prompt_ids) - room) : len(prompt_ids)]
    return [*bos, *context_ids, *text_ids], len(text_ids)


def _sample_parts(
    corpus: CorpusSet,
    shares: Mapping[str, float],
    unseen: Collection[str],
    tokenizer: Tokenizer,
    sequences: int | None,
    length: int,
    seed: int,
) -> Tokens:
    """Sample each part's share of `sequences * length` tokens; None: as many as every part has.

    unseen: names of the parts that take over what a part with `texts` has too little text for.
    """
    if sequences is None:
        # whole sequences of each part, so that no rounded share exceeds a part
        whole = {part.spec.name: _count_windows(part, tokenizer, length) for part in corpus.parts}
        sequences = int(min(whole[name] / share for name, share in shares.items()))
    if sequences < len(corpus.parts):
        raise UsageError(
            f"{corpus.where}: expected at least {len(corpus.parts)} sequences, one of each part, "
            f"found {sequences}. Raise `sequences`"
        )
    weights = {name: max(1, round(share * SHARE_UNITS)) for name, share in shares.items()}
    available = {
        part.spec.name: _count_windows(part, tokenizer, length)
        for part in corpus.parts
        if part.spec.texts is not None
    }
    counts = move_missing(split_proportionally(weights, sequences), available, unseen)
    picks, refused = list[TokenSequence](), dict[str, int]()
    for part in corpus.parts:
        budget = counts[part.spec.name] * length
        cut = _pick_rows(part, tokenizer, length, budget, f"{seed} {part.spec.name}")
        if cut.refused:
            refused[part.spec.name] = cut.refused
        if (counted := _count_tokens(cut.rows)) < budget:
            raise UsageError(
                f"{corpus.where}: part {part.spec.name}: expected {budget:,} tokens, its share of "
                f"{sequences} sequences of {length}, found {counted:,}, enough for "
                f"{int(counted // length / shares[part.spec.name])}{cut.describe_refused()}. "
                "Lower `share` or `sequences`, or add text"
            )
        picks += cut.rows
    random.Random(seed).shuffle(picks)  # any prefix of the sequences is then a mixture of parts
    return pack_tokens(picks, refused=refused)


@dataclass(frozen=True, kw_only=True, slots=True)
class CutPart:
    """Sequences of a part, and how many of its chats the chat template refused, with the first
    reason.
    """

    rows: list[TokenSequence]
    refused: int = 0
    reason: str = ""

    def describe_refused(self) -> str:
        """Return the rest of a sentence about refused chats, or ""."""
        return (
            f"; the model's chat template refuses {self.refused:,} chats ({self.reason})"
            if self.refused
            else ""
        )


def _pick_rows(
    part: CorpusPart, tokenizer: Tokenizer, length: int, budget: int, seed: str
) -> CutPart:
    """Return sequences of a part, chosen by seed, until `budget` tokens count or none is left."""
    rng, picks, refused, reason = random.Random(seed), list[TokenSequence](), 0, ""
    if part.chats:  # rendering takes time: only as many as the budget needs
        order = rng.sample(part.chats, len(part.chats))
        for start in range(0, len(order), CHATS_AT_ONCE):
            chats = order[start : start + CHATS_AT_ONCE]
            cut = _cut_part(replace(part, chats=tuple(chats)), tokenizer, length)
            picks, refused, reason = picks + cut.rows, refused + cut.refused, reason or cut.reason
            if _count_tokens(picks) >= budget:
                break
        rows = picks[::-1]
    elif part.spec.texts is not None:
        rows = _take_turns(_cut_part(part, tokenizer, length).rows, length, rng)[::-1]
    else:
        rows = _cut_part(part, tokenizer, length).rows
        rng.shuffle(rows)
    chosen = list[TokenSequence]()
    while budget > 0 and rows:
        chosen.append(rows.pop())
        budget -= chosen[-1].n_counted
    return CutPart(rows=chosen, refused=refused, reason=reason)


def _take_turns(
    rows: Sequence[TokenSequence], length: int, rng: random.Random
) -> list[TokenSequence]:
    """Return sequences in turns of one per label; the shorter window of a label is its last."""
    stacks = dict[str, list[TokenSequence]]()
    for row in rng.sample(rows, len(rows)):
        stacks.setdefault(row.domain, []).append(row)
    for stack in stacks.values():
        stack.sort(key=lambda row: len(row.ids) < length)
    return [row for turn in zip_longest(*stacks.values()) for row in turn if row is not None]


def _count_tokens(rows: Sequence[TokenSequence]) -> int:
    return sum(row.n_counted for row in rows)


def _count_windows(part: CorpusPart, tokenizer: Tokenizer, length: int) -> int:
    """Return the whole sequences of `length` counted tokens that a part has."""
    return _count_tokens(_cut_part(part, tokenizer, length).rows) // length


def _cut_part(part: CorpusPart, tokenizer: Tokenizer, length: int) -> CutPart:
    """Return all sequences of a part; one of a single token predicts none and is left out."""
    spec = part.spec
    make = partial(TokenSequence, domain=spec.label, part=spec.name)
    if spec.packing == "chats":
        cut = cut_chats(
            part.chats,
            tokenizer,
            length,
            count_all=spec.count == "all",
            skip_refused=spec.refused == "skip",
        )
        sequences = [make(ids=ids, answers=answers) for ids, answers in cut.rows]
        return CutPart(rows=sequences, refused=cut.refused, reason=cut.reason)
    if spec.texts is not None:  # little text: the rest of a file is a shorter window
        return CutPart(
            rows=[
                make(ids=row, domain=label)
                for text, label in zip(part.texts, part.labels, strict=True)
                for row in _cut_windows(text, tokenizer, length)
                if len(row) > 1
            ]
        )
    rows = _cut_sequences(part.texts, spec.packing, spec.end_of_document, tokenizer, length)
    if part.labels:  # one per text: such texts are not joined
        pairs = zip(rows, part.labels, strict=True)
        return CutPart(rows=[make(ids=row, domain=x) for row, x in pairs if len(row) > 1])
    return CutPart(rows=[make(ids=row) for row in rows if len(row) > 1])


def count_too_short(part: CorpusPart, tokenizer: Tokenizer) -> int:
    """Return the documents of a part that have fewer than two tokens with BOS and EOS."""
    if part.spec.packing != "documents":
        return 0
    rows = _cut_sequences(part.texts, "documents", part.spec.end_of_document, tokenizer, 2)
    return sum(len(row) < 2 for row in rows)


def describe_left_out(corpus: CorpusSet, tokens: Tokens, tokenizer: Tokenizer) -> tuple[str, ...]:
    """Return a sentence per kind of rows that give no tokens: empty ones, and short documents."""
    notes = list[str]()
    short = {"": tokens.too_short}
    for part in corpus.parts:
        kind = "an answer" if part.chats else "text"
        if part.skipped:
            notes.append(
                f"{corpus.name}: part {part.spec.name}: {part.skipped:,} rows without {kind} are "
                "skipped"
            )
        if count := tokens.refused.get(part.spec.name):
            notes.append(
                f"{corpus.name}: part {part.spec.name}: {count:,} chats that the model's chat "
                "template refuses are skipped"
            )
        short[part.spec.name] = count_too_short(part, tokenizer)
    for name, count in short.items():
        if count:
            where = f"{corpus.name}: part {name}" if name else corpus.name
            notes.append(
                f"{where}: {count:,} documents of fewer than two tokens are left out: they predict "
                "no token"
            )
    return tuple(notes)


def count_sequence_tokens(tokenizer: Tokenizer, text: str, length: int) -> int:
    """Return the tokens of a text that is one sequence; 0 if it is too short for one."""
    (row,) = _cut_sequences([text], "documents", False, tokenizer, length)
    return len(row) if len(row) > 1 else 0


def find_prefix(tokenizer: Tokenizer) -> list[int]:
    """Return the tokens that the tokenizer puts in front of a text: BOS, several, or none.

    Many tokenizers define a BOS and add none (GPT-2's, SmolLM2's); ChatGLM's adds two tokens.
    """
    (plain,) = tokenizer(["a"], add_special_tokens=False, verbose=False)["input_ids"]
    (whole,) = tokenizer(["a"], add_special_tokens=True, verbose=False)["input_ids"]
    starts = range(len(whole) - len(plain) + 1)
    return next((whole[:n] for n in starts if whole[n : n + len(plain)] == plain), [])


def add_prefix(prefix: Sequence[int], ids: Sequence[int]) -> list[int]:
    """Return ids after the prefix, which text that was rendered before may have already."""
    return list(ids) if prefix and list(ids[: len(prefix)]) == [*prefix] else [*prefix, *ids]


def _list_candidates(
    corpus: CorpusSet, domain: str, tokenizer: Tokenizer, length: int
) -> list[list[int]]:
    """Return all sequences of the documents of a domain."""
    texts = [document.text for document in corpus.documents if document.domain == domain]
    return _cut_sequences(texts, corpus.packing, corpus.end_of_document, tokenizer, length)


def _cut_sequences(
    texts: Sequence[str],
    packing: PartPacking,
    end_of_document: bool,
    tokenizer: Tokenizer,
    length: int,
) -> list[list[int]]:
    """Return all sequences of texts: one per document, or windows of exactly `length` tokens."""
    prefix = find_prefix(tokenizer)
    if packing == "documents":
        eos = (
            [tokenizer.eos_token_id]
            if end_of_document and tokenizer.eos_token_id is not None
            else []
        )
        rows = (add_prefix(prefix, ids) for ids in _encode(tokenizer, list(texts)))
        return [[*ids, *(() if ids[-1:] == eos else eos)][:length] for ids in rows]
    windows = _cut_windows(DOCUMENT_JOIN.join(texts), tokenizer, length)
    return [row for row in windows if len(row) == length]


def _cut_windows(text: str, tokenizer: Tokenizer, length: int) -> list[list[int]]:
    """Return windows of `length` tokens that do not overlap; the last one may be shorter."""
    prefix, (stream,) = find_prefix(tokenizer), _encode(tokenizer, [text])
    room = length - len(prefix)
    return [[*prefix, *stream[start : start + room]] for start in range(0, len(stream), room)]


def _encode(tokenizer: Tokenizer, texts: list[str]) -> list[list[int]]:
    """Return the ids of each text without special tokens; BOS and EOS are added here."""
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]


def _choose_sequences(
    corpus: CorpusSet,
    candidates: Mapping[str, Sequence[object]],
    sequences: int | None,
    length: int,
    seed: int,
) -> list[tuple[str, int]]:
    """Return (domain, index) of each sampled sequence."""
    available = {domain: len(rows) for domain, rows in candidates.items()}
    total = sum(available.values())
    if total < (sequences or 1):
        counts = ", ".join(f"{domain} {count}" for domain, count in available.items())
        advice = f"Ask for {total} or fewer, or null for all, lower" if total else "Lower"
        unit = "documents" if corpus.packing == "documents" else f"windows of {length} tokens"
        raise UsageError(
            f"{corpus.where}: expected {sequences or 1} sequences, found {total} {unit} "
            f"({counts}). {advice} `length`, or use a larger set"
        )
    if sequences is None:
        return [(domain, index) for domain, count in available.items() for index in range(count)]
    rng = random.Random(seed)
    picks = [
        (domain, index)
        for domain, share in split_proportionally(available, sequences).items()
        for index in rng.sample(range(available[domain]), share)
    ]
    rng.shuffle(picks)  # any prefix of the sequences is then a mixture of domains
    return picks
