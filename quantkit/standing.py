"""Where a build loop stands: which steps are done, what they stored, and where the hidden states behind them lie.

The steps are the embedding, each block, and what comes behind the last block. A step is one entry of the journal, made
once its tensors and hidden states are synced; the states in front of it are removed afterwards. An interrupted build
goes on behind the last entry, at the beginning of a block.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import TypeAdapter

from quantkit.artifact import Sink, Stored
from quantkit.storage.files import sync_folder
from quantkit.storage.ledger import Entry, Ledger
from quantkit.streams import Stream, StreamName
from quantkit.work import BlockRecord

KIND = "step"


@dataclass(frozen=True, kw_only=True)
class Step:
    """One finished step of a loop. `record`: of a block; `states`: stream -> file; `stored`: what it added per sink."""

    loop: int
    record: BlockRecord | None
    states: Mapping[StreamName, str]
    stored: tuple[Stored, ...]


_STEP = TypeAdapter(Step)


@dataclass(frozen=True, kw_only=True)
class Standing:
    """The finished steps of one build loop, oldest first. Without a journal nothing outlives the process."""

    loop: int = 0
    steps: list[Step] = field(default_factory=list)
    journal: Ledger | None = None

    @classmethod
    def read(cls, journal: Ledger, loop: int) -> Standing:
        """What a journal says of the loop of that number."""
        found = (_STEP.validate_python(entry["step"]) for entry in journal.entries if entry["kind"] == KIND)
        return cls(loop=loop, steps=[step for step in found if step.loop == loop], journal=journal)

    @property
    def done(self) -> int:
        """Steps that need not be made again."""
        return len(self.steps)

    @property
    def blocks(self) -> list[BlockRecord]:
        """What was noted of the blocks that are done."""
        return [step.record for step in self.steps if step.record is not None]

    @property
    def states(self) -> Mapping[StreamName, str]:
        """The file of each stream's hidden states behind the last step."""
        return self.steps[-1].states

    def stored(self, sink: int) -> Stored:
        """What the sink of that number has on disk."""
        tensors = tuple(name for step in self.steps for name in step.stored[sink].tensors)
        files = {name: written for step in self.steps for name, written in step.stored[sink].files.items()}
        return Stored(tensors=tensors, files=files)

    def commit(
        self, sinks: Sequence[Sink], before: Mapping[StreamName, Stream], streams: Mapping[StreamName, Stream],
        folder: Path, record: BlockRecord | None = None,
    ) -> None:  # fmt: skip
        """Make a step last: sync what it made, note it in the journal, remove the states that were in front of it."""
        old = {name: before[name].hidden for name in before if before[name].hidden is not streams[name].hidden}
        if self.journal is not None:
            for name, stream in streams.items():
                if name in old or name not in before:
                    stream.hidden.flush()
            sync_folder(folder)
            states: dict[StreamName, str] = {name: stream.hidden.path.name for name, stream in streams.items()}
            stored = tuple(sink.commit() for sink in sinks)
            step = Step(loop=self.loop, record=record, states=states, stored=stored)
            entry: Entry = {"kind": KIND, "step": _STEP.dump_python(step, mode="json")}
            self.journal.append(entry)
            self.steps.append(step)
        for hidden in old.values():
            hidden.delete()
