"""Schema of tokens with their text, their context and the predictions of two models.

Every text comes from a stranger's tokenizer or text set: its length is bounded here, and each view
escapes it.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, Field

from quantkit.plan.plan_schema import FROZEN

MOST_TOKENS = 20
"""Tokens of a list."""
MOST_CHOICES = 5
"""Predictions of a model at a token."""
MOST_TEXT = 80
"""Characters of a token."""
MOST_CONTEXT = 240
"""Characters of the text before a token."""

Probability = Annotated[float, Field(ge=0, le=1)]


class TokenChoice(BaseModel):
    """A token that a model predicts, with its probability."""

    model_config = FROZEN
    text: Annotated[str, Field(max_length=MOST_TEXT)]
    p: Probability


Choices = Annotated[tuple[TokenChoice, ...], Field(max_length=MOST_CHOICES)]
"""A model's most probable next tokens, most probable first."""


class TokenPlace(BaseModel):
    """A scored token of the fidelity text: which one, and the text before it.

    position: of the token in its sequence; token: the true one; context ends right before it;
    is_cut: whether text before the context is left out.
    """

    model_config = FROZEN
    kind: Annotated[str, Field(max_length=MOST_TEXT)]  # of text
    sequence: int
    position: int
    context: Annotated[str, Field(max_length=MOST_CONTEXT)]
    is_cut: bool
    token: Annotated[str, Field(max_length=MOST_TEXT)]


class WorstToken(TokenPlace):
    """A token with one of the largest KL, in nats, and the predictions of both models.

    p_source, p_artifact: probability of the true token.
    """

    kl: Annotated[float, Field(ge=0)]
    p_source: Probability
    p_artifact: Probability
    source: Choices
    artifact: Choices
