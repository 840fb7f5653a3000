"""Distance of an artifact from its source, on whole transformers models: the same figures for every
tool.

`unpack` provides the weights, so that one independent reader reads the artifacts of quantkit and
peers. Both models run in float32 on the tokens of the fidelity text. The figures are those of
quantkit's report.
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
from quantkit.texts.tokens import Tokens


class ModelComparer:
    """Compares artifacts with a source on a text; keeps the source's final hidden states, not
    logits.
    """

    def __init__(self, source: Path, text: Tokens) -> None:
        self._source, self._text = source, text
        self._model = load_dense_model(source, source)
        self._hidden: list[Tensor] = []

    @property
    def text_hash(self) -> str:
        """The hash of the text's tokens."""
        return self._text.hash

    def compute_figures(self, artifact: Path) -> Mapping[str, Estimate]:
        """Return the figures of an artifact over all tokens that have a successor in their
        window, and "kl_mean@LABEL" of each kind of text if there are several.
        """
        model, parts = load_dense_model(self._source, artifact), []
        if not self._hidden:
            self._hidden = [
                self._compute_hidden_states(self._model, index)
                for index in range(self._text.n_sequences)
            ]
        for index, hidden in enumerate(self._hidden):
            targets = self._text.sequence(index).long()[1:]
            with torch.inference_mode():
                p = self._model.lm_head(hidden)  # [length - 1, hidden] -> [length - 1, vocabulary]
                q = model.lm_head(self._compute_hidden_states(model, index))
            parts.append(fidelity.compare_logits(p, q, targets))
        figures = dict(fidelity.summarize_tokens(fidelity.concatenate_tokens(parts)))
        kinds = sorted(set(self._text.domains))
        for kind in kinds if len(kinds) > 1 else ():
            rows = zip(parts, self._text.domains, strict=True)
            own = fidelity.concatenate_tokens([part for part, label in rows if label == kind])
            figures[f"kl_mean@{kind}"] = fidelity.estimate_mean(own.kl)
        return figures

    def _compute_hidden_states(self, model: Any, index: int) -> Tensor:
        """Return the hidden states [length - 1, hidden] after the final norm."""
        with torch.inference_mode():
            states: Tensor = model.model(
                self._text.sequence(index).long()[None], use_cache=False
            ).last_hidden_state
        return states[0, :-1]


def load_dense_model(source: Path, weights: Path) -> Any:
    """Return the source's architecture in float32 with all weights of a folder.

    Raises RuntimeError if a weight is missing or unused.
    """
    values = json.loads((source / "config.json").read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**values), dtype=torch.float32
    ).eval()
    state = read_dense_weights(weights)
    if values.get("tie_word_embeddings"):
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    return model
