"""GPU figures during a load test, from the metrics of a DCGM exporter, vLLM or SGLang.

Neither engine exports the utilization of GPUs; a DCGM exporter does (port 9400 by default). Its
readings are as old as its interval of collection, 30 s unless it runs with `-c 1000`.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from quantkit.artifact.loadtest_schema import GpuReadings
from quantkit.serve.loadtest.engine import list_samples, scrape_metrics

DCGM = "DCGM exporter"
UTILIZATION, MEMORY, POWER = (
    "DCGM_FI_DEV_GPU_UTIL",  # %
    "DCGM_FI_DEV_FB_USED",  # MiB
    "DCGM_FI_DEV_POWER_USAGE",  # W
)
CACHE_USAGE: Mapping[str, tuple[str, ...]] = {
    "vLLM": ("vllm:kv_cache_usage_perc", "vllm:gpu_cache_usage_perc"),
    "SGLang": ("sglang:token_usage",),
}
"""Engine -> the gauges of its KV cache's use, from 0 to 1; the second of vLLM's is that of old
versions."""
LARGEST = 1e9
"""DCGM writes 2^63 - 14 and the like where it has no value."""
INTERVAL_SECONDS = 1.0


@dataclass(frozen=True, kw_only=True)
class GpuReading:
    """One reading; the figures are those of GpuReadings. at: seconds since 1970."""

    at: float
    gpus: int = 0
    utilization: float | None = None
    memory_gb: float | None = None
    watts: float | None = None
    cache: float | None = None
    source: str = ""


def parse_reading(texts: Sequence[str], at: float) -> GpuReading:
    """Read the GPU figures in the metrics of one or more endpoints."""
    text = "\n".join(texts)
    shares, sources = list_valid(text, UTILIZATION, 100), list[str]()
    memory, watts = list_valid(text, MEMORY), list_valid(text, POWER)
    if shares or memory or watts:
        sources.append(DCGM)
    cache = list[float]()
    for engine, names in CACHE_USAGE.items():
        values = next(filter(None, (list_valid(text, name, 1) for name in names)), [])
        if values and not cache:
            cache, sources = values, [*sources, engine]
    return GpuReading(
        at=at,
        gpus=max(map(len, (shares, memory, watts))),
        utilization=sum(shares) / len(shares) / 100 if shares else None,
        memory_gb=sum(memory) * 2**20 / 1e9 if memory else None,
        watts=sum(watts) if watts else None,
        cache=sum(cache) / len(cache) if cache else None,
        source=", ".join(sources),
    )


def list_valid(text: str, name: str, most: float = LARGEST) -> list[float]:
    """Return the samples of a gauge from 0 to `most`."""
    return [value for value in list_samples(text, name) if 0 <= value <= most]


def collect_readings(readings: Sequence[GpuReading]) -> GpuReadings | None:
    """Return readings as columns; None if there is no figure."""
    columns = {
        name: tuple(value for reading in readings if (value := getattr(reading, name)) is not None)
        for name in ("utilization", "memory_gb", "watts", "cache")
    }
    if not any(columns.values()):
        return None
    return GpuReadings(
        source=max((reading.source for reading in readings), key=len),
        gpus=max(reading.gpus for reading in readings),
        **columns,
    )


class GpuSampler:
    """Reads metrics every second in a thread while it is open."""

    def __init__(
        self, urls: Sequence[str], scrape: Callable[[str], str | None] = scrape_metrics
    ) -> None:
        """urls: the addresses of the engine and of the exporter, without repetition."""
        self._urls, self._scrape = tuple(dict.fromkeys(urls)), scrape
        self._readings: list[GpuReading] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> GpuSampler:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join()

    def take(self) -> None:
        """Take one reading, if an endpoint answers."""
        texts = [text for url in self._urls if (text := self._scrape(url)) is not None]
        if texts:
            self._readings.append(parse_reading(texts, time.time()))

    def select_readings(self, started: float, ended: float) -> GpuReadings | None:
        """Return the readings of a span of time, in seconds since 1970; None without a figure."""
        return collect_readings([x for x in self._readings if started <= x.at <= ended])

    def _run(self) -> None:
        while not self._ended.is_set():
            self.take()
            self._ended.wait(INTERVAL_SECONDS)
