"""The progress of a build loop in the journal: finished steps, and finished waves of the block in
progress.

The steps are the embedding, each block, and the tensors after the last block. A step becomes one
entry of the journal once its tensors and hidden states are synced; the states before it are removed
afterwards. A long block adds an entry after a wave of its experts. An interrupted build continues
after the last entry.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from quantkit.artifact.records import BlockRecord, ModuleRecord
from quantkit.artifact.writer import ArtifactWriter, WrittenState
from quantkit.build.hidden_states import Stream, StreamName
from quantkit.errors import ArtifactError
from quantkit.io.files import remove_files, shorten_repr, sync_folder
from quantkit.io.journal import Entry, Journal

STEP, WAVE = "step", "wave"

MIN_SECONDS = 60.0
"""Work that may be lost to an interruption; syncing gigabytes of states is not worth it for
less.
"""
MIN_COST_RATIO = 20
"""Seconds of work between two checkpoints, per second that the last one took: checkpoints cost 5 %
at most.
"""


@dataclass(kw_only=True)
class CheckpointInterval:
    """When the build last saved its work, and how long that took, in seconds; mutable."""

    since: float = field(default_factory=time.monotonic)
    cost: float = 0.0

    def is_due(self) -> bool:
        """Return whether enough work was done since the last checkpoint."""
        return time.monotonic() - self.since >= max(MIN_SECONDS, MIN_COST_RATIO * self.cost)

    def restart(self, cost: float) -> None:
        """Start again after a checkpoint that took `cost` seconds."""
        self.since, self.cost = time.monotonic(), cost


@dataclass(frozen=True, kw_only=True)
class CompletedStep:
    """One finished step of a loop.

    `record`: of a block; `states`: stream -> file; `stored`: what each writer added.
    """

    loop: int
    record: BlockRecord | None
    states: Mapping[StreamName, str]
    stored: tuple[WrittenState, ...]


@dataclass(frozen=True, kw_only=True)
class WaveCheckpoint:
    """A finished wave of the block after the first `steps` steps of a loop.

    `searched`, `quantized`: experts that the two passes have finished; `states`: stream -> file, of
    the streams that the passes have moved; `sums`: the file of the sums over experts; `modules`:
    the records of the quantized experts; `stored`: what each writer added.
    """

    loop: int
    steps: int
    searched: int
    quantized: int
    states: Mapping[StreamName, str]
    sums: str | None
    modules: tuple[ModuleRecord, ...]
    stored: tuple[WrittenState, ...]

    @property
    def files(self) -> frozenset[str]:
        """The files it needs."""
        return frozenset((*self.states.values(), *([self.sums] if self.sums else [])))


_STEP, _WAVE = TypeAdapter(CompletedStep), TypeAdapter(WaveCheckpoint)


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """The finished steps and waves of one build loop, oldest first; the two lists grow as the build
    does.

    Without a journal nothing outlives the process.
    """

    loop: int = 0
    steps: list[CompletedStep] = field(default_factory=list)
    waves: list[WaveCheckpoint] = field(default_factory=list)
    journal: Journal | None = None

    @classmethod
    def read(cls, journal: Journal, loop: int) -> BuildProgress:
        """Read the progress of a loop from a journal.

        Raises ArtifactError for a file of states that is not in their folder: such files are
        removed.
        """
        steps = [_STEP.validate_python(e["step"]) for e in journal.entries if e["kind"] == STEP]
        waves = [_WAVE.validate_python(e["wave"]) for e in journal.entries if e["kind"] == WAVE]
        names = {
            *(n for s in steps for n in s.states.values()),
            *(n for w in waves for n in w.files),
        }
        if wrong := next((name for name in names if Path(name).name != name), None):
            raise ArtifactError(
                f"{journal.path}: expected the name of a file of states, found "
                f"{shorten_repr(wrong)}; start over with --restart"
            )
        return cls(
            loop=loop,
            steps=[step for step in steps if step.loop == loop],
            waves=[wave for wave in waves if wave.loop == loop],
            journal=journal,
        )

    @property
    def done(self) -> int:
        """The number of finished steps."""
        return len(self.steps)

    @property
    def wave(self) -> WaveCheckpoint | None:
        """The last finished wave of the step in progress."""
        return self.waves[-1] if self.waves and self.waves[-1].steps == self.done else None

    @property
    def blocks(self) -> list[BlockRecord]:
        """The records of the finished blocks."""
        return [step.record for step in self.steps if step.record is not None]

    @property
    def states(self) -> Mapping[StreamName, str]:
        """The file of each stream's hidden states after the last step."""
        return self.steps[-1].states

    @property
    def files(self) -> frozenset[str]:
        """The files that resuming needs."""
        last = frozenset(self.states.values()) if self.steps else frozenset[str]()
        return last | (self.wave.files if self.wave else frozenset())

    def get_written_state(self, writer: int) -> WrittenState:
        """Return the tensors of the writer of that number on disk; raises ArtifactError for an
        entry without them.
        """
        entries = [step.stored for step in self.steps]
        entries += [wave.stored for wave in self.waves]
        if self.journal is not None and any(len(stored) <= writer for stored in entries):
            raise ArtifactError(
                f"{self.journal.path}: expected what each of {writer + 1} writers stored, found "
                "less; the journal is damaged, start over with --restart"
            )
        parts = [stored[writer] for stored in entries]
        tensors = tuple(name for part in parts for name in part.tensors)
        files = {name: written for part in parts for name, written in part.files.items()}
        return WrittenState(tensors=tensors, files=files)

    def commit_step(
        self,
        writers: Sequence[ArtifactWriter],
        before: Mapping[StreamName, Stream],
        streams: Mapping[StreamName, Stream],
        folder: Path,
        record: BlockRecord | None = None,
    ) -> None:
        """Make a step last: sync its output, add it to the journal, remove the states before it."""
        old = {
            name: before[name].hidden
            for name in before
            if before[name].hidden is not streams[name].hidden
        }
        wave = self.wave
        if self.journal is not None:
            for name, stream in streams.items():
                if name in old or name not in before:
                    stream.hidden.flush()
            sync_folder(folder)
            states: dict[StreamName, str] = {
                name: stream.hidden.path.name for name, stream in streams.items()
            }
            stored = tuple(writer.commit() for writer in writers)
            step = CompletedStep(loop=self.loop, record=record, states=states, stored=stored)
            entry: Entry = {"kind": STEP, "step": _STEP.dump_python(step, mode="json")}
            self.journal.append(entry)
            self.steps.append(step)
            unused = (wave.files if wave else frozenset()) - frozenset(states.values())
            remove_files(folder / name for name in unused)
        for hidden in old.values():
            hidden.delete()

    def record_wave(self, wave: WaveCheckpoint, folder: Path) -> None:
        """Add a wave whose tensors and states are synced; remove the files that only the wave
        before it needs.
        """
        before = self.files
        if self.journal is not None:
            self.journal.append({"kind": WAVE, "wave": _WAVE.dump_python(wave, mode="json")})
            self.waves.append(wave)
            remove_files(folder / name for name in before - self.files)
