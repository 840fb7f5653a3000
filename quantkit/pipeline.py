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
from quantkit.artifact import layout
from quantkit.artifact.fidelity_schema import Fidelity, TextSet
from quantkit.artifact.front_matter import read_front_matter
from quantkit.artifact.make_manifest import format_plan, make_manifest
from quantkit.artifact.model_files import write_model_files
from quantkit.artifact.read_report import read_report
from quantkit.artifact.seal import seal_artifact
from quantkit.artifact.staging import get_staging_path, prepare_staging, rename_into_place
from quantkit.artifact.writer import ArtifactWriter, WrittenState
from quantkit.build import session
from quantkit.build.loop import BuiltBlocks, build_blocks
from quantkit.build.loop import StreamTexts as StreamTexts
from quantkit.build.progress_log import BuildProgress
from quantkit.build.session import BuildSession
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.remote_code import allows_remote_code
from quantkit.checkpoint.tensors import WrittenFile
from quantkit.errors import ArtifactError
from quantkit.evaluate import solution_likelihood
from quantkit.evaluate.item_results import write_pairs
from quantkit.evaluate.solution_likelihood import GoldSolutions, ScoredSolution
from quantkit.evaluate.source_comparison import SourceComparison, compare_with_source
from quantkit.evaluate.token_fidelity import (
    TextFidelity,
    load_stream_pair,
    measure_text,
    write_tokens,
)
from quantkit.io import package_data
from quantkit.io.files import read_json, write_atomic, write_json
from quantkit.io.host import HEAP_BYTES, get_peak_memory, keep_freed_memory, return_freed_memory
from quantkit.models.layers import make_meta_model
from quantkit.plan import sources
from quantkit.plan.plan import Plan
from quantkit.progress import Progress, ProgressCallback
from quantkit.recipe.schema import Recipe
from quantkit.report import card, gates, html_page
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
    told: Mapping[TextName, TextSet]
    solutions: GoldSolutions  # run behind the fidelity text

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

    tokens: TextFidelity | None = None
    solutions: Sequence[ScoredSolution] = ()


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
    planned: Callable[[Sequence[Plan]], None],
    tell: ProgressCallback,
    restart: bool = False,
    say: Callable[[str], None] = lambda _: None,
) -> tuple[BuildResult, ...]:
    """Build the artifacts of `recipe` (`text` is its file), one per format, and seal them under their names.

    `planned` sees the plans first. A failure leaves what was made in `<path>.building`, never under the final name,
    and a note on the exception that says how to go on; the next run does, unless `restart` drops what there is. `say`
    hears where a build goes on, and what could not be removed behind it. Raises QuantkitError.
    """
    return_freed_memory()
    for format_name in recipe.format:
        registry.check_packages(format_name)
    clock = StepTimer()
    located = hub.resolve_model(recipe.source.model, recipe.source.revision)
    source = Checkpoint.open(located.folder)
    texts = tokenize(recipe, located.folder)
    plans = sources.plan_recipe(
        recipe, sources.make_source_facts(recipe, source, located.revision), texts.counts()
    )
    if all(plan.memory.budget_bytes - plan.memory.peak_bytes >= HEAP_BYTES for plan in plans):
        keep_freed_memory()
    with session.exclusive_lock(plans):
        journal = session.find_interrupted(plans, overwrite=overwrite, restart=restart)
        planned(plans)
        clock.lap("plan")
        begun = session.begin_session(plans, journal, source, texts.hashes(), tell)
        clock.lap("source hashes")
        try:
            if begun.resumed:
                say(f"continuing: {begun.told()}")
            for loop, together in enumerate(session.group_by_solve(plans)):
                if not begun.ready(loop):
                    build_group(
                        begun, loop, source, texts, text, clock, evaluate=evaluate, tell=tell
                    )
                for plan in together:
                    path = Path(plan.path)
                    rename_into_place(
                        get_staging_path(path), path, begun.ready(loop)[plan.format_name]
                    )
            if left := begun.finish():
                say(left)
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
            folder=prepare_staging(plan, standing.stored(number)),
            stored=standing.stored(number),
        )
        for number, plan in enumerate(session.group_by_solve(begun.plans)[loop])
    ]
    plan, folder = made[0].plan, made[0].folder
    built, written, figures = quantize_and_measure(
        made, source, texts, text, tell, clock, begun.states(loop), standing
    )
    compute, kept = sources.resolve_compute(plan.recipe), begun.answers(loop)
    compared = compare_with_source(
        plan, source, folder, compute, evaluate=evaluate, on_progress=tell, answers_folder=kept
    )
    clock.lap("benchmarks")
    licence = evidence.parse_license(read_front_matter(source.folder))
    likely = solution_likelihood.make_likelihood_rows(
        plan.recipe.evaluation.tasks, texts.solutions, figures.solutions
    )
    session.check_source(begun.journal, source)
    sealed = dict[str, str]()
    for each, files in zip(made, written, strict=True):
        report = evidence.make_report(
            each.plan, built.blocks, figures.tokens, texts.told, likely, compared.rows, licence
        )
        report = gates.apply_gates(each.plan.recipe.gates, report)
        write_evidence(each.plan, each.folder, report, figures, compared)
        write_timings(each.folder, built, clock)
        manifest = make_manifest(each.plan, source, report, built.blocks)
        sealed[each.plan.format_name] = seal_artifact(each.folder, manifest, files)
    begun.seal(loop, sealed)


def tokenize(recipe: Recipe, folder: Path) -> TokenizedTexts:
    """Load the recipe's text sets and cut them into token sequences with the source's tokenizer."""
    own_code = allows_remote_code(recipe.source.trust_remote_code, folder)
    tokenizer, sets = (
        corpora.load_tokenizer(folder, own_code),
        package_data.locate_folder("calibration"),
    )
    wanted: list[tuple[TextName, str, int | None, int, int]] = []
    calibration = recipe.calibration if recipe.needs_calibration else None
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
    tokens, told = dict[TextName, Tokens](), dict[TextName, TextSet]()
    for name, set_name, sequences, length, seed in wanted:
        corpus = corpora.load_set(set_name, sets)
        tokens[name] = corpora.sample_sequences(corpus, tokenizer, sequences, length, seed)
        told[name] = evidence.summarize_text(corpus, tokens[name], length, seed)
    nothing = corpora.pack_tokens([])
    asked, wanted_items = recipe.evaluation.tasks, recipe.evaluation.likelihood
    solutions = solution_likelihood.make_empty_solutions()
    if fidelity:
        solutions = solution_likelihood.tokenize_solutions(
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
) -> tuple[BuiltBlocks, list[dict[str, WrittenFile]], StreamFigures]:
    """Build into every folder, then compare the streams behind the last block, the head read from the first's files.

    Their hidden states lie in `states`. Nothing is compared when the recipe says `fidelity: none`.
    """  # fmt: skip
    plans, folder = [each.plan for each in made], made[0].folder
    compute = sources.resolve_compute(plans[0].recipe)
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
        write_model_files(each.folder, each.plan, source.sidecars, text)
    clock.lap("quantize")
    figures, streams = StreamFigures(), built.streams
    if "reference" in streams:
        bones, head = (
            make_meta_model(plans[0].source.config, device, dtype),
            Checkpoint.open(folder),
        )
        both = load_stream_pair(
            bones, plans[0].layout, source, head, streams["reference"], streams["quantized"]
        )
        figures = StreamFigures(
            tokens=measure_text(both),
            solutions=solution_likelihood.score_solutions(both, texts.solutions.items),
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
    plan: Plan, folder: Path, report: Fidelity, figures: StreamFigures, compared: SourceComparison
) -> None:
    """fidelity.json, the model card, plan.json, the samples, and the page made of what was written."""
    if figures.tokens or compared.pairs:
        (folder / layout.SAMPLES_FOLDER).mkdir(exist_ok=True)
    write_atomic(folder / layout.FIDELITY, report.to_json().encode())
    write_atomic(folder / layout.MODEL_CARD, card.render_card(report).encode())
    write_atomic(folder / layout.PLAN, format_plan(plan).encode())
    if figures.tokens:
        write_tokens(figures.tokens, folder / layout.TOKEN_SAMPLES)
    if figures.solutions:
        solution_likelihood.write_solutions(figures.solutions, folder / layout.SOLUTION_SAMPLES)
    if compared.pairs:
        write_pairs(compared.pairs, folder / layout.BENCHMARK_SAMPLES)
    write_atomic(folder / layout.PAGE, html_page.make_page(folder).encode())


def write_timings(folder: Path, built: BuiltBlocks, clock: StepTimer) -> None:
    """Note what this run took, and what each block took when it was made."""
    timings = Timings(
        seconds=clock.laps,
        blocks={block.name: block.seconds for block in built.blocks},
        threads=torch.get_num_threads(),
        cpus=os.cpu_count(),
        peak_rss_bytes=get_peak_memory(),
    )
    write_json(folder / layout.TIMINGS, timings.model_dump())
