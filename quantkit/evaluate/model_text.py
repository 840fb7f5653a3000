"""Text sampled in this process from the model to be quantized."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from quantkit.checkpoint.checkpoint import Checkpoint
from quantkit.checkpoint.file_names import GENERATION_CONFIG
from quantkit.checkpoint.source_config import read_text_config
from quantkit.errors import CalibrationError
from quantkit.evaluate.decoding import decode
from quantkit.evaluate.prompt_text import PromptRenderer
from quantkit.io.files import is_file, read_json
from quantkit.models import full_model
from quantkit.models.layers import make_meta_model
from quantkit.numerics.nucleus import sample_nucleus
from quantkit.plan.plan import load_architecture
from quantkit.plan.sources import ResolvedCompute
from quantkit.texts.corpora import add_prefix, find_prefix
from quantkit.texts.self_text import SampledText, Sampling, TextRequest, draw_uniform

MIN_NEW_TOKENS = 16
"""New tokens for which a prompt must leave room in the model's context."""


class ModelTextGenerator:
    """Samples texts with the model's transformers class, in the dtype and on the device of a build.

    FP8 weights are dequantized. Every token follows from the logits and one number that depends on
    the request and the position alone. The model is loaded with the first group.
    """

    def __init__(
        self,
        source: Checkpoint,
        compute: ResolvedCompute,
        renderer: PromptRenderer,
        sampling: Sampling,
        group_size: int,
    ) -> None:
        self.group_size = group_size
        self._source, self._compute = source, compute
        self._renderer, self._sampling = renderer, sampling
        self._model: Any = None
        self._eos = collect_eos(source, renderer.tokenizer)

    def close(self) -> None:
        """Release the model."""
        self._model = None
        gc.collect()

    def generate(
        self,
        group: Sequence[TextRequest],
        needed: Collection[int],
        on_text: Callable[[SampledText], None],
        on_tokens: Callable[[int], None],
    ) -> None:
        """Sample a whole group as one batch and report the texts that are needed."""
        model = self._load()
        prompts = [self._encode(request) for request in group]
        context = read_text_config(self._source.config).integer(
            "max_position_embeddings", 2**31 - 1
        )
        room = max(MIN_NEW_TOKENS, context // 4)
        prompts = [prompt[-max(1, context - room) :] for prompt in prompts]
        longest = max(map(len, prompts))
        pad = self._renderer.tokenizer.pad_token_id
        rows = decode(
            model,
            prompts,
            pad if pad is not None else 0,
            min(self._sampling.max_tokens, context - longest),
            lambda tokens: tokens[-1] in self._eos,
            self._make_selector(group, on_tokens),
        )
        for request, prompt, tokens in zip(group, prompts, rows, strict=True):
            if request.index in needed:
                on_text(self._make_text(request, prompt, tokens))

    def _load(self) -> Any:
        if self._model is None:
            source, device = self._source, torch.device(self._compute.device)
            meta = make_meta_model(source.config, device, getattr(torch, self._compute.dtype))
            layout = load_architecture(source.config, source.specs).layout(source.config)
            try:
                self._model = full_model.make_model(meta, layout, full_model.make_reader(source))
            except torch.OutOfMemoryError:
                raise CalibrationError(
                    f"{source.folder}: self: expected memory of {device} for the whole model, "
                    "found too little. Set calibration.endpoint, or choose another set"
                ) from None
        return self._model

    def _encode(self, request: TextRequest) -> list[int]:
        """Return the ids of a prompt: BOS if the tokenizer adds one, and never nothing."""
        tokenizer = self._renderer.tokenizer
        text = self._renderer.render_prompt(request.prompt)
        ids = list(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0])
        if prefix := find_prefix(tokenizer):
            return add_prefix(prefix, ids)
        first = (tokenizer.bos_token_id, tokenizer.eos_token_id, 0)
        return ids or [next(number for number in first if number is not None)]

    def _make_selector(
        self, group: Sequence[TextRequest], on_tokens: Callable[[int], None]
    ) -> Callable[[Tensor, Sequence[int]], Tensor]:
        """Return the function that selects the next token of every row."""
        position = 0

        def select(logits: Tensor, indices: Sequence[int]) -> Tensor:
            nonlocal position
            numbers = [draw_uniform(group[index].seed, position) for index in indices]
            uniforms = torch.tensor(numbers, dtype=torch.float64, device=logits.device)  # [rows]
            position += 1
            on_tokens(len(indices))
            tokens = sample_nucleus(
                logits, uniforms, self._sampling.temperature, self._sampling.top_p
            )  # [rows]
            return tokens.unsqueeze(-1)  # [rows, 1]

        return select

    def _make_text(
        self, request: TextRequest, prompt: Sequence[int], tokens: Sequence[int]
    ) -> SampledText:
        tokenizer = self._renderer.tokenizer
        shown = prompt[len(find_prefix(tokenizer)) :]
        start, text = (
            tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
            for ids in (shown, [*shown, *tokens])
        )
        ended = tokens[-1] in self._eos
        text = text if ended else text.rstrip("\N{REPLACEMENT CHARACTER}")  # half a character
        return SampledText(
            index=request.index,
            text=text,
            start=min(len(start), len(text)),
            n_tokens=len(tokens),
            ended=ended,
        )


def collect_eos(source: Checkpoint, tokenizer: Any) -> frozenset[int]:
    """Return every token that ends a text: of the tokenizer, the config and the generation
    config.
    """
    path = source.folder / GENERATION_CONFIG
    values = [
        source.config.values,
        read_text_config(source.config).values,
        read_json(path) if is_file(path) else {},
    ]
    tokens: list[object] = [tokenizer.eos_token_id]
    for value in (each.get("eos_token_id") for each in values):
        tokens += value if isinstance(value, list) else [value]
    return frozenset(token for token in tokens if type(token) is int)
