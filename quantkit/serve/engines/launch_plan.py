"""From the options of `quantkit serve` to a command: which engine, which card, how large. Starts and loads nothing."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import UsageError
from quantkit.io.host import get_available_memory
from quantkit.serve.engines.containers import MODEL, TEMPLATE, docker_text, kubernetes_text
from quantkit.serve.engines.launch import SHOWN, Engine, Flag, Launch, Place, fit_of, launch
from quantkit.serve.engines.target import Target, read_target
from quantkit.serve.sizing.gpus import Gpu, GpuCatalog, read_gpus
from quantkit.serve.sizing.memory import MemoryEstimate, estimate_memory
from quantkit.serve.sizing.model import KvDtype

REFERENCE = "h100"
"""The card that a command is reckoned for when none is named and none is here."""
UNPACKED_BYTES = 2  # transformers unpacks what it cannot run packed: bfloat16


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """What was asked for."""

    artifact: str
    engine: Literal["auto", "vllm", "sglang", "transformers"]
    context: int | None
    users: int
    gpu: str | None
    kv: KvDtype
    host: str
    port: int
    name: str
    chat_template: Path | None
    extra: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class LaunchPlan:
    """What will be started, and why: `head` says it in sentences."""

    wanted: ServeOptions
    target: Target
    needs: MemoryEstimate
    launch: Launch
    head: tuple[str, ...]


def plan_launch(wanted: ServeOptions, *, containers: bool = False) -> LaunchPlan:
    """Choose engine and card, size, and write the command; starts nothing, loads nothing."""
    target, cards = read_target(wanted.artifact), read_gpus()
    needed = estimate_memory(target.model, wanted.context, wanted.users, wanted.kv)
    found = None if wanted.gpu else card_here(cards)
    engine = chosen(wanted, target, needed, found, containers)
    head = [
        f"{target.name}: {target.model.scheme}, {needed.weights_bytes / 1e9:,.2f} GB of weights"
    ]
    name = wanted.name or target.name
    if engine == "transformers":
        made = small(wanted, target, needed, name)
        head.append(
            "transformers runs it on the CPU, one request after the other: for trying it out"
        )
    else:
        card = cards.named(wanted.gpu) if wanted.gpu else found or cards.named(REFERENCE)
        if not wanted.gpu:
            head.append(
                f"reckoned for {card.name}"
                + (", found here" if found else "; name yours with --gpu")
            )
        refuse_card(card, engine, target, containers)
        host, path = ("0.0.0.0", MODEL) if containers else (wanted.host, target.path)
        place = Place(host=host, port=wanted.port, name=name, path=path)
        made = launch(engine, target, needed, fit_of(needed, card), place)
        made = replace(made, flags=(*made.flags, *asked_flags(wanted, containers)))
    if target.kind == "artifact":
        head.append("a start verifies every file first; a dry run does not")
    return LaunchPlan(wanted=wanted, target=target, needs=needed, launch=made, head=tuple(head))


def asked_flags(wanted: ServeOptions, containers: bool) -> list[Flag]:
    """What the operator added."""
    made = []
    if wanted.chat_template is not None:
        place = TEMPLATE if containers else str(wanted.chat_template)
        made.append(Flag(name="--chat-template", value=place, why="as asked"))
    return made + [Flag(name=word, value="", why="as asked") for word in wanted.extra]


def chosen(
    wanted: ServeOptions,
    target: Target,
    needed: MemoryEstimate,
    found: Gpu | None,
    containers: bool,
) -> Engine:
    """The engine: the one that was asked for if it can serve this, else by what is here.

    auto: vLLM or SGLang where a card is named or found, or where the model does not fit into this machine's memory;
    transformers on the CPU otherwise.
    """
    if wanted.engine != "auto":
        shown = SHOWN[wanted.engine]
        refusal = target.refused.get(shown)
        if wanted.engine != "transformers" and (refusal or shown not in target.engines):
            raise UsageError(
                f"{target.name}: {shown}: {refusal or 'does not read this format'}; {able(target)}"
            )
        if wanted.engine == "transformers" and target.kind != "artifact":
            raise UsageError(
                f"{target.name}: --engine transformers: expected an artifact, found none; build one"
            )
        return wanted.engine
    unpacked = target.model.weights.parameters * UNPACKED_BYTES
    small_enough = target.kind == "artifact" and unpacked < get_available_memory()
    if not (wanted.gpu or found or containers) and small_enough:
        return "transformers"
    engines: tuple[Engine, ...] = ("vllm", "sglang")
    able_ones = [
        name
        for name in engines
        if SHOWN[name] in target.engines and SHOWN[name] not in target.refused
    ]
    here = [name for name in able_ones if installed(name)]
    if not able_ones:
        raise UsageError(f"{target.name}: neither vLLM nor SGLang reads it; {able(target)}")
    return (here or able_ones)[0]


def able(target: Target) -> str:
    """What else could be asked for."""
    left = [
        name for name in target.engines if name not in target.refused and name != "transformers"
    ]
    return f"it is served by {', '.join(left)}" if left else "serve it with --engine transformers"


def installed(engine: Engine) -> bool:
    """Whether an engine's command is in this environment."""
    return shutil.which("vllm") is not None if engine == "vllm" else find_spec("sglang") is not None


def card_here(cards: GpuCatalog) -> Gpu | None:
    """The card that nvidia-smi tells, when the data file knows it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    words = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(words, capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    first, _, memory = (told.splitlines() or [""])[0].rpartition(",")
    names = {
        word for word in first.replace("-", " ").lower().split() if any(c.isdigit() for c in word)
    }
    for card in cards.cards.values():
        known = set(card.name.lower().split())
        same_size = (
            memory.strip().isdigit() and abs(int(memory) * 2**20 / card.memory_bytes - 1) < 0.12
        )
        if same_size and names & known:
            return card
    return None


def refuse_card(card: Gpu, engine: Engine, target: Target, containers: bool) -> None:
    """UsageError for cards that the command would not run on."""
    if not card.served:
        other = "use --engine transformers" if target.kind == "artifact" else "name another card"
        raise UsageError(f"--gpu: {card.name}: {SHOWN[engine]} does not run there; {other}")
    if containers and not card.name.startswith("NVIDIA"):
        raise UsageError(
            f"--docker, --kubernetes: written for NVIDIA cards, found {card.name}; use --dry-run"
        )


def small(wanted: ServeOptions, target: Target, needed: MemoryEstimate, name: str) -> Launch:
    """The transformers engine, a command of this program."""
    if wanted.extra:
        raise UsageError(
            f"{wanted.extra[0]}: the transformers engine takes no flags of its own; leave it out"
        )
    flags = [
        Flag(name="--engine", value="transformers", why="every format, unpacked by quantkit.load"),
        Flag(name="--name", value=name, why="what clients write as `model`"),
        Flag(name="--context", value=str(needed.context), why="longest request, prompt and answer"),
        Flag(name="--host", value=wanted.host, why="where it listens"),
        Flag(name="--port", value=str(wanted.port), why="where it listens"),
    ]
    if wanted.chat_template is not None:
        flags.append(Flag(name="--chat-template", value=str(wanted.chat_template), why="as asked"))
    notes = () if target.chat or wanted.chat_template else (
        "no chat template is stored: chat goes on with the messages' text; --chat-template FILE gives one",
    )  # fmt: skip
    return Launch(
        engine="transformers",
        base=("quantkit", "serve", target.path),
        flags=tuple(flags),
        notes=notes,
    )


def render_containers(made: LaunchPlan, *, docker: bool, kubernetes: bool) -> list[str]:
    """The command in containers."""
    target, wanted = made.target, made.wanted
    folder = (
        str(Path(target.path).resolve()) if target.kind != "config" else f"/path/to/{target.name}"
    )
    template = str(wanted.chat_template.resolve()) if wanted.chat_template else ""
    texts = [docker_text(made.launch, folder, wanted.host, wanted.port, template)] if docker else []
    return texts + (
        [kubernetes_text(made.launch, target.name, wanted.port, template)] if kubernetes else []
    )


def serialize_plan(made: LaunchPlan) -> dict[str, Any]:
    """The plan for machines."""
    placement = made.launch.placement
    return {
        "artifact": made.target.name,
        "engine": made.launch.engine,
        "commands": [made.launch.words(node) for node in range(len(made.launch.per_node))],
        "flags": [
            {"name": flag.name, "value": flag.value, "why": flag.why} for flag in made.launch.flags
        ],
        "context": made.needs.context,
        "users": made.needs.users,
        "weights_bytes": made.needs.weights_bytes,
        "kv_bytes": made.needs.kv_bytes,
        "tensor_parallel": placement.tp if placement else None,
        "pipeline_parallel": placement.pp if placement else None,
        "nodes": placement.nodes if placement else None,
        "notes": [*made.head, *made.launch.notes],
    }
