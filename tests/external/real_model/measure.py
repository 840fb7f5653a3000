"""How far an artifact is from its source, on whole models in transformers: the same figures for every tool.

The weights come from `unpack`, so that a peer's artifact and quantkit's are read by one reader that is neither's. Both
models run in float32 on the tokens of the fidelity text. KL and the rest are those of quantkit's report.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from external.real_model.unpack import read_dense_weights
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from quantkit.numerics import fidelity
from quantkit.numerics.fidelity import Estimate
from quantkit.texts.corpora import Tokens


class ModelComparer:
    """A source and the text; the hidden states behind its last block are kept, its logits are not."""

    def __init__(self, source: Path, text: Tokens) -> None:
        self._source, self._text = source, text
        self._model = load_dense_model(source, source)
        self._hidden: list[Tensor] = []

    @property
    def text_hash(self) -> str:
        """The hash of the tokens that are judged on."""
        return self._text.hash

    def figures(self, artifact: Path) -> Mapping[str, Estimate]:
        """The figures of an artifact, over every token that has a successor in its window."""
        model, parts = load_dense_model(self._source, artifact), []
        if not self._hidden:
            self._hidden = [
                self._hidden_states(self._model, index) for index in range(self._text.n_sequences)
            ]
        for index, hidden in enumerate(self._hidden):
            targets = self._text.sequence(index).long()[1:]
            with torch.inference_mode():
                p = self._model.lm_head(hidden)  # [length - 1, hidden] -> [length - 1, vocabulary]
                q = model.lm_head(self._hidden_states(model, index))
            parts.append(fidelity.compare_logits(p, q, targets))
        return fidelity.summarize_tokens(fidelity.concatenate_tokens(parts))

    def _hidden_states(self, model: Any, index: int) -> Tensor:
        """[length - 1, hidden] behind the final norm."""
        with torch.inference_mode():
            states: Tensor = model.model(
                self._text.sequence(index).long()[None], use_cache=False
            ).last_hidden_state
        return states[0, :-1]


def load_dense_model(source: Path, weights: Path) -> Any:
    """The source's architecture in float32 with the weights of a folder; every one of them is used."""
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**values), dtype=torch.float32
    ).eval()
    state = read_dense_weights(weights)
    if values.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model
