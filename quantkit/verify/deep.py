"""`quantkit verify --deep`: a seeded sample of an artifact, proven against its source."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from quantkit.artifact.account_tensors import (
    SourceAccount,
    account_tensors,
    list_block_tensors,
    list_held_names,
)
from quantkit.artifact.engine_reasons import read_served_engines
from quantkit.artifact.read_manifest import get_format_name, get_section, read_manifest
from quantkit.checkpoint.encoding import remove_quantization
from quantkit.checkpoint.scan import scan_file
from quantkit.errors import ArtifactError
from quantkit.plan.check_values import find_value_faults
from quantkit.verify.engines.check_loading import check_engines
from quantkit.verify.engines.compare import EngineCheck
from quantkit.verify.prove_tensors import Proof, ProofKind, prove_kept, prove_linear
from quantkit.verify.source_pair import SourcePair, open_pair

MAX_SHOWN = 20

PROOF_MEANINGS: dict[ProofKind, str] = {
    "requantized": "quantized again from the source: every code, scale and zero point the same, "
    "bit for bit",
    "reproduced": "recorded weight error reproduced from source and codes (how calibration chose "
    "them is not proven)",
    "scaled": "the source's by an unrecorded factor per channel: error no more than recorded, "
    "pairs cancel to rounding",
    "copied": "the source's codes and scales, bit for bit",
    "equal": "the source's values, bit for bit",
    "power_of_two": "the source's values by powers of two, bit for bit",
    "factor": "the source's values by one unrecorded factor per row, to rounding",
    "unproven": "not proven",
}
"""The meaning of each kind of proof, for people."""

MTP_LAYERS = "num_nextn_predict_layers"
"""The key of config.json that a build sets to 0 if it leaves the MTP blocks out.

It also writes quantization_config, which the shallow checks compare with the tensors.
"""
ABSENT = object()

NEVER_PROVEN = (
    "output errors and figures of the report: their statistics and texts are not in the artifact"
)


@dataclass(frozen=True, kw_only=True)
class DeepReport:
    """Result of a sample.

    modules, tensors: (checked, in all); files: source files that were hashed, and in all; carried:
    files that the artifact took over unchanged, all of them compared, as config.json is.
    """

    source: str
    seed: int
    modules: tuple[int, int]
    tensors: tuple[int, int]
    files: tuple[int, int]
    carried: int
    account: SourceAccount
    engines: tuple[EngineCheck, ...]
    proofs: tuple[Proof, ...]

    def counts(self, kinds: Sequence[ProofKind]) -> dict[ProofKind, int]:
        """Count the proofs of each kind."""
        totals = {kind: sum(proof.kind == kind for proof in self.proofs) for kind in kinds}
        return {kind: count for kind, count in totals.items() if count}


def verify_deep(
    path: Path, source: str | None, sample: int | None, seed: int, on_tensor: Callable[[str], None]
) -> DeepReport:
    """Prove `sample` modules and as many kept tensors; all of them if sample is None.

    on_tensor: called with each name beforehand. Raises ArtifactError with all contradictions, and
    for a source that changed.
    """
    pair = open_pair(path, source)
    source_hashes = get_section(get_section(read_manifest(path), "source", path), "files", path)
    random = Random(seed)
    modules = draw_sample(random, sorted(pair.schemes), sample)
    tensors = draw_sample(random, sorted(pair.kept), sample)
    files = pair.hash_source_files(iterate_read_tensors(pair, modules, tensors), source_hashes)
    proofs = []
    for name, prove in [(name, prove_linear) for name in modules] + [
        (name, prove_kept) for name in tensors
    ]:
        on_tensor(name)
        proofs.append(prove(pair, name))
    manifest = read_manifest(path)
    engines = check_engines(
        path,
        get_format_name(manifest),
        pair.modules,
        manifest.get("parts") or (),  # type: ignore[arg-type]  # the shallow checks read it
        read_served_engines(path),
    )
    faults = [
        *find_carried_faults(pair),
        *(f"{check.engine}: {fault}" for check in engines for fault in check.faults),
        *find_tensor_name_faults(pair),
        *(f"{proof.name}: {proof.fault}" for proof in proofs if proof.fault),
    ]
    if faults:
        more = f"\n... and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
        raise ArtifactError(
            f"{path}: not made of {pair.source_name}:\n" + "\n".join(faults[:MAX_SHOWN]) + more
        )
    return DeepReport(
        source=pair.source_name,
        seed=seed,
        modules=(len(modules), len(pair.schemes)),
        tensors=(len(tensors), len(pair.kept)),
        files=(files, len(source_hashes)),
        carried=len(pair.source.sidecars),
        account=account_source(pair),
        engines=engines,
        proofs=tuple(proofs),
    )


def find_carried_faults(pair: SourcePair) -> Iterator[str]:
    """Yield differences of config.json (but for quantization and MTP) and of the carried files.

    Both directions: a chat template, tokenizer file or setting that only the artifact has changes
    the answers of the model as much as a changed one.
    """
    source_values, stored_values = (
        remove_quantization(side.config.values) for side in (pair.source, pair.stored)
    )
    for key in dict.fromkeys([*source_values, *stored_values]):
        expected, actual = source_values.get(key, ABSENT), stored_values.get(key, ABSENT)
        is_left_out = key == MTP_LAYERS and type(actual) is int and actual == 0
        if not is_left_out and not is_same(expected, actual):
            yield f"config.json: {key}: expected the source's, found {describe_value(actual)}"
    sources, carried = (
        {file.relative_to(side.folder).as_posix(): file for file in side.sidecars}
        for side in (pair.source, pair.stored)
    )
    for name in sorted({*sources, *carried}):
        if name not in sources:
            yield f"{name}: expected none, as in the source, found one"
        elif name not in carried:
            yield f"{name}: expected the source's file, found none"
        elif scan_file(carried[name]) != scan_file(sources[name].resolve()):
            yield f"{name}: expected the source's file, found another"


def is_same(one: object, other: object) -> bool:
    """Return whether two values of JSON are the same text: 1, 1.0 and true are three values."""
    if one is ABSENT or other is ABSENT:
        return one is other
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


def describe_value(value: object) -> str:
    """Describe a value of config.json in a sentence."""
    return "nothing" if value is ABSENT else repr(value)[:60]


def account_source(pair: SourcePair) -> SourceAccount:
    """Account for the tensors of the source with the files of the artifact."""
    predicts = pair.stored.config.integer("num_nextn_predict_layers", 0) > 0
    left = (block for block in pair.layout.blocks if block.kind != "decoder" and not predicts)
    return account_tensors(
        pair.source,
        {item.name: item.reason for item in pair.left_out},
        {name for block in left for name in list_block_tensors(block)},
        pair.schemes.keys(),
        list_held_names(pair.stored),
    )


def find_tensor_name_faults(pair: SourcePair) -> Iterator[str]:
    """Yield tensors that only one of artifact and source has; MTP blocks may be left out."""
    yield from find_value_faults(pair.source, [x.check for x in pair.left_out if x.check])
    account = account_source(pair)
    for name in account.missing:
        yield f"{name}: expected as in the source, found none"
    for name in pair.kept:
        if name not in pair.source.specs:
            yield f"{name}: expected none, as in the source, found one"


def draw_sample(random: Random, names: Sequence[str], count: int | None) -> list[str]:
    """Draw `count` of the names, in order; all of them without a count."""
    return (
        list(names)
        if count is None or count >= len(names)
        else sorted(random.sample(list(names), count))
    )


def iterate_read_tensors(
    pair: SourcePair, modules: Sequence[str], tensors: Sequence[str]
) -> Iterator[str]:
    """Yield the source's tensors that a sample reads, including norms and matrices before each
    linear.
    """
    names = [f"{module}.weight" for module in modules] + list(tensors)
    for module in [name.rpartition(".")[0] for name in names]:
        fed = pair.get_input(module)
        if fed is not None and fed.absorber is not None:
            names.append(f"{fed.absorber.module}.weight")
        names += [
            f"{reader}.weight"
            for later in pair.list_absorbed_inputs(module)
            for reader in later.readers
        ]
    for name in names:
        yield from pair.source.list_parts(name)


def iterate_report_lines(deep: DeepReport) -> Iterator[str]:
    """Yield the lines of a report for people."""
    yield (
        f"source {deep.source}: names, headers, config and tokenizer unchanged, {deep.files[0]} of "
        f"{deep.files[1]} weight files hashed"
    )
    yield f"tensors of the source: {deep.account.describe()}"
    yield from (f"{check.engine}: {check.describe_check()}" for check in deep.engines)
    yield f"config.json but for quantization, and {deep.carried} other files: equal to the source's"
    parts: tuple[tuple[str, tuple[int, int], Sequence[ProofKind]], ...] = (
        ("quantized linears", deep.modules, ("requantized", "reproduced", "scaled", "copied")),
        ("kept tensors", deep.tensors, ("equal", "power_of_two", "factor")),
    )
    for description, (n_checked, total), kinds in parts:
        yield f"{n_checked} of {total} {description}" + (
            f", drawn with seed {deep.seed}" if n_checked < total else ""
        )
        for kind, count in deep.counts(kinds).items():
            yield f"  {count:5} {PROOF_MEANINGS[kind]}"
    for reason in dict.fromkeys(proof.reason for proof in deep.proofs if proof.reason):
        names = [proof.name for proof in deep.proofs if proof.reason == reason]
        yield (
            f"  {len(names):5} not proven: {reason} "
            f"({names[0]}{' and others' if len(names) > 1 else ''})"
        )
    yield f"not proven: {NEVER_PROVEN}"
