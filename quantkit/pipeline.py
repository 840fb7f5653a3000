"""From a recipe to sealed artifacts with their evidence: plan, build, measure, benchmark, report, judge, seal.

A recipe with several formats gives one artifact each. Formats that hold the same codes share one solve and its figures;
one that stores something else (`dense` rounds once more) is built by itself. Each step takes what the one before left.
`tell` hears how far long steps are; nothing else leaves this module before its result.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import torch
from pydantic import BaseModel

from quantkit import registry
from quantkit.artifact import layout, writer
from quantkit.artifact import manifest as manifests
from quantkit.artifact.fidelity_schema import Fidelity, Text
from quantkit.artifact.front_matter import front_matter
from quantkit.artifact.read_report import read_report
from quantkit.artifact.writer import ArtifactWriter, WrittenState
from quantkit.build import session
from quantkit.build.loop import BuiltBlocks, StreamTexts, build_blocks
from quantkit.build.progress_log import BuildProgress
from quantkit.build.session import BuildSession
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.remote_code import may_run
from quantkit.checkpoint.tensors import Written
from quantkit.errors import ArtifactError
from quantkit.evaluate import likelihood
from quantkit.evaluate.compare import Compared, compare
from quantkit.evaluate.distribution import Measured, measure, sides, tokens_to_parquet
from quantkit.evaluate.likelihood import Scored, Solutions
from quantkit.evaluate.samples import pairs_to_parquet
from quantkit.io import package_data
from quantkit.io.files import read_json, write_atomic, write_json
from quantkit.io.host import HEAP_BYTES, keep_freed_memory, peak_resident_bytes, return_freed_memory
from quantkit.models.layers import meta_model
from quantkit.plan import sources
from quantkit.plan.plan import Plan
from quantkit.progress import Progress, ProgressCallback
from quantkit.recipe.schema import Recipe
from quantkit.report import card, gates, html
from quantkit.report import make as evidence
from quantkit.report.make import TextName
from quantkit.texts import corpora
from quantkit.texts.corpora import Tokens

Returned = TypeVar("Returned")


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A sealed artifact, its report, and how long each step took."""

    format_name: str
    path: Path
    fidelity: Fidelity
    seconds: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokenizedTexts:
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

    def hashes(self) -> dict[str, str]:
        """sha256 of each stream's tokens."""
        return {name: tokens.hash for name, tokens in self.tokens.items()} | {
            "solutions": self.solutions.tokens.hash
        }


@dataclass(frozen=True, kw_only=True)
class StreamFigures:
    """What the streams behind the last block say; `tokens` None when the recipe says `fidelity: none`."""

    tokens: Measured | None = None
    solutions: Sequence[Scored] = ()


@dataclass(frozen=True, kw_only=True)
class ArtifactInProgress:
    """An artifact under way: what it will be, and the folder it is made in."""

    plan: Plan
    folder: Path
    stored: WrittenState  # by an earlier, interrupted run


class Timings(BaseModel):
    """What depends on the clock and the machine's load: the one file the manifest does not hash."""

    seconds: dict[str, float]
    blocks: dict[str, float]
    threads: int
    cpus: int | None
    peak_rss_bytes: int


@dataclass(kw_only=True)
class StepTimer:
    """Seconds per step."""

    began: float = field(default_factory=time.monotonic)
    laps: dict[str, float] = field(default_factory=dict)

    def lap(self, name: str) -> None:
        """Note the time since the last lap under `name`."""
        now = time.monotonic()
        self.laps[name] = now - self.began
        self.began = now


def build_artifacts(
    recipe: Recipe,
    text: str,
    *,
    overwrite: bool,
    evaluate: bool,
    on_plan: Callable[[Sequence[Plan]], None],
    on_progress: ProgressCallback,
    restart: bool = False,
    on_message: Callable[[str], None] = lambda _: None,
) -> tuple[BuildResult, ...]:
    """Build the artifacts of `recipe` (`text` is its file), one per format, and seal them under their names.

    `on_plan` sees the plans first. A failure leaves what was made in `<path>.building`, never under the final name,
    and a note on the exception that says how to go on; the next run does, unless `restart` drops what there is. `on_message`
    hears where a build goes on, and what could not be removed behind it. Raises QuantkitError.
    """
    return_freed_memory()
    for format_name in recipe.format:
        registry.require(format_name)
    clock = StepTimer()
    located = hub.resolve(recipe.source.model, recipe.source.revision)
    source = Checkpoint.open(located.folder)
    texts = tokenize(recipe, located.folder)
    plans = sources.plan_recipe(
        recipe, sources.facts_of(recipe, source, located.revision), texts.counts()
    )
    if all(plan.memory.budget_bytes - plan.memory.peak_bytes >= HEAP_BYTES for plan in plans):
        keep_freed_memory()
    with session.exclusive_lock(plans):
        journal = session.find_interrupted(plans, overwrite=overwrite, restart=restart)
        on_plan(plans)
        clock.lap("plan")
        begun = session.begin_session(plans, journal, source, texts.hashes(), on_progress)
        clock.lap("source hashes")
        try:
            if begun.resumed:
                on_message(f"continuing: {begun.told()}")
            for loop, together in enumerate(session.group_by_solve(plans)):
                if not begun.ready(loop):
                    build_group(
                        begun, loop, source, texts, text, clock, evaluate=evaluate, tell=on_progress
                    )
                for plan in together:
                    path = Path(plan.path)
                    writer.rename_into_place(
                        writer.staging(path), path, begun.ready(loop)[plan.format_name]
                    )
            if left := begun.finish():
                on_message(left)
        except BaseException as error:
            begun.leave(error)
            raise
    return tuple(read_result(plan) for plan in plans)


def read_result(plan: Plan) -> BuildResult:
    """What a sealed artifact says of itself."""
    path = Path(plan.path)
    timings = Timings.model_validate(read_json(path / layout.TIMINGS, ArtifactError))
    return BuildResult(
        format_name=plan.format_name,
        path=path,
        fidelity=read_report(path),
        seconds=timings.seconds,
        peak_bytes=timings.peak_rss_bytes,
    )


def build_group(
    begun: BuildSession,
    loop: int,
    source: Checkpoint,
    texts: TokenizedTexts,
    text: str,
    clock: StepTimer,
    *,
    evaluate: bool,
    tell: ProgressCallback,
) -> None:
    """One solve and its artifacts, sealed but without their names. Figures and benchmarks are those of the first.

    The others store the same weights bit for bit (`solve` has compared them).
    """
    standing = begun.standing(loop)
    made = [
        ArtifactInProgress(
            plan=plan,
            folder=writer.prepare(plan, standing.stored(number)),
            stored=standing.stored(number),
        )
        for number, plan in enumerate(session.group_by_solve(begun.plans)[loop])
    ]
    plan, folder = made[0].plan, made[0].folder
    built, written, figures = quantize_and_measure(
        made, source, texts, text, tell, clock, begun.states(loop), standing
    )
    compute, kept = sources.compute(plan.recipe), begun.answers(loop)
    compared = compare(plan, source, folder, compute, evaluate=evaluate, tell=tell, kept=kept)
    clock.lap("benchmarks")
    licence = evidence.licence(front_matter(source.folder))
    likely = likelihood.rows(plan.recipe.evaluation.tasks, texts.solutions, figures.solutions)
    session.check_source(begun.journal, source)
    sealed = dict[str, str]()
    for each, files in zip(made, written, strict=True):
        report = evidence.fidelity(
            each.plan, built.blocks, figures.tokens, texts.told, likely, compared.rows, licence
        )
        report = gates.judged(each.plan.recipe.gates, report)
        write_evidence(each.plan, each.folder, report, figures, compared)
        write_timings(each.folder, built, clock)
        manifest = manifests.manifest(each.plan, source, report, built.blocks)
        sealed[each.plan.format_name] = writer.seal(each.folder, manifest, files)
    begun.seal(loop, sealed)


def tokenize(recipe: Recipe, folder: Path) -> TokenizedTexts:
    """Load the recipe's text sets and cut them into token sequences with the source's tokenizer."""
    own_code = may_run(recipe.source.trust_remote_code, folder)
    tokenizer, sets = corpora.load_tokenizer(folder, own_code), package_data.folder("calibration")
    wanted: list[tuple[TextName, str, int | None, int, int]] = []
    calibration = recipe.calibration if recipe.learns else None
    if calibration:
        wanted.append((
            "calibration",
            calibration.set,
            calibration.sequences,
            calibration.length,
            calibration.seed,
        ))
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
        solutions = likelihood.tokenize(
            asked, tokenizer, items=wanted_items, length=fidelity.length
        )
    return TokenizedTexts(
        tokens={"calibration": nothing, "fidelity": nothing, **tokens},
        told=told,
        solutions=solutions,
    )


def quantize_and_measure(
    made: Sequence[ArtifactInProgress],
    source: Checkpoint,
    texts: TokenizedTexts,
    text: str,
    tell: ProgressCallback,
    clock: StepTimer,
    states: Path,
    standing: BuildProgress,
) -> tuple[BuiltBlocks, list[dict[str, Written]], StreamFigures]:
    """Build into every folder, then compare the streams behind the last block, the head read from the first's files.

    Their hidden states lie in `states`. Nothing is compared when the recipe says `fidelity: none`.
    """  # fmt: skip
    plans, folder = [each.plan for each in made], made[0].folder
    compute = sources.compute(plans[0].recipe)
    device, dtype, learning = (
        torch.device(compute.device),
        getattr(torch, compute.dtype),
        getattr(torch, compute.calibration),
    )
    sinks = [ArtifactWriter(each.folder, each.plan.shards, each.stored) for each in made]
    streamed = texts.streamed()
    try:
        built = run_to_end(
            build_blocks(plans, source, streamed, sinks, states, device, dtype, learning, standing),
            tell,
        )
        written = [sink.close() for sink in sinks]
    finally:
        for sink in sinks:
            sink.abandon()
    for each in made:
        writer.write_model_files(each.folder, each.plan, source.sidecars, text)
    clock.lap("quantize")
    figures, streams = StreamFigures(), built.streams
    if "reference" in streams:
        bones, head = meta_model(plans[0].source.config, device, dtype), Checkpoint.open(folder)
        both = sides(
            bones, plans[0].layout, source, head, streams["reference"], streams["quantized"]
        )
        figures = StreamFigures(
            tokens=measure(both), solutions=likelihood.score(both, texts.solutions.items)
        )
    for stream in streams.values():
        stream.close()
    clock.lap("distribution")
    return built, written, figures


def run_to_end(steps: Generator[Progress, None, Returned], tell: ProgressCallback) -> Returned:
    """Run a generator to its end, telling each progress; what it returns."""
    while True:
        try:
            tell(next(steps))
        except StopIteration as end:
            result: Returned = end.value
            return result


def write_evidence(
    plan: Plan, folder: Path, report: Fidelity, figures: StreamFigures, compared: Compared
) -> None:
    """fidelity.json, the model card, plan.json, the samples, and the page made of what was written."""
    if figures.tokens or compared.pairs:
        (folder / "quantkit" / "samples").mkdir(exist_ok=True)
    write_atomic(folder / "quantkit" / "fidelity.json", report.to_json().encode())
    write_atomic(folder / "README.md", card.render(report).encode())
    write_atomic(folder / "quantkit" / "plan.json", manifests.plan_json(plan).encode())
    if figures.tokens:
        tokens_to_parquet(figures.tokens, folder / "quantkit" / "samples" / "tokens.parquet")
    if figures.solutions:
        likelihood.to_parquet(
            figures.solutions, folder / "quantkit" / "samples" / "solutions.parquet"
        )
    if compared.pairs:
        pairs_to_parquet(compared.pairs, folder / "quantkit" / "samples" / "benchmarks.parquet")
    write_atomic(folder / html.HTML, html.page(folder).encode())


def write_timings(folder: Path, built: BuiltBlocks, clock: StepTimer) -> None:
    """Note what this run took, and what each block took when it was made."""
    timings = Timings(
        seconds=clock.laps,
        blocks={block.name: block.seconds for block in built.blocks},
        threads=torch.get_num_threads(),
        cpus=os.cpu_count(),
        peak_rss_bytes=peak_resident_bytes(),
    )
    write_json(folder / layout.TIMINGS, timings.model_dump())
