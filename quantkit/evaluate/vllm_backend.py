"""vLLM as a backend, through lm-eval.

Imported only when a benchmark runs: lm-eval takes seconds to import.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from quantkit.errors import EvaluationError, UsageError
from quantkit.evaluate.lm_eval_adapter import GeneratedAnswer, GenerationParams, LogLikelihood
from quantkit.io.templates import TemplateWorker
from quantkit.texts.chat_templates import render_prompt

CHUNK_SIZE = 256
"""Requests per call; answers are stored between calls."""

_SERVE_HINT = "start `vllm serve` and name it with --backend openai --endpoint http://HOST:8000/v1"


class VllmBackend:
    """lm-eval's vLLM backend, called in chunks so that finished answers are kept.

    It returns only text: the tokenizer counts tokens, and an answer as long as its limit counts as
    truncated.
    """

    def __init__(self, folder: Path, arguments: Mapping[str, object]) -> None:
        if find_spec("vllm") is None:
            raise UsageError(
                "--backend vllm: expected vLLM in this environment, found none; install vllm, or "
                f"{_SERVE_HINT}"
            )
        try:
            from lm_eval.models.vllm_causallms import VLLM
        except ImportError as error:  # also for CPU builds, whose package has another name
            raise UsageError(
                f"--backend vllm: lm-eval cannot use this vLLM ({error}); install vllm, or "
                f"{_SERVE_HINT}"
            ) from None
        try:
            self._engine = VLLM(pretrained=str(folder), **arguments)
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            message = " ".join(str(error).split())[:300]
            raise EvaluationError(
                f"{folder}: vLLM {version('vllm')} cannot serve it ({message}); see --engine"
            ) from None
        self._templates = TemplateWorker()

    def generate(
        self,
        requests: Sequence[Any],
        on_answers: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None:
        """Generate one answer per request; `on_answers` is called chunk by chunk."""
        for start in range(0, len(requests), CHUNK_SIZE):
            chunk = requests[start : start + CHUNK_SIZE]
            texts = self._engine.generate_until(chunk, disable_tqdm=True)
            answers = [
                self._make_answer(request, text) for request, text in zip(chunk, texts, strict=True)
            ]
            on_answers([*enumerate(answers, start)])

    def compute_likelihoods(
        self,
        requests: Sequence[Any],
        on_answers: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None:
        """Compute log-likelihoods with lm-eval's code; `on_answers` is called per chunk."""
        for start in range(0, len(requests), CHUNK_SIZE):
            chunk = requests[start : start + CHUNK_SIZE]
            on_answers([*enumerate(self._engine.loglikelihood(chunk, disable_tqdm=True), start)])

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Apply the tokenizer's chat template, with limits."""
        return render_prompt(
            self._templates,
            self._engine.tokenizer,
            chat_history,
            is_finished=add_generation_prompt,
            template=self._engine.hf_chat_template,
            settings={
                "enable_thinking": self._engine.enable_thinking,
                **self._engine.chat_template_args,
            },
        )

    def _make_answer(self, request: Any, text: str) -> GeneratedAnswer:
        limit = GenerationParams.from_kwargs(request.args[1], request.task_name).max_tokens
        n_tokens = len(self._engine.tok_encode(text, add_special_tokens=False))
        return GeneratedAnswer(text=text, n_tokens=n_tokens, truncated=n_tokens >= limit)
