"""Accelerators and what their makers say of them: a dated, sourced file, checked by pydantic.

Every figure names its source; `source` of a card is where those come from that name none of their own.
"""

from __future__ import annotations

import importlib.resources
from datetime import date
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, HttpUrl

from quantkit.errors import UsageError
from quantkit.io.suggestions import format_unknown_name

FROZEN = ConfigDict(frozen=True, extra="forbid")
GB, GIB = 10**9, 2**30

Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]


class Source(BaseModel):
    """Where a figure was read, and when."""

    model_config = FROZEN
    name: str
    url: HttpUrl | None = None  # None: a printed sheet, named
    read: date


class Figure(BaseModel):
    """A number with its source; `note` says what was done to it, or how sure it is."""

    model_config = FROZEN
    value: Positive
    source: str | None = None  # a key of `sources`; the card's own without one
    note: str = ""


class Share(Figure):
    """A part of a whole."""

    value: Annotated[float, Field(gt=0, le=1)]


class Link(BaseModel):
    """What connects cards of a node. `gb_s`: of one card, both directions together, as makers state it."""

    model_config = FROZEN
    kind: Literal["nvlink", "xgmi", "ethernet", "pcie", "none"]
    gb_s: Figure | None

    @property
    def one_way(self) -> float:
        """Bytes per second that a card sends while it receives as much; 0 without a link."""
        return self.gb_s.value * GB / 2 if self.gb_s else 0.0


class Flops(BaseModel):
    """Dense peak in TFLOP/s (TOP/s for int8), without sparsity; None: the card has no such units."""

    model_config = FROZEN
    bf16: Figure
    fp8: Figure | None
    int8: Figure | None


class Gpu(BaseModel):
    """One accelerator, or a machine with unified memory."""

    model_config = FROZEN
    name: str
    source: str
    memory_gb: Figure  # as it is sold, counted in 10^9 bytes: the careful reading
    reported_mib: Figure | None = None  # what its driver reports, in 2^20 bytes
    usable: Share | None = None  # of unified memory, the part that the accelerator may take
    bandwidth_gb_s: Figure
    tflops: Flops
    watts: Figure
    price_usd: Figure
    link: Link
    per_node: Annotated[int, Field(ge=1, le=72)]
    served: bool = True  # by vLLM or SGLang
    note: str = ""

    @property
    def short(self) -> str:
        """Its name without its maker."""
        return self.name.partition(" ")[2].removeprefix("Instinct ").removeprefix("GeForce ")

    @property
    def memory_bytes(self) -> int:
        """What a model may take."""
        return int(self.memory_gb.value * GB * (self.usable.value if self.usable else 1))

    @property
    def bandwidth(self) -> float:
        """Bytes per second from its memory."""
        return self.bandwidth_gb_s.value * GB


class GpuCatalog(BaseModel):
    """The whole file."""

    model_config = FROZEN
    version: Literal[1]
    updated: date
    sources: dict[str, Source]
    cards: dict[str, Gpu]

    def named(self, name: str) -> Gpu:
        """The card of that key or of that name, as sold or as shown in tables, with or without its memory (H100 80),
        whatever its case; UsageError when there is none."""
        wanted = _folded(name)
        for key, card in self.cards.items():
            sold = f"{key} {card.memory_gb.value:g}"
            if wanted in map(_folded, (key, sold, f"{sold} GB", card.name, card.short)):
                return card
        raise UsageError(f"--gpu: {format_unknown_name('card', name, tuple(self.cards))}")


def _folded(name: str) -> str:
    return "".join(character for character in name.lower() if character.isalnum())


def read_gpus() -> GpuCatalog:
    """The cards that ship with quantkit."""
    from ruamel.yaml import YAML

    text = (importlib.resources.files("quantkit.serve.sizing") / "gpus.yaml").read_text(
        encoding="utf-8"
    )
    found = GpuCatalog.model_validate(YAML(typ="safe", pure=True).load(text))
    unnamed = [source for source in _sources(found) if source not in found.sources]
    if unnamed:
        raise UsageError(
            f"cards.yaml: sources: no source named {unnamed[0]!r}; add it or name another"
        )
    return found


def _sources(cards: GpuCatalog) -> list[str]:
    """Every source that a card or one of its figures names."""
    told = []
    for card in cards.cards.values():
        figures = (
            card.memory_gb, card.reported_mib, card.usable, card.bandwidth_gb_s, card.tflops.bf16, card.tflops.fp8,
            card.tflops.int8, card.watts, card.price_usd, card.link.gb_s,
        )  # fmt: skip
        told += [card.source, *(figure.source for figure in figures if figure and figure.source)]
    return told
