"""lm-eval's side of every backend: what is in the journal is not asked again, what is new goes there at once.

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

AnswerCallback = Callable[[int, int], None]
"""Called with the number of answers that are complete, and of all."""

DEFAULT_MAX_TOKENS = 256  # of a task that names no limit; lm-eval's own


@dataclass(frozen=True, kw_only=True, slots=True)
class GeneratedAnswer:
    """What a model wrote: text before the stop string, tokens including the one that stopped it.

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
    def key(self) -> tuple[str, int]:
        """What requests are grouped by."""
        return self.task, self.max_tokens

    @classmethod
    def of(cls, kwargs: Mapping[str, Any], task: str) -> GenerationParams:
        until, limit = kwargs.get("until", []), kwargs.get("max_gen_toks", DEFAULT_MAX_TOKENS)
        if not isinstance(limit, int) or limit < 1:
            raise UnsuitedError(
                f"{task}: generation_kwargs.max_gen_toks: expected a whole number, found {limit!r}"
            )
        strings = tuple(
            string for string in ([until] if isinstance(until, str) else until) if string
        )
        if not kwargs.get("do_sample"):
            return cls(task=task, until=strings, max_tokens=limit)
        temperature, top_p = kwargs.get("temperature"), kwargs.get("top_p", 1.0)
        if not isinstance(temperature, int | float) or temperature <= 0:
            raise UnsuitedError(
                f"{task}: generation_kwargs.temperature: expected more than 0 with do_sample, found {temperature!r}; "
                "name a temperature"
            )
        return cls(
            task=task, until=strings, max_tokens=limit, temperature=temperature, top_p=top_p, seed=kwargs.get("seed", 0)
        )  # fmt: skip


LogLikelihood = tuple[float, bool]
"""Log probability of a continuation in nats, and whether greedy decoding would write it."""


class Backend(Protocol):
    """A model that answers; `finished` is called with (place of the request, answer) as soon as answers are there."""

    def generate(
        self,
        requests: Sequence[Instance],
        finished: Callable[[Sequence[tuple[int, GeneratedAnswer]]], None],
    ) -> None: ...

    def likelihoods(
        self,
        requests: Sequence[Instance],
        finished: Callable[[Sequence[tuple[int, LogLikelihood]]], None],
    ) -> None: ...

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str: ...


class LMEvalAdapter(LM):  # type: ignore[misc]  # lm-eval is untyped
    """A backend as lm-eval asks it. `answers` keeps what was written, by (task, doc_id).

    model: the hash under which answers are stored; think_end: the text after which a reasoning model's answer starts;
    what comes before is not scored, and stop strings do not end it.
    """

    def __init__(
        self,
        backend: Backend,
        journal: AnswerStore,
        model: str,
        progress: AnswerCallback | None = None,
        think_end: str = "",
    ) -> None:
        super().__init__()
        self.answers: dict[tuple[str, int], GeneratedAnswer] = {}
        self._backend, self._journal, self._model = backend, journal, model
        self._progress, self._think_end = progress, think_end

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """One text per request, in the order of the requests."""
        asked = [self._unstopped(request) if self._think_end else request for request in requests]

        def ask(
            missing: Sequence[int], store: Callable[[Sequence[tuple[int, StoredValue]]], None]
        ) -> None:
            self._backend.generate(
                [asked[index] for index in missing],
                lambda some: store([
                    (missing[at], [a.text, a.n_tokens, a.truncated]) for at, a in some
                ]),
            )

        questions = _questions(
            asked, [json.dumps(request.args[1], sort_keys=True) for request in asked]
        )
        values = self._complete(questions, ask)
        texts = []
        for request, (text, n_tokens, truncated) in zip(requests, values, strict=True):
            shown = self._spoken(str(text), request.args[1]) if self._think_end else str(text)
            answer = GeneratedAnswer(
                text=shown, n_tokens=int(str(n_tokens)), truncated=bool(truncated)
            )
            self.answers[request.task_name, request.doc_id] = answer
            texts.append(shown)
        return texts

    def loglikelihood(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[LogLikelihood]:
        """(log probability, greedy) per request, in the order of the requests."""

        def ask(
            missing: Sequence[int], store: Callable[[Sequence[tuple[int, StoredValue]]], None]
        ) -> None:
            self._backend.likelihoods(
                [requests[index] for index in missing],
                lambda some: store([(missing[at], [*a]) for at, a in some]),
            )

        values = self._complete(
            _questions(requests, [json.dumps(request.args[1]) for request in requests]), ask
        )
        return [(float(str(nats)), bool(greedy)) for nats, greedy in values]

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Perplexity of whole texts is not measured here."""
        raise UnsuitedError(
            f"{requests[0].task_name}: it measures perplexity, which has no score per item; the fidelity report has it"
        )

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The backend's own words for a conversation."""
        try:
            return self._backend.apply_chat_template(chat_history, add_generation_prompt)
        except ValueError as fault:
            said = " ".join(str(fault).split())[:120]
            raise UsageError(
                f"--chat-template: expected a chat template in the model's tokenizer, found none ({said}); leave it out"
            ) from None

    @property
    def tokenizer_name(self) -> str:
        """lm-eval keys a cache of prompts by it, which is not used."""
        return ""

    def _complete(
        self,
        questions: Sequence[tuple[str, str, str, str, int]],
        ask: Callable[[Sequence[int], Callable[[Sequence[tuple[int, StoredValue]]], None]], None],
    ) -> list[StoredValue]:
        """A value per question: from the journal where it has one, else asked for and stored."""
        keys = [AnswerKey(*parts[:4], self._model, parts[4]) for parts in questions]
        values = [self._journal.get(key) for key in keys]
        missing = [index for index, value in enumerate(values) if value is None]
        left = set(missing)

        def store(some: Sequence[tuple[int, StoredValue]]) -> None:
            self._journal.put([(keys[index], value) for index, value in some])
            for index, value in some:
                values[index] = value
                left.discard(index)
            if self._progress is not None:
                self._progress(len(values) - len(left), len(values))

        store([])  # what an earlier run left is told as well
        if missing:
            ask(missing, store)
        return [value for value in values if value is not None]

    def _unstopped(self, request: Instance) -> Instance:
        kwargs = {**request.args[1], "until": []}
        metadata = (request.task_name, request.doc_id, request.repeats)
        return Instance(
            request.request_type, request.doc, (request.args[0], kwargs), request.idx, metadata
        )

    def _spoken(self, text: str, kwargs: Mapping[str, Any]) -> str:
        """What follows the last thought, up to a stop string; nothing when the thought did not end."""
        _, mark, spoken = text.rpartition(self._think_end)
        until = kwargs.get("until", [])
        for stop in [until] if isinstance(until, str) else until:
            spoken = spoken.split(stop)[0] if stop else spoken
        return spoken if mark else ""


def _questions(
    requests: Sequence[Instance], settings: Sequence[str]
) -> list[tuple[str, str, str, str, int]]:
    """Task, hashes of document and prompt as lm-eval makes them, settings, and which of its equals each one is."""
    seen: Counter[tuple[str, str, str, str]] = Counter()
    found = []
    for request, chosen in zip(requests, settings, strict=True):
        doc = json.dumps(request.doc, indent=2, default=handle_non_serializable, ensure_ascii=False)
        key = (str(request.task_name), hash_string(doc), hash_string(request.args[0]), chosen)
        found.append((*key, seen[key]))
        seen[key] += 1
    return found
