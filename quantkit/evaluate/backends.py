"""The models that answer in this process: transformers with weights unpacked or native, and vLLM.

Imported only when a benchmark runs: each backend's own library comes with it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError, UsageError
from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, GenerationParams, LogLikelihood

CHUNK = 256  # requests between two entries in the journal, for an engine that tells nothing before all are done


def load_native_model(folder: Path, dtype: str, device_map: str) -> Any:
    """The folder as transformers itself loads it, with the kernels of its format's library, placed by accelerate.

    device_map: "auto", "balanced", "sequential", or a device. EvaluationError when transformers cannot load it.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        return AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=getattr(torch, dtype), device_map=device_map, local_files_only=True,
            trust_remote_code=False,
        ).eval()  # fmt: skip
    except (ImportError, OSError, RuntimeError, ValueError, KeyError, AttributeError) as fault:
        said = " ".join(f"{type(fault).__name__}: {fault}".split())[:300]
        raise EvaluationError(
            f"{folder}: transformers cannot load it ({said}); install the library of its format, or leave out --native"
        ) from None


def dispatch_model(model: Any, device_map: str) -> Any:
    """A model in CPU memory spread over the devices of this machine as accelerate plans it."""
    accelerate: Any = import_module("accelerate")  # it has no types
    whole = [*(getattr(model, "_no_split_modules", None) or ())]
    room = None
    if device_map != "sequential":
        room = accelerate.utils.get_balanced_memory(model, no_split_module_classes=whole)
    planned = accelerate.infer_auto_device_map(
        model, max_memory=room, no_split_module_classes=whole
    )
    return accelerate.dispatch_model(model, device_map=planned)


class Vllm:
    """lm-eval's vLLM backend, asked in chunks so that what is finished is kept.

    It returns text alone: tokens are counted by the tokenizer, and an answer as long as its limit was cut.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, object]) -> None:
        if find_spec("vllm") is None:
            raise UsageError(
                "--backend vllm: expected vLLM in this environment, found none; install vllm, or start `vllm serve` "
                "and name it with --backend openai --endpoint http://HOST:8000/v1"
            )
        try:
            from lm_eval.models.vllm_causallms import VLLM
        except ImportError as fault:  # also for a build for CPUs that is called otherwise
            raise UsageError(
                f"--backend vllm: lm-eval cannot use this vLLM ({fault}); install vllm, or start `vllm serve` and name "
                "it with --backend openai --endpoint http://HOST:8000/v1"
            ) from None
        try:
            self._engine = VLLM(pretrained=str(folder), **arguments)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as fault:
            said = " ".join(str(fault).split())[:300]
            raise EvaluationError(
                f"{folder}: vLLM {version('vllm')} cannot serve it ({said}); see --engine"
            ) from None

    def generate(
        self,
        requests: Sequence[Any],
        finished: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None:
        """An answer per request, told chunk by chunk."""
        for start in range(0, len(requests), CHUNK):
            some = requests[start : start + CHUNK]
            texts = self._engine.generate_until(some, disable_tqdm=True)
            finished([
                (start + at, self._answer(*both))
                for at, both in enumerate(zip(some, texts, strict=True))
            ])

    def likelihoods(
        self,
        requests: Sequence[Any],
        finished: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None:
        """lm-eval's own, told chunk by chunk."""
        for start in range(0, len(requests), CHUNK):
            some = self._engine.loglikelihood(requests[start : start + CHUNK], disable_tqdm=True)
            finished([*enumerate(some, start)])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The tokenizer's template."""
        return str(self._engine.apply_chat_template(chat_history, add_generation_prompt))

    def _answer(self, request: Any, text: str) -> GeneratedAnswer:
        limit = GenerationParams.of(request.args[1], request.task_name).max_tokens
        n_tokens = len(self._engine.tok_encode(text, add_special_tokens=False))
        return GeneratedAnswer(text=text, n_tokens=n_tokens, truncated=n_tokens >= limit)
