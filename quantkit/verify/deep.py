"""A seeded sample of an artifact, proven against its source, and what may be said of it afterwards."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.checkpoint.scan import scan_file
from quantkit.errors import ArtifactError
from quantkit.verify.prove_tensors import Kind, Proof, prove_kept, prove_linear
from quantkit.verify.source_pair import Sides, open_sides

MAX_SHOWN = 20

PROOF_MEANINGS: dict[Kind, str] = {
    "requantized": "quantized again from the source: every code, scale and zero point the same, bit for bit",
    "reproduced": "recorded weight error reproduced from source and codes (how calibration chose them is not proven)",
    "scaled": "the source's by an unrecorded factor per channel: error no more than recorded, pairs cancel to rounding",
    "equal": "the source's values, bit for bit",
    "power_of_two": "the source's values by powers of two, bit for bit",
    "factor": "the source's values by one unrecorded factor per row, to rounding",
    "unproven": "not proven",
}
"""What each kind of proof is worth, in words."""

WRITTEN_KEYS = ("quantization_config", "num_nextn_predict_layers")
"""What a build writes into config.json."""
ABSENT = object()

NEVER_PROVEN = (
    "output errors and figures of the report: their statistics and texts are not in the artifact"
)


@dataclass(frozen=True, kw_only=True)
class DeepReport:
    """What a sample showed. modules and tensors: (looked at, in all); files: of the source whose bytes were hashed.

    carried: files that the artifact took over as they are, all of them compared, as config.json is.
    """

    source: str
    seed: int
    modules: tuple[int, int]
    tensors: tuple[int, int]
    files: tuple[int, int]
    carried: int
    proofs: tuple[Proof, ...]

    def counts(self, kinds: Sequence[Kind]) -> dict[Kind, int]:
        """How many of each kind."""
        found = {kind: sum(proof.kind == kind for proof in self.proofs) for kind in kinds}
        return {kind: count for kind, count in found.items() if count}


def verify_deep(
    path: Path, source: str | None, sample: int | None, seed: int, tell: Callable[[str], None]
) -> DeepReport:
    """Prove `sample` modules and as many kept tensors, all without a number; `tell` is given each name beforehand.

    Raises ArtifactError naming everything that contradicts the source, and for a source that changed.
    """
    sides = open_sides(path, source)
    told = get_section(get_section(read_manifest(path), "source", path), "files", path)
    random = Random(seed)
    modules = draw_sample(random, sorted(sides.schemes), sample)
    tensors = draw_sample(random, sorted(sides.kept), sample)
    files = sides.check_files(iterate_read_tensors(sides, modules, tensors), told)
    proofs = []
    for name, prove in [(name, prove_linear) for name in modules] + [
        (name, prove_kept) for name in tensors
    ]:
        tell(name)
        proofs.append(prove(sides, name))
    faults = [
        *find_carried_faults(sides),
        *find_tensor_name_faults(sides),
        *(f"{proof.name}: {proof.fault}" for proof in proofs if proof.fault),
    ]
    if faults:
        more = f"\n... and {len(faults) - MAX_SHOWN} more" if len(faults) > MAX_SHOWN else ""
        raise ArtifactError(
            f"{path}: not made of {sides.named}:\n" + "\n".join(faults[:MAX_SHOWN]) + more
        )
    return DeepReport(
        source=sides.named,
        seed=seed,
        modules=(len(modules), len(sides.schemes)),
        tensors=(len(tensors), len(sides.kept)),
        files=(files, len(told)),
        carried=len(sides.source.sidecars),
        proofs=tuple(proofs),
    )


def find_carried_faults(sides: Sides) -> Iterator[str]:
    """Where config.json is not the source's, quantization and MTP blocks left aside, and files that are not its own."""
    before, after = (
        {key: value for key, value in side.config.values.items() if key not in WRITTEN_KEYS}
        for side in (sides.source, sides.stored)
    )
    for key in dict.fromkeys([*before, *after]):
        if before.get(key, ABSENT) != after.get(key, ABSENT):
            found = "nothing" if key not in after else repr(after[key])[:60]
            yield f"config.json: {key}: expected the source's, found {found}"
    for file in sides.source.sidecars:
        there = sides.path / file.name
        if not there.is_file() or scan_file(there) != scan_file(file.resolve()):
            yield f"{file.name}: expected the source's file, found {'another' if there.is_file() else 'none'}"


def find_tensor_name_faults(sides: Sides) -> Iterator[str]:
    """Tensors of the model that the artifact lacks, and such as the source lacks; MTP blocks may be left out."""
    predicts = sides.stored.config.integer("num_nextn_predict_layers", 0) > 0
    blocks = [block for block in sides.layout.blocks if block.kind == "decoder" or predicts]
    wanted = {
        *(
            f"{x.name}.{kind}"
            for block in blocks
            for x in block.linears
            for kind in ("weight", "bias")
        ),
        *(spec.name for block in blocks for spec in block.others),
        *(spec.name for spec in sides.layout.final_tensors),
        *(f"{x.name}.weight" for x in (sides.layout.embedding, sides.layout.head) if x),
    }
    held = {*sides.stored.specs, *(f"{module}.weight" for module in sides.schemes)}
    for name in sides.source.specs:
        if name in wanted and name not in held:
            yield f"{name}: expected as in the source, found none"
    for name in sides.kept:
        if name not in sides.source.specs:
            yield f"{name}: expected none, as in the source, found one"


def draw_sample(random: Random, names: Sequence[str], count: int | None) -> list[str]:
    """So many of the names, in order; all without a count."""
    return (
        list(names)
        if count is None or count >= len(names)
        else sorted(random.sample(list(names), count))
    )


def iterate_read_tensors(
    sides: Sides, modules: Sequence[str], tensors: Sequence[str]
) -> Iterator[str]:
    """The source's stored tensors that a sample reads, the norms and matrices before each linear among them."""
    names = [f"{module}.weight" for module in modules] + list(tensors)
    for module in [name.rpartition(".")[0] for name in names]:
        fed = sides.input_of(module)
        if fed is not None and fed.absorber is not None:
            names.append(f"{fed.absorber.module}.weight")
        names += [
            f"{reader}.weight" for later in sides.readers_of(module) for reader in later.readers
        ]
    for name in names:
        yield name
        yield name + sides.source.scale_suffix


def iterate_report_lines(deep: DeepReport) -> Iterator[str]:
    """What was proven, for people."""
    yield (
        f"source {deep.source}: names, headers, config and tokenizer unchanged, {deep.files[0]} of {deep.files[1]} "
        "weight files hashed"
    )
    yield f"config.json but for quantization, and {deep.carried} files beside it: the source's"
    parts: tuple[tuple[str, tuple[int, int], Sequence[Kind]], ...] = (
        ("quantized linears", deep.modules, ("requantized", "reproduced", "scaled")),
        ("kept tensors", deep.tensors, ("equal", "power_of_two", "factor")),
    )
    for what, (looked, total), kinds in parts:
        yield f"{looked} of {total} {what}" + (
            f", drawn with seed {deep.seed}" if looked < total else ""
        )
        for kind, count in deep.counts(kinds).items():
            yield f"  {count:5} {PROOF_MEANINGS[kind]}"
    for reason in dict.fromkeys(proof.reason for proof in deep.proofs if proof.reason):
        names = [proof.name for proof in deep.proofs if proof.reason == reason]
        yield f"  {len(names):5} not proven: {reason} ({names[0]}{' and others' if len(names) > 1 else ''})"
    yield f"not proven: {NEVER_PROVEN}"
