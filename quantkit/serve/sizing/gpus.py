"""Accelerators and their specifications: a dated, sourced data file, validated by pydantic.

Every value names its source. The `source` of a GPU is the source of its values without one.
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


class GpuSource(BaseModel):
    """A source of values, and the date on which it was read. url: None for a printed sheet."""

    model_config = FROZEN
    name: str
    url: HttpUrl | None = None
    read: date


class SourcedValue(BaseModel):
    """A number with its source. note: its derivation, or its uncertainty."""

    model_config = FROZEN
    value: Positive
    source: str | None = None  # a key of `sources`; by default the GPU's own source
    note: str = ""


class SourcedFraction(SourcedValue):
    """A fraction with its source."""

    value: Annotated[float, Field(gt=0, le=1)]


class GpuLink(BaseModel):
    """The interconnect of a node.

    gb_s: bandwidth of one GPU, both directions together, as makers state it.
    """

    model_config = FROZEN
    kind: Literal["nvlink", "xgmi", "ethernet", "pcie", "none"]
    gb_s: SourcedValue | None

    @property
    def one_way(self) -> float:
        """Bytes per second in one direction; 0 without a link."""
        return self.gb_s.value * GB / 2 if self.gb_s else 0.0


class PeakFlops(BaseModel):
    """Dense peak in TFLOP/s (TOP/s for int8), without sparsity; None: no such units."""

    model_config = FROZEN
    bf16: SourcedValue
    fp8: SourcedValue | None
    int8: SourcedValue | None


class Gpu(BaseModel):
    """One accelerator, or a machine with unified memory.

    memory_gb: as sold, in 10^9 bytes: the careful reading. reported_mib: by its driver, in 2^20
    bytes. usable: the fraction of unified memory that the GPU may use. served: whether vLLM or
    SGLang runs on it.
    """

    model_config = FROZEN
    name: str
    source: str
    memory_gb: SourcedValue
    reported_mib: SourcedValue | None = None
    usable: SourcedFraction | None = None
    bandwidth_gb_s: SourcedValue
    tflops: PeakFlops
    watts: SourcedValue
    price_usd: SourcedValue
    link: GpuLink
    per_node: Annotated[int, Field(ge=1, le=72)]
    served: bool = True
    note: str = ""

    @property
    def short(self) -> str:
        """The name without its maker."""
        return self.name.partition(" ")[2].removeprefix("Instinct ").removeprefix("GeForce ")

    @property
    def memory_bytes(self) -> int:
        """Bytes that a model may use."""
        return int(self.memory_gb.value * GB * (self.usable.value if self.usable else 1))

    @property
    def bandwidth(self) -> float:
        """Memory bandwidth in bytes per second."""
        return self.bandwidth_gb_s.value * GB


class GpuCatalog(BaseModel):
    """The whole file."""

    model_config = FROZEN
    version: Literal[1]
    updated: date
    sources: dict[str, GpuSource]
    gpus: dict[str, Gpu]

    def get_gpu(self, name: str) -> Gpu:
        """Return a GPU by its key, by its name as sold, or by its name in tables.

        Case and punctuation are ignored, and the memory may follow (H100 80). UsageError if there
        is none.
        """
        normalized = normalize_name(name)
        for key, gpu in self.gpus.items():
            with_memory = f"{key} {gpu.memory_gb.value:g}"
            names = (key, with_memory, f"{with_memory} GB", gpu.name, gpu.short)
            if normalized in map(normalize_name, names):
                return gpu
        raise UsageError(f"--gpu: {format_unknown_name('GPU', name, tuple(self.gpus))}")


def normalize_name(name: str) -> str:
    """Return the letters and digits of a name in lower case."""
    return "".join(character for character in name.lower() if character.isalnum())


def read_gpus() -> GpuCatalog:
    """Read the GPUs that ship with quantkit."""
    from ruamel.yaml import YAML

    file = importlib.resources.files("quantkit.serve.sizing") / "gpus.yaml"
    text = file.read_text(encoding="utf-8")
    catalog = GpuCatalog.model_validate(YAML(typ="safe", pure=True).load(text))
    unknown = [source for source in list_sources(catalog) if source not in catalog.sources]
    if unknown:
        raise UsageError(
            f"gpus.yaml: sources: no source named {unknown[0]!r}; add it or name another"
        )
    return catalog


def list_sources(catalog: GpuCatalog) -> list[str]:
    """Return the key of every source that a GPU or one of its values names."""
    sources = []
    for gpu in catalog.gpus.values():
        values = (
            gpu.memory_gb, gpu.reported_mib, gpu.usable, gpu.bandwidth_gb_s, gpu.tflops.bf16,
            gpu.tflops.fp8, gpu.tflops.int8, gpu.watts, gpu.price_usd, gpu.link.gb_s,
        )  # fmt: skip
        sources += [gpu.source, *(value.source for value in values if value and value.source)]
    return sources
