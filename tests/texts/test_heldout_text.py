"""Text of the project's own, as fidelity text of kinds and languages that calibration lacks."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.paths import ROOT

from quantkit.errors import CalibrationError, UsageError
from quantkit.io import package_data
from quantkit.texts.corpora import load_set, load_tokenizer, sample_sequences
from quantkit.texts.corpus_spec import read_spec
from quantkit.texts.exposure import compute_unseen_share, pick_label
from quantkit.texts.interpreter_text import find_standard_library, read_documentation
from quantkit.texts.proportions import move_missing
from quantkit.texts.self_prompts import SELF_KINDS, SELF_LANGUAGES, list_prompts

SETS = ROOT / "calibration"
TINY = ROOT / "quantkit/data/models/tiny_v3/checkpoint"
FILES = sorted((SETS / "heldout").glob("*.txt"))
USES = ("everyday-heldout", "everyday-local-heldout", "general-heldout", "self-heldout")
GENERAL_LABELS = {"docs", "math", "code"}
RUN = 8
"""Words in a row that two independent texts do not share."""


def split_documents(file: Path) -> list[str]:
    """Return the documents of a file: two blank lines are between them."""
    return file.read_text(encoding="utf-8").strip("\n").split("\n\n\n")


def list_runs(text: str) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[n : n + RUN]) for n in range(len(words) - RUN + 1)}


def test_each_file_has_whole_documents_and_enough_text() -> None:
    assert len(FILES) == 11
    for file in FILES:
        documents = split_documents(file)
        assert len(documents) >= 8, file
        # in another script a character has two or three bytes and about as many tokens
        assert file.stat().st_size >= 9_900, file
        assert all(80 <= len(document.split()) <= 400 for document in documents), file
        assert not re.search(r"\n{4}|\r|[ \t]\n", file.read_text(encoding="utf-8")), file


def test_no_paragraph_is_there_twice() -> None:
    paragraphs = [p.strip() for file in FILES for p in file.read_text("utf-8").split("\n\n")]
    assert [p for p, count in Counter(paragraphs).items() if count > 1] == []


def test_documents_share_no_run_of_words_with_each_other_or_other_text() -> None:
    other = set[tuple[str, ...]]()
    for text in iterate_other_text():
        other |= list_runs(text)
    assert len(other) > 10_000
    for file in FILES:
        for document in split_documents(file):
            runs = list_runs(document)
            assert runs, document
            assert not runs & other, (file.name, next(iter(runs & other)))
            if not file.name.startswith("code"):  # imports and declarations recur in any code
                other |= runs


def iterate_other_text() -> Iterator[str]:
    """Yield the shipped sets, the prompts of `self`, and documentation of Python."""
    for path in SETS.glob("*.jsonl"):
        yield from (json.loads(line)["text"] for line in path.read_text("utf-8").splitlines())
    prompts = list_prompts(SELF_KINDS, SELF_LANGUAGES, has_openings=True, has_messages=True)
    yield from (prompt.text for rows in prompts.values() for prompt in rows)
    yield from read_documentation(find_standard_library(), "calibration")


@pytest.mark.parametrize("name", USES)
def test_specs_state_the_hash_of_each_file(name: str) -> None:
    texts = [text for part in read_spec(name, SETS).parts for text in part.texts or ()]
    assert texts
    for text in texts:
        assert hashlib.sha256(text.path.read_bytes()).hexdigest() == text.sha256, text.path


def test_every_file_is_used_with_a_label_of_its_own() -> None:
    parts = {name: read_spec(name, SETS).parts[-1].texts or () for name in USES}
    files = {text.path: text.label for text in parts["everyday-local-heldout"]}
    assert sorted(files) == FILES and len(set(files.values())) == len(FILES)
    for texts in parts.values():
        assert {text.path: text.label for text in texts}.items() <= files.items()


def test_texts_of_self_are_of_kinds_that_self_does_not_have() -> None:
    own, *_ = read_spec("self", SETS).parts
    for part in read_spec("self-heldout", SETS).parts[1:]:
        assert not set(part.labels) & set(own.labels), part.name


def test_sets_load_from_the_layout_of_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(SETS, tmp_path / "data/calibration")
    monkeypatch.setattr(package_data, "_PACKAGE", tmp_path)
    folder = package_data.locate_folder("calibration")
    assert folder.is_relative_to(tmp_path)
    corpus = load_set("general-heldout", folder)
    assert len(corpus.parts[-1].texts) == len(FILES)
    damaged = folder / "heldout/korean.txt"
    damaged.write_text(damaged.read_text("utf-8") + "x", "utf-8")
    with pytest.raises(CalibrationError, match=r"korean\.txt: expected sha256 [0-9a-f]{64}"):
        load_set("general-heldout", folder)


@pytest.mark.parametrize(("windows", "length"), [(60, 512), (32, 2048), (8, 256)])
def test_half_of_the_fidelity_text_is_of_kinds_that_were_not_calibrated_on(
    windows: int, length: int
) -> None:
    corpus = load_set("general-heldout", SETS)
    tokenizer = load_tokenizer(TINY)
    tokens = sample_sequences(corpus, tokenizer, windows, length, 0, GENERAL_LABELS)
    counts = Counter[str]()
    for label, n_tokens in zip(tokens.domains, tokens.lengths, strict=True):
        counts[label] += int(n_tokens)
    assert compute_unseen_share(counts, GENERAL_LABELS) >= 0.5
    assert {"code", "docs", "math"} <= set(counts)
    others = [counts[label] for label in corpus.parts[-1].labels if label in counts]
    assert len(others) == min(11, windows // 2)
    assert max(others) - min(others) <= 2 * length  # they take turns


def test_part_with_calibrated_labels_counts_as_seen() -> None:
    assert pick_label(("prose-es", "prose-tr"), {"prose-tr"}) == "prose-tr"
    assert pick_label(("prose-es", "prose-tr"), {"prose"}) == "prose-es"


def test_missing_sequences_go_to_parts_of_other_unseen_kinds() -> None:
    counts = {"seen": 20, "texts": 12, "web-es": 6, "web-ru": 2}
    moved = move_missing(counts, {"texts": 4}, ["texts", "web-es", "web-ru"])
    assert moved == {"seen": 20, "texts": 4, "web-es": 12, "web-ru": 4}
    assert move_missing(counts, {"texts": 12}, ["texts", "web-es"]) == counts
    assert move_missing(counts, {"texts": 4}, ["texts"]) == counts  # nobody can take them


def write_mixture(folder: Path, texts: str, more: str = "") -> Path:
    path = folder / "m.yaml"
    path.write_text(
        "version: 2\nname: m\nparts:\n"
        f"  - {{name: a, kind: other, licence: MIT, {more}texts: [{texts}]}}\n",
        encoding="utf-8",
    )
    return path


def test_files_take_turns_and_end_with_a_shorter_window(tmp_path: Path) -> None:
    rows = list[str]()
    for name, words in (("one", 300), ("two", 100)):
        text = " ".join(f"{name}{n}" for n in range(words))
        (tmp_path / f"{name}.txt").write_text(text, encoding="utf-8")
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        rows.append(f"{{file: {name}.txt, kind: {name}, sha256: {sha256}}}")
    corpus = load_set(str(write_mixture(tmp_path, ", ".join(rows))), tmp_path)
    tokenizer = load_tokenizer(TINY)
    few = sample_sequences(corpus, tokenizer, 4, 64, 0)
    assert Counter(few.domains) == {"one": 2, "two": 2}
    assert all(n == 64 for n in few.lengths)
    total = {
        name: len(tokenizer([text], add_special_tokens=False, verbose=False)["input_ids"][0])
        for name, text in zip(("one", "two"), corpus.parts[0].texts, strict=True)
    }
    windows = sum(n // 64 for n in total.values())
    every = sample_sequences(corpus, tokenizer, windows, 64, 0)
    assert every.n_tokens >= windows * 64
    with pytest.raises(UsageError, match="enough for"):
        sample_sequences(corpus, tokenizer, windows + 3, 64, 0)


@pytest.mark.parametrize(
    ("texts", "more", "message"),
    [
        ("{file: a.txt, kind: x}", "", "sha256: missing"),
        (", ".join([f"{{file: a.txt, kind: x, sha256: {'0' * 64}}}"] * 2), "", "x: two files of"),
        (f"{{file: a.txt, kind: x, sha256: {'0' * 64}}}", "packing: documents, ", "packing: wind"),
        (f"{{file: a.txt, kind: x, sha256: {'0' * 64}}}", "file: b.txt, ", "file and texts"),
        (f"{{file: ../a.txt, kind: x, sha256: {'0' * 64}}}", "", "file"),
        (f"{{file: a.txt, kind: x, sha256: {'0' * 64}}}", "template: '{a}', ", "found `template`"),
        ("", "", "texts"),
    ],
)
def test_faulty_texts_are_refused(tmp_path: Path, texts: str, more: str, message: str) -> None:
    with pytest.raises(CalibrationError, match=re.escape(message)):
        read_spec(str(write_mixture(tmp_path, texts, more)), tmp_path)
