"""Documents of the scored tokens: what begins alike counts once."""

from __future__ import annotations

import random
from typing import Any, cast

import torch

from quantkit.evaluate.token_fidelity import find_documents
from quantkit.texts.tokens import TokenSequence, pack_tokens


def make_stream(rows: list[list[int]], extra: int = 0) -> Any:
    """Return a stream of these sequences; the last `extra` are no text."""
    tokens = pack_tokens([TokenSequence(domain="d", ids=row) for row in rows])
    n_text = sum(map(len, rows[: len(rows) - extra]))
    return cast(Any, type("Stream", (), {"tokens": tokens, "text_rows": n_text})())


def test_tokens_after_the_same_context_are_of_one_document() -> None:
    """Against every pair of contexts: equal ones share a document, others do not."""
    dice = random.Random(0)
    rows = [[dice.choice((1, 1, 2)) for _ in range(dice.randint(2, 9))] for _ in range(40)]
    stream = make_stream([*rows, [1, 1, 1]], extra=1)
    contexts = [tuple(row[: n + 1]) for row in rows for n in range(len(row))]
    own = [i for i, row in enumerate(rows) for _ in row]
    places = torch.arange(len(contexts))
    documents, repeated = find_documents(stream, places)
    for i, one in enumerate(contexts):
        for j, two in enumerate(contexts):
            if one == two:
                assert documents[i] == documents[j]
            elif own[i] != own[j] and own[i] == documents[i] and own[j] == documents[j]:
                assert documents[i] != documents[j]
    assert repeated == len(contexts) - len(set(contexts))


def test_documents_that_differ_from_the_start_are_their_own() -> None:
    documents, repeated = find_documents(make_stream([[1, 2], [2, 2], [3]]), torch.tensor([0, 2]))
    assert documents.tolist() == [0, 1] and repeated == 0
