"""The two sides of a comparison, read: an artifact with its evidence, a fidelity.json alone, or an artifact's source.

A source is what its artifact measured of it: the answers and tokens of the samples, and no error at all. So all that
compares two artifacts compares an artifact with its source too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from quantkit.errors import ArtifactError, CheckpointError, HubUnreachable, UsageError
from quantkit.figures import list_figures
from quantkit.io.files import read_json
from quantkit.io.package_data import BUILTIN_PREFIX
from quantkit.report.samples import Answer, parse_answer, read_columns

if TYPE_CHECKING:
    from quantkit.contracts import TensorSpec

HASHES = ("doc_hash", "prompt_hash", "target_hash")
_ITEM = {"doc_id": "int64"} | dict.fromkeys(
    ("task", "filter", *HASHES, "prompt", "target"), "string"
)
_ANSWER = {
    "response": "string", "score": "double", "outcome": "string", "n_tokens": "int64", "truncated": "bool",
}  # fmt: skip
_TOKEN = {
    "domain": "string",
    "kl": "double",
    "nll_source": "double",
    "nll_artifact": "double",
    "same_top": "bool",
}
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
class ItemResult:
    """A benchmark item and what one side answered; `source` is the baseline's answer to it."""

    hashes: tuple[str, str, str]
    prompt: str
    target: str
    answer: Answer | None  # None: it could not be scored
    source: Answer | None


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Figures of every scored token, in the order of the text."""

    domains: Sequence[str]
    kl: Sequence[float]
    nll_source: Sequence[float]
    nll: Sequence[float]
    same_top: Sequence[bool]


@dataclass(frozen=True, kw_only=True)
class SolutionScore:
    """Log-likelihood per token of an item's gold solution, nats; `source`: under the baseline."""

    n_tokens: int
    source: float
    value: float


@dataclass(frozen=True, kw_only=True)
class Side:
    """What is known of one side; None where nobody wrote it down."""

    name: str
    kind: SideKind
    fidelity: Fidelity
    recipe: Mapping[str, object] | None = None
    plan: Mapping[str, object] | None = None  # what its rules came to, and the totals
    decisions: Mapping[str, str] | None = None  # linear -> "awq int4 g128 asymmetric"
    tensors: Tensors | None = None
    files: Mapping[str, tuple[str, int]] | None = None  # of the artifact: sha256, bytes
    source_files: Mapping[str, str] | None = None  # weight file of the source -> sha256
    versions: Mapping[str, str] | None = None
    items: Mapping[ItemKey, ItemResult] | None = None
    tokens: TokenFigures | None = None
    solutions: Mapping[tuple[str, int], SolutionScore] | None = None  # by task and item
    load: LoadTest | None = None
    load_fault: str = ""  # why the load test that lies there cannot be read


def read_sides(a: str, b: str) -> tuple[Side, Side]:
    """Both sides; raises QuantkitError for what is neither artifact, fidelity.json nor the other's source."""
    first, second = _read(a), _read(b)
    if first is None and second is None:
        raise UsageError(
            f"{a}, {b}: expected an artifact or a fidelity.json among the two, found none; check the paths"
        )
    if first is None:
        assert second is not None
        return _source(a, second), second
    return first, second if second is not None else _source(b, first)


def _read(text: str) -> Side | None:
    """An artifact or a report; None for what can only be a source."""
    path = Path(text)
    if (path / MANIFEST).is_file() or (path / EVIDENCE_FOLDER).is_dir():
        return _artifact(path)
    if (
        path.parts[-2:] == PurePosixPath(FIDELITY).parts
        and (path.parent.parent / MANIFEST).is_file()
    ):
        return _artifact(path.parent.parent)  # all its evidence lies there
    if path.is_file():
        found = read_report_file(path)
        return Side(
            name=found.artifact.name, kind="report", fidelity=found, versions=found.versions
        )
    if (path / CONFIG).is_file() or not path.exists():
        return None
    raise ArtifactError(
        f"{path}: expected an artifact, a fidelity.json or a source model, found a folder of none of them"
    )


def _artifact(path: Path) -> Side:
    fidelity, manifest = read_sealed_report(path)
    plan = read_json(path / PLAN, ArtifactError)
    decisions = get_section(plan, "decisions", path)
    load, fault = _load(path / LOADTEST)
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
        plan=_totals(get_section(plan, "summary", path), plan.get("dropped")),
        decisions={
            name: str(row[0]) for name, row in decisions.items() if isinstance(row, list) and row
        },
        tensors={
            name: _spec(row, path) for name, row in get_section(manifest, "tensors", path).items()
        },
        files={
            name: (str(entry.get("sha256")), _whole(entry.get("bytes"), name, path))
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
        items=_items(path / BENCHMARK_SAMPLES) if (path / BENCHMARK_SAMPLES).is_file() else None,
        tokens=_tokens(path / TOKEN_SAMPLES) if (path / TOKEN_SAMPLES).is_file() else None,
        solutions=_solutions(path / SOLUTION_SAMPLES)
        if (path / SOLUTION_SAMPLES).is_file()
        else None,
        load=load,
        load_fault=fault,
    )


def _load(path: Path) -> tuple[LoadTest | None, str]:
    """The load test of an artifact, or why it cannot be read: unsealed, it is no reason to show nothing else."""
    try:
        return (read_load_test(path), "") if path.is_file() else (None, "")
    except ArtifactError as fault:
        return None, str(fault)


def _totals(summary: Mapping[str, object], dropped: object) -> dict[str, object]:
    """The parts of a plan that say what comes out: of the output files only how many there are."""
    shards = summary.get("shards")
    kept = {key: summary.get(key) for key in ("rules", "totals", "warnings")}
    return {**kept, "files": len(shards) if isinstance(shards, list) else None, "dropped": dropped}


def _spec(row: object, path: Path) -> tuple[str, tuple[int, ...]]:
    if isinstance(row, list) and len(row) == 2 and isinstance(row[1], list):
        return str(row[0]), tuple(_whole(n, "tensors", path) for n in row[1])
    raise ArtifactError(
        f"{path / MANIFEST}: tensors: expected [dtype, shape], found {row!r:.60}; pull it again"
    )


def _whole(value: object, what: str, path: Path) -> int:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise ArtifactError(
        f"{path / MANIFEST}: {what}: expected whole numbers, found {value!r:.60}; pull it again"
    )


def _typed(path: Path, types: Mapping[str, str]) -> Any:
    """Columns of these Arrow types, complete but for scores; ArtifactError otherwise."""
    table = read_columns(path, list(types))
    for name, expected in types.items():
        found = str(table.schema.field(name).type)
        if found != expected:
            raise ArtifactError(
                f"{path}: {name}: expected {expected}, found {found}; pull or build the artifact again"
            )
        if table[name].null_count and not name.endswith("_score"):
            raise ArtifactError(
                f"{path}: {name}: expected no empty cell, found some; pull or build the artifact again"
            )
    return table


def _items(path: Path) -> dict[ItemKey, ItemResult]:
    rows = _typed(
        path,
        _ITEM
        | {f"{who}_{name}": kind for who in ("base", "quant") for name, kind in _ANSWER.items()},
    )
    rows = rows.to_pylist()
    return {
        (row["task"], row["filter"], row["doc_id"]): ItemResult(
            hashes=(row["doc_hash"], row["prompt_hash"], row["target_hash"]),
            prompt=row["prompt"],
            target=row["target"],
            answer=_answer(row, "quant"),
            source=_answer(row, "base"),
        )
        for row in rows
    }


def _answer(row: Mapping[str, Any], who: str) -> Answer | None:
    return None if row[f"{who}_score"] is None else parse_answer(row, who)


def _tokens(path: Path) -> TokenFigures:
    table = _typed(path, _TOKEN).to_pydict()
    return TokenFigures(
        domains=table["domain"],
        kl=table["kl"],
        nll_source=table["nll_source"],
        nll=table["nll_artifact"],
        same_top=table["same_top"],
    )


def _solutions(path: Path) -> dict[tuple[str, int], SolutionScore]:
    return {
        (row["task"], row["doc_id"]): SolutionScore(
            n_tokens=row["n_tokens"], source=row["source"], value=row["artifact"]
        )
        for row in _typed(path, _SOLUTION).to_pylist()
    }


# --------------------------------------------------------------------------------------------------------- the source


def _source(text: str, artifact: Side) -> Side:
    """The source of an artifact; UsageError when `text` is another model."""
    told = artifact.fidelity.source
    tensors: Tensors | None = None
    if Path(text).is_dir() or text.startswith(BUILTIN_PREFIX):
        tensors = _local_source(text, artifact)
    elif text != told.model:
        raise UsageError(
            f"{text}: expected an artifact, a fidelity.json or {artifact.name}'s source {told.model}, found none; "
            "check the path"
        )
    else:
        from quantkit.checkpoint import hub

        try:
            tensors = _specs(hub.read_model_headers(told.model, told.revision).stored_specs)
        except HubUnreachable:
            tensors = None  # all else is in the artifact
    tokens, solutions = artifact.tokens, artifact.solutions
    return Side(
        name=told.model,
        kind="source",
        fidelity=_unquantized(artifact.fidelity),
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
        )
        if tokens
        else None,
        solutions={key: replace(row, value=row.source) for key, row in solutions.items()}
        if solutions
        else None,
    )


def _local_source(text: str, artifact: Side) -> Tensors:
    """Tensors of a source whose files are here, if they are those that the artifact was made from."""
    from quantkit.checkpoint.checkpoint import Checkpoint  # torch
    from quantkit.io.package_data import locate_model

    told = artifact.fidelity.source
    try:
        folder = locate_model(text) if text.startswith(BUILTIN_PREFIX) else Path(text)
    except CheckpointError as fault:
        raise UsageError(str(fault)) from None
    opened = Checkpoint.open(folder)
    if opened.fingerprint() != told.hash:
        raise UsageError(
            f"{text}: expected {artifact.name}'s source {told.model} ({told.hash[:12]}), found another model "
            f"({opened.fingerprint()[:12]}); only its own source can be compared with an artifact"
        )
    return _specs(opened.stored_specs)


def _specs(specs: Mapping[str, TensorSpec]) -> Tensors:
    return {name: (spec.dtype, spec.shape) for name, spec in specs.items()}


def _unquantized(fidelity: Fidelity) -> Fidelity:
    """The report of an artifact that would be its source: nothing quantized, nothing lost."""
    source = fidelity.source
    artifact = fidelity.artifact.model_copy(
        update={
            "name": source.model,
            "format": "as published",
            "scheme": f"stored as {source.dtype}",
            "bytes_artifact": fidelity.artifact.bytes_source,
        }
    )
    distribution = [_unquantized_distribution(row) for row in fidelity.distribution]
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
            "benchmarks": tuple(_own(row) for row in fidelity.benchmarks),
            "likelihood": tuple(
                row.model_copy(update={"artifact": row.source}) for row in fidelity.likelihood
            ),
            "status": "not judged",
        }
    )


def _unquantized_distribution(row: DistributionResult) -> DistributionResult:
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


def _own(row: BenchmarkResult) -> BenchmarkResult:
    rates = {
        name: rate and (rate[0], rate[0])
        for name in ("truncated", "unparsed")
        for rate in [getattr(row, name)]
    }
    nothing = {"delta_pp": None, "recovery": None, "lost": 0, "gained": 0}
    return row.model_copy(update={"artifact": row.source, **nothing, **rates})
