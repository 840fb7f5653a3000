"""Tokenizes the texts of a recipe for its plan, where model and text are on this machine.

Problems that only tokens show are then reported before a build: too few windows, empty and short
documents, a tokenizer or a chat template that fails.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from quantkit.checkpoint.remote_code import allows_remote_code
from quantkit.io import package_data
from quantkit.plan.plan import TextUse
from quantkit.plan.select_texts import select_texts
from quantkit.plan.self_texts import list_self_texts
from quantkit.recipe.schema import Recipe
from quantkit.texts import corpora
from quantkit.texts.corpus_spec import CorpusSpec, read_spec
from quantkit.texts.tokens import Tokens


@dataclass(frozen=True, kw_only=True)
class TextFacts:
    """Facts from tokens: a sentence per kind of rows without any, the largest id of each text, and
    the number of tokens of each stream.
    """

    notes: tuple[str, ...] = ()
    largest_ids: tuple[int, ...] = ()
    tokens: Mapping[TextUse, int] = field(default_factory=dict)


def read_texts(recipe: Recipe, folder: Path) -> TextFacts:
    """Tokenize the texts of a recipe with the tokenizer in `folder`; raises as the build would.

    Nothing is read if a text is not on this machine, or is the model's own.
    """
    place, notes, largest = package_data.locate_folder("calibration"), list[str](), list[int]()
    selected = select_texts(recipe)
    specs = [read_spec(name, place) for _, name, *_ in selected]
    if not selected or list_self_texts(recipe) or not all(map(is_local, specs)):
        return TextFacts()
    is_code_allowed = allows_remote_code(recipe.source.trust_remote_code, folder)
    tokenizer = corpora.load_tokenizer(folder, is_code_allowed)
    calibrated, counts = set[str](), dict[TextUse, int]()
    for stream, name, sequences, length, seed in selected:
        corpus = corpora.load_set(name, place)
        tokens = corpora.sample_sequences(corpus, tokenizer, sequences, length, seed, calibrated)
        if stream == "calibration":
            calibrated = set(tokens.domains)
        notes += corpora.describe_left_out(corpus, tokens, tokenizer)
        largest.append(find_largest_id(tokens))
        counts[stream] = tokens.n_tokens
    return TextFacts(notes=tuple(notes), largest_ids=tuple(largest), tokens=counts)


def find_largest_id(tokens: Tokens) -> int:
    """Return the largest token id of a text; -1 for no tokens."""
    return int(tokens.ids.max()) if tokens.n_tokens else -1


def is_local(spec: CorpusSpec) -> bool:
    """Return whether all text of a set is on this machine."""
    if not spec.parts:
        return spec.file is not None or (spec.local is not None and spec.local.path is not None)
    place = package_data.locate_folder("calibration")
    return all(
        part.file is not None
        or part.texts is not None
        or part.builtin is not None
        or (part.local_path is not None and part.local_path.exists())
        or (part.set is not None and is_local(read_spec(part.set, place)))
        for part in spec.parts
    )
