"""The worst tokens of a text: a wrong prediction that was planted is the first of the list."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pyarrow.parquet as parquet
import pytest
import torch
from torch import Tensor

from quantkit.artifact.layout import PREDICTION_SAMPLES, SAMPLES_FOLDER, TEXT_SAMPLES, TOKEN_SAMPLES
from quantkit.diff import sides, token_texts
from quantkit.diff.diff_schema import WorseToken
from quantkit.errors import ArtifactError
from quantkit.evaluate.token_fidelity import StreamPair, measure_text
from quantkit.evaluate.token_samples import TokenSamples, list_worst_tokens, sample_tokens
from quantkit.evaluate.token_samples import write_tokens as write
from quantkit.numerics import fidelity
from quantkit.plan.select_texts import keeps_fidelity_text
from quantkit.recipe.parse import parse_recipe
from quantkit.texts.tokens import TokenSequence, pack_tokens

WORDS = ("<s>", " the", " cat", " sat", " dog", "\n|<b>", " ran", " end")
LINES = ([0, 1, 2, 3, 1, 4], [0, 1, 2, 6, 7], [0, 1, 4, 6, 7])
"""Three documents; the first two begin alike."""
VOCABULARY = len(WORDS)
PLANTED = (2, 3, 5)
"""Sequence, position, and the token that the artifact predicts there: "dog", then "\\n|<b>"."""


class WordsTokenizer:
    """A token per word of WORDS."""

    bos_token_id = eos_token_id = None

    def decode(self, token_ids: Sequence[int]) -> str:
        return "".join(WORDS[number] for number in token_ids)

    def __call__(
        self, text: list[str], *, add_special_tokens: bool, verbose: bool
    ) -> dict[str, list[list[int]]]:
        raise NotImplementedError


class Table:
    """Hidden states that are row numbers, and a head that looks logits up by them."""

    def __init__(self, logits: Tensor) -> None:
        self._logits = logits

    def gather(self, rows: Tensor) -> Tensor:
        return rows

    def logits(self, hidden: Tensor) -> Tensor:
        return self._logits[hidden]


def make_source_logits() -> Tensor:
    """Return logits by row that depend on the context alone, so that equal contexts agree."""
    rows = []
    for line in LINES:
        for n in range(len(line)):
            seed = torch.Generator().manual_seed(hash(tuple(line[: n + 1])) % (1 << 31))
            rows.append(torch.randn(VOCABULARY, generator=seed))
    return torch.stack(rows)


def plant(logits: Tensor, strength: float) -> Tensor:
    """Return logits whose prediction of the planted token is wrong."""
    sequence, position, wrong = PLANTED
    row = sum(map(len, LINES[:sequence])) + position - 1
    changed = logits.clone()
    changed[row, wrong] += strength
    return changed


def make_samples(artifact: Tensor) -> TokenSamples:
    source = make_source_logits()
    tokens = pack_tokens([TokenSequence(domain="prose", ids=line) for line in LINES])
    stream = {"tokens": tokens, "text_rows": len(source)}
    reference, quantized = (
        type("Stream", (), {**stream, "hidden": Table(logits)})() for logits in (source, artifact)
    )
    pair = StreamPair(
        reference=cast(Any, reference),
        quantized=cast(Any, quantized),
        source=cast(Any, Table(source)),
        artifact=cast(Any, Table(artifact)),
    )
    return sample_tokens(pair, measure_text(pair), WordsTokenizer())


def write_folder(folder: Path, samples: TokenSamples) -> Path:
    (folder / SAMPLES_FOLDER).mkdir(parents=True)
    write(samples, folder)
    return folder


def list_worse(a: Path, b: Path) -> tuple[WorseToken, ...]:
    tokens = [sides.read_tokens(folder / TOKEN_SAMPLES) for folder in (a, b)]
    texts = [token_texts.read_texts(folder, sides.read_typed_columns) for folder in (a, b)]
    return token_texts.list_worse_tokens(tokens[0], tokens[1], (texts[0], texts[1]))


def test_planted_token_is_the_worst() -> None:
    source = make_source_logits()
    noise = torch.randn(source.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    worst = list_worst_tokens(make_samples(plant(source + noise, 9.0)))
    first, sequence, position = worst[0], PLANTED[0], PLANTED[1]
    assert (first.sequence, first.position) == (sequence, position)
    assert first.token == WORDS[LINES[sequence][position]]
    assert first.context == "".join(WORDS[n] for n in LINES[sequence][:position])
    assert not first.is_cut and first.kind == "prose"
    row = sum(map(len, LINES[:sequence])) + position - 1
    p = torch.softmax(source[row].double(), -1)
    q = torch.softmax(plant(source + noise, 9.0)[row].double(), -1)
    assert first.kl == pytest.approx(float((p * (p / q).log()).sum()))
    true = LINES[sequence][position]
    assert (first.p_source, first.p_artifact) == (
        pytest.approx(float(p[true])),
        pytest.approx(float(q[true])),
    )
    expected = p.argsort(descending=True)[:5].tolist()
    assert [choice.text for choice in first.source] == [WORDS[n] for n in expected]
    assert [choice.p for choice in first.source] == pytest.approx(p[expected].tolist())
    assert first.artifact[0].text == WORDS[PLANTED[2]]
    assert worst[1].kl < first.kl / 10


def test_token_after_a_repeated_context_is_listed_once() -> None:
    """The first two documents share two scored tokens; each is one row of the list."""
    samples = make_samples(make_source_logits() * 1.5)
    n_scored = sum(len(line) - 1 for line in LINES)
    contexts = {tuple(line[:n]) for line in LINES for n in range(1, len(line))}
    assert len(samples.measured.rows) == n_scored > len(contexts)
    shown = [(row.context, row.kl) for row in list_worst_tokens(samples)]
    assert len(shown) == len(set(shown)) == n_scored - samples.measured.repeated


def test_samples_hold_the_ids_places_and_text_of_every_token(tmp_path: Path) -> None:
    folder = write_folder(tmp_path, make_samples(make_source_logits() * 1.5))
    scored = parquet.read_table(folder / TOKEN_SAMPLES).to_pylist()
    places = [(n, i, line[i]) for n, line in enumerate(LINES) for i in range(1, len(line))]
    assert [(row["sequence"], row["position"], row["token"]) for row in scored] == places
    text = parquet.read_table(folder / TEXT_SAMPLES).to_pylist()
    assert [(row["sequence"], row["token"], row["text"]) for row in text] == [
        (n, number, WORDS[number]) for n, line in enumerate(LINES) for number in line
    ]
    predicted = parquet.read_table(folder / PREDICTION_SAMPLES).to_pylist()
    assert len(predicted) == len(places) * 2 * 5


def test_same_samples_have_the_same_bytes(tmp_path: Path) -> None:
    """A build that is resumed writes the bytes of one that is not."""
    folders = [
        write_folder(tmp_path / name, make_samples(make_source_logits() * 1.5)) for name in "ab"
    ]
    for name in (TOKEN_SAMPLES, TEXT_SAMPLES, PREDICTION_SAMPLES):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes()


def test_diff_lists_the_token_that_got_worse(tmp_path: Path) -> None:
    """Both sides are equally noisy; B has one wrong prediction more, with the context of A."""
    logits = make_source_logits()
    noise = torch.randn(logits.shape, generator=torch.Generator().manual_seed(1)) * 0.01
    a = write_folder(tmp_path / "a", make_samples(logits + noise))
    b = write_folder(tmp_path / "b", make_samples(plant(logits + noise, 9.0)))
    (row,) = list_worse(a, b)
    assert (row.sequence, row.position) == PLANTED[:2]
    assert row.context == "<s> the dog" and row.token == " ran"
    assert row.b[0].text == WORDS[PLANTED[2]] and row.a[0].text == row.source[0].text
    assert row.kl_b > 100 * row.kl_a and row.p_b < row.p_a
    assert list_worse(b, a) == ()


def test_text_that_is_not_kept_leaves_figures_alone(tmp_path: Path) -> None:
    samples = make_samples(make_source_logits() * 1.5)
    private = replace(samples, keeps_text=False)
    assert list_worst_tokens(samples) and list_worst_tokens(private) == ()
    kept, folder = write_folder(tmp_path / "a", samples), write_folder(tmp_path / "b", private)
    assert [file.name for file in (folder / SAMPLES_FOLDER).iterdir()] == ["tokens.parquet"]
    table, full = (parquet.read_table(x / TOKEN_SAMPLES) for x in (folder, kept))
    assert table.equals(full.drop_columns(["sequence", "position", "token"]))
    assert list_worse(folder, kept) == ()


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("set: tiny-v3-heldout", True),
        ("set: tiny-v3-heldout, keep_text: false", False),
        ("set: own.txt", False),
        ("set: own.yaml", False),
        ("set: own.txt, keep_text: true", True),
    ],
)
def test_text_of_own_files_is_kept_only_if_the_recipe_says_so(text: str, kept: bool) -> None:
    lines = f"version: 1\nsource: {{model: m}}\nfidelity: {{{text}}}\nformat: awq\n"
    recipe = parse_recipe(f"{lines}rules: all-linear\noutput: {{path: x}}\n", "x.yaml")
    assert keeps_fidelity_text(recipe) is kept


def test_samples_of_an_earlier_version_list_nothing(tmp_path: Path) -> None:
    """No column of places, or no file with the text."""
    logits = make_source_logits()
    a = write_folder(tmp_path / "a", make_samples(logits * 1.1))
    b = write_folder(tmp_path / "b", make_samples(logits * 1.5))
    assert list_worse(a, b)
    table = parquet.read_table(a / TOKEN_SAMPLES)
    parquet.write_table(table.drop_columns(["sequence", "position", "token"]), a / TOKEN_SAMPLES)
    assert sides.read_tokens(a / TOKEN_SAMPLES).places is None and list_worse(a, b) == ()
    for folder in (a, b):
        (folder / TEXT_SAMPLES).unlink()
    assert token_texts.read_texts(b, sides.read_typed_columns) is None and list_worse(b, b) == ()


def test_predictions_that_are_no_probabilities_are_refused(tmp_path: Path) -> None:
    samples = make_samples(make_source_logits() * 1.5)
    wrong = replace(samples.predictions, p=samples.predictions.p * 100)
    folder = write_folder(tmp_path, replace(samples, predictions=wrong))
    with pytest.raises(ArtifactError, match="probability between 0 and 1"):
        token_texts.read_texts(folder, sides.read_typed_columns)


def test_most_probable_tokens_are_in_order_of_probability_and_id() -> None:
    logits = torch.tensor([[0.0, 2.0, 1.0, 2.0, -1.0], [5.0, 5.0, 5.0, 5.0, 5.0]])
    ids, p = fidelity.rank_predictions(logits, 3)
    assert ids[0].tolist() == [1, 3, 2]
    assert p[0].tolist() == pytest.approx(torch.softmax(logits[0].double(), 0)[ids[0]].tolist())
    assert ids[1].tolist() == sorted(ids[1].tolist())
    assert fidelity.rank_predictions(logits, 9)[0].shape == (2, 5)
