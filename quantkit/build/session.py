"""A build that may have begun before: what it must have in common with itself, and what it takes up again.

Beside the staging folders `<path>.building` lies `<output.path>.building.scratch` with the journal and, while a build
loop runs, the hidden states of its streams. The journal's entries, in order:

    began    what the build is of: recipe, source, text, versions, machine kind
    step     a finished step of a build loop (`standing`)
    ready    artifacts of one loop that are sealed and only wait for their name
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from quantkit.artifact import writer
from quantkit.artifact.manifest import environment, versions
from quantkit.build.progress_log import BuildProgress
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CheckpointError, UsageError
from quantkit.io import lock
from quantkit.io.files import brief
from quantkit.io.journal import Journal
from quantkit.io.owned_dirs import check_ours, make_ours, remove_ours
from quantkit.plan.plan import Plan
from quantkit.progress import ProgressCallback

JOURNAL = "journal.jsonl"
SHA256_LENGTH = 64
SHOWN = 4
"""Differences that are named when a build cannot be resumed; the others are counted."""


@dataclass(frozen=True, kw_only=True)
class BuildSession:
    """A build under way, perhaps since an earlier process."""

    plans: Sequence[Plan]
    journal: Journal
    resumed: bool

    @property
    def scratch(self) -> Path:
        """The folder of what is removed at the end."""
        return self.journal.path.parent

    def standing(self, loop: int) -> BuildProgress:
        """How far the build loop of that number is."""
        return BuildProgress.read(self.journal, loop)

    def states(self, loop: int) -> Path:
        """The folder of a loop's hidden states, with nothing in it but those behind its last step."""
        folder, standing = self.scratch / f"states-{loop}", self.standing(loop)
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name not in standing.files:
                path.unlink()
        return folder

    def answers(self, loop: int) -> Path:
        """The folder of what models answered when a loop's artifacts were benchmarked."""
        return self.scratch / f"answers-{loop}"

    def ready(self, loop: int) -> Mapping[str, str]:
        """sha256 of the manifest of each artifact of a loop, by format; nothing while one of them is not sealed."""
        return sealed_manifests(self.journal, loop)

    def seal(self, loop: int, manifests: Mapping[str, str]) -> None:
        """Note that the artifacts of a loop only wait for their name, and drop its hidden states."""
        self.journal.append({"kind": "ready", "loop": loop, "manifests": manifests})
        shutil.rmtree(self.scratch / f"states-{loop}", ignore_errors=True)

    def finish(self) -> str:
        """Remove what only an unfinished build needs; a sentence when the disk keeps some of it."""
        remove_ours(self.scratch)
        return (
            f"{self.scratch}: the build is done, this could not be removed; remove it"
            if self.scratch.exists()
            else ""
        )

    def leave(self, error: BaseException) -> None:
        """Note on an exception how to go on; what nothing was done for is removed."""
        if told := self.told():
            error.add_note(told)
        else:
            discard_build(self.plans)

    def told(self) -> str:
        """Where the build stands and how it goes on; nothing before its first step."""
        loops = [entry["step"]["loop"] for entry in self.journal.entries if entry["kind"] == "step"]
        if not loops:
            return ""
        blocks, standing = self.plans[0].layout.blocks, self.standing(loops[-1])
        done, halt = len(standing.blocks), standing.halt
        more = f" and {halt.solved} experts of the next" if halt and halt.solved else ""
        return (
            f"{writer.staging(Path(self.plans[0].path))}: {done} of {len(blocks)} blocks{more} are done and kept; "
            "the same command goes on from there, with --restart it begins anew"
        )


def scratch_folder(plans: Sequence[Plan]) -> Path:
    """The folder that holds the journal: the same whatever formats the recipe has, and in whatever order."""
    staging = writer.staging(Path(plans[0].recipe.output.path))
    return staging.with_name(f"{staging.name}.scratch")


@contextmanager
def exclusive_lock(plans: Sequence[Plan]) -> Iterator[None]:
    """Keep other builds out of the plans' folders; UsageError when one is at work there."""
    with ExitStack() as held:
        for path in sorted({plans[0].recipe.output.path, *(plan.path for plan in plans)}):
            staging = writer.staging(Path(path))
            held.enter_context(lock.held(staging.with_name(f"{staging.name}.lock")))
        yield


def find_interrupted(plans: Sequence[Plan], *, overwrite: bool, restart: bool) -> Journal | None:
    """The journal of an interrupted build that has done something; `restart` lets it be forgotten.

    UsageError when an artifact is in the way, or something that no build made where this one works.
    """
    for folder in (scratch_folder(plans), *(writer.staging(Path(plan.path)) for plan in plans)):
        check_ours(folder)
    journal = None if restart else Journal.open(scratch_folder(plans) / JOURNAL)
    if journal is not None and not any(entry["kind"] == "step" for entry in journal.entries):
        journal = None  # nothing to lose
    for loop, together in enumerate(group_by_solve(plans)):
        sealed = journal and sealed_manifests(journal, loop)
        for plan in together:
            if not sealed:  # else it may be what this build replaces
                writer.check_room(Path(plan.path))
            if not (sealed and writer.is_sealed(Path(plan.path), sealed[plan.format_name])):
                writer.check_free(Path(plan.path), overwrite)
    return journal


def begin_session(
    plans: Sequence[Plan],
    journal: Journal | None,
    source: Checkpoint,
    texts: Mapping[str, str],
    tell: ProgressCallback,
) -> BuildSession:
    """Take up the build of a journal, or begin one; reads every byte of a source that is not known yet.

    UsageError naming what changed when the interrupted build was of something else.
    """
    place = scratch_folder(plans)
    if journal is not None:
        check_same(journal, plans, source, texts, tell)
        return BuildSession(plans=plans, journal=journal, resumed=True)
    discard_build(plans)
    make_ours(place)
    source.hashes(tell)
    entry = {"kind": "began", "stamps": source.stamps(), "of": build_identity(plans, source, texts)}
    return BuildSession(plans=plans, journal=Journal.begin(place / JOURNAL, entry), resumed=False)


def discard_build(plans: Sequence[Plan]) -> None:
    """Remove what builds left beside the places of the plans' artifacts."""
    for plan in plans:
        remove_ours(writer.staging(Path(plan.path)))
    remove_ours(scratch_folder(plans))


def group_by_solve(plans: Sequence[Plan]) -> list[list[Plan]]:
    """The plans that one solve serves, together: a build loop each."""
    same = [plan for plan in plans if plan.format.holds_codes]
    return [*([same] if same else []), *([plan] for plan in plans if not plan.format.holds_codes)]


def sealed_manifests(journal: Journal, loop: int) -> Mapping[str, str]:
    """sha256 of the manifest of each artifact of a loop, by format; nothing before all of them are sealed."""
    return next(
        (e["manifests"] for e in journal.entries if e["kind"] == "ready" and e["loop"] == loop), {}
    )


# ------------------------------------------------------------------------------------------------ what must be the same


def build_identity(
    plans: Sequence[Plan], source: Checkpoint, texts: Mapping[str, str]
) -> dict[str, object]:
    """All that decides the artifacts' bytes, as plain JSON. Where they lie and how much memory makes them does not."""
    plan, used = plans[0], dict[str, str]()
    for each in plans:
        used |= versions(each)
    of = {
        "recipe": plan.recipe.model_dump(mode="json", exclude={"memory": True, "output": {"path"}}),
        "source": {
            "revision": plan.source.revision,
            "files": source.hashes(),
            "other files": source.fingerprint(),
        },
        "text": dict(texts),
        "versions": used,
        "machine": environment(plan),
        "plan": {each.format_name: each.hash for each in plans},
    }
    return dict(json.loads(json.dumps(of)))


def check_same(
    journal: Journal,
    plans: Sequence[Plan],
    source: Checkpoint,
    texts: Mapping[str, str],
    tell: ProgressCallback,
) -> None:
    """UsageError, naming what changed, unless the journal is of this very build."""
    began = journal.entries[0]
    if began["stamps"] == source.stamps():  # nobody touched the files since they were read
        source.take_hashes(began["of"]["source"]["files"])
    source.hashes(tell)
    before, now = flatten_json(began["of"]), flatten_json(build_identity(plans, source, texts))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    changed = [
        key for key in changed if not key.startswith("plan.")
    ] or changed  # it follows from the others
    if not changed:
        return
    shown = [f"{key} {describe_change(before.get(key), now.get(key))}" for key in changed[:SHOWN]]
    rest = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    raise UsageError(
        f"{writer.staging(Path(plans[0].path))}: expected the build that was interrupted here, found another: "
        f"{', '.join(shown)}{rest}; undo that to go on, or begin anew with --restart"
    )


def check_source(journal: Journal, source: Checkpoint) -> None:
    """CheckpointError when the source's files are not what they were when the build began."""
    began = journal.entries[0]
    if source.stamps() == began["stamps"]:
        return
    now = Checkpoint.open(source.folder)
    before = began["of"]["source"]
    if now.fingerprint() != before["other files"] or now.hashes() != before["files"]:
        raise CheckpointError(
            f"{source.folder}: expected files that stay as they are, found others than when the build began; restore "
            "them and go on, or begin anew with --restart"
        )


def flatten_json(values: object, name: str = "") -> dict[str, object]:
    """The leaves of nested JSON under dotted names, those of lists under their place."""
    if isinstance(values, list):
        values = dict(enumerate(values))
    if isinstance(values, Mapping) and values:
        return {
            key: leaf
            for part, value in values.items()
            for key, leaf in flatten_json(value, f"{name}.{part}").items()
        }
    return {name.removeprefix("."): values}


def describe_change(before: object, now: object) -> str:
    """What became of one value, in words."""
    if all(isinstance(value, str) and len(value) == SHA256_LENGTH for value in (before, now)):
        return "changed"
    return f"was {brief(before)}, is {brief(now)}"
