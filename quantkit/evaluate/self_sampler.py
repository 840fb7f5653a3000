"""The text of a recipe that the model samples itself: from the cache, this process or an
endpoint.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.errors import CalibrationError, UsageError
from quantkit.evaluate.prompt_text import PromptRenderer
from quantkit.io.templates import TemplateWorker
from quantkit.plan.self_texts import (
    GROUP_SIZE,
    SelfTextPlan,
    Stream,
    make_identity,
    make_sampling,
    make_seed,
    plan_part,
)
from quantkit.plan.sources import ResolvedCompute, resolve_compute
from quantkit.progress import Progress, ProgressCallback
from quantkit.recipe.schema import Recipe
from quantkit.texts.corpora import count_sequence_tokens
from quantkit.texts.corpus_files import CorpusPart, SelfSampler
from quantkit.texts.corpus_spec import CorpusSpec
from quantkit.texts.mixture_spec import PartSpec
from quantkit.texts.self_prompts import SeedPrompt, list_prompts
from quantkit.texts.self_text import (
    TextGenerator,
    locate_cache,
    make_request,
    open_cache,
    sample_texts,
)

STAGE = "sampling text"


@dataclass(kw_only=True)
class SelfTextSource:
    """Samples the text of a recipe's sets; mutable: the model is loaded once, when it is needed."""

    recipe: Recipe
    source: Checkpoint
    compute: ResolvedCompute
    renderer: PromptRenderer
    on_progress: ProgressCallback
    generator: TextGenerator | None = field(default=None, init=False)

    def make_sampler(
        self, stream: Stream, sequences: int | None, length: int, seed: int
    ) -> SelfSampler:
        """Return the function that samples the parts of a stream's set."""

        def sample(spec: CorpusSpec, part: PartSpec) -> CorpusPart:
            where = f"{spec.where}: part {part.name}"
            if sequences is None:
                raise UsageError(
                    f"{where}: self: expected a number of sequences, found null. Name one"
                )
            text = plan_part(stream, spec, part, sequences, length, seed)
            return self._sample_part(where, part, text)

        return sample

    def close(self) -> None:
        """Release the model."""
        if self.generator is not None:
            self.generator.close()
            self.generator = None

    def _sample_part(self, where: str, part: PartSpec, text: SelfTextPlan) -> CorpusPart:
        prompts = self._list_prompts(where, text)
        compute = describe_compute(self.compute)
        identity = make_identity(
            self.recipe, text, self.source.compute_fingerprint(), self.source.folder, compute
        )
        name = "endpoint"
        if self.recipe.endpoint is None:  # two models may differ in their weights only
            self.source.compute_hashes(self.on_progress)
            name = self.source.compute_content_hash()[:32]
            identity["weights"] = self.source.compute_content_hash()
        path = locate_cache({k: v for k, v in identity.items() if k != "weights"})
        tokenizer, began = self.renderer.tokenizer, time.monotonic()
        n_cached: int | None = None

        def report(done: int) -> None:
            nonlocal n_cached
            if n_cached is None:
                n_cached = done
            seconds = time.monotonic() - began
            speed = (done - n_cached) / seconds if seconds > 1 else 0
            note = f"{speed:,.0f} tokens/s" if speed else ""
            self.on_progress(
                Progress(stage=STAGE, done=min(done, text.n_tokens), total=text.n_tokens, note=note)
            )

        with open_cache(path / f"{name}.jsonl", identity) as cache:
            texts = sample_texts(
                cache,
                lambda index: make_request(index, prompts, make_seed(text)),
                self._open_generator,
                n_tokens=text.n_tokens,
                count_tokens=lambda value: count_sequence_tokens(tokenizer, value, text.length),
                on_tokens=report,
                where=where,
            )
        return CorpusPart(
            spec=part,
            texts=texts.texts,
            chats=(),
            skipped=texts.skipped,
            sha256=texts.sha256,
            labels=texts.labels,
        )

    def _list_prompts(self, where: str, text: SelfTextPlan) -> dict[str, tuple[SeedPrompt, ...]]:
        endpoint, has_template = self.recipe.endpoint, self.renderer.has_template
        if endpoint is not None and endpoint.chat and not has_template:
            raise CalibrationError(
                f"{where}: self: expected a chat template in {self.source.folder} for "
                "calibration.endpoint, found none. Set calibration.endpoint.chat: false"
            )
        prompts = list_prompts(
            text.kinds,
            text.languages,
            has_openings=endpoint is None or not endpoint.chat,
            has_messages=has_template,
        )
        if endpoint is not None:  # servers refuse empty text
            prompts = {
                kind: tuple(row for row in rows if row.text) for kind, rows in prompts.items()
            }
        if not any(prompts.values()):
            raise CalibrationError(
                f"{where}: self: expected seed prompts of {', '.join(text.kinds)} in "
                f"{', '.join(text.languages)} that suit the model, found none. Add "
                "kinds or languages"
            )
        return prompts

    def _open_generator(self) -> TextGenerator:
        """Return the generator, made and imported on first use: both kinds are heavy."""
        if self.generator is not None:
            return self.generator
        sampling, endpoint = make_sampling(self.recipe), self.recipe.endpoint
        if endpoint is None:
            from quantkit.evaluate.model_text import ModelTextGenerator

            self.generator = ModelTextGenerator(
                self.source, self.compute, self.renderer, sampling, GROUP_SIZE
            )
            return self.generator
        if find_spec("openai") is None:
            raise UsageError(
                "calibration.endpoint: expected OpenAI's client in this environment, found none; "
                "install quantkit[openai]"
            )
        from quantkit.evaluate.endpoint_text import EndpointTextGenerator
        from quantkit.evaluate.openai_client import ServerOptions

        server = ServerOptions(
            url=endpoint.url,
            model=endpoint.model,
            chat=endpoint.chat,
            concurrency=endpoint.concurrency,
            tries=endpoint.tries,
            seconds=endpoint.seconds,
            key_variable=endpoint.key_variable,
            resume="run the same command to continue",
        )
        self.generator = EndpointTextGenerator(
            server, self.renderer, sampling, 2 * endpoint.concurrency
        )
        return self.generator


@contextmanager
def open_self_source(
    recipe: Recipe, source: Checkpoint, tokenizer: Any, on_progress: ProgressCallback
) -> Iterator[SelfTextSource]:
    """Open the source of a recipe's own text; the model's memory is released afterwards."""
    with TemplateWorker() as worker:
        own = SelfTextSource(
            recipe=recipe,
            source=source,
            compute=resolve_compute(recipe),
            renderer=PromptRenderer(tokenizer, worker, str(source.folder)),
            on_progress=on_progress,
        )
        try:
            yield own
        finally:
            own.close()


def describe_compute(compute: ResolvedCompute) -> str:
    """Return dtype and device: "float32 on cpu"."""
    return f"{compute.dtype} on {compute.device}"
