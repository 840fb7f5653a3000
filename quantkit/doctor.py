"""Checks of the environment: what works here, what does not, and what that disables.

A check is "ok"; "note", something optional that is absent, with its effect; or "broken",
something that quantkit needs.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement
from pydantic import BaseModel, ConfigDict

from quantkit.errors import QuantkitError
from quantkit.evaluate.sandbox import probe_sandbox
from quantkit.io.files import get_free_bytes
from quantkit.io.host import get_available_memory, has_bfloat16_instructions
from quantkit.plan.choose_texts import find_missing_files
from quantkit.texts.corpus_spec import DATA_VARIABLE
from quantkit.texts.hub_access import find_hub_fault
from quantkit.version import __version__

State = Literal["ok", "note", "broken"]

EXTRAS: Mapping[str, str] = {
    "bitsandbytes": "format bitsandbytes (method nf4)",
    "gcs": "publishing to and pulling from gs://",
    "mlflow": "build and report with --log-to mlflow",
    "math": "the benchmark minerva_math",
    "oci": "publishing to and pulling from oci://",
    "openai": "quantkit eval --backend openai",
    "s3": "publishing to and pulling from s3://",
    "sentencepiece": "models whose tokenizer is a tokenizer.model alone",
    "serve": "quantkit serve with --gateway or the transformers engine",
    "sign": "quantkit sign, and checks of signatures",
    "wandb": "build and report with --log-to wandb",
}
"""Extra -> feature that it enables."""
ENGINES = {"vllm": "vLLM", "sglang": "SGLang", "guidellm": "GuideLLM"}
"""Module -> program that quantkit starts; installed separately."""
LEAST_PYTHON = (3, 11)
LEAST_MEMORY = 2 * 10**9
"""A build of a small model needs about 1 GB."""


class Check(BaseModel):
    """One check. effect: what to know or do; "" if there is nothing."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    state: State
    value: str
    effect: str = ""


def check_environment(folder: Path) -> tuple[Check, ...]:
    """Return all checks; `folder` is where artifacts will be written.

    Asks the hub and starts a sandbox: seconds. Contains no token.
    """
    return (
        check_python(),
        *check_packages(),
        *check_extras(),
        *check_engines(),
        check_torch(),
        check_bfloat16(),
        check_memory(),
        check_disk(folder),
        check_sandbox(),
        check_hub(),
        check_login(),
        check_data(),
    )


def check_python() -> Check:
    """Check the version of Python."""
    supported = sys.version_info >= LEAST_PYTHON
    return Check(
        name="Python",
        state="ok" if supported else "broken",
        value=f"{platform.python_version()}, {platform.system()} {platform.machine()}",
        effect="" if supported else "use 3.11 or newer",
    )


# ----------------------------------------------------------------------------------------- packages


def read_requirements() -> tuple[Requirement, ...]:
    """Return the requirements of the installed quantkit; none if only its source is there."""
    try:
        return tuple(map(Requirement, importlib.metadata.requires("quantkit") or ()))
    except importlib.metadata.PackageNotFoundError:
        return ()


def find_requirement_fault(requirement: Requirement) -> str | None:
    """Return why a requirement is not met, or None."""
    try:
        installed = importlib.metadata.version(requirement.name)
    except importlib.metadata.PackageNotFoundError:
        return f"{requirement.name}: expected {requirement.specifier}, found none"
    if requirement.specifier.contains(installed, prereleases=True):
        return None
    return f"{requirement.name}: expected {requirement.specifier}, found {installed}"


def check_packages() -> Iterator[Check]:
    """Check quantkit's dependencies: one row if all are met, else one per fault."""
    needed = [item for item in read_requirements() if item.marker is None]
    if not needed:
        yield Check(
            name="packages",
            state="note",
            value=f"quantkit {__version__} is not installed, only on the path",
            effect="versions are not checked; pip install .",
        )
        return
    faults = [fault for item in needed if (fault := find_requirement_fault(item))]
    for fault in faults:
        yield Check(
            name="package", state="broken", value=fault, effect="pip install --upgrade quantkit"
        )
    if not faults:
        yield Check(
            name="packages",
            state="ok",
            value=f"quantkit {__version__}; {len(needed)} dependencies at supported versions",
        )


def check_extras() -> Iterator[Check]:
    """Check which extras are installed; an extra that is not disables something."""
    requirements = [item for item in read_requirements() if item.marker is not None]
    for extra, purpose in EXTRAS.items():
        needed = [
            item
            for item in requirements
            if item.marker and item.marker.evaluate({"extra": extra})
            and not item.marker.evaluate({"extra": ""})
        ]  # fmt: skip
        if not needed:
            continue
        faults = [fault for item in needed if (fault := find_requirement_fault(item))]
        yield Check(
            name=f"extra {extra}",
            state="note" if faults else "ok",
            value="; ".join(faults) or "installed",
            effect=f"without it: no {purpose}; pip install 'quantkit[{extra}]'" if faults else "",
        )


def check_engines() -> Iterator[Check]:
    """Check which engines and load generators are installed in this environment."""
    for module, name in ENGINES.items():
        has_module = find_spec(module) is not None
        yield Check(
            name=name,
            state="ok" if has_module else "note",
            value="installed" if has_module else "not in this environment",
            effect="" if has_module else "install it separately, here or where you serve",
        )


# ------------------------------------------------------------------------------------------ machine


def check_torch() -> Check:
    """Check that torch loads, and name its threads and devices."""
    try:
        import torch  # takes seconds
    except (ImportError, OSError) as error:
        return Check(
            name="torch", state="broken", value=str(error)[:200], effect="install torch again"
        )
    names = [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())]
    capability = torch.backends.cpu.get_cpu_capability()
    parts = (torch.__version__, f"{torch.get_num_threads()} threads", f"CPU {capability}")
    return Check(
        name="torch",
        state="ok",
        value=", ".join([*parts, *(names or ["no GPU"])]),
        effect="" if names else "builds run on the CPU; large models take hundreds of core-hours",
    )


def check_bfloat16() -> Check:
    """Check whether the CPU multiplies bfloat16 in hardware."""
    has_products = has_bfloat16_instructions()
    return Check(
        name="bfloat16",
        state="ok" if has_products else "note",
        value="AVX512-BF16 or AMX" if has_products else "no instructions",
        effect="" if has_products else "the calibration stream is float32 on this CPU: slower",
    )


def check_memory() -> Check:
    """Check the memory that a build may use."""
    available = get_available_memory()
    return Check(
        name="memory",
        state="ok" if available >= LEAST_MEMORY else "note",
        value=f"{available / 1e9:.1f} GB available",
        effect="" if available >= LEAST_MEMORY else "a build of a small model needs about 1 GB",
    )


def check_disk(folder: Path) -> Check:
    """Check the space and the permission to write artifacts to a folder."""
    writable = os.access(folder, os.W_OK)
    return Check(
        name="disk",
        state="ok" if writable else "note",
        value=f"{get_free_bytes(folder) / 1e9:.1f} GB free in {folder}",
        effect="" if writable else "the folder is not writable; builds need --output DIR",
    )


def check_sandbox() -> Check:
    """Check the sandbox of benchmarks that run code."""
    sandbox = probe_sandbox()
    if sandbox.kind == "none":
        return Check(
            name="sandbox",
            state="note",
            value=sandbox.reason[:300],
            effect="no benchmarks that run code (humaneval, mbpp); install bubblewrap",
        )
    return Check(
        name="sandbox",
        state="ok",
        value=f"{sandbox.kind}, Python {sandbox.python}, memory limit {sandbox.memory}",
    )


# ------------------------------------------------------------------------------------ hub and data


def check_hub() -> Check:
    """Check whether the hub's data sets can be read."""
    fault = find_hub_fault()
    return Check(
        name="hub",
        state="note" if fault else "ok",
        value=fault or "answers",
        effect="models must be folders, and `set: auto` stands for local or built-in text"
        if fault
        else "",
    )


def check_login() -> Check:
    """Check whether a token of the hub is stored; it is neither printed nor sent."""
    from huggingface_hub import get_token  # takes a second

    has_token = get_token() is not None
    return Check(
        name="hub login",
        state="ok" if has_token else "note",
        value="a token is stored (not checked)" if has_token else "no token",
        effect="" if has_token else "no gated models, no publishing to hf://; `hf auth login`",
    )


def check_data() -> Check:
    """Check the folder of local texts, QUANTKIT_DATA."""
    folder = os.environ.get(DATA_VARIABLE)
    missing = _describe_failure(find_missing_files)
    return Check(
        name=DATA_VARIABLE,
        state="note" if missing else "ok",
        value=folder or "not set",
        effect=f"no mixture of local files: {missing}" if missing else "",
    )


def _describe_failure(check: Callable[[], str]) -> str:
    """Return the result of a check, or the message of its error."""
    try:
        return check()
    except QuantkitError as error:
        return str(error)
