"""The two sides of a comparison: artifacts with their samples, fidelity.json files, or a source.

A source is what its artifact measured of it: the answers and tokens of the samples, with no error.
So an artifact and its source are compared like two artifacts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from quantkit.artifact.fidelity_schema import BenchmarkResult, DistributionResult, Fidelity, Figure
from quantkit.artifact.layout import (
    BENCHMARK_SAMPLES,
    CONFIG,
    EVIDENCE_FOLDER,
    FIDELITY,
    LOADTEST,
    MANIFEST,
    PLAN,
    SOLUTION_SAMPLES,
    TOKEN_SAMPLES,
)
from quantkit.artifact.loadtest_schema import LoadTest, read_load_test
from quantkit.artifact.read_manifest import get_section
from quantkit.artifact.read_report import read_report_file, read_sealed_report
from quantkit.diff.diff_schema import SideKind
from quantkit.diff.token_texts import TokenFigures, TokenTexts, read_texts
from quantkit.errors import ArtifactError, CheckpointError, HubUnreachable, UsageError
from quantkit.figures import list_figures
from quantkit.io.files import read_json
from quantkit.io.package_data import BUILTIN_PREFIX
from quantkit.report.samples import Answer, has_column, parse_answer, read_columns

if TYPE_CHECKING:
    from quantkit.contracts import TensorSpec

HASHES = ("doc_hash", "prompt_hash", "target_hash")
_ITEM = {"doc_id": "int64"} | dict.fromkeys(
    ("task", "filter", *HASHES, "prompt", "target"), "string"
)
_ANSWER = {
    "response": "string",
    "score": "double",
    "outcome": "string",
    "n_tokens": "int64",
    "truncated": "bool",
}
_TOKEN = {
    "domain": "string",
    "kl": "double",
    "nll_source": "double",
    "nll_artifact": "double",
    "same_top": "bool",
}
_PLACE = {"sequence": "int32", "position": "int32", "token": "int32"}
_SOLUTION = {
    "task": "string",
    "doc_id": "int64",
    "n_tokens": "int64",
    "source": "double",
    "artifact": "double",
}

Tensors = Mapping[str, tuple[str, tuple[int, ...]]]  # name -> dtype, shape
ItemKey = tuple[str, str, int]  # task, filter, item


@dataclass(frozen=True, kw_only=True)
class PairedItem:
    """A benchmark item with a side's answer; `source` is the answer of its source."""

    hashes: tuple[str, str, str]
    prompt: str
    target: str
    answer: Answer | None  # None if it could not be scored
    source: Answer | None


@dataclass(frozen=True, kw_only=True)
class SolutionScore:
    """Log-likelihood per token of an item's gold solution in nats; `source` is the source's."""

    n_tokens: int
    source: float
    value: float


@dataclass(frozen=True, kw_only=True)
class Side:
    """One side of a comparison; None for parts that were not recorded."""

    name: str
    kind: SideKind
    fidelity: Fidelity
    recipe: Mapping[str, object] | None = None
    plan: Mapping[str, object] | None = None  # result of each rule, and the totals
    decisions: Mapping[str, str] | None = None  # linear -> "awq int4 g128 asymmetric"
    tensors: Tensors | None = None
    files: Mapping[str, tuple[str, int]] | None = None  # of the artifact: sha256, bytes
    source_files: Mapping[str, str] | None = None  # weight file of the source -> sha256
    versions: Mapping[str, str] | None = None
    items: Mapping[ItemKey, PairedItem] | None = None
    tokens: TokenFigures | None = None
    texts: TokenTexts | None = None
    solutions: Mapping[tuple[str, int], SolutionScore] | None = None  # by task and item
    load: LoadTest | None = None
    load_fault: str = ""  # why the load test cannot be read


def read_sides(a: str, b: str) -> tuple[Side, Side]:
    """Read both sides: artifacts, fidelity.json files, or the source of the other side.

    Raises QuantkitError for other paths.
    """
    first, second = _read_side(a), _read_side(b)
    if first is None and second is None:
        raise UsageError(
            f"{a}, {b}: expected an artifact or a fidelity.json among the two, found none; "
            "check the paths"
        )
    if first is None:
        assert second is not None
        return _make_source_side(a, second), second
    return first, second if second is not None else _make_source_side(b, first)


def _read_side(text: str) -> Side | None:
    """Read an artifact or a report; None for a path that can only be a source."""
    path = Path(text)
    if (path / MANIFEST).is_file() or (path / EVIDENCE_FOLDER).is_dir():
        return _read_artifact(path)
    if (
        path.parts[-2:] == PurePosixPath(FIDELITY).parts
        and (path.parent.parent / MANIFEST).is_file()
    ):
        return _read_artifact(path.parent.parent)  # with all files of the report
    if path.is_file():
        report = read_report_file(path)
        return Side(
            name=report.artifact.name, kind="report", fidelity=report, versions=report.versions
        )
    if (path / CONFIG).is_file() or not path.exists():
        return None
    raise ArtifactError(
        f"{path}: expected an artifact, a fidelity.json or a source model, found another folder; "
        "check the path"
    )


def _read_artifact(path: Path) -> Side:
    fidelity, manifest = read_sealed_report(path)
    plan = read_json(path / PLAN, ArtifactError)
    decisions = get_section(plan, "decisions", path)
    load, fault = _read_loadtest(path / LOADTEST)
    files = {
        name: entry
        for name, entry in get_section(manifest, "files", path).items()
        if isinstance(entry, Mapping)
    }
    return Side(
        name=path.absolute().name,
        kind="artifact",
        fidelity=fidelity,
        recipe=get_section(plan, "recipe", path),
        plan=_summarize_plan(get_section(plan, "summary", path), plan.get("dropped")),
        decisions={
            name: str(row[0]) for name, row in decisions.items() if isinstance(row, list) and row
        },
        tensors={
            name: _parse_spec(row, path)
            for name, row in get_section(manifest, "tensors", path).items()
        },
        files={
            name: (str(entry.get("sha256")), _parse_count(entry.get("bytes"), name, path))
            for name, entry in files.items()
        },
        source_files={
            k: str(v)
            for k, v in get_section(get_section(manifest, "source", path), "files", path).items()
        },
        versions={
            key: str(value)
            for part in ("versions", "environment")
            for key, value in get_section(manifest, part, path).items()
        },
        items=_read_items(path / BENCHMARK_SAMPLES)
        if (path / BENCHMARK_SAMPLES).is_file()
        else None,
        tokens=read_tokens(path / TOKEN_SAMPLES) if (path / TOKEN_SAMPLES).is_file() else None,
        texts=read_texts(path, read_typed_columns),
        solutions=_read_solutions(path / SOLUTION_SAMPLES)
        if (path / SOLUTION_SAMPLES).is_file()
        else None,
        load=load,
        load_fault=fault,
    )


def _read_loadtest(path: Path) -> tuple[LoadTest | None, str]:
    """Read the load test of an artifact, or return why it cannot be read.

    The manifest does not cover load tests, so a damaged one does not stop the comparison.
    """
    try:
        return (read_load_test(path), "") if path.is_file() else (None, "")
    except ArtifactError as fault:
        return None, str(fault)


def _summarize_plan(summary: Mapping[str, object], dropped: object) -> dict[str, object]:
    """Return the results of a plan; of the output files only their number."""
    shards = summary.get("shards")
    kept = {key: summary.get(key) for key in ("rules", "totals", "warnings")}
    return {**kept, "files": len(shards) if isinstance(shards, list) else None, "dropped": dropped}


def _parse_spec(row: object, path: Path) -> tuple[str, tuple[int, ...]]:
    if isinstance(row, list) and len(row) == 2 and isinstance(row[1], list):
        return str(row[0]), tuple(_parse_count(n, "tensors", path) for n in row[1])
    raise ArtifactError(
        f"{path / MANIFEST}: tensors: expected [dtype, shape], found {row!r:.60}; pull it again"
    )


def _parse_count(value: object, what: str, path: Path) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ArtifactError(
        f"{path / MANIFEST}: {what}: expected whole numbers, found {value!r:.60}; pull it again"
    )


def read_typed_columns(path: Path, types: Mapping[str, str]) -> Any:
    """Read columns, checking their Arrow types; only scores may be null. Raises ArtifactError."""
    table = read_columns(path, list(types))
    for name, expected in types.items():
        actual = str(table.schema.field(name).type)
        if actual != expected:
            raise ArtifactError(
                f"{path}: {name}: expected {expected}, found {actual}; pull or build the "
                f"artifact again"
            )
        if table[name].null_count and not name.endswith("_score"):
            raise ArtifactError(
                f"{path}: {name}: expected no null value, found some; pull or build the "
                f"artifact again"
            )
    return table


def _read_items(path: Path) -> dict[ItemKey, PairedItem]:
    rows = read_typed_columns(
        path,
        _ITEM
        | {f"{side}_{name}": kind for side in ("base", "quant") for name, kind in _ANSWER.items()},
    )
    rows = rows.to_pylist()
    return {
        (row["task"], row["filter"], row["doc_id"]): PairedItem(
            hashes=(row["doc_hash"], row["prompt_hash"], row["target_hash"]),
            prompt=row["prompt"],
            target=row["target"],
            answer=_parse_scored_answer(row, "quant"),
            source=_parse_scored_answer(row, "base"),
        )
        for row in rows
    }


def _parse_scored_answer(row: Mapping[str, Any], side: str) -> Answer | None:
    return None if row[f"{side}_score"] is None else parse_answer(row, side)


def read_tokens(path: Path) -> TokenFigures:
    """Read the values of every scored token."""
    types = _TOKEN | ({"document": "int64"} if has_column(path, "document") else {})
    has_places = has_column(path, "sequence")
    table = read_typed_columns(path, types | (_PLACE if has_places else {})).to_pydict()
    places = list(zip(table["sequence"], table["position"])) if has_places else None
    return TokenFigures(
        domains=table["domain"],
        kl=table["kl"],
        nll_source=table["nll_source"],
        nll=table["nll_artifact"],
        same_top=table["same_top"],
        documents=table.get("document"),
        ids=table.get("token"),
        places=places,
    )


def _read_solutions(path: Path) -> dict[tuple[str, int], SolutionScore]:
    return {
        (row["task"], row["doc_id"]): SolutionScore(
            n_tokens=row["n_tokens"], source=row["source"], value=row["artifact"]
        )
        for row in read_typed_columns(path, _SOLUTION).to_pylist()
    }


# --------------------------------------------------------------------------------------- the source


def _make_source_side(text: str, artifact: Side) -> Side:
    """Return the source of an artifact as a side; raises UsageError if `text` is another model."""
    source = artifact.fidelity.source
    tensors: Tensors | None = None
    if Path(text).is_dir() or text.startswith(BUILTIN_PREFIX):
        tensors = _read_local_source(text, artifact)
    elif text != source.model:
        raise UsageError(
            f"{text}: expected an artifact, a fidelity.json or {artifact.name}'s source "
            f"{source.model}, found none; check the path"
        )
    else:
        from quantkit.checkpoint import hub

        try:
            tensors = _convert_specs(
                hub.read_model_headers(source.model, source.revision).stored_specs
            )
        except HubUnreachable:
            tensors = None  # the artifact has everything else
    tokens, solutions = artifact.tokens, artifact.solutions
    return Side(
        name=source.model,
        kind="source",
        fidelity=_make_source_report(artifact.fidelity),
        tensors=tensors,
        source_files=artifact.source_files,
        items={key: replace(item, answer=item.source) for key, item in artifact.items.items()}
        if artifact.items
        else None,
        tokens=replace(
            tokens,
            kl=[0.0] * len(tokens.kl),
            nll=tokens.nll_source,
            same_top=[True] * len(tokens.kl),
            side="source",
        )
        if tokens
        else None,
        texts=artifact.texts,
        solutions={key: replace(row, value=row.source) for key, row in solutions.items()}
        if solutions
        else None,
    )


def _read_local_source(text: str, artifact: Side) -> Tensors:
    """Read the tensors of a local source; raises UsageError if the artifact has another source."""
    from quantkit.checkpoint.checkpoint import Checkpoint  # torch
    from quantkit.io.package_data import locate_model

    source = artifact.fidelity.source
    try:
        folder = locate_model(text) if text.startswith(BUILTIN_PREFIX) else Path(text)
    except CheckpointError as fault:
        raise UsageError(str(fault)) from None
    opened = Checkpoint.open(folder)
    if opened.compute_fingerprint() != source.hash:
        raise UsageError(
            f"{text}: expected {artifact.name}'s source {source.model} ({source.hash[:12]}), found "
            f"another model ({opened.compute_fingerprint()[:12]}); only its own source can be "
            "compared with an artifact"
        )
    return _convert_specs(opened.stored_specs)


def _convert_specs(specs: Mapping[str, TensorSpec]) -> Tensors:
    return {name: (spec.dtype, spec.shape) for name, spec in specs.items()}


def _make_source_report(fidelity: Fidelity) -> Fidelity:
    """Return the report of the source compared with itself: nothing quantized, no error."""
    source = fidelity.source
    artifact = fidelity.artifact.model_copy(
        update={
            "name": source.model,
            "format": "as published",
            "scheme": f"stored as {source.dtype}",
            "bytes_artifact": fidelity.artifact.bytes_source,
        }
    )
    distribution = [_make_source_distribution(row) for row in fidelity.distribution]
    return fidelity.model_copy(
        update={
            "artifact": artifact,
            "distribution": tuple(distribution),
            "blocks": tuple(
                row.model_copy(update={"relative_error": 0.0}) for row in fidelity.blocks
            ),
            "modules": (),
            "routers": tuple(row.model_copy(update={"agreement": 1.0}) for row in fidelity.routers),
            "fallbacks": (),
            "gates": (),
            "benchmarks": tuple(_make_source_benchmark(row) for row in fidelity.benchmarks),
            "likelihood": tuple(
                row.model_copy(update={"artifact": row.source}) for row in fidelity.likelihood
            ),
            "status": "not judged",
        }
    )


def _make_source_distribution(row: DistributionResult) -> DistributionResult:
    """Return the figures of the source against itself, those that the artifact has."""
    figures = dict(row.figures)
    for definition in list_figures():
        key, value = definition.key, definition.at_source
        if isinstance(value, str):
            figures[key] = row.figures[value]
        elif value is not None and figures.get(key) is not None:
            figures[key] = Figure(value=value)
    return DistributionResult.model_validate({
        "domain": row.domain,
        "tokens": row.tokens,
        **figures,
    })


def _make_source_benchmark(row: BenchmarkResult) -> BenchmarkResult:
    rates = {
        name: rate and (rate[0], rate[0])
        for name in ("truncated", "unparsed")
        for rate in [getattr(row, name)]
    }
    nothing = {"delta_pp": None, "recovery": None, "lost": 0, "gained": 0}
    return row.model_copy(update={"artifact": row.source, **nothing, **rates})
