"""Adapter between lm-eval and a backend that reuses stored answers and stores new ones.

Imported only when a benchmark runs: lm-eval takes seconds to import.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import handle_non_serializable, hash_string

from quantkit.errors import UnsuitedError, UsageError
from quantkit.evaluate.answer_store import AnswerKey, AnswerStore, StoredValue
from quantkit.io.templates import TemplateFault

AnswerCallback = Callable[[int, int], None]
"""Called with the number of complete answers and the number of all answers."""

DEFAULT_MAX_TOKENS = 256  # of a task that sets no limit; lm-eval's own


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAnswer:
    """Text before the stop string, and the number of tokens including the one that stopped it.

    `truncated`: neither EOS nor a stop string came within the limit.
    """

    text: str
    n_tokens: int
    truncated: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class GenerationParams:
    """A task's generation_kwargs, checked. Temperature 0 is greedy."""

    task: str
    until: tuple[str, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    @property
    def group_key(self) -> tuple[str, int]:
        """Requests with equal keys may share a batch."""
        return self.task, self.max_tokens

    @classmethod
    def from_kwargs(cls, kwargs: Mapping[str, Any], task: str) -> GenerationParams:
        """Check generation_kwargs. Raises UnsuitedError for values that no backend supports."""
        until, limit = kwargs.get("until", []), kwargs.get("max_gen_toks", DEFAULT_MAX_TOKENS)
        if not isinstance(limit, int) or limit < 1:
            raise UnsuitedError(
                f"{task}: generation_kwargs.max_gen_toks: expected a whole number of 1 or more, "
                f"found {limit!r}; set a number of tokens"
            )
        strings = [until] if isinstance(until, str) else until
        stop_strings = tuple(string for string in strings if string)
        if not kwargs.get("do_sample"):
            return cls(task=task, until=stop_strings, max_tokens=limit)
        temperature = kwargs.get("temperature")
        if not isinstance(temperature, int | float) or temperature <= 0:
            raise UnsuitedError(
                f"{task}: generation_kwargs.temperature: expected more than 0 with do_sample, "
                f"found {temperature!r}; set a temperature"
            )
        return cls(
            task=task,
            until=stop_strings,
            max_tokens=limit,
            temperature=temperature,
            top_p=kwargs.get("top_p", 1.0),
            seed=kwargs.get("seed", 0),
        )


LogLikelihood = tuple[float, bool]
"""Log probability of a continuation in nats, and whether greedy decoding would generate it."""


class Backend(Protocol):
    """A model that answers requests.

    `on_answers` is called with (index of the request, answer) pairs as soon as they are complete.
    """

    def generate(
        self,
        requests: Sequence[Instance],
        on_answers: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None: ...

    def compute_likelihoods(
        self,
        requests: Sequence[Instance],
        on_answers: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None: ...

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str: ...


StoreCallback = Callable[[Sequence[tuple[int, StoredValue]]], None]


class LMEvalAdapter(LM):  # type: ignore[misc]  # lm-eval is untyped
    """A backend with lm-eval's interface. `answers` keeps generated answers by (task, doc_id).

    model_key: the hash under which answers are stored; think_end: the text that ends a reasoning
    model's thoughts. Only the text after it is scored, and stop strings do not end the thoughts.
    readers: task -> the scored part of an answer; `answers` keeps the whole.
    """

    def __init__(
        self,
        backend: Backend,
        store: AnswerStore,
        model_key: str,
        on_answers: AnswerCallback | None = None,
        think_end: str = "",
        readers: Mapping[str, Callable[[str], str]] | None = None,
    ) -> None:
        super().__init__()
        self._readers = dict(readers or {})
        self.answers: dict[tuple[str, int], GeneratedAnswer] = {}
        self._backend, self._store, self._model_key = backend, store, model_key
        self._on_answers, self._think_end = on_answers, think_end

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Return one text per request, in the order of the requests."""
        sent = (
            [_remove_stop_strings(request) for request in requests] if self._think_end else requests
        )

        def run(missing: Sequence[int], store: StoreCallback) -> None:
            self._backend.generate(
                [sent[index] for index in missing],
                lambda answers: store([
                    (missing[index], [answer.text, answer.n_tokens, answer.truncated])
                    for index, answer in answers
                ]),
            )

        settings = [json.dumps(request.args[1], sort_keys=True) for request in sent]
        values = self._complete_answers(self._make_keys(sent, settings), run)
        texts = []
        for request, (stored, n_tokens, truncated) in zip(requests, values, strict=True):
            text = str(stored)
            if self._think_end:
                text = self._remove_thoughts(text, request.args[1])
            self.answers[request.task_name, request.doc_id] = GeneratedAnswer(
                text=text, n_tokens=int(str(n_tokens)), truncated=bool(truncated)
            )
            reader = self._readers.get(request.task_name)
            texts.append(text if reader is None else reader(text))
        return texts

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[LogLikelihood]:
        """Return (log probability, is greedy) per request, in the order of the requests."""

        def run(missing: Sequence[int], store: StoreCallback) -> None:
            self._backend.compute_likelihoods(
                [requests[index] for index in missing],
                lambda answers: store([(missing[index], [*answer]) for index, answer in answers]),
            )

        settings = [json.dumps(request.args[1]) for request in requests]
        values = self._complete_answers(self._make_keys(requests, settings), run)
        return [(float(str(nats)), bool(is_greedy)) for nats, is_greedy in values]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Refuse tasks that measure the perplexity of whole texts."""
        raise UnsuitedError(
            f"{requests[0].task_name}: it measures perplexity, which has no score per item; see "
            "the fidelity report for perplexity"
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Apply the backend's chat template."""
        try:
            return self._backend.apply_chat_template(chat_history, add_generation_prompt)
        except TemplateFault as fault:
            advice = "leave out --chat-template"
            raise UsageError(
                f"the model's chat template gives no text: {fault}; {advice}"
            ) from None
        except ValueError as error:
            message = " ".join(str(error).split())[:120]
            raise UsageError(
                "--chat-template: expected a chat template in the model's tokenizer, found none "
                f"({message}); leave it out"
            ) from None

    @property
    def tokenizer_name(self) -> str:
        """The key of lm-eval's cache of prompts, which is not used."""
        return ""

    def _complete_answers(
        self, keys: Sequence[AnswerKey], run: Callable[[Sequence[int], StoreCallback], None]
    ) -> list[StoredValue]:
        """Return one value per key: from the store, or run on the backend and stored."""
        values = [self._store.get(key) for key in keys]
        missing = [index for index, value in enumerate(values) if value is None]
        pending = set(missing)

        def store(answers: Sequence[tuple[int, StoredValue]]) -> None:
            self._store.put([(keys[index], value) for index, value in answers])
            for index, value in answers:
                values[index] = value
                pending.discard(index)
            if self._on_answers is not None:
                self._on_answers(len(values) - len(pending), len(values))

        store([])  # reports the answers of an earlier run as well
        if missing:
            run(missing, store)
        return [value for value in values if value is not None]

    def _make_keys(self, requests: Sequence[Instance], settings: Sequence[str]) -> list[AnswerKey]:
        """Return each request's key, with hashes as lm-eval computes them.

        Equal requests are numbered.
        """
        counts: Counter[tuple[str, str, str, str]] = Counter()
        keys = []
        for request, setting in zip(requests, settings, strict=True):
            doc = json.dumps(
                request.doc, indent=2, default=handle_non_serializable, ensure_ascii=False
            )
            key = (
                str(request.task_name),
                hash_string(doc),
                hash_string(request.args[0]),
                setting,
            )
            keys.append(AnswerKey(*key, self._model_key, counts[key]))
            counts[key] += 1
        return keys

    def _remove_thoughts(self, text: str, kwargs: Mapping[str, Any]) -> str:
        """Return the text after the last thought, up to a stop string.

        Empty if the thought did not end.
        """
        _, mark, spoken = text.rpartition(self._think_end)
        until = kwargs.get("until", [])
        for stop in [until] if isinstance(until, str) else until:
            spoken = spoken.split(stop)[0] if stop else spoken
        return spoken if mark else ""


def _remove_stop_strings(request: Instance) -> Instance:
    kwargs = {**request.args[1], "until": []}
    metadata = (request.task_name, request.doc_id, request.repeats)
    return Instance(
        request.request_type, request.doc, (request.args[0], kwargs), request.idx, metadata
    )
