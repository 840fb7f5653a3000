"""The plan of `quantkit serve`: engine, GPU, size and command. Nothing is started or loaded."""

from __future__ import annotations

import shutil
import subprocess
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from quantkit.errors import UsageError
from quantkit.io.host import get_available_memory
from quantkit.serve.engines.containers import (
    MODEL_MOUNT,
    TEMPLATE_MOUNT,
    KubernetesOptions,
    render_docker,
    render_kubernetes,
)
from quantkit.serve.engines.launch import (
    ENGINE_NAMES,
    Endpoint,
    Engine,
    Flag,
    Launch,
    fit_or_raise,
    make_launch,
)
from quantkit.serve.engines.target import Target, read_target
from quantkit.serve.sizing.gpus import Gpu, GpuCatalog, read_gpus
from quantkit.serve.sizing.memory import MemoryEstimate, estimate_memory
from quantkit.serve.sizing.model import KvDtype

DEFAULT_GPU = "h100"
"""The GPU of a plan if none is named and none is detected."""
UNPACKED_BYTES = 2  # transformers unpacks formats that it cannot run packed: bfloat16


@dataclass(frozen=True, kw_only=True)
class ServeOptions:
    """Options of `quantkit serve`. extra: arguments that are passed to the engine."""

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
    """The command to start, and the model it serves; `summary` explains it in sentences."""

    options: ServeOptions
    target: Target
    memory: MemoryEstimate
    launch: Launch
    summary: tuple[str, ...]


def plan_launch(options: ServeOptions, *, containers: bool = False) -> LaunchPlan:
    """Choose engine and GPU, estimate memory, and make the command."""
    target, catalog = read_target(options.artifact), read_gpus()
    memory = estimate_memory(target.model, options.context, options.users, options.kv)
    detected = None if options.gpu else detect_gpu(catalog)
    engine = choose_engine(options, target, detected, containers)
    summary = [
        f"{target.name}: {target.model.scheme}, {memory.weights_bytes / 1e9:,.2f} GB of weights"
    ]
    name = options.name or target.name
    if engine == "transformers":
        launch = make_transformers_launch(options, target, memory, name)
        summary.append("transformers on the CPU, one request at a time: for trying it out")
    else:
        gpu = catalog.get_gpu(options.gpu) if options.gpu else detected
        gpu = gpu or catalog.get_gpu(DEFAULT_GPU)
        if not options.gpu:
            hint = ", detected on this machine" if detected else "; choose yours with --gpu"
            summary.append(f"planned for {gpu.name}{hint}")
        check_gpu(gpu, engine, target, containers)
        host, path = ("0.0.0.0", MODEL_MOUNT) if containers else (options.host, target.path)
        endpoint = Endpoint(host=host, port=options.port, name=name, path=path)
        launch = make_launch(engine, target, memory, fit_or_raise(memory, gpu), endpoint)
        launch = replace(launch, flags=(*launch.flags, *make_extra_flags(options, containers)))
    if target.kind == "artifact":
        summary.append("starting verifies every file first; a dry run does not")
    return LaunchPlan(
        options=options, target=target, memory=memory, launch=launch, summary=tuple(summary)
    )


def make_extra_flags(options: ServeOptions, containers: bool) -> list[Flag]:
    """Return the flags that the operator added."""
    flags = []
    if options.chat_template is not None:
        template = TEMPLATE_MOUNT if containers else str(options.chat_template)
        flags.append(Flag(name="--chat-template", value=template, reason="an option"))
    return flags + [Flag(name=word, value="", reason="an option") for word in options.extra]


def choose_engine(
    options: ServeOptions, target: Target, detected: Gpu | None, containers: bool
) -> Engine:
    """Choose the engine. UsageError if the named engine, or every engine, cannot serve the model.

    auto: vLLM or SGLang if a GPU is named or detected, or if the model does not fit into this
    machine's memory; otherwise transformers on the CPU.
    """
    if options.engine != "auto":
        check_engine(options.engine, target)
        return options.engine
    unpacked_bytes = target.model.weights.parameters * UNPACKED_BYTES
    fits_memory = target.kind == "artifact" and unpacked_bytes < get_available_memory()
    if not (options.gpu or detected or containers) and fits_memory:
        return "transformers"
    engines: tuple[Engine, ...] = ("vllm", "sglang")
    usable = [
        engine
        for engine in engines
        if ENGINE_NAMES[engine] in target.engines and ENGINE_NAMES[engine] not in target.refused
    ]
    if not usable:
        raise UsageError(
            f"{target.name}: neither vLLM nor SGLang reads it; {describe_alternatives(target)}"
        )
    return next(filter(is_installed, usable), usable[0])


def check_engine(engine: Engine, target: Target) -> None:
    """Check that an engine can serve the model; UsageError with an alternative otherwise."""
    name = ENGINE_NAMES[engine]
    refusal = target.refused.get(name)
    if engine != "transformers" and (refusal or name not in target.engines):
        raise UsageError(
            f"{target.name}: {name}: {refusal or 'does not read this format'}; "
            f"{describe_alternatives(target)}"
        )
    if engine == "transformers" and target.kind != "artifact":
        raise UsageError(
            f"{target.name}: --engine transformers: expected an artifact, found none; build one"
        )


def describe_alternatives(target: Target) -> str:
    """Describe the engines that can serve the model."""
    engines = [
        name for name in target.engines if name not in target.refused and name != "transformers"
    ]
    if engines:
        return f"it is served by {', '.join(engines)}"
    return "serve it with --engine transformers"


def is_installed(engine: Engine) -> bool:
    """Return whether an engine is installed in this environment."""
    return shutil.which("vllm") is not None if engine == "vllm" else find_spec("sglang") is not None


def detect_gpu(catalog: GpuCatalog) -> Gpu | None:
    """Return the GPU that nvidia-smi reports, if the catalog has it."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    command = [program, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    try:
        output = subprocess.run(
            command, capture_output=True, text=True, timeout=10, check=True
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None
    first, _, memory = (output.splitlines() or [""])[0].rpartition(",")
    words = {
        word for word in first.replace("-", " ").lower().split() if any(c.isdigit() for c in word)
    }
    for gpu in catalog.gpus.values():
        has_same_memory = (
            memory.strip().isdigit() and abs(int(memory) * 2**20 / gpu.memory_bytes - 1) < 0.12
        )
        if has_same_memory and words & set(gpu.name.lower().split()):
            return gpu
    return None


def check_gpu(gpu: Gpu, engine: Engine, target: Target, containers: bool) -> None:
    """Check that the command runs on this GPU; UsageError otherwise."""
    if not gpu.served:
        advice = "use --engine transformers" if target.kind == "artifact" else "name another GPU"
        raise UsageError(f"--gpu: {gpu.name}: {ENGINE_NAMES[engine]} does not run on it; {advice}")
    if containers and not gpu.name.startswith("NVIDIA"):
        raise UsageError(
            f"--docker, --kubernetes: expected an NVIDIA GPU, found {gpu.name}; use --dry-run"
        )


def make_transformers_launch(
    options: ServeOptions, target: Target, memory: MemoryEstimate, name: str
) -> Launch:
    """Make the command of the transformers engine, a command of quantkit itself."""
    if options.extra:
        raise UsageError(
            f"{options.extra[0]}: the transformers engine takes no flags of its own; leave it out"
        )
    context = str(memory.context)
    flags = [
        Flag(name="--engine", value="transformers", reason="every format, by quantkit.load"),
        Flag(name="--name", value=name, reason="`model` in requests"),
        Flag(name="--context", value=context, reason="longest request, prompt and output"),
        Flag(name="--host", value=options.host, reason="address to listen on"),
        Flag(name="--port", value=str(options.port), reason="port to listen on"),
    ]
    if options.chat_template is not None:
        template = str(options.chat_template)
        flags.append(Flag(name="--chat-template", value=template, reason="an option"))
    notes = () if target.has_chat_template or options.chat_template else (
        "no chat template is stored: chat continues the text of the messages; "
        "set one with --chat-template FILE",
    )  # fmt: skip
    return Launch(
        engine="transformers",
        base=("quantkit", "serve", target.path),
        flags=tuple(flags),
        notes=notes,
    )


def render_containers(
    plan: LaunchPlan, *, docker: bool, kubernetes: bool, pull: str = ""
) -> list[str]:
    """Return the command in containers: a docker command, a Kubernetes manifest.

    pull: the address from which Kubernetes pulls the artifact; "" if its volume has the weights.
    """
    target, options = plan.target, plan.options
    folder = (
        str(Path(target.path).resolve()) if target.kind != "config" else f"/path/to/{target.name}"
    )
    template = str(options.chat_template.resolve()) if options.chat_template else ""
    texts = []
    if docker:
        texts.append(render_docker(plan.launch, folder, options.host, options.port, template))
    if kubernetes:
        manifest = KubernetesOptions(
            name=target.name, port=options.port, weights_bytes=plan.memory.weights_bytes,
            template=template, pull=pull,
        )  # fmt: skip
        texts.append(render_kubernetes(plan.launch, manifest))
    return texts


def serialize_plan(plan: LaunchPlan) -> dict[str, Any]:
    """Return the plan as plain values for JSON."""
    placement = plan.launch.placement
    return {
        "artifact": plan.target.name,
        "engine": plan.launch.engine,
        "commands": [plan.launch.get_command(node) for node in range(len(plan.launch.per_node))],
        "flags": [
            {"name": flag.name, "value": flag.value, "why": flag.reason}
            for flag in plan.launch.flags
        ],
        "context": plan.memory.context,
        "users": plan.memory.users,
        "weights_bytes": plan.memory.weights_bytes,
        "kv_bytes": plan.memory.kv_bytes,
        "tensor_parallel": placement.tp if placement else None,
        "pipeline_parallel": placement.pp if placement else None,
        "nodes": placement.nodes if placement else None,
        "notes": [*plan.summary, *plan.launch.notes],
    }
