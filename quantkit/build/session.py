"""Resumable builds: check that recipe, source and environment are unchanged, then continue.

Next to the staging folders `<path>.building` lies `<output.path>.building.scratch` with the journal
and, while a build loop runs, the hidden states of its streams. The journal's entries, in order:

    began    identity of the build: recipe, source, texts, versions, machine kind, journal format;
             and the owner id, which the marker of each of its folders holds too
    step     a finished step of a build loop (`progress_log`)
    wave     a finished wave of a block's experts
    ready    artifacts of one loop that are sealed and only need their name
    replaces the artifact that one of them replaces, before it is moved away
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from quantkit.artifact.make_manifest import read_environment, read_versions
from quantkit.artifact.replace import read_replaced
from quantkit.artifact.seal import is_sealed
from quantkit.artifact.staging import (
    check_output_free,
    check_replaced_free,
    get_staging_path,
)
from quantkit.build.journal_schema import open_build_journal
from quantkit.build.progress_log import BuildProgress
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import ArtifactError, CheckpointError, UsageError
from quantkit.io import lock
from quantkit.io.files import shorten_repr
from quantkit.io.journal import Journal, read_first_entry
from quantkit.io.owned_dirs import (
    JOURNAL,
    OWNER_KEY,
    check_owned_dir,
    check_work_dir,
    make_owned_dir,
    make_owner_id,
    parse_owner,
    remove_owned_dir,
)
from quantkit.plan.plan import Plan
from quantkit.progress import ProgressCallback
from quantkit.recipe.schema import Recipe

JOURNAL_FORMAT = 5
"""Version of the journal's entries: a build that another version began is not resumed."""
CHOSEN_TEXTS = "chosen texts"
"""Key of the sets that `auto` stands for, in what decides a build."""
_CHOSEN_TEXTS = TypeAdapter(dict[str, tuple[str, str]])
REMEDY = (
    "if nothing of yours is in it, remove it to start over, else move it away or choose another "
    "--output"
)
SHA256_LENGTH = 64
SHOWN = 4
"""Differences that are named when a build cannot be resumed; the rest is counted."""


@dataclass(frozen=True, kw_only=True)
class BuildSession:
    """A build in progress, begun by this process or an earlier one."""

    plans: Sequence[Plan]
    journal: Journal
    resumed: bool

    @property
    def scratch(self) -> Path:
        """The folder that is removed at the end."""
        return self.journal.path.parent

    @property
    def owner(self) -> str:
        """The id in the marker of each folder of the build."""
        return str(self.journal.entries[0][OWNER_KEY])

    def read_progress(self, loop: int) -> BuildProgress:
        """Return the progress of the build loop of that number."""
        return BuildProgress.read(self.journal, loop)

    def prepare_states(self, loop: int) -> Path:
        """Return the folder of a loop's hidden states, with only the files that resuming needs."""
        folder, progress = self._check_folder(f"states-{loop}"), self.read_progress(loop)
        folder.mkdir(exist_ok=True)
        for path in folder.iterdir():
            if path.name not in progress.files:
                path.unlink()
        return folder

    def answers_folder(self, loop: int) -> Path:
        """Return the folder of the models' answers when a loop's artifacts are benchmarked."""
        return self._check_folder(f"answers-{loop}")

    def _check_folder(self, name: str) -> Path:
        """Return a folder of the scratch folder; raises UsageError for a link in its place."""
        folder = self.scratch / name
        if folder.is_symlink():
            raise UsageError(f"{folder}: expected a folder, found a link; remove it")
        return folder

    def sealed_manifests(self, loop: int) -> Mapping[str, str]:
        """Return the sha256 of the manifest of each artifact of a loop, by format; empty until all
        are sealed.
        """
        return sealed_manifests(self.journal, loop)

    def mark_sealed(self, loop: int, manifests: Mapping[str, str]) -> None:
        """Record that the artifacts of a loop only need their name, and remove its hidden
        states.
        """
        self.journal.append({"kind": "ready", "loop": loop, "manifests": manifests})
        shutil.rmtree(self.scratch / f"states-{loop}", ignore_errors=True)

    def record_replaced(self, plan: Plan, manifest: str) -> str | None:
        """Record the artifact that a sealed one replaces, before it is moved away; return what
        identifies it, None for nothing.

        manifest: sha256 of the sealed one. Raises UsageError for anything but an artifact.
        """
        path, before = Path(plan.path), find_replaced(self.journal, plan)
        now = read_replaced(path) if is_sealed(get_staging_path(path), manifest) else None
        if now is None:  # nothing is there, or an earlier process has moved it away
            return before
        check_replaced_free(path)
        if now != before:
            self.journal.append({
                "kind": "replaces", "format": plan.format_name, "manifest": now,
            })  # fmt: skip
        return now

    def remove_scratch(self) -> str:
        """Remove what only an unfinished build needs; return a sentence if some of it could not be
        removed.
        """
        remove_owned_dir(self.scratch, self.owner)
        return (
            f"{self.scratch}: the build is done, this could not be removed; remove it"
            if self.scratch.exists()
            else ""
        )

    def add_resume_note(self, error: BaseException) -> None:
        """Add to an exception how to resume the build; remove a build that has finished nothing."""
        if message := self.status_message():
            error.add_note(message)
        else:
            discard_build(self.plans, self.owner)

    def status_message(self) -> str:
        """Return how far the build is and how to resume it; empty before its first step."""
        loops = [entry["step"]["loop"] for entry in self.journal.entries if entry["kind"] == "step"]
        if not loops:
            return ""
        blocks, progress = self.plans[0].layout.blocks, self.read_progress(loops[-1])
        done, wave = len(progress.blocks), progress.wave
        more = f" and {wave.quantized} experts of the next" if wave and wave.quantized else ""
        return (
            f"{get_staging_path(Path(self.plans[0].path))}: {done} of {len(blocks)} blocks{more} "
            "are done and kept; the same command resumes from there, --restart starts over"
        )


def scratch_folder(plans: Sequence[Plan]) -> Path:
    """Return the folder of the journal; it does not depend on the recipe's formats and their
    order.
    """
    return locate_scratch(plans[0].recipe)


def locate_scratch(recipe: Recipe) -> Path:
    """Return the folder of the journal of a recipe's build."""
    staging = get_staging_path(Path(recipe.output.path))
    return staging.with_name(f"{staging.name}.scratch")


def read_chosen_texts(recipe: Recipe, restart: bool) -> dict[str, tuple[str, str]]:
    """Return what `auto` stands for in the interrupted build of a recipe: text -> (set, reason).

    Empty without such a build, with `restart`, or if it did not choose the sets that this recipe
    leaves open: the build resumes with its own texts, whatever this machine can reach now.
    """
    scratch = locate_scratch(recipe)
    resumes = scratch.is_dir() and not restart
    entry = (read_first_entry(scratch / JOURNAL) if resumes else None) or {}
    try:
        chosen = _CHOSEN_TEXTS.validate_python(entry.get("of", {}).get(CHOSEN_TEXTS, {}))
    except (AttributeError, ValidationError):
        return {}
    return chosen if chosen.keys() == set(recipe.automatic_texts) else {}


def check_folders(plans: Sequence[Plan]) -> str | None:
    """Return the owner id of an earlier build of these plans, None without one.

    Raises UsageError if anything that no such build made is where this one works.
    """
    scratch = scratch_folder(plans)
    staging = [get_staging_path(Path(plan.path)) for plan in plans]
    is_folder = scratch.is_dir() and not scratch.is_symlink()
    entry = read_first_entry(scratch / JOURNAL) if is_folder else None
    if entry is not None and parse_owner(entry) is None and "stamps" in entry:
        raise UsageError(
            f"{scratch}: expected a build that this version of quantkit began, found one of an "
            "earlier version; resume it with that version, or remove this folder and "
            f"{', '.join(map(str, staging))} to start over"
        )
    owner = check_work_dir(scratch, REMEDY)
    for folder in staging:
        if owner is not None and is_sealed_by_journal(folder, scratch / JOURNAL):
            make_owned_dir(folder, owner)  # killed between the marker's removal and the renaming
        check_owned_dir(folder, owner, REMEDY)
    return owner


def is_sealed_by_journal(folder: Path, path: Path) -> bool:
    """Return whether a journal names the manifest of the artifact in `folder`."""
    try:
        journal = open_build_journal(path) if not folder.is_symlink() else None
    except ArtifactError:  # damaged: reported when it is needed
        return False
    return journal is not None and any(
        is_sealed(folder, manifest)
        for entry in journal.entries
        if entry["kind"] == "ready"
        for manifest in entry["manifests"].values()
    )


def find_replaced(journal: Journal, plan: Plan) -> str | None:
    """Return what identifies the artifact that a plan's artifact replaces; None for nothing."""
    entries = [
        entry["manifest"]
        for entry in journal.entries
        if entry["kind"] == "replaces" and entry["format"] == plan.format_name
    ]
    return entries[-1] if entries else None


@contextmanager
def exclusive_lock(plans: Sequence[Plan]) -> Iterator[None]:
    """Lock the plans' folders against other builds. Raises UsageError if another build holds the
    lock.
    """
    with ExitStack() as held:
        for path in sorted({plans[0].recipe.output.path, *(plan.path for plan in plans)}):
            staging = get_staging_path(Path(path))
            held.enter_context(lock.hold_lock(staging.with_name(f"{staging.name}.lock")))
        yield


def find_interrupted(plans: Sequence[Plan], *, overwrite: bool, restart: bool) -> Journal | None:
    """Return the journal of an interrupted build that has finished a step; None with `restart`.

    Raises UsageError if an artifact exists at the output, or anything that no build made where this
    one works.
    """
    owner = check_folders(plans)
    journal = open_build_journal(scratch_folder(plans) / JOURNAL) if owner and not restart else None
    if journal is not None and not any(entry["kind"] == "step" for entry in journal.entries):
        journal = None  # it has finished nothing
    for loop, together in enumerate(group_by_solve(plans)):
        sealed = journal and sealed_manifests(journal, loop)
        for plan in together:
            if not (sealed and journal and find_replaced(journal, plan)):
                check_replaced_free(Path(plan.path))
            if not (sealed and is_sealed(Path(plan.path), sealed[plan.format_name])):
                check_output_free(Path(plan.path), overwrite)
    return journal


def begin_session(
    plans: Sequence[Plan],
    journal: Journal | None,
    source: Checkpoint,
    texts: Mapping[str, str],
    on_progress: ProgressCallback,
) -> BuildSession:
    """Resume the build of a journal, or begin a new one, which reads and hashes every file of the
    source.

    Raises UsageError with the differences if the interrupted build was of something else.
    """
    place = scratch_folder(plans)
    if journal is not None:
        check_same(journal, plans, source, texts, on_progress)
        return BuildSession(plans=plans, journal=journal, resumed=True)
    discard_build(plans, check_folders(plans))
    owner = make_owner_id()
    make_owned_dir(place, owner)
    source.compute_hashes(on_progress)
    entry = {
        "kind": "began",
        OWNER_KEY: owner,
        "stamps": source.read_stamps(),
        "of": build_identity(plans, source, texts),
    }
    journal = Journal.begin(place / JOURNAL, entry, owner)
    return BuildSession(plans=plans, journal=journal, resumed=False)


def discard_build(plans: Sequence[Plan], owner: str | None) -> None:
    """Remove the leftovers of the build of that id next to the outputs of the plans."""
    for plan in plans:
        remove_owned_dir(get_staging_path(Path(plan.path)), owner)
    remove_owned_dir(scratch_folder(plans), owner)


def group_by_solve(plans: Sequence[Plan]) -> list[list[Plan]]:
    """Group the plans that share a solve: one build loop per group."""
    shared = [plan for plan in plans if plan.format.holds_codes]
    return [
        *([shared] if shared else []),
        *([plan] for plan in plans if not plan.format.holds_codes),
    ]


def sealed_manifests(journal: Journal, loop: int) -> Mapping[str, str]:
    """Return the sha256 of each sealed artifact\'s manifest of a loop, by format; empty until all
    are sealed.
    """
    return next(
        (e["manifests"] for e in journal.entries if e["kind"] == "ready" and e["loop"] == loop), {}
    )


# ----------------------------------------------------------------------------- the build's identity


def build_identity(
    plans: Sequence[Plan], source: Checkpoint, texts: Mapping[str, str]
) -> dict[str, object]:
    """Return everything that decides the artifacts' bytes, as plain JSON: not their paths, not
    `memory:`.
    """
    plan, used = plans[0], dict[str, str]()
    for each in plans:
        used |= read_versions(each)
    of = {
        "recipe": plan.recipe.model_dump(mode="json", exclude={"memory": True, "output": {"path"}}),
        "source": {
            "revision": plan.source.revision,
            "files": source.compute_hashes(),
            "other files": source.compute_fingerprint(),
        },
        "text": dict(texts),
        "versions": used,
        "machine": read_environment(plan),
        "plan": {each.format_name: each.hash for each in plans},
        "journal": JOURNAL_FORMAT,
    }
    if plan.recipe.chosen_texts:
        of[CHOSEN_TEXTS] = plan.recipe.chosen_texts
    return dict(json.loads(json.dumps(of)))


def check_same(
    journal: Journal,
    plans: Sequence[Plan],
    source: Checkpoint,
    texts: Mapping[str, str],
    on_progress: ProgressCallback,
) -> None:
    """Check that a journal is of this build. Raises UsageError with the differences."""
    began = journal.entries[0]
    if began["stamps"] == source.read_stamps():  # the files are unchanged since they were hashed
        source.trust_hashes(began["of"]["source"]["files"])
    source.compute_hashes(on_progress)
    before, now = flatten_json(began["of"]), flatten_json(build_identity(plans, source, texts))
    changed = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    changed = [
        key for key in changed if not key.startswith("plan.")
    ] or changed  # plan hashes follow from the rest
    if not changed:
        return
    shown = [f"{key} {describe_change(before.get(key), now.get(key))}" for key in changed[:SHOWN]]
    rest = f" and {len(changed) - SHOWN} more" if len(changed) > SHOWN else ""
    raise UsageError(
        f"{get_staging_path(Path(plans[0].path))}: expected the interrupted build, found another: "
        f"{', '.join(shown)}{rest}; undo these changes to resume, or start over with --restart"
    )


def check_source(journal: Journal, source: Checkpoint) -> None:
    """Check that the source's files are the same as at the start. Raises CheckpointError."""
    began = journal.entries[0]
    if source.read_stamps() == began["stamps"]:
        return
    now = Checkpoint.open(source.folder)
    before = began["of"]["source"]
    if (
        now.compute_fingerprint() != before["other files"]
        or now.compute_hashes() != before["files"]
    ):
        raise CheckpointError(
            f"{source.folder}: expected the files that the build began with, found changed ones; "
            "restore them and resume, or start over with --restart"
        )


def flatten_json(values: object, name: str = "") -> dict[str, object]:
    """Return the leaves of nested JSON under dotted names; list items under their index."""
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
    """Format the change of one value."""
    if all(isinstance(value, str) and len(value) == SHA256_LENGTH for value in (before, now)):
        return "changed"
    return f"was {shorten_repr(before)}, is {shorten_repr(now)}"
