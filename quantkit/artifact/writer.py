"""An artifact on its way to its name: planned shards, index, config, carried files; the manifest seals it.

Everything is written into `<path>.building`. Sealing writes the index and then the manifest last and renames the
folder, so that a folder under the final name is complete. Figures that depend on the clock or the machine's load go
to `quantkit/timings.json`, the one file that the manifest does not hash: two builds of a recipe have the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from quantkit.artifact.layout import INDEX, MANIFEST, SCHEMA_VERSION, TIMINGS
from quantkit.checkpoint.tensors import ShardWriter, Written
from quantkit.contracts import Contents, TensorSpec
from quantkit.errors import ArtifactError, UsageError
from quantkit.formats.common.engine_names import HEAD
from quantkit.io.files import PART, sha256_file, sync_folder, unwritable, write_atomic, write_json
from quantkit.io.owned_dirs import make_ours, remove_ours
from quantkit.plan.output_tensors import Shard
from quantkit.plan.plan import Plan
from quantkit.recipe.parse import apply_overrides


@dataclass(frozen=True, kw_only=True)
class WrittenState:
    """What of an artifact is on disk for good: tensors by name, and the files that are complete."""

    tensors: tuple[str, ...] = ()
    files: Mapping[str, Written] = field(default_factory=dict)


class ArtifactWriter:
    """The planned shards of one build: takes tensors by name in any order, gives them back as they lie on disk.

    `stored` is what an interrupted build has committed: the other tensors are still to come. Those that come again,
    because they belong to a block that was not finished, have the same bytes and are passed over.
    """

    def __init__(
        self, folder: Path, shards: Sequence[Shard], stored: WrittenState | None = None
    ) -> None:
        self._folder = folder
        self._shards = {shard.file: shard for shard in shards}
        self._file = {spec.name: shard.file for shard in shards for spec in shard.tensors}
        self._specs: dict[str, TensorSpec] = {
            spec.name: spec for shard in shards for spec in shard.tensors
        }
        done = stored or WrittenState()
        self._there = there = frozenset(done.tensors)
        self._done = {shard.file: {spec.name for spec in shard.tensors} & there for shard in shards}
        self._missing = {
            shard.file: {spec.name for spec in shard.tensors} - there for shard in shards
        }
        self._open: dict[str, ShardWriter] = {}
        self._new: list[str] = []  # since the last commit
        self._told = set(done.files)
        self.written: dict[str, Written] = dict(done.files)
        for file, written in self.written.items():
            check_size(folder / file, written)
        for file, names in self._done.items():
            if names and file not in self.written:
                check_begun(folder / file)

    def spec(self, name: str) -> TensorSpec:
        """What the plan says of a tensor."""
        if name not in self._specs:
            raise ArtifactError(f"{name}: not in the plan; a format's pack and its layout disagree")
        return self._specs[name]

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Store tensors in their shards; a shard that is complete is closed, hashed and renamed at once."""
        for name, tensor in tensors.items():
            if name in self._there:
                continue
            file = self._file[self.spec(name).name]
            if file not in self._open:
                self._open[file] = ShardWriter(
                    self._folder / file, self._shards[file].tensors, self._done[file]
                )
            self._open[file].write(name, tensor)
            self._new.append(name)
            self._missing[file].discard(name)
            if not self._missing[file]:
                self.written[file] = self._open.pop(file).finish()

    def commit(self) -> WrittenState:
        """Make all that was written survive a crash; what is new since the last time."""
        for writer in self._open.values():
            writer.flush()
        sync_folder(self._folder)
        files = {file: written for file, written in self.written.items() if file not in self._told}
        found = WrittenState(tensors=tuple(self._new), files=files)
        self._new = []
        self._told |= set(files)
        return found

    def close(self) -> dict[str, Written]:
        """Files by name once every planned tensor was written; ArtifactError naming what is missing."""
        missing = sorted(name for names in self._missing.values() for name in names)
        if missing:
            raise ArtifactError(
                f"{self._folder}: the build ended without {len(missing)} planned tensors, the first {missing[0]}"
            )
        return self.written

    def abandon(self) -> None:
        """Close what is open after a failure; part files stay where they are."""
        for writer in self._open.values():
            writer.close()
        self._open.clear()


def check_size(path: Path, written: Written) -> None:
    """ArtifactError unless a file of an interrupted build is as long as it was."""
    found = path.stat().st_size if path.is_file() else None
    if found != written.n_bytes:
        raise ArtifactError(
            f"{path}: expected the {written.n_bytes} bytes that were written, found "
            f"{'no file' if found is None else f'{found}'}; begin anew with --restart"
        )


def check_begun(path: Path) -> None:
    """ArtifactError unless a file that an interrupted build began is there."""
    part = path.with_name(path.name + PART)
    if not part.is_file() and not path.is_file():
        raise ArtifactError(
            f"{part}: expected the file that was begun, found none: what was done is gone; begin anew with --restart"
        )


def staging(path: Path) -> Path:
    """Where an artifact is made before it has its name."""
    return path.with_name(path.name + ".building")


def replaced(path: Path) -> Path:
    """Where an artifact lies that gives way to a new one, until that has its name."""
    return path.with_name(path.name + ".replaced")


def check_free(path: Path, overwrite: bool) -> None:
    """UsageError when something is at `path` that must not be replaced."""
    if path.exists() and not overwrite:
        raise UsageError(f"{path}: exists already; choose another output.path or pass --overwrite")
    if path.exists() and not (path / MANIFEST).is_file():
        raise UsageError(
            f"{path}: exists and is not an artifact of quantkit; --overwrite replaces artifacts only"
        )


def check_room(path: Path) -> None:
    """UsageError when something is where an artifact goes that is replaced."""
    old = replaced(path)
    if old.exists() or old.is_symlink():
        raise UsageError(
            f"{old}: expected nothing where a replaced artifact goes, found something; move it away"
        )


def prepare(plan: Plan, stored: WrittenState) -> Path:
    """The staging folder of a plan, with nothing in it but the shards that hold what was `stored`."""
    folder, there = staging(Path(plan.path)), set(stored.tensors)
    begun = {
        shard.file for shard in plan.shards if any(spec.name in there for spec in shard.tensors)
    }
    keep = {*begun, *(file + PART for file in begun)}
    try:
        for path in folder.rglob("*"):
            if path.is_file() and path.relative_to(folder).as_posix() not in keep:
                path.unlink()
    except OSError as fault:
        raise unwritable(folder, fault) from fault
    make_ours(folder)
    return folder


def config_values(plan: Plan) -> dict[str, object]:
    """config.json of the artifact: the source's, with the source's quantization replaced by the artifact's own."""
    values = {
        key: value
        for key, value in plan.source.config.values.items()
        if key != "quantization_config"
    }
    kept = [name for name, decision in plan.decisions.items() if decision.action == "keep"]
    fp8 = [name for name in kept if plan.decisions[name].keep == "fp8"]
    kept += [] if plan.layout.head else [HEAD]
    contents = Contents(schemes=plan.schemes, kept=kept, fp8=fp8, fp8_block=plan.kept.side)
    entry = plan.format.quantization_config(contents) if contents.schemes else None
    if entry is not None:
        values["quantization_config"] = entry
    dropped = any(decision.action == "drop" for decision in plan.decisions.values())
    absent = plan.source.config.integer("num_nextn_predict_layers", 0) and not mtp_blocks(plan)
    if dropped or absent:
        values["num_nextn_predict_layers"] = (
            0  # engines look for the MTP tensors when this is not 0
        )
    return values


def mtp_blocks(plan: Plan) -> tuple[str, ...]:
    """Names of the MTP blocks the artifact holds."""
    return tuple(block.name for block in plan.layout.blocks if block.kind == "mtp")


def write_model_files(folder: Path, plan: Plan, sidecars: Sequence[Path], recipe_text: str) -> None:
    """config.json, the index (for more than one shard), what the source carries along, recipe.yaml.

    `recipe_text` is the recipe's file; what was set beside it is written in, so that it makes the artifact again.
    """
    for path in sidecars:
        write_atomic(folder / path.name, path.read_bytes())
    write_json(folder / "config.json", config_values(plan))
    write_atomic(folder / "recipe.yaml", apply_overrides(recipe_text, plan.recipe).encode())
    if len(plan.shards) > 1:
        weight_map = {spec.name: shard.file for shard in plan.shards for spec in shard.tensors}
        write_json(
            folder / INDEX, {"metadata": {"total_size": plan.n_bytes}, "weight_map": weight_map}
        )


def hashes(folder: Path, known: Mapping[str, Written]) -> dict[str, dict[str, object]]:
    """sha256 and bytes of every file but the manifest and the timings, by relative path in sorted order."""
    found: dict[str, dict[str, object]] = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in {MANIFEST, TIMINGS}:
            continue
        written = known.get(name)
        size = written.n_bytes if written else path.stat().st_size
        found[name] = {
            "sha256": written.sha256 if written else sha256_file(path, ArtifactError),
            "bytes": size,
        }
    return found


def seal(folder: Path, manifest: Mapping[str, object], known: Mapping[str, Written]) -> str:
    """Write the manifest, after everything else; its sha256."""
    values = {
        "schema_version": SCHEMA_VERSION,
        **manifest,
        "files": hashes(folder, known),
        "unhashed": [TIMINGS],
    }
    write_json(folder / MANIFEST, values)
    sync_folder(folder)
    return sha256_file(folder / MANIFEST, ArtifactError)


def is_sealed(path: Path, manifest: str) -> bool:
    """Whether the artifact at `path` is the one whose manifest has this sha256."""
    return (path / MANIFEST).is_file() and sha256_file(path / MANIFEST, ArtifactError) == manifest


def rename_into_place(folder: Path, path: Path, manifest: str) -> None:
    """Give a sealed folder its name, if it has not got it yet; an artifact under that name is replaced as a whole.

    ArtifactError when neither place holds the artifact whose manifest has this sha256.
    """
    old = replaced(path)
    if is_sealed(folder, manifest):
        try:
            if path.exists():
                path.rename(old)
            folder.rename(path)
            sync_folder(path.parent)
        except OSError as fault:
            raise unwritable(path, fault) from fault
    elif not is_sealed(path, manifest):
        raise ArtifactError(
            f"{path}: expected the artifact that was built, found none; begin anew with --restart"
        )
    if old.is_symlink():  # the name was a link to the artifact, which stays
        old.unlink()
    remove_ours(old)
