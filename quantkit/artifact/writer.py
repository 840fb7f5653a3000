"""Writing the planned shards of an artifact, tensor by tensor, so that an interrupted build can
resume.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor

from quantkit.checkpoint.tensors import ShardWriter, WrittenFile
from quantkit.contracts import TensorSpec
from quantkit.errors import ArtifactError
from quantkit.io.files import PART, sync_folder
from quantkit.plan.output_tensors import Shard


@dataclass(frozen=True, kw_only=True)
class WrittenState:
    """The part of an artifact that is safely on disk: tensors by name, and complete files with
    their hashes.
    """

    tensors: tuple[str, ...] = ()
    files: Mapping[str, WrittenFile] = field(default_factory=dict)


class ArtifactWriter:
    """Writes the planned shards of one build; tensors come by name in any order.

    `stored` is the state that an interrupted build has committed: only the other tensors are still
    to be written. A stored tensor that is written again, because its block was not finished, has
    the same bytes and is skipped.
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
        state = stored or WrittenState()
        self._stored = names = frozenset(state.tensors)
        self._done = {shard.file: {spec.name for spec in shard.tensors} & names for shard in shards}
        self._missing = {
            shard.file: {spec.name for spec in shard.tensors} - names for shard in shards
        }
        self._open: dict[str, ShardWriter] = {}
        self._new: list[str] = []  # tensors since the last commit
        self._committed_files = set(state.files)
        self.written: dict[str, WrittenFile] = dict(state.files)
        for file, written in self.written.items():
            _check_size(folder / file, written)
        for file, tensor_names in self._done.items():
            if tensor_names and file not in self.written:
                _check_started(folder / file)

    def holds(self, name: str) -> bool:
        """Return whether a tensor of this name is in the plan."""
        return name in self._specs

    def spec(self, name: str) -> TensorSpec:
        """Return the planned dtype and shape of a tensor."""
        if name not in self._specs:
            raise ArtifactError(f"{name}: not in the plan; a format's pack and its layout disagree")
        return self._specs[name]

    def write(self, tensors: Mapping[str, Tensor]) -> None:
        """Write tensors into their shards.

        A shard that is complete is closed, hashed and renamed at once.
        """
        for name, tensor in tensors.items():
            if name in self._stored:
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
        """Make everything written so far survive a crash.

        Return the tensors and files since the last commit.
        """
        for writer in self._open.values():
            writer.flush()
        sync_folder(self._folder)
        files = {
            file: written
            for file, written in self.written.items()
            if file not in self._committed_files
        }
        state = WrittenState(tensors=tuple(self._new), files=files)
        self._new = []
        self._committed_files |= set(files)
        return state

    def close(self) -> dict[str, WrittenFile]:
        """Return the files by name. Raises ArtifactError when planned tensors were not written."""
        missing = sorted(name for names in self._missing.values() for name in names)
        if missing:
            raise ArtifactError(
                f"{self._folder}: the build ended without {len(missing)} planned tensors, the "
                f"first {missing[0]}"
            )
        return self.written

    def abandon(self) -> None:
        """Close open files after a failure; part files stay for the next run."""
        for writer in self._open.values():
            writer.close()
        self._open.clear()


def _check_size(path: Path, written: WrittenFile) -> None:
    """Check that a file of an interrupted build has its size; raises ArtifactError."""
    size = path.stat().st_size if path.is_file() else None
    if size != written.n_bytes:
        raise ArtifactError(
            f"{path}: expected {written.n_bytes} bytes as written, found "
            f"{'no file' if size is None else f'{size}'}; start over with --restart"
        )


def _check_started(path: Path) -> None:
    """Check that a file that an interrupted build started exists; raises ArtifactError."""
    part = path.with_name(path.name + PART)
    if not part.is_file() and not path.is_file():
        raise ArtifactError(
            f"{part}: expected the file that the build started, found none: its tensors are lost; "
            "start over with --restart"
        )
