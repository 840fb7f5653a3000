"""Token sequences, ragged and flat: no padding, no mask of attention."""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenSequence:
    """One sequence: its ids, its domain, and the part of a mixture that it comes from.

    answers: ranges [start, end) of the tokens that count, in a chat those of the assistant's
    messages; None: every token counts.
    """

    domain: str
    ids: Sequence[int]
    part: str = ""
    answers: tuple[tuple[int, int], ...] | None = None

    @property
    def n_counted(self) -> int:
        """Tokens that count towards the share of a part."""
        if self.answers is None:
            return len(self.ids)
        return sum(end - start for start, end in self.answers)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Tokens:
    """Ragged token sequences: ids [n_tokens] int32; sequence i is ids[starts[i] : starts[i + 1]].

    domains, parts, answers: one per sequence, as in TokenSequence. hash: sha256 of the ids (int32),
    the starts (int64), both little-endian, and of the answers if a sequence has any. too_short:
    documents of fewer than two tokens, which predict none and were left out; refused: chats of each
    part that the model's chat template refused, of those that were rendered.
    """

    ids: Tensor
    starts: tuple[int, ...]
    domains: tuple[str, ...]
    hash: str
    parts: tuple[str, ...]
    answers: tuple[tuple[tuple[int, int], ...] | None, ...]
    too_short: int = 0
    refused: Mapping[str, int] = field(default_factory=dict)

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

    def select(self, order: Sequence[int]) -> list[TokenSequence]:
        """Return the sequences at these indices."""
        return [
            TokenSequence(
                domain=self.domains[index],
                ids=self.sequence(index).tolist(),
                part=self.parts[index],
                answers=self.answers[index],
            )
            for index in order
        ]


def pack_tokens(
    rows: Sequence[TokenSequence], too_short: int = 0, refused: Mapping[str, int] = {}
) -> Tokens:
    """Pack sequences into one flat tensor."""
    import torch

    starts: list[int] = []
    flat: list[int] = []
    for row in rows:
        starts.append(len(flat))
        flat.extend(row.ids)
    digest = hashlib.sha256(struct.pack(f"<{len(flat)}i", *flat))
    digest.update(struct.pack(f"<{len(starts)}q", *starts))
    answers = tuple(row.answers for row in rows)
    if any(ranges is not None for ranges in answers):
        digest.update(repr(answers).encode())
    return Tokens(
        ids=torch.tensor(flat, dtype=torch.int32),  # [n_tokens]
        starts=tuple(starts),
        domains=tuple(row.domain for row in rows),
        hash=digest.hexdigest(),
        parts=tuple(row.part for row in rows),
        answers=answers,
        too_short=too_short,
        refused=refused,
    )
