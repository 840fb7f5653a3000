"""From a recipe to a sealed artifact with its evidence: plan, build, measure, benchmark, report, judge, seal.

Each step takes what the one before left. `tell` hears how far long steps are; nothing else leaves this module before
its result.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from quantkit import artifact, evidence, manifests, sources
from quantkit.artifact import Sink
from quantkit.build import Built, Progress, build
from quantkit.evaluate.compare import Compared, compare
from quantkit.evaluate.distribution import Measured, measure, tokens_to_parquet
from quantkit.evaluate.samples import pairs_to_parquet
from quantkit.evidence import TextName
from quantkit.layers import skeleton
from quantkit.plan import Plan
from quantkit.report import card, gates
from quantkit.report.schema import Fidelity, Text
from quantkit.schema import Recipe
from quantkit.storage import builtin, corpora, hub
from quantkit.storage.checkpoint import Checkpoint
from quantkit.storage.corpora import Tokens
from quantkit.storage.files import write_atomic, write_json
from quantkit.storage.machine import peak_resident_bytes, return_freed_memory
from quantkit.storage.model_card import front_matter
from quantkit.storage.tensors import Written

Tell = Callable[[Progress], None]
Returned = TypeVar("Returned")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A sealed artifact, its report, and how long each step took."""

    path: Path
    fidelity: Fidelity
    seconds: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The tokens of the streams, and what the report says of them."""

    tokens: Mapping[TextName, Tokens]
    told: Mapping[TextName, Text]


@dataclass(kw_only=True)
class Clock:
    """Seconds per step."""

    began: float = field(default_factory=time.monotonic)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        """Note the time since the last lap under `name`."""
        now = time.monotonic()
        self.laps[name] = now - self.began
        self.began = now


def run(
    recipe: Recipe, text: str, *, overwrite: bool, evaluate: bool, planned: Callable[[Plan], None], tell: Tell
) -> Outcome:
    """Build the artifact of `recipe` (`text` is its file) and seal it under output.path; `planned` sees the plan first.

    A failure leaves what was made in `<path>.building`, never under the final name. Raises QuantkitError.
    """
    return_freed_memory()
    clock, path = Clock(), Path(recipe.output.path)
    located = hub.resolve(recipe.source.model, recipe.source.revision)
    source = Checkpoint.open(located.folder)
    texts = tokenize(recipe, located.folder)
    counts = {name: tokens.n_tokens for name, tokens in texts.tokens.items()}
    plan = sources.plan_recipe(recipe, sources.facts_of(recipe, source, located.revision), counts)
    folder = artifact.prepare(path, overwrite)
    planned(plan)
    clock.lap("plan")
    built, written, measured = quantize(plan, source, texts, folder, text, tell, clock)
    compared = compare(plan, source, folder, sources.compute(recipe), evaluate=evaluate, tell=tell)
    clock.lap("benchmarks")
    report = evidence.fidelity(
        plan, built.blocks, measured, texts.told, compared.rows, evidence.licence(front_matter(located.folder))
    )
    report = gates.judged(recipe.gates, report)
    write_evidence(plan, folder, report, measured, compared)
    write_timings(folder, built, clock)
    artifact.seal(folder, path, manifests.manifest(plan, source, report, built.blocks), written)
    return Outcome(path=path, fidelity=report, seconds=clock.laps, peak_bytes=peak_resident_bytes())


def tokenize(recipe: Recipe, folder: Path) -> Texts:
    """Load the recipe's text sets and cut them into token sequences with the source's tokenizer."""
    tokenizer, sets = corpora.load_tokenizer(folder), builtin.folder("calibration")
    wanted: list[tuple[TextName, str, int | None, int, int]] = []
    if calibration := recipe.calibration:
        wanted.append(("calibration", calibration.set, calibration.sequences, calibration.length, calibration.seed))
    fidelity = recipe.fidelity
    wanted.append(("fidelity", fidelity.set, fidelity.windows, fidelity.length, 0))
    tokens, told = dict[TextName, Tokens](), dict[TextName, Text]()
    for name, set_name, sequences, length, seed in wanted:
        corpus = corpora.load_set(set_name, sets)
        tokens[name] = corpora.token_batches(corpus, tokenizer, sequences, length, seed)
        told[name] = evidence.text(corpus, tokens[name], length, seed)
    tokens.setdefault("calibration", corpora.pack_tokens([]))
    return Texts(tokens=tokens, told=told)


def quantize(
    plan: Plan, source: Checkpoint, texts: Texts, folder: Path, text: str, tell: Tell, clock: Clock
) -> tuple[Built, dict[str, Written], Measured]:
    """Build into `folder`, then compare the streams behind the last block, the artifact's head read from its files."""
    compute = sources.compute(plan.recipe)
    device, dtype = torch.device(compute.device), getattr(torch, compute.dtype)
    sink = Sink(folder, plan.shards)
    with scratch(folder) as place:
        try:
            built = finished(build(plan, source, texts.tokens, sink, place, device, dtype), tell)
            written = sink.close()
        finally:
            sink.abandon()
        artifact.write_model_files(folder, plan, source.sidecars, text)
        clock.lap("quantize")
        bones = skeleton(plan.source.config, device, dtype)
        streams = built.streams
        measured = measure(
            bones, plan.layout, source, Checkpoint.open(folder), streams["reference"], streams["quantized"]
        )
    clock.lap("distribution")
    return built, written, measured


def finished(steps: Generator[Progress, None, Returned], tell: Tell) -> Returned:
    """Run a generator to its end, telling each progress; what it returns."""
    while True:
        try:
            tell(next(steps))
        except StopIteration as end:
            result: Returned = end.value
            return result


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A folder for hidden states, removed afterwards whatever happens."""
    place = folder.with_name(f"{folder.name}.scratch")
    shutil.rmtree(place, ignore_errors=True)
    place.mkdir(parents=True)
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def write_evidence(plan: Plan, folder: Path, report: Fidelity, measured: Measured, compared: Compared) -> None:
    """fidelity.json, the model card, plan.json and the samples."""
    (folder / "quantkit" / "samples").mkdir(exist_ok=True)
    write_atomic(folder / "quantkit" / "fidelity.json", report.to_json().encode())
    write_atomic(folder / "README.md", card.render(report).encode())
    write_atomic(folder / "quantkit" / "plan.json", manifests.plan_json(plan).encode())
    tokens_to_parquet(measured, folder / "quantkit" / "samples" / "tokens.parquet")
    if compared.pairs:
        pairs_to_parquet(compared.pairs, folder / "quantkit" / "samples" / "benchmarks.parquet")


def write_timings(folder: Path, built: Built, clock: Clock) -> None:
    """What depends on the clock and the machine's load: the one file the manifest does not hash."""
    values = {
        "seconds": clock.laps,
        "blocks": {block.name: block.seconds for block in built.blocks},
        "threads": torch.get_num_threads(),
        "cpus": os.cpu_count(),
        "peak_rss_bytes": peak_resident_bytes(),
    }
    write_json(folder / artifact.TIMINGS, values)
