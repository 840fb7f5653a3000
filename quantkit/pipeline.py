"""From a recipe to sealed artifacts with their evidence: plan, build, measure, benchmark, report, judge, seal.

A recipe with several formats gives one artifact each. Formats that hold the same codes share one solve and its figures;
one that stores something else (`dense` rounds once more) is built by itself. Each step takes what the one before left.
`tell` hears how far long steps are; nothing else leaves this module before its result.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch

from quantkit import artifact, evidence, manifests, registry, sources
from quantkit.artifact import Sink
from quantkit.build import Built, Progress, build
from quantkit.build import Texts as StreamTexts
from quantkit.evaluate import likelihood
from quantkit.evaluate.compare import Compared, compare
from quantkit.evaluate.distribution import Measured, measure, sides, tokens_to_parquet
from quantkit.evaluate.likelihood import Scored, Solutions
from quantkit.evaluate.samples import pairs_to_parquet
from quantkit.evidence import TextName
from quantkit.layers import skeleton
from quantkit.plan import Plan
from quantkit.report import card, gates, html
from quantkit.report.schema import Fidelity, Text
from quantkit.schema import Recipe
from quantkit.storage import builtin, corpora, hub
from quantkit.storage.checkpoint import Checkpoint
from quantkit.storage.corpora import Tokens
from quantkit.storage.files import write_atomic, write_json
from quantkit.storage.machine import HEAP_BYTES, keep_freed_memory, peak_resident_bytes, return_freed_memory
from quantkit.storage.model_card import front_matter
from quantkit.storage.tensors import Written

Tell = Callable[[Progress], None]
Returned = TypeVar("Returned")


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """A sealed artifact, its report, and how long each step took."""

    format_name: str
    path: Path
    fidelity: Fidelity
    seconds: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class Texts:
    """The tokens of the streams, and what the report says of them."""

    tokens: Mapping[TextName, Tokens]
    told: Mapping[TextName, Text]
    solutions: Solutions  # run behind the fidelity text

    def streamed(self) -> StreamTexts:
        """What the build takes."""
        text = self.tokens
        return {
            "calibration": text["calibration"], "fidelity": text["fidelity"], "solutions": self.solutions.tokens
        }  # fmt: skip

    def counts(self) -> dict[TextName, int]:
        """Tokens per stream."""
        found = {name: tokens.n_tokens for name, tokens in self.tokens.items()}
        return {**found, "fidelity": found["fidelity"] + self.solutions.tokens.n_tokens}


@dataclass(frozen=True, kw_only=True)
class Figures:
    """What the streams behind the last block say; `tokens` None when the recipe says `fidelity: none`."""

    tokens: Measured | None = None
    solutions: Sequence[Scored] = ()


@dataclass(frozen=True, kw_only=True)
class Made:
    """An artifact under way: what it will be, and the folder it is made in."""

    plan: Plan
    folder: Path


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
    recipe: Recipe,
    text: str,
    *,
    overwrite: bool,
    evaluate: bool,
    planned: Callable[[Sequence[Plan]], None],
    tell: Tell,
) -> tuple[Outcome, ...]:
    """Build the artifacts of `recipe` (`text` is its file), one per format, and seal them under their names.

    `planned` sees the plans first. A failure leaves what was made in `<path>.building`, never under the final name.
    Raises QuantkitError.
    """
    return_freed_memory()
    for format_name in recipe.format:
        registry.require(format_name)
    clock = Clock()
    located = hub.resolve(recipe.source.model, recipe.source.revision)
    source = Checkpoint.open(located.folder)
    texts = tokenize(recipe, located.folder)
    plans = sources.plan_recipe(recipe, sources.facts_of(recipe, source, located.revision), texts.counts())
    folders = {plan.format_name: artifact.prepare(Path(plan.path), overwrite) for plan in plans}
    planned(plans)
    clock.lap("plan")
    if all(plan.memory.budget_bytes - plan.memory.peak_bytes >= HEAP_BYTES for plan in plans):
        keep_freed_memory()
    outcomes: dict[str, Outcome] = {}
    for together in sharing(plans):
        made = [Made(plan=plan, folder=folders[plan.format_name]) for plan in together]
        for outcome in run_once(made, source, texts, text, clock, evaluate=evaluate, tell=tell):
            outcomes[outcome.format_name] = outcome
    return tuple(outcomes[plan.format_name] for plan in plans)


def sharing(plans: Sequence[Plan]) -> list[list[Plan]]:
    """The plans that one solve serves, together."""
    same = [plan for plan in plans if plan.format.holds_codes]
    return [*([same] if same else []), *([plan] for plan in plans if not plan.format.holds_codes)]


def run_once(
    made: Sequence[Made], source: Checkpoint, texts: Texts, text: str, clock: Clock, *, evaluate: bool, tell: Tell
) -> Iterator[Outcome]:
    """One solve and its artifacts, sealed one after the other. Figures and benchmarks are those of the first.

    The others store the same weights bit for bit (`solve` has compared them).
    """
    plan, folder = made[0].plan, made[0].folder
    built, written, figures = quantize(made, source, texts, text, tell, clock)
    compared = compare(plan, source, folder, sources.compute(plan.recipe), evaluate=evaluate, tell=tell)
    clock.lap("benchmarks")
    licence = evidence.licence(front_matter(source.folder))
    likely = likelihood.rows(plan.recipe.evaluation.tasks, texts.solutions, figures.solutions)
    for each, files in zip(made, written, strict=True):
        report = evidence.fidelity(each.plan, built.blocks, figures.tokens, texts.told, likely, compared.rows, licence)
        report = gates.judged(each.plan.recipe.gates, report)
        write_evidence(each.plan, each.folder, report, figures, compared)
        write_timings(each.folder, built, clock)
        path = Path(each.plan.path)
        artifact.seal(each.folder, path, manifests.manifest(each.plan, source, report, built.blocks), files)
        yield Outcome(
            format_name=each.plan.format_name,
            path=path,
            fidelity=report,
            seconds=dict(clock.laps),
            peak_bytes=peak_resident_bytes(),
        )


def tokenize(recipe: Recipe, folder: Path) -> Texts:
    """Load the recipe's text sets and cut them into token sequences with the source's tokenizer."""
    tokenizer, sets = corpora.load_tokenizer(folder), builtin.folder("calibration")
    wanted: list[tuple[TextName, str, int | None, int, int]] = []
    calibration = recipe.calibration if recipe.learns else None
    if calibration:
        wanted.append(("calibration", calibration.set, calibration.sequences, calibration.length, calibration.seed))
    if fidelity := recipe.fidelity:
        wanted.append(("fidelity", fidelity.set, fidelity.windows, fidelity.length, 0))
    tokens, told = dict[TextName, Tokens](), dict[TextName, Text]()
    for name, set_name, sequences, length, seed in wanted:
        corpus = corpora.load_set(set_name, sets)
        tokens[name] = corpora.token_batches(corpus, tokenizer, sequences, length, seed)
        told[name] = evidence.text(corpus, tokens[name], length, seed)
    nothing = corpora.pack_tokens([])
    asked, wanted_items = recipe.evaluation.tasks, recipe.evaluation.likelihood
    solutions = likelihood.none()
    if fidelity:
        solutions = likelihood.tokenize(asked, tokenizer, items=wanted_items, length=fidelity.length)
    return Texts(tokens={"calibration": nothing, "fidelity": nothing, **tokens}, told=told, solutions=solutions)


def quantize(
    made: Sequence[Made], source: Checkpoint, texts: Texts, text: str, tell: Tell, clock: Clock
) -> tuple[Built, list[dict[str, Written]], Figures]:
    """Build into every folder, then compare the streams behind the last block, the head read from the first's files.

    Nothing is compared when the recipe says `fidelity: none`.
    """
    plans, folder = [each.plan for each in made], made[0].folder
    compute = sources.compute(plans[0].recipe)
    device, dtype, learning = (
        torch.device(compute.device),
        getattr(torch, compute.dtype),
        getattr(torch, compute.calibration),
    )
    sinks = [Sink(each.folder, each.plan.shards) for each in made]
    with scratch(folder) as place:
        try:
            built = finished(build(plans, source, texts.streamed(), sinks, place, device, dtype, learning), tell)
            written = [sink.close() for sink in sinks]
        finally:
            for sink in sinks:
                sink.abandon()
        for each in made:
            artifact.write_model_files(each.folder, each.plan, source.sidecars, text)
        clock.lap("quantize")
        figures, streams = Figures(), built.streams
        if "reference" in streams:
            bones, head = skeleton(plans[0].source.config, device, dtype), Checkpoint.open(folder)
            both = sides(bones, plans[0].layout, source, head, streams["reference"], streams["quantized"])
            figures = Figures(tokens=measure(both), solutions=likelihood.score(both, texts.solutions.items))
    clock.lap("distribution")
    return built, written, figures


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


def write_evidence(plan: Plan, folder: Path, report: Fidelity, figures: Figures, compared: Compared) -> None:
    """fidelity.json, the model card, plan.json, the samples, and the page made of what was written."""
    if figures.tokens or compared.pairs:
        (folder / "quantkit" / "samples").mkdir(exist_ok=True)
    write_atomic(folder / "quantkit" / "fidelity.json", report.to_json().encode())
    write_atomic(folder / "README.md", card.render(report).encode())
    write_atomic(folder / "quantkit" / "plan.json", manifests.plan_json(plan).encode())
    if figures.tokens:
        tokens_to_parquet(figures.tokens, folder / "quantkit" / "samples" / "tokens.parquet")
    if figures.solutions:
        likelihood.to_parquet(figures.solutions, folder / "quantkit" / "samples" / "solutions.parquet")
    if compared.pairs:
        pairs_to_parquet(compared.pairs, folder / "quantkit" / "samples" / "benchmarks.parquet")
    write_atomic(folder / html.HTML, html.page(folder).encode())


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
