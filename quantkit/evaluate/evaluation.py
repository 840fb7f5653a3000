"""`quantkit eval`: any model, any backend, any task; resumed by sample, compared item by item.

An artifact's folder is sealed, so what comes out lies beside it: answers.sqlite (the journal), items.parquet,
pairs.parquet where there is a baseline, results.json.
"""

from __future__ import annotations

import gc
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from quantkit.artifact.layout import FIDELITY, MANIFEST
from quantkit.artifact.read_manifest import get_section, read_manifest
from quantkit.artifact.read_report import read_report
from quantkit.checkpoint import hub
from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import (
    ArtifactError,
    CheckpointError,
    EvaluationError,
    HubUnreachable,
    UnsuitedError,
    UsageError,
)
from quantkit.evaluate import answer_store, benchmarks, compare, harness, samples
from quantkit.evaluate.harness import Decoding, Opened
from quantkit.evaluate.samples import ItemResult
from quantkit.evaluate.sandbox import sandbox
from quantkit.io import user_cache
from quantkit.io.files import sha256_file
from quantkit.progress import Progress, ProgressCallback
from quantkit.texts.corpora import load_tokenizer

if TYPE_CHECKING:
    from quantkit.evaluate.endpoint import Server
    from quantkit.evaluate.lm_eval_adapter import Backend

Kind = Literal["artifact", "model", "served"]
BackendName = Literal["transformers", "vllm", "openai"]
JOURNAL = "answers.sqlite"
DEFAULT_TASKS = ("math", "code")


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What is asked: an artifact, an ordinary model, or a model that only a server knows (folder None).

    hash: of the artifact's manifest, which seals every file; of every byte of a model; of nothing but the name else.
    """

    name: str
    kind: Kind
    folder: Path | None
    hash: str


@dataclass(frozen=True, kw_only=True)
class Setup:
    """How a subject is asked. device_map, dtype: "" chooses; engine: arguments of vLLM; server: of backend openai."""

    backend: BackendName = "transformers"
    limit: int | None = None
    seeds: int = 1
    decoding: Decoding = field(default_factory=Decoding)
    batch_size: int = benchmarks.BATCH_SIZE
    device_map: str = ""
    dtype: str = ""
    native: bool = False
    engine: Mapping[str, object] = field(default_factory=dict)
    server: Server | None = None

    def check(self) -> None:
        """UsageError for settings that contradict each other."""
        if self.limit is not None and self.limit < 1:
            raise UsageError(f"--limit: expected 1 or more items, found {self.limit}")
        if self.seeds > 1 and not self.decoding.temperature:
            raise UsageError(
                "--seeds: expected --temperature above 0 with it, found greedy decoding, which has one answer; name one"
            )
        if (self.backend == "openai") != (self.server is not None):
            raise UsageError(
                "--endpoint: expected with --backend openai, and with no other; name the server's address"
            )


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A run per seed over the same items, the items averaged over the seeds, and which tasks could not be run."""

    runs: tuple[tuple[ItemResult, ...], ...]
    items: tuple[ItemResult, ...]
    opened: Opened
    backend: Mapping[str, object]


def server_at(
    url: str,
    *,
    model: str,
    chat: bool,
    concurrency: int,
    tries: int,
    seconds: float,
    key_variable: str,
) -> Server:
    """A checked endpoint with the name of its model, which is asked for when it is not given; see endpoint.Server."""
    if find_spec("openai") is None:
        raise UsageError(
            "--backend openai: expected OpenAI's client in this environment; install quantkit[openai]"
        )
    from quantkit.evaluate.endpoint import Server, checked_url, served_model

    server = Server(
        url=checked_url(url), model=model, chat=chat, concurrency=concurrency, tries=tries, seconds=seconds,
        key_variable=key_variable,
    )  # fmt: skip
    return server if model else replace(server, model=served_model(server))


def subject(name: str, backend: BackendName) -> Subject:
    """What a name means: an artifact's folder, a model's folder, `builtin:...`, a hub id, or what a server serves."""
    folder = Path(name)
    if (folder / MANIFEST).is_file():
        read_manifest(folder)
        seal = sha256_file(folder / MANIFEST, ArtifactError)
        return Subject(name=folder.resolve().name, kind="artifact", folder=folder, hash=seal)
    if backend == "openai" and not folder.is_dir() and not name.startswith("builtin:"):
        return Subject(
            name=name, kind="served", folder=None, hash=hashlib.sha256(name.encode()).hexdigest()
        )
    try:
        found = hub.resolve_model(name).folder
    except HubUnreachable:
        raise
    except CheckpointError as fault:
        raise (fault if folder.exists() else UsageError(str(fault))) from None
    told = folder.resolve().name if folder.is_dir() else name
    return Subject(
        name=told, kind="model", folder=found, hash=Checkpoint.open(found).content_hash()
    )


def source_of(asked: Subject, given: str) -> Subject:
    """The model that an artifact was made from, or the one given for it; EvaluationError when it is another."""
    if asked.kind != "artifact" or asked.folder is None:
        raise UsageError(
            f"--source: expected an artifact to compare with its source, found {asked.name}"
        )
    told = get_section(read_manifest(asked.folder), "source", asked.folder)
    revision = told.get("revision")
    name = given or str(told.get("model"))
    folder = hub.resolve_model(name, str(revision) if revision and not given else None).folder
    source = Checkpoint.open(folder)
    if source.fingerprint() != told.get("fingerprint"):
        raise EvaluationError(
            f"{name}: not the model that {asked.name} was made from: fingerprint {source.fingerprint()[:12]}, the "
            f"manifest has {str(told.get('fingerprint'))[:12]}; name its folder with --source"
        )
    shown = Path(name).resolve().name if Path(name).is_dir() else name
    return Subject(name=shown, kind="model", folder=folder, hash=source.content_hash())


def default_tasks(asked: Subject) -> tuple[str, ...]:
    """The tasks of an artifact's own report, else math and code."""
    if (
        asked.kind == "artifact"
        and asked.folder is not None
        and (asked.folder / FIDELITY).is_file()
    ):
        return tuple(row.task for row in read_report(asked.folder).benchmarks) or DEFAULT_TASKS
    return DEFAULT_TASKS


def run_evaluation(
    who: Subject, names: Sequence[str], setup: Setup, book: Path, tell: ProgressCallback
) -> Asked:
    """Ask every item of the tasks, once per seed, with answers kept in the journal `book`.

    EvaluationError when no task can be run at all; tasks that cannot are in `opened.failed`.
    """
    setup.check()
    own, theirs, failed = harness.split(names)
    with harness.opened(own, theirs) as found:
        opened = Opened(tasks=found.tasks, loaded=found.loaded, failed={**failed, **found.failed})
        if not opened.tasks:
            kind = (
                EvaluationError
                if any(harness.known(name) for name in opened.failed)
                else UsageError
            )
            raise kind("\n".join(opened.failed.values()) or "--tasks: expected a task, found none")
        with backend(who, setup) as model, answer_store.open_answer_store(book) as answers:
            runs, unsuited = run_each_task(who, opened, setup, model, answers, tell)
    if not runs[0]:
        raise EvaluationError("\n".join(unsuited.values()))
    done = tuple(task for task in opened.tasks if task.name not in unsuited)
    opened = replace(opened, tasks=done, failed=unsuited)
    return Asked(
        runs=tuple(tuple(run) for run in runs), items=tuple(samples.average(runs)), opened=opened,
        backend=identity(who, setup),
    )  # fmt: skip


def run_each_task(
    who: Subject,
    opened: Opened,
    setup: Setup,
    model: Backend,
    answers: answer_store.AnswerStore,
    tell: ProgressCallback,
) -> tuple[list[list[ItemResult]], dict[str, str]]:
    """The items of a run per seed, task by task, and the tasks that could not be asked, with the reason."""
    from quantkit.evaluate.lm_eval_adapter import LMEvalAdapter

    lasting = {
        name: value for name, value in identity(who, setup).items() if name != "endpoint"
    }  # a server may move
    key = hashlib.sha256(json.dumps(lasting, sort_keys=True, default=str).encode()).hexdigest()
    jail = sandbox.probe() if any(task.code for task in opened.tasks) else None
    runs: list[list[ItemResult]] = [[] for _ in range(setup.seeds)]
    unsuited = dict(opened.failed)
    for each in opened.single():
        found = []
        try:
            for seed in range(setup.seeds):
                setup.decoding.apply(each, seed)
                told_as = make_answer_callback(
                    tell, format_stage(who.name, each.tasks[0].name, seed, setup.seeds)
                )
                recorder = LMEvalAdapter(model, answers, key, told_as, setup.decoding.think_end)
                found.append(
                    benchmarks.ask(
                        recorder, each, limit=setup.limit, chat=setup.decoding.chat, sandbox=jail
                    )
                )
        except UnsuitedError as fault:
            unsuited[each.tasks[0].name] = str(fault)
        else:
            for run, new in zip(runs, found, strict=True):
                run += new
    return runs, unsuited


def format_stage(model: str, task: str, seed: int, seeds: int) -> str:
    """What progress is about."""
    return f"{model}, {task}" + (f", seed {seed + 1} of {seeds}" if seeds > 1 else "")


def make_answer_callback(tell: ProgressCallback, stage: str) -> Callable[[int, int], None]:
    """A recorder's progress under the name of its stage."""
    return lambda done, total: tell(Progress(stage=stage, done=done, total=total))


def run_source(
    who: Subject, names: Sequence[str], setup: Setup, tell: ProgressCallback
) -> list[ItemResult]:
    """A source's items: from the baselines of builds where they fit, else asked, with its own journal in the cache."""
    own, theirs, failed = harness.split(names)
    plain = (
        setup.decoding == Decoding() and setup.seeds == 1 and not (theirs or failed or setup.native)
    )
    key = ""
    if plain and who.folder is not None:
        jail = benchmarks.jail_for(own)
        device, dtype = chosen(setup)
        where = f"{dtype} on {device}"
        key = compare.baseline_key(Checkpoint.open(who.folder), own, setup.limit, where, jail)
        cached = samples.read_cached(user_cache.locate_folder(compare.BASELINES), key)
        if cached is not None:
            return cached
    items = [
        *run_evaluation(
            who,
            names,
            setup,
            user_cache.locate_folder(compare.BASELINES) / f"{who.hash[:16]}.sqlite",
            tell,
        ).items
    ]
    if key:
        samples.write_cached(user_cache.locate_folder(compare.BASELINES), key, items)
    return items


def chosen(setup: Setup) -> tuple[str, str]:
    """Device or device map, and dtype: what was asked for, else a GPU in bfloat16 where there is one, else float32."""
    import torch

    device = setup.device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, setup.dtype or ("float32" if device == "cpu" else "bfloat16")


def identity(who: Subject, setup: Setup) -> dict[str, object]:
    """Everything about the model and its backend that can change an answer; no secret, no path of this machine."""
    told: dict[str, object] = {"model": who.hash, "backend": setup.backend}
    if setup.server is not None:
        return told | {
            "endpoint": setup.server.url,
            "served": setup.server.model,
            "chat": setup.server.chat,
        }
    packages = ["torch", "transformers"]
    if setup.backend == "vllm":
        return told | {
            "engine": dict(setup.engine),
            "versions": {name: version(name) for name in ("vllm", *packages)},
        }
    device, dtype = chosen(setup)
    return told | {
        "device": device, "dtype": dtype, "weights": "native" if setup.native else "dequantized",
        "versions": {name: version(name) for name in packages},
    }  # fmt: skip


@contextmanager
def backend(who: Subject, setup: Setup) -> Iterator[Backend]:
    """The model behind the interface of recorded.Backend; its memory is free again afterwards."""
    if setup.server is not None:
        from quantkit.evaluate.endpoint import Endpoint

        yield Endpoint(setup.server, load_tokenizer(who.folder) if who.folder is not None else None)
        return
    assert who.folder is not None
    if setup.backend == "vllm":
        from quantkit.evaluate.backends import Vllm

        yield Vllm(who.folder, setup.engine)
        return
    from quantkit.evaluate.generation import LocalModel

    model = loaded(who, setup)
    try:
        yield LocalModel(model, load_tokenizer(who.folder), setup.batch_size)
    finally:
        del model
        gc.collect()


def loaded(who: Subject, setup: Setup) -> Any:
    """A transformers model: native, or with plain weights from quantkit's own reader."""
    import torch

    from quantkit.artifact.load_model import DTYPES, get_device, load_model
    from quantkit.evaluate import backends
    from quantkit.models import full_model
    from quantkit.models.layers import make_meta_model
    from quantkit.plan.plan import load_architecture

    assert who.folder is not None
    device, dtype = chosen(setup)
    if dtype not in DTYPES:
        raise UsageError(
            f"--dtype: expected {', '.join(DTYPES)}, found {dtype!r}; name one of them"
        )
    if setup.native:
        return backends.load_native_model(who.folder, dtype, device)
    spread = device in ("auto", "balanced", "sequential")
    first = "cpu" if spread else device
    if who.kind == "artifact":
        model = load_model(who.folder, device=first, dtype=dtype)
    else:
        source = Checkpoint.open(who.folder)
        layout = load_architecture(source.config).layout(source.config)
        bones = make_meta_model(source.config, get_device(first), getattr(torch, dtype))
        model = full_model.make_model(bones, layout, full_model.make_reader(source))
    return backends.dispatch_model(model, device) if spread else model


def settings(setup: Setup) -> dict[str, object]:
    """What the user chose, for results.json."""
    return {"limit": setup.limit, "seeds": setup.seeds, **asdict(setup.decoding)}
