"""Where a build loop stands: which steps are done, what they stored, and where the hidden states behind them lie.

The steps are the embedding, each block, and what comes behind the last block. A step is one entry of the journal, made
once its tensors and hidden states are synced; the states in front of it are removed afterwards. A block that takes long
may halt behind each wave of its experts, which is an entry, too. An interrupted build goes on behind the last entry.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from quantkit.artifact.records import BlockRecord, ModuleRecord
from quantkit.artifact.writer import ArtifactWriter, WrittenState
from quantkit.build.hidden_states import Stream, StreamName
from quantkit.io.files import remove_files, sync_folder
from quantkit.io.journal import Entry, Journal

STEP, HALT = "step", "halt"


@dataclass(frozen=True, kw_only=True)
class CompletedStep:
    """One finished step of a loop. `record`: of a block; `states`: stream -> file; `stored`: what it added per sink."""

    loop: int
    record: BlockRecord | None
    states: Mapping[StreamName, str]
    stored: tuple[WrittenState, ...]


@dataclass(frozen=True, kw_only=True)
class WaveCheckpoint:
    """A finished wave of the block behind the first `steps` steps of a loop.

    `surveyed`, `solved`: experts that the two passes over them are done with; `states`: stream -> file, of the streams
    that the passes have moved; `sums`: the file of what was summed up over the experts; `modules`: those of the experts
    that are solved; `stored`: what was added per sink.
    """

    loop: int
    steps: int
    surveyed: int
    solved: int
    states: Mapping[StreamName, str]
    sums: str | None
    modules: tuple[ModuleRecord, ...]
    stored: tuple[WrittenState, ...]

    @property
    def files(self) -> frozenset[str]:
        """The files it needs."""
        return frozenset((*self.states.values(), *([self.sums] if self.sums else [])))


_STEP, _HALT = TypeAdapter(CompletedStep), TypeAdapter(WaveCheckpoint)


@dataclass(frozen=True, kw_only=True)
class BuildProgress:
    """The finished steps of one build loop, oldest first. Without a journal nothing outlives the process."""

    loop: int = 0
    steps: list[CompletedStep] = field(default_factory=list)
    halts: list[WaveCheckpoint] = field(default_factory=list)
    journal: Journal | None = None

    @classmethod
    def read(cls, journal: Journal, loop: int) -> BuildProgress:
        """What a journal says of the loop of that number."""
        steps = [
            _STEP.validate_python(entry["step"])
            for entry in journal.entries
            if entry["kind"] == STEP
        ]
        halts = [
            _HALT.validate_python(entry["halt"])
            for entry in journal.entries
            if entry["kind"] == HALT
        ]
        return cls(
            loop=loop,
            steps=[step for step in steps if step.loop == loop],
            halts=[halt for halt in halts if halt.loop == loop],
            journal=journal,
        )

    @property
    def done(self) -> int:
        """Steps that need not be made again."""
        return len(self.steps)

    @property
    def halt(self) -> WaveCheckpoint | None:
        """The last finished wave of the step that is under way."""
        return self.halts[-1] if self.halts and self.halts[-1].steps == self.done else None

    @property
    def blocks(self) -> list[BlockRecord]:
        """What was noted of the blocks that are done."""
        return [step.record for step in self.steps if step.record is not None]

    @property
    def states(self) -> Mapping[StreamName, str]:
        """The file of each stream's hidden states behind the last step."""
        return self.steps[-1].states

    @property
    def files(self) -> frozenset[str]:
        """The files that going on needs."""
        last = frozenset(self.states.values()) if self.steps else frozenset[str]()
        return last | (self.halt.files if self.halt else frozenset())

    def stored(self, sink: int) -> WrittenState:
        """What the sink of that number has on disk."""
        found = [step.stored[sink] for step in self.steps] + [
            halt.stored[sink] for halt in self.halts
        ]
        tensors = tuple(name for stored in found for name in stored.tensors)
        return WrittenState(
            tensors=tensors, files={name: w for stored in found for name, w in stored.files.items()}
        )

    def commit(
        self, sinks: Sequence[ArtifactWriter], before: Mapping[StreamName, Stream], streams: Mapping[StreamName, Stream],
        folder: Path, record: BlockRecord | None = None,
    ) -> None:  # fmt: skip
        """Make a step last: sync what it made, note it in the journal, remove the states that were in front of it."""
        old = {
            name: before[name].hidden
            for name in before
            if before[name].hidden is not streams[name].hidden
        }
        halt = self.halt
        if self.journal is not None:
            for name, stream in streams.items():
                if name in old or name not in before:
                    stream.hidden.flush()
            sync_folder(folder)
            states: dict[StreamName, str] = {
                name: stream.hidden.path.name for name, stream in streams.items()
            }
            stored = tuple(sink.commit() for sink in sinks)
            step = CompletedStep(loop=self.loop, record=record, states=states, stored=stored)
            entry: Entry = {"kind": STEP, "step": _STEP.dump_python(step, mode="json")}
            self.journal.append(entry)
            self.steps.append(step)
            remove_files(
                folder / name
                for name in (halt.files if halt else frozenset()) - frozenset(states.values())
            )
        for hidden in old.values():
            hidden.delete()

    def pause(self, halt: WaveCheckpoint, folder: Path) -> None:
        """Note a wave whose tensors and hidden states are synced; files that only the wave before it needs go."""
        before = self.files
        if self.journal is not None:
            self.journal.append({"kind": HALT, "halt": _HALT.dump_python(halt, mode="json")})
            self.halts.append(halt)
            remove_files(folder / name for name in before - self.files)
