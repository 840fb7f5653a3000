"""The pipeline from a recipe to sealed artifacts: plan, build, measure, benchmark, report, apply
gates, seal.

A recipe with several formats gives one artifact per format. Formats that hold the same codes share
one solve and its figures; a format that stores something else (`dense` rounds once more) is built
on its own. Callbacks receive the plans, progress and messages; nothing else leaves this module
before its result, but log records: steps and blocks at level INFO, modules at DEBUG.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from quantkit import registry
from quantkit.artifact import layout
from quantkit.artifact.fidelity_schema import Fidelity, TextSet
from quantkit.artifact.make_manifest import format_plan, make_manifest
from quantkit.artifact.model_files import check_model_files, write_model_files
from quantkit.artifact.read_report import read_report
from quantkit.artifact.seal import seal_artifact
from quantkit.artifact.staging import get_staging_path, prepare_staging, rename_into_place
from quantkit.artifact.timings import StepTimer, read_timings, write_timings
from quantkit.artifact.writer import ArtifactWriter, WrittenState
from quantkit.build import session
from quantkit.build.loop import BuildPrecision, BuiltBlocks, build_blocks
from quantkit.build.open_streams import StreamTexts
from quantkit.build.progress_log import BuildProgress
from quantkit.build.session import BuildSession
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.remote_code import allows_remote_code
from quantkit.checkpoint.tensors import WrittenFile
from quantkit.evaluate import solution_likelihood
from quantkit.evaluate.item_results import write_pairs
from quantkit.evaluate.local_checks import check_before_build
from quantkit.evaluate.prompt_overlap import check_overlaps
from quantkit.evaluate.self_sampler import open_self_source
from quantkit.evaluate.solution_likelihood import GoldSolutions, ScoredSolution
from quantkit.evaluate.source_comparison import SourceComparison, compare_with_source
from quantkit.evaluate.tasks import check_trust
from quantkit.evaluate.token_fidelity import load_stream_pair, measure_text
from quantkit.evaluate.token_samples import TokenSamples, sample_tokens, write_tokens
from quantkit.io import package_data
from quantkit.io.files import write_atomic
from quantkit.io.host import HEAP_BYTES, keep_freed_memory, return_freed_memory
from quantkit.models.layers import make_meta_model
from quantkit.plan import sources
from quantkit.plan.plan import Plan, SourceFacts
from quantkit.plan.read_texts import find_largest_id
from quantkit.plan.select_texts import select_texts
from quantkit.plan.self_texts import list_self_texts
from quantkit.plan.time_estimate import record_build
from quantkit.progress import ProgressCallback
from quantkit.recipe.schema import Recipe
from quantkit.report import bom, card, gates, html_page
from quantkit.report import make as evidence
from quantkit.report.loading import add_checks
from quantkit.report.make import TextName
from quantkit.report.reproduce import BuildCommand, make_build_command
from quantkit.texts import corpora
from quantkit.texts.chats import has_chat_template
from quantkit.texts.corpora import CorpusSet
from quantkit.texts.exposure import pool_small_kinds
from quantkit.texts.tokens import Tokens, pack_tokens

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BuildResult:
    """A sealed artifact, its report, and the seconds of each step."""

    format_name: str
    path: Path
    fidelity: Fidelity
    seconds: Mapping[str, float]
    peak_bytes: int


@dataclass(frozen=True, kw_only=True)
class TokenizedTexts:
    """The tokens of the streams, and their descriptions for the report."""

    tokens: Mapping[TextName, Tokens]
    descriptions: Mapping[TextName, TextSet]
    solutions: GoldSolutions  # run after the fidelity text
    tokenizer: corpora.Tokenizer
    notes: tuple[str, ...] = ()  # rows and documents that are left out

    def stream_texts(self) -> StreamTexts:
        """Return the tokens that the build runs."""
        return {
            "calibration": self.tokens["calibration"],
            "fidelity": self.tokens["fidelity"],
            "solutions": self.solutions.tokens,
        }

    def counts(self) -> dict[TextName, int]:
        """Return the number of tokens per stream."""
        counts = {name: tokens.n_tokens for name, tokens in self.tokens.items()}
        return {**counts, "fidelity": counts["fidelity"] + self.solutions.tokens.n_tokens}

    def hashes(self) -> dict[str, str]:
        """Return the sha256 of each stream's tokens."""
        return {name: tokens.hash for name, tokens in self.tokens.items()} | {
            "solutions": self.solutions.tokens.hash
        }


@dataclass(frozen=True, kw_only=True)
class StreamFigures:
    """Figures of the streams after the last block; `tokens` is None with `fidelity: none`."""

    tokens: TokenSamples | None = None
    solutions: Sequence[ScoredSolution] = ()


@dataclass(frozen=True, kw_only=True)
class MeasuredBuild:
    """Blocks, figures, texts and scores of one solve, which its artifacts share."""

    built: BuiltBlocks
    figures: StreamFigures
    texts: TokenizedTexts
    compared: SourceComparison


@dataclass(frozen=True, kw_only=True)
class ArtifactInProgress:
    """An artifact in progress: its plan, its staging folder, and the tensors on disk."""

    plan: Plan
    folder: Path
    stored: WrittenState  # by an earlier, interrupted run


def build_artifacts(
    recipe: Recipe,
    text: str,
    *,
    overwrite: bool,
    evaluate: bool,
    on_plan: Callable[[Sequence[Plan]], None],
    on_progress: ProgressCallback,
    restart: bool = False,
    trusted_code: Sequence[str] = (),
    on_message: Callable[[str], None] = lambda _: None,
) -> tuple[BuildResult, ...]:
    """Build the artifacts of `recipe` (`text` is its file) and seal them under their names.

    `on_message` receives where a build resumes and what could not be removed. A failure leaves the
    unfinished artifact in `<path>.building` and adds a note to the exception. The next run resumes,
    unless `restart` discards it. trusted_code: see tokenize. Raises QuantkitError.
    """
    return_freed_memory()
    for format_name in recipe.format:
        registry.check_packages(format_name)
    timer = StepTimer()
    located = hub.resolve_model(recipe.source.model, recipe.source.revision)
    source = Checkpoint.open(located.folder, decode=True)
    facts = sources.make_source_facts(recipe, source, located.revision)
    recipe = sources.resolve_texts(recipe, facts, session.read_chosen_texts(recipe, restart))
    texts = check_and_tokenize(recipe, facts, source, trusted_code, on_progress)
    plans = plan_checked(recipe, facts, texts, text, trusted_code if evaluate else None)
    keep_memory_if_free(plans)
    with session.exclusive_lock(plans):
        journal = session.find_interrupted(plans, overwrite=overwrite, restart=restart)
        on_plan(plans)
        timer.lap("plan")
        build = session.begin_session(plans, journal, source, texts.hashes(), on_progress)
        timer.lap("source hashes")
        try:
            if build.resumed:
                on_message(f"continuing: {build.status_message()}")
            for loop, group in enumerate(session.group_by_solve(plans)):
                if not build.sealed_manifests(loop):
                    build_group(
                        build,
                        loop,
                        source.split_experts(plans[0].layout.blocks),
                        texts,
                        text,
                        timer,
                        evaluate=evaluate,
                        trusted_code=trusted_code,
                        on_progress=on_progress,
                    )
                for plan in group:
                    rename_sealed(build, plan, build.sealed_manifests(loop)[plan.format_name])
            if message := build.remove_scratch():
                on_message(message)
        except BaseException as error:
            build.add_resume_note(error)
            raise
    return tuple(read_result(plan) for plan in plans)


def plan_checked(
    recipe: Recipe,
    facts: SourceFacts,
    texts: TokenizedTexts,
    text: str,
    trusted_code: Sequence[str] | None,
) -> tuple[Plan, ...]:
    """Return the plans of a build after every check that needs no weights.

    text: the recipe's file. trusted_code: None without benchmarks.
    """
    counted = {name: tokens.n_tokens for name, tokens in texts.tokens.items()}
    plans = sources.plan_recipe(recipe, facts, texts.counts(), texts.notes, counted)
    check_model_files(plans, text)
    largest = [find_largest_id(tokens) for tokens in texts.stream_texts().values()]
    return check_before_build(plans, largest, trusted_code)


def keep_memory_if_free(plans: Sequence[Plan]) -> None:
    """Keep freed memory for the next allocation if every plan leaves room for it."""
    if all(plan.memory.budget_bytes - plan.memory.peak_bytes >= HEAP_BYTES for plan in plans):
        keep_freed_memory()


def rename_sealed(build: BuildSession, plan: Plan, manifest: str) -> None:
    """Rename a sealed artifact, whose manifest has this sha256, from its staging folder to its
    final name.
    """
    path, replaced = Path(plan.path), build.record_replaced(plan, manifest)
    rename_into_place(get_staging_path(path), path, manifest, replaced)


def read_result(plan: Plan) -> BuildResult:
    """Read and log the result of a sealed artifact from its files."""
    path = Path(plan.path)
    fidelity, timings = read_report(path), read_timings(path)
    LOG.info("%s: %s", path, fidelity.status)
    return BuildResult(
        format_name=plan.format_name,
        path=path,
        fidelity=fidelity,
        seconds=timings.seconds,
        peak_bytes=timings.peak_rss_bytes,
    )


def build_group(
    build: BuildSession,
    loop: int,
    source: Checkpoint,
    texts: TokenizedTexts,
    text: str,
    timer: StepTimer,
    *,
    evaluate: bool,
    trusted_code: Sequence[str],
    on_progress: ProgressCallback,
) -> None:
    """Build the artifacts of one solve and seal them; they get their names later.

    Figures and benchmarks are measured on the first: the others store the same weights bit for bit,
    as `quantize_group` has checked.
    """
    progress = build.read_progress(loop)
    artifacts = [
        ArtifactInProgress(
            plan=plan,
            folder=prepare_staging(plan, progress.get_written_state(number), build.owner),
            stored=progress.get_written_state(number),
        )
        for number, plan in enumerate(session.group_by_solve(build.plans)[loop])
    ]
    plan, folder = artifacts[0].plan, artifacts[0].folder
    built, written, figures = quantize_and_measure(
        artifacts, source, texts, text, on_progress, timer, build.prepare_states(loop), progress
    )
    compared = compare_with_source(
        plan,
        source,
        folder,
        sources.resolve_compute(plan.recipe),
        evaluate=evaluate,
        trusted_code=trusted_code,
        on_progress=on_progress,
        answers_folder=build.answers_folder(loop),
    )
    timer.lap("benchmarks")
    measured = MeasuredBuild(built=built, figures=figures, texts=texts, compared=compared)
    session.check_source(build.journal, source)
    sealed = dict[str, str]()
    for artifact, files in zip(artifacts, written, strict=True):
        command = make_build_command(
            text, artifact.plan, evaluate=evaluate, trusted_code=trusted_code
        )
        report = report_artifact(artifact.plan, source, measured, command)
        report = add_checks(report, artifact.plan, source, built.blocks, artifact.folder)
        write_evidence(artifact.plan, artifact.folder, report, figures, compared)
        write_atomic(artifact.folder / layout.BOM, bom.render_bom(report, files).encode())
        write_timings(artifact.folder, built.blocks, timer)
        manifest = make_manifest(artifact.plan, source, report, built.blocks)
        sealed[artifact.plan.format_name] = seal_artifact(artifact.folder, manifest, files)
    build.mark_sealed(loop, sealed)
    if not build.resumed:  # the seconds are those of whole steps
        scored = all(row.status == "ok" for row in compared.rows)
        record_build(plan, timer.laps, [x.seconds for x in built.blocks], is_scored=scored)


def report_artifact(
    plan: Plan, source: Checkpoint, measured: MeasuredBuild, command: BuildCommand
) -> Fidelity:
    """Return the report of an artifact, with its gates judged; command: builds it again."""
    report = evidence.make_report(
        plan,
        measured.built.blocks,
        measured.figures.tokens,
        measured.texts.descriptions,
        solution_likelihood.make_likelihood_rows(
            plan.recipe.evaluation.tasks, measured.texts.solutions, measured.figures.solutions
        ),
        measured.compared.rows,
        evidence.read_stated_facts(source.folder),
        command,
    )
    versions = {**report.versions, **measured.compared.conditions}
    report = report.model_copy(update={"versions": versions})
    return gates.apply_gates(plan.recipe.gates, report)


def check_and_tokenize(
    recipe: Recipe,
    facts: SourceFacts,
    source: Checkpoint,
    trusted_code: Sequence[str],
    on_progress: ProgressCallback,
) -> TokenizedTexts:
    """Tokenize the texts of a build; faults of the recipe come before the model samples text."""
    if list_self_texts(recipe):
        sources.plan_recipe(recipe, facts)
    return tokenize(recipe, source.folder, trusted_code, source, on_progress)


def tokenize(
    recipe: Recipe,
    folder: Path,
    trusted_code: Sequence[str] = (),
    source: Checkpoint | None = None,
    on_progress: ProgressCallback = lambda _: None,
) -> TokenizedTexts:
    """Load the recipe's text sets and cut them into token sequences with the source's tokenizer.

    Text of the model itself is sampled from `source`, the checkpoint in `folder` by default.
    trusted_code: sha256 of Python files that tasks may run; raises UntrustedCode for others.
    """
    check_trust(recipe.evaluation.tasks, trusted_code)
    is_code_allowed = allows_remote_code(recipe.source.trust_remote_code, folder)
    tokenizer = corpora.load_tokenizer(folder, is_code_allowed)
    tokens, descriptions = dict[TextName, Tokens](), dict[TextName, TextSet]()
    notes = list[str]()
    sets = load_sets(recipe, folder, source, tokenizer, on_progress)
    for name, _, sequences, length, seed in select_texts(recipe):
        corpus = sets[name]
        calibrated = set(tokens["calibration"].domains if "calibration" in tokens else ())
        sampled = corpora.sample_sequences(corpus, tokenizer, sequences, length, seed, calibrated)
        tokens[name] = pool_fidelity_kinds(sampled, calibrated) if name == "fidelity" else sampled
        notes += corpora.describe_left_out(corpus, sampled, tokenizer)
        descriptions[name] = evidence.summarize_text(
            corpus,
            tokens[name],
            length,
            seed,
            has_template=has_chat_template(tokenizer),
            chosen=recipe.chosen_texts.get(name, ("", ""))[1],
            labels=sampled.domains,
        )
    if "calibration" in tokens:
        rows = tokens["calibration"].select(range(tokens["calibration"].n_sequences))
        texts = [tokenizer.decode(row.ids) for row in rows]
        overlaps = check_overlaps(recipe.evaluation.tasks, texts, trusted_code)
        described = descriptions["calibration"].model_copy(update={"overlaps": overlaps})
        descriptions["calibration"] = described
    nothing = pack_tokens([])
    tasks, items = recipe.evaluation.tasks, recipe.evaluation.likelihood
    solutions = solution_likelihood.make_empty_solutions()
    if recipe.fidelity:
        solutions = solution_likelihood.tokenize_solutions(
            tasks, tokenizer, items=items, length=recipe.fidelity.length, trusted_code=trusted_code
        )
    return TokenizedTexts(
        tokens={"calibration": nothing, "fidelity": nothing, **tokens},
        descriptions=descriptions,
        solutions=solutions,
        tokenizer=tokenizer,
        notes=tuple(notes),
    )


def pool_fidelity_kinds(tokens: Tokens, calibrated: Collection[str]) -> Tokens:
    """Return the fidelity text with the labels under which its kinds are reported."""
    return replace(tokens, domains=pool_small_kinds(tokens.domains, tokens.lengths, calibrated))


def load_sets(
    recipe: Recipe,
    folder: Path,
    source: Checkpoint | None,
    tokenizer: corpora.Tokenizer,
    on_progress: ProgressCallback,
) -> dict[TextName, CorpusSet]:
    """Read the recipe's text sets; the model is loaded only if it samples text of them."""
    place, sets = package_data.locate_folder("calibration"), dict[TextName, CorpusSet]()
    with ExitStack() as opened:
        own = None
        if list_self_texts(recipe):
            checkpoint = source or Checkpoint.open(folder, decode=True)
            own = opened.enter_context(open_self_source(recipe, checkpoint, tokenizer, on_progress))
        for name, set_name, sequences, length, seed in select_texts(recipe):
            sampler = own.make_sampler(name, sequences, length, seed) if own is not None else None
            sets[name] = corpora.load_set(set_name, place, sampler)
    return sets


def quantize_and_measure(
    artifacts: Sequence[ArtifactInProgress],
    source: Checkpoint,
    texts: TokenizedTexts,
    text: str,
    on_progress: ProgressCallback,
    timer: StepTimer,
    states: Path,
    progress: BuildProgress,
) -> tuple[BuiltBlocks, list[dict[str, WrittenFile]], StreamFigures]:
    """Build into every folder, then measure the streams after the last block, with the head of the
    first's files.

    Hidden states are kept in `states`. Nothing is measured with `fidelity: none`.
    """
    plans, folder = [artifact.plan for artifact in artifacts], artifacts[0].folder
    compute = sources.resolve_compute(plans[0].recipe)
    precision = BuildPrecision(
        device=torch.device(compute.device),
        dtype=getattr(torch, compute.dtype),
        calibration=getattr(torch, compute.calibration),
    )
    writers = [
        ArtifactWriter(artifact.folder, artifact.plan.shards, artifact.stored)
        for artifact in artifacts
    ]
    stream_texts = texts.stream_texts()
    try:
        built = build_blocks(
            plans, source, stream_texts, writers, states, precision, on_progress, progress
        )
        written = [each.close() for each in writers]
    finally:
        for each in writers:
            each.abandon()
    for artifact in artifacts:
        write_model_files(artifact.folder, artifact.plan, source, text)
    timer.lap("quantize")
    figures, streams = StreamFigures(), built.streams
    if "reference" in streams:
        model, head = (
            make_meta_model(plans[0].source.config, precision.device, precision.dtype),
            Checkpoint.open(folder),
        )
        both = load_stream_pair(model, plans[0].layout, source, head, streams)
        figures = StreamFigures(
            tokens=sample_tokens(both, measure_text(both), texts.tokenizer),
            solutions=solution_likelihood.score_solutions(both, texts.solutions.items),
        )
    for stream in streams.values():
        stream.close()
    timer.lap("distribution")
    return built, written, figures


def write_evidence(
    plan: Plan, folder: Path, report: Fidelity, figures: StreamFigures, compared: SourceComparison
) -> None:
    """Write fidelity.json, the model card, plan.json and the samples, and the page made of them."""
    if figures.tokens or compared.pairs:
        (folder / layout.SAMPLES_FOLDER).mkdir(exist_ok=True)
    write_atomic(folder / layout.FIDELITY, report.to_json().encode())
    write_atomic(folder / layout.MODEL_CARD, card.render_card(report).encode())
    write_atomic(folder / layout.PLAN, format_plan(plan).encode())
    if figures.tokens:
        write_tokens(figures.tokens, folder)
    if figures.solutions:
        solution_likelihood.write_solutions(figures.solutions, folder / layout.SOLUTION_SAMPLES)
    if compared.pairs:
        write_pairs(compared.pairs, folder / layout.BENCHMARK_SAMPLES)
    write_atomic(folder / layout.PAGE, html_page.make_page(folder).encode())
