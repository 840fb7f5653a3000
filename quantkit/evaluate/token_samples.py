"""Samples of the tokens of the fidelity text: figures, text, predictions where KL is largest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from quantkit.artifact.layout import PREDICTION_SAMPLES, TEXT_SAMPLES, TOKEN_SAMPLES
from quantkit.artifact.token_schema import (
    MOST_CHOICES,
    MOST_CONTEXT,
    MOST_TEXT,
    MOST_TOKENS,
    TokenChoice,
    WorstToken,
)
from quantkit.evaluate.token_fidelity import StreamPair, TextFidelity
from quantkit.texts.corpora import Tokenizer
from quantkit.texts.pieces import name_tokens, split_text

PREDICTED = 1_000
"""Tokens whose predictions are kept; a diff lists those that got worse most among them."""
SIDES = ("source", "artifact")


@dataclass(frozen=True, kw_only=True)
class Predictions:
    """The most probable tokens of both models at `places` [n], indices of scored tokens.

    ids [n, 2, k] int64, p [n, 2, k] float64: the source's first, then the artifact's.
    """

    places: Tensor
    ids: Tensor
    p: Tensor


@dataclass(frozen=True, kw_only=True)
class TokenSamples:
    """The figures of a text with its tokens as text.

    ids [n] int32, sequences: of every token of the text, scored or not, with their pieces of text;
    names: the text of each token that is predicted. keeps_text: whether the artifact and its report
    hold any of the text.
    """

    measured: TextFidelity
    ids: Tensor
    sequences: tuple[int, ...]
    pieces: tuple[str, ...]
    predictions: Predictions
    names: dict[int, str]
    keeps_text: bool


def sample_tokens(
    pair: StreamPair,
    measured: TextFidelity,
    tokenizer: Tokenizer,
    count: int = PREDICTED,
    *,
    keeps_text: bool = True,
) -> TokenSamples:
    """Decode the text and take the predictions of both models at the tokens of largest KL."""
    tokens = pair.reference.tokens
    numbers = [n for n, start in enumerate(tokens.starts) if start < pair.reference.text_rows]
    rows = [tokens.sequence(n).tolist() for n in numbers]
    places = measured.tokens.kl.argsort(descending=True, stable=True)[:count]
    ids, p = pair.rank_predictions(measured.rows[places], MOST_CHOICES)
    flat = [number for row in rows for number in row]
    true = [flat[row + 1] for row in measured.rows[places].tolist()]
    return TokenSamples(
        measured=measured,
        ids=torch.tensor(flat, dtype=torch.int32),
        sequences=tuple(n for n, row in zip(numbers, rows, strict=True) for _ in row),
        pieces=tuple(piece for row in rows for piece in split_text(tokenizer, row)),
        predictions=Predictions(places=places, ids=ids, p=p),
        names=name_tokens(tokenizer, (*ids.flatten().tolist(), *true), flat),
        keeps_text=keeps_text,
    )


def list_worst_tokens(samples: TokenSamples) -> tuple[WorstToken, ...]:
    """Return the tokens with the largest KL, one of those that repeat another document.

    Without the text there are none.
    """
    measured, worst, seen = samples.measured, list[WorstToken](), set[tuple[int, int]]()
    if not samples.keeps_text:
        return ()
    for n, place in enumerate(samples.predictions.places.tolist()):
        row = int(measured.rows[place]) + 1  # of the true token
        start = samples.sequences.index(samples.sequences[row])
        key = (int(measured.documents[place]), row - start)
        if key in seen or len(worst) == MOST_TOKENS:
            continue
        seen.add(key)
        context = "".join(samples.pieces[start:row])
        source, artifact = (
            make_choices(samples, samples.predictions.ids[n, side], samples.predictions.p[n, side])
            for side in range(len(SIDES))
        )
        worst.append(
            WorstToken(
                kind=measured.domains[place][:MOST_TEXT],
                sequence=samples.sequences[row],
                position=row - start,
                context=context[-MOST_CONTEXT:],
                is_cut=len(context) > MOST_CONTEXT,
                token=samples.names[int(samples.ids[row])][:MOST_TEXT],
                kl=float(measured.tokens.kl[place]),
                p_source=float(torch.exp(-measured.tokens.nll_source[place])),
                p_artifact=float(torch.exp(-measured.tokens.nll_quantized[place])),
                source=source,
                artifact=artifact,
            )
        )
    return tuple(worst)


def make_choices(samples: TokenSamples, ids: Tensor, p: Tensor) -> tuple[TokenChoice, ...]:
    """Return the predictions ids [k] with their probabilities p [k]."""
    return tuple(
        TokenChoice(text=samples.names[number][:MOST_TEXT], p=min(1.0, probability))
        for number, probability in zip(ids.tolist(), p.tolist(), strict=True)
    )


def write_tokens(samples: TokenSamples, folder: Path) -> None:
    """Write the samples as Parquet, in the order of the text.

    tokens.parquet has the figures of every scored token, text.parquet a row for every token of the
    text, predictions.parquet the predictions where KL is largest. If the text is not kept, there is
    only the first, without tokens and positions.
    """
    measured, predictions = samples.measured, samples.predictions
    true = measured.rows + 1
    positions = torch.tensor(count_positions(samples.sequences), dtype=torch.int32)
    sequences = torch.tensor(samples.sequences, dtype=torch.int32)
    tokens = {
        "sequence": sequences[true],
        "position": positions[true],
        "token": samples.ids[true],
    }
    write_columns(
        folder / TOKEN_SAMPLES,
        {
            "domain": measured.domains,
            "document": measured.documents,
            **(tokens if samples.keeps_text else {}),
            "kl": measured.tokens.kl,
            "nll_source": measured.tokens.nll_source,
            "nll_artifact": measured.tokens.nll_quantized,
            "same_top": measured.tokens.same_top,
        },
    )
    if not samples.keeps_text:
        return
    write_columns(
        folder / TEXT_SAMPLES,
        {"sequence": sequences, "token": samples.ids, "text": samples.pieces},
    )
    n, sides, choices = predictions.ids.shape
    each = true[predictions.places].repeat_interleave(sides * choices)
    flat = predictions.ids.flatten()
    write_columns(
        folder / PREDICTION_SAMPLES,
        {
            "sequence": sequences[each],
            "position": positions[each],
            "side": [side for _ in range(n) for side in SIDES for _ in range(choices)],
            "token": flat.int(),
            "text": [samples.names[number][:MOST_TEXT] for number in flat.tolist()],
            "p": predictions.p.flatten(),
        },
    )


def count_positions(sequences: Sequence[int]) -> list[int]:
    """Return the position of each token in its sequence; those of a sequence are consecutive."""
    positions = list[int]()
    for n, sequence in enumerate(sequences):
        is_first = n == 0 or sequences[n - 1] != sequence
        positions.append(0 if is_first else positions[-1] + 1)
    return positions


def write_columns(path: Path, columns: dict[str, Tensor | Sequence[str]]) -> None:
    """Write columns of numbers and texts as Parquet."""
    import pyarrow as arrow  # heavy
    import pyarrow.parquet as parquet

    arrays = {
        name: arrow.array(values.numpy())
        if isinstance(values, Tensor)
        else arrow.array(values, arrow.string())
        for name, values in columns.items()
    }
    parquet.write_table(arrow.table(arrays), path)
