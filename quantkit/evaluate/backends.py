"""Backends of `quantkit eval`: load the model in this process, or connect to a server."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from quantkit.artifact.load_model import DTYPES, get_device, load_model
from quantkit.checkpoint.checkpoint import Checkpoint, read_config
from quantkit.checkpoint.file_names import CONFIG
from quantkit.checkpoint.folder_rules import find_redirects
from quantkit.checkpoint.shards import open_shards
from quantkit.errors import CheckpointError, EvaluationError, UsageError
from quantkit.evaluate.options import EvaluationOptions
from quantkit.evaluate.target import EvaluationTarget
from quantkit.io.files import join_faults
from quantkit.models import full_model
from quantkit.models.layers import make_meta_model
from quantkit.plan.plan import load_architecture
from quantkit.texts.corpora import load_tokenizer

if TYPE_CHECKING:
    from quantkit.evaluate.lm_eval_adapter import Backend
    from quantkit.evaluate.openai_client import ServerOptions

DEVICE_MAPS = ("auto", "balanced", "sequential")
"""Device maps of accelerate, which place a model on several devices."""


@contextmanager
def open_backend(target: EvaluationTarget, options: EvaluationOptions) -> Iterator[Backend]:
    """Open the backend of the options; the model's memory is released afterwards."""
    if options.server is not None:
        from quantkit.evaluate.openai_backend import OpenAIBackend  # imports lm-eval: seconds

        tokenizer = load_tokenizer(target.folder) if target.folder is not None else None
        yield OpenAIBackend(options.server, tokenizer)
        return
    assert target.folder is not None
    if options.backend == "vllm":
        from quantkit.evaluate.vllm_backend import VllmBackend  # imports lm-eval: seconds

        yield VllmBackend(target.folder, options.engine)
        return
    from quantkit.evaluate.transformers_backend import TransformersBackend  # the same

    model = load_target_model(target, options)
    try:
        yield TransformersBackend(model, load_tokenizer(target.folder), options.batch_size)
    finally:
        del model
        gc.collect()


def connect_server(
    url: str,
    *,
    model: str,
    chat: bool,
    concurrency: int,
    tries: int,
    seconds: float,
    key_variable: str,
) -> ServerOptions:
    """Check an endpoint's URL and query its model's name if `model` is empty.

    See openai_client.ServerOptions.
    """
    if find_spec("openai") is None:
        raise UsageError(
            "--backend openai: expected OpenAI's client in this environment, found none; "
            "install quantkit[openai]"
        )
    from quantkit.evaluate.openai_client import ServerOptions, get_served_model, normalize_url

    server = ServerOptions(
        url=normalize_url(url),
        model=model,
        chat=chat,
        concurrency=concurrency,
        tries=tries,
        seconds=seconds,
        key_variable=key_variable,
    )
    return server if model else replace(server, model=get_served_model(server))


def describe_backend(target: EvaluationTarget, options: EvaluationOptions) -> dict[str, object]:
    """Return everything of model and backend that can change an answer; no secrets, no paths."""
    description: dict[str, object] = {"model": target.hash, "backend": options.backend}
    if options.server is not None:
        return description | {
            "endpoint": options.server.url,
            "served": options.server.model,
            "chat": options.server.chat,
        }
    packages = ["torch", "transformers"]
    if options.backend == "vllm":
        return description | {
            "engine": dict(options.engine),
            "versions": {name: version(name) for name in ("vllm", *packages)},
        }
    device, dtype = select_device_and_dtype(options)
    return description | {
        "device": device,
        "dtype": dtype,
        "weights": "native" if options.native else "dequantized",
        "versions": {name: version(name) for name in packages},
    }


def select_device_and_dtype(options: EvaluationOptions) -> tuple[str, str]:
    """Return device (or device map) and dtype; default: bfloat16 on a GPU, else float32 on CPU."""
    device = options.device_map or ("cuda" if torch.cuda.is_available() else "cpu")
    return device, options.dtype or ("float32" if device == "cpu" else "bfloat16")


def load_target_model(target: EvaluationTarget, options: EvaluationOptions) -> Any:
    """Load a transformers model, with native kernels or with weights dequantized by quantkit."""
    assert target.folder is not None
    device, dtype = select_device_and_dtype(options)
    if dtype not in DTYPES:
        raise UsageError(
            f"--dtype: expected {', '.join(DTYPES)}, found {dtype!r}; name one of them"
        )
    if options.native:
        return load_native_model(target.folder, dtype, device)
    is_spread = device in DEVICE_MAPS
    first_device = "cpu" if is_spread else device
    if target.kind == "artifact":
        model = load_model(target.folder, device=first_device, dtype=dtype)
    else:
        source = Checkpoint.open(target.folder, decode=True)
        layout = load_architecture(source.config, source.specs).layout(source.config)
        meta = make_meta_model(source.config, get_device(first_device), getattr(torch, dtype))
        model = full_model.make_model(
            meta, layout, full_model.make_reader(source.split_experts(layout.blocks))
        )
    return dispatch_model(model, device) if is_spread else model


def load_native_model(folder: Path, dtype: str, device_map: str) -> Any:
    """Load a folder with transformers and its format's kernels, placed by accelerate.

    device_map: "auto", "balanced", "sequential", or a device. Raises EvaluationError if
    transformers cannot load it, CheckpointError for a folder that it would read otherwise than
    other engines.
    """
    from transformers import AutoModelForCausalLM  # seconds to import

    open_shards(folder)  # one set of weights
    if faults := list(find_redirects(read_config(folder).values, str(folder / CONFIG))):
        raise CheckpointError(join_faults(faults))
    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder),
            use_safetensors=True,
            dtype=getattr(torch, dtype),
            device_map=device_map,
            local_files_only=True,
            trust_remote_code=False,
        ).eval()
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as error:
        message = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise EvaluationError(
            f"{folder}: transformers cannot load it ({message}); install the library of its "
            "format, or leave out --native"
        ) from None


def dispatch_model(model: Any, device_map: str) -> Any:
    """Dispatch a model in CPU memory to this machine's devices with accelerate."""
    accelerate: Any = import_module("accelerate")  # it has no types
    no_split = [*(getattr(model, "_no_split_modules", None) or ())]
    max_memory = None
    if device_map != "sequential":
        max_memory = accelerate.utils.get_balanced_memory(model, no_split_module_classes=no_split)
    planned = accelerate.infer_auto_device_map(
        model, max_memory=max_memory, no_split_module_classes=no_split
    )
    return accelerate.dispatch_model(model, device_map=planned)
