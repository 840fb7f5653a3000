"""The text of the tokens of a side and the models' predictions, and the tokens that got worse most.

Everything comes from the samples of the artifacts; no model and no tokenizer is needed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from pydantic import ValidationError

from quantkit.artifact.layout import PREDICTION_SAMPLES, TEXT_SAMPLES
from quantkit.artifact.token_schema import (
    MOST_CHOICES,
    MOST_CONTEXT,
    MOST_TEXT,
    MOST_TOKENS,
    Choices,
    TokenChoice,
)
from quantkit.diff.diff_schema import WorseToken
from quantkit.errors import ArtifactError
from quantkit.numerics.clustered import Array

Place = tuple[int, int]
"""Sequence, and position in it."""
_TEXT = {"sequence": "int32", "token": "int32", "text": "string"}
_PREDICTION = {
    "sequence": "int32",
    "position": "int32",
    "side": "string",
    "token": "int32",
    "text": "string",
    "p": "double",
}
ReadColumns = Callable[[Path, Mapping[str, str]], Any]


@dataclass(frozen=True, kw_only=True)
class TokenFigures:
    """Values of every scored token, in the order of the text.

    documents, ids, places (sequence and position): None in samples of earlier versions; side: whose
    predictions in the samples are this side's.
    """

    domains: Sequence[str]
    kl: Sequence[float]
    nll_source: Sequence[float]
    nll: Sequence[float]
    same_top: Sequence[bool]
    documents: Sequence[int] | None = None
    ids: Sequence[int] | None = None
    places: Sequence[tuple[int, int]] | None = None
    side: Literal["source", "artifact"] = "artifact"


@dataclass(frozen=True, kw_only=True)
class TokenTexts:
    """The fidelity text by sequence, token by token, and the predictions where KL is largest.

    ids, pieces: of every token; names: of predicted tokens by id.
    """

    ids: Mapping[int, Sequence[int]]
    pieces: Mapping[int, Sequence[str]]
    names: Mapping[int, str]
    predictions: Mapping[tuple[Place, str], Choices]

    def get_token(self, place: Place) -> str:
        """Return the true token at a place as text."""
        sequence, position = place
        number = self.ids[sequence][position]
        name = self.names.get(number, self.pieces[sequence][position])
        return (name or f"<token {number}>")[:MOST_TEXT]

    def get_context(self, place: Place) -> str:
        """Return the text of the sequence before a place."""
        sequence, position = place
        return "".join(self.pieces[sequence][:position])

    def holds(self, place: Place) -> bool:
        """Return whether the text has a token there."""
        return 0 <= place[1] < len(self.ids.get(place[0], ()))


def read_texts(folder: Path, read_columns: ReadColumns) -> TokenTexts | None:
    """Read the texts of an artifact; None for an artifact of an earlier version, without any.

    read_columns: reads columns of given types from a file. Raises ArtifactError for a damaged file.
    """
    if not (folder / TEXT_SAMPLES).is_file() or not (folder / PREDICTION_SAMPLES).is_file():
        return None
    text = read_columns(folder / TEXT_SAMPLES, _TEXT).to_pydict()
    ids, pieces = dict[int, list[int]](), dict[int, list[str]]()
    for sequence, number, piece in zip(text["sequence"], text["token"], text["text"], strict=True):
        ids.setdefault(sequence, []).append(number)
        pieces.setdefault(sequence, []).append(piece)
    path = folder / PREDICTION_SAMPLES
    predicted, names = dict[tuple[Place, str], list[TokenChoice]](), dict[int, str]()
    for row in read_columns(path, _PREDICTION).to_pylist():
        try:
            choice = TokenChoice(text=row["text"], p=row["p"])
        except ValidationError as fault:
            raise ArtifactError(
                f"{path}: expected tokens with a probability between 0 and 1, found "
                f"{fault.errors()[0]['msg']}; pull or build the artifact again"
            ) from None
        choices = predicted.setdefault(((row["sequence"], row["position"]), row["side"]), [])
        if len(choices) < MOST_CHOICES:
            choices.append(choice)
        names[row["token"]] = choice.text
    return TokenTexts(
        ids=ids,
        pieces=pieces,
        names=names,
        predictions={key: tuple(choices) for key, choices in predicted.items()},
    )


def has_same_ids(a: TokenFigures, b: TokenFigures) -> bool:
    """Return whether both sides recorded the same token ids at the same places."""
    return a.places is not None and a.places == b.places and a.ids == b.ids


def list_worse_tokens(
    a: TokenFigures, b: TokenFigures, texts: tuple[TokenTexts | None, TokenTexts | None]
) -> tuple[WorseToken, ...]:
    """Return the tokens whose KL rose most from A to B, largest rise first.

    Of tokens that repeat another document one is listed. Nothing without texts, or for tokens that
    are not the same on both sides.
    """
    known = texts[1] or texts[0]
    if known is None or a.places is None or not has_same_ids(a, b):
        return ()
    rise: Array = np.asarray(b.kl, dtype=np.float64) - np.asarray(a.kl, dtype=np.float64)
    rise[~np.isfinite(rise)] = 0.0
    documents = a.documents or b.documents or [sequence for sequence, _ in a.places]
    rows, seen = list[WorseToken](), set[Place]()
    for n in np.argsort(-rise, kind="stable").tolist():
        place, key = a.places[n], (documents[n], a.places[n][1])
        if rise[n] <= 0 or len(rows) == MOST_TOKENS:
            break
        if key in seen or not known.holds(place):
            continue
        seen.add(key)
        context = known.get_context(place)
        rows.append(
            WorseToken(
                kind=a.domains[n][:MOST_TEXT],
                sequence=place[0],
                position=place[1],
                context=context[-MOST_CONTEXT:],
                is_cut=len(context) > MOST_CONTEXT,
                token=known.get_token(place),
                kl_a=a.kl[n],
                kl_b=b.kl[n],
                p_source=to_probability(a.nll_source[n]),
                p_a=to_probability(a.nll[n]),
                p_b=to_probability(b.nll[n]),
                source=get_choices(place, "source", texts[::-1]),
                a=get_choices(place, a.side, texts[:1]),
                b=get_choices(place, b.side, texts[1:]),
            )
        )
    return tuple(rows)


def get_choices(place: Place, side: str, texts: Sequence[TokenTexts | None]) -> Choices:
    """Return the predictions of a model at a place, from the first texts that have them."""
    listed = (each.predictions.get((place, side), ()) for each in texts if each is not None)
    return next((choices for choices in listed if choices), ())


def to_probability(nll: float) -> float:
    """Return exp(-nll), at most 1; 0 for a value that is not finite."""
    return float(min(1.0, np.exp(-nll))) if np.isfinite(nll) else 0.0
